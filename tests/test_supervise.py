"""Ranks under real launchers: seen, named, and never left behind."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import re
import select
import signal
import socket
import struct
import subprocess
import sys
import termios
import time

import pytest

from allranks.base import links, processes
from allranks.base.signals import TWICE_S
from allranks.job import variables
from allranks.launch import supervisor
from helpers import GUARD, TIMEOUT_S, Started, only_long, serial
from launching import BIN, TOLD, python, supervised

pytestmark = serial  # most of these tests say within how many seconds all ranks are down
LAUNCHERS = ["mpiexec", "torchrun"]
HOST = socket.gethostname()

# Each rank says who and where it is, has a child in a session of its own, and waits to be ended.
WAIT = """
import os, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; "
"time.sleep(60)"], start_new_session=True)
print("pids", os.environ["RANK"], os.getpid(), child.pid, flush=True)
time.sleep(60)
"""


IGNORES = "import signal\nfor number in (2, 15): signal.signal(number, signal.SIG_IGN)\n"


@pytest.fixture
def start():
    """Starts supervised ranks, and ends whatever is left of them after the test."""
    started: list[Started] = []

    def start(name, ranks, code, run_dir=None, environ=None, **more):
        command = supervised(name, ranks, python(code), run_dir, **more)
        started.append(Started(command, **(environ or {})))
        return started[-1]

    yield start
    for one in started:
        one.end()


def wait_for_ranks(started: Started, ranks: int) -> tuple[dict[int, int], set[int]]:
    """Pid of each rank's program, and the pids of their children."""
    found, children = {}, set()
    while len(found) < ranks:
        line = started.process.stdout.readline().decode()
        assert line, "ended early"
        if match := re.search(r"pids (\d+) (\d+) (\d+)", line):
            found[int(match[1])] = int(match[2])
            children.add(int(match[3]))
    return found, children


def alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:  # noqa: PTH123
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("name", LAUNCHERS)
def test_every_program_gets_its_rank_on_every_launcher(start, tmp_path, name):
    code = (
        "import json, os, socket\n"
        "e = os.environ\n"
        f"p = {str(tmp_path)!r} + '/' + e['RANK']\n"
        "names = 'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT'.split()\n"
        "e2 = {n: e[n] for n in names} | {'private': [n for n in e if n in "
        f"{variables.PRIVATE!r}]}}\n"
        "json.dump(e2, open(p, 'w'))"
    )
    # a MASTER_PORT left over in the shell must not win
    code_, out, err = start(name, 3, code, environ={"MASTER_PORT": "1", "MASTER_ADDR": "x"}).finish()
    assert (code_, out) == (0, ""), err
    seen = [json.loads((tmp_path / str(r)).read_text()) for r in range(3)]
    for r, got in enumerate(seen):
        assert (got["RANK"], got["LOCAL_RANK"]) == (str(r), str(r))
        assert (got["WORLD_SIZE"], got["LOCAL_WORLD_SIZE"]) == ("3", "3")
        assert got["private"] == []
    (address,) = {v["MASTER_ADDR"] for v in seen}
    (port,) = {v["MASTER_PORT"] for v in seen}
    assert socket.gethostbyname(address).startswith("127.")
    assert int(port) > 1024


@pytest.mark.parametrize("name", ["mpiexec", only_long("torchrun")])
def test_the_first_rank_that_fails_is_named_and_gives_the_exit_code(start, name):
    code = (
        "import os, sys, time\n"
        "if os.environ['RANK'] == '2':\n"
        "    print('last words', file=sys.stderr); sys.exit(41)\n"
        "time.sleep(60)"
    )
    started = start(name, 4, code)
    got, out, err = started.finish(within_s=15)
    assert got == 41, err
    assert f"[rank 2 on {HOST}] last words\n" in err
    assert err.endswith(
        f"allranks: rank 2 on {HOST} ended with exit code 41, the first of 4 ranks to fail; "
        "the others have been ended.\n"
    )
    for banner in ("BAD TERMINATION", "ChildFailedError", "Traceback", "exitcode"):
        assert banner not in err
    assert out == ""
    started.gone(within_s=1)


