"""One part of the data (training, validation or test) as batches on the device, from memory or a Dataset.

Both kinds of part have a length and a method `batches`, which the rest of allranks uses alike.
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from allranks.base import processes
from allranks.data.randomness import mixed, reseed


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
        for share in shares:
            positions = torch.as_tensor(share, device=self.indices.device)
            rows = self.indices.index_select(0, positions)
            # index_select takes whole rows: on a CPU images[rows] is 18 times slower.
            images = self.images.index_select(0, rows)
            labels = self.labels.index_select(0, rows)
            yield Examples(images.to(self.dtype).div_(255), labels.long())


class Mapped:
    """A user's own map-style Dataset of (image, label), read by a standard DataLoader.

    indices: which examples of the Dataset belong to this part; workers: processes that read for this rank.
    """

    def __init__(
        self,
        dataset: Dataset[Any],
        indices: Sequence[int],
        workers: int,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.dataset = dataset
        self.indices = indices
        self.workers = workers
        self.device = device
        self.dtype = dtype

    def __len__(self) -> int:
        return len(self.indices)

    def batches(self, shares: Sequence[Sequence[int] | torch.Tensor], seed: int) -> Iterator[Examples]:
        """The examples of each share in turn. A share is a sequence of positions in this part.

        `seed` decides what the Dataset's own random transforms draw.
        """
        loader = DataLoader(
            _Seeded(self.dataset, self.indices, seed),
            batch_sampler=[[int(position) for position in share] for share in shares],
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_end_with_its_rank,
        )
        # A scheduler sends its signals to all processes of a job. A rank saves first, and needs its batches
        # for that: so its workers never get these signals.
        with processes.blocked(processes.STOPPING):
            batches = iter(loader)
        for images, labels in batches:
            moved = images.to(self.device, non_blocking=True).to(self.dtype)
            scale = 255 if images.dtype == torch.uint8 else 1
            yield Examples(moved / scale, labels.to(self.device, non_blocking=True).long())


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


def _end_with_its_rank(_worker: int) -> None:
    """In a worker process: ends when its rank has ended, however that came about."""
    processes.die_with_parent(os.getppid(), signal.SIGKILL)


@atexit.register
def _end_workers() -> None:
    # multiprocessing would send them SIGTERM, which they never get, and wait.
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()
