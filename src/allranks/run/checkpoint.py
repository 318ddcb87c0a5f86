"""Checkpoints on disk: folders that are whole or absent, each file verified by its sha256. No torch.

A checkpoint is written into a folder with a hidden name, and the folder is renamed into place once all of
it is on the disk. So a reader sees the whole checkpoint or none. docs/checkpoints.md describes the format.

A process that was paused may wake up and still believe that it owns the run directory. Therefore every
rename in this module goes into, or comes out of, a hidden folder of the process itself. A new owner of the
run directory sweeps these hidden folders away first, so that a rename of the old owner fails.

Two things can be wrong with a checkpoint, and they are kept apart. `Damaged`: what is there is not what
was written, and never will be. `OSError`: the file system does not give what is there, perhaps only now (a
server that is away, too many open files, a missing permission).
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

MANIFEST = "manifest.json"
PIECE_BYTES = 1 << 26  # so much is read or checked within a second, unless the file system hangs
# A longer manifest was not written here: that of a model spread over 100,000 ranks (shards.MOST_RANKS),
# each with two files, has half of this.
_MANIFEST_BYTES = 1 << 26
# publish() moves whatever stands where a checkpoint is to be into a folder whose name ends like this.
_ASIDE = ".aside.tmp"
_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
_STEP_NAME = re.compile(r"step-([0-9]{6,18})")

# The errors of open() if the file is not what was written: it is missing, is a link (which is never
# followed), is below a file instead of a folder, or is a socket. All other errors come from the file
# system.
_NOT_AS_WRITTEN = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENXIO)


class Damaged(Exception):
    """What is wrong with which file of a checkpoint, in one line."""


class About(NamedTuple):
    """What the manifest says of a file."""

    size: int  # in bytes
    sha256: str


class Found(NamedTuple):
    """The newest checkpoint that could be read and verified, and what was seen on the way to it."""

    path: Path | None  # None where there is no such checkpoint
    files: dict[str, bytes]  # its verified files by name; empty if there is none
    passed_over: list[str]  # a line for each newer checkpoint that is damaged or cannot be read


# --- names of folders ----------------------------------------------------------------------------------


def folder(run_dir: str | Path) -> Path:
    """The folder in a run directory that holds its checkpoints."""
    return Path(run_dir) / "checkpoints"


def path_of(run_dir: str | Path, step: int) -> Path:
    """Where the checkpoint of this optimizer step is, or would be."""
    return folder(run_dir) / f"step-{step:06d}"


def step_of(path: str | Path) -> int | None:
    """The step in the name of a checkpoint's folder; None if the name is not one of a checkpoint."""
    name = Path(path).name
    match = _STEP_NAME.fullmatch(name)
    if match is None:
        return None
    step = int(match[1])
    return step if name == path_of("", step).name else None  # step-0000007 is nothing that we write


def in_folder(path: str | Path) -> dict[int, Path]:
    """What stands under the name of a checkpoint in this folder, by step; empty if there is no folder.

    A link or a file in the place of a checkpoint is listed too: read() says that it is damaged. Raises
    OSError if the folder cannot be read.
    """
    try:
        names = os.listdir(path)  # noqa: PTH208
    except FileNotFoundError:
        return {}
    by_step = {step_of(name): Path(path) / name for name in names}
    return {step: place for step, place in by_step.items() if step is not None}


def steps(run_dir: str | Path) -> list[int]:
    """The steps of a run's checkpoints, newest first; whether these are valid is not looked at."""
    return sorted(in_folder(folder(run_dir)), reverse=True)


# --- writing and removing ------------------------------------------------------------------------------


def write(
    run_dir: str | Path,
    step: int,
    files: Mapping[str, bytes],
    token: str,
    before_rename: Callable[[], None],
    is_enough: Callable[[Mapping[str, bytes]], bool] = lambda there: True,
) -> Path:
    """Writes the checkpoint of `step`, and returns its path.

    If there is a valid checkpoint of this step, `is_enough` is called with its files. If that returns True,
    this checkpoint stays, and nothing is written.

    `token` names the writer. Just before the checkpoint gets its name, `before_rename` is called. It raises
    an error if the run directory has another owner by now. If anything fails, with OSError or otherwise,
    the checkpoints that were there stay as they are.
    """
    assert all(_FILE_NAME.fullmatch(name) and name != MANIFEST for name in files), sorted(files)
    path = path_of(run_dir, step)
    with suppress(Damaged):
        if is_enough(read(path)):
            return path
    hidden = begin(run_dir, step, token)
    publish(hidden, path, files, {}, before_rename)
    return path


