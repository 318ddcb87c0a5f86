"""A model that is spread over the ranks: the same losses as on one rank, and checkpoints at any size."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load, load_file
from torch import nn

from allranks.base.errors import UserError
from allranks.compose import from_command_line
from allranks.config import ShardingConfig
from allranks.models import vit
from allranks.run import checkpoint, shards
from allranks.runtime import sharding
from helpers import FSDP, NO_REPORT, Done, Run, execute, execute_forked, forked_python, launcher, only_long

# One worker trains once for all of these tests.
pytestmark = pytest.mark.xdist_group("sharding")

# 202 examples over 2, 3 or 4 ranks, in batches of 50: shares differ, and the last batch has 2 examples.
VIT = (
    "model=vit", "model.depth=2", "model.dropout=0", "trainer.precision=fp64", "optimizer=adamw",
    "data=synthetic", "data.train.count=300", "data.split=[202,98]", "data.test.count=101",
    "trainer.epochs=2", "trainer.batch_size=50", "device=cpu", "threads=1", NO_REPORT,
)  # fmt: skip
BY_SIZE = ("sharding=fsdp", "sharding.min_parameters=10000")
BY_CLASS = ("sharding=fsdp", "sharding.blocks=[TransformerEncoderLayer]")
HYBRID = ("sharding=hybrid", "sharding.devices=2", "sharding.min_parameters=10000")
SAME = 1e-9  # the promise is 1e-5; rounding of fp64 leaves 1e-15

# Overrides, launcher (None: forked, which is quick), ranks, and whether it takes long.
LAUNCHES = {
    "2 ranks": (BY_SIZE, None, 2),
    "3 ranks": (BY_CLASS, "torchrun", 3),
    "4 ranks": (BY_SIZE, "mpiexec", 4),
    "hybrid": (HYBRID, "mpiexec", 4),
}
EVERY_LAUNCH = ["2 ranks", *map(only_long, ("3 ranks", "4 ranks", "hybrid"))]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory):
    """trained("2 ranks") is the finished run of that launch; trained("alone") that of one rank."""

    @cache
    def at(name: str, *more: str) -> Run:
        cwd = Path(tmp_path_factory.mktemp("sharding"))
        how, under, ranks = LAUNCHES.get(name, ((), None, 1))
        return start(cwd, under, ranks, *how, *more).ok().run

    return at


def start(cwd: Path, under: str | None, ranks: int, *words: str) -> Done:
    command = ["-m", "allranks.train", *VIT, "run.dir=run", *words]
    if under is None:
        return execute_forked(command, ranks, cwd, imports=FSDP)
    return execute([*launcher(under, ranks, forked_python()), *command], cwd)


def interrupted(run: Run, cwd: Path) -> Path:
    """A run directory as it was after its first epoch, in `cwd`; its checkpoint."""
    folder = cwd / "run"
    (folder / "logs").mkdir(parents=True)
    shutil.copy(run.path / "config.yaml", folder)
    first = min(checkpoint.steps(run.path))
    shutil.copytree(checkpoint.path_of(run.path, first), checkpoint.path_of(folder, first))
    return checkpoint.path_of(folder, first)


# --- the same losses -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EVERY_LAUNCH)
def test_the_losses_are_those_of_one_rank(trained, name):
    alone, together = trained("alone"), trained(name)
    assert together.summary["world_size"] == LAUNCHES[name][2]
    assert together.losses == pytest.approx(alone.losses, rel=SAME)
    assert together.summary["model/parameters"] == alone.summary["model/parameters"]


@pytest.mark.parametrize("name", EVERY_LAUNCH[:2] + EVERY_LAUNCH[3:])
def test_clipped_accumulated_and_computed_again(trained, name):
    """5 pieces of shares of 12, 13 or fewer examples: some ranks have a piece more than others."""
    common = ("trainer.clip_norm=0.5", "trainer.accumulate=5", "trainer.precision=fp32")
    alone = trained("alone", *common)
    together = trained(name, *common, "sharding.activation_checkpointing=true")
    assert together.losses == pytest.approx(alone.losses, rel=1e-5)
    assert together.losses != pytest.approx(trained("alone").losses, rel=1e-4)


@pytest.mark.long
def test_sgd_and_a_smaller_type_for_what_is_sent(trained):
    plain = trained("2 ranks", "optimizer=sgd")
    assert plain.losses == pytest.approx(trained("alone", "optimizer=sgd").losses, rel=SAME)
    rough = trained("2 ranks", "trainer.precision=fp32", "sharding.param_dtype=bf16")
    exact = trained("alone", "trainer.precision=fp32")
    assert rough.losses == pytest.approx(exact.losses, rel=0.02)
    assert rough.losses != pytest.approx(exact.losses, rel=1e-5)


# --- checkpoints ---------------------------------------------------------------------------------------


def test_each_rank_has_written_its_part(trained):
    run = trained("2 ranks")
    folder = checkpoint.path_of(run.path, checkpoint.steps(run.path)[0])
    names = {f"{part}-0000{rank}-of-00002.safetensors" for part in shards.PARTS for rank in (0, 1)}
    assert {path.name for path in folder.iterdir()} == {
        *names,
        "manifest.json",
        "shards.json",
        "state.json",
    }
    sizes = [(folder / f"model-0000{rank}-of-00002.safetensors").stat().st_size for rank in (0, 1)]
    assert max(sizes) < 0.55 * sum(sizes)


def test_the_files_put_together_are_those_of_a_checkpoint_in_one_piece(trained):
    run, alone = trained("2 ranks"), trained("alone")
    step = checkpoint.steps(run.path)[0]
    files = checkpoint.read(checkpoint.path_of(run.path, step))
    whole = shards.assembled(files)
    assert set(whole) == {"model.safetensors", "optimizer.safetensors", "state.json"}
    for name in ("model.safetensors", "optimizer.safetensors"):
        expected = load_file(checkpoint.path_of(alone.path, step) / name)
        found = load(whole[name])
        assert set(found) == set(expected)
        for key, tensor in found.items():
            torch.testing.assert_close(tensor, expected[key], rtol=1e-9, atol=1e-9)


def test_a_run_goes_on_at_the_same_size_with_the_same_bits(trained, tmp_path):
    run = trained("2 ranks")
    interrupted(run, tmp_path)
    went_on = start(tmp_path, None, 2, *BY_SIZE).ok().run
    assert went_on.losses == run.losses
    assert went_on.summary["model/sha256"] == run.summary["model/sha256"]


@pytest.mark.parametrize(
    ("saved_at", "goes_on_at"),
    [
        ("2 ranks", "alone"),
        ("alone", "2 ranks"),
        only_long("2 ranks", "3 ranks"),
        only_long("3 ranks", "hybrid"),
        only_long("hybrid", "2 ranks"),
        only_long("4 ranks", "3 ranks"),
    ],
)
def test_a_run_goes_on_at_another_size(trained, tmp_path, saved_at, goes_on_at):
    run = trained(saved_at)
    interrupted(run, tmp_path)
    how, under, ranks = LAUNCHES.get(goes_on_at, ((), None, 1))
    went_on = start(tmp_path, under, ranks, *how).ok().run
    assert (
        "goes on" in (went_on.path / "logs/rank-0.log").read_text() or went_on.metrics[0] == run.metrics[0]
    )
    assert went_on.losses == pytest.approx(run.losses, rel=SAME)


def test_a_lost_shard_is_passed_over_and_told(trained, tmp_path):
    run = trained("2 ranks")
    copy = tmp_path / "run"
    shutil.copytree(run.path, copy)
    (copy / "summary.json").unlink()
    newest, before = checkpoint.steps(copy)
    (checkpoint.path_of(copy, newest) / "optimizer-00001-of-00002.safetensors").unlink()
    done = start(tmp_path, None, 2, *BY_SIZE).ok()
    said = "passing over the checkpoint step-000010: optimizer-00001-of-00002.safetensors: it is missing"
    assert said in done.out + done.err
    assert done.run.losses == run.losses

    # 2. A byte has changed in one, and the other one is gone as well.
    (copy / "summary.json").unlink()
    newest, before = checkpoint.steps(copy)
    (checkpoint.path_of(copy, before) / "shards.json").unlink()
    path = checkpoint.path_of(copy, newest) / "model-00000-of-00002.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    done = start(tmp_path, None, 2, *BY_SIZE)
    assert done.code == 2
    assert "has checkpoints, but none that can be used" in done.message
    assert "model-00000-of-00002.safetensors: its sha256 is" in done.message
    assert "shards.json: it is missing" in done.message


@pytest.mark.long
def test_evaluate_export_and_list_know_such_checkpoints(trained, command):
    run = trained("2 ranks")
    evaluated = command("allranks", "evaluate", str(run.path)).ok()
    assert f"{run.summary['test/loss']:.9f}"[:8] in evaluated.out
    listed = command("allranks", "checkpoint", "list", str(run.path)).ok()
    assert listed.out.count("valid") == 2
    command("allranks", "export", str(run.path), "--to", "safetensors")
    assert json.loads((run.path / "summary.json").read_text())["state"] == "finished"


# --- memory --------------------------------------------------------------------------------------------


@pytest.mark.long
def test_four_ranks_hold_a_quarter_each(trained):
    run = trained("4 ranks")
    folder = checkpoint.path_of(run.path, checkpoint.steps(run.path)[0])
    sizes = [
        sum(path.stat().st_size for path in folder.glob(f"*-0000{rank}-of-*.safetensors"))
        for rank in range(4)
    ]
    assert max(sizes) <= 0.35 * sum(sizes)


# Each rank prints how many MB its process needed more, at most, while the model was built and spread.
BUILT = """
import re, torch, allranks
from pathlib import Path
from torch import nn

