"""Runs that go on: after a crash in the same job, or in the next one, to the bits of an undisturbed run."""

from __future__ import annotations

import os
import re
import signal
import time
from pathlib import Path

import pytest

from allranks.run import checkpoint
from helpers import (
    PYTHON,
    ROOT,
    SMALL,
    Run,
    Started,
    command_line,
    execute_forked,
    forked_python,
    launcher,
    mpiexec,
    until_step,
)
from test_resume import figures, rank_pid

TRAINING = (*SMALL, "trainer.epochs=24", "checkpoint.every_steps=5", "model=mlp")
HERE = {
    "PYTHONPATH": f"{ROOT}/src",
    "OMP_NUM_THREADS": "1",
    "PATH": f"{Path(PYTHON).parent}:{os.environ['PATH']}",
}


def launch(folder: Path, *words: str, python: str = PYTHON) -> Started:
    """`allranks launch` of two ranks under mpiexec."""
    mpiexec()
    os.chdir(folder)
    argv = [
        python,
        "-m",
        "allranks",
        "launch",
        "-n",
        "2",
        "--launcher",
        "mpiexec",
        "--no-preflight",
        *words,
    ]
    return Started(argv, **HERE)


def ranks(started: Started, run: Path) -> list[int]:
    """The trainings among its processes, not their guards."""
    lines = {pid: command_line(pid) for pid in started.pids()}
    return [
        pid for pid, words in lines.items() if words[1:3] == ["-m", "allranks.train"] and str(run) in words
    ]


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory) -> Run:
    """Its ranks add up gradients by gloo; the sum of two numbers has the same bits by MPI."""
    words = ["-m", "allranks.train", *TRAINING, "run.dir=run"]
    return execute_forked(words, 2, tmp_path_factory.mktemp("whole")).ok().run


def test_killed_twice_it_is_the_same_run(tmp_path, undisturbed, long):
    """Without --long it is killed once, and its processes are forked."""
    kills = (20, 80) if long else (20,)
    run = tmp_path / "run"
    python = PYTHON if long else forked_python()
    with launch(tmp_path, "--max-restarts", "2", *TRAINING, "run.dir=run", python=python) as started:
        for step in kills:
            until_step(run, step)
            os.kill(ranks(started, run)[0] if long else Run(run).pid(0), signal.SIGKILL)
            time.sleep(0.5)
        code, _, err = started.finish(60)
    assert code == 0, err
    told = [line for line in err.splitlines() if "restart" in line]
    assert len(told) == len(kills)
    # MPI may end the guards in the same moment, before one of them could tell
    assert "was killed by SIGKILL" in told[0] or "vanished without a word" in told[0]
    assert "From step " in told[0]
    assert told[0].endswith(": restart 1 of 2.")
    assert figures(Run(run)) == figures(undisturbed)


@pytest.mark.long
def test_torchruns_own_restarts_go_on_as_well(tmp_path, undisturbed):
    """Its attempts share one store, in which the words of the one before still stand."""
    os.chdir(tmp_path)
    argv = [*launcher("torchrun", 2), "-m", "allranks.train", *TRAINING, "run.dir=run"]
    with Started([*argv[:3], "--max-restarts=2", *argv[3:]], **HERE) as started:
        for step in (20, 80):
            until_step(tmp_path / "run", step)
            os.kill(rank_pid(tmp_path, 1), signal.SIGKILL)
            time.sleep(0.5)
        code, out, err = started.finish(60)
    assert code == 0, err
    assert out.count("going on from") == 2
    assert figures(Run(tmp_path / "run")) == figures(undisturbed)


@pytest.mark.parametrize("when", ["before the preflight", "in the preflight"])
def test_a_warning_before_the_ranks_run_asks_for_another_start(tmp_path, when):
    mpiexec()
    os.chdir(tmp_path)
    command = [PYTHON, "-m", "allranks", "launch", "-n", "2", *TRAINING, "run.dir=run"]
    with Started(command, **HERE) as started:
        caught, status = 0, Path(f"/proc/{started.process.pid}/status")
        while not caught >> (signal.SIGUSR1 - 1) & 1:
            caught = int(re.search(r"SigCgt:\s+(\w+)", status.read_text())[1], 16)
        while when.startswith("in") and len(started.pids()) < 4:
            time.sleep(0.01)
        started.process.send_signal(signal.SIGUSR1)
        code, _, err = started.finish(60)
    assert code == 85, err
    assert "Traceback" not in err
    assert checkpoint.steps("run") == []


@pytest.mark.long
def test_three_crashes_without_a_step_gained_end_it(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import torch\nclass Bad(torch.nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.a = torch.nn.Linear(784, 10)\n"
        "    def forward(self, x):\n"
        "        if len(x) > 2: raise RuntimeError('a bug')\n"  # after the trial of two examples
        "        return self.a(x.flatten(1))\n"
    )
    bad = ("model=linear", "model._target_=mine.Bad", "~model.input_shape", "~model.classes")
    started = launch(tmp_path, "--max-restarts", "9", *SMALL, *bad, "run.dir=run")
    code, _, err = started.finish(90)
    assert code == 86, err
    assert "the third crash without a step gained (step 0)" in err
    assert err.count(": restart ") == 2


@pytest.mark.parametrize(
    ("code", "restarts", "starts"), [(0, 2, 1), (1, 2, 3), (1, 0, 1), (2, 2, 1), (85, 2, 1)]
)
def test_any_program_is_started_again_after_a_crash_only(tmp_path, code, restarts, starts):
    program = ["sh", "-c", f'if [ "$RANK" = 0 ]; then echo >> started; fi; exit {code}']
    started = launch(tmp_path, "--max-restarts", str(restarts), "--", *program)
    got, _, err = started.finish(60)
    assert got == code, err
    assert (tmp_path / "started").read_text().count("\n") == starts


@pytest.mark.long
def test_a_run_that_has_ended_is_not_kept_by_mpi(tmp_path):
    """MPI_Finalize speaks with mpiexec's proxy, and would wait for ever for one that is stopped."""
    run = tmp_path / "run"
    with launch(tmp_path, *TRAINING, "run.dir=run") as started:
        until_step(run, 10)
        [proxy] = [pid for pid in started.pids() if Path(*command_line(pid)[:1]).name == "hydra_pmi_proxy"]
        os.kill(proxy, signal.SIGSTOP)
        code, _, err = started.finish(150)
    assert code == 0, err
    assert "ends without MPI: MPI_Finalize has not returned within 20 s" in err
    assert Run(run).summary["state"] == "finished"


def test_a_run_that_is_to_stop_is_not_started_again(tmp_path):
    started = launch(tmp_path, "--max-restarts", "2", *TRAINING, "run.dir=run", python=forked_python())
    until_step(tmp_path / "run", 10)
    started.process.send_signal(signal.SIGTERM)
    code, _, err = started.finish(30)
    assert code == 85, err
    assert "restart" not in err


def test_numbers_that_make_no_sense(tmp_path):
    for words in (["--max-restarts", "-1"], ["--min-ranks", "0"]):
        code, _, err = launch(tmp_path, *words, *SMALL).finish(30)
        assert code == 2
        assert "is not valid: give a whole number" in err
    code, _, err = launch(tmp_path, "-n", "2", "--min-ranks", "3", *SMALL).finish(30)
    assert code == 2
    assert "--min-ranks 3 is more than the 2 ranks to be started: give 2 or less" in err
