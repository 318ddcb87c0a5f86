"""Starts the launcher, and watches over every rank until all have ended.

Each rank's guard (allranks.launch.guard) connects to this process: the ranks' output, their ends
and our word to end them take that way, whatever the launcher. What the launcher itself writes is
shown, but not its summary of a failure that has been named here already.
"""

from __future__ import annotations

import errno
import hmac
import os
import resource
import secrets
import selectors
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from allranks.errors import UserError
from allranks.launch import processes, rank, wire

START_S = 60.0  # until every rank has said who it is
GRACE_S = 10.0  # from a user's SIGTERM or Ctrl-C to SIGKILL
SETTLE_S = 0.2  # for news of an earlier failure that is still on its way
FALL_S = 1.0  # from SIGTERM to SIGKILL for the ranks beside one that failed
LEAVE_S = 5.0  # for the launcher, once every rank has ended
HELLO_S = 10.0  # for whoever connects to show the secret
HOLD_S = 0.5  # other ranks' lines wait so long for the end of rank 0's line
REQUEUE = 85  # a rank's exit code for "stopped in order, go on later": no failure
LOST = 128 + signal.SIGKILL
# What the ranks' hosts must get of our environment, where a launcher passes nothing on by itself.
VARIABLES = (*rank.PRIVATE, rank.PREFLIGHT)


@dataclass
class Rank:
    """What is known of a rank."""

    rank: int
    host: str
    launcher: str
    link: socket.socket | None
    partial: dict[bytes, bytes] = field(default_factory=dict)  # lines that are not whole yet
    code: int | None = None  # None: still running
    signal: int = 0
    ended_at: float = 0.0  # by its host's clock
    lost: bool = False

    def how_it_ended(self) -> str:
        if self.lost:
            return "vanished without a word: its guard was killed, or its node went down"
        if self.signal:
            hint = " (out of memory?)" if self.signal == signal.SIGKILL else ""
            return f"was killed by {signal.Signals(self.signal).name}{hint}"
        return f"ended with exit code {self.code}"


@dataclass(frozen=True)
class Outcome:
    """How it went: `code` is 0, or that of the first rank that failed."""

    code: int
    failure: str = ""  # one line, empty where nothing failed
    hosts: tuple[str, ...] = ()  # by rank, of those that came


def run(
    argv: Sequence[str],
    env: Mapping[str, str],
    run_dir: str | Path | None,
    *,
    world_size: int,
    hosts: Sequence[str] = (),
    start_s: float = START_S,
    grace_s: float = GRACE_S,
) -> int:
    """Runs the launcher `argv`, which starts allranks.launch.rank on every rank; the exit code.

    `env` is the launcher's whole environment; `hosts` are the hosts that the ranks will be on, so
    that one that does not come can be named. Other ranks' stdout than rank 0's goes to
    RUN_DIR/output/rank-N.out; without `run_dir` it is shown like their errors. For the main thread.
    """
    outcome = Supervision(Console(), world_size, hosts, start_s=start_s, grace_s=grace_s).run(
        argv, env, run_dir
    )
    if outcome.failure:
        print(f"allranks: {outcome.failure}", file=sys.stderr, flush=True)
    return outcome.code


def address_for(hosts: Sequence[str]) -> str:
    """This host's address on its way to `hosts`: loopback where they are all this one."""
    here = {socket.gethostname(), socket.gethostname().partition(".")[0], "localhost", "127.0.0.1"}
    for host in hosts:
        if host in here or host.partition(".")[0] in here:
            continue
        try:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
                probe.connect((host, 9))  # only looks up the route; nothing is sent
                return str(probe.getsockname()[0])
        except OSError as error:
            raise UserError(
                f"host {host} of the allocation cannot be found from {socket.gethostname()} "
                f"({error.strerror or error}): look at the hostfile, or take that host out."
            ) from error
    return "127.0.0.1"


class OutputLost(Exception):
    """What we show cannot be written: nobody reads it any more, or its disk is full.

    No OSError, so that it is never taken for a rank's broken connection.
    """


