"""Reads a run's directory: its configuration, figures and events, without its weights or data. No torch.

A run may still be training, may have been killed, or may have been made by a later version of allranks. So
every file may be missing, half written or of unknown content. gather() returns whatever can be read. For
each file that exists but cannot be read, `RunFacts.problems` has a sentence.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from allranks.base.errors import UserError
from allranks.base.text import first_line, one_line
from allranks.config import NOT_OF_OWN_LOOPS
from allranks.run import metric_names, results
from allranks.run.best import KEY, Rule, best_of, rule_of
from allranks.run.cells import METRICS
from allranks.run.directory import CONFIG
from allranks.run.states import states_of

SUMMARY = "summary.json"
ENVIRONMENT = "environment.json"
EVENTS = "events.jsonl"
PROFILE = "profile/table.json"

# By which number the lines of metrics.jsonl are ordered, the first of these that they have. The last one is
# their own number in the file: a loop may log figures alone.
EPOCH, STEP, LINE = "epoch", "step", "line"

# The keys in NOT_OF_OWN_LOOPS that have a meaning for a loop of the user's own, and those that have one
# where the loop is reproducible.
_OF_OWN = ("trainer.log_every_steps",)
_OF_REPRODUCIBLE = ("trainer.reproducible", "trainer.virtual_ranks")


@dataclass(frozen=True)
class Rank:
    """One rank of the run's newest start."""

    number: int
    host: str
    device: str
    cpus: str  # the CPUs on which it may run, such as `0-7`; empty if they were not recorded


@dataclass(frozen=True)
class Event:
    """A line of events.jsonl: the run was stopped, or it went on from a checkpoint."""

    kind: str  # "stopped" or "resumed"
    time: str  # UTC, as ISO 8601 writes it
    step: int
    epoch: int  # completed epochs
    why: str  # for a stop, what asked for it; for a resume, the checkpoint's path
    world_size: int | None = None  # the number of ranks before the stop, or after the resume


@dataclass(frozen=True)
class RunFacts:
    """What a run's directory tells about the run. A field is empty if its file is missing or unreadable."""

    directory: Path
    state: str  # finished, running, stopped, ...; run/states.py explains them
    config: Mapping[str, Any] = field(default_factory=dict)  # every value by its dotted key
    overrides: Sequence[str] = ()  # from the command line, such as `optimizer.lr=0.1`
    # The lines of metrics.jsonl in order, mostly one for each epoch. A figure that is not finite is None.
    epochs: Sequence[Mapping[str, Any]] = ()
    summary: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    ranks: Sequence[Rank] = ()
    events: Sequence[Event] = ()  # oldest first
    # What profile/table.json holds, for a run with profile=true.
    profile: Mapping[str, Any] = field(default_factory=dict)
    problems: Sequence[str] = ()  # a sentence for each file that exists but cannot be read

    @property
    def name(self) -> str:
        """The run's name, as in `runs/NAME/...`; the directory's own if the configuration has none."""
        return str(self.config.get("name") or self.directory.name)

    @property
    def is_finished(self) -> bool:
        """Whether the run has trained to its end and has been tested."""
        return self.summary.get("state") == "finished"

    @property
    def epochs_planned(self) -> int | None:
        """How many epochs the run is to have; None if that is not known.

        A run notes it when it starts. Before, its configuration tells it, unless its loop is a program's
        own: such a configuration has no model.
        """
        noted = as_whole(self.environment.get("epochs"))
        if noted is not None or "model._target_" not in self.config:
            return noted
        return as_whole(self.config.get("trainer.epochs"))

    @property
    def world_size(self) -> int | None:
        """The number of ranks; None if that is not known."""
        return as_whole(self.summary.get("world_size", self.environment.get("world_size")))

    @cached_property
    def axis(self) -> str:
        """By which number the lines are ordered: EPOCH, STEP, or LINE."""
        return _axis(self.epochs)

    @cached_property
    def places(self) -> list[int]:
        """The number of each line on the axis."""
        if self.axis == LINE:
            return list(range(1, len(self.epochs) + 1))
        return [int(line[self.axis]) for line in self.epochs]

    @cached_property
    def ranks_of_lines(self) -> list[int | None]:
        """On how many ranks each line was measured; None if that is not known.

        A run may go on with another number of ranks. events.jsonl has this number for each resume. For the
        first start it has the number only if that start was stopped in order; if it was killed, the number
        is not known.
        """
        if not self.events:
            return [self.world_size or 1] * len(self.epochs)
        if self.axis == LINE:
            return [None] * len(self.epochs)
        first = self.events[0]
        of_first_start = first.world_size if first.kind == "stopped" else None
        resumes = [event for event in self.events if event.kind == "resumed"]
        found = []
        for place in self.places:
            ranks = of_first_start
            for event in resumes:
                done = event.epoch if self.axis == EPOCH else event.step
                if place > done:  # measured after this resume, unless a later one has repeated it
                    ranks = event.world_size
            found.append(ranks)
        return found

    @property
    def epochs_done(self) -> int | None:
        """The number of completed epochs; None in a loop that counts none."""
        return len(self.epochs) if self.axis == EPOCH else None

    @cached_property
    def metrics(self) -> list[str]:
        """The names of the metrics that the training keeps, in the order for people."""
        return metric_names.metrics_in(self.epochs)

    @property
    def rule(self) -> Rule:
        """Which epoch of the run is the best."""
        return rule_of(self.config.get(KEY))

    @property
    def best(self) -> Mapping[str, Any] | None:
        """The line of the best epoch; None if no line has the metric by which it is chosen."""
        return best_of(self.epochs, self.rule)

    @property
    def tests(self) -> dict[str, float]:
        """The figures over the test set, by name; empty if the run was not tested."""
        return metric_names.tests_in(self.summary)

    @property
    def results(self) -> dict[str, float]:
        """What a program of the user's own has found besides a test, by name."""
        return metric_names.results_in(self.summary)

    def column(self, figure: str) -> list[float | None]:
        """One figure, such as `val/loss`, in each line; None if it is missing or not finite."""
        return [line.get(figure) for line in self.epochs]

    def last(self, figure: str) -> float | None:
        """One figure in the newest line; None if there is none."""
        return self.epochs[-1].get(figure) if self.epochs else None


