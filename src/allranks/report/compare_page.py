"""Makes compare.html, the page that compares several runs, and its pictures as files in compare/.

The page looks like the report of a single run (report/page.py) and uses the same template.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from allranks.base import files
from allranks.base.errors import UserError
from allranks.base.text import as_text
from allranks.report import compare_pictures, compare_tables, drawing
from allranks.report.at_end import PAGE as PAGE_OF_RUN
from allranks.report.compare import Comparison, shown, state_of
from allranks.report.compare_tables import Column
from allranks.report.curves import thinned
from allranks.report.document import Section, chart, document, headline, note, table
from allranks.report.drawing import Picture
from allranks.report.html import NOTHING, Html, joined, tag
from allranks.run import metric_names

PAGE = "compare.html"
FOLDER = "compare"  # of the pictures


def write(comparison: Comparison, folder: Path, name: str) -> Path:
    """Writes compare.html and the folder compare/ with its pictures into `folder`; returns the page's path.

    `name` is the title of the page, such as `sizes` for a sweep in runs/sizes. Raises UserError if the
    folder cannot be written.
    """
    notes = list(comparison.notes)
    drawn: list[Picture] = []
    if drawing.is_available():
        drawn = compare_pictures.of_comparison(comparison)
    else:
        notes.append(drawing.MISSING)
    path = folder / PAGE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawing.write(folder / FOLDER, drawn)
        files.write_text(path, page(comparison, drawn, notes, name, folder)).close()
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): give another folder with --page FOLDER."
        ) from error
    return path


def page(
    comparison: Comparison, drawn: Sequence[Picture], notes: Sequence[str], name: str, folder: Path
) -> str:
    """The whole page as HTML. Its links to the reports of the runs are relative to `folder`."""
    by_name = {picture.name: picture for picture in drawn}
    curves = [curve.name for curve in compare_pictures.curves_of(comparison)]
    sections = [
        Section("table", "All together", _table(comparison)),
        Section("result", "Results", _pictures(comparison, by_name, ("result", "speed"))),
        Section("curves", "Curves", _pictures(comparison, by_name, curves)),
        Section("runs", "Runs", _runs(comparison, folder)),
        Section("common", "In common", _in_common(comparison)),
    ]
    return document(
        title=f"{name}: {len(comparison.runs)} runs compared",
        header=_header(comparison, notes, name, folder),
        sections=[section for section in sections if section.content != NOTHING],
    )


def _header(comparison: Comparison, notes: Sequence[str], name: str, folder: Path) -> Html:
    return joined(
        [
            tag("p", "Comparison of runs", class_="kind"),
            tag("h1", name),
            tag("p", as_text(str(folder)), class_="where"),
            tag("p", compare_tables.headline(comparison)),
            headline(_figures(comparison)),
            note(notes),
        ]
    )


def _figures(comparison: Comparison) -> list[tuple[str, str, str]]:
    """The large figures at the top, each as (what, value, words beside it): the best result and its run."""
    found: list[tuple[str, str, str]] = []
    figure = comparison.figure_named(comparison.best_by) if comparison.best_by else None
    best = [row for row in comparison.rows if row.is_best]
    if figure is not None and best:
        mean, std, _ = best[0].values[figure.name]
        spread = "" if std is None else f"± {compare_tables.figure_text(figure.name, std)}"
        value = compare_tables.figure_text(figure.name, mean)
        unit = " %" if metric_names.quantity_of(figure.name) == "accuracy" else ""
        found.append((f"best {figure.heading}", f"{value}{unit}", spread))
        label = compare_pictures.label_of(best[0], comparison)
        found.append(("of the run" if len(best[0].runs) == 1 else "of the runs", label, ""))
    found.append(("runs", str(len(comparison.runs)), ""))
    return found


def _table(comparison: Comparison) -> Html:
    """The whole table, in which the best row is marked."""
    columns = compare_tables.columns(comparison)
    marks = [row.is_best for row in comparison.rows]
    content = _marked_table([column for column in columns if column.name != "best"], marks)
    said = tag("p", " ".join(compare_tables.legend(comparison, "marked")))
    return joined([said, tag("div", tag("div", content, class_="card wide"), class_="cards")])


def _marked_table(columns: Sequence[Column], marks: Sequence[bool]) -> Html:
    """The columns as a table that scrolls within the page.

    A marked row has another background, and the word `best` in its last cell: colour alone is not enough.
    """

    def css(column: Column) -> str | None:
        if column.name == "run":
            return "names"
        return "number" if column.is_number else None

    head = tag("tr", *(tag("th", column.heading, scope="col", class_=css(column)) for column in columns))
    body = []
    for index, is_best in enumerate(marks):
        first, *rest = columns
        heading = tag("th", first.cells[index].strip(), scope="row", class_=css(first))
        cells = [tag("td", column.cells[index].strip(), class_=css(column)) for column in rest]
        if is_best:
            mark = tag("strong", " best")
            cells[-1] = tag("td", columns[-1].cells[index].strip(), mark, class_=css(columns[-1]))
        body.append(tag("tr", heading, *cells, class_="given" if is_best else None))
    whole = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", whole, class_="scroll", role="region", aria_label="Comparison", tabindex=0)


def _pictures(comparison: Comparison, drawn: Mapping[str, Picture], names: Sequence[str]) -> Html:
    """The pictures with these names, as far as they were drawn, each with a table that can be unfolded."""
    cards = [chart(drawn[name], _numbers(comparison, name)) for name in names if name in drawn]
    return tag("div", *cards, class_="cards") if cards else NOTHING


def _numbers(comparison: Comparison, name: str) -> Html:
    """The numbers that a picture shows, as a table with a row for each row of the comparison."""
    labels = [compare_pictures.label_of(row, comparison) for row in comparison.rows]
    every = compare_pictures.curves_of(comparison)
    curve = next((each for each in every if each.name == name), None)
    if curve is None:
        figure = compare_pictures.figure_of(comparison, name)
        values = [row.values[figure.name] for row in comparison.rows]
        rows = [
            [
                label,
                compare_tables.figure_text(figure.name, value.mean),
                compare_tables.figure_text(figure.name, value.std),
            ]
            for label, value in zip(labels, values, strict=True)
        ]
        heads = ["", figure.heading, "standard deviation"]
        return table(heads, rows, label=figure.heading, texts={0})
    axis = compare_pictures.axis_of(comparison)
    by_place = [compare_pictures.means_of(row, curve.figure, axis) for row in comparison.rows]
    places = sorted({place for means in by_place for place in means})
    kept = [places[position] for position in thinned(len(places))]
    rows = [
        [label, *(compare_tables.figure_text(curve.figure, means.get(place)) for place in kept)]
        for label, means in zip(labels, by_place, strict=True)
    ]
    heads = ["", *(f"{axis} {place}" for place in kept)]
    return table(heads, rows, label=f"{curve.title} by {axis}", texts={0})


def _runs(comparison: Comparison, folder: Path) -> Html:
    """Each run with its state, and a link to its own page where there is one."""
    rows = []
    for row in comparison.rows:
        for run in row.runs:
            seed = run.config.get("seed")
            where = Path(os.path.relpath(run.directory, folder))
            name = as_text(str(where))
            has_page = files.is_there(run.directory / PAGE_OF_RUN)
            # As bytes, because a directory's name need not be UTF-8. Signs such as # and ? are quoted, for
            # they would end the path in an address.
            address = quote(os.fsencode(where / PAGE_OF_RUN))
            link = tag("a", name, href=address) if has_page else name
            cells = (
                tag("th", link, scope="row"),
                tag("td", state_of(run)),
                tag("td", compare_pictures.label_of(row, comparison)),
                tag("td", "-" if seed is None else str(seed), class_="number"),
            )
            rows.append(tag("tr", *cells))
    heads = [tag("th", text, scope="col") for text in ("directory", "state", "what differs")]
    head = tag("tr", *heads, tag("th", "seed", scope="col", class_="number"))
    whole = tag("table", tag("thead", head), tag("tbody", *rows))
    content = tag(
        "div", whole, class_="scroll", role="region", aria_label="Directories of the runs", tabindex=0
    )
    return tag("div", tag("div", content, class_="card wide"), class_="cards")


def _in_common(comparison: Comparison) -> Html:
    """The settings that all runs have in common."""
    known = [run.config for run in comparison.runs if run.config]
    if not known:
        return NOTHING
    first, *others = known
    common: dict[str, Any] = {
        key: value
        for key, value in first.items()
        if all(key in other and other[key] == value for other in others)
    }
    rows = [[key, shown(value)] for key, value in common.items()]
    if not rows:
        return NOTHING
    content = table(["key", "value"], rows, label="Settings in common", texts={0, 1})
    return tag("div", tag("div", content, class_="card wide"), class_="cards")
