"""`tracker=jsonl` and `tracker=csv`: the figures as plain files in the run directory's `tracker/`.

Both keep two files, one for steps and one for epochs. A run that goes on from a checkpoint repeats the
steps after the checkpoint. So lines that an earlier start has written for these steps are removed first,
and no step is in a file twice.
"""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from allranks.base import files
from allranks.trackers.protocol import Position, TrackedRun


class Jsonl:
    """tracker/steps.jsonl and tracker/epochs.jsonl: a line of JSON for each step and each epoch."""

    def __init__(self) -> None:
        self._folder = Path()

    def open(self, run: TrackedRun) -> Position | None:
        """Takes back what is beyond the position from which the run is followed on."""
        self._folder = run.folder
        for name, key, last in _limits(run):
            path = self._folder / f"{name}.jsonl"
            kept = [record for record in _json_lines(path) if record[key] <= last]
            files.write_text(path, "".join(map(files.line, kept))).close()
        return None

    def steps(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends a line for each step."""
        self._append("steps", records)

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Appends a line for the epoch."""
        self._append("epochs", [metrics])

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes nothing: summary.json is in the run directory."""

    def pictures(self, paths: Sequence[Path]) -> None:
        """Copies nothing: the pictures are in the run directory."""

    def close(self, finished: bool) -> None:
        """Nothing is open between two calls."""

    def _append(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        with (self._folder / f"{name}.jsonl").open("a") as file:
            file.write("".join(map(files.line, records)))


class Csv:
    """tracker/steps.csv and tracker/epochs.csv: a table for a spreadsheet, a row for each step or epoch."""

    def __init__(self) -> None:
        self._folder = Path()

    def open(self, run: TrackedRun) -> Position | None:
        """Takes back what is beyond the position from which the run is followed on."""
        self._folder = run.folder
        for name, key, last in _limits(run):
            path = self._folder / f"{name}.csv"
            self._write(path, [row for row in _csv_rows(path) if int(row[key]) <= last])
        return None

    def steps(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Adds a row for each step."""
        self._add("steps", records)

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """Adds a row for the epoch."""
        self._add("epochs", [metrics])

    def summary(self, values: Mapping[str, Any]) -> None:
        """Writes nothing: summary.json is in the run directory."""

    def pictures(self, paths: Sequence[Path]) -> None:
        """Copies nothing: the pictures are in the run directory."""

    def close(self, finished: bool) -> None:
        """Nothing is open between two calls."""

    def _add(self, name: str, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends rows; where a row has a column that the table lacks, the whole table is written anew."""
        path = self._folder / f"{name}.csv"
        with path.open(newline="") as file:
            columns = next(csv.reader(file), [])
        if any(key not in columns for record in records for key in record):
            self._write(path, [*_csv_rows(path), *records])
            return
        text = io.StringIO()
        csv.DictWriter(text, columns).writerows(records)
        with path.open("a", newline="") as file:
            file.write(text.getvalue())

    def _write(self, path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
        columns = list(dict.fromkeys(key for row in rows for key in row))
        text = io.StringIO(newline="")
        if columns:
            writer = csv.DictWriter(text, columns)
            writer.writeheader()
            writer.writerows(rows)
        files.write_text(path, text.getvalue()).close()


def _limits(run: TrackedRun) -> list[tuple[str, str, int]]:
    """For each of the two files: its name, the column that is counted, and the last number to keep."""
    return [("steps", "step", run.delivered.step), ("epochs", "epoch", run.delivered.epoch)]


def _json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The records in the file. Half a line, left by a process that was killed, is left out."""
    with suppress(FileNotFoundError):
        for line in path.read_text().splitlines():
            with suppress(ValueError):
                yield json.loads(line)


def _csv_rows(path: Path) -> Iterator[dict[str, str]]:
    """The table's rows. Half a row, left by a process that was killed, is left out."""
    with suppress(FileNotFoundError):
        text = path.read_text()
        whole = text[: text.rfind("\n") + 1]
        yield from csv.DictReader(io.StringIO(whole, newline=""))
