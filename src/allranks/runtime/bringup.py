"""From a launcher's word to ranks that can work together: devices, threads, the process group."""

from __future__ import annotations

import os
import platform
import socket
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import torch

import allranks
from allranks.base.agreement import majority
from allranks.base.errors import UserError
from allranks.base.processes import cpu_affinity
from allranks.config import Config, TrainerConfig, WatchdogConfig
from allranks.job.identity import RankIdentity
from allranks.runtime import ezpz, mpi, native
from allranks.runtime.meeting import merged, open_meeting, ranks_named
from allranks.runtime.runtime import Runtime
from allranks.runtime.watch.thread import Watchdog

COLLECTIVE_S = 86_400  # far beyond any limit of the watchdog, which ends a collective that has lost a rank
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}


def open_runtime(
    identity: RankIdentity, config: Config | None, digest: str, error: UserError | None = None, run: int = 0
) -> Runtime:
    """Brings the ranks up: all of them with the same configuration, each on a device of its own.

    A rank that has no valid configuration comes with its `error` instead, so that every rank can end
    with one message. Raises UserError, agreed by all, for whatever makes the run impossible.
    """
    watchdog = Watchdog(config.watchdog if config else WatchdogConfig(), identity)
    try:
        return _bring_up(identity, config, digest, error, run, watchdog)
    except UserError:
        watchdog.close()
        if watchdog.meeting is not None:
            watchdog.meeting.leave()
        raise


def _bring_up(
    identity: RankIdentity,
    config: Config | None,
    digest: str,
    error: UserError | None,
    run: int,
    watchdog: Watchdog,
) -> Runtime:
    comm = None
    if identity.is_mpi and not identity.alone:
        comm = mpi.world(identity)
        identity = replace(identity, world_size=int(comm.size))
    meeting = watchdog.meeting = open_meeting(identity, comm, run)
    host = socket.gethostname()
    about_me = {
        "host": host,
        "local_rank": identity.local_rank,
        "cpus": sorted(cpu_affinity()),
        "digest": digest,
        "version": f"allranks {allranks.__version__}, torch {torch.__version__}",
        "error": str(error) if error else None,
    }
    place = meeting.settle(about_me, _places)
    assert config is not None  # an error of this rank was raised by settle()
    runtime_error: UserError | None = None
    try:
        device, device_id = _pick_device(config, place)
        _check_precision(config.trainer.precision, device)
        use_ezpz = ezpz.chosen(config.runtime, identity.rank)
        watch = watchdog.prepare(one_host=place["hosts"] == 1) if meeting.world_size > 1 else None
    except UserError as problem:
        runtime_error, device_id, watch = problem, "", None
    mine = {
        "host": host,
        "pid": os.getpid(),
        "error": str(runtime_error) if runtime_error else None,
        "device": device_id,
        "local_rank": place["local_rank"],
        "oversubscribe": config.oversubscribe,
        "watch": watch,
    }
    seen: list[dict[str, Any]] = []
    agreed = meeting.settle(mine, partial(_check_devices, seen))
    if watch is not None:
        watchdog.join(**agreed["watch"])
    fixed = _virtual_ranks(config.trainer, meeting.world_size)
    threads = config.threads or (1 if fixed else place["threads"])  # which may change sums' last bits
    torch.set_num_threads(threads)
    runtime = Runtime(
        identity, meeting, watchdog, device, "ezpz" if use_ezpz else "native", place["local_rank"],
        place["local_world_size"], threads, seen, comm if device.type == "cpu" else None, fixed,
    )  # fmt: skip
    if meeting.world_size > 1 or use_ezpz:
        # NCCL and XCCL refuse two ranks on one device; gloo serves them
        backend = "gloo" if agreed["shared"] else BACKENDS[device.type]
        _start_process_group(runtime, backend, place["hosts"])
    return runtime


def _start_process_group(runtime: Runtime, backend: str, hosts: int) -> None:
    device = runtime.device
    runtime.watchdog.arrive()
    if device.type == "cpu" and hosts == 1 and sys.platform == "linux":
        # gloo looks its address up by the host's name, which fails on many a laptop
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).set_device(device)
    if runtime.kind == "ezpz":
        ezpz.start(runtime.meeting, runtime.local_rank, device, backend, COLLECTIVE_S)
    else:
        native.start(runtime.meeting, backend, device, COLLECTIVE_S)


