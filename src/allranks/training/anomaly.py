"""`detect_anomaly`: finds the layer or operation that first gives NaN or infinity.

The shipped training (engine.py) always notices when a loss or a gradient is not finite, but it cannot say
where that began. With trainer.detect_anomaly=true it computes such a step once more: then each layer's
output is checked, and torch checks each operation of the backward pass. All other steps take no longer than
without the option.

A loop of the user's own (own/stepping.py) cannot be made to compute a step again. With
allranks.open(detect_anomaly=True) the same is checked in each of its steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from allranks.base.errors import UserError
from allranks.base.text import one_line
from allranks.data.nests import leaves

Told = Callable[[str], UserError]  # makes an error of what was found, with all that else helps to find it


@contextmanager
def detecting(models: Mapping[str, nn.Module], told: Told) -> Iterator[None]:
    """In the block each layer's output is checked, and torch checks each operation of a backward pass.

    The first output that is not finite raises the UserError that `told` makes. torch's own error is a
    RuntimeError, of which named_operation() makes a UserError. The models come by the names that messages
    put before those of their layers; "" for a model that is the only one.
    """
    handles = []
    for prefix, model in models.items():
        for name, module in model.named_modules(prefix=prefix):
            if next(module.children(), None) is None:  # a module without parts of its own: a layer
                handles.append(module.register_forward_hook(_hook_of(name, told)))
    try:
        with torch.autograd.set_detect_anomaly(True):
            yield
    finally:
        for handle in handles:
            handle.remove()


def _hook_of(name: str, told: Told) -> Any:
    def look(module: nn.Module, _: Any, output: Any) -> None:
        for each in leaves(output):  # a recurrent layer gives its output and its state
            if not isinstance(each, torch.Tensor) or not each.is_floating_point():
                continue
            if not bool(each.isfinite().all()):
                raise told(
                    f"The output of the model's layer {name or 'model'} ({type(module).__name__}) is not "
                    "finite, and those of the layers before it were."
                )

    return look


@contextmanager
def named_operation(told: Told) -> Iterator[None]:
    """The block is a backward pass. What torch says of an operation that gives NaN becomes a UserError."""
    try:
        yield
    except RuntimeError as error:
        if "nan values" not in str(error):
            raise
        raise told(
            f"The gradient becomes NaN in the backward pass: {one_line(error)} The warning before this "
            "shows the line of the forward pass."
        ) from error
