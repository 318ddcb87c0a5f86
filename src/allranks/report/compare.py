"""Compares runs: in which settings they differ, their results, and which one is the best. No torch.

This module has the rules only; it reads and writes no file. compare() takes what report/gather.py has read
of each run, and returns a Comparison. Tables, pictures and the page are made from that.

Runs that differ only in their seed share one row of the table, which has the mean of their results and the
standard deviation. A difference between two rows that is smaller than that may be chance.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from allranks import config as configs
from allranks.base.errors import UserError
from allranks.base.text import did_you_mean
from allranks.compose import GROUPS, as_override
from allranks.report.gather import RunFacts, as_number

SEED = "seed"
# The state of a run that has not started, as run/states.py calls it. A cell of a sweep that has no
# directory yet is in this state, too.
NOT_STARTED = "not started"
# The number of ranks is no key of the configuration, but runs are often compared by it.
RANKS = "world_size"


class Figure(NamedTuple):
    """One result of a run that is a number."""

    name: str  # the same as in summary.json or metrics.jsonl, if the figure stands there
    heading: str  # of its column in a table for people
    meaning: str
    higher_is_better: bool | None  # None: neither high nor low is better


FIGURES = (
    Figure("test/accuracy", "test/accuracy", "percent of the test set, of finished runs", True),
    Figure("test/loss", "test/loss", "mean over the test set, of finished runs", False),
    Figure("val/accuracy", "val/accuracy", "percent of the validation examples, of the best epoch", True),
    Figure("val/loss", "val/loss", "mean over the validation examples, of the best epoch", False),
    Figure("throughput/samples_per_s", "samples/s", "training examples per second, median of epochs", True),
    Figure("time/epochs_s", "time", "seconds of training and evaluation, all epochs together", False),
    Figure("time/total_s", "total", "seconds from the start of rank 0's process to the end", False),
    Figure("epochs", "epochs", "completed epochs", None),
)
BY_DEFAULT = "test/accuracy"


class Value(NamedTuple):
    """A figure of a row: of one run, or the mean over several."""

    mean: float | None  # None: no run of the row has this figure
    std: float | None = None  # sample standard deviation; None for fewer than two runs
    of_runs: int = 0  # how many runs the mean is of


@dataclass(frozen=True)
class Row:
    """One run, or several that differ in nothing but their seed."""

    runs: Sequence[RunFacts]
    settings: Mapping[str, Any]  # values of the keys in which the rows differ, as far as the runs have them
    values: Mapping[str, Value]  # by the name of the figure
    is_best: bool = False

    @property
    def states(self) -> dict[str, int]:
        """For each state, how many of the row's runs are in it."""
        found: dict[str, int] = {}
        for run in self.runs:
            state = state_of(run)
            found[state] = found.get(state, 0) + 1
        return found


@dataclass(frozen=True)
class Comparison:
    """Several runs side by side."""

    rows: Sequence[Row]  # sorted
    keys: Sequence[str]  # in which the rows differ; keys that change the result come first
    sorted_by: str  # the name of a figure, or one of `keys`
    best_by: str  # the figure by which the best row is marked; empty if no row can be called the best
    notes: Sequence[str] = ()  # sentences: what cannot be compared, and which files could not be read

    @property
    def runs(self) -> list[RunFacts]:
        """All runs, in the order of the rows."""
        return [run for row in self.rows for run in row.runs]

    @property
    def has_groups(self) -> bool:
        """Whether some row stands for several runs."""
        return any(len(row.runs) > 1 for row in self.rows)

    def numeric_keys(self) -> list[str]:
        """The keys in which the rows differ by a number, other than the seed."""
        return [
            key
            for key in self.keys
            if key != SEED and all(is_number(row.settings.get(key)) for row in self.rows)
        ]


def compare(runs: Sequence[RunFacts], sort_by: str | None = None, each: bool = False) -> Comparison:
    """Compares runs, in a table sorted by a figure or by a key of the configuration.

    Without `sort_by` the table is sorted by test/accuracy, or by val/accuracy if no run has been tested.
    With `each` every run is a row of its own, also where runs differ only in their seed. Raises UserError
    for a `sort_by` that is neither a figure nor a key in which the runs differ.
    """
    settings = [_settings(run) for run in runs]
    keys = _differing(runs, settings)
    if not each:
        keys = [key for key in keys if key != SEED]
    rows = _rows(runs, settings, keys, each)

    by = _sort_key(sort_by, keys, rows)
    rows = _sorted(rows, by)
    notes = [*_about_count(runs), *_about_data(runs), *_about_problems(runs)]
    best_by = _best_by(by, rows, is_same_test=not _differ(runs, _TESTED_ON))
    if best_by:
        rows = _with_best(rows, best_by)
    return Comparison(rows, keys, by, best_by, notes)


