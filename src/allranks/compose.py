"""From a command line in Hydra's grammar to configurations: one, or one for each cell of a sweep. No torch.

Hydra composes; allranks.config checks. Nothing is written: Hydra's own directories are switched off, and
training starts only after Hydra has returned.
"""

from __future__ import annotations

import contextlib
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from allranks.base.errors import UserError
from allranks.base.files import in_present_directory, with_home
from allranks.base.schema import TEXT
from allranks.base.terminal import USUAL_COLUMNS
from allranks.base.text import as_text, did_you_mean, first_line, is_text
from allranks.config import Config, below, conf_dir, leaves, setting_of, typed, unknown_key

# Flags of our own, which stand among Hydra's: the value of `console` that each stands for.
CONSOLE_FLAGS = {"-q": "quiet", "-v": "verbose"}

# The groups of YAML files of which one is chosen each: `model=cnn`.
GROUPS = ("task", "data", "model", "optimizer", "scheduler", "trainer", "sharding", "tracker", "experiment")
SEVERAL = ("tracker",)  # of these a list may be chosen: `tracker=[csv,mlflow]`


def from_command_line(arguments: Sequence[str]) -> list[Config]:
    """Every training that the command line asks for: one, several with -m, none after --help.

    The arguments are Hydra's. Raises UserError for whatever Hydra or the schema refuses.
    """
    return [config for config, _ in cells_from_command_line(arguments)]


def cells_from_command_line(arguments: Sequence[str]) -> list[tuple[Config, list[str]]]:
    """Every training that the command line asks for, each with its own overrides.

    A sweep (-m) has several cells, and the overrides of a cell are those that Hydra chose for it. Raises
    UserError for whatever Hydra or the schema refuses.
    """
    import hydra
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import HydraException
    from hydra.types import RunMode

    composed: list[tuple[DictConfig, list[str]]] = []
    sweep_dirs: list[str | None] = []  # run.dir of each training of a sweep, as it was given
    arguments, console = without_console_flags(arguments)

    def collect(cfg: DictConfig) -> None:
        OmegaConf.resolve(cfg)  # now, while ${hydra:...} can still be resolved
        _name_by_the_last_part(cfg, HydraConfig.get().runtime.choices.get("model"))
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            sweep_dirs.append(_into_own_folder(cfg, HydraConfig.get().job.num))
        composed.append((cfg, list(HydraConfig.get().overrides.task)))

    # Both are shown by --help.
    OmegaConf.register_new_resolver("allranks.choices", _help_on_choices, replace=True)
    OmegaConf.register_new_resolver("allranks.keys", _help_on_keys, replace=True)
    app = hydra.main(config_path=str(conf_dir()), config_name="config", version_base="1.3")(collect)
    flags, overrides = split_flags(arguments)
    _refuse_without_value(flags)
    flags = [_with_home_in_flag(flag) for flag in flags]
    overrides = [_with_home_quoted(override) for override in overrides]
    for flag in (flag.partition("=")[0] for flag in flags):
        if flag.startswith("--") and flag not in HYDRAS:
            key = next((k for k in leaves(Config()) if k.endswith("." + flag.strip("-"))), "key")
            raise UserError(f"{flag} is not an option: values are given as {key}=..., without dashes.")
    for override in overrides:
        _refuse_without_effect(override)
        group, _, choice = override.partition("=")
        if group == "machine":
            raise UserError(
                f"{override} is none of a training's keys: `allranks launch --machine {choice}` uses the "
                "machine's file, and so does `allranks submit` with that option."
            )
        if group in SEVERAL and choice.startswith("["):
            continue
        if group in GROUPS and re.match(r"[\[{]|[-+]?[0-9.]+$", choice):
            raise UserError(f"{override} is not valid: {group} takes the name of one choice.")
    with (
        _hydra_that_leaves_no_trace([*flags, *overrides]),
        _hydra_that_composes_once(_may_set_mode(flags, overrides)),
        _hydra_that_names_the_file(),
        _empty_is_unset("ALLRANKS_DATA"),
        in_present_directory(),
    ):
        try:
            app()
        except (HydraException, ValueError) as error:
            raise UserError(_explain(error, overrides)) from error
        except OmegaConfBaseException as error:
            raise UserError(f"The configuration does not hold together: {first_line(error)}") from error
    asks_for_sweep = bool({"-m", "--multirun"} & set(flags))
    only_shows = any(flag.partition("=")[0] in _FLAGS_THAT_SHOW for flag in flags)
    if not composed and asks_for_sweep and not only_shows:
        raise UserError(
            "-m asks for no training at all, because a key has no value, as by range(1,1): give each key "
            "one or more."
        )
    different = list(dict.fromkeys(as_override(directory) for directory in sweep_dirs))
    if len(different) > 1:
        raise UserError(
            f"run.dir={','.join(different)} is not the same for all trainings of this sweep: give one "
            "run.dir=PATH, in which each of them has a directory 0, 1, ..."
        )
    configs = [(_with_whole_paths(typed(cfg)), overrides) for cfg, overrides in composed]
    for config, _ in configs:
        config.console = console or config.console
    return configs


