"""A training's state to bytes and back. Which folder the bytes are in is run/checkpoint.py's matter.

Tensors go to safetensors files, and all else to state.json. Neither can hold code, so loading a checkpoint
runs none.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

import allranks
from allranks import config as configs
from allranks.base.errors import UserError
from allranks.base.text import one_line
from allranks.run import checkpoint
from allranks.run.shards import MODEL as MODEL_PART
from allranks.run.shards import OPTIMIZER as OPTIMIZER_PART
from allranks.run.shards import assembled
from allranks.runtime.runtime import Runtime
from allranks.runtime.sharding import whole
from allranks.training import shards
from allranks.training.position import TrainingPosition
from allranks.training.training import Training

MODEL = "model.safetensors"
OPTIMIZER = "optimizer.safetensors"
STATE = "state.json"


@dataclass(frozen=True)
class Captured:
    """A training's state at one moment, copied: the training may go on while it is written."""

    tensors: Mapping[str, Mapping[str, torch.Tensor]]  # by file, then by name; all on the CPU
    state: Mapping[str, Any]  # for state.json

    def to_files(self) -> dict[str, bytes]:
        """The files of the checkpoint, by name."""
        from safetensors.torch import save

        files = {name: save(dict(tensors)) for name, tensors in self.tensors.items()}
        files[STATE] = json.dumps(self.state, separators=(",", ":")).encode()
        return files


@dataclass(frozen=True)
class KeptTraining:
    """A training as what the checkpoints of a run hold (saver.Kept).

    `decisive` holds the values that must be the same in a checkpoint and in this run
    (config.decisive_values).
    """

    training: Training
    decisive: Mapping[str, Any]
    runtime: Runtime

    @property
    def position(self) -> TrainingPosition:
        """Where the training stands."""
        return self.training.position

    def gather(self) -> torch.Tensor:
        """The running sums of all ranks; all ranks call."""
        return self.runtime.gather(self.training.sums.rows)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank saves its own slices of the model."""
        return self.training.is_sharded

    def capture(self, gathered: torch.Tensor) -> Captured:
        """A copy of the training's state; `gathered` are the running sums of all ranks."""
        return capture(self.training, gathered, self.decisive, self.runtime.world_size)

    def to_shards(self, gathered: torch.Tensor) -> shards.ToShards:
        """What this rank holds of the state, not copied; `gathered` are the running sums of all ranks."""
        world_size = self.runtime.world_size
        seen = capture(self.training, gathered, self.decisive, world_size, copied=torch.Tensor.detach)
        tensors = {MODEL_PART: seen.tensors[MODEL], OPTIMIZER_PART: seen.tensors[OPTIMIZER]}
        return shards.ToShards(tensors, seen.state)

    def restore(self, files: Mapping[str, bytes], path: str) -> None:
        """Puts the training where the training of the checkpoint `path` was; raises UserError, OSError."""
        restore(self.training, files, path, self.decisive, self.runtime)


# --- to bytes ------------------------------------------------------------------------------------------


def capture(
    training: Training,
    sums: torch.Tensor,
    decisive: Mapping[str, Any],
    world_size: int,
    copied: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Captured:
    """A copy of all that changes while a run trains.

    `sums` [share_count, columns] are the running sums of all ranks. `decisive` says which training it is
    (config.decisive_values). `copied` makes the copy of a tensor; None: a copy on the CPU. Raises UserError
    if the optimizer's or scheduler's state cannot be saved.
    """
    schedule = training.schedule.scheduler
    beside_the_model: dict[str, torch.Tensor] = {}  # the tensors of optimizer, scheduler and scaler
    state = {
        **of_any_training(training.position, decisive, world_size),
        "epoch_lr": training.epoch_lr,
        "sums": sums.tolist(),
        **{
            name: taken_apart(saved, name, beside_the_model, copied)
            for name, saved in (
                ("optimizer", training.optimizer.state_dict()),
                ("scheduler", schedule.state_dict() if schedule else {}),
                ("scaler", training.scaler.state_dict()),
            )
        },
    }
    buffers = changed_buffers(training.model, training.first_buffers)
    if buffers:  # most models have none
        state["buffers"] = taken_apart(buffers, "buffer", beside_the_model, copied)
    model = {name: (copied or copy_on_cpu)(tensor) for name, tensor in training.model.state_dict().items()}
    return Captured({MODEL: model, OPTIMIZER: beside_the_model}, state)


def buffers_left_out(model: nn.Module) -> dict[str, torch.Tensor]:
    """The buffers that the model's state_dict leaves out, being registered with persistent=False."""
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name not in saved}


def first_buffers(model: nn.Module) -> dict[str, torch.Tensor]:
    """A copy of the buffers that the state_dict leaves out, as the model's constructor has made them."""
    return {name: buffer.clone() for name, buffer in buffers_left_out(model).items()}


