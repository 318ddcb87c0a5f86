"""What sharding=fsdp saves and costs: memory of a rank, and how long a save of 1 GB holds the training up.

    python benchmarks/sharding.py

Memory: the most that the process of a rank has needed, less what one with a tiny model needs. It covers
weights, gradients, the optimizer's state and activations. `state` is what a rank keeps of weights and
optimizer state, as its files in the checkpoint show.

Saving: two ranks, a model with 1 GB of weights, and four saves, of which none waits for the one before it.
`waits` is how long the training stands still for a save, `writes` how long it takes until the checkpoint is
there. The first save needs new memory for its copy, and is shown by itself.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from statistics import median
from typing import Any

from common import environment, mpiexec, scratch, train

COMMON = [
    "model=vit", "data=synthetic", "data.train.count=80", "data.split=[64,16]", "data.test.count=16",
    "trainer.train_metrics=running", "threads=1", "device=cpu", "model.patch=14",
]  # fmt: skip
MEMORY = [*COMMON, "trainer.batch_size=16", "trainer.epochs=1", "optimizer=adamw", "checkpoint.keep=1"]
TINY = ["model.width=16", "model.depth=1"]
LARGE = ["model.width=768", "model.depth=8", "model.heads=12"]  # 57 million parameters
SAVING = [
    *COMMON, "model.width=2048", "model.depth=5", "model.heads=16", "trainer.batch_size=2",
    "trainer.max_steps=4", "trainer.epochs=1", "optimizer=sgd", "sharding=fsdp",
    "checkpoint.every_epochs=null", "checkpoint.every_steps=1", "checkpoint.keep=1",
]  # fmt: skip
RANK = "--rank"


def peak_and_state(folder: Path, ranks: int, sharded: bool) -> tuple[float, float]:
    """MB that a rank needs more than with a tiny model, and MB of its weights and optimizer state."""
    how = ["sharding=fsdp"] if sharded else []
    large = train(folder / f"large-{ranks}", [*MEMORY, *LARGE, *how], ranks)
    tiny = train(folder / f"tiny-{ranks}", [*MEMORY, *TINY, *how], ranks)
    [newest] = (folder / f"large-{ranks}" / "checkpoints").glob("step-*")
    mine = "*-00000-of-*.safetensors" if sharded else "*.safetensors"
    state = sum(path.stat().st_size for path in newest.glob(mine))
    peak = "memory/process_peak_bytes"
    return (large[peak] - tiny[peak]) / 1e6, state / 1e6


def as_rank(directory: str) -> None:
    """What each rank of the second part does: trains, and rank 0 prints how long the saves took."""
    from allranks import train as training
    from allranks.training.saver import Saver

    waits_s: list[float] = []
    writes_s: list[float] = []
    save, write = Saver.save, Saver._write_shards

    def timed(self: Saver) -> None:
        self.wait()
        self.runtime.add_up([0.0])  # the other ranks have waited, too
        writes = not self.is_saved()  # rank 0 knows; the call at a run's end finds nothing to do
        began = time.perf_counter()
        save(self)
        if writes:
            waits_s.append(time.perf_counter() - began)

    def written(self: Saver, *given: Any) -> None:
        began = time.perf_counter()
        write(self, *given)
        writes_s.append(time.perf_counter() - began)

    Saver.save = timed  # type: ignore[method-assign]
    Saver._write_shards = written  # type: ignore[method-assign]
    sys.argv[1:] = ["report=false", "console=quiet", *SAVING, f"run.dir={directory}"]
    training.main()
    if os.environ.get("PMI_RANK") == "0":
        print(json.dumps({"waits_s": waits_s, "writes_s": writes_s}))


def main() -> None:
    with scratch() as folder:
        alone, state_alone = peak_and_state(folder, 1, sharded=False)
        print(f"1 rank:            {alone:6.0f} MB at most, state {state_alone:5.0f} MB", flush=True)
        for ranks in (2, 4):
            peak, state = peak_and_state(folder, ranks, sharded=True)
            at_most = f"{peak:6.0f} MB at most ({peak / alone:.2f})"
            print(
                f"{ranks} ranks, sharded: {at_most}, state {state:5.0f} MB ({state / state_alone:.2f})",
                flush=True,
            )
        words = mpiexec(2, [__file__, RANK, str(folder / "saving")])
        done = subprocess.run(words, capture_output=True, text=True, env=environment(), check=True)
        took = json.loads(done.stdout.splitlines()[-1])
        for which, saves in (("first save", slice(0, 1)), ("later saves, median", slice(1, None))):
            waits, writes = median(took["waits_s"][saves]), median(took["writes_s"][saves])
            print(
                f"1 GB of weights on 2 ranks, {which}: waits {waits:.2f} s, writes {writes:.2f} s "
                f"({100 * waits / writes:.0f} %)"
            )


if __name__ == "__main__":
    if RANK in sys.argv:
        as_rank(sys.argv[-1])
    else:
        main()
