"""Starts the launcher, and watches over every rank until all have ended.

Each rank's guard (allranks.launch.guard) connects to this process: the ranks' output, their ends and our
word to end them take that way, whatever the launcher. What the launcher itself writes is shown, but not
its summary of a failure that has been named here already.
"""

from __future__ import annotations

import asyncio
import os
import secrets
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from allranks.base import links, processes
from allranks.base.errors import EXIT_REQUEUE, EXIT_TIMED_OUT, UserError
from allranks.base.text import some
from allranks.job import variables
from allranks.job.hosts import address_for, short
from allranks.launch.console import HOLD_S, Console, Rank, say

START_S = 60.0  # until every rank has said who it is
GRACE_S = 10.0  # from a user's SIGTERM or Ctrl-C to SIGKILL
SETTLE_S = 0.2  # for news of an earlier failure that is still on its way
FALL_S = 1.0  # from SIGTERM to SIGKILL for the ranks beside one that failed
LEAVE_S = 5.0  # for the launcher, once every rank has ended
HELLO_S = 10.0  # for whoever connects to show the secret
LOST = 128 + signal.SIGKILL
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)


@dataclass(frozen=True)
class Outcome:
    """How it went: `code` is 0, or that of the first rank that failed."""

    code: int
    failure: str  # one line, empty where nothing failed
    hosts: Mapping[int, str]  # by rank, of those that came
    gone: tuple[str, ...] = ()  # hosts of which nothing is heard: no rank came, or all vanished
    stopped: bool = False  # by a signal to us


def run(
    argv: Sequence[str],
    env: Mapping[str, str],
    run_dir: str | Path | None,
    *,
    world_size: int,
    hosts: Sequence[str] = (),
    **limits: Any,
) -> Outcome:
    """Runs the launcher `argv`, which starts allranks.launch.guard on every rank; how it went.

    `env` is the launcher's whole environment; `hosts` are the hosts that the ranks will be on, so that
    one that does not come can be named. Other ranks' stdout than rank 0's goes to
    RUN_DIR/output/rank-N.out; without `run_dir` it is shown like their errors. For the main thread.
    """
    console = Console()
    env = {**env, variables.TERMINAL: console.terminals()}
    return Supervision(console, world_size, hosts, **limits).run(argv, env, run_dir)


