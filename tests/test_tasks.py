"""Tasks: each one trains, is evaluated and goes on, and gives the same figures on any number of ranks."""

from __future__ import annotations

import json
import math
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from allranks import tasks
from allranks.base.errors import UserError
from allranks.inference import command
from allranks.inference.forward import measure, open_part
from allranks.inference.load import load
from allranks.tasks import Mean
from allranks.training.metrics import Sums, columns_of, merged, seeing
from allranks.training.training import Schedule
from helpers import MEASURED, NO_REPORT, Done, Run, only_long

PACKAGE = '''
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn.functional import mse_loss


def random(part):
    return np.random.default_rng(["train", "val", "test"].index(part))

def table(part, count):
    x = random(part).normal(size=(count, 4)).astype(np.float32)
    return x, (x @ np.array([1.0, -2.0, 0.5, 3.0]) + np.sin(3 * x[:, 0])).astype(np.float32)

def yes_or_no(part, count):
    x, y = table(part, count)
    return x, (y + random(part).normal(size=count) > 1).astype(np.int64)

def as_dict(part, count):
    return dict(zip(("x", "y"), table(part, count)))

def discs(part, count):
    masks = (random(part).uniform(size=(count, 8, 8)) > 0.5).astype(np.uint8)
    return (100 * masks + random(part).integers(0, 90, masks.shape))[:, None].astype(np.uint8), masks

def texts(part, count):
    return (np.arange(9) * random(part).integers(1, 4, (count, 1)) % 7).astype(np.uint8)

class Stream(torch.utils.data.IterableDataset):
    def __init__(self, part, count):
        self.x, self.y = table(part, count)

    def __iter__(self):
        for x, y in zip(self.x, self.y):
            yield x + np.float32(0.01) * torch.rand(1).item(), y

def line(inputs=4, outputs=1):
    return nn.Sequential(nn.Linear(inputs, 8), nn.Tanh(), nn.Linear(8, outputs))

def segmenter():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))

class Writer(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Embedding(7, 8), nn.Linear(8, 7))

    def forward(self, tokens):
        return self.layers(tokens)

class Both(NamedTuple):
    mean: torch.Tensor
    twice: list

class Nested(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = line()

    def forward(self, x):
        y = self.layers(x)[:, 0]
        return Both(y, [{"value": 2 * y}])

class Task:
    """Batches are dicts, outputs a NamedTuple with a list and a dict in it."""
    def outputs(self, model, batch):
        return model(batch["x"])

    def loss(self, outputs, batch):
        return mse_loss(outputs.mean, batch["y"], reduction="sum")

    def metrics(self, outputs, batch):
        return {"twice": outputs.twice[0]["value"].sum()}

class Averaging(Task):
    def loss(self, outputs, batch):
        return mse_loss(outputs.mean, batch["y"])

class Several(Task):
    """Needs two examples at least."""
    def loss(self, outputs, batch):
        assert len(batch["y"]) > 1
        return mse_loss(outputs.mean, batch["y"], reduction="sum")

class Many(Task):
    def loss(self, outputs, batch):
        return mse_loss(outputs.mean, batch["y"], reduction="none")

class Vector(Task):
    def metrics(self, outputs, batch):
        return {"errors": outputs.mean - batch["y"]}

class Lossless:
    pass
'''

