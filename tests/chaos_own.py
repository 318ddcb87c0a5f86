"""A loop of the user's own that tests/chaos.py harms: python chaos_own.py KEY=VALUE ...

It understands the overrides that say where and when to save, how long to wait, and how much to train. The
others are for the training that comes with allranks.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import allranks

GROUPS = ("checkpoint", "watchdog")


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    settings: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for key, value in given.items():
        group, _, name = key.partition(".")
        if group in GROUPS:
            settings[group][name] = float(value) if name.endswith("_s") else int(value)

    run = allranks.open(
        "own", seed=5, dir=given["run.dir"], device="cpu", threads=1, report=False, **settings
    )
    x = torch.randn(1200, 64)
    y = x[:, :4].sin().sum(dim=1, keepdim=True)
    model = run.wrap(nn.Sequential(nn.Linear(64, 256), nn.ReLU(), nn.Dropout(0.2), nn.Linear(256, 1)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    run.keep(model=model, optimizer=optimizer, schedule=schedule)
    batches = run.batches(TensorDataset(x, y), batch_size=int(given["trainer.batch_size"]))
    tests = run.batches(TensorDataset(x, y), batch_size=100, shuffle=False)

    for _ in run.epochs(int(given["trainer.epochs"])):
        model.train()
        for inputs, targets in run.steps(batches):
            loss = F.mse_loss(model(inputs), targets)
            run.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
            run.log({"train/loss": loss})
        model.eval()
        with torch.no_grad():
            run.log({"val/loss": run.mean(F.mse_loss(model(a), b) for a, b in tests)})
        schedule.step()
    run.finish()


if __name__ == "__main__":
    main()
