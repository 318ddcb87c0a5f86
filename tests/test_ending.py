"""How a run ends: the table in training/ending.py, case by case.

Whole runs that end in these ways, on real ranks, are in test_detection.py, test_going_on.py and
test_own_components.py.
"""

from __future__ import annotations

import signal

import pytest

from allranks.base.errors import RunError, UserError
from allranks.training.ending import Ending, Others, ending_of
from helpers import PYTHON, execute, launcher

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
    assert ending_of(BrokenPipeError(), 0, ALONE) == Ending(1)
    assert ending_of(BrokenPipeError(), 1, MET).ends_others


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
