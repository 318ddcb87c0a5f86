"""Runs that are harmed at random, started again until they finish, and compared with an undisturbed twin.

    scripts/chaos --trials 200 --seed 1
    scripts/chaos --seed 1 --trial 17 23     the same models, faults and moments as in 17 and 23 above

Every choice of a trial follows from the seed and its number. What a machine's load decides is how far
the run has come when a fault arrives.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path

from allranks.base import processes
from allranks.run import checkpoint
from helpers import MEASURED, PYTHON, SMALL, TRAIN, clean_environment, end, marked, mpiexec

# Many times what any attempt takes: one that is not over by then hangs. On a busy machine a start takes
# half a minute; watchdog.start_s and the 30 s that torchrun leaves a stopped rank may come to that.
ATTEMPT_S = 240
ALL_DOWN_S = 20  # from the end of what was started to the end of all its processes
DISK = "12m"
WATCHDOG = ("watchdog.first_step_s=30", "watchdog.step_s=4", "watchdog.save_s=30")
START_S = 60  # for a start, on a machine that does other things, too ...
STOPPED_START_S = 25  # ... and in a trial in which one is stopped: ATTEMPT_S is to hold it

MODELS = {
    "linear": ("model=linear",),
    "dropout": ("model=mlp", "model.dropout=0.3", "optimizer.lr=0.1", "trainer.precision=fp64"),
    "cnn": ("model=cnn", "model.channels=[4,8]", "model.hidden=16", "optimizer.momentum=0.9"),
    "warm-up": ("model=mlp", "optimizer=adamw", "scheduler=warmup_cosine", "trainer.precision=fp32"),
    "plateau": (
        "model=linear", "scheduler=plateau", "scheduler.patience=0", "optimizer.lr=0.5",
        "trainer.precision=fp64",
    ),
    "accumulate": ("model=mlp", "optimizer.lr=0.1", "trainer.accumulate=3", "trainer.precision=fp32"),
    "running": ("model=mlp", "optimizer=adam", "trainer.train_metrics=running", "trainer.precision=fp64"),
}  # fmt: skip
# In some trials of several ranks the model is spread over them, and each rank saves its part.
SHARDED = "sharded"
MODELS_WITH_SHARDED = {
    **MODELS,
    SHARDED: (
        "model=mlp", "optimizer=adamw", "sharding=fsdp", "sharding.min_parameters=1000",
        "trainer.precision=fp32",
    ),
}  # fmt: skip
SHARE_OF_SHARDED = 0.2
# In others the training is a loop of the user's own.
OWN = "own loop"
SHARE_OF_OWN = 0.2
OWN_PROGRAM = (PYTHON, str(Path(__file__).with_name("chaos_own.py")))
EPOCHS = 3
TORCHRUN = (PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node")
BATCH = {1: 8, 2: 32, 3: 80, 4: 80}  # by ranks, which may have to share a core

# Faults that meet a run at work, with their weights, and what is done to its files between two attempts.
LIVE = {
    "kill -9 of a rank": 5, "SIGTERM": 2, "SIGUSR1": 2, "SIGUSR2": 2, "SIGTERM during the save": 2,
    "SIGSTOP of a rank": 2, "a pause": 1, "kill -9 of the launcher": 3, "full disk": 2,
    "read-only directory": 2, "deadline in the past": 1, "second writer": 1, "old job comes back": 0.5,
    "SIGSTOP at start-up": 1.5, "SIGINT at start-up": 1.5, "kill -9 of a guard": 1, "SIGSTOP of a guard": 1,
    "kill -9 of a proxy": 1, "SIGSTOP of a proxy": 1, "a pause of the supervisor": 1,
}  # fmt: skip
BETWEEN = {
    "flipped bit": 3, "torn file": 2, "emptied file": 2, "missing manifest": 1, "torn metrics": 1,
    "file times jump": 1, "another clock": 1,
}  # fmt: skip
AT_THE_END = "torn summary"
# What is done instead where a way to start has no such process, or nobody who would notice that it is
# stopped. Guards and the supervisor belong to `allranks launch`. MPICH's mpiexec starts a proxy on each
# host, which starts the ranks there. By itself mpiexec waits for ever for a proxy that is stopped, or that
# is killed within the first millisecond, before it has started anything.
INSTEAD = {
    "none": {
        "kill -9 of the launcher": "kill -9 of a rank", "kill -9 of a guard": "kill -9 of a rank",
        "kill -9 of a proxy": "kill -9 of a rank", "SIGSTOP of a rank": "a pause",
        "SIGSTOP at start-up": "a pause", "SIGSTOP of a guard": "a pause", "SIGSTOP of a proxy": "a pause",
        "a pause of the supervisor": "a pause",
    },
    "mpiexec": {
        "kill -9 of a guard": "kill -9 of a proxy", "SIGSTOP of a guard": "a pause of a proxy",
        "SIGSTOP of a proxy": "a pause of a proxy", "a pause of the supervisor": "a pause of a proxy",
    },
    "torchrun": {
        "kill -9 of a guard": "kill -9 of a rank", "SIGSTOP of a guard": "SIGSTOP of a rank",
        "kill -9 of a proxy": "kill -9 of the launcher", "SIGSTOP of a proxy": "SIGSTOP of a rank",
        "a pause of the supervisor": "a pause",
    },
    "launch": {},
}  # fmt: skip
# Which signal a fault sends, and to whom: to one of the ranks, guards or proxies, or to the launcher.
SENT = {
    "kill -9 of a rank": (signal.SIGKILL, "ranks"),
    "SIGSTOP of a rank": (signal.SIGSTOP, "ranks"),
    "SIGSTOP at start-up": (signal.SIGSTOP, "ranks"),
    "SIGINT at start-up": (signal.SIGINT, "ranks"),
    "SIGTERM": (signal.SIGTERM, "ranks"),
    "SIGTERM during the save": (signal.SIGTERM, "ranks"),
    "SIGUSR1": (signal.SIGUSR1, "ranks"),
    "SIGUSR2": (signal.SIGUSR2, "ranks"),
    "kill -9 of a guard": (signal.SIGKILL, "guards"),
    "SIGSTOP of a guard": (signal.SIGSTOP, "guards"),
    "kill -9 of a proxy": (signal.SIGKILL, "proxies"),
    "SIGSTOP of a proxy": (signal.SIGSTOP, "proxies"),
    "kill -9 of the launcher": (signal.SIGKILL, "launcher"),
    "a pause": (signal.SIGSTOP, "ranks"),
    "a pause of a proxy": (signal.SIGSTOP, "proxies"),
    "a pause of the supervisor": (signal.SIGSTOP, "launcher"),
}
AT_START_UP = ("SIGSTOP at start-up", "SIGINT at start-up")
ASKED_TO_STOP = ("SIGTERM", "SIGUSR1", "SIGUSR2", "SIGTERM during the save", "SIGINT at start-up")


# --- what a trial is ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """One of LIVE, at a moment: after a share of the twin's duration, or when something is seen."""

    kind: str
    moment: str  # "time", "start", "save", "checkpoint", "epoch"
    value: float
    luck: float  # in [0, 1): which rank, and how long

    def __str__(self) -> str:
        return f"{self.kind} ({self.moment} {self.value:.2g})"


