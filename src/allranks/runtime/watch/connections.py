"""The connections between rank 0 and the other ranks of a run, on which they watch over each other.

Rank 0 has a connection to every other rank, and those have one each, to rank 0. The watchdog's thread sends
and hears all messages. The kernel closes a connection when the process at its other end ends, so the end of
a connection is a message too.
"""

from __future__ import annotations

import os
import secrets
import selectors
import socket
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from allranks.base import links

CONNECT_S = 10.0  # how long it may take to reach rank 0, on a busy host too
SEND_S = 1.0  # a message to a rank that takes none for so long is lost


class DoorPlace(NamedTuple):
    """Where rank 0 is to be reached, and what it asks for there."""

    address: str
    port: int
    secret: str


class Connections:
    """This rank's connections, by the rank at the other end."""

    def __init__(
        self, on_message: Callable[[int, Mapping[str, Any]], None], on_break: Callable[[int], None]
    ) -> None:
        """Two functions that `listen` calls, each with the other rank's number first.

        `on_message` gets each message. `on_break` is called when the connection has ended, unless `forget`
        was called before.
        """
        self._on_message = on_message
        self._on_break = on_break
        self._selector = selectors.DefaultSelector()
        self._by_rank: dict[int, links.Connection] = {}
        # On rank 0 alone:
        self._secret = ""
        self._listener: socket.socket | None = None
        self._door: links.Door | None = None
        self._world_size = 0

    # --- making them ----------------------------------------------------------------------------------

    def open_door(self, address: str, far: bool, world_size: int) -> DoorPlace:
        """On rank 0: listens for the other ranks. They are let in once `let_in` is called.

        Raises UserError as links.listen() does.
        """
        self._world_size = world_size
        self._secret = secrets.token_hex(32)
        self._listener = links.listen(address, far=far, connections=world_size)
        return DoorPlace(address, self._listener.getsockname()[1], self._secret)

    def let_in(self) -> None:
        """On rank 0: lets in the ranks that come to the door."""
        assert self._listener is not None  # open_door() was called
        self._door = links.Door(
            self._listener, self._secret, self._selector, self._welcome, self._world_size
        )
        self._leave_children_out()

    def connect_to_rank_0(self, rank: int, door: DoorPlace) -> None:
        """On another rank. Raises OSError if rank 0 cannot be reached."""
        connection = links.connect(door.address, door.port, CONNECT_S)
        connection.try_to_send(secret=door.secret, rank=rank)
        self._take_in(0, connection)
        self._leave_children_out()

    def _welcome(self, connection: links.Connection, hello: Mapping[str, Any]) -> None:
        """Somebody has shown the secret at rank 0's door."""
        rank = hello.get("rank")
        if not isinstance(rank, int) or not 0 < rank < self._world_size:
            connection.close()
            return
        connection.sock.settimeout(SEND_S)
        self._take_in(rank, connection)
        if len(self._by_rank) == self._world_size - 1 and self._door is not None:
            self._door.close()  # all ranks are here: nobody else has business with this one
            self._door = None
        self._hear_whole_messages(rank, connection)  # that came together with the first one

    def _take_in(self, rank: int, connection: links.Connection) -> None:
        self._by_rank[rank] = connection
        self._selector.register(connection, selectors.EVENT_READ, partial(self._hear, rank, connection))

    # --- using them -----------------------------------------------------------------------------------

    def ranks(self) -> set[int]:
        """The ranks at the other ends. Empty in a run of one rank, and before the ranks are in touch."""
        return set(self._by_rank)

    def tell(self, rank: int, **word: Any) -> None:
        """Sends a message, if there is still a connection to that rank."""
        connection = self._by_rank.get(rank)
        if connection is not None:
            connection.try_to_send(**word)

    def tell_all(self, **word: Any) -> None:
        for connection in list(self._by_rank.values()):  # a copy: the other thread may take one out
            connection.try_to_send(**word)

    def forget(self, rank: int) -> None:
        """This rank has said goodbye: that its connection ends means nothing any more."""
        self._by_rank.pop(rank, None)

    def listen(self, for_s: float) -> None:
        """Waits up to `for_s` seconds for something to arrive, and hears it."""
        for key, _ in self._selector.select(for_s):
            key.data()
        if self._door is not None:
            self._door.tidy_up()

    def _hear(self, rank: int, connection: links.Connection) -> None:
        try:
            is_there = connection.receive()
            self._hear_whole_messages(rank, connection)
        except (OSError, links.WireError):
            is_there = False
        if is_there:
            return

        self._selector.unregister(connection)
        connection.close()
        if self._by_rank.get(rank) is connection:
            del self._by_rank[rank]
            self._on_break(rank)

    def _hear_whole_messages(self, rank: int, connection: links.Connection) -> None:
        while (word := connection.inbox.take()) is not None:
            self._on_message(rank, word)

    # --- ending them ----------------------------------------------------------------------------------

    def close(self) -> None:
        """Closes all of them."""
        self._close_sockets()
        self._selector.close()

    def _leave_children_out(self) -> None:
        """Children, such as a data loader's workers, must not keep this rank's connections open."""
        os.register_at_fork(after_in_child=self._close_sockets)

    def _close_sockets(self) -> None:
        for key in list((self._selector.get_map() or {}).values()):
            assert isinstance(key.fileobj, (socket.socket, links.Connection))
            key.fileobj.close()
