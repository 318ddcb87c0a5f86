"""Cells: the trainings that one command line asks for, each with a run directory of its own.

A command line without `-m` asks for one. A sweep (`-m`) asks for several: its directory has one below it
for each cell, named 0, 1, ..., and a list of them, cells.jsonl. `allranks launch` and `allranks submit`
compose all cells before anything is written, make their directories, and freeze in each the configuration
that its ranks will read. The record of a cell's jobs, job.json, is read here and written by
allranks.submit."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
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

JOB = "job.json"  # in a run directory: the jobs that were queued for it, and what they were asked for
METRICS = "metrics.jsonl"  # in a run directory: a line of figures for each epoch
CELLS = "cells.jsonl"  # in a sweep's directory: a line for each cell
# How often to try to write a job's id into cells.jsonl, which other cells write at the same time.
MOST_TRIES = 5


@dataclass(frozen=True)
class Cell:
    """A run, alone or one of a sweep.

    Ranks read its config.yaml only if that has this `sha256`, so that a file that was changed meanwhile is
    noticed.
    """

    directory: str
    config: Config
    overrides: tuple[str, ...]
    sha256: str

    def program(self) -> tuple[str, ...]:
        """The command that each rank starts.

        The overrides at its end are not read again: environment.json keeps a run's command, and a report
        says by it what was given.
        """
        frozen = ("--frozen", self.directory, self.sha256)
        return (sys.executable, "-m", "allranks.train", *frozen, *self.overrides)


def cells_of_command_line(arguments: Sequence[str]) -> tuple[str, list[Cell]]:
    """(directory, cells) of the trainings that a command line asks for; no cells after --help.

    Composes the configurations. The directory of a sweep is the one above those of its cells. Nothing is
    written yet. Raises UserError for a configuration that is not valid, and for a directory that cannot be
    used.
    """
    return with_directories(compose.cells_from_command_line(arguments), is_sweep=_is_sweep(arguments))


def with_directories(
    composed: Sequence[tuple[Config, Sequence[str]]], is_sweep: bool
) -> tuple[str, list[Cell]]:
    """(directory, cells) of trainings that have been composed, each with its own overrides.

    Chooses the directory of each, and writes nothing. Raises UserError for a directory that cannot be used.
    """
    if not composed:
        return "", []
    first = composed[0][0]
    name = first.name
    if len(composed) == 1 and not is_sweep:
        directory = compose.whole_run_dir(rundir.choose(first.run.dir, name))
        return directory, [_cell(directory, *composed[0])]

    if any(config.name != name for config, _ in composed):
        name = "sweep"
    # Composing a sweep with run.dir=DIR gives its trainings DIR/0, DIR/1, ...: the sweep's own is DIR.
    sweep = str(Path(first.run.dir).parent) if first.run.dir else None
    if sweep is None or not (Path(sweep) / CELLS).exists():
        # A sweep that was started before, and goes on, is not looked at by choose(): its directory is used,
        # and has no config.yaml of its own.
        sweep = rundir.choose(sweep, name)
    sweep = compose.whole_run_dir(sweep)
    return sweep, [_cell(f"{sweep}/{i}", *each) for i, each in enumerate(composed)]


def _cell(directory: str, config: Config, overrides: Sequence[str]) -> Cell:
    sha256 = hashlib.sha256(configs.freeze(config).encode()).hexdigest()
    return Cell(directory, config, tuple(overrides), sha256)


def _is_sweep(arguments: Sequence[str]) -> bool:
    return bool({"-m", "--multirun"} & set(arguments))


def make_cells(directory: str, found: Sequence[Cell]) -> None:
    """Makes the directories of the cells in `directory`, each with its configuration frozen in it.

    A cell that is there from an earlier start stays; if it is not finished, its configuration is frozen
    anew. Raises UserError if that is another configuration's run, or one that is under way.
    """
    for cell in found:
        decisive = configs.decisive_values(cell.config)
        standing = rundir.standing(cell.directory, decisive, cell.config.resume)
        if standing == rundir.Standing.NEW:
            rundir.create(cell.directory, configs.freeze(cell.config))
        elif standing != rundir.Standing.FINISHED:
            _freeze_anew(cell)
    if found[0].directory != directory:
        with rundir.writing(directory):
            write_list(directory, found)


def _freeze_anew(cell: Cell) -> None:
    """Freezes values that a resume may change, such as `threads` and those below `checkpoint.`, once more.

    Raises UserError if the run is under way: its ranks would read two configurations.
    """
    path = Path(cell.directory) / rundir.CONFIG
    frozen = configs.freeze(cell.config)
    with rundir.writing(cell.directory):
        if path.read_text() == frozen:
            return
        # The directory is ours until the file is written: another launch cannot begin with the old one.
        claim = Claim.take(cell.directory)
        try:
            files.write_text(path, frozen).close()
            # A job that is queued for this run starts it only if config.yaml has the sha256 in job.json.
            job = read_job(Path(cell.directory) / JOB)
            if job:
                files.write_json(Path(cell.directory) / JOB, job | {"config_sha256": cell.sha256})
        finally:
            claim.release()


# --- cells.jsonl, the list of a sweep's cells ---------------------------------------------------------


def write_list(sweep: str, found: Sequence[Cell], job_ids: Sequence[str | None] = ()) -> None:
    """Writes cells.jsonl: index, overrides, directory and job id of each of these cells of a sweep.

    A list that is there keeps its other cells, as of an earlier start with more values, and the job ids of
    cells that have no new one. `job_ids` has an id, or None, for each of the cells; empty stands for no
    ids. Raises OSError if the list cannot be read or written.
    """
    path = Path(sweep) / CELLS
    before = {_name_of(about): about for about in _lines_of(path)}
    after = dict(before)
    for index, cell in enumerate(found):
        name = Path(cell.directory).name
        new_id = job_ids[index] if job_ids else None
        after[name] = {
            "index": index,
            "overrides": list(cell.overrides),
            "directory": cell.directory,
            "job_id": new_id or before.get(name, {}).get("job_id"),
        }
    if after != before:
        _write_lines(path, list(after.values()))


def read_list(sweep: str | Path) -> list[tuple[str, list[str]]]:
    """(name of its directory, overrides) of each cell in a sweep's cells.jsonl, in order.

    Lines that say something else are passed over. The list has whole paths, and the sweep may have been
    moved since: the names are below `sweep`.
    """
    found = []
    for about in _lines_of(Path(sweep) / CELLS):
        overrides = about.get("overrides")
        words = [str(word) for word in overrides] if isinstance(overrides, list) else []
        found.append((_name_of(about), words))
    return found


def note_job(directory: str, job_id: str) -> None:
    """Writes the newest job of a cell into cells.jsonl of its sweep; does nothing for a run of no sweep.

    Cells that stop at the same time write the list at the same time, and one may then put back what
    another has just replaced. So each reads the list again after it has written, and repeats that a few
    times. This makes a lost id rare, not impossible: the file is for people and for `allranks compare`, and
    what is done with jobs is decided by job.json, which each cell has for itself.
    """
    cell = Path(directory)
    path = cell.parent / CELLS
    for _ in range(MOST_TRIES):
        lines = _lines_of(path)
        mine = [about for about in lines if _name_of(about) == cell.name]
        if all(about.get("job_id") == job_id for about in mine):
            return
        for about in mine:
            about["job_id"] = job_id
        _write_lines(path, lines)


def _lines_of(path: Path) -> list[dict[str, Any]]:
    """The lines of a cells.jsonl that name a cell's directory, in order; none where the file is missing."""
    found = []
    for line in text_of(path).splitlines():
        try:
            about = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(about, dict) and isinstance(about.get("directory"), str):
            found.append(about)
    return found


