"""A run of a user's own loop from beginning to end: its ranks, its directory, its checkpoints, its records.

    Lifecycle(...)   brings the ranks up, takes the run directory, and reads the newest checkpoint
    begin()          the loop over epochs and steps begins: from now on the run saves, records and stops
    stopping()       around a part of the loop: if the ranks agree to stop there, the run is closed
    finish()         the run has come to its end: summary.json, the report
    fail()           an error has ended the run

What the program does in its loop is in the other files of this folder: each is given the run's Lifecycle.
"""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from allranks import config as configs
from allranks.base.errors import ANYONE, EXIT_REQUEUE, UserError
from allranks.base.processes import STOPPING, process_age_s
from allranks.base.signals import FROM_TERMINAL, Signals
from allranks.config import Config
from allranks.data.randomness import mixed, reseed
from allranks.job.identity import RankIdentity
from allranks.own.keeping import tell_of_models, telling_of_optimizers
from allranks.own.state import KeptObjects
from allranks.own.steps import OwnSteps
from allranks.own.stops import EvaluationStops
from allranks.own.wrapping import REMEDY
from allranks.run import best as the_best
from allranks.run import directory as rundir
from allranks.runtime import mpi, sharding
from allranks.runtime.bringup import open_runtime
from allranks.training import ending
from allranks.training.control import Control, RunStopped
from allranks.training.gradients import Gradients
from allranks.training.length import RunLength
from allranks.training.loop import Loop
from allranks.training.records import Records, last_of
from allranks.training.report import Reporter, Told
from allranks.training.saver import Saver
from allranks.training.state import weights_sha256


class How(NamedTuple):
    """How a run is opened."""

    directory: str
    identity: RankIdentity
    number: int  # counts the runs of this process
    is_one_of_several: bool  # of this process, one after another
    stops_at_nonfinite: bool  # whether a loss that is not finite ends the run
    signals: Signals


