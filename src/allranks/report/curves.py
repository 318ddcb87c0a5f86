"""The curves of one run over its epochs: its metrics, its learning rate, its speed, and its time by phase.

A training may keep any metrics. All figures of one quantity stand in one picture: `train/loss` beside
`val/loss`. Which pictures there are is decided by curves_of(); the page of the run takes the tables below
its pictures from the same list.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from allranks.report.drawing import LIGHT, POINTS_PER_INCH, Picture, as_picture, new_figure, style
from allranks.report.gather import RunFacts
from allranks.run import metric_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MOST_POINTS = 400  # of a curve with more epochs only so many points are drawn, so that a page stays small
MARKED_POINTS = 30  # a curve of at most so many epochs has a dot at each of them
LOG_RATIO = 50  # a learning rate that changes by a larger factor is shown on a logarithmic axis
LABEL_PT = 11  # least vertical distance between the names of two curves
# A loop of the user's own may log hundreds of quantities. So many have a picture; metrics.jsonl has all.
MOST_QUANTITIES = 16

LEARNING_RATE = "learning-rate"
THROUGHPUT = "throughput"
REST = "Saving, test and the rest"
_OF_PHASES = {"Start": "grey", "Training": "blue", "Evaluation": "orange", REST: "green"}  # their colours


class Series(NamedTuple):
    """One curve."""

    name: str
    values: Sequence[float | None]  # None leaves a gap, unless the curve is sparse
    colour: str  # a name in LIGHT
    dashed: bool = False
    # Whether the figure is measured now and then only, such as after every fifth epoch. Then the curve goes
    # straight from one measurement to the next.
    sparse: bool = False


class Column(NamedTuple):
    """One figure of a picture, and how the table below the picture shows it."""

    key: str  # in metrics.jsonl
    heading: str
    look: Series  # its curve


class Curves(NamedTuple):
    """A picture with curves over the epochs, which is drawn from these columns."""

    name: str  # of the picture, and of its files
    title: str
    unit: str
    columns: Sequence[Column]


# How the curve of each part of the data looks: (name, colour, dashed).
_LOOKS = {
    "train": ("training", "blue", True),
    "val": ("validation", "orange", False),
    "test": ("test", "green", False),
    "": ("value", "blue", False),
}


def curves_of(facts: RunFacts) -> list[Curves]:
    """The pictures of a run's metrics, and of its learning rate if it has one."""
    found: list[Curves] = []
    quantities = list(metric_names.by_quantity(facts.metrics).items())
    for number, (quantity, keys) in enumerate(quantities[:MOST_QUANTITIES]):
        unit = metric_names.unit_of(keys[0], facts.metrics)
        percent = ", %" if unit == "%" else ""
        columns = []
        for key in keys:
            name, colour, dashed = _LOOKS[metric_names.part_of(key)]
            is_sparse = any(key not in line for line in facts.epochs)
            look = Series(name, facts.column(key), colour, dashed, is_sparse)
            columns.append(Column(key, f"{name}{percent}", look))
        found.append(Curves(_name_of(quantity, number), metric_names.title_of(quantity), unit, columns))
    rates = facts.column("lr")
    if any(rate is not None for rate in rates):
        column = Column("lr", "rate", Series("rate", rates, "green"))
        found.append(Curves(LEARNING_RATE, "Learning rate", "", [column]))
    return found


def _name_of(quantity: str, number: int) -> str:
    """The name of a quantity's picture and of its files: letters, digits and dashes, and no other's."""
    if quantity in ("loss", "accuracy"):
        return quantity
    letters = re.sub(r"[^a-z0-9]+", "-", quantity.lower()).strip("-")[:40]
    return f"metric-{number}-{letters}".rstrip("-")


def draw(facts: RunFacts, wanted: Curves) -> Picture | None:
    """Draws the curves; None if none of them has a value."""
    series = [column.look for column in wanted.columns]
    return curves(wanted.name, wanted.title, wanted.unit, facts.places, series, facts.axis)


def throughput(facts: RunFacts) -> Picture | None:
    """Training examples per second for each epoch: those of all ranks, divided by the number of ranks.

    It is a mean. The ranks wait for each other in every step, so one rank's own speed is not recorded. If
    the run went on with another number of ranks, or if that may be, the picture shows all ranks together.
    """
    together = facts.column("throughput/samples_per_s")
    numbers = set(facts.ranks_of_lines)
    if len(numbers) > 1 or None in numbers:
        series = [Series("all ranks", together, "blue")]
        return curves(THROUGHPUT, "Throughput, all ranks", "examples/s", facts.places, series, facts.axis)
    ranks = facts.world_size or 1
    mean = [None if value is None else value / ranks for value in together]
    title = "Throughput, mean of the ranks" if ranks > 1 else "Throughput"
    series = [Series("mean of the ranks", mean, "blue")]
    return curves(THROUGHPUT, title, "examples/s", facts.places, series, facts.axis)


def phases(facts: RunFacts) -> Picture | None:
    """How many seconds start, training, evaluation and the rest took; None if no epoch has a time."""
    spent = phases_s(facts)
    if not spent:
        return None
    with style():
        figure, axes = new_figure("Time by phase", height_in=2.2)
        axes.set_axis_off()
        longest = max(spent.values())
        for row, (name, seconds) in enumerate(spent.items()):
            axes.barh(-row, seconds, height=0.42, color=LIGHT[_OF_PHASES[name]])
            axes.text(0, -row + 0.32, name, va="bottom", ha="left")
            axes.text(
                seconds + 0.015 * longest, -row, f"{seconds:,.1f} s", va="center", color=LIGHT["muted"]
            )
        axes.set_xlim(0, 1.22 * longest or 1)
        axes.set_ylim(-len(spent) + 0.6, 0.8)
        figure.subplots_adjust(left=0.02, right=0.98, bottom=0.02)
        words = ", ".join(f"{name.lower()} {seconds:,.1f} s" for name, seconds in spent.items())
        return as_picture(figure, "phases", "Time by phase", f"Bars: {words}.")


