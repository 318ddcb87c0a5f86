"""Loss and metrics, added up on the device, and over the ranks only when they are asked for.

Reading a number from a GPU makes the processor wait for it. So nothing is read after each step: the sums
stay on the device until the end of an epoch, and then cross the ranks in one message.

A metric that is not a mean, such as an AUROC, is measured by objects of torchmetrics. Each rank's object
keeps a state of its own. At the end of an evaluation all ranks send each other these states, and every rank
computes the metric from all of them, as if one object had seen all examples. If states cannot be put
together exactly, the ranks send each other what the objects were given. torchmetrics itself is not imported
here.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Mapping, Sequence
from math import prod
from typing import Any, NamedTuple

import torch

from allranks.base.errors import ANYONE, UserError
from allranks.base.text import one_line
from allranks.data import nests
from allranks.runtime.runtime import Runtime
from allranks.tasks import Mean

_LOOK_AT_THE_TASK = "look at its values, and at what the task gives it"  # a remedy


class Column(NamedTuple):
    """A metric of a task that is a sum."""

    name: str
    has_weight: bool  # whether it comes with the number that it is divided by
    shown: str  # "mean", "percent" or "exp"


class Figures(NamedTuple):
    """How well a model does on some examples of all ranks."""

    values: Mapping[str, float]  # `loss`, the mean over the examples, and the task's metrics by name
    examples: int  # how many they are

    @property
    def loss(self) -> float:
        """The mean loss over the examples."""
        return self.values["loss"]

    def named(self, part: str) -> dict[str, float]:
        """The values under the names that records have them by: `val/loss` for the part `val`."""
        return {f"{part}/{name}": value for name, value in self.values.items()}


def columns_of(task: Any, measured: Mapping[str, Any]) -> list[Column]:
    """Which sums there are among what a task's metrics() gave for some examples.

    Raises UserError if it is not as allranks.tasks describes it.
    """
    objects = objects_of(task)
    columns = []
    for name, value in measured.items():
        if name == "loss":
            raise UserError("metrics() of the task gives `loss`, which is recorded already: rename it.")
        # Names are printed in tables, and stand in CSV files and in pages: a line end would break these.
        if not str(name).isprintable():
            raise UserError(
                f"metrics() of the task gives {name!r}, a name with a character that cannot be printed: "
                "rename it."
            )
        if name in objects:
            if not isinstance(value, tuple):
                raise UserError(
                    f"metrics() of the task gives {name} as a {type(value).__name__}, but "
                    "task.torchmetrics has an object of this name: give the arguments of its update() as a "
                    "tuple."
                )
            continue
        mean = value if isinstance(value, Mean) else Mean(value)
        if not is_one_number(mean.total) or not (mean.weight is None or is_one_number(mean.weight)):
            raise UserError(
                f"metrics() of the task gives {name} as {_told(value)}, but a metric is one number, the "
                "sum over the examples of the batch, or an allranks.tasks.Mean."
            )
        columns.append(Column(name, mean.weight is not None, mean.shown))
    if missing := sorted(set(objects) - set(measured)):
        raise UserError(
            f"metrics() of the task does not give {', '.join(missing)}, of which task.torchmetrics has an "
            "object: give the arguments of its update() as a tuple."
        )
    return columns


def objects_of(task: Any) -> Mapping[str, Any]:
    """The torchmetrics objects of a task, by name."""
    objects = getattr(task, "torchmetrics", None) or {}
    for name, metric in objects.items():
        problem = problem_of(metric)
        if problem:
            raise UserError(
                f"task.torchmetrics.{name} is {problem}: give the _target_ of a metric of torchmetrics, or "
                "of a class derived from torchmetrics.Metric."
            )
    return dict(objects)


def problem_of(metric: Any) -> str:
    """What is wrong with an object that should be a metric of torchmetrics, in words that follow `NAME is`.

    Returns "" if nothing is wrong.
    """
    if isinstance(metric, type):
        return f"the class {metric.__name__}, and no object of it"
    kind = f"a {type(metric).__name__}"
    if not all(hasattr(metric, each) for each in ("update", "compute", "reset", "children")):
        return kind
    # If an object holds other metrics, its own state does not tell what these have seen.
    if any(hasattr(inner, "_reductions") for inner in metric.children()):
        return f"{kind}, which holds other metrics, of which each is to be given by itself"
    return "" if getattr(metric, "_reductions", None) else f"{kind} without a state of its own"


def is_one_number(value: Any) -> bool:
    """Whether this is a number, or a tensor of one."""
    if isinstance(value, torch.Tensor):
        return value.numel() == 1
    return isinstance(value, int | float)


def _scalar(value: torch.Tensor | float) -> torch.Tensor | float:
    """The one number without dimensions: torch adds no tensor of shape [1] to one of shape []."""
    return value.reshape(()) if isinstance(value, torch.Tensor) else value


def _told(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"a tensor of shape {list(value.shape)}"
    return f"a {type(value).__name__}"


class Sums:
    """Sums of the loss, of a task's metrics and of the examples, in float64, on the device.

    `rows` [shares of this rank, columns] has a row for each share that this rank takes of a batch: the
    summed loss, one or two numbers for each metric, and the number of examples. Checkpoints hold these
    rows. They are kept apart so that total() can add them in the order of the shares, whichever rank had
    which share.

    columns: the task's metrics that are sums; objects: torchmetrics objects by name, which are copied.
    """

    def __init__(
        self, runtime: Runtime, columns: Sequence[Column], objects: Mapping[str, Any] | None = None
    ) -> None:
        self.columns = tuple(columns)
        width = 2 + sum(1 + column.has_weight for column in columns)
        self.rows = torch.zeros(len(runtime.shares), width, dtype=runtime.sum_dtype, device=runtime.device)
        # By name, for each share of this rank.
        self.objects = {name: seeing_shares(metric, runtime) for name, metric in (objects or {}).items()}

    @torch.no_grad()
    def add(self, row: int, loss_sum: torch.Tensor, length: int, measured: Mapping[str, Any]) -> None:
        """Adds some examples of this rank's share number `row`.

        loss_sum: a scalar, the sum over the `length` examples; measured: what the task's metrics() gave.
        """
        for name in (*(column.name for column in self.columns), *self.objects):
            if name not in measured:
                raise UserError(
                    f"metrics() of the task does not give {name} for this batch, but did for the first "
                    "one: it must give the same names for each."
                )
        sums = self.rows[row]
        sums[0] += loss_sum
        at = 1
        for column in self.columns:
            value = measured[column.name]
            mean = value if isinstance(value, Mean) else Mean(value)
            sums[at] += _scalar(mean.total)
            at += 1
            if column.has_weight:
                assert mean.weight is not None
                sums[at] += _scalar(mean.weight)
                at += 1
        sums[at] += length
        for name, of_shares in self.objects.items():
            of_shares[row].update(*measured[name])

    def total(self, runtime: Runtime) -> Figures:
        """Figures over all ranks' examples; all ranks call. Of no examples all figures are 0.

        All rows are brought together before they are added, so that the order of the additions is that of
        the shares.
        """
        figures = figures_of(runtime.gather(self.rows).sum(dim=0).tolist(), self.columns)
        values = dict(figures.values)
        for name, of_shares in self.objects.items():
            if figures.examples:
                called = f"task.torchmetrics.{name}"
                value = computed(merged(of_shares, runtime), called, _LOOK_AT_THE_TASK)
                values |= _numbers(name, value)
            else:
                values[name] = 0.0
        return Figures(values, figures.examples)


def figures_of(total: Sequence[float], columns: Sequence[Column]) -> Figures:
    """The figures that a row of Sums stands for: loss, metrics, examples."""
    examples = total[-1]
    divisor = max(examples, 1)
    values = {"loss": total[0] / divisor}
    at = 1
    for column in columns:
        value = total[at]
        at += 1
        count = divisor
        if column.has_weight:
            count = total[at] or 1  # 0 where no example had a weight: the mean is shown as 0
            at += 1
        values[column.name] = _shown(value, count, column.shown)
    return Figures(values, round(examples))


def _shown(total: float, count: float, shown: str) -> float:
    if shown == "percent":
        return 100 * total / count
    if shown == "exp":
        mean = total / count
        if mean > 700:  # math.exp raises an error beyond 709
            return math.inf
        return math.exp(mean)  # of NaN it is NaN
    return total / count


# --- metrics that are not means --------------------------------------------------------------------------


def _anew(metric: Any, device: torch.device) -> Any:
    """A copy of the object that has seen nothing yet, on the device."""
    made = copy.deepcopy(metric).to(device)
    made.reset()
    return made


# How torchmetrics puts the states of several objects together so that the result is exact.
_EXACT = {"dim_zero_sum", "dim_zero_cat", "dim_zero_max", "dim_zero_min"}


def seeing(metric: Any, device: torch.device) -> Any:
    """The object that an evaluation's examples are given to: a fresh copy of the metric, or an _Inputs."""
    for name, reduction in metric._reductions.items():
        is_list = isinstance(metric._defaults[name], list)
        if getattr(reduction, "__name__", "") not in _EXACT and not (is_list and reduction is None):
            return _Inputs(_anew(metric, device))
    return _anew(metric, device)


