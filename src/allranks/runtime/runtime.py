"""One Runtime per rank: who am I, which device, and the few collectives that a training needs.

Everything here works at world size 1 as well, so nobody else asks whether the run is distributed.
"""

from __future__ import annotations

import logging
import os
import platform
import socket
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist

import allranks
from allranks.config import Config, TrainerConfig, WatchdogConfig
from allranks.errors import UserError
from allranks.runtime import ezpz, gradients, mpi, native
from allranks.runtime.environment import Launch, cpu_affinity
from allranks.runtime.meeting import Meeting, merged, open_meeting, ranks_named
from allranks.runtime.watchdog import Watchdog

log = logging.getLogger(__name__)

COLLECTIVE_S = 86_400  # far beyond any limit of the watchdog, which ends a collective that has lost a rank
BACKENDS = {"cpu": "gloo", "cuda": "nccl", "xpu": "xccl"}


@dataclass
class Runtime:
    """What a rank knows about itself, and how it talks to the others."""

    launch: Launch
    meeting: Meeting
    watchdog: Watchdog
    device: torch.device
    kind: str  # "ezpz" or "native"
    local_rank: int
    local_world_size: int
    threads: int
    ranks: list[dict[str, Any]]  # host, device and launch of every rank; filled on rank 0 only
    comm: Any = None  # MPI.COMM_WORLD where gradients on CPU go through MPI
    virtual_ranks: int | None = None  # the fixed number of shares of a reproducible run

    @property
    def rank(self) -> int:
        return self.meeting.rank

    @property
    def world_size(self) -> int:
        return self.meeting.world_size

    @property
    def host(self) -> str:
        return socket.gethostname()

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def share_count(self) -> int:
        """Into how many shares each batch is cut."""
        return self.virtual_ranks or self.world_size

    @property
    def shares(self) -> range:
        """Those that this rank takes: one, or several neighbouring ones where their number is fixed."""
        mine = self.share_count // self.world_size
        return range(self.rank * mine, (self.rank + 1) * mine)

    @property
    def collectives(self) -> str:
        """What carries the gradients, in a word."""
        if self.world_size == 1:
            return "none"
        return "mpi" if self.comm is not None else dist.get_backend()

    def wrap(self, model: torch.nn.Module) -> torch.nn.Module:
        """DDP whose gradient is the *sum* over the ranks: the engine weights each share by its count.

        DDP's own mean would be right only for equal shares, which 128 examples over 12 ranks are not.
        """
        if self.world_size == 1 or self.virtual_ranks:
            return model
        self.watchdog.arrive()  # DDP compares the ranks' parameters
        wrapped = native.wrap(model, self.device)
        if next(model.buffers(), None) is not None:  # it sends rank 0's before each forward pass
            wrapped.register_forward_pre_hook(lambda *_: self.watchdog.arrive(in_step=False))
        hook = gradients.sum_by_torch if self.comm is None else gradients.sum_by_mpi
        wrapped.register_comm_hook(self, hook)  # type: ignore[operator]
        return wrapped

    def without_sync(self, model: torch.nn.Module) -> Any:
        """A context in which backward() adds up gradients on this rank only."""
        return getattr(model, "no_sync", nullcontext)()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a contiguous tensor over all ranks, in place."""
        self.watchdog.arrive()
        if self.comm is not None:
            mpi.allreduce(self.comm, tensor)
        elif self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def add_up(self, values: Sequence[float]) -> list[float]:
        """The sums of these numbers over all ranks."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        return self.sum(torch.tensor(values, dtype=dtype, device=self.device)).tolist()

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, k] of each rank -> [world_size * n, k], in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return rows
        self.watchdog.arrive()
        rows = rows.contiguous()
        if self.comm is not None:
            everyones = rows.new_empty(self.world_size, *rows.shape)
            self.comm.Allgather(rows.numpy(), everyones.numpy())
            return everyones.flatten(0, 1)
        parts = [torch.empty_like(rows) for _ in range(self.world_size)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)

    def share_files(self, files: Mapping[str, bytes]) -> dict[str, bytes]:
        """Rank 0's files, by name, on every rank: no other rank has to find or to read them."""
        sizes = self.meeting.from_rank_0(lambda: {name: len(content) for name, content in files.items()})
        shared = {}
        for name, size in sizes.items():
            content = bytearray(files[name] if self.is_main else size)
            if size and self.world_size > 1:
                bytes_on_device = torch.frombuffer(content, dtype=torch.uint8).to(self.device)
                content = bytearray(self.broadcast(bytes_on_device).cpu().numpy().tobytes())
            shared[name] = bytes(content)
        return shared

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's contiguous tensor on every rank, in place."""
        self.watchdog.arrive()
        if self.comm is not None:
            self.comm.Bcast(tensor.numpy(), root=0)
        elif self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    @contextmanager
    def all_or_none(self) -> Iterator[None]:
        """A step that every rank takes: if one rank's ends in a UserError, all ranks raise it."""
        problem: UserError | None = None
        try:
            yield
        except UserError as error:
            problem = error
        self.meeting.agree(problem)

    def synchronize(self) -> None:
        """Waits for the device, so that a clock read next is honest."""
        if self.device.type in ("cuda", "xpu", "mps"):
            getattr(torch, self.device.type).synchronize()

    def autocast(self, precision: str) -> Any:
        """The mixed-precision context of `trainer.precision`."""
        if precision in ("fp64", "fp32"):
            return nullcontext()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def describe(self) -> dict[str, Any]:
        """For environment.json; the list of ranks is known to rank 0 only."""
        return {
            "launcher": self.launch.launcher,
            "runtime": self.kind,
            "collectives": self.collectives,
            "world_size": self.world_size,
            "threads_per_rank": self.threads,
            "ranks": self.ranks,
        }

    def abort(self, code: int) -> None:
        """Ends this rank at once, and with it all others: those may wait for it in a collective."""
        sys.stdout.flush()
        sys.stderr.flush()
        self.watchdog.fail(code)
        mpi.abort(code)
        os._exit(code)

    def close(self) -> None:
        self.watchdog.close()
        if self.world_size > 1:
            if dist.is_initialized():
                dist.destroy_process_group()
            self.meeting.leave()


