"""How gradients are added up over the ranks: by communication hooks of DDP, or in one fixed order.

By itself DDP takes the *mean* over the ranks. That is right only where all ranks have the same number of
examples. So here gradients are *summed*, and the engine gives each example its weight.

DDP hands the gradients over in buckets, each with the gradients of several parameters, and calls a hook for
each bucket. (No `from __future__ import annotations` here: DDP compares the hooks' annotations.)
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import GradBucket

from allranks.runtime import mpi


def sum_by_mpi(runtime: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Hook for DDP that sums a bucket over the ranks by MPI, in place.

    On CPUs, and for small models, MPI takes a half to a quarter of gloo's time (docs/performance.md).
    """
    runtime.progress.arrive()
    mpi.allreduce(runtime.comm, bucket.buffer())
    future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def sum_by_torch(runtime: Any, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
    """Hook for DDP that sums a bucket over the ranks by the default process group: NCCL, XCCL or gloo."""
    runtime.progress.arrive()
    future = dist.all_reduce(bucket.buffer(), async_op=True).get_future()
    return future.then(lambda done: done.value()[0])


class OrderedSum:
    """Adds up the gradients of all shares in one binary tree, whatever the number of ranks.

    A rank holds 2^k neighbouring shares, that is a whole subtree: it adds them up itself, and every rank
    finishes the tree from all ranks' sums. So the same additions are made in the same order.
    """

    def __init__(self, parameters: Sequence[torch.nn.Parameter], shares: int) -> None:
        self.parameters = parameters
        first = parameters[0]
        elements = sum(p.numel() for p in parameters)
        self.rows = torch.zeros(shares, elements, dtype=first.dtype, device=first.device)

    def take(self, row: int) -> None:
        """Moves the gradients of one share out of the parameters; a missing gradient counts as zeros."""
        for parameter, part in zip(self.parameters, self._parts(self.rows[row]), strict=True):
            if parameter.grad is None:
                part.zero_()
            else:
                part.copy_(parameter.grad)
                parameter.grad = None

    def give(self, gather: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Makes the sum over all shares of all ranks the parameters' gradient.

        `gather` brings the ranks' rows together, in the order of the ranks.
        """
        total = _tree(gather(_tree(self.rows)))[0]
        for parameter, part in zip(self.parameters, self._parts(total), strict=True):
            parameter.grad = part

    def _parts(self, row: torch.Tensor) -> list[torch.Tensor]:
        pieces = row.split([p.numel() for p in self.parameters])
        return [piece.view_as(p) for piece, p in zip(pieces, self.parameters, strict=True)]


def _tree(rows: torch.Tensor) -> torch.Tensor:
    """[1, n] from [2^k, n]: neighbours are added, then neighbouring sums, and so on."""
    while len(rows) > 1:
        rows = rows[0::2] + rows[1::2]
    return rows
