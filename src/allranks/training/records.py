"""What is recorded of a run besides its epochs' figures: single steps, memory, FLOP/s, a profile.

Every rank has a Records object, because all ranks take part when the figures of steps and of memory are
brought together. Only rank 0 writes metrics-steps.jsonl, and hands figures to the trackers
(allranks.trackers).
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from allranks.base import files
from allranks.base.errors import UserError
from allranks.config import TrainerConfig
from allranks.run import directory as rundir
from allranks.runtime.runtime import Runtime
from allranks.training.flops import peak_of_this_device
from allranks.training.length import RunLength
from allranks.training.memory import peaks_of_ranks
from allranks.training.metrics import Sums
from allranks.training.position import TrainingPosition
from allranks.training.steps import StepRecorder
from allranks.training.training import Training

if TYPE_CHECKING:
    from allranks.trackers.follower import Trackers
    from allranks.training.profiling import Profile

log = logging.getLogger(__name__)

# The keys of an epoch's metrics that summary.json has as well.
OF_THE_RUN = (
    "memory/process_peak_bytes",
    "memory/device_peak_bytes",
    "throughput/model_flops_per_s",
    "throughput/share_of_peak",
)
STEPS = "metrics-steps.jsonl"
# How long rank 0 waits at the end for the trackers to take the figures that they have not got yet.
FINISH_S = 30.0  # after a run that has finished
# After a run that was stopped: the batch system may end the job within seconds (training.control.MARGIN_S).
STOP_S = 5.0


class Recorder(Protocol):
    """What records the figures of single steps."""

    def collect(self) -> list[dict[str, Any]]:
        """The figures of the steps recorded since the last call, over all ranks; all ranks call."""


class Records:
    """One rank's records of one run, from open() to finished() or stopped()."""

    def __init__(
        self,
        runtime: Runtime,
        trainer: TrainerConfig,
        tracker: Mapping[str, Any],
        values: Mapping[str, Any],
        profile: bool,
        save_s: float,
        recorder: Callable[[Sequence[int], Runtime], Recorder] = StepRecorder,
    ) -> None:
        """Makes the trackers on rank 0. All ranks call; all raise UserError where a tracker cannot be made.

        `tracker` is the configuration's section of that name, and `values` has every value of the
        configuration, by dotted key. `profile`: whether some steps are profiled. `save_s`: how many seconds
        the writing of a profile may take. `recorder` makes what records single steps, of the numbers of
        steps after which one is recorded.
        """
        self._flops_per_example: float | None = None  # of a forward and a backward pass
        self._peak_flops_per_s: float | None = None  # of one device; None if it is not known
        self._values = values
        self._wants_profile = profile
        self._save_s = save_s
        self._runtime = runtime
        every = [trainer.log_every_steps]
        self._trackers: Trackers | None = None  # without trackers their module is not imported
        self._are_closed = False  # whether the trackers of a finished run are closed
        if any(key != "every_steps" for key in tracker):
            from allranks.trackers.follower import Trackers

            self._trackers = Trackers(tracker)
            runtime.meeting.from_rank_0(self._trackers.build)
            every.append(self._trackers.every_steps)
        self._every = [number for number in every if number is not None]
        self.recorder = recorder(self._every, runtime)
        self._file: StepsFile | None = None  # rank 0's, where steps are recorded
        self._profile: Profile | None = None

    def counted(self, flops_per_example: float | None, has_convolutions: bool, precision: str) -> None:
        """Notes how much the training computes.

        `flops_per_example` is the number of floating-point operations of a forward and a backward pass for
        one example; None if they could not be counted. `precision` is that of these operations, as in
        `trainer.precision`.
        """
        self._flops_per_example = flops_per_example
        self._peak_flops_per_s = peak_of_this_device(self._runtime, precision, has_convolutions)

    def open(
        self,
        path: str,
        position: TrainingPosition,
        length: RunLength,
        check: Callable[[], None],
        is_new: bool,
    ) -> None:
        """Opens the records in the run directory `path`, and starts the trackers.

        `position` says where the run begins or goes on. `length` is the length of the whole run, with no
        steps where their number is not known. `check` raises UserError where another run has taken the
        directory. `is_new`: this start made the directory, so no earlier start has left anything in it.
        """
        directory = Path(path)
        left = length.steps - position.step if length.steps else None
        if self._wants_profile and left != 0:
            from allranks.training.profiling import Profile

            self._profile = Profile(self._runtime, directory, left, self._save_s)
        if not self._runtime.is_main:
            return
        with rundir.writing(path):
            if self._every or not is_new:
                check()
                self._file = StepsFile(directory / STEPS, position.step, bool(self._every))
            if self._trackers is not None:
                from allranks.trackers.protocol import Position, TrackedRun

                facts = TrackedRun(
                    directory=directory,
                    name=str(self._values["name"]),
                    config=self._values,
                    environment=json.loads((directory / "environment.json").read_text()),
                    resumed=Position(position.step, position.epoch),
                )
                self._trackers.start(facts, directory / STEPS)
                self._wake(position.history)

    # --- steps ---------------------------------------------------------------------------------------

    @contextmanager
    def of_step(self, training: Training) -> Iterator[Sums | None]:
        """The block takes one step. Yields the Sums to add its figures to; None if it is not recorded."""
        try:
            with self.profiled():
                assert isinstance(self.recorder, StepRecorder)
                yield self.recorder.begin(training)
        except UserError as error:
            if error.said_by is not None or self._runtime.world_size == 1:
                # All ranks raise this error here, for example after a loss that is not finite. So all of
                # them can still write the figures of the steps before it, which help to explain it.
                self.collect()
            raise

    @contextmanager
    def profiled(self) -> Iterator[None]:
        """The block takes one step, which may be one of those that are profiled."""
        if self._profile is not None:
            self._profile.begin_step()
        yield
        if self._profile is not None:
            self._profile.end_step()

    def collect(self) -> None:
        """Brings the figures of the recorded steps together, and writes them; all ranks call."""
        records = self.recorder.collect()
        if records and self._file is not None:
            with self._runtime.progress.writing():
                self._file.append(records)
            self._wake()

    # --- epochs --------------------------------------------------------------------------------------

    def of_epoch(self, samples_per_s: float) -> dict[str, float | int]:
        """The memory and the FLOP/s of an epoch, for its line in metrics.jsonl; all ranks call.

        `samples_per_s`: training examples per second, of all ranks together; 0 if that is not known.
        """
        measured: dict[str, float | int] = {**peaks_of_ranks(self._runtime)}
        if self._flops_per_example and samples_per_s:
            measured["throughput/model_flops_per_s"] = self._flops_per_example * samples_per_s
            if self._peak_flops_per_s:
                peak_of_all_ranks = self._peak_flops_per_s * self._runtime.world_size
                reached = measured["throughput/model_flops_per_s"]
                measured["throughput/share_of_peak"] = reached / peak_of_all_ranks
        return measured

    def epoch_closed(self, history: Sequence[Mapping[str, Any]]) -> None:
        """One more epoch is over; `history` has the metrics of all epochs so far."""
        if self._runtime.is_main:
            self._wake(history)

    # --- how it ends ---------------------------------------------------------------------------------

    def finished(self, summary: Mapping[str, Any]) -> None:
        """The run is over, and this is its summary.json. close() follows."""
        if self._trackers is not None and self._runtime.is_main:
            self._trackers.finished(summary)
        self._close_file()

    def stopped(self) -> None:
        """The run stops, and another start goes on with it. Waits a moment for the trackers."""
        self._close_file()
        self._close_trackers(STOP_S)

    def _close_file(self) -> None:
        """Closes metrics-steps.jsonl, on rank 0, where steps are recorded."""
        if self._file is not None:
            with self._runtime.progress.writing():
                self._file.close()

    def close(self, pictures: Sequence[Path] = ()) -> None:
        """Hands the finished run's `pictures`, PNG files, to the trackers, and waits until they are done.

        A sweep calls this twice for each of its runs: at the run's end, and when all pages are made. The
        second call opens the trackers once more. Only rank 0 waits, for FINISH_S at most. On other ranks
        this returns at once.
        """
        if self._are_closed:
            if not pictures or self._trackers is None or not self._runtime.is_main:
                return
            self._trackers.reopen()
        self._are_closed = True
        self._close_trackers(FINISH_S, pictures)

    def _close_trackers(self, limit_s: float, pictures: Sequence[Path] = ()) -> None:
        if self._trackers is None or not self._runtime.is_main:
            return
        # The trackers keep to `limit_s` by themselves. The watchdog measures with a clock of its own, so it
        # gets twice the time: it should only act where the limit itself does not work.
        with self._runtime.progress.phase("closing the trackers", 2 * limit_s):
            self._trackers.close(limit_s, pictures)

    def _wake(self, history: Sequence[Mapping[str, Any]] | None = None) -> None:
        """Tells the trackers that there are new steps, or a new epoch where `history` is given."""
        if self._trackers is None:
            return
        written = self._file.written if self._file is not None else 0
        self._trackers.wake(written, history)


