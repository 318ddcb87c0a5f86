"""One batch tried on rank 0 before a training begins, so that what does not fit is said in one sentence.

Model, data, task and optimizer are often a user's own, and written for another program: a model that
returns a dict, a Dataset whose images have another shape, an optimizer that needs a closure. Without this
trial the first step would end in a traceback, on all ranks at once, with a run directory made already.

Nothing of the training changes: the batch goes through a copy of the model, and all random numbers are
drawn afterwards as if there had been no trial.
"""

from __future__ import annotations

import copy
import os
import sysconfig
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import allranks
from allranks.base.errors import MISFITS, UserError
from allranks.base.text import did_you_mean, one_line, some
from allranks.components import build
from allranks.data.loader import Data
from allranks.data.nests import described, leaves
from allranks.data.parts import Examples
from allranks.run.best import BY_DEFAULT, Rule, check
from allranks.runtime.runtime import Runtime
from allranks.runtime.settling import random_numbers_kept
from allranks.tasks import Classification, metrics_of, outputs_of
from allranks.training.building import Recipe, build_model
from allranks.training.flops import Flops
from allranks.training.metrics import Column, Sums, columns_of, objects_of
from allranks.training.reproducible import buffers_of, refuse_changed_buffers
from allranks.training.training import Training

_SHOWN_LETTERS = 300  # of a library's message; some list every name of a model


class Tried(NamedTuple):
    """What the trial of a first batch has found."""

    # Floating-point operations of a forward and a backward pass for one example; None if they could not
    # be counted.
    flops_per_example: float | None
    has_convolutions: bool
    unused: list[str]  # the parameters that took no part
    columns: Sequence[Column]  # the task's metrics that are sums


def try_first_batch(
    training: Training, data: Data, recipe: Recipe, runtime: Runtime, best: Rule = BY_DEFAULT
) -> Tried:
    """Tries one step on rank 0, on the first training examples; all ranks call.

    `recipe` is what the training was built from. `best` says which epoch will be the best. Afterwards the
    training knows which metrics of its task are sums. A model that is spread over the ranks is tried on all
    of them, and is no copy: no step is taken with it. Raises UserError, on all ranks, if data, model,
    task and optimizer do not go together, or if the task does not measure what `best` names.
    """
    if training.is_sharded:
        with runtime.all_or_none():
            tried = _try(training, data, recipe, runtime, best)
    else:
        tried = Tried(*runtime.meeting.from_rank_0(lambda: _try(training, data, recipe, runtime, best)))
    training.sums = Sums(runtime, [Column(*column) for column in tried.columns])
    return tried


def _try(training: Training, data: Data, recipe: Recipe, runtime: Runtime, best: Rule) -> Tried:
    """The trial itself, on this rank. Takes a step with a copy of the model, or none with a sharded one."""
    is_classification = isinstance(training.task, Classification)
    trainer = recipe.trainer
    with random_numbers_kept(runtime.device):
        count = min(2, len(data.train))
        examples = data.train.first(count, recipe.seed)
        if is_classification:
            _check_shape(examples, data.input_shape)
        needs_no_others = not any(
            isinstance(module, nn.SyncBatchNorm) for module in training.model.modules()
        )
        model = training.model if training.is_sharded else _copy_of(training.model, recipe, runtime.device)
        # SyncBatchNorm would wait for the other ranks in training, but not in an evaluation. With it this
        # rank, which tries the model by itself, can only evaluate.
        model.train(needs_no_others)
        buffers = buffers_of(model)
        names = _Names(
            model=f"model._target_={recipe.model['_target_']}",
            optimizer=f"optimizer._target_={recipe.optimizer['_target_']}",
            task=f"task._target_={recipe.task['_target_']}",
        )
        trial = _Trial(training.task, model, names, data, recipe, runtime)

        flops = Flops()
        outputs = _forward(trial, examples, flops)
        if is_classification:
            _check_logits(outputs, names.model, examples, data.classes)
        if trainer.reproducible:
            refuse_changed_buffers(
                buffers, model, names.model, "trainer.reproducible=true", "trainer.reproducible=false"
            )
        loss = _loss(trial, outputs, examples, flops)
        columns = _columns(trial, outputs, examples)
        known = _known_metrics(columns, training.task, best.metric, trainer.train_metrics)
        _check_monitor(recipe.scheduler, known)
        check(best, known)
        if not needs_no_others:
            return Tried(None, False, [], columns)
        with _told(f"{names.model}: its output has no gradient that reaches its parameters"):
            flops.during(loss.backward)
        unused = [name for name, p in model.named_parameters() if p.requires_grad and p.grad is None]
        if training.is_sharded:
            model.zero_grad()
        else:
            _step(model, names.optimizer, recipe.optimizer)
        if not is_classification:
            _check_that_losses_add_up(trial)
        _try_one_example(trial, examples)
        if training.is_sharded:
            for name, buffer in model.named_buffers():
                if name in buffers:  # a model may make others in its first forward pass
                    buffer.copy_(buffers[name])
        flops_per_example = flops.count / count if flops.count else None
        return Tried(flops_per_example, flops.has_convolutions, unused, columns)