def open_runtime(
    launch: Launch, config: Config | None, digest: str, error: UserError | None = None, run: int = 0
) -> Runtime:
    """Brings the ranks up: all of them with the same configuration, each on a device of its own.

    A rank that has no valid configuration comes with its `error` instead, so that every rank can end
    with one message. Raises UserError, agreed by all, for whatever makes the run impossible.
    """
    watchdog = Watchdog(config.watchdog if config else WatchdogConfig(), launch)
    try:
        return _bring_up(launch, config, digest, error, run, watchdog)
    except UserError:
        watchdog.close()
        if watchdog.meeting is not None:
            watchdog.meeting.leave()
        raise


def _bring_up(
    launch: Launch,
    config: Config | None,
    digest: str,
    error: UserError | None,
    run: int,
    watchdog: Watchdog,
) -> Runtime:
    comm = None
    if launch.is_mpi and not launch.alone:
        comm = mpi.world(launch)
        launch = replace(launch, world_size=int(comm.size))
    meeting = watchdog.meeting = open_meeting(launch, comm, run)
    host = socket.gethostname()
    about_me = {
        "host": host,
        "local_rank": launch.local_rank,
        "cpus": sorted(cpu_affinity()),
        "digest": digest,
        "version": f"allranks {allranks.__version__}, torch {torch.__version__}",
        "error": str(error) if error else None,
    }
    place = meeting.settle(about_me, _places)
    assert config is not None  # an error of this rank was raised by settle()
    runtime_error: UserError | None = None
    try:
        device, identity = _pick_device(config, place)
        _check_precision(config.trainer.precision, device)
        use_ezpz = ezpz.chosen(config.runtime, launch.rank)
        watch = watchdog.prepare(one_host=place["hosts"] == 1) if meeting.world_size > 1 else None
    except UserError as problem:
        runtime_error, identity, watch = problem, "", None
    mine = {
        "host": host,
        "pid": os.getpid(),
        "error": str(runtime_error) if runtime_error else None,
        "device": identity,
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
        launch, meeting, watchdog, device, "ezpz" if use_ezpz else "native", place["local_rank"],
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
        usual = max(dict.fromkeys(values), key=values.count)
        odd = [r for r, value in enumerate(values) if value != usual]
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
    identity = str(getattr(backend.get_device_properties(index), "uuid", ""))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("ZE_AFFINITY_MASK", "")
    return torch.device(name, index), identity or f"{platform.node()}/{visible}/{index}"


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
