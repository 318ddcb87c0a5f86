"""The configuration of a training: what may be given, checked and given types. Imports no torch.

Hydra composes YAML files and overrides (allranks.compose). typed() here turns the outcome into dataclasses
at one place, so that unknown keys, wrong types and impossible values end there, with key, value and remedy.
Beside each field stand its rule, a line of explanation, and whether a resumed run must have the same value.
"""

from __future__ import annotations

import contextlib
import hashlib
import platform
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import cache
from io import BytesIO, TextIOWrapper
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigKeyError, OmegaConfBaseException, ValidationError

from allranks.base.errors import UserError
from allranks.base.schema import (
    FLAG,
    TEXT,
    Rule,
    Setting,
    list_of,
    number,
    one_of,
    setting,
    settings_of,
    whole,
)
from allranks.base.text import did_you_mean, first_line

CLASSIFICATION = "allranks.tasks.Classification"
# The sections that a loop of the user's own (allranks.open) has no use for: it makes these parts itself.
NOT_OF_OWN_LOOPS = ("trainer", "task", "data", "model", "optimizer", "scheduler")

# What `checkpoint.best` may be: the name of a metric, and which of its values is the best.
BEST = re.compile(r"\S+ (min|max)")
LARGEST = sys.float_info.max  # a larger whole number cannot become a float
BEST_BY_DEFAULT = "val/loss min"

# --- rules of more than one key, or longer than a line -----------------------------------------------

_POWERS = [1 << n for n in range(17)]  # 2^16 ranks: more than any machine that we know of has devices
_SHARE = number(0, 1, below_high=True)
_SECONDS = number(0, 1e9, above_low=True)  # up to 30 years: beyond that a clock's arithmetic may overflow
_POSITIVE = number(0, above_low=True)
_SEED = Rule(lambda v: isinstance(v, int) and 0 <= v < 2**63, "a whole number from 0 to 2^63 - 1")
_POWER_OF_TWO = Rule(lambda v: v in _POWERS, f"a power of two: 1, 2, 4, 8, ... {_POWERS[-1]}")
_ACTIVATION = Rule(
    lambda v: isinstance(v, str) or (isinstance(v, list) and all(isinstance(each, str) for each in v)),
    "the name of an activation of torch.nn, or a list of such names",
)
_BEST = Rule(
    lambda v: isinstance(v, str) and BEST.fullmatch(v) is not None,
    "a metric and min or max, such as 'val/loss min' or 'val/accuracy max'",
)
_METRIC = Rule(
    lambda v: isinstance(v, str) and v.startswith(("train/", "val/")),
    "a metric of the training or validation examples, such as train/loss, val/loss or val/accuracy",
    ("train/loss", "train/accuracy", "val/loss", "val/accuracy"),
)
_FOLDER_NAME = Rule(
    lambda v: isinstance(v, str) and v not in ("", ".", "..") and "/" not in v and v.isprintable(),
    "a folder's name, without a slash",
)

# --- the keys that every training has ----------------------------------------------------------------


@dataclass
class RunConfig:
    """Where the run leaves its files."""

    dir: str | None = setting(None, "the run's own directory; null: a new one, runs/NAME/TIME-JOB", TEXT)


