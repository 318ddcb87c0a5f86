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
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allranks import config as configs
from allranks.base.errors import EXIT_REQUEUE, UserError
from allranks.config import Config
from allranks.job.identity import RankIdentity
from allranks.run import directory as rundir
from allranks.training import ending
from allranks.training.control import FROM_TERMINAL, Control, EvaluationStopped, Signals

if TYPE_CHECKING:
    from allranks.data.loader import Data
    from allranks.run.cells import Cell
    from allranks.runtime.runtime import Runtime
    from allranks.training.metrics import Figures
    from allranks.training.report import Reporter
    from allranks.training.training import Training


def main() -> None:
    """Trains once for each configuration of the command line, one after the other.

    Exit codes: 0 at the end, 2 after a user's error, 85 where the run was stopped with a checkpoint to go
    on from. training/ending.py lists them all.
    """
    faulthandler.enable()
    with ending.of_process(os.environ) as identity:
        signals = Signals()
        # Without a handler these two would end a process that is still importing torch.
        signals.count(signal.SIGUSR1, signal.SIGUSR2)
        sweep: list[Cell] = []  # rank 0 fills it at the first run of a sweep
        ends: list[str] = []
        for number, config in enumerate(compose(identity)):
            finished = run(config, identity, number, signals, sweep)
            ends.append("finished" if finished else "stopped")
            if not finished:
                break
        if len(sweep) > 1:
            from allranks.run.results import table_of_sweep

            print(table_of_sweep(sweep, ends), flush=True)
        if "stopped" in ends:
            sys.exit(EXIT_REQUEUE)
        if "triton" not in sys.modules:  # its binding complains of objects that are still there at the end
            gc.freeze()  # Python would look through all of torch's objects once more before it ends


def compose(identity: RankIdentity) -> list[Config]:
    """The configurations of the command line; an error of one rank becomes an error of all.

    `allranks launch` has composed the configuration already. It starts each rank with the words
    `--frozen DIRECTORY SHA256`, and the run directory is there.
    """
    try:
        if sys.argv[1:2] == ["--frozen"]:
            directory, sha256 = sys.argv[2:4]
            return [configs.thaw(directory, sha256)]
        from allranks.compose import from_command_line

        # What --help and --cfg print, only rank 0 prints.
        with contextlib.redirect_stdout(io.StringIO()) if identity.rank else contextlib.nullcontext():
            return from_command_line(sys.argv[1:])
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
    sweep: list[Cell] | None = None,
) -> bool:
    """Trains one run to its end, or what is left of it. False where it was stopped before its end.

    `number` counts the runs of this process from 0: a sweep has several, and `sweep` has their cells on
    rank 0. `signals` stop the run.
    """
    sweep = [] if sweep is None else sweep
    from allranks.data import early

    # The data are read while torch is imported: the one waits for files, the other keeps the processor
    # busy.
    reading = early.start_reading(config.data) if identity.rank == 0 else None
    with _importing_torch(config.trainer.compile):
        from allranks import components
        from allranks.data import loader
        from allranks.runtime.bringup import open_runtime
        from allranks.training import building
        from allranks.training.report import Reporter, process_age_s
        from allranks.training.saver import Saver
        from allranks.training.trial import try_first_batch

    trainer = config.trainer
    began_s = process_age_s() if number else 0.0  # the first run's time includes the import of torch
    runtime = open_runtime(identity, config, run=number)
    if signals is not None:
        # Only now: until the ranks have met, these signals end a start that hangs.
        signals.count(signal.SIGTERM, *FROM_TERMINAL)

    with ending.of_run(runtime, Reporter(runtime)) as report:
        # A rank that ended with this error at once would break off the process group that the others may
        # still be connecting. So the ranks agree on it, as on every error.
        with runtime.all_or_none():
            building.global_batch_size(trainer, runtime.world_size)
        path, standing = runtime.meeting.from_rank_0(lambda: _find(config, number, sweep))
        if sweep:
            report.cell(f"cell {number + 1}/{len(sweep)}", sweep[number].overrides, path)
        if standing == rundir.Standing.FINISHED:
            report.finished_before(path)
            return True
        report.started()

        with runtime.all_or_none():  # a name that does not exist is told before the data are read
            components.locate_targets(
                {"model": config.model, "optimizer": config.optimizer, "scheduler": config.scheduler}
            )
        dtype = building.dtype_of(trainer.precision)
        data = loader.open_data(config.data, runtime, config.seed, dtype, reading)
        report.data(data, config.data["input_shape"])
        with runtime.all_or_none():
            training = building.build_training(config, runtime, examples=len(data.train))
        try_first_batch(training, data.train, config, runtime)

        if standing == rundir.Standing.NEW:
            path = runtime.meeting.from_rank_0(lambda: _create(path, config, sweep))

        with Saver(runtime, path, config) as saver:
            resumed = saver.resume(training)
            report.opened(path, training, resumed, saver.check)
            startup_s = process_age_s() - began_s

            control = Control(runtime, config, saver, signals or Signals())
            test = _train_and_test(training, data, config, runtime, control, report)
            saver.finish()
            if test is None:
                report.stopped(control.reason, training, trainer.epochs)
                return False
            summary = _summary(training, data, config, runtime, test)
            summary["time/total_s"] = process_age_s() - began_s
            summary["time/startup_s"] = startup_s
            report.finished(summary)
    return True


