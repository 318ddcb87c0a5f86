"""`allranks watch` and `allranks logs`: runs that go, have finished, have stopped, or are damaged."""

from __future__ import annotations

import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from allranks.base.errors import UserError
from allranks.follow import drawing, watch
from allranks.follow.logs import Logs, Tail
from allranks.follow.reading import ASK_EVERY_S, Reader, View, newest_steps, runs_at, view_of
from allranks.follow.watch import Look, picture
from allranks.run.states import RunState
from helpers import PYTHON, SMALL, Run, Started, execute_forked, forked_python, until
from test_terminal import Terminal

# One worker trains once for all of these tests.
pytestmark = pytest.mark.xdist_group("follow")
ALLRANKS = [PYTHON, "-m", "allranks"]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of three epochs on two ranks."""
    folder = tmp_path_factory.mktemp("finished")
    words = ["-m", "allranks.train", *SMALL, "trainer.epochs=3", "run.dir=runs/one"]
    return execute_forked(words, 2, folder).ok().run


@contextmanager
def going(folder: Path, *overrides: str) -> Iterator[Started]:
    """A run that trains until it is ended; its first epoch is done."""
    words = [*SMALL, "trainer.epochs=100000", "run.dir=runs/going", "checkpoint.every_epochs=null"]
    with Started([forked_python(), "-m", "allranks.train", *words, *overrides], cwd=folder) as started:
        until(lambda: metrics_lines(folder / "runs/going"), within_s=120)
        yield started


def metrics_lines(run: Path) -> int:
    try:
        return len((run / "metrics.jsonl").read_text().splitlines())
    except FileNotFoundError:
        return 0


def watched(folder: Path, *words: str) -> list[str]:
    return execute_forked(["-m", "allranks", "watch", "--once", *words], 1, folder).ok().out.splitlines()


def value_of(lines: Sequence[str], label: str) -> str:
    [line] = [line for line in lines if line.startswith(f"  {label}  ")]
    return line.removeprefix(f"  {label}").strip()


# --- watch --------------------------------------------------------------------------------------------


def test_a_finished_run_in_detail(finished):
    lines = watched(finished.path.parent.parent, "runs/one")
    last, first = finished.metrics[-1], finished.metrics[0]
    assert lines[0] == "mlp: finished"
    assert value_of(lines, "progress").endswith("100 %  epoch 3 of 3, step 30 of 30")
    assert value_of(lines, "train loss") == (
        f"{last['train/loss']:.4f}, {first['train/loss']:.4f} after the first epoch"
    )
    assert value_of(lines, "val loss").startswith(f"{last['val/loss']:.4f}, ")
    assert value_of(lines, "val accuracy").startswith(f"{last['val/accuracy']:.2f} %")
    assert value_of(lines, "best epoch") == f"{lowest_val_loss(finished)} (lowest val/loss)"
    assert value_of(lines, "test") == (
        f"loss {finished.summary['test/loss']:.4f}, accuracy {finished.summary['test/accuracy']:.2f} %"
    )
    assert value_of(lines, "ranks") == "2 on 1 host"
    losses = [loss for line in finished.metrics for loss in (line["train/loss"], line["val/loss"])]
    assert [line.split()[0] for line in lines if re.match(r" +\d\.\d+  ", line)] == [
        f"{max(losses):.4g}", f"{min(losses):.4g}",
    ]  # fmt: skip


def lowest_val_loss(run: Run) -> int:
    """The number of the epoch with the lowest validation loss."""
    return 1 + int(np.argmin(run.column("val/loss")))


def test_watch_without_a_terminal_ends_at_once_and_json_has_the_records_numbers(finished):
    folder = finished.path.parent.parent
    assert execute_forked(["-m", "allranks", "watch"], 1, folder).ok().out.startswith("mlp: finished")
    [view] = map(
        json.loads, execute_forked(["-m", "allranks", "watch", "--json"], 1, folder).ok().out.splitlines()
    )
    last = finished.metrics[-1]
    assert view["val_loss"] == last["val/loss"] and view["train_loss"] == last["train/loss"]
    assert view["samples_per_s"] == last["throughput/samples_per_s"]
    assert (view["state"], view["epoch"], view["epochs"], view["step"]) == ("finished", 3, 3, 30)
    assert (view["share"], view["left_s"], view["problems"]) == (1.0, None, [])


def test_a_run_that_goes_is_followed_live_and_not_touched(tmp_path):
    with going(tmp_path) as started:
        before = sorted(path.name for path in (tmp_path / "runs/going").iterdir())
        [view] = map(json.loads, watched(tmp_path, "runs/going", "--json"))
        assert view["state"] == "running"
        assert 0 < view["share"] < 0.1
        assert view["left_s"] > 0

        watch = [*ALLRANKS, "watch", "runs/going"]
        with Terminal(watch, tmp_path, columns=80, rows=30) as shown:
            first = int(shown.until(r"epoch (\d+) of 100000")[1])
            shown.until(r"^  time left +\d+:\d\d")
            shown.until(r"Ctrl-C ends it")
            later = until(lambda: shown.read() and epoch_on(shown, first), told=shown.shown)
            assert later > first
            shown.resize(60, rows=30)
            until(lambda: shown.read() and max(map(len, shown.screen.display)) <= 60)
            os.write(shown.fd, b"\x03")
            assert shown.ended() == 0
        assert b"\x1b[?1049l" in shown.written and b"\x1b[?25h" in shown.written  # as it was before
        assert "mlp: running" in "\n".join(shown.shown())
        after = sorted(path.name for path in (tmp_path / "runs/going").iterdir())
        assert after == before
        assert started.process.poll() is None


def epoch_on(shown: Terminal, above: int) -> int:
    """The epoch that the screen shows, where it is above this one; else 0."""
    found = re.search(r"epoch (\d+) of 100000", "\n".join(shown.screen.display))
    return int(found[1]) if found and int(found[1]) > above else 0


@pytest.mark.long
def test_a_stopped_run_says_where_it_stopped(tmp_path):
    with going(tmp_path, "checkpoint.every_epochs=1") as started:
        started.process.send_signal(signal.SIGTERM)
        assert started.finish(60)[0] == 85
    lines = watched(tmp_path, "runs/going")
    assert lines[0] == "mlp: stopped"
    assert not [line for line in lines if "time left" in line]
    run = Run(tmp_path / "runs/going")
    assert f"epoch {len(run.metrics)} of 100000" in value_of(lines, "progress")


@pytest.mark.long
def test_a_sweep_is_a_table(tmp_path):
    done = execute_forked(
        ["-m", "allranks.train", "-m", *SMALL, "trainer.epochs=2", "seed=1,2,3", "run.dir=sweep"],
        1,
        tmp_path,
    ).ok()
    assert done.code == 0
    lines = watched(tmp_path, "sweep")
    assert lines[0] == "3 runs: 3 finished"
    titles = re.split(r"\s{2,}", lines[2].strip())
    assert titles[:3] == ["run", "state", "epoch"]
    for number, line in enumerate(lines[3:]):
        run = Run(tmp_path / f"sweep/{number}")
        cells = dict(zip(titles, re.split(r"\s{2,}", line.strip()), strict=True))
        assert (cells["run"], cells["state"], cells["epoch"]) == (str(number), "finished", "2/2")
        assert cells["val loss"] == f"{run.metrics[-1]['val/loss']:.4f}"
        assert cells["test %"] == f"{run.summary['test/accuracy']:.2f}"
    assert len(watched(tmp_path, "sweep/0", "sweep/2")) == 5


@pytest.mark.parametrize("columns", [36, 40, 50])
def test_one_run_fits_into_a_narrow_window(columns):
    losses = [1.0 / (epoch + 1) for epoch in range(50)]
    metrics = {"train/loss": losses, "val/loss": losses, "test/loss": losses}
    steps = {"step": 1_234_567, "steps": 9_876_543, "share": 0.1}
    view = View("runs/cnn", "cnn", "running", epoch=50, epochs=300, metrics=metrics, **steps)
    lines = picture([view], Look(columns))
    assert max(map(len, lines)) <= columns
    assert any("train loss (dots)" in line for line in lines)
    painted = picture([view], Look(columns, colours=True))
    assert [re.sub(r"\x1b\[[0-9;]*m", "", line).rstrip() for line in painted] == [x.rstrip() for x in lines]


STOPPED_BY_CTRL_Z = """
import os, signal, sys
from allranks.follow.watch import _other_screen
with _other_screen():
    os.kill(os.getpid(), signal.SIGTSTP)
    print("goes on", flush=True)