# For each kind of training its YAML files: the task, what makes its data, and its model.
KINDS: dict[str, dict[str, Any]] = {
    "regression": {
        "task": {
            "_target_": "allranks.tasks.Regression",
            "torchmetrics": {"r2": {"_target_": "torchmetrics.R2Score"}},
        },
        "data": "table",
        "model": {"_target_": "mytasks.line"},
    },
    "yes_or_no": {
        "task": {
            "_target_": "allranks.tasks.Classification",
            "torchmetrics": {
                "auroc": {"_target_": "torchmetrics.classification.BinaryAUROC"},
                "f1": {"_target_": "torchmetrics.classification.MulticlassF1Score", "num_classes": 2},
            },
        },
        "data": "yes_or_no",
        "model": {"_target_": "mytasks.line", "outputs": 2},
    },
    "segmentation": {
        "task": {"_target_": "allranks.tasks.Segmentation"},
        "data": "discs",
        "model": {"_target_": "mytasks.segmenter"},
    },
    "autoencoder": {
        "task": {"_target_": "allranks.tasks.Autoencoder", "loss": {"_target_": "torch.nn.L1Loss"}},
        "data": "table",
        "model": {"_target_": "mytasks.line", "outputs": 4},
    },
    "language_model": {
        "task": {"_target_": "allranks.tasks.LanguageModel"},
        "data": "texts",
        "model": {"_target_": "mytasks.Writer"},
    },
    "own": {
        "task": {"_target_": "mytasks.Task"},
        "data": "as_dict",
        "model": {"_target_": "mytasks.Nested"},
    },
    "stream": {
        "task": {"_target_": "allranks.tasks.Regression"},
        "data": "Stream",
        "model": {"_target_": "mytasks.line"},
    },
}  # fmt: skip
COMMON = (
    "device=cpu", "threads=1", "optimizer=adam", "optimizer.lr=0.01", "trainer.precision=fp64",
    "trainer.epochs=3", "trainer.batch_size=16", NO_REPORT,
)  # fmt: skip