def seeing_shares(metric: Any, runtime: Runtime) -> list[Any]:
    """An object for each share that this rank takes of a batch: what merged() puts together.

    As a rule a rank has one share. Those of a reproducible run are kept apart, so that their states are put
    together in the order of the shares, whichever rank had which share.
    """
    return [seeing(metric, runtime.device) for _ in runtime.shares]


_NAMED = "named_"  # the beginning of the names of lists that hold arguments with a keyword


class _Inputs:
    """Stands for a metric whose states cannot be put together exactly: it keeps what the metric is given.

    torchmetrics' correlation coefficients keep the mean and the variance of what they have seen, and fail
    where all targets of one object are equal. A mean of means is not the mean of all examples. Such a
    metric sees the batches of all ranks at the end of the evaluation, on every rank.

    It has the attributes of a torchmetrics object that merged() uses.
    """

    def __init__(self, metric: Any) -> None:
        self._metric = metric
        self._reductions: dict[str, None] = {}  # has the names of the lists that follow
        self._update_count = 0

    def update(self, *arguments: Any, **named: Any) -> None:
        """Keeps the arguments, which must be tensors; raises UserError."""
        given = {f"argument_{number}": argument for number, argument in enumerate(arguments)}
        given |= {_NAMED + name: argument for name, argument in named.items()}
        for name, argument in given.items():
            if not isinstance(argument, torch.Tensor):
                raise UserError(
                    f"{type(self._metric).__name__} keeps a state that cannot be put together exactly over "
                    f"the ranks, and is given {nests.described(argument)}: take a metric that keeps sums, "
                    "or give it tensors.",
                    said_by=ANYONE,  # a rank that has no examples gives it nothing
                )
            if name not in self._reductions:
                self._reductions[name] = None
                setattr(self, name, [])
            getattr(self, name).append(argument.detach())
        self._update_count += 1

    def seen_by_all(self, states: Sequence[State]) -> Any:
        """The metric after it has seen the batches of all ranks."""
        whole = copy.deepcopy(self._metric)
        for state in states:
            for batch in zip(*state.values(), strict=True):
                given = dict(zip(state, batch, strict=True))
                named = {
                    name.removeprefix(_NAMED): given.pop(name) for name in state if name.startswith(_NAMED)
                }
                whole.update(*given.values(), **named)
        whole._to_sync = False  # else compute() would gather over the ranks once more
        return whole


