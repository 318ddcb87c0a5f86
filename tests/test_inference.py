"""A trained model is used: the right checkpoint is taken, and its figures are those of the run."""

from __future__ import annotations

import csv
import gc
import io
import json
import math
import os
import shutil
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageOps

from allranks.base.errors import RunError, UserError
from allranks.compose import from_command_line
from allranks.data import mnist
from allranks.inference import command, forward, images, load, overrides
from allranks.inference import export as exporting
from allranks.job.identity import RankIdentity
from allranks.run import checkpoint
from helpers import PYTHON, ROOT, SMALL, Run, execute_forked, only_long, real_data, tree

# One worker trains once for all of these tests.
pytestmark = pytest.mark.xdist_group("inference")
QUICK = [*SMALL, "report=false"]
WORDS = [*QUICK, "model=mlp", "model.widths=[32]", "trainer.epochs=3", "checkpoint.keep=3"]


def trained_here(directory: Path, *overrides: str) -> Path:
    """A run in this process; its directory."""
    from allranks.train import run as run_training

    [config] = from_command_line([*overrides, f"run.dir={directory}"])
    run_training(config, RankIdentity("none"))
    gc.unfreeze()  # this process goes on
    return directory


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run on drawn digits; tests do not change it."""
    return trained_here(tmp_path_factory.mktemp("drawn") / "run", *WORDS)


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The directory of a finished run on real MNIST, of an epoch in large batches."""
    words = ["model=mlp", "model.widths=[64]", "optimizer=adam", "device=cpu", "data.fetch=false"]
    words += ["trainer.epochs=1", "trainer.batch_size=500", "trainer.precision=fp32", "report=false"]
    words += ["trainer.train_metrics=running", f"data.root={real_data()}", "optimizer.lr=0.005"]
    return trained_here(tmp_path_factory.mktemp("digits") / "run", *words)


@pytest.fixture
def copy(drawn: Path, tmp_path: Path) -> Path:
    """A copy of that run, to be damaged."""
    return Path(shutil.copytree(drawn, tmp_path / "run"))


def lose(path: Path) -> None:
    """Damages a checkpoint by one byte."""
    file = path / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


# --- which checkpoint ----------------------------------------------------------------------------------


def test_the_newest_is_taken_unless_another_is_asked_for(drawn):
    steps = checkpoint.steps(drawn)
    assert len(steps) == 3
    losses = {line["step"]: line["val/loss"] for line in Run(drawn).metrics}
    best = min(losses, key=lambda step: losses[step])
    assert checkpoint.step_of(load.choose(drawn).path) == steps[0]
    assert checkpoint.step_of(load.choose(drawn, "best").path) == best
    assert checkpoint.step_of(load.choose(drawn, str(steps[2])).path) == steps[2]
    by_path = load.choose(drawn, str(checkpoint.path_of(drawn, steps[1])))
    assert by_path.files == checkpoint.read(checkpoint.path_of(drawn, steps[1]))


def test_the_best_is_the_one_with_the_least_validation_loss_and_not_the_newest(tmp_path):
    """A learning rate that is far too large: the loss grows again."""
    words = [*QUICK, "model=linear", "optimizer.lr=3", "trainer.epochs=4", "checkpoint.keep=4"]
    run = trained_here(tmp_path / "run", *words, "trainer.clip_norm=1000")
    losses = {line["step"]: line["val/loss"] for line in Run(run).metrics}
    in_order = sorted(losses, key=lambda step: (losses[step], -step))
    assert in_order[0] != max(losses), losses  # else this says nothing
    assert checkpoint.step_of(load.choose(run, "best").path) == in_order[0]
    lose(checkpoint.path_of(run, in_order[0]))
    second = load.choose(run, "best")
    assert checkpoint.step_of(second.path) == in_order[1]
    assert second.passed_over[0].startswith(f"step-{in_order[0]:06d}: model.safetensors: its sha256 is")


def test_of_a_damaged_checkpoint_the_one_before_is_taken_and_that_is_said(copy):
    newest, before, _ = checkpoint.steps(copy)
    lose(checkpoint.path_of(copy, newest))
    trained = load.load(copy)
    assert trained.step == before
    [remark] = trained.remarks
    assert remark.startswith(f"the checkpoint step-{newest:06d}: model.safetensors: its sha256 is")
    assert remark.endswith("it was passed over")


def test_reading_leaves_no_trace_and_asks_for_no_permission(drawn):
    before = {name: (drawn / name).stat().st_mtime_ns for name in tree(drawn)}
    trained = load.load(drawn, "best")
    forward.forward(trained, forward.open_part(trained))
    assert {name: (drawn / name).stat().st_mtime_ns for name in tree(drawn)} == before


def test_a_run_that_was_cut_off_is_used_as_far_as_it_came(copy):
    (copy / "summary.json").unlink()
    (copy / "environment.json").unlink()
    newest, *earlier = checkpoint.steps(copy)
    shutil.rmtree(checkpoint.path_of(copy, newest))
    trained = load.load(copy)
    assert (trained.step, trained.epoch) == (earlier[0], 2)
    val = forward.forward(trained, forward.open_part(trained, "val"))
    assert val.figures.loss == Run(copy).metrics[1]["val/loss"]


# --- the figures ---------------------------------------------------------------------------------------


def test_the_figures_are_the_runs_own_to_the_last_digit(drawn):
    trained = load.load(drawn)
    summary, metrics = Run(drawn).summary, Run(drawn).metrics[-1]
    assert (trained.epoch, trained.step) == (3, metrics["step"])
    for name in forward.PARTS:
        figures = forward.forward(trained, forward.open_part(trained, name)).figures
        said = summary if name == "test" else metrics
        assert figures.loss == said[f"{name}/loss"]
        assert figures.values["accuracy"] == said[f"{name}/accuracy"]


