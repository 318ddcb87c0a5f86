"""How long `allranks submit --next` asks a scheduler again, and what it says at the end of a sweep.

test_submit.py queues successors.
"""

import json
import os
import re
import time
from functools import partial

import pytest

from allranks.base.errors import UserError
from allranks.job import batch, scheduler
from allranks.job.scheduler import NoAnswer, ServerUnreached
from allranks.run import checkpoint
from allranks.submit import script, successor
from allranks.submit.order import Order
from helpers import took_at_most
from other_trainings import make


class Server:
    """Raises `error` for the first `times` questions, then answers."""

    def __init__(self, error, times):
        self.error, self.left, self.asked = error, times, 0

    def __call__(self):
        self.asked += 1
        if self.asked <= self.left:
            raise self.error("the server is down.")
        return "7.pbs"


@pytest.fixture
def clock(monkeypatch):
    """A clock that goes on in pauses only; the pauses."""
    now, pauses = [1000.0], []

    def sleep(pause_s):
        pauses.append(pause_s)
        now[0] += pause_s

    monkeypatch.setattr(successor.time, "sleep", sleep)
    monkeypatch.setattr(successor.time, "monotonic", lambda: now[0])
    monkeypatch.setattr(successor.time, "time", lambda: now[0])
    monkeypatch.delenv("ALLRANKS_DEADLINE", raising=False)
    monkeypatch.delenv("ALLRANKS_JOB_END", raising=False)
    return pauses


def test_a_server_that_comes_back_answers(clock):
    server = Server(ServerUnreached, times=5)
    assert successor._patiently(server, "run") == "7.pbs"
    assert clock == [1, 2, 4, 8, 15]


def test_patience_ends_with_the_jobs_time(clock, monkeypatch):
    """20 s after the deadline the job is killed; 5 s of these are left for the script's end."""
    monkeypatch.setenv("ALLRANKS_DEADLINE", str(int(time.time()) + 5))
    with pytest.raises(
        ServerUnreached, match="`allranks submit --cell 'a run'` does, from the newest checkpoint"
    ):
        successor._patiently(Server(ServerUnreached, times=10**6), "a run")
    assert sum(clock) == 1 + 2 + 4 + 8


def test_a_server_that_answers_too_late_leaves_time_to_say_how_to_go_on(tmp_path, monkeypatch):
    """qsub takes longer than the job has left: it is given up, with some seconds for the message."""
    (tmp_path / "qsub").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "qsub").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("ALLRANKS_JOB_END", str(int(time.time()) + successor.LAST_S + 1))
    began = time.monotonic()
    with pytest.raises(NoAnswer, match="qsub does not answer within 1 s"):
        successor._patiently(partial(scheduler.named("pbs").submit, "job.sh"), "run")
    assert took_at_most(time.monotonic() - began, 10)
    assert batch._limit_s() == batch.COMMAND_LIMIT_S  # as before, outside


def test_a_long_job_leaves_a_busy_server_the_time_that_it_takes():
    """Half a minute was seen, beside the program's own start."""
    for walltime, least_s in (("00:09:59", 20), ("00:10:00", 60), ("24:00:00", 60)):
        order = Order("generic_pbs", walltime=walltime)
        deadline, end = re.findall(r"start \+ (\d+)", script._deadline(order))
        assert int(end) == order.walltime_s
        assert int(end) - int(deadline) == least_s


def test_patience_ends_after_ten_minutes(clock):
    with pytest.raises(ServerUnreached):
        successor._patiently(Server(ServerUnreached, times=10**6), "run")
    assert 585 <= sum(clock) <= 600


def test_what_may_have_queued_a_job_is_not_asked_again(clock):
    queueing, asking = Server(NoAnswer, times=1), Server(NoAnswer, times=1)
    with pytest.raises(NoAnswer):
        successor._patiently(queueing, "run")
    assert queueing.asked == 1
    assert successor._patiently(asking, "run", is_repeatable=True) == "7.pbs"
    assert asking.asked == 2