class Console:
    """Rank 0's bytes as they come, all other lines whole and between rank 0's lines."""

    def __init__(self, fds: Mapping[bytes, int] | None = None) -> None:
        self.fds = fds or {wire.STDOUT: 1, wire.STDERR: 2}
        self._in_line: dict[bytes, float] = {}  # rank 0's streams that have begun a line, since when
        self._held: list[bytes] = []

    def raw(self, kind: bytes, data: bytes) -> None:
        self._write(kind, data)
        self._in_line.pop(kind, None)
        if not data.endswith(b"\n"):
            self._in_line[kind] = time.monotonic()
        self.flush()

    def line(self, line: bytes) -> None:
        self._held.append(line)
        self.flush()

    def flush(self, force: bool = False) -> float | None:
        """Writes the lines that wait, if they may be written; else the seconds until they may."""
        if not self._held:
            return None
        if self._in_line:
            waited = time.monotonic() - min(self._in_line.values())
            if waited < HOLD_S and not force:
                return HOLD_S - waited
            for kind in self._in_line:
                self._write(kind, b"\n")
            self._in_line.clear()
        lines, self._held = self._held, []
        self._write(wire.STDERR, b"".join(lines))
        return None

    def drop(self) -> None:
        self._held.clear()

    def terminals(self) -> str:
        """Which of rank 0's streams end at a terminal."""
        return "".join(kind.decode() for kind, fd in self.fds.items() if os.isatty(fd))

    def _write(self, kind: bytes, data: bytes) -> None:
        try:
            while data:
                data = data[os.write(self.fds[kind], data) :]
        except OSError as error:
            raise OutputLost(error.errno, error.strerror) from error


