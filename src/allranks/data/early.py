"""Reading data on a thread of its own while the main thread still imports torch. Needs numpy only."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from allranks.components import build

PARTS = ("train", "test")


def start_reading(section: Mapping[str, Any]) -> Future[dict[str, Any]] | None:
    """What the `_target_`s of data.train and data.test make, under those keys; None for a user's own.

    Our own data sets are arrays and need no torch. A user's class may: it is made later.
    """
    if not all(str(section[part].get("_target_")).startswith("allranks.data.") for part in PARTS):
        return None
    reader = ThreadPoolExecutor(1, thread_name_prefix="data")
    reading = reader.submit(lambda: {part: make(section, part) for part in PARTS})
    reader.shutdown(wait=False)
    return reading


def make(section: Mapping[str, Any], part: str) -> Any:
    """What the section's `part` makes: arrays (images, labels), or a map-style Dataset."""
    return build(f"data.{part}", section[part])
