"""Makes the comparison of a sweep automatically when the sweep has ended. No torch.

If one command trains all cells of a sweep, it calls made() at its end.

If each cell is a job of a job array, the jobs end in any order, perhaps two at the same moment, on hosts
that share only the file system. Each job calls after_cell() at its end, and exactly one of them makes the
comparison:

1. The job writes the file `.ended-N` into the sweep's directory, where N is the name of its cell. The file
   says how the cell has ended, and holds a random token that is new each time.
2. The job lists the directory. If some cell has no such file yet, the job leaves the comparison to a cell
   that ends later. A host may keep an old listing of a network file system in its cache, but it drops
   that listing when it changes the directory itself, as in step 1. So the job that is the last to do step 1
   sees the files of all other cells.
3. Several jobs may see all files. Each of them computes the hash X of what all these files hold, which is
   the same for each of them, and tries to create the file `.compared-X`. The file system lets only one job
   create it, and this job makes the comparison. If it does not succeed, for example because it gets a
   signal to end, it removes the file, so that a job that is started again for one of the cells makes the
   comparison.

A cell that has not finished, and is started again later, ends with another token or as a finished one. So X
changes, and the comparison is made anew.

The comparison is made in a child process with a limited time (report/at_end.py). If the child fails, the
exit code and the records of the sweep stay the same.
"""

from __future__ import annotations

import hashlib
import math
import os
import secrets
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from allranks.base import files
from allranks.report import at_end
from allranks.run.cells import is_finished, read_list

# Several times as long as the comparison of 100 runs takes. Without a limit a hanging file system would
# block the end of the sweep.
LIMIT_S = 60.0
# The limit if the job ends soon: its script needs the rest of the time to queue the next job of the sweep.
SHORT_LIMIT_S = 10.0
_ENDED, _COMPARED = ".ended-", ".compared-"  # beginnings of names in a sweep's directory


class Ended(NamedTuple):
    """How the command that makes a sweep's comparison has ended, and how much time it has left."""

    was_stopped: bool = False  # it was stopped before the end of the sweep: another job goes on with it
    left_s: float = math.inf  # seconds until the job's end
    is_told_to_end: Callable[[], bool] = lambda: False  # whether this process must end at once


AT_ITS_END = Ended()


def made(sweep: str | Path, ends: Sequence[str] = (), page: bool = True, ended: Ended = AT_ITS_END) -> str:
    """Makes the comparison of a sweep in a child process. Returns its text: the table and the page's path.

    `ends` has the state in which each started cell has ended, in the order of the cells, if the caller
    knows them. If `page` is False, or if the job ends soon, only the table is made. If something went
    wrong, the last line of the text says what.
    """
    return _text_of(_child(sweep, ends, page, ended), sweep)


def _text_of(child: at_end.ChildEnd, sweep: str | Path) -> str:
    """What the child has printed, and in a last line what went wrong, if anything did."""
    said = child.out.rstrip("\n")
    return f"{said}\n{_not_made(sweep, child.problem)}".lstrip("\n") if child.problem else said


def _child(sweep: str | Path, ends: Sequence[str], page: bool, ended: Ended) -> at_end.ChildEnd:
    """Makes the comparison in a child process, and returns how that has ended; see made()."""
    left_s = min(ended.left_s, _seconds_to_deadline())
    in_haste = ended.was_stopped or left_s < LIMIT_S
    limit_s = SHORT_LIMIT_S if in_haste else LIMIT_S
    words = ["compare", str(sweep), "--at-end-of", str(os.getpid())]
    words += [word for end in ends for word in ("--end", end)]
    words += [] if page and not in_haste else ["--no-page"]
    # The child writes to a file, and the text is for the terminal of this process.
    width = shutil.get_terminal_size((120, 24)).columns
    environ = {**os.environ, "COLUMNS": str(width)}
    return at_end.in_child(words, limit_s, ended.is_told_to_end, environ)


def _seconds_to_deadline() -> float:
    """Seconds until this job must stop, by the variable that its script sets; infinity without it."""
    deadline = os.environ.get("ALLRANKS_DEADLINE", "")
    return int(deadline) - time.time() if deadline.isdecimal() else math.inf


def _not_made(sweep: str | Path, why: str) -> str:
    """What is shown if the comparison could not be made, with the command that tries again."""
    return f"The comparison is not complete ({why.rstrip('.')}). `allranks compare {sweep}` tries again."


def after_cell(cell: str | Path, end: str, page: bool = True, ended: Ended = AT_ITS_END) -> str:
    """Records that a cell of a sweep has ended. If it was the last, makes the comparison; returns the text.

    `end` is the state in which the cell has ended, in one word. The text is empty if other cells have not
    ended yet, if another cell makes the comparison, or if the run belongs to no sweep. If the sweep's
    directory cannot be written, the text says so. `page` says whether the page is made, too, and `ended`
    how much time is left, as in made().
    """
    directory = Path(cell).absolute()
    sweep = directory.parent
    names = [name for name, _ in read_list(sweep)]
    if directory.name not in names:
        return ""
    try:
        note = f"{secrets.token_hex(8)} {end}"
        files.write_text(sweep / f"{_ENDED}{directory.name}", note).close()
        notes = _notes_of_all(sweep, names)
        mark = None if notes is None else _mark_of_ours(sweep, notes)
        if notes is None or mark is None:
            return ""
    except OSError as error:
        return _not_made(sweep, error.strerror or str(error))
    ends = [note.partition(" ")[2] for note in notes]
    is_made = False
    try:
        child = _child(sweep, ends, page, ended)
        is_made = not child.has_failed
    finally:
        if not is_made:
            with suppress(OSError):  # then nothing but `allranks compare` makes it, as the text says
                mark.unlink(missing_ok=True)
    return f"All {len(names)} cells of {sweep} have ended.\n{_text_of(child, sweep)}"


def _notes_of_all(sweep: Path, names: Sequence[str]) -> list[str] | None:
    """The contents of the files `.ended-N` of all cells, in order; None if a cell has not ended.

    This is step 2 of the protocol at the top of this module.
    """
    there = set(os.listdir(sweep))  # noqa: PTH208
    notes: list[str] = []
    for name in names:
        # A finished cell counts as ended, with or without its file. It may be just before step 1, and a
        # command that trains all cells of a sweep leaves no such files. Its token does not count either:
        # else a job that sees the cell finished, and the cell's own job soon after, would both compare.
        if is_finished(sweep / name):
            notes.append("- finished")
        elif f"{_ENDED}{name}" in there:
            notes.append((sweep / f"{_ENDED}{name}").read_text())
        else:
            return None
    return notes


def _mark_of_ours(sweep: Path, notes: Sequence[str]) -> Path | None:
    """The file `.compared-X` if this process was the first to create it, and so makes the comparison.

    It is None if another process makes it, or has made it. This is step 3 of the protocol at the top of
    this module. X is a hash of `notes`, so equal notes are compared once. The marks of earlier comparisons
    are removed.
    """
    earlier = list(sweep.glob(f"{_COMPARED}*"))
    mark = sweep / f"{_COMPARED}{hashlib.sha256(repr(notes).encode()).hexdigest()[:16]}"
    try:
        mark.touch(exist_ok=False)
    except FileExistsError:
        return None
    for path in earlier:
        path.unlink(missing_ok=True)
    return mark