def begin(run_dir: str | Path, step: int, token: str) -> Path:
    """Makes the hidden folder in which the checkpoint of `step` is written; publish() renames it."""
    path = path_of(run_dir, step)
    _make_folder(path.parent)
    hidden = path.with_name(f".{path.name}.{token}.tmp")
    shutil.rmtree(hidden, ignore_errors=True)  # the last attempt of this writer may have left it
    hidden.mkdir(0o700)
    return hidden


def publish(
    hidden: Path,
    path: Path,
    files: Mapping[str, bytes],
    there: Mapping[str, About],
    before_rename: Callable[[], None],
) -> None:
    """Writes the files and the manifest into the hidden folder, and renames it into its place, `path`.

    `there` are files that are in the folder, and on the disk, already. `before_rename` is called just
    before the checkpoint gets its name. If anything fails, with OSError or otherwise, the checkpoints that
    were there stay as they are, and the hidden folder is removed.

    If a damaged checkpoint, or one that has not come as far, stands at `path`, it is moved aside first,
    because a rename cannot replace a folder. If the writer is killed before the new checkpoint is at
    `path`, sweep_up() puts the earlier one back.
    """
    aside = hidden.with_name(hidden.name.removesuffix(".tmp") + _ASIDE)
    is_moved = False
    try:
        # The last attempt of this writer may have left it.
        shutil.rmtree(aside, ignore_errors=True)

        # 1. All files into the hidden folder and onto the disk, the manifest last.
        for name, content in files.items():
            _write_file(hidden / name, content)
        about = {name: About(len(each), hashlib.sha256(each).hexdigest()) for name, each in files.items()}
        _write_file(hidden / MANIFEST, _manifest({**about, **there}))
        _sync_folder(hidden)

        # 2. Whether the run directory is still this writer's.
        if path.is_symlink() or path.exists():
            aside.mkdir(0o700)  # takes what stands in the place
        before_rename()

        # 3. The earlier checkpoint out of the way, and the new one into its place.
        if aside.exists():
            path.rename(aside / path.name)
            is_moved = True
        hidden.rename(path)
        _sync_folder(path.parent)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)
        if is_moved:
            _put_back(aside)  # unless the new one is in the place
        shutil.rmtree(aside, ignore_errors=True)


def _put_back(aside: Path) -> None:
    """Moves a checkpoint that publish() has moved aside back to its place, if nothing stands there.

    Raises OSError if the file system fails: then the checkpoint stays where it is, for sweep_up().
    """
    for moved in in_folder(aside).values():
        place = aside.parent / moved.name
        if os.path.lexists(place):
            continue
        try:
            moved.rename(place)
        except OSError as error:
            # Another process, this run directory's earlier or next owner, has been quicker: it has moved
            # this one, or has put one in the place.
            if error.errno not in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):
                raise


def keep_only(
    run_dir: str | Path, keep: Collection[int], before_rename: Callable[[], None] = lambda: None
) -> None:
    """Removes the checkpoints of all steps but those in `keep`.

    `before_rename` is called before anything is removed, and raises where the run directory has another
    owner by now.
    """
    if set(steps(run_dir)) <= set(keep):
        return
    bin_ = _new_hidden_folder_name(run_dir)
    bin_.mkdir(0o700)
    try:
        before_rename()
        for step in set(steps(run_dir)) - set(keep):
            path = path_of(run_dir, step)
            path.rename(bin_ / path.name)
    finally:
        shutil.rmtree(bin_, ignore_errors=True)


def sweep_up(run_dir: str | Path) -> None:
    """Removes the hidden folders that earlier writers have left in the run directory.

    The new owner of the run directory calls this, once it has the claim. If an earlier writer was only
    suspended and wakes up again, it finds its folder gone and cannot publish its checkpoint. A checkpoint
    that a writer had moved aside, and that nothing has replaced, goes back to its place. Raises OSError
    if that fails.
    """
    for left in folder(run_dir).glob(".*.tmp"):
        if left.name.endswith(_ASIDE):
            _put_back(left)
        swept = _new_hidden_folder_name(run_dir)
        with suppress(FileNotFoundError):  # its writer was alive, and has just renamed or removed it
            left.rename(swept)  # at once: deleting takes its time, in which the writer could go on
        shutil.rmtree(swept, ignore_errors=True)


def _new_hidden_folder_name(run_dir: str | Path) -> Path:
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


# --- reading -------------------------------------------------------------------------------------------


