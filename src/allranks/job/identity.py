"""From a launcher's environment variables to a rank. Pure: reads a mapping, imports no torch, no MPI.

A launcher (mpiexec, srun, torchrun, ...) starts the same program several times, and tells each process by
environment variables which one it is. Each launcher has variables of its own; docs/ranks.md lists them. A
process whose variables are not understood is refused. If every rank took itself for the only process, each
of them would train the whole run, waste the job, and overwrite the results of the others.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from typing import NamedTuple

from allranks.base.errors import UserError

# Slurm's special steps (batch script, interactive shell, ...) count down from here; they are no tasks.
SLURM_FIRST_SPECIAL_STEP = 4294967280
_NUMBER = "[0-9]{1,10}"


class RankIdentity(NamedTuple):
    """Which rank of which job this process is, by what its launcher told it.

    None means that the launcher does not tell this number; under an MPI launcher MPI knows it. `launcher`
    is one of those in _LAUNCHERS, or `none` for a process that no launcher started.
    """

    launcher: str
    rank: int = 0
    world_size: int | None = 1
    local_rank: int | None = 0
    local_world_size: int | None = 1
    # The process that started this one. discover() notes it, as early as can be: it may end soon.
    parent_pid: int | None = None

    @property
    def is_mpi(self) -> bool:
        """True if MPI.COMM_WORLD must span the ranks that the launcher started."""
        return self.launcher in MPI_LAUNCHERS

    @property
    def is_task_of_srun(self) -> bool:
        """Whether srun has started this process, as one of several ranks."""
        return self.launcher == "srun" and not self.alone

    @property
    def alone(self) -> bool:
        """Whether this process is the only rank."""
        return self.world_size == 1


class LeftOver(UserError):
    """Raised if a launcher's variable tells the rank, but none tells how many ranks there are.

    Then the variable is probably left over in the shell. No launcher is at work, and no other rank waits
    for this one.
    """


class _Launcher(NamedTuple):
    """A launcher, and the names of its variables; "" for what it does not tell.

    All of `proof` must be set before any of its variables is believed.
    """

    name: str
    proof: tuple[str, ...]
    rank: str
    world_size: str
    local_rank: str
    local_world_size: str


# The first launcher whose variables in `proof` are all set is taken. The order has reasons:
# - torchrun is first, because the others start it, one process on each node.
# - Open MPI, MVAPICH and MPICH come before srun, because in a job of Slurm they start their node daemons
#   with srun, and the ranks inherit a daemon's variables.
# - Flux comes before bare PMI, because it sets PMI_RANK and PMI_SIZE too.
# - PALS and Cray PMI come after srun, because Slurm's Cray plugin sets their names too.
# - Bare PMI and PMIx are last of the launchers: their names leak into what other launchers start.
_LAUNCHERS = (
    _Launcher("torchrun", ("TORCHELASTIC_RUN_ID", "RANK"),
              "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    _Launcher("openmpi", ("OMPI_COMM_WORLD_RANK",), "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE",
              "OMPI_COMM_WORLD_LOCAL_RANK", "OMPI_COMM_WORLD_LOCAL_SIZE"),
    _Launcher("mvapich", ("MVP_COMM_WORLD_RANK",), "MVP_COMM_WORLD_RANK", "MVP_COMM_WORLD_SIZE",
              "MVP_COMM_WORLD_LOCAL_RANK", "MVP_COMM_WORLD_LOCAL_SIZE"),
    _Launcher("mvapich2", ("MV2_COMM_WORLD_RANK",), "MV2_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE",
              "MV2_COMM_WORLD_LOCAL_RANK", "MV2_COMM_WORLD_LOCAL_SIZE"),
    _Launcher("mpich", ("PMI_RANK", "MPI_LOCALRANKID"),
              "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    _Launcher("flux", ("FLUX_TASK_RANK",), "FLUX_TASK_RANK", "FLUX_JOB_SIZE", "FLUX_TASK_LOCAL_ID", ""),
    _Launcher("srun", ("SLURM_PROCID", "SLURM_STEP_ID"),
              "SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", ""),
    _Launcher("pals", ("PALS_RANKID",),
              "PALS_RANKID", "PMI_SIZE", "PALS_LOCAL_RANKID", "PALS_LOCAL_SIZE"),
    _Launcher("jsrun", ("JSM_NAMESPACE_RANK",),
              "JSM_NAMESPACE_RANK", "JSM_NAMESPACE_SIZE", "JSM_NAMESPACE_LOCAL_RANK", ""),
    _Launcher("cray-pmi", ("PMI_RANK", "PMI_LOCAL_RANK"),
              "PMI_RANK", "PMI_SIZE", "PMI_LOCAL_RANK", "PMI_LOCAL_SIZE"),
    _Launcher("pmi", ("PMI_RANK", "PMI_SIZE"), "PMI_RANK", "PMI_SIZE", "", ""),
    _Launcher("pmix", ("PMIX_RANK",), "PMIX_RANK", "", "", ""),
    _Launcher("environment", ("RANK", "WORLD_SIZE"),
              "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
)  # fmt: skip
MPI_LAUNCHERS = frozenset(
    {"openmpi", "mvapich", "mvapich2", "mpich", "flux", "pals", "jsrun", "cray-pmi", "pmi", "pmix"}
)

# (rank, size) of launchers that are not followed, and of any MPI that names them as most do.
_NOT_FOLLOWED = (("HOROVOD_RANK", "HOROVOD_SIZE"), ("MPIRUN_RANK", "MPIRUN_NPROCS"), ("ALPS_APP_PE", ""))
_ANY_MPI = re.compile(r"(\w+)_COMM_WORLD_(RANK|SIZE)")


def discover(environ: Mapping[str, str], is_planned: bool = False) -> RankIdentity:
    """The rank that the launcher gave this process; a lone process where nothing launched it.

    `is_planned`: `allranks launch` has planned this process, and knows what the launcher does not tell.
    Raises UserError if variables are missing, contradict each other, are left over from another
    launcher, or are those of a launcher that allranks does not know.
    """
    names = _launcher_of(environ)
    if names is None:
        _refuse_half_a_launcher(environ)
        return RankIdentity("none", parent_pid=os.getppid())

    rank = _number(environ, names.rank)
    world_size = _number(environ, names.world_size)
    local_rank = _number(environ, names.local_rank)
    local_world_size = _number(environ, names.local_world_size)
    if names.name == "srun":
        _refuse_heterogeneous_step(environ)
        world_size = world_size or _number(environ, "SLURM_NTASKS")
        local_world_size = _slurm_tasks_here(environ)
    elif names.name == "flux" and _number(environ, "FLUX_JOB_NNODES") == 1:
        local_world_size = world_size
    assert rank is not None  # it is part of every launcher's proof
    if not is_planned:
        _refuse_rank_of_no_job(environ, names, rank, world_size or local_world_size)
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
    return RankIdentity(names.name, rank, world_size, local_rank, local_world_size, parent_pid=os.getppid())


def launcher_rank(environ: Mapping[str, str]) -> int:
    """The rank by the launcher's variables alone, however they contradict others; 0 where unknown."""
    names = _launcher_of(environ)
    text = environ.get(names.rank, "").strip() if names else ""
    return int(text) if re.fullmatch(_NUMBER, text) else 0


