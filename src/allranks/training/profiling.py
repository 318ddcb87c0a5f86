"""`profile=true`: where the time of a few steps goes, operation by operation.

torch.profiler records steps 10 to 20 of each start: by then memory is allocated and code is compiled. Each
rank writes its trace, `profile/rank-N.json.gz`, for https://ui.perfetto.dev or chrome://tracing. Rank 0
also writes a table of the operations that took longest: `profile/table.json` for programs, and
`profile/table.md` to read.
"""

from __future__ import annotations

import gzip
import logging
import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from allranks.base import files
from allranks.base.text import one_line
from allranks.runtime.runtime import Runtime

log = logging.getLogger(__name__)

# The first and the last step of a start that are recorded, counted from 1.
FIRST = 10
LAST = 20
ROWS = 30  # operations in the table
# The kinds of GPU whose time torch.profiler records. Of others it sees only what the CPU does for them.
TIMED_DEVICES = ("cuda", "xpu")
# The parts of a step, as update.named() calls them. They stand in the table beside torch's own operations.
PARTS = ("forward", "backward", "optimizer")


def recorded_steps(left: int | None) -> range:
    """Which steps of a start are recorded, counted from 1, if the run has `left` steps left.

    None means that this is not known, as in a loop of the user's own. A short run is recorded from its
    second step on: the first step takes longer than the others, because memory is allocated in it.
    """
    if left is None or left >= LAST:
        return range(FIRST, LAST + 1)
    return range(min(2, left), left + 1)


class Profile:
    """One rank's profile of some steps of this start."""

    def __init__(self, runtime: Runtime, directory: Path, left: int | None, save_s: float) -> None:
        self._runtime = runtime
        self._folder = directory / "profile"
        self._steps = recorded_steps(left)
        self._save_s = save_s  # how long writing may take
        self._taken = 0  # steps of this start
        self._profiler: Any = None  # while steps are recorded

    def begin_step(self) -> None:
        """A step begins: starts the profiler where this is the first step to be recorded."""
        self._taken += 1
        if self._taken == self._steps.start:
            # The profiler's library prints notes on itself and on GPUs that are missing. They help nobody.
            os.environ.setdefault("KINETO_LOG_LEVEL", "99")
            activities = [torch.profiler.ProfilerActivity.CPU]
            if self._runtime.device.type in TIMED_DEVICES:
                activities.append(
                    getattr(torch.profiler.ProfilerActivity, self._runtime.device.type.upper())
                )
            self._profiler = torch.profiler.profile(activities=activities)
            self._profiler.start()

    def end_step(self) -> None:
        """The step has been taken; after the last of those to be recorded the profile is written."""
        if self._profiler is None or self._taken < self._steps[-1]:
            return
        self._runtime.synchronize()
        self._profiler.stop()
        profiler = self._profiler
        self._profiler = None
        with self._runtime.progress.phase("writing a profile (watchdog.save_s)", self._save_s):
            try:
                self._write(profiler)
            except (OSError, RuntimeError) as error:
                log.warning("the profile could not be written (%s); the training goes on", one_line(error))

    def _write(self, profiler: Any) -> None:
        rank = self._runtime.rank
        self._folder.mkdir(exist_ok=True)
        _export(profiler, self._folder / f"rank-{rank}.json.gz")
        if rank:
            return
        table = table_of(profiler.key_averages(), self._steps, self._runtime.device.type)
        files.write_json(self._folder / "table.json", table)
        files.write_text(self._folder / "table.md", as_markdown(table)).close()
        log.info("steps %d to %d are profiled: %s", table["steps"][0], table["steps"][1], self._folder)


def _export(profiler: Any, trace: Path) -> None:
    """Writes what the profiler has recorded, compressed.

    The profiler could compress it by itself, but it does so line by line and as small as it can, which
    takes longer.
    """
    # Both are hidden, as they are there for a moment only. So a disk that is full leaves no cut trace.
    plain = trace.with_name(f".{trace.stem}")
    compressed = trace.with_name(f".{trace.name}")
    try:
        profiler.export_chrome_trace(str(plain))
        with plain.open("rb") as source, gzip.open(compressed, "wb", compresslevel=6) as target:
            shutil.copyfileobj(source, target)
        compressed.rename(trace)
    finally:
        plain.unlink(missing_ok=True)
        compressed.unlink(missing_ok=True)


def table_of(averages: Sequence[Any], steps: range, device_type: str) -> dict[str, Any]:
    """Where the time went, for table.json: the parts of a step, and the operations that took longest.

    `averages` are the profiler's key_averages(). An operation's own time leaves out the operations that it
    calls. `share` is its part of the own time of all operations: time on the GPU, or on the CPU where there
    is no GPU whose time is recorded.
    """
    on_device = device_type in TIMED_DEVICES

    def own_us(each: Any) -> float:
        return float(each.self_device_time_total if on_device else each.self_cpu_time_total)

    operations = [
        each for each in averages if each.key not in PARTS and not each.key.startswith("ProfilerStep")
    ]
    whole_us = sum(own_us(each) for each in operations) or 1.0
    longest = sorted(operations, key=own_us, reverse=True)[:ROWS]
    rows = [
        {
            "name": each.key,
            "calls": each.count,
            "own_cpu_ms": round(each.self_cpu_time_total / 1000, 3),
            "own_device_ms": round(each.self_device_time_total / 1000, 3) if on_device else None,
            "share": round(own_us(each) / whole_us, 4),
        }
        for each in longest
    ]
    parts = {
        each.key: {"calls": each.count, "cpu_ms": round(each.cpu_time_total / 1000, 3)}
        for each in averages
        if each.key in PARTS
    }
    return {"steps": [steps[0], steps[-1]], "rank": 0, "device": device_type, "parts": parts, "rows": rows}


def as_markdown(table: Mapping[str, Any]) -> str:
    """The table that table_of() returns, as a page in Markdown."""
    first, last = table["steps"]
    lines = [
        f"# Where the time went: rank 0, steps {first} to {last}, on {table['device']}",
        "",
        "| part of a step | calls | ms on the CPU |",
        "|---|---:|---:|",
        *(f"| {name} | {part['calls']} | {part['cpu_ms']:.1f} |" for name, part in table["parts"].items()),
        "",
        "| operation | calls | own ms on the CPU | own ms on the device | share |",
        "|---|---:|---:|---:|---:|",
    ]
    for row in table["rows"]:
        device = "" if row["own_device_ms"] is None else f"{row['own_device_ms']:.1f}"
        share = f"{100 * row['share']:.1f} %"
        lines.append(f"| {row['name']} | {row['calls']} | {row['own_cpu_ms']:.1f} | {device} | {share} |")
    return "\n".join(lines) + "\n"