@dataclass
class TrainerConfig:
    """How the training takes its steps."""

    epochs: int = setting(5, "passes over the training examples", whole(0))
    batch_size: int = setting(128, "examples of one optimizer step, over all ranks together", whole(1))
    per_rank_batch_size: int | None = setting(
        None,
        "examples of one optimizer step on each rank, in place of batch_size: the global batch then grows "
        "with the ranks",
        whole(1),
    )
    accumulate: int = setting(
        1,
        "pieces into which a rank's share of a batch is cut to save memory; their gradients are added up",
        whole(1),
    )
    clip_norm: float | None = setting(None, "gradients are scaled down to this L2 norm", _POSITIVE)
    label_smoothing: float = setting(
        0.0, "share of a label's weight that is spread over all classes", _SHARE
    )
    precision: str = setting(
        "fp32",
        "number format of the model's arithmetic; not every device has each",
        one_of("fp64", "fp32", "bf16", "fp16"),
    )
    compile: bool = setting(False, "whether torch.compile translates the model first", FLAG)
    train_metrics: str = setting(
        "evaluate",
        "how train/loss and train/accuracy are found: by a pass over the training examples after each "
        "epoch (evaluate), or from the batches while they are trained on (running)",
        one_of("evaluate", "running"),
    )
    nonfinite: str = setting(
        "stop", "what a loss or gradient that is not finite does: it stops the run, or the step is skipped",
        one_of("stop", "skip"),
        resume_must_agree=False,
    )  # fmt: skip
    reproducible: bool = setting(
        False, "whether any number of ranks that divides virtual_ranks computes the same bits", FLAG
    )
    virtual_ranks: int = setting(
        8,
        "pieces into which a batch is cut with reproducible=true, whatever the number of ranks",
        _POWER_OF_TWO,
    )
    unused_parameters: str = setting(
        "auto",
        "when DDP looks for parameters that take no part in a step: only where some took none in the first "
        "batch (auto), or always, for a model whose steps or ranks use different ones",
        one_of("auto", "always"),
        resume_must_agree=False,
    )
    max_steps: int | None = setting(
        None,
        "optimizer steps after which the run is over, before the end of its epochs; null: all epochs",
        whole(1),
    )
    limit_train: int | None = setting(
        None, "training examples that are used, the first of the split's order; null: all", whole(1)
    )
    limit_eval: int | None = setting(
        None, "validation and test examples that are used, the first of each; null: all", whole(1)
    )
    overfit_batch: bool = setting(
        False, "whether each step takes the same batch, the first: the loss must go to 0 then", FLAG
    )
    log_every_steps: int | None = setting(
        None,
        "after so many steps a line goes to metrics-steps.jsonl; null: never",
        whole(1),
        resume_must_agree=False,
    )
    detect_anomaly: bool = setting(
        False,
        "whether a step whose loss or gradient is not finite is looked at again, to name the layer",
        FLAG,
        resume_must_agree=False,
    )


@dataclass
class CheckpointConfig:
    """When to save. A run saves at its end and before its deadline too."""

    every_steps: int | None = setting(None, "save after so many steps; null: never for that", whole(1))
    every_epochs: int | None = setting(1, "save after so many epochs; null: never for that", whole(1))
    every_s: float | None = setting(None, "save after so many seconds; null: never for that", _POSITIVE)
    keep: int = setting(2, "checkpoints that stay: the newest, and the best besides", whole(1))
    best: str = setting(
        BEST_BY_DEFAULT,
        "which epoch is the best: the one with the lowest (min) or the highest (max) value of a metric",
        _BEST,
    )


@dataclass
class WatchdogConfig:
    """A rank that makes no progress for longer is named, and the run ended."""

    start_s: float = setting(600, "seconds that the start may take", _SECONDS)
    first_step_s: float = setting(600, "seconds that the first step may take, which compiles", _SECONDS)
    step_s: float | None = setting(
        None, "seconds that a step may take; null: 10 times the median step, at least 30", _SECONDS
    )
    save_s: float = setting(600, "seconds that saving may take", _SECONDS)


@dataclass
class ShardingConfig:
    """How a model is spread over the ranks. A run may go on with another sharding."""

    kind: str = setting(
        "none",
        "none: each rank holds the whole model; fsdp: it is spread over all ranks; hybrid: it is spread "
        "over the devices of a node",
        one_of("none", "fsdp", "hybrid"),
    )
    blocks: list[str] | None = setting(
        None,
        "class names of the modules that are spread one by one; null: they are chosen by size",
        list_of(TEXT),
    )
    min_parameters: int = setting(
        100_000,
        "with blocks=null: members of a ModuleList or Sequential with so many parameters are the blocks",
        whole(1),
    )
    param_dtype: str | None = setting(
        None,
        "number format in which a block's weights are gathered and in which it computes; null: as they are",
        one_of("bf16", "fp32"),
    )
    reduce_dtype: str | None = setting(
        None,
        "number format in which gradients are added up; null: as they are",
        one_of("bf16", "fp32"),
    )
    activation_checkpointing: bool = setting(
        False, "whether a block's activations are computed again in the backward pass, and not kept", FLAG
    )
    devices: int | None = setting(
        None, "with kind=hybrid: ranks that the model is spread over; null: those of a node", whole(1)
    )


