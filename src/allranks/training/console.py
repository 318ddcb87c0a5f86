"""How the log lines of a run come to the console and to the log files.

Rank 0's console shows the story of the run (story.py) beside the messages of all modules, with colours and
wrapped at a terminal. The other ranks' consoles show warnings and errors. The log file of each rank has all
lines as they are. A console that was closed, or a disk that is full, never ends a training.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import NamedTuple

from allranks.base import terminal
from allranks.base.errors import MISFITS
from allranks.training import story
from allranks.training.display import Display


def is_for_rank_0s_console(record: logging.LogRecord) -> bool:
    """Whether rank 0's console shows this line: one of ours, or a warning of any library."""
    return record.name.startswith("allranks") or record.levelno >= logging.WARNING


def is_for_other_ranks_console(record: logging.LogRecord) -> bool:
    """Whether the console of another rank shows this line, if its level is high enough."""
    # Warnings of Python's module `warnings` are the same on every rank: only rank 0 shows them.
    return record.name != "py.warnings" and (
        record.levelno >= logging.WARNING or record.name.startswith("allranks")
    )


class Shown(NamedTuple):
    """How a line of the story looks on the console."""

    gap: bool = False  # an empty line is shown before it
    label: str = ""  # the word with which the line begins, such as `data`
    colours: Sequence[str] = ()  # used only at a terminal
    wraps: bool = True  # whether a terminal breaks it, if it is too long
    is_last: bool = False  # it is shown even with console=quiet


class Console(logging.StreamHandler):
    """A log handler for a stream that may be closed or full: the training goes on all the same.

    What it cannot write for another reason, logging itself tells on stderr.
    """

    def handleError(self, record: logging.LogRecord) -> None:
        """Ignores an OSError, as when `| head` has closed the console or the disk is full."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class DisplayHandler(Console):
    """Shows log lines on rank 0's console: the story of the run, and the messages of other modules."""

    def __init__(self, display: Display, shows_story: bool) -> None:
        """Without `shows_story` only warnings, errors and the last line are shown."""
        super().__init__(display.stream)
        self.display = display
        self.shows_story = shows_story

    def emit(self, record: logging.LogRecord) -> None:
        """Writes a line above the progress bar; without the story, only those that are always shown."""
        shown: Shown = getattr(record, "shown", Shown())
        if record.levelno < logging.WARNING and not (self.shows_story or shown.is_last):
            return
        try:
            self.display.write_line(self._text(self.format(record), record.levelno, shown))
        except (OSError, *MISFITS):  # a log line that cannot be put together does not end a training either
            self.handleError(record)

    def _text(self, text: str, level: int, shown: Shown) -> str:
        """The line as the console shows it: wrapped, coloured, and with its empty line before it."""
        columns = self.display.columns
        if columns is not None and shown.wraps:
            indent = story.pair("", "") if shown.label else "  "
            text = terminal.wrapped(text, min(columns, terminal.MOST_COLUMNS), indent)
        if self.display.shows_colours:
            text = _coloured(text, level, shown)
        return f"\n{text}" if shown.gap else text


def _coloured(text: str, level: int, shown: Shown) -> str:
    if level >= logging.WARNING:
        return terminal.painted(text, terminal.RED if level >= logging.ERROR else terminal.YELLOW)
    if shown.label:
        label, value = text[: story.VALUE_AT], text[story.VALUE_AT :]
        return terminal.painted(label, terminal.DIM) + (
            terminal.painted(value, *shown.colours) if shown.colours else value
        )
    return terminal.painted(text, *shown.colours) if shown.colours else text


class LogFile(Console, logging.FileHandler):
    """Writes logs/rank-N.log. The training goes on if the folder is removed or the disk is full."""

    def _open(self) -> TextIOWrapper:
        try:
            return super()._open()
        except FileNotFoundError:  # the folder logs/ was removed
            Path(self.baseFilename).parent.mkdir(exist_ok=True)
            return super()._open()

    def close(self) -> None:
        with suppress(OSError):
            super().close()
