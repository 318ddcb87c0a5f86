"""Processes: which one is meant, whether it has ended and how, and how to leave none behind.

Much of this needs Linux's /proc. If there is none, each function says what it does instead.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Set
from typing import NamedTuple

# The signals that stop a run. It saves a checkpoint first.
STOPPING = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT, signal.SIGHUP)
_PR_SET_PDEATHSIG, _PR_SET_CHILD_SUBREAPER = 1, 36  # prctl(2), linux/prctl.h
_PR_SET_PTRACER = 0x59616D61  # also an option of prctl(2), of the security module Yama
# A process writes down its Python stack on this signal. It is a real-time signal, which programs hardly
# use, and not one of the first or last few, which the C library and some MPIs take. Linux only.
DUMP_SIGNAL = getattr(signal, "SIGRTMAX", 0) - 5
# On this signal a process writes its Python stack for `allranks launch`, into memory that it shares with
# its guard. DUMP_SIGNAL is for the other ranks of the run. One process may answer both, so they differ.
DUMP_FOR_LAUNCH_SIGNAL = DUMP_SIGNAL - 1
_IMPORTED = time.perf_counter()  # where there is no /proc, a process counts its age from here


# --- which process is meant, and what has become of it ------------------------------------------------


class ProcessStat(NamedTuple):
    """What /proc/PID/stat says of a process (proc(5))."""

    state: str  # a letter: R running, S asleep, T stopped, Z ended and not yet waited for, ...
    started_ticks: int  # when it was started, in clock ticks since the host's own start
    wait_status: int  # how it ended, as from waitpid(); 0 while it runs, and for another user's process
    cpu_ticks: int = 0  # the CPU time of it and of its children that have ended, in clock ticks


def process_stat(pid: int) -> ProcessStat | None:
    """What Linux knows of a process; None if it is gone, hidden from this user, or there is no /proc."""
    try:
        # As bytes: the second field is the program's name, in which any byte may stand.
        with open(f"/proc/{pid}/stat", "rb") as file:  # noqa: PTH123  pathlib costs a guard's start 10 ms
            content = file.read()
    except OSError:
        return None
    # The name stands in parentheses and may hold some itself: after the last one come fields 3 to 52.
    fields = content.rpartition(b")")[2].split()
    if len(fields) < 50:  # the process ended between open() and read()
        return None
    cpu_ticks = sum(map(int, fields[11:15]))  # utime, stime, cutime, cstime
    return ProcessStat(fields[0].decode("ascii"), int(fields[19]), int(fields[49]), cpu_ticks)


class ProcessIdentity(NamedTuple):
    """What tells one process from every other, on all hosts and over all times.

    A process id alone does not: another host has the same ids, so has another container on this host, and
    the kernel gives an id again once its process has ended. None stands for what is not known.
    """

    pid: int | None
    started_ticks: int | None  # when it was started, in clock ticks since the host's own start
    boot_id: str | None  # drawn by the kernel at the host's start: no two hosts, no two starts share it
    pid_namespace: str | None  # the container in which `pid` is counted
    time_namespace: str | None  # the container in which `started_ticks` is counted

    @classmethod
    def of_this_process(cls) -> ProcessIdentity:
        stat = process_stat(os.getpid())
        return cls(
            pid=os.getpid(),
            started_ticks=stat.started_ticks if stat else None,
            boot_id=boot_id(),
            pid_namespace=_namespace("pid"),
            time_namespace=_namespace("time"),
        )

    @classmethod
    def from_json(cls, values: Mapping[str, object]) -> ProcessIdentity:
        """The identity among `values`, as to_json() gave it; what is missing or malformed is not known."""
        return cls(
            pid=_whole_number(values.get("pid")),
            started_ticks=_whole_number(values.get("started_ticks")),
            boot_id=_text(values.get("boot_id")),
            pid_namespace=_text(values.get("pid_namespace")),
            time_namespace=_text(values.get("time_namespace")),
        )

    def to_json(self) -> dict[str, int | str | None]:
        return self._asdict()

    def is_visible_from(self, here: ProcessIdentity) -> bool:
        """Whether `pid` means the same process to `here`: both count on one host, in one container."""
        return (
            self.boot_id is not None
            and self.pid_namespace is not None
            and self.boot_id == here.boot_id
            and self.pid_namespace == here.pid_namespace
        )

    def has_ended(self, here: ProcessIdentity) -> bool:
        """Whether the process is known to have ended, as seen from this process, which is `here`.

        False if nobody on this host can tell: then it may run or not.
        """
        if self.pid is None or not 0 < self.pid < 1 << 31 or not self.is_visible_from(here):
            return False
        try:
            os.kill(self.pid, 0)  # signal 0 only asks whether there is such a process
        except ProcessLookupError:
            return True
        except PermissionError:  # another user's process, which /proc may hide
            pass
        stat = process_stat(self.pid)
        if stat is None:
            return False
        if stat.state in "ZX":
            return True
        # In another time namespace the ticks are counted from another moment.
        comparable = self.time_namespace is not None and self.time_namespace == here.time_namespace
        return comparable and self.started_ticks not in (None, stat.started_ticks)


def process_age_s() -> float:
    """Seconds since this process started, including the time of its imports.

    Without /proc it is the time since this module was imported.
    """
    stat = process_stat(os.getpid())
    try:
        with open("/proc/uptime") as file:  # noqa: PTH123
            host_up_s = float(file.read().split()[0])
    except OSError:
        stat = None
    if stat is None:  # no /proc: count from the first import of this module
        return time.perf_counter() - _IMPORTED
    return host_up_s - stat.started_ticks / os.sysconf("SC_CLK_TCK")


def boot_id() -> str | None:
    return _read("/proc/sys/kernel/random/boot_id").strip() or None


def _namespace(kind: str) -> str:
    """The name of this process's namespace of this kind, such as `pid:[4026531836]`.

    Where the kernel does not know the kind (time: before Linux 5.6), all processes share one: `time`.
    """
    try:
        return os.readlink(f"/proc/self/ns/{kind}")  # noqa: PTH115
    except OSError:
        return kind


def _whole_number(value: object) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def how_it_ended(code: int, signum: int = 0) -> str:
    """How a process ended, in words that follow its name: by a signal, or with an exit code."""
    if not signum:
        return f"ended with exit code {code}"
    try:
        name = signal.Signals(signum).name
    except ValueError:  # Python names only some of the real-time signals
        name = f"signal {signum}"
    hint = " (out of memory?)" if signum == signal.SIGKILL else ""
    return f"was killed by {name}{hint}"


# --- leaving no process behind ------------------------------------------------------------------------


def die_with_parent(parent: int, signum: int) -> None:
    """Asks Linux to send this process the signal `signum` when its parent ends; does nothing elsewhere.

    To be called in a child process right after fork. `parent` is the parent's process id.
    """
    _prctl(_PR_SET_PDEATHSIG, signum)
    if os.getppid() != parent:  # it ended before we could ask
        os.kill(os.getpid(), signum)


def let_look(process: int) -> None:
    """Allows a process and its descendants to look into the memory of this one (py-spy); Linux only.

    Many systems allow that to the parents of a process only (Yama). To be called right after fork.
    """
    _prctl(_PR_SET_PTRACER, process)


@contextlib.contextmanager
def blocked(signals: Iterable[int]) -> Iterator[None]:
    """Holds these signals back from this thread until the block ends.

    A process that the thread starts inside the block never gets them: it inherits the block, and keeps it.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def adopt_orphans(yes: bool = True) -> None:
    """Makes this process the new parent of every descendant whose own parent ends (Linux only).

    Otherwise such orphans would become children of the system's first process, and could not be found.
    `yes=False` takes it back.
    """
    _prctl(_PR_SET_CHILD_SUBREAPER, int(yes))