# --- in what runs differ ---------------------------------------------------------------------------------


def _settings(run: RunFacts) -> dict[str, Any]:
    """The settings of a run by key: its configuration, its chosen components, and its number of ranks."""
    overrides = overrides_by_key(run.overrides)
    if not run.config:  # the run has not started, or is damaged: only its command line is known
        return {key: _read(value) for key, value in overrides.items()}
    components = {key: value for key, value in overrides.items() if key in GROUPS}
    settings = {**components, **run.config}
    if run.world_size is not None:
        settings[RANKS] = run.world_size
    return settings


def _read(value: str) -> Any:
    """The value of an override: a number or a list as such, anything that is not JSON as its text."""
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value


def overrides_by_key(overrides: Iterable[str]) -> dict[str, str]:
    """Overrides such as `optimizer.lr=0.1` as values by key. The last one of a key wins, as in Hydra."""
    found: dict[str, str] = {}
    for override in overrides:
        key, equals, value = override.partition("=")
        if equals:
            found[key.lstrip("+")] = value
    return found


def _differing(runs: Sequence[RunFacts], settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The keys in which the runs differ, without keys whose values follow from the choice of components.

    Runs with `model=cnn` and `model=mlp`, for example, differ also in keys such as `model.width`. Only
    `model` is returned then, because it explains these other differences.
    """
    # A run whose configuration cannot be read would differ from all others in every key.
    readable = [index for index, run in enumerate(runs) if run.config]
    known = [settings[index] for index in readable]
    overrides = [overrides_by_key(runs[index].overrides) for index in readable]

    every_key = dict.fromkeys(key for each in known for key in each)
    differing = [key for key in every_key if len({_comparable(each, key) for each in known}) > 1]

    # The choice of a component, such as `model=cnn`, is used only if every run names its choice on the
    # command line. Otherwise the values of the component, such as `model.width`, show the difference.
    choices = [key for key in differing if key in GROUPS and all(key in each for each in known)]
    is_one_sweep = len({run.directory.parent for run in runs}) == 1 and all(overrides)
    named = {key for each in overrides for key in each}

    def follows(key: str) -> bool:
        """Whether the value of this key follows from the choices of components."""
        if key in GROUPS:
            return key not in choices
        belongs = key == "name" or key.partition(".")[0] in choices
        # One command line has made all configurations of a sweep. A key that differs although the command
        # line does not name it was set by a chosen component: a model may set the precision, for example.
        comes_along = is_one_sweep and key not in named and key != RANKS
        if not choices or not (belongs or comes_along):
            return False
        # The key follows from the choices if runs with equal choices always have equal values of it.
        by_choice: dict[tuple[str, ...], set[str]] = {}
        for each in known:
            chosen = tuple(_comparable(each, choice) for choice in choices)
            by_choice.setdefault(chosen, set()).add(_comparable(each, key))
        return all(len(values) == 1 for values in by_choice.values())

    left = [key for key in differing if not follows(key)]
    # Keys that change the result come first. Python's sort is stable: within both groups the order of
    # config.yaml stays.
    return sorted(left, key=decides, reverse=True)


def decides(key: str) -> bool:
    """Whether this key can change a run's result; other keys only say where and how the run computes."""
    return key in GROUPS or key == RANKS or configs.must_agree(key)


def _comparable(settings: Mapping[str, Any], key: str) -> str:
    """The value of a setting as text: equal texts stand for equal values. A missing value gives `missing`,
    which no value gives, because a text value stands in quotation marks.
    """
    return json.dumps(settings[key], sort_keys=True, default=str) if key in settings else "missing"


def shown(value: object) -> str:
    """The value of a setting as a user would type it on the command line after `key=`."""
    return as_override(value)


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """A short name for each key: its shortest ending that no other key has, as `lr` for `optimizer.lr`."""
    names: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
        others = [other for other in keys if other != key]
        alone = (end for end in endings if not any(f".{other}".endswith(f".{end}") for other in others))
        names[key] = next(alone, key)
    if RANKS in names:
        names[RANKS] = "ranks"
    return names


# --- rows ------------------------------------------------------------------------------------------------


def _rows(
    runs: Sequence[RunFacts], settings: Sequence[Mapping[str, Any]], keys: Sequence[str], each: bool
) -> list[Row]:
    """A row for each run, or for all runs that differ only in their seed."""
    groups: dict[object, list[int]] = {}
    for index, run in enumerate(runs):
        alike: object = tuple(_comparable(settings[index], key) for key in keys)
        if each or not run.config or SEED not in run.config:
            alike = index
        groups.setdefault(alike, []).append(index)
    rows = []
    for members in groups.values():
        first = settings[members[0]]
        own = {key: first[key] for key in keys if key in first}
        rows.append(_row([runs[index] for index in members], own))
    return rows


def _row(runs: Sequence[RunFacts], settings: Mapping[str, Any]) -> Row:
    """The row of these runs, with the mean of each figure over them."""
    # A run that has not finished has trained for a shorter time, so its figures would distort the mean of
    # finished runs. Such runs count only if no run of the row has finished.
    finished = [run for run in runs if run.is_finished]
    counted = [figures_of(run) for run in finished or runs]
    values = {figure.name: value_of(each[figure.name] for each in counted) for figure in FIGURES}
    return Row(runs, settings, values)


def figures_of(run: RunFacts) -> dict[str, float | None]:
    """The value of each of FIGURES for one run, by its name; None if it is not known."""
    epoch_s = [(e.get("time/train_s") or 0.0) + (e.get("time/eval_s") or 0.0) for e in run.epochs]
    return {
        "test/accuracy": _number(run.summary.get("test/accuracy")),
        "test/loss": _number(run.summary.get("test/loss")),
        "val/accuracy": _best_of(run.column("val/accuracy"), max),
        "val/loss": _best_of(run.column("val/loss"), min),
        "throughput/samples_per_s": _best_of(run.column("throughput/samples_per_s"), statistics.median),
        "time/epochs_s": sum(epoch_s) if epoch_s else None,
        "time/total_s": _number(run.summary.get("time/total_s")),
        "epochs": float(len(run.epochs)),
    }


def value_of(numbers: Iterable[float | None]) -> Value:
    """Mean and sample standard deviation of the numbers that are known."""
    known = [number for number in numbers if number is not None]
    if not known:
        return Value(None)
    std = statistics.stdev(known) if len(known) > 1 else None
    return Value(statistics.fmean(known), std, len(known))


def _best_of(column: Sequence[float | None], choose: Callable[[Sequence[float]], float]) -> float | None:
    """What `choose`, such as max, takes from the known values of a column; None if no value is known."""
    known = [number for number in column if number is not None]
    return choose(known) if known else None


def is_number(value: object) -> bool:
    """Whether the value is a finite number; True and False are not numbers here."""
    return as_number(value) is not None


def _number(value: Any) -> float | None:
    """A value from a file as a float; None if it is not a finite number."""
    return float(value) if is_number(value) else None


# --- the order, and the best -----------------------------------------------------------------------------


def figure_named(name: str) -> Figure | None:
    """The figure with this name or this heading; None if there is no such figure."""
    return next((figure for figure in FIGURES if name in (figure.name, figure.heading)), None)


def _sort_key(given: str | None, keys: Sequence[str], rows: Sequence[Row]) -> str:
    """The name of a figure, or one of `keys`, by which the rows are sorted."""
    if given is None:
        has_tests = any(row.values[BY_DEFAULT].mean is not None for row in rows)
        return BY_DEFAULT if has_tests else "val/accuracy"
    figure = figure_named(given)
    if figure is not None:
        return figure.name
    shorts = {short: key for key, short in short_names(keys).items()}
    if given in keys:
        return given
    if given in shorts:
        return shorts[given]
    known = [*(figure.heading for figure in FIGURES), *keys]
    guess = did_you_mean(given, known) or f" Give one of {', '.join(known)}."
    raise UserError(f"--sort {given} is neither a figure nor a key in which these runs differ.{guess}")


def _sorted(rows: Sequence[Row], by: str) -> list[Row]:
    """The rows sorted: by a figure with the best first, or by a key with the smallest value first.

    Rows without a value come last.
    """
    figure = figure_named(by)
    if figure is None:
        return sorted(rows, key=lambda row: by_setting(row.settings, by))

    def place(row: Row) -> tuple[bool, float]:
        mean = row.values[figure.name].mean
        if mean is None:
            return True, 0.0
        return False, -mean if figure.higher_is_better else mean

    return sorted(rows, key=place)


def by_setting(settings: Mapping[str, Any], key: str) -> tuple[int, float, str]:
    """A key for sorted(), which sorts rows by a setting.

    Numbers come first, by size; then texts, in alphabetical order; then rows without this setting.
    """
    if key not in settings:
        return 2, 0.0, ""
    value = settings[key]
    if is_number(value):
        return 0, float(value), ""
    return 1, 0.0, shown(value)


def _best_by(sorted_by: str, rows: Sequence[Row], is_same_test: bool) -> str:
    """The figure that decides which row is the best; empty if no row can be called the best.

    It is the figure by which the rows are sorted. If they are sorted by a key, it is the figure by which
    they would be sorted without --sort. No row is the best by the number of epochs, by figures of different
    examples, or if fewer than two rows have the figure.
    """
    figure = figure_named(sorted_by)
    name = sorted_by if figure else _sort_key(None, (), rows)
    if name == "epochs" or (name.startswith(("test/", "val/")) and not is_same_test):
        return ""
    known = [row for row in rows if row.values[name].mean is not None]
    return name if len(known) > 1 else ""


def _with_best(rows: Sequence[Row], by: str) -> list[Row]:
    """The rows, with `is_best` set where the mean of the figure `by` is the best of all."""
    figure = figure_named(by)
    assert figure is not None
    means = [row.values[by].mean for row in rows]
    known = [mean for mean in means if mean is not None]
    best = max(known) if figure.higher_is_better else min(known)
    return [Row(row.runs, row.settings, row.values, row.values[by].mean == best) for row in rows]


# --- what has to be said ---------------------------------------------------------------------------------

# How the keys begin that decide which examples a run is tested on, and which it is validated on.
_TESTED_ON = ("data.test.", "data.classes", "data.input_shape")
_VALIDATED_ON = ("data.train.", "data.split")


def _differ(runs: Sequence[RunFacts], beginnings: tuple[str, ...]) -> list[str]:
    """The keys with one of these beginnings in which the runs differ, and which can change a result."""
    known = [run.config for run in runs if run.config]
    keys = dict.fromkeys(key for each in known for key in each if key.startswith(beginnings))
    return [
        key
        for key in keys
        if configs.must_agree(key) and len({_comparable(each, key) for each in known}) > 1
    ]


def _about_count(runs: Sequence[RunFacts]) -> list[str]:
    if len(runs) == 1:
        return ["There is one run only: nothing to compare it with."]
    return []


def _about_data(runs: Sequence[RunFacts]) -> list[str]:
    """A sentence if the runs were tested or validated on different examples, else nothing."""
    tested = _differ(runs, _TESTED_ON)
    if tested:
        return [
            f"These runs have different data ({', '.join(tested[:4])}): their accuracies and losses cannot "
            "be compared, and none is called the best."
        ]
    validated = _differ(runs, _VALIDATED_ON)
    if validated:
        return [
            f"These runs have different validation examples ({', '.join(validated[:4])}): compare their "
            "test/accuracy and test/loss."
        ]
    return []


def _about_problems(runs: Sequence[RunFacts]) -> list[str]:
    return [f"{run.directory}: {problem}" for run in runs for problem in run.problems]


def state_of(run: RunFacts) -> str:
    """The state of a run in a comparison: `damaged` if it has started and has no readable config.yaml."""
    if run.config or run.state == NOT_STARTED:
        return run.state
    return "damaged"


def directory_names(runs: Sequence[RunFacts]) -> dict[Path, str]:
    """A short name for each run's directory: as many of its last folders as make all names different."""
    paths = [run.directory for run in runs]
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = {path: "/".join(path.parts[-depth:]) for path in paths}
        if len(set(names.values())) == len(set(paths)):
            return names
    return {path: str(path) for path in paths}
