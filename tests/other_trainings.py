"""Run directories as trainings leave them that are no classification: written down, nothing is trained."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

CONFIG = """\
name: {name}
seed: {seed}
trainer:
  epochs: 6
optimizer:
  lr: {lr}
checkpoint:
  best: {best}
"""

Lines = Sequence[dict[str, Any]]


def regression(epochs: int = 6) -> Lines:
    """A regression with three metrics, of which the last has no name that tells what is better."""
    return [
        {
            "epoch": epoch, "step": 10 * epoch, "lr": 0.1,
            "train/loss": 4.0 / epoch, "train/rmse": 2.0 / math.sqrt(epoch),
            "val/loss": 5.0 / epoch, "val/rmse": abs(epoch - 4) + 0.5, "val/spread": 0.1 * epoch,
            "time/train_s": 1.0, "time/eval_s": 0.5, "throughput/samples_per_s": 2000.0,
        }
        for epoch in range(1, epochs + 1)
    ]  # fmt: skip


def language_model(epochs: int = 6) -> Lines:
    """A language model that is evaluated after every second epoch, and has large and small numbers."""
    lines = []
    for epoch in range(1, epochs + 1):
        line: dict[str, Any] = {"epoch": epoch, "step": 1000 * epoch, "lr": 3e-4 / epoch}
        line |= {"train/loss": 9.0 / epoch, "time/train_s": 700.0, "throughput/samples_per_s": 1e6}
        if epoch % 2 == 0:
            line |= {"val/loss": 9.5 / epoch, "val/perplexity": math.exp(9.5 / epoch) * 1000}
        lines.append(line)
    return lines


def own_loop(steps: int = 1200) -> Lines:
    """A loop of the user's own that counts steps only, and has neither validation nor learning rate."""
    return [{"step": step, "train/loss": 1.0 / step, "energy": -5.0} for step in range(1, steps + 1)]


def without_metrics(epochs: int = 6) -> Lines:
    """A loop that logs nothing: only what is measured of every run."""
    return [
        {"epoch": epoch, "step": 10 * epoch, "time/train_s": 1.0, "throughput/samples_per_s": 50.0}
        for epoch in range(1, epochs + 1)
    ]


KINDS = {
    "regression": regression,
    "language model": language_model,
    "own loop": own_loop,
    "without metrics": without_metrics,
}


def make(
    directory: Path,
    kind: str,
    *,
    lines: Lines | None = None,
    best: str = "val/loss min",
    lr: float = 0.1,
    seed: int = 0,
    tests: dict[str, float] | None = None,
) -> Path:
    """Writes the directory of a run of this kind, finished if there are figures over the test set."""
    directory.mkdir(parents=True)
    name = kind.replace(" ", "-")
    (directory / "config.yaml").write_text(CONFIG.format(name=name, seed=seed, lr=lr, best=best))
    records = KINDS[kind]() if lines is None else lines
    (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in records))
    about = {"world_size": 1} if kind == "own loop" else {"world_size": 1, "epochs": 6}
    (directory / "environment.json").write_text(json.dumps(about))
    if tests is not None:
        summary = {"state": "finished", "world_size": 1, "model/parameters": 10, **tests}
        (directory / "summary.json").write_text(json.dumps(summary))
    return directory
