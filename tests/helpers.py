"""What the tests share: real command lines in real processes, their certain end, and what they leave.

Waiting and timing stand here as well, because the tests share their machine: `until` polls for a condition,
and `allowed_s` gives a bound on seconds that grows with what else the machine has to do.
"""

from __future__ import annotations

import atexit
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import pytest

from allranks.config import Config
from allranks.run import checkpoint
from forkserver import MORE, Answer, Request

if TYPE_CHECKING:
    from allranks.training.building import Recipe

T = TypeVar("T")

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
TRAIN = [PYTHON, "-m", "allranks.train"]
GUARD = [PYTHON, "-m", "allranks.launch.guard", "--"]  # what `allranks launch` has each rank start
TIMEOUT_S = 180  # many times what any command here takes; it only stops a hang

# A test that is not about reports does without: each takes seconds, and hundreds of runs are trained here.
NO_REPORT = "report=false"
# Drawn in a tenth of a second, and trained in another. One thread: the tests may share their cores.
SMALL = (
    "data=synthetic", "data.train.count=1600", "data.test.count=400", "data.split=[1200,400]",
    "device=cpu", "threads=1", NO_REPORT,
)  # fmt: skip

# A process that does nothing but own the run directory `run`, or that of its argument.
OWNER = """
import sys, time
from allranks.run.claim import Claim
Claim.take(sys.argv[1] if sys.argv[1:] else "run")
print("taken", flush=True)
time.sleep(600)
"""

# The beginnings of the names of figures that differ from run to run.
MEASURED = ("time/", "throughput/", "memory/")

# What a launcher, a scheduler or the user's shell may have put into this test process's environment.
LEAKY = re.compile(
    r"(RANK|WORLD_SIZE|GROUP_|ROLE_|MASTER_|LOCAL_|TORCHELASTIC_|PMI|MPI|OMPI_|MV2_|MVP_|FLUX_|PALS_|JSM_|HYDRA_|I_MPI_"
    r"|SLURM|PBS|PALS|ALLRANKS_|OMP_|MKL_|GLOO_|PYTHON|COVERAGE_|CUDA_VISIBLE)"
)

# Tests with this mark run one after another, in one worker. Some watch how long something takes, and would
# disturb each other; others need what a machine has once: a Slurm, its mounts, both of its cores.
serial = pytest.mark.xdist_group("serial")


# What the ranks of a model that is spread over them import besides (`execute_forked(imports=FSDP)`). Each
# of them needs torch's compiler, which takes half a second.
FSDP = "torch._dynamo torch.distributed.fsdp"


def only_long(*values: object) -> Any:
    """Values for a parametrized test that are tried with --long only."""
    return pytest.param(*values, marks=pytest.mark.long)


@dataclass(frozen=True)
class Done:
    """A command that has ended."""

    code: int
    out: str
    err: str
    cwd: Path
    left_running: Sequence[str]  # command lines of processes that outlived it

    @property
    def messages(self) -> list[str]:
        """What allranks itself has to say: every line on stderr that begins with its name."""
        return [line for line in self.err.splitlines() if line.startswith("allranks: ")]

    @property
    def message(self) -> str:
        """The one message of a refused run, after checking that it is one, and that it is clean."""
        assert len(self.messages) == 1, self.err
        assert "Traceback" not in self.out + self.err, self.err
        return self.messages[0]

    @property
    def run(self) -> Run:
        """The run directory that the command names, or else the only one below its working directory."""
        if named := re.search(r"^  directory +(.*)", self.out, flags=re.M):
            return Run(self.cwd / named[1])
        directories = [p.parent for p in sorted(self.cwd.rglob("config.yaml"))]
        assert len(directories) == 1, (directories, self.err)
        return Run(directories[0])

    def ok(self) -> Done:
        assert self.code == 0, f"exit code {self.code}\n{self.out}\n{self.err}"
        return self


