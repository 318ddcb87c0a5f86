"""Who is to blame: from what the ranks have told to the ranks that are named.

Everything here is pure. Reports and findings go in, names and words come out; no clock is read, nobody is
asked, nothing is ended. The order of events, which `thread` carries out:

1. A rank is in trouble: its connection to rank 0 has ended (GONE), or some rank makes no progress, so that
   rank 0 asks all ranks for a report, and this rank does not answer (MUTE).
2. If a rank is gone or mute, somebody on its host looks at its process. A process that is stopped is
   named. One that runs is asked again, with more time: its main thread may be in a long call that keeps
   Python's lock. If it still does not answer it is STUCK, and named as well.
3. If all ranks have reported, those that came to the fewest collectives keep the others waiting. They
   are named if they have overstepped their own limit; else everybody goes on waiting.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from enum import Enum
from typing import Any

from allranks.base.links import WireError
from allranks.base.processes import ProcessIdentity

MOST_NAMED = 4  # ranks in a message, which a person is to read


class Known(Enum):
    """How it is known, from afar, that a rank is in trouble."""

    GONE = "gone"  # its connection has ended
    MUTE = "mute"  # it has not answered
    STUCK = "stuck"  # it has not answered for so long that it is to blame, even if it runs


# What the message says about a rank if nobody could look at its process. If the rank has only not answered
# yet, the text is empty, because the rank may be well.
FROM_AFAR = {
    Known.GONE: "is gone: it was killed, or its node went down",
    Known.MUTE: "",
    Known.STUCK: "does not answer",
}


class State(Enum):
    """What a watchdog is waiting for."""

    WATCHING = "nothing: all is well"
    ASKED = "answers of the other ranks; on other ranks than 0, an answer of rank 0"
    ASKED_AGAIN = "the same from those that run but have not answered"
    LOOKING = "what has become of ranks in trouble; on rank 0 only"
    ENDING = "nothing: this process is being ended"


class Decision(Enum):
    """What rank 0 does next in an inquiry."""

    WAIT = "for more answers"
    JUDGE = "by the reports, which are complete"
    LOOK = "at the ranks that have not answered"
    NAME = "those that were found to be in trouble"
    ASK_AGAIN = "with more time: those that do not answer run"


# --- what the ranks tell --------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    """What the others must know to look after a rank's process."""

    host: str
    process: ProcessIdentity
    dump_fd: int | None  # the process's own file for its stack; None if it has none (not on Linux)
    door: tuple[str, int, str] | None = None  # rank 0's address, port and secret

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "process": self.process.to_json()}

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Peer:
        door = values["door"]
        return cls(
            host=values["host"],
            process=ProcessIdentity.from_json(values["process"]),
            dump_fd=values["dump_fd"],
            door=tuple(door) if door else None,
        )


@dataclass(frozen=True)
class Report:
    """Where a rank is, in its own words."""

    step: int  # completed
    arrivals: int  # how often it has come to a collective
    overdue: bool  # without progress for longer than it may be
    where: str  # for how long, and its stack

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Report:
        """Raises WireError if the values are no report."""
        match values:
            case {
                "step": int(step),
                "arrivals": int(arrivals),
                "overdue": bool(overdue),
                "where": str(where),
            }:
                return cls(step, arrivals, overdue, where)
        raise WireError("a report that is none")


@dataclass
class Inquiry:
    """What rank 0 has found out about the ranks since something went wrong."""

    reports: dict[int, Report] = field(default_factory=dict)
    findings: dict[int, str] = field(default_factory=dict)  # "": the rank's process runs
    looked_for: set[int] = field(default_factory=set)  # a neighbour looks, and has not told yet
    # Completed by all ranks, before anybody looked at a process: to show its stack, a stopped process runs
    # on for a moment.
    step: int = 0

    def begin_looking(self, ranks: Collection[int], known: Known) -> None:
        """These ranks are in trouble; until somebody has looked, only this much is known."""
        for rank in ranks:
            self.findings[rank] = FROM_AFAR[known]

    def found(self, rank: int, words: str) -> None:
        """A neighbour has looked at this rank's process."""
        self.looked_for.discard(rank)
        self.findings[rank] = words

    def forget_findings(self) -> None:
        self.findings.clear()
        self.looked_for.clear()


