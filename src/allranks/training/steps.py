"""The figures of single steps: loss, metrics and learning rate of one step in so many, over all ranks.

Which steps are recorded follows from their numbers alone, so all ranks know it without sending a message.
For such a step each rank adds up the figures of its own shares of the batch. The sums stay on the device:
to read them at once would make the CPU wait for the GPU. From time to time, between two batches or at the
end of an epoch, all ranks exchange messages anyway. Then they bring the sums of all recorded steps together
in one message. If no steps are recorded, there is no message.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch

from allranks.runtime.runtime import Runtime
from allranks.training.metrics import Sums, figures_of
from allranks.training.training import Training


class _Recorded(NamedTuple):
    """One step whose figures have not been brought together yet."""

    step: int  # counted from 1
    epoch: int  # counted from 1
    lr: float
    sums: Sums  # of this rank's shares


class StepRecorder:
    """One rank's part in recording steps.

    A step is recorded if its number is a multiple of one of the numbers in `every`.
    """

    def __init__(self, every: Sequence[int], runtime: Runtime) -> None:
        self._every = every
        self._runtime = runtime
        self._recorded: list[_Recorded] = []

    def begin(self, training: Training) -> Sums | None:
        """The Sums to which the step that begins now adds its figures; None if it is not recorded."""
        step = training.position.step + 1
        if not any(step % every == 0 for every in self._every):
            return None
        lr = float(training.optimizer.param_groups[0]["lr"])
        sums = Sums(self._runtime, training.columns)
        self._recorded.append(_Recorded(step, training.position.epoch + 1, lr, sums))
        return sums

    def collect(self) -> list[dict[str, Any]]:
        """The figures of the steps recorded since the last call, over all ranks; all ranks call.

        The sums are added in the order of the shares. So the same shares give the same bits, on any number
        of ranks.
        """
        recorded = self._recorded
        self._recorded = []
        if not recorded:  # then no other rank has recorded a step either, and none waits in gather()
            return []
        mine = torch.stack([each.sums.rows for each in recorded], dim=1)  # [shares, steps, columns]
        totals = self._runtime.gather(mine.flatten(1)).sum(dim=0).view(mine.shape[1:])
        records = []
        for each, total in zip(recorded, totals.tolist(), strict=True):
            figures = figures_of(total, each.sums.columns)
            record = {"step": each.step, "epoch": each.epoch, "step/lr": each.lr, **figures.named("step")}
            records.append(record)
        return records
