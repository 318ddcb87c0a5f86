"""Spreads a model over the ranks: each holds a part of every weight, gradient and optimizer state (FSDP2).

With DDP every rank holds all of a model, and of its optimizer's state. If that is too much for one
device, torch's fully_shard() cuts each weight into as many slices as there are ranks. Right before a block
of the model computes, its ranks send each other their slices, and afterwards each keeps its own slice only.
So at any time a rank holds its slices and a block or two.

    model = sharding.shard(Net, settings, runtime, "Net")

The weights have the numbers that they have without sharding: they follow from the seed. Each block is made
when it is its turn to be cut (deferred.py), so no rank ever holds all of them. Gradients are added up over
the ranks, as everywhere here, and not averaged.

A slice is a torch DTensor: a tensor that knows its shape as a whole, and which part of it this rank has.
torch.distributed.fsdp is imported only here, and only where a model is spread: that takes a second.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from allranks.base.errors import UserError
from allranks.base.text import did_you_mean, some
from allranks.config import ShardingConfig

if TYPE_CHECKING:
    from allranks.runtime.deferred import Deferred

# The ranks, as a runtime.runtime.Runtime. That module imports this one, so this one does not import it.
Runtime = Any

log = logging.getLogger(__name__)

# Since this version of torch FSDP can be told to add up gradients, which works with every backend.
NEEDED = "2.8"
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_M_MMAP_THRESHOLD = -3  # the number of this setting in glibc's malloc.h
# Memory in pieces of at least this size goes back to the system: the smallest deferred tensor has so much.
_GIVEN_BACK_BYTES = 1 << 18
_LISTS = (nn.ModuleList, nn.Sequential)  # their large members are blocks, unless the user names the blocks
_NOT_CALLED = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)


# --- slices --------------------------------------------------------------------------------------------


def is_sharded(tensor: torch.Tensor) -> bool:
    """Whether this rank holds a slice of the tensor only."""
    module = sys.modules.get("torch.distributed.tensor")  # without it there are no such tensors
    return module is not None and isinstance(tensor, module.DTensor)


def has_slices(model: nn.Module) -> bool:
    """Whether the model is spread over the ranks."""
    return any(is_sharded(parameter) for parameter in model.parameters())


def local(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's slice of a tensor; all of a tensor that is not spread."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor that is spread, on every rank; all ranks call."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


class Slice(NamedTuple):
    """Which part of a tensor a rank holds: the rows from `start` to `end`, along its first dimension."""

    start: int
    end: int
    is_first_copy: bool  # False where a rank of another node holds the same rows, and comes before this one


def slice_of(tensor: torch.Tensor) -> Slice:
    """The rows that this rank holds of a tensor that is spread."""
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh = tensor.device_mesh  # type: ignore[attr-defined]
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, mesh, tensor.placements)  # type: ignore[attr-defined]
    is_first_copy = mesh.ndim == 1 or mesh.get_local_rank(0) == 0
    rows = shape[0] if shape else 1
    return Slice(offset[0], offset[0] + rows, is_first_copy)


def like(tensor: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """A tensor that is spread as `tensor` is, of which this rank holds `rows`."""
    from torch.distributed.tensor import DTensor

    made: torch.Tensor = DTensor.from_local(
        rows, tensor.device_mesh, tensor.placements, run_check=False,  # type: ignore[attr-defined]
        shape=tensor.shape, stride=tensor.stride(),
    )  # fmt: skip
    return made


# --- spreading a model ---------------------------------------------------------------------------------


def is_wanted(settings: ShardingConfig, runtime: Runtime) -> bool:
    """Whether a model is to be spread. A lone rank has nobody to spread it to."""
    return settings.kind != "none" and runtime.world_size > 1


def shard(
    make: Callable[[], nn.Module],
    settings: ShardingConfig,
    runtime: Runtime,
    model_is: str,
    dtype: torch.dtype | None = None,
    check: Callable[[nn.Module], None] = lambda model: None,
) -> nn.Module:
    """The model that `make` builds, spread over the ranks; all ranks call.

    `make` draws the first weights from torch's generator, which stands the same on all ranks. `model_is`
    names the model in messages. Floating-point weights get the type `dtype`, unless that is None. `check`
    is called with the model before its weights are made. Raises UserError if it cannot be spread.
    """
    from allranks.runtime.deferred import build

    fully_shard, policy_of = _fsdp()
    _give_memory_back()
    runtime.progress.arrive(in_step=False)
    mesh = _mesh(settings, runtime)

    model, deferred, why = build(make)
    if deferred is None:
        log.warning(
            "%s cannot be built one block after the other (%s): each rank builds all of it first, and "
            "needs the memory for that", model_is, why,
        )  # fmt: skip
    check(model)
    _refuse_scalars(model, model_is)
    blocks = blocks_of(model, settings, model_is)
    _refuse_shared(model, blocks, model_is)

    policy = policy_of(
        param_dtype=_DTYPES.get(settings.param_dtype or ""),
        reduce_dtype=_DTYPES.get(settings.reduce_dtype or ""),
    )
    made = _Made(deferred, runtime.device, dtype)
    for module in [*blocks, model]:
        made.fill(module)
        if module is not model and settings.activation_checkpointing:
            _compute_again(module)
        # By default the outermost module would stay gathered after a forward pass. Then its weights would
        # be slices at some times and whole at others, and a checkpoint could not tell.
        fully_shard(module, mesh=mesh, mp_policy=policy, reshard_after_forward=True)
        _add_up(module)
        # Before FSDP's own hook, in which the ranks send each other their slices: the watchdog looks for
        # the rank that has not come to a collective.
        module.register_forward_pre_hook(lambda *_: runtime.progress.arrive(in_step=False), prepend=True)
    return model


def _fsdp() -> tuple[Any, Any]:
    """torch's fully_shard and MixedPrecisionPolicy; raises UserError where this torch is too old."""
    try:
        from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
    except ImportError:
        supported = False
    else:
        supported = hasattr(FSDPModule, "set_force_sum_reduction_for_comms")
    if not supported:
        raise UserError(
            f"sharding needs PyTorch {NEEDED} or newer, and this is {torch.__version__}: take "
            "sharding=none, or install a newer one."
        )
    return fully_shard, MixedPrecisionPolicy


