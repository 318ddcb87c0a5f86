"""From an image file to the numbers that a model takes: read, put on a dark ground, fitted, scaled.

A model knows only what its training data look like. MNIST's digits are light on dark, fit a box of 20 x 20
pixels with their proportions kept, and stand in 28 x 28 pixels with their centre of mass in the middle
(http://yann.lecun.com/exdb/mnist/). A scanned or drawn digit does not look like this, so it is brought
into this form first. Each prediction says what was done to the image, because a wrong guess here leads to a
wrong class.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image, ImageFilter, ImageOps, UnidentifiedImageError

from allranks.base.errors import MISFITS, UserError
from allranks.base.text import one_line

MOST_PIXELS = 100_000_000  # 10,000 x 10,000, some 400 MB in memory: more would fill the memory
BOX = 20  # pixels: the longer side of a digit in MNIST
MNIST_SIDE = 28  # pixels
CENTRE = 14.0  # the pixel at which MNIST puts a digit's centre of mass, counted from 0
INK = (
    0.2  # a pixel with this share of the strongest ink, or more, belongs to the digit and not to the paper
)
# A digit is first scaled to a box FINE times as large as BOX. There the width of its strokes is measured.
FINE = 5
# Pixels, in a box of 20: thinner strokes are made this wide. Three quarters of MNIST's strokes are as wide.
PEN = 2.0
FAINTEST = 16  # grey values of 255: an image whose pixels differ by less has nothing on it

FITS = ("auto", "digit", "whole", "crop")
POLARITIES = ("auto", "keep", "invert")


class Prepared(NamedTuple):
    """An image as the model takes it."""

    # [channels, height, width]; the values are 0..1 unless the data's own transform makes others.
    pixels: torch.Tensor
    inverted: bool  # light and dark were exchanged
    how: str  # what was done to it, in words


class Plan(NamedTuple):
    """How images are prepared for a model."""

    shape: tuple[int, int, int]  # channels, height and width of the model's input
    fit: str  # digit, whole or crop
    polarity: str  # auto: a light ground is made dark; keep; invert
    transform: Callable[[Any], Any] | None = (
        None  # the data's own transform; used in place of fit and polarity
    )


def plan(
    shape: Sequence[int], fit: str, polarity: str, is_fashion: bool, transform: Callable[[Any], Any] | None
) -> Plan:
    """How images are prepared for a model whose input has this shape.

    Raises UserError if no image can have the shape, or if `fit` does not suit it.
    `fit` and `polarity` are the user's: `auto` takes what suits data of this shape.
    """
    if len(shape) != 3 or shape[0] not in (1, 3):
        raise UserError(
            f"The model takes inputs of shape {list(shape)}, which an image file cannot give: an image has "
            "1 or 3 channels, a height and a width. Give --data test in place of images."
        )
    channels, height, width = shape
    is_small_and_grey = (channels, height, width) == (1, MNIST_SIDE, MNIST_SIDE)
    if fit == "auto":
        small = "whole" if is_fashion else "digit"
        fit = small if is_small_and_grey else "crop"
    if fit == "digit" and not is_small_and_grey:
        raise UserError(
            f"--fit digit is for models that take [1, 28, 28], and this one takes {list(shape)}: give "
            "--fit whole or --fit crop."
        )
    if polarity == "auto" and not is_small_and_grey:
        polarity = "keep"  # photographs: nobody knows which ground the training data have
    return Plan((channels, height, width), fit, polarity, transform)


# --- reading -------------------------------------------------------------------------------------------


def read(path: Path) -> Image.Image:
    """The image in a file, upright, in memory. Raises UserError that names the file where there is none."""
    try:
        if path.exists() and not path.is_file():
            what = "a directory" if path.is_dir() else "no regular file"
            raise UserError(f"{path} is {what}: give image files, such as PNG or JPEG.")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # the limit here is our own
            with Image.open(path) as opened:
                _check_size(path, opened.size)
                opened.load()  # of several frames the first
                return ImageOps.exif_transpose(opened)
    except FileNotFoundError:
        raise UserError(f"{path} is missing: give image files, such as PNG or JPEG.") from None
    except UnidentifiedImageError:
        what = "is empty" if path.stat().st_size == 0 else "is no image that can be read"
        raise UserError(f"{path} {what}: give a PNG, JPEG, TIFF, BMP, GIF or WebP file.") from None
    except Image.DecompressionBombError:
        raise UserError(
            f"{path} has more than {MOST_PIXELS:,} pixels: make it smaller, or cut out a part."
        ) from None
    except (OSError, SyntaxError, ValueError, EOFError) as error:  # as Pillow's readers raise them
        reason = getattr(error, "strerror", None) or one_line(error).rstrip(".")
        raise UserError(f"{path} cannot be read as an image: {reason}.") from error


def _check_size(path: Path, size: tuple[int, int]) -> None:
    width, height = size
    if width * height > MOST_PIXELS:
        raise UserError(
            f"{path} has {width:,} x {height:,} pixels, more than {MOST_PIXELS:,}: make it smaller, or cut "
            "out a part."
        )
    if width == 0 or height == 0:
        raise UserError(f"{path} has no pixels: its size is {width} x {height}.")


def _as_8_bits(image: Image.Image, path: Path) -> Image.Image:
    """The image with 8 bits a channel.

    An image of 16 bits is scaled down: Pillow's own conversion would make all values above 255 white. A
    camera of 10, 12 or 14 bits saves its values in such a file, too. How many bits it has is not written
    there, so they are counted in the largest value.
    """
    if image.mode.startswith("I"):
        values = np.asarray(image, dtype=np.int64).clip(min=0)
        bits = max(8, int(values.max()).bit_length())
        white = 2**bits - 1
        return Image.fromarray((values * 255 // white).astype(np.uint8))
    if image.mode == "F":
        raise UserError(f"{path} has floating-point pixels: save it as a PNG of 8 or 16 bits.")
    return image


def _converted(image: Image.Image, mode: str, path: Path) -> Image.Image:
    """The image with other channels, such as L (grey) or RGB. Raises UserError if Pillow cannot."""
    try:
        if image.mode == "LAB":  # as of some TIFFs: Pillow makes RGB of it, but no grey
            image = image.convert("RGB")
        return image.convert(mode)
    except ValueError as error:
        raise UserError(
            f"{path} has colours of the kind {image.mode}, which Pillow cannot convert to {mode}: save it "
            "as a PNG."
        ) from error


def _without_alpha(image: Image.Image, path: Path) -> Image.Image:
    """The image on an opaque ground: white under dark ink, black under light ink.

    A drawing with a transparent ground would vanish on a ground of its own colour.
    """
    if not image.has_transparency_data:
        return image
    with_alpha = _converted(image, "RGBA", path)
    alpha = np.asarray(with_alpha.getchannel("A"), dtype=np.float64)
    grey = np.asarray(with_alpha.convert("RGB").convert("L"), dtype=np.float64)
    ink = (grey * alpha).sum() / alpha.sum() if alpha.any() else 0.0
    if alpha.min() == 255:
        return with_alpha.convert("RGB")
    ground = (255, 255, 255, 255) if ink < 128 else (0, 0, 0, 255)
    return Image.alpha_composite(Image.new("RGBA", image.size, ground), with_alpha).convert("RGB")


# --- preparing -----------------------------------------------------------------------------------------


def prepare(image: Image.Image, plan: Plan, path: Path) -> Prepared:
    """The image as the model takes it; `path` names it in messages. Raises UserError for an empty sheet."""
    if plan.transform is not None:
        return _transformed(image, plan.transform, path, is_colour=plan.shape[0] == 3)
    channels, height, width = plan.shape
    opaque = _without_alpha(_as_8_bits(image, path), path)
    pixels = _converted(opaque, "L" if channels == 1 else "RGB", path)

    grey = np.asarray(pixels.convert("L"), dtype=np.float64)
    inverted = plan.polarity == "invert" or (plan.polarity == "auto" and _has_light_ground(grey))
    if inverted:
        pixels = ImageOps.invert(pixels)

    if pixels.size == (width, height):
        how = "as it is"
    elif plan.fit == "digit":
        pixels = _as_mnist_digit(np.asarray(pixels, dtype=np.float64), plan.polarity, path)
        how = f"digit fitted to {BOX} x {BOX} in {width} x {height}"
    elif plan.fit == "whole":
        pixels = _whole(pixels, width, height)
        how = f"fitted whole into {width} x {height}"
    else:
        pixels = ImageOps.fit(pixels, (width, height), Image.Resampling.BICUBIC)
        how = f"middle cropped to {width} x {height}"

    array = np.array(pixels, dtype=np.uint8).reshape(height, width, channels)
    tensor = torch.from_numpy(array).permute(2, 0, 1).contiguous()
    return Prepared(tensor / 255, inverted, how)


def _transformed(
    image: Image.Image, transform: Callable[[Any], Any], path: Path, is_colour: bool
) -> Prepared:
    """The image as the data's own transform makes it: a user's code, whose errors are quoted.

    The transform gets 8 bits a channel and an opaque ground, as transforms expect. From 16 bits torchvision
    would make a tensor that is not scaled, and of a transparent drawing in black only black would be left.
    If the model takes colours (`is_colour`), a grey image is one in colours, as torchvision reads it.
    """
    opaque = _without_alpha(_as_8_bits(image, path), path)
    if is_colour or opaque.mode in ("P", "CMYK", "LAB", "YCbCr"):
        opaque = _converted(opaque, "RGB", path)
    try:
        made = transform(opaque)
    except MISFITS as error:
        reason = one_line(error) or "without a message"
        raise UserError(
            f"{path}: the data's own transform does not take it ({type(error).__name__}: {reason})."
        ) from error
    if not isinstance(made, torch.Tensor):
        raise UserError(
            f"{path}: the data's own transform makes a {type(made).__name__} of it, and not a tensor."
        )
    pixels = made / 255 if made.dtype == torch.uint8 else made
    return Prepared(pixels, False, "by the data's own transform")


def _has_light_ground(grey: np.ndarray) -> bool:
    """Whether the ground is light: the median along the border is above the middle of the range."""
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    return float(np.median(border)) > (float(grey.min()) + float(grey.max())) / 2


def _as_mnist_digit(grey: np.ndarray, polarity: str, path: Path) -> Image.Image:
    """A light digit on a dark ground as MNIST has it, 28 x 28 pixels; `grey` [height, width] of 0..255.

    `polarity` is what the user has asked for. Raises UserError if there is no light digit.
    """
    # 1. The ink alone: the paper is not quite black, and the pen not quite white.
    border = np.concatenate([grey[0], grey[-1], grey[:, 0], grey[:, -1]])
    paper = float(np.median(border))
    peak = float(grey.max())
    if peak - paper < FAINTEST <= paper - float(grey.min()):
        # With `auto` the ground is dark by now: only a polarity that the user has given leads here.
        exchanged = " once light and dark are exchanged" if polarity == "invert" else ""
        raise UserError(
            f"{path} has a light ground{exchanged}, and a digit has to be light on a dark ground: leave "
            f"--polarity {polarity} out."
        )
    if peak - paper < FAINTEST:
        raise UserError(f"{path} has nothing on it: all of its pixels are nearly the same.")
    ink = np.clip((grey - paper) / (peak - paper), 0, 1)
    ink[ink < INK / 2] = 0  # the grain of the paper

    # 2. The smallest box around it, scaled to 20 pixels.
    rows, columns = np.nonzero(ink >= INK)
    cut = ink[rows.min() : rows.max() + 1, columns.min() : columns.max() + 1]
    large = _scaled(Image.fromarray((255 * cut).astype(np.uint8)), FINE * BOX, only_down=True)
    digit = np.asarray(_scaled(_with_bold_pen(large), BOX, only_down=False), dtype=np.float64)
    if digit.max() == 0:  # a few single pixels, far apart
        raise UserError(
            f"{path} has nothing on it but dots, of which nothing is left at {BOX} x {BOX} pixels."
        )
    digit *= 255 / digit.max()  # a thin pen becomes faint when it is scaled down

    # 3. The digit is moved by whole pixels until its centre of mass is in the middle. If it would stick
    #    out of the sheet, it is moved less.
    total = digit.sum()
    centre_y = (digit.sum(axis=1) @ np.arange(digit.shape[0])) / total
    centre_x = (digit.sum(axis=0) @ np.arange(digit.shape[1])) / total
    top = _within(round(CENTRE - centre_y), digit.shape[0])
    left = _within(round(CENTRE - centre_x), digit.shape[1])
    sheet = np.zeros((MNIST_SIDE, MNIST_SIDE), dtype=np.uint8)
    sheet[top : top + digit.shape[0], left : left + digit.shape[1]] = digit.round().astype(np.uint8)
    return Image.fromarray(sheet)


def _scaled(image: Image.Image, longer_side: int, only_down: bool) -> Image.Image:
    """The image scaled so that its longer side has this length in pixels, with its proportions kept.

    With `only_down` an image that is smaller than that stays as it is.
    """
    scale = longer_side / max(image.size)
    if scale >= 1 and only_down:
        return image
    width, height = (max(1, round(side * scale)) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)


def _with_bold_pen(image: Image.Image) -> Image.Image:
    """A light digit whose strokes are about as wide as MNIST's; wide ones stay as they are.

    A mouse draws one or two pixels wide, which nearly vanishes at 20 x 20 pixels.
    """
    ink = np.pad(np.asarray(image) >= 128, 1)
    outline = int((np.diff(ink, axis=0)).sum() + (np.diff(ink, axis=1)).sum())
    # A stroke's outline is twice as long as the stroke, so width = 2 * area / outline. But the outline here
    # is counted in steps along rows and columns, which makes slanted outlines too long: by a factor of
    # 4 / pi, or about 1.27, on average over all directions.
    width = 2 * 1.27 * float(ink.sum()) / max(1, outline)
    missing = PEN * max(image.size) / BOX - width
    if width == 0 or missing < 1:
        return image
    size = 2 * round(missing / 2) + 1  # the filter wants an odd number
    margin = size // 2
    return ImageOps.expand(image, margin).filter(ImageFilter.MaxFilter(size))


def _within(start: int, length: int) -> int:
    """The first pixel of a digit of this length, moved so that the digit stays on MNIST's sheet."""
    return min(max(start, 0), MNIST_SIDE - length)


def _whole(pixels: Image.Image, width: int, height: int) -> Image.Image:
    """The whole image with its proportions kept, in the middle of a sheet of the colour of its border."""
    array = np.asarray(pixels)
    border = np.concatenate([array[0], array[-1], array[:, 0], array[:, -1]])
    ground = np.median(border, axis=0).astype(np.uint8)
    colour = int(ground) if ground.ndim == 0 else tuple(int(each) for each in ground)
    return ImageOps.pad(pixels, (width, height), Image.Resampling.BICUBIC, color=colour)
