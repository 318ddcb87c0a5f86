"""The weight of one rank's share of a global batch."""

from __future__ import annotations

import math

import torch


def share_weight(count: int, total: int, loss: torch.Tensor) -> float | torch.Tensor:
    """The factor of a loss that makes the sum over all shares the mean over the global batch.

    The loss is a scalar: the mean over the share's `count` examples, of `total` over all ranks. If the
    loss is the sum over them, `count` is 1. If a share is empty, its batch is a stand-in, `count` is 0,
    and so is the factor. A loss that is not finite makes the factor NaN. The gradient then is NaN too, and
    after it is added up over the ranks, all of them see that.
    """
    weight = count / total
    if loss.is_cpu:
        return weight if math.isfinite(loss.item()) else math.nan
    # 0 for a finite loss; inf * 0 is NaN. This stays on the device, so the CPU need not wait for it.
    return weight + loss * 0