def data_of(function: str) -> dict[str, Any]:
    """67 examples to train on, 20 to watch and 31 to test, made by this function of the package above."""
    counts = {"train": 87, "test": 31}
    parts = {
        part: {"_target_": f"mytasks.{function}", "part": part, "count": count}
        for part, count in counts.items()
    }
    of_classes = {"classes": 2, "input_shape": [4]} if function == "yes_or_no" else {}
    return {"split": [67, 20], **of_classes, **parts}


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A folder with the package above, and the YAML files of KINDS in conf/."""
    (tmp_path / "mytasks.py").write_text(PACKAGE)
    for kind, files in KINDS.items():
        for group, values in {**files, "data": data_of(files["data"])}.items():
            path = tmp_path / "conf" / group / f"my_{kind}.yaml"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(values))  # JSON is YAML
    monkeypatch.syspath_prepend(str(tmp_path))
    yield tmp_path
    sys.modules.pop("mytasks", None)


def words(kind: str, *more: str) -> list[str]:
    chosen = [f"{group}=my_{kind}" for group in ("task", "data", "model")]
    return ["--config-dir", "conf", *chosen, *COMMON, *more]


def figures(run: Run) -> list[dict[str, Any]]:
    """What an undisturbed run and one that went on must have in common, epoch after epoch."""
    return [
        {key: value for key, value in line.items() if not key.startswith(MEASURED)} for line in run.metrics
    ]


# --- each task from its beginning to its end -------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_learns_is_evaluated_again_and_goes_on_with_the_same_bits(kind, home, train_here, capsys):
    pytest.importorskip("torchmetrics")
    whole = train_here(*words(kind, "run.dir=whole", "checkpoint.every_steps=1", "checkpoint.keep=99"))
    losses = whole.column("val/loss")
    assert losses[-1] < losses[0]
    # 1. The same figures from the trained model.
    assert command.evaluate([str(whole.path), "--json"]) == 0
    said = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert said["equals_summary"] is True, said["comparison"]
    assert {key: said[key] for key in said if key.startswith("test/")} == {
        key: value for key, value in whole.summary.items() if key.startswith("test/")
    }
    # 2. The same bits where another run goes on in the middle of the second epoch, of 5 steps.
    rest = train_here(*words(kind, "run.dir=rest", "resume=whole/checkpoints/step-000007"))
    assert rest.summary["model/sha256"] == whole.summary["model/sha256"]
    assert figures(rest) == figures(whole)


@pytest.mark.parametrize(
    ("kind", "ranks"),
    [
        case if case == ("yes_or_no", 2) else only_long(*case)
        for case in ((kind, ranks) for kind in KINDS for ranks in (2, 3))
    ],
)
def test_the_curve_is_the_same_on_any_number_of_ranks(kind, ranks, home, train, train_here):
    """67 examples in batches of 16: the last batch has 3, shared out unevenly to 2 ranks."""
    pytest.importorskip("torchmetrics")
    alone = train_here(*words(kind, "run.dir=alone"))
    env = {"PYTHONPATH": str(home)}
    done: Done = train(*words(kind, "run.dir=together"), ranks=ranks, env=env)
    together = done.ok().run
    for one, other in zip(figures(alone), figures(together), strict=True):
        assert other == pytest.approx(one, rel=1e-6)
    tests = {key: value for key, value in alone.summary.items() if key.startswith("test/")}
    assert {key: together.summary[key] for key in tests} == pytest.approx(tests, rel=1e-6)


@pytest.mark.long
def test_a_reproducible_run_has_the_same_bits_on_one_and_two_ranks(home, train, train_here):
    same = ("trainer.reproducible=true", "trainer.epochs=2")
    alone = train_here(*words("segmentation", *same, "run.dir=alone"))
    env = {"PYTHONPATH": str(home)}
    done = train(*words("segmentation", *same, "run.dir=together"), ranks=2, env=env)
    assert figures(done.ok().run) == figures(alone)


@pytest.mark.parametrize("kind", ["regression", "stream"])
def test_validation_examples_may_be_data_of_their_own(kind, home, train_here):
    function = KINDS[kind]["data"]
    val = f"+data.val={{_target_: mytasks.{function}, part: val, count: 25}}"
    run = train_here(*words(kind, val, "~data.split", "trainer.epochs=1", "run.dir=run"))
    assert run.summary["val/count"] == 25
    assert run.column("step") == [6]  # all of the 87 examples of data.train, in batches of 16
    trained = load(run.path)
    assert measure(trained, open_part(trained, "val")).loss == run.metrics[0]["val/loss"]


def test_running_figures_and_pieces_of_a_batch_are_of_the_same_examples(home, train_here):
    """With a learning rate of nearly 0 the model stays, and running figures are those of an evaluation."""
    still = ("optimizer.lr=1e-30", "trainer.epochs=1", "trainer.accumulate=3")
    evaluated = train_here(*words("own", *still, "run.dir=evaluated"))
    running = train_here(*words("own", *still, "run.dir=running", "trainer.train_metrics=running"))
    for key in ("train/loss", "train/twice", "val/loss"):
        assert running.column(key) == pytest.approx(evaluated.column(key), rel=1e-12)


def test_single_steps_are_recorded_with_the_metrics_of_the_task(home, train_here):
    run = train_here(*words("language_model", "trainer.log_every_steps=1", "trainer.epochs=1"))
    steps = [json.loads(line) for line in (run.path / "metrics-steps.jsonl").read_text().splitlines()]
    assert [set(step) for step in steps] == [
        {"step", "epoch", "step/lr", "step/loss", "step/perplexity", "step/accuracy"}
    ] * 5
    for step in steps:  # all texts have one length, so that the mean over tokens is that over texts
        assert step["step/perplexity"] == pytest.approx(math.exp(step["step/loss"]), rel=1e-6)


def test_a_plateau_schedule_whose_metric_does_not_come_says_which_do():
    """An object of torchmetrics may give several numbers, each under a name that only an epoch shows."""
    schedule = Schedule(SimpleNamespace(), monitor="val/scores")
    with pytest.raises(
        UserError, match="monitor=val/scores is not measured: give one of val/scores_one, v"
    ):
        schedule.after_epoch({"val/scores_one": 1.0, "val/loss": 2.0})


def test_a_plateau_schedule_looks_at_a_metric_of_the_task(home, train_here):
    plateau = ("scheduler=plateau", "scheduler.patience=0", "scheduler.factor=0.5")
    run = train_here(*words("regression", *plateau, "scheduler.monitor=val/r2", "trainer.epochs=3"))
    assert run.column("val/r2")[-1] > run.column("val/r2")[0]
    assert run.column("lr")[-1] < 0.01  # mode=min: a rising metric counts as no progress


# --- metrics that are not means ---------------------------------------------------------------------------


class Ranks:
    """Ranks that are threads of this process, and gather tensors as a Runtime does."""

    def __init__(self, count: int) -> None:
        self.count = count
        self.barrier = threading.Barrier(count)
        self.rows: list[Any] = [None] * count

    def gather(self, rank: int, rows: torch.Tensor) -> torch.Tensor:
        self.rows[rank] = rows
        self.barrier.wait(20)
        together = torch.cat(self.rows)
        self.barrier.wait(20)
        return together

    def run(self, work: Callable[[Any], Any]) -> list[Any]:
        """What `work` gives on each rank, which it is called with."""
        found: list[Any] = [None] * self.count

        def of(rank: int) -> None:
            runtime = SimpleNamespace(
                rank=rank,
                world_size=self.count,
                device=torch.device("cpu"),
                gather=lambda rows: self.gather(rank, rows),
            )
            found[rank] = work(runtime)

        threads = [threading.Thread(target=of, args=(rank,)) for rank in range(self.count)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return found


def kinds_of_metrics() -> dict[str, Any]:
    """Metrics whose states are sums, lists, extremes, and such that only they can put together."""
    torchmetrics = pytest.importorskip("torchmetrics")
    return {
        "auroc": torchmetrics.classification.BinaryAUROC(),
        "f1": torchmetrics.classification.BinaryF1Score(),
        "calibration": torchmetrics.classification.BinaryCalibrationError(),
        "correlation": torchmetrics.PearsonCorrCoef(),
        "concordance": torchmetrics.ConcordanceCorrCoef(),
        "rank_correlation": torchmetrics.SpearmanCorrCoef(),
        "r2": torchmetrics.R2Score(),
        "largest": torchmetrics.MaxMetric(),
    }


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("examples", [4, 61])
def test_a_metric_is_that_of_all_examples_at_once(ranks, examples):
    """Of 4 examples the last of 5 ranks has none at all."""
    generator = torch.Generator().manual_seed(examples)
    predicted = torch.rand(examples, generator=generator, dtype=torch.float64)
    targets = (predicted + torch.rand(examples, generator=generator, dtype=torch.float64) > 1).long()
    targets[:2] = torch.tensor([0, 1])
    for name, metric in kinds_of_metrics().items():

        def arguments(chosen: slice, name: str = name) -> tuple[torch.Tensor, ...]:
            others = targets if name in ("auroc", "f1", "calibration") else targets.double()
            return (predicted[chosen],) if name == "largest" else (predicted[chosen], others[chosen])

        def on_rank(runtime: Any, metric: Any = metric, arguments: Any = arguments) -> float:
            mine = seeing(metric, torch.device("cpu"))
            for first in range(runtime.rank, examples, 7 * ranks):  # in batches of at most 7
                chosen = slice(first, min(first + 7 * ranks, examples), ranks)
                mine.update(*arguments(chosen))
            return float(merged([mine], runtime).compute())

        whole = metric.clone()
        whole.update(*arguments(slice(None)))
        expected = float(whole.compute())
        assert Ranks(ranks).run(on_rank) == pytest.approx([expected] * ranks, rel=1e-6), name


def bits_of_metrics(ranks: int, shares: int) -> dict[str, float]:
    """Metrics of the same examples, float32, which so many ranks have in so many objects."""
    generator = torch.Generator().manual_seed(11)
    predicted, targets = torch.randn(2, 4, 50, generator=generator).exp()
    found = {}
    for name in ("r2", "correlation", "rank_correlation"):
        metric = kinds_of_metrics()[name]

        def on_rank(runtime: Any, metric: Any = metric) -> float:
            mine = [seeing(metric, torch.device("cpu")) for _ in range(shares // ranks)]
            for batch in (slice(0, 30), slice(30, 50)):
                for quarter in range(runtime.rank * 4 // ranks, (runtime.rank + 1) * 4 // ranks):
                    of_share = mine[quarter % len(mine)]
                    of_share.update(predicted[quarter, batch], targets[quarter, batch])
            return float(merged(mine, runtime).compute())

        found[name] = Ranks(ranks).run(on_rank)[0]
    return found


def test_objects_of_four_shares_give_the_same_bits_on_any_number_of_ranks():
    alone = bits_of_metrics(ranks=1, shares=4)
    assert bits_of_metrics(ranks=2, shares=4) == alone
    assert bits_of_metrics(ranks=4, shares=4) == alone
    # One object for each rank adds the same numbers up in another order.
    assert bits_of_metrics(ranks=1, shares=1) != alone


def test_ranks_whose_targets_are_all_equal_do_not_spoil_a_correlation():
    """Each rank's own correlation is not defined then, and that of all examples is."""
    torchmetrics = pytest.importorskip("torchmetrics")
    predicted = [torch.tensor([0.1, 0.4]), torch.tensor([0.7, 0.9])]
    targets = [torch.zeros(2), torch.ones(2)]

    def on_rank(runtime: Any) -> float:
        mine = seeing(torchmetrics.PearsonCorrCoef(), torch.device("cpu"))
        mine.update(predicted[runtime.rank], targets[runtime.rank])
        return float(merged([mine], runtime).compute())

    expected = torch.corrcoef(torch.stack([torch.cat(predicted), torch.cat(targets)]))[0, 1]
    assert Ranks(2).run(on_rank) == pytest.approx([float(expected)] * 2, rel=1e-6)