def _give_memory_back() -> None:
    """Makes this process give memory back to the system as soon as a large tensor is gone.

    glibc keeps freed memory for later use, unless the piece was larger than a threshold, which glibc itself
    raises up to 32 MB. Here blocks are made and freed in each step, so the memory that glibc keeps would be
    several times the memory in use. Without glibc nothing is done.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, _GIVEN_BACK_BYTES)


def _add_up(module: Any) -> None:
    """Makes FSDP add up the gradients of this block over the ranks. By itself FSDP takes their mean."""
    module.set_gradient_divide_factor(1.0)
    # Otherwise FSDP would multiply by the factor within the collective, which only NCCL can do.
    module.set_force_sum_reduction_for_comms(True)


def _mesh(settings: ShardingConfig, runtime: Runtime) -> Any:
    """The ranks in a row, or in a table of nodes x devices; raises UserError where none can be made."""
    from torch.distributed.device_mesh import init_device_mesh

    kind = runtime.device.type
    if settings.kind == "fsdp":
        return init_device_mesh(kind, (runtime.world_size,), mesh_dim_names=("devices",))

    def decide(sizes: list[int]) -> list[int]:
        """`sizes`: of each rank, how many ranks its node has."""
        devices = settings.devices or sizes[0]
        if settings.devices is None and len(set(sizes)) > 1:
            raise UserError(
                f"sharding=hybrid: the nodes have from {min(sizes)} to {max(sizes)} ranks: start as many "
                "on each, or give sharding.devices."
            )
        if len(sizes) % devices or devices == 1 or devices == len(sizes):
            raise UserError(
                f"sharding=hybrid with {len(sizes)} ranks, of which {devices} hold a model together: give "
                f"a sharding.devices that divides {len(sizes)} and leaves several groups of several ranks, "
                "or take sharding=fsdp."
            )
        return [devices] * len(sizes)

    devices = runtime.meeting.settle(runtime.local_world_size, decide)
    shape = (runtime.world_size // devices, devices)
    return init_device_mesh(kind, shape, mesh_dim_names=("nodes", "devices"))


# --- blocks --------------------------------------------------------------------------------------------


def blocks_of(model: nn.Module, settings: ShardingConfig, model_is: str) -> list[nn.Module]:
    """The modules that are spread one by one, the inner ones first; raises UserError for a wrong name.

    They are those whose class is named in `settings.blocks`. Without names they are the large members of
    each ModuleList and Sequential, such as the layers of a transformer.
    """
    if settings.blocks is None:
        return list(_large_members(model, settings.min_parameters))
    modules = [module for module in model.modules() if module is not model]
    known = {type(module).__name__ for module in modules}
    for name in settings.blocks:
        if name not in known:
            raise UserError(
                f"sharding.blocks: {model_is} has no module of a class {name}. It has "
                f"{some(sorted(known))}.{did_you_mean(name, sorted(known))}"
            )
    for module in modules:
        if type(module).__name__ in settings.blocks and isinstance(module, _NOT_CALLED):
            raise UserError(
                f"sharding.blocks: a {type(module).__name__} of {model_is} holds modules or weights, but "
                "computes nothing itself, and a block is gathered right before it computes: name the class "
                "of the modules in it, or leave sharding.blocks out."
            )
    # modules() gives a module before those inside it.
    return [module for module in reversed(modules) if type(module).__name__ in settings.blocks]


def _large_members(module: nn.Module, least: int) -> Iterator[nn.Module]:
    for child in module.children():
        is_large = sum(parameter.numel() for parameter in child.parameters()) >= least
        if is_large and isinstance(module, _LISTS) and not isinstance(child, _NOT_CALLED):
            yield child
        else:
            yield from _large_members(child, least)


def _refuse_scalars(model: nn.Module, model_is: str) -> None:
    """Raises UserError if a parameter has no dimension along which it could be cut."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 0:
            raise UserError(
                f"{model_is}: the parameter {name} is a single number without a dimension, which cannot be "
                "spread over the ranks: give it the shape [1], or take sharding=none."
            )


