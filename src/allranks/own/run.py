"""`allranks.open`: ranks, checkpoints, records and a watchdog for a training loop of the user's own.

    run = allranks.open("heat", seed=1)
    model = run.wrap(Net())
    optimizer = torch.optim.AdamW(model.parameters())
    run.keep(model=model, optimizer=optimizer)
    for epoch in run.epochs(10):
        for inputs, targets in run.steps(train_loader):
            loss = mse_loss(model(inputs), targets)
            run.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    run.finish()

docs/your-own-loop.md explains each piece. All ranks run the same program and make the same calls.
"""

from __future__ import annotations

import inspect
import json
import logging
import signal
import sys
import weakref
import zlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

import torch
from torch import nn

from allranks import config as configs
from allranks.base.errors import ANYONE, EXIT_REQUEUE, UserError
from allranks.base.processes import process_age_s
from allranks.base.signals import FROM_TERMINAL, Signals
from allranks.base.text import some
from allranks.config import Config
from allranks.data.batches import Batches, Dealt, pieces_of
from allranks.data.dealing import most_pieces
from allranks.data.nests import described
from allranks.data.randomness import mixed, reseed
from allranks.job import pulse
from allranks.job.identity import RankIdentity
from allranks.own.figures import as_number, check_log, names_that_differ
from allranks.own.keeping import check_kept, tell_of_models, telling_of_optimizers
from allranks.own.measuring import ALIKE_S, Measuring
from allranks.own.metric import Metric
from allranks.own.shares import (
    StepShares,
    as_it_came,
    one_for_each_share,
    outside_of_pieces,
    shares_of,
    together,
    within_pieces,
)
from allranks.own.sharing import Sharing
from allranks.own.state import KeptObjects
from allranks.own.steps import OwnSteps
from allranks.own.stops import EvaluationStops
from allranks.own.taking import IF_FOUND, IF_NOT_FINITE, check_arguments, check_counted
from allranks.own.wrapping import REMEDY, wrapped
from allranks.run import best as the_best
from allranks.run import directory as rundir
from allranks.runtime import mpi, sharding
from allranks.runtime.bringup import open_runtime
from allranks.runtime.settling import random_numbers_kept
from allranks.training import ending
from allranks.training.control import Control, RunStopped
from allranks.training.flops import Flops
from allranks.training.gradients import Gradients, inner
from allranks.training.length import RunLength
from allranks.training.loop import Loop
from allranks.training.records import Records, last_of
from allranks.training.report import Reporter, Told
from allranks.training.reproducible import buffers_of, refuse_batch_norm, refuse_changed_buffers
from allranks.training.saver import Saver
from allranks.training.state import weights_sha256
from allranks.training.update import named, take_step, tell_not_finite
from allranks.training.weight import share_weight

log = logging.getLogger(__name__)

_AFTER_STEPS = -1  # in place of a rank, for the random numbers between the steps and the epoch's end
# In place of a share, for the random numbers of a reproducible run: in a step, but outside of run.pieces(),
# and after a loop over run.batches().
_OF_NO_SHARE = -2
_LEFT_ALIKE = "the other ranks to leave the loop by `break`, as this one has: all must, after the same step"
_SKIPPED_ALIKE = "the other ranks to take a step without run.backward(), as this one has: all must"


class How(NamedTuple):
    """How a run is opened."""

    directory: str
    identity: RankIdentity
    number: int  # counts the runs of this process
    is_one_of_several: bool  # of this process, one after another
    stops_at_nonfinite: bool  # whether a loss that is not finite ends the run
    signals: Signals


