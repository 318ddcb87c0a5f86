"""What `allranks submit` records of a job, of an array and of its cells. test_submit.py runs the jobs.

Commands that give a scheduler's answers stand for it here.
"""

import os
from pathlib import Path

import pytest

from allranks.base.errors import UserError
from allranks.launch import options
from allranks.run.cells import make_cells, read_job
from allranks.submit import queue
from allranks.submit.command import USAGE
from allranks.submit.listing import cancelled, listed
from allranks.submit.queue import queue_again, queue_new
from allranks.submit.task import check_idle, new_task, task_again
from helpers import SMALL

SWEEP = ("--machine", "generic_slurm", "--walltime", "00:05:00", *SMALL, "-m", "seed=1,2", "run.dir=s")


@pytest.fixture
def answers(tmp_path, monkeypatch):
    """answers(sbatch=(text, code)) puts a command on PATH that says this and ends with that code."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)

    def make(**commands):
        for name, (said, code) in commands.items():
            (folder / name).write_text(f"#!/bin/sh\ncat <<'END'\n{said}\nEND\nexit {code}\n")
            (folder / name).chmod(0o755)

    return make


def task_of(*words):
    args, rest = options.parse(options.parser("submit", USAGE), words)
    return new_task(vars(args), rest)


def ids_in(directory):
    return read_job(Path(directory) / "job.json")["job_ids"]


def test_the_jobs_of_a_sweep_stay_in_its_records_when_it_is_queued_again(answers):
    """Array 72 is running, and the scheduler refuses another one after it, then takes it."""
    running = "72_0|RUNNING|None\n72_1|RUNNING|None"
    answers(sbatch=("72", 0), squeue=(running, 0), scancel=("", 0))
    assert queue_new(task_of(*SWEEP), None) == ["72"]
    assert [ids_in(place) for place in ("s", "s/0", "s/1")] == [["72"], ["72_0"], ["72_1"]]

    answers(sbatch=("sbatch: error: Invalid partition name specified", 1))
    with pytest.raises(UserError, match="Invalid partition name"):
        queue_new(task_of(*SWEEP), "72")
    assert [ids_in(place) for place in ("s", "s/0", "s/1")] == [["72"], ["72_0"], ["72_1"]]
    assert [row["state"] for row in listed("s", print)] == ["running", "running"]
    with pytest.raises(UserError, match=r"still has a job \(72_0 running, 72_1 running\)"):
        check_idle(task_of(*SWEEP))

    answers(sbatch=("73", 0))
    assert queue_new(task_of(*SWEEP), "72") == ["73"]
    assert [ids_in(place) for place in ("s", "s/0", "s/1")] == [
        ["72", "73"],
        ["72_0", "73_0"],
        ["72_1", "73_1"],
    ]
    answers(squeue=(f"{running}\n73_0|PENDING|Dependency\n73_1|PENDING|Dependency", 0))
    assert [row["state"] for row in listed("s", print)] == ["running", "running"]
    assert cancelled("s") == ["72", "73"]


def test_a_job_that_is_queued_is_no_failure_where_the_list_of_cells_cannot_be_written(answers, capsys):
    answers(sbatch=("72", 0), squeue=("", 0))
    queue_new(task_of(*SWEEP), None)
    answers(sbatch=("73", 0))
    cell = task_again("s/0", {}, must_be_idle=True)
    Path("s/cells.jsonl").unlink()
    Path("s/cells.jsonl").mkdir()
    assert queue_again(cell, None) == ["73"]
    assert ids_in("s/0") == ["72_0", "73"]
    said = capsys.readouterr().err
    assert "job 73 is queued, but cells.jsonl of its sweep cannot be written (Is a directory)" in said


def test_a_sweep_whose_directories_cannot_all_be_made_leaves_none(answers, mounted):
    """On a disk with room for a few files."""
    disk = mounted("size=1m,nr_inodes=8")
    with pytest.raises(UserError, match="No space left on device"):
        queue_new(task_of(*SWEEP[:-1], f"run.dir={disk}/s"), None)
    assert list(disk.iterdir()) == []


def test_a_directory_that_another_run_takes_meanwhile_stays(answers, monkeypatch):
    def after_another(directory, cells):
        Path("s/0").mkdir(parents=True)
        Path("s/0/job.json").write_text('{"scheduler": "slurm", "job_ids": ["7"]}')
        make_cells(directory, cells)

    monkeypatch.setattr(queue, "make_cells", after_another)
    with pytest.raises(UserError, match="was taken by another run just now"):
        queue_new(task_of(*SWEEP), None)
    assert ids_in("s/0") == ["7"]
