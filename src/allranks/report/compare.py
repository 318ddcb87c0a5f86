"""Compares runs: in which settings they differ, their results, and which one is the best. No torch.

This module has the rules only; it reads and writes no file. compare() takes what report/gather.py has read
of each run, and returns a Comparison. Tables, pictures and the page are made from that.

Runs that differ only in their seed share one row of the table, which has the mean of their results and the
standard deviation. A difference between two rows that is smaller than that may be chance.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from allranks import config as configs
from allranks.base.errors import UserError
from allranks.base.text import as_text, did_you_mean
from allranks.compose import GROUPS, as_override
from allranks.report.gather import RunFacts
from allranks.run import metric_names
from allranks.run.best import BY_DEFAULT
from allranks.run.metric_names import as_number

SEED = "seed"
# The state of a run that has not started, as run/states.py calls it. A cell of a sweep that has no
# directory yet is in this state, too.
NOT_STARTED = "not started"
# The number of ranks is not a key of the configuration, but runs are often compared by it.
RANKS = "world_size"


class Figure(NamedTuple):
    """One result of a run that is a number."""

    name: str  # the same as in summary.json or metrics.jsonl, if the figure stands there
    heading: str  # of its column in a table for people
    higher_is_better: bool | None  # None: neither is known to be better


# The figures that every run has. Before them stand the metrics of the runs; figures_for() lists them all.
SPEED = "throughput/samples_per_s"
OF_COMPUTING = (
    Figure(SPEED, "samples/s", True),  # training examples per second, median of epochs
    Figure("time/epochs_s", "time", False),  # seconds of training and evaluation, all epochs together
    Figure("time/total_s", "total", False),  # seconds from the start of rank 0's process to the end
    Figure("epochs", "epochs", None),  # completed
)
# Headings that the tables for people have beside those of settings and of metrics.
_HEADINGS = {"n", "state", "run", *(figure.heading for figure in OF_COMPUTING)}
# What runs are assumed to be about that have no metrics yet.
_USUAL_QUANTITIES = ("accuracy", "loss")


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
    values: Mapping[str, Value]  # the values by the names of the figures
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
    figures: Sequence[Figure]  # the figures of these runs, in the order of their columns
    keys: Sequence[str]  # in which the rows differ; keys that change the result come first
    sorted_by: str  # the name of a figure, or one of `keys`
    best_by: str  # the figure by which the best row is marked; empty if no row can be called the best
    notes: Sequence[str] = ()  # sentences: what cannot be compared, and which files could not be read

    @property
    def runs(self) -> list[RunFacts]:
        """All runs, in the order of the rows."""
        return [run for row in self.rows for run in row.runs]

    def figure_named(self, name: str) -> Figure | None:
        """The figure with this name or this heading; None if there is no such figure."""
        return _figure_named(name, self.figures)

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

    Without `sort_by` the table is sorted by the first figure over the test set, such as test/accuracy, or
    by the first one over the validation examples if no run has been tested. With `each` every run is a row
    of its own, also where runs differ only in their seed. Raises UserError for a `sort_by` that is neither
    a figure nor a key in which the runs differ.
    """
    settings = [_settings(run) for run in runs]
    keys = _differing(runs, settings)
    if not each:
        keys = [key for key in keys if key != SEED]
    figures = figures_for(runs)
    rows = _rows(runs, figures, settings, keys, each)

    by = _sort_key(sort_by, figures, keys, rows)
    rows = _sorted(rows, by, figures)
    notes = [*_about_count(runs), *_about_data(runs), *_about_problems(runs)]
    best_by = _best_by(by, figures, rows, _parts_of_different_examples(runs))
    if best_by:
        rows = _with_best(rows, best_by, figures)
    return Comparison(rows, figures, keys, by, best_by, notes)


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
    """The value of a setting as a user would type it on the command line after `key=`.

    A path may have bytes that are not UTF-8. Each of them is shown as a question mark, because the value
    goes into texts and pictures.
    """
    return as_text(as_override(value))


def short_names(keys: Sequence[str]) -> dict[str, str]:
    """A short name for each key: its shortest ending that no other key has, as `lr` for `optimizer.lr`.

    An ending that another column has as its heading is not a name: `epochs` are those that were completed,
    and `trainer.epochs` those that were wanted.
    """
    names: dict[str, str] = {}
    for key in keys:
        parts = key.split(".")
        endings = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
        others = [f".{other}" for other in keys if other != key]
        alone = (
            end
            for end in endings
            if end not in _HEADINGS and not any(other.endswith(f".{end}") for other in others)
        )
        names[key] = next(alone, key)
    if RANKS in names:
        names[RANKS] = "ranks"
    return names


