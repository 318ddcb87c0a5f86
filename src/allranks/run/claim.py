"""One writer for each run directory: a second is refused, an old one that wakes up is kept out. No torch.

Two jobs may be told to train in the same directory: a user starts a run twice, or a scheduler starts a job
again whose first process hangs on a node that nobody can reach. They share nothing but the file system,
which may have no working locks, and clocks that differ and jump. So the directory itself is what they use:

- The owner of a run directory has a file there, owner-N.json, that says which process on which host it is.
- The owner touches its file every BEAT_S seconds: its heartbeat. A heartbeat is any *change* of the file's
  time, whatever the time is, so no clock has to be right.
- Who wants the directory looks at every owner file that is there. If each of those owners is known to be
  gone, or has been silent for SILENT_S seconds, it makes a file with the next number N. Only one process
  can make that file. Then it removes the files of the earlier owners.
- An owner whose own file is gone owns nothing any more. It looks before each rename in the directory, and
  then ends. That is how an owner that was only paused notices that it has been replaced.
"""

from __future__ import annotations

import enum
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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from allranks.base.errors import UserError
from allranks.base.processes import ProcessIdentity
from allranks.job import scheduler, variables

BEAT_S = 5.0  # seldom enough for a file server with thousands of runs
SILENT_S = 30.0  # six beats missed: a file server that is slow for some seconds costs no run its directory
# How long to watch before a job is queued: no owner is replaced then, so fewer beats are enough.
WATCH_S = 3 * BEAT_S
_LOOK_S = 0.25  # from one look at the file of an owner that may be alive to the next
_RETRY_S = 0.1  # at most; a random part of this time passes before trying again, while others try too
_FILE_BYTES = 1 << 16  # an owner's file is far shorter
_FILE_NAME = re.compile(r"owner-([1-9][0-9]{0,17})\.json")

log = logging.getLogger("allranks")


@dataclass(frozen=True)
class _Owner:
    """What one owner's file says, at one moment."""

    path: Path
    number: int  # the N of owner-N.json
    about: Mapping[str, Any]  # the file's contents; empty while the file is being written
    beat: int  # the file's time of modification, in nanoseconds of whatever clock

    @property
    def identity(self) -> tuple[Path, str]:
        """Tells this owner from any other, also from a later one whose file has the same name."""
        return self.path, str(self.about.get("token"))

    def __str__(self) -> str:
        job = f", job {self.about['job_id']}" if self.about.get("job_id") else ""
        return f"process {self.about.get('pid', '?')} on {self.about.get('host', '?')}{job}"


class OwnerState(enum.Enum):
    """What is known of an owner whose file is being watched."""

    ALIVE = "its file was touched: it has the directory"
    SILENT = "its file was not touched for SILENT_S seconds: it may be replaced"
    REPLACED = "its file is gone or is another owner's: look at all owners anew"
    UNDECIDED = "its file has not changed yet: go on watching"


@dataclass(frozen=True)
class Claim:
    """The ownership of a run directory. A thread keeps up its heartbeat until release()."""

    token: str  # drawn by this owner, and written in its file
    path: Path  # of its file
    _released: threading.Event = field(default_factory=threading.Event)

    @classmethod
    def take(cls, run_dir: str | Path, looking: Callable[[], None] = lambda: None) -> Claim:
        """Makes this process the owner of the run directory.

        Watches an owner that is there already for up to SILENT_S seconds, and calls `looking` each time it
        looks, to show that it does not hang. Raises UserError if that owner is alive, or if the
        directory cannot be written.
        """
        directory = Path(run_dir).absolute()
        me = _this_process()
        try:
            while (path := _try_to_take(directory, me, looking)) is None:
                # Others try at the same moment, and each has made the next one fail. A random pause lets
                # one of them get ahead.
                time.sleep(random.uniform(0, _RETRY_S))
        except OSError as error:
            raise UserError(
                f"{directory} cannot be written ({error.strerror}): give another run.dir."
            ) from error
        claim = cls(me["token"], path)
        threading.Thread(target=claim._keep_beating, name="allranks-claim", daemon=True).start()
        return claim

    def check(self) -> None:
        """Raises UserError, naming the new owner, where this process owns the directory no more."""
        if _is_owned_by(self.path, self.token):
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
        """Gives the directory up, if this process still owns it."""
        self._released.set()
        with suppress(OSError):  # the next owner will find that this process has ended
            if _is_owned_by(self.path, self.token):
                self.path.unlink()

    def _keep_beating(self) -> None:
        while not self._released.wait(BEAT_S):
            # A file system that is full or fails lets the heartbeat stop, for as long as it does.
            with suppress(OSError):
                if _is_owned_by(self.path, self.token):
                    os.utime(self.path)


