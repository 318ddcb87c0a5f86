"""Guards that are stopped, consoles that nobody reads, file systems that hang: a launch ends in time."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import threading
import time
from collections.abc import Iterable

import pytest

from allranks.base import processes
from allranks.base.errors import EXIT_TIMED_OUT
from allranks.launch.console import STDOUT, Writer
from allranks.launch.suspension import answer_within
from helpers import TIMEOUT_S, Started, serial, took_at_most, until
from launching import TOLD, by_hand, can_make_hosts, python, supervised

pytestmark = serial  # limits of a few seconds
HOST = socket.gethostname()

# Says that it is there, and ends in order on SIGTERM, after leaving a file behind.
SAVES = """
import os, signal, sys, time
def stop(*_):
    open({saved!r} + os.environ["RANK"], "w").close()
    os._exit(85)
signal.signal(signal.SIGTERM, stop)
print("here", os.environ["RANK"], os.getppid(), file=sys.stderr, flush=True)
"""
# Fills whatever stdout is, for ever. Rank 0 alone: the others would fill stderr.
FLOODS = """
line = b"x" * 999 + b"\\n"
while os.environ["RANK"] == "0":
    os.write(1, line)
time.sleep(600)
"""


def guards(started: Started, ranks: int) -> dict[int, int]:
    """The process id of each rank's guard, once all ranks have said that they are there."""
    found: dict[int, int] = {}
    while len(found) < ranks:
        words = started.process.stderr.readline().decode().split()
        assert words, "ended early"
        rank, guard = words[words.index("here") + 1 :]
        found[int(rank)] = int(guard)
    return found


@pytest.fixture
def saved(tmp_path):
    """The ranks that have saved, by their files."""
    (tmp_path / "saved").mkdir()

    def saved() -> list[str]:
        return sorted(path.name for path in (tmp_path / "saved").iterdir())

    saved.program = SAVES.format(saved=f"{tmp_path}/saved/")
    return saved


# --- guards --------------------------------------------------------------------------------------


def test_a_guard_that_is_stopped_is_named_and_all_is_ended(saved):
    program = python(saved.program + "time.sleep(600)")
    limits = {"ASK_S": 0.5, "SILENT_S": 3.0, "LEAVE_S": 1.0}
    with Started(supervised("mpiexec", 3, program, constants=limits)) as started:
        os.kill(guards(started, 3)[1], signal.SIGSTOP)
        code, _, err = started.finish(within_s=60)
        started.gone(within_s=5)
    assert code == 137
    assert f"rank 1 on {HOST} does not answer any more: its guard is stopped" in err.splitlines()[-1]
    assert "the first of 3 ranks to fail" in err.splitlines()[-1]


def test_guards_that_answer_are_left_alone(saved):
    """Asked a hundred times, while the program is silent and cannot be reached."""
    program = python(saved.program + "time.sleep(5)")
    limits = {"ASK_S": 0.05, "SILENT_S": 4.0}
    with Started(supervised("mpiexec", 2, program, constants=limits)) as started:
        assert started.finish(within_s=60)[0] == 0


@pytest.mark.long
def test_a_launch_that_was_itself_stopped_takes_no_guard_for_silent(saved):
    """As a scheduler stops a whole job and lets it go on: the clock jumps, and nobody is to blame."""
    program = python(saved.program + "time.sleep(8)")
    limits = {"ASK_S": 0.2, "SILENT_S": 2.0, "SUSPENDED_S": 1.0}
    with Started(supervised("mpiexec", 2, program, constants=limits)) as started:
        guards(started, 2)
        started.process.send_signal(signal.SIGSTOP)
        time.sleep(4)
        started.process.send_signal(signal.SIGCONT)
        assert started.finish(within_s=60)[0] == 0


