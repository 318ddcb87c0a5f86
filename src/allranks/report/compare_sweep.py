"""A sweep's comparison, made by itself when the sweep has ended. No torch.

Where one command trains all cells of a sweep, it calls made() at its end.

The jobs of an array end in any order, two perhaps at the same moment, on hosts that share nothing but the
file system. Each of them calls after_cell() at its end, and one of them makes the comparison:

1. It writes the file `.ended-N` into the sweep's directory. The file says how the cell has ended, and holds
   a random token, another one each time.
2. It lists the directory. Where some cell has no such file, a later one will make the comparison. A network
   file system may show a listing from its memory; but it drops that memory once this host has changed the
   directory, as in step 1. So the last of several cells to do step 1 sees the files of all the others.
3. Several cells may see all files. The name `.compared-X`, with X made of what all files hold, is the
   same for all of them, and the file system lets only one of them create that file. That one makes the
   comparison.

A cell that is started again later ends with another token, so the comparison is made anew.

The comparison is a child process with a limited time, as the pages of runs are (report/at_end.py): whatever
becomes of it, the sweep's own end is what it would have been without it.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from allranks.base import files
from allranks.report import at_end
from allranks.run.cells import cells_listed, is_finished

LIMIT_S = 60.0  # some times what it takes for 100 runs; a file system that hangs takes for ever
# Where the job has little time left, its script is still to queue the job that goes on.
SHORT_LIMIT_S = 10.0
_ENDED, _COMPARED = ".ended-", ".compared-"  # beginnings of names in a sweep's directory


class Ended(NamedTuple):
    """How the command that makes a sweep's comparison has come to its end, and what it may still take."""

    was_stopped: bool = False  # before the end of the sweep: another job goes on with it
    left_s: float = math.inf  # seconds until the job's end
    is_told_to_end: Callable[[], bool] = lambda: False  # whether this process is to end at once


AT_ITS_END = Ended()


def made(sweep: str | Path, ends: Sequence[str] = (), page: bool = True, ended: Ended = AT_ITS_END) -> str:
    """Makes the comparison of a sweep in a child process; what that says: the table, and where the page is.

    `ends` has a word for how each cell has ended that was started, in order, where the caller knows it.
    Without `page`, and where the job has little time left, there is the table only. What went wrong is the
    last line of the text.
    """
    left_s = min(ended.left_s, _seconds_to_deadline())
    in_haste = ended.was_stopped or left_s < LIMIT_S
    limit_s = SHORT_LIMIT_S if in_haste else LIMIT_S
    words = ["compare", str(sweep), "--at-end-of", str(os.getpid())]
    words += [word for end in ends for word in ("--end", end)]
    words += [] if page and not in_haste else ["--no-page"]
    # The child writes to a file, and the text is for the terminal of this process.
    width = shutil.get_terminal_size((120, 24)).columns
    environ = {**os.environ, "COLUMNS": str(width)}
    child = at_end.in_child(words, limit_s, ended.is_told_to_end, environ)
    said = child.out.rstrip("\n")
    return f"{said}\n{_not_made(sweep, child.problem)}".lstrip("\n") if child.problem else said


def _seconds_to_deadline() -> float:
    """Seconds until this job is to stop, as its script says; infinity where nobody says it."""
    deadline = os.environ.get("ALLRANKS_DEADLINE", "")
    return int(deadline) - time.time() if deadline.isdecimal() else math.inf


def _not_made(sweep: str | Path, why: str) -> str:
    return f"The comparison is not complete ({why.rstrip('.')}). `allranks compare {sweep}` tries again."


def after_cell(cell: str | Path, end: str, page: bool = True, ended: Ended = AT_ITS_END) -> str:
    """Notes that a cell of a sweep has ended; where all have, makes the comparison and gives its text.

    `end` says in a word how the cell has ended. The text is empty where other cells are still to end, where
    another cell makes the comparison, and for a run of no sweep. Where the sweep's directory cannot be
    written there is no comparison: the text says why. `page` and `ended` are those of made().
    """
    directory = Path(cell).absolute()
    sweep = directory.parent
    names = [name for name, _ in cells_listed(sweep)]
    if directory.name not in names:
        return ""
    try:
        note = f"{secrets.token_hex(8)} {end}"
        files.write_text(sweep / f"{_ENDED}{directory.name}", note).close()
        notes = _notes_of_all(sweep, names)
        if notes is None or not _is_ours_to_make(sweep, notes):
            return ""
    except OSError as error:
        return _not_made(sweep, error.strerror or str(error))
    ends = [note.partition(" ")[2] for note in notes]
    return f"All {len(names)} cells of {sweep} have ended.\n{made(sweep, ends, page, ended)}"


def _notes_of_all(sweep: Path, names: Sequence[str]) -> list[str] | None:
    """The notes that all cells have left at their ends, in order; None where one has not ended: step 2."""
    there = set(os.listdir(sweep))  # noqa: PTH208
    notes: list[str] = []
    for name in names:
        if f"{_ENDED}{name}" in there:
            notes.append((sweep / f"{_ENDED}{name}").read_text())
        elif is_finished(sweep / name):  # by a command that has trained all cells, and left no note
            notes.append("- finished")
        else:
            return None
    return notes


def _is_ours_to_make(sweep: Path, notes: Sequence[str]) -> bool:
    """Whether no other process has set out to compare the cells that have left these notes: step 3."""
    earlier = list(sweep.glob(f"{_COMPARED}*"))
    mark = f"{_COMPARED}{hashlib.sha256(repr(notes).encode()).hexdigest()[:16]}"
    try:
        (sweep / mark).touch(exist_ok=False)
    except FileExistsError:
        return False
    for path in earlier:
        path.unlink(missing_ok=True)
    return True
