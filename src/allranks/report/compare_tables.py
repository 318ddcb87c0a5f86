"""A comparison as a table: for a terminal, as Markdown, as CSV and as JSON. No torch.

Tables for people (terminal, Markdown) have rounded figures and short names. What is the same for all runs
has no column: the line above the table says it once. Tables for programs (CSV, JSON) have every figure with
all its digits, under the names that summary.json and metrics.jsonl use.
"""

from __future__ import annotations

import csv
import io
import json
import textwrap
from collections.abc import Sequence
from typing import Any, NamedTuple

from allranks.base.terminal import duration
from allranks.base.text import as_text, printable, table
from allranks.report.compare import (
    OF_COMPUTING,
    SEED,
    SPEED,
    Comparison,
    Figure,
    Row,
    Value,
    decides,
    directory_names,
    short_names,
    shown,
    state_of,
)
from allranks.run import metric_names

WIDEST_SETTING = 32  # characters: a longer path or list is cut in tables for people
MOST_NAMES = 4  # so many directories are named in a row; further ones are only counted

# time/total_s has no column: people would confuse it with time/epochs_s.
NOT_SHOWN = ("time/total_s", "epochs")

# What tables for programs have of each row besides its figures: the columns of CSV and the fields of JSON.
_OF_EACH_ROW = ("settings", "n", "state", "states", "best", "directories")


class Column(NamedTuple):
    """One column of a table for people."""

    name: str  # the name of a figure, the key of a setting, or a word such as `state`
    heading: str
    cells: Sequence[str]
    is_number: bool = False  # aligned to the right


# --- for people ------------------------------------------------------------------------------------------


def columns(comparison: Comparison, plus_minus: str = "±") -> list[Column]:
    """The columns of a table for people: the settings in which rows differ, the figures, the directories.

    State and epochs have a column only if they are not the same for all runs.

    `plus_minus` stands between a mean and its standard deviation.
    """
    rows = comparison.rows
    names = short_names(comparison.keys)
    found = [Column("best", "", ["*" if row.is_best else "" for row in rows])]
    if not comparison.best_by:
        found = []
    for key in comparison.keys:
        cells = [_cut(shown(row.settings[key])) if key in row.settings else "-" for row in rows]
        is_number = key in comparison.numeric_keys()
        found.append(Column(key, names[key], cells, is_number))
    if comparison.has_groups:
        found.append(Column("n", "n", [str(len(row.runs)) for row in rows], is_number=True))
    if _common_state(comparison) is None:
        found.append(Column("state", "state", [_states(row) for row in rows]))
    if _common_epochs(comparison) is None:
        epochs = [row.values["epochs"].mean or 0.0 for row in rows]
        found.append(Column("epochs", "epochs", [f"{mean:g}" for mean in epochs], is_number=True))
    for figure in comparison.figures:
        values = [row.values[figure.name] for row in rows]
        if figure.name not in NOT_SHOWN and any(value.mean is not None for value in values):
            cells = _figure_cells(figure.name, values, plus_minus)
            found.append(Column(figure.name, figure.heading, cells, True))
    directories = directory_names([run.directory for run in comparison.runs])
    places = [[printable(as_text(directories[run.directory])) for run in row.runs] for row in rows]
    return [*found, Column("run", "run", [_some(each) for each in places])]


def text(comparison: Comparison, width: int, plus_minus: str = "±") -> str:
    """The comparison for a terminal of `width` characters: a headline, the table, and remarks."""
    every = columns(comparison, plus_minus)
    kept = list(every)
    minor_settings = [key for key in comparison.keys if not decides(key)]
    for name in (*minor_settings, *_dispensable(comparison)):
        if max(map(len, _lines(kept))) <= width:
            break
        if name != comparison.sorted_by:
            kept = [column for column in kept if column.name != name]
    left_out = [column.heading for column in every if column not in kept]

    said = legend(comparison)
    if left_out:
        said.append(f"Left out at {width} columns: {', '.join(left_out)}.")
    paragraphs = [each for each in (" ".join(said), *comparison.notes) if each]
    lines = [textwrap.fill(headline(comparison), width), "", *_lines(kept), ""]
    lines += [textwrap.fill(printable(each), width, break_long_words=False) for each in paragraphs]
    return "\n".join(lines).rstrip("\n")


def _dispensable(comparison: Comparison) -> list[str]:
    """The columns that are left out one by one, in this order, if a terminal is too narrow for all.

    Of the metrics the last ones go first, and those of the validation examples before those of the test
    set. The first one stays.
    """
    metrics = [figure.name for figure in comparison.figures if figure not in OF_COMPUTING]
    main = metric_names.quantity_of(metrics[0]) if metrics else ""
    details = [name for name in reversed(metrics) if metric_names.quantity_of(name) != main]
    mains = [name for name in reversed(metrics[1:]) if metric_names.quantity_of(name) == main]
    return ["time/epochs_s", *details, SPEED, "run", *mains]