def _refuse_shared(model: nn.Module, blocks: Sequence[nn.Module], model_is: str) -> None:
    """Raises UserError if one weight stands in two blocks, of which each would cut it by itself."""
    owners: dict[int, tuple[nn.Module, str]] = {}  # from a parameter to its block, and its name there
    named = dict(model.named_modules(remove_duplicate=False))
    for path, module in named.items():
        block = model
        parts = path.split(".")
        for end in range(len(parts), 0, -1):
            above = named[".".join(parts[:end])]
            if any(above is each for each in blocks):
                block = above
                break
        for leaf, parameter in module.named_parameters(recurse=False):
            name = f"{path}.{leaf}" if path else leaf
            owner, first = owners.setdefault(id(parameter), (block, name))
            if owner is not block:
                raise UserError(
                    f"{model_is}: {first} and {name} are one weight, but stand in two blocks that are "
                    "spread one by one: give sharding.blocks that leave both outside of any block, or "
                    "inside of one, or take sharding=none."
                )


def _compute_again(block: nn.Module) -> None:
    """Makes the block compute its activations again in the backward pass, instead of keeping them."""
    from torch.utils.checkpoint import checkpoint

    block.forward = functools.partial(checkpoint, block.forward, use_reentrant=False)


# --- making the weights --------------------------------------------------------------------------------


class _Made:
    """Makes the weights and buffers of one block after the other, on the device and in their type."""

    def __init__(self, deferred: Deferred | None, device: torch.device, dtype: torch.dtype | None) -> None:
        self._deferred = deferred
        self._device = device
        self._dtype = dtype

    def fill(self, block: nn.Module) -> None:
        """Makes what the block has that is not made or spread yet; raises UserError where that fails."""
        from allranks.runtime.deferred import CannotDefer

        made: dict[int, torch.Tensor] = {}  # one weight may stand at two places of the block
        try:
            for module in block.modules():
                for name, parameter in module._parameters.items():
                    if parameter is not None and not is_sharded(parameter):
                        module._parameters[name] = self._parameter(parameter, made)
                for name, buffer in module._buffers.items():
                    if buffer is not None:
                        module._buffers[name] = self._tensor(buffer, made)
        except CannotDefer as error:
            raise UserError(
                f"A weight of the model cannot be made by itself ({error}): take sharding=none, or another "
                "way to give it its first numbers."
            ) from error

    def _parameter(self, parameter: nn.Parameter, made: dict[int, torch.Tensor]) -> nn.Parameter:
        if id(parameter) not in made:
            # A copy row by row: FSDP takes no other order in memory.
            tensor = self._tensor(parameter, {}).contiguous()
            new = nn.Parameter(tensor, requires_grad=parameter.requires_grad)
            new.__dict__.update(parameter.__dict__)  # a user's own marks
            made[id(parameter)] = new
        found = made[id(parameter)]
        assert isinstance(found, nn.Parameter)
        return found

    def _tensor(self, tensor: torch.Tensor, made: dict[int, torch.Tensor]) -> torch.Tensor:
        if id(tensor) not in made:
            full = tensor.detach() if self._deferred is None else self._deferred.made(tensor)
            made[id(tensor)] = full.to(self._device, self._dtype if full.is_floating_point() else None)
        return made[id(tensor)]
