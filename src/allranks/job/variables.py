"""The environment variables that the program of each rank gets: RANK, MASTER_ADDR, its device, and others.

They are worked out from what the launcher, the plan and the supervisor tell. Only free_port() looks at the
host. No torch.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Mapping
from typing import Any

from allranks.base.errors import UserError
from allranks.job.identity import RankIdentity

# --- the names -------------------------------------------------------------------------------------

# Set by the launch's plan, the same for all ranks.
MASTER_ADDR = "ALLRANKS_MASTER_ADDR"  # where rank 0 is reached
MASTER_PORT = "ALLRANKS_MASTER_PORT"  # only without a supervisor, which finds a free one
WORLD_SIZE = "ALLRANKS_WORLD_SIZE"  # used with launchers that do not tell this number
LOCAL_WORLD_SIZE = "ALLRANKS_LOCAL_WORLD_SIZE"  # ranks on each host, if all hosts have the same number
DEVICE_VARIABLE = "ALLRANKS_DEVICE_VARIABLE"  # e.g. CUDA_VISIBLE_DEVICES
DEVICES = "ALLRANKS_DEVICES"  # the devices in the order of the local ranks, e.g. 3,2,1,0
# Set by the supervisor; the program never sees them.
SUPERVISOR = "ALLRANKS_SUPERVISOR"  # host:port
SECRET = "ALLRANKS_SECRET"
TERMINAL = "ALLRANKS_TERMINAL"  # which of rank 0's streams end at a terminal: out, err, or both
OUTPUT = "ALLRANKS_OUTPUT"  # directory for the other ranks' stdout
LAUNCH_ID = "ALLRANKS_LAUNCH_ID"  # the same for all restarts of a launch; the program sees it
PRIVATE = (SUPERVISOR, SECRET, TERMINAL, OUTPUT)

# Drawn by the supervisor for each start of the ranks: a process that connects to a rank must show it.
RANKS_SECRET = "ALLRANKS_RANKS_SECRET"

# --- the page that a rank shares with its guard --------------------------------------------------

# Under `allranks launch -- PROGRAM` each rank and its guard share some memory, which the guard has made:
# whole numbers of 8 bytes, and below them room for a stack. job/pulse.py explains the numbers.
PULSE = "ALLRANKS_PULSE"  # the path of that memory: /proc/PID/fd/N, of the guard
PAGE_NAME = "allranks-pulse"  # the name that /proc shows for it
PAGE_BYTES = 4096
STACK_AT, STACK_BYTES = PAGE_BYTES, 1 << 16  # where a program writes down its Python stack

NO_LIMIT_MS = -1
# The place of each number. The program writes these:
BEATS = 0  # how often it has called heartbeat()
WITHIN_MS = 1  # the next heartbeat comes within so long; 0: not said; NO_LIMIT_MS: whenever
STACK_PID = 2  # the process that writes down its stack when it is asked for; 0: none does
CALLS = 3  # how often should_stop() has been called
WAITS = 4  # 1 while the latest of these calls waits for the launch
WISH = 5  # why this rank asks for a stop: a signal's number, or WISH_JOB_END
WISH_JOB_END = 1000  # no signal has this number
STEPS = 8  # how many steps of a loop by allranks.open() this rank has begun
# The guard writes these:
HOLD = 6  # 1: wait at the next call of should_stop() until STOP_AT is there
STOP_AT = 7  # the first call of should_stop() that returns True; 0: not known

# --- ports -----------------------------------------------------------------------------------------

PORTS = range(20000, 30000)  # below the ports that systems hand out for outgoing connections


def port_for(job: str) -> int:
    """A port that every rank of a job works out alike, before any of them can speak to another.

    `job` is a text that the ranks share and other jobs do not, such as the scheduler's id of the job: two
    jobs on one host then seldom take the same port.
    """
    import zlib  # a guard, which every rank starts, does without

    return PORTS[zlib.crc32(job.encode()) % len(PORTS)]


def free_port() -> int:
    """A port that no process on this host uses now, at any of its addresses.

    It is not one of those that the system hands out for outgoing connections, so that it stays free until
    it is bound. Raises UserError if 200 tries find none.
    """
    for _ in range(200):
        port = PORTS[int.from_bytes(os.urandom(4), "big") % len(PORTS)]
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", port))  # bound, never listening: nobody can connect
            except OSError:
                continue
            return port
    raise UserError(f"no free port from {PORTS[0]} to {PORTS[-1]} on {socket.gethostname()}.")


# --- what one rank's program gets ------------------------------------------------------------------


def of_rank(
    identity: RankIdentity, environ: Mapping[str, str], told: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """The variables for one rank's program: its rank, where rank 0 is reached, and the device that it sees.

    `identity` is what the launcher says, `environ` has what the plan says, and `told` is what the
    supervisor knows: world_size, local_rank, local_world_size, master_addr, master_port. The launcher is
    asked first, then the supervisor, then the plan. Raises UserError for what none of them tells.
    """
    told = told or {}
    world_size = identity.world_size or told.get("world_size") or _given(environ, WORLD_SIZE)

    planned_local_size = _given(environ, LOCAL_WORLD_SIZE)
    local_size = identity.local_world_size or told.get("local_world_size") or planned_local_size
    if world_size == 1:
        local_size = 1

    local_rank = told.get("local_rank") if identity.local_rank is None else identity.local_rank
    if local_rank is None and planned_local_size:
        local_rank = identity.rank % planned_local_size  # the plan fills hosts one after another

    found = {
        "RANK": identity.rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_size,
    }
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise UserError(
            f"{identity.launcher} does not tell rank {identity.rank} its {' and '.join(missing)}: start "
            f"the ranks with `allranks launch`, or set {WORLD_SIZE} and {LOCAL_WORLD_SIZE}."
        )
    assert local_rank is not None
    return {
        **{name: str(value) for name, value in found.items()},
        **_master(identity, environ, told, one_host=world_size == local_size),
        **_device(local_rank, environ),
    }


def _given(environ: Mapping[str, str], name: str) -> int | None:
    """The variable as a number >= 1; None if it is not set."""
    text = environ.get(name, "")
    if text and not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UserError(f"{name}={text!r} is not a whole number >= 1: unset it or put it right.")
    return int(text) if text else None


def _master(
    identity: RankIdentity, environ: Mapping[str, str], told: Mapping[str, Any], one_host: bool
) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT: where rank 0 is to be reached.

    torchrun serves a store there already, so that its own values are kept.
    """
    address, port = environ.get("MASTER_ADDR", ""), environ.get("MASTER_PORT", "")
    if address and port and identity.launcher in ("torchrun", "environment"):
        return {}
    if told:  # a MASTER_PORT left over in the shell must not win over one that was found free
        return {"MASTER_ADDR": str(told["master_addr"]), "MASTER_PORT": str(told["master_port"])}
    address = environ.get(MASTER_ADDR) or address or ("127.0.0.1" if one_host else "")
    port = environ.get(MASTER_PORT) or port or (str(free_port()) if identity.alone else "")
    if not address or not port:
        raise UserError(
            f"{identity.launcher} does not tell where rank 0 is to be reached: start the ranks with "
            f"`allranks launch`, or set {MASTER_ADDR} and {MASTER_PORT} for all of them."
        )
    return {"MASTER_ADDR": address, "MASTER_PORT": port}


def _device(local_rank: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The variable that shows this rank its one device, of those that the scheduler gave the job.

    Empty if the plan names no devices, or the scheduler has chosen already.
    """
    variable, devices = environ.get(DEVICE_VARIABLE, ""), environ.get(DEVICES, "")
    if not variable or not devices:
        return {}
    by_rank = [device.strip() for device in devices.split(",")]
    if local_rank >= len(by_rank):
        raise UserError(
            f"local rank {local_rank} has no device: {DEVICES}={devices} names {len(by_rank)}. "
            f"Start at most {len(by_rank)} ranks on a host."
        )
    device = by_rank[local_rank]
    if variable in environ and not environ[variable].strip():
        return {}  # set, and empty: no device is to be seen
    shown = [name.strip() for name in environ.get(variable, "").split(",") if name.strip()]
    if len(shown) == 1 and len(by_rank) > 1:  # the scheduler has given this rank its own already
        return {}
    if shown and device.isdigit():
        if int(device) >= len(shown):
            raise UserError(
                f"{variable}={environ[variable]} shows {len(shown)} devices on this host, and local rank "
                f"{local_rank} is to have number {device}: ask the scheduler for all of the host's devices."
            )
        device = shown[int(device)]
    return {variable: device}
