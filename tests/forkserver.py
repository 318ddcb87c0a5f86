"""A server that forks the processes of trainings, for tests that are not about how a process is started.

To import torch takes a process longer than all the rest of a small training. This one has imported what
trainings import, has composed one configuration, and has drawn the digits that most of them train on. Each
process that it forks has arguments, environment, directory, output and session of its own, and runs a
module or a text as `python -m` or `python -c` does.

It is started with a path, and listens at a Unix socket of that path. Its end is the end of its stdin. Any
number of programs may run at once. Two kinds of clients ask for them, each by a line of JSON:

- `helpers.execute_forked` asks for all ranks of a program (`Request`), and gets an `Answer` when all
  processes of that program are over.
- tests/forkclient.py asks for a single process. It takes the place of `python` on the command lines of real
  launchers.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import sys
import tempfile
import threading
import time
import types
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

OTHERS_S = 30.0  # how long the other ranks may take to end after the first one that failed
LEFT_S = 5.0  # how long the ranks' own processes may take to end after the ranks
AWAY = 256  # no program under test is given a file of this number, or of a higher one
# What each training imports, by itself or by what it calls first. Only one that is spread over its ranks
# imports FSDP, and with it torch's compiler, which all others do without: these have a server of their own,
# to which this variable of the environment names the modules that it imports as well.
MORE = "FORKSERVER_IMPORTS"
IMPORTED = (
    "hydra.main", "allranks.compose", "allranks.components", "allranks.data.loader",
    "allranks.data.synthetic", "allranks.models", "allranks.runtime.bringup",
    "allranks.runtime.native", "allranks.own.opening", "allranks.training.engine",
    "allranks.training.records", "allranks.training.report", "allranks.training.saver",
    "allranks.training.story", "allranks.training.trial", "safetensors.torch",
    "torch.distributed.run",
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


def remember_digits() -> None:
    """From here on, this process and its forks draw the digits of data=synthetic once for each request.

    Nearly every training here begins with the same 1,600 and 400 digits (`helpers.SMALL`), and to draw them
    takes a fifth of its processor time. They follow from the arguments alone. Each caller gets a copy.
    """
    from allranks.data import synthetic

    drawn = functools.lru_cache(maxsize=8)(synthetic.generate)

    @functools.wraps(synthetic.generate)
    def generate(count: int, part: str, seed: int = 0) -> tuple[Any, Any]:
        images, labels = drawn(count, part, seed)
        return images.copy(), labels.copy()

    synthetic.generate = generate


def import_all() -> None:
    """Imports what trainings need, as they do themselves: without the compiler, unless MORE names it."""
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    gc.disable()
    from allranks.runtime import lean

    more = os.environ.get(MORE, "").split()
    if lean.NAME in more:
        importlib.import_module(lean.NAME)  # before anything stands in for it
    lean.keep_compiler_out()
    for name in (*IMPORTED, *more):
        importlib.import_module(name)
    from allranks.data import synthetic

    remember_digits()
    for count, part in ((1600, "train"), (400, "test")):
        synthetic.generate(count, part)
    # Hydra looks for its plugins, and builds the tables of its parser, at the first configuration.
    from allranks.compose import from_command_line

    from_command_line(["data=synthetic"])
    gc.freeze()
    gc.enable()


def run(request: Request, rank: int) -> int:
    """What the fork for a rank does: the program. Returns the exit code."""
    os.setsid()
    os.closerange(3, AWAY)  # the connection to the client, which is none of the program's files
    for number, name, flags in (
        (0, os.devnull, os.O_RDONLY),
        (1, f"{request.output}/{rank}.out", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
        (2, f"{request.output}/{rank}.err", os.O_WRONLY | os.O_CREAT | os.O_APPEND),
    ):
        opened = os.open(name, flags, 0o600)
        os.dup2(opened, number)
        os.close(opened)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=stream is sys.stderr)
    return be_python(request.words, request.environments[rank], request.cwd)


def be_python(words: Sequence[str], environment: Mapping[str, str], cwd: str) -> int:
    """Does what `python WORDS` does, in this process. Returns the exit code.

    The words begin with -m MODULE, -c TEXT or a program's file.
    """
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(cwd)
    tempfile.tempdir = None  # TMPDIR may be another one
    how, *arguments = words
    folder = cwd
    if how in ("-m", "-c"):
        what, *arguments = arguments
        sys.argv = [how if how == "-c" else what, *arguments]
    else:
        folder = os.path.dirname(os.path.realpath(how))  # noqa: PTH120
        sys.argv = [how, *arguments]
    more = [each for each in environment.get("PYTHONPATH", "").split(os.pathsep) if each]
    sys.path[:1] = [folder, *more]
    sys.orig_argv = [sys.executable, *words]
    main = types.ModuleType("__main__")
    code: object = 0
    try:
        if how == "-m":
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        elif how == "-c":
            sys.modules["__main__"] = main
            exec(compile(what, "<string>", "exec"), vars(main))
        else:
            main.__file__ = how
            sys.modules["__main__"] = main
            with open(how, "rb") as file:  # noqa: PTH123
                exec(compile(file.read(), how, "exec"), vars(main))
    except SystemExit as ended:
        code = ended.code
    except BaseException as error:  # noqa: BLE001  as Python itself does it
        sys.excepthook(type(error), error, error.__traceback__)
        code = 1
    threading._shutdown()  # type: ignore[attr-defined]  # waits for threads, as Python does at its end
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        stream.flush()
    if isinstance(code, str):
        print(code, file=sys.stderr, flush=True)
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
        with contextlib.suppress(OSError), open(f"/proc/{pid}/cmdline", "rb") as file:  # noqa: PTH123
            found[pid] = file.read().replace(b"\0", b" ").decode(errors="replace")
    return found


def _kill(pids: dict[int, str]) -> None:
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


# --- clients, and the single processes that some of them ask for ---


def listen(path: str) -> socket.socket:
    """A socket that is complete when its path appears: whoever sees the path can connect."""
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(f"{path}.new")
    listening.listen(64)
    os.rename(f"{path}.new", path)  # noqa: PTH104
    return listening


def serve_at(listening: socket.socket) -> None:
    """Forks a process for each connection at this socket, to do what is asked there, until stdin ends."""
    while True:
        ready, _, _ = select.select([0, listening], [], [], 1.0)
        with contextlib.suppress(ChildProcessError):  # which is said where there is none
            while os.waitpid(-1, os.WNOHANG)[0]:  # of those that have ended
                continue
        if 0 in ready:
            return
        if not ready:
            continue
        connection, _ = listening.accept()
        if os.fork() == 0:
            try:
                listening.close()
                answer(connection)
            finally:
                os._exit(1)
        connection.close()


def answer(connection: socket.socket) -> None:
    """Does what a client asks for: all ranks of a program, or a single process."""
    length, files, _, _ = socket.recv_fds(connection, 8, 64)
    asked = json.loads(connection.recv(int.from_bytes(length, "big"), socket.MSG_WAITALL))
    if "environments" not in asked:
        keep(connection, asked, files)
    from allranks.base import processes

    processes.adopt_orphans()  # what the ranks leave behind becomes a child of this process
    connection.sendall(json.dumps(serve(Request(**asked))._asdict()).encode() + b"\n")
    os._exit(0)


def keep(connection: socket.socket, asked: dict[str, Any], files: list[int]) -> NoReturn:
    """Starts the process that is asked for, passes signals on to it, and tells how it ended.

    It ends with whoever asked: where the connection closes first, as by a SIGKILL, it is killed, too.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            connection.close()
            code = take_place(asked, files)
            _end_mpi(code)
        finally:
            os._exit(code)
    for file in files:
        os.close(file)
    ended = os.pidfd_open(pid)
    while ended not in select.select([connection, ended], [], [])[0]:
        signals = connection.recv(1)
        os.kill(pid, signals[0] if signals else signal.SIGKILL)
        if not signals:
            os._exit(0)
    _, status = os.waitpid(pid, 0)
    connection.sendall(str(os.waitstatus_to_exitcode(status)).encode())
    os._exit(0)


