"""From a command line to a checked, typed configuration. Imports no torch.

Hydra composes; this module turns what comes out into dataclasses at one place, so that unknown keys,
wrong types and impossible values end here, with key, value and remedy. Nothing is written: Hydra's own
directories are switched off, and training starts only after Hydra has returned.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import platform
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    OmegaConfBaseException,
    ValidationError,
)

from allranks.base.errors import UserError
from allranks.base.text import did_you_mean

GROUPS = ("data", "model", "optimizer", "scheduler", "trainer", "experiment")
MONITORED = ("train/loss", "train/accuracy", "val/loss", "val/accuracy")


@dataclass
class RunConfig:
    dir: str | None = None


@dataclass
class TrainerConfig:
    epochs: int = 5
    batch_size: int = 128
    per_rank_batch_size: int | None = None
    accumulate: int = 1
    clip_norm: float | None = None
    label_smoothing: float = 0.0
    precision: str = "fp32"
    compile: bool = False
    train_metrics: str = "evaluate"
    nonfinite: str = "stop"
    reproducible: bool = False
    virtual_ranks: int = 8


@dataclass
class CheckpointConfig:
    every_steps: int | None = None
    every_epochs: int | None = 1
    every_s: float | None = None
    keep: int = 2


@dataclass
class WatchdogConfig:
    start_s: float = 600
    first_step_s: float = 600
    step_s: float | None = None
    save_s: float = 600


@dataclass
class Config:
    """One training. The component sections are free: their `_target_` decides what they may hold."""

    name: str = "train"
    seed: int = 0
    runtime: str = "auto"
    device: str = "auto"
    oversubscribe: bool = False
    threads: int | None = None
    resume: str = "auto"
    run: RunConfig = field(default_factory=RunConfig)
    trainer: TrainerConfig = field(default_factory=TrainerConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    watchdog: WatchdogConfig = field(default_factory=WatchdogConfig)
    data: dict[str, Any] = field(default_factory=dict)
    model: dict[str, Any] = field(default_factory=dict)
    optimizer: dict[str, Any] = field(default_factory=dict)
    scheduler: dict[str, Any] = field(default_factory=dict)


# --- what a value may be -----------------------------------------------------------------------------


@dataclass(frozen=True)
class _Rule:
    valid: Callable[[Any], bool]
    remedy: str
    names: Sequence[str] = ()  # where only some words are valid: to find the nearest


def _whole(low: int, high: float = math.inf) -> _Rule:
    return _Rule(
        lambda v: isinstance(v, int) and not isinstance(v, bool) and low <= v <= high,
        f"a whole number >= {low}" + (f" and <= {high}" if high < math.inf else ""),
    )


def _number(low: float, high: float = math.inf, open_low: bool = False, open_high: bool = False) -> _Rule:
    def valid(v: Any) -> bool:
        if isinstance(v, bool) or not isinstance(v, int | float) or not math.isfinite(v):
            return False
        return (low < v if open_low else low <= v) and (v < high if open_high else v <= high)

    below = f" and {'<' if open_high else '<='} {high:g}" if high < math.inf else ""
    return _Rule(valid, f"a finite number {'>' if open_low else '>='} {low:g}{below}")


def _one_of(*names: str) -> _Rule:
    return _Rule(lambda v: v in names, "one of " + ", ".join(names), names)


def _list_of(item: _Rule, length: int | None = None) -> _Rule:
    return _Rule(
        lambda v: (
            isinstance(v, list) and (length is None or len(v) == length) and all(item.valid(x) for x in v)
        ),
        f"a list of {length if length is not None else 'values'}, each {item.remedy}",
    )


_SHARE = _number(0, 1, open_high=True)
_BETA = _number(0, 1, open_high=True)
_FLAG = _Rule(lambda v: isinstance(v, bool), "true or false")
_POWERS = [1 << n for n in range(17)]
_TEXT = _Rule(lambda v: isinstance(v, str) and bool(v.strip()), "a text")

RULES: dict[str, _Rule] = {
    "name": _Rule(
        lambda v: isinstance(v, str) and v not in ("", ".", "..") and not set(v) & set("/\0\n"),
        "a folder's name, without a slash",
    ),
    "seed": _Rule(lambda v: isinstance(v, int) and 0 <= v < 2**63, "a whole number from 0 to 2^63 - 1"),
    "runtime": _one_of("auto", "ezpz", "native"),
    "device": _one_of("auto", "cuda", "xpu", "mps", "cpu"),
    "threads": _whole(1, 1024),
    "run.dir": _TEXT,
    "trainer.epochs": _whole(0),
    "trainer.batch_size": _whole(1),
    "trainer.per_rank_batch_size": _whole(1),
    "trainer.accumulate": _whole(1),
    "trainer.clip_norm": _number(0, open_low=True),
    "trainer.label_smoothing": _SHARE,
    "trainer.precision": _one_of("fp64", "fp32", "bf16", "fp16"),
    "trainer.train_metrics": _one_of("evaluate", "running"),
    "trainer.nonfinite": _one_of("stop", "skip"),
    "trainer.virtual_ranks": _Rule(
        lambda v: v in _POWERS, f"a power of two: 1, 2, 4, 8, ... {_POWERS[-1]}"
    ),
    "checkpoint.every_steps": _whole(1),
    "checkpoint.every_epochs": _whole(1),
    "checkpoint.every_s": _number(0, open_low=True),
    "checkpoint.keep": _whole(1),
    "watchdog.start_s": _number(0, 1e9, open_low=True),
    "watchdog.first_step_s": _number(0, 1e9, open_low=True),
    "watchdog.step_s": _number(0, 1e9, open_low=True),
    "watchdog.save_s": _number(0, 1e9, open_low=True),
    "resume": _TEXT,
    "data.split": _list_of(_whole(1), 2),
    "data.input_shape": _list_of(_whole(1), 3),
    "data.classes": _whole(1),
    "data.fetch": _FLAG,
    "data.root": _TEXT,
    "data.workers": _whole(0),
    "scheduler.interval": _one_of("epoch", "step"),
    "scheduler.monitor": _one_of(*MONITORED),
}
# Of a component only where it is ours or torch's: a user's own class may mean something else by a name.
COMPONENT_RULES: dict[str, _Rule] = {
    "model.widths": _list_of(_whole(1)),
    "model.channels": _list_of(_whole(1)),
    "model.hidden": _whole(1),
    "model.patch": _whole(1),
    "model.width": _whole(1),
    "model.depth": _whole(1),
    "model.heads": _whole(1),
    "model.dropout": _SHARE,
    "optimizer.lr": _number(0, open_low=True),
    "optimizer.weight_decay": _number(0),
    "optimizer.momentum": _number(0),
    "optimizer.nesterov": _FLAG,
    "optimizer.fused": _FLAG,
    "optimizer.alpha": _BETA,
    "optimizer.betas": _list_of(_BETA, 2),
    "scheduler.step_size": _whole(1),
    "scheduler.gamma": _number(0, open_low=True),
    "scheduler.eta_min": _number(0),
    "scheduler.max_lr": _number(0, open_low=True),
    "scheduler.pct_start": _number(0, 1),
    "scheduler.warmup": _SHARE,
    "scheduler.floor": _number(0, 1),
    "scheduler.factor": _number(0, 1, open_low=True, open_high=True),
    "scheduler.patience": _whole(0),
}
_OPTIONAL = {
    "threads", "run.dir", "trainer.per_rank_batch_size", "trainer.clip_norm", "checkpoint.every_steps",
    "checkpoint.every_epochs", "checkpoint.every_s", "watchdog.step_s",
}  # fmt: skip


def typed(composed: DictConfig) -> Config:
    """The composed configuration as dataclasses; raises UserError naming key, value and remedy."""
    schema = OmegaConf.structured(Config)
    try:
        config = OmegaConf.to_object(OmegaConf.merge(schema, composed))
    except ValidationError as error:
        key = error.full_key or str(error.key)
        rule = RULES.get(key)
        kind = rule.remedy if rule else f"a value of type {_type_name(error)}"
        raise UserError(f"{key}={_shown(composed, key)} is not valid: give {kind}.") from error
    except ConfigKeyError as error:
        key = error.full_key or str(error.key)
        raise UserError(_unknown_key(key, [*_leaves(OmegaConf.to_container(schema))])) from error
    except OmegaConfBaseException as error:
        raise UserError(f"The configuration does not hold together: {_first_line(error)}") from error
    assert isinstance(config, Config)
    _check(config)
    return config


def _check(config: Config) -> None:
    values = leaves(config)
    for key, value in values.items():
        rule = RULES.get(key) or (COMPONENT_RULES.get(key) if _is_ours(values, key.split(".")[0]) else None)
        if rule is None or (value is None and key in _OPTIONAL) or rule.valid(value):
            continue
        guess = did_you_mean(str(value), rule.names) if rule.names else ""
        raise UserError(f"{key}={value} is not valid: give {rule.remedy}.{guess}")
    for group in ("model", "optimizer", "data.train", "data.test"):
        if f"{group}._partial_" in values:
            raise UserError(f"{group}._partial_ is not valid: give all values that _target_ takes.")
        if not isinstance(values.get(f"{group}._target_"), str):
            raise UserError(
                f"{group}._target_ is missing: name the class or function that makes the {group}, "
                f"as `_target_: package.module.Name`, in its YAML."
            )


def _is_ours(values: Mapping[str, Any], group: str) -> bool:
    return str(values.get(f"{group}._target_")).startswith(("allranks.", "torch."))


def _plain(config: Config) -> dict[str, Any]:
    plain = OmegaConf.to_container(OmegaConf.structured(config))
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _leaves(node: Any, prefix: str = "") -> dict[str, Any]:
    """What is below a dict, by dotted key; lists are leaves."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        found |= _leaves(value, name + ".") if isinstance(value, dict) and value else {name: value}
    return found


