"""What runs have come to, for lists of them: read from the records in their directories.

A record may be missing, or half written, while its run is at work: then its figures are not known yet.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

from allranks.run.cells import JOB, cells_listed, read_job, text_of


class Figures(NamedTuple):
    """What a run has come to, as far as its records say."""

    epochs: int  # that are done
    val_accuracy: float | None  # after the newest of them, in percent
    test_accuracy: float | None  # of a finished run, in percent

    def columns(self) -> tuple[str, str, str]:
        """The figures as cells of a table; `-` for one that is not known."""
        return str(self.epochs), _percent(self.val_accuracy), _percent(self.test_accuracy)


FIGURES = ("epochs", "val/accuracy", "test/accuracy")  # above their columns


def figures(directory: str | Path) -> Figures:
    """The figures of a run: from metrics.jsonl and, if it is finished, from summary.json."""
    lines = map(_json_object, text_of(Path(directory) / "metrics.jsonl").splitlines())
    epochs = [line for line in lines if line]  # the last line may be half written
    newest = epochs[-1] if epochs else {}
    summary = _json_object(text_of(Path(directory) / "summary.json"))
    return Figures(len(epochs), _number(newest.get("val/accuracy")), _number(summary.get("test/accuracy")))


def _number(value: Any) -> float | None:
    """The value where it is a number, as it always is in a file that allranks has written."""
    return float(value) if isinstance(value, int | float) else None


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} %"


def _json_object(text: str) -> dict[str, Any]:
    """The JSON object in a text; empty for half of one, and for anything else."""
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}


def place_in_sweep(directory: str | Path) -> str:
    """`cell 3/12` for the third of twelve cells, by the list of its sweep; empty for a run of no sweep."""
    cell = Path(directory)
    names = [name for name, _ in cells_listed(cell.parent)]
    return f"cell {names.index(cell.name) + 1}/{len(names)}" if cell.name in names else ""


def overrides_of(directory: str | Path) -> list[str]:
    """The overrides of a run that was queued, or that is a cell of a sweep; of others nobody noted them."""
    job = read_job(Path(directory) / JOB)
    if job:
        return [str(word) for word in job.get("overrides", [])]
    for name, overrides in cells_listed(Path(directory).parent):
        if name == Path(directory).name:
            return overrides
    return []
