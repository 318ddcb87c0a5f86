"""Programs of one's own: the watchdog by heartbeat() and --idle; should_stop() with one answer for all."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import time
import timeit
from pathlib import Path

import pytest

import allranks
from allranks.base.errors import EXIT_REQUEUE, UserError
from allranks.job import pulse
from allranks.job.variables import STACK_AT, STACK_BYTES, STACK_PID
from allranks.launch import idle, options
from allranks.launch.idle import Finding, Kind, Pulse, RankWatch
from helpers import (
    PYTHON,
    ROOT,
    Done,
    Started,
    clean_environment,
    command_line,
    execute,
    only_long,
    serial,
    until,
)

HOST = socket.gethostname()
LAUNCHERS = ["mpiexec", only_long("torchrun")]


def launch(folder: Path, *words: str, **environ: str) -> Done:
    """`allranks launch` without a preflight, to its end."""
    return execute(command(*words), folder, {"PYTHONPATH": f"{ROOT}/src", **environ}, timeout_s=100)


def command(*words: str) -> list[str]:
    return [PYTHON, "-m", "allranks", "launch", "--no-preflight", *words]


def program(folder: Path, text: str) -> list[str]:
    (folder / "program.py").write_text("import os, signal, sys, time, allranks\n" + text)
    return ["--", PYTHON, "program.py"]


# --- what is noticed, and who is to blame ----------------------------------------------------------------


def watch(*pulses: tuple[float, Pulse], since: float = 0.0) -> RankWatch:
    """A rank of which these pulses were heard, each with its time in seconds."""
    made = RankWatch(since)
    for now, one in pulses:
        made.note(one, now)
    return made


def doing(beats: int = 0, within_ms: int = 0, ticks: int = 0, written: int = 0) -> Pulse:
    return Pulse(beats, within_ms, 0, 0, ticks, written)


def test_a_heartbeat_that_does_not_come_is_noticed_and_one_that_is_not_due_is_not():
    beaten = {0: watch((10, doing(beats=3)))}
    assert idle.notice(beaten, None, now=609) is None
    assert idle.notice(beaten, None, now=611) == Finding(Kind.OVERDUE, (0,), 600)
    assert idle.notice(beaten, 30, now=41) == Finding(Kind.OVERDUE, (0,), 30)
    with_limit = {0: watch((10, doing(beats=3, within_ms=5000)))}
    assert idle.notice(with_limit, 30, now=16) == Finding(Kind.OVERDUE, (0,), 5)
    assert idle.notice({0: watch((10, doing(beats=3, within_ms=-1)))}, None, now=1e6) is None
    never = {0: watch((10, doing(ticks=100_000)))}
    assert idle.notice(never, None, now=1e6) is None


def test_computing_and_writing_do_not_stand_for_a_heartbeat():
    """A rank that waits in MPI uses all of its CPU."""
    busy = watch(*((float(now), doing(beats=1, ticks=100 * now, written=now)) for now in range(1, 40)))
    assert idle.notice({0: busy}, 30, now=39) == Finding(Kind.OVERDUE, (0,), 30)


def test_ranks_are_idle_only_if_all_of_them_are():
    asleep = watch((10, doing(ticks=50)), (100, doing(ticks=50)))
    assert idle.notice({0: asleep, 1: asleep}, 60, now=100) == Finding(Kind.IDLE, (0, 1), 60)
    writes = watch((10, doing()), (100, doing(written=1)))
    assert idle.notice({0: asleep, 1: writes}, 60, now=100) is None
    assert idle.notice({0: asleep, 1: asleep}, None, now=1e6) is None
    assert idle.notice({0: asleep}, 60, now=100, last_end_at=50) is None  # it had waited for that rank
    assert idle.notice({0: asleep}, 60, now=111, last_end_at=50) == Finding(Kind.IDLE, (0,), 60)
    has_asked = watch((10, doing(beats=1, within_ms=95_000)))
    assert idle.notice({0: asleep, 1: has_asked}, 60, now=100) is None
    assert idle.notice({0: asleep, 1: has_asked}, 60, now=106) == Finding(Kind.OVERDUE, (1,), 95)
    as_long_as_it_likes = watch((10, doing(beats=1, within_ms=-1)))
    assert idle.notice({0: asleep, 1: as_long_as_it_likes}, 60, now=1e6) is None


@pytest.mark.parametrize(
    ("ticks", "is_idle"),
    [(0, True), (1, True), (9, True), (10, False), (-5, False)],  # a hundred ticks are a second of CPU time
)
def test_less_than_a_hundredth_of_a_cpu_is_nothing(ticks, is_idle):
    before, after = 1000, 1000 + ticks
    seen = watch((90, doing(ticks=before)), (100, doing(ticks=after)), since=0)
    assert (seen.active_at == 90) == is_idle


SLEEPS = 'process 7 (python p.py) is asleep (state S)\n  File "p.py", line 3 in wait\n'
ELSEWHERE = 'process 8 (python p.py) is asleep (state S)\n  File "p.py", line 9 in compute\n'
STOPPED = SLEEPS.replace("is asleep (state S)", "is stopped (state T)")


@pytest.mark.parametrize(
    ("beats", "looks", "expected"),
    [
        ([5, 5, 5], [SLEEPS, ELSEWHERE, SLEEPS], [1]),  # it stands elsewhere
        ([5, 4, 5], [ELSEWHERE, SLEEPS, SLEEPS], [1]),  # the others wait for its next step
        ([5, 5, 5], [ELSEWHERE, SLEEPS, STOPPED], [2]),
        ([5, 5, 5], [SLEEPS, SLEEPS, SLEEPS], [0, 1, 2]),
        ([5, 5, 5], ["", "", ""], [0, 1, 2]),
        ([5, 5], [SLEEPS, ELSEWHERE], [0, 1]),  # of two nobody knows which one is right
    ],
)
def test_the_rank_that_stands_out_is_to_blame(beats, looks, expected):
    ranks = {rank: watch((1, doing(beats=count))) for rank, count in enumerate(beats)}
    finding = Finding(Kind.OVERDUE, tuple(ranks), 10)
    assert idle.to_blame(finding, ranks, dict(enumerate(looks))) == expected


FOREVER = -1


@pytest.mark.parametrize(
    ("late", "others", "looks", "expected"),
    [
        # 0 to 2 wait in their first step for 3, which hangs before it.
        ([1, 1, 1], [doing()], [SLEEPS] * 4, [3]),
        ([1, 2, 1], [doing()], [], [3]),
        # 3 has said that it takes as long as it likes, and the others have gone on without it.
        ([6, 6, 6], [doing(beats=5, within_ms=FOREVER)], [], [3]),
        # All have called as often, and 3 stands elsewhere, in what was to take longer.
        ([5, 5, 5], [doing(beats=5, within_ms=FOREVER)], [SLEEPS, SLEEPS, SLEEPS, ELSEWHERE], [3]),
        # Rank 0 alone calls heartbeat(), and hangs, or waits for one that stands elsewhere.
        ([50], [doing()] * 3, [SLEEPS] * 4, [0]),
        ([50], [doing()] * 3, [SLEEPS, SLEEPS, ELSEWHERE, SLEEPS], [2]),
        # 3 never calls it, which is not the reason of the others' hang after 50 steps.
        ([50, 49, 50], [doing()], [], [1]),
        # One has called it once, the others never: nobody knows whether they ever would.
        ([1], [doing()], [SLEEPS, ELSEWHERE], [0, 1]),
        # A rank that is stopped is to blame, even though it is not late.
        ([1, 1, 1], [doing(beats=9, within_ms=FOREVER)], [SLEEPS, SLEEPS, SLEEPS, STOPPED], [3]),
        # A rank that is behind and ahead of its limit makes the others wait only if it stands still.
        ([5, 5, 5], [doing(beats=5, within_ms=FOREVER)], [SLEEPS] * 4, [0, 1, 2]),
    ],
)
def test_a_rank_that_is_not_late_may_be_to_blame(late, others, looks, expected):
    pulses = [*(doing(beats=count) for count in late), *others]
    ranks = {rank: watch((1, pulse)) for rank, pulse in enumerate(pulses)}
    finding = Finding(Kind.OVERDUE, tuple(range(len(late))), 10)
    assert idle.to_blame(finding, ranks, dict(enumerate(looks))) == expected


def test_a_slow_rank_that_goes_on_is_not_to_blame():
    """Ranks 0 and 1 are late; rank 2 has called heartbeat() less often, and just now."""
    ranks = {0: watch((1, doing(beats=9))), 1: watch((1, doing(beats=8)))}
    ranks[2] = watch((1, doing(beats=3)), (10, doing(beats=4)))
    assert idle.to_blame(Finding(Kind.OVERDUE, (0, 1), 10), ranks, {}) == [1]


def test_ranks_that_are_all_idle_before_the_first_heartbeat_are_all_named():
    ranks = {rank: watch((1, doing())) for rank in range(3)}
    assert idle.to_blame(Finding(Kind.IDLE, (0, 1, 2), 10), ranks, {}) == [0, 1, 2]


def test_those_who_may_be_waited_for_are_looked_at_first():
    ranks = {rank: watch((1, doing(beats=rank < 100))) for rank in range(110)}
    finding = Finding(Kind.OVERDUE, tuple(range(100)), 10)
    order = idle.look_first(finding, ranks)
    assert order[:9] == [*range(100, 108), 0]
    assert sorted(order) == list(range(110))


def test_the_sentence_says_who_is_late_and_who_is_waited_for():
    ranks = {0: watch((1, doing(beats=1))), 1: watch((1, doing(beats=1))), 2: watch((1, doing()))}
    names = {rank: f"{rank} on n{rank}" for rank in ranks}
    late = Finding(Kind.OVERDUE, (0, 1), 0.4)
    assert idle.sentence(late, [0], names, ranks) == (
        "rank 0 on n0 has not called allranks.heartbeat() for 0.4 s, after once: see above where it is, or "
        "give heartbeat(within_s=SECONDS) before what takes longer"
    )
    assert idle.sentence(late, [2], names, ranks) == (
        "ranks 0 on n0, 1 on n1 have not called allranks.heartbeat() for 0.4 s, after once, and seem to "
        "wait for rank 2 on n2, which has never called it: see above where rank 2 on n2 is"
    )
    assert idle.sentence(late, [0, 1, 2], names, ranks).endswith(
        "for 0.4 s, after once, and rank 2 on n2 has never called it: see above where they are"
    )


def test_py_spys_frames_tell_the_place_as_well():
    dump = "process 9 (x)\nThread 9 (idle)\n    elsewhere (idle.py:3)\n    <module> (idle.py:4)\n"
    assert idle.place_of(dump) == "    elsewhere (idle.py:3)\n    <module> (idle.py:4)"


def test_idle_is_not_for_a_training():
    with pytest.raises(UserError, match=r"--idle 5 is for a program after `--`"):
        options.check_idle(5, None)
    options.check_idle(5, ["true"])


# --- without a launcher ----------------------------------------------------------------------------------


def test_importing_allranks_loads_nothing_and_has_the_names():
    code = (
        "import sys; before = set(sys.modules); import allranks\n"
        "print(sorted(n for n in set(sys.modules) - before if n.startswith('allranks')))\n"
        "print(allranks.heartbeat(), allranks.should_stop(), allranks.EXIT_REQUEUE)\n"
        "print('torch' in sys.modules, 'omegaconf' in sys.modules, hasattr(allranks, 'no_such_name'))"
    )
    environ = clean_environment(PYTHONPATH=f"{ROOT}/src")
    done = subprocess.run([PYTHON, "-c", code], env=environ, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines() == ["['allranks']", "None False 85", "False False False"]


def test_a_heartbeat_takes_less_than_two_microseconds():
    allranks.heartbeat()
    repeats = timeit.repeat(allranks.heartbeat, number=1000, repeat=50, timer=time.thread_time)
    assert min(repeats) / 1000 < 2e-6


ALONE = """
for step in range(1, 2000):
    if allranks.should_stop(reserve_s=1):
        sys.exit(f"step {step}" if "say" in sys.argv else allranks.EXIT_REQUEUE)
    if step == 3 and "signal" in sys.argv:
        os.kill(os.getpid(), signal.SIGUSR1)
    time.sleep(0.01)
