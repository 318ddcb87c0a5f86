"""Batches of any form: a tensor, or tensors in dicts, lists, tuples, NamedTuples, dataclasses, objects.

Such a batch is called a nest here. An object that is none of these, such as a batch of graphs, is taken
whole: it needs a method `to(device)` if it holds tensors.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import UserDict
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from allranks.base.errors import UserError


def mapped(nest: Any, change: Callable[[Any], Any]) -> Any:
    """The nest with `change` applied to everything in it that is not a dict, list, tuple or dataclass."""
    if isinstance(nest, dict) or (isinstance(nest, UserDict) and not hasattr(nest, "to")):
        return like(nest, {key: mapped(value, change) for key, value in nest.items()})
    if isinstance(nest, tuple) and hasattr(nest, "_fields"):  # a NamedTuple
        return type(nest)(*(mapped(value, change) for value in nest))
    if isinstance(nest, list | tuple):
        return type(nest)(mapped(value, change) for value in nest)
    if is_dataclass(nest):
        parts = parts_of(nest)
        return dataclasses.replace(nest, **{name: mapped(part, change) for name, part in parts.items()})
    return change(nest)


def like(nest: Mapping[Any, Any], values: dict[Any, Any]) -> Mapping[Any, Any]:
    """The values as a dict, or as the same kind of UserDict as the nest, such as a tokenizer's batch."""
    if not isinstance(nest, UserDict):
        return values
    made = copy.copy(nest)
    made.data = values
    return made


def leaves(nest: Any) -> Iterator[Any]:
    """Everything in the nest that is not a dict, list, tuple or dataclass, in the order of the nest."""
    if isinstance(nest, dict | UserDict):
        nest = nest.values()
    elif is_dataclass(nest):
        nest = parts_of(nest).values()
    elif not isinstance(nest, list | tuple):
        yield nest
        return
    for value in nest:
        yield from leaves(value)


def parts_of(nest: Any) -> dict[str, Any]:
    """What an object of a dataclass was made of, by name."""
    return {field.name: getattr(nest, field.name) for field in dataclasses.fields(nest) if field.init}


def is_dataclass(nest: Any) -> bool:
    """Whether this is an object of a dataclass; one with a method `to` of its own counts as any object."""
    return dataclasses.is_dataclass(nest) and not isinstance(nest, type) and not hasattr(nest, "to")


def on_device(nest: Any, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """The nest on the device, with its floating-point tensors in `dtype`, the type of the weights.

    An object with a method `to` is moved by it, and keeps the types of its tensors. What has no such
    method, such as a text, stays as it is.
    """

    def moved(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            value = value.to(device, non_blocking=True)
            return value.to(dtype) if dtype is not None and value.is_floating_point() else value
        return value.to(device) if hasattr(value, "to") else value

    return mapped(nest, moved)


def as_tensor(key: str, array: np.ndarray) -> torch.Tensor:
    """A copy of the array as a tensor; raises UserError for a type that torch does not have.

    `key` names the array in messages.
    """
    native = array.astype(array.dtype.newbyteorder("="), copy=True)  # torch has no other order of bytes
    try:
        return torch.from_numpy(np.ascontiguousarray(native).reshape(array.shape))
    except TypeError as error:
        raise UserError(
            f"{key} has an array of type {array.dtype}, which torch does not take: give numbers of one of "
            "numpy's types."
        ) from error


def as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The memory of a contiguous tensor as a tensor of bytes."""
    # view() alone refuses a tensor of one number, which is contiguous whatever its strides say.
    flat = tensor.as_strided((tensor.numel(),), (1,), tensor.storage_offset())
    return flat.view(torch.uint8)


def described(nest: Any) -> str:
    """What a nest is, for messages: `a tuple of (float32 [2, 8], int64 [2])`."""
    kind = type(nest).__name__
    article = "an" if kind[:1].lower() in "aeiou" else "a"
    if isinstance(nest, torch.Tensor | np.ndarray):
        return _inner(nest)
    if isinstance(nest, Mapping | list | tuple) or is_dataclass(nest):
        return f"{article} {kind} {_inner(nest)}"
    return f"{article} {kind}"


_MOST_SHOWN = 6  # parts of a nest in a message


def _inner(nest: Any) -> str:
    if isinstance(nest, torch.Tensor | np.ndarray):
        return f"{str(nest.dtype).removeprefix('torch.')} {list(nest.shape)}"
    if isinstance(nest, Mapping):
        parts = [f"{key}: {_inner(value)}" for key, value in nest.items()]
    elif is_dataclass(nest):
        parts = [f"{field.name}: {_inner(getattr(nest, field.name))}" for field in dataclasses.fields(nest)]
    elif isinstance(nest, list | tuple):
        parts = [_inner(value) for value in nest]
    else:
        return type(nest).__name__
    shown = parts[:_MOST_SHOWN] + ["..."] * (len(parts) > _MOST_SHOWN)
    return f"({', '.join(shown)})"
