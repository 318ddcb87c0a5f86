"""How examples are dealt out: every one exactly once an epoch, step k the same everywhere."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DistributedSampler

from allranks.data.dealing import Batch, ShareSampler, evaluation_batches, steps_per_epoch, training_batches
from allranks.data.parts import InMemory
from helpers import rank_of

SIZES = {"examples": st.integers(1, 300), "ranks": st.integers(1, 13), "batch_size": st.integers(1, 310)}


def sampler(examples: int, ranks: int, rank: int, epoch: int = 0, seed: int = 0) -> ShareSampler:
    made = ShareSampler(range(examples), ranks, rank, seed=seed)  # type: ignore[arg-type]
    made.set_epoch(epoch)
    return made


def numbered(examples: int) -> InMemory:
    """Examples that can be told apart: number n has the pixel n // 256 and the label n % 256."""
    numbers = torch.arange(examples)
    pixels = (numbers // 256).to(torch.uint8).view(-1, 1, 1, 1)
    return InMemory(pixels, (numbers % 256).to(torch.uint8), numbers, torch.float64)


def numbers_in(images: torch.Tensor, labels: torch.Tensor) -> list[int]:
    return [
        round(p * 255) * 256 + n for p, n in zip(images.flatten().tolist(), labels.tolist(), strict=True)
    ]


def test_seven_examples_over_three_ranks():
    order = list(sampler(7, ranks=1, rank=0))
    assert sorted(order) == [0, 1, 2, 3, 4, 5, 6]
    dealt = [list(sampler(7, ranks=3, rank=r)) for r in range(3)]
    assert dealt == [[order[0], order[3], order[6]], [order[1], order[4]], [order[2], order[5]]]
    # in batches of 5, the second of which is examples 5 and 6 of the order: none for rank 1
    second = [dealt[r][sampler(7, 3, r).share(1, 5)] for r in range(3)]
    assert second == [[order[6]], [], [order[5]]]


@given(**SIZES, epoch=st.integers(0, 5), seed=st.integers(0, 2**31))
@settings(max_examples=150)
def test_the_shares_of_each_step_are_that_slice_of_the_whole_order(
    examples, ranks, batch_size, epoch, seed
):
    whole = list(sampler(examples, 1, 0, epoch, seed))
    assert sorted(whole) == list(range(examples))
    samplers = [sampler(examples, ranks, r, epoch, seed) for r in range(ranks)]
    mine = [list(s) for s in samplers]
    assert [len(s) for s in samplers] == [len(m) for m in mine]
    for step in range(steps_per_epoch(examples, batch_size)):
        shares = [m[s.share(step, batch_size)] for m, s in zip(mine, samplers, strict=True)]
        expected = whole[step * batch_size : (step + 1) * batch_size]
        assert sorted(n for share in shares for n in share) == sorted(expected)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1


@given(
    per_rank=st.integers(1, 60), ranks=st.integers(1, 12), epoch=st.integers(0, 3), seed=st.integers(0, 99)
)
@settings(max_examples=80)
def test_equal_shares_are_those_of_torchs_distributed_sampler(per_rank, ranks, epoch, seed):
    data = range(per_rank * ranks)
    for rank in range(ranks):
        theirs: DistributedSampler[int] = DistributedSampler(data, ranks, rank, seed=seed)  # type: ignore[arg-type]
        theirs.set_epoch(epoch)
        assert list(sampler(len(data), ranks, rank, epoch, seed)) == list(theirs)


def test_epochs_and_seeds_give_other_orders():
    orders = {(e, s): tuple(sampler(100, 1, 0, e, s)) for e in range(3) for s in (0, 10)}
    assert len(set(orders.values())) == 6
    assert tuple(sampler(100, 1, 0, 2, 10)) == orders[2, 10]


@given(**SIZES, epoch=st.integers(0, 3))
@settings(max_examples=60)
def test_batches_count_what_counts(examples, ranks, batch_size, epoch):
    """The ranks' counts make up each step's total; an empty share brings a stand-in that counts 0."""
    part = numbered(examples)
    by_rank = [
        [batch for (batch,) in training_batches(part, rank_of(r, ranks), batch_size, epoch, seed=3)]
        for r in range(ranks)
    ]
    steps = steps_per_epoch(examples, batch_size)
    assert [len(batches) for batches in by_rank] == [steps] * ranks  # everybody joins every step
    seen = []
    for step in range(steps):
        batches = [batches[step] for batches in by_rank]
        total = min(batch_size, examples - step * batch_size)
        assert {b.total for b in batches} == {total}
        assert sum(b.count for b in batches) == total
        for b in batches:
            [(pair, length)] = b.pieces
            assert len(pair.labels) == length == max(1, b.count)
            seen += numbers_in(*pair)[: b.count]
    assert sorted(seen) == list(range(examples))


def labels_of(batch: Batch) -> list[int]:
    return [label for piece in batch.pieces for label in piece.examples.labels.tolist()]


@given(**SIZES, accumulate=st.integers(1, 9))
@settings(max_examples=40)
def test_a_share_is_read_in_pieces_as_torch_cuts_a_tensor(examples, ranks, batch_size, accumulate):
    """The pieces of a share have the sizes that torch.chunk gives, and its examples in their order."""
    part, runtime = numbered(examples), rank_of(0, ranks)
    whole = [b for (b,) in training_batches(part, runtime, batch_size, 0, 0)]
    cut = [b for (b,) in training_batches(part, runtime, batch_size, 0, 0, accumulate=accumulate)]
    for one, other in zip(whole, cut, strict=True):
        labels = one.pieces[0].examples.labels
        sizes = [len(piece) for piece in labels.chunk(min(accumulate, len(labels)))]
        assert [piece.length for piece in other.pieces] == sizes
        assert labels_of(other) == labels.tolist()


def test_an_epoch_can_be_entered_in_the_middle():
    part, runtime = numbered(50), rank_of(1, 3)
    whole = [labels_of(b) for (b,) in training_batches(part, runtime, 8, 2, 0)]
    rest = [labels_of(b) for (b,) in training_batches(part, runtime, 8, 2, 0, first_step=4)]
    assert rest == whole[4:]
    assert len(rest) == 3


@given(examples=st.integers(1, 3000), ranks=st.integers(1, 13))
@settings(max_examples=40)
def test_evaluation_sees_every_example_once(examples, ranks):
    part = numbered(examples)
    seen = []
    for rank in range(ranks):
        for row, (pair, length) in evaluation_batches(part, rank_of(rank, ranks), seed=0):
            assert row == 0
            assert len(pair.labels) == length > 0
            seen += numbers_in(*pair)
    assert sorted(seen) == list(range(examples))


def test_steps_per_epoch():
    assert [steps_per_epoch(n, 128) for n in (1, 128, 129, 48_000)] == [1, 1, 2, 375]
