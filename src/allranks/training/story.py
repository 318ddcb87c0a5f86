"""The texts that rank 0 shows about a run, from its title to the command that the user may type next.

Together these texts are called the story of the run. A line of the story is `label  value`, or a row of the
table of epochs. A log file has all lines as they are. At a terminal long values are wrapped, and columns of
the table for which there is no room are left out. The functions here only return text.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from allranks.run import metric_names

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
    `_target_`. For data sets in allranks.data it is the name of the module, such as `mnist`; for arrays
    from files it is the name of the folder that they are in.
    """
    given = section.get("name")
    if isinstance(given, str):
        return given
    if section.get("_target_") == "allranks.data.arrays.load":
        return _folder_of(section.get("path"))
    *modules, last = str(section.get("_target_")).split(".")
    return modules[-1] if modules[:2] == ["allranks", "data"] else last


def _folder_of(path: Any) -> str:
    """The folder of a file, or of the first of several; `arrays` where it has no name."""
    if isinstance(path, Mapping):
        path = list(path.values())
    first = path[0] if isinstance(path, list) and path else path
    return Path(str(first)).absolute().parent.name or "arrays"


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
    """How many training, validation and test examples there are, and their shape where it is known."""
    counts = f"{train:,} training, {val:,} validation and {test:,} test examples"
    shape = "x".join(map(str, input_shape))  # without blanks, so that wrapping does not break it
    return f"{counts} of {shape}" if shape else counts


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
    text: Callable[[Mapping[str, Any]], str]  # makes a cell from a line of metrics.jsonl
    # If there is not enough room, the column with the highest number is left out first; 0: never.
    goes: int = 0


# The numbers of the columns that are not metrics: they leave before any metric does.
_LR_GOES, _SPEED_GOES, _TIME_GOES = 1001, 1002, 1003
# So many quantities are always shown, with those of training and validation. In a classification these are
# the loss and the accuracy.
_KEPT_QUANTITIES = 2
# Of more metrics the others stand in metrics.jsonl only: also in a file a longer line is hard to read.
_MOST_METRICS = 12
_LEAST_METRIC_COLUMNS = 8  # room for a number such as 12.3456 or 1.23e-05
_LEAST_PERCENT_COLUMNS = 6  # room for 100.00


def _rate(line: Mapping[str, Any]) -> str:
    """The learning rate of an epoch in at most seven characters."""
    text = f"{line['lr']:.3g}"
    return text if len(text) <= 7 else f"{line['lr']:.1e}"


def _speed(line: Mapping[str, Any]) -> str:
    """Training examples per second."""
    return f"{line['throughput/samples_per_s']:,.0f}"


def _seconds(line: Mapping[str, Any]) -> str:
    """The time of an epoch including its evaluations; up to a day it has at most six characters."""
    seconds = line["time/train_s"] + line.get("time/eval_s", 0.0)
    return f"{seconds:.1f} s" if seconds < 1000 else f"{seconds / 60:.0f} m"


def _metric_column(name: str, goes: int) -> _Column:
    """The column of a metric. The one of an accuracy is called `val %`, after its unit."""
    is_percent = metric_names.quantity_of(name) == "accuracy"
    title = metric_names.words_of(name)
    if is_percent:
        title = f"{metric_names.part_of(name)} %".lstrip()
    least = _LEAST_PERCENT_COLUMNS if is_percent else _LEAST_METRIC_COLUMNS
    return _Column(title, max(len(title), least), lambda line: metric_names.number(name, line[name]), goes)


_BEST = "best"  # the title of the column that marks the best epoch so far with a star
_GAP = "  "