def test_a_metric_that_keeps_means_sees_the_batches_of_all_ranks():
    torchmetrics = pytest.importorskip("torchmetrics")

    class Last(torchmetrics.Metric):
        def __init__(self):
            super().__init__()
            self.add_state("value", torch.tensor(0.0), dist_reduce_fx="mean")

        def update(self, value):
            self.value = value

        def compute(self):
            return self.value

    def on_rank(runtime: Any) -> float:
        mine = seeing(Last(), torch.device("cpu"))
        with pytest.raises(UserError, match="is given a str: take a metric that keeps sums"):
            mine.update("text")
        mine.update(torch.tensor(2.0 + runtime.rank))
        return float(merged([mine], runtime).compute())

    assert Ranks(2).run(on_rank) == [3.0, 3.0]


# --- what tasks compute -----------------------------------------------------------------------------------

IMAGES = torch.tensor([[[[0, 255], [51, 102]]], [[[0, 0], [0, 255]]]], dtype=torch.uint8)


def test_the_loss_of_a_batch_is_the_sum_of_those_of_its_examples():
    torch.manual_seed(0)
    logits, masks = torch.randn(3, 2, 4, 4), torch.randint(0, 2, (3, 4, 4))
    masks[0, :2] = tasks.IGNORED
    tokens, of_tokens = torch.randint(0, 5, (3, 6)), torch.randn(3, 5, 5)
    x, y = torch.randn(3, 7), torch.randn(3, 7)
    cases: list[tuple[Any, torch.Tensor, Any]] = [
        (tasks.Segmentation(), logits, (None, masks)),
        (tasks.Segmentation(loss=nn.CrossEntropyLoss()), logits, (None, masks.clamp(min=0))),
        (tasks.LanguageModel(), of_tokens, tokens),
        (tasks.Regression(), x, (None, y)),
        (tasks.Regression(loss=nn.HuberLoss()), x, (None, y)),
        (tasks.Regression(loss=lambda outputs, targets: (outputs - targets).abs().mean()), x, (None, y)),
        (tasks.Classification(label_smoothing=0.1), x, (None, torch.tensor([0, 3, 6]))),
    ]
    for task, outputs, batch in cases:

        def part(batch: Any, chosen: slice) -> Any:
            return batch[chosen] if isinstance(batch, torch.Tensor) else (None, batch[1][chosen])

        whole = task.loss(outputs, batch)
        pieces = [task.loss(outputs[i : i + 1], part(batch, slice(i, i + 1))) for i in range(3)]
        assert whole.dim() == 0
        assert float(whole) == pytest.approx(float(sum(pieces)), rel=1e-5), task


