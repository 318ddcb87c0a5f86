"""A save that is killed, or fails, at any of its system calls leaves the old checkpoint or the new one."""

from __future__ import annotations

import errno
import os
import re
import shutil
import subprocess
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from allranks.run import checkpoint
from helpers import PYTHON, ROOT, TIMEOUT_S, clean_environment, only_long, tree

OLD = {"model.safetensors": b"old" * 1000, "state.json": b"{}"}
EARLIER = {"model.safetensors": b"new" * 30_000, "state.json": b'{"step": 2, "epoch": 0}'}
NEW = {"model.safetensors": b"new" * 30_000, "state.json": b'{"step": 2}', "optimizer.safetensors": b""}
FAULTS = ("signal=KILL", "error=EIO", "error=ENOSPC", "error=EINTR")
OVER_QUOTA = "error=EDQUOT"  # at calls that may need room
NEED_ROOM = ("mkdir", "openat", "write", "fsync", "close", "rename")

# What happens between the two calls of getppid is the save.
SAVER = f"""
import os
from allranks.run import checkpoint
os.getppid()
try:
    checkpoint.write("run", 2, {NEW!r}, "saver", lambda: None, is_enough=lambda there: False)
    if 0 in checkpoint.steps("run"):
        checkpoint.keep_only("run", (1, 2))
    said = "saved"
except OSError as error:
    said = type(error).__name__
os.getppid()
print(said)
"""


def saver(strace: str, cwd: Path, *options: str) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """How a save in `cwd` under strace ended, and strace's lines."""
    done = subprocess.run(
        [strace, "-o", "trace", *options, PYTHON, "-S", "-B", "-c", SAVER], cwd=cwd,
        env=clean_environment(PYTHONPATH=str(ROOT / "src"), PYTHONHASHSEED="0"), capture_output=True,
        text=True, timeout=TIMEOUT_S, check=False,
    )  # fmt: skip
    return done, (cwd / "trace").read_text().splitlines()


def calls_of_the_save(trace: list[str]) -> list[tuple[str, int]]:
    """(name, how many of that name since the process began) of each system call in the save."""
    names = [match[1] for match in (re.match(r"(\w+)\(", line) for line in trace) if match]
    begin, end = [i for i, name in enumerate(names) if name == "getppid"]
    counts, found = Counter(names[: begin + 1]), []
    for name in names[begin + 1 : end]:
        counts[name] += 1
        found.append((name, counts[name]))
    return found


@pytest.fixture(
    params=["new step", only_long("in place of a damaged one"), "in place of one that is not as far"]
)
def before(request, memory: Path) -> Path:
    """A run that has checkpoint 1; and 0, which is removed after the save, or an earlier 2."""
    (memory / "before/run").mkdir(parents=True)
    checkpoint.write(memory / "before/run", 1, OLD, "first", lambda: None)
    if request.param == "new step":
        checkpoint.write(memory / "before/run", 0, OLD, "first", lambda: None)
    else:
        earlier = checkpoint.write(memory / "before/run", 2, EARLIER, "first", lambda: None)
        if request.param == "in place of a damaged one":
            (earlier / "state.json").write_bytes(b"")
    return memory / "before"


def content_of(run: Path) -> dict[str, bytes] | None:
    """What checkpoint 2 of the run holds: nothing where it is damaged, and None where it is absent."""
    if 2 not in checkpoint.steps(run):
        return None
    found = checkpoint.newest_valid(run)
    return {} if found.passed_over else found.files


def check_what_is_there(run: Path, before: dict[str, bytes] | None, said: str) -> bool:
    """Checks the run after a save of 2 that a fault has disturbed; returns whether it has been saved.

    `before` is what content_of() said before the save. An earlier checkpoint 2 may be aside for the moment.
    """
    path, files, passed_over = checkpoint.newest_valid(run)
    if 0 in checkpoint.steps(run):  # is removed as a whole, or not
        assert checkpoint.read(checkpoint.path_of(run, 0)) == OLD
    if files == NEW:
        assert (path, passed_over) == (checkpoint.path_of(run, 2), []), said
        return True

    assert not said.endswith("saved"), said
    is_in_place = 2 in checkpoint.steps(run)
    is_valid = is_in_place and before == EARLIER
    assert files == (EARLIER if is_valid else OLD), said
    assert path == checkpoint.path_of(run, 2 if is_valid else 1), said
    assert len(passed_over) == int(is_in_place and not is_valid), said
    return False


