"""A run that stops, however it stops, and goes on: the same run to the last bit."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from allranks.base.errors import UserError
from allranks.run import checkpoint
from helpers import (
    MEASURED,
    OWNER,
    PYTHON,
    SMALL,
    TIMEOUT_S,
    TRAIN,
    Run,
    Started,
    clean_environment,
    execute,
    execute_forked,
    forked_python,
    launcher,
    only_long,
    tree,
    until,
)

# 12 steps in each of 2 epochs, a checkpoint after each, none removed
EVERY_STEP = (*SMALL, "trainer.epochs=2", "trainer.batch_size=100", "checkpoint.every_steps=1",
              "checkpoint.keep=100")  # fmt: skip
# The layers of the shipped CNN, with fewer channels.
CNN = ("model=cnn", "model.channels=[4,8]", "model.hidden=16")
KINDS = {
    "linear": ("model=linear",),
    "mlp with dropout": ("model=mlp",),
    "adamw, warmup_cosine": ("model=mlp", "trainer.precision=fp32", "optimizer=adamw",
                             "scheduler=warmup_cosine"),
    "plateau, running metrics": ("model=mlp", "scheduler=plateau", "trainer.train_metrics=running"),
    "cnn, accumulation": (*CNN, "optimizer=adam", "trainer.accumulate=2", "trainer.clip_norm=1"),
    "reproducible": ("model=mlp", "trainer.precision=fp32", "trainer.reproducible=true"),
}  # fmt: skip


def figures(run: Run) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """What must be equal: metrics.jsonl and summary.json without times, memory and the number of ranks."""

    def kept(values: dict[str, Any]) -> dict[str, Any]:
        left_out = (*MEASURED, "world_size")
        return {k: v for k, v in values.items() if not k.startswith(left_out)}

    return [kept(line) for line in run.metrics], kept(run.summary)


def stopped_after(run: Run, step: int, directory: Path) -> str:
    """A copy of the run as it was after this step; its `run.dir=...`."""
    directory.mkdir()
    (directory / "logs").mkdir()
    shutil.copy(run.path / "config.yaml", directory)
    shutil.copytree(checkpoint.path_of(run.path, step), checkpoint.path_of(directory, step))
    return f"run.dir={directory}"


def test_what_is_compared_can_differ(train_here):
    """The comparisons below see a run that is another by a hair."""
    runs = [train_here(*EVERY_STEP, "model=linear", f"optimizer.lr={lr}") for lr in ("0.05", "0.0500001")]
    assert figures(runs[0]) != figures(runs[1])


@pytest.mark.parametrize("kind", [kind if kind != "linear" else only_long(kind) for kind in KINDS])
def test_stopped_after_any_step_it_goes_on_as_if_nothing_had_been(train_here, tmp_path, kind, long):
    whole = train_here(*EVERY_STEP, *KINDS[kind])
    assert checkpoint.steps(whole.path) == list(range(24, 0, -1))
    for step in (1, 7, 12, 13, 23, 24) if long else (7, 12):  # 12: the end of an epoch
        went_on = train_here(*EVERY_STEP, *KINDS[kind], stopped_after(whole, step, tmp_path / str(step)))
        assert figures(went_on) == figures(whole), step


@pytest.mark.parametrize(
    ("under", "ranks", "kind"),
    [
        (None, 2, "mlp with dropout"),
        only_long("mpiexec", 2, "mlp with dropout"),
        only_long("torchrun", 3, "cnn, accumulation"),  # a ring of three adds up in an order of its own
        only_long("mpiexec", 3, "plateau, running metrics"),
    ],
)
def test_on_several_ranks_as_well(train, tmp_path, under, ranks, kind, long):
    whole = train(*EVERY_STEP, *KINDS[kind], under=under, ranks=ranks).ok().run
    for step in (5, 18) if long else (18,):
        there = stopped_after(whole, step, tmp_path / str(step))
        went_on = train(*EVERY_STEP, *KINDS[kind], there, under=under, ranks=ranks).ok().run
        assert figures(went_on) == figures(whole), step


def test_a_reproducible_run_moves_from_ranks_to_ranks(train, train_here, tmp_path, long):
    """4 -> 1 -> 8 -> 2 ranks across resumes, mpiexec and torchrun: the bits of a run that never stopped.

    Without --long it is 2 -> 1 ranks, and the last two moves are left out.
    """
    overrides = (*EVERY_STEP, *CNN, "optimizer=adamw", "scheduler=plateau", "model.dropout=0.2",
                 "trainer.reproducible=true", "trainer.train_metrics=running")  # fmt: skip
    whole = train_here(*overrides)
    stage = train(*overrides, under="mpiexec" if long else None, ranks=4 if long else 2).ok().run
    assert figures(stage) == figures(whole)
    moves = [(4, None, 1), (9, "torchrun", 8), (15, "mpiexec", 2)]
    for step, under, ranks in moves if long else moves[:1]:
        there = stopped_after(stage, step, tmp_path / str(step))
        stage = train(*overrides, there, under=under, ranks=ranks).ok().run
    assert figures(stage) == figures(whole)


@pytest.mark.long
def test_without_the_flag_another_number_of_ranks_gives_the_same_losses(train, tmp_path):
    overrides = (*EVERY_STEP, "model=mlp", "model.dropout=0", "trainer.train_metrics=running")
    whole = train(*overrides).ok().run
    there = stopped_after(whole, 7, tmp_path / "stopped")
    went_on = train(*overrides, there, under="mpiexec", ranks=3).ok().run
    for mine, theirs in zip(went_on.metrics, whole.metrics, strict=True):
        assert mine["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-4)
        assert mine["val/loss"] == pytest.approx(theirs["val/loss"], abs=1e-4)


# --- stopping ------------------------------------------------------------------------------------------

LONG = (*SMALL, "model=mlp", "trainer.epochs=7", "trainer.batch_size=16", "checkpoint.keep=1")


at_work: list[subprocess.Popen[str]] = []


@pytest.fixture(autouse=True)
def none_is_left_at_work():
    """Ends the trainings that a test has begun, and has not seen end because it failed."""
    yield
    for process in at_work:
        process.kill()
        process.wait()
    at_work.clear()


def begun(
    *overrides: str, cwd: Path, under: str | None = None, ranks: int = 1, **env: str
) -> subprocess.Popen[str]:
    python = PYTHON if under is None else forked_python()
    process = subprocess.Popen(
        [*launcher(under, ranks, python), "-m", "allranks.train", *overrides, "run.dir=run"], cwd=cwd,
        env=clean_environment(**env), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    at_work.append(process)
    return process


def started(*overrides: str, cwd: Path, **how: Any) -> subprocess.Popen[str]:
    """A training that has saved at least once."""
    process = begun(*overrides, cwd=cwd, **how)
    until(lambda: checkpoint.steps(cwd / "run") or process.poll() is not None)
    assert process.poll() is None, process.communicate()
    return process


def rank_pid(cwd: Path, rank: int) -> int:
    return Run(cwd / "run").pid(rank)


@pytest.fixture(scope="module")
def long_run(tmp_path_factory) -> Run:
    """LONG on two ranks, never stopped. By gloo the sum of two gradients has the same bits as by MPI."""
    words = ["-m", "allranks.train", *LONG, "run.dir=run"]
    return execute_forked(words, 2, tmp_path_factory.mktemp("long")).ok().run


STOPPING = [
    signal.SIGTERM,
    *(only_long(signum) for signum in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP)),
]


@pytest.mark.xdist_group("signals")  # in one worker, for which long_run is trained once
@pytest.mark.parametrize("signum", STOPPING, ids=lambda s: s.name)
def test_a_signal_to_any_rank_stops_all_with_a_checkpoint(tmp_path, train, long_run, signum):
    process = started(*LONG, cwd=tmp_path, under="mpiexec", ranks=2)
    os.kill(rank_pid(tmp_path, 1), signum)
    if signum == signal.SIGTERM:  # an impatient scheduler
        with suppress(ProcessLookupError):  # it may have stopped already
            os.kill(rank_pid(tmp_path, 1), signum)
            os.kill(rank_pid(tmp_path, 0), signum)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 85, err
    assert f"stopped by {signum.name}" in out
    step = checkpoint.steps(tmp_path / "run")[0]
    assert f"after step {step}" in out
    assert not (tmp_path / "run/summary.json").exists()
    went_on = train(*LONG, "run.dir=run", ranks=2).ok()
    assert f"going on from {tmp_path}/run/checkpoints/step-{step:06d}" in went_on.out
    assert figures(went_on.run) == figures(long_run)


def test_what_a_shell_ignores_stays_ignored(tmp_path):
    code = (
        "import os, signal\nfrom allranks.base.signals import Signals\nsignals = Signals()\n"
        "signals.count(signal.SIGTERM, signal.SIGHUP)\n"
        "for number in (signal.SIGTERM, signal.SIGHUP): os.kill(os.getpid(), number)\n"
        "print([s.name for s, count in signals.counts.items() if count])"
    )
    assert execute(["nohup", sys.executable, "-c", code], tmp_path).ok().out == "['SIGTERM']\n"


@pytest.mark.parametrize(("epochs", "code"), [(60, 85), only_long(1, 0)], ids=["stopped", "finished"])
def test_asked_to_stop_again_and_again_it_keeps_its_exit_code(tmp_path, epochs, code):
    """A job that is cancelled sends more than one signal; one came when Python itself was ending."""
    process = started(*LONG, f"trainer.epochs={epochs}", cwd=tmp_path)
    while code == 0 and not (tmp_path / "run/summary.json").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.001)
    while process.poll() is None:
        process.terminate()
        time.sleep(0.005)
    assert process.returncode == code, process.communicate()


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")
def test_a_warning_that_comes_while_torch_is_imported_is_not_lost(tmp_path):
    process = begun(*LONG, cwd=tmp_path)
    caught, status = 0, Path(f"/proc/{process.pid}/status")
    while not caught >> (signal.SIGUSR1 - 1) & 1:
        caught = int(re.search(r"SigCgt:\s+(\w+)", status.read_text())[1], 16)
    process.send_signal(signal.SIGUSR1)
    assert not (tmp_path / "run").exists()
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 85, err
    assert "stopped by SIGUSR1 after step 1," in out


@pytest.mark.long
def test_a_run_stops_by_itself_before_the_job_ends(tmp_path, train, long_run):
    """As a job script of ours tells when that is; the margin is 10 s and what a save and a step take."""
    longer = (*LONG, "model.widths=[2000,2000]", "trainer.epochs=60")
    process = started(*longer, cwd=tmp_path, ALLRANKS_DEADLINE=str(int(time.time()) + 20))
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 85, err
    assert "stopped by the job's end after step" in out


def test_a_deadline_that_cannot_be_read_is_named_and_not_used(train_here, monkeypatch, capsys):
    monkeypatch.setenv("ALLRANKS_DEADLINE", "soon")
    train_here(*SMALL, "trainer.epochs=1")
    assert "ALLRANKS_DEADLINE=soon is not a time in seconds since 1970" in capsys.readouterr().out


# --- a run directory that has been used ----------------------------------------------------------------

SHORT = (*SMALL, "model=linear", "trainer.epochs=2", "run.dir=run")


@pytest.fixture(scope="module")
def finished_once(tmp_path_factory) -> Run:
    """SHORT on one rank, trained once for all of these tests."""
    return execute_forked(["-m", "allranks.train", *SHORT], 1, tmp_path_factory.mktemp("finished")).ok().run


@pytest.fixture
def finished(finished_once, tmp_path) -> Run:
    """A copy of it, as `run` in the test's own folder."""
    return Run(shutil.copytree(finished_once.path, tmp_path / "run"))


