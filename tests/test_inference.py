"""A trained model is used: the right checkpoint is taken, and its figures are those of the run."""

from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest

from allranks.base.errors import UserError
from allranks.compose import from_command_line
from allranks.inference import forward, load
from allranks.job.identity import RankIdentity
from allranks.run import checkpoint
from helpers import SMALL, Run, real_data, tree

WORDS = [*SMALL, "model=mlp", "model.widths=[32]", "trainer.epochs=3", "checkpoint.keep=3"]


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
    words += ["trainer.epochs=1", "trainer.batch_size=500", "trainer.precision=fp32"]
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
    words = [*SMALL, "model=linear", "optimizer.lr=0.1,0.1", "trainer.epochs=4", "checkpoint.keep=4"]
    words = [word.replace("0.1,0.1", "3") for word in words]
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
        assert figures.accuracy == said[f"{name}/accuracy"]


@pytest.mark.parametrize("ranks", [3])
def test_the_figures_of_a_run_on_several_ranks_are_repeated_by_one_process(train, ranks):
    run = train(*WORDS, "run.dir=run", under="mpiexec", ranks=ranks).ok().run
    trained = load.load(run.path)
    assert trained.runtime.share_count == ranks
    outputs = forward.forward(trained, forward.open_part(trained))
    assert outputs.figures.loss == run.summary["test/loss"]
    assert outputs.figures.accuracy == run.summary["test/accuracy"]


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
    assert 100 * int(confusion.diagonal().sum()) / 400 == outputs.figures.accuracy
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
    with pytest.raises(UserError, match=r"has no checkpoint that can be used: step-.*; step-.*; step-"):
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


def test_a_run_of_a_newer_version_is_refused_by_that_versions_number(copy):
    config, environment = copy / "config.yaml", copy / "environment.json"
    config.write_text(config.read_text() + "invented: 1\n")
    with pytest.raises(UserError, match=r"is not as a run has written it.*invented is not a key"):
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
