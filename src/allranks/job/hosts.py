"""The hosts on which a job may run, by PBS, by Slurm, by Flux, by a hostfile, or this host alone.

Everything is read from environment variables and files. Only in an instance of Flux, which has neither, its
command `flux` is asked.
"""

from __future__ import annotations

import math
import re
import socket
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from allranks.base.errors import UserError
from allranks.base.processes import usable_cpus
from allranks.job import flux, scheduler
from allranks.job.identity import repeated

Scheduler = Literal["pbs", "slurm", "flux", "hostfile", "local"]
MOST_HOSTS = 1_000_000  # more are a mistake, and would fill the memory


@dataclass(frozen=True)
class Host:
    """A host, and how many ranks may run there (its slots)."""

    name: str
    slots: int


@dataclass(frozen=True)
class Allocation:
    """The hosts of a job, in the order in which ranks are placed.

    `slots_given` says whether somebody asked for just these slots (mpiprocs, --ntasks, slots=N). Otherwise
    they are a default, such as PBS's one line for each chunk, and the machine file knows better.
    """

    scheduler: Scheduler
    job_id: str | None
    hosts: tuple[Host, ...]
    slots_given: bool = True
    queue: str | None = None
    cpus_per_node: int | None = None  # the CPUs of the smallest node, if the scheduler tells
    exists: bool = True  # False: placeholders for a job that is still to come
    source: str = "this host"


def find_allocation(environ: Mapping[str, str], hosts_file: str | Path | None = None) -> Allocation:
    """The hosts of this job: those of `hosts_file`, else of Flux, of PBS, of Slurm, else this host alone.

    Flux comes first, because an instance of it may run within a job of the others.
    """
    if hosts_file is not None:
        return from_hostfile(Path(hosts_file).expanduser())
    if flux.is_here(environ):
        return from_flux(flux.resources())
    if environ.get("PBS_NODEFILE"):
        return _from_pbs(environ)
    if _job_id(environ):
        _refuse_heterogeneous(environ)  # it has lists of nodes for its groups only
    if environ.get("SLURM_JOB_NODELIST") and _job_id(environ):
        return _from_slurm(environ)
    return Allocation("local", None, (Host(socket.gethostname(), _local_slots(environ)),), False)


def placeholder_allocation(nodes: int, scheduler: Scheduler) -> Allocation:
    """Hosts that stand for those of a job that does not exist yet: node1, node2, ..."""
    width = len(str(nodes))
    hosts = tuple(Host(f"node{i:0{width}}", 1) for i in range(1, nodes + 1))
    source = "placeholders, as there is no job yet"
    return Allocation(scheduler, None, hosts, False, source=source, exists=False)


def _job_id(environ: Mapping[str, str]) -> str | None:
    """The id that only this job has; None outside a job."""
    job = scheduler.this_job(environ)
    return job.unique_id if job else None


def _local_slots(environ: Mapping[str, str]) -> int:
    """One rank for each NVIDIA device that is visible; where there is none, one for each CPU."""
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        devices = len([name for name in visible.split(",") if name.strip() and name != "-1"])
    else:
        devices = sum(1 for path in Path("/dev").glob("nvidia[0-9]*") if path.name[6:].isdigit())
    return devices or usable_cpus()


# --- PBS and hostfiles ---------------------------------------------------------------------------


def _from_pbs(environ: Mapping[str, str]) -> Allocation:
    path = Path(environ["PBS_NODEFILE"])
    named = f"PBS_NODEFILE={path}"
    hosts = _merged(_lines(path, named), named)
    return Allocation(
        "pbs",
        _job_id(environ),
        hosts,
        slots_given=any(host.slots > 1 for host in hosts),
        queue=environ.get("PBS_QUEUE"),
        source=named,
    )


def from_hostfile(path: Path) -> Allocation:
    """The hosts that a file lists: lines like `host`, `host:4` (MPICH), `host slots=4` (Open MPI).

    As in PBS, a host may also have a line for each of its ranks.
    """
    named = f"--hosts {path}"
    lines = _lines(path, named)
    hosts = _merged(lines, named)
    given = any(slots is not None for _, _, slots in lines) or any(h.slots > 1 for h in hosts)
    return Allocation("hostfile", None, hosts, given, source=named)


