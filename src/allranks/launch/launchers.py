"""A command line for each launcher: mpiexec of MPICH (hydra), PALS, Open MPI; srun; torchrun."""

from __future__ import annotations

import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from allranks.base.errors import UserError
from allranks.base.text import did_you_mean
from allranks.job.hosts import Allocation, Host, compress, is_this_host
from allranks.job.machine import LAUNCHERS, Machine

MAX_ARGUMENT = 65536  # bytes; Linux takes 128 KiB for one argument
Files = tuple[tuple[str, str], ...]  # (path, text) that must be there before the command starts
Built = tuple[tuple[str, ...], Files]


@dataclass(frozen=True)
class Binding:
    """`how` mpiexec binds (none, list, depth), CPUs a rank, and those of local rank 0, 1, ..."""

    how: str
    each: int | None = None
    cpus: tuple[str, ...] = ()


@dataclass(frozen=True)
class Job:
    """What a command line is made from. `hosts` have as `slots` the ranks to be placed there."""

    machine: Machine
    allocation: Allocation
    hosts: tuple[Host, ...]
    variables: tuple[str, ...]  # names of those that the ranks need
    master: str  # host:port
    hosts_path: str  # where a list of hosts may be written that is too long for an argument
    installed_here: bool

    @cached_property
    def ranks(self) -> int:
        return sum(host.slots for host in self.hosts)

    @cached_property
    def most(self) -> int:
        return max(host.slots for host in self.hosts)

    @cached_property
    def even(self) -> bool:
        return all(host.slots == self.most for host in self.hosts)

    @cached_property
    def whole(self) -> bool:
        """Whether all hosts of a scheduler's job are used, which its own launcher knows."""
        names = [host.name for host in self.allocation.hosts]
        return self.allocation.scheduler != "hostfile" and names == [h.name for h in self.hosts]

    def mpiexec(self) -> str:
        return (path_of("mpiexec") if self.installed_here else None) or "mpiexec"


