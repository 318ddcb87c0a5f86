"""All ranks of a program stop at the same call of allranks.should_stop(): how that call is chosen. Pure.

1. A rank has a reason to stop: a signal, or the job's end. All ranks are told to wait at their next call.
2. Each rank says how many of its calls have had their answer.
3. Once all have said so, the call after the largest of these numbers is chosen. No rank has passed it: it
   is still ahead of each rank, or the rank waits in it.
"""

from __future__ import annotations

import signal
from collections.abc import Iterable
from dataclasses import dataclass, field

from allranks.job.variables import WISH_JOB_END


@dataclass
class CommonStop:
    """How far the ranks have come in choosing the call at which they stop."""

    reason: str = ""  # why the first rank asked for a stop; empty: no rank has
    at: int = 0  # the first call that returns True; 0: not chosen yet
    _awaited: set[int] = field(default_factory=set)  # the ranks that have not said yet how far they are
    _most_answered: int = 0  # of all ranks, the largest number of calls that have had their answer

    def begin(self, wish: int, running: Iterable[int]) -> bool:
        """A rank wants to stop. Returns whether all ranks are now to be held at their next call.

        `wish` is the number of a signal, or WISH_JOB_END. `running` are the ranks that have not ended.
        """
        if self.reason:
            return False
        self.reason = "the job's end" if wish == WISH_JOB_END else signal.Signals(wish).name
        self._awaited = set(running)
        return True

    def answered(self, rank: int, calls: int) -> bool:
        """So many calls of the rank have had their answer. Returns whether this has chosen the call."""
        self._most_answered = max(self._most_answered, calls)
        return self._is_chosen_without(rank)

    def ended(self, rank: int) -> bool:
        """The rank has ended, and says nothing more. Returns whether this has chosen the call."""
        return self._is_chosen_without(rank)

    def _is_chosen_without(self, rank: int) -> bool:
        """Chooses the call if `rank` was the last one to be waited for."""
        self._awaited.discard(rank)
        if not self.reason or self.at or self._awaited:
            return False
        self.at = self._most_answered + 1
        return True
