"""Ranks that die, hang, are stopped or drift apart: named, and all of them down, under every launcher."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest

from allranks.base import links
from allranks.base.errors import UserError
from allranks.config import WatchdogConfig
from allranks.job.identity import RankIdentity
from allranks.runtime.watch.progress import Progress
from allranks.runtime.watch.thread import Watchdog
from allranks.runtime.watch.timer import time_limit
from helpers import (
    NO_REPORT,
    PYTHON,
    ROOT,
    SMALL,
    TIMEOUT_S,
    Done,
    Started,
    execute,
    execute_forked,
    forked_python,
    launcher,
    mpiexec,
    only_long,
    serial,
    took_at_most,
    until,
)

# What is asserted here is how soon all ranks are down.
pytestmark = serial
HOST = socket.gethostname()
STEP_S = 2  # watchdog.step_s of most trainings here

# A user's own package. A model or a Dataset of it goes wrong at one place on one rank, and notes when.
PACKAGE = '''
import ctypes, os, signal, time, torch
from torch import nn

def rank():
    return int(os.environ.get("RANK") or os.environ.get("PMI_RANK") or 0)

def go_wrong(fault, who):
    if rank() != who:
        return
    with open("fault.tmp", "w") as file:
        file.write(str(time.monotonic()))
    os.rename("fault.tmp", "fault")
    match fault:
        case "raise":
            raise ValueError("as I was told")
        case "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        case "segv":
            ctypes.string_at(0)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "sleep":
            time.sleep(1000)

class Net(nn.Module):
    """`at`: begin (the first step), step, eval or init; `pause_s`: between steps."""
    def __init__(self, fault, at, who, pause_s):
        super().__init__()
        self.body = nn.Linear(64, 3)
        self.fault, self.at, self.who, self.pause_s = fault, at, who, pause_s
        self.steps = 0
        if at == "init":
            go_wrong(fault, who)

    def forward(self, images):
        if len(images) <= 2:  # the trial of one batch before the training
            return self.body(images.flatten(1))
        self.steps += self.training
        if self.training:
            time.sleep(self.pause_s)
        if self.at == ("eval" if not self.training else "begin" if self.steps == 1 else "step"):
            if self.steps != 2 and (self.at != "step" or self.steps == 6):  # the first pass counts twice
                go_wrong(self.fault, self.who)
        return self.body(images.flatten(1))

class Slow(Net):
    """Nothing is wrong with it, but it takes its time: to begin, to evaluate, and in a call that keeps
    the GIL."""
    def forward(self, images):
        if rank() == self.who:
            if not self.training:
                time.sleep(0.6)
            elif self.steps == 1:
                time.sleep(5)
            elif self.steps == 20:
                ctypes.PyDLL(None).usleep(5_000_000)
        return super().forward(images)

class Straggler(Net):
    def forward(self, images):
        if rank() == self.who and self.training:
            time.sleep(0.04)
        return super().forward(images)

class Drifting(torch.optim.SGD):
    """On rank 1 of three it adds a little of its own."""
    def step(self, closure=None):
        super().step()
        if rank() == 1:
            with torch.no_grad():
                self.param_groups[0]["params"][0].view(-1)[0] += 1e-6

class Stripes(torch.utils.data.Dataset):
    def __init__(self, count, at=None, fetch_s=0):
        self.count, self.at = count, at
        time.sleep(fetch_s if rank() == 0 else 0)

    def __len__(self):
        return self.count

    def __getitem__(self, n):
        if n == self.at:
            go_wrong("sleep", rank())
        return torch.rand(1, 8, 8), n % 3
'''
MODEL = "fault: none\nat: step\nwho: 1\npause_s: 0\n"
STRIPES = "_target_: lab.Stripes\n  count: "


@pytest.fixture
def words(tmp_path: Path):
    """words("model.fault=kill"): the overrides of a training in tmp_path, where the user's files are."""
    (tmp_path / "lab.py").write_text(PACKAGE)
    for name, text in {
        "model/lab": "_target_: lab.Net\n" + MODEL,
        "model/slow": "_target_: lab.Slow\n" + MODEL,
        "model/straggler": "_target_: lab.Straggler\n" + MODEL,
        "optimizer/drifting": "_target_: lab.Drifting\nlr: 0.1\n",
        "data/stripes": f"input_shape: [1, 8, 8]\nclasses: 3\nsplit: [960, 240]\nworkers: 0\n"
        f"train:\n  {STRIPES}1200\n  at: null\n  fetch_s: 0\ntest:\n  {STRIPES}240\n",
    }.items():
        path = tmp_path / f"conf/{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def words(*overrides: str) -> list[str]:
        return [
            "data=stripes", "model=lab", "device=cpu", "threads=1", "trainer.epochs=1000",
            "trainer.batch_size=96", f"watchdog.step_s={STEP_S}", "run.dir=run",
            "checkpoint.every_epochs=null", NO_REPORT, *overrides, "--config-dir=conf",
        ]  # fmt: skip

    return words


