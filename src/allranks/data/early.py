"""Reading data on a thread of its own while the main thread still imports torch. Needs numpy only.

Importing torch takes over a second, of which reading MNIST takes the smaller part: done side by side, the
reading costs a start nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from allranks.components import build

PARTS = ("train", "test")


def start_reading(section: Mapping[str, Any]) -> Future[dict[str, Any]] | None:
    """Begins to make what the configuration's section `data` describes, under the keys "train" and "test".

    Returns None where one of them is a user's own: our own data sets are arrays and need no torch, a user's
    class may need it, and is made later.
    """
    targets = [str(section[part].get("_target_")) for part in PARTS]
    if not all(target.startswith("allranks.data.") for target in targets):
        return None
    reader = ThreadPoolExecutor(1, thread_name_prefix="data")
    reading = reader.submit(lambda: {part: make(section, part) for part in PARTS})
    reader.shutdown(wait=False)  # takes no more work, and its thread ends with this piece of work
    return reading


def make(section: Mapping[str, Any], part: str) -> Any:
    """What the section's `part` makes: arrays (images, labels), or a map-style Dataset."""
    return build(f"data.{part}", section[part])
