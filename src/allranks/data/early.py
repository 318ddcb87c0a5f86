"""Reading data on a thread of its own while the main thread still imports torch. Needs numpy only.

Importing torch takes over a second, of which reading MNIST takes the smaller part: done side by side, the
reading costs a start nothing.

A process that is to end does not wait for that thread. A file system may hang, a download may take minutes,
and a mistake in the configuration or Ctrl-C ends the process before.
"""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import Future
from typing import Any

from allranks.base.threads import in_thread
from allranks.components import build


def start_reading(section: Mapping[str, Any]) -> Future[dict[str, Any]] | None:
    """Begins to make what the configuration's section `data` describes, under the keys of its parts.

    These are "train", "test", and "val" where there is one. Returns None where one of them is a user's own:
    our own data sets need no torch, a user's class may need it, and is made later.
    """
    parts = [part for part in ("train", "val", "test") if section.get(part)]
    targets = [str(section[part].get("_target_")) for part in parts]
    if not all(target.startswith("allranks.data.") for target in targets):
        return None
    return in_thread(lambda: {part: make(section, part) for part in parts}, "data")


def make(section: Mapping[str, Any], part: str) -> Any:
    """What the section's `part` makes: arrays, such as (images, labels), or a Dataset."""
    return build(f"data.{part}", section[part])