@dataclass(frozen=True)
class Plan:
    """All that is decided beforehand."""

    number: int
    model: str
    reproducible: bool
    starts: Sequence[tuple[str, int]]  # launcher and ranks of each attempt, the last one for all others
    cadence: tuple[str, ...]
    live: Sequence[Fault]
    between: Sequence[Sequence[str]]  # after each of them
    at_the_end: bool
    seed: str  # of what is decided on the spot

    @property
    def words(self) -> tuple[str, ...]:
        """The overrides of the run and of its twin."""
        batch = 80 if self.reproducible else BATCH[self.starts[0][1]]
        fixed = ("trainer.reproducible=true",) if self.reproducible else ()
        return (*SMALL, *MODELS_WITH_SHARDED.get(self.model, ()), *fixed, f"trainer.epochs={EPOCHS}",
                f"trainer.batch_size={batch}")  # fmt: skip

    @property
    def twin(self) -> tuple[str, str, int]:
        """What the undisturbed run is started by; runs under mpiexec and `allranks launch` share one."""
        if self.reproducible:
            return self.model, "none", 1
        kind, ranks = self.starts[0]
        return self.model, "mpiexec" if kind == "launch" else kind, ranks

    def start(self, attempt: int) -> tuple[str, int]:
        return self.starts[min(attempt, len(self.starts) - 1)]

    def __str__(self) -> str:
        how = "reproducible" if self.reproducible else "{1} by {0}".format(*self.starts[0])
        return f"{self.number}: {self.model}, {how}, {' '.join(self.cadence)}"


