"""A thread beside each rank's training: it sees that a rank has died, hangs or is stopped, and ends all.

Every rank keeps one connection to rank 0, on which nothing is said while all is well: the kernel closes it
when a process ends, however that came about. A rank that makes no progress for too long tells rank 0,
which asks all ranks where they are. Who does not answer is stopped or stuck; else those that came to the
fewest collectives keep the others waiting. They are named, with step and stack, and every rank ends.
docs/reliability.md tells it from the user's side.
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import logging
import os
import secrets
import selectors
import signal
import socket
import statistics
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allranks.base import links, processes
from allranks.base.errors import UserError
from allranks.config import WatchdogConfig
from allranks.job.identity import RankIdentity
from allranks.runtime import mpi
from allranks.runtime.meeting import Meeting

TICK_S = 0.5
ANSWER_S = 2.5  # for another rank's thread to answer, on a busy host too
PATIENCE_S = 8.0  # more for one that runs: its main thread may be in a long call that keeps the GIL
LOOK_S = 1.0  # to find out what has become of a rank
NEWS_S = 0.5  # for word of a death that is still on its way
LEAST_STEP_S = 30.0
FRAMES = 12  # of a stack, the innermost ones
NAMED = 4  # ranks in a message
DUMP = getattr(signal, "SIGRTMAX", 0) - 5  # makes a rank of several write down its stack; Linux only
# What is known of a rank from afar, by how it came to notice.
FROM_AFAR = {
    "gone": "is gone: it was killed, or its node went down",
    "mute": "",
    "stuck": "does not answer",
}
file_log = logging.getLogger("watchdog")  # not below "allranks": for logs/rank-N.log, not for the console


@dataclass
class _Link:
    """A connection between rank 0 and another rank."""

    connection: links.Connection
    rank: int | None = None  # of the other end; None: it has left

    def say(self, **word: Any) -> None:
        self.connection.try_to_send(**word)


class Watchdog:
    """The training's progress (attributes that the main thread writes), and the thread that looks at it."""

    def __init__(self, limits: WatchdogConfig, identity: RankIdentity) -> None:
        self.limits, self.rank = limits, identity.rank
        self.meeting: Meeting | None = None  # not there yet
        self.step = 0  # completed
        self.begun = 0  # steps that this process has begun
        self.batches = self.arrivals = 0
        self.busy_s, self.busy_steps = 0.0, 0
        self.compiles = False  # any step may take as long as the first
        self._began, self._busy = time.perf_counter(), False
        self._durations: deque[float] = deque(maxlen=101)
        self._phase: tuple[str, float] | None = None
        self._main = threading.get_ident()
        # no rank outlives its launcher; what a shell has started may
        self._parent = None if identity.launcher in ("none", "environment") else identity.parent_pid
        self._parting = self._closed = self._ending = False
        self._code = 1
        self._host, self._secret = socket.gethostname(), secrets.token_hex(32)
        self._dump: int | None = None
        self._selector = selectors.DefaultSelector()
        self._door: links.Door | None = None  # on rank 0
        self._links: dict[int, _Link] = {}  # by rank; rank 0's on every other rank
        # what the ranks prepared; on other ranks than 0 rank 0's alone
        self._peers: Sequence[Mapping[str, Any]] = []
        self._deputy = 1
        # s, as far as this thread was scheduled: a suspended machine's time does not count
        self._clock = 0.0
        self._moved_at = self._alarm_after = 0.0
        self._due: float | None = None  # by when others must have answered
        self._patient = True
        self._reports: dict[int, dict[str, Any]] | None = None  # while they are collected, on rank 0
        self._findings: dict[int, str] = {}  # on ranks that seem to be to blame, on rank 0
        self._asked: set[int] = set()  # of these, those whose neighbours were asked
        self._steps: list[int] = []  # of the ranks that have told theirs
        self._left: set[int] = set()  # ranks that have ended well
        self._condemned: list[int] = []  # processes on this host to be killed
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    # --- said by the main thread: a few attributes, below a microsecond -------------------------------

    def progress(self, step: int) -> None:
        """`step` steps are done, and the next one begins."""
        now = time.perf_counter()
        if self.begun > 1:
            self._durations.append(now - self._began)
        self.step, self._began = step, now
        self.begun += 1
        self._busy = self.begun > 1  # the first step compiles

    def batch(self) -> None:
        """A batch has been evaluated."""
        self.batches += 1
        self._busy = False  # what comes next is no step

    def arrive(self, in_step: bool = True) -> None:
        """This rank has come to a collective. The time up to a step's first one is its own work."""
        self.arrivals += 1
        if self._busy and in_step:
            self._busy = False
            self.busy_s += time.perf_counter() - self._began
            self.busy_steps += 1

    @contextlib.contextmanager
    def phase(self, name: str, limit_s: float) -> Iterator[None]:
        """A stretch with a limit of its own, such as "saving"; the other ranks wait as long."""
        before, self._phase = self._phase, (name, limit_s)
        try:
            yield
        finally:
            self._phase = before

    def hold(self) -> None:
        """Gives the news of another rank's death time to come: that explains an error better."""
        if self._links:
            time.sleep(NEWS_S)
        while self._ending:
            time.sleep(NEWS_S)  # the thread ends this process

    def fail(self, code: int) -> None:
        """This rank ends with an error that it has told the user: the others end too, without a word."""
        self._code = code
        if self._links and self.rank and not self._closed:
            self._links[0].say(failed=True)
            time.sleep(ANSWER_S)  # rank 0's word ends this process first
        elif self._links:
            self._ending = True
            self._end_others()

    def close(self) -> None:
        """The run has ended well, or with an error that all ranks know."""
        self._parting = (
            True  # a rank that closes while our bye comes there resets the connection, its own lost
        )
        for link in list(self._links.values()):
            link.say(bye=True)  # before the connection ends, which would be an alarm without it
        self._closed = True
        if self._dump is not None:
            faulthandler.unregister(DUMP)
            os.close(self._dump)

    # --- getting to know the others -------------------------------------------------------------------

    def prepare(self, one_host: bool) -> dict[str, Any]:
        """What others must know to look after this process; rank 0 opens its door. Raises UserError."""
        if sys.platform == "linux":
            self._dump = os.memfd_create("allranks-stack")
            faulthandler.register(DUMP, file=self._dump)
        door = None if self.rank else self._open_door(one_host)
        return {"host": self._host, "pid": os.getpid(), "dump": self._dump, "door": door}

    def join(self, peers: Sequence[Mapping[str, Any]], deputy: int) -> None:
        """Connects. `peers`: what the ranks prepared, on rank 0 of all, on others of rank 0 alone; `deputy`
        is the rank that speaks when rank 0 cannot.
        """
        self._peers, self._deputy = peers, deputy
        if self.rank:
            address, port, secret = peers[0]["door"]
            try:
                link = self._links[0] = _Link(links.connect(address, port, 4 * ANSWER_S), rank=0)
            except OSError as error:
                raise UserError(
                    f"rank {self.rank} on {self._host} cannot reach rank 0 at {address}:{port} ({error}): "
                    "look whether MASTER_ADDR is the same host's there, and whether a firewall is between."
                ) from error
            link.say(secret=secret, rank=self.rank)
            self._listen_to(link)
        else:
            self._door = links.Door(self._listener, self._secret, self._selector, self._welcome)
        # children, such as a data loader's workers, must not keep this rank's connections open
        os.register_at_fork(after_in_child=self._drop_sockets)

    def _open_door(self, one_host: bool) -> list[Any]:
        address = "127.0.0.1" if one_host else os.environ["MASTER_ADDR"]
        self._listener = links.listen(address, far=not one_host)
        return [address, self._listener.getsockname()[1], self._secret]

    # --- the thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        seen: Any = None
        last = time.monotonic()
        while not self._closed:
            for key, _ in self._selector.select(TICK_S if self._due is None else 0.05):
                key.data()
            now = time.monotonic()
            self._clock += min(now - last, 2 * TICK_S)
            last = now
            if (progress := (self.begun, self.batches, self._arrived(), self._phase)) != seen:
                seen, self._moved_at, self._alarm_after = progress, self._clock, 0.0
            if self._parent is not None and os.getppid() != self._parent:
                self._end("the launcher has ended" if self.rank == 0 else "")
            if self._door is not None:
                self._door.send_away_late()
            if self._due is not None:
                self._conclude(late=self._clock >= self._due)
            elif self._idle_s() >= self._limit()[1] + self._alarm_after:
                self._alarm()
        self._drop_sockets()
        self._selector.close()

    def _arrived(self) -> int:
        return self.arrivals + (self.meeting.rounds if self.meeting else 0)

    def _idle_s(self) -> float:
        return self._clock - self._moved_at

    def _limit(self) -> tuple[str, float]:
        """What this rank is doing, and how long that may take without progress."""
        if self._phase is not None:
            return self._phase
        if self.begun == 0:
            return "the start (watchdog.start_s)", self.limits.start_s
        if self.begun == 1 or self.compiles:
            return "a step that is the first or compiles (watchdog.first_step_s)", self.limits.first_step_s
        if self.limits.step_s is not None:
            return "a step (watchdog.step_s)", self.limits.step_s
        usual = statistics.median(list(self._durations) or [0.0])
        return "a step (watchdog.step_s)", max(LEAST_STEP_S, 10 * usual)

    def _report(self) -> dict[str, Any]:
        (name, limit_s), idle_s = self._limit(), self._idle_s()
        overdue = idle_s >= limit_s
        if overdue:  # no alarm of its own on top, before as long again has gone by
            self._alarm_after = idle_s
        stack = traceback.format_stack(sys._current_frames().get(self._main))[-FRAMES:]
        where = f"has made no progress for {idle_s:.1f} s; {limit_s:g} s are allowed for {name}. It is at\n"
        where += "".join(stack).rstrip()
        return {"step": self.step, "arrivals": self._arrived(), "overdue": overdue, "where": where}

    def _alarm(self) -> None:
        report = self._report()
        if not self._links:  # alone, or not in touch yet
            self._end(f"rank {self.rank} on {self._host}, in step {self.step + 1}: {report['where']}")
        elif self.rank == 0:
            self._ask()
        else:
            self._links[0].say(alarm=report)
            self._due, self._patient = self._clock + ANSWER_S, True

    def _conclude(self, late: bool) -> None:
        """Ends the wait for others' answers, where they are all there or the time is up."""
        if self.rank:
            if late:
                self._without_rank_0("mute" if self._patient else "stuck")
        elif self._findings:
            if late or not self._asked:
                self._pronounce()
        elif self._reports and (late or len(self._reports) + len(self._left) >= len(self._peers)):
            missing = [r for r in range(len(self._peers)) if r not in {*self._reports, *self._left}]
            if not missing:
                self._judge(self._reports)
            elif late:
                self._look_at(missing, "mute" if self._patient else "stuck")

    # --- rank 0 ---------------------------------------------------------------------------------------

    def _ask(self) -> None:
        if self._reports is None and not self._findings:
            self._reports, self._patient = {0: self._report()}, True
            self._due = self._clock + ANSWER_S
            for link in self._links.values():
                link.say(ask=True)

    def _judge(self, reports: Mapping[int, Mapping[str, Any]]) -> None:
        self._reports = self._due = None
        self._steps = [report["step"] for report in reports.values()]
        fewest = min(report["arrivals"] for report in reports.values())
        guilty = {r: reports[r] for r in sorted(reports) if reports[r]["arrivals"] == fewest}
        if all(report["overdue"] for report in guilty.values()):  # else the others must go on waiting
            self._findings = {r: report["where"] for r, report in guilty.items()}
            self._pronounce()

    def _look_at(self, ranks: Sequence[int], how: str) -> None:
        """Has somebody on their hosts look what has become of these ranks."""
        self._due = self._clock + 2 * LOOK_S
        self._steps = [*(report["step"] for report in (self._reports or {}).values()), self.step]
        others = self._links.keys() - set(ranks)
        witnesses = {self._peers[r]["host"]: self._links[r] for r in others}
        for r in ranks:
            peer, self._findings[r] = self._peers[r], FROM_AFAR[how]
            if peer["host"] == self._host:
                self._findings[r] = self._look(peer, how)
            elif peer["host"] in witnesses:
                self._asked.add(r)
                witnesses[peer["host"]].say(look=[r, dict(peer), how])
        self._conclude(late=False)

    def _pronounce(self) -> None:
        named = {r: found for r, found in self._findings.items() if found}
        if not named:  # they do not answer, but run
            self._findings, self._asked = {}, set()
            self._patient, self._due = False, self._clock + PATIENCE_S
            return
        sentences = [
            f"rank {r} on {self._peers[r]['host']}, in step {min(self._steps) + 1}: {found}"
            for r, found in list(named.items())[:NAMED]
        ]
        if len(named) > NAMED:
            sentences.append(f"and {len(named) - NAMED} more ranks")
        self._end("\nallranks: ".join([*sentences, f"all {len(self._peers)} ranks end."]))

    def _end_others(self, first: int | None = None) -> None:
        """Who is to blame ends first, so that a launcher's own words are about that one."""
        for rank in [first, *list(self._findings)[:NAMED]]:
            if rank in self._links:
                self._links[rank].say(end=True)
                time.sleep(0.1)
        for link in list(self._links.values()):
            link.say(end=True)
        time.sleep(0.1)

    # --- the connections ------------------------------------------------------------------------------

    def _listen_to(self, link: _Link) -> None:
        self._selector.register(link.connection, selectors.EVENT_READ, lambda: self._hear(link))

    def _welcome(self, connection: links.Connection, hello: dict[str, Any]) -> None:
        """Another rank has connected to rank 0, and has shown the secret."""
        connection.sock.settimeout(LOOK_S)
        link = self._links[hello["rank"]] = _Link(connection, rank=hello["rank"])
        self._listen_to(link)
        self._obey_all(link)

    def _obey_all(self, link: _Link) -> None:
        """Does what the messages say that have arrived whole."""
        obey = self._obey_rank_0 if self.rank else self._obey
        while (word := link.connection.inbox.take()) is not None:
            obey(link, word)

    def _hear(self, link: _Link) -> None:
        try:
            is_there = link.connection.receive()
            self._obey_all(link)
            if is_there:
                return
        except (OSError, links.WireError):
            pass
        self._selector.unregister(link.connection)
        link.connection.close()
        if link.rank is None or self._parting or self._ending:
            return
        self._links.pop(link.rank, None)
        if self.rank:
            self._without_rank_0("gone")
        elif link.rank not in self._findings:
            self._look_at([link.rank], "gone")

    def _obey(self, link: _Link, word: dict[str, Any]) -> None:
        """What another rank tells rank 0."""
        assert link.rank is not None  # the door has seen to that
        match word:
            case {"bye": True}:
                self._left.add(link.rank)
                self._links.pop(link.rank)
                link.rank = None
            case {"failed": True}:
                self._end_others(first=link.rank)
                self._end()
            case {"alarm": dict(report)}:
                link.say(wait=True)
                self._ask()
                if self._reports is not None:
                    self._reports[link.rank] = report
            case {"report": dict(report)} if self._reports is not None:
                self._reports[link.rank] = report
            case {"found": [int(rank), str(text)]} if rank in self._asked:
                self._asked.remove(rank)
                self._findings[rank] = text

    def _obey_rank_0(self, link: _Link, word: dict[str, Any]) -> None:
        self._due = None  # it is there
        match word:
            case {"ask": True}:
                link.say(report=self._report())
            case {"look": [int(rank), dict(peer), str(how)]}:
                link.say(found=[rank, self._look(peer, how)])
            case {"end": True}:
                self._end()
            case {"bye": True}:
                self._links.pop(0)
                link.rank = None

    def _without_rank_0(self, how: str) -> None:
        """Rank 0 has died, or has not answered. Its deputy speaks; the others leave it time for that."""
        zero = self._peers[0]
        who = f"rank 0 on {zero['host']}, in step {self.step + 1}"
        found = FROM_AFAR[how]
        if self.rank == self._deputy:
            found = self._look(zero, how) if zero["host"] == self._host else found
        elif how == "gone":
            time.sleep(NEWS_S)
        if how == "mute" and not found:
            self._patient, self._due = False, self._clock + PATIENCE_S
            if self.rank != self._deputy:
                self._due += 2 * LOOK_S
        else:
            self._end(f"{who}: {found}\nallranks: all ranks end." if self.rank == self._deputy else "")

    def _look(self, peer: Mapping[str, Any], how: str) -> str:
        found = look(peer["pid"], peer["dump"], how)
        if found and how != "gone":
            self._condemned.append(peer["pid"])
        return found

    def _end(self, message: str = "") -> None:
        """Ends this rank, whatever its main thread does, and from rank 0 all others."""
        self._ending = True
        # should this thread get stuck on its way
        faulthandler.dump_traceback_later(4 * LOOK_S, exit=True, file=os.open(os.devnull, os.O_WRONLY))
        if message:
            with contextlib.suppress(OSError):  # nobody reads any more
                os.write(2, f"allranks: {message}\n".encode())
            file_log.info(message)
        for pid in self._condemned:  # not before it is named: its launcher may then kill us all
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.rank == 0:
            self._end_others()
        processes.kill_descendants(limit_s=LOOK_S)
        if message:
            mpi.abort(self._code)
        os._exit(self._code)

    def _drop_sockets(self) -> None:
        for key in list((self._selector.get_map() or {}).values()):
            key.fileobj.close()  # type: ignore[union-attr]


