"""The data of a run: opened on rank 0 or on every rank, checked, and split into three parts.

Arrays are read by rank 0 alone, and sent to the other ranks. A user's own Dataset is made on every rank.
If the task is classification, the examples are pairs of an image and a label, which are checked here.
"""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.data import IterableDataset

from allranks.base.errors import UserError
from allranks.components import build, locate
from allranks.data import nests
from allranks.data.early import make
from allranks.data.parts import Form, InMemory, Mapped, Part, Streamed, Table, too_high
from allranks.data.randomness import reseed
from allranks.runtime.runtime import MOST_BYTES_AT_ONCE, Runtime

FETCH_S = 1800  # rank 0 may have to download the data, while the other ranks wait


@dataclass(frozen=True)
class Data:
    """The examples that a run trains on, those that it watches, and those that it is tested on at last."""

    train: Part
    val: Part
    test: Part
    # The value of data.input_shape: [C, H, W] of an image; () if it is not given.
    input_shape: tuple[int, ...]
    classes: int | None  # the value of data.classes; None if it is not given


@dataclass(frozen=True)
class Opening:
    """How the data of one run are opened, for the functions below."""

    section: Mapping[str, Any]  # `data` of the configuration
    runtime: Runtime
    seed: int  # decides which of the training examples become validation examples
    dtype: torch.dtype  # of the weights
    is_labelled: bool = True  # whether the examples are images with labels, as classification needs them
    reading: Future[dict[str, Any]] | None = None  # what rank 0 reads while torch is imported (data.early)


@dataclass(frozen=True)
class _Images:
    """Images of type uint8 and their labels in memory, on the device."""

    images: torch.Tensor  # uint8 [N, C, H, W]
    labels: torch.Tensor  # uint8 [N]

    def __len__(self) -> int:
        return len(self.labels)


@dataclass(frozen=True)
class _Arrays:
    """Arrays of any types in memory, on the device."""

    nest: Any  # of tensors [N, ...]
    count: int  # N

    def __len__(self) -> int:
        return self.count


@dataclass(frozen=True)
class _Stream:
    """A user's IterableDataset, and how many examples a pass over it gives."""

    dataset: IterableDataset[Any]
    count: int

    def __len__(self) -> int:
        return self.count


def open_data(
    section: Mapping[str, Any],
    runtime: Runtime,
    seed: int,
    dtype: torch.dtype,
    reading: Future[dict[str, Any]] | None = None,
    limit_train: int | None = None,
    repeated_batch: int | None = None,
    limit_eval: int | None = None,
    is_labelled: bool = True,
) -> Data:
    """The three parts of the data that the configuration's section `data` describes; all ranks call.

    Floating-point numbers, and the images of a classification, will be of `dtype`. `seed` decides which of
    the training examples become validation examples. `reading` holds what rank 0 has read while torch was
    imported (data.early). `limit_train` and `repeated_batch` say which of the training examples are used
    (used_for_training()), and `limit_eval` how many of the validation and of the test examples, at most.
    `is_labelled`: the examples are images with labels. Raises UserError if the
    data cannot be opened, or does not fit the section.
    """
    opening = Opening(section, runtime, seed, dtype, is_labelled, reading)
    whole_train = _open_set("train", opening)
    whole_val = _open_set("val", opening) if section.get("val") else None
    whole_test = _open_set("test", opening)
    train, val = _split(whole_train, whole_val, opening, limit_train, repeated_batch, limit_eval)
    return Data(
        train=train,
        val=val,
        test=_all_of("test", whole_test, opening, limit_eval),
        input_shape=tuple(section.get("input_shape") or ()),
        classes=section.get("classes"),
    )


