"""`allranks checkpoint`: what checkpoints are there, which are whole, and what one holds. No torch."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from allranks.base.errors import UserError
from allranks.base.text import table
from allranks.run import checkpoint
from allranks.run.checkpoint import Damaged


def main(arguments: Sequence[str]) -> int:
    """0; 1 where a checkpoint is damaged. Raises UserError where there is none at PATH."""
    parser = argparse.ArgumentParser(prog="allranks checkpoint", description="Look at checkpoints.")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, run, text in (
        ("list", _list, "each one: step, epoch, val/loss, size, valid or what is wrong"),
        ("verify", _verify, "read every file again; the exit code is 1 if one is damaged"),
        ("show", _show, "what the newest valid one, or the one at PATH, holds"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument(
            "path", metavar="PATH", help="a run directory, its checkpoints/, or one of them"
        )
        command.add_argument("--json", action="store_true", help="for programs: one JSON line a checkpoint")
        command.set_defaults(run=run)
    options = parser.parse_args(arguments)
    return int(options.run(_found(Path(options.path)), options.json))


def _found(path: Path) -> list[Path]:
    """The checkpoints at PATH, oldest first."""
    try:
        if (path / checkpoint.MANIFEST).exists() or checkpoint.step_of(path.absolute()) is not None:
            return [path]
        below = checkpoint.in_folder(checkpoint.folder(path)) or checkpoint.in_folder(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if not below:
        what = "has no checkpoints" if path.exists() else "is missing"
        raise UserError(f"{path} {what}: give a run directory, its checkpoints folder, or a checkpoint.")
    return [below[step] for step in sorted(below)]


def _look(path: Path) -> dict[str, Any]:
    """A row of the list; `problem` is None for a valid one."""
    try:
        files, problem = checkpoint.read(path), None
        state = _state(files)
        size = sum(map(len, files.values()))
    except Damaged as damaged:
        state, problem = {}, str(damaged)
        size = sum(file.lstat().st_size for file in path.glob("*") if file.name != checkpoint.MANIFEST)
    history = state.get("history")
    last = history[-1] if isinstance(history, list) and history else None
    return {
        "checkpoint": str(path),
        "step": state.get("step", checkpoint.step_of(path.absolute())),
        "epoch": state.get("epoch"),
        "val/loss": last.get("val/loss") if isinstance(last, dict) else None,
        "bytes": size,
        "problem": problem,
    }


def _list(found: Sequence[Path], as_json: bool) -> int:
    rows = [_look(path) for path in found]
    if as_json:
        _print_json(rows)
        return 0
    cells = [
        (*(_plain(row[key]) for key in ("step", "epoch", "val/loss")), f"{row['bytes']:,}",
         row["problem"] or "valid")
        for row in rows
    ]  # fmt: skip
    print(table([("step", "epoch", "val/loss", "bytes", ""), *cells]))
    return 0


def _verify(found: Sequence[Path], as_json: bool) -> int:
    rows = [_look(path) for path in found]
    if as_json:
        _print_json([{key: row[key] for key in ("checkpoint", "problem")} for row in rows])
    else:
        for row in rows:
            print(f"{row['checkpoint']}: {row['problem'] or 'valid'}")
    return int(any(row["problem"] for row in rows))


def _show(found: Sequence[Path], as_json: bool) -> int:
    for path in reversed(found):
        try:
            files = checkpoint.read(path)
            held = {
                name: checkpoint.tensors(name, content)
                for name, content in files.items()
                if name.endswith(".safetensors")
            }
            break
        except Damaged as damaged:
            print(f"{path}: {damaged}", file=sys.stderr)
    else:
        return 1
    state = _state(files)
    identity = state.get("identity")
    counters = {key: value for key, value in state.items() if not isinstance(value, dict | list)}
    if as_json:
        about = {file: {name: vars(tensor) for name, tensor in of.items()} for file, of in held.items()}
        sizes = {name: len(content) for name, content in files.items()}
        _print_json([{"checkpoint": str(path), "bytes": sizes, "state": state, "tensors": about}])
        return 0
    print(f"{path}: valid, {sum(map(len, files.values())):,} bytes in {len(files)} files")
    for title, values in (("counters", counters), ("identity", identity)):
        if isinstance(values, dict) and values:
            rows = [(_plain(key), _plain(value)) for key, value in sorted(values.items())]
            print(f"{title}\n{table(rows)}")
    for file, of in held.items():
        numbers = sum(math.prod(tensor.shape) for tensor in of.values())
        print(f"{file}: {len(of)} tensors, {numbers:,} numbers")
        if of:
            print(table([(_plain(n), t.dtype, " x ".join(map(str, t.shape))) for n, t in of.items()]))
    return 0


def _state(files: dict[str, bytes]) -> dict[str, Any]:
    """state.json; empty where it is not as ours."""
    try:
        state = checkpoint.from_json("state.json", files.get("state.json", b""))
    except Damaged:
        return {}
    return state if isinstance(state, dict) else {}


def _plain(value: object) -> str:
    """On one line, in ASCII: what a file says may hold anything."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    return (
        value if isinstance(value, str) and value.isascii() and value.isprintable() else json.dumps(value)
    )


def _print_json(rows: Sequence[dict[str, Any]]) -> None:
    print("".join(json.dumps(row) + "\n" for row in rows), end="")