def test_of_a_run_that_looks_at_few_examples_the_same_ones_are_evaluated(train_here):
    run = train_here(*WORDS, "trainer.epochs=1", "trainer.limit_eval=50", "run.dir=run")
    trained = load.load(run.path)
    for name, said in (("test", run.summary), ("val", run.metrics[-1])):
        figures = forward.forward(trained, forward.open_part(trained, name)).figures
        assert (figures.examples, figures.loss) == (50, said[f"{name}/loss"])
    other = forward.open_part(trained, "test", trained.config.data, is_other_data=True)
    assert len(other) == 400


@pytest.mark.parametrize("ranks", [3])
def test_the_figures_of_a_run_on_several_ranks_are_repeated_by_one_process(train, ranks):
    run = train(*WORDS, "run.dir=run", ranks=ranks).ok().run
    trained = load.load(run.path)
    assert trained.runtime.share_count == ranks
    outputs = forward.forward(trained, forward.open_part(trained))
    assert outputs.figures.loss == run.summary["test/loss"]
    assert outputs.figures.values["accuracy"] == run.summary["test/accuracy"]


def test_the_logits_stand_in_the_order_of_the_data_whatever_the_shares(drawn):
    import torch

    trained = load.load(drawn)
    part = forward.open_part(trained)
    alone = forward.forward(trained, part)
    trained.runtime.virtual_ranks = 3
    shared = forward.forward(trained, part)
    assert torch.equal(alone.labels, shared.labels)
    assert torch.allclose(alone.logits, shared.logits, atol=1e-6)

    images = forward.images_at(trained, part, [5, 0, 7])
    assert torch.equal(images[1], part.first(1, 0).images[0])
    assert torch.allclose(forward.logits_of(trained, images), alone.logits[[5, 0, 7]], atol=1e-6)
    assert forward.images_at(trained, part, []).shape == (0, 1, 28, 28)


def test_the_confusion_counts_every_example_once(drawn):
    trained = load.load(drawn)
    outputs = forward.forward(trained, forward.open_part(trained))
    confusion = outputs.confusion()
    assert int(confusion.sum()) == outputs.figures.examples == 400
    assert 100 * int(confusion.diagonal().sum()) / 400 == outputs.figures.values["accuracy"]
    assert confusion.sum(dim=1).tolist() == outputs.labels.bincount(minlength=10).tolist()
    assert outputs.probabilities.sum(dim=1).allclose(outputs.logits.new_ones(400))


def test_classes_have_the_names_that_the_data_give_them(drawn):
    trained = load.load(drawn)
    assert forward.class_names(trained) == [str(digit) for digit in range(10)]
    [fashion] = from_command_line(["data=fashion_mnist"])
    trained.config.data["class_names"] = fashion.data["class_names"]
    assert forward.class_names(trained)[9] == "Ankle boot"
    trained.config.data["class_names"] = ["too", "few"]
    assert forward.class_names(trained)[9] == "9"


def test_real_digits_are_loaded_from_a_checkpoint_as_well(digits):
    trained = load.load(digits)
    outputs = forward.forward(trained, forward.open_part(trained))
    assert outputs.figures.loss == Run(digits).summary["test/loss"]
    assert outputs.labels[:5].tolist() == [7, 2, 1, 0, 4]  # how the published test labels begin


# --- what cannot be used -------------------------------------------------------------------------------


def test_what_is_no_run_is_refused_in_one_message(tmp_path, drawn):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").touch()
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep/cells.jsonl").touch()
    for name, said in {
        "none": "is missing: give the directory of a run",
        "file": "is a file: give the directory of a run",
        "empty": "is empty, so it is not the directory of a run",
        "other": "has no config.yaml, so it is not the directory of a run",
        "sweep": "is a sweep: give one of its runs, such as",
    }.items():
        with pytest.raises(UserError, match=said):
            load.load(tmp_path / name)


def test_a_run_without_a_usable_checkpoint_is_refused(copy):
    for step in checkpoint.steps(copy):
        lose(checkpoint.path_of(copy, step))
    with pytest.raises(UserError, match=r"can be used: step-.*; step-.*; step-.* Bring one back"):
        load.load(copy)
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(UserError, match="has no checkpoint yet: a run saves its first one after"):
        load.load(copy)


def test_a_checkpoint_that_was_named_is_not_replaced_by_another(copy):
    newest = checkpoint.steps(copy)[0]
    lose(checkpoint.path_of(copy, newest))
    with pytest.raises(UserError, match=rf"--checkpoint {newest}: .* is no valid checkpoint \(model"):
        load.load(copy, str(newest))
    with pytest.raises(UserError, match=r"--checkpoint 7: .* has no such step. It has "):
        load.load(copy, "7")
    with pytest.raises(UserError, match=r"--checkpoint newset: newset is no valid checkpoint .*`best`"):
        load.load(copy, "newset")


@pytest.mark.parametrize("which", ["newest", "best", "5"])
def test_a_folder_of_checkpoints_that_cannot_be_read_is_told(copy, which):
    shutil.rmtree(copy / "checkpoints")
    (copy / "checkpoints").touch()
    with pytest.raises(UserError, match=r"run/checkpoints cannot be read \(Not a directory\)"):
        load.choose(copy, which)


def test_a_file_in_a_folder_that_may_not_be_looked_into_is_not_written(closed):
    with pytest.raises(UserError, match=r"--to .*closed/x\.pt2 cannot be written \(Permission denied\)"):
        exporting.check_place(closed / "x.pt2", force=False)
    with pytest.raises(UserError, match=r"--npy .*closed/x\.npy cannot be written \(Permission denied\)"):
        command.predict(["run", "--data", "test", "--npy", str(closed / "x.npy")])


def test_a_configuration_that_is_cut_off_is_refused_in_one_sentence_with_what_to_do(copy):
    config = copy / "config.yaml"
    config.write_text(config.read_text() + "trainer: [")
    with pytest.raises(UserError, match=r"cannot be read .*: bring it back from a copy, or give"):
        load.load(copy)


