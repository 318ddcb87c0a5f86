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
import traceback

from allranks import config as configs
from allranks.base.errors import EXIT_REQUEUE, EXIT_USER_ERROR, UserError, end_unread
from allranks.config import Config
from allranks.job.identity import RankIdentity, discover, launcher_rank, started_by_mpi
from allranks.run import directory as rundir
from allranks.runtime import mpi
from allranks.training.control import FROM_TERMINAL, Control, Signals


def main() -> None:
    """Composes, trains once for each composed configuration, and exits: 0, 2 after a user's error, or 85
    where it was stopped with a checkpoint to go on from."""
    faulthandler.enable()
    rank = launcher_rank(os.environ)
    identity: RankIdentity | None = None
    try:
        identity = discover(os.environ)
        launched = sys.argv[1:2] == ["--frozen"]
        signals = Signals()
        signals.count(signal.SIGUSR1, signal.SIGUSR2)  # which would end a process that awaits none
        for number, config in enumerate(compose(identity, launched)):
            if not run(config, identity, launched, number, signals):
                sys.exit(EXIT_REQUEUE)
        if "triton" not in sys.modules:  # whose binding complains about objects that are still there
            gc.freeze()  # Python would look through all of torch's objects once more before it ends
    except UserError as error:
        if error.said_by in (None, rank):
            print(f"allranks: {error}", file=sys.stderr, flush=True)
        if identity is None and started_by_mpi(os.environ):
            mpi.end_job(EXIT_USER_ERROR)  # a rank that the stale variables happen to fit waits for this one
        if error.said_by is None:
            mpi.abort(error.code)  # the other ranks do not know, and may wait for this one
        sys.exit(error.code)
    except KeyboardInterrupt:  # alone, that is: several ranks end one another
        print("allranks: interrupted", file=sys.stderr, flush=True)
        sys.exit(128 + signal.SIGINT)
    except BrokenPipeError:
        end_unread()
    except Exception:
        if mpi.at_work():
            traceback.print_exc()
            mpi.abort(1)
        raise


def compose(identity: RankIdentity, launched: bool) -> list[Config]:
    """The configurations of the command line; a rank's error there becomes every rank's.

    `allranks launch` composed beforehand, and starts each rank with `--frozen DIRECTORY SHA256`.
    """
    try:
        if launched:
            return [configs.thaw(*sys.argv[2:4])]
        from allranks.compose import from_command_line

        # --help and --cfg are rank 0's to print
        with contextlib.redirect_stdout(io.StringIO()) if identity.rank else contextlib.nullcontext():
            return from_command_line(sys.argv[1:])
    except UserError as error:
        if identity.alone:
            raise
        from allranks.runtime.bringup import open_runtime

        open_runtime(identity, None, "", error)
        raise


def run(
    config: Config,
    identity: RankIdentity,
    launched: bool = False,
    number: int = 0,
    signals: Signals | None = None,
) -> bool:
    """The whole of one run, or what is left of it; False where it was stopped before its end.

    `launched`: its directory is there already. The runs of a process have numbers. `signals` stop it.
    """
    from allranks.data import early

    # Threads that wait for each other spin, by default so long that a busy node slows a step 50 times.
    # Read once, when torch loads libgomp.
    os.environ.setdefault("GOMP_SPINCOUNT", "10000")
    reading = early.start_reading(config.data) if identity.rank == 0 else None
    gc.disable()  # importing torch makes a million objects, none of which is garbage
    if not config.trainer.compile:
        from allranks.runtime import lean

        lean.keep_compiler_out()
    from allranks.data import loader
    from allranks.runtime.bringup import open_runtime
    from allranks.training import building, engine
    from allranks.training.report import Reporter, process_age_s
    from allranks.training.saver import Saver
    from allranks.training.state import weights_sha256

    gc.freeze()
    gc.enable()
    trainer = config.trainer
    began_s = process_age_s() if number else 0.0  # a sweep's first run counts torch's import too
    runtime = open_runtime(identity, config, configs.digest(config), run=number)
    if signals is not None:
        signals.count(signal.SIGTERM, *FROM_TERMINAL)  # not before: a start that hangs would be hard to end
    with Reporter(runtime) as report:
        batch_size = building.global_batch_size(trainer, runtime.world_size)
        path, standing = runtime.meeting.from_rank_0(lambda: rundir.find(config))
        if standing == rundir.Standing.FINISHED:
            report.finished_before(path)
            return True
        report.started()

        data = loader.open_data(
            config.data, runtime, config.seed, building.dtype_of(trainer.precision), reading
        )
        report.data(data, config.data["input_shape"])
        with runtime.all_or_none():
            training = building.build_training(config, runtime, examples=len(data.train))

        if standing == rundir.Standing.NEW:
            frozen, exactly = configs.freeze(config), config.run.dir is not None
            path = runtime.meeting.from_rank_0(lambda: rundir.create(path, frozen, exactly))
        with Saver(runtime, path, config) as saver:
            resumed = saver.resume(training)
            report.opened(path, training, resumed, saver.check)
            startup_s = process_age_s() - began_s
            control = Control(runtime, config, saver, signals or Signals())
            if not engine.fit(training, data, trainer, config.seed, runtime, control, report):
                saver.finish()
                report.stopped(control.reason, training, trainer.epochs)
                return False
            test = engine.evaluate(training.model, data.test, trainer.precision, config.seed, runtime)
            saver.finish()
            report.finished(
                {
                    "state": "finished",
                    "epochs": training.epoch,
                    "world_size": runtime.world_size,
                    "global_batch_size": batch_size,
                    "model/parameters": training.parameters,
                    "model/sha256": weights_sha256(training.model),
                    "test/loss": test.loss,
                    "test/accuracy": test.accuracy,
                    "test/count": test.examples,
                    "val/count": len(data.val),
                    "time/total_s": process_age_s() - began_s,
                    "time/startup_s": startup_s,
                }
            )
    return True


if __name__ == "__main__":
    main()
