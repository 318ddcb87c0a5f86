"""How much memory a rank has needed at most: memory of its process, and memory of its device."""

from __future__ import annotations

import sys
from contextlib import suppress
from pathlib import Path

import torch

from allranks.runtime.runtime import Runtime


def peaks_of_ranks(runtime: Runtime) -> dict[str, int]:
    """The most that any rank has needed so far, in bytes; all ranks call.

    The device's memory is what torch has allocated there. A CPU has no such number: what torch allocates
    there is part of the process's memory.
    """
    mine = torch.zeros(1, 2, dtype=runtime.sum_dtype)
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
        # Linux: the line VmHWM ("high water mark"). getrusage() may be wrong there: a process begins with
        # the peak of the process that started it.
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return 1024 * int(line.split()[1])

    # There is no /proc, as on macOS.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # bytes on macOS, KiB elsewhere
    return peak if sys.platform == "darwin" else 1024 * peak


def device_peak_bytes(device: torch.device) -> int:
    """The most memory that torch has allocated on the device at once; 0 where torch keeps no count."""
    if device.type not in ("cuda", "xpu"):
        return 0
    return int(getattr(torch, device.type).max_memory_allocated(device))
