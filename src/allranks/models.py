"""The models that `model=` selects: plain torch modules for small images.

A model takes images, floating-point numbers of shape [N, channels, height, width], and returns logits of
shape [N, classes]: the larger a class's logit, the likelier the class.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from math import prod

import torch
from torch import nn

from allranks.base.errors import UserError
from allranks.base.text import did_you_mean


def linear(input_shape: Sequence[int], classes: int) -> nn.Module:
    """One dense layer on the flattened image."""
    return nn.Sequential(nn.Flatten(), nn.Linear(prod(input_shape), classes))


def mlp(
    input_shape: Sequence[int],
    classes: int,
    widths: Sequence[int] = (50, 50, 50),
    activation: str | Sequence[str] = "ReLU",
    dropout: float = 0.0,
) -> nn.Module:
    """Hidden layers of these widths; `activation` is one for all or a list with one for each.

    Dropout follows the first activation only.
    """
    names = [activation] * len(widths) if isinstance(activation, str) else list(activation)
    if len(names) != len(widths):
        raise UserError(
            f"model.activation has {len(names)} entries for {len(widths)} hidden layers: "
            "give one for each, or a single name for all."
        )
    layers: list[nn.Module] = [nn.Flatten()]
    size = prod(input_shape)
    for i, (width, name) in enumerate(zip(widths, names, strict=True)):
        layers += [nn.Linear(size, width), _activation(name)]
        if i == 0 and dropout > 0:
            layers.append(nn.Dropout(dropout))
        size = width
    return nn.Sequential(*layers, nn.Linear(size, classes))


def cnn(
    input_shape: Sequence[int],
    classes: int,
    channels: Sequence[int] = (32, 64),
    hidden: int = 128,
    activation: str = "ReLU",
    dropout: float = 0.0,
) -> nn.Module:
    """A 3x3 convolution, activation and 2x2 max-pool for each of `channels`, then two dense layers."""
    depth, height, width = input_shape
    if min(height, width) >> len(channels) < 1:
        raise UserError(
            f"model.channels has {len(channels)} entries, each halving a {height} x {width} image: "
            "give fewer."
        )
    layers: list[nn.Module] = []
    for out in channels:
        # The pool before the activation: the same result for a rising activation, a quarter of the work.
        layers += [nn.Conv2d(depth, out, 3, padding=1), nn.MaxPool2d(2), _activation(activation)]
        depth, height, width = out, height // 2, width // 2
    layers += [nn.Flatten(), nn.Linear(depth * height * width, hidden), _activation(activation)]
    return nn.Sequential(*layers, nn.Dropout(dropout), nn.Linear(hidden, classes))


def resnet18(input_shape: Sequence[int], classes: int) -> nn.Module:
    """torchvision's resnet18 for small images of `input_shape[0]` channels.

    The stem is a 3x3 convolution without pooling, as usual below 64 x 64. Normalisation is by
    GroupNorm: BatchNorm's statistics would depend on how many examples each rank happens to hold.
    """
    from torchvision.models import resnet18 as torchvision_resnet18

    model: nn.Module = torchvision_resnet18(
        num_classes=classes, norm_layer=lambda channels: nn.GroupNorm(32, channels)
    )
    model.conv1 = nn.Conv2d(input_shape[0], 64, 3, padding=1, bias=False)
    model.maxpool = nn.Identity()
    return model


def vit(
    input_shape: Sequence[int],
    classes: int,
    patch: int = 7,
    width: int = 64,
    depth: int = 4,
    heads: int = 4,
    dropout: float = 0.0,
) -> nn.Module:
    """A small vision transformer on patches of `patch` x `patch` pixels (Dosovitskiy et al. 2021)."""
    if input_shape[1] % patch or input_shape[2] % patch:
        raise UserError(
            f"model.patch={patch} does not divide the {input_shape[1]} x {input_shape[2]} image."
        )
    if width % heads:
        raise UserError(f"model.width={width} is not a multiple of model.heads={heads}.")
    return _VisionTransformer(input_shape, classes, patch, width, depth, heads, dropout)


class _VisionTransformer(nn.Module):
    def __init__(
        self,
        input_shape: Sequence[int],
        classes: int,
        patch: int,
        width: int,
        depth: int,
        heads: int,
        dropout: float,
    ) -> None:
        super().__init__()
        patches = (input_shape[1] // patch) * (input_shape[2] // patch)
        self.embed = nn.Conv2d(input_shape[0], width, patch, stride=patch)
        self.position = nn.Parameter(torch.randn(1, patches, width) * 0.02)
        layer = nn.TransformerEncoderLayer(
            width, heads, 4 * width, dropout, activation="gelu", batch_first=True, norm_first=True
        )
        self.encoder = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        tokens = self.embed(images).flatten(2).transpose(1, 2) + self.position
        logits: torch.Tensor = self.head(self.norm(self.encoder(tokens)).mean(dim=1))
        return logits


# Not functions of a single number: they mix features, or need to be told along which dimension.
_NOT_ELEMENTWISE = {"GLU", "LogSoftmax", "MultiheadAttention", "Softmax", "Softmax2d", "Softmin"}


def _activation(name: str) -> nn.Module:
    """The torch.nn activation of this name, with its defaults."""
    module = nn.modules.activation
    known = [
        n
        for n, c in vars(module).items()
        if inspect.isclass(c) and c.__module__ == module.__name__ and n not in _NOT_ELEMENTWISE
    ]
    if name not in known:
        raise UserError(
            f"model.activation={name} is not an activation of torch.nn.{did_you_mean(str(name), known)}"
        )
    try:
        made = getattr(nn, name)()
    except TypeError:  # Threshold has arguments without a default
        raise UserError(f"model.activation={name} needs arguments: take another one.") from None
    assert isinstance(made, nn.Module)
    return made
