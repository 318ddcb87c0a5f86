"""What a run leaves: one directory with the documented files and keys, and nothing anywhere else."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import yaml

from allranks.base import files
from allranks.base.errors import UserError
from allranks.run import directory as rundir
from helpers import (
    NO_REPORT,
    PYTHON,
    SMALL,
    TIMEOUT_S,
    Done,
    Run,
    clean_environment,
    execute,
    execute_forked,
    forked_python,
    launcher,
    only_long,
    tree,
)

# One worker trains once for all of these tests.
pytestmark = pytest.mark.xdist_group("run_directory")

METRICS = [
    "epoch", "step", "lr", "train/loss", "train/accuracy", "val/loss", "val/accuracy",
    "time/train_s", "time/eval_s", "throughput/samples_per_s",
    "memory/process_peak_bytes", "throughput/model_flops_per_s",
]  # fmt: skip
SUMMARY = [
    "state", "epochs", "world_size", "global_batch_size", "model/parameters", "model/sha256",
    "test/loss", "test/accuracy", "test/count", "val/count", "time/total_s", "time/startup_s",
    "memory/process_peak_bytes", "throughput/model_flops_per_s",
]  # fmt: skip
FILES = ["config.yaml", "environment.json", "logs", "logs/rank-0.log", "metrics.jsonl", "summary.json"]


def checkpoints(*steps: int) -> list[str]:
    """What the checkpoints of these steps consist of."""
    inside = ("manifest.json", "model.safetensors", "optimizer.safetensors", "state.json")
    folders = [f"checkpoints/step-{step:06d}" for step in steps]
    return ["checkpoints", *folders, *(f"{folder}/{name}" for folder in folders for name in inside)]


def training(
    cwd: Path, home: Path, *overrides: str, under: str | None = None, ranks: int = 1, **env: str
) -> Done:
    words = ["-m", "allranks.train", *SMALL, *overrides]
    environ = {"HOME": str(home), **env}
    if under is None:
        return execute_forked(words, ranks, cwd, environ)
    # Forked from a server that has imported torchrun, its own process would be warned of that.
    python = PYTHON if under == "torchrun" else forked_python()
    return execute([*launcher(under, ranks, python), *words], cwd, environ)


@pytest.fixture(scope="module")
def places(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return tmp_path_factory.mktemp("cwd"), tmp_path_factory.mktemp("home")


@pytest.fixture(scope="module")
def two_ranks(places) -> Done:
    """Two epochs on two ranks, with nothing said about where to write."""
    return training(*places, "model=linear", "trainer.epochs=2", under="mpiexec", ranks=2).ok()


def test_one_directory_for_all_ranks_and_nothing_elsewhere(two_ranks, places):
    cwd, home = places
    path = two_ranks.run.path.relative_to(cwd)
    assert re.fullmatch(r"runs/linear/\d{8}T\d{6}Z-[0-9a-f]{6}", str(path))
    assert tree(two_ranks.run.path) == sorted([*FILES, *checkpoints(10, 20), "logs/rank-1.log"])
    assert [p for p in tree(cwd) if not p.startswith(f"{path}/")] == ["runs", "runs/linear", str(path)]
    assert tree(home) == []


def test_metrics_have_a_line_for_each_epoch(two_ranks):
    run = two_ranks.run
    assert [list(line) for line in run.metrics] == [METRICS, METRICS]
    assert run.column("epoch") == [1, 2]
    assert run.column("step") == [10, 20]  # 1,200 examples in batches of 128
    assert run.column("lr") == [0.05, 0.05]
    for line in run.metrics:
        assert 0 < line["train/loss"] < 3
        assert 0 <= line["val/accuracy"] <= 100
        assert line["time/train_s"] > 0
        assert line["throughput/samples_per_s"] == pytest.approx(1200 / line["time/train_s"], rel=1e-6)


def test_the_summary(two_ranks):
    summary = two_ranks.run.summary
    assert list(summary) == SUMMARY
    assert re.fullmatch("[0-9a-f]{64}", summary.pop("model/sha256"))
    assert summary.pop("test/loss") > 0
    assert 0 <= summary.pop("test/accuracy") <= 100
    assert 0 < summary.pop("time/startup_s") < summary.pop("time/total_s")
    assert summary.pop("memory/process_peak_bytes") > 50 * 2**20
    assert summary.pop("throughput/model_flops_per_s") > 0
    assert summary == {
        "state": "finished", "epochs": 2, "world_size": 2, "global_batch_size": 128,
        "model/parameters": 7850, "test/count": 400, "val/count": 400,
    }  # fmt: skip


def test_the_environment(two_ranks):
    environment = two_ranks.run.environment
    assert {
        "versions", "python", "command", "git_commit", "launcher", "runtime", "collectives", "world_size",
        "threads_per_rank", "ranks",
    } <= set(environment)  # fmt: skip
    assert environment["launcher"] == "mpich"
    assert environment["git_commit"] is None  # the working directory is no checkout
    assert environment["versions"]["torch"]
    assert "model=linear" in environment["command"]
    assert [(r["rank"], r["local_rank"], r["device"]) for r in environment["ranks"]] == [
        (0, 0, "cpu"),
        (1, 1, "cpu"),
    ]
    assert {r["host"] for r in environment["ranks"]} == {os.uname().nodename}


def test_the_config_is_whole_and_names_no_directory(two_ranks):
    config = yaml.safe_load((two_ranks.run.path / "config.yaml").read_text())
    assert config["run"] == {"dir": None}
    assert config["trainer"]["epochs"] == 2
    assert config["model"] == {
        "_target_": "allranks.models.linear",
        "input_shape": [1, 28, 28],
        "classes": 10,
    }
    assert "${" not in (two_ranks.run.path / "config.yaml").read_text()


def test_every_rank_has_a_log(two_ranks):
    logs = two_ranks.run.path / "logs"
    story = (logs / "rank-0.log").read_text()
    assert story.count(" 1/2  ") == story.count(" 2/2  ") == 1
    other = (logs / "rank-1.log").read_text()
    assert "rank 1 of 2" in other
    assert "epoch" not in other and "1/2" not in other


def test_rank_0_tells_the_story_and_the_others_are_silent(two_ranks):
    """A header, a table of epochs and a closing block; nothing twice; nothing on stderr."""
    assert two_ranks.err == ""
    run = two_ranks.run
    directory = run.path.relative_to(two_ranks.cwd)
    first, second = run.metrics
    threads = re.search(r"with (\d+ threads?)$", two_ranks.out, flags=re.M)
    starter = re.search(r"started by  (.*); PyTorch", two_ranks.out)
    assert threads and starter
    total, startup = (f"{run.summary[f'time/{key}_s']:.1f} s" for key in ("total", "startup"))
    assert two_ranks.out.splitlines() == [
        "Training linear on synthetic for 2 epochs",
        f"  ranks       2 on 1 host, each on the CPU with {threads[1]}",
        f"  started by  {starter[1]}; PyTorch connects them, MPI adds up their gradients",
        "  data        1,200 training, 400 validation and 400 test examples of 1x28x28",
        "  model       7,850 parameters, trained in fp64",
        "  batch       128 over all ranks, 10 steps an epoch",
        f"  directory   {directory}",
        "",
        "  epoch       lr  train loss  train %  val loss   val %  samples/s    time  best",
        row(first, "1/2", "*"),
        row(second, "2/2", "*"),
        "",
        f"  test        loss {run.summary['test/loss']:.4f}, accuracy "
        f"{run.summary['test/accuracy']:.2f} % of 400 examples",
        f"  best        epoch 2: val loss {second['val/loss']:.4f}, val {second['val/accuracy']:.2f} %",
        f"  time        {total} in all, {startup} until the first step",
        f"  directory   {directory}",
        f"  next        allranks predict {directory} image.png",
    ]


def row(metrics: dict, epoch: str, mark: str) -> str:
    """The line of the table for an epoch's line of metrics.jsonl."""
    seconds = metrics["time/train_s"] + metrics["time/eval_s"]
    return (
        f"    {epoch}     0.05  {metrics['train/loss']:10.4f}  {metrics['train/accuracy']:7.2f}  "
        f"{metrics['val/loss']:8.4f}  {metrics['val/accuracy']:6.2f}  "
        f"{metrics['throughput/samples_per_s']:9,.0f}  {seconds:4.1f} s  {mark}"
    )


