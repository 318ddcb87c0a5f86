"""A machine is one YAML in conf/machine/: found, checked and given types here. No torch.

What each key means stands beside its field here; docs/machines.md tells it with examples.
"""

from __future__ import annotations

import fnmatch
import io
import os
import re
import socket
import typing
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from allranks.base import schema
from allranks.base.errors import UserError
from allranks.base.schema import Written, setting, whole
from allranks.base.text import did_you_mean, one_line
from allranks.config import conf_dir
from allranks.job import scheduler

Launcher = Literal["auto", "mpiexec", "srun", "flux", "torchrun"]
LAUNCHERS = typing.get_args(Launcher)


@dataclass(frozen=True)
class Detect:
    """How the machine is known: patterns of its hosts' short names, or variables of its shells."""

    hosts: tuple[str, ...] = ()
    variables: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Node:
    """What one node has. None stands for what is not known; then the job's allocation has to tell."""

    devices: int | None = setting(
        None, "GPUs, or parts of GPUs that count as devices of their own", whole(0)
    )
    ranks: int | None = setting(None, "ranks; null: one for each device", whole(1))
    cpus: int | None = setting(None, "CPUs, as the launcher counts them", whole(1))
    cpus_per_rank: int | None = setting(None, "CPUs of each rank", whole(1))
    cpu_list: tuple[str, ...] = ()  # the CPUs of local rank 0, 1, ...
    bind: Literal["none", "list", "depth"] = "none"  # to cpu_list; or cpus_per_rank each, in a row

    @property
    def ranks_per_node(self) -> int | None:
        """How many ranks a node gets if the user does not say; None if that is not known."""
        return self.ranks or self.devices


@dataclass(frozen=True)
class Device:
    """`order[r]` is the device of local rank r, to which each rank's `variable` is set, if any."""

    variable: str | None = None
    order: tuple[int, ...] = ()
    one_visible: bool = False  # the launcher itself shows each rank only its own device


@dataclass(frozen=True)
class Variable:
    """An environment variable for every rank, on this condition, unless its switch is off."""

    value: str  # {uid} in it becomes the user's number
    when: Literal["always", "one_node", "several_nodes"] = "always"
    switch: str | None = None
    prepend: bool = False  # put before what is there, with a colon
    why: str = ""

    @classmethod
    def from_short(cls, value: Any) -> dict[str, Any]:
        """A variable may be written `NAME: VALUE`, without keys."""
        return {"value": value}


@dataclass(frozen=True)
class Options:
    """More arguments for each launcher."""

    mpiexec: tuple[str, ...] = ()
    srun: tuple[str, ...] = ()
    flux: tuple[str, ...] = ()  # of `flux run`
    torchrun: tuple[str, ...] = ()
    name_hosts: bool = True  # false: mpiexec must not be told the hosts, and asks the scheduler itself


@dataclass(frozen=True)
class Limit:
    """How long a job of so many nodes may run."""

    min_nodes: int = 1
    max_nodes: int | None = None
    max_hours: float | None = None


@dataclass(frozen=True)
class Queue:
    """What a queue (PBS), a partition or a QOS (Slurm) takes."""

    limits: tuple[Limit, ...] = ()
    option: str | None = None  # null: submit.queue_option
    ranks_per_chunk: int | None = None  # where a chunk is not a node
    jobs_per_user: int | None = setting(
        None, "jobs that a user may have in it at a time, waiting ones too", whole(1)
    )
    options: tuple[str, ...] = ()  # more options of the scheduler for a job in this queue


@dataclass(frozen=True)
class Submit:
    """What a job script needs on this machine."""

    required: tuple[str, ...] = ()
    options: tuple[str, ...] = ()
    chunk: str = ""  # PBS: what follows `select=K`; {ranks} and {cpus} of a node are filled in
    # PBS, in place of `select`: resources of the whole job, each after `-l`; {ranks}, {cpus} of all nodes
    resources: tuple[str, ...] = ()
    queue_option: str = "-q"
    account_option: str = "-A"
    min_minutes: float | None = None  # no queue takes a job that asks for less time


