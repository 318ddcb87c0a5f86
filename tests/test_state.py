"""What a checkpoint holds of a training: a run that goes on has every bit of it, in the type it was in."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load

from allranks.base.errors import UserError
from allranks.run import checkpoint
from helpers import SMALL, Run, execute_forked, only_long

PACKAGE = '''
"""A model with state that its state_dict leaves out, and optimizers with state of odd types."""
import torch
from torch import nn


class Centred(nn.Module):
    """Subtracts a running mean and scales by a table, neither of which is part of the state_dict."""

    def __init__(self, input_shape, classes):
        super().__init__()
        self.layer = nn.Linear(784, classes)
        self.register_buffer("mean", torch.zeros(784), persistent=False)
        self.register_buffer("table", torch.linspace(0.5, 1.5, 784), persistent=False)
        self.register_buffer("seen", None, persistent=False)

    def forward(self, images):
        flat = images.flatten(1)
        if self.training:
            with torch.no_grad():
                self.mean = 0.9 * self.mean + 0.1 * flat.mean(dim=0)
                self.seen = torch.zeros((), dtype=torch.int64) if self.seen is None else self.seen + 1
        return self.layer((flat - self.mean) * self.table) / (1 if self.seen is None else 1 + self.seen)


class Rotated(nn.Module):
    """Has a complex buffer, as rotary embeddings do."""

    def __init__(self, input_shape, classes):
        super().__init__()
        self.layer = nn.Linear(784, classes)
        self.register_buffer("turn", torch.polar(torch.ones(784), torch.linspace(0, 1, 784)))

    def forward(self, images):
        return self.layer((images.flatten(1) * self.turn).imag.to(images.dtype))


class Complex(nn.Module):
    def __init__(self, input_shape, classes):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(784, classes, dtype=torch.complex64))

    def forward(self, images):
        return (images.flatten(1).to(self.weight.dtype) @ self.weight).real


class DoubleMomentum(torch.optim.Optimizer):
    """Momentum in float64, whatever the weights are, in a list inside a dict."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state["nested"] = {"momentum": [torch.zeros_like(p, dtype=torch.float64)]}
                [momentum] = state["nested"]["momentum"]
                momentum.mul_(0.9).add_(p.grad.double())
                p -= (group["lr"] * momentum).to(p.dtype)
