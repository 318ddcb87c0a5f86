"""`allranks compare`: a table of several runs, and a page with their curves. No torch."""

from __future__ import annotations

import argparse
import functools
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

from allranks.base import files
from allranks.base.arguments import with_our_errors
from allranks.base.errors import UserError, show
from allranks.report import at_end, compare_tables, drawing
from allranks.report.compare import NOT_STARTED, Comparison, compare
from allranks.report.gather import RunFacts, gather
from allranks.run.cells import CELLS, read_list, runs_below
from allranks.run.directory import CONFIG
from allranks.run.states import states_of

Format = Callable[[Comparison], str]
FORMATS: dict[str, Format] = {
    "csv": compare_tables.as_csv,
    "json": compare_tables.as_json,
    "markdown": compare_tables.markdown,
}


def main(arguments: Sequence[str]) -> int:
    """Runs `allranks compare` with these arguments and returns its exit code.

    Raises UserError if no run is found, if the options do not fit together, or if a file that --to or
    --page asks for cannot be written.
    """
    options = with_our_errors(_parser()).parse_args(arguments)
    if options.at_end_of is not None:
        at_end.become_child(options.at_end_of)
    chosen = next((name for name in FORMATS if getattr(options, name)), None)
    if options.to and chosen is None:
        raise UserError(f"--to {options.to} needs a format: add --csv, --json or --markdown.")
    found = found_at(options.path)
    if options.end:
        found = found._replace(runs=_with_ends(found.runs, options.end))
    comparison = compare(found.runs, options.sort, options.each)
    comparison = replace(comparison, notes=[*found.notes, *comparison.notes])
    if chosen:
        text = FORMATS[chosen](comparison)
    else:
        text = compare_tables.text(comparison, terminal_width(), plus_minus())
    if options.to:
        _write(Path(options.to), text)
    else:
        print(text, flush=True)
    # A table for programs may go into a pipe, which must not get the page's path as well.
    say = show if chosen else functools.partial(print, flush=True)
    folder = _folder_of_page(options, chosen)
    if folder is not None:
        try:
            page = page_of(comparison, folder, options.path)
            if drawing.is_available():
                say(f"As a page with curves: {page}")
            else:
                show(drawing.MISSING)
                say(f"As a page: {page}")
        except UserError as error:
            if options.page is not None:
                raise
            # The user has not asked for this page with --page. So it is not an error if it cannot be
            # written: the sweep may belong to another user.
            say(f"Without a page: {error}")
    return 0


def page_of(comparison: Comparison, folder: Path, paths: Sequence[str]) -> Path:
    """Writes the page that compares the runs at these paths into the folder, and returns the page's path.

    Raises UserError if the folder cannot be written.
    """
    from allranks.report import compare_page  # needs numpy, and matplotlib where that is installed

    name = Path(paths[0]).absolute().name if len(paths) == 1 else f"{len(comparison.runs)} runs"
    return compare_page.write(comparison, folder, name)


def _folder_of_page(options: argparse.Namespace, chosen: str | None) -> Path | None:
    """The folder for the page; None if no page is to be made.

    It is the folder that --page names. Without --page it is the directory on the command line, if there is
    just one, it is not itself a run, and neither --no-page nor one of the FORMATS is `chosen`.
    """
    if options.page is not None:
        return Path(options.page)
    if options.no_page or chosen is not None or len(options.path) > 1:
        return None
    [folder] = options.path
    return None if files.is_there(Path(folder) / CONFIG) else Path(folder).absolute()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="allranks compare",
        description="Compares runs: in what they differ, how they ended, and what they have come to. Runs "
        "that differ only in their seed are one row: their mean and standard deviation.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "path", nargs="+", metavar="DIR", help="a sweep's directory, or directories of runs"
    )
    parser.add_argument(
        "--sort",
        metavar="KEY",
        help="sort by this figure, or by this key in which the runs differ (default: by the accuracy, else "
        "by the loss, or by the metric of checkpoint.best where that is another one)",
    )
    parser.add_argument(
        "--each", action="store_true", help="show a row for each run, also where only seeds differ"
    )
    one_format = parser.add_mutually_exclusive_group()
    one_format.add_argument("--csv", action="store_true", help="print all figures, for a spreadsheet")
    one_format.add_argument("--json", action="store_true", help="print all figures, for programs")
    one_format.add_argument("--markdown", action="store_true", help="print the table, for a document")
    parser.add_argument("--to", metavar="FILE", help="write that into a file instead of the terminal")
    page = parser.add_mutually_exclusive_group()
    page.add_argument(
        "--page",
        metavar="FOLDER",
        help="put the page, compare.html, and its pictures into this folder (default: for a sweep into its "
        "directory; for single runs no page is made)",
    )
    page.add_argument("--no-page", action="store_true", help="make no page, also for a sweep")
    # Given by the sweep: how each cell that was started has ended, in order. No file tells that.
    parser.add_argument("--end", action="append", default=[], help=argparse.SUPPRESS)
    # Given by the sweep, which is this process's parent (report/compare_sweep.py).
    parser.add_argument("--at-end-of", metavar="PID", type=int, help=argparse.SUPPRESS)
    return parser


