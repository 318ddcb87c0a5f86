"""Trackers: what the real ones have of a run, also of one that was killed; and that none stops a run."""

from __future__ import annotations

import csv
import gc
import json
import math
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import zlib
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from allranks.base.errors import UserError
from allranks.compose import from_command_line
from allranks.job.identity import RankIdentity
from allranks.run import checkpoint
from allranks.trackers import follower, wandb
from allranks.trackers.follower import Trackers
from allranks.trackers.protocol import Position, TrackedRun
from allranks.train import run as run_training
from allranks.training import records
from helpers import PYTHON, ROOT, SMALL, Run, Started, execute, forked_python, only_long, tree, until
from test_resume import figures

RUN = (*SMALL, "model=linear", "trainer.batch_size=100", "trainer.epochs=2")  # 12 steps in each epoch
Curve = list[tuple[int, float]]  # (step, value), in the order in which they are stored


# --- reading back what real trackers have -------------------------------------------------------------


def in_jsonl(run: Run, key: str) -> Curve:
    name = "steps" if key.startswith("step/") else "epochs"
    lines = (run.path / f"tracker/{name}.jsonl").read_text().splitlines()
    return [(record["step"], record[key]) for record in map(json.loads, lines)]


def in_csv(run: Run, key: str) -> Curve:
    name = "steps" if key.startswith("step/") else "epochs"
    with (run.path / f"tracker/{name}.csv").open(newline="") as file:
        return [(int(row["step"]), float(row[key])) for row in csv.DictReader(file)]


def in_tensorboard(run: Run, key: str) -> Curve:
    return [(event.step, event.value) for event in events(run).Scalars(key)]


def events(run: Run) -> Any:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    accumulator = EventAccumulator(
        str(run.path / "tracker/tensorboard"), {"scalars": 0, "images": 0, "tensors": 0}
    )
    return accumulator.Reload()


def in_wandb(run: Run, key: str) -> Curve:
    from allranks.trackers.wandb import rows_of

    files = sorted((run.path / "tracker/wandb").glob("offline-run-*/run-*.wandb"))
    return [(int(row["step"]), row[key]) for file in files for row in rows_of(file) if key in row]


def in_mlflow(run: Run, key: str) -> Curve:
    client, run_id = mlflow_of(run)
    return [(metric.step, metric.value) for metric in client.get_metric_history(run_id, key)]


def mlflow_of(run: Run) -> tuple[Any, str]:
    os.environ["MLFLOW_ALLOW_FILE_STORE"] = "true"
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=(run.path / "tracker/mlflow").as_uri())
    return client, (run.path / "tracker/mlflow-run").read_text().strip()


READERS: dict[str, Callable[[Run, str], Curve]] = {
    "jsonl": in_jsonl, "csv": in_csv, "tensorboard": in_tensorboard, "wandb": in_wandb, "mlflow": in_mlflow,
}  # fmt: skip
NEEDS = {"tensorboard": "tensorboard", "wandb": "wandb", "mlflow": "mlflow"}
KINDS_BUT_JSONL = ("csv", "tensorboard", "wandb", "mlflow")
KINDS = ["jsonl", "csv", "tensorboard", only_long("wandb"), only_long("mlflow")]


def curves_of(run: Run, every: int) -> dict[str, Curve]:
    """What a tracker must have, by the run's own records."""
    steps = [json.loads(line) for line in (run.path / "metrics-steps.jsonl").read_text().splitlines()]
    wanted = [record for record in steps if record["step"] % every == 0]
    return {
        **{key: [(r["step"], r[key]) for r in wanted] for key in ("step/loss", "step/accuracy", "step/lr")},
        **{
            key: [(m["step"], m[key]) for m in run.metrics]
            for key in ("epoch", "val/loss", "train/accuracy")
        },
    }


def check(run: Run, kind: str, every: int) -> None:
    """The tracker has the run's curves, each point once."""
    for key, curve in curves_of(run, every).items():
        found = READERS[kind](run, key)
        assert [step for step, _ in found] == [step for step, _ in curve], (kind, key)
        # TensorBoard keeps float32.
        assert [value for _, value in found] == pytest.approx([value for _, value in curve], rel=1e-6), key


