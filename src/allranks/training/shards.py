"""The state of a model that is spread over the ranks: to the files of each rank, and back at any size.

Each rank copies what it holds to the CPU, and writes it on a thread. When a run goes on, each rank reads
only the rows that it needs, from the files that have them. The checkpoint may be that of another number of
ranks, or one that was saved in one piece. So no rank ever holds the whole state. run/shards.py describes
the files.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from allranks.base import files
from allranks.base.errors import UserError
from allranks.run.checkpoint import About
from allranks.run.shards import INDEX, MODEL, OPTIMIZER, PARTS, Index, Rows, Spread, file_name, header
from allranks.runtime.sharding import is_sharded, like, local, slice_of

PIECE_BYTES = 1 << 24  # are written and hashed at a time: other threads get their turn in between
# safetensors' names of types.
DTYPES = {
    torch.float64: "F64", torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.int64: "I64", torch.int32: "I32", torch.int16: "I16", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL", torch.complex64: "C64",
}  # fmt: skip


@contextmanager
def reading(path: str) -> Iterator[None]:
    """Turns an OSError of the block, which reads the checkpoint at `path`, into a UserError."""
    try:
        yield
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}).") from error


class ToShards(NamedTuple):
    """What one rank has to add to a checkpoint: the tensors themselves, which the training changes."""

    tensors: Mapping[str, Mapping[str, torch.Tensor]]  # by part, then by name
    state: Mapping[str, Any]  # for state.json, which rank 0 writes


@dataclass(frozen=True)
class CapturedShards:
    """What one rank has to add to a checkpoint, copied: the training may go on while it is written."""

    rows: Mapping[str, Mapping[str, torch.Tensor]]  # by part, then by name; all on the CPU
    index: Index  # the same on all ranks
    state: Mapping[str, Any]  # for state.json, which rank 0 writes


# --- to files ------------------------------------------------------------------------------------------


Memory = Mapping[str, Mapping[str, torch.Tensor]]  # by part, then by name; for copies of a rank's rows


def memory_for(tensors: Mapping[str, Mapping[str, torch.Tensor]]) -> Memory:
    """Memory on the CPU for this rank's rows of those tensors that are spread over the ranks.

    The system gives new memory page by page, and fills each page with zeros first. That takes four times as
    long as the copy itself, so it is done before a save needs the memory.
    """
    return {
        part: {
            name: torch.empty(local(tensor).shape, dtype=tensor.dtype).fill_(0)
            for name, tensor in tensors[part].items()
            if is_sharded(tensor)
        }
        for part in PARTS
    }


def captured(given: ToShards, rank: int, ranks: int, before: Memory | None = None) -> CapturedShards:
    """A copy of this rank's rows of the tensors that are given.

    `before` is the memory of an earlier copy that nobody needs any more, or memory from memory_for(). The
    new copy is made there where shape and type fit. Raises UserError if a tensor is spread over the ranks
    in another way than by rows.
    """
    rows: dict[str, dict[str, torch.Tensor]] = {}
    index: dict[str, dict[str, Spread]] = {}
    for part in PARTS:
        rows[part] = {}
        index[part] = {}
        for name, tensor in given.tensors[part].items():
            if tensor.dtype not in DTYPES:
                raise UserError(f"{name} is a tensor of {tensor.dtype}, which no sharded checkpoint holds.")
            spread_by = None
            is_mine = rank == 0
            if is_sharded(tensor):
                _check_spread(name, tensor)
                over = tensor.device_mesh.size(tensor.device_mesh.ndim - 1)  # type: ignore[attr-defined]
                spread_by = -(-tensor.shape[0] // over)
                place = slice_of(tensor)
                is_mine = place.is_first_copy and place.start < place.end
            shape = tuple(tensor.shape)
            index[part][name] = Spread(DTYPES[tensor.dtype], shape, spread_by)
            if is_mine:
                memory = None if before is None else before[part].get(name)
                rows[part][name] = _copied(local(tensor).detach(), memory)
    return CapturedShards(rows, Index(ranks, index), given.state)


def _copied(tensor: torch.Tensor, memory: torch.Tensor | None) -> torch.Tensor:
    """A copy of the tensor on the CPU, in this memory if it fits."""
    if memory is None or memory.shape != tensor.shape or memory.dtype != tensor.dtype:
        return tensor.to("cpu", copy=True).contiguous()
    return memory.copy_(tensor)


def _check_spread(name: str, tensor: Any) -> None:
    last = tensor.placements[-1]
    if not (last.is_shard() and last.dim == 0) or any(each.is_partial() for each in tensor.placements):
        raise UserError(
            f"{name} of the optimizer's state is spread over the ranks in another way than by rows "
            f"({tensor.placements}), which a checkpoint cannot hold: take another optimizer, or "
            "sharding=none."
        )


def write(folder: str, rank: int, captured: CapturedShards) -> dict[str, About]:
    """Writes this rank's files into the folder and onto the disk; what the manifest says of them.

    Raises OSError.
    """
    about = {}
    for part in PARTS:
        name = file_name(part, rank, captured.index.ranks)
        about[name] = _write_file(Path(folder) / name, captured.rows[part])
    return about


def _write_file(path: Path, tensors: Mapping[str, torch.Tensor]) -> About:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    digest = hashlib.sha256()
    size = 0
    with os.fdopen(descriptor, "wb", buffering=0) as file:
        for piece in _pieces(tensors):
            files.write_all(file, piece)
            digest.update(piece)
            size += len(piece)
        os.fsync(descriptor)
    return About(size, digest.hexdigest())


def _pieces(tensors: Mapping[str, torch.Tensor]) -> Iterator[memoryview]:
    """The content of a safetensors file with these tensors."""
    yield memoryview(header([(name, DTYPES[each.dtype], each.shape) for name, each in tensors.items()]))
    for tensor in tensors.values():
        if tensor.numel():
            content = memoryview(tensor.view(-1).view(torch.uint8).numpy().data)
            for start in range(0, len(content), PIECE_BYTES):
                yield content[start : start + PIECE_BYTES]


# --- and back ------------------------------------------------------------------------------------------


class Source:
    """The tensors of a checkpoint's folder, of which any rows can be read alone.

    `index` is the content of its shards.json; None for a checkpoint in one piece. Raises OSError.
    """

    def __init__(self, path: str, index: bytes | None) -> None:
        self._path = Path(path)
        self._index = None if index is None else Index.from_bytes(index)
        self._open: dict[str, Any] = {}  # by the name of the file
        self._names: dict[str, frozenset[str]] = {}  # by part, once they were asked for

    @property
    def is_in_one_piece(self) -> bool:
        """Whether each part is one file, with all of its tensors."""
        return self._index is None

    def names(self, part: str) -> frozenset[str]:
        """The names of the part's tensors."""
        if part not in self._names:
            of_part = (
                self._file(f"{part}.safetensors").keys()
                if self._index is None
                else self._index.tensors[part]
            )
            self._names[part] = frozenset(of_part)
        return self._names[part]

    def shape(self, part: str, name: str) -> tuple[int, ...]:
        """The shape of the whole tensor; raises KeyError where there is none of this name."""
        if name not in self.names(part):
            raise KeyError(f"the checkpoint has no {name}")
        if self._index is None:
            return tuple(self._slice(f"{part}.safetensors", name).get_shape())
        return self._index.tensors[part][name].shape

    def rows(self, part: str, name: str, start: int, end: int) -> torch.Tensor:
        """The tensor's rows from `start` to `end`, on the CPU."""
        shape = self.shape(part, name)
        pieces = []
        for place in self._places(part, name, shape):
            low, high = max(start, place.start), min(end, place.end)
            if low < high:
                kept = self._slice(place.file, name)
                pieces.append(kept[low - place.start : high - place.start])
        if not pieces:
            places = self._places(part, name, shape)
            if not places:  # a tensor without rows is in no file
                assert self._index is not None
                spelled = self._index.tensors[part][name].dtype
                return torch.empty(shape, dtype=next(key for key in DTYPES if DTYPES[key] == spelled))
            return self._slice(places[0].file, name)[0:1][:0]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def whole(self, part: str, name: str) -> torch.Tensor:
        """The whole tensor, on the CPU."""
        shape = self.shape(part, name)
        if not shape:
            found: torch.Tensor = self._slice(self._places(part, name, shape)[0].file, name)[...]
            return found
        return self.rows(part, name, 0, shape[0])

    def spread_as(self, tensor: torch.Tensor | None, part: str, name: str) -> torch.Tensor:
        """The tensor `name`, spread as `tensor` is if that has its shape; else all of it."""
        if tensor is None or tuple(tensor.shape) != self.shape(part, name):
            return self.whole(part, name)
        return as_here(tensor, self, part, name)

    def _places(self, part: str, name: str, shape: tuple[int, ...]) -> list[Rows]:
        if self._index is None:
            return [Rows(f"{part}.safetensors", 0, shape[0] if shape else 1)]
        return self._index.parts_of(part, name)

    def _slice(self, file: str, name: str) -> Any:
        """The tensor in the file, of which rows can be read; raises KeyError where it has none of it."""
        from safetensors import SafetensorError

        try:
            return self._file(file).get_slice(name)
        except SafetensorError as error:
            raise KeyError(f"{file}: {error}") from error

    def _file(self, name: str) -> Any:
        from safetensors import SafetensorError, safe_open

        if name not in self._open:
            try:
                self._open[name] = safe_open(str(self._path / name), framework="pt")
            except SafetensorError as error:
                raise KeyError(f"{name}: {error}") from error
        return self._open[name]


