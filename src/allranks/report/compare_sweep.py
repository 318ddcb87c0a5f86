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

The comparison is a process of its own, with a limit: whatever happens to it, the sweep's own end is what it
would have been without it.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from allranks.base import files
from allranks.base.text import one_line
from allranks.run.cells import cells_listed, is_finished

LIMIT_S = 180.0  # many times what it takes; a file system that hangs takes for ever
# After a stop the job has little time left, and its script is still to queue the job that goes on.
LIMIT_AFTER_STOP_S = 10.0
_ENDED, _COMPARED = ".ended-", ".compared-"  # beginnings of names in a sweep's directory


def made(sweep: str | Path, ends: Sequence[str] = (), page: bool = True, is_stopped: bool = False) -> str:
    """Makes the comparison of a sweep in a process of its own; what that says: the table, and where the
    page is.

    `ends` has a word for how each cell has ended that was started, in order, where the caller knows it.
    Without `page`, and where the sweep `is_stopped` before its end, there is the table only. What went
    wrong is a line of the text.
    """
    command = [sys.executable, "-m", "allranks", "compare", str(sweep)]
    command += [word for end in ends for word in ("--end", end)]
    command += [] if page and not is_stopped else ["--no-page"]
    limit_s = LIMIT_AFTER_STOP_S if is_stopped else LIMIT_S
    # The process writes to a pipe, and the text is for the terminal of this one.
    width = shutil.get_terminal_size((120, 24)).columns
    try:
        done = subprocess.run(
            command,
            env={**os.environ, "COLUMNS": str(width)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=limit_s,
            check=False,
        )
    except subprocess.TimeoutExpired:
        return _not_made(sweep, f"it took longer than {limit_s:.0f} s")
    except OSError as error:
        return _not_made(sweep, error.strerror or "it could not be started")
    said = done.stdout.rstrip("\n")
    if done.returncode == 0:
        return said
    last_words = one_line((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return f"{said}\n{_not_made(sweep, last_words)}".lstrip("\n")


def _not_made(sweep: str | Path, why: str) -> str:
    return f"The comparison of the sweep was not made ({why}). `allranks compare {sweep}` tries again."


def after_cell(cell: str | Path, end: str, page: bool = True, is_stopped: bool = False) -> str:
    """Notes that a cell of a sweep has ended; where all have, makes the comparison and gives its text.

    `end` says in a word how the cell has ended. The text is empty where other cells are still to end, where
    another cell makes the comparison, and for a run of no sweep. Where the sweep's directory cannot be
    written there is no comparison: the text says why. `page` and `is_stopped` are those of made().
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
    return f"All {len(names)} cells of {sweep} have ended.\n{made(sweep, ends, page, is_stopped)}"


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