_LINE = re.compile(
    r"""(?P<host>[A-Za-z0-9][\w.-]*)
        (?: : (?P<mpich>\d{1,6}) (?:\s+ binding=\S+ )?          # MPICH: host:slots
          | (?: \s+ (?: slots\s*=\s*(?P<openmpi>\d{1,6}) | max[_-]slots\s*=\s*\d+ ) )+ )?  # Open MPI
    """,
    re.VERBOSE | re.ASCII,
)


def _lines(path: Path, named: str) -> list[tuple[int, str, int | None]]:
    """(line number, host, slots or None where the line gives none) of a host list."""
    try:
        text = path.read_bytes().decode()  # read_text would hide CRLF
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is no text"
        raise UserError(
            f"{named} cannot be read ({why}): give a text file with one host a line."
        ) from error
    if "\r" in text:
        raise UserError(
            f"{named} has Windows line ends (CRLF), which launchers take for a part of a name: "
            f"remove them with `sed -i 's/\\r$//' {path}`."
        )
    found: list[tuple[int, str, int | None]] = []
    for number, line in enumerate(text.splitlines(), 1):
        entry = line.split("#")[0].strip()
        if not entry:
            continue
        if entry.count(":") > 1:
            raise UserError(
                f"{named}, line {number}: {entry!r} is an IPv6 address, which not every launcher can read "
                "in a list of hosts. Write the host's name, or its IPv4 address."
            )
        match = _LINE.fullmatch(entry)
        if match is None:
            raise UserError(
                f"{named}, line {number}: {entry!r} is no host. Write `host`, `host:4` or `host slots=4`."
            )
        slots = match["mpich"] or match["openmpi"]
        if slots is not None and int(slots) == 0:
            raise UserError(f"{named}, line {number}: {entry!r} gives no slot. Leave the line out.")
        found.append((number, match["host"], int(slots) if slots else None))
    if not found:
        raise UserError(f"{named} names no host: write one host a line.")
    return found


def _merged(lines: Sequence[tuple[int, str, int | None]], named: str) -> tuple[Host, ...]:
    """One Host for each name: lines without a count add up, as in PBS.

    Raises UserError if a host with a count stands twice.
    """
    counts: dict[str, int] = {}
    first: dict[str, tuple[int, int | None]] = {}
    for number, name, slots in lines:
        if name in first and (slots is not None or first[name][1] is not None):
            raise UserError(
                f"{named} has {name} twice, on lines {first[name][0]} and {number}, at least "
                f"once with a number of slots: write it once, with all its slots."
            )
        first.setdefault(name, (number, slots))
        counts[name] = counts.get(name, 0) + (slots or 1)
    return tuple(Host(name, slots) for name, slots in counts.items())


# --- Flux ----------------------------------------------------------------------------------------


def from_flux(answer: str) -> Allocation:
    """The hosts of an instance of Flux, by what it says of its resources. Raises UserError."""
    node_lists, counts = flux.node_lists_and_counts(answer)
    names = [name for node_list in node_lists for name in expand(node_list)]
    if len(names) != len(counts) or not names:
        raise UserError(f"Flux names {len(names)} hosts, but tells the cores of {len(counts)}.")
    slots: dict[str, int] = {}  # in an instance for tests one host may stand there several times
    for name, (cores, gpus) in zip(names, counts, strict=True):
        slots[name] = slots.get(name, 0) + (gpus or cores)
    return Allocation(
        "flux",
        None,
        tuple(map(Host, slots, slots.values())),
        slots_given=False,
        cpus_per_node=min(cores for cores, _ in counts) or None,
        source="Flux",
    )


# --- Slurm ---------------------------------------------------------------------------------------


def _from_slurm(environ: Mapping[str, str]) -> Allocation:
    """Slurm's job. Raises UserError if its variables contradict each other."""
    names = expand(environ["SLURM_JOB_NODELIST"])
    text = environ.get("SLURM_TASKS_PER_NODE", "")
    tasks = repeated(text, "SLURM_TASKS_PER_NODE") if text else [1] * len(names)
    if len(tasks) != len(names):
        step = environ.get("SLURM_STEP_NODELIST", "")
        if step and len(expand(step)) < len(names):
            raise UserError(
                f"This is a step of the job on {step}, a part of its nodes "
                f"({environ['SLURM_JOB_NODELIST']}): as in a shell by `srun -N1 --pty bash`. Start in the "
                "job's script or its first shell, or name the hosts with --hosts FILE."
            )
        raise UserError(
            f"SLURM_TASKS_PER_NODE={text} is for {len(tasks)} nodes, but "
            f"SLURM_JOB_NODELIST={environ['SLURM_JOB_NODELIST']} names {len(names)}: "
            "these are of two different jobs. Start again from a fresh shell of the job."
        )
    cpus = environ.get("SLURM_JOB_CPUS_PER_NODE", "")
    asked = _asked_for_tasks(environ, sum(tasks))
    if not asked:
        tasks = [_slurm_gpus_here(environ) or 1] * len(names)
    return Allocation(
        "slurm",
        _job_id(environ),
        tuple(map(Host, names, tasks)),
        slots_given=asked and any(count > 1 for count in tasks),
        queue=environ.get("SLURM_JOB_QOS") or environ.get("SLURM_JOB_PARTITION"),
        cpus_per_node=min(repeated(cpus, "SLURM_JOB_CPUS_PER_NODE")) if cpus else None,
        source=f"SLURM_JOB_ID={_job_id(environ)}",
    )


