"""A thread beside each rank's training: it sees that a rank has died, hangs or is stopped, and ends all.

Every rank holds one connection to rank 0, on which nothing is said while all is well. The kernel closes it
when a process ends, however that came about. A rank that makes no progress for too long tells rank 0, which
asks all ranks where they are; `verdict` says who is to blame then. That rank is named, with step and stack,
and every rank ends. docs/reliability.md tells it from the user's side.

Messages from rank 0: `ask` for a report, `wait` (an alarm has been heard), `look` at a process of your
host, `end` yourself, `bye`. Messages to rank 0: `alarm` and `report`, `found` (after `look`), `failed`
(this rank ends with an error that it has told the user), `bye` (this rank has ended well). With `end` and
`failed` goes the exit code of all ranks.
"""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from allranks.base import processes
from allranks.base.errors import UserError
from allranks.base.processes import ProcessIdentity
from allranks.config import WatchdogConfig
from allranks.job.identity import RankIdentity
from allranks.runtime.watch import postmortem, verdict
from allranks.runtime.watch.connections import Connections, DoorPlace
from allranks.runtime.watch.progress import Progress
from allranks.runtime.watch.verdict import Decision, Inquiry, Known, Peer, Report, State

TICK_S = 0.5  # how often the thread looks at this rank's progress while all is well
BUSY_TICK_S = 0.05  # how often it looks while it waits for answers of other ranks
ANSWER_S = 2.5  # how long another rank's thread may take to answer: enough for a busy host
# How much longer it may take if its process runs: its main thread may be in a long call that keeps Python's
# lock.
PATIENCE_S = 8.0
# How long another rank may take to say what has become of a rank on its host.
LOOK_S = 2 * postmortem.LOOK_S
NEWS_S = 0.5  # how long the news of a rank's death may be on its way
FIRST_WORD_S = 5.0  # so much earlier than the others rank 0 says that a rank has not come to the start
APART_S = 0.1  # the ranks to blame are told to end so much earlier than the others
END_S = 4.0  # how long this thread may take to end the process; then a timer in C ends it

# Not below the logger "allranks": for logs/rank-N.log, not for the console, where it stands already.
file_log = logging.getLogger("watchdog")


class IdleClock:
    """How long a rank has made no progress, and by when others must have answered.

    It counts seconds in which this thread was scheduled: those of a machine that is suspended do not count.
    """

    def __init__(self, progress: Progress) -> None:
        self.now_s = 0.0
        self._progress = progress
        self._last_tick_s = time.monotonic()
        self._mark: object = None  # the progress that was seen last
        self._moved_at_s = 0.0  # when that progress was seen first
        # For how long this rank had been idle at its last alarm. The next alarm comes after that time and
        # the limit.
        self._alarm_after_s = 0.0

    def tick(self) -> None:
        """Looks at the progress. To be called every TICK_S: more than twice that is not counted."""
        monotonic_s = time.monotonic()
        self.now_s += min(monotonic_s - self._last_tick_s, 2 * TICK_S)
        self._last_tick_s = monotonic_s

        mark = self._progress.mark()
        if mark != self._mark:
            self._mark = mark
            self._moved_at_s = self.now_s
            self._alarm_after_s = 0.0

    def idle_s(self) -> float:
        """Seconds without progress."""
        return self.now_s - self._moved_at_s

    def is_over(self, limit_s: float) -> bool:
        """Whether it is time for an alarm, where `limit_s` without progress are allowed."""
        return self.idle_s() >= limit_s + self._alarm_after_s

    def note_alarm(self) -> None:
        self._alarm_after_s = self.idle_s()


@dataclass
class Crew:
    """The ranks of the run, as far as this one knows them: rank 0 knows all, the others know rank 0."""

    peers: list[Peer] = field(default_factory=list)
    deputy: int = 1  # the rank that speaks where rank 0 cannot
    left: set[int] = field(default_factory=set)  # ranks that have ended well