# What C's exit() calls after the handlers of all that the program has loaded, and in place of those of
# torch: to take torch down takes a forked process a second.
AT_EXIT = ctypes.CFUNCTYPE(None, ctypes.c_int, ctypes.c_void_p)(lambda code, _: os._exit(code))


def _end_mpi(code: int) -> None:
    """Ends a process that has used MPI as Python would: by MPI_Finalize, and C's exit().

    MPICH tells its launcher in a handler of exit() that all is well. It takes a rank without that for one
    that has failed, and kills the others.
    """
    mpi = sys.modules.get("mpi4py.MPI")
    if mpi is None or not mpi.Is_initialized():
        return
    if not mpi.Is_finalized():
        mpi.Finalize()
    ctypes.PyDLL(None).exit(code)


def take_place(asked: dict[str, Any], files: list[int]) -> int:
    """In the fork: takes over what the process had that asked, and does what it was to do."""
    os.setsid()
    os.sched_setaffinity(0, asked["cpus"])
    os.umask(asked["umask"])
    for number in asked["ignored"]:
        signal.signal(number, signal.SIG_IGN)
    # Out of the way first: the number of one may be that which another one must get.
    away = [fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, AWAY) for file in files]
    os.closerange(3, AWAY)
    for file, number in zip(away, asked["files"], strict=True):
        os.dup2(file, number)
        os.close(file)
    ctypes.PyDLL(None).on_exit(AT_EXIT, None)
    sys.executable = asked["python"]
    for stream in (sys.stdout, sys.stderr):
        at_once = asked["unbuffered"] or "PYTHONUNBUFFERED" in asked["environment"]
        stream.reconfigure(line_buffering=stream.isatty() or stream is sys.stderr, write_through=at_once)
    return be_python(asked["words"], asked["environment"], asked["cwd"])


def main() -> None:
    from allranks.base import processes

    os.dup2(2, 1)  # what a module prints while it is imported is no output of a program
    processes.adopt_orphans()  # of what a process leaves behind
    listening = listen(sys.argv[1])  # those who connect wait for the imports
    import_all()
    serve_at(listening)


if __name__ == "__main__":
    main()
