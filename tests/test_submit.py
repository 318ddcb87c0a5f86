"""`allranks submit`, `runs` and `cancel`: PBS by a stand-in (tests/pbs_standin), Slurm the real one."""

import contextlib
import importlib.util
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import pytest

from allranks import cli
from allranks.base.errors import UserError
from allranks.job import batch, scheduler
from allranks.run import checkpoint
from allranks.run.cells import cells_of_command_line, frozen_cells, make_cells, write_list
from allranks.run.claim import Claim
from conftest import SETTING
from helpers import (
    NO_REPORT,
    OWNER,
    PYTHON,
    ROOT,
    SMALL,
    TIMEOUT_S,
    Run,
    Started,
    execute,
    forked_python,
    only_long,
    serial,
    took_at_most,
    tree,
    until,
    until_step,
)
from test_resume import figures

STANDIN = ROOT / "tests/pbs_standin"
CLUSTER = ROOT.parent / "shared/cluster"
ONE_EPOCH = (*SMALL, "trainer.epochs=1", "model.dropout=0")  # dropout is each rank's own
needs_launch = pytest.mark.skipif(
    importlib.util.find_spec("allranks.launch.supervisor") is None,
    reason="allranks.launch.supervisor is not there",
)
PBS = ("--machine", "generic_pbs", "--walltime", "00:05:00")
ANSWER = "import os; print(os.environ['RANK'], os.environ.get('ANSWER'))"


class Cluster:
    """Runs `allranks` where the scheduler's commands are on PATH, in `folder`."""

    def __init__(self, folder, env):
        self.folder, self.env = folder, env

    def allranks(self, *words, **more):
        words = [forked_python(), "-m", "allranks", *words]
        return execute(words, self.folder, {**self.env, **more}, timeout_s=60)

    def submit(self, *words, **more):
        """Its answer, as JSON."""
        done = self.allranks("submit", "--json", *words, **more)
        return json.loads(done.ok().out)

    def refused(self, *words, **more):
        done = self.allranks("submit", *words, **more)
        assert done.code == 2, (done.out, done.err)
        assert done.out == ""
        return done.message

    def rows(self, *words):
        return [json.loads(line) for line in self.allranks("runs", "--json", *words).ok().out.splitlines()]

    def progress(self):
        """What changes with the states of the jobs; None where only a command of the scheduler can tell."""
        return None

    def until(self, *wanted, within_s=120, root="runs"):
        """Waits until the runs are in these states, each a regular expression; their rows."""
        deadline = time.monotonic() + within_s
        while True:
            seen = self.progress()
            rows = self.rows(root)
            states = [row["state"] for row in rows]
            if len(states) == len(wanted) and all(map(re.fullmatch, wanted, states)):
                return rows
            assert time.monotonic() < deadline, (
                rows,
                [p.read_text() for p in self.folder.rglob("job.log")],
            )
            # Each look is a process. So the next one waits for a change, where a change can be seen.
            again = time.monotonic() + (0.3 if seen is None else 2.0)
            while self.progress() == seen and time.monotonic() < again:
                time.sleep(0.05)


class Standin(Cluster):
    def progress(self):
        return {path: path.read_bytes() for path in Path(self.env["PBS_STANDIN"]).glob("jobs/*.json")}

    def job(self, job_id):
        return json.loads((Path(self.env["PBS_STANDIN"]) / "jobs" / f"{job_id}.json").read_text())

    def qdel(self, job_id):
        subprocess.run([STANDIN / "qdel", job_id], env={**os.environ, **self.env}, timeout=20, check=False)


@pytest.fixture
def pbs(tmp_path):
    """The stand-in for PBS; its jobs are ended with the test."""
    folder, state = tmp_path / "work", tmp_path / "pbs"
    folder.mkdir()
    path = f"{STANDIN}:{os.environ['PATH']}"
    here = {"PBS_STANDIN": str(state), "PATH": path, "PYTHONPATH": str(ROOT / "src")}
    yield Standin(folder, here)
    (state / "down").unlink(missing_ok=True)
    jobs = [json.loads(p.read_text()) for p in state.glob("jobs/*.json")] if state.exists() else []
    left = [job["id"] for job in jobs if job["state"] != "F"]
    if left:
        subprocess.run([STANDIN / "qdel", *left], env={**os.environ, **here}, timeout=60, check=False)


# --- queueing ------------------------------------------------------------------------------------


def test_a_job_is_queued_and_recorded(pbs):
    done = pbs.allranks("submit", *PBS, "--ppn", "2", "--name", "try", "model=cnn", *ONE_EPOCH[:-1]).ok()
    [run] = (pbs.folder / "runs/cnn").iterdir()
    *lines, last = done.out.splitlines()
    if last.startswith("note"):  # where the tests' folder is in /tmp, of which other nodes see nothing
        assert last.startswith(f"note       {run} is in ")
    else:
        lines.append(last)
    assert lines == ["job        1.pbs", f"directory  {run}", f"follow     tail -F {run}/job.log"]
    assert done.err == ""
    record = json.loads((run / "job.json").read_text())
    assert record["job_ids"] == ["1.pbs"]
    assert record["order"]["walltime"] == "00:05:00"
    assert "name: cnn" in (run / "config.yaml").read_text()
    there = pbs.job("1.pbs")
    assert Path(there["script"]).read_text() == (run / "job.sh").read_text()
    assert (there["name"], there["queue"], there["output"]) == ("try", "workq", f"{run}/pbs.log")
    assert there["resources"] == ["select=1:ncpus=2:mpiprocs=2", "walltime=00:05:00"]


def test_the_sha256_in_the_record_is_that_of_the_frozen_configuration(pbs):
    answer = pbs.submit(*PBS, *ONE_EPOCH)
    config = Path(answer["directory"]) / "config.yaml"
    told = json.loads((config.parent / "job.json").read_text())["config_sha256"]
    assert (
        subprocess.run(["sha256sum", config], capture_output=True, text=True, check=True).stdout.split()[0]
        == told
    )


def test_a_chain_waits_for_the_link_before(pbs):
    answer = pbs.submit(*PBS, "--chain", "3", "--", PYTHON, "-c", "import time; time.sleep(30)")
    assert answer["job_ids"] == ["1.pbs", "2.pbs", "3.pbs"]
    assert [pbs.job(job_id)["after"] for job_id in answer["job_ids"]] == ["", "1.pbs", "2.pbs"]
    assert len(list((pbs.folder / "runs").glob("*/*"))) == 1


def test_a_sweep_is_one_array_with_a_directory_for_each_cell(pbs):
    answer = pbs.submit(*PBS, "-m", *ONE_EPOCH, "optimizer.lr=0.1,0.01", "model.widths=[8],[16]")
    assert answer["job_ids"] == ["1[].pbs"]
    sweep = Path(answer["directory"])
    cells = [json.loads(line) for line in (sweep / "cells.jsonl").read_text().splitlines()]
    assert [cell["index"] for cell in cells] == [0, 1, 2, 3]
    assert [cell["directory"] for cell in cells] == [f"{sweep}/{i}" for i in range(4)]
    assert [cell["job_id"] for cell in cells] == [f"1[{i}].pbs" for i in range(4)]
    assert {"optimizer.lr=0.01", "model.widths=[8]"} <= set(cells[2]["overrides"])
    frozen = (sweep / "2/config.yaml").read_text()
    assert "lr: 0.01" in frozen
    assert "- 8" in frozen


def test_a_sweep_of_one_cell_is_a_plain_job(pbs):
    answer = pbs.submit(*PBS, "-m", "optimizer.lr=0.1", *ONE_EPOCH)
    assert answer["job_ids"] == ["1.pbs"]
    [cell] = [
        json.loads(line) for line in (Path(answer["directory"]) / "cells.jsonl").read_text().splitlines()
    ]
    assert cell["job_id"] == "1.pbs"
    assert pbs.job("1.pbs")["output"] == f"{answer['directory']}/0/pbs.log"


def test_a_program_has_a_run_directory_too(pbs):
    (pbs.folder / "my app.py").write_text(ANSWER)
    answer = pbs.submit(*PBS, "--", "python", "my app.py", "it's $x")
    assert Path(answer["directory"]).parent == pbs.folder / "runs/my-app"
    assert """-- python 'my app.py' 'it'"'"'s $x' &""" in (Path(answer["directory"]) / "job.sh").read_text()


# --- jobs that run -------------------------------------------------------------------------------


@pytest.mark.long
@needs_launch
def test_a_queued_training_has_the_curve_of_one_by_hand(pbs, train, tmp_path):
    pbs.submit(*PBS, "--ppn", "2", *ONE_EPOCH)
    [row] = pbs.until("finished")
    assert row["job_id"] == "1.pbs"
    by_hand = train(*ONE_EPOCH, cwd=tmp_path / "hand").ok().run
    mine = Run(pbs.folder / row["directory"])
    assert mine.summary["world_size"] == 2
    assert mine.losses == pytest.approx(by_hand.losses, rel=1e-5)
    assert (row["epochs"], row["val/accuracy"]) == (1, mine.column("val/accuracy")[-1])
    table = pbs.allranks("runs").ok().out.splitlines()
    columns = ["state", "job", "epochs", "val/accuracy", "test/accuracy", "directory", "overrides"]
    assert table[0].split() == columns
    assert row["test/accuracy"] == mine.summary["test/accuracy"]
    assert row["overrides"] == list(ONE_EPOCH)
    assert table[1].split()[:3] == ["finished", "1.pbs", "1"]


