"""Fixtures: a training by command line (alone, under mpiexec, under torchrun) or in this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

from allranks.config import from_command_line
from allranks.runtime.environment import Launch
from helpers import LEAKY, Done, Run, execute, launcher

# The same examples every time, on machines that may be busy.
settings.register_profile(
    "allranks", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("allranks")


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests mean what they say even where they are started inside a job, or with data at hand."""
    for name in os.environ:
        if LEAKY.match(name) and not name.startswith(("PYTHON", "COVERAGE_")):
            monkeypatch.delenv(name)


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Done]:
    """command("allranks", "--help", cwd=..., env=..., timeout_s=...): runs it, in tmp_path by default."""

    def run(*argv: str, cwd: Path = tmp_path, **options: object) -> Done:
        return execute(argv, cwd, **options)  # type: ignore[arg-type]

    return run


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Done]:
    """train("model=cnn", ranks=2, under="mpiexec"): one training in tmp_path, by command line."""

    def run(
        *overrides: str, under: str | None = None, ranks: int = 1, cwd: Path = tmp_path, **options: object
    ) -> Done:
        cwd.mkdir(exist_ok=True)
        return execute([*launcher(under, ranks), "-m", "allranks.train", *overrides], cwd, **options)  # type: ignore[arg-type]

    return run


@pytest.fixture
def train_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """train_here("model=linear"): the same in this process, for tests that need no process of their own."""
    from allranks.train import run as run_training

    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> Run:
        before = set(tmp_path.rglob("config.yaml"))
        [config] = from_command_line(overrides)
        run_training(config, Launch("none"))
        [made] = set(tmp_path.rglob("config.yaml")) - before
        return Run(made.parent)

    return run
