"""run.metric(): metrics of torchmetrics over the examples of all ranks, in a loop of the user's own."""

from __future__ import annotations

import importlib.util
import json

import pytest
import torch

from helpers import execute_forked, only_long
from own_programs import script

# One worker has the server that imports torchmetrics for the ranks. The tests are collected without it.
pytestmark = [
    pytest.mark.xdist_group("torchmetrics"),
    pytest.mark.skipif(importlib.util.find_spec("torchmetrics") is None, reason="pip install torchmetrics"),
]

EXAMPLES = 61
# What both this process and the ranks make. The batches are of 20 examples. The last one has 1 example, so
# that only rank 0 gets a share of it that counts.
DATA = f"""
import torch, torchmetrics
from torchmetrics import classification
draw = torch.Generator().manual_seed(3)
scores = torch.rand({EXAMPLES}, generator=draw)
labels = (scores + torch.rand({EXAMPLES}, generator=draw) > 1).long()
values = scores + torch.rand({EXAMPLES}, generator=draw)
metrics = {{
    "auroc": (classification.BinaryAUROC(), "labels"),
    "f1": (classification.BinaryF1Score(), "labels"),
    "correlation": (torchmetrics.PearsonCorrCoef(), "values"),
    "ranks": (torchmetrics.SpearmanCorrCoef(), "values"),
    "matrix": (classification.BinaryConfusionMatrix(), "labels"),
}}
"""
EVALUATED = """
import json, allranks
from torch.utils.data import TensorDataset
run = allranks.open("own", device="cpu", threads=1, report=False)
measured = {name: (run.metric(metric), given) for name, (metric, given) in metrics.items()}
batches = run.batches(TensorDataset(scores, labels, values), batch_size=20, shuffle=False)
for number in range(2):
    for a, b, c in batches:
        for metric, given in measured.values():
            if given == "labels":
                metric.update(a, b)
            else:
                metric.update(preds=a, target=c)
    found = {name: metric.compute() for name, (metric, _) in measured.items()}
    found["matrix"] = found["matrix"].tolist()
    print(json.dumps(found))
run.finish()
"""


@pytest.mark.parametrize("ranks", [1, only_long(2), 3])
def test_each_metric_is_that_of_all_examples_and_begins_anew(ranks, tmp_path):
    here: dict = {}
    exec(DATA, here)
    expected = {}
    for name, (metric, given) in here["metrics"].items():
        metric.update(here["scores"], here[given])
        expected[name] = metric.compute().tolist()

    done = execute_forked(["-c", DATA + EVALUATED], ranks, tmp_path, imports="torchmetrics").ok()
    lines = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
    assert len(lines) == 2 * ranks
    for found in lines:
        assert found.pop("matrix") == expected["matrix"]
        assert found == pytest.approx({name: expected[name] for name in found}, rel=1e-6)


def test_the_metric_of_the_page(tmp_path):
    from torchmetrics.classification import BinaryAUROC

    code = """
import torch, torchmetrics, allranks
from torch import nn
from torch.utils.data import TensorDataset
run = allranks.open("own", seed=1, device="cpu", threads=1, report=False)
x = torch.randn(90, 4)
val_batches = run.batches(TensorDataset(x, (x[:, 0] > 0).long()), batch_size=40, shuffle=False)
model = run.wrap(nn.Linear(4, 1))
def train(epoch):
    for batch in run.steps(val_batches):
        run.backward(nn.functional.mse_loss(model(batch[0])[:, 0], batch[1].float()))
"""
    code += script("auroc.py") + "run.finish()\n"
    code += 'if run.is_main: print(model.module(x)[:, 0].tolist(), (x[:, 0] > 0).tolist(), sep="|")'
    done = execute_forked(["-c", code], 2, tmp_path, imports="torchmetrics").ok()
    scores, labels = map(
        json.loads, done.out.splitlines()[-1].replace("T", "t").replace("F", "f").split("|")
    )
    whole = BinaryAUROC()
    whole.update(torch.tensor(scores), torch.tensor(labels).long())
    epochs = [json.loads(line) for line in (tmp_path / "runs/own/metrics.jsonl").read_text().splitlines()]
    assert [epoch["val/auroc"] for epoch in epochs] == pytest.approx([float(whole.compute())] * 2, rel=1e-6)


MISTAKES = {
    "no metric": ("run.metric(torch.nn.ReLU())", "run.metric() got a ReLU: give an object of torchmetrics"),
    "a class": (
        "run.metric(torchmetrics.PearsonCorrCoef)",
        "run.metric() got the class PearsonCorrCoef, and no object of it: give an object",
    ),
    "several": (
        "run.metric(torchmetrics.MetricCollection([torchmetrics.PearsonCorrCoef()]))",
        "run.metric() got a MetricCollection, which holds other metrics, of which each is to be given by",
    ),
    "outside": (
        "metric.update(torch.ones(1), torch.ones(1))",
        "run.metric(PearsonCorrCoef).update() belongs into a loop over run.batches()",
    ),
    "in a step": (
        "for batch in run.steps([torch.ones(4)]): metric.update(batch, batch)",
        "run.metric(PearsonCorrCoef).update() belongs into a loop over run.batches()",
    ),
    "nothing": ("metric.compute()", "run.metric(PearsonCorrCoef).compute() has no examples: call update()"),
    "alone": (
        "run.metric(torchmetrics.SumMetric()).compute() if run.rank == 1 else metric.compute()",
        "rank 1: run.metric(SumMetric).compute(), but the other ranks: run.metric(PearsonCorrCoef).comp",
    ),
    "no tensor": (
        "for batch in run.batches([torch.ones(1)]): metric.update(batch, 'text')",
        "PearsonCorrCoef keeps a state that cannot be put together exactly over the ranks, and is given a",
    ),
}


@pytest.mark.parametrize(
    ("statement", "said"),
    [
        MISTAKES[case] if case in ("several", "in a step", "nothing") else only_long(*MISTAKES[case])
        for case in MISTAKES
    ],
    ids=MISTAKES,
)
def test_what_is_wrong_is_said_once_on_three_ranks(statement, said, tmp_path):
    code = f"""
import torch, torchmetrics, allranks
run = allranks.open("own", device="cpu", threads=1, report=False)
metric = run.metric(torchmetrics.PearsonCorrCoef())
{statement}
run.finish()
"""
    done = execute_forked(["-c", code], 3, tmp_path, imports="torchmetrics")
    assert done.code == 2, done.err
    assert done.err.count(said) == 1, done.err
    assert "Traceback" not in done.err


@pytest.mark.long
def test_a_rank_that_computes_alone_is_named(tmp_path):
    code = """
import torch, torchmetrics, allranks
run = allranks.open("own", device="cpu", threads=1, report=False, watchdog={"step_s": 5})
metric = run.metric(torchmetrics.PearsonCorrCoef())
for batch in run.batches([torch.rand(6)]): metric.update(batch, 2 * batch)
if run.is_main:
    metric.compute()
run.mean(batch.mean() for batch in run.batches([torch.rand(6)]))
run.finish()
"""
    done = execute_forked(["-c", code], 2, tmp_path, imports="torchmetrics")
    assert done.code != 0
    assert "the other ranks to call compute() of a run.metric(), as this one has" in done.err