def gather(directory: str | Path, state: str | None = None) -> RunFacts:
    """Reads what a run's directory tells about the run. The run may still be training, or have been killed.

    `state` is the state of the run, if the caller knows it. Without it the scheduler may be asked. Raises
    UserError if the directory cannot be read, or if it holds no file of a run.
    """
    # Not resolved: `runs/latest` may be a link, and its own name is what the user typed.
    path = Path(directory).absolute()
    names = _names(path)
    if not names & {CONFIG, METRICS, SUMMARY, ENVIRONMENT}:
        raise UserError(f"{directory} holds no run: give a directory that has a config.yaml.")

    problems: list[str] = []
    if CONFIG not in names:
        problems.append(f"{CONFIG} is missing: the settings of the run are not known.")
    environment = _json_file(path / ENVIRONMENT, problems)
    return RunFacts(
        directory=path,
        state=state or states_of([path], problems.append)[path].words,
        config=_config(path / CONFIG, problems),
        overrides=_overrides(path, environment, problems),
        epochs=_epochs(path / METRICS, problems),
        summary=_json_file(path / SUMMARY, problems),
        environment=environment,
        ranks=_ranks(environment),
        events=_events(path / EVENTS, problems),
        profile=_json_file(path / PROFILE, problems),
        problems=problems,
    )


def _names(path: Path) -> set[str]:
    """The names of what is in the directory. Raises UserError if it cannot be listed."""
    try:
        return {entry.name for entry in path.iterdir()}
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): give a run's directory.") from error


# --- configuration and command line ----------------------------------------------------------------------


