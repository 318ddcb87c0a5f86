"""Messages between the processes of one run: JSON objects over TCP, one object a line.

All messages between the processes of a run, apart from the training itself, go through this module: what
the launcher tells its ranks, a program's output on its way to the user's console, the ranks' watch over
each other. A message is a JSON object, so nothing that arrives can become code. A process that connects
must show the secret of the run in its first message. Without it, it gets no answer.

From the bottom up: `message` and `parse` translate one message, `Inbox` cuts a stream of bytes into
messages, `Connection` is one end of a TCP connection, and `Door` lets in those who know the secret.
"""

from __future__ import annotations

import contextlib
import errno
import hmac
import json
import os
import selectors
import socket
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

from allranks.base.errors import UserError

BY_LAUNCH = "For `allranks launch`: ALLRANKS_MASTER_ADDR."

# 64 KiB of a program's output take up to 384 KiB as JSON. Longer messages are not ours.
LONGEST_MESSAGE_BYTES = 1 << 20
PIECE_BYTES = 1 << 16  # what is taken from a connection at once
SHORTEST_PAUSE_S = 0.02  # between two attempts to connect; it doubles up to the longest
LONGEST_PAUSE_S = 1.0
HELLO_S = 5.0  # how long a newcomer may take to show the secret; a rank does it at once
SPARE = 8  # newcomers beyond the expected ranks: a port scanner or two do no harm
# Of descriptors, for what else a process opens: the data, a checkpoint, the workers of a data loader.
SPARE_DESCRIPTORS = 64
PAUSE_S = 0.5  # until a process that has no free descriptor tries again to let somebody in
# What accept() says where this process, or its host, can take no further connection (accept(2)).
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)


class WireError(Exception):
    """The other side has sent something that no process of ours would send."""


# --- one message ----------------------------------------------------------------------------------


def message(**values: Any) -> bytes:
    """One message as it travels: JSON, and a line feed at its end.

    JSON knows no bytes. Bytes among the values travel as text in which each character stands for one byte;
    `output` gives the bytes back.
    """
    return json.dumps(values, default=lambda data: data.decode("latin-1")).encode() + b"\n"


def output(text: str) -> bytes:
    """The bytes that `message` was given, from the text as which they travelled."""
    return text.encode("latin-1")


def parse(line: bytes) -> dict[str, Any]:
    """The values of the message in `line`. Raises WireError if the line is not a JSON object."""
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise WireError(f"a message that is no JSON ({error})") from error
    if not isinstance(values, dict):
        raise WireError("a message that is no JSON object")
    return values


def knows_secret(hello: Mapping[str, Any], secret: str) -> bool:
    """Whether the first message of a connection shows the secret.

    The comparison takes the same time whatever is wrong, so a stranger cannot find the secret letter by
    letter. JSON may hold half a character, which UTF-8 cannot express: it is replaced by a question mark.
    """
    shown = str(hello.get("secret")).encode(errors="replace")
    return hmac.compare_digest(shown, secret.encode())


# --- a stream of messages -------------------------------------------------------------------------


class Inbox:
    """Cuts a stream into messages: TCP delivers bytes in pieces that end anywhere."""

    def __init__(self) -> None:
        self._lines: deque[bytes] = deque()  # whole messages, not taken yet
        self._rest = b""  # the beginning of the next message

    def add(self, piece: bytes) -> None:
        """Takes in what has arrived. Raises WireError if a message is too long to be ours."""
        *lines, self._rest = (self._rest + piece).split(b"\n")
        self._lines.extend(lines)
        if len(self._rest) > LONGEST_MESSAGE_BYTES:
            raise WireError("a message that is too long")

    def take(self) -> dict[str, Any] | None:
        """The next whole message, or None while there is none. Raises WireError as `parse` does."""
        return parse(self._lines.popleft()) if self._lines else None