@pytest.mark.parametrize("name", ["mpiexec", only_long("torchrun")])
def test_kill_9_of_a_rank_is_named_and_all_are_down_in_2_s_with_their_children(start, name):
    started = start(name, 3, WAIT)
    ranks, children = wait_for_ranks(started, 3)
    os.kill(ranks[1], signal.SIGKILL)
    started.gone(within_s=2)
    got, _, err = started.finish()
    assert got == 128 + 9
    assert f"rank 1 on {HOST} was killed by SIGKILL" in err.splitlines()[-1]
    assert "BAD TERMINATION" not in err and "Traceback" not in err
    assert not any(map(alive, [*ranks.values(), *children]))


@pytest.mark.parametrize("name", ["mpiexec", only_long("torchrun")])
def test_kill_9_of_the_supervisor_leaves_nobody_after_5_s(start, name):
    started = start(name, 2, WAIT)
    ranks, children = wait_for_ranks(started, 2)
    started.process.kill()
    started.gone(within_s=5)
    assert not any(map(alive, [*ranks.values(), *children]))


def test_kill_9_of_the_launcher_ends_every_rank(start):
    started = start("mpiexec", 2, WAIT)
    wait_for_ranks(started, 2)
    (launcher,) = processes.children(started.process.pid)
    os.kill(launcher, signal.SIGKILL)
    got, _, err = started.finish(within_s=10)
    assert got not in (0, 2), err
    started.gone(within_s=1)
    assert err.splitlines()[-1].startswith("allranks: ")


def test_kill_9_of_a_guard_is_noticed_and_its_program_ended(start):
    started = start("mpiexec", 3, WAIT)
    ranks, _ = wait_for_ranks(started, 3)
    with open(f"/proc/{ranks[2]}/stat") as file:  # noqa: PTH123
        guard = int(file.read().rpartition(")")[2].split()[1])
    os.kill(guard, signal.SIGKILL)
    got, _, err = started.finish(within_s=10)
    assert got == 137
    assert f"rank 2 on {HOST} vanished" in err
    started.gone(within_s=1)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_ctrl_c_and_sigterm_end_every_rank(start, signum, code):
    started = start("mpiexec", 2, WAIT)
    ranks, children = wait_for_ranks(started, 2)
    started.process.send_signal(signum)
    got, _, err = started.finish(within_s=10)
    assert got == code
    assert err.endswith(f"allranks: stopped by {signal.Signals(signum).name}.\n")
    # Ctrl-C is Python's KeyboardInterrupt, as it is without a launcher
    assert err.count("KeyboardInterrupt") == (2 if signum == signal.SIGINT else 0)
    started.gone(within_s=1)
    assert not any(map(alive, [*ranks.values(), *children]))


def test_a_second_ctrl_c_does_not_wait_for_ranks_that_ignore_the_first(start):
    started = start("mpiexec", 2, IGNORES + WAIT)
    wait_for_ranks(started, 2)
    started.process.send_signal(signal.SIGINT)
    time.sleep(TWICE_S + 1)  # what comes less than TWICE_S after the first was heard is the same Ctrl-C
    assert started.process.poll() is None
    started.process.send_signal(signal.SIGINT)
    assert started.finish(within_s=3)[0] == 130
    started.gone(within_s=1)


def test_ranks_that_stop_in_order_on_a_signal_are_waited_for_and_asked_to_go_on_later(start, tmp_path):
    """A terminal that is closed sends SIGHUP twice, and a wrapper SIGTERM: each is one request."""
    # rank 0 saves for a second after the others have gone with code 85: it must not be cut short
    code = (
        "import os, signal, sys, time\n"
        "def stop(*_):\n"
        "    if os.environ['RANK'] == '0':\n"
        f"        time.sleep(1); open({str(tmp_path / 'saved')!r}, 'w').write('whole')\n"
        "    os._exit(85)\n"
        "signal.signal(signal.SIGTERM, stop)\n" + WAIT
    )
    started = start("mpiexec", 3, code)
    wait_for_ranks(started, 3)
    for signum in (signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGTERM):
        started.process.send_signal(signum)
        time.sleep(0.005)
    got, _, err = started.finish(within_s=10)
    assert (got, err) == (85, "")
    assert (tmp_path / "saved").read_text() == "whole"


def test_sigusr1_reaches_every_rank(start):
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGUSR1, lambda *_: os._exit(0))\n"
        "print('pids', os.environ['RANK'], 0, 0, flush=True)\n"
        "time.sleep(60)"
    )
    started = start("mpiexec", 3, code)
    wait_for_ranks(started, 3)
    started.process.send_signal(signal.SIGUSR1)
    assert started.finish(within_s=10)[0] == 0


