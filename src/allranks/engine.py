"""Train an epoch, evaluate exactly, and the loop around both."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.functional import cross_entropy

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
from allranks.errors import UserError
from allranks.metrics import Sums
from allranks.runtime.runtime import Runtime


@dataclass
class Schedule:
    """A learning-rate scheduler and when to step it."""

    scheduler: Any = None
    every_step: bool = False
    monitor: str | None = None  # the metric that a plateau scheduler watches

    def after_step(self) -> None:
        if self.scheduler is not None and self.every_step:
            self.scheduler.step()

    def after_epoch(self, metrics: Mapping[str, float]) -> None:
        if self.scheduler is None or self.every_step:
            return
        if self.monitor is None:
            self.scheduler.step()
        else:
            self.scheduler.step(metrics[self.monitor])


@dataclass
class Training:
    """All that changes while a run trains."""

    model: nn.Module  # as it is evaluated and saved
    trained: nn.Module  # the same, compiled and wrapped in DDP where asked for
    optimizer: torch.optim.Optimizer
    schedule: Schedule
    scaler: torch.amp.GradScaler
    epoch: int = 0  # completed
    step: int = 0  # optimizer steps taken
    val_count: int = 0  # examples of the last validation

    @property
    def parameters(self) -> int:
        return sum(p.numel() for p in self.model.parameters())


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
    trainer, seed = config.trainer, config.seed
    torch.manual_seed(seed)
    net: nn.Module = build("model", config.model).to(runtime.device, dtype(trainer))
    parameters = [p for p in net.parameters() if p.requires_grad]
    if not parameters:
        raise UserError(f"model._target_={config.model['_target_']} has no parameters to train.")
    made = build("optimizer", config.optimizer, parameters)
    batch_size = global_batch_size(trainer, runtime.world_size)
    length = trainer.epochs * steps_per_epoch(examples, batch_size)
    schedule = build_schedule(config.scheduler, made, trainer.epochs, length)
    trained = runtime.wrap(torch.compile(net) if trainer.compile else net)  # type: ignore[arg-type]
    # Dropout differs from rank to rank; adding 1 keeps rank 0 from repeating the initial weights' numbers.
    torch.manual_seed(seed * runtime.world_size + runtime.rank + 1)
    scaler = torch.amp.GradScaler(runtime.device.type, enabled=trainer.precision == "fp16")
    return Training(net, trained, made, schedule, scaler)


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


def train_epoch(
    training: Training,
    batches: Iterator[Batch],
    config: TrainerConfig,
    runtime: Runtime,
    sums: Sums | None,
) -> int:
    """One pass over the shuffled training set; returns the examples seen by all ranks together.

    Each share is weighted by its count, so that the sum over the ranks is the gradient of the mean over
    the global batch, however unevenly the batch divides.
    """
    model, optimizer, scaler = training.trained, training.optimizer, training.scaler
    model.train()
    seen = 0
    for batch in batches:
        pieces = min(config.accumulate, len(batch.labels))
        parts = list(zip(batch.images.chunk(pieces), batch.labels.chunk(pieces), strict=True))
        for images, labels in parts[:-1]:
            with runtime.without_sync(model):
                _backward(training, images, labels, batch, config, runtime, sums)
        _backward(training, *parts[-1], batch, config, runtime, sums)
        if config.clip_norm is not None:
            scaler.unscale_(optimizer)
            nn.utils.clip_grad_norm_(training.model.parameters(), config.clip_norm)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        training.schedule.after_step()
        training.step += 1
        seen += batch.total
    return seen


def _backward(
    training: Training,
    images: torch.Tensor,
    labels: torch.Tensor,
    batch: Batch,
    config: TrainerConfig,
    runtime: Runtime,
    sums: Sums | None,
) -> None:
    with runtime.autocast(config.precision):
        logits = training.trained(images)
    loss = cross_entropy(
        _at_least_fp32(logits), labels, reduction="sum", label_smoothing=config.label_smoothing
    )
    weight = (batch.count > 0) / batch.total  # a stand-in for an empty share weighs nothing
    training.scaler.scale(loss * weight).backward()
    if sums is not None and batch.count:
        sums.add(loss.detach(), logits.detach(), labels)


def _at_least_fp32(logits: torch.Tensor) -> torch.Tensor:
    return logits if logits.dtype == torch.float64 else logits.float()


@torch.no_grad()
def evaluate(
    model: nn.Module, part: Part, config: TrainerConfig, runtime: Runtime
) -> tuple[float, float, int]:
    """Mean loss, accuracy in percent, and count over all ranks: every example exactly once."""
    model.eval()
    sums = Sums(runtime.device)
    for images, labels in evaluation_batches(part, runtime):
        with runtime.autocast(config.precision):
            logits = model(images)
        sums.add(cross_entropy(_at_least_fp32(logits), labels, reduction="sum"), logits, labels)
    loss, accuracy, count = sums.total(runtime.sum)
    assert count == len(part), f"{count} examples were evaluated, but there are {len(part)}"
    return loss, accuracy, count


def fit(
    training: Training,
    data: Data,
    config: TrainerConfig,
    runtime: Runtime,
    seed: int,
    progress: Any,
) -> Iterator[dict[str, float | int]]:
    """Trains epoch after epoch, and yields the metrics of each."""
    batch_size = global_batch_size(config, runtime.world_size)
    steps = steps_per_epoch(len(data.train), batch_size)
    while training.epoch < config.epochs:
        rate = training.optimizer.param_groups[0]["lr"]
        started = time.perf_counter()
        sums = Sums(runtime.device) if config.train_metrics == "running" else None
        batches = training_batches(data.train, runtime, batch_size, training.epoch, seed)
        seen = train_epoch(training, progress(batches, training.epoch + 1, steps), config, runtime, sums)
        runtime.synchronize()
        trained = time.perf_counter()
        if sums is None:
            train_loss, train_accuracy, _ = evaluate(training.model, data.train, config, runtime)
        else:
            train_loss, train_accuracy, _ = sums.total(runtime.sum)
        val_loss, val_accuracy, training.val_count = evaluate(training.model, data.val, config, runtime)
        ended = time.perf_counter()
        training.epoch += 1
        metrics: dict[str, float | int] = {
            "epoch": training.epoch,
            "step": training.step,
            "lr": rate,
            "train/loss": train_loss,
            "train/accuracy": train_accuracy,
            "val/loss": val_loss,
            "val/accuracy": val_accuracy,
            "time/train_s": trained - started,
            "time/eval_s": ended - trained,
            "throughput/samples_per_s": seen / (trained - started),
        }
        training.schedule.after_epoch(metrics)
        yield metrics


def weights_sha256(model: nn.Module) -> str:
    """sha256 over names, types, shapes and bytes of all weights and buffers, in the order of names."""
    import hashlib

    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        flat = tensor.detach().cpu().contiguous()
        digest.update(f"{name} {flat.dtype} {list(flat.shape)}\n".encode())
        digest.update(flat.view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