def _refuse_heterogeneous(environ: Mapping[str, str]) -> None:
    """Raises UserError in a Slurm job of several groups of nodes, each with resources of its own."""
    groups = environ.get("SLURM_HET_SIZE", "")
    if groups in ("", "0", "1"):
        return
    lists = sorted(name for name in environ if name.startswith("SLURM_JOB_NODELIST_HET_GROUP_"))
    named = "; ".join(f"{name}={environ[name]}" for name in lists)
    raise UserError(
        f"SLURM_HET_SIZE={groups}: this is a heterogeneous job of {groups} groups of nodes"
        f"{f' ({named})' if named else ''}, and allranks places ranks in ordinary jobs only. Submit such a "
        "one, or give the hosts of one group with --hosts FILE."
    )


def _asked_for_tasks(environ: Mapping[str, str], tasks: int) -> bool:
    """Whether somebody asked for the `tasks` of SLURM_TASKS_PER_NODE.

    If nobody did, Slurm makes up as many as there are CPUs, such as 64 a node. SLURM_NTASKS is then
    missing, or is the number of nodes.
    """
    if environ.get("SLURM_NTASKS_PER_NODE"):
        return True
    return environ.get("SLURM_NTASKS", "").strip() == str(tasks)


def _slurm_gpus_here(environ: Mapping[str, str]) -> int:
    """The GPUs that the job has on this node, 0 for none: `4`, or with types `a100:4`, `a100:2,v100:2`."""
    text = environ.get("SLURM_GPUS_ON_NODE", "").strip()
    if not text:
        return 0
    count = 0
    for part in text.split(","):
        number = part.rpartition(":")[2]
        if not re.fullmatch("[0-9]{1,4}", number):
            raise UserError(
                f"SLURM_GPUS_ON_NODE={text!r} cannot be read: it is a number of GPUs, such as 4."
            )
        count += int(number)
    return count


def expand(node_list: str) -> list[str]:
    """The hosts of a Slurm node list, in order: `a[001-003,7],b2,c[1-2]-x[0-3]`."""
    hosts: list[str] = []
    for part in _split_outside_brackets(node_list):
        pieces = re.split(r"\[([^\[\]]*)\]", part)
        all_indices = [_indices(ranges, node_list) for ranges in pieces[1::2]]
        count = math.prod(map(len, all_indices)) + len(hosts)
        named = all(re.fullmatch(r"[A-Za-z0-9_.-]*", piece) for piece in pieces[::2])
        if not part or part[0] in "-." or not named or count > MOST_HOSTS:
            raise UserError(
                f"{node_list!r} is not a Slurm node list: it is written like a[001-003,7],b2. "
                "`scontrol show hostnames` shows what Slurm makes of it."
            )
        names = [pieces[0]]
        for indices, after in zip(all_indices, pieces[2::2], strict=True):
            names = [f"{name}{index}{after}" for name in names for index in indices]
        hosts += names
    return hosts


def first_host(node_list: str) -> str:
    """The first host of a Slurm node list, where Slurm starts rank 0: `nid[001-003,7]` gives `nid001`."""
    return expand(node_list)[0]


def _split_outside_brackets(text: str) -> list[str]:
    return re.split(r",(?![^\[]*\])", text.strip())


def _indices(ranges: str, node_list: str) -> list[str]:
    """`001-003,7` gives 001, 002, 003, 7: the first number's width is kept."""
    found: list[str] = []
    for span in ranges.split(","):
        match = re.fullmatch(r"([0-9]{1,18})(?:-([0-9]{1,18}))?", span)
        if match is None or not 0 <= int(match[2] or match[1]) - int(match[1]) < MOST_HOSTS:
            raise UserError(
                f"[{ranges}] in the node list {node_list!r} cannot be read: it is written like [001-003,7]."
            )
        low, high = match[1], match[2] or match[1]
        found += [f"{i:0{len(low)}}" for i in range(int(low), int(high) + 1)]
    return found