"""


def test_a_watch_that_is_stopped_gives_the_terminal_back_until_it_goes_on(tmp_path):
    """It has a process group of its own, as a shell gives each command; SIGTSTP stops no other one."""
    command = [PYTHON, "-c", STOPPED_BY_CTRL_Z]
    with subprocess.Popen(command, stdout=subprocess.PIPE, preexec_fn=os.setpgrp) as started:  # noqa: PLW1509
        _, status = os.waitpid(started.pid, os.WUNTRACED)
        assert os.WIFSTOPPED(status), status
        shown = os.read(started.stdout.fileno(), 1000).decode()
        started.send_signal(signal.SIGCONT)
        after = started.stdout.read().decode()
    assert shown == watch._ENTER + watch._LEAVE
    assert after == watch._ENTER + "goes on\n" + watch._LEAVE


@pytest.mark.parametrize("columns", [60, 80, 100])
def test_a_table_fits_into_its_window(columns):
    views = [
        View(
            f"runs/cnn/20261126T0101{number}Z-12ab{number}",
            "cnn",
            "running",
            epoch=number,
            epochs=300,
            left_s=7000.0 * number,
            samples_per_s=123456.7,
            metrics={
                "train/loss": [1.0 / (epoch + 2) for epoch in range(number)],
                "val/loss": [1.0 / (epoch + 1) for epoch in range(number)],
                "train/accuracy": [90.0] * number,
                "val/accuracy": [90.0] * number,
            },
        )
        for number in range(10, 14)
    ]
    lines = picture(views, Look(columns))
    assert max(map(len, lines)) <= columns
    assert all("running" in line for line in lines[3:])
    one = picture(views[:1], Look(columns))
    assert all(len(line) <= columns for line in one)
    # The values stand below each other, behind the longest label as well.
    beginnings = [re.match(r"  (progress|train accuracy|val accuracy) +", line) for line in one]
    assert [found.end() for found in beginnings if found] == [17, 17, 17]


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda place: None, "runs is missing: give the directory of a run"),
        (lambda place: place.mkdir(), "runs holds no run: give the directory of a run"),
        (lambda place: place.write_text("text"), "runs is a file: give the directory of a run"),
    ],
    ids=["missing", "empty", "file"],
)
def test_where_nothing_can_be_shown(tmp_path, make, message):
    make(tmp_path / "runs")
    done = execute_forked(["-m", "allranks", "watch", "--once"], 1, tmp_path)
    assert done.code == 2
    assert message in done.message


def test_what_can_be_shown_is_shown(finished, tmp_path):
    """Damaged records, half a line, keys of a later version, a second path that is not there."""
    run = tmp_path / "runs/one"
    shutil.copytree(finished.path, run)
    text = (run / "metrics.jsonl").read_text()
    (run / "metrics.jsonl").write_text(text + '{"epoch": 4, "val/lo')
    (run / "summary.json").write_text("no JSON")
    with (run / "config.yaml").open("a") as file:
        file.write("of_a_later_version: {some: thing}\n")
    (run / "environment.json").unlink()
    done = execute_forked(["-m", "allranks", "watch", "--once", "runs", "nowhere"], 1, tmp_path).ok()
    assert "nowhere is missing" in done.message
    lines = done.out.splitlines()
    assert "epoch 3 of 3" in value_of(lines, "progress")
    assert value_of(lines, "problem") == "summary.json cannot be read: it is not a JSON object."


def test_schedulers_are_asked_once_for_all_runs_and_seldom(tmp_path, monkeypatch, finished):
    """Files are read every two seconds; squeue is a command of a server that all users share."""
    asked: list[int] = []
    for number in (1, 2, 3):
        run = tmp_path / f"runs/{number}"
        shutil.copytree(finished.path, run)
        (run / "summary.json").unlink()
        (run / "job.json").write_text(json.dumps({"scheduler": "slurm", "job_ids": [str(number)]}))

    def states(jobs: Sequence[dict], warn: object) -> dict[str, str]:
        asked.append(len(jobs))
        return {"1": "running", "2": "queued"}

    monkeypatch.setattr("allranks.follow.reading.queue_states", states)
    reader = Reader([str(tmp_path / "runs")], print)
    for _ in range(3):
        views = reader.views()
    assert [(view.state, view.job_id) for view in views] == [
        ("running", "1"), ("queued", "2"), ("lost", "3"),
    ]  # fmt: skip
    assert asked == [3]
    monkeypatch.setattr(reader, "_asked_at", time.monotonic() - ASK_EVERY_S)
    reader.views()
    assert asked == [3, 3]


def test_steps_are_shown_before_the_first_epoch_is_done(finished, tmp_path):
    run = tmp_path / "runs/one"
    shutil.copytree(finished.path, run)
    for name in ("metrics.jsonl", "summary.json"):
        (run / name).unlink()
    lines = [{"step": step, "epoch": 1, "step/loss": 3.0 / step} for step in (1, 2, 3, 4)]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (run / "metrics-steps.jsonl").write_text(text + '{"step": 5, "st')
    assert newest_steps(run / "metrics-steps.jsonl") == lines
    shown = watched(tmp_path, "runs/one")
    assert "epoch 0 of 3, step 4 of 30" in value_of(shown, "progress")
    assert any("loss of a step" in line for line in shown)


# --- curves -------------------------------------------------------------------------------------------


def test_a_directory_that_cannot_be_looked_at_is_one_message(tmp_path, monkeypatch):
    """Here its name is too long. A folder that this user may not search fails in the same way."""
    monkeypatch.chdir(tmp_path)
    name = "x" * 300
    with pytest.raises(UserError, match=f"{name} cannot be read .File name too long.: give the directory"):
        runs_at(name)
    with pytest.raises(UserError, match=f"{name} cannot be read .File name too long.: give the directory"):
        Logs(Path(name), print).check()


def test_two_slashes_at_the_beginning_of_a_path_are_one():
    """`allranks watch //tmp/runs`"""
    views = [View(f"//tmp/runs/{number}", "mlp", "finished") for number in range(2)]
    assert [line.split()[0] for line in picture(views, Look(None))[3:]] == ["0", "1"]
    views[0] = View("/tmp/runs/0", "mlp", "finished")
    assert [line.split()[0] for line in picture(views, Look(None))[3:]] == ["0", "1"]


def test_what_a_foreign_run_is_called_does_not_control_the_terminal(tmp_path):
    (tmp_path / "config.yaml").write_text('name: "\\e[31mred"\nmodel: {_target_: a.B}\n')
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "step": 10, "val/\\u001b[31mloss": 0.5}\n')
    view = view_of(tmp_path, RunState("running", None))
    shown = "\n".join(picture([view], Look(None)) + picture([view, view], Look(None)))
    assert "\\x1b[31mred" in shown and "\\x1b[31mloss" in shown
    assert "\x1b" not in shown


def test_epochs_that_took_no_time_say_nothing_of_the_time_that_is_left(tmp_path):
    (tmp_path / "config.yaml").write_text("name: mlp\nmodel: {_target_: a.B}\ntrainer: {epochs: 4}\n")
    (tmp_path / "metrics.jsonl").write_text('{"epoch": 1, "step": 10, "time/train_s": 0.0}\n')
    view = view_of(tmp_path, RunState("running", None))
    assert (view.epoch, view.epochs, view.share) == (1, 4, 0.25)


def test_a_sparkline_goes_from_the_lowest_to_the_highest():
    assert drawing.sparkline([8, 7, 6, 5, 4, 3, 2, 1], 10) == "█▇▆▅▄▃▂▁"
    assert drawing.sparkline([1, None, 2], 10) == "▁ █"
    assert drawing.sparkline([None, None], 10) == ""
    assert drawing.sparkline([3, 3, 3], 10) == "▁▁▁"
    assert drawing.sparkline(range(1000), 8) == "▁▂▃▄▅▆▇█"
    assert drawing.sparkline([1, 2, 3], 10, is_unicode=False) == "_=#"


def test_a_chart_falls_where_the_curve_falls():
    cells = drawing.chart([[4.0, 3.0, 2.0, 1.0]], columns=8, rows=4)
    firsts = [min((x for x, (sign, _) in enumerate(line) if sign != " "), default=-1) for line in cells]
    assert firsts == sorted(firsts) and firsts[0] == 0
    assert cells[3][7][0] != " " and cells[0][7][0] == " "
    assert {who for line in cells for _, who in line} == {0, None}


@pytest.mark.parametrize("curve", [[], [None], [1.0], [2.0, 2.0], [None, 1.0, None, 3.0]], ids=str)
def test_a_chart_of_little_is_drawn_as_well(curve):
    cells = drawing.chart([curve, [1.5]], columns=5, rows=2)
    assert [len(line) for line in cells] == [5, 5]


# --- logs ---------------------------------------------------------------------------------------------


def test_logs_of_all_ranks_are_merged_by_time(finished):
    folder = finished.path.parent.parent
    lines = execute_forked(["-m", "allranks", "logs", "runs/one"], 1, folder).ok().out.splitlines()
    times = [re.match(r"\[rank [01]\] (\S+ \S+) ", line)[1] for line in lines]  # type: ignore[index]
    assert times == sorted(times)
    for rank in (0, 1):
        own = (finished.path / f"logs/rank-{rank}.log").read_text().splitlines()
        prefix = f"[rank {rank}] "
        assert [line.removeprefix(prefix) for line in lines if line.startswith(prefix)] == own
        alone = execute_forked(["-m", "allranks", "logs", "runs/one", "--rank", str(rank)], 1, folder).ok()
        assert alone.out.splitlines() == own


def test_logs_are_followed_to_the_end_of_the_run(tmp_path, finished):
    """Also across a restart, after which the ranks write on into the same files."""
    words = [*SMALL, "trainer.epochs=3", "run.dir=mine"]
    slow = "import time\nfrom allranks.models import mlp\n"
    slow += "def model(**values):\n    time.sleep(3)\n    return mlp(**values)\n"
    (tmp_path / "slow.py").write_text(slow)
    words.append("model._target_=slow.model")
    command = [forked_python(), "-m", "allranks.train", *words]
    with Started(command, cwd=tmp_path, PYTHONPATH=str(tmp_path)) as training:
        until((tmp_path / "mine/logs").is_dir, within_s=120)
        with Started([*ALLRANKS, "logs", "mine", "-f"], cwd=tmp_path) as following:
            assert training.finish(120)[0] == 0
            code, out, err = following.finish(60)
    assert (code, err) == (0, "")
    own = (tmp_path / "mine/logs/rank-0.log").read_text().splitlines()
    assert [line.removeprefix("[rank 0] ") for line in out.splitlines()] == own


def test_the_logs_of_a_program_without_a_training_end_when_it_has_ended(tmp_path):
    """It writes no summary.json: its exit code says that nothing is left to do."""
    run = tmp_path / "run"
    (run / "logs").mkdir(parents=True)
    (run / "logs/rank-0.log").write_text("done\n")
    (run / "job.json").write_text("{}")
    (run / "exit_code").write_text("0\n")
    done = execute_forked(["-m", "allranks", "logs", "run", "-f"], 1, tmp_path, timeout_s=60).ok()
    assert done.out == "[rank 0] done\n"


@pytest.mark.long
def test_ctrl_c_ends_following(tmp_path, finished):
    run = tmp_path / "run"
    shutil.copytree(finished.path, run)
    (run / "summary.json").unlink()
    with Terminal([*ALLRANKS, "logs", "run", "-f"], tmp_path, columns=200) as shown:
        shown.until(r"\[rank 0\] .* time +")
        os.write(shown.fd, b"\x03")
        assert shown.ended() == 0


def test_a_file_that_grows_is_truncated_and_is_replaced(tmp_path):
    path = tmp_path / "log"
    tail = Tail(path)
    assert tail.new_lines() == []
    path.write_text("one\ntw")
    assert tail.new_lines() == ["one"]
    with path.open("a") as file:
        file.write("o\nthree\n")
    assert tail.new_lines() == ["two", "three"]
    path.write_text("a\n")  # truncated
    assert tail.new_lines() == ["a"]
    (tmp_path / "new").write_text("b\nc")
    with path.open("a") as file:
        file.write("last words")
    (tmp_path / "new").replace(path)
    assert tail.new_lines() == ["last words", "b"]
    assert tail.rest() == ["c"]
    assert tail.new_lines() == []
    tail.close()


def test_after_an_error_of_the_file_system_no_line_is_shown_twice(tmp_path):
    """A network file system may fail in the middle of a file, and give it again a moment later."""
    path = tmp_path / "log"
    path.write_text("one\ntw")
    tail = Tail(path)
    assert tail.new_lines() == ["one"]
    with path.open("a") as file:
        file.write("o\nthree\n")
    assert tail._file is not None
    tail._file.close()
    tail._file = Stale(path)
    assert tail.new_lines() == []
    assert "Stale file handle" in tail.problem
    assert tail.new_lines() == ["two", "three"]
    assert tail.problem == ""


class Stale(io.FileIO):
    """A file of a server that is away for a moment: it gives some bytes, and then an error."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.has_given = False

    def read(self, size: int | None = -1) -> bytes:
        if self.has_given:
            raise OSError(errno.ESTALE, os.strerror(errno.ESTALE))
        self.has_given = True
        return super().read(1)


