"""`allranks checkpoint list|verify|show`: by command line, on checkpoints of small tensors."""

from __future__ import annotations

import json
from contextlib import suppress
from pathlib import Path

import pytest

from allranks.run import checkpoint
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
        "bytes": size(run, 25),
        "problem": None,
    }  # fmt: skip
    assert [row["problem"] for row in rows] == [None, None, "model.safetensors: it is missing"]


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
    first = {"dtype": "F32", "shape": [2, 3], "begin": 0, "end": 24}
    assert shown["tensors"]["model.safetensors"]["first.weight"] == first


def test_show_of_a_damaged_one(run):
    done = command("show", "checkpoints/step-000030", cwd=run)
    assert (done.code, done.out) == (1, "")
    assert done.err == "checkpoints/step-000030: model.safetensors: it is missing\n"


@pytest.mark.parametrize("command", ["list", "verify", "show"])
@pytest.mark.parametrize(
    ("path", "said"),
    [
        ("none", "none is missing: give a run directory, its checkpoints folder, or a checkpoint."),
        ("empty", "empty has no checkpoints: give a run"),
        ("file", "file cannot be read: Not a directory."),
    ],
)
def test_what_is_no_checkpoint_is_refused(tmp_path, command, path, said):
    (tmp_path / "file").touch()
    (tmp_path / "empty").mkdir()
    done = command(command, path, cwd=tmp_path)
    assert done.code == 2
    assert done.message.startswith(f"allranks: {said}")


def described(**changes: object) -> bytes:
    return weights({"x": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}}, bytes(8))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "it is too short"),
        (b"\xff" * 8 + b"{}", "it is too short"),
        (weights({}, b"x"), "its tensors have 0 bytes, but there are 1"),
        ((2).to_bytes(8, "little") + b"[]", "its header is not a JSON object"),
        ((3).to_bytes(8, "little") + b"{]}", "it is not JSON"),
        ((18).to_bytes(8, "little") + b'{"x": 1, "x": {} }', "it is not JSON"),
        (weights({"x": 1}, b""), "'x' is not described as a tensor"),
        (described(shape=[-2]), "'x' is not described as a tensor"),
        (described(shape=[True, 2]), "'x' is not described as a tensor"),
        (described(shape=[2.0]), "'x' is not described as a tensor"),
        (described(more=1), "'x' is not described as a tensor"),
        (described(data_offsets=[0]), "'x' is not described as a tensor"),
        (described(data_offsets=[8, 0]), "'x' does not fit its data"),
        (described(data_offsets=[0, 16]), "'x' does not fit its data"),
        (described(shape=[1 << 62, 1 << 62]), "'x' does not fit its data"),
        (described(dtype="F99", shape=[]), "'x' does not fit its data"),
        (described(dtype="F16"), "'x' does not fit its data"),
    ],
)
def test_a_header_that_does_not_fit_is_refused(content, said):
    with pytest.raises(Damaged, match=said):
        checkpoint.tensors("m", content)


def test_the_header_is_read_as_the_librarys_own(tmp_path):
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
    assert {n: t.end - t.begin for n, t in read.items()} == {n: t.nbytes for n, t in given.items()}