@pytest.mark.parametrize("kind", KINDS)
def test_a_tracker_has_each_step_and_epoch(train, kind):
    pytest.importorskip(NEEDS.get(kind, "json"))
    done = train(*RUN, f"tracker={kind}", "tracker.every_steps=5").ok()
    assert done.left_running == []
    assert "failed" not in done.out + done.err
    assert [step for step, _ in READERS[kind](done.run, "step/loss")] == [5, 10, 15, 20]
    check(done.run, kind, 5)


@pytest.mark.parametrize("kind", ["jsonl", *(only_long(kind) for kind in KINDS_BUT_JSONL)])
def test_killed_and_gone_on_a_tracker_has_no_step_twice(train, tmp_path, kind):
    pytest.importorskip(NEEDS.get(kind, "json"))
    overrides = (*SMALL, "model=mlp", "trainer.epochs=20", "trainer.batch_size=16", "run.dir=run",
                 "checkpoint.every_epochs=null", "checkpoint.every_steps=400", "trainer.log_every_steps=7",
                 f"tracker={kind}", "tracker.every_steps=10")  # fmt: skip
    note = tmp_path / f"run/tracker/{kind}.json"

    def is_ahead() -> bool:
        """The tracker has steps that the newest checkpoint has not."""
        saved = checkpoint.steps(tmp_path / "run")
        return bool(saved and note.exists() and json.loads(note.read_text())["step"] > saved[0] + 10)

    with Started([forked_python(), "-m", "allranks.train", *overrides], cwd=tmp_path) as started:
        until(lambda: is_ahead() or started.process.poll() is not None, every_s=0.005)
        assert started.process.poll() is None, started.finish()
        os.kill(Run(tmp_path / "run").pid(0), signal.SIGKILL)
        started.process.wait()
        until(lambda: not started.pids())  # W&B's own process writes what it has, and ends
    done = train(*overrides).ok()
    assert "going on from" in done.out
    assert [m["step"] for m in done.run.metrics] == list(range(75, 1501, 75))
    check(done.run, kind, 10)


def test_several_trackers_at_once(train_here):
    run = train_here(*RUN, "tracker=[csv,jsonl]", "tracker.every_steps=8")
    check(run, "csv", 8)
    check(run, "jsonl", 8)


def test_without_steps_there_are_epochs(train_here):
    run = train_here(*RUN, "tracker=csv", "tracker.every_steps=null")
    assert [step for step, _ in in_csv(run, "val/loss")] == [12, 24]
    assert not (run.path / "metrics-steps.jsonl").exists()


def test_a_tracker_changes_no_bit(train_here):
    assert figures(train_here(*RUN, "tracker=csv", "tracker.every_steps=1")) == figures(train_here(*RUN))


# --- configuration, environment, pictures ---------------------------------------------------------------


