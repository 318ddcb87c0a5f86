"""What a checkpoint and what reproducible bits cost, side by side with runs that do without.

python benchmarks/checkpoints.py [ROUNDS]

`waits`: how long the training stands still for a save, from its begin to the next step. `epoch`: seconds of
an epoch's training with a checkpoint every 50 steps, against none but the last.
"""

from __future__ import annotations

import sys
import time
from pathlib import Path
from statistics import median

from common import scratch, train

MODELS = (["model=linear"], ["model=mlp"])
BASE = ["device=cpu", "trainer.epochs=2"]


def waits_ms(overrides: list[str], folder: Path) -> list[float]:
    """How long Saver.save() holds up the training, in a run in this process with a save every 150 steps:
    further apart than a save takes, so that none waits for the one before."""
    from allranks.compose import from_command_line
    from allranks.job.identity import RankIdentity
    from allranks.train import run
    from allranks.training.saver import Saver

    took: list[float] = []
    save = Saver.save

    def timed(self: Saver) -> None:
        writes = not self.is_saved()  # the call at a run's end finds nothing to do
        began = time.perf_counter()
        save(self)
        if writes:
            took.append(1000 * (time.perf_counter() - began))

    Saver.save = timed  # type: ignore[method-assign]
    try:
        [config] = from_command_line([*BASE, *overrides, "checkpoint.every_steps=150", f"run.dir={folder}"])
        run(config, RankIdentity("none"))
    finally:
        Saver.save = save  # type: ignore[method-assign]
    return took


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    lines: list[str] = []
    plain = str.maketrans(" ,", "--")
    with scratch() as folder:
        for model in MODELS:
            name = model[0].partition("=")[2]
            waits = waits_ms(model, folder / f"waits-{name}")
            seconds: dict[str, list[float]] = {}
            cases = {
                "none": ["checkpoint.every_epochs=null"],
                "every 50 steps": ["checkpoint.every_epochs=null", "checkpoint.every_steps=50"],
                "reproducible": ["checkpoint.every_epochs=null", "trainer.reproducible=true"],
                "reproducible, 2 ranks": ["checkpoint.every_epochs=null", "trainer.reproducible=true"],
            }
            for i in range(rounds):
                for case, overrides in cases.items():
                    ranks = 2 if case.endswith("2 ranks") else 1
                    run = train(
                        folder / f"{name}-{case.translate(plain)}-{i}", [*BASE, *model, *overrides], ranks
                    )
                    seconds.setdefault(case, []).append(min(e["time/train_s"] for e in run["epochs"]))
            base = median(seconds["none"])
            lines.append(
                f"{' '.join(model):<30} waits {median(waits):5.2f} ms (longest {max(waits):.2f}); "
                f"epoch {base:.2f} s; "
                + "; ".join(f"{c} x {median(s) / base:.2f}" for c, s in seconds.items() if c != "none")
            )
    print("\n".join(lines))


if __name__ == "__main__":
    main()
