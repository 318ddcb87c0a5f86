"""The optimizer's step: the gradient is looked at and clipped, and the weights follow it.

The shipped training (engine.py) and a loop of the user's own (run.take_step()) both take this way. A step
whose gradient is not finite would spoil the weights for good, so it is left out, on all ranks alike.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from allranks.base.errors import UserError
from allranks.base.text import one_line
from allranks.runtime.runtime import Runtime
from allranks.runtime.sharding import local
from allranks.training.position import TrainingPosition

log = logging.getLogger(__name__)

# With fp16 GradScaler multiplies the loss by a scale, and halves the scale after each step that overflows.
# The scale begins at 2**16. After 30 halvings it is too small to be the reason for an infinite gradient.
_LEAST_SCALE = 2.0**-14


def named(part: str) -> AbstractContextManager[Any]:
    """Gives the block this name in a profile (profiling.PARTS), if one is being recorded."""
    if torch.autograd._profiler_enabled():
        return torch.profiler.record_function(part)
    return nullcontext()


def take_step(
    optimizer: torch.optim.Optimizer,
    parameters: Iterable[nn.Parameter],
    clip_norm: float | None,
    scaler: torch.amp.GradScaler | None,
    spread_over: Runtime | None,
) -> bool:
    """Clips the gradient and lets the optimizer take its step; all ranks call.

    The gradient of `parameters` is scaled down so that its L2 norm is at most `clip_norm`, if that is
    given. If the model is spread over the ranks, each holds slices of the gradient, and `spread_over`
    leads to the other ranks. Raises UserError, on all ranks, if the optimizer cannot work on slices.

    Returns False, with no step taken, where the gradient is not finite. With fp16 a gradient may overflow
    now and then: GradScaler leaves such a step out by itself, and lowers its scale. This counts as a fault,
    and returns False, only once the scale is very low (_LEAST_SCALE).
    """
    with named("optimizer"):
        if scaler is None or not scaler.is_enabled():
            if not _is_finite(optimizer, spread_over):
                return False
            _clip(parameters, clip_norm)
            _step(optimizer, is_spread=spread_over is not None)
            return True

        scaler.unscale_(optimizer)
        _clip(parameters, clip_norm)
        scaler.step(optimizer)
        scaler.update()
        # GradScaler counts the steps that it has taken since it last lowered its scale.
        return scaler.get_scale() >= _LEAST_SCALE or scaler.state_dict()["_growth_tracker"] > 0


def _step(optimizer: torch.optim.Optimizer, is_spread: bool) -> None:
    """A step of the optimizer; raises UserError, on all ranks, where it cannot work on slices."""
    try:
        optimizer.step()
    except NotImplementedError as error:
        if not is_spread:
            raise
        raise UserError(
            f"{type(optimizer).__name__} cannot take a step on a model that is spread over the "
            f"ranks ({one_line(error)}): take another optimizer, such as adamw, or sharding=none.",
            said_by=0,
        ) from error


def _clip(parameters: Iterable[nn.Parameter], clip_norm: float | None) -> None:
    if clip_norm is not None:
        nn.utils.clip_grad_norm_(parameters, clip_norm)


def _is_finite(optimizer: torch.optim.Optimizer, spread_over: Runtime | None) -> bool:
    """Whether all gradients are finite.

    If each rank holds slices of the gradients, `spread_over` is the runtime of the ranks, and all ranks
    call.
    """
    gradients = [
        _as_real(local(parameter.grad))
        for group in optimizer.param_groups
        for parameter in group["params"]
        if parameter.grad is not None
    ]
    if not gradients:  # for example if the optimizer's parameters are used in some steps only
        return True
    # If one number is not finite, the sum is not finite either. A sum is the quickest check of a tensor.
    sums = [gradient.sum() for gradient in gradients]
    # item() makes the CPU wait for a GPU. So on a GPU it is called once, and not once for each sum.
    total = sum(each.item() for each in sums) if sums[0].is_cpu else torch.stack(sums).sum().item()
    if spread_over is not None:
        [total] = spread_over.add_up([total])
    if math.isfinite(total):
        return True
    # The sum of large finite numbers may overflow. So each number is checked, which takes longer.
    is_finite = all(bool(gradient.isfinite().all()) for gradient in gradients)
    if spread_over is not None:
        [ranks] = spread_over.add_up([float(is_finite)])
        is_finite = ranks == spread_over.world_size
    return is_finite


def _as_real(gradient: torch.Tensor) -> torch.Tensor:
    if gradient.is_sparse:  # as of an Embedding(sparse=True): all its other numbers are 0
        gradient = gradient.coalesce().values()
    return torch.view_as_real(gradient) if gradient.is_complex() else gradient


def tell_not_finite(
    losses: Sequence[torch.Tensor], position: TrainingPosition, runtime: Runtime, stops: bool, remedy: str
) -> None:
    """Names the ranks whose loss is not finite, in a warning or in an error; all ranks call.

    `losses`: the losses of this rank, one for each piece of its shares. `position`: where the training
    stands before this step. Raises UserError, with `remedy`, on all ranks if `stops`; otherwise rank 0 logs
    a warning.
    """
    step = position.step + 1
    epoch = position.epoch + 1

    def decide(bad_losses: list[str | None]) -> list[str]:
        ranks = [f"rank {rank} ({loss})" for rank, loss in enumerate(bad_losses) if loss]
        what = f"The loss of {', '.join(ranks)} is" if ranks else "The gradient is"
        text = f"{what} not finite in step {step} (epoch {epoch}); the step was not applied."
        if stops:
            raise UserError(f"{text} {remedy}")
        return [text] * len(bad_losses)

    loss = sum(float(loss) for loss in losses)
    mine = None if math.isfinite(loss) else str(loss)
    text = runtime.meeting.settle(mine, decide)
    if runtime.is_main:
        log.warning(text)