def test_a_file_that_was_replaced_while_it_was_closed_is_read_from_its_beginning(tmp_path):
    path = tmp_path / "log"
    path.write_text("one\ntwo\n")
    tail = Tail(path)
    assert tail.new_lines() == ["one", "two"]
    tail.close()
    (tmp_path / "new").write_text("of another file\n")
    (tmp_path / "new").replace(path)
    assert tail.new_lines() == ["of another file"]


def test_what_only_the_jobs_log_says_stands_where_it_was_said(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank-0.log").write_text(
        "2026-11-26 00:00:01,000 INFO allranks: Training\n"
        "2026-11-26 00:00:02,000 WARNING allranks: a fault\nTraceback of it\n"
        "2026-11-26 00:00:05,000 INFO allranks: going on\n"
    )
    (tmp_path / "logs/rank-1.log").write_text("2026-11-26 00:00:03,000 INFO allranks: rank 1 of 2\n")
    (tmp_path / "job.log").write_text(
        "preflight: fine\nTraining\na fault\nallranks: restart 1 of 2.\ngoing on\n"
    )
    lines = Logs(tmp_path, print).new_lines(is_over=True)
    assert [(line.source, line.text.split("allranks: ")[-1]) for line in lines] == [
        ("job", "preflight: fine"),
        ("rank 0", "Training"),
        ("rank 0", "a fault"),
        ("rank 0", "Traceback of it"),
        ("job", "restart 1 of 2."),
        ("rank 1", "rank 1 of 2"),
        ("rank 0", "going on"),
    ]


