"""Train an epoch, evaluate exactly, and the loop around both."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from allranks.base.errors import UserError
from allranks.components import build
from allranks.config import Config, TrainerConfig
from allranks.data.loader import (
    Batch,
    Data,
    Part,
    evaluation_batches,
    steps_per_epoch,
    training_batches,
)
from allranks.data.randomness import mixed, reseed
from allranks.runtime.compare import compare_ranks
from allranks.runtime.gradients import OrderedSum
from allranks.runtime.runtime import Runtime
from allranks.training.control import Control
from allranks.training.metrics import Sums
from allranks.training.report import Reporter
from allranks.training.training import Schedule, Training

log = logging.getLogger(__name__)


def global_batch_size(config: TrainerConfig, world_size: int) -> int:
    """Examples in one optimizer step over all ranks; raises UserError where some rank would get none."""
    if config.per_rank_batch_size is not None:
        return config.per_rank_batch_size * world_size
    if config.batch_size < world_size:
        raise UserError(
            f"trainer.batch_size={config.batch_size} is smaller than the {world_size} ranks: give at least "
            f"{world_size}, or start at most {config.batch_size} ranks.",
            said_by=0,
        )
    return config.batch_size


def dtype(config: TrainerConfig) -> torch.dtype:
    """Of the weights and the images; below fp32 the weights stay fp32 and autocast does the rest."""
    return torch.float64 if config.precision == "fp64" else torch.float32


def build_training(config: Config, runtime: Runtime, examples: int) -> Training:
    """The model with its initial weights from `seed`, its optimizer and its schedule."""
    trainer = config.trainer
    torch.manual_seed(config.seed)
    net: nn.Module = build("model", config.model).to(runtime.device, dtype(trainer))
    parameters = [p for p in net.parameters() if p.requires_grad]
    target = f"model._target_={config.model['_target_']}"
    if not parameters:
        raise UserError(f"{target} has no parameters to train.")
    for name, value in net.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise UserError(
                f"{target}: {name} of its state_dict is a {type(value).__name__}, but a checkpoint holds "
                "tensors: register it as a buffer."
            )
    ordered_sum = None
    if trainer.reproducible:
        if any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in net.modules()):
            raise UserError(
                "trainer.reproducible=true does not go with BatchNorm, whose figures depend on how a batch "
                "is cut: take GroupNorm or LayerNorm in the model."
            )
        ordered_sum = OrderedSum(parameters, len(runtime.shares))
    optimizer = build("optimizer", config.optimizer, parameters)
    batch_size = global_batch_size(trainer, runtime.world_size)
    length = trainer.epochs * steps_per_epoch(examples, batch_size)
    schedule = build_schedule(config.scheduler, optimizer, trainer.epochs, length)
    trained = runtime.wrap(torch.compile(net) if trainer.compile else net)  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=trainer.precision == "fp16")
    return Training(net, trained, optimizer, schedule, scaler, Sums(runtime), ordered_sum)


def build_schedule(
    section: Mapping[str, Any], optimizer: torch.optim.Optimizer, epochs: int, steps: int
) -> Schedule:
    """The scheduler of the section. A value `length` stands for its number of steps in the run."""
    values = dict(section)
    every_step = values.pop("interval", "epoch") == "step"
    monitor = values.pop("monitor", None)
    if values.get("_target_") is None:
        return Schedule()
    if every_step and monitor:
        raise UserError(
            f"scheduler.interval=step does not go with scheduler.monitor={monitor}, which is known once an "
            "epoch: take scheduler.interval=epoch."
        )
    length = max(1, steps if every_step else epochs)
    values = {key: length if value == "length" else value for key, value in values.items()}
    return Schedule(build("scheduler", values, optimizer), every_step, monitor)


def train_step(training: Training, shares: Sequence[Batch], config: Config, runtime: Runtime) -> None:
    """One optimizer step on this rank's shares of a global batch.

    Each share is weighted by its count, so that the sum over the ranks is the gradient of the mean over
    the global batch, however unevenly the batch divides. A step whose gradient is not finite is not
    applied: the sum is the same on all ranks, so all of them see it.
    """
    trainer, scaler, optimizer = config.trainer, training.scaler, training.optimizer
    losses = []
    sums_before = training.sums.rows.clone() if trainer.train_metrics == "running" else None
    for row, (share, batch) in enumerate(zip(runtime.shares, shares, strict=True)):
        reseed(mixed(config.seed, training.step, share), runtime.device)
        losses.append(_backward(training, row, batch, trainer, runtime))
        if training.ordered_sum is not None:
            training.ordered_sum.take(row)
    if training.ordered_sum is not None:
        training.ordered_sum.give(runtime.gather)
    if scaler.is_enabled():  # which skips a step that overflows, and lowers its scale
        scaler.unscale_(optimizer)
        _clip(training, trainer)
        scaler.step(optimizer)
        scaler.update()
        finite = scaler.get_scale() >= 2**-14
    else:
        finite = _is_finite(training)
        if finite:
            _clip(training, trainer)
            optimizer.step()
    if not finite:
        _not_finite(training, losses, trainer, runtime)
        if sums_before is not None:
            training.sums.rows.copy_(sums_before)
    optimizer.zero_grad()
    training.schedule.after_step()
    training.step += 1
    training.epoch_steps += 1


def settle_buckets(training: Training, batch: Batch, config: TrainerConfig, runtime: Runtime) -> None:
    """Passes a batch forward and backward for nothing.

    After its first backward pass DDP lays its buckets out anew, in the order in which the gradients came,
    and a ring all-reduce adds up in an order that follows the layout. A run that goes on from a checkpoint
    has to begin with the layout of one that never stopped.
    """
    if training.trained is training.model:
        return
    buffers = [buffer.clone() for buffer in training.model.buffers()]
    with runtime.autocast(config.precision):
        logits = training.trained(batch.images)
    (logits.sum() * 0).backward()
    training.optimizer.zero_grad()
    for buffer, before in zip(training.model.buffers(), buffers, strict=True):
        buffer.copy_(before)


def _backward(
    training: Training, row: int, batch: Batch, config: TrainerConfig, runtime: Runtime
) -> torch.Tensor:
    """Adds the share's gradient to the model's, in `accumulate` pieces; returns the share's summed loss."""
    pieces = min(config.accumulate, len(batch.labels))
    parts = list(zip(batch.images.chunk(pieces), batch.labels.chunk(pieces), strict=True))
    total = torch.zeros((), device=runtime.device)
    for number, (images, labels) in enumerate(parts, start=1):
        with runtime.without_sync(training.trained) if number < len(parts) else nullcontext():
            with runtime.autocast(config.precision):
                logits = training.trained(images)
            try:
                loss = cross_entropy(
                    _at_least_fp32(logits), labels, reduction="sum", label_smoothing=config.label_smoothing
                )
            except IndexError as error:
                raise UserError(
                    f"Label {int(labels.max())} does not fit the model's {logits.shape[1]} outputs: labels "
                    "count from 0; give data.classes and model.classes as the data has them."
                ) from error
            known = loss.detach()
            # A stand-in for an empty share weighs nothing. A loss that is not finite makes the whole
            # gradient NaN, for all ranks to see: NaN = inf * 0.
            weight = (batch.count > 0) / batch.total + known * 0
            # not backward(weight): it would import sympy
            training.scaler.scale(loss * weight).backward()
        total += known
        if config.train_metrics == "running" and batch.count:
            training.sums.add(row, known, logits.detach(), labels)
    return total


