"""The process group by torch.distributed alone, without ezpz.

A process group is what torch's collectives work on: the ranks, and the connections between them.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from allranks.base.errors import UserError
from allranks.runtime.meeting import Meeting


def start(meeting: Meeting, backend: str, device: torch.device, timeout_s: float) -> None:
    """Makes the default process group of all ranks.

    The ranks find each other through the store of their meeting, so that no further port is needed. A
    collective that takes longer than `timeout_s` seconds fails.
    """
    assert meeting.store is not None  # there are several ranks
    dist.init_process_group(
        backend,
        store=dist.PrefixStore("process-group", meeting.store),
        rank=meeting.rank,
        world_size=meeting.world_size,
        timeout=timedelta(seconds=timeout_s),
        device_id=device if backend in ("nccl", "xccl") else None,
    )


def backends() -> list[str]:
    """The backends that this torch was built with; none where it has no torch.distributed."""
    if not dist.is_available():
        return []
    return [name for name in ("gloo", "nccl", "xccl", "mpi") if _is_available(name)]


def check_backend(name: str, device: str) -> None:
    """Raises UserError if this torch cannot carry collectives by the backend, which the device needs."""
    if not dist.is_available() or not _is_available(name):
        raise UserError(
            f"device={device} with several ranks needs torch's backend {name}, which this torch "
            f"{torch.__version__} was built without: install a torch that has it, or take device=cpu.",
            said_by=0,
        )


def _is_available(backend: str) -> bool:
    ask = getattr(dist, f"is_{backend}_available", None)  # older versions know no xccl
    return ask is not None and bool(ask())


def wrap(model: torch.nn.Module, device: torch.device, has_unused: bool) -> DistributedDataParallel:
    """The model in DistributedDataParallel (DDP), on this rank's device.

    Gradients are views of DDP's buckets: for small models the copies between them would take a good part of
    a step. With `has_unused` DDP looks at the operations of each forward pass to find the parameters that
    took no part in it, which takes time in each step (docs/performance.md).
    """
    return DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type in ("cuda", "xpu") else None,
        gradient_as_bucket_view=True,
        find_unused_parameters=has_unused,
    )
