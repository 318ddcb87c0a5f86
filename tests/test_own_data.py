"""A user's own Dataset: what its items may be, and what is said of the processes that read it."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from allranks.base.errors import UserError
from allranks.data.loader import _check_labels, _check_pair, _image_shape
from allranks.data.parts import Form, Mapped
from helpers import NO_REPORT, PYTHON, Done, execute, execute_forked, only_long


class Items(torch.utils.data.Dataset):
    """Two items, the same."""

    def __init__(self, item: Any) -> None:
        self.item = item

    def __len__(self) -> int:
        return 2

    def __getitem__(self, _: int) -> Any:
        return self.item


def batch_of(item: Any, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    part = Mapped(Items(item), [0, 1], 0, Form(torch.device("cpu"), dtype, "data.train", classes=10))
    [examples] = part.batches([[0, 1]], seed=0)
    assert torch.equal(part.first(2, seed=0).images, examples.images)
    return examples


IMAGE = torch.zeros(1, 2, 2)


@pytest.mark.parametrize("label", [3, np.int32(3), torch.tensor(3, dtype=torch.uint8)])
def test_labels_that_are_whole_numbers_become_int64(label):
    labels = batch_of((IMAGE, label)).labels
    assert (labels.dtype, labels.tolist()) == (torch.int64, [3, 3])


@pytest.mark.parametrize(
    ("item", "said"),
    [
        ((IMAGE, 0.9), "the labels of the Dataset are of type torch.float64"),
        ((IMAGE, np.float32(2)), "the labels of the Dataset are of type torch.float32"),
        ((IMAGE, torch.tensor([0.1, 0.9])), r"each label of the Dataset must be one number, .* \[2, 2\]"),
        ((IMAGE, torch.tensor([1])), r"each label of the Dataset must be one number, .* \[2, 1\]"),
        ((IMAGE, -100), "the Dataset has a label -100, but labels count from 0"),
        ((IMAGE, 10), "the Dataset has a label 10, but data.classes=10 and labels count from 0"),
        ((IMAGE, "cat"), "each label of the Dataset must be a tensor or a number, .* is a (list|tuple)"),
        (
            {"image": IMAGE, "label": 1},
            "each item of the Dataset must be a pair .* is a dict with image, label",
        ),
        ((IMAGE, 1, 2), "each item of the Dataset must be a pair .* is a (list|tuple) of 3"),
        (IMAGE, "each item of the Dataset must be a pair .* is a Tensor"),
    ],
)
def test_what_is_no_image_with_a_label_is_refused(item, said):
    with pytest.raises(UserError, match=rf"^data\.train: {said}"):
        batch_of(item)


@pytest.mark.parametrize(
    ("given", "dtype", "scaled"),
    [
        (torch.uint8, torch.float64, True),
        (torch.float16, torch.float64, False),
        (torch.float32, torch.float64, False),
        (torch.int64, torch.int64, False),  # a text's tokens
        (torch.int32, torch.int32, False),
        (torch.bool, torch.bool, False),
        (torch.complex64, torch.complex64, False),
    ],
)
def test_only_pictures_are_scaled_and_only_floating_point_numbers_converted(given, dtype, scaled):
    image = torch.tensor([0, 1]).to(given)
    images = batch_of((image, 0)).images
    assert images.dtype == dtype
    assert images[0].tolist() == ([0, 1 / 255] if scaled else [0, 1])


@pytest.mark.parametrize(
    ("shape", "input_shape", "fits"),
    [
        ((9, 28, 28), [1, 28, 28], True),  # one channel, not said, as in MNIST's files
        ((9, 3, 8, 8), [3, 8, 8], True),
        ((9, 5), [5], True),
        ((9, 5), [1, 1, 5], False),
        ((9, 784), [1, 28, 28], False),
        ((9, 8, 8, 3), [3, 8, 8], False),
        ((9, 4, 7), [1, 7, 4], False),
    ],
)
def test_arrays_have_the_shape_that_the_configuration_says(shape, input_shape, fits):
    arrays = (np.zeros(shape, np.uint8), np.zeros(9, np.uint8))
    if fits:
        assert _image_shape("data.train", arrays, input_shape) == [9, *input_shape]
    else:
        with pytest.raises(UserError, match="gives images of shape"):
            _image_shape("data.train", arrays, input_shape)


def test_arrays_that_are_no_pair_are_refused():
    array = np.zeros(3, np.uint8)
    with pytest.raises(UserError, match="gives 3 arrays: two are expected"):
        _check_pair("data.train", (array, array, array))
    with pytest.raises(UserError, match=r"labels of shape \[3, 1\]"):
        _check_pair("data.train", (array, array[:, None]))
    with pytest.raises(UserError, match="must have one entry for each example"):
        _check_pair("data.train", (array, np.array(3)))
    with pytest.raises(UserError, match="has 3 images but 2 labels"):
        _check_pair("data.train", (array, array[:2]))
    with pytest.raises(UserError, match="labels of type float64, but a label is the number of a class"):
        _check_pair("data.train", (array, array.astype(np.float64)))
    with pytest.raises(UserError, match=r"gives a dict \(x: uint8 \[3\]\): a tuple of two arrays"):
        _check_pair("data.train", {"x": array})


def test_labels_of_arrays_are_those_of_so_many_classes():
    labels = np.array([0, 12, 3], np.uint8)
    with pytest.raises(UserError, match=r"data.test has a label 12, but data.classes=10"):
        _check_labels("data.test", labels, 10)
    _check_labels("data.test", labels, 13)
    _check_labels("data.test", labels, None)


# --- processes that read ---------------------------------------------------------------------------------

PACKAGE = """
import os, resource, signal, tempfile, torch