def png(path: Path) -> Path:
    """A grey picture of 3 x 2 pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 3, 2, 8, 0, 0, 0, 0)
    pixels = zlib.compress(b"\0\x10\x20\x30" * 2)
    path.write_bytes(
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", pixels) + chunk(b"IEND", b"")
    )
    return path


def facts(directory: Path, delivered: Position | None = None) -> TrackedRun:
    (directory / "tracker").mkdir(parents=True, exist_ok=True)
    config = {"optimizer.lr": 0.05, "data.split": [1200, 400], "name": "linear"}
    environment = {"world_size": 2, "versions": {"torch": "2.4"}}
    return TrackedRun(directory, "linear", config, environment, Position(), delivered or Position())


def test_tensorboard_has_configuration_environment_and_pictures(tmp_path):
    pytest.importorskip("tensorboard")
    from allranks.trackers.tensorboard import TensorBoard

    tracker = TensorBoard()
    tracker.open(facts(tmp_path))
    tracker.steps([{"step": 1, "epoch": 1, "step/loss": None}])  # not finite
    tracker.summary({"state": "finished", "test/accuracy": 91.5})
    tracker.pictures([png(tmp_path / "predictions.png")])
    tracker.close(finished=True)
    found = events(Run(tmp_path))
    assert b"| optimizer.lr | 0.05 |" in found.Tensors("configuration")[0].tensor_proto.string_val[0]
    assert b"| world_size | 2 |" in found.Tensors("environment")[0].tensor_proto.string_val[0]
    assert math.isnan(found.Scalars("step/loss")[0].value)
    assert found.Scalars("test/accuracy")[0].value == pytest.approx(91.5)
    [image] = found.Images("predictions")
    assert (image.width, image.height) == (3, 2)


@pytest.mark.long
def test_mlflow_has_configuration_environment_and_pictures(tmp_path, monkeypatch):
    pytest.importorskip("mlflow")
    from allranks.trackers.mlflow import MLflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracker = MLflow("digits")
    assert tracker.open(facts(tmp_path)) == Position(0, 0)
    tracker.steps([{"step": 3, "epoch": 1, "step/loss": None, "step/accuracy": 50.0}])
    tracker.pictures([png(tmp_path / "predictions.png")])
    tracker.summary({"state": "finished", "test/accuracy": 91.5})
    tracker.close(finished=False)
    client, run_id = mlflow_of(Run(tmp_path))
    run = client.get_run(run_id)
    assert run.data.params["optimizer.lr"] == "0.05"
    assert run.data.metrics["test/accuracy"] == 91.5
    assert "step/loss" not in run.data.metrics
    assert run.info.status == "SCHEDULED"
    assert client.get_experiment(run.info.experiment_id).name == "digits"
    names = {each.path for each in client.list_artifacts(run_id)}
    assert names == {"environment.json", "summary.json", "pictures"}
    again = MLflow("digits")
    again.open(facts(tmp_path, Position(3, 0)))
    again.close(finished=True)
    assert client.get_run(run_id).info.status == "FINISHED"
    assert len(client.search_runs([run.info.experiment_id])) == 1


@pytest.mark.long
def test_mlflow_has_each_epoch_of_a_loop_that_counts_no_steps(tmp_path, monkeypatch):
    """All its figures stand at step 0."""
    pytest.importorskip("mlflow")
    from allranks.trackers.mlflow import MLflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    tracker = MLflow()
    tracker.open(facts(tmp_path))
    for epoch in (1, 2):
        tracker.epoch({"epoch": epoch, "step": 0, "energy": -1.0 * epoch})
    # A process that is killed may have logged only some of the figures of its last epoch.
    tracker.epoch({"epoch": 3, "step": 0})

    again = MLflow()
    assert again.open(facts(tmp_path)) == Position(0, 2)
    for epoch in (3, 4):
        again.epoch({"epoch": epoch, "step": 0, "energy": -1.0 * epoch})
    again.summary({"state": "finished", "test/loss": 0.5})
    for key, values in {"epoch": [1, 2, 3, 4], "energy": [-1, -2, -3, -4], "test/loss": [0.5]}.items():
        assert sorted(in_mlflow(Run(tmp_path), key)) == sorted((0, value) for value in values), key

    # What has come already is not logged once more.
    third = MLflow()
    third.open(facts(tmp_path))
    third.epoch({"epoch": 4, "step": 0, "energy": -4.0})
    third.summary({"state": "finished", "test/loss": 0.5})
    assert [len(in_mlflow(Run(tmp_path), key)) for key in ("epoch", "energy", "test/loss")] == [4, 4, 1]


@pytest.mark.long
def test_mlflow_gets_the_parameters_of_a_run_whose_beginning_it_has_missed(tmp_path, monkeypatch):
    """The server may go away when it has made the run, and knows no parameter, or not all of them."""
    pytest.importorskip("mlflow")
    from allranks.trackers import mlflow

    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setattr(mlflow, "_MOST_PARAMETERS", 2)
    described = mlflow.MLflow._describe
    for known in (0, 2):

        def breaks_down(tracker, run, params, known=known):
            first = dict(list(run.config.items())[:known])
            described(tracker, replace(run, config=first), params)
            raise ConnectionError

        monkeypatch.setattr(mlflow.MLflow, "_describe", breaks_down)
        with pytest.raises(ConnectionError):
            mlflow.MLflow().open(facts(tmp_path / str(known)))
        monkeypatch.setattr(mlflow.MLflow, "_describe", described)
        mlflow.MLflow().open(facts(tmp_path / str(known)))
        client, run_id = mlflow_of(Run(tmp_path / str(known)))
        assert set(client.get_run(run_id).data.params) == {"optimizer.lr", "data.split", "name"}
        assert [each.path for each in client.list_artifacts(run_id)] == ["environment.json"]


@pytest.mark.long
def test_wandb_is_offline_without_a_key_or_a_server(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert wandb._mode() == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    assert wandb._mode() == "offline"


def test_wandbs_key_is_found_where_wandb_looks_for_it(tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert not wandb._has_key("api.wandb.ai")
    key = "machine api.wandb.ai login user password 0123\n"
    for path in (tmp_path / "_netrc", tmp_path / ".netrc", tmp_path / "elsewhere"):
        path.write_text(key)
        if path.name == "elsewhere":
            monkeypatch.setenv("NETRC", "~/elsewhere")
        assert wandb._has_key("api.wandb.ai"), path
        assert not wandb._has_key("other.host"), path
        path.unlink()


def test_wandbs_server_is_asked_for_by_the_proxy_that_leads_to_it(monkeypatch):
    for name in ("https_proxy", "http_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.delenv("WANDB_BASE_URL", raising=False)
    monkeypatch.setenv("WANDB_API_KEY", "0" * 40)
    # A name that no name server knows: without its proxy the server cannot be reached.
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.invalid")
    assert wandb._mode() == "offline"
    with socket.create_server(("127.0.0.1", 0)) as proxy:
        port = proxy.getsockname()[1]
        for written in (f"http://user:secret@127.0.0.1:{port}", f"127.0.0.1:{port}"):
            monkeypatch.setenv("HTTPS_PROXY", written)
            assert wandb._mode() == "online", written
        monkeypatch.setenv("NO_PROXY", ".invalid")
        assert wandb._mode() == "offline"
        monkeypatch.delenv("NO_PROXY")
    assert wandb._mode() == "offline"  # the proxy does not answer any more


@pytest.mark.long
def test_the_pictures_of_the_page_go_to_the_tracker(train):
    pytest.importorskip("tensorboard")
    pytest.importorskip("matplotlib")
    run = train(*RUN, "tracker=tensorboard", "report=true").ok().run
    drawn = sorted(path.stem for path in (run.path / "report").glob("*.png"))
    assert drawn
    assert sorted(events(run).Tags()["images"]) == drawn


@pytest.mark.long
@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
def test_the_pictures_of_a_sweeps_runs_go_to_their_trackers(train, tmp_path, kind):
    """The pages are made after the last run. Each tracker is opened once more, and has no step twice."""
    pytest.importorskip(NEEDS[kind])
    pytest.importorskip("matplotlib")
    words = (f"tracker={kind}", "tracker.every_steps=5", "report=true", "-m", "seed=1,2", "run.dir=sweep")
    train(*RUN, *words).ok()
    for cell in (0, 1):
        run = Run(tmp_path / f"sweep/{cell}")
        assert pictures_in(run, kind) == sorted(path.stem for path in (run.path / "report").glob("*.png"))
        check(run, kind, 5)


def pictures_in(run: Run, kind: str) -> list[str]:
    """The names of the pictures that a tracker has."""
    if kind == "tensorboard":
        return sorted(events(run).Tags()["images"])
    if kind == "wandb":
        media = (run.path / "tracker/wandb").glob("offline-run-*/files/media/images/*.png")
        return sorted(re.sub(r"_\d+_[0-9a-f]+$", "", path.stem) for path in media)
    client, run_id = mlflow_of(run)
    return sorted(Path(each.path).stem for each in client.list_artifacts(run_id, "pictures"))


def test_a_tracker_is_opened_again_for_the_pictures_of_a_sweep(own, tmp_path, monkeypatch):
    """A sweep closes the trackers of a run at its end, and has pictures when its last run has ended."""
    monkeypatch.chdir(tmp_path)
    words = own(RAISES.replace("pass", "self.note(pictures=len(paths))"), section(file="notes"))
    more = ["tracker=own", "tracker.every_steps=null", "report=true", "run.dir=run"]
    [config] = from_command_line([*words, *RUN, "trainer.epochs=1", *more])
    end = run_training(config, RankIdentity("none"))
    gc.unfreeze()  # this process goes on
    assert end.records is not None
    end.records.close()
    end.records.close()  # of a run without pictures nothing is opened again
    end.records.close([png(tmp_path / "loss.png")])
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert notes == [
        {"opened": 0}, {"epoch": 1}, {"summary": "finished"}, {"closed": True},
        {"opened": 1}, {"pictures": 1}, {"closed": True},
    ]  # fmt: skip


def test_wandbs_own_process_is_ended_though_another_child_has_gone(monkeypatch):
    """A child that has ended has no entry in /proc; the process of W&B comes after it in the list."""
    pytest.importorskip("wandb")
    from allranks.trackers import wandb

    gone = subprocess.Popen(["true"])
    gone.wait()
    core = subprocess.Popen(["bash", "-c", "exec -a wandb-core sleep 600"])
    other = subprocess.Popen(["sleep", "600"])
    try:
        until(lambda: b"wandb-core" in Path(f"/proc/{core.pid}/cmdline").read_bytes())
        monkeypatch.setattr(wandb.processes, "children", lambda _: [gone.pid, core.pid, other.pid])
        monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # abandon() sets another one
        wandb.WandB().abandon()
        assert core.wait(timeout=30) == -signal.SIGKILL
        assert other.poll() is None
    finally:
        for child in (core, other):
            child.kill()
            child.wait()


AT_EXIT = """
import atexit
from allranks.trackers.wandb import WandB