@dataclass
class Config:
    """One training. The component sections are free: their `_target_` decides what they may hold."""

    name: str = setting("train", "the folder under runs/ for the run's directory", _FOLDER_NAME)
    seed: int = setting(
        0,
        "where every random draw starts: split, order of the examples, initial weights, dropout",
        _SEED,
        resume_must_agree=True,
    )
    runtime: str = setting(
        "auto",
        "who brings the ranks together: ezpz, or torch itself (native); auto: ezpz where it is installed",
        one_of("auto", "ezpz", "native"),
    )
    device: str = setting(
        "auto",
        "what each rank computes on; auto: a GPU where there is one",
        one_of("auto", "cuda", "xpu", "mps", "cpu"),
    )
    oversubscribe: bool = setting(False, "whether several ranks may share one GPU", FLAG)
    threads: int | None = setting(
        None, "CPU threads of each rank; null: one for each CPU that it may use", whole(1, 1024)
    )
    console: str = setting(
        "normal",
        "what the console shows. quiet (-q): warnings, errors and the last line; verbose (-v): also what "
        "each rank does at the start, each save, and the log lines of all ranks",
        one_of("quiet", "normal", "verbose"),
    )
    resume: str = setting(
        "auto",
        "auto: go on from the newest valid checkpoint in run.dir; never: start anew; or the path of a "
        "checkpoint or of a run to go on from",
        TEXT,
    )
    report: bool = setting(
        True, "whether rank 0 makes a page with pictures, report.html, at the end of the run", FLAG
    )
    profile: bool = setting(
        False, "whether steps 10 to 20 of each start are timed, operation by operation, into profile/", FLAG
    )
    run: RunConfig = setting(RunConfig, "where the run is kept")
    trainer: TrainerConfig = setting(TrainerConfig, "how it is trained", resume_must_agree=True)
    sharding: ShardingConfig = setting(
        ShardingConfig, "how the model is spread over the ranks", resume_must_agree=False
    )
    checkpoint: CheckpointConfig = setting(CheckpointConfig, "when to save")
    watchdog: WatchdogConfig = setting(WatchdogConfig, "how long a rank may make no progress")
    tracker: dict[str, Any] = setting(
        dict, "where figures are sent besides the run directory", resume_must_agree=False
    )
    task: dict[str, Any] = setting(
        lambda: {"_target_": CLASSIFICATION},
        "what a batch is, what the loss is, and what is measured",
        resume_must_agree=True,
    )
    data: dict[str, Any] = setting(dict, "what is trained on", resume_must_agree=True)
    model: dict[str, Any] = setting(dict, "what is trained", resume_must_agree=True)
    optimizer: dict[str, Any] = setting(dict, "what changes the weights", resume_must_agree=True)
    scheduler: dict[str, Any] = setting(dict, "what changes the learning rate", resume_must_agree=True)
    own: dict[str, Any] | None = setting(
        None, "the values of a loop of one's own (allranks.open); null for any other training",
        resume_must_agree=True,
    )  # fmt: skip


# --- keys of the free sections -----------------------------------------------------------------------


def _free(doc: str, rule: Rule | None = None, resume_must_agree: bool | None = None) -> Setting:
    return Setting(doc, rule, optional=False, resume_must_agree=resume_must_agree)


_TARGET = "dotted name of the class or function that makes it"
_ROOT = "the folder of all data sets; its default is $ALLRANKS_DATA, else ./data"
_FETCH = "whether rank 0 fetches files that are missing"