State = dict[str, list[torch.Tensor]]  # of a metric: a tensor, or several where it is a list, by name


def merged(of_shares: Sequence[Any], runtime: Runtime) -> Any:
    """A copy of an object as if it had seen the examples of all ranks; all ranks call.

    `of_shares` are the objects of this rank, one for each of its shares. One that has seen no example takes
    no part: its state is as reset() leaves it, and torchmetrics would count it like the others. Raises
    UserError if the objects' states cannot be put together.
    """
    states = [state for state in _states_of_all_shares(of_shares, runtime) if state]
    metric = of_shares[0]
    whole = copy.copy(metric)
    if isinstance(metric, _Inputs):
        return metric.seen_by_all(states)
    for name, reduction in metric._reductions.items():
        tensors = [tensor for state in states for tensor in state[name]]
        if isinstance(metric._defaults[name], list):
            value = reduction(tensors) if tensors and reduction else tensors
        else:
            value = reduction(torch.stack(tensors))
        setattr(whole, name, value)
    whole._to_sync = False  # else compute() would gather by itself what is gathered already
    whole._update_count = max(1, metric._update_count)  # else compute() warns where this rank saw nothing
    whole._computed = None
    return whole


def _states_of_all_shares(of_shares: Sequence[Any], runtime: Runtime) -> list[State]:
    """The states of these objects on all ranks, in the order of the shares; empty for one that saw nothing.

    What each rank sends is its states as bytes, after a description of them in JSON. All ranks send as many
    bytes as the one that has the most.
    """
    mine = [_state_of(metric) for metric in of_shares]
    if runtime.world_size == 1:
        return mine
    content = _as_bytes(mine).to(runtime.device)
    lengths = runtime.gather(torch.tensor([[len(content)]], device=runtime.device)).flatten().tolist()
    row = torch.zeros(1, max(lengths), dtype=torch.uint8, device=runtime.device)
    row[0, : len(content)] = content
    return [state for of_rank in runtime.gather(row) for state in _from_bytes(of_rank)]


