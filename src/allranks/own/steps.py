"""The figures of single steps of a user's own loop: those of one step in so many, over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from allranks.own.state import Means
from allranks.runtime.runtime import Runtime


class OwnSteps:
    """One rank's part in recording what run.log() gets in single steps.

    A step is recorded if its number is a multiple of one of the numbers in `every`. Its figures stay on the
    device until the ranks exchange messages anyway.
    """

    def __init__(self, every: Sequence[int], runtime: Runtime) -> None:
        self._every = every
        self._means = Means(runtime)
        # From the number of each recorded step to its epoch, both counted from 1.
        self._epochs: dict[int, int] = {}
        self._now: int | None = None  # the step that is going on, if it is recorded

    def begin(self, step: int, epoch: int) -> None:
        """A step begins; both numbers count from 1."""
        is_recorded = any(step % every == 0 for every in self._every)
        self._now = step if is_recorded else None
        if is_recorded:
            self._epochs[step] = epoch

    def add(self, name: str, value: torch.Tensor | float, count: int, row: int = 0) -> None:
        """Adds a figure of the step that is going on, the mean over `count` examples of a share.

        `row` is the number of the share among those of this rank.
        """
        if self._now is not None:
            self._means.add(f"{self._now} {name}", value, count, row)

    def collect(self) -> list[dict[str, Any]]:
        """The figures of the steps recorded since the last call, over all ranks; all ranks call."""
        epochs = self._epochs
        self._epochs = {}
        if not epochs:  # then no other rank has recorded a step either
            return []
        records = {step: {"step": step, "epoch": epoch} for step, epoch in epochs.items()}
        figures = self._means.take()
        for key, value in figures.items():
            step, _, name = key.partition(" ")
            short = name.removeprefix("train/")
            # A step may have both loss and train/loss. Then the second one keeps its whole name.
            is_taken = short != name and f"{step} {short}" in figures
            record: dict[str, Any] = records[int(step)]
            record[f"step/{name if is_taken else short}"] = value
        return list(records.values())