def is_beating(run_dir: str | Path, is_left_out: Callable[[str], bool] = lambda job_id: False) -> bool:
    """Whether an owner has touched its file lately: a process is at work there, on this host or another.

    An owner in a job is left out where `is_left_out` says so of that job's unique id, as of one that is
    known to have ended.
    By the clocks of this host and of the file server, which may differ by a few seconds. It is for showing
    only; take() asks more carefully.
    """
    try:
        owners = _owners(Path(run_dir))
    except OSError:
        return False
    beats = [owner.beat for owner in owners if not is_left_out(str(owner.about.get("job_id") or ""))]
    newest = max(beats, default=0)
    return time.time() - newest / 1e9 < SILENT_S


def refuse_where_at_work(run_dirs: Iterable[str | Path]) -> None:
    """Raises UserError if a process is at work in one of these directories, on this host or another.

    If it is not known whether an owner has ended, it is watched for WATCH_S seconds, all owners at the same
    time.
    """
    me = _this_process()
    seen: list[_Owner] = []
    for run_dir in run_dirs:
        seen += _perhaps_alive(Path(run_dir), me)
    give_up_at = time.monotonic() + WATCH_S
    while seen and time.monotonic() < give_up_at:
        for owner in tuple(seen):
            match _verdict(owner, _read(owner.path), watched_s=0):
                case OwnerState.ALIVE:
                    raise _in_use(owner)
                case OwnerState.REPLACED:
                    # It has given the directory up. Or another process has just taken that over, and is
                    # alive: its file was not there when the watch began.
                    seen.remove(owner)
                    earlier = {each.identity for each in (owner, *seen)}
                    for new in _perhaps_alive(owner.path.parent, me):
                        if new.identity not in earlier:
                            raise _in_use(new)
        if seen:
            time.sleep(_LOOK_S)


def _perhaps_alive(directory: Path, me: Mapping[str, Any]) -> list[_Owner]:
    """The owners of the directory, if there is one, of which it is not known that they have ended."""
    try:
        owners = _owners(directory)
    except (FileNotFoundError, NotADirectoryError):
        return []
    return [owner for owner in owners if _known_end(owner.about, me) is None]


def _in_use(owner: _Owner) -> UserError:
    return UserError(
        f"{owner.path.parent} is in use by {owner}: wait until it has ended or end it, or give another "
        "run.dir."
    )


# --- taking a directory --------------------------------------------------------------------------------


def _try_to_take(directory: Path, me: Mapping[str, Any], looking: Callable[[], None]) -> Path | None:
    """This process's own file where it has become the owner; None if others changed something meanwhile.

    None means: look at everything anew. Raises UserError if another owner is alive.
    """
    # 1. Every owner that has a file here must be gone.
    gone = _owners(directory)
    if not all(_is_gone(owner, me, looking) for owner in gone):
        return None

    # 2. Make the file with the next number. The file system lets one process only make it.
    number = gone[-1].number + 1 if gone else 1
    path = directory / f"owner-{number}.json"
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        return None
    try:
        # The file is closed at once: over NFS other hosts see what it holds only then.
        with os.fdopen(descriptor, "w") as file:
            file.write(json.dumps(me, indent=1) + "\n")

        # 3. Look again. An owner that step 1 has not seen has come in between, perhaps with a higher number
        #    because it saw more: then both give way, and try again.
        mine = (path, me["token"])
        others = {owner.identity for owner in _owners(directory)} - {mine}
        is_alone = others <= {owner.identity for owner in gone}
        has_won = is_alone and _is_owned_by(path, me["token"])
    except OSError:
        path.unlink(missing_ok=True)
        raise

    # 4. The winner removes the files of those that are gone: from now on they own nothing, should they wake
    #    up. The loser removes its own file.
    if not has_won:
        path.unlink(missing_ok=True)
        return None
    for loser, _ in others:
        loser.unlink(missing_ok=True)
    return path


