"""`allranks train --debug`: the first steps of a training, with every option on that shows what they do.

It is an ordinary run with the settings below, in one process, and in a directory of its own
(`runs/debug-NAME/`), so that nobody takes it for a result. At the end it prints a summary of what was
measured, and names the files that hold more. No torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from allranks.base.errors import UserError
from allranks.compose import from_command_line, key_of
from allranks.config import Config, RunConfig
from allranks.run import directory as rundir

# The whole command is to take less than 10 s on two cores. Importing torch takes 2 s of that.
_STEPS = 20  # of which 10 to 20 are profiled


class _Few(NamedTuple):
    """How much a debug run does with a slow model, where the command line does not say it."""

    steps: int
    evaluated: int  # examples in each of the two evaluations


# A step of this model takes 2.5 s on two cores, so the second one is profiled. An evaluation of 100
# examples takes half a second.
_SLOW_MODELS = {"allranks.models.resnet18": _Few(steps=2, evaluated=20)}

# If the command line sets one of these keys too, the value of the command line counts.
OVERRIDES = (
    f"trainer.max_steps={_STEPS}",
    "trainer.train_metrics=running",  # no pass over all training examples
    "trainer.limit_eval=100",  # how good the model is after so few steps is not the question
    "trainer.log_every_steps=1",
    "trainer.detect_anomaly=true",
    "profile=true",
    "report=false",  # a page about 20 steps takes longer than they do
)
_SHOWN_OPERATIONS = 3
_GIB = 2**30


def configurations(arguments: Sequence[str], is_alone: bool) -> list[Config]:
    """The training to debug, from the command line's arguments; none after --help. Raises UserError.

    `is_alone`: no launcher has started other ranks beside this process.
    """
    if not is_alone:
        raise UserError("--debug is for one process: leave the launcher out, or leave --debug out.")
    others = [argument for argument in arguments if argument != "--debug"]
    configs = from_command_line([*OVERRIDES, *others])
    if len(configs) > 1:
        raise UserError("--debug is for one training: leave out -m, and give one value for each key.")
    if not configs:
        return []
    config = replace(configs[0], name=f"debug-{configs[0].name}")
    few = _SLOW_MODELS.get(str(config.model["_target_"]))
    if few is not None:
        typed = {key_of(word) for word in others}
        trainer = config.trainer
        if "trainer.max_steps" not in typed:
            trainer = replace(trainer, max_steps=few.steps)
        if "trainer.limit_eval" not in typed:
            trainer = replace(trainer, limit_eval=few.evaluated)
        config = replace(config, trainer=trainer)
    directory = config.run.dir or rundir.choose(None, config.name)
    return [replace(config, run=RunConfig(directory))]


def seen(directory: str) -> str:
    """What a debugged run has shown, in a few lines, and the files that hold more."""
    path = Path(directory)
    steps = _records(path / "metrics-steps.jsonl")
    [*_, epoch] = _records(path / "metrics.jsonl")
    profile = path / "profile"
    table = profile / "table.json"
    trace = profile / "rank-0.json.gz"

    # The command line may have asked for no single steps (trainer.log_every_steps), or for no profile.
    lines = []
    if steps:
        first, last = steps[0], steps[-1]
        lines.append(
            f"loss      {_number(first['step/loss'])} in step {first['step']}, "
            f"{_number(last['step/loss'])} in step {last['step']}"
        )
    lines += [
        f"speed     {epoch['throughput/samples_per_s']:,.0f} examples/s while all of this was looked at"
        + _flops(epoch),
        f"memory    {_memory(epoch)}",
    ]
    if table.exists():
        lines.append(f"time      {_time(json.loads(table.read_text()))}")
    if steps:
        lines.append(f"each step           {path / 'metrics-steps.jsonl'}")
    if table.exists():
        lines.append(f"each operation      {profile / 'table.md'}")
    if trace.exists():
        lines.append(f"what ran when       {trace}, for https://ui.perfetto.dev")
    return "\n".join(["seen in this debug run:", *(f"  {line}" for line in lines)])


def _records(path: Path) -> list[dict[str, Any]]:
    """The records of a file with one on each line; none where there is no such file."""
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines()]


def _number(value: float | None) -> str:
    return "not finite" if value is None else f"{value:.4f}"


def _flops(epoch: Mapping[str, Any]) -> str:
    flops = epoch.get("throughput/model_flops_per_s")
    return "" if flops is None else f", {flops / 1e9:.3g} GFLOP/s"


def _memory(epoch: Mapping[str, Any]) -> str:
    text = f"{epoch['memory/process_peak_bytes'] / _GIB:.2f} GiB of the process at most"
    device = epoch.get("memory/device_peak_bytes")
    return text if device is None else f"{text}, {device / _GIB:.2f} GiB of the device"


def _time(table: Mapping[str, Any]) -> str:
    """The parts of a step and the longest operations, as shares of a step's time."""
    parts = {name: part["cpu_ms"] for name, part in table["parts"].items()}
    whole_ms = sum(parts.values()) or 1.0
    shares = [f"{name} {100 * ms / whole_ms:.0f} %" for name, ms in parts.items()]
    longest = [f"{row['name']} {100 * row['share']:.0f} %" for row in table["rows"][:_SHOWN_OPERATIONS]]
    return f"{', '.join(shares)}; most of it in {', '.join(longest)}"
