"""Starts the launcher, and watches over every rank until all have ended.

Each rank's guard (allranks.launch.guard) connects to this process. Through that connection the guard sends
the rank's output and how it ended. Through it this process can end the rank, under every launcher.

One launch has three phases: STARTING, while ranks come; RUNNING, once all have come and were told to begin;
ENDING, once the first has failed, the last has ended, a limit is reached or a signal has arrived. Only for
ranks that run does this process wait without a limit. A guard that is stopped, a launcher that does not end
and a console that nobody reads get some seconds each.

This file holds the phases: what each message of a guard, each limit and each signal leads to. Parts of it
have files of their own:

launcher_process.py   the launcher as a process: started, heard, ended
arrivals.py           who connects, and whether it belongs to this launch
output.py             the ranks' output, which waits while the console is full
suspension.py         whether guards are silent because the scheduler has suspended the job
idle.py               which ranks make no progress, and which one is to blame
common_stop.py        the call of allranks.should_stop() at which all ranks stop
outcome.py            how it all went: the exit code and one sentence
"""

from __future__ import annotations

import asyncio
import enum
import os
import secrets
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from allranks.base import links, processes
from allranks.base.errors import EXIT_REQUEUE, EXIT_TIMED_OUT
from allranks.base.signals import TWICE_S
from allranks.base.text import printable, some
from allranks.job import variables
from allranks.job.hosts import address_for
from allranks.launch import idle, outcome
from allranks.launch.arrivals import Guarded, Newcomers, loss_by, next_message, problem_with
from allranks.launch.common_stop import CommonStop
from allranks.launch.console import Console, Writer, terminal_size, terminals
from allranks.launch.keyboard import Keyboard
from allranks.launch.launcher_process import LauncherProcess
from allranks.launch.outcome import LOST_CODE, NEAR_S, Conclusion, Evidence, Loss, Outcome, Rank
from allranks.launch.output import Output
from allranks.launch.suspension import Suspension

START_S = 60.0  # how long the ranks may take to start and to say who they are
GRACE_S = 10.0  # from a user's SIGTERM or Ctrl-C to SIGKILL, for a program of which nothing is known
PATIENCE_S = 10.0  # so long after a signal the user is told what the launch still waits for
# After Ctrl-C the ranks get SIGINT first. A program that still runs after this part of the grace gets
# SIGTERM.
TERM_AT = 0.5
FALL_S = 1.0  # when one rank has failed, from the others' SIGTERM to their SIGKILL
# How long guards may take to say that a killed rank has ended, and how long the launcher may take to end
# after its last rank.
LEAVE_S = 5.0
ASK_S = 10.0  # how often a guard is asked whether it is there
LEAST_ASK_S = 0.25  # if the user has set a short limit, it is asked more often, but at most so often
SILENT_S = 60.0  # a guard that has said nothing for so long is stopped, or its host is down
# If the event loop wakes up so much later than it should, this process must have been stopped. On a busy
# host it wakes up late, too, but never so late.
SUSPENDED_S = 5.0
NOTICE_S = 0.1  # once this process goes on, so long it may take to notice that it was stopped
LOOK_S = 8.0  # how long guards may take to see where their programs are: py-spy takes 2 s to start
MOST_LOOKS = 64  # so many ranks are looked at
MOST_SHOWN = 4  # so many of the ranks to blame are shown

END_THE_LAUNCH = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)  # signals to this process
# With these a user who has asked before says that there is no more time to save. SIGHUP is not among them:
# a terminal that is closed sends it, and so does the shell in it.
IMPATIENT = (signal.SIGINT, signal.SIGTERM)
PASSED_ON = (signal.SIGUSR1, signal.SIGUSR2)  # these are passed on to the ranks, once they run


class Phase(enum.Enum):
    """How far a launch has come."""

    STARTING = enum.auto()  # some ranks have not come yet
    RUNNING = enum.auto()  # all have come, and were told to begin
    ENDING = enum.auto()  # all were told to end or will be at once, or all have ended


@dataclass(frozen=True)
class Limits:
    """How long things may take, in seconds."""

    start_s: float = START_S
    grace_s: float = GRACE_S
    run_s: float | None = None  # the whole launch, counted from when all ranks have started
    idle_s: float | None = None  # the time in which no rank does anything