@needs_launch
def test_a_chain_ends_early_when_the_run_is_finished(pbs):
    answer = pbs.submit(*PBS, "--ppn", "1", "--chain", "3", *ONE_EPOCH)
    pbs.until("finished")
    log = Path(answer["directory"]) / "job.log"
    deadline = time.monotonic() + TIMEOUT_S
    while "cancelled" not in log.read_text():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    assert log.read_text().splitlines()[-1] == "finished: 2.pbs, 3.pbs cancelled"
    assert [pbs.job(f"{i}.pbs")["exit_status"] for i in (2, 3)] == [271, 271]


@needs_launch
def test_the_next_link_goes_on_where_one_was_cut_short(pbs):
    answer = pbs.submit(*PBS, "--ppn", "1", "--chain", "2", "--no-preflight", *SMALL, "trainer.epochs=4000")
    run = Path(answer["directory"])
    deadline = time.monotonic() + TIMEOUT_S
    while not checkpoint.steps(run):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    pbs.qdel("1.pbs")
    while "going on from" not in (run / "job.log").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.1)
    [row] = pbs.rows()
    assert (row["state"], row["job_id"]) == ("running", "2.pbs")
    assert pbs.allranks("cancel", str(run)).ok().out == f"cancelled 2.pbs of {run}\n"
    assert pbs.until("stopped|killed")
    assert [line["epoch"] for line in Run(run).metrics] == list(range(1, len(Run(run).metrics) + 1))


@needs_launch
@pytest.mark.long
def test_a_run_that_stops_before_its_walltime_queues_one_successor(pbs):
    """Walltime 40 s: 20 s are the script's, and 10 s the run's own margin."""
    words = ("--ppn", "1", "--no-preflight", *SMALL, "trainer.epochs=100000", "checkpoint.every_s=1")
    run = Path(pbs.submit("--machine", "generic_pbs", "--walltime", "00:00:40", *words)["directory"])
    deadline = time.monotonic() + TIMEOUT_S
    while not (run / "job.log").exists() or "going on from" not in (run / "job.log").read_text():
        assert time.monotonic() < deadline, (run / "job.log").read_text()
        time.sleep(0.2)
    assert pbs.job("1.pbs")["exit_status"] == 85
    pbs.allranks("cancel", str(run)).ok()
    pbs.until("stopped|killed")  # what is cancelled queues no other
    queued = [f"{i}.pbs" for i in range(1, 1 + len(list(Path(pbs.env["PBS_STANDIN"]).glob("jobs/*.json"))))]
    assert json.loads((run / "job.json").read_text())["job_ids"] == queued
    assert len(list(run.glob(".next-*"))) in (len(queued) - 1, len(queued))
    again = [pbs.allranks("submit", "--next", str(run), PBS_JOBID="1.pbs") for _ in range(2)]
    assert [done.code for done in again] == [85, 85]
    assert len(list(Path(pbs.env["PBS_STANDIN"]).glob("jobs/*.json"))) == len(queued)
    (run / ".next-0.pbs-0").write_text("1000000000")
    stuck = pbs.allranks("submit", "--next", str(run), PBS_JOBID="99.pbs")
    assert stuck.code == 86
    assert "this job has not gained a step" in stuck.message


# Sixty steps of a tenth of a second, of which one job has time for some.
OWN_PROGRAM = """
import os, pathlib, sys, time, allranks
state = pathlib.Path("step")
step = int(state.read_text()) if state.exists() else 0
while step < 60:
    time.sleep(0.1)
    step += 1
    allranks.heartbeat()
    if allranks.should_stop(reserve_s=5):
        if os.environ["RANK"] == "0":
            state.write_text(str(step))
        sys.exit(allranks.EXIT_REQUEUE)
state.write_text(str(step))
"""


@needs_launch
@pytest.mark.long
def test_a_program_that_stops_before_its_walltime_goes_on_in_another_job(pbs):
    """Walltime 40 s: 20 s are the script's, and 5 s the program's own. The steps take 18 s in all."""
    (pbs.folder / "own.py").write_text(OWN_PROGRAM.replace("sleep(0.1)", "sleep(0.3)"))
    words = ("--ppn", "2", "--no-preflight", "--", PYTHON, "own.py")
    run = Path(pbs.submit("--machine", "generic_pbs", "--walltime", "00:00:40", *words)["directory"])
    code = run / "exit_code"
    until(lambda: code.exists() and code.read_text() == "0\n", TIMEOUT_S)
    log = (run / "job.log").read_text()
    jobs = json.loads((run / "job.json").read_text())["job_ids"]
    assert len(jobs) >= 2 and log.count("goes on from step") == len(jobs) - 1, log
    assert "the job's end: all ranks stop at call" in log
    assert (pbs.folder / "step").read_text() == "60"


# In its first job it is told to stop in its fifth step.
OWN_LOOP = """
import os, pathlib, signal, torch, allranks
from torch.utils.data import DataLoader, TensorDataset
run = allranks.open("loop", seed=1, report=False)
model = run.wrap(torch.nn.Linear(1, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.keep(model=model, optimizer=optimizer)
x = torch.linspace(-1, 1, 100)[:, None]
for epoch in run.epochs(2):
    for inputs, targets in run.steps(DataLoader(TensorDataset(x, 2 * x), batch_size=10, shuffle=True)):
        if run.step == 4 and not pathlib.Path("told").exists():
            pathlib.Path("told").touch()
            os.kill(os.getpid(), signal.SIGUSR1)
        run.backward(torch.nn.functional.mse_loss(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
run.finish()
"""


@needs_launch
@pytest.mark.long
def test_a_loop_of_ones_own_goes_on_in_another_job(pbs):
    (pbs.folder / "own.py").write_text(OWN_LOOP)
    program = ("--ppn", "1", "--no-preflight", "--", PYTHON, "own.py")
    job = Path(pbs.submit(*PBS, *program)["directory"])
    code = job / "exit_code"
    until(lambda: code.exists() and code.read_text() == "0\n", 90)
    assert "goes on from step" in (job / "job.log").read_text()
    assert json.loads((job / "job.json").read_text())["job_ids"] == ["1.pbs", "2.pbs"]
    assert Run(pbs.folder / "runs/loop").summary["state"] == "finished"


@needs_launch
def test_a_program_of_whose_steps_nothing_is_known_has_no_job_after_it(pbs):
    program = (PYTHON, "-c", "raise SystemExit(85)")
    run = Path(pbs.submit(*PBS, "--ppn", "1", "--no-preflight", "--", *program)["directory"])
    log = run / "job.log"
    until(lambda: log.exists() and "this was the last job of it" in log.read_text(), TIMEOUT_S)
    assert json.loads((run / "job.json").read_text())["job_ids"] == ["1.pbs"]


def test_where_a_user_may_have_one_job_the_way_on_is_told_and_is_no_failure(pbs, long):
    """The job that would go on is refused while this one is there; its machine file knows that."""
    state = Path(pbs.env["PBS_STANDIN"])
    state.mkdir(exist_ok=True)
    (state / "one-job-in-debug").touch()
    limited = ("--machine", "generic_pbs", "--queue", "debug", "machine.queues.debug.jobs_per_user=1")
    words = ("--ppn", "1", "--no-preflight", *SMALL, "trainer.epochs=100000", "checkpoint.every_s=1")
    told = pbs.allranks("submit", *limited, "--walltime", "00:00:40", *words, "run.dir=mine").ok().out
    run = pbs.folder / "mine"
    way = (
        "queue debug takes one job of a user at a time, so this one cannot queue the next: once it has "
        "ended with the run not finished, go on from the newest checkpoint with `allranks submit --cell "
        f"{run}`"
    )
    assert told.splitlines()[-1] == f"note       {way}"
    if not long:  # what follows waits for the end of the walltime
        pbs.qdel("1.pbs")
        return
    pbs.until("stopped", root=".")
    assert f"has stopped at step {max(checkpoint.steps(run))}: {way}" in (run / "job.log").read_text()
    assert pbs.job("1.pbs")["exit_status"] == 85
    assert json.loads((run / "job.json").read_text())["job_ids"] == ["1.pbs"]
    pbs.allranks("submit", "--cell", str(run)).ok()
    assert json.loads((run / "job.json").read_text())["job_ids"] == ["1.pbs", "2.pbs"]


def unfinished(pbs, *overrides):
    """A run in `mine` that has stopped with a checkpoint."""
    words = [forked_python(), "-m", "allranks", "train", *SMALL, *overrides, "run.dir=mine"]
    assert execute(words, pbs.folder, {**pbs.env, "ALLRANKS_DEADLINE": "1"}).code == 85
    assert checkpoint.steps(pbs.folder / "mine")


def test_a_job_is_refused_where_a_run_by_hand_is_at_work(pbs):
    unfinished(pbs)
    with Started([PYTHON, "-c", OWNER, "mine"], pbs.folder, **pbs.env) as owner:
        assert next(owner.lines()) == "taken"
        refused = pbs.refused(*PBS, *SMALL, "run.dir=mine")
        assert f"is in use by process {owner.process.pid}" in refused
    # What is left of a process of this host that was killed keeps nobody out.
    assert list((pbs.folder / "mine").glob("owner-*.json"))
    answer = pbs.submit(*PBS, *SMALL, "run.dir=mine")
    assert answer["job_ids"] == ["1.pbs"]