def end_of(module, error):
    names = {"__name__": module, "error": error}
    exec("def end(): raise error", names)
    atexit.register(names["end"])

end_of("wandb.sdk.lib.service", ConnectionResetError("Connection lost"))
end_of("mylab.records", ValueError("of the user's own"))
WandB.abandon(object.__new__(WandB))
"""


def test_what_wandb_raises_at_exit_is_not_shown_once_it_is_abandoned(tmp_path):
    done = execute([PYTHON, "-c", AT_EXIT], tmp_path).ok()
    assert "Connection lost" not in done.err
    assert done.err.count("ValueError: of the user's own") == 1


def test_a_tensorboard_file_that_cannot_be_closed_does_not_keep_it_from_a_new_one(tmp_path):
    """As after a full disk: the writer's thread has failed, and its close() fails again."""
    pytest.importorskip("tensorboard")
    from allranks.trackers.tensorboard import TensorBoard

    class Full:
        def close(self) -> None:
            raise OSError(28, "No space left on device")

    tracker = TensorBoard()
    tracker._writer = Full()
    tracker.open(facts(tmp_path))
    tracker.epoch({"step": 12, "epoch": 1, "val/loss": 0.5})
    tracker.close(finished=True)
    assert in_tensorboard(Run(tmp_path), "val/loss") == [(12, 0.5)]


