"""One part of the data (training, validation or test) as batches on the device, from memory or a Dataset.

    InMemory   images of type uint8 and their labels
    Table      arrays of any types
    Mapped     a user's map-style Dataset
    Streamed   a user's IterableDataset

All kinds of part have a length and a method `batches`, which the rest of allranks uses alike. A batch is a
nest of tensors (nests.py). If the task is classification, it is a pair of images and labels.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, default_collate

from allranks.base.errors import UserError
from allranks.base.text import some
from allranks.data import nests
from allranks.data.randomness import mixed, reseed
from allranks.data.workers import Workers

# The positions of the examples of each batch, in a part of the data.
Rows = Sequence[Sequence[int] | torch.Tensor]


class Examples(NamedTuple):
    """Some images with their labels, on the device."""

    images: torch.Tensor  # [n, C, H, W] scaled to 0..1, or what a user's Dataset gives
    labels: torch.Tensor  # int64 [n]


class InMemory:
    """Examples held on the device as uint8: a batch is one gather and one conversion.

    images: uint8 [N, C, H, W] and labels: uint8 [N], all of the set; indices: int64 [n], which of these
    belong to this part. Batches have images of `dtype`.
    """

    def __init__(
        self, images: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype
    ) -> None:
        self.images = images
        self.labels = labels
        self.indices = indices
        self.dtype = dtype

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, shares: Sequence[Sequence[int] | torch.Tensor], seed: int) -> Iterator[Examples]:
        """The examples of each share in turn. A share is a sequence of positions in this part."""
        if not shares:
            return
        # What is small is gathered once for all shares, and not once for each.
        positions = torch.cat([torch.as_tensor(share, dtype=torch.int64) for share in shares])
        rows = self.indices.index_select(0, positions.to(self.indices.device))
        labels = self.labels.index_select(0, rows).long()
        sizes = [len(share) for share in shares]
        for its_rows, its_labels in zip(rows.split(sizes), labels.split(sizes), strict=True):
            # index_select takes whole rows: on a CPU images[rows] is 18 times slower.
            images = self.images.index_select(0, its_rows)
            yield Examples(images.to(self.dtype).div_(255), its_labels)

    def first(self, count: int, seed: int) -> Examples:
        """The first `count` examples of the part."""
        [examples] = self.batches([range(count)], seed)
        return examples

    def explained(self) -> AbstractContextManager[None]:
        """Nothing is read while batches are made, so nothing needs to be explained."""
        return nullcontext()


class Table:
    """Arrays of any types held on the device: a batch is one gather from each of them.

    arrays: a nest of tensors [N, ...], all of the set; indices: int64 [n], which of the N examples belong
    to this part. If the part `is_labelled`, the nest is a pair of images and labels.
    """

    def __init__(self, arrays: Any, indices: torch.Tensor, is_labelled: bool = False) -> None:
        self.arrays = arrays
        self.indices = indices
        self.is_labelled = is_labelled

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, rows: Rows, seed: int) -> Iterator[Any]:
        """The examples of each row in turn. A row is a sequence of positions in this part."""
        for row in rows:
            positions = torch.as_tensor(row, dtype=torch.int64, device=self.indices.device)
            chosen = self.indices.index_select(0, positions)
            yield self._at(chosen)

    def _at(self, chosen: torch.Tensor) -> Any:
        batch = nests.mapped(self.arrays, lambda array: array.index_select(0, chosen))
        return Examples(batch[0], batch[1].long()) if self.is_labelled else batch

    def first(self, count: int, seed: int) -> Any:
        """The first `count` examples of the part."""
        [examples] = self.batches([range(count)], seed)
        return examples

    def explained(self) -> AbstractContextManager[None]:
        """Nothing is read while batches are made, so nothing needs to be explained."""
        return nullcontext()


@dataclass(frozen=True)
class Form:
    """What the batches of a user's Dataset become before the model gets them.

    key: where the Dataset stands in the configuration, for messages; classes: how many classes there are,
    None if that is not known; is_labelled: whether a batch must be a pair of images and labels; collate:
    makes a batch of a list of examples, None for torch's own way.
    """

    device: torch.device
    dtype: torch.dtype  # of the weights
    key: str
    classes: int | None = None
    is_labelled: bool = True
    collate: Callable[[list[Any]], Any] | None = None

    def on_device(self, batch: Any) -> Any:
        """What the DataLoader gives, as the model takes it.

        Floating-point numbers get the type of the weights. All other types, such as the whole numbers of a
        text, stay as they are. Only images with labels are looked at more closely: images of type uint8
        become numbers of 0..1, and labels whole numbers. Raises UserError if they are not such a pair.
        """
        if not self.is_labelled:
            return nests.on_device(batch, self.device, self.dtype)
        images, labels = _checked(batch, self.key, self.classes)
        images = images.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = images.to(self.dtype) / 255
        elif images.is_floating_point():
            images = images.to(self.dtype)
        return Examples(images, labels.to(self.device, non_blocking=True).long())


class Mapped:
    """A user's own map-style Dataset, read by a standard DataLoader.

    indices: which examples of the Dataset belong to this part; workers: processes that read for this rank;
    form: what its batches become.
    """

    def __init__(self, dataset: Dataset[Any], indices: Sequence[int], workers: int, form: Form) -> None:
        self.dataset = dataset
        self.indices = indices
        self.workers = Workers(workers)
        self.form = form

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, rows: Rows, seed: int) -> Iterator[Any]:
        """The examples of each row in turn. A row is a sequence of positions in this part.

        `seed` decides what the Dataset's own random transforms draw. Raises UserError if the Dataset
        gives something else than the task needs.
        """
        yield from self._read(rows, seed, self.workers.count)

    def first(self, count: int, seed: int) -> Any:
        """The first `count` examples of the part.

        If workers are to read the Dataset, one reads these as well. A Dataset may open a file when it is
        first asked for an example, and such a file must not be shared between this process and its workers.
        """
        with self.explained():
            [examples] = self._read([range(count)], seed, min(self.workers.count, 1))
        return examples

    def explained(self) -> AbstractContextManager[None]:
        """A block for all that runs while this part is read: it says what ended a worker process."""
        return self.workers.explained()

    def _read(self, rows: Rows, seed: int, workers: int) -> Iterator[Any]:
        loader: DataLoader[Any] = DataLoader(
            _Seeded(self.dataset, self.indices, seed),
            batch_sampler=[[int(position) for position in row] for row in rows],
            num_workers=workers,
            collate_fn=self.form.collate,
            pin_memory=self.form.device.type == "cuda",
            worker_init_fn=self.workers.begin() if workers else None,
        )
        for batch in self.workers.read(loader):
            yield self.form.on_device(batch)


class Streamed:
    """A user's own IterableDataset: its examples come one after another, in an order of its own.

    indices: which examples of the stream belong to this part, counted from 0. Every rank, and every worker
    process of a rank, reads the stream from its beginning and keeps the examples that it needs. So each
    example is used exactly once, whatever the number of ranks and workers, and a run goes on in the middle
    of an epoch by reading forward to its place. A Dataset must not share its examples out to workers or
    ranks by itself.
    """

    def __init__(
        self, dataset: IterableDataset[Any], indices: Sequence[int], workers: int, form: Form
    ) -> None:
        self.dataset = dataset
        self.workers = Workers(workers)
        self.form = form
        self._indices = np.asarray(indices, dtype=np.int64)

    def __len__(self) -> int:
        return len(self._indices)

    def set_epoch(self, epoch: int) -> None:
        """Tells the Dataset which epoch begins, from 0, if it has a method set_epoch."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)

    def batches(self, rows: Rows, seed: int) -> Iterator[Any]:
        """The examples of each row in turn. A row is a sequence of positions in this part.

        `seed` decides what the Dataset draws at random while it gives its examples. Raises UserError if
        the stream ends too early, or gives something else than the task needs.
        """
        yield from self._read(rows, seed, self.workers.count)

    def first(self, count: int, seed: int) -> Any:
        """The first `count` examples of the part, read by a worker where workers are to read it."""
        with self.explained():
            [examples] = self._read([range(count)], seed, min(self.workers.count, 1))
        return examples

    def explained(self) -> AbstractContextManager[None]:
        """A block for all that runs while this part is read: it says what ended a worker process."""
        return self.workers.explained()

    def _read(self, rows: Rows, seed: int, workers: int) -> Iterator[Any]:
        wanted = [self._indices[np.asarray(row, dtype=np.int64)] for row in rows]
        loader: DataLoader[Any] = DataLoader(
            _Picked(self.dataset, wanted, seed, self.form.collate or default_collate),
            batch_size=None,  # _Picked gives whole batches
            num_workers=workers,
            collate_fn=_as_it_is,
            pin_memory=self.form.device.type == "cuda",
            worker_init_fn=self.workers.begin() if workers else None,
        )
        for batch in self.workers.read(loader):
            if isinstance(batch, _Ended):
                raise UserError(
                    f"{self.form.key} ended after {batch.examples:,} examples, but example number "
                    f"{batch.wanted + 1:,} is needed: each pass over it must give as many as data.split "
                    "says, or as the pass gave in which they were counted. It must not share them out to "
                    "ranks or worker processes by itself."
                )
            yield self.form.on_device(batch)


