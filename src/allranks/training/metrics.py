"""Sums that stay on the device until they are asked for, then cross the ranks in one go."""

from __future__ import annotations

import torch

from allranks.runtime.runtime import Runtime


class Sums:
    """Loss, correct answers and examples, added up in float64 on the device: no `.item()` per step.

    `rows` [shares of this rank, 3] has a row for each share that the rank takes of a batch.
    """

    def __init__(self, runtime: Runtime) -> None:
        # mps has no float64
        dtype = torch.float32 if runtime.device.type == "mps" else torch.float64
        self.rows = torch.zeros(len(runtime.shares), 3, dtype=dtype, device=runtime.device)

    def add(self, row: int, loss_sum: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """loss_sum: scalar, summed over the examples; logits [n, classes]; labels [n]."""
        sums = self.rows[row]
        sums[0] += loss_sum
        sums[1] += (logits.argmax(dim=1) == labels).sum()
        sums[2] += len(labels)

    def total(self, runtime: Runtime) -> tuple[float, float, int]:
        """Mean loss, accuracy in percent, and number of examples, over all ranks.

        All shares are brought together before they are added, so that the order of the additions is
        that of the shares, whichever ranks they came from.
        """
        loss, correct, count = runtime.gather(self.rows).sum(dim=0).tolist()
        return loss / max(count, 1), 100 * correct / max(count, 1), round(count)