def started_by_mpi(environ: Mapping[str, str]) -> bool:
    """Whether an MPI launcher started this process, however its variables contradict others."""
    names = _launcher_of(environ)
    return names is not None and names.name in MPI_LAUNCHERS


def _launcher_of(environ: Mapping[str, str]) -> _Launcher | None:
    return next((names for names in _LAUNCHERS if _is_proven(names, environ)), None)


def _is_proven(names: _Launcher, environ: Mapping[str, str]) -> bool:
    if not all(environ.get(name, "").strip() for name in names.proof):
        return False
    if names.name == "srun":  # a shell of salloc or sbatch has SLURM_PROCID too, but is no task
        return not _is_slurm_shell(environ)
    if names.name == "pmix":  # Slurm's own PMIx plugin sets it in such a shell too
        return not (environ.get("SLURM_STEP_ID", "").strip() and _is_slurm_shell(environ))
    if names.name == "pmi":  # a site's profile may leave these two in every shell, for one process
        return environ["PMI_SIZE"].strip() != "1"
    return True


def _is_slurm_shell(environ: Mapping[str, str]) -> bool:
    """Whether Slurm's step is that of a batch script or of an interactive shell."""
    step = environ.get("SLURM_STEP_ID", "")
    return re.fullmatch(_NUMBER, step) is None or int(step) >= SLURM_FIRST_SPECIAL_STEP