def test_a_save_that_is_stopped_or_fails_at_any_system_call(strace, before, memory, long):
    """At every call with --long; else at one of thirteen, with each of the faults in its turn."""
    what_was_there = content_of(before / "run")
    shutil.copytree(before, memory / "undisturbed")
    done, trace = saver(strace, memory / "undisturbed")
    assert (done.returncode, done.stdout) == (0, "saved\n"), done.stderr
    calls = calls_of_the_save(trace)
    planned = [(fault, *call) for call in calls for fault in FAULTS]
    planned += [(OVER_QUOTA, *call) for call in calls if call[0] in NEED_ROOM]
    if not long:
        planned = planned[::13]

    def disturbed(fault: str, name: str, nth: int) -> str:
        """The save with one fault; says what came of it, after checking what is there now."""
        cwd = memory / f"{fault}-{name}-{nth}"
        shutil.copytree(before, cwd)
        only = ("-e", f"trace=getppid,{name}", "-e", f"inject={name}:{fault}:when={nth}")
        done, trace = saver(strace, cwd, *only)
        said = done.stdout.strip()
        markers = [line.startswith("getppid(") for line in trace]
        if fault == "signal=KILL":
            assert done.returncode == -9, (name, nth, done)
            assert markers.count(True) == 1, (name, nth, trace)  # in the save, neither before nor after
        else:
            assert done.returncode == 0, (name, nth, done)
            [hit] = [i for i, line in enumerate(trace) if line.endswith("(INJECTED)")]
            assert (markers[:hit].count(True), markers.count(True)) == (1, 2), (name, nth, trace)

        run = cwd / "run"
        is_new = check_what_is_there(run, what_was_there, f"{fault} {name} {nth}: {said}")
        checkpoint.sweep_up(run)  # and then the next owner can save
        if what_was_there == EARLIER and not is_new:  # it is there, or there again
            assert checkpoint.newest_valid(run).files == EARLIER, (fault, name, nth, said)
        checkpoint.write(run, 2, NEW, "next", lambda: None, is_enough=lambda there: there == NEW)
        checkpoint.keep_only(run, (1, 2))
        assert sorted(p.name for p in (run / "checkpoints").iterdir()) == ["step-000001", "step-000002"]
        assert checkpoint.newest_valid(run)[1:] == (NEW, [])
        shutil.rmtree(cwd)
        return f"{fault} {'new' if is_new else 'old'}"

    with ThreadPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        seen = Counter(pool.map(disturbed, *zip(*planned, strict=True)))
    print(f"{len(calls)} system calls, {len(planned)} saves: {dict(seen)}")
    assert len(calls) > 80  # 91 and 127 when this was written
    assert seen.total() == len(planned)
    assert len(planned) > (len(FAULTS) * len(calls) if long else 30)
    every_end = {f"{fault} {which}" for fault in (*FAULTS, OVER_QUOTA) for which in ("old", "new")}
    assert set(seen) == every_end if long else set(seen) <= every_end


def test_a_disk_that_is_really_full(mounted):
    run = mounted("size=64k")
    checkpoint.write(run, 1, OLD, "me", lambda: None)
    before = tree(run)
    with pytest.raises(OSError, match="No space left") as full:
        checkpoint.write(run, 2, NEW, "me", lambda: None)
    assert full.value.errno == errno.ENOSPC
    assert tree(run) == before
    assert checkpoint.newest_valid(run) == (checkpoint.path_of(run, 1), OLD, [])
    checkpoint.write(run, 2, OLD, "me", lambda: None)  # there is room for a smaller one
    assert checkpoint.steps(run) == [2, 1]


def test_a_file_system_that_becomes_read_only(mounted):
    run = mounted("size=1m")
    checkpoint.write(run, 1, OLD, "me", lambda: None)
    subprocess.run(["mount", "-o", "remount,ro", str(run)], check=True, timeout=30)
    with pytest.raises(OSError, match="Read-only"):
        checkpoint.write(run, 2, NEW, "me", lambda: None)
    with pytest.raises(OSError, match="Read-only"):
        checkpoint.keep_only(run, ())
    assert checkpoint.newest_valid(run) == (checkpoint.path_of(run, 1), OLD, [])


def test_a_directory_that_cannot_be_written(read_only):
    with pytest.raises(OSError, match=r"Read-only|Permission"):
        checkpoint.write(read_only, 1, NEW, "me", lambda: None)
    assert checkpoint.newest_valid(read_only) == (None, {}, [])
