"""What drawn digits are good for: three models on data=synthetic, and that cnn on real MNIST's test set.

python benchmarks/drawn.py [SEEDS]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from common import scratch, train

REAL_TEST = [
    "data.test._target_=allranks.data.mnist.load",
    "~data.test.count",
    "~data.test.seed",
    "+data.test.name=mnist",
    f"+data.test.root={Path(os.environ.get('ALLRANKS_DATA', 'data')).absolute()}",
]
CNN = ["experiment=cnn", "trainer.epochs=5"]


def main() -> None:
    seeds = int(sys.argv[1]) if len(sys.argv) > 1 else 1
    print(
        f"{'seed':>4}{'linear':>9}{'mlp':>9}{'cnn':>9}{'cnn on real MNIST':>20}   (test accuracy, percent)"
    )
    with scratch() as folder:
        for seed in range(seeds):
            runs = [["model=linear"], ["model=mlp"], CNN, [*CNN, *REAL_TEST]]
            accuracies = [
                train(folder / f"{seed}-{i}", ["data=synthetic", "device=cpu", f"seed={seed}", *run])[
                    "test/accuracy"
                ]
                for i, run in enumerate(runs)
            ]
            print(f"{seed:>4}" + "".join(f"{a:>9.2f}" for a in accuracies[:3]) + f"{accuracies[3]:>20.2f}")


if __name__ == "__main__":
    main()
