"""From what the user asks for, a machine and an allocation to a command line and each rank's place.

A plan says which command starts the ranks, with which variables around it, and where each rank will be.
It is made from the user's request, the machine file and the job's hosts, in four steps: how many ranks go
on which host; which launcher starts them; which CPUs and which device each of them gets; which variables
all of them need.

Every rank is started as `python -m allranks.launch.guard -- PROGRAM ...`, which turns the launcher's own
variables into RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE and MASTER_*, and shows the rank its device.
Making a plan writes nothing; only `mpiexec --version` is run, where no file says which MPI it is.
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
    LAUNCH_ID,
    LOCAL_WORLD_SIZE,
    MASTER_ADDR,
    MASTER_PORT,
    WORLD_SIZE,
    port_for,
)
from allranks.launch import launchers

GUARD = "allranks.launch.guard"  # the module that every rank runs first
# Variables of the user's shell that every rank needs: without them it finds neither its program nor the
# job's end. An mpiexec that passes no variable to the ranks by itself gets these names as options.
HANDED_ON = ("PATH", "LD_LIBRARY_PATH", "PYTHONPATH", "ALLRANKS_DEADLINE")


@dataclass(frozen=True)
class Request:
    """What to start and how often. With None and `auto`, the machine and the allocation decide."""

    program: tuple[str, ...]
    ranks: int | None = None
    nodes: int | None = None
    ppn: int | None = None  # ranks per node
    spares: int = 0  # so many of the nodes, the last ones, get no ranks: they replace nodes that are gone
    launcher: str = "auto"
    hosts_path: str = "allranks-hosts"  # the file for a list of hosts that is too long for an argument
    placed: tuple[Host, ...] = ()  # if given, exactly these ranks on these hosts are planned
    passed: tuple[str, ...] = ()  # variables that the launcher must pass on besides the plan's
    installed_here: bool = True  # False: the plan is for another host, so do not look for programs here


@dataclass(frozen=True)
class PlannedVariable:
    """A variable that every rank gets, and the reason for it, which a dry run shows."""

    name: str
    value: str
    why: str


@dataclass(frozen=True)
class RankPlace:
    """Where a rank runs."""

    rank: int
    host: str
    local_rank: int
    cpus: str | None  # None: not bound
    device: str | None  # None: the machine file knows of none


@dataclass(frozen=True)
class Plan:
    """A command line, and what it needs around it and before it."""

    launcher: str  # mpiexec, srun, flux or torchrun
    dialect: str  # its kind, a key of launchers.LAUNCHERS: for an mpiexec hydra, pals or openmpi
    argv: tuple[str, ...]
    variables: tuple[PlannedVariable, ...]  # the variables that are set for the command
    hosts: tuple[Host, ...]  # those used, in rank order; their slots are the ranks placed there
    machine: Machine
    cpus: tuple[str, ...] = ()  # the CPUs of local rank 0, 1, ...; empty if ranks are not bound to CPUs
    devices: tuple[str, ...] = ()  # the device of local rank 0, 1, ...; empty if none is known
    files: tuple[launchers.TextFile, ...] = ()  # the files that must be written before the command starts
    spares: tuple[Host, ...] = ()  # hosts of the allocation that are not used; their slots are its own

    @cached_property
    def world_size(self) -> int:
        """The number of ranks."""
        return sum(host.slots for host in self.hosts)

    @cached_property
    def host_of_each_rank(self) -> tuple[str, ...]:
        """The names of the hosts of rank 0, 1, ..."""
        return tuple(host.name for host in self.hosts for _ in range(host.slots))

    def argv_for(self, program: Sequence[str]) -> tuple[str, ...]:
        """The same command line for another program, such as a check beforehand."""
        end_of_ours = self.argv.index("--", self.argv.index(GUARD)) + 1
        return (*self.argv[:end_of_ours], *program)

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
        for local_rank in range(host.slots):
            cpus = self.cpus[local_rank] if self.cpus else None
            device = self.devices[local_rank] if self.devices else None
            yield RankPlace(first + local_rank, host.name, local_rank, cpus, device)


def make_plan(
    request: Request, machine: Machine, allocation: Allocation, environ: Mapping[str, str] | None = None
) -> Plan:
    """The command line for this request. Raises UserError if it cannot be had."""
    environ = os.environ if environ is None else environ
    hosts = place(request, machine, allocation)
    most_on_a_host = max(host.slots for host in hosts)

    launcher = launchers.choose(request.launcher, machine, allocation, request.installed_here)
    if request.installed_here or "/" in request.program[0]:
        check_program(request.program)
    kind = launcher
    if launcher == "mpiexec":
        kind = launchers.mpiexec_kind(machine, request.installed_here)

    binding = launchers.binding(kind, machine, most_on_a_host, allocation.cpus_per_node)
    devices = _devices(machine, most_on_a_host)
    variables = _variables(machine, allocation, hosts, devices, environ)
    job = launchers.Job(
        machine=machine,
        allocation=allocation,
        hosts=hosts,
        variables=_names_to_hand_on(request, variables, environ),
        master=_meeting_place(variables),
        hosts_path=request.hosts_path,
        installed_here=request.installed_here,
    )
    per_rank = (sys.executable, "-m", GUARD, "--", *request.program)
    argv, files = launchers.command_line(kind, job, binding, per_rank)

    if machine.device.one_visible or machine.device.variable:
        devices = tuple(f"{device}, seen as 0" for device in devices)
    return Plan(
        launcher=launcher,
        dialect=kind,
        argv=argv,
        variables=variables,
        hosts=hosts,
        machine=machine,
        cpus=binding.cpus,
        devices=devices,
        files=files,
        spares=_not_used(allocation, hosts),
    )


def check_program(program: Sequence[str]) -> None:
    """Raises UserError if the program, or the script of a Python program, cannot be found."""
    name = program[0]
    if shutil.which(name) is None:
        if Path(name).is_file():
            raise _cannot_be_run(name)
        raise UserError(f"The program {name} is not found: check the name, or give its path.")
    if not Path(name).name.startswith("python") or len(program) == 1:
        return
    script = program[1]
    if script and not script.startswith("-") and not Path(script).exists():
        raise UserError(f"The program {script} is not found: check the name, or give its path.")


def _cannot_be_run(name: str) -> UserError:
    """For a file that is there, and that the shell would not find or run by this name."""
    path = name if "/" in name else f"./{name}"
    if os.access(name, os.X_OK):
        return UserError(
            f"The program {name} is in this folder, and a program without a path is looked for on PATH "
            f"alone: write {path}."
        )
    written = "" if path == name else f", and write {path}"
    return UserError(f"The program {name} cannot be run: make it so with `chmod +x {name}`{written}.")


def check_least_ranks(min_ranks: int | None, plan: Plan) -> None:
    """Raises UserError if --min-ranks asks for more ranks than there are when all hosts are well."""
    if min_ranks is not None and min_ranks > plan.world_size:
        raise UserError(
            f"--min-ranks {min_ranks} is more than the {plan.world_size} rank"
            f"{'s' * (plan.world_size > 1)} to be started: give {plan.world_size} or less, or more ranks."
        )


# --- how many ranks, and where -------------------------------------------------------------------


def place(request: Request, machine: Machine, allocation: Allocation) -> tuple[Host, ...]:
    """The hosts to use, each with its number of ranks as `slots`.

    Raises UserError if the allocation does not have what is asked for.
    """
    if request.placed:
        return request.placed
    asked = (("-n", request.ranks), ("--nodes", request.nodes), ("--ppn", request.ppn))
    for option, value in asked:
        if value is not None and value < 1:
            raise UserError(f"{option} {value} is not valid: give a whole number >= 1.")

    hosts = allocation.hosts
    if request.nodes is not None:
        if request.nodes > len(hosts):
            raise _too_many(f"--nodes {request.nodes}", allocation, f"--nodes {len(hosts)}")
        hosts = hosts[: request.nodes]
    if request.spares:
        if request.spares >= len(hosts):
            raise _too_many_spares(request, allocation, len(hosts))
        hosts = hosts[: -request.spares]
    room = [room_on(host, machine, allocation) for host in hosts]
    counts = _counts(request, machine, allocation, hosts, room)

    # There may be fewer counts than hosts: the last hosts are then not needed.
    placed: list[Host] = []
    for host, count, most in zip(hosts, counts, room, strict=False):
        if most is not None and count > most:
            what = f"--ppn {request.ppn}" if request.ppn else f"-n {request.ranks}"
            raise UserError(
                f"{what} puts {count} ranks on {host.name}, which takes {most} "
                f"({_what_there_is(allocation)}): ask for fewer, or for a job with more per node."
            )
        placed.append(Host(host.name, count))
    return tuple(placed)


def _counts(
    request: Request,
    machine: Machine,
    allocation: Allocation,
    hosts: Sequence[Host],
    room: Sequence[int | None],
) -> list[int]:
    """Ranks per host, for as many of `hosts` as are needed. `room` is the most that each takes."""
    ranks, ppn = request.ranks, request.ppn
    nodes = len(hosts) if request.nodes else None
    aside = f" --spares {request.spares}" if request.spares else ""
    usual = [ppn or _default(host, machine, allocation) for host in hosts]
    if ranks is None:
        return usual
    if nodes and ppn and ranks != nodes * ppn:
        raise UserError(
            f"-n {ranks} contradicts --nodes {request.nodes}{aside} --ppn {ppn}, which is {nodes * ppn} "
            "ranks: leave one of them out."
        )
    if nodes and not ppn:
        if ranks < nodes:
            raise UserError(f"-n {ranks} is fewer than --nodes {request.nodes}{aside}: give fewer nodes.")
        return _spread(ranks, nodes)

    if ranks > sum(usual) and not ppn:
        # More than usual were asked for: as many as each host takes, or evenly if that is not known.
        known = [most for most in room if most is not None]
        usual = known if len(known) == len(hosts) else _spread(ranks, len(hosts))
    if ranks > sum(usual):
        asked = f"-n {ranks} --ppn {ppn}" if ppn else f"-n {ranks}"
        raise _too_many(asked, allocation, f"-n {sum(usual)}")
    return _filled(ranks, usual)


def _filled(ranks: int, room: Sequence[int]) -> list[int]:
    """`ranks` dealt out host by host, each as full as it may be."""
    counts: list[int] = []
    left = ranks
    for most in room:
        counts.append(min(most, left))
        left -= counts[-1]
        if left == 0:
            break
    return counts


def _spread(ranks: int, hosts: int) -> list[int]:
    """`ranks` dealt out evenly, the first hosts taking one more. Hosts without a rank are left out."""
    each, more = divmod(ranks, hosts)
    counts = [each + 1 if number < more else each for number in range(hosts)]
    return [count for count in counts if count]


def _per_node(machine: Machine, allocation: Allocation) -> int | None:
    """Ranks that a node takes by the machine file; None if a chunk of the queue is not a node."""
    queue = machine.queues.get(allocation.queue or "")
    if queue and queue.ranks_per_chunk:
        return None
    return machine.node.ranks_per_node


def _default(host: Host, machine: Machine, allocation: Allocation) -> int:
    """The slots where somebody asked for them, else what the machine file says."""
    if allocation.slots_given:
        return host.slots
    return _per_node(machine, allocation) or host.slots


def room_on(host: Host, machine: Machine, allocation: Allocation) -> int | None:
    """The most ranks that a host takes; None if that is not known (this host, a bare host name)."""
    per_node = _per_node(machine, allocation)
    if allocation.scheduler == "local":
        return None
    if allocation.scheduler == "hostfile" or not allocation.exists:
        return host.slots if allocation.slots_given else per_node
    cpus = 0 if allocation.slots_given else allocation.cpus_per_node or 0
    return max(host.slots, per_node or 0, cpus)


def _not_used(allocation: Allocation, hosts: Sequence[Host]) -> tuple[Host, ...]:
    """The hosts of the allocation, in its order, that are not among `hosts`."""
    used = {host.name for host in hosts}
    return tuple(host for host in allocation.hosts if host.name not in used)


def _what_there_is(allocation: Allocation) -> str:
    """The allocation in short, for a message: its source, hosts and slots."""
    count = len(allocation.hosts)
    slots = sum(host.slots for host in allocation.hosts)
    names = compress(host.name for host in allocation.hosts)
    if len(names) >= 80:
        names = names[:76] + " ..."
    text = f"{allocation.source}: {count} host{'s' * (count != 1)}"
    if allocation.slots_given:
        text += f" with {slots} slot{'s' * (slots != 1)}"
    return f"{text}, {names}"


def _too_many_spares(request: Request, allocation: Allocation, nodes: int) -> UserError:
    """`nodes` are those that there are without --spares."""
    most = f"at most --spares {nodes - 1}" if nodes > 1 else "no --spares"
    return UserError(
        f"--spares {request.spares} leaves no host for the ranks ({_what_there_is(allocation)}): give "
        f"{most}, or ask the scheduler for more hosts."
    )


def _too_many(asked: str, allocation: Allocation, most: str) -> UserError:
    return UserError(
        f"{asked} is more than there is ({_what_there_is(allocation)}): "
        f"give {most} or less, or ask the scheduler for more."
    )


# --- what the ranks see --------------------------------------------------------------------------


def _devices(machine: Machine, most_on_a_host: int) -> tuple[str, ...]:
    """The device of local rank 0, 1, ...; from the first again where ranks outnumber devices."""
    order = machine.device.order or tuple(range(machine.node.devices or 0))
    if not order:
        return ()
    return tuple(str(order[local_rank % len(order)]) for local_rank in range(most_on_a_host))


def _variables(
    machine: Machine,
    allocation: Allocation,
    hosts: Sequence[Host],
    devices: Sequence[str],
    environ: Mapping[str, str],
) -> tuple[PlannedVariable, ...]:
    """The variables that all ranks get. What differs between ranks each rank's guard sets."""
    return (
        *_master_variables(machine, allocation, hosts, environ),
        *_size_variables(hosts),
        *_device_variables(machine, devices),
        *_machine_variables(machine, len(hosts), environ),
    )