def _type_name(error: ValidationError) -> str:
    kind = getattr(error, "ref_type", None)
    return getattr(kind, "__name__", str(kind))


def _shown(composed: DictConfig, key: str) -> object:
    with contextlib.suppress(OmegaConfBaseException):
        return OmegaConf.select(composed, key)
    return "?"


# --- freezing ----------------------------------------------------------------------------------------


def freeze(config: Config) -> str:
    """YAML from which the same training can be run again, anywhere: it names no run directory."""
    return OmegaConf.to_yaml(OmegaConf.structured(replace(config, run=RunConfig())))


def digest(config: Config) -> str:
    """sha256 of the whole configuration, the run directory included: equal on all ranks of a run."""
    return hashlib.sha256(OmegaConf.to_yaml(OmegaConf.structured(config)).encode()).hexdigest()


def thaw(directory: str, sha256: str) -> Config:
    """The configuration that a launcher froze in the run directory, if it is still the same file."""
    path = Path(directory) / "config.yaml"
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read on {platform.node()} ({error.strerror}): the run directory must be on "
            "a file system that every node sees."
        ) from error
    found = hashlib.sha256(content).hexdigest()
    if found != sha256:
        raise UserError(
            f"{path} is not the configuration that was launched: its sha256 is {found[:12]}..., not "
            f"{sha256[:12]}... Launch the run again; do not edit the file in between."
        )
    config = typed(_loaded(path))
    return replace(config, run=RunConfig(directory))


