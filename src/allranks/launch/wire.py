"""Frames over a socket, between our own processes of one run: a kind, a length, and bytes.

A frame of kind MESSAGE holds JSON; nothing is ever unpickled. Whoever connects must send the run's
secret in its first message.
"""

from __future__ import annotations

import json
import socket
import struct
import time
from collections.abc import Iterator
from typing import Any

MESSAGE, STDOUT, STDERR = b"m", b"o", b"e"
LARGEST = 1 << 20  # bytes in a frame: who announces more is none of ours
_HEADER = struct.Struct("!cI")


class WireError(Exception):
    """The other side sent what no process of ours would send."""


def frame(kind: bytes, payload: bytes) -> bytes:
    return _HEADER.pack(kind, len(payload)) + payload


def message(**values: Any) -> bytes:
    return frame(MESSAGE, json.dumps(values).encode())


class Frames:
    """Cuts a stream of bytes into frames, however the network has chopped it."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, data: bytes) -> Iterator[tuple[bytes, bytes]]:
        self._rest += data
        while len(self._rest) >= _HEADER.size:
            kind, length = _HEADER.unpack_from(self._rest)
            if kind not in (MESSAGE, STDOUT, STDERR) or length > LARGEST:
                raise WireError(f"a frame of kind {kind!r} and {length:,} bytes")
            end = _HEADER.size + length
            if len(self._rest) < end:
                return
            payload, self._rest = self._rest[_HEADER.size : end], self._rest[end:]
            yield kind, payload


def parse(payload: bytes) -> dict[str, Any]:
    """The JSON object of a message; raises WireError for anything else."""
    try:
        values = json.loads(payload)
    except ValueError as error:
        raise WireError(f"a message that is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise WireError("a message that is no JSON object")
    return values


def receive(link: socket.socket, frames: Frames, deadline: float | None = None) -> dict[str, Any]:
    """The next message, by time.monotonic() == deadline at the latest.

    Raises EOFError where the other side has closed, TimeoutError after the deadline.
    """
    data = b""  # the last call may have left a whole message behind
    while True:
        for kind, payload in frames.feed(data):
            if kind == MESSAGE:
                return parse(payload)
        left = None if deadline is None else deadline - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError
        link.settimeout(left)
        data = link.recv(65536)
        if not data:
            raise EOFError


def connect(host: str, port: int, deadline: float) -> socket.socket:
    """A connection, retried until the deadline (many ranks at once can fill a listener's queue).

    Raises OSError with the last reason.
    """
    pause_s = 0.02
    while True:
        try:
            left = max(0.1, deadline - time.monotonic())
            link = socket.create_connection((host, port), timeout=left)
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
    """A peer whose host died is noticed within half a minute; small frames go at once."""
    link.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    link.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):
            link.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
