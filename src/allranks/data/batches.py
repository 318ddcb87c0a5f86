"""Batches for a user's own loop: a Dataset, a DataLoader or any stream of batches, dealt out to the ranks.

What a source gives is a *global* batch. Each rank takes its share of it by the rule of the shipped training
(dealing.py): the example at position p of the epoch belongs to rank p % world_size. So a step sees the same
examples on any number of ranks. A share may be empty; then it carries one example as a stand-in, which does
not count. In a reproducible run the number of shares is fixed, and a rank takes several of each batch.

A Dataset comes in the order of the shipped training. That order, and what a Dataset draws at random for one
of its examples, follow from the seed, the epoch and the example. What a sampler or a stream draws for a
batch follows from the seed, the epoch and the step. So a run that goes on in the middle of an epoch sees
what it would have seen.

Each batch has a digest, by which the ranks notice that they were given different batches, and a run that
goes on notices that the batches are not those which it has seen before.
"""

from __future__ import annotations

import dataclasses
import operator
import zlib
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset

from allranks.base.errors import ANYONE, UserError
from allranks.data.dealing import EpochOrder, share_of
from allranks.data.nests import described, is_dataclass, leaves, like, on_device, parts_of
from allranks.data.randomness import mixed, reseed
from allranks.data.workers import Workers
from allranks.runtime.runtime import Runtime


class Dealt(NamedTuple):
    """A share of a global batch that this rank takes, on the device."""

    batch: Any
    counted: int  # examples of the share that count: all of them, or 0 where it is a stand-in
    total: int  # examples of the global batch
    digest: int = 0  # a hash of the global batch and of all batches before it in the epoch
    examples: int = 0  # the examples of the global batch and of all batches before it in the epoch
    row: int = 0  # the number of the share among those that this rank takes of the batch


