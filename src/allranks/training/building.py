"""From a Recipe to a Training: the model with its first weights, its optimizer, its schedule."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from allranks.base.errors import UserError
from allranks.components import build, locate, locate_targets
from allranks.config import ShardingConfig, TrainerConfig
from allranks.data.dealing import steps_per_epoch
from allranks.runtime import sharding
from allranks.runtime.runtime import UNUSED_IN_TRAINER, Runtime
from allranks.tasks import is_classification
from allranks.training.gradients import Gradients
from allranks.training.length import RunLength, run_length
from allranks.training.metrics import Sums, objects_of
from allranks.training.reproducible import refuse_batch_norm
from allranks.training.state import buffers_left_out, can_be_saved, first_buffers, why_not_saved
from allranks.training.training import Schedule, Training


@dataclass(frozen=True)
class Recipe:
    """What is trained, and how: all that decides the numbers of a training, besides its data.

    train.py makes it of the configuration's sections. Their `_target_` says what makes the component.
    """

    task: Mapping[str, Any]
    model: Mapping[str, Any]
    optimizer: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    trainer: TrainerConfig
    seed: int
    batch_size: int  # examples of one optimizer step, over all ranks together
    sharding: ShardingConfig = field(default_factory=ShardingConfig)

    def check_names(self) -> None:
        """Raises UserError if a component's name does not exist."""
        locate_targets(
            {
                "task": self.task,
                "model": self.model,
                "optimizer": self.optimizer,
                "scheduler": self.scheduler,
            }
        )

    @property
    def dtype(self) -> torch.dtype:
        """The type of weights and images."""
        return dtype_of(self.trainer.precision)

    @property
    def is_classification(self) -> bool:
        """Whether the task is a classification: of images with labels."""
        return _is_of_classification(self.task)


def _is_of_classification(task: Mapping[str, Any]) -> bool:
    """Whether this section of the configuration describes a classification."""
    return is_classification(locate("task", task["_target_"]))


def global_batch_size(trainer: TrainerConfig, world_size: int) -> int:
    """Examples in one optimizer step over all ranks; raises UserError where some rank would get none."""
    if trainer.per_rank_batch_size is not None:
        return trainer.per_rank_batch_size * world_size
    if trainer.batch_size < world_size:
        raise UserError(
            f"trainer.batch_size={trainer.batch_size} is smaller than the {world_size} ranks: give at "
            f"least {world_size}, or start at most {trainer.batch_size} ranks.",
            said_by=0,
        )
    return trainer.batch_size


def dtype_of(precision: str) -> torch.dtype:
    """The type of weights and images for this trainer.precision.

    For bf16 and fp16 both stay fp32, and autocast computes in the smaller type where that is safe.
    """
    return torch.float64 if precision == "fp64" else torch.float32


def length_of(recipe: Recipe, examples: int) -> RunLength:
    """How long the recipe's run is, with this number of training examples."""
    return run_length(recipe.trainer, steps_per_epoch(examples, recipe.batch_size))


def build_training(recipe: Recipe, runtime: Runtime, examples: int) -> Training:
    """The training that the recipe describes, at its beginning.

    `examples` is the number of training examples, from which the length of the schedule follows.
    The first weights follow from the seed, so they are the same on all ranks. distribute() then connects
    the ranks. Raises UserError if a component cannot be built, or if components do not go together.
    """
    trainer = recipe.trainer
    is_sharded = sharding.is_wanted(recipe.sharding, runtime)
    spreading = recipe.sharding if is_sharded else None
    gradients = Gradients(runtime, spreading, UNUSED_IN_TRAINER, gives_zeros=True)
    if is_sharded:
        model = _spread_model(recipe, gradients)
    else:
        model = build_model(recipe.model, recipe.seed, recipe.dtype, runtime.device)
    if trainer.reproducible:
        refuse_batch_norm(model, "trainer.reproducible=true")
    parameters = [p for p in model.parameters() if p.requires_grad]

    section = _for_slices(recipe.optimizer) if is_sharded else recipe.optimizer
    optimizer = build("optimizer", section, parameters)
    length = length_of(recipe, examples)
    schedule = build_schedule(recipe.scheduler, optimizer, length.epochs, length.steps)

    compiled: nn.Module = torch.compile(model) if trainer.compile else model  # type: ignore[assignment]
    return Training(
        model=model,
        trained=compiled,
        gradients=gradients,
        is_sharded=is_sharded,
        optimizer=optimizer,
        schedule=schedule,
        task=build_task(recipe.task, trainer.label_smoothing, runtime.device),
        scaler=torch.amp.GradScaler(runtime.device.type, enabled=trainer.precision == "fp16"),
        sums=Sums(runtime, columns=()),  # the trial of the first batch finds out what the task measures
        first_buffers=first_buffers(model),
    )


def _for_slices(section: Mapping[str, Any]) -> Mapping[str, Any]:
    """The optimizer's section of the configuration for a model that is spread over the ranks.

    Of the optimizers with one fused kernel for a whole step, torch has made only Adam's and AdamW's take
    weights that are spread.
    """
    takes_slices = str(section["_target_"]).endswith((".Adam", ".AdamW"))
    return section if takes_slices or not section.get("fused") else {**section, "fused": False}


