"""Checkpoints on disk: folders that are whole or absent, each file verified by its sha256. No torch.

A folder is written under a hidden name and renamed into place; docs/checkpoints.md describes the format.
A paused process may wake up and still believe that it owns the run directory: whatever is renamed here goes
out of, or into, a hidden folder that a new owner has swept away by then, so that the rename fails.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

MANIFEST = "manifest.json"
_MANIFEST_BYTES = 1 << 20  # a longer one is not ours
_FILE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
_STEP = re.compile(r"step-([0-9]{6,18})")


class Damaged(Exception):
    """What is wrong with which file of a checkpoint, in one line."""


def folder(run_dir: str | Path) -> Path:
    return Path(run_dir) / "checkpoints"


def path_of(run_dir: str | Path, step: int) -> Path:
    return folder(run_dir) / f"step-{step:06d}"


def write(
    run_dir: str | Path,
    step: int,
    files: Mapping[str, bytes],
    token: str,
    before_rename: Callable[[], None],
) -> Path:
    """Writes the checkpoint of `step`, unless a valid one is there; returns its path.

    `token` names the writer; `before_rename` raises when the run directory has another owner by now.
    Whatever fails, OSError or other, leaves the checkpoints that were there as they are.
    """
    assert all(_FILE.fullmatch(name) and name != MANIFEST for name in files), sorted(files)
    path = path_of(run_dir, step)
    with suppress(Damaged):
        read(path)
        return path
    _make_folder(path.parent)
    temporary, aside = (path.with_name(f".{path.name}.{token}.{kind}tmp") for kind in ("", "damaged."))
    try:
        for hidden in (temporary, aside):
            shutil.rmtree(hidden, ignore_errors=True)  # of this writer's last attempt
        temporary.mkdir(0o700)
        for name, content in files.items():
            _write_file(temporary / name, content)
        _write_file(temporary / MANIFEST, _manifest(files))
        _sync_folder(temporary)
        if path.is_symlink() or path.exists():
            aside.mkdir(0o700)
        before_rename()
        if aside.exists():
            path.rename(aside / path.name)
        temporary.rename(path)
        _sync_folder(path.parent)
    finally:
        for hidden in (temporary, aside):
            shutil.rmtree(hidden, ignore_errors=True)
    return path


def read(path: str | Path) -> dict[str, bytes]:
    """Every file of a checkpoint. What was checked is what is returned; raises Damaged."""
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    except OSError as error:
        raise Damaged(f"the folder cannot be opened: {error.strerror}") from error
    try:
        listed = _parse_manifest(_read_file(directory, MANIFEST, _MANIFEST_BYTES))
        there = set(os.listdir(directory))  # noqa: PTH208 (of a descriptor)
        for name in sorted(there - {MANIFEST, *listed}):
            raise Damaged(f"{name!a}: it is not in {MANIFEST}")
        return {name: _verified(directory, name, *listed[name]) for name in sorted(listed)}
    except OSError as error:
        raise Damaged(f"the folder cannot be read: {error.strerror}") from error
    finally:
        os.close(directory)


def steps(run_dir: str | Path) -> list[int]:
    """Of the folders that are there, newest first; whether they are valid is not looked at."""
    return sorted(in_folder(folder(run_dir)), reverse=True)


def step_of(path: str | Path) -> int | None:
    """The step in the name of a checkpoint's folder; None for another name."""
    name = Path(path).name
    match = _STEP.fullmatch(name)
    return int(match[1]) if match and name == path_of("", int(match[1])).name else None


def in_folder(path: str | Path) -> dict[int, Path]:
    """The checkpoints in such a folder, by step."""
    try:
        with os.scandir(path) as entries:
            names = [entry.name for entry in entries if entry.is_dir(follow_symlinks=False)]
    except FileNotFoundError:
        return {}
    found = {step_of(name): Path(path) / name for name in names}
    return {step: there for step, there in found.items() if step is not None}


def newest_valid(run_dir: str | Path) -> tuple[Path | None, dict[str, bytes], list[str]]:
    """Path and verified contents of the newest valid checkpoint; a line for each newer one passed over."""
    passed_over: list[str] = []
    for step in steps(run_dir):
        path = path_of(run_dir, step)
        try:
            return path, read(path), passed_over
        except Damaged as damaged:
            passed_over.append(f"{path.name}: {damaged}")
    return None, {}, passed_over


def remove(
    run_dir: str | Path, keep: Collection[int], before_rename: Callable[[], None] = lambda: None
) -> None:
    """Removes all other checkpoints; `before_rename` as for write()."""
    if set(steps(run_dir)) <= set(keep):
        return
    bin_ = _hidden(run_dir)
    bin_.mkdir(0o700)
    try:
        before_rename()
        for step in set(steps(run_dir)) - set(keep):
            path = path_of(run_dir, step)
            path.rename(bin_ / path.name)
    finally:
        shutil.rmtree(bin_, ignore_errors=True)


def sweep_up(run_dir: str | Path) -> None:
    """Removes the hidden folders of writers that are gone; who wakes up again finds its own gone.

    For the new owner of the run directory, once it has the claim.
    """
    for left in folder(run_dir).glob(".*.tmp"):
        swept = _hidden(run_dir)
        with suppress(FileNotFoundError):  # its writer was alive and has just renamed or removed it
            left.rename(swept)  # at once, where deleting takes its time
        shutil.rmtree(swept, ignore_errors=True)


