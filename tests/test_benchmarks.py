"""The programs in benchmarks/ that reach into the training still fit it. They measure nothing here."""

import sys

import pytest

from helpers import ROOT, SMALL


@pytest.fixture
def benchmark(monkeypatch):
    """benchmark("name"): the module benchmarks/name.py."""
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    yield __import__
    for name in [name for name, module in sys.modules.items() if f"{ROOT}/benchmarks/" in repr(module)]:
        del sys.modules[name]


def test_the_saves_of_a_training_are_timed(benchmark, tmp_path):
    """Every one of them: one at the end of each of two epochs."""
    waits = benchmark("checkpoints").waits_ms([*SMALL, "model=linear", "console=quiet"], tmp_path / "run")
    assert len(waits) == 2
    assert min(waits) > 0


def test_a_single_seed_has_no_spread(benchmark):
    figures = benchmark("figures")
    assert figures.spread([90.0]) == ""
    assert figures.spread([90.0, 91.0]) == "+- 0.71"
