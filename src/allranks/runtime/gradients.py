"""Gradients are *summed* over the ranks: by hooks of DDP, or in one fixed order.

DDP by itself takes the mean over the ranks, which is right only where all shares of a batch are equal. Here
each share's loss is weighted by its number of examples, and the weighted gradients are added up.

DDP calls a hook with a bucket: a piece of the gradient, as one flat tensor. It looks at the annotations of
a hook, which must be types and not texts: so there is no `from __future__ import annotations` here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed import GradBucket
from torch.nn.parallel import DistributedDataParallel

from allranks.base.text import some
from allranks.runtime import mpi
from allranks.runtime.watch.progress import Progress

_SUM = "allranks_sum"  # the attribute of a model in DDP that holds its BucketSum


@dataclass
class BucketSum:
    """What the hooks of one model in DDP work with, and what they remember."""

    progress: Progress
    comm: Any  # MPI's communicator of all ranks; None if torch's process group adds up
    # Whether the last bucket has come since left_out() was called. DDP hands its buckets to the hook in
    # their order, and each only once all its gradients are there.
    has_last: bool = False
    sums: int = 0  # how often gradients were added up, by whomever
    ours: int = 0  # how many of these count_as_ours() has seen

    def note(self, bucket: GradBucket) -> None:
        """To be called when this bucket is added up."""
        self.has_last = bucket.is_last()
        if self.has_last:
            self.sums += 1


def sum_by_mpi(state: BucketSum, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sums the bucket through MPI, in place. On CPU that beats gloo by 2 to 4 times for small models
    (docs/performance.md)."""
    state.progress.arrive()
    mpi.allreduce(state.comm, bucket.buffer())
    state.note(bucket)
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def sum_by_torch(state: BucketSum, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Sums the bucket through torch's default process group: NCCL, XCCL or gloo."""
    state.progress.arrive()
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    state.note(bucket)
    return future.then(lambda done: done.value()[0])


def add_up_over_ranks(wrapped: DistributedDataParallel, progress: Progress, comm: Any) -> None:
    """Makes a model in DDP add up its gradients over the ranks, and not take their mean.

    `comm` is MPI's communicator of all ranks; where it is None, torch's process group adds up.
    """
    state = BucketSum(progress, comm)
    wrapped.register_comm_hook(state, sum_by_torch if comm is None else sum_by_mpi)
    setattr(wrapped, _SUM, state)


def count_as_ours(model: nn.Module) -> None:
    """The backward passes of the model up to now were made here, and not by the program itself."""
    state: BucketSum | None = getattr(model, _SUM, None)
    if state is not None:
        state.ours = state.sums


def has_others(model: nn.Module) -> bool:
    """Whether the program itself has made backward passes whose gradients were added up over the ranks."""
    state: BucketSum | None = getattr(model, _SUM, None)
    return state is not None and state.sums != state.ours


def is_summed(model: nn.Module) -> bool:
    """Whether the backward pass just made has added up the model's gradients over the ranks.

    Called before left_out(), if at all.
    """
    state: BucketSum | None = getattr(model, _SUM, None)
    return state is not None and state.has_last


def left_out(model: nn.Module) -> str:
    """The parameters without which DDP could not add up the gradients of a backward pass; "" for none.

    Called once after each backward pass whose gradients are added up. If a parameter takes no part in it,
    DDP waits for its gradient: this rank goes on without the sum, and the other ranks wait for this one. A
    model that is not in DDP, or that took no part at all, is passed over.
    """
    state: BucketSum | None = getattr(model, _SUM, None)
    if state is None:
        return ""
    is_summed = state.has_last
    state.has_last = False
    count_as_ours(model)
    if is_summed:
        return ""
    inner = model.module
    assert isinstance(inner, nn.Module)
    trained = {name: p for name, p in inner.named_parameters() if p.requires_grad}
    without = [name for name, parameter in trained.items() if parameter.grad is None]
    if len(without) == len(trained):
        return ""
    if not without:  # an earlier piece of the share (trainer.accumulate) gave all of them a gradient
        return "some parameters"
    # torch.compile puts _orig_mod. before each name.
    return some([name.removeprefix("_orig_mod.") for name in without])


class OrderedSum:
    """Adds up the gradients of all shares in one binary tree, whatever the number of ranks.

    The sum of floating-point numbers depends on the order of the additions. A rank holds 2^k neighbouring
    shares, which are the leaves of a whole subtree. It adds these up itself, and every rank finishes the
    tree from all ranks' sums. So the same additions are made in the same order on 1, 2 or 4 ranks.

    parameters: those that have gradients, of one type and on one device; shares: how many this rank takes
    of a batch; gives_zeros: whether a parameter that no share has used gets a gradient of zeros, and not
    None. An optimizer goes on moving a parameter whose gradient is 0, by its momentum or its weight decay.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], shares: int, gives_zeros: bool = True
    ) -> None:
        self.parameters = parameters
        self.gives_zeros = gives_zeros
        # As autograd lays out a gradient in memory: a convolution's may have its channels last.
        self.strides = [torch.empty_like(p).stride() for p in parameters]
        first = parameters[0]
        self._elements = sum(p.numel() for p in parameters)
        # [shares, elements]: the gradient of each share, all parameters one after the other. If a
        # parameter that no share has used is to be left alone, a further number for each parameter is 1 if
        # the share has used it, and else 0: so the sum says on every rank whether any share has.
        width = self._elements if gives_zeros else self._elements + len(parameters)
        self.rows = torch.zeros(shares, width, dtype=first.dtype, device=first.device)
        self._used_here = [False] * len(parameters)  # whether any share of this rank has used it

    @property
    def has_gradients(self) -> bool:
        """Whether any of the parameters has a gradient."""
        return any(parameter.grad is not None for parameter in self.parameters)

    def take(self, row: int) -> None:
        """Moves the gradients of share number `row` out of the parameters; a missing one counts as 0."""
        used = [parameter.grad is not None for parameter in self.parameters]
        for parameter, part in zip(self.parameters, self._parts(self.rows[row]), strict=True):
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(parameter.grad)
                parameter.grad = None
        if not self.gives_zeros:
            self.rows[row, self._elements :] = torch.tensor(used, dtype=self.rows.dtype)
            self._used_here = [before or now for before, now in zip(self._used_here, used, strict=True)]

    def give(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Makes the sum over all shares of all ranks the parameters' gradient.

        `gather` brings the ranks' tensors [1, n] together to [world_size, n], in the order of the ranks.
        """
        total = _tree(gather(_tree(self.rows)))[0]
        for parameter, part, is_used in zip(
            self.parameters, self._parts(total), self._used(total), strict=True
        ):
            parameter.grad = part if is_used else None

    def _used(self, total: torch.Tensor) -> list[bool]:
        """Whether each parameter gets a gradient; `total` is the sum over all shares."""
        used_here = self._used_here
        self._used_here = [False] * len(self.parameters)
        if self.gives_zeros or all(used_here):
            return [True] * len(self.parameters)
        # To read the numbers makes the processor wait for a GPU, so they are read only where they matter.
        return total[self._elements :].ne(0).tolist()

    def _parts(self, row: torch.Tensor) -> list[torch.Tensor]:
        """Views of a row, one for each parameter, in its shape and its order in memory.

        Fused optimizers go through the memory of a parameter and of its gradient in one order, and take it
        for the same order without looking.
        """
        pieces = row[: self._elements].split([p.numel() for p in self.parameters])
        return [
            piece.as_strided(p.shape, strides, piece.storage_offset())
            for piece, p, strides in zip(pieces, self.parameters, self.strides, strict=True)
        ]


def _tree(rows: torch.Tensor) -> torch.Tensor:
    """[1, n] from [2^k, n]: neighbours are added, then neighbouring sums, and so on."""
    while len(rows) > 1:
        rows = rows[0::2] + rows[1::2]
    return rows
