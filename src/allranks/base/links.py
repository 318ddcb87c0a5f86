"""Messages between a launch's own processes: JSON objects, a line each. Nothing is ever unpickled.

A program's output travels in them too. Whoever connects must show the launch's secret first.
"""

from __future__ import annotations

import hmac
import json
import socket
import time
from typing import Any

from allranks.base.errors import UserError

BY_LAUNCH = "For `allranks launch`: ALLRANKS_MASTER_ADDR."
LONGEST = 1 << 20  # bytes in a line: who sends more is none of ours


class WireError(Exception):
    """The other side sent what no process of ours would send."""


def message(**values: Any) -> bytes:
    """Bytes among the values arrive as text of the same code points; output() gives them back."""
    return json.dumps(values, default=lambda data: data.decode("latin-1")).encode() + b"\n"


def is_secret(said: object, secret: str) -> bool:
    """Compared in a time that tells a stranger nothing; half a character of JSON's is none of ours."""
    return hmac.compare_digest(str(said).encode(errors="replace"), secret.encode())


def output(text: str) -> bytes:
    return text.encode("latin-1")


def parse(line: bytes) -> dict[str, Any]:
    """The message in a line; raises EOFError for the end of a stream, WireError for anything else."""
    if not line:
        raise EOFError
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a message that is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise WireError("a message that is no JSON object")
    return values


def listen(address: str, port: int = 0, far: bool = False) -> socket.socket:
    """At this address of rank 0's host, 0 being a free port; raises UserError where that cannot be, or
    where ranks are `far` off and the host's own name leads to its loopback.
    """
    raise_file_limit()
    host = socket.gethostname()
    try:
        listener = socket.create_server((address, port), backlog=4096)
    except (OSError, OverflowError) as error:
        where = f"MASTER_ADDR={address}" + (f" and MASTER_PORT={port}" if port else "")
        raise UserError(
            f"rank 0 on {host} cannot listen at {where} ({error}): give an address of that host and a port "
            f"that is free there, the same on every rank. {BY_LAUNCH}"
        ) from error
    if far and listener.getsockname()[0].startswith("127.") and not address.startswith("127."):
        listener.close()
        raise UserError(
            f"MASTER_ADDR={address} is the loopback of rank 0's host {host}, which no other can reach: "
            f"give its address on the hosts' own network, the same on every rank. {BY_LAUNCH}"
        )
    return listener


def raise_file_limit() -> None:
    """A connection a rank: the usual 1,024 open files are too few for a large job."""
    import resource  # not every rank's guard, which starts in a few milliseconds, needs it

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != hard:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def connect(host: str, port: int, within_s: float) -> socket.socket:
    """A connection, tried again for a while: many ranks at once can fill a listener's queue.

    Raises OSError with the last reason.
    """
    deadline, pause_s = time.monotonic() + within_s, 0.02
    while True:
        try:
            link = socket.create_connection((host, port), max(0.1, deadline - time.monotonic()))
            break
        except OSError:
            if time.monotonic() + pause_s >= deadline:
                raise
            time.sleep(pause_s)
            pause_s = min(1.0, 2 * pause_s)
    keep_alive(link)
    link.settimeout(None)
    return link


def keep_alive(link: socket.socket) -> None:
    """A peer whose host died is noticed within half a minute; small messages go at once."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