def test_torchruns_ranks_are_as_silent(tmp_path):
    cwd, home = tmp_path / "cwd", tmp_path / "home"
    cwd.mkdir()
    home.mkdir()
    done = training(cwd, home, "trainer.epochs=1", under="torchrun", ranks=2, OMP_NUM_THREADS="1").ok()
    assert re.findall(r"^ +(\S+)", done.out, flags=re.M) == [
        *("ranks", "started", "data", "model", "batch", "directory"),
        *("epoch", "1/1", "test", "best", "time", "directory", "next"),
    ]
    assert [line for line in done.err.splitlines() if "torch/distributed/run.py" not in line] == []
    assert tree(done.run.path) == sorted([*FILES, *checkpoints(10), "logs/rank-1.log"])
    assert tree(home) == []


def test_no_progress_bar_in_a_file(two_ranks):
    assert "\r" not in two_ranks.out + two_ranks.err


def test_equal_runs_have_equal_weights(train_here):
    first, again = train_here(*SMALL, "trainer.epochs=1"), train_here(*SMALL, "trainer.epochs=1")
    other = train_here(*SMALL, "trainer.epochs=1", "seed=1")
    untrained = train_here(*SMALL, "trainer.epochs=0")
    digests = [run.summary["model/sha256"] for run in (first, again, other, untrained)]
    assert digests[0] == digests[1]
    assert len(set(digests)) == 3
    assert first.losses == again.losses


