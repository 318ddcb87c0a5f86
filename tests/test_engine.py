"""Training: the figures of plain PyTorch, written out in this file, and the documented rates."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise

import pytest
import torch
from torch import nn, optim
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.data import DistributedSampler

from allranks.base.errors import UserError
from allranks.compose import from_command_line
from allranks.config import runtime_settings
from allranks.data.dealing import training_batches
from allranks.data.parts import InMemory
from allranks.data.synthetic import generate
from allranks.job.identity import RankIdentity
from allranks.runtime.bringup import open_runtime
from allranks.training import building, engine
from helpers import SMALL, Run, only_long, recipe_of

LINEAR = (*SMALL, "model=linear", "trainer.batch_size=100")
EXACT = 1e-9  # fp64, one rank: only the order of additions may differ


@dataclass
class Plain:
    """What a reader of a textbook would write: a linear model in fp64 on the same digits."""

    epochs: int = 2
    seed: int = 0
    optimizer: Callable[..., optim.Optimizer] = optim.SGD
    options: dict = field(default_factory=lambda: {"lr": 0.05})
    smoothing: float = 0.0
    clip: float | None = None
    train: list[float] = field(default_factory=list)  # after each epoch
    running: list[float] = field(default_factory=list)  # on the go
    val: list[float] = field(default_factory=list)
    test: float = 0.0

    def run(self) -> Plain:
        whole, whole_labels = self.tensors(1600, "train")
        order = torch.randperm(1600, generator=torch.Generator().manual_seed(self.seed))
        images, labels = whole[order[:1200]], whole_labels[order[:1200]]
        torch.manual_seed(self.seed)
        self.model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double()
        optimizer = self.optimizer(self.model.parameters(), **self.options)
        shuffled: DistributedSampler[int] = DistributedSampler(images, 1, 0, seed=self.seed)  # type: ignore[arg-type]
        for epoch in range(self.epochs):
            shuffled.set_epoch(epoch)
            total = 0.0
            for rows in torch.tensor(list(shuffled)).split(100):
                loss = nn.functional.cross_entropy(
                    self.model(images[rows]), labels[rows], label_smoothing=self.smoothing
                )
                optimizer.zero_grad()
                loss.backward()
                if self.clip is not None:
                    nn.utils.clip_grad_norm_(self.model.parameters(), self.clip)
                optimizer.step()
                total += loss.item() * len(rows)
            self.running.append(total / 1200)
            self.train.append(self.loss(images, labels))
            self.val.append(self.loss(whole[order[1200:]], whole_labels[order[1200:]]))
        self.test = self.loss(*self.tensors(400, "test"))
        return self

    @staticmethod
    def tensors(count: int, part: str) -> tuple[torch.Tensor, torch.Tensor]:
        images, labels = generate(count, part)
        return torch.from_numpy(images).double()[:, None] / 255, torch.from_numpy(labels).long()

    @torch.no_grad()
    def loss(self, images: torch.Tensor, labels: torch.Tensor) -> float:
        return nn.functional.cross_entropy(self.model(images), labels).item()

    @property
    def losses(self) -> list[float]:
        return [*self.train, *self.val, self.test]


@pytest.mark.parametrize(
    ("overrides", "plain"),
    [
        ([], Plain()),
        (["seed=5"], Plain(seed=5)),
        (["optimizer.lr=0.2"], Plain(options={"lr": 0.2})),
        (["optimizer.momentum=0.9"], Plain(options={"lr": 0.05, "momentum": 0.9})),
        (
            ["optimizer.momentum=0.9", "optimizer.nesterov=true"],
            Plain(options={"lr": 0.05, "momentum": 0.9, "nesterov": True}),
        ),
        (["optimizer.weight_decay=0.1"], Plain(options={"lr": 0.05, "weight_decay": 0.1})),
        (["optimizer=adam"], Plain(optimizer=optim.Adam, options={"lr": 0.001})),
        (["optimizer=adamw"], Plain(optimizer=optim.AdamW, options={"lr": 0.001, "weight_decay": 0.01})),
        (["optimizer=rmsprop"], Plain(optimizer=optim.RMSprop, options={"lr": 0.001})),
        (["optimizer=adagrad"], Plain(optimizer=optim.Adagrad, options={"lr": 0.01})),
        (["trainer.clip_norm=0.1"], Plain(clip=0.1)),
        (["trainer.accumulate=3"], Plain()),
        (["trainer.accumulate=1000"], Plain()),
        (["trainer.accumulate=3", "trainer.clip_norm=0.1"], Plain(clip=0.1)),
    ],
    ids=lambda value: " ".join(value) or "defaults" if isinstance(value, list) else "",
)  # fmt: skip
def test_the_curve_is_that_of_plain_pytorch(train_here, overrides, plain):
    run = train_here(*LINEAR, "trainer.epochs=2", *overrides)
    assert run.losses == pytest.approx(plain.run().losses, rel=EXACT)


def test_these_options_make_a_difference():
    """The comparisons above would be worth nothing between equal curves."""
    plain = [
        Plain().run(), Plain(clip=0.1).run(), Plain(options={"lr": 0.05, "weight_decay": 0.1}).run(),
        Plain(options={"lr": 0.05, "momentum": 0.9}).run(), Plain(seed=5).run(),
    ]  # fmt: skip
    finals = sorted(run.val[-1] for run in plain)
    assert min(b - a for a, b in pairwise(finals)) > 1e-4


def test_label_smoothing_trains_on_soft_labels_and_reports_plain_losses(train_here):
    run = train_here(*LINEAR, "trainer.epochs=2", "trainer.label_smoothing=0.2")
    assert run.losses == pytest.approx(Plain(smoothing=0.2).run().losses, rel=EXACT)


def test_running_train_figures_are_those_on_the_go(train_here):
    run = train_here(*LINEAR, "trainer.epochs=2", "trainer.train_metrics=running")
    plain = Plain().run()
    assert run.column("train/loss") == pytest.approx(plain.running, rel=EXACT)
    assert run.column("val/loss") == pytest.approx(plain.val, rel=EXACT)
    assert plain.running[0] > plain.train[0]


def test_accumulation_gives_the_gradient_of_the_whole_batch(train_here):
    deep = (*SMALL, "model=mlp", "model.dropout=0", "optimizer=adam", "trainer.epochs=2")
    whole, pieces = train_here(*deep), train_here(*deep, "trainer.accumulate=5")
    assert pieces.losses == pytest.approx(whole.losses, rel=EXACT)
    assert pieces.column("step") == whole.column("step")


def test_dropout_acts_in_training_only(train_here):
    overrides = (*SMALL, "model=mlp", "trainer.epochs=1")
    with_it, without = (
        train_here(*overrides, "model.dropout=0.5"),
        train_here(*overrides, "model.dropout=0"),
    )
    assert with_it.losses != without.losses
    untrained = [train_here(*SMALL, "trainer.epochs=0", f"model.dropout={p}").summary for p in (0.0, 0.5)]
    assert untrained[0]["test/loss"] == untrained[1]["test/loss"]


# --- learning rates ------------------------------------------------------------------------------------


def rates(
    *overrides: str, epochs: int = 6, steps: int = 5, val_losses: list[float] | None = None
) -> list[float]:
    """The rate of every step, as the engine steps the configured scheduler."""
    [config] = from_command_line(overrides)
    optimizer = optim.SGD([nn.Parameter(torch.zeros(1))], lr=config.optimizer["lr"])
    schedule = building.build_schedule(config.scheduler, optimizer, epochs, epochs * steps)
    used = []
    for epoch in range(epochs):
        for _ in range(steps):
            used.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            schedule.after_step()
        schedule.after_epoch({"val/loss": val_losses[epoch] if val_losses else 1.0})
    return used


def by_epoch(*overrides: str, **options) -> list[float]:
    return rates(*overrides, steps=1, **options)


def test_none_keeps_the_rate():
    assert by_epoch("scheduler=none", "optimizer.lr=0.3") == [0.3] * 6


def test_step_is_the_tutorials():
    assert by_epoch("experiment=tutorial_step") == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])


def test_exponential():
    assert by_epoch("scheduler=exponential", "optimizer.lr=1") == pytest.approx([0.9**n for n in range(6)])


def test_cosine_ends_at_eta_min():
    used = by_epoch("scheduler=cosine", "scheduler.eta_min=0.2", "optimizer.lr=1", epochs=11)
    assert used == pytest.approx([0.2 + 0.4 * (1 + math.cos(math.pi * n / 11)) for n in range(11)])
    by_step = rates("scheduler=cosine", "scheduler.interval=step", "optimizer.lr=1", epochs=4, steps=5)
    assert by_step == pytest.approx([0.5 * (1 + math.cos(math.pi * n / 20)) for n in range(20)])


def test_warmup_cosine_rises_then_falls():
    used = rates("scheduler=warmup_cosine", "optimizer.lr=1", "scheduler.warmup=0.2", epochs=4, steps=5)
    assert used[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert used[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * n / 16)) for n in range(16)])
    floor = rates("scheduler=warmup_cosine", "optimizer.lr=1", "scheduler.floor=0.3", epochs=10, steps=10)
    assert floor[-1] == pytest.approx(0.3, abs=1e-3)
    assert max(floor) == 1.0


def test_onecycle_by_step():
    used = rates("scheduler=onecycle", "optimizer.lr=1", epochs=4, steps=5)
    assert used[0] == pytest.approx(1 / 25)
    assert max(used) == pytest.approx(1.0)
    assert used.index(max(used)) == 5  # 30 % of 20 steps
    assert used[-1] == pytest.approx(1 / 25 / 1e4)


def test_plateau_reduces_after_more_than_patience_bad_epochs():
    used = by_epoch("scheduler=plateau", "optimizer.lr=1", epochs=9, val_losses=[3, 2, 1, 1, 1, 1, 1, 1, 1])
    assert used == pytest.approx([1, 1, 1, 1, 1, 1, 0.1, 0.1, 0.1])
    falling = by_epoch("scheduler=plateau", "optimizer.lr=1", val_losses=[6, 5, 4, 3, 2, 1])
    assert falling == [1.0] * 6


def test_plateau_cannot_be_stepped_within_an_epoch():
    with pytest.raises(
        UserError, match=r"scheduler\.interval=step does not go with scheduler\.monitor=val/loss"
    ):
        rates("scheduler=plateau", "scheduler.interval=step")


@pytest.mark.parametrize(
    "name", ["none", "step", "exponential", "cosine", "warmup_cosine", "onecycle", "plateau"]
)
def test_every_scheduler_trains_and_reports_its_rate(train_here, name):
    overrides = ("optimizer.lr=0.1", "trainer.epochs=3")
    run = train_here(*LINEAR, f"scheduler={name}", *overrides)
    expected = rates(f"scheduler={name}", "optimizer.lr=0.1", epochs=3, steps=12)[::12]
    assert run.column("lr") == pytest.approx(expected)
    assert run.column("val/loss")[-1] < 2.3


def test_a_schedule_changes_the_curve_as_its_rates_say(train_here):
    """With a rate of nearly nothing from the second epoch on, the curve stands still."""
    run = train_here(
        *LINEAR, "scheduler=step", "scheduler.step_size=1", "scheduler.gamma=1e-9", "trainer.epochs=3"
    )
    first, second, third = run.column("val/loss")
    assert second == pytest.approx(first, abs=1e-6)
    assert third == pytest.approx(first, abs=1e-6)
    assert first == pytest.approx(Plain(epochs=1).run().val[0], rel=EXACT)


# --- the rest ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", ["linear", "mlp", "cnn", "vit"])
def test_every_model_trains(train_here, model):
    small = {"cnn": ["model.channels=[8,8]"], "vit": ["model.depth=1"]}.get(model, [])
    run = train_here(
        *SMALL, f"model={model}", *small, "optimizer=adam", "optimizer.lr=0.003", "trainer.epochs=2"
    )
    first, second = run.column("train/loss")
    assert 2.4 > first > second


CNN = (*SMALL, "model=cnn", "model.channels=[8,8]", "model.dropout=0", "optimizer.momentum=0.9",
       "trainer.precision=fp64", "trainer.epochs=1")  # fmt: skip


def test_convolutions_have_their_channels_last_and_the_same_curve(train_here, monkeypatch):
    quick = train_here(*CNN)
    reproducible = train_here(*CNN, "trainer.reproducible=true")
    monkeypatch.setattr(building, "gains_by_channels_last", lambda *_: False)
    plain = train_here(*CNN)
    assert quick.losses == pytest.approx(plain.losses, rel=EXACT)
    # Its gradients are put together anew: in another order in memory they would be those of other weights.
    assert reproducible.losses == pytest.approx(plain.losses, rel=EXACT)


@pytest.mark.parametrize(
    ("model", "gains"),
    [("linear", False), ("mlp", False), ("cnn", True), only_long("resnet18", False)],  # GroupNorm
)
def test_which_models_have_their_channels_last(model, gains):
    [config] = from_command_line(["data=synthetic", f"model={model}"])
    built = building.build_model(config.model, config.seed, torch.float32, torch.device("cpu"))
    weights = [p for p in built.parameters() if p.dim() == 4 and p.shape[1] > 1]
    assert all(
        p.is_contiguous(memory_format=torch.channels_last) == gains for p in weights if p.shape[2] > 1
    )
    assert building.gains_by_channels_last(built, torch.device("cpu")) == gains
    assert not building.gains_by_channels_last(built, torch.device("mps"))


class Operators(TorchDispatchMode):
    """Counts the calls of torch's operators."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        self.calls += 1
        return operator(*args, **(kwargs or {}))