def plan(seed: int, number: int, without: Sequence[str] = ()) -> Plan:
    """The trial of this number; `without` are kinds of faults that cannot be had here."""
    rng = random.Random(f"{seed} {number}")
    reproducible = rng.random() < 0.25
    starts = []
    if reproducible:
        for _ in range(5):
            ranks = rng.choices((1, 2, 4, 8), (4, 4, 3, 1))[0]
            starts.append((rng.choice(("mpiexec", "torchrun", "launch")) if ranks > 1 else "none", ranks))
    else:
        ranks = rng.choices((1, 2, 3, 4), (3, 4, 2, 2))[0]
        family = rng.choice(("mpi", "mpi", "torchrun")) if ranks > 1 else "none"
        for _ in range(5):
            kind = rng.choice(("mpiexec", "launch"))
            starts.append((kind if family == "mpi" else family, ranks))
    every = rng.choice((2, 5, 11)) * (3 if starts[0][1] == 1 else 1)
    cadence = rng.choice(
        ((f"checkpoint.every_steps={every}",), ("checkpoint.every_s=0.3",), ("checkpoint.every_epochs=1",))
    )
    live, between = [], []
    for _ in range(rng.choice((1, 2, 2, 3))):
        kinds = {kind: weight for kind, weight in LIVE.items() if kind not in without}
        kind = rng.choices(list(kinds), list(kinds.values()))[0]
        moment = rng.choice(("time", "time", "save", "checkpoint", "epoch"))
        if kind == "SIGTERM during the save":
            moment = "save"
        elif kind in ("SIGSTOP of a rank", "SIGSTOP of a guard", "old job comes back"):
            moment = "checkpoint"  # what is slow in start-up has long limits
        elif kind in AT_START_UP:
            moment = "start"
        value = {
            "time": lambda: rng.uniform(0.02, 0.9),
            "start": lambda: rng.uniform(0, 0.6),
            "epoch": lambda: rng.randint(1, 2),
        }.get(moment, lambda: rng.randint(1, 4))()
        live.append(Fault(kind, moment, value, rng.random()))
        kinds = {kind: weight for kind, weight in BETWEEN.items() if kind not in without}
        count = rng.choice((0, 0, 1, 1, 2))
        between.append(rng.choices(list(kinds), list(kinds.values()), k=count))
    model, keep = rng.choice(list(MODELS)), f"checkpoint.keep={rng.choice((1, 2, 3))}"
    # Drawn by itself, so that all other trials of a seed stay as they were before there was sharding.
    is_sharded = random.Random(f"{seed} {number} sharded").random() < SHARE_OF_SHARDED
    is_own = random.Random(f"{seed} {number} own").random() < SHARE_OF_OWN
    if is_sharded and not reproducible and starts[0][1] > 1:
        model = SHARDED
    elif is_own and not reproducible:
        model = OWN
    at_the_end, on_the_spot = rng.random() < 0.15, f"{seed} {number} on the spot"
    return Plan(
        number, model, reproducible, starts, (*cadence, keep), live, between, at_the_end, on_the_spot
    )


# --- one start of a run ------------------------------------------------------------------------------


class Interrupted(Exception):
    """This script was asked to end."""


SESSION = f"ALLRANKS_CHAOS={uuid.uuid4()}"  # in the environment of every process that comes of this one
_interrupted = threading.Event()


