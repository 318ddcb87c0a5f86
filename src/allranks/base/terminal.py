"""What a terminal takes: how wide it is, whether it shows colours, and text made to fit.

A file or a pipe is no terminal. What is written there has neither colours nor other control sequences, and
no line of it is wrapped: programs read it, and people search it.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Mapping

# Wider text is tiring to read, so a wide window is not filled.
MOST_COLUMNS = 100
# A window that says it has no columns at all, as a new pseudo-terminal does.
USUAL_COLUMNS = 80
# Terminals that obey no control sequences call themselves so.
DUMB = ("dumb", "unknown")

BOLD, DIM, RED, GREEN, YELLOW, CYAN = "1", "2", "31", "32", "33", "36"

# Erases from the cursor to the end of the screen. What stands there, if anything, is the progress bar of a
# rank: it is drawn below the cursor.
ERASE_BELOW = "\x1b[J"
RESTORE_CURSOR = "\x1b8"  # the last bytes of a progress bar


def columns_of(fd: int) -> int | None:
    """How many characters a line of the terminal behind this descriptor has; None for no terminal."""
    try:
        if not os.isatty(fd):
            return None
        return os.get_terminal_size(fd).columns or USUAL_COLUMNS
    except OSError:  # closed
        return None


def obeys(fd: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether a terminal is behind the descriptor that obeys control sequences, as TERM says."""
    return columns_of(fd) is not None and environ.get("TERM", "").lower() not in DUMB


def shows_colours(fd: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether colours may be used: at a terminal that obeys, unless NO_COLOR is set (no-color.org)."""
    return obeys(fd, environ) and not environ.get("NO_COLOR")


def painted(text: str, *codes: str) -> str:
    """The text in these colours, such as painted("best", BOLD, GREEN)."""
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if text else ""


def wrapped(text: str, columns: int, indent: str = "") -> str:
    """The text in lines of at most so many columns, broken between words; each line of it for itself.

    Lines after a break begin with `indent`. A word that is longer, such as a path, is not broken: it is to
    be copied whole.
    """
    lines: list[str] = []
    for line in text.split("\n"):
        if len(line) <= columns:
            lines.append(line)
            continue
        lines += textwrap.wrap(
            line,
            columns,
            subsequent_indent=indent,
            break_long_words=False,
            break_on_hyphens=False,
            replace_whitespace=False,
            drop_whitespace=True,
        )
    return "\n".join(lines)


def message(text: str, fd: int, environ: Mapping[str, str] = os.environ) -> str:
    """A message of `allranks` for the terminal behind this descriptor, with its line feed.

    The message begins with `allranks: `. Its lines are wrapped, and that first word is coloured.
    """
    columns = min(columns_of(fd) or USUAL_COLUMNS, MOST_COLUMNS)
    name, _, rest = wrapped(text, columns, indent=" " * len("allranks: ")).partition(":")
    if shows_colours(fd, environ):
        name = painted(name, BOLD, RED)
    before = ERASE_BELOW if obeys(fd, environ) else ""
    return f"{before}{name}:{rest}\n"


def short_duration(seconds: float) -> str:
    """A duration as a clock would count it down: 0:07, 12:40, 3:05:00, 4 d 03 h."""
    whole = max(0, round(seconds))
    minutes, s = divmod(whole, 60)
    hours, m = divmod(minutes, 60)
    if hours >= 48:
        days, h = divmod(hours, 24)
        return f"{days} d {h:02d} h"
    return f"{hours}:{m:02d}:{s:02d}" if hours else f"{m}:{s:02d}"


def duration(seconds: float) -> str:
    """A duration for a sentence: 5.5 s, 4 min 12 s, 3 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, s = divmod(round(seconds), 60)
    hours, m = divmod(minutes, 60)
    return f"{hours:,} h {m:02d} min" if hours else f"{m} min {s:02d} s"
