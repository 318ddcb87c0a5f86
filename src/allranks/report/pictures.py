"""The pictures of a report: those of a run's records, and those of the model's test results."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from allranks.report import curves
from allranks.report.drawing import (
    DARK,
    LIGHT,
    POINTS_PER_INCH,
    TITLE_PT,
    WIDTH_IN,
    Picture,
    as_picture,
    new_figure,
    style,
)
from allranks.report.examine import Examined, Example
from allranks.report.gather import RunFacts
from allranks.report.png import as_pixels

LONGEST_NAME = 20  # letters of a class's name beside the confusion matrix: longer ones would take its place
MOST_COUNTED_CLASSES = 20  # the confusion matrix of at most so many classes shows its numbers


def of_run(facts: RunFacts) -> list[Picture]:
    """The pictures of a run's records. A picture that would show nothing is left out."""
    drawn = [curves.draw(facts, wanted) for wanted in curves.curves_of(facts)]
    drawn += [curves.throughput(facts), curves.phases(facts)]
    return [picture for picture in drawn if picture is not None]


def of_test(seen: Examined) -> list[Picture]:
    """The pictures of the model's test results. A picture that would show nothing is left out."""
    drawn = [confusion(seen)]
    strips = (
        ("training-examples", "The first training examples", seen.training_digits),
        ("predictions", "The first predictions", seen.predictions),
        ("misclassified", "The first mistakes: predicted (true)", seen.misclassified),
        ("certain-mistakes", "The most certain mistakes: predicted (true)", seen.most_certain_mistakes),
    )
    drawn += [strip(name, title, examples) for name, title, examples in strips]
    drawn.append(weights(seen))
    return [picture for picture in drawn if picture is not None]


# --- the test set ----------------------------------------------------------------------------------------


def confusion(seen: Examined) -> Picture | None:
    """The confusion matrix: how many examples of each class (row) were predicted as each class (column).

    Returns None for fewer than two classes.
    """
    counts = seen.confusion
    classes = len(counts)
    if classes < 2:
        return None
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    most = (shares - np.diag(np.diag(shares))).max() or 1.0  # the most frequent mistake
    side_in = min(9.0, max(WIDTH_IN, 0.42 * classes))
    with style():
        from matplotlib.patches import Rectangle

        figure, axes = new_figure("Confusion matrix", side_in, side_in)
        for true in range(classes):
            for predicted in range(classes):
                is_right = true == predicted
                share = shares[true, predicted]
                # Right predictions are blue, mistakes orange. The square root makes rare mistakes visible.
                strength = 0.9 * float(share if is_right else math.sqrt(share / most))
                colour = "blue" if is_right else "orange"
                cell = Rectangle((predicted - 0.47, true - 0.47), 0.94, 0.94, color=LIGHT[colour])
                cell.set(alpha=strength, linewidth=0)
                axes.add_patch(cell)
                if classes <= MOST_COUNTED_CLASSES and counts[true, predicted]:
                    letters = LIGHT[_letters_on(colour, strength)]
                    count = str(counts[true, predicted])
                    axes.text(predicted, true, count, ha="center", va="center", fontsize=8, color=letters)
        axes.set_xlim(-0.5, classes - 0.5)
        axes.set_ylim(classes - 0.5, -0.5)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        every = -(-classes // MOST_COUNTED_CLASSES)
        ticks = range(0, classes, every)
        names = [_cut(seen.classes[number]) for number in ticks]
        is_long = max(map(len, names)) > 3
        axes.set_xticks(ticks, names, rotation=90 if is_long else 0)
        axes.set_yticks(ticks, names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        longest_in = 0.085 * max(map(len, names)) if is_long else 0.1
        figure.subplots_adjust(
            left=(0.5 + longest_in) / side_in, right=0.99, bottom=(0.5 + longest_in) / side_in
        )
        right = int(np.trace(counts))
        words = (
            f"A table of {classes} by {classes} classes: {right:,} of {int(counts.sum()):,} test examples "
            "are on the diagonal, where the prediction is right."
        )
        return as_picture(figure, "confusion", "Confusion matrix", words)


def _cut(name: str) -> str:
    """The name of a class with LONGEST_NAME letters at most."""
    return name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 3]}..."


def _letters_on(colour: str, strength: float) -> str:
    """The name of a colour for letters on a cell of a confusion matrix, which must be readable.

    The cell has the given colour with an opacity of `strength`, from 0 to 1, on the background "paper". The
    letters must be readable on light pages and on dark ones.
    """
    is_dark_on_light = _is_nearer_to_ink(LIGHT, colour, strength)
    is_light_on_dark = _is_nearer_to_ink(DARK, colour, strength)
    if is_dark_on_light and is_light_on_dark:
        return "ink"
    return "ink-on-half" if is_dark_on_light else "paper"


