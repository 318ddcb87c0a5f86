"""Run directories as jobs have them: made and frozen here, listed, and their jobs ended."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from allranks import compose
from allranks import config as configs
from allranks.base import files
from allranks.base.errors import UserError
from allranks.config import Config
from allranks.run import directory as rundir
from allranks.run.claim import Claim

JOB, CELLS = "job.json", "cells.jsonl"


@dataclass(frozen=True)
class Cell:
    """A run: of a sweep, or the only one. `sha256` is that of its config.yaml."""

    directory: str
    config: Config
    overrides: tuple[str, ...]
    sha256: str

    def program(self) -> tuple[str, ...]:
        """What each rank starts."""
        return (sys.executable, "-m", "allranks.train", "--frozen", self.directory, self.sha256)


def composed_cells(arguments: Sequence[str]) -> tuple[str, list[Cell]]:
    """(directory, its cells) of the trainings that the command line asks for; none after --help.

    Several are a sweep: its directory has one for each cell, 0, 1, ... Nothing is made yet.
    """
    composed = compose.cells_from_command_line(arguments)
    if not composed:
        return "", []
    first = composed[0][0]
    given, name = first.run.dir, first.name
    if len(composed) == 1 and not _is_sweep(arguments):
        directory = _absolute(rundir.choose(given, name))
        return directory, [_cell(directory, *composed[0])]
    if any(config.name != name for config, _ in composed):
        name = "sweep"
    above = str(Path(given).parent) if given else None
    known = above is not None and (Path(above) / CELLS).exists()  # a sweep that goes on
    sweep = _absolute(str(above) if known else rundir.choose(above, name))
    return sweep, [_cell(f"{sweep}/{i}", *each) for i, each in enumerate(composed)]


def _cell(directory: str, config: Config, overrides: Sequence[str]) -> Cell:
    sha256 = hashlib.sha256(configs.freeze(config).encode()).hexdigest()
    return Cell(directory, config, tuple(overrides), sha256)


def _is_sweep(arguments: Sequence[str]) -> bool:
    return bool({"-m", "--multirun"} & set(arguments))


def _absolute(directory: str) -> str:
    if not directory.isprintable():
        raise UserError(f"run.dir={directory!r} has control characters: give another one.")
    return str(Path(directory).absolute())


def make_cells(directory: str, found: Sequence[Cell]) -> None:
    """Makes and freezes every cell that is not there from an earlier start."""
    for cell in found:
        standing = rundir.standing(cell.directory, cell.config)
        if standing == rundir.Standing.NEW:
            rundir.create(cell.directory, configs.freeze(cell.config))
        elif standing != rundir.Standing.FINISHED:
            _freeze_anew(cell)
    if found[0].directory != directory:
        with rundir.writing(directory):
            write_cells(directory, found)


def _freeze_anew(cell: Cell) -> None:
    """`checkpoint.`, `threads` and the like may be others now. Raises UserError if the run is under way."""
    path, frozen = Path(cell.directory) / rundir.CONFIG, configs.freeze(cell.config)
    with rundir.writing(cell.directory):
        if path.read_text() == frozen:
            return
        Claim.take(cell.directory).release()
        files.write_text(path, frozen).close()
        if job := read_job(Path(cell.directory) / JOB):  # one that is queued would refuse another file
            files.write_json(Path(cell.directory) / JOB, job | {"config_sha256": cell.sha256})


def write_cells(sweep: str, found: Sequence[Cell], job_ids: Sequence[str | None] = ()) -> None:
    """cells.jsonl: what each cell of a sweep is."""
    lines = [
        json.dumps({"index": i, "overrides": cell.overrides, "directory": cell.directory,
                    "job_id": job_ids[i] if job_ids else None})
        for i, cell in enumerate(found)
    ]  # fmt: skip
    (Path(sweep) / CELLS).write_text("".join(f"{line}\n" for line in lines))


def frozen_cells(directory: str) -> tuple[str, list[Cell]]:
    """The same of a run directory that is there, frozen as it was when a job was submitted for it."""
    absolute = _absolute(directory)
    path, job = Path(absolute) / "config.yaml", read_job(Path(absolute) / JOB)
    if not path.is_file():
        raise UserError(f"{directory} has no config.yaml: give a directory that `allranks` made.")
    sha256 = job.get("config_sha256") or hashlib.sha256(path.read_bytes()).hexdigest()
    config = configs.thaw(absolute, str(sha256))
    return absolute, [Cell(absolute, config, tuple(job.get("overrides", ())), str(sha256))]


def read_job(path: Path) -> dict[str, Any]:
    """What job.json says; nothing where there is none, or it is another program's."""
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({error}): move it away.") from error
    ours = isinstance(found, dict) and isinstance(found.get("job_ids"), list) and "scheduler" in found
    return found if ours else {}


def is_finished(directory: str | Path) -> bool:
    if (Path(directory) / rundir.CONFIG).exists():
        return rundir.is_finished(Path(directory))
    return text_of(Path(directory) / "exit_code") == "0"


def text_of(path: Path) -> str:
    """What the file holds; nothing where it is not there, or has just been taken away."""
    try:
        return path.read_text(errors="replace").strip()
    except FileNotFoundError:
        return ""


# --- `allranks runs` and `allranks cancel` -------------------------------------------------------
