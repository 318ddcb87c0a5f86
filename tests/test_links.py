"""Messages between processes: whole whatever the pieces, from nobody without the secret."""

from __future__ import annotations

import re
import selectors
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

import pytest

from allranks.base import links
from allranks.base.errors import UserError
from allranks.job import hosts
from helpers import PYTHON, execute

SECRET = "s" * 64


# --- the stream -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["node..x", "n" * 64], ids=["two dots", "64 letters"])
def test_what_cannot_be_a_hosts_name_is_refused_in_a_sentence(name):
    with pytest.raises(UserError, match=rf"cannot listen at MASTER_ADDR={re.escape(name)} \("):
        links.listen(name)
    began = time.monotonic()
    with pytest.raises(OSError, match=f"no host can have the name {re.escape(name)}"):
        links.connect(name, 1, within_s=600)
    assert time.monotonic() - began < 60  # it is not tried again
    assert not hosts.leads_back(name)
    with pytest.raises(UserError, match=f"host {re.escape(name)} of the allocation cannot be found"):
        hosts.address_for([name])


@pytest.mark.parametrize("piece_bytes", [1, 2, 7, 1000])
def test_messages_are_whole_wherever_the_pieces_end(piece_bytes):
    sent = [{"rank": 1}, {"text": "é\n\ud800"}, {}, {"deep": {"list": [1, 2.5, None]}}]
    stream = b"".join(links.message(**values) for values in sent)
    inbox, taken = links.Inbox(), []
    for start in range(0, len(stream), piece_bytes):
        inbox.add(stream[start : start + piece_bytes])
        while (values := inbox.take()) is not None:
            taken.append(values)
    assert taken == sent


def test_any_bytes_of_a_programs_output_survive():
    output = bytes(range(256))
    assert links.output(links.parse(links.message(out=output))["out"]) == output


def test_a_message_that_never_ends_is_refused():
    inbox = links.Inbox()
    inbox.add(b"x" * links.LONGEST_MESSAGE_BYTES)
    with pytest.raises(links.WireError, match="too long"):
        inbox.add(b"x")


@pytest.mark.parametrize("line", [b"", b"GET / HTTP/1.1\r", b"[1, 2]", b"\xff", b"7", b"[" * 99_999])
def test_what_is_no_json_object_is_refused(line):
    inbox = links.Inbox()
    inbox.add(line + b"\n")
    with pytest.raises(links.WireError):
        inbox.take()


def test_a_message_before_rubbish_is_heard():
    inbox = links.Inbox()
    inbox.add(links.message(failed=True) + b"rubbish\n")
    assert inbox.take() == {"failed": True}
    with pytest.raises(links.WireError):
        inbox.take()


def test_the_end_of_a_connection_is_told():
    ours, theirs = socket.socketpair()
    theirs.sendall(links.message(last=1) + b'{"half":')
    theirs.close()
    connection = links.Connection(ours)
    assert connection.next_message() == {"last": 1}
    with pytest.raises(EOFError):
        connection.next_message()
    connection.close()


# --- how many connections -------------------------------------------------------------------------


def test_more_connections_than_descriptors_are_refused_at_the_start(tmp_path):
    code = (
        "import resource\n"
        "from allranks.base import links\n"
        "from allranks.base.errors import UserError\n"
        "resource.setrlimit(resource.RLIMIT_NOFILE, (90, 200))\n"
        "links.listen('127.0.0.1', connections=100).close()\n"
        "print(resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "try: links.listen('127.0.0.1', connections=200)\n"
        "except UserError as error: print(error)\n"
    )
    raised, refused = execute([PYTHON, "-c", code], tmp_path).ok().out.splitlines()
    assert raised == "(200, 200)"
    assert re.search("may have 200 files and connections open, but this one needs 2[67].", refused)
    assert "200 of them for other ranks" in refused


def test_a_limit_that_the_system_does_not_raise_stays_as_it_is(monkeypatch):
    """As where the hard limit is higher than the system allows any process."""
    import resource

    def refuse(*_: object) -> None:
        raise ValueError("not allowed to raise maximum limit")

    monkeypatch.setattr(resource, "getrlimit", lambda _: (9000, resource.RLIM_INFINITY))
    monkeypatch.setattr(resource, "setrlimit", refuse)
    links.allow_connections(10)
    with pytest.raises(UserError, match="may have 9000 files and connections open"):
        links.allow_connections(9000)