def compress(names: Iterable[str]) -> str:
    """Slurm's short form of a list of hosts, order kept: a001, a002, b -> `a[001-002],b`."""
    groups: list[tuple[str, list[str]]] = []  # runs of neighbours with one stem
    for name in names:
        match = re.fullmatch(r"(.*?)([0-9]+)", name)
        stem, digits = (match[1], match[2]) if match else (name, "")
        if digits and groups and groups[-1][0] == stem and groups[-1][1]:
            groups[-1][1].append(digits)
        else:
            groups.append((stem, [digits] if digits else []))
    return ",".join(_bracketed(stem, digits) for stem, digits in groups)


def _bracketed(stem: str, digits: Sequence[str]) -> str:
    if len(digits) < 2:
        return stem + "".join(digits)
    spans: list[list[str]] = []
    for number in digits:
        follows = spans and f"{int(spans[-1][-1]) + 1:0{len(spans[-1][0])}}" == number
        if follows:
            spans[-1][1:] = [number]
        else:
            spans.append([number])
    return f"{stem}[{','.join('-'.join(span) for span in spans)}]"


# --- names and addresses ---------------------------------------------------------------------------


def is_this_host(name: str) -> bool:
    """Whether a host of a list is the one this runs on, by its short name, in which case does not count."""
    if name in ("localhost", "127.0.0.1", "::1"):
        return True
    return short(name).lower() == short(socket.gethostname()).lower()


def short(name: str) -> str:
    """A host's name without its domain; an address stays whole."""
    is_address = ":" in name or re.fullmatch(r"[0-9.]+", name)
    return name if is_address else name.partition(".")[0]


def is_loopback(address: str) -> bool:
    """Whether a numeric address, of IPv4 or IPv6, leads back to the host that uses it."""
    return address.startswith("127.") or address in ("::1", "::ffff:127.0.0.1")


def leads_back(name: str) -> bool:
    """Whether this host takes `name` for itself: all that the name leads to are loopback addresses.

    False for a name that cannot be looked up: the later attempt to connect to it raises an error.
    """
    try:
        found = socket.getaddrinfo(name, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError):  # Python cannot even ask for a name such as `a..b`
        return False
    return all(is_loopback(str(place[0])) for *_, place in found)


def refuse_loopback(name: str, what: str) -> None:
    """Raises UserError if `name`, for which `what` stands in the message, leads back to this host.

    For a name by which several hosts are to reach one of them: each of them would reach itself. A loopback
    address that is written as such is taken as meant: several "hosts" may be containers on one network.
    """
    if not is_loopback(name) and leads_back(name):
        raise UserError(
            f"{what}={name} leads back to the host that uses it ({socket.gethostname()}), but several "
            "hosts are to reach one there: give an address of rank 0's host on the hosts' own network, the "
            "same on every rank."
        )


def address_for(hosts: Sequence[str]) -> str:
    """This host's address on its way to `hosts`: loopback where they are all this one.

    Raises UserError if the first other host cannot be found, or its name leads back to this host.
    """
    other = next((host for host in hosts if not is_this_host(host)), None)
    if other is None:
        return "127.0.0.1"
    try:
        found = socket.getaddrinfo(other, 9, type=socket.SOCK_DGRAM)
        found.sort(key=lambda entry: entry[0] != socket.AF_INET)  # IPv4 where there is any
        family, kind, protocol, _, place = found[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.connect(place)  # only looks up the route; nothing is sent
            own = str(probe.getsockname()[0])
    except (OSError, UnicodeError) as error:
        why = "no host can have this name"  # as `a..b`, or with more than 63 letters without a dot
        if isinstance(error, OSError):
            why = error.strerror or str(error)
        raise UserError(
            f"host {other} of the allocation cannot be found from {socket.gethostname()} "
            f"({why}): look at the hostfile, or take that host out."
        ) from error
    if is_loopback(own):
        raise UserError(
            f"host {other} of the allocation leads back to {socket.gethostname()} ({own}), so that no "
            "other host could reach this one: put the name right in /etc/hosts, or give the hosts' names "
            "on their own network."
        )
    return own
