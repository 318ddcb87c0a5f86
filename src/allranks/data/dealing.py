"""Which rank sees which examples in which step: one order of all examples, dealt out in global batches.

The batch is global. In every epoch all examples are put in one order, and the example at position p of it
belongs to rank p % world_size and to step p // batch_size. So step k sees the same examples at any world
size. The shares of a step differ by one example at most, and a share may be empty. The batches of a loop of
one's own (batches.py) are dealt out by the same rule, and those that allranks makes have the same order.

As a rule a rank takes one share of each batch. If a run is to give the same bits on any number of ranks,
the number of shares is fixed instead, and a rank takes several (Runtime.shares).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence, Sized
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import DistributedSampler, Sampler

from allranks.data.parts import Part, Streamed
from allranks.data.randomness import mixed
from allranks.runtime.runtime import Runtime

EVAL_BATCH = {"cpu": 512, "cuda": 8192, "xpu": 8192, "mps": 2048}  # examples per forward pass, by device


class Piece(NamedTuple):
    """Some examples that go through the model together."""

    examples: Any  # a nest of tensors on the device; for classification Examples
    length: int  # how many examples they are


@dataclass(frozen=True)
class Batch:
    """A share of one global batch, on the device, cut into pieces that fit into memory.

    `count` of its examples count. It is all of them, or 0 for an empty share: that one carries one example
    as a stand-in, so that its rank still joins every collective. `total` is the sum of `count` over all
    shares.
    """

    pieces: Sequence[Piece]
    count: int
    total: int


class EpochOrder(Sampler[int]):
    """The order of an epoch's examples, each exactly once: that of torch's DistributedSampler.

    `data` has as many examples as its length says. The order follows from the seed and the epoch, which
    set_epoch() tells. Without `shuffle` it is 0, 1, 2, ... in each epoch.
    """

    def __init__(self, data: Sized, seed: int, shuffle: bool = True) -> None:
        self._data = data
        self._seed = seed
        self._shuffle = shuffle
        self._epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Says for which epoch the next order is, counted from 0."""
        self._epoch = epoch

    def __iter__(self) -> Iterator[int]:
        # For one replica, because torch repeats examples until the shares of several ones are equal.
        # share_of() deals the same order out without that.
        whole: DistributedSampler[int] = DistributedSampler(
            self._data,  # type: ignore[arg-type]
            num_replicas=1,
            rank=0,
            shuffle=self._shuffle,
            seed=self._seed,
        )
        whole.set_epoch(self._epoch)
        return iter(whole)

    def __len__(self) -> int:
        return len(self._data)


