"""MNIST and Fashion-MNIST: fetched once, verified at each start, and read. Needs numpy only, no torch.

The files are the published IDX files, kept where torchvision keeps them: ROOT/MNIST/raw/. The md5 sums
and mirrors are those that torchvision lists (torchvision.datasets.MNIST.resources).

What a file holds decides whether it is right. The published .gz has a known md5; one that somebody packed
again has another, and its unpacked contents are compared with their published sha256.
"""

from __future__ import annotations

import fcntl
import gzip
import hashlib
import http.client
import os
import urllib.error
import urllib.request
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from allranks.base import files
from allranks.base.errors import UserError
from allranks.base.text import did_you_mean

CONNECT_S = 5  # a compute node without internet must say so within seconds
CLASSES = 10
# At most so many folders are searched for a misplaced file, so that the message comes soon.
_MOST_FOLDERS = 50
COUNTS = {"train": 60_000, "test": 10_000}
_STEMS = {
    ("train", "images"): "train-images-idx3-ubyte",
    ("train", "labels"): "train-labels-idx1-ubyte",
    ("test", "images"): "t10k-images-idx3-ubyte",
    ("test", "labels"): "t10k-labels-idx1-ubyte",
}


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, and by which sums its files are known."""

    folder: str
    mirrors: tuple[str, ...]
    md5: dict[str, str]  # of the published .gz files, by the name without .gz
    sha256: dict[str, str]  # of their unpacked contents, by the same name; empty if they are not known
    # Whether files that lie there unpacked must have these sums, too. If not, another set of the same form
    # may stand in the place of this one.
    checks_unpacked: bool = True


SOURCES = {
    "mnist": Source(
        "MNIST",
        (
            "https://ossci-datasets.s3.amazonaws.com/mnist/",
            "https://storage.googleapis.com/cvdf-datasets/mnist/",
        ),
        {
            "train-images-idx3-ubyte": "f68b3c2dcbeaaa9fbdd348bbdeb94873",
            "train-labels-idx1-ubyte": "d53e105ee54ea40749a09fcbcd1e9432",
            "t10k-images-idx3-ubyte": "9fb629c4189551a2d022fa330f9573f3",
            "t10k-labels-idx1-ubyte": "ec29112dd5afa0611ce80d1b7f02629c",
        },
        {
            "train-images-idx3-ubyte": "ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db",
            "train-labels-idx1-ubyte": "65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5",
            "t10k-images-idx3-ubyte": "0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7",
            "t10k-labels-idx1-ubyte": "ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2",
        },
    ),
    "fashion_mnist": Source(
        "FashionMNIST",
        ("http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",),
        {
            "train-images-idx3-ubyte": "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
            "train-labels-idx1-ubyte": "25c81989df183df01b3e8a0aad5dffbe",
            "t10k-images-idx3-ubyte": "bef4ecab320f06d8554ea6380940ec79",
            "t10k-labels-idx1-ubyte": "bb300cfdad3c16e7a12a480ee83cd310",
        },
        # Nobody publishes these. They are of the contents of Debian's package dataset-fashion-mnist. Packed
        # by gzip -6 with the names and times of the published files (31 August 2017, 10:50:06 UTC, and
        # 10:50:27 for the test set), these contents have the md5 sums above.
        {
            "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
            "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
            "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
            "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
        },
        checks_unpacked=False,
    ),
}


def load(name: str, part: str, root: str, fetch: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [N, 28, 28] and labels uint8 [N]; part is `train` (60,000) or `test` (10,000).

    Files that are missing are fetched if `fetch` allows it. Raises UserError naming the file for
    whatever is missing, truncated, corrupted or does not fit together.
    """
    source = _source(name)
    folder = Path(root) / source.folder / "raw"
    if fetch and not _all_there(folder):
        fetch_files(name, root)
    arrays = []
    for kind, shape in (("images", (COUNTS[part], 28, 28)), ("labels", (COUNTS[part],))):
        path, content = _read(folder, _STEMS[part, kind], source, name, root)
        arrays.append(_parse_idx(path, content, shape, _fetch_again(name, root)))
        if path.suffix != ".gz" and source.checks_unpacked and _differs(source, path.name, content):
            raise UserError(
                f"{path} is corrupted: it differs from the published data. {_fetch_again(name, root)}"
            )
    images, labels = arrays
    if labels.max() >= CLASSES:
        raise UserError(
            f"{folder}: the {part} labels go up to {labels.max()}, but digits are 0 to 9. "
            + _fetch_again(name, root)
        )
    return images, labels


