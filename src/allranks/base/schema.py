"""What a user may give: beside each field a rule and an explanation, and the builder that applies them.

A configuration is a tree of dataclasses. Each field is declared with setting(), which keeps beside the
default what the value means, which values are valid, and whether a resumed run must have the same one.
Error messages, the check of a resume and `--help` are all made from these marks.

Two kinds of files are read this way: the training's configuration (allranks.config, where OmegaConf gives
the values their types) and machine files (allranks.job.machine, by build() here).
"""

from __future__ import annotations

import dataclasses
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from allranks.base.errors import UserError
from allranks.base.text import did_you_mean

# --- rules: which values are valid -------------------------------------------------------------------


@dataclass(frozen=True)
class Rule:
    """Which values are valid, and `remedy`: what to give instead of one that is not."""

    valid: Callable[[Any], bool]
    remedy: str
    names: Sequence[str] = ()  # where only some words are valid: to find the nearest to a wrong one


def whole(low: int, high: float = math.inf) -> Rule:
    """A whole number from `low` to `high`, both included; true and false are none."""
    return Rule(
        lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high,
        f"a whole number >= {low}" + (f" and <= {high}" if high < math.inf else ""),
    )


def number(low: float, high: float = math.inf, above_low: bool = False, below_high: bool = False) -> Rule:
    """A finite number from `low` to `high`. `above_low` leaves out `low` itself, `below_high` `high`."""

    def valid(value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int | float):
            return False
        try:
            is_finite = math.isfinite(value)
        except OverflowError:  # a whole number of more than 308 digits
            return False
        if not is_finite:
            return False
        high_enough = value > low if above_low else value >= low
        low_enough = value < high if below_high else value <= high
        return high_enough and low_enough

    remedy = f"a finite number {'>' if above_low else '>='} {low:g}"
    if high < math.inf:
        remedy += f" and {'<' if below_high else '<='} {high:g}"
    return Rule(valid, remedy)


def one_of(*names: str) -> Rule:
    return Rule(lambda v: v in names, "one of " + ", ".join(names), names)


def list_of(item: Rule, length: int | None = None) -> Rule:
    """A list of valid items, of any length or of exactly `length`."""

    def valid(value: Any) -> bool:
        if not isinstance(value, list):
            return False
        if length is not None and len(value) != length:
            return False
        return all(item.valid(each) for each in value)

    return Rule(valid, f"a list of {length if length is not None else 'values'}, each {item.remedy}")


FLAG = Rule(lambda v: isinstance(v, bool), "true or false")
TEXT = Rule(lambda v: isinstance(v, str) and bool(v.strip()), "a text")


# --- marks at the fields of a dataclass --------------------------------------------------------------

_MARK = "allranks.setting"  # the key in a field's metadata


@dataclass(frozen=True)
class Setting:
    """What is known of a key besides its name and value."""

    doc: str  # what the value means, in one line
    rule: Rule | None = None  # None: any value of the field's type
    optional: bool = False  # null is valid
    # True: the value decides what a training computes, so a resumed run must have the same one.
    # None: as it is for the section that the key stands in.
    resume_must_agree: bool | None = None


def setting(
    default: Any, doc: str, rule: Rule | None = None, *, resume_must_agree: bool | None = None
) -> Any:
    """A dataclass field with its explanation and rule. A function as `default` makes the default."""
    mark = {_MARK: Setting(doc, rule, False, resume_must_agree)}
    if callable(default):
        return dataclasses.field(default_factory=default, metadata=mark)
    return dataclasses.field(default=default, metadata=mark)


def settings_of(kind: type, prefix: str = "") -> dict[str, Setting]:
    """The marked fields of the dataclass `kind` and of dataclasses inside it, by dotted key."""
    found: dict[str, Setting] = {}
    hints = typing.get_type_hints(kind)
    for item in dataclasses.fields(kind):
        key, hint = f"{prefix}{item.name}", hints[item.name]
        mark = item.metadata.get(_MARK)
        if mark is not None:
            found[key] = dataclasses.replace(mark, optional=_is_optional(hint))
        if dataclasses.is_dataclass(hint):
            found |= settings_of(typing.cast(type, hint), f"{key}.")
    return found


def _is_optional(hint: Any) -> bool:
    return typing.get_origin(hint) in (types.UnionType, typing.Union) and type(None) in typing.get_args(
        hint
    )


# --- building typed values from a YAML tree ----------------------------------------------------------