def test_a_job_that_is_refused_leaves_a_run_that_was_there_alone(pbs):
    unfinished(pbs)
    before = tree(pbs.folder / "mine")
    Path(pbs.env["PBS_STANDIN"]).mkdir(exist_ok=True)
    (Path(pbs.env["PBS_STANDIN"]) / "down").touch()
    assert "scheduler is down" in pbs.refused(*PBS, *SMALL, "run.dir=mine")
    assert set(before) <= set(tree(pbs.folder / "mine"))
    (Path(pbs.env["PBS_STANDIN"]) / "down").unlink()
    assert "queue" in pbs.refused(*PBS, "--queue", "none", *SMALL, "run.dir=mine")
    assert set(before) <= set(tree(pbs.folder / "mine"))


def test_a_queued_run_that_is_launched_with_other_means_stays_startable(pbs, monkeypatch):
    """checkpoint.keep is no part of what a run computes; but the job knows the file by its sha256."""
    monkeypatch.chdir(pbs.folder)
    queued = [*SMALL, "run.dir=mine"]
    make_cells(*cells_of_command_line(queued))
    [cell] = cells_of_command_line(queued)[1]
    about = {"scheduler": "pbs", "job_ids": ["1.pbs"], "config_sha256": cell.sha256}
    (pbs.folder / "mine/job.json").write_text(json.dumps(about))
    make_cells(*cells_of_command_line([*queued, "checkpoint.keep=7"]))
    [found] = frozen_cells("mine")[1]
    assert found.config.checkpoint.keep == 7
    claim = Claim.take("mine")
    with pytest.raises(UserError, match="is in use by process"):
        make_cells(*cells_of_command_line([*queued, "checkpoint.keep=9"]))
    claim.release()
    assert frozen_cells("mine")[1][0].config.checkpoint.keep == 7


def test_a_sweep_that_is_started_again_is_the_same_sweep(pbs, monkeypatch):
    monkeypatch.chdir(pbs.folder)
    words = [*SMALL, "-m", "optimizer.lr=0.1,0.2", "run.dir=mine"]
    make_cells(*cells_of_command_line(words))
    before = tree(pbs.folder)
    assert cells_of_command_line(words)[0] == str(pbs.folder / "mine")
    make_cells(*cells_of_command_line(words))
    assert tree(pbs.folder) == before
    with pytest.raises(UserError, match="another configuration"):
        make_cells(*cells_of_command_line([*SMALL, "-m", "optimizer.lr=0.3,0.4", "run.dir=mine"]))


def test_a_submitted_sweep_that_is_launched_keeps_its_list(pbs, monkeypatch):
    """The job ids stay, and with fewer values the other cells, too. With more values the list grows."""
    monkeypatch.chdir(pbs.folder)
    directory, cells = cells_of_command_line([*SMALL, "-m", "seed=1,2", "run.dir=mine"])
    make_cells(directory, cells)
    write_list(directory, cells, ["1[0].pbs", "1[1].pbs"])
    for seeds in ("1,2", "1", "1,2,3"):
        make_cells(*cells_of_command_line([*SMALL, "-m", f"seed={seeds}", "run.dir=mine"]))
    lines = [json.loads(line) for line in (pbs.folder / "mine/cells.jsonl").read_text().splitlines()]
    assert [(line["index"], line["job_id"]) for line in lines] == [
        (0, "1[0].pbs"),
        (1, "1[1].pbs"),
        (2, None),
    ]


def test_a_configuration_that_is_frozen_anew_is_written_before_another_launch_may_begin(pbs, monkeypatch):
    monkeypatch.chdir(pbs.folder)
    make_cells(*cells_of_command_line([*SMALL, "run.dir=mine"]))
    released = []
    release = Claim.release

    def looking(claim: Claim) -> None:
        released.append("keep: 7" in Path("mine/config.yaml").read_text())
        release(claim)

    monkeypatch.setattr(Claim, "release", looking)
    make_cells(*cells_of_command_line([*SMALL, "run.dir=mine", "checkpoint.keep=7"]))
    assert released == [True]
    assert list(Path("mine").glob("owner-*.json")) == []


def test_more_epochs_for_a_run_are_told_the_way(pbs, monkeypatch):
    monkeypatch.chdir(pbs.folder)
    make_cells(*cells_of_command_line([*SMALL, "run.dir=mine"]))
    with pytest.raises(UserError, match=r"begin another from it: resume=\S+/mine with a new run.dir"):
        make_cells(*cells_of_command_line([*SMALL, "run.dir=mine", "trainer.epochs=9"]))
    with pytest.raises(UserError, match=r"or the same values\.$"):
        make_cells(*cells_of_command_line([*SMALL, "run.dir=mine", "trainer.epochs=9", "seed=9"]))


def test_a_finished_run_is_finished_even_if_the_scheduler_is_down(pbs):
    """--next: its exit code is the job's, and the next link of a chain looks at it."""
    state = Path(pbs.env["PBS_STANDIN"])
    answer = pbs.submit(*PBS, "--ppn", "1", "--chain", "2", "--", "true")
    run = Path(answer["directory"])
    pbs.until("finished")
    (state / "down").touch()
    done = pbs.allranks("submit", "--next", str(run), PBS_JOBID="1.pbs")
    assert done.code == 0
    assert "scheduler is down" in done.err


def queued_before(pbs, job_id="1.pbs"):
    """`mine`, as if job `job_id` had been queued for it."""
    unfinished(pbs)
    order = {"machine": "generic_pbs", "name": "mine", "walltime": "00:05:00", "machine_overrides": []}
    about = {"scheduler": "pbs", "job_ids": [job_id], "program": [], "order": order}
    (pbs.folder / "mine/job.json").write_text(json.dumps(about))
    state = Path(pbs.env["PBS_STANDIN"])
    state.mkdir(exist_ok=True)
    return state


def test_a_server_that_is_down_for_a_moment_is_asked_again(pbs):
    state = queued_before(pbs, "0.pbs")
    (state / "down").touch()
    threading.Timer(4, (state / "down").unlink).start()
    until = str(int(time.time()) + 60)
    done = pbs.allranks("submit", "--next", "mine", PBS_JOBID="0.pbs", ALLRANKS_DEADLINE=until)
    assert done.code == 85, done.err
    assert re.search(r"mine goes on from step \d+: job 1.pbs is queued\n", done.out)
    assert json.loads((pbs.folder / "mine/job.json").read_text())["job_ids"] == ["0.pbs", "1.pbs"]


def test_a_server_that_stays_down_until_the_jobs_end(pbs):
    """What goes on then is named, and another try may queue the successor."""
    state = queued_before(pbs)
    (state / "down").touch()
    soon = str(int(time.time()) - 12)  # END_S after that the job is killed
    done = pbs.allranks("submit", "--next", "mine", PBS_JOBID="1.pbs", ALLRANKS_DEADLINE=soon)
    assert done.code == 2
    assert "`allranks submit --cell mine` does, from the newest checkpoint" in done.message
    assert list((pbs.folder / "mine").glob(".next-*")) == []


def test_a_successor_that_a_full_disk_prevents_can_be_asked_for_again(pbs, mounted):
    unfinished(pbs)
    disk = mounted("size=2m")
    run = disk / "mine"
    shutil.copytree(pbs.folder / "mine", run)
    order = {"machine": "generic_pbs", "name": "mine", "walltime": "00:05:00", "machine_overrides": []}
    about = {"scheduler": "pbs", "job_ids": ["1.pbs"], "program": [], "order": order}
    (run / "job.json").write_text(json.dumps(about))
    with (disk / "ballast").open("wb", buffering=0) as file, contextlib.suppress(OSError):
        while file.write(bytes(4096)):
            pass
    (run / "one-more").touch()
    done = pbs.allranks("submit", "--next", str(run), PBS_JOBID="1.pbs")
    assert f"{run} cannot be written (No space left on device), so no job is queued" in done.message
    assert list(run.glob(".next-*")) == []


def test_what_others_leave_below_runs_does_not_hide_the_list(pbs):
    for number, (name, text) in enumerate(
        [("job.json", "[1]"), ("job.json", '{"a": 1}'), ("job.json", "{"), ("config.yaml", "a: 1")]
    ):
        (pbs.folder / f"runs/{number}").mkdir(parents=True)
        (pbs.folder / f"runs/{number}/{name}").write_text(text)
    (pbs.folder / "runs/2/metrics.jsonl").write_text("5\n")
    (pbs.folder / "runs/3/metrics.jsonl").write_bytes(b"\xff abc}")
    done = pbs.allranks("runs", "--json").ok()
    assert [json.loads(line)["directory"] for line in done.out.splitlines()] == [
        f"runs/{i}" for i in range(4)
    ]
    assert "runs/2/job.json cannot be read" in done.err
    assert "no job.json" in pbs.allranks("cancel", "runs/0").message


