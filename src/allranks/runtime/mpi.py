"""MPI: how the ranks first reach each other under mpiexec, and how they add up numbers on the CPU."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import socket
import sys
import threading
from contextlib import AbstractContextManager, nullcontext, suppress
from typing import TYPE_CHECKING, Any, NamedTuple

from allranks.base import processes
from allranks.base.errors import UserError, flush_console
from allranks.base.text import one_line
from allranks.job.identity import RankIdentity
from allranks.runtime.watch.timer import time_limit

if TYPE_CHECKING:
    import torch


# MPI_Init returns when all ranks have come to it, and keeps Python's lock until then. If it takes longer
# than its limit, all ranks notice it at the same time, but only one of them should say so. The helper
# process of a rank that is stopped speaks at once. Rank 0 speaks STOPPED_FIRST_S after the limit, and the
# other ranks RANK_0_FIRST_S after the limit.
STOPPED_FIRST_S = 1.0
RANK_0_FIRST_S = 5.0
TOGETHER_S = 600.0  # at the end of a run a rank may still write its records, while the others wait for it
FINALIZE_S = 20.0  # MPI_Finalize may take so long, once all ranks have come to the end
END_JOB_S = 60.0  # a rank that only ends the job waits so long for the other ranks to come to MPI_Init


def world(identity: RankIdentity, start_s: float | None = None) -> Any:
    """MPI's communicator of all ranks (MPI.COMM_WORLD), once it is sure to have those that were started.

    If mpi4py uses another MPI library than the launcher, each rank believes that it is rank 0 of 1, and N
    ranks would train N times over. Then this raises UserError, which names both libraries. If the other
    ranks have not come to MPI within `start_s` seconds, this process is ended with a sentence.
    """
    try:
        MPI = _mpi()
    except (ImportError, RuntimeError) as error:
        raise UserError(
            f"{identity.launcher} started this run, but mpi4py finds no MPI library ({one_line(error)}). "
            "On a supercomputer load the site's MPI module; elsewhere `pip install mpi4py mpich`. "
            "Or start the ranks with torchrun.",
            said_by=0,
        ) from error

    expected = identity.world_size or max(identity.local_world_size or 1, identity.rank + 1)
    library = one_line(MPI.Get_library_version())[:60].strip()
    foreign = UserError(
        f"The launcher and mpi4py use different MPIs: {_NAMES.get(identity.launcher, identity.launcher)}'s "
        f"launcher started {expected} ranks, but mpi4py is bound to {library}, where each of them is "
        "rank 0 of 1. Start the run with that library's mpiexec, or install mpi4py against the "
        "launcher's MPI.",
        said_by=0,
    )
    if ("Open MPI" in library) != (identity.launcher == "openmpi") and identity.launcher in _NAMES:
        raise foreign  # before MPI_Init, which some libraries do not survive
    # Most builds of MPICH do not know PMIx: MPICH would end the process, with a message of its own.
    if identity.launcher == "pmix" and "MPICH" in library and "pmix" not in MPI.Get_library_version():
        raise foreign
    if not MPI.Is_initialized():
        with _limit_of_init(identity.rank, start_s):
            MPI.Init_thread()
    comm = MPI.COMM_WORLD
    # PMIx does not tell how many ranks there are, so only a size of 1 can show that mpi4py has another MPI.
    if identity.launcher == "pmix" and comm.size == 1:
        raise foreign
    if comm.size < expected or (identity.world_size and comm.size != identity.world_size):
        raise foreign
    return comm


def _limit_of_init(rank: int, start_s: float | None) -> AbstractContextManager[None]:
    """Ends this process if MPI_Init takes longer than `start_s` seconds; None sets no limit."""
    if start_s is None:
        return nullcontext()
    words = (
        f"has waited {start_s:g} s in MPI_Init, as long as watchdog.start_s allows. It returns when every "
        "rank has come to it: look for a rank that has died, hangs or is stopped. All ranks end."
    )
    spare_s = STOPPED_FIRST_S if rank == 0 else RANK_0_FIRST_S
    return time_limit(start_s, f"rank {rank} on {socket.gethostname()}", words, spare_s)


# For each launcher the MPI library that works with it. MVAPICH2 and jsrun are left out: they work with more
# than one.
_NAMES = {"openmpi": "Open MPI", "mpich": "MPICH", "pals": "PALS", "cray-pmi": "Cray MPICH"}


def _mpi() -> Any:
    """Imports mpi4py.MPI without initialising MPI, and returns the module."""
    import mpi4py

    if "mpi4py.MPI" not in sys.modules:
        mpi4py.rc.initialize = False
        mpi4py.rc.finalize = True
    from mpi4py import MPI

    return MPI


def do_not_start_at_import() -> None:
    """If another package imports mpi4py.MPI later, that alone does not start MPI in this process.

    MPI started without its launcher ends the process on some machines' login nodes.
    """
    if "mpi4py.MPI" in sys.modules or importlib.util.find_spec("mpi4py") is None:
        return
    import mpi4py

    mpi4py.rc.initialize = False


def start_alone() -> None:
    """Starts MPI in a process that no MPI launcher has started: it is rank 0 of 1 in MPI's eyes.

    Raises ImportError or RuntimeError if mpi4py or its MPI library is missing.
    """
    MPI = _mpi()
    if not MPI.Is_initialized():
        MPI.Init_thread()


def library() -> str:
    """Name and version of mpi4py's MPI library; raises ImportError or RuntimeError where there is none."""
    return one_line(_mpi().Get_library_version().strip().splitlines()[0].split(",")[0])


