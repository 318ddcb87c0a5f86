"""Files that are written whole or not at all, JSON lines that are appended one at a time, and paths."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from io import FileIO
from pathlib import Path
from typing import Any, TextIO, TypeVar

from allranks.base.errors import UserError

T = TypeVar("T")

_OCTAL = re.compile(r"\\([0-7]{3})")  # how /proc/mounts writes a blank in a path: \040


def with_home(named: str, path: str) -> str:
    """The path with a `~` or `~user` at its beginning replaced by that home directory.

    `named` is the key or option that the path was given with. Raises UserError if there is no such home.
    """
    try:
        return str(Path(path).expanduser()) if path.startswith("~") else path
    except RuntimeError as error:
        raise UserError(
            f"{named}={path}: no home directory is known for {path.partition('/')[0]}. Give the whole path."
        ) from error


@contextlib.contextmanager
def in_present_directory() -> Iterator[None]:
    """In the block, a relative path raises UserError where the present directory has been removed."""
    try:
        yield
    except FileNotFoundError:
        try:
            Path.cwd()
        except FileNotFoundError as error:
            raise UserError(
                "The present directory has been removed: `cd` into one that is there."
            ) from error
        raise


def is_there(path: Path) -> bool:
    """Whether something is at this path that this user can see.

    Path.exists() raises PermissionError in a folder that this user may not search; this does not.
    """
    return os.path.exists(path)  # noqa: PTH110


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a JSON file under a temporary name and renames it: a reader sees all of it or nothing."""
    write_text(path, json.dumps(finite(values), indent=2, allow_nan=False) + "\n").close()


def write_text(path: Path, text: str, new: bool = False) -> TextIO:
    """Puts a new file with this text in the place of an earlier one; returns it, open to append to.

    A process that still has the earlier file open goes on writing to that one, which has no name any more.
    With `new` there must be no earlier file: if there is one, it stays, and FileExistsError is raised.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    file = temporary.open("w")
    try:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
        (_put_new if new else os.replace)(temporary, path)
    except BaseException:  # also where the text cannot be encoded, and after Ctrl-C
        with suppress(OSError):  # close() tries once more to write what the full disk did not take
            file.close()
        raise
    finally:
        temporary.unlink(missing_ok=True)
    return file


def write_bytes(path: Path, content: bytes) -> None:
    """Puts a file with this content in the place of an earlier one. A reader never sees only a part of it.

    The file is not synced to the disk, so this is only for content that can be made again.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    try:
        temporary.write_bytes(content)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _put_new(temporary: Path, path: Path) -> None:
    """Renames the file as os.replace does, but raises FileExistsError where `path` is there already."""
    try:
        os.link(temporary, path)
    except OSError:
        if path.exists():
            raise
        # This file system has no hard links, like DAOS. A rename replaces an existing file without an
        # error. So if two processes come here at the same moment, the file of one of them is lost.
        temporary.replace(path)


def write_all(file: FileIO, content: bytes | memoryview) -> None:
    """Writes all of it to a file that has no buffer, of which one write may take only a part."""
    written = 0
    while written < len(content):
        written += file.write(content[written:])


def append_line(file: TextIO, values: Mapping[str, Any]) -> None:
    """Appends one JSON line and hands it to the operating system, so that it outlives this process.

    It is not synced to the disk: checkpoints are, and hold the same lines.
    """
    file.write(line(values))
    file.flush()


def line(values: Mapping[str, Any]) -> str:
    """The values as one line of JSON, with its line feed."""
    return json.dumps(finite(values), allow_nan=False) + "\n"


def finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """The values, with None for NaN and infinity: JSON has neither, and writes None as null.

    Those in lists and in mappings inside it, too.
    """
    return {key: _finite(value) for key, value in values.items()}


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return finite(value)
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return value


def within(limit_s: float, call: Callable[[], T]) -> T | None:
    """What `call` returns; None if it takes longer than `limit_s` s, as on a file system that hangs.

    The call then goes on in a thread, which ends with the process. What it raises is raised here.
    """
    # Not needed by the guards, which start on every rank in a few milliseconds.
    from concurrent.futures import wait

    from allranks.base.threads import in_thread

    future = in_thread(call, "allranks-within")
    wait([future], limit_s)
    return future.result() if future.done() else None


def file_system(path: Path, mounts: Path = Path("/proc/mounts")) -> str:
    """The type of the file system that holds `path`, such as `nfs` or `lustre`; else `unknown`.

    Linux tells it in `mounts`; elsewhere nobody does. Of two that are mounted at one point the later one
    is seen there, and stands later in the list.
    """
    longest = 0
    found = "unknown"
    with contextlib.suppress(OSError):
        for mount in mounts.read_text(errors="surrogateescape").splitlines():
            _, point, kind, *_ = mount.split(" ")
            point = _OCTAL.sub(lambda code: chr(int(code[1], 8)), point)
            if path.is_relative_to(point) and len(point) >= longest:
                longest = len(point)
                found = kind
    return found
