"""One Runtime per rank: who am I, which device, and the few collectives that a training needs.

Everything here works at world size 1 as well, so that nobody else asks whether the run is distributed.
bringup.py makes the Runtime. A collective is a call that returns only when every rank has made it.
"""

from __future__ import annotations

import functools
import logging
import socket
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

from allranks.base.errors import UserError
from allranks.config import ShardingConfig
from allranks.job.identity import RankIdentity
from allranks.runtime import gradients, mpi, native, sharding
from allranks.runtime.meeting import Meeting
from allranks.runtime.settling import settle_at_first_batch
from allranks.runtime.watch.progress import Progress
from allranks.runtime.watch.thread import Watchdog

log = logging.getLogger(__name__)

ENDED_BY_ANOTHER_S = 20.0  # a rank that waits to be ended by another one ends by itself after so long
MOST_BYTES_AT_ONCE = 1 << 30  # MPI counts the elements of a message in 32 bits
UNUSED_IN_TRAINER = "trainer.unused_parameters=always"  # what allows parameters that take no part


@functools.cache
def has_float64(device: torch.device) -> bool:
    """Whether the device computes with float64. Apple's GPUs do not, nor do some of Intel's."""
    if device.type == "xpu":
        return bool(getattr(torch.xpu.get_device_properties(device), "has_fp64", True))
    return device.type != "mps"


@dataclass(frozen=True)
class RankFacts:
    """One rank of a run."""

    rank: int
    host: str
    pid: int
    local_rank: int
    device: str  # a name for the physical device: ranks of one host that have the same name share it
    cpus: str = ""  # on which it may run, such as `0-7,16`
    boot_id: str | None = None  # the boot id of the host's kernel: two hosts may have the same name

    @property
    def host_identity(self) -> tuple[str, str | None]:
        """Equal for two ranks that are on one host."""
        return self.host, self.boot_id

    def to_json(self) -> dict[str, Any]:
        """The facts as environment.json lists them."""
        values = asdict(self)
        del values["boot_id"]
        return values