def last_of(history: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The memory and the FLOP/s for summary.json: the values of the last epoch in `history`."""
    if not history:
        return {}
    return {key: history[-1][key] for key in OF_THE_RUN if key in history[-1]}


class StepsFile:
    """metrics-steps.jsonl, which rank 0 writes. It has no step twice, also after restarts of the run."""

    def __init__(self, path: Path, step: int, wanted: bool) -> None:
        """Takes back what an earlier start has written beyond `step`, from which this start goes on.

        `wanted`: whether this start records steps. If it does not, and there is no file, none is made.
        Raises OSError.
        """
        self.written = 0  # bytes, in whole lines; read by the trackers' threads
        self._path = path
        self._file: BinaryIO | None = None
        self._waiting: list[str] = []  # lines that could not be written yet
        self._fails = False  # whether the newest attempt to write has failed
        kept = "".join(files.line(record) for record in read_steps(path) if record["step"] <= step)
        if wanted or path.exists():
            files.write_text(path, kept).close()
            self.written = len(kept.encode())

    def append(self, records: Sequence[Mapping[str, Any]]) -> None:
        """Appends a line for each record, and hands them to the operating system.

        If that fails, as on a full disk, the lines are kept and tried again the next time.
        """
        self._waiting += map(files.line, records)
        self._write()

    def close(self) -> None:
        """Closes the file, after a last try to write the lines that could not be written before.

        append() would open it again.
        """
        if self._waiting:
            self._write()
        self._shut()

    def _write(self) -> None:
        """Writes the waiting lines; they stay where that fails, and the first failure is told."""
        text = "".join(self._waiting).encode()
        try:
            if self._file is None:
                self._file = self._path.open("r+b" if self._path.exists() else "w+b")
                # Somebody may have removed or cut the file: truncate() would fill it up with zero bytes.
                self.written = min(self.written, self._file.seek(0, os.SEEK_END))
                # A write that failed may have left half a line behind.
                self._file.truncate(self.written)
                self._file.seek(0, os.SEEK_END)
            self._file.write(text)
            self._file.flush()
        except OSError as error:
            if not self._fails:
                log.warning("%s could not be written (%s); the training goes on", STEPS, error.strerror)
            self._fails = True
            self._shut()
            return
        self._fails = False
        self.written += len(text)
        self._waiting.clear()

    def _shut(self) -> None:
        file = self._file
        self._file = None
        if file is not None:
            with suppress(OSError):
                file.close()


def read_steps(path: Path) -> Iterator[dict[str, Any]]:
    """The records of a metrics-steps.jsonl; none where there is no such file.

    A line that is not whole is left out: the process that wrote it was killed.
    """
    try:
        content = path.read_bytes()
    except FileNotFoundError:
        return
    for line in content.splitlines():
        with suppress(ValueError):
            record = json.loads(line)
            if isinstance(record, dict) and isinstance(record.get("step"), int):
                yield record
