"""What it costs to look at a run: its report, and `--debug`.

    python benchmarks/looking.py [RUNS]

Seconds of processor time, user and system together, of whole processes and of the processes that they have
started. Processor time changes little with what else the machine does. Medians of RUNS runs (3), on one
thread and with drawn digits.
"""

from __future__ import annotations

import resource
import statistics
import sys
from pathlib import Path

from common import scratch, timed

SMALL = ["data=synthetic", "model=mlp", "trainer.epochs=1", "data.train.count=6000", "data.test.count=1000",
         "data.split=[5000,1000]", "threads=1"]  # fmt: skip
ALLRANKS = [sys.executable, "-m", "allranks"]


def main() -> None:
    runs = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with scratch() as folder:
        run = folder / "run"
        cpu_s([*ALLRANKS, "train", *SMALL, "report=false", f"run.dir={run}"])
        commands = {
            "train report=false": ["train", *SMALL, "report=false"],
            "train report=true": ["train", *SMALL, "report=true"],
            "train --debug": ["train", "--debug", *SMALL],
            "report": ["report", str(run)],
            "report --records-only": ["report", "--records-only", str(run)],
        }
        for name, words in commands.items():
            taken = [cpu_s([*ALLRANKS, *words, *elsewhere(words, folder, turn)]) for turn in range(runs)]
            print(f"{name:24} {statistics.median(taken):5.1f} s", flush=True)


def elsewhere(words: list[str], folder: Path, turn: int) -> list[str]:
    """A training's override for a directory of its own; nothing for a command that is no training."""
    if words[0] != "train":
        return []
    name = "-".join(word.replace("=", "-") for word in (*words[1:], str(turn)) if "[" not in word)
    return [f"run.dir={folder / name}"]


def cpu_s(command: list[str]) -> float:
    """Runs the command; returns the processor time of its processes."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    timed(command)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


if __name__ == "__main__":
    main()
