"""A server that forks the processes of trainings, for tests that are not about how a process is started.

To import torch takes a process longer than all the rest of a small training. This one has imported what
every training imports, and has done nothing else; each rank is a fork of it, with arguments, environment,
directory, output and session of its own, and runs a module or a text as `python -m` or `python -c` does.

It serves one program at a time: it reads a line of JSON from its stdin (`Request`), and answers it by a
line on its stdout when all processes of that program are over. Its end is the end of its stdin.
`helpers.execute_forked` is its client.
"""

from __future__ import annotations

import atexit
import gc
import importlib
import json
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
from typing import NamedTuple

OTHERS_S = 30.0  # how long the other ranks may take to end after the first one that failed
LEFT_S = 5.0  # how long the ranks' own processes may take to end after the ranks
# What each training imports, by itself or by what it calls first.
IMPORTED = (
    "hydra.main", "allranks.compose", "allranks.components", "allranks.data.loader",
    "allranks.data.synthetic", "allranks.runtime.bringup", "allranks.runtime.native",
    "allranks.own.opening", "allranks.training.engine", "allranks.training.records",
    "allranks.training.report", "allranks.training.saver", "allranks.training.story",
    "allranks.training.trial",
)  # fmt: skip


class Request(NamedTuple):
    """A program: a process for each environment. Rank N writes the files N.out and N.err in `output`."""

    words: list[str]  # what would follow `python`: -m MODULE or -c TEXT, and the arguments
    environments: list[dict[str, str]]
    cwd: str
    output: str
    within_s: float


class Answer(NamedTuple):
    """How it went: the exit code of the first rank that failed, or 0, and what outlived the ranks."""

    code: int
    is_late: bool  # it was ended here, because it took longer than it may
    left: list[str]  # command lines


def import_all() -> None:
    """Imports what trainings need, as they do it themselves: without torch's compiler."""
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    gc.disable()
    from allranks.runtime import lean

    lean.keep_compiler_out()
    for name in IMPORTED:
        importlib.import_module(name)
    gc.freeze()
    gc.enable()


def run(request: Request, rank: int) -> int:
    """What a fork does: the program of one rank. Returns the exit code."""
    os.setsid()
    os.environ.clear()
    os.environ.update(request.environments[rank])
    os.chdir(request.cwd)
    tempfile.tempdir = None  # TMPDIR may be another one
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, f"{request.output}/{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, f"{request.output}/{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        opened = os.open(name, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    more = [folder for folder in os.environ.get("PYTHONPATH", "").split(os.pathsep) if folder]
    sys.path[:1] = [request.cwd, *more]
    how, what, *arguments = request.words
    sys.argv = [how if how == "-c" else what, *arguments]
    sys.orig_argv = [sys.executable, *request.words]
    code: object = 0
    try:
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            exec(compile(what, "<string>", "exec"), {"__name__": "__main__"})
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:  # noqa: BLE001  as Python itself does it
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does at its end
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    return code if isinstance(code, int) else int(code is not None)


def serve(request: Request) -> Answer:
    """Forks the ranks of a program, and waits for their end."""
    ranks = set()
    for rank in range(len(request.environments)):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                code = run(request, rank)
            finally:
                os._exit(code)
        ranks.add(pid)
    code, deadline, is_late = 0, time.monotonic() + request.within_s, False
    while ranks:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid in ranks:
            ranks.remove(pid)
            if not code:
                code = os.waitstatus_to_exitcode(status)
                deadline = min(deadline, time.monotonic() + OTHERS_S) if code else deadline
        elif pid == 0:
            time.sleep(0.002)
            if time.monotonic() > deadline:
                is_late = True
                _kill(_children())
                deadline += LEFT_S
    return Answer(code, is_late, _left())


def _left() -> list[str]:
    """Ends what the ranks have left, and gives the command lines of what took too long to end by itself."""
    deadline = time.monotonic() + LEFT_S
    left: dict[int, str] = {}
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return list(left.values())
        if pid == 0:
            time.sleep(0.002)
            if time.monotonic() > deadline:
                left |= _children()
                _kill(left)


def _children() -> dict[int, str]:
    """The processes below this one, with their command lines."""
    from allranks.base import processes

    found = {}
    for pid in processes.descendants(os.getpid()):
        with open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123
            found[pid] = file.read().replace(b"\0", b" ").decode(errors="replace")
    return found


def _kill(pids: dict[int, str]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever a module prints while it is imported is no answer
    from allranks.base import processes

    processes.adopt_orphans()  # of what a rank leaves behind
    import_all()
    for line in sys.stdin:
        answers.write(json.dumps(serve(Request(**json.loads(line)))._asdict()) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
