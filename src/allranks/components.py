"""Components: from a section of the configuration to the object that its `_target_` names.

A component is a model, an optimizer, a learning-rate schedule or a data set, ours or a user's own.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from allranks.base.errors import UserError
from allranks.base.text import one_line


def build(key: str, section: Mapping[str, Any], *args: Any, **values: Any) -> Any:
    """Calls the section's `_target_` with `args`, the section's own values, and `values`.

    `key` names the section in messages. Raises UserError where the target does not exist or does not
    take these arguments; an error inside a user's own code is raised as it is, to be debugged.
    """
    try:
        return instantiate(dict(section), *args, _convert_="all", **values)
    except InstantiationException as error:
        cause = error.__cause__
        target = section.get("_target_")
        if cause is None or isinstance(cause, ImportError | AttributeError | InstantiationException):
            raise UserError(
                f"{key}._target_={target} cannot be loaded ({one_line(cause or error)}): give the dotted "
                "name of a class or function that Python can import."
            ) from error
        if isinstance(cause, UserError):
            raise cause from None
        ours = str(target).startswith(("torch.", "torchvision.", "allranks."))
        if isinstance(cause, TypeError | ValueError) or ours:
            reason = one_line(cause).rstrip(".")
            raise UserError(f"{key}: {target} refuses its arguments: {reason}.") from error
        raise cause from None
