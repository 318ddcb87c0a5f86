"""Where in its loop the program stands on this rank, and whether the other ranks stand there too.

The calls of a run depend on this place: run.log() in a step does something else than run.log() after the
last epoch, and run.backward() weights a loss by the batch that the program is working on.
"""

from __future__ import annotations

from allranks.base.errors import ANYONE, UserError
from allranks.data.batches import Dealt
from allranks.own.lifecycle import Lifecycle
from allranks.training.loop import Loop

# How long a rank waits for the others to do what it has done, such as to leave a loop. If the others are in
# a collective after that time, they wait for this rank, and the watchdog names it.
ALIKE_S = 1.0
# Stands for a share in the seed of the random numbers of a reproducible run: in a step, but outside of
# run.pieces(), and after a loop over run.batches().
OF_NO_SHARE = -2
_LEFT_ALIKE = "the other ranks to leave the loop by `break`, as this one has: all must, after the same step"


class LoopPlace:
    """Where the program stands, on one rank: in which loops, and with which batch in hand."""

    def __init__(self, lifecycle: Lifecycle) -> None:
        self._lifecycle = lifecycle
        # Whether the program is in the body of a loop over ...
        self.is_in_epochs = False  # ... run.epochs()
        self.takes_steps = False  # ... run.steps()
        self.is_stepping = False  # ... run.steps(), but not in a loop over run.batches() there
        self.is_in_shares = False  # ... run.pieces() in a reproducible run: over the shares of a step
        self.in_hand: Dealt | None = None  # this rank's share of the batch that the loop has got last
        self.passed = 0  # a digest of the batches that run.batches() has given for a run.mean()
        self.has_left = False  # whether a loop has been left by `break`, and nobody has compared the ranks
        self.has_left_pieces = False  # whether a loop over run.pieces() has been left by `break`

    def dealt(self, what: str) -> Dealt:
        """This rank's share of the batch in hand.

        Raises UserError, in which `what` names the call, outside of loops.
        """
        if self.in_hand is None:
            raise UserError(
                f"{what} belongs into a loop over run.steps() or run.batches(): it needs to know how many "
                "examples this rank has in hand.",
                said_by=ANYONE,
            )
        return self.in_hand

    def evaluated(self, what: str) -> Dealt:
        """This rank's share of the batch of run.batches() in hand.

        Raises UserError, in which `what` names the call, in a step and outside of loops.
        """
        if self.is_stepping or self.in_hand is None:
            raise UserError(
                f"{what} belongs into a loop over run.batches(). In a step of run.steps() what it has seen "
                "would be lost where a run goes on in the middle of an epoch.",
                said_by=ANYONE,
            )
        return self.in_hand

    def begin(self, epochs: int | None) -> Loop:
        """The loop over epochs and steps, which begins with the first call that needs it.

        `epochs` is the number of epochs of the whole run, where that is known. Raises UserError after the
        end of the run.
        """
        self._lifecycle.check_open("the loop")
        self.leave_alike()
        return self._lifecycle.begin(epochs)

    def leave_alike(self) -> None:
        """If this rank has left a loop by `break`, waits until the other ranks have left it, too.

        Then the ranks do what comes after the steps of an epoch: they take over rank 0's buffers. Raises
        UserError if another rank has not left the loop after the same step.
        """
        lifecycle = self._lifecycle
        if self.has_left:
            self.check_left_pieces()
            self.has_left = False
            step = lifecycle.kept.position.step
            lifecycle.runtime.meeting.all_alike(f"left by `break` after step {step}", _LEFT_ALIKE, ALIKE_S)
            if lifecycle.loop is not None:
                lifecycle.loop.share_buffers()

    def check_left_pieces(self) -> None:
        """Raises UserError if a loop over run.pieces() was left by `break`."""
        if self.has_left_pieces:
            raise UserError(
                "A loop over run.pieces() was left by `break`. The ranks add up their gradients in the "
                "last piece only, so go through all of them.",
                said_by=ANYONE,
            )