# These mean the same whatever `_target_` a section has.
SECTION_KEYS: dict[str, Setting] = {
    "task._target_": _free(_TARGET),
    "task.loss._target_": _free(
        "dotted name of a loss, such as torch.nn.HuberLoss, in place of the task's own; its values stand "
        "beside it"
    ),
    "data.input_shape": _free("channels, height and width of an image", list_of(whole(1))),
    "data.classes": _free("number of classes", whole(1)),
    "data.class_names": _free(
        "a name for each class, in the order of the labels, for predictions and reports",
        list_of(TEXT),
        resume_must_agree=False,
    ),
    "data.split": _free(
        "training and validation examples, drawn from `data.train` by seed", list_of(whole(1), 2)
    ),
    "data.collate._target_": _free(
        "dotted name of what makes a batch of a list of a Dataset's examples, in place of torch's own way"
    ),
    "data.root": _free(_ROOT, TEXT, resume_must_agree=False),
    "data.fetch": _free(_FETCH, FLAG, resume_must_agree=False),
    "data.workers": _free(
        "processes of each rank's DataLoader; 0: none besides the rank", whole(0), resume_must_agree=False
    ),
    "data.train._target_": _free(_TARGET),
    "data.val._target_": _free(
        _TARGET + "; without data.val the validation examples are split off data.train"
    ),
    "data.test._target_": _free(_TARGET),
    "data.train.root": _free(_ROOT, resume_must_agree=False),
    "data.val.root": _free(_ROOT, resume_must_agree=False),
    "data.test.root": _free(_ROOT, resume_must_agree=False),
    "data.train.fetch": _free(_FETCH, resume_must_agree=False),
    "data.val.fetch": _free(_FETCH, resume_must_agree=False),
    "data.test.fetch": _free(_FETCH, resume_must_agree=False),
    "tracker.every_steps": Setting(
        "the trackers get the figures of one step in so many; null: those of epochs only",
        whole(1),
        optional=True,
    ),
    "tracker.csv._target_": _free(_TARGET, resume_must_agree=False),
    "tracker.jsonl._target_": _free(_TARGET, resume_must_agree=False),
    "tracker.mlflow._target_": _free(_TARGET, resume_must_agree=False),
    "tracker.mlflow.experiment": _free("MLflow's experiment", TEXT, resume_must_agree=False),
    "tracker.tensorboard._target_": _free(_TARGET, resume_must_agree=False),
    "tracker.wandb._target_": _free(_TARGET, resume_must_agree=False),
    "tracker.wandb.project": _free("the project at Weights & Biases", TEXT, resume_must_agree=False),
    "model._target_": _free(_TARGET),
    "optimizer._target_": _free(_TARGET),
    "scheduler._target_": _free(_TARGET + "; null: the learning rate stays as it is"),
    "scheduler.interval": _free("how often the schedule is stepped", one_of("epoch", "step")),
    "scheduler.monitor": _free("the metric that the schedule looks at", _METRIC),
}

# These hold where the component is ours or torch's: a user's own class may mean something else by a name.
COMPONENT_KEYS: dict[str, Setting] = {
    "model.input_shape": _free("channels, height and width of an image"),
    "model.classes": _free("number of classes"),
    "model.widths": _free("features of each hidden layer", list_of(whole(1))),
    "model.channels": _free("features of each 3x3 convolution with its 2x2 pool", list_of(whole(1))),
    "model.hidden": _free("features of the layer before the last", whole(1)),
    "model.activation": _free("what follows each hidden layer; a list, for mlp only, has one for each",
                              _ACTIVATION),
    "model.patch": _free("height and width of a patch, in pixels", whole(1)),
    "model.width": _free("features of each patch", whole(1)),
    "model.depth": _free("transformer layers", whole(1)),
    "model.heads": _free("attention heads of each layer", whole(1)),
    "model.dropout": _free("share of features that are set to 0 at random in training", _SHARE),
    "optimizer.lr": _free("learning rate", _POSITIVE),
    "optimizer.weight_decay": _free("strength of the pull of all weights towards 0", number(0)),
    "optimizer.momentum": _free("share of the last step that is taken again", number(0)),
    "optimizer.nesterov": _free("whether momentum looks ahead, as Nesterov's does", FLAG),
    "optimizer.fused": _free("whether all parameters are updated in one call", FLAG),
    "optimizer.alpha": _free("how slowly the mean of squared gradients forgets", _SHARE),
    "optimizer.betas": _free("how slowly the means of gradients and of their squares forget",
                             list_of(_SHARE, 2)),
    "scheduler.step_size": _free("schedule steps from one fall to the next", whole(1)),
    "scheduler.gamma": _free("factor of each fall", _POSITIVE),
    "scheduler.T_max": _free("schedule steps down to eta_min; `length`: all of the run's"),
    "scheduler.eta_min": _free("the lowest learning rate", number(0)),
    "scheduler.total_steps": _free("schedule steps of the whole cycle; `length`: all of the run's"),
    "scheduler.length": _free("schedule steps; `length`: all of the run's"),
    "scheduler.max_lr": _free("the highest learning rate", _POSITIVE),
    "scheduler.pct_start": _free("share of the steps in which the rate rises", number(0, 1)),
    "scheduler.warmup": _free("share of the steps in which the rate rises", _SHARE),
    "scheduler.floor": _free("the last rate, as a share of the full one", number(0, 1)),
    "scheduler.factor": _free("factor of each fall", number(0, 1, above_low=True, below_high=True)),
    "scheduler.patience": _free("schedule steps without progress before a fall", whole(0)),
}  # fmt: skip


