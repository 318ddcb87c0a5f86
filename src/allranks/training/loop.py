"""The loop around a training: epochs of steps, with all that happens between two of them.

    for epoch in loop.epochs():
        for batch in loop.steps(batches):
            ...                        # one optimizer step
        loop.log({"val/loss": ...})    # the epoch's figures

The shipped training (engine.py) and a user's own loop (allranks.open) both run in this one. Between two
steps it shows the progress, tells the watchdog that this rank is well, and lets the ranks agree on a save
or a stop. At the end of an epoch it keeps the figures, and compares the ranks.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from torch import nn

from allranks.runtime.compare import compare_ranks
from allranks.runtime.runtime import Runtime
from allranks.training.control import Control
from allranks.training.position import TrainingPosition
from allranks.training.records import Records
from allranks.training.report import Reporter

Batch = TypeVar("Batch")


@dataclass
class Loop:
    """One rank's way through a run. All ranks take it together: they take the same steps."""

    runtime: Runtime
    position: TrainingPosition
    control: Control  # decides when to save and when to stop
    report: Reporter  # tells the user how far the run is
    records: Records  # keeps the figures of single steps, and hands figures to the trackers
    models: Sequence[nn.Module] = ()  # their weights are the same on all ranks, which is looked at
    averages: Sequence[nn.Module] = ()  # models besides, whose weights are not looked at
    figures: dict[str, float | int] = field(default_factory=dict)  # of the epoch that is under way
    _started: float = 0.0  # when its steps began, as if nothing had interrupted them
    _trained: float = 0.0  # when its last step was done; both by time.perf_counter()
    _examples: int | None = None  # that its steps take, over all ranks

    def epochs(self, count: int) -> Iterator[int]:
        """The number of each epoch that is left, from 0. Closes each one when the loop's body is done.

        Raises RunStopped, on all ranks, if they have agreed to stop.
        """
        while self.position.epoch < count:
            self._started = time.perf_counter() - self.position.epoch_s
            self._trained = self._started
            self.figures = {}
            yield self.position.epoch
            self.close_epoch()

    def steps(
        self,
        batches: Iterable[Batch],
        count: int | None,
        examples: int | None = None,
        steps_per_save: int = 1,
    ) -> Iterator[Batch]:
        """Each batch that is left of the epoch. The loop's body takes one step on it.

        `count` is the number of steps of the whole epoch, and `examples` the number of examples in these
        steps, over all ranks. Each is None if it is not known. A checkpoint is saved only after steps that
        are a multiple of `steps_per_save` in the epoch, or its last one. Raises RunStopped, on all ranks,
        if they have agreed to stop.
        """
        position = self.position
        progress = self.runtime.progress
        self._examples = examples
        is_due = False
        progress.begin_steps(position.step)
        for batch in self.report.progress(batches, position, count):
            try:
                yield batch
            except GeneratorExit:  # the body has left the loop by `break`: the step was taken, and counts
                position.step += 1
                position.epoch_steps += 1
                self._examples = None  # it is not known how many examples these steps had
                self._trained = time.perf_counter()
                raise
            position.step += 1
            position.epoch_steps += 1
            is_last = position.epoch_steps == count
            is_due |= self.control.is_due(position.step)
            if is_last or (is_due and position.epoch_steps % steps_per_save == 0):
                is_due = False
                self._meet(evaluates_next=is_last)
            progress.completed(position.step)
        self.runtime.synchronize()
        self._trained = time.perf_counter()
        self.share_buffers()

    def share_buffers(self) -> None:
        """All ranks take over rank 0's buffers, which are evaluated and saved; all ranks call.

        Each rank's BatchNorm layers have statistics of that rank's examples. steps() calls this at its end.
        If its loop was left by `break`, the ranks call it once they know that all of them have left.
        """
        for model in (*self.models, *self.averages):
            self.runtime.share_buffers(model)

    def _meet(self, evaluates_next: bool) -> None:
        self.position.epoch_s = time.perf_counter() - self._started
        # The records are written before a checkpoint is saved, so that they hold every recorded step up to
        # the checkpoint.
        self.records.collect()
        self.control.meet(evaluates_next)

    def log(self, figures: Mapping[str, float | int]) -> None:
        """Adds figures to the epoch that is under way; they are the same on all ranks."""
        self.figures.update(figures)

    def close_epoch(self) -> None:
        """Keeps the figures of the epoch, and begins the counts of the next one."""
        position = self.position
        position.epoch += 1
        for model in self.models:
            compare_ranks(self.runtime, model)
        train_s = self._trained - self._started
        samples_per_s = (self._examples or 0) / max(train_s, 1e-9)
        metrics: dict[str, float | int] = {
            "epoch": position.epoch,
            "step": position.step,
            **self.figures,
            "time/train_s": train_s,
            "time/eval_s": time.perf_counter() - self._trained,
        }
        if self._examples is not None:
            metrics["throughput/samples_per_s"] = samples_per_s
        metrics |= self.records.of_epoch(samples_per_s)
        position.history.append(metrics)
        position.epoch_steps = 0
        position.epoch_s = 0.0
        self.report.epoch(metrics)
        self.records.epoch_closed(position.history)
        self.control.meet()
