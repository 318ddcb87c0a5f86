"""Two ranks on two cores beside one rank on one: seconds of an epoch of the cnn, in pairs.

    python benchmarks/scaling.py [PAIRS]

Global batch 128, one thread a rank, drawn digits, gradients through MPI. Evaluations are left out. Each
pair takes about 25 s; the default, 6, about 2.5 minutes on two cores that do nothing else.
"""

from __future__ import annotations

import sys
from statistics import median

from common import scratch, train

# 100 steps an epoch, of which the quicker one of two counts; hardly anything to evaluate.
CASE = [
    "model=cnn", "data=synthetic", "data.train.count=12928", "data.split=[12800,128]",
    "data.test.count=128", "trainer.batch_size=128", "trainer.epochs=2", "trainer.train_metrics=running",
    "threads=1", "device=cpu", "checkpoint.every_epochs=null",
]  # fmt: skip


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    ratios = []
    with scratch() as folder:
        for pair in range(pairs):
            seconds = []
            for ranks in (1, 2):
                run = train(folder / f"{pair}-{ranks}", CASE, ranks)
                seconds.append(min(epoch["time/train_s"] for epoch in run["epochs"]))
            one, two = seconds
            ratios.append(one / two)
            print(
                f"1 rank {one:6.2f} s   2 ranks {two:6.2f} s   {one / two:5.2f} times as fast", flush=True
            )
    print(f"median of {pairs}: {median(ratios):.2f} times as fast")


if __name__ == "__main__":
    main()
