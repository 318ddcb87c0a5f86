"""The tasks that `task=` selects: what a batch is, what the loss of a model is, and what is measured.

A task is an object with at most three methods, each called with whole batches:

    outputs(model, batch)   what the model says of a batch. May be left out: model(inputs), where the batch
                            is a pair (inputs, targets).
    loss(outputs, batch)    one number: the loss, *summed* over the examples of the batch. It is asked for
                            in training, where it gives the gradient, and in evaluations.
    metrics(outputs, batch) what else is measured, by name. May be left out. A tensor of one number is a sum
                            over the examples, and their mean is shown; Mean says otherwise.

All are sums, because sums add up: over the pieces of a batch, over ranks whose shares differ, and over a
whole epoch, always to the mean over all examples.

A metric that is not a mean, such as an AUROC, is measured by objects of torchmetrics (or with the same
methods): the task has them in its attribute `torchmetrics`, by name, and metrics() gives for each of these
names the arguments of its update(), as a tuple.

A user's own task needs no base class. docs/own-components.md has an example.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any, Literal, NamedTuple, Protocol

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from allranks.base.errors import UserError

IGNORED = -100  # a target that is none, as torch's losses have it by default

log = logging.getLogger(__name__)


class Task(Protocol):
    """What a task needs. The other two methods may be left out."""

    def loss(self, outputs: Any, batch: Any) -> torch.Tensor:
        """The loss, summed over the examples of the batch: a tensor of one number."""


class Mean(NamedTuple):
    """A metric that is shown otherwise than as the mean over the examples."""

    total: torch.Tensor  # one number: the sum over this batch
    weight: torch.Tensor | int | None = None  # what the sum is divided by; None: the number of examples
    # `percent` shows a hundred times the mean, and `exp` e to the power of it.
    shown: Literal["mean", "percent", "exp"] = "mean"


def outputs_of(task: Any, model: nn.Module, batch: Any) -> Any:
    """What the model says of the batch, by the task's own method or by the usual one."""
    if hasattr(task, "outputs"):
        return task.outputs(model, batch)
    return model(_pair(batch)[0])


def metrics_of(task: Any, outputs: Any, batch: Any) -> Mapping[str, Any]:
    """What the task measures of the batch besides the loss; nothing if it has no method for it."""
    measured: Mapping[str, Any] = task.metrics(outputs, batch) if hasattr(task, "metrics") else {}
    return measured


def is_classification(target: object) -> bool:
    """Whether what makes a task makes a classification, of images with labels."""
    return isinstance(target, type) and issubclass(target, Classification)


# --- the shipped tasks -----------------------------------------------------------------------------------


class Classification:
    """Each example is of one class: a pair (image, label), of which the model makes a logit for each class.

    loss: in place of the cross entropy, an object or function that is called with logits [n, classes] and
    labels [n]; torchmetrics: objects that are given the probabilities [n, classes] and the labels, or the
    probability of class 1 [n] where their name begins with `Binary`; label_smoothing: the share of a
    label's weight that is spread over all classes in training.
    """

    def __init__(
        self,
        loss: Callable[..., torch.Tensor] | None = None,
        torchmetrics: Mapping[str, Any] | None = None,
        label_smoothing: float = 0.0,
    ) -> None:
        self.own_loss = _per_example(loss)
        self.torchmetrics = dict(torchmetrics or {})
        self.label_smoothing = label_smoothing

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        """The cross entropy, summed over the examples; raises UserError where a label is not a class."""
        labels = batch[1]
        if self.own_loss is not None:
            return _summed(self.own_loss(at_least_fp32(outputs), labels), len(labels))
        # Smoothing belongs to training: evaluations, which need no gradients, measure without it.
        smoothing = self.label_smoothing if torch.is_grad_enabled() else 0.0
        try:
            return cross_entropy(at_least_fp32(outputs), labels, reduction="sum", label_smoothing=smoothing)
        except IndexError as error:
            classes = outputs.shape[1]
            numbers = labels.long()  # among labels of bytes, IGNORED would be compared as 156
            wrong = numbers[((numbers < 0) | (numbers >= classes)) & (numbers != IGNORED)]
            raise UserError(
                f"Label {int(wrong[0])} does not fit the model's {classes} outputs: labels "
                "count from 0; give data.classes and model.classes as the data has them."
            ) from error

    def metrics(self, outputs: torch.Tensor, batch: Any) -> dict[str, Any]:
        """The accuracy, in percent."""
        labels = batch[1]
        found: dict[str, Any] = {"accuracy": Mean((outputs.argmax(dim=1) == labels).sum(), shown="percent")}
        if self.torchmetrics:
            # Of numbers between 0 and 1 torchmetrics takes it that they are probabilities, and of others
            # that they are logits, batch by batch. So it gets probabilities.
            probabilities = at_least_fp32(outputs).softmax(dim=1)
            for name, metric in self.torchmetrics.items():
                is_binary = type(metric).__name__.startswith("Binary")
                found[name] = (probabilities[:, 1] if is_binary else probabilities, labels)
        return found


