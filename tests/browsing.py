"""Pages in a real browser: the screens on which they are looked at, and what holds for each page."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from helpers import only_long

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
AXE = CACHE / "allranks-tests/node_modules/axe-core/axe.min.js"
SCREENS = [
    (390, "dark"),
    only_long(390, "light"),
    only_long(1280, "dark"),
    only_long(1280, "light"),
]


def assert_readable(page: Any) -> None:
    """axe-core finds nothing that keeps a reader out, and nothing is wider than the screen.

    All that can be unfolded is open then. The test is skipped where there is no axe-core.
    """
    if not AXE.is_file():
        pytest.skip(f"no axe-core: npm install --prefix {AXE.parents[2]} axe-core")
    page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
    page.add_script_tag(content=AXE.read_text())
    found = page.evaluate("axe.run()")
    told = [f"{each['id']}: {each['nodes'][0]['html'][:200]}" for each in found["violations"]]
    assert told == []
    assert len(found["passes"]) > 20
    too_wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    assert page.evaluate(too_wide) == 0