@pytest.fixture
def start(words, tmp_path: Path):
    """start("mpiexec", 3, "model.fault=kill"): a training in tmp_path; ends whatever is left of it."""
    started: list[Started] = []

    def start(under: str | None, ranks: int, *overrides: str, python: str = PYTHON) -> Started:
        if under == "launch":
            command = [python, "-m", "allranks", "launch", "-n", str(ranks)]
        elif under == "hosts":
            command = [PYTHON, "-c", TWO_HOSTS, PYTHON, "-m", "allranks.train"]
        elif under == "containers":
            command = [PYTHON, "-c", TWO_CONTAINERS, "-m", "allranks.train"]
        else:
            command = [*launcher(under, ranks, python), "-m", "allranks.train"]
        path = f"{tmp_path}:{ROOT / 'tests'}:{os.environ.get('PYTHONPATH', '')}"
        more = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
        started.append(Started([*command, *words(*overrides)], cwd=tmp_path, **more))
        return started[-1]

    yield start
    for one in started:
        one.end()


def fault_s(started: Started, tmp_path: Path, within_s: float = 60) -> float:
    """When it went wrong, by time.monotonic()."""
    noted = tmp_path / "fault"
    until(lambda: noted.exists() or started.process.poll() is not None, within_s, told=started.finish)
    assert noted.exists(), f"nothing went wrong: {started.finish()}"
    return float(noted.read_text())


def ranks_of(started: Started) -> set[int]:
    return started.pids() - {started.process.pid} or {started.process.pid}


def all_down(started: Started, tmp_path: Path, within_s: float) -> tuple[float, str, str]:
    """Seconds from the fault until no rank was left, stdout and stderr; exit code 0 would be wrong.

    The launcher's own process has a little longer: torchrun tells at length, and imports much for it.
    """
    since = fault_s(started, tmp_path)
    ranks = ranks_of(started)
    until(lambda: not ranks & started.pids(), within_s + 5, told=lambda: f"still there: {started.pids()}")
    took = time.monotonic() - since
    in_time = took_at_most(took, within_s)
    code, out, err = started.finish()
    assert code not in (0, 2, 85), err
    assert in_time, f"{took:.1f} s instead of {within_s} s: {err}"
    started.gone(within_s=1)
    return took, out, err


# --- ranks that die ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("under", "who"),
    [
        ("launch", 1),
        only_long("mpiexec", 1),
        only_long("torchrun", 0),
        only_long("torchrun", 1),
    ],
)
def test_kill_9_of_a_rank_is_named_and_all_are_down_in_2_s(start, tmp_path, under, who):
    started = start(under, 2, "model.fault=kill", f"model.who={who}")
    _, _, err = all_down(started, tmp_path, within_s=2)
    said = re.search(rf"^allranks: rank {who} on {HOST}(, in step \d+:)? was killed by SIGKILL", err, re.M)
    if under == "mpiexec" and said is None and not err:
        return  # MPICH kills the others after 3 ms: on a busy host before rank 0 has got to speak
    assert said, err
    for later in ("BAD TERMINATION", "ChildFailedError", "Traceback"):
        assert later not in err[: said.start()]


@pytest.mark.parametrize(("under", "who"), [("mpiexec", 1), ("torchrun", 0), only_long("launch", 1)])
def test_an_exception_on_one_rank_is_the_first_and_only_thing_said(start, tmp_path, under, who):
    words = ("model.fault=raise", f"model.who={who}", "model.at=begin")
    started = start(under, 2, *words, python=forked_python())
    _, out, err = all_down(started, tmp_path, within_s=2)
    traceback, stream = f"rank {who} on {HOST}] Traceback", err if who else out  # rank 0's log is on stdout
    assert stream.count(traceback) == 1
    assert "ValueError: as I was told" in stream
    assert "Connection" not in out + err  # what the others see of it


