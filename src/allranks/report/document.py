"""What pages of runs and of comparisons have in common: the document around them, and its elements.

A page is a single file that needs no network, no script and no other file.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import allranks
from allranks.report import drawing
from allranks.report.drawing import Picture
from allranks.report.html import NOTHING, Html, joined, tag


class Section(NamedTuple):
    """A part of the page with a heading."""

    anchor: str  # its id in the page, to which the links at the top lead
    title: str
    content: Html


def document(title: str, header: Html, sections: Sequence[Section]) -> str:
    """A whole page: `title` for the browser's tab, the header, links to the sections, and the sections."""
    links = [tag("li", tag("a", section.title, href=f"#{section.anchor}")) for section in sections]
    whole = [
        tag(
            "section",
            tag("h2", section.title, id=f"{section.anchor}-heading"),
            section.content,
            id=section.anchor,
            aria_labelledby=f"{section.anchor}-heading",
        )
        for section in sections
    ]
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    values = {
        "light": _as_css(drawing.LIGHT),
        "dark": _as_css(drawing.DARK),
        "version": allranks.__version__,
        "title": joined([title]).text,
        "header": header.text,
        "nav": tag("nav", tag("ul", *links), aria_label="Sections").text if len(links) > 1 else "",
        "main": "\n".join(section.text for section in whole),
        "footer": joined([f"Made by allranks {allranks.__version__} on {now}."]).text,
    }
    template = Path(__file__).with_name("page.html.template").read_text(encoding="utf-8")
    # All words such as @title@ are replaced in one pass. With one pass for each word, an @nav@ in a run's
    # name would be replaced, too.
    return re.sub(r"@(\w+)@", lambda found: values.get(found[1], found[0]), template)


def _as_css(colours: Mapping[str, str]) -> str:
    """The colours as CSS variables: `--ink: #1c2430; --grid: ...;`."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


def headline(figures: Sequence[tuple[str, str, str]]) -> Html:
    """The large figures below the title: (what, value, words beside the value)."""
    if not figures:
        return NOTHING
    cells = [
        tag("div", tag("dt", what), tag("dd", value, tag("small", beside) if beside else None))
        for what, value, beside in figures
    ]
    return tag("dl", *cells, class_="headline")


def note(sentences: Sequence[str]) -> Html:
    """A box with sentences on what cannot be shown; nothing if there is none."""
    if not sentences:
        return NOTHING
    return tag("div", *(tag("p", sentence) for sentence in sentences), class_="note")


def chart(picture: Picture, behind: Html, wide: bool = False) -> Html:
    """A picture with its heading. `behind` is the table of its numbers, which the reader can unfold."""
    return tag(
        "figure",
        tag("figcaption", tag("h3", picture.title)),
        Html(drawing.inline(picture)),
        tag("details", tag("summary", f"{picture.title} as a table"), behind),
        class_="card wide" if wide else "card",
    )


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    label: str,
    texts: set[int] | frozenset[int] = frozenset(),
) -> Html:
    """A table that scrolls within the page, also with the keyboard.

    The first cell of each row is the row's heading. `texts` has the indices of the columns that hold text;
    the other columns hold numbers, which are aligned to the right. Without `texts` only the first column
    holds text.
    """

    def css(column: int) -> str | None:
        return None if column in texts or (column == 0 and not texts) else "number"

    head = tag(
        "tr",
        *(
            tag("th", text, scope="col", class_=css(i)) if text else tag("td")
            for i, text in enumerate(heads)
        ),
    )
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row", class_=css(0)),
            *(tag("td", cell, class_=css(column)) for column, cell in enumerate(row[1:], start=1)),
        )
        for row in rows
    ]
    whole = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", whole, class_="scroll", role="region", aria_label=label, tabindex=0)


def cell(value: float | None, spec: str) -> str:
    """The value in this format, such as `.2f`; `-` for None."""
    return "-" if value is None else format(value, spec)
