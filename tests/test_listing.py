"""The states that `allranks runs` shows, and what it reads them from."""

import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import pytest

from allranks.base.errors import UserError
from allranks.follow.reading import runs_at
from allranks.job import scheduler
from allranks.run import checkpoint, claim
from allranks.run.cells import is_finished, note_job, read_list, runs_below
from allranks.run.claim import Claim
from allranks.run.results import FIGURES, Figures, figures, headings, overrides_of, place_in_sweep
from allranks.run.states import Seen, state_of
from allranks.submit.listing import cancelled, list_runs, listed
from allranks.submit.task import task_again

QUEUED = {"has_job": True, "next_job": "2.pbs"}


@pytest.mark.parametrize(
    ("seen", "state"),
    [
        (Seen(is_finished=True, exit_code="1", queue_state="queued"), "finished"),
        (Seen(**QUEUED, queue_state="running", exit_code="85"), "running"),
        (Seen(**QUEUED, queue_state="queued"), "queued"),
        (Seen(**QUEUED, queue_state="queued (Can Never Run)"), "queued (Can Never Run)"),
        (Seen(**QUEUED, queue_state="held", exit_code="85"), "stopped (goes on by 2.pbs, held)"),
        (Seen(**QUEUED, queue_state="not known", exit_code="85"), "not known"),
        (Seen(has_job=True, exit_code="85"), "stopped"),
        (Seen(has_job=True, exit_code="143"), "killed"),
        (Seen(has_job=True, exit_code="137"), "killed"),
        (Seen(has_job=True, exit_code="85", why_ended="walltime 42 exceeded limit 40"),
         "killed (walltime 42 exceeded limit 40)"),
        (Seen(has_job=True, exit_code="1"), "failed (1)"),
        (Seen(has_job=True, exit_code="1", why_ended="of an earlier job"), "failed (1)"),
        (Seen(has_job=True, exit_code="86", has_checkpoint=True), "failed (86)"),
        (Seen(has_job=True), "lost"),
        (Seen(has_job=True, has_checkpoint=True), "lost"),
        (Seen(is_at_work=True), "running"),
        (Seen(has_checkpoint=True), "stopped"),
        (Seen(), "lost"),
    ],
)  # fmt: skip
def test_the_state_of_a_run(seen, state):
    assert state_of(seen) == state


def test_a_scheduler_says_why_it_has_ended_a_job(tmp_path):
    pbs, slurm = scheduler.named("pbs"), scheduler.named("slurm")
    assert (pbs.why_ended(tmp_path, ["7.pbs"]), slurm.why_ended(tmp_path, ["7"])) == ("", "")
    (tmp_path / "pbs.log").write_bytes(b"\xff\n=>> PBS: job killed: walltime 42 exceeded limit 40\n")
    (tmp_path / "job.log").write_text(
        "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-25T20:00:00 DUE TO TIME LIMIT ***\n"
    )
    assert pbs.why_ended(tmp_path, ["7.pbs"]) == "walltime 42 exceeded limit 40"
    for ids in (["7"], ["5", "7;big"], ["6_1"]):
        assert slurm.why_ended(tmp_path, ids) == "CANCELLED AT 2026-11-25T20:00:00 DUE TO TIME LIMIT"

    with (tmp_path / "job.log").open("a") as file:
        file.write(
            "slurmstepd: error: *** JOB 7 ON n1 CANCELLED AT 2026-11-25T21:00:00 DUE TO JOB REQUEUE ***\n"
        )
    assert slurm.why_ended(tmp_path, ["7"]) == ""