def _as_it_is(batch: Any) -> Any:
    return batch


Part = InMemory | Table | Mapped | Streamed


@dataclass(frozen=True)
class _Seeded(Dataset[Any]):
    """Some examples of a Dataset. Random transforms draw the same for an example on any rank or worker."""

    dataset: Dataset[Any]
    indices: Sequence[int]
    seed: int

    def __getitem__(self, position: int) -> Any:
        reseed(mixed(self.seed, position))
        return self.dataset[self.indices[position]]

    def __len__(self) -> int:
        return len(self.indices)


class _Ended(NamedTuple):
    """What stands in the place of a batch where a stream has ended before it."""

    examples: int  # that the stream gave
    wanted: int  # the position of the example that is missing


@dataclass(frozen=True)
class _Picked(IterableDataset[Any]):
    """The batches of some examples of a stream, whose positions in it are `rows`.

    A worker process makes one batch in so many: the first one makes the batches 0, W, 2W, ... of W workers,
    and the DataLoader asks the workers in turn, so that the batches come in their order. What the Dataset
    draws at random for an example depends on its position alone, and is the same on any rank or worker.
    """

    dataset: IterableDataset[Any]
    rows: Sequence[np.ndarray]  # int64
    seed: int
    collate: Callable[[list[Any]], Any]

    def __iter__(self) -> Iterator[Any]:
        worker = torch.utils.data.get_worker_info()
        mine = self.rows if worker is None else self.rows[worker.id :: worker.num_workers]
        if not mine:
            return
        # How often each example is still needed: an empty share carries one as a stand-in, again and again.
        needed = np.bincount(np.concatenate(list(mine)))
        kept: dict[int, Any] = {}
        reseed(mixed(self.seed))
        stream = iter(self.dataset)
        read = 0
        for row in mine:
            while read <= row.max():
                reseed(mixed(self.seed, read))
                try:
                    example = next(stream)
                except StopIteration:
                    yield _Ended(examples=read, wanted=read)
                    return
                if needed[read]:
                    kept[read] = example
                read += 1
            positions = row.tolist()
            examples = [kept[position] for position in positions]
            for position in positions:
                needed[position] -= 1
                if not needed[position]:
                    del kept[position]
            yield self.collate(examples)