def test_a_run_of_a_newer_version_is_refused_by_that_versions_number(copy):
    config, environment = copy / "config.yaml", copy / "environment.json"
    config.write_text(config.read_text() + "invented: 1\n")
    with pytest.raises(UserError, match=r"has a configuration that cannot be used: invented is not a key"):
        load.load(copy)
    about = json.loads(environment.read_text())
    about["versions"]["allranks"] = "9.1"
    environment.write_text(json.dumps(about))
    with pytest.raises(UserError, match=r"is of allranks 9\.1, and this is .*: use that version"):
        load.load(copy)


def test_a_checkpoint_of_another_model_or_of_another_format_is_refused(copy, tmp_path):
    config = copy / "config.yaml"
    whole = config.read_text()
    config.write_text(whole.replace("- 32\n", "- 31\n"))
    with pytest.raises(UserError, match=r"does not fit the model that the run's config.yaml describes"):
        load.load(copy)
    config.write_text(whole.replace("allranks.models.mlp", "nowhere_to_be_found.Model"))
    with pytest.raises(
        UserError, match="no module nowhere_to_be_found is installed here, or on PYTHONPATH"
    ):
        load.load(copy)
    config.write_text(whole.replace("allranks.models.mlp", "nowhere.Model"))
    with pytest.raises(UserError, match=r"type the command in the folder where the training was typed"):
        load.load(copy)


def test_data_that_do_not_fit_the_model_are_refused(drawn):
    trained = load.load(drawn)
    section = trained.config.data
    with pytest.raises(
        UserError, match=r"data.input_shape=\[3, 32, 32\]: the model of .* takes \[1, 28, 28\]"
    ):
        forward.open_part(trained, "test", {**section, "input_shape": [3, 32, 32]})
    with pytest.raises(UserError, match=r"data.classes=11: the model of .* knows 10 classes"):
        forward.open_part(trained, "test", {**section, "classes": 11})


def test_a_device_that_this_host_lacks_is_replaced_by_one_that_it_has(copy):
    if load.is_available("xpu"):
        pytest.skip("this host has one")
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("device: cpu", "device: xpu"))
    trained = load.load(copy)
    assert trained.remarks == ("the run was told device=xpu, which this host does not have",)
    with pytest.raises(UserError, match=r"device=xpu: torch .* sees no such device"):
        load.load(copy, device="xpu")


def test_a_precision_that_the_device_lacks_is_replaced_and_that_is_said(copy):
    config = copy / "config.yaml"
    config.write_text(config.read_text().replace("precision: fp64", "precision: fp16"))
    trained = load.load(copy, device="cpu")
    assert trained.precision == "fp32"
    assert trained.remarks == ("the run was trained with fp16, which cpu does not have here: fp32 is used",)


# --- images --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published():
    """The published test digits: images uint8 [10000, 28, 28] and labels."""
    return mnist.load("mnist", "test", str(real_data()))


def enlarged(digit: np.ndarray) -> Image.Image:
    """The digit as somebody may have drawn it: large, and not in the middle of a sheet."""
    large = Image.fromarray(digit).resize((280, 280), Image.Resampling.BICUBIC)
    sheet = Image.new("L", (500, 340), 0)
    sheet.paste(large, (190, 40))
    return sheet


def transparent(digit: np.ndarray) -> Image.Image:
    """Black ink on a ground that lets everything through."""
    sheet = enlarged(digit)
    drawing = Image.new("RGBA", sheet.size, (0, 0, 0, 0))
    drawing.putalpha(sheet)
    return drawing


def photographed(digit: np.ndarray) -> Image.Image:
    """Blue ink on grey paper that is darker on one side, with grain."""
    ink = np.asarray(enlarged(digit), dtype=np.float64)[..., None] / 255
    paper = np.full(ink.shape[:2], 215.0) - np.linspace(0, 25, ink.shape[1])
    grain = np.random.default_rng(0).normal(0, 4, ink.shape[:2])
    coloured = (1 - ink) * (paper + grain)[..., None] + ink * np.array([30.0, 40.0, 120.0])
    return Image.fromarray(coloured.clip(0, 255).astype(np.uint8))


VARIANTS: dict[str, Callable[[np.ndarray], Image.Image]] = {
    "as published": Image.fromarray,
    "dark on light": lambda digit: Image.fromarray(255 - digit),
    "large": enlarged,
    "large, dark on light": lambda digit: ImageOps.invert(enlarged(digit)),
    "transparent": transparent,
    "photographed": photographed,
    "16 bits": lambda digit: Image.fromarray(digit.astype(np.uint16) * 257),
    "palette": lambda digit: Image.fromarray(digit).convert("P"),
    "grey with alpha": lambda digit: Image.fromarray(digit).convert("LA"),
}


# Hundreds of large coloured images take seconds to prepare.
@pytest.mark.parametrize(
    "variant", [only_long(each) if each == "photographed" else each for each in VARIANTS]
)
def test_a_digit_is_known_again_whatever_its_image_looks_like(digits, published, tmp_path, variant):
    """Of a hundred digits that the model knows, nearly all keep their class, and the first one surely."""
    import torch

    trained = load.load(digits)
    plan = images.plan([1, 28, 28], "auto", "auto", is_fashion=False, transform=None)
    pictures, labels = published
    path = tmp_path / "digit.png"

    def prepared(digit: np.ndarray) -> images.Prepared:
        VARIANTS[variant](digit).save(path)
        return images.prepare(images.read(path), plan, path)

    own = forward.logits_of(trained, torch.from_numpy(pictures[:120].copy()).unsqueeze(1) / 255)
    known = [i for i in range(120) if int(own[i].argmax()) == labels[i]][:100]
    made = [prepared(pictures[i]) for i in known]
    assert {each.inverted for each in made} == {
        variant in ("dark on light", "large, dark on light", "transparent", "photographed")
    }
    logits = forward.logits_of(trained, torch.stack([each.pixels for each in made]))
    kept = sum(int(logits[n].argmax()) == labels[i] for n, i in enumerate(known))
    assert int(logits[0].argmax()) == labels[0] == 7
    assert kept >= 95 if made[0].how.startswith("digit fitted") else kept == 100


