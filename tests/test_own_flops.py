"""run.count_flops(): a loop of the user's own records how much of its model is computed in a second."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from helpers import execute_forked, only_long
from own_programs import script

PROGRAM = """
import copy, torch, allranks
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset
run = allranks.open("own", seed=3, device="cpu", threads=1, report=False)
train_set = TensorDataset(torch.randn(60, 3), torch.randn(60, 1))
model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
COUNTED
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.keep(model=model, optimizer=optimizer)
print("drawn", torch.rand(1).item(), [parameter.grad for parameter in model.parameters()])
for epoch in run.epochs(2):
    for x, y in run.steps(STEPS):
        run.backward(F.mse_loss(model(x), y))
        optimizer.step()
        optimizer.zero_grad()
run.finish()
"""
BATCHES = "run.batches(train_set, batch_size=20)"


def trained(folder, ranks: int, counted: str, steps: str = BATCHES) -> tuple[list[dict], str]:
    """The lines of metrics.jsonl, and what the program has printed of itself."""
    code = PROGRAM.replace("COUNTED", counted).replace("STEPS", steps)
    folder.mkdir()
    done = execute_forked(["-c", code], ranks, folder).ok()
    lines = [json.loads(line) for line in (folder / "runs/own/metrics.jsonl").read_text().splitlines()]
    return lines, next(line for line in done.out.splitlines() if line.startswith("drawn"))


@pytest.mark.parametrize("ranks", [1, only_long(2)])
def test_the_operations_are_those_that_torch_counts_and_nothing_else_changes(ranks, tmp_path):
    model = nn.Sequential(nn.Linear(3, 8), nn.Dropout(0.5), nn.Linear(8, 1))
    with FlopCounterMode(display=False) as counter:
        F.mse_loss(model(torch.randn(2, 3)), torch.randn(2, 1)).backward()
    expected = counter.get_total_flops() / 2

    lines, drawn = trained(tmp_path / "counted", ranks, script("flops.py"))
    assert len(lines) == 2
    for line in lines:
        flops_per_example = line["throughput/model_flops_per_s"] / line["throughput/samples_per_s"]
        assert flops_per_example == pytest.approx(expected, rel=1e-9)
        assert "throughput/share_of_peak" not in line  # nobody knows what a CPU could do at most

    summary = json.loads((tmp_path / "counted/runs/own/summary.json").read_text())
    for name in ("throughput/model_flops_per_s", "memory/process_peak_bytes"):
        assert summary[name] == lines[-1][name]

    plain, drawn_without = trained(tmp_path / "plain", ranks, "model = run.wrap(model)")
    assert drawn == drawn_without
    assert not any("throughput/model_flops_per_s" in line for line in plain)


UNKNOWN = """
recurrent = nn.LSTM(3, 3)
assert run.count_flops(lambda: recurrent(torch.rand(4, 3))[0].sum().backward(), examples=4) is None
model = run.wrap(model)
"""


@pytest.mark.parametrize(
    ("counted", "steps"),
    [
        (UNKNOWN, BATCHES),  # what a recurrent layer computes is not known
        only_long(script("flops.py"), "[tuple(train_set[:20])] * 3"),  # nor how many examples there are
    ],
    ids=["a recurrent layer", "a list of batches"],
)
def test_what_cannot_be_known_is_not_recorded(counted, steps, tmp_path):
    lines, _ = trained(tmp_path / "run", 1, counted, steps)
    assert len(lines) == 2
    assert not any("throughput/model_flops_per_s" in line for line in lines)


MISTAKES = {
    "a loss": (
        "run.count_flops(torch.ones(1), examples=2)",
        "run.count_flops() got float32 [1]: give a function",
    ),
    "examples": ("run.count_flops(print, examples=0)", "run.count_flops() got examples=0: give the number"),
    "precision": (
        "run.count_flops(print, examples=1, precision='int8')",
        "run.count_flops() got precision='int8': give fp64, fp32, bf16 or fp16.",
    ),
}


@pytest.mark.parametrize(
    ("statement", "said"),
    [MISTAKES["a loss"], *(only_long(*MISTAKES[c]) for c in ("examples", "precision"))],
)
def test_what_is_wrong_is_said_once(statement, said, tmp_path):
    code = f"""
import torch, allranks
run = allranks.open("own", device="cpu", threads=1, report=False)
{statement}
"""
    done = execute_forked(["-c", code], 2, tmp_path)
    assert done.code == 2, done.err
    assert done.err.count(said) == 1, done.err
