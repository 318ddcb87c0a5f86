"""Backward passes: the gradient of a step, added up over the pieces of a share and over the ranks.

    gradients = Gradients(runtime, spreading=None, remedy="...")
    model = gradients.wrap(Net())
    for row in gradients.each_share(seed, step):
        pieces = those of share number `row` of this rank
        with gradients.in_pieces():
            for number, piece in enumerate(pieces, start=1):
                with gradients.piece(is_last=number == len(pieces)):
                    gradients.backward(weighted loss of model(piece))

The shipped training (engine.py) and a loop of the user's own (own/stepping.py) both take this way. The
ranks exchange gradients once in a step. As a rule each rank has one share, and the exchange is in the
backward pass of its last piece. In a reproducible run a rank may have several shares. The gradient of each
is put aside then, and after the last share those of all ranks are added up in one fixed order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from allranks.base.errors import ANYONE, UserError
from allranks.config import ShardingConfig
from allranks.data.randomness import mixed, reseed
from allranks.runtime.gradients import OrderedSum, count_as_ours, has_others
from allranks.runtime.runtime import Runtime

_BY_ITSELF = (
    "The program has called backward() of a loss. Then each rank's share of a batch counts alike, however "
    "many examples it has, and nobody looks whether the loss is finite: write run.backward(loss) in its "
    "place."
)


@dataclass
class _InDDP:
    """A model that DDP is around."""

    model: nn.Module
    parameters: list[nn.Parameter]  # to walk through all modules in each step would take longer
    # Whether its gradients are summed over the ranks already. If a share is computed in pieces, this
    # happens in the last piece, during the first backward pass in which the model takes part.
    is_summed: bool = False

    def gradients(self) -> list[tuple[torch.Tensor, int] | None]:
        """Each gradient, and how often torch has seen its numbers change."""
        found = [each.grad for each in self.parameters]
        return [None if each is None else (each, each._version) for each in found]

    def differs_from(self, before: list[tuple[torch.Tensor, int] | None]) -> bool:
        """Whether any gradient is another one now than those that gradients() has returned."""
        for parameter, known in zip(self.parameters, before, strict=True):
            now = parameter.grad
            if known is None or now is None:
                if known is not None or now is not None:
                    return True
            # DDP may put a tensor of its own, which has a count of its own, in the place of a gradient.
            elif now is not known[0] or now._version != known[1]:
                return True
        return False


class Gradients:
    """The models of one training, on one rank, and the backward passes through them."""

    def __init__(
        self, runtime: Runtime, spreading: ShardingConfig | None, remedy: str, gives_zeros: bool = False
    ) -> None:
        """Begins without a model.

        `spreading` says how models are spread over the ranks; None if every rank has all of them.
        `remedy` is what lets a step leave parameters out, for messages. `gives_zeros`: whether in a
        reproducible run a parameter that a step leaves out gets a gradient of zeros, and not None.
        """
        self._runtime = runtime
        self._spreading = spreading
        self._remedy = remedy
        self._gives_zeros = gives_zeros
        self.models: list[nn.Module] = []  # all that wrap() and spread() have returned, without DDP
        self._in_ddp: list[_InDDP] = []  # of several ranks that add up in the backward pass
        # In a reproducible run: all parameters of all models, each once, and the sums of those that are
        # trained, one sum for each type of numbers.
        self._parameters: dict[nn.Parameter, None] = {}
        self._ordered_sums: list[OrderedSum] = []
        # How often backward() was called. In a reproducible run the sum over a step's shares counts as
        # well.
        self.passes = 0
        # The value of `passes` at the beginning of the share that is being computed; None outside of a
        # share. It shows, in a reproducible run, whether backward() has been called for this share.
        self._passes_before_share: int | None = None
        self.are_summed = False  # whether gradients have been added up over the ranks
        # Whether a backward pass now adds up over the ranks. In all pieces but the last it does not.
        self._adds_up = True

    @property
    def is_spread(self) -> bool:
        """Whether the models are spread over the ranks: spread() is to be called, and not wrap()."""
        return self._spreading is not None

    def wrap(self, model: nn.Module, unused_parameters: bool = False) -> nn.Module:
        """The model, in DDP where ranks add up their gradients in the backward pass; all ranks call.

        `unused_parameters`: whether a step may leave out some of its parameters.
        """
        wrapped = self._runtime.wrap(model, unused_parameters, self._remedy)
        if wrapped is not model:
            self._in_ddp.append(_InDDP(wrapped, list(wrapped.parameters())))
        if self._runtime.virtual_ranks:
            self._parameters |= dict.fromkeys(model.parameters())
            self._begin_alike(model)
        self.models.append(inner(model))
        return wrapped

    def spread(
        self,
        make: Callable[[], nn.Module],
        name: str,
        dtype: torch.dtype | None = None,
        check: Callable[[nn.Module], None] = lambda model: None,
    ) -> nn.Module:
        """The model that `make` builds, spread over the ranks as the settings say; all ranks call.

        `name` names the model in messages, `dtype` is the type of its floating-point weights (None: what
        they have), and `check` is called with the model before its weights are made. Raises UserError if
        the model cannot be spread.
        """
        assert self._spreading is not None
        model = self._runtime.shard(make, self._spreading, name, dtype, check)
        self.models.append(model)
        return model

    @torch.no_grad()
    def _begin_alike(self, model: nn.Module) -> None:
        """Gives all ranks the weights and buffers of rank 0, as DDP does; all ranks call."""
        if self._runtime.world_size == 1:
            return
        for tensor in (*model.parameters(), *model.buffers()):
            everyones = tensor.detach().clone(memory_format=torch.contiguous_format)
            tensor.copy_(self._runtime.broadcast(everyones))

    def each_share(self, seed: int, step: int, again: int = 0) -> Iterator[int]:
        """The number of each share that this rank takes of a step's batch; all ranks call.

        The loop's body computes the gradient of that share. Before it the random numbers are seeded from
        the seed, the step and the share. `again` counts the earlier calls for the same step, which drew
        other numbers. In a reproducible run the sum over all shares is the gradient after the loop, in an
        order that does not depend on the number of ranks. Gradients that were there before are added to.
        """
        runtime = self._runtime
        sums = self._sums_in_order()
        aside = _taken_out(sums)
        for row, share in enumerate(runtime.shares):
            place = (seed, step, share, again) if again else (seed, step, share)
            reseed(mixed(*place), runtime.device)
            self._passes_before_share = self.passes
            yield row
            self.refuse_others()
            self._passes_before_share = None
            for each in sums:
                each.take(row)
        if sums:
            for each in sums:
                each.give(runtime.gather)
            self.passes += 1
            self.are_summed = True
        _add_back(aside)

    def _sums_in_order(self) -> list[OrderedSum]:
        """The sums of all parameters that are trained in a reproducible run; none in any other run.

        A parameter may be frozen for a while, as one half of a GAN is. It stays among them.
        """
        summed = {parameter for each in self._ordered_sums for parameter in each.parameters}
        wanted = [each for each in self._parameters if each.requires_grad or each in summed]
        if len(wanted) > len(summed):
            by_type: dict[torch.dtype, list[nn.Parameter]] = {}
            for parameter in wanted:
                by_type.setdefault(parameter.dtype, []).append(parameter)
            shares = len(self._runtime.shares)
            self._ordered_sums = [OrderedSum(each, shares, self._gives_zeros) for each in by_type.values()]
        return self._ordered_sums

    def backward(self, loss: torch.Tensor) -> None:
        """loss.backward(); the gradients are added up over the ranks, unless other pieces are to come.

        The loss is weighted already. Raises UserError if parameters took no part that should have, and
        if the program has called backward() of a loss before, in the same share or step.
        """
        self.refuse_others()
        aside = self._put_sums_aside()
        self.passes += 1
        if self.is_spread:  # FSDP sends gradients to the other ranks
            self._runtime.progress.arrive()
        before = [each.gradients() for each in self._in_ddp]
        loss.backward()
        if self._adds_up:
            for each, known in zip(self._in_ddp, before, strict=True):
                # A model that took no part in this pass may have gradients of earlier pieces. They are
                # added up in a later pass of the last piece.
                if each.differs_from(known):
                    each.is_summed |= self._runtime.check_summed(each.model, self._remedy)
            self.are_summed = True
        for each in self._in_ddp:
            count_as_ours(each.model)
        _add_back(aside)

    def refuse_others(self) -> None:
        """Raises UserError if the program has called loss.backward() by itself since the last pass.

        This is noticed on several ranks, where DDP has then added up gradients that are not weighted by the
        examples of each rank's share, and in a reproducible run.
        """
        is_first = self.passes == self._passes_before_share
        is_in_share = is_first and any(each.has_gradients for each in self._ordered_sums)
        if is_in_share or any(has_others(each.model) for each in self._in_ddp):
            raise UserError(_BY_ITSELF, said_by=ANYONE)

    @contextmanager
    def in_pieces(self) -> Iterator[None]:
        """In the block one share of a batch is computed in pieces, whose gradients are added up."""
        aside = self._put_sums_aside()
        for each in self._in_ddp:
            each.is_summed = False
        yield
        _add_back(aside)
        for each in self._in_ddp:
            each.is_summed = True

    @contextmanager
    def piece(self, is_last: bool) -> Iterator[None]:
        """The block works on one piece. The ranks exchange gradients only in the last one.

        Raises UserError if a model has gradients of earlier pieces, and took no part in the last one.
        """
        self._adds_up = is_last
        try:
            with ExitStack() as without_sync:
                if not is_last:
                    for each in self._in_ddp:
                        without_sync.enter_context(self._runtime.without_sync(each.model))
                yield
            if not is_last:
                return
            for each in self._in_ddp:
                # This model took no part in the last piece. If it has gradients of earlier pieces, these
                # are not summed, and check_summed() raises an error.
                if not each.is_summed:
                    self._runtime.check_summed(each.model, self._remedy)
        finally:
            self._adds_up = True

    def _put_sums_aside(self) -> list[tuple[nn.Parameter, torch.Tensor]]:
        """Removes the gradients that are summed over the ranks already, and returns them.

        DDP adds up over the ranks whatever a gradient holds after the backward pass. A gradient that is
        such a sum already, because the program adds up gradients over several steps, would be added up once
        more.
        """
        aside = []
        for each in self._in_ddp:
            if not each.is_summed:
                continue
            for parameter in each.parameters:
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


def _taken_out(sums: Sequence[OrderedSum]) -> list[tuple[nn.Parameter, torch.Tensor]]:
    """Takes the gradients that are there out of the parameters of these sums, and returns them."""
    aside = []
    for parameter in (parameter for each in sums for parameter in each.parameters):
        if parameter.grad is not None:
            # A copy, because the gradient may be a view of the numbers that the sum works with.
            aside.append((parameter, parameter.grad.clone()))
            parameter.grad = None
    return aside


def _add_back(aside: list[tuple[nn.Parameter, torch.Tensor]]) -> None:
    for parameter, gradient in aside:
        parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
