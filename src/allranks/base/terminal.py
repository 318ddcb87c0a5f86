"""What a terminal can show: its width, whether it shows colours, and functions that make text fit into it.

A file or a pipe is not a terminal. Text that is written there has no colours or other control sequences,
and its lines are not wrapped, so that programs can read it and people can search it.
"""

from __future__ import annotations

import os
import sys
import textwrap
from collections.abc import Mapping
from contextlib import suppress
from typing import TextIO

# Wider text is tiring to read, so a wide window is not filled.
MOST_COLUMNS = 100
# The width that is assumed for a terminal that reports a width of 0, as a new pseudo-terminal does.
USUAL_COLUMNS = 80
# The values of TERM for terminals that do not understand control sequences.
DUMB = ("dumb", "unknown")

BOLD, DIM, RED, GREEN, YELLOW, CYAN = "1", "2", "31", "32", "33", "36"

# Erases from the cursor to the end of the screen. That removes the progress bar, if a rank has drawn one:
# it is always below the cursor.
ERASE_BELOW = "\x1b[J"
RESTORE_CURSOR = "\x1b8"  # puts the cursor back to where it was saved; the end of each progress bar


def columns_of(fd: int) -> int | None:
    """The width in characters of the terminal at this file descriptor; None if it is not a terminal."""
    try:
        if not os.isatty(fd):
            return None
        return os.get_terminal_size(fd).columns or USUAL_COLUMNS
    except OSError:  # the descriptor is closed
        return None


def obeys(fd: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether this file descriptor is a terminal that understands control sequences, according to TERM."""
    return columns_of(fd) is not None and environ.get("TERM", "").lower() not in DUMB


def shows_colours(fd: int, environ: Mapping[str, str] = os.environ) -> bool:
    """Whether to use colours: if obeys() is True, and NO_COLOR is not set (https://no-color.org)."""
    return obeys(fd, environ) and not environ.get("NO_COLOR")


def painted(text: str, *codes: str) -> str:
    """The text with the control sequences for these colours, as in painted("best", BOLD, GREEN)."""
    return f"\x1b[{';'.join(codes)}m{text}\x1b[0m" if text else ""


def wrapped(text: str, columns: int, indent: str = "") -> str:
    """The text with each line that is longer than `columns` characters broken between words.

    A new line begins with `indent`. A word that is longer than a line, such as a path, is not broken, so
    that it can be copied.
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


def write(stream: TextIO | None, text: str) -> None:
    """Writes the text to a console's stream, all of it at once, and hands it to the operating system.

    Characters that the stream's encoding lacks are shown escaped, such as those of a file name that is no
    UTF-8. Raises OSError if the console is closed or the disk is full. Python has no stream (None) where
    the console was closed before it started: then nothing is written.
    """
    if stream is None:
        return
    try:
        stream.write(text)
    except UnicodeEncodeError:
        encoding = stream.encoding
        stream.write(text.encode(encoding, errors="backslashreplace").decode(encoding))
    stream.flush()


def say(text: str) -> None:
    """Writes a line to stdout that no work depends on: a closed console or a full disk is not an error."""
    with suppress(OSError):
        write(sys.stdout, f"{text}\n")


def message(text: str, fd: int, environ: Mapping[str, str] = os.environ) -> str:
    """A message of `allranks`, made for the terminal at this file descriptor, with a line feed at its end.

    `text` begins with `allranks: `. Its lines are wrapped, and the word `allranks` is coloured. A progress
    bar below the cursor is erased first.
    """
    columns = min(columns_of(fd) or USUAL_COLUMNS, MOST_COLUMNS)
    name, _, rest = wrapped(text, columns, indent=" " * len("allranks: ")).partition(":")
    if shows_colours(fd, environ):
        name = painted(name, BOLD, RED)
    before = ERASE_BELOW if obeys(fd, environ) else ""
    return f"{before}{name}:{rest}\n"


def short_duration(seconds: float) -> str:
    """A duration in the form of a clock: 0:07, 12:40, 3:05:00; from two days on as in 4 d 03 h."""
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
