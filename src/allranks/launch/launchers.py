"""The command line of each launcher: mpiexec of MPICH, PALS and Open MPI, srun, `flux run`, torchrun.

A launcher is the program that starts one process for each rank, on the hosts that it is given. Three kinds
of MPI have a program called `mpiexec`, and each takes different options, so each kind is a launcher of its
own here.

All that is known of a launcher stands in the table LAUNCHERS at the end of this module. A new one needs
    1. a function that writes its command line, and an entry in that table;
    2. its name in job/machine.py (`Launcher`, or `mpiexec` for another MPI), so that it can be asked for;
    3. the variables that it gives to each rank in job/identity.py, if they are not there yet.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Literal, NamedTuple

from allranks.base.errors import UserError
from allranks.base.text import did_you_mean
from allranks.job import machine as machines
from allranks.job import scheduler
from allranks.job.hosts import Allocation, Host, compress, is_this_host
from allranks.job.machine import Machine, Node

# A longer list of hosts goes into a file. Linux takes 128 KiB for one argument; half of that leaves room.
LONGEST_ARGUMENT_BYTES = 65536
VERSION_LIMIT_S = 20  # how long `mpiexec --version` may take: it is slow if the file system is


# --- what a command line is made from, and what it is --------------------------------------------


@dataclass(frozen=True)
class Binding:
    """Which CPUs each rank may use.

    `how` is what mpiexec is to do: leave the ranks alone (none), give local rank 0, 1, ... the CPUs in
    `cpus` (list), or give each of them the next `cpus_each` (depth).
    """

    how: Literal["none", "list", "depth"]
    cpus_each: int | None = None
    # The CPUs of local rank 0, 1, ..., such as 0-7; empty if ranks are not bound to CPUs.
    cpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """What is to be started where. The `slots` of a host are the ranks to be placed there."""

    machine: Machine
    allocation: Allocation
    hosts: tuple[Host, ...]
    variables: tuple[str, ...]  # the names of those that each rank needs
    master: str  # host:port where torchrun's processes meet
    hosts_path: str  # where a list of hosts may be written that is too long for an argument
    installed_here: bool  # False: the command is for another machine, so nothing is looked for on this one

    @cached_property
    def ranks(self) -> int:
        """The number of ranks on all hosts."""
        return sum(host.slots for host in self.hosts)

    @cached_property
    def most_on_a_host(self) -> int:
        """The number of ranks on the host that has the most."""
        return max(host.slots for host in self.hosts)

    @cached_property
    def fewest_on_a_host(self) -> int:
        """The number of ranks on the host that has the fewest."""
        return min(host.slots for host in self.hosts)

    @cached_property
    def is_even(self) -> bool:
        """Whether every host gets the same number of ranks."""
        return self.fewest_on_a_host == self.most_on_a_host

    @cached_property
    def takes_all_hosts(self) -> bool:
        """Whether all hosts of a scheduler's job are used: then the scheduler's own launcher knows them."""
        if self.allocation.scheduler == "hostfile":
            return False
        given = [host.name for host in self.allocation.hosts]
        used = [host.name for host in self.hosts]
        return given == used

    def mpiexec(self) -> str:
        """The mpiexec to call: the one that is found here, else just its name."""
        found = path_of("mpiexec") if self.installed_here else None
        return found or "mpiexec"


class TextFile(NamedTuple):
    """A file that must be there before the command starts."""

    path: str
    content: str


class CommandLine(NamedTuple):
    """A command, and the files that it reads."""

    argv: tuple[str, ...]
    files: tuple[TextFile, ...] = ()


@dataclass(frozen=True)
class Launcher:
    """One kind of launcher: an entry of the table LAUNCHERS."""

    name: str  # the word for --launcher; several kinds share `mpiexec`
    command_line: Callable[[Job, Binding, Sequence[str]], CommandLine]
    binding: Callable[[Node, int, int | None], Binding]
    remedy: str  # how to get it, where it is not installed
    version_says: tuple[str, ...] = ()  # words of this mpiexec's `--version` alone, in small letters


def command_line(kind: str, job: Job, binding: Binding, per_rank: Sequence[str]) -> CommandLine:
    """The whole command line that starts `per_rank` in every rank, and the files that it reads.

    `kind` is a key of LAUNCHERS. Raises UserError if this launcher cannot place the ranks like that.
    """
    return LAUNCHERS[kind].command_line(job, binding, per_rank)


# --- which launcher ------------------------------------------------------------------------------


def choose(asked: str, machine: Machine, allocation: Allocation, installed_here: bool) -> str:
    """The launcher to take: mpiexec, srun, flux or torchrun.

    `auto` means the machine file's, else the first that is installed. Raises UserError for a launcher that
    is not known, not installed, or not of use here.
    """
    if asked not in machines.LAUNCHERS:
        near = did_you_mean(asked, machines.LAUNCHERS)
        raise UserError(f"--launcher {asked} is not one of {', '.join(machines.LAUNCHERS)}.{near}")
    launcher = machine.launcher if asked == "auto" else asked
    if launcher == "auto":
        launcher = _first_installed(allocation)
    if installed_here and not is_installed(launcher):
        raise _not_installed(launcher)
    if launcher == "srun" and allocation.scheduler == "local":
        raise UserError(
            "--launcher srun needs a job of Slurm: get one with `salloc`, or `allranks submit`."
        )
    if launcher == "flux" and allocation.exists and allocation.scheduler != "flux":
        raise UserError(
            "--launcher flux needs an instance of Flux: get one with `flux alloc`, and leave --hosts out."
        )
    return launcher


def _first_installed(allocation: Allocation) -> str:
    """The launcher where nobody names one; the last of the order where none is installed."""
    # Slurm's own launcher knows its jobs best. Elsewhere an MPI starts ranks on several hosts by itself,
    # and torchrun does not.
    order = scheduler.launchers(allocation.scheduler)
    return next((name for name in order if is_installed(name)), order[-1])


def is_installed(launcher: str) -> bool:
    """Whether the launcher can be started here."""
    if launcher == "torchrun":  # started as a module of this Python
        return importlib.util.find_spec("torch") is not None
    return path_of(launcher) is not None


def _not_installed(launcher: str) -> UserError:
    remedy = next(known.remedy for known in LAUNCHERS.values() if known.name == launcher)
    names = dict.fromkeys(known.name for known in LAUNCHERS.values())
    others = " or ".join(name for name in names if is_installed(name))
    end = f"; --launcher {others} would work." if others else "."
    return UserError(f"--launcher {launcher} is not installed here: {remedy}{end}")


def path_of(launcher: str) -> str | None:
    """How to call the launcher: the one beside this Python, else the one on PATH; None without either.

    The mpich wheel brings an mpiexec beside Python. Its ranks' mpi4py uses the same wheel's MPI, which no
    other mpiexec can start.
    """
    beside = Path(sys.executable).parent / launcher
    found = shutil.which(launcher)
    if os.access(beside, os.X_OK):
        return launcher if found and Path(found).samefile(beside) else str(beside)
    return launcher if found else None


def mpiexec_kind(machine: Machine, installed_here: bool) -> str:
    """Whose options `mpiexec` takes, as a key of LAUNCHERS.

    The machine file says it, or `mpiexec --version`. Raises UserError if neither does.
    """
    if machine.mpiexec != "auto":
        return machine.mpiexec
    path = path_of("mpiexec")
    if not installed_here or path is None:
        return "hydra"
    said = _version_of(path)
    for kind, known in LAUNCHERS.items():
        if any(words in said.lower() for words in known.version_says):
            return kind
    raise UserError(
        f"`{path} --version` names no MPI that is known ({said.strip()[:80]!r}): "
        "say which it is with machine.mpiexec=hydra, openmpi or pals."
    )


def _version_of(path: str) -> str:
    try:
        done = subprocess.run(
            [path, "--version"],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=VERSION_LIMIT_S,
            check=False,
            stdin=subprocess.DEVNULL,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"`{path} --version` does not answer ({type(error).__name__}): "
            "say which MPI it is with machine.mpiexec=hydra, openmpi or pals."
        ) from error
    return done.stdout + done.stderr


# --- a launch within a step of Slurm -------------------------------------------------------------

# Variables in which srun tells a step's processes what was asked for it, and from which another srun takes
# its own options. Of `allranks launch` inside `srun --pty bash` they are those of the shell's step: they
# would bind all ranks to that step's CPU and memory, or contradict the options of the ranks' own step.
_OF_A_STEP = re.compile(
    "SLURM_(CPU_BIND.*|MEM_BIND.*|DISTRIBUTION|DIST_PLANESIZE|EXACT|WHOLE|TRES_PER_TASK"
    "|MEM_PER_CPU|MEM_PER_GPU|MEM_PER_NODE)"
)


def without_outer_step(environ: Mapping[str, str]) -> dict[str, str]:
    """The environment without what a step of Slurm around this process was given, for another srun."""
    if not environ.get("SLURM_STEP_ID"):  # these are then the job's own options, or the user's
        return dict(environ)
    return {name: value for name, value in environ.items() if not _OF_A_STEP.fullmatch(name)}


# --- which CPUs ----------------------------------------------------------------------------------


def binding(kind: str, machine: Machine, most_on_a_host: int, cpus_per_node: int | None) -> Binding:
    """How the ranks are bound. The more ranks there are on a host, the fewer CPUs each of them gets."""
    node = machine.node
    each = node.cpus_per_rank
    there = node.cpus or cpus_per_node
    if there and (each is None or each * most_on_a_host > there):
        each = max(1, there // most_on_a_host)
    return LAUNCHERS[kind].binding(node, most_on_a_host, each)


def _torchrun_binding(node: Node, most_on_a_host: int, cpus_each: int | None) -> Binding:
    """Torchrun binds nothing."""
    return Binding("none", cpus_each)


def _srun_binding(node: Node, most_on_a_host: int, cpus_each: int | None) -> Binding:
    """Srun binds by itself, to the machine file's list where that is what the site documents."""
    as_documented = most_on_a_host == len(node.cpu_list)
    return Binding("none", cpus_each, node.cpu_list if as_documented else ())


