"""Applies the trained model to the test set once: its accuracy on each class, its mistakes, and examples.

The weights are those of the run's newest checkpoint. Nothing is written, so a run that is still at work is
not disturbed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from allranks.runtime import lean

if TYPE_CHECKING:
    import torch
    from torch import nn

    from allranks.data.parts import Part
    from allranks.inference.load import Trained

STRIP = 10  # examples in a strip, as many as the notebook shows
# With more classes there are no figures for each single class: ImageNet's thousand would fill pages.
MOST_CLASSES = 100
MOST_PIXELS = 96  # along an image's longer side; of a larger image only every second, third, ... is shown
MOST_WEIGHT_IMAGES = 20  # two rows of ten; of a model with more classes no weights are shown


@dataclass(frozen=True)
class ClassFigures:
    """How well one class is recognised. A ratio without a denominator is None."""

    name: str
    precision: float | None  # percent: of the examples predicted as this class, how many belong to it
    recall: float | None  # percent: of the examples of this class, how many are predicted as it
    f1: float | None  # the harmonic mean of precision and recall, in percent
    count: int  # test examples of this class
    mistaken_for: str  # the most frequent wrong prediction for this class; empty if there is none


@dataclass(frozen=True)
class Example:
    """One example of the data, and what the model says of it."""

    position: int  # in the training set or the test set, from 0
    image: np.ndarray | None  # [channels, height, width] of 0..1; None if the examples are not images
    label: str
    predicted: str = ""  # empty for a training example, for which no prediction is made
    probability: float | None = None  # the probability of the predicted class, in percent

    @property
    def title(self) -> str:
        """What stands above the image: the label, or `predicted (true)`."""
        return f"{self.predicted} ({self.label})" if self.predicted else self.label


@dataclass(frozen=True)
class Examined:
    """What one pass over the test set has shown."""

    step: int  # optimizer steps after which the weights were saved
    epoch: int  # completed epochs
    count: int  # test examples
    loss: float  # mean over the test set
    accuracy: float  # percent
    classes: Sequence[str]  # names
    confusion: np.ndarray  # int64 [true class, predicted class]; empty if there are too many classes
    per_class: Sequence[ClassFigures]
    training_digits: Sequence[Example]  # the first ones of the training set
    predictions: Sequence[Example]  # the predictions for the first test examples
    misclassified: Sequence[Example]  # the first test examples with a wrong prediction
    most_certain_mistakes: Sequence[Example]  # wrong predictions, those with the highest probability first
    # The weights of a linear model, [height, width] for each class; empty for other models.
    weights: Sequence[np.ndarray]
    remarks: Sequence[str]  # what the reader should know, a sentence each

    @property
    def has_images(self) -> bool:
        """Whether the examples can be shown."""
        return any(example.image is not None for example in self.predictions)


def examine(directory: Path, device: str | None = None) -> Examined:
    """Loads the run's newest checkpoint and applies the model to the test set.

    `device` is a value of the key `device`; None stands for the run's own. Raises UserError if there is no
    checkpoint, if another version has written it, or if the model or the data cannot be built here.
    """
    with lean.quick_import():  # torch is imported here
        from allranks.inference.forward import class_names, forward, open_part
        from allranks.inference.load import load

    trained = load(directory, device=device)
    test = open_part(trained, "test")
    train = open_part(trained, "train")
    outputs = forward(trained, test)
    names = class_names(trained, test, outputs.logits.shape[1])

    probabilities = outputs.probabilities
    certainty = probabilities.max(dim=1).values
    predictions = outputs.predictions
    wrong = (predictions != outputs.labels).nonzero().flatten()
    by_certainty = wrong[certainty[wrong].argsort(descending=True, stable=True)]

    def examples(positions: torch.Tensor) -> list[Example]:
        """The first STRIP of the test examples at these positions, with their predictions."""
        chosen = positions[:STRIP].tolist()
        images = _images(trained, test, chosen)
        return [
            Example(
                position=position,
                image=image,
                label=names[int(outputs.labels[position])],
                predicted=names[int(predictions[position])],
                probability=100 * float(certainty[position]),
            )
            for position, image in zip(chosen, images, strict=True)
        ]

    is_small = len(names) <= MOST_CLASSES
    confusion = outputs.confusion().numpy() if is_small else np.zeros((0, 0), np.int64)
    return Examined(
        step=trained.step,
        epoch=trained.epoch,
        count=outputs.figures.examples,
        loss=outputs.figures.loss,
        # A task of the user's own may measure other things.
        accuracy=100 * (predictions == outputs.labels).sum().item() / len(predictions),
        classes=names,
        confusion=confusion,
        per_class=per_class(confusion, names),
        training_digits=_first_of_training(trained, train, names),
        predictions=examples(predictions.new_tensor(range(min(STRIP, len(test))))),
        misclassified=examples(wrong),
        most_certain_mistakes=examples(by_certainty),
        weights=weight_images(trained.model, trained.config.data["input_shape"], len(names)),
        remarks=[f"{remark[:1].upper()}{remark[1:]}." for remark in trained.remarks],
    )


def per_class(confusion: np.ndarray, names: Sequence[str]) -> list[ClassFigures]:
    """Precision, recall and F1 of each class, from a confusion matrix [true class, predicted class]."""
    found = []
    for number in range(len(confusion)):
        right = int(confusion[number, number])
        count = int(confusion[number].sum())
        taken_for_it = int(confusion[:, number].sum())
        mistakes = confusion[number].copy()
        mistakes[number] = 0
        found.append(
            ClassFigures(
                name=names[number],
                precision=_percent(right, taken_for_it),
                recall=_percent(right, count),
                f1=_percent(2 * right, count + taken_for_it),
                count=count,
                mistaken_for=names[int(mistakes.argmax())] if mistakes.any() else "",
            )
        )
    return found


def _percent(part: int, whole: int) -> float | None:
    return 100 * part / whole if whole else None


# --- images ----------------------------------------------------------------------------------------------


def _first_of_training(trained: Trained, train: Part, names: Sequence[str]) -> list[Example]:
    """The first examples of the training set with their labels."""
    positions = list(range(min(STRIP, len(train))))
    if not positions:
        return []
    labels = train.first(len(positions), trained.config.seed).labels.tolist()
    images = _images(trained, train, positions)
    return [
        Example(position, image, names[label])
        for position, image, label in zip(positions, images, labels, strict=True)
    ]


def _images(trained: Trained, part: Part, positions: Sequence[int]) -> list[np.ndarray | None]:
    """The images at these positions, small enough to be shown; None for examples that are not images."""
    from allranks.inference.forward import images_at

    if not positions:
        return []
    images = images_at(trained, part, positions)
    if not is_image_shape(images.shape[1:]) or not images.is_floating_point():
        return [None] * len(positions)
    step = _every(images.shape[1:])
    return list(_scaled(images[:, :, ::step, ::step].float().numpy()))


def _every(shape: Sequence[int]) -> int:
    """The step between the pixels that are shown of an image [channels, height, width]; 1 shows them all.

    Large images are shown coarsely, so that a page stays small.
    """
    return -(-max(shape[1:]) // MOST_PIXELS)  # rounded up


def is_image_shape(shape: Sequence[int]) -> bool:
    """Whether this is the shape of an image: [channels, height, width] with one or three channels."""
    return len(shape) == 3 and shape[0] in (1, 3) and min(shape[1:]) > 1


def _scaled(images: np.ndarray) -> np.ndarray:
    """The images [examples, channels, height, width], scaled to values from 0 to 1 where they are not so.

    A user's data set may normalise its images, which gives values below 0 or above 1. Then each channel is
    scaled by its own lowest and highest value over all images.
    """
    if images.min() >= 0 and images.max() <= 1:
        return images
    low = images.min(axis=(0, 2, 3), keepdims=True)
    high = images.max(axis=(0, 2, 3), keepdims=True)
    scaled: np.ndarray = (images - low) / np.maximum(high - low, 1e-12)
    return scaled


def weight_images(model: nn.Module, input_shape: Sequence[int], classes: int) -> list[np.ndarray]:
    """For each class the weights of a linear model as an image [height, width]; empty for other models.

    A model is linear where its only layer with parameters is one dense layer over all pixels, with one
    output for each of the `classes`. The weights of three channels are averaged.
    """
    import torch

    layers = [module for module in model.modules() if list(module.parameters(recurse=False))]
    if len(layers) != 1 or not isinstance(layers[0], torch.nn.Linear) or not is_image_shape(input_shape):
        return []
    weight = layers[0].weight.detach().cpu().float()
    if weight.shape != (classes, np.prod(input_shape)) or classes > MOST_WEIGHT_IMAGES:
        return []
    step = _every(input_shape)
    return list(weight.view(len(weight), *input_shape).mean(dim=1)[:, ::step, ::step].numpy())
