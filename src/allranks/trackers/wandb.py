"""`tracker=wandb`: a run in Weights & Biases, sent to its server or kept in the run directory.

The variable WANDB_MODE decides which. If it is not set, the run is sent, provided that W&B has an API key
for its server and the server answers. Otherwise the run is kept in `tracker/wandb/`, and `wandb sync` sends
it later. In both cases W&B writes a file of its own there. After a resume that file tells which steps and
epochs W&B has got.
"""

from __future__ import annotations

import json
import logging
import netrc
import os
import secrets
import signal
import socket
import struct
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from allranks.base import processes
from allranks.trackers.packages import kept_id, require, without_epoch
from allranks.trackers.protocol import Position, TrackedRun

log = logging.getLogger(__name__)

_SERVER = "https://api.wandb.ai"
_ANSWER_S = 3.0  # a server that takes longer to accept a connection counts as out of reach
_START_S = 60.0  # how long W&B may take to begin a run

# The format of W&B's file. The file consists of blocks of 32 KiB; the first block begins with a head of 7
# bytes. A block holds pieces of records. Before each piece stand its checksum, its length and its kind. A
# record that does not fit into a block goes on in the next one. The kind says whether a piece is a whole
# record, or the first, a middle or the last piece of one.
_HEAD = 7
_BLOCK = 32768
_PIECE = struct.Struct("<IHB")
_WHOLE, _FIRST, _MIDDLE, _LAST = 1, 2, 3, 4


class WandB:
    """Figures for each step and epoch, the configuration and environment, the pictures as images."""

    def __init__(self, project: str = "allranks", entity: str | None = None) -> None:
        require("wandb", "wandb")
        self._project = project
        self._entity = entity
        self._run: Any = None

    def open(self, run: TrackedRun) -> Position | None:
        """Begins the W&B run or goes on with it; returns how far W&B's own files have it."""
        os.environ.setdefault("WANDB_SILENT", "true")  # the console is for the run's own messages
        import wandb

        run_id, _ = kept_id(run.folder / "wandb-run", lambda: secrets.token_hex(4))
        position = _position(sorted(run.folder.glob(f"wandb/*/run-{run_id}.wandb")))
        mode: Any = os.environ.get("WANDB_MODE") or _mode()
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT") or self._project,
            entity=os.environ.get("WANDB_ENTITY") or self._entity,
            id=run_id,
            name=os.environ.get("WANDB_NAME") or f"{run.name} {run.directory.name}",
            dir=str(run.folder),
            config={**run.config, "environment": dict(run.environment)},
            mode=mode,
            resume="allow",
            reinit="create_new",  # after a failure the former run object may still be there
            settings=wandb.Settings(console="off", silent=True, init_timeout=_START_S),
        )
        # A row of its own for each step and each epoch, all of them drawn over `step`.
        self._run.define_metric("step")
        self._run.define_metric("*", step_metric="step")
        return position

    def steps(self, records: Sequence[Mapping[str, Any]]) -> None:
        """A row for each step."""
        for record in records:
            self._run.log(without_epoch(record))

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """A row for the epoch."""
        self._run.log(dict(metrics))

    def summary(self, values: Mapping[str, Any]) -> None:
        """The values of summary.json, in the run's summary."""
        self._run.summary.update(dict(values))

    def pictures(self, paths: Sequence[Path]) -> None:
        """Each picture as an image that has the file's name."""
        import wandb

        self._run.log({path.stem: wandb.Image(str(path)) for path in paths})

    def close(self, finished: bool) -> None:
        """Ends W&B's part in this process. A run that is not finished may be gone on with."""
        self._run.finish(exit_code=0 if finished else 1)

    def abandon(self) -> None:
        """Ends W&B's own process, which otherwise holds up the end of ours until its server answers."""
        for pid in processes.children(os.getpid()):
            with suppress(OSError):  # this child has ended meanwhile; the other children are still checked
                command = Path(f"/proc/{pid}/cmdline").read_bytes()
                if b"wandb-core" in command:
                    os.kill(pid, signal.SIGKILL)
        _leave_out_errors_at_exit()


def _leave_out_errors_at_exit() -> None:
    """From here on Python does not show what W&B's own functions raise when this process ends.

    W&B registers a function with atexit, which talks to W&B's process and ends in a traceback of 25 lines
    if that process is gone. By then a warning has said that the tracker did not come to its end.
    """
    show = sys.unraisablehook

    def show_others(unraisable: sys.UnraisableHookArgs) -> None:
        trace = unraisable.exc_traceback
        module = "" if trace is None else str(trace.tb_frame.f_globals.get("__name__"))
        if not module.startswith("wandb."):
            show(unraisable)

    sys.unraisablehook = show_others


