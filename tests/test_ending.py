"""How a run ends: the table in training/ending.py, case by case.

Whole runs that end in these ways, on real ranks, are in test_detection.py, test_going_on.py and
test_own_components.py.
"""

from __future__ import annotations

import signal
from pathlib import Path

import pytest

from allranks.base import files
from allranks.base.errors import RunError, UserError
from allranks.run.claim import Claim
from allranks.training.ending import Ending, Others, ending_of
from allranks.training.records import StepsFile
from allranks.training.report import Reporter
from helpers import PYTHON, SMALL, Done, execute, execute_forked, launcher

ALONE, STARTED, MET = Others.NONE, Others.STARTED, Others.MET


@pytest.mark.parametrize("others", [STARTED, MET])
def test_an_error_of_all_ranks_is_said_by_one_and_ends_nobody_else(others):
    error = UserError("the data are not there", said_by=0)
    assert ending_of(error, 0, others) == Ending(2, "the data are not there")
    assert ending_of(error, 3, others) == Ending(2, "")


@pytest.mark.parametrize("others", [STARTED, MET])
def test_an_error_of_one_rank_is_said_by_it_and_ends_the_others(others):
    error = UserError("this rank has no disk")
    assert ending_of(error, 3, others) == Ending(2, "this rank has no disk", ends_others=True)


def test_a_lone_process_has_nobody_to_end():
    assert ending_of(UserError("no"), 0, ALONE) == Ending(2, "no")
    assert not ending_of(ValueError("no"), 0, ALONE).ends_others


def test_what_goes_wrong_in_a_run_that_was_asked_for_rightly_has_another_exit_code():
    assert ending_of(RunError("weights differ", said_by=0), 0, MET) == Ending(1, "weights differ")
    assert ending_of(RunError("broken"), 1, MET) == Ending(1, "broken", ends_others=True)


def test_ctrl_c_ends_a_lone_process_as_a_shell_expects_it():
    assert ending_of(KeyboardInterrupt(), 0, ALONE) == Ending(128 + signal.SIGINT, "interrupted")
    assert ending_of(KeyboardInterrupt(), 1, MET) == Ending(1, "", ends_others=True)


def test_a_closed_console_is_no_error_to_talk_about_unless_others_wait():
    assert ending_of(BrokenPipeError(), 0, ALONE, console_is_closed=True) == Ending(1)
    assert ending_of(BrokenPipeError(), 1, MET, console_is_closed=True).ends_others
    assert ending_of(BrokenPipeError(), 0, ALONE).is_traceback  # another pipe, such as a server's


@pytest.mark.parametrize("others", [STARTED, MET])
def test_an_error_that_nobody_foresaw_has_its_traceback(others):
    try:
        {}["missing"]
    except KeyError as error:
        ending = ending_of(error, 1, others)
    assert (ending.exit_code, ending.is_traceback, ending.ends_others) == (1, True, True)
    assert ending.message.startswith("Traceback (most recent call last):\n")
    assert ending.message.endswith("KeyError: 'missing'\n")


# A program whose rank 1 raises something before the ranks have met, while rank 0 waits for it in MPI.
BEFORE_THE_MEETING = """
import os
from allranks.runtime import mpi
from allranks.training import ending
from allranks.base.errors import UserError
with ending.of_process(os.environ) as identity:
    comm = mpi.world(identity)
    if identity.rank == 1:
        raise {raised}
    comm.Barrier()
    comm.Barrier()
"""


@pytest.mark.parametrize(
    ("raised", "code", "said"),
    [
        ("UserError('rank 1 has no disk')", 2, "allranks: rank 1 has no disk"),
        ("KeyError('x')", 1, "KeyError: 'x'"),
    ],
)
def test_a_rank_that_fails_before_the_meeting_ends_those_that_wait_in_mpi(tmp_path, raised, code, said):
    program = BEFORE_THE_MEETING.format(raised=raised)
    done = execute([*launcher("mpiexec", 2), "-c", program], tmp_path, timeout_s=60)
    assert done.code == code
    assert done.err.count(said) == 1
    assert done.left_running == []


def test_a_process_alone_leaves_the_traceback_to_python(tmp_path):
    program = "import os\nfrom allranks.training import ending\n"
    program += "with ending.of_process(os.environ): raise KeyError('x')"
    done = execute([PYTHON, "-c", program], tmp_path)
    assert done.code == 1
    assert done.err.count("Traceback") == 1
    assert done.err.endswith("KeyError: 'x'\n")


# --- what else may go wrong at the end --------------------------------------------------------------------

