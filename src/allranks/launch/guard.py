"""The guard: what every rank runs first, under every launcher.

    python -m allranks.launch.guard -- PROGRAM ARGS...

The guard finds out which rank it is, and gives the program its variables. Without a supervisor (`allranks
launch`) it then becomes the program: signals and exit code are the program's own.

With a supervisor it stays, as the parent of the program. Through one connection to the supervisor go the
program's output, how it has ended, and the supervisor's command to end it. That connection breaks when the
supervisor dies, for whatever reason: then the guard ends the program. When the program has ended, the guard
stays until the supervisor lets it go, because many launchers end the whole job at the first exit code that
is not 0.

The guard waits for nothing but its next event. So it can end its program even if the supervisor is stopped,
nobody reads the console, or a file system hangs. It does not import torch and opens few files, because
every rank starts like this.
"""

from __future__ import annotations

import sys

# `python -m` puts the present directory first. A file there, such as the user's random.py, is not Python's.
if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]

import _thread
import contextlib
import errno
import os
import select
import signal
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from allranks.base import links, processes
from allranks.base.errors import EXIT_CANNOT_START, EXIT_USER_ERROR, UserError, as_line, show
from allranks.job import variables
from allranks.job.identity import RankIdentity, discover

CONNECT_S = 30  # how long the supervisor may take to accept the connection: every rank opens one
END_S = 1.0  # from SIGTERM to SIGKILL for the program, when the supervisor is gone
DRAIN_S = 1.0  # how long output may still be on its way when the program has ended
TICK_MS = 100  # how often the clock is looked at while something has a deadline
# Output that the supervisor or a file has not taken yet. With more, the program waits with its next output.
MOST_WAITING_BYTES = 1 << 20
SETTLE_S = 0.02  # some thousand times as long as a call of should_stop() takes to come to its wait
LOOK = "allranks.launch.look"  # the module that looks where a program is
FORWARDED = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Starts the program, or ends with code 2 and one message that names the host."""
    environ = os.environ
    try:
        program = program_of(sys.argv[1:])
        identity = discover(environ, is_planned=True)
        if environ.get(variables.SUPERVISOR):
            sys.exit(Guard(identity, environ).attend(program))
        processes.restore_signals()
        execute(program, {**environ, **variables.of_rank(identity, environ)})
    except UserError as error:
        show(f"[{socket.gethostname()}] {error}")
        sys.exit(EXIT_USER_ERROR)


def program_of(arguments: Sequence[str]) -> Sequence[str]:
    """The program and its arguments: what stands after `--`. Raises UserError if nothing does."""
    if len(arguments) < 2 or arguments[0] != "--":
        raise UserError("python -m allranks.launch.guard needs `-- PROGRAM ARGS...` after it.")
    return arguments[1:]


def execute(program: Sequence[str], environ: Mapping[str, str]) -> None:
    """Becomes the program, found on the PATH of `environ`. Raises UserError if it cannot."""
    try:
        os.execvpe(program[0], list(program), dict(environ))
    except OSError as error:
        raise UserError(f"{program[0]} cannot be started ({error.strerror}): {_remedy(error)}") from error


def _remedy(error: OSError) -> str:
    """What the user can do where a program cannot be started for this reason."""
    if error.errno == errno.ENOEXEC:
        return (
            "a script needs a first line that names what runs it, such as #!/bin/sh, and another program "
            "must be one for this host's processors."
        )
    if error.errno == errno.E2BIG:
        return "its arguments and variables are longer than the system takes: put them into a file."
    return "give the path of a program that this host has."


class Guard:
    """The parent of one rank's program, in touch with the supervisor."""

    def __init__(self, identity: RankIdentity, environ: Mapping[str, str]) -> None:
        """Connects. Raises UserError if the supervisor cannot be reached."""
        self.identity = identity
        self.environ = environ
        self.link = _connection(identity.rank, environ[variables.SUPERVISOR])
        self.unsent = bytearray()  # messages to the supervisor that the connection has not taken yet
        self.is_alone = False  # the supervisor is gone
        self.is_let_go = False  # the supervisor has said that this process may end: all ranks have ended
        self.child = 0  # the program's process id
        self.status: int | None = None  # the program's wait status, once it has ended
        # The program's streams, "out" and "err", by the descriptor to read each from.
        self.pipes: dict[int, str] = {}
        # The two ends of a pipe in which a byte stands for each signal that has arrived.
        self.wakeups: int | None = None
        self.wake_end = -1
        self.terminals: list[int] = []  # those of `pipes` that are terminals, until they are closed
        # The pipe to the program's stdin, if the supervisor sends the user's input.
        self.stdin: int | None = None
        self.typed = bytearray()  # input that the program has not taken yet
        self.typed_all = False  # the input has ended
        self.page: int | None = None  # the memory that the program shares with this process (job/pulse.py)
        self.counts_cpu = False  # whether the supervisor wants to know the program's CPU time
        self.written_bytes = 0  # how much the program has written to both of its streams
        self.wish = 0  # the program's reason to stop that was told to the supervisor; 0: none yet
        self.kill_at: float | None = None  # when the program gets SIGKILL, by time.monotonic()
        # Until when to wait for more output; set when the program has ended.
        self.drained_by: float | None = None
        folder = environ.get(variables.OUTPUT) if identity.rank else None
        self.file = OutputFile(f"{folder}/rank-{identity.rank}.out") if folder else None  # for stdout

    def attend(self, program: Sequence[str]) -> int:
        """Runs the program to its end; returns its exit code, 128 + signal as shells do."""
        self.link.sock.setblocking(False)
        self._say_hello()
        told = self._first_word()
        if "env" not in told:  # the supervisor has given up, and has said why
            return int(told["code"])

        if "watch" in told:
            self.page = _page()
            self.counts_cpu = told["watch"] == "idle"
        try:
            environ = self._environment(told["env"])
        except UserError as error:
            self._say(err=as_line(error).encode())
            code, signum = EXIT_USER_ERROR, 0
        else:
            code, signum = how_it_ended(self._run(program, environ, told))

        last_pulse = {} if self.page is None else {"pulse": self._pulse()}
        self._say(code=code, signal=signum, time=time.time(), last=True, **last_pulse)
        while not self.is_let_go and not self.is_alone:
            self._next_events()
        return code

    def _say_hello(self) -> None:
        self._say(
            secret=self.environ.get(variables.SECRET, ""),
            rank=self.identity.rank,
            launcher=self.identity.launcher,
            world_size=self.identity.world_size,
            host=socket.gethostname(),
            boot_id=processes.boot_id(),
            pid=os.getpid(),
            port=variables.free_port() if self.identity.rank == 0 else None,
        )

    def _first_word(self) -> dict[str, Any]:
        """What the supervisor says once all ranks have come: this rank's place, or that it is to end."""
        while True:
            word = self.link.inbox.take()
            if word is not None:
                return word
            if self.is_alone:
                return {"code": EXIT_USER_ERROR}
            self._poll_and_react()

    def _environment(self, place: Mapping[str, Any]) -> dict[str, str]:
        """The program's variables. Raises UserError for what neither launcher nor supervisor tells."""
        kept = {name: value for name, value in self.environ.items() if name not in variables.PRIVATE}
        # A program that is killed takes with it what is in its own buffers.
        kept.setdefault("PYTHONUNBUFFERED", "1")
        return {
            **kept,
            **variables.of_rank(self.identity, self.environ, place),
            # MASTER_PORT may be the port of torchrun's own store. The port in ALLRANKS_MASTER_PORT is
            # always one that rank 0's guard has found free.
            variables.MASTER_ADDR: str(place["master_addr"]),
            variables.MASTER_PORT: str(place["master_port"]),
            variables.RANKS_SECRET: str(place["secret"]),
            **({} if self.page is None else {variables.PULSE: f"/proc/{os.getpid()}/fd/{self.page}"}),
        }

    # --- the program ----------------------------------------------------------------------------

    def _run(self, program: Sequence[str], environ: Mapping[str, str], told: Mapping[str, Any]) -> int:
        """The program's wait status, once its last line is passed on and its children are gone.

        `told` says whether the program gets a stdin, and how large the user's terminal is.
        """
        processes.adopt_orphans()
        self._catch_signals()
        self._start(program, environ, bool(told.get("stdin")))
        if told.get("size"):
            self._resize(*told["size"])
        self._obey()  # what came together with the word to start
        while not self._is_over():
            self._next_events()
        assert self.status is not None
        processes.kill_descendants()
        if self.file is not None:
            lost = self.file.close(DRAIN_S)
            if lost:
                self._say(err=lost)
            elif self.file.problem:
                self._give_up_file(self.file)
        return self.status

    def _catch_signals(self) -> None:
        """From now on signals wake the loop: each arrives as a byte in a pipe."""
        self.wakeups, self.wake_end = os.pipe()
        for end in (self.wakeups, self.wake_end):
            os.set_blocking(end, False)
        signal.set_wakeup_fd(self.wake_end, warn_on_full_buffer=False)
        for signum in (*FORWARDED, signal.SIGCHLD):
            signal.signal(signum, lambda *_: None)

    def _start(self, program: Sequence[str], environ: Mapping[str, str], with_stdin: bool) -> None:
        """Starts the program, with streams of its own."""
        terminals = self.environ.get(variables.TERMINAL, "") if self.identity.rank == 0 else ""
        streams = {kind: _stream(kind in terminals) for kind in ("out", "err")}
        stdin = Stream(*os.pipe())
        parent = os.getpid()
        self.child = os.fork()
        if self.child == 0:
            try:
                os.dup2(stdin.outer, 0)
                os.dup2(streams["out"].inner, 1)
                os.dup2(streams["err"].inner, 2)
                signal.set_wakeup_fd(-1)
                processes.restore_signals()
                processes.die_with_parent(parent, signal.SIGKILL)
                if self.page is not None:  # the launch may want to see where the program is
                    processes.let_look(parent)
                execute(program, environ)
            except UserError as error:
                os.write(2, as_line(error).encode())
            finally:
                os._exit(EXIT_CANNOT_START)

        for kind, stream in streams.items():
            os.close(stream.inner)
            self.pipes[stream.outer] = kind
            if kind in terminals:
                self.terminals.append(stream.outer)
        os.close(stdin.outer)
        if with_stdin:
            self.stdin = stdin.inner
            os.set_blocking(self.stdin, False)
        else:
            # The program's stdin is empty. Launchers differ in what they give to a rank as its stdin.
            os.close(stdin.inner)

    def _is_over(self) -> bool:
        """Whether the program has ended, and all of its output is here or was waited for long enough."""
        if self.status is None:
            return False
        assert self.drained_by is not None
        return not self.pipes or time.monotonic() > self.drained_by

    # --- events ---------------------------------------------------------------------------------

    def _next_events(self) -> None:
        """Waits for something to happen, and does what it asks for."""
        self._poll_and_react()
        self._obey()
        if self.kill_at is not None and time.monotonic() > self.kill_at:
            self._kill()
        if self.file is not None and self.file.problem:
            self._give_up_file(self.file)

    def _poll_and_react(self) -> None:
        poll = select.poll()
        for fd, events in self._awaited().items():
            poll.register(fd, events)
        for fd, events in poll.poll(self._patience_ms()):
            if fd == self.wakeups:
                self._on_signals(os.read(fd, 4096))
            elif fd in self.pipes:
                self._on_output(fd)
            elif fd == self.stdin:
                self._type()
            else:
                self._on_link(events)

    def _awaited(self) -> dict[int, int]:
        """The descriptors to wait for, and for what."""
        awaited: dict[int, int] = {}
        if self.wakeups is not None:
            awaited[self.wakeups] = select.POLLIN
        if not self.is_alone:
            awaited[self.link.fileno()] = select.POLLIN | (select.POLLOUT if self.unsent else 0)
        if self._takes_output():
            awaited |= dict.fromkeys(self.pipes, select.POLLIN)
        if self.stdin is not None and self.typed:
            awaited[self.stdin] = select.POLLOUT
        return awaited

    def _takes_output(self) -> bool:
        """Whether the program's output is read. If not, the program soon waits, as with a full pipe."""
        if self.status is not None:  # what is left in the pipes is little, and would be lost
            return True
        waiting = len(self.unsent) + (self.file.waiting_bytes if self.file is not None else 0)
        return waiting < MOST_WAITING_BYTES

    def _patience_ms(self) -> int | None:
        """How long to wait for an event; None for ever, where no deadline is near."""
        file_is_behind = self.file is not None and self.file.waiting_bytes >= MOST_WAITING_BYTES
        is_draining = self.status is not None and bool(self.pipes)
        return TICK_MS if self.kill_at is not None or is_draining or file_is_behind else None

    def _on_output(self, fd: int) -> None:
        """Passes on what the program has written, or closes the descriptor at the stream's end."""
        try:
            data = os.read(fd, links.PIECE_BYTES)
        except OSError:  # how a terminal says that nobody writes to it any more
            data = b""
        if not data:
            os.close(fd)
            if fd in self.terminals:  # its number may soon be another file's
                self.terminals.remove(fd)
            if self.pipes.pop(fd) == "look":
                self._say(looked=True)
            return
        if self.pipes[fd] != "look":
            self.written_bytes += len(data)
        if self.pipes[fd] == "out" and self.file is not None:
            self.file.add(data, self._wake)
        else:
            self._say(**{self.pipes[fd]: data})

    def _type(self) -> None:
        """Gives the program as much of its stdin as it takes, and asks for more when it has taken all."""
        if self.stdin is None:  # the program has closed its stdin
            self.typed.clear()
            return
        try:
            while self.typed:
                del self.typed[: os.write(self.stdin, self.typed)]
        except BlockingIOError:  # the program is busy; the loop waits for room
            return
        except OSError:  # the program reads no more
            self.typed.clear()
            self.typed_all = True
        if self.typed_all:
            os.close(self.stdin)
            self.stdin = None
        else:
            self._say(took=True)

    def _resize(self, rows: int, columns: int) -> None:
        """Gives the program's terminals the size of the user's, and tells the program about it."""
        import fcntl  # three modules that only a rank at a terminal needs
        import struct
        import termios

        for fd in self.terminals:
            # The size matters only for how output looks. If the system refuses it, the rank goes on.
            with contextlib.suppress(OSError):
                fcntl.ioctl(fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        if self.terminals:
            self._forward(signal.SIGWINCH)

    def _give_up_file(self, file: OutputFile) -> None:
        """To be called if the file for stdout cannot be written. From now on stdout goes to the console."""
        self.file = None
        self._say(err=as_line(f"{file.problem}; going on without that file").encode())
        # In pieces, as the file may have left as much as MOST_WAITING_BYTES, and a longer message than
        # LONGEST_MESSAGE_BYTES ends the connection.
        left = file.unwritten()
        for start in range(0, len(left), links.PIECE_BYTES):
            self._say(out=left[start : start + links.PIECE_BYTES])

    def _wake(self) -> None:
        """Wakes the loop from another thread. No signal has the number 0."""
        with contextlib.suppress(BlockingIOError):  # the pipe is full, so the loop wakes in any case
            os.write(self.wake_end, b"\0")

    def _on_signals(self, numbers: bytes) -> None:
        for signum in numbers:
            if signum == signal.SIGCHLD:
                self._reap()
                self._pass_wish_on()
            elif signum:  # 0 is from _wake
                self._forward(signum)

    def _reap(self) -> None:
        """Takes in the ends of child processes: of the program, and of orphans that it has left."""
        has_ended = False
        with contextlib.suppress(ChildProcessError):  # none is left
            while True:
                pid, status = os.waitpid(-1, os.WNOHANG)
                if pid == 0:  # some children run, but no further one has ended
                    break
                if pid == self.child:
                    self.status = status
                    has_ended = True
        if not has_ended:
            return
        assert self.status is not None
        # At once, as the launcher may kill this process before all output is passed on.
        code, signum = how_it_ended(self.status)
        self._say(code=code, signal=signum, time=time.time(), last=False)
        # Processes that the program has left behind would keep its pipes open.
        processes.kill_descendants()
        self.drained_by = time.monotonic() + DRAIN_S

    # --- what the program tells through the page that it shares with this process ---------------

    def _pass_wish_on(self) -> None:
        """Tells the supervisor once that the program has a reason to stop."""
        if self.page is None or self.wish:
            return
        self.wish = self._read(variables.WISH)
        if self.wish:
            self._say(wish=self.wish)

    def _pulse(self) -> list[int]:
        """How the program does: the numbers of launch/idle.py's Pulse, in its order."""
        told = (variables.BEATS, variables.WITHIN_MS, variables.CALLS, variables.STEPS)
        ticks = processes.cpu_ticks_of_children() if self.counts_cpu else 0
        return [*map(self._read, told), ticks, self.written_bytes]

    def _hold(self) -> None:
        """Makes the program wait at its next call of should_stop().

        The supervisor is told how many of these calls have been answered so far.
        """
        self._write(variables.HOLD, 1)
        # The program may be in the middle of a call of should_stop() just now. After this pause that call
        # has either returned, or it waits.
        time.sleep(SETTLE_S)
        self._say(answered=self._read(variables.CALLS) - self._read(variables.WAITS))

    def _read(self, place: int) -> int:
        assert self.page is not None
        return int.from_bytes(os.pread(self.page, 8, 8 * place), sys.byteorder, signed=True)

    def _write(self, place: int, value: int) -> None:
        assert self.page is not None
        os.pwrite(self.page, value.to_bytes(8, sys.byteorder, signed=True), 8 * place)

    def _look(self) -> None:
        """Starts a process that looks where the program is; what it prints goes to the supervisor.

        It runs beside this one, because what it looks at may hang.
        """
        outer, inner = os.pipe()
        page = "" if self.page is None else f"/proc/{os.getpid()}/fd/{self.page}"
        looker = os.fork()
        if looker == 0:
            try:
                os.dup2(os.open(os.devnull, os.O_RDWR), 0)
                os.dup2(inner, 1)
                os.dup2(inner, 2)
                signal.set_wakeup_fd(-1)
                processes.restore_signals()
                os.execv(sys.executable, [sys.executable, "-m", LOOK, str(self.child), page])
            finally:
                os._exit(EXIT_CANNOT_START)
        os.close(inner)
        self.pipes[outer] = "look"

    def _forward(self, signum: int) -> None:
        """Sends a signal to the program, if it runs."""
        if self.child and self.status is None:  # not reaped yet, so the number is still its own
            os.kill(self.child, signum)

    def _kill(self) -> None:
        self.kill_at = None
        self._forward(signal.SIGKILL)
        processes.kill_descendants(spare={self.child})

    # --- the supervisor -------------------------------------------------------------------------

    def _say(self, **values: Any) -> None:
        """Sends a message, or keeps it until the connection takes it."""
        if not self.is_alone:
            self.unsent += links.message(**values)
            self._send()

    def _send(self) -> None:
        try:
            while self.unsent:
                del self.unsent[: self.link.sock.send(self.unsent)]
        except BlockingIOError:  # the connection is full; the loop waits for room
            pass
        except OSError:
            self._end_alone()

    def _on_link(self, events: int) -> None:
        if events & select.POLLOUT:
            self._send()
        if events & ~select.POLLOUT and not self._receive():
            self._end_alone()

    def _receive(self) -> bool:
        """Takes in what the supervisor has sent; False once it is gone."""
        try:
            return self.link.receive()
        except BlockingIOError:
            return True
        except (OSError, links.WireError):
            return False

    def _obey(self) -> None:
        """Does what the messages say that have arrived whole."""
        while (word := self.link.inbox.take()) is not None:
            match word:
                case {"signal": signum}:
                    self._forward(int(signum))
                case {"kill": True}:
                    self._kill()
                case {"stdin": text}:
                    self.typed += links.output(text)
                    self.typed_all = not text
                    self._type()
                case {"size": [rows, columns]}:
                    self._resize(rows, columns)
                case {"here": True}:  # the supervisor wants to know whether this process still works
                    if self.page is None:
                        self._say(here=True)
                    else:
                        self._say(here=True, pulse=self._pulse())
                case {"hold": True}:
                    self._hold()
                case {"stop_at": call}:
                    self._write(variables.STOP_AT, int(call))
                case {"look": True}:
                    self._look()
                case {"bye": True}:
                    self.is_let_go = True

    def _end_alone(self) -> None:
        """The supervisor is gone: SIGTERM to the program now, SIGKILL soon."""
        if self.is_alone:
            return
        self.is_alone = True
        self.unsent.clear()
        if self.child:
            self._forward(signal.SIGTERM)
            self.kill_at = time.monotonic() + END_S


def _page() -> int | None:
    """Memory to share with the program, as a file without a name; None if there is no such thing."""
    if sys.platform != "linux":
        return None
    descriptor = os.memfd_create(variables.PAGE_NAME)
    os.ftruncate(descriptor, variables.STACK_AT + variables.STACK_BYTES)
    return descriptor


class OutputFile:
    """The file for a rank's stdout. A thread writes it: a file system may hang, and the guard must not.

    The thread is one of the module _thread, which is a part of Python itself: an import of `threading`
    would read files while the program runs, at a time when their file system may hang as well.
    """

    def __init__(self, path: str) -> None:
        self.path = path
        self.problem = ""  # why nothing more can be written
        self.waiting_bytes = 0  # not written yet
        self._waiting: list[bytes] = []
        self._is_closed = False
        self._has_thread = False
        self._lock = _thread.allocate_lock()  # guards all of the above
        self._news = _thread.allocate_lock()  # held until there is something for the thread to do
        self._news.acquire()
        self._end = _thread.allocate_lock()  # held until the thread has ended
        self._end.acquire()

    def add(self, data: bytes, wake: Callable[[], None]) -> None:
        """Queues the data, to be written after what came before. Returns at once.

        If the file cannot be written any more, `wake` is called, from the thread that writes.
        """
        with self._lock:
            self._waiting.append(data)
            self.waiting_bytes += len(data)
        if not self._has_thread:
            self._has_thread = True
            _thread.start_new_thread(self._work, (wake,))
        self._tell_thread()

    def close(self, within_s: float) -> bytes:
        """Waits at most `within_s` seconds until all data are written.

        Returns a message for the user if some of them were not written in time, else nothing.
        """
        if not self._has_thread:
            return b""
        self._is_closed = True
        self._tell_thread()
        has_ended = self._end.acquire(timeout=within_s)
        if has_ended or self.problem:
            return b""
        return as_line(
            f"{self.path} takes nothing any more (does its file system hang?): "
            f"{self.waiting_bytes} bytes of the output are lost"
        ).encode()

    def unwritten(self) -> bytes:
        """What was not written, once there is a problem."""
        with self._lock:
            return b"".join(self._waiting)

    def _tell_thread(self) -> None:
        if self._news.locked():
            self._news.release()

    def _work(self, wake: Callable[[], None]) -> None:
        try:
            os.makedirs(os.path.dirname(self.path), exist_ok=True)  # noqa: PTH103 PTH120
            while not (self._is_closed and not self._waiting):
                self._news.acquire()
                self._write_all()
        except OSError as error:
            self.problem = str(error)
            wake()
        finally:
            self._end.release()

    def _write_all(self) -> None:
        with self._lock:
            count = len(self._waiting)
            data = b"".join(self._waiting)
        if not data:
            return
        # Opened for each piece, so that readers on other hosts see it at once.
        with open(self.path, "ab") as file:  # noqa: PTH123  pathlib costs every rank 10 ms
            file.write(data)
        with self._lock:
            del self._waiting[:count]
            self.waiting_bytes -= len(data)


def _connection(rank: int, address: str) -> links.Connection:
    """A connection to the supervisor. Raises UserError if there is none to be had."""
    host, _, port = address.rpartition(":")
    try:
        return links.connect(host, int(port), CONNECT_S)
    except OSError as error:
        raise UserError(
            f"rank {rank} cannot reach `allranks launch` at {host}:{port} ({error.strerror or error}): "
            "look whether it still runs, and whether a firewall stands between."
        ) from error


def how_it_ended(status: int) -> tuple[int, int]:
    """(exit code, signal or 0) of a wait status; the code is 128 + signal, as shells have it."""
    signum = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    return (128 + signum if signum else os.WEXITSTATUS(status)), signum


class Stream(NamedTuple):
    """A pipe or a terminal: what is written to `inner` is read from `outer`."""

    outer: int
    inner: int


def _stream(is_terminal: bool) -> Stream:
    """A pipe, or a terminal where the user has one: programs show progress only there."""
    if not is_terminal or sys.platform == "win32":
        return Stream(*os.pipe())
    import termios

    stream = Stream(*os.openpty())
    mode = termios.tcgetattr(stream.inner)
    mode[1] &= ~termios.OPOST  # the user's own terminal turns \n into \r\n
    termios.tcsetattr(stream.inner, termios.TCSANOW, mode)
    return stream


if __name__ == "__main__":
    main()
