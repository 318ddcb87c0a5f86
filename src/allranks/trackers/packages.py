"""What the shipped trackers share: a check for packages, the id of a run, the form of a step's record."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from allranks.base import files
from allranks.base.errors import UserError


def require(package: str, tracker: str) -> None:
    """Raises UserError if the package that the tracker needs is not installed. Imports nothing."""
    if importlib.util.find_spec(package) is None:
        raise UserError(
            f"tracker={tracker} needs the package {package}, which is not installed here: "
            f'pip install "allranks[{tracker}]", or leave the tracker out.'
        )


def without_epoch(record: Mapping[str, Any]) -> dict[str, Any]:
    """A step's figures without the number of its epoch.

    Trackers draw `epoch` as a curve too, and it should have one point for each epoch, not for each step.
    """
    return {key: value for key, value in record.items() if key != "epoch"}


def kept_id(path: Path, make: Callable[[], str]) -> tuple[str, bool]:
    """The id that an earlier start has kept in this file, or else a new one, kept there now.

    Returns the id, and whether it is new.
    """
    try:
        known = path.read_text().strip()
    except FileNotFoundError:
        known = ""
    if known:
        return known, False
    made = make()
    files.write_text(path, made + "\n").close()
    return made, True