'''

# 12 steps in each of 2 epochs, a checkpoint after each, none removed
EVERY_STEP = (
    *SMALL, "model=linear", "trainer.epochs=2", "trainer.batch_size=100", "checkpoint.every_steps=1",
    "checkpoint.keep=100",
)  # fmt: skip
# Only a learning rate.
BARE = ("~optimizer.momentum", "~optimizer.nesterov", "~optimizer.weight_decay", "~optimizer.fused")


@pytest.fixture
def stateful(train_here, tmp_path, monkeypatch):
    """train_here, with the package above importable."""
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/stateful.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path / "lib"))
    yield train_here
    sys.modules.pop("stateful", None)


def figures(run: Run) -> tuple[list[float], str]:
    return run.losses, run.summary["model/sha256"]


def stopped_after(run: Run, step: int, directory: Path) -> str:
    """A copy of the run as it was after this step; its `run.dir=...`."""
    (directory / "logs").mkdir(parents=True)
    shutil.copy(run.path / "config.yaml", directory)
    shutil.copytree(checkpoint.path_of(run.path, step), checkpoint.path_of(directory, step))
    return f"run.dir={directory}"


@pytest.mark.parametrize(
    "overrides",
    [
        ("optimizer._target_=torch.optim.NAdam", *BARE, "trainer.precision=fp64"),
        ("optimizer._target_=stateful.DoubleMomentum", *BARE, "trainer.precision=fp32"),
        ("model._target_=stateful.Centred",),
        ("model._target_=stateful.Rotated",),
    ],
    ids=["NAdam on fp64", "float64 state on fp32", "buffers outside the state_dict", "complex buffer"],
)  # fmt: skip
def test_a_run_that_goes_on_has_the_bits_of_one_that_never_stopped(stateful, tmp_path, overrides, long):
    whole = stateful(*EVERY_STEP, *overrides)
    for step in (1, 7, 12, 23) if long else (7, 12):  # 12: the end of an epoch
        went_on = stateful(*EVERY_STEP, *overrides, stopped_after(whole, step, tmp_path / str(step)))
        assert figures(went_on) == figures(whole), step


def test_only_buffers_that_have_changed_are_saved_beside_the_state_dict(stateful):
    run = stateful(*EVERY_STEP, "model._target_=stateful.Centred")
    files = checkpoint.read(checkpoint.path_of(run.path, 3))
    assert json.loads(files["state.json"])["buffers"]["items"] == [
        ["mean", {"tensor": "buffer.mean"}], ["seen", {"tensor": "buffer.seen"}]
    ]  # fmt: skip
    assert load(files["optimizer.safetensors"])["buffer.seen"].item() == 2
    assert set(load(files["model.safetensors"])) == {"layer.weight", "layer.bias"}


def test_a_complex_buffer_stays_complex(stateful):
    run = stateful(*EVERY_STEP, "model._target_=stateful.Rotated")
    saved = load(checkpoint.read(checkpoint.path_of(run.path, 24))["model.safetensors"])
    expected = torch.polar(torch.ones(784), torch.linspace(0, 1, 784))
    assert torch.equal(saved["turn"], expected)


def test_complex_parameters_are_refused(stateful):
    with pytest.raises(UserError, match=r"stateful\.Complex: the parameter weight is complex"):
        stateful(*SMALL, "model=linear", "model._target_=stateful.Complex")


# --- what others have written --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def with_momentum(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run with a checkpoint after step 12, trained once for all of these tests; they only read it."""
    words = [*EVERY_STEP, "checkpoint.every_steps=12", "optimizer.momentum=0.9"]
    folder = tmp_path_factory.mktemp("momentum")
    return execute_forked(["-m", "allranks.train", *words], 1, folder).ok().run


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("step", "x", "step is 'x'"),
        only_long("step", True, "step is True"),
        ("epoch", -5, "epoch is -5"),
        only_long("steps_in_epoch_done", 1.5, "steps_in_epoch_done is 1.5"),
        only_long("epoch_s", None, "epoch_s is None"),
        only_long("epoch_lr", float("nan"), "epoch_lr is nan"),
        ("history", [], "history does not have 1 epochs"),
        only_long("history", [{"epoch": 1}], "'step'"),
        only_long("history", 7, "history does not have 1 epochs"),
        ("sums", [[1, 2]], "The checkpoint holds 2 sums for each share, and the task makes 3"),
        only_long("sums", 3, "not iterable"),
        only_long("identity", 3, "TypeError"),
        ("optimizer", {"items": 3}, "TypeError"),
        ("buffers", {"items": [["nothing", {"tensor": "optimizer.none"}]]}, "optimizer.none"),
        (None, [], "TypeError"),
    ],
)
def test_a_state_that_is_not_a_trainings_is_refused(train_here, with_momentum, tmp_path, key, value, said):
    files = checkpoint.read(checkpoint.path_of(with_momentum.path, 12))
    state: Any = json.loads(files["state.json"])
    state = value if key is None else {**state, key: value}
    files["state.json"] = json.dumps(state).encode()
    (tmp_path / "foreign").mkdir()
    foreign = checkpoint.write(tmp_path / "foreign", 12, files, "me", lambda: None)
    with pytest.raises(UserError) as refused:
        train_here(*EVERY_STEP, "optimizer.momentum=0.9", "checkpoint.every_steps=12", f"resume={foreign}")
    assert "\n" not in str(refused.value)
    assert said in str(refused.value)