def fetch_files(name: str, root: str) -> list[Path]:
    """Fetches what is missing into ROOT/<set>/raw, one process at a time, and returns the new files.

    Each file is written under a temporary name, checked, then renamed: nobody ever sees half a file.
    """
    source = _source(name)
    folder = Path(root) / source.folder / "raw"
    new = []
    made = [p for p in (folder, *folder.parents) if not _is_there(p)]  # innermost first
    try:
        with _lock(folder / ".fetch.lock"):
            for stem, md5 in source.md5.items():
                path = folder / f"{stem}.gz"
                if not _is_there(path) and not _is_there(folder / stem):
                    _fetch_one(path, md5, source.mirrors, name, root)
                    new.append(path)
    except OSError as error:
        raise UserError(
            f"{folder} cannot be written ({error.strerror}): give another data.root."
        ) from error
    finally:
        if not new:  # leave no empty folders behind
            with suppress(OSError):
                for made_here in made:
                    made_here.rmdir()
    return new


def verify(name: str, root: str) -> Path:
    """Reads and checks both parts; returns their folder."""
    for part in COUNTS:
        load(name, part, root)
    return Path(root) / _source(name).folder / "raw"


def _source(name: str) -> Source:
    if name not in SOURCES:
        known = ", ".join(SOURCES)
        raise UserError(
            f"{name} is not a known data set: take one of {known}.{did_you_mean(name, SOURCES)}"
        )
    return SOURCES[name]


def _all_there(folder: Path) -> bool:
    return all(_is_there(folder / s) or _is_there(folder / f"{s}.gz") for s in _STEMS.values())


def _is_there(path: Path) -> bool:
    """Whether the file or folder is there. Raises UserError if its folder may not be looked into."""
    try:
        path.stat()
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise _unreadable(path, error) from error
    return True


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror}): give another data.root.")


def _differs(source: Source, stem: str, content: bytes) -> bool:
    """Whether unpacked contents are known to be other than the published ones."""
    published = source.sha256.get(stem)
    return published is not None and hashlib.sha256(content).hexdigest() != published


def _read(folder: Path, stem: str, source: Source, name: str, root: str) -> tuple[Path, bytes]:
    """The file of this name, packed or not, and its unpacked contents; what was packed is checked."""
    packed, plain = folder / f"{stem}.gz", folder / stem
    path = packed if _is_there(packed) else plain
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        raise UserError(
            f"{packed} is missing.{_near_miss(source, stem, root)} {_get_it(name, root)}"
        ) from None
    except OSError as error:
        raise _unreadable(path, error) from error
    if path == plain:
        return path, content
    is_published = hashlib.md5(content, usedforsecurity=False).hexdigest() == source.md5[stem]
    corrupted = UserError(
        f"{path} is corrupted or truncated ({len(content):,} bytes, its md5 differs from the "
        f"published one). {_fetch_again(name, root)}"
    )
    try:
        unpacked = gzip.decompress(content)
    except (OSError, EOFError, zlib.error) as error:
        if not is_published:
            raise corrupted from error
        raise UserError(f"{path} cannot be unpacked ({error}). {_fetch_again(name, root)}") from error
    if not is_published and (stem not in source.sha256 or _differs(source, stem, unpacked)):
        raise corrupted
    return path, unpacked


def _near_miss(source: Source, stem: str, root: str) -> str:
    """Where the file lies instead, if data.root is one folder off or a name is in another case; else ""."""
    top = Path(root).absolute()
    for above in (top, top.parent, top.parent.parent, *_folders(top)):
        for folder in _folders(above, source.folder):
            for raw in _folders(folder, "raw"):
                if not _holds(raw, stem):
                    continue
                if (folder.name, raw.name) == (source.folder, "raw"):
                    return f" It lies in {raw}: give data.root={above}."
                return f" It lies in {raw}: rename that folder to {above}/{source.folder}/raw."
    return ""


