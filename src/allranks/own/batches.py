"""run.batches(): batches that are dealt out to the ranks of a run."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator
from typing import Any

import torch

from allranks.data.batches import Batches
from allranks.data.randomness import mixed, reseed
from allranks.own.lifecycle import Lifecycle
from allranks.own.place import OF_NO_SHARE, LoopPlace
from allranks.own.shares import within_pieces


class OwnBatches:
    """Batches dealt out to the ranks, for one run. Going through them yields this rank's shares."""

    def __init__(self, dealt: Batches, lifecycle: Lifecycle, place: LoopPlace) -> None:
        self.dealt = dealt
        self._lifecycle = lifecycle
        self._place = place

    def __len__(self) -> int:
        """The global batches of an epoch; raises TypeError where the source does not say it."""
        count = self.dealt.count
        if count is None:
            raise TypeError(f"{type(self.dealt.source).__name__} does not say how many batches it has")
        return count

    def __iter__(self) -> Iterator[Any]:
        lifecycle, place = self._lifecycle, self._place
        runtime = lifecycle.runtime
        place.leave_alike()
        if place.is_in_shares:
            raise within_pieces("run.batches()")
        is_stepping = place.is_stepping
        before = place.in_hand
        drawn = _drawn() if lifecycle.is_reproducible else None
        try:
            with self.dealt.explained():
                for number, share in enumerate(self.dealt.epoch(0)):
                    place.in_hand = share
                    place.is_stepping = False
                    place.passed = zlib.crc32(b"%d %d " % (share.digest, share.examples), place.passed)
                    if drawn is not None:
                        mine = runtime.shares
                        reseed(mixed(drawn, number // len(mine), mine[share.row]), runtime.device)
                    yield share.batch
                    runtime.progress.evaluated_batch()
                    if lifecycle.loop is not None:
                        lifecycle.stops.after_batch()
        finally:  # also where the loop is left by `break`
            place.in_hand = before
            place.is_stepping = is_stepping
            if drawn is not None:
                reseed(mixed(drawn, OF_NO_SHARE), runtime.device)


def own_batches(
    source: Any,
    lifecycle: Lifecycle,
    place: LoopPlace,
    *,
    batch_size: int | None = None,
    shuffle: bool | None = None,
    workers: int | None = None,
    collate: Callable[[list[Any]], Any] | None = None,
) -> OwnBatches:
    """What run.batches() does: the source's batches, dealt out to the ranks.

    `source` may be such batches already. Raises UserError for a source that cannot be dealt out.
    """
    lifecycle.check_open("run.batches()")
    if isinstance(source, OwnBatches):
        return source
    made = Batches(
        source,
        lifecycle.runtime,
        lifecycle.config.seed,
        batch_size=batch_size,
        shuffle=shuffle,
        workers=workers,
        collate=collate,
    )
    return OwnBatches(made, lifecycle, place)


def _drawn() -> int:
    """A random number, the same on all ranks where their random numbers have been the same up to now."""
    return int(torch.randint(2**62, ()))
