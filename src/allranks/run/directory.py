"""A run's directory: where it is, how far the run in it has come, and how it is made. No torch.

One directory holds all that a run leaves. Rank 0 makes it, once for all ranks. docs/run-directory.md
describes the files in it, which are the interface for every program that reads runs.
"""

from __future__ import annotations

import enum
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
from allranks.job import scheduler

CONFIG = "config.yaml"
_GIT_LIMIT_S = 5  # git on a slow file system must not hold a start up


class Standing(str, enum.Enum):
    """How far a run has come in its directory. A text as well, so that it travels between ranks as JSON."""

    NEW = "new"  # there is no directory of this run yet
    BEGUN = "begun"  # its directory is there, and nothing that it has trained
    UNFINISHED = "unfinished"  # it has a folder for checkpoints
    FINISHED = "finished"  # its summary.json says so


def choose(directory: str | None, name: str) -> str:
    """The directory that a run will use: `directory`, or runs/<name>/<UTC time>-<job id or random>.

    Checks that it can be used, and makes nothing yet. Raises UserError if it cannot.
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
    """Raises UserError if the path cannot become, or is not, the directory of a run."""
    if path.exists() and not path.is_dir():
        raise UserError(f"run.dir={path} is a file: give a directory that does not exist yet.")
    if _is_used(path) and not (path / CONFIG).exists():
        raise UserError(
            f"run.dir={path} is already used, and not by a run: give another one, or leave run.dir out "
            "for a new directory."
        )
    if path.is_dir():
        above = path
    else:
        above = next((parent for parent in path.absolute().parents if parent.exists()), Path())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        raise UserError(f"run.dir={path} cannot be made: {above} is not writable. Give another run.dir.")


def find(given: str | None, name: str, decisive: Mapping[str, Any], resume: str) -> tuple[str, Standing]:
    """The directory of a run, and how far the run has come there.

    `given` is the directory that the user has named, if any; else a new one is chosen below runs/<name>.
    `decisive` holds the values that decide what the run computes (config.decisive_values), `resume` is the
    key of that name. Raises UserError if the directory cannot be used, or if `resume` names a path
    that is not there.
    """
    directory = choose(given, name)
    so_far = standing(directory, decisive, resume) if given else Standing.NEW
    if so_far == Standing.NEW and resume not in ("auto", "never"):
        try:
            Path(resume).stat()
        except OSError as error:
            raise UserError(
                f"resume={resume} cannot be read ({error.strerror}): give the path of a checkpoint, "
                "or of a run directory that has one."
            ) from error
    return directory, so_far


def standing(directory: str, decisive: Mapping[str, Any], resume: str) -> Standing:
    """How far the run with these decisive values (config.decisive_values) has come in the directory.

    Raises UserError if the directory holds the run of another configuration, if it holds an
    unfinished run and resume=never says that nothing is to be resumed, or if it cannot be read.
    """
    try:
        return _standing(Path(directory), decisive, resume)
    except OSError as error:
        raise UserError(
            f"run.dir={directory} cannot be looked at ({error.strerror}): start the run again once it can "
            "be, or give another run.dir."
        ) from error


def _standing(path: Path, decisive: Mapping[str, Any], resume: str) -> Standing:
    checkpoints = path / "checkpoints"
    if not (path / CONFIG).exists():
        return Standing.NEW
    try:
        there = configs.decisive_values(configs.frozen(path / CONFIG))
    except UserError as error:
        raise UserError(f"run.dir={path} has a configuration that cannot be used: {error}") from error
    differing = configs.differing(there, decisive)
    if differing:
        remedy = "Give another run.dir, or the same values."
        if configs.keys_that_differ(there, decisive) == ["trainer.epochs"]:
            remedy += (
                f" To train that run further, begin another from it: resume={path} with a new run.dir."
            )
        raise UserError(f"run.dir={path} holds a run of another configuration: {differing}. {remedy}")
    if is_finished(path):
        return Standing.FINISHED
    if not checkpoints.is_dir():
        if checkpoints.is_symlink():  # to another file system, which may only be away for now
            raise UserError(
                f"run.dir={path} has its checkpoints behind a link to {checkpoints.readlink()}, where no "
                "folder is: make that folder reachable, or remove the link to begin again."
            )
        if checkpoints.exists():
            raise UserError(
                f"run.dir={path} has a file named checkpoints: move it, or give another run.dir."
            )
        return Standing.BEGUN
    if resume == "never":
        raise UserError(
            f"run.dir={path} holds an unfinished run, and resume=never: give another run.dir, or "
            "resume=auto to go on."
        )
    return Standing.UNFINISHED


def is_finished(directory: Path) -> bool:
    """Whether the run in this directory has finished, as its summary.json says."""
    try:
        return bool(json.loads((directory / "summary.json").read_text()).get("state") == "finished")
    except (OSError, ValueError, AttributeError, RecursionError):
        return False


def create(directory: str, config_yaml: str | None, exactly: bool = True) -> str:
    """Makes the directory for one run alone, writes its configuration there if it has one, and returns it.

    Two runs of one job may start in the same second, and choose the same directory. Without `exactly` the
    later one gets a directory whose name has a random end. With `exactly` it raises UserError.
    """
    path = Path(directory)
    try:
        with writing(directory):
            try:
                _make(path, may_be_there=exactly)
            except NotADirectoryError:
                raise _in_the_way(path) from None
            except FileExistsError:
                if exactly:
                    raise
                path = Path(f"{directory}-{secrets.token_hex(3)}")
                _make(path, may_be_there=False)
            if config_yaml is not None:
                write_text(path / CONFIG, config_yaml, new=True).close()
    except FileExistsError:
        raise _in_the_way(path) from None
    return str(path)


def _in_the_way(path: Path) -> UserError:
    """The error for a directory that could not be made because something of this name exists."""
    above = next((parent for parent in path.parents if parent.exists() and not parent.is_dir()), None)
    if above is not None:
        return UserError(
            f"run.dir={path} cannot be made: {above} is a file. Move it away, or give another run.dir."
        )
    if path.is_symlink() and not path.exists():
        return UserError(
            f"run.dir={path} is a link to {path.readlink()}, where nothing is: make that directory, or "
            "give another run.dir."
        )
    logs = path / "logs"
    if logs.exists() and not logs.is_dir():
        return UserError(f"run.dir={path} has a file named logs: move it, or give another run.dir.")
    return UserError(f"run.dir={path} was taken by another run just now: give another one.")


def _make(path: Path, may_be_there: bool) -> None:
    """Makes the directory and its logs/. Raises FileExistsError if another run has it.

    With `may_be_there` the directory may exist, if it holds only logs/ and hidden files: an earlier start
    that was killed early leaves it like this.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    path.mkdir(0o700, exist_ok=may_be_there and path.is_dir() and not _is_used(path))
    (path / "logs").mkdir(exist_ok=may_be_there)


