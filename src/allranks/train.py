"""One training run, on this process alone or on every rank that a launcher started.

    python -m allranks.train model=mlp
    mpiexec -n 4 python -m allranks.train model=mlp
    torchrun --nproc-per-node 4 -m allranks.train model=mlp

Each rank composes the same configuration from the same command line; only rank 0 writes and speaks.
torch is imported once there is something to train, so that --help answers at once.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import io
import math
import os
import signal
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from allranks import config as configs
from allranks.base import terminal
from allranks.base.errors import EXIT_REQUEUE, UserError
from allranks.base.processes import process_age_s
from allranks.base.signals import FROM_TERMINAL, Signals
from allranks.config import CheckpointConfig, Config
from allranks.job.identity import RankIdentity
from allranks.run import directory as rundir
from allranks.run.best import rule_of as best_rule
from allranks.runtime import mpi
from allranks.training import ending
from allranks.training.control import Control, RunStopped

if TYPE_CHECKING:
    from allranks.data.loader import Data
    from allranks.run.cells import Cell
    from allranks.runtime.runtime import Runtime
    from allranks.training.building import Recipe
    from allranks.training.metrics import Figures
    from allranks.training.records import Records
    from allranks.training.report import Reporter
    from allranks.training.training import Training


DEBUG = "--debug"  # the option that asks for a debug run (training/debug.py)


class End(NamedTuple):
    """How one run has ended in this process."""

    finished: bool  # False where it was stopped before its end
    directory: str = ""
    reports: bool = False  # whether this process makes the run's page
    left_s: float = math.inf  # seconds until the job's end
    records: Records | None = None  # set where the trackers still wait for the page's pictures


def main() -> None:
    """Trains once for each configuration of the command line, one after the other.

    Exit codes: 0 at the end, 2 after a user's error, 85 where the run was stopped with a checkpoint to go
    on from. training/ending.py lists them all.
    """
    faulthandler.enable()
    with ending.of_process(os.environ) as identity:
        signals = Signals()
        # A batch system may send these two as a warning. Without a handler they would end a process that is
        # still importing torch.
        signals.count(signal.SIGUSR1, signal.SIGUSR2)
        composed = compose(identity)
        sweep = _Sweep(composed, []) if {"-m", "--multirun"} & set(sys.argv) else None
        ends: list[str] = []
        to_report: list[End] = []  # on rank 0
        for number, (config, _) in enumerate(composed):
            # The run before has had these signals counted. Until this run can save, they end the process.
            signals.let_end(signal.SIGTERM, *FROM_TERMINAL)
            end = run(config, identity, number, signals, sweep)
            ends.append("finished" if end.finished else "stopped")
            if not end.finished:
                break
            if end.reports:
                to_report.append(end)
        if DEBUG in sys.argv[1:] and ends == ["finished"]:
            from allranks.training import debug

            terminal.say(debug.seen(str(config.run.dir)))
        left_s = to_report[-1].left_s if to_report else math.inf
        job_ends_at = time.monotonic() + left_s
        if to_report and "stopped" not in ends:
            _report(to_report, identity, signals, is_quiet=config.console == "quiet")
        # After the pages of its runs, to which its own page leads.
        if sweep is not None and len(sweep.cells) > 1:
            _compare(sweep.cells, ends, signals, left_s=job_ends_at - time.monotonic())
        mpi.leave(EXIT_REQUEUE if "stopped" in ends else 0)
        if "stopped" in ends:
            sys.exit(EXIT_REQUEUE)
        # Before it ends, Python looks through all of torch's objects once more. freeze() spares that time.
        # With triton it is left out: triton prints complaints about objects that still exist at the end.
        if "triton" not in sys.modules:
            gc.freeze()


def _report(ends: Sequence[End], identity: RankIdentity, signals: Signals, is_quiet: bool) -> None:
    """Makes the report pages of these runs, and gives the pictures to the trackers. Only rank 0 calls."""
    from allranks.report import at_end

    ended = [at_end.ToReport(end.directory, end.records) for end in ends]
    at_end.finish(ended, identity, ends[-1].left_s, signals, is_quiet)


def _compare(sweep: Sequence[Cell], ends: Sequence[str], signals: Signals, left_s: float) -> None:
    """Compares the runs of a sweep, and prints the comparison. Rank 0 alone calls.

    `ends` has "finished" or "stopped" for each run that was started. `left_s`: seconds until the job's end.
    """
    from allranks.report import compare_sweep

    config = sweep[0].config
    ended = compare_sweep.Ended("stopped" in ends, left_s, lambda: bool(signals.names))
    text = compare_sweep.made(Path(sweep[0].directory).parent, ends, config.report, ended)
    terminal.say(text.splitlines()[-1] if config.console == "quiet" else text)


def compose(identity: RankIdentity) -> list[tuple[Config, list[str]]]:
    """The configurations of the command line, each with its own overrides in a sweep.

    An error of one rank becomes an error of all.

    `allranks launch` has composed the configuration already and made the run directory. It starts each rank
    with the words `--frozen DIRECTORY SHA256`. The overrides that follow these words are not read here:
    they go into the run's records, as part of its command.
    """
    try:
        if sys.argv[1:2] == ["--frozen"]:
            directory, sha256 = sys.argv[2:4]
            return [(configs.thaw(directory, sha256), [])]
        if DEBUG in sys.argv[1:]:
            from allranks.training import debug

            return [(config, []) for config in debug.configurations(sys.argv[1:], identity.alone)]
        from allranks.compose import cells_from_command_line

        # Only rank 0 prints what --help and --cfg show.
        with contextlib.redirect_stdout(io.StringIO()) if identity.rank else contextlib.nullcontext():
            return cells_from_command_line(sys.argv[1:])
    except UserError as error:
        if not identity.alone:
            from allranks.runtime.bringup import refuse_together

            refuse_together(identity, error)
        raise


def run(
    config: Config,
    identity: RankIdentity,
    number: int = 0,
    signals: Signals | None = None,
    sweep: _Sweep | None = None,
) -> End:
    """Trains one run to its end, or what is left of it.

    `number` counts the runs of this process from 0. A sweep has several: `sweep` has them all,
    and is None for a single run. `signals` stop the run; without them no signal of this process does.
    """
    from allranks.data import early

    # The data are read while torch is imported: reading mostly waits for files, and the import mostly keeps
    # the processor busy.
    reading = early.start_reading(config.data) if identity.rank == 0 else None
    settings = configs.runtime_settings(config)
    decisive = configs.decisive_values(config)  # a checkpoint, or another start, must agree on them
    # engine and saver are used only in _train_in(). They are imported here because imports are quicker in
    # this block.
    with _importing_torch(config.trainer.compile):
        from allranks.data import loader
        from allranks.runtime.bringup import open_runtime
        from allranks.training import building, engine, saver, story, trial  # noqa: F401
        from allranks.training.records import Records
        from allranks.training.report import Reporter, Told

    began_s = process_age_s() if number else 0.0  # the first run's time includes the import of torch
    told = Told(
        predicts=config.task["_target_"] == configs.CLASSIFICATION,
        title=story.title(
            config.model, config.data, config.trainer.epochs, config.trainer.max_steps,
            is_one_batch=config.trainer.overfit_batch,
        ),
        console=config.console,
        best=best_rule(config.checkpoint.best),
    )  # fmt: skip
    runtime = open_runtime(identity, settings, run=number)
    with ending.of_run(runtime, Reporter(runtime, told)) as report:
        # If a rank ended at once with this error, the other ranks, which may still be connecting to the
        # process group, would fail with an error of their own. So the ranks agree on it, as on every error.
        with runtime.all_or_none():
            recipe = building.Recipe(
                task=config.task,
                model=config.model,
                optimizer=config.optimizer,
                scheduler=config.scheduler,
                trainer=config.trainer,
                seed=config.seed,
                batch_size=building.global_batch_size(config.trainer, runtime.world_size),
                sharding=config.sharding,
            )
        path, standing = runtime.meeting.from_rank_0(
            lambda: rundir.find(
                _directory_in_sweep(number, sweep) or config.run.dir, config.name, decisive, config.resume
            )
        )
        if sweep is not None and sweep.cells:
            report.cell(f"cell {number + 1}/{len(sweep.cells)}", sweep.cells[number].overrides, path)
        if standing == rundir.Standing.FINISHED:
            report.finished_before(path)
            return End(finished=True)
        report.started()

        with runtime.all_or_none():  # a wrong name is reported before the data are read
            recipe.check_names()
        # A tracker that is not installed is reported before the data are read, too.
        records = Records(
            runtime, recipe.trainer, config.tracker, configs.leaves(config),
            profile=config.profile,
            save_s=config.watchdog.save_s,
        )  # fmt: skip
        data = loader.open_data(
            config.data, runtime, config.seed, recipe.dtype, reading,
            limit_train=config.trainer.limit_train,
            limit_eval=config.trainer.limit_eval,
            repeated_batch=recipe.batch_size if config.trainer.overfit_batch else None,
            is_labelled=recipe.is_classification,
        )  # fmt: skip
        report.data(data)
        with runtime.all_or_none():
            training = building.build_training(recipe, runtime, examples=len(data.train))
        tried = trial.try_first_batch(training, data, recipe, runtime, told.best)
        records.counted(tried.flops_per_example, tried.has_convolutions, recipe.trainer.precision)
        building.distribute(training, recipe.trainer, tried.unused)

        if standing == rundir.Standing.NEW:
            is_given = sweep is not None or config.run.dir is not None
            path = runtime.meeting.from_rank_0(
                lambda: rundir.create(path, configs.freeze(config), exactly=is_given)
            )
            if sweep is not None:
                runtime.meeting.from_rank_0(lambda: _list_cells(path, sweep.cells))

        saving = _Saving(config.checkpoint, config.watchdog.save_s, config.resume, decisive)
        ready = _Ready(
            training, data, recipe, runtime, report, records, saving,
            wants_page=config.report,
            is_of_sweep=sweep is not None,
            began_s=began_s,
        )  # fmt: skip
        is_new = standing == rundir.Standing.NEW
        return _train_in(path, is_new, ready, signals or Signals(of_process=False))


class _Saving(NamedTuple):
    """When the run is saved, and from which checkpoint it goes on."""

    checkpoint: CheckpointConfig
    save_s: float  # how long one save may take
    resume: str  # `auto`, `never` or a path
    decisive: Mapping[str, Any]  # the values of the configuration that a checkpoint must agree on


class _Ready(NamedTuple):
    """A run that can begin to train: what is trained, who takes part, and what is kept of it."""

    training: Training
    data: Data
    recipe: Recipe
    runtime: Runtime
    report: Reporter
    records: Records
    saving: _Saving
    wants_page: bool  # whether the run's page is made at its end
    is_of_sweep: bool  # whether it is one of the several runs of a command
    began_s: float  # the age of this process when the run began


def _train_in(path: str, is_new: bool, ready: _Ready, signals: Signals) -> End:
    """Trains in the run directory `path` to the end of the run, or until it is stopped.

    `is_new`: the directory was made just now.
    """
    from allranks.training import building, engine, story
    from allranks.training.loop import Loop
    from allranks.training.records import last_of
    from allranks.training.saver import Saver
    from allranks.training.state import KeptTraining

    training, data, recipe = ready.training, ready.data, ready.recipe
    runtime, report, records = ready.runtime, ready.report, ready.records
    saving, checkpoint = ready.saving, ready.saving.checkpoint
    length = building.length_of(recipe, len(data.train))
    kept = KeptTraining(training, saving.decisive, runtime)
    with Saver(
        runtime, path, kept, keep=checkpoint.keep, save_s=saving.save_s, best=report.told.best
    ) as saver:
        resumed = saver.resume(saving.resume)
        # From here on these signals are only counted, and the run saves before it ends. Until here there
        # was nothing to save, so they ended the process at once, also where it waited for other ranks, for
        # files or for a download.
        signals.count(signal.SIGTERM, *FROM_TERMINAL)
        saver.prepare()
        position = training.position
        facts = {
            "model": f"{training.parameters:,} parameters, trained in {recipe.trainer.precision}",
            "batch": story.batches(recipe.batch_size, length.steps_per_epoch),
        }
        report.opened(path, position, facts, length, resumed, saver.check, recipe.batch_size)
        records.open(path, position, length, saver.check, is_new)
        startup_s = process_age_s() - ready.began_s

        control = Control(runtime, saver, signals, checkpoint, length.epochs)
        loop = Loop(runtime, position, control, report, records, models=[training.model])
        try:
            test = engine.fit_and_test(training, data, recipe, loop)
        except RunStopped:
            saver.finish()
            records.stopped()
            report.stopped(control.reason, position)
            return End(finished=False)
        # Nearly always the run as it stands now is saved already, and nothing is written. But a run that
        # went on from another run's checkpoint, with nothing left to train, has none of its own yet.
        saver.save()
        saver.finish()
        summary = _summary(training, data, recipe, runtime.world_size, test)
        summary["time/total_s"] = process_age_s() - ready.began_s
        summary["time/startup_s"] = startup_s
        summary.update(last_of(position.history))
        report.finished(summary)
        records.finished(summary)
    reports = ready.wants_page and runtime.is_main
    if ready.is_of_sweep or not reports:
        # The pages of a sweep are made after its last run. No tracker is kept open for so long: it is
        # opened once more for the pictures.
        records.close()
    return End(True, path, reports, control.left_s, records if reports else None)


class _Sweep(NamedTuple):
    """The trainings of a command line with -m."""

    composed: list[tuple[Config, list[str]]]  # the configuration of each, and its own overrides
    cells: list[Cell]  # the trainings with their directories; only on rank 0, from the first run on


def _directory_in_sweep(number: int, sweep: _Sweep | None) -> str | None:
    """The directory of the sweep's run of this number; None for a single run. Rank 0 alone calls.

    At the first run this fills `sweep.cells`: it chooses the directories of all runs, as
    `allranks launch -m` does: 0, 1, ... below one directory.
    """
    if sweep is None:
        return None
    if number == 0:
        # Imported here, because a single run does not need it.
        from allranks.run.cells import with_directories

        sweep.cells.extend(with_directories(sweep.composed, is_sweep=True)[1])
    return sweep.cells[number].directory


def _list_cells(directory: str, sweep: Sequence[Cell]) -> None:
    """Writes the list of a sweep's runs above the directory of one of them. Rank 0 alone calls.

    Raises UserError if it cannot be written.
    """
    from allranks.run.cells import write_list

    above = str(Path(directory).parent)
    with rundir.writing(above):
        write_list(above, sweep)


@contextlib.contextmanager
def _importing_torch(compiles: bool) -> Iterator[None]:
    """Makes the import of torch, and of all that needs torch, quick in the block.

    `compiles`: whether torch.compile is used. Then torch's compiler has to be imported too.
    """
    # OpenMP threads that wait for each other spin, that is, they keep their CPU busy. By default they do so
    # for so long that a step takes 50 times as long on a busy node. libgomp reads this variable once, when
    # torch loads it.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    gc.disable()  # the import makes a million objects, none of which is garbage
    if compiles:
        yield
    else:
        from allranks.runtime import lean

        with lean.quick_import():
            yield
    gc.freeze()  # from now on the collector passes over these objects
    gc.enable()


def _summary(
    training: Training, data: Data, recipe: Recipe, world_size: int, test: Figures
) -> dict[str, Any]:
    """The first values of summary.json; `test` holds the figures over the test set."""
    from allranks.training.state import weights_sha256

    return {
        "state": "finished",
        "epochs": training.position.epoch,
        "world_size": world_size,
        "global_batch_size": recipe.batch_size,
        "model/parameters": training.parameters,
        "model/sha256": weights_sha256(training.model),
        **test.named("test"),
        "test/count": test.examples,
        "val/count": len(data.val),
    }


if __name__ == "__main__":
    main()
