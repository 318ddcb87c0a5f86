"""The ground floor: processes are told apart, their ends put into words, votes counted, ports chosen."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from allranks.base import files, processes
from allranks.base.agreement import majority
from allranks.base.errors import UserError, flush_console
from allranks.base.processes import (
    ProcessIdentity,
    cpu_affinity,
    cpu_quota,
    how_it_ended,
    process_stat,
)
from allranks.base.text import printable, table
from allranks.job.variables import PORTS, port_for
from helpers import PYTHON, TRAIN, execute

# Prints its identity and waits. Its name in /proc/PID/stat holds a parenthesis and a byte that is no UTF-8.
CHILD = r"""
import ctypes, json, sys
from allranks.base.processes import ProcessIdentity
ctypes.CDLL(None).prctl(15, b"a) S \xff", 0, 0, 0)  # PR_SET_NAME
print(json.dumps(ProcessIdentity.of_this_process().to_json()), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def child():
    """A process that waits, and the identity that it gave itself."""
    with subprocess.Popen(
        [PYTHON, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process, ProcessIdentity.from_json(json.loads(process.stdout.readline()))
        process.kill()


def until_ended(pid: int) -> None:
    while (stat := process_stat(pid)) and stat.state != "Z":
        time.sleep(0.01)


def test_a_process_is_the_same_to_itself_and_to_others(child):
    process, identity = child
    here = ProcessIdentity.of_this_process()
    assert identity.pid == process.pid
    assert identity.is_visible_from(here)
    assert here.is_visible_from(identity)
    assert not identity.has_ended(here)
    stat = process_stat(process.pid)
    assert stat.started_ticks == identity.started_ticks
    assert stat.state in "RSD"  # just after it has printed, or asleep already
    assert ProcessIdentity.from_json(identity.to_json()) == identity


def test_an_ended_process_is_known_before_and_after_its_parent_has_waited_for_it(child):
    process, identity = child
    here = ProcessIdentity.of_this_process()
    process.kill()
    until_ended(process.pid)
    status = process_stat(process.pid).wait_status
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert identity.has_ended(here)
    process.wait()
    assert process_stat(process.pid) is None
    assert identity.has_ended(here)


def test_another_process_with_the_same_number_is_not_taken_for_the_one_that_ended(child):
    _, identity = child
    earlier = identity._replace(started_ticks=identity.started_ticks - 1)
    assert earlier.has_ended(here=identity)


@pytest.mark.parametrize(
    "change",
    [
        {"boot_id": "another host"},
        {"boot_id": None},
        {"pid_namespace": "pid:[1]"},
        {"pid_namespace": None},
        {"pid": None},
        {"pid": 0},
        {"pid": -1},
        {"pid": 1 << 31},
    ],
    ids=str,
)
def test_nobody_is_said_to_have_ended_who_cannot_be_seen_from_here(change):
    gone = {"pid": 2**22 + 1, "started_ticks": 1}  # above the highest number that Linux gives
    here = ProcessIdentity.of_this_process()
    assert here._replace(**gone).has_ended(here)
    assert not here._replace(**{**gone, **change}).has_ended(here)


def test_ticks_of_another_time_namespace_are_not_compared():
    here = ProcessIdentity.of_this_process()
    assert here._replace(started_ticks=1).has_ended(here)
    assert not here._replace(started_ticks=1, time_namespace="time:[1]").has_ended(here)
    assert not here._replace(started_ticks=None).has_ended(here)


def test_what_a_file_says_of_a_process_may_be_anything():
    nobody = ProcessIdentity(None, None, None, None, None)
    assert ProcessIdentity.from_json({}) == nobody
    assert ProcessIdentity.from_json({"pid": True, "started_ticks": "1", "boot_id": 7, "else": 1}) == nobody


@pytest.mark.parametrize(
    ("code", "signum", "words"),
    [
        (3, 0, "ended with exit code 3"),
        (137, signal.SIGKILL, "was killed by SIGKILL (out of memory?)"),
        (143, signal.SIGTERM, "was killed by SIGTERM"),
        (163, 35, "was killed by signal 35"),  # a real-time signal without a name of its own
    ],
)
def test_an_end_is_put_into_words(code, signum, words):
    assert how_it_ended(code, signum) == words


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "150000 100000\n"}, 1.5),
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "max 100000\n"}, None),
        # the group above allows less
        ({"proc/self/cgroup": "0::/a/b\n", "sys/fs/cgroup/a/b/cpu.max": "400000 100000\n",
          "sys/fs/cgroup/a/cpu.max": "200000 100000\n"}, 2.0),
        # a container that sees itself at the top
        ({"proc/self/cgroup": "0::/\n", "sys/fs/cgroup/cpu.max": "50000 100000\n"}, 0.5),
        # version 1, in a container: the path is the host's, and only the container's own group is there
        ({"proc/self/cgroup": "5:memory:/docker/1\n4:cpu,cpuacct:/docker/1\n",
          "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "300000\n",
          "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000\n"}, 3.0),
        ({"proc/self/cgroup": "2:cpu:/\n", "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
          "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),  # no control groups, as on macOS
    ],
)  # fmt: skip
def test_the_quota_of_control_groups_is_the_least_on_the_way_up(tmp_path, files, quota):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert cpu_quota(str(tmp_path)) == quota