def _name_of(about: Mapping[str, Any]) -> str:
    """The name of a cell's directory, by its line of cells.jsonl. No other cell of the sweep has it."""
    return Path(about["directory"]).name


def _write_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    files.write_text(path, "".join(json.dumps(about) + "\n" for about in lines)).close()


# --- runs that are there ------------------------------------------------------------------------------


def runs_below(root: str | Path) -> Iterator[Path]:
    """The directories of runs below a folder, in no order, the folder itself included.

    A run whose config.yaml is gone is known by its figures. A folder that vanishes meanwhile, as
    checkpoints do, is passed over. A link to a run or to a sweep stands for it, for example if it was moved
    to another file system. No run is named twice.
    """
    files_of_run = (rundir.CONFIG, JOB, METRICS)
    links: list[Path] = []
    seen: set[Path] = set()
    for folder, below, names in os.walk(root):
        if CELLS not in names and set(files_of_run).intersection(names):
            below.clear()
            seen.add(Path(folder).resolve())
            yield Path(folder)
        links += [Path(folder) / name for name in below if (Path(folder) / name).is_symlink()]
    # Other links are not followed: one may lead to a whole home directory, or back to where it is.
    for link in sorted(links):
        with contextlib.suppress(OSError):  # a link to where this user may not look
            below_link = sorted(link.iterdir()) if (link / CELLS).is_file() else [link]
            for directory in below_link:
                is_run = any((directory / name).is_file() for name in files_of_run)
                if is_run and directory.resolve() not in seen:
                    seen.add(directory.resolve())
                    yield directory


def frozen_cells(directory: str) -> tuple[str, list[Cell]]:
    """(directory, its one cell) of a run directory that is there, with the configuration frozen in it.

    Raises UserError if there is none, and if it is not the file that a job was submitted for.
    """
    absolute = compose.whole_run_dir(directory)
    path = Path(absolute) / rundir.CONFIG
    job = read_job(Path(absolute) / JOB)
    if not path.is_file():
        raise UserError(f"{directory} has no config.yaml: give a directory that `allranks` made.")
    sha256 = job.get("config_sha256") or hashlib.sha256(path.read_bytes()).hexdigest()
    config = configs.thaw(absolute, str(sha256))
    return absolute, [Cell(absolute, config, tuple(job.get("overrides") or ()), str(sha256))]


def read_job(path: Path) -> dict[str, Any]:
    """What a job.json says; empty if there is none, or where it is another program's.

    Its ids are texts, whatever the file makes of them. Raises UserError if it cannot be read.
    """
    try:
        found = json.loads(path.read_text())
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read ({error}): move it away.") from error
    ours = isinstance(found, dict) and isinstance(found.get("job_ids"), list) and "scheduler" in found
    return {**found, "job_ids": [str(job_id) for job_id in found["job_ids"]]} if ours else {}


def is_finished(directory: str | Path) -> bool:
    """Whether nothing is left to do there: a training has its summary, another program has ended with 0."""
    if files.is_there(Path(directory) / rundir.CONFIG):
        return rundir.is_finished(Path(directory))
    return text_of(Path(directory) / "exit_code") == "0"


def text_of(path: Path) -> str:
    """What a file holds, without blanks around it; empty if there is no file."""
    try:
        return path.read_text(errors="replace").strip()
    except (FileNotFoundError, NotADirectoryError):
        return ""
