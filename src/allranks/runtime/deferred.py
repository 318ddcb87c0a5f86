"""Builds a model without its large tensors, which are made later with the same numbers, one by one.

A model that is spread over many ranks may be too large for one host's memory, let alone as often as there
are ranks on the host. So its constructor is run with large tensors that nobody fills: they have a shape and
an address, but no memory, since a system gives memory to a process only where something is written. Each
operation on them is noted instead of done. For an operation that draws random numbers the state of the
generator is noted too, and the numbers are drawn once into a tensor that is thrown away. So the generator
moves on as in an ordinary construction.

    with Deferred() as deferred:
        model = Net()
    weight = deferred.made(model.head.weight)      # the numbers that Net() would have put there

made() does the noted operations for one tensor alone. The result has the same bits as that of an ordinary
construction. Small tensors are made at once, and so are numbers that a constructor reads from a large one.

torch's device `meta` would not do: torch.nn.init leaves out some of its work for tensors there, and so do
many models.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from allranks.base.errors import UserError
from allranks.base.text import first_line

SMALL_ELEMENTS = 1 << 16  # tensors up to this size are made at once: 256 kB of fp32


class CannotDefer(Exception):
    """The constructor does something that cannot be noted and done again."""


@dataclass(frozen=True)
class _View:
    """A tensor by its place in a storage, which is the memory that several tensors may share."""

    storage: int  # its number
    dtype: torch.dtype
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int


@dataclass(frozen=True)
class _Operation:
    """A noted call of one of torch's operators."""

    operator: Any
    arguments: list[Any]  # flat; tensors that are deferred stand there as _View
    structure: Any  # how the arguments were nested
    reads: frozenset[int]  # storages
    writes: frozenset[int]
    # The state of the generator before the call, where it draws random numbers.
    random_state: torch.Tensor | None
    new: list[tuple[int, int]]  # (which of the flat outputs, the number of the storage that it has made)


