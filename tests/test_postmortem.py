"""A process of this host is looked at: how it ended, whether it is stopped, where its program is."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest

from allranks.base.processes import ProcessIdentity, process_stat
from allranks.runtime.watch import postmortem
from allranks.runtime.watch.verdict import FROM_AFAR, Known, Peer
from helpers import PYTHON, TIMEOUT_S, until

RANK = """
import json, time
from allranks.base.processes import ProcessIdentity
from allranks.runtime.watch import postmortem
from allranks.runtime.watch.verdict import Peer

me = Peer("here", ProcessIdentity.of_this_process(), postmortem.offer_stack())

def wait_for_nothing():
    print(json.dumps(me.to_json()), flush=True)
    time.sleep(1000)

wait_for_nothing()
"""


@pytest.fixture
def rank() -> Iterator[tuple[subprocess.Popen, Peer]]:
    """A process that offers its stack, and what it tells the other ranks."""
    with subprocess.Popen([PYTHON, "-c", RANK], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        yield process, Peer.from_json(json.loads(process.stdout.readline()))
        process.kill()


@pytest.fixture
def here() -> ProcessIdentity:
    return ProcessIdentity.of_this_process()


def state(pid: int) -> str:
    stat = process_stat(pid)
    return "gone" if stat is None else stat.state


def stop(process: subprocess.Popen) -> None:
    process.send_signal(signal.SIGSTOP)
    until(lambda: state(process.pid) == "T", 10)


def end(process: subprocess.Popen, signum: int) -> None:
    """Ends it; nobody waits for it yet, as in the moment after a rank's death."""
    process.send_signal(signum)
    until(lambda: state(process.pid) == "Z", 10)


def test_nothing_is_said_of_one_that_runs(rank, here):
    _, peer = rank
    assert postmortem.look(peer, here, Known.MUTE) == ""


def test_one_that_is_stopped_shows_its_stack_and_stays_stopped(rank, here):
    process, peer = rank
    stop(process)
    words = postmortem.look(peer, here, Known.MUTE)
    assert words.startswith("is stopped (state T). It is at\n")
    assert words.endswith("in wait_for_nothing")  # the innermost call comes last, as in a traceback
    until(lambda: state(process.pid) == "T", 10)


def test_one_that_runs_but_never_answers_shows_its_stack(rank, here):
    _, peer = rank
    words = postmortem.look(peer, here, Known.STUCK)
    assert words.startswith("does not answer. It is at\n")
    assert "in wait_for_nothing" in words


@pytest.mark.parametrize(
    ("signum", "words"),
    [
        (signal.SIGKILL, "was killed by SIGKILL (out of memory?)"),
        (signal.SIGSEGV, "was killed by SIGSEGV"),
    ],
)
def test_one_that_has_died_tells_by_what(rank, here, signum, words):
    process, peer = rank
    end(process, signum)
    assert postmortem.look(peer, here, Known.GONE) == words
    process.wait()  # as its launcher does: then nobody knows any more
    assert postmortem.look(peer, here, Known.GONE) == FROM_AFAR[Known.GONE]


def test_one_that_has_ended_by_itself_is_not_called_killed(here):
    """As a program does that calls sys.exit(0) in its loop while the other ranks train on."""
    with subprocess.Popen([PYTHON, "-c", RANK.replace("time.sleep(1000)", "")], stdout=-1) as process:
        assert process.stdout is not None
        peer = Peer.from_json(json.loads(process.stdout.readline()))
        until(lambda: state(process.pid) == "Z", 10)
        assert postmortem.look(peer, here, Known.GONE) == "ended with exit code 0"


def other_start(process: ProcessIdentity) -> ProcessIdentity:
    """Had its number before: the process that has it now was started later."""
    assert process.started_ticks is not None
    return process._replace(started_ticks=process.started_ticks - 1)


def other_container(process: ProcessIdentity) -> ProcessIdentity:
    return process._replace(pid_namespace="pid:[1]")


def other_host(process: ProcessIdentity) -> ProcessIdentity:
    return process._replace(boot_id="another")


@pytest.mark.parametrize("other", [other_start, other_container, other_host])
def test_another_process_of_the_same_number_is_neither_looked_at_nor_killed(rank, here, other):
    process, peer = rank
    stop(process)
    stranger = replace(peer, process=other(peer.process))
    for known in Known:
        assert postmortem.look(stranger, here, known) == FROM_AFAR[known]
    postmortem.kill(stranger.process, here)
    assert state(process.pid) == "T"

    postmortem.kill(peer.process, here)  # the one that is meant
    assert process.wait(TIMEOUT_S) == -signal.SIGKILL


def test_a_process_of_somebody_who_offers_no_stack_is_named_without(rank, here):
    process, peer = rank
    stop(process)
    assert postmortem.look(replace(peer, dump_fd=None), here, Known.MUTE) == "is stopped (state T)"