"""


def test_alone_a_signal_is_seen_at_the_next_call(tmp_path):
    words = program(tmp_path, ALONE)[1:]
    done = execute([*words, "say", "signal"], tmp_path, {"PYTHONPATH": f"{ROOT}/src"})
    assert done.err.endswith("step 4\n")


def test_alone_the_jobs_end_is_seen(tmp_path):
    words = program(tmp_path, ALONE)[1:]
    soon = {"PYTHONPATH": f"{ROOT}/src", "ALLRANKS_DEADLINE": str(int(time.time()) + 2)}
    assert execute(words, tmp_path, soon).code == EXIT_REQUEUE


def test_a_second_ctrl_c_interrupts_and_a_child_by_fork_ends_by_sigterm():
    code = (
        "import allranks, os, signal, sys, time\n"
        "assert not allranks.should_stop()\n"
        "ready, here = os.pipe()\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.write(here, b'.'); time.sleep(60); os._exit(1)\n"
        "os.read(ready, 1)\n"
        "os.kill(child, signal.SIGTERM)\n"
        "assert os.WTERMSIG(os.waitpid(child, 0)[1]) == signal.SIGTERM\n"
        "os.kill(os.getpid(), signal.SIGINT)\n"
        "assert allranks.should_stop() and allranks.should_stop()\n"
        "time.sleep(1.1)\n"
        "try:\n"
        "    os.kill(os.getpid(), signal.SIGINT); time.sleep(5)\n"
        "except KeyboardInterrupt: print('interrupted')\n"
    )
    environ = clean_environment(PYTHONPATH=f"{ROOT}/src")
    done = subprocess.run([PYTHON, "-c", code], env=environ, capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("interrupted\n", "")


def test_the_page_has_the_limits_that_a_heartbeat_gives():
    numbers = pulse._page().numbers
    for within_s, expected in ((None, 0), (2.5, 2500), (0.0001, 1), (math.inf, -1)):
        allranks.heartbeat(within_s)
        assert numbers[pulse.WITHIN_MS] == expected
    for wrong in (0, -1, math.nan):
        with pytest.raises(UserError, match="give a number of seconds above 0"):
            allranks.heartbeat(wrong)


def test_only_a_guards_own_page_is_written(tmp_path):
    """In a container the number of the guard may be that of another process, and its descriptor a file."""
    path = tmp_path / "mine"
    path.write_bytes(b"precious" * 1000)
    code = "import os, sys; open(sys.argv[1], 'rb+'); import allranks; allranks.heartbeat()"
    with path.open("rb+") as file:
        environ = clean_environment(
            PYTHONPATH=f"{ROOT}/src", ALLRANKS_PULSE=f"/proc/{os.getpid()}/fd/{file.fileno()}"
        )
        subprocess.run([PYTHON, "-c", code, str(path)], env=environ, check=True)
    assert path.read_bytes() == b"precious" * 1000


def test_only_a_process_of_the_guards_own_is_asked_for_its_stack(tmp_path):
    """A process that has called heartbeat() and ended has left its number, which another one may have now.

    The signal would kill that one.
    """
    page = tmp_path / "page"
    with subprocess.Popen(["sleep", "60"]) as innocent:
        words = bytearray(STACK_AT + STACK_BYTES)
        words[8 * STACK_PID : 8 * STACK_PID + 8] = innocent.pid.to_bytes(8, sys.byteorder)
        page.write_bytes(words)
        looks = [PYTHON, "-m", "allranks.launch.look", "1", str(page)]
        subprocess.run(["sh", "-c", '"$@"; true', "sh", *looks], stdout=subprocess.DEVNULL, check=True)
        assert innocent.poll() is None
        innocent.kill()


# --- the watchdog under real launchers -------------------------------------------------------------------

# Rank 1 hangs when all ranks have begun: one that came later would have called heartbeat() less often.
HANGS = """
from pathlib import Path
def lost():
    time.sleep(600)