def _find(config: Config, number: int, sweep: list[Cell]) -> tuple[str, rundir.Standing]:
    """The directory of a run, and how far the run has come there. Rank 0 alone calls.

    With the first run of a sweep the directories of all its cells are chosen, as `allranks launch -m` does:
    0, 1, ... below one directory.
    """
    if number == 0 and {"-m", "--multirun"} & set(sys.argv):
        from allranks.run.cells import composed_cells  # what a single run does without

        sweep += composed_cells(sys.argv[1:])[1]
    if not sweep:
        return rundir.find(config)
    own_place = replace(config.run, dir=sweep[number].directory)
    return rundir.find(replace(config, run=own_place))


def _create(path: str, config: Config, sweep: Sequence[Cell]) -> str:
    """Makes the directory of a run, and the list of cells of its sweep. Rank 0 alone calls."""
    is_given = bool(sweep) or config.run.dir is not None
    made = rundir.create(path, configs.freeze(config), exactly=is_given)
    if sweep:
        from allranks.run.cells import list_cells

        list_cells(str(Path(path).parent), sweep)
    return made


@contextlib.contextmanager
def _importing_torch(compiles: bool) -> Iterator[None]:
    """What makes an import of torch in the block, and of all that needs torch, quick."""
    # Threads that wait for each other spin, by default so long that a busy node slows a step 50 times.
    # libgomp reads this once, when torch loads it.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    gc.disable()  # the import makes a million objects, none of which is garbage
    if compiles:
        yield
    else:
        from allranks.base.imports import without_path_lookups

        with without_path_lookups():
            from allranks.runtime import lean

            lean.keep_compiler_out()
            yield
    gc.freeze()  # from now on the collector passes over these objects
    gc.enable()


def _train_and_test(
    training: Training, data: Data, config: Config, runtime: Runtime, control: Control, report: Reporter
) -> Figures | None:
    """Trains to the end; the figures over the test set, or None where the ranks agreed to stop before."""
    from allranks.training import engine

    trainer, seed = config.trainer, config.seed
    if not engine.fit(training, data, trainer, seed, runtime, control, report):
        return None
    try:
        return engine.evaluate(training.model, data.test, trainer.precision, seed, runtime, control)
    except EvaluationStopped:
        return None


def _summary(
    training: Training, data: Data, config: Config, runtime: Runtime, test: Figures
) -> dict[str, Any]:
    """The beginning of summary.json; `test` are the figures over the test set."""
    from allranks.training.building import global_batch_size
    from allranks.training.state import weights_sha256

    return {
        "state": "finished",
        "epochs": training.epoch,
        "world_size": runtime.world_size,
        "global_batch_size": global_batch_size(config.trainer, runtime.world_size),
        "model/parameters": training.parameters,
        "model/sha256": weights_sha256(training.model),
        "test/loss": test.loss,
        "test/accuracy": test.accuracy,
        "test/count": test.examples,
        "val/count": len(data.val),
    }


if __name__ == "__main__":
    main()
