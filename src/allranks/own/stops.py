"""Stops within an evaluation of a loop of one's own."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from allranks.base.errors import UserError
from allranks.own.state import KeptObjects
from allranks.runtime.runtime import Runtime
from allranks.training.control import Control


class EvaluationStops:
    """Whether and where the ranks of a run may stop within run.mean(), between two batches.

    A run that goes on does again what the program does after its steps, the evaluation too. So the ranks
    may only stop where the program has not changed what it keeps since the last step: otherwise that change
    would be made twice.
    """

    def __init__(self, runtime: Runtime, control: Control, kept: KeptObjects) -> None:
        self._runtime = runtime
        self._control = control
        self._kept = kept
        self._settled: object = None  # the signature after the last step
        self._batches = 0  # that the evaluation under way has got
        self._can_stop = False  # whether the ranks may stop within the evaluation under way
        self.settle()

    def settle(self) -> None:
        """To be called after the steps of an epoch, and after an epoch."""
        self._settled = self._signature()

    def _signature(self) -> object:
        """Differs where what the program keeps has changed; None where that cannot be saved."""
        try:
            return self._kept.signature()
        except UserError:  # is told by the next save
            return None

    @contextmanager
    def between_batches(self) -> Iterator[None]:
        """Within the block, an evaluation, the ranks may agree to stop after each batch."""
        self._control.begin_evaluation()
        self._batches = 0
        self._can_stop = True
        try:
            yield
        finally:
            self._can_stop = False

    def after_batch(self) -> None:
        """A batch of run.batches() is done: where the ranks have agreed to stop, raises RunStopped."""
        if self._can_stop:
            self._batches += 1
            self._control.check_evaluation(self._batches, can_stop=self._is_as_settled)

    def after_last_batch(self) -> None:
        """The evaluation has no batch left. Raises UserError, on all ranks, where it has on others."""
        if self._can_stop:
            self._control.end_evaluation(self._batches)

    def _is_as_settled(self) -> bool:
        """Whether on all ranks the state is still what it was after the last step; all ranks call."""
        is_same = self._settled is not None and self._signature() == self._settled
        [ranks] = self._runtime.add_up([float(is_same)])
        # It stays changed: nobody need look again in this evaluation.
        self._can_stop = ranks == self._runtime.world_size
        return self._can_stop