@pytest.mark.long
def test_time_in_which_a_launch_was_stopped_counts_for_no_limit(saved):
    """As the preflight's: the job was suspended meanwhile, and nothing hangs."""
    program = python(saved.program + "time.sleep(13)")
    limits = {"ASK_S": 0.2, "SUSPENDED_S": 1.0}
    with Started(supervised("mpiexec", 2, program, constants=limits, run_s=10)) as started:
        guards(started, 2)
        started.process.send_signal(signal.SIGSTOP)
        time.sleep(12)
        started.process.send_signal(signal.SIGCONT)
        code, _, err = started.finish(within_s=60)
    assert code == 0, err
    with Started(supervised("mpiexec", 2, program, constants=limits, run_s=10)) as started:
        assert started.finish(within_s=60)[0] == EXIT_TIMED_OUT


def stop(pids: Iterable[int], signum: int) -> None:
    """Sends a signal to guards and to their programs, as a scheduler does to all processes of a job."""
    for pid in pids:
        for process in (pid, *processes.descendants(pid)):
            os.kill(process, signum)


def test_ranks_that_are_all_suspended_are_waited_for(saved):
    """As by a scheduler that lets a more urgent job run, while the launch runs on outside of the job."""
    program = python(saved.program + "time.sleep(7)")
    limits = {"ASK_S": 0.2, "SILENT_S": 1.5, "SUSPENDED_S": 1.0}
    with Started(supervised("mpiexec", 2, program, constants=limits)) as started:
        pids = guards(started, 2).values()
        stop(pids, signal.SIGSTOP)
        said = started.process.stderr.readline().decode()
        time.sleep(3 * limits["SILENT_S"])
        assert started.process.poll() is None
        stop(pids, signal.SIGCONT)
        code, _, err = started.finish(within_s=60)
    assert said == "allranks: the job is suspended: all ranks are stopped. Waiting until they go on.\n"
    assert err == "allranks: the job goes on.\n"
    assert code == 0


@pytest.mark.long
def test_guards_that_are_all_stopped_beside_programs_that_run_are_no_suspension(saved):
    program = python(saved.program + "time.sleep(600)")
    limits = {"ASK_S": 0.2, "SILENT_S": 2.0, "SUSPENDED_S": 1.0, "LEAVE_S": 1.0}
    with Started(supervised("mpiexec", 2, program, constants=limits)) as started:
        for pid in guards(started, 2).values():
            os.kill(pid, signal.SIGSTOP)
        code, _, err = started.finish(within_s=60)
        started.gone(within_s=5)
    assert code == 137
    assert "its guard is stopped" in err and "suspended" not in err


def test_a_guard_that_is_stopped_after_its_program_has_ended_is_no_suspension():
    """It is the last one, so that all guards that are left are stopped. Nobody would let it go on."""
    ends = "import os, signal\nif os.environ['RANK'] == '1': os.kill(os.getppid(), signal.SIGSTOP)"
    limits = {"ASK_S": 0.2, "SILENT_S": 2.0, "SUSPENDED_S": 1.0, "LEAVE_S": 1.0}
    with Started(supervised("mpiexec", 2, python(ends), constants=limits)) as started:
        code, _, err = started.finish(within_s=60)
        started.gone(within_s=5)
    assert code == 137
    assert f"rank 1 on {HOST} does not answer any more: its guard is stopped" in err
    assert "suspended" not in err


@pytest.mark.long
def test_where_no_rank_can_be_looked_at_the_scheduler_says_whether_all_are_suspended(saved):
    """Another boot id than ours stands for the guards' own hosts, and the launch is asked elsewhere."""
    limits = {"ASK_S": 0.2, "SILENT_S": 2.0, "SUSPENDED_S": 1.0, "LEAVE_S": 1.0}
    limits["suspension.ASK_SCHEDULER_S"] = 0.5
    program = python(saved.program + "time.sleep(12)")
    with Started(supervised("mpiexec", 2, program, constants=limits, elsewhere="True")) as started:
        pids = guards(started, 2).values()
        stop(pids, signal.SIGSTOP)
        assert b"the job is suspended" in started.process.stderr.readline()
        stop(pids, signal.SIGCONT)
        assert started.finish(within_s=60)[0] == 0

    with Started(supervised("mpiexec", 2, program, constants=limits, elsewhere="False")) as started:
        stop(guards(started, 2).values(), signal.SIGSTOP)
        code, _, err = started.finish(within_s=60)
    assert code == 137
    assert "does not answer any more" in err


