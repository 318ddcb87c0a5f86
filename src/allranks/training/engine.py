"""The shipped training itself: an optimizer step, an epoch of them, an exact evaluation.

loop.py runs around its epochs and steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from allranks.base.errors import UserError
from allranks.config import TrainerConfig
from allranks.data.dealing import (
    Batch,
    Piece,
    evaluation_batches,
    fewest_evaluation_batches,
    most_evaluation_batches,
    training_batches,
)
from allranks.data.loader import Data
from allranks.data.parts import Part
from allranks.data.randomness import mixed, reseed
from allranks.runtime.runtime import Runtime
from allranks.runtime.sharding import has_slices
from allranks.tasks import metrics_of, outputs_of
from allranks.training.building import Recipe, length_of
from allranks.training.control import Control
from allranks.training.length import RunLength
from allranks.training.loop import Loop
from allranks.training.metrics import Column, Figures, Sums, objects_of
from allranks.training.training import Training
from allranks.training.update import named, take_step, tell_not_finite
from allranks.training.weight import share_weight

# The remedy for a loss or a gradient that is not finite.
_IF_NOT_FINITE = (
    "Take a smaller optimizer.lr or trainer.clip_norm, look at the data, or go on without such steps by "
    "trainer.nonfinite=skip."
)
# The remedy where trainer.detect_anomaly has found a layer or an operation.
_IF_FOUND = "Take a smaller optimizer.lr or trainer.clip_norm, or look at the data and at this layer."


# --- the loop ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Surroundings:
    """What a training works with, and what stays the same from its first epoch to its last."""

    data: Data
    length: RunLength  # of the whole run
    trainer: TrainerConfig
    seed: int
    batch_size: int  # examples of one optimizer step, over all ranks together
    runtime: Runtime
    loop: Loop


def fit_and_test(training: Training, data: Data, recipe: Recipe, loop: Loop) -> Figures:
    """Trains to the end, and then looks at the test set, once; all ranks call.

    `recipe` is what the training was built from, and `loop` runs around its steps. Returns the figures over
    the test set. Raises RunStopped if the ranks agreed to stop before the end.
    """
    around = _Surroundings(
        data=data,
        length=length_of(recipe, len(data.train)),
        trainer=recipe.trainer,
        seed=recipe.seed,
        batch_size=recipe.batch_size,
        runtime=loop.runtime,
        loop=loop,
    )
    # The last batch of an epoch may be smaller: then torch.compile compiles the model once more, and the
    # watchdog has to allow the time for it.
    progress = around.runtime.progress
    progress.compiles = around.trainer.compile
    for _ in loop.epochs(around.length.epochs):
        is_whole = training.position.epoch_steps == 0
        _train_epoch(training, around)
        if is_whole:  # this process has had batches of all sizes, unlike one that went on within the epoch
            progress.compiles = False
        _evaluate_epoch(training, around)
    return _evaluate(training, data.test, around)


def _train_epoch(training: Training, around: _Surroundings) -> None:
    """Takes the steps that are left of the current epoch."""
    trainer = around.trainer
    runtime = around.runtime
    loop = around.loop
    position = training.position
    part = around.data.train
    count = around.length.steps_in(position.epoch)
    if position.epoch_steps == 0:
        training.epoch_lr = training.optimizer.param_groups[0]["lr"]
    batches = training_batches(
        part, runtime, around.batch_size, position.epoch, around.seed,
        first_step=position.epoch_steps, end_step=count, shuffle=not trainer.overfit_batch,
        accumulate=trainer.accumulate, equal_pieces=training.is_sharded,
    )  # fmt: skip
    examples = min(count * around.batch_size, len(part))
    training.trained.train()  # walks all modules, so it is not called in every step
    with part.explained():
        for shares in loop.steps(batches, count, examples):
            with loop.records.of_step(training) as recorded:
                train_step(training, shares, trainer, around.seed, runtime, recorded)


def _evaluate_epoch(training: Training, around: _Surroundings) -> None:
    """Logs the figures of an epoch whose steps are all taken, and steps the schedule.

    Raises RunStopped if the ranks agreed to stop in between.
    """
    if around.trainer.train_metrics == "running":
        train = training.sums.total(around.runtime)
    else:
        train = _evaluate(training, around.data.train, around)
    val = _evaluate(training, around.data.val, around)
    figures = {"lr": training.epoch_lr, **train.named("train"), **val.named("val")}
    around.loop.log(figures)
    training.schedule.after_epoch(figures)
    training.sums.rows.zero_()


def _evaluate(training: Training, part: Part, around: _Surroundings) -> Figures:
    """The figures of the training's model; raises RunStopped where the ranks agreed to stop in between."""
    precision = around.trainer.precision
    return evaluate(
        training.model, training.task, training.columns, part, precision, around.seed, around.runtime,
        around.loop.control,
    )  # fmt: skip


# --- evaluation ----------------------------------------------------------------------------------------