@pytest.mark.parametrize("under", [only_long("torchrun"), "launch"])
def test_a_segfault_leaves_its_stack(start, tmp_path, under):
    started = start(under, 2, "model.fault=segv", python=forked_python())
    _, _, err = all_down(started, tmp_path, within_s=2)
    assert "Fatal Python error: Segmentation fault" in err
    assert "in go_wrong" in err
    ended = "was killed by SIGSEGV"
    if under == "torchrun":  # which may have asked how it has ended, before the watchdog could look
        ended = f"({ended}|is gone: it was killed)"
    assert re.search(rf"rank 1 on {HOST}(, in step \d+:)? {ended}", err), err


@pytest.mark.parametrize("under", ["mpiexec", only_long("torchrun"), "launch"])
def test_kill_9_of_the_launcher_leaves_nobody_after_5_s(start, tmp_path, under):
    started = start(under, 2, "model.pause_s=0.01", "model.at=begin")
    fault_s(started, tmp_path)
    started.process.kill()
    started.gone(within_s=5)


@pytest.mark.parametrize("loaded", [only_long(""), "libtorch"], ids=["at once", "torch is there"])
def test_nor_does_it_where_the_ranks_have_only_begun(start, loaded):
    started = start("torchrun", 2)

    def has_loaded(pid: int) -> bool:
        try:
            return loaded in Path(f"/proc/{pid}/maps").read_text()
        except OSError:  # a process that was started for a moment only
            return False

    def begun() -> bool:
        return any(has_loaded(pid) for pid in started.pids() - {started.process.pid})

    until(begun)
    started.process.kill()
    started.gone(within_s=20)  # torch is imported to the end first


# --- ranks that hang or are stopped --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("under", "who"), [only_long("mpiexec", 1), only_long("torchrun", 0), only_long("launch", 1)]
)
def test_a_stopped_rank_is_named_with_its_stack_and_killed(start, tmp_path, under, who):
    started = start(under, 2, "model.fault=stop", f"model.who={who}")
    _, _, err = all_down(started, tmp_path, within_s=STEP_S + 5)
    assert re.search(rf"rank {who} on {HOST}, in step 5: is stopped \(state T\). It is at\n", err), err
    assert re.search(r"lab.py\", line \d+ in go_wrong\n", err), err


@pytest.mark.parametrize(
    ("under", "at", "limit", "step"),
    [
        only_long("torchrun", "init", "start_s", 1),
        ("mpiexec", "begin", "first_step_s", 1),
        ("launch", "step", "step_s", 5),
        only_long("mpiexec", "eval", "step_s", 11),
        only_long(None, "step", "step_s", 6),
    ],
)
def test_a_hanging_rank_is_named_with_its_stack(start, tmp_path, under, at, limit, step):
    who = 1 if under else 0
    given = () if limit == "step_s" else (f"watchdog.{limit}={STEP_S}",)
    words = ("model.fault=sleep", f"model.at={at}", f"model.who={who}", *given)
    started = start(under, 2, *words, python=forked_python() if under else PYTHON)
    took, _, err = all_down(started, tmp_path, within_s=STEP_S + 5)
    assert took >= STEP_S - 1  # the start's limit began before
    assert f"{STEP_S} s are allowed for" in err
    assert f"watchdog.{limit}). It is at" in err
    assert f"allranks: rank {who} on {HOST}, in step {step}: has made no progress for" in err
    assert "go_wrong\n    time.sleep(1000)\n" in err
    assert len(re.findall("has made no progress", err)) == 1


def test_a_dataset_that_hangs_on_one_rank_is_seen(start, tmp_path):
    started = start("torchrun", 2, "data.train.at=500", "data.workers=1", python=forked_python())
    _, _, err = all_down(started, tmp_path, within_s=STEP_S + 5)
    assert re.search(rf"allranks: rank \d on {HOST}, in step \d+: has made no progress", err)
    assert "_get_data" in err  # where the DataLoader waits for its worker


@pytest.mark.long
def test_a_rank_that_takes_its_time_is_left_alone(start, tmp_path):
    """Slow to get its data, to begin, to evaluate, and in a call that keeps the GIL; then all suspended."""
    started = start(
        "mpiexec", 2, "model=slow", "data.train.fetch_s=10", "watchdog.start_s=8", "trainer.epochs=3"
    )  # fmt: skip
    metrics = tmp_path / "run/metrics.jsonl"
    until(
        lambda: (metrics.exists() and metrics.read_text()) or started.process.poll() is not None,
        within_s=90,
    )
    assert started.process.poll() is None, started.finish()
    everybody = started.pids()
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for pid in everybody:
            os.kill(pid, number)
        time.sleep(STEP_S + 2)
    code, _, err = started.finish(within_s=60)
    assert (code, err) == (0, "")