@pytest.mark.long
@needs_launch
def test_a_cell_that_stops_before_its_walltime_queues_a_job_of_its_own(pbs):
    """Without a dependency: PBS takes none on one job of an array."""
    words = (*SMALL, "trainer.epochs=100000", "checkpoint.every_s=1")
    answer = pbs.submit(*PBS, "--ppn", "1", "--no-preflight", "-m", "seed=1,2", *words)
    cell = Path(answer["directory"]) / "0"
    deadline = time.monotonic() + TIMEOUT_S
    while not checkpoint.steps(cell):
        assert time.monotonic() < deadline, (cell / "job.log").read_text()
        time.sleep(0.2)
    pbs.qdel("1[0].pbs")
    went_on = pbs.allranks("submit", "--next", str(cell), PBS_JOBID="1[0].pbs")
    assert went_on.code == 85, went_on.err
    assert pbs.job("2.pbs")["after"] == ""
    assert json.loads((cell / "job.json").read_text())["job_ids"] == ["1[0].pbs", "2.pbs"]
    while "going on from" not in (cell / "job.log").read_text():
        assert time.monotonic() < deadline, (cell / "job.log").read_text()
        time.sleep(0.2)


@needs_launch
@pytest.mark.long
def test_the_job_of_a_sweep_that_ends_last_compares_its_cells(pbs):
    """Of the whole array one job has the table in its log, and makes the page with links to the cells."""
    words = [word for word in ONE_EPOCH if word != NO_REPORT]
    answer = pbs.submit(*PBS, "--ppn", "1", "--no-preflight", "-m", "seed=1,2", *words)
    sweep = Path(answer["directory"])
    pbs.until("finished", "finished")
    until((sweep / "compare.html").exists)
    until(lambda: all(pbs.job(f"1[{cell}].pbs")["state"] == "F" for cell in (0, 1)))
    logs = [(sweep / str(cell) / "job.log").read_text() for cell in (0, 1)]
    tables = [log for log in logs if f"All 2 cells of {sweep} have ended." in log]
    assert len(tables) == 1
    assert "2 runs: all finished, 1 epoch each. They differ only in their seed." in tables[0]
    html = (sweep / "compare.html").read_text()
    assert all(f'href="{cell}/report.html"' in html for cell in (0, 1))


def test_cancelling_a_sweep_ends_the_jobs_by_which_its_cells_went_on(pbs):
    answer = pbs.submit(
        *PBS, "--ppn", "1", "--no-preflight", "-m", "seed=1,2", *SMALL, "trainer.epochs=100000"
    )
    sweep = Path(answer["directory"])
    deadline = time.monotonic() + TIMEOUT_S
    while not checkpoint.steps(sweep / "0"):
        assert time.monotonic() < deadline, (sweep / "0/job.log").read_text()
        time.sleep(0.2)
    pbs.qdel("1[0].pbs")
    assert pbs.allranks("submit", "--next", str(sweep / "0"), PBS_JOBID="1[0].pbs").code == 85
    cells = [json.loads(line) for line in (sweep / "cells.jsonl").read_text().splitlines()]
    assert [cell["job_id"] for cell in cells] == ["2.pbs", "1[1].pbs"]
    done = pbs.allranks("cancel", str(sweep)).ok()
    assert done.out == f"cancelled 1[].pbs, 2.pbs of {sweep}\n"
    assert pbs.job("2.pbs")["state"] == "F"
    assert "has ended already" in pbs.allranks("cancel", str(sweep)).message


@needs_launch
@pytest.mark.long
def test_a_failed_cell_is_submitted_again_alone(pbs):
    """A cell fails as long as its data are not there."""
    (pbs.folder / "mine.py").write_text(
        "import allranks.data.synthetic as s, pathlib\ndef digits(**kw):\n"
        "    if kw['seed'] == 8: pathlib.Path('there').read_text()\n    return s.digits(**kw)\n"
    )
    text = (ROOT / "conf/data/synthetic.yaml").read_text()
    [function] = set(re.findall(r"_target_: allranks.data.synthetic.(\w+)", text))
    own = (pbs.folder / "mine.py").read_text().replace("digits", function)
    (pbs.folder / "mine.py").write_text(own)
    more = (f"data.train._target_=mine.{function}", f"data.test._target_=mine.{function}", *ONE_EPOCH)
    answer = pbs.submit(*PBS, "--ppn", "1", "--no-preflight", "-m", "data.train.seed=7,8", *more)
    rows = pbs.until("finished", r"failed \(1\)")
    for number, row in enumerate(rows):
        first_line = (pbs.folder / row["directory"] / "job.log").read_text().splitlines()[0]
        assert re.match(rf"cell {number + 1}/2: .*data.train.seed={7 + number}", first_line)
    cell = rows[1]["directory"]
    (pbs.folder / "there").touch()
    assert "is finished" in pbs.refused("--cell", f"{answer['directory']}/0")
    again = pbs.submit("--cell", cell, "--walltime", "00:07:00")
    assert again["job_ids"] == ["2.pbs"]
    assert "walltime=00:07:00" in pbs.job("2.pbs")["resources"]
    assert [row["job_id"] for row in pbs.until("finished", "finished")] == ["1[0].pbs", "2.pbs"]


@pytest.mark.long
@needs_launch
def test_the_same_sweep_here_and_now(pbs):
    """One cell after another, in the same directories, whether or not one fails."""
    words = ("-n", "2", "--no-preflight", "-m", *ONE_EPOCH, "optimizer.lr=0.1,0.01", "run.dir=here")
    here_and_now = pbs.allranks("launch", *words).ok()
    cells = [json.loads(line) for line in (pbs.folder / "here/cells.jsonl").read_text().splitlines()]
    assert [cell["directory"] for cell in cells] == [f"{pbs.folder}/here/{i}" for i in range(2)]
    assert [Run(Path(cell["directory"])).column("lr") for cell in cells] == [[0.1], [0.01]]
    lines = here_and_now.out.splitlines()
    places = [line for line in lines if line.startswith("cell ")]
    assert re.fullmatch(rf"cell 1/2: .*optimizer.lr=0.1.* in {pbs.folder}/here/0", places[0])
    assert re.fullmatch(rf"cell 2/2: .*optimizer.lr=0.01.* in {pbs.folder}/here/1", places[1])
    assert "2 runs: all finished, 1 epoch each. They differ in optimizer.lr." in lines
    assert pbs.rows("here")[1]["overrides"] == cells[1]["overrides"]
    again = pbs.allranks("launch", "--run", "here/1").ok()
    assert again.out.splitlines()[1:] == [f"{pbs.folder}/here/1 is finished: nothing is left to do"]
    failing = ("-n", "1", "--no-preflight", "-m", "run.dir=bad", "data.train.count=1599,1600")
    done = pbs.allranks("launch", *failing, *(word for word in ONE_EPOCH if "train.count" not in word))
    assert done.code != 0
    assert (pbs.folder / "bad/1/summary.json").exists()
    assert not (pbs.folder / "bad/0/summary.json").exists()


@needs_launch
def test_a_users_own_hydra_application(pbs, long):
    """Without --long a sweep here and now: without one that fails, and without jobs."""
    (pbs.folder / "conf").mkdir()
    (pbs.folder / "conf/config.yaml").write_text("lr: 0.1\n")
    (pbs.folder / "app.py").write_text(
        "import os, hydra\nfrom hydra.core.hydra_config import HydraConfig\n"
        "@hydra.main(version_base=None, config_path='conf', config_name='config')\ndef main(cfg):\n"
        "    rank, size = os.environ['RANK'], os.environ['WORLD_SIZE']\n"
        "    open(f'{HydraConfig.get().runtime.output_dir}/{rank}-of-{size}', 'w').write(str(cfg.lr))\n"
        "    if cfg.lr == 9: raise SystemExit(3)\nmain()\n"
    )

    def app(*words):
        here = ["app.py", "-m", "hydra/launcher=allranks", "hydra.launcher.preflight=false", *words]
        return execute([PYTHON, *here], pbs.folder, pbs.env, timeout_s=90)

    app("hydra.launcher.ranks=2", "lr=1,2", "hydra.sweep.dir=sweep").ok()
    results = [p for p in tree(pbs.folder / "sweep") if "-of-" in p]
    assert results == ["0/0-of-2", "0/1-of-2", "1/0-of-2", "1/1-of-2"]
    assert (pbs.folder / "sweep/1/1-of-2").read_text() == "2"
    assert (pbs.folder / "sweep/1/.hydra/config.yaml").read_text() == "lr: 2\n"
    if not long:
        return
    failed = app("hydra.launcher.ranks=1", "lr=9,4", "hydra.sweep.dir=other")
    assert failed.code == 1
    assert "job 0 ended with exit code 3" in failed.err
    assert (pbs.folder / "other/1/0-of-1").exists()  # one that fails does not keep the others from running
    walltime = "hydra.launcher.walltime='00:05:00'"
    app(
        "hydra.launcher.machine=generic_pbs",
        walltime,
        "hydra.launcher.ppn=1",
        "lr=5,6",
        "hydra.sweep.dir=q",
    ).ok()
    assert {row["job_id"] for row in pbs.until("finished", "finished")} == {"1.pbs", "2.pbs"}
    assert (pbs.folder / "q/1/0-of-1").read_text() == "6"


