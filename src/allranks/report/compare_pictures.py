"""Draws the pictures of a comparison: the curves of all runs, and the results against the settings.

They look like the pictures in the report of a single run (report/pictures.py).
"""

from __future__ import annotations

import itertools
import math
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from allranks.base.text import as_text, printable
from allranks.report.compare import (
    OF_COMPUTING,
    SEED,
    SPEED,
    Comparison,
    Figure,
    Row,
    by_setting,
    short_names,
    shown,
)
from allranks.report.compare_tables import figure_text
from allranks.report.curves import thinned
from allranks.report.drawing import HEIGHT_IN, LIGHT, WIDTH_IN, Picture, as_picture, new_figure, style
from allranks.report.gather import EPOCH, STEP, RunFacts
from allranks.run import metric_names

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase
    from matplotlib.lines import Line2D

# If there are more rows, the first ones have a colour and a name each, and the others are thin and grey.
MOST_NAMED = 10
MOST_ROWS = 24  # in the picture that lists the rows: further rows are left out of it
MOST_TICKS = 8  # numbers along the horizontal axis: more would overlap
# Five colours, solid and dashed, make ten curves that can be told apart, even in grey and with colour
# blindness.
COLOURS = ("blue", "orange", "green", "ink", "muted")
DASHES = ("solid", (0, (4, 2)))
PALEST = 0.4  # opacity of the curve with the smallest value of a key, where the largest has 1
LEGEND_LINE_IN = 0.165
LEFT_IN = 0.85  # left margin: room for numbers such as 100,000 and the name of the axis
LETTER_IN = 0.085  # mean width of a letter
# A row whose settings need more letters is named by its runs' directories: a legend's line holds no more.
MOST_LETTERS = 50
LOG_FROM_RATIO = 10  # two values that differ by this factor are shown on a logarithmic axis


class Curve(NamedTuple):
    """A figure over the epochs, of which a picture is drawn."""

    name: str  # of the picture
    title: str
    figure: str  # in metrics.jsonl
    unit: str


MOST_CURVES = 8  # pictures of metrics; further ones can be seen in the pages of the runs


class Look(NamedTuple):
    """How the curve of a row is drawn."""

    label: str
    colour: str  # a name in LIGHT
    dashes: object
    opacity: float
    width: float


class Point(NamedTuple):
    """The result of one row, at a value of the key along the horizontal axis."""

    x: float  # the value of the key
    mean: float  # the mean of the figure over the row's runs
    std: float | None  # sample standard deviation; None for fewer than two runs


def of_comparison(comparison: Comparison) -> list[Picture]:
    """The pictures of a comparison. A picture that would show nothing is left out."""
    drawn = [result(comparison, "result"), result(comparison, "speed")]
    drawn += [curves(comparison, curve) for curve in curves_of(comparison)]
    return [picture for picture in drawn if picture is not None]


def curves_of(comparison: Comparison) -> list[Curve]:
    """The metrics whose curves are drawn: those of the validation examples, the loss first.

    Of a quantity that is measured on no validation examples, the metric of the training.
    """
    metrics = [figure.name for figure in comparison.figures if figure not in OF_COMPUTING]
    found: list[Curve] = []
    for quantity, names in metric_names.by_quantity(metrics).items():
        [first, *_] = metric_names.validated(names)
        part = metric_names.part_of(first)
        if part == "test":  # it is measured once, at the end: no curve
            continue
        what = metric_names.spoken(first)
        title = what[:1].upper() + what[1:] if part else metric_names.title_of(quantity)
        name = re.sub(r"[^a-z0-9]+", "-", first.lower()).strip("-")[:40]
        if name in ("result", "speed", "") or name in (each.name for each in found):
            name = f"metric-{len(found)}-{name}"
        found.append(Curve(name, title, first, metric_names.unit_of(first, metrics)))
    return found[:MOST_CURVES]


def axis_of(comparison: Comparison) -> str:
    """What the curves have along the horizontal axis: EPOCH, or STEP if some runs count no epochs."""
    return EPOCH if all(run.axis == EPOCH for run in comparison.runs) else STEP


