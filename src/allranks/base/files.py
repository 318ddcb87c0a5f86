"""Files that are written whole or not at all, and JSON lines that are appended one at a time."""

from __future__ import annotations

import contextlib
import json
import math
import os
import secrets
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a whole file or none: readers never see half of it."""
    write_text(path, json.dumps(_finite(values), indent=2, allow_nan=False) + "\n").close()


def write_text(path: Path, text: str, new: bool = False) -> TextIO:
    """Puts a new file in the place of what is there, and leaves it open to append to.

    Who still has the earlier file open writes into nowhere from now on. With `new` a file that is there is
    left alone: raises FileExistsError.
    """
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.tmp")
    file = temporary.open("w")
    try:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
        (_put_new if new else os.replace)(temporary, path)
    except OSError:
        with suppress(OSError):  # what the full disk did not take is tried once more
            file.close()
        temporary.unlink(missing_ok=True)
        raise
    temporary.unlink(missing_ok=True)
    return file


def _put_new(temporary: Path, path: Path) -> None:
    """As os.replace, but raises FileExistsError rather than replace a file."""
    try:
        os.link(temporary, path)
    except OSError:
        if path.exists():
            raise
        temporary.replace(path)  # no hard links, as on DAOS: of two at the same moment one is lost


def append_line(file: TextIO, values: Mapping[str, Any]) -> None:
    """Appends one JSON line, and sees it out of this process. Checkpoints hold the same lines, on disk."""
    file.write(line(values))
    file.flush()


def line(values: Mapping[str, Any]) -> str:
    return json.dumps(_finite(values), allow_nan=False) + "\n"


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: null stands for them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


def file_system(path: Path) -> str:
    """The file system's type by /proc/mounts; `unknown` where that is not to be had."""
    mounts: list[tuple[int, str]] = [(0, "unknown")]
    with contextlib.suppress(OSError):
        for line in Path("/proc/mounts").read_text().splitlines():
            _, point, kind, *_ = line.split()
            if path.is_relative_to(point):
                mounts.append((len(point), kind))
    return max(mounts, key=lambda mount: mount[0])[1]