def test_lines_stay_whole_while_all_ranks_write(start):
    # pieces of lines, written apart, by all ranks at once; the last line has no end
    code = (
        "import os, sys, time\n"
        "r = os.environ['RANK']\n"
        "for i in range(200):\n"
        "    for piece in (f'<{r}', f':{i}:', 'x' * 500 + '>', '\\n'):\n"
        "        os.write(2, piece.encode())\n"
        "os.write(2, f'<{r}:end'.encode()); os._exit(0)"
    )
    got, _, err = start("mpiexec", 4, code).finish()
    assert got == 0
    lines = err.splitlines()
    for r in range(4):
        prefix = "" if r == 0 else f"[rank {r} on {HOST}] "
        mine = [line for line in lines if f"<{r}:" in line]
        expected = [f"{prefix}<{r}:{i}:{'x' * 500}>" for i in range(200)] + [f"{prefix}<{r}:end"]
        assert mine == expected


def test_the_last_words_of_dying_ranks_arrive(start):
    code = (
        "import os, sys\n"
        "sys.stdout.write('o' * 50000 + '\\n'); sys.stderr.write('e' * 50000 + '\\n')\n"
        "os.kill(os.getpid(), 11 if os.environ['RANK'] == '1' else 0)"
    )
    got, out, err = start("mpiexec", 2, code).finish()
    assert got == 128 + 11
    assert sorted(out.splitlines()) == [f"[rank 1 on {HOST}] " + "o" * 50000, "o" * 50000]
    assert f"[rank 1 on {HOST}] " + "e" * 50000 + "\n" in err
    assert f"rank 1 on {HOST} was killed by SIGSEGV" in err


def test_rank_0_is_live_even_within_a_line(start):
    code = (
        "import os, time\n"
        "if os.environ['RANK'] == '0':\n"
        "    print('step 1 of 2', end='', flush=True); time.sleep(60)"
    )
    started = start("mpiexec", 2, code)
    os.set_blocking(started.process.stdout.fileno(), True)
    assert os.read(started.process.stdout.fileno(), 100) == b"step 1 of 2"


# rank 0 alone: the other's lines would fill stderr, which nobody reads until the first line came
FLOOD = """
import os, time
while os.environ["RANK"] == "0":
    os.write(1, b"x" * 99 + b"\\n")
time.sleep(60)
"""


def test_when_nobody_reads_the_output_the_ranks_end(start):
    started = start("mpiexec", 2, FLOOD)
    assert started.process.stdout.readline() == b"x" * 99 + b"\n"
    started.process.stdout.close()
    started.process.stdout = None
    err = started.process.stderr.read()
    assert started.process.wait(timeout=TIMEOUT_S) == 128 + signal.SIGPIPE
    assert b"vanished" not in err
    started.gone(within_s=1)


def test_ranks_have_time_to_save_although_ctrl_c_has_ended_the_reader_as_well(start, tmp_path):
    """As of `allranks launch ... | tee log` at a terminal: each of the two gets the signal."""
    code = (
        "import os, signal, time\n"
        "def stop(*_):\n"
        "    os.write(1, b'stopping\\n')\n"  # which nobody reads
        f"    time.sleep(2); open({str(tmp_path / 'saved')!r}, 'w').write('whole'); os._exit(85)\n"
        "signal.signal(signal.SIGTERM, stop)\n" + WAIT
    )
    started = start("mpiexec", 1, code, interrupts=False)
    wait_for_ranks(started, 1)
    started.process.stdout.close()
    started.process.stdout = None
    started.process.send_signal(signal.SIGINT)
    assert started.process.wait(timeout=TIMEOUT_S) == 85
    assert (tmp_path / "saved").read_text() == "whole"


def test_a_pipe_that_does_not_wait_loses_nothing():
    ours, theirs = os.pipe()
    os.set_blocking(theirs, False)
    command = supervised("mpiexec", 1, python("for _ in range(5000): print('x' * 99)"))
    with Started(command, stdout=theirs) as started:
        os.close(theirs)
        time.sleep(2)  # by then the pipe is full
        with os.fdopen(ours) as lines:
            assert sum(line == "x" * 99 + "\n" for line in lines) == 5000
        assert started.finish(within_s=10)[0] == 0


