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

    A resumed run repeats everything that the program does after its last step, the evaluation, too. So the
    ranks may stop in the evaluation only if the program has not changed a kept object since the last step:
    otherwise that change would be made twice.
    """

    def __init__(self, runtime: Runtime, control: Control, kept: KeptObjects) -> None:
        self._runtime = runtime
        self._control = control
        self._kept = kept
        self._settled: object = None  # the signature after the last step
        self._batches = 0  # how many batches the current evaluation has got
        self._can_stop = False  # whether the ranks may stop within the evaluation under way
        self.settle()

    def settle(self) -> None:
        """Notes the state of the kept objects. Called after the steps of an epoch, and after an epoch."""
        self._settled = self._signature()

    def _signature(self) -> object:
        """A fingerprint of the kept objects, which changes as soon as one of them changes.

        None if they cannot be saved.
        """
        try:
            return self._kept.signature()
        except UserError:  # the next save raises it again, and the user reads it then
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
        """To be called after a batch of run.batches(). Raises RunStopped if the ranks agree to stop."""
        if self._can_stop:
            self._batches += 1
            self._control.check_evaluation(self._batches, can_stop=self._is_as_settled)

    def after_last_batch(self) -> None:
        """To be called when the evaluation has no batch left on this rank.

        Raises UserError, on all ranks, if other ranks have batches left.
        """
        if self._can_stop:
            self._control.end_evaluation(self._batches)

    def _is_as_settled(self) -> bool:
        """Whether on all ranks the state is still what it was after the last step; all ranks call."""
        is_same = self._settled is not None and self._signature() == self._settled
        [ranks] = self._runtime.add_up([float(is_same)])
        # Once a kept object has changed, the run cannot stop in this evaluation any more. So after the
        # first False after_batch() does not ask again.
        self._can_stop = ranks == self._runtime.world_size
        return self._can_stop