def test_a_fitted_digit_stands_as_mnists_do(published):
    """In a box of 20 x 20, with its centre of mass at pixel 14."""
    plan = images.plan([1, 28, 28], "auto", "auto", is_fashion=False, transform=None)
    for digit in published[0][:50]:
        pixels = images.prepare(enlarged(digit), plan, Path("x")).pixels[0].numpy()
        rows, columns = np.nonzero(pixels > 0.05)
        assert max(np.ptp(rows), np.ptp(columns)) + 1 in (19, 20)
        total = pixels.sum()
        centre = (pixels.sum(axis=1) @ np.arange(28) / total, pixels.sum(axis=0) @ np.arange(28) / total)
        assert centre == pytest.approx((14, 14), abs=0.51)
        assert pixels.max() == 1


def test_a_drawing_with_a_thin_pen_gets_a_bold_one(tmp_path):
    plan = images.plan([1, 28, 28], "auto", "auto", is_fashion=False, transform=None)
    sheet = np.full((400, 400), 255, np.uint8)
    sheet[50:350, 200:202] = 0  # a 1, two pixels wide and 300 high
    pixels = images.prepare(Image.fromarray(sheet), plan, Path("x")).pixels[0].numpy()
    widths = (pixels > 0.5).sum(axis=1)
    assert sorted({int(width) for width in widths}) == [0, 2]
    assert int((widths > 0).sum()) == 20


def test_images_of_other_shapes_are_cropped_or_fitted_whole():
    red = Image.new("RGB", (60, 40), (255, 0, 0))
    cropped = images.prepare(
        red, images.plan([3, 32, 32], "auto", "auto", is_fashion=False, transform=None), Path("x")
    )
    assert (cropped.pixels.shape, cropped.how) == ((3, 32, 32), "middle cropped to 32 x 32")
    assert (cropped.pixels[0].min(), cropped.pixels[1].max(), cropped.inverted) == (1, 0, False)

    shirt = Image.new("L", (60, 30), 255)
    shirt.paste(40, (20, 5, 40, 25))
    plan = images.plan([1, 28, 28], "auto", "auto", is_fashion=True, transform=None)
    whole = images.prepare(shirt, plan, Path("x"))
    assert (whole.how, whole.inverted) == ("fitted whole into 28 x 28", True)
    assert float(whole.pixels[0, 14, 14]) == pytest.approx(215 / 255)
    assert float(whole.pixels[0, 0].max()) == 0

    kept = images.plan([1, 28, 28], "whole", "keep", is_fashion=False, transform=None)
    assert not images.prepare(shirt, kept, Path("x")).inverted


def test_the_datas_own_transform_is_used_where_it_has_one():
    import torch

    plan = images.plan([1, 2, 2], "auto", "auto", is_fashion=False, transform=lambda _: torch.ones(1, 2, 2))
    made = images.prepare(Image.new("L", (9, 9), 7), plan, Path("x"))
    assert (made.pixels.tolist(), made.how) == ([[[1, 1], [1, 1]]], "by the data's own transform")


def test_a_grey_image_is_one_in_colours_for_a_model_that_takes_these():
    """So the data's own transform gets what torchvision's ImageFolder gave it in training."""
    import torch

    seen = []

    def transform(image: Image.Image) -> torch.Tensor:
        seen.append(image.mode)
        return torch.ones(3, 2, 2)

    plan = images.plan([3, 2, 2], "auto", "auto", is_fashion=False, transform=transform)
    for mode in ("L", "LA", "1", "P"):
        images.prepare(Image.new(mode, (9, 9), 0), plan, Path("x"))
    assert seen == ["RGB"] * 4


def test_classes_beyond_those_of_the_data_have_numbers_as_names():
    """A model may have more outputs than the data has classes."""
    trained = SimpleNamespace(config=SimpleNamespace(data={"classes": 2, "class_names": ["cat", "dog"]}))
    assert forward.class_names(trained, outputs=4) == ["cat", "dog", "2", "3"]


def test_data_of_another_kind_are_composed_without_a_model(tmp_path):
    """The default model asks for the shape of images, which a table does not have."""
    (tmp_path / "data").mkdir()
    table = {"train": {"_target_": "x.table"}, "test": {"_target_": "x.table"}, "split": [6, 4]}
    (tmp_path / "data/table.yaml").write_text(json.dumps(table))
    [config] = from_command_line(["data=synthetic"])
    given = overrides.apply(config, ["data=table", "threads=1"], str(tmp_path))
    assert (given.data, given.threads) == (table, 1)


def test_the_datas_own_transform_gets_8_bits_and_an_opaque_image(published):
    """A transform that, like torchvision's, makes numbers of 0..1 of 8 bits and of nothing else."""
    import torch

    def transform(image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image.convert("L"), dtype=np.float32)).unsqueeze(0) / 255

    plan = images.plan([1, 28, 28], "auto", "auto", is_fashion=False, transform=transform)
    digit = published[0][0]
    wide = images.prepare(VARIANTS["16 bits"](digit), plan, Path("x"))
    assert wide.pixels[0].numpy() == pytest.approx(digit / 255)
    ink = images.prepare(transparent(digit), plan, Path("x")).pixels[0].numpy()
    assert ink == pytest.approx(1 - np.asarray(enlarged(digit)) / 255, abs=0.01)


