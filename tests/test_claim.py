"""One writer per run directory, with real processes that are killed, stopped, and that all come at once."""

from __future__ import annotations

import itertools
import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from allranks.base.errors import UserError
from allranks.base.processes import process_stat
from allranks.run import checkpoint, claim
from allranks.run.claim import Claim, OwnerState
from helpers import PYTHON, clean_environment, only_long, took_at_most, tree

QUICK = {"BEAT_S": 0.2, "SILENT_S": 1.5}  # in place of 5 and 30 seconds

# Takes the directory, then does what it is told, a word a line: the answer is a line, too.
WRITER = f"""
import os, signal, sys
from allranks.run import checkpoint, claim
from allranks.base.errors import UserError
from allranks.base.processes import process_stat
vars(claim).update({QUICK})
def stopped():
    owner.check()
    os.kill(os.getpid(), signal.SIGSTOP)
def do(word):
    if word == "take":
        globals()["owner"] = claim.Claim.take("run")
    elif word == "check":
        owner.check()
    elif word == "release":
        owner.release()
    elif word in ("save", "save-and-stop"):
        before = owner.check if word == "save" else stopped
        checkpoint.write("run", 7, {{"state.json": owner.token.encode()}}, owner.token, before)
for line in sys.stdin:
    try:
        do(line.strip())
        print("done", flush=True)
    except (UserError, OSError) as error:
        print(type(error).__name__, error, flush=True)
"""


