"""Which ranks of a program make no progress, by what their guards tell now and then. Pure.

The supervisor asks each guard every few seconds, and keeps a RankWatch for each rank. It notices

OVERDUE   a rank has called allranks.heartbeat(), and the next call does not come within its limit
IDLE      with --idle: for so long no rank at all has written anything, used the CPU or called heartbeat()

A rank that waits for another one is as quiet as the one that it waits for. So when something is noticed,
the guards look where their programs are, and to_blame() names the rank that stands out. That one need not
be late itself.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from allranks.base.agreement import majority
from allranks.base.text import some
from allranks.job.variables import NO_LIMIT_MS

# How long a rank may take from one heartbeat to the next, if neither the program nor --idle sets a limit.
BEAT_S = 600.0
# A rank that uses less of one CPU does nothing: threads that wake up ten times a second, as those of
# PyTorch and of monitors do, use 0.1 to 0.5 %.
IDLE_SHARE = 0.01
# The least CPU time between two looks that counts: one tick may be the clock's own rounding.
LEAST_TICKS = 2
# A rank that has never called heartbeat() may still be on its way to its first step. That is assumed as
# long as no other rank has called it more often than this: the others can take a step or two before they
# wait for it.
FIRST_BEATS = 2
FEW = 8  # so many ranks that are not late are looked at before those that are
TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Pulse(NamedTuple):
    """What a guard tells of its program. The order is that of the guard's message."""

    beats: int  # how often the program has called heartbeat()
    # The limit that it has set for its next heartbeat; 0: none given; NO_LIMIT_MS: it may take any time.
    within_ms: int
    calls: int  # how often the program has called should_stop()
    steps: int  # how many steps a loop by allranks.open() has begun
    cpu_ticks: int  # the CPU time of the program and of all that it has started
    written_bytes: int  # what the program has written to stdout and stderr


class RankWatch:
    """What is known of one rank's progress. All times are in seconds, by the supervisor's clock."""

    def __init__(self, now: float) -> None:
        self.pulse = Pulse(0, 0, 0, 0, 0, 0)
        self.heard_at = now
        self.beat_at = now  # when the newest heartbeat was heard of
        self.active_at = now  # when the rank was last seen to do anything

    def note(self, pulse: Pulse, now: float) -> None:
        """Takes in what the guard tells now."""
        before = self.pulse
        has_beaten = pulse.beats != before.beats
        has_stepped = (pulse.calls, pulse.steps) != (before.calls, before.steps)
        has_written = pulse.written_bytes != before.written_bytes
        used = pulse.cpu_ticks - before.cpu_ticks
        least = max(LEAST_TICKS, IDLE_SHARE * TICKS_PER_S * (now - self.heard_at))
        if has_beaten:
            self.beat_at = now
        # The CPU time falls when a process has ended, which is a sign of life, too.
        if has_beaten or has_stepped or has_written or used >= least or used < 0:
            self.active_at = now
        self.pulse = pulse
        self.heard_at = now

    def forgive(self, now: float) -> None:
        """The ranks were suspended until now: that time does not count."""
        self.heard_at = self.beat_at = self.active_at = now

    def limit_s(self, idle_s: float | None) -> float | None:
        """How long the next heartbeat may take; None for a rank of which none is expected."""
        if self.pulse.beats == 0 or self.pulse.within_ms == NO_LIMIT_MS:
            return None
        return self.pulse.within_ms / 1000 or idle_s or BEAT_S

    def is_idle(self, idle_s: float, now: float) -> bool:
        """Whether the rank has done nothing for longer than `idle_s`, and has not asked for more time."""
        within_ms = self.pulse.within_ms
        has_asked = within_ms == NO_LIMIT_MS or now - self.beat_at <= within_ms / 1000
        return now - self.active_at > idle_s and not has_asked


