"""What every rank runs first, under every launcher.

    python -m allranks.launch.rank -- PROGRAM ARGS...

It finds out which rank it is, gives the program the variables that torch knows, shows it its
device, and starts it. Without a supervisor (`allranks launch`) it becomes the program: signals and
exit code are the program's own. With one it stays as its parent (allranks.launch.guard). No torch.
"""

from __future__ import annotations

import os
import socket
import sys
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from allranks.errors import EXIT_USER_ERROR, UserError
from allranks.launch import processes
from allranks.runtime.environment import Launch, discover, first_host

# Set by the launch's plan, for this module to read.
MASTER_ADDR = "ALLRANKS_MASTER_ADDR"  # where rank 0 is reached
MASTER_PORT = "ALLRANKS_MASTER_PORT"  # only without a supervisor, which finds a free one
WORLD_SIZE = "ALLRANKS_WORLD_SIZE"  # for launchers that do not tell it
LOCAL_WORLD_SIZE = "ALLRANKS_LOCAL_WORLD_SIZE"  # the same, where every host has as many ranks
DEVICE_VARIABLE = "ALLRANKS_DEVICE_VARIABLE"  # e.g. CUDA_VISIBLE_DEVICES
DEVICES = "ALLRANKS_DEVICES"  # by local rank, e.g. 3,2,1,0
# Set by the supervisor; the program never sees them.
SUPERVISOR = "ALLRANKS_SUPERVISOR"  # host:port
SECRET = "ALLRANKS_SECRET"
TERMINAL = "ALLRANKS_TERMINAL"  # which of rank 0's streams end at a terminal: o, e, oe
OUTPUT = "ALLRANKS_OUTPUT"  # directory for the other ranks' stdout
PREFLIGHT = "ALLRANKS_PREFLIGHT"  # the secret of allranks.launch.preflight
PRIVATE = (SUPERVISOR, SECRET, TERMINAL, OUTPUT)

PORTS = range(20000, 30000)  # below the ports that systems hand out for outgoing connections


def main() -> None:
    """Starts the program, or ends with code 2 and one message that names the host."""
    try:
        program = program_of(sys.argv[1:])
        launch = discover(os.environ)
        if os.environ.get(SUPERVISOR):
            from allranks.launch import guard

            sys.exit(guard.attend(program, launch, os.environ))
        environ = {**os.environ, **variables(launch, os.environ)}
        processes.restore_signals()
        execute(program, environ)
    except UserError as error:
        print(f"allranks: [{socket.gethostname()}] {error}", file=sys.stderr, flush=True)
        sys.exit(EXIT_USER_ERROR)


def program_of(arguments: Sequence[str]) -> Sequence[str]:
    """What stands after `--`."""
    if len(arguments) < 2 or arguments[0] != "--":
        raise UserError("python -m allranks.launch.rank needs `-- PROGRAM ARGS...` after it.")
    return arguments[1:]


def execute(program: Sequence[str], environ: Mapping[str, str]) -> None:
    """Becomes the program, found on the PATH of `environ`. Raises UserError where it cannot."""
    try:
        os.execvpe(program[0], list(program), dict(environ))
    except OSError as error:
        raise UserError(
            f"{program[0]} cannot be started ({error.strerror}): give the path of a program that "
            f"this "
            "host has."
        ) from error


def variables(
    launch: Launch, environ: Mapping[str, str], told: Mapping[str, Any] | None = None
) -> dict[str, str]:
    """What the program's environment gets: the rank, the master, and which device is to be seen.

    `told` is the supervisor's knowledge: world_size, local_rank, local_world_size, master_addr,
    master_port. Raises UserError for what neither the launcher nor anybody else tells.
    """
    told = told or {}
    world_size = launch.world_size or told.get("world_size") or _given(environ, WORLD_SIZE)
    local_size = (
        launch.local_world_size
        or told.get("local_world_size")
        or _given(environ, LOCAL_WORLD_SIZE)
        or (1 if world_size == 1 else None)
    )
    local_rank = launch.local_rank
    if local_rank is None:
        local_rank = told.get("local_rank")
    if local_rank is None and local_size and _given(environ, LOCAL_WORLD_SIZE):
        local_rank = launch.rank % local_size  # the plan says: hosts are filled one after another
    found = {
        "RANK": launch.rank,
        "WORLD_SIZE": world_size,
        "LOCAL_RANK": local_rank,
        "LOCAL_WORLD_SIZE": local_size,
    }
    missing = [name for name, value in found.items() if value is None]
    if missing:
        raise UserError(
            f"{launch.launcher} does not tell rank {launch.rank} its {' and '.join(missing)}: "
            f"start the "
            f"ranks with `allranks launch`, or set {WORLD_SIZE} and {LOCAL_WORLD_SIZE}."
        )
    assert local_rank is not None
    return {
        **{name: str(value) for name, value in found.items()},
        **_master(launch, environ, told),
        **_device(local_rank, environ),
    }