def distribute(training: Training, trainer: TrainerConfig, unused: Sequence[str]) -> None:
    """Makes gradients be added up over the ranks. All ranks call this once, before the first step.

    `unused` are the parameters that took no part in the first batch.
    """
    has_unused = bool(unused) or trainer.unused_parameters == "always"
    if not training.is_sharded:
        training.trained = training.gradients.wrap(training.trained, has_unused)


def build_task(section: Mapping[str, Any], label_smoothing: float, device: torch.device) -> Any:
    """The task that the configuration's section describes; raises UserError where it cannot be built."""
    task_is = f"task._target_={section['_target_']}"
    if _is_of_classification(section):
        if label_smoothing and section.get("loss") is not None:
            # It is the cross entropy that is smoothed, and a loss in its place knows nothing of it.
            raise UserError(
                f"trainer.label_smoothing={label_smoothing} is for the cross entropy of "
                "task=classification, but task.loss puts another loss in its place: leave "
                "trainer.label_smoothing out, or task.loss. torch.nn.CrossEntropyLoss has a value "
                "label_smoothing of its own (+task.loss.label_smoothing)."
            )
        task = build("task", section, label_smoothing=label_smoothing)
    elif label_smoothing:
        raise UserError(
            f"trainer.label_smoothing={label_smoothing} is for task=classification, and {task_is} is none: "
            "leave it out, or give task.loss._target_=torch.nn.CrossEntropyLoss +task.loss.label_smoothing."
        )
    else:
        task = build("task", section)
    if not callable(getattr(task, "loss", None)):
        raise UserError(
            f"{task_is} has no method loss(outputs, batch), which gives the loss summed over the examples."
        )
    objects_of(task)
    for part in vars(task).values() if hasattr(task, "__dict__") else ():
        if isinstance(part, nn.Module):  # a loss may have weights of its own, which do not change
            part.to(device)
    return task


def build_model(
    section: Mapping[str, Any], seed: int, dtype: torch.dtype, device: torch.device
) -> nn.Module:
    """The model that the configuration's section describes, with its first weights.

    The weights follow from `seed`, and are of type `dtype`. Raises UserError if the model cannot be
    built, trained or saved.
    """
    torch.manual_seed(seed)
    model: nn.Module = build("model", section)
    _check_model(model, f"model._target_={section['_target_']}")
    _move(model, device, dtype)
    if gains_by_channels_last(model, device):
        model.to(memory_format=torch.channels_last)
    return model


def _spread_model(recipe: Recipe, gradients: Gradients) -> nn.Module:
    """The model that the recipe describes, with its first weights, spread over the ranks; all call."""
    name = f"model._target_={recipe.model['_target_']}"
    torch.manual_seed(recipe.seed)
    return gradients.spread(
        lambda: build("model", recipe.model),
        name,
        dtype=recipe.dtype,
        check=lambda model: _check_model(model, name),
    )


def _check_model(model: nn.Module, target: str) -> None:
    """Raises UserError if the model cannot be trained or saved."""
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise UserError(f"{target} has no parameters to train.")
    for name, value in model.state_dict().items():
        if not isinstance(value, torch.Tensor):
            raise UserError(
                f"{target}: {name} of its state_dict is a {type(value).__name__}, but a checkpoint holds "
                "tensors: register it as a buffer."
            )
        if is_lazy(value):
            raise UserError(
                f"{target}: {name} has no shape before the first batch, but the optimizer needs to know "
                "each weight before: give the layer its size (Linear in place of LazyLinear)."
            )
        if not can_be_saved(value):
            raise UserError(f"{target}: {name} is {why_not_saved(value)}")
    for name, buffer in buffers_left_out(model).items():
        # Such a buffer is saved only where it has changed, and torch compares no sparse tensors.
        if buffer.layout is not torch.strided:
            raise UserError(f"{target}: {name} is {why_not_saved(buffer)}")
    for name, parameter in model.named_parameters():
        if parameter.is_complex():
            raise UserError(
                f"{target}: the parameter {name} is complex, which allranks does not train: hold it as a "
                "real one (torch.view_as_real), and make it complex in forward."
            )


def _move(model: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Moves the model to the device, and converts its floating-point parameters and buffers.

    model.to() would make complex buffers real as well, and drop their imaginary parts.
    """

    def moved(tensor: torch.Tensor) -> torch.Tensor:
        return tensor.to(device, dtype if tensor.is_floating_point() else None)

    model._apply(moved)


def gains_by_channels_last(model: nn.Module, device: torch.device) -> bool:
    """Whether the model's steps are quicker with the channels of each pixel side by side in memory.

    Convolutions and pooling are quicker that way on CPUs and NVIDIA GPUs: a step of our cnn takes half the
    time on a CPU (docs/performance.md). GroupNorm is slower that way, and loses more time than the
    convolutions of a resnet18 gain.
    """
    modules = list(model.modules())
    has_convolutions = any(isinstance(module, nn.Conv2d) for module in modules)
    has_group_norm = any(isinstance(module, nn.GroupNorm) for module in modules)
    return device.type in ("cpu", "cuda") and has_convolutions and not has_group_norm


def build_schedule(
    section: Mapping[str, Any], optimizer: torch.optim.Optimizer, epochs: int, steps: int
) -> Schedule:
    """The scheduler that the configuration's section describes; `epochs` and `steps` are the whole run's.

    If a value in the section is the word `length`, it stands for the number of times that the scheduler
    is stepped in the run.
    """
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
