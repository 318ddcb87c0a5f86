"""Which epoch of a run is the best, by the key `checkpoint.best`. No torch.

The key is a text: the name of a metric, and whether its lowest or its highest value is the best, such as
`val/loss min` or `val/accuracy max`. Everything that names a best epoch asks this module: the checkpoint
that is kept, the table in the terminal, `allranks watch`, the pages of runs, comparisons, and
`--checkpoint best`.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, NamedTuple

from allranks.base.errors import UserError
from allranks.base.text import did_you_mean
from allranks.config import BEST, BEST_BY_DEFAULT
from allranks.run.metric_names import as_number

KEY = "checkpoint.best"


class Rule(NamedTuple):
    """By which metric the epochs of a run are compared."""

    metric: str  # as in metrics.jsonl, such as `val/loss`
    lower_is_better: bool

    @property
    def text(self) -> str:
        """The rule as the configuration spells it."""
        return f"{self.metric} {'min' if self.lower_is_better else 'max'}"

    @property
    def words(self) -> str:
        """The rule in a sentence: `lowest val/loss`."""
        return f"{'lowest' if self.lower_is_better else 'highest'} {self.metric}"


def rule_of(text: object) -> Rule:
    """The rule that a value of `checkpoint.best` states.

    The configurations of earlier versions have no such key, and a damaged one may have anything there. For
    both the rule is that of BEST_BY_DEFAULT. The configuration of a training is checked before it begins.
    """
    given = text if isinstance(text, str) and BEST.fullmatch(text) else BEST_BY_DEFAULT
    metric, extreme = given.split()
    return Rule(metric, lower_is_better=extreme == "min")


BY_DEFAULT = rule_of(BEST_BY_DEFAULT)


def best_of(history: Sequence[Mapping[str, Any]], rule: Rule) -> Mapping[str, Any] | None:
    """The best line of a history; of several lines with the same value the last one.

    `history` has lines of metrics.jsonl. None if the metric is in none of them, or is finite in none.
    """
    measured = [line for line in history if value_of(line, rule) is not None]
    if not measured:
        return None
    choose = min if rule.lower_is_better else max
    return choose(reversed(measured), key=lambda line: line[rule.metric])


def value_of(line: Mapping[str, Any], rule: Rule) -> float | None:
    """The value by which a line is compared; None if it is missing, or no finite number."""
    return as_number(line.get(rule.metric))


def check(rule: Rule, metrics: Collection[str]) -> None:
    """Raises UserError if a training that keeps these metrics has none of the rule's name."""
    if rule.metric not in metrics:
        raise UserError(f"{KEY}={rule.text}: {missing(rule, metrics)}")


def missing(rule: Rule, metrics: Collection[str]) -> str:
    """A sentence or two: that there is no metric of the rule's name, and which ones there are."""
    there = ", ".join(metrics) or "none"
    guess = did_you_mean(rule.metric, metrics)
    return f"this training has no metric {rule.metric}. Its metrics are: {there}.{guess}"