@dataclass(frozen=True)
class Run:
    """A run directory, read the way docs/run-directory.md describes it."""

    path: Path

    @cached_property
    def metrics(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "metrics.jsonl").read_text().splitlines()]

    @cached_property
    def summary(self) -> dict[str, Any]:
        return json.loads((self.path / "summary.json").read_text())

    @cached_property
    def environment(self) -> dict[str, Any]:
        return json.loads((self.path / "environment.json").read_text())

    def pid(self, rank: int) -> int:
        """The id of the process of this rank, which may have been forked by a server."""
        return int(self.environment["ranks"][rank]["pid"])

    def column(self, key: str) -> list[float]:
        """One metric, epoch after epoch."""
        return [line[key] for line in self.metrics]

    @property
    def losses(self) -> list[float]:
        """Training and validation losses of all epochs, then the test loss: the whole curve."""
        return [*self.column("train/loss"), *self.column("val/loss"), self.summary["test/loss"]]


def clean_environment(**more: str) -> dict[str, str]:
    """This process's environment without any launcher's variables, and with `more`."""
    kept = {name: value for name, value in os.environ.items() if not LEAKY.match(name)}
    return {**kept, "OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1", **more}


def launcher(kind: str | None, ranks: int, python: str = PYTHON) -> list[str]:
    """The words before `-m allranks.train`; kind is None or "python" (alone), "mpiexec" or "torchrun".

    With `forked_python()` the launcher is real as well, and each process costs a fourth.
    """
    if kind in (None, "python"):
        return [python]
    if kind == "torchrun":
        return [python, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    assert kind == "mpiexec"
    return [mpiexec(), "-n", str(ranks), python]


def guarded(kind: str, ranks: int, program: Sequence[str]) -> list[str]:
    """The command line of a real launcher each of whose ranks starts a guard, and that the program."""
    if kind == "torchrun":
        return [*launcher("torchrun", ranks), "--no-python", *GUARD, *program]
    return [mpiexec(), "-n", str(ranks), *GUARD, *program]


def mpiexec() -> str:
    """The mpiexec of this environment's MPICH wheel."""
    path = shutil.which("mpiexec", path=str(Path(PYTHON).parent))
    if path is None:
        pytest.skip("no mpiexec beside this Python: pip install mpich")
    return path


def execute(
    argv: Sequence[str], cwd: Path, env: Mapping[str, str] | None = None, timeout_s: float = TIMEOUT_S
) -> Done:
    """Runs a command to its end, and ends whatever it leaves running."""
    with Started(argv, cwd=cwd, **(env or {})) as started:
        code, out, err = started.finish(timeout_s)
        with suppress(AssertionError):
            started.gone(within_s=5)
        return Done(code, out, err, cwd, list(marked(started.mark).values()))


def execute_forked(
    words: Sequence[str],
    ranks: int,
    cwd: Path,
    env: Mapping[str, str] | None = None,
    timeout_s: float = TIMEOUT_S,
    imports: str = "",
) -> Done:
    """Runs `python WORDS` on each rank to its end, in processes that need not import torch.

    The words begin with -m MODULE or -c TEXT. No launcher starts the ranks: the variables RANK, WORLD_SIZE,
    MASTER_ADDR and MASTER_PORT tell several of them who they are and where they meet. `imports` names
    further modules, with a space between them, that the ranks need not import either.
    """
    environments = []
    meet = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    for rank in range(ranks):
        who = {"RANK": str(rank), "LOCAL_RANK": str(rank), "LOCAL_WORLD_SIZE": str(ranks), **meet}
        environments.append(clean_environment(**{**(who if ranks > 1 else {}), **(env or {})}))
    with tempfile.TemporaryDirectory() as output:
        request = Request(list(words), environments, str(cwd), output, timeout_s)
        answer = _forking(imports).serve(request)
        out, err = (
            "".join(Path(output, f"{rank}.{name}").read_text() for rank in range(ranks))
            for name in ("out", "err")
        )
    if answer.is_late:
        pytest.fail(f"still running after {timeout_s} s: {words}\n{out}\n{err}")
    return Done(answer.code, out, err, cwd, answer.left)


class ForkedPython:
    """A server of forked processes (tests/forkserver.py), and a folder of programs that ask it for them.

    In `bin`, the programs `python`, `allranks` and `torchrun` do what those beside this Python do, but
    import no torch (tests/forkclient.py). All others are those beside this Python. `path` is an
    environment's PYTHONPATH, for the server. `imports` names further modules that it imports.
    """

    def __init__(self, path: str = "", imports: str = "") -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="forked-")
        self.bin = Path(self._folder.name, "bin")
        self.bin.mkdir()
        self.python = self.bin / "python"
        self._socket_path = socket_path = Path(self._folder.name, "socket")
        client = shlex.join(
            [PYTHON, "-IS", str(ROOT / "tests/forkclient.py"), str(socket_path), str(self.python)]
        )
        own = {
            "python": "",
            "python3": "",
            "allranks": " -m allranks",
            "torchrun": " -m torch.distributed.run",
        }
        for name, words in own.items():
            program = self.bin / name
            program.write_text(f'#!/bin/sh\nexec {client}{words} "$@"\n')
            program.chmod(0o755)
        for program in Path(PYTHON).parent.iterdir():
            if program.name not in own:
                (self.bin / program.name).symlink_to(program)
        # Python notes at its start whether stdout has positions, as a file has. In a fork stdout may be
        # another one, a pipe for example: an error would come of it where a program asks for a position. So
        # the server starts with a pipe, to which it writes nothing.
        self._server = subprocess.Popen(
            [PYTHON, str(ROOT / "tests/forkserver.py"), str(socket_path)],
            env=clean_environment(**{MORE: imports}, **({"PYTHONPATH": path} if path else {})),
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip
        until(socket_path.exists)

    def serve(self, request: Request) -> Answer:
        """Has the ranks of a program forked; returns when all of its processes are over."""
        with socket.socket(socket.AF_UNIX) as server:
            server.connect(str(self._socket_path))
            asked = json.dumps(request._asdict()).encode()
            socket.send_fds(server, [len(asked).to_bytes(8, "big")], [])
            server.sendall(asked)
            with server.makefile() as answers:
                return Answer(**json.loads(answers.readline()))

    def __enter__(self) -> ForkedPython:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the server, but not the processes that it has forked."""
        self._server.communicate()  # its stdin is closed, and it is waited for
        self._folder.cleanup()


@cache
def _forking(imports: str) -> ForkedPython:
    """The server of this process's forked trainings, which ends with this process.

    There is one for each set of modules that trainings import besides the usual ones.
    """
    forked = ForkedPython(imports=imports)
    atexit.register(forked.close)
    return forked


def forked_python() -> str:
    """The `python` whose processes are forked."""
    return str(_forking("").python)


def free_port() -> int:
    """A port that no process of this host listens at."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Started:
    """A process with all that comes of it; a with statement leaves none of them behind."""

    def __init__(
        self,
        command: Sequence[str],
        cwd: Path | None = None,
        stdout: int = subprocess.PIPE,
        **environ: str,
    ) -> None:
        self.mark = f"ALLRANKS_TEST={uuid.uuid4()}"  # in the environment of all that comes of it
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            command, cwd=cwd, env={**clean_environment(**environ), name: value}, stdin=subprocess.DEVNULL,
            stdout=stdout, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def pids(self) -> set[int]:
        """Every living process that inherited our mark, wherever it hangs now."""
        return set(marked(self.mark))

    def lines(self) -> Iterator[str]:
        """The lines of stdout as they come."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield line.decode().rstrip("\n")

    def finish(self, within_s: float = 30) -> tuple[int, str, str]:
        """Exit code, stdout, stderr; fails where it takes longer than it may, and ends it then."""
        try:
            out, err = self.process.communicate(timeout=within_s)
        except subprocess.TimeoutExpired:
            try:
                out, err = self.process.communicate(timeout=allowed_s(within_s) - within_s)
            except subprocess.TimeoutExpired:
                end(self.pids())
                out, err = self.process.communicate()
                told = f"{(out or b'').decode()}\n{err.decode()}"
                pytest.fail(f"still running after {within_s} s: {self.process.args!r}\n{told}")
        return self.process.returncode, (out or b"").decode(), err.decode()

    def gone(self, within_s: float) -> None:
        """Waits until none of its processes is left; fails where that takes longer than it may."""
        until(lambda: not self.pids(), within_s, told=lambda: f"still there: {marked(self.mark)}")

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        """Kills what is left of it."""
        end(self.pids())
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


def marked(mark: str) -> dict[int, str]:
    """Living processes (id and command line) that carry NAME=VALUE in their environment."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):  # empty for a zombie
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(process.name)] = line
        except OSError:  # gone, or not ours
            continue
    return found


