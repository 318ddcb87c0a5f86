"""What the ranks compare at an epoch's end: their weights, and how long each of them works on a step."""

from __future__ import annotations

import hashlib
import logging
import statistics

import torch

from allranks.base.agreement import majority
from allranks.base.errors import RunError
from allranks.runtime.meeting import ranks_named
from allranks.runtime.runtime import Runtime

log = logging.getLogger(__name__)

SLOW = 1.5  # times the median
SLOW_STEPS = 20  # an epoch of fewer says little
SLOW_S = 0.5  # lost in an epoch; less is not worth a word


def compare_ranks(runtime: Runtime, model: torch.nn.Module) -> None:
    """Compares the ranks' weights, and the time that each of them has worked; all ranks call.

    Raises RunError on all ranks where the weights differ: so this is called before anything is saved. Warns
    of a rank that is much slower than the others.
    """
    if runtime.world_size == 1:
        return
    progress = runtime.progress
    mine = [float(_digest(model)), progress.busy_s, float(progress.busy_steps)]
    progress.busy_s, progress.busy_steps = 0.0, 0
    digests, busy_s, steps = runtime.gather(
        torch.tensor([mine], dtype=torch.float64, device=runtime.device)
    ).T.tolist()

    _, odd = majority(digests)
    if odd:
        who = f" ({_named(runtime, odd)} from the others')" if 2 * len(odd) < len(digests) else ""
        raise RunError(
            f"After step {progress.step} the ranks' weights differ{who}, though all apply the same "
            "gradients: look for a model or an optimizer that draws or reads something of its own on each "
            "rank, and if there is none for a faulty device.",
            said_by=0,
        )
    median_s = statistics.median_low(busy_s)
    slow = [r for r, s in enumerate(busy_s) if s > SLOW * median_s and s - median_s > SLOW_S]
    if slow and min(steps) >= SLOW_STEPS and runtime.is_main:
        worst = max(slow, key=busy_s.__getitem__)
        log.warning(
            "%s works longer on a step than the others: %.1f times the median, %.1f s in %d steps",
            _named(runtime, slow), busy_s[worst] / max(median_s, 1e-9), busy_s[worst], steps[worst],
        )  # fmt: skip


def _digest(model: torch.nn.Module) -> int:
    """48 bits, which float64 holds exactly, of a sha256 over all parameters."""
    digest = hashlib.sha256()
    for parameter in model.parameters():
        flat = parameter.detach().cpu().contiguous().view(-1)
        digest.update(flat.view(torch.uint8).numpy().data)
    return int.from_bytes(digest.digest()[:6], "big")


def _named(runtime: Runtime, ranks: list[int]) -> str:
    hosts = dict.fromkeys(runtime.ranks[r].host for r in ranks[:8]) if runtime.is_main else ()
    return f"{ranks_named(ranks)} on {', '.join(hosts)}"
