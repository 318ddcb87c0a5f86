"""`run.wrap()`: a model of a loop of one's own, made ready for several ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from allranks.base.errors import ANYONE, UserError
from allranks.data.nests import described
from allranks.training.gradients import Gradients

REMEDY = "run.wrap(model, unused_parameters=True)"  # lets a step leave parameters out


def wrapped(
    model: nn.Module | Callable[[], nn.Module],
    gradients: Gradients,
    device: torch.device,
    unused_parameters: bool,
) -> nn.Module:
    """The model on this rank's device, in DDP or spread over the ranks where there are several.

    `model` may be a function that makes it. `unused_parameters`: whether a step may leave out some of its
    parameters. Raises UserError for a model that cannot be trained.
    """
    if gradients.is_spread:
        make = (lambda: model) if isinstance(model, nn.Module) else model
        try:
            return gradients.spread(make, "the model of run.wrap()", check=_check_module)
        except UserError as error:
            if error.said_by is None:  # all ranks have the same model, and so the same error
                error.said_by = ANYONE
            raise
    made = model if isinstance(model, nn.Module) else model()
    _check_module(made)
    made.to(device)
    return gradients.wrap(made, unused_parameters)


def _check_module(made: Any) -> None:
    """Raises UserError for what is not a model."""
    if not isinstance(made, nn.Module):
        raise UserError(
            f"run.wrap() takes a torch.nn.Module, not {described(made)}: other objects need no wrapping.",
            said_by=ANYONE,
        )
