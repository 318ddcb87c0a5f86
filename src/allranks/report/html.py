"""Builds HTML from elements, and escapes every plain text that is put into one.

A report shows names, overrides and paths, which may hold any characters. A plain `str` becomes part of a
page only through tag() or joined(), which escape it, so that a browser shows it as text. A piece that is
HTML already has the type Html and is not escaped again.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from dataclasses import dataclass

# Elements that have no end tag.
_VOID = frozenset({"img", "br", "hr", "meta"})


@dataclass(frozen=True)
class Html:
    """A piece of a page, as it stands in the file."""

    text: str


Inside = Html | str | int | None  # what an element may hold; None adds nothing to it
NOTHING = Html("")


def tag(name: str, *inside: Inside, **attributes: str | int | bool | None) -> Html:
    """The element `name` with these contents and attributes; plain texts are escaped.

    Attributes are written as Python's names: `class_` for class, `aria_label` for aria-label. One that is
    None or False is left out, and one that is True has no value.
    """
    shown = "".join(_attribute(key, value) for key, value in attributes.items())
    if name in _VOID:
        return Html(f"<{name}{shown}>")
    return Html(f"<{name}{shown}>{joined(inside).text}</{name}>")


def joined(pieces: Sequence[Inside]) -> Html:
    """The pieces one after another; texts are escaped."""
    return Html("".join(_piece(piece) for piece in pieces))


def _piece(piece: Inside) -> str:
    if piece is None:
        return ""
    return piece.text if isinstance(piece, Html) else html.escape(_shown(str(piece)))


def _attribute(name: str, value: str | int | bool | None) -> str:
    if value is None or value is False:
        return ""
    name = name.rstrip("_").replace("_", "-")
    if value is True:
        return f" {name}"
    return f' {name}="{html.escape(_shown(str(value)))}"'


def _shown(text: str) -> str:
    """The text with U+FFFD in place of characters that a page must not hold.

    These are control characters other than line feeds, and lone surrogates, which stand for bytes that are
    not UTF-8. Characters such as tabs, which are not printable either, are replaced, too.
    """
    if text.isprintable():
        return text
    kept = (each if each.isprintable() or each == "\n" else "\N{REPLACEMENT CHARACTER}" for each in text)
    return "".join(kept)
