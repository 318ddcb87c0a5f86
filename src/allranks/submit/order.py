"""What a user asks `allranks submit` for, kept in job.json so that it can be asked for again."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
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
    spares: int | None = None  # so many of the nodes get no ranks until another node is gone
    idle: int | None = None  # for how many seconds a program may do nothing
    start_within: int | None = None  # within how many seconds every rank must have come
    # At most so many jobs follow each other; None for a training: as many as it needs.
    chain: int | None = None
    preflight: bool = True
    config_dir: str | None = None
    machine_overrides: tuple[str, ...] = ()
    workdir: str = "."
    console: str | None = None  # quiet or verbose, for a program; a training has it in its configuration

    @property
    def walltime_s(self) -> int | None:
        """The walltime in seconds; None if none was given."""
        return None if self.walltime is None else seconds(self.walltime)

    def launch_words(self, job_nodes: int | None = None) -> list[str]:
        """The options of the `allranks launch` that its job starts; what is a default there is left out.

        `job_nodes` are the hosts that the job must have got, None if that does not matter.
        """
        values = asdict(self) | {"job_nodes": job_nodes if self.nodes > 1 else None}
        values["launcher"] = None if self.launcher == "auto" else self.launcher
        values["max_restarts"] = self.max_restarts or None
        in_job = [option for option in options.OPTIONS if option.in_job or self._hands_on(option.name)]
        return [*options.words(in_job, values), *self.machine_overrides]

    def _hands_on(self, name: str) -> bool:
        """Whether the `allranks launch` of the job gets this option, which is not marked as `in_job`.

        It always gets job_nodes and console. It gets --nodes only if -n was given without --ppn: then
        --nodes says on how many hosts the ranks are spread. Otherwise that follows from the job's hosts.
        """
        deals_out = name == "nodes" and self.ranks is not None and self.ppn is None
        return deals_out or name in ("job_nodes", "console")

    def as_kept(self) -> dict[str, Any]:
        """The values for job.json. Without `console`, which an earlier version does not know, where none
        was given.
        """
        values = asdict(self)
        if self.console is None:
            del values["console"]
        return values


def with_options(order: Order, given: Mapping[str, Any]) -> Order:
    """The order with the options that were given, None being one that was not.

    The folder of --config-dir gets its whole path, because the job has another present directory.
    """
    names = {field.name for field in fields(Order)}
    changed = {name: value for name, value in given.items() if name in names and value is not None}
    if "config_dir" in changed:
        changed["config_dir"] = str(Path(changed["config_dir"]).absolute())
    return replace(order, **changed)