@dataclass(frozen=True)
class Machine:
    """Everything that a machine file says."""

    name: str
    scheduler: Literal["pbs", "slurm", "local"]
    about: str = ""
    launcher: Launcher = "auto"
    mpiexec: Literal["auto", "hydra", "pals", "openmpi"] = "auto"
    detect: Detect = field(default_factory=Detect)
    node: Node = field(default_factory=Node)
    device: Device = field(default_factory=Device)
    options: Options = field(default_factory=Options)
    master_suffix: str = ""  # rank 0's short host name with this is an address that every node reaches
    variables: dict[str, Variable] = field(default_factory=dict)
    switches: dict[str, bool] = field(default_factory=dict)
    setup: tuple[str, ...] = ()  # shell lines of a job script, before anything else
    filesystems: tuple[str, ...] = ()  # PBS: `-l filesystems=a:b`
    storage: tuple[str, ...] = ()  # PBS at NCI: `-l storage=a+b`
    queue: str | None = None
    queues: dict[str, Queue] = field(default_factory=dict)
    submit: Submit = field(default_factory=Submit)
    overridden: tuple[str, ...] = ()  # the keys that the user set on the command line

    def active_variables(self, nodes: int) -> dict[str, Variable]:
        """The variables that hold on so many nodes with the switches as they are."""
        now = ("always", "several_nodes" if nodes > 1 else "one_node")
        return {
            name: variable
            for name, variable in self.variables.items()
            if variable.when in now and (not variable.switch or self.switches[variable.switch])
        }


def load(
    name: str | None = None,
    overrides: Sequence[str] = (),
    config_dir: str | Path | None = None,
    hostname: str | None = None,
    environ: Mapping[str, str] | None = None,
) -> Machine:
    """The machine `name`, or the one that this host belongs to, with `machine.key=value` overrides.

    `config_dir` may hold machine/NAME.yaml of the user's own, which go before the shipped ones.
    Raises UserError naming file, key, value and remedy.
    """
    files = _files(config_dir)
    given = _overrides(overrides)
    if name is None:
        name = _detect(files, hostname or socket.gethostname(), environ).name
    if name not in files:
        raise UserError(
            f"machine={name} is not known: {', '.join(sorted(files))}.{did_you_mean(name, files)} "
            "docs/machines.md shows how to add one."
        )
    tree = _yaml(files[name])
    for key, value in given.items():
        _put(tree, key.split("."), value)
    _refuse_ours(tree, name)
    machine = schema.build(Machine, {**tree, "name": name, "overridden": tuple(given)}, _source(name))
    _check(machine)
    return machine


class Detected(NamedTuple):
    """The machine that this host belongs to."""

    name: str
    known_by: str  # what has decided it, in words


def detect(hostname: str | None = None, environ: Mapping[str, str] | None = None) -> Detected:
    """The machine that load() takes for this host where none is named, and what has decided it."""
    return _detect(_files(None), hostname or socket.gethostname(), environ)


def _refuse_ours(tree: Mapping[str, Any], name: str) -> None:
    """Raises UserError if a machine file or an override sets `name` to another name, or sets `overridden`.

    allranks sets both itself, so such a value would have no effect.
    """
    if str(tree.get("name", name)) != name:
        raise UserError(
            f"machine.name={tree['name']} ({name}) is not valid: a machine has the name of its file. Take "
            "another machine with --machine NAME."
        )
    if "overridden" in tree:
        raise UserError(f"machine.overridden ({name}) is not a key of a machine: leave it out.")


def available(config_dir: str | Path | None = None) -> list[str]:
    """The names that can be given, the user's own included."""
    return sorted(_files(config_dir))


