"""What a run leaves: one directory, made once for all ranks, and the records in it. No torch.

docs/run-directory.md describes the files; they are the interface for every program that reads runs.
"""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from allranks import config as configs
from allranks.base.errors import UserError
from allranks.base.files import write_json, write_text
from allranks.config import Config

CONFIG = "config.yaml"


def choose(directory: str | None, name: str) -> str:
    """The directory that a run will use; checks that it can, and makes nothing yet.

    Without `directory`: runs/<name>/<UTC time>-<job id or random>.
    """
    if directory is None:
        stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        return str(Path("runs") / name / f"{stamp}-{_job_id() or secrets.token_hex(3)}")
    path = Path(directory)
    try:
        _check(path)
    except OSError as error:
        raise UserError(
            f"run.dir={path} cannot be looked at ({error.strerror}): give another run.dir."
        ) from error
    return str(path)


def _check(path: Path) -> None:
    if path.exists() and not path.is_dir():
        raise UserError(f"run.dir={path} is a file: give a directory that does not exist yet.")
    if _is_used(path) and not (path / CONFIG).exists():
        raise UserError(
            f"run.dir={path} is already used, and not by a run: give another one, or leave run.dir out "
            "for a new directory."
        )
    above = path if path.is_dir() else next((p for p in path.absolute().parents if p.exists()), Path())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"run.dir={path} cannot be made: {above} is not writable. Give another run.dir.")


def find(config: Config) -> tuple[str, str]:
    """The run's directory, and how far the run has come there."""
    directory = choose(config.run.dir, config.name)
    so_far = standing(directory, config) if config.run.dir else "new"
    if so_far == "new" and config.resume not in ("auto", "never"):
        try:
            Path(config.resume).stat()
        except OSError as error:
            raise UserError(
                f"resume={config.resume} cannot be read ({error.strerror}): give the path of a checkpoint, "
                "or of a run directory that has one."
            ) from error
    return directory, so_far


def standing(directory: str, config: Config) -> str:
    """How far the run of this configuration has come there: "new", "begun", "unfinished" or "finished".

    "begun" has a directory and nothing else yet. Raises UserError where it is another configuration's run,
    or where the configuration says that nothing is to be resumed.
    """
    path = Path(directory)
    if not (path / CONFIG).exists():
        return "new"
    differing = configs.differing(configs.frozen_identity(path / CONFIG), configs.identity(config))
    if differing:
        raise UserError(
            f"run.dir={path} holds a run of another configuration: {differing}. Give another run.dir, or "
            "the same values."
        )
    if is_finished(path):
        return "finished"
    if not (path / "checkpoints").is_dir():
        if (path / "checkpoints").exists():
            raise UserError(
                f"run.dir={path} has a file named checkpoints: move it, or give another run.dir."
            )
        return "begun"
    if config.resume == "never":
        raise UserError(
            f"run.dir={path} holds an unfinished run, and resume=never: give another run.dir, or "
            "resume=auto to go on."
        )
    return "unfinished"


def is_finished(directory: Path) -> bool:
    """Whether its summary says so."""
    try:
        return bool(json.loads((directory / "summary.json").read_text()).get("state") == "finished")
    except (OSError, ValueError, AttributeError):
        return False


def create(directory: str, config_yaml: str | None, exactly: bool = True) -> str:
    """Makes the directory, for this run alone, with its configuration, if it has one; returns it.

    Two runs of one job may start in the same second: without `exactly` the later one's name gets an end.
    """
    path = Path(directory)
    try:
        with writing(directory):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir(0o700, exist_ok=exactly and path.is_dir() and not _is_used(path))
            (path / "logs").mkdir(exist_ok=exactly)
            if config_yaml is not None:
                write_text(path / CONFIG, config_yaml, new=True).close()
    except FileExistsError:
        if not exactly:
            return create(f"{directory}-{secrets.token_hex(3)}", config_yaml)
        raise UserError(f"run.dir={path} was taken by another run just now: give another one.") from None
    return str(path)


@contextmanager
def writing(directory: str) -> Iterator[None]:
    """Raises UserError where the run directory cannot be written."""
    try:
        yield
    except FileExistsError:
        raise
    except OSError as error:
        raise UserError(
            f"run.dir={directory} cannot be written ({error.strerror}): free some space or quota there and "
            "start the run again, or give another run.dir."
        ) from error


def _is_used(path: Path) -> bool:
    """Whether more is there than a start leaves that was killed before it had written config.yaml."""
    return path.is_dir() and any(p.name != "logs" and not p.name.startswith(".") for p in path.iterdir())


def describe(directory: str, ranks: Mapping[str, Any]) -> None:
    """Writes environment.json: what the runtime says of its ranks, versions, command line, commit."""
    about = {
        "command": sys.argv,
        "python": sys.version.split()[0],
        "versions": versions(),
        "git_commit": _git_commit(),
    }
    write_json(Path(directory) / "environment.json", {**about, **ranks})


def versions() -> dict[str, str | None]:
    """Of the packages that make the numbers; None for one that is not installed."""
    from importlib import metadata

    found: dict[str, str | None] = {}
    for package in ("allranks", "torch", "torchvision", "ezpz", "mpi4py", "hydra-core", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _git_commit() -> str | None:
    """The commit of the working directory, where it is a git checkout."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _job_id() -> str | None:
    """The scheduler's job id without characters that trouble a shell: 12.pbs, 2[1].pbs -> 2-1.pbs."""
    job = os.environ.get("PBS_JOBID") or os.environ.get("SLURM_JOB_ID")
    if not job:
        return None
    task = os.environ.get("SLURM_ARRAY_TASK_ID")
    kept = "".join(c if c.isalnum() or c in ".-_" else "-" for c in job.replace("]", ""))
    return f"{kept}-{task}" if task else kept