def test_no_epochs_leave_an_untrained_model_and_no_metrics(train_here):
    run = train_here(*SMALL, "trainer.epochs=0")
    assert run.summary["epochs"] == 0
    assert run.summary["test/count"] == 400
    assert not (run.path / "metrics.jsonl").exists() or run.metrics == []


def test_a_start_that_was_killed_before_the_configuration_was_there_is_no_obstacle(train_here, tmp_path):
    (tmp_path / "mine/logs").mkdir(parents=True)
    (tmp_path / "mine/.config.yaml.0123abcd.tmp").write_text("half of")
    assert train_here(*SMALL, "trainer.epochs=0", "run.dir=mine").summary["state"] == "finished"


def test_of_two_that_make_it_at_once_one_keeps_its_configuration(tmp_path):
    """Both have found nothing there; the second comes to write its configuration after the first."""
    rundir.create(str(tmp_path / "mine"), "seed: 1\n")
    with pytest.raises(FileExistsError):
        files.write_text(tmp_path / "mine/config.yaml", "seed: 2\n", new=True)
    assert (tmp_path / "mine/config.yaml").read_text() == "seed: 1\n"
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["config.yaml", "logs"]


@pytest.mark.parametrize(
    ("make", "why"),
    [
        (lambda at: at.write_text(""), r"runs/mlp/x cannot be made: .*/runs/mlp is a file\. Move it away"),
        (
            lambda at: at.parent.write_text(""),
            r"runs/mlp/x cannot be made: .*/runs is a file\. Move it away",
        ),
        (
            lambda at: (at.mkdir(), (at / "x").symlink_to("gone")),
            r"is a link to gone, where nothing is: make",
        ),
        (
            lambda at: ((at / "x").mkdir(parents=True), (at / "x/logs").touch()),
            r"has a file named logs: move it",
        ),
    ],
    ids=["runs/mlp is a file", "runs is a file", "a link to nothing", "logs is a file"],
)
def test_what_is_in_the_way_of_a_directory_is_named(tmp_path, make, why):
    runs = tmp_path / "runs"
    if "/runs is a file" not in why:
        runs.mkdir()
    make(runs / "mlp")
    with pytest.raises(UserError, match=why):
        rundir.create(str(runs / "mlp/x"), "seed: 1\n")


