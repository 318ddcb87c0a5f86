"""The shipped training and a loop of one's own are one path: a training has the same bits in both."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import own_programs
from allranks.run import checkpoint
from helpers import Done, Run, execute_forked, only_long

EXAMPLES, VALIDATION, TEST = 200, 40, 10
# Neither 2 nor 3 divides it, and the last batch, of 14, is smaller.
BATCH = 31
EPOCHS = 3

# Dropout draws at random on each rank, the learning rate changes after each epoch, and weights decay.
SHIPPED = [
    "model=mlp", "optimizer=adamw", "optimizer.lr=0.01", "scheduler=step", "scheduler.step_size=2",
    "data=synthetic", f"data.train.count={EXAMPLES + VALIDATION}", f"data.test.count={TEST}",
    f"data.split=[{EXAMPLES},{VALIDATION}]", f"trainer.batch_size={BATCH}", f"trainer.epochs={EPOCHS}",
    "trainer.precision=fp32", "trainer.train_metrics=running", "trainer.clip_norm=1.0", "seed=7",
    "device=cpu", "threads=1", "report=false", "run.dir=runs/shipped",
]  # fmt: skip

OWN = f"""
import torch
import allranks
from allranks.data import synthetic
from allranks.models import mlp
from torch.nn import functional as F
from torch.utils.data import Subset, TensorDataset

run = allranks.open("own", seed=7, device="cpu", threads=1, report=False)
images, labels = synthetic.generate({EXAMPLES + VALIDATION}, "train", seed=0)
images = torch.from_numpy(images)[:, None].float() / 255
digits = TensorDataset(images, torch.from_numpy(labels).long())
order = torch.randperm(len(digits), generator=torch.Generator().manual_seed(7))
train_set, val_set = Subset(digits, order[:{EXAMPLES}]), Subset(digits, order[{EXAMPLES}:])

torch.manual_seed(7)
model = run.wrap(mlp([1, 28, 28], 10, dropout=0.2))
optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.01, fused=True)
schedule = torch.optim.lr_scheduler.StepLR(optimizer, step_size=2, gamma=0.1)
run.keep(model=model, optimizer=optimizer, schedule=schedule)
train_batches = run.batches(train_set, batch_size={BATCH})
val_batches = run.batches(val_set, batch_size={VALIDATION}, shuffle=False)

for epoch in run.epochs({EPOCHS}):
    model.train()
    for batch in run.steps(train_batches):
        for inputs, targets in run.pieces(batch, PIECES):
            loss = F.cross_entropy(model(inputs), targets, reduction="sum")
            run.backward(loss, reduction="sum")
            run.log({{"train/loss": loss.detach() / len(targets)}})
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    model.eval()
    with torch.no_grad():
        run.log({{"val/loss": run.mean(F.cross_entropy(model(x), y) for x, y in val_batches)}})
    schedule.step()
run.finish()
"""


# In place of the lines that clip and take the step.
TAKEN = OWN.replace(
    "        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)\n        optimizer.step()\n",
    "        assert run.take_step(optimizer, clip_norm=1.0)\n",
)


@pytest.mark.parametrize(
    ("ranks", "pieces", "own"),
    [(1, 1, OWN), (2, 1, TAKEN), only_long(3, 1, OWN), (3, 4, TAKEN)],
    ids=["1 rank", "2 ranks, run.take_step", "3 ranks", "3 ranks, run.take_step, pieces"],
)
def test_a_loop_of_ones_own_has_the_bits_of_the_shipped_training(ranks, pieces, own, tmp_path):
    """The weights are equal to the last bit. Epochs' losses are sums that are added up in another way."""
    execute_forked(["-m", "allranks.train", *SHIPPED, f"trainer.accumulate={pieces}"], ranks, tmp_path).ok()
    execute_forked(["-c", own.replace("PIECES", str(pieces))], ranks, tmp_path).ok()
    shipped = Run(tmp_path / "runs/shipped")
    epochs, weights = own_programs.figures(tmp_path / "runs/own")
    assert weights == shipped.summary["model/sha256"]
    for name in ("train/loss", "val/loss"):
        assert [epoch[name] for epoch in epochs] == pytest.approx(shipped.column(name), rel=1e-6)


# In training its output is NaN for the one example with the most ink.
SPOILING = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self, input_shape, classes):
        super().__init__()
        self.layer = nn.Linear(784, classes)

    def forward(self, images):
        flat = images.flatten(1)
        is_spoilt = self.training & (flat.mean(1) > 0.26)
        return torch.where(is_spoilt[:, None], torch.nan, self.layer(flat))
