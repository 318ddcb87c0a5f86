"""How much memory a rank has needed at most: its process's, and its device's."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch

from allranks.runtime.runtime import Runtime


def peaks_of_ranks(runtime: Runtime) -> dict[str, int]:
    """The most that any rank has needed so far, in bytes; all ranks call.

    The device's memory is what torch has allocated there. There is no such number for a CPU, whose memory
    is the process's.
    """
    mine = torch.zeros(1, 2, dtype=torch.float32 if runtime.device.type == "mps" else torch.float64)
    mine[0, 0] = process_peak_bytes()
    mine[0, 1] = device_peak_bytes(runtime.device)
    process, device = runtime.gather(mine.to(runtime.device)).max(dim=0).values.tolist()
    peaks = {"memory/process_peak_bytes": int(process)}
    if device:
        peaks["memory/device_peak_bytes"] = int(device)
    return peaks


def process_peak_bytes() -> int:
    """The most memory that this process has had in use at once."""
    with suppress(OSError):
        # getrusage() would give a process that was started by a large one that one's peak.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])
    import resource  # where there is no /proc

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def device_peak_bytes(device: torch.device) -> int:
    """The most memory that torch has allocated on the device at once; 0 where it does not count."""
    if device.type not in ("cuda", "xpu"):
        return 0
    return int(getattr(torch, device.type).max_memory_allocated(device))
