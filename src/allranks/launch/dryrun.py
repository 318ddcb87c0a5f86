"""What a launch would do, as text for a person or JSON for a program. Writes nothing."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator, Sequence

from allranks.base.text import table
from allranks.job.hosts import Host
from allranks.launch.plan import Plan, RankPlace

ROWS_PER_HOST = 16  # of a host with more ranks, the first ones and the last are shown
FOLDED_FROM = 32  # ranks; fewer are all shown
SET_PER_RANK = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"


def command_line(plan: Plan) -> str:
    """The command with its variables before it, quoted so that a shell takes it as it is."""
    words = [f"{v.name}={shlex.quote(v.value)}" for v in plan.variables]
    start = "env " + " \\\n    ".join(words) + " \\\n" if words else ""
    return start + shlex.join(plan.argv)


def text(plan: Plan, source: str) -> str:
    """The whole dry run as text; `source` says where the hosts come from."""
    nodes = len(plan.hosts)
    head = (
        f"{plan.world_size} rank{'s' * (plan.world_size != 1)} on {nodes} node{'s' * (nodes != 1)} "
        f"of {plan.machine.name}, started by {plan.launcher}"
        + (f" ({plan.dialect})" if plan.dialect != plan.launcher else "")
    )
    parts = [f"{head}\nhosts: {source}", f"Command:\n{command_line(plan)}"]
    parts += [f"File {path}:\n{_folded(content)}" for path, content in plan.files]
    parts.append("Variables:\n" + table([(v.name, v.value, v.why) for v in plan.variables]))
    parts.append(
        f"Each rank's own, set by allranks.launch.guard: {SET_PER_RANK}"
        + (f" {plan.machine.device.variable}" if plan.machine.device.variable else "")
    )
    if "allranks.train" in plan.argv and "--frozen" not in plan.argv:
        parts.append(
            "Without --dry-run the configuration is first frozen in a run directory, and the ranks start\n"
            "`-m allranks.train --frozen DIRECTORY SHA256` in place of the overrides."
        )
    header = ("rank", "host", "local rank", "CPUs", "device")
    parts.append("Ranks:\n" + table([header, *_rows(plan)]))
    return "\n\n".join(parts)


def as_json(plan: Plan, source: str) -> str:
    """The same for programs, every rank included."""
    about = {
        "machine": plan.machine.name,
        "launcher": plan.launcher,
        "dialect": plan.dialect,
        "hosts_from": source,
        "world_size": plan.world_size,
        "nodes": len(plan.hosts),
        "argv": plan.argv,
        "command": command_line(plan),
        "files": dict(plan.files),
        "variables": [{"name": v.name, "value": v.value, "why": v.why} for v in plan.variables],
        "ranks": [
            {"rank": p.rank, "host": p.host, "local_rank": p.local_rank, "cpus": p.cpus,
             "device": p.device}
            for p in plan.ranks()
        ],
    }  # fmt: skip
    return json.dumps(about)


def _rows(plan: Plan) -> Iterator[Sequence[str]]:
    """The table's rows; of many neighbouring hosts with equally many ranks only the first's."""
    if plan.world_size <= FOLDED_FROM:
        yield from map(_row, plan.ranks())
        return
    first = 0
    for slots, group in itertools.groupby(plan.hosts, key=lambda host: host.slots):
        hosts = list(group)
        yield from _host_rows(plan, hosts[0], first)
        more = len(hosts) - 1
        if more:
            ranks = f"{first + slots} to {first + slots * len(hosts) - 1}"
            names = hosts[1].name if more == 1 else f"{hosts[1].name} to {hosts[-1].name}"
            yield (ranks, f"{names}: {more} more host{'s' * (more > 1)} with {slots} each, likewise")
        first += slots * len(hosts)


def _host_rows(plan: Plan, host: Host, first: int) -> Iterator[Sequence[str]]:
    rows = [_row(place) for place in plan.ranks_of(host, first)]
    if len(rows) <= ROWS_PER_HOST:
        yield from rows
        return
    yield from rows[: ROWS_PER_HOST // 2]
    yield (f"{first + ROWS_PER_HOST // 2} to {first + host.slots - 2}", f"{host.name}, likewise")
    yield rows[-1]


def _row(place: RankPlace) -> Sequence[str]:
    return (
        str(place.rank),
        place.host,
        str(place.local_rank),
        place.cpus or "not bound",
        place.device or "-",
    )


def _folded(content: str, most: int = 8) -> str:
    lines = content.splitlines()
    if len(lines) > most:
        lines = [*lines[: most - 1], f"... {len(lines) - most} lines more ...", lines[-1]]
    return "\n".join("  " + line for line in lines)