class Attempt:
    """A command at work, with all the processes that come of it."""

    def __init__(
        self,
        kind: str,
        ranks: int,
        words: Sequence[str],
        output: Path,
        prefix: Sequence[str],
        is_own: bool,
        **env: str,
    ) -> None:
        train = OWN_PROGRAM if is_own else TRAIN
        launch = [PYTHON, "-m", "allranks", "launch", "-n", str(ranks)]
        start = {
            "none": lambda: train,
            "mpiexec": lambda: [mpiexec(), "-n", str(ranks), *train],
            "torchrun": lambda: [*TORCHRUN, str(ranks), *train[1:]],
            "launch": lambda: [*launch, "--", *train] if is_own else launch,
        }[kind]()
        self.kind, self.size, self.prefix, self.output = kind, ranks, prefix, output
        self.mark = f"ALLRANKS_CHAOS_ATTEMPT={uuid.uuid4()}"
        marks = dict(mark.split("=") for mark in (SESSION, self.mark))
        if _interrupted.is_set():
            raise Interrupted
        with output.open("w") as file:
            self.process = subprocess.Popen(
                [*prefix, *start, *words], cwd=output.parent, env={**clean_environment(), **marks, **env},
                start_new_session=True, stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT,
            )  # fmt: skip
        self.began = time.monotonic()

    def ranks(self) -> list[int]:
        """Process ids of the ranks that are there by now."""
        return self.victims("ranks")

    def victims(self, what: str) -> list[int]:
        """Process ids of the ranks, guards or proxies that are there by now, or of the launcher."""
        if what == "launcher":
            return [self.launcher()]
        python = re.escape(PYTHON)
        command = {
            "ranks": rf"{python} (-u )?(-m allranks\.train|{re.escape(OWN_PROGRAM[1])}) ",
            "guards": rf"{python} -m allranks\.launch\.guard ",
            "proxies": r"\S*hydra_pmi_proxy ",
        }[what]
        there = sorted(pid for pid, line in marked(self.mark).items() if re.match(command, line))
        if what == "proxies":  # without a process that it has started, nothing of the run is there
            there = [pid for pid in there if processes.children(pid)]
        return there

    def send(self, signum: int, luck: float, what: str = "ranks") -> bool:
        """A signal to one of the ranks, guards or proxies, or to the launcher; False if none is there."""
        there = self.victims(what)
        with suppress(ProcessLookupError):
            if there:
                os.kill(there[int(luck * len(there))], signum)
                return True
        return False

    def send_all(self, signum: int) -> None:
        for pid in marked(self.mark):
            with suppress(ProcessLookupError):
                os.kill(pid, signum)

    def launcher(self) -> int:
        """The process id of what was started, below unshare."""
        if not self.prefix or "--fork" not in self.prefix:
            return self.process.pid
        started = processes.children(self.process.pid)
        return started[0] if started else self.process.pid

    def finish(self) -> tuple[int | None, list[str]]:
        """(exit code, None where it hung; the processes that outlived it). All are gone then."""
        code: int | None = None
        with suppress(subprocess.TimeoutExpired):
            code = self.process.wait(max(0.1, self.began + ATTEMPT_S - time.monotonic()))
        deadline = time.monotonic() + (ALL_DOWN_S if code is not None else 0)
        while (left := marked(self.mark)) and time.monotonic() < deadline:
            time.sleep(0.05)
        end(left)
        self.process.wait()
        return code, list(left.values())

    def text(self) -> str:
        return self.output.read_text(errors="replace")


# --- a trial -----------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """What became of a trial."""

    plan: Plan
    injected: list[str] = field(default_factory=list)
    attempts: int = 0
    lost: str = ""  # why it did not finish
    hung: bool = False  # whether one of its starts did not end by itself; it is lost then
    different: str = ""  # what differs from the twin
    untidy: list[str] = field(default_factory=list)  # processes left, tracebacks, exit codes

    @property
    def is_good(self) -> bool:
        return not (self.lost or self.different or self.untidy)


