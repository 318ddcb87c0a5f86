"""What the benchmarks share: starting a run, and reading what it left."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

BIN = Path(sys.executable).parent
RANK_VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TRAINING = ["-m", "allranks.train", "report=false"]  # a report is made after the training


@contextmanager
def scratch() -> Iterator[Path]:
    with TemporaryDirectory(prefix="allranks-benchmark-") as folder:
        yield Path(folder)


def environment() -> dict[str, str]:
    """This process's environment without what a launcher may have left in the shell."""
    return {name: value for name, value in os.environ.items() if name not in RANK_VARIABLES}


def torchrun(ranks: int, program: list[str], *options: str) -> list[str]:
    """The command line that starts `program` (its words after `python`) on so many ranks of this host."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}"]
    return [*launcher, *options, *program]


def mpiexec(ranks: int, program: list[str]) -> list[str]:
    """The same with the mpiexec that is installed beside this Python."""
    return [str(BIN / "mpiexec"), "-n", str(ranks), sys.executable, *program]


def command(overrides: list[str], ranks: int = 1, launcher: str = "mpiexec") -> list[str]:
    """The command line of a run; one rank needs no launcher."""
    program = [*TRAINING, *overrides]
    if ranks == 1:
        return [sys.executable, *program]
    return torchrun(ranks, program) if launcher == "torchrun" else mpiexec(ranks, program)


def train(folder: Path, overrides: list[str], ranks: int = 1, launcher: str = "mpiexec") -> dict:
    """Trains in `folder`, which must not exist; returns summary.json and, as `epochs`, metrics.jsonl."""
    took_s = timed(command([*overrides, f"run.dir={folder}"], ranks, launcher))
    summary = json.loads((folder / "summary.json").read_text())
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return {**summary, "epochs": [json.loads(line) for line in lines], "took_s": took_s}


def timed(argv: list[str]) -> float:
    """Wall-clock seconds of a whole process, its imports included."""
    started = time.perf_counter()
    done = subprocess.run(argv, capture_output=True, text=True, env=environment(), check=False)
    if done.returncode:
        sys.exit(f"{' '.join(argv)}\n{done.stdout}{done.stderr}")
    return time.perf_counter() - started