def open_part(
    name: str,
    section: Mapping[str, Any],
    runtime: Runtime,
    seed: int,
    dtype: torch.dtype,
    is_labelled: bool = True,
    limit_eval: int | None = None,
) -> Part:
    """One part of the data alone: "train", "val" or "test", the same examples as open_data() gives it.

    "train" are all training examples, also those that a run with trainer.limit_train leaves out. Of "val"
    and "test" these are at most `limit_eval`. Only the files of this part are read. Raises UserError as
    open_data() does.
    """
    opening = Opening(section, runtime, seed, dtype, is_labelled)
    if name == "test" or section.get(name if name == "val" else ""):
        return _all_of(name, _open_set(name, opening), opening, limit_eval)
    whole_train = _open_set("train", opening)
    if section.get("val"):
        return _all_of("train", whole_train, opening)
    train, val = _split(whole_train, None, opening, limit_eval=limit_eval)
    return {"train": train, "val": val}[name]


def _split(
    whole: Any,
    whole_val: Any,
    opening: Opening,
    limit_train: int | None = None,
    repeated_batch: int | None = None,
    limit_eval: int | None = None,
) -> tuple[Part, Part]:
    """The examples to train on and those to watch.

    If the section has data.val, that makes those to watch. Otherwise they are drawn by seed from what
    data.train has made; of a stream they are its last examples.
    """
    if whole_val is not None:
        used = used_for_training(torch.arange(len(whole)), limit_train, repeated_batch, key="data.train")
        return _part("data.train", whole, used, opening), _all_of("val", whole_val, opening, limit_eval)
    split = opening.section["split"]
    if sum(split) != len(whole):
        raise UserError(
            f"data.split={list(split)} sums to {sum(split):,}, but there are {len(whole):,} training "
            f"examples: give two numbers that sum to {len(whole):,}.",
            said_by=0,
        )
    if isinstance(whole, _Stream):
        order = torch.arange(len(whole))
    else:
        order = torch.randperm(len(whole), generator=torch.Generator().manual_seed(opening.seed))
    used = used_for_training(order[: split[0]], limit_train, repeated_batch)
    train = _part("data.train", whole, used, opening)
    val = _part("data.train", whole, order[split[0] :][:limit_eval], opening)
    return train, val


def _all_of(name: str, whole: Any, opening: Opening, limit: int | None = None) -> Part:
    """All examples that the section's part `name` has made, or with `limit` only the first `limit` of them.

    Raises UserError if there are none: without examples nothing can be computed.
    """
    if not len(whole):
        raise UserError(f"data.{name} has no examples: give at least one.", said_by=0)
    return _part(f"data.{name}", whole, torch.arange(len(whole))[:limit], opening)


