"""Who connects to the supervisor: a stranger until it has shown the launch's secret, then a rank's guard.

Anybody who reaches this host can connect. So a new connection has a few seconds to say hello with the
secret of this launch, and only a few connections without it are kept at a time. A guard that knows the
secret says which rank it is. If that rank cannot belong to this launch, problem_with() says why.
"""

from __future__ import annotations

import asyncio
import errno
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from allranks.base import links
from allranks.launch.outcome import Loss, Rank

HELLO_S = 10.0  # how long somebody who connects may take to show the secret

# What the system says of a connection to a host that is down or cut off.
SILENCE = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


@dataclass(eq=False)
class Guarded:
    """A rank, and the connection to its guard."""

    rank: Rank
    guard: asyncio.StreamWriter | None  # the connection; None once it has ended
    heard_at: float  # when its last message came, by the event loop's clock
    boot_id: str | None = None  # the boot id of its host's kernel: two hosts may have the same name
    pid: int | None = None  # the guard's process, as its own host numbers it
    awaits_room: bool = False  # nothing of it is read, because the console is full
    beyond_bytes: int = 0  # how much output it has sent although the console was full

    def tell(self, **word: Any) -> None:
        """Sends the guard a message; does nothing if the connection has ended."""
        if self.guard is not None:
            self.guard.write(links.message(**word))

    @property
    def is_to_answer(self) -> bool:
        """Whether the guard, if it is asked, has an answer to give, and that answer would be read."""
        return not (self.rank.has_ended or self.awaits_room)


class Newcomers:
    """The connections whose first message has not come yet."""

    def __init__(self, most: int) -> None:
        """At most `most` of them are kept at a time."""
        self._most = most
        self._waiting: list[asyncio.StreamWriter] = []  # the oldest first

    async def hello(
        self, reader: asyncio.StreamReader, newcomer: asyncio.StreamWriter, inbox: links.Inbox
    ) -> dict[str, Any]:
        """The first message of a new connection. Raises as next_message(), and asyncio.TimeoutError.

        Strangers cannot use up what the ranks need: if there are too many, the oldest is sent away.
        """
        self._waiting.append(newcomer)
        if len(self._waiting) > self._most:
            self._waiting.pop(0).close()  # a rank shows the secret at once
        try:
            return await asyncio.wait_for(next_message(reader, inbox), HELLO_S)
        finally:
            if newcomer in self._waiting:  # else it was sent away
                self._waiting.remove(newcomer)


async def next_message(reader: asyncio.StreamReader, inbox: links.Inbox) -> dict[str, Any]:
    """A connection's next message. Raises EOFError at its end, WireError if it is none of ours."""
    while (told := inbox.take()) is None:
        piece = await reader.read(links.PIECE_BYTES)
        if not piece:
            raise EOFError
        inbox.add(piece)
    return told


def problem_with(hello: Mapping[str, Any], world_size: int, came: Collection[int]) -> str:
    """Why the rank that says `hello` cannot be one of this launch's ranks; empty if it can.

    `world_size` ranks were asked for, and the ranks `came` are here already.
    """
    number, host, size = hello["rank"], hello["host"], hello["world_size"]
    if number in came or number >= world_size:
        article = "a second" if number in came else "a"
        return (
            f"{article} rank {number} came from {host}, of {world_size} ranks that were asked "
            f"for; the variables there are those of `{hello['launcher']}`: take the launcher of the "
            "MPI or scheduler that this host has (--launcher)"
        )
    if size not in (None, world_size):
        return (
            f"rank {number} on {host} was started as one of {size}, but {world_size} "
            "were asked for: look at the launcher's options"
        )
    return ""


def loss_by(error: Exception) -> Loss:
    """Whether a connection was ended by the other host's system, or by that host's silence."""
    if isinstance(error, OSError) and error.errno in SILENCE:
        return Loss.SILENT
    return Loss.CUT