def command_line(pid: int) -> list[str]:
    """The program of a process and its arguments; empty where the process has ended."""
    try:
        content = Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return []
    return content.decode(errors="replace").split("\0")[:-1]


def end(pids: Iterable[int]) -> None:
    """Kills these processes, as far as they are still there."""
    for pid in pids:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


# --- waiting and timing on a machine that others use, too -------------------------------------------------


def until(
    condition: Callable[[], T],
    within_s: float = 60,
    told: Callable[[], object] = lambda: "",
    every_s: float = 0.02,
) -> T:
    """Waits until the condition gives something true, and returns that.

    Fails with what `told` gives where it takes longer than `within_s` seconds of a quiet machine.
    """
    began, allowed = time.monotonic(), within_s
    while not (found := condition()):
        if time.monotonic() - began > allowed:
            allowed = allowed_s(within_s)  # measured only where the time is up: that costs half a second
            assert time.monotonic() - began < allowed, f"not within {allowed:.1f} s: {told()}"
        time.sleep(every_s)
    return found


def until_step(run: Path, step: int, within_s: float = 90) -> int:
    """Waits until the run has a checkpoint of this step or a later one; that step."""

    def newest() -> int:
        saved = max(checkpoint.steps(run), default=0)
        return saved if saved >= step else 0

    return until(newest, within_s, told=lambda: [path.read_text() for path in run.glob("*.log")])