def test_a_masked_pixel_counts_neither_in_the_loss_nor_in_the_accuracy():
    logits = torch.tensor([[[[9.0, -9.0]], [[-9.0, 9.0]]]])  # [1, 2, 1, 2]: the classes 0 and 1
    task = tasks.Segmentation(ignore=255)
    batch = (None, torch.tensor([[[0, 255]]], dtype=torch.uint8))
    assert float(task.loss(logits, batch)) == pytest.approx(0, abs=1e-6)
    assert task.metrics(logits, batch)["accuracy"] == Mean(torch.tensor(1), torch.tensor(1), "percent")


def test_a_loss_of_torch_leaves_out_what_the_task_ignores():
    """The mean is over the places that count, as with the task's own cross entropy, which is the same."""
    torch.manual_seed(0)
    logits, masks = torch.randn(3, 4, 5, 2), torch.randint(0, 4, (3, 5, 2))
    masks[0, :3] = tasks.IGNORED
    masks[1] = tasks.IGNORED
    tokens = torch.randint(1, 4, (3, 6))
    tokens[2, 2:] = 0  # padding, which the loss itself does not know of
    of_tokens = torch.randn(3, 5, 4)
    for kind, values, outputs, batch in (
        (tasks.Segmentation, {}, logits, (None, masks)),
        (tasks.LanguageModel, {"ignore": 0}, of_tokens, tokens),
    ):
        usual = float(kind(**values).loss(outputs, batch))
        assert float(kind(nn.CrossEntropyLoss(), **values).loss(outputs, batch)) == pytest.approx(usual)

    # Where nothing is ignored, the bits are those of the mean over all places.
    whole = masks.clamp(min=0)
    one_by_one = nn.functional.cross_entropy(logits, whole, reduction="none")
    plain = one_by_one.flatten(1).mean(dim=1).sum()
    assert torch.equal(tasks.Segmentation(nn.CrossEntropyLoss()).loss(logits, (None, whole)), plain)

    # A function of the user's own is taken at its word: its mean is that of the example.
    own = tasks.Segmentation(nn.functional.cross_entropy)
    pixels = (masks != tasks.IGNORED).sum()
    expected = one_by_one[masks != tasks.IGNORED].sum() / pixels * len(masks)
    assert float(own.loss(logits, (None, masks))) == pytest.approx(float(expected))


