"""What a user can get wrong, typed on the command line.

Each mistake ends with exit code 2, one message that says what is wrong, with which value, and what to do,
no traceback, and nothing left behind; on several ranks the message comes once and all ranks are down.

Three mistakes of each kind are typed as command lines, some of them under a real launcher. The others raise
the UserError whose text is that message in this process.
"""

from __future__ import annotations

import gzip
import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from allranks import train as training
from allranks.base.errors import UserError
from allranks.compose import from_command_line
from allranks.job.identity import discover
from helpers import PYTHON, SMALL, Done, execute, forked_python, mpiexec, only_long, real_data, tree

FASHION = "FashionMNIST/raw"
DIGITS = "MNIST/raw"


def assert_said(message: str, *patterns: str) -> None:
    for pattern in patterns:
        assert re.search(pattern, message), f"{pattern!r} is not in: {message}"


def assert_refused(done: Done, *patterns: str) -> None:
    assert_said(done.message, *patterns)
    assert done.code == 2
    assert done.left_running == []


def assert_nothing_left(done: Done) -> None:
    assert tree(done.cwd) == []


@pytest.fixture
def refusal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """refusal("model=mpl", RANK="1"): what a training in this process is refused with, leaving nothing."""

    def of(*overrides: str, **env: str) -> str:
        monkeypatch.chdir(tmp_path)
        for name, value in env.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(UserError) as refused:
            launch = discover(os.environ)
            for config in from_command_line(overrides):
                training.run(config, launch)
        assert tree(tmp_path) == []
        return str(refused.value)

    return of


# --- values, by the configuration alone ----------------------------------------------------------------

AS_TYPED = ("--epochs=3", "model=mpl", "optimizer.lr=nan")  # of these, as real command lines


