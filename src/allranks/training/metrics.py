"""Loss and accuracy, added up on the device, and over the ranks only when they are asked for.

Reading a number from a GPU makes the processor wait for it. So nothing is read after each step: the sums
stay on the device until the end of an epoch, and then cross the ranks in one message.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from allranks.runtime.runtime import Runtime

COLUMNS = 3  # the numbers of a row: summed loss, correct answers, examples. Checkpoints hold these rows.


class Figures(NamedTuple):
    """How well a model does on some examples of all ranks."""

    loss: float  # mean over the examples
    accuracy: float  # in percent
    examples: int  # how many they are


class Sums:
    """Sums of loss, correct answers and examples, in float64, on the device.

    `rows` [shares of this rank, COLUMNS] has a row for each share that this rank takes of a batch. They are
    kept apart so that total() can add them in the order of the shares, whichever rank had which share.
    """

    def __init__(self, runtime: Runtime) -> None:
        # Apple's GPUs have no float64.
        dtype = torch.float32 if runtime.device.type == "mps" else torch.float64
        self.rows = torch.zeros(len(runtime.shares), COLUMNS, dtype=dtype, device=runtime.device)

    def add(self, row: int, loss_sum: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Adds some examples of this rank's share number `row`.

        loss_sum: a scalar, the sum over the examples; logits [n, classes]; labels [n].
        """
        sums = self.rows[row]
        sums[0] += loss_sum
        sums[1] += (logits.argmax(dim=1) == labels).sum()
        sums[2] += len(labels)

    def total(self, runtime: Runtime) -> Figures:
        """Figures over all ranks' examples; all ranks call. Of no examples the loss and accuracy are 0.

        All rows are brought together before they are added, so that the order of the additions is that of
        the shares.
        """
        loss, correct, count = runtime.gather(self.rows).sum(dim=0).tolist()
        divisor = max(count, 1)
        return Figures(loss / divisor, 100 * correct / divisor, round(count))