Path("begun-" + os.environ["RANK"]).touch()
while not all(Path(f"begun-{rank}").exists() for rank in range(3)):
    time.sleep(0.05)
for step in range(1000):
    allranks.heartbeat()
    if step == 4 and os.environ["RANK"] == "1":
        lost()
    time.sleep(0.05)
"""


@serial
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_a_rank_without_a_heartbeat_is_named_with_its_stack_and_all_is_ended(tmp_path, launcher):
    words = [*program(tmp_path, HANGS), "\x1b[31mred"]  # the program's command is shown, too
    done = launch(tmp_path, "-n", "3", "--launcher", launcher, "--idle", "2", *words)
    assert done.code == 1
    assert "\x1b" not in done.err
    where, last = done.messages
    assert where.startswith(f"allranks: rank 1 on {HOST}: process ")
    assert re.search(r'File ".*program.py", line 5 in lost', done.err)
    assert f"rank 1 on {HOST} has not called allranks.heartbeat() for 2 s, after 5 times: " in last
    assert not done.left_running


IDLES = """
def elsewhere():
    time.sleep(600)
if os.environ["RANK"] == "2":
    elsewhere()
time.sleep(600)
"""


@serial
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_ranks_that_do_nothing_are_ended_and_the_one_that_stands_elsewhere_is_named(tmp_path, launcher):
    done = launch(tmp_path, "-n", "3", "--launcher", launcher, "--idle", "2", *program(tmp_path, IDLES))
    assert done.code == 1
    where, last = done.messages
    assert where.startswith(f"allranks: rank 2 on {HOST}: process ")
    assert "elsewhere (program.py:4)" in done.err
    assert "no rank has written anything or used its CPU for 2 s (--idle)" in last
    assert f"see above where rank 2 on {HOST} is" in last
    assert not done.left_running


def test_what_linux_tells_is_shown_of_a_program_that_is_no_python(tmp_path):
    done = launch(tmp_path, "-n", "1", "--idle", "1", "--", "sleep", "600")
    assert re.search(rf"rank 0 on {HOST}: process \d+ \(sleep 600\) is asleep \(state S\)", done.err)


ACTIVE = {
    "writes": "for _ in range(12): print('.', file=sys.stderr, flush=True); time.sleep(0.4)",
    "computes": "end = time.time() + 5\nwhile time.time() < end: sum(range(10**5)); time.sleep(0.02)",
    "its child computes": "import subprocess\nsubprocess.run([sys.executable, '-c', "
    "'import time; end = time.time() + 5\\nwhile time.time() < end: sum(range(10**5))'])",
    "beats": "for _ in range(12): allranks.heartbeat(); time.sleep(0.4)\nallranks.heartbeat(float('inf'))",
    "waits as it has said": "allranks.heartbeat(within_s=60); time.sleep(5)",
}


@serial
@pytest.mark.parametrize("what", ["computes", *(only_long(name) for name in ACTIVE if name != "computes")])
def test_a_program_that_does_something_is_left_alone(tmp_path, what):
    """For much longer than its limit, on one of two ranks; the other one sleeps."""
    active = "".join(f"    {line}\n" for line in ACTIVE[what].splitlines())
    code = f"if os.environ['RANK'] == '1':\n{active}else:\n    time.sleep(5)\n"
    launch(tmp_path, "-n", "2", "--idle", "2", *program(tmp_path, code)).ok()


@serial
@pytest.mark.long
def test_a_program_that_is_stopped_is_named(tmp_path):
    turn = "    allranks.heartbeat(); time.sleep(0.05)\n    print(os.getpid(), flush=True)\n"
    code = "for _ in range(1000):\n" + turn
    with Started(command("-n", "2", "--idle", "2", *program(tmp_path, code)), tmp_path) as started:
        ranks = set()
        while len(ranks) < 2:  # a rank is late with a heartbeat only after its first one
            ranks.add(int(started.process.stdout.readline().split()[-1]))
        os.kill(ranks.pop(), signal.SIGSTOP)
        code_, _, err = started.finish(within_s=60)
        started.gone(within_s=5)
    assert code_ == 1
    assert "is stopped (state T)" in err and "has not called allranks.heartbeat()" in err


def is_program(pid: int) -> bool:
    return command_line(pid)[1:2] == ["program.py"]


# --- one answer for all ranks ----------------------------------------------------------------------------

# Each rank goes at a pace of its own, and without a word to the others. It writes down the step at which it
# is told to stop.
STOPS = """
import random
rank = os.environ["RANK"]
random.seed(int(rank) + int(os.environ.get("SEED", 0)))
for step in range(1, 100_000):
    allranks.heartbeat()
    if allranks.should_stop(reserve_s=1):
        with open(f"stopped-{rank}", "w") as file:
            file.write(str(step))
        sys.exit(allranks.EXIT_REQUEUE)
    if step == 1:
        open(f"begun-{rank}", "w").close()  # from the first call of should_stop() on, a signal is heard
    time.sleep(random.random() * 0.02 * (1 + int(rank)))
