"""Models whose results depend on how a batch is cut into shares: a reproducible run refuses them.

A reproducible run has the same bits on any number of ranks, because each batch is cut into the same shares
everywhere. A model that learns something in its forward pass, as the running mean of a BatchNorm layer,
learns it from the shares that its own rank has. So other ranks learn something else.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from allranks.base.errors import UserError
from allranks.base.text import some


def refuse_batch_norm(model: nn.Module, asked_by: str) -> None:
    """Raises UserError for a model with BatchNorm; `asked_by` is the setting that the user has given."""
    if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise UserError(
            f"{asked_by} does not go with BatchNorm, whose figures depend on how a batch is cut: take "
            "GroupNorm or LayerNorm in the model."
        )


def buffers_of(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the model's buffers, by name: what refuse_changed_buffers() compares with."""
    return {name: buffer.clone() for name, buffer in model.named_buffers()}


def refuse_changed_buffers(
    before: Mapping[str, torch.Tensor], model: nn.Module, named: str, asked_by: str, remedy: str
) -> None:
    """Raises UserError if the buffers of the model are not any more as buffers_of() gave them.

    `named` names the model in the message, `asked_by` is the setting that the user has given, and `remedy`
    says how to do without it.
    """
    changed = [
        name
        for name, buffer in model.named_buffers()
        if name not in before or not torch.equal(buffer, before[name])
    ]
    if changed:
        raise UserError(
            f"{asked_by} does not go with {named}, which changes its buffer {some(changed)} in training: "
            "that depends on how a batch is cut into shares. Take a layer without such a buffer "
            f"(GroupNorm, LayerNorm), or {remedy}."
        )