def _with_ends(runs: Sequence[RunFacts], ends: Sequence[str]) -> list[RunFacts]:
    """The cells of a sweep in order. `ends` has the states of the first ones; the others keep theirs."""
    told = [replace(run, state=end) for run, end in zip(runs, ends, strict=False)]
    return [*told, *runs[len(told) :]]


# --- which runs ------------------------------------------------------------------------------------------


class Found(NamedTuple):
    """The runs that a command line names."""

    runs: Sequence[RunFacts]
    notes: Sequence[str]  # a sentence for each directory that holds no run


class Place(NamedTuple):
    """Where a run is, or a cell of a sweep that may not have started."""

    directory: Path
    overrides: Sequence[str] | None = None  # of a cell of a sweep, as the sweep's list has them


def found_at(paths: Sequence[str]) -> Found:
    """The runs at the paths. Each path is a run's directory, a sweep's directory, or a folder above runs.

    Raises UserError if there is no run at any of them.
    """
    notes: list[str] = []
    places: dict[Path, Place] = {}  # by directory, so that a run that is named twice appears once
    for path in paths:
        try:
            for place in _places(path):
                places.setdefault(place.directory, place)
        except UserError as error:
            notes.append(str(error))

    # The states of all runs are asked for in one call, so that the scheduler is asked once.
    states = states_of(list(places), notes.append)
    runs = []
    for place in places.values():
        try:
            runs.append(_facts(place, states[place.directory].words))
        except UserError as error:
            notes.append(str(error))
    if not runs:
        raise UserError(" ".join(notes))
    return Found(runs, notes)


def _places(path: str) -> list[Place]:
    """Where the runs at one path are. Raises UserError if the path is not a directory that can be read."""
    folder = Path(path).absolute()
    try:
        if (folder / CELLS).is_file():
            return [Place(folder / name, overrides) for name, overrides in read_list(folder)]
        is_folder = folder.is_dir()
        is_run = (folder / CONFIG).exists()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): give a sweep's directory, or directories of runs."
        ) from error
    if not is_folder:
        raise UserError(f"{path} is no folder: give a sweep's directory, or directories of runs.")
    below = [] if is_run else sorted(runs_below(folder))
    trainings = [Place(each) for each in below if files.is_there(each / CONFIG)]
    return trainings or [Place(folder)]


def _facts(place: Place, state: str) -> RunFacts:
    """Reads the run at this place. A cell of a sweep counts as a run even if its directory cannot be read.

    Raises UserError if there is no run, and no sweep that lists it as a cell.
    """
    try:
        return gather(place.directory, state)
    except UserError as error:
        if place.overrides is None:
            raise
        if _is_missing(place.directory):
            return RunFacts(place.directory, NOT_STARTED, overrides=place.overrides)
        return RunFacts(place.directory, "damaged", overrides=place.overrides, problems=[str(error)])


def _is_missing(directory: Path) -> bool:
    """Whether there is no such directory; False for one that this user may not look at."""
    try:
        directory.stat()
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


# --- where it goes ---------------------------------------------------------------------------------------


def terminal_width() -> int:
    """Characters in a line of the terminal, or as many as COLUMNS says; 120 for a file or a pipe."""
    return shutil.get_terminal_size((120, 24)).columns


def plus_minus() -> str:
    """The sign between a mean and its standard deviation: `±`, or `+-` if stdout cannot encode that."""
    try:
        "±".encode(sys.stdout.encoding or "ascii")
    except (UnicodeEncodeError, LookupError):
        return "+-"
    return "±"


def _write(path: Path, text: str) -> None:
    """Writes the table into the file that --to names. Raises UserError if that fails."""
    try:
        files.write_text(path, text + "\n").close()
    except OSError as error:
        raise UserError(f"--to {path} cannot be written ({error.strerror}): give another file.") from error
