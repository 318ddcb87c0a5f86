"""What a run leaves: one directory, made once for all ranks, and the records in it. No torch.

docs/run-directory.md describes the files; they are the interface for every program that reads runs.
"""

from __future__ import annotations

import json
import math
import os
import secrets
import subprocess
import sys
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from allranks.errors import UserError


def choose(directory: str | None, name: str) -> str:
    """The directory that a run will use; checks that it can, and makes nothing yet.

    Without `directory`: runs/<name>/<UTC time>-<job id or random>.
    """
    if directory is None:
        stamp = datetime.now(timezone.utc).strftime("%Y%m%dT%H%M%SZ")
        return str(Path("runs") / name / f"{stamp}-{_job_id() or secrets.token_hex(3)}")
    path = Path(directory)
    if path.exists() and not path.is_dir():
        raise UserError(f"run.dir={path} is a file: give a directory that does not exist yet.")
    if path.is_dir() and any(path.iterdir()):
        raise UserError(
            f"run.dir={path} is already used: give another one, or leave run.dir out for a new directory."
        )
    above = path if path.is_dir() else next((p for p in path.absolute().parents if p.exists()), Path())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"run.dir={path} cannot be made: {above} is not writable. Give another run.dir.")
    return str(path)


def create(directory: str, config_yaml: str | None, exactly: bool = True) -> str:
    """Makes the directory, for this run alone, with its configuration, if it has one; returns it.

    Two runs of one job may start in the same second: without `exactly` the later one's name gets an end.
    """
    path = Path(directory)
    try:
        path.mkdir(parents=True, exist_ok=exactly and path.is_dir() and not any(path.iterdir()))
        (path / "logs").mkdir()
        if config_yaml is not None:
            (path / "config.yaml").write_text(config_yaml)
    except FileExistsError:
        if not exactly:
            return create(f"{directory}-{secrets.token_hex(3)}", config_yaml)
        raise UserError(f"run.dir={path} was taken by another run just now: give another one.") from None
    except OSError as error:
        raise UserError(
            f"run.dir={path} cannot be written ({error.strerror}): give another run.dir."
        ) from error
    return str(path)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a whole file or none: readers never see half of it."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(_finite(values), indent=2, allow_nan=False) + "\n")
    temporary.replace(path)


def append_line(path: Path, values: Mapping[str, Any]) -> None:
    """Appends one JSON line, and sees it out of this process."""
    with path.open("a") as file:
        file.write(json.dumps(_finite(values), allow_nan=False) + "\n")


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no NaN and no infinity: null stands for them."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in values.items()}


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