class Trial:
    """One run from its first start to its end."""

    def __init__(self, plan: Plan, folder: Path, twin: Path, twin_s: float) -> None:
        self.plan, self.folder, self.twin, self.twin_s = plan, folder, twin, twin_s
        self.rng = random.Random(plan.seed)
        self.outcome = Outcome(plan)
        self.prefix: Sequence[str] = ()  # of the next attempt's command
        self.asleep: Attempt | None = None  # an old job that is to come back
        self.kinds = {fault.kind for fault in plan.live}
        self.mounted = "full disk" in self.kinds
        self.run = folder / "disk" / "run" if self.mounted else folder / "run"

    def go(self) -> Outcome:
        self.folder.mkdir()
        if self.mounted:
            (self.folder / "disk").mkdir()
            _mount(self.folder / "disk")
        try:
            self._go()
        finally:
            if self.asleep is not None:
                self.asleep.send_all(signal.SIGKILL)
                self.asleep.process.wait()
            if self.mounted:
                if self.run.exists() and not self.outcome.is_good:
                    shutil.copytree(self.run, self.folder / "run", symlinks=True)
                _unmount(self.folder / "disk")
        return self.outcome

    def _go(self) -> None:
        live, between = list(self.plan.live), list(self.plan.between)
        undisturbed = 0
        torn = not self.plan.at_the_end
        while True:
            if finished(self.run):
                if torn:
                    break
                torn = True
                _tear(self.run / "summary.json", self.rng)
                self.outcome.injected.append(AT_THE_END)
            fault = live.pop(0) if live and not finished(self.run) and not self.asleep else None
            undisturbed += fault is None
            if undisturbed > 3:
                self.outcome.lost = f"it has not finished in {self.outcome.attempts} attempts"
                return
            if not self._attempt(fault):
                return
            if fault is not None:
                for kind in between.pop(0):
                    if not finished(self.run) and self._harm(kind):
                        self.outcome.injected.append(kind)
        self.outcome.different = difference(self.run, self.twin, moved=self.plan.reproducible)

    # --- while it runs --------------------------------------------------------------------------------

    def _attempt(self, fault: Fault | None) -> bool:
        """Starts the run once more, with a fault; False where nothing more can come of it."""
        kind, ranks = self.plan.start(self.outcome.attempts)
        self.outcome.attempts += 1
        if fault is not None:
            fault = replace(fault, kind=INSTEAD[kind].get(fault.kind, fault.kind))
        env = {}
        prefix, self.prefix = self.prefix, ()
        if fault is not None and fault.kind == "deadline in the past":
            env = {"ALLRANKS_DEADLINE": str(int(time.time()) - 86_400)}
        if fault is not None and fault.kind == "read-only directory" and os.geteuid() == 0:
            prefix = ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-dac_override"]
        attempt = self._started(kind, ranks, prefix, **env)
        undo: Callable[[], object] | None = None
        try:
            if fault is not None and self._until(attempt, fault):
                undo = self._inject(attempt, fault)
            if fault is not None and undo is not None:
                self.outcome.injected.append(fault.kind)
                self._wait(attempt, 0.1 + 2.5 * fault.luck)
                undo()
            if self.asleep is attempt:
                return True
            if self.asleep is not None:
                self._wake(attempt)
            code, left = attempt.finish()
        finally:
            if self.asleep is not attempt:
                attempt.send_all(signal.SIGKILL)
                attempt.process.wait()
            if undo is not None:
                undo()
        self._judge(attempt, fault if undo is not None else None, code, left)
        return code is not None

    def _started(
        self, kind: str, ranks: int, prefix: Sequence[str] = (), also: str = "", **env: str
    ) -> Attempt:
        start_s = STOPPED_START_S if "SIGSTOP at start-up" in self.kinds else START_S
        limits = (*WATCHDOG, f"watchdog.start_s={start_s}")
        words = (*self.plan.words, *self.plan.cadence, *limits, f"run.dir={self.run}")
        output = self.folder / f"attempt-{self.outcome.attempts}{also}.txt"
        return Attempt(kind, ranks, words, output, prefix, self.plan.model == OWN, **env)

    def _until(self, attempt: Attempt, fault: Fault) -> bool:
        """Waits for the fault's moment, at the latest for the last epoch; False if the run ends before."""
        if fault.kind == "deadline in the past":
            return True
        checkpoints, metrics = self.run / "checkpoints", self.run / "metrics.jsonl"
        there, before, saves = set(_names(checkpoints)), _id(metrics), set()
        while attempt.process.poll() is None and time.monotonic() < attempt.began + ATTEMPT_S:
            names = _names(checkpoints)
            saves |= {name for name in names if name.startswith(".step-")}
            lines = _content(metrics).count(b"\n") if _id(metrics) != before else 0
            passed = (time.monotonic() - attempt.began) / self.twin_s
            value = {
                "time": passed,
                "start": passed,
                "save": len(saves),
                "checkpoint": len({name for name in names if name.startswith("step-")} - there),
                "epoch": lines,
            }[fault.moment]
            if (value >= fault.value or lines >= EPOCHS - 1) and self._is_there(attempt, fault.kind):
                return True
            time.sleep(0.001)
        return False

    def _is_there(self, attempt: Attempt, kind: str) -> bool:
        """Whether what the fault is to meet has begun."""
        if kind == "read-only directory":
            return self.run.exists()
        return bool(attempt.victims(SENT[kind][1])) if kind in SENT else True

    def _wait(self, attempt: Attempt, seconds: float) -> None:
        with suppress(subprocess.TimeoutExpired):
            attempt.process.wait(seconds)

    def _inject(self, attempt: Attempt, fault: Fault) -> Callable[[], object] | None:
        """What ends the fault after a while; None where it met nobody."""
        kind, luck = fault.kind, fault.luck
        met, undo = True, lambda: None
        if kind in SENT:
            signum, what = SENT[kind]
            if kind == "SIGINT at start-up" and attempt.kind == "launch":
                what = "launcher"  # as Ctrl-C, which other launchers answer in ways of their own
            met = attempt.send(signum, luck, what)
            if kind.startswith("a pause"):
                undo = lambda: attempt.send_all(signal.SIGCONT)  # noqa: E731
            for _ in range(int(2 + 8 * luck) if kind == "SIGTERM during the save" else 0):
                self._wait(attempt, 0.02)
                attempt.send(signal.SIGTERM, luck)
        elif kind == "full disk":
            undo = _fill(self.folder / "disk")
        elif kind == "read-only directory":
            met, undo = self.run.exists(), _close(self.run)
        elif kind == "second writer":
            second = self._started(attempt.kind, attempt.size, also="-second")
            self._judge(second, fault, *second.finish())
        elif kind == "old job comes back":
            attempt.send_all(signal.SIGSTOP)
            self.asleep = attempt
        return undo if met else None

    def _wake(self, attempt: Attempt) -> None:
        """Lets the old job go on as soon as the new one has saved, or is over."""
        old, self.asleep = self.asleep, None
        assert old is not None
        try:
            self._until(attempt, Fault("", "checkpoint", 1, 0))
        finally:
            old.send_all(signal.SIGCONT)
        code, left = old.finish()
        if code in (0, 85) or code is None:
            self.outcome.untidy.append(f"the old job that came back ended with code {code}")
        self._judge(old, Fault("old job comes back", "", 0, 0), code, left)

    def _judge(self, attempt: Attempt, fault: Fault | None, code: int | None, left: Sequence[str]) -> None:
        """Notes what must not be, whatever becomes of the run."""
        text, where, kind = attempt.text(), attempt.output.name, fault.kind if fault else ""
        begun = "\n  directory   " in text
        if code is None:
            self.outcome.hung = True
            self.outcome.lost = (
                f"{where} hangs: {attempt.kind}, {len(left)} processes, after {kind or 'nothing'}"
            )
        elif left:
            self.outcome.untidy.append(
                f"{where}: {len(left)} processes outlived it by {ALL_DOWN_S} s: {left[0]}"
            )
        violent = kind.startswith(("kill", "SIGSTOP")) or kind == "old job comes back"
        ours = re.search(r"File \".*/allranks/", text)
        if ours and not (violent and attempt.kind != "none") and (begun or kind not in ASKED_TO_STOP):
            self.outcome.untidy.append(f"{where}: a traceback of ours after {kind or 'nothing'}")
        allowed: tuple[int, ...] | None = None
        if (kind in ASKED_TO_STOP and begun) or kind == "deadline in the past":
            allowed = (0, 1) if attempt.kind == "torchrun" else (0, 85)
        elif kind.startswith("a pause") or not kind:
            allowed = (0,)
        elif violent and code == 0 and not finished(self.run):
            self.outcome.untidy.append(f"{where}: exit code 0 after {kind}")
        if code is not None and allowed and code not in allowed:
            last = " | ".join(text.strip().splitlines()[-2:])
            self.outcome.untidy.append(
                f"{where}: exit code {code} after {kind or 'nothing'}: {last[-300:]}"
            )

    # --- between two attempts -------------------------------------------------------------------------

    def _harm(self, kind: str) -> bool:
        """Does it to the run's files, or prepares the next attempt; False if there is nothing to harm."""
        rng = self.rng
        if kind == "another clock":
            self.prefix = other_clock(rng.choice((86_400 * 3650, 3600)))
            return True
        if kind == "file times jump":
            for path in [p for p in self.run.rglob("*") if p.is_file()]:
                when = rng.choice((0, 1, time.time() + 3600, 4_000_000_000))
                os.utime(path, (when, when))
            return self.run.exists()
        if kind == "torn metrics":
            return _tear(self.run / "metrics.jsonl", rng)
        folders = sorted((self.run / "checkpoints").glob("step-*"))
        if sum(_is_whole(folder) for folder in folders) < 2:
            return False  # a run without any whole checkpoint is refused, as it should be
        folder = folders[-1] if rng.random() < 0.7 else rng.choice(folders)
        if kind == "missing manifest":
            (folder / "manifest.json").unlink(missing_ok=True)
            return True
        files = sorted(p for p in folder.iterdir() if p.stat().st_size)
        return bool(files) and HARM[kind](rng.choice(files), rng)