@pytest.mark.parametrize(
    ("override", "patterns"),
    [
        ("--epochs=3", ["--epochs is not an option", r"trainer\.epochs="]),
        ("optimizer.lr=0.1,0.2", ["add -m for a run of each value"]),
        ("run.dir=runs/x=1", ["cannot be read as an override", "in quotes"]),
        ("threads=100000", ["threads=100000", "<= 1024"]),
        ("trainer.virtual_ranks=1073741824", ["trainer.virtual_ranks=1073741824", "a power of two"]),
        ("watchdog.save_s=1e300", [r"watchdog.save_s=1e\+300"]),
        ("data.train=null", ["data.train._target_ is missing"]),
        ("~data.train", ["data.train._target_ is missing"]),
        ("+optimizer._partial_=true", ["optimizer._partial_ is not valid"]),
        # misspelt: the nearest right name is given
        ("trainer.epoch=3", ["trainer.epoch is not a key", "trainer.epochs"]),
        ("optimzer.lr=0.1", ["optimzer", "optimizer"]),
        ("learning_rate=0.1", ["learning_rate is not a key"]),
        ("lr=0.1", ["lr is not a key", r"optimizer\.lr"]),
        ("model.dropuot=0.1", ["model.dropuot", r"model\.dropout"]),
        ("model=mpl", ["model=mpl", "cnn, linear, mlp, resnet18, vit", "Did you mean mlp"]),
        ("optimizer=adamx", ["optimizer=adamx", "adam"]),
        ("scheduler=cosin", ["scheduler=cosin", "Did you mean cosine"]),
        ("data=mnst", ["data=mnst", "Did you mean mnist"]),
        ("experiment=tutorial_lin", ["experiment=tutorial_lin", "Did you mean tutorial_linear"]),
        ("device=gpu", ["device=gpu", "cuda, xpu, mps, cpu"]),
        ("runtime=nativ", ["runtime=nativ", "Did you mean native"]),
        ("trainer.precision=bfloat16", ["trainer.precision=bfloat16", "bf16"]),
        ("trainer.train_metrics=runing", ["runing", "Did you mean running"]),
        ("scheduler.interval=batch", ["scheduler.interval=batch", "epoch, step"]),
        # a wrong type
        ("trainer.epochs=many", ["trainer.epochs=many", "whole number >= 0"]),
        ("trainer.epochs=1.5", [r"trainer.epochs=1\.5", "whole number"]),
        ("trainer.batch_size=null", ["trainer.batch_size", "whole number >= 1"]),
        ("trainer.compile=maybe", ["trainer.compile=maybe"]),
        ("optimizer.lr=fast", ["optimizer.lr=fast", "number > 0"]),
        ("model.widths=50", ["model.widths=50", "list"]),
        ("trainer=5", ["trainer=5"]),
        ("seed=-1", ["seed=-1", "whole number from 0"]),
        # a value that cannot work
        ("optimizer.lr=nan", ["optimizer.lr=nan", "finite number > 0"]),
        ("optimizer.lr=inf", ["optimizer.lr=inf", "finite number > 0"]),
        ("optimizer.lr=0", ["optimizer.lr=0", "finite number > 0"]),
        ("optimizer.lr=-1", ["optimizer.lr=-1", "finite number > 0"]),
        ("optimizer.weight_decay=-0.1", ["optimizer.weight_decay=-0.1", ">= 0"]),
        ("trainer.epochs=-1", ["trainer.epochs=-1", "whole number >= 0"]),
        ("trainer.batch_size=0", ["trainer.batch_size=0", "whole number >= 1"]),
        ("trainer.batch_size=-128", ["trainer.batch_size=-128", "whole number >= 1"]),
        ("trainer.per_rank_batch_size=0", ["trainer.per_rank_batch_size=0", "whole number >= 1"]),
        ("trainer.accumulate=0", ["trainer.accumulate=0", "whole number >= 1"]),
        ("trainer.clip_norm=0", ["trainer.clip_norm=0", "number > 0"]),
        ("trainer.label_smoothing=1", ["trainer.label_smoothing=1", "< 1"]),
        ("model.dropout=1.5", ["model.dropout=1.5", ">= 0 and < 1"]),
        ("data.split=[48000]", [r"data.split=\[48000\]", "list of 2"]),
        ("data.split=[60000,0]", [r"data.split=\[60000, 0\]", "whole number >= 1"]),
        ("name=a/b", ["name=a/b", "without a slash"]),
        # not an override at all
        ("trainer.epochs", ["trainer.epochs", "key=value"]),
    ],
)  # fmt: skip
def test_a_bad_value(train, refusal, override, patterns):
    assert_said(refusal(override), *patterns)
    if override in AS_TYPED:
        done = train(override, under="python")
        assert_refused(done, *patterns)
        assert_nothing_left(done)


def test_the_allranks_command_says_the_same(command, train):
    typed = command(PYTHON, "-m", "allranks", "train", "optimizer.lr=-1")
    assert_refused(typed, "optimizer.lr=-1")
    assert typed.err == train("optimizer.lr=-1", under="python").err


def test_an_unknown_data_set_to_fetch(command):
    done = command(PYTHON, "-m", "allranks", "data", "fetch", "fashion")
    assert_refused(done, "fashion is not a known data set", "fashion_mnist")
    assert_nothing_left(done)


# --- values that show once torch, the data or the ranks are there --------------------------------------


