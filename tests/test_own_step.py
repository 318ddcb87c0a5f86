"""run.take_step(): the optimizer's step of the shipped training, in a loop of the user's own."""

from __future__ import annotations

import math
import re

import pytest
import torch

from allranks.run import checkpoint
from allranks.training.update import take_step
from helpers import execute_forked, only_long
from own_programs import figures

# A regression whose steps are told to the test. The last rank's loss is not finite in the step SPOILT.
PROGRAM = """
import math, torch, allranks
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
settings = dict(device="cpu", threads=1, report=False, checkpoint={"every_steps": 2})
run = allranks.open("own", seed=3, **settings MORE)
x = torch.randn(60, 3)
model = run.wrap(lambda: nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1)))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
scaler = torch.amp.GradScaler("cpu", enabled=SCALES, init_scale=2.0**30)
run.keep(model=model, optimizer=optimizer, scaler=scaler)
taken = []
for epoch in run.epochs(2):
    for (inputs,) in run.steps(run.batches(TensorDataset(x), batch_size=10), steps_per_save=GROUP):
        loss = F.mse_loss(model(inputs), inputs.sum(1, keepdim=True).sin())
        if run.step == SPOILT and run.rank == run.world_size - 1:
            loss = loss * math.inf
        run.log({"train/before": loss})
        run.backward(scaler.scale(loss))
        if run.epoch_step % GROUP == GROUP - 1:
            taken.append(run.take_step(optimizer, clip_norm=0.5, scaler=scaler))
            optimizer.zero_grad()
        run.log({"train/after": loss})
print("taken", *map(int, taken), "scale", scaler.get_scale())
run.finish()
"""


def program(spoilt: int = -1, scales: bool = False, more: str = "", group: int = 1) -> list[str]:
    code = (
        PROGRAM.replace("SPOILT", str(spoilt)).replace("SCALES", str(scales)).replace("GROUP", str(group))
    )
    return ["-c", code.replace(" MORE", f", {more}" if more else "")]


def test_a_gradient_that_is_not_finite_ends_the_run_before_the_weights_are_spoilt(tmp_path):
    done = execute_forked(program(spoilt=4), 2, tmp_path)
    assert done.code == 2
    said = "The loss of rank 1 (inf) is not finite in step 5 (epoch 1); the step was not applied."
    assert done.err.count(said) == 1
    assert "go on without such steps by allranks.open(stop_at_nonfinite=False)" in done.err
    assert "Traceback" not in done.err
    assert checkpoint.steps(tmp_path / "runs/own")[0] == 4
    # A program that was put right goes on from there.
    assert "taken 1 1 1 1 1 1 1 1 scale 1.0" in execute_forked(program(), 2, tmp_path).ok().out