def test_a_scheduler_that_hangs_is_not_waited_for():
    """The guards would not be asked any more."""
    assert asyncio.run(answer_within(5, lambda: True)) is True
    asked = threading.Event()
    assert asyncio.run(answer_within(0.1, asked.wait)) is False
    asked.set()


def test_sigterm_ends_a_launch_with_a_guard_that_is_stopped(saved):
    program = python(saved.program + "time.sleep(600)")
    command = supervised("mpiexec", 2, program, constants={"LEAVE_S": 1.0}, grace_s=2.0)
    with Started(command) as started:
        os.kill(guards(started, 2)[1], signal.SIGSTOP)
        started.process.terminate()
        code, _, err = started.finish(within_s=30)
        started.gone(within_s=5)
    assert code == 143
    assert "stopped by SIGTERM; rank 1 on" in err and "does not answer any more" in err
    assert saved() == ["0"]  # the other rank was not held up by it


@pytest.mark.skipif(not can_make_hosts(), reason="needs the right to make namespaces")
def test_after_a_nodes_death_its_rank_is_named_and_not_those_that_the_launcher_ended(saved):
    """A node that loses its power says nothing: here its guard is stopped.

    The launcher then kills the other guard, which is known at once, long before the node's silence is.
    """
    argv = by_hand(["alpha", "beta"], python(saved.program + "time.sleep(600)"))
    command = python(
        "import os\nfrom allranks.launch import supervisor\nsupervisor.LEAVE_S = 2.0\n"
        f"outcome = supervisor.run({argv!r}, dict(os.environ), None, world_size=2)\nimport sys\n" + TOLD
    )
    with Started(command) as started:
        found = guards(started, 2)
        os.kill(found[1], signal.SIGSTOP)
        os.kill(found[0], signal.SIGKILL)
        code, _, err = started.finish(within_s=30)
        started.gone(within_s=5)
    assert code == 137
    assert err.splitlines()[-1].startswith("allranks: rank 1 on beta does not answer any more")
    assert "all 2 ranks" not in err


# --- consoles that nobody reads ------------------------------------------------------------------


def test_sigterm_ends_a_launch_whose_output_nobody_reads_and_the_ranks_save_first(saved):
    command = supervised("mpiexec", 2, python(saved.program + FLOODS))
    with Started(command) as started:
        guards(started, 2)
        time.sleep(3)  # by then the pipe and all that is before it are full
        started.process.terminate()
        # stdout stays unread: only that the process ends is waited for
        assert started.process.wait(timeout=TIMEOUT_S) == 85
        started.gone(within_s=5)
    assert saved() == ["0", "1"]


@pytest.mark.long
def test_sigterm_ends_a_launch_whose_terminal_was_stopped_by_ctrl_s(saved):
    keyboard, screen = os.openpty()
    command = supervised("mpiexec", 2, python(saved.program + "time.sleep(3)\n" + FLOODS))
    with Started(command, stdout=screen) as started:
        guards(started, 2)
        os.write(keyboard, b"\x13")  # Ctrl-S
        time.sleep(6)
        started.process.terminate()
        assert started.process.wait(timeout=TIMEOUT_S) == 85
        started.gone(within_s=5)
    os.close(keyboard)
    os.close(screen)
    assert saved() == ["0", "1"]


def test_a_rank_that_fails_is_heard_of_although_the_console_is_full(saved):
    """The other rank floods a pipe that nobody reads; its end does not wait for a reader."""
    fails = "time.sleep(2)\nif os.environ['RANK'] == '1': sys.exit(7)\n"
    command = supervised("mpiexec", 2, python(saved.program + fails + FLOODS))
    with Started(command) as started:
        found = guards(started, 2)
        until(lambda: not processes.children(found[0]), within_s=30)  # rank 0's program is ended
    assert saved() == ["0"]


