"""The models: shapes, sizes, activations by name, and that each one learns."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import nn

from allranks import models
from allranks.base.errors import UserError

SHAPE = [1, 28, 28]
MODELS = {"linear": 7_850, "mlp": 44_860, "cnn": 421_642, "resnet18": 11_172_810, "vit": 204_938}
ELEMENTWISE = (
    "CELU ELU GELU Hardshrink Hardsigmoid Hardswish Hardtanh LeakyReLU LogSigmoid Mish PReLU RReLU ReLU "
    "ReLU6 SELU SiLU Sigmoid Softplus Softshrink Softsign Tanh Tanhshrink"
).split()


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Tiny tensors: more threads only wait for each other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def layers(model: nn.Module) -> list[str]:
    return [type(module).__name__ for module in model.children()]


@pytest.mark.parametrize("name", MODELS)
def test_ten_logits_for_every_image(name):
    model = getattr(models, name)(SHAPE, 10).eval()
    assert model(torch.rand(3, *SHAPE)).shape == (3, 10)
    assert model(torch.rand(1, *SHAPE)).shape == (1, 10)


@pytest.mark.parametrize(("name", "count"), MODELS.items())
def test_the_number_of_parameters(name, count):
    assert sum(p.numel() for p in getattr(models, name)(SHAPE, 10).parameters()) == count


@pytest.mark.parametrize("name", MODELS)
def test_other_images_and_classes(name):
    """32 x 32 in colour, 100 classes: nothing is nailed to MNIST."""
    options = {"patch": 8} if name == "vit" else {}
    model = getattr(models, name)([3, 32, 32], 100, **options)
    assert model(torch.rand(2, 3, 32, 32)).shape == (2, 100)


@pytest.mark.parametrize("name", MODELS)
def test_no_example_sees_another(name):
    """What a model says of an image does not depend on which others share its batch: no BatchNorm."""
    torch.manual_seed(0)
    model, images = getattr(models, name)(SHAPE, 10).train(), torch.rand(6, *SHAPE)
    for module in model.modules():
        assert not isinstance(module, nn.modules.batchnorm._BatchNorm)
        if isinstance(module, nn.Dropout | nn.MultiheadAttention):
            module.eval()
    together, alone = model(images), torch.cat([model(image[None]) for image in images])
    assert torch.allclose(together, alone, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("linear", {}),
        ("mlp", {"widths": [32]}),
        ("cnn", {"channels": [8, 8], "hidden": 32}),
        ("resnet18", {}),
        ("vit", {"depth": 1}),
    ],
)
def test_a_handful_of_images_is_learnt_by_heart(name, options):
    """The loss falls to half within 60 steps, and every parameter has a part in it."""
    torch.manual_seed(0)
    model = getattr(models, name)(SHAPE, 10, **options).train()
    images, labels = torch.rand(4, *SHAPE), torch.arange(4)
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-4 if name == "resnet18" else 3e-3)
    losses: list[float] = []
    while len(losses) < 60 and (not losses or losses[-1] > losses[0] / 2):
        loss = nn.functional.cross_entropy(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] <= losses[0] / 2
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())


def test_the_tutorials_perceptron_layer_by_layer():
    model = models.mlp(SHAPE, 10, dropout=0.2)
    assert layers(model) == [
        "Flatten", "Linear", "ReLU", "Dropout", "Linear", "ReLU", "Linear", "ReLU", "Linear",
    ]  # fmt: skip
    widths = [(m.in_features, m.out_features) for m in model if isinstance(m, nn.Linear)]
    assert widths == [(784, 50), (50, 50), (50, 50), (50, 10)]
    assert [m.p for m in model if isinstance(m, nn.Dropout)] == [0.2]


def test_an_activation_for_each_layer():
    model = models.mlp(SHAPE, 10, widths=[20, 30], activation=["Tanh", "LeakyReLU"])
    assert layers(model) == ["Flatten", "Linear", "Tanh", "Linear", "LeakyReLU", "Linear"]
    assert layers(models.mlp(SHAPE, 10, widths=[])) == ["Flatten", "Linear"]


@pytest.mark.parametrize("name", ELEMENTWISE)
def test_every_elementwise_activation_of_torch(name):
    model = models.mlp(SHAPE, 10, widths=[8, 8], activation=name).eval()
    assert layers(model).count(name) == 2
    assert torch.isfinite(model(torch.randn(4, *SHAPE))).all()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Relu", "model.activation=Relu is not an activation of torch.nn. Did you mean ReLU"),
        ("sigmoid", "Did you mean Sigmoid"),
        ("LeakyRelu", "Did you mean LeakyReLU"),
        ("Linear", "model.activation=Linear is not"),  # of torch.nn, but no activation
        ("Softmax", "model.activation=Softmax is not"),  # mixes the features
        ("GLU", "model.activation=GLU is not"),
        ("Threshold", "model.activation=Threshold needs arguments"),
    ],
)
def test_what_is_no_activation(name, message):
    with pytest.raises(UserError) as refused:
        models.mlp(SHAPE, 10, activation=name)
    assert message in str(refused.value)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mlp", {"activation": ["ReLU"]}, "model.activation has 1 entries for 3 hidden layers"),
        ("vit", {"patch": 5}, "model.patch=5 does not divide the 28 x 28 image"),
        ("vit", {"heads": 3}, "model.width=64 is not a multiple of model.heads=3"),
        ("cnn", {"channels": [8] * 5}, "model.channels has 5 entries"),
    ],
)
def test_sizes_that_do_not_fit(name, options, message):
    with pytest.raises(UserError) as refused:
        getattr(models, name)(SHAPE, 10, **options)
    assert message in str(refused.value)


def test_the_most_pools_that_fit():
    assert models.cnn(SHAPE, 10, channels=[4] * 4)(torch.rand(2, *SHAPE)).shape == (2, 10)