def _clip(training: Training, config: TrainerConfig) -> None:
    if config.clip_norm is not None:
        nn.utils.clip_grad_norm_(training.model.parameters(), config.clip_norm)


def _is_finite(training: Training) -> bool:
    """Whether every gradient is. The squares of finite numbers may overflow, hence the second look."""
    groups = training.optimizer.param_groups
    gradients = [p.grad.reshape(-1) for group in groups for p in group["params"] if p.grad is not None]
    squares = [torch.dot(g, g) for g in gradients]  # on a CPU the quickest look at all of a tensor
    if gradients[0].is_cpu:
        total = sum(square.item() for square in squares)
    else:  # one wait for the device, not many
        total = torch.stack(squares).sum().item()
    return math.isfinite(total) or all(bool(g.isfinite().all()) for g in gradients)


def _not_finite(
    training: Training, losses: Sequence[torch.Tensor], config: TrainerConfig, runtime: Runtime
) -> None:
    """Names the ranks whose loss it was; raises UserError on all ranks unless the step is to be skipped."""
    step, epoch = training.step + 1, training.epoch + 1

    def decide(bad: list[str | None]) -> list[str]:
        ranks = [f"rank {r} ({loss})" for r, loss in enumerate(bad) if loss]
        what = f"The loss of {', '.join(ranks)} is" if ranks else "The gradient is"
        text = f"{what} not finite in step {step} (epoch {epoch}); the step was not applied."
        if config.nonfinite == "stop":
            raise UserError(
                f"{text} Take a smaller optimizer.lr or trainer.clip_norm, look at the data, or go on "
                "without such steps by trainer.nonfinite=skip."
            )
        return [text] * len(bad)

    value = sum(float(loss) for loss in losses)
    told = runtime.meeting.settle(None if math.isfinite(value) else str(value), decide)
    if runtime.is_main:
        log.warning(told)