class _Names(NamedTuple):
    """What the components are called in messages: each `key=value`."""

    model: str
    optimizer: str
    task: str


class _Trial(NamedTuple):
    """What is tried together."""

    task: Any
    model: nn.Module  # the copy, or the model itself where it is spread over the ranks
    names: _Names
    data: Data
    recipe: Recipe
    runtime: Runtime


@contextmanager
def _told(what: str, remedy: str = "") -> Iterator[None]:
    """Raises UserError with `what`, and the error, in place of an error that says that it does not fit."""
    try:
        yield
    except UserError:
        raise
    except MISFITS as error:
        said = one_line(error)[:_SHOWN_LETTERS].rstrip(". ")
        raise UserError(f"{what} ({type(error).__name__}{_where(error)}: {said}).{remedy}") from error


def _where(error: BaseException) -> str:
    """The innermost line of the user's own code that the error came through: " at nets.py:12"."""
    libraries = [sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")]
    not_theirs = [*libraries, *(str(Path(str(module.__file__)).parent) for module in (torch, allranks))]
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not frame.filename.startswith(("<", *(folder + os.sep for folder in not_theirs)))
    ]
    return f" at {Path(frames[-1].filename).name}:{frames[-1].lineno}" if frames else ""


def _copy_of(model: nn.Module, recipe: Recipe, device: torch.device) -> nn.Module:
    """A model with the same weights. The few that Python cannot copy are built once more."""
    try:
        return copy.deepcopy(model)
    except (RuntimeError, TypeError):
        return build_model(recipe.model, recipe.seed, recipe.dtype, device)


# --- what is checked -----------------------------------------------------------------------------------


def _check_shape(examples: Examples, input_shape: Sequence[int]) -> None:
    shape = list(examples.images.shape[1:])
    if shape != list(input_shape):
        raise UserError(
            f"data.train gives images of shape {shape}, but data.input_shape={list(input_shape)}: give the "
            "shape that they have."
        )


def _forward(trial: _Trial, examples: Any, flops: Flops) -> Any:
    """What the task makes of the examples with the model; raises UserError where they do not fit."""
    names = trial.names
    if isinstance(examples, Examples):
        images = examples.images
        taken = f"{names.model} cannot take images of shape {list(images.shape)} and type {images.dtype}"
    else:
        taken = f"{names.model}, called by {names.task}, cannot take a batch that is {described(examples)}"
    with _told(taken), trial.runtime.autocast(trial.recipe.trainer.precision):
        return flops.during(lambda: outputs_of(trial.task, trial.model, examples))


def _loss(trial: _Trial, outputs: Any, examples: Any, flops: Flops) -> torch.Tensor:
    """The task's loss; raises UserError unless it is a tensor of one number."""
    names = trial.names
    what = (
        f"{names.task} has no loss of outputs that are {described(outputs)} and a batch that is "
        f"{described(examples)}"
    )
    with _told(what):
        loss = flops.during(lambda: trial.task.loss(outputs, examples))
    if not isinstance(loss, torch.Tensor) or loss.dim() != 0:
        raise UserError(
            f"{names.task}: its loss is {described(loss)}, but it must be a tensor of one number: the sum "
            "of the examples' losses."
        )
    return loss


def _columns(trial: _Trial, outputs: Any, examples: Any) -> list[Column]:
    """Which of the task's metrics are sums; raises UserError where its metrics cannot be measured."""
    task = trial.task
    what = (
        f"{trial.names.task} cannot measure outputs that are {described(outputs)} and a batch that is "
        f"{described(examples)}"
    )
    with torch.no_grad():
        with _told(what):
            measured = metrics_of(task, outputs, examples)
        columns = columns_of(task, measured)
        for name, metric in objects_of(task).items():
            tried = copy.deepcopy(metric).to(next(leaf.device for leaf in _tensors(outputs)))
            with _told(f"task.torchmetrics.{name} cannot take {described(measured[name])}"):
                tried.update(*measured[name])
    return columns