class Table:
    """The table of a run's epochs: a line of titles, and a row for each line of metrics.jsonl.

    Which columns there are depends on the lines: a training may keep any metrics. A loop that counts no
    epochs has a row for each step at which it has logged something.
    """

    def __init__(self, epochs: int, metric: str, history: Sequence[Mapping[str, Any]] = ()) -> None:
        """Sets the table up.

        `epochs` is the number of epochs of the whole run; 0 where it is not known. `metric` is the one that
        decides which epoch is the best: its column is never left out. `history` has the lines before the
        table's first row.
        """
        self.epochs = epochs
        self._metric = metric
        self._keys: dict[str, None] = {}  # of all lines so far, in the order in which they have come
        for line in history:
            self.add(line)

    def add(self, line: Mapping[str, Any]) -> None:
        """Takes note of what a line holds: what is new in it gets a column. Called before its row()."""
        self._keys.update(dict.fromkeys(line))

    def header(self, columns: int | None) -> str:
        """The line of titles. `columns` is the width of the terminal in characters; None for no limit."""
        return INDENT + _GAP.join([f"{c.title:>{c.columns}}" for c in self._shown(columns)] + [_BEST])

    def row(self, line: Mapping[str, Any], is_best: bool, columns: int | None) -> str:
        """The row of a line of metrics.jsonl.

        `is_best` says whether it is the best so far. `columns` is the width of the terminal in characters;
        None for no limit.
        """
        cells = []
        for column in self._shown(columns):
            try:
                text = column.text(line)
            except KeyError:  # this line does not have what others have
                text = "-"
            cells.append(f"{text:>{column.columns}}")
        mark = "*" if is_best else ""
        return (INDENT + _GAP.join([*cells, mark])).rstrip()

    def _shown(self, columns: int | None) -> list[_Column]:
        """The columns for which a line of `columns` characters has room; all of them for None."""
        place = self._place()
        before = [_Column("lr", 7, _rate, _LR_GOES)] if "lr" in self._keys else []
        after = []
        if "throughput/samples_per_s" in self._keys:
            after.append(_Column("samples/s", 9, _speed, _SPEED_GOES))
        if "time/train_s" in self._keys:
            after.append(_Column("time", 6, _seconds, _TIME_GOES))
        shown = [*before, *self._metrics(), *after]
        while columns is not None and _width([place, *shown]) > columns:
            leaves = max(shown, key=lambda column: column.goes, default=None)
            if leaves is None or not leaves.goes:
                break
            shown.remove(leaves)
        return [place, *shown]

    def _place(self) -> _Column:
        """The first column: the number of the epoch, or of the step in a loop that counts no epochs."""
        if "epoch" in self._keys or "step" not in self._keys:
            last = f"/{self.epochs}" if self.epochs else ""
            widest = len(f"{self.epochs}{last}") if self.epochs else 0
            return _Column("epoch", max(len("epoch"), widest), lambda line: f"{line['epoch']}{last}")
        return _Column("step", 9, lambda line: f"{line['step']:,}")

    def _metrics(self) -> list[_Column]:
        """The columns of the metrics: first those of the training examples, and then all others."""
        quantities = metric_names.by_quantity(filter(metric_names.is_metric, self._keys))
        columns: dict[str, _Column] = {}
        for place, names in enumerate(quantities.values()):
            for name in names:
                is_kept = place < _KEPT_QUANTITIES or name == self._metric
                # Of a quantity that is left out, the figure of the training examples goes first.
                is_of_training = metric_names.part_of(name) == "train"
                columns[name] = _metric_column(name, 0 if is_kept else 2 * place + is_of_training)
        while len(columns) > _MOST_METRICS:
            del columns[max(columns, key=lambda name: columns[name].goes)]
        names = [
            name
            for part in (*metric_names.PARTS, "")
            for name in columns
            if metric_names.part_of(name) == part
        ]
        return [columns[name] for name in names]


def _width(shown: Sequence[_Column]) -> int:
    """How many characters a line with these columns has."""
    widths = [*(column.columns for column in shown), len(_BEST)]
    return len(INDENT) + sum(widths) + len(_GAP) * (len(widths) - 1)


# --- the end ------------------------------------------------------------------------------------------


def test_figures(summary: Mapping[str, Any]) -> str:
    """The figures over the test set from a run's summary; empty if it was not tested."""
    figures = metric_names.in_a_sentence(metric_names.tests_in(summary))
    count = summary.get("test/count")
    return f"{figures} of {count:,} examples" if figures and count is not None else figures


def results(summary: Mapping[str, Any]) -> str:
    """What a program of the user's own has found besides a test, from its summary; empty for nothing."""
    return metric_names.in_a_sentence(metric_names.results_in(summary))


def best_figures(best: Mapping[str, Any]) -> str:
    """The number of the best epoch, with its metrics on the validation examples; all, if it has no such."""
    names = metric_names.metrics_in([best])
    shown = metric_names.validated(names)
    figures = [_with_words(name, best[name]) for name in shown[:_MOST_METRICS]]
    place = f"epoch {best['epoch']}" if "epoch" in best else f"step {best['step']:,}"
    return f"{place}: {', '.join(figures)}"


def _with_words(name: str, value: float) -> str:
    """A metric in a sentence: `val loss 0.3135`, `val 90.53 %`."""
    is_percent = metric_names.quantity_of(name) == "accuracy"
    words = metric_names.part_of(name) if is_percent else metric_names.words_of(name)
    return f"{words} {metric_names.with_unit(name, value)}".lstrip()


def using(directory: str, predicts: bool) -> str:
    """The command with which a user looks further: tries a classifier on an image, or reads the report."""
    if predicts:
        return f"allranks predict {shlex.quote(directory)} image.png"
    return f"allranks report {shlex.quote(directory)}"


def going_on(
    directory: str, argv: Sequence[str], world_size: int, launcher: str, was_launched: bool
) -> str:
    """The command with which a user continues a stopped run, or a sentence that describes it.

    `argv` is the command line of the run's rank 0. `was_launched` says whether `allranks launch` has
    started the run. Otherwise `launcher` says what has started it, by the name that job/identity.py uses.
    """
    where = shlex.quote(directory)
    if was_launched:
        return f"allranks launch -n {world_size} --run {where}"
    if {"-m", "--multirun"} & set(argv):
        return "the same command again, with the same run.dir"
    if launcher != "none":
        return f"the same command again, with run.dir={where}"
    from allranks.compose import key_of  # loaded already where words were typed

    words = [word for word in argv[1:] if key_of(word) != "run.dir"]
    return shlex.join(["allranks", "train", *words]) + f" run.dir={where}"


def going_on_in_a_job(directory: str) -> str:
    """The command with which a user continues a stopped run that `allranks submit` has queued.

    It is not needed if the run was stopped because the time of its job was over: then the job script queues
    the next job itself. After a signal the script does not.
    """
    return f"allranks submit --cell {shlex.quote(directory)}   (unless its next job is queued by itself)"