def test_stderr_is_written_although_stdout_takes_nothing(saved):
    speaks = "time.sleep(3)\nif os.environ['RANK'] == '1': print('still heard', file=sys.stderr)\n"
    flood_first = FLOODS.replace("time.sleep(600)", speaks + "time.sleep(600)")
    with Started(supervised("mpiexec", 2, python(saved.program + flood_first))) as started:
        guards(started, 2)
        stderr = started.process.stderr
        os.set_blocking(stderr.fileno(), False)
        heard: list[bytes] = []

        def is_heard() -> bool:
            heard.append(stderr.read() or b"")
            return b"still heard" in b"".join(heard)

        until(is_heard, 20)


def test_a_reader_that_is_only_slow_gets_all_of_it():
    """A pager: it takes a page, and more much later. Nothing is lost, and the launch ends well."""
    lines = 30_000
    command = supervised("mpiexec", 1, python(f"for i in range({lines}): print(i, 'x' * 900)"))
    with Started(command) as started:
        page = started.lines()
        assert next(page).startswith("0 ")
        time.sleep(3)
        assert [line.split()[0] for line in page] == [str(i) for i in range(1, lines)]
        assert started.finish(within_s=60)[0] == 0


def test_the_writer_keeps_the_order_and_never_waits():
    ours, theirs = os.pipe()
    copy = os.dup(STDOUT)
    os.dup2(theirs, STDOUT)
    try:
        writer = Writer()
        before = time.monotonic()
        for number in range(20_000):
            writer.put(STDOUT, b"%06d" % number + b"x" * 993 + b"\n")
        assert took_at_most(time.monotonic() - before, 5)
        assert writer.is_full
        with os.fdopen(ours, "rb") as lines:
            assert [int(next(lines)[:6]) for _ in range(20_000)] == list(range(20_000))
        writer.close(5)
        assert writer.waiting_bytes == 0
    finally:
        os.dup2(copy, STDOUT)
        os.close(copy)
        os.close(theirs)


# --- file systems that hang ----------------------------------------------------------------------


@pytest.fixture
def hanging_run(tmp_path):
    """A run directory in which rank 1's output file cannot be opened: opening a FIFO waits for a reader."""
    (tmp_path / "output").mkdir()
    os.mkfifo(tmp_path / "output/rank-1.out")
    return tmp_path


def test_a_guard_whose_output_file_hangs_still_ends_its_program(saved, hanging_run):
    program = python(saved.program + "print('lost', flush=True)\ntime.sleep(600)")
    with Started(supervised("mpiexec", 2, program, hanging_run)) as started:
        guards(started, 2)
        time.sleep(1)
        started.process.terminate()
        code, _, err = started.finish(within_s=20)
        started.gone(within_s=5)
    assert code == 85
    assert saved() == ["0", "1"]
    assert "rank-1.out takes nothing any more (does its file system hang?): 5 bytes of the output" in err


def test_a_program_waits_when_its_output_file_takes_nothing_as_it_would_without_a_guard(saved, hanging_run):
    program = python(
        saved.program
        + "time.sleep(2)\nwritten = 0\n"
        + "while os.environ['RANK'] == '1':\n"
        + "    written += os.write(1, b'x' * 65536)\n"
        + "    print('written', written, file=sys.stderr, flush=True)\n"
        + "time.sleep(600)"
    )
    with Started(supervised("mpiexec", 2, program, hanging_run)) as started:
        guards(started, 2)
        time.sleep(6)
        started.process.terminate()
        code, _, err = started.finish(within_s=20)
    assert code == 85
    written = max(int(line.split()[-1]) for line in err.splitlines() if "written" in line)
    assert 1 << 20 <= written < 4 << 20  # the guard keeps a little more than 1 MiB


def test_a_file_that_cannot_be_written_is_named_and_the_output_goes_to_the_console(tmp_path):
    (tmp_path / "output").write_text("in the way of the folder")
    program = python("import os; print('hello from', os.environ['RANK'])")
    with Started(supervised("mpiexec", 2, program, tmp_path)) as started:
        code, out, err = started.finish()
    assert code == 0
    assert "going on without that file" in err
    assert f"[rank 1 on {HOST}] hello from 1\n" in out + err
