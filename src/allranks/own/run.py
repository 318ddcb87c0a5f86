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

Run is what the program sees. What its calls do is in the other files of this folder:

    lifecycle.py   how a run is opened, begins, stops and ends
    place.py       where in its loops the program stands, and which batch it has in hand
    epochs.py      run.epochs() and run.steps()
    stepping.py    run.pieces(), run.backward() and run.take_step()
    batches.py     run.batches()
    measuring.py   run.mean() and run.means()
    figures.py     run.log()
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import nn

from allranks.base.errors import ANYONE, UserError
from allranks.config import Config
from allranks.own.batches import OwnBatches, own_batches
from allranks.own.epochs import Epochs
from allranks.own.figures import LoggedFigures
from allranks.own.keeping import check_kept
from allranks.own.lifecycle import How, Lifecycle
from allranks.own.measuring import Measuring, measured
from allranks.own.metric import Metric
from allranks.own.place import LoopPlace
from allranks.own.sharing import Sharing
from allranks.own.stepping import Stepping
from allranks.own.taking import check_counted
from allranks.own.wrapping import wrapped
from allranks.runtime.settling import random_numbers_kept
from allranks.training.flops import Flops
from allranks.training.gradients import inner
from allranks.training.reproducible import refuse_batch_norm


class Run:
    """One run of a user's own loop, on one rank. allranks.open() makes it."""

    def __init__(self, config: Config, how: How, exits: ExitStack) -> None:
        """Brings the ranks up, takes the run directory, and finds where the run goes on.

        `exits` is closed when the run ends, in whatever way. Raises UserError.
        """
        self.lifecycle = Lifecycle(config, how, exits)
        self._place = LoopPlace(self.lifecycle)
        self._figures = LoggedFigures(self.lifecycle, self._place)
        self._stepping = Stepping(self.lifecycle, self._place)
        self._epochs = Epochs(self.lifecycle, self._place, self._stepping, self._figures)
        self._shared: set[str] = set()  # the names of the works that run.share() has done

    # --- what the program may ask --------------------------------------------------------------------

    @property
    def rank(self) -> int:
        """This rank's number, from 0."""
        return self.lifecycle.runtime.rank

    @property
    def world_size(self) -> int:
        """The number of ranks."""
        return self.lifecycle.runtime.world_size

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0."""
        return self.lifecycle.runtime.is_main

    @property
    def device(self) -> torch.device:
        """Where this rank computes."""
        return self.lifecycle.runtime.device

    @property
    def directory(self) -> Path:
        """The run directory, the same on all ranks."""
        return self.lifecycle.directory

    @property
    def is_finished(self) -> bool:
        """Whether the run has come to its end, now or in an earlier start (allranks.open(several=True))."""
        return self.lifecycle.summary is not None

    @property
    def summary(self) -> Mapping[str, Any]:
        """What summary.json holds of a run that has finished, such as the figures logged at its end."""
        if self.lifecycle.summary is None:
            raise UserError(
                "run.summary is there once the run has finished: call run.finish().", said_by=ANYONE
            )
        return self.lifecycle.summary

    @property
    def step(self) -> int:
        """The steps that are completed, those of earlier starts included."""
        return self.lifecycle.kept.position.step

    @property
    def epoch(self) -> int:
        """The epochs that are completed, those of earlier starts included."""
        return self.lifecycle.kept.position.epoch

    @property
    def epoch_step(self) -> int:
        """The steps that are completed in this epoch, those of earlier starts included."""
        return self.lifecycle.kept.position.epoch_steps

    @property
    def examples(self) -> int:
        """How many examples this rank's share of the present batch has.

        It is 0 where the batch has fewer examples than there are ranks, and this rank got one only so that
        it has something to compute with.
        """
        return self._place.dealt("run.examples").counted

    # --- before the loop -----------------------------------------------------------------------------

    def wrap(
        self, model: nn.Module | Callable[[], nn.Module], *, unused_parameters: bool = False
    ) -> nn.Module:
        """The model on this rank's device. On several ranks it is in DDP, which adds up the gradients.

        With allranks.open(sharding={"kind": "fsdp"}) it is spread over the ranks. Then give a function that
        makes it, such as its class, and no rank ever holds all of it. `unused_parameters`: whether a step
        may leave out some of its parameters. Raises UserError for a model that cannot be trained.
        """
        self.lifecycle.check_open("run.wrap()")
        made = wrapped(model, self.lifecycle.gradients, self.lifecycle.runtime.device, unused_parameters)
        if self.lifecycle.is_reproducible:
            with self.lifecycle.runtime.all_or_none():
                refuse_batch_norm(made, self.lifecycle.reproducible_by)
        return made

    def keep(self, **objects: Any) -> None:
        """Says what a checkpoint holds, by name, and restores it if the run goes on from one.

        Each object needs state_dict() and load_state_dict(). Call it before the loop begins. Raises
        UserError for an object without these, and for a checkpoint that does not fit.
        """
        self.lifecycle.check_open("run.keep()")
        if self.lifecycle.loop is not None:
            raise UserError("run.keep() comes before run.epochs() and run.steps().", said_by=ANYONE)
        for name, given in objects.items():
            check_kept(name, given)
            with self.lifecycle.runtime.all_or_none():
                self.lifecycle.kept.keep(name, inner(given) if isinstance(given, nn.Module) else given)
            if self.lifecycle.is_reproducible and isinstance(given, torch.optim.Optimizer):
                hook = given.register_step_pre_hook(self._stepping.before_optimizer)
                self.lifecycle.exits.callback(hook.remove)

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
        return own_batches(
            source,
            self.lifecycle,
            self._place,
            batch_size=batch_size,
            shuffle=shuffle,
            workers=workers,
            collate=collate,
        )

    def count_flops(
        self, compute: Callable[[], object], *, examples: int, precision: str = "fp32"
    ) -> float | None:
        """Counts the floating-point operations of a training step, of which each epoch's record then tells.

        compute: takes a forward and a backward pass over so many `examples`, and is called once, or twice
        if torch needs that. It changes gradients, and buffers such as those of BatchNorm: let it use a copy
        of the model. All ranks call; random numbers stay as they are. precision: fp64, fp32, bf16 or fp16,
        in which most of it is computed: a GPU's share of its peak follows from it.

        Returns the operations for one example. If the work of one of them is not known, this returns None,
        and nothing is recorded. Raises UserError if an argument is not what is described here.
        """
        self.lifecycle.check_open("run.count_flops()")
        check_counted(compute, examples, precision)
        flops = Flops()
        with random_numbers_kept(self.lifecycle.runtime.device):
            flops.during(compute)
        per_example = flops.count / examples if flops.count else None
        self.lifecycle.records.counted(per_example, flops.has_convolutions, precision)
        return per_example

    # --- the loop ------------------------------------------------------------------------------------

    def epochs(self, count: int) -> Iterator[int]:
        """Yields the number of each epoch that is left, from 0. `count`: how many the whole run has.

        After each epoch its figures are kept, the ranks are compared, and a checkpoint is saved. The same
        happens to an epoch that is left by `break` after its steps. If the ranks have agreed to stop, the
        program ends here with exit code 85.
        """
        return self._epochs.epochs(count)

    def steps(self, batches: Any, *, steps_per_save: int = 1) -> Iterator[Any]:
        """Yields the batches of the epoch that are left; the loop's body takes one step on each.

        In a run with virtual_ranks, give what it yields to run.pieces(), which goes through its shares.

        `batches` is what run.batches() takes or returns. If the program adds up gradients over several
        steps, `steps_per_save` is their number: then a checkpoint is saved only between two such groups of
        steps. If the ranks have agreed to stop, the program ends here with exit code 85. Outside of
        run.epochs() all steps are one epoch.
        """
        return self._epochs.steps(batches, steps_per_save)

    def backward(self, loss: torch.Tensor, *, reduction: str = "mean") -> None:
        """loss.backward(), weighted so that every example of the global batch counts the same.

        loss: a scalar, the mean over the examples of this rank's share, as torch's losses give it. With
        reduction="sum" it is their sum, as torch's losses give it with the same words. Call it within
        run.steps(). Raises UserError elsewhere, and if the loss is not a scalar or has no gradient. A loss
        that is not finite ends the run before its next checkpoint, or in run.take_step().
        """
        self._stepping.backward(loss, reduction=reduction)

    def take_step(
        self,
        optimizer: torch.optim.Optimizer,
        *,
        clip_norm: float | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> bool:
        """Takes optimizer.step() as the shipped training does; returns whether it was taken.

        clip_norm: the gradient of the optimizer's parameters is scaled down to this L2 norm, if it is
        larger. scaler: the GradScaler by which the loss was multiplied; its step() and update() are called.
        All ranks call, within run.steps(), after run.backward(). Gradients are left as they are: call
        optimizer.zero_grad() afterwards.

        If the gradient is not finite, no rank takes the step, and the run ends with a message that names
        it, before the weights are spoilt. With allranks.open(stop_at_nonfinite=False) the run goes on: rank
        0 warns, and what run.log() got in the step is left out of the epoch's means. A GradScaler leaves
        out steps that overflow, and lowers its scale; their figures count, and nothing is said until the
        scale is very low. Raises UserError if an argument is not what is described here, and outside of
        run.steps().
        """
        return self._stepping.take_step(optimizer, clip_norm=clip_norm, scaler=scaler)

    def pieces(self, batch: Any, count: int = 1) -> Iterator[Any]:
        """Cuts a batch of run.steps() into at most `count` pieces, which saves memory; gradients add up.

        Within the loop over them, run.backward() weighs each piece by its examples. The ranks exchange
        gradients only in the last one.

        In a run with virtual_ranks a rank may have several shares of a batch. Then the loop goes through
        all of them, each in so many pieces, and the gradient is there after the loop.
        """
        return self._stepping.pieces(batch, count)

    def log(self, figures: Mapping[str, Any]) -> None:
        """Records figures, by name.

        Within run.steps(): each is a mean over this rank's share, a number or a scalar tensor. The epoch
        gets the mean over all of its examples and all ranks. After run.steps(): each is a figure of the
        epoch as it is, the same on all ranks, such as one of run.mean(). After run.epochs(): a figure of
        the whole run, for summary.json. Raises UserError for a value that is not a number, and for a name
        that allranks writes itself, such as epoch.
        """
        self._figures.log(figures)

    def mean(self, values: Iterable[Any]) -> float:
        """The mean over all examples of all ranks, equal on any number of ranks but for rounding.

        values: for each batch of run.batches() the mean over the examples of this rank's share, a number or
        a scalar tensor, as in `run.mean(loss(x, y) for x, y in run.batches(val_set, ...))`. All ranks call.
        Raises UserError for a value that is not a number, and if there are no examples. If the ranks have
        agreed to stop between two batches, the program ends here with exit code 85.
        """
        measuring = Measuring(self.lifecycle.runtime, "run.mean()", names=[""])
        return measured(measuring, ({"": value} for value in values), self.lifecycle, self._place)[""]

    def means(self, values: Iterable[Mapping[str, Any]]) -> dict[str, float]:
        """Several means by name, in one pass over the batches; each is over all examples of all ranks.

        values: for each batch of run.batches() a dict with the same names. Each value is a mean over the
        examples of this rank's share, a number or a scalar tensor. All ranks call. Raises UserError for
        a value that is not a number, and if there are no examples. If the ranks have agreed to stop between
        two batches, the program ends here with exit code 85.
        """
        measuring = Measuring(self.lifecycle.runtime, "run.means()")
        return measured(measuring, values, self.lifecycle, self._place)

    def metric(self, metric: Any) -> Metric:
        """A metric that is not a mean, such as an AUROC, exact on any number of ranks.

        metric: an object of torchmetrics. The run takes a copy of it. For each batch of run.batches() call
        update(...) of the object that this returns, and compute() after the last batch. Raises UserError
        for an object of another kind.
        """
        self.lifecycle.check_open("run.metric()")
        return Metric(metric, self.lifecycle.runtime, self._place.evaluated)

    def share(self, items: Iterable[Any], work: Callable[[Any], Any], name: str = "items") -> list[Any]:
        """Calls work(item) for each item, each on one rank; returns the results on all ranks, in order.

        Each result is kept in the run directory as soon as it is there: numbers, texts, tensors, arrays, in
        lists, tuples and dicts. A run that goes on works on what is left. Random numbers of an item are the
        same on any rank. `name` tells several such works of one run apart. Raises UserError for a result
        that cannot be kept. If the ranks have agreed to stop, the program ends here with exit code 85.
        """
        self._place.begin(None)
        if name in self._shared:
            raise UserError(
                f"run.share() has done a work with the name {name} in this run: give each work a name of "
                "its own, run.share(items, work, name=...), under which its results are kept.",
                said_by=ANYONE,
            )
        self._shared.add(name)
        sharing = Sharing(
            self.lifecycle.runtime,
            self.lifecycle.control,
            self.lifecycle.directory / "share" / name,
            self.lifecycle.config.watchdog.step_s,
        )
        with self.lifecycle.stopping():
            return sharing.results(items, work, self.lifecycle.config.seed)

    def heartbeat(self) -> None:
        """Tells the watchdog that this rank is well. Only work of minutes without a step needs it."""
        self.lifecycle.runtime.progress.worked()

    # --- how it ends ---------------------------------------------------------------------------------

    def finish(self) -> None:
        """The run has come to its end: saves, writes summary.json and the report. The last call of a run.

        Started again, the program then ends at once in allranks.open().
        """
        self.lifecycle.check_open("run.finish()")
        self._epochs.end()
        self.lifecycle.save_last()
        self._figures.compare(self._figures.of_run)
        self.lifecycle.finish(self._figures.of_run)

    def __enter__(self) -> Run:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, raised: BaseException | None, where: TracebackType | None
    ) -> None:
        if raised is None:
            if self.lifecycle.is_open:
                self.finish()
        elif self.lifecycle.is_open:
            if isinstance(raised, SystemExit):
                said = f" It says: {raised.code}" if isinstance(raised.code, str) else ""
                missed = UserError(
                    "The program has ended by itself before the end of the run "
                    f"{self.lifecycle.path}.{said}"
                )
                if isinstance(raised.code, int) and raised.code:
                    missed.code = raised.code
                raised = missed
            self.fail(raised)

    def fail(self, raised: BaseException) -> None:
        """Ends the run and all ranks after an error of the program, and tells the user of it."""
        self.lifecycle.fail(raised)