@pytest.mark.parametrize(
    ("overrides", "patterns"),
    [
        (["model.activation=Relu"], ["model.activation=Relu", "Did you mean ReLU"]),
        (["model.activation=Softmax"], ["model.activation=Softmax"]),
        (["model.activation=[ReLU,Tanh]"], ["2 entries for 3 hidden layers"]),
        (["data.split=[1000,400]"], [r"data.split=\[1000, 400\]", "1,400", "1,600"]),
        (["model=vit", "model.patch=5"], ["model.patch=5", "28 x 28"]),
        (["data.input_shape=[1,14,14]"], [r"input_shape=\[1, 14, 14\]", "28"]),
        (["device=cuda"], ["device=cuda", "cpu"]),
        (["trainer.precision=fp16"], ["trainer.precision=fp16", "bf16"]),
        (["runtime=ezpz"], ["runtime=ezpz", "pip install", "native"]),
        (["model._target_=allranks.models.perceptron"], ["model._target_=allranks.models.perceptron"]),
        (["optimizer._target_=torch.optim.SDG"], ["optimizer._target_=torch.optim.SDG"]),
        (["+model.wdith=3"], ["model: allranks.models.mlp refuses its arguments", "wdith"]),
        (["model.widths=[99999999999]"], ["model: allranks.models.mlp refuses its arguments", "memory"]),
        (["optimizer=adam", "+optimizer.foreach=true"], ["torch.optim.Adam refuses its arguments"]),
        (
            [
                "scheduler=onecycle",
                "scheduler.interval=epoch",
                "trainer.epochs=10",
                "scheduler.pct_start=0.1",
            ],
            ["OneCycleLR refuses its arguments"],
        ),
    ],
)
def test_a_bad_value_that_needs_torch_to_see(train, refusal, overrides, patterns):
    if overrides == ["device=cuda"]:
        import torch

        if torch.cuda.is_available():
            pytest.skip("there is a GPU")
    if overrides == ["runtime=ezpz"]:
        from allranks.runtime import ezpz

        if ezpz.installed().kind == "real":
            pytest.skip("the real ezpz is installed")
    assert_said(refusal(*SMALL, *overrides), *patterns)
    if overrides[0] in ("model.activation=Relu", "data.split=[1000,400]", "device=cuda"):
        done = train(*SMALL, *overrides, under="python" if overrides == ["device=cuda"] else None)
        assert_refused(done, *patterns)
        assert_nothing_left(done)


@pytest.mark.parametrize(
    ("overrides", "patterns"),
    [
        (["data.classes=5"], [r"data.train has a label 9, but data.classes=5 and labels count from 0"]),
        (["scheduler=cosine", "scheduler.T_max=0"], ["CosineAnnealingLR cannot go on"]),
        (["scheduler=onecycle", "scheduler.total_steps=2"], ["OneCycleLR cannot go on", "2"]),
        (["scheduler=plateau", "~scheduler.monitor"], ["ReduceLROnPlateau cannot go on", "metrics"]),
    ],
)
def test_a_bad_value_that_only_training_shows(train, train_here, overrides, patterns):
    if overrides == ["data.classes=5"]:
        assert_refused(train(*SMALL, *overrides), *patterns)
        return
    with pytest.raises(UserError) as refused:
        train_here(*SMALL, *overrides)
    assert_said(str(refused.value), *patterns)


# --- data files ----------------------------------------------------------------------------------------


def idx(magic: bytes, sizes: tuple[int, ...], content: bytes) -> bytes:
    return magic + b"".join(n.to_bytes(4, "big") for n in sizes) + content


def fashion_files(root: Path, *, labels: int = 60_000, largest: int = 9) -> Path:
    """Raw files of the right form (no checksum is published for them), all black."""
    folder = root / FASHION
    folder.mkdir(parents=True)
    for stem, count in (("train", 60_000), ("t10k", 10_000)):
        pixels = bytes(count * 784)
        (folder / f"{stem}-images-idx3-ubyte").write_bytes(idx(b"\0\0\x08\x03", (count, 28, 28), pixels))
        there = labels if stem == "train" else count
        values = bytes([largest]) + bytes(there - 1)
        (folder / f"{stem}-labels-idx1-ubyte").write_bytes(idx(b"\0\0\x08\x01", (there,), values))
    return folder


@pytest.fixture
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def words_for(name: str, root: Path) -> list[str]:
    return [f"data={name}", f"data.root={root}", "data.fetch=false", "device=cpu"]