# --- a rank that does not come to the start ------------------------------------------------------------

START_S = 4  # watchdog.start_s of the trainings here
# What a rank does instead of coming.
ABSENT = {
    "dies": "sys.exit(1)",
    "hangs": "time.sleep(1000)",
    "is stopped": "os.kill(os.getpid(), signal.SIGSTOP)",
}


@pytest.mark.parametrize("how", [only_long("dies"), "hangs", only_long("is stopped")])
def test_a_rank_that_never_comes_to_mpi_does_not_keep_the_others(tmp_path, how):
    """MPI_Init keeps Python's lock until all ranks have come to it."""
    train = [forked_python(), "-m", "allranks.train", *SMALL, f"watchdog.start_s={START_S}"]
    absent = [PYTHON, "-c", "import os, signal, sys, time\ntime.sleep(0.3)\n" + ABSENT[how]]
    with Started([mpiexec(), "-n", "1", *train, ":", "-n", "1", *absent], tmp_path) as started:
        code, _, err = started.finish(within_s=START_S + 60)  # torch is imported before
        assert code not in (0, 2, 85)
        assert f"allranks: rank 0 on {HOST} has waited {START_S} s in MPI_Init, as long as watchdog" in err
        started.gone(within_s=5)


STOPPED_IN_INIT = """
import os, signal, time
from allranks.base import processes
from allranks.job import identity
from allranks.runtime import mpi

here = os.getpid()
if os.fork() == 0:
    while len(processes.children(here)) < 2:  # the other one sees to the limit of MPI_Init
        time.sleep(0.05)
    time.sleep(0.5)
    os.kill(here, signal.SIGSTOP)
    os._exit(0)
mpi.world(identity.discover(os.environ), 4)
"""


INTERRUPTED_IN_INIT = STOPPED_IN_INIT.replace("SIGSTOP", "SIGINT")


def test_ctrl_c_is_heard_in_mpi_init(tmp_path):
    """Long before watchdog.start_s: Python itself would hear it when MPI_Init returns, which is never."""
    rank = [PYTHON, "-c", INTERRUPTED_IN_INIT.replace("environ), 4)", "environ), 600)")]
    absent = [PYTHON, "-c", "import time; time.sleep(600)"]
    with Started([mpiexec(), "-n", "1", *rank, ":", "-n", "1", *absent], tmp_path) as started:
        code, _, err = started.finish(within_s=60)
    assert code != 0
    assert "Traceback" not in err and "has waited" not in err


def test_a_rank_that_is_stopped_in_mpi_init_is_named(tmp_path):
    """It waits there for another one, which does not come either."""
    absent = [PYTHON, "-c", "import time; time.sleep(1000)"]
    stopped = [PYTHON, "-c", STOPPED_IN_INIT]
    command = [mpiexec(), "-n", "1", *absent, ":", "-n", "1", *stopped]
    with Started(command, tmp_path) as started:
        code, _, err = started.finish(within_s=60)
        assert code not in (0, 2, 85)
        assert f"allranks: rank 1 on {HOST} is stopped (state T): all ranks end." in err


STOPPED_AT_ONCE = """
import os, signal, sys
if os.environ["RANK"] == sys.argv.pop(1):
    os.kill(os.getpid(), signal.SIGSTOP)
from allranks import train
train.main()
"""


@pytest.mark.parametrize(("who", "other"), [(1, 0), only_long(0, 1)])
def test_under_torchrun_the_rank_that_does_not_come_is_named(tmp_path, who, other):
    """And not the one that waits for it."""
    (tmp_path / "program.py").write_text(STOPPED_AT_ONCE)
    torchrun = launcher("torchrun", 2, forked_python())
    command = [*torchrun, "program.py", str(who), *SMALL, f"watchdog.start_s={START_S}"]
    waited = (
        rf"allranks: rank {other} on {HOST} has waited [\d.]+ s for rank {who}; {START_S} s are allowed"
    )
    with Started(command, tmp_path) as started:
        assert started.process.stderr is not None
        err = b""
        deadline = time.monotonic() + TIMEOUT_S
        while not re.search(waited, err.decode()):
            assert time.monotonic() < deadline, err.decode()
            err += os.read(started.process.stderr.fileno(), 65536)