def took_at_most(seconds: float, within_s: float) -> bool:
    """Whether something that took so long would have been in time on a quiet machine."""
    return seconds < within_s or seconds < allowed_s(within_s)


# Computes for 0.2 s of processor time, and prints the seconds that it took by the clock.
SPIN = """
import time
began, computed = time.perf_counter(), time.thread_time()
while time.thread_time() < computed + 0.2:
    pass
print(time.perf_counter() - began)
"""


def allowed_s(within_s: float) -> float:
    """Seconds that something may take now which takes `within_s` at the most on a quiet machine.

    A process on every core computes for a while, which takes twice as long where another one wants the core
    as well. What there was in the last minute, and may be gone by now, counts by the average load.
    """
    cores = len(os.sched_getaffinity(0))
    spinning = [
        subprocess.Popen([PYTHON, "-S", "-c", SPIN], stdout=subprocess.PIPE, text=True)
        for _ in range(cores)
    ]
    slowest = max(float(process.communicate()[0]) for process in spinning) / 0.2
    return within_s * max(1.0, slowest, os.getloadavg()[0] / cores)


def rank_of(rank: int, ranks: int) -> SimpleNamespace:
    """What loaders ask of a Runtime, and the dealing of batches: this rank of so many, on the CPU."""
    import torch  # which most tests here do without

    return SimpleNamespace(
        rank=rank,
        world_size=ranks,
        shares=range(rank, rank + 1),
        share_count=ranks,
        device=torch.device("cpu"),
    )


def recipe_of(config: Config) -> Recipe:
    """What train.py makes of a configuration for one rank."""
    from allranks.training.building import Recipe  # needs torch, which most tests here do without

    return Recipe(
        task=config.task,
        model=config.model,
        optimizer=config.optimizer,
        scheduler=config.scheduler,
        trainer=config.trainer,
        seed=config.seed,
        batch_size=config.trainer.batch_size,
    )


def tree(folder: Path) -> list[str]:
    """Every file and directory below the folder, by its relative path."""
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def real_data() -> Path:
    """The folder with real MNIST: $ALLRANKS_DATA, or shared/data beside the repository."""
    candidates = [os.environ.get("ALLRANKS_DATA"), ROOT.parent / "shared/data"]
    for candidate in candidates:
        if candidate and (Path(candidate) / "MNIST/raw/train-images-idx3-ubyte.gz").is_file():
            return Path(candidate).resolve()
    pytest.skip("real MNIST is neither in $ALLRANKS_DATA nor in ../shared/data")
