"""Makes the report pages of finished runs in a child process of rank 0, which cannot harm the runs.

Rank 0 starts the child at its own end, when summary.json is written and the ranks no longer communicate.
The child has a low priority and a limited time, and it is ended when rank 0 ends. If the child fails, the
run is not affected: its exit code and its records do not depend on the page.
"""

from __future__ import annotations

import gc
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, NamedTuple

from allranks.base import processes, terminal
from allranks.base.errors import show
from allranks.base.signals import Signals
from allranks.job.identity import RankIdentity

if TYPE_CHECKING:
    from allranks.training.records import Records

# A page of the shipped models takes 3 s on a laptop, and some 20 s where other programs keep its processors
# busy. A model that passes over its test set for minutes gets a page without that part.
LIMIT_S = 60.0
FURTHER_S = 10.0  # added for each further run of a sweep: one child makes the pages of all its runs
# srun may end the last task of a step some time after the first one has ended. Sites that set such a time
# (WaitTime in slurm.conf) set 30 s and more.
SRUN_LIMIT_S = 20.0
# Other runs may still be computing on the same host. The child gives way to them: a niceness above 0 means
# a lower priority.
NICENESS = 10
_LOOK_S = 0.05  # how often rank 0 looks whether the child has ended: much less than a page takes

PAGE = "report.html"  # in the run directory
FOLDER = "report"  # in the run directory, too: the page's pictures
# How the names of the environment variables begin by which MPI recognises one of its ranks. The child must
# not have them: a model or data set that imports MPI there would wait for ranks that have ended.
_OF_MPI = ("PMI", "PALS_", "OMPI_", "MV2_", "MVP_", "MPI_LOCAL")


class Made(NamedTuple):
    """Which pages were made, and what went wrong."""

    pages: Sequence[str]  # the paths of the pages that were made
    problem: str  # a sentence that says why a page is missing or incomplete; empty if all went well


class ToReport(NamedTuple):
    """A run that has ended, and gets its page now."""

    directory: str
    records: Records | None  # where its trackers still wait for the page's pictures


def finish(
    runs: Sequence[ToReport],
    identity: RankIdentity,
    left_s: float,
    signals: Signals,
    is_quiet: bool,
    leaves_mpi: bool = True,
) -> None:
    """Makes the pages of these runs, prints their paths, and hands their pictures to the trackers.

    Rank 0 calls this when its runs have ended. `left_s` is the time until the job's end, in seconds. A page
    is given up when one of the `signals` has come. With `is_quiet` only problems are printed. Without
    `leaves_mpi` this process may have another run afterwards. A page that cannot be made raises no error.
    """
    signals.answer = None  # nothing is left to be saved when a signal comes
    try:
        directories = [run.directory for run in runs]
        _make_and_tell(directories, identity, left_s, lambda: bool(signals.names), is_quiet, leaves_mpi)
    finally:
        for run in runs:
            if run.records is not None:
                run.records.close(pictures_of(run.directory))


def _make_and_tell(
    directories: Sequence[str],
    identity: RankIdentity,
    left_s: float,
    is_stopped: Callable[[], bool],
    is_quiet: bool,
    leaves_mpi: bool,
) -> None:
    from allranks.runtime import mpi
    from allranks.training import control, story

    names = " ".join(directories)
    most_s = limit_s(len(directories), identity)
    if left_s < most_s + control.MARGIN_S:
        show(f"the job ends too soon for a report; later: allranks report {names}")
        return
    # Rank 0 leaves MPI before the pages are made. The other ranks wait until it has left, and a rank that
    # waits in MPI keeps its processor busy.
    if leaves_mpi:
        mpi.leave(0)
    _free_device()
    made = make_pages(directories, most_s, is_stopped, os.environ)
    if not is_quiet:
        for page in made.pages:
            terminal.say(story.pair("report", page))
    if made.problem:
        what = "the report lacks something" if made.pages else "no report was made"
        show(f"{what} ({made.problem.rstrip('.')}): allranks report {names}")