def _lines(kept: Sequence[Column]) -> list[str]:
    """The table's lines, all of the same length, with the numbers aligned to the right."""
    padded = []
    for column in kept:
        cells = [column.heading, *column.cells]
        widest = max(map(len, cells))
        padded.append([cell.rjust(widest) if column.is_number else cell.ljust(widest) for cell in cells])
    return table(list(zip(*padded, strict=True))).split("\n")


def markdown(comparison: Comparison) -> str:
    """The comparison as a table in Markdown, with the best row in bold."""
    shown_columns = [column for column in columns(comparison) if column.name != "best"]
    lines = [
        _markdown_line([column.heading for column in shown_columns]),
        _markdown_line(["---:" if column.is_number else "---" for column in shown_columns]),
    ]
    for index, row in enumerate(comparison.rows):
        cells = [column.cells[index].strip().replace("|", "\\|") for column in shown_columns]
        lines.append(_markdown_line([f"**{cell}**" if row.is_best and cell else cell for cell in cells]))
    paragraphs = [
        headline(comparison),
        "\n".join(lines),
        " ".join(legend(comparison, "bold")),
        *comparison.notes,
    ]
    return "\n\n".join(each for each in paragraphs if each)


def _markdown_line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def headline(comparison: Comparison) -> str:
    """A sentence or two: how many runs, what is the same for all of them, and in what they differ."""
    runs = comparison.runs
    what = "1 run" if len(runs) == 1 else f"{len(runs)} runs"
    alike = [word for word in (_common_state(comparison), _common_epochs(comparison)) if word]
    first = f"{what}: {', '.join(alike)}." if alike else f"{what}."
    if len(runs) == 1:
        return first
    if comparison.keys:
        names = ["the number of ranks" if key == "world_size" else key for key in comparison.keys]
        second = f"They differ in {', '.join(names)}."
    elif _differ_in_seed(comparison):
        second = "They differ only in their seed."
    else:
        second = "Their configurations are the same."
    return f"{first} {second}"


def _differ_in_seed(comparison: Comparison) -> bool:
    """Whether some row stands for runs of different seeds. Copies of one run, say, have the same seed."""
    return any(len({run.config.get(SEED) for run in row.runs}) > 1 for row in comparison.rows)


def legend(comparison: Comparison, mark: str = "*") -> list[str]:
    """Sentences that explain the table. `mark` says how the best row is marked, such as `*` or `bold`."""
    said = []
    if comparison.best_by:
        figure = comparison.figure_named(comparison.best_by)
        assert figure is not None
        extreme = "highest" if figure.higher_is_better else "lowest"
        said.append(f"The best row ({mark}) has the {extreme} {figure.heading}.")
    if comparison.has_groups:
        over = " over their seeds" if _differ_in_seed(comparison) else ""
        said.append(f"A row of n runs has the mean{over}, with the sample standard deviation.")
    has_best = any(run.best is not None for run in comparison.runs)
    if has_best and any(
        metric_names.part_of(name) == "val" and value.mean is not None
        for row in comparison.rows
        for name, value in row.values.items()
    ):
        said.append(f"Figures of val/ are those of the best epoch{_by_rule(comparison)}.")
    return said


def _by_rule(comparison: Comparison) -> str:
    """` (lowest val/loss)`: how the best epoch is chosen; empty if the runs choose it in different ways."""
    rules = {run.rule for run in comparison.runs}
    return f" ({next(iter(rules)).words})" if len(rules) == 1 else ""


def _common_state(comparison: Comparison) -> str | None:
    """The state of all runs, such as `all finished`; None if the runs are in different states."""
    states = {state_of(run) for run in comparison.runs}
    if len(states) != 1:
        return None
    [state] = states
    return state if len(comparison.runs) == 1 else f"all {state}"


def _common_epochs(comparison: Comparison) -> str | None:
    """The completed epochs of all runs, such as `5 epochs each`; None if they are not the same for all.

    Empty if none of the runs counts epochs.
    """
    numbers = {run.epochs_done for run in comparison.runs}
    if len(numbers) != 1:
        return None
    [number] = numbers
    if number is None:
        return ""
    what = "1 epoch" if number == 1 else f"{number} epochs"
    return what if len(comparison.runs) == 1 else f"{what} each"