@cache
def settings() -> dict[str, Setting]:
    """What is known of every key that means the same in each configuration, by dotted key."""
    return {**settings_of(Config), **SECTION_KEYS}


def setting_of(key: str, values: Mapping[str, Any]) -> Setting | None:
    """What is known of `key` in the configuration with these `values`, by dotted key; None for nothing."""
    if key in settings():
        return settings()[key]
    return COMPONENT_KEYS.get(key) if _is_ours(values, key.partition(".")[0]) else None


# --- checking ----------------------------------------------------------------------------------------


@cache
def _schema() -> DictConfig:
    """Keys, types and defaults of a configuration, for OmegaConf, whose merge() copies it."""
    return OmegaConf.structured(Config)


def typed(composed: DictConfig) -> Config:
    """The composed configuration as dataclasses; raises UserError naming key, value and remedy."""
    schema = _schema()
    try:
        config = OmegaConf.to_object(OmegaConf.merge(schema, composed))
    except ValidationError as error:
        _refuse_values_in_place_of_sections(composed)
        key = error.full_key or str(error.key)
        known = settings().get(key)
        kind = known.rule.remedy if known and known.rule else f"a value of type {_type_name(error)}"
        raise UserError(f"{key}={_shown(composed, key)} is not valid: give {kind}.") from error
    except ConfigKeyError as error:
        key = error.full_key or str(error.key)
        raise UserError(unknown_key(key, [*below(OmegaConf.to_container(schema))])) from error
    except OverflowError as error:
        values = below(OmegaConf.to_container(composed, resolve=False))
        keys = [key for key, value in values.items() if type(value) is int and abs(value) > LARGEST]
        named = ", ".join(keys) or "The configuration"
        raise UserError(f"{named}: a number has more than 308 digits; give a smaller one.") from error
    except OmegaConfBaseException as error:
        _refuse_values_in_place_of_sections(composed)
        raise UserError(f"The configuration does not hold together: {first_line(error)}") from error
    assert isinstance(config, Config)
    _check(config)
    return config


def _refuse_values_in_place_of_sections(composed: DictConfig) -> None:
    """Raises UserError for a plain value or a list where a section belongs: `checkpoint=5`.

    OmegaConf refuses these as well, but often without the section's name.
    """
    plain = OmegaConf.to_container(composed, resolve=False)
    defaults = _plain(Config())
    for section, default in defaults.items():
        value = plain.get(section, default) if isinstance(plain, dict) else default
        if isinstance(default, dict) and not isinstance(value, dict):
            keys = [key for key in settings() if key.startswith(f"{section}.")]
            raise UserError(
                f"{section}={value} is not valid: {section} is a section, whose keys are given one by one, "
                f"such as {keys[0]}=... (`allranks train --help` lists them)."
            )


def _check(config: Config) -> None:
    values = leaves(config)
    for key, value in values.items():
        _refuse_keys_in_a_value(key, values)
        known = setting_of(key, values)
        if known is None or known.rule is None or (value is None and known.optional):
            continue
        rule = known.rule
        if not rule.valid(value):
            guess = did_you_mean(str(value), rule.names) if rule.names else ""
            raise UserError(f"{key}={value} is not valid: give {rule.remedy}.{guess}")
    _check_sharding(config)
    parts = ["data.val"] if config.data.get("val") else []
    components = ["task", "model", "optimizer", "data.train", *parts, "data.test"]
    # A loop of one's own makes these itself.
    for group in components if config.own is None else ():
        if f"{group}._partial_" in values:
            raise UserError(f"{group}._partial_ is not valid: give all values that _target_ takes.")
        if not isinstance(values.get(f"{group}._target_"), str):
            raise UserError(
                f"{group}._target_ is missing: name the class or function that makes the {group}, "
                f"as `_target_: package.module.Name`, in its YAML."
            )