def look(pid: int, dump: int | None, how: str) -> str:
    """What has become of a rank on this host that is `gone`, or `mute`: then "" unless it is stopped, or
    `stuck`: it has been mute for so long that it is to blame anyhow.
    """
    stat = processes.process_stat(pid)
    if stat is None:
        return FROM_AFAR[how]
    if how == "gone":
        status = stat.wait_status  # there until the launcher has taken note of the end
        if status == 0:
            return FROM_AFAR[how]
        signum = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
        return processes.how_it_ended(os.WEXITSTATUS(status), signum)
    stopped = stat.state in "Tt"
    if how == "mute" and not stopped:
        return ""
    found, stack = "is stopped (state T)" if stopped else FROM_AFAR[how], ""
    with contextlib.suppress(OSError):
        stack = _stack_of(pid, dump) if dump is not None else ""
    return f"{found}. It is at\n{stack}" if stack else found


def _stack_of(pid: int, dump: int) -> str:
    """The main thread's Python stack by faulthandler, also where it is stopped or keeps the GIL."""
    before, written, deadline = None, "", time.monotonic() + LOOK_S
    with open(f"/proc/{pid}/fd/{dump}") as file:  # noqa: PTH123
        # to the main thread itself (glibc 2.30): any other may run it when the main thread has gone on
        send = getattr(ctypes.CDLL(None), "tgkill", lambda pid, _, signum: os.kill(pid, signum))
        send(pid, pid, DUMP)
        os.kill(pid, signal.SIGCONT)
        while (not written or written != before) and time.monotonic() < deadline:
            time.sleep(0.02)
            before, written = written, written + file.read()
        os.kill(pid, signal.SIGSTOP)  # its training must not go on
    frames = written.rpartition("hread 0x")[2].splitlines()[1 : FRAMES + 1]  # the main thread comes last
    return "\n".join(reversed(frames))
