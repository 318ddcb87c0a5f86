"""What may be changed when a trained model is used: the data, the device, the threads. No torch.

These are overrides in Hydra's grammar, as `allranks train` takes them: `data=fashion_mnist`,
`data.root=/shared/data`, `device=cpu`. All other values are those in the run's config.yaml.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from allranks import compose
from allranks import config as configs
from allranks.base.errors import UserError
from allranks.base.text import first_line
from allranks.config import Config

_OVERRIDE = re.compile(r"(data|device|threads)[.=]|data\.")
_KEY = re.compile(r"[A-Za-z_][\w.]*=")

# These say where the data are and how they are read: the examples stay the same.
_SAME_EXAMPLES = {"data.root", "data.fetch", "data.workers", "data.class_names"}


@dataclass(frozen=True)
class Given:
    """The values that the overrides have changed."""

    data: dict[str, Any] | None  # the section; None if the run's own is kept
    is_other_data: bool  # whether the examples may be others than the run's
    device: str | None
    threads: int | None


_NO_MODEL = ("~model", "+model={_target_: none}", "name=none")


def split(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """Separates overrides from other words, such as names of images: (others, overrides)."""
    overrides = [word for word in words if _OVERRIDE.match(word) and "=" in word]
    return [word for word in words if word not in overrides], overrides


def refuse_others(words: Sequence[str]) -> None:
    """Raises UserError for a word that is not an override of data, device or threads."""
    for word in words:
        if _KEY.match(word):
            raise UserError(
                f"{word} cannot be given to a trained model: only data, data.KEY, device and threads can."
            )
        raise UserError(f"{word} is not expected here: after the run come overrides such as data=mnist.")


def apply(config: Config, overrides: Sequence[str], config_dir: str | None = None) -> Given:
    """What the overrides give for the run of this configuration; raises UserError where they are not valid.

    `data=NAME` composes a data set of conf/data, or of the folder `config_dir`. Without it `data.KEY=VALUE`
    changes a value of the run's own data.
    """
    keys = [override.partition("=")[0] for override in overrides]
    if not overrides:
        return Given(None, False, None, None)
    if "data" in keys:
        flags = ["--config-dir", config_dir] if config_dir else []
        # Only the data are wanted. The default model asks for keys that other data do not have.
        [composed] = compose.from_command_line([*flags, *overrides, *_NO_MODEL])
    else:
        composed = _changed(config, overrides)
    of_data = [key for key in keys if key.partition(".")[0] == "data"]
    may_change_examples = [key for key in of_data if key not in _SAME_EXAMPLES]
    return Given(
        data=composed.data if of_data else None,
        is_other_data=bool(may_change_examples),
        device=composed.device if "device" in keys else None,
        threads=composed.threads if "threads" in keys else None,
    )


def _changed(config: Config, overrides: Sequence[str]) -> Config:
    """The configuration with these values in it."""
    known = configs.leaves(config)
    for key in (override.partition("=")[0] for override in overrides):
        if key not in known and configs.setting_of(key, known) is None:
            raise UserError(configs.unknown_key(key, [name for name in known if name.startswith("data.")]))
    try:
        given = OmegaConf.from_dotlist(list(overrides))
        values = OmegaConf.merge(OmegaConf.structured(config), given)
        changed = configs.typed(OmegaConf.create(OmegaConf.to_container(values)))  # type: ignore[arg-type]
    except OmegaConfBaseException as error:
        raise UserError(f"{' '.join(overrides)} is not valid: {first_line(error)}") from error
    return replace(changed, data=_with_parts(config.data, changed.data))


def _with_parts(before: dict[str, Any], after: dict[str, Any]) -> dict[str, Any]:
    """The section `data`, with a new `root` or `fetch` passed on to its parts, such as `train`.

    In the YAML file a part says `root: ${data.root}`. The run's config.yaml has the value in place of that
    reference, so a part would keep the old value. A part that has a value of its own keeps it.
    """
    parts = {}
    for part in ("train", "val", "test"):
        if not after.get(part):
            continue
        values = dict(after[part])
        for key in ("root", "fetch"):
            has_moved = key in before and before[key] != after[key]
            if has_moved and (before.get(part) or {}).get(key) == before[key]:
                values[key] = after[key]
        parts[part] = values
    return {**after, **parts}