def _figure_cells(name: str, values: Sequence[Value], plus_minus: str) -> list[str]:
    """The cells of a figure's column, padded so that the `±` of all rows are aligned.

    Speed and time are shown without a standard deviation: it would only say how busy the machine was.
    """
    with_std = metric_names.is_metric(name) and name != "epochs"
    means = [figure_text(name, value.mean) for value in values]
    stds = [
        f" {plus_minus} {figure_text(name, value.std)}" if with_std and value.std is not None else ""
        for value in values
    ]
    widest_mean = max(map(len, means))
    widest_std = max(map(len, stds))
    return [
        f"{mean.rjust(widest_mean)}{std.ljust(widest_std)}" for mean, std in zip(means, stds, strict=True)
    ]


def figure_text(name: str, value: float | None) -> str:
    """A figure for people, rounded to what matters; `-` for one that is not known."""
    if value is None:
        return "-"
    if name == "epochs":
        return f"{value:g}"
    if name.startswith("time/"):
        return duration(value)
    return f"{value:,.0f}" if name == SPEED else metric_names.number(name, value)


def _states(row: Row) -> str:
    """The states of a row's runs: `finished` if it is the same for all, else `2 finished, 1 lost`."""
    states = row.states
    if len(states) == 1:
        return next(iter(states))
    return ", ".join(f"{count} {state}" for state, count in states.items())


def _cut(cell: str) -> str:
    """The value of a setting for a column. If it is too long, only its end is shown after `...`."""
    cell = printable(cell)
    # Long values are mostly paths, which differ at their end.
    return cell if len(cell) <= WIDEST_SETTING else f"...{cell[3 - WIDEST_SETTING :]}"


def _some(names: Sequence[str]) -> str:
    """The first MOST_NAMES names, and how many more there are."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return " ".join(names[:MOST_NAMES]) + more


# --- for programs ----------------------------------------------------------------------------------------


def as_csv(comparison: Comparison) -> str:
    """The comparison as CSV: a line for each row, first the settings in which the rows differ.

    A figure's column NAME has the value or the mean; NAME/std the standard deviation, empty for one run.
    NAME is the figure's name, or `figure/` and that name where another column is called so.
    """
    out = io.StringIO()
    heads = [*comparison.keys, "n", "state", "best"]
    for name in _names_for_programs(comparison):
        heads += [name, f"{name}/std"]
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow([*heads, "directories"])
    for row in comparison.rows:
        cells: list[object] = [
            shown(row.settings[key]) if key in row.settings else "" for key in comparison.keys
        ]
        cells += [len(row.runs), _states(row), "true" if row.is_best else "false"]
        for figure in comparison.figures:
            value = row.values[figure.name]
            cells += [_plain(figure.name, value.mean), value.std]
        writer.writerow([*cells, " ".join(as_text(str(run.directory)) for run in row.runs)])
    return out.getvalue().rstrip("\n")


def as_json(comparison: Comparison) -> str:
    """The comparison as one JSON object; docs/compare.md describes it."""
    names = _names_for_programs(comparison)
    about = {
        "differ_in": list(comparison.keys),
        "sorted_by": comparison.sorted_by,
        "best_by": comparison.best_by or None,
        "notes": list(comparison.notes),
        "rows": [_as_json(row, comparison.figures, names) for row in comparison.rows],
    }
    return json.dumps(about, indent=2, allow_nan=False)


def _names_for_programs(comparison: Comparison) -> list[str]:
    """The name of each figure in CSV and JSON: its own, after `figure/` where that is another column's.

    A program may give its figures any names, such as `n`, `best`, or that of a setting.
    """
    taken = {*_OF_EACH_ROW, *comparison.keys}
    names = []
    for figure in comparison.figures:
        name = figure.name
        while name in taken or f"{name}/std" in taken:
            name = f"figure/{name}"
        names.append(name)
        taken |= {name, f"{name}/std"}
    return names


def _as_json(row: Row, of_runs: Sequence[Figure], names: Sequence[str]) -> dict[str, Any]:
    """The row as an object. `names` are those that the figures `of_runs` have there."""
    figures: dict[str, Any] = {}
    for figure, name in zip(of_runs, names, strict=True):
        value = row.values[figure.name]
        figures[name] = _plain(figure.name, value.mean)
        figures[f"{name}/std"] = value.std
    return {
        "settings": {key: _as_json_value(value) for key, value in row.settings.items()},
        "n": len(row.runs),
        "states": [state_of(run) for run in row.runs],
        "best": row.is_best,
        **figures,
        "directories": [as_text(str(run.directory)) for run in row.runs],
    }


def _plain(name: str, mean: float | None) -> float | int | None:
    """The mean of a figure for programs. A whole number of epochs becomes an int, others stay floats."""
    if name == "epochs" and mean is not None and mean.is_integer():
        return int(mean)
    return mean


def _as_json_value(value: Any) -> Any:
    """The value of a setting for JSON. What JSON cannot express, such as infinity, becomes a text."""
    try:
        json.dumps(value, allow_nan=False)
    except (TypeError, ValueError):
        return shown(value)
    return value