def _mpiexec_binding(node: Node, most_on_a_host: int, cpus_each: int | None) -> Binding:
    """An mpiexec binds as it is told: to the machine file's list, or to the next CPUs for each rank."""
    if node.bind == "list" and most_on_a_host <= len(node.cpu_list):
        return Binding("list", cpus_each, node.cpu_list[:most_on_a_host])
    if node.bind == "none" or cpus_each is None:
        return Binding("none", cpus_each)
    spans = [_span(local_rank * cpus_each, cpus_each) for local_rank in range(most_on_a_host)]
    return Binding("depth", cpus_each, tuple(spans))


def _openmpi_binding(node: Node, most_on_a_host: int, cpus_each: int | None) -> Binding:
    """Open MPI's mpiexec gives each rank the next cores. Raises UserError for a list of CPUs."""
    binding = _mpiexec_binding(node, most_on_a_host, cpus_each)
    if binding.how == "list":
        raise UserError(
            "machine.node.bind=list: mpiexec of Open MPI takes no list of CPUs on its command line. Give "
            "machine.node.bind=depth with machine.node.cpus_per_rank for CPUs in a row, or "
            "machine.node.bind=none with options of your own in machine.options.mpiexec."
        )
    return binding


def _span(first: int, count: int) -> str:
    """Neighbouring CPUs: 8-15, or 8 where it is one."""
    return f"{first}-{first + count - 1}" if count > 1 else str(first)