# A loop of one's own that runs a statement in its second step, while the first checkpoint is written. That
# takes SAVE_S seconds, as on a busy file system.
OWN = """
import os, signal, sys, threading, time
import torch, allranks

fsync = os.fsync
slept = []
def slow(fd):
    if threading.current_thread().name.startswith("checkpoint") and not slept:
        slept.append(fd)
        time.sleep(float(os.environ.get("SAVE_S", "0")))
    fsync(fd)
os.fsync = slow

run = allranks.open(
    "own", device="cpu", threads=1, report=False, watchdog={"step_s": 1.0}, checkpoint={"every_steps": 1}
)
model = run.wrap(torch.nn.Linear(1, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.keep(model=model, optimizer=optimizer)
for epoch in run.epochs(1):
    for batch in run.steps([torch.ones(6, 1)] * 4):
        if run.step == 1:
            STATEMENT
        run.backward(model(batch).mean())
        optimizer.step()
run.finish()
"""


def own(folder: Path, statement: str, ranks: int = 1, save_s: float = 0.0) -> Done:
    program = OWN.replace("STATEMENT", statement)
    return execute_forked(["-c", program], ranks, folder, {"SAVE_S": str(save_s)}, timeout_s=60)


def test_an_error_is_said_and_the_save_under_way_kept_though_it_takes_longer_than_a_step_may(tmp_path):
    done = own(tmp_path, "raise allranks.base.errors.UserError('no more')", save_s=4)
    assert (done.code, done.message) == (2, "allranks: no more")
    assert [path.name for path in (tmp_path / "runs/own/checkpoints").iterdir()] == ["step-000001"]


# The first checkpoint is never written; meanwhile Ctrl-C is pressed again and again. What comes less than
# TWICE_S after a Ctrl-C was heard counts as the same one, and a busy main thread hears it late.
NEVER_SAVED = """
import os, signal, threading, time
from allranks import train
from allranks.base.signals import TWICE_S

fsync = os.fsync
def hang(fd):
    if threading.current_thread().name.startswith("checkpoint"):
        while True:
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(TWICE_S + 0.1)
    fsync(fd)
os.fsync = hang
signal.signal(signal.SIGINT, signal.default_int_handler)
train.main()
"""


def test_a_second_ctrl_c_does_not_wait_for_the_save_under_way(tmp_path):
    words = [*SMALL, "model=linear", "run.dir=run", "trainer.epochs=500"]
    done = execute_forked(["-c", NEVER_SAVED, *words], 1, tmp_path, timeout_s=60)
    assert done.code == 130, done.err


def test_a_full_disk_of_the_console_does_not_keep_an_error_from_the_other_ranks(tmp_path):
    lines = ["full = os.open('/dev/full', os.O_WRONLY)", "if run.rank == 1: os.dup2(full, 1)"]
    lines += ["if run.rank == 1: print('not flushed yet')", "if run.rank == 1: raise KeyError('mine')"]
    done = own(tmp_path, f"\n{' ' * 12}".join(lines), ranks=2)
    assert done.code == 1
    assert done.err.count("KeyError: 'mine'") == 1
    assert "Traceback" not in done.out  # rank 0, which speaks there, is ended and has no error of its own
    assert done.messages == []  # nor does anybody accuse another rank


def test_a_broken_pipe_that_is_not_the_consoles_has_its_traceback(tmp_path):
    done = own(tmp_path, "raise BrokenPipeError(32, 'the server has gone')")
    assert done.code == 1
    assert done.err.count("BrokenPipeError: [Errno 32] the server has gone") == 1


# A training whose stdout goes to a disk that is full.
FULL = """
import os
os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
from allranks import train
train.main()
"""


def test_a_run_that_has_finished_ends_with_0_though_nobody_takes_what_it_says(tmp_path):
    words = [*SMALL, "model=linear", "run.dir=run", "trainer.epochs=1"]
    done = execute_forked(["-c", FULL, *words], 1, tmp_path, timeout_s=60)
    assert (done.code, done.err) == (0, "")


def test_rank_0_has_the_time_of_a_save_wherever_it_writes_a_record(train_here, monkeypatch):
    """A shared file system may stand still for a minute, which is longer than a step may take."""
    running: list[Reporter] = []
    activities: dict[str, set[str]] = {}

    def watched(owner: object, name: str) -> None:
        usual = getattr(owner, name)

        def call(*given, **named):
            if running:
                activity = running[0].runtime.progress.allowance().activity
                activities.setdefault(name, set()).add(activity)
            return usual(*given, **named)

        monkeypatch.setattr(owner, name, call)

    opened = Reporter.opened

    def opened_and_noted(self, *given):
        opened(self, *given)
        running.append(self)

    monkeypatch.setattr(Reporter, "opened", opened_and_noted)
    watched(files, "append_line")  # metrics.jsonl
    watched(files, "write_json")  # summary.json
    watched(StepsFile, "_write")  # metrics-steps.jsonl
    watched(Claim, "release")
    train_here(*SMALL, "model=linear", "run.dir=run", "trainer.epochs=2", "trainer.log_every_steps=1")
    writing, saving = "writing records (watchdog.save_s)", "saving (watchdog.save_s)"
    assert activities == {
        "append_line": {writing},
        "write_json": {writing},
        "_write": {writing},
        "release": {saving},
    }
