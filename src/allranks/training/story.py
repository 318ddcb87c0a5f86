"""The texts that rank 0 shows about a run, from its title to the command that the user may type next.

Together these texts are called the story of the run. A line of the story is `label  value`, or a row of the
table of epochs. A log file has all lines as they are. At a terminal long values are wrapped, and columns of
the table for which there is no room are left out. The functions here only return text.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

INDENT = "  "
LABEL_COLUMNS = 12  # characters of the longest label, with the blanks before the value
VALUE_AT = len(INDENT) + LABEL_COLUMNS  # where the value begins in a line

# Names for people of what has started the ranks, by the names that job/identity.py uses.
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
    """A line `label  value`, as at the beginning and at the end of the story."""
    return f"{INDENT}{label:{LABEL_COLUMNS}}{value}"


def title(
    model: Mapping[str, Any],
    data: Mapping[str, Any],
    epochs: int,
    max_steps: int | None = None,
    is_one_batch: bool = False,
) -> str:
    """The title of a run, such as `Training mlp on mnist for 5 epochs`.

    `model` and `data` are the sections of the configuration with these names. After `max_steps` steps the
    run ends at the latest; None means no such limit. With `is_one_batch` each step takes the same batch.
    """
    examples = name_of(data.get("train", {}))
    if is_one_batch:
        examples = f"one batch of {examples}, again and again,"
    limit = "" if max_steps is None else f", at most {count(max_steps, 'step')}"
    return f"Training {name_of(model)} on {examples} for {count(epochs, 'epoch')}{limit}"


def name_of(section: Mapping[str, Any]) -> str:
    """A short name for the component that a section of the configuration describes.

    It is the value of the key `name`, if there is one. Otherwise it is the name of the class or function in
    `_target_`. For data sets in allranks.data it is the name of the module, such as `mnist`.
    """
    given = section.get("name")
    if isinstance(given, str):
        return given
    *modules, last = str(section.get("_target_")).split(".")
    return modules[-1] if modules[:2] == ["allranks", "data"] else last


def who_trains(world_size: int, hosts: int, device_type: str, threads: int) -> str:
    """How many ranks train, on how many hosts, and on which kind of device each of them computes."""
    device = (
        f"the CPU with {count(threads, 'thread')}" if device_type == "cpu" else f"a GPU ({device_type})"
    )
    if world_size == 1:
        return f"1, on {device}"
    return f"{world_size:,} on {count(hosts, 'host')}, each on {device}"


def how_they_work_together(launcher: str, kind: str, collectives: str) -> str:
    """What has started several ranks, what connects them, and what adds up their gradients.

    `launcher` is a name that job/identity.py uses. `kind` and `collectives` are attributes of the Runtime.
    """
    starter = LAUNCHERS.get(launcher, launcher)
    connector = "ezpz" if kind == "ezpz" else "PyTorch"
    carrier = CARRIERS.get(collectives, collectives)
    return f"{starter}; {connector} connects them, {carrier} adds up their gradients"


def examples(train: int, val: int, test: int, input_shape: Sequence[int]) -> str:
    """How many training, validation and test examples there are, and their shape."""
    shape = "x".join(map(str, input_shape))  # without blanks, so that wrapping does not break it
    return f"{train:,} training, {val:,} validation and {test:,} test examples of {shape}"


def batches(batch_size: int, steps_per_epoch: int) -> str:
    """How many examples a step takes over all ranks, and how many steps an epoch has."""
    return f"{batch_size:,} over all ranks, {count(steps_per_epoch, 'step')} an epoch"


def count(number: int, noun: str) -> str:
    """A number with its noun in singular or plural: `1 rank`, `12 ranks`."""
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


# --- the table of epochs ------------------------------------------------------------------------------


class _Column(NamedTuple):
    title: str
    columns: int  # its width in characters
    text: Callable[[Mapping[str, Any]], str]  # makes a cell from an epoch's line of metrics.jsonl
    # If there is not enough room, the column with the highest number is left out first; 0: never.
    goes: int = 0


def _figure(key: str, form: str) -> Callable[[Mapping[str, Any]], str]:
    """A function that shows the figure `key` of an epoch in this format, such as `.2f`."""
    return lambda metrics: format(metrics[key], form)


def _loss(key: str) -> Callable[[Mapping[str, Any]], str]:
    """A function that shows a loss with four decimals; from 10,000 on with three digits, as 1.23e+04."""
    return lambda metrics: format(metrics[key], ".4f" if abs(metrics[key]) < 10_000 else ".3g")


def _rate(metrics: Mapping[str, Any]) -> str:
    """The learning rate of an epoch in at most seven characters."""
    text = f"{metrics['lr']:.3g}"
    return text if len(text) <= 7 else f"{metrics['lr']:.1e}"


def _seconds(metrics: Mapping[str, Any]) -> str:
    """The time of an epoch including its evaluations; up to a day it has at most six characters."""
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
_BEST = "best"  # the title of the column that marks the best epoch so far with a star
_GAP = "  "


class Table:
    """The table of a run's epochs: a line of titles, and a row for each epoch."""

    def __init__(self, epochs: int) -> None:
        """Sets the table up. `epochs` is the number of epochs of the whole run."""
        self.epochs = epochs
        self._first = max(len("epoch"), len(f"{epochs}/{epochs}"))  # width of the first column

    def header(self, columns: int | None) -> str:
        """The line of titles. `columns` is the width of the terminal in characters; None for no limit."""
        titles = [f"{column.title:>{column.columns}}" for column in self._shown(columns)]
        return INDENT + _GAP.join([f"{'epoch':>{self._first}}", *titles, _BEST])

    def row(self, metrics: Mapping[str, Any], is_best: bool, columns: int | None) -> str:
        """The row of an epoch. `metrics` is its line of metrics.jsonl.

        `is_best` says whether its val/loss is the lowest so far. `columns` is the width of the terminal in
        characters; None for no limit.
        """
        cells = [f"{column.text(metrics):>{column.columns}}" for column in self._shown(columns)]
        epoch = f"{metrics['epoch']}/{self.epochs}"
        mark = "*" if is_best else ""
        line = INDENT + _GAP.join([f"{epoch:>{self._first}}", *cells, mark])
        return line.rstrip()

    def _shown(self, columns: int | None) -> list[_Column]:
        """The columns for which a line of `columns` characters has room; all of them for None."""
        shown = list(_COLUMNS)
        while columns is not None and self._width(shown) > columns:
            leaves = max(shown, key=lambda column: column.goes)
            if not leaves.goes:
                break
            shown.remove(leaves)
        return shown

    def _width(self, shown: Sequence[_Column]) -> int:
        """How many characters a line with these columns has."""
        widths = [self._first, *(column.columns for column in shown), len(_BEST)]
        return len(INDENT) + sum(widths) + len(_GAP) * (len(widths) - 1)


