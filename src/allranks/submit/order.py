"""What a user asks `allranks submit` for, kept in job.json so that it can be asked for again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from allranks.job.batch import seconds
from allranks.launch import options


@dataclass(frozen=True)
class Order:
    """The values of the options, and what was around them. The order of the fields is that of job.json."""

    machine: str
    nodes: int = 1
    walltime: str | None = None  # HH:MM:SS
    account: str | None = None
    queue: str | None = None
    name: str = "allranks"
    ranks: int | None = None
    ppn: int | None = None
    launcher: str = "auto"
    max_restarts: int = 0
    min_ranks: int | None = None
    spares: int | None = None  # of the nodes, those that get no ranks until another one is gone
    idle: int | None = None  # seconds in which a program may do nothing
    start_within: int | None = None  # seconds until every rank must have come
    chain: int | None = None  # jobs at most; None for a training: as many as it takes
    preflight: bool = True
    config_dir: str | None = None
    machine_overrides: tuple[str, ...] = ()
    workdir: str = "."

    @property
    def walltime_s(self) -> int | None:
        """The walltime in seconds; None where none was given."""
        return None if self.walltime is None else seconds(self.walltime)

    def launch_words(self, job_nodes: int | None = None) -> list[str]:
        """The options of the `allranks launch` that its job starts; what is a default there is left out.

        `job_nodes` are the hosts that the job must have got, None where that does not matter.
        """
        values = asdict(self) | {"job_nodes": job_nodes if self.nodes > 1 else None}
        values["launcher"] = None if self.launcher == "auto" else self.launcher
        values["max_restarts"] = self.max_restarts or None
        in_job = [option for option in options.OPTIONS if option.in_job or self._hands_on(option.name)]
        return [*options.words(in_job, values), *self.machine_overrides]

    def _hands_on(self, name: str) -> bool:
        """--nodes says how -n is dealt out. Without -n, or with --ppn, the job's own hosts say it."""
        return name == "job_nodes" or (name == "nodes" and self.ranks is not None and self.ppn is None)


def with_options(order: Order, given: Mapping[str, Any]) -> Order:
    """The order with the options that were given, None being one that was not."""
    names = {field.name for field in fields(Order)} - {"config_dir"}
    changed = {name: value for name, value in given.items() if name in names and value is not None}
    return replace(order, **changed)