@needs_launch
@pytest.mark.parametrize(
    "name",
    ["debug", *(only_long(name) for name in ("two-nodes", "sweep", "chain"))],
)
def test_the_ready_pbs_scripts_run(pbs, name):
    """As they are, but for the training, what this host lacks, and who has installed allranks."""
    (pbs.folder / "scripts/pbs").mkdir(parents=True)
    (pbs.folder / ".venv/bin").mkdir(parents=True)
    bin_ = Path(PYTHON).parent
    (pbs.folder / ".venv/bin/activate").write_text(
        f"export PATH={bin_}:{STANDIN}:$PATH PYTHONPATH={ROOT / 'src'}\n"
        f"export PBS_STANDIN={pbs.env['PBS_STANDIN']}\n"
    )
    path = pbs.folder / f"scripts/pbs/{name}.sh"
    text = (ROOT / f"scripts/pbs/{name}.sh").read_text()
    text = re.sub(r"mpiprocs=\d+:ngpus=\d+", "mpiprocs=1", text)
    if name == "two-nodes":
        assert "#PBS -l place=scatter\n" in text
        text = text.replace("launch --nodes 2 ", "launch ")  # there is one host
    path.write_text(re.sub(r"^training=\(.*?\)", f"training=({' '.join(ONE_EPOCH)})", text, flags=re.M))
    env = {**os.environ, **pbs.env}
    done = subprocess.run(
        ["qsub", path], cwd=pbs.folder, env=env, capture_output=True, text=True, timeout=30, check=True
    )
    wanted = ["finished"] * (3 if name == "sweep" else 1)
    deadline = time.monotonic() + TIMEOUT_S
    while not (pbs.folder / "runs").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.2)
    rows = pbs.until(*wanted)
    run = Run(pbs.folder / rows[0]["directory"])
    assert run.summary["world_size"] == (2 if name == "two-nodes" else 1)
    assert done.stdout.strip() == ("1[].pbs" if name == "sweep" else "1.pbs")
    if name == "chain":
        while not list(pbs.folder.glob("allranks-chain.o2")):
            assert time.monotonic() < deadline
            time.sleep(0.2)
        while "is finished" not in (pbs.folder / "allranks-chain.o2").read_text():
            assert time.monotonic() < deadline
            time.sleep(0.2)


# --- what PBS gives, and what it says -------------------------------------------------------------


def test_a_job_with_fewer_hosts_than_nodes_were_asked_for_starts_nothing(pbs):
    """As place=free was seen to give two chunks of one host."""
    (pbs.folder / "nodes").write_text("n1\nn1\n")
    job = {"PBS_NODEFILE": str(pbs.folder / "nodes"), "PBS_JOBID": "1.pbs"}
    program = ("--", PYTHON, "-c", "open('started', 'w')")
    refused = pbs.allranks("launch", "--job-nodes", "2", "--no-preflight", *program, **job)
    assert refused.code == 2
    assert "2 nodes were asked for, but this job has 1 (PBS_NODEFILE=" in refused.message
    assert "machine.submit.options=[-l place=scatter]" in refused.message
    assert not (pbs.folder / "started").exists()


def qsub_that_says(pbs, before, after="", keeps_the_id=True):
    """A folder with a qsub that queues as the stand-in does, and says more, or less."""
    folder = pbs.folder.parent / "notices"
    folder.mkdir()
    quiet = "" if keeps_the_id else " > /dev/null"
    real = f'{STANDIN}/qsub "$@"{quiet}; code=$?'
    (folder / "qsub").write_text(f"#!/bin/sh\nprintf '{before}'\n{real}\nprintf '{after}'\nexit $code\n")
    (folder / "qsub").chmod(0o755)
    return f"{folder}:{pbs.env['PATH']}"


def test_a_notice_around_the_id_is_no_refusal(pbs):
    path = qsub_that_says(pbs, "Welcome\\377\\n", "Your project has 35 of 100 hours left.\\n")
    answer = pbs.submit(*PBS, "--", PYTHON, "-V", PATH=path)
    assert answer["job_ids"] == ["1.pbs"]
    assert Path(answer["directory"]).is_dir()


def test_a_job_whose_id_is_not_told_keeps_its_directory(pbs):
    path = qsub_that_says(pbs, "Thank you.\\n", keeps_the_id=False)
    message = pbs.refused(
        *PBS, "--name", "try", "--", PYTHON, "-c", "import time; time.sleep(600)", PATH=path
    )
    [record] = pbs.folder.rglob("job.json")
    assert "The job is perhaps queued: look with `qstat -u $USER`" in message
    assert f"The job is named try, and its directory, {record.parent}, is kept" in message
    assert (record.parent / "job.sh").exists()
    assert pbs.job("1.pbs")["name"] == "try"
    assert "has told no id" in pbs.allranks("cancel", str(record.parent)).message


@pytest.mark.parametrize("words", [SMALL, ("--", PYTHON, "-V")], ids=["training", "program"])
def test_a_folder_whose_name_is_no_utf_8(pbs, words):
    pbs.folder = Path(os.fsdecode(bytes(pbs.folder) + b"/caf\xe9"))
    pbs.folder.mkdir()
    assert "has bytes that are no UTF-8" in pbs.refused(*PBS, *words)
    assert list(pbs.folder.iterdir()) == []


# --- dry run -------------------------------------------------------------------------------------


def test_a_dry_run_writes_nothing_asks_nobody_and_loads_no_torch(pbs):
    forbidden = pbs.folder.parent / "forbidden"
    forbidden.mkdir()
    for name in ("qsub", "qstat", "sbatch", "squeue"):
        (forbidden / name).write_text(f"#!/bin/sh\ntouch {forbidden}/asked\n")
        (forbidden / name).chmod(0o755)
    code = "import sys\nfrom allranks import cli\ntry: cli.main()\n"
    code += "finally: print(*sys.modules, file=sys.stderr)"
    for words in (
        ["model=cnn"],
        ["--queue", "capacity", "--chain", "3"],
        ["--queue", "capacity", "-m", "optimizer.lr=0.1,0.2"],
        ["--", "python", "-V"],
    ):
        more = [
            "--machine",
            "aurora",
            "--nodes",
            "1",
            "--walltime",
            "00:30:00",
            "--account",
            "x",
            "--dry-run",
            *words,
        ]
        env = {**pbs.env, "PATH": f"{forbidden}:{os.environ['PATH']}"}
        done = execute([PYTHON, "-c", code, "submit", *more], pbs.folder, env).ok()
        assert "#PBS -l select=1\n" in done.out
        assert "12 ranks on 1 node of aurora" in done.out
        assert "torch" not in done.err.split()
        assert "allranks.submit.command" in done.err.split()
    assert tree(pbs.folder) == []
    assert not (forbidden / "asked").exists()


def test_a_dry_run_for_programs(pbs):
    words = (
        "--machine",
        "frontier",
        "--walltime",
        "01:00:00",
        "--account",
        "x",
        "--chain",
        "2",
        "--dry-run",
        "--json",
    )
    told = json.loads(pbs.allranks("submit", *words, "model=cnn").ok().out)
    assert told["submit"][0] == ["sbatch", "--parsable", told["script_path"]]
    assert told["submit"][1][2:4] == ["--dependency=afterany:ID_OF_JOB_1", "--kill-on-invalid-dep=yes"]
    assert told["script"].startswith("#!/bin/bash\n#SBATCH --job-name=cnn\n")
    assert told["launch"]["world_size"] == 8


# --- refusals ------------------------------------------------------------------------------------

ALCF = ("--machine", "polaris", "--walltime", "00:30:00", "--account", "x")
AS_TYPED = ("Did you mean polaris?", "--walltime 1h is not valid: give HH:MM:SS", "Unknown queue")