# --- trackers that fail, called as the training calls them ----------------------------------------------


class Server:
    """A tracker that notes its calls, and whose calls raise while `down` has their names."""

    def __init__(self, *down: str) -> None:
        self.down = set(down)
        self.calls: list[str] = []

    def _call(self, name: str, said: str = "") -> None:
        self.calls.append(f"{name}{said}")
        if name in self.down:
            raise RuntimeError(f"no server for {name}")

    def open(self, run: TrackedRun) -> None:
        self._call("open", f" after {run.delivered.epoch}")

    def epoch(self, metrics: dict[str, Any]) -> None:
        self._call("epoch", f" {metrics['epoch']}")

    def summary(self, values: dict[str, Any]) -> None:
        self._call("summary")

    def pictures(self, paths: list[Path]) -> None:
        self._call("pictures")

    def close(self, finished: bool) -> None:
        self._call("close", " finished" if finished else "")

    def abandon(self) -> None:
        self._call("abandon")


def followed(server: Server, directory: Path) -> Trackers:
    """The trackers of a run in this directory that is at its beginning: this server alone."""
    trackers = Trackers({"own": {"_target_": "lab.Server"}, "every_steps": None})
    trackers._trackers["own"] = server  # as build() would make it
    trackers.start(facts(directory), directory / "metrics-steps.jsonl")
    return trackers


def end_of_run(trackers: Trackers, epochs: int = 1) -> None:
    history = [{"epoch": epoch, "step": 10 * epoch} for epoch in range(1, epochs + 1)]
    trackers.wake(0, history)
    trackers.finished({"state": "finished"})
    trackers.close(30)


def test_a_tracker_that_is_opened_again_gets_what_it_has_missed(tmp_path):
    server = Server("summary")
    trackers = followed(server, tmp_path)
    end_of_run(trackers)
    assert "close" in server.calls and "close finished" not in server.calls
    server.calls.clear()
    server.down.clear()
    trackers.reopen()
    trackers.close(30, [png(tmp_path / "loss.png")])
    assert server.calls == ["open after 1", "summary", "pictures", "close finished"]


