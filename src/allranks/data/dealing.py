"""Which rank sees which examples in which step: dealt out by a sampler, in global batches.

The batch is global. In every epoch all examples are put in one order, and the example at position p of it
belongs to rank p % world_size and to step p // batch_size. So step k sees the same examples at any world
size. The shares of a step differ by one example at most, and a share may be empty.

As a rule a rank takes one share of each batch. Where a run is to give the same bits on any number of ranks,
the number of shares is fixed instead, and a rank takes several (Runtime.shares).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch.utils.data import DistributedSampler

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


class ShareSampler(DistributedSampler[int]):
    """torch's DistributedSampler without its padding: every example exactly once an epoch.

    torch repeats examples until the ranks' shares are equal. This one deals out the very same order,
    order[rank::world_size], and lets the last shares be one shorter.
    """

    def __iter__(self) -> Iterator[int]:
        whole: DistributedSampler[int] = DistributedSampler(
            self.dataset, num_replicas=1, rank=0, shuffle=self.shuffle, seed=self.seed
        )
        whole.set_epoch(self.epoch)
        return islice(iter(whole), self.rank, None, self.num_replicas)

    def __len__(self) -> int:
        return len(range(self.rank, len(self.dataset), self.num_replicas))  # type: ignore[arg-type]

    def share(self, step: int, batch_size: int) -> slice:
        """Where this rank's examples of global step `step` stand in its own order."""
        return slice(self._first_at(step * batch_size), self._first_at((step + 1) * batch_size))

    def _first_at(self, position: int) -> int:
        """The first of this rank's examples at or after this position of the whole order.

        This rank's example i stands at position rank + i * num_replicas of the whole order.
        """
        position = min(position, len(self.dataset))  # type: ignore[arg-type]
        return -((self.rank - position) // self.num_replicas)  # rounded up


def steps_per_epoch(examples: int, batch_size: int) -> int:
    """Optimizer steps in one epoch; the last one may have fewer examples."""
    return -(-examples // batch_size)  # rounded up


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

    # 1. The order of each share's examples in this epoch.
    samplers = []
    orders = []
    for share in runtime.shares:
        positions = range(len(part))
        sampler = ShareSampler(positions, runtime.share_count, share, shuffle=shuffle, seed=seed)  # type: ignore[arg-type]
        sampler.set_epoch(epoch)
        samplers.append(sampler)
        orders.append(torch.tensor(list(sampler), dtype=torch.int64))

    # 2. Which examples each share has in each step, piece by piece. A stand-in fills an empty share. The
    #    positions are cut, and not the batch, because only the part knows what its batches consist of.
    stand_in = orders[0][:1] if len(orders[0]) else torch.zeros(1, dtype=torch.int64)
    in_epoch = steps_per_epoch(len(part), batch_size)
    steps = range(first_step, in_epoch if end_step is None else end_step)
    counts = []  # of each share of each step: its examples
    cuts = []  # of each share of each step: the positions of the examples of its pieces
    stand_ins = []  # of each share of each step: the positions of pieces that do not count
    for step in steps:
        in_step = min(batch_size, len(part) - step * batch_size)
        wanted = _most_pieces(in_step, runtime.share_count, accumulate) if equal_pieces else 0
        for sampler, order in zip(samplers, orders, strict=True):
            row = order[sampler.share(step, batch_size)]
            counts.append(len(row))
            cut = (row if len(row) else stand_in).chunk(accumulate)
            cuts.append(cut)
            stand_ins.append([stand_in] * (wanted - len(cut)))

    # 3. The examples themselves, read one after the other, put together again by steps.
    rows = [positions for cut, fill in zip(cuts, stand_ins, strict=True) for positions in [*cut, *fill]]
    read = part.batches(rows, mixed(seed, epoch))
    shares = zip(counts, cuts, stand_ins, strict=True)
    for step in steps:
        total = min(batch_size, len(part) - step * batch_size)
        batches = []
        for count, cut, fill in islice(shares, len(samplers)):
            pieces = [Piece(next(read), len(positions)) for positions in cut]
            pieces += [Piece(next(read), 0) for _ in fill]
            batches.append(Batch(pieces, count, total))
        yield batches
    assert next(read, None) is None


def _most_pieces(examples: int, shares: int, accumulate: int) -> int:
    """The pieces of the share that has most of them, of a batch with so many examples.

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