def _is_gone(owner: _Owner, me: Mapping[str, Any], looking: Callable[[], None]) -> bool:
    """Whether this owner may be replaced, which takes up to SILENT_S seconds to find out.

    False if its file has changed hands meanwhile. Raises UserError if the owner is alive.
    """
    began = time.monotonic()
    is_told = False
    while True:
        why = _known_end(owner.about, me)
        if why is not None:
            break
        # The clock is read before the file: should this process be stopped in between, the owner has had
        # the more time to touch its file, not the less.
        watched_s = time.monotonic() - began
        match _verdict(owner, _read(owner.path), watched_s):
            case OwnerState.REPLACED:
                return False
            case OwnerState.ALIVE:
                raise _in_use(owner)
            case OwnerState.SILENT:
                why = f"has been silent for {SILENT_S:.0f} s"
                break
            case OwnerState.UNDECIDED:
                if not is_told:
                    log.info(
                        "%s has this run directory: looking for %.0f s if it is alive", owner, SILENT_S
                    )
                    is_told = True
                looking()
                time.sleep(_LOOK_S)
    log.info("Taking the run directory over: %s %s", owner, why)
    return True


def _verdict(seen: _Owner, now: _Owner | None, watched_s: float) -> OwnerState:
    """What follows from an owner's file as first `seen`, and as it is `now`, `watched_s` seconds later."""
    if now is None or now.identity != seen.identity:
        return OwnerState.REPLACED
    if now.beat != seen.beat:
        return OwnerState.ALIVE
    if watched_s >= SILENT_S:
        return OwnerState.SILENT
    return OwnerState.UNDECIDED


def _known_end(owner: Mapping[str, Any], me: Mapping[str, Any]) -> str | None:
    """Why the owner must have ended, from what its file says; None if only its heartbeat can tell."""

    def is_same(name: str) -> bool:
        return owner.get(name) is not None and owner[name] == me[name]

    # `allranks launch` starts the ranks again only after the earlier ones have ended.
    if is_same("launch"):
        return "was of the same launch, which has started again"

    # Slurm counts how often it has requeued a job; it ends the job's processes first.
    restarts = owner.get("restart_count")
    if is_same("job_id") and isinstance(restarts, int) and restarts < me["restart_count"]:
        return "was the same job before it was requeued"

    if ProcessIdentity.from_json(owner).has_ended(here=ProcessIdentity.from_json(me)):
        return "has ended"
    return None


def _this_process() -> dict[str, Any]:
    """What this process's owner file is to say."""
    job = scheduler.this_job(os.environ)
    return {
        "token": secrets.token_hex(8),
        "host": socket.gethostname(),
        **ProcessIdentity.of_this_process().to_json(),
        "job_id": job.unique_id if job else None,
        "restart_count": job.restarts if job else 0,
        "launch": os.environ.get(variables.LAUNCH_ID) or None,
        "taken_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


# --- owner files ---------------------------------------------------------------------------------------


def _owners(directory: Path) -> Sequence[_Owner]:
    """Every owner that has a file in the directory, by rising number."""
    found = [_read(path) for path in directory.iterdir() if _FILE_NAME.fullmatch(path.name)]
    return sorted((owner for owner in found if owner is not None), key=lambda owner: owner.number)


def _read(path: Path) -> _Owner | None:
    """What an owner's file says now; None if there is no such file.

    The file is opened anew each time, because that makes a network file system ask its server.
    """
    match = _FILE_NAME.fullmatch(path.name)
    assert match is not None
    try:
        with path.open("rb") as file:
            beat = os.fstat(file.fileno()).st_mtime_ns
            content = file.read(_FILE_BYTES)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ESTALE):  # ESTALE: removed on the server while it was open
            return None
        raise
    try:
        about = json.loads(content)
    except (ValueError, RecursionError):  # it is being written, or says anything
        about = None
    return _Owner(path, int(match[1]), about if isinstance(about, dict) else {}, beat)


def _is_owned_by(path: Path, token: str) -> bool:
    """Whether the owner's file at `path` is there and has this token."""
    owner = _read(path)
    return owner is not None and owner.about.get("token") == token