class Supervision:
    """One launch from its start to the end of its last process."""

    def __init__(
        self,
        console: Console,
        world_size: int,
        hosts: Sequence[str] = (),
        *,
        start_s: float = START_S,
        grace_s: float = GRACE_S,
        limit_s: float | None = None,
    ) -> None:
        self.console = console
        self.world_size = world_size
        self.hosts = hosts
        self.grace_s = grace_s
        self.ranks: dict[int, Rank] = {}
        self.secret = secrets.token_hex(32)
        self.failure = ""  # one that no rank's end explains
        self.code = 0
        self.stopped_by = 0  # a signal to us
        self.started = False
        self._port: int | None = None
        self._start_by = time.monotonic() + start_s
        self._end_by: float | None = None  # counts from when all ranks have started
        self._limits = (start_s, limit_s)
        self._settle_at: float | None = None
        self._kill_at: float | None = None
        self._leave_by: float | None = None
        self._said: list[tuple[float, bytes]] = []  # the launcher's lines, not shown yet
        self._signals: list[int] = []
        self._env: Mapping[str, str] = {}
        self._selector = selectors.DefaultSelector()

    # --- the whole of it ------------------------------------------------------------------------

    def run(self, argv: Sequence[str], env: Mapping[str, str], run_dir: str | Path | None) -> Outcome:
        """Raises UserError where the launcher cannot be started or a host is not known."""
        before = processes.descendants(os.getpid())
        restore = self._catch_signals()
        processes.adopt_orphans()
        launcher = None
        try:
            raise_file_limit()
            with socket.create_server((address_for(self.hosts), 0), backlog=4096) as listener:
                self._selector.register(listener, selectors.EVENT_READ, self._accept)
                host, port = listener.getsockname()[:2]
                self._env = {
                    **env,
                    rank.SUPERVISOR: f"{host}:{port}",
                    rank.SECRET: self.secret,
                    rank.TERMINAL: self.console.terminals(),
                    rank.OUTPUT: str(Path(run_dir).absolute() / "output") if run_dir else "",
                }
                launcher = self._start(argv)
                while not self._all_over(launcher):
                    self._step(launcher)
        except OutputLost as error:  # as a program that is not watched over would end
            self._said.clear()
            self.console.drop()
            number, reason = error.args
            unread = number == errno.EPIPE
            self.code = 128 + signal.SIGPIPE if unread else 1
            self.failure = "" if unread else f"the ranks' output cannot be written ({reason})"
        finally:
            if launcher is not None and launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)
                launcher.wait()
            processes.kill_descendants(spare=before)
            processes.adopt_orphans(False)
            self._selector.close()
            restore()
        assert launcher is not None
        return self._outcome(Path(argv[0]).name, launcher.returncode)

    def _start(self, argv: Sequence[str]) -> subprocess.Popen[bytes]:
        parent = os.getpid()
        try:
            launcher = subprocess.Popen(
                list(argv),
                env=self._env,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                start_new_session=True,  # Ctrl-C at the terminal comes to us alone
                preexec_fn=partial(  # noqa: PLW1509  no threads here
                    processes.die_with_parent, parent, signal.SIGTERM
                ),
            )
        except OSError as error:
            raise UserError(
                f"launcher {argv[0]} cannot be started ({error.strerror}): load the module that "
                f"brings it, "
                "or take another with --launcher."
            ) from error
        assert launcher.stdout is not None
        self._selector.register(
            launcher.stdout,
            selectors.EVENT_READ,
            partial(self._on_launcher, launcher.stdout, bytearray()),
        )
        return launcher

    def _step(self, launcher: subprocess.Popen[bytes]) -> None:
        waits = [self._settle_at, self._kill_at, self._leave_by, self._end_by]
        waits += [] if self.started else [self._start_by]
        next_at = min((at for at in waits if at is not None), default=float("inf"))
        timeout = min(0.1 if self._said else 1.0, next_at - time.monotonic())
        hold = self.console.flush()
        for key, _ in self._selector.select(max(0.0, min(timeout, 1.0 if hold is None else hold))):
            key.data()
        self._obey_signals()
        self._watch_the_clock(launcher)
        self._show_launcher()

    def _all_over(self, launcher: subprocess.Popen[bytes]) -> bool:
        over = launcher.poll() is not None
        if over and any(r.link for r in self.ranks.values()) and self._leave_by is None:
            # the launcher died: its ranks must not outlive it
            self._end_all(signal.SIGTERM, FALL_S)
            self._leave_by = time.monotonic() + LEAVE_S
        return over and not any(r.link for r in self.ranks.values())

    def _watch_the_clock(self, launcher: subprocess.Popen[bytes]) -> None:
        now = time.monotonic()
        if self._settle_at is not None and now >= self._settle_at:
            self._settle_at = None
            self._end_all(signal.SIGTERM, FALL_S)
        if self._kill_at is not None and now >= self._kill_at:
            self._kill_at = None
            self._tell_all(wire.message(kill=True))
            self._leave_by = self._leave_by or now + LEAVE_S
            if not self.started:  # nobody there whom we could tell
                launcher.terminate()
        if not self.started and now >= self._start_by and not self._ending:
            self._fail(self._who_is_missing(self._limits[0]))
        if self._end_by is not None and now >= self._end_by and not self._ending:
            self._fail(self._who_still_runs(self._limits[1]))
        if self._leave_by is not None and now >= self._leave_by:
            self._leave_by = now + LEAVE_S
            for r in self.ranks.values():
                self._close(r)
            if launcher.poll() is None:
                os.killpg(launcher.pid, signal.SIGKILL)

    # --- the ranks ------------------------------------------------------------------------------

    def _accept(self) -> None:
        listener = next(
            key.fileobj for key in self._selector.get_map().values() if key.data == self._accept
        )
        assert isinstance(listener, socket.socket)
        link, _ = listener.accept()
        wire.keep_alive(link)
        link.settimeout(HELLO_S)
        self._selector.register(link, selectors.EVENT_READ, partial(self._greet, link, wire.Frames()))

    def _greet(self, link: socket.socket, frames: wire.Frames) -> None:
        """The first message of whoever has connected; nobody without the secret gets a word."""
        try:
            for _, payload in frames.feed(_received(link)):
                hello = wire.parse(payload)
                if not hmac.compare_digest(str(hello.get("secret")), self.secret):
                    raise wire.WireError("a wrong secret")
                self._selector.modify(link, selectors.EVENT_READ, self._welcome(link, frames, hello))
                return
        except (OSError, EOFError, wire.WireError):
            self._selector.unregister(link)
            link.close()

    def _welcome(
        self, link: socket.socket, frames: wire.Frames, hello: Mapping[str, Any]
    ) -> Callable[[], None]:
        number, known = hello["rank"], self.ranks.get(hello["rank"])
        new = Rank(number, hello["host"], hello["launcher"], link)
        problem = ""
        if known is not None or number >= self.world_size:
            problem = (
                f"{'a second' if known else 'a'} rank {number} came from {new.host}, of "
                f"{self.world_size} "
                f"ranks that were asked for; the variables there are those of `{new.launcher}`: "
                f"take the "
                "launcher of the MPI or scheduler that this host has (--launcher)."
            )
        elif hello["world_size"] not in (None, self.world_size):
            problem = (
                f"rank {number} on {new.host} was started as one of {hello['world_size']}, but "
                f"{self.world_size} were asked for: look at the launcher's options."
            )
        if problem:
            self._fail(problem)
            link.sendall(wire.message(code=1))
            return partial(self._ignore, link)
        self.ranks[number] = new
        if self._ending:
            link.sendall(wire.message(code=1))
        if number == 0:
            self._port = hello["port"]
        if len(self.ranks) == self.world_size and not self._ending:
            self._begin()
        return partial(self._hear, new, frames)

    def _ignore(self, link: socket.socket) -> None:
        self._selector.unregister(link)
        link.close()

    def _begin(self) -> None:
        """Everybody is here: each rank gets its place, and they start together."""
        self.started = True
        if self._limits[1] is not None:
            self._end_by = time.monotonic() + self._limits[1]
        by_host: dict[str, list[int]] = {}
        for number in sorted(self.ranks):
            by_host.setdefault(self.ranks[number].host, []).append(number)
        first = self.ranks[0]
        assert first.link is not None
        address = "127.0.0.1" if len(by_host) == 1 else first.link.getpeername()[0]
        for r in self.ranks.values():
            place = {
                "world_size": self.world_size,
                "local_rank": by_host[r.host].index(r.rank),
                "local_world_size": len(by_host[r.host]),
                "master_addr": self._env.get(rank.MASTER_ADDR) or address,
                "master_port": self._port,
            }
            self._tell(r, wire.message(env=place))

    def _hear(self, r: Rank, frames: wire.Frames) -> None:
        assert r.link is not None
        try:
            for kind, payload in frames.feed(_received(r.link)):
                if kind == wire.MESSAGE:
                    self._on_end(r, wire.parse(payload))
                else:
                    self._show(r, kind, payload)
        except (OSError, EOFError, wire.WireError):
            self._close(r)
            if not self.started:
                del self.ranks[r.rank]  # it counts as one that did not come
            elif r.code is None:
                r.lost = True
                self._on_end(r, {"code": LOST, "signal": 0, "time": time.time()})

    def _on_end(self, r: Rank, word: Mapping[str, Any]) -> None:
        r.code, r.signal, r.ended_at = int(word["code"]), int(word["signal"]), float(word["time"])
        for kind in list(r.partial):
            self._show(r, kind, b"\n")
        if r.code not in (0, REQUEUE) and not self._ending:
            self._settle_at = time.monotonic() + SETTLE_S
        if all(other.code is not None for other in self.ranks.values()):
            self._let_go()

    def _let_go(self) -> None:
        self._settle_at = self._kill_at = None
        self._leave_by = time.monotonic() + LEAVE_S
        self._tell_all(wire.message(bye=True))

    def _show(self, r: Rank, kind: bytes, data: bytes) -> None:
        if r.rank == 0:
            if r.code is None:
                self.console.raw(kind, data)
            return
        *lines, rest = (r.partial.pop(kind, b"") + data).split(b"\n")
        if len(rest) > wire.LARGEST:
            lines, rest = [*lines, rest], b""
        if rest:
            r.partial[kind] = rest
        me = f"[rank {r.rank} on {r.host}] ".encode()
        for line in lines:  # our own training names rank and host itself
            self.console.line((b"" if line.startswith(me) else me) + line + b"\n")

    # --- ending ---------------------------------------------------------------------------------

    @property
    def _ending(self) -> bool:
        return bool(self.failure or self.stopped_by or self._settle_at or self._kill_at or self._leave_by)

    def _fail(self, failure: str, code: int = 1) -> None:
        if not self._ending:
            self.failure, self.code = failure, code
            self._end_all(signal.SIGTERM, FALL_S)

    def _end_all(self, signum: int, kill_after_s: float) -> None:
        word = wire.message(signal=signum) if self.started else wire.message(code=1)
        self._tell_all(word)
        self._kill_at = time.monotonic() + kill_after_s

    def _tell_all(self, word: bytes) -> None:
        for r in self.ranks.values():
            self._tell(r, word)

    def _tell(self, r: Rank, word: bytes) -> None:
        if r.link is not None:
            try:
                r.link.sendall(word)
            except OSError:
                return  # its end of the connection is read next, and says so

    def _close(self, r: Rank) -> None:
        if r.link is not None:
            self._selector.unregister(r.link)
            r.link.close()
            r.link = None

    def _catch_signals(self) -> Callable[[], None]:
        """Signals become entries of a list, and wake the selector."""
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
        old = {n: signal.signal(n, lambda got, _: self._signals.append(got)) for n in numbers}
        read, write = os.pipe()
        for end in (read, write):
            os.set_blocking(end, False)
        old_fd = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        self._selector.register(read, selectors.EVENT_READ, partial(os.read, read, 4096))

        def restore() -> None:
            signal.set_wakeup_fd(old_fd)
            for number, handler in old.items():
                signal.signal(number, handler)
            os.close(read)
            os.close(write)

        return restore

    def _obey_signals(self) -> None:
        while self._signals:
            signum = self._signals.pop(0)
            if signum in (signal.SIGUSR1, signal.SIGUSR2):
                self._tell_all(wire.message(signal=signum))
            elif self.stopped_by:  # asked twice: no more grace
                self._kill_at = time.monotonic()
            else:
                self.stopped_by = signum
                # Ctrl-C too: from SIGINT every rank of a Python program would print a traceback
                self._end_all(signal.SIGTERM, self.grace_s if self.started else 0)

    # --- what is said ---------------------------------------------------------------------------

    def _on_launcher(self, pipe: Any, rest: bytearray) -> None:
        data = os.read(pipe.fileno(), 65536)
        rest += data
        *lines, tail = bytes(rest).split(b"\n")
        rest[:] = tail
        if not data:
            self._selector.unregister(pipe)
            lines += [tail] if tail else []
        self._said += [(time.monotonic(), line + b"\n") for line in lines]

    def _show_launcher(self) -> None:
        """The launcher's lines, unless they sum up an end that is ours to tell."""
        due = time.monotonic() - SETTLE_S
        while self._said and self._said[0][0] < due and not self._ending:
            self.console.line(self._said.pop(0)[1])

    def _outcome(self, launcher: str, returncode: int) -> Outcome:
        bad = [r for r in self.ranks.values() if r.code not in (0, None)]
        failed = [r for r in bad if r.code != REQUEUE]
        hosts = tuple(self.ranks[number].host for number in sorted(self.ranks))
        outcome = Outcome(self.code, self.failure, hosts)
        if self.stopped_by:
            name = signal.Signals(self.stopped_by).name
            if not self.started or failed:
                outcome = Outcome(128 + self.stopped_by, f"stopped by {name}", hosts)
            else:
                outcome = Outcome(REQUEUE if bad else 0, "", hosts)
        elif failed and not self.failure and not self.code:
            first = min(failed, key=lambda r: (r.ended_at, r.rank))
            assert first.code is not None
            outcome = Outcome(first.code, self._first_failure(first, failed), hosts)
        elif bad and not self.failure and not self.code:
            outcome = Outcome(REQUEUE, "", hosts)
        elif returncode and not self.failure and not self.code:
            code = 128 - returncode if returncode < 0 else returncode
            how = f"killed by signal {-returncode}" if returncode < 0 else f"exit code {returncode}"
            outcome = Outcome(
                code, f"{launcher} ended with {how}; {len(self.ranks)} of {self.world_size} ranks "
                f"had started", hosts
            )  # fmt: skip
        if outcome.failure and not failed and not self.stopped_by:  # nobody else has explained it
            for _, line in self._said:
                self.console.line(line)
        self.console.flush(force=True)
        return replace(outcome, failure=outcome.failure and f"{outcome.failure}.")

    def _first_failure(self, first: Rank, failed: Sequence[Rank]) -> str:
        text = f"rank {first.rank} on {first.host} {first.how_it_ended()}"
        alike = [r for r in failed if (r.code, r.signal) == (first.code, first.signal)]
        if self.world_size == 1:
            return text
        if len(alike) == self.world_size and not first.signal:
            return f"{text}, and so did all {self.world_size} ranks"
        return f"{text}, the first of {self.world_size} ranks to fail; the others have been ended"

    def _who_is_missing(self, limit_s: float) -> str:
        missing = [number for number in range(self.world_size) if number not in self.ranks]
        come = {r.host.partition(".")[0] for r in self.ranks.values()}
        silent = [h for h in dict.fromkeys(self.hosts) if h.partition(".")[0] not in come]
        where = (
            f" None came from {_some(silent)}: look whether they are up, take them out, or"
            if silent
            else ""
        )
        return (
            f"{len(missing)} of {self.world_size} ranks ({_some(missing)}) did not start within "
            f"{limit_s:.0f} s."
            f"{where or ' The hosts all answered:'} allow more time"
        )

    def _who_still_runs(self, limit_s: float | None) -> str:
        running = [f"{r.rank} on {r.host}" for r in self.ranks.values() if r.code is None]
        return f"not done within {limit_s:.0f} s: rank {_some(running)}"


def _received(link: socket.socket) -> bytes:
    data = link.recv(65536)
    if not data:
        raise EOFError
    return data


def _some(things: Sequence[object]) -> str:
    return ", ".join(map(str, things[:8])) + (", ..." if len(things) > 8 else "")


def raise_file_limit() -> None:
    """A connection a rank: the usual 1,024 open files are too few for a large job."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
