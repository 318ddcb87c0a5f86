"""Has the pages of finished runs made by a process that cannot harm the runs, at the end of rank 0.

The process that makes the pages is a child of rank 0. It starts once summary.json is written and the ranks
have taken leave of each other, has a low priority and a limited time, and ends with rank 0. Whatever
becomes of it, the run stays as it is: its exit code and its records do not depend on the page.
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
from typing import IO, NamedTuple

from allranks.base import processes
from allranks.base.errors import show
from allranks.job.identity import RankIdentity

# A page of the shipped models takes 3 s on a laptop, and some 20 s where other programs keep its processors
# busy. A model that passes over its test set for minutes gets a page without that part.
LIMIT_S = 60.0
FURTHER_S = 10.0  # for each further run of a sweep, whose pages one process makes
# srun may end the last task of a step some time after the first one has ended. Sites that set such a time
# (WaitTime in slurm.conf) set 30 s and more.
SRUN_LIMIT_S = 20.0
# Beside a run that has ended others may be at work on the same host: they come first.
NICENESS = 10
_LOOK_S = 0.05  # between two looks at the process: much less than a page takes

PAGE = "report.html"  # in the run directory
FOLDER = "report"  # beside it: the page's pictures
# By the names of variables that make a process one of an MPI job's ranks. A model or data set that imports
# MPI in the child would wait for ranks that are gone.
_OF_MPI = ("PMI", "PALS_", "OMPI_", "MV2_", "MVP_", "MPI_LOCAL")


class Made(NamedTuple):
    """What has become of the pages."""

    pages: Sequence[str]  # the paths of those that were made
    problem: str  # why one was not made, or lacks something: a sentence; empty where all is well


def finish(
    directories: Sequence[str],
    identity: RankIdentity,
    left_s: float,
    is_stopped: Callable[[], bool],
    is_quiet: bool,
) -> None:
    """Has the pages of these runs made, and says where they are; rank 0 calls when its runs have ended.

    `left_s`: seconds until the job's end. `is_stopped` says whether this process is to end. With `is_quiet`
    only problems are told. Never raises for what happens to a page.
    """
    from allranks.runtime import mpi
    from allranks.training import control, story

    names = " ".join(directories)
    most_s = limit_s(len(directories), identity)
    if left_s < most_s + control.MARGIN_S:
        show(f"the job ends too soon for a report; later: allranks report {names}")
        return
    mpi.leave(0)  # the other ranks wait for that, and keep their processors busy
    _free_device()
    made = make_pages(directories, most_s, is_stopped, os.environ)
    for page in made.pages if not is_quiet else ():
        print(story.pair("report", page), flush=True)
    if made.problem:
        what = "the report lacks something" if made.pages else "no report was made"
        show(f"{what} ({made.problem.rstrip('.')}): allranks report {names}")


def _free_device() -> None:
    """Gives back the memory of a GPU that this process keeps for further use: the page may need some."""
    import torch

    if torch.cuda.is_available() and torch.cuda.is_initialized():
        gc.collect()
        torch.cuda.empty_cache()


def pictures_of(directory: str) -> list[Path]:
    """The pictures of the page of the run in this directory, as PNG files; none where it has no page."""
    return sorted((Path(directory) / FOLDER).glob("*.png"))


def limit_s(runs: int, identity: RankIdentity) -> float:
    """How many seconds the pages of so many runs may take under this launcher."""
    if identity.launcher == "slurm" and not identity.alone:
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
    problem: str  # why it did not come to its end, or what it lacks: a sentence; empty where all is well


def in_child(
    words: Sequence[str], most_s: float, is_stopped: Callable[[], bool], environ: Mapping[str, str]
) -> ChildEnd:
    """Runs the command `allranks WORDS` in a child process, and waits for it.

    The child is ended after `most_s` seconds, or as soon as `is_stopped` says that this process is to end.
    """
    command = [sys.executable, "-m", "allranks", *words]
    # Files, not pipes: nobody would read a pipe while we wait, and a full one would hold the child up.
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            child = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, env=_without_mpi(environ)
            )
        except OSError as error:
            return ChildEnd("", f"{error.strerror}")
        why_ended = _wait(child, most_s, is_stopped)
        told = _text(out)
        said = [line for line in _text(err).splitlines() if line.strip()]
    if why_ended:
        return ChildEnd(told, why_ended)
    # Libraries say things of their own on stderr: only where the child has failed the last of them counts.
    ours = [line for line in said if line.startswith("allranks: ")]
    telling = ours or (said if child.returncode else [])
    fallback = f"exit code {child.returncode}" if child.returncode else ""
    return ChildEnd(told, telling[-1].removeprefix("allranks: ") if telling else fallback)


def become_child(parent: int) -> None:
    """Makes this process one that in_child() has started: it has a low priority, and ends with its parent.

    `parent` is the process id of the one that has started it.
    """
    processes.die_with_parent(parent, signal.SIGKILL)
    os.nice(NICENESS)


def _wait(child: subprocess.Popen[bytes], most_s: float, is_stopped: Callable[[], bool]) -> str:
    """Waits for the child's end. Why it was ended by us; empty where it has ended by itself."""
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
    """Ends the child and the processes that read data for it."""
    for pid in processes.descendants(child.pid):
        with suppress(ProcessLookupError, PermissionError):
            os.kill(pid, signal.SIGKILL)
    child.kill()
    child.wait()


def _without_mpi(environ: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environ.items() if not name.startswith(_OF_MPI)}


def _text(file: IO[bytes]) -> str:
    """All that the file holds."""
    file.seek(0)
    return file.read().decode(errors="replace")