def _holds(folder: Path, stem: str) -> bool:
    """Whether the file is in the folder, packed or not; false where the folder may not be looked into."""
    try:
        return _is_there(folder / stem) or _is_there(folder / f"{stem}.gz")
    except UserError:
        return False


def _folders(path: Path, name: str | None = None) -> list[Path]:
    """The folders in a folder, those with this name in any case; none where it cannot be looked into."""
    try:
        with os.scandir(path) as entries:
            found = [
                Path(entry.path)
                for entry in entries
                if (name is None or entry.name.lower() == name.lower()) and entry.is_dir()
            ]
    except OSError:
        return []
    return sorted(found)[:_MOST_FOLDERS]


def _parse_idx(path: Path, content: bytes, shape: tuple[int, ...], remedy: str = "") -> np.ndarray:
    """The array in an IDX file of bytes: magic 0 0 8 <dimensions>, sizes as big-endian int32, data."""
    head = 4 + 4 * len(shape)
    if len(content) < head or content[:4] != bytes((0, 0, 8, len(shape))):
        raise UserError(
            f"{path} is not an IDX file of {len(shape)} dimensions: its {len(content):,} bytes start with "
            f"{content[:4]!r}. {remedy}"
        )
    sizes = tuple(int(n) for n in np.frombuffer(content[4:head], dtype=">i4"))
    if sizes != shape:
        raise UserError(
            f"{path} says that it holds {_times(sizes)} values, but {_times(shape)} belong there."
        )
    expected = head + int(np.prod(shape))
    if len(content) != expected:
        raise UserError(
            f"{path} is {'truncated' if len(content) < expected else 'too long'}: {len(content):,} bytes "
            f"instead of {expected:,}. {remedy}"
        )
    return np.frombuffer(content, dtype=np.uint8, offset=head).reshape(shape)


def _times(sizes: tuple[int, ...]) -> str:
    return " x ".join(f"{n:,}" for n in sizes)


def _get_it(name: str, root: str) -> str:
    return (
        f"On a node with internet type `allranks data fetch {name} --root {root}`, or set data.root (or "
        "ALLRANKS_DATA) to where it is; data=synthetic needs no files."
    )


def _fetch_again(name: str, root: str) -> str:
    return f"Remove it and type `allranks data fetch {name} --root {root}`."


def _fetch_one(path: Path, md5: str, mirrors: tuple[str, ...], name: str, root: str) -> None:
    problems = []
    for mirror in mirrors:
        url = mirror + path.name
        try:
            with urllib.request.urlopen(url, timeout=CONNECT_S) as response:
                content = response.read()
        except (OSError, urllib.error.URLError, http.client.HTTPException) as error:
            problems.append(f"{url}: {getattr(error, 'reason', error)}")
            continue
        if hashlib.md5(content, usedforsecurity=False).hexdigest() != md5:
            problems.append(f"{url}: what it sent is not the published file")
            continue
        files.write_bytes(path, content)
        return
    near = _near_miss(_source(name), path.stem, root)
    raise UserError(
        f"{path} is missing and could not be fetched ({'; '.join(problems)}).{near} {_get_it(name, root)}"
    )


@contextmanager
def _lock(path: Path) -> Iterator[None]:
    """One process at a time, on one host or over a file system with POSIX locks.

    The folder of the lock file is made. The process that holds the lock removes the file before it lets go,
    and may remove the folder after that. A process that waited then has the lock of a file that no other
    process can find any more, so it looks whether that is so, and begins again.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            file = path.open("w")
        except FileNotFoundError:
            continue  # between the two lines another process has removed the folder
        with file:
            fcntl.lockf(file, fcntl.LOCK_EX)
            if not _is_file_at(path, file.fileno()):
                continue
            try:
                yield
            finally:
                path.unlink(missing_ok=True)
        return


def _is_file_at(path: Path, descriptor: int) -> bool:
    """Whether the open file is the one that has this name now."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False