def test_why_an_earlier_job_has_ended_is_not_said_of_the_last_one(tmp_path):
    """The last one has left no word, as where its node has failed."""
    pbs, slurm = scheduler.named("pbs"), scheduler.named("slurm")
    (tmp_path / "pbs.log").write_text("=>> PBS: job killed: walltime 42 exceeded limit 40\n")
    (tmp_path / "job.log").write_text(
        "*** JOB 7 ON n1 CANCELLED AT 2026-11-25T20:00:00 DUE TO TIME LIMIT ***\n"
    )
    (tmp_path / ".started").touch()
    long_ago = time.time() - 60
    os.utime(tmp_path / "pbs.log", (long_ago, long_ago))
    assert pbs.why_ended(tmp_path, ["7.pbs", "9.pbs"]) == ""
    for ids in (["7", "9"], ["6_1", "9"], ["7", "9_0"]):
        assert slurm.why_ended(tmp_path, ids) == ""
    (tmp_path / "pbs.log").touch()
    assert pbs.why_ended(tmp_path, ["7.pbs", "9.pbs"]) == "walltime 42 exceeded limit 40"


def test_a_run_that_was_queued_once_and_goes_on_by_hand_is_running(tmp_path, monkeypatch):
    """But the last sign of life of a job that has just ended is none."""
    monkeypatch.setenv("PATH", str(tmp_path))
    squeue = tmp_path / "squeue"
    squeue.write_text("#!/bin/sh\n")
    squeue.chmod(0o755)
    (tmp_path / "job.json").write_text('{"scheduler": "slurm", "job_ids": ["72_0", "80"]}')
    for job_id, state in ((None, "running"), ("71", "running"), ("80", "lost"), ("73", "lost")):
        (tmp_path / "owner-1.json").write_text(json.dumps({"pid": 1, "job_id": job_id}))
        assert [row["state"] for row in listed(str(tmp_path), print)] == [state], job_id


def test_the_newest_job_is_shown_where_the_scheduler_does_not_answer(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))  # no squeue
    (tmp_path / "job.json").write_text('{"scheduler": "slurm", "job_ids": ["72", "80"]}')
    [row] = listed(str(tmp_path), lambda sentence: None)
    assert (row["state"], row["job_id"]) == ("not known", "80")


