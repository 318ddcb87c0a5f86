"""What a run tells: on the console, in the records of the run directory, and in each rank's log file.

Every rank has a Reporter, so that nobody needs to ask which rank it is. Only rank 0's writes to the console
and to the records; the others show warnings and errors.
"""

from __future__ import annotations

import logging
import logging.handlers
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from io import TextIOWrapper
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from allranks.base import files, processes
from allranks.base.text import printable
from allranks.data.dealing import Batch
from allranks.data.loader import Data
from allranks.run import checkpoint
from allranks.run import directory as rundir
from allranks.runtime.runtime import Runtime

if TYPE_CHECKING:
    from allranks.training.training import Training

log = logging.getLogger("allranks")

EARLY_RECORDS = 10_000  # log lines kept until there is a log file; a start makes a few dozen


class Reporter:
    """One rank's report of one run, between open() and close()."""

    def __init__(self, runtime: Runtime) -> None:
        self.runtime = runtime
        self.directory: Path | None = None  # until the run directory is there
        self._check: Callable[[], None] = lambda: None
        self._metrics: TextIO | None = None  # metrics.jsonl; rank 0's, while it can be written
        self._history: Sequence[Mapping[str, Any]] = ()
        # Log lines come before the run directory does: they are kept, and go to the log file then.
        self._early = logging.handlers.MemoryHandler(EARLY_RECORDS, flushLevel=logging.CRITICAL + 1)
        self._handlers: list[logging.Handler] = []

    def open(self) -> None:
        """From now on this rank's log lines are shown, or kept for its log file."""
        root = logging.getLogger()
        root.setLevel(logging.INFO)
        logging.captureWarnings(True)
        console: logging.Handler
        if self.runtime.is_main:
            console = _Console(sys.stdout)
            console.addFilter(_is_for_rank_0s_console)
        else:
            console = _Console(sys.stderr)
            console.setFormatter(logging.Formatter(f"[{self._me()}] %(message)s"))
            console.addFilter(_is_for_other_ranks_console)
        self._add(console)
        self._add(self._early)

    def close(self) -> None:
        """Closes records and logs, and takes them out of Python's logging. May be called twice."""
        if self._metrics is not None:
            self._metrics.close()
        for handler in list(self._handlers):
            self._remove(handler)
            handler.close()

    # --- the story, from the beginning to one of its ends ---------------------------------------------

    def cell(self, place: str, overrides: Sequence[str], directory: str) -> None:
        """This run is a cell of a sweep, such as `cell 3/12`."""
        self._say("%s: %s in %s", place, printable(" ".join(overrides)), directory)

    def started(self) -> None:
        """The ranks have come up: says how many train where, and by what means they work together."""
        runtime = self.runtime
        hosts = len({facts.host_identity for facts in runtime.ranks})
        self._say(who_trains(runtime.world_size, hosts, runtime.device.type, runtime.threads))
        if runtime.world_size > 1:
            self._say(how_they_work_together(runtime.identity.launcher, runtime.kind, runtime.collectives))

    def data(self, data: Data) -> None:
        """The data is open: says how many examples there are, and of which shape."""
        self._say(
            "%s training, %s validation and %s test examples of %s",
            f"{len(data.train):,}", f"{len(data.val):,}", f"{len(data.test):,}",
            " x ".join(map(str, data.input_shape)),
        )  # fmt: skip

    def opened(
        self, directory: str, training: Training, resumed: str | None, check: Callable[[], None]
    ) -> None:
        """The run directory is there: logs and records go to it from now on.

        `resumed` is the checkpoint that the run goes on from. `check` raises UserError where another run
        has taken the directory; it is called before a record is replaced.
        """
        self.directory = Path(directory)
        self._check = check
        self._history = training.history
        with rundir.writing(directory):
            if self.runtime.is_main:
                check()
                rundir.describe(directory, self.runtime.describe())
                self._metrics = self._all_metrics()
            file = _LogFile(self.directory / "logs" / f"rank-{self.runtime.rank}.log")
        file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
        self._early.setTarget(file)
        self._early.flush()
        self._remove(self._early)
        self._add(file)
        if not self.runtime.is_main:  # rank 0's log begins with its story
            log.info("%s, rank %d of %d", self._me(), self.runtime.rank, self.runtime.world_size)
        self._say(
            "%s parameters; everything about this run is in %s", f"{training.parameters:,}", directory
        )
        if resumed:
            self._say(
                "going on from %s: step %d, in epoch %d", resumed, training.step, training.epoch + 1,
            )  # fmt: skip

    def progress(
        self, batches: Iterable[list[Batch]], training: Training, steps: int
    ) -> Iterator[list[Batch]]:
        """Gives the batches one by one, and shows a progress bar on rank 0's terminal."""
        if not (self.runtime.is_main and sys.stderr.isatty()):
            return iter(batches)
        from tqdm import tqdm

        return iter(
            tqdm(
                batches, f"epoch {training.epoch + 1}", steps, initial=training.epoch_steps, leave=False,
                unit="step", ncols=78,
            )
        )  # fmt: skip

    def epoch(self, metrics: Mapping[str, float | int], epochs: int) -> None:
        """One more epoch of `epochs` is trained and evaluated."""
        if self.runtime.is_main:
            try:
                if self._metrics is None:
                    self._metrics = self._all_metrics()
                else:
                    files.append_line(self._metrics, metrics)
            except OSError as error:
                self._metrics = None  # all of it is written anew as soon as that is possible
                log.warning("metrics.jsonl could not be written (%s); the training goes on", error)
        self._say(
            "epoch %*d/%d  lr %-8.3g train %.4f %6.2f %%  val %.4f %6.2f %%  %s/s",
            len(str(epochs)), metrics["epoch"], epochs, metrics["lr"],
            metrics["train/loss"], metrics["train/accuracy"],
            metrics["val/loss"], metrics["val/accuracy"],
            f"{metrics['throughput/samples_per_s']:,.0f}",
        )  # fmt: skip

    # --- how it ends ----------------------------------------------------------------------------------

    def finished_before(self, directory: str) -> None:
        """An earlier start has finished this run: says that nothing is left to do."""
        self._say("%s holds this run, finished already: nothing to do", directory)

    def interrupted(self) -> None:
        """Ctrl-C has ended a lone process at once, without a save."""
        if self.directory is None:
            return
        if checkpoint.steps(self.directory):
            log.warning("run.dir=%s goes on from the newest checkpoint there", self.directory)
        else:
            log.warning("nothing had been saved: run.dir=%s begins again", self.directory)

    def failed(self, message: str) -> None:
        """This rank alone has met an error, and all ranks end. Nothing is said where `message` is empty."""
        if message:
            # The console of the other ranks names them already.
            log.error(f"[{self._me()}] {message}" if self.runtime.is_main else message)

    def stopped(self, reason: str, training: Training, epochs: int) -> None:
        """All ranks have agreed to stop, and the training is saved."""
        where = f"in epoch {training.epoch + 1} of {epochs}" if training.epoch < epochs else "in the test"
        self._say(
            "stopped by %s after step %d, %s; it is saved: run.dir=%s goes on from there",
            reason, training.step, where, self.directory,
        )  # fmt: skip

    def finished(self, summary: Mapping[str, Any]) -> None:
        """The run is trained and tested. Writes summary.json, and metrics.jsonl whole once more."""
        if self.runtime.is_main:
            assert self.directory is not None
            with rundir.writing(str(self.directory)):
                if self._metrics is not None:
                    self._metrics.close()
                self._metrics = self._all_metrics()
                files.write_json(self.directory / "summary.json", summary)
        self._say(
            "test  loss %.4f  accuracy %.2f %% of %s examples; %.1f s in all",
            summary["test/loss"], summary["test/accuracy"], f"{summary['test/count']:,}",
            summary["time/total_s"],
        )  # fmt: skip

    # --- tools ----------------------------------------------------------------------------------------

    def _all_metrics(self) -> TextIO:
        """Writes metrics.jsonl anew, with all epochs so far; returns the file, open to append to."""
        assert self.directory is not None
        self._check()  # what is there may be another run's by now
        known = "".join(map(files.line, self._history))
        return files.write_text(self.directory / "metrics.jsonl", known)

    def _say(self, message: str, *values: object) -> None:
        if self.runtime.is_main:
            log.info(message, *values)

    def _me(self) -> str:
        return f"rank {self.runtime.rank} on {self.runtime.host}"

    def _add(self, handler: logging.Handler) -> None:
        logging.getLogger().addHandler(handler)
        self._handlers.append(handler)

    def _remove(self, handler: logging.Handler) -> None:
        logging.getLogger().removeHandler(handler)
        self._handlers.remove(handler)


