"""A training step with the channels of each pixel side by side in memory, and without: milliseconds.

    python benchmarks/layout.py 3

One thread, float32, no data: the step of a model on images that are there. The fastest step of each round
counts, by the processor's own time, so that other programs on the machine matter little.
"""

from __future__ import annotations

import sys
import time

import torch
from torch.nn.functional import cross_entropy

from allranks import models

CASES = (("cnn", 128), ("vit", 128), ("resnet18", 16))  # model, examples in a step
STEPS = 5


def fastest_step_ms(model: str, batch: int, layout: torch.memory_format) -> float:
    torch.manual_seed(0)
    net = getattr(models, model)([1, 28, 28], 10).to(memory_format=layout)
    optimizer = torch.optim.SGD(net.parameters(), 0.05, fused=True)
    images, labels = torch.rand(batch, 1, 28, 28), torch.randint(10, (batch,))
    took_ms = []
    for _ in range(STEPS):
        began = time.process_time()
        (cross_entropy(net(images), labels, reduction="sum") / batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        took_ms.append(1000 * (time.process_time() - began))
    return min(took_ms)


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    torch.set_num_threads(1)
    print("| model, batch | row by row | channels last | ratio |\n|---|---|---|---|")
    for model, batch in CASES:
        layouts = (torch.contiguous_format, torch.channels_last)
        measured = [[fastest_step_ms(model, batch, layout) for layout in layouts] for _ in range(rounds)]
        plain, last = (min(column) for column in zip(*measured, strict=True))
        print(f"| `{model}`, {batch} | {plain:.0f} ms | {last:.0f} ms | {plain / last:.2f} |", flush=True)


if __name__ == "__main__":
    main()
