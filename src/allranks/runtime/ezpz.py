"""The process group by ezpz (github.com/saforem2/ezpz), and telling it from another package of that name.

torch is imported only where the process group is made: `allranks doctor` asks here too.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from allranks.base.errors import UserError
from allranks.base.text import one_line
from allranks.runtime import mpi

if TYPE_CHECKING:
    import torch

    from allranks.runtime.meeting import Meeting

SOURCE = "ezpz @ git+https://github.com/saforem2/ezpz@v0.26.1"
INSTALL = f'pip install "{SOURCE}"'
# What all of its versions have in their metadata, and PyPI's package of that name has not.
_AUTHOR = "saforem2"
# By these variables an MPI library finds the launcher that has started its process.
_OF_MPI_LAUNCHERS = ("PMI_", "PMIX_", "PALS_", "MPI_", "OMPI_", "PRTE_", "MV2_", "HYDRA_", "HYDI_", "JSM_")

log = logging.getLogger(__name__)


# --- which ezpz is there --------------------------------------------------------------------------------


class Installation(NamedTuple):
    """The package called ezpz in this environment."""

    kind: Literal["real", "too old", "impostor", "absent"]
    version: str | None = None  # where that is known

    @property
    def problem(self) -> str:
        """Why it cannot bring the ranks up, in words; empty if it can."""
        return {
            "real": "",
            "too old": f"the installed ezpz {self.version or ''} is too old: before 0.12 it asks MPI alone "
            "for the ranks and for rank 0's address",
            "impostor": "the installed package ezpz is PyPI's image pan-zoom tool, not the "
            "distributed-training one",
            "absent": "ezpz is not installed",
        }[self.kind]

    @property
    def remedy(self) -> str:
        """The command that installs the right one."""
        return f"pip uninstall -y ezpz && {INSTALL}" if self.kind == "impostor" else INSTALL


def installed() -> Installation:
    """Which ezpz this environment has. Imports nothing of it."""
    spec = importlib.util.find_spec("ezpz")
    if spec is None:
        return Installation("absent")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    is_by_the_author, version = _metadata()
    if any((folder / "distributed.py").is_file() for folder in folders):
        return Installation("real", version)
    # Before 0.12 its functions were in dist.py. A copy that is not installed has no metadata.
    if is_by_the_author or any((folder / "dist.py").is_file() for folder in folders):
        return Installation("too old", version)
    return Installation("impostor", version)


def _metadata() -> tuple[bool, str | None]:
    """Whether the installed package is by the author of the real one, and its version."""
    from importlib import metadata

    try:
        about = metadata.metadata("ezpz")
    except metadata.PackageNotFoundError:
        return False, None
    headers = [value for name in about for value in about.get_all(name) or () if name != "Description"]
    return any(_AUTHOR in header for header in headers), about["Version"]


def chosen(runtime: str, rank: int) -> bool:
    """Whether ezpz brings the ranks up, by the configuration's `runtime`.

    Raises UserError if it is asked for but cannot. With runtime=auto rank 0 warns of an ezpz that is
    there and of no use.
    """
    if runtime == "native":
        return False
    found = installed()
    if found.kind == "real":
        return True
    if runtime == "ezpz":
        raise UserError(f"runtime=ezpz: {found.problem}. Type: {found.remedy}   (or take runtime=native)")
    if found.kind != "absent" and rank == 0:
        log.warning("%s; going on with runtime=native. The real one: %s", found.problem, found.remedy)
    return False


# --- the process group ----------------------------------------------------------------------------------


def start(
    meeting: Meeting,
    local_rank: int,
    device: torch.device,
    backend: str,
    timeout_s: float,
    is_started_by_mpi: bool,
) -> None:
    """Lets ezpz make the default process group.

    Everything that it would otherwise work out is set beforehand, because its own reading of the launchers'
    variables has traps (docs/ranks.md). It joins a store that rank 0 serves for this run, as a client, the
    way a worker joins torchrun's.

    Raises UserError if ezpz, or the MPI that it needs for several ranks, cannot be loaded.
    """
    from allranks.runtime.meeting import serve

    address = os.environ.get("MASTER_ADDR", "127.0.0.1")
    port = 0
    if meeting.world_size > 1:

        def open_store() -> int:
            meeting.also_served, free = serve(address, meeting.world_size)
            return free

        port = meeting.from_rank_0(open_store)

    problem: UserError | None = None
    with contextlib.ExitStack() as until_the_end:
        hosts = ""
        try:
            hosts = until_the_end.enter_context(_hosts_file())
        except UserError as error:
            problem = error
        variables = {
            "RANK": str(meeting.rank),
            "WORLD_SIZE": str(meeting.world_size),
            "LOCAL_RANK": str(local_rank),
            "TORCH_DEVICE": device.type,
            "TORCH_BACKEND": backend,
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",  # rank 0 serves the store already
            "TORCHELASTIC_RESTART_COUNT": "0",  # part of the store's keys in torch 2.4
            "HOSTFILE": hosts,  # without one it writes one into the working directory
            "EZPZ_SCHEDULER": "none",  # it takes any host with an sbatch command for a Slurm job
            # It reports at INFO on its own, and hides the warnings of other ranks: our logs see to both.
            "EZPZ_LOG_LEVEL": "ERROR",
            "EZPZ_WARN_FROM_ALL_RANKS": "1",
        }
        with _environment(variables, hide_mpi=not is_started_by_mpi):
            try:
                if meeting.world_size > 1 and not is_started_by_mpi:
                    mpi.start_alone()
                else:
                    mpi.do_not_start_at_import()
                import ezpz
            except (ImportError, RuntimeError) as error:
                problem = UserError(
                    f"runtime=ezpz: ezpz cannot be loaded ({one_line(error)}). It needs its own "
                    "requirements, and for several ranks mpi4py with an MPI library, under torchrun too: "
                    f"{INSTALL} mpi4py mpich   (or take runtime=native)"
                )
            meeting.agree(problem)  # else the other ranks would wait for this one in ezpz

            ezpz.setup_torch(timeout=int(timeout_s), device_id=device.index)


@contextlib.contextmanager
def _hosts_file() -> Iterator[str]:
    """In the block there is a file that names this host, as ezpz wants one; raises UserError."""
    with contextlib.ExitStack() as until_the_end:
        try:
            file = until_the_end.enter_context(tempfile.NamedTemporaryFile("w", prefix="allranks-hosts-"))
            file.write(socket.gethostname() + "\n")
            file.flush()
        except OSError as error:
            folder = os.environ.get("TMPDIR", "/tmp")
            raise UserError(
                f"runtime=ezpz needs a small file in {folder}, which cannot be written ({error.strerror}): "
                "set TMPDIR to a folder with room, or take runtime=native."
            ) from error
        yield file.name


@contextlib.contextmanager
def _environment(variables: Mapping[str, str], hide_mpi: bool) -> Iterator[None]:
    """The environment with these variables, and with none of an MPI launcher's where they are hidden.

    ezpz asks MPI for the number of ranks and waits in a barrier of MPI, even where torchrun has started the
    ranks. Each rank must then be alone in MPI's eyes. If mpiexec has started torchrun, MPI's library would
    take every rank on the host for the one process that mpiexec knows, and the second would be refused.

    Afterwards all is as before: among others ezpz puts the number of GPUs into LOCAL_WORLD_SIZE.
    """
    before = dict(os.environ)
    if hide_mpi:
        for name in before:
            if name.startswith(_OF_MPI_LAUNCHERS):
                del os.environ[name]
    os.environ.update(variables)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