@pytest.fixture
def refusal(pbs, monkeypatch, capsys):
    """refusal("--nodes", "0"): what `allranks submit` says, in this process, before it ends with 2."""

    def of(*words):
        monkeypatch.chdir(pbs.folder)
        for name in ("PATH", "PBS_STANDIN"):
            monkeypatch.setenv(name, pbs.env[name])
        with pytest.raises(SystemExit) as ended:
            cli.main(["submit", *words])
        told = capsys.readouterr()
        assert (ended.value.code, told.out, told.err.count("\n")) == (2, "", 1), told
        return told.err.removesuffix("\n")

    return of


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--machine", "polari"], "machine=polari is not known"),
        (["--machine", "polari"], "Did you mean polaris?"),
        (["--machine", "local"], "machine=local has no scheduler"),
        (["--machine", "generic_pbs"], "--walltime is mandatory on generic_pbs: add --walltime HH:MM:SS"),
        (["--machine", "generic_pbs", "--walltime", "1h"], "--walltime 1h is not valid: give HH:MM:SS"),
        (["--machine", "generic_pbs", "--walltime", "00:00:00"], "--walltime 00:00:00 is not valid"),
        (["--machine", "generic_pbs", "--walltime", "00:60:00"], "--walltime 00:60:00 is not valid"),
        (["--machine", "polaris", "--walltime", "00:30:00"], "--account is mandatory on polaris"),
        ([*ALCF, "machine.filesystems=[]"], "--filesystems is mandatory on polaris"),
        ([*ALCF, "--nodes", "3"], "nodes=3 does not fit queue debug of polaris"),
        ([*ALCF, "--nodes", "3"], "These take 3: debug-scaling"),
        ([*ALCF, "--walltime", "02:00:00"], "walltime=2 h is too long for 1 nodes in queue debug"),
        ([*PBS, "--nodes", "0"], "--nodes 0 is not valid"),
        ([*PBS, "-n", "0"], "-n 0 is not valid"),
        ([*PBS, "-n", "1", "--nodes", "4"], "-n 1 is fewer than --nodes 4"),
        ([*PBS, "--chain", "0"], "--chain 0 is not valid"),
        (["--machine", "generic_pbs", "--walltime", "00:00:39"], "00:00:39 cannot hold a start"),
        ([*PBS, "--launcher", "srun"], "--launcher srun starts no ranks in a job of PBS: give mpiexec"),
        ([*PBS, "--launcher", "mpirun"], "--launcher mpirun is not one of"),
        ([*PBS, "--name", "a b"], "--name 'a b' is not valid"),
        ([*PBS, "--name", "a/b"], "--name 'a/b' is not valid"),
        ([*PBS, "--account", "a\nb"], "--account 'a\\nb' is not valid"),
        ([*PBS, "--queue", "nono"], "Unknown queue"),
        ([*PBS, "--queue", "nono"], "give another --queue"),
        ([*PBS, "--after", "99.pbs"], "--after 99.pbs: PBS knows no such job"),
        ([*PBS, "--after", "so; rm"], "--after so; rm: PBS knows no such job"),
        ([*PBS, "--cell", "nowhere"], "--cell nowhere was never submitted"),
        ([*PBS, "--chain", "2", "-m", "seed=1,2"], "--chain is for one run, -m for many"),
        ([*PBS, "-n", "2", "--min-ranks", "8"], "--min-ranks 8 is more than the 2 ranks to be started"),
        ([*PBS, "optimizer.lr=fast"], "optimizer.lr=fast is not valid"),
        ([*PBS, "model=ccn"], "Did you mean cnn?"),
        ([*PBS, "--", "python", "nowhere.py"], "The program nowhere.py is not found"),
        ([*PBS, "--", "nowhere"], "The program nowhere is not found"),
        ([*PBS, "--"], "No program stands after `--`"),
        ([*PBS, "model=cnn", "--", "python", "-V"], "model=cnn stands before `--`"),
        ([*PBS, "machine.submit.options=[-l ncpus=1]"], "cannot be used with"),
    ],
    ids=lambda value: " ".join(value[2:]) if isinstance(value, list) else None,
)  # fmt: skip
def test_bad_input_is_refused_and_leaves_nothing(pbs, refusal, words, said):
    """Three of these as real command lines, the others in this process."""
    refused = pbs.refused if said in AS_TYPED else refusal
    assert said in refused(*words)
    assert [path for path in pbs.folder.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("place", ["/dev/shm", "/tmp"])
def test_a_run_directory_that_only_one_node_sees(pbs, place):
    words = [*PBS, "--nodes", "2", "--spares", "1", f"run.dir={place}/allranks-test-{os.getpid()}"]
    message = pbs.refused(*words)
    assert f"is in {place}, which each node has for itself" in message
    assert "a directory that all 2 nodes see" in message
    assert not Path(f"{place}/allranks-test-{os.getpid()}").exists()


def test_pbs_down(pbs):
    Path(pbs.env["PBS_STANDIN"]).mkdir()
    (Path(pbs.env["PBS_STANDIN"]) / "down").touch()
    message = pbs.refused(*PBS)
    assert "failed with exit code 162" in message
    assert "cannot connect to server" in message
    assert "the scheduler is down or busy: try again later" in message
    assert "exit code 255" in pbs.refused(*PBS, "--after", "1.pbs")


def test_pbs_is_not_here(pbs):
    message = pbs.refused(*PBS, PATH="/usr/bin:/bin")
    assert "qsub is not found: work on a login node of a cluster with PBS" in message
    assert [path for path in pbs.folder.rglob("*") if path.is_file()] == []


def test_a_command_that_cannot_be_started_is_an_error_of_the_users(tmp_path, monkeypatch):
    (tmp_path / "squeue").touch(0o644)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="squeue cannot be started: Permission denied"):
        scheduler.named("slurm").states(["7"])


def test_a_command_that_hangs_is_given_up(tmp_path, monkeypatch):
    (tmp_path / "qsub").write_text("#!/bin/sh\nexec sleep 30\n")
    (tmp_path / "qsub").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(batch, "COMMAND_LIMIT_S", 0.3)
    began = time.monotonic()
    with pytest.raises(
        batch.NoAnswer, match=r"does not answer within .* look for the job before you submit"
    ):
        scheduler.named("pbs").submit("job.sh")
    assert took_at_most(time.monotonic() - began, 5)


def test_a_chain_that_breaks_off_says_what_is_queued(pbs):
    """qsub takes one job, and then the server goes down."""
    real = STANDIN / "qsub"
    wrapper = pbs.folder.parent / "bin"
    wrapper.mkdir()
    (wrapper / "qsub").write_text(
        f'#!/bin/sh\n{real} "$@"; code=$?; touch "$PBS_STANDIN/down"; exit $code\n'
    )
    (wrapper / "qsub").chmod(0o755)
    (wrapper / "qstat").write_text(f'#!/bin/sh\nrm -f "$PBS_STANDIN/down"; {STANDIN}/qstat "$@"; code=$?\n'
                                   'touch "$PBS_STANDIN/down"; exit $code\n')  # fmt: skip
    (wrapper / "qstat").chmod(0o755)
    program = ("--", PYTHON, "-c", "import time; time.sleep(600)")
    message = pbs.refused(*PBS, "--chain", "3", *program, PATH=f"{wrapper}:{pbs.env['PATH']}")
    assert message.endswith(": 1.pbs.")
    assert "Queued until then" in message
    [record] = pbs.folder.rglob("job.json")
    assert json.loads(record.read_text())["job_ids"] == ["1.pbs"]


def test_a_run_that_still_has_a_job_is_not_submitted_again(pbs):
    answer = pbs.submit(*PBS, "--", PYTHON, "-c", "import time; time.sleep(600)")
    assert "still has a job (1.pbs" in pbs.refused("--cell", answer["directory"])
    assert "configuration is frozen" in pbs.refused("--cell", answer["directory"], "seed=2")
    after = pbs.submit("--cell", answer["directory"], "--after", "1.pbs")
    assert pbs.job(after["job_ids"][0])["after"] == "1.pbs"


def test_a_plain_submit_into_a_directory_with_a_job_is_refused(pbs):
    words = (*PBS, "--ppn", "1", "--no-preflight", *SMALL, "trainer.epochs=100000", "run.dir=mine")
    pbs.submit(*words)
    message = pbs.refused(*words)
    assert f"run.dir={pbs.folder}/mine still has a job (1.pbs " in message
    assert pbs.submit(*words, "--after", "1.pbs")["job_ids"] == ["2.pbs"]


@pytest.mark.parametrize(
    ("words", "name"),
    [
        (["run.dir=runs/first-try"], "first-try"),
        (["run.dir=runs/sweep two", "-m", "seed=1,2"], "sweep-two"),
        ([], "mlp"),
        (["-m", "seed=1,2"], "mlp"),
        (["run.dir=runs/x", "--name", "mine"], "mine"),
    ],
)
def test_a_job_is_named_after_its_run(pbs, words, name):
    told = json.loads(pbs.allranks("submit", "--dry-run", "--json", *PBS, *words).ok().out)
    assert f"#PBS -N {name}\n" in told["script"]


def test_the_logs_of_a_sweep_can_be_followed_from_the_first_moment(pbs):
    (pbs.folder / "a b").mkdir()
    words = (*PBS, "machine.submit.chunk=ncpus=5000", *SMALL, "run.dir=a b/sweep", "-m", "seed=1,2")
    done = pbs.allranks("submit", *words).ok()
    follow = done.out.splitlines()[2].removeprefix("follow     tail -F ")
    listed = subprocess.run(["bash", "-c", f"ls {follow}"], capture_output=True, text=True, check=True)
    assert listed.stdout.splitlines() == [f"{pbs.folder}/a b/sweep/{i}/job.log" for i in range(2)]


@needs_launch
def test_why_pbs_has_killed_a_job_is_shown(pbs):
    program = (PYTHON, "-c", "import signal, time; signal.signal(15, signal.SIG_IGN); time.sleep(60)")
    words = ("--machine", "generic_pbs", "--walltime", "00:00:06", "--ppn", "1", "--no-preflight")
    answer = pbs.submit(*words, "--", *program)
    pbs.until(r"killed \(walltime 8 exceeded limit 6\)")
    log = (Path(answer["directory"]) / "job.log").read_text()
    assert "=>> PBS: job killed: walltime 8 exceeded limit 6" in log


def test_cancel_refuses_what_has_no_job(pbs):
    (pbs.folder / "x").mkdir()
    assert "has no job.json" in pbs.allranks("cancel", "x").message
    assert "runs is no folder" in pbs.allranks("runs").message


def test_runs_are_shown_though_pbs_is_down(pbs):
    pbs.submit(*PBS, "--", PYTHON, "-c", "import time; time.sleep(600)")
    (Path(pbs.env["PBS_STANDIN"]) / "down").touch()
    done = pbs.allranks("runs")
    assert done.code == 0
    assert "cannot connect" in done.message
    assert "not known" in done.out


