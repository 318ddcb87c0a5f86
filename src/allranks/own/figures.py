"""run.log(): which figures it takes, and where they go.

A figure is a number with a name. A line of metrics.jsonl holds the figures of an epoch, together with the
epoch, the step and what allranks has measured itself; summary.json holds the same for the whole run. A
figure with one of allranks' own names would replace that value, and a run whose records have a wrong step
cannot go on. So these names are refused.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from allranks.base.errors import ANYONE, UserError
from allranks.base.text import some
from allranks.data.nests import described
from allranks.own.lifecycle import Lifecycle
from allranks.own.place import LoopPlace
from allranks.own.shares import shares_of
from allranks.own.state import are_alike
from allranks.runtime.runtime import Runtime
from allranks.training.records import OF_THE_RUN

log = logging.getLogger(__name__)

_OF_EACH_RECORD = {"epoch", "step"}
# What Loop.close_epoch() writes about an epoch besides these.
_OF_AN_EPOCH = {"time/train_s", "time/eval_s", "throughput/samples_per_s", *OF_THE_RUN}
# What run.finish() writes about a run.
_OF_A_RUN = {
    "state", "epochs", "steps", "world_size", "model/parameters", "model/sha256", "time/total_s",
    "time/startup_s", *OF_THE_RUN,
}  # fmt: skip


class LoggedFigures:
    """What run.log() has got on this rank, and where it goes."""

    def __init__(self, lifecycle: Lifecycle, place: LoopPlace) -> None:
        self._lifecycle = lifecycle
        self._place = place
        self.of_run: dict[str, float] = {}  # logged after the last epoch
        self._told_to_differ: set[str] = set()  # figures for which rank 0 has warned that ranks differ

    def log(self, figures: Mapping[str, Any]) -> None:
        """What run.log() does: records figures of a step, of an epoch or of the run, as the program stands.

        Raises UserError for what is not a number, and for a name that allranks writes itself.
        """
        lifecycle, place = self._lifecycle, self._place
        lifecycle.check_open("run.log()")
        check_log(figures, is_of_epoch=place.is_in_epochs)
        for name, value in figures.items():
            if place.is_stepping and place.in_hand is not None:
                for share in shares_of(place.in_hand):
                    lifecycle.kept.means.add(name, value, share.counted, share.row)
                    lifecycle.recorder.add(name, value, share.counted, share.row)
            elif place.is_in_epochs and lifecycle.loop is not None:
                lifecycle.loop.log({name: as_number(value)})
            else:
                self.of_run[name] = as_number(value)

    def compare(self, figures: Mapping[str, float]) -> None:
        """Warns, on rank 0, of figures that differ between the ranks: those of rank 0 are recorded."""
        differing = names_that_differ(figures, self._lifecycle.runtime)
        new = [name for name in differing if name not in self._told_to_differ]
        self._told_to_differ.update(new)
        if new and self._lifecycle.runtime.is_main:
            log.warning(
                "run.log() got other values of %s on other ranks; those of rank 0 are recorded. What "
                "run.mean(), run.means() and run.metric() give is the same on all ranks.",
                some(new),
            )


def check_log(figures: Any, is_of_epoch: bool) -> None:
    """Raises UserError for figures that run.log() cannot record; `is_of_epoch`: not of the whole run."""
    if not isinstance(figures, Mapping):
        raise UserError(
            f"run.log() got {described(figures)}: give a dict of figures by name.", said_by=ANYONE
        )
    for name, value in figures.items():
        check_figure("run.log()", name, value, "give a number or a scalar tensor.")
        if is_of_epoch and name in _OF_EACH_RECORD:
            raise UserError(
                f"run.log() got a figure with the name {name}, which allranks writes to each record by "
                "itself: leave it out.",
                said_by=ANYONE,
            )
        if name in (_OF_AN_EPOCH if is_of_epoch else _OF_A_RUN):
            where = "metrics.jsonl" if is_of_epoch else "summary.json"
            raise UserError(
                f"run.log() got a figure with the name {name}, which allranks writes to {where} by itself: "
                "give it another name.",
                said_by=ANYONE,
            )


def check_figure(what: str, name: Any, value: Any, remedy: str) -> None:
    """Raises UserError if a figure has no printable text for a name, or is not one number.

    `what` is the call that the program has made, and `remedy` ends the message about a value.
    """
    if not isinstance(name, str):
        raise UserError(
            f"{what} got {name!r} as the name of a figure: give texts as names, such as 'val/loss'.",
            said_by=ANYONE,
        )
    # Names are printed in tables, and stand in CSV files and in pages: a line end would break these.
    if not name.isprintable():
        raise UserError(
            f"{what} got a figure with the name {name!r}, which holds a character that cannot be printed: "
            "leave that out.",
            said_by=ANYONE,
        )
    if not is_scalar(value):
        of_name = f" as {name}" if name else ""
        raise UserError(f"{what} got {described(value)}{of_name}: {remedy}", said_by=ANYONE)


def is_scalar(value: Any) -> bool:
    """Whether this is one number: a Python or NumPy number, or a tensor or an array of one."""
    if isinstance(value, int | float):
        return True
    if isinstance(value, torch.Tensor):
        return value.numel() == 1 and not value.is_complex()
    if not hasattr(value, "__float__"):
        return False
    array = np.asarray(value)
    # float() would drop a part of a complex number, and read a text as one. A fraction is an object.
    return array.size == 1 and array.dtype.kind in "biufO"


def as_number(value: Any) -> float:
    """A scalar as a Python number. torch warns where a tensor that has a gradient is taken for one."""
    if isinstance(value, torch.Tensor):
        value = value.detach()
    return float(value.item() if isinstance(value, np.ndarray) else value)


def names_that_differ(figures: Mapping[str, float], runtime: Runtime) -> list[str]:
    """The figures that have other values on other ranks, or are not there; all ranks call.

    All ranks get the same list.
    """
    mine = {name: repr(value) for name, value in figures.items()}  # NaN is not equal to itself
    if are_alike([f"{name} {value}" for name, value in sorted(mine.items())], runtime):
        return []

    def decide(said: list[dict[str, str]]) -> list[list[str]]:
        names = sorted({name for figures in said for name in figures})
        return [[name for name in names if len({each.get(name) for each in said}) > 1]] * len(said)

    return runtime.meeting.settle(mine, decide)
