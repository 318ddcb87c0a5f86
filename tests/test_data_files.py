"""IDX files: read, verified, and fetched once from mirrors that may misbehave."""

from __future__ import annotations

import dataclasses
import gzip
import hashlib
import multiprocessing
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest

from allranks.base.errors import UserError
from allranks.data import mnist
from helpers import PYTHON, real_data, tree

STEMS = [f"{part}-{kind}-ubyte" for part in ("train", "t10k") for kind in ("images-idx3", "labels-idx1")]
PAGE = b"<html>please accept our terms</html>"


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(n.to_bytes(4, "big") for n in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


# --- reading -------------------------------------------------------------------------------------------


def test_an_idx_file_is_read_back():
    images = np.arange(2 * 3 * 5, dtype=np.uint8).reshape(2, 3, 5)
    assert np.array_equal(mnist._parse_idx(Path("x"), idx(images), (2, 3, 5)), images)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "not an IDX file of 1 dimensions"),
        (b"<htm", "not an IDX file of 1 dimensions: its 4 bytes start with b'<htm"),
        (idx(np.zeros((2, 2), np.uint8)), "not an IDX file of 1 dimensions"),
        (idx(np.zeros(3, np.uint8)), "holds 3 values, but 4 belong there"),
        (idx(np.zeros(4, np.uint8))[:-1], "truncated: 11 bytes instead of 12"),
        (idx(np.zeros(4, np.uint8)) + b"?", "too long: 13 bytes instead of 12"),
        (b"\0\0\x0d\x01" + bytes(8), "not an IDX file"),  # floats
    ],
)
def test_a_wrong_idx_file_is_refused(content, problem):
    with pytest.raises(UserError, match=r"^labels\.gz ") as refused:
        mnist._parse_idx(Path("labels.gz"), content, (4,))
    assert problem in str(refused.value)


def test_a_header_that_is_cut_off_is_refused():
    with pytest.raises(UserError, match=r"labels\.gz"):
        mnist._parse_idx(Path("labels.gz"), b"\0\0\x08\x01\0\0", (4,))


def test_real_mnist():
    images, labels = mnist.load("mnist", "test", str(real_data()))
    assert (images.shape, images.dtype, labels.dtype) == ((10_000, 28, 28), np.uint8, np.uint8)
    assert labels[:10].tolist() == [7, 2, 1, 0, 4, 1, 4, 9, 5, 9]
    assert np.bincount(labels).tolist() == [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    train_images, train_labels = mnist.load("mnist", "train", str(real_data()))
    assert len(train_images) == len(train_labels) == 60_000
    assert train_images.mean() / 255 == pytest.approx(0.1307, abs=1e-4)


@pytest.fixture
def unpacked(tmp_path) -> Path:
    """A root with MNIST's four files unpacked: torchvision does that, and some people keep nothing else."""
    raw = tmp_path / "MNIST/raw"
    raw.mkdir(parents=True)
    for stem in STEMS:
        (raw / stem).write_bytes(gzip.decompress((real_data() / f"MNIST/raw/{stem}.gz").read_bytes()))
    return tmp_path


@pytest.mark.parametrize("part", ["train", "test"])
def test_unpacked_files_serve_as_well(unpacked, part):
    plain, packed = mnist.load("mnist", part, str(unpacked)), mnist.load("mnist", part, str(real_data()))
    assert np.array_equal(plain[0], packed[0])
    assert np.array_equal(plain[1], packed[1])


def test_one_wrong_bit_in_an_unpacked_file_is_found(unpacked):
    file = unpacked / "MNIST/raw/t10k-images-idx3-ubyte"
    content = bytearray(file.read_bytes())
    content[5000] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="t10k-images-idx3-ubyte is corrupted"):
        mnist.load("mnist", "test", str(unpacked))
    mnist.load("mnist", "train", str(unpacked))


