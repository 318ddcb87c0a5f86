"""A model constructed without its large tensors has the same weights, bit by bit, when they are made."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
from torch import nn

from allranks import components, models
from allranks.base.errors import UserError
from allranks.runtime.deferred import CannotDefer, Deferred, build


class Odd(nn.Module):
    """What constructors do: several kinds of draws, tied weights, clones, numbers that are read."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(1000, 100, padding_idx=3)
        self.head = nn.Linear(100, 1000)
        self.head.weight = self.embed.weight
        self.body = nn.Linear(300, 400)
        nn.init.trunc_normal_(self.body.weight, std=0.02)
        self.square = nn.Linear(300, 300)
        nn.init.orthogonal_(self.square.weight)
        rates = [rate.item() for rate in torch.linspace(0, 0.1, 5)]
        self.apply(self.draw)
        with torch.no_grad():
            self.square.weight.mul_(rates[2])
            self.square.weight[0].fill_(7)
        self.register_buffer("mask", torch.tril(torch.ones(400, 400)))
        self.lstm = nn.LSTM(200, 300)
        own = torch.Generator().manual_seed(3)
        self.own = nn.Parameter(torch.empty(400, 400).normal_(generator=own))
        self.dropped = nn.Parameter(torch.bernoulli(torch.full((400, 400), 0.3)))
        self.replaced = nn.Linear(400, 400)
        self.replaced.weight.data = self.replaced.weight.data * 2
        self.scaled = nn.Parameter(self.own.detach() / self.own.detach().abs().mean())
        self.from_numpy = nn.Parameter(torch.from_numpy(np.random.RandomState(0).randn(400, 400)))
        self.last = nn.Linear(3, 3)

    def draw(self, module: nn.Module) -> None:
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.02)


MODELS = {
    "odd": Odd,
    "mlp": lambda: models.mlp([1, 28, 28], 10, widths=[512, 512]),
    "cnn": lambda: models.cnn([1, 28, 28], 10),
    "vit": lambda: models.vit([1, 28, 28], 10, width=256, depth=3),
    "transformer": lambda: nn.Transformer(256, 4, 2, 2, 512, batch_first=True),
}


@pytest.mark.parametrize("name", MODELS)
def test_the_bits_are_those_of_an_ordinary_construction(name):
    torch.manual_seed(1)
    ordinary = MODELS[name]()
    after = torch.get_rng_state()

    torch.manual_seed(1)
    with Deferred() as deferred:
        model = MODELS[name]()
    assert torch.equal(torch.get_rng_state(), after)  # what is drawn next is the same, too

    count = 0
    for (key, tensor), expected in zip(
        model.state_dict().items(), ordinary.state_dict().values(), strict=True
    ):
        count += deferred.holds(tensor)
        made = deferred.made(tensor)
        assert torch.equal(made, expected), key
        assert made.stride() == expected.stride(), key
    assert count >= 1
    assert torch.equal(torch.get_rng_state(), after)


def test_a_large_tensor_takes_no_memory():
    """A terabyte fits: nobody writes to it."""
    with Deferred() as deferred:
        layer = nn.Linear(512, 512)
        huge = torch.zeros(1 << 20, 1 << 10)
    assert deferred.holds(layer.weight)
    assert deferred.holds(huge)
    assert not deferred.holds(layer.bias)


def test_memory_that_holds_nothing_is_not_handed_out():
    with pytest.raises(CannotDefer, match=r"numpy\(\) reads a large tensor"), Deferred():
        nn.Linear(512, 512).weight.detach().numpy()


def reading() -> nn.Module:
    """A layer whose constructor reads its own weights by numpy."""
    layer = nn.Linear(512, 512)
    layer.bias.data += float(layer.weight.detach().numpy().mean())
    return layer


def test_a_component_of_ours_that_cannot_be_deferred_is_built_in_the_ordinary_way(monkeypatch):
    """components.build() tells of an error in such a component by a UserError."""
    monkeypatch.setattr(models, "mlp", reading)
    made, deferred, why = build(lambda: components.build("model", {"_target_": "allranks.models.mlp"}))
    assert isinstance(made, nn.Linear)
    assert deferred is None
    assert "numpy() reads a large tensor" in why
    with pytest.raises(UserError, match=r"torch\.nn\.Linear refuses its arguments"):
        build(lambda: components.build("model", {"_target_": "torch.nn.Linear"}))


def test_a_package_that_a_component_of_ours_needs_is_named(monkeypatch):
    for name in ("torchvision", "torchvision.models"):
        monkeypatch.setitem(sys.modules, name, None)  # as if it were not installed
    section = {"_target_": "allranks.models.resnet18", "input_shape": [1, 28, 28], "classes": 10}
    with pytest.raises(UserError, match=r"resnet18 needs torchvision, .*`pip install torchvision`"):
        components.build("model", section)


def test_an_error_without_a_text_is_named_as_the_reason():
    calls: list[int] = []

    def make() -> nn.Module:
        calls.append(1)
        if len(calls) == 1:
            raise NotImplementedError
        return nn.Linear(3, 3)

    assert build(make)[1:] == (None, "NotImplementedError")


def test_what_cannot_be_deferred_is_built_in_the_ordinary_way():
    torch.manual_seed(1)
    ordinary = reading()
    torch.manual_seed(1)
    made, deferred, why = build(reading)
    assert deferred is None
    assert "numpy()" in why
    assert torch.equal(made.bias, ordinary.bias)