class Host(NamedTuple):
    """Where a rank is. Two hosts may have the same name, but never the same boot id of their kernels."""

    name: str
    boot_id: str  # empty where the system has none


def hosts(comm: Any) -> list[Host]:
    """The hosts of all ranks, in the order of the ranks, on rank 0; an empty list elsewhere."""
    width = 256  # bytes: a name has 64 at most on Linux, a boot id 36
    mine = f"{socket.gethostname()} {processes.boot_id() or ''}".encode()
    everyones = bytearray(width * comm.size if comm.rank == 0 else 0)
    comm.Gather(bytearray(mine[:width].ljust(width)), everyones, root=0)

    found = []
    for start in range(0, len(everyones), width):
        name, _, boot_id = everyones[start : start + width].decode().rstrip().partition(" ")
        found.append(Host(name, boot_id))
    return found


def broadcast_text(comm: Any, text: str) -> str:
    """Sends rank 0's text of at most 1 kB to every rank, and returns it. It travels as plain bytes."""
    buffer = bytearray(text.encode().ljust(1024))
    comm.Bcast(buffer, root=0)
    return bytes(buffer).decode().rstrip()


def at_work() -> bool:
    """True if this process is one of several ranks of a running MPI job. Imports nothing."""
    mpi = sys.modules.get("mpi4py.MPI")
    return bool(mpi and mpi.Is_initialized() and not mpi.Is_finalized() and mpi.COMM_WORLD.size > 1)


def leave(code: int) -> None:
    """Ends this rank's part in MPI, if MPI is running. All ranks call it, after their last common work.

    `code` is the exit code that the process will have.

    MPI_Finalize talks to the launcher, and keeps Python's lock meanwhile. If the launcher's process on this
    host is stopped, MPI_Finalize never returns, and a run that has ended well would hang for ever. So it is
    called without the lock, and if it takes too long, a thread ends the process with `code`.
    """
    # After MPI_Finalize some launchers take no more output. The console is flushed without MPI as well: a
    # closed console must not change the exit code.
    flush_console()
    if not at_work():
        return
    module = sys.modules["mpi4py.MPI"]
    # Python's lock is given up during a call by ctypes. The module's own file leads to its MPI library.
    finalize = ctypes.CDLL(module.__file__).MPI_Finalize
    all_there, done = threading.Event(), threading.Event()

    def watch() -> None:
        name = f"rank {module.COMM_WORLD.rank} on {socket.gethostname()}"
        if not all_there.wait(TOGETHER_S):
            problem = f"another rank has not come to the end within {TOGETHER_S:.0f} s"
        elif not done.wait(FINALIZE_S):
            problem = f"MPI_Finalize has not returned within {FINALIZE_S:.0f} s; does the launcher hang?"
        else:
            return
        with suppress(OSError):  # nobody may be reading any more
            os.write(2, f"allranks: {name} ends without MPI: {problem}\n".encode())
        os._exit(code)

    threading.Thread(target=watch, name="mpi-end", daemon=True).start()
    module.COMM_WORLD.Barrier()
    all_there.set()
    finalize()
    done.set()


def abort(code: int) -> None:
    """Ends every rank of the job, if MPI is at work in it."""
    if at_work():
        sys.modules["mpi4py.MPI"].COMM_WORLD.Abort(code)


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


def broadcast(comm: Any, tensor: torch.Tensor) -> None:
    """Copies rank 0's contiguous CPU tensor to every rank, in place."""
    comm.Bcast(_as_whole_numbers(tensor), root=0)


def gather(comm: Any, tensor: torch.Tensor, everyones: torch.Tensor) -> None:
    """Copies every rank's contiguous CPU tensor, in the order of the ranks, to `everyones` [ranks, ...]."""
    comm.Allgather(_as_whole_numbers(tensor), _as_whole_numbers(everyones))


def _as_whole_numbers(tensor: torch.Tensor) -> Any:
    """The tensor's bits as a NumPy array of whole numbers of the same size: NumPy has no bfloat16."""
    import torch

    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    size = tensor.element_size()
    return (tensor.view(whole[size]) if size in whole else tensor).numpy()


def end_job(code: int) -> None:
    """Joins MPI only to end every rank of the job, for a rank that could not begin."""
    try:
        MPI = _mpi()
        words = f"could not end the other ranks: they have not come to MPI within {END_JOB_S:g} s."
        with time_limit(END_JOB_S, f"process {os.getpid()} on {socket.gethostname()}", words):
            MPI.Init_thread()
    except (ImportError, RuntimeError):
        return
    MPI.COMM_WORLD.Abort(code)