def _at_least_fp32(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


@torch.no_grad()
def evaluate(model: nn.Module, part: Part, config: Config, runtime: Runtime) -> tuple[float, float, int]:
    """Mean loss, accuracy in percent, and count over all ranks: every example exactly once."""
    model.eval()
    sums = Sums(runtime)
    for row, (images, labels) in evaluation_batches(part, runtime, config.seed):
        with runtime.autocast(config.trainer.precision):
            logits = model(images)
        sums.add(row, cross_entropy(_at_least_fp32(logits), labels, reduction="sum"), logits, labels)
        runtime.watchdog.batch()
    loss, accuracy, count = sums.total(runtime)
    assert count == len(part), f"{count} examples were evaluated, but there are {len(part)}"
    return loss, accuracy, count


def fit(
    training: Training,
    data: Data,
    config: Config,
    runtime: Runtime,
    control: Control,
    report: Reporter,
) -> bool:
    """Trains to the end, from wherever `training` stands; False where the ranks agreed to stop before.

    `control` decides when to save and when to stop, `report` tells.
    """
    trainer = config.trainer
    batch_size = global_batch_size(trainer, runtime.world_size)
    steps = steps_per_epoch(len(data.train), batch_size)
    settled = False
    runtime.watchdog.compiles = trainer.compile  # the last batch, which is smaller, once more
    while training.epoch < trainer.epochs:
        if training.epoch_steps == 0:
            training.epoch_lr = training.optimizer.param_groups[0]["lr"]
        started = time.perf_counter() - training.epoch_s
        batches = training_batches(
            data.train, runtime, batch_size, training.epoch, config.seed, training.epoch_steps
        )
        runtime.watchdog.progress(training.step)
        training.trained.train()  # walks all modules: not for every step
        for shares in report.progress(batches, training, steps):
            if not settled:
                settle_buckets(training, shares[0], trainer, runtime)
                settled = True
            train_step(training, shares, config, runtime)
            if control.is_due(training.step) or training.epoch_steps == steps:
                training.epoch_s = time.perf_counter() - started
                if control.agree_to_stop(training, evaluates_next=training.epoch_steps == steps):
                    return False
            runtime.watchdog.progress(training.step)
        if runtime.world_size > 1:
            for buffer in training.model.buffers():  # BatchNorm's: evaluated and saved are rank 0's
                buffer.copy_(runtime.broadcast(buffer.contiguous()))
        runtime.synchronize()
        trained = time.perf_counter()
        runtime.watchdog.compiles = False
        if trainer.train_metrics == "running":
            train_loss, train_accuracy, _ = training.sums.total(runtime)
        else:
            train_loss, train_accuracy, _ = evaluate(training.model, data.train, config, runtime)
        val_loss, val_accuracy, _ = evaluate(training.model, data.val, config, runtime)
        ended = time.perf_counter()
        training.epoch += 1
        compare_ranks(runtime, training.model)
        metrics: dict[str, float | int] = {
            "epoch": training.epoch,
            "step": training.step,
            "lr": training.epoch_lr,
            "train/loss": train_loss,
            "train/accuracy": train_accuracy,
            "val/loss": val_loss,
            "val/accuracy": val_accuracy,
            "time/train_s": trained - started,
            "time/eval_s": ended - trained,
            "throughput/samples_per_s": len(data.train) / (trained - started),
        }
        training.schedule.after_epoch(metrics)
        training.history.append(metrics)
        training.epoch_steps, training.epoch_s = 0, 0.0
        training.sums.rows.zero_()
        report.epoch(metrics, trainer.epochs)
        if control.agree_to_stop(training):
            return False
    return True


def weights_sha256(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all weights and buffers, in the order of names."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {flat.dtype} {list(flat.shape)}\n".encode())
        digest.update(flat.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