def test_a_tracker_that_was_never_opened_gets_the_whole_run_when_it_is_opened_again(tmp_path):
    server = Server("open")
    trackers = followed(server, tmp_path)
    end_of_run(trackers, epochs=2)
    server.calls.clear()
    server.down.clear()
    trackers.reopen()
    trackers.close(30)
    assert server.calls == ["open after 0", "epoch 1", "epoch 2", "summary", "close finished"]


def test_a_failure_at_the_end_of_a_run_promises_no_other_epoch(tmp_path, caplog):
    server = Server("pictures")
    trackers = followed(server, tmp_path)
    trackers.close(30, [png(tmp_path / "loss.png")])
    [told] = caplog.messages
    assert told == (
        "tracker=own failed at the end of the run (RuntimeError: no server for pictures): it may not have "
        "all of the run"
    )


def test_a_long_failure_is_told_in_short(tmp_path, caplog):
    class Talkative(Server):
        def summary(self, values: dict[str, Any]) -> None:
            raise RuntimeError(f"400 {'<p>' * 1000}")

    trackers = followed(Talkative(), tmp_path)
    trackers.finished({"state": "finished"})
    trackers.close(30)
    told = f"RuntimeError: 400 {'<p>' * 1000}"[: len("RuntimeError: ") + follower.MOST_CHARACTERS]
    assert f"({told}...): it may not have all of the run" in caplog.text


def test_a_tracker_that_is_given_up_is_told(tmp_path, caplog, monkeypatch):
    monkeypatch.setattr(follower, "PAUSE_S", 0.0)
    server = Server("epoch")
    trackers = followed(server, tmp_path)
    for epoch in (1, 2, 3):
        trackers.wake(0, [{"epoch": epoch, "step": 10 * epoch}])
        until(lambda epoch=epoch: server.calls.count(f"epoch {epoch}") == 1)
    trackers.close(30)
    first, last = caplog.messages
    assert first.startswith("tracker=own failed (RuntimeError: no server for epoch): the run goes on")
    assert "has failed 3 times in a row" in last and "is not called again" in last


@pytest.mark.parametrize("down", ["open", "epoch", "summary", "pictures"])
def test_a_tracker_that_has_failed_is_closed_at_the_end(tmp_path, down):
    server = Server(down)
    trackers = followed(server, tmp_path)
    trackers.wake(0, [{"epoch": 1, "step": 10}])
    trackers.finished({"state": "finished"})
    trackers.close(30, [png(tmp_path / "loss.png")])
    assert server.calls[-1] == ("close finished" if down == "pictures" else "close")


def test_a_tracker_that_cannot_be_closed_is_abandoned(tmp_path, caplog):
    """What abandon() raises ends neither the thread nor, where the tracker hangs, the training."""
    server = Server("close", "abandon")
    followed(server, tmp_path).close(30)
    assert server.calls == ["open after 0", "close", "abandon"]
    assert "tracker=own failed at the end of the run (RuntimeError: no server for close)" in caplog.text
    assert "tracker=own: abandon() failed (RuntimeError: no server for abandon)" in caplog.text


def test_of_a_tracker_that_was_abandoned_nothing_more_is_told(tmp_path, caplog):
    abandoned = threading.Event()

    class Hanging(Server):
        def open(self, run: TrackedRun) -> None:
            abandoned.wait(60)
            raise ConnectionError("what it talked to is gone")

        def abandon(self) -> None:
            abandoned.set()

    trackers = followed(Hanging(), tmp_path)
    [thread] = trackers._followers
    trackers.wake(0, [{"epoch": 1, "step": 10}])
    trackers.close(0.1)
    thread.join(60)
    [told] = caplog.messages
    assert told.startswith("tracker=own did not come to its end within 0.1 s")


@pytest.mark.parametrize("note", ['{"step": "a", "epoch": 1}', '{"step": 4, "epoch": null}', "3", "{"])
def test_a_damaged_note_stands_for_the_beginning_of_the_run(tmp_path, caplog, note):
    (tmp_path / "tracker").mkdir()
    (tmp_path / "tracker/own.json").write_text(note)
    server = Server()
    end_of_run(followed(server, tmp_path))
    assert server.calls == ["open after 0", "epoch 1", "summary", "close finished"]
    assert caplog.messages == []


# --- a tracker of one's own -----------------------------------------------------------------------------