def test_a_full_disk_under_the_output_is_no_reason_to_end(tmp_path):
    told = f"for _ in range(1000): print('x' * 99)\nopen({str(tmp_path / 'there')!r}, 'w').close()"
    command = supervised("mpiexec", 1, python(told))
    with (
        open("/dev/full", "wb") as full,  # noqa: PTH123
        Started(command, stdout=full.fileno()) as started,
    ):
        got, _, err = started.finish(within_s=10)
        started.gone(within_s=1)
    assert (got, err) == (0, "")
    assert (tmp_path / "there").exists()


def test_a_launcher_that_lingers_after_the_last_rank_is_no_failure(tmp_path):
    slow = tmp_path / "mpiexec"
    slow.write_text(f'#!/bin/sh\n"{BIN}/mpiexec" "$@"\nsleep 60\n')
    slow.chmod(0o755)
    words = [str(slow), "-n", "2", *GUARD, *python("pass")]
    code = (
        "import os, sys\nfrom allranks.launch import supervisor\nsupervisor.LEAVE_S = 1\n"
        f"outcome = supervisor.run({words!r}, dict(os.environ), None, world_size=2)\n"
    )
    with Started(python(code + TOLD)) as started:
        got, _, err = started.finish(within_s=20)
        started.gone(within_s=1)
    assert (got, err) == (0, "allranks: mpiexec had not ended after its last rank, and was killed\n")


def test_other_ranks_stdout_goes_to_their_files(start, tmp_path):
    code = "import os; rank = os.environ['RANK']; rank == '3' or print('hello from', rank)"
    got, out, err = start("mpiexec", 4, code, run_dir=tmp_path).finish()
    assert (got, out, err) == (0, "hello from 0\n", "")
    files = {path.name: path.read_text() for path in (tmp_path / "output").iterdir()}
    assert files == {"rank-1.out": "hello from 1\n", "rank-2.out": "hello from 2\n"}


def test_rank_0_sees_a_terminal_where_the_user_has_one():
    code = "import os, sys; print(os.environ['RANK'], sys.stdout.isatty(), sys.stderr.isatty())"
    outer, inner = os.openpty()
    command = supervised("mpiexec", 2, python(code))
    with Started(command, stdout=inner) as started:
        got, _, err = started.finish()
        assert (got, err) == (0, "")
        # stdout ends at the terminal, stderr in a pipe
        lines = os.read(outer, 1000).decode().splitlines()
        assert sorted(lines) == ["0 True False", f"[rank 1 on {HOST}] 1 False False"]
        os.close(inner)
        os.close(outer)


def test_without_a_run_directory_all_stdout_goes_to_stdout_and_all_stderr_to_stderr(start):
    code = "import os, sys; print('o', os.environ['RANK']); print('e', os.environ['RANK'], file=sys.stderr)"
    got, out, err = start("mpiexec", 3, code).finish()
    assert got == 0
    for kind, text in (("o", out), ("e", err)):
        named = [f"[rank {r} on {HOST}] {kind} {r}" for r in (1, 2)]
        assert sorted(text.splitlines()) == sorted([f"{kind} 0", *named])


def test_a_line_of_three_megabytes_is_one_line(start):
    """Of any rank, with others that write meanwhile: a JSON object, say, that another program reads."""
    code = (
        "import os, sys\n"
        "if os.environ['RANK'] == '2':\n"
        "    for i in range(200): print('short', i, flush=True)\n"
        "else: print('x' * 3_000_000 + '.')"
    )
    got, out, _ = start("mpiexec", 3, code).finish(within_s=60)
    assert got == 0
    long = "x" * 3_000_000 + "."
    lines = out.splitlines()
    assert f"[rank 1 on {HOST}] {long}" in lines
    assert long in lines
    assert len(lines) == 202


# --- stdin ---------------------------------------------------------------------------------------

READS = "import os, sys; print(os.environ['RANK'], len(sys.stdin.read()))"


def with_stdin(command: list[str], stdin: bytes) -> tuple[int, list[str]]:
    """(exit code, sorted lines of stdout) of a command that is given this stdin through a pipe."""
    done = subprocess.run(command, input=stdin, capture_output=True, timeout=TIMEOUT_S, check=False)
    return done.returncode, sorted(done.stdout.decode().splitlines())


