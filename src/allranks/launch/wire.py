"""Messages between a launch's own processes: JSON objects, a line each. Nothing is ever unpickled.

A program's output travels in them too. Whoever connects must show the launch's secret first.
"""

from __future__ import annotations

import hmac
import json
import socket
import time
from typing import Any

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