@contextmanager
def writing(directory: str) -> Iterator[None]:
    """Turns an OSError of the code within, which writes to the run directory, into a UserError."""
    try:
        yield
    except FileExistsError:  # another run was quicker: the caller deals with it
        raise
    except OSError as error:
        raise UserError(
            f"run.dir={directory} cannot be written ({error.strerror}): free some space or quota there and "
            "start the run again, or give another run.dir."
        ) from error


def _is_used(path: Path) -> bool:
    """Whether the directory holds anything but logs/ and hidden files.

    A start that was killed before it had written config.yaml leaves no more than these.
    """
    if not path.is_dir():
        return False
    return any(entry.name != "logs" and not entry.name.startswith(".") for entry in path.iterdir())


def describe(directory: str, ranks: Mapping[str, Any]) -> None:
    """Writes environment.json: the command line, versions and git commit, and what `ranks` says.

    `ranks` is what the runtime knows of the ranks of this start (Runtime.describe).
    """
    about = {
        "command": sys.argv,
        "python": sys.version.split()[0],
        "versions": versions(),
        "git_commit": _git_commit(),
    }
    write_json(Path(directory) / "environment.json", {**about, **ranks})


def versions() -> dict[str, str | None]:
    """The versions of the packages that a run's numbers depend on; None for one that is not installed."""
    from importlib import metadata

    found: dict[str, str | None] = {}
    for package in ("allranks", "torch", "torchvision", "ezpz", "mpi4py", "hydra-core", "numpy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = None
    return found


def _git_commit() -> str | None:
    """The git commit of the working directory.

    None if it is not a git checkout, if that has no commit yet, or if git does not answer.
    """
    try:
        done = subprocess.run(
            ["git", "rev-parse", "--verify", "HEAD"],
            capture_output=True,
            text=True,
            timeout=_GIT_LIMIT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _job_id() -> str | None:
    """The scheduler's job id without characters that trouble a shell: 12.pbs, 2[1].pbs becomes 2-1.pbs.

    None outside a job.
    """
    job = scheduler.this_job(os.environ)
    if job is None:
        return None
    return "".join(c if c.isalnum() or c in ".-_" else "-" for c in job.id.replace("]", ""))