class Watchdog:
    """One rank's watch over itself and the others: its thread, and what the main thread tells it.

    `abort(code)` ends all ranks of a job that MPI has started, and does nothing elsewhere.
    """

    def __init__(
        self, limits: WatchdogConfig, identity: RankIdentity, abort: Callable[[int], None]
    ) -> None:
        self.progress = Progress(limits)
        self.rank = identity.rank
        self._abort = abort
        self._exit_code = 1
        self._me = Peer(socket.gethostname(), ProcessIdentity.of_this_process(), dump_fd=None)
        # No rank outlives its launcher. What a shell has started may outlive the shell.
        is_launched = identity.launcher not in ("none", "environment")
        self._launcher_pid = identity.parent_pid if is_launched else None
        # Where the last resort of _end() writes to. Opened now: later there may be no free descriptor.
        self._devnull_fd = os.open(os.devnull, os.O_WRONLY)

        self._crew = Crew()
        self._others = Connections(on_message=self._obey, on_break=self._on_break)

        # What this thread is doing. The main thread reads `_state`, to see whether the process ends.
        self._clock = IdleClock(self.progress)
        self._state = State.WATCHING
        self._due_s = 0.0  # by our clock, when the others must have answered; not used while WATCHING
        self._inquiry = Inquiry()  # on rank 0
        self._condemned: list[ProcessIdentity] = []  # processes of this host, to be killed at the end

        # Written by the main thread: at the end of a run connections end, and that means nothing.
        self._parting = False
        self._closed = False
        # This rank ends by itself, and has told the others: nothing that is seen from now on is a fault. It
        # is no State, as the thread, which may be about to change its State, would overwrite that.
        self._has_failed = False
        # Written by the thread: the connection to rank 0 has broken. The thread ends this process, but it
        # first looks what has become of rank 0, or leaves the deputy time for that.
        self._has_lost_rank_0 = False
        threading.Thread(target=self._run, name="watchdog", daemon=True).start()

    # --- said by the main thread ----------------------------------------------------------------------

    def hold(self) -> None:
        """Waits a moment for news that another rank has died, before this rank reports an error of its own.

        The error may only follow from that death (a collective has failed, for example), and the death
        explains more. If the news comes, the watchdog's thread ends this process while this call waits.
        """
        if self._crew.peers:  # the ranks have been in touch
            time.sleep(NEWS_S)
        give_up_at_s = time.monotonic() + END_S
        while self._state is State.ENDING or self._has_lost_rank_0:
            if time.monotonic() > give_up_at_s:
                return  # the thread is stuck: this rank's own error is better than no word
            time.sleep(NEWS_S)

    def fail(self, code: int) -> None:
        """This rank ends with an error that it has told the user: the others end too, without a word.

        They end with the same exit code: a launcher's own is that of whichever rank it sees end first.
        """
        self._exit_code = code
        if not self._others.ranks():
            return
        if self.rank == 0:
            self._has_failed = True
            self._end_others()
        elif not self._closed:
            self._others.tell(0, failed=True, code=self._exit_code)
            time.sleep(ANSWER_S)  # rank 0's word ends this process first

    def close(self) -> None:
        """The run has ended well, or with an error that all ranks know."""
        # This comes before `bye` is sent. If another rank closes its connection just when our `bye`
        # arrives, TCP resets the connection, and that rank's own `bye` is lost. The thread then sees a
        # broken connection, and must already know that this is not a fault.
        self._parting = True
        self._others.tell_all(bye=True)  # without it, the end of a connection would be an alarm
        self._closed = True
        if self._me.dump_fd is not None:
            postmortem.withdraw_stack(self._me.dump_fd)

    # --- getting to know the others -------------------------------------------------------------------

    def prepare(self, world_size: int, one_host: bool) -> dict[str, Any]:
        """What the others must know to look after this process, as JSON. Rank 0 opens its door.

        Raises UserError if rank 0 cannot listen at its address, or may not have so many connections.
        """
        dump_fd = postmortem.offer_stack()
        door = None
        if self.rank == 0:
            address = "127.0.0.1" if one_host else os.environ["MASTER_ADDR"]
            door = self._others.open_door(address, far=not one_host, world_size=world_size)
        self._me = replace(self._me, dump_fd=dump_fd, door=door)
        return self._me.to_json()

    def join(self, peers: Sequence[Mapping[str, Any]], deputy: int) -> None:
        """Connects this rank with rank 0. Raises UserError if rank 0 cannot be reached.

        `peers` are what the ranks prepared: on rank 0 of all ranks, elsewhere of rank 0 alone. `deputy` is
        the rank that speaks when rank 0 cannot.
        """
        self._crew = Crew([Peer.from_json(values) for values in peers], deputy)
        if self.rank == 0:
            self._others.let_in()
            return

        door = self._crew.peers[0].door
        assert door is not None  # rank 0 has opened one
        try:
            self._others.connect_to_rank_0(self.rank, DoorPlace(*door))
        except OSError as error:
            raise UserError(
                f"{self._me.host} cannot reach rank 0 at {door[0]}:{door[1]} ({error}): "
                "look whether MASTER_ADDR is the same host's there, and whether a firewall is between."
            ) from error

    # --- the thread -----------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while not self._closed:
                self._turn()
        except BaseException as error:
            # Without this thread nobody would notice a rank that dies or hangs.
            if not self._closed:
                self._end(
                    f"{self._name()}: the watch over the ranks has failed ({error!r}): all ranks end."
                )
            raise
        self._others.close()
        os.close(self._devnull_fd)

    def _turn(self) -> None:
        """Hears what the others say for a moment, and looks once at what there is to look at."""
        tick_s = TICK_S if self._state is State.WATCHING else BUSY_TICK_S
        self._others.listen(tick_s)
        self._clock.tick()
        if self._launcher_pid is not None and os.getppid() != self._launcher_pid:
            self._end("the launcher has ended" if self.rank == 0 else "")

        if self._has_failed:
            return  # the main thread ends this process
        if self._state is not State.WATCHING:
            self._conclude()
        elif self._clock.is_over(self._limit_s()):
            self._alarm()

    def _limit_s(self) -> float:
        """Seconds without progress after which this rank raises an alarm."""
        limit_s = self.progress.allowance().limit_s
        if self.rank != 0 and self.progress.waits_for and not self._others.ranks():
            limit_s += FIRST_WORD_S  # rank 0 waits as well, and knows for whom
        return limit_s

    def _wait(self, state: State, for_s: float) -> None:
        self._state = state
        self._due_s = self._clock.now_s + for_s

    def _time_is_up(self) -> bool:
        return self._clock.now_s >= self._due_s

    def _report(self) -> Report:
        """Where this rank is."""
        activity, limit_s = self.progress.allowance()
        idle_s = self._clock.idle_s()
        is_overdue = idle_s >= limit_s
        if is_overdue:
            self._clock.note_alarm()
        where = (
            f"has made no progress for {idle_s:.1f} s; {limit_s:g} s are allowed for {activity}. It is at\n"
            + postmortem.own_stack(self.progress.main_thread)
        )
        return Report(self.progress.step, self.progress.arrivals, is_overdue, where)

    def _alarm(self) -> None:
        """This rank has made no progress for too long."""
        if not self._others.ranks():
            # A report reads lines of source files. If it is the file system that hangs, nobody else would
            # end this rank: a timer in C writes the stack to stderr then, and ends it. The descriptor of
            # stderr is given, as a program may have put an object without one in the place of sys.stderr.
            try:
                faulthandler.dump_traceback_later(END_S, exit=True, file=2)
            except ValueError:  # this process has closed it
                faulthandler.dump_traceback_later(END_S, exit=True, file=self._devnull_fd)
        report = self._report()
        if not self._others.ranks():  # alone, or not in touch with the others yet
            self._end(self._of_myself(report))
        elif self.rank == 0:
            self._ask()
        else:
            self._others.tell(0, alarm=report.to_json())
            self._wait(State.ASKED, ANSWER_S)

    def _of_myself(self, report: Report) -> str:
        """The message if no other rank can be asked: this rank hangs, or waits for a late one."""
        if not self.progress.waits_for or self._others.ranks():
            return verdict.of_rank(self.rank, self._me.host, report.step, report.where)
        activity, limit_s = self.progress.allowance()
        idle_s = self._clock.idle_s()
        return (
            f"{self._name()} has waited {idle_s:.1f} s for {self.progress.waits_for}; {limit_s:g} s "
            f"are allowed for {activity}. Look whether that rank has started, hangs or is stopped."
        )

    def _conclude(self) -> None:
        """Takes the next step of what this watchdog waits for.

        Rank 0 goes on with its inquiry. Any other rank has asked rank 0. If no answer has come in time, it
        goes on without rank 0.
        """
        if self.rank == 0:
            self._go_on_with_the_inquiry()
        elif self._time_is_up():
            self._without_rank_0(verdict.known_when_time_is_up(self._state))

    # --- rank 0 ---------------------------------------------------------------------------------------

    def _ask(self) -> None:
        """Asks all ranks where they are, unless that is going on already."""
        if self._state is not State.WATCHING:
            return
        self._inquiry = Inquiry(reports={0: self._report()})
        self._wait(State.ASKED, ANSWER_S)
        self._others.tell_all(ask=True)

    def _go_on_with_the_inquiry(self) -> None:
        missing = verdict.unanswered(self._inquiry, len(self._crew.peers), self._crew.left)
        match verdict.decide(self._state, self._inquiry, missing, self._time_is_up()):
            case Decision.WAIT:
                pass
            case Decision.JUDGE:
                self._inquiry.step = self._least_step()
                self._inquiry.findings = verdict.who_keeps_the_others_waiting(self._inquiry.reports)
                if self._inquiry.findings:
                    self._name_and_end()
                self._state = State.WATCHING
            case Decision.LOOK:
                self._look_at(missing, verdict.known_when_time_is_up(self._state))
            case Decision.NAME:
                self._name_and_end()
            case Decision.ASK_AGAIN:
                self._inquiry.forget_findings()
                self._wait(State.ASKED_AGAIN, PATIENCE_S)

    def _look_at(self, ranks: Sequence[int], known: Known) -> None:
        """Finds out what has become of these ranks, with the help of their neighbours."""
        if self._state is State.WATCHING:
            self._inquiry = Inquiry()
        self._wait(State.LOOKING, LOOK_S)
        self._inquiry.step = self._least_step()
        self._inquiry.begin_looking(ranks, known)
        reachable = {0, *self._others.ranks()}
        for rank, witness in verdict.witnesses(ranks, self._crew.peers, reachable).items():
            if witness == 0:
                self._inquiry.findings[rank] = self._look(self._crew.peers[rank], known)
            elif witness is not None:
                self._inquiry.looked_for.add(rank)
                question = [rank, self._crew.peers[rank].to_json(), known.value]
                self._others.tell(witness, look=question)
        self._conclude()

    def _least_step(self) -> int:
        """The number of steps that all ranks have completed that have told theirs."""
        return min([self.progress.step, *(report.step for report in self._inquiry.reports.values())])

    def _name_and_end(self) -> None:
        hosts = [peer.host for peer in self._crew.peers]
        self._end(verdict.accusation(self._inquiry.findings, hosts, self._inquiry.step))

    def _end_others(self, first: int | None = None) -> None:
        """Tells all ranks to end. Those to blame end first, so that a launcher's words are about them."""
        for rank in [first, *list(self._inquiry.findings)[: verdict.MOST_NAMED]]:
            if rank in self._others.ranks():
                self._others.tell(rank, end=True, code=self._exit_code)
                time.sleep(APART_S)
        self._others.tell_all(end=True, code=self._exit_code)
        time.sleep(APART_S)

    def _obey_other(self, rank: int, word: Mapping[str, Any]) -> None:
        """What another rank tells rank 0. Raises WireError if it says what no rank would say."""
        match word:
            case {"bye": True}:
                self._crew.left.add(rank)
                self._others.forget(rank)
            case {"failed": True, "code": int(code)}:
                self._exit_code = code
                self._end_others(first=rank)
                self._end()
            case {"alarm": dict(report)}:
                self._others.tell(rank, wait=True)
                self._ask()
                self._inquiry.reports[rank] = Report.from_json(report)
            case {"report": dict(report)}:
                self._inquiry.reports[rank] = Report.from_json(report)
            case {"found": [int(other), str(words)]} if other in self._inquiry.looked_for:
                self._inquiry.found(other, words)

    # --- the other ranks ------------------------------------------------------------------------------

    def _obey_rank_0(self, word: Mapping[str, Any]) -> None:
        """What rank 0 tells another rank."""
        self._state = State.WATCHING  # rank 0 is there: its answer need not be waited for any longer
        match word:
            case {"ask": True}:
                self._others.tell(0, report=self._report().to_json())
            case {"look": [int(rank), dict(peer), str(known)]}:
                words = self._look(Peer.from_json(peer), Known(known))
                self._others.tell(0, found=[rank, words])
            case {"end": True, "code": int(code)}:
                self._exit_code = code
                self._end()
            case {"bye": True}:
                self._others.forget(0)

    def _without_rank_0(self, known: Known) -> None:
        """Rank 0 has died or has not answered. Its deputy says so; the others leave it time for that."""
        is_deputy = self.rank == self._crew.deputy
        # The step is read before the look. To write down its stack, a stopped rank 0 runs on for a moment,
        # and in that moment this rank may complete a step.
        step = self.progress.step
        words = verdict.FROM_AFAR[known]
        if is_deputy:
            words = self._look(self._crew.peers[0], known)
        elif known is Known.GONE:
            time.sleep(NEWS_S)

        if known is Known.MUTE and not words:  # it may run: it is given more time
            self._wait(State.ASKED_AGAIN, PATIENCE_S if is_deputy else PATIENCE_S + LOOK_S)
        elif is_deputy:
            who = verdict.of_rank(0, self._crew.peers[0].host, step, words)
            self._end(f"{who}\nallranks: all ranks end.")
        else:
            self._end()

    # --- all ranks ------------------------------------------------------------------------------------

    def _obey(self, rank: int, word: Mapping[str, Any]) -> None:
        """What another rank tells this one."""
        if self.rank == 0:
            self._obey_other(rank, word)
        else:
            self._obey_rank_0(word)

    def _on_break(self, rank: int) -> None:
        """The connection to this rank has ended, and it had not said goodbye."""
        if self._parting or self._has_failed or self._state is State.ENDING:
            return
        if self.rank != 0:
            self._has_lost_rank_0 = True
            self._without_rank_0(Known.GONE)
        elif not self._inquiry.findings.get(rank):
            self._look_at([rank], Known.GONE)

    # --- the end --------------------------------------------------------------------------------------

    def _name(self) -> str:
        return f"rank {self.rank} on {self._me.host}"

    def _look(self, peer: Peer, known: Known) -> str:
        """What has become of a rank, and a note to kill its process if it is there and to blame."""
        words = postmortem.look(peer, self._me.process, known)
        if words and known is not Known.GONE:
            self._condemned.append(peer.process)
        return words

    def _end(self, message: str = "") -> None:
        """Ends this rank, whatever its main thread does, and from rank 0 all others."""
        self._state = State.ENDING
        try:
            # If this thread gets stuck before it ends the process, a timer that needs no Python lock ends
            # it.
            faulthandler.dump_traceback_later(END_S, exit=True, file=self._devnull_fd)
            if message:
                with contextlib.suppress(OSError):  # nobody may be reading any more
                    # A stack may name a file whose name is not UTF-8.
                    os.write(2, f"allranks: {message}\n".encode(errors="backslashreplace"))
                file_log.info(message)
            # The processes to blame are killed only after the message has named them. When one of them
            # ends, the launcher may kill all processes at once, this one included.
            for process in self._condemned:
                postmortem.kill(process, self._me.process)
            if self.rank == 0:
                self._end_others()
            processes.kill_descendants(limit_s=postmortem.LOOK_S)
            if message:
                self._abort(self._exit_code)
        finally:
            os._exit(self._exit_code)
