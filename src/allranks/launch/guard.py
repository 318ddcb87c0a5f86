"""What every rank runs first, under every launcher.

    python -m allranks.launch.guard -- PROGRAM ARGS...

It finds out which rank it is and gives the program its variables. Without a supervisor (`allranks
launch`) it then becomes the program: signals and exit code are the program's own. With one it stays as
the program's guard: through one connection go the program's output, how it ended, and the supervisor's
word to end it. That connection breaks when the supervisor dies, however and wherever: then the program
is ended too. The guard stays until it is let go, because a launcher that ends the job at the first bad
exit code would cut the others short. No torch, and few files opened: this start is every rank's.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Any

from allranks.base import links, processes
from allranks.base.errors import EXIT_CANNOT_START, EXIT_USER_ERROR, UserError
from allranks.job import variables
from allranks.job.identity import RankIdentity, discover

CONNECT_S = 30
END_S = 1.0  # from SIGTERM to SIGKILL when the supervisor is gone
DRAIN_S = 1.0  # for output that is still in the pipes when the program has ended
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Starts the program, or ends with code 2 and one message that names the host."""
    environ = os.environ
    try:
        program = program_of(sys.argv[1:])
        identity = discover(environ)
        if environ.get(variables.SUPERVISOR):
            sys.exit(Guard(identity, environ).attend(program))
        processes.restore_signals()
        execute(program, {**environ, **variables.of_rank(identity, environ)})
    except UserError as error:
        print(f"allranks: [{socket.gethostname()}] {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)


def program_of(arguments: Sequence[str]) -> Sequence[str]:
    """What stands after `--`."""
    if len(arguments) < 2 or arguments[0] != "--":
        raise UserError("python -m allranks.launch.guard needs `-- PROGRAM ARGS...` after it.")
    return arguments[1:]


def execute(program: Sequence[str], environ: Mapping[str, str]) -> None:
    """Becomes the program, found on the PATH of `environ`. Raises UserError where it cannot."""
    try:
        os.execvpe(program[0], list(program), dict(environ))
    except OSError as error:
        raise UserError(
            f"{program[0]} cannot be started ({error.strerror}): give the path of a program that this "
            "host has."
        ) from error


class Guard:
    """The parent of one rank's program, in touch with the supervisor."""

    def __init__(self, identity: RankIdentity, environ: Mapping[str, str]) -> None:
        """Connects. Raises UserError where the supervisor cannot be reached."""
        self.identity, self.environ = identity, environ
        host, _, port = environ[variables.SUPERVISOR].rpartition(":")
        try:
            self.link = links.connect(host, int(port), CONNECT_S)
        except OSError as error:
            raise UserError(
                f"rank {identity.rank} cannot reach `allranks launch` at {host}:{port} "
                f"({error.strerror or error}): look whether it still runs, and whether a firewall "
                "stands between."
            ) from error
        self.alone = False  # the supervisor is gone
        self.child = 0
        self.status: int | None = None  # the program's wait status, once it has ended
        self.kill_at: float | None = None
        folder = environ.get(variables.OUTPUT) if identity.rank else None
        self.file = f"{folder}/rank-{identity.rank}.out" if folder else None  # for stdout

    def attend(self, program: Sequence[str]) -> int:
        """Runs the program to its end; returns its exit code, 128 + signal as shells do."""
        self._say(
            secret=self.environ.get(variables.SECRET, ""),
            rank=self.identity.rank,
            launcher=self.identity.launcher,
            world_size=self.identity.world_size,
            host=socket.gethostname(),
            port=variables.free_port() if self.identity.rank == 0 else None,
        )
        try:
            told = self._next_word()
        except EOFError:
            told = {"code": EXIT_USER_ERROR}
        if "env" not in told:  # the supervisor has given up, and has said why
            return int(told["code"])
        try:
            ready = self._environment(told["env"])
        except UserError as error:
            self._say(err=f"allranks: {error}\n".encode())
            code, signum = EXIT_USER_ERROR, 0
        else:
            code, signum = how_it_ended(self._run(program, ready))
        self._say(code=code, signal=signum, time=time.time(), last=True)
        with contextlib.suppress(EOFError):
            while "bye" not in self._next_word():
                pass
        return code

    def _environment(self, place: Mapping[str, Any]) -> dict[str, str]:
        kept = {n: value for n, value in self.environ.items() if n not in variables.PRIVATE}
        # a program that is killed takes what is in its own buffers with it
        kept.setdefault("PYTHONUNBUFFERED", "1")
        return {
            **kept,
            **variables.of_rank(self.identity, self.environ, place),
            # under torchrun MASTER_PORT is its own store's; this one is free there too
            variables.MASTER_ADDR: str(place["master_addr"]),
            variables.MASTER_PORT: str(place["master_port"]),
            variables.RANKS_SECRET: str(place["secret"]),
        }

    # --- the program ----------------------------------------------------------------------------

    def _run(self, program: Sequence[str], environ: Mapping[str, str]) -> int:
        """The program's wait status, once its last line is passed on and its children are gone."""
        processes.adopt_orphans()
        wake_read, wake_write = os.pipe()
        for end in (wake_read, wake_write):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for signum in (*FORWARDED, signal.SIGCHLD):
            signal.signal(signum, lambda *_: None)
        pipes = self._start(program, environ)
        poll = select.poll()
        for fd in (*pipes, wake_read, self.link.fileno()):
            poll.register(fd, select.POLLIN)
        self._obey()  # what came together with the word to start
        drained_by = float("inf")
        while (pipes or self.status is None) and time.monotonic() < drained_by:
            if self.status is not None and drained_by == float("inf"):
                processes.kill_descendants()  # what it left behind, and would keep the pipes open
                drained_by = time.monotonic() + DRAIN_S
            for fd, _ in poll.poll(100 if self.kill_at or self.status is not None else None):
                if fd == wake_read:
                    self._on_signals(os.read(wake_read, 4096))
                elif fd == self.link.fileno():
                    if not self._receive():
                        poll.unregister(fd)
                        self._end_alone()
                    self._obey()
                elif not self._pass_on(fd, pipes[fd]):
                    poll.unregister(fd)
                    os.close(fd)
                    del pipes[fd]
            if self.kill_at and time.monotonic() > self.kill_at:
                self._kill()
        assert self.status is not None
        processes.kill_descendants()
        return self.status

    def _start(self, program: Sequence[str], environ: Mapping[str, str]) -> dict[int, str]:
        """Starts the program; its two streams, by the descriptor to read them from."""
        terminals = self.environ.get(variables.TERMINAL, "") if self.identity.rank == 0 else ""
        streams = {kind: _stream(kind in terminals) for kind in ("out", "err")}
        parent = os.getpid()
        self.child = os.fork()
        if self.child == 0:
            try:
                os.dup2(streams["out"][1], 1)
                os.dup2(streams["err"][1], 2)
                signal.set_wakeup_fd(-1)
                processes.restore_signals()
                processes.die_with_parent(parent, signal.SIGKILL)
                execute(program, environ)
            except UserError as error:
                os.write(2, f"allranks: {error}\n".encode())
            finally:
                os._exit(EXIT_CANNOT_START)
        for _, inner in streams.values():
            os.close(inner)
        return {outer: kind for kind, (outer, _) in streams.items()}

    def _pass_on(self, fd: int, kind: str) -> bool:
        """Passes on what there is; False at the stream's end."""
        try:
            data = os.read(fd, 65536)
        except OSError:  # how a terminal says that nobody writes to it any more
            return False
        if not data:
            return False
        if kind == "out" and self.file is not None:
            try:
                os.makedirs(os.path.dirname(self.file), exist_ok=True)  # noqa: PTH103 PTH120
                with open(self.file, "ab") as file:  # noqa: PTH123  pathlib costs every rank 10 ms
                    file.write(data)
                return True
            except OSError as error:
                kind, self.file = "err", None
                data = f"allranks: {error}; going on without that file\n".encode() + data
        self._say(**{kind: data})
        return True

    def _on_signals(self, numbers: bytes) -> None:
        for signum in numbers:
            if signum != signal.SIGCHLD:
                self._forward(signum)
                continue
            with contextlib.suppress(ChildProcessError):  # none is left
                while (reaped := os.waitpid(-1, os.WNOHANG))[0]:
                    if reaped[0] == self.child:
                        self.status = reaped[1]
                        # at once, as the launcher may kill this process before all output is passed on
                        code, by = how_it_ended(self.status)
                        self._say(code=code, signal=by, time=time.time(), last=False)

    def _forward(self, signum: int) -> None:
        if self.status is None:
            os.kill(self.child, signum)  # not reaped yet, so the number is still its own

    def _kill(self) -> None:
        self.kill_at = None
        self._forward(signal.SIGKILL)
        processes.kill_descendants(spare={self.child})

    # --- the supervisor -------------------------------------------------------------------------

    def _say(self, **values: Any) -> None:
        if not self.alone:
            try:
                self.link.send(**values)
            except OSError:
                self._end_alone()

    def _receive(self) -> bool:
        """Takes in what the supervisor sends next; False once it is gone."""
        try:
            return self.link.receive()
        except OSError:
            return False

    def _next_word(self) -> dict[str, Any]:
        """The supervisor's next message. Raises EOFError once the supervisor is gone."""
        try:
            return self.link.next_message()
        except OSError as error:
            raise EOFError from error

    def _obey(self) -> None:
        """Does what the messages say that have arrived whole."""
        while (word := self.link.inbox.take()) is not None:
            if "signal" in word:
                self._forward(int(word["signal"]))
            elif "kill" in word:
                self._kill()

    def _end_alone(self) -> None:
        """The supervisor is gone: SIGTERM now, SIGKILL soon."""
        if not self.alone:
            self.alone = True
            if self.child:
                self._forward(signal.SIGTERM)
                self.kill_at = time.monotonic() + END_S


def how_it_ended(status: int) -> tuple[int, int]:
    """(exit code, signal or 0) of a wait status; the code is 128 + signal, as shells have it."""
    signum = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return (128 + signum if signum else os.WEXITSTATUS(status)), signum


def _stream(terminal: bool) -> tuple[int, int]:
    """A pipe, or a terminal where the user has one: programs show progress only there."""
    if not terminal or sys.platform == "win32":
        return os.pipe()
    import termios

    outer, inner = os.openpty()
    mode = termios.tcgetattr(inner)
    mode[1] &= ~termios.OPOST  # the user's own terminal turns \n into \r\n
    termios.tcsetattr(inner, termios.TCSANOW, mode)
    return outer, inner


if __name__ == "__main__":
    main()