def _checked(batch: Any, key: str, classes: int | None) -> Examples:
    """A batch of a user's Dataset; raises UserError unless it is [n, ...] images and [n] labels of so many
    classes.
    """
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        kind = type(batch).__name__
        if isinstance(batch, list | tuple):
            kind += f" of {len(batch)}"
        elif isinstance(batch, Mapping):
            kind += f" with {some(list(batch))}"
        raise UserError(
            f"{key}: each item of the Dataset must be a pair (image, label), but a batch of them is a "
            f"{kind}: return a pair from its __getitem__."
        )
    images, labels = batch
    for name, tensor in (("image", images), ("label", labels)):
        if not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"{key}: each {name} of the Dataset must be a tensor or a number, but a batch of them is a "
                f"{type(tensor).__name__}."
            )
    if labels.dim() != 1 or len(labels) != len(images):
        raise UserError(
            f"{key}: each label of the Dataset must be one number, but {len(images)} of them have the "
            f"shape {list(labels.shape)}."
        )
    if labels.is_floating_point() or labels.is_complex():
        raise UserError(
            f"{key}: the labels of the Dataset are of type {labels.dtype}, but a label is the number of a "
            "class, a whole number that counts from 0: return int(label) where they are whole, or take "
            "task=regression where they are measured."
        )
    lowest, highest = map(int, torch.aminmax(labels.long()))  # still on the CPU: nothing is waited for
    if lowest < 0:
        raise UserError(f"{key}: the Dataset has a label {lowest}, but labels count from 0.")
    if classes is not None and highest >= classes:
        raise UserError(f"{key}: the Dataset {too_high(highest, classes)}")
    return Examples(images, labels)


def too_high(label: int, classes: int) -> str:
    """What is wrong with a label that is none of so many classes."""
    return (
        f"has a label {label}, but data.classes={classes} and labels count from 0: give data.classes and "
        "model.classes as the data has them."
    )
