"""Whole runs side by side: the tutorial's own loop against `allranks train`, on one process.

    python benchmarks/speed.py [ROUNDS]

Needs real MNIST ($ALLRANKS_DATA or ./data). Everything counts: imports, reading, every evaluation.
"""

from __future__ import annotations

import gzip
import os
import sys
from pathlib import Path
from statistics import median

from common import command, scratch, timed

LOOP = Path(__file__).with_name("tutorial_loop.py")


def main() -> None:
    rounds = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    root = Path(os.environ.get("ALLRANKS_DATA", "data"))
    with scratch() as folder:
        unpacked = folder / "MNIST" / "raw"
        unpacked.mkdir(parents=True)
        for packed in (root / "MNIST" / "raw").glob("*.gz"):
            (unpacked / packed.stem).write_bytes(gzip.decompress(packed.read_bytes()))
        print(f"{'run':<18}{'tutorial loop':>15}{'allranks':>10}{'ratio':>8}   (medians of {rounds})")
        for name in ("linear", "mlp"):
            theirs, ours = [], []
            for i in range(rounds):
                theirs.append(timed([sys.executable, str(LOOP), str(folder), name, "5"]))
                run = [f"experiment=tutorial_{name}", "device=cpu", f"run.dir={folder}/{name}-{i}"]
                ours.append(timed(command(run)))
            a, b = median(theirs), median(ours)
            print(f"tutorial_{name:<9}{a:>13.1f} s{b:>8.1f} s{a / b:>8.1f}")


if __name__ == "__main__":
    main()
