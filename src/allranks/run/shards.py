"""The files of a checkpoint whose tensors are spread over several files, one for each rank. No torch.

If a model is spread over the ranks, each rank writes what it holds:

    model-00000-of-00004.safetensors       the rows of each weight that rank 0 holds, and so on
    optimizer-00000-of-00004.safetensors   the same for the optimizer's state
    shards.json                            of each tensor: its type, its shape, and how many rows a file has
    state.json, manifest.json              as in every checkpoint

Rows are counted along a tensor's first dimension. With 10 rows, 4 files and 3 rows a file, the files have
rows 0-2, 3-5, 6-8 and 9. A tensor that is not spread stands whole in the first file. A file leaves out a
tensor of which it would have no row.

A safetensors file is a number of 8 bytes, a JSON text of that length, and the numbers of the tensors. The
text says of each tensor its type, its shape and where its numbers stand.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

from allranks.run.checkpoint import Damaged, from_json

INDEX = "shards.json"
MODEL = "model"
OPTIMIZER = "optimizer"
PARTS = (MODEL, OPTIMIZER)  # each has one file for each rank
MOST_RANKS = 100_000  # the files' names have room for so many ranks; no machine has more devices
_LENGTH_BYTES = 8  # the length of the number at the beginning of a safetensors file
_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4,
    "U16": 2, "U8": 1, "BOOL": 1, "C64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


@dataclass(frozen=True)
class Spread:
    """A tensor, and how its rows are spread over the files."""

    dtype: str  # as safetensors spells it: F32, BF16, ...
    shape: tuple[int, ...]
    # How many rows each file but the last ones has; None: the whole tensor is in the first file.
    rows: int | None


class Rows(NamedTuple):
    """The rows of a tensor that are in one file."""

    file: str
    start: int
    end: int


@dataclass(frozen=True)
class Index:
    """What shards.json holds."""

    ranks: int
    tensors: Mapping[str, Mapping[str, Spread]]  # by part, then by name

    def to_bytes(self) -> bytes:
        """The content of shards.json."""
        tensors = {
            part: {
                name: {"dtype": each.dtype, "shape": list(each.shape), "rows": each.rows}
                for name, each in of_part.items()
            }
            for part, of_part in self.tensors.items()
        }
        text = json.dumps({"format": 1, "ranks": self.ranks, "tensors": tensors}, separators=(",", ":"))
        return text.encode()

    @classmethod
    def from_bytes(cls, content: bytes) -> Index:
        """The Index in the content of shards.json; raises Damaged where it is not one."""
        values = from_json(INDEX, content)
        try:
            if values["format"] != 1:
                raise ValueError("its format is not known to this version")
            tensors = {
                part: {
                    name: Spread(str(each["dtype"]), tuple(map(int, each["shape"])), _rows(each["rows"]))
                    for name, each in values["tensors"][part].items()
                }
                for part in PARTS
            }
            index = cls(int(values["ranks"]), tensors)
            index._check()
            return index
        except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as error:
            raise Damaged(f"{INDEX}: it is not as it was written ({error})") from error

    def _check(self) -> None:
        """Raises ValueError if the numbers cannot be those of a checkpoint: they may say anything."""
        if not 0 < self.ranks <= MOST_RANKS:
            raise ValueError(f"it is of {self.ranks} ranks")
        for of_part in self.tensors.values():
            for name, each in of_part.items():
                is_possible = each.dtype in _BYTES and all(size >= 0 for size in each.shape)
                if each.rows is not None:
                    is_possible &= bool(each.shape) and each.rows * self.ranks >= each.shape[0]
                if not is_possible:
                    raise ValueError(f"{ascii(name)[:80]} has an impossible type, shape or number of rows")

    def parts_of(self, part: str, name: str) -> list[Rows]:
        """Where the rows of a tensor are, in their order."""
        spread = self.tensors[part][name]
        if spread.rows is None:
            return [Rows(file_name(part, 0, self.ranks), 0, spread.shape[0] if spread.shape else 1)]
        found = []
        for rank in range(self.ranks):
            start = rank * spread.rows
            end = min(start + spread.rows, spread.shape[0])
            if start < end:
                found.append(Rows(file_name(part, rank, self.ranks), start, end))
        return found


def _rows(value: Any) -> int | None:
    return None if value is None else int(value)


def file_name(part: str, rank: int, ranks: int) -> str:
    """The file with what this rank holds."""
    return f"{part}-{rank:05d}-of-{ranks:05d}.safetensors"


def header(tensors: Sequence[tuple[str, str, Sequence[int]]]) -> bytes:
    """The beginning of a safetensors file with these tensors, each a name, a type and a shape.

    The numbers of the tensors follow it in this order.
    """
    about: dict[str, Any] = {}
    at = 0
    for name, dtype, shape in tensors:
        size = _BYTES[dtype] * prod(shape)
        about[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(about, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # so that the numbers stand at an address that is a multiple of 8
    return len(text).to_bytes(_LENGTH_BYTES, "little") + text


def assembled(files: Mapping[str, bytes]) -> Mapping[str, bytes]:
    """The files of a checkpoint that was saved in one piece, from those of one in shards.

    Files that are in one piece are returned as they are. Raises Damaged if the shards do not go
    together.
    """
    if INDEX not in files:
        return files
    index = Index.from_bytes(files[INDEX])
    of_tensors = [name for name in files if name.endswith(".safetensors")]
    shards = {name: _Shard(name, files[name]) for name in of_tensors}
    whole = {name: content for name, content in files.items() if name not in shards and name != INDEX}
    for part, tensors in index.tensors.items():
        pieces: list[bytes | memoryview] = [
            header([(name, each.dtype, each.shape) for name, each in tensors.items()])
        ]
        for name, each in tensors.items():
            of_tensor = [_piece(shards, place, name) for place in index.parts_of(part, name)]
            if sum(map(len, of_tensor)) != _BYTES[each.dtype] * prod(each.shape):
                raise Damaged(f"{INDEX}: the rows of {name!a} are not all there")
            pieces += of_tensor
        whole[f"{part}.safetensors"] = b"".join(pieces)
    return whole


def _piece(shards: Mapping[str, _Shard], place: Rows, name: str) -> memoryview:
    if place.file not in shards:
        raise Damaged(f"{place.file}: it is missing")
    return shards[place.file].numbers(name)


class _Shard:
    """One safetensors file in memory."""

    def __init__(self, name: str, content: bytes) -> None:
        self.name = name
        length = int.from_bytes(content[:_LENGTH_BYTES], "little")
        self._about = from_json(name, content[_LENGTH_BYTES : _LENGTH_BYTES + length])
        self._numbers = memoryview(content)[_LENGTH_BYTES + length :]

    def numbers(self, tensor: str) -> memoryview:
        """The bytes of a tensor; raises Damaged where it is not there."""
        try:
            start, end = self._about[tensor]["data_offsets"]
            return self._numbers[start:end]
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged(f"{self.name}: it has no {ascii(tensor)[:80]}") from error
