"""`allranks checkpoint`: which checkpoints there are, which are whole, and what one holds. No torch.

Files may hold anything, also what would trouble a terminal. So all text from a file is printed on one line
and in ASCII.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

from allranks.base.arguments import with_our_errors
from allranks.base.errors import UserError
from allranks.base.files import line
from allranks.base.text import table
from allranks.run import checkpoint, metric_names
from allranks.run.checkpoint import Damaged, Tensor


class _Command(NamedTuple):
    name: str
    run: Callable[[Sequence[Path], bool], int]  # (checkpoints, as JSON) -> exit code
    help: str


class _Contents(NamedTuple):
    """A checkpoint that was read and verified."""

    files: Mapping[str, bytes]
    state: Mapping[str, Any]  # the content of state.json; empty if it is not as allranks writes it
    tensors: Mapping[str, Mapping[str, Tensor]]  # the tensors of each safetensors file, by name


def main(arguments: Sequence[str]) -> int:
    """Runs `allranks checkpoint` with these arguments and returns its exit code.

    `list` returns 0 whatever it finds. `verify` returns 1 where a checkpoint is damaged, and `show` where
    none is left to show. Raises UserError if there is no checkpoint at PATH.
    """
    commands = (
        _Command("list", _list, "list them: step, epoch, a metric, size, and whether each is valid"),
        _Command("verify", _verify, "read every file again; the exit code is 1 if one is damaged"),
        _Command("show", _show, "show what one of them holds: the newest valid one, or that at PATH"),
    )
    parser = argparse.ArgumentParser(
        prog="allranks checkpoint", description="Looks at checkpoints, and changes nothing."
    )
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for command in commands:
        subparser = subparsers.add_parser(command.name, help=command.help, description=command.help)
        subparser.add_argument(
            "path", metavar="PATH", help="the directory of a run, its checkpoints folder, or one checkpoint"
        )
        subparser.add_argument(
            "--json", action="store_true", help="for programs: one JSON line for each checkpoint"
        )
        with_our_errors(subparser).set_defaults(run=command.run)
    options = with_our_errors(parser).parse_args(arguments)
    return int(options.run(_checkpoints_at(Path(options.path)), options.json))


def _checkpoints_at(path: Path) -> list[Path]:
    """The checkpoints at PATH, oldest first: those of a run, those in a folder, or PATH itself."""
    try:
        if (path / checkpoint.MANIFEST).exists() or _has_name_of_one(path):
            # A link that the user names is followed; one among a run's checkpoints is not.
            return [path.resolve() if path.is_symlink() else path]
        below = checkpoint.in_folder(checkpoint.folder(path)) or checkpoint.in_folder(path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if not below:
        what = "has no checkpoints" if path.exists() else "is missing"
        raise UserError(f"{path} {what}: give a run directory, its checkpoints folder, or a checkpoint.")
    return [below[step] for step in sorted(below)]


def _has_name_of_one(path: Path) -> bool:
    """Whether something stands at the path under the name of a checkpoint, such as step-000007."""
    return checkpoint.step_of(path.absolute()) is not None and path.exists()


def _read(path: Path) -> dict[str, bytes]:
    """The checkpoint's files. Raises Damaged, also where the file system does not give what is there."""
    try:
        return checkpoint.read(path)
    except OSError as error:
        raise Damaged(checkpoint.unreadable(error)) from error


def _row(path: Path) -> dict[str, Any]:
    """What `list` and `verify` say of a checkpoint; `problem` is None for a valid one."""
    try:
        size, state = _verified(path)
        problem = None
    except Damaged as damaged:
        problem = str(damaged)
        state = {}
        size = sum(file.lstat().st_size for file in path.glob("*") if file.name != checkpoint.MANIFEST)
    history = state.get("history")
    last_epoch = history[-1] if isinstance(history, list) and history else {}
    metrics = last_epoch if isinstance(last_epoch, dict) else {}
    return {
        "checkpoint": str(path),
        "step": state.get("step", checkpoint.step_of(path.absolute())),
        "epoch": state.get("epoch"),
        "val/loss": metrics.get("val/loss"),
        "metrics": {name: metrics[name] for name in metric_names.metrics_in([metrics])},
        "bytes": size,
        "problem": problem,
    }


