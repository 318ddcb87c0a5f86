"""The tutorial's figures on real MNIST: the mean over seeds, at 1 and 2 ranks, beside what is expected.

python benchmarks/figures.py [SEEDS]
"""

from __future__ import annotations

import sys
from statistics import mean, stdev

from common import scratch, train

EXPECTED = {  # the same recipe over 8 seeds, in percent: validation, test, and how far a mean may be off
    "tutorial_linear": (90.2, 90.9, 0.3),
    "tutorial_mlp": (93.6, 93.7, 0.6),
    "tutorial_step": (93.3, 93.4, 0.6),
}


def spread(values: list[float]) -> str:
    """By how much the values differ: their standard deviation; nothing for a single one, which has none."""
    return f"+-{stdev(values):5.2f}" if len(values) > 1 else ""


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 4
    good = True
    print(f"{'run':<17}{'ranks':>6}{'val %':>16}{'expected':>10}{'test %':>16}{'expected':>10}")
    with scratch() as folder:
        for name, (val, test, margin) in EXPECTED.items():
            for ranks in (1, 2):
                runs = [
                    train(
                        folder / f"{name}-{ranks}-{seed}",
                        [f"experiment={name}", "device=cpu", f"seed={seed}"],
                        ranks,
                    )
                    for seed in range(seeds)
                ]
                vals = [run["epochs"][-1]["val/accuracy"] for run in runs]
                tests = [run["test/accuracy"] for run in runs]
                good &= abs(mean(vals) - val) <= margin and abs(mean(tests) - test) <= margin
                print(
                    f"{name:<17}{ranks:>6}{mean(vals):>9.2f} {spread(vals):>7}{val:>10.1f}"
                    f"{mean(tests):>9.2f} {spread(tests):>7}{test:>10.1f}"
                )
    sys.exit(0 if good else "a mean is further off than it may be")


if __name__ == "__main__":
    main()
