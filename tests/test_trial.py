"""What does not fit together is said in one sentence, from one batch, before anything is made."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from allranks.base.errors import UserError
from allranks.data.dealing import training_batches
from allranks.data.parts import InMemory
from allranks.training import trial
from allranks.training.metrics import Column
from allranks.training.trial import smallest_piece
from helpers import SMALL, execute_forked, tree

PACKAGE = '''
import numpy as np
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, input_shape, classes, outputs=None):
        super().__init__()
        self.body = nn.Sequential(nn.Flatten(), nn.Linear(784, outputs or classes))

    def forward(self, images):
        return self.body(images)

class Dict(Net):
    def forward(self, images):
        return {"logits": self.body(images), "loss": None}

class Pair(Net):
    def forward(self, images):
        return self.body(images), images

class Column(Net):
    def forward(self, images):
        return self.body(images)[:, :, None]

class Whole(Net):
    def forward(self, images):
        return self.body(images).argmax(dim=1, keepdim=True).expand(-1, 10)

class Detached(Net):
    def forward(self, images):
        return self.body(images).detach()

class Unfinished(Net):
    def forward(self, images):
        return self.head(images)

class Faulty(Net):
    def forward(self, images):
        return self.body(images) / (1 // 0)

class Stacked(Net):
    def forward(self, images):
        return np.stack([np.zeros(2), np.zeros(3)])

class Brain(Net):
    """Its input has the type that the layer's weights have under autocast only."""
    def forward(self, images):
        return self.body(images.bfloat16())

class Spare(Net):
    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes)
        self.spare = nn.Linear(3, 3)

class NotCopied(Net):
    """Python cannot copy a tensor that was computed from a parameter."""
    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes)
        self.double = 2 * self.body[1].weight

def normed(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(784, 8), nn.BatchNorm1d(8), nn.Linear(8, classes))

def spectral(input_shape, classes):
    layer = nn.utils.parametrizations.spectral_norm(nn.Linear(784, classes))
    return nn.Sequential(nn.Flatten(), layer)

def instance(input_shape, classes):
    norm = nn.InstanceNorm2d(1, track_running_stats=True)
    return nn.Sequential(norm, nn.Flatten(), nn.Linear(784, classes))

class Centred(Net):
    """Keeps a moving average of what it sees."""
    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes)
        self.register_buffer("centre", torch.zeros(784))

    def forward(self, images):
        if self.training:
            self.centre = 0.9 * self.centre + 0.1 * images.detach().flatten(1).mean(dim=0)
        return self.body(images.flatten(1) - self.centre)

def lazy(input_shape, classes):
    return nn.Sequential(nn.Flatten(), nn.LazyLinear(classes))

class Sparse(Net):
    def __init__(self, input_shape, classes, persistent=True):
        super().__init__(input_shape, classes)
        self.register_buffer("graph", torch.eye(3).to_sparse(), persistent=persistent)

class TensorRate(torch.optim.SGD):
    def __init__(self, params, lr):
        super().__init__(params, torch.tensor(lr))
