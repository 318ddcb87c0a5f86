"""`run.metric()`: a metric that is not a mean, over the examples of all ranks.

    auroc = run.metric(torchmetrics.classification.BinaryAUROC())
    for inputs, labels in run.batches(val_set, batch_size=256, shuffle=False):
        auroc.update(model(inputs), labels)
    run.log({"val/auroc": auroc.compute()})

The mean of the ranks' own AUROCs would be another number. So each rank's copy of the metric sees the
examples of its rank, and compute() puts together what all of them have seen (training/metrics.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from allranks.base.errors import ANYONE, UserError
from allranks.data.batches import Dealt
from allranks.own.place import ALIKE_S
from allranks.runtime.runtime import Runtime
from allranks.training.metrics import computed, is_one_number, merged, problem_of, seeing_shares

_ALIKE = "the other ranks to call compute() of a run.metric(), as this one has: all must"


class Metric:
    """A metric of torchmetrics, over the examples of all ranks. run.metric() makes it."""

    def __init__(self, metric: Any, runtime: Runtime, evaluated: Callable[[str], Dealt]) -> None:
        """Takes a copy of the metric, which has seen nothing yet.

        `evaluated` gives this rank's share of the batch that the program has in hand. It raises UserError,
        in which its argument names the call, where that is not a batch of an evaluation. Raises UserError
        if `metric` is none of torchmetrics.
        """
        problem = problem_of(metric)
        if problem:
            raise UserError(
                f"run.metric() got {problem}: give an object of torchmetrics, such as "
                'torchmetrics.AUROC(task="binary"), or of a class derived from torchmetrics.Metric.',
                said_by=ANYONE,
            )
        self._metric = metric
        self._called = f"run.metric({type(metric).__name__})"
        self._runtime = runtime
        self._evaluated = evaluated
        self.reset()

    def reset(self) -> None:
        """Forgets what the metric has seen, as after an evaluation that was left before compute()."""
        self._seen = seeing_shares(self._metric, self._runtime)

    def update(self, *arguments: Any, **named: Any) -> None:
        """Shows the metric this rank's share of a batch: the arguments are those of torchmetrics' update().

        Call it for each batch of run.batches(). A share that does not count, where a batch has fewer
        examples than there are ranks, is left out. Raises UserError outside of such a loop.
        """
        share = self._evaluated(f"{self._called}.update()")
        if share.counted:
            self._seen[share.row].update(*arguments, **named)

    def compute(self) -> Any:
        """The metric of all that was shown to it on all ranks; it then begins anew. All ranks call.

        Returns a float where the metric is one number, and a dict of floats where it is several by name.
        Anything else, such as a confusion matrix, is returned as torchmetrics gives it. Raises UserError
        if nothing was shown to it, and if it cannot be computed of what was shown.
        """
        self._runtime.meeting.all_alike(f"{self._called}.compute()", _ALIKE, ALIKE_S)
        seen = self._seen
        self.reset()
        [updates] = self._runtime.add_up([sum(of_share._update_count for of_share in seen)])
        if not updates:
            raise UserError(
                f"{self._called}.compute() has no examples: call update() in a loop over run.batches() "
                "first.",
                said_by=0,
            )
        whole = merged(seen, self._runtime)
        value = computed(whole, self._called, "look at what update() is given")
        if isinstance(value, Mapping):
            return {name: _as_float(each) for name, each in value.items()}
        return _as_float(value)


def _as_float(value: Any) -> Any:
    return float(value) if is_one_number(value) else value
