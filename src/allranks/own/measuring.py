"""Means over the examples of a pass over batches: what run.mean() and run.means() find."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from allranks.base.errors import ANYONE, UserError
from allranks.base.text import some
from allranks.data.batches import Dealt
from allranks.data.nests import described
from allranks.own.figures import as_number, check_figure
from allranks.own.lifecycle import Lifecycle
from allranks.own.place import LoopPlace
from allranks.own.shares import StepShares, one_for_each_share, shares_of, within_pieces
from allranks.own.state import add_mean, are_alike, no_sums, rows_of_shares
from allranks.runtime.runtime import Runtime
from allranks.training.control import OTHER_BATCHES


class Measuring:
    """The sums of one pass over batches, on one rank; all ranks have one.

    what: the call that the program has made, for messages. names: the names of the figures if they are
    known beforehand; None if they are those of the first batch.
    """

    def __init__(self, runtime: Runtime, what: str, names: Iterable[str] | None = None) -> None:
        self._runtime = runtime
        self.what = what
        self._are_names_known = names is not None
        # For each name, and each share of this rank: the sum of value * examples, and the number of
        # examples.
        self._sums = {name: no_sums(runtime) for name in names or ()}

    def add(self, figures: Mapping[str, Any], share: Dealt | None) -> None:
        """Adds the figures of a batch, each the mean over the examples of this rank's share.

        `share` is this rank's share of the batch that the program works on; None if there is no such batch.
        Raises UserError for figures that are not numbers.
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

        `passed` is a digest of the batches that this rank has gone through, 32 bits; None if the values
        are of the batch in hand. Raises UserError if there are no examples, and if the ranks have
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

        Raises UserError, on all ranks, if they have different digests of what they have gone through.
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
        """Raises UserError, on all ranks, if the ranks have different names."""
        if not are_alike(names, self._runtime):
            raise UserError(
                f"{self.what} has got other names, or no values, on other ranks (here "
                f"{some(names) or 'none'}): all ranks give the same.",
                said_by=0,
            )


def measured(
    measuring: Measuring, values: Iterable[Mapping[str, Any]], lifecycle: Lifecycle, place: LoopPlace
) -> dict[str, float]:
    """What run.mean() and run.means() find in the values, which the program computes batch by batch.

    All ranks call. Raises UserError if a value is not a number, if there are no examples, if the
    ranks have gone through different batches, and if a step has more or fewer values than shares.
    """
    lifecycle.check_open("run.mean()")
    place.leave_alike()
    if place.is_in_shares:
        raise within_pieces(measuring.what)
    before = place.in_hand
    place.passed = 0
    # What is in hand now may have one value, or in a step of a reproducible run one for each share.
    in_hand = () if before is None else shares_of(before)
    # Within a step the ranks do not stop: they may at its end anyway.
    may_stop = lifecycle.loop is not None and not place.is_stepping
    evaluation: AbstractContextManager[None] = nullcontext()
    if may_stop:
        evaluation = lifecycle.stops.between_batches()
    with lifecycle.stopping(), evaluation:
        of_batch_in_hand = 0
        for figures in values:
            share = place.in_hand
            if share is before:
                if of_batch_in_hand == len(in_hand):
                    raise _too_many(measuring, before)
                share = in_hand[of_batch_in_hand]
                of_batch_in_hand += 1
            measuring.add(figures, share)
        if 0 < of_batch_in_hand < len(in_hand):
            raise one_for_each_share(measuring.what, len(in_hand), str(of_batch_in_hand))
        if may_stop:
            lifecycle.stops.after_last_batch()
    place.in_hand = before
    # The batches of the steps are compared elsewhere (Means.gather), so a step is not made slower here.
    return measuring.means(None if of_batch_in_hand else place.passed)


def _too_many(measuring: Measuring, in_hand: Dealt | None) -> UserError:
    """The error of a program that has given more values to run.mean() than it has batches in hand."""
    if in_hand is not None and isinstance(in_hand.batch, StepShares):
        return one_for_each_share(measuring.what, len(in_hand.batch.shares), "more")
    return measuring.takes_them_one_by_one()