class Run:
    """One run of a user's own loop, on one rank. allranks.open() makes it."""

    def __init__(self, config: Config, how: How, exits: ExitStack) -> None:
        """Brings the ranks up, takes the run directory, and finds where the run goes on.

        `exits` is closed when the run ends, in whatever way. Raises UserError.
        """
        self._exits = exits
        self._config = config
        self.is_open = True
        self.is_one_of_several = how.is_one_of_several
        self._stops_at_nonfinite = how.stops_at_nonfinite
        self._summary: Mapping[str, Any] | None = None  # of a run that has finished
        self._epoch_of_steps: int | None = None  # the epoch in which steps() was called last
        self._in_epochs = False
        # What the program has given to run.epochs() last; 1 where it has gone through run.steps() alone.
        self._epochs_before: int | None = None
        # What run.steps() has returned last. Only the program keeps it alive: a loop over it that is left
        # by `break` drops it, which ends it. A program that calls next() on it may hold it for longer.
        self._newest_steps: weakref.ref[Generator[Any]] | None = None
        self._has_open_epoch = False  # whether an epoch has been left by `break`, with steps taken
        self._has_left = False  # whether a loop has been left by `break`, and nobody has compared the ranks
        self._shared: set[str] = set()  # the names of the works that run.share() has done
        self._has_left_pieces = False  # whether a loop over run.pieces() has been left by `break`
        # Of a reproducible run: whether the program is in a loop over the shares of a step, how many such
        # loops the step has had, and the models that are known to leave their buffers alone.
        self._is_in_shares = False
        self._loops_in_step = 0
        self._tried: set[nn.Module] = set()
        self._in_hand: Dealt | None = None  # this rank's share of the batch that the loop has got last
        self._passed = 0  # a digest of the batches that run.batches() has given for a run.mean()
        self._is_stepping = False  # whether the loop is in a body of steps()
        self._takes_steps = False  # the same, but also within a loop over run.batches() in that body
        # The losses of this rank whose gradients no run.take_step() has taken, for its messages.
        self._losses: list[torch.Tensor] = []
        self._figures: dict[str, float] = {}  # logged after the last epoch
        self._told_to_differ: set[str] = set()  # figures of which rank 0 has said so
        # A first run's time includes the import of torch.
        self._began_s = process_age_s() if how.number else 0.0

        self._signals = how.signals
        # A batch system may send these two as a warning. Without a handler they would end the process.
        self._signals.count(signal.SIGUSR1, signal.SIGUSR2)
        self._runtime = open_runtime(how.identity, configs.runtime_settings(config), run=how.number)
        self._best = the_best.rule_of(config.checkpoint.best)
        told = Told(title=f"Run {config.name}", console=config.console, best=self._best, is_tested=False)
        self._report = exits.enter_context(ending.of_run(self._runtime, Reporter(self._runtime, told)))
        decisive = configs.decisive_values(config)
        is_wanted = sharding.is_wanted(config.sharding, self._runtime)
        self._kept = KeptObjects(self._runtime, decisive, is_wanted)
        self._gradients = Gradients(self._runtime, config.sharding if is_wanted else None, REMEDY)
        # _begin() makes these four.
        self._loop: Loop | None = None
        self._control: Control
        self._stops: EvaluationStops
        self._startup_s = 0.0

        self._path, standing = self._runtime.meeting.from_rank_0(
            lambda: rundir.find(how.directory, config.name, decisive, config.resume)
        )
        self._report.started()
        if standing == rundir.Standing.FINISHED:
            self._finished_before()
        else:
            self._take_directory(is_new=standing == rundir.Standing.NEW)

    def _finished_before(self) -> None:
        """The run has finished in an earlier start: ends the program, or lets it go on to other runs."""
        self._report.finished_before(self._path)
        if not self.is_one_of_several:
            self._close()
            mpi.leave(0)
            sys.exit(0)
        summary = self._runtime.meeting.from_rank_0(lambda: _summary_in(self._path))
        self._kept.position.epoch = summary["epochs"]
        self._kept.position.step = summary["steps"]
        self._summary = summary
        self._close()

    def _take_directory(self, is_new: bool) -> None:
        """Makes the run directory, or finds the checkpoint in it from which the run goes on."""
        runtime, config = self._runtime, self._config
        self._is_new = is_new
        if is_new:
            self._path = runtime.meeting.from_rank_0(
                lambda: rundir.create(self._path, configs.freeze(config))
            )
        save_s = config.watchdog.save_s
        saver = Saver(
            runtime, self._path, self._kept, keep=config.checkpoint.keep, save_s=save_s, best=self._best
        )
        self._saver = self._exits.enter_context(saver)
        self._resumed = self._saver.resume(config.resume)
        self._records = Records(
            runtime,
            config.trainer,
            config.tracker,
            configs.leaves(config),
            profile=config.profile,
            save_s=save_s,
            recorder=OwnSteps,
        )
        assert isinstance(self._records.recorder, OwnSteps)
        self._steps = self._records.recorder
        reseed(mixed(config.seed), runtime.device)

    # --- what the program may ask --------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This rank's number, from 0."""
        return self._runtime.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self._runtime.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self._runtime.is_main

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self._runtime.device

    @property
    def directory(self) -> Path:
        """The run directory, the same on all ranks."""
        return Path(self._path)

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end, now or in an earlier start (allranks.open(several=True))."""
        return self._summary is not None

    @property
    def summary(self) -> Mapping[str, Any]:
        """What summary.json holds of a run that has finished, such as the figures logged at its end."""
        if self._summary is None:
            raise UserError(
                "run.summary is there once the run has finished: call run.finish().", said_by=ANYONE
            )
        return self._summary

    @property
    def step(self) -> int:
        """The steps that are completed, those of earlier starts included."""
        return self._kept.position.step

    @property
    def epoch(self) -> int:
        """The epochs that are completed, those of earlier starts included."""
        return self._kept.position.epoch

    @property
    def epoch_step(self) -> int:
        """The steps that are completed in this epoch, those of earlier starts included."""
        return self._kept.position.epoch_steps

    @property
    def examples(self) -> int:
        """How many examples this rank's share of the present batch has.

        It is 0 where the batch has fewer examples than there are ranks, and this rank got one only so that
        it has something to compute with.
        """
        return self._dealt("run.examples").counted

    @property
    def _is_reproducible(self) -> bool:
        """Whether the run has the same bits on any number of ranks (allranks.open(virtual_ranks=...))."""
        return self._runtime.virtual_ranks is not None

    @property
    def _reproducible_by(self) -> str:
        """What makes the run reproducible, for messages."""
        return f"virtual_ranks={self._runtime.virtual_ranks}"

    # --- before the loop -----------------------------------------------------------------------------

    def wrap(
        self, model: nn.Module | Callable[[], nn.Module], *, unused_parameters: bool = False
    ) -> nn.Module:
        """The model on this rank's device. On several ranks it is in DDP, which adds up the gradients.

        With allranks.open(sharding={"kind": "fsdp"}) it is spread over the ranks. Then give a function that
        makes it, such as its class, and no rank ever holds all of it. `unused_parameters`: whether a step
        may leave out some of its parameters. Raises UserError for a model that cannot be trained.
        """
        self._check_open("run.wrap()")
        made = wrapped(model, self._gradients, self._runtime.device, unused_parameters)
        if self._is_reproducible:
            with self._runtime.all_or_none():
                refuse_batch_norm(made, self._reproducible_by)
        return made

    def keep(self, **objects: Any) -> None:
        """Says what a checkpoint holds, by name, and restores it where the run goes on from one.

        Each object needs state_dict() and load_state_dict(). Call it before the loop begins. Raises
        UserError for an object without these, and for a checkpoint that does not fit.
        """
        self._check_open("run.keep()")
        if self._loop is not None:
            raise UserError("run.keep() comes before run.epochs() and run.steps().", said_by=ANYONE)
        for name, given in objects.items():
            check_kept(name, given)
            with self._runtime.all_or_none():
                self._kept.keep(name, inner(given) if isinstance(given, nn.Module) else given)
            if self._is_reproducible and isinstance(given, torch.optim.Optimizer):
                hook = given.register_step_pre_hook(self._before_optimizer)
                self._exits.callback(hook.remove)

    def batches(
        self,
        source: Any,
        *,
        batch_size: int | None = None,
        shuffle: bool | None = None,
        workers: int | None = None,
        collate: Callable[[list[Any]], Any] | None = None,
    ) -> OwnBatches:
        """The source's batches, dealt out to the ranks: for run.steps(), or to go through once.

        source: a map-style Dataset, a DataLoader, or an iterable of batches. Each batch of it is a global
        one, of which every rank gets its share. A Dataset needs `batch_size`, and is shuffled unless
        shuffle=False; `workers` processes read it, and `collate` makes a batch of a list of its examples.
        """
        self._check_open("run.batches()")
        if isinstance(source, OwnBatches):
            return source
        made = Batches(
            source,
            self._runtime,
            self._config.seed,
            batch_size=batch_size,
            shuffle=shuffle,
            workers=workers,
            collate=collate,
        )
        return OwnBatches(self, made)

    def count_flops(
        self, compute: Callable[[], object], *, examples: int, precision: str = "fp32"
    ) -> float | None:
        """Counts the floating-point operations of a training step, of which each epoch's record then tells.

        compute: takes a forward and a backward pass over so many `examples`, and is called once, or twice
        where torch has to. It changes gradients, and buffers such as those of BatchNorm: let it use a copy
        of the model. All ranks call; random numbers stay as they are. precision: fp64, fp32, bf16 or fp16,
        in which most of it is computed: a GPU's share of its peak follows from it.

        Returns the operations for one example. It is None where an operation ran whose work is not known:
        then nothing is recorded. Raises UserError for arguments that are not such.
        """
        self._check_open("run.count_flops()")
        check_counted(compute, examples, precision)
        flops = Flops()
        with random_numbers_kept(self.device):
            flops.during(compute)
        per_example = flops.count / examples if flops.count else None
        self._records.counted(per_example, flops.has_convolutions, precision)
        return per_example

    # --- the loop ------------------------------------------------------------------------------------

    def epochs(self, count: int) -> Iterator[int]:
        """The number of each epoch that is left, from 0. `count` is the number of epochs of the whole run.

        After each epoch its figures are kept, the ranks are compared, and a checkpoint is saved. The same
        happens to an epoch that is left by `break` after its steps. Where the ranks have agreed to stop,
        the program ends here with exit code 85.
        """
        if self._in_epochs:
            raise UserError("run.epochs() is called within run.epochs(): a run has one.", said_by=ANYONE)
        loop = self._begin(count)
        self._end_held_steps()
        self._close_left_epoch(loop)
        # A run that goes on may come to a loop whose epochs are all completed; not so a second loop.
        if self._epochs_before is not None and count <= min(self._epochs_before, self.epoch):
            raise UserError(
                f"run.epochs({count}) comes after run.epochs({self._epochs_before}), and has no epoch "
                "left: give the number of epochs of the whole run, those of earlier loops included.",
                said_by=ANYONE,
            )
        self._epochs_before = count
        if self._kept.is_over:  # left by `break` in an earlier start, which did not reach run.finish()
            return
        self._in_epochs = True
        try:
            with self._stopping():
                for epoch in loop.epochs(count):
                    reseed(mixed(self._config.seed, epoch), self._runtime.device)
                    self._stops.settle()
                    try:
                        yield epoch
                    except GeneratorExit:
                        self._end_held_steps()
                        self._has_left = True
                        self._has_open_epoch = self.epoch_step > 0
                        raise
                    self._end_held_steps()
                    self._leave_alike()
                    self._in_hand = None
                    self._compare_figures(loop.figures)
                    loop.log(self._kept.means.take())
                    self._kept.source = None
            self._stops.settle()
        finally:
            self._in_epochs = False

    def _end_held_steps(self) -> None:
        """Ends what run.steps() has returned, where the program still holds it: its last step counts.

        That is so where the program has called next() on it, and not gone through all of it.
        """
        held = self._newest_steps() if self._newest_steps is not None else None
        # Without run.epochs() the epoch runs within it, and ends it by itself.
        if held is not None and inspect.getgeneratorstate(held) == inspect.GEN_SUSPENDED:
            held.close()

    def _close_left_epoch(self, loop: Loop) -> None:
        """Closes an epoch that was left by `break`: its steps and its figures count."""
        if not self._has_open_epoch:
            return
        self._has_open_epoch = False
        with self._stopping():
            self._compare_figures(loop.figures)
            loop.log(self._kept.means.take())
            loop.close_epoch()
        self._kept.source = None

    def _leave_alike(self) -> None:
        """Where this rank has left a loop by `break`, waits for the others to do so; raises UserError.

        Then the ranks do what comes after the steps of an epoch: they take over rank 0's buffers.
        """
        if self._has_left:
            self._check_left_pieces()
            self._has_left = False
            self._runtime.meeting.all_alike(f"left by `break` after step {self.step}", _LEFT_ALIKE, ALIKE_S)
            if self._loop is not None:
                self._loop.share_buffers()

    def steps(self, batches: Any, *, steps_per_save: int = 1) -> Iterator[Any]:
        """The batches of the epoch that are left; the loop's body takes one step on each.

        In a run with virtual_ranks, give what it yields to run.pieces(), which goes through its shares.

        `batches` is what run.batches() takes or gives. Where gradients are added up over several steps,
        `steps_per_save` is their number: a checkpoint then falls between two of such groups only. Where
        the ranks have agreed to stop, the program ends here with exit code 85. Outside of run.epochs() all
        steps are one epoch.
        """
        steps = self._steps_of_epoch(batches, steps_per_save)
        self._newest_steps = weakref.ref(steps)
        return steps

    def _steps_of_epoch(self, batches: Any, steps_per_save: int) -> Generator[Any]:
        """What run.steps() returns."""
        if not self._in_epochs:
            self._check_first_epochs()
            for _ in self.epochs(1):
                yield from self._steps_of_epoch(batches, steps_per_save)
            return
        loop = self._begin(None)
        if self._epoch_of_steps == self.epoch:
            raise UserError(
                f"run.steps() is called twice in epoch {self.epoch}: an epoch has one loop over its steps, "
                "so that a run can go on in the middle of it. Use run.batches() for evaluations, and one "
                "loop over itertools.chain(first, second) for batches of two kinds.",
                said_by=ANYONE,
            )
        self._epoch_of_steps = self.epoch
        dealt = self.batches(batches).dealt
        self._check_source(dealt)
        shares = self._shares_left(dealt)
        self._takes_steps = True
        try:
            with dealt.explained(), self._stopping(), self._detecting_anomalies():
                for share in loop.steps(shares, dealt.count, dealt.examples, steps_per_save):
                    self._in_hand = share
                    self._kept.means.digest = share.digest
                    self._kept.examples = share.examples
                    self._is_stepping = True
                    self._steps.begin(self.step + 1, self.epoch + 1)
                    if self.epoch_step % steps_per_save == 0:  # gradients are added up anew
                        self._losses.clear()
                        self._kept.means.begin_step(may_be_left_out=not self._stops_at_nonfinite)
                    self._loops_in_step = 0
                    of_whom = _OF_NO_SHARE if self._is_reproducible else self.rank
                    reseed(mixed(self._config.seed, self.step, of_whom), self.device)
                    pulse.count_step()
                    passes = self._gradients.passes
                    try:
                        with self._records.profiled():
                            yield share.batch
                    except GeneratorExit:
                        self._has_left = True
                        raise
                    self._is_stepping = False
                    self._check_in_hand(share)
                    self._gradients.refuse_others()
                    if self._gradients.are_summed and self._gradients.passes == passes:
                        self._runtime.meeting.all_alike(
                            f"no run.backward() in step {self.step + 1}", _SKIPPED_ALIKE, ALIKE_S
                        )
            self._check_took_steps(dealt)
        finally:  # also where the body has left the loop by `break`
            self._is_stepping = False
            self._takes_steps = False
            self._in_hand = None
            # What the program draws now, as for an evaluation, does not depend on the rank, nor on whether
            # the run has gone on just here.
            reseed(mixed(self._config.seed, self.epoch, _AFTER_STEPS), self.device)
        self._stops.settle()

    def _check_first_epochs(self) -> None:
        """Raises UserError where a loop over run.steps() would take no step, as its epoch is over."""
        if self._epochs_before is not None:
            raise UserError(
                "run.steps() is called outside of run.epochs() after the end of an epoch. Without "
                "run.epochs() all steps of a run are one epoch, so this loop would take none. Put it into "
                "a loop over run.epochs(), or give one loop itertools.chain(first, second).",
                said_by=ANYONE,
            )

    def _shares_left(self, dealt: Batches) -> Iterator[Dealt]:
        """What this rank takes of each batch that is left of the epoch: a share, or several together."""
        position = self._kept.position
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
        return together(shares, len(self._runtime.shares)) if self._is_reproducible else shares

    def _check_in_hand(self, share: Dealt) -> None:
        """Raises UserError where the step has left what it has begun on a batch, or has taken another."""
        self._check_left_pieces()
        if self._in_hand is not share:
            raise UserError(
                "A step of run.steps() has taken a batch of run.batches() by next(), and has not gone "
                "through the rest: its loss would be weighed as one of that batch, and a run that goes on "
                "would begin with the first batch again. Make one Dataset of both, as "
                "torch.utils.data.StackDataset does.",
                said_by=ANYONE,
            )

    def _check_took_steps(self, dealt: Batches) -> None:
        """Raises UserError where the source of an epoch's steps has given no batch."""
        if self.epoch_step:
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
            f"run.steps() got no batch of its {kind} in epoch {self.epoch}. {remedy}",
            said_by=ANYONE,
        )

    def _check_left_pieces(self) -> None:
        """Raises UserError where a loop over run.pieces() was left by `break`."""
        if self._has_left_pieces:
            raise UserError(
                "A loop over run.pieces() was left by `break`. The ranks add up their gradients in the "
                "last piece only, so go through all of them.",
                said_by=ANYONE,
            )

    def _check_source(self, dealt: Batches) -> None:
        """Raises UserError where the epoch was begun with another source, and goes on in its middle."""
        here = dealt.described()
        there = self._kept.source
        if self._kept.position.epoch_steps and there is not None and there != here:
            differing = configs.differing(there, here)
            raise UserError(
                f"{self._resumed} stands in the middle of an epoch of other batches: {differing}. Give the "
                "same batches, or another name for the run.",
                said_by=ANYONE,
            )
        self._kept.source = here

    def backward(self, loss: torch.Tensor, *, reduction: str = "mean") -> None:
        """loss.backward(), weighted so that every example of the global batch counts the same.

        loss: a scalar, the mean over the examples of this rank's share, as torch's losses give it. With
        reduction="sum" it is their sum, as torch's losses give it with the same words. Call it within
        run.steps(). Raises UserError elsewhere, and where the loss is no scalar, or has no gradient. A loss
        that is not finite ends the run before its next checkpoint, or in run.take_step().
        """
        share = self._dealt("run.backward()")
        if self._takes_steps and self._is_reproducible and not self._is_in_shares:
            raise outside_of_pieces("run.backward()")
        if not self._takes_steps:
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
        if self._stops_at_nonfinite:
            self._kept.means.note_weight(weight)
        self._losses.append(loss.detach())
        if not self._config.trainer.detect_anomaly:
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

    def _detecting_anomalies(self) -> AbstractContextManager[None]:
        """With allranks.open(detect_anomaly=True) the steps in the block are looked at."""
        if not self._config.trainer.detect_anomaly:
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
        place = f"rank {self.rank} in step {self.step + 1} (epoch {self.epoch + 1})"
        return UserError(f"{found} This was on {place}. {IF_FOUND}", said_by=ANYONE)

    def take_step(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> bool:
        """optimizer.step(), as the training that comes with allranks takes it; whether it was taken.

        clip_norm: the gradient of the optimizer's parameters is scaled down to this L2 norm, if it is
        larger. scaler: the GradScaler by which the loss was multiplied; its step() and update() are called.
        All ranks call, within run.steps(), after run.backward(). Gradients are left as they are: call
        optimizer.zero_grad() afterwards.

        Where the gradient is not finite, no rank takes the step, and the run ends with a message that names
        it, before the weights are spoilt. With allranks.open(stop_at_nonfinite=False) the run goes on: rank
        0 warns, and what run.log() got in the step is left out of the epoch's means. A GradScaler leaves
        out steps that overflow, and lowers its scale; their figures count, and nothing is said until the
        scale is very low. Raises UserError for what is no optimizer, no norm or no GradScaler, and outside
        of run.steps().
        """
        if not self._is_stepping:
            raise UserError(
                "run.take_step() belongs into a loop over run.steps(): it takes one of its steps.",
                said_by=ANYONE,
            )
        if self._is_in_shares:
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
            tell_not_finite(
                losses, self._kept.position, self._runtime, self._stops_at_nonfinite, IF_NOT_FINITE
            )
            self._kept.means.leave_out_step()
            return False
        # A GradScaler that has left out a step has lowered its scale, and tells it in no other way.
        return scaler is None or scaler.get_scale() >= scale

    def pieces(self, batch: Any, count: int = 1) -> Iterator[Any]:
        """Cuts a batch of run.steps() into at most `count` pieces, which saves memory; gradients add up.

        Within the loop over them, run.backward() weighs each piece by its examples. The ranks exchange
        gradients only in the last one.

        In a run with virtual_ranks a rank may have several shares of a batch. Then the loop goes through
        all of them, each in so many pieces, and the gradient is there after the loop.
        """
        share = self._dealt("run.pieces()")
        if count < 1:
            raise UserError(f"run.pieces() got count={count}: give 1 or more.", said_by=ANYONE)
        try:
            if isinstance(batch, StepShares) and self._is_in_shares:
                raise within_pieces("run.pieces()")
            if isinstance(share.batch, StepShares):
                yield from self._pieces_of_shares(as_it_came(batch, share), count)
                return
            wanted = most_pieces(share.total, self._runtime.share_count, count)
            parts = self._cut(batch, share, count, wanted)
            with self._gradients.in_pieces():
                for number, part in enumerate(parts, 1):
                    self._in_hand = part
                    with self._gradients.piece(is_last=number == len(parts)):
                        yield part.batch
        except GeneratorExit:
            self._has_left_pieces = True
            raise
        finally:
            self._in_hand = share

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
        seed = self._config.seed
        again = self._loops_in_step
        self._loops_in_step += 1
        self._is_in_shares = True
        try:
            for row in self._gradients.each_share(seed, self.step, again):
                share = batch.shares[row]
                untried = [each for each in self._gradients.models if each not in self._tried]
                before = [buffers_of(each) for each in untried]
                for part in self._cut(share.batch, share, count, wanted=0):
                    self._in_hand = part
                    yield part.batch
                for model, buffers in zip(untried, before, strict=True):
                    self._try(model, buffers)
        finally:
            self._is_in_shares = False
        # What the program draws now does not depend on which shares this rank has had.
        reseed(mixed(seed, self.step, _OF_NO_SHARE, self._loops_in_step), self.device)

    def _try(self, model: nn.Module, before: Mapping[str, torch.Tensor]) -> None:
        """Raises UserError where a model has changed a buffer, in the first share that it has computed.

        `before` are its buffers before that share.
        """
        try:
            refuse_changed_buffers(
                before, model, type(model).__name__, self._reproducible_by, "leave virtual_ranks out"
            )
        except UserError as error:
            error.said_by = ANYONE
            raise
        # A model that has no gradient yet has taken no part, as one half of a GAN in the other's loop.
        if any(parameter.grad is not None for parameter in model.parameters()):
            self._tried.add(model)

    def _before_optimizer(self, *_: Any) -> None:
        """An optimizer calls this before each step. Raises UserError where gradients are not added up."""
        if self._is_in_shares:
            raise within_pieces("The step of an optimizer")

    def log(self, figures: Mapping[str, Any]) -> None:
        """Records figures, by name.

        Within run.steps(): each is a mean over this rank's share, a number or a scalar tensor. The epoch
        gets the mean over all of its examples and all ranks. After run.steps(): each is a figure of the
        epoch as it is, the same on all ranks, such as one of run.mean(). After run.epochs(): a figure of
        the whole run, for summary.json. Raises UserError for what is no number, and for a name that
        allranks writes itself, such as epoch.
        """
        self._check_open("run.log()")
        check_log(figures, is_of_epoch=self._in_epochs)
        for name, value in figures.items():
            if self._is_stepping and self._in_hand is not None:
                for share in shares_of(self._in_hand):
                    self._kept.means.add(name, value, share.counted, share.row)
                    self._steps.add(name, value, share.counted, share.row)
            elif self._in_epochs and self._loop is not None:
                self._loop.log({name: as_number(value)})
            else:
                self._figures[name] = as_number(value)

    def _compare_figures(self, figures: Mapping[str, float]) -> None:
        """Warns, on rank 0, of figures that differ between the ranks: those of rank 0 are recorded."""
        differing = names_that_differ(figures, self._runtime)
        new = [name for name in differing if name not in self._told_to_differ]
        self._told_to_differ.update(new)
        if new and self.is_main:
            log.warning(
                "run.log() got other values of %s on other ranks; those of rank 0 are recorded. What "
                "run.mean(), run.means() and run.metric() give is the same on all ranks.",
                some(new),
            )

    def mean(self, values: Iterable[Any]) -> float:
        """The mean over all examples of all ranks, equal on any number of ranks but for rounding.

        values: for each batch of run.batches() the mean over the examples of this rank's share, a number or
        a scalar tensor, as in `run.mean(loss(x, y) for x, y in run.batches(val_set, ...))`. All ranks call.
        Raises UserError for what is no number, and where there are no examples. Where the ranks have agreed
        to stop between two batches, the program ends here with exit code 85.
        """
        measuring = Measuring(self._runtime, "run.mean()", names=[""])
        return self._measured(measuring, ({"": value} for value in values))[""]

    def means(self, values: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Several means by name, in one pass over the batches; each is over all examples of all ranks.

        values: for each batch of run.batches() a dict with the same names. Each value is a mean over the
        examples of this rank's share, a number or a scalar tensor. All ranks call. Raises UserError for
        what is no number, and where there are no examples. Where the ranks have agreed to stop between two
        batches, the program ends here with exit code 85.
        """
        return self._measured(Measuring(self._runtime, "run.means()"), values)

    def _measured(self, measuring: Measuring, values: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """What run.mean() and run.means() find in the values."""
        self._check_open("run.mean()")
        self._leave_alike()
        if self._is_in_shares:
            raise within_pieces(measuring.what)
        before = self._in_hand
        self._passed = 0
        # What is in hand now may have one value, or in a step of a reproducible run one for each share.
        in_hand = () if before is None else shares_of(before)
        # Within a step the ranks do not stop: they may at its end anyway.
        may_stop = self._loop is not None and not self._is_stepping
        with self._stopping(), self._stops.between_batches() if may_stop else nullcontext():
            of_batch_in_hand = 0
            for figures in values:
                share = self._in_hand
                if share is before:
                    if of_batch_in_hand == len(in_hand):
                        raise _too_many(measuring, before)
                    share = in_hand[of_batch_in_hand]
                    of_batch_in_hand += 1
                measuring.add(figures, share)
            if 0 < of_batch_in_hand < len(in_hand):
                raise one_for_each_share(measuring.what, len(in_hand), str(of_batch_in_hand))
            if may_stop:
                self._stops.after_last_batch()
        self._in_hand = before
        # The batches of the steps are compared elsewhere (Means.gather), so a step is not made slower here.
        return measuring.means(None if of_batch_in_hand else self._passed)

    def metric(self, metric: Any) -> Metric:
        """A metric that is no mean, such as an AUROC, exact on any number of ranks.

        metric: an object of torchmetrics. The run takes a copy of it. Call update(...) of what is returned
        for each batch of run.batches(), and compute() after the last one. Raises UserError for another
        object.
        """
        self._check_open("run.metric()")
        return Metric(metric, self._runtime, self._evaluated)

    def _evaluated(self, what: str) -> Dealt:
        """This rank's share of the batch of run.batches() that the program has; raises UserError."""
        if self._is_stepping or self._in_hand is None:
            raise UserError(
                f"{what} belongs into a loop over run.batches(). In a step of run.steps() what it has seen "
                "would be lost where a run goes on in the middle of an epoch.",
                said_by=ANYONE,
            )
        return self._in_hand

    def share(self, items: Iterable[Any], work: Callable[[Any], Any], name: str = "items") -> list[Any]:
        """work(item) for each item, each on one rank; the results in the order of the items, on all ranks.

        Each result is kept in the run directory as soon as it is there: numbers, texts, tensors, arrays, in
        lists, tuples and dicts. A run that goes on works on what is left. Random numbers of an item are the
        same on any rank. `name` tells several such works of one run apart. Raises UserError for a result
        that cannot be kept. Where the ranks have agreed to stop, the program ends here with exit code 85.
        """
        self._begin(None)
        if name in self._shared:
            raise UserError(
                f"run.share() has done a work with the name {name} in this run: give each work a name of "
                "its own, run.share(items, work, name=...), under which its results are kept.",
                said_by=ANYONE,
            )
        self._shared.add(name)
        sharing = Sharing(
            self._runtime, self._control, self.directory / "share" / name, self._config.watchdog.step_s
        )
        with self._stopping():
            return sharing.results(items, work, self._config.seed)

    def heartbeat(self) -> None:
        """Tells the watchdog that this rank is well. Only work of minutes without a step needs it."""
        self._runtime.progress.worked()

    # --- how it ends ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """The run has come to its end: saves, writes summary.json and the report. The last call of a run.

        Started again, the program then ends at once in allranks.open().
        """
        self._check_open("run.finish()")
        self._end_held_steps()
        if self._in_epochs:
            raise UserError(
                "run.finish() is called within run.epochs(), before the epoch has come to its end: call it "
                "after the loop, and leave the loop by `break` where the run is to end early.",
                said_by=ANYONE,
            )
        loop = self._begin(None)
        # A run that goes on from what is saved now does not enter the loop again, even where that was left
        # by `break`.
        epochs = self._control.epochs
        self._kept.is_over = self._has_open_epoch or (epochs is not None and self.epoch < epochs)
        self._close_left_epoch(loop)
        self._saver.save()
        self._saver.finish()
        summary = self._summarized()
        self._report.finished(summary)
        self._records.finished(summary)
        self._close()
        if self.is_main and self._config.report:
            from allranks.report import at_end

            ended = [at_end.ToReport(self._path, self._records)]
            is_quiet = self._config.console == "quiet"
            at_end.finish(
                ended, self._runtime.identity, self._control.left_s, self._signals, is_quiet,
                leaves_mpi=not self.is_one_of_several,
            )  # fmt: skip
        else:
            self._records.close()
        self._summary = summary
        if not self.is_one_of_several:
            mpi.leave(0)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, where: TracebackType | None
    ) -> None:
        if raised is None:
            if self.is_open:
                self.finish()
        elif self.is_open:
            if isinstance(raised, SystemExit):
                said = f" It says: {raised.code}" if isinstance(raised.code, str) else ""
                missed = UserError(
                    f"The program has ended by itself before the end of the run {self._path}.{said}"
                )
                if isinstance(raised.code, int) and raised.code:
                    missed.code = raised.code
                raised = missed
            self.fail(raised)

    def _summarized(self) -> dict[str, Any]:
        models = [each for each in self._kept.objects.values() if isinstance(each, nn.Module)]
        summary: dict[str, Any] = {
            "state": "finished",
            "epochs": self.epoch,
            "steps": self.step,
            "world_size": self.world_size,
        }
        if models:
            summary["model/parameters"] = sum(p.numel() for model in models for p in model.parameters())
            summary["model/sha256"] = weights_sha256(
                nn.ModuleList(models) if len(models) > 1 else models[0]
            )
        self._compare_figures(self._figures)
        summary |= self._figures
        summary["time/total_s"] = process_age_s() - self._began_s
        summary["time/startup_s"] = self._startup_s
        return summary | last_of(self._kept.position.history)

    def _begin(self, epochs: int | None) -> Loop:
        """The loop; where it has not begun, it begins here, with everything that the program keeps."""
        self._check_open("the loop")
        self._leave_alike()
        if self._loop is not None:
            if epochs is not None:
                self._control.epochs = epochs
                self._report.lengthened(epochs)
            return self._loop
        runtime = self._runtime
        with runtime.all_or_none():
            self._kept.check_all_kept()
        if self.is_main:
            tell_of_models(self._gradients.models, self._kept.objects)
        self._exits.enter_context(telling_of_optimizers(lambda: self._kept.objects, self.is_main))
        # From here on these signals are only counted, and the run saves before it ends.
        self._signals.count(signal.SIGTERM, *FROM_TERMINAL)
        parameters = sum(p.numel() for model in self._gradients.models for p in model.parameters())
        facts = {"model": f"{parameters:,} parameters"} if self._gradients.models else {}
        length = RunLength(epochs or 1, 0, 0)
        position = self._kept.position
        self._report.opened(self._path, position, facts, length, self._resumed, self._saver.check)
        self._records.open(self._path, position, length, self._saver.check, self._is_new)
        self._startup_s = process_age_s() - self._began_s
        self._saver.prepare()
        self._control = Control(runtime, self._saver, self._signals, self._config.checkpoint, epochs)
        trained = self._gradients.models
        kept = [each for each in self._kept.objects.values() if isinstance(each, nn.Module)]
        averages = [each for each in kept if not any(each is model for model in trained)]
        self._loop = Loop(runtime, position, self._control, self._report, self._records, trained, averages)
        self._stops = EvaluationStops(runtime, self._control, self._kept)
        return self._loop

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Where the ranks have agreed to stop in the block, closes the run in order."""
        try:
            yield
        except RunStopped:
            if self.is_open:
                self._saver.finish()
                self._records.stopped()
                self._report.stopped(self._control.reason, self._kept.position, "the same command again")
                self._close()
                mpi.leave(EXIT_REQUEUE)
            raise

    def fail(self, raised: BaseException) -> None:
        """Ends the run after an error of the program, which is told; the other ranks are ended too."""
        self.is_open = False
        self._exits.__exit__(type(raised), raised, raised.__traceback__)

    def _close(self) -> None:
        self.is_open = False
        self._exits.close()

    def _check_open(self, what: str) -> None:
        if not self.is_open:
            raise UserError(f"{what} is called after the run has ended: run.finish() is the last call.")

    def _dealt(self, what: str) -> Dealt:
        if self._in_hand is None:
            raise UserError(
                f"{what} belongs into a loop over run.steps() or run.batches(): it needs to know how many "
                "examples this rank has in hand.",
                said_by=ANYONE,
            )
        return self._in_hand


class OwnBatches:
    """Batches dealt out to the ranks, for one run. Going through them yields this rank's shares."""

    def __init__(self, run: Run, dealt: Batches) -> None:
        self._run = run
        self.dealt = dealt

    def __len__(self) -> int:
        """The global batches of an epoch; raises TypeError where the source does not say it."""
        count = self.dealt.count
        if count is None:
            raise TypeError(f"{type(self.dealt.source).__name__} does not say how many batches it has")
        return count

    def __iter__(self) -> Iterator[Any]:
        run = self._run
        run._leave_alike()
        if run._is_in_shares:
            raise within_pieces("run.batches()")
        is_stepping = run._is_stepping
        before = run._in_hand
        drawn = _drawn() if run._is_reproducible else None
        try:
            with self.dealt.explained():
                for number, share in enumerate(self.dealt.epoch(0)):
                    run._in_hand = share
                    run._is_stepping = False
                    run._passed = zlib.crc32(b"%d %d " % (share.digest, share.examples), run._passed)
                    if drawn is not None:
                        mine = run._runtime.shares
                        reseed(mixed(drawn, number // len(mine), mine[share.row]), run.device)
                    yield share.batch
                    run._runtime.progress.evaluated_batch()
                    if run._loop is not None:
                        run._stops.after_batch()
        finally:  # also where the loop is left by `break`
            run._in_hand = before
            run._is_stepping = is_stepping
            if drawn is not None:
                reseed(mixed(drawn, _OF_NO_SHARE), run.device)


def _too_many(measuring: Measuring, in_hand: Dealt | None) -> UserError:
    """The error of a program that has given more values to run.mean() than it has batches in hand."""
    if in_hand is not None and isinstance(in_hand.batch, StepShares):
        return one_for_each_share(measuring.what, len(in_hand.batch.shares), "more")
    return measuring.takes_them_one_by_one()


def _drawn() -> int:
    """A random number, the same on all ranks where their random numbers have been the same up to now."""
    return int(torch.randint(2**62, ()))


def _summary_in(directory: str) -> dict[str, Any]:
    """The content of the summary.json of a run that has finished."""
    summary: dict[str, Any] = json.loads((Path(directory) / "summary.json").read_text())
    return summary
