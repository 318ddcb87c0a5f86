"""From a launcher's environment variables to a rank. Pure: reads a mapping, imports no torch, no MPI.

Which variables a launcher sets is listed in docs/ranks.md, each with its source.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from allranks.base.errors import UserError

# Slurm's special steps (batch script, interactive shell, ...) count down from here; they are no tasks.
SLURM_FIRST_SPECIAL_STEP = 4294967280
_NUMBER = "[0-9]{1,10}"


@dataclass(frozen=True)
class RankIdentity:
    """Which rank of which job this process is, by what its launcher told it.

    None stands for what the launcher does not tell; under an MPI launcher MPI knows it. `launcher` is one
    of those in _LAUNCHERS, or `none` for a process that no launcher started.
    """

    launcher: str
    rank: int = 0
    world_size: int | None = 1
    local_rank: int | None = 0
    local_world_size: int | None = 1
    # The process that started this one: noted here, as early as can be, before it may have ended.
    parent_pid: int = field(default_factory=os.getppid, compare=False)

    @property
    def is_mpi(self) -> bool:
        """True where MPI.COMM_WORLD must span the ranks that the launcher started."""
        return self.launcher in MPI_LAUNCHERS

    @property
    def alone(self) -> bool:
        return self.world_size == 1


@dataclass(frozen=True)
class _Names:
    """The variables of one launcher; all of `proof` must be set before any of them is believed."""

    launcher: str
    proof: tuple[str, ...]
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


# First match wins. torchrun is first because the others start it, once a node. Open MPI, MVAPICH2 and
# MPICH come before srun because on Slurm they start their node daemons with it; PALS and Cray PMI come
# after it because Slurm's Cray plugin sets their names too, and bare PMI_* names leak into a step.
_LAUNCHERS = (
    _Names("torchrun", ("TORCHELASTIC_RUN_ID", "RANK"),
           "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    _Names("openmpi", ("OMPI_COMM_WORLD_RANK",), "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
           "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    _Names("mvapich2", ("MV2_COMM_WORLD_RANK",), "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE",
           "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    _Names("mpich", ("PMI_RANK", "MPI_LOCALRANKID"),
           "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Names("srun", ("SLURM_PROCID", "SLURM_STEP_ID"),
           "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    _Names("pals", ("PALS_RANKID",),
           "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    _Names("jsrun", ("JSM_NAMESPACE_RANK",),
           "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", ""),
    _Names("cray-pmi", ("PMI_RANK", "PMI_LOCAL_RANK"),
           "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    _Names("environment", ("RANK", "WORLD_SIZE"),
           "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
)  # fmt: skip
MPI_LAUNCHERS = frozenset({"openmpi", "mvapich2", "mpich", "pals", "jsrun", "cray-pmi"})


def discover(environ: Mapping[str, str]) -> RankIdentity:
    """The rank that the launcher gave this process; a lone process where nothing launched it.

    Raises UserError where variables are missing, contradict each other, or are left over from another
    launcher: training on as N solo runs would waste the job and overwrite results.
    """
    names = next((n for n in _LAUNCHERS if _matches(n, environ)), None)
    if names is None:
        if environ.get("RANK") or _number(environ, "WORLD_SIZE") not in (None, 1):
            missing, there = ("WORLD_SIZE", "RANK") if environ.get("RANK") else ("RANK", "WORLD_SIZE")
            raise UserError(
                f"{there}={environ[there]} is set but {missing} is not, and no launcher's variables are: "
                f"unset {there} for a single process, or start the ranks with mpiexec or torchrun."
            )
        return RankIdentity("none")

    rank = _number(environ, names.rank)
    world_size = _number(environ, names.world_size)
    local_rank = _number(environ, names.local_rank)
    local_world_size = _number(environ, names.local_world_size)
    if names.launcher == "srun":
        world_size = world_size or _number(environ, "SLURM_NTASKS")
        local_world_size = _slurm_tasks_here(environ)
    assert rank is not None  # it is part of every launcher's proof
    for what, value, size_name, size in (
        (names.rank, rank, names.world_size, world_size),
        (names.local_rank, local_rank, names.local_world_size, local_world_size),
    ):
        if value is not None and size is not None and not 0 <= value < size:
            raise UserError(
                f"{what}={value} is not below {size_name}={size}: these variables contradict each other. "
                f"Unset them, or start all ranks with one launcher."
            )
    _refuse_stale(environ, names, rank, world_size)
    return RankIdentity(names.launcher, rank, world_size, local_rank, local_world_size)


def launcher_rank(environ: Mapping[str, str]) -> int:
    """The rank by the launcher's variables alone, however they contradict others; 0 where unknown."""
    names = next((n for n in _LAUNCHERS if _matches(n, environ)), None)
    text = environ.get(names.rank, "").strip() if names else ""
    return int(text) if re.fullmatch(_NUMBER, text) else 0