def figure_of(comparison: Comparison, name: str) -> Figure:
    """The figure that the picture `result` or `speed` shows."""
    figure = comparison.figure_named(SPEED if name == "speed" else comparison.best_by)
    # If no row can be called the best, the rows are still shown side by side.
    figure = figure or comparison.figure_named(comparison.sorted_by) or comparison.figures[0]
    return figure


def label_of(row: Row, comparison: Comparison) -> str:
    """A name for the row made of the settings in which the rows differ, such as `lr 0.1, batch_size 64`.

    Without such settings it consists of the names of the runs' directories.
    """
    names = short_names(comparison.keys)
    words = [f"{names[key]} {shown(row.settings[key])}" for key in comparison.keys if key in row.settings]
    return ", ".join(words) or ", ".join(_shown_name(run.directory) for run in row.runs[:3])


def _shown_name(directory: Path) -> str:
    """The name of a directory, in which matplotlib can draw each character: others are escaped."""
    return printable(as_text(directory.name))


# --- curves ----------------------------------------------------------------------------------------------


def curves(comparison: Comparison, curve: Curve) -> Picture | None:
    """A picture of a figure over the epochs, with a curve for each row.

    If a row has several runs, the curve is their mean, within a band of one standard deviation. Returns
    None if no run has this figure.
    """
    axis = axis_of(comparison)
    rows = [row for row in comparison.rows if _values_of(row, curve.figure, axis)]
    if not rows:
        return None
    if len(rows) <= MOST_NAMED:  # all curves are named in the legend: it is sorted by the settings
        rows.sort(key=lambda row: [by_setting(row.settings, key) for key in comparison.keys])
    looks = _looks(comparison, rows)
    named = [look for look in looks if look.label]
    heading = "" if _is_long(comparison) else _heading(comparison)
    per_line = max(1, int(WIDTH_IN / (0.6 + LETTER_IN * max(len(look.label) for look in named))))
    legend_in = LEGEND_LINE_IN * (-(-len(named) // per_line) + bool(heading))
    with style():
        from matplotlib.ticker import MaxNLocator

        picture, axes = new_figure(curve.title, height_in=HEIGHT_IN + legend_in)
        # Curves with a name are drawn last, so that they lie above the grey ones.
        lines = [
            _draw_curve(axes, drawn_of(row, curve.figure, axis), look)
            for row, look in sorted(zip(rows, looks, strict=True), key=lambda pair: bool(pair[1].label))
        ]
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.set_xlabel(axis)
        axes.set_ylabel(curve.unit)
        whole_in = picture.get_figheight()
        picture.subplots_adjust(right=1 - 0.15 / WIDTH_IN, bottom=(0.6 + legend_in) / whole_in)
        _add_legend(
            picture, lines[-len(named) :], [look.label for look in named], loc="lower left",
            bbox_to_anchor=(0.02, 0.0), ncols=per_line, frameon=False, fontsize=9, handlelength=2.4,
            columnspacing=1.2, borderaxespad=0.1, labelspacing=0.25,
            title=heading or None, title_fontsize=9, alignment="left",
        )  # fmt: skip
        words = "; ".join(_curve_in_words(row, curve, comparison, axis) for row in rows[:MOST_NAMED])
        return as_picture(picture, curve.name, curve.title, f"{curve.title} over the {axis}s. {words}.")


def means_of(row: Row, figure: str, axis: str) -> dict[int, float]:
    """The mean over a row's runs of a figure, by the number of the epoch or step."""
    return {place: statistics.fmean(values) for place, values in _values_of(row, figure, axis).items()}


def drawn_of(row: Row, figure: str, axis: str) -> dict[int, list[float]]:
    """The values of a figure of all runs of the row, at the places of the points that a curve has.

    Of a long curve only some places are drawn (curves.thinned). They are chosen from the places of all runs
    together: chosen for each run alone, they would differ between a run of 1000 epochs and one of 700, and
    a mean at one place would be of both runs, and at the next place of one of them.
    """
    values = list(_values_of(row, figure, axis).items())
    return dict(values[position] for position in thinned(len(values)))


def _values_of(row: Row, figure: str, axis: str) -> dict[int, list[float]]:
    """The values of a figure of all runs of the row that have it, by the number of the epoch or step."""
    found: dict[int, list[float]] = {}
    for run in row.runs:
        for place, value in _measured(run, figure, axis):
            found.setdefault(place, []).append(value)
    return dict(sorted(found.items()))


def _measured(run: RunFacts, figure: str, axis: str) -> list[tuple[int, float]]:
    """Where a run has measured the figure, and its values."""
    # A run whose lines have no steps either is shown by the numbers of its lines.
    places = [line.get(axis, place) for line, place in zip(run.epochs, run.places, strict=True)]
    values = run.column(figure)
    return [(place, value) for place, value in zip(places, values, strict=True) if value is not None]


def _in_legend(rows: Sequence[Row], comparison: Comparison) -> list[str]:
    """The rows' lines in the legend: the values of their settings, whose names are the legend's heading.

    If the settings are too many for a line, it has the names of the runs' directories.
    """
    in_words = _directories if _is_long(comparison) else _values_in_words
    labels = [in_words(row, comparison) or label_of(row, comparison) for row in rows]
    return [f"{label} (best)" if row.is_best else label for row, label in zip(rows, labels, strict=True)]


def _heading(comparison: Comparison) -> str:
    """The names of the settings in which the rows differ."""
    return ", ".join(short_names(comparison.keys).values())


def _values_in_words(row: Row, comparison: Comparison) -> str:
    """The values of the settings in which the rows differ, in the order of the heading."""
    return ", ".join(shown(row.settings[key]) if key in row.settings else "-" for key in comparison.keys)


def _is_long(comparison: Comparison) -> bool:
    """Whether the settings in which the rows differ are too many for a line of a picture."""
    lines = [_heading(comparison), *(_values_in_words(row, comparison) for row in comparison.rows)]
    return max(map(len, lines)) > MOST_LETTERS


def _directories(row: Row, comparison: Comparison) -> str:
    """The directories of the row's runs, each with the folder above it where two have the same name."""
    names = [run.directory.name for run in comparison.runs]
    found = []
    for run in row.runs[:3]:
        name = _shown_name(run.directory)
        above = _shown_name(run.directory.parent)
        found.append(name if names.count(run.directory.name) == 1 else f"{above}/{name}")
    return ", ".join(found)


def _add_legend(
    where: Axes | FigureBase, lines: Sequence[Line2D], labels: Sequence[str], **how: Any
) -> None:
    """Adds a legend with these lines and their labels. `how` are further arguments of matplotlib."""
    # matplotlib leaves out of a legend what has a label that begins with `_`, and a value may begin so. So
    # the legend is made with other labels, which are replaced afterwards.
    legend = where.legend(lines, ["label"] * len(lines), **how)
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_text(label)


def _draw_curve(axes: Axes, by_epoch: dict[int, list[float]], look: Look) -> Line2D:
    """Draws the mean of the values after each epoch, and a band of one standard deviation around it.

    Returns the curve without its band.
    """
    epochs = list(by_epoch)
    means = [statistics.fmean(values) for values in by_epoch.values()]
    [line] = axes.plot(
        epochs, means, color=LIGHT[look.colour], linestyle=look.dashes, alpha=look.opacity,
        linewidth=look.width, marker="o" if len(epochs) == 1 else None,
    )  # fmt: skip
    if look.label and any(len(values) > 1 for values in by_epoch.values()):
        spread = [statistics.stdev(values) if len(values) > 1 else 0.0 for values in by_epoch.values()]
        low = [mean - std for mean, std in zip(means, spread, strict=True)]
        high = [mean + std for mean, std in zip(means, spread, strict=True)]
        axes.fill_between(epochs, low, high, color=LIGHT[look.colour], alpha=0.14, linewidth=0)
    return line


def _looks(comparison: Comparison, rows: Sequence[Row]) -> list[Look]:
    """How the curve of each row is drawn.

    The best row has a thick curve. Rows after the first MOST_NAMED are grey and have no name. If the rows
    differ in one numeric key only, the strength of the colour shows its value. Otherwise each row has its
    own colour.
    """
    labels = _in_legend(rows[:MOST_NAMED], comparison)
    keys = [key for key in comparison.keys if key != SEED]
    strengths = _strengths(rows, keys[0]) if len(keys) == 1 and comparison.numeric_keys() == keys else None
    looks = []
    for index, row in enumerate(rows):
        if index >= len(labels):
            looks.append(Look("", "grey", "solid", 0.45, 0.9))
            continue
        label = labels[index]
        width = 2.6 if row.is_best else 1.6
        if strengths is None:
            colour = COLOURS[index % len(COLOURS)]
            looks.append(Look(label, colour, DASHES[index // len(COLOURS) % 2], 1.0, width))
        else:
            colour = "orange" if row.is_best else "blue"
            looks.append(Look(label, colour, "solid", 1.0 if row.is_best else strengths[index], width))
    return looks


def _strengths(rows: Sequence[Row], key: str) -> list[float]:
    """Opacities that rise with the value of the key, so that the order of the values can be seen."""
    values = [float(row.settings[key]) for row in rows]
    order = sorted(set(values))
    steps = max(1, len(order) - 1)
    return [PALEST + (1 - PALEST) * order.index(value) / steps for value in values]


def _curve_in_words(row: Row, curve: Curve, comparison: Comparison, axis: str) -> str:
    """The last value of a row's curve in words, for readers who cannot see the picture."""
    means = means_of(row, curve.figure, axis)
    last = max(means)
    value = f"{means[last]:.4g} {curve.unit}".rstrip()
    return f"{label_of(row, comparison)}: {value} after {axis} {last}"


# --- the result against what differs ---------------------------------------------------------------------


def result(comparison: Comparison, name: str) -> Picture | None:
    """The picture `result` or `speed`: a figure of all rows against a numeric key in which they differ.

    If the rows differ in a second key, there is a curve for each of its values. If they differ in more than
    two keys, in their seed, or in no numeric key, `result` shows a list of all rows, and there is no
    `speed`. Returns None if there is no picture, or if fewer than two rows have the figure.
    """
    figure = figure_of(comparison, name)
    rows = [row for row in comparison.rows if row.values[figure.name].mean is not None]
    if len(rows) < 2:
        return None
    keys = [key for key in comparison.keys if key != SEED]
    numeric = [key for key in comparison.numeric_keys() if len({row.settings[key] for row in rows}) > 1]
    if not numeric or len(keys) > 2 or SEED in comparison.keys:
        return _ranking(comparison, figure, rows) if name == "result" else None
    # Of two numeric keys, the one with more values becomes the horizontal axis.
    along = max(numeric, key=lambda key: len({row.settings[key] for row in rows}))
    other = next((key for key in keys if key != along), None)
    return _against(comparison, name, figure, rows, along, other)


def _against(
    comparison: Comparison, name: str, figure: Figure, rows: Sequence[Row], along: str, other: str | None
) -> Picture:
    """The figure against the key `along`, with a curve for each value of the key `other`."""
    lines: dict[str, list[Point]] = {}
    for row in rows:
        mean, std, _ = row.values[figure.name]
        assert mean is not None
        label = shown(row.settings.get(other)) if other else ""
        lines.setdefault(label, []).append(Point(float(row.settings[along]), mean, std))
    names = short_names(comparison.keys)
    title = f"{figure.heading} against {names[along]}"
    ticks = sorted({row.settings[along] for row in rows})
    with style():
        picture, axes = new_figure(title)
        drawn = []
        for index, points in enumerate(lines.values()):
            points.sort()
            colour = LIGHT[COLOURS[index % len(COLOURS)]]
            x = [point.x for point in points]
            y = [point.mean for point in points]
            dashes = DASHES[index // len(COLOURS) % 2]
            drawn += axes.plot(x, y, color=colour, marker="o", linestyle=dashes)
            whiskers = [point for point in points if point.std is not None]
            axes.errorbar(
                [point.x for point in whiskers], [point.mean for point in whiskers],
                [point.std or 0.0 for point in whiskers],
                fmt="none", ecolor=colour, capsize=3, elinewidth=1.2,
            )  # fmt: skip
        if is_even_in_logarithms([float(tick) for tick in ticks]):
            axes.set_xscale("log")
            axes.minorticks_off()
        every = -(-len(ticks) // MOST_TICKS)
        axes.set_xticks(ticks[::every], [shown(tick) for tick in ticks[::every]])
        axes.set_xlabel("ranks" if along == "world_size" else along)
        axes.set_ylabel(_unit(figure, comparison))
        if figure.name.startswith("throughput/"):
            axes.set_ylim(bottom=0)
            axes.yaxis.set_major_formatter(lambda number, _: f"{number:,.0f}")
        picture.subplots_adjust(left=LEFT_IN / WIDTH_IN, right=1 - 0.15 / WIDTH_IN)
        if other:
            heading = names[other]
            _add_legend(
                axes, drawn, list(lines), title=heading, fontsize=9, title_fontsize=9, frameon=False
            )
        words = "; ".join(
            f"{label_of(row, comparison)}: {figure_text(figure.name, row.values[figure.name].mean)}"
            for row in rows
        )
        return as_picture(picture, name, title, f"{title}. {words}.")


def _ranking(comparison: Comparison, figure: Figure, rows: Sequence[Row]) -> Picture:
    """A list of the rows: for each its name, and a dot at its figure with the standard deviation."""
    is_cut = len(rows) > MOST_ROWS
    rows = rows[:MOST_ROWS]
    title = figure.heading + (f" of the first {MOST_ROWS}" if is_cut else "")
    labels = _in_legend(rows, comparison)
    with style():
        picture, axes = new_figure(title, height_in=0.6 + 0.44 * len(rows))
        values = [row.values[figure.name] for row in rows]
        for position, (row, label, value) in enumerate(zip(rows, labels, values, strict=True)):
            assert value.mean is not None
            colour = LIGHT["orange" if row.is_best else "blue"]
            axes.errorbar(
                [value.mean], [-position], xerr=None if value.std is None else [value.std], fmt="o",
                color=colour, capsize=3, elinewidth=1.2, markersize=5,
            )  # fmt: skip
            # The name stands above the line with the dot. A name beside it would leave no room on a phone.
            axes.annotate(
                label, (0, -position), xycoords=("axes fraction", "data"), xytext=(0, 7),
                textcoords="offset points", color=LIGHT["ink"],
            )  # fmt: skip
        axes.set_ylim(-len(rows) + 0.4, 0.9)
        axes.set_yticks([])
        axes.grid(True, axis="x")
        axes.set_xlabel(_unit(figure, comparison))
        whole_in = picture.get_figheight()
        picture.subplots_adjust(left=0.03, right=0.97, bottom=0.5 / whole_in)
        words = "; ".join(
            f"{label}: {figure_text(figure.name, value.mean)}"
            for label, value in zip(labels, values, strict=True)
        )
        return as_picture(picture, "result", title, f"{title}. {words}.")


def _unit(figure: Figure, comparison: Comparison) -> str:
    """The unit of a figure, for the name of its axis. A figure without a unit gives its own name."""
    if figure.name.startswith("time/"):
        return "s"
    names = [each.name for each in comparison.figures]
    return metric_names.unit_of(figure.name, names) or figure.heading


def is_even_in_logarithms(values: Sequence[float]) -> bool:
    """Whether a logarithmic axis spaces these values more evenly than a linear axis.

    `values` are in rising order and all different. It is True for powers such as 32, 64, 128, and for 0.01,
    0.03, 0.1.
    """
    if len(values) < 2 or values[0] <= 0:
        return False
    pairs = list(itertools.pairwise(values))
    ratios = [math.log(after / before) for before, after in pairs]
    differences = [after - before for before, after in pairs]
    if len(values) == 2:
        return values[1] / values[0] >= LOG_FROM_RATIO
    return max(ratios) / min(ratios) < max(differences) / min(differences)