def mb(key):
    return int(re.search(rf"{key}:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) / 1024

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(1024, 1024) for _ in range(32))

run = allranks.open("built", device="cpu", threads=1, report=False, sharding={"kind": "fsdp"})
run.wrap(lambda: nn.Linear(8, 8))  # what is imported for it needs memory, too
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = mb("VmRSS")
model = run.wrap(Net)
print("peak", mb("VmHWM") - before)
run.finish()
"""


@pytest.mark.long
def test_no_rank_ever_holds_the_whole_model_while_it_is_built(tmp_path):
    """128 MB of weights on 4 ranks: 32 MB of slices, and a block of 4 MB or two."""
    done = execute_forked(["-c", BUILT], 4, tmp_path).ok()
    peaks = [float(line.split()[1]) for line in done.out.splitlines() if line.startswith("peak")]
    assert len(peaks) == 4
    assert max(peaks) < 64, peaks
    assert min(peaks) > 30, peaks  # it has been measured


# --- what does not fit ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["sharding=fsdp", "trainer.reproducible=true"], "trainer.reproducible=true does not go with"),
        (["sharding=fsdp", "trainer.compile=true"], "trainer.compile=true does not go with sharding=fsdp"),
        (["sharding=fsdp", "trainer.unused_parameters=always"], "does not go with sharding=fsdp"),
        (["sharding=fsdp", "+sharding.devices=2"], "sharding.devices=2 is for sharding=hybrid"),
        (["+sharding.min_parameters=1"], "sharding.kind=none spreads no model"),
        (["sharding=some"], "sharding"),
    ],
)
def test_a_setting_that_has_no_meaning_is_refused(words, said):
    with pytest.raises(UserError, match=said):
        from_command_line(words)


def test_blocks_are_found_by_class_and_by_size():
    model = vit([1, 28, 28], 10, depth=3)
    layers = list(model.encoder.layers)
    by_size = sharding.blocks_of(model, ShardingConfig("fsdp", min_parameters=10_000), "vit")
    assert [id(block) for block in by_size] == [id(layer) for layer in layers]
    named = ShardingConfig("fsdp", blocks=["TransformerEncoderLayer", "MultiheadAttention"])
    kinds = [type(block).__name__ for block in sharding.blocks_of(model, named, "vit")]
    assert kinds == ["MultiheadAttention", "TransformerEncoderLayer"] * 3  # the inner one first
    with pytest.raises(UserError, match=r"has no module of a class Encoder\. It has .*LayerNorm"):
        sharding.blocks_of(model, ShardingConfig("fsdp", blocks=["Encoder"]), "vit")


@pytest.mark.parametrize("made", [nn.ModuleList, nn.ModuleDict, nn.ParameterList])
def test_a_block_that_computes_nothing_is_refused(made):
    model = nn.Sequential(nn.Linear(3, 3))
    model[0].held = made()
    settings = ShardingConfig("fsdp", blocks=["Linear", made.__name__])
    with pytest.raises(UserError, match=rf"a {made.__name__} of net holds modules or weights, but comp"):
        sharding.blocks_of(model, settings, "net")


def test_a_parameter_of_a_single_number_is_refused_before_anything_is_spread(monkeypatch):
    """torch can cut a tensor along a dimension only."""
    runtime = SimpleNamespace(progress=SimpleNamespace(arrive=lambda in_step: None))
    monkeypatch.setattr(sharding, "_mesh", lambda *_: None)
    monkeypatch.setattr(sharding, "_give_memory_back", lambda: None)

    def make() -> nn.Module:
        model = nn.Sequential(nn.Linear(3, 3))
        model[0].scale = nn.Parameter(torch.tensor(2.0))
        return model

    with pytest.raises(UserError, match=r"net: the parameter 0\.scale is a single number without a dim"):
        sharding.shard(make, ShardingConfig("fsdp"), runtime, "net")


TIED = """
from torch import nn

class Tied(nn.Module):
    def __init__(self, input_shape, classes):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(784, 784), nn.Linear(784, 784)])
        self.layers[1].weight = self.layers[0].weight
        self.head = nn.Linear(784, classes)

    def forward(self, images):
        x = images.flatten(1)
        for layer in self.layers:
            x = layer(x).relu()
        return self.head(x)
"""


def test_a_weight_in_two_blocks_is_refused_in_one_sentence(tmp_path, monkeypatch):
    (tmp_path / "tied.py").write_text(TIED)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    words = ["model=linear", "model._target_=tied.Tied", *VIT[4:], "sharding=fsdp", "run.dir=run"]
    command = ["-m", "allranks.train", *words]
    done = execute([*launcher("mpiexec", 2), *command], tmp_path, env={"PYTHONPATH": str(tmp_path)})
    assert done.code == 2
    assert "layers.0.weight and layers.1.weight are one weight, but stand in two blocks" in done.message
    assert not (tmp_path / "run").exists()