def test_of_a_run_that_was_started_twice_each_line_of_the_job_stands_in_its_start(tmp_path):
    (tmp_path / "logs").mkdir()
    said = [
        ("00:00", "linear, 1 rank"),  # by hand, before there was a job
        ("02:00", "linear, 1 rank"),
        ("02:01", "a loss that\n  is not finite"),
        ("02:30", "linear, 1 rank"),
        ("02:31", "a loss that\n  is not finite"),
    ]
    (tmp_path / "logs/rank-0.log").write_text(
        "".join(f"2026-11-26 {minute}:00,000 INFO allranks: {text}\n" for minute, text in said)
    )
    (tmp_path / "job.log").write_text(
        "linear, 1 rank\na loss that\n  is not finite\nrank 0 was killed; starting again\n"
        "linear, 1 rank\na loss that\n  is not finite\nrank 0 was killed once more\n"
    )
    lines = Logs(tmp_path, print).new_lines(is_over=True)
    assert [(line.time[11:16], line.source, line.text.split("allranks: ")[-1]) for line in lines] == [
        ("00:00", "rank 0", "linear, 1 rank"),
        ("02:00", "rank 0", "linear, 1 rank"),
        ("02:01", "rank 0", "a loss that"),
        ("02:01", "rank 0", "  is not finite"),
        ("02:01", "job", "rank 0 was killed; starting again"),
        ("02:30", "rank 0", "linear, 1 rank"),
        ("02:31", "rank 0", "a loss that"),
        ("02:31", "rank 0", "  is not finite"),
        ("02:31", "job", "rank 0 was killed once more"),
    ]