def read(path: str | Path, after_piece: Callable[[], None] | None = None) -> dict[str, bytes]:
    """Every file of the checkpoint in this folder, by name. The bytes returned are those that were checked.

    `after_piece` is called after every PIECE_BYTES: a large checkpoint may take minutes to read. Raises
    Damaged if the folder or a file is not what was written, and OSError, with the file's name, if the file
    system cannot read it. No link is followed, not even the folder's own.
    """
    with _opened(path) as directory:
        listed = _parse_manifest(_read_file(directory, MANIFEST, _MANIFEST_BYTES))
        there = set(os.listdir(directory))  # noqa: PTH208 (of a descriptor)
        for name in sorted(there - {MANIFEST, *listed}):
            raise Damaged(f"{name!a}: it is not in {MANIFEST}")
        return {name: _verified(directory, name, *listed[name], after_piece) for name in sorted(listed)}


@contextmanager
def _opened(path: str | Path) -> Iterator[int]:
    """A descriptor of the folder, which is no link. Raises Damaged if there is no such folder."""
    try:
        directory = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    except OSError as error:
        if error.errno not in _NOT_AS_WRITTEN:
            raise
        what = "it is a link" if Path(path).is_symlink() else error.strerror
        raise Damaged(f"the folder cannot be opened: {what}") from error
    try:
        yield directory
    finally:
        os.close(directory)


def listed(path: str | Path) -> dict[str, About]:
    """What the manifest of the checkpoint in this folder says of each of its files, by name.

    The files themselves are not read. Raises Damaged and OSError as read() does.
    """
    with _opened(path) as directory:
        about = _parse_manifest(_read_file(directory, MANIFEST, _MANIFEST_BYTES))
        there = set(os.listdir(directory))  # noqa: PTH208 (of a descriptor)
        for name in sorted(there - {MANIFEST, *about}):
            raise Damaged(f"{name!a}: it is not in {MANIFEST}")
        for name in sorted(set(about) - there):
            raise Damaged(f"{name}: it is missing")
        return {name: About(*about[name]) for name in sorted(about)}


def read_some(path: str | Path, names: Collection[str]) -> dict[str, bytes]:
    """These files of the checkpoint, verified, by name; raises Damaged and OSError as read() does."""
    about = listed(path)
    with _opened(path) as directory:
        return {name: _verified(directory, name, *about[name], None) for name in names if name in about}


def check(path: str | Path, names: Collection[str], after_piece: Callable[[], None] | None = None) -> None:
    """Reads these files of the checkpoint, which may be large, and keeps nothing of them.

    Raises Damaged if one is not what was written, and OSError where it cannot be read.
    """
    about = listed(path)
    with _opened(path) as directory:
        for name in names:
            digest = hashlib.sha256()
            size = 0
            for piece in _pieces(directory, name, about[name].size, after_piece):
                digest.update(piece)
                size += len(piece)
            _compare(name, size, digest.hexdigest(), about[name])


def newest_valid(run_dir: str | Path, after_piece: Callable[[], None] | None = None) -> Found:
    """The newest checkpoint of a run that can be read and is valid. Damaged ones are passed over.

    One that the file system does not give is passed over as well: training again from an earlier one
    computes the same, and the file that may be readable later is left as it is. `after_piece` is called as
    by read(). Raises OSError if the folder with the checkpoints cannot be listed.
    """
    passed_over: list[str] = []
    for step in steps(run_dir):
        path = path_of(run_dir, step)
        try:
            return Found(path, read(path, after_piece), passed_over)
        except Damaged as damaged:
            passed_over.append(f"{path.name}: {damaged}")
        except OSError as error:
            passed_over.append(f"{path.name}: {unreadable(error)}")
    return Found(None, {}, passed_over)


def find_at(path: str | Path, after_piece: Callable[[], None] | None = None) -> Found:
    """The checkpoint in this folder, or the newest valid one of the run whose directory it is.

    Raises Damaged if the folder is a checkpoint that is not as it was written, and OSError where the
    file system does not give what is there. `after_piece` is called as by read().
    """
    if (Path(path) / MANIFEST).exists():
        return Found(Path(path), read(Path(path).resolve(), after_piece), [])
    return newest_valid(path, after_piece)


def unreadable(error: OSError) -> str:
    """In words: that read() got this error from the file system, and at which file of the checkpoint."""
    name = str(error.filename)
    at = f"{name}: " if _FILE_NAME.fullmatch(name) and step_of(name) is None else ""
    return f"{at}it cannot be read now ({error.strerror})"


def _read_file(
    directory: int, name: str, most: int, after_piece: Callable[[], None] | None = None
) -> bytes:
    """A regular file in the folder, of `most` bytes or less; no link is followed, no FIFO waited for."""
    return b"".join(_pieces(directory, name, most, after_piece))