@pytest.mark.parametrize(("ranks", "group"), [(2, 1), only_long(1, 1), only_long(3, 2)])
def test_such_a_step_is_left_out_and_its_figures_do_not_count(ranks, group, tmp_path):
    """Also those that are logged after it, and those of the other steps whose gradients it adds up."""
    done = execute_forked(program(4, more="stop_at_nonfinite=False", group=group), ranks, tmp_path).ok()
    left_out = 4 // group
    expected = ["0" if number == left_out else "1" for number in range(12 // group)]
    assert done.out.count(f"taken {' '.join(expected)} scale 1.0") == ranks
    assert len(re.findall(r"The loss of rank \d \(inf\) is not finite in step", done.err + done.out)) == 1
    epochs, _ = figures(tmp_path / "runs/own")
    for epoch in epochs:
        assert epoch["train/before"] == epoch["train/after"]
        assert 0 < epoch["train/before"] < 2


def test_a_grad_scaler_leaves_out_steps_that_overflow(tmp_path):
    """They lower its scale, on all ranks, and their figures count: the loss itself is finite."""
    done = execute_forked(program(4, scales=True, more="stop_at_nonfinite=False"), 2, tmp_path).ok()
    expected = ["0" if number == 4 else "1" for number in range(12)]
    assert done.out.count(f"taken {' '.join(expected)} scale {2.0**29}") == 2
    assert "not finite" not in done.err


@pytest.mark.parametrize("ranks", [2, only_long(3)])
def test_the_gradient_of_a_model_that_is_spread_is_clipped_as_a_whole(ranks, tmp_path):
    """Each rank holds slices of it, and all leave out a step that is not finite on one of them."""
    found = []
    for kind in ("none", "fsdp"):
        (tmp_path / kind).mkdir()
        more = f'stop_at_nonfinite=False, sharding={{"kind": "{kind}"}}'
        done = execute_forked(program(4, more=more), ranks, tmp_path / kind).ok()
        assert done.out.count("taken 1 1 1 1 0 1 1 1 1 1 1 1 scale 1.0") == ranks
        found.append([epoch["train/after"] for epoch in figures(tmp_path / kind / "runs/own")[0]])
    assert found[0] == pytest.approx(found[1], rel=1e-5)


MISTAKES = {
    "no optimizer": ("run.take_step(model)", "run.take_step() got a DistributedDataParallel"),
    "no norm": ("run.take_step(optimizer, clip_norm=0)", "run.take_step() got clip_norm=0: give a finite"),
    "no scaler": ("run.take_step(optimizer, scaler=2)", "run.take_step() got an int as scaler: give a"),
    "outside": ("break", "run.take_step() belongs into a loop over run.steps()"),
}


@pytest.mark.parametrize(
    ("statement", "said"),
    [MISTAKES["no norm"], *(only_long(*MISTAKES[case]) for case in MISTAKES if case != "no norm")],
)
def test_what_is_wrong_is_said_once_on_two_ranks(statement, said, tmp_path):
    code = f"""
import torch, allranks
run = allranks.open("own", device="cpu", threads=1, report=False)
model = run.wrap(torch.nn.Linear(1, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
for batch in run.steps([torch.ones(4, 1)] * 2):
    run.backward(model(batch).mean())
    {statement}
run.take_step(optimizer)
run.finish()
"""
    done = execute_forked(["-c", code], 2, tmp_path)
    assert done.code == 2, done.err
    assert done.err.count(said) == 1, done.err
    assert "Traceback" not in done.err


def test_complex_weights_are_looked_at_too(tmp_path):
    """As those of an operator that works on Fourier coefficients."""
    code = """
import math, torch, allranks
run = allranks.open("own", device="cpu", threads=1, report=False, stop_at_nonfinite=False)
weight = torch.nn.Parameter(torch.ones(2, dtype=torch.complex64))
optimizer = torch.optim.SGD([weight], lr=0.5)
for batch in run.steps([torch.ones(4)] * 3):
    run.backward(((weight.sum() * batch.mean()).abs() - 1) ** 2 * (math.nan if run.step == 1 else 1))
    print(run.take_step(optimizer, clip_norm=1.0), bool(weight.isfinite().all()))
    optimizer.zero_grad()
run.finish()
"""
    done = execute_forked(["-c", code], 1, tmp_path).ok()
    assert [line for line in done.out.splitlines() if "True" in line] == [
        "True True",
        "False True",
        "True True",
    ]


@pytest.mark.parametrize(("gradient", "is_taken"), [(1.0, True), (math.inf, False)])
def test_a_step_that_a_scaler_with_a_low_scale_takes_counts_as_taken(gradient, is_taken):
    """The scale stays low for a while after the gradients that lowered it."""
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.5)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**-20)
    scaler.scale((weight * gradient).sum()).backward()
    assert take_step(optimizer, [weight], None, scaler, spread_over=None) == is_taken
    assert (weight.item() != 1) == is_taken


@pytest.mark.parametrize(("value", "is_finite"), [(1.0, True), (float("inf"), False)])
def test_a_sparse_gradient_is_looked_at_as_well(value, is_finite):
    model = torch.nn.Embedding(4, 2, sparse=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (model(torch.tensor([1, 1])) * value).sum().backward()
    assert take_step(optimizer, model.parameters(), None, None, None) is is_finite
