"""How far a program of the user's own has come, over all of its jobs: progress.json in its directory.

A training of ours has checkpoints, whose names tell its step. Of another program it is known how often it
has called `allranks.heartbeat()` and `allranks.should_stop()`, and how many steps a loop by
`allranks.open()` has taken. A job that stops in time is followed by another one only if it has gained
something.
"""

from __future__ import annotations

import json
from pathlib import Path

from allranks.base import files

NAME = "progress.json"


def read(directory: str | Path) -> int:
    """The number of calls in all jobs so far; 0 where there is no such file, or one that says nothing."""
    try:
        return int(json.loads((Path(directory) / NAME).read_text())["calls"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def add(directory: str | Path, calls: int) -> None:
    """Notes that the program has made so many calls more. A program that makes none gets no file.

    Raises OSError if the file cannot be written.
    """
    if calls:
        files.write_json(Path(directory) / NAME, {"calls": read(directory) + calls})
