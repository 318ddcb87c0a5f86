"""allranks.open(detect_anomaly=True): a loop of the user's own is told which layer gives NaN."""

from __future__ import annotations

import re

import pytest

from helpers import execute_forked, only_long

# In step 6 the last rank has a layer, an operation of the backward pass, or a loss that is not finite.
PROGRAM = """
import math, torch, allranks
from torch import nn
from torch.utils.data import TensorDataset

class Odd(nn.Module):
    def forward(self, x):
        if run.step != 5 or run.rank != run.world_size - 1 or "WHERE" == "loss":
            return x
        return x / 0 if "WHERE" == "forward" else torch.where(x < 99, x, x / 0 * 0)

run = allranks.open("own", seed=3, device="cpu", threads=1, report=False, detect_anomaly=True)
x = torch.randn(60, 3)
model = run.wrap(nn.Sequential(nn.Linear(3, 3), Odd(), nn.Linear(3, 1)))
other = run.wrap(nn.Linear(1, 1)) if MODELS == 2 else None
run.keep(model=model)
for (inputs,) in run.steps(run.batches(TensorDataset(x), batch_size=10)):
    loss = model(inputs).square().mean()
    if run.step == 5 and run.rank == run.world_size - 1 and "WHERE" == "loss":
        loss = loss + math.inf
    run.backward(loss)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter -= 0.1 * parameter.grad
            parameter.grad = None
run.finish()
"""
FOUND = {
    "forward": r"The output of the model's layer 1 \(Odd\) is not finite, and those of the layers before",
    "backward": "The gradient becomes NaN in the backward pass: Function 'DivBackward0' returned nan",
    "loss": "The loss is inf, though all layers' outputs are finite: look at how it is computed.",
    "forward, two models": r"The output of the model's layer model.1 \(Odd\) is not finite",
}


@pytest.mark.parametrize(
    ("where", "ranks"),
    [
        ("forward", 2),
        ("backward", 2),
        ("loss", 2),
        only_long("forward, two models", 2),
        *(only_long(where, 1) for where in ("forward", "backward", "loss")),
    ],
)
def test_what_is_not_finite_first_is_named_once(where, ranks, tmp_path):
    kind, _, models = where.partition(", ")
    code = PROGRAM.replace("WHERE", kind).replace("MODELS", "2" if models else "1")
    done = execute_forked(["-c", code], ranks, tmp_path)
    assert done.code == 2, done.err
    [said] = done.messages
    assert re.search(FOUND[where], said)
    assert f"This was on rank {ranks - 1} in step 6 (epoch 1)." in said
    assert "Traceback (most recent call last)" not in done.err  # torch's warning shows the forward pass


def test_only_steps_are_looked_at_and_the_numbers_stay_the_same(tmp_path):
    """Also where their loop is left by `break`."""
    code = """
import torch, allranks
from torch import nn
run = allranks.open("NAME", seed=3, device="cpu", threads=1, report=False, DETECTS)
bare = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 1))
model = run.wrap(bare)
run.keep(model=model)
for epoch in run.epochs(3):
    for batch in run.steps([torch.randn(8, 3)] * 4):
        loss = model(batch).square().mean()
        run.backward(loss)
        if epoch == 0:
            print("in a step", torch.is_anomaly_enabled(), [len(each._forward_hooks) for each in bare])
        run.log({"train/loss": loss})
        with torch.no_grad():
            for parameter in model.parameters():
                parameter -= 0.1 * parameter.grad
                parameter.grad = None
        if epoch == 1: break
    print("after", torch.is_anomaly_enabled(), [len(each._forward_hooks) for each in bare])
run.finish()
print("weights", run.summary["model/sha256"])
"""
    found = []
    for name, detects in (("plain", ""), ("detects", "detect_anomaly=True")):
        words = ["-c", code.replace("NAME", name).replace("DETECTS", detects)]
        found.append(execute_forked(words, 2, tmp_path).ok().out)
    plain, looked = found
    assert looked.count("in a step True [1, 1, 1]") == 8
    assert plain.count("in a step False [0, 0, 0]") == 8
    assert looked.count("after False [0, 0, 0]") == plain.count("after False [0, 0, 0]") == 6
    weights = {line for out in found for line in out.splitlines() if line.startswith("weights")}
    assert len(weights) == 1
