"""How a launch has ended: from what is known of the ranks to an exit code and one sentence. Pure.

The supervisor collects what there is to know, and asks `conclusion` once, when all is over.
"""

from __future__ import annotations

import enum
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from allranks.base import processes
from allranks.base.errors import EXIT_REQUEUE
from allranks.base.text import some
from allranks.job.hosts import short

# Hosts' clocks and the network may swap two ends that lie closer together than this. MPICH, for one, kills
# the other ranks 3 ms after one of them has been killed.
NEAR_S = 0.2
LOST_CODE = 128 + signal.SIGKILL  # the exit code of a rank that has ended without a word about it
END_THE_JOB = (signal.SIGUSR1, signal.SIGUSR2)  # with these a scheduler says that the job's end is near


class Loss(enum.Enum):
    """How a rank's guard went without a word about how its program has ended."""

    CUT = "vanished without a word: its guard was killed, or its node went down"
    SILENT = (
        "does not answer any more: its guard is stopped, a file system or device there hangs, or its node "
        "went down"
    )


@dataclass
class Rank:
    """What is known of a rank."""

    rank: int
    host: str
    code: int | None = None  # the program's exit code, 128 + signal as shells have it; None while it runs
    signal: int = 0  # the number of the signal that has ended it, or 0
    ended_at: float = 0.0  # in seconds since 1970, by its own host's clock
    has_ended: bool = False  # whether it has ended, and all of its output has arrived, or no more will
    loss: Loss | None = None

    def how_it_ended(self) -> str:
        """Words that follow the rank's name in a sentence."""
        if self.loss is not None:
            return self.loss.value
        assert self.code is not None
        return processes.how_it_ended(self.code, self.signal)

    @property
    def has_failed(self) -> bool:
        """Whether it has ended, and neither well nor in order with a checkpoint."""
        return self.code not in (None, 0, EXIT_REQUEUE)


class Conclusion(NamedTuple):
    """What the user is told about a launch that is over."""

    code: int  # the exit code of `allranks launch`
    sentence: str  # without its full stop; empty if nothing has failed
    remark: str = ""  # what else the user should know
    host: str = ""  # the host that is to blame, if no rank's end tells it


@dataclass(frozen=True)
class Outcome:
    """How a launch went: `code` is 0, or that of the first rank that has failed."""

    code: int
    failure: str  # one line, empty if nothing has failed
    hosts: Mapping[int, str]  # for each rank that has come, its host
    # Hosts of which nothing is heard: no rank has come from there, or all of its ranks are lost.
    gone: tuple[str, ...] = ()
    stopped: bool = False  # whether `allranks launch` got a signal, or nobody reads its output any more
    # How often the program has called allranks.heartbeat() or should_stop(), or has taken a step.
    progress: int = 0
    failed_host: str = ""  # the host of the first rank that failed; empty if no single host is to blame


@dataclass(frozen=True)
class Evidence:
    """All that is known when a launch is over."""

    world_size: int  # the number of ranks that were asked for
    ranks: Sequence[Rank]  # the ranks that have come
    launcher: str  # its name, for messages
    launcher_code: int  # as subprocess has it: negative for a signal
    launcher_was_killed: bool  # whether the supervisor has killed it, because it did not end
    had_started: bool  # whether every rank had come
    stopped_by: int  # the signal that has ended the launch, or 0
    # Whether signals are not passed on to the ranks, as in the preflight: then no rank can have stopped in
    # order.
    signal_is_for_us: bool
    problem: Conclusion | None  # a problem that no rank's end explains, such as a limit that was exceeded
    nobody_reads: bool  # the reader of our output has gone


def conclusion(known: Evidence) -> Conclusion:
    """The exit code and what has failed, the first cause first."""
    failed = [r for r in known.ranks if r.has_failed]
    in_order = any(r.code == EXIT_REQUEUE for r in known.ranks)

    # A signal explains why ranks have failed. If none has, they have finished or stopped in order.
    if known.stopped_by and (failed or not known.had_started or known.signal_is_for_us):
        return _stopped(known.stopped_by, failed)
    if known.nobody_reads and not known.stopped_by:
        return Conclusion(128 + signal.SIGPIPE, "")  # as a program ends that is not watched over
    if known.problem is not None and not known.stopped_by:
        return known.problem
    if failed:
        return _first_failure(failed, known.world_size)
    if in_order:
        return Conclusion(EXIT_REQUEUE, "")
    return _of_launcher(known)


