"""Seconds from a fault until every rank is down, and until the first step after a restart, by launcher;
beside plain DDP under plain torchrun.

python benchmarks/failures.py [REPEATS]

Each figure is the worst of REPEATS (default 3) on this host. Then: what the watchdog costs a step.
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from allranks.config import WatchdogConfig
from allranks.runtime.watch.progress import Progress
from common import TRAINING, environment, mpiexec, scratch, torchrun

RANKS = 3
STEP_S = 3  # watchdog.step_s
TIMEOUT_S = 15  # of the plain loop's process group; torch's own is 1800 s
GIVE_UP_S = 60

# Raises on rank 1 once there is a file `raise`, and leaves a file for each process that trains as rank 1.
MODEL = """
import os, time, torch
class Net(torch.nn.Linear):
    def forward(self, images):
        time.sleep(0.01)
        if self.training and int(os.environ.get("RANK") or os.environ["PMI_RANK"]) == 1:
            open(f"trains-{os.getpid()}", "w").close()
            if os.path.exists("raise"):
                raise ValueError("as told")
        return super().forward(images.flatten(1))
"""
PLAIN = f"""
import datetime, os, sys, torch, lab
torch.distributed.init_process_group("gloo", timeout=datetime.timedelta(seconds={TIMEOUT_S}))
model = torch.nn.parallel.DistributedDataParallel(lab.Net(784, 10))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
while True:
    model(torch.rand(32, 784)).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
    open("going", "w").close()
"""
OVERRIDES = [
    "data=synthetic", "model=lab", "device=cpu", "threads=1", "trainer.epochs=1000000",
    "trainer.batch_size=2000", "checkpoint.every_epochs=null", f"watchdog.step_s={STEP_S}", "run.dir=run",
    "--config-dir=conf",
]  # fmt: skip
PROGRAM = [*TRAINING, *OVERRIDES]
LAUNCH = [sys.executable, "-m", "allranks", "launch", "-n", str(RANKS)]
SETUPS = {
    "mpiexec": mpiexec(RANKS, PROGRAM),
    "torchrun": torchrun(RANKS, PROGRAM, "--standalone"),
    "allranks launch": [*LAUNCH, *OVERRIDES],
    "plain DDP, torchrun": torchrun(RANKS, ["plain.py"], "--standalone"),
}
ONCE_MORE = "--max-restarts=1"
RESTARTS = {
    "torchrun": torchrun(RANKS, PROGRAM, "--standalone", ONCE_MORE),
    "allranks launch": [*LAUNCH, ONCE_MORE, *OVERRIDES],
    "plain DDP, torchrun": torchrun(RANKS, ["plain.py"], "--standalone", ONCE_MORE),
}
FAULTS: dict[str, Callable[[Path, int, int], object]] = {  # by folder, the launcher's pid, rank 1's pid
    "a rank raises": lambda folder, launcher, rank: (folder / "raise").touch(),
    "kill -9 of a rank": lambda folder, launcher, rank: os.kill(rank, signal.SIGKILL),
    "a rank is stopped": lambda folder, launcher, rank: os.kill(rank, signal.SIGSTOP),
    "kill -9 of the launcher": lambda folder, launcher, rank: os.kill(launcher, signal.SIGKILL),
}


def ranks_with(mark: str) -> dict[int, int | None]:
    """Living processes that carry the mark and a rank's variable, with the rank of those that train."""
    found: dict[int, int | None] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environ = (process / "environ").read_text(errors="replace")
            state = (process / "stat").read_text().rpartition(")")[2].split()[0]
            line = (process / "cmdline").read_text()
        except OSError:
            continue
        number = re.search(r"(?:^|\0)(?:RANK|PMI_RANK)=(\d+)", environ)
        if mark in environ and number and state not in "ZX":
            trains = "allranks.launch.guard" not in line
            found[int(process.name)] = int(number[1]) if trains else None
    return found


@contextmanager
def training(argv: list[str]) -> Iterator[tuple[Path, int, int, str]]:
    """(its folder, the launcher's pid, rank 1's pid, the mark of its processes) of a training under way."""
    mark = str(uuid.uuid4())
    environ = environment()
    with scratch() as folder:
        (folder / "lab.py").write_text(MODEL)
        (folder / "plain.py").write_text(PLAIN)
        (folder / "conf/model").mkdir(parents=True)
        (folder / "conf/model/lab.yaml").write_text(
            "_target_: lab.Net\nin_features: 784\nout_features: 10\n"
        )
        environ |= {"MARK": mark, "PYTHONPATH": f"{folder}:{environ.get('PYTHONPATH', '')}"}
        launcher = subprocess.Popen(
            argv, cwd=folder, env=environ, start_new_session=True, stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        metrics = folder / "run/metrics.jsonl"
        while not (folder / "going").exists() and not (metrics.exists() and metrics.read_text()):
            time.sleep(0.1)
        time.sleep(1)
        [rank] = [pid for pid, number in ranks_with(mark).items() if number == 1]
        yield folder, launcher.pid, rank, mark
        launcher.kill()
        launcher.wait()
        for pid in ranks_with(mark):
            os.kill(pid, signal.SIGKILL)


def seconds_until(reached: Callable[[], bool]) -> float:
    """inf where it is not reached within GIVE_UP_S."""
    began = time.monotonic()
    while not reached():
        if time.monotonic() > began + GIVE_UP_S:
            return float("inf")
        time.sleep(0.01)
    return time.monotonic() - began


def until_down(argv: list[str], fault: str) -> float:
    with training(argv) as (folder, launcher, rank, mark):
        FAULTS[fault](folder, launcher, rank)
        return seconds_until(lambda: not ranks_with(mark))


def until_it_trains_again(argv: list[str]) -> float:
    with training(argv) as (folder, _, rank, _):
        os.kill(rank, signal.SIGKILL)
        return seconds_until(lambda: len(list(folder.glob("trains-*"))) > 1)


def row(name: str, measure: Callable[[str], float | None], repeats: int) -> str:
    """One line of the table; a setup that `measure` has nothing for gets a dash."""
    figures = []
    for setup in SETUPS:
        worst = max(measure(setup) or 0.0 for _ in range(repeats))
        figures.append("-" if not worst else f"{worst:.1f}" if worst < GIVE_UP_S else f"not in {GIVE_UP_S}")
    return f"{name:<34}" + "".join(f"{figure:>21}" for figure in figures)


def main() -> None:
    repeats = int(sys.argv[1]) if len(sys.argv) > 1 else 3
    print(f"{RANKS} ranks on one host; watchdog.step_s={STEP_S}; the plain loop's timeout is {TIMEOUT_S} s")
    print(f"{'seconds until all ranks are down':<34}" + "".join(f"{name:>21}" for name in SETUPS))
    for fault in FAULTS:
        print(row(fault, lambda name, fault=fault: until_down(SETUPS[name], fault), repeats), flush=True)  # type: ignore[misc]
    print("seconds from kill -9 of a rank until its successor trains, with --max-restarts=1")
    again = row(
        "", lambda name: until_it_trains_again(RESTARTS[name]) if name in RESTARTS else None, repeats
    )
    print(again, flush=True)

    progress, calls = Progress(WatchdogConfig()), 100_000
    for name, call in {"completed": lambda: progress.completed(1), "arrive": progress.arrive}.items():
        began = time.thread_time()  # others' use of the processor left out
        for _ in range(calls):
            call()
        print(f"progress.{name}(): {(time.thread_time() - began) / calls * 1e9:.0f} ns")


if __name__ == "__main__":
    main()