def unfinish(run: Run) -> None:
    (run.path / "summary.json").unlink()
    checkpoint.keep_only(run.path, keep=[10])


def test_a_finished_run_is_not_run_again(train, finished):
    before = {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")}
    again = train(*SHORT, ranks=2).ok()
    assert again.out == f"{finished.path} holds this run, finished already: nothing to do\n"
    assert {path: path.stat().st_mtime_ns for path in finished.path.rglob("*")} == before


def test_another_configuration_is_refused_with_the_keys(train, finished):
    for_all = train(*SHORT, "optimizer.lr=0.2", "seed=4", ranks=2)
    assert for_all.code == 2
    assert for_all.err.count("\n") == 1
    assert "optimizer.lr is 0.05 there, not 0.2; seed is 0 there, not 4" in for_all.err
    train(*SHORT, "checkpoint.keep=7", "trainer.nonfinite=skip", "name=other").ok()  # these compute nothing


def test_an_unfinished_run_and_resume_never(train_here, finished):
    unfinish(finished)
    with pytest.raises(UserError, match="holds an unfinished run, and resume=never"):
        train_here(*SHORT, "resume=never")


def test_metrics_are_those_of_the_checkpoint(train_here, finished):
    """Lines that were written after it, and half a line, go; they are written again."""
    whole = figures(finished)
    unfinish(finished)
    with (finished.path / "metrics.jsonl").open("a") as file:
        file.write('{"epoch": 3, "ste')
    assert figures(train_here(*SHORT)) == whole


def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(train_here, finished, capsys):
    whole = figures(finished)
    (finished.path / "summary.json").unlink()
    newest = checkpoint.path_of(finished.path, 20) / "model.safetensors"
    content = bytearray(newest.read_bytes())
    content[1234] ^= 1
    newest.write_bytes(content)
    went_on = train_here(*SHORT)
    out = capsys.readouterr().out
    assert "passing over the checkpoint step-000020: model.safetensors: its sha256 is" in out
    assert re.search("going on from .*run/checkpoints/step-000010", out)
    assert figures(went_on) == whole
    checkpoint.read(newest.parent)  # the damaged one has been replaced


def test_where_no_checkpoint_can_be_used_it_does_not_begin_again(train_here, finished):
    """What was trained, and metrics.jsonl, stay as they are until somebody has looked."""
    whole = figures(finished)
    (finished.path / "summary.json").unlink()
    for step in (10, 20):
        (checkpoint.path_of(finished.path, step) / "state.json").write_bytes(b"")
    before = tree(finished.path)
    with pytest.raises(UserError) as refused:
        train_here(*SHORT)
    said = str(refused.value)
    assert "run/checkpoints has checkpoints, but none that can be used: step-000020: state.json" in said
    assert re.search("to begin at step 0, move .*run/checkpoints away", said)
    assert tree(finished.path) == before

    (finished.path / "checkpoints").rename(finished.path / "aside")
    assert figures(train_here(*SHORT)) == whole


def test_after_a_passing_error_it_goes_on_where_it_was(train, finished, strace, long):
    """The server is away when the run starts again, and back at the next start."""
    whole = figures(finished)
    unfinish(finished)
    command = [*TRAIN, *SHORT]
    calls = ("openat", "getdents64") if long else ("openat",)  # a checkpoint's folder; the folder of all
    for call in calls:
        path = str(finished.path / "checkpoints" / ("step-000010" if call == "openat" else ""))
        fault = ["-f", "-qq", "-o", os.devnull, f"--inject={call}:error=ESTALE", "-P", path]
        done = execute([strace, *fault, *command], finished.path.parent)
        assert done.code == 2, done.err
        assert "Stale file handle" in done.message
    went_on = train(*SHORT).ok()
    assert f"going on from {finished.path}/checkpoints/step-000010" in went_on.out
    assert figures(went_on.run) == whole


def test_a_checkpoint_that_is_a_link_is_named_and_replaced(train_here, finished, tmp_path, capsys):
    """The link was followed when a save looked for its own step, and not when checkpoints were listed."""
    whole = figures(finished)
    unfinish(finished)
    newest = checkpoint.path_of(finished.path, 20)
    shutil.copytree(checkpoint.path_of(finished.path, 10), tmp_path / "elsewhere")
    newest.symlink_to(tmp_path / "elsewhere")
    went_on = train_here(*SHORT)
    said = "passing over the checkpoint step-000020: the folder cannot be opened: it is a link"
    assert said in capsys.readouterr().out
    assert figures(went_on) == whole
    assert not newest.is_symlink()
    assert (tmp_path / "elsewhere").is_dir()


def test_a_directory_with_an_owner_at_work_is_refused(train, finished):
    unfinish(finished)
    with Started([PYTHON, "-c", OWNER], cwd=finished.path.parent) as owner:
        assert next(owner.lines()) == "taken"
        second = train(*SHORT)
        assert second.code == 2
        assert f"is in use by process {owner.process.pid} on" in second.err


@pytest.mark.long
def test_one_writer_at_a_time(tmp_path, train):
    longer = (*LONG, "trainer.epochs=5000")
    process = started(*longer, cwd=tmp_path)
    second = train(*longer, "run.dir=run")
    assert second.code == 2
    assert f"is in use by process {process.pid} on" in second.err
    process.terminate()
    process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 85


# --- from another run's checkpoint ---------------------------------------------------------------------


def test_going_on_from_another_runs_checkpoint_for_more_epochs(train_here, finished, capsys):
    longer = train_here(*SMALL, "model=linear", "trainer.epochs=4", "run.dir=longer", "resume=run")
    assert "going on from run/checkpoints/step-000020: step 20, in epoch 3" in capsys.readouterr().out
    whole = train_here(*SMALL, "model=linear", "trainer.epochs=4", "run.dir=whole")
    assert figures(longer) == figures(whole)
    assert finished.summary["epochs"] == 2  # it is as it was


def test_what_goes_on_from_another_runs_checkpoint_saves_it_as_its_own(train_here, finished):
    """Also where nothing was left to train: without a checkpoint nobody could use the run."""
    same = train_here(*SMALL, "model=linear", "trainer.epochs=2", "run.dir=same", "resume=run")
    assert checkpoint.steps(same.path) == [20]
    assert same.summary["model/sha256"] == finished.summary["model/sha256"]


def test_a_checkpoint_that_is_not_there_leaves_nothing(train_here, tmp_path):
    said = re.escape("resume=nowhere cannot be read (No such file or directory)")
    with pytest.raises(UserError, match=said):
        train_here(*SMALL, "model=linear", "resume=nowhere")
    assert list(tmp_path.iterdir()) == []


def test_more_epochs_where_they_decide_the_learning_rates(train_here):
    words = (*SMALL, "model=linear", "scheduler=cosine")
    train_here(*words, "trainer.epochs=2", "run.dir=run")
    said = "is a checkpoint of another training: trainer.epochs is 2 there, not 4. The learning rates of"
    with pytest.raises(UserError, match=said):
        train_here(*words, "trainer.epochs=4", "run.dir=other", "resume=run")


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model=mlp"], "model._target_ is allranks.models.linear there, not allranks.models.mlp"),
        (["optimizer=adam"], "optimizer._target_ is torch.optim.SGD there, not torch.optim.Adam"),
        (["data.train.seed=5"], "data.train.seed is"),
        (["resume=run/logs"], "resume=run/logs has no valid checkpoint"),
        (["trainer.epochs=1"], "step-000020 has 2 epochs behind it already"),
    ],
)
def test_what_a_checkpoint_does_not_fit(train_here, finished, overrides, message):
    words = (*SMALL, "model=linear", "run.dir=other", "resume=run/checkpoints/step-000020")
    with pytest.raises(UserError, match=re.escape(message)):
        train_here(*words, *overrides)