# --- what follows from it -------------------------------------------------------------------------


def unanswered(inquiry: Inquiry, world_size: int, left: Collection[int]) -> list[int]:
    """The ranks that have not reported. Those that have `left` the run at its end need not."""
    return [rank for rank in range(world_size) if rank not in inquiry.reports and rank not in left]


def decide(state: State, inquiry: Inquiry, missing: Sequence[int], time_is_up: bool) -> Decision:
    """What rank 0 does next; `missing` are the ranks that have not reported."""
    if state is State.LOOKING:
        if inquiry.looked_for and not time_is_up:
            return Decision.WAIT
        return Decision.NAME if any(inquiry.findings.values()) else Decision.ASK_AGAIN

    if not missing:
        return Decision.JUDGE
    return Decision.LOOK if time_is_up else Decision.WAIT


def known_when_time_is_up(state: State) -> Known:
    """How serious it is that a rank has not answered in time.

    After the first question it is MUTE: it may still be well. After the second question, for which it had
    PATIENCE_S more, it is STUCK, and is to blame even if its process runs.
    """
    return Known.STUCK if state is State.ASKED_AGAIN else Known.MUTE


def who_keeps_the_others_waiting(reports: Mapping[int, Report]) -> dict[int, str]:
    """The ranks to blame and where they are; empty if everybody must go on waiting.

    All ranks come to the same collectives. Those that came to the fewest are the ones for which the others
    wait; if one of them is still within its own limit, it may yet come.
    """
    fewest = min(report.arrivals for report in reports.values())
    last = {rank: reports[rank] for rank in sorted(reports) if reports[rank].arrivals == fewest}
    if not all(report.overdue for report in last.values()):
        return {}
    return {rank: report.where for rank, report in last.items()}


def witnesses(
    ranks: Sequence[int], peers: Sequence[Peer], reachable: Collection[int]
) -> dict[int, int | None]:
    """For each of `ranks` a rank that can look at its process; None if there is none.

    Only a process on the same host, and in the same container, sees it under the same number. `reachable`
    are the ranks that can be asked. Rank 0 itself, where it can look, comes first.
    """
    candidates = [rank for rank in sorted(reachable) if rank not in ranks]
    chosen: dict[int, int | None] = {}
    for rank in ranks:
        process = peers[rank].process
        near = (other for other in candidates if process.is_visible_from(peers[other].process))
        chosen[rank] = next(near, None)
    return chosen


def deputy(peers: Sequence[Peer]) -> int:
    """The rank that speaks where rank 0 cannot: the first one that can look at its process, or else 1."""
    near = (r for r in range(1, len(peers)) if peers[0].process.is_visible_from(peers[r].process))
    return next(near, 1)


# --- in words -------------------------------------------------------------------------------------


def of_rank(rank: int, host: str, step: int, words: str) -> str:
    """A sentence about a rank that has completed `step` steps: it is in the next one."""
    return f"rank {rank} on {host}, in step {step + 1}: {words}"


def accusation(findings: Mapping[int, str], hosts: Sequence[str], step: int) -> str:
    """What is said before all ranks end: a line for each rank to blame. `hosts` has each rank's."""
    named = {rank: words for rank, words in findings.items() if words}
    lines = [of_rank(rank, hosts[rank], step, words) for rank, words in list(named.items())[:MOST_NAMED]]
    if len(named) > MOST_NAMED:
        lines.append(f"and {len(named) - MOST_NAMED} more ranks")
    lines.append(f"all {len(hosts)} ranks end.")
    return "\nallranks: ".join(lines)