def changed_buffers(model: nn.Module, first: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The buffers of buffers_left_out() that are not any more as in `first` (first_buffers()).

    The others are made by the constructor again when a run goes on.
    """
    return {
        name: buffer
        for name, buffer in buffers_left_out(model).items()
        if name not in first or not torch.equal(buffer, first[name])
    }


def of_any_training(
    position: TrainingPosition, decisive: Mapping[str, Any], world_size: int
) -> dict[str, Any]:
    """What state.json holds of every training: where it stands, what it is, and what has made it."""
    return {
        "epoch": position.epoch,
        "step": position.step,
        "steps_in_epoch_done": position.epoch_steps,
        "epoch_s": position.epoch_s,
        "history": list(position.history),
        "world_size": world_size,
        "identity": decisive,
        "versions": {"allranks": allranks.__version__, "torch": torch.__version__},
    }


def can_be_saved(tensor: torch.Tensor) -> bool:
    """Whether safetensors has a name for the tensor's type, and the tensor is not a sparse one."""
    has_name = not tensor.is_quantized and tensor.dtype not in (torch.complex128, torch.complex32)
    return has_name and tensor.layout is torch.strided


def why_not_saved(tensor: torch.Tensor) -> str:
    """What is in the way where can_be_saved() says no: to be put behind `NAME is`."""
    if tensor.layout is not torch.strided:
        layout = str(tensor.layout).removeprefix("torch.")
        return f"a tensor in the layout {layout}, which a checkpoint cannot hold: hold it as a dense one."
    return f"a tensor of {tensor.dtype}, a type that a checkpoint cannot hold."


def copy_on_cpu(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of the tensor alone, row by row in the host's memory."""
    return tensor.detach().to("cpu", copy=True).contiguous()


def taken_apart(
    node: Any,
    name: str,
    tensors: dict[str, torch.Tensor],
    copied: Callable[[torch.Tensor], torch.Tensor] | None = None,
) -> Any:
    """JSON for what a state_dict holds. Its tensors go to `tensors`, by names that the JSON refers to.

    `name` says where in the state_dict the node stands.
    """
    if node is None or isinstance(node, bool | int | float | str):
        return node
    if isinstance(node, torch.Tensor):
        if not can_be_saved(node):
            raise UserError(f"{name} is {why_not_saved(node)}")
        if name in tensors:
            raise UserError(f"The state has two tensors named {name}: rename one of them.")
        tensors[name] = (copied or copy_on_cpu)(node)
        return {"tensor": name}
    if isinstance(node, list | tuple):
        items = [taken_apart(item, f"{name}.{i}", tensors, copied) for i, item in enumerate(node)]
        return {"tuple": items} if isinstance(node, tuple) else items
    if isinstance(node, Mapping):
        # As pairs: JSON would turn keys that are numbers into texts.
        prefix = f"{name}." if name else ""
        pairs = [
            [_as_json_key(k, name), taken_apart(v, f"{prefix}{k}", tensors, copied)]
            for k, v in node.items()
        ]
        return {"items": pairs}
    raise UserError(
        f"{name} is a {type(node).__name__}, but a checkpoint holds only numbers, texts and tensors."
    )


def _as_json_key(key: Any, name: str) -> Any:
    """The key of a dict as JSON holds it; raises UserError for a key that could not be put together again.

    `name` says where the dict stands.
    """
    if key is None or isinstance(key, bool | int | float | str):
        return key
    if isinstance(key, np.integer):  # equal to the number that comes back, also as a key
        return int(key)
    if isinstance(key, tuple):
        return [_as_json_key(part, name) for part in key]
    raise UserError(
        f"{name or 'The state'} has a {type(key).__name__} as a key of a dict: give numbers, texts, or "
        "tuples of these."
    )


# --- and back ------------------------------------------------------------------------------------------


def restore(
    training: Training, files: Mapping[str, bytes], path: str, decisive: Mapping[str, Any], runtime: Runtime
) -> None:
    """Puts the training where the training of the checkpoint was; `path` names the checkpoint in messages.

    `decisive` says which training this is (config.decisive_values). Raises UserError if the checkpoint
    is that of another training, or not one that allranks has made.
    """
    with of_this_format(path):
        if not training.is_sharded:
            files = assembled(files)
        state = checkpoint.from_json(STATE, files[STATE])
        check_counters(state)
        _check_that_it_fits(state, path, decisive, runtime.world_size)
        _restore_components(training, state, files, path)
        restore_position(training.position, state)
        training.epoch_lr = state["epoch_lr"]
        _restore_sums(training, state["sums"], runtime)


def restore_model(model: nn.Module, files: Mapping[str, bytes], path: str) -> dict[str, Any]:
    """Puts a checkpoint's weights and buffers into the model alone, for use; returns what state.json holds.

    `path` names the checkpoint in messages. Raises UserError if the checkpoint is of another model, or
    not one that allranks has made.
    """
    with of_this_format(path):
        files = assembled(files)
        state = checkpoint.from_json(STATE, files[STATE])
        check_counters(state)
        weights = load(files[MODEL])
        saved = state.get("buffers", {"items": []})
        buffers = put_together(saved, load(files[OPTIMIZER])) if saved["items"] else {}
    try:
        model.load_state_dict(weights)
        restore_buffers(model, buffers)
    except (RuntimeError, ValueError, KeyError, AttributeError) as error:
        raise UserError(
            f"{path} does not fit the model that the run's config.yaml describes ({one_line(error)}): "
            "where the model is your own, its code has changed since. Use the code of the training."
        ) from error
    assert isinstance(state, dict)
    return state


@contextmanager
def of_this_format(path: str) -> Iterator[None]:
    """Raises UserError if the block finds that the checkpoint `path` is not as allranks saves one."""
    try:
        yield
    except (KeyError, TypeError, ValueError, AttributeError, checkpoint.Damaged) as error:
        what = f"{type(error).__name__}: {one_line(error)}"
        raise UserError(
            f"{path} does not hold what this version saves ({what}): give a checkpoint that allranks "
            "has made."
        ) from error


def check_counters(state: Mapping[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError where the state's numbers make no sense as a training's."""
    for name in ("epoch", "step", "steps_in_epoch_done", "world_size"):
        if type(state[name]) is not int or state[name] < 0:
            raise ValueError(f"{name} is {ascii(state[name])[:40]}")
    for name in ("epoch_s", "epoch_lr"):
        if type(state[name]) not in (int, float) or not 0 <= state[name] < math.inf:
            raise ValueError(f"{name} is {ascii(state[name])[:40]}")
    history = state["history"]
    if not isinstance(history, list) or len(history) != state["epoch"]:
        raise ValueError(f"history does not have {state['epoch']} epochs")
    for epoch in history:
        if type(epoch["step"]) is not int:
            raise ValueError("an epoch of history has no step")
    if len({len(row) for row in state["sums"]}) > 1:
        raise ValueError("the rows of sums do not have the same number of columns")


def _check_that_it_fits(
    state: Mapping[str, Any], path: str, decisive: Mapping[str, Any], world_size: int
) -> None:
    """Raises UserError if a run with these decisive values cannot go on from the checkpoint's state."""
    epochs = decisive["trainer.epochs"]
    there = configs.with_new_keys(state["identity"])
    schedule = [value for key, value in decisive.items() if key.startswith("scheduler.")]
    why = ""
    if "length" not in schedule:  # else the run's length decides every learning rate
        there = {**there, "trainer.epochs": epochs}
    elif there.get("trainer.epochs") != epochs:
        why = " The learning rates of this schedule follow from the length of the whole run."
    if differing := configs.differing(there, decisive):
        raise UserError(f"{path} is a checkpoint of another training: {differing}.{why}")
    if epochs < state["epoch"]:
        raise UserError(
            f"{path} has {state['epoch']} epochs behind it already: give more than trainer.epochs={epochs}."
        )
    per_rank = decisive["trainer.per_rank_batch_size"]
    if per_rank and state["world_size"] != world_size:
        raise UserError(
            f"{path} was made by {state['world_size']} ranks with trainer.per_rank_batch_size={per_rank}: "
            f"start as many ranks, not {world_size}, or the batches would be others."
        )


def _restore_components(
    training: Training, state: Mapping[str, Any], files: Mapping[str, bytes], path: str
) -> None:
    """Model, optimizer, scheduler and scaler.

    A model that is spread over the ranks is read from the checkpoint's folder, each rank its own rows.
    """
    try:
        if training.is_sharded:
            source = shards.source_of(path, files)
            weights: Mapping[str, torch.Tensor] = shards.weights_like(training.model, source)
            tensors: Mapping[str, torch.Tensor] = shards.OptimizerTensors(training.optimizer, source)
        else:
            weights = load(files[MODEL])
            tensors = load(files[OPTIMIZER])
        training.model.load_state_dict(weights)
        restore_optimizer(training.optimizer, put_together(state["optimizer"], tensors))
        restore_buffers(training.model, put_together(state.get("buffers", {"items": []}), tensors))
    except (RuntimeError, ValueError, KeyError) as error:
        what = f"{path} does not fit the model and optimizer of this run"
        raise UserError(f"{what}: {one_line(error)}") from error
    if training.schedule.scheduler is not None:
        training.schedule.scheduler.load_state_dict(put_together(state["scheduler"], tensors))
    training.scaler.load_state_dict(put_together(state["scaler"], tensors))


def restore_optimizer(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """load_state_dict() that leaves every tensor of the state in the type in which it was saved.

    torch's own casts them to the type of their parameter. NAdam, for one, keeps a float32 number for each
    float64 parameter, and would go on with other bits.
    """
    optimizer.load_state_dict(dict(saved))
    for group, saved_group in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        for parameter, number in zip(group["params"], saved_group["params"], strict=True):
            if number in saved["state"]:
                loaded = optimizer.state[parameter]
                optimizer.state[parameter] = _as_saved(loaded, saved["state"][number], parameter)


def _as_saved(loaded: Any, saved: Any, parameter: torch.Tensor) -> Any:
    """The state of a parameter with each tensor in its saved type, and in memory as the parameter is.

    A checkpoint holds all tensors row by row. The kernels of fused optimizers go through the memory of
    parameter, gradient and state in one order, and take it for the same order without looking.
    """
    if isinstance(loaded, torch.Tensor) and isinstance(saved, torch.Tensor):
        tensor = loaded if loaded.dtype == saved.dtype else saved.to(loaded.device)
        if tensor.shape == parameter.shape and tensor.stride() != parameter.stride():
            tensor = torch.empty_like(parameter, dtype=tensor.dtype, device=tensor.device).copy_(tensor)
        return tensor
    if isinstance(loaded, dict) and isinstance(saved, dict):
        return {key: _as_saved(value, saved.get(key), parameter) for key, value in loaded.items()}
    if isinstance(loaded, list | tuple) and isinstance(saved, list | tuple) and len(loaded) == len(saved):
        pairs = zip(loaded, saved, strict=True)
        return type(saved)(_as_saved(mine, theirs, parameter) for mine, theirs in pairs)
    return loaded


def restore_buffers(model: nn.Module, saved: Mapping[str, torch.Tensor]) -> None:
    """Puts back the buffers that the model's state_dict leaves out."""
    for name, tensor in saved.items():
        owner, _, leaf = name.rpartition(".")
        module = model.get_submodule(owner)
        if leaf not in module._buffers:
            raise KeyError(f"the model has no buffer {name}")
        # A buffer that is None until the model is used has no device: then it goes to that of the weights.
        # A module may have no weights at all.
        replaced = module._buffers[leaf]
        device_of = next(model.parameters(), tensor) if replaced is None else replaced
        setattr(module, leaf, tensor.to(device_of.device))


def restore_position(position: TrainingPosition, state: Mapping[str, Any]) -> None:
    """Puts back where a training stands, from what state.json holds."""
    position.epoch = state["epoch"]
    position.step = state["step"]
    position.epoch_steps = state["steps_in_epoch_done"]
    position.epoch_s = state["epoch_s"]
    position.history = state["history"]


def _restore_sums(training: Training, rows: Any, runtime: Runtime) -> None:
    """The running sums of this rank's shares, from those of all shares, [share_count, columns].

    Raises UserError if the task has measured another number of metrics then.
    """
    sums = torch.tensor(rows, dtype=training.sums.rows.dtype)
    columns = training.sums.rows.shape[1]
    if sums.shape[1] != columns:
        raise UserError(
            f"The checkpoint holds {sums.shape[1]} sums for each share, and the task makes {columns} of "
            "its loss, its metrics and their counts: its code has changed since. Use the code of then."
        )
    if len(sums) == runtime.share_count:
        mine = sums[runtime.shares.start : runtime.shares.stop]
    else:  # saved by another number of ranks: rank 0 goes on from the total, the others from nothing
        mine = torch.zeros_like(training.sums.rows, device="cpu")
        if runtime.rank == 0:
            mine[0] = sums.sum(dim=0)
    training.sums.rows.copy_(mine)


def load(content: bytes) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except SafetensorError as error:
        raise KeyError(error) from error


def put_together(node: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    """The state_dict that taken_apart() has turned into JSON and tensors."""
    if isinstance(node, list):
        return [put_together(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "tuple" in node:
        return tuple(put_together(item, tensors) for item in node["tuple"])
    return {_from_json_key(key): put_together(value, tensors) for key, value in node["items"]}


def _from_json_key(key: Any) -> Any:
    """The key of a dict: JSON has made lists of tuples."""
    return tuple(_from_json_key(part) for part in key) if isinstance(key, list) else key


# --- one number for all weights ------------------------------------------------------------------------


def weights_sha256(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all weights and buffers, in the order of names.

    If the model is spread over the ranks, all ranks call: they put one weight together at a time.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = whole(tensor).detach().cpu().contiguous()
        digest.update(f"{name} {flat.dtype} {list(flat.shape)}\n".encode())
        digest.update(flat.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
