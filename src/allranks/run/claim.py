"""One writer for each run directory: a second is refused, an old one that comes back fenced off. No torch.

The owner has a file owner-N.json. Who takes over has found each owner with such a file to be gone, makes
the next one, which only one taker can, and removes the others: whoever misses his own owns nothing now.
Clocks of hosts differ and jump: a heartbeat is a change of the file's time, whatever that time is.
"""

from __future__ import annotations

import errno
import json
import logging
import os
import random
import re
import secrets
import socket
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from allranks.base.errors import UserError
from allranks.base.processes import ProcessIdentity

BEAT_S = 5.0
SILENT_S = 30.0  # six beats missed
_FILE = re.compile(r"owner-([1-9][0-9]{0,17})\.json")

log = logging.getLogger("allranks")


@dataclass(frozen=True)
class _Owner:
    path: Path
    number: int
    about: Mapping[str, Any]  # as in the file: empty while it is being written
    beat: int

    @property
    def identity(self) -> tuple[Path, str]:
        return self.path, str(self.about.get("token"))

    def __str__(self) -> str:
        job = f", job {self.about['job_id']}" if self.about.get("job_id") else ""
        return f"process {self.about.get('pid', '?')} on {self.about.get('host', '?')}{job}"


@dataclass(frozen=True)
class Claim:
    """The ownership of a run directory; a thread keeps it up until release()."""

    token: str
    path: Path
    _released: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def take(cls, run_dir: str | Path) -> Claim:
        """Waits up to SILENT_S to see whether an owner is alive, and raises UserError if one is."""
        directory = Path(run_dir).absolute()
        about = _this_process()
        try:
            while (path := _try(directory, about)) is None:
                time.sleep(random.uniform(0, 0.1))  # somebody else is at it
        except OSError as error:
            raise UserError(
                f"{directory} cannot be written ({error.strerror}): give another run.dir."
            ) from error
        claim = cls(about["token"], path)
        threading.Thread(target=claim._beat, name="allranks-claim", daemon=True).start()
        return claim

    def check(self) -> None:
        """Raises UserError, naming the new owner, where the directory is not ours any more."""
        if _is_at(self.path, self.token):
            return
        try:
            owners = _owners(self.path.parent)
        except FileNotFoundError:
            raise UserError(
                f"{self.path.parent} was moved or removed while this run was going on: it ends. Start it "
                "again with the directory's new place as run.dir."
            ) from None
        now = f"{owners[-1]} has taken it over" if owners else f"{self.path.name} was removed"
        raise UserError(
            f"{self.path.parent} does not belong to this run any more: {now}. This run ends, and leaves "
            "what is there alone."
        )

    def release(self) -> None:
        """Gives the directory up, if it is still ours."""
        self._released.set()
        with suppress(OSError):  # the next owner will see that this process is gone
            if _is_at(self.path, self.token):
                self.path.unlink()

    def _beat(self) -> None:
        while not self._released.wait(BEAT_S):
            with suppress(OSError):  # a file system that is full or fails: silence, for so long
                if _is_at(self.path, self.token):
                    os.utime(self.path)


def _try(directory: Path, about: Mapping[str, Any]) -> Path | None:
    """The file of the new owner; None where the owners have changed meanwhile: look again."""
    gone = _owners(directory)
    if not all(_is_gone(owner, about) for owner in gone):
        return None
    path = directory / f"owner-{gone[-1].number + 1 if gone else 1}.json"
    try:
        file = os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w")
    except FileExistsError:
        return None
    try:
        with file:  # closed at once: then every host sees what it holds
            file.write(json.dumps(about, indent=1) + "\n")
        others = {owner.identity for owner in _owners(directory)} - {(path, about["token"])}
        won = others <= {owner.identity for owner in gone} and _is_at(path, about["token"])
    except OSError:
        path.unlink(missing_ok=True)
        raise
    for loser in [other for other, _ in others] if won else [path]:
        loser.unlink(missing_ok=True)
    return path if won else None


def _is_gone(owner: _Owner, me: Mapping[str, Any]) -> bool:
    """Whether it may be replaced; False where it has changed meanwhile. Raises UserError if it is alive."""
    began, told = time.monotonic(), False
    while (why := _reason(owner.about, me)) is None:
        looked = time.monotonic()  # before the file is read: this process may be stopped in between
        now = _read(owner.path)
        if now is None or now.identity != owner.identity:
            return False
        if now.beat != owner.beat:
            raise UserError(
                f"{owner.path.parent} is in use by {owner}: wait until it has ended or end it, "
                "or give another run.dir."
            )
        if looked - began >= SILENT_S:
            why = f"has been silent for {SILENT_S:.0f} s"
            break
        if not told:
            log.info("%s has this run directory: looking for %.0f s if it is alive", owner, SILENT_S)
            told = True
        time.sleep(0.25)
    log.info("Taking the run directory over: %s %s", owner, why)
    return True


def _reason(owner: Mapping[str, Any], me: Mapping[str, Any]) -> str | None:
    """Why the owner is known to be gone without looking at its heartbeat; None where it is not known."""

    def same(*names: str) -> bool:
        return all(owner.get(name) is not None and owner[name] == me[name] for name in names)

    if same("launch"):
        return "was of the same launch, which has started again"
    restarts = owner.get("restart_count")
    if same("job_id") and isinstance(restarts, int) and restarts < me["restart_count"]:
        return "was the same job before it was requeued"
    if same("host") and owner.get("boot_id") and me["boot_id"] and not same("boot_id"):
        return "has ended: its host was started again"
    if ProcessIdentity.from_json(owner).has_ended(here=ProcessIdentity.from_json(me)):
        return "has ended"
    return None


def _this_process() -> dict[str, Any]:
    restarts = os.environ.get("SLURM_RESTART_COUNT", "")
    return {
        "token": secrets.token_hex(8),
        "host": socket.gethostname(),
        **ProcessIdentity.of_this_process().to_json(),
        "job_id": os.environ.get("PBS_JOBID") or os.environ.get("SLURM_JOB_ID") or None,
        "restart_count": int(restarts) if re.fullmatch("[0-9]{1,9}", restarts) else 0,
        "launch": os.environ.get("ALLRANKS_LAUNCH_ID") or None,
        "taken_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _owners(directory: Path) -> list[_Owner]:
    found = [_read(path) for path in directory.iterdir() if _FILE.fullmatch(path.name)]
    return sorted((owner for owner in found if owner), key=lambda owner: owner.number)


def _read(path: Path) -> _Owner | None:
    """Opens the file anew, so that a network file system asks its server; None where there is none."""
    match = _FILE.fullmatch(path.name)
    assert match is not None
    try:
        with path.open("rb") as file:
            beat, content = os.fstat(file.fileno()).st_mtime_ns, file.read(1 << 16)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):
            return None
        raise
    try:
        about = json.loads(content)
    except (ValueError, RecursionError):
        about = None
    return _Owner(path, int(match[1]), about if isinstance(about, dict) else {}, beat)


def _is_at(path: Path, token: str) -> bool:
    owner = _read(path)
    return owner is not None and owner.about.get("token") == token