@pytest.fixture
def one_cpu():
    """one_cpu(argv): the command line that runs argv in a real control group of one CPU's time."""
    group = Path("/sys/fs/cgroup/cpu") / f"allranks-test-{os.getpid()}"
    if not (group.parent / "cpu.cfs_quota_us").exists():
        pytest.skip("no control groups of version 1 here")
    try:
        group.mkdir()
    except OSError:
        pytest.skip("control groups can be made by root only")
    (group / "cpu.cfs_quota_us").write_text("100000")
    yield lambda argv: ["sh", "-c", f'echo $$ > {group}/cgroup.procs; exec "$@"', "sh", *argv]
    until = time.monotonic() + 10
    while group.exists() and time.monotonic() < until:
        with contextlib.suppress(OSError):  # until its last process is gone
            group.rmdir()


@pytest.mark.skipif(len(cpu_affinity()) < 2, reason="one CPU is all there is")
def test_a_quota_of_one_cpu_gives_one_rank_and_one_thread(one_cpu, tmp_path):
    code = "from allranks.base.processes import usable_cpus; print(usable_cpus())"
    assert execute(one_cpu([PYTHON, "-c", code]), tmp_path).ok().out == "1\n"
    launch = [PYTHON, "-m", "allranks", "launch", "--dry-run", "--json", "--", PYTHON, "-V"]
    environ = {"CUDA_VISIBLE_DEVICES": ""}
    assert json.loads(execute(one_cpu(launch), tmp_path, env=environ).ok().out)["world_size"] == 1
    one = [*TRAIN, "data=synthetic", "data.train.count=200", "data.test.count=100", "data.split=[100,100]"]
    done = execute(one_cpu([*one, "device=cpu", "trainer.epochs=0"]), tmp_path).ok()
    assert "  ranks       1, on the CPU with 1 thread\n" in done.out


def test_processes_that_may_not_be_killed_do_not_protect_the_others(monkeypatch):
    """As a program that runs as root. No process here may be refused, so the kernel's answer stands in."""
    with (
        subprocess.Popen(["sleep", "600"]) as protected,
        subprocess.Popen(["sleep", "600"]) as other,
        monkeypatch.context() as patched,
    ):
        kill, refused = os.kill, []

        def kill_or_refuse(pid: int, signum: int) -> None:
            if pid == min(protected.pid, other.pid):  # the first that is found
                refused.append(pid)
                raise PermissionError(1, "Operation not permitted")
            kill(pid, signum)

        patched.setattr(os, "kill", kill_or_refuse)
        elsewhere = processes.descendants(os.getpid()) - {protected.pid, other.pid}
        try:
            processes.kill_descendants(spare=elsewhere, limit_s=1.0)
            assert process_stat(other.pid) is None  # killed, and waited for
            assert set(refused) == {protected.pid}
        finally:
            for process in (protected, other):
                with contextlib.suppress(ProcessLookupError):
                    kill(process.pid, signal.SIGKILL)


@pytest.mark.parametrize(
    ("path", "kind"),
    [("/home/me", "nfs4"), ("/home", "nfs4"), ("/home/my disk/x", "ext4"), ("/homes", "overlay")],
)
def test_the_file_system_of_a_path_is_that_of_the_last_and_longest_mount(tmp_path, path, kind):
    (tmp_path / "mounts").write_text(
        "overlay / overlay rw 0 0\n"
        "systemd-1 /home autofs rw 0 0\n"
        "server:/home /home nfs4 rw 0 0\n"
        "/dev/sdb /home/my\\040disk ext4 rw 0 0\n"
    )
    with (tmp_path / "mounts").open("ab") as mounts:
        mounts.write(b"/dev/sdc /media/\xe4 ext4 rw 0 0\n")  # a name in Latin 1
    assert files.file_system(Path(path), tmp_path / "mounts") == kind
    assert files.file_system(Path(path), tmp_path / "missing") == "unknown"


def test_what_a_call_with_a_limit_raises_is_raised():
    def divide() -> float:
        return 1 / 0

    with pytest.raises(ZeroDivisionError):
        files.within(60, divide)
    assert files.within(60, lambda: 7) == 7
    gate = threading.Event()
    assert files.within(0.01, gate.wait) is None
    gate.set()


def test_what_a_terminal_would_obey_is_shown_escaped():
    name = "run\x1b[31m\r\udcffé\u202e"
    shown = r"run\x1b[31m\r\udcffé\u202e"
    assert printable(name) == shown
    assert printable("two\n\tlines") == "two\n\tlines"
    assert str(UserError(f"{name} is missing.\nRemedy.")) == f"{shown} is missing.\nRemedy."
    assert table([[name, "7"]]) == f"  {shown}  7"


def test_the_majority_is_what_most_say_and_the_first_of_two_that_are_equal():
    assert majority(["a", "b", "b"]) == ("b", [0])
    assert majority(["a", "b"]) == ("a", [1])
    assert majority([7.0] * 3) == (7.0, [])
    with pytest.raises(ValueError):
        majority([])


def test_a_jobs_port_is_the_same_on_every_rank_and_seldom_another_jobs():
    ports = [port_for(f"{number}.server") for number in range(100)]
    assert ports == [port_for(f"{number}.server") for number in range(100)]
    assert set(ports) <= set(PORTS)
    assert len(set(ports)) >= 95
    assert port_for("123.4") == 22641  # Python's own hash() would give each process another one


def test_a_stream_of_the_programs_own_keeps_no_process_from_its_end(monkeypatch):
    """A tee has often no more than write() and flush(), and another no flush() either."""

    class Tee:
        def write(self, text: str) -> None: ...
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    closed = io.StringIO()
    closed.close()
    for stream in (Tee(), object(), closed, None):
        monkeypatch.setattr(sys, "stdout", stream)
        flush_console()