def _name_by_the_last_part(cfg: DictConfig, model: str | None) -> None:
    """Calls a run of `model=mine/wide` wide. A name is a folder's, and so has no slash.

    A name that the user has given is left as it is.
    """
    if model and "/" in model and cfg.get("name") == model:
        cfg.name = model.rpartition("/")[2]


def _into_own_folder(cfg: DictConfig, number: int) -> str | None:
    """Appends the number of a sweep's cell to its run.dir. Returns the run.dir as it was; None without one.

    A value that is not a path, such as `run.dir=[a]` or `run=null`, is left as it is: typed() refuses it.
    """
    directory = cfg.run.get("dir") if isinstance(cfg.run, DictConfig) else None
    if not directory or not isinstance(directory, str | int | float):
        return None
    cfg.run.dir = str(Path(str(directory)) / str(number))
    return str(directory)


def without_console_flags(arguments: Sequence[str]) -> tuple[list[str], str | None]:
    """(the arguments without -q and -v, the value of `console` that the last of these stands for).

    The value is None where neither was given. It is not an override, so that the cells of a sweep are not
    called by it.
    """
    given = [word for word in arguments if word in CONSOLE_FLAGS]
    others = [word for word in arguments if word not in CONSOLE_FLAGS]
    return others, CONSOLE_FLAGS[given[-1]] if given else None


def _with_whole_paths(config: Config) -> Config:
    """`~` stands for the home directory, and a relative run.dir for one below the present directory.

    Settled here, once: later the ranks of other hosts or a job's script may have another present directory.
    """
    if config.run.dir is not None:
        config.run.dir = whole_run_dir(with_home("run.dir", config.run.dir))
    if config.resume not in ("auto", "never"):
        config.resume = with_home("resume", config.resume)
    sections = (
        ("data", config.data),
        *((f"data.{part}", config.data.get(part)) for part in ("train", "val", "test")),
    )
    for key, section in sections:
        if isinstance(section, dict) and isinstance(section.get("root"), str):
            section["root"] = with_home(f"{key}.root", section["root"])
    return config


def whole_run_dir(directory: str) -> str:
    """The run directory's whole path. Raises UserError for a name that no record or terminal can show."""
    whole = str(Path(directory).absolute())
    if not is_text(whole):
        raise UserError(
            f"run.dir={as_text(whole)} has bytes that are no UTF-8, which no record can hold: give another "
            "one."
        )
    if not directory.isprintable():
        raise UserError(f"run.dir={directory} has control characters: give another one.")
    return whole


_FLAGS_WITH_VALUE = frozenset(
    "-c -p -cp -cn -cd --cfg --package --config-path --config-name --config-dir --info".split()
)
# Those that show something instead of training. `--info` and `--cfg` are shown for one training only.
_FLAGS_THAT_SHOW = frozenset(
    "-h -c -i -sc --help --hydra-help --version --cfg --info --shell-completion".split()
)
HYDRAS = _FLAGS_WITH_VALUE.union(
    "--help --hydra-help --version --resolve --run --multirun --shell-completion "
    "--experimental-rerun".split()
)