@pytest.mark.parametrize(
    ("size", "name"),
    [
        (size, name) if name == "mpiexec" else only_long(size, name)
        for size in (0, 5, 300_000)
        for name in LAUNCHERS
    ],
)
def test_stdin_goes_to_rank_0_to_its_end(name, size):
    command = supervised(name, 2, python(READS))
    assert with_stdin(command, b"x" * size) == (0, [f"0 {size}", f"[rank 1 on {HOST}] 1 0"])


def test_a_debugger_works_in_rank_0():
    code = "import os\nanswer = 42\nif os.environ['RANK'] == '0': breakpoint()\nprint('goes on')"
    code_, lines = with_stdin(supervised("mpiexec", 2, python(code)), b"p answer\ncontinue\n")
    assert code_ == 0
    # Python's debugger prompts on stdout, without a line's end
    assert "(Pdb) 42" in lines
    assert lines[-1] == f"[rank 1 on {HOST}] goes on"
    assert any(line.endswith("goes on") and not line.startswith("[") for line in lines)


def test_stdin_may_be_a_file_nothing_or_closed(tmp_path):
    (tmp_path / "five").write_text("12345")
    command = supervised("mpiexec", 1, python(READS))
    for redirect, size in ((f"<{tmp_path}/five", 5), ("</dev/null", 0), ("<&-", 0)):
        script = ["sh", "-c", f'"$@" {redirect}', "sh", *command]
        assert with_stdin(script, b"unread") == (0, [f"0 {size}"]), redirect


def test_a_program_that_reads_no_stdin_is_not_held_up_by_it():
    """Nor does the launch read what nobody takes: all but one piece is left for the next command."""
    command = supervised("mpiexec", 1, python("import os; os.close(0); print('done')"))
    ours, theirs = os.pipe()
    os.write(theirs, b"x" * 50_000)
    with subprocess.Popen(command, stdin=ours, stdout=subprocess.PIPE) as process:
        assert process.communicate(timeout=TIMEOUT_S)[0] == b"done\n"
        assert process.returncode == 0
    os.close(ours)
    os.close(theirs)


# --- at a terminal -------------------------------------------------------------------------------

# Says how large the terminal is, then what is typed, then waits for Ctrl-C.
AT_TERMINAL = """
import os, signal, sys, time
def say_size(*_): print("size", *os.get_terminal_size(1), flush=True)
if os.environ["RANK"] == "0":
    signal.signal(signal.SIGWINCH, say_size)
    say_size()
    print("typed", input("? "), flush=True)
try:
    print("waits", os.environ["RANK"], flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted", os.environ["RANK"], flush=True)
    sys.exit(3)
"""


def test_at_a_terminal_size_keys_and_ctrl_c_reach_the_program():
    screen = Screen(supervised("mpiexec", 2, python(AT_TERMINAL)), rows=33, columns=77)
    try:
        screen.until("size 77 33")
        screen.until("? ")
        screen.type("hello\n")
        screen.until("typed hello")
        screen.resize(rows=40, columns=99)
        screen.until("size 99 40")
        screen.until(f"[rank 1 on {HOST}] waits 1")  # it may have started later
        screen.type("\x03")
        screen.until("stopped by SIGINT")
        assert screen.ended() == 130
        assert "interrupted 0" in screen.shown
        assert f"[rank 1 on {HOST}] interrupted 1" in screen.shown
    finally:
        screen.close()