def share_of(position: int, share: int, shares: int) -> slice:
    """Which examples of a batch belong to a share, of so many.

    The example at position p of the epoch's order belongs to share p % shares. `position` is that of the
    batch's first example.
    """
    return slice((share - position) % shares, None, shares)


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Optimizer steps in one epoch; the last one may have fewer examples."""
    return -(-examples // batch_size)  # rounded up


class _Cut(NamedTuple):
    """How one share of one step is cut into pieces."""

    examples: int  # of the share
    pieces: Sequence[torch.Tensor]  # for each piece, the positions of its examples
    stand_ins: Sequence[torch.Tensor]  # positions for further pieces, which do not count


def training_batches(
    part: Part,
    runtime: Runtime,
    batch_size: int,
    epoch: int,
    seed: int,
    first_step: int = 0,
    end_step: int | None = None,
    shuffle: bool = True,
    accumulate: int = 1,
    equal_pieces: bool = False,
) -> Iterator[list[Batch]]:
    """This rank's shares of each of the epoch's global batches, from step `first_step` on.

    `epoch` and `first_step` count from 0. The last step is the one before `end_step`, by default the
    epoch's last one. Without `shuffle` each epoch has the part's own order; a stream always has its own.
    Each share is read in `accumulate` pieces, or fewer where it has fewer examples. Each list has one Batch
    for each share in runtime.shares. With `equal_pieces` all shares of a step have as many pieces: where
    one would have fewer, a stand-in of length 0 fills up.
    """
    if isinstance(part, Streamed):
        part.set_epoch(epoch)
        shuffle = False

    # 1. The order of the examples in this epoch.
    epoch_order = EpochOrder(range(len(part)), seed, shuffle)
    epoch_order.set_epoch(epoch)
    order = torch.tensor(list(epoch_order), dtype=torch.int64)

    # 2. Which examples each share has in each step, piece by piece. A stand-in fills an empty share: the
    #    first example of this rank in the epoch. The positions are cut, and not the batch, because only
    #    the part knows what its batches consist of.
    stand_in = order[share_of(0, runtime.shares[0], runtime.share_count)][:1]
    if not len(stand_in):
        stand_in = torch.zeros(1, dtype=torch.int64)
    in_epoch = steps_per_epoch(len(part), batch_size)
    steps = range(first_step, in_epoch if end_step is None else end_step)
    cuts: list[_Cut] = []  # one for each share of each step
    for step in steps:
        position = step * batch_size
        batch = order[position : position + batch_size]
        wanted = most_pieces(len(batch), runtime.share_count, accumulate) if equal_pieces else 0
        for share in runtime.shares:
            row = batch[share_of(position, share, runtime.share_count)]
            examples = row if len(row) else stand_in
            pieces = examples.chunk(accumulate)
            cuts.append(_Cut(len(row), pieces, [stand_in] * (wanted - len(pieces))))

    # 3. The examples themselves, read one after the other, put together again by steps.
    rows: list[torch.Tensor] = []
    for cut in cuts:
        rows += cut.pieces
        rows += cut.stand_ins
    read = part.batches(rows, mixed(seed, epoch))
    left = iter(cuts)
    for step in steps:
        total = min(batch_size, len(part) - step * batch_size)
        batches = []
        for cut in islice(left, len(runtime.shares)):
            counted = [Piece(next(read), len(positions)) for positions in cut.pieces]
            not_counted = [Piece(next(read), 0) for _ in cut.stand_ins]
            batches.append(Batch([*counted, *not_counted], cut.examples, total))
        yield batches
    assert next(read, None) is None


def most_pieces(examples: int, shares: int, accumulate: int) -> int:
    """The pieces of the share that has most of them, of a batch with so many examples.

    A share is cut as torch.chunk() cuts a tensor, into `accumulate` pieces or fewer.

    A share with more examples may have fewer pieces: 5 examples are cut into 2, 2 and 1, but 4 into four.
    """
    lengths = {max(1, examples // shares), -(-examples // shares)}
    return max(len(torch.arange(length).chunk(accumulate)) for length in lengths)


def evaluation_batches(part: Part, runtime: Runtime, seed: int) -> Iterator[tuple[int, Piece]]:
    """(row, piece): this rank's examples of the part, each exactly once over all ranks.

    `row` counts this rank's shares from 0.
    """
    if isinstance(part, Streamed):
        part.set_epoch(0)
    for row, share in enumerate(runtime.shares):
        mine = torch.arange(min(share, len(part)), len(part), runtime.share_count)
        pieces = mine.split(EVAL_BATCH[runtime.device.type]) if len(mine) else []
        for positions, examples in zip(pieces, part.batches(pieces, seed), strict=True):
            yield row, Piece(examples, len(positions))


def fewest_evaluation_batches(part: Part, runtime: Runtime) -> int:
    """How many batches the rank with the fewest gets from evaluation_batches(); the same on all ranks.

    Shares differ by one example at most, so no rank gets more than one batch for each of its shares beyond
    that.
    """
    smallest_share = len(part) // runtime.share_count
    return len(runtime.shares) * -(-smallest_share // EVAL_BATCH[runtime.device.type])  # rounded up


def most_evaluation_batches(part: Part, runtime: Runtime) -> int:
    """How many batches the rank with the most gets from evaluation_batches(), where each has one share."""
    largest_share = -(-len(part) // runtime.share_count)
    return -(-largest_share // EVAL_BATCH[runtime.device.type])  # rounded up