def descendants(of: int) -> set[int]:
    """The ids of all processes that the process `of` has started, and those that they have started.

    Zombies (ended, but not yet waited for) are included. Empty if there is no /proc.
    """
    found: set[int] = set()
    waiting = [of]
    while waiting:
        new = set(children(waiting.pop())) - found
        found |= new
        waiting += new
    return found


def children(pid: int) -> list[int]:
    """The ids of the processes that this process has started; empty if there is no /proc."""
    try:
        threads = os.listdir(f"/proc/{pid}/task")  # noqa: PTH208
    except OSError:  # the process has just ended
        return []
    found: list[int] = []
    for thread in threads:
        # A thread that has just ended hides its own children only, not those of the threads after it.
        with contextlib.suppress(OSError), open(f"/proc/{pid}/task/{thread}/children") as file:  # noqa: PTH123
            found += map(int, file.read().split())
    return found


def cpu_ticks_of_children() -> int:
    """The CPU time of all processes that this process has started, in clock ticks, ended ones included.

    The number may fall: if a process has ended and its parent has not waited for it, its time is lost.
    """
    own = os.times()
    ended = round((own.children_user + own.children_system) * os.sysconf("SC_CLK_TCK"))
    stats = [process_stat(pid) for pid in descendants(os.getpid())]
    return ended + sum(stat.cpu_ticks for stat in stats if stat is not None)


