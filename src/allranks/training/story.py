"""The words and columns of rank 0's story: pure text, from a training's name to the next command to type.

A line of the story is `label  value`, or a row of the table of epochs. In a file all of it stands as it is.
At a terminal values are wrapped, and columns for which there is no room are left out.
"""

from __future__ import annotations

import math
import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

INDENT = "  "
LABEL_COLUMNS = 12  # of the longest label and its distance to the value
VALUE_AT = len(INDENT) + LABEL_COLUMNS  # in a line

# What started the ranks, by its name in job.identity, as a person would say it.
LAUNCHERS = {
    "mpich": "mpiexec (MPICH)",
    "openmpi": "mpiexec (Open MPI)",
    "mvapich": "mpiexec (MVAPICH)",
    "mvapich2": "mpiexec (MVAPICH2)",
    "pals": "mpiexec (PALS)",
    "cray-pmi": "a launcher of Cray's",
    "pmi": "a launcher with PMI",
    "pmix": "a launcher with PMIx",
    "flux": "Flux",
    "environment": "a launcher that sets RANK and WORLD_SIZE",
}
CARRIERS = {"mpi": "MPI", "nccl": "NCCL", "xccl": "XCCL"}

# --- the header ---------------------------------------------------------------------------------------


def pair(label: str, value: str) -> str:
    """A line of the header or of the closing block."""
    return f"{INDENT}{label:{LABEL_COLUMNS}}{value}"


def title(
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    epochs: int,
    max_steps: int | None = None,
    is_one_batch: bool = False,
) -> str:
    """What is trained, on which data: `Training mlp on mnist for 5 epochs`.

    `model` and `data` are these sections of the configuration. `max_steps`: the run ends after so many
    steps at the latest. `is_one_batch`: each step takes the same batch.
    """
    examples = name_of(data.get("train", {}))
    if is_one_batch:
        examples = f"one batch of {examples}, again and again,"
    limit = "" if max_steps is None else f", at most {count(max_steps, 'step')}"
    return f"Training {name_of(model)} on {examples} for {count(epochs, 'epoch')}{limit}"


def name_of(section: Mapping[str, Any]) -> str:
    """A short name for the component that a section of the configuration describes.

    A model is called by its class or function. Data are called by their own name where the section gives
    one, and the data sets that we ship by their module.
    """
    given = section.get("name")
    if isinstance(given, str):
        return given
    *modules, last = str(section.get("_target_")).split(".")
    return modules[-1] if modules[:2] == ["allranks", "data"] else last


def who_trains(world_size: int, hosts: int, device_type: str, threads: int) -> str:
    """How many ranks train, on how many hosts, and on which kind of device each."""
    device = (
        f"the CPU with {count(threads, 'thread')}" if device_type == "cpu" else f"a GPU ({device_type})"
    )
    if world_size == 1:
        return f"1, on {device}"
    return f"{world_size:,} on {count(hosts, 'host')}, each on {device}"


def how_they_work_together(launcher: str, kind: str, collectives: str) -> str:
    """What has started several ranks, what connects them, and what adds up their gradients.

    `launcher` is a name of job.identity, `kind` and `collectives` are those of the Runtime.
    """
    starter = LAUNCHERS.get(launcher, launcher)
    connector = "ezpz" if kind == "ezpz" else "PyTorch"
    carrier = CARRIERS.get(collectives, collectives)
    return f"{starter}; {connector} connects them, {carrier} adds up their gradients"


def examples(train: int, val: int, test: int, input_shape: Sequence[int]) -> str:
    """How many examples there are of each kind, and of which shape."""
    shape = "x".join(map(str, input_shape))  # one word, which is not broken
    return f"{train:,} training, {val:,} validation and {test:,} test examples of {shape}"


def count(number: int, noun: str) -> str:
    """`1 rank`, `12 ranks`."""
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


# --- the table of epochs ------------------------------------------------------------------------------


class _Column(NamedTuple):
    title: str
    columns: int  # its width
    text: Callable[[Mapping[str, Any]], str]  # of an epoch's line of metrics.jsonl
    # Where there is no room the column with the highest of these numbers goes first; 0: never.
    goes: int = 0


def _figure(key: str, form: str) -> Callable[[Mapping[str, Any]], str]:
    return lambda metrics: format(metrics[key], form)


def _loss(key: str) -> Callable[[Mapping[str, Any]], str]:
    """Four decimals, as many as fit for a loss that is large."""
    return lambda metrics: format(metrics[key], ".4f" if abs(metrics[key]) < 10_000 else ".3g")


def _rate(metrics: Mapping[str, Any]) -> str:
    """The learning rate in at most seven characters."""
    text = f"{metrics['lr']:.3g}"
    return text if len(text) <= 7 else f"{metrics['lr']:.1e}"