'''
LINEAR = (*SMALL, "model=linear", "trainer.epochs=1", "trainer.batch_size=100")
BARE = ("~optimizer.momentum", "~optimizer.nesterov", "~optimizer.weight_decay", "~optimizer.fused")


@pytest.fixture
def own(train_here, tmp_path, monkeypatch):
    """train_here, with the package above importable."""
    (tmp_path / "tryout.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield train_here
    sys.modules.pop("tryout", None)


MISFITS = [
    (["model=tryout.Dict"], r"returns a dict with logits, loss, but allranks needs one tensor of logits, "),
    (["model=tryout.Pair"], "returns a tuple, but allranks needs one tensor of logits"),
    (["model=tryout.Column"], r"returns a tensor of shape \[2, 10, 1\], but allranks needs"),
    (["model=tryout.Whole"], "returns a tensor of torch.int64, but logits are floating-point"),
    (["model=tryout.Detached"], "its output has no gradient that reaches its parameters"),
    (["model=tryout.Unfinished"], r"cannot take images .* \(AttributeError at tryout.py:\d+: .*'head'"),
    (["model=tryout.Stacked"], r"cannot take images .* \(ValueError at tryout.py:\d+: .*same shape"),
    (["model=tryout.Net", "+model.outputs=7"], "has 7 outputs, but data.classes=10"),
    (
        ["model.input_shape=[1,8,8]"],
        r"models.linear cannot take images of shape \[2, 1, 28, 28\] .*RuntimeError: .*2x784 and 64x10",
    ),
    (
        ["optimizer=torch.optim.LBFGS"],
        r"LBFGS cannot take a step .*closure.*\. Take an optimizer whose step\(\) needs nothing but",
    ),
    (["optimizer=torch.optim.SparseAdam"], "SparseAdam cannot take a step .*dense gradients"),
    (["optimizer=tryout.TensorRate"], "has a learning rate of type Tensor: give a number"),
    (
        ["model=tryout.normed", "trainer.batch_size=109"],
        "takes 2 examples in training, but not 1, and 1 is what is left of 1,200 training .*GroupNorm",
    ),
    (
        ["model=tryout.spectral", "trainer.reproducible=true"],
        r"tryout.spectral, which changes its buffer 1.parametrizations.weight.0._u, 1.param",
    ),
    (["model=tryout.normed", "trainer.reproducible=true"], "does not go with BatchNorm, whose figures"),
    (["model=tryout.instance", "trainer.reproducible=true"], "changes its buffer 0.running_mean"),
    (["model=tryout.Centred", "trainer.reproducible=true"], "changes its buffer centre in training"),
    (["model=tryout.lazy"], "tryout.lazy: 1.weight has no shape before the first batch"),
    (["model=tryout.Sparse"], "Sparse: graph is a tensor in the layout sparse_coo, which a checkpoint"),
    (["model=tryout.Sparse", "+model.persistent=false"], "graph is a tensor in the layout sparse_coo"),
    (
        ["trainer.label_smoothing=0.2", "+task.loss._target_=torch.nn.CrossEntropyLoss"],
        "label_smoothing=0.2 is for the cross entropy of task=classification, but task.loss puts another",
    ),
]


def targets(overrides: list[str]) -> list[str]:
    """model=package.Name stands for model._target_=package.Name, and optimizer= for one without options."""
    words = []
    for word in overrides:
        key, _, value = word.partition("=")
        if key in ("model", "optimizer"):
            words += [f"{key}._target_={value}", *(BARE if key == "optimizer" else ())]
        else:
            words.append(word)
    return words


@pytest.mark.parametrize(("overrides", "said"), MISFITS, ids=[" ".join(words) for words, _ in MISFITS])
def test_what_does_not_fit_is_one_sentence_and_leaves_nothing(own, tmp_path, overrides, said):
    before = [name for name in tree(tmp_path) if "__pycache__" not in name]
    with pytest.raises(UserError, match=said) as refused:
        own(*LINEAR, *targets(overrides))
    assert "\n" not in str(refused.value)
    assert [name for name in tree(tmp_path) if "__pycache__" not in name] == before


@pytest.mark.parametrize("model", ["spectral", "instance", "Centred", "normed", "NotCopied", "Spare"])
def test_what_fits_trains(own, model):
    assert own(*LINEAR, f"model._target_=tryout.{model}").summary["epochs"] == 1


def test_a_single_example_is_tried_in_the_precision_of_the_training(own):
    words = ("model._target_=tryout.Brain", "trainer.precision=bf16", "trainer.batch_size=109")
    assert own(*LINEAR, *words).summary["epochs"] == 1


def test_a_traceback_of_the_users_own_stays(own):
    """A division by zero says nothing about how things fit together."""
    with pytest.raises(ZeroDivisionError):
        own(*LINEAR, "model._target_=tryout.Faulty")


@pytest.mark.parametrize("kind", [["model=mlp", "optimizer=adam"], ["model=cnn", "model.dropout=0.5"]])
def test_the_bits_are_those_of_a_training_without_a_trial(train_here, monkeypatch, kind):
    words = (*SMALL, *kind, "trainer.epochs=1", "trainer.batch_size=100")
    tried = train_here(*words)
    columns = [Column("accuracy", has_weight=False, shown="percent")]
    monkeypatch.setattr(trial, "_try", lambda *_: (None, False, [], columns))
    untried = train_here(*words)
    assert tried.summary["model/sha256"] == untried.summary["model/sha256"]
    assert tried.losses == untried.losses


def test_two_ranks_say_it_once(tmp_path):
    (tmp_path / "tryout.py").write_text(PACKAGE)
    words = ["-m", "allranks.train", *LINEAR, "model._target_=tryout.Detached"]
    done = execute_forked(words, 2, tmp_path, {"PYTHONPATH": str(tmp_path)})
    assert done.code == 2
    assert "its output has no gradient that reaches its parameters" in done.message
    assert not (tmp_path / "runs").exists()


@given(
    length=st.integers(1, 60), batch_size=st.integers(1, 70), shares=st.integers(1, 8),
    accumulate=st.integers(1, 9),
)  # fmt: skip
@settings(max_examples=300)
def test_the_smallest_piece_is_the_smallest_that_comes(length, batch_size, shares, accumulate):
    if batch_size < shares:
        return
    runtime = SimpleNamespace(shares=range(shares), share_count=shares, device=torch.device("cpu"))
    labels = torch.zeros(length, dtype=torch.uint8)
    part = InMemory(labels[:, None], labels, torch.arange(length), torch.float32)
    pieces = [
        len(piece.examples.labels)
        for batches in training_batches(part, runtime, batch_size, 0, seed=0, accumulate=accumulate)
        for batch in batches
        for piece in batch.pieces
    ]
    assert smallest_piece(length, batch_size, shares, accumulate) == min(pieces)