def test_missing_data(train, root):
    done = train(*words_for("mnist", root))
    assert_refused(done, rf"{root}/{DIGITS}/train-images-idx3-ubyte.gz is missing",
                   rf"allranks data fetch mnist --root {root}", "data=synthetic")  # fmt: skip
    assert_nothing_left(done)
    assert tree(root) == []


NO_NETWORK = {"https_proxy": "http://127.0.0.1:9", "http_proxy": "http://127.0.0.1:9", "no_proxy": ""}


def test_no_network(refusal, root):
    """Mirrors that cannot be reached: here the name does not resolve, or the proxy refuses."""
    said = refusal("data=mnist", f"data.root={root}", "data.fetch=true", "device=cpu", **NO_NETWORK)
    assert_said(said, "train-images-idx3-ubyte.gz is missing and could not be fetched", str(root),
                "allranks data fetch mnist", "data=synthetic")  # fmt: skip
    assert tree(root) == []


@pytest.mark.long
def test_no_network_on_several_ranks(train, root):
    words = ["data=mnist", f"data.root={root}", "device=cpu"]
    done = train(*words, under="mpiexec", ranks=2, env=NO_NETWORK)
    assert_refused(done, "could not be fetched")
    assert_nothing_left(done)


def test_a_truncated_download(train, root):
    shutil.copytree(real_data() / DIGITS, root / DIGITS)
    file = root / DIGITS / "train-images-idx3-ubyte.gz"
    file.write_bytes(file.read_bytes()[:-1000])
    done = train(*words_for("mnist", root))
    assert_refused(done, str(file), "truncated", "Remove it", "allranks data fetch mnist")
    assert_nothing_left(done)


def test_a_corrupted_download(refusal, root):
    shutil.copytree(real_data() / DIGITS, root / DIGITS)
    file = root / DIGITS / "t10k-labels-idx1-ubyte.gz"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1  # one bit
    file.write_bytes(content)
    assert_said(refusal(*words_for("mnist", root)), str(file), "corrupted", "allranks data fetch mnist")


def test_other_data_in_a_valid_gzip(refusal, root):
    folder = fashion_files(root)
    file = folder / "train-labels-idx1-ubyte.gz"
    file.write_bytes(gzip.compress((folder / "train-labels-idx1-ubyte").read_bytes()))
    assert_said(
        refusal(*words_for("fashion_mnist", root)),
        str(file),
        "md5",
        "allranks data fetch fashion_mnist",
    )


def test_a_web_page_saved_as_gz(refusal, root):
    folder = root / DIGITS
    folder.mkdir(parents=True)
    for stem in ("train-images-idx3", "train-labels-idx1", "t10k-images-idx3", "t10k-labels-idx1"):
        (folder / f"{stem}-ubyte.gz").write_text("<html><body>Please log in</body></html>")
    assert_said(
        refusal(*words_for("mnist", root)),
        "train-images-idx3-ubyte.gz is corrupted",
        "allranks data fetch mnist",
    )


def test_a_truncated_raw_file(refusal, root):
    file = fashion_files(root) / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    assert_said(
        refusal(*words_for("fashion_mnist", root)),
        str(file),
        "truncated",
        "47,040,015 bytes",
        "47,040,016",
        "Remove it",
    )


def test_a_raw_file_with_the_wrong_magic(refusal, root):
    file = fashion_files(root) / "t10k-images-idx3-ubyte"
    file.write_bytes(b"\x89PNG" + file.read_bytes()[4:])
    assert_said(refusal(*words_for("fashion_mnist", root)), str(file), "not an IDX file", "PNG")


def test_an_empty_raw_file(refusal, root):
    file = fashion_files(root) / "t10k-labels-idx1-ubyte"
    file.write_bytes(b"")
    assert_said(refusal(*words_for("fashion_mnist", root)), str(file), "not an IDX file")