def test_a_step_does_little_besides_what_any_loop_does():
    """A small model's step takes its time to start operators: they are counted, not timed."""
    [config] = from_command_line(["data=synthetic", "model=mlp", "device=cpu", "trainer.precision=fp32"])
    runtime = open_runtime(RankIdentity("none"), runtime_settings(config))
    images, labels = map(torch.from_numpy, generate(1280, "train"))
    part = InMemory(images[:, None], labels, torch.arange(1280), torch.float32)
    training = building.build_training(recipe_of(config), runtime, examples=1280)
    batches = training_batches(part, runtime, batch_size=128, epoch=0, seed=0)
    shares = next(batches)
    with Operators() as plain:
        [(images, labels)] = [piece.examples for piece in shares[0].pieces]
        nn.functional.cross_entropy(training.model(images), labels).backward()
        training.optimizer.step()
        training.optimizer.zero_grad()
    with Operators() as ours:
        for shares in batches:
            engine.train_step(training, shares, config.trainer, 0, runtime)
    runtime.close()
    # 23 more when this was written: 3 make the batch, 4 weight the loss and look at it, 16 look at the
    # gradients of 8 parameters.
    assert ours.calls / 9 - plain.calls < 25


def test_no_epochs_test_the_untrained_model(train_here):
    run = train_here(*LINEAR, "trainer.epochs=0")
    assert run.summary["test/loss"] == pytest.approx(Plain(epochs=0).run().test, rel=EXACT)
    assert (run.summary["epochs"], run.summary["test/count"]) == (0, 400)


