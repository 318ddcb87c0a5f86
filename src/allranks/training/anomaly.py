"""`trainer.detect_anomaly=true`: finds the layer or operation that first gives NaN or infinity.

The engine always notices when a loss or a gradient is not finite, but it cannot say where that began. With
this option it computes such a step once more: then each layer's output is checked, and torch checks each
operation of the backward pass. All other steps take no longer than without the option.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from allranks.base.errors import UserError
from allranks.base.text import one_line
from allranks.data.nests import leaves

_REMEDY = "Take a smaller optimizer.lr or trainer.clip_norm, or look at the data and at this layer."


@contextmanager
def detecting(model: nn.Module) -> Iterator[None]:
    """In the block the first number that is not finite raises UserError, which names the place."""
    handles = [
        module.register_forward_hook(_hook_of(name))
        for name, module in model.named_modules()
        if next(module.children(), None) is None  # a module without parts of its own: a layer
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
        for each in leaves(output):  # a recurrent layer gives its output and its state
            if not isinstance(each, torch.Tensor) or not each.is_floating_point():
                continue
            if not bool(each.isfinite().all()):
                raise UserError(
                    f"The output of the model's layer {name or 'model'} ({type(module).__name__}) is not "
                    f"finite, and those of the layers before it were. {_REMEDY}"
                )

    return look