def used_for_training(
    indices: torch.Tensor,
    limit: int | None = None,
    repeated_batch: int | None = None,
    key: str = "data.split",
) -> torch.Tensor:
    """The indices of the examples that are trained on.

    `indices` are those of all training examples, in the order of the split. With `limit` only the first
    `limit` of them are used. This choice does not depend on the number of ranks or on the batch size.

    With `repeated_batch` only the first `repeated_batch` of these are used. They are repeated until there
    are as many whole batches of this size as there would have been, but at least one. If the examples are
    not shuffled, every batch of this size then holds the same examples.

    `key` is the configuration's key that says how many examples there are; messages name it. Raises
    UserError if there are fewer than `limit`.
    """
    if limit is not None and limit > len(indices):
        raise UserError(
            f"trainer.limit_train={limit} is more than the {len(indices):,} training examples of "
            f"{key}: give at most so many, or leave it out.",
            said_by=0,
        )
    used = indices[:limit]
    if repeated_batch is None:
        return used
    return used[:repeated_batch].repeat(max(1, len(used) // repeated_batch))


def _part(key: str, whole: Any, indices: torch.Tensor, opening: Opening) -> Part:
    """The examples at these indices of what the section's part `key` has made."""
    device = opening.runtime.device
    if isinstance(whole, _Images):
        return InMemory(whole.images, whole.labels, indices.to(device), opening.dtype)
    if isinstance(whole, _Arrays):
        return Table(whole.nest, indices.to(device), opening.is_labelled)
    section = opening.section
    form = Form(
        device=device,
        dtype=opening.dtype,
        key=key,
        classes=section.get("classes"),
        is_labelled=opening.is_labelled,
        collate=_collate(section),
    )
    workers = section.get("workers", 0)
    if isinstance(whole, _Stream):
        return Streamed(whole.dataset, indices.tolist(), workers, form)
    return Mapped(whole, indices.tolist(), workers, form)


def _collate(section: Mapping[str, Any]) -> Callable[[list[Any]], Any] | None:
    """What makes a batch of a list of examples, by `data.collate`; None for torch's own way.

    A function is called with the list, and with the values of its section; a class is made with these
    values, and the object called with the list.
    """
    chosen = section.get("collate")
    if chosen is None:
        return None
    target = locate("data.collate", chosen.get("_target_"))
    if isinstance(target, type):
        made: Callable[[list[Any]], Any] = build("data.collate", chosen)
        return made
    return partial(target, **{key: value for key, value in chosen.items() if key != "_target_"})


# --- making a set of examples ----------------------------------------------------------------------------


def _open_set(part: str, opening: Opening) -> Any:
    """What the section's `part` ("train", "val" or "test") makes, on every rank.

    It is _Images, _Arrays, a _Stream, or a user's map-style Dataset.
    """
    section, runtime, reading = opening.section, opening.runtime, opening.reading
    key = f"data.{part}"
    made: Any = None  # on rank 0

    def describe() -> dict[str, Any]:
        nonlocal made
        made = reading.result()[part] if reading else make(section, part)
        if is_arrays(made):
            if not opening.is_labelled:
                return {"arrays": _array_count(key, made)}
            _check_pair(key, made)
            shape = _image_shape(key, made, section["input_shape"])
            _check_labels(key, made[1], section.get("classes"))
            is_bytes = made[0].dtype == made[1].dtype == np.uint8
            return {"images": shape} if is_bytes else {"arrays": shape[0], "shape": shape}
        if isinstance(made, IterableDataset):
            return {"stream": _stream_count(made, part, section)}
        if not (hasattr(made, "__len__") and hasattr(made, "__getitem__")):
            raise UserError(
                f"{key} made {nests.described(made)}: it must be arrays of numpy, a map-style Dataset, "
                "with a length and items, or an IterableDataset."
            )
        return {"length": len(made)}

    limit_s = max(FETCH_S, runtime.progress.limits.start_s)
    with runtime.progress.phase("fetching the data (watchdog.start_s allows more)", limit_s):
        # 1. Rank 0 makes the set, and tells the others which kind it is.
        kind = runtime.meeting.from_rank_0(describe)

        # 2. A user's Dataset is made by the other ranks, too.
        if "images" not in kind and "arrays" not in kind:
            dataset = made
            with runtime.all_or_none():
                if not runtime.is_main:
                    dataset = make(section, part)
                _check_length(key, dataset, kind.get("length"))
            return _Stream(dataset, kind["stream"]) if "stream" in kind else dataset

    # 3. Arrays are sent by rank 0.
    if "images" in kind:
        return _Images(*_sent(made, [torch.uint8] * 2, [kind["images"], kind["images"][:1]], runtime))
    return _Arrays(_sent_nest(made, kind, opening), kind["arrays"])


def _check_length(key: str, dataset: Any, length: int | None) -> None:
    """Raises UserError if this rank's Dataset has not as many examples as rank 0's; None for a stream.

    The ranks would take different numbers of steps, and wait for each other for ever.
    """
    if length is not None and len(dataset) != length:
        raise UserError(
            f"{key} has {len(dataset):,} examples here, but {length:,} on rank 0: every rank needs the "
            "same ones. Look whether this host has an incomplete or an older copy of the data."
        )


def is_arrays(made: Any) -> bool:
    """Whether this is an array of numpy, or a tuple or dict of nothing but such arrays.

    A list is not: it may be a map-style Dataset, a list of examples.
    """
    if not isinstance(made, np.ndarray | tuple | dict) or not len(made):
        return False
    return all(isinstance(each, np.ndarray) for each in nests.leaves(made))


def _array_count(key: str, made: Any) -> int:
    """The number of examples in arrays that must all have the same; raises UserError."""
    lengths = {len(array) if array.ndim else None for array in nests.leaves(made)}
    if len(lengths) != 1 or None in lengths:
        raise UserError(
            f"{key} gives {nests.described(made)}: each array must have one entry for each example, and so "
            "all the same length."
        )
    for array in nests.leaves(made):
        nests.as_tensor(key, array[:0])
    [count] = lengths
    assert count is not None
    return count


def _stream_count(dataset: IterableDataset[Any], part: str, section: Mapping[str, Any]) -> int:
    """How many examples a pass over the stream gives: by data.split, by its length, or counted."""
    if part == "train" and not section.get("val"):
        if "split" not in section:
            raise UserError(
                "data.train is an IterableDataset: give data.split, of which the first number is how many "
                "of its examples are trained on and the second how many of those after them are for "
                "validation, or give data.val."
            )
        return int(sum(section["split"]))
    # A stream may have the method, and yet not know: torch's ChainDataset asks each of its streams.
    with suppress(TypeError, NotImplementedError, AssertionError):
        return len(dataset)  # type: ignore[arg-type]
    reseed(0)
    return sum(1 for _ in dataset)


def _sent(
    arrays: Sequence[np.ndarray] | None, types: Sequence[torch.dtype], shapes: Any, runtime: Runtime
) -> list[torch.Tensor]:
    """Rank 0's arrays on the device of every rank; the others know their types and shapes alone."""
    sent = []
    for number, (dtype, shape) in enumerate(zip(types, shapes, strict=True)):
        if arrays is not None:
            tensor = nests.as_tensor("data", arrays[number]).view(shape)
        else:
            tensor = torch.empty(shape, dtype=dtype)
        sent.append(_broadcast(tensor.to(runtime.device), runtime))
    return sent


def _broadcast(tensor: torch.Tensor, runtime: Runtime) -> torch.Tensor:
    """Rank 0's tensor on every rank, in place: as bytes, because MPI does not know all of torch's types."""
    if tensor.numel():
        for piece in nests.as_bytes(tensor).split(MOST_BYTES_AT_ONCE):
            runtime.broadcast(piece)
    return tensor


def _sent_nest(made: Any, kind: Mapping[str, Any], opening: Opening) -> Any:
    """Rank 0's nest of arrays as tensors on every rank's device; floating-point ones get the run's type."""
    runtime = opening.runtime
    leaves = list(nests.leaves(made)) if runtime.is_main else None

    def outline() -> dict[str, Any]:
        assert leaves is not None
        numbered = iter(range(len(leaves)))
        shapes = [list(array.shape) for array in leaves]
        if "shape" in kind:  # the one channel of a grey image may be left out
            shapes[0] = kind["shape"]
        return {
            "nest": _outline(made, numbered),
            "types": [
                str(nests.as_tensor("data", array[:0]).dtype).removeprefix("torch.") for array in leaves
            ],
            "shapes": shapes,
        }

    told = runtime.meeting.from_rank_0(outline)
    types = [getattr(torch, name) for name in told["types"]]
    tensors = _sent(leaves, types, told["shapes"], runtime)
    tensors = [tensor.to(opening.dtype) if tensor.is_floating_point() else tensor for tensor in tensors]
    if opening.is_labelled and tensors[0].dtype == torch.uint8:
        tensors[0] = tensors[0].to(opening.dtype) / 255
    return _filled(told["nest"], tensors)


def _outline(nest: Any, numbered: Any) -> Any:
    """JSON for a nest of arrays, with the number of each array in its place."""
    if isinstance(nest, dict):
        # As pairs: JSON would turn keys that are numbers into texts.
        return {"dict": [[_plain_key(key), _outline(value, numbered)] for key, value in nest.items()]}
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):  # a NamedTuple
        parts = [_outline(each, numbered) for each in nest]
        return {"named": [type(nest).__name__, list(nest._fields), parts]}
    if isinstance(nest, list | tuple):
        return {"list" if isinstance(nest, list) else "tuple": [_outline(each, numbered) for each in nest]}
    return next(numbered)


def _plain_key(key: Any) -> Any:
    """The key of a dict of arrays as JSON holds it: a number or True as itself, and all else as a text."""
    if isinstance(key, np.generic):
        key = key.item()
    return key if isinstance(key, bool | int | float) else str(key)


def _filled(outline: Any, tensors: Sequence[torch.Tensor]) -> Any:
    """The nest of which _outline() has made JSON, with the tensors in their places.

    In place of a NamedTuple it has one of the same names: only rank 0 knows the class that the data have.
    """
    if isinstance(outline, int):
        return tensors[outline]
    [(kind, values)] = outline.items()
    if kind == "dict":
        return {key: _filled(value, tensors) for key, value in values}
    if kind == "named":
        name, fields, parts = values
        return namedtuple(name, fields)(*(_filled(each, tensors) for each in parts))
    filled = [_filled(value, tensors) for value in values]
    return filled if kind == "list" else tuple(filled)


# --- checks of images with labels ----------------------------------------------------------------------


def _check_pair(key: str, made: Any) -> None:
    """Raises UserError unless these are two arrays, of images and of labels that are whole numbers."""
    if not isinstance(made, list | tuple) or any(not isinstance(each, np.ndarray) for each in made):
        raise UserError(
            f"{key} gives {nests.described(made)}: a tuple of two arrays is expected, images and labels. "
            "For other examples take another task, such as task=regression."
        )
    if len(made) != 2:
        raise UserError(f"{key} gives {len(made)} arrays: two are expected, images and labels.")
    images, labels = made
    if not images.ndim or not labels.ndim:
        raise UserError(
            f"{key} gives {nests.described(made)}: each array must have one entry for each example."
        )
    if len(images) != len(labels):
        raise UserError(
            f"{key} has {len(images):,} images but {len(labels):,} labels: they must be equal in number."
        )
    if labels.ndim != 1:
        raise UserError(
            f"{key} gives labels of shape {list(labels.shape)}: one number an image is expected."
        )
    if labels.dtype.kind not in "iu":
        raise UserError(
            f"{key} gives labels of type {labels.dtype}, but a label is the number of a class, a whole "
            "number that counts from 0: take task=regression where they are measured."
        )
    for array in made:
        nests.as_tensor(key, array[:0])


def _check_labels(key: str, labels: np.ndarray, classes: int | None) -> None:
    """Raises UserError if labels are none of so many classes. On a GPU nobody would be told which."""
    lowest, highest = int(labels.min(initial=0)), int(labels.max(initial=0))
    if lowest < 0:
        raise UserError(f"{key} has a label {lowest}, but labels count from 0.")
    if classes is not None and highest >= classes:
        raise UserError(f"{key} {too_high(highest, classes)}")


def _image_shape(key: str, arrays: Sequence[np.ndarray], input_shape: Sequence[int]) -> list[int]:
    """[N, *input_shape] of (images, labels); raises UserError where the images have another shape."""
    images = arrays[0]
    # The one channel of a grey image may be left out, as in the files of MNIST.
    wanted = list(input_shape)
    without_channel = wanted[1:] if wanted[0] == 1 and len(wanted) == 3 else wanted
    shape = list(images.shape[1:])
    if shape not in (wanted, without_channel):
        raise UserError(f"{key} gives images of shape {shape}, but data.input_shape={wanted}.")
    return [len(images), *wanted]