def test_bf16_on_cpu_is_near_fp32_but_not_it(train_here):
    overrides = (*SMALL, "model=mlp", "model.dropout=0", "optimizer.lr=0.2", "trainer.epochs=3")
    exact = train_here(*overrides, "trainer.precision=fp32")
    rough = train_here(*overrides, "trainer.precision=bf16")
    assert rough.losses != exact.losses
    assert rough.losses == pytest.approx(exact.losses, rel=0.02)


def test_fp16_needs_a_gpu(train_here):
    with pytest.raises(UserError, match=r"trainer\.precision=fp16 needs a GPU: take bf16 or fp32"):
        train_here(*LINEAR, "trainer.precision=fp16")


def test_a_model_without_parameters_is_refused(train_here):
    with pytest.raises(UserError, match="has no parameters to train"):
        train_here(
            *SMALL,
            "model=linear",
            "model._target_=torch.nn.Flatten",
            "~model.input_shape",
            "~model.classes",
        )


def test_a_batch_larger_than_the_set_is_the_whole_set(train_here):
    run = train_here(*SMALL, "model=linear", "trainer.batch_size=5000", "trainer.epochs=2")
    assert run.column("step") == [1, 2]


@pytest.mark.long
def test_compile_gives_the_same_curve(train, train_here, tmp_path):
    if shutil.which("g++") is None and shutil.which("clang++") is None:
        pytest.skip("torch.compile needs a C++ compiler: apt-get install g++")
    overrides = (*LINEAR, "trainer.epochs=1", "trainer.precision=fp32")
    eager = train_here(*overrides, "run.dir=eager")
    scratch = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache"), "TMPDIR": str(tmp_path)}
    train(*overrides, "trainer.compile=true", "run.dir=compiled", env=scratch).ok()
    assert Run(tmp_path / "compiled").losses == pytest.approx(eager.losses, rel=1e-5)
