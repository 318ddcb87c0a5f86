"""Which ranks of a program make no progress, by what their guards tell now and then. Pure.

The supervisor asks each guard every few seconds, and keeps a RankWatch for each rank. It notices

OVERDUE   a rank has called allranks.heartbeat(), and the next call does not come within its limit
IDLE      with --idle: for so long no rank at all has written anything, used the CPU or called heartbeat()

A rank that waits for another one is as quiet as the one that it waits for. So when something is noticed,
the guards look where their programs are, and to_blame() names the rank that stands out.
"""

from __future__ import annotations

import enum
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from allranks.base.agreement import majority
from allranks.base.text import some
from allranks.job.variables import NO_LIMIT_MS

BEAT_S = 600.0  # from one heartbeat to the next, where neither the program nor --idle says anything
# A rank that uses less of one CPU does nothing: threads that wake up ten times a second, as those of
# PyTorch and of monitors do, use 0.1 to 0.5 %.
IDLE_SHARE = 0.01
LEAST_TICKS = 2  # of CPU time between two looks: one may be the clock's own rounding
TICKS_PER_S = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


class Pulse(NamedTuple):
    """What a guard tells of its program. The order is that of the guard's message."""

    beats: int  # how often it has called heartbeat()
    within_ms: int  # it said that the next one comes within so long; 0: nothing; NO_LIMIT_MS: whenever
    calls: int  # how often it has called should_stop()
    steps: int  # of a loop by allranks.open() that it has begun
    cpu_ticks: int  # the CPU time of the program and of all that it has started
    written_bytes: int  # to stdout and stderr


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
    """What is wrong with the `ranks`, those that have not ended; None where nothing is.

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
    """The ranks to name, among those of the finding. `looks` are what the guards have seen, by rank.

    A program that is stopped is to blame, whatever the others do. Else the one with the fewest heartbeats
    is, because the others wait for it at their next step. Where all have as many, it is the one whose stack
    differs from that of most others. Where none stands out, all are named.
    """
    stopped = [rank for rank in finding.ranks if re.search(r"\(state [Tt]\)", looks.get(rank, ""))]
    if stopped and len(stopped) < len(ranks):
        return stopped

    beats = {rank: ranks[rank].pulse.beats for rank in finding.ranks}
    fewest = min(beats.values())
    if fewest < max(watch.pulse.beats for watch in ranks.values()):
        return [rank for rank, count in beats.items() if count == fewest]

    seen = [rank for rank in ranks if looks.get(rank)]
    places = [place_of(looks[rank]) for rank in seen]
    if len(seen) > 2:
        _, odd = majority(places)
        standing_out = [seen[position] for position in odd if seen[position] in finding.ranks]
        if standing_out and 2 * len(odd) < len(seen):
            return standing_out
    return list(finding.ranks)


def place_of(look: str) -> str:
    """The part of a look that is the same for all ranks at the same place: the lines of the stack."""
    frames = re.findall(r"^ +(?:File .*|\S.*\(.*:\d+\))$", look, flags=re.MULTILINE)
    return "\n".join(frames) or re.sub(r"\d+", "", look)


def sentence(finding: Finding, names: Sequence[str], beats: int) -> str:
    """What to tell the user, without its full stop. `names` are the ranks to blame, as `2 on n3`."""
    who = f"rank {some(names)}" if len(names) == 1 else f"ranks {some(names)}"
    has = "has" if len(names) == 1 else "have"
    if finding.kind is Kind.OVERDUE:
        times = "once" if beats == 1 else f"{beats} times"
        return (
            f"{who} {has} not called allranks.heartbeat() for {finding.limit_s:.0f} s, after {times}: "
            "see above where it is, or give heartbeat(within_s=SECONDS) before what takes longer"
        )
    return (
        f"no rank has written anything or used its CPU for {finding.limit_s:.0f} s (--idle): see above "
        f"where {who} {'is' if len(names) == 1 else 'are'}. A program that waits on purpose calls "
        "allranks.heartbeat(), or writes a line now and then"
    )