def test_weights_load_in_plain_torch(train, finished):
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(784, 10))
    model.load_state_dict(load_file(finished.path / "checkpoints/step-000020/model.safetensors"))
    assert sum(p.numel() for p in model.parameters()) == finished.summary["model/parameters"]


# --- saves that fail, files that others see late ------------------------------------------------------


def test_a_save_that_fails_is_a_warning_and_at_the_end_an_error(tmp_path, train):
    """The kernel refuses any file beyond 100 kB; the weights take 360."""
    limited = ["bash", "-c", 'ulimit -f 100; exec "$@"', "-"]
    options = (*SMALL, "model=mlp", "trainer.epochs=2", "run.dir=run")
    done = execute([*limited, *launcher(None, 1), "-m", "allranks.train", *options], tmp_path)
    assert done.code == 2
    assert (
        "the checkpoint of step 10 could not be written (File too large); the training goes on" in done.out
    )
    said = f"The last checkpoint, of step 20, could not be written to {tmp_path}/run (File too large)"
    assert said in done.message
    assert checkpoint.steps(tmp_path / "run") == []
    assert len((tmp_path / "run/metrics.jsonl").read_text().splitlines()) == 2
    assert train(*options).ok().run.summary["state"] == "finished"


OPENED = """
import os, sys

def noted(event, arguments):
    if event == "open":
        opened.append(str(arguments[0]))

opened = []
sys.addaudithook(noted)
from allranks import train
train.main()
print(sum("step-000010" in path for path in opened), "opened by rank", os.environ["RANK"], file=sys.stderr)
"""