"""


@pytest.mark.parametrize("ranks", [only_long(1), 2, only_long(3)])
def test_both_leave_out_the_steps_whose_gradient_is_not_finite(ranks, tmp_path):
    """Weights and figures are those without these steps, on all ranks."""
    (tmp_path / "spoiling.py").write_text(SPOILING)
    env = {"PYTHONPATH": str(tmp_path)}
    words = [
        "model=linear",
        "model._target_=spoiling.Net",
        *(word for word in SHIPPED if word != "model=mlp"),
    ]
    own = (
        TAKEN.replace("from allranks.models import mlp", "from spoiling import Net")
        .replace("mlp([1, 28, 28], 10, dropout=0.2)", "Net([1, 28, 28], 10)")
        .replace("seed=7, ", "seed=7, stop_at_nonfinite=False, ", 1)
        .replace("assert run.take_step(", "print('taken', run.take_step(")
        .replace("clip_norm=1.0)", "clip_norm=1.0))")
        .replace("PIECES", "1")
    )  # fmt: skip
    execute_forked(["-m", "allranks.train", *words, "trainer.nonfinite=skip"], ranks, tmp_path, env).ok()
    done = execute_forked(["-c", own], ranks, tmp_path, env).ok()
    shipped = Run(tmp_path / "runs/shipped")
    epochs, weights = own_programs.figures(tmp_path / "runs/own")
    assert (done.out.count("taken False"), done.out.count("taken True")) == (3 * ranks, 18 * ranks)
    assert weights == shipped.summary["model/sha256"]
    for name in ("train/loss", "val/loss"):
        assert [epoch[name] for epoch in epochs] == pytest.approx(shipped.column(name), rel=1e-6)


# --- reproducible: the same bits on any number of ranks ---

# The loop draws random numbers in its evaluation, too. The ranks' shares of its batches are uneven, and of
# the last one, of two examples, some are empty.
REPRODUCIBLE = (
    OWN.replace("seed=7, ", 'seed=7, virtual_ranks=4, checkpoint={"every_steps": 2, "keep": 100}, ', 1)
    .replace(
        "for epoch in",
        """import os, signal
def disturbed(run):
    if os.environ.get("DISTURB") == str(run.step) and run.rank == run.world_size - 1:
        os.kill(os.getpid(), signal.SIGKILL)
def noisy(x):
    return x + 0.1 * torch.randn_like(x)
few_batches = run.batches(val_set, batch_size=19, shuffle=False)
for epoch in""",
        1,
    )
    .replace("        for inputs, targets", "        disturbed(run)\n        for inputs, targets")
    .replace(
        "    schedule.step()",
        """        noisily = (
            {"val/noisy": F.cross_entropy(model(noisy(x)), y), "val/x": x.mean()} for x, y in few_batches
        )
        run.log(run.means(noisily))
        run.log({"val/drawn": torch.rand(1)})
    schedule.step()""",
    )
)
IN_FOUR_SHARES = ["trainer.reproducible=true", "trainer.virtual_ranks=4"]


def reproducible(ranks: int, folder: Path, disturb: str = "", pieces: int = 1) -> Done:
    """Starts the reproducible loop in this folder, or goes on with it."""
    folder.mkdir(exist_ok=True)
    code = REPRODUCIBLE.replace("PIECES", str(pieces))
    return execute_forked(["-c", code], ranks, folder, {"DISTURB": disturb})


@pytest.mark.parametrize("pieces", [1, only_long(3)])
def test_a_reproducible_loop_has_the_bits_of_the_shipped_training_on_any_number_of_ranks(pieces, tmp_path):
    """All figures of the loop have the same bits on 1, 2 and 4 ranks, too."""
    pieces_of_shipped = f"trainer.accumulate={pieces}"
    execute_forked(["-m", "allranks.train", *SHIPPED, *IN_FOUR_SHARES, pieces_of_shipped], 2, tmp_path).ok()
    shipped = Run(tmp_path / "runs/shipped")
    found = []
    for ranks in (1, 2, 4):
        reproducible(ranks, tmp_path / str(ranks), pieces=pieces).ok()
        found.append(own_programs.figures(tmp_path / str(ranks) / "runs/own"))
    epochs, weights = found[0]
    assert weights == shipped.summary["model/sha256"]
    assert found[1:] == [(epochs, weights)] * 2
    for name in ("train/loss", "val/loss"):
        assert [epoch[name] for epoch in epochs] == pytest.approx(shipped.column(name), rel=1e-6)


def test_a_reproducible_loop_that_is_killed_goes_on_on_another_number_of_ranks(tmp_path):
    """Killed on two ranks within an epoch, it goes on on one and on four: the bits of one undisturbed."""
    reproducible(1, tmp_path / "whole").ok()
    whole = own_programs.figures(tmp_path / "whole/runs/own")
    assert reproducible(2, tmp_path / "on 1", disturb="11").code not in (0, 85)
    shutil.copytree(tmp_path / "on 1", tmp_path / "on 4")
    for ranks in (1, 4):
        folder = tmp_path / f"on {ranks}"
        assert checkpoint.steps(folder / "runs/own")[0] == 10
        reproducible(ranks, folder).ok()
        assert own_programs.figures(folder / "runs/own") == whole


# A model with layers whose buffers are each rank's own until the ranks take over those of rank 0.
NORMED = """
import torch
from torch import nn

