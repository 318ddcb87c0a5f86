"""`allranks.open()`: opens a run, and sees to it that every end of the program ends the run in order."""

from __future__ import annotations

import argparse
import atexit
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from allranks import config as configs
from allranks.base.errors import UserError, flush_console
from allranks.base.signals import FROM_TERMINAL, Signals
from allranks.base.text import first_line
from allranks.config import Config
from allranks.data.nests import is_dataclass, parts_of
from allranks.own.lifecycle import How, Lifecycle
from allranks.own.run import Run
from allranks.runtime.bringup import refuse_together
from allranks.training import ending

# Keys of the configuration that allranks.open() does not take: a loop of one's own has no use for them, or
# they follow from its other arguments.
_NOT_HERE = (*configs.NOT_OF_OWN_LOOPS, "run", "own", "name", "seed")

_opened: list[Lifecycle] = []  # of the runs of this process
# All runs share these counts: a signal that comes between two runs stops the next one.
_signals = Signals()


def open_run(
    name: str,
    *,
    seed: int = 0,
    dir: str | os.PathLike[str] | None = None,
    config: Mapping[str, Any] | argparse.Namespace | None = None,
    virtual_ranks: int | None = None,
    log_every_steps: int | None = None,
    stop_at_nonfinite: bool = True,
    detect_anomaly: bool = False,
    several: bool = False,
    **settings: Any,
) -> Run:
    """Opens the run of this name: a new one, or where it was left off; all ranks call.

    name:               the name of the run
    seed:               all random numbers follow from it; torch, NumPy and random are seeded with it
    dir:                the run directory; by default it is runs/NAME
    config:             values of the program that decide what it computes, such as {"lr": 3e-4}, or what
                        argparse gives. A run that goes on must have the same ones
    virtual_ranks:      into how many shares each batch is cut, a power of two: on any number of ranks that
                        divides it, the run computes the same bits. A step then goes through run.pieces()
    log_every_steps:    the figures that run.log() gets in every N-th step go to metrics-steps.jsonl, and to
                        trackers
    stop_at_nonfinite:  whether a loss in run.backward() that is not finite ends the run before its next
                        checkpoint, and a gradient that is not finite at once in run.take_step(). If not,
                        run.take_step() leaves such steps out
    detect_anomaly:     whether in each step the output of each layer and each operation of a backward pass
                        is looked at: the first one that is not finite is named, and the run ends. Each step
                        takes longer
    several:            whether the program opens several runs, one after another
    settings:           keys of allranks' own configuration, such as device="cpu" or
                        checkpoint={"every_s": 600} (docs/configuration.md)

    A run that has finished ends the program, with exit code 0. With `several` the program goes on instead,
    and run.is_finished is True. An error in what is given here, and an error of the program later on, ends
    all ranks, with one message.
    """
    if _opened and _opened[-1].is_open:
        # Like any error of the program, this one ends the run that is open, and is told by rank 0.
        raise UserError(
            f"allranks.open({name!r}): the run {_opened[-1].directory} is still open. Call its finish() "
            "before another run begins.",
            said_by=0,
        )
    exits = ExitStack()
    try:
        identity = exits.enter_context(ending.of_process(os.environ))
        if _opened and not (several and _opened[-1].is_one_of_several):
            raise UserError(
                f"allranks.open({name!r}): the program has had the run {_opened[-1].directory} already. In "
                "a program with several runs, one after another, give several=True to each "
                "allranks.open().",
                said_by=0,
            )
        try:
            trainer: dict[str, Any] = {
                "log_every_steps": log_every_steps,
                "detect_anomaly": detect_anomaly,
            }
            if virtual_ranks is not None:
                trainer |= {"reproducible": True, "virtual_ranks": virtual_ranks}
            composed = _composed(name, seed, config, trainer, settings)
        except UserError as error:
            if not identity.alone:
                refuse_together(identity, error)
            raise
        directory = str(dir or Path("runs") / composed.name)
        # Until this run can save, these signals end the process.
        _signals.let_end(signal.SIGTERM, *FROM_TERMINAL)
        how = How(directory, identity, len(_opened), several, stop_at_nonfinite, _signals)
        run = Run(composed, how, exits)
    except BaseException as raised:
        exits.__exit__(type(raised), raised, raised.__traceback__)
        raise
    _opened.append(run.lifecycle)
    if len(_opened) == 1:
        sys.excepthook = _ending_the_run(sys.excepthook)
        atexit.register(_at_exit)
    return run


def _composed(
    name: str,
    seed: int,
    config: Mapping[str, Any] | argparse.Namespace | None,
    trainer: Mapping[str, Any],
    settings: Mapping[str, Any],
) -> Config:
    """allranks' own configuration for the run; raises UserError for a key or value that it lacks.

    `trainer` has those keys of the section `trainer` that a loop of one's own has a use for.
    """
    known = [key for key in Config.__dataclass_fields__ if key not in _NOT_HERE]
    for key in settings:
        if key not in known:
            raise UserError(configs.unknown_key(key, known))
    ours = {
        "name": name,
        "seed": seed,
        "own": _own_value("config", config if config is not None else {}),
        "trainer": dict(trainer),
    }
    try:
        tree = OmegaConf.create({**settings, **ours})
    except OmegaConfBaseException as error:
        raise UserError(
            f"allranks.open() got a value that a file cannot hold ({first_line(error)}): give "
            "numbers, texts, lists and dicts."
        ) from error
    return configs.typed(tree)


def _own_value(key: str, value: Any) -> Any:
    """A value of the program's config as files hold it, in which paths are texts; raises UserError."""
    if isinstance(value, argparse.Namespace):
        value = vars(value)
    elif is_dataclass(value):
        value = parts_of(value)
    if isinstance(value, Mapping):
        return {name: _own_value(f"{key}.{name}", each) for name, each in value.items()}
    if key == "config":
        raise UserError(f"config={value!r}: give a dict of values by name.")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [_own_value(f"{key}[{number}]", each) for number, each in enumerate(value)]
    raise UserError(
        f"{key} is a {type(value).__name__}, which the run's files cannot hold: give numbers, texts, "
        "paths, lists and dicts."
    )


# --- the end of the program ----------------------------------------------------------------------------


def _ending_the_run(usual: Any) -> Any:
    """A sys.excepthook: an error that nothing has caught ends the run, and with it the other ranks."""

    def hook(kind: type[BaseException], raised: BaseException, where: TracebackType | None) -> None:
        run = _opened[-1]
        if run.is_open:
            _exiting(lambda: run.fail(raised))
        usual(kind, raised, where)

    return hook


def _at_exit() -> None:
    """Python calls this at the end of the program: a run that is still open has missed run.finish()."""
    run = _opened[-1]
    if run.is_open:
        missed = UserError(
            f"The program has ended without run.finish(): the run in {run.directory} is not marked as "
            "finished, and goes on from its newest checkpoint."
        )
        _exiting(lambda: run.fail(missed))


def _exiting(end: Any) -> None:
    """Calls `end`, and ends the process where that calls sys.exit(), which Python would ignore by now."""
    try:
        end()
    except SystemExit as exit_:
        flush_console()
        os._exit(exit_.code if isinstance(exit_.code, int) else 1)