def test_a_repository_without_a_commit_has_none(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    subprocess.run(["git", "init", "-q"], check=True)
    assert rundir._git_commit() is None
    author = ["-c", "user.name=A", "-c", "user.email=a@b"]
    subprocess.run(["git", *author, "commit", "-q", "--allow-empty", "-m", "first"], check=True)
    assert re.fullmatch("[0-9a-f]{40}", rundir._git_commit() or "")


def test_a_text_that_cannot_be_written_leaves_no_file_behind(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        files.write_text(tmp_path / "config.yaml", "a name with a byte that is no UTF-8: \udcff")
    assert tree(tmp_path) == []


def test_a_file_system_without_hard_links_will_do(strace, tmp_path):
    """As DAOS at Argonne."""
    code = "from allranks.run import directory as rundir; rundir.create('mine', 'seed: 1')"
    refused = [f"--inject=?{name}:error=EOPNOTSUPP" for name in ("link", "linkat")]
    traced = [strace, "-f", "-e", "trace=?link,?linkat", *refused, sys.executable, "-c", code]
    done = execute(traced, tmp_path).ok()
    assert "(INJECTED)" in done.err
    assert (tmp_path / "mine/config.yaml").read_text() == "seed: 1"
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["config.yaml", "logs"]


def test_a_full_disk_delays_the_metrics_and_ends_no_training(mounted, tmp_path):
    disk = mounted("size=4m")
    process = subprocess.Popen(
        [forked_python(), "-m", "allranks.train", *SMALL, "model=linear", "trainer.epochs=60",
         f"run.dir={disk}/run"], cwd=tmp_path,
        env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    told = []
    has_failed = False
    for line in process.stdout:
        told.append(line)
        # From epoch 2 on the disk is full. The next lines may still find room in the file's last page.
        if line.lstrip().startswith("2") and not has_failed:
            with suppress(OSError), (disk / "ballast").open("wb", buffering=0) as file:
                while file.write(bytes(4096)):
                    pass
        if "metrics.jsonl could not be written" in line:
            has_failed = True
            (disk / "ballast").unlink(missing_ok=True)
    assert process.wait(TIMEOUT_S) == 0, told
    assert has_failed
    assert "Traceback" not in "".join(told)
    assert [line["epoch"] for line in Run(disk / "run").metrics] == list(range(1, 61))
    assert [path.name for path in (disk / "run").glob(".*")] == []


def test_a_directory_of_ones_own(train_here, tmp_path):
    run = train_here(*SMALL, "trainer.epochs=1", "run.dir=deep/down/here")
    assert run.path == tmp_path / "deep/down/here"
    assert tree(run.path) == sorted([*FILES, *checkpoints(10)])
    (tmp_path / "empty").mkdir()
    assert train_here(*SMALL, "trainer.epochs=1", "run.dir=empty").path == tmp_path / "empty"


@pytest.mark.parametrize(
    ("job", "ending"),
    [
        ({"PBS_JOBID": "4242.pbs01"}, "4242.pbs01"),
        ({"PBS_JOBID": "4242[7].pbs01"}, "4242-7.pbs01"),
        ({"SLURM_JOB_ID": "77"}, "77"),
        ({"SLURM_JOB_ID": "78", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"}, "77_3"),
    ],
)
def test_a_jobs_id_is_in_the_name(train_here, monkeypatch, job, ending):
    for name, value in job.items():
        monkeypatch.setenv(name, value)
    run = train_here(*SMALL, "trainer.epochs=0")
    assert re.fullmatch(rf"\d{{8}}T\d{{6}}Z-{re.escape(ending)}", run.path.name)


@pytest.mark.parametrize("job", [only_long({}), {"PBS_JOBID": "4242.pbs01"}], ids=["by hand", "in one job"])
def test_runs_started_in_the_same_second_get_a_directory_each(places, tmp_path, job):
    _, home = places
    with ThreadPoolExecutor(3) as pool:
        starts = [
            pool.submit(training, tmp_path, home, "trainer.epochs=0", under="python", **job)
            for _ in range(3)
        ]
    for start in starts:
        start.result().ok()
    made = sorted(tmp_path.glob("runs/mlp/*"))
    assert len(made) == 3
    assert {json.loads((path / "summary.json").read_text())["state"] for path in made} == {"finished"}


def test_figures_that_are_no_numbers_become_null(tmp_path):
    """JSON has neither NaN nor infinity: a diverged run must stay readable."""
    nan, infinity = float("nan"), float("inf")
    with files.write_text(tmp_path / "metrics.jsonl", "") as file:
        files.append_line(file, {"epoch": 1, "val/loss": nan, "lr": infinity})
    files.write_json(tmp_path / "summary.json", {"test/loss": -infinity, "of": {"parts": [1.5, nan]}})
    run = Run(tmp_path)
    assert run.metrics == [{"epoch": 1, "val/loss": None, "lr": None}]
    assert run.summary == {"test/loss": None, "of": {"parts": [1.5, None]}}
    assert tree(tmp_path) == ["metrics.jsonl", "summary.json"]


def test_a_run_that_diverges_still_leaves_valid_json(train_here):
    run = train_here(*SMALL, "optimizer.lr=1e300", "trainer.epochs=2", "trainer.nonfinite=skip")
    assert [line["train/loss"] for line in run.metrics][-1] is None
    assert run.summary["test/loss"] is None


def test_the_command_is_recorded_as_typed(train, tmp_path):
    done = train(*SMALL, "trainer.epochs=0").ok()
    assert done.run.environment["command"][1:] == [NO_REPORT, *SMALL, "trainer.epochs=0"]
    assert Path(done.run.environment["command"][0]).name == "train.py"


def test_paths_that_cannot_be_looked_at(train, tmp_path):
    long = "x" * 300
    refused = train(f"run.dir={long}").message
    assert f"run.dir={tmp_path}/{long} cannot be looked at (File name too long)" in refused
    done = train(*SMALL, f"resume={long}")
    assert f"resume={long} cannot be read (File name too long)" in done.message