@pytest.fixture
def own(tmp_path, monkeypatch) -> Callable[[str, str], list[str]]:
    """own(SOURCE, YAML) makes a module `lab` and a tracker of it, and gives the words that choose it."""

    def make(source: str, section: str) -> list[str]:
        (tmp_path / "lab.py").write_text(source)
        (tmp_path / "mine/tracker").mkdir(parents=True)
        (tmp_path / "mine/tracker/own.yaml").write_text(section)
        monkeypatch.setenv("PYTHONPATH", str(tmp_path))
        monkeypatch.syspath_prepend(str(tmp_path))
        monkeypatch.delitem(sys.modules, "lab", raising=False)
        return ["--config-dir", str(tmp_path / "mine")]

    return make


def test_the_tracker_of_the_documents_works_as_shown(train, tmp_path):
    text = (ROOT / "docs/trackers.md").read_text()
    [source] = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    [section] = re.findall(r"```yaml\n(.*?)```", text, flags=re.S)
    (tmp_path / "mylab").mkdir()
    (tmp_path / "mylab/tracking.py").write_text(source)
    (tmp_path / "conf/tracker").mkdir(parents=True)
    book = tmp_path / "book.jsonl"
    (tmp_path / "conf/tracker/labbook.yaml").write_text(section.replace("book.jsonl", str(book)))
    words = ["--config-dir", "conf", "tracker=[labbook,csv]", "tracker.every_steps=6"]
    run = train(*words, *RUN, env={"PYTHONPATH": str(tmp_path)}, ranks=2).ok().run
    lines = [json.loads(line) for line in book.read_text().splitlines()]
    assert {line["run"] for line in lines} == {run.path.name}
    assert lines[0]["config"]["optimizer.lr"] == 0.05
    assert [line["step"] for line in lines if "step" in line] == [6, 12, 18, 24]
    assert [line["epoch"] for line in lines if "epoch" in line] == [1, 2]
    assert lines[-1]["test"] == run.summary["test/accuracy"]
    check(run, "csv", 6)


RAISES = """
import json
class Own:
    calls = 0
    def __init__(self, file, bad=()):
        self.file, self.bad = file, bad
    def note(self, **values):
        Own.calls += 1
        if Own.calls in self.bad:
            raise ZeroDivisionError(f"call {Own.calls}")
        with open(self.file, "a") as file:
            file.write(json.dumps(values) + "\\n")
    def open(self, run):
        self.note(opened=run.delivered.epoch)
    def steps(self, records):
        self.note(steps=[record["step"] for record in records])
    def epoch(self, metrics):
        self.note(epoch=metrics["epoch"])
    def summary(self, values):
        self.note(summary=values["state"])
    def pictures(self, paths):
        pass
    def close(self, finished):
        self.note(closed=finished)
"""


def section(**values: Any) -> str:
    return json.dumps({"own": {"_target_": "lab.Own", **values}})


def test_a_tracker_that_raises_is_told_once_and_gets_later_what_it_has_missed(train, own, tmp_path):
    words = own(RAISES, section(file="notes", bad=[3]))
    more = ["trainer.epochs=20", "trainer.batch_size=10", "tracker=own", "tracker.every_steps=30"]
    done = train(*words, *RUN, *more, env={"PYTHONPATH": str(tmp_path)}).ok()
    assert (done.out + done.err).count("tracker=own failed (ZeroDivisionError: call 3)") == 1
    notes = [json.loads(line) for line in (tmp_path / "notes").read_text().splitlines()]
    assert [note["epoch"] for note in notes if "epoch" in note] == list(range(1, 21))
    steps = [step for note in notes for step in note.get("steps", [])]
    assert steps == list(range(30, 2401, 30))
    assert len([note for note in notes if "opened" in note]) == 2
    assert notes[-2:] == [{"summary": "finished"}, {"closed": True}]


def test_a_tracker_that_always_raises_does_not_stop_a_run(train, own, tmp_path):
    words = own(RAISES, section(file="notes", bad=list(range(1, 1000))))
    done = train(*words, *RUN, "trainer.epochs=6", "tracker=own", env={"PYTHONPATH": str(tmp_path)}).ok()
    assert (done.out + done.err).count("tracker=own failed") == 1
    assert done.run.summary["epochs"] == 6
    assert not (tmp_path / "notes").exists()


HANGS = """
import threading
class Own:
    def open(self, run):
        threading.Event().wait()
"""


