"""What DDP's search for unused parameters costs in a forward and a backward pass.

    python benchmarks/unused.py

Milliseconds of processor time on one rank and one thread, for 16 images. The two kinds take turns, and the
least of six is shown. Several ranks would add the time in which they tell each other what they have used.
"""

from __future__ import annotations

import copy
import time

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from allranks import models

TURNS = 7  # the first one is left out: memory is taken from the system then
PASSES = {"mlp": 100, "cnn": 20, "vit": 12}


def main() -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    images = torch.randn(16, 1, 28, 28)
    for name, passes in PASSES.items():
        model = getattr(models, name)([1, 28, 28], 10)
        wrapped = {
            searches: DistributedDataParallel(copy.deepcopy(model), find_unused_parameters=searches)
            for searches in (False, True)
        }
        took_ms: dict[bool, list[float]] = {False: [], True: []}
        for _ in range(TURNS):
            for searches, each in wrapped.items():
                began = time.process_time()
                for _ in range(passes):
                    each(images).sum().backward()
                    each.zero_grad()
                took_ms[searches].append(1000 * (time.process_time() - began) / passes)
        without, with_search = (min(times[1:]) for times in took_ms.values())
        count = len(list(model.parameters()))
        print(f"{name:4} {count:3} parameters   {without:6.2f} ms   {with_search:6.2f} ms with the search")
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