def run(
    argv: Sequence[str],
    env: Mapping[str, str],
    run_dir: str | Path | None,
    *,
    world_size: int,
    hosts: Sequence[str] = (),
    start_s: float = START_S,
    grace_s: float = GRACE_S,
    run_s: float | None = None,
    idle_s: float | None = None,
    interrupts: bool = True,
    watches: bool = False,
    ask_scheduler: Callable[[], bool] | None = None,
) -> Outcome:
    """Runs the launcher `argv`, which starts allranks.launch.guard on every rank; says how it went.

    `env` is the launcher's whole environment. `hosts` are the hosts that rank 0, 1, ... will be on, so that
    one that does not come can be named. This process's stdin goes to rank 0. The stdout of other
    ranks goes to RUN_DIR/output/rank-N.out; without `run_dir` it is shown in whole lines. `start_s`,
    `grace_s`, `run_s` and `idle_s` are the fields of Limits; without `interrupts` Ctrl-C reaches the ranks
    as SIGTERM. `watches` says whether the ranks are watched for progress: a training has its own watchdog.
    `ask_scheduler` says whether the scheduler has suspended the job. To be called from the main thread.
    Raises UserError if the launcher cannot be started or a host is not known.
    """
    writer = Writer()
    limits = Limits(start_s, grace_s, run_s, idle_s)
    supervision = Supervision(
        world_size,
        hosts,
        limits,
        Console(writer.put),
        writer=writer,
        interrupts=interrupts,
        reads_stdin=True,
        watches=watches,
        ask_scheduler=ask_scheduler,
    )
    return supervision.run(argv, {**env, variables.TERMINAL: terminals()}, run_dir)


def until_ranks_run() -> None:
    """Until the ranks run, lets SIGUSR1 and SIGUSR2 end this process with exit code 85.

    That code asks for another start of the job. Nothing is lost, because no rank has done any work yet.
    """
    for number in PASSED_ON:
        signal.signal(number, lambda *_: sys.exit(EXIT_REQUEUE))


