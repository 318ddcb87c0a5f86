"""Writes lines to rank 0's console, and at a terminal draws a progress bar below them.

The bar is drawn on the line below the cursor. The cursor stays above it, at the beginning of the line where
the next text goes. So if anything else writes to the terminal (a print() in a user's model, a library), its
text appears above the bar and not within it. Display.write_line() erases the bar, writes its line, and
draws the bar again.

A rank may be killed at any moment, and the terminal must stay usable then. So nothing here changes it in a
way that would have to be undone: the cursor stays visible, and there is no thread.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import suppress
from typing import NamedTuple, TextIO

from allranks.base import terminal
from allranks.base.terminal import ERASE_BELOW, RESTORE_CURSOR

DRAW_EVERY_S = 0.1  # often enough to look smooth; drawing takes far less time than this
WINDOW_S = 5.0  # the speed that is shown is the mean over so many seconds
LEAST_BAR_COLUMNS, MOST_BAR_COLUMNS = 6, 40

# _BELOW prepares the line below the cursor for the bar, in five steps: erase what is below the cursor; go
# down one line, which scrolls the screen if the cursor is in the last line (the control sequence "index");
# go up again; save the position of the cursor; and go down to the beginning of the line for the bar.
_INDEX, _UP, _SAVE_CURSOR, _DOWN_TO_BEGINNING = "\x1bD", "\x1b[A", "\x1b7", "\x1b[B\r"
_BELOW = ERASE_BELOW + _INDEX + _UP + _SAVE_CURSOR + _DOWN_TO_BEGINNING


class Display:
    """A stream that people read: a terminal, or a file that is read later."""

    def __init__(self, stream: TextIO | None) -> None:
        self.stream = stream
        try:
            self._fd = stream.fileno() if stream is not None else -1
        except (OSError, ValueError, AttributeError):
            # A notebook, a test or the user's program may replace stdout by an object without a file.
            self._fd = -1
        self.is_live = terminal.obeys(self._fd)
        self.shows_colours = terminal.shows_colours(self._fd)
        self._bar = ""  # the bar that is shown now; empty if there is none

    @property
    def columns(self) -> int | None:
        """The width of the terminal now, in characters; the window may change. None for no terminal."""
        return terminal.columns_of(self._fd)

    @property
    def is_unicode(self) -> bool:
        """Whether the stream can encode the characters of the bar, which are not ASCII."""
        return (getattr(self.stream, "encoding", None) or "").lower().replace("-", "") == "utf8"

    def write_line(self, text: str) -> None:
        """Writes a line, above the bar if there is one. Raises OSError if the stream cannot be written."""
        if self._bar:
            self._write(f"{ERASE_BELOW}{text}\n{_BELOW}{self._bar}{RESTORE_CURSOR}")
        else:
            self._write(f"{text}\n")

    def draw(self, bar: str) -> None:
        """Draws the bar, which is a single line, in place of the previous one."""
        self._bar = bar
        with suppress(OSError):  # the terminal has gone: no reason to end a training
            self._write(f"{_BELOW}{bar}{RESTORE_CURSOR}")

    def clear(self) -> None:
        """Erases the bar."""
        if self._bar:
            self._bar = ""
            with suppress(OSError):
                self._write(ERASE_BELOW)

    def _write(self, text: str) -> None:
        # All in one write: otherwise the text of another process could come between the control sequences.
        terminal.write(self.stream, text)


# --- the bar ------------------------------------------------------------------------------------------


class Moment(NamedTuple):
    """How far a run has come."""

    epoch: int  # the number of the current epoch, from 1
    epochs: int  # of the whole run
    step: int  # completed steps of the current epoch
    steps: int  # of the whole epoch
    samples_per_s: float | None = None  # over all ranks; None: not known
    epoch_left_s: float | None = None  # seconds until the steps of the epoch are done; None: not known yet
    run_left_s: float | None = None  # seconds until the last epoch is done; None: not known yet


def bar_text(now: Moment, columns: int, is_unicode: bool, shows_colours: bool) -> str:
    """The progress bar as one line of less than `columns` characters.

    The bar itself takes the room that the words leave. If that is too little, the words after the bar are
    shortened or left out.
    """
    # The last column stays free: some terminals begin a new line after a character there.
    room = min(columns - 1, terminal.MOST_COLUMNS)
    before = f"  epoch {now.epoch}/{now.epochs}  "
    after = next(
        (words for words in _words_after(now) if len(before) + LEAST_BAR_COLUMNS + len(words) <= room), ""
    )
    length = min(max(room - len(before) - len(after), 0), MOST_BAR_COLUMNS)
    filled = length * now.step // max(now.steps, 1)
    full, empty = ("━", "─") if is_unicode else ("#", "-")
    done = full * filled
    left = empty * (length - filled)
    if shows_colours:
        done = terminal.painted(done, terminal.CYAN)
        left = terminal.painted(left, terminal.DIM)
        # Not cut: the control sequences for colours have a length, but take no room.
        return f"{before}{done}{left}{after}"
    return f"{before}{done}{left}{after}"[:room]


def _words_after(now: Moment) -> Iterator[str]:
    """Texts for the place after the bar, from the longest to the shortest: the first that fits is used."""
    share = f"  {100 * now.step // max(now.steps, 1):3d} %"
    if now.epoch_left_s is None or now.run_left_s is None:
        yield share
        return
    is_known = now.samples_per_s is not None
    long_speed = f"{now.samples_per_s:,.0f} samples/s  " if is_known else ""
    speed = f"{now.samples_per_s:,.0f}/s  " if is_known else ""
    epoch_left = terminal.short_duration(now.epoch_left_s)
    run_left = terminal.short_duration(now.run_left_s)
    yield f"{share}  {long_speed}left: epoch {epoch_left}, run {run_left}"
    yield f"{share}  {speed}left: {epoch_left}, run {run_left}"
    yield f"{share}  {speed}run {run_left}"
    yield share


class Pace:
    """Measures how long a step takes, over the last WINDOW_S seconds."""

    def __init__(self, step: int, now_s: float) -> None:
        """Starts at step `step` and at time `now_s`, in seconds of time.perf_counter()."""
        self._seen: deque[tuple[float, int]] = deque([(now_s, step)])

    def note(self, step: int, now_s: float) -> None:
        """Records that the training has completed `step` steps at time `now_s`, in seconds."""
        self._seen.append((now_s, step))
        while len(self._seen) > 2 and self._seen[1][0] < now_s - WINDOW_S:
            self._seen.popleft()

    @property
    def step_s(self) -> float | None:
        """How many seconds a step takes; None if no step was completed yet."""
        first_s, first_step = self._seen[0]
        last_s, last_step = self._seen[-1]
        if last_step <= first_step:
            return None
        return (last_s - first_s) / (last_step - first_step)