# --- command lines -------------------------------------------------------------------------------


def _pals(job: Job, binding: Binding, per_rank: Sequence[str]) -> CommandLine:
    """mpiexec of HPE's PALS, as on Aurora and Polaris (`man mpiexec` there)."""
    if any(host.slots != job.most_on_a_host for host in job.hosts[:-1]):
        raise UserError(
            "mpiexec of PALS puts the same number of ranks on every node but the last: "
            f"give --ppn {job.fewest_on_a_host}, or another --launcher."
        )
    argv = [job.mpiexec(), "-n", str(job.ranks), "--ppn", str(job.most_on_a_host)]
    if binding.how == "depth":
        argv += [f"--depth={binding.cpus_each}", "--cpu-bind", "depth"]
    if binding.how == "list":
        argv += ["--cpu-bind", f"list:{':'.join(binding.cpus)}"]
    files: tuple[TextFile, ...] = ()
    if not job.takes_all_hosts:
        argv += ["--hostfile", job.hosts_path]
        files = (TextFile(job.hosts_path, "".join(f"{host.name}\n" for host in job.hosts)),)
    return CommandLine((*argv, *job.machine.options.mpiexec, *per_rank), files)


def _hydra(job: Job, binding: Binding, per_rank: Sequence[str]) -> CommandLine:
    """mpiexec of MPICH, Intel MPI and MVAPICH, whose process manager is called Hydra."""
    hosts = _hosts_with_slots(job, "-hosts", "-f", "{}:{}\n")
    argv = [job.mpiexec(), "-n", str(job.ranks), *hosts.argv]
    if binding.how == "depth":
        unit = f"hwthread:{binding.cpus_each}"
        argv += ["-bind-to", unit, "-map-by", unit]
    if binding.how == "list":
        argv += ["-bind-to", "user:" + ",".join(_with_plus(cpus) for cpus in binding.cpus)]
    return CommandLine((*argv, *job.machine.options.mpiexec, *per_rank), hosts.files)


