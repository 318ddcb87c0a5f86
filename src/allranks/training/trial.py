"""One batch tried on rank 0 before a training begins, so that what does not fit is said in one sentence.

Model, data, loss and optimizer are often a user's own, and written for another program: a model that
returns a dict, a Dataset whose images have another shape, an optimizer that needs a closure. Without this
trial the first step would end in a traceback, on all ranks at once, with a run directory made already.

Nothing of the training changes: the batch goes through a copy of the model, and all random numbers are
drawn afterwards as if there had been no trial.
"""

from __future__ import annotations

import copy
import random
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

import allranks
from allranks.base.errors import UserError
from allranks.base.text import one_line, some
from allranks.components import build
from allranks.data.loader import Data
from allranks.data.parts import Examples
from allranks.runtime.runtime import Runtime
from allranks.training.building import Recipe, build_model
from allranks.training.engine import summed_loss
from allranks.training.flops import Flops
from allranks.training.training import Training

# What libraries raise where values, types or shapes do not go together. Any other error of a user's own
# code keeps its traceback.
_MISFITS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
_SHOWN_LETTERS = 300  # of a library's message; some list every name of a model


class Tried(NamedTuple):
    """What the trial of a first batch has found."""

    # Floating-point operations of a forward and a backward pass for one example; None where they could not
    # be counted.
    flops_per_example: float | None
    unused: list[str]  # the parameters that took no part


def try_first_batch(training: Training, data: Data, recipe: Recipe, runtime: Runtime) -> Tried:
    """Tries one step on rank 0, on the first training examples; all ranks call.

    `recipe` is what the training was built from. Raises UserError, on all ranks, where data, model, loss
    and optimizer do not go together.
    """
    return Tried(*runtime.meeting.from_rank_0(lambda: _try(training, data, recipe, runtime)))


def _try(training: Training, data: Data, recipe: Recipe, runtime: Runtime) -> Tried:
    trainer = recipe.trainer
    model_is = f"model._target_={recipe.model['_target_']}"
    optimizer_is = f"optimizer._target_={recipe.optimizer['_target_']}"
    with _random_numbers_kept(runtime.device):
        examples = data.train.first(min(2, len(data.train)), recipe.seed)
        _check_shape(examples, data.input_shape)
        if any(isinstance(module, nn.SyncBatchNorm) for module in training.model.modules()):
            return Tried(None, [])  # it would wait for the other ranks
        model = _copy_of(training.model, recipe, runtime)
        model.train()
        buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}

        flops = Flops()
        with flops:
            logits = _forward(model, model_is, examples, trainer.precision, runtime)
        _check_logits(logits, model_is, examples, data.classes)
        changed = _changed(buffers, model)
        if trainer.reproducible and changed:
            raise UserError(
                f"trainer.reproducible=true does not go with {model_is}, which changes its buffer "
                f"{some(changed)} in training: that depends on how a batch is cut into shares. Take a "
                "layer without such a buffer (GroupNorm, LayerNorm), or trainer.reproducible=false."
            )
        with _told(f"{model_is}: its output has no gradient that reaches its parameters"), flops:
            summed_loss(logits, examples.labels, trainer.label_smoothing).backward()
        unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        _step(model, optimizer_is, recipe.optimizer)
        _try_one_example(model, model_is, examples, len(data.train), recipe, runtime.share_count)
        per_example = flops.count / len(examples.labels) if flops.count else None
        return Tried(per_example, unused)


@contextmanager
def _random_numbers_kept(device: torch.device) -> Iterator[None]:
    """Afterwards all generators are as they were before."""
    python = random.getstate()
    numpy = np.random.get_state()
    on_device = device.type in ("cuda", "xpu")
    kind = {"device_type": device.type} if on_device else {}
    with torch.random.fork_rng([device.index] if on_device else [], **kind):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


@contextmanager
def _told(what: str, remedy: str = "") -> Iterator[None]:
    """Raises UserError with `what`, and the error, in place of an error that says that it does not fit."""
    try:
        yield
    except UserError:
        raise
    except _MISFITS as error:
        said = one_line(error)[:_SHOWN_LETTERS].rstrip(". ")
        raise UserError(f"{what} ({type(error).__name__}{_where(error)}: {said}).{remedy}") from error