def _check_sharding(config: Config) -> None:
    """Raises UserError if a key does not go with the sharding."""
    sharding = config.sharding
    if sharding.kind == "none":
        if sharding != ShardingConfig():
            raise UserError(
                "sharding.kind=none spreads no model, so the other keys of sharding have no meaning: take "
                "sharding=fsdp or sharding=hybrid with them."
            )
        return
    if sharding.devices is not None and sharding.kind != "hybrid":
        raise UserError(
            f"sharding.devices={sharding.devices} is for sharding=hybrid: take that, or leave the key out."
        )
    trainer = config.trainer
    # A loop of the user's own asks for both keys by one argument of allranks.open().
    is_own = config.own is not None
    reproducible = f"virtual_ranks={trainer.virtual_ranks}" if is_own else "trainer.reproducible=true"
    refused = {
        reproducible: trainer.reproducible,
        "trainer.compile=true": trainer.compile,
        "trainer.precision=fp16": trainer.precision == "fp16",
        # Ranks that use different weights would wait for each other's slices of other blocks.
        "trainer.unused_parameters=always": trainer.unused_parameters == "always",
    }
    for setting_given, is_given in refused.items():
        if is_given:
            raise UserError(
                f"{setting_given} does not go with sharding={sharding.kind}: leave it out, or take "
                "sharding=none."
            )


def _refuse_keys_in_a_value(key: str, values: Mapping[str, Any]) -> None:
    """Raises UserError for a key below a plain value: `optimizer.lr={a: 1}` makes `optimizer.lr.a`."""
    parts = key.split(".")
    for end in range(2, len(parts)):
        above = ".".join(parts[:end])
        known = setting_of(above, values)
        if known is not None and known.rule is not None:
            raise UserError(f"{above} has keys of its own ({key}): give {known.rule.remedy}.")


def _is_ours(values: Mapping[str, Any], group: str) -> bool:
    return str(values.get(f"{group}._target_")).startswith(("allranks.", "torch."))


def _plain(config: Config) -> dict[str, Any]:
    """The configuration as dicts, lists and plain values.

    OmegaConf would do it as well, in 9 ms instead of 0.1, and each rank asks several times at its start.
    """
    plain = _without_dataclasses(config)
    assert isinstance(plain, dict)
    return plain