def _seconds(metrics: Mapping[str, Any]) -> str:
    """The time of an epoch and of its evaluations, in at most six characters up to a day."""
    seconds = metrics["time/train_s"] + metrics["time/eval_s"]
    return f"{seconds:.1f} s" if seconds < 1000 else f"{seconds / 60:.0f} m"


_COLUMNS = (
    _Column("lr", 7, _rate, goes=1),
    _Column("train loss", 10, _loss("train/loss")),
    _Column("train %", 7, _figure("train/accuracy", ".2f")),
    _Column("val loss", 8, _loss("val/loss")),
    _Column("val %", 6, _figure("val/accuracy", ".2f")),
    _Column("samples/s", 9, _figure("throughput/samples_per_s", ",.0f"), goes=2),
    _Column("time", 6, _seconds, goes=3),
)
_BEST = "best"  # above the column that marks the best epoch so far
_GAP = "  "


class Table:
    """The table of a run's epochs: a line above the columns, and one for each epoch."""

    def __init__(self, epochs: int) -> None:
        """`epochs` is how many the run has in all."""
        self.epochs = epochs
        self._first = max(len("epoch"), len(f"{epochs}/{epochs}"))  # width of the first column

    def header(self, columns: int | None) -> str:
        """The line above the columns; `columns` is the terminal's width, None for no limit."""
        titles = [f"{column.title:>{column.columns}}" for column in self._shown(columns)]
        return INDENT + _GAP.join([f"{'epoch':>{self._first}}", *titles, _BEST])

    def row(self, metrics: Mapping[str, Any], is_best: bool, columns: int | None) -> str:
        """The line of an epoch: its line of metrics.jsonl. `is_best`: by val/loss, so far."""
        cells = [f"{column.text(metrics):>{column.columns}}" for column in self._shown(columns)]
        epoch = f"{metrics['epoch']}/{self.epochs}"
        return (INDENT + _GAP.join([f"{epoch:>{self._first}}", *cells, "*" if is_best else ""])).rstrip()

    def _shown(self, columns: int | None) -> list[_Column]:
        """The columns for which there is room."""
        shown = list(_COLUMNS)
        while columns is not None and self._width(shown) > columns:
            leaves = max(shown, key=lambda column: column.goes)
            if not leaves.goes:
                break
            shown.remove(leaves)
        return shown

    def _width(self, shown: Sequence[_Column]) -> int:
        widths = [self._first, *(column.columns for column in shown), len(_BEST)]
        return len(INDENT) + sum(widths) + len(_GAP) * (len(widths) - 1)


def best_of(history: Sequence[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The epoch with the lowest val/loss, of equal ones the last; its checkpoint is kept.

    None where no epoch has a val/loss that is a number.
    """
    measured = [
        metrics
        for metrics in history
        if metrics["val/loss"] is not None and math.isfinite(metrics["val/loss"])
    ]
    return min(reversed(measured), key=lambda metrics: metrics["val/loss"], default=None)


# --- the end ------------------------------------------------------------------------------------------


def test_figures(summary: Mapping[str, Any]) -> str:
    """How well the model does on the test set."""
    return (
        f"loss {summary['test/loss']:.4f}, accuracy {summary['test/accuracy']:.2f} % "
        f"of {summary['test/count']:,} examples"
    )


def best_figures(best: Mapping[str, Any]) -> str:
    """Which epoch was the best, and how good."""
    return f"epoch {best['epoch']}: val loss {best['val/loss']:.4f}, val {best['val/accuracy']:.2f} %"


def using(directory: str) -> str:
    """What to type to try a trained model."""
    return f"allranks predict {shlex.quote(directory)} image.png"


def going_on(
    directory: str, argv: Sequence[str], world_size: int, launcher: str, was_launched: bool
) -> str:
    """What to type so that a stopped run goes on.

    `argv` is the command line of its rank 0. `was_launched`: whether `allranks launch` has started it; else
    `launcher` is the name in job.identity of what has.
    """
    where = shlex.quote(directory)
    if was_launched:
        ranks = f"-n {world_size} " if world_size > 1 else ""
        return f"allranks launch {ranks}--run {where}"
    if {"-m", "--multirun"} & set(argv):
        return "the same command again, with the same run.dir"
    if launcher != "none":
        return f"the same command again, with run.dir={where}"
    words = [word for word in argv[1:] if not word.startswith("run.dir=")]
    return shlex.join(["allranks", "train", *words]) + f" run.dir={where}"


def going_on_in_a_job(directory: str) -> str:
    """What to type so that a stopped run goes on that `allranks submit` has queued.

    Where its job's time was over the job script queues the next job itself. After a signal it does not.
    """
    return f"allranks submit --cell {shlex.quote(directory)}   (unless its next job is queued by itself)"
