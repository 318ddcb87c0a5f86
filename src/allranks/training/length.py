"""How long a run is: its epochs and steps, and where trainer.max_steps ends it. No torch.

A run is over after `trainer.epochs` epochs, or after `trainer.max_steps` steps, whichever comes first.
If the steps end it in the middle of an epoch, that epoch is evaluated and recorded like a whole one. The
`length` in the section of a learning-rate schedule stands for the length that the run really has.
"""

from __future__ import annotations

from typing import NamedTuple

from allranks.config import TrainerConfig


class RunLength(NamedTuple):
    """The length of a whole run."""

    epochs: int  # the last of them may be cut short
    steps: int  # in all
    steps_per_epoch: int  # in each epoch but the last

    def steps_in(self, epoch: int) -> int:
        """The steps of one epoch, counted from 0."""
        return min(self.steps_per_epoch, self.steps - epoch * self.steps_per_epoch)


def run_length(trainer: TrainerConfig, steps_per_epoch: int) -> RunLength:
    """The length of a run whose whole epochs have `steps_per_epoch` steps."""
    steps = trainer.epochs * steps_per_epoch
    if trainer.max_steps is None or steps <= trainer.max_steps:
        return RunLength(trainer.epochs, steps, steps_per_epoch)
    epochs = -(-trainer.max_steps // steps_per_epoch)  # rounded up
    return RunLength(epochs, trainer.max_steps, steps_per_epoch)