@dataclass
class IdleWatch:
    """What is known of the progress of all ranks, and of where those are that make none."""

    ranks: dict[int, RankWatch] = field(default_factory=dict)  # by rank, of all that have begun
    looks: dict[int, bytes] = field(default_factory=dict)  # by rank, what its guard has seen
    have_looked: set[int] = field(default_factory=set)  # the ranks whose guards have seen all there is
    last_end_at: float = 0.0  # when the latest rank has ended

    @property
    def progress(self) -> int:
        """The calls of heartbeat() and should_stop() and the steps of the rank that has most of them."""
        pulses = [watch.pulse for watch in self.ranks.values()]
        return max((pulse.beats + pulse.calls + pulse.steps for pulse in pulses), default=0)

    def saw(self, rank: int, piece: bytes) -> None:
        """Takes in a piece of what a rank's guard has seen of its program."""
        self.looks[rank] = self.looks.get(rank, b"") + piece

    def forgive(self, now: float) -> None:
        """The ranks could do nothing until now."""
        for watch in self.ranks.values():
            watch.forgive(now)

    def limits_s(self, idle_s: float | None) -> list[float]:
        """All limits of time that may be reached: `idle_s`, and those for the ranks' next heartbeats."""
        limits_s = [idle_s, *(watch.limit_s(idle_s) for watch in self.ranks.values())]
        return [limit_s for limit_s in limits_s if limit_s]


class Kind(enum.Enum):
    """What was noticed."""

    OVERDUE = enum.auto()
    IDLE = enum.auto()


@dataclass(frozen=True)
class Finding:
    """Something is wrong with some of these ranks."""

    kind: Kind
    ranks: tuple[int, ...]
    limit_s: float


def notice(
    ranks: Mapping[int, RankWatch], idle_s: float | None, now: float, last_end_at: float = 0.0
) -> Finding | None:
    """What is wrong with the `ranks`, those that have not ended; None if nothing is.

    `last_end_at` is when the latest of the others has ended: those that are left may have waited for it.
    """
    overdue: list[int] = []
    limits_s: list[float] = []
    for rank, watch in ranks.items():
        limit_s = watch.limit_s(idle_s)
        if limit_s is not None and now - watch.beat_at > limit_s:
            overdue.append(rank)
            limits_s.append(limit_s)
    if overdue:
        return Finding(Kind.OVERDUE, tuple(overdue), max(limits_s))
    if idle_s is None or not ranks or now - last_end_at <= idle_s:
        return None
    if all(watch.is_idle(idle_s, now) for watch in ranks.values()):
        return Finding(Kind.IDLE, tuple(ranks), idle_s)
    return None


# --- who it is ------------------------------------------------------------------------------------------


def to_blame(finding: Finding, ranks: Mapping[int, RankWatch], looks: Mapping[int, str]) -> list[int]:
    """Decides which of the ranks that still run are to blame. `looks` has what the guards saw, by rank.

    The ranks of the finding are late, but perhaps only because they wait for another rank. That rank need
    not be late: it may never have called heartbeat(), or it may have said that it takes longer. The first
    of these rules that gives a rank decides:

    1. Ranks whose program is stopped (state T), unless all are stopped.
    2. Of the ranks that stand still, those that have called heartbeat() least often, if some rank has
       called it more often: all others wait for them at their next step. Ranks that have never called
       heartbeat() are counted here only if the others have hardly begun (FIRST_BEATS) and are more.
    3. Of the ranks that stand still, those whose stack differs from that of most others.
    4. All late ranks, and with them those that may still be on their way to their first heartbeat.
    """
    stopped = [rank for rank in ranks if re.search(r"\(state [Tt]\)", looks.get(rank, ""))]
    if stopped and len(stopped) < len(ranks):
        return stopped

    still = _standing_still(finding, ranks)
    beats = {rank: ranks[rank].pulse.beats for rank in still}
    callers = [rank for rank in still if beats[rank] > 0]
    never = [rank for rank in still if beats[rank] == 0]
    # Many programs have rank 0 alone call heartbeat(), some all ranks but a few. A rank that has never
    # called it is on its way to its first call only if the others have hardly got further.
    is_at_first = bool(never) and max(beats.values()) <= FIRST_BEATS
    counted = still if is_at_first and len(never) < len(callers) else callers
    if counted:
        fewest = min(beats[rank] for rank in counted)
        if fewest < max(watch.pulse.beats for watch in ranks.values()):
            return [rank for rank in counted if beats[rank] == fewest]

    seen = [rank for rank in ranks if looks.get(rank)]
    if len(seen) > 2:
        _, odd = majority([place_of(looks[rank]) for rank in seen])
        standing_out = [seen[position] for position in odd if seen[position] in still]
        if standing_out and 2 * len(odd) < len(seen):
            return standing_out
    return [rank for rank in still if rank in finding.ranks or (rank in never and is_at_first)]


