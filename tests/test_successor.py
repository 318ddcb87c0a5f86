"""How long `allranks submit --next` asks a scheduler again, and what it says at the end of a sweep.

test_submit.py queues successors.
"""

import json
import time

import pytest

from allranks.job.scheduler import NoAnswer, ServerUnreached
from allranks.submit import successor
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