def _is_whole(folder: Path) -> bool:
    try:
        checkpoint.read(folder)
    except (checkpoint.Damaged, OSError):
        return False
    return True


def finished(run: Path) -> bool:
    try:
        return json.loads((run / "summary.json").read_text()).get("state") == "finished"
    except (OSError, ValueError):
        return False


_IN_METRICS = re.compile(rb', "(time|throughput|memory)/\w+": [^,}]+')


def difference(run: Path, twin: Path, moved: bool = False) -> str:
    """What differs between two finished runs, in a line; empty where nothing does but their times.

    `moved`: one of them was on another number of ranks for a while.
    """
    here, there = (json.loads((path / "summary.json").read_text()) for path in (run, twin))
    aside = ("world_size",) if moved else ()
    keys = [key for key in {**here, **there} if not key.startswith(MEASURED) and key not in aside]
    other = [key for key in keys if here.get(key) != there.get(key)]
    wrong = [f"{key}: {here.get(key)}, not {there.get(key)}" for key in other]
    metrics = [_IN_METRICS.sub(b"", _content(path / "metrics.jsonl")) for path in (run, twin)]
    if metrics[0] != metrics[1]:
        wrong.append(f"metrics.jsonl: {metrics[0]!r}, not {metrics[1]!r}")
    return "; ".join(wrong)