def test_a_job_that_can_never_run_is_shown_as_such(pbs):
    pbs.submit(*PBS, "machine.submit.chunk=ncpus=5000", "--", PYTHON, "-V")
    pbs.until(r"queued \(Can Never Run\)")


# --- a real Slurm --------------------------------------------------------------------------------

USER = "tester"


def real_slurm_only(test):
    """The marks of a test on a real Slurm: there is one on this machine, and its jobs take their time."""
    return pytest.mark.long(serial(test))


class Slurm(Cluster):
    """`allranks` as a plain user on a login node, with a Python that this user can read."""

    def __init__(self, folder, env, python):
        super().__init__(folder, env)
        self.python = python

    def run(self, *argv, **more):
        words = [
            CLUSTER / "slurm-as",
            USER,
            "env",
            *(f"{k}={v}" for k, v in {**self.env, **more}.items()),
            *argv,
        ]
        return execute([str(word) for word in words], self.folder, {"D": str(self.folder)}, timeout_s=120)

    def allranks(self, *words, **more):
        return self.run(self.python, "-m", "allranks", *words, **more)


@pytest.fixture(scope="module")
def a_slurm(real_slurm):
    """(Python, PYTHONPATH) that the plain user can read, on a Slurm of two nodes."""
    packages = sysconfig.get_path("purelib")
    system = f"/usr/bin/python3.{sys.version_info.minor}"
    for python, path in ((PYTHON, f"{ROOT}/src"), (system, f"{ROOT}/src:{packages}")):
        try_it = [python, "-c", "import allranks, torch"]
        words = [CLUSTER / "slurm-as", USER, "env", f"PYTHONPATH={path}", *try_it]
        if subprocess.run(words, capture_output=True, timeout=100, check=False).returncode == 0:
            return python, path
    pytest.skip(f"the user {USER} can read no Python with torch and this repository")


@pytest.fixture
def slurm(a_slurm):
    with plain_users_folder(a_slurm) as cluster:
        yield cluster


@contextlib.contextmanager
def plain_users_folder(a_slurm):
    python, path = a_slurm
    home = Path(f"~{USER}").expanduser()
    folder = home / f"allranks-test-{os.getpid()}-{time.monotonic_ns()}"
    folder.mkdir()
    shutil.chown(folder, USER)
    yield Slurm(folder, {"PYTHONPATH": path}, python)
    subprocess.run(["scancel", "-u", USER], timeout=30, check=False)
    deadline = time.monotonic() + TIMEOUT_S
    while subprocess.run(["squeue", "-h"], capture_output=True, timeout=30, check=False).stdout:
        assert time.monotonic() < deadline
        time.sleep(0.3)
    shutil.rmtree(folder)


SLURM = ("--machine", "generic_slurm", "--walltime", "00:05:00")


@real_slurm_only
def test_slurm_two_nodes_give_the_curve_of_one_process(slurm, train):
    slurm.submit(*SLURM, "--nodes", "2", "--ppn", "2", *ONE_EPOCH)
    [row] = slurm.until("finished")
    mine = Run(slurm.folder / row["directory"])
    assert {rank["host"] for rank in mine.environment["ranks"]} == {"n1", "n2"}
    assert mine.summary["world_size"] == 4
    assert mine.losses == pytest.approx(train(*ONE_EPOCH).ok().run.losses, rel=1e-5)
    assert stat.S_IMODE((mine.path / "job.log").stat().st_mode) == 0o644


@real_slurm_only
def test_slurm_values_arrive_unchanged_and_the_exit_code_comes_back(slurm):
    odd = slurm.folder / 'it\'s a $x, "q" \\b %j é'
    odd.mkdir()
    shutil.chown(odd, USER)
    slurm.folder, folder = odd, slurm.folder
    nasty = ["it's", "a b", "$HOME", "x,y", "b\\s", '"q"', "*", ""]
    code = "import os, sys; print(sys.argv[1:], os.environ['ODD']); sys.exit(7)"
    over = "machine.variables.ODD='a \"b\", $c \\d'"
    answer = slurm.submit(*SLURM, "--ppn", "1", over, "--", slurm.python, "-c", code, *nasty)
    slurm.until(r"failed \(7\)")
    log = (Path(answer["directory"]) / "job.log").read_text()
    assert f'{nasty} a "b", $c \\d\n' in log
    assert "ended with exit code 7" in log
    slurm.folder = folder


@real_slurm_only
def test_slurm_array_chain_and_cancel(slurm):
    words = [word for word in ONE_EPOCH if word != NO_REPORT]
    array = slurm.submit(*SLURM, "--ppn", "1", "--no-preflight", "-m", "optimizer.lr=0.1,0.01", *words)
    rows = slurm.until("finished", "finished")
    # The cell that ends last compares the two.
    sweep = slurm.folder / array["directory"]
    until((sweep / "compare.html").exists)
    assert all(f'href="{cell}/report.html"' in (sweep / "compare.html").read_text() for cell in (0, 1))
    [job_id] = array["job_ids"]
    assert [row["job_id"] for row in rows] == [f"{job_id}_0", f"{job_id}_1"]
    chain = slurm.submit(
        *SLURM, "--ppn", "1", "--chain", "2", "--", slurm.python, "-c", "import time; time.sleep(60)"
    )
    run = chain["directory"]
    deadline = time.monotonic() + TIMEOUT_S
    while slurm.rows(run)[0]["state"] != "running":
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert slurm.allranks("cancel", run).ok().out == f"cancelled {', '.join(chain['job_ids'])} of {run}\n"
    while (state := slurm.rows(run)[0]["state"]) in ("running", "completing", "queued"):
        assert time.monotonic() < deadline
        time.sleep(0.3)
    assert state.startswith(("failed", "killed"))


@real_slurm_only
def test_slurm_refusals(slurm):
    assert "Slurm knows no such job" in slurm.refused(*SLURM, "--after", "4242")
    assert "give another --queue" in slurm.refused(*SLURM, "--queue", "nono")
    slurm.submit(*SLURM, "--nodes", "5", "--ppn", "1", "--", slurm.python, "-V")
    [row] = slurm.rows()
    assert row["state"].startswith("queued (")


@real_slurm_only
@pytest.mark.parametrize("name", ["debug", "two-nodes", "sweep", "chain"])
def test_the_ready_slurm_scripts_run(slurm, name):
    """As they are, but for the training and who has installed allranks."""
    (slurm.folder / ".venv/bin").mkdir(parents=True)
    allranks = slurm.folder / ".venv/bin/allranks"
    allranks.write_text(f'#!/bin/sh\nexec {slurm.python} -m allranks "$@"\n')
    allranks.chmod(0o755)
    paths = f"PATH={allranks.parent}:$PATH PYTHONPATH={slurm.env['PYTHONPATH']}"
    (slurm.folder / ".venv/bin/activate").write_text(f"export {paths}\n")
    (slurm.folder / "scripts/slurm").mkdir(parents=True)
    path = slurm.folder / f"scripts/slurm/{name}.sh"
    text = (
        (ROOT / f"scripts/slurm/{name}.sh")
        .read_text()
        .replace("--ntasks-per-node=4", "--ntasks-per-node=2")
    )
    path.write_text(re.sub(r"^training=\(.*?\)", f"training=({' '.join(ONE_EPOCH)})", text, flags=re.M))
    slurm.run("sbatch", path).ok()
    deadline = time.monotonic() + TIMEOUT_S
    while not (slurm.folder / "runs").is_dir():
        assert time.monotonic() < deadline
        time.sleep(0.3)
    rows = slurm.until(*["finished"] * (3 if name == "sweep" else 1))
    size = {"debug": 1, "two-nodes": 4, "sweep": 2, "chain": 2}[name]
    assert {Run(slurm.folder / row["directory"]).summary["world_size"] for row in rows} == {size}


LONG = (
    "data=synthetic", "data.train.count=9600", "data.test.count=400", "data.split=[7200,2400]",
    "device=cpu", "threads=1", "trainer.epochs=4", "checkpoint.every_steps=20", NO_REPORT,
)  # fmt: skip


@pytest.fixture(scope="module")
def undisturbed(a_slurm):
    """The same training on two nodes, left alone."""
    with plain_users_folder(a_slurm) as cluster:
        cluster.submit(*SLURM, "--nodes", "2", "--ppn", "1", *LONG)
        [row] = cluster.until("finished")
        yield Run(cluster.folder / row["directory"])


@real_slurm_only
def test_slurm_a_chain_over_three_jobs_has_the_bits_of_an_undisturbed_run(slurm, undisturbed):
    answer = slurm.submit(*SLURM, "--nodes", "2", "--ppn", "1", "--chain", "3", *LONG)
    run, step = Path(answer["directory"]), 0
    for job_id in answer["job_ids"][:2]:
        step = until_step(run, step + 1)
        subprocess.run(["scancel", "--batch", "--signal=USR1", job_id], check=True, timeout=30)
        while "stopped by SIGUSR1" not in (run / "job.log").read_text().rpartition("going on from")[2]:
            time.sleep(0.1)
        step = max(checkpoint.steps(run))
    slurm.until("finished")
    assert (run / "job.log").read_text().count("going on from") == 2
    assert figures(Run(run)) == figures(undisturbed)