def check_queue(
    machine: Machine,
    queue: str,
    nodes: int,
    hours: float | None = None,
    jobs: int = 1,
    is_sweep: bool = False,
) -> None:
    """Raises UserError if the queue does not take such a job.

    `nodes` is the number of nodes (or of chunks, where the queue deals in those), `hours` the walltime if
    it is given, `jobs` how many jobs are queued at a time: those of a chain or, if it `is_sweep`, of an
    array. A queue that the machine file does not list is left to the scheduler.
    """
    least = machine.submit.min_minutes
    if hours is not None and least is not None and hours * 60 < least:
        raise UserError(
            f"walltime={hours * 60:g} min is too short for {machine.name}, where a job asks for at "
            f"least {least:g} min: give a longer --walltime."
        )
    if queue not in machine.queues:
        return
    most_jobs = machine.queues[queue].jobs_per_user
    if most_jobs is not None and jobs > most_jobs:
        others = _queues_that_take(machine, nodes, jobs)
        asked, instead = f"--chain {jobs}", "leave --chain out"
        if is_sweep:
            asked, instead = f"A sweep of {jobs} cells", "submit fewer cells"
        raise UserError(
            f"{asked} does not fit queue {queue} of {machine.name}, which takes {most_jobs} "
            f"job{'s' * (most_jobs > 1)} of a user at a time, waiting ones too: {instead}, or "
            f"change --queue.{others}"
        )
    limits = machine.queues[queue].limits
    fitting = [n for n in limits if n.min_nodes <= nodes <= (n.max_nodes or nodes)]
    if limits and not fitting:
        taken = ", ".join(f"{n.min_nodes} to {n.max_nodes or 'all'}" for n in limits)
        raise UserError(
            f"nodes={nodes} does not fit queue {queue} of {machine.name}, which takes {taken}: "
            f"change --nodes or --queue.{_queues_that_take(machine, nodes, jobs)}"
        )
    hours_of = [n.max_hours for n in fitting]
    known = [most for most in hours_of if most is not None]
    # If several limits fit, the most generous one holds. One without max_hours allows any time.
    longest = max(known) if known and len(known) == len(hours_of) else None
    if hours is not None and longest is not None and hours > longest:
        raise UserError(
            f"walltime={hours:g} h is too long for {nodes} nodes in queue {queue} of "
            f"{machine.name}, where a job may run {longest:g} h: "
            "give a shorter --walltime or another --queue."
        )


def _queues_that_take(machine: Machine, nodes: int, jobs: int) -> str:
    """A sentence that names the queues whose limits such jobs fit; nothing if none is known to."""
    fit = [
        name
        for name, queue in machine.queues.items()
        if any(n.min_nodes <= nodes <= (n.max_nodes or nodes) for n in queue.limits)
        and jobs <= (queue.jobs_per_user or jobs)
    ]
    what = f"{nodes}" if jobs == 1 else f"{jobs} jobs"
    return f" These take {what}: {', '.join(fit)}." if fit else ""


# --- finding and reading -------------------------------------------------------------------------


def _source(name: str) -> schema.Origin:
    return schema.Origin("machine.", name, "a machine")


def _files(config_dir: str | Path | None) -> dict[str, Path]:
    """The machine files by their names; a user's own one goes before a shipped one of the same name."""
    folders = [conf_dir() / "machine"]
    if config_dir is not None:
        own = Path(config_dir).expanduser()
        if not own.is_dir():
            raise UserError(
                f"--config-dir {config_dir} is no folder: put your YAML into DIR/machine/NAME.yaml."
            )
        folders.insert(0, own / "machine")
    files: dict[str, Path] = {}
    for folder in folders:
        for path in sorted(folder.glob("*.yaml")):
            files.setdefault(path.stem, path)
    return files


def _detect(files: Mapping[str, Path], hostname: str, environ: Mapping[str, str] | None) -> Detected:
    """The machine to which this host belongs, by the `detect` section of each machine file."""
    environ = os.environ if environ is None else environ
    host = hostname.partition(".")[0]
    for name in files:
        detect = schema.build(Detect, _yaml(files[name]).get("detect") or {}, _source(name), "detect")
        if any(fnmatch.fnmatchcase(host, pattern) for pattern in detect.hosts):
            return Detected(name, "chosen by host name")
        for variable, value in detect.variables.items():
            if environ.get(variable) == value:
                return Detected(name, f"chosen by {variable}={value}")
    kind = scheduler.here(environ)
    if kind:
        return Detected(
            f"generic_{kind.name}", f"no machine file is of this host, in a job of {kind.title}"
        )
    return Detected("local", "no machine file is of this host, in no job")


def _yaml(path: Path) -> dict[str, Any]:
    """The keys and values of a machine file. Raises UserError if it is no such YAML."""
    import yaml  # type: ignore[import-untyped,unused-ignore]
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        text = path.read_text("utf-8")
        tree = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
        root = yaml.compose(text, yaml.SafeLoader)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} cannot be read as YAML: byte {error.start + 1} is not UTF-8. Save the file as UTF-8, "
            "or leave out accents and other special characters."
        ) from error
    except (OSError, yaml.YAMLError, OmegaConfBaseException) as error:
        raise UserError(f"{path} cannot be read as YAML: {one_line(error)}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no keys: write `key: value` lines.")
    written = _as_written(tree, root)
    return {str(key): value for key, value in written.items()}


