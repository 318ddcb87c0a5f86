"""Brings the ranks up: from what a launcher has told each of them to ranks that can work together.

open_runtime() takes these steps, on every rank:

    1. meet        the ranks find each other (meeting.py), over MPI or over a store that rank 0 serves
    2. compare     rank 0 sees that all have one configuration and one version, and tells each its place
    3. equip       each rank picks its device, and opens what the others need to watch over it
    4. agree       rank 0 sees that no two ranks share a device, and what carries the collectives
    5. connect     the process group is made, by ezpz or by torch itself

In steps 2 and 4 each rank tells rank 0 something and gets an answer. An error of any rank reaches rank 0
that way, and becomes the error of all: no rank waits for one that has given up.
"""

from __future__ import annotations

import os
import platform
import socket
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple, NoReturn, TypeVar

import torch

import allranks
from allranks.base import links
from allranks.base.agreement import majority
from allranks.base.errors import UserError
from allranks.base.processes import boot_id, cpu_affinity, cpu_quota, cpu_ranges
from allranks.base.text import one_line
from allranks.config import RuntimeSettings, WatchdogConfig
from allranks.job.identity import RankIdentity
from allranks.runtime import ezpz, mpi, native
from allranks.runtime.meeting import Meeting, merged, open_meeting, ranks_named
from allranks.runtime.runtime import RankFacts, Runtime, has_float64
from allranks.runtime.watch import verdict
from allranks.runtime.watch.thread import Watchdog
from allranks.runtime.watch.verdict import Peer

COLLECTIVE_S = 86_400  # far beyond any limit of the watchdog, which ends a collective that has lost a rank
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}
SHARED_BACKEND = "gloo"  # NCCL and XCCL refuse two ranks on one device

Told = TypeVar("Told")
Answer = TypeVar("Answer")


# --- what the ranks tell rank 0, and what it answers ----------------------------------------------------


@dataclass(frozen=True)
class Arrival:
    """What a rank tells rank 0 first."""

    host: str
    local_rank: int | None  # None: its launcher has not said
    cpus: list[int]  # on which it may run
    digest: str  # of its configuration
    version: str  # of allranks and torch
    error: str | None  # why it has no configuration
    boot_id: str | None = None  # the boot id of its host's kernel: two hosts may have the same name
    cpu_quota: float | None = None  # CPUs' worth of time for all ranks on its host; None: no limit


@dataclass(frozen=True)
class Place:
    """Where a rank is among the others: on which host, and which of the ranks there."""

    local_rank: int
    local_world_size: int
    threads: int  # its share of the CPUs
    hosts: int  # of the whole run


@dataclass(frozen=True)
class Equipment:
    """What a rank works with: its device, and how the others can look after it."""

    facts: RankFacts
    device_type: str  # cpu, cuda, xpu or mps
    oversubscribe: bool  # whether ranks may share a device
    watch: dict[str, Any] | None  # what the other ranks need to watch over this one; None for a lone rank
    error: str | None  # why it can not go on


@dataclass(frozen=True)
class Agreement:
    """What the ranks have settled. Rank 0 gets to know all ranks, the others only what concerns them."""

    shared_devices: bool
    watched: list[dict[str, Any]]  # Equipment.watch of all ranks; for other ranks than 0 that of rank 0
    deputy: int  # the rank that speaks when rank 0 cannot
    ranks: list[RankFacts] = field(default_factory=list)  # empty on other ranks than 0


def _ask_rank_0(
    meeting: Meeting,
    mine: Told,
    decide: Callable[[list[Told]], Sequence[Answer]],
    to_told: Callable[[dict[str, Any]], Told],
    to_answer: Callable[[dict[str, Any]], Answer],
) -> Answer:
    """Rank 0 decides on what all ranks tell, and answers each of them; between the ranks goes JSON."""

    def decide_in_json(said: list[dict[str, Any]]) -> list[dict[str, Any]]:
        answers = decide([to_told(values) for values in said])
        return [asdict(answer) for answer in answers]  # type: ignore[call-overload]

    return to_answer(meeting.settle(asdict(mine), decide_in_json))  # type: ignore[call-overload]


def _to_equipment(values: dict[str, Any]) -> Equipment:
    return Equipment(**{**values, "facts": RankFacts(**values["facts"])})


def _to_agreement(values: dict[str, Any]) -> Agreement:
    return Agreement(**{**values, "ranks": [RankFacts(**facts) for facts in values["ranks"]]})


# --- the steps ------------------------------------------------------------------------------------------


def open_runtime(identity: RankIdentity, settings: RuntimeSettings, run: int = 0) -> Runtime:
    """Brings the ranks up: all of them with the same configuration, each on a device of its own.

    `run` counts the runs of this process. Raises UserError, on all ranks, for whatever makes the run
    impossible.
    """
    return _open(identity, settings, None, run)


