"""Fixtures: a training by command line (alone, under mpiexec, under torchrun) or in this process.

Without --long, tests marked `long` are skipped, and others do less of the same: see the fixture `long`.
"""

from __future__ import annotations

import contextlib
import gc
import os
import shutil
import signal
import subprocess
import tempfile
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, settings

import forkserver
from allranks.compose import from_command_line
from allranks.job.identity import RankIdentity
from helpers import (
    LEAKY,
    NO_REPORT,
    PYTHON,
    ROOT,
    SMALL,
    Done,
    Run,
    execute,
    execute_forked,
    forked_python,
    launcher,
)

# The same examples every time, on machines that may be busy.
settings.register_profile(
    "allranks", deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("allranks")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run what takes long, too")


def pytest_configure() -> None:
    """Has SIGINT and SIGHUP end the commands under test, though a script's background ignores them."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_IGN:
        signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.hookimpl(trylast=True)  # after pytest-xdist has put each group's name behind those of its tests
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    grouped = [item for item in items if item.get_closest_marker("xdist_group")]
    if hasattr(config, "workerinput") and not all("@" in item.nodeid for item in grouped):
        raise pytest.UsageError("pytest-xdist does not keep groups together: install .[dev], or give -n0")
    if config.getoption("--long"):
        return
    skip = pytest.mark.skip(reason="takes long: scripts/test --long")
    for item in items:
        if item.get_closest_marker("long"):
            item.add_marker(skip)


@pytest.fixture(scope="session")
def long(pytestconfig: pytest.Config) -> bool:
    """Whether there is time for all of it: `10_000 if long else 1_000`."""
    return pytestconfig.getoption("--long")


@pytest.fixture(scope="session", autouse=True)
def digits_once() -> None:
    """The trainings in this process draw their digits once. test_synthetic.py calls the real function."""
    forkserver.remember_digits()


@pytest.fixture(autouse=True)
def no_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tests mean what they say even where they are started inside a job, or with data at hand."""
    # urllib keeps the proxies that it found at its first call, in this process also those of another test.
    monkeypatch.setattr(urllib.request, "_opener", None)
    for name in os.environ:
        if LEAKY.match(name) and not name.startswith(("PYTHON", "COVERAGE_")):
            monkeypatch.delenv(name)


@pytest.fixture
def closed(tmp_path: Path) -> Iterator[Path]:
    """A folder that this process may not look into; root may look into any, so it is another user here."""
    folder = tmp_path / "closed"
    folder.mkdir(0o000)
    user = os.geteuid()
    try:
        if user == 0:
            os.seteuid(65534)  # nobody
    except OSError:
        pytest.skip("in this container root may not become another user")
    yield folder
    os.seteuid(user)
    folder.chmod(0o700)


@pytest.fixture
def command(tmp_path: Path) -> Callable[..., Done]:
    """command("allranks", "--help", cwd=..., env=..., timeout_s=...): runs it, in tmp_path by default."""

    def run(*argv: str, cwd: Path = tmp_path, **options: object) -> Done:
        return execute(argv, cwd, **options)  # type: ignore[arg-type]

    return run


@pytest.fixture
def train(tmp_path: Path) -> Callable[..., Done]:
    """train("model=cnn", ranks=2, under="mpiexec"): one training in tmp_path, by command line.

    Its processes are forked from one that has imported torch already (tests/forkserver.py), also where a
    real launcher starts them (tests/forkclient.py). `under="python"` starts one as a user does. There is no
    report, unless the overrides say report=true.
    """

    def run(
        *overrides: str, under: str | None = None, ranks: int = 1, cwd: Path = tmp_path, **options: object
    ) -> Done:
        cwd.mkdir(exist_ok=True)
        words = overrides if "--frozen" in overrides else (NO_REPORT, *overrides)
        if under is None:
            return execute_forked(["-m", "allranks.train", *words], ranks, cwd, **options)  # type: ignore[arg-type]
        command = launcher(under, ranks, PYTHON if under == "python" else forked_python())
        return execute([*command, "-m", "allranks.train", *words], cwd, **options)  # type: ignore[arg-type]

    return run


@pytest.fixture
def train_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    """train_here("model=linear"): the same in this process, for tests that need no process of their own."""
    from allranks.train import run as run_training

    monkeypatch.chdir(tmp_path)

    def run(*overrides: str) -> Run:
        before = set(tmp_path.rglob("config.yaml"))
        [config] = from_command_line(overrides)
        end = run_training(config, RankIdentity("none"))
        if end.records is not None:  # of a run whose page nobody makes here
            end.records.close()
        gc.unfreeze()  # this process goes on
        if config.run.dir is not None:
            return Run(tmp_path / config.run.dir)
        [made] = set(tmp_path.rglob("config.yaml")) - before
        return Run(made.parent)

    return run


EVIL = "<script>alert(1)</script>"  # what a page must show as the text that it is


@pytest.fixture(scope="session")
def reported(tmp_path_factory: pytest.TempPathFactory) -> Done:
    """A finished run of two ranks, in the folder `run`, that has made its report by itself."""
    with_report = [word for word in SMALL if word != NO_REPORT]
    words = [*with_report, "model=linear", "trainer.epochs=3", f"+data.note='{EVIL}'", "run.dir=run"]
    command = [*launcher("mpiexec", 2, forked_python()), "-m", "allranks.train", *words]
    return execute(command, tmp_path_factory.mktemp("reported")).ok()


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[Path]:
    """A folder in memory, where that can be had: a busy disk makes thousands of writes wait."""
    shm = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=shm if os.access(shm, os.W_OK) else tmp_path) as folder:
        yield Path(folder)