class Lifecycle:
    """The beginning and the end of one run, on one rank, and what it works with in between.

    config      the run's configuration
    exits       what is closed when the run ends
    is_open     whether the run has not ended
    runtime     the ranks, and the device of this one
    path        the run directory
    kept        what a checkpoint of the run holds
    gradients   the models of run.wrap(), and their backward passes
    summary     what summary.json holds; None until the run has finished

    Unless the run was finished in an earlier start:

    saver       writes checkpoints
    resumed     the checkpoint from which the run goes on, for messages
    records     metrics.jsonl, trackers and profiles
    recorder    the figures of single steps

    Once the loop has begun:

    loop        what runs around the epochs and steps
    control     when to save and when to stop
    stops       stops within an evaluation
    """

    def __init__(self, config: Config, how: How, exits: ExitStack) -> None:
        """Brings the ranks up, takes the run directory, and finds where the run goes on.

        `exits` is closed when the run ends, in whatever way. Raises UserError.
        """
        self.exits = exits
        self.config = config
        self.is_open = True
        self.is_one_of_several = how.is_one_of_several
        self.stops_at_nonfinite = how.stops_at_nonfinite
        self.summary: Mapping[str, Any] | None = None
        # A first run's time includes the import of torch.
        self._began_s = process_age_s() if how.number else 0.0

        self._signals = how.signals
        _check_thread("allranks.open()")
        # A batch system may send these two as a warning. Without a handler they would end the process.
        self._signals.count(signal.SIGUSR1, signal.SIGUSR2)
        self.runtime = open_runtime(how.identity, configs.runtime_settings(config), run=how.number)
        self._best = the_best.rule_of(config.checkpoint.best)
        told = Told(title=f"Run {config.name}", console=config.console, best=self._best, is_tested=False)
        self._report = exits.enter_context(ending.of_run(self.runtime, Reporter(self.runtime, told)))
        decisive = configs.decisive_values(config)
        is_wanted = sharding.is_wanted(config.sharding, self.runtime)
        self.kept = KeptObjects(self.runtime, decisive, is_wanted)
        self.gradients = Gradients(self.runtime, config.sharding if is_wanted else None, REMEDY)
        # begin() makes these four.
        self.loop: Loop | None = None
        self.control: Control
        self.stops: EvaluationStops
        self._startup_s = 0.0

        self.path, standing = self.runtime.meeting.from_rank_0(
            lambda: rundir.find(how.directory, config.name, decisive, config.resume)
        )
        self._report.started()
        if standing == rundir.Standing.FINISHED:
            self._finished_before()
        else:
            self._take_directory(is_new=standing == rundir.Standing.NEW)

    def _finished_before(self) -> None:
        """The run has finished in an earlier start: ends the program, or lets it go on to other runs."""
        self._report.finished_before(self.path)
        if not self.is_one_of_several:
            self.close()
            mpi.leave(0)
            sys.exit(0)
        summary = self.runtime.meeting.from_rank_0(lambda: _summary_in(self.path))
        self.kept.position.epoch = summary["epochs"]
        self.kept.position.step = summary["steps"]
        self.summary = summary
        self.close()

    def _take_directory(self, is_new: bool) -> None:
        """Makes the run directory, or finds the checkpoint in it from which the run goes on."""
        runtime, config = self.runtime, self.config
        self._is_new = is_new
        if is_new:
            self.path = runtime.meeting.from_rank_0(
                lambda: rundir.create(self.path, configs.freeze(config))
            )
        save_s = config.watchdog.save_s
        saver = Saver(
            runtime, self.path, self.kept, keep=config.checkpoint.keep, save_s=save_s, best=self._best
        )
        self.saver = self.exits.enter_context(saver)
        self.resumed = self.saver.resume(config.resume)
        self.records = Records(
            runtime,
            config.trainer,
            config.tracker,
            configs.leaves(config),
            profile=config.profile,
            save_s=save_s,
            recorder=OwnSteps,
        )
        assert isinstance(self.records.recorder, OwnSteps)
        self.recorder = self.records.recorder
        reseed(mixed(config.seed), runtime.device)

    @property
    def is_reproducible(self) -> bool:
        """Whether the run has the same bits on any number of ranks (allranks.open(virtual_ranks=...))."""
        return self.runtime.virtual_ranks is not None

    @property
    def reproducible_by(self) -> str:
        """What makes the run reproducible, for messages."""
        return f"virtual_ranks={self.runtime.virtual_ranks}"

    @property
    def directory(self) -> Path:
        """The run directory, the same on all ranks."""
        return Path(self.path)

    def check_open(self, what: str) -> None:
        """Raises UserError if the run has ended; `what` is the call that the program has made."""
        if not self.is_open:
            raise UserError(f"{what} is called after the run has ended: run.finish() is the last call.")

    # --- the loop ------------------------------------------------------------------------------------

    def begin(self, epochs: int | None) -> Loop:
        """Returns the loop. If it has not begun, it begins here, with everything that the program keeps."""
        if self.loop is not None:
            if epochs is not None:
                self.control.epochs = epochs
                self._report.lengthened(epochs)
            return self.loop
        runtime = self.runtime
        _check_thread("its loop")
        with runtime.all_or_none():
            self.kept.check_all_kept()
        if runtime.is_main:
            tell_of_models(self.gradients.models, self.kept.objects)
        self.exits.enter_context(telling_of_optimizers(lambda: self.kept.objects, runtime.is_main))
        # From here on these signals are only counted, and the run saves before it ends.
        self._signals.count(signal.SIGTERM, *FROM_TERMINAL)
        parameters = sum(p.numel() for model in self.gradients.models for p in model.parameters())
        facts = {"model": f"{parameters:,} parameters"} if self.gradients.models else {}
        length = RunLength(epochs or 1, 0, 0)
        position = self.kept.position
        self._report.opened(self.path, position, facts, length, self.resumed, self.saver.check)
        self.records.open(self.path, position, length, self.saver.check, self._is_new)
        self._startup_s = process_age_s() - self._began_s
        self.saver.prepare()
        self.control = Control(runtime, self.saver, self._signals, self.config.checkpoint, epochs)
        trained = self.gradients.models
        kept = [each for each in self.kept.objects.values() if isinstance(each, nn.Module)]
        averages = [each for each in kept if not any(each is model for model in trained)]
        self.loop = Loop(runtime, position, self.control, self._report, self.records, trained, averages)
        self.stops = EvaluationStops(runtime, self.control, self.kept)
        return self.loop

    @contextmanager
    def stopping(self) -> Iterator[None]:
        """If the ranks agree to stop in the block, closes the run in order."""
        try:
            yield
        except RunStopped:
            if self.is_open:
                self.saver.finish()
                self.records.stopped()
                self._report.stopped(self.control.reason, self.kept.position, "the same command again")
                self.close()
                mpi.leave(EXIT_REQUEUE)
            raise

    # --- how it ends ---------------------------------------------------------------------------------

    def save_last(self) -> None:
        """Saves the run as it is at its end, and waits until the checkpoint is written."""
        self.saver.save()
        self.saver.finish()

    def finish(self, figures: Mapping[str, float]) -> None:
        """The run has come to its end, and is saved: writes summary.json and the report.

        `figures` are those that the program has logged of the whole run, by name.
        """
        summary = self._summarized(figures)
        self._report.finished(summary)
        self.records.finished(summary)
        self.close()
        if self.runtime.is_main and self.config.report:
            from allranks.report import at_end

            ended = [at_end.ToReport(self.path, self.records)]
            is_quiet = self.config.console == "quiet"
            at_end.finish(
                ended, self.runtime.identity, self.control.left_s, self._signals, is_quiet,
                leaves_mpi=not self.is_one_of_several,
            )  # fmt: skip
        else:
            self.records.close()
        self.summary = summary
        if not self.is_one_of_several:
            mpi.leave(0)
            # What the program does from here on does not belong to the run, so a signal must end the
            # process again.
            self._signals.let_end(*STOPPING)

    def _summarized(self, figures: Mapping[str, float]) -> dict[str, Any]:
        """What summary.json is to hold of the run, beside its `figures`."""
        position = self.kept.position
        models = [each for each in self.kept.objects.values() if isinstance(each, nn.Module)]
        summary: dict[str, Any] = {
            "state": "finished",
            "epochs": position.epoch,
            "steps": position.step,
            "world_size": self.runtime.world_size,
        }
        if models:
            summary["model/parameters"] = sum(p.numel() for model in models for p in model.parameters())
            summary["model/sha256"] = weights_sha256(
                nn.ModuleList(models) if len(models) > 1 else models[0]
            )
        summary |= figures
        summary["time/total_s"] = process_age_s() - self._began_s
        summary["time/startup_s"] = self._startup_s
        return summary | last_of(position.history)

    def fail(self, raised: BaseException) -> None:
        """Ends the run after an error of the program. Shows the error, and ends the other ranks, too."""
        self.is_open = False
        self.exits.__exit__(type(raised), raised, raised.__traceback__)

    def close(self) -> None:
        """Ends the run in order, on this rank: what was opened last is closed first."""
        self.is_open = False
        self.exits.close()


def _check_thread(what: str) -> None:
    """Raises UserError outside of the main thread."""
    if threading.current_thread() is not threading.main_thread():
        raise UserError(
            f"{what} is not in the program's main thread. Python lets only that one handle the signals by "
            "which a job ends: open the run and begin its loop there.",
            said_by=ANYONE,
        )


def _summary_in(directory: str) -> dict[str, Any]:
    """The content of the summary.json of a run that has finished."""
    summary: dict[str, Any] = json.loads((Path(directory) / "summary.json").read_text())
    return summary