def refuse_together(identity: RankIdentity, error: UserError) -> NoReturn:
    """Meets the other ranks only to raise `error`, of this rank's configuration, on all of them."""
    _open(identity, None, error, 0)
    raise AssertionError("rank 0 has passed over the error of a rank")


def _open(
    identity: RankIdentity, settings: RuntimeSettings | None, error: UserError | None, run: int
) -> Runtime:
    limits = settings.limits if settings else WatchdogConfig()
    watchdog = Watchdog(limits, identity, abort=mpi.abort)
    meeting: Meeting | None = None
    try:
        # 1. meet
        comm = None
        if identity.is_mpi and not identity.alone:
            comm = mpi.world(identity, limits.start_s)
            identity = identity._replace(world_size=int(comm.size))
        meeting = open_meeting(identity, comm, run, watchdog.progress)
        return _bring_up(identity, settings, error, watchdog, meeting, comm)
    except UserError:
        watchdog.close()
        if meeting is not None:
            meeting.leave()
        raise


def _bring_up(
    identity: RankIdentity,
    settings: RuntimeSettings | None,
    error: UserError | None,
    watchdog: Watchdog,
    meeting: Meeting,
    comm: Any,
) -> Runtime:
    # 2. compare
    arrival = Arrival(
        host=socket.gethostname(),
        local_rank=identity.local_rank,
        cpus=sorted(cpu_affinity()),
        digest=settings.digest if settings else "",
        version=f"allranks {allranks.__version__}, torch {torch.__version__}",
        error=str(error) if error else None,
        cpu_quota=cpu_quota(),
        boot_id=boot_id(),
    )
    place = _ask_rank_0(meeting, arrival, places, lambda said: Arrival(**said), lambda said: Place(**said))
    assert settings is not None  # a rank without a configuration has told its error, which all have raised

    # 3. equip
    device, kind, equipment = _equip(settings, identity, place, watchdog, meeting.world_size)

    # 4. agree
    agreed = _ask_rank_0(meeting, equipment, agreement, _to_equipment, _to_agreement)
    if equipment.watch is not None:
        problem: UserError | None = None
        try:
            watchdog.join(agreed.watched, agreed.deputy)
        except UserError as unreachable:
            problem = unreachable
        meeting.agree(problem)  # a rank that ended alone would be waited for in the process group

    # 5. connect
    _set_determinism(is_wanted=settings.virtual_ranks is not None)
    # Another number of threads may change the last bits of sums: a reproducible run takes always one.
    threads = settings.threads or (1 if settings.virtual_ranks else place.threads)
    torch.set_num_threads(threads)
    runtime = Runtime(
        identity=identity,
        meeting=meeting,
        watchdog=watchdog,
        device=device,
        kind=kind,
        local_rank=place.local_rank,
        local_world_size=place.local_world_size,
        threads=threads,
        ranks=agreed.ranks,
        comm=comm if device.type == "cpu" else None,
        virtual_ranks=settings.virtual_ranks,
    )
    if meeting.world_size > 1 or kind == "ezpz":
        backend = SHARED_BACKEND if agreed.shared_devices else BACKENDS[device.type]
        _start_process_group(runtime, backend, place.hosts)
    return runtime


def _equip(
    settings: RuntimeSettings, identity: RankIdentity, place: Place, watchdog: Watchdog, world_size: int
) -> tuple[torch.device, str, Equipment]:
    """This rank's device, `ezpz` or `native`, and what the other ranks must know.

    An error is told to rank 0, not raised: all ranks raise it when rank 0 has heard them all.
    """
    picked = PickedDevice(torch.device("cpu"), "")
    kind = "native"
    watch: dict[str, Any] | None = None
    error: UserError | None = None
    try:
        try:
            picked = pick_device(settings.device, place)
            _check_precision(settings.precision, picked.device)
        except RuntimeError as problem:  # of a GPU that does not work
            raise UserError(
                f"device={settings.device} does not work on {socket.gethostname()} ({one_line(problem)}): "
                "look at the host's GPUs and driver, or leave the host out."
            ) from problem
        _check_virtual_ranks(settings.virtual_ranks, world_size)
        if ezpz.chosen(settings.library, identity.rank):
            kind = "ezpz"
        if world_size > 1:
            watch = watchdog.prepare(world_size, one_host=place.hosts == 1)
            # Rank 0 has a connection to every rank, and so has each rank where gloo carries collectives.
            doors = int(identity.rank == 0) + int(picked.device.type == "cpu")
            links.allow_connections(doors * world_size)
    except UserError as problem:
        error = problem
    facts = RankFacts(
        rank=identity.rank,
        host=socket.gethostname(),
        pid=os.getpid(),
        local_rank=place.local_rank,
        device=picked.name,
        cpus=cpu_ranges(cpu_affinity()),
        boot_id=boot_id(),
    )
    equipment = Equipment(
        facts=facts,
        device_type=picked.device.type,
        oversubscribe=settings.oversubscribe,
        watch=watch,
        error=str(error) if error else None,
    )
    return picked.device, kind, equipment


