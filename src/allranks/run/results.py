"""How far runs have come, and their figures, for lists of runs: read from the records in their directories.

While a run is working, a record may be missing or half written. Then its figures are not known yet.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from allranks.run import metric_names
from allranks.run.cells import JOB, METRICS, read_job, read_list, text_of


class Figures(NamedTuple):
    """What a run has come to, as far as its records say."""

    epochs: int  # that are done
    metrics: Mapping[str, float]  # the metrics after the newest of them, by name
    tests: Mapping[str, float]  # over the test set, of a finished run, by name

    def columns(self) -> tuple[str, str, str]:
        """Epochs, validation and test as cells of a table; `-` for one that is not known.

        The metric is shown that says most, and its name with it, unless it is the accuracy. A training
        without validation examples shows its own metric.
        """
        names = list(self.metrics)
        validated = metric_names.validated(names)
        return str(self.epochs), _main(self.metrics, validated), _main(self.tests, list(self.tests))


def _main(figures: Mapping[str, float], names: Sequence[str]) -> str:
    """The metric among these names that says most, such as `97.53 %` or `rmse 0.0812`."""
    quantity = metric_names.main_quantity(names)
    for name in names:
        if metric_names.quantity_of(name) == quantity:
            value = metric_names.with_unit(name, figures[name])
            return value if quantity == "accuracy" else f"{quantity} {value}"
    return "-"


FIGURES = ("epochs", "val/accuracy", "test/accuracy")  # above their columns, of classifications
OTHER_FIGURES = ("epochs", "val", "test")


def figures(directory: str | Path) -> Figures:
    """The figures of a run: from metrics.jsonl and, if it is finished, from summary.json.

    Raises OSError if one of these files is there and cannot be read.
    """
    lines = map(_json_object, text_of(Path(directory) / METRICS).splitlines())
    epochs = [line for line in lines if line]  # the last line may be half written
    newest = epochs[-1] if epochs else {}
    summary = _json_object(text_of(Path(directory) / "summary.json"))
    metrics = {name: newest[name] for name in metric_names.metrics_in([newest])}
    return Figures(len(epochs), metrics, metric_names.tests_in(summary))


def headings(of_runs: Iterable[Figures]) -> tuple[str, str, str]:
    """What stands above the columns of figures in a table of these runs."""
    known = [name for each in of_runs for name in (*each.metrics, *each.tests)]
    is_other = known and not any(metric_names.quantity_of(name) == "accuracy" for name in known)
    return OTHER_FIGURES if is_other else FIGURES


def _json_object(text: str) -> dict[str, Any]:
    """The JSON object in a text; empty for half of one, and for anything else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_whole(record: Path) -> bool:
    """Whether a record such as summary.json holds a JSON object; also where it is missing, as at first."""
    return not record.exists() or bool(_json_object(text_of(record)))


def place_in_sweep(directory: str | Path) -> str:
    """`cell 3/12` for the third of twelve cells, by the list of its sweep; empty for a run of no sweep."""
    cell = Path(directory)
    names = [name for name, _ in read_list(cell.parent)]
    return f"cell {names.index(cell.name) + 1}/{len(names)}" if cell.name in names else ""


def overrides_of(directory: str | Path) -> list[str]:
    """The overrides of a run that was queued, or that is a cell of a sweep; of others nobody noted them."""
    job = read_job(Path(directory) / JOB)
    if job:
        return [str(word) for word in job.get("overrides") or []]
    for name, overrides in read_list(Path(directory).parent):
        if name == Path(directory).name:
            return overrides
    return []