@pytest.mark.parametrize("error", [KeyError("size"), AssertionError(), RuntimeError()])
def test_what_a_users_code_raises_is_told_in_one_message(drawn, error):
    """A transform, and a model, that raise."""
    import dataclasses

    import torch

    def fail(_: object) -> torch.Tensor:
        raise error

    kind = type(error).__name__
    plan = images.plan([1, 2, 2], "auto", "auto", is_fashion=False, transform=fail)
    with pytest.raises(UserError, match=rf"x: the data's own transform does not take it \({kind}: "):
        images.prepare(Image.new("L", (9, 9), 7), plan, Path("x"))

    trained = dataclasses.replace(load.load(drawn), model=torch.nn.Module())
    trained.model.forward = fail
    with pytest.raises(UserError, match=rf"does not take images of shape \[1, 2, 2\] \({kind}: "):
        forward.logits_of(trained, torch.zeros(3, 1, 2, 2))
    with pytest.raises(UserError, match=rf"does not take the batch, an Examples .* \({kind}: "):
        forward.outputs_in_order(trained, forward.open_part(trained))


def test_too_little_memory_is_not_told_as_a_wrong_shape(drawn):
    import dataclasses

    import torch

    def take_all(_: object) -> torch.Tensor:
        return torch.empty(1 << 60)

    trained = dataclasses.replace(load.load(drawn), model=torch.nn.Module())
    trained.model.forward = take_all
    with pytest.raises(UserError, match=r"The memory of the cpu is too small .* with 3 examples at once"):
        forward.logits_of(trained, torch.zeros(3, 1, 2, 2))