def weights_like(model: nn.Module, source: Source) -> dict[str, torch.Tensor]:
    """The model's state_dict as the source has it: of what is spread, this rank's rows.

    Raises KeyError or ValueError if the source is of another model.
    """
    here = model.state_dict()
    if other := sorted(source.names(MODEL) ^ set(here)):
        raise KeyError(f"only one of both has {', '.join(other[:5])}")
    return {name: as_here(tensor, source, MODEL, name) for name, tensor in here.items()}


class OptimizerTensors(Mapping[str, torch.Tensor]):
    """The tensors beside the model in a source, by name, which are read when they are asked for.

    A tensor of the optimizer's state that has the shape of its parameter is spread as the parameter is.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, source: Source) -> None:
        self._source = source
        self._parameters = parameters_of(optimizer)

    def __getitem__(self, name: str) -> torch.Tensor:
        parameter = parameter_of(name, "optimizer", self._parameters)
        return self._source.spread_as(parameter, OPTIMIZER, name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._source.names(OPTIMIZER))

    def __len__(self) -> int:
        return len(self._source.names(OPTIMIZER))


def parameters_of(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    """The optimizer's parameters, in the order of the numbers that its state_dict gives them."""
    return [each for group in optimizer.param_groups for each in group["params"]]


def parameter_of(name: str, optimizer: str, parameters: Sequence[torch.Tensor]) -> torch.Tensor | None:
    """The parameter whose state a tensor is; None for a tensor that is not a parameter's.

    name: of the tensor in a checkpoint, such as optimizer.state.3.exp_avg; optimizer: what the optimizer is
    called there.
    """
    words = name.removeprefix(f"{optimizer}.").split(".")
    is_one = name.startswith(f"{optimizer}.state.") and words[1].isdecimal()
    return parameters[int(words[1])] if is_one else None


def as_here(tensor: torch.Tensor, source: Source, part: str, name: str) -> torch.Tensor:
    """The tensor `name` of the source, spread as `tensor` is."""
    shape = source.shape(part, name)
    if shape != tuple(tensor.shape):
        raise ValueError(f"{name} has the shape {list(shape)} there, not {list(tensor.shape)}")
    if not is_sharded(tensor):
        return source.whole(part, name)
    place = slice_of(tensor)
    return like(tensor, source.rows(part, name, place.start, place.end).to(tensor.device))


def source_of(path: str, files: Mapping[str, bytes]) -> Source:
    """The tensors of the checkpoint at `path`, of which `files` has the small ones."""
    return Source(path, files.get(INDEX))
