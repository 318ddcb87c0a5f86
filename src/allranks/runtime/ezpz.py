"""The process group by ezpz (saforem2/ezpz), and telling it from the other package of that name.

Imports torch only where the process group is made: `allranks doctor` asks here too.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import socket
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from allranks.base.errors import UserError

if TYPE_CHECKING:
    import torch

    from allranks.runtime.meeting import Meeting

INSTALL = 'pip install "ezpz @ git+https://github.com/saforem2/ezpz@v0.26.1"'


def installed() -> str:
    """`real`, `impostor` (PyPI's ezpz, an image pan-zoom tool) or `absent`; imports nothing of it."""
    spec = importlib.util.find_spec("ezpz")
    if spec is None:
        return "absent"
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    return "real" if any((f / "distributed.py").is_file() for f in folders) else "impostor"


def chosen(runtime: str, rank: int) -> bool:
    """Whether ezpz brings the ranks up. Raises UserError where it is asked for but is not there."""
    if runtime == "native":
        return False
    state = installed()
    if state == "real":
        return True
    if runtime == "ezpz":
        problem = (
            "the installed package ezpz is PyPI's image pan-zoom tool, not the distributed-training one"
            if state == "impostor"
            else "ezpz is not installed"
        )
        first = "pip uninstall -y ezpz && " if state == "impostor" else ""
        raise UserError(f"runtime=ezpz: {problem}. Type: {first}{INSTALL}   (or take runtime=native)")
    if state == "impostor" and rank == 0:
        logging.getLogger(__name__).warning(
            "The installed package ezpz is PyPI's image pan-zoom tool; going on with runtime=native. "
            "The real one: pip uninstall -y ezpz && %s",
            INSTALL,
        )
    return False


def start(meeting: Meeting, local_rank: int, device: torch.device, backend: str, timeout_s: float) -> None:
    """Lets ezpz make the default process group.

    Everything that it would otherwise work out is set beforehand, because its own reading of the
    launchers' variables has traps (docs/ranks.md). It joins a store that rank 0 serves for this run, as
    a client, the way a worker joins torchrun's. Without a hostfile it would write one into the
    working directory.
    """
    from allranks.runtime.meeting import serve

    address, port = os.environ.get("MASTER_ADDR", "127.0.0.1"), 0

    def open_store() -> int:
        meeting.also_served, free = serve(address, meeting.world_size)
        return free

    if meeting.world_size > 1:
        port = meeting.from_rank_0(open_store)
    with tempfile.NamedTemporaryFile("w", prefix="allranks-hosts-") as hosts:
        hosts.write(socket.gethostname() + "\n")
        hosts.flush()
        for_ezpz = {
            "RANK": str(meeting.rank),
            "WORLD_SIZE": str(meeting.world_size),
            "LOCAL_RANK": str(local_rank),
            "TORCH_DEVICE": device.type,
            "TORCH_BACKEND": backend,
            "MASTER_ADDR": address,
            "MASTER_PORT": str(port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",  # part of the store's keys in torch 2.4
            "HOSTFILE": hosts.name,
            "EZPZ_SCHEDULER": "none",  # it takes any host with an sbatch command for a Slurm job
            "EZPZ_LOG_LEVEL": "ERROR",  # it reports at INFO on its own, and hides other ranks' warnings:
            "EZPZ_WARN_FROM_ALL_RANKS": "1",  # our logs see to both
        }
        before = dict(os.environ)
        os.environ.update(for_ezpz)
        try:
            import ezpz

            ezpz.setup_torch(timeout=int(timeout_s), device_id=device.index)
        finally:  # among others it puts the number of GPUs into LOCAL_WORLD_SIZE
            os.environ.clear()
            os.environ.update(before)