def _where(error: BaseException) -> str:
    """The innermost line of the user's own code that the error came through: " at nets.py:12"."""
    not_theirs = [str(Path(str(module.__file__)).parent) for module in (torch, allranks)]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(frame.filename.startswith(folder) for folder in (*not_theirs, "<"))
    ]
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _copy_of(model: nn.Module, recipe: Recipe, runtime: Runtime) -> nn.Module:
    """A model with the same weights. The few that Python cannot copy are built once more."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError):
        return build_model(recipe, runtime.device)


# --- what is checked -----------------------------------------------------------------------------------


def _check_shape(examples: Examples, input_shape: Sequence[int]) -> None:
    shape = list(examples.images.shape[1:])
    if shape != list(input_shape):
        raise UserError(
            f"data.train gives images of shape {shape}, but data.input_shape={list(input_shape)}: give the "
            "shape that they have."
        )


def _forward(
    model: nn.Module, model_is: str, examples: Examples, precision: str, runtime: Runtime
) -> torch.Tensor:
    images = examples.images
    taken = f"{model_is} cannot take images of shape {list(images.shape)} and type {images.dtype}"
    with _told(taken), runtime.autocast(precision):
        return model(images)


def _check_logits(logits: Any, model_is: str, examples: Examples, classes: int | None) -> None:
    """Raises UserError unless the model's output is a tensor [n, classes] that fits the labels."""
    count = len(examples.labels)
    wanted = f"one tensor of logits, [{count}, {classes or 'classes'}] for {count} examples"
    if not isinstance(logits, torch.Tensor):
        kind = type(logits).__name__
        if isinstance(logits, Mapping):
            kind += f" with {some(list(logits))}"
        raise UserError(f"{model_is} returns a {kind}, but allranks needs {wanted}.")
    if logits.dim() != 2 or len(logits) != count:
        raise UserError(
            f"{model_is} returns a tensor of shape {list(logits.shape)}, but allranks needs {wanted}."
        )
    if not logits.is_floating_point():
        raise UserError(f"{model_is} returns a tensor of {logits.dtype}, but logits are floating-point.")
    outputs = logits.shape[1]
    highest = int(examples.labels.max())
    if outputs <= highest or outputs < (classes or 0):
        raise UserError(
            f"{model_is} has {outputs} outputs, but data.classes={classes} and labels up to {highest}: "
            "labels count from 0; give data.classes and model.classes as the data has them."
        )


def _changed(before: Mapping[str, torch.Tensor], model: nn.Module) -> list[str]:
    """The names of the buffers that are not any more as they were."""
    now = dict(model.named_buffers())
    return [
        name for name, buffer in now.items() if name not in before or not torch.equal(buffer, before[name])
    ]


def _step(model: nn.Module, optimizer_is: str, section: Mapping[str, Any]) -> None:
    """One step of an optimizer of the same kind on the copy."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = build("optimizer", section, parameters)
    for group in optimizer.param_groups:
        if not isinstance(group["lr"], int | float):
            raise UserError(
                f"{optimizer_is} has a learning rate of type {type(group['lr']).__name__}: give a number."
            )
    remedy = " Take an optimizer whose step() needs nothing but the gradients."
    with _told(f"{optimizer_is} cannot take a step on this model", remedy):
        optimizer.step()


def _try_one_example(
    model: nn.Module, model_is: str, examples: Examples, length: int, recipe: Recipe, shares: int
) -> None:
    """Raises UserError where the model takes no single example, as with BatchNorm, and one will come.

    One comes where the training examples, which are `length`, do not divide evenly into batches, each
    batch into `shares`, and each share into the pieces that gradients are added up from.
    """
    batch_size = recipe.batch_size
    accumulate = recipe.trainer.accumulate
    if smallest_piece(length, batch_size, shares, accumulate) > 1:
        return
    one = Examples(examples.images[:1], examples.labels[:1])
    what = (
        f"{model_is} takes 2 examples in training, but not 1, and 1 is what is left of {length:,} training "
        f"examples in batches of {batch_size}, each cut into shares={shares} and "
        f"trainer.accumulate={accumulate} pieces"
    )
    remedy = " Give a trainer.batch_size that leaves more, or take GroupNorm in place of BatchNorm."
    with _told(what, remedy):
        model(one.images)


def smallest_piece(length: int, batch_size: int, shares: int, accumulate: int) -> int:
    """Examples in the smallest piece that goes through the model in an epoch of `length` examples.

    Each global batch is cut into shares, and each share into `accumulate` pieces. An empty share carries
    one example as a stand-in.
    """
    batches = {min(batch_size, length), length % batch_size or batch_size}
    lengths = {max(1, size) for batch in batches for size in (batch // shares, -(-batch // shares))}
    smallest = []
    for size in lengths:
        pieces = min(accumulate, size)
        largest = -(-size // pieces)  # as torch.chunk cuts
        smallest.append(size % largest or largest)
    return min(smallest)