def until_ranks_run() -> None:
    """Until then SIGUSR1 and SIGUSR2 end this process with "start me again": nothing is lost yet."""
    for number in PASSED_ON:
        signal.signal(number, lambda *_: sys.exit(EXIT_REQUEUE))


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
        limit_s: float | None = None,  # for all of it, counted from when all ranks have started
        passes_on: bool = True,  # SIGUSR1 and SIGUSR2 to the ranks; else they end all
    ) -> None:
        self.console = console
        self.world_size = world_size
        self.hosts = hosts
        self.start_s, self.grace_s, self.limit_s, self.passes_on = start_s, grace_s, limit_s, passes_on
        self.secret = secrets.token_hex(32)
        self.ranks: dict[int, Rank] = {}
        self.started = False  # every rank has come, and has been told to begin
        self.ending = False  # every rank has been told to end, or will be at once
        self.stopped_by = 0  # a signal to us
        self.code, self.failure = 0, ""  # of what no rank's end explains
        self._place: dict[str, Any] = {"world_size": world_size, "secret": secrets.token_hex(16)}
        self._said: list[bytes] = []  # the launcher's lines, not shown yet
        self._gave_up = False  # the launcher had to be killed

    def run(self, argv: Sequence[str], env: Mapping[str, str], run_dir: str | Path | None) -> Outcome:
        """Raises UserError where the launcher cannot be started or a host is not known."""
        before = processes.descendants(os.getpid())
        processes.adopt_orphans()
        try:
            return asyncio.run(self._run(argv, env, run_dir))
        finally:
            until_ranks_run()
            processes.kill_descendants(spare=before)
            processes.adopt_orphans(False)

    async def _run(
        self, argv: Sequence[str], env: Mapping[str, str], run_dir: str | Path | None
    ) -> Outcome:
        self._loop = asyncio.get_running_loop()
        self._changed = asyncio.Event()
        links.raise_file_limit()
        self._place["master_addr"] = env.get(variables.MASTER_ADDR)
        server = await asyncio.start_server(self._serve, address_for(self.hosts), 0, backlog=4096)
        host, port = server.sockets[0].getsockname()
        env = {
            **env,
            variables.SUPERVISOR: f"{host}:{port}",
            variables.SECRET: self.secret,
            variables.OUTPUT: str(Path(run_dir).absolute() / "output") if run_dir else "",
        }
        self._launcher = _started(argv, env)
        for number in (*STOPPING, *PASSED_ON):
            self._loop.add_signal_handler(number, self._on_signal, number)
        self._loop.add_signal_handler(signal.SIGCHLD, self._changed.set)
        said = asyncio.create_task(self._listen())
        try:
            self._loop.call_later(self.start_s, self._at_start_limit)
            await self._until(lambda: self._launcher.poll() is not None)
            if self._connected():  # the launcher died: its ranks must not outlive it
                self._end_all(FALL_S)
                self._loop.call_later(LEAVE_S, self._give_up)
                await self._until(lambda: not self._connected())
            await asyncio.wait([said], timeout=SETTLE_S)  # its last words
        finally:
            self._give_up()
            self._launcher.wait()
        if self.console.unread:  # as a program that is not watched over would end
            self.code, self.failure = 128 + signal.SIGPIPE, ""
        gone, ranks = self._gone(), self.ranks.values()
        code, failure = self._verdict(Path(argv[0]).name)
        where = {r.rank: r.host for r in ranks}
        return Outcome(code, failure and f"{failure}.", where, gone, bool(self.stopped_by))

    def _gone(self) -> tuple[str, ...]:
        heard_of = {short(r.host) for r in self.ranks.values() if not r.lost}
        return tuple(host for host in dict.fromkeys(self.hosts) if short(host) not in heard_of)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Waits for what news of ranks or processes may bring about, or until nobody reads on."""
        while not condition() and not self.console.unread:
            await self._changed.wait()
            self._changed.clear()

    def _connected(self) -> list[Rank]:
        return [r for r in self.ranks.values() if r.guard is not None]

    # --- the ranks ------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, guard: asyncio.StreamWriter) -> None:
        """One connection, from hello to its end; nobody without the secret gets a word."""
        r = None
        inbox = links.Inbox()
        try:
            links.keep_alive(guard.get_extra_info("socket"))
            hello = await asyncio.wait_for(_next_message(reader, inbox), HELLO_S)
            if not links.knows_secret(hello, self.secret):
                return
            r = self._welcome(hello, guard)
            while r is not None:
                self._hear(r, await _next_message(reader, inbox))
        except asyncio.CancelledError:
            pass  # at the launch's end: asyncio would show where a stranger's connection waits
        except (OSError, EOFError, ValueError, links.WireError, asyncio.TimeoutError):
            if r is not None and r.guard is not None:
                self._on_break(r)
        finally:
            guard.close()
            self._changed.set()

    def _welcome(self, hello: Mapping[str, Any], guard: asyncio.StreamWriter) -> Rank | None:
        number, host, world_size = hello["rank"], hello["host"], hello["world_size"]
        problem = ""
        if number in self.ranks or number >= self.world_size:
            problem = (
                f"{'a second' if number in self.ranks else 'a'} rank {number} came from {host}, of "
                f"{self.world_size} ranks that were asked for; the variables there are those of "
                f"`{hello['launcher']}`: take the launcher of the MPI or scheduler that this host has "
                "(--launcher)"
            )
        elif world_size not in (None, self.world_size):
            problem = (
                f"rank {number} on {host} was started as one of {world_size}, but {self.world_size} "
                "were asked for: look at the launcher's options"
            )
        if problem:
            self._fail(1, problem)
        if self.ending:
            guard.write(links.message(code=1))
        if problem:
            return None
        r = self.ranks[number] = Rank(number, host, guard)
        if number == 0:
            self._place["master_port"] = hello["port"]
            self._place["master_addr"] = self._place["master_addr"] or guard.get_extra_info("peername")[0]
        if len(self.ranks) == self.world_size and not self.ending:
            self._begin()
        return r

    def _begin(self) -> None:
        """Everybody is here: each rank gets its place, and they start together."""
        self.started = True
        if self.limit_s is not None:
            self._loop.call_later(self.limit_s, self._at_limit)
        by_host: dict[str, list[Rank]] = {}
        for number in sorted(self.ranks):
            by_host.setdefault(self.ranks[number].host, []).append(self.ranks[number])
        for here in by_host.values():
            for local_rank, r in enumerate(here):
                place = {"local_rank": local_rank, "local_world_size": len(here), **self._place}
                self._tell(r, env=place)

    def _hear(self, r: Rank, word: Mapping[str, Any]) -> None:
        if "code" in word:
            r.code, r.signal, r.ended_at = int(word["code"]), int(word["signal"]), float(word["time"])
            if word["last"]:
                self._on_end(r)
        else:
            for kind, text in word.items():
                self.console.show(r, kind, links.output(text))
            if self.console.held:
                self._loop.call_later(HOLD_S, self.console.flush)
        if self.console.unread:
            self._changed.set()

    def _on_break(self, r: Rank) -> None:
        r.guard = None
        if not self.started:
            del self.ranks[r.rank]  # it counts as one that did not come
        elif not r.ended:
            if r.code is None:
                r.code, r.ended_at, r.lost = LOST, time.time(), True
            self._on_end(r)

    def _on_end(self, r: Rank) -> None:
        r.ended = True
        self.console.ended(r)
        if r.code not in (0, EXIT_REQUEUE) and not self.ending:
            self.ending = True
            self._loop.call_later(SETTLE_S, self._end_all, FALL_S)
        if all(other.ended for other in self.ranks.values()):
            self.ending = True
            self._tell_all(bye=True)
            self._loop.call_later(LEAVE_S, self._give_up)

    def _tell(self, r: Rank, **word: Any) -> None:
        if r.guard is not None:
            r.guard.write(links.message(**word))

    def _tell_all(self, **word: Any) -> None:
        for r in self.ranks.values():
            self._tell(r, **word)

    # --- ending ---------------------------------------------------------------------------------

    def _on_signal(self, signum: int) -> None:
        if signum in PASSED_ON and self.started and self.passes_on:
            self._tell_all(signal=signum)
        elif self.stopped_by:  # asked twice: no more grace
            self._kill()
        else:
            self.stopped_by = signum
            self._end_all(self.grace_s if self.started else 0)

    def _fail(self, code: int, failure: str) -> None:
        if not self.ending:
            self.code, self.failure = code, failure
            self._end_all(FALL_S)

    def _end_all(self, kill_after_s: float) -> None:
        """SIGTERM to every rank: from a SIGINT every rank of a Python program would print a traceback."""
        self.ending = True
        self._tell_all(**{"signal": signal.SIGTERM} if self.started else {"code": 1})
        self._loop.call_later(kill_after_s, self._kill)

    def _kill(self) -> None:
        self._tell_all(kill=True)
        if not self.started:  # nobody there whom we could tell
            self._launcher.terminate()
        self._loop.call_later(LEAVE_S, self._give_up)

    def _give_up(self) -> None:
        """No more waiting for guards and launcher; guards that live end themselves without us."""
        for r in self._connected():
            assert r.guard is not None
            r.guard.close()
            r.guard = None
        if self._launcher.poll() is None:
            self._gave_up = True
            os.killpg(self._launcher.pid, signal.SIGKILL)
        self._changed.set()

    def _at_start_limit(self) -> None:
        if self.started:
            return
        missing = [number for number in range(self.world_size) if number not in self.ranks]
        where = "The hosts all answered:"
        if silent := self._gone():
            where = f"None came from {some(silent)}: look whether they are up, take them out, or"
        self._fail(
            1,
            f"{len(missing)} of {self.world_size} ranks ({some(missing)}) did not start within "
            f"{self.start_s:.0f} s. {where} allow more time",
        )

    def _at_limit(self) -> None:
        running = [f"{r.rank} on {r.host}" for r in self.ranks.values() if r.code is None]
        self._fail(EXIT_TIMED_OUT, f"not done within {self.limit_s:.0f} s: rank {some(running)}")

    # --- what is said ---------------------------------------------------------------------------

    async def _listen(self) -> None:
        """The launcher's lines; each is shown after a while, unless all is ending by then."""
        reader, rest = asyncio.StreamReader(), b""
        await self._loop.connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), self._launcher.stdout
        )
        while data := await reader.read(65536):
            *lines, rest = (rest + data).split(b"\n")
            self._said += [line + b"\n" for line in lines]
            self._loop.call_later(SETTLE_S, self._show_said, len(lines))
        self._said += [rest + b"\n"] if rest else []

    def _show_said(self, count: int) -> None:
        while count and not self.ending:
            self.console.line(self._said.pop(0))
            count -= 1

    def _verdict(self, launcher: str) -> tuple[int, str]:
        """The exit code and what has failed, the first cause first."""
        bad = [r for r in self.ranks.values() if r.code not in (0, None)]
        failed = [r for r in bad if r.code != EXIT_REQUEUE]
        if not bad and not self.stopped_by:  # else the launcher speaks of what we name
            for line in self._said:
                self.console.line(line)
        self.console.flush(force=True)
        if self.stopped_by and (failed or not self.started or not self.passes_on):
            code = EXIT_REQUEUE if self.stopped_by in PASSED_ON else 128 + self.stopped_by
            return code, f"stopped by {signal.Signals(self.stopped_by).name}"
        if self.code and not self.stopped_by:
            return self.code, self.failure
        if failed:
            first = min(failed, key=_when)
            if first.lost:  # MPICH kills the other guards 3 ms after a rank has been killed
                near = first.ended_at + SETTLE_S
                killed = [r for r in failed if r.signal and r.ended_at < near]
                first = min(killed, key=_when, default=first)
            return first.code or 0, self._first_failure(first, failed)
        if bad:
            return EXIT_REQUEUE, ""
        code = self._launcher.returncode
        all_well = sum(r.code == 0 for r in self.ranks.values()) == self.world_size
        if all_well and self._gave_up:
            say(f"{launcher} had not ended {LEAVE_S:.0f} s after its last rank, and was killed")
            code = 0
        if code == 0 or self.stopped_by:
            return 0, ""
        how = f"killed by signal {-code}" if code < 0 else f"exit code {code}"
        came = f"{len(self.ranks)} of {self.world_size} ranks had started"
        return 128 - code if code < 0 else code, f"{launcher} ended with {how}; {came}"

    def _first_failure(self, first: Rank, failed: Sequence[Rank]) -> str:
        text = f"rank {first.rank} on {first.host} {first.how_it_ended()}"
        if self.world_size == 1:
            return text
        alike = [r for r in failed if (r.code, r.signal) == (first.code, 0)]
        if len(alike) == self.world_size:
            return f"{text}, and so did all {self.world_size} ranks"
        return f"{text}, the first of {self.world_size} ranks to fail; the others have been ended"


async def _next_message(reader: asyncio.StreamReader, inbox: links.Inbox) -> dict[str, Any]:
    """A connection's next message. Raises EOFError at its end, WireError where it is none of ours."""
    while (told := inbox.take()) is None:
        piece = await reader.read(links.PIECE_BYTES)
        if not piece:
            raise EOFError
        inbox.add(piece)
    return told


def _when(r: Rank) -> tuple[float, int]:
    return r.ended_at, r.rank


def _started(argv: Sequence[str], env: Mapping[str, str]) -> subprocess.Popen[bytes]:
    try:
        return subprocess.Popen(
            argv,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C at the terminal comes to us alone
            preexec_fn=partial(processes.die_with_parent, os.getpid(), signal.SIGTERM),  # noqa: PLW1509  no threads here
        )
    except OSError as error:
        raise UserError(
            f"launcher {argv[0]} cannot be started ({error.strerror}): load the module that brings it, "
            "or take another with --launcher."
        ) from error
