"""`allranks checkpoint list|verify|show`: by command line, on checkpoints of small tensors."""

from __future__ import annotations

import json
import tracemalloc
from contextlib import suppress
from pathlib import Path

import pytest

from allranks.base.errors import UserError
from allranks.run import checkpoint, show
from allranks.run.checkpoint import Damaged
from helpers import PYTHON, Done, execute


def state(step: int) -> dict:
    epochs = [{"epoch": n, "val/loss": 1.0 / n} for n in range(1, step // 10 + 1)]
    return {
        "step": step, "epoch": step // 10, "steps_in_epoch_done": step % 10, "history": epochs,
        "identity": {"model": "allranks.models.mlp", "note": "\x1b[2J\n\ud800"},
    }  # fmt: skip


def weights(header: dict, data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


MODEL = {
    "__metadata__": {"format": "pt"},
    "last.bias": {"dtype": "F64", "shape": [], "data_offsets": [24, 32]},
    "first.weight": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    for step in (10, 25, 30):
        files = {
            "model.safetensors": weights(MODEL, bytes(32)),
            "state.json": json.dumps(state(step)).encode(),
        }
        checkpoint.write(tmp_path, step, files, "me", lambda: None)
    (checkpoint.path_of(tmp_path, 30) / "model.safetensors").unlink()
    return tmp_path


def size(run: Path, step: int, name: str = "*") -> int:
    """Bytes of a checkpoint's files, without its manifest."""
    files = checkpoint.path_of(run, step).glob(name)
    return sum(file.stat().st_size for file in files if file.name != "manifest.json")


def command(*words: str | Path, cwd: Path) -> Done:
    return execute([PYTHON, "-m", "allranks", "checkpoint", *map(str, words)], cwd)


def test_list(run):
    done = command("list", ".", cwd=run).ok()
    assert [line.split() for line in done.out.splitlines()] == [
        ["step", "epoch", "val/loss", "bytes"],
        ["10", "1", "1", f"{size(run, 10)}", "valid"],
        ["25", "2", "0.5", f"{size(run, 25)}", "valid"],
        ["30", "-", "-", f"{size(run, 30)}", "model.safetensors:", "it", "is", "missing"],
    ]
    rows = [json.loads(line) for line in command("list", "--json", ".", cwd=run).ok().out.splitlines()]
    assert rows[1] == {
        "checkpoint": "checkpoints/step-000025", "step": 25, "epoch": 2, "val/loss": 0.5,
        "metrics": {"val/loss": 0.5}, "bytes": size(run, 25),
        "problem": None,
    }  # fmt: skip
    assert [row["problem"] for row in rows] == [None, None, "model.safetensors: it is missing"]


def test_without_a_validation_loss_another_metric_is_listed(tmp_path):
    own = {**state(10), "history": [{"epoch": 1, "step": 10, "train/loss": 2.0, "val/rmse": 0.25}]}
    files = {"state.json": json.dumps(own).encode()}
    checkpoint.write(tmp_path, 10, files, "me", lambda: None)
    done = command("list", ".", cwd=tmp_path).ok()
    assert [line.split()[:3] for line in done.out.splitlines()] == [
        ["step", "epoch", "val/rmse"], ["10", "1", "0.25"],
    ]  # fmt: skip


@pytest.mark.parametrize("path", [".", "checkpoints", "../{run.name}/checkpoints"])
def test_verify_names_the_damaged_one(run, path):
    done = command("verify", path.format(run=run), cwd=run)
    assert done.code == 1
    lines = [line.partition("checkpoints/")[2] for line in done.out.splitlines()]
    assert lines == [
        "step-000010: valid", "step-000025: valid", "step-000030: model.safetensors: it is missing"
    ]  # fmt: skip


def test_verify_one(run):
    assert command("verify", "checkpoints/step-000025", cwd=run).ok().out.endswith("step-000025: valid\n")
    done = command("verify", "--json", "checkpoints/step-000030/", cwd=run)
    assert done.code == 1
    assert json.loads(done.out)["problem"] == "model.safetensors: it is missing"
    checkpoint.path_of(run, 25).rename(run / "kept")
    assert command("verify", "kept", cwd=run).ok().out == "kept: valid\n"


def test_show_the_newest_valid_one(run):
    done = command("show", run, cwd=run).ok()
    assert done.err == f"{run}/checkpoints/step-000030: model.safetensors: it is missing\n"
    assert done.out.splitlines() == [
        f"{run}/checkpoints/step-000025: valid, {size(run, 25)} bytes in 2 files",
        "counters",
        "  epoch                2",
        "  step                 25",
        "  steps_in_epoch_done  5",
        "identity",
        "  model  allranks.models.mlp",
        r'  note   "\u001b[2J\n\ud800"',
        "model.safetensors: 2 tensors, 7 numbers",
        "  first.weight  F32  2 x 3",
        "  last.bias     F64",
    ]
    shown = json.loads(command("show", "--json", run, cwd=run).ok().out)
    assert shown["state"] == state(25)
    assert shown["bytes"] == {f: size(run, 25, f) for f in ("model.safetensors", "state.json")}
    first = {"dtype": "F32", "shape": [2, 3], "bytes": 24}
    assert shown["tensors"]["model.safetensors"]["first.weight"] == first


def test_show_of_a_damaged_one(run):
    done = command("show", "checkpoints/step-000030", cwd=run)
    assert (done.code, done.out) == (1, "")
    assert done.err == "checkpoints/step-000030: model.safetensors: it is missing\n"


@pytest.mark.parametrize("verb", ["list", "verify", "show"])
def test_a_checkpoint_that_is_not_there_is_no_damaged_one(run, verb, monkeypatch):
    monkeypatch.chdir(run)
    with pytest.raises(UserError, match=r"^checkpoints/step-000007 is missing: give a run directory"):
        show.main([verb, "checkpoints/step-000007"])


@pytest.mark.parametrize("verb", ["list", "verify"])
def test_large_files_are_read_piece_by_piece(run, verb, monkeypatch, capsys):
    """A checkpoint may be larger than the memory of a login node."""
    monkeypatch.chdir(run)
    monkeypatch.setattr(checkpoint, "PIECE_BYTES", 1 << 20)
    large = {"model.safetensors": bytes(40 << 20), "state.json": json.dumps(state(40)).encode()}
    checkpoint.write(run, 40, large, "me", lambda: None)
    del large
    tracemalloc.start()
    try:
        assert show.main([verb, "--json", "checkpoints/step-000040"]) == 0
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert json.loads(capsys.readouterr().out)["problem"] is None
    assert peak_bytes < 8 << 20


def test_figures_that_are_no_numbers_are_null_for_programs(tmp_path, capsys):
    own = {**state(10), "history": [{"epoch": 1, "val/loss": float("nan")}], "epoch_lr": float("inf")}
    checkpoint.write(tmp_path, 10, {"state.json": json.dumps(own).encode()}, "me", lambda: None)
    for verb in ("list", "show"):
        assert show.main([verb, "--json", str(tmp_path)]) == 0
    listed, shown = (_strictly(line) for line in capsys.readouterr().out.splitlines())
    assert (listed["val/loss"], listed["metrics"]) == (None, {"val/loss": None})
    assert (shown["state"]["history"][0]["val/loss"], shown["state"]["epoch_lr"]) == (None, None)


def _strictly(line: str) -> dict:
    """The JSON of a line, in which NaN and Infinity are no values."""

    def refuse(word: str) -> None:
        raise AssertionError(word)

    return json.loads(line, parse_constant=refuse)


@pytest.mark.parametrize("verb", ["list", "verify", "show"])
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("none", "none is missing: give a run directory, its checkpoints folder, or a checkpoint."),
        ("empty", "empty has no checkpoints: give a run"),
        ("file", "file cannot be read: Not a directory."),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, verb, path, said):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    done = command(verb, path, cwd=tmp_path)
    assert done.code == 2
    assert done.message.startswith(f"allranks: {said}")


def described(**changes: object) -> bytes:
    return weights({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}, bytes(8))


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\xff" * 8 + b"{}",  # a header longer than the file
        weights({}, b"x"),  # data that belongs to no tensor
        (2).to_bytes(8, "little") + b"[]",
        (3).to_bytes(8, "little") + b"{]}",
        weights({"x": 1}, b""),
        described(shape=[-2]),
        described(shape=[True, 2]),
        described(shape=[2.0]),
        described(data_offsets=[0]),
        described(data_offsets=[8, 0]),
        described(data_offsets=[0, 16]),
        described(shape=[1 << 62, 1 << 62]),
        described(dtype="F99", shape=[]),
        described(dtype="F16"),
        weights({"\x1b[2J\n" * 5000: {"dtype": "F32", "shape": [2], "data_offsets": [8, 0]}}, bytes(8)),
    ],
)
def test_a_header_that_does_not_fit_is_refused_in_one_short_line(content):
    with pytest.raises(Damaged) as damaged:
        checkpoint.tensors("m.safetensors", content)
    said = str(damaged.value)
    assert said.startswith("m.safetensors: Error while deserializing")
    assert said.isprintable()
    assert said.isascii()
    assert len(said) < 250


def test_every_type_that_torch_saves_is_shown(tmp_path):
    torch = pytest.importorskip("torch")
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is missing")
    kinds = (
        "float64 float32 float16 bfloat16 int64 int32 int16 int8 uint8 bool float8_e4m3fn complex64".split()
    )
    given = {}
    for kind in kinds:
        tensor = torch.zeros(2, 3).to(getattr(torch, kind))
        with suppress(KeyError):  # an older safetensors knows fewer
            safetensors.save({kind: tensor})
            given[kind] = tensor
    assert len(given) >= 10
    read = checkpoint.tensors("m", safetensors.save(given))
    assert {name: tensor.shape for name, tensor in read.items()} == {kind: [2, 3] for kind in given}
    assert {n: t.bytes for n, t in read.items()} == {n: t.nbytes for n, t in given.items()}