def started_by_mpi(environ: Mapping[str, str]) -> bool:
    """Whether an MPI launcher started this process, however its variables contradict others."""
    names = next((n for n in _LAUNCHERS if _matches(n, environ)), None)
    return names is not None and names.launcher in MPI_LAUNCHERS


def _matches(names: _Names, environ: Mapping[str, str]) -> bool:
    if not all(environ.get(name, "").strip() for name in names.proof):
        return False
    if names.launcher == "srun":  # a shell of salloc or sbatch has SLURM_PROCID too, but is no task
        step = environ["SLURM_STEP_ID"]
        return re.fullmatch(_NUMBER, step) is not None and int(step) < SLURM_FIRST_SPECIAL_STEP
    return True


def _refuse_stale(environ: Mapping[str, str], names: _Names, rank: int, world_size: int | None) -> None:
    """RANK and WORLD_SIZE exported in a shell must not contradict the launcher that is at work."""
    if names.rank == "RANK":
        return
    stale = [
        name
        for name, true_value in (("RANK", rank), ("WORLD_SIZE", world_size))
        if environ.get(name) and true_value is not None and _number(environ, name) != true_value
    ]
    if stale:
        told = f"rank {rank} of {world_size if world_size is not None else 'its ranks'}"
        given = " ".join(f"{name}={environ[name]}" for name in stale)
        raise UserError(
            f"{given} is left over in the environment, but {names.launcher} says {told} "
            f"({names.rank}={environ[names.rank]}): "
            "type `unset RANK LOCAL_RANK WORLD_SIZE` and start again.",
            # the one rank that the stale RANK happens to fit does not notice
            said_by=1 if environ.get("RANK") == "0" and "WORLD_SIZE" not in stale else 0,
        )


def _number(environ: Mapping[str, str], name: str) -> int | None:
    """The variable as a number >= 0; None where it is unset or empty (PALS leaves PMI_SIZE empty)."""
    text = environ.get(name, "").strip() if name else ""
    if not text:
        return None
    if not re.fullmatch(_NUMBER, text):
        raise UserError(f"{name}={text!r} is not a whole number: unset it, or let a launcher set it.")
    return int(text)


def _slurm_tasks_here(environ: Mapping[str, str]) -> int | None:
    """Tasks of this step on this node, from `2(x3),1` and the node's index."""
    per_node = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE", "")
    node = _number(environ, "SLURM_NODEID")
    if not per_node or node is None:
        return None
    counts = repeated(per_node, "SLURM_TASKS_PER_NODE")
    return counts[node] if node < len(counts) else None


def repeated(text: str, named: str) -> list[int]:
    """Slurm's counts per node: `2(x3),1` gives [2, 2, 2, 1]."""
    counts: list[int] = []
    for part in text.split(","):
        match = re.fullmatch(r"([0-9]{1,6})(?:\(x([0-9]{1,6})\))?", part)
        if match is None or not int(match[1]):
            raise UserError(f"{named}={text!r} cannot be read: Slurm writes it like 2(x3),1.")
        counts += [int(match[1])] * int(match[2] or 1)
    return counts
