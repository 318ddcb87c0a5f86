"""The programs of tests that keep their own loop: how they are started, and what their runs come to."""

from __future__ import annotations

import json
import re
from pathlib import Path

from helpers import MEASURED, ROOT, Done, execute, execute_forked, forked_python, launcher

PAGE = (ROOT / "docs/your-own-loop.md").read_text()


def script(name: str) -> str:
    """The program of this name on docs/your-own-loop.md."""
    return re.search(rf"```python\n# {name}\n(.*?)```", PAGE, flags=re.S)[1]  # type: ignore[index]


def started(kind: str, ranks: int, folder: Path, code: str, disturb: str = "", python: str = "") -> Done:
    """The program, in this folder, under a launcher, or without one; `disturb` is STEP:SIGNAL.

    `python` is the Python that the launcher starts: by default one whose processes are forked.
    """
    folder.mkdir(exist_ok=True)
    environment = {"DISTURB": disturb} if disturb else {}
    if kind == "forked":
        return execute_forked(["-c", code], ranks, folder, environment)
    python = python or forked_python()
    (folder / "own.py").write_text(code)
    if kind == "launch":
        command = [python, "-m", "allranks", "launch", "-n", str(ranks), "--no-preflight", "--", python]
    else:
        command = launcher(kind, ranks, python)
    return execute([*command, "own.py"], folder, environment)


def figures(run: Path) -> tuple[list[dict[str, float]], str]:
    """(metrics of each epoch, sha256 of the weights) of the run in this directory."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if not k.startswith(MEASURED)} for line in lines]
    return metrics, json.loads((run / "summary.json").read_text())["model/sha256"]