# --- rows ------------------------------------------------------------------------------------------------


def _rows(
    runs: Sequence[RunFacts],
    figures: Sequence[Figure],
    settings: Sequence[Mapping[str, Any]],
    keys: Sequence[str],
    each: bool,
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
        rows.append(_row([runs[index] for index in members], figures, own))
    return rows


def _row(runs: Sequence[RunFacts], figures: Sequence[Figure], settings: Mapping[str, Any]) -> Row:
    """The row of these runs, with the mean of each figure over them."""
    # A run that has not finished has trained for a shorter time, so its figures would distort the mean of
    # finished runs. Such runs count only if no run of the row has finished.
    finished = [run for run in runs if run.is_finished]
    counted = [_figures_of(run) for run in finished or runs]
    values = {figure.name: value_of(each.get(figure.name) for each in counted) for figure in figures}
    return Row(runs, settings, values)


def figures_for(runs: Sequence[RunFacts]) -> list[Figure]:
    """The figures that these runs have: those over the test set, those of the best epoch, speed and time.

    The quantity comes first that says most: the accuracy, or what `checkpoint.best` names. Every quantity
    that was measured on validation examples has a figure over the test set too, which runs get at their
    end.
    """
    known: dict[str, None] = {}
    for run in runs:
        known.update(dict.fromkeys([*run.metrics, *run.tests, *run.results]))
    for figure in OF_COMPUTING:  # `epochs`, say, is the number of epochs, whatever a program calls so
        known.pop(figure.name, None)
    measured = metric_names.of_parts(list(known), "val", "test")
    quantities = list(metric_names.by_quantity(measured)) if known else list(_USUAL_QUANTITIES)
    main = _main_quantity(runs, quantities)
    quantities.sort(key=lambda quantity: quantity != main)  # stable: the others keep their order
    names = [f"{part}/{quantity}" for part in ("test", "val") for quantity in quantities]
    # A quantity that no run has measured on test or validation examples is shown under the name that it has
    # in training.
    names += [name for name in known if metric_names.quantity_of(name) not in quantities]
    rules = {run.rule.metric: not run.rule.lower_is_better for run in runs if run.config}
    return [*(Figure(name, name, _is_higher_better(name, rules)) for name in names), *OF_COMPUTING]


def _main_quantity(runs: Sequence[RunFacts], quantities: Sequence[str]) -> str:
    """The quantity that decides without --sort: the one that all runs have in `checkpoint.best`.

    While that has its default, or if the runs differ in it, it is the accuracy, or else the first one.
    """
    given = {run.rule for run in runs}
    if len(given) == 1:
        [rule] = given
        if rule != BY_DEFAULT and metric_names.quantity_of(rule.metric) in quantities:
            return metric_names.quantity_of(rule.metric)
    return metric_names.main_quantity(quantities)


def _is_higher_better(name: str, rules: Mapping[str, bool]) -> bool | None:
    """Whether a high value of this metric is better, by what the runs call the best, or else by its name.

    `rules` has the metrics that are named in `checkpoint.best`, and whether their highest value is meant.
    """
    quantity = metric_names.quantity_of(name)
    for metric, is_higher_better in rules.items():
        if metric_names.quantity_of(metric) == quantity:
            return is_higher_better
    return metric_names.higher_is_better(name)


def _figures_of(run: RunFacts) -> dict[str, float | None]:
    """The figures of one run by name.

    Its metrics are those of the best epoch, or of the newest one if none can be called the best.
    """
    figures: dict[str, float | None] = {}
    line = run.best or (run.epochs[-1] if run.epochs else {})
    for name in run.metrics:
        figures[name] = _number(line.get(name))
    for name, value in (*run.tests.items(), *run.results.items()):
        figures[name] = float(value)
    epoch_s = [(e.get("time/train_s") or 0.0) + (e.get("time/eval_s") or 0.0) for e in run.epochs]
    speeds = [speed for speed in run.column(SPEED) if speed is not None]
    figures[SPEED] = statistics.median(speeds) if speeds else None
    figures["time/epochs_s"] = sum(epoch_s) if any(epoch_s) else None
    figures["time/total_s"] = _number(run.summary.get("time/total_s"))
    figures["epochs"] = None if run.epochs_done is None else float(run.epochs_done)
    return figures


def value_of(numbers: Iterable[float | None]) -> Value:
    """Mean and sample standard deviation of the numbers that are known."""
    known = [number for number in numbers if number is not None]
    if not known:
        return Value(None)
    std = statistics.stdev(known) if len(known) > 1 else None
    return Value(statistics.fmean(known), std, len(known))


def is_number(value: object) -> bool:
    """Whether the value is a finite number; True and False are not numbers here."""
    return as_number(value) is not None


def _number(value: Any) -> float | None:
    """A value from a file as a float; None if it is not a finite number."""
    return float(value) if is_number(value) else None


# --- the order, and the best -----------------------------------------------------------------------------


def _figure_named(name: str, figures: Sequence[Figure]) -> Figure | None:
    """The figure with this name or this heading; None if there is no such figure."""
    return next((figure for figure in figures if name in (figure.name, figure.heading)), None)


def _sort_key(
    given: str | None, figures: Sequence[Figure], keys: Sequence[str], rows: Sequence[Row]
) -> str:
    """The name of a figure, or one of `keys`, by which the rows are sorted."""
    if given is None:
        return _first_known(figures, rows)
    figure = _figure_named(given, figures)
    if figure is not None:
        return figure.name
    shorts = {short: key for key, short in short_names(keys).items()}
    if given in keys:
        return given
    if given in shorts:
        return shorts[given]
    known = [*(figure.heading for figure in figures), *keys]
    guess = did_you_mean(given, known) or f" Give one of {', '.join(known)}."
    raise UserError(f"--sort {given} is neither a figure nor a key in which these runs differ.{guess}")


def _first_known(figures: Sequence[Figure], rows: Sequence[Row]) -> str:
    """The first figure over the test set if some row has it, else the first metric that some row has."""
    metrics = [figure for figure in figures if figure not in OF_COMPUTING]
    first_of_parts = [
        next((figure.name for figure in metrics if metric_names.part_of(figure.name) == part), None)
        for part in ("test", "val")
    ]
    for name in (*first_of_parts, *(figure.name for figure in metrics)):
        if name is not None and any(row.values[name].mean is not None for row in rows):
            return name
    # No row has any: by the figure that they would have first.
    return first_of_parts[1] or SPEED


def _sorted(rows: Sequence[Row], by: str, figures: Sequence[Figure]) -> list[Row]:
    """The rows sorted: by a figure with the best first, or by a key with the smallest value first.

    Rows without a value come last.
    """
    figure = _figure_named(by, figures)
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


def _best_by(
    sorted_by: str, figures: Sequence[Figure], rows: Sequence[Row], not_comparable: Collection[str]
) -> str:
    """The figure that decides which row is the best; empty if no row can be called the best.

    It is the figure by which the rows are sorted. If they are sorted by a key, it is the figure by which
    they would be sorted without --sort. No row is the best by a figure of which it is not known whether
    high or low is better, by a metric of a part of the data that is in `not_comparable`, or if fewer than
    two rows have the figure.
    """
    figure = _figure_named(sorted_by, figures) or _figure_named(_first_known(figures, rows), figures)
    assert figure is not None
    if figure.higher_is_better is None:
        return ""
    if figure not in OF_COMPUTING and metric_names.part_of(figure.name) in not_comparable:
        return ""
    known = [row for row in rows if row.values[figure.name].mean is not None]
    return figure.name if len(known) > 1 else ""


def _with_best(rows: Sequence[Row], by: str, figures: Sequence[Figure]) -> list[Row]:
    """The rows, with `is_best` set where the mean of the figure `by` is the best of all."""
    figure = _figure_named(by, figures)
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


def _parts_of_different_examples(runs: Sequence[RunFacts]) -> set[str]:
    """The parts of the data whose metrics cannot be compared, as metric_names.part_of() names them.

    Runs with different test sets, classes or shapes have different tasks: none of their metrics can be
    compared. If they divide equal data in different ways, those of the test set can.
    """
    if _differ(runs, _TESTED_ON):
        return {"train", "val", "test", ""}
    return {"train", "val"} if _differ(runs, _VALIDATED_ON) else set()


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
            "be compared, and none is called the best by them."
        ]
    validated = _differ(runs, _VALIDATED_ON)
    if validated:
        return [
            f"These runs have different validation examples ({', '.join(validated[:4])}): compare their "
            "figures over the test set."
        ]
    return []


def _about_problems(runs: Sequence[RunFacts]) -> list[str]:
    return [f"{run.directory}: {problem}" for run in runs for problem in run.problems]


def state_of(run: RunFacts) -> str:
    """The state of a run in a comparison: `damaged` if it has started and has no readable config.yaml."""
    if run.config or run.state == NOT_STARTED:
        return run.state
    return "damaged"


def directory_names(paths: Sequence[Path]) -> dict[Path, str]:
    """A short name for each directory: as many of its last folders as make all names different."""
    for depth in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = {path: "/".join(path.parts[-depth:]) for path in paths}
        if len(set(names.values())) == len(set(paths)):
            return names
    return {path: str(path) for path in paths}
