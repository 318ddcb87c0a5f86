"""How the examples reach the ranks: split once, dealt out by a sampler, in batches on the device.

The batch is global. In every epoch all examples are put in one order, and the one at position p
belongs to rank p % world_size and to step p // batch_size. So step k sees the same examples at any
world size; the shares of it differ by one example at most, and a share may be empty. As a rule a rank
takes one share of each batch; where a run is to give the same bits on any number of ranks, the number of
shares is fixed instead, and a rank takes several (Runtime.shares).
"""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler

from allranks.base import processes
from allranks.base.errors import UserError
from allranks.data.early import make
from allranks.data.randomness import mixed, reseed
from allranks.runtime.runtime import Runtime

FETCH_S = 1800  # rank 0 may have to download
EVAL_BATCH = {"cpu": 512, "cuda": 8192, "xpu": 8192, "mps": 2048}  # examples per forward pass


@dataclass(frozen=True)
class Batch:
    """A share of one global batch, on the device.

    images [n, C, H, W] scaled to 0..1 (or what a user's Dataset gives), labels int64 [n].
    `count` of them count; it is 0 for an empty share, which carries one example as a stand-in so
    that the rank still joins every collective. `total` is the number over all ranks.
    """

    images: torch.Tensor
    labels: torch.Tensor
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

        def first_at(position: int) -> int:  # the first of this rank's examples at or after it
            return -((self.rank - min(position, len(self.dataset))) // self.num_replicas)  # type: ignore[arg-type]

        return slice(first_at(step * batch_size), first_at((step + 1) * batch_size))


class InMemory:
    """Examples held on the device as uint8: a batch is one gather and one conversion."""

    def __init__(
        self, images: torch.Tensor, labels: torch.Tensor, indices: torch.Tensor, dtype: torch.dtype
    ) -> None:
        self.images, self.labels = images, labels  # uint8 [N, C, H, W] and [N], all of the set
        self.indices = indices  # int64 [n]: which of them belong to this part
        self.dtype = dtype

    def __len__(self) -> int:
        return len(self.indices)

    def batches(
        self, shares: Sequence[Sequence[int] | torch.Tensor], seed: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """(images, labels) for each share, a sequence of positions in this part."""
        for share in shares:
            positions = torch.as_tensor(share, device=self.indices.device)
            rows = self.indices.index_select(
                0, positions
            )  # whole rows: on a CPU images[rows] is 18 times slower
            images, labels = self.images.index_select(0, rows), self.labels.index_select(0, rows)
            yield images.to(self.dtype).div_(255), labels.long()


class Mapped:
    """A user's own map-style Dataset of (image, label), read by a standard DataLoader."""

    def __init__(
        self, dataset: Dataset[Any], indices: Sequence[int], workers: int, device: torch.device,
        dtype: torch.dtype,
    ) -> None:  # fmt: skip
        self.dataset, self.indices = dataset, indices
        self.workers, self.device, self.dtype = workers, device, dtype

    def __len__(self) -> int:
        return len(self.indices)

    def batches(
        self, shares: Sequence[Sequence[int] | torch.Tensor], seed: int
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        loader = DataLoader(
            _Seeded(self.dataset, self.indices, seed),
            batch_sampler=[[int(i) for i in share] for share in shares],
            num_workers=self.workers,
            pin_memory=self.device.type == "cuda",
            worker_init_fn=_end_with_its_rank,
        )
        # schedulers send them to all processes of a job: a rank saves first, and needs its batches for that
        with processes.blocked(processes.STOPPING):
            batches = iter(loader)
        for images, labels in batches:
            moved = images.to(self.device, non_blocking=True).to(self.dtype)
            scale = 255 if images.dtype == torch.uint8 else 1
            yield moved / scale, labels.to(self.device, non_blocking=True).long()


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
    processes.die_with_parent(os.getppid(), signal.SIGKILL)


@atexit.register
def _end_workers() -> None:
    # multiprocessing would send them SIGTERM, and wait
    for child in multiprocessing.active_children():
        if child.daemon:
            child.kill()


Part = InMemory | Mapped


@dataclass(frozen=True)
class Data:
    train: Part
    val: Part
    test: Part


def training_batches(
    part: Part, runtime: Runtime, batch_size: int, epoch: int, seed: int, first_step: int = 0
) -> Iterator[list[Batch]]:
    """This rank's shares of each of the epoch's batches, from step `first_step` on; `epoch` from 0."""
    samplers, orders = [], []
    for share in runtime.shares:
        sampler = ShareSampler(range(len(part)), runtime.share_count, share, seed=seed)  # type: ignore[arg-type]
        sampler.set_epoch(epoch)
        samplers.append(sampler)
        orders.append(torch.tensor(list(sampler), dtype=torch.int64))
    steps = range(first_step, steps_per_epoch(len(part), batch_size))
    rows = [
        order[sampler.share(step, batch_size)]
        for step in steps
        for sampler, order in zip(samplers, orders, strict=True)
    ]
    counts = [len(row) for row in rows]
    stand_in = orders[0][:1] if len(orders[0]) else torch.zeros(1, dtype=torch.int64)
    filled = [row if count else stand_in for row, count in zip(rows, counts, strict=True)]
    made = zip(counts, part.batches(filled, mixed(seed, epoch)), strict=True)
    for step in steps:
        total = min(batch_size, len(part) - step * batch_size)
        yield [Batch(*pair, count, total) for count, pair in islice(made, len(samplers))]
    assert next(made, None) is None


def evaluation_batches(
    part: Part, runtime: Runtime, seed: int
) -> Iterator[tuple[int, tuple[torch.Tensor, torch.Tensor]]]:
    """(row, (images, labels)): this rank's examples of the part, each exactly once over all ranks.

    `row` counts this rank's shares from 0.
    """
    for row, share in enumerate(runtime.shares):
        mine = torch.arange(min(share, len(part)), len(part), runtime.share_count)
        pieces = mine.split(EVAL_BATCH[runtime.device.type]) if len(mine) else []
        for batch in part.batches(pieces, seed):
            yield row, batch


def steps_per_epoch(examples: int, batch_size: int) -> int:
    return -(-examples // batch_size)


def open_data(
    section: Mapping[str, Any],
    runtime: Runtime,
    seed: int,
    dtype: torch.dtype,
    reading: Future[dict[str, Any]] | None = None,
) -> Data:
    """The three parts, with images of `dtype`; `reading` holds what was read early.

    Arrays are read by rank 0 alone and broadcast; a user's own Dataset is made on every rank.
    """
    train = _open_set("train", section, runtime, reading)
    test = _open_set("test", section, runtime, reading)
    split = section["split"]
    if sum(split) != len(train):
        raise UserError(
            f"data.split={list(split)} sums to {sum(split):,}, but there are {len(train):,} training "
            f"examples: give two numbers that sum to {len(train):,}.",
            said_by=0,
        )
    order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
    return Data(
        _part(train, order[: split[0]], section, runtime, dtype),
        _part(train, order[split[0] :], section, runtime, dtype),
        _part(test, torch.arange(len(test)), section, runtime, dtype),
    )


@dataclass(frozen=True)
class _Arrays:
    images: torch.Tensor  # uint8 [N, C, H, W], on the device
    labels: torch.Tensor  # uint8 [N]

    def __len__(self) -> int:
        return len(self.labels)


def _part(
    whole: Any,
    indices: torch.Tensor,
    section: Mapping[str, Any],
    runtime: Runtime,
    dtype: torch.dtype,
) -> Part:
    if isinstance(whole, _Arrays):
        return InMemory(whole.images, whole.labels, indices.to(runtime.device), dtype)
    return Mapped(whole, indices.tolist(), section.get("workers", 0), runtime.device, dtype)


def _open_set(
    part: str, section: Mapping[str, Any], runtime: Runtime, reading: Future[dict[str, Any]] | None
) -> Any:
    made: list[Any] = []
    key = f"data.{part}"

    def describe() -> dict[str, Any]:
        made.append(reading.result()[part] if reading else make(section, part))
        if isinstance(made[0], tuple) and all(isinstance(a, np.ndarray) for a in made[0]):
            return {"shape": _image_shape(key, made[0], section["input_shape"])}
        if not (hasattr(made[0], "__len__") and hasattr(made[0], "__getitem__")):
            raise UserError(
                f"{key} made a {type(made[0]).__name__}: it must be a map-style Dataset, with a length and "
                "items (image, label)."
            )
        return {"shape": None}

    with runtime.watchdog.phase("fetching the data", FETCH_S):
        shape = runtime.meeting.from_rank_0(describe, FETCH_S)["shape"]
        if shape is None:
            problem = None
            try:
                dataset = made[0] if made else make(section, part)
            except UserError as error:
                problem = error
            runtime.meeting.agree(problem, FETCH_S)
            return dataset
    if runtime.is_main:
        images, labels = (torch.from_numpy(np.array(array)) for array in made[0])  # writable copies
        images = images.view(shape)
    else:
        images = torch.empty(shape, dtype=torch.uint8)
        labels = torch.empty(shape[0], dtype=torch.uint8)
    images, labels = images.to(runtime.device), labels.to(runtime.device)
    return _Arrays(runtime.broadcast(images), runtime.broadcast(labels))


def _image_shape(key: str, arrays: Sequence[np.ndarray], input_shape: Sequence[int]) -> list[int]:
    """[N, C, H, W] of (images, labels); raises UserError where they do not fit together."""
    images, labels = arrays
    if len(images) != len(labels):
        raise UserError(
            f"{key} has {len(images):,} images but {len(labels):,} labels: they must be equal in number."
        )
    if images.dtype != np.uint8 or labels.dtype != np.uint8:
        raise UserError(f"{key} gives {images.dtype} images and {labels.dtype} labels: uint8 is expected.")
    if images[:1].size != np.prod(input_shape):
        raise UserError(
            f"{key} gives images of shape {images.shape[1:]}, but data.input_shape={list(input_shape)}."
        )
    return [len(images), *input_shape]