# --- the door -------------------------------------------------------------------------------------


class Loop:
    """A door on a port of the loopback, and the loop in which it works."""

    def __init__(self, selector: selectors.BaseSelector) -> None:
        self.selector = selector
        self.came: list[tuple[links.Connection, dict]] = []
        self.door = links.Door(
            links.listen("127.0.0.1"), SECRET, selector, lambda *who: self.came.append(who), expected=1
        )
        self.place = self.door.listener.getsockname()

    def run(self, for_s: float = 0.3) -> None:
        until = time.monotonic() + for_s
        while time.monotonic() < until:
            for key, _ in self.selector.select(0.01):
                key.data()
            self.door.tidy_up()

    def connect(self) -> socket.socket:
        return socket.create_connection(self.place, 5)


@contextmanager
def loop() -> Iterator[Loop]:
    with selectors.DefaultSelector() as selector:
        one = Loop(selector)
        yield one
        one.door.close()
        for connection, _ in one.came:
            connection.close()


def test_who_shows_the_secret_is_welcome_with_all_that_it_says():
    with loop() as one, one.connect() as guest:
        guest.sendall(links.message(secret=SECRET, rank=3) + links.message(alarm=1))
        one.run()
        [(connection, hello)] = one.came
        assert hello == {"secret": SECRET, "rank": 3}
        assert connection.next_message() == {"alarm": 1}


@pytest.mark.parametrize(
    "said",
    [
        links.message(secret="guess", rank=1),
        links.message(rank=1),
        links.message(secret=SECRET[:-1]),
        links.message(secret=[SECRET]),
        b"GET / HTTP/1.1\r\n\r\n",
        b"\n",
    ],
)
def test_a_stranger_is_sent_away_without_a_word(said):
    with loop() as one, one.connect() as stranger:
        stranger.sendall(said)
        one.run()
        stranger.settimeout(5)
        with suppress(ConnectionResetError):  # it had sent more than was read
            assert stranger.recv(100) == b""
        assert one.came == []


def test_a_newcomer_has_its_time_in_all_and_not_for_each_byte(monkeypatch):
    monkeypatch.setattr(links, "HELLO_S", 0.5)
    with loop() as one, one.connect() as slow:
        hello = links.message(secret=SECRET, rank=1)
        for byte in hello[:10]:
            slow.sendall(bytes([byte]))
            one.run(0.1)
            if one.selector.get_map() and len(one.selector.get_map()) == 1:
                break  # the door alone is listened to
        else:
            pytest.fail("it is still listened to")
        assert one.came == []


def test_a_silent_newcomer_does_not_keep_the_next_one_waiting():
    with loop() as one, one.connect(), one.connect() as guest:
        guest.sendall(links.message(secret=SECRET))
        one.run()
        assert [hello for _, hello in one.came] == [{"secret": SECRET}]


def test_strangers_are_few_at_a_time_and_do_not_keep_a_rank_out():
    with loop() as one:
        strangers = [one.connect() for _ in range(40)]
        one.run()
        # The listening socket, and the newcomers that the door takes at a time.
        assert len(one.selector.get_map()) == 1 + 1 + links.SPARE
        with one.connect() as guest:
            guest.sendall(links.message(secret=SECRET))
            one.run()
        assert [hello for _, hello in one.came] == [{"secret": SECRET}]
        for stranger in strangers:
            stranger.close()


def test_a_closed_door_lets_nobody_in_and_leaves_guests_alone():
    with selectors.DefaultSelector() as selector:
        one = Loop(selector)
        with one.connect() as guest, one.connect() as silent:
            guest.sendall(links.message(secret=SECRET))
            one.run()
            one.door.close()
            assert silent.recv(100) == b""
            [(connection, _)] = one.came
            connection.send(still="here")
            assert links.Connection(guest).next_message() == {"still": "here"}
            with pytest.raises(ConnectionRefusedError):
                one.connect()
            connection.close()
