"""What is given to run.keep(), and warnings for what a program trains without keeping it.

After a resume, objects that are not kept begin anew.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_pre_hook

from allranks.base.errors import ANYONE, UserError
from allranks.base.text import some
from allranks.data.nests import described

log = logging.getLogger(__name__)

_UNLESS = "A run that goes on begins anew with it, unless another object that is kept holds its state."


def check_kept(name: str, given: Any) -> None:
    """Raises UserError for what run.keep() cannot keep under this name."""
    if not re.fullmatch("[A-Za-z0-9][A-Za-z0-9_.-]{0,79}", name):
        raise UserError(
            f"run.keep() got the name {name!r}, which is to be a part of a file's name: give a letter or a "
            "digit, and after it letters from A to Z, digits, _, . and - only.",
            said_by=ANYONE,
        )
    if isinstance(given, type):
        raise UserError(
            f"run.keep({name}=...) got the class {given.__name__}: give an object of it.", said_by=ANYONE
        )
    for method in ("state_dict", "load_state_dict"):
        if not callable(getattr(given, method, None)):
            raise UserError(
                f"run.keep({name}=...) got {described(given)}, which has no {method}(): give a model, an "
                "optimizer, or an object with state_dict() and load_state_dict().",
                said_by=ANYONE,
            )


def tell_of_models(models: Sequence[nn.Module], kept: Mapping[str, Any]) -> None:
    """Warns of models with weights that are trained, but not kept; rank 0 alone calls.

    models: those of run.wrap(); kept: what run.keep() got.
    """
    known = {id(p) for each in kept.values() if isinstance(each, nn.Module) for p in each.parameters()}
    missing = [
        type(model).__name__
        for model in models
        if any(p.requires_grad and id(p) not in known for p in model.parameters())
    ]
    if missing:
        log.warning("run.keep() did not get the model %s of run.wrap(). %s", some(missing), _UNLESS)


@contextmanager
def telling_of_optimizers(kept: Callable[[], Mapping[str, Any]], is_main: bool) -> Iterator[None]:
    """In the block rank 0 warns of an optimizer that takes a step, and is not among what is kept.

    It does so once for each class: a program may make optimizers for a moment only.
    """
    told: set[str] = set()

    def look(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        kind = type(optimizer).__name__
        if kind in told or any(optimizer is each for each in kept().values()):
            return
        told.add(kind)
        log.warning("run.keep() did not get the optimizer %s. %s", kind, _UNLESS)

    if not is_main:
        yield
        return
    handle = register_optimizer_step_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()
