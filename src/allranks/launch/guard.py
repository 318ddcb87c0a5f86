"""The parent of one rank's program, in touch with the supervisor.

Through one connection go the program's output, how it ended, and the supervisor's word to end it.
The connection breaks when the supervisor dies, however and wherever that is: then the program
is ended too. That works alike under mpiexec, srun and torchrun. The guard stays until it is
let go: a launcher that ends the job at the first bad exit code cannot cut the others short.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import sys
import time
from collections.abc import Mapping, Sequence

from allranks.errors import EXIT_USER_ERROR, UserError
from allranks.launch import processes, rank, wire
from allranks.runtime.environment import Launch

CONNECT_S = 30
END_S = 1.0  # from SIGTERM to SIGKILL when the supervisor is gone
DRAIN_S = 1.0  # for output that is still in the pipes when the program has ended
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
CANNOT_START = 127


def attend(program: Sequence[str], launch: Launch, environ: Mapping[str, str]) -> int:
    """Runs the program to its end; returns its exit code, 128 + signal as shells do."""
    link, frames = _meet(launch, environ)
    try:
        told = wire.receive(link, frames)
    except (EOFError, OSError):
        return EXIT_USER_ERROR  # the supervisor has given up, and has said why
    if "env" not in told:
        return int(told.get("code", EXIT_USER_ERROR))
    kept = {name: value for name, value in environ.items() if name not in rank.PRIVATE}
    # a program that is killed takes what is in its own buffers with it
    kept.setdefault("PYTHONUNBUFFERED", "1")
    try:
        place = told["env"]
        ready = {**kept, **rank.variables(launch, environ, place)}
        # under torchrun MASTER_PORT is its own store's; this one is free there too
        ready[rank.MASTER_ADDR] = str(place["master_addr"])
        ready[rank.MASTER_PORT] = str(place["master_port"])
    except UserError as error:
        link.sendall(wire.frame(wire.STDERR, f"allranks: {error}\n".encode()))
        return _leave(link, frames, EXIT_USER_ERROR, 0)
    terminal = environ.get(rank.TERMINAL, "") if launch.rank == 0 else ""
    output = environ.get(rank.OUTPUT) if launch.rank else None
    guard = Guard(link, frames, f"{output}/rank-{launch.rank}.out" if output else None)
    status = guard.run(program, ready, terminal)
    signum = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    code = 128 + signum if signum else os.WEXITSTATUS(status)
    return _leave(link, frames, code, signum)


def _meet(launch: Launch, environ: Mapping[str, str]) -> tuple[socket.socket, wire.Frames]:
    """The connection, once the supervisor has been told who is here."""
    host, _, port = environ[rank.SUPERVISOR].rpartition(":")
    try:
        link = wire.connect(host, int(port), time.monotonic() + CONNECT_S)
    except OSError as error:
        raise UserError(
            f"rank {launch.rank} cannot reach `allranks launch` at {host}:{port} "
            f"({error.strerror or error}): look whether it still runs, and whether a firewall "
            f"stands between."
        ) from error
    link.sendall(
        wire.message(
            secret=environ.get(rank.SECRET, ""),
            rank=launch.rank,
            launcher=launch.launcher,
            world_size=launch.world_size,
            host=socket.gethostname(),
            pid=os.getpid(),
            port=rank.free_port() if launch.rank == 0 else None,
        )
    )
    return link, wire.Frames()


def _leave(link: socket.socket, frames: wire.Frames, code: int, signum: int) -> int:
    """Tells how the program ended, and waits to be let go."""
    try:
        link.sendall(wire.message(code=code, signal=signum, time=time.time()))
        while "bye" not in wire.receive(link, frames):
            pass
    except (EOFError, OSError):
        pass  # the supervisor is gone: nobody to wait for
    return code


class Guard:
    """One program: its output on the way to the supervisor, signals on their way to it."""

    def __init__(self, link: socket.socket, frames: wire.Frames, file: str | None) -> None:
        self.link = link
        self.frames = frames
        self.file = file  # for stdout instead of the supervisor
        self.alone = False  # the supervisor is gone
        self.child = 0
        self.status: int | None = None
        self.kill_at: float | None = None

    def run(self, program: Sequence[str], environ: Mapping[str, str], terminal: str) -> int:
        """The program's wait status, once its last line is passed on and its children are gone."""
        processes.adopt_orphans()
        wake_read, wake_write = os.pipe()
        for end in (wake_read, wake_write):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(wake_write, warn_on_full_buffer=False)
        for signum in (*FORWARDED, signal.SIGCHLD):
            signal.signal(signum, lambda *_: None)
        pipes = self._start(program, environ, terminal)
        poll = select.poll()
        for fd in (*pipes, wake_read, self.link.fileno()):
            poll.register(fd, select.POLLIN)
        self._obey(b"")
        drained_by = None
        while pipes or self.status is None:
            if self.status is not None and drained_by is None:
                processes.kill_descendants()  # what it left behind, and would keep the pipes open
                drained_by = time.monotonic() + DRAIN_S
            if drained_by is not None and time.monotonic() > drained_by:
                break
            for fd, _ in poll.poll(100 if self.kill_at or drained_by else None):
                if fd == wake_read:
                    self._on_signals(os.read(wake_read, 4096))
                elif fd == self.link.fileno():
                    self._on_word(poll)
                elif not self._pass_on(fd, pipes[fd]):
                    poll.unregister(fd)
                    os.close(fd)
                    del pipes[fd]
            if self.kill_at is not None and time.monotonic() > self.kill_at:
                self._kill()
        assert self.status is not None
        processes.kill_descendants()
        return self.status

    def _start(self, program: Sequence[str], environ: Mapping[str, str], terminal: str) -> dict[int, bytes]:
        """Starts the program; its two streams, by the descriptor to read them from."""
        streams = {kind: _stream(kind.decode() in terminal) for kind in (wire.STDOUT, wire.STDERR)}
        parent = os.getpid()
        self.child = os.fork()
        if self.child == 0:
            try:
                os.dup2(streams[wire.STDOUT][1], 1)
                os.dup2(streams[wire.STDERR][1], 2)
                signal.set_wakeup_fd(-1)
                processes.restore_signals()
                processes.die_with_parent(parent, signal.SIGKILL)
                rank.execute(program, environ)
            except UserError as error:
                os.write(2, f"allranks: {error}\n".encode())
            finally:
                os._exit(CANNOT_START)
        for _, inner in streams.values():
            os.close(inner)
        return {outer: kind for kind, (outer, _) in streams.items()}

    def _pass_on(self, fd: int, kind: bytes) -> bool:
        """Passes on what there is; False at the stream's end."""
        try:
            data = os.read(fd, 65536)
        except OSError:  # how a terminal says that nobody writes to it any more
            return False
        if kind == wire.STDOUT and self.file is not None:
            try:
                os.makedirs(os.path.dirname(self.file), exist_ok=True)  # noqa: PTH103 PTH120
                with open(self.file, "ab") as file:  # noqa: PTH123  pathlib costs every rank 10 ms
                    file.write(data)
                return bool(data)
            except OSError as error:
                kind, self.file = wire.STDERR, None
                data = f"allranks: {error}; going on without that file\n".encode() + data
        if data and not self.alone:
            self._send(wire.frame(kind, data))
        return bool(data)

    def _send(self, data: bytes) -> None:
        try:
            self.link.sendall(data)
        except OSError:
            self._end_alone()

    def _on_word(self, poll: select.poll) -> None:
        try:
            data = self.link.recv(65536)
        except OSError:
            data = b""
        if not data:
            poll.unregister(self.link.fileno())
            self._end_alone()
        self._obey(data)

    def _obey(self, data: bytes) -> None:
        for _, payload in self.frames.feed(data):
            word = wire.parse(payload)
            if "signal" in word:
                self._forward(int(word["signal"]))
            elif "kill" in word:
                self._kill()

    def _on_signals(self, numbers: bytes) -> None:
        for signum in numbers:
            if signum == signal.SIGCHLD:
                self._reap()
            else:
                self._forward(signum)

    def _forward(self, signum: int) -> None:
        if self.status is None:
            os.kill(self.child, signum)  # not reaped yet, so the number is still its own

    def _kill(self) -> None:
        self.kill_at = None
        self._forward(signal.SIGKILL)
        processes.kill_descendants(spare={self.child})

    def _end_alone(self) -> None:
        """The supervisor is gone: SIGTERM now, SIGKILL soon."""
        if not self.alone:
            self.alone = True
            self._forward(signal.SIGTERM)
            self.kill_at = time.monotonic() + END_S

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if pid == 0:
                return
            if pid == self.child:
                self.status = status


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