class Deferred:
    """The construction of a model in a with statement, whose large tensors are made later.

    Raises CannotDefer where the constructor does something that cannot be noted.
    """

    def __init__(self, small_elements: int = SMALL_ELEMENTS) -> None:
        self._small_elements = small_elements
        self._operations: list[_Operation] = []
        self._numbers: dict[int, int] = {}  # from the address of a storage to its number
        self._storages: list[torch.UntypedStorage] = []  # by number; kept, so that no address is used again
        self._modes = (_Operators(self), _Readers(self))

    def __enter__(self) -> Deferred:
        for mode in self._modes:
            mode.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        for mode in reversed(self._modes):
            mode.__exit__(kind, value, trace)

    def made(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor with its numbers, on the CPU; one that was made at once is returned as it is."""
        if not self.holds(tensor):
            return tensor.detach()
        with torch.no_grad():
            return self._again(self._view(tensor), len(self._operations))

    def holds(self, value: Any) -> bool:
        """Whether this is a tensor without its numbers."""
        return isinstance(value, torch.Tensor) and value.untyped_storage()._cdata in self._numbers

    # --- noting ---

    def call(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A call of one of torch's operators in the with statement: done, or noted."""
        flat, structure = tree_flatten((args, kwargs))
        if not any(isinstance(each, torch.Tensor) for each in flat):
            return self._make(func, args, kwargs, flat, structure)
        if not any(self.holds(each) for each in flat):
            return func(*args, **kwargs)  # of small tensors only
        if _gives_view(func):
            return func(*args, **kwargs)  # another way to look at the same storage: no number is read
        written = _written(func, args, kwargs)
        if torch.Tag.inplace_view in func.tags:
            raise CannotDefer(f"{func} changes the shape of a large tensor in place")
        if written:
            if not any(self.holds(each) for each in written):
                return self._do(func, flat, structure)
            if not all(self.holds(each) for each in written):
                raise CannotDefer(f"{func} writes to a large and to a small tensor")
            state = self._drawn(func, flat, structure)
            self._note(func, flat, structure, written, state, [])
            return written[0] if len(func._schema.returns) == 1 else None
        return self._compute(func, args, kwargs, flat, structure)

    def _make(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], flat: list[Any], structure: Any
    ) -> Any:
        """A call that makes a tensor from nothing."""
        names = {argument.name for argument in func._schema.arguments}
        if "device" not in names or torch.device(kwargs.get("device") or "cpu").type != "cpu":
            return func(*args, **kwargs)
        planned = func(*args, **{**kwargs, "device": torch.device("meta")})
        if not isinstance(planned, torch.Tensor) or planned.numel() <= self._small_elements:
            return func(*args, **kwargs)
        state = self._drawn(func, flat, structure)
        empty = _unfilled(planned)
        self._note(func, flat, structure, [], state, [(0, self._number(empty))])
        return empty

    def _compute(
        self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], flat: list[Any], structure: Any
    ) -> Any:
        """A call that computes something new from a large tensor."""
        on_meta = [_on_meta(each) if isinstance(each, torch.Tensor) else each for each in flat]
        try:
            args, kwargs = tree_unflatten(on_meta, structure)
            planned = tree_flatten(func(*args, **kwargs))
        except (NotImplementedError, RuntimeError):  # as for item(): the numbers themselves are needed
            return self._do(func, flat, structure)
        outputs = [each for each in planned[0] if isinstance(each, torch.Tensor)]
        if all(each.numel() <= self._small_elements for each in outputs):
            return self._do(func, flat, structure)
        if len(outputs) != len(planned[0]):
            raise CannotDefer(f"{func} gives tensors and something else")
        state = self._drawn(func, flat, structure)
        empty = [_unfilled(each) for each in outputs]
        new = [(position, self._number(each)) for position, each in enumerate(empty)]
        self._note(func, flat, structure, [], state, new)
        return tree_unflatten(empty, planned[1])

    def _do(self, func: Any, flat: list[Any], structure: Any) -> Any:
        """Does a call at once, with the numbers of the large tensors in it."""
        args, kwargs = tree_unflatten(self._real(flat), structure)
        return func(*args, **kwargs)

    def _note(
        self,
        func: Any,
        flat: list[Any],
        structure: Any,
        written: list[torch.Tensor],
        state: torch.Tensor | None,
        new: list[tuple[int, int]],
    ) -> None:
        arguments: list[Any] = []
        reads = set()
        for each in flat:
            if self.holds(each):
                view = self._view(each)
                reads.add(view.storage)
                arguments.append(view)
            elif isinstance(each, torch.Tensor):
                arguments.append(each.detach().clone())  # it may change later
            else:
                arguments.append(each)
        writes = frozenset(self._number(each) for each in written)
        self._operations.append(
            _Operation(func, arguments, structure, frozenset(reads), writes, state, new)
        )

    def _drawn(self, func: Any, flat: list[Any], structure: Any) -> torch.Tensor | None:
        """Moves the generator on as the call would. Returns its earlier state; None if nothing is drawn."""
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return None
        generator = _generator_of(flat)
        before = generator.get_state()
        # A call that only fills its first argument, as uniform_() does, draws without a look at the numbers
        # there. Of others the numbers may matter, such as the probabilities for bernoulli().
        first = flat[0] if flat else None
        if isinstance(first, torch.Tensor) and func._schema.name.endswith("_"):
            real = [torch.empty_strided(first.size(), first.stride(), dtype=first.dtype)]
            real += self._real(flat[1:])
        else:
            real = self._real(flat)
        args, kwargs = tree_unflatten(real, structure)
        func(*args, **kwargs)
        return before

    def _real(self, flat: list[Any]) -> list[Any]:
        """The arguments with the numbers of the large tensors, as they are by now."""
        now = len(self._operations)
        return [self._again(self._view(each), now) if self.holds(each) else each for each in flat]

    def _number(self, tensor: torch.Tensor) -> int:
        storage = tensor.untyped_storage()
        if storage._cdata not in self._numbers:
            self._numbers[storage._cdata] = len(self._storages)
            self._storages.append(storage)
        return self._numbers[storage._cdata]

    def _view(self, tensor: torch.Tensor) -> _View:
        size = tuple(tensor.size())
        stride = tuple(tensor.stride())
        return _View(self._number(tensor), tensor.dtype, size, stride, int(tensor.storage_offset()))

    # --- doing it again ---

    def _again(self, wanted: _View, end: int) -> torch.Tensor:
        """The tensor as it was before operation number `end`, made by the operations that it depends on."""
        # 1. From the last operation to the first: those that write, or make, a storage that is needed.
        needed = {wanted.storage}
        chosen: list[_Operation] = []
        for operation in reversed(self._operations[:end]):
            made = {number for _, number in operation.new}
            if needed & (made | operation.writes):
                chosen.append(operation)
                needed |= operation.reads

        # 2. All of them again, in their order, with real tensors.
        real: dict[int, torch.UntypedStorage] = {}
        for operation in reversed(chosen):
            flat = [_seen(real, each) if isinstance(each, _View) else each for each in operation.arguments]
            args, kwargs = tree_unflatten(flat, operation.structure)
            generator = _generator_of(flat)
            after = generator.get_state()
            if operation.random_state is not None:
                generator.set_state(operation.random_state)
            outputs = tree_flatten(operation.operator(*args, **kwargs))[0]
            generator.set_state(after)
            for position, number in operation.new:
                real[number] = outputs[position].untyped_storage()
                if real[number].nbytes() != self._storages[number].nbytes():
                    raise CannotDefer(f"{operation.operator} gives another layout in memory")
        return _seen(real, wanted)