@torch.no_grad()
def evaluate(
    model: nn.Module,
    task: Any,
    columns: Sequence[Column],
    part: Part,
    precision: str,
    seed: int,
    runtime: Runtime,
    control: Control | None = None,
) -> Figures:
    """The model's figures on all examples of the part, each counted exactly once; all ranks call.

    `task` says what is measured (allranks.tasks), and `columns` which of that are sums. If a `control`
    is given, the ranks may agree to stop during the evaluation. Then all of them raise RunStopped.
    """
    model.eval()
    sums = Sums(runtime, columns, objects_of(task))
    if control is not None:
        control.begin_evaluation()
    # One rank may have a batch more than another. check_evaluation() needs all ranks, so it is called only
    # up to the last batch that every rank has.
    last_common = fewest_evaluation_batches(part, runtime)
    number = 0
    with part.explained():
        for number, (row, piece) in enumerate(evaluation_batches(part, runtime, seed), start=1):
            outputs, loss_sum = _forward(model, task, piece, precision, runtime)
            sums.add(row, loss_sum, piece.length, metrics_of(task, outputs, piece.examples))
            runtime.progress.evaluated_batch()
            if control is not None and number <= last_common:
                control.check_evaluation(number)
        if has_slices(model):
            # The ranks send each other their slices of the weights in each forward pass. So a rank that has
            # a batch less than others makes one more pass, whose outputs nobody looks at.
            for _ in range(number, most_evaluation_batches(part, runtime)):
                with runtime.autocast(precision):
                    outputs_of(task, model, part.first(1, seed))
    figures = sums.total(runtime)
    assert figures.examples == len(part), (
        f"{figures.examples} examples were evaluated, but there are {len(part)}"
    )
    return figures


# --- one step ------------------------------------------------------------------------------------------


def train_step(
    training: Training,
    shares: Sequence[Batch],
    trainer: TrainerConfig,
    seed: int,
    runtime: Runtime,
    recorded: Sums | None = None,
) -> None:
    """One optimizer step on this rank's shares of a global batch; all ranks call.

    Each share is weighted by its count, so that the sum over the ranks is the gradient of the mean over
    the global batch, however unevenly the batch divides. A step whose gradient is not finite is not
    applied: the sum is the same on all ranks, so all of them see it. Raises UserError on all ranks then,
    unless trainer.nonfinite=skip. If `recorded` is given, the step's own figures are added to it.
    """
    is_running = trainer.train_metrics == "running"
    sums_before = training.sums.rows.clone() if is_running else None
    sums = [each for each in (training.sums if is_running else None, recorded) if each is not None]

    # 1. The gradient of this rank's shares, and with it that of all ranks.
    losses: list[torch.Tensor] = []
    for row in training.gradients.each_share(seed, training.position.step):
        losses += _backward(training, row, shares[row], trainer, runtime, sums)

    # 2. The weights follow the gradient, unless it is not finite.
    is_applied = take_step(
        training.optimizer,
        training.model.parameters(),
        trainer.clip_norm,
        training.scaler,
        runtime if training.is_sharded else None,
    )
    if not is_applied:
        if trainer.detect_anomaly:
            _find_where(training, shares, trainer, seed, runtime)
        tell_not_finite(losses, training.position, runtime, trainer.nonfinite == "stop", _IF_NOT_FINITE)
        if sums_before is not None:
            training.sums.rows.copy_(sums_before)

    # 3. Ready for the next step.
    training.optimizer.zero_grad()
    training.schedule.after_step()


def _backward(
    training: Training,
    row: int,
    batch: Batch,
    trainer: TrainerConfig,
    runtime: Runtime,
    sums: Sequence[Sums],
) -> list[torch.Tensor]:
    """Adds the gradient of one share to the model's, one of its pieces after the other.

    `row` is the share's number on this rank. The share's figures are added to all of `sums`. Returns the
    loss of each piece, a scalar, summed over its examples.
    """
    task = training.task
    gradients = training.gradients
    losses = []
    with gradients.in_pieces():
        for number, piece in enumerate(batch.pieces, start=1):
            with gradients.piece(is_last=number == len(batch.pieces)):
                with named("forward"):
                    outputs, loss = _forward(training.trained, task, piece, trainer.precision, runtime)
                known = loss.detach()
                with named("backward"):
                    # The weight is a factor and not an argument of backward(), which would import sympy.
                    counts = batch.count > 0 and piece.length > 0
                    weighted = loss * share_weight(counts, batch.total, known)
                    gradients.backward(training.scaler.scale(weighted))
            losses.append(known)
            if counts and sums:
                with torch.no_grad():
                    measured = metrics_of(task, outputs, piece.examples)
                for each in sums:
                    each.add(row, known, piece.length, measured)
    return losses


def _forward(
    model: nn.Module, task: Any, piece: Piece, precision: str, runtime: Runtime
) -> tuple[Any, torch.Tensor]:
    """What the model gives for a piece, and the task's loss, a scalar: the sum over the examples."""
    with runtime.autocast(precision):
        outputs = outputs_of(task, model, piece.examples)
    return outputs, task.loss(outputs, piece.examples)


def _find_where(
    training: Training, shares: Sequence[Batch], trainer: TrainerConfig, seed: int, runtime: Runtime
) -> None:
    """Computes this rank's part of a step once more, and looks at each number; all ranks call.

    Raises UserError, which names the layer or operation whose number is the first that is not finite.
    Weights and random numbers are those of the first time, so the same numbers come again. If all are
    finite, as with a model that changes by itself, nothing is raised.
    """
    from allranks.training.anomaly import detecting, named_operation

    def told(found: str) -> UserError:
        return UserError(f"{found} {_IF_FOUND}")

    # The ranks agree on the error. In the passes of a model that is spread over them they wait for each
    # other: there only the rank that computed the number raises the error, and that ends all.
    agreement = nullcontext() if training.is_sharded else runtime.all_or_none()
    with agreement, named_operation(told), detecting({"": training.model}, told):
        for share, batch in zip(runtime.shares, shares, strict=True):
            reseed(mixed(seed, training.position.step, share), runtime.device)
            for piece in batch.pieces:
                _, loss = _forward(training.model, training.task, piece, trainer.precision, runtime)
                # This gradient is looked at and no more: it is not weighted, nor added up over the ranks.
                loss.backward()