@real_slurm_only
def test_slurm_queued_again_by_a_signal_and_cancelled_it_still_has_the_same_bits(slurm, undisturbed):
    answer = slurm.submit(*SLURM, "--nodes", "2", "--ppn", "1", *LONG)
    [job_id], run = answer["job_ids"], Path(answer["directory"])
    step = until_step(run, 1)
    subprocess.run(["scancel", "--batch", "--signal=USR1", job_id], check=True, timeout=30)
    while f"job {job_id} is queued again" not in (run / "job.log").read_text():
        time.sleep(0.1)
    step = until_step(run, max(checkpoint.steps(run)) + 1)
    slurm.run("scancel", job_id).ok()
    slurm.until("killed .CANCELLED.*")  # and is not queued again
    [again] = slurm.submit("--cell", str(run))["job_ids"]
    assert [row["job_id"] for row in slurm.until("finished")] == [again]
    assert max(checkpoint.steps(run)) > step
    assert figures(Run(run)) == figures(undisturbed)


@pytest.fixture
def a_node_to_lose():
    """lose("n2"): its daemon and all that runs there are killed; afterwards it is up again."""

    def lose(name):
        pid_file = Path(f"/var/lib/test-slurm/pids/slurmd-{name}.pid")
        there = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, check=True)
        for pid in {pid_file.read_text().strip(), *there.stdout.split()}:
            os.kill(int(pid), signal.SIGKILL)
        pid_file.unlink()  # where nobody reaps it, slurm-up would take what is left of it for alive

    yield lose
    subprocess.run(["scancel", "-u", USER], timeout=30, check=False)
    up = [CLUSTER / "slurm-up"]
    known = {"env": {**os.environ, **SETTING}, "cwd": "/", "timeout": 100, "stdout": subprocess.DEVNULL}
    if subprocess.run(up, check=False, **known).returncode:
        time.sleep(10)  # the kernel may still be taking down what the killed node has left
        subprocess.run(up, check=True, **known)
    deadline = time.monotonic() + TIMEOUT_S
    while free_nodes() < 3:
        assert time.monotonic() < deadline
        for state in ("down", "resume"):
            update = ["scontrol", "update", "nodename=n[1-3]", f"state={state}", "reason=test"]
            subprocess.run(update, timeout=30, check=False, capture_output=True)
        time.sleep(1)


def free_nodes():
    ask = ["sinfo", "-h", "-N", "-p", "main", "-t", "idle", "-o", "%T"]
    done = subprocess.run(ask, capture_output=True, text=True, timeout=30, check=True)
    return done.stdout.split().count("idle")


@real_slurm_only
def test_slurm_a_node_that_dies_in_mid_run_is_gone_on_without(slurm, a_node_to_lose):
    """Four ranks, then two: the same bits, as the run is a reproducible one."""
    same = (*LONG, "trainer.reproducible=true")
    words = ("--nodes", "2", "--ppn", "2", "--max-restarts", "1", "--min-ranks", "2")
    whole = Path(slurm.submit(*SLURM, "--nodes", "1", "--ppn", "2", *same, "run.dir=whole")["directory"])
    run = Path(slurm.submit(*SLURM, *words, *same, "run.dir=lost")["directory"])
    until_step(run, 20)
    a_node_to_lose(json.loads((run / "environment.json").read_text())["ranks"][-1]["host"])
    slurm.until("finished", "finished", root=".")
    log = (run / "job.log").read_text()
    assert re.search(r"Going on without n\d\. From step \d+: restart 1 of 1\.", log)
    assert Run(run).summary["world_size"] == 2
    assert figures(Run(run)) == figures(Run(whole))


@real_slurm_only
def test_slurm_queues_a_program_again_that_stops_before_its_walltime(slurm):
    (slurm.folder / "own.py").write_text(OWN_PROGRAM)
    words = ("--machine", "generic_slurm", "--walltime", "00:00:30", "--nodes", "2", "--ppn", "1")
    run = Path(slurm.submit(*words, "--no-preflight", "--", slurm.python, "own.py")["directory"])
    code = run / "exit_code"
    until(lambda: code.exists() and code.read_text() == "0\n", TIMEOUT_S)
    log = (run / "job.log").read_text()
    assert "the job's end: all ranks stop at call" in log
    assert re.search(r"goes on from step \d+: job \d+ is queued again", log)
    assert len(json.loads((run / "job.json").read_text())["job_ids"]) == 1  # Slurm gives it the same id
    assert (slurm.folder / "step").read_text() == "60"


@real_slurm_only
def test_slurm_a_spare_takes_the_place_of_a_node_that_dies(slurm, a_node_to_lose, undisturbed):
    """As many ranks as before: the bits of a run that was left alone."""
    words = ("--nodes", "3", "--spares", "1", "--ppn", "1", "--max-restarts", "1")
    run = Path(slurm.submit(*SLURM, *words, *LONG, "run.dir=lost")["directory"])
    until_step(run, 20)
    hosts = [rank["host"] for rank in json.loads((run / "environment.json").read_text())["ranks"]]
    [spare] = {"n1", "n2", "n3"} - set(hosts)
    a_node_to_lose(hosts[-1])
    slurm.until("finished", root=".")
    log = (run / "job.log").read_text()
    assert re.search(rf"{spare} takes the place of {hosts[-1]}\. From step \d+: restart 1 of 1\.", log)
    assert figures(Run(run)) == figures(undisturbed)


def is_down(node: str) -> bool:
    """Whether Slurm has the node out of service. One that has registered again is back by itself."""
    show = ["scontrol", "show", "node", node]
    return "DOWN" in subprocess.run(show, capture_output=True, text=True, timeout=30, check=True).stdout


@real_slurm_only
def test_slurm_requeues_a_job_whose_node_has_failed_and_it_goes_on(slurm, undisturbed):
    """As without --min-ranks; what is left of the job's first start is fenced off by its second."""
    answer = slurm.submit(*SLURM, "--nodes", "2", "--ppn", "1", *LONG)
    run = Path(answer["directory"])
    until_step(run, 20)
    node = json.loads((run / "environment.json").read_text())["ranks"][1]["host"]
    update = ["scontrol", "update", f"nodename={node}", "reason=test"]
    subprocess.run([*update, "state=down"], timeout=30, check=True)
    deadline = time.monotonic() + TIMEOUT_S
    while is_down(node) and subprocess.run([*update, "state=resume"], timeout=30, check=False).returncode:
        assert time.monotonic() < deadline  # it clears up after the job first
        time.sleep(0.5)
    slurm.until("finished")
    assert "going on from" in (run / "job.log").read_text()
    assert [row["job_id"] for row in slurm.rows()] == answer["job_ids"]
    assert figures(Run(run)) == figures(undisturbed)


@real_slurm_only
@pytest.mark.parametrize("launcher", ["srun", "mpiexec", "torchrun"])
def test_slurm_launch_inside_salloc_on_three_nodes(slurm, train, launcher):
    alloc = ("salloc", "-Q", "-N3", "--ntasks-per-node=2")
    words = (slurm.python, "-m", "allranks", "launch", "--launcher", launcher, *ONE_EPOCH, "run.dir=here")
    slurm.run(*alloc, *words).ok()
    mine = Run(slurm.folder / "here")
    assert [rank["host"] for rank in mine.environment["ranks"]] == ["n1", "n1", "n2", "n2", "n3", "n3"]
    assert mine.losses == pytest.approx(train(*ONE_EPOCH).ok().run.losses, rel=1e-5)


@real_slurm_only
def test_slurm_launch_inside_sbatch_with_uneven_tasks(slurm):
    (slurm.folder / "job.sh").write_text(
        "#!/bin/bash\n#SBATCH -N3 -n5 -W -o log\n"
        f"exec {slurm.python} -m allranks launch {' '.join(ONE_EPOCH)} run.dir=here\n"
    )
    slurm.run("sbatch", "job.sh").ok()
    hosts = [rank["host"] for rank in Run(slurm.folder / "here").environment["ranks"]]
    assert (len(hosts), set(hosts)) == (5, {"n1", "n2", "n3"})


@real_slurm_only
def test_slurm_a_node_that_is_down_is_named(slurm, a_node_to_lose):
    """Under Open MPI's mpiexec, which itself says of no node that it is gone."""
    launch = f"{slurm.python} -m allranks launch --launcher mpiexec {' '.join(ONE_EPOCH)}"
    (slurm.folder / "job.sh").write_text(
        "touch ready; while [ ! -e go ]; do sleep 0.1; done; SECONDS=0\n"
        f"{launch} 2> said; echo $? $SECONDS > end\n"
    )
    job = threading.Thread(target=slurm.run, args=("salloc", "-Q", "--no-kill", "-N3", "bash", "job.sh"))
    job.start()
    while not (slurm.folder / "ready").exists():
        time.sleep(0.1)
    a_node_to_lose("n3")
    (slurm.folder / "go").touch()
    job.join()
    code, took_s = map(int, (slurm.folder / "end").read_text().split())
    said = (slurm.folder / "said").read_text()
    assert said.startswith("allranks: preflight: n3 cannot be reached"), said
    assert (code, took_s < 60) == (2, True)
