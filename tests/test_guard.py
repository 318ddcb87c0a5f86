"""One guard inside the test's own process: what it does when a terminal closes, and when a file fails."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from allranks.base import links
from allranks.job import variables
from allranks.job.identity import RankIdentity
from allranks.launch.guard import Guard


@pytest.fixture
def supervisor() -> Iterator[socket.socket]:
    """A listener in the place of `allranks launch`."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(10)
        yield listener


def connected(supervisor: socket.socket, rank: int) -> tuple[Guard, links.Connection]:
    """A guard of this rank, and the supervisor's end of its connection."""
    host, port = supervisor.getsockname()
    identity = RankIdentity("mpich", rank, 2, rank, 2)
    guard = Guard(identity, {variables.SUPERVISOR: f"{host}:{port}"})
    guard.link.sock.setblocking(False)
    sock, _ = supervisor.accept()
    sock.settimeout(10)
    return guard, links.Connection(sock)


def test_a_window_may_be_resized_after_the_program_has_closed_one_of_its_terminals(supervisor):
    """Its stdout is over, its stderr is not: that one gets the new size."""
    guard, ours = connected(supervisor, rank=0)
    out, out_inner = os.openpty()
    err, err_inner = os.openpty()
    guard.pipes = {out: "out", err: "err"}
    guard.terminals = [out, err]

    os.close(out_inner)
    guard._on_output(out)
    guard._resize(rows=12, columns=34)
    assert os.get_terminal_size(err_inner) == (34, 12)
    assert guard.terminals == [err]

    os.close(err_inner)
    os.close(err)
    guard._resize(rows=1, columns=2)  # the system knows this terminal no more
    guard.link.close()
    ours.close()