def test_a_run_behind_a_link_is_listed_once(tmp_path):
    """As where it was moved to another file system, with a link in its place."""
    for name in ("elsewhere/one", "elsewhere/sweep/0", "elsewhere/sweep/1", "runs/two"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").write_text("name: mlp\n")
    (tmp_path / "elsewhere/sweep/cells.jsonl").touch()
    (tmp_path / "runs/one").symlink_to("../elsewhere/one")
    (tmp_path / "runs/sweep").symlink_to("../elsewhere/sweep")
    (tmp_path / "runs/latest").symlink_to("two")
    (tmp_path / "runs/again").symlink_to("../runs")
    (tmp_path / "runs/gone").symlink_to("nowhere")
    found = sorted(path.relative_to(tmp_path / "runs") for path in runs_below(tmp_path / "runs"))
    assert [str(path) for path in found] == ["one", "sweep/0", "sweep/1", "two"]


def test_a_link_to_where_this_user_may_not_look_is_passed_over(closed):
    with tempfile.TemporaryDirectory() as folder:  # pytest's own folders are for one user
        (Path(folder) / "one").mkdir()
        (Path(folder) / "one/config.yaml").write_text("name: mlp\n")
        (Path(folder) / "theirs").mkdir(0o000)
        (Path(folder) / "runs").mkdir()
        for name in ("one", "theirs"):
            (Path(folder) / "runs" / name).symlink_to(f"../{name}")
        assert [run.name for run in runs_below(Path(folder) / "runs")] == ["one"]


def test_a_folder_whose_name_is_no_utf_8_is_listed(tmp_path, capsys):
    run = tmp_path / os.fsdecode(b"caf\xe9")
    run.mkdir()
    (run / "config.yaml").write_text("name: mlp\n")
    assert list_runs([str(tmp_path)]) == 0
    assert f"{tmp_path}/caf?" in capsys.readouterr().out.encode().decode()
    assert list_runs(["--json", str(tmp_path)]) == 0
    assert json.loads(capsys.readouterr().out)["directory"] == str(run)


def test_of_a_run_whose_files_may_not_be_looked_at_the_others_are_listed():
    """Such a folder can be listed, and not searched: the names of its files are known, and nothing else."""
    # Not tmp_path, which pytest makes for one user alone.
    folder = Path(tempfile.mkdtemp())
    for name in ("good", "hidden"):
        (folder / name).mkdir()
        (folder / name / "config.yaml").write_text("name: mlp\n")
    folder.chmod(0o755)
    (folder / "hidden").chmod(0o744 if os.geteuid() == 0 else 0o600)
    warned: list[str] = []
    was = os.geteuid()
    try:
        if was == 0:  # root may read everything
            os.seteuid(65534)
        rows = listed(str(folder), warned.append)
    finally:
        os.seteuid(was)
        (folder / "hidden").chmod(0o700)
        shutil.rmtree(folder)
    assert [row["state"] for row in rows] == ["not started", "not known"]
    assert f"The state of {folder}/hidden is not known (Permission denied)." in warned
    assert f"{folder}/hidden/metrics.jsonl cannot be read (Permission denied)." in warned


def test_a_run_whose_configuration_is_gone_is_listed(tmp_path):
    for name in ("a/0", "a/1", "b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "metrics.jsonl").write_text('{"epoch": 1, "step": 1, "val/accuracy": 50.0}\n')
    rows = listed(str(tmp_path), pytest.fail)
    assert sorted(row["directory"] for row in rows) == [
        f"{tmp_path}/{name}" for name in ("a/0", "a/1", "b")
    ]
    [row] = listed(str(tmp_path / "b"), pytest.fail)
    assert (row["epochs"], row["val/accuracy"]) == (1, 50.0)
    assert len(runs_at(str(tmp_path))) == 3


def test_a_folder_without_runs_is_refused(tmp_path, capsys):
    with pytest.raises(UserError, match="holds no run: give a folder with runs in it"):
        list_runs([str(tmp_path)])
    assert list_runs(["--json", str(tmp_path)]) == 0  # a program counts lines
    assert capsys.readouterr().out == ""


def test_a_summary_that_is_cut_off_is_named(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("name: mlp\n")
    (tmp_path / "summary.json").write_text('{"state": "finis')
    assert list_runs([str(tmp_path)]) == 0
    assert capsys.readouterr().err.count("summary.json cannot be read: it is not a JSON object") == 1


def test_a_record_of_jobs_may_say_anything(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text("name: mlp\n")
    (tmp_path / "job.json").write_text('{"scheduler": "lsf", "job_ids": [1]}')
    assert list_runs([str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "scheduler=lsf is not known" in said.err
    assert said.out.splitlines()[1].split()[:3] == ["not", "known", "1"]
    with pytest.raises(UserError, match=r"job\.json is damaged or another version's \(KeyError: 'order'\)"):
        task_again(str(tmp_path), {}, must_be_idle=False)


def test_no_run_is_cancelled_where_none_is_named(tmp_path, monkeypatch):
    """`allranks cancel "$RUN"` without that variable, in the directory of another run."""
    (tmp_path / "job.json").write_text('{"scheduler": "pbs", "job_ids": ["1.pbs"]}')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="RUN is empty"):
        cancelled("")


def test_a_run_by_hand_is_at_work_as_long_as_it_touches_its_file(tmp_path):
    run = tmp_path / "runs/mlp/1"
    run.mkdir(parents=True)
    (run / "config.yaml").write_text("name: mlp\n")
    mine = Claim.take(run)
    [row] = listed(str(tmp_path / "runs"), print)
    assert row["state"] == "running"
    long_ago = time.time() - 2 * claim.SILENT_S
    mine._released.set()  # as of a process that is no more
    os.utime(mine.path, (long_ago, long_ago))
    [row] = listed(str(tmp_path / "runs"), print)
    assert (row["state"], row["epochs"], row["test/accuracy"], row["overrides"]) == ("lost", 0, None, [])
    checkpoint.path_of(run, 10).mkdir(parents=True)
    assert listed(str(tmp_path / "runs"), print)[0]["state"] == "stopped"


def test_figures_are_those_of_the_records(tmp_path):
    assert figures(tmp_path) == Figures(0, {}, {})
    (tmp_path / "metrics.jsonl").write_text('{"val/accuracy": 90.0}\n{"val/accuracy": 91.234}\n')
    assert figures(tmp_path).columns() == ("2", "91.23 %", "-")
    (tmp_path / "summary.json").write_text('{"test/accuracy": 92.5}')
    assert figures(tmp_path) == Figures(2, {"val/accuracy": 91.234}, {"test/accuracy": 92.5})
    (tmp_path / "summary.json").write_text('{"test/acc')
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff}\n")
    assert figures(tmp_path) == Figures(0, {}, {})
    (tmp_path / "metrics.jsonl").write_text('{"val/accuracy": 90.0}\n{"val/accu')  # while it is written
    assert figures(tmp_path) == Figures(1, {"val/accuracy": 90.0}, {})
    (tmp_path / "metrics.jsonl").write_text('{"val/accuracy": "high"}\n')
    assert figures(tmp_path).columns() == ("1", "-", "-")


def test_figures_of_other_trainings_are_named():
    own = Figures(3, {"train/loss": 0.25, "val/rmse": 0.5, "val/loss": 0.75}, {"test/loss": 1.0})
    assert own.columns() == ("3", "loss 0.7500", "loss 1.0000")
    assert Figures(3, {"energy": -5.0}, {}).columns() == ("3", "energy -5.0000", "-")
    assert headings([own]) == ("epochs", "val", "test")
    assert headings([]) == headings([own, Figures(1, {"val/accuracy": 90.0}, {})]) == FIGURES


def test_a_cells_job_is_noted_in_a_list_with_damaged_lines(tmp_path):
    lines = [
        '{"index": 0}',
        "[1]",
        "{",
        '{"directory": "/moved/0"}',
        '{"directory": "/moved/1", "job_id": "2.pbs"}',
    ]
    (tmp_path / "cells.jsonl").write_text("".join(f"{line}\n" for line in lines))
    note_job(str(tmp_path / "0"), "7.pbs")
    assert read_list(tmp_path) == [("0", []), ("1", [])]
    noted = [json.loads(line) for line in (tmp_path / "cells.jsonl").read_text().splitlines()]
    assert [line["job_id"] for line in noted] == ["7.pbs", "2.pbs"]


def test_what_is_below_a_file_is_no_finished_run(tmp_path):
    (tmp_path / "notes").write_text("no folder")
    assert not is_finished(tmp_path / "notes")
    note_job(str(tmp_path / "notes/0"), "7.pbs")
    assert figures(tmp_path / "notes") == Figures(0, {}, {})


def test_a_cell_knows_its_place(tmp_path):
    lines = [{"index": i, "overrides": [f"seed={i}"], "directory": f"/moved/{i}"} for i in range(3)]
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert place_in_sweep(tmp_path / "2") == "cell 3/3"
    assert overrides_of(tmp_path / "2") == ["seed=2"]
    assert place_in_sweep(tmp_path) == ""
    assert overrides_of(tmp_path) == []


@pytest.mark.parametrize("name", ["summary.json", "metrics.jsonl"])
def test_a_record_of_brackets_only_is_none(tmp_path, name):
    (tmp_path / name).write_text("[" * 100_000)
    assert figures(tmp_path).tests == {} == figures(tmp_path).metrics
    assert not is_finished(tmp_path)
    (tmp_path / "config.yaml").write_text("")
    assert not is_finished(tmp_path)