def _standing_still(finding: Finding, ranks: Mapping[int, RankWatch]) -> list[int]:
    """The ranks of the finding, and those others that may have stood still as long as these.

    A rank that has called heartbeat() long after the last calls of the late ones makes progress.
    """
    last_s = max(ranks[rank].beat_at for rank in finding.ranks)
    latest_s = last_s + finding.limit_s / 2
    return [rank for rank, watch in ranks.items() if rank in finding.ranks or watch.beat_at <= latest_s]


def look_first(finding: Finding, ranks: Mapping[int, RankWatch]) -> list[int]:
    """All ranks, in the order in which they are worth a look: there may be too many to look at all.

    First a few that are not late and have the fewest heartbeats, for which the late ones may wait.
    """
    others = [rank for rank in ranks if rank not in finding.ranks]
    others.sort(key=lambda rank: ranks[rank].pulse.beats)
    return [*others[:FEW], *finding.ranks, *others[FEW:]]


def place_of(look: str) -> str:
    """The part of a look that is the same for all ranks at the same place: the lines of the stack."""
    frames = re.findall(r"^ +(?:File .*|\S.*\(.*:\d+\))$", look, flags=re.MULTILINE)
    return "\n".join(frames) or re.sub(r"\d+", "", look)


def sentence(
    finding: Finding, blamed: Sequence[int], names: Mapping[int, str], ranks: Mapping[int, RankWatch]
) -> str:
    """What to tell the user, without its full stop: `blamed` are named as in `names`, such as `2 on n3`."""
    limit = f"{finding.limit_s:.0f} s" if finding.limit_s >= 10 else f"{finding.limit_s:g} s"
    if finding.kind is Kind.IDLE:
        return (
            f"no rank has written anything or used its CPU for {limit} (--idle): see above where "
            f"{_named(blamed, names)} {_is_or_are(blamed)}. A program that waits on purpose calls "
            "allranks.heartbeat(), or writes a line now and then"
        )
    late = [rank for rank in blamed if rank in finding.ranks]
    others = [rank for rank in blamed if rank not in finding.ranks]
    told = late or finding.ranks
    begin = (
        f"{_named(told, names)} {'has' if len(told) == 1 else 'have'} not called allranks.heartbeat() for "
        f"{limit}, after {_times(ranks[told[0]])}"
    )
    if not others:
        return (
            f"{begin}: see above where it is, or give heartbeat(within_s=SECONDS) before what takes longer"
        )
    if late:
        return f"{begin}, and {_named(others, names)} {_calls(others, ranks)}: see above where they are"
    seem = "seems" if len(told) == 1 else "seem"
    awaited = _named(others, names)
    return (
        f"{begin}, and {seem} to wait for {awaited}, which {_calls(others, ranks)}: "
        f"see above where {awaited} {_is_or_are(others)}"
    )


def _named(ranks: Sequence[int], names: Mapping[int, str]) -> str:
    """`rank 2 on n3`, or `ranks 2 on n3, 3 on n3`."""
    return f"rank{'s' * (len(ranks) > 1)} {some([names[rank] for rank in ranks])}"


def _is_or_are(ranks: Sequence[int]) -> str:
    return "is" if len(ranks) == 1 else "are"


def _calls(others: Sequence[int], ranks: Mapping[int, RankWatch]) -> str:
    """How often these ranks, which are not late, have called heartbeat()."""
    has = "has" if len(others) == 1 else "have"
    if ranks[others[0]].pulse.beats == 0:
        return f"{has} never called it"
    return f"{has} called it {_times(ranks[others[0]])}"


def _times(watch: RankWatch) -> str:
    return "once" if watch.pulse.beats == 1 else f"{watch.pulse.beats} times"
