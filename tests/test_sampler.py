"""How examples are dealt out: every one exactly once an epoch, step k the same everywhere."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

from allranks.data.batches import Batches
from allranks.data.dealing import (
    Batch,
    EpochOrder,
    evaluation_batches,
    share_of,
    steps_per_epoch,
    training_batches,
)
from allranks.data.parts import InMemory, Table
from helpers import rank_of

SIZES = {"examples": st.integers(1, 300), "ranks": st.integers(1, 13), "batch_size": st.integers(1, 310)}


def order(examples: int, epoch: int = 0, seed: int = 0, shuffle: bool = True) -> list[int]:
    made = EpochOrder(range(examples), seed, shuffle)
    made.set_epoch(epoch)
    return list(made)


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
    whole = order(7)
    assert sorted(whole) == [0, 1, 2, 3, 4, 5, 6]
    dealt = [whole[share_of(0, r, 3)] for r in range(3)]
    assert dealt == [[whole[0], whole[3], whole[6]], [whole[1], whole[4]], [whole[2], whole[5]]]
    # in batches of 5, the second of which is examples 5 and 6 of the order: none for rank 1
    second = [whole[5:][share_of(5, r, 3)] for r in range(3)]
    assert second == [[whole[6]], [], [whole[5]]]


@given(**SIZES, epoch=st.integers(0, 5), seed=st.integers(0, 2**31))
@settings(max_examples=150)
def test_the_shares_of_the_batches_are_those_of_the_whole_order(examples, ranks, batch_size, epoch, seed):
    whole = order(examples, epoch, seed)
    assert sorted(whole) == list(range(examples))
    dealt: list[list[int]] = [[] for _ in range(ranks)]
    for step in range(steps_per_epoch(examples, batch_size)):
        position = step * batch_size
        batch = whole[position : position + batch_size]
        shares = [batch[share_of(position, r, ranks)] for r in range(ranks)]
        assert sorted(n for share in shares for n in share) == sorted(batch)
        sizes = [len(share) for share in shares]
        assert max(sizes) - min(sizes) <= 1
        for rank, share in enumerate(shares):
            dealt[rank] += share
    assert dealt == [whole[r::ranks] for r in range(ranks)]


@given(
    per_rank=st.integers(1, 60), ranks=st.integers(1, 12), epoch=st.integers(0, 3), seed=st.integers(0, 99)
)
@settings(max_examples=80)
def test_equal_shares_are_those_of_torchs_distributed_sampler(per_rank, ranks, epoch, seed):
    data = range(per_rank * ranks)
    for rank in range(ranks):
        theirs: DistributedSampler[int] = DistributedSampler(data, ranks, rank, seed=seed)  # type: ignore[arg-type]
        theirs.set_epoch(epoch)
        assert order(len(data), epoch, seed)[share_of(0, rank, ranks)] == list(theirs)


def test_epochs_and_seeds_give_other_orders():
    orders = {(e, s): tuple(order(100, e, s)) for e in range(3) for s in (0, 10)}
    assert len(set(orders.values())) == 6
    assert tuple(order(100, 2, 10)) == orders[2, 10]
    assert order(100, 2, 10, shuffle=False) == list(range(100))


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


# --- the same for a loop of one's own ---

Step = tuple[list[int], int, int]  # the examples of a share, how many of them count, those of the batch


def own_steps(
    source: object, rank: int, ranks: int, epoch: int, seed: int, **options: object
) -> list[Step]:
    batches = Batches(source, rank_of(rank, ranks), seed, **options)  # type: ignore[arg-type]
    return [
        (dealt.batch[0].flatten().tolist(), dealt.counted, dealt.total) for dealt in batches.epoch(epoch)
    ]


@given(**SIZES, epoch=st.integers(0, 3), seed=st.integers(0, 99), shuffle=st.booleans())
@settings(max_examples=60)
def test_a_dataset_in_a_loop_of_ones_own_is_dealt_out_as_in_the_shipped_training(
    examples, ranks, batch_size, epoch, seed, shuffle
):
    """The same examples in the same order on each rank, stand-ins included."""
    numbers = torch.arange(examples)
    part, dataset = Table([numbers], numbers), TensorDataset(numbers)
    for rank in range(min(ranks, batch_size, examples)):
        runtime = rank_of(rank, min(ranks, batch_size, examples))
        shipped = training_batches(part, runtime, batch_size, epoch, seed, shuffle=shuffle)
        expected = [(b.pieces[0].examples[0].tolist(), b.count, b.total) for (b,) in shipped]
        found = own_steps(
            dataset, rank, runtime.world_size, epoch, seed, batch_size=batch_size, shuffle=shuffle
        )
        assert found == expected


class Counting(IterableDataset):
    def __init__(self, examples: int) -> None:
        self.examples = examples

    def __iter__(self):
        return iter(torch.arange(self.examples)[:, None])


def test_batches_of_any_source_and_size_are_dealt_out_by_position():
    """20 examples on 3 ranks in batches of 8, 8 and 4, of a loader of one's own, a stream and a list."""
    by_rank = [[[*range(r, 8, 3)], [*range(8 + (r - 8) % 3, 16, 3)]] for r in range(3)]
    last = [[18], [16, 19], [17]]
    assert by_rank[1] == [[1, 4, 7], [10, 13]]
    numbers = torch.arange(20)
    pairs = TensorDataset(numbers, numbers)
    sources = [
        DataLoader(pairs, 8),
        DataLoader(pairs, batch_sampler=[[*range(8)], [*range(8, 16)], [*range(16, 20)]]),
        [(part,) for part in numbers.split(8)],
        DataLoader(Counting(20), 8, collate_fn=lambda rows: (torch.stack(rows),)),
    ]
    for source in sources:
        for rank in range(3):
            steps = own_steps(source, rank, 3, epoch=0, seed=0)
            assert [rows for rows, _, _ in steps] == [*by_rank[rank], last[rank]]
    # What drop_last leaves out is seen by no rank.
    dropping = DataLoader(pairs, 8, drop_last=True)
    assert [[rows for rows, _, _ in own_steps(dropping, r, 3, 0, 0)] for r in range(3)] == by_rank


def test_a_share_that_is_empty_has_the_ranks_first_example_of_the_epoch_as_a_stand_in():
    numbers = torch.arange(7)
    steps = own_steps(TensorDataset(numbers), 1, 3, epoch=0, seed=0, batch_size=5, shuffle=False)
    assert steps == [([1, 4], 2, 5), ([1], 0, 2)]
    steps = own_steps([(numbers[:5],), (numbers[5:],)], 1, 3, epoch=0, seed=0)
    assert steps == [([1, 4], 2, 5), ([5], 0, 2)]


def test_an_epoch_of_ones_own_can_be_entered_in_the_middle():
    batches = Batches(TensorDataset(torch.arange(50)), rank_of(1, 3), 0, batch_size=8)
    whole = list(batches.epoch(2))
    rest = list(batches.epoch(2, first_step=4))
    assert [dealt[1:] for dealt in rest] == [dealt[1:] for dealt in whole[4:]]
    assert [dealt.batch[0].tolist() for dealt in rest] == [dealt.batch[0].tolist() for dealt in whole[4:]]
    assert [dealt.examples for dealt in rest] == [40, 48, 50]


# --- evaluation ---


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
