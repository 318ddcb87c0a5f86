"""One guard inside the test's own process: what it does when a terminal closes, and when a file fails."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator

import pytest

from allranks.base import links
from allranks.job import variables
from allranks.job.identity import RankIdentity
from allranks.launch.guard import MOST_WAITING_BYTES, Guard, OutputFile
from helpers import PYTHON, execute, until


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


def test_all_that_a_file_has_left_reaches_the_supervisor(supervisor, tmp_path):
    """Each byte that is not ASCII takes six in a message, and a message may not be longer than a limit."""
    (tmp_path / "output").write_text("in the way of the folder")
    said = "é".encode() * (MOST_WAITING_BYTES // 2)
    guard, ours = connected(supervisor, rank=1)
    file = OutputFile(f"{tmp_path}/output/rank-1.out")
    file.add(said, wake=lambda: None)
    until(lambda: file.problem, 10)

    guard._give_up_file(file)
    heard: list[dict[str, str]] = []
    while sum(len(word.get("out", "")) for word in heard) < len(said):
        guard._send()
        assert ours.receive()
        while (word := ours.inbox.take()) is not None:
            heard.append(word)
    assert "going on without that file" in heard[0]["err"]
    assert b"".join(links.output(word["out"]) for word in heard[1:]) == said
    guard.link.close()
    ours.close()


# --- files of the user's in the present directory ---------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["allranks.launch.guard", "--", "true"], 0),
        (["allranks.launch.preflight"], 1),  # without its task
        (["allranks.launch.look", "1", ""], 0),
        (["allranks", "--version"], 0),
    ],
    ids=lambda words: words[0] if isinstance(words, list) else "",
)
def test_a_file_named_as_a_module_of_python_is_not_taken_for_it(words, code, tmp_path):
    for name in ("random", "socket", "secrets", "select", "selectors", "shutil", "json", "argparse"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('mine')\n")
    done = execute([PYTHON, "-m", *words], tmp_path)
    assert "mine" not in done.err
    assert done.code == code
