"""Looks where a rank's program is: its state, what it waits for, its Python stack. Says it as text.

    python -m allranks.launch.look PID PAGE

A guard starts this for its program, PID, when `allranks launch` wants to name a rank that makes no
progress. It is a process of its own because what it looks at may hang. PAGE is the memory that the guard
shares with the program (job/pulse.py), or empty.

A program that calls `allranks.heartbeat()` writes down its stack itself. Of any other Python program py-spy
shows it, where that is installed. What Linux tells of a process is shown of every program.
"""

from __future__ import annotations

import sys

# `python -m` puts the present directory first. A file there, such as the user's random.py, is not Python's.
if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]

import os
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import suppress
from io import FileIO
from pathlib import Path

from allranks.base import processes
from allranks.job.variables import STACK_AT, STACK_BYTES, STACK_PID

WRITE_S = 1.0  # for a program to write down its stack
PY_SPY_S = 4.0  # how long py-spy may take to look at a process: it reads the symbols of a Python first
# At most so many processes of a rank are shown to py-spy: the first Python is usually the program.
MOST_PROCESSES = 8
STACK_LINES = 24  # at most so many lines of a stack are shown
STATES = {
    "R": "runs",
    "S": "is asleep",
    "D": "waits in the kernel, as for a file system or a device",
    "T": "is stopped",
    "t": "is stopped by a debugger",
    "Z": "has ended",
}


def main() -> None:
    pid, page = int(sys.argv[1]), sys.argv[2]
    for part in (about(pid), stack(pid, page)):
        if part:
            sys.stdout.write(f"{part}\n")
            sys.stdout.flush()  # what comes next may hang


def about(pid: int) -> str:
    """What Linux tells of a process, in a line: its command, its state, and where it waits."""
    stat = processes.process_stat(pid)
    if stat is None:
        return f"process {pid} has ended"
    command = _text(pid, "cmdline").replace("\0", " ").strip()
    state = f"{STATES.get(stat.state, 'is')} (state {stat.state})"
    waits_in = _text(pid, "wchan")  # a function of the kernel; 0 for a process that runs
    call = _text(pid, "syscall").partition(" ")[0]  # its number; "running" for a process that runs
    found = f"process {pid} ({command[:80]}) {state}"
    if waits_in not in ("", "0"):
        found += f" in {waits_in}"
    if call.isdigit():
        found += f", system call {call}"
    return found


def stack(pid: int, page: str) -> str:
    """The program's Python stack, innermost frame last; empty if it cannot be found out."""
    written = _written_stack(page)
    if written:
        return written
    for candidate in _python_first(pid):
        seen = _seen_by_py_spy(candidate)
        if seen:
            return seen
    return ""


def _written_stack(page: str) -> str:
    """The stack that the program has written down itself; empty if it does not offer that."""
    if not page:
        return ""
    with suppress(OSError), Path(page).open("r+b", buffering=0) as memory:
        memory.seek(8 * STACK_PID)
        writer = int.from_bytes(memory.read(8), sys.byteorder, signed=True)
        if not writer:
            return ""
        # The guard has started this process, and the writer too. A writer that has ended is not among the
        # guard's processes any more: another one may have its number by now, and would be killed.
        if writer not in processes.descendants(os.getppid()):
            return ""
        memory.seek(STACK_AT)
        memory.write(bytes(STACK_BYTES))  # an earlier stack is not to be taken for this one
        os.kill(writer, processes.DUMP_FOR_LAUNCH_SIGNAL)
        os.kill(writer, signal.SIGCONT)  # a stopped process handles no signal
        return _as_read(_when_whole(memory))
    return ""


def _when_whole(memory: FileIO) -> str:
    """What was written into the part of the page that is for a stack, once it has not grown for 50 ms."""
    deadline = time.monotonic() + WRITE_S
    text, before = "", None
    while (not text or text != before) and time.monotonic() < deadline:
        time.sleep(0.05)
        before = text
        memory.seek(STACK_AT)
        text = memory.read(STACK_BYTES).rstrip(b"\0").decode(errors="replace")
    return text


def _as_read(dump: str) -> str:
    """The frames as a traceback has them. faulthandler and py-spy write the innermost one first."""
    frames = dump.rpartition("call first):\n")[2].splitlines()[:STACK_LINES]
    return "\n".join(reversed(frames))


def _python_first(pid: int) -> Iterator[int]:
    """The program and all that it has started, those first that look like Python."""
    found = [pid, *sorted(processes.descendants(pid))][: 4 * MOST_PROCESSES]
    found.sort(key=lambda one: "python" not in os.path.basename(_text(one, "cmdline").partition("\0")[0]))  # noqa: PTH119
    yield from found[:MOST_PROCESSES]


def _seen_by_py_spy(pid: int) -> str:
    """The stacks of a Python process's threads; empty if py-spy is not installed or sees none."""
    beside = Path(sys.executable).with_name("py-spy")
    command = str(beside) if beside.exists() else shutil.which("py-spy")
    if command is None:
        return ""
    with suppress(OSError, subprocess.TimeoutExpired):
        done = subprocess.run(
            [command, "dump", "--pid", str(pid)],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PY_SPY_S,
            check=False,
        )
        threads = done.stdout.partition("\nThread ")[2]
        if done.returncode == 0 and threads:
            return "\n".join(f"Thread {threads}".splitlines()[:STACK_LINES])
    return ""


def _text(pid: int, name: str) -> str:
    """A file of /proc of this process, as text; empty if it cannot be read."""
    try:
        return Path(f"/proc/{pid}/{name}").read_text(errors="replace").strip()
    except OSError:
        return ""


if __name__ == "__main__":
    main()
