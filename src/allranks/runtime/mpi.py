"""MPI: the ranks' first meeting under mpiexec, and sums over MPI on CPU."""

from __future__ import annotations

import shutil
from typing import TYPE_CHECKING, Any

from allranks.errors import UserError
from allranks.runtime.environment import Launch

if TYPE_CHECKING:
    import torch


def world(launch: Launch) -> Any:
    """MPI.COMM_WORLD, once it is sure to span the ranks that the launcher started.

    mpi4py bound to another MPI than the launcher's sees every rank as 0 of 1; training on would be N
    solo runs. Raises UserError that names both.
    """
    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{launch.launcher} started this run, but mpi4py finds no MPI library ({flat(error)}). "
            "On a supercomputer load the site's MPI module; elsewhere `pip install mpi4py mpich`. "
            "Or start the ranks with torchrun.",
            said_by=0,
        ) from error

    comm = MPI.COMM_WORLD
    expected = launch.world_size or max(launch.local_world_size or 1, launch.rank + 1)
    if comm.size < expected or (launch.world_size and comm.size != launch.world_size):
        library = flat(MPI.Get_library_version())[:60].strip()
        raise UserError(
            f"The launcher and mpi4py use different MPIs: {launch.launcher} "
            f"({shutil.which('mpiexec') or 'mpiexec'}) started {expected} ranks, but mpi4py is bound "
            f"to {library}, where each of them is rank {comm.rank} of {comm.size}. Start the run with "
            "that library's mpiexec, or install mpi4py against the launcher's MPI.",
            said_by=0,
        )
    return comm


def one_host(comm: Any) -> bool:
    """True where all ranks share one node's memory. A collective call."""
    from mpi4py import MPI

    node = comm.Split_type(MPI.COMM_TYPE_SHARED)
    size = int(node.size)
    node.Free()
    return size == int(comm.size)


def broadcast_text(comm: Any, text: str) -> str:
    """Rank 0's text (at most 1 kB) on every rank. Bytes, never a pickle."""
    buffer = bytearray(text.encode().ljust(1024))
    comm.Bcast(buffer, root=0)
    return bytes(buffer).decode().rstrip()


def abort(code: int) -> None:
    """End every rank of the job, if MPI is at work in it."""
    from sys import modules

    mpi = modules.get("mpi4py.MPI")
    if mpi is not None and mpi.Is_initialized() and not mpi.Is_finalized():
        mpi.COMM_WORLD.Abort(code)


def allreduce(comm: Any, tensor: torch.Tensor) -> None:
    """Sums a contiguous CPU tensor over all ranks in place."""
    import torch
    from mpi4py import MPI

    if tensor.dtype in (torch.float16, torch.bfloat16):  # MPI has no such types
        wide = tensor.float()
        comm.Allreduce(MPI.IN_PLACE, wide.numpy())
        tensor.copy_(wide)
    else:
        comm.Allreduce(MPI.IN_PLACE, tensor.numpy())


def flat(text: object) -> str:
    return " ".join(str(text).replace("\0", " ").split())
