"""The process group by plain torch.distributed."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist

from allranks.runtime.meeting import Meeting


def start(meeting: Meeting, backend: str, device: torch.device, timeout_s: float) -> None:
    """Makes the default process group on the meeting's store; no port besides the store's is needed."""
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
    return [name for name in ("gloo", "nccl", "mpi") if getattr(dist, f"is_{name}_available")()]


def wrap(model: torch.nn.Module, device: torch.device) -> torch.nn.Module:
    """DistributedDataParallel, laid out for small models: no copies between gradients and buckets."""
    return torch.nn.parallel.DistributedDataParallel(
        model,
        device_ids=[device.index] if device.type in ("cuda", "xpu") else None,
        gradient_as_bucket_view=True,
    )
