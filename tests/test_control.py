"""When a run saves and stops: signals, the job's end, and the ranks' meetings.

Here one rank meets with itself, by a clock that the tests set. Meetings of several real ranks are in
test_resume.py.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import pytest

from allranks.base.signals import Signals
from allranks.compose import from_command_line
from allranks.config import Config, decisive_values, runtime_settings
from allranks.job.identity import RankIdentity
from allranks.run import checkpoint
from allranks.runtime.bringup import open_runtime
from allranks.runtime.runtime import Runtime
from allranks.training import building, control
from allranks.training.control import Control, Pace, RunStopped, Wishes, end_of_job
from allranks.training.saver import Saver
from allranks.training.state import KeptTraining
from allranks.training.training import Training
from helpers import SMALL, TIMEOUT_S, Done, only_long, recipe_of, until


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


class Lab:
    """A training of one epoch of ten steps that takes no steps: the tests set where it stands."""

    def __init__(self, runtime: Runtime, config: Config, folder: Path) -> None:
        self.runtime = runtime
        self.config = config
        self.folder = folder
        self.training: Training = building.build_training(recipe_of(config), runtime, examples=1200)
        kept = KeptTraining(self.training, decisive_values(config), runtime)
        self.saver = Saver(runtime, str(folder), kept, keep=config.checkpoint.keep, save_s=60)
        self.saver.resume()
        self.signals = Signals()
        self.clock = Clock()
        self.control = self.new_control()

    def new_control(self) -> Control:
        config = self.config
        return Control(
            self.runtime, self.saver, self.signals, config.checkpoint, config.trainer.epochs, self.clock
        )

    def after_step(self, step: int) -> bool:
        """Whether the run stops after this step."""
        self.training.position.step = self.training.position.epoch_steps = step
        return self.stops()

    def stops(self, evaluates_next: bool = False) -> bool:
        """Whether the run stops where it stands now."""
        try:
            self.control.meet(evaluates_next)
        except RunStopped:
            return True
        return False

    def saved(self) -> list[int]:
        """The steps of the checkpoints, once the save under way is done."""
        self.saver.wait()
        return sorted(checkpoint.steps(self.folder))


@pytest.fixture
def lab(tmp_path: Path) -> Iterator:
    """lab("checkpoint.every_steps=5") is a Lab with that configuration."""
    made: list[Lab] = []

    def make(*overrides: str) -> Lab:
        words = [*SMALL, "model=linear", "trainer.epochs=2", "trainer.batch_size=120", *overrides]
        [config] = from_command_line(words)
        runtime = open_runtime(RankIdentity("none"), runtime_settings(config))
        folder = tmp_path / f"run{len(made)}"
        folder.mkdir()
        made.append(Lab(runtime, config, folder))
        return made[-1]

    yield make
    for each in made:
        each.saver.__exit__(None)
        each.runtime.close()


# --- the pace of the meetings ---


def test_the_ranks_meet_about_every_quarter_of_a_second():
    pace = Pace()
    assert pace.is_due(1)
    pace.met(1, now=0.0, pause=pace.pause(1, 0.0))
    assert pace.is_due(2)  # nothing is known of the steps' length yet
    assert pace.pause(2, now=0.05) == 5  # steps of 50 ms
    pace.met(2, now=0.05, pause=5)
    assert [pace.is_due(step) for step in (6, 7, 8)] == [False, True, True]


def test_a_step_longer_than_that_is_followed_by_a_meeting_and_a_short_one_by_not_too_many():
    pace = Pace()
    pace.met(1, now=0.0, pause=1)
    assert pace.pause(2, now=90.0) == 1
    assert pace.pause(2, now=1e-9) == control.MOST_STEPS_BETWEEN_MEETINGS
    assert pace.pause(1, now=5.0) == 1  # no step in between: an evaluation


# --- what the ranks add up ---


def test_wishes_of_several_ranks_add_up_to_what_they_agree_on():
    rank_0 = Wishes([0, 1, 0, 0, 0], late=0, overdue=1, pause=7)
    rank_1 = Wishes([1, 1, 0, 0, 0], late=0, overdue=0, pause=0)
    sums = [a + b for a, b in zip(rank_0.to_numbers(), rank_1.to_numbers(), strict=True)]
    agreed = Wishes.from_numbers(sums)
    assert agreed.reason == "SIGTERM and SIGUSR1"
    assert (agreed.overdue, agreed.pause) == (1, 7)
    assert Wishes([0] * 5, late=1, overdue=0, pause=1).reason == "the job's end"
    assert Wishes([0] * 5, late=0, overdue=1, pause=1).reason == ""


# --- saving ---


def test_checkpoints_at_the_steps_and_epochs_that_were_asked_for(lab):
    here = lab("checkpoint.every_steps=4", "checkpoint.every_epochs=100")
    for step in range(1, 11):
        assert here.after_step(step) is False
    assert here.saved() == [4, 8]
    assert all(here.control.is_due(step) for step in (4, 8))


def test_a_checkpoint_when_its_time_has_come_by_the_clock(lab):
    here = lab("checkpoint.every_s=60", "checkpoint.every_epochs=100")
    for step, now in enumerate((1001, 1059, 1061, 1119, 1122), start=1):
        here.clock.now = now
        here.after_step(step)
    assert here.saved() == [3, 5]


def test_before_an_evaluation_nothing_is_saved_unless_the_run_stops(lab):
    here = lab("checkpoint.every_steps=10")
    here.training.position.step = here.training.position.epoch_steps = 10
    assert here.stops(evaluates_next=True) is False
    assert here.saved() == []
    here.signals.counts[signal.SIGTERM] = 1
    assert here.stops(evaluates_next=True) is True
    assert here.saved() == [10]


def test_a_run_that_is_done_saves_and_is_not_stopped(lab):
    here = lab()
    here.signals.counts[signal.SIGTERM] = 1
    here.training.position.step, here.training.position.epoch, here.training.position.epoch_steps = 20, 2, 0
    assert here.stops() is False
    assert here.saved() == [20]


# --- stopping ---


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGUSR2", "SIGINT", "SIGHUP"])
def test_a_signal_stops_after_the_step_with_a_checkpoint(lab, name):
    here = lab()
    assert here.after_step(3) is False
    here.signals.counts[signal.Signals[name]] = 1
    assert here.after_step(4) is True
    assert here.control.reason == name
    assert here.saved() == [4]


def test_the_jobs_end_stops_while_a_save_and_the_next_meeting_still_fit(lab):
    here = lab()
    here.saver._longest_s = 7.0
    here.control.job_end.at = 1100.0
    # kept free: 10 s, twice the longest save, and the longest time between two meetings, here 20 s
    for step, (now, stops) in enumerate(
        [(1000, False), (1020, False), (1040, False), (1057, True)], start=1
    ):
        here.clock.now = now
        assert here.after_step(step) is stops
    assert here.control.reason == "the job's end"
    assert here.saved() == [4]


def test_a_training_whose_epochs_are_longer_than_its_job_saves_once_and_knows_how_long_that_takes(lab):
    here = lab("checkpoint.every_epochs=1")
    here.control.job_end.at = 1000.0 + 6 * 3600
    for step, now in enumerate((1299, 1300, 1700), start=1):
        here.clock.now = now
        assert here.after_step(step) is False
    assert here.saved() == [2]
    here.saver._longest_s = 60.0
    # The longest time between two meetings has been 400 s so far.
    for step, (left_s, stops) in enumerate([(531, False), (529, True)], start=4):
        here.control._longest_s = 400.0
        here.control._met_at = None
        here.clock.now = here.control.job_end.at - left_s
        assert here.after_step(step) is stops
    assert here.saved() == [2, 5]


def test_in_a_short_job_that_first_save_comes_at_half_of_its_time(lab):
    here = lab()
    here.control.job_end.at = 1100.0
    for step, now in enumerate((1049, 1050, 1051), start=1):
        here.clock.now = now
        here.after_step(step)
    assert here.saved() == [2]


def test_a_save_under_way_counts_for_the_time_that_is_kept_free(lab):
    here = lab()
    here.saver._begun_at = time.perf_counter() - 70
    assert here.saver.longest_s >= 70


def test_in_a_long_evaluation_the_first_save_comes_as_well(lab):
    here = lab()
    here.control.job_end.at = 10_000.0
    here.after_step(10)
    here.control.begin_evaluation()
    here.control.check_evaluation(1)
    assert here.saved() == []
    here.clock.now = 1300.0
    here.control.check_evaluation(2, can_stop=lambda: False)
    assert here.saved() == []
    here.control.check_evaluation(3)
    assert here.saved() == [10]


def test_where_a_run_has_saved_or_knows_no_end_of_its_job_no_such_save_is_made(lab):
    here = lab("checkpoint.every_s=100", "checkpoint.every_epochs=100")
    here.control.job_end.at = 10_000.0
    for step, now in enumerate((1100, 1310, 1311), start=1):
        here.clock.now = now
        here.after_step(step)
    assert here.saved() == [1, 2]
    here = lab()
    here.clock.now = 9000.0
    here.after_step(1)
    assert here.saved() == []


def test_a_deadline_goes_before_what_the_scheduler_says_and_nonsense_is_told(caplog):
    assert end_of_job({"ALLRANKS_DEADLINE": "1700000000"}) == 1_700_000_000
    assert end_of_job({}) is None
    assert end_of_job({"ALLRANKS_DEADLINE": "soon"}) is None
    assert "ALLRANKS_DEADLINE=soon is not a time" in caplog.text


# --- in an evaluation ---


def test_a_signal_stops_between_two_batches_of_an_evaluation(lab):
    here = lab()
    here.after_step(10)
    here.control.begin_evaluation()
    here.control.check_evaluation(1)
    here.signals.counts[signal.SIGTERM] = 1
    with pytest.raises(RunStopped):
        here.control.check_evaluation(2)
    assert here.control.reason == "SIGTERM"
    assert here.saved() == [10]


def test_the_jobs_end_lets_a_process_that_has_gained_nothing_end_its_evaluation(lab):
    here = lab()
    here.control.job_end.at = here.clock.now
    here.control.begin_evaluation()
    here.control.check_evaluation(1)
    here.after_step(10)
    with pytest.raises(RunStopped):
        here.control.check_evaluation(2)


# --- signals ---


def test_the_first_signal_is_answered_as_it_comes_and_only_once(lab, capfd):
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    here = lab()
    try:
        here.signals.count(signal.SIGTERM, signal.SIGUSR1)
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert here.signals.names == ["SIGTERM", "SIGUSR1"]
    assert capfd.readouterr().out == "SIGTERM: stopping after this batch; what is done so far is saved\n"


def test_a_signal_that_came_before_the_run_could_answer_is_answered_when_it_begins(lab, capfd):
    here = lab()
    here.signals.counts[signal.SIGUSR1] = 1
    here.new_control()
    assert capfd.readouterr().out == "SIGUSR1: stopping after this batch; what is done so far is saved\n"


# --- what is kept ---


@pytest.mark.parametrize("in_its_place", ["nothing", "a file"])
def test_a_folder_that_goes_after_the_save_is_no_failure_of_the_save(lab, caplog, in_its_place):
    here = lab()
    here.after_step(10)
    here.saver.save()
    assert here.saved() == [10]
    folder = here.folder / "checkpoints"
    folder.rename(here.folder / "elsewhere")
    if in_its_place == "a file":
        folder.touch()
    here.saver._remove_earlier(10, [])
    assert ("earlier checkpoints could not be removed" in caplog.text) == (in_its_place == "a file")


# --- real ranks that are stopped in an evaluation ---

# In its evaluation number $HOLD of this process, counted from 1, it waits in each batch for a file.
HELD = """
import os, pathlib, time
import torch