def planned_hosts(hosts: Sequence[str], own_names: Mapping[int, str]) -> dict[int, str]:
    """By rank, the name that the plan has for the host on which the rank is.

    `hosts` are the planned hosts of rank 0, 1, ..., and `own_names` has, by rank, what a rank's host calls
    itself. The two may differ: a list of hosts may hold addresses, `localhost`, or another network's names.
    A name that fits just one planned host decides, because a launcher may number the ranks in another order
    than was planned. Otherwise the rank's number decides. A rank beyond `hosts` is left out.
    """
    alike: dict[str, list[str]] = {}
    for name in dict.fromkeys(hosts):
        alike.setdefault(short(name), []).append(name)

    found: dict[int, str] = {}
    for rank, own_name in own_names.items():
        fitting = alike.get(short(own_name), [])
        if len(fitting) == 1:
            found[rank] = fitting[0]
        elif rank < len(hosts):
            found[rank] = hosts[rank]
    return found


def hosts_gone(hosts: Sequence[str], ranks: Sequence[Rank]) -> tuple[str, ...]:
    """The planned hosts of which nothing is heard: no rank came from there, or all are lost.

    `hosts` are the planned hosts of rank 0, 1, ...
    """
    answering = {r.rank: r.host for r in ranks if r.loss is None}
    heard_of = set(planned_hosts(hosts, answering).values())
    return tuple(host for host in dict.fromkeys(hosts) if host not in heard_of)


def host_to_blame(known: Evidence) -> str:
    """The host of the first rank that has failed, by its own name.

    Empty if none has failed, and where all ranks of several have failed alike: that is the program's
    fault, and no host's. A launch that a signal has stopped blames no host either.
    """
    failed = [r for r in known.ranks if r.has_failed]
    if known.problem is not None and not known.stopped_by:
        return known.problem.host
    if not failed or known.stopped_by:
        return ""
    first = _first_to_fail(failed)
    if known.world_size > 1 and len(_failed_alike(failed, first)) == known.world_size:
        return ""
    return first.host


def _stopped(signum: int, failed: Sequence[Rank]) -> Conclusion:
    """The conclusion on a launch that a signal has ended before all ranks had ended in order."""
    code = EXIT_REQUEUE if signum in END_THE_JOB else 128 + signum
    sentence = f"stopped by {signal.Signals(signum).name}"
    silent = [f"{r.rank} on {r.host}" for r in failed if r.loss is Loss.SILENT]
    if silent:
        sentence += f"; rank {some(silent)} {Loss.SILENT.value}"
    return Conclusion(code, sentence)


def _first_failure(failed: Sequence[Rank], world_size: int) -> Conclusion:
    first = _first_to_fail(failed)
    assert first.code is not None
    sentence = f"rank {first.rank} on {first.host} {first.how_it_ended()}"
    if world_size > 1 and len(_failed_alike(failed, first)) == world_size:
        sentence += f", and so did all {world_size} ranks"
    elif world_size > 1:
        sentence += f", the first of {world_size} ranks to fail; the others have been ended"
    return Conclusion(first.code, sentence)


def _failed_alike(failed: Sequence[Rank], first: Rank) -> list[Rank]:
    """The ranks that have ended with the same exit code as `first`, by themselves.

    Ranks that were killed or lost are left out: it is not known whether they would have failed alike.
    """
    return [r for r in failed if r.code == first.code and not r.signal and r.loss is None]


def _first_to_fail(failed: Sequence[Rank]) -> Rank:
    """The rank to name as the first that has failed: as a rule the one that ended first by the clock.

    If nobody knows how that rank's program ended (its guard has vanished or does not answer), a rank is
    named that was killed at about the same time, or else one that does not answer.
    """

    def when(r: Rank) -> tuple[float, int]:
        return r.ended_at, r.rank

    first = min(failed, key=when)
    if first.loss is None:
        return first
    # The launcher may have ended this guard because another rank had died.
    killed = [r for r in failed if r.signal and r.ended_at < first.ended_at + NEAR_S]
    silent = [r for r in failed if r.loss is Loss.SILENT]
    return min(killed or silent or [first], key=when)


def _of_launcher(known: Evidence) -> Conclusion:
    """The conclusion on a launch in which no rank has failed: the launcher itself decides it."""
    code = known.launcher_code
    all_well = sum(r.code == 0 for r in known.ranks) == known.world_size
    remark = ""
    if all_well and known.launcher_was_killed:
        remark = f"{known.launcher} had not ended after its last rank, and was killed"
        code = 0
    if code == 0 or known.stopped_by:
        return Conclusion(0, "", remark)
    how = f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"
    came = f"{len(known.ranks)} of {known.world_size} ranks had started"
    return Conclusion(128 - code if code < 0 else code, f"{known.launcher} {how}; {came}")