def _master_variables(
    machine: Machine, allocation: Allocation, hosts: Sequence[Host], environ: Mapping[str, str]
) -> list[PlannedVariable]:
    """Where rank 0 is reached: at the user's own address, else by the name of its host."""
    is_local = allocation.scheduler == "local"
    address = "127.0.0.1" if is_local else hosts[0].name
    why = "launcher: rank 0's host"
    if machine.master_suffix and not is_local:
        address = short(address) + machine.master_suffix
        why = f"machine file {machine.name}: rank 0's host on the fast network"
    # Inside a rank of another launch this variable is set, too, by that launch and not by the user. A
    # launch that is started there must not take over its address.
    if environ.get(MASTER_ADDR) and not environ.get(LAUNCH_ID):
        address = environ[MASTER_ADDR]
        why = f"user: {MASTER_ADDR}"
    port = port_for(allocation.job_id or "")
    return [
        PlannedVariable(MASTER_ADDR, address, why),
        PlannedVariable(MASTER_PORT, str(port), "launcher: from the job's id"),
    ]


def _size_variables(hosts: Sequence[Host]) -> list[PlannedVariable]:
    """How many ranks there are, in all and on each host: not every launcher tells the ranks."""
    counts = [host.slots for host in hosts]
    found = [PlannedVariable(WORLD_SIZE, str(sum(counts)), "launcher: not every launcher tells it")]
    if len(set(counts)) == 1:
        why = "launcher: the same on every host"
        found.append(PlannedVariable(LOCAL_WORLD_SIZE, str(counts[0]), why))
    return found