def test_of_what_rank_0_has_said_the_newest_lines_are_remembered(tmp_path, monkeypatch):
    monkeypatch.setattr("allranks.follow.logs.REMEMBERED_LINES", 3)
    (tmp_path / "logs").mkdir()
    said = [f"2026-11-26 00:00:0{second},000 INFO allranks: line {second}\n" for second in range(5)]
    (tmp_path / "logs/rank-0.log").write_text("".join(said))
    (tmp_path / "job.log").write_text("line 1\nline 2\nline 4\n")
    lines = Logs(tmp_path, print).new_lines(is_over=True)
    assert [line.text for line in lines if line.source == "job"] == ["line 1"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere"], "nowhere is missing: give the directory of a run."),
        (["."], "has no logs: give the directory of a run."),
    ],
)
def test_logs_that_are_not_there(tmp_path, words, message):
    done = execute_forked(["-m", "allranks", "logs", *words], 1, tmp_path)
    assert done.code == 2
    assert message in done.message


def test_a_program_has_no_logs_of_single_ranks(tmp_path):
    (tmp_path / "job.log").write_text("hello\n")
    with pytest.raises(UserError, match="--rank 1: a program of your own has no logs of single ranks"):
        Logs(tmp_path, print, rank=1).check()


def test_a_rank_that_is_not_there(finished):
    with pytest.raises(UserError, match="--rank 7: this run has logs of ranks 0 to 1"):
        Logs(finished.path, print, rank=7).check()


def test_a_log_that_cannot_be_read_is_named_once_and_the_others_are_shown(tmp_path):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs/rank-0.log").mkdir()
    (tmp_path / "logs/rank-1.log").write_text("2026-11-26 00:00:03,000 INFO allranks: rank 1 of 2\n")
    told: list[str] = []
    logs = Logs(tmp_path, told.append)
    assert [line.source for _ in range(2) for line in logs.new_lines(is_over=False)] == ["rank 1"]
    assert told == [f"{tmp_path}/logs/rank-0.log cannot be read (Is a directory)."]


def test_runs_at_relative_and_whole_paths_stand_in_one_table(finished, tmp_path):
    shutil.copytree(finished.path, tmp_path / "runs/other")
    lines = watched(tmp_path, "runs/other", str(finished.path))
    assert lines[0] == "2 runs: 2 finished"
    assert [line.split()[0].split("/")[-1] for line in lines[3:]] == ["other", "one"]