class Batches:
    """A source of global batches, and this rank's shares of them.

    source: a map-style Dataset, a DataLoader, or an iterable of batches that can be read once for each
    epoch. A Dataset needs `batch_size`, the examples of a global batch; a DataLoader has its own.
    Raises UserError for a source that cannot be dealt out.
    """

    def __init__(
        self,
        source: Any,
        runtime: Runtime,
        seed: int,
        *,
        batch_size: int | None = None,
        shuffle: bool | None = None,
        workers: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> None:
        self._runtime = runtime
        self._seed = seed
        self._given: dict[str, Any] = {
            "batch_size": batch_size,
            "shuffle": shuffle,
            "workers": workers,
            "collate": collate,
        }
        self.source = source
        self._loader = self._loader_of(source)
        self._workers = Workers(getattr(self._loader, "num_workers", 0), key="num_workers")
        if self._is_indexed:
            self._check_sampler()
        self._check_batch_size()

    # --- what the source is --------------------------------------------------------------------------

    def _loader_of(self, source: Any) -> Any:
        """The source if it is a DataLoader or a stream; for a Dataset, a DataLoader that reads it."""
        is_dataset = hasattr(source, "__len__") and hasattr(source, "__getitem__")
        if isinstance(source, list | tuple) and self._given["batch_size"] is None:
            is_dataset = False  # a list of batches; with a batch_size it is one of examples
        is_loader = hasattr(source, "dataset") and hasattr(source, "batch_sampler")
        if is_loader or not is_dataset or isinstance(source, IterableDataset):
            what = type(source).__name__
            for option, value in self._given.items():
                if value is not None:
                    raise UserError(
                        f"{option}={value} was given for a {what}, which makes its batches itself: give it "
                        "to the DataLoader, or hand over a map-style Dataset.",
                        said_by=ANYONE,
                    )
            if not hasattr(source, "__iter__"):
                raise UserError(
                    f"A {what} cannot be dealt out to the ranks: give a map-style Dataset, a DataLoader, "
                    "or an iterable of batches.",
                    said_by=ANYONE,
                )
            return source
        batch_size = self._given["batch_size"]
        if batch_size is None:
            raise UserError(
                f"A {type(source).__name__} is dealt out in batches: give batch_size, the examples of one "
                "step over all ranks.",
                said_by=ANYONE,
            )
        _check_count("batch_size", batch_size, least=1)
        _check_count("workers", self._given["workers"] or 0, least=0)
        if not len(source):
            raise UserError(
                f"A {type(source).__name__} without examples cannot be dealt out.", said_by=ANYONE
            )
        shuffle = self._given["shuffle"]
        return DataLoader(
            source,
            batch_size=batch_size,
            sampler=EpochOrder(source, self._seed, shuffle=True if shuffle is None else shuffle),
            num_workers=self._given["workers"] or 0,
            collate_fn=self._given["collate"],
            pin_memory=self._runtime.device.type == "cuda",
        )

    @property
    def _is_indexed(self) -> bool:
        """Whether each batch is a list of examples by number, of which a rank reads only its own."""
        loader = self._loader
        return (
            getattr(loader, "batch_sampler", None) is not None
            and hasattr(loader, "dataset")
            and not isinstance(loader.dataset, IterableDataset)
        )

    def _check_sampler(self) -> None:
        for sampler in (self._loader.batch_sampler, getattr(self._loader, "sampler", None)):
            inner = getattr(sampler, "sampler", sampler)
            if isinstance(inner, DistributedSampler):
                raise UserError(
                    "The DataLoader has a DistributedSampler, which deals the examples out already: leave "
                    "it out (shuffle=True in its place), and give the batch size over all ranks.",
                    said_by=ANYONE,
                )

    def _check_batch_size(self) -> None:
        batch_size = self.batch_size
        ranks = self._runtime.world_size
        if batch_size is not None and batch_size < ranks:
            raise UserError(
                f"batch_size={batch_size} is smaller than the {ranks} ranks: it counts the examples of all "
                f"ranks together. Give at least {ranks}, or start at most {batch_size} ranks.",
                said_by=ANYONE,
            )

    @property
    def batch_size(self) -> int | None:
        """Examples of a global batch; None if the source does not say it."""
        size = getattr(self._loader, "batch_size", None)
        return size if isinstance(size, int) else None

    @property
    def count(self) -> int | None:
        """Global batches of an epoch; None if the source does not say it."""
        try:
            return len(self._loader.batch_sampler if self._is_indexed else self._loader)
        except (TypeError, NotImplementedError):
            return None

    @property
    def examples(self) -> int | None:
        """Examples of an epoch; None if the source does not say it.

        A batch_sampler alone knows which examples its batches have, and need not have all of them.
        """
        return None if self.batch_size is None else self._examples_to_draw

    @property
    def _examples_to_draw(self) -> int | None:
        """How many examples the source's batches are made of; None if it does not say it."""
        if not self._is_indexed:
            return None
        if self.batch_size is not None and getattr(self._loader, "drop_last", False):
            return self.batch_size * (self.count or 0)
        try:
            return len(self._loader.sampler)
        except (TypeError, NotImplementedError, AttributeError):
            return None

    @property
    def with_state(self) -> Any:
        """The source, where it has a state of its own that says how far it is; None otherwise.

        If the examples of a batch are known by number, that state is not needed.
        """
        has_state = hasattr(self.source, "state_dict") and hasattr(self.source, "load_state_dict")
        return self.source if has_state and not self._is_indexed else None

    def described(self) -> dict[str, int | None]:
        """What a run that goes on in the middle of an epoch must find again."""
        return {"batch_size": self.batch_size, "steps": self.count, "examples": self._examples_to_draw}

    # --- the batches of an epoch -----------------------------------------------------------------------

    def epoch(
        self,
        epoch: int,
        first_step: int = 0,
        *,
        seen: int | None = None,
        is_there: bool = False,
        position: int = 0,
    ) -> Iterator[Dealt]:
        """This rank's shares of each global batch of the epoch from `first_step` on; both count from 0.

        Each batch gives as many shares, one after the other, as runtime.shares has: one, or several in a
        reproducible run. `seen` is the digest of the batches before the first step; None if it is not
        known. Raises UserError if the batches that are skipped have another one. `is_there`: nothing is
        skipped, because load_state_dict() has put the source where the first step's batch comes next. Then
        `position` says how many examples of the epoch came before; all ranks give the same.
        """
        loader = self._loader
        samplers = [getattr(loader, name, None) for name in ("sampler", "batch_sampler")]
        samplers += [getattr(each, "sampler", None) for each in samplers]
        for each in [*samplers, loader]:
            set_epoch = getattr(each, "set_epoch", None)
            if set_epoch is not None:
                set_epoch(epoch)
            # A generator of the user's own would otherwise go on from epoch to epoch, and begin anew in a
            # process that goes on from a checkpoint.
            generator = getattr(each, "generator", None)
            if isinstance(generator, torch.Generator):
                generator.manual_seed(mixed(self._seed, epoch))
        reseed(mixed(self._seed, epoch))  # a sampler draws the order of the epoch now
        if self._is_indexed:
            yield from self._indexed(epoch, first_step, seen)
        else:
            yield from self._streamed(epoch, first_step, seen, position if is_there else None)

    def _check_seen(self, digest: int, seen: int | None) -> None:
        """Raises UserError on all ranks where the batches that are skipped are not those seen before."""
        if not seen:  # None, or 0: of batches of which an older version of allranks could read nothing
            return
        with self._runtime.all_or_none():
            if digest != seen and isinstance(getattr(self._loader, "sampler", None), EpochOrder):
                raise UserError(
                    f"The examples of the {type(self.source).__name__} come in another order than before "
                    "the run was interrupted in this epoch, so it cannot go on in its middle. Give the "
                    "same shuffle; where an older version of allranks has begun the epoch, which shuffled "
                    "in another way, go on with that version, or give another name for the run."
                )
            if digest != seen:
                raise UserError(
                    f"The batches of the {type(self.source).__name__} come in another order than before "
                    "the run was interrupted in this epoch, so it cannot go on in its middle. Let the "
                    "order follow from set_epoch(epoch), which allranks calls where a source or its "
                    "sampler has it, or from the generators of torch, NumPy or random, which allranks "
                    "seeds."
                )

    def _check_end(self, given: int, first_step: int, digest: int, seen: int | None) -> None:
        """Raises UserError on all ranks where an epoch that goes on has no batch left, and should have.

        The source has `given` batches, of which none is left for the step `first_step`. That is in order
        where they are those that were seen before.
        """
        if seen is None or given > first_step:
            return
        if given == first_step:
            self._check_seen(digest, seen)
            return
        with self._runtime.all_or_none():
            raise UserError(
                f"The {type(self.source).__name__} gives {given:,} batches, but {first_step:,} steps of "
                "this epoch were taken before the run was interrupted: give the same batches, or another "
                "name for the run."
            )

    def _each_seeded(self, batches: Iterable[Any], epoch: int, first: int) -> Iterator[Any]:
        """The batches, the first of which has the number `first`. Each is read with generators seeded anew.

        What draws a batch at random in this process then draws the same on all ranks, whatever the loop's
        body has drawn before, and whether or not the batches before it were only skipped.
        """
        iterator = iter(batches)
        number = first
        while True:
            if number:  # the first batch goes on with the generators that epoch() has seeded
                reseed(mixed(self._seed, epoch, number))
            try:
                batch = next(iterator)
            except StopIteration:
                return
            yield batch
            number += 1

    def explained(self) -> AbstractContextManager[None]:
        """A block for all that runs while the batches are read: it says what ended a worker process."""
        return self._workers.explained()

    def _indexed(self, epoch: int, first_step: int, seen: int | None) -> Iterator[Dealt]:
        """Each batch is known by the numbers of its examples, of which this rank reads its own."""
        runtime = self._runtime
        loader = self._loader
        known: deque[_Known] = deque()  # what is known of the shares that are being read

        def shares() -> Iterator[list[Any]]:
            digest = 0
            position = 0
            given = 0
            stand_ins: dict[int, list[Any]] = {}  # for each share its first example in the epoch
            for step, batch in enumerate(self._each_seeded(loader.batch_sampler, epoch, 0)):
                if step == first_step:
                    self._check_seen(digest, seen)
                given = step + 1
                numbers = list(batch)
                digest = zlib.crc32(repr(numbers).encode(), digest)
                first = position
                position += len(numbers)
                for row, share in enumerate(runtime.shares):
                    mine = numbers[share_of(first, share, runtime.share_count)]
                    stand_ins[row] = stand_ins.get(row) or mine[:1] or numbers[:1]
                    if step < first_step:
                        continue
                    known.append(_Known(len(mine), len(numbers), digest, position, row))
                    yield mine or stand_ins[row]
            self._check_end(given, first_step, digest, seen)

        reader: DataLoader[Any] = DataLoader(
            _Seeded(loader.dataset, mixed(self._seed, epoch)),
            batch_sampler=_Drawn(shares()),  # type: ignore[arg-type]
            num_workers=loader.num_workers,
            collate_fn=loader.collate_fn,
            pin_memory=loader.pin_memory,
            worker_init_fn=partial(_begin_both, self._workers.begin(), loader.worker_init_fn)
            if loader.num_workers
            else None,
            multiprocessing_context=getattr(loader, "multiprocessing_context", None)
            if loader.num_workers
            else None,
        )
        for batch in self._workers.read(reader):
            yield Dealt(_moved(batch, runtime.device), *known.popleft())

    def _read_stream(self) -> Iterator[Any]:
        """Begins to read the stream. A DataLoader of an IterableDataset may start its processes now."""
        loader = self._loader
        if not isinstance(loader, DataLoader) or not self._workers.count:
            return self._workers.read(loader)
        # The DataLoader is the user's: it gets back what it had.
        theirs = loader.worker_init_fn
        loader.worker_init_fn = partial(_begin_both, self._workers.begin(), theirs)
        try:
            return self._workers.read(loader)
        finally:
            loader.worker_init_fn = theirs

    def _streamed(
        self, epoch: int, first_step: int, seen: int | None, resumed_at: int | None
    ) -> Iterator[Dealt]:
        """Each batch comes whole, on every rank, which then keeps its shares of it.

        `resumed_at`: how many examples came before, where the source stands at the first step's batch
        already; None if the batches before that are to be skipped.
        """
        runtime = self._runtime
        batches = self._read_stream()
        is_there = resumed_at is not None
        first = first_step if is_there else 0
        position = resumed_at or 0
        digest = 0
        given = first
        for step, batch in enumerate(self._each_seeded(batches, epoch, first), start=first):
            if step == first_step and not is_there:
                self._check_seen(digest, seen)
            given = step + 1
            digest = zlib.crc32(_sample_of(batch), digest)
            total = length_of(batch)
            first_of_batch = position
            position += total
            if step < first_step:
                continue
            for row, share in enumerate(runtime.shares):
                mine = share_of(first_of_batch, share, runtime.share_count)
                count = len(range(total)[mine])
                # A stand-in for an empty share is of the same batch: no other is there.
                examples = mine if count else slice(0, 1)
                part = batch if runtime.share_count == 1 else taken(batch, examples, total)
                yield Dealt(_moved(part, runtime.device), count, total, digest, position, row)
        if not is_there:
            self._check_end(given, first_step, digest, seen)


def _check_count(option: str, value: Any, least: int) -> None:
    """Raises UserError if what was given for the option is not a whole number of at least so many."""
    if not isinstance(value, int | np.integer) or value < least:
        raise UserError(
            f"run.batches() got {option}={value!r}: give a whole number of {least} or more.",
            said_by=ANYONE,
        )


class _Known(NamedTuple):
    """What is known of a share before its examples are read."""

    counted: int
    total: int
    digest: int
    examples: int
    row: int


class _Drawn(NamedTuple):
    """A batch sampler that has been drawn from already."""

    shares: Iterator[list[Any]]

    def __iter__(self) -> Iterator[list[Any]]:  # type: ignore[override]
        return self.shares


class _Seeded(Dataset[Any]):
    """A Dataset whose random transforms draw the same for an example on any rank and in any worker."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self.dataset = dataset
        self.seed = seed

    def __getitem__(self, number: Any) -> Any:
        reseed(mixed(self.seed, _as_whole_number(number)))
        return self.dataset[number]


def _as_whole_number(key: Any) -> int:
    """The number of an example; for a key that is not a number, such as a text, a number made of it."""
    try:
        return operator.index(key)  # also NumPy's integers, and tensors of one
    except TypeError:
        return zlib.crc32(repr(key).encode())


def _begin_both(ours: Callable[[int], None], theirs: Callable[[int], None] | None, worker: int) -> None:
    """Prepares a worker process: what allranks does in each, and what the user's DataLoader asks for."""
    ours(worker)
    if theirs is not None:
        theirs(worker)


def _moved(batch: Any, device: torch.device) -> Any:
    """The batch on the device; what a loader gives is on the CPU already."""
    return batch if device.type == "cpu" else on_device(batch, device)


# --- pieces of batches ---------------------------------------------------------------------------------


def length_of(batch: Any) -> int:
    """The examples in a batch: the length of its first tensor, array or list of texts. Raises UserError."""
    length = _length(batch)
    if length == 0:
        raise UserError(
            f"A batch has no examples ({described(batch)}): leave empty batches out.", said_by=ANYONE
        )
    if length is None:
        raise UserError(
            f"How many examples a batch has cannot be told from {described(batch)}: allranks takes the "
            "length of its first tensor. Put its tensors into a tuple, a list or a dict.",
            said_by=ANYONE,
        )
    return length


def _length(batch: Any) -> int | None:
    if isinstance(batch, torch.Tensor | np.ndarray):
        return len(batch) if batch.ndim else None
    if isinstance(batch, Mapping):
        batch = list(batch.values())
    elif is_dataclass(batch):
        batch = list(parts_of(batch).values())
    if not isinstance(batch, list | tuple):
        return None
    for part in batch:
        length = _length(part)
        if length is not None:
            return length
    is_plain = batch and not any(isinstance(part, Mapping | list | tuple) for part in batch)
    return len(batch) if is_plain else None


# Enough of a batch to tell it from another one, and little enough to cost nothing beside a step.
_SAMPLED_NUMBERS = 256


def _sample_of(batch: Any) -> bytes:
    """Some bytes of a batch, for its digest: the first numbers of its first tensor in main memory."""
    for leaf in leaves(batch):
        if isinstance(leaf, torch.Tensor) and leaf.device.type == "cpu" and leaf.layout == torch.strided:
            first = leaf.detach().reshape(-1)[:_SAMPLED_NUMBERS].contiguous()
            return repr(leaf.shape).encode() + first.view(torch.uint8).numpy().tobytes()
        if isinstance(leaf, np.ndarray) and not leaf.dtype.hasobject:  # else these are addresses in memory
            return repr(leaf.shape).encode() + leaf.reshape(-1)[:_SAMPLED_NUMBERS].tobytes()
        if isinstance(leaf, str):
            return leaf.encode()
    return b""


def taken(batch: Any, rows: slice, length: int) -> Any:
    """Some examples of a batch that has `length` of them.

    Single numbers and texts belong to all examples. Raises UserError if the examples cannot be told
    apart.
    """
    if batch is None or isinstance(batch, bool | int | float | str) or getattr(batch, "ndim", None) == 0:
        return batch

    def from_part(part: Any) -> Any:
        return taken(part, rows, length)

    if isinstance(batch, Mapping):
        return like(batch, {key: from_part(value) for key, value in batch.items()})
    if is_dataclass(batch):
        return dataclasses.replace(
            batch, **{name: from_part(part) for name, part in parts_of(batch).items()}
        )
    if isinstance(batch, list | tuple) and any(_length(part) is not None for part in batch):
        parts = [from_part(part) for part in batch]
        return type(batch)(*parts) if hasattr(batch, "_fields") else type(batch)(parts)
    if isinstance(batch, torch.Tensor | np.ndarray | list | tuple) and len(batch) == length:
        return batch[rows]
    raise UserError(
        f"A part of the batch, {described(batch)}, does not have one row for each of the {length} "
        "examples, so the batch cannot be cut into shares: give a map-style Dataset, whose examples are "
        "dealt out before they become a batch.",
        said_by=ANYONE,
    )


def pieces_of(batch: Any, pieces: int, wanted: int) -> list[tuple[Any, int]]:
    """(piece, its examples that count) for at most so many pieces of a rank's share of a batch, in order.

    The pieces are those of the shipped training (dealing.py). `wanted` is the number of pieces of the share
    that has most of them. All ranks get so many: one that has fewer gets its first piece again, of which no
    example counts.
    """
    length = length_of(batch)
    cut = []
    for positions in torch.arange(length).chunk(pieces):
        rows = slice(int(positions[0]), int(positions[-1]) + 1)
        cut.append((taken(batch, rows, length), len(positions)))
    return cut + [(cut[0][0], 0)] * (wanted - len(cut))