class Regression:
    """Numbers are predicted: each example is a pair (inputs, targets), and outputs are shaped as targets.

    loss: an object or function that is called with outputs and targets, by default the squared error;
    torchmetrics: objects that are given outputs and targets.
    """

    def __init__(
        self,
        loss: Callable[..., torch.Tensor] | None = None,
        torchmetrics: Mapping[str, Any] | None = None,
    ) -> None:
        self.own_loss = _per_example(loss or nn.MSELoss())
        self.torchmetrics = dict(torchmetrics or {})

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        """For each example the mean over its numbers, summed over the examples."""
        return _loss_of_numbers(self.own_loss, outputs, batch)

    def metrics(self, outputs: torch.Tensor, batch: Any) -> dict[str, Any]:
        """`mae`, the mean absolute error."""
        return _metrics_of_numbers(self.torchmetrics, outputs, batch)


class Segmentation:
    """Each pixel is of one class: a pair (image, mask), of which the model makes logits [n, classes, ...].

    A mask is whole numbers [n, ...]; where it is `ignore`, nothing is learned and nothing measured. Images
    of type uint8 become numbers of 0..1. loss: in place of the cross entropy, an object or function that is
    called with logits and masks; torchmetrics: objects that are given logits and masks. Both get the masks
    as they are, `ignore` included. Of a loss of torch.nn that gives a number for each pixel, those of the
    pixels that are `ignore` are left out; any other loss leaves them out by itself.
    """

    def __init__(
        self,
        loss: Callable[..., torch.Tensor] | None = None,
        torchmetrics: Mapping[str, Any] | None = None,
        ignore: int = IGNORED,
    ) -> None:
        self.own_loss = _per_example(loss)
        self.torchmetrics = dict(torchmetrics or {})
        self.ignore = ignore

    def outputs(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The model's logits [n, classes, ...]."""
        outputs: torch.Tensor = model(pixels(_pair(batch)[0], model))
        return outputs

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        """For each image the mean over its pixels, summed over the images."""
        masks = self._masks(outputs, batch)
        return _loss_of_classes(self.own_loss, outputs, masks, self.ignore)

    def metrics(self, outputs: torch.Tensor, batch: Any) -> dict[str, Any]:
        """The accuracy, in percent of the pixels."""
        masks = self._masks(outputs, batch)
        found: dict[str, Any] = {"accuracy": _right(outputs, masks, self.ignore)}
        return found | {name: (at_least_fp32(outputs), masks) for name in self.torchmetrics}

    def _masks(self, outputs: Any, batch: Any) -> torch.Tensor:
        masks = _pair(batch)[1]
        _check_classes("segmentation", "mask", outputs, masks, self.ignore)
        return masks.long()


class Autoencoder:
    """The model gives its inputs back: a batch is the inputs, or a pair whose first part they are.

    Images of type uint8 become numbers of 0..1. loss: an object or function that is called with outputs and
    inputs, by default the squared error; torchmetrics: objects that are given outputs and inputs.
    """

    def __init__(
        self,
        loss: Callable[..., torch.Tensor] | None = None,
        torchmetrics: Mapping[str, Any] | None = None,
    ) -> None:
        self.own_loss = _per_example(loss or nn.MSELoss())
        self.torchmetrics = dict(torchmetrics or {})

    def outputs(self, model: nn.Module, batch: Any) -> Any:
        """What the model makes of the inputs."""
        return model(pixels(_inputs(batch), model))

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        """For each example the mean over its numbers, summed over the examples."""
        return _loss_of_numbers(self.own_loss, outputs, _with_themselves(batch))

    def metrics(self, outputs: torch.Tensor, batch: Any) -> dict[str, Any]:
        """`mae`, the mean absolute error."""
        return _metrics_of_numbers(self.torchmetrics, outputs, _with_themselves(batch))


class LanguageModel:
    """The next token is predicted: a batch is tokens [n, length], whole numbers.

    The model gets all tokens but the last, and makes logits [n, length - 1, vocabulary] for those that
    follow. A batch may be a pair (tokens, next tokens) as well: then the model gets all of the first. If
    a target is `ignore`, nothing is learned and nothing measured. loss: in place of the cross entropy, an
    object or function that is called with logits [n, vocabulary, length - 1] and targets [n, length - 1];
    torchmetrics: objects that are given logits [n, length - 1, vocabulary] and targets. Both get the
    targets as they are, `ignore` included. Of a loss of torch.nn that gives a number for each token, those
    of the targets that are `ignore` are left out; any other loss leaves them out by itself.
    """

    def __init__(
        self,
        loss: Callable[..., torch.Tensor] | None = None,
        torchmetrics: Mapping[str, Any] | None = None,
        ignore: int = IGNORED,
    ) -> None:
        self.own_loss = _per_example(loss)
        self.torchmetrics = dict(torchmetrics or {})
        self.ignore = ignore

    def outputs(self, model: nn.Module, batch: Any) -> torch.Tensor:
        """The model's logits [n, length - 1, vocabulary]."""
        outputs: torch.Tensor = model(self._tokens(batch)[0])
        return outputs

    def loss(self, outputs: torch.Tensor, batch: Any) -> torch.Tensor:
        """For each text the mean cross entropy over its tokens, summed over the texts."""
        logits, targets = self._both(outputs, batch)
        return _loss_of_classes(self.own_loss, logits, targets, self.ignore)

    def metrics(self, outputs: torch.Tensor, batch: Any) -> dict[str, Any]:
        """The perplexity, and the accuracy in percent: both over all tokens."""
        logits, targets = self._both(outputs, batch)
        losses = _losses_of_tokens(logits, targets, self.ignore)
        count = (targets != self.ignore).sum()
        found: dict[str, Any] = {
            "perplexity": Mean(losses.sum(), count, "exp"),
            "accuracy": _right(logits, targets, self.ignore),
        }
        return found | {name: (at_least_fp32(outputs), targets) for name in self.torchmetrics}

    def _tokens(self, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """(what the model gets, what follows each token)."""
        tokens = batch if isinstance(batch, torch.Tensor) else _pair(batch)[0]
        if not isinstance(tokens, torch.Tensor) or tokens.is_floating_point() or tokens.dim() != 2:
            raise UserError(
                "The task language_model takes batches of tokens [n, length], whole numbers, but got "
                f"{_told(tokens)}."
            )
        if isinstance(batch, torch.Tensor):
            return tokens[:, :-1].long(), tokens[:, 1:].long()
        targets = _pair(batch)[1]
        if not isinstance(targets, torch.Tensor) or targets.is_floating_point():
            raise UserError(
                "The task language_model takes what follows each token as whole numbers [n, length], but "
                f"got {_told(targets)}."
            )
        return tokens.long(), targets.long()

    def _both(self, outputs: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits [n, vocabulary, length] and targets [n, length], as torch's cross entropy takes them."""
        targets = self._tokens(batch)[1]
        if not isinstance(outputs, torch.Tensor) or outputs.dim() != 3:
            raise UserError(
                f"The task language_model needs logits [{len(targets)}, {targets.shape[1]}, vocabulary] of "
                f"the model, but got {_told(outputs)}."
            )
        logits = outputs.transpose(1, 2)
        _check_classes("language_model", "next token", logits, targets, self.ignore)
        return logits, targets


# --- what they share -------------------------------------------------------------------------------------


def pixels(inputs: torch.Tensor, model: nn.Module) -> torch.Tensor:
    """Images of type uint8 as numbers of 0..1, in the type of the model's weights; others as they are."""
    if inputs.dtype != torch.uint8:
        return inputs
    return inputs.to(next(model.parameters()).dtype) / 255


def at_least_fp32(logits: torch.Tensor) -> torch.Tensor:
    """The logits in float32, or in float64 where they are so: sums in a smaller type lose digits."""
    return logits if logits.dtype == torch.float64 else logits.float()


def _per_example(loss: Any) -> Any:
    """The loss; one of torch.nn is told to give its numbers one by one, and not their mean."""
    if _gives_numbers_one_by_one(loss):
        if loss.reduction not in ("mean", "none"):
            log.warning(
                "task.loss.reduction=%s has no effect: the loss of a batch is always the mean over its "
                "examples, and that of an example the mean over its numbers. Leave it out, or give a loss "
                "of your own.", loss.reduction,
            )  # fmt: skip
        loss.reduction = "none"
    return loss


def _gives_numbers_one_by_one(loss: Any) -> bool:
    """Whether the loss is one of torch.nn, or like these, which can be told how to put numbers together."""
    return isinstance(getattr(loss, "reduction", None), str)


def _summed(losses: Any, count: int) -> torch.Tensor:
    """The sum over `count` examples of what a loss has given: [count, ...], or one number, their mean."""
    if isinstance(losses, torch.Tensor) and losses.dim() == 0:
        return losses * count
    if isinstance(losses, torch.Tensor) and losses.shape[0] == count:
        return _mean_of_each(losses).sum()
    raise UserError(
        f"task.loss gives {_told(losses)} for {count} examples: a loss gives one number, the mean over the "
        f"examples, or a tensor with an entry for each of them, [{count}, ...]."
    )


def _mean_of_each(values: torch.Tensor) -> torch.Tensor:
    """[n] from [n, ...]: for each example the mean over its numbers."""
    return values if values.dim() == 1 else values.flatten(1).mean(dim=1)


def _pair(batch: Any) -> Any:
    """The batch, if it is a pair (inputs, targets); raises UserError where it is not."""
    if not isinstance(batch, list | tuple) or len(batch) != 2:
        raise UserError(
            f"The task takes batches that are a pair (inputs, targets), but got {_told(batch)}: return "
            "such pairs from the Dataset, or give a task of your own (task=own) a method outputs(model, "
            "batch)."
        )
    return batch


def _inputs(batch: Any) -> torch.Tensor:
    inputs = batch if isinstance(batch, torch.Tensor) else _pair(batch)[0]
    if not isinstance(inputs, torch.Tensor):
        raise UserError(f"The task autoencoder takes batches of a tensor, but got {_told(inputs)}.")
    return inputs


def _with_themselves(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs of a batch as a pair of inputs and targets."""
    inputs = _inputs(batch)
    if inputs.dtype == torch.uint8:
        inputs = inputs / 255
    return inputs, inputs


def _side_by_side(outputs: Any, batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """Outputs and targets in one shape and type; raises UserError where they do not fit together.

    Both are [n, ...], with an entry for each example. torch itself would stretch [n, 1] and [n] to [n, n]
    with no more than a warning. Here they are taken for the same numbers.
    """
    targets = _pair(batch)[1]
    if not isinstance(outputs, torch.Tensor) or not isinstance(targets, torch.Tensor):
        raise UserError(
            f"The task needs outputs that are a tensor like the targets, but the model gives "
            f"{_told(outputs)} and the data {_told(targets)}."
        )
    if outputs.is_complex() or targets.is_complex():
        raise UserError(
            f"The task takes no complex numbers, but the model gives {_told(outputs)} and the data "
            f"{_told(targets)}: give real and imaginary part as two numbers (torch.view_as_real)."
        )
    if [size for size in outputs.shape if size > 1] != [size for size in targets.shape if size > 1]:
        raise UserError(
            f"The model gives {_told(outputs)}, but the targets are {_told(targets)}: the task needs both "
            "in one shape."
        )
    outputs = at_least_fp32(outputs)
    if outputs.shape[:1] != targets.shape[:1]:
        # A model that ends in squeeze() gives [] for a batch of a single example, and [5] for one of five
        # numbers. Without a dimension for the examples nobody could tell how many they are.
        outputs = outputs.reshape(targets.shape)
    return outputs, targets.reshape(outputs.shape).to(outputs.dtype)


def _loss_of_numbers(own_loss: Any, outputs: Any, batch: Any) -> torch.Tensor:
    """For each example the mean of the loss over its numbers, summed over the examples."""
    outputs, targets = _side_by_side(outputs, batch)
    return _summed(own_loss(outputs, targets), len(targets))


def _metrics_of_numbers(objects: Mapping[str, Any], outputs: Any, batch: Any) -> dict[str, Any]:
    """`mae`, the mean absolute error, and what the torchmetrics objects are given."""
    outputs, targets = _side_by_side(outputs, batch)
    found: dict[str, Any] = {"mae": _mean_of_each((outputs - targets).abs()).sum()}
    return found | {name: (outputs, targets) for name in objects}


def _check_classes(task: str, what: str, outputs: Any, targets: Any, ignore: int) -> None:
    """Raises UserError unless outputs are [n, classes, ...] and targets whole numbers [n, ...].

    `...` is one dimension or more: targets [n] are labels of whole examples, as for task=classification.
    """
    is_fitting = (
        isinstance(outputs, torch.Tensor)
        and isinstance(targets, torch.Tensor)
        and targets.dim() > 1
        and outputs.dim() == targets.dim() + 1
        and outputs.shape[0] == targets.shape[0]
        and outputs.shape[2:] == targets.shape[1:]
        and outputs.is_floating_point()
        and not targets.is_floating_point()
    )
    if not is_fitting:
        raise UserError(
            f"The task {task} needs logits [n, classes, ...] and for each place a {what}, a whole number "
            f"[n, ...], where ... is one dimension or more, but the model gives {_told(outputs)} and the "
            f"data {_told(targets)}."
        )
    if not targets.is_cpu:
        return  # to look at numbers on a GPU would make the CPU wait for it, in every step
    targets = targets.long()  # in a mask of bytes, -100 would be compared as 156
    counted = targets[targets != ignore]
    if counted.numel() and not 0 <= int(counted.min()) <= int(counted.max()) < outputs.shape[1]:
        wrong = counted[(counted < 0) | (counted >= outputs.shape[1])]
        raise UserError(
            f"A {what} is {int(wrong[0])}, but the model gives "
            f"{outputs.shape[1]} classes, which count from 0; {ignore} stands for none."
        )


def _losses_of_tokens(logits: torch.Tensor, targets: torch.Tensor, ignore: int) -> torch.Tensor:
    """The cross entropy of each place, [n, ...]; 0 where the target is `ignore`."""
    return cross_entropy(at_least_fp32(logits), targets, reduction="none", ignore_index=ignore)


def _loss_of_classes(
    own_loss: Any, logits: torch.Tensor, targets: torch.Tensor, ignore: int
) -> torch.Tensor:
    """The user's own loss, or else the cross entropy of all places that are not `ignore`.

    If a loss of torch.nn gives a number for each place, the places that are `ignore` are left out of the
    mean over an example's places. Of any other loss only its result is known: it leaves them out by itself.
    """
    if own_loss is None:
        return _token_loss(logits, targets, ignore)
    losses = own_loss(at_least_fp32(logits), targets)
    is_by_place = (
        _gives_numbers_one_by_one(own_loss)
        and isinstance(losses, torch.Tensor)
        and losses.shape == targets.shape
    )
    if not is_by_place:
        return _summed(losses, len(targets))
    ignored = targets == ignore
    means = _mean_of_each(losses.masked_fill(ignored, 0))  # over all places
    places = targets[0].numel()
    counted = (places - ignored.flatten(1).sum(dim=1)).clamp(min=1)
    # This factor is exactly 1 where nothing is ignored, so that the bits are those of the mean.
    return (means * (places / counted.to(means.dtype))).sum()


def _token_loss(logits: torch.Tensor, targets: torch.Tensor, ignore: int) -> torch.Tensor:
    """For each example the mean over its places that are not `ignore`, summed over the examples."""
    losses = _losses_of_tokens(logits, targets, ignore).flatten(1).sum(dim=1)
    counts = (targets != ignore).flatten(1).sum(dim=1).clamp(min=1)
    return (losses / counts).sum()


def _right(logits: torch.Tensor, targets: torch.Tensor, ignore: int) -> Mean:
    """The share of places whose likeliest class is the target, in percent."""
    is_right = (logits.argmax(dim=1) == targets) & (targets != ignore)
    return Mean(is_right.sum(), (targets != ignore).sum(), "percent")


def _told(value: Any) -> str:
    """What a value is, for messages."""
    if isinstance(value, torch.Tensor):
        return f"a tensor {list(value.shape)} of {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__} with {', '.join(map(str, value))}"
    if isinstance(value, list | tuple):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {type(value).__name__}"