def test_only_rank_0_opens_checkpoints(tmp_path, finished):
    """Shared file systems show files late: what rank 0 has read is what all get."""
    unfinish(finished)
    done = execute_forked(["-c", OPENED, *SHORT], 2, tmp_path)
    counts = {rank: int(count) for count, rank in re.findall(r"(\d+) opened by rank (\d)", done.ok().err)}
    assert counts.pop("0") > 0
    assert counts == {"1": 0}


@pytest.mark.long
def test_only_rank_0_looks_for_checkpoints(tmp_path, finished, strace):
    """As the kernel sees it, whatever opens the files."""
    unfinish(finished)
    trace = [strace, "-f", "-qq", "-e", "trace=openat", "-o", "trace"]
    execute([*trace, *launcher("mpiexec", 2), "-m", "allranks.train", *SHORT], tmp_path).ok()
    lines = (tmp_path / "trace").read_text().splitlines()
    looked = {line.split()[0] for line in lines if "step-000010" in line}
    assert len(looked) == 1


# --- which are kept ------------------------------------------------------------------------------------


def test_the_newest_and_the_best_are_kept(train_here):
    run = train_here(*SMALL, "model=linear", "trainer.epochs=6", "optimizer.lr=3", "checkpoint.keep=2")
    losses = run.column("val/loss")
    best = 10 * (1 + losses.index(min(losses)))
    assert set(checkpoint.steps(run.path)) == {best, 50, 60}