def test_labels_above_nine(train, root):
    folder = fashion_files(root, largest=10)
    done = train(*words_for("fashion_mnist", root))
    assert_refused(done, str(folder), "labels go up to 10", "0 to 9")
    assert_nothing_left(done)


def test_fewer_labels_than_images(refusal, root):
    folder = fashion_files(root, labels=59_999)
    assert_said(
        refusal(*words_for("fashion_mnist", root)),
        str(folder / "train-labels-idx1-ubyte"),
        "59,999",
        "60,000",
    )


def test_bad_data_on_several_ranks_is_said_once(train, root):
    fashion_files(root, largest=10)
    done = train(*words_for("fashion_mnist", root), ranks=2)
    assert_refused(done, "labels go up to 10")
    assert_nothing_left(done)


# --- the run directory ---------------------------------------------------------------------------------


def test_a_run_directory_that_is_used(train, train_here, tmp_path):
    used = tmp_path / "mine"
    train_here(*SMALL, "trainer.epochs=0", f"run.dir={used}")
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert_refused(train(*SMALL, f"run.dir={used}"), f"run.dir={used} holds a run of another configuration")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_run_directory_that_is_a_file(train, tmp_path):
    (tmp_path / "file").write_text("keep me")
    assert_refused(train(*SMALL, "run.dir=file"), f"run.dir={tmp_path}/file is a file", "directory")
    below = f"run.dir={tmp_path}/file/below"
    assert_refused(train(*SMALL, "run.dir=file/below"), below, "give another|Give another")
    assert tree(tmp_path) == ["file"]
    assert (tmp_path / "file").read_text() == "keep me"


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_run_directory_that_cannot_be_made(train, ranks):
    done = train(*SMALL, "run.dir=/proc/allranks/run", ranks=ranks)
    assert_refused(done, "run.dir=/proc/allranks/run", "another run.dir")
    assert_nothing_left(done)


# --- ranks and launchers -------------------------------------------------------------------------------


def test_a_batch_smaller_than_the_ranks(train):
    done = train(*SMALL, "trainer.batch_size=2", ranks=3)
    assert_refused(done, "trainer.batch_size=2", "3 ranks", "at least 3")
    assert_nothing_left(done)


@pytest.mark.parametrize("under", ["mpiexec", "torchrun"])
def test_a_bad_value_on_several_ranks_is_said_once(train, under):
    done = train("optimizer.lr=nan", under=under, ranks=2)
    assert done.messages == ["allranks: optimizer.lr=nan is not valid: give a finite number > 0."]
    assert done.code == (2 if under == "mpiexec" else 1)  # torchrun has one code for any failure
    assert done.left_running == []
    assert_nothing_left(done)
    if under == "mpiexec":  # torchrun adds its own report, with the traceback of its own error
        assert "Traceback" not in done.err


@pytest.mark.parametrize(
    ("overrides", "what"),
    [
        (["model.activation=Relu"], "Did you mean ReLU"),
        (["data.split=[1,2]"], r"data.split=\[1, 2\]"),
    ],
)
def test_what_shows_late_is_said_once_too(train, overrides, what):
    done = train(*SMALL, *overrides, ranks=2)
    assert_refused(done, what)
    assert_nothing_left(done)


