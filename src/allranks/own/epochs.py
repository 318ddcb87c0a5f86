"""run.epochs() and run.steps(): the program's loops over its epochs and its steps.

A run that goes on enters these loops where it was left. The program may leave them by `break`, or take
single items by next(). Then the work that is still to be done at the end of a step or an epoch is done in
the program's next call of the run.
"""

from __future__ import annotations

import inspect
import weakref
from collections.abc import Generator, Iterator
from typing import Any

from allranks import config as configs
from allranks.base.errors import ANYONE, UserError
from allranks.data.batches import Batches, Dealt
from allranks.data.randomness import mixed, reseed
from allranks.job import pulse
from allranks.own.batches import own_batches
from allranks.own.figures import LoggedFigures
from allranks.own.lifecycle import Lifecycle
from allranks.own.place import ALIKE_S, OF_NO_SHARE, LoopPlace
from allranks.own.shares import together
from allranks.own.stepping import Stepping
from allranks.training.loop import Loop

# Stands for a rank in the seed of the random numbers between the steps and the end of the epoch.
_AFTER_STEPS = -1
_SKIPPED_ALIKE = "the other ranks to take a step without run.backward(), as this one has: all must"


class Epochs:
    """The loops over epochs and steps of a run, on one rank."""

    def __init__(
        self, lifecycle: Lifecycle, place: LoopPlace, stepping: Stepping, figures: LoggedFigures
    ) -> None:
        self._lifecycle = lifecycle
        self._runtime = lifecycle.runtime
        self._kept = lifecycle.kept
        self._position = lifecycle.kept.position
        self._gradients = lifecycle.gradients
        self._place = place
        self._stepping = stepping
        self._figures = figures
        self._seed = lifecycle.config.seed
        self._epoch_of_steps: int | None = None  # the epoch in which steps() was called last
        # The number that the program has given to run.epochs() last; 1 if it has used run.steps() alone.
        self._epochs_before: int | None = None
        # The generator that run.steps() has returned last, as a weak reference. As a rule only the
        # program's `for` loop holds the generator. When the loop is left by `break`, Python deletes the
        # generator, which ends it. A program that calls next() on the generator may hold it for longer: see
        # _end_held_steps().
        self._newest_steps: weakref.ref[Generator[Any]] | None = None
        self._has_open_epoch = False  # whether an epoch has been left by `break`, with steps taken

    # --- epochs --------------------------------------------------------------------------------------

    def epochs(self, count: int) -> Iterator[int]:
        """What run.epochs() does: yields the number of each epoch that is left, from 0.

        Closes each epoch after its body. Raises UserError within run.epochs(), and where a second loop has
        no epoch left.
        """
        if self._place.is_in_epochs:
            raise UserError("run.epochs() is called within run.epochs(): a run has one.", said_by=ANYONE)
        loop = self._place.begin(count)
        self._end_held_steps()
        self._close_left_epoch(loop)
        # In a run that goes on, the first loop may have no epoch left: that is no mistake. A further loop
        # of the same program that has no epoch left, and asks for no more epochs than the loop before, is a
        # mistake.
        if self._epochs_before is not None and count <= min(self._epochs_before, self._position.epoch):
            raise UserError(
                f"run.epochs({count}) comes after run.epochs({self._epochs_before}), and has no epoch "
                "left: give the number of epochs of the whole run, those of earlier loops included.",
                said_by=ANYONE,
            )
        self._epochs_before = count
        if self._kept.is_over:  # left by `break` in an earlier start, which did not reach run.finish()
            return
        self._place.is_in_epochs = True
        try:
            with self._lifecycle.stopping():
                for epoch in loop.epochs(count):
                    reseed(mixed(self._seed, epoch), self._runtime.device)
                    self._lifecycle.stops.settle()
                    try:
                        yield epoch
                    except GeneratorExit:
                        self._end_held_steps()
                        self._place.has_left = True
                        self._has_open_epoch = self._position.epoch_steps > 0
                        raise
                    self._end_held_steps()
                    self._place.leave_alike()
                    self._place.in_hand = None
                    self._figures.compare(loop.figures)
                    loop.log(self._kept.means.take())
                    self._kept.source = None
            self._lifecycle.stops.settle()
        finally:
            self._place.is_in_epochs = False

    def _end_held_steps(self) -> None:
        """Ends the generator of run.steps(), if the program still holds it: its last step counts.

        The program holds it if it has called next() on it, and has not taken all of its steps.
        """
        held = self._newest_steps() if self._newest_steps is not None else None
        # If run.steps() is used without run.epochs(), this same generator contains the loop over the epoch.
        # Then it is running at this moment, and not suspended, and ends by itself.
        if held is not None and inspect.getgeneratorstate(held) == inspect.GEN_SUSPENDED:
            held.close()

    def _close_left_epoch(self, loop: Loop) -> None:
        """Closes an epoch that was left by `break`: its steps and its figures count."""
        if not self._has_open_epoch:
            return
        self._has_open_epoch = False
        with self._lifecycle.stopping():
            self._figures.compare(loop.figures)
            loop.log(self._kept.means.take())
            loop.close_epoch()
        self._kept.source = None

    def end(self) -> None:
        """The program has called run.finish(): closes what it has left open. Raises UserError in a loop."""
        self._end_held_steps()
        if self._place.is_in_epochs:
            raise UserError(
                "run.finish() is called within run.epochs(), before the epoch has come to its end: call it "
                "after the loop, and leave the loop by `break` where the run is to end early.",
                said_by=ANYONE,
            )
        loop = self._place.begin(None)
        # A run that goes on from the checkpoint that is saved now does not enter the loop again, even if
        # the loop was left by `break`.
        epochs = self._lifecycle.control.epochs
        self._kept.is_over = self._has_open_epoch or (epochs is not None and self._position.epoch < epochs)
        self._close_left_epoch(loop)

    # --- steps ---------------------------------------------------------------------------------------

    def steps(self, batches: Any, steps_per_save: int) -> Iterator[Any]:
        """What run.steps() does: yields the batches of the epoch that are left.

        Raises UserError in an epoch that has had a loop over its steps, and for a source that does not fit.
        """
        steps = self._steps_of_epoch(batches, steps_per_save)
        self._newest_steps = weakref.ref(steps)
        return steps

    def _steps_of_epoch(self, batches: Any, steps_per_save: int) -> Generator[Any]:
        """The generator that run.steps() returns."""
        if not self._place.is_in_epochs:
            self._check_first_epochs()
            for _ in self.epochs(1):
                yield from self._steps_of_epoch(batches, steps_per_save)
            return
        loop = self._place.begin(None)
        epoch = self._position.epoch
        if self._epoch_of_steps == epoch:
            raise UserError(
                f"run.steps() is called twice in epoch {epoch}: an epoch has one loop over its steps, "
                "so that a run can go on in the middle of it. Use run.batches() for evaluations, and one "
                "loop over itertools.chain(first, second) for batches of two kinds.",
                said_by=ANYONE,
            )
        self._epoch_of_steps = epoch
        dealt = own_batches(batches, self._lifecycle, self._place).dealt
        self._check_source(dealt)
        shares = self._shares_left(dealt)
        self._place.takes_steps = True
        try:
            with dealt.explained(), self._lifecycle.stopping(), self._stepping.detecting_anomalies():
                for share in loop.steps(shares, dealt.count, dealt.examples, steps_per_save):
                    self._place.in_hand = share
                    self._kept.means.digest = share.digest
                    self._kept.examples = share.examples
                    self._place.is_stepping = True
                    self._lifecycle.recorder.begin(self._position.step + 1, self._position.epoch + 1)
                    self._stepping.begin(is_first_of_group=self._position.epoch_steps % steps_per_save == 0)
                    of_whom = OF_NO_SHARE if self._lifecycle.is_reproducible else self._runtime.rank
                    reseed(mixed(self._seed, self._position.step, of_whom), self._runtime.device)
                    pulse.count_step()
                    passes = self._gradients.passes
                    try:
                        with self._lifecycle.records.profiled():
                            yield share.batch
                    except GeneratorExit:
                        self._place.has_left = True
                        raise
                    self._place.is_stepping = False
                    self._check_in_hand(share)
                    self._gradients.refuse_others()
                    if self._gradients.are_summed and self._gradients.passes == passes:
                        self._runtime.meeting.all_alike(
                            f"no run.backward() in step {self._position.step + 1}", _SKIPPED_ALIKE, ALIKE_S
                        )
            self._check_took_steps(dealt)
        finally:  # also where the body has left the loop by `break`
            self._place.is_stepping = False
            self._place.takes_steps = False
            self._place.in_hand = None
            # The random numbers that the program draws now, for example in an evaluation, depend neither on
            # the rank nor on whether the run has been resumed just here.
            reseed(mixed(self._seed, self._position.epoch, _AFTER_STEPS), self._runtime.device)
        self._lifecycle.stops.settle()

    def _check_first_epochs(self) -> None:
        """Raises UserError if a loop over run.steps() would take no step, as its epoch is over."""
        if self._epochs_before is not None:
            raise UserError(
                "run.steps() is called outside of run.epochs() after the end of an epoch. Without "
                "run.epochs() all steps of a run are one epoch, so this loop would take none. Put it into "
                "a loop over run.epochs(), or give one loop itertools.chain(first, second).",
                said_by=ANYONE,
            )

    def _shares_left(self, dealt: Batches) -> Iterator[Dealt]:
        """This rank's part of each batch that is left of the epoch: one share, or several together."""
        position = self._position
        first_step = position.epoch_steps
        loader = dealt.with_state
        self._kept.loader = loader
        saved = self._kept.loader_state()
        is_there = saved is not None and loader is not None
        if is_there:
            loader.load_state_dict(saved)
        shares = dealt.epoch(
            position.epoch,
            first_step,
            seen=self._kept.means.digest if first_step else None,
            is_there=is_there,
            position=self._kept.examples if first_step else 0,
        )
        return together(shares, len(self._runtime.shares)) if self._lifecycle.is_reproducible else shares

    def _check_in_hand(self, share: Dealt) -> None:
        """Raises UserError if the step has left what it has begun on a batch, or has taken another."""
        self._place.check_left_pieces()
        if self._place.in_hand is not share:
            raise UserError(
                "A step of run.steps() has taken a batch of run.batches() by next(), and has not gone "
                "through the rest: its loss would be weighed as one of that batch, and a run that goes on "
                "would begin with the first batch again. Make one Dataset of both, as "
                "torch.utils.data.StackDataset does.",
                said_by=ANYONE,
            )

    def _check_took_steps(self, dealt: Batches) -> None:
        """Raises UserError if the source of an epoch's steps has given no batch."""
        if self._position.epoch_steps:
            return
        if isinstance(dealt.source, Iterator):
            remedy = (
                "It can be gone through only once: give a list, a DataLoader, or an object whose "
                "__iter__() begins anew in each epoch."
            )
        else:
            remedy = (
                "An epoch has one step at least. With drop_last=True the data needs as many examples as a "
                "batch has."
            )
        kind = type(dealt.source).__name__
        raise UserError(
            f"run.steps() got no batch of its {kind} in epoch {self._position.epoch}. {remedy}",
            said_by=ANYONE,
        )

    def _check_source(self, dealt: Batches) -> None:
        """Raises UserError if the epoch was begun with another source, and goes on in its middle."""
        here = dealt.described()
        there = self._kept.source
        if self._position.epoch_steps and there is not None and there != here:
            differing = configs.differing(there, here)
            raise UserError(
                f"{self._lifecycle.resumed} stands in the middle of an epoch of other batches: "
                f"{differing}. Give the same batches, or another name for the run.",
                said_by=ANYONE,
            )
        self._kept.source = here