def test_right_contents_in_another_gzip_are_right(unpacked):
    """As gzip packs them again with another level, or without a time."""
    raw = unpacked / "MNIST/raw"
    for stem in STEMS:
        content = (raw / stem).read_bytes()
        (raw / f"{stem}.gz").write_bytes(gzip.compress(content, 1, mtime=7))
        (raw / stem).unlink()
    images, labels = mnist.load("mnist", "test", str(unpacked))
    expected = mnist.load("mnist", "test", str(real_data()))
    assert np.array_equal(images, expected[0])
    assert np.array_equal(labels, expected[1])

    file = raw / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(gzip.decompress(file.read_bytes()))
    content[5000] ^= 1
    file.write_bytes(gzip.compress(content))  # whole, but not the published labels
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz is corrupted"):
        mnist.load("mnist", "test", str(unpacked))
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"t10k-labels-idx1-ubyte\.gz is corrupted or truncated"):
        mnist.load("mnist", "test", str(unpacked))


def test_fashion_mnist_in_another_gzip_is_known_by_its_contents(tmp_path, monkeypatch):
    """Black images stand for its own, and their sums for the known ones."""
    raw = tmp_path / "FashionMNIST/raw"
    raw.mkdir(parents=True)
    sums = {}
    for stem in STEMS:
        count = 60_000 if stem.startswith("train") else 10_000
        sizes = (count, 28, 28) if "images" in stem else (count,)
        content = idx(np.zeros(sizes, np.uint8))
        sums[stem] = hashlib.sha256(content).hexdigest()
        (raw / f"{stem}.gz").write_bytes(gzip.compress(content, 1))
    with pytest.raises(UserError, match=r"t10k-images-idx3-ubyte\.gz is corrupted"):
        mnist.load("fashion_mnist", "test", str(tmp_path))
    known = dataclasses.replace(mnist.SOURCES["fashion_mnist"], sha256=sums)
    monkeypatch.setitem(mnist.SOURCES, "fashion_mnist", known)
    assert mnist.load("fashion_mnist", "test", str(tmp_path))[0].shape == (10_000, 28, 28)


@pytest.mark.parametrize(
    ("lies_in", "root", "remedy"),
    [
        ("mnist/raw", "data", "It lies in {top}/mnist/raw: rename that folder to {top}/MNIST/raw."),
        ("MNIST/RAW", "data", "It lies in {top}/MNIST/RAW: rename that folder to {top}/MNIST/raw."),
        ("torchvision/MNIST/raw", "data", "give data.root={top}/torchvision."),
        ("MNIST/raw", "data/MNIST", "give data.root={top}."),
        ("MNIST/raw", "data/MNIST/raw", "give data.root={top}."),
        ("FashionMNIST/raw", "data", ""),
    ],
)
def test_a_file_that_lies_one_folder_off_is_named(tmp_path, monkeypatch, lies_in, root, remedy):
    folder = tmp_path / "data" / lies_in
    folder.mkdir(parents=True)
    (folder / f"{STEMS[0]}.gz").touch()
    with pytest.raises(UserError, match="is missing") as refused:
        mnist.load("mnist", "train", str(tmp_path / root))
    assert remedy.format(top=tmp_path / "data") in str(refused.value)
    assert ("It lies in" in str(refused.value)) == bool(remedy)
    # the same where fetching is tried first
    offline = mnist.Source("MNIST", ("http://127.0.0.1:1/",), mnist.SOURCES["mnist"].md5, {})
    monkeypatch.setitem(mnist.SOURCES, "mnist", offline)
    with pytest.raises(UserError, match="could not be fetched") as refused:
        mnist.load("mnist", "train", str(tmp_path / root), fetch=True)
    assert remedy.format(top=tmp_path / "data") in str(refused.value)


def test_the_home_directory_in_a_root(command, tmp_path):
    """`--root=~/data`, which no shell expands, and ALLRANKS_DATA in quotes."""
    home = {"HOME": str(tmp_path)}
    verify = [PYTHON, "-m", "allranks", "data", "verify"]
    assert f"{tmp_path}/x/MNIST/raw" in command(*verify, "--root=~/x", env=home).message
    assert f"{tmp_path}/y/MNIST/raw" in command(*verify, env={**home, "ALLRANKS_DATA": "~/y"}).message
    assert tree(tmp_path) == []