SLOW_FILES = """
import time
from allranks.run import checkpoint
from allranks.runtime.watch.progress import Progress

checkpoint.PIECE_BYTES = 2000
worked = Progress.worked

def slowly(progress):
    time.sleep(0.3)
    worked(progress)

Progress.worked = slowly
from allranks import train
train.main()
"""


@pytest.mark.long
def test_a_checkpoint_that_takes_long_to_read_is_waited_for(tmp_path):
    """Each piece that is read is progress: rank 0 is well, and the other rank waits for it."""
    (tmp_path / "program.py").write_text(SLOW_FILES)
    words = [*SMALL, "model=linear", f"watchdog.start_s={START_S}"]
    execute_forked(["-m", "allranks.train", *words, "run.dir=run", "trainer.epochs=1"], 1, tmp_path).ok()
    weights = tmp_path / "run/checkpoints/step-000010/model.safetensors"
    assert weights.stat().st_size / 2000 * 0.3 * 2 > 2 * START_S  # read, and then checked

    torchrun = [*launcher("torchrun", 2, forked_python()), "program.py"]
    done = execute([*torchrun, *words, "run.dir=more", "resume=run", "trainer.epochs=2"], tmp_path).ok()
    assert done.run.summary["epochs"] == 2
    assert "step-000010" in done.out


# --- several hosts -------------------------------------------------------------------------------------

# A stand-in for a launcher on two hosts, of two ranks each: namespaces with names of their own.
TWO_HOSTS = """
import os, socket, subprocess, sys
with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
ranks = [
    subprocess.Popen(
        ["unshare", "--uts", "sh", "-c", 'hostname $1; shift; exec "$@"', "sh", f"host{r // 2}",
         *sys.argv[1:]],
        env={**os.environ, "RANK": str(r), "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1",
             "MASTER_PORT": port, "GLOO_SOCKET_IFNAME": "lo"})
    for r in range(4)
]
sys.exit(max([abs(rank.wait()) for rank in ranks]))
"""


# Two containers with one name, of two ranks each. Each counts its processes by itself, so that ranks 0 and
# 2 have the same number, and so have 1 and 3. All ranks are forked from this one process, which imports
# torch once for them, as tests/forkserver.py does.
TWO_CONTAINERS = """
import ctypes, os, socket, subprocess, sys
import forkserver

CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWPID = 0x00020000, 0x04000000, 0x20000000  # <linux/sched.h>

def forked(work):
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            code = work()
        finally:
            os._exit(code)
    return pid

def wait(pids):
    return max(abs(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])) for pid in pids)

def container(ranks):
    assert ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWNS | CLONE_NEWUTS | CLONE_NEWPID) == 0
    return wait([forked(lambda: inside(ranks))])  # the first process of the container has the number 1

def inside(ranks):
    subprocess.run(["mount", "--make-rprivate", "/"], check=True)
    subprocess.run(["mount", "-t", "proc", "proc", "/proc"], check=True)
    return wait([forked(lambda: train(rank)) for rank in ranks])

def train(rank):
    return forkserver.be_python(sys.argv[1:], {**environment, "RANK": str(rank)}, os.getcwd())

with socket.socket() as free:
    free.bind(("127.0.0.1", 0))
    port = str(free.getsockname()[1])
environment = {**os.environ, "WORLD_SIZE": "4", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
               "GLOO_SOCKET_IFNAME": "lo"}
forkserver.import_all()
sys.exit(wait([forked(lambda: container(ranks)) for ranks in ((0, 1), (2, 3))]))
"""


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may make containers")
@pytest.mark.parametrize("who", [only_long(0), 2, only_long(3)])
def test_in_containers_of_one_name_the_right_process_is_looked_at(start, tmp_path, who):
    """Its neighbour in the same container looks: elsewhere its number belongs to another process."""
    started = start("containers", 4, "model.fault=stop", f"model.who={who}")
    _, _, err = all_down(started, tmp_path, STEP_S + 5)
    assert re.search(
        rf"^allranks: rank {who} on {HOST}, in step \d+: is stopped \(state T\). It is at", err, re.M
    )
    assert re.search(r"lab.py\", line \d+ in go_wrong\n", err), err


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may name a host")
@pytest.mark.parametrize(
    ("fault", "who", "host", "said", "within_s"),
    [
        only_long("kill", 3, "host1", "was killed by SIGKILL", 5),
        only_long("stop", 2, "host1", r"is stopped \(state T\). It is at", STEP_S + 5),
        only_long("stop", 0, "host0", r"is stopped \(state T\). It is at", STEP_S + 5),
    ],
)
def test_on_several_hosts_a_neighbour_looks(start, tmp_path, fault, who, host, said, within_s):
    started = start("hosts", 4, f"model.fault={fault}", f"model.who={who}")
    _, _, err = all_down(started, tmp_path, within_s)
    assert re.search(rf"^allranks: rank {who} on {host}, in step \d+: {said}", err, re.M), err