class Held(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.evaluations = 0
        self.body = torch.nn.Sequential(
            torch.nn.Flatten(), torch.nn.Linear(784, 300), torch.nn.ReLU(), torch.nn.Dropout(0.2),
            torch.nn.Linear(300, 10))

    def eval(self):
        self.evaluations += 1
        return super().eval()

    def forward(self, images):
        if not self.training and self.evaluations == int(os.environ.get("HOLD", 0)):
            pathlib.Path(f"held-{os.getpid()}").touch()
            while not pathlib.Path("go").exists():
                time.sleep(0.02)
        return self.body(images)
"""
HELD_RUN = (
    *SMALL, "trainer.epochs=2", "trainer.batch_size=100", "run.dir=run", "model=linear",
    "model._target_=held.Held", "~model.input_shape", "~model.classes",
)  # fmt: skip


def stop_while_held(folder: Path, train: Callable[..., Done], evaluation: int, ranks: int) -> str:
    """Has the run trained, and sends SIGTERM to its ranks in this evaluation; returns what it said."""
    for file in (*folder.glob("held-*"), folder / "go"):
        file.unlink(missing_ok=True)
    with ThreadPoolExecutor(1) as thread:
        training = thread.submit(train, HOLD=str(evaluation))
        held = until(
            lambda: training.done() or (len(found := list(folder.glob("held-*"))) == ranks and found),
            within_s=TIMEOUT_S,
        )
        assert held is not True, training.result()  # it has ended too early
        for file in held:
            os.kill(int(file.name.removeprefix("held-")), signal.SIGTERM)
        (folder / "go").touch()
        done = training.result()
    assert done.code == 85, done.err
    return done.out


@pytest.mark.parametrize(("under", "ranks"), [only_long("python", 1), (None, 2), only_long("mpiexec", 2)])
def test_a_run_stopped_in_its_evaluations_has_the_bits_of_one_that_was_not(train, tmp_path, under, ranks):
    def held(name: str, **environ: str) -> Done:
        environ = {"PYTHONPATH": str(tmp_path / name), **environ}
        return train(*HELD_RUN, under=under, ranks=ranks, cwd=tmp_path / name, env=environ)

    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "held.py").write_text(HELD)
    whole = held("whole").ok().run

    # An epoch ends with evaluations on its training and its validation set; last comes the test. What was
    # stopped is evaluated again.
    folder, command = tmp_path / "stopped", partial(held, "stopped")
    out = stop_while_held(folder, command, evaluation=1, ranks=ranks)
    assert "SIGTERM: stopping after this batch" in out
    assert "stopped by SIGTERM after step 12, in epoch 1 of 2; it is saved" in out
    out = stop_while_held(folder, command, evaluation=4, ranks=ranks)
    assert f"going on from {folder}/run/checkpoints/step-000012: step 12, in epoch 1" in out
    assert "stopped by SIGTERM after step 24, in epoch 2 of 2; it is saved" in out
    out = stop_while_held(folder, command, evaluation=3, ranks=ranks)
    assert "stopped by SIGTERM after step 24, in the test; it is saved" in out

    gone_on = command().ok().run
    assert gone_on.summary["model/sha256"] == whole.summary["model/sha256"]
    assert gone_on.losses == whole.losses
    assert gone_on.column("epoch") == [1, 2]


@pytest.mark.parametrize("sharding", ["none", only_long("fsdp")])
def test_a_start_that_has_time_for_an_evaluation_only_is_a_gain(train, tmp_path, sharding):
    """The epoch that it closes is saved at the step of the checkpoint from which it has gone on."""

    def held(name: str, **environ: str) -> Done:
        environ = {"PYTHONPATH": str(tmp_path / name), **environ}
        words = (*HELD_RUN, f"sharding={sharding}")
        return train(*words, under=None, ranks=2, cwd=tmp_path / name, env=environ)

    def stands(done: Done) -> tuple[int, int, int]:
        """(step, epoch, epochs with figures) of the newest checkpoint, after a start that was stopped."""
        assert done.code == 85, done.err
        _, files, passed_over = checkpoint.newest_valid(tmp_path / "stopped" / "run")
        assert not passed_over
        state = json.loads(files["state.json"])
        return state["step"], state["epoch"], len(state["history"])

    for name in ("whole", "stopped"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "held.py").write_text(HELD)
    whole = held("whole").ok().run

    stop_while_held(tmp_path / "stopped", partial(held, "stopped"), evaluation=1, ranks=2)
    late = {"ALLRANKS_DEADLINE": "1"}  # long ago: each start stops as soon as it has gained something
    assert stands(held("stopped", **late)) == (12, 1, 1)
    step, epoch, _ = stands(held("stopped", **late))
    assert (step > 12, epoch) == (True, 1)

    gone_on = held("stopped").ok().run
    assert gone_on.summary["model/sha256"] == whole.summary["model/sha256"]
    assert gone_on.losses == whole.losses
    assert gone_on.column("epoch") == [1, 2]
