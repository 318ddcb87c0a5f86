"""What the program does within a step: run.pieces(), run.backward() and run.take_step()."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import nn

from allranks.base.errors import ANYONE, UserError
from allranks.data.batches import Dealt, pieces_of
from allranks.data.dealing import most_pieces
from allranks.data.nests import described
from allranks.data.randomness import mixed, reseed
from allranks.own.figures import as_number
from allranks.own.lifecycle import Lifecycle
from allranks.own.place import OF_NO_SHARE, LoopPlace
from allranks.own.shares import StepShares, as_it_came, outside_of_pieces, within_pieces
from allranks.own.taking import IF_FOUND, IF_NOT_FINITE, check_arguments
from allranks.training.reproducible import buffers_of, refuse_changed_buffers
from allranks.training.update import named, take_step, tell_not_finite
from allranks.training.weight import share_weight


class Stepping:
    """The steps of a run, on one rank: from the pieces of a batch to the step of an optimizer."""

    def __init__(self, lifecycle: Lifecycle, place: LoopPlace) -> None:
        self._lifecycle = lifecycle
        self._runtime = lifecycle.runtime
        self._kept = lifecycle.kept
        self._gradients = lifecycle.gradients
        self._place = place
        # The losses of this rank whose gradients no run.take_step() has taken, for its messages.
        self._losses: list[torch.Tensor] = []
        # Of a reproducible run: how many loops over its shares the step has had, and the models that are
        # known to leave their buffers alone.
        self._loops_in_step = 0
        self._tried: set[nn.Module] = set()

    def begin(self, is_first_of_group: bool) -> None:
        """A step begins. The gradients of a group of steps are added up: the first one begins anew."""
        if is_first_of_group:
            self._losses.clear()
            self._kept.means.begin_step(may_be_left_out=not self._lifecycle.stops_at_nonfinite)
        self._loops_in_step = 0

    # --- the pieces of a batch -----------------------------------------------------------------------

    def pieces(self, batch: Any, count: int = 1) -> Iterator[Any]:
        """What run.pieces() does: cuts a batch of run.steps() into at most `count` pieces.

        Raises UserError for a count below 1, for a batch that cannot be cut, and in the wrong place.
        """
        share = self._place.dealt("run.pieces()")
        if count < 1:
            raise UserError(f"run.pieces() got count={count}: give 1 or more.", said_by=ANYONE)
        try:
            if isinstance(batch, StepShares) and self._place.is_in_shares:
                raise within_pieces("run.pieces()")
            if isinstance(share.batch, StepShares):
                yield from self._pieces_of_shares(as_it_came(batch, share), count)
                return
            wanted = most_pieces(share.total, self._runtime.share_count, count)
            parts = self._cut(batch, share, count, wanted)
            with self._gradients.in_pieces():
                for number, part in enumerate(parts, 1):
                    self._place.in_hand = part
                    with self._gradients.piece(is_last=number == len(parts)):
                        yield part.batch
        except GeneratorExit:
            self._place.has_left_pieces = True
            raise
        finally:
            self._place.in_hand = share

    def _cut(self, batch: Any, share: Dealt, count: int, wanted: int) -> list[Dealt]:
        """The pieces of a batch of this share; `wanted` as in pieces_of()."""
        if count == 1 and batch is share.batch:  # it need not be known how it could be cut
            return [share]
        parts = pieces_of(batch, count, wanted)
        return [
            Dealt(piece, length if share.counted else 0, share.total, row=share.row)
            for piece, length in parts
        ]

    def _pieces_of_shares(self, batch: StepShares, count: int) -> Iterator[Any]:
        """The pieces of each share that this rank has of a step's batch, in a reproducible run."""
        seed = self._lifecycle.config.seed
        again = self._loops_in_step
        self._loops_in_step += 1
        self._place.is_in_shares = True
        try:
            for row in self._gradients.each_share(seed, self._kept.position.step, again):
                share = batch.shares[row]
                untried = [each for each in self._gradients.models if each not in self._tried]
                before = [buffers_of(each) for each in untried]
                for part in self._cut(share.batch, share, count, wanted=0):
                    self._place.in_hand = part
                    yield part.batch
                for model, buffers in zip(untried, before, strict=True):
                    self._try(model, buffers)
        finally:
            self._place.is_in_shares = False
        # What the program draws now does not depend on which shares this rank has had.
        reseed(
            mixed(seed, self._kept.position.step, OF_NO_SHARE, self._loops_in_step), self._runtime.device
        )

    def _try(self, model: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
        """Raises UserError if a model has changed a buffer, in the first share that it has computed.

        `before` are its buffers before that share.
        """
        kind = type(model).__name__
        try:
            refuse_changed_buffers(
                before, model, kind, self._lifecycle.reproducible_by, "leave virtual_ranks out"
            )
        except UserError as error:
            error.said_by = ANYONE
            raise
        # A model that has no gradient yet has taken no part, as one half of a GAN in the other's loop.
        if any(parameter.grad is not None for parameter in model.parameters()):
            self._tried.add(model)

    # --- the gradient --------------------------------------------------------------------------------

    def backward(self, loss: torch.Tensor, *, reduction: str = "mean") -> None:
        """What run.backward() does: loss.backward(), weighted by the examples of this rank's share.

        Raises UserError outside of run.steps(), and where the loss is not a scalar, or has no gradient.
        """
        share = self._place.dealt("run.backward()")
        if self._place.takes_steps and self._lifecycle.is_reproducible and not self._place.is_in_shares:
            raise outside_of_pieces("run.backward()")
        if not self._place.takes_steps:
            raise UserError(
                "run.backward() is called in a loop over run.batches() outside of run.steps(), where no "
                "step is counted or saved: train in a loop over run.steps(batches), and keep run.batches() "
                "for evaluations.",
                said_by=ANYONE,
            )
        if reduction not in ("mean", "sum"):
            raise UserError(
                f"run.backward() got reduction={reduction!r}: give mean, where the loss is the mean over "
                "the examples of this rank's share, or sum.",
                said_by=ANYONE,
            )
        if not isinstance(loss, torch.Tensor) or loss.numel() != 1:
            raise UserError(
                f"run.backward() takes a scalar loss, not {described(loss)}: take the mean over the "
                "examples.",
                said_by=ANYONE,
            )
        if not loss.requires_grad:
            raise UserError(
                "run.backward() got a loss without a gradient: it does not depend on any parameter, or was "
                "computed under torch.no_grad().",
                said_by=ANYONE,
            )
        count = share.counted if reduction == "mean" else share.counted > 0
        weight = share_weight(count, share.total, loss.detach())
        if self._lifecycle.stops_at_nonfinite:
            self._kept.means.note_weight(weight)
        self._losses.append(loss.detach())
        if not self._lifecycle.config.trainer.detect_anomaly:
            with named("backward"):
                self._gradients.backward(loss * weight)
            return
        # The weight of a loss that is not finite is NaN: it would be the first anomaly.
        with self._naming_operations():
            self._gradients.backward(loss * (count / share.total))
        if not bool(loss.isfinite()):
            raise self._anomaly(
                f"The loss is {as_number(loss)}, though all layers' outputs are finite: look at how it is "
                "computed."
            )

    def detecting_anomalies(self) -> AbstractContextManager[None]:
        """With allranks.open(detect_anomaly=True) the steps in the block are looked at."""
        if not self._lifecycle.config.trainer.detect_anomaly:
            return nullcontext()
        from allranks.training.anomaly import detecting

        models = self._gradients.models
        kept = {id(each): name for name, each in self._kept.objects.items()}
        names = [kept.get(id(model), f"model {number}") for number, model in enumerate(models, 1)]
        prefixes = names if len(models) > 1 else [""] * len(models)
        return detecting(dict(zip(prefixes, models, strict=True)), self._anomaly)

    def _naming_operations(self) -> AbstractContextManager[None]:
        """The block is a backward pass. An operation of it that gives NaN is named by a UserError."""
        from allranks.training.anomaly import named_operation

        return named_operation(self._anomaly)

    def _anomaly(self, found: str) -> UserError:
        """The error of a rank that has found something that is not finite."""
        position = self._kept.position
        where = f"rank {self._runtime.rank} in step {position.step + 1} (epoch {position.epoch + 1})"
        return UserError(f"{found} This was on {where}. {IF_FOUND}", said_by=ANYONE)

    # --- the optimizer -------------------------------------------------------------------------------

    def take_step(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> bool:
        """What run.take_step() does: optimizer.step(), unless the gradient is not finite.

        Returns whether the step was taken. Raises UserError outside of run.steps(), for arguments that are
        not such, and where the run is to end at a gradient that is not finite.
        """
        if not self._place.is_stepping:
            raise UserError(
                "run.take_step() belongs into a loop over run.steps(): it takes one of its steps.",
                said_by=ANYONE,
            )
        if self._place.is_in_shares:
            raise within_pieces("run.take_step()")
        check_arguments(optimizer, clip_norm, scaler)
        parameters = [each for group in optimizer.param_groups for each in group["params"]]
        scale = scaler.get_scale() if scaler is not None else 1.0
        is_finite = take_step(
            optimizer,
            parameters,
            clip_norm,
            scaler,
            self._runtime if self._gradients.is_spread else None,
        )
        losses = list(self._losses)
        self._losses.clear()
        if not is_finite:
            stops = self._lifecycle.stops_at_nonfinite
            tell_not_finite(losses, self._kept.position, self._runtime, stops, IF_NOT_FINITE)
            self._kept.means.leave_out_step()
            return False
        # A GradScaler that has left out a step has lowered its scale, and tells it in no other way.
        return scaler is None or scaler.get_scale() >= scale

    def before_optimizer(self, *_: Any) -> None:
        """An optimizer calls this before each step. Raises UserError if gradients are not added up."""
        if self._place.is_in_shares:
            raise within_pieces("The step of an optimizer")