class Screen:
    """A command at a terminal of its own: what it shows, and keys for it."""

    def __init__(self, command: list[str], rows: int, columns: int) -> None:
        self.shown = ""
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            fcntl.ioctl(0, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
            os.execv(command[0], command)

    def resize(self, rows: int, columns: int) -> None:
        fcntl.ioctl(self.fd, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))

    def type(self, keys: str) -> None:
        os.write(self.fd, keys.encode())

    def until(self, words: str, within_s: float = 60) -> None:
        """Waits until the words are shown."""
        deadline = time.monotonic() + within_s
        while words not in self.shown:
            assert time.monotonic() < deadline, self.shown
            if select.select([self.fd], [], [], 0.2)[0]:
                self.shown += os.read(self.fd, 65536).decode()

    def ended(self) -> int:
        status = os.waitpid(self.pid, 0)[1]
        self.pid = 0  # another process may have the number from now on
        return os.waitstatus_to_exitcode(status)

    def close(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        os.close(self.fd)


def test_in_the_background_of_a_terminal_stdin_is_left_to_the_shell():
    """Reading there would stop the launch: the system sends SIGTTIN to who reads in the background."""
    command = supervised("mpiexec", 1, python("import time; time.sleep(3); print('well')"))
    shell = ["/bin/sh", "-c", 'set -m; "$@" & wait', "sh", *command]
    screen = Screen(shell, rows=24, columns=80)
    try:
        time.sleep(1)
        screen.type("a line for the shell\n")
        screen.until("well")
        assert screen.ended() == 0
    finally:
        screen.close()


# --- signals -------------------------------------------------------------------------------------


def test_a_program_that_goes_on_after_ctrl_c_gets_sigterm_before_it_is_killed(start):
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('terminated', flush=True), os._exit(85)))\n" + WAIT
    )
    started = start("mpiexec", 1, code, grace_s=4.0)
    wait_for_ranks(started, 1)
    started.process.send_signal(signal.SIGINT)
    got, out, _ = started.finish(within_s=20)
    assert (got, out) == (85, "terminated\n")


@pytest.mark.parametrize(
    ("signum", "after_s", "expected"),
    [
        (signal.SIGINT, TWICE_S + 0.1, True),
        (signal.SIGTERM, TWICE_S + 0.1, True),
        (signal.SIGINT, 0.005, False),  # the same Ctrl-C
        (signal.SIGTERM, 0.005, False),  # passed on by a wrapper
        (signal.SIGHUP, 60.0, False),  # a terminal says nothing about time
    ],
)
def test_which_further_signal_ends_all_ranks_at_once(signum, after_s, expected):
    assert supervisor.is_impatient(signum, after_s) is expected


@pytest.mark.parametrize("signum", [signal.SIGHUP, only_long(signal.SIGINT)])
def test_a_signal_that_is_ignored_from_the_start_ends_nothing(signum):
    """`nohup` wants a command to outlive the terminal, and a script's background outlives Ctrl-C."""
    program = python("import time; print('here', flush=True); time.sleep(3); print('to the end')")
    ignoring = ["sh", "-c", f'trap "" {signal.Signals(signum).name[3:]}; exec "$@"', "sh"]
    with Started([*ignoring, *supervised("mpiexec", 1, program)]) as started:
        assert next(started.lines()) == "here"
        started.process.send_signal(signum)
        assert list(started.lines()) == ["to the end"]
        assert started.process.wait(timeout=TIMEOUT_S) == 0


@pytest.mark.long
def test_ranks_that_take_longer_than_ten_seconds_to_save_have_the_grace_that_they_need(start):
    """And the user is told why nothing seems to happen."""
    code = (
        "import os, signal, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: (time.sleep(12), os._exit(85)))\n" + WAIT
    )
    started = start("mpiexec", 2, code, grace_s=60.0)
    wait_for_ranks(started, 2)
    started.process.terminate()
    got, _, err = started.finish(within_s=60)
    assert got == 85
    assert err == (
        "allranks: SIGTERM: the ranks have up to 60 s to save and to end. Another Ctrl-C or SIGTERM ends "
        "them at once.\n"
    )


def test_what_the_launcher_says_is_shown_where_no_rank_explains_it():
    command = python(
        "import os, sys\nfrom allranks.launch import supervisor\n"
        f"argv = [{sys.executable!r}, '-c', 'import sys; print(\"no such queue\"); sys.exit(9)']\n"
        "outcome = supervisor.run(argv, dict(os.environ), None, world_size=2)\n" + TOLD
    )
    with Started(command) as started:
        got, _, err = started.finish()
    assert got == 9
    assert err.splitlines()[0] == "no such queue"
    assert "ended with exit code 9; 0 of 2 ranks had started" in err


def by_shell(script: str, ranks: int, **more: object) -> list[str]:
    """Supervised ranks that a shell script starts; its "$@" is the wrapper with a program."""
    argv = ["sh", "-c", script, "sh", *GUARD, *python("import time; time.sleep(30)")]
    return python(
        "import os, sys\nfrom allranks.launch import supervisor\n"
        f"outcome = supervisor.run({argv!r}, dict(os.environ), None, world_size={ranks}, **{more!r})\n"
        + TOLD
    )