def test_a_mask_of_bytes_has_no_pixel_of_minus_100():
    """As a byte, -100 would be 156, and a mask of 156 would pass for ignored."""
    masks = torch.tensor([[156, 1]], dtype=torch.uint8)
    with pytest.raises(UserError, match="A mask is 156, but the model gives 3 classes"):
        tasks.Segmentation().loss(torch.zeros(1, 3, 2), (None, masks))
    with pytest.raises(UserError, match="Label 156 does not fit the model's 3 outputs"):
        tasks.Classification().loss(torch.zeros(2, 3), (None, masks[0]))


def test_images_of_bytes_become_numbers_up_to_1_for_an_autoencoder():
    task, model = tasks.Autoencoder(), nn.Conv2d(1, 1, 1).double()
    seen: list[torch.Tensor] = []
    model.register_forward_hook(lambda _, inputs, __: seen.append(inputs[0]))
    task.outputs(model, IMAGES)
    assert seen[0].dtype == torch.float64
    assert seen[0].flatten()[:4].tolist() == [0, 1, 0.2, 0.4]
    assert float(task.loss(IMAGES.double() / 255, IMAGES)) < 1e-12


def test_a_column_and_a_row_of_the_same_numbers_are_not_stretched_to_a_square():
    outputs, targets = torch.tensor([[1.0], [2.0]]), torch.tensor([1, 4])
    assert float(tasks.Regression().loss(outputs, (None, targets))) == 4


def test_another_reduction_is_told_to_have_no_effect(caplog):
    targets = torch.tensor([1.0, 2.0])
    of_sum, of_mean = tasks.Regression(nn.MSELoss(reduction="sum")), tasks.Regression(nn.MSELoss())
    assert of_sum.loss(targets + 1, (None, targets)) == of_mean.loss(targets + 1, (None, targets)) == 2
    [said] = caplog.messages
    assert said.startswith("task.loss.reduction=sum has no effect")


def test_no_part_of_a_number_is_dropped():
    """torch makes real numbers of complex ones, and whole ones of others, with no more than a warning."""
    with pytest.raises(UserError, match="takes no complex numbers"):
        tasks.Regression().loss(torch.ones(2, dtype=torch.complex64), (None, torch.ones(2)))
    tokens = torch.ones(2, 3, dtype=torch.int64)
    for targets in (tokens + 0.5, None):
        with pytest.raises(UserError, match="what follows each token as whole numbers"):
            tasks.LanguageModel().loss(torch.ones(2, 3, 5), (tokens, targets))


@pytest.mark.parametrize("numbers", [[], [1], [5]])
def test_a_single_example_of_a_model_that_ends_in_squeeze_is_one_example(numbers):
    """squeeze() takes the dimension of the examples away, too."""
    targets = torch.arange(float(max(1, *numbers, 0))).reshape(1, *numbers)
    outputs = (targets + 2).squeeze()
    for task in (tasks.Regression(), tasks.Regression(nn.MSELoss())):
        assert float(task.loss(outputs, (None, targets))) == 4
        assert float(task.metrics(outputs, (None, targets))["mae"]) == 2