def _device_variables(machine: Machine, devices: Sequence[str]) -> list[PlannedVariable]:
    """Which device each local rank is to see, where the machine file says by which variable."""
    if not machine.device.variable:
        return []
    file = f"machine file {machine.name}"
    return [
        PlannedVariable(DEVICE_VARIABLE, machine.device.variable, f"{file}: set in each rank"),
        PlannedVariable(DEVICES, ",".join(devices), f"{file}: of local rank 0, 1, ..."),
    ]


def _machine_variables(machine: Machine, nodes: int, environ: Mapping[str, str]) -> list[PlannedVariable]:
    """The machine file's variables, with the reasons that it gives."""
    found: list[PlannedVariable] = []
    for name, variable in machine.active_variables(nodes).items():
        key = f"variables.{name}"
        is_users = any(given == key or given.startswith(f"{key}.") for given in machine.overridden)
        why = f"user: machine.variables.{name}" if is_users else f"machine file {machine.name}"
        if variable.when != "always":
            why += f", on {variable.when.replace('_', ' ')}"
        if variable.why:
            why += f": {variable.why}"
        value = variable.value.replace("{uid}", str(os.getuid()))  # the same on all nodes of a cluster
        if variable.prepend and environ.get(name):
            value = f"{value}:{environ[name]}"
        found.append(PlannedVariable(name, value, why))
    return found


def _names_to_hand_on(
    request: Request, variables: Sequence[PlannedVariable], environ: Mapping[str, str]
) -> tuple[str, ...]:
    """The names of all variables that must reach the ranks, each once."""
    of_plan = [variable.name for variable in variables]
    of_user = [name for name in HANDED_ON if environ.get(name)]
    return tuple(dict.fromkeys([*of_plan, *of_user, *request.passed]))


def _meeting_place(variables: Sequence[PlannedVariable]) -> str:
    """Rank 0's address and port, host:port."""
    by_name = {variable.name: variable.value for variable in variables}
    return f"{by_name[MASTER_ADDR]}:{by_name[MASTER_PORT]}"