def test_a_tracker_that_hangs_does_not_hold_up_a_run(train_here, own, monkeypatch, caplog):
    monkeypatch.setattr(records, "FINISH_S", 2.0)
    words = own(HANGS, section())
    run = train_here(*words, *RUN, "tracker=[own,csv]", "tracker.every_steps=5")
    assert run.summary["state"] == "finished"
    assert caplog.text.count("tracker=own did not come to its end within 2 s") == 1
    check(run, "csv", 5)


@pytest.mark.long
def test_a_server_that_is_down_does_not_stop_a_run(train):
    pytest.importorskip("mlflow")
    done = train(*RUN, "tracker=mlflow", env={"MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}).ok()
    told = done.out + done.err
    assert told.count("tracker=mlflow failed") + told.count("tracker=mlflow did not come to its end") in (
        1,
        2,
    )
    assert "Retrying" not in told
    assert done.run.summary["state"] == "finished"
    assert done.left_running == []


@pytest.mark.long
def test_a_server_that_never_answers_does_not_hold_up_the_end_of_a_run(train):
    """The run gives it 30 s. W&B's own process would keep ours for longer."""
    pytest.importorskip("wandb")
    with socket.create_server(("127.0.0.1", 0)) as server:
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        done = train(*RUN, "tracker=wandb", env={"WANDB_API_KEY": "0" * 40, "WANDB_BASE_URL": address}).ok()
    assert (done.out + done.err).count("tracker=wandb did not come to its end within 30 s") == 1
    assert "Traceback" not in done.err
    assert done.run.summary["state"] == "finished"
    assert done.left_running == []


def test_a_full_disk_of_a_tracker_does_not_stop_a_run(train_here, mounted, caplog):
    folder = mounted("size=16k")
    with pytest.raises(OSError), (folder / "ballast").open("wb", buffering=0) as file:
        while True:
            file.write(b"0" * 4096)
    runs = folder.parent / "elsewhere"
    runs.mkdir()
    (runs / "tracker").symlink_to(folder)
    overrides = [f"run.dir={runs}", "resume=auto"]
    (runs / "logs").mkdir()
    [config] = from_command_line([*RUN, "tracker=csv", *overrides])
    from allranks import config as configs

    (runs / "config.yaml").write_text(configs.freeze(config))
    run = train_here(*RUN, "tracker=csv", *overrides)
    assert run.summary["state"] == "finished"
    assert caplog.text.count("tracker=csv failed (OSError: [Errno 28] No space left on device)") == 1


ONLY_RANK_0 = """
import os
from pathlib import Path
Path(f"imported-by-{os.environ['RANK']}").touch()
from allranks.trackers.files import Csv as Own
"""


def test_only_rank_0_imports_a_tracker(train, own, tmp_path):
    words = own(ONLY_RANK_0, section())
    train(*words, *RUN, "tracker=own", env={"PYTHONPATH": str(tmp_path)}, ranks=2).ok()
    assert sorted(path.name for path in tmp_path.glob("imported-by-*")) == ["imported-by-0"]


# --- mistakes -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["tensorboard", "wandb", "mlflow"])
def test_a_package_that_is_missing_is_told_before_anything_is_written(
    train_here, tmp_path, monkeypatch, kind
):
    monkeypatch.setitem(sys.modules, kind, None)  # as if it were not installed
    with pytest.raises(UserError) as told:
        train_here(*RUN, f"tracker={kind}")
    assert told.value.code == 2
    assert f"tracker={kind} needs the package {kind}, which is not installed here" in str(told.value)
    assert f'pip install "allranks[{kind}]"' in str(told.value)
    assert tree(tmp_path) == []


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["tracker=tensorbord"], "tracker=tensorbord is not one of the choices"),
        (["tracker=[csv,tensorbord]"], "tensorbord"),
        (["tracker=3"], "tracker=3 is not valid: tracker takes the name of one choice."),
        (["tracker=csv", "tracker.every_steps=0"], "tracker.every_steps=0 is not valid: give a whole"),
        (["+tracker.csv=yes"], "tracker.csv is not a tracker: give a section with a _target_"),
        (["+tracker.x._target_=no.Such"], "tracker.x._target_=no.Such cannot be loaded"),
        (["+tracker.x._target_=allranks.trackers.files.Csv", "+tracker.x.y=1"], "refuses its arguments"),
    ],
)  # fmt: skip
def test_mistakes_are_one_message(train, words, message):
    done = train(*RUN, *words)
    assert done.code == 2
    assert message in done.message
    assert tree(done.cwd) == []