def _names(folder: Path) -> list[str]:
    try:
        return os.listdir(folder)  # noqa: PTH208 (a thousand times a second)
    except OSError:
        return []


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError:
        return b""


def _id(path: Path) -> int | None:
    try:
        return path.stat().st_ino
    except OSError:
        return None


def _tear(path: Path, rng: random.Random) -> bool:
    if path.exists():
        os.truncate(path, rng.randrange(max(1, path.stat().st_size - 2)))
    return path.exists()


def _flip(path: Path, rng: random.Random) -> bool:
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    return True


def _empty(path: Path, _: random.Random) -> bool:
    os.truncate(path, 0)
    return True


HARM = {"flipped bit": _flip, "torn file": _tear, "emptied file": _empty}


def other_clock(seconds: int) -> list[str]:
    """What a command is preceded by so that its host seems to have been up so much longer."""
    offsets = ("--monotonic", str(seconds), "--boottime", str(seconds))
    return ["unshare", "--time", *offsets, "--fork", "--kill-child"]


def _mount(folder: Path) -> None:
    words = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(folder)]
    subprocess.run(words, capture_output=True, timeout=30, check=True)


def _unmount(folder: Path) -> None:
    subprocess.run(["umount", str(folder)], capture_output=True, timeout=30, check=True)


def _fill(disk: Path) -> Callable[[], None]:
    """Not a byte is left on the disk, until what is returned is called."""
    ballast = disk / "ballast"
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12):
            with suppress(OSError):
                while True:
                    file.write(bytes(size))
    return lambda: ballast.unlink(missing_ok=True)


def _close(run: Path) -> Callable[[], None]:
    """Nothing new can be made in the run directory, until what is returned is called."""
    folders = [folder for folder in (run, run / "checkpoints", run / "logs") if folder.is_dir()]
    for folder in folders:
        folder.chmod(0o500)

    def open_again() -> None:
        for folder in folders:
            folder.chmod(0o700)

    return open_again


# --- all trials --------------------------------------------------------------------------------------


def cannot(kinds: Mapping[str, float]) -> dict[str, str]:
    """Which of the faults cannot be made here, and why."""
    found = {}
    root = os.geteuid() == 0
    with tempfile.TemporaryDirectory(prefix="allranks-chaos-") as folder:
        try:
            _mount(Path(folder))
            _unmount(Path(folder))
        except (OSError, subprocess.SubprocessError):
            found["full disk"] = "nothing may be mounted here"
    if root and shutil.which("setpriv") is None:
        found["read-only directory"] = "root writes everywhere, and there is no setpriv"
    try:
        subprocess.run([*other_clock(9), "true"], capture_output=True, timeout=30, check=True)
    except (OSError, subprocess.SubprocessError):
        found["another clock"] = "no time namespace may be made here"
    return {kind: why for kind, why in found.items() if kind in kinds}