def _without_dataclasses(value: Any) -> Any:
    """The same values, with a dict for each dataclass, and copies of all dicts and lists."""
    if is_dataclass(value):
        return {each.name: _without_dataclasses(getattr(value, each.name)) for each in fields(value)}
    if isinstance(value, dict):
        return {key: _without_dataclasses(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_without_dataclasses(inner) for inner in value]
    return value


def leaves(config: Config) -> dict[str, Any]:
    """Every value of the configuration under its dotted key."""
    return below(_plain(config))


def below(node: Any, prefix: str = "") -> dict[str, Any]:
    """Every value in a dict and the dicts inside it, by dotted key. A list is one value."""
    found: dict[str, Any] = {}
    for key, value in node.items():
        name = f"{prefix}{key}"
        found |= below(value, name + ".") if isinstance(value, dict) and value else {name: value}
    return found


def unknown_key(key: str, known: Sequence[str]) -> str:
    """What to say of a key that is none of the `known` ones."""
    if key.startswith("sharding.") and key in settings():
        # The choice sharding=none, which is the default, has no other key than `kind`.
        choices = "sharding=hybrid" if key == "sharding.devices" else "sharding=fsdp or sharding=hybrid"
        return f"{key} has no meaning here: take {choices} with it."
    guess = did_you_mean(key, known) or " `allranks train --cfg job` lists the keys."
    return f"{key} is not a key of the configuration.{guess}"


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
    return hashlib.sha256(repr(_plain(config)).encode()).hexdigest()


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
    return replace(_of_file(path, content), run=RunConfig(directory))


# --- what the ranks need to know before they can work together ------------------------------------------


@dataclass(frozen=True)
class RuntimeSettings:
    """What a configuration says of the ranks themselves: devices, threads, who connects them."""

    digest: str  # a hash of the whole configuration, which must be the same on all ranks
    library: str  # `runtime`: auto, ezpz or native
    device: str  # auto, cuda, xpu, mps or cpu
    precision: str  # `trainer.precision`, which not every device has
    oversubscribe: bool  # whether ranks may share a GPU
    threads: int | None  # the CPU threads of each rank; None: as many as it has CPUs
    virtual_ranks: int | None  # the fixed number of shares of a reproducible run; None for any other run
    limits: WatchdogConfig


def runtime_settings(config: Config) -> RuntimeSettings:
    """What this configuration says of the ranks themselves."""
    return RuntimeSettings(
        digest=digest(config),
        library=config.runtime,
        device=config.device,
        precision=config.trainer.precision,
        oversubscribe=config.oversubscribe,
        threads=config.threads,
        virtual_ranks=config.trainer.virtual_ranks if config.trainer.reproducible else None,
        limits=config.watchdog,
    )


# --- what a resume must agree on -----------------------------------------------------------------------


def decisive_values(config: Config) -> dict[str, Any]:
    """The values that decide what a training computes, under their dotted keys.

    All others say where and how it runs, and may change when it goes on.
    """
    return {key: value for key, value in leaves(config).items() if must_agree(key)}


def must_agree(key: str) -> bool:
    """Whether a resume must have the same value: by the mark at the key, else by the mark at its section.

    A user's component may have any keys; those without a mark count as deciding what is computed.
    """
    for name in (key, key.partition(".")[0]):
        known = settings().get(name)
        if known is not None and known.resume_must_agree is not None:
            return known.resume_must_agree
    return False


def with_new_keys(there: Mapping[str, Any]) -> dict[str, Any]:
    """Decisive values that an earlier version has saved, with the defaults of keys that it did not know."""
    here = decisive_values(Config())
    return {**{key: here[key] for key in here if key.startswith(("trainer.", "task."))}, **there}


def differing(there: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What differs between the decisive values of two runs, as text; "" for nothing."""
    keys = keys_that_differ(there, here)
    return "; ".join(f"{key} is {there.get(key)} there, not {here.get(key)}" for key in keys)


def keys_that_differ(there: Mapping[str, Any], here: Mapping[str, Any]) -> list[str]:
    """The keys whose values differ between two runs, in the order of the alphabet."""
    return [key for key in sorted({*there, *here}) if not _are_equal(there.get(key), here.get(key))]


def _are_equal(one: Any, other: Any) -> bool:
    """Whether two values are equal. NaN, which Python finds unequal to itself, is equal to NaN here."""
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_are_equal, one, other))
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_are_equal(one[key], other[key]) for key in one)
    are_both_nan = one != one and other != other  # noqa: PLR0124  what only NaN says of itself
    return bool(one == other or are_both_nan)


def frozen(path: Path) -> Config:
    """The configuration that a run has frozen in this file; raises UserError where it is none."""
    try:
        content = path.read_bytes()
    except OSError as error:
        raise _unreadable(path, error) from error
    return _of_file(path, content)


def _of_file(path: Path, content: bytes) -> Config:
    """The configuration in the content of this file; raises UserError where it is none."""
    from yaml import YAMLError  # type: ignore[import-untyped,unused-ignore]

    if not content.strip():
        raise _unreadable(path, ValueError("it is empty"))
    try:
        # Decoded as files.write_text() has encoded it, which is by the locale.
        loaded = OmegaConf.create(TextIOWrapper(BytesIO(content)).read())
    except (OSError, ValueError, AssertionError, YAMLError, OmegaConfBaseException) as error:
        raise _unreadable(path, error) from error
    return typed(loaded)  # type: ignore[arg-type]


def _unreadable(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} cannot be read ({first_line(error)}): bring it back from a copy, or give the "
        "directory of another run."
    )


# --- the shipped files ---------------------------------------------------------------------------------


def conf_dir() -> Path:
    """The shipped YAML files: inside an installed package, or at the top of a source tree."""
    here = Path(__file__).resolve().parent
    installed, source = here / "conf", here.parents[1] / "conf"
    return installed if installed.is_dir() else source
