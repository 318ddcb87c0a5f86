"""Values that should be the same everywhere: what most say, and who says something else."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import TypeVar

Value = TypeVar("Value", bound=Hashable)


def majority(values: Sequence[Value]) -> tuple[Value, list[int]]:
    """The most frequent value, and the positions of all values that differ from it.

    Of several values that are equally frequent the first one counts. Takes time linear in the number of
    values, as a job may have a hundred thousand ranks. Raises ValueError if there are none.
    """
    counts: dict[Value, int] = {}
    for value in values:
        counts[value] = counts.get(value, 0) + 1
    usual = max(counts, key=counts.__getitem__)
    odd = [position for position, value in enumerate(values) if value != usual]
    return usual, odd
