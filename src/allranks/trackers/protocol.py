"""What a tracker is: the few methods that a class needs to get a run's figures.

A tracker of your own is a class with these methods; it inherits from nothing. Its YAML file names it by
`_target_`, and its constructor gets the other values there (docs/trackers.md).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol


class Position(NamedTuple):
    """How far a run has come, or how far a tracker has followed it."""

    step: int = 0  # all recorded steps up to this one
    epoch: int = 0  # all epochs up to this one


@dataclass(frozen=True)
class TrackedRun:
    """What a tracker is told of a run when it is opened."""

    directory: Path  # the run directory; a tracker's own files go to `directory / "tracker"`
    name: str
    config: Mapping[str, Any]  # every value of the configuration, by dotted key
    environment: Mapping[str, Any]  # as environment.json has it
    resumed: Position  # where this start of the run goes on; 0 and 0 where the run begins
    # How far this tracker has certainly got, at an earlier start or before it failed. It may have got a
    # little more: a process that is killed cannot note the last lines that it handed over.
    delivered: Position = field(default_factory=Position)

    @property
    def folder(self) -> Path:
        """The folder for trackers' own files."""
        return self.directory / "tracker"


class Tracker(Protocol):
    """Gets the figures of one run. All calls come from one thread, which is not the training's.

    A tracker may also have a method abandon(). If one of the other methods hangs at the end of the run,
    abandon() is called from another thread; it is called as well if close() raises an error. It should end
    whatever keeps this process from ending.

    Any method may raise any error: a warning names it once, the training goes on, and after the next epoch
    or at the end of the run the tracker is opened again.
    """

    def open(self, run: TrackedRun) -> Position | None:
        """The run begins or goes on. Called again after a failure.

        Returns how far this tracker has followed the run, if its own store says that exactly; it then gets
        what comes after that. None stands for run.delivered. A tracker that returns None should remove what
        it has beyond run.delivered, as a file can: then it has no step twice.
        """

    def steps(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Figures of single steps, in their order: `step`, `epoch`, `step/loss` and others.

        A figure that is not finite is None.
        """

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """The metrics of an epoch, as metrics.jsonl has them; `step` is its last step."""

    def summary(self, values: Mapping[str, Any]) -> None:
        """The run is finished; `values` are those of summary.json."""

    def pictures(self, paths: Sequence[Path]) -> None:
        """The pictures of the finished run: PNG files."""

    def close(self, finished: bool) -> None:
        """Nothing more comes from this process. Without `finished` another start may go on with the run.

        It is called even where the tracker has failed, also in open(): it ends what may be left of it.
        """