def _state_of(metric: Any) -> State:
    """The state of an object; empty if it has seen nothing."""
    state: State = {}
    if not metric._update_count:
        return state
    for name in metric._reductions:
        value = getattr(metric, name)
        state[name] = [each.detach() for each in (value if isinstance(value, list) else [value])]
    return state


_HEAD_BYTES = 8  # they hold the length of the JSON text that follows


def _as_bytes(states: Sequence[State]) -> torch.Tensor:
    """The states as a tensor of bytes: the length of a JSON text, the text, and the numbers."""
    text = json.dumps([_outline_of(state) for state in states]).encode()
    head = bytearray(len(text).to_bytes(_HEAD_BYTES, "little") + text)
    numbers = [
        nests.as_bytes(tensor.cpu().contiguous())
        for state in states
        for tensors in state.values()
        for tensor in tensors
        if tensor.numel()
    ]
    return torch.cat([torch.frombuffer(head, dtype=torch.uint8), *numbers])


def _outline_of(state: State) -> dict[str, list[list[Any]]]:
    """The type and the shape of each tensor of a state, by name, for JSON."""
    outline = {}
    for name, tensors in state.items():
        outline[name] = [[_name_of(tensor.dtype), list(tensor.shape)] for tensor in tensors]
    return outline


def _from_bytes(row: torch.Tensor) -> list[State]:
    """The states of which _as_bytes() has made these bytes, on their device."""
    length = int.from_bytes(row[:_HEAD_BYTES].cpu().numpy().tobytes(), "little")
    at = _HEAD_BYTES + length
    outline = json.loads(row[_HEAD_BYTES:at].cpu().numpy().tobytes())
    states: list[State] = []
    for of_share in outline:
        state: State = {}
        states.append(state)
        for name, tensors in of_share.items():
            state[name] = []
            for kind, shape in tensors:
                dtype = getattr(torch, kind)
                size = dtype.itemsize * prod(shape)
                # A copy: the numbers of a type must stand at addresses that are multiples of its size.
                state[name].append(row[at : at + size].clone().view(dtype).view(shape))
                at += size
    return states


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def computed(metric: Any, called: str, remedy: str) -> Any:
    """What the metric gives for all that it has seen; all ranks call, with what merged() has returned.

    called: what the user calls the metric. Raises UserError, with `remedy`, where it cannot be computed.
    """
    try:
        return metric.compute()
    except (RuntimeError, ValueError, IndexError, TypeError) as error:
        raise UserError(f"{called} cannot be computed ({one_line(error)}): {remedy}.", said_by=0) from error


def _numbers(name: str, value: Any) -> dict[str, float]:
    """What a task's metric has computed: one number, or several in a dict, each under its own name."""
    values = {name: value}
    if isinstance(value, Mapping):
        values = {f"{name}_{key}": each for key, each in value.items()}
    found = {}
    for key, each in values.items():
        if not is_one_number(each):
            raise UserError(
                f"task.torchmetrics.{name} gives {_told(each)}, but a metric is one number: ask it for an "
                "average, as by `average: macro`.",
                said_by=0,
            )
        found[key] = float(each)
    return found
