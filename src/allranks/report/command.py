"""`allranks report`: the page of a run, report.html, with its pictures as files beside it.

The page is made in two steps. The first step uses only the run's records: it takes a second or two and
works for any run. The second step loads the trained model, applies it to the test set, and writes the page
again with these results. Model and data may be a user's own code, which may fail or hang: then the page of
the first step remains.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from allranks.base import files
from allranks.base.arguments import with_our_errors
from allranks.base.errors import UserError, show
from allranks.config import CLASSIFICATION
from allranks.report import at_end, compare_command, drawing, pictures
from allranks.report.at_end import FOLDER, PAGE
from allranks.report.compare import compare, directory_names
from allranks.report.drawing import Picture
from allranks.report.examine import Examined
from allranks.report.gather import RunFacts, gather
from allranks.report.page import page
from allranks.runtime import lean

SHIPPED_TASKS = "allranks.tasks."  # how the names of the tasks begin that allranks has itself
PASS_NOT_ENDED = "The test set's part is missing: the pass of the model over it has not come to its end."


def main(arguments: Sequence[str]) -> int:
    """Runs `allranks report` with these arguments and returns its exit code.

    Raises UserError if a directory has nothing of a run, or if the page cannot be written.
    """
    parser = argparse.ArgumentParser(
        prog="allranks report",
        description="Makes a page of a run, report.html in its directory, and its pictures as PNG and SVG "
        "in report/ beside it. The run may be finished, at work or cut off. For several runs it also makes "
        "a page that compares them, compare.html, in the present folder.",
    )
    parser.add_argument("run", metavar="RUN", nargs="+", help="the directory of a run")
    parser.add_argument(
        "--to",
        metavar="FOLDER",
        help="where the page is put (default: the run's directory); of several runs, the comparison",
    )
    parser.add_argument(
        "--device", help="what the model computes on: auto, cuda, xpu, mps or cpu (default: the run's own)"
    )
    parser.add_argument(
        "--records-only", action="store_true", help="leave out the pass of the model over the test set"
    )
    # Given by the run itself, which is this process's parent (report/at_end.py).
    parser.add_argument("--at-end-of", metavar="PID", type=int, help=argparse.SUPPRESS)
    options = with_our_errors(parser).parse_args(arguments)
    if options.at_end_of is not None:
        at_end.become_child(options.at_end_of)
    for run, folder in _folders(options.run, options.to):
        path = report(run, folder, options.device, passes=not options.records_only)
        print(path, flush=True)
    # At the end of a sweep there is nothing to compare here: the sweep makes its comparison itself.
    if len(options.run) > 1 and options.at_end_of is None:
        comparison = compare(compare_command.found_at(options.run).runs)
        print(compare_command.page_of(comparison, Path(options.to or "."), options.run), flush=True)
    return 0


def _folders(runs: Sequence[str], to: str | None) -> list[tuple[Path, Path]]:
    """Each run's directory with the folder for its page.

    Without --to the page goes into the run's directory. With --to a single run's page goes into that
    folder, and each of several runs gets a folder of its own below it. The folder has the run's name, with
    as many of the folders above it as tell `a/0` from `b/0`.
    """
    if to is None:
        return [(Path(run), Path(run)) for run in runs]
    if len(runs) == 1:
        return [(Path(runs[0]), Path(to))]
    whole_paths = [Path(os.path.abspath(run)) for run in runs]  # noqa: PTH100 - this one takes `..` away
    names = directory_names(whole_paths)
    return [(Path(run), Path(to) / names[path]) for run, path in zip(runs, whole_paths, strict=True)]


def report(run: Path, folder: Path, device: str | None = None, passes: bool = True) -> Path:
    """Makes the page of a run in `folder` and returns its path; says on stderr what the page lacks.

    `device` is what the model computes on during the pass over the test set, as in the key `device`; None
    stands for the run's own. If `passes` is False, or if the run is not a classification, the model is not
    loaded and there is no such pass.
    Raises UserError if `run` holds no run, or if the page cannot be written.
    """
    facts = gather(run)
    notes: list[str] = []
    drawn: list[Picture] = []
    has_pictures = drawing.is_available()
    if has_pictures:
        drawn = pictures.of_run(facts)
    else:
        notes.append(drawing.MISSING)
    if not (passes and _can_be_examined(facts)):
        path = _write(folder, facts, drawn, notes)
        _say(notes)
        return path

    _write(folder, facts, drawn, [*notes, PASS_NOT_ENDED])
    from allranks.report.examine import examine

    seen = None
    try:
        seen = examine(run, device)
        notes += seen.remarks
    except UserError as error:
        notes.append(f"There are no figures of the test set by class, and no examples. {error}")
    if seen is not None and has_pictures:
        drawn += pictures.of_test(seen)
    path = _write(folder, facts, drawn, notes, seen)
    _say(notes)
    return path


def _can_be_examined(facts: RunFacts) -> bool:
    """Whether a pass of the model over the test set can be shown: the run is a classification.

    Its confusion matrix and its mistakes are shown, and other tasks have none. A configuration without a
    model belongs to a program of the user's own. If the configuration or the task's code cannot be read,
    the answer is True: the attempt then shows the user what is wrong.
    """
    if not facts.config:
        return True
    if "model._target_" not in facts.config:
        return False
    task = str(facts.config.get("task._target_", CLASSIFICATION))  # earlier versions had no other task
    if task.startswith(SHIPPED_TASKS):
        return task == CLASSIFICATION
    # A task of the user's own may be a subclass of Classification.
    with lean.quick_import():  # torch is imported here
        from allranks.components import locate
        from allranks.tasks import is_classification
    try:
        return is_classification(locate("task", task))
    except UserError:
        return True  # the task's code is not found here: the attempt to use it says so


def _write(
    folder: Path,
    facts: RunFacts,
    drawn: Sequence[Picture],
    notes: Sequence[str],
    seen: Examined | None = None,
) -> Path:
    """Writes the page and the pictures into the folder and returns the page's path.

    Raises UserError if one of them cannot be written.
    """
    path = folder / PAGE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        drawing.write(folder / FOLDER, drawn)
        files.write_text(path, page(facts, seen, drawn, notes)).close()
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): give another folder with --to FOLDER."
        ) from error
    return path


def _say(notes: Sequence[str]) -> None:
    """Writes the sentences on what the page lacks to stderr. They stand in the page, too."""
    for note in notes:
        show(note)
