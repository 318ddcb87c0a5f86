"""The dry run: what a launch would do, as text for a person or as JSON for a program. Writes nothing."""

from __future__ import annotations

import itertools
import json
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import asdict

from allranks.base.text import table
from allranks.job.hosts import Host, compress
from allranks.launch.plan import Plan, RankPlace

# A table of ranks should fit a screen.
ROWS_PER_HOST = 16  # if a host has more ranks, only its first ones and the last are shown
MOST_ROWS = 32  # if there are more ranks, hosts that look alike are shown as one row
LONGEST_NAMES = 80  # characters of a list of hosts
LINES_OF_A_FILE = 8  # of a longer file only the first lines and the last are shown
SET_PER_RANK = "RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"


def command_line(plan: Plan) -> str:
    """The command with its variables before it, quoted so that a shell takes it as it is."""
    words = [f"{v.name}={shlex.quote(v.value)}" for v in plan.variables]
    start = "env " + " \\\n    ".join(words) + " \\\n" if words else ""
    return start + shlex.join(plan.argv)


def text(plan: Plan, source: str) -> str:
    """The whole dry run as text; `source` says where the hosts come from."""
    return "\n\n".join(
        [
            "\n".join([_summary(plan), f"hosts: {source}", *_spares(plan)]),
            f"Command:\n{command_line(plan)}",
            *(f"File {path}:\n{_folded(content)}" for path, content in plan.files),
            _variables(plan),
            *_frozen_first(plan),
            "Ranks:\n" + table([("rank", "host", "local rank", "CPUs", "device"), *_rows(plan)]),
        ]
    )


def _summary(plan: Plan) -> str:
    """How many ranks, where, and who starts them, in one line."""
    nodes = len(plan.hosts)
    dialect = f" ({plan.dialect})" if plan.dialect != plan.launcher else ""
    return (
        f"{plan.world_size} rank{'s' * (plan.world_size != 1)} on {nodes} node{'s' * (nodes != 1)} "
        f"of {plan.machine.name}, started by {plan.launcher}{dialect}"
    )


def _spares(plan: Plan) -> list[str]:
    """One line that names the hosts that are not used; none where all are."""
    if not plan.spares:
        return []
    names = compress(host.name for host in plan.spares)
    if len(names) > LONGEST_NAMES:
        names = names[: LONGEST_NAMES - 4] + " ..."
    return [f"spares: {names}; one of them takes the place of a host that is gone (--max-restarts)"]


def _variables(plan: Plan) -> str:
    """The variables that all ranks get, with reasons, and the names of each rank's own."""
    of_all = table([(variable.name, variable.value, variable.why) for variable in plan.variables])
    device = f" {plan.machine.device.variable}" if plan.machine.device.variable else ""
    return f"Variables:\n{of_all}\n\nEach rank's own, set by allranks.launch.guard: {SET_PER_RANK}{device}"


def _frozen_first(plan: Plan) -> list[str]:
    """For a training of ours: that the ranks will start with other words than those shown."""
    if "allranks.train" not in plan.argv or "--frozen" in plan.argv:
        return []
    return [
        "Before the start the configuration is frozen in a run directory, and the ranks get\n"
        "`--frozen DIRECTORY SHA256` in place of the overrides."
    ]


def as_json(plan: Plan, source: str) -> str:
    """The whole dry run as a JSON object, with every rank; `source` says where the hosts come from."""
    about = {
        "machine": plan.machine.name,
        "launcher": plan.launcher,
        "dialect": plan.dialect,
        "hosts_from": source,
        "world_size": plan.world_size,
        "nodes": len(plan.hosts),
        "spares": [host.name for host in plan.spares],
        "argv": plan.argv,
        "command": command_line(plan),
        "files": dict(plan.files),
        "variables": [asdict(variable) for variable in plan.variables],
        "ranks": [asdict(place) for place in plan.ranks()],
    }
    return json.dumps(about)


def _rows(plan: Plan) -> Iterator[Sequence[str]]:
    """The rows of the table of ranks.

    If there are many, neighbouring hosts with equally many ranks are shown by the first of them.
    """
    if plan.world_size <= MOST_ROWS:
        yield from map(_row, plan.ranks())
        return
    first = 0
    for slots, group in itertools.groupby(plan.hosts, key=lambda host: host.slots):
        hosts = list(group)
        yield from _host_rows(plan, hosts[0], first)
        others = hosts[1:]
        if others:
            ranks = f"{first + slots} to {first + slots * len(hosts) - 1}"
            names = others[0].name if len(others) == 1 else f"{others[0].name} to {others[-1].name}"
            more = f"{len(others)} more host{'s' * (len(others) > 1)}"
            yield (ranks, f"{names}: {more} with {slots} each, likewise")
        first += slots * len(hosts)


def _host_rows(plan: Plan, host: Host, first: int) -> Iterator[Sequence[str]]:
    """The rows of one host, whose first rank is `first`."""
    rows = [_row(place) for place in plan.ranks_of(host, first)]
    if len(rows) <= ROWS_PER_HOST:
        yield from rows
        return
    shown = ROWS_PER_HOST // 2
    yield from rows[:shown]
    yield (f"{first + shown} to {first + host.slots - 2}", f"{host.name}, likewise")
    yield rows[-1]


def _row(place: RankPlace) -> Sequence[str]:
    return (
        str(place.rank),
        place.host,
        str(place.local_rank),
        place.cpus or "not bound",
        place.device or "-",
    )


def _folded(content: str) -> str:
    """A file's lines, indented; of a long file the first ones and the last."""
    lines = content.splitlines()
    left_out = len(lines) - LINES_OF_A_FILE
    if left_out > 0:
        lines = [*lines[: LINES_OF_A_FILE - 1], f"... {left_out} lines more ...", lines[-1]]
    return "\n".join("  " + line for line in lines)
