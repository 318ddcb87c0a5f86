"""DDP's buckets, brought into their final order before the first step of a process.

DDP packs gradients into buckets. After its first backward pass it packs them anew, in the order in which
the gradients were ready. A ring all-reduce adds up in an order that depends on the buckets, so the last
bits of the sums depend on them too. A run that goes on from a checkpoint must therefore use the same
buckets as a run that was never stopped. So the first batch of every process goes forward and backward once
more than it would, before anything else, and that gradient is discarded.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import nn


def settle_at_first_batch(
    wrapped: nn.parallel.DistributedDataParallel, device: torch.device, check: Callable[[], object]
) -> None:
    """Lets the model in DDP settle its buckets when it gets its first batch in training.

    `check` is called after that backward pass, and raises UserError where some parameters took no part.
    """

    def before(_: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        if not (wrapped.training and torch.is_grad_enabled()):
            return
        handle.remove()
        _settle(wrapped, given, named, device, check)

    handle = wrapped.register_forward_pre_hook(before, prepend=True, with_kwargs=True)


def _settle(
    wrapped: nn.parallel.DistributedDataParallel,
    given: tuple[Any, ...],
    named: dict[str, Any],
    device: torch.device,
    check: Callable[[], object],
) -> None:
    """One forward and backward pass after which model, gradients and random numbers are as before."""
    parameters = list(wrapped.parameters())
    gradients = [parameter.grad for parameter in parameters]
    buffers = [buffer.clone() for buffer in wrapped.buffers()]
    syncs = wrapped.require_backward_grad_sync
    # What is not finite here, such as 0 times infinity, is none of the training's numbers.
    with random_numbers_kept(device), torch.autograd.set_detect_anomaly(False):
        for parameter in parameters:
            parameter.grad = None
        wrapped.require_backward_grad_sync = True  # also where the first batch comes in several pieces
        parts = [part.sum() * 0 for part in _differentiable(wrapped(*given, **named))]
        if parts:
            torch.stack([part.float() for part in parts]).sum().backward()
            check()
    wrapped.require_backward_grad_sync = syncs
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    with torch.no_grad():
        for buffer, before in zip(wrapped.buffers(), buffers, strict=True):
            buffer.copy_(before)


def _differentiable(output: Any) -> Iterator[torch.Tensor]:
    """The tensors in a model's output from which a gradient reaches its parameters."""
    if isinstance(output, torch.Tensor):
        if output.requires_grad:
            yield output
    elif isinstance(output, Mapping):
        for part in output.values():
            yield from _differentiable(part)
    elif isinstance(output, list | tuple):
        for part in output:
            yield from _differentiable(part)
    elif hasattr(output, "__dataclass_fields__"):
        for part in vars(output).values():
            yield from _differentiable(part)


@contextmanager
def random_numbers_kept(device: torch.device) -> Iterator[None]:
    """After the block all generators of random numbers are as they were before."""
    python = random.getstate()
    numpy = np.random.get_state()
    on_device = device.type in ("cuda", "xpu")
    kind = {"device_type": device.type} if on_device else {}
    with torch.random.fork_rng([device.index] if on_device else [], **kind):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)