def _refuse_half_a_launcher(environ: Mapping[str, str]) -> None:
    """Raises UserError if variables speak of several processes, though no launcher is recognised."""
    if environ.get("RANK") or _number(environ, "WORLD_SIZE") not in (None, 1):
        missing, there = ("WORLD_SIZE", "RANK") if environ.get("RANK") else ("RANK", "WORLD_SIZE")
        raise UserError(
            f"{there}={environ[there]} is set but {missing} is not, and no launcher's variables are: "
            f"unset {there} for a single process, or start the ranks with mpiexec or torchrun."
        )
    pairs = [
        (names.rank, names.world_size) for names in _LAUNCHERS if names.name not in ("torchrun", "srun")
    ]
    pairs += _NOT_FOLLOWED
    families = dict.fromkeys(match[1] for match in map(_ANY_MPI.fullmatch, environ) if match)
    pairs += [(f"{family}_COMM_WORLD_RANK", f"{family}_COMM_WORLD_SIZE") for family in families]
    pairs.append(("SLURM_PROCID", ""))  # a shell of Slurm has it too, but is always process 0
    for rank_name, size_name in pairs:
        for name, most in ((size_name, 1), (rank_name, 0)):  # what a lone process may be told
            if (_number(environ, name) or 0) > most:
                raise UserError(
                    f"{name}={environ[name].strip()} says that a launcher started several processes, but "
                    "it is none that allranks can follow: start the ranks with `allranks launch`, mpiexec, "
                    f"srun or torchrun, or unset {name} for a single process."
                )


def _refuse_rank_of_no_job(
    environ: Mapping[str, str], names: _Launcher, rank: int, size: int | None
) -> None:
    """Raises LeftOver if a variable tells the rank, but none tells the number of ranks.

    Every launcher tells this number, at least for this host, with two exceptions. PMIx tells the name of
    its job instead. And rank 0 of an MPI launcher may be a process that was started alone: it asks MPI
    later.
    """
    is_told = size is not None or (names.name == "pmix" and bool(environ.get("PMIX_NAMESPACE")))
    if is_told or (rank == 0 and names.name in MPI_LAUNCHERS):
        return
    raise LeftOver(
        f"{names.rank}={rank} is set, but no variable of {names.name} says how many ranks there are: type "
        f"`unset {' '.join(names.proof)}` for a single process, or let a launcher start all ranks."
    )


def _refuse_heterogeneous_step(environ: Mapping[str, str]) -> None:
    """Raises UserError in a Slurm job of several groups of nodes (a heterogeneous job).

    srun counts the ranks of each group by itself, and no variable tells that a step has ranks in several
    groups.
    """
    groups = _number(environ, "SLURM_HET_SIZE") or 1
    if groups > 1:
        raise UserError(
            f"SLURM_HET_SIZE={groups}: this is a heterogeneous job of {groups} groups of nodes, and srun "
            "counts the ranks of each group by itself. Submit an ordinary job, or, for a step in one group "
            "only, unset SLURM_HET_SIZE."
        )


def _refuse_stale(environ: Mapping[str, str], names: _Launcher, rank: int, world_size: int | None) -> None:
    """Raises UserError if RANK or WORLD_SIZE, exported in a shell, contradict the launcher at work."""
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
            f"{given} is left over in the environment, but {names.name} says {told} "
            f"({names.rank}={environ[names.rank]}): "
            "type `unset RANK LOCAL_RANK WORLD_SIZE` and start again.",
            # the one rank that the stale RANK happens to fit does not notice
            said_by=1 if environ.get("RANK") == "0" and "WORLD_SIZE" not in stale else 0,
        )


def _number(environ: Mapping[str, str], name: str) -> int | None:
    """The variable as a number >= 0; None if it is unset or empty (PALS leaves PMI_SIZE empty)."""
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
