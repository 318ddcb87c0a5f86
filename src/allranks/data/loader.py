"""The data of a run: opened on rank 0 or on every rank, checked, and split into three parts.

Arrays are read by rank 0 alone, and sent to the other ranks. A user's own Dataset is made on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from allranks.base.errors import UserError
from allranks.data.early import make
from allranks.data.parts import InMemory, Mapped, Part, too_high
from allranks.runtime.runtime import Runtime

FETCH_S = 1800  # rank 0 may have to download the data, while the other ranks wait


@dataclass(frozen=True)
class Data:
    """The examples that a run trains on, those that it watches, and those that it is tested on at last."""

    train: Part
    val: Part
    test: Part
    input_shape: tuple[int, ...]  # of an image, as data.input_shape says: [C, H, W]
    classes: int | None  # as data.classes says; None where it does not


@dataclass(frozen=True)
class _Arrays:
    """A set of examples in memory, on the device."""

    images: torch.Tensor  # uint8 [N, C, H, W]
    labels: torch.Tensor  # uint8 [N]

    def __len__(self) -> int:
        return len(self.labels)


def open_data(
    section: Mapping[str, Any],
    runtime: Runtime,
    seed: int,
    dtype: torch.dtype,
    reading: Future[dict[str, Any]] | None = None,
    limit_train: int | None = None,
    repeated_batch: int | None = None,
) -> Data:
    """The three parts of the data that the configuration's section `data` describes; all ranks call.

    Images will be of `dtype`. `seed` decides which of the training examples become validation examples.
    `reading` holds what rank 0 has read while torch was imported (data.early). `limit_train` and
    `repeated_batch` say which of the training examples are used (used_for_training()). Raises UserError
    where the data cannot be opened, or does not fit the section.
    """
    whole_train = _open_set("train", section, runtime, reading)
    whole_test = _open_set("test", section, runtime, reading)
    train, val = _split(whole_train, section, runtime, seed, dtype, limit_train, repeated_batch)
    return Data(
        train=train,
        val=val,
        test=_test(whole_test, section, runtime, dtype),
        input_shape=tuple(section["input_shape"]),
        classes=section.get("classes"),
    )


def open_part(
    name: str, section: Mapping[str, Any], runtime: Runtime, seed: int, dtype: torch.dtype
) -> Part:
    """One part of the data alone: "train", "val" or "test", the same examples as open_data() gives it.

    "train" are all training examples, also those that a run with trainer.limit_train leaves out. Only the
    files of this part are read. Raises UserError as open_data() does.
    """
    if name == "test":
        return _test(_open_set("test", section, runtime, None), section, runtime, dtype)
    train, val = _split(_open_set("train", section, runtime, None), section, runtime, seed, dtype)
    return {"train": train, "val": val}[name]


def _split(
    whole: Any,
    section: Mapping[str, Any],
    runtime: Runtime,
    seed: int,
    dtype: torch.dtype,
    limit_train: int | None = None,
    repeated_batch: int | None = None,
) -> tuple[Part, Part]:
    """The examples to train on and those to watch, drawn by seed from what `data.train` has made."""
    split = section["split"]
    if sum(split) != len(whole):
        raise UserError(
            f"data.split={list(split)} sums to {sum(split):,}, but there are {len(whole):,} training "
            f"examples: give two numbers that sum to {len(whole):,}.",
            said_by=0,
        )
    order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(seed))
    used = used_for_training(order[: split[0]], limit_train, repeated_batch)
    train = _part("data.train", whole, used, section, runtime, dtype)
    val = _part("data.train", whole, order[split[0] :], section, runtime, dtype)
    return train, val


def _test(whole: Any, section: Mapping[str, Any], runtime: Runtime, dtype: torch.dtype) -> Part:
    """All examples that `data.test` has made."""
    return _part("data.test", whole, torch.arange(len(whole)), section, runtime, dtype)


def used_for_training(
    indices: torch.Tensor, limit: int | None = None, repeated_batch: int | None = None
) -> torch.Tensor:
    """Those of the training examples that are trained on; `indices` are all of them, in the split's order.

    With a `limit` these are the first so many: the same on any number of ranks, and for any batch size.
    With `repeated_batch` they are the first so many of these, repeated to whole batches, as many as there
    would have been: in this order each batch of that size is the same one. Raises UserError where there are
    fewer than the limit.
    """
    if limit is not None and limit > len(indices):
        raise UserError(
            f"trainer.limit_train={limit} is more than the {len(indices):,} training examples of "
            "data.split: give at most so many, or leave it out.",
            said_by=0,
        )
    used = indices[:limit]
    if repeated_batch is None:
        return used
    return used[:repeated_batch].repeat(max(1, len(used) // repeated_batch))


def _part(
    key: str,
    whole: Any,
    indices: torch.Tensor,
    section: Mapping[str, Any],
    runtime: Runtime,
    dtype: torch.dtype,
) -> Part:
    if isinstance(whole, _Arrays):
        return InMemory(whole.images, whole.labels, indices.to(runtime.device), dtype)
    workers, classes = section.get("workers", 0), section.get("classes")
    return Mapped(whole, indices.tolist(), workers, runtime.device, dtype, key, classes)


def _open_set(
    part: str, section: Mapping[str, Any], runtime: Runtime, reading: Future[dict[str, Any]] | None
) -> Any:
    """What the section's `part` ("train" or "test") makes, on every rank: _Arrays or a user's Dataset."""
    made: Any = None  # on rank 0

    def describe() -> dict[str, Any]:
        nonlocal made
        made = reading.result()[part] if reading else make(section, part)
        if _is_arrays(made):
            shape = _image_shape(f"data.{part}", made, section["input_shape"])
            _check_labels(f"data.{part}", made[1], section.get("classes"))
            return {"shape": shape}
        if not (hasattr(made, "__len__") and hasattr(made, "__getitem__")):
            raise UserError(
                f"data.{part} made a {type(made).__name__}: it must be a map-style Dataset, with a length "
                "and items (image, label)."
            )
        return {"shape": None}

    limit_s = max(FETCH_S, runtime.progress.limits.start_s)
    with runtime.progress.phase("fetching the data (watchdog.start_s allows more)", limit_s):
        # 1. Rank 0 makes the set, and tells the others which kind it is.
        shape = runtime.meeting.from_rank_0(describe)["shape"]

        # 2. A user's Dataset is made by the other ranks, too.
        if shape is None:
            problem = None
            dataset = made
            if not runtime.is_main:
                try:
                    dataset = make(section, part)
                except UserError as error:
                    problem = error
            runtime.meeting.agree(problem)
            return dataset

    # 3. Arrays are sent by rank 0.
    if runtime.is_main:
        images, labels = (torch.from_numpy(np.array(array)) for array in made)  # copies that can be written
        images = images.view(shape)
    else:
        images = torch.empty(shape, dtype=torch.uint8)
        labels = torch.empty(shape[0], dtype=torch.uint8)
    images = runtime.broadcast(images.to(runtime.device))
    labels = runtime.broadcast(labels.to(runtime.device))
    return _Arrays(images, labels)


def _is_arrays(made: Any) -> bool:
    return isinstance(made, tuple) and all(isinstance(array, np.ndarray) for array in made)


def _check_labels(key: str, labels: np.ndarray, classes: int | None) -> None:
    """Raises UserError where labels are none of so many classes. On a GPU nobody would be told which."""
    highest = int(labels.max(initial=0))
    if classes is not None and highest >= classes:
        raise UserError(f"{key} {too_high(highest, classes)}")


def _image_shape(key: str, arrays: Sequence[np.ndarray], input_shape: Sequence[int]) -> list[int]:
    """[N, *input_shape] of (images, labels); raises UserError where they do not fit together."""
    if len(arrays) != 2:
        raise UserError(f"{key} gives {len(arrays)} arrays: two are expected, images and labels.")
    images, labels = arrays
    if len(images) != len(labels):
        raise UserError(
            f"{key} has {len(images):,} images but {len(labels):,} labels: they must be equal in number."
        )
    if images.dtype != np.uint8 or labels.dtype != np.uint8:
        raise UserError(
            f"{key} gives {images.dtype} images and {labels.dtype} labels: arrays of uint8 are expected. "
            "Other types go through a Dataset."
        )
    if labels.ndim != 1:
        raise UserError(
            f"{key} gives labels of shape {list(labels.shape)}: one number an image is expected."
        )
    # The one channel of a grey image may be left out, as in the files of MNIST.
    wanted = list(input_shape)
    without_channel = wanted[1:] if wanted[0] == 1 and len(wanted) == 3 else wanted
    shape = list(images.shape[1:])
    if shape not in (wanted, without_channel):
        raise UserError(f"{key} gives images of shape {shape}, but data.input_shape={wanted}.")
    return [len(images), *wanted]