@pytest.mark.parametrize("shape", [[], [1], [1, 1]])
@pytest.mark.parametrize("kind", ["mean", "percent", "exp"])
def test_a_mean_is_shown_as_it_says(kind, shape):
    task = SimpleNamespace()
    three, four, six = (torch.full(shape, number) for number in (3.0, 4, 6.0))
    measured = {"plain": six, "other": Mean(three, four, kind)}
    runtime = SimpleNamespace(
        device=torch.device("cpu"), sum_dtype=torch.float64, shares=range(1), gather=lambda rows: rows
    )
    sums = Sums(runtime, columns_of(task, measured))
    for _ in range(2):
        sums.add(0, torch.tensor(1.0), 3, measured)
    found = sums.total(runtime)
    expected = {"mean": 0.75, "percent": 75.0, "exp": math.exp(0.75)}[kind]
    assert found.values == {"loss": 1 / 3, "plain": 2.0, "other": expected}
    assert (found.examples, sums.rows.tolist()) == (6, [[2, 12, 6, 8, 6]])


def test_a_metric_that_is_missing_for_a_later_batch_is_said():
    runtime = SimpleNamespace(
        device=torch.device("cpu"), sum_dtype=torch.float64, shares=range(1), gather=lambda rows: rows
    )
    sums = Sums(
        runtime, columns_of(SimpleNamespace(), {"one": torch.tensor(1.0), "two": torch.tensor(1.0)})
    )
    with pytest.raises(UserError, match="does not give two for this batch, but did for the first one"):
        sums.add(0, torch.tensor(1.0), 3, {"one": torch.tensor(1.0)})


def test_a_metric_has_a_name_that_can_be_printed():
    with pytest.raises(
        UserError, match=r"gives 'two\\nlines', a name with a character that cannot be printed"
    ):
        columns_of(SimpleNamespace(), {"two\nlines": torch.tensor(1.0)})


# --- what does not fit ------------------------------------------------------------------------------------

MISFITS = [
    ("own", ["task._target_=mytasks.Averaging"], r"is the mean of the losses of each .* must be their sum"),
    (
        "own",
        ["task._target_=mytasks.Many"],
        r"its loss is float64 \[2\], but it must be a tensor of one nu",
    ),
    (
        "own",
        ["task._target_=mytasks.Vector"],
        r"gives errors as a tensor of shape \[2\], but a metric is o",
    ),
    ("own", ["task._target_=mytasks.Lossless"], r"has no method loss\(outputs, batch\)"),
    ("own", ["task._target_=mytasks.Tsk"], "mytasks has no Tsk"),
    ("own", ["+task.loss=1"], "Task refuses its arguments"),
    ("own", ["task=regression"], r"batches that are a pair \(inputs, targets\), but got a dict with x, y"),
    ("own", ["model=my_language_model"], r"take a batch that is a dict \(x: float64 \[2, 4\], y: float64"),
    ("regression", ["data.test.count=0"], "data.test has no examples: give at least one"),
    ("regression", ["+model.outputs=3"], r"gives a tensor \[2, 3\] of float64, but the targets are a tens"),
    ("regression", ["task=language_model"], r"takes batches of tokens \[n, length\], whole numbers, but g"),
    ("regression", ["task=classification"], "labels of type float32, but a label is the number of a class"),
    ("regression", ["trainer.label_smoothing=0.1"], "label_smoothing=0.1 is for task=classification"),
    ("regression", ["task.torchmetrics.r2._target_=torch.nn.ReLU"], "torchmetrics.r2 is a ReLU: give the"),
    (
        "regression",
        ["scheduler=plateau", "scheduler.monitor=val/f1"],
        "val/f1 is not measured: give one of",
    ),
    (
        # A pass over the training examples alone shows them to objects of torchmetrics.
        "regression",
        ["scheduler=plateau", "scheduler.monitor=train/r2", "trainer.train_metrics=running"],
        "train/r2 is not measured: give one of train/loss, train/mae, val/loss, val/mae, val/r2",
    ),
    (
        "regression",
        ["checkpoint.best=train/r2 max", "trainer.train_metrics=running"],
        "has no metric train/r2. Its metrics are: train/loss, train/mae, val/loss, val/mae, val/r2",
    ),
    (
        "segmentation",
        ["model._target_=mytasks.line", "+model.inputs=8"],
        "needs logits .* but the model gives",
    ),
]