def _verified(path: Path) -> tuple[int, dict[str, Any]]:
    """(bytes of the checkpoint's files, what its state.json holds), after each of its files was verified.

    The large files are read piece by piece, so that a checkpoint may be larger than this host's memory.
    Raises Damaged, also where the file system does not give what is there.
    """
    try:
        about = checkpoint.listed(path)
        checkpoint.check(path, list(about))
        files = checkpoint.read_some(path, ["state.json"])
    except OSError as error:
        raise Damaged(checkpoint.unreadable(error)) from error
    return sum(file.size for file in about.values()), _state(files)


def _list(paths: Sequence[Path], as_json: bool) -> int:
    rows = [_row(path) for path in paths]
    if as_json:
        _print_json(rows)
        return 0
    metric = _metric_of(rows)
    shown = [("step", "epoch", metric, "bytes", "")]
    for row in rows:
        step, epoch = (_plain(row[key]) for key in ("step", "epoch"))
        value = _plain(row["metrics"].get(metric))
        shown.append((step, epoch, value, f"{row['bytes']:,}", row["problem"] or "valid"))
    print(table(shown))
    return 0


def _metric_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """The metric that the list shows: val/loss, or what the training measures in its place."""
    there = dict.fromkeys(name for row in rows for name in row["metrics"])
    if not there or "val/loss" in there:
        return "val/loss"
    return metric_names.validated(list(there))[0]


def _verify(paths: Sequence[Path], as_json: bool) -> int:
    rows = [_row(path) for path in paths]
    if as_json:
        _print_json([{key: row[key] for key in ("checkpoint", "problem")} for row in rows])
    else:
        for row in rows:
            print(f"{row['checkpoint']}: {row['problem'] or 'valid'}")
    return int(any(row["problem"] for row in rows))


def _show(paths: Sequence[Path], as_json: bool) -> int:
    for path in reversed(paths):
        try:
            contents = _contents(path)
        except Damaged as damaged:
            print(f"{path}: {damaged}", file=sys.stderr)
            continue
        if as_json:
            _print_json([_as_json(path, contents)])
        else:
            _print_contents(path, contents)
        return 0
    return 1


def _contents(path: Path) -> _Contents:
    files = _read(path)
    tensors = {
        name: checkpoint.tensors(name, content)
        for name, content in files.items()
        if name.endswith(".safetensors")
    }
    return _Contents(files, _state(files), tensors)


def _as_json(path: Path, contents: _Contents) -> dict[str, Any]:
    return {
        "checkpoint": str(path),
        "bytes": {name: len(content) for name, content in contents.files.items()},
        "state": contents.state,
        "tensors": {
            file: {name: asdict(tensor) for name, tensor in tensors.items()}
            for file, tensors in contents.tensors.items()
        },
    }


def _print_contents(path: Path, contents: _Contents) -> None:
    size = sum(len(content) for content in contents.files.values())
    print(f"{path}: valid, {size:,} bytes in {len(contents.files)} files")

    counters = {key: value for key, value in contents.state.items() if not isinstance(value, dict | list)}
    for title, values in (("counters", counters), ("identity", contents.state.get("identity"))):
        if isinstance(values, dict) and values:
            rows = [(_plain(key), _plain(value)) for key, value in sorted(values.items())]
            print(f"{title}\n{table(rows)}")

    for file, tensors in contents.tensors.items():
        numbers = sum(math.prod(tensor.shape) for tensor in tensors.values())
        print(f"{file}: {len(tensors)} tensors, {numbers:,} numbers")
        if tensors:
            about = [
                (_plain(name), tensor.dtype, " x ".join(map(str, tensor.shape)))
                for name, tensor in tensors.items()
            ]
            print(table(about))


def _state(files: Mapping[str, bytes]) -> dict[str, Any]:
    """What state.json holds; empty if it is not as ours."""
    try:
        state = checkpoint.from_json("state.json", files.get("state.json", b""))
    except Damaged:
        return {}
    return state if isinstance(state, dict) else {}


def _plain(value: object) -> str:
    """A value from a file on one line, in ASCII."""
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.6g}"
    if isinstance(value, str) and value.isascii() and value.isprintable():
        return value
    return json.dumps(value)


def _print_json(rows: Sequence[Mapping[str, Any]]) -> None:
    print("".join(line(row) for row in rows), end="")
