"""Components: from a section of the configuration to the object that its `_target_` names.

A component is a model, an optimizer, a learning-rate schedule or a data set, ours or a user's own.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Mapping
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import instantiate

from allranks.base.errors import UserError
from allranks.base.text import did_you_mean, one_line

# What Hydra says where a target further inside a section raises an error: its name, and its key at the end.
_CALLED_INSIDE = re.compile(r"Error in call to target '([^']+)':.*\nfull_key: \S+$", re.DOTALL)


def build(key: str, section: Mapping[str, Any], *args: Any, **values: Any) -> Any:
    """Calls the section's `_target_` with `args`, the section's own values, and `values`.

    `key` names the section in messages. Raises UserError if the target, or one further inside the
    section, does not exist or does not take these arguments. An error inside a user's own code is raised as
    it is, to be debugged; what torch and allranks raise is about their arguments.
    """
    target = section.get("_target_")
    locate(key, target)
    try:
        return instantiate(dict(section), *args, _convert_="all", **values)
    except InstantiationException as error:
        cause = error.__cause__
        if cause is None or "Error locating target" in str(error):
            # The section's own target has been found: this is about one further inside the section.
            raise UserError(
                f"{key}: a _target_ inside this section cannot be loaded ({one_line(cause or error)}): "
                "give the dotted name of a class or function that Python can import."
            ) from error
        if isinstance(cause, UserError):
            raise cause from None
        called = _called(error, target)
        ours = called.startswith(("torch.", "torchvision.", "allranks."))
        if ours and isinstance(cause, ImportError):
            missing = (cause.name or "a package").partition(".")[0]
            raise UserError(
                f"{key}: {called} needs {missing}, which cannot be imported here ({one_line(cause)}): "
                f"`pip install {missing}`, or choose another one."
            ) from error
        if ours or (isinstance(cause, TypeError | ValueError) and _is_of_the_call(cause)):
            reason = one_line(cause).rstrip(".")
            raise UserError(f"{key}: {called} refuses its arguments: {reason}.") from error
        raise cause from None


def _called(error: InstantiationException, target: object) -> str:
    """The name of what Hydra called when the error came: `target`, or one further inside its section."""
    inside = _CALLED_INSIDE.match(str(error))
    return inside[1] if inside else str(target)


def _is_of_the_call(cause: BaseException) -> bool:
    """Whether the call itself failed, as with an argument too many, so that no line of the target has run.

    Python raises such an error in the function that calls, which is Hydra's: no further one is in the
    traceback.
    """
    return cause.__traceback__ is not None and cause.__traceback__.tb_next is None


def locate_targets(sections: Mapping[str, Mapping[str, Any]]) -> None:
    """Finds the `_target_` of each section, by the section's key; null stands for none.

    Raises UserError if one does not exist.
    """
    for key, section in sections.items():
        if section.get("_target_") is not None:
            locate(key, section["_target_"])


def locate(key: str, target: object) -> Any:
    """The class or function of this dotted name, such as `torch.optim.SGD`; its module is imported.

    `key` names the section in messages. Raises UserError if there is no such thing. An error inside the
    module is raised as it is, to be debugged.
    """
    names = str(target).split(".")
    if not all(name.isidentifier() for name in names):
        raise _not_loaded(key, target, "it is not written like package.module.Name")
    found: Any = _module(key, target, names[0])
    if found is None:
        raise _not_loaded(key, target, f"no module {names[0]} is installed here, or on PYTHONPATH")
    for position, name in enumerate(names[1:], start=1):
        within = ".".join(names[:position])
        if not hasattr(found, name) and _module(key, target, f"{within}.{name}") is None:
            known = [known for known in dir(found) if not known.startswith("_")]
            raise _not_loaded(key, target, f"{within} has no {name}", did_you_mean(name, known))
        found = getattr(found, name)
    if not callable(found):
        raise _not_loaded(key, target, f"it is a {type(found).__name__}, and cannot be called")
    return found


def _module(key: str, target: object, name: str) -> Any:
    """The module of this dotted name; None if there is none.

    Raises UserError if the module is there, but another one that it imports is missing.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # Which name was not found? This one (a.b), one above it (a), or something that the module imports?
        if error.name is not None and (name == error.name or name.startswith(f"{error.name}.")):
            return None
        raise _not_loaded(key, target, f"{name} needs the module {error.name}, which is missing") from error


def _not_loaded(key: str, target: object, why: str, near: str = "") -> UserError:
    return UserError(
        f"{key}._target_={target} cannot be loaded ({why}): give the dotted name of a class or function "
        f"that Python can import.{near}"
    )
