"""Fewer file-system calls while a large package is imported.

While torch is imported it asks `inspect.getmodule` now and then which module a piece of code belongs to. To
answer, Python's inspect module looks up the real path of the file of each module that is loaded by then: a
call for each folder on the way. Torch never asks about the modules that were loaded before it (Hydra's and
ours), so these calls, some thousands on each rank, find out nothing.
"""

from __future__ import annotations

import contextlib
import inspect
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def without_path_lookups() -> Iterator[None]:
    """In the block `inspect.getmodule` does not look up the paths of the modules that are loaded already.

    It keeps a list of the modules whose path it knows. Those that are loaded are put on that list, and
    taken from it at the end, so that later questions about them are answered as ever. A later version of
    Python may have no such list: then nothing is changed.
    """
    known = getattr(inspect, "_filesbymodname", None)
    if not isinstance(known, dict):
        yield
        return
    # Read from the module's own names: some modules import others when they are asked for a name they lack.
    files = {
        name: getattr(module, "__dict__", {}).get("__file__") for name, module in sys.modules.copy().items()
    }
    added = {name: file for name, file in files.items() if isinstance(file, str) and name not in known}
    known.update(added)
    try:
        yield
    finally:
        for name in added:
            known.pop(name, None)