def split_flags(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates Hydra's flags from the overrides: (flags, overrides).

    Hydra's parser wants all overrides in a row, and here they may stand between flags.
    """
    flags: list[str] = []
    overrides: list[str] = []
    for before, argument in zip(["", *arguments], arguments, strict=False):
        is_override = not argument.startswith("-") and before not in _FLAGS_WITH_VALUE
        (overrides if is_override else flags).append(argument)
    return flags, overrides


def _refuse_without_value(flags: Sequence[str]) -> None:
    """Raises UserError for a flag of Hydra's that needs a value and has none after it.

    Hydra would take the next word of its command line, which may be one that is put there for it here.
    """
    for flag, following in zip(flags, [*flags[1:], "-"], strict=False):
        if flag in _FLAGS_WITH_VALUE - {"--info"} and following.startswith("-"):
            raise UserError(
                f"{flag} has no value: give it after {flag}, with a blank between, or with a =."
            )


# What Hydra would do for another program, and allranks does in its own way: the beginning of the key, and
# what to do instead.
_WITHOUT_EFFECT = {
    "hydra.run.dir": "give run.dir=PATH",
    "hydra.sweep.dir": "give run.dir=PATH, in which each training of a sweep has a directory 0, 1, ...",
    "hydra.sweep.subdir": "each training of a sweep has a directory 0, 1, ... in run.dir",
    "hydra.output_subdir": "config.yaml is in the run's directory",
    "hydra.job.chdir": "a run stays in the directory where it was started",
    "hydra.job.name": "give name=NAME",
    "hydra.job.env_set": "set the variable in the shell, or as machine.variables.NAME of `allranks launch`",
    "hydra.job_logging": "logs/rank-N.log in the run's directory has all messages",
    "hydra.hydra_logging": "logs/rank-N.log in the run's directory has all messages",
    "hydra.verbose": "logs/rank-N.log in the run's directory has all messages",
    "hydra.launcher": "`allranks launch -m` and `allranks submit -m` start the trainings of a sweep",
}


def key_of(override: str) -> str:
    """The key that an override in Hydra's grammar sets or removes: `seed` for `++seed=1` and `~seed`."""
    return override.partition("=")[0].lstrip("+~")


def _refuse_without_effect(override: str) -> None:
    """Raises UserError for a value of Hydra's own that nothing here would look at."""
    key = key_of(override).replace("/", ".")
    for beginning, instead in _WITHOUT_EFFECT.items():
        if key == beginning or key.startswith(f"{beginning}."):
            raise UserError(f"{override} has no effect: {instead}.")


def _with_home_in_flag(flag: str) -> str:
    """`--config-dir=~/conf` with the home directory in it, which no shell puts there after a `=`."""
    name, equals, value = flag.partition("=")
    return f"{name}={with_home(name, value)}" if equals else with_home("--config-dir", flag)


def _with_home_quoted(override: str) -> str:
    """`run.dir=~/x` as Hydra's grammar can read it: in quotes."""
    key, _, value = override.partition("=")
    return f'{key}="{value}"' if re.fullmatch(r"~[\w./@+-]*", value) else override


@contextlib.contextmanager
def _hydra_that_leaves_no_trace(arguments: Sequence[str]) -> Iterator[None]:
    """Sets up Hydra's main(), to be called in the block: with these arguments, no directory, no log file.

    Its errors are raised as exceptions, instead of an exit with code 1. Only Hydra's sweeper insists on
    writing a file; that goes to a temporary folder.
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


def _may_set_mode(flags: Sequence[str], overrides: Sequence[str]) -> bool:
    """Whether `hydra.mode` may be set by something else than -m: a word, or a file of the user's own."""
    folders = {"-cp", "-cn", "-cd", "--config-path", "--config-name", "--config-dir"}
    return any(flag.partition("=")[0] in folders for flag in flags) or any(
        key_of(override).startswith("hydra") for override in overrides
    )


@contextlib.contextmanager
def _hydra_that_composes_once(may_set_mode: bool) -> Iterator[None]:
    """In the block, Hydra composes each configuration once; by itself it composes each of them twice.

    The first time it looks whether the configuration sets `hydra.mode`, and thereby asks for a sweep. If
    nothing can set it (`may_set_mode` is False), that is left out, and -m alone asks for one. And before
    Hydra starts the first cell of a sweep it composes all of them, so that a mistake in the last cell is
    found before the first one is trained. Here nothing is trained before all cells are composed.
    """
    from hydra._internal.hydra import Hydra
    from hydra.plugins.sweeper import Sweeper

    left_out: list[tuple[type, str]] = [(Sweeper, "validate_batch_is_legal")]
    if not may_set_mode:
        left_out.append((Hydra, "get_mode"))
    methods = [getattr(owner, name) for owner, name in left_out]
    for owner, name in left_out:
        setattr(owner, name, lambda *_, **__: None)
    try:
        yield
    finally:
        for (owner, name), method in zip(left_out, methods, strict=True):
            setattr(owner, name, method)


@contextlib.contextmanager
def _hydra_that_names_the_file() -> Iterator[None]:
    """In the block, a file of choices that cannot be read raises UserError with the file's name in it.

    Hydra passes on the message of the YAML parser or of the file system, which often does not have the
    name.
    """
    from hydra._internal.sources_registry import SourcesRegistry
    from hydra.core.plugins import Plugins
    from yaml import YAMLError  # type: ignore[import-untyped,unused-ignore]

    Plugins.instance()  # imports Hydra's own plugins, of which the reader of files is one
    reader: Any = SourcesRegistry.instance().resolve("file")
    load = reader.load_config

    def load_or_name(source: Any, config_path: str) -> object:
        try:
            return load(source, config_path)
        except (YAMLError, OmegaConfBaseException, OSError, ValueError, RecursionError) as error:
            name = config_path if config_path.endswith((".yaml", ".yml")) else f"{config_path}.yaml"
            raise UserError(
                f"{Path(source.path) / name} cannot be read ({_what_yaml_says(error)}): put the file right."
            ) from error

    reader.load_config = load_or_name
    try:
        yield
    finally:
        reader.load_config = load


def _what_yaml_says(error: Exception) -> str:
    """In one line what is wrong with a YAML file, and in which line of it where the parser says that."""
    if isinstance(error, OSError):
        # OmegaConf raises it, without a number, for a file that holds a plain value, such as `5`.
        return error.strerror or "it holds a single value: write `key: value` lines"
    problem = getattr(error, "problem", None) or first_line(error)
    mark = getattr(error, "problem_mark", None)
    return f"line {mark.line + 1}: {problem}" if mark else str(problem)


@contextlib.contextmanager
def _empty_is_unset(variable: str) -> Iterator[None]:
    """Within the block, a variable of the environment that is empty is not set: so YAML's default holds."""
    is_empty = os.environ.get(variable) == ""
    if is_empty:
        del os.environ[variable]
    try:
        yield
    finally:
        if is_empty:
            os.environ[variable] = ""


def _help_on_choices() -> str:
    """Every group with its choices, a user's own included. A machine is not a choice of a training's."""
    from hydra.core.global_hydra import GlobalHydra

    loader = GlobalHydra.instance().config_loader()
    lines: list[str] = []
    for group in sorted(loader.list_groups("")):
        choices = sorted(loader.get_group_options(group))
        if choices and group not in ("hydra", "machine"):
            lines.append(f"{group}: {', '.join(choices)}")
    return "\n".join(lines)


def _help_on_keys(*, _root_: DictConfig) -> str:
    """Every key of the composed configuration with its value, what it means, and what it may be."""
    composed = OmegaConf.to_container(_root_, resolve=False)
    assert isinstance(composed, dict)
    values = below({key: value for key, value in composed.items() if key != "hydra"})
    lines: list[str] = []
    for key, value in values.items():
        lines.append(f"{key}={as_override(value)}")
        known = setting_of(key, values)
        if known is None:  # a key of a user's own component
            continue
        what = known.doc
        if known.rule not in (None, TEXT):
            what += f" ({known.rule.remedy}{', or null' if known.optional else ''})"
        lines += textwrap.wrap(what, USUAL_COLUMNS, initial_indent="    ", subsequent_indent="    ")
    return "\n".join(lines).replace("$", "$$")  # Hydra takes $NAME for a place to fill in


def as_override(value: object) -> str:
    """The value as it is typed after `key=`."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return f"[{','.join(map(as_override, value))}]"
    return str(value)


def _explain(error: Exception, overrides: Sequence[str]) -> str:
    """Hydra's error in one message, with the nearest name that would have been right."""
    from hydra.errors import OverrideParseException

    cause = error.__cause__
    if isinstance(cause, ConfigKeyError | ConfigAttributeError):
        return unknown_key(cause.full_key or str(cause.key), _known_keys(overrides))
    if isinstance(error, OverrideParseException):
        return (
            f"{error.override} cannot be read as an override: write key=value, in quotes what has other "
            f"signs than letters, digits and /._-: 'key=\"a=b\"'. ({first_line(error)})"
        )
    if "Ambiguous value" in str(error):
        return f"{first_line(error)}: add -m for a run of each value, or write key=[a,b] for one list."
    missing, options = getattr(error, "missing_cfg_file", None), getattr(error, "options", None)
    if missing and options:
        group, _, choice = str(missing).rpartition("/")
        return f"{group}={choice} is not one of the choices: {', '.join(options)}." + did_you_mean(
            choice, options
        )
    return f"{first_line(error).rstrip('.')}. `allranks train --help` lists what can be given."


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
    return [*below(OmegaConf.to_container(cfg, resolve=False)), *GROUPS]