def _is_nearer_to_ink(scheme: Mapping[str, str], colour: str, strength: float) -> bool:
    """Whether letters in the colour "ink" have more contrast here than letters in the colour "paper".

    Contrast is measured as in the Web Content Accessibility Guidelines (WCAG).
    """
    paper, full = (np.array(_rgb(scheme[name])) for name in ("paper", colour))
    ground = _luminance(paper + (full - paper) * strength)
    ink = _luminance(np.array(_rgb(scheme["ink"])))
    return _contrast(ink, ground) >= _contrast(_luminance(paper), ground)


def _contrast(one: float, other: float) -> float:
    """The contrast ratio of WCAG between two relative luminances: from 1 for equal ones to 21."""
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def _luminance(rgb: np.ndarray) -> float:
    """The relative luminance of WCAG for red, green and blue from 0 to 255: 0 is black, 1 is white."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def strip(name: str, title: str, examples: Sequence[Example]) -> Picture | None:
    """Images side by side, each below its title; None if no example has an image."""
    shown = [example for example in examples if example.image is not None]
    if not shown:
        return None
    images = [as_pixels(example.image) for example in shown if example.image is not None]
    titles = [example.title for example in shown]
    return _row_of_images(name, title, images, titles, ", ".join(titles))


def weights(seen: Examined) -> Picture | None:
    """The weights of a linear model as an image for each class; None for other models.

    A pixel is blue where a bright input speaks for the class, and orange where it speaks against it.
    """
    if not seen.weights:
        return None
    images = weight_pixels(seen.weights)
    names = list(seen.classes)
    words = "for each class its weights as an image: blue speaks for the class, orange against it"
    return _row_of_images("weights", "Weights of each class", images, names, words)


def weight_pixels(weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The weights of each class as uint8 pixels [height, width, 3].

    0 is white, positive weights are blue, negative ones are orange. All classes have the same scale, so
    that their images can be compared.
    """
    most = max(float(np.abs(weight).max()) for weight in weights) or 1.0
    white, blue, orange = (np.array(_rgb(colour)) for colour in ("#ffffff", LIGHT["blue"], LIGHT["orange"]))
    drawn = []
    for weight in weights:
        strength = np.sqrt(np.abs(weight) / most)[..., None]  # the root lets small weights be seen
        colour = np.where(weight[..., None] > 0, blue, orange)
        drawn.append(np.round(white + (colour - white) * strength).astype(np.uint8))
    return drawn


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


# The places of images in a strip, in inches: a cell for each, with its title above it.
_CELL_WIDTH_IN, _CELL_HEIGHT_IN = 0.95, 1.15
_IMAGE_IN = 0.86  # the longer side of an image
_LETTERS_IN = 0.2  # height of the line with an image's title


def _row_of_images(
    name: str, title: str, images: Sequence[np.ndarray], titles: Sequence[str], words: str
) -> Picture:
    """Images side by side, ten in a row, each with its title above it."""
    columns = min(10, len(images))
    rows = -(-len(images) // columns)
    width_in = _CELL_WIDTH_IN * columns
    grid_in = _CELL_HEIGHT_IN * rows
    title_in = TITLE_PT / POINTS_PER_INCH
    with style():
        from matplotlib.figure import Figure

        whole_in = grid_in + title_in
        figure = Figure(figsize=(width_in, whole_in))
        at_top = 1 - 6 / POINTS_PER_INCH / whole_in
        figure.text(0.01, at_top, title, va="top", weight="bold", gid="title")
        # All images are in one pair of axes, whose unit is an inch. With axes of its own, each image would
        # take as long as a curve.
        axes = figure.add_axes((0, 0, 1, grid_in / whole_in))
        for number, (image, above) in enumerate(zip(images, titles, strict=True)):
            row, column = divmod(number, columns)
            middle = (column + 0.5) * _CELL_WIDTH_IN
            top = row * _CELL_HEIGHT_IN + _LETTERS_IN
            height, width = image.shape[:2]
            half_width = 0.5 * _IMAGE_IN * width / max(height, width)
            bottom = top + _IMAGE_IN * height / max(height, width)
            axes.imshow(
                image, cmap="gray", vmin=0, vmax=255, interpolation="nearest", aspect="auto",
                extent=(middle - half_width, middle + half_width, bottom, top),
            )  # fmt: skip
            axes.text(middle, top - 0.04, above, ha="center", va="bottom", fontsize=9)
        axes.set_xlim(0, width_in)
        axes.set_ylim(grid_in, 0)
        axes.set_axis_off()
        return as_picture(figure, name, title, f"{title}: {words}.")
