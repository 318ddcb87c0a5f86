"""Curves and bars made of characters. Pure: numbers in, text out."""

from __future__ import annotations

import math
from collections.abc import Sequence

Figures = Sequence[float | None]  # None where a figure is not known, or is no number

_STEPS = "▁▂▃▄▅▆▇█"
_STEPS_IN_ASCII = "_.-=*#"

# A character of braille has two columns of four dots. These are the dots' bits, from the top down.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BRAILLE = 0x2800


def bar(share: float, columns: int, is_unicode: bool = True) -> str:
    """A bar of so many columns, filled to `share`, which is between 0 and 1."""
    full, empty = ("━", "─") if is_unicode else ("#", "-")
    filled = math.floor(columns * min(max(share, 0.0), 1.0))
    return full * filled + empty * (columns - filled)


def sparkline(figures: Figures, columns: int, is_unicode: bool = True) -> str:
    """The figures as a line of bars, at most so many columns wide; a blank for what is not known."""
    shown = resampled(figures, columns)
    known = [figure for figure in shown if figure is not None]
    if not known:
        return ""
    steps = _STEPS if is_unicode else _STEPS_IN_ASCII
    low, high = min(known), max(known)
    span = (high - low) or 1.0

    def step(figure: float) -> str:
        return steps[min(int((figure - low) / span * len(steps)), len(steps) - 1)]

    return "".join(" " if figure is None else step(figure) for figure in shown)


def resampled(figures: Figures, count: int) -> list[float | None]:
    """The figures, where they are more than `count`: the mean of each of `count` equal pieces."""
    if len(figures) <= count:
        return list(figures)
    pieces = []
    for number in range(count):
        piece = figures[number * len(figures) // count : (number + 1) * len(figures) // count]
        known = [figure for figure in piece if figure is not None]
        pieces.append(sum(known) / len(known) if known else None)
    return pieces


def chart(curves: Sequence[Figures], columns: int, rows: int) -> list[list[tuple[str, int | None]]]:
    """Curves over the same numbers, drawn with the dots of braille.

    Returns `rows` lines of `columns` cells: a character, and the number of the curve that it belongs to
    (of two that meet there the later one; None for none). The first curve is a row of single dots, the
    others are drawn through, so that they can be told apart without colours.
    """
    width, height = 2 * columns, 4 * rows
    shown = [stretched(curve, width) for curve in curves]
    known = [figure for curve in shown for figure in curve if figure is not None]
    bits = [[0] * columns for _ in range(rows)]
    owner: list[list[int | None]] = [[None] * columns for _ in range(rows)]
    if known:
        low, high = min(known), max(known)
        for number, curve in enumerate(shown):
            for x, y in _points(curve, low, high, height, is_dotted=number == 0 and len(shown) > 1):
                bits[y // 4][x // 2] |= _DOTS[x % 2][y % 4]
                owner[y // 4][x // 2] = number
    return [
        [(chr(_BRAILLE + bit) if bit else " ", who) for bit, who in zip(line, owners, strict=True)]
        for line, owners in zip(bits, owner, strict=True)
    ]


def stretched(figures: Figures, count: int) -> list[float | None]:
    """`count` figures from the first to the last of these: straight lines between neighbours."""
    if len(figures) > count:
        return resampled(figures, count)
    if len(figures) < 2:
        return list(figures)
    between: list[float | None] = []
    for number in range(count):
        place = number * (len(figures) - 1) / (count - 1)
        left = min(int(place), len(figures) - 2)
        one, other = figures[left], figures[left + 1]
        share = place - left
        if one is None or other is None:
            between.append(one if share < 0.5 else other)
        else:
            between.append(one + (other - one) * share)
    return between


def _points(curve: Figures, low: float, high: float, height: int, is_dotted: bool) -> list[tuple[int, int]]:
    """The dots (x from the left, y from the top) of one curve."""
    span = (high - low) or 1.0
    points: list[tuple[int, int]] = []
    before: int | None = None
    for x, figure in enumerate(curve):
        if figure is None:
            before = None
            continue
        y = round((high - figure) / span * (height - 1))
        if not is_dotted:
            # Where the curve is steep the dots between two columns are drawn, too.
            start = y if before is None else before + (1 if y > before else -1 if y < before else 0)
            points += [(x, each) for each in range(min(start, y), max(start, y) + 1)]
        elif x % 2 == 0:
            points.append((x, y))
        before = y
    return points