def _tensors(nest: Any) -> Iterator[torch.Tensor]:
    return (leaf for leaf in leaves(nest) if isinstance(leaf, torch.Tensor))


def _known_metrics(columns: Sequence[Column], task: Any, wanted: str, train_metrics: str) -> list[str]:
    """The metrics that the task measures.

    An object of torchmetrics may give several numbers, whose names begin with its own and are not known
    before the first epoch. If `wanted` may be one of these, it counts as known. Such objects see the
    training examples in an evaluation of these only, and so not where `train_metrics` is `running`.
    """
    sums = ["loss", *(column.name for column in columns)]
    objects = list(objects_of(task))
    objects_in_training = [] if train_metrics == "running" else objects

    known = [
        *(f"train/{name}" for name in [*sums, *objects_in_training]),
        *(f"val/{name}" for name in [*sums, *objects]),
    ]
    beginnings = (
        *(f"train/{name}_" for name in objects_in_training),
        *(f"val/{name}_" for name in objects),
    )
    return [*known, wanted] if beginnings and wanted.startswith(beginnings) else known


def _check_monitor(scheduler: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raises UserError if the schedule looks at a metric that the task does not measure."""
    monitor = scheduler.get("monitor")
    if monitor is None:
        return
    if monitor not in known:
        raise UserError(
            f"scheduler.monitor={monitor} is not measured: give one of {', '.join(known)}."
            f"{did_you_mean(str(monitor), known)}"
        )


def _check_that_losses_add_up(trial: _Trial) -> None:
    """Raises UserError if the loss is clearly a mean over the examples, in place of their sum.

    A mean would make each gradient smaller by the number of examples in a piece of a batch, and so the
    training's figures would depend on the number of ranks. The loss of two examples must be the sum of the
    losses of each. If it is neither the sum nor the mean, as with a loss that draws at random, nothing
    is said.
    """
    train, recipe = trial.data.train, trial.recipe
    if len(train) < 2:
        return
    trial.model.eval()
    losses = []
    # A model or a loss may take no single example. Whether one will come, _try_one_example() looks.
    with torch.no_grad(), suppress(*MISFITS):
        for examples in train.batches([[0, 1], [0], [1]], recipe.seed):
            with trial.runtime.autocast(recipe.trainer.precision):
                outputs = outputs_of(trial.task, trial.model, examples)
            losses.append(float(trial.task.loss(outputs, examples)))
    trial.model.train()
    if len(losses) < 3:
        return
    both, one, other = losses
    scale = max(abs(one), abs(other))
    is_sum = abs(both - (one + other)) <= 0.01 * scale
    is_mean = abs(both - (one + other) / 2) <= 1e-4 * scale
    if is_mean and not is_sum:
        raise UserError(
            f"{trial.names.task}: its loss of two examples ({both:.6g}) is the mean of the losses of each "
            f"({one:.6g} and {other:.6g}), but it must be their sum: multiply it by the number of "
            'examples, or give torch\'s losses reduction="sum".'
        )


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


def _try_one_example(trial: _Trial, examples: Any) -> None:
    """Raises UserError if the model takes no single example, as with BatchNorm, and one will come.

    One comes where the training examples do not divide evenly into batches, each batch into shares, and
    each share into the pieces that gradients are added up from.
    """
    length = len(trial.data.train)
    shares = trial.runtime.share_count
    batch_size = trial.recipe.batch_size
    accumulate = trial.recipe.trainer.accumulate
    if smallest_piece(length, batch_size, shares, accumulate) > 1:
        return
    if isinstance(examples, Examples):
        one: Any = Examples(examples.images[:1], examples.labels[:1])
    else:  # a batch of another form cannot be cut here
        one = trial.data.train.first(1, trial.recipe.seed)
    what = (
        f"{trial.names.model} takes 2 examples in training, but not 1, and 1 is what is left of {length:,} "
        f"training examples in batches of {batch_size}, each cut into shares={shares} and "
        f"trainer.accumulate={accumulate} pieces"
    )
    remedy = " Give a trainer.batch_size that leaves more, or take GroupNorm in place of BatchNorm."
    with _told(what, remedy):
        with trial.runtime.autocast(trial.recipe.trainer.precision):
            outputs = outputs_of(trial.task, trial.model, one)
        trial.task.loss(outputs, one)


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
