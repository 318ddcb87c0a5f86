"""From what the user asks for, a machine and an allocation to a command line and each rank's place.

Every rank is started as `python -m allranks.launch.guard -- PROGRAM ...`, which turns the launcher's
own variables into RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE and MASTER_*, and shows the rank
its device. Nothing is written; only `mpiexec --version` is run, where no file says which MPI it is.
"""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from allranks.base.errors import UserError
from allranks.job.hosts import Allocation, Host, compress, short
from allranks.job.machine import Machine
from allranks.job.variables import (
    DEVICE_VARIABLE,
    DEVICES,
    LOCAL_WORLD_SIZE,
    MASTER_ADDR,
    MASTER_PORT,
    WORLD_SIZE,
    port_for,
)
from allranks.launch import launchers

WRAPPER = "allranks.launch.guard"
PASSED = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "ALLRANKS_DEADLINE")


@dataclass(frozen=True)
class Request:
    """What to start and how often; None and `auto` leave it to the machine and the allocation."""

    program: tuple[str, ...]
    ranks: int | None = None
    nodes: int | None = None
    ppn: int | None = None
    launcher: str = "auto"
    hosts_path: str = "allranks-hosts"  # for a list of hosts too long for an argument
    placed: tuple[Host, ...] = ()  # just these ranks on these hosts, whatever the above say
    passed: tuple[str, ...] = ()  # variables that the launcher must hand on besides the plan's
    installed_here: bool = True  # False: planned for elsewhere, so do not look for programs here


@dataclass(frozen=True)
class PlannedVariable:
    """An environment variable that all ranks get, and who wants it: the dry run shows `why`."""

    name: str
    value: str
    why: str


@dataclass(frozen=True)
class RankPlace:
    """Where a rank runs. `cpus` None: not bound. `device` None: the machine file knows of none."""

    rank: int
    host: str
    local_rank: int
    cpus: str | None
    device: str | None


