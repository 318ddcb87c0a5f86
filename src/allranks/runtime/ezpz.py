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

from allranks.errors import UserError

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
    launchers' variables has traps (docs/launchers.md). It joins the meeting's store as a client, the
    way a worker joins torchrun's, so no second port is needed. Without a hostfile it would write one
    into the working directory.
    """
    local_world_size = os.environ.get("LOCAL_WORLD_SIZE")
    os.environ.update(
        RANK=str(meeting.rank),
        WORLD_SIZE=str(meeting.world_size),
        LOCAL_RANK=str(local_rank),
        TORCH_DEVICE=device.type,
        TORCH_BACKEND=backend,
        TORCHELASTIC_USE_AGENT_STORE="True",
    )
    # It reports at INFO on its own, and hides other ranks' warnings: our logs see to both.
    os.environ.setdefault("EZPZ_LOG_LEVEL", "ERROR")
    os.environ.setdefault("EZPZ_WARN_FROM_ALL_RANKS", "1")
    with tempfile.NamedTemporaryFile("w", prefix="allranks-hosts-") as hosts:
        hosts.write(socket.gethostname() + "\n")
        hosts.flush()
        os.environ.setdefault("HOSTFILE", hosts.name)
        import ezpz

        ezpz.setup_torch(timeout=int(timeout_s), device_id=device.index)
        if os.environ["HOSTFILE"] == hosts.name:
            del os.environ["HOSTFILE"]
    if local_world_size is not None:  # it puts the number of GPUs there
        os.environ["LOCAL_WORLD_SIZE"] = local_world_size


def wrap(model: torch.nn.Module) -> torch.nn.Module:
    import ezpz

    wrapped: torch.nn.Module = ezpz.wrap_model(model, use_fsdp=False)
    return wrapped