def test_the_best_is_kept_where_later_ones_are_not_finite(train_here):
    run = train_here(
        *SMALL, "model=linear", "trainer.epochs=5", "trainer.precision=fp32", "trainer.nonfinite=skip",
        "scheduler=step", "scheduler.step_size=1", "scheduler.gamma=1e36", "checkpoint.keep=2",
    )  # fmt: skip
    losses = run.column("val/loss")
    assert losses[-2:] == [None, None]
    best = 10 * (1 + losses.index(min(loss for loss in losses if loss is not None)))
    assert set(checkpoint.steps(run.path)) == {best, 40, 50}


def test_a_damaged_newer_one_counts_for_nothing(train_here):
    words = (*SMALL, "model=linear", "trainer.epochs=6", "optimizer.lr=3", "run.dir=run")
    run = train_here(*words)
    kept = set(checkpoint.steps(run.path))
    (run.path / "summary.json").unlink()
    checkpoint.keep_only(run.path, keep=[min(kept)])
    checkpoint.path_of(run.path, 999).mkdir()
    train_here(*words)
    assert set(checkpoint.steps(run.path)) == kept | {999}


def test_every_so_many_steps(train_here):
    run = train_here(
        *SMALL, "model=linear", "trainer.epochs=2", "checkpoint.every_steps=7", "checkpoint.keep=9",
        "checkpoint.every_epochs=null",
    )  # fmt: skip
    assert checkpoint.steps(run.path) == [20, 14, 7]