@pytest.fixture(scope="session")
def strace() -> str:
    """strace's path, where it is there and may trace."""
    path = shutil.which("strace")
    if path is None:
        pytest.skip("no strace: apt-get install strace")
    tried = subprocess.run([path, "-qq", "-o", os.devnull, "true"], capture_output=True, check=False)
    if tried.returncode:
        pytest.skip(f"strace may not trace here: {tried.stderr!r}")
    return path


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Callable[[str], Path]]:
    """mounted(OPTIONS) is a folder on a file system of its own, in memory."""
    if os.geteuid() != 0:
        pytest.skip("needs root, to mount a file system")
    made: list[Path] = []

    def mount(options: str) -> Path:
        folder = tmp_path / f"mounted{len(made)}"
        folder.mkdir()
        words = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(words, capture_output=True, text=True, timeout=30, check=False)
        if done.returncode:
            pytest.skip(f"nothing may be mounted here: {done.stderr.strip()}")
        made.append(folder)
        return folder

    yield mount
    for folder in made:
        subprocess.run(["umount", str(folder)], timeout=30, check=True)


@pytest.fixture
def read_only(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An empty folder in which this process cannot write."""
    if os.geteuid() == 0:  # whom permissions do not stop
        return request.getfixturevalue("mounted")("ro")
    (tmp_path / "read-only").mkdir(mode=0o500)
    return tmp_path / "read-only"


SETTING = {"SL_NODES": "3", "SL_CPUS": "32", "SL_GPUS": "4", "SL_REQUEUE": "5", "SL_KILLWAIT": "5"}


@pytest.fixture(scope="module")
def real_slurm() -> Iterator[None]:
    """A Slurm of three nodes on this host alone, brought up for a module's tests and down again."""
    cluster = ROOT.parent / "shared/cluster"
    if os.geteuid() != 0 or not (cluster / "slurm-up").exists():
        pytest.skip("needs root and ../shared/cluster/slurm-up")
    if slurm_answers():
        pytest.skip("a Slurm is running here already, and is somebody else's")

    def call(*words: str, timeout_s: float, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [cluster / words[0], *words[1:]], env={**os.environ, **env}, cwd="/", timeout=timeout_s,
            capture_output=True, text=True, check=False,
        )  # fmt: skip

    try:
        up = call("slurm-up", timeout_s=300, **SETTING)
        if up.returncode:
            pytest.skip(f"slurm-up failed: {up.stderr[-300:]}")
        yield
    finally:
        call("slurm-down", "--clean", timeout_s=120)


def slurm_answers() -> bool:
    if shutil.which("scontrol") is None:
        return False
    with contextlib.suppress(subprocess.TimeoutExpired):
        done = subprocess.run(["scontrol", "ping"], capture_output=True, text=True, timeout=20, check=False)
        return "UP" in done.stdout
    return True  # there, but stuck: not ours to touch


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's Chromium, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no chromium: apt-get install chromium")
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()
