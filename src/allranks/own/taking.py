"""Checks the arguments of run.take_step() and run.count_flops().

It also has the advice that ends each message about a number that is not finite.
"""

from __future__ import annotations

import math
from typing import Any

from allranks.base.errors import ANYONE, UserError
from allranks.data.nests import described
from allranks.training.flops import Peak

IF_NOT_FINITE = (
    "Take a smaller learning rate or clip_norm, look at the data, or go on without such steps by "
    "allranks.open(stop_at_nonfinite=False)."
)
IF_FOUND = "Take a smaller learning rate or clip the gradient, or look at the data and at this layer."


def check_arguments(optimizer: Any, clip_norm: Any, scaler: Any) -> None:
    """Raises UserError for arguments of run.take_step() that are not what it needs."""
    if not hasattr(optimizer, "param_groups") or not callable(getattr(optimizer, "step", None)):
        raise UserError(
            f"run.take_step() got {described(optimizer)}: give an optimizer of torch.optim, or one with "
            "param_groups and step().",
            said_by=ANYONE,
        )
    if clip_norm is not None and not _is_positive(clip_norm):
        raise UserError(
            f"run.take_step() got clip_norm={clip_norm!r}: give a finite number > 0, or leave it out.",
            said_by=ANYONE,
        )
    if scaler is not None and not callable(getattr(scaler, "unscale_", None)):
        raise UserError(
            f"run.take_step() got {described(scaler)} as scaler: give a torch.amp.GradScaler, by whose "
            "scale() the loss was multiplied.",
            said_by=ANYONE,
        )


def check_counted(compute: Any, examples: Any, precision: Any) -> None:
    """Raises UserError for arguments of run.count_flops() that are not what it needs."""
    if not callable(compute):
        raise UserError(
            f"run.count_flops() got {described(compute)}: give a function that takes a forward and a "
            "backward pass, as in `lambda: loss(model(x), y).backward()`.",
            said_by=ANYONE,
        )
    if not isinstance(examples, int) or examples < 1:
        raise UserError(
            f"run.count_flops() got examples={examples!r}: give the number of examples, 1 or more.",
            said_by=ANYONE,
        )
    if precision not in Peak._fields or precision == "tf32":
        raise UserError(
            f"run.count_flops() got precision={precision!r}: give fp64, fp32, bf16 or fp16.", said_by=ANYONE
        )


def _is_positive(number: Any) -> bool:
    return isinstance(number, int | float) and math.isfinite(number) and number > 0