def _mode() -> str:
    """`online` where W&B has a key for its server and the server answers, else `offline`."""
    server = os.environ.get("WANDB_BASE_URL") or _SERVER
    parts = urlsplit(server)
    host = parts.hostname or ""
    if not _has_key(parts.netloc, host):
        log.info("wandb: offline, as there is no API key for %s: `wandb sync` sends it later", host)
        return "offline"
    proxy, address = _first_address(parts)
    try:
        socket.create_connection(address, _ANSWER_S).close()
    except OSError as error:
        who = f"the proxy {proxy} for {host}" if proxy else host
        log.info("wandb: offline, as %s does not answer (%s): `wandb sync` sends it later", who, error)
        return "offline"
    return "online"


def _first_address(server: SplitResult) -> tuple[str, tuple[str, int]]:
    """The proxy for this server, empty without one, and the (host, port) that W&B connects to first.

    On many clusters the compute nodes reach the internet by a proxy alone, which the environment names. For
    a server on this host W&B uses no proxy.
    """
    from urllib.request import getproxies, proxy_bypass

    host = server.hostname or ""
    proxy = getproxies().get(server.scheme, "")
    if not proxy or host in ("localhost", "127.0.0.1", "::1") or proxy_bypass(host):
        return "", (host, _port(server))
    parts = urlsplit(proxy if "://" in proxy else f"http://{proxy}")
    proxy_host = parts.hostname or ""
    return proxy_host, (proxy_host, _port(parts))


def _port(address: SplitResult) -> int:
    """The port in an address, or the usual one of its scheme."""
    return address.port or (443 if address.scheme == "https" else 80)


def _has_key(*hosts: str) -> bool:
    """Whether there is a key for this server where W&B looks for one.

    `hosts` are the names by which a .netrc may list the server: versions of W&B differ in whether the port
    belongs to it. W&B reads the file that NETRC names, or else ~/.netrc, or else ~/_netrc.
    """
    if os.environ.get("WANDB_API_KEY"):
        return True
    given = os.environ.get("NETRC")
    with suppress(OSError, RuntimeError, netrc.NetrcParseError):  # RuntimeError: no home directory is known
        places = [Path(given)] if given else [Path("~/.netrc"), Path("~/_netrc")]
        paths = [place.expanduser() for place in places]
        found = next((path for path in paths if path.exists()), paths[0])
        keys = netrc.netrc(str(found))
        return any(keys.authenticators(host) is not None for host in hosts)
    return False


def _position(paths: Sequence[Path]) -> Position:
    """The last step and epoch in W&B's files of a run."""
    step = 0
    epoch = 0
    for path in paths:
        for row in rows_of(path):
            if "epoch" in row:
                epoch = max(epoch, int(row["epoch"]))
            elif "step" in row:  # the row of a single step has no epoch
                step = max(step, int(row["step"]))
    return Position(step, epoch)


def rows_of(path: Path) -> Iterator[dict[str, Any]]:
    """The rows that were logged into one of W&B's own files, in their order."""
    from wandb.proto import wandb_internal_pb2

    kind: Any = wandb_internal_pb2
    for content in _records(path.read_bytes()):
        record = kind.Record()
        record.ParseFromString(content)
        if record.WhichOneof("record_type") == "history":
            yield {
                (item.key or ".".join(item.nested_key)): json.loads(item.value_json)
                for item in record.history.item
            }


def _records(content: bytes) -> Iterator[bytes]:
    """The whole records of one of W&B's files; the end of one that was being written is left out."""
    at = _HEAD
    pieces: list[bytes] = []
    while at + _PIECE.size <= len(content):
        left = _BLOCK - at % _BLOCK
        if left < _PIECE.size:  # too little room for a piece: the rest of the block is padding
            at += left
            continue
        _checksum, length, kind = _PIECE.unpack_from(content, at)
        begin = at + _PIECE.size
        if kind not in (_WHOLE, _FIRST, _MIDDLE, _LAST) or begin + length > len(content):
            return
        if kind in (_WHOLE, _FIRST):
            pieces = []
        pieces.append(content[begin : begin + length])
        at = begin + length
        if kind in (_WHOLE, _LAST):
            yield b"".join(pieces)
