"""Real command lines in real processes, and what they leave behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PYTHON = sys.executable
TRAIN = [PYTHON, "-m", "allranks.train"]
TIMEOUT_S = 180  # many times what any command here takes; it only stops a hang

# Drawn in a tenth of a second, and trained in another. One thread: the tests may share their cores.
SMALL = (
    "data=synthetic", "data.train.count=1600", "data.test.count=400", "data.split=[1200,400]",
    "device=cpu", "threads=1",
)  # fmt: skip

# What a launcher, a scheduler or the user's shell may have put into this test process's environment.
LEAKY = re.compile(
    r"(RANK|WORLD_SIZE|GROUP_|ROLE_|MASTER_|LOCAL_|TORCHELASTIC_|PMI|MPI|OMPI_|MV2_|PALS_|JSM_|HYDRA_|I_MPI_"
    r"|SLURM|PBS|PALS|ALLRANKS_|OMP_|MKL_|GLOO_|PYTHON|COVERAGE_|CUDA_VISIBLE)"
)


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
        if named := re.search(r"everything about this run is in (.*)", self.out):
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


def launcher(kind: str | None, ranks: int) -> list[str]:
    """The words before `-m allranks.train`; kind is None, "mpiexec" or "torchrun"."""
    if kind is None:
        return [PYTHON]
    if kind == "torchrun":
        return [PYTHON, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
    assert kind == "mpiexec"
    return [mpiexec(), "-n", str(ranks), PYTHON]


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
    token = f"ALLRANKS_TEST={uuid.uuid4()}"
    name, _, value = token.partition("=")
    process = subprocess.Popen(
        argv, cwd=cwd, env={**clean_environment(), **(env or {}), name: value}, start_new_session=True,
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        out, err = process.communicate(timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _end(_marked(token))
        out, err = process.communicate(timeout=30)
        pytest.fail(f"still running after {timeout_s} s: {' '.join(argv)}\n{out}\n{err}")
    deadline = time.monotonic() + 5
    while (left := _marked(token)) and time.monotonic() < deadline:
        time.sleep(0.05)
    _end(left)
    return Done(process.returncode, out, err, cwd, list(left.values()))


def _marked(token: str) -> dict[int, str]:
    """Processes (id and command line) that carry the token in their environment: all of one command."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if token.encode() in (process / "environ").read_bytes().split(b"\0"):
                line = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
                found[int(process.name)] = line
        except OSError:  # gone, or not ours
            continue
    return found


def _end(processes: Mapping[int, str]) -> None:
    for pid in processes:
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


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
