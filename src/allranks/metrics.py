"""Sums that stay on the device until they are asked for, then cross the ranks in one reduction."""

from __future__ import annotations

from collections.abc import Callable

import torch


class Sums:
    """Loss, correct answers and examples, added up in float64 on the device: no `.item()` per step."""

    def __init__(self, device: torch.device) -> None:
        # mps has no float64
        dtype = torch.float32 if device.type == "mps" else torch.float64
        self._sums = torch.zeros(3, dtype=dtype, device=device)

    def add(self, loss_sum: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """loss_sum: scalar, summed over the examples; logits [n, classes]; labels [n]."""
        correct = (logits.argmax(dim=1) == labels).sum()
        self._sums[0] += loss_sum
        self._sums[1] += correct
        self._sums[2] += len(labels)

    def total(self, sum_over_ranks: Callable[[torch.Tensor], torch.Tensor]) -> tuple[float, float, int]:
        """Mean loss, accuracy in percent, and number of examples, over all ranks."""
        loss, correct, count = sum_over_ranks(self._sums).tolist()
        return loss / max(count, 1), 100 * correct / max(count, 1), round(count)