@dataclass
class Runtime:
    """What a rank knows about itself, and how it works with the others."""

    identity: RankIdentity
    meeting: Meeting
    watchdog: Watchdog
    device: torch.device
    kind: str  # what has made the process group: "ezpz" or "native"
    local_rank: int
    local_world_size: int
    threads: int
    ranks: list[RankFacts]  # all ranks; known to rank 0 only
    comm: Any = None  # MPI.COMM_WORLD where collectives on CPU go through MPI
    virtual_ranks: int | None = None  # the fixed number of shares of a reproducible run

    @property
    def progress(self) -> Progress:
        """Where the training says how far it has come; the watchdog reads it."""
        return self.watchdog.progress

    @property
    def rank(self) -> int:
        """This rank's number among all ranks of the run, from 0."""
        return self.meeting.rank

    @property
    def world_size(self) -> int:
        """The number of ranks of the run."""
        return self.meeting.world_size

    @property
    def host(self) -> str:
        """The name of the host that this rank runs on."""
        return socket.gethostname()

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes and speaks for all."""
        return self.rank == 0

    @property
    def share_count(self) -> int:
        """Into how many shares each batch is cut."""
        return self.virtual_ranks or self.world_size

    @property
    def shares(self) -> range:
        """The shares of each batch that this rank takes: one, or several neighbouring ones where the number
        of shares is fixed."""
        mine = self.share_count // self.world_size
        return range(self.rank * mine, (self.rank + 1) * mine)

    @property
    def sum_dtype(self) -> torch.dtype:
        """The type in which sums are kept on the device: float64, or float32 where it has only that."""
        return torch.float64 if has_float64(self.device) else torch.float32

    @property
    def collectives(self) -> str:
        """What carries tensors from rank to rank: `mpi`, a backend of torch, or `none` for a lone rank."""
        if self.world_size == 1:
            return "none"
        return "mpi" if self.comm is not None else dist.get_backend()

    def wrap(
        self, model: torch.nn.Module, has_unused: bool = False, remedy: str = UNUSED_IN_TRAINER
    ) -> torch.nn.Module:
        """The model in DDP, whose gradient is the *sum* over the ranks: the engine weights each example.

        DDP's own mean would be right only for equal shares, which 128 examples over 12 ranks are not. A
        lone rank needs no DDP, and a reproducible run adds up in an order of its own
        (gradients.OrderedSum). `has_unused`: some parameters may take no part in a step, on some ranks or
        on all. DDP then looks for them in each step. A parameter that no rank has used keeps no gradient.
        If they take no part unexpectedly, a UserError names `remedy`, which is what allows it.
        """
        if self.world_size == 1 or self.virtual_ranks:
            return model
        self.progress.arrive()  # DDP compares the ranks' parameters
        wrapped = native.wrap(model, self.device, has_unused)
        if not has_unused:  # otherwise DDP packs its buckets only once
            settle_at_first_batch(wrapped, self.device, lambda: self.check_summed(wrapped, remedy))
        if next(model.buffers(), None) is not None:
            # DDP sends rank 0's buffers to all ranks before each forward pass: a collective.
            wrapped.register_forward_pre_hook(lambda *_: self.progress.arrive(in_step=False))
        gradients.add_up_over_ranks(wrapped, self.progress, self.comm)
        return wrapped

    def shard(
        self,
        make: Callable[[], torch.nn.Module],
        settings: ShardingConfig,
        name: str,
        dtype: torch.dtype | None = None,
        check: Callable[[torch.nn.Module], None] = lambda model: None,
    ) -> torch.nn.Module:
        """The model that `make` builds, spread over the ranks; its gradient is the sum over the ranks.

        All ranks call; there are several. The arguments are those of sharding.shard(). A model that is
        built already is spread by `make=lambda: model`, but then each rank has held all of it.
        """
        return sharding.shard(make, settings, self, name, dtype, check)

    def check_summed(self, model: torch.nn.Module, remedy: str = UNUSED_IN_TRAINER) -> bool:
        """Whether the backward pass just made has added up the model's gradients over the ranks.

        `model` is what wrap() has returned. This is called after each backward pass whose gradients are
        added up over the ranks. Raises UserError, on this rank, where only some parameters took part in it.
        `remedy` is what lets parameters take no part.
        """
        is_summed = gradients.is_summed(model)
        names = gradients.left_out(model)
        if not names:
            return is_summed
        # Several ranks may find that in the same step. The first one speaks, and ends all ranks.
        if not self.meeting.is_first("parameters left out"):
            time.sleep(ENDED_BY_ANOTHER_S)
        raise UserError(
            f"{names} took no part in a step on rank {self.rank}, and the other ranks wait for their "
            f"gradients: start the run again with {remedy}; it goes on from its newest checkpoint, if "
            "there is one."
        )

    def without_sync(self, model: torch.nn.Module) -> AbstractContextManager[None]:
        """A context in which backward() adds up gradients on this rank only."""
        return getattr(model, "no_sync", nullcontext)()

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sums a contiguous tensor over all ranks, in place."""
        self.progress.arrive()
        if self.comm is not None:
            mpi.allreduce(self.comm, tensor)
        elif self.world_size > 1:
            dist.all_reduce(tensor)
        return tensor

    def add_up(self, values: Sequence[float]) -> list[float]:
        """The sums of these numbers over all ranks."""
        return self.sum(torch.tensor(values, dtype=self.sum_dtype, device=self.device)).tolist()

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """[n, k] of each rank -> [world_size * n, k], in the order of the ranks, on every rank."""
        if self.world_size == 1:
            return rows
        self.progress.arrive()
        rows = rows.contiguous()
        if self.comm is not None:
            everyones = rows.new_empty(self.world_size, *rows.shape)
            mpi.gather(self.comm, rows, everyones)
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
                for piece in bytes_on_device.split(MOST_BYTES_AT_ONCE):
                    self.broadcast(piece)
                content = bytearray(bytes_on_device.cpu().numpy().tobytes())
            shared[name] = bytes(content)
        return shared

    def broadcast(self, tensor: torch.Tensor) -> torch.Tensor:
        """Rank 0's contiguous tensor on every rank, in place."""
        self.progress.arrive()
        if self.comm is not None:
            mpi.broadcast(self.comm, tensor)
        elif self.world_size > 1:
            dist.broadcast(tensor, src=0)
        return tensor

    def share_buffers(self, model: torch.nn.Module) -> None:
        """Rank 0's buffers of this model on every rank; all ranks call.

        In training each rank's BatchNorm layers gather statistics of that rank's examples.
        """
        if self.world_size == 1:
            return
        for buffer in model.buffers():
            content = buffer.detach().to(self.device).contiguous()
            buffer.copy_(self.broadcast(content))

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

    def autocast(self, precision: str) -> AbstractContextManager[Any]:
        """The mixed-precision context of `trainer.precision`."""
        if precision in ("fp64", "fp32"):
            return nullcontext()
        dtype = torch.bfloat16 if precision == "bf16" else torch.float16
        return torch.autocast(self.device.type, dtype=dtype)

    def describe(self) -> dict[str, Any]:
        """For environment.json; only rank 0 can list the ranks."""
        return {
            "launcher": self.identity.launcher,
            "runtime": self.kind,
            "collectives": self.collectives,
            "world_size": self.world_size,
            "threads_per_rank": self.threads,
            "ranks": [facts.to_json() for facts in self.ranks],
        }

    def close(self) -> None:
        """Takes leave of the other ranks, at a run's end that all of them know of."""
        self.watchdog.close()
        if self.world_size > 1:
            if dist.is_initialized():
                dist.destroy_process_group()
            self.meeting.leave()
