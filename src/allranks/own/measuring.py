"""Means over the examples of a pass over batches: what run.mean() and run.means() find."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from allranks.base.errors import ANYONE, UserError
from allranks.base.text import some
from allranks.data.batches import Dealt
from allranks.data.nests import described
from allranks.own.figures import as_number, check_figure
from allranks.own.state import add_mean, are_alike, no_sums, rows_of_shares
from allranks.runtime.runtime import Runtime
from allranks.training.control import OTHER_BATCHES

# How long a rank waits for the others to do what it has done, such as to leave a loop. If the others are in
# a collective after that time, they wait for this rank, and the watchdog names it.
ALIKE_S = 1.0


class Measuring:
    """The sums of one pass over batches, on one rank; all ranks have one.

    what: the call that the program has made, for messages. names: of the figures, where they are known
    beforehand; None where the first batch tells them.
    """

    def __init__(self, runtime: Runtime, what: str, names: Iterable[str] | None = None) -> None:
        self._runtime = runtime
        self.what = what
        self._are_names_known = names is not None
        # By name and by share of this rank the sum of value * examples, and the number of examples.
        self._sums = {name: no_sums(runtime) for name in names or ()}

    def add(self, figures: Mapping[str, Any], share: Dealt | None) -> None:
        """Adds the figures of a batch, each the mean over the examples of this rank's share.

        `share` is what the program has in hand; None where it goes through no batches. Raises UserError for
        figures that are no numbers.
        """
        if not isinstance(figures, Mapping):
            raise UserError(
                f"{self.what} got {described(figures)}: give a dict of figures by name for each batch.",
                said_by=ANYONE,
            )
        if share is None:
            raise self.takes_them_one_by_one()
        for name, value in figures.items():
            check_figure(self.what, name, value, "give a number or a scalar tensor for each batch.")
            if name not in self._sums:
                self._sums[name] = no_sums(self._runtime)
            if share.counted:
                number = value if isinstance(value, torch.Tensor) else as_number(value)
                add_mean(self._sums[name][share.row], number, share.counted)

    def takes_them_one_by_one(self) -> UserError:
        """The error of a program that has given a list of values of several batches."""
        return UserError(
            f"{self.what} takes its values one by one, while it goes through run.batches(): give it "
            "`value(batch) for batch in run.batches(...)` without brackets, not a list of values.",
            said_by=ANYONE,
        )

    def means(self, passed: int | None) -> dict[str, float]:
        """The mean of each figure over all examples of all ranks; all ranks call.

        `passed` is a digest of the batches that this rank has gone through, 32 bits; None where the values
        are of the batch in hand. Raises UserError where there are no examples, and where the ranks have
        different names or digests.
        """
        names = sorted(self._sums)
        if not self._are_names_known:
            self._check_names(names)
        totals: list[list[float]] = []
        if names:
            # All rows are brought together before they are added, so that the order of the additions is
            # that of the shares.
            mine = rows_of_shares([self._sums[name] for name in names])
            totals = self._added_up(mine, passed)
        if not totals or not all(count for _, count in totals):
            raise UserError(f"{self.what} got no values: there is no mean of nothing.", said_by=0)
        return {name: float(total / count) for name, (total, count) in zip(names, totals, strict=True)}

    def _added_up(self, mine: torch.Tensor, passed: int | None) -> list[list[float]]:
        """For each name the two numbers of mine [shares of this rank, 2 * names], added over all ranks.

        Raises UserError, on all ranks, where they have different digests of what they have gone through.
        """
        if self._runtime.world_size == 1 or passed is None:
            return self._runtime.gather(mine).sum(dim=0).view(-1, 2).tolist()
        rows = self._runtime.gather(nn.functional.pad(mine, (0, 1), value=passed))
        totals = rows[:, :-1].contiguous().sum(dim=0)
        digests = torch.stack(rows[:, -1].aminmax())
        # As one tensor, so that a GPU is waited for once.
        *pairs, [lowest, highest] = torch.cat([totals, digests]).view(-1, 2).tolist()
        if lowest != highest:
            raise UserError(OTHER_BATCHES, said_by=0)
        return pairs

    def _check_names(self, names: list[str]) -> None:
        """Raises UserError, on all ranks, where the ranks have different names."""
        if not are_alike(names, self._runtime):
            raise UserError(
                f"{self.what} has got other names, or no values, on other ranks (here "
                f"{some(names) or 'none'}): all ranks give the same.",
                said_by=0,
            )