def from_json(name: str, content: bytes) -> Any:
    """The value in a JSON file; raises Damaged, also where a key stands twice."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        return json.loads(content, object_pairs_hook=once)
    except (ValueError, RecursionError):
        raise Damaged(f"{name}: it is not JSON") from None


@dataclass(frozen=True)
class Tensor:
    """Of a safetensors file; `begin` and `end` count bytes from the start of its data."""

    dtype: str
    shape: list[int]
    begin: int
    end: int


def tensors(name: str, content: bytes) -> dict[str, Tensor]:
    """What a safetensors file says of its tensors, in the data's order: eight bytes with the length of a
    JSON object, the object, the data. Raises Damaged unless they fill the data exactly."""
    length = int.from_bytes(content[:8], "little")
    data_bytes = len(content) - 8 - length
    if len(content) < 8 or data_bytes < 0:
        raise Damaged(f"{name}: it is too short for a safetensors file")
    header = from_json(name, content[8 : 8 + length])
    if type(header) is not dict:
        raise Damaged(f"{name}: its header is not a JSON object")
    metadata = header.pop("__metadata__", {})
    if type(metadata) is not dict or not all(_is_text(text) for text in metadata.values()):
        raise Damaged(f"{name}: its __metadata__ is not text")
    found = {key: _tensor(name, key, about) for key, about in header.items()}
    in_order = sorted(found.items(), key=lambda item: (item[1].begin, item[1].end))
    end = 0
    for key, tensor in in_order:
        expected = math.prod(tensor.shape) * DTYPE_BYTES.get(tensor.dtype, -1)
        if tensor.begin != end or tensor.end - tensor.begin != expected:
            raise Damaged(f"{name}: {ascii(key)[:80]} does not fit its data")
        end = tensor.end
    if end != data_bytes:
        raise Damaged(f"{name}: its tensors have {end:,} bytes, but there are {data_bytes:,}")
    return dict(in_order)


def _tensor(name: str, key: str, about: Any) -> Tensor:
    if type(about) is dict and set(about) == {"dtype", "shape", "data_offsets"}:
        dtype, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
        words, sizes = _is_text(key) and type(dtype) is str, _are_sizes(shape) and _are_sizes(offsets)
        if words and sizes and len(offsets) == 2:
            return Tensor(dtype, shape, *offsets)
    raise Damaged(f"{name}: {ascii(key)[:80]} is not described as a tensor")


def _is_text(value: Any) -> bool:
    """JSON can say half a character, which no other program takes."""
    return type(value) is str and value == value.encode(errors="ignore").decode()


def _are_sizes(value: Any) -> bool:
    small = type(value) is list and len(value) <= 64
    return small and all(type(n) is int and 0 <= n < 1 << 63 for n in value)


def _hidden(run_dir: str | Path) -> Path:
    return folder(run_dir) / f".{secrets.token_hex(8)}.tmp"


def _make_folder(path: Path) -> None:
    with suppress(FileExistsError):
        path.mkdir(0o700)
        _sync_folder(path.parent)


def _write_file(path: Path, content: bytes) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def _sync_folder(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno != errno.EINVAL:  # a file system that syncs no folders
            raise
    finally:
        os.close(descriptor)


def _manifest(files: Mapping[str, bytes]) -> bytes:
    about = {n: {"size": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in files.items()}
    return _canonical({"format": 1, "files": about})


def _canonical(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def _parse_manifest(content: bytes) -> dict[str, tuple[int, str]]:
    """{name: (size, sha256)}. One spelling only is accepted: then no bit can change unseen."""
    parsed = from_json(MANIFEST, content)
    if type(parsed) is not dict or set(parsed) != {"format", "files"} or type(parsed["files"]) is not dict:
        raise Damaged(f"{MANIFEST}: it is not as it was written")
    if type(parsed["format"]) is not int or parsed["format"] != 1:
        raise Damaged(f"{MANIFEST}: its format is not known to this version")
    for name, about in parsed["files"].items():
        if not _FILE.fullmatch(name) or name == MANIFEST:
            raise Damaged(f"{MANIFEST}: {ascii(name)[:80]} is not the name of a file in the folder")
        kinds = {key: type(value) for key, value in about.items()} if type(about) is dict else {}
        if kinds != {"size": int, "sha256": str}:
            raise Damaged(f"{MANIFEST}: {name} needs a size and a sha256")
    if _canonical(parsed) != content:
        raise Damaged(f"{MANIFEST}: it is not as it was written")
    return {name: (about["size"], about["sha256"]) for name, about in parsed["files"].items()}


def _verified(directory: int, name: str, size: int, sha256: str) -> bytes:
    content = _read_file(directory, name, size)
    if len(content) != size:
        raise Damaged(f"{name}: it has {len(content):,} bytes, not {size:,}")
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise Damaged(f"{name}: its sha256 is {found[:12]}..., not {ascii(sha256)[1:-1][:12]}...")
    return content


def _read_file(directory: int, name: str, most: int) -> bytes:
    """A regular file in the folder, not longer than that; no link is followed, no FIFO waited for."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
        with os.fdopen(descriptor, "rb") as file:
            about = os.fstat(descriptor)
            if not stat.S_ISREG(about.st_mode):
                raise Damaged(f"{name}: it is not a regular file")
            if about.st_size > most:
                raise Damaged(f"{name}: it has {about.st_size:,} bytes, more than {most:,}")
            return file.read()
    except FileNotFoundError:
        raise Damaged(f"{name}: it is missing") from None
    except OSError as error:
        raise Damaged(f"{name}: {error.strerror}") from error
