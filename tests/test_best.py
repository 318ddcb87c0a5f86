"""`checkpoint.best`: one rule for the best epoch, and everything that names one follows it."""

from __future__ import annotations

import re

import numpy as np
import pytest

from allranks.base.errors import UserError
from allranks.follow.reading import Reader
from allranks.inference import load
from allranks.report.compare import compare
from allranks.report.gather import gather
from allranks.run import checkpoint
from allranks.run.best import Rule, best_of, check, rule_of
from helpers import SMALL, TRAIN, execute

LEAST_LOSS = Rule("val/loss", lower_is_better=True)
MOST_RIGHT = Rule("val/accuracy", lower_is_better=False)


def line(epoch: int, loss: float | None, accuracy: float = 50.0) -> dict[str, float | int | None]:
    return {"epoch": epoch, "step": 10 * epoch, "val/loss": loss, "val/accuracy": accuracy}


def best_epoch(history: list[dict[str, float | int | None]], rule: Rule) -> float | None:
    found = best_of(history, rule)
    return None if found is None else found["epoch"]


def test_the_lowest_or_the_highest_value_is_the_best_and_of_equal_ones_the_last():
    nan = float("nan")
    history = [line(1, nan), line(2, 0.4, 70.0), line(3, 0.3), line(4, 0.3), line(5, None), line(6, 0.35)]
    assert best_epoch(history, LEAST_LOSS) == 4
    assert best_epoch(history, MOST_RIGHT) == 2
    assert best_epoch(history[:1], LEAST_LOSS) is None
    assert best_epoch([], LEAST_LOSS) is None
    assert best_epoch(history, Rule("val/auroc", lower_is_better=False)) is None


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("val/accuracy max", MOST_RIGHT),
        ("energy min", Rule("energy", lower_is_better=True)),
        (None, LEAST_LOSS),  # the configuration of an earlier version
        ("val/accuracy", LEAST_LOSS),  # a damaged one
        (7, LEAST_LOSS),
    ],
)
def test_the_rule_by_the_configuration(text, rule):
    assert rule_of(text) == rule
    assert rule_of(rule.text) == rule


def test_a_metric_that_a_training_does_not_keep_is_told_with_those_that_it_keeps():
    check(LEAST_LOSS, ["train/loss", "val/loss"])
    with pytest.raises(UserError) as refused:
        check(Rule("val/acuracy", lower_is_better=False), ["val/loss", "val/accuracy"])
    assert str(refused.value) == (
        "checkpoint.best=val/acuracy max: this training has no metric val/acuracy. Its metrics are: "
        "val/loss, val/accuracy. Did you mean val/accuracy?"
    )


@pytest.mark.parametrize("value", ["val/loss", "min val/loss", "val/loss least", "7"])
def test_a_value_that_is_no_rule_is_refused(value, tmp_path):
    told = execute([*TRAIN, *SMALL, f"checkpoint.best={value}"], tmp_path)
    assert told.code == 2
    assert "give a metric and min or max, such as 'val/loss min' or 'val/accuracy max'." in told.message


def test_a_metric_that_the_task_does_not_measure_is_refused_before_the_run_begins(train, tmp_path):
    told = train(*SMALL, "model=linear", "checkpoint.best=val/auroc max", "run.dir=run")
    assert told.code == 2
    assert told.message.endswith(
        "this training has no metric val/auroc. Its metrics are: train/loss, train/accuracy, val/loss, "
        "val/accuracy. Did you mean val/accuracy?"
    )
    assert not (tmp_path / "run").exists()


def test_all_that_names_a_best_epoch_follows_the_rule(train):
    """The worst one by the validation loss, which is another one than the default would take."""
    words = ["model=linear", "trainer.epochs=3", "checkpoint.keep=1", "checkpoint.best=val/loss max"]
    done = train(*SMALL, *words).ok()
    losses = done.run.column("val/loss")
    worst = int(np.argmax(losses))
    assert worst < 2, losses  # the newest is kept in any case
    step = done.run.metrics[worst]["step"]

    run = done.run.path
    assert checkpoint.steps(run) == [done.run.metrics[-1]["step"], step]
    assert checkpoint.step_of(load.choose(run, "best").path) == step
    rows = [line for line in done.out.splitlines() if re.match(r" +[123]/3 ", line)]
    stars = [row.endswith("*") for row in rows]
    assert stars == [loss == max(losses[: place + 1]) for place, loss in enumerate(losses)]
    assert f"epoch {worst + 1}: val loss {max(losses):.4f}" in done.out

    facts = gather(run)
    assert facts.best is not None and facts.best["step"] == step
    assert compare([facts]).rows[0].values["val/loss"].mean == max(losses)
    [view] = Reader([str(run)], print).views()
    assert (view.best_epoch, view.best_by) == (worst + 1, "highest val/loss")