class Twins:
    """The undisturbed runs, each made once, when it is asked for first."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lock = threading.Lock()
        self._locks: dict[tuple, threading.Lock] = {}
        self._durations: dict[tuple, float] = {}

    def of(self, plan: Plan) -> tuple[Path, float]:
        """The run directory, and the seconds that it took."""
        model, kind, ranks = plan.twin
        key = (*plan.twin, plan.reproducible)
        name = f"{model}-{'reproducible' if plan.reproducible else f'{kind}-{ranks}'}"
        with self._lock:
            lock = self._locks.setdefault(key, threading.Lock())
        with lock:
            if key not in self._durations:
                self.folder.mkdir(exist_ok=True)
                words = (*plan.words, f"run.dir={self.folder / name}")
                is_own = plan.model == OWN
                attempt = Attempt(kind, ranks, words, self.folder / f"{name}.txt", (), is_own)
                code, left = attempt.finish()
                assert code == 0 and not left, (name, code, left, attempt.text())
                self._durations[key] = time.monotonic() - attempt.began
        return self.folder / name, self._durations[key]


def table(outcomes: Sequence[Outcome]) -> list[str]:
    """Markdown, a row for each kind of fault, and the last line."""
    injected = Counter(kind for outcome in outcomes for kind in outcome.injected)
    lines = ["| fault | times | attempts: mean, most | lost | different |", "|---|---|---|---|---|"]
    for kind in (*LIVE, "a pause of a proxy", *BETWEEN, AT_THE_END):
        met = [outcome for outcome in outcomes if kind in outcome.injected]
        if not met:
            continue
        attempts = [outcome.attempts for outcome in met]
        mean = f"{sum(attempts) / len(met):.1f}, {max(attempts)}"
        lines.append(
            f"| {kind} | {injected[kind]} | {mean} | {_sum(met, 'lost')} | {_sum(met, 'different')} |"
        )
    total = f"{len(outcomes)} trials, {sum(injected.values())} faults, {len(injected)} kinds"
    ends = ", ".join(f"{_sum(outcomes, what)} {what}" for what in ("lost", "hung", "different"))
    return [*lines, "", f"{total}, {ends}"]


def _sum(outcomes: Sequence[Outcome], what: str) -> int:
    return sum(bool(getattr(outcome, what)) for outcome in outcomes)


def _interrupt(signum: int, _: object) -> None:
    _interrupted.set()
    end(marked(SESSION))
    raise SystemExit(128 + signum)  # once the trials under way have tidied up


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="scripts/chaos", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--trial", type=int, nargs="+", metavar="K", help="these alone")
    parser.add_argument("--parallel", type=int, default=2, help="trials at the same time (default: 2)")
    parser.add_argument("--keep", type=Path, help="a new folder for all runs, which stay there")
    options = parser.parse_args(arguments)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    folder = options.keep or Path(tempfile.mkdtemp(prefix="allranks-chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    skipped = cannot({**LIVE, **BETWEEN})
    for kind, why in skipped.items():
        print(f"without {kind}: {why}", flush=True)
    numbers = options.trial or range(1, options.trials + 1)
    twins, outcomes, began = Twins(folder.absolute() / "twins"), [], time.monotonic()

    def go(number: int) -> Outcome:
        mine = plan(options.seed, number, list(skipped))
        twin, twin_s = twins.of(mine)
        outcome = Trial(mine, folder.absolute() / f"trial-{number}", twin, twin_s).go()
        print(f"{mine}: {', '.join(outcome.injected)}; {outcome.attempts} attempts", flush=True)
        for problem in filter(None, (outcome.lost, outcome.different, *outcome.untidy)):
            print(
                f"    {problem}\n    repeat: scripts/chaos --seed {options.seed} --trial {number}",
                flush=True,
            )
        if options.keep is None and outcome.is_good:
            shutil.rmtree(folder / f"trial-{number}")
        return outcome

    with ThreadPoolExecutor(options.parallel) as pool:
        for outcome in pool.map(go, numbers):
            outcomes.append(outcome)
    good = all(outcome.is_good for outcome in outcomes)
    if options.keep is None and good:
        shutil.rmtree(folder)
    elif not good:
        print(f"What is left of it is in {folder}")
    took = f"{time.monotonic() - began:.0f} s"
    print(f"seed {options.seed}, {took}, {_sum(outcomes, 'untidy')} untidy\n")
    print("\n".join(table(outcomes)))
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