def test_an_image_of_12_bits_in_a_file_of_16_bits_is_as_bright_as_one_of_8(published):
    """Divided by 257, as an image of 16 bits, it would have nothing on it."""
    plan = images.plan([1, 28, 28], "auto", "auto", is_fashion=False, transform=None)
    sheet = np.asarray(enlarged(published[0][0]))
    few = images.prepare(Image.fromarray(sheet), plan, Path("x"))
    of_12_bits = (sheet.astype(np.int64) * 4095 // 255).astype(np.uint16)
    wide = images.prepare(Image.fromarray(of_12_bits), plan, Path("x"))
    assert wide.how == few.how == "digit fitted to 20 x 20 in 28 x 28"
    assert wide.pixels.numpy() == pytest.approx(few.pixels.numpy(), abs=0.02)


def test_a_polarity_that_hides_the_digit_is_named(published):
    light = enlarged(published[0][0])  # light on dark
    for polarity, image, said in (
        ("keep", ImageOps.invert(light), "x has a light ground, and a digit has to be light"),
        ("invert", light, "x has a light ground once light and dark are exchanged, and a digit"),
    ):
        plan = images.plan([1, 28, 28], "auto", polarity, is_fashion=False, transform=None)
        with pytest.raises(UserError, match=f"{said}.*leave --polarity {polarity} out"):
            images.prepare(image, plan, Path("x"))


def test_single_dots_far_apart_are_no_digit():
    sheet = np.full((3000, 3000), 255, np.uint8)
    sheet[0, 0] = sheet[-1, -1] = 0
    plan = images.plan([1, 28, 28], "auto", "auto", is_fashion=False, transform=None)
    with pytest.raises(UserError, match="x has nothing on it but dots"):
        images.prepare(Image.fromarray(sheet), plan, Path("x"))


def test_colours_of_another_kind_are_converted_or_refused_by_name(tmp_path):
    """Lab colours, as a TIFF may have them, for a grey model; Pillow itself converts them to RGB only."""
    plan = images.plan([1, 32, 32], "auto", "auto", is_fashion=False, transform=None)
    red = Image.new("RGB", (40, 40), (200, 0, 0))
    red.convert("LAB").save(tmp_path / "red.tiff")
    of_lab = images.read(tmp_path / "red.tiff")
    assert of_lab.mode == "LAB"
    expected = images.prepare(red, plan, Path("x")).pixels.numpy()
    assert images.prepare(of_lab, plan, Path("x")).pixels.numpy() == pytest.approx(expected, abs=0.03)
    with pytest.raises(UserError, match=r"x has colours of the kind La, .*save it as a PNG"):
        images.prepare(Image.new("La", (40, 40)), plan, Path("x"))


def broken(path: Path) -> Path:
    whole = io.BytesIO()
    Image.new("L", (300, 300), 7).save(whole, "PNG")
    path.write_bytes(whole.getvalue()[:-40])
    return path


def bomb(path: Path) -> Path:
    """A PNG that says it has 2 thousand million pixels."""
    whole = io.BytesIO()
    Image.new("L", (1, 1)).save(whole, "PNG")
    head = bytearray(whole.getvalue())
    head[16:24] = (50_000).to_bytes(4, "big") + (40_000).to_bytes(4, "big")
    head[29:33] = zlib.crc32(head[12:29]).to_bytes(4, "big")
    path.write_bytes(head)
    return path


def test_what_is_no_image_is_refused_by_name(tmp_path):
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("seven")
    os.mkfifo(tmp_path / "pipe.png")
    large = tmp_path / "large.png"
    Image.new("1", (10_001, 10_000)).save(large)
    for path, said in {
        tmp_path / "none.png": "is missing: give image files",
        tmp_path: "is a directory: give image files",
        tmp_path / "pipe.png": "is no regular file: give image files",
        tmp_path / "empty.png": "is empty: give a PNG",
        tmp_path / "text.png": "is no image that can be read: give a PNG",
        broken(tmp_path / "broken.png"): "cannot be read as an image: ",
        bomb(tmp_path / "bomb.png"): "more than 100,000,000",
        large: "has 10,001 x 10,000 pixels, more than 100,000,000: make it smaller",
    }.items():
        with pytest.raises(UserError) as refused:
            images.read(path)
        assert str(refused.value).startswith(f"{path} ") and said in str(refused.value)
    blank = images.plan([1, 28, 28], "auto", "auto", is_fashion=False, transform=None)
    with pytest.raises(UserError, match="blank has nothing on it"):
        images.prepare(Image.new("L", (90, 90), 200), blank, Path("blank"))


def test_an_input_that_no_image_can_give_is_refused():
    with pytest.raises(UserError, match=r"inputs of shape \[128\], which an image file cannot give"):
        images.plan([128], "auto", "auto", is_fashion=False, transform=None)
    with pytest.raises(UserError, match="--fit digit is for models that take"):
        images.plan([3, 32, 32], "digit", "auto", is_fashion=False, transform=None)


# --- allranks predict ----------------------------------------------------------------------------------


def test_predict_tells_class_probability_and_what_was_done(digits, published, tmp_path, capsys):
    enlarged(published[0][0]).save(tmp_path / "seven.png")
    ImageOps.invert(Image.fromarray(published[0][1])).save(tmp_path / "two.png")
    words = [str(digits), str(tmp_path / "seven.png"), str(tmp_path / "two.png")]
    assert command.predict(words) == 0
    title, header, *rows = capsys.readouterr().out.splitlines()
    assert title.startswith(f"{digits}: step-000096, after 1 epoch, on cpu")
    assert header.split() == ["image", "class", "probability", "then", "prepared"]
    assert rows[0].split()[1] == "7" and rows[0].endswith("  digit fitted to 20 x 20 in 28 x 28")
    assert rows[1].split()[1] == "2" and rows[1].endswith("  inverted, as it is")

    assert command.predict([*words, "--json", "--top", "2"]) == 0
    seven, two = map(json.loads, capsys.readouterr().out.splitlines())
    assert (seven["class"], two["class"], two["inverted"]) == (7, 2, True)
    assert [len(seven[key]) for key in ("top", "probabilities")] == [2, 10]
    assert sum(seven["probabilities"]) == pytest.approx(1)
    assert seven["top"][0]["probability"] == seven["probability"] == max(seven["probabilities"])


def test_what_can_be_predicted_is_predicted_beside_what_cannot(digits, published, tmp_path, capsys):
    enlarged(published[0][0]).save(tmp_path / "seven.png")
    assert command.predict([str(digits), "no.png", str(tmp_path / "seven.png"), str(tmp_path)]) == 1
    out, err = capsys.readouterr()
    assert len(out.splitlines()) == 3
    assert len(err.splitlines()) == 2 and "no.png is missing" in err
    with pytest.raises(UserError, match=r"None of the 2 images can be used. no.png is missing"):
        command.predict([str(digits), "no.png", str(tmp_path)])
    with pytest.raises(UserError, match=r"^no.png is missing"):
        command.predict([str(digits), "no.png"])


def test_predict_counts_what_is_taken_for_what(drawn, tmp_path, capsys):
    assert command.predict([str(drawn), "--data", "test", "--csv", str(tmp_path / "test.csv")]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out[1].split() == ["test/loss", repr(Run(drawn).summary["test/loss"])]
    cells = [list(map(int, line.split()[1:])) for line in out[6:16]]
    assert sum(map(sum, cells)) == 400
    correct = sum(cells[digit][digit] for digit in range(10))
    assert 100 * correct / 400 == Run(drawn).summary["test/accuracy"]

    lines = list(csv.DictReader((tmp_path / "test.csv").open()))
    assert len(lines) == 400
    assert sum(line["label"] == line["class"] for line in lines) == correct
    assert float(lines[3][f"probability_{lines[3]['class']}"]) >= 0.1
    with pytest.raises(UserError, match=r"test\.csv is there already: give another name, or --force"):
        command.predict([str(drawn), "--data", "test", "--csv", str(tmp_path / "test.csv")])

    assert command.predict([str(drawn), "--data", "val", "--json"]) == 0
    examples = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [example["index"] for example in examples] == list(range(400))
    right = sum(example["class"] == example["label"] for example in examples)
    assert 100 * right / 400 == Run(drawn).metrics[-1]["val/accuracy"]


def test_of_many_classes_the_commonest_mistakes_are_listed():
    import torch

    counts = torch.diag(torch.full((30,), 9))
    counts[3, 4], counts[20, 1] = 5, 7
    shown = command.confusion_table(counts, [f"c{number}" for number in range(30)])
    assert [line.split() for line in shown.splitlines()] == [
        ["the", "commonest", "mistakes"], ["true", "predicted", "count"],
        ["c20", "c1", "7"], ["c3", "c4", "5"],
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ([], "There is nothing to predict: give image files, or --data test."),
        (["--data", "test", "x.png"], "--data test and images (x.png): give one or the other."),
        (["x.png", "--csv", "f"], "--csv needs --data"),
        (["x.png", "trainer.epochs=2"], "None of the 2 images can be used."),
        (["--data", "test", "data.input_shape=[3,28,28]"], "data.input_shape=[3, 28, 28]: the model of"),
        (["--data", "test", "data.rot=/x"], "data.rot is not a key of the configuration. Did you mean"),
        (
            ["--data", "test", "data=nothing"],
            "data=nothing is not one of the choices: fashion_mnist, mnist",
        ),
        (["--data", "test", "device=gpu"], "device=gpu is not valid: give one of auto, cuda"),
        (["--data", "test", "data.classes=11"], "data.classes=11: the model of"),
        (["--data", "train", "data.split=[1,2]"], "data.split=[1, 2] sums to 3, but there are 1,600"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_a_command_line_that_makes_no_sense_is_refused(drawn, words, said):
    with pytest.raises(UserError) as refused:
        command.predict([str(drawn), *words])
    assert str(refused.value).startswith(said)


# --- allranks evaluate ---------------------------------------------------------------------------------


def test_evaluate_repeats_the_figures_of_the_run(drawn, capsys):
    assert command.evaluate([str(drawn)]) == 0
    out = capsys.readouterr().out
    assert repr(Run(drawn).summary["test/loss"]) in out
    assert out.endswith("These are the figures in summary.json, to the last digit.\n")
    assert command.evaluate([str(drawn), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["equals_summary"] is True
    assert said["differences"] == {"test/loss": 0, "test/accuracy": 0, "test/count": 0}
    assert said["test/loss"] == Run(drawn).summary["test/loss"]


def test_evaluate_says_by_how_much_the_figures_differ(copy, capsys):
    summary = json.loads((copy / "summary.json").read_text())
    summary["test/loss"] -= 0.25
    (copy / "summary.json").write_text(json.dumps(summary))
    assert command.evaluate([str(copy)]) == 0
    assert "summary.json has other figures: test/loss by +0.25." in capsys.readouterr().out


def test_evaluate_knows_a_figure_that_is_not_finite(copy, capsys):
    """summary.json holds null for NaN and infinity."""
    summary = json.loads((copy / "summary.json").read_text())
    (copy / "summary.json").write_text(json.dumps({**summary, "test/loss": None}))
    assert command.evaluate([str(copy)]) == 0
    assert "other figures: test/loss, which is finite in only one of them." in capsys.readouterr().out
    assert command.evaluate([str(copy), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert (said["equals_summary"], said["differences"]["test/loss"]) == (False, None)
    for measured, recorded in ((math.inf, None), (math.nan, None), (0.5, 0.5)):
        assert command._difference(measured, recorded) == 0
    assert math.isnan(command._difference(math.inf, 0.5))


def test_evaluate_compares_only_what_can_be_compared(copy, capsys):
    first = str(checkpoint.steps(copy)[-1])
    for words, said in (
        (["data=synthetic", "data.test.count=100"], "it is about the run's own test set"),
        (["data.test.count=100"], "it is about the run's own test set"),
        (["--checkpoint", first], "it was measured with other weights"),
    ):
        assert command.evaluate([str(copy), *words]) == 0
        out = capsys.readouterr().out
        assert said in out
        assert ("100\n" in out) == ("data.test.count=100" in words)
    summary = copy / "summary.json"
    summary.write_bytes(summary.read_bytes()[:60])
    assert command.evaluate([str(copy)]) == 0
    assert "it is damaged, or does not hold these figures" in capsys.readouterr().out
    summary.unlink()
    assert command.evaluate([str(copy), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["equals_summary"] is None and "has not finished" in said["comparison"]


def test_data_that_have_moved_are_found_by_data_root_and_are_the_same(digits, tmp_path, capsys):
    (tmp_path / "moved").symlink_to(real_data())
    assert command.evaluate([str(digits), f"data.root={tmp_path}/moved"]) == 0
    assert "These are the figures in summary.json" in capsys.readouterr().out
    with pytest.raises(UserError, match=r"nowhere/MNIST/raw/t10k-images-idx3-ubyte.gz is missing"):
        command.evaluate([str(digits), "data.root=/nowhere"])
    with pytest.raises(UserError, match=r"trainer\.epochs=2 cannot be given to a trained model: only data"):
        command.evaluate([str(digits), "trainer.epochs=2"])


# --- allranks export -----------------------------------------------------------------------------------


def test_programs_find_the_keys_that_the_document_names(drawn, tmp_path, capsys):
    picture = tmp_path / "digit.png"
    Image.new("L", (28, 28), 0).save(picture)
    weights = tmp_path / "digits.safetensors"
    commands = {
        "predict RUN IMAGE...": lambda: command.predict([str(drawn), str(picture), "--json"]),
        "predict RUN --data test": lambda: command.predict([str(drawn), "--data", "test", "--json"]),
        "evaluate RUN": lambda: command.evaluate([str(drawn), "--json"]),
        "export RUN --to FILE": lambda: command.export([str(drawn), "--to", str(weights), "--json"]),
    }
    document = (ROOT / "docs/use-the-model.md").read_text()
    for words, run_command in commands.items():
        [row] = [line for line in document.splitlines() if line.startswith(f"| `allranks {words} --json`")]
        assert run_command() == 0
        for key in json.loads(capsys.readouterr().out.splitlines()[0]):
            assert f"`{key}`" in row or key == "test/accuracy", (words, key)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt2", ".onnx"])
def test_what_is_exported_is_the_model(drawn, tmp_path, capsys, suffix):
    if suffix == ".onnx":
        for package in ("onnx", "onnxruntime", "onnxscript"):
            pytest.importorskip(package, reason=f"{package} is missing: pip install allranks[export]")
    path = tmp_path / f"digits{suffix}"
    assert command.export([str(drawn), "--to", str(path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["examples"] == 400 and said["bytes"] == path.stat().st_size
    assert said["largest_difference"] <= said["allowed_difference"]
    assert said["accuracy"] == said["own_accuracy"] == Run(drawn).summary["test/accuracy"]
    assert [entry.name for entry in tmp_path.iterdir()] == [path.name]

    written = path.stat().st_mtime_ns
    with pytest.raises(UserError, match=f"digits{suffix} is there already: give another name, or --force"):
        command.export([str(drawn), "--to", str(path)])
    assert path.stat().st_mtime_ns == written


def test_an_importer_needs_nothing_but_the_file(drawn, tmp_path):
    """ONNX in onnxruntime, with its metadata, for one image and for several."""
    onnxruntime = pytest.importorskip("onnxruntime", reason="pip install allranks[export]")
    pytest.importorskip("onnxscript", reason="pip install allranks[export]")
    path = tmp_path / "digits.onnx"
    assert command.export([str(drawn), "--to", str(path)]) == 0
    session = onnxruntime.InferenceSession(str(path))
    about = json.loads(session.get_modelmeta().custom_metadata_map["allranks"])
    assert about["classes"] == [str(digit) for digit in range(10)]
    assert about["input"]["shape"] == ["batch", 1, 28, 28]
    assert "divided by 255" in about["input"]["preprocessing"]
    trained = load.load(drawn)
    own = forward.forward(trained, forward.open_part(trained))
    pixels = forward.images_at(trained, forward.open_part(trained), range(7)).float().numpy()
    for count in (1, 7):
        [logits] = session.run(["logits"], {"images": pixels[:count]})
        assert logits == pytest.approx(own.logits[:count].numpy(), abs=1e-4)


def test_the_weights_carry_what_they_belong_to(drawn, tmp_path):
    from safetensors import safe_open

    path = tmp_path / "digits.safetensors"
    assert command.export([str(drawn), "--to", str(path), "--checkpoint", "best"]) == 0
    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        shapes = {name: file.get_slice(name).get_shape() for name in file.keys()}  # noqa: SIM118
    assert metadata["config"] == (drawn / "config.yaml").read_text()
    assert json.loads(metadata["allranks"])["trained"]["step"] in checkpoint.steps(drawn)
    assert sorted(shapes.values()) == [[10], [10, 32], [32], [32, 784]]


def test_a_file_says_what_its_own_data_look_like(drawn):
    """Digits, clothes, and arrays of any kind; and a Dataset's own names of its classes."""
    import dataclasses

    import torch

    from allranks.data.parts import Form, Mapped

    trained = load.load(drawn)

    def preprocessing(**test: str) -> str:
        data = {**trained.config.data, "test": test}
        other = dataclasses.replace(trained, config=dataclasses.replace(trained.config, data=data))
        about = json.loads(exporting._metadata(other, other.model, forward.open_part(trained))["allranks"])
        return about["input"]["preprocessing"]

    assert "A digit fits 20 x 20" in preprocessing(_target_="allranks.data.synthetic.generate")
    assert "A digit fits 20 x 20" in preprocessing(_target_="allranks.data.mnist.load", name="mnist")
    clothes = preprocessing(_target_="allranks.data.mnist.load", name="fashion_mnist")
    assert "light on a dark ground" in clothes and "digit" not in clothes
    assert preprocessing(_target_="allranks.data.arrays.load").startswith("as data.test in the config")

    class Named(torch.utils.data.Dataset):
        classes = tuple("abcdefghij")

    form = Form(torch.device("cpu"), torch.float32, "data.test", is_labelled=True)
    about = exporting._metadata(trained, trained.model, Mapped(Named(), [], 0, form))["allranks"]
    assert json.loads(about)["classes"] == list("abcdefghij")


def test_what_does_not_agree_is_not_left_behind(drawn, tmp_path, monkeypatch):
    """The weights are changed on their way into the file."""
    write = exporting._write_safetensors

    def other(model, example, metadata, path):
        next(model.parameters()).data.add_(0.001)
        write(model, example, metadata, path)
        next(model.parameters()).data.sub_(0.001)

    monkeypatch.setattr(exporting, "_write_safetensors", other)
    with pytest.raises(
        RunError, match=r"was not written: on the test set its logits differ .* by up to 0\."
    ):
        command.export([str(drawn), "--to", str(tmp_path / "x.safetensors")])
    assert tree(tmp_path) == []


def test_an_export_that_cannot_be_is_refused(drawn, tmp_path, monkeypatch):
    (tmp_path / "folder.onnx").mkdir()
    for name, said in {
        "model.h5": ".h5 is no format to export to. The suffix says which: .safetensors, .pt2, .onnx.",
        "model": "a name without a suffix is no format to export to",
        "folder.onnx": "is a directory: give the name of a file",
        "none/model.pt2": "there is no directory",
    }.items():
        with pytest.raises(UserError) as refused:
            command.export([str(drawn), "--to", str(tmp_path / name)])
        assert said in str(refused.value)
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"Exporting to ONNX needs onnx, .*pip install allranks\[export\]"):
        command.export([str(drawn), "--to", str(tmp_path / "model.onnx")])
    assert tree(tmp_path) == ["folder.onnx"]


# --- as command lines ----------------------------------------------------------------------------------

ALLRANKS = [PYTHON, "-m", "allranks"]


def test_the_three_commands_as_typed(drawn, command):
    shown = command(*ALLRANKS, "evaluate", str(drawn)).ok()
    assert "These are the figures in summary.json, to the last digit." in shown.out
    Image.new("L", (40, 40), 255).save(shown.cwd / "blank.png")
    refused = execute_forked(["-m", "allranks", "predict", str(drawn), "blank.png"], 1, shown.cwd)
    assert refused.code == 2
    assert "blank.png has nothing on it" in refused.message
    words = ["-m", "allranks", "export", str(drawn), "--to", "digits.safetensors"]
    exported = execute_forked(words, 1, shown.cwd).ok()
    assert "400 test examples" in exported.out
    assert tree(exported.cwd) == ["blank.png", "digits.safetensors"]


@pytest.mark.parametrize("name", ["predict", "evaluate", "export"])
def test_no_run_is_one_message_and_help_has_examples(command, tmp_path, name):
    more = {"predict": ["x.png"], "export": ["--to", "x.pt2"]}.get(name, [])
    refused = execute_forked(["-m", "allranks", name, "nowhere", *more], 1, tmp_path)
    assert refused.code == 2
    assert "nowhere is missing: give the directory of a run." in refused.message
    helped = command(*ALLRANKS, name, "--help").ok()
    assert helped.out.startswith(f"usage: allranks {name}")
    assert "examples:" in helped.out and "--checkpoint" in helped.out


@pytest.mark.long
def test_a_model_of_ones_own_is_found_where_it_was_trained(train, command, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/nets.py").write_text(
        "from torch import nn\n\ndef plain(classes):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(784, classes))\n"
    )
    words = ["model._target_=nets.plain", "~model.input_shape", "run.dir=run", "trainer.epochs=1"]
    run = train("model=linear", *words, *QUICK, cwd=tmp_path / "mine").ok().run.path
    script = str(Path(PYTHON).with_name("allranks"))
    assert "to the last digit" in command(script, "evaluate", str(run), cwd=tmp_path / "mine").ok().out
    refused = command(script, "evaluate", str(run), cwd=tmp_path)
    assert refused.code == 2
    assert "no module nets is installed here" in refused.message
    assert "type the command in the folder where the training was typed" in refused.message