def _as_written(value: Any, node: Any) -> Any:
    """The value with each number, true and false in it as a schema.Written, where it reads otherwise.

    `node` is what yaml.compose() gives for the same text: it has the words themselves. So a variable may be
    022, 12:30 or `on`, of which YAML makes 18, 750 and true.
    """
    from yaml import MappingNode, ScalarNode, SequenceNode

    if isinstance(node, ScalarNode):
        was_read = isinstance(value, int | float)  # true and false are numbers here, too
        return Written(value, node.value) if was_read and str(value) != node.value else value
    if isinstance(node, SequenceNode) and isinstance(value, list):
        return [_as_written(item, at) for item, at in zip(value, node.value, strict=True)]
    if isinstance(node, MappingNode) and isinstance(value, dict):
        nodes = {key.value: at for key, at in node.value}
        return {key: _as_written(item, nodes.get(str(key))) for key, item in value.items()}
    return value


def _overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """{key without `machine.`: value}, values being read as YAML."""
    import yaml
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    given: dict[str, Any] = {}
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not key.startswith("machine.") or key.endswith("."):
            raise UserError(f"{override} is not an override: write machine.key=value.")
        try:
            read = OmegaConf.to_container(OmegaConf.from_dotlist([f"value={text}"]), resolve=False)
            node = yaml.compose(text, yaml.SafeLoader)
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise UserError(f"{override}: the value cannot be read as YAML; quote it.") from error
        assert isinstance(read, dict)
        # Nothing after `=` is the empty text where a text is expected, as in a shell.
        value = _as_written(read["value"], node) if text else Written(None, "")
        given[key.removeprefix("machine.")] = value
    return given


def _put(tree: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    """Sets the value below these keys; sections on the way that are not there yet are made."""
    for key in keys[:-1]:
        inner = tree.get(key)
        if not isinstance(inner, dict):  # a variable written short, or nothing yet
            inner = {} if inner is None else {"value": inner}
            tree[key] = inner
        tree = inner
    tree[keys[-1]] = value


# --- checks across fields ------------------------------------------------------------------------


def _check(machine: Machine) -> None:
    """Raises UserError if values of several keys do not fit together."""
    source = _source(machine.name)
    for name, variable in machine.variables.items():
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise source.invalid("variables", name, "names of letters, digits and _")
        if variable.switch is not None and variable.switch not in machine.switches:
            raise UserError(
                f"machine.variables.{name}.switch={variable.switch} ({machine.name}) "
                f"has no switch: add `switches: {{{variable.switch}: true}}`."
            )
    used = {variable.switch for variable in machine.variables.values()} - {None}
    for switch in machine.switches:
        if switch not in used:
            near = did_you_mean(switch, sorted(map(str, used)))
            raise UserError(f"machine.switches.{switch} ({machine.name}) switches no variable.{near}")
    node, order = machine.node, machine.device.order
    if (node.bind == "list" and not node.cpu_list) or (node.bind == "depth" and not node.cpus_per_rank):
        needed = "cpu_list" if node.bind == "list" else "cpus_per_rank"
        raise UserError(f"machine.node.bind={node.bind} ({machine.name}) needs node.{needed}.")
    for key, templates in (("chunk", (machine.submit.chunk,)), ("resources", machine.submit.resources)):
        for template in templates:
            if not _can_be_filled(template):
                remedy = "a text with {ranks} and {cpus}, and {{ or }} for a brace itself"
                raise source.invalid(f"submit.{key}", template, remedy)
    for cpus in node.cpu_list:
        if not _are_cpus(cpus):
            raise source.invalid(
                "node.cpu_list", list(node.cpu_list), "CPUs like '0-7' or '0-3,8' for each rank"
            )
    if order and sorted(order) != list(range(len(order))):
        raise source.invalid("device.order", list(order), f"each of 0 to {len(order) - 1} once")


def _can_be_filled(template: str) -> bool:
    """Whether the numbers of ranks and of CPUs can be put into a text, at {ranks} and {cpus}."""
    try:
        template.format(ranks=1, cpus=1)
    except (ValueError, LookupError, AttributeError, TypeError):
        return False
    return True


def _are_cpus(text: str) -> bool:
    """Whether these are the CPUs of a rank: numbers and ranges from low to high, with commas between."""
    for span in text.split(","):
        match = re.fullmatch("([0-9]{1,5})(?:-([0-9]{1,5}))?", span)
        if match is None or int(match[1]) > int(match[2] or match[1]):
            return False
    return True
