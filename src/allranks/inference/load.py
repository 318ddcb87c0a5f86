"""Loads the trained model of a run: chooses the checkpoint and the device, and reads the weights.

This module only reads. Nothing in the run directory is claimed, written or locked, so a run that is still
at work is not disturbed, and the model of a run that was cut off can be used as well.

The run may have been trained on any number of ranks, but this is a single process. It cuts the data into as
many shares as the run had ranks, and adds up over them in the same order. So it can repeat the figures of
the run to the last digit.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

import allranks
from allranks import components
from allranks import config as configs
from allranks.base.errors import UserError
from allranks.base.processes import usable_cpus
from allranks.config import Config, WatchdogConfig
from allranks.job.identity import RankIdentity
from allranks.run import checkpoint
from allranks.run.best import KEY, rule_of, value_of
from allranks.run.cells import CELLS
from allranks.run.directory import CONFIG
from allranks.runtime.bringup import is_available, open_runtime
from allranks.runtime.runtime import Runtime
from allranks.training.building import build_model, build_task, dtype_of
from allranks.training.state import STATE, restore_model

NEWEST = "newest"  # the default: summary.json was measured with the newest checkpoint of a finished run
BEST = "best"  # the best of the checkpoints that still exist, by the run's own checkpoint.best

# No other rank waits for a process that only uses a model. So the watchdog need not end it, however slow it
# is: 1e9 s are 30 years.
_NO_LIMITS = WatchdogConfig(start_s=1e9, first_step_s=1e9, step_s=1e9, save_s=1e9)

# A running training removes earlier checkpoints while they are read here. Then the list is made again.
_TRIES = 3


@dataclass(frozen=True)
class Trained:
    """A trained model, ready to be used, and what it was made from."""

    directory: Path  # of the run
    config: Config  # as the run has frozen it
    model: nn.Module  # on runtime.device, in evaluation mode
    task: Any  # says what a batch is, and what is measured (allranks.tasks)
    runtime: Runtime  # it has this process alone, and as many shares as the run had ranks
    precision: str  # the number format of the arithmetic here: that of the run, if this device supports it
    checkpoint: Path  # the checkpoint that the weights are from
    epoch: int  # epochs before the checkpoint
    step: int  # optimizer steps before the checkpoint
    remarks: tuple[str, ...]  # what the user should know: a checkpoint passed over, another precision


class Chosen(NamedTuple):
    """A checkpoint that was read and verified."""

    path: Path
    files: dict[str, bytes]
    passed_over: list[str]  # a line for each better or newer checkpoint that could not be used


def load(
    directory: str | Path, which: str = NEWEST, device: str | None = None, threads: int | None = None
) -> Trained:
    """The trained model of the run in this directory.

    `which` chooses the checkpoint, as choose() explains. `device` is a value of the key `device`. None
    stands for the device of the run; if this host does not have it, the best one that it has is taken.
    `threads` is the number of CPU threads; None stands for as many as each rank of the run had. Raises
    UserError if there is no run, or no checkpoint that can be read, or if the model cannot be built.
    """
    directory = Path(directory)
    config = read_config(directory)
    if config.own is not None:
        raise UserError(
            f"{directory} is the run of a program of one's own (allranks.open), which alone can make its "
            f"model: load the weights there, from {directory}/checkpoints/step-.../model.safetensors."
        )
    chosen = choose(directory, which)
    remarks = [f"the checkpoint {line}: it was passed over" for line in chosen.passed_over]

    # 1. The device and the precision of this process.
    wanted = device or config.device
    if device is None and wanted not in ("auto", "cpu") and not is_available(wanted):
        remarks.append(f"the run was told device={wanted}, which this host does not have")
        wanted = "auto"
    kind = _kind_of_device(wanted, config.trainer.precision)
    precision, remark = _precision_on(kind, config.trainer.precision)
    if remark:
        remarks.append(remark)
    here = replace(
        config,
        runtime="native",
        device=kind,
        threads=threads or config.threads or _threads_of_a_rank(directory),
        trainer=replace(config.trainer, precision=precision),
        watchdog=_NO_LIMITS,
    )
    runtime = open_runtime(RankIdentity("none"), configs.runtime_settings(here))
    if not config.trainer.reproducible:  # a reproducible run has a fixed number of shares already
        runtime.virtual_ranks = _world_size(chosen)

    # 2. The model with its weights.
    _look_for_the_code(config)
    model = build_model(config.model, config.seed, dtype_of(precision), runtime.device)
    state = restore_model(model, chosen.files, str(chosen.path))
    model.eval()
    return Trained(
        directory=directory,
        config=config,
        model=model,
        # Labels are smoothed in training only.
        task=build_task(config.task, label_smoothing=0.0, device=runtime.device),
        runtime=runtime,
        precision=precision,
        checkpoint=chosen.path,
        epoch=state["epoch"],
        step=state["step"],
        remarks=tuple(remarks),
    )


def read_config(directory: Path) -> Config:
    """The configuration that the run in this directory has frozen; raises UserError where there is none."""
    path = directory / CONFIG
    try:
        is_there = path.is_file()
        is_sweep = (directory / CELLS).is_file()
        names = sorted(entry.name for entry in directory.iterdir())
    except FileNotFoundError:
        raise UserError(f"{directory} is missing: give the directory of a run.") from None
    except NotADirectoryError:
        raise UserError(f"{directory} is a file: give the directory of a run.") from None
    except OSError as error:
        raise UserError(
            f"{directory} cannot be read ({error.strerror}): give the directory of a run."
        ) from error
    if not is_there and is_sweep:
        raise UserError(f"{directory} is a sweep: give one of its runs, such as {directory}/0.")
    if not is_there:
        what = f"has no {CONFIG}" if names else "is empty"
        raise UserError(f"{directory} {what}, so it is not the directory of a run: give one that is.")
    try:
        return configs.frozen(path)
    except UserError as error:
        made_by = version_of(directory)
        if made_by and made_by != allranks.__version__:
            raise UserError(
                f"{path} is of allranks {made_by}, and this is {allranks.__version__}: use that version, "
                f"or one that is newer. ({error})"
            ) from error
        raise UserError(f"{directory} has a configuration that cannot be used: {error}") from error


def version_of(directory: Path) -> str | None:
    """The version of allranks that trained the run, by its environment.json; None if that is missing."""
    versions = read_json(directory / "environment.json").get("versions")
    version = versions.get("allranks") if isinstance(versions, dict) else None
    return version if isinstance(version, str) else None


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a record of a run; empty if the record is missing or not written yet."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _look_for_the_code(config: Config) -> None:
    """Raises UserError, with what to do, where the code of the model is not found here."""
    try:
        components.locate_targets({"task": config.task, "model": config.model})
    except UserError as error:
        raise UserError(
            f"{error} The run was trained with code of your own: type the command in the folder where the "
            "training was typed, or set PYTHONPATH to that folder."
        ) from error


def _threads_of_a_rank(directory: Path) -> int | None:
    """The CPU threads that each rank of the run's last start had, unless this host has fewer CPUs.

    Another number of threads may change the last digits of a sum.
    """
    threads = read_json(directory / "environment.json").get("threads_per_rank")
    return threads if isinstance(threads, int) and 0 < threads <= usable_cpus() else None


def _world_size(chosen: Chosen) -> int:
    """The number of ranks that saved the checkpoint; restore_model() refuses one that makes no sense."""
    try:
        ranks = checkpoint.from_json(STATE, chosen.files[STATE])["world_size"]
    except (KeyError, TypeError, checkpoint.Damaged):
        return 1
    return ranks if isinstance(ranks, int) and ranks > 0 else 1


# --- the checkpoint ------------------------------------------------------------------------------------


def choose(directory: str | Path, which: str = NEWEST) -> Chosen:
    """The checkpoint that `which` asks for, read and verified.

    `newest` is the one with the most steps. `best` is the best one by the run's `checkpoint.best`, among
    those that were saved at the end of an epoch and are still there. A number is a step. Anything else is
    the path of a checkpoint. For `newest` and `best` a damaged checkpoint is passed over, and the next one
    is tried. Raises UserError if no checkpoint can be read.
    """
    if which == NEWEST:
        return _first_valid(directory, best_first=False)
    if which == BEST:
        return _first_valid(directory, best_first=True)
    if which.isdecimal():
        path = checkpoint.path_of(directory, int(which))
        there = _steps(directory)
        if int(which) not in there:
            steps = ", ".join(map(str, there)) or "none"
            raise UserError(f"--checkpoint {which}: {directory} has no such step. It has {steps}.")
        return _read_one(path, which)
    return _read_one(Path(which), which)


def _read_one(path: Path, given: str) -> Chosen:
    """The checkpoint at this path; `given` is what the user has named it by."""
    try:
        return Chosen(path, checkpoint.read(path.resolve()), [])
    except checkpoint.Damaged as damaged:
        raise UserError(
            f"--checkpoint {given}: {path} is no valid checkpoint ({damaged}). Give `{NEWEST}`, `{BEST}`, "
            "a step, or the path of another one."
        ) from damaged
    except OSError as error:
        raise UserError(f"--checkpoint {given}: {path} cannot be read ({error.strerror}).") from error


def _first_valid(directory: str | Path, best_first: bool) -> Chosen:
    """The first checkpoint that is valid, beginning with the best or with the newest."""
    for _ in range(_TRIES):
        passed_over: list[str] = []
        has_moved = False
        for path in _in_order(directory, best_first):
            try:
                return Chosen(path, checkpoint.read(path), passed_over)
            except checkpoint.Damaged as damaged:
                has_moved = has_moved or not path.exists()
                passed_over.append(f"{path.name}: {damaged}")
            except OSError as error:
                passed_over.append(f"{path.name}: {checkpoint.unreadable(error)}")
        if not has_moved:
            break
    where = checkpoint.folder(directory)
    if passed_over:
        raise UserError(
            f"{where} has no checkpoint that can be used: {'; '.join(passed_over)}. Bring one back from a "
            "copy, or give the directory of another run."
        )
    raise UserError(
        f"{directory} has no checkpoint yet: a run saves its first one after its first epoch, unless "
        "the keys below `checkpoint` say otherwise. Wait for it, or start the run again."
    )


def _in_order(directory: str | Path, best_first: bool) -> Sequence[Path]:
    """The checkpoints of a run, whether valid or not, in the order in which they are to be tried."""
    steps = _steps(directory)
    if best_first:
        steps = _best_first(directory, steps)
    return [checkpoint.path_of(directory, step) for step in steps]


def _steps(directory: str | Path) -> list[int]:
    """The steps of a run's checkpoints, newest first. Raises UserError if the folder cannot be read."""
    try:
        return checkpoint.steps(directory)
    except OSError as error:
        raise UserError(
            f"{checkpoint.folder(directory)} cannot be read ({error.strerror}): look whether it is there."
        ) from error