def _is_for_rank_0s_console(record: logging.LogRecord) -> bool:
    return record.name.startswith("allranks") or record.levelno >= logging.WARNING


def _is_for_other_ranks_console(record: logging.LogRecord) -> bool:
    # Python's own warnings come on every rank alike: rank 0 shows them.
    return record.levelno >= logging.WARNING and record.name != "py.warnings"


class _Console(logging.StreamHandler):
    """A stream that may be closed or full while the training goes on."""

    def handleError(self, record: logging.LogRecord) -> None:
        """`| head` closes the console, a disk is full: no reason to complain, or to stop training."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handleError(record)


class _LogFile(_Console, logging.FileHandler):
    """logs/rank-N.log, which somebody may remove, and whose disk may be full."""

    def _open(self) -> TextIOWrapper:
        try:
            return super()._open()
        except FileNotFoundError:  # somebody has tidied up
            Path(self.baseFilename).parent.mkdir(exist_ok=True)
            return super()._open()

    def close(self) -> None:
        with suppress(OSError):
            super().close()


# --- words for the first lines of a run ---------------------------------------------------------------

# What started the ranks, by its name in job.identity, as a person would say it.
LAUNCHERS = {
    "mpich": "mpiexec (MPICH)",
    "openmpi": "mpiexec (Open MPI)",
    "mvapich": "mpiexec (MVAPICH)",
    "mvapich2": "mpiexec (MVAPICH2)",
    "pals": "mpiexec (PALS)",
    "cray-pmi": "a launcher of Cray's",
    "pmi": "a launcher with PMI",
    "pmix": "a launcher with PMIx",
    "flux": "Flux",
    "environment": "a launcher that sets RANK and WORLD_SIZE",
}
CARRIERS = {"mpi": "MPI", "nccl": "NCCL", "xccl": "XCCL"}


def who_trains(world_size: int, hosts: int, device_type: str, threads: int) -> str:
    """A sentence: how many ranks train, on how many hosts, and on which kind of device each."""
    device = (
        f"the CPU with {_count(threads, 'thread')}" if device_type == "cpu" else f"a GPU ({device_type})"
    )
    if world_size == 1:
        return f"Training in one process, on {device}."
    return f"Training on {_count(world_size, 'rank')} on {_count(hosts, 'host')}, each on {device}."


def how_they_work_together(launcher: str, kind: str, collectives: str) -> str:
    """A sentence about several ranks: what has started and connected them, and what adds up gradients.

    `launcher` is a name of job.identity, `kind` and `collectives` are those of the Runtime.
    """
    starter = LAUNCHERS.get(launcher, launcher)
    connector = "ezpz" if kind == "ezpz" else "PyTorch"
    carrier = CARRIERS.get(collectives, collectives)
    return f"{starter} started them, {connector} connects them, and {carrier} adds up their gradients."


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("s" if number != 1 else "")


def process_age_s() -> float:
    """Seconds since this process started, imports included."""
    stat = processes.process_stat(os.getpid())
    try:
        with open("/proc/uptime") as file:  # noqa: PTH123
            host_up_s = float(file.read().split()[0])
    except OSError:
        stat = None
    if stat is None:  # no /proc: count from the first import of this module
        return time.perf_counter() - _IMPORTED
    return host_up_s - stat.started_ticks / os.sysconf("SC_CLK_TCK")


_IMPORTED = time.perf_counter()