def _with_plus(cpus: str) -> str:
    """The CPUs of one rank as Hydra wants them: 0-2,8 becomes 0+1+2+8."""
    numbers: list[int] = []
    for span in cpus.split(","):
        first, _, last = span.partition("-")
        numbers += range(int(first), int(last or first) + 1)
    return "+".join(map(str, numbers))


def _openmpi(job: Job, binding: Binding, per_rank: Sequence[str]) -> CommandLine:
    """mpiexec of Open MPI."""
    place_by = [f"ppr:{job.most_on_a_host}:node" if job.is_even else "slot"]
    if binding.how != "none":
        place_by.append(f"PE={binding.cpus_each}")
    slots = {host.name: host.slots for host in job.allocation.hosts}
    if any(host.slots > slots[host.name] for host in job.hosts):
        place_by.append("OVERSUBSCRIBE")
    # Without --bind-to it would bind each rank to one core or one NUMA domain.
    bind_to = "none" if binding.how == "none" else "core"
    hosts = _hosts_with_slots(job, "--host", "--hostfile", "{} slots={}\n")

    argv = [job.mpiexec(), "-n", str(job.ranks)]
    argv += ["--map-by", ":".join(place_by), "--bind-to", bind_to]
    argv += hosts.argv
    for name in job.variables:  # Open MPI passes no variable to the ranks by itself
        argv += ["-x", name]
    return CommandLine((*argv, *job.machine.options.mpiexec, *per_rank), hosts.files)


def _hosts_with_slots(job: Job, option: str, file_option: str, line: str) -> CommandLine:
    """The part of a command line that names the hosts: `a:2,b:1`, or a file where that would be too long.

    `line` is a format of that file's lines, from a host's name and slots. On this host alone it is empty.
    It is empty too on a machine whose mpiexec must not be told the hosts. There mpiexec uses all hosts of
    the job, so this raises UserError where others were asked for.
    """
    if job.allocation.scheduler == "local":
        return CommandLine(())
    if not job.machine.options.name_hosts:
        if not job.takes_all_hosts:
            raise UserError(
                f"mpiexec of {job.machine.name} uses all nodes of a job: leave --nodes, --spares and "
                "--hosts out, or take --launcher srun."
            )
        return CommandLine(())
    text = ",".join(f"{host.name}:{host.slots}" for host in job.hosts)
    if len(text) <= LONGEST_ARGUMENT_BYTES:
        return CommandLine((option, text))
    content = "".join(line.format(host.name, host.slots) for host in job.hosts)
    return CommandLine((file_option, job.hosts_path), (TextFile(job.hosts_path, content),))


def _srun(job: Job, binding: Binding, per_rank: Sequence[str]) -> CommandLine:
    """Slurm's srun (`man srun`)."""
    argv = ["srun", "-N", str(len(job.hosts)), "-n", str(job.ranks)]
    files: tuple[TextFile, ...] = ()
    if job.is_even:
        argv.append(f"--ntasks-per-node={job.most_on_a_host}")
        if not job.takes_all_hosts:
            argv += ["-w", compress(host.name for host in job.hosts)]
    else:  # the host of each rank: `man srun`, --distribution=arbitrary
        of_each_rank = [host.name for host in job.hosts for _ in range(host.slots)]
        names = ",".join(of_each_rank)
        if len(names) > LONGEST_ARGUMENT_BYTES:
            # Srun takes a word with a slash for the path of a file with the names.
            names = job.hosts_path if "/" in job.hosts_path else f"./{job.hosts_path}"
            files = (TextFile(names, "".join(f"{name}\n" for name in of_each_rank)),)
        argv += ["--distribution=arbitrary", "-w", names]
    # Always -c: since version 22.05 srun does not take over --cpus-per-task from sbatch.
    argv += ["-c", str(binding.cpus_each or 1)]
    # By default srun lets the other ranks wait for ever for one that has failed.
    argv.append("--kill-on-bad-exit=1")
    return CommandLine((*argv, *job.machine.options.srun, *per_rank), files)


