"""Learning-rate schedules that torch does not have ready-made."""

from __future__ import annotations

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def warmup_cosine(optimizer: Optimizer, length: int, warmup: float = 0.1, floor: float = 0.0) -> LambdaLR:
    """Rises linearly over the first `warmup` share of `length` steps, then falls as half a cosine.

    The first step is taken at 1/(warm-up steps) of the full rate, the last near `floor` times it.
    """
    rising = max(1, round(warmup * length)) if warmup > 0 else 0

    def factor(step: int) -> float:
        if step < rising:
            return (step + 1) / rising
        done = min(1.0, (step - rising) / max(1, length - rising))
        return floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * done))

    return LambdaLR(optimizer, factor)