def net(input_shape, classes):
    return nn.Sequential(
        nn.Flatten(), nn.Linear(784, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, classes)
    )
"""
NORMED_SHIPPED = ["model=linear", "model._target_=normed.net", *(w for w in SHIPPED if w != "model=mlp")]
# The loop evaluates the bare model: DDP would send the buffers to the other ranks before each forward pass.
NORMED_OWN = (
    OWN.replace("from allranks.models import mlp", "from normed import net")
    .replace(
        "model = run.wrap(mlp([1, 28, 28], 10, dropout=0.2))",
        "bare = net([1, 28, 28], 10)\nmodel = run.wrap(bare)",
    )
    .replace("F.cross_entropy(model(x), y) for", "F.cross_entropy(bare(x), y) for")
    .replace("PIECES", "1")
)  # fmt: skip


def tensors(run: Run) -> dict[str, torch.Tensor]:
    """The weights and buffers in a run's newest checkpoint."""
    return load_file(checkpoint.path_of(run.path, checkpoint.steps(run.path)[0]) / "model.safetensors")


@pytest.mark.parametrize("ranks", [only_long(1), 2, only_long(3)])
def test_batch_norm_has_the_same_statistics_and_figures_in_both(ranks, tmp_path):
    """Those of rank 0, in the evaluations and in the checkpoints."""
    (tmp_path / "normed.py").write_text(NORMED)
    env = {"PYTHONPATH": str(tmp_path)}
    execute_forked(["-m", "allranks.train", *NORMED_SHIPPED], ranks, tmp_path, env).ok()
    execute_forked(["-c", NORMED_OWN], ranks, tmp_path, env).ok()
    shipped = Run(tmp_path / "runs/shipped")
    own = Run(tmp_path / "runs/own")
    theirs = tensors(shipped)
    ours = tensors(own)
    assert theirs.keys() == ours.keys() and "2.running_var" in ours
    for name, tensor in theirs.items():
        assert torch.equal(tensor, ours[name]), name
    assert own.summary["model/sha256"] == shipped.summary["model/sha256"]
    assert own.column("val/loss") == pytest.approx(shipped.column("val/loss"), rel=1e-6)


def test_an_average_of_weights_and_an_epoch_left_by_break_have_rank_0s_statistics(tmp_path):
    """AveragedModel is not in DDP: each rank's has averages of that rank's own statistics."""
    (tmp_path / "normed.py").write_text(NORMED)
    code = """
import torch, allranks
from normed import net
from torch.nn import functional as F
from torch.utils.data import TensorDataset
run = allranks.open("own", seed=7, device="cpu", threads=1, report=False)
data = TensorDataset(torch.rand(40, 784), torch.arange(40) % 10)
bare = net([1, 28, 28], 10)
model = run.wrap(bare)
average = torch.optim.swa_utils.AveragedModel(bare, use_buffers=True)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.keep(model=model, average=average, optimizer=optimizer)
for epoch in run.epochs(2):
    for inputs, labels in run.steps(run.batches(data, batch_size=8)):
        run.backward(F.cross_entropy(model(inputs), labels))
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(bare)
        if run.step == 7: break
    found = []
    for inputs, labels in run.batches(data, batch_size=40, shuffle=False):
        found += [*bare.buffers(), *average.buffers()]
    print(epoch, torch.cat([each.flatten().double() for each in found]).tolist())
run.finish()
"""
    done = execute_forked(["-c", code], 2, tmp_path, {"PYTHONPATH": str(tmp_path)}).ok()
    for epoch in range(2):
        of_rank_0, of_rank_1 = [line for line in done.out.splitlines() if line.startswith(f"{epoch} [")]
        assert of_rank_0 == of_rank_1