def kill_descendants(spare: Set[int] = frozenset(), limit_s: float = 2.0) -> None:
    """Kills all descendants of this process but `spare`, and waits until they are gone.

    A killed process may leave children of its own, so the search is repeated until nothing is found. Gives
    up after `limit_s` seconds: what is still there then is stuck in the kernel, or is another user's, which
    this process may not kill.
    """
    deadline = time.monotonic() + limit_s
    while (left := descendants(os.getpid()) - spare) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            # If this process has not started `pid` itself, it cannot wait for it. Its parent waits for it.
            # If the parent is killed as well, adopt_orphans() makes `pid` our child, and a later turn of
            # this loop waits for it.
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        time.sleep(0.005)


def restore_signals() -> None:
    """Gives SIGPIPE and SIGXFSZ back their usual effect, which is to end the process.

    Python ignores both, a child process inherits that, and programs that are not Python do not expect it.
    """
    for name in ("SIGPIPE", "SIGXFSZ"):
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_DFL)


def _prctl(option: int, value: int) -> None:
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


# --- how many CPUs there are for this process -----------------------------------------------------------


def cpu_affinity() -> frozenset[int]:
    """The CPUs that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return frozenset(os.sched_getaffinity(0))
    return frozenset(range(os.cpu_count() or 1))


def cpu_ranges(cpus: Iterable[int]) -> str:
    """The numbers of CPUs in short, in order: `0-3,8` for 0, 1, 2, 3 and 8."""
    spans: list[list[int]] = []
    for cpu in sorted(cpus):
        if spans and cpu == spans[-1][1] + 1:
            spans[-1][1] = cpu
        else:
            spans.append([cpu, cpu])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in spans)


def usable_cpus() -> int:
    """How many processes of one thread can compute here at full speed: at least 1."""
    cpus = len(cpu_affinity())
    quota = cpu_quota()
    return cpus if quota is None else max(1, min(cpus, int(quota)))


def cpu_quota(root: str = "/") -> float | None:
    """The CPUs' worth of time that this process's control groups allow it, such as 1.5; None for no limit.

    A container of 2 CPUs on a host of 64 often sees all 64, but is stopped once it has used its share of a
    period. Each group on the way up may set a limit; the least one holds. `root` is where the file system
    begins.
    """
    quotas: list[float] = []
    for line in _read(f"{root}/proc/self/cgroup").splitlines():
        # 0::/a/b (version 2), or 4:cpu,cpuacct:/a/b (version 1)
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            mounts = ["unified", "."]
        elif "cpu" in controllers.split(","):
            mounts = ["cpu", "cpu,cpuacct"]
        else:
            continue
        # In a container the path may be the host's, of which only the container's own group is mounted.
        groups = [""]  # for /a/b these are "", /a and /a/b
        for name in path.strip("/").split("/"):
            groups.append(f"{groups[-1]}/{name}")
        for mount in mounts:
            folder = f"{root.rstrip('/')}/sys/fs/cgroup/{mount}"
            if not os.path.isdir(folder):  # noqa: PTH112  one call, where each group below costs several
                continue
            for group in groups:
                quotas += _quota_of(f"{folder}{group}")
    return min(quotas, default=None)


def _quota_of(group: str) -> list[float]:
    """The limit that a control group sets, as a list: empty if it sets none, or is not there."""
    limit = _read(f"{group}/cpu.max") or _read(f"{group}/cpu.cfs_quota_us") + _read(
        f"{group}/cpu.cfs_period_us"
    )
    words = limit.split()  # microseconds in a period, and its length; "max" or -1: no limit
    if len(words) != 2 or not words[0].isdigit():
        return []
    return [int(words[0]) / int(words[1])]


def _read(path: str) -> str:
    """The text of a file of Linux's own; empty if there is none."""
    try:
        with open(path) as file:  # noqa: PTH123
            return file.read()
    except OSError:
        return ""