@pytest.mark.parametrize(
    ("stale", "patterns"),
    [
        ({"RANK": "1"}, ["RANK=1", "WORLD_SIZE is not", "unset RANK"]),
        ({"WORLD_SIZE": "4"}, ["WORLD_SIZE=4", "RANK is not", "unset WORLD_SIZE"]),
        ({"RANK": "4", "WORLD_SIZE": "4"}, ["RANK=4", "WORLD_SIZE=4"]),
        ({"RANK": "0", "WORLD_SIZE": "2"}, ["MASTER_ADDR and MASTER_PORT"]),
        (
            {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "abc"},
            ["MASTER_PORT=abc", "a port's number"],
        ),
        (
            {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "99999"},
            ["MASTER_PORT=99999", "a port's number"],
        ),
        (
            {
                "TORCHELASTIC_RUN_ID": "x",
                "TORCHELASTIC_USE_AGENT_STORE": "True",
                "RANK": "1",
                "WORLD_SIZE": "2",
                "LOCAL_RANK": "1",
                "LOCAL_WORLD_SIZE": "2",
                "MASTER_PORT": "2999",
                "MASTER_ADDR": "nowhere.invalid",
            },
            ["torchrun cannot be reached at nowhere.invalid:2999"],
        ),
        ({"RANK": "zero", "WORLD_SIZE": "2"}, ["RANK='zero'", "whole number"]),
    ],
)
def test_rank_variables_without_a_launcher(train, refusal, stale, patterns):
    assert_said(refusal(*SMALL, **stale), *patterns)
    if stale.get("MASTER_PORT") in ("abc", "2999") or stale == {"RANK": "1"}:
        done = train(*SMALL, env=stale, under="python" if stale == {"RANK": "1"} else None)
        assert_refused(done, *patterns)
        assert_nothing_left(done)


@pytest.mark.parametrize(
    "stale",
    [
        {"RANK": "0"},
        only_long({"RANK": "1"}),
        only_long({"RANK": "0", "WORLD_SIZE": "1"}),
        only_long({"RANK": "5", "WORLD_SIZE": "8"}),
        {"WORLD_SIZE": "8"},
    ],
    ids=lambda stale: "-".join(f"{name}={value}" for name, value in stale.items()),
)
def test_stale_rank_variables_under_mpiexec(train, stale):
    """One of the ranks may find that a stale RANK fits it: it must not wait for the others for ever."""
    done = train(*SMALL, under="mpiexec", ranks=2, env=stale, timeout_s=40)
    left_over = "WORLD_SIZE=" if set(stale) == {"WORLD_SIZE"} else "RANK="
    assert_refused(done, left_over, "left over", "unset RANK LOCAL_RANK WORLD_SIZE")
    assert_nothing_left(done)


@pytest.mark.long
def test_right_rank_variables_under_mpiexec_do_no_harm(train):
    done = train(*SMALL, "trainer.epochs=0", under="mpiexec", ranks=2, env={"WORLD_SIZE": "2"}).ok()
    assert done.run.summary["world_size"] == 2


def test_mpi4py_bound_to_another_mpi(tmp_path):
    """Open MPI's mpiexec starts the ranks, but this environment's mpi4py belongs to MPICH's wheel."""
    other = shutil.which("mpiexec.openmpi")
    if other is None:
        pytest.skip("no mpiexec.openmpi: apt-get install openmpi-bin")
    done = execute(
        [other, "--oversubscribe", "-n", "2", PYTHON, "-m", "allranks.train", *SMALL],
        tmp_path,
        timeout_s=60,
    )
    assert len(done.messages) == 1, done.err
    assert re.search("(?i)open ?mpi", done.message)
    assert "MPICH" in done.message
    assert "Traceback" not in done.err
    assert done.code != 0
    assert done.left_running == []
    assert_nothing_left(done)


def test_a_rank_with_other_overrides_is_named(tmp_path):
    words = [forked_python(), "-m", "allranks.train", *SMALL]
    done = execute([mpiexec(), "-n", "2", *words, ":", "-n", "1", *words, "seed=1"], tmp_path)
    assert_refused(done, "^allranks: rank 2 ", "configuration other than", "same overrides")
    assert_nothing_left(done)


def test_a_rank_with_a_bad_override_of_its_own_is_named(tmp_path):
    words = [forked_python(), "-m", "allranks.train", *SMALL]
    done = execute([mpiexec(), "-n", "1", *words, ":", "-n", "1", *words, "optimizer.lr=0"], tmp_path)
    assert_refused(done, "^allranks: rank 1: optimizer.lr=0 is not valid")
    assert_nothing_left(done)