def binding(machine: Machine, dialect: str, most: int, cpus_per_node: int | None) -> Binding:
    """How ranks are bound with at most so many on a node: more ranks, fewer CPUs each."""
    node = machine.node
    each, total = node.cpus_per_rank, node.cpus or cpus_per_node
    if total and (each is None or each * most > total):
        each = max(1, total // most)
    if dialect == "torchrun":
        return Binding("none", each)
    if dialect == "srun":  # it binds by itself, to the list where that is what the site documents
        return Binding("none", each, node.cpu_list if most == len(node.cpu_list) else ())
    if node.bind == "list" and most <= len(node.cpu_list):
        return Binding("list", each, node.cpu_list[:most])
    if node.bind == "none" or each is None:
        return Binding("none", each)
    spans = (f"{i * each}-{i * each + each - 1}" if each > 1 else str(i) for i in range(most))
    return Binding("depth", each, tuple(spans))


# --- which launcher ------------------------------------------------------------------------------


def choose(asked: str, machine: Machine, allocation: Allocation, installed_here: bool) -> str:
    """mpiexec, srun or torchrun; with `auto` the machine's, else the first that is installed."""
    if asked not in LAUNCHERS:
        near = did_you_mean(asked, LAUNCHERS)
        raise UserError(f"--launcher {asked} is not one of {', '.join(LAUNCHERS)}.{near}")
    launcher = machine.launcher if asked == "auto" else asked
    if launcher == "auto":
        order = ("srun", "mpiexec") if allocation.scheduler == "slurm" else ("mpiexec", "torchrun")
        launcher = next((name for name in order if _installed(name)), order[-1])
    if installed_here and not _installed(launcher):
        others = " or ".join(name for name in LAUNCHERS[1:] if _installed(name))
        remedy = {
            "mpiexec": "load the site's MPI module, or `pip install mpich`",
            "srun": "srun comes with Slurm",
            "torchrun": "install torch",
        }[launcher]
        raise UserError(
            f"--launcher {launcher} is not installed here: {remedy}"
            + (f"; --launcher {others} would work." if others else ".")
        )
    if launcher == "srun" and allocation.scheduler == "local":
        raise UserError(
            "--launcher srun needs a job of Slurm: get one with `salloc`, or `allranks submit`."
        )
    return launcher


def _installed(launcher: str) -> bool:
    if launcher == "torchrun":
        return importlib.util.find_spec("torch") is not None
    return path_of(launcher) is not None


def path_of(launcher: str) -> str | None:
    """The launcher beside this Python, as the mpich wheel brings it for mpi4py, else on PATH."""
    beside = Path(sys.executable).parent / launcher
    found = shutil.which(launcher)
    if os.access(beside, os.X_OK):
        return launcher if found and Path(found).samefile(beside) else str(beside)
    return launcher if found else None


def mpiexec_dialect(machine: Machine, installed_here: bool) -> str:
    """Whose options `mpiexec` takes: hydra (MPICH, Intel MPI, MVAPICH), pals or openmpi."""
    if machine.mpiexec != "auto":
        return machine.mpiexec
    path = path_of("mpiexec")
    if not installed_here or path is None:
        return "hydra"
    try:
        done = subprocess.run(
            [path, "--version"], capture_output=True, text=True, timeout=20, check=False,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(
            f"`{path} --version` does not answer ({type(error).__name__}): "
            "say which MPI it is with machine.mpiexec=hydra, openmpi or pals."
        ) from error
    said = (done.stdout + done.stderr).lower()
    for word, dialect in (
        ("open mpi", "openmpi"), ("openrte", "openmpi"), ("prte", "openmpi"),
        ("hydra", "hydra"), ("intel(r) mpi", "hydra"), ("pals", "pals"),
    ):  # fmt: skip
        if word in said:
            return dialect
    raise UserError(
        f"`{path} --version` names no MPI that is known ({said.strip()[:80]!r}): "
        "say which it is with machine.mpiexec=hydra, openmpi or pals."
    )


# --- command lines -------------------------------------------------------------------------------


def build(dialect: str, job: Job, bound: Binding, per_rank: Sequence[str]) -> Built:
    """The whole command line that starts `per_rank` in every rank, and the files it reads."""
    if dialect == "torchrun":
        return _torchrun(job, bound, per_rank)
    builder = {"pals": _pals, "hydra": _hydra, "openmpi": _openmpi, "srun": _srun}[dialect]
    argv, files = builder(job, bound)
    options = job.machine.options
    return (*argv, *(options.srun if dialect == "srun" else options.mpiexec), *per_rank), files


def _pals(job: Job, bound: Binding) -> Built:
    if any(host.slots != job.most for host in job.hosts[:-1]):
        raise UserError(
            "mpiexec of PALS puts the same number of ranks on every node but the last: "
            f"give --ppn {min(host.slots for host in job.hosts)}, or another --launcher."
        )
    bind = {
        "none": (),
        "depth": (f"--depth={bound.each}", "--cpu-bind", "depth"),
        "list": ("--cpu-bind", f"list:{':'.join(bound.cpus)}"),
    }[bound.how]
    argv = (job.mpiexec(), "-n", str(job.ranks), "--ppn", str(job.most), *bind)
    if job.whole:
        return argv, ()
    names = "".join(f"{host.name}\n" for host in job.hosts)
    return (*argv, "--hostfile", job.hosts_path), ((job.hosts_path, names),)


def _hydra(job: Job, bound: Binding) -> Built:
    unit = f"hwthread:{bound.each}"
    bind = {
        "none": (),
        "depth": ("-bind-to", unit, "-map-by", unit),
        "list": ("-bind-to", "user:" + ",".join(_plus(cpus) for cpus in bound.cpus)),
    }[bound.how]
    hosts, files = _hosts_with_slots(job, "-hosts", "-f", "{}:{}\n")
    return (job.mpiexec(), "-n", str(job.ranks), *hosts, *bind), files


def _plus(cpus: str) -> str:
    """Hydra's way to write the CPUs of one rank: 0-2,8 -> 0+1+2+8."""
    spans = [span.split("-") for span in cpus.split(",")]
    return "+".join(str(i) for span in spans for i in range(int(span[0]), int(span[-1]) + 1))


def _openmpi(job: Job, bound: Binding) -> Built:
    slots = {host.name: host.slots for host in job.allocation.hosts}
    crowded = any(host.slots > slots[host.name] for host in job.hosts)
    by = [f"ppr:{job.most}:node" if job.even else "slot"]
    by += [f"PE={bound.each}"] * (bound.how != "none") + ["OVERSUBSCRIBE"] * crowded
    # Without --bind-to it would bind each rank to one core or NUMA domain.
    bind = ("--map-by", ":".join(by), "--bind-to", "none" if bound.how == "none" else "core")
    hosts, files = _hosts_with_slots(job, "--host", "--hostfile", "{} slots={}\n")
    passed = [word for name in job.variables for word in ("-x", name)]  # it hands on none by itself
    return (job.mpiexec(), "-n", str(job.ranks), *bind, *hosts, *passed), files


def _hosts_with_slots(job: Job, option: str, file_option: str, line: str) -> tuple[tuple[str, ...], Files]:
    """`a:2,b:1` as an argument, or as a file where it would be too long. For this host: nothing."""
    if job.allocation.scheduler == "local":
        return (), ()
    text = ",".join(f"{host.name}:{host.slots}" for host in job.hosts)
    if len(text) <= MAX_ARGUMENT:
        return (option, text), ()
    lines = "".join(line.format(host.name, host.slots) for host in job.hosts)
    return (file_option, job.hosts_path), ((job.hosts_path, lines),)


def _srun(job: Job, bound: Binding) -> Built:
    argv = ["srun", "-N", str(len(job.hosts)), "-n", str(job.ranks)]
    if job.even:
        argv.append(f"--ntasks-per-node={job.most}")
        if not job.whole:
            argv += ["-w", compress(host.name for host in job.hosts)]
    else:  # one name for each rank: `man srun`, --distribution=arbitrary
        names = [host.name for host in job.hosts for _ in range(host.slots)]
        argv += ["--distribution=arbitrary", "-w", ",".join(names)]
    # Always -c: srun since 22.05 does not take over --cpus-per-task from sbatch (`man srun`).
    # And by default it lets the other ranks wait for ever for one that has failed.
    return (*argv, "-c", str(bound.each or 1), "--kill-on-bad-exit=1"), ()


def _torchrun(job: Job, bound: Binding, per_rank: Sequence[str]) -> Built:
    """A torchrun on each node, started by srun or mpiexec where it is not this node alone."""
    if not job.even:
        raise UserError(
            "torchrun starts the same number of ranks on every node: "
            f"give --ppn {min(host.slots for host in job.hosts)}, or another --launcher."
        )
    python, _, module, *program = per_rank
    here = (python, "-m", "torch.distributed.run", "--nproc-per-node", str(job.most))
    # The first `--` is for torchrun's own argument parser, which would swallow the second one.
    ranks = (*job.machine.options.torchrun, "-m", "--", module, *program)
    local = job.allocation.scheduler == "local" or is_this_host(job.hosts[0].name)
    if len(job.hosts) == 1 and local:
        return (*here, "--standalone", *ranks), ()
    meet = ("--nnodes", str(len(job.hosts)), "--rdzv-backend", "c10d", "--rdzv-endpoint",
            job.master, "--rdzv-id", job.allocation.job_id or "allranks")  # fmt: skip
    one_each = replace(job, hosts=tuple(Host(host.name, 1) for host in job.hosts))
    by_srun = job.machine.scheduler == "slurm" or job.allocation.scheduler == "slurm"
    outer = "srun" if by_srun else mpiexec_dialect(job.machine, job.installed_here)
    whole_node = Binding("none", job.machine.node.cpus or job.allocation.cpus_per_node)
    return build(outer, one_each, whole_node, (*here, *meet, *ranks))