def _start_process_group(runtime: Runtime, backend: str, hosts: int) -> None:
    device = runtime.device
    native.check_backend(backend, device.type)
    runtime.progress.arrive()
    if backend == "gloo" and hosts == 1 and sys.platform == "linux":
        # By default gloo looks up its address by the host's name, which fails on many laptops.
        if not os.environ.get("GLOO_SOCKET_IFNAME"):
            os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    if device.type in ("cuda", "xpu"):
        getattr(torch, device.type).set_device(device)
    if runtime.kind == "ezpz":
        ezpz.start(
            runtime.meeting,
            runtime.local_rank,
            device,
            backend,
            COLLECTIVE_S,
            is_started_by_mpi=runtime.identity.is_mpi,
        )
    else:
        native.start(runtime.meeting, backend, device, COLLECTIVE_S)


# --- what rank 0 decides --------------------------------------------------------------------------------


def places(arrivals: Sequence[Arrival]) -> list[Place]:
    """Where each rank sits; raises UserError where the ranks are not all of one run."""
    _raise_errors([arrival.error for arrival in arrivals])
    hosts = [arrival.host for arrival in arrivals]
    _must_agree(
        hosts,
        [arrival.digest for arrival in arrivals],
        lambda odd, usual: "a configuration other than the other ranks'",
        "give every rank the same overrides and the same configuration files",
    )
    _must_agree(
        hosts,
        [arrival.version for arrival in arrivals],
        lambda odd, usual: f"{odd}, but the other ranks {usual}",
        "start every rank from the same environment",
    )

    ranks_of_host: dict[tuple[str, str | None], list[int]] = {}
    for rank, arrival in enumerate(arrivals):
        ranks_of_host.setdefault((arrival.host, arrival.boot_id), []).append(rank)

    found = []
    for rank, arrival in enumerate(arrivals):
        here = ranks_of_host[arrival.host, arrival.boot_id]
        sharing = sum(arrivals[other].cpus == arrival.cpus for other in here)
        threads = len(arrival.cpus) // sharing
        if arrival.cpu_quota is not None:  # a container's share of its host, which all its ranks share
            threads = min(threads, int(arrival.cpu_quota) // len(here))
        found.append(
            Place(
                local_rank=here.index(rank) if arrival.local_rank is None else arrival.local_rank,
                local_world_size=len(here),
                threads=max(1, threads),
                hosts=len(ranks_of_host),
            )
        )
    return found


def _must_agree(
    hosts: Sequence[str], values: Sequence[str], came_with: Callable[[str, str], str], remedy: str
) -> None:
    """Raises UserError that names the ranks, and their hosts, whose value is not the usual one.

    `hosts` and `values` have an entry for each rank.
    """
    usual, odd = majority(values)
    if odd:
        odd_hosts = ", ".join(dict.fromkeys(hosts[rank] for rank in odd[:8]))
        what = came_with(values[odd[0]], usual)
        raise UserError(f"{ranks_named(odd)} (on {odd_hosts}) came with {what}: {remedy}.")


def agreement(equipments: Sequence[Equipment]) -> list[Agreement]:
    """What the ranks go on with.

    Raises UserError if ranks have devices of different types, which no collective can connect, and if
    two ranks are on one device, unless that is asked for.
    """
    _raise_errors([equipment.error for equipment in equipments])
    ranks = [equipment.facts for equipment in equipments]
    _must_agree(
        [facts.host for facts in ranks],
        [equipment.device_type for equipment in equipments],
        lambda odd, usual: f"the device {odd}, but the other ranks with {usual}",
        "look whether torch sees the GPUs there, leave the host out, or give all ranks device=cpu",
    )
    shared_devices = _share_devices(ranks, allowed=all(e.oversubscribe for e in equipments))
    watched = [equipment.watch for equipment in equipments if equipment.watch is not None]

    deputy = verdict.deputy([Peer.from_json(watch) for watch in watched])
    for_rank_0 = Agreement(shared_devices, watched, deputy, ranks)
    for_others = Agreement(shared_devices, watched[:1], deputy)
    return [for_rank_0] + [for_others] * (len(ranks) - 1)


def _share_devices(ranks: Sequence[RankFacts], allowed: bool) -> bool:
    """Whether any two ranks have the same device. Ranks may always share a host's CPUs."""
    first_with: dict[tuple[tuple[str, str | None], str], int] = {}  # by host and device
    shared = False
    for facts in ranks:
        if facts.device == "cpu":
            continue
        first = first_with.setdefault((facts.host_identity, facts.device), facts.rank)
        if first == facts.rank:
            continue
        shared = True
        if not allowed:
            here = [other for other in ranks if other.host_identity == facts.host_identity]
            devices = len({other.device for other in here})
            raise UserError(
                f"{len(here)} ranks on {facts.host} share {devices} device{'s' * (devices > 1)} (ranks "
                f"{first} and {facts.rank} have the same one): start at most {devices} there, or allow it "
                "with oversubscribe=true."
            )
    return shared


def _raise_errors(errors: Sequence[str | None]) -> None:
    if any(errors):
        raise UserError(merged(errors))


# --- what a rank finds out for itself -------------------------------------------------------------------


class PickedDevice(NamedTuple):
    """The device that a rank computes on."""

    device: torch.device
    name: str  # the name of the physical device: two ranks with the same name share it


def pick_device(wanted: str, place: Place) -> PickedDevice:
    """This rank's device for `device=wanted`. Raises UserError if this host has no such device."""
    available = [name for name in ("cuda", "xpu", "mps") if is_available(name)]
    kind = wanted
    if wanted == "auto":
        # There is one mps device on a host, and no collectives between several ranks on it.
        usable = [name for name in available if name != "mps" or place.local_world_size == 1]
        kind = usable[0] if usable else "cpu"
    elif wanted != "cpu" and wanted not in available:
        raise UserError(
            f"device={wanted}: torch {torch.__version__} sees no such device on {platform.node()} "
            f"(there is: {', '.join([*available, 'cpu'])}). Take device=auto or device=cpu, or load a "
            f"torch that was built for it."
        )
    if kind == "cpu":
        return PickedDevice(torch.device("cpu"), "cpu")
    if kind == "mps":
        return PickedDevice(torch.device("mps"), f"{platform.node()}/mps")

    backend = getattr(torch, kind)
    # --gpus-per-task and the like show each rank a single device: its index is then 0 for everyone.
    index = place.local_rank % backend.device_count()
    name = str(getattr(backend.get_device_properties(index), "uuid", ""))
    if not name:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("ZE_AFFINITY_MASK", "")
        name = f"{platform.node()}/{visible}/{index}"
    return PickedDevice(torch.device(kind, index), name)


def is_available(name: str) -> bool:
    """Whether torch sees a device of this kind: cuda, xpu or mps."""
    if name == "mps":
        return torch.backends.mps.is_available()
    backend = getattr(torch, name, None)
    return backend is not None and backend.is_available() and backend.device_count() > 0


def _set_determinism(is_wanted: bool) -> None:
    """Sets torch for a reproducible run, or back for any other run."""
    # torch's modes: 2 raises an error for an operation whose result depends on chance, 0 allows all. Also
    # set back, because the runs of a sweep share this process.
    wanted_mode = 2 if is_wanted else 0
    if torch.get_deterministic_debug_mode() != wanted_mode:
        torch.set_deterministic_debug_mode(wanted_mode)
        # It would fill new memory with NaN, which takes time; nothing here reads memory before writing it.
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
    if is_wanted and not os.environ.get("CUBLAS_WORKSPACE_CONFIG"):
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # else cuBLAS's results depend on chance


def _check_virtual_ranks(virtual_ranks: int | None, world_size: int) -> None:
    """Raises UserError if the virtual ranks of a reproducible run cannot be dealt out evenly."""
    if virtual_ranks is not None and virtual_ranks % world_size:
        raise UserError(
            f"The ranks of a reproducible run share out trainer.virtual_ranks={virtual_ranks}: start a "
            f"number of ranks that divides it, not {world_size}."
        )


def _check_precision(precision: str, device: torch.device) -> None:
    if precision == "fp64" and not has_float64(device):
        raise UserError(
            f"trainer.precision=fp64 is not supported by this {device.type} device: take fp32, or "
            "device=cpu."
        )
    if precision == "fp16" and device.type == "cpu":
        raise UserError("trainer.precision=fp16 needs a GPU: take bf16 or fp32 on cpu.")
    if precision == "bf16" and device.type == "cuda":
        with torch.cuda.device(device):  # else torch would look at the first GPU
            is_supported = torch.cuda.is_bf16_supported()
        if not is_supported:
            raise UserError("trainer.precision=bf16 is not supported by this GPU: take fp16 or fp32.")
