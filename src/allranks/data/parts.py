"""One part of the data (training, validation or test) as batches on the device, from memory or a Dataset.

Both kinds of part have a length and a method `batches`, which the rest of allranks uses alike.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from allranks.base.errors import UserError
from allranks.base.text import some
from allranks.data.randomness import mixed, reseed
from allranks.data.workers import Workers


class Examples(NamedTuple):
    """Some examples on the device."""

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


class Mapped:
    """A user's own map-style Dataset of (image, label), read by a standard DataLoader.

    indices: which examples of the Dataset belong to this part; workers: processes that read for this rank;
    key: where the Dataset stands in the configuration, for messages; classes: how many classes there are,
    None where nobody says it.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        indices: Sequence[int],
        workers: int,
        device: torch.device,
        dtype: torch.dtype,
        key: str,
        classes: int | None = None,
    ) -> None:
        self.dataset = dataset
        self.indices = indices
        self.workers = Workers(workers)
        self.device = device
        self.dtype = dtype
        self.key = key
        self.classes = classes

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, shares: Sequence[Sequence[int] | torch.Tensor], seed: int) -> Iterator[Examples]:
        """The examples of each share in turn. A share is a sequence of positions in this part.

        `seed` decides what the Dataset's own random transforms draw. Raises UserError where the Dataset
        gives something else than (image, label).
        """
        yield from self._read(shares, seed, self.workers.count)

    def first(self, count: int, seed: int) -> Examples:
        """The first `count` examples of the part.

        Where workers are to read the Dataset, one reads these as well. A Dataset may open a file when it is
        first asked for an example, and such a file must not be shared between this process and its workers.
        """
        with self.explained():
            [examples] = self._read([range(count)], seed, min(self.workers.count, 1))
        return examples

    def explained(self) -> AbstractContextManager[None]:
        """A block for all that runs while this part is read: it says what ended a worker process."""
        return self.workers.explained()

    def _read(
        self, shares: Sequence[Sequence[int] | torch.Tensor], seed: int, workers: int
    ) -> Iterator[Examples]:
        loader = DataLoader(
            _Seeded(self.dataset, self.indices, seed),
            batch_sampler=[[int(position) for position in share] for share in shares],
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=self.workers.begin() if workers else None,
        )
        with self.workers.starting():
            batches = iter(loader)
        self.workers.started = getattr(batches, "_workers", ())
        for batch in batches:
            yield self._on_device(batch)

    def _on_device(self, batch: Any) -> Examples:
        """What the DataLoader gives, checked, as the model takes it.

        Images of type uint8 become numbers of 0..1, floating-point ones get the type of the weights. All
        other types, such as the whole numbers of a text, stay as they are.
        """
        images, labels = _checked(batch, self.key, self.classes)
        images = images.to(self.device, non_blocking=True)
        if images.dtype == torch.uint8:
            images = images.to(self.dtype) / 255
        elif images.is_floating_point():
            images = images.to(self.dtype)
        return Examples(images, labels.to(self.device, non_blocking=True).long())


Part = InMemory | Mapped


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
            "class, a whole number that counts from 0: return int(label) where they are whole, or train a "
            "regression with a loop of your own."
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
