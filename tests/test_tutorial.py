"""The tutorial's figures on real MNIST (shared/facts/tutorial.md), with seed 0."""

from __future__ import annotations

import pytest

from helpers import real_data


@pytest.fixture(autouse=True)
def mnist(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ALLRANKS_DATA", str(real_data()))


def check_linear(run) -> None:
    assert run.column("lr") == [0.05] * 5
    assert run.column("step") == [375, 750, 1125, 1500, 1875]
    assert run.metrics[-1]["val/accuracy"] == pytest.approx(90.2, abs=0.5)
    assert run.metrics[-1]["train/accuracy"] == pytest.approx(90.4, abs=0.5)
    assert run.metrics[0]["val/accuracy"] == pytest.approx(87.7, abs=0.7)
    assert run.summary["test/accuracy"] == pytest.approx(90.9, abs=0.5)
    assert run.summary["test/loss"] == pytest.approx(0.3325, abs=0.01)
    assert (run.summary["val/count"], run.summary["test/count"]) == (12_000, 10_000)
    assert run.summary["model/parameters"] == 7850


def test_tutorial_linear(train_here):
    check_linear(train_here("experiment=tutorial_linear", "device=cpu", "threads=1"))


@pytest.mark.long
def test_tutorial_linear_on_two_ranks(train):
    overrides = ("experiment=tutorial_linear", "device=cpu", "threads=1")
    check_linear(
        train(*overrides, under="mpiexec", ranks=2, env={"ALLRANKS_DATA": str(real_data())}).ok().run
    )


@pytest.mark.long
def test_tutorial_mlp(train_here):
    run = train_here("experiment=tutorial_mlp", "device=cpu", "threads=1")
    assert run.metrics[-1]["val/accuracy"] == pytest.approx(93.6, abs=0.7)
    assert run.summary["test/accuracy"] == pytest.approx(93.7, abs=0.8)
    assert run.summary["model/parameters"] == 44_860


@pytest.mark.long
def test_tutorial_step(train_here):
    run = train_here("experiment=tutorial_step", "device=cpu", "threads=1")
    assert run.column("lr") == pytest.approx([0.1, 0.1, 0.01, 0.01, 0.001, 0.001])
    assert run.metrics[-1]["val/accuracy"] == pytest.approx(93.3, abs=0.7)
    assert run.summary["test/accuracy"] == pytest.approx(93.4, abs=0.9)