class Connection:
    """One end of a TCP connection on which messages go both ways."""

    def __init__(self, sock: socket.socket) -> None:
        self.sock = sock
        self.inbox = Inbox()

    def fileno(self) -> int:
        """Lets `select`, `poll` and selectors wait for this connection."""
        return self.sock.fileno()

    def send(self, **values: Any) -> None:
        """Sends one message. Raises OSError if the connection has ended."""
        self.sock.sendall(message(**values))

    def try_to_send(self, **values: Any) -> None:
        """Sends one message, unless the connection has ended: whoever listens to it notices that."""
        with contextlib.suppress(OSError):
            self.send(**values)

    def receive(self) -> bool:
        """Takes in what has arrived, or waits until something arrives. False once the other side has ended.

        Raises OSError if the connection broke, WireError if the other side does not speak this protocol.
        """
        piece = self.sock.recv(PIECE_BYTES)
        self.inbox.add(piece)
        return bool(piece)

    def next_message(self) -> dict[str, Any]:
        """Waits for the next message. Raises EOFError once the other side has ended, and as `receive`."""
        while True:
            told = self.inbox.take()
            if told is not None:
                return told
            if not self.receive():
                raise EOFError

    def close(self) -> None:
        self.sock.close()


def connect(host: str, port: int, within_s: float) -> Connection:
    """Connects, and tries again for `within_s` seconds: many ranks at once can fill a listener's queue.

    Raises OSError with the last attempt's reason, and at once where `host` cannot be a host's name.
    """
    deadline = time.monotonic() + within_s
    pause_s = SHORTEST_PAUSE_S
    while True:
        try:
            sock = socket.create_connection((host, port), max(0.1, deadline - time.monotonic()))
            break
        except UnicodeError as error:  # Python cannot even ask for a name such as `a..b`
            raise OSError(f"no host can have the name {host}") from error
        except OSError:
            if time.monotonic() + pause_s >= deadline:
                raise
            time.sleep(pause_s)
            pause_s = min(LONGEST_PAUSE_S, 2 * pause_s)
    keep_alive(sock)
    sock.settimeout(None)
    return Connection(sock)


def keep_alive(sock: socket.socket) -> None:
    """Notices within half a minute that the other host has died, and sends small messages at once.

    Without keepalive a connection to a host that lost its power stays open for ever. The kernel asks after
    10 s of silence, and every 5 s from then on; after 4 questions without an answer the connection breaks.
    """
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for name, value in (("TCP_KEEPIDLE", 10), ("TCP_KEEPINTVL", 5), ("TCP_KEEPCNT", 4)):
        if hasattr(socket, name):  # not every system has all three
            sock.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


# --- the side that is connected to ----------------------------------------------------------------


def listen(address: str, port: int = 0, far: bool = False, connections: int = 1) -> socket.socket:
    """A socket that listens at an address of this host, which is rank 0's; port 0 takes a free one.

    `far` says that ranks are on other hosts, `connections` how many processes will connect. Raises
    UserError if this host has no such address, if the port is taken, where ranks are far and the
    address is one that only this host can reach, or if this process may not have so many connections.
    """
    allow_connections(connections)
    host = socket.gethostname()
    try:
        found = {entry[0] for entry in socket.getaddrinfo(address, port, type=socket.SOCK_STREAM)}
        family = socket.AF_INET if socket.AF_INET in found else socket.AF_INET6
        listener = socket.create_server((address, port), family=family, backlog=4096)
    except (OSError, OverflowError, UnicodeError) as error:
        where = f"MASTER_ADDR={address}" + (f" and MASTER_PORT={port}" if port else "")
        raise UserError(
            f"rank 0 on {host} cannot listen at {where} ({error}): give an address of that host and a port "
            f"that is free there, the same on every rank. {BY_LAUNCH}"
        ) from error

    # A host's own name may lead to its loopback; an address that is written as a loopback is meant.
    own = str(listener.getsockname()[0])
    if far and own.startswith(("127.", "::1")) and address != own:
        listener.close()
        raise UserError(
            f"MASTER_ADDR={address} is the loopback of rank 0's host {host}, which no other can reach: "
            f"give its address on the hosts' own network, the same on every rank. {BY_LAUNCH}"
        )
    return listener


def allow_connections(count: int) -> None:
    """Sees to it that this process may hold `count` more connections. Raises UserError if it may not.

    Each takes a descriptor, as an open file does. Rank 0 and the launcher hold one for each rank, and the
    usual soft limit of 1,024 is too low for many ranks: it is raised to the hard one.
    """
    import resource  # not needed by the guards, which start on every rank in a few milliseconds

    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    limit = soft
    if soft != hard:
        # The system may refuse a hard limit that is higher than it allows any process.
        with contextlib.suppress(OSError, ValueError):
            resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
            limit = hard

    needed = _open_descriptors() + count + SPARE_DESCRIPTORS
    if limit != resource.RLIM_INFINITY and needed > limit:
        raise UserError(
            f"a process on {socket.gethostname()} may have {limit} files and connections open, but this "
            f"one needs {needed}, {count} of them for other ranks: ask for a higher limit there "
            "(`ulimit -Hn` shows it), or start fewer ranks."
        )