# --- the end ------------------------------------------------------------------------------------------


def test_figures(summary: Mapping[str, Any]) -> str:
    """The loss and the accuracy on the test set, from a run's summary."""
    return (
        f"loss {summary['test/loss']:.4f}, accuracy {summary['test/accuracy']:.2f} % "
        f"of {summary['test/count']:,} examples"
    )


def best_figures(best: Mapping[str, Any]) -> str:
    """The number of the best epoch, with its loss and accuracy on the validation examples."""
    return f"epoch {best['epoch']}: val loss {best['val/loss']:.4f}, val {best['val/accuracy']:.2f} %"


def using(directory: str) -> str:
    """The command with which a user tries the trained model on an image."""
    return f"allranks predict {shlex.quote(directory)} image.png"


def going_on(
    directory: str, argv: Sequence[str], world_size: int, launcher: str, was_launched: bool
) -> str:
    """The command with which a user continues a stopped run, or a sentence that describes it.

    `argv` is the command line of the run's rank 0. `was_launched` says whether `allranks launch` has
    started the run. Otherwise `launcher` says what has started it, by the name that job/identity.py uses.
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
    """The command with which a user continues a stopped run that `allranks submit` has queued.

    It is not needed if the run was stopped because the time of its job was over: then the job script queues
    the next job itself. After a signal the script does not.
    """
    return f"allranks submit --cell {shlex.quote(directory)}   (unless its next job is queued by itself)"
