"""The programs in benchmarks/ that reach into the training still fit it. They measure nothing here."""

import json
import sys

import pytest

from helpers import ROOT, SMALL, execute_forked


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


@pytest.mark.long
def test_the_saves_of_a_spread_model_are_timed(tmp_path):
    code = f"""
import os, sys
sys.path.insert(0, {str(ROOT / "benchmarks")!r})
import sharding
sharding.SAVING = [*sharding.COMMON, "model.width=16", "model.depth=1", "trainer.batch_size=2",
    "trainer.max_steps=3", "trainer.epochs=1", "sharding=fsdp", "checkpoint.every_steps=1"]
os.environ["PMI_RANK"] = os.environ["RANK"]
sharding.as_rank({str(tmp_path / "run")!r})
"""
    done = execute_forked(["-c", code], 2, tmp_path, imports="torch.distributed.fsdp").ok()
    took = json.loads(done.out.splitlines()[-1])
    assert len(took["waits_s"]) == len(took["writes_s"]) >= 3