class Noise(torch.utils.data.Dataset):
    def __init__(self, count, harm=""):
        self.count, self.harm = count, harm

    def __len__(self):
        return self.count

    def __getitem__(self, n):
        if self.harm == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.harm == "descriptors":
            resource.setrlimit(resource.RLIMIT_NOFILE, (1, 1))
        if self.harm == "sockets":
            tempfile.tempdir = "/nowhere"  # where sockets would be
        return torch.rand(1, 8, 8).double(), n % 3
"""
YAML = """
input_shape: [1, 8, 8]
classes: 3
split: [48, 16]
workers: 2
train: {_target_: mylab.Noise, count: 64}
test: {_target_: mylab.Noise, count: 16}
"""


@pytest.fixture
def read(tmp_path: Path):
    """read("+data.train.harm=killed") trains on the Dataset above, read by two processes."""
    (tmp_path / "mylab.py").write_text(PACKAGE)
    (tmp_path / "conf/data").mkdir(parents=True)
    (tmp_path / "conf/data/noise.yaml").write_text(YAML)

    def run(*overrides: str, before: tuple[str, ...] = (), **env: str) -> Done:
        words = ["--config-dir", "conf", "data=noise", "model=linear", "device=cpu", "trainer.epochs=1"]
        argv = ["-m", "allranks.train", NO_REPORT, *words, *overrides]
        environ = {"PYTHONPATH": str(tmp_path), **env}
        if before:
            return execute([*before, PYTHON, *argv], tmp_path, environ, timeout_s=60)
        return execute_forked(argv, 1, tmp_path, environ, timeout_s=60)

    return run


def test_processes_read_the_data(read):
    assert read().ok().run.summary["epochs"] == 1


def test_a_folder_for_sockets_with_a_long_name_is_refused_at_once(read, tmp_path):
    long = tmp_path / ("x" * (180 - len(str(tmp_path)) - 1))
    long.mkdir()
    done = read(TMPDIR=str(long))
    assert done.code == 2
    assert (
        f"allranks: data.workers=2 needs sockets below TMPDIR={long}, whose names would have 212"
        in done.message
    )
    assert "set TMPDIR to a folder with a shorter name" in done.message
    read("data.workers=0", TMPDIR=str(long)).ok()


@pytest.mark.parametrize(
    ("size", "code", "said"),
    [
        only_long(
            "16k",
            2,
            "data.workers=2: the processes that read the data cannot start: No space left on device",
        ),
        ("64k", 1, "A process that reads the data has ended (data.workers=2): "),
    ],
)
def test_a_shared_memory_that_is_too_small_is_named(read, size, code, said):
    if os.geteuid() != 0 or shutil.which("unshare") is None:
        pytest.skip("needs root and unshare, to give a process another /dev/shm")
    small = (
        "unshare",
        "-m",
        "sh",
        "-c",
        f'mount -t tmpfs -o size={size} tmpfs /dev/shm && exec "$@"',
        "sh",
    )
    if subprocess.run([*small, "true"], capture_output=True, check=False).returncode:
        pytest.skip("nothing may be mounted here")
    done = read("trainer.batch_size=48", before=small)
    assert done.code == code
    assert said in done.message
    assert "/dev/shm, through which its batches pass, has 0.0 MiB free of" in done.message
    assert done.left_running == []


def test_a_worker_that_is_killed_ends_the_run(read):
    done = read("+data.train.harm=killed")
    assert done.code == 1
    assert "A process that reads the data has ended (data.workers=2): was killed by SIGKILL" in done.message
    assert done.left_running == []


@pytest.mark.parametrize(
    ("harm", "why", "remedy"),
    [
        ("descriptors", "Too many open files", "Raise the limit by `ulimit -n`"),
        (
            "sockets",
            "FileNotFoundError: [Errno 2] No such file",
            "Try data.workers=0, which reads in the rank",
        ),
    ],
)
def test_a_worker_that_cannot_send_its_batch_ends_the_run_and_says_why(read, harm, why, remedy):
    """torch alone prints the error on a thread of the worker, and waits for the batch for ever."""
    done = read(f"+data.train.harm={harm}")
    assert done.code == 1
    assert why in done.message
    assert remedy in done.message
    assert done.left_running == []