def _config(path: Path, problems: list[str]) -> dict[str, Any]:
    """Every value of config.yaml by its dotted key, including keys that this version does not know."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException
    from yaml import YAMLError  # type: ignore[import-untyped,unused-ignore]

    from allranks.config import below

    text = _text(path, problems)
    if text is None:
        return {}
    try:
        values = OmegaConf.to_container(OmegaConf.create(text), resolve=True)
    except (ValueError, AssertionError, RecursionError, YAMLError, OmegaConfBaseException) as error:
        problems.append(f"{path.name} cannot be read: {one_line(first_line(error))}.")
        return {}
    if not isinstance(values, dict):
        problems.append(f"{path.name} cannot be read: it holds no keys with values.")
        return {}
    config = below({str(key): value for key, value in values.items()})
    if config.get("own") is None and not any(key.startswith("own.") for key in config):
        return config
    # A loop of the user's own makes these parts itself: what stands there are defaults that nothing reads.
    read = (*_OF_OWN, *_OF_REPRODUCIBLE) if config.get("trainer.reproducible") else _OF_OWN
    return {
        key: value
        for key, value in config.items()
        if key in read or key.split(".")[0] not in NOT_OF_OWN_LOOPS
    }


def _overrides(path: Path, environment: Mapping[str, Any], problems: list[str]) -> list[str]:
    """The overrides with which the run was started; empty if there were none, or none were recorded.

    The run's job has them, or else the command line in environment.json.
    """
    try:
        noted = results.overrides_of(path)
    except (OSError, UserError) as error:
        problems.append(f"The overrides of the run's job cannot be read: {one_line(error)}")
        noted = []
    if noted:
        return noted

    command = environment.get("command")
    if not isinstance(command, list):
        return []
    words = [str(word) for word in command[1:]]
    # The ranks of `allranks launch` are started with `--frozen DIRECTORY SHA256`. The words after these
    # three are the overrides that the user gave to `allranks launch`.
    if words[:1] == ["--frozen"]:
        return words[3:]
    from allranks.compose import split_flags

    return split_flags(words)[1]


# --- records ---------------------------------------------------------------------------------------------


def _epochs(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that can be read, in the order of the epochs, or else of the steps.

    Several lines of the same epoch become one. Lines without a number are left out where others have one.
    """
    lines = []
    for about in _json_lines(path, problems):
        line: dict[str, Any] = {
            name: metric_names.as_number(value)
            for name, value in about.items()
            if name not in (EPOCH, STEP)
        }
        for name in (EPOCH, STEP):
            number = as_whole(about.get(name))
            if number is not None:
                line[name] = number
        lines.append(line)
    axis = _axis(lines)
    if axis == LINE:
        return lines
    by_number: dict[int, dict[str, Any]] = {}
    for line in lines:
        if axis in line:
            by_number.setdefault(line[axis], {}).update(line)
    left_out = sum(axis not in line for line in lines)
    if left_out:
        problems.append(f"{path.name} has {left_out} lines without a number of their {axis}.")
    return [by_number[number] for number in sorted(by_number)]


def _axis(lines: Sequence[Mapping[str, Any]]) -> str:
    """By which number these lines are ordered: EPOCH, STEP, or LINE."""
    return next(
        (name for name in (EPOCH, STEP) if any(name in line for line in lines)), LINE if lines else EPOCH
    )


def _ranks(environment: Mapping[str, Any]) -> list[Rank]:
    """The ranks that environment.json lists; none where it has no such list."""
    found = environment.get("ranks")
    return [
        Rank(
            number=as_whole(about.get("rank")) or 0,
            host=str(about.get("host", "")),
            device=str(about.get("device", "")),
            cpus=str(about.get("cpus") or ""),
        )
        for about in (found if isinstance(found, list) else [])
        if isinstance(about, dict)
    ]


def _events(path: Path, problems: list[str]) -> list[Event]:
    """The interruptions and resumes of the run, oldest first."""
    return [
        Event(
            kind=str(about.get("event")),
            time=str(about.get("time", "")),
            step=as_whole(about.get("step")) or 0,
            epoch=as_whole(about.get("epoch")) or 0,
            why=str(about.get("why", "")),
            world_size=as_whole(about.get("world_size")),
        )
        for about in _json_lines(path, problems)
    ]


# --- files that may hold anything ------------------------------------------------------------------------


def _text(path: Path, problems: list[str]) -> str | None:
    """What a file holds; None if it is missing or cannot be read."""
    try:
        return path.read_text(errors="replace")
    except FileNotFoundError:
        return None
    except OSError as error:
        problems.append(f"{path.name} cannot be read: {error.strerror}.")
        return None


def _json_file(path: Path, problems: list[str]) -> dict[str, Any]:
    """The JSON object in a file; empty if it is missing or cannot be read."""
    text = _text(path, problems)
    if text is None:
        return {}
    found = _json_object(text)
    if found is None:
        problems.append(f"{path.name} cannot be read: it is not a JSON object.")
    return found or {}


def _json_lines(path: Path, problems: list[str]) -> list[dict[str, Any]]:
    """The JSON objects in a file that has one on each line.

    A line that is not a JSON object is left out. One sentence in `problems` gives the numbers of all such
    lines.
    """
    lines = (_text(path, problems) or "").split("\n")
    # A run at work may have written half of its newest line. Only what ends in a line feed is a whole line.
    whole_lines = [line for line in lines[:-1] if line.strip()]
    objects = [_json_object(line) for line in whole_lines]
    unreadable = [number for number, found in enumerate(objects, start=1) if found is None]
    if unreadable:
        which = "line" if len(unreadable) == 1 else "lines"
        numbers = ", ".join(map(str, unreadable[:5])) + (", ..." if len(unreadable) > 5 else "")
        problems.append(f"{path.name} cannot be read in {which} {numbers}: not a JSON object.")
    return [found for found in objects if found is not None]


def _json_object(text: str) -> dict[str, Any] | None:
    """The JSON object in a text; None if the text is something else."""
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def as_whole(value: object) -> int | None:
    """The value if it is a whole number that is not negative, else None."""
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else None