@pytest.mark.parametrize(
    ("script", "ranks", "message"),
    [
        (  # localhost stands for a host that does not come
            'RANK=0 WORLD_SIZE=3 "$@" & RANK=1 WORLD_SIZE=3 "$@" & wait', 3,
            "1 of 3 ranks (2) did not start within 5 s. None came from localhost: look "
            "whether they are up",
        ),
        ('RANK=0 WORLD_SIZE=2 "$@" & wait', 3, "was started as one of 2, but 3 were asked for"),
        ('RANK=1 WORLD_SIZE=2 "$@" & RANK=1 WORLD_SIZE=2 "$@" & wait', 2, "a second rank 1 came "
        "from"),
        # nobody's variables: each would be a run of its own
        ('"$@" & "$@" & wait', 2, f"rank 0 on {HOST} was started as one of 1, but 2 were asked "
        f"for"),
    ],
    ids=["missing", "other-size", "twice", "solo"],
)  # fmt: skip
def test_ranks_that_do_not_make_one_run_are_named_in_time(script, ranks, message):
    with Started(by_shell(script, ranks, start_s=5, hosts=[HOST, "localhost"])) as started:
        got, _, err = started.finish(within_s=12)
        started.gone(within_s=1)
    assert got == 1
    assert message in err.splitlines()[-1]


def test_nobody_without_the_secret_is_listened_to(tmp_path):
    """A stranger's hello, garbage and silence do not disturb the ranks."""
    go = tmp_path / "go"
    code = f"import os, time\nwhile not os.path.exists({str(go)!r}): time.sleep(0.01)\nprint('fine')"
    inner = [*GUARD, *python(code)]
    command = python(
        "import os, sys\nfrom allranks.launch import supervisor\n"
        f"argv = ['sh', '-c', 'echo $ALLRANKS_SUPERVISOR >&2; exec \"$@\"', 'sh', *{inner!r}]\n"
        "outcome = supervisor.run(argv, dict(os.environ), None, world_size=1)\n" + TOLD
    )
    with Started(command) as started:
        host, _, port = started.process.stderr.readline().decode().strip().rpartition(":")
        assert host == "127.0.0.1"
        hello = {
            "secret": "guess",
            "rank": 0,
            "host": "x",
            "launcher": "x",
            "world_size": 1,
            "port": 1,
        }
        sent = []
        for data in (
            links.message(**hello),
            links.message(code=3),
            b"GET / HTTP/1.1\r\n\r\n",
            b"\xff" * 9 + b"\n",
            links.message(**{**hello, "secret": "gu\xe9ss\ud800"}),
            b"[" * 99_999 + b"\n",
        ):
            link = socket.create_connection((host, int(port)), timeout=5)
            link.sendall(data)
            sent.append(link)
        assert [link.recv(100) for link in sent] == [b""] * 6
        with socket.create_connection((host, int(port)), timeout=5):
            go.touch()
            assert started.finish(within_s=10) == (0, "fine\n", "")
        for link in sent:
            link.close()


def test_many_silent_strangers_do_not_keep_the_ranks_out(tmp_path):
    """A few at a time are listened to: else they would take all descriptors that the ranks need."""
    come = "import os, sys, time\nwhile not os.path.exists(sys.argv[1]): time.sleep(0.01)\n"
    come += "os.execvp(sys.argv[2], sys.argv[2:])"
    go = tmp_path / "go"
    inner = [*python(come), str(go), *GUARD, *python("print('fine')")]
    command = python(
        "import os, sys\nfrom allranks.launch import arrivals, supervisor\n"
        "arrivals.HELLO_S = 600\n"  # a stranger is sent away for the others, not for its silence
        f"argv = ['sh', '-c', 'echo $ALLRANKS_SUPERVISOR >&2; exec \"$@\"', 'sh', *{inner!r}]\n"
        "outcome = supervisor.run(argv, dict(os.environ), None, world_size=1)\n" + TOLD
    )
    with Started(command) as started:
        host, _, port = started.process.stderr.readline().decode().strip().rpartition(":")
        strangers = [socket.create_connection((host, int(port)), timeout=60) for _ in range(30)]
        for stranger in strangers[: 30 - 1 - links.SPARE]:
            assert stranger.recv(100) == b""
        go.touch()
        assert started.finish(within_s=10) == (0, "fine\n", "")
        for stranger in strangers:
            stranger.close()