def test_a_task_that_takes_no_single_example_trains_where_none_comes(home, train_here):
    own = words("own", "task._target_=mytasks.Several", "trainer.epochs=1")
    assert train_here(*own, "trainer.batch_size=16").summary["epochs"] == 1
    with pytest.raises(UserError, match="takes 2 examples in training, but not 1, and 1 is what is left"):
        train_here(*own, "trainer.batch_size=66")  # of 67


@pytest.mark.parametrize(
    ("task", "outputs", "batch"),
    [
        (tasks.Classification(), torch.zeros(3, 10), (None, torch.tensor([-1, 4, 9]))),
        (tasks.Segmentation(), torch.zeros(1, 10, 3), (None, torch.tensor([[9, 4, -1]]))),
    ],
)
def test_the_label_that_fits_no_class_is_named(task, outputs, batch):
    with pytest.raises(UserError, match="-1"):
        task.loss(outputs, batch)
        task.metrics(outputs, batch)


@pytest.mark.parametrize("loss", [None, torch.nn.CrossEntropyLoss()])
def test_a_label_of_a_whole_image_is_no_mask(loss):
    task, logits = tasks.Segmentation(loss=loss), torch.zeros(2, 10)
    with pytest.raises(
        UserError, match=r"a tensor \[2, 10\] of float32 and the data a tensor \[2\] of int"
    ):
        task.loss(logits, (None, torch.tensor([1, 2])))


@pytest.mark.parametrize(("kind", "overrides", "said"), MISFITS)
def test_what_does_not_fit_is_said_before_anything_is_made(kind, overrides, said, home, train_here):
    pytest.importorskip("torchmetrics")
    with pytest.raises(UserError, match=said):
        train_here(*words(kind, *overrides))
    assert not (home / "runs").exists()


def test_predict_and_export_say_that_there_are_no_classes(home, train_here, tmp_path):
    run = train_here(*words("regression", "trainer.epochs=1", "run.dir=run"))
    for call in (
        lambda: command.predict(["run", "--data", "test"]),
        lambda: command.predict(["run", "image.png"]),
        lambda: command.export(["run", "--to", "model.onnx"]),
    ):
        with pytest.raises(UserError, match="its model does not tell classes apart"):
            call()
    trained = load(run.path)
    assert measure(trained, open_part(trained, "test")).loss == run.summary["test/loss"]


def test_what_a_model_gives_is_written_as_an_array_in_the_order_of_the_data(home, train_here, capsys):
    run = train_here(*words("regression", "run.dir=run"))
    assert command.predict(["run", "--data", "test", "--npy", "out.npy"]) == 0
    assert "an array of float64 [31, 1] is in out.npy" in capsys.readouterr().out
    _, targets = sys.modules["mytasks"].table("test", 31)
    errors = np.load("out.npy")[:, 0] - targets
    assert np.mean(errors**2) == pytest.approx(run.summary["test/loss"], rel=1e-12)
    assert np.mean(np.abs(errors)) == pytest.approx(run.summary["test/mae"], rel=1e-12)
    with pytest.raises(UserError, match=r"--npy out\.npy is there already: give another name, or --force"):
        command.predict(["run", "--data", "test", "--npy", "out.npy"])
    capsys.readouterr()
    assert command.predict(["run", "--data", "test", "--npy", "out.npy", "--force", "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["index"] for line in lines] == list(range(31))
    assert [line["output"] for line in lines] == np.load("out.npy").tolist()
    assert command.predict(["run", "--data", "val", "--npy", "out.npy", "--force"]) == 0
    assert np.load("out.npy").shape == (20, 1)
    train_here(*words("own", "trainer.epochs=1", "run.dir=nested"))
    with pytest.raises(
        UserError, match=r"gives a Both .* but --npy holds one tensor with an entry for each"
    ):
        command.predict(["nested", "--data", "test", "--npy", "nested.npy"])