@pytest.fixture
def job_of_slurm(tmp_path, monkeypatch):
    """job_of_slurm("scontrol's lines"): a run directory, inside its job 7, with this script as scontrol."""

    def make_run(scontrol):
        (tmp_path / "bin").mkdir()
        script_path = tmp_path / "bin/scontrol"
        script_path.write_text(f"#!/bin/sh\necho $* >> {tmp_path}/asked\n{scontrol}\n")
        script_path.chmod(0o755)
        run = tmp_path / "run"
        run.mkdir()
        job = {"scheduler": "slurm", "job_ids": ["7"], "program": [], "order": {}}
        (run / "job.json").write_text(json.dumps(job))
        monkeypatch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        monkeypatch.setenv("SLURM_JOB_ID", "7")
        return run

    return make_run


def test_a_slurm_that_is_busy_is_asked_again_to_queue_the_job(job_of_slurm, clock, tmp_path):
    run = job_of_slurm(
        f"[ $(wc -l < {tmp_path}/asked) -gt 2 ] && exit 0\n"
        "echo 'Socket timed out on send/recv operation for job 7' >&2; exit 1"
    )
    assert successor.go_on(str(run)) == 85
    assert (tmp_path / "asked").read_text() == "requeue 7\n" * 3
    assert (run / ".next-7-0").exists()


def test_a_job_that_may_not_be_queued_again_says_how_to_go_on(job_of_slurm, clock, tmp_path):
    run = job_of_slurm("echo 'Requested operation is presently disabled for job 7' >&2; exit 1")
    with pytest.raises(
        UserError, match=f"presently disabled.*no job goes on: `allranks submit --cell {run}`"
    ):
        successor.go_on(str(run))
    assert (tmp_path / "asked").read_text() == "requeue 7\n"
    assert not (run / ".next-7-0").exists()


def test_a_damaged_checkpoint_is_no_step_that_was_gained(tmp_path):
    checkpoint.write(tmp_path, 10, {"state.json": b"{}"}, "token", lambda: None)
    newest = checkpoint.write(tmp_path, 20, {"state.json": b"{}", "model.pt": b"1"}, "token", lambda: None)
    assert successor._reached(str(tmp_path)) == (20, 0)
    (newest / "model.pt").unlink()
    assert successor._reached(str(tmp_path)) == (10, 0)


def test_an_epoch_that_is_closed_at_the_same_step_is_gained(tmp_path):
    """A job may have had time for the evaluation only."""
    me = scheduler.ThisJob("7.pbs", "7.pbs", 0)
    (tmp_path / ".next-5.pbs-0").write_text("20")  # as versions before wrote it
    (tmp_path / ".next-6.pbs-0").write_text("20 1")
    checkpoint.write(tmp_path, 20, {"state.json": b'{"epoch":2}'}, "token", lambda: None)
    assert successor._mark_this_start(str(tmp_path), me) == tmp_path / ".next-7.pbs-0"
    with pytest.raises(successor.RunStuck, match=r"not gained a step \(step 20\)"):
        successor._mark_this_start(str(tmp_path), scheduler.ThisJob("8.pbs", "8.pbs", 0))


def test_a_run_directory_that_cannot_be_written_is_told(read_only):
    me = scheduler.ThisJob("7.pbs", "7.pbs", 0)
    with pytest.raises(UserError, match=r"cannot be written .* so no job is queued"):
        successor._mark_this_start(str(read_only), me)


def test_the_last_job_of_a_sweeps_last_cell_leaves_the_comparison(tmp_path, monkeypatch, capfd):
    """The cell has stopped before its end, and no other job goes on with it."""
    sweep = tmp_path / "sweep"
    make(sweep / "0", "regression", tests={"test/loss": 0.5})
    make(sweep / "1", "regression", seed=1)
    cells = [{"directory": str(sweep / name), "overrides": [f"seed={name}"]} for name in ("0", "1")]
    (sweep / "cells.jsonl").write_text("".join(json.dumps(cell) + "\n" for cell in cells))
    job = {"scheduler": "pbs", "job_ids": ["7.pbs"], "program": [], "order": {"chain": 1}}
    (sweep / "1/job.json").write_text(json.dumps(job))
    for name, value in {"PBS_JOBID": "7.pbs", "PBS_ENVIRONMENT": "PBS_BATCH"}.items():
        monkeypatch.setenv(name, value)
    assert successor.go_on(str(sweep / "1")) == 85
    said = capfd.readouterr().out
    assert f"{sweep / '1'} is not finished: this was the last job of it" in said
    assert f"All 2 cells of {sweep} have ended." in said
    assert "1 finished, 1 stopped" in said, said
    assert successor.go_on(str(sweep / "1")) == 85  # the script is started once more
