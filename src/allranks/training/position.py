"""Where a training stands: how many epochs and steps it has behind it, and the figures of its epochs.

The shipped training has one TrainingPosition, and so has a loop of the user's own. A checkpoint holds it,
so that a run which goes on knows where. No torch.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass
class TrainingPosition:
    """How far a training has come."""

    epoch: int = 0  # completed
    step: int = 0  # completed, those that were skipped included
    epoch_steps: int = 0  # steps taken in the epoch that is under way
    epoch_s: float = 0.0  # seconds that these steps took
    history: list[dict[str, Any]] = field(default_factory=list)  # the metrics of each completed epoch