def _open_descriptors() -> int:
    """How many descriptors this process has open; 0 where there is no /proc to tell."""
    try:
        return len(os.listdir("/proc/self/fd"))  # noqa: PTH208
    except OSError:
        return 0


class Door:
    """Lets in those who connect to a listening socket and show the secret in their first message.

    It works inside a loop over a selector whose `data` are functions to be called without arguments:

        for key, _ in selector.select(timeout_s):
            key.data()
        door.tidy_up()

    The door never waits when it reads from a newcomer, so no newcomer can hold up the loop. Once a newcomer
    has shown the secret, the door hands the connection and this first message to `welcome`, and has nothing
    more to do with it.

    Strangers cannot use up the connections that the ranks need: besides `expected` newcomers the door takes
    SPARE more at a time, and each of them must show the secret within HELLO_S.
    """

    def __init__(
        self,
        listener: socket.socket,
        secret: str,
        selector: selectors.BaseSelector,
        welcome: Callable[[Connection, dict[str, Any]], None],
        expected: int,
    ) -> None:
        self.listener = listener
        self._secret = secret
        self._selector = selector
        self._welcome = welcome
        self._most_newcomers = expected + SPARE
        # Connections that have not shown the secret yet, and by when each of them must.
        self._newcomers: dict[Connection, float] = {}
        self._pause_ends_at = 0.0  # nobody is let in before; 0 while there is no pause
        listener.setblocking(False)  # a newcomer may be gone again before it is accepted
        selector.register(listener, selectors.EVENT_READ, self._accept)

    def close(self) -> None:
        """Lets nobody in any more. Connections that `welcome` has got stay open."""
        for newcomer in list(self._newcomers):
            self._send_away(newcomer)
        if not self._pause_ends_at:
            self._selector.unregister(self.listener)
        self.listener.close()

    def tidy_up(self) -> None:
        """Ends the connections that have not shown the secret in time. To be called now and then."""
        now = time.monotonic()
        for newcomer, deadline in list(self._newcomers.items()):
            if now > deadline:
                self._send_away(newcomer)
        if self._pause_ends_at and now > self._pause_ends_at:
            self._pause_ends_at = 0.0
            self._selector.register(self.listener, selectors.EVENT_READ, self._accept)

    def _accept(self) -> None:
        try:
            sock, _ = self.listener.accept()
        except OSError as error:
            if error.errno in NO_ROOM:
                self._make_room()
            # Else the newcomer has gone again, or the door was closed a moment ago.
            return

        sock.setblocking(False)
        newcomer = Connection(sock)
        self._newcomers[newcomer] = time.monotonic() + HELLO_S
        self._selector.register(newcomer, selectors.EVENT_READ, lambda: self._hear(newcomer))
        if len(self._newcomers) > self._most_newcomers:
            self._send_away(next(iter(self._newcomers)))  # the oldest: a rank shows the secret at once

    def _make_room(self) -> None:
        """This process has no free descriptor, or the host no memory for another connection."""
        if self._newcomers:
            self._send_away(next(iter(self._newcomers)))
            return
        # Those who wait to be let in would wake the loop again and again.
        self._pause_ends_at = time.monotonic() + PAUSE_S
        self._selector.unregister(self.listener)

    def _hear(self, newcomer: Connection) -> None:
        if newcomer not in self._newcomers:  # it was sent away after the selector had seen it
            return
        try:
            is_there = newcomer.receive()
            hello = newcomer.inbox.take()
        except BlockingIOError:  # the selector was wrong: nothing has arrived
            return
        except (OSError, WireError):
            self._send_away(newcomer)
            return

        if hello is not None and knows_secret(hello, self._secret):
            self._forget(newcomer)
            newcomer.sock.setblocking(True)
            keep_alive(newcomer.sock)
            self._welcome(newcomer, hello)
        elif hello is not None or not is_there:
            self._send_away(newcomer)

    def _forget(self, newcomer: Connection) -> None:
        del self._newcomers[newcomer]
        self._selector.unregister(newcomer)

    def _send_away(self, newcomer: Connection) -> None:
        self._forget(newcomer)
        newcomer.close()