def _places(ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Where each rank sits; raises UserError where the ranks are not all of one run."""
    errors = [rank["error"] for rank in ranks]
    if any(errors):
        raise UserError(merged(errors))
    for what, remedy in (
        ("digest", "give every rank the same overrides and the same configuration files"),
        ("version", "start every rank from the same environment"),
    ):
        values = [rank[what] for rank in ranks]
        usual, odd = majority(values)
        if odd:
            hosts = ", ".join(dict.fromkeys(ranks[r]["host"] for r in odd[:8]))
            detail = (
                "a configuration other than the other ranks'"
                if what == "digest"
                else f"{values[odd[0]]}, but the other ranks {usual}"
            )
            raise UserError(f"{ranks_named(odd)} (on {hosts}) came with {detail}: {remedy}.")

    by_host: dict[str, list[int]] = {}
    for r, rank in enumerate(ranks):
        by_host.setdefault(rank["host"], []).append(r)
    places = []
    for r, rank in enumerate(ranks):
        here = by_host[rank["host"]]
        sharing = sum(ranks[other]["cpus"] == rank["cpus"] for other in here)
        places.append(
            {
                "local_rank": here.index(r) if rank["local_rank"] is None else rank["local_rank"],
                "local_world_size": len(here),
                "threads": max(1, len(rank["cpus"]) // sharing),
                "hosts": len(by_host),
            }
        )
    return places


def _pick_device(config: Config, place: dict[str, Any]) -> tuple[torch.device, str]:
    """This rank's device, and a name for the physical thing behind it."""
    available = [name for name in ("cuda", "xpu", "mps") if is_available(name)]
    name = config.device
    if name == "auto":
        name = next((n for n in available if n != "mps" or place["local_world_size"] == 1), "cpu")
    elif name != "cpu" and name not in available:
        built = f"torch {torch.__version__}"
        raise UserError(
            f"device={name}: {built} sees no such device on {platform.node()} "
            f"(there is: {', '.join([*available, 'cpu'])}). Take device=auto or device=cpu, or load a "
            f"torch that was built for it."
        )
    if name == "cpu":
        return torch.device("cpu"), "cpu"
    if name == "mps":
        return torch.device("mps"), f"{platform.node()}/mps"
    backend = getattr(torch, name)
    # --gpus-per-task and the like show each rank a single device: its index is then 0 for everyone
    index = place["local_rank"] % backend.device_count()
    device_id = str(getattr(backend.get_device_properties(index), "uuid", ""))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("ZE_AFFINITY_MASK", "")
    return torch.device(name, index), device_id or f"{platform.node()}/{visible}/{index}"


def is_available(name: str) -> bool:
    if name == "mps":
        return torch.backends.mps.is_available()
    backend = getattr(torch, name, None)
    return backend is not None and backend.is_available() and backend.device_count() > 0


def _virtual_ranks(trainer: TrainerConfig, world_size: int) -> int | None:
    wanted = 2 if trainer.reproducible else 0  # "error", "default": a sweep's runs share this process
    if torch.get_deterministic_debug_mode() != wanted:
        torch.set_deterministic_debug_mode(wanted)
        # memory that is never read here
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if not trainer.reproducible:
        return None
    if trainer.virtual_ranks % world_size:
        raise UserError(
            f"trainer.reproducible=true with trainer.virtual_ranks={trainer.virtual_ranks}: start a number "
            f"of ranks that divides it, not {world_size}.",
            said_by=0,
        )
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return trainer.virtual_ranks


def _check_precision(precision: str, device: torch.device) -> None:
    if precision == "fp64" and device.type == "mps":
        raise UserError("trainer.precision=fp64 is not supported on mps: take fp32, or device=cpu.")
    if precision == "fp16" and device.type == "cpu":
        raise UserError("trainer.precision=fp16 needs a GPU: take bf16 or fp32 on cpu.")
    if precision == "bf16" and device.type == "cuda" and not torch.cuda.is_bf16_supported():
        raise UserError("trainer.precision=bf16 is not supported by this GPU: take fp16 or fp32.")


def _check_devices(seen: list[dict[str, Any]], ranks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Two ranks on one GPU is a mistake unless it is asked for; fills `seen` on rank 0."""
    errors = [rank["error"] for rank in ranks]
    if any(errors):
        raise UserError(merged(errors))
    first: dict[tuple[str, str], int] = {}
    shared = False
    for r, rank in enumerate(ranks):
        other = first.setdefault((rank["host"], rank["device"]), r)
        if other == r or rank["device"] == "cpu":
            continue
        shared = True
        if not rank["oversubscribe"]:
            here = sum(x["host"] == rank["host"] for x in ranks)
            devices = len({x["device"] for x in ranks if x["host"] == rank["host"]})
            raise UserError(
                f"{here} ranks on {rank['host']} share {devices} device{'s' * (devices > 1)} (ranks "
                f"{other} and {r} have the same one): start at most {devices} there, or allow it with "
                "oversubscribe=true."
            )
    seen += [
        {"rank": r, **{name: x[name] for name in ("host", "pid", "local_rank", "device")}}
        for r, x in enumerate(ranks)
    ]
    watches = [rank["watch"] for rank in ranks]
    near = [r for r, rank in enumerate(ranks) if r and rank["host"] == ranks[0]["host"]]
    deputy = min(near, default=1)
    return [  # only rank 0 needs to know all
        {"shared": shared, "watch": {"peers": watches[: None if r == 0 else 1], "deputy": deputy}}
        for r in range(len(ranks))
    ]
