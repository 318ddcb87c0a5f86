"""Draws curves and bars with characters. The functions turn numbers into text and print nothing."""

from __future__ import annotations

import math
from collections.abc import Sequence

Figures = Sequence[float | None]  # None stands for a figure that is not known or not finite

_STEPS = "▁▂▃▄▅▆▇█"
_STEPS_IN_ASCII = "_.-=*#"

# A braille character has two columns of four dots. In Unicode its number is _BRAILLE plus a bit for each
# dot: here are the bits of the left and of the right column, from the top down.
_DOTS = ((0x01, 0x02, 0x04, 0x40), (0x08, 0x10, 0x20, 0x80))
_BRAILLE = 0x2800


def bar(share: float, columns: int, is_unicode: bool = True) -> str:
    """A bar that is `columns` characters wide, of which the part `share`, from 0 to 1, is filled."""
    full, empty = ("━", "─") if is_unicode else ("#", "-")
    filled = math.floor(columns * min(max(share, 0.0), 1.0))
    return full * filled + empty * (columns - filled)


def sparkline(figures: Figures, columns: int, is_unicode: bool = True) -> str:
    """The figures as a line of small vertical bars, at most `columns` characters wide.

    A figure that is not known leaves a blank. Without any known figure the text is empty.
    """
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
    """At most `count` figures. More figures are cut into `count` equal pieces, and each gives its mean."""
    if len(figures) <= count:
        return list(figures)
    pieces = []
    for number in range(count):
        piece = figures[number * len(figures) // count : (number + 1) * len(figures) // count]
        known = [figure for figure in piece if figure is not None]
        pieces.append(sum(known) / len(known) if known else None)
    return pieces


def chart(curves: Sequence[Figures], columns: int, rows: int) -> list[list[tuple[str, int | None]]]:
    """Curves with common axes, drawn with braille characters.

    Returns `rows` lines of `columns` cells. A cell has a character and the index of the curve that passes
    there, or None; where two curves meet it is the later one. Of several curves the first one is dotted and
    the others are solid, so that they can be told apart without colours.
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
    """`count` figures, by linear interpolation between the given ones; fewer than two stay as they are."""
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
    """The dots of one curve as (x, y): x counts from the left and y from the top.

    `low` and `high` are the values at the lower and upper edge, and `height` is the number of dots between.
    """
    span = (high - low) or 1.0
    points: list[tuple[int, int]] = []
    before: int | None = None
    for x, figure in enumerate(curve):
        if figure is None:
            before = None
            continue
        y = round((high - figure) / span * (height - 1))
        if not is_dotted:
            # If the curve is steep, the dots between the last column and this one are drawn, too, so
            # that the line has no gaps.
            start = y
            if before is not None and y > before:
                start = before + 1
            elif before is not None and y < before:
                start = before - 1
            points += [(x, each) for each in range(min(start, y), max(start, y) + 1)]
        elif x % 2 == 0:
            points.append((x, y))
        before = y
    return points
