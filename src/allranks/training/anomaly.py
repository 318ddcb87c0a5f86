"""`trainer.detect_anomaly=true`: finds the layer, or the operation, that first gives a number not finite.

The engine notices anyway when a loss or a gradient is not finite. It cannot say where that began. With this
option each layer's output is looked at, and torch watches each operation of the backward pass. Both take
time, so the option is off by default.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from allranks.base.errors import UserError
from allranks.base.text import one_line

_REMEDY = "Take a smaller optimizer.lr or trainer.clip_norm, or look at the data and at this layer."


@contextmanager
def detecting(model: nn.Module) -> Iterator[None]:
    """In the block a number that is not finite raises UserError, on its rank, and its place is named."""
    handles = [
        module.register_forward_hook(_hook_of(name))
        for name, module in model.named_modules()
        if next(module.children(), None) is None
    ]
    try:
        with torch.autograd.set_detect_anomaly(True):
            yield
    except RuntimeError as error:
        if "nan values" not in str(error):
            raise
        raise UserError(
            f"The gradient becomes NaN in the backward pass: {one_line(error)} The warning before this "
            f"shows the line of the forward pass. {_REMEDY}"
        ) from error
    finally:
        for handle in handles:
            handle.remove()


def _hook_of(name: str) -> Any:
    def look(module: nn.Module, _: Any, output: Any) -> None:
        if not isinstance(output, torch.Tensor) or not output.is_floating_point():
            return
        if not bool(output.isfinite().all()):
            raise UserError(
                f"The output of the model's layer {name or 'model'} ({type(module).__name__}) is not "
                f"finite, and those of the layers before it were. {_REMEDY}"
            )

    return look