# --- numbers that are not finite -----------------------------------------------------------------------

BAD_ON_RANK_1 = """
import os, torch
from allranks.models import linear
class Bad(torch.nn.Module):
    passes = 0  # the first of them is not a step's: it settles DDP's buckets
    def __init__(self, **options):
        super().__init__()
        self.linear = linear(**options)
    def forward(self, images):
        out = self.linear(images)
        self.passes += self.training
        if self.passes == 5 and self.training and int(os.environ.get("RANK") or os.environ["PMI_RANK"]):
            out = out * float("{value}")
        return out
"""


@pytest.mark.parametrize(
    ("under", "value"),
    [("mpiexec", "nan"), only_long("mpiexec", "inf"), only_long("torchrun", "nan"), (None, "inf")],
)
def test_a_loss_that_is_not_finite_stops_all_ranks(tmp_path, train, under, value):
    (tmp_path / "bad.py").write_text(BAD_ON_RANK_1.replace("{value}", value))
    options = (*SMALL, "model=linear", "model._target_=bad.Bad", "checkpoint.every_steps=1", "run.dir=run")
    done = train(*options, under=under, ranks=2, env={"PYTHONPATH": str(tmp_path)})
    assert done.code != 0
    message = "The loss of rank 1 (nan) is not finite in step 4 (epoch 1); the step was not applied."
    assert f"allranks: {message}" in done.err
    assert checkpoint.steps(tmp_path / "run") == [3, 2]
    assert done.left_running == []


def test_such_a_step_can_be_skipped(tmp_path, train):
    (tmp_path / "bad.py").write_text(BAD_ON_RANK_1.replace("{value}", "nan"))
    options = (
        *SMALL,
        "model=linear",
        "model._target_=bad.Bad",
        "trainer.nonfinite=skip",
        "trainer.epochs=1",
    )
    done = train(*options, ranks=2, env={"PYTHONPATH": str(tmp_path)}).ok()
    assert "rank 1 (nan)" in done.out
    assert done.run.metrics[0]["step"] == 10
    assert all(torch.isfinite(t).all() for t in load_file(
        checkpoint.path_of(done.run.path, 10) / "model.safetensors").values())  # fmt: skip
