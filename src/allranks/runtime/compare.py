"""What the ranks compare at an epoch's end: their weights, and how long each of them works on a step.

All ranks apply the same gradients to the same weights. If the weights of two ranks differ all the same, one
of them has met an error that nothing else would show, and every later checkpoint would be wrong. A rank
that is slow makes all others wait in each step.
"""

from __future__ import annotations

import hashlib
import logging
import statistics
from collections.abc import Sequence

import torch

from allranks.base.agreement import majority
from allranks.base.errors import RunError
from allranks.runtime.meeting import ranks_named
from allranks.runtime.runtime import Runtime
from allranks.runtime.sharding import is_sharded

log = logging.getLogger(__name__)

# A rank is called slow if all of these hold. It works so many times as long as the median rank; less is
# common, and passes.
SLOW_TIMES = 1.5
SLOW_STEPS = 20  # only an epoch with at least so many steps is judged: fewer say little
SLOW_S = 0.5  # the epoch must lose at least so much by it: less is not worth a warning

_UNIT_S = 1e-6  # the unit in which the ranks tell each other their times


def compare_ranks(runtime: Runtime, model: torch.nn.Module) -> None:
    """Raises RunError, on all ranks, if the ranks' parameters differ; warns of a rank that is slow.

    All ranks call, before anything of the epoch is saved. The times are those since the last call.
    """
    if runtime.world_size == 1:
        return

    # 1. Each rank's digest and times, brought to all ranks in one message, as whole numbers: not every
    #    device has float64, and float32 would not hold the digests.
    progress = runtime.progress
    mine = [_digest(model), round(progress.busy_s / _UNIT_S), progress.busy_steps]
    progress.busy_s = 0.0
    progress.busy_steps = 0
    rows = runtime.gather(torch.tensor([mine], dtype=torch.int64, device=runtime.device))
    digests, busy, steps = rows.T.tolist()
    busy_s = [units * _UNIT_S for units in busy]

    # 2. Weights that differ end the run.
    _, odd = majority(digests)
    if odd:
        is_minority = 2 * len(odd) < len(digests)  # of two ranks nobody can say which one is wrong
        who = f" ({_named(runtime, odd)} from the others')" if is_minority else ""
        raise RunError(
            f"After step {progress.step} the ranks' weights differ{who}, though all apply the same "
            "gradients: look for a model or an optimizer that draws or reads something of its own on each "
            "rank, or for a step that some ranks alone have taken, and if there is none for a faulty "
            "device.",
            said_by=0,
        )

    # 3. A slow rank is worth a warning.
    slow = slow_ranks(busy_s, steps)
    if slow and runtime.is_main:
        worst = max(slow, key=busy_s.__getitem__)
        median_s = statistics.median_low(busy_s)
        log.warning(
            "%s works longer on a step than the others: %.1f times the median, %.1f s in %d steps",
            _named(runtime, slow), busy_s[worst] / max(median_s, 1e-9), busy_s[worst], steps[worst],
        )  # fmt: skip


def slow_ranks(busy_s: Sequence[float], steps: Sequence[float]) -> list[int]:
    """The ranks that work longer than the others; by rank, the seconds spent in this number of steps."""
    if min(steps) < SLOW_STEPS:
        return []
    median_s = statistics.median_low(busy_s)
    return [
        rank
        for rank, mine_s in enumerate(busy_s)
        if mine_s > SLOW_TIMES * median_s and mine_s - median_s > SLOW_S
    ]


def _digest(model: torch.nn.Module) -> int:
    """48 bits of a sha256 over all parameters that every rank holds."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        if is_sharded(parameter):  # each rank has other numbers
            continue
        flat = parameter.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest()[:6], "big")


def _named(runtime: Runtime, ranks: list[int]) -> str:
    """The ranks and their hosts, in words; the hosts are known to rank 0 only."""
    hosts = dict.fromkeys(runtime.ranks[rank].host for rank in ranks[:8]) if runtime.is_main else ()
    return f"{ranks_named(ranks)} on {', '.join(hosts)}"