def free_port() -> int:
    """A port that nobody on this host uses now, at any of its addresses.

    None of those handed out for outgoing connections, so that it stays free until it is bound.
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


def _given(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name, "")
    if text and not (text.isascii() and text.isdigit() and int(text) > 0):
        raise UserError(f"{name}={text!r} is not a whole number >= 1: unset it or put it right.")
    return int(text) if text else None


def _master(launch: Launch, environ: Mapping[str, str], told: Mapping[str, Any]) -> dict[str, str]:
    """MASTER_ADDR and MASTER_PORT. torchrun serves a store there already: its own are kept."""
    given = environ.get("MASTER_ADDR") and environ.get("MASTER_PORT")
    if given and launch.launcher in ("torchrun", "environment"):
        return {}
    if told:  # a MASTER_PORT left over in the shell must not win over one that was found free
        return {"MASTER_ADDR": str(told["master_addr"]), "MASTER_PORT": str(told["master_port"])}
    address = environ.get(MASTER_ADDR) or environ.get("MASTER_ADDR") or _first_of_job(launch, environ)
    port = environ.get(MASTER_PORT) or environ.get("MASTER_PORT") or _port_of_job(launch, environ)
    if not address or not port:
        raise UserError(
            f"{launch.launcher} does not tell where rank 0 is to be reached: start the ranks with "
            f"`allranks launch`, or set {MASTER_ADDR} and {MASTER_PORT} for all of them."
        )
    return {"MASTER_ADDR": address, "MASTER_PORT": port}


def _first_of_job(launch: Launch, environ: Mapping[str, str]) -> str:
    if launch.world_size == launch.local_world_size:
        return "127.0.0.1"
    nodes = environ.get("SLURM_STEP_NODELIST") or environ.get("SLURM_JOB_NODELIST")
    if nodes:
        return first_host(nodes)
    try:
        with open(environ.get("PBS_NODEFILE", "")) as file:  # noqa: PTH123
            return file.readline().strip()
    except OSError:
        return ""


def _port_of_job(launch: Launch, environ: Mapping[str, str]) -> str:
    """Nobody speaks to anybody here: a port that follows from the job's id, alike for all ranks."""
    if launch.alone:
        return str(free_port())
    job = environ.get("SLURM_JOB_ID") or environ.get("PBS_JOBID") or environ.get("LSB_JOBID")
    if not job:
        return ""
    step = f"{job}.{environ.get('SLURM_STEP_ID', '')}"
    return str(PORTS[zlib.crc32(step.encode()) % len(PORTS)])


def _device(local_rank: int, environ: Mapping[str, str]) -> dict[str, str]:
    """The one device that this rank is to see, of those that the scheduler shows it."""
    variable, devices = environ.get(DEVICE_VARIABLE, ""), environ.get(DEVICES, "")
    if not variable or not devices:
        return {}
    by_rank = [device.strip() for device in devices.split(",")]
    if local_rank >= len(by_rank):
        raise UserError(
            f"local rank {local_rank} has no device: {DEVICES}={devices} names {len(by_rank)}. "
            f"Start at "
            f"most {len(by_rank)} ranks on a host."
        )
    device = by_rank[local_rank]
    shown = [name.strip() for name in environ.get(variable, "").split(",") if name.strip()]
    if len(shown) == 1 and len(by_rank) > 1:  # the scheduler has given this rank its own already
        return {}
    if shown and device.isdigit():
        if int(device) >= len(shown):
            raise UserError(
                f"{variable}={environ[variable]} shows {len(shown)} devices on this host, and "
                f"local rank "
                f"{local_rank} is to have number {device}: ask the scheduler for all of the "
                f"host's devices."
            )
        device = shown[int(device)]
    return {variable: device}


if __name__ == "__main__":
    main()
