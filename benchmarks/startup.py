"""What a start costs: file-system calls (steady) and seconds (not) of each rank, counted with strace.

python benchmarks/startup.py
"""

from __future__ import annotations

import re
import shutil
import subprocess
import sys

from common import command, scratch, timed

CALLS = "openat,open,stat,newfstatat,access,readlink"
SMALL = ["data=synthetic", "data.train.count=1000", "data.test.count=100", "data.split=[800,200]"]


def count(argv: list[str], trace: str) -> int:
    """File-system calls of a process and its children."""
    subprocess.run(
        ["strace", "-f", "-qq", "-e", f"trace={CALLS}", "-o", trace, *argv], capture_output=True, check=True
    )
    with open(trace) as lines:  # noqa: PTH123
        return sum(bool(re.match(r"\d+ +\w+\(", line)) for line in lines)


def main() -> None:
    if shutil.which("strace") is None:
        sys.exit("startup.py needs strace")
    with scratch() as folder:
        run = [*SMALL, "trainer.epochs=1", "device=cpu"]
        rows = {
            "import torch": [sys.executable, "-c", "import torch"],
            "import torch, one SGD step": [
                sys.executable, "-c",
                "import torch; m = torch.nn.Linear(1, 1); o = torch.optim.SGD(m.parameters(), 0.1);"
                "m(torch.ones(1, 1)).backward(); o.step()",
            ],
            "guard, which starts true": [sys.executable, "-m", "allranks.launch.guard", "--", "true"],
            "allranks --help": [sys.executable, "-m", "allranks", "--help"],
            "allranks train --cfg job": command(["--cfg", "job"]),
            "allranks train, 1 rank": command([*run, f"run.dir={folder}/1"]),
            "allranks train, 2 ranks": command([*run, f"run.dir={folder}/2"], 2),
        }  # fmt: skip
        print(f"{'command':<30}{'file-system calls':>18}{'seconds':>9}")
        for name, argv in rows.items():
            calls = count(argv, f"{folder}/trace")
            again = [a.replace(f"run.dir={folder}/", f"run.dir={folder}/again") for a in argv]
            print(f"{name:<30}{calls:>18,}{timed(again):>9.1f}")


if __name__ == "__main__":
    main()
