"""Checkpoints on disk: whole or absent, and not a bit of one can change unseen."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from allranks.run import checkpoint, shards
from allranks.run.checkpoint import Damaged
from helpers import PYTHON, execute, tree

FILES = {"model.safetensors": bytes(range(40)), "state.json": b'{"step": 7}', "empty": b""}


def write(
    run: Path, step: int = 7, files: dict[str, bytes] = FILES, owner=lambda: None, token="me"
) -> Path:
    return checkpoint.write(run, step, files, token, owner)


def why(path: Path) -> str:
    """What is said to be wrong with it, after checking that it is one line."""
    with pytest.raises(Damaged) as damaged:
        checkpoint.read(path)
    assert str(damaged.value).isprintable()
    return str(damaged.value)


def edit(path: Path, change) -> None:
    """Changes manifest.json, which stays in its one spelling."""
    manifest = json.loads((path / "manifest.json").read_bytes())
    change(manifest)
    (path / "manifest.json").write_text(json.dumps(manifest, indent=1, sort_keys=True) + "\n")


def test_what_is_written_is_read(tmp_path):
    path = write(tmp_path)
    assert path == tmp_path / "checkpoints/step-000007" == checkpoint.path_of(tmp_path, 7)
    assert checkpoint.read(path) == FILES
    assert tree(tmp_path / "checkpoints") == [
        "step-000007", *(f"step-000007/{name}" for name in sorted([*FILES, "manifest.json"]))
    ]  # fmt: skip
    assert checkpoint.path_of(tmp_path, 12_345_678).name == "step-12345678"


def test_a_manifest_of_as_many_ranks_as_there_may_be_can_be_read(tmp_path):
    ranks = shards.MOST_RANKS // 10
    about = checkpoint.About(10**12, "f" * 64)
    files = {
        shards.file_name(part, rank, shards.MOST_RANKS): about
        for part in shards.PARTS
        for rank in range(ranks)
    }
    manifest = checkpoint._manifest(files)
    (tmp_path / "manifest.json").write_bytes(manifest)
    with checkpoint._opened(tmp_path) as folder:
        assert checkpoint._read_file(folder, "manifest.json", checkpoint._MANIFEST_BYTES) == manifest
    assert 10 * len(manifest) < checkpoint._MANIFEST_BYTES


def test_a_checkpoint_is_private_to_its_user(tmp_path):
    path = write(tmp_path)
    assert {p.stat().st_mode & 0o777 for p in (path, path.parent)} == {0o700}
    assert {p.stat().st_mode & 0o777 for p in path.iterdir()} == {0o600}


def test_no_bit_can_change_unseen(tmp_path):
    path = write(tmp_path)
    flipped = 0
    for file in sorted(path.iterdir()):
        content = file.read_bytes()
        for bit in range(8 * len(content)):
            changed = bytearray(content)
            changed[bit // 8] ^= 1 << bit % 8
            file.write_bytes(changed)
            why(path)
            flipped += 1
        file.write_bytes(content)
    assert checkpoint.read(path) == FILES
    assert flipped == 8 * sum(len(file.read_bytes()) for file in path.iterdir())


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda p: (p / "empty").unlink(), "empty: it is missing"),
        (lambda p: (p / "manifest.json").unlink(), "manifest.json: it is missing"),
        (lambda p: (p / "extra\n\udcff").touch(), r"'extra\n\udcff': it is not in manifest.json"),
        (lambda p: (p / "sub").mkdir(), "'sub': it is not in manifest.json"),
        (lambda p: os.truncate(p / "state.json", 3), "state.json: it has 3 bytes, not 11"),
        (lambda p: (p / "empty").write_bytes(b"x"), "empty: it has 1 bytes, more than 0"),
        (lambda p: (p / "state.json").write_bytes(b'{"step": 8}'), "state.json: its sha256 is abeff1"),
        (lambda p: os.truncate(p / "manifest.json", 1 << 27), "manifest.json: it has 134,217,728 by"),
        (lambda p: (p / "manifest.json").write_bytes(b"[" * 100_000), "manifest.json: it is not JSON"),
        (lambda p: (p / "manifest.json").write_bytes(b"\xff{}"), "manifest.json: it is not JSON"),
        (lambda p: edit(p, lambda m: m.update(more=1)), "manifest.json: it is not as it was written"),
        (lambda p: edit(p, lambda m: m.update(files=[])), "manifest.json: it is not as it was written"),
        (lambda p: edit(p, lambda m: m.update(format=2)), "manifest.json: its format is not known"),
        (lambda p: edit(p, lambda m: m.update(format=True)), "manifest.json: its format is not known"),
        (lambda p: edit(p, lambda m: m["files"]["empty"].update(size=0.0)), "manifest.json: empty needs a"),
        (lambda p: edit(p, lambda m: m["files"].update({"../x": 1})), "manifest.json: '../x' is not the"),
        (lambda p: edit(p, lambda m: m["files"].update({"a/b": 1})), "manifest.json: 'a/b' is not the"),
        (lambda p: edit(p, lambda m: m["files"].update({"..": 1})), "manifest.json: '..' is not the"),
    ],
)  # fmt: skip
def test_damage_is_named(tmp_path, damage, said):
    path = write(tmp_path)
    damage(path)
    assert why(path).startswith(said)


def test_no_link_is_followed_and_no_pipe_waited_for(tmp_path):
    path, elsewhere = write(tmp_path), tmp_path / "elsewhere"
    (path / "state.json").rename(elsewhere)
    (path / "state.json").symlink_to(elsewhere)
    assert why(path).startswith("state.json: ")
    (path / "state.json").unlink()
    os.mkfifo(path / "state.json")
    assert why(path) == "state.json: it is not a regular file"


def test_a_checkpoint_that_is_a_link_is_named_passed_over_and_replaced(tmp_path):
    (tmp_path / "other").mkdir()
    path, elsewhere = write(tmp_path, 6), write(tmp_path / "other", 7)
    linked = checkpoint.path_of(tmp_path, 7)
    linked.symlink_to(elsewhere)
    assert why(linked) == "the folder cannot be opened: it is a link"
    assert checkpoint.newest_valid(tmp_path) == (
        path, FILES, ["step-000007: the folder cannot be opened: it is a link"]
    )  # fmt: skip
    assert checkpoint.steps(tmp_path) == [7, 6]
    write(tmp_path, 7, {"state.json": b"new"})
    assert not linked.is_symlink()
    assert checkpoint.read(linked) == {"state.json": b"new"}
    assert checkpoint.read(elsewhere) == FILES


@pytest.mark.parametrize(
    ("call", "file", "error", "said"),
    [
        ("openat", "checkpoints/step-000007", "EIO", "it cannot be read now (Input/output error)"),
        ("openat", "checkpoints/step-000007", "ESTALE", "it cannot be read now (Stale file handle)"),
        ("openat", "state.json", "EMFILE", "state.json: it cannot be read now (Too many open files)"),
        ("openat", "state.json", "EACCES", "state.json: it cannot be read now (Permission denied)"),
        ("read", "{newest}/empty", "EIO", "empty: it cannot be read now (Input/output error)"),
    ],
)
def test_what_the_file_system_does_not_give_is_not_damage(strace, tmp_path, call, file, error, said):
    write(tmp_path, 6, {"six": b"6"})
    newest = write(tmp_path, 7)
    code = (
        "from allranks.run import checkpoint\n"
        "try: checkpoint.read('checkpoints/step-000007')\n"
        "except OSError: print('OSError')\n"
        "found = checkpoint.newest_valid('.')\n"
        "print(found.path, *found.passed_over)"
    )
    inject = [f"--inject={call}:error={error}", "-P", file.format(newest=newest)]
    done = execute([strace, "-qq", "-o", os.devnull, *inject, PYTHON, "-c", code], tmp_path).ok()
    assert done.out == f"OSError\ncheckpoints/step-000006 step-000007: {said}\n"
    assert checkpoint.newest_valid(tmp_path).path == newest  # it was there all the time


def test_what_is_no_checkpoint_is_damaged(tmp_path):
    assert why(tmp_path / "none") == "the folder cannot be opened: No such file or directory"
    (tmp_path / "file").touch()
    assert why(tmp_path / "file") == "the folder cannot be opened: Not a directory"
    assert why(tmp_path) == "manifest.json: it is missing"


def test_the_newest_valid_one_is_found_and_the_damaged_named(tmp_path):
    assert checkpoint.newest_valid(tmp_path) == (None, {}, [])
    for step in (9, 1_000_000, 10, 100):
        write(tmp_path, step, {"state.json": str(step).encode()})
    for other in ("step-00000100", "step-5", "latest", ".step-000200.x.tmp"):
        (tmp_path / "checkpoints" / other).mkdir()
    assert checkpoint.steps(tmp_path) == [1_000_000, 100, 10, 9]
    (checkpoint.path_of(tmp_path, 1_000_000) / "state.json").unlink()
    (checkpoint.path_of(tmp_path, 100) / "manifest.json").unlink()
    assert checkpoint.newest_valid(tmp_path) == (
        checkpoint.path_of(tmp_path, 10),
        {"state.json": b"10"},
        ["step-1000000: state.json: it is missing", "step-000100: manifest.json: it is missing"],
    )


def test_a_valid_one_stays_and_a_damaged_one_is_replaced(tmp_path):
    path = write(tmp_path)
    write(tmp_path, files={"state.json": b"other"})
    assert checkpoint.read(path) == FILES
    (path / "state.json").write_bytes(b"")
    write(tmp_path, files={"state.json": b"other"})
    assert checkpoint.read(path) == {"state.json": b"other"}
    checkpoint.path_of(tmp_path, 8).write_text("a file is in the way")
    assert checkpoint.read(write(tmp_path, 8)) == FILES
    assert [p.name for p in sorted(path.parent.iterdir())] == ["step-000007", "step-000008"]


def test_a_valid_one_that_will_not_do_is_replaced(tmp_path):
    path = write(tmp_path)
    seen = []

    def is_enough(there) -> bool:
        seen.append(there)
        return False

    newer = {"state.json": b"newer"}
    checkpoint.write(tmp_path, 7, newer, "me", lambda: None, is_enough)
    assert (seen, checkpoint.read(path)) == ([FILES], newer)
    assert [p.name for p in path.parent.iterdir()] == ["step-000007"]


@pytest.mark.parametrize("is_replaced", [False, True])
def test_one_that_a_killed_writer_had_moved_aside_goes_back_unless_it_was_replaced(tmp_path, is_replaced):
    path = write(tmp_path)
    aside = path.with_name(".step-000007.other.aside.tmp")
    aside.mkdir()
    path.rename(aside / path.name)
    if is_replaced:
        write(tmp_path, files={"state.json": b"newer"})
    checkpoint.sweep_up(tmp_path)
    assert checkpoint.read(path) == ({"state.json": b"newer"} if is_replaced else FILES)
    assert [p.name for p in path.parent.iterdir()] == ["step-000007"]


@pytest.mark.parametrize("damaged", [False, True])
def test_who_is_no_longer_the_owner_changes_nothing(tmp_path, damaged):
    """The new owner takes over in the middle of a save, sweeps up, and saves the same step."""
    path = write(tmp_path, 6)
    if damaged:
        (write(tmp_path) / "empty").unlink()

    def refused() -> None:
        raise RuntimeError("another owner")

    def paused() -> None:  # between the check and the rename, when nothing can be refused any more
        checkpoint.sweep_up(tmp_path)
        write(tmp_path, files={"state.json": b"the new owner's"}, token="other")

    before = tree(tmp_path)
    with pytest.raises(RuntimeError):
        write(tmp_path, owner=refused)
    assert tree(tmp_path) == before
    with pytest.raises(FileNotFoundError):
        write(tmp_path, owner=paused)
    assert checkpoint.read(path) == FILES
    assert checkpoint.read(checkpoint.path_of(tmp_path, 7)) == {"state.json": b"the new owner's"}
    with pytest.raises(FileNotFoundError):
        checkpoint.keep_only(tmp_path, [], before_rename=paused)
    assert checkpoint.steps(tmp_path) == [7, 6]
    assert len(list(path.parent.iterdir())) == 2


def test_the_others_are_removed(tmp_path):
    for step in (1, 2, 3, 4):
        write(tmp_path, step)
    (checkpoint.path_of(tmp_path, 4) / "empty").unlink()
    checkpoint.keep_only(tmp_path, {1, 3, 99})
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step-000001", "step-000003"]


def test_what_writers_left_is_swept_up(tmp_path):
    write(tmp_path)
    before = tree(tmp_path)
    for left in (".step-000008.other.tmp", ".step-000007.other.aside.tmp", ".0123456789abcdef.tmp"):
        (tmp_path / "checkpoints" / left).mkdir()
        (tmp_path / "checkpoints" / left / "model.safetensors").touch()
    checkpoint.sweep_up(tmp_path)
    assert tree(tmp_path) == before
    checkpoint.sweep_up(tmp_path / "none")