def test_verify_by_command_line(command, tmp_path):
    done = command(PYTHON, "-m", "allranks", "data", "verify", "--root", str(real_data())).ok()
    assert done.out.strip() == f"mnist is complete and intact in {real_data()}/MNIST/raw"
    missing = command(PYTHON, "-m", "allranks", "data", "verify", "--root", str(tmp_path / "none"))
    assert missing.code == 2
    assert "train-images-idx3-ubyte.gz is missing" in missing.message


# --- fetching, from a web server on this machine -------------------------------------------------------


class Mirrors:
    """A web server with the folders /good/, /page/ (an HTML page with status 200), /short/ and /gone/."""

    def __init__(self, files: dict[str, bytes]) -> None:
        asked = self.asked = Counter[str]()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                asked[self.path] += 1
                _, mirror, name = self.path.split("/")
                content = {"good": files[name], "page": PAGE, "short": files[name][:-1]}.get(mirror)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                self.wfile.write(content or b"")

            def log_message(self, *_: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def urls(self, *names: str) -> tuple[str, ...]:
        return tuple(f"http://127.0.0.1:{self.server.server_port}/{name}/" for name in names)


@pytest.fixture
def files() -> dict[str, bytes]:
    """A data set of the right form, and small once packed."""
    made = {}
    for stem in STEMS:
        count = mnist.COUNTS["train" if stem.startswith("train") else "test"]
        shape = (count, 28, 28) if "images" in stem else (count,)
        made[f"{stem}.gz"] = gzip.compress(idx(np.full(shape, 3, np.uint8)), 1)
    return made


@pytest.fixture
def mirrors(files) -> Iterator[Mirrors]:
    made = Mirrors(files)
    yield made
    made.server.shutdown()
    made.server.server_close()


@pytest.fixture
def source(mirrors, files, monkeypatch):
    """source("page", "good") lets `mnist` come from these mirrors, in this order."""
    sums = {name.removesuffix(".gz"): hashlib.md5(content).hexdigest() for name, content in files.items()}

    def use(*names: str) -> mnist.Source:
        made = mnist.Source("MNIST", mirrors.urls(*names), sums, {})
        monkeypatch.setitem(mnist.SOURCES, "mnist", made)
        return made

    return use


def test_every_file_is_fetched_once_and_then_kept(source, mirrors, files, tmp_path):
    source("good")
    images, labels = mnist.load("mnist", "test", str(tmp_path), fetch=True)
    assert (images.min(), images.max(), set(labels.tolist())) == (3, 3, {3})
    assert mirrors.asked == {f"/good/{name}": 1 for name in files}
    assert tree(tmp_path / "MNIST/raw") == sorted(files)
    for name, content in files.items():
        assert (tmp_path / "MNIST/raw" / name).read_bytes() == content
    assert mnist.fetch_files("mnist", str(tmp_path)) == []
    mnist.load("mnist", "train", str(tmp_path), fetch=True)
    assert mirrors.asked.total() == 4


def test_only_what_is_missing_is_fetched(source, mirrors, files, tmp_path):
    source("good")
    kept = tmp_path / "MNIST/raw/t10k-labels-idx1-ubyte.gz"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(files[kept.name])
    fetched = mnist.fetch_files("mnist", str(tmp_path))
    assert sorted(path.name for path in fetched) == sorted(set(files) - {kept.name})
    assert f"/good/{kept.name}" not in mirrors.asked


@pytest.mark.parametrize("bad", ["page", "short", "gone"])
def test_the_next_mirror_is_tried(source, mirrors, files, tmp_path, bad):
    """A login page sent with status 200, a download that stops short, a file that is not there."""
    source(bad, "good")
    mnist.fetch_files("mnist", str(tmp_path))
    assert mirrors.asked == {f"/{mirror}/{name}": 1 for mirror in (bad, "good") for name in files}
    assert tree(tmp_path / "MNIST/raw") == sorted(files)


def test_a_server_that_nobody_answers_for_is_passed_over(source, mirrors, files, tmp_path, monkeypatch):
    good = source("good")
    urls = ("http://127.0.0.1:1/", *good.mirrors)
    monkeypatch.setitem(mnist.SOURCES, "mnist", mnist.Source("MNIST", urls, good.md5, {}))
    mnist.fetch_files("mnist", str(tmp_path))
    assert tree(tmp_path / "MNIST/raw") == sorted(files)


def test_after_a_failure_nothing_is_left(source, mirrors, tmp_path):
    source("page", "gone")
    with pytest.raises(UserError) as refused:
        mnist.load("mnist", "train", str(tmp_path), fetch=True)
    message = str(refused.value)
    for word in (
        "train-images-idx3-ubyte.gz is missing and could not be fetched",
        "/page/train-images-idx3-ubyte.gz: what it sent is not the published file",
        "/gone/train-images-idx3-ubyte.gz: ",
        f"allranks data fetch mnist --root {tmp_path}",
        "data=synthetic",
    ):
        assert word in message
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_the_files_before_a_failure_are_whole(source, mirrors, files, tmp_path):
    """The connection breaks after two files: those are there, and the third is not."""
    source("good")
    order = list(mnist.SOURCES["mnist"].md5)
    del files[f"{order[2]}.gz"]  # the server now fails on it
    with pytest.raises(UserError, match=order[2]):
        mnist.fetch_files("mnist", str(tmp_path))
    assert tree(tmp_path / "MNIST/raw") == sorted(f"{stem}.gz" for stem in order[:2])
    assert (tmp_path / f"MNIST/raw/{order[0]}.gz").read_bytes() == files[f"{order[0]}.gz"]


def _fetch(made: mnist.Source, root: str, start: object) -> None:
    mnist.SOURCES["mnist"] = made
    start.wait()  # type: ignore[attr-defined]
    mnist.fetch_files("mnist", root)


def test_four_processes_at_once_ask_for_each_file_once(source, mirrors, files, tmp_path):
    made = source("good")
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(4)
    target = partial(_fetch, made, str(tmp_path), start)
    processes = [context.Process(target=target) for _ in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0, 0, 0]
    assert mirrors.asked == {f"/good/{name}": 1 for name in files}
    assert tree(tmp_path / "MNIST/raw") == sorted(files)


# Says that it begins, waits for the lock, and says whether the file whose lock it has is there.
WAIT_FOR_LOCK = """
import sys
from pathlib import Path
from allranks.data import mnist
path = Path(sys.argv[1])
print("begins", flush=True)
with mnist._lock(path):
    print(path.exists(), flush=True)
    sys.stdin.read()
"""


def test_who_waits_for_the_lock_has_it_alone_even_if_its_folder_is_removed(tmp_path):
    """Otherwise a third process finds no lock file, makes one, and fetches at the same time."""
    path = tmp_path / "MNIST/raw/.fetch.lock"
    with mnist._lock(path):
        waiting = subprocess.Popen(
            [PYTHON, "-c", WAIT_FOR_LOCK, str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert waiting.stdout.readline() == "begins\n"
        time.sleep(0.3)  # until it waits; were it later, the test would see nothing
    with suppress(OSError):  # it may have made its own lock file already
        path.parent.rmdir()
    with waiting:
        assert waiting.stdout.readline() == "True\n"
        waiting.stdin.close()
    assert waiting.returncode == 0 and not path.exists()


def test_a_root_that_may_not_be_looked_into_is_told(closed):
    for call in (mnist.verify, mnist.fetch_files):
        with pytest.raises(UserError, match=r"closed/MNIST/raw.* cannot be read \(Permission denied\)"):
            call("mnist", str(closed))
    with pytest.raises(UserError, match=r"closed/MNIST/raw.* cannot be read \(Permission denied\)"):
        mnist.load("mnist", "train", str(closed), fetch=True)


def test_a_folder_that_cannot_be_written(source, mirrors):
    source("good")
    with pytest.raises(UserError, match=r"/proc/data/MNIST/raw cannot be written.*data\.root"):
        mnist.fetch_files("mnist", "/proc/data")
    assert mirrors.asked.total() == 0