def _flux(job: Job, binding: Binding, per_rank: Sequence[str]) -> CommandLine:
    """Flux's `flux run` (`man flux-run`)."""
    if not job.is_even:
        raise UserError(
            "flux run starts the same number of ranks on every node: "
            f"give --ppn {job.fewest_on_a_host}, or another --launcher."
        )
    argv = ["flux", "run", "-N", str(len(job.hosts)), "-n", str(job.ranks)]
    argv += ["-c", str(binding.cpus_each or 1)]
    if not job.takes_all_hosts:
        argv.append(f"--requires=hosts:{compress(host.name for host in job.hosts)}")
    # By default Flux ends all tasks 30 s after the first has ended, and rank 0 may still draw the report.
    argv += ["-o", "exit-timeout=none"]
    return CommandLine((*argv, *job.machine.options.flux, *per_rank))


def _torchrun(job: Job, binding: Binding, per_rank: Sequence[str]) -> CommandLine:
    """PyTorch's torchrun: one on each host starts the ranks there.

    Torchrun does not reach other hosts by itself: srun or mpiexec starts it once on each.
    """
    if not job.is_even:
        raise UserError(
            "torchrun starts the same number of ranks on every node: "
            f"give --ppn {job.fewest_on_a_host}, or another --launcher."
        )
    python, _, module, *program = per_rank  # python -m allranks.launch.guard -- PROGRAM
    torchrun = (python, "-m", "torch.distributed.run", "--nproc-per-node", str(job.most_on_a_host))
    # The first `--` is for torchrun's own argument parser, which would swallow the second one.
    ranks = (*job.machine.options.torchrun, "-m", "--", module, *program)

    is_here = job.allocation.scheduler == "local" or is_this_host(job.hosts[0].name)
    if len(job.hosts) == 1 and is_here:
        return CommandLine((*torchrun, "--standalone", *ranks))

    meeting = ["--nnodes", str(len(job.hosts)), "--rdzv-backend", "c10d"]
    meeting += ["--rdzv-endpoint", job.master, "--rdzv-id", job.allocation.job_id or "allranks"]
    kinds = (job.machine.scheduler, job.allocation.scheduler)
    has_srun = any("srun" in scheduler.launchers(kind) for kind in kinds)
    if job.allocation.scheduler == "flux":
        outer = "flux"
    else:
        outer = "srun" if has_srun else mpiexec_kind(job.machine, job.installed_here)
    one_each = replace(job, hosts=tuple(Host(host.name, 1) for host in job.hosts))
    whole_node = Binding("none", job.machine.node.cpus or job.allocation.cpus_per_node)
    return command_line(outer, one_each, whole_node, (*torchrun, *meeting, *ranks))


# --- the table -----------------------------------------------------------------------------------

_GET_MPI = "load the site's MPI module, or `pip install mpich`"

# By kind. The order matters where mpiexec's version is read: the first kind that knows it is taken.
LAUNCHERS: dict[str, Launcher] = {
    "openmpi": Launcher(
        name="mpiexec",
        command_line=_openmpi,
        binding=_openmpi_binding,
        remedy=_GET_MPI,
        version_says=("open mpi", "openrte", "prte"),
    ),
    "hydra": Launcher(
        name="mpiexec",
        command_line=_hydra,
        binding=_mpiexec_binding,
        remedy=_GET_MPI,
        version_says=("hydra", "intel(r) mpi"),
    ),
    "pals": Launcher(
        name="mpiexec",
        command_line=_pals,
        binding=_mpiexec_binding,
        remedy=_GET_MPI,
        version_says=("pals",),
    ),
    "srun": Launcher(
        name="srun",
        command_line=_srun,
        binding=_srun_binding,
        remedy="srun comes with Slurm",
    ),
    "flux": Launcher(
        name="flux",
        command_line=_flux,
        binding=_srun_binding,
        remedy="it comes with Flux",
    ),
    "torchrun": Launcher(
        name="torchrun",
        command_line=_torchrun,
        binding=_torchrun_binding,
        remedy="install torch",
    ),
}