class Supervision:
    """One launch, from its start to the end of its last process."""

    def __init__(
        self,
        world_size: int,
        hosts: Sequence[str],
        limits: Limits,
        console: Console,
        *,
        writer: Writer | None = None,
        on_output: Callable[[Rank, str, bytes], None] | None = None,
        passes_on: bool = True,
        interrupts: bool = True,
        reads_stdin: bool = False,
        watches: bool = False,
        ask_scheduler: Callable[[], bool] | None = None,
    ) -> None:
        """`hosts` are those that rank 0, 1, ... will be on.

        `writer` is the one behind the console, if there is one: while it is full, the ranks' output waits.
        `on_output` gets what the ranks write, instead of the console. `passes_on` says whether SIGUSR1 and
        SIGUSR2 are passed on to the ranks; otherwise they end the launch. `reads_stdin` says whether rank 0
        gets this process's stdin. `interrupts` says whether Ctrl-C reaches the ranks as SIGINT; otherwise
        it reaches them as SIGTERM. `watches` says whether the ranks share a page with their guards, by
        which they are watched and agree on a stop (job/pulse.py). `ask_scheduler` says whether the job is
        suspended, and may take a minute.
        """
        self.world_size = world_size
        self.hosts = hosts
        self.limits = limits
        self.passes_on = passes_on
        self.interrupts = interrupts
        self.phase = Phase.STARTING
        self.guarded: dict[int, Guarded] = {}  # by rank, those that have come
        self._newcomers = Newcomers(most=world_size + links.SPARE)
        self.stopped_by = 0  # the signal that ends the launch
        self._stopped_at = 0.0  # when that signal came, by the event loop's clock
        self.problem: Conclusion | None = None  # what no rank's end explains
        self._output = Output(console, writer, on_output)
        self._reads_stdin = reads_stdin
        self._watches = watches
        self._idle = idle.IdleWatch()
        # Looks for the ranks that make no progress, and names them; None until something is noticed.
        self._naming: asyncio.Task[None] | None = None
        self._stop = CommonStop()
        self._has_begun = False  # all ranks have come, and were told to begin
        self._suspension = Suspension(ask_scheduler)
        self._stopped_s = 0.0  # for how long this process was stopped, as with its whole job
        self._is_suspended = False  # the user was told that all ranks are stopped
        self._secret = secrets.token_hex(32)
        # What all ranks are told. Rank 0's address comes from the launch's variables, or else from the
        # connection of rank 0's guard.
        self._place: dict[str, Any] = {"world_size": world_size, "secret": secrets.token_hex(16)}

    def run(self, argv: Sequence[str], env: Mapping[str, str], run_dir: str | Path | None) -> Outcome:
        """Runs the launch to its end.

        Raises UserError if the launcher cannot be started or a host is not known.
        """
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
        self._changed = asyncio.Event()  # a rank, the launcher or the console has news
        self._keyboard = Keyboard(self._loop, lambda data: self._tell_rank_0(stdin=data))
        self._output.start(on_nobody_reads=self._changed.set)

        links.allow_connections(self.world_size)
        address = await self._open_door()
        self._place["master_addr"] = env.get(variables.MASTER_ADDR)
        self._launcher = LauncherProcess(argv, {**env, **self._private_variables(address, run_dir)})
        for number in (*END_THE_LAUNCH, *PASSED_ON):
            if not _is_to_be_ignored(number):
                self._loop.add_signal_handler(number, self._on_signal, number)
        self._loop.add_signal_handler(signal.SIGCHLD, self._changed.set)
        self._loop.add_signal_handler(signal.SIGWINCH, self._on_resize)
        self._after(self.limits.start_s, self._at_start_limit)
        said = asyncio.create_task(
            self._launcher.hear(self._output.line, may_show=lambda: self.phase is not Phase.ENDING)
        )
        asking = asyncio.create_task(self._ask_guards())

        try:
            await self._until(lambda: self._launcher.has_ended)
            if self._connected():  # the ranks must not outlive their launcher
                self._end_all(FALL_S)
                self._loop.call_later(LEAVE_S, self._give_up, True)
                await self._until(lambda: not self._connected())
            await asyncio.wait([said], timeout=NEAR_S)  # the launcher's last words
        finally:
            asking.cancel()
            self._keyboard.stop()
            self._give_up(False)
            await self._launcher.reap()

        ranks = [known.rank for known in self.guarded.values()]
        evidence = self._evidence(Path(argv[0]).name, ranks)
        conclusion = outcome.conclusion(evidence)
        self._show_last(conclusion)
        await self._output.until_written(is_in_a_hurry=lambda: bool(self.stopped_by))
        return Outcome(
            code=conclusion.code,
            failure=conclusion.sentence and f"{conclusion.sentence}.",
            hosts={r.rank: r.host for r in ranks},
            gone=outcome.hosts_gone(self.hosts, ranks),
            stopped=bool(self.stopped_by) or evidence.nobody_reads,
            failed_host=outcome.host_to_blame(evidence),
            progress=self._idle.progress,
        )

    async def _open_door(self) -> str:
        """Begins to listen for the guards. Returns the address, as host:port."""
        server = await asyncio.start_server(self._serve, address_for(self.hosts), 0, backlog=4096)
        host, port = server.sockets[0].getsockname()[:2]
        return f"{host}:{port}"

    def _private_variables(self, address: str, run_dir: str | Path | None) -> dict[str, str]:
        """What the guards need to know, and their programs never see."""
        return {
            variables.SUPERVISOR: address,
            variables.SECRET: self._secret,
            variables.OUTPUT: str(Path(run_dir).absolute() / "output") if run_dir else "",
        }

    def _after(self, limit_s: float, act: Callable[[], None]) -> None:
        """Calls `act` after `limit_s` seconds. Seconds in which this process was stopped do not count.

        When a stopped process goes on, this timer may be due before _ask_guards() has noticed the stop and
        has added its length to `_stopped_s`. So look() runs NOTICE_S after the timer: by then _ask_guards()
        has run.
        """
        stopped_before_s = self._stopped_s

        def look() -> None:
            more_s = self._stopped_s - stopped_before_s
            if more_s > 0:
                self._after(more_s, act)
            else:
                act()

        self._loop.call_later(limit_s, self._loop.call_later, NOTICE_S, look)

    async def _until(self, condition: Callable[[], bool]) -> None:
        """Waits until `condition` is true: checked after each news of a rank, a process or the console.

        Also returns once nobody reads this command's output any more, unless a signal has come: then the
        ranks have their time to save in any case. Ctrl-C at a terminal ends the reader as well (`allranks
        launch ... | tee log`), and that may be noticed before the signal. So this waits NEAR_S for a signal
        first.
        """
        while not condition():
            if self._output.nobody_reads and not self.stopped_by:
                await asyncio.sleep(NEAR_S)
                if not self.stopped_by:
                    return
            await self._changed.wait()
            self._changed.clear()

    def _connected(self) -> list[Guarded]:
        return [known for known in self.guarded.values() if known.guard is not None]

    def _running(self) -> set[int]:
        """The ranks whose program has not ended, and whose guard can be told something."""
        return {known.rank.rank for known in self._connected() if known.rank.code is None}

    def _evidence(self, launcher: str, ranks: Sequence[Rank]) -> Evidence:
        return Evidence(
            world_size=self.world_size,
            ranks=ranks,
            launcher=launcher,
            launcher_code=self._launcher.code,
            launcher_was_killed=self._launcher.was_killed,
            had_started=self._has_begun,
            stopped_by=self.stopped_by,
            signal_is_for_us=not self.passes_on,
            problem=self.problem,
            nobody_reads=self._output.nobody_reads,
        )

    # --- the ranks ------------------------------------------------------------------------------

    async def _serve(self, reader: asyncio.StreamReader, guard: asyncio.StreamWriter) -> None:
        """Handles one connection from its first message on. Without the secret it gets no answer."""
        known = None
        inbox = links.Inbox()
        try:
            links.keep_alive(guard.get_extra_info("socket"))
            hello = await self._newcomers.hello(reader, guard, inbox)
            if not links.knows_secret(hello, self._secret):
                return
            known = self._welcome(hello, guard)
            while known is not None:
                self._hear(known, await next_message(reader, inbox))
                await self._output.until_room(known)
        except asyncio.CancelledError:
            pass  # at the launch's end: asyncio would show where a stranger's connection waits
        except (OSError, EOFError, ValueError, links.WireError, asyncio.TimeoutError) as error:
            if known is not None and known.guard is not None:
                self._on_break(known, loss_by(error))
        finally:
            guard.close()
            self._changed.set()

    def _welcome(self, hello: Mapping[str, Any], guard: asyncio.StreamWriter) -> Guarded | None:
        """Takes in a rank that has come. Returns None if it does not belong to this launch."""
        problem = problem_with(hello, self.world_size, self.guarded)
        if problem:
            self._fail(Conclusion(1, problem))
        if self.phase is Phase.ENDING:
            guard.write(links.message(code=1))
        if problem:
            return None

        number = hello["rank"]
        known = Guarded(
            Rank(number, hello["host"]),
            guard,
            heard_at=self._loop.time(),
            boot_id=hello.get("boot_id"),
            pid=hello.get("pid"),
        )
        self.guarded[number] = known
        if number == 0:
            self._place["master_port"] = hello["port"]
            self._place["master_addr"] = self._place["master_addr"] or guard.get_extra_info("peername")[0]
        if len(self.guarded) == self.world_size and self.phase is Phase.STARTING:
            self._begin()
        return known

    def _begin(self) -> None:
        """Called once all ranks have come: each rank gets its place, and they start together."""
        self.phase = Phase.RUNNING
        self._has_begun = True
        if self.limits.run_s is not None:
            self._after(self.limits.run_s, self._at_run_limit)
        by_host: dict[tuple[str, str | None], list[Guarded]] = {}
        for number in sorted(self.guarded):
            known = self.guarded[number]
            by_host.setdefault((known.rank.host, known.boot_id), []).append(known)
        for here in by_host.values():
            for local_rank, known in enumerate(here):
                is_rank_0 = known.rank.rank == 0
                word: dict[str, Any] = {
                    "env": {"local_rank": local_rank, "local_world_size": len(here), **self._place},
                    "stdin": self._reads_stdin and is_rank_0,
                    "size": terminal_size() if is_rank_0 else None,
                }
                if self._watches:
                    word["watch"] = "beats" if self.limits.idle_s is None else "idle"
                self._idle.ranks[known.rank.rank] = idle.RankWatch(self._loop.time())
                known.tell(**word)
        if self._reads_stdin:
            self._keyboard.read_on()

    def _hear(self, known: Guarded, word: Mapping[str, Any]) -> None:
        """Takes in one message of a guard: how its program has ended, that it is there, or output."""
        known.heard_at = self._loop.time()
        if "pulse" in word:
            self._idle.ranks[known.rank.rank].note(idle.Pulse(*word["pulse"]), known.heard_at)
        if "code" in word:
            self._hear_code(known, word)
        elif "took" in word:  # rank 0's program has all of its stdin that was read so far
            self._keyboard.read_on()
        elif "wish" in word:
            if self._stop.begin(int(word["wish"]), self._running()):
                self._tell_all(hold=True)
        elif "answered" in word:
            if self._stop.answered(known.rank.rank, int(word["answered"])):
                self._tell_stop()
        elif "look" in word:
            self._idle.saw(known.rank.rank, links.output(word["look"]))
        elif "looked" in word:
            self._idle.have_looked.add(known.rank.rank)
        elif "here" not in word:
            for kind, text in word.items():
                self._output.show(known, kind, links.output(text))

    def _hear_code(self, known: Guarded, word: Mapping[str, Any]) -> None:
        """A guard says how its program has ended.

        It says so twice: as the program ends, and once all of its output is passed on. Which rank has
        failed first depends on when the programs ended, not on whose output was slow.
        """
        if known.rank.code is None:
            known.rank.code = int(word["code"])
            known.rank.signal = int(word["signal"])
            known.rank.ended_at = float(word["time"])
        if word["last"]:
            self._on_end(known)

    def _on_break(self, known: Guarded, loss: Loss) -> None:
        """To be called when the connection to a guard has ended."""
        known.guard = None
        r = known.rank
        if self.phase is Phase.STARTING:
            del self.guarded[r.rank]  # it counts as one that has not come
        elif self._has_begun and not r.has_ended:
            if r.code is None:
                self._lose(r, loss)
            self._on_end(known)

    def _lose(self, r: Rank, loss: Loss) -> None:
        r.code = LOST_CODE
        r.ended_at = time.time()
        r.loss = loss

    def _on_end(self, known: Guarded) -> None:
        """To be called when a rank has ended, and all of its output has arrived."""
        known.rank.has_ended = True
        self._idle.last_end_at = self._loop.time()
        if self._stop.ended(known.rank.rank):
            self._tell_stop()
        self._output.end_lines_of(known.rank)
        if known.rank.has_failed and self.phase is not Phase.ENDING:
            self._enter_ending()
            # News of an earlier failure may still be on its way. It must not look as if this process had
            # ended that rank.
            self._loop.call_later(NEAR_S, self._end_all, FALL_S)
        if all(other.rank.has_ended for other in self.guarded.values()):
            self._enter_ending()
            self._tell_all(bye=True)
            self._loop.call_later(LEAVE_S, self._give_up, False)

    def _tell_all(self, **word: Any) -> None:
        for known in self.guarded.values():
            known.tell(**word)

    def _tell_rank_0(self, **word: Any) -> None:
        if 0 in self.guarded:
            self.guarded[0].tell(**word)

    def _tell_stop(self) -> None:
        """Tells all ranks, and the user, at which call of allranks.should_stop() all ranks stop."""
        self._tell_all(stop_at=self._stop.at)
        self._output.say(
            f"{self._stop.reason}: all ranks stop at call {self._stop.at} of allranks.should_stop()"
        )

    def _pause_s(self) -> float:
        """How long to wait before the guards are asked again: less if a limit is short."""
        limits_s = self._idle.limits_s(self.limits.idle_s)
        return max(LEAST_ASK_S, min([ASK_S, *(limit_s / 4 for limit_s in limits_s)]))

    async def _ask_guards(self) -> None:
        """Asks each guard now and then whether it is there, and gives up those that do not answer."""
        while True:
            asked_at = self._loop.time()
            pause_s = self._pause_s()
            await asyncio.sleep(pause_s)
            now = self._loop.time()
            if now > asked_at + pause_s + SUSPENDED_S:
                # This process itself was stopped, as when a scheduler suspends the whole job. The guards
                # may have answered meanwhile, and their answers have not been read yet. So none of them
                # counts as silent.
                self._stopped_s += now - asked_at - pause_s
                for known in self.guarded.values():
                    known.heard_at = now
                self._idle.forgive(now)
            if not self._has_begun:
                continue
            asked = [known for known in self._connected() if known.is_to_answer]
            for known in asked:
                known.tell(here=True)
            silent = [known for known in asked if now >= known.heard_at + SILENT_S]
            was_suspended = self._is_suspended
            self._note_suspension(bool(silent) and await self._are_suspended(asked, now))
            if was_suspended and not self._is_suspended:
                # The guards go on one after another, and some have not answered yet.
                for known in self.guarded.values():
                    known.heard_at = self._loop.time()
                self._idle.forgive(self._loop.time())
            elif not self._is_suspended:
                self._give_up_silent(silent, now)
            self._check_progress()

    def _give_up_silent(self, silent: Sequence[Guarded], asked_at: float) -> None:
        """Takes the guards that had not answered for too long at `asked_at`, and have not since, as lost.

        The scheduler may have been asked meanwhile, which takes up to a minute and a half.
        """
        for known in silent:
            has_answered = known.heard_at > asked_at
            if known.guard is not None and known.is_to_answer and not has_answered:
                known.guard.close()
                self._on_break(known, Loss.SILENT)
        self._changed.set()

    async def _are_suspended(self, asked: Sequence[Guarded], now: float) -> bool:
        """Whether the guards that were asked are silent because the whole job is suspended."""
        # A guard may have answered just before the suspension, and then counts as silent a little later.
        silent_for_s = SILENT_S - ASK_S - SUSPENDED_S
        if any(now < known.heard_at + silent_for_s for known in asked):
            return False  # a scheduler would have suspended all guards
        boot_id = processes.boot_id()
        here = [known.pid for known in asked if known.pid is not None and known.boot_id == boot_id]
        return await self._suspension.is_seen(here, now)

    def _note_suspension(self, is_suspended: bool) -> None:
        """Tells the user once that the ranks are suspended, and once that they go on."""
        if is_suspended == self._is_suspended:
            return
        self._is_suspended = is_suspended
        words = "the job goes on"
        if is_suspended:
            words = "the job is suspended: all ranks are stopped. Waiting until they go on"
        self._output.line(f"allranks: {words}.\n".encode())

    # --- ranks that make no progress ------------------------------------------------------------

    def _check_progress(self) -> None:
        """Notices ranks that do nothing, or do not call allranks.heartbeat() any more."""
        if not self._watches or self.phase is not Phase.RUNNING or self._naming is not None:
            return
        now = self._loop.time()
        # While the ranks wait for the scheduler or for the console, they cannot make progress.
        if self._is_suspended or self._output.is_full:
            self._idle.forgive(now)
            return
        running = self._running()
        watched = {rank: watch for rank, watch in self._idle.ranks.items() if rank in running}
        finding = idle.notice(watched, self.limits.idle_s, now, self._idle.last_end_at)
        if finding is not None:
            self._naming = asyncio.create_task(self._name(finding, watched))

    async def _name(self, finding: idle.Finding, watched: Mapping[int, idle.RankWatch]) -> None:
        """Asks the guards where their programs are, names the rank that stands out, and ends all ranks."""
        looking = idle.look_first(finding, watched)[:MOST_LOOKS]
        for rank in looking:
            self.guarded[rank].tell(look=True)
        give_up_at = self._loop.time() + LOOK_S
        while not self._idle.have_looked.issuperset(looking) and self._loop.time() < give_up_at:
            await asyncio.sleep(0.05)

        looks = {rank: text.decode(errors="replace") for rank, text in self._idle.looks.items()}
        blamed = idle.to_blame(finding, watched, looks)
        for rank in blamed[:MOST_SHOWN]:
            seen = looks.get(rank, "").rstrip() or "its guard does not see where it is"
            self._output.say(printable(f"rank {rank} on {self.guarded[rank].rank.host}: {seen}"))
        names = {rank: f"{rank} on {self.guarded[rank].rank.host}" for rank in watched}
        sentence = idle.sentence(finding, blamed, names, watched)
        host = self.guarded[blamed[0]].rank.host if len(blamed) < self.world_size else ""
        self._fail(Conclusion(1, sentence, host=host))

    # --- ending ---------------------------------------------------------------------------------

    def _on_signal(self, signum: int) -> None:
        if signum in PASSED_ON and self._has_begun and self.passes_on:
            self._tell_all(signal=signum)
        elif self.stopped_by:
            if is_impatient(signum, self._loop.time() - self._stopped_at):
                self._kill()
        else:
            self.stopped_by = signum
            self._stopped_at = self._loop.time()
            self._end_by_signal(signum, self.limits.grace_s if self._has_begun else 0)

    def _fail(self, problem: Conclusion) -> None:
        """Ends all ranks because of a problem that no rank's end explains."""
        if self.phase is not Phase.ENDING:
            self.problem = problem
            self._end_all(FALL_S)

    def _enter_ending(self) -> None:
        self.phase = Phase.ENDING
        self._output.wait_no_more()

    def _end_by_signal(self, signum: int, grace_s: float) -> None:
        """Ends all ranks because of a signal to this process, with time for them to save."""
        if signum == signal.SIGINT and self.interrupts:
            # A program may treat Ctrl-C in its own way, as Python does with KeyboardInterrupt. One that
            # goes on all the same gets SIGTERM, as from every other signal.
            self._end_all(grace_s, signal.SIGINT)
            self._loop.call_later(TERM_AT * grace_s, partial(self._tell_all, signal=signal.SIGTERM))
        else:
            self._end_all(grace_s)
        if grace_s > PATIENCE_S:
            self._loop.call_later(PATIENCE_S, self._say_that_it_waits, signum)

    def _say_that_it_waits(self, signum: int) -> None:
        self._output.say(
            f"{signal.Signals(signum).name}: the ranks have up to {self.limits.grace_s:.0f} s to save and "
            "to end. Another Ctrl-C or SIGTERM ends them at once."
        )

    def _end_all(self, kill_after_s: float, signum: int = signal.SIGTERM) -> None:
        """Ends every rank: by a signal now, and by SIGKILL after `kill_after_s` seconds."""
        self._enter_ending()
        self._tell_all(**{"signal": signum} if self._has_begun else {"code": 1})
        self._loop.call_later(kill_after_s, self._kill)

    def _kill(self) -> None:
        self._tell_all(kill=True)
        if not self._has_begun:  # guards that have not come cannot be told
            self._launcher.terminate()
        self._loop.call_later(LEAVE_S, self._give_up, True)

    def _give_up(self, were_killed: bool) -> None:
        """Waits no longer for guards and launcher. Guards that still run end their programs by themselves.

        If the ranks `were_killed`, a guard that has not reported the end of its rank by now counts as lost.
        """
        for known in self._connected():
            assert known.guard is not None
            known.guard.close()
            known.guard = None
            if were_killed and self._has_begun and known.rank.code is None:
                self._lose(known.rank, Loss.SILENT)
        if not self._launcher.has_ended:
            self._launcher.kill()
        self._changed.set()

    def _at_start_limit(self) -> None:
        if self._has_begun:
            return
        missing = [number for number in range(self.world_size) if number not in self.guarded]
        silent = outcome.hosts_gone(self.hosts, [known.rank for known in self.guarded.values()])
        where = "The hosts all answered:"
        if silent:
            where = f"None came from {some(silent)}: look whether they are up, take them out, or"
        problem = (
            f"{len(missing)} of {self.world_size} ranks ({some(missing)}) did not start within "
            f"{self.limits.start_s:.0f} s. {where} allow more time with --start-within"
        )
        self._fail(Conclusion(1, problem))

    def _at_run_limit(self) -> None:
        ranks = [known.rank for known in self.guarded.values()]
        running = [f"{r.rank} on {r.host}" for r in ranks if r.code is None]
        problem = f"not done within {self.limits.run_s:.0f} s: rank {some(running)}"
        self._fail(Conclusion(EXIT_TIMED_OUT, problem))

    # --- what is said ---------------------------------------------------------------------------

    def _on_resize(self) -> None:
        """To be called when the user has changed the size of the terminal window."""
        size = terminal_size()
        if size is not None and self._has_begun:
            self._tell_rank_0(size=size)

    def _show_last(self, conclusion: Conclusion) -> None:
        """Shows the last lines, once everything has ended."""
        explained = any(known.rank.code not in (0, None) for known in self.guarded.values())
        # If a rank's end explains the failure, the launcher's own lines are about the same, and are left
        # out.
        if not explained and not self.stopped_by:
            for line in self._launcher.not_shown:
                self._output.line(line)
        if conclusion.remark:
            self._output.say(conclusion.remark)
        self._output.flush()


def is_impatient(signum: int, after_s: float) -> bool:
    """Whether a signal says that the ranks are to end at once, `after_s` seconds after the first signal.

    One request may arrive as several signals within milliseconds: a wrapper program may pass on a signal
    that its whole process group has got already.
    """
    return signum in IMPATIENT and after_s > TWICE_S


def _is_to_be_ignored(signum: int) -> bool:
    """Whether this process was started so that a closed terminal or Ctrl-C does not end it.

    `nohup` starts a command with SIGHUP ignored, and a shell script starts its background commands with
    SIGINT ignored.
    """
    return signum in (signal.SIGHUP, signal.SIGINT) and signal.getsignal(signum) == signal.SIG_IGN