# --- ranks that drift apart, or lag behind -------------------------------------------------------------


def trained(words: list[str], ranks: int, folder: Path) -> Done:
    environ = {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1"}
    return execute_forked(["-m", "allranks.train", *words], ranks, folder, environ)


def test_ranks_whose_weights_differ_are_named(words, tmp_path):
    done = trained(words("optimizer=drifting", "trainer.epochs=2"), 3, tmp_path)
    code, err = done.code, done.err
    assert code == 1
    assert f"allranks: After step 10 the ranks' weights differ (rank 1 on {HOST} from the others')" in err
    assert "Traceback" not in err
    assert not (tmp_path / "run/checkpoints/step-000010").exists()


def test_a_straggler_is_reported(words, tmp_path):
    overrides = words("model=straggler", "trainer.epochs=1", "trainer.batch_size=32")
    out = trained(overrides, 2, tmp_path).ok().out
    assert re.search(rf"^rank 1 on {HOST} works longer on a step than the others: [\d.]+ times", out, re.M)


# --- the connections -----------------------------------------------------------------------------------


def test_nobody_without_the_secret_is_listened_to():
    watchdog = Watchdog(WatchdogConfig(), RankIdentity("none"), abort=lambda code: None)
    me = watchdog.prepare(2, one_host=True)
    address, port, secret = me["door"]
    watchdog.join([me, me], deputy=1)
    for words in (
        {"secret": "x", "rank": 1},
        {"failed": True},
        {"rank": 1},
        {"secret": "é" * 64, "rank": 1},
    ):
        link = links.connect(address, port, 5)
        link.sock.sendall(links.message(**words) + links.message(failed=True, code=1))
        link.sock.settimeout(5)
        assert link.sock.recv(100) == b""  # and this process has not been ended
        link.close()
    assert address == "127.0.0.1"
    assert len(secret) == 64
    watchdog.close()


# Rank 0 of two, to whose watchdog this program is connected as rank 1, too.
CONNECTED = """
import time
from allranks.config import WatchdogConfig
from allranks.base import links
from allranks.runtime.watch.thread import Watchdog
from allranks.job.identity import RankIdentity

mine = Watchdog(WatchdogConfig(), RankIdentity("none"), abort=lambda code: None)
me = mine.prepare(2, one_host=True)
address, port, secret = me["door"]
mine.join([me, me], deputy=1)
other = links.connect(address, port, 5)
other.send(secret=secret, rank=1)
while not mine._others.ranks():
    time.sleep(0.01)
"""

RESET = (
    CONNECTED
    + """send = links.Connection.try_to_send

def busy(connection, **word):
    send(connection, **word)
    other.close()  # what it has not read resets the connection
    time.sleep(1)

links.Connection.try_to_send = busy
mine.close()
"""
)


def test_a_rank_that_closes_while_another_says_goodbye_is_not_gone(tmp_path):
    """Or the end of a run that was well is an alarm now and then."""
    done = execute([sys.executable, "-c", RESET], tmp_path).ok()
    assert (done.out, done.err) == ("", "")


OWN_ERROR = (
    CONNECTED
    + """mine.fail(1)
print(other.next_message())
time.sleep(1.2)  # the thread has had two turns
other.close()  # rank 1 ends, as it was told to
time.sleep(1.2)
print("nobody is blamed")
"""
)


def test_a_rank_that_ends_by_the_error_of_rank_0_is_not_blamed(tmp_path):
    done = execute_forked(["-c", OWN_ERROR], 1, tmp_path).ok()
    assert (done.out, done.err) == ("{'end': True, 'code': 1}\nnobody is blamed\n", "")


FULL = """
import resource, socket, time
from allranks.base import links
from allranks.config import WatchdogConfig
from allranks.job.identity import RankIdentity
from allranks.runtime.watch.thread import Watchdog

watchdog = Watchdog(WatchdogConfig(), RankIdentity("none"), abort=lambda code: None)
me = watchdog.prepare(2, one_host=True)
watchdog.join([me, me], deputy=1)
address, port, secret = me["door"]
taken = [socket.socket() for _ in range(20)]  # of a program that opens much
most = taken[-1].fileno() + 3
resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
for one in taken[:6]:
    one.connect((address, port))  # strangers, more than this process has descriptors for
time.sleep(1)
taken[0].close()
taken[1].close()
time.sleep(1)
rank_1 = links.connect(address, port, 5)
rank_1.send(secret=secret, rank=1)
rank_1.send(alarm={"step": 0, "arrivals": 0, "overdue": False, "where": ""})
rank_1.sock.settimeout(10)
print(rank_1.next_message())
watchdog.close()
"""


def test_a_process_without_a_free_descriptor_goes_on_watching(tmp_path):
    done = execute([sys.executable, "-c", FULL], tmp_path).ok()
    assert (done.out, done.err) == ("{'wait': True}\n", "")


FEW = """
import os, resource
from allranks import train
if os.environ["RANK"] == "1":
    resource.setrlimit(resource.RLIMIT_NOFILE, (60, 60))
train.main()
"""


def test_a_rank_that_may_not_have_enough_connections_is_named_at_the_start(tmp_path):
    (tmp_path / "program.py").write_text(FEW)
    done = execute([*launcher("torchrun", 2, forked_python()), "program.py", *SMALL], tmp_path)
    assert done.code != 0
    said = [line for line in done.err.splitlines() if line.startswith("allranks: ")]
    assert len(said) == 1
    assert said[0].startswith(
        f"allranks: rank 1: a process on {HOST} may have 60 files and connections open"
    )


FAILS = """
import time
from allranks.config import WatchdogConfig
from allranks.job.identity import RankIdentity
from allranks.runtime.watch.thread import Watchdog

watchdog = Watchdog(WatchdogConfig(), RankIdentity("none"), abort=lambda code: None)

def mark():
    raise OSError(5, "Input/output error")

watchdog.progress.mark = mark
time.sleep(60)
"""


def test_a_watch_that_fails_ends_the_run_with_a_sentence(tmp_path):
    done = execute([sys.executable, "-c", FAILS], tmp_path, timeout_s=30)
    assert done.code == 1
    error = "OSError(5, 'Input/output error')"
    assert done.message == (
        f"allranks: rank 0 on {HOST}: the watch over the ranks has failed ({error}): all ranks end."
    )


def test_a_step_that_compiles_has_the_first_steps_time():
    """The last batch of the first epoch is smaller, and is compiled for once more."""
    progress = Progress(WatchdogConfig(step_s=1, first_step_s=77))
    progress.compiles = True
    limits_s = []
    progress.begin_steps(0)
    for step in (0, 1, 2):
        if step:
            progress.completed(step)
        limits_s.append(progress.allowance().limit_s)
    progress.compiles = False
    limits_s.append(progress.allowance().limit_s)
    assert limits_s == [77, 77, 77, 1]


def test_a_process_that_goes_on_at_an_evaluation_has_its_first_step_in_the_next_epoch():
    """Its checkpoint has all steps of the epoch: none is left, and the evaluation comes first."""
    progress = Progress(WatchdogConfig(step_s=1, first_step_s=77))
    progress.begin_steps(10)
    before = progress.mark()
    progress.evaluated_batch()
    progress.begin_steps(10)
    assert progress.mark() != before
    assert progress.allowance().limit_s == 77
    progress.completed(11)
    assert progress.allowance().limit_s == 1


# Its watchdog fails with an error whose text is no UTF-8, like the path of a user's file may be.
FAILS_ODDLY = FAILS.replace(
    'OSError(5, "Input/output error")', "type('Odd', (Exception,), {'__repr__': lambda _: chr(0xDCFF)})()"
)


def test_what_is_no_utf_8_is_said_with_escapes(tmp_path):
    done = execute_forked(["-c", FAILS_ODDLY], 1, tmp_path, timeout_s=30)
    assert done.code == 1
    assert "the watch over the ranks has failed (\\udcff)" in done.message


# A call that does not return, in a process whose stderr goes to a disk that is full.
OVERDUE = """
import os, time
from allranks.runtime.watch.timer import time_limit
os.dup2(os.open("/dev/full", os.O_WRONLY), 2)
with time_limit(0.2, "rank 0", "hangs"):
    time.sleep(600)
"""


def test_a_call_that_hangs_is_ended_though_nobody_takes_the_sentence(tmp_path):
    assert execute_forked(["-c", OVERDUE], 1, tmp_path, timeout_s=30).code == -signal.SIGTERM


def test_a_time_limit_works_where_the_end_of_children_is_ignored():
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        with time_limit(60, "rank 0", "hangs"):
            pass
    finally:
        signal.signal(signal.SIGCHLD, before)


# Rank 0 dies in its second step, in which the other ranks have an error of their own: gloo's.
RANK_0_DIES = """
import os, signal
import torch, allranks
run = allranks.open("own", device="cpu", threads=1, report=False)
model = run.wrap(torch.nn.Linear(1, 1))
run.keep(model=model)
for epoch in run.epochs(1):
    for batch in run.steps([torch.ones(6, 1)] * 4):
        if run.step == 1 and run.rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        run.backward(model(batch).mean())
run.finish()
"""


def test_where_rank_0_dies_its_deputy_alone_speaks(tmp_path):
    done = execute_forked(["-c", RANK_0_DIES], 4, tmp_path, timeout_s=60)
    assert done.err.count("allranks: rank 0 on ") == 1
    assert "Traceback" not in done.err
    # Where the process that has started rank 0 has asked first, nobody else can know by which signal.
    assert re.search(r"in step [12]: (was killed by SIGKILL|is gone: it was killed)", done.err)


# Rank 1 has a GPU that does not work, or cannot reach rank 0 to watch over it.
BROKEN_START = """
import os
from allranks import train
from allranks.runtime import bringup
from allranks.runtime.watch.connections import Connections

def broken(*_):
    raise BROKEN

if os.environ["RANK"] == "1":
    PLACE = broken
train.main()
"""


@pytest.mark.parametrize(
    ("place", "error", "said"),
    [
        (
            "bringup.pick_device",
            "RuntimeError('CUDA error: an uncorrectable ECC error')",
            f"rank 1: device=cpu does not work on {HOST} (CUDA error: an uncorrectable ECC error): look",
        ),
        (
            "Connections.connect_to_rank_0",
            "ConnectionRefusedError(111, 'Connection refused')",
            f"rank 1: {HOST} cannot reach rank 0 at 127.0.0.1:",
        ),
    ],
)
def test_a_rank_that_cannot_start_is_an_error_of_all_ranks(tmp_path, place, error, said):
    program = BROKEN_START.replace("BROKEN", error).replace("PLACE", place)
    done = execute_forked(["-c", program, *SMALL, "model=linear"], 2, tmp_path, timeout_s=60)
    assert done.code == 2
    assert done.message.startswith(f"allranks: {said}")


# A training that tells before each step whether it may compile. Nothing is compiled: that takes a minute.
# With $STOP it stops before the last step of its first epoch.
COMPILES = """
import os, signal
import torch
from allranks import train
from allranks.runtime.watch.progress import Progress

torch.compile = lambda module, **_: module
usual = Progress.completed
def completed(progress, step):
    usual(progress, step)
    print(f"after step {step}: {progress.compiles}")
    if step == 8 and "STOP" in os.environ:
        os.kill(os.getpid(), signal.SIGTERM)
Progress.completed = completed
train.main()
"""


def test_a_process_that_goes_on_within_an_epoch_may_compile_in_the_next_one_too(tmp_path):
    """In the rest of its first epoch it may have batches of one size only."""
    words = [*SMALL, "model=linear", "trainer.epochs=3", "run.dir=run", "trainer.compile=true"]
    command = ["-c", COMPILES, *words, "checkpoint.every_steps=9"]  # 10 steps an epoch
    assert execute_forked(command, 1, tmp_path, {"STOP": "1"}, timeout_s=60).code == 85
    told = execute_forked(command, 1, tmp_path, timeout_s=60).ok().out
    after = dict(re.findall(r"after step (\d+): (\w+)", told))
    assert [int(step) for step, compiles in after.items() if compiles == "True"] == list(range(10, 21))
    assert after["30"] == "False"


def test_an_address_that_other_hosts_cannot_reach_is_refused():
    with pytest.raises(UserError, match="MASTER_ADDR=localhost is the loopback of rank 0's host"):
        links.listen("localhost", far=True)
    links.listen("localhost").close()