def _free_device() -> None:
    """Gives unused GPU memory that torch keeps in this process back to the GPU: the child may need it."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def pictures_of(directory: str) -> list[Path]:
    """The paths of the PNG pictures in this run's report, sorted; an empty list if there is no report."""
    return sorted((Path(directory) / FOLDER).glob("*.png"))


def limit_s(runs: int, identity: RankIdentity) -> float:
    """How many seconds the pages of `runs` runs may take. Under srun it is less, as SRUN_LIMIT_S says."""
    if identity.is_task_of_srun:
        return SRUN_LIMIT_S
    return LIMIT_S + FURTHER_S * (runs - 1)


def make_pages(
    directories: Sequence[str], most_s: float, is_stopped: Callable[[], bool], environ: Mapping[str, str]
) -> Made:
    """Makes the page of each of these runs in a child process, and waits for it.

    The child is ended after `most_s` seconds, or as soon as `is_stopped` says that this process is to end.
    """
    words = ["report", "--at-end-of", str(os.getpid()), *directories]
    ended = in_child(words, most_s, is_stopped, environ)
    return Made([line for line in ended.out.splitlines() if line.strip()], ended.problem)


class ChildEnd(NamedTuple):
    """What a child process has said, and how it has ended."""

    out: str  # its stdout
    problem: str  # a sentence that says what went wrong in the child; empty if all went well
    has_failed: bool  # whether it has not done its work; it may have a problem all the same if it has


def in_child(
    words: Sequence[str], most_s: float, is_stopped: Callable[[], bool], environ: Mapping[str, str]
) -> ChildEnd:
    """Runs the command `allranks WORDS` in a child process, and waits for it.

    The child is ended after `most_s` seconds, or as soon as `is_stopped` says that this process is to end.
    """
    command = [sys.executable, "-m", "allranks", *words]
    # The child writes into files and not into pipes: nothing reads a pipe while this process waits, and the
    # child would block as soon as the pipe is full.
    try:
        with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=_without_mpi(environ)
            )
            why_ended = _wait(child, most_s, is_stopped)
            told = _text(out)
            said = [line for line in _text(err).splitlines() if line.strip()]
    except OSError as error:  # no room for a process, or for its files: the directory TMPDIR may be gone
        where = f"{error.filename}: " if error.filename else ""
        return ChildEnd("", f"{where}{error.strerror}", has_failed=True)
    if why_ended:
        return ChildEnd(told, why_ended, has_failed=True)
    has_failed = child.returncode != 0
    # The last message of allranks on stderr is the problem. Libraries write there, too, also when all is
    # well: their last line is taken only if the child has failed without a message of allranks.
    ours = [line for line in said if line.startswith("allranks: ")]
    if ours:
        return ChildEnd(told, ours[-1].removeprefix("allranks: "), has_failed)
    if not has_failed:
        return ChildEnd(told, "", has_failed)
    return ChildEnd(told, said[-1] if said else f"exit code {child.returncode}", has_failed)


def become_child(parent: int) -> None:
    """Gives this process a low priority, and has it killed when its parent ends.

    A process that in_child() has started calls this first. `parent` is the process id of its parent.
    """
    processes.die_with_parent(parent, signal.SIGKILL)
    os.nice(NICENESS)


def _wait(child: subprocess.Popen[bytes], most_s: float, is_stopped: Callable[[], bool]) -> str:
    """Waits for the child's end. Returns why this process killed it; empty if it ended by itself."""
    ends_at = time.monotonic() + most_s
    while child.poll() is None:
        if is_stopped():
            _kill(child)
            return "this process was told to end"
        if time.monotonic() > ends_at:
            _kill(child)
            return f"it was not done within {most_s:g} s"
        time.sleep(_LOOK_S)
    return ""


def _kill(child: subprocess.Popen[bytes]) -> None:
    """Kills the child and all processes that it has started, such as the workers that read its data."""
    for pid in processes.descendants(child.pid):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    child.kill()
    child.wait()


def _without_mpi(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without the variables by which MPI recognises one of its ranks."""
    return {name: value for name, value in environ.items() if not name.startswith(_OF_MPI)}


def _text(file: IO[bytes]) -> str:
    """The whole content of the file, from its beginning."""
    file.seek(0)
    return file.read().decode(errors="replace")
