"""A training step of the mlp beside the least loop that does the same arithmetic: microseconds, in pairs.

    python benchmarks/step.py [PAIRS]

One thread, float32, batches of 128 from images that lie in memory as bytes. The bare loop gathers a
batch, scales it, and calls model, loss, backward and optimizer: it looks at no gradient, reports nothing,
and could neither be stopped nor resumed. Each pair takes about 15 s; the default, 6, about 1.5 minutes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from statistics import median

from common import environment, scratch, train

EXAMPLES, BATCH, EPOCHS = 25_600, 128, 4
CASE = [
    "model=mlp", "data=synthetic", f"data.train.count={EXAMPLES + BATCH}", "data.test.count=128",
    f"data.split=[{EXAMPLES},{BATCH}]", f"trainer.batch_size={BATCH}", f"trainer.epochs={EPOCHS}",
    "trainer.precision=fp32", "trainer.train_metrics=running", "threads=1", "device=cpu",
    "checkpoint.every_epochs=null",
]  # fmt: skip
BARE = f"""
import json, time, torch
from allranks import models
torch.set_num_threads(1)
torch.manual_seed(0)
net = models.mlp([1, 28, 28], 10, **json.loads(input()))
optimizer = torch.optim.SGD(net.parameters(), 0.05)
images = torch.randint(256, ({EXAMPLES}, 1, 28, 28), dtype=torch.uint8)
labels = torch.randint(10, ({EXAMPLES},))
took_s = []
for _ in range({EPOCHS}):
    began = time.perf_counter()
    for batch in torch.randperm({EXAMPLES}).split({BATCH}):
        loss = torch.nn.functional.cross_entropy(net(images[batch].float() / 255), labels[batch])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    took_s.append(time.perf_counter() - began)
print(min(took_s))
"""


def main() -> None:
    pairs = int(sys.argv[1]) if len(sys.argv) > 1 else 6
    steps = EXAMPLES // BATCH
    ratios = []
    with scratch() as folder:
        for pair in range(pairs):
            run = train(folder / str(pair), CASE)
            ours_us = 1e6 * min(epoch["time/train_s"] for epoch in run["epochs"]) / steps
            bare = subprocess.run(
                [sys.executable, "-c", BARE], input=json.dumps({"dropout": 0.2}), text=True,
                capture_output=True, env=environment(), check=True,
            )  # fmt: skip
            bare_us = 1e6 * float(bare.stdout) / steps
            ratios.append(ours_us / bare_us)
            print(
                f"allranks {ours_us:6.0f} us   bare loop {bare_us:6.0f} us   {ours_us / bare_us:5.2f}",
                flush=True,
            )
    print(f"median of {pairs}: {median(ratios):.2f} times the bare loop's step")


if __name__ == "__main__":
    main()
