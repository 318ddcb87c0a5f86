"""The drawn digits: reproducible, MNIST-like, and neither trivial nor hopeless to learn."""

import os

import numpy as np
import pytest
import torch

from allranks.data.synthetic import CHUNK, generate

MANY = 4000  # enough for statistics, drawn in a fraction of a second


@pytest.fixture(scope="module")
def digits() -> tuple[np.ndarray, np.ndarray]:
    return generate(MANY, "train")


def same(one: tuple[np.ndarray, np.ndarray], other: tuple[np.ndarray, np.ndarray]) -> tuple[bool, bool]:
    """Whether the images are equal, and whether the labels are."""
    return np.array_equal(one[0], other[0]), np.array_equal(one[1], other[1])


def test_same_arguments_give_the_same_bytes(digits):
    assert same(digits, generate(MANY, "train")) == (True, True)


def test_part_and_seed_select_independent_streams():
    train = generate(1000, "train")
    assert same(train, generate(1000, "test")) == (False, False)
    assert same(train, generate(1000, "train", seed=1)) == (False, False)
    assert same(train, generate(1000, "train", seed=-1)) == (False, False)
    # A part is not the other one shifted: no image is in both.
    images = {image.tobytes() for image in train[0]}
    assert not any(image.tobytes() in images for image in generate(1000, "test")[0])


@pytest.mark.parametrize(("cores", "torch_threads"), [(None, 1), (1, 2), (3, 1), (64, 2)])
def test_threads_do_not_change_the_result(digits, monkeypatch, cores, torch_threads):
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "cpu_count", lambda: cores)
    torch.set_num_threads(torch_threads)
    try:
        assert same(digits, generate(MANY, "train")) == (True, True)
    finally:
        torch.set_num_threads(before)


def test_global_random_state_is_neither_used_nor_disturbed(digits):
    np.random.seed(1234)
    torch.manual_seed(1234)
    numpy_state, torch_state = np.random.get_state(), torch.get_rng_state()
    assert same(digits, generate(MANY, "train")) == (True, True)
    assert np.array_equal(np.random.get_state()[1], numpy_state[1])
    assert torch.equal(torch.get_rng_state(), torch_state)


@pytest.mark.parametrize("count", [0, 1, CHUNK - 1, CHUNK, CHUNK + 1])
def test_any_count_gives_the_promised_shapes(count):
    images, labels = generate(count, "test")
    assert (images.shape, images.dtype) == ((count, 28, 28), np.uint8)
    assert (labels.shape, labels.dtype) == ((count,), np.uint8)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match=r"count .* -1"):
        generate(-1, "train")
    with pytest.raises(ValueError, match=r"train, test.*'valid'"):
        generate(1, "valid")


def test_labels_are_balanced(digits):
    shares = np.bincount(digits[1], minlength=10) / MANY
    assert len(shares) == 10
    assert shares.min() > 0.08
    assert shares.max() < 0.12


def test_images_look_like_mnist(digits):
    images = digits[0] / 255.0
    assert 0.11 < images.mean() < 0.15  # MNIST: 0.1307
    assert 0.27 < images.std() < 0.34  # MNIST: 0.3081
    assert 0.76 < (images == 0).mean() < 0.85  # MNIST: 0.81
    assert images.max((1, 2)).min() > 0.6, "an image without a clear stroke"
    border = np.ones((28, 28), bool)
    border[2:-2, 2:-2] = False
    assert images[:, border].mean() < 0.002
    ink = images.sum((1, 2))
    assert np.abs(images.sum(1) @ np.arange(28) / ink - 14).max() < 1.5
    assert np.abs(images.sum(2) @ np.arange(28) / ink - 14).max() < 1.5
    height, width = ((images > 0.2).any(axis).sum(1) for axis in (2, 1))
    longer_side = np.maximum(height, width)
    assert 19 <= np.median(longer_side) <= 21
    assert longer_side.max() <= 24


def test_a_digit_is_drawn_in_many_ways(digits):
    images, labels = digits
    for digit in range(10):
        inked = images[labels == digit] > 127
        assert len(np.unique(inked.reshape(-1, 784), axis=0)) == len(inked)
        # Few pixels are inked by nearly every drawing of a digit: crossings, the middle of a 1.
        assert (inked.mean(0) > 0.9).sum() <= 8


def test_linear_model_learns_most_but_not_all():
    """Two short epochs: 84 % when written. Wrong labels give 10 %, rigid glyphs over 95 %."""

    def tensors(count: int, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = generate(count, part)
        return torch.from_numpy(images).flatten(1) / 255, torch.from_numpy(labels).long()

    images, labels = tensors(20_000, "train")
    weights = torch.zeros(784, 10, requires_grad=True)
    bias = torch.zeros(10, requires_grad=True)
    for start in list(range(0, len(images), 128)) * 2:
        batch = slice(start, start + 128)
        loss = torch.nn.functional.cross_entropy(images[batch] @ weights + bias, labels[batch])
        gradients = torch.autograd.grad(loss, (weights, bias))
        with torch.no_grad():
            weights -= 0.05 * gradients[0]
            bias -= 0.05 * gradients[1]
    images, labels = tensors(4000, "test")
    accuracy = ((images @ weights + bias).argmax(1) == labels).float().mean().item()
    assert 0.79 < accuracy < 0.90