class Writer:
    """A process that takes the directory `run` below `cwd` and writes there."""

    def __init__(self, cwd: Path, **env: str) -> None:
        self.process = subprocess.Popen(
            [PYTHON, "-c", WRITER], cwd=cwd, env=clean_environment(**env), text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def tell(self, word: str) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def answer(self) -> str:
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def do(self, word: str) -> str:
        self.tell(word)
        return self.answer()

    def kill(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "run").mkdir()
    return tmp_path / "run"


@pytest.fixture
def writer(run) -> Iterator[Any]:
    """writer(NAME=VALUE, ...) starts one; all are ended with the test."""
    made: list[Writer] = []

    def start(**env: str) -> Writer:
        made.append(Writer(run.parent, **env))
        return made[-1]

    yield start
    for each in made:
        each.kill()


@pytest.fixture
def quick(monkeypatch) -> None:
    for name, value in QUICK.items():
        monkeypatch.setattr(claim, name, value)


def owner_file(run: Path) -> Path:
    [path] = run.glob("owner-*.json")
    return path


def test_a_second_writer_is_refused_as_long_as_the_first_one_lives(writer, run):
    first, second = writer(PBS_JOBID="12.pbs"), writer()
    assert first.do("take") == "done"
    assert owner_file(run).stat().st_mode & 0o777 == 0o600
    pid = first.process.pid
    assert second.do("take") == (
        f"UserError {run} is in use by process {pid} on {socket.gethostname()}, job 12.pbs: wait until it "
        "has ended or end it, or give another run.dir."
    )
    assert first.do("save") == first.do("check") == first.do("release") == "done"
    assert second.do("take") == second.do("check") == "done"
    assert first.do("check").startswith("UserError")


def test_the_directory_of_a_killed_writer_is_free_at_once(writer, run, monkeypatch):
    first, second = writer(), writer()
    assert first.do("take") == "done"
    first.kill()
    assert second.do("take") == "done"  # its 1.5 s of silence are not waited for: see the next test
    assert owner_file(run).name == "owner-2.json"
    second.process.send_signal(signal.SIGKILL)
    while (stat := process_stat(second.process.pid)) and stat.state != "Z":
        time.sleep(0.01)
    monkeypatch.setattr(claim, "SILENT_S", 1e9)
    Claim.take(run).release()  # nor does it matter that nobody has asked yet how it ended


def test_a_stopped_writer_that_wakes_up_overwrites_nothing(writer, run):
    """It is stopped at the worst moment: in a save, after it has seen that the directory is its own."""
    first, second = writer(), writer()
    assert first.do("take") == "done"
    assert checkpoint.write(run, 6, {"state.json": b"six"}, "me", lambda: None)
    first.tell("save-and-stop")
    os.waitid(os.P_PID, first.process.pid, os.WSTOPPED)
    assert len(list((run / "checkpoints").glob(".*"))) == 1
    began = time.monotonic()
    assert second.do("take") == "done"
    assert time.monotonic() - began > QUICK["SILENT_S"]
    checkpoint.sweep_up(run)
    assert second.do("save") == "done"
    token = json.loads(owner_file(run).read_text())["token"]
    before = tree(run)

    first.process.send_signal(signal.SIGCONT)
    assert first.answer().startswith("FileNotFoundError")
    told = first.do("check")
    assert f"process {second.process.pid} on {socket.gethostname()} has taken it over" in told
    assert first.do("save").startswith("done")  # it is there, and valid: nothing is done
    assert first.do("release") == second.do("check") == "done"
    assert tree(run) == before
    assert checkpoint.newest_valid(run)[1] == {"state.json": token.encode()}
    assert checkpoint.steps(run) == [7, 6]


@pytest.mark.parametrize("owned", [only_long(False), True], ids=["free", "of a killed writer"])
def test_of_twenty_that_come_at_once_one_wins(writer, run, owned):
    if owned:
        dead = writer()
        assert dead.do("take") == "done"
        dead.kill()
    takers = [writer() for _ in range(20)]
    for taker in takers:
        assert taker.do("wait") == "done"  # they have started
    for taker in takers:
        taker.tell("take")
    answers = [taker.answer() for taker in takers]
    winners = [taker for taker, said in zip(takers, answers, strict=True) if said == "done"]
    assert len(winners) == 1, answers
    assert winners[0].do("check") == "done"
    assert json.loads(owner_file(run).read_text())["pid"] == winners[0].process.pid
    named = f"is in use by process {winners[0].process.pid} on "
    assert sum(named in said for said in answers) == 19, answers


def left_by(run: Path, **about: object) -> Path:
    """The file of an owner: of this process, but for `about`."""
    path = run / "owner-3.json"
    path.write_text(json.dumps({**claim._this_process(), **about}))
    return path


@pytest.mark.parametrize(
    ("about", "env"),
    [
        ({"started_ticks": 1}, {}),  # its pid is another process's now
        ({"host": "other", "boot_id": "other", "launch": "abc"}, {"ALLRANKS_LAUNCH_ID": "abc"}),
        ({"host": "other", "boot_id": "other", "job_id": "7", "restart_count": 1},
         {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "2"}),
    ],
    ids=["pid used again", "same launch", "requeued"],
)  # fmt: skip
def test_who_is_known_to_be_gone_is_replaced_at_once(run, monkeypatch, about, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(claim, "SILENT_S", 1e9)
    left_by(run, **about)
    mine = Claim.take(run)
    mine.check()
    assert owner_file(run).name == "owner-4.json"
    mine.release()
    assert list(run.iterdir()) == []


FOREIGN = {"host": "other", "boot_id": "other", "pid": 1}


def test_what_a_watched_file_says_of_its_owner(run):
    seen = claim._read(left_by(run, **FOREIGN))
    assert seen is not None
    touched = replace(seen, beat=seen.beat - 1)  # by a clock that was set back
    another = replace(seen, about={**seen.about, "token": "another"})
    silent_s = claim.SILENT_S
    assert claim._verdict(seen, seen, 0) == OwnerState.UNDECIDED
    assert claim._verdict(seen, seen, silent_s - 0.1) == OwnerState.UNDECIDED
    assert claim._verdict(seen, seen, silent_s) == OwnerState.SILENT
    assert claim._verdict(seen, touched, 0) == claim._verdict(seen, touched, silent_s) == OwnerState.ALIVE
    assert claim._verdict(seen, another, silent_s) == OwnerState.REPLACED
    assert claim._verdict(seen, None, silent_s) == OwnerState.REPLACED


@pytest.mark.parametrize("number", [3, 4], ids=["under its own name", "under the next number"])
def test_one_that_takes_a_directory_over_while_it_is_watched_is_at_work(run, monkeypatch, number):
    """As where a job is queued for a directory in the moment in which another launch begins there."""
    monkeypatch.setattr(claim, "_LOOK_S", 0.02)
    before = left_by(run, **FOREIGN)

    def take_over() -> None:
        text = json.dumps({**claim._this_process(), **FOREIGN, "pid": 4711})
        (run / "taking over").write_text(text)
        (run / "taking over").replace(run / f"owner-{number}.json")  # at no moment is there no owner
        if before.name != f"owner-{number}.json":
            before.unlink()

    timer = threading.Timer(0.2, take_over)
    timer.start()
    with pytest.raises(UserError, match="in use by process 4711 on other: wait until it has ended"):
        claim.refuse_where_at_work([run])
    timer.join()


def test_a_directory_that_is_given_up_while_it_is_watched_is_free_at_once(run, monkeypatch):
    monkeypatch.setattr(claim, "_LOOK_S", 0.02)
    monkeypatch.setattr(claim, "WATCH_S", 600)
    timer = threading.Timer(0.2, left_by(run, **FOREIGN).unlink)
    timer.start()
    claim.refuse_where_at_work([run, run / "not there"])
    timer.join()


@pytest.mark.parametrize(
    ("about", "env"),
    [
        ({**FOREIGN, "launch": None}, {"ALLRANKS_LAUNCH_ID": ""}),
        ({**FOREIGN, "job_id": "7"}, {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": "0"}),
        ({**FOREIGN, "job_id": "7", "restart_count": 3}, {"SLURM_JOB_ID": "8", "SLURM_RESTART_COUNT": "4"}),
        ({"pid_namespace": "pid:[1]", "started_ticks": 1}, {}),
        ({"time_namespace": "time:[1]", "started_ticks": 1}, {}),
    ],
    ids=["another host", "the same job", "another job", "another container", "another clock"],
)
def test_of_whom_nothing_is_known_the_heartbeat_decides(run, quick, monkeypatch, about, env):
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    path = left_by(run, **about)
    stop = threading.Event()

    def beat() -> None:  # of a host whose clock stands, and is years behind
        second = 0
        while not stop.wait(0.1):
            os.utime(path, ns=(0, second := second + 1))

    beating = threading.Thread(target=beat)
    beating.start()
    with pytest.raises(UserError, match="is in use by process"):
        Claim.take(run)
    stop.set()
    beating.join()
    began = time.monotonic()
    mine = Claim.take(run)
    assert time.monotonic() - began > QUICK["SILENT_S"]
    mine.check()
    mine.release()


@pytest.mark.parametrize("content", [b"", b"[1]", b'{"pid": -1, "token": []}', b"\xff"])
def test_an_owners_file_that_says_nothing_is_waited_for(run, quick, content):
    (run / "owner-1.json").write_bytes(content)
    began = time.monotonic()
    Claim.take(run).release()
    assert time.monotonic() - began > QUICK["SILENT_S"]


def test_who_is_overtaken_while_he_waits_looks_again(run, quick, writer):
    """Two wait for a silent owner: one is first, and the other is told about that one."""
    left_by(run, **FOREIGN)
    takers = [writer(), writer()]
    for taker in takers:
        taker.tell("take")
    assert sorted(taker.answer().partition(" ")[0] for taker in takers) == ["UserError", "done"]


def test_who_looks_for_a_long_time_is_known_to_be_well(tmp_path, monkeypatch):
    """Else the watchdog would end a start whose watchdog.start_s is shorter than the look."""
    monkeypatch.setattr(claim, "SILENT_S", 1.0)
    about = {"host": "elsewhere", "pid": 1, "token": "x"}
    (tmp_path / "owner-1.json").write_text(json.dumps(about))
    looks: list[float] = []
    Claim.take(tmp_path, looking=lambda: looks.append(time.monotonic())).release()
    assert len(looks) >= 2
    assert took_at_most(max(after - before for before, after in itertools.pairwise(looks)), 1.0)


def test_a_removed_file_is_a_lost_claim(run):
    mine = Claim.take(run)
    mine.path.unlink()
    with pytest.raises(UserError, match=r"owner-1\.json was removed"):
        mine.check()
    mine.release()


def test_a_directory_that_cannot_be_written_is_refused(read_only):
    with pytest.raises(UserError, match=r"cannot be written \((Read-only file|Permission)"):
        Claim.take(read_only)
    with pytest.raises(UserError, match=r"cannot be written \(No such file"):
        Claim.take(read_only / "missing")


def test_a_run_directory_that_was_moved_is_named(tmp_path):
    (tmp_path / "run").mkdir()
    claim = Claim.take(tmp_path / "run")
    (tmp_path / "run").rename(tmp_path / "moved")
    with pytest.raises(UserError, match="was moved or removed while this run was going on"):
        claim.check()
    claim.release()