@dataclass(frozen=True)
class Plan:
    """A command line and what it needs: `variables` around it, `files` (path, text) before it.

    `hosts` are those used, in rank order, `slots` being the ranks placed there. `cpus` and
    `devices` are those of local rank 0, 1, ..., empty where nothing is bound or known.
    """

    launcher: str
    dialect: str  # the launcher, or whose mpiexec it is: hydra, pals, openmpi
    argv: tuple[str, ...]
    variables: tuple[PlannedVariable, ...]
    hosts: tuple[Host, ...]
    machine: Machine
    cpus: tuple[str, ...] = ()
    devices: tuple[str, ...] = ()
    files: launchers.Files = ()

    @cached_property
    def world_size(self) -> int:
        return sum(host.slots for host in self.hosts)

    def argv_for(self, program: Sequence[str]) -> tuple[str, ...]:
        """The same command line for another program, such as a check beforehand."""
        end = self.argv.index("--", self.argv.index(WRAPPER)) + 1
        return (*self.argv[:end], *program)

    def environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The launcher's whole environment: `environ` with the plan's variables over it."""
        return {**environ, **{variable.name: variable.value for variable in self.variables}}

    def ranks(self) -> Iterator[RankPlace]:
        """Every rank, in order."""
        first = 0
        for host in self.hosts:
            yield from self.ranks_of(host, first)
            first += host.slots

    def ranks_of(self, host: Host, first: int) -> Iterator[RankPlace]:
        """The ranks of one host, whose first rank is `first`."""
        for local in range(host.slots):
            cpus = self.cpus[local] if self.cpus else None
            device = self.devices[local] if self.devices else None
            yield RankPlace(first + local, host.name, local, cpus, device)


def make_plan(
    request: Request, machine: Machine, allocation: Allocation, environ: Mapping[str, str] | None = None
) -> Plan:
    """The command line for this request; raises UserError where it cannot be had."""
    environ = os.environ if environ is None else environ
    hosts = place(request, machine, allocation)
    launcher = launchers.choose(request.launcher, machine, allocation, request.installed_here)
    if request.installed_here or "/" in request.program[0]:
        check_program(request.program)
    dialect = launcher
    if launcher == "mpiexec":
        dialect = launchers.mpiexec_dialect(machine, request.installed_here)
    most = max(host.slots for host in hosts)
    bound = launchers.binding(machine, dialect, most, allocation.cpus_per_node)
    devices = _devices(machine, most)
    variables = _variables(machine, allocation, hosts, devices, environ)
    master = ":".join(v.value for v in variables if v.name in (MASTER_ADDR, MASTER_PORT))
    passed = (name for name in PASSED if environ.get(name))
    names = tuple(dict.fromkeys([*(v.name for v in variables), *passed, *request.passed]))
    job = launchers.Job(
        machine, allocation, hosts, names, master, request.hosts_path, request.installed_here
    )
    per_rank = (sys.executable, "-m", WRAPPER, "--", *request.program)
    argv, files = launchers.build(dialect, job, bound, per_rank)
    if machine.device.one_visible or machine.device.variable:
        devices = tuple(f"{device}, seen as 0" for device in devices)
    return Plan(launcher, dialect, argv, variables, hosts, machine, bound.cpus, devices, files)


def check_program(program: Sequence[str]) -> None:
    """That the program can be found, and the script of a Python program too."""
    name, script = program[0], (*program[1:2], "")[0]
    if shutil.which(name) is None:
        if Path(name).is_file():
            raise UserError(f"The program {name} cannot be run: make it so with `chmod +x {name}`.")
        raise UserError(f"The program {name} is not found: check the name, or give its path.")
    is_python = Path(name).name.startswith("python")
    if is_python and script and not script.startswith("-") and not Path(script).exists():
        raise UserError(f"The program {script} is not found: check the name, or give its path.")


# --- how many ranks, and where -------------------------------------------------------------------


def place(request: Request, machine: Machine, allocation: Allocation) -> tuple[Host, ...]:
    """The hosts to use, each with its number of ranks as `slots`."""
    if request.placed:
        return request.placed
    for option, value in (
        ("-n", request.ranks), ("--nodes", request.nodes), ("--ppn", request.ppn)
    ):  # fmt: skip
        if value is not None and value < 1:
            raise UserError(f"{option} {value} is not valid: give a whole number >= 1.")
    hosts = allocation.hosts
    if request.nodes is not None:
        if request.nodes > len(hosts):
            raise _too_many(f"--nodes {request.nodes}", allocation, f"--nodes {len(hosts)}")
        hosts = hosts[: request.nodes]
    room = [_room(host, machine, allocation) for host in hosts]
    counts = _counts(request, machine, allocation, hosts, room)
    for host, count, most in zip(hosts, counts, room, strict=False):
        if most is not None and count > most:
            asked = f"--ppn {request.ppn}" if request.ppn else f"-n {request.ranks}"
            raise UserError(
                f"{asked} puts {count} ranks on {host.name}, which takes {most} "
                f"({_what_there_is(allocation)}): ask for fewer, or for a job with more per node."
            )
    return tuple(Host(host.name, count) for host, count in zip(hosts, counts, strict=False))


def _counts(
    request: Request,
    machine: Machine,
    allocation: Allocation,
    hosts: Sequence[Host],
    room: Sequence[int | None],
) -> list[int]:
    """Ranks per host, for as many of `hosts` as are needed."""
    ranks, nodes, ppn = request.ranks, request.nodes, request.ppn
    wish = [ppn or _default(host, machine, allocation) for host in hosts]
    if ranks is None:
        return wish
    if nodes and ppn and ranks != nodes * ppn:
        raise UserError(
            f"-n {ranks} contradicts --nodes {nodes} --ppn {ppn}, which is {nodes * ppn} ranks: "
            "leave one of them out."
        )
    if nodes and not ppn:
        if ranks < nodes:
            raise UserError(f"-n {ranks} is fewer than --nodes {nodes}: give fewer nodes.")
        return _spread(ranks, nodes)
    if ranks > sum(wish) and not ppn:
        known = [most for most in room if most is not None]
        wish = known if len(known) == len(hosts) else _spread(ranks, len(hosts))
    if ranks > sum(wish):
        asked = f"-n {ranks}" + (f" --ppn {ppn}" if ppn else "")
        raise _too_many(asked, allocation, f"-n {sum(wish)}")
    return _filled(ranks, wish)


def _filled(ranks: int, room: Sequence[int]) -> list[int]:
    """`ranks` dealt out host by host, each as full as it may be."""
    counts: list[int] = []
    for most in room:
        counts.append(min(most, ranks))
        ranks -= counts[-1]
        if ranks == 0:
            break
    return counts


def _spread(ranks: int, hosts: int) -> list[int]:
    """`ranks` dealt out evenly, the first hosts taking one more."""
    each, more = divmod(ranks, hosts)
    return [each + (i < more) for i in range(hosts) if each or i < more]


def _per_node(machine: Machine, allocation: Allocation) -> int | None:
    """Ranks that a node takes by the machine file; None where a chunk of the queue is no node."""
    queue = machine.queues.get(allocation.queue or "")
    return None if queue and queue.ranks_per_chunk else machine.node.ranks_per_node


def _default(host: Host, machine: Machine, allocation: Allocation) -> int:
    """The slots where somebody asked for them, else what the machine file says."""
    if allocation.slots_given:
        return host.slots
    return _per_node(machine, allocation) or host.slots


def _room(host: Host, machine: Machine, allocation: Allocation) -> int | None:
    """The most ranks that a host takes; None where nobody says (this host, a bare host name)."""
    node = _per_node(machine, allocation)
    if allocation.scheduler == "local":
        return None
    if allocation.scheduler == "hostfile" or not allocation.exists:
        return host.slots if allocation.slots_given else node
    cpus = 0 if allocation.slots_given else allocation.cpus_per_node or 0
    return max(host.slots, node or 0, cpus)


def _what_there_is(allocation: Allocation) -> str:
    count, slots = len(allocation.hosts), sum(host.slots for host in allocation.hosts)
    names = compress(host.name for host in allocation.hosts)
    return (
        f"{allocation.source}: {count} host{'s' * (count != 1)}"
        + (f" with {slots} slot{'s' * (slots != 1)}" if allocation.slots_given else "")
        + f", {names if len(names) < 80 else names[:76] + ' ...'}"
    )


def _too_many(asked: str, allocation: Allocation, most: str) -> UserError:
    return UserError(
        f"{asked} is more than there is ({_what_there_is(allocation)}): "
        f"give {most} or less, or ask the scheduler for more."
    )


# --- what the ranks see --------------------------------------------------------------------------


def _devices(machine: Machine, most: int) -> tuple[str, ...]:
    """The device of local rank 0, 1, ...; from the first again where ranks outnumber devices."""
    order = machine.device.order or tuple(range(machine.node.devices or 0))
    return tuple(str(order[local % len(order)]) for local in range(most)) if order else ()


def _variables(
    machine: Machine,
    allocation: Allocation,
    hosts: Sequence[Host],
    devices: Sequence[str],
    environ: Mapping[str, str],
) -> tuple[PlannedVariable, ...]:
    """The variables that all ranks get; what differs between ranks is allranks.launch.guard's."""
    file = f"machine file {machine.name}"
    local = allocation.scheduler == "local"
    master, why = "127.0.0.1" if local else hosts[0].name, "launcher: rank 0's host"
    if machine.master_suffix and not local:
        master = short(master) + machine.master_suffix
        why = f"{file}: rank 0's host on the fast network"
    counts = {host.slots for host in hosts}
    ranks = str(sum(host.slots for host in hosts))
    found = [
        PlannedVariable(MASTER_ADDR, master, why),
        PlannedVariable(MASTER_PORT, str(port_for(allocation.job_id or "")), "launcher: from the job's id"),
        PlannedVariable(WORLD_SIZE, ranks, "launcher: not every launcher tells it"),
    ]
    if len(counts) == 1:
        found.append(PlannedVariable(LOCAL_WORLD_SIZE, str(*counts), "launcher: the same on every host"))
    if machine.device.variable:
        found += [
            PlannedVariable(DEVICE_VARIABLE, machine.device.variable, f"{file}: set in each rank"),
            PlannedVariable(DEVICES, ",".join(devices), f"{file}: of local rank 0, 1, ..."),
        ]
    for name, variable in machine.active_variables(len(hosts)).items():
        by_user = any(key.startswith(f"variables.{name}") for key in machine.overridden)
        reason = f"user: machine.variables.{name}" if by_user else file
        if variable.when != "always":
            reason += f", on {variable.when.replace('_', ' ')}"
        reason += f": {variable.why}" if variable.why else ""
        value = variable.value
        if variable.prepend and environ.get(name):
            value = f"{value}:{environ[name]}"
        found.append(PlannedVariable(name, value, reason))
    return tuple(found)
