"""The models of a loop of one's own, and how their gradients are added up over the ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from allranks.base.errors import ANYONE, UserError
from allranks.config import ShardingConfig
from allranks.data.nests import described
from allranks.runtime.runtime import Runtime

_UNUSED = "run.wrap(model, unused_parameters=True)"


class Gradients:
    """The models of one run, on one rank, and the backward passes through them."""

    def __init__(self, runtime: Runtime, spreading: ShardingConfig | None) -> None:
        """`spreading` says how models are spread over the ranks; None where every rank has all of them."""
        self._runtime = runtime
        self._spreading = spreading
        self.models: list[nn.Module] = []  # all that wrap() has returned, without DDP around them
        self._in_ddp: list[nn.Module] = []  # those that DDP is around: on several ranks
        self.passes = 0  # how many backward passes there were
        self.are_summed = False  # whether gradients have been added up over the ranks
        self._has_pieces = False  # whether a batch is gone through in pieces now
        # Whether a backward pass now adds up over the ranks. In all pieces but the last it does not.
        self._adds_up = True

    def wrap(self, model: nn.Module | Callable[[], nn.Module], unused_parameters: bool) -> nn.Module:
        """The model on this rank's device, in DDP or spread over the ranks where there are several.

        `unused_parameters`: whether a step may leave out some of its parameters. Raises UserError for a
        model that cannot be trained.
        """
        if self._spreading is not None:
            make = (lambda: model) if isinstance(model, nn.Module) else model
            try:
                spread = self._runtime.shard(
                    make, self._spreading, "the model of run.wrap()", check=_check_module
                )
            except UserError as error:
                if error.said_by is None:  # all ranks have the same model, and so the same error
                    error.said_by = ANYONE
                raise
            self.models.append(spread)
            return spread
        made = model if isinstance(model, nn.Module) else model()
        _check_module(made)
        made.to(self._runtime.device)
        wrapped = self._runtime.wrap(made, unused_parameters, _UNUSED)
        self._in_ddp.append(wrapped)
        self.models.append(inner(wrapped))
        return wrapped

    def backward(self, loss: torch.Tensor) -> None:
        """loss.backward(); the gradients are added up over the ranks, unless other pieces are to come.

        The loss is weighted already. Raises UserError where parameters took no part that should have.
        """
        aside = [] if self._has_pieces else self._put_sums_aside()
        self.passes += 1
        if self._spreading is not None:  # FSDP sends gradients to the other ranks
            self._runtime.progress.arrive()
        loss.backward()
        if self._adds_up:
            for model in self._in_ddp:
                self._runtime.check_summed(model, _UNUSED)
            self.are_summed = True
        _add_back(aside)

    @contextmanager
    def in_pieces(self) -> Iterator[None]:
        """In the block the program goes through one batch in pieces, whose gradients are added up."""
        aside = self._put_sums_aside()
        self._has_pieces = True
        try:
            yield
            _add_back(aside)
        finally:
            self._has_pieces = False

    @contextmanager
    def piece(self, is_last: bool) -> Iterator[None]:
        """The block works on one piece. The ranks exchange gradients only in the last one."""
        self._adds_up = is_last
        try:
            with ExitStack() as without_sync:
                for model in () if is_last else self._in_ddp:
                    without_sync.enter_context(self._runtime.without_sync(model))
                yield
        finally:
            self._adds_up = True

    def _put_sums_aside(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Takes those gradients that are sums over the ranks already out of their parameters.

        DDP adds up over the ranks whatever it finds in a gradient after the backward pass. What is a sum
        already, as where a program adds up gradients over several steps, would be added up once more.
        """
        aside = []
        for model in self._in_ddp if self.are_summed and self._runtime.world_size > 1 else ():
            for parameter in model.parameters():
                if parameter.grad is not None:
                    # A copy, because the gradient is a view into a bucket, which DDP writes to.
                    aside.append((parameter, parameter.grad.clone()))
                    parameter.grad = None
        return aside


def inner(model: nn.Module) -> nn.Module:
    """The user's own module, without DDP and torch.compile around it."""
    bare: Any = model
    while isinstance(bare, nn.parallel.DistributedDataParallel) or hasattr(bare, "_orig_mod"):
        bare = bare.module if isinstance(bare, nn.parallel.DistributedDataParallel) else bare._orig_mod
    assert isinstance(bare, nn.Module)
    return bare


def _check_module(made: Any) -> None:
    """Raises UserError for what is no model."""
    if not isinstance(made, nn.Module):
        raise UserError(
            f"run.wrap() takes a torch.nn.Module, not {described(made)}: other objects need no wrapping.",
            said_by=ANYONE,
        )


def _add_back(aside: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
    for parameter, gradient in aside:
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
