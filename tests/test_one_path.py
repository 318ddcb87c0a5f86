"""The shipped training and a loop of one's own are one path: a training has the same bits in both."""

from __future__ import annotations

import pytest

import own_programs
from helpers import Run, execute_forked

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


@pytest.mark.parametrize(("ranks", "pieces"), [(1, 1), (2, 1), (3, 1), (3, 4)])
def test_a_loop_of_ones_own_has_the_bits_of_the_shipped_training(ranks, pieces, tmp_path):
    """The weights are equal to the last bit. Epochs' losses are sums that are added up in another way."""
    execute_forked(["-m", "allranks.train", *SHIPPED, f"trainer.accumulate={pieces}"], ranks, tmp_path).ok()
    execute_forked(["-c", OWN.replace("PIECES", str(pieces))], ranks, tmp_path).ok()
    shipped = Run(tmp_path / "runs/shipped")
    epochs, weights = own_programs.figures(tmp_path / "runs/own")
    assert weights == shipped.summary["model/sha256"]
    for name in ("train/loss", "val/loss"):
        assert [epoch[name] for epoch in epochs] == pytest.approx(shipped.column(name), rel=1e-6)
