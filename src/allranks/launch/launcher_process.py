"""The launcher itself, such as mpiexec, as a process of this host: started, heard, and ended.

A launcher reports a rank's failure in many lines of its own, which follow the failure within milliseconds.
The user is told of that failure in one sentence. So each line of the launcher is held back for a moment,
and is not shown if the launch has begun to end by then.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial

from allranks.base import links, processes
from allranks.base.errors import UserError
from allranks.launch.outcome import NEAR_S

# How long a killed launcher may take to end. One that is still there then hangs in the kernel, and is left
# behind.
REAP_S = 5.0


class LauncherProcess:
    """A launcher that has been started."""

    def __init__(self, argv: Sequence[str], env: Mapping[str, str]) -> None:
        """Starts it; `env` is its whole environment. Raises UserError if that fails."""
        self.was_killed = False  # whether kill() has ended it, as it would not end by itself
        self.not_shown: list[bytes] = []  # its lines that are held back, or came too late to be shown
        self._process = _started(argv, env)

    @property
    def has_ended(self) -> bool:
        return self._process.poll() is not None

    @property
    def code(self) -> int:
        """Its exit code, as subprocess has it; that of SIGKILL if it could not even be killed."""
        code = self._process.returncode
        return -signal.SIGKILL if code is None else code

    async def hear(self, show: Callable[[bytes], None], may_show: Callable[[], bool]) -> None:
        """Reads all that the launcher writes, until it and all of its processes have closed their output.

        `show` gets each line NEAR_S after it has come, if `may_show()` holds then. Otherwise the line stays
        in `not_shown`, as does a last line without an end.
        """
        loop = asyncio.get_running_loop()

        def show_held_back(count: int) -> None:
            while count and may_show():
                show(self.not_shown.pop(0))
                count -= 1

        reader, rest = asyncio.StreamReader(), b""
        await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), self._process.stdout)
        while data := await reader.read(links.PIECE_BYTES):
            *lines, rest = (rest + data).split(b"\n")
            self.not_shown += [line + b"\n" for line in lines]
            loop.call_later(NEAR_S, show_held_back, len(lines))
        if rest:
            self.not_shown.append(rest + b"\n")

    def terminate(self) -> None:
        """Sends it SIGTERM, at which launchers end the ranks that they have started."""
        self._process.terminate()

    def kill(self) -> None:
        """Kills it, and all processes of its group."""
        self.was_killed = True
        os.killpg(self._process.pid, signal.SIGKILL)

    async def reap(self) -> None:
        """Waits for a launcher that has ended or was killed; not for ever, as it may hang in the kernel."""
        deadline = time.monotonic() + REAP_S
        while not self.has_ended and time.monotonic() < deadline:
            await asyncio.sleep(0.01)


def _started(argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C at the terminal comes to us alone
            # After fork() only prctl is called, which no other thread of ours can have locked.
            preexec_fn=partial(processes.die_with_parent, os.getpid(), signal.SIGTERM),  # noqa: PLW1509
        )
    except OSError as error:
        remedy = "load the module that brings it, or take another with --launcher."
        # One argument may have 128 KiB, all of them and the variables a quarter of the stack (execve(2)).
        if error.errno == errno.E2BIG:
            remedy = (
                "its arguments and variables are longer than the system takes. Start ranks on fewer hosts, "
                "or a shorter command, or unset long variables: `env | wc -c` shows their length in all."
            )
        raise UserError(f"launcher {argv[0]} cannot be started ({error.strerror}): {remedy}") from error