"""


def stopped_at(folder: Path, ranks: int) -> set[str]:
    """The steps at which the ranks were told to stop."""
    return {(folder / f"stopped-{rank}").read_text() for rank in range(ranks)}


def all_have_begun(folder: Path, ranks: int) -> None:
    until(lambda: all((folder / f"begun-{rank}").exists() for rank in range(ranks)), 60)


@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("signum", [signal.SIGTERM, only_long(signal.SIGINT), only_long(signal.SIGUSR1)])
def test_a_signal_to_the_launch_stops_all_ranks_at_the_same_call(tmp_path, launcher, signum):
    words = ("-n", "3", "--launcher", launcher, *program(tmp_path, STOPS))
    with Started(command(*words), tmp_path) as started:
        all_have_begun(tmp_path, 3)
        started.process.send_signal(signum)
        code, _, err = started.finish(within_s=60)
        started.gone(within_s=5)
    (step,) = stopped_at(tmp_path, 3)
    # torchrun makes an exit code of 1 of each that is not 0, the guards do not.
    assert code == EXIT_REQUEUE, err
    assert f"all ranks stop at call {step} of allranks.should_stop()" in err


@pytest.mark.parametrize("rank", [0, only_long(2)])
def test_a_signal_to_one_rank_stops_all_at_the_same_call(tmp_path, rank):
    with Started(command("-n", "3", *program(tmp_path, STOPS)), tmp_path) as started:
        all_have_begun(tmp_path, 3)
        [pid] = [pid for pid in started.pids() if is_program(pid) and rank_of(pid) == rank]
        os.kill(pid, signal.SIGUSR1)
        code, _, err = started.finish(within_s=60)
    assert code == EXIT_REQUEUE, err
    assert len(stopped_at(tmp_path, 3)) == 1
    assert "SIGUSR1: all ranks stop at call" in err


def rank_of(pid: int) -> int:
    environ = Path(f"/proc/{pid}/environ").read_text().split("\0")
    return int(next(word for word in environ if word.startswith("RANK="))[5:])


def test_the_jobs_end_stops_all_ranks_at_the_same_call(tmp_path):
    soon = str(int(time.time()) + 5)
    done = launch(tmp_path, "-n", "2", *program(tmp_path, STOPS), ALLRANKS_DEADLINE=soon)
    assert done.code == EXIT_REQUEUE
    assert len(stopped_at(tmp_path, 2)) == 1
    assert done.messages[-1].startswith("allranks: the job's end: all ranks stop at call ")


@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_at_any_moment_all_ranks_stop_at_the_same_call(tmp_path, ranks):
    for trial in range(8):
        words = command("-n", str(ranks), *program(tmp_path, STOPS))
        with Started(words, tmp_path, SEED=str(trial)) as started:
            all_have_begun(tmp_path, ranks)
            time.sleep(trial * 0.037)
            started.process.send_signal(signal.SIGTERM)
            code, _, err = started.finish(within_s=60)
        assert code == EXIT_REQUEUE, err
        assert len(stopped_at(tmp_path, ranks)) == 1
        for path in [*tmp_path.glob("stopped-*"), *tmp_path.glob("begun-*")]:
            path.unlink()


def test_a_rank_that_has_ended_is_not_waited_for(tmp_path):
    code = "if os.environ['RANK'] == '1':\n    open('ends', 'w').close()\n    sys.exit(0)\n" + STOPS
    with Started(command("-n", "2", *program(tmp_path, code)), tmp_path) as started:
        all_have_begun(tmp_path, 1)
        until((tmp_path / "ends").exists)
        until(lambda: len([pid for pid in started.pids() if is_program(pid)]) == 1)
        started.process.send_signal(signal.SIGTERM)
        assert started.finish(within_s=60)[0] == EXIT_REQUEUE
    assert (tmp_path / "stopped-0").exists()


def test_the_launch_keeps_how_far_the_program_has_come(tmp_path):
    """The script of a job gives its directory with --run; without calls there is no file."""
    (tmp_path / "run").mkdir()
    launch(tmp_path, "-n", "2", "--run", "run", "--", "true").ok()
    assert not (tmp_path / "run/progress.json").exists()
    code = "for _ in range(5): allranks.heartbeat(); allranks.should_stop()\n"
    for calls in (10, 20):
        launch(tmp_path, "-n", "2", "--run", "run", *program(tmp_path, code)).ok()
        assert json.loads((tmp_path / "run/progress.json").read_text()) == {"calls": calls}


# --- whatever is killed, whenever ------------------------------------------------------------------------


@serial
@pytest.mark.long
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("killed", ["program", "guard", "launch"])
def test_whatever_is_killed_while_the_ranks_agree_nothing_is_left(tmp_path, ranks, killed):
    """Just before, while and after a SIGTERM has the ranks look for the call at which they stop."""
    for trial in range(6):
        with Started(command("-n", str(ranks), *program(tmp_path, STOPS)), tmp_path) as started:
            all_have_begun(tmp_path, ranks)
            victims = {"program": [], "guard": [], "launch": [started.process.pid]}
            for pid in started.pids():
                words = command_line(pid)
                if "allranks.launch.guard" in words and "-n" not in words:
                    victims["guard"].append(pid)
                elif is_program(pid):
                    victims["program"].append(pid)
            started.process.send_signal(signal.SIGTERM)
            time.sleep(0.01 * trial)
            with contextlib.suppress(ProcessLookupError):  # it had already stopped
                os.kill(victims[killed][-1], signal.SIGKILL)
            code, _, _ = started.finish(within_s=60)
            started.gone(within_s=5)
        # 143: the launch was to end by SIGTERM, and a rank has not stopped in order.
        assert code in ((-signal.SIGKILL, EXIT_REQUEUE) if killed == "launch" else (EXIT_REQUEUE, 143)), (
            code
        )
        stopped = {path.read_text() for path in tmp_path.glob("stopped-*")}
        assert len(stopped) <= 1
        for path in [*tmp_path.glob("stopped-*"), *tmp_path.glob("begun-*")]:
            path.unlink()