def _best_first(directory: str | Path, steps: Sequence[int]) -> list[int]:
    """These steps, which are sorted from the newest to the oldest, with the best ones first.

    Steps whose value is not known come last: those in the middle of an epoch, for example. Of equal ones
    the newest comes first.
    """
    rule = rule_of(configs.leaves(read_config(Path(directory)))[KEY])
    values: dict[int, float] = {}
    for line in _history(directory, steps):
        value = value_of(line, rule)
        if value is not None:
            values[line["step"]] = value
    known = [step for step in steps if step in values]
    others = [step for step in steps if step not in values]
    return [*sorted(known, key=values.__getitem__, reverse=not rule.lower_is_better), *others]


def _history(directory: str | Path, steps: Sequence[int]) -> list[Mapping[str, Any]]:
    """The metrics of all epochs, from the newest of these checkpoints that is valid; empty without one."""
    for step in steps:
        try:
            files = checkpoint.read(checkpoint.path_of(directory, step))
            history = checkpoint.from_json(STATE, files[STATE])["history"]
            return [line for line in history if isinstance(line["step"], int)]
        except (checkpoint.Damaged, OSError, KeyError, TypeError):
            continue  # the user hears of this checkpoint when _first_valid() tries to read it
    return []


# --- the device ----------------------------------------------------------------------------------------


def _kind_of_device(wanted: str, precision: str) -> str:
    """The value of `device` for this process: the best that is here and has the precision."""
    if wanted != "auto":
        return wanted
    # Apple's GPUs have no float64.
    usable = [kind for kind in ("cuda", "xpu", "mps") if not (kind == "mps" and precision == "fp64")]
    return next((kind for kind in usable if is_available(kind)), "cpu")


def _precision_on(kind: str, precision: str) -> tuple[str, str]:
    """The precision to compute with on this kind of device, and a remark where it is not the run's."""
    lacks_bf16 = False
    if kind == "cuda" and precision == "bf16" and is_available("cuda"):
        import torch

        lacks_bf16 = not torch.cuda.is_bf16_supported()
    if lacks_bf16 or (kind == "cpu" and precision == "fp16"):
        return (
            "fp32",
            f"the run was trained with {precision}, which {kind} does not have here: fp32 is used",
        )
    return precision, ""