def _pieces(
    directory: int, name: str, most: int, after_piece: Callable[[], None] | None = None
) -> Iterator[bytes]:
    """What _read_file() returns, in pieces of PIECE_BYTES."""
    try:
        descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
    except FileNotFoundError:
        raise Damaged(f"{name}: it is missing") from None
    except OSError as error:
        if error.errno in _NOT_AS_WRITTEN:
            raise Damaged(f"{name}: {error.strerror}") from error
        raise
    try:
        about = os.fstat(descriptor)
        if not stat.S_ISREG(about.st_mode):
            raise Damaged(f"{name}: it is not a regular file")
        if about.st_size > most:
            raise Damaged(f"{name}: it has {about.st_size:,} bytes, more than {most:,}")
        with os.fdopen(descriptor, "rb", closefd=False) as file:
            while piece := file.read(PIECE_BYTES):
                yield piece
                if after_piece is not None:
                    after_piece()
    except OSError as error:  # which does not know the file's name
        raise OSError(error.errno, error.strerror, name) from error
    finally:
        os.close(descriptor)


def _verified(
    directory: int, name: str, size: int, sha256: str, after_piece: Callable[[], None] | None
) -> bytes:
    content = _read_file(directory, name, size, after_piece)
    digest = hashlib.sha256()
    for start in range(0, len(content), PIECE_BYTES):
        digest.update(memoryview(content)[start : start + PIECE_BYTES])
        if after_piece is not None:
            after_piece()
    _compare(name, len(content), digest.hexdigest(), About(size, sha256))
    return content


def _compare(name: str, size: int, sha256: str, about: About) -> None:
    """Raises Damaged if a file's size and sha256 are not those of the manifest."""
    if size != about.size:
        raise Damaged(f"{name}: it has {size:,} bytes, not {about.size:,}")
    if sha256 != about.sha256:
        raise Damaged(f"{name}: its sha256 is {sha256[:12]}..., not {ascii(about.sha256)[1:-1][:12]}...")


# --- the manifest --------------------------------------------------------------------------------------


def _manifest(files: Mapping[str, About]) -> bytes:
    about = {name: {"size": each.size, "sha256": each.sha256} for name, each in files.items()}
    return _canonical({"format": 1, "files": about})


def _canonical(value: Any) -> bytes:
    return json.dumps(value, indent=1, sort_keys=True).encode() + b"\n"


def _parse_manifest(content: bytes) -> dict[str, tuple[int, str]]:
    """{name: (size, sha256)}. Only one spelling is accepted, so that no bit of it can change unseen."""
    parsed = from_json(MANIFEST, content)
    if type(parsed) is not dict or set(parsed) != {"format", "files"} or type(parsed["files"]) is not dict:
        raise Damaged(f"{MANIFEST}: it is not as it was written")
    if type(parsed["format"]) is not int or parsed["format"] != 1:
        raise Damaged(f"{MANIFEST}: its format is not known to this version (use the one that wrote it)")
    for name, about in parsed["files"].items():
        if not _FILE_NAME.fullmatch(name) or name == MANIFEST:
            raise Damaged(f"{MANIFEST}: {ascii(name)[:80]} is not the name of a file in the folder")
        kinds = {key: type(value) for key, value in about.items()} if type(about) is dict else {}
        if kinds != {"size": int, "sha256": str}:
            raise Damaged(f"{MANIFEST}: {name} needs a size and a sha256")
    if _canonical(parsed) != content:
        raise Damaged(f"{MANIFEST}: it is not as it was written")
    return {name: (about["size"], about["sha256"]) for name, about in parsed["files"].items()}


# --- what the files hold -------------------------------------------------------------------------------


def from_json(name: str, content: bytes) -> Any:
    """The value in a JSON file; raises Damaged where it is not JSON, or where a key stands twice."""

    def without_doubles(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        if len(dict(pairs)) != len(pairs):
            raise ValueError
        return dict(pairs)

    try:
        return json.loads(content, object_pairs_hook=without_doubles)
    except (ValueError, RecursionError):
        raise Damaged(f"{name}: it is not JSON") from None


@dataclass(frozen=True)
class Tensor:
    """What a safetensors file says of one tensor."""

    dtype: str  # as safetensors spells it: F32, BF16, I64, ...
    shape: list[int]
    bytes: int


def tensors(name: str, content: bytes) -> dict[str, Tensor]:
    """The tensors in a safetensors file, by name in the order of names; raises Damaged.

    The safetensors library reads it, as it does when a run goes on. `name` is the file's, for messages.
    """
    import safetensors

    try:
        read = safetensors.deserialize(content)
    except safetensors.SafetensorError as error:
        # The message may repeat a tensor's name, which may be any text of any length.
        raise Damaged(f"{name}: {ascii(str(error))[1:-1][:200]}") from error
    found = {key: Tensor(about["dtype"], about["shape"], len(about["data"])) for key, about in read}
    return dict(sorted(found.items()))
