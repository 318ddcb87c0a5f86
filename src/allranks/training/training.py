"""What a training consists of: the model, its optimizer, its learning rates, and where it stands.

The engine changes it step by step, a checkpoint holds all of it, and the reporter tells of it. It stands in
a module of its own so that these three need not know each other.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from allranks.base.errors import UserError
from allranks.base.text import did_you_mean, one_line
from allranks.training.gradients import Gradients
from allranks.training.metrics import Column, Sums
from allranks.training.position import TrainingPosition


@dataclass
class Schedule:
    """A learning-rate scheduler and when to step it."""

    scheduler: Any = None
    every_step: bool = False
    monitor: str | None = None  # the metric that a plateau scheduler watches

    def after_step(self) -> None:
        """Steps the scheduler after an optimizer step, if it is stepped so often."""
        if self.scheduler is not None and self.every_step:
            self._step()

    def after_epoch(self, metrics: Mapping[str, float]) -> None:
        """Steps the scheduler after an epoch, if it is stepped so often; `metrics` are the epoch's.

        Raises UserError if the metric that it watches is not among them.
        """
        if self.scheduler is None or self.every_step:
            return
        if self.monitor is None:
            self._step()
            return
        if self.monitor not in metrics:
            raise UserError(
                f"scheduler.monitor={self.monitor} is not measured: give one of {', '.join(metrics)}."
                f"{did_you_mean(self.monitor, metrics)}",
                said_by=0,
            )
        self._step(metrics[self.monitor])

    def _step(self, *metric: float) -> None:
        try:
            self.scheduler.step(*metric)
        except (ArithmeticError, TypeError, ValueError) as error:  # of its arguments, seen only now
            what = f"{type(self.scheduler).__name__} cannot go on ({one_line(error)})"
            raise UserError(f"scheduler: {what}: look at its values.", said_by=0) from error


@dataclass
class Training:
    """All that changes while a run trains: what a checkpoint holds."""

    model: nn.Module  # as it is evaluated and saved
    trained: nn.Module  # as it takes steps: the same weights, compiled and in DDP where that is asked for
    gradients: Gradients  # the backward passes of its steps
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    task: Any  # says what the loss is, and what is measured (allranks.tasks)
    sums: Sums  # of the running epoch, where trainer.train_metrics=running
    # The buffers that the model's state_dict leaves out, as its constructor has made them.
    first_buffers: Mapping[str, torch.Tensor] = field(default_factory=dict)
    position: TrainingPosition = field(default_factory=TrainingPosition)
    is_sharded: bool = False  # whether each rank holds a slice of each weight (runtime/sharding.py)
    epoch_lr: float = 0.0  # the learning rate at the beginning of the epoch that is under way

    @property
    def columns(self) -> Sequence[Column]:
        """The metrics of the task that are sums."""
        return self.sums.columns

    @property
    def parameters(self) -> int:
        """The number of the model's parameters."""
        return sum(p.numel() for p in self.model.parameters())