# Where and how a run goes on, which may change, not what it computes.
_FREE = re.compile(
    r"(name|runtime|device|oversubscribe|threads|resume|run|checkpoint|watchdog)(\.|$)"
    r"|data\.((train|test)\.)?(root|fetch)$|data\.workers$|trainer\.nonfinite$"
)


def identity(config: Config) -> dict[str, Any]:
    """The values that decide what a training computes, under their dotted keys."""
    return {key: value for key, value in leaves(config).items() if not _FREE.match(key)}


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """The values by which two identities are not the same; "" for none."""
    keys = [key for key in sorted({*there, *here}) if there.get(key) != here.get(key)]
    return "; ".join(f"{key} is {there.get(key)} there, not {here.get(key)}" for key in keys)


def frozen_identity(path: Path) -> dict[str, Any]:
    """That of the frozen configuration in the file."""
    return identity(typed(_loaded(path)))


def _loaded(path: Path) -> DictConfig:
    from yaml import YAMLError  # type: ignore[import-untyped,unused-ignore]

    try:
        return OmegaConf.create(path.read_text())  # type: ignore[return-value]
    except (OSError, ValueError, AssertionError, YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read ({_first_line(error)}): give another run.dir.") from error


def leaves(config: Config) -> dict[str, Any]:
    """Every value of the configuration under its dotted key."""
    return _leaves(_plain(config))


# --- the command line --------------------------------------------------------------------------------


def conf_dir() -> Path:
    """The shipped YAML files: inside an installed package, or at the top of a source tree."""
    here = Path(__file__).resolve().parent
    installed, source = here / "conf", here.parents[1] / "conf"
    return installed if installed.is_dir() else source


def from_command_line(arguments: Sequence[str]) -> list[Config]:
    """Every training that the command line asks for: one, several with -m, none after --help.

    The arguments are Hydra's. Raises UserError for whatever Hydra or the schema refuses.
    """
    return [config for config, _ in cells_from_command_line(arguments)]


def cells_from_command_line(arguments: Sequence[str]) -> list[tuple[Config, list[str]]]:
    """The same, each training with its own overrides: those of its cell of a sweep."""
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode

    composed: list[tuple[DictConfig, list[str]]] = []

    def collect(cfg: DictConfig) -> None:
        OmegaConf.resolve(cfg)  # now, while ${hydra:...} can still be resolved
        if HydraConfig.get().mode == RunMode.MULTIRUN and cfg.run.dir:
            cfg.run.dir = str(Path(cfg.run.dir) / str(HydraConfig.get().job.num))
        composed.append((cfg, list(HydraConfig.get().overrides.task)))

    app = hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(collect)
    flags, overrides = split_flags(arguments)
    for flag in (flag.partition("=")[0] for flag in flags):
        if flag.startswith("--") and flag not in HYDRAS:
            key = next((k for k in leaves(Config()) if k.endswith("." + flag.strip("-"))), "key")
            raise UserError(f"{flag} is not an option: values are given as {key}=..., without dashes.")
    for override in overrides:
        group, _, choice = override.partition("=")
        if group in GROUPS and re.match(r"[\[{]|[-+]?[0-9.]+$", choice):
            raise UserError(f"{override} is not valid: {group} takes the name of one choice.")
    with _hydra_that_leaves_no_trace([*flags, *overrides]):
        try:
            app()
        except (HydraException, ValueError) as error:
            raise UserError(_explain(error, overrides)) from error
        except OmegaConfBaseException as error:
            raise UserError(f"The configuration does not hold together: {_first_line(error)}") from error
    return [(typed(cfg), task) for cfg, task in composed]


_FLAGS_WITH_VALUE = frozenset(
    "-c -p -cp -cn -cd --cfg --package --config-path --config-name --config-dir --info".split()
)
HYDRAS = _FLAGS_WITH_VALUE.union(
    "--help --hydra-help --version --resolve --run --multirun --shell-completion "
    "--experimental-rerun".split()
)


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Hydra's flags and the overrides, apart: its parser takes overrides in one run only."""
    flags: list[str] = []
    overrides: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_override = not argument.startswith("-") and before not in _FLAGS_WITH_VALUE
        (overrides if is_override else flags).append(argument)
    return flags, overrides


@contextlib.contextmanager
def _hydra_that_leaves_no_trace(arguments: Sequence[str]) -> Iterator[None]:
    """Hydra's main() with these arguments, no directory, no log file, and exceptions instead of exit(1).

    Only its sweeper insists on writing a file; that goes to a temporary folder.
    """
    argv, full_error = sys.argv, os.environ.get("HYDRA_FULL_ERROR")
    with tempfile.TemporaryDirectory(prefix="allranks-") as scratch:
        folder = scratch.replace("\\", "\\\\").replace("'", "\\'")
        silent = [
            "hydra.run.dir=.",
            "hydra.output_subdir=null",
            "hydra/job_logging=none",
            "hydra/hydra_logging=none",
            f"hydra.sweep.dir='{folder}'",
            "hydra.sweep.subdir=.",
        ]
        sys.argv = [argv[0], *arguments, *silent]
        os.environ["HYDRA_FULL_ERROR"] = "1"
        try:
            yield
        finally:
            sys.argv = argv
            del os.environ["HYDRA_FULL_ERROR"]
            if full_error is not None:
                os.environ["HYDRA_FULL_ERROR"] = full_error


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's error in one message, with the nearest name that would have been right."""
    from hydra.errors import OverrideParseException

    cause = error.__cause__
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return _unknown_key(cause.full_key or str(cause.key), _known_keys(overrides))
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be read as an override: write key=value, in quotes what has other "
            f"signs than letters, digits and /._-: 'key=\"a=b\"'. ({_first_line(error)})"
        )
    if "Ambiguous value" in str(error):
        return f"{_first_line(error)}: add -m for a run of each value, or write key=[a,b] for one list."
    missing, options = getattr(error, "missing_cfg_file", None), getattr(error, "options", None)
    if missing and options:
        group, _, choice = str(missing).rpartition("/")
        return f"{group}={choice} is not one of the choices: {', '.join(options)}." + did_you_mean(
            choice, options
        )
    return f"{_first_line(error).rstrip('.')}. `allranks train --help` lists what can be given."


def _unknown_key(key: str, known: Sequence[str]) -> str:
    guess = did_you_mean(key, known) or " `allranks train --cfg job` lists the keys."
    return f"{key} is not a key of the configuration.{guess}"


def _known_keys(overrides: Sequence[str]) -> list[str]:
    """Every key with the chosen components, to suggest the nearest from."""
    from hydra import compose, initialize_config_dir

    choices = [
        override
        for override in overrides
        if (group := override.partition("=")[0]) in GROUPS
        and (conf_dir() / group / f"{override.partition('=')[2]}.yaml").is_file()
    ]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        cfg = compose("config", overrides=[*choices, "name=x"])
    return [*_leaves(OmegaConf.to_container(cfg, resolve=False)), *GROUPS]


def _first_line(error: BaseException) -> str:
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
