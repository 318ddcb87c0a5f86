"""Seconds of a training epoch (evaluation left out), side by side: ranks, gradients' carrier, precision.

python benchmarks/ranks.py [ROUNDS]
"""

from __future__ import annotations

import sys
from statistics import median

from common import scratch, train

CASES = (
    ("1 rank", 1, "mpiexec", []),
    ("1 rank, 1 thread", 1, "mpiexec", ["threads=1"]),
    ("2 ranks, MPI", 2, "mpiexec", []),
    ("2 ranks, gloo", 2, "torchrun", []),
    ("4 ranks, MPI", 4, "mpiexec", []),
    ("4 ranks, gloo", 4, "torchrun", []),
)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    with scratch() as folder:
        for model, precision in (("linear", "fp64"), ("mlp", "fp64"), ("mlp", "fp32")):
            seconds: dict[str, list[float]] = {}
            for i in range(rounds):
                for case, ranks, launcher, overrides in CASES:
                    label = f"{model}-{precision}-{ranks}-{launcher}-{len(overrides)}-{i}"
                    choice = [f"model={model}", f"trainer.precision={precision}", "trainer.epochs=3"]
                    run = train(folder / label, [*choice, "device=cpu", *overrides], ranks, launcher)
                    seconds.setdefault(case, []).append(min(e["time/train_s"] for e in run["epochs"]))
            print(f"{model}, {precision}, global batch 128")
            base = median(seconds["1 rank"])
            for case, values in seconds.items():
                print(f"  {case:<20}{median(values):7.2f} s  {median(values) / base:6.2f} x one rank's")


if __name__ == "__main__":
    main()