@dataclass(frozen=True)
class Origin:
    """Where a tree was read, for messages: `machine.node.ranks=0 (polaris) is not valid: ...`."""

    prefix: str  # before each key: `machine.`
    name: str  # of the file: `polaris`
    thing: str  # what the tree describes: `a machine`

    def invalid(self, key: str, value: Any, remedy: str, near: str = "") -> UserError:
        return UserError(f"{self.prefix}{key}={value} ({self.name}) is not valid: give {remedy}.{near}")


@dataclass(frozen=True)
class Written:
    """A value that YAML has read from a word, and that word: 022 is the number 18, `on` is true.

    If a text is expected, build() takes the word as it was written.
    """

    value: Any
    text: str

    def __str__(self) -> str:
        return self.text


def build(kind: Any, value: Any, source: Origin, key: str = "") -> Any:
    """`value`, which YAML gave, as a `kind`: a dataclass, tuple, dict, optional or plain type.

    `key` is the dotted key of `value`. A dataclass may have a classmethod `from_short(value)`, for what may
    be written shorter than with keys. Raises UserError naming file, key, value and remedy.
    """
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    is_optional = origin in (types.UnionType, typing.Union)
    if isinstance(value, Written) and not is_optional and not hasattr(kind, "from_short"):
        value = value.text if kind is str else value.value
    if is_optional:
        if value is None or (isinstance(value, Written) and value.value is None):
            return None
        return build(next(k for k in inner if k is not type(None)), value, source, key)
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, dict) and hasattr(kind, "from_short"):
            value = kind.from_short(value)
        return _build_dataclass(kind, _of_type(value, dict, "keys and values", source, key), source, key)
    if origin is tuple:
        items = _of_type(value, (list, tuple), "a list", source, key)
        return tuple(build(inner[0], item, source, _join(key, i)) for i, item in enumerate(items))
    if origin is dict:
        pairs = _of_type(value, dict, "keys and values", source, key)
        return {str(k): build(inner[1], v, source, _join(key, k)) for k, v in pairs.items()}
    return _plain(kind, value, source, key)


def _build_dataclass(kind: Any, values: Mapping[str, Any], source: Origin, at: str) -> Any:
    hints = typing.get_type_hints(kind)
    for key in values:
        if str(key) not in hints:
            near = did_you_mean(str(key), hints) or f" It may be {', '.join(hints)}."
            full = f"{source.prefix}{_join(at, key)}"
            raise UserError(f"{full} is not a key of {source.thing} ({source.name}).{near}")
    for item in dataclasses.fields(kind):
        required = item.default is dataclasses.MISSING and item.default_factory is dataclasses.MISSING
        if required and item.name not in values:
            full = f"{source.prefix}{_join(at, item.name)}"
            raise UserError(f"{full} is missing in {source.name}: add it to its YAML.")

    made = {str(k): build(hints[str(k)], v, source, _join(at, k)) for k, v in values.items()}
    for item in dataclasses.fields(kind):
        mark = item.metadata.get(_MARK)
        if mark is None or mark.rule is None or made.get(item.name) is None:
            continue
        if not mark.rule.valid(made[item.name]):
            or_null = ", or null" if _is_optional(hints[item.name]) else ""
            raise source.invalid(_join(at, item.name), made[item.name], mark.rule.remedy + or_null)
    return kind(**made)


def _plain(kind: Any, value: Any, source: Origin, key: str) -> Any:
    if names := typing.get_args(kind):  # a Literal
        if value not in names:
            near = did_you_mean(str(value), names)
            raise source.invalid(key, value, f"one of {', '.join(names)}", near)
        return value
    is_bool = isinstance(value, bool)
    if kind in (str, float) and isinstance(value, int | float) and not is_bool:
        return kind(value)  # NCCL_CROSS_NIC: 1, max_hours: 1
    if not isinstance(value, kind) or (is_bool and kind is not bool):
        words = {str: "a text", int: "a whole number", bool: "true or false", float: "a number"}
        raise source.invalid(key, value, words[kind])
    return value


def _of_type(value: Any, kind: Any, words: str, source: Origin, key: str) -> Any:
    if value is None:  # `queues:` with nothing after it
        return kind() if isinstance(kind, type) else ()
    if not isinstance(value, kind):
        raise source.invalid(key, value, words)
    return value


def _join(at: str, key: object) -> str:
    return f"{at}.{key}" if at else str(key)