def phases_s(facts: RunFacts) -> dict[str, float]:
    """The seconds that each phase of a run took, by the phase's name; empty if no epoch has a time.

    Start and rest are included only if the run has finished without an interruption.
    """
    train = [value for value in facts.column("time/train_s") if value is not None]
    evaluation = [value for value in facts.column("time/eval_s") if value is not None]
    if not train:
        return {}
    spent = {"Training": sum(train)}
    if evaluation:
        spent["Evaluation"] = sum(evaluation)
    startup = _seconds(facts, "time/startup_s")
    total = _seconds(facts, "time/total_s")
    if startup is None or total is None or facts.events:
        return spent
    rest = total - startup - sum(spent.values())
    return {"Start": startup, **spent, REST: max(0.0, rest)}


def _seconds(facts: RunFacts, key: str) -> float | None:
    """A duration in summary.json; None if it is not there, or is no such number."""
    value = facts.summary.get(key)
    return value if isinstance(value, float | int) and value >= 0 else None


def curves(
    name: str, title: str, unit: str, places: Sequence[int], series: Sequence[Series], axis: str
) -> Picture | None:
    """A picture of the series over the epochs, with each name at the end of its curve.

    `places` are the numbers of the epochs, or of what else the `axis` counts. Returns None if no series has
    a value.
    """
    series = [one for one in series if any(value is not None for value in one.values)]
    if not series:
        return None
    with style():
        from matplotlib.ticker import MaxNLocator

        figure, axes = new_figure(title)
        for one in series:
            points = _points(one, places)
            axes.plot(
                [x for x, _ in points],
                [y for _, y in points],
                color=LIGHT[one.colour],
                linestyle=(0, (4, 2)) if one.dashed and len(series) > 1 else "solid",
                marker="o" if len(points) <= MARKED_POINTS else None,
            )
        known = [value for one in series for value in one.values if value is not None]
        if name == LEARNING_RATE and min(known) > 0 and max(known) > LOG_RATIO * min(known):
            axes.set_yscale("log")
        if name == THROUGHPUT or min(known) == max(known):
            # From 0 to beyond the curve, which may lie below 0: an energy, for example.
            axes.set_ylim(min(0, 1.3 * min(known)), max(0, 1.3 * max(known)) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.set_xlabel(axis)
        axes.set_title(unit, loc="left", fontsize=9, color=LIGHT["muted"], x=-0.08)
        if len(series) > 1:
            _name_at_their_ends(axes, places[-1], series)
        else:
            figure.subplots_adjust(right=0.96)
        return as_picture(figure, name, title, _in_words(title, unit, places, series, axis))


def _points(one: Series, places: Sequence[int]) -> list[tuple[int, float]]:
    """The points of a curve that are drawn, as (x, y); NaN leaves a gap."""
    points = list(zip(places, map(_or_nan, one.values), strict=True))
    if one.sparse:
        points = [(x, y) for x, y in points if not math.isnan(y)]
    return [points[position] for position in thinned(len(points))]


def thinned(count: int) -> list[int]:
    """The indices of the points of a curve that are drawn. `count` is how many points there are.

    They are all points, or MOST_POINTS of them at equal distances, which include the first and the last.
    """
    if count <= MOST_POINTS:
        return list(range(count))
    return sorted({round(k * (count - 1) / (MOST_POINTS - 1)) for k in range(MOST_POINTS)})


def _name_at_their_ends(axes: Axes, x: float, series: Sequence[Series]) -> None:
    """Writes the name of each curve behind its last point, and keeps the names apart."""
    # matplotlib computes the limits of the axes only when they are asked for. The heights below depend on
    # them.
    axes.get_ylim()
    last = []
    for one in series:
        known = [value for value in one.values if value is not None]
        _, height = axes.transData.transform((x, known[-1]))
        last.append((height, known[-1], one))
    last.sort(key=lambda each: each[0])

    # From the lowest curve to the highest: a name that is too near to the one below it moves up.
    points_per_pixel = POINTS_PER_INCH / axes.figure.dpi
    lowest = -math.inf
    for height, value, one in last:
        natural = height * points_per_pixel
        shown = max(natural, lowest + LABEL_PT)
        lowest = shown
        axes.annotate(
            one.name,
            (x, value),
            xytext=(7, shown - natural),
            textcoords="offset points",
            va="center",
            color=LIGHT[one.colour],
            annotation_clip=False,
        )


def _in_words(title: str, unit: str, places: Sequence[int], series: Sequence[Series], axis: str) -> str:
    """The first and the last value of each curve in words, for readers who cannot see the picture."""
    said = []
    for one in series:
        known = [(place, v) for place, v in zip(places, one.values, strict=True) if v is not None]
        first, begin = known[0]
        last, end = known[-1]
        said.append(
            f"{one.name}: {begin:.4g} {unit} after {axis} {first}, {end:.4g} {unit} after {axis} {last}"
        )
    return f"{title} over the {axis}s. {'; '.join(said)}.".replace("  ", " ").replace(" ,", ",")


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value