class _Operators(TorchDispatchMode):
    """Brings each call of one of torch's operators to a Deferred."""

    def __init__(self, deferred: Deferred) -> None:
        super().__init__()
        self._deferred = deferred

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in the place of the operator."""
        return self._deferred.call(func, args, kwargs or {})


class _Readers(TorchFunctionMode):
    """Refuses to hand the memory of a large tensor to other libraries: nothing is in it."""

    READERS = ("numpy", "__array__", "tolist", "data_ptr", "__dlpack__", "storage")

    def __init__(self, deferred: Deferred) -> None:
        super().__init__()
        self._deferred = deferred

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Called by torch in the place of a function or method of its Python interface."""
        name = getattr(func, "__name__", "")
        if name in self.READERS and args and self._deferred.holds(args[0]):
            raise CannotDefer(f"{name}() reads a large tensor")
        return func(*args, **(kwargs or {}))


def _unfilled(planned: torch.Tensor) -> torch.Tensor:
    """A tensor on the CPU of this shape, which takes no memory until somebody writes to it."""
    return torch.empty_strided(planned.size(), planned.stride(), dtype=planned.dtype)


def _on_meta(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty_strided(tensor.size(), tensor.stride(), dtype=tensor.dtype, device="meta")


def _gives_view(func: Any) -> bool:
    """Whether the operator only gives another view of its argument's storage."""
    infos = [returned.alias_info for returned in func._schema.returns]
    return bool(infos) and all(info is not None and not info.is_write for info in infos)


def _written(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> list[torch.Tensor]:
    """The tensors among the arguments that the operator changes."""
    found: list[torch.Tensor] = []
    for position, argument in enumerate(func._schema.arguments):
        value = args[position] if position < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            found += [each for each in tree_flatten(value)[0] if isinstance(each, torch.Tensor)]
    return found


def _generator_of(flat: list[Any]) -> torch.Generator:
    """The generator that a call draws from."""
    given = [each for each in flat if isinstance(each, torch.Generator)]
    return given[0] if given else torch.default_generator


def _seen(real: dict[int, torch.UntypedStorage], view: _View) -> torch.Tensor:
    """The real tensor in the place of one that was deferred."""
    tensor = torch.empty(0, dtype=view.dtype)
    return tensor.set_(real[view.storage], view.offset, view.size, view.stride)


def build(make: Callable[[], torch.nn.Module]) -> tuple[torch.nn.Module, Deferred | None, str]:
    """The model that `make` builds with its large tensors deferred.

    If that does not work, the model is built in the ordinary way: then there is no Deferred, and the
    text says why. Also a UserError may come of that, where components.build() tells of an error in a
    component. If it does not, the ordinary construction raises it again. The generator of the CPU moves on
    as in an ordinary construction.
    """
    before = torch.get_rng_state()
    deferred = Deferred()
    try:
        with deferred:
            model = make()
        return model, deferred, ""
    except (CannotDefer, NotImplementedError, RuntimeError, UserError) as error:
        torch.set_rng_state(before)
        return make(), None, first_line(error)
