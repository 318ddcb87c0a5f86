"""What the ranks settle on a real store: each rank a thread with a connection of its own."""

from __future__ import annotations

import os
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from allranks.base.errors import UserError
from allranks.config import WatchdogConfig
from allranks.job.identity import RankIdentity
from allranks.runtime import meeting as meetings
from allranks.runtime.meeting import Meeting
from allranks.runtime.watch.progress import Progress
from helpers import PYTHON

JOIN_S = 30  # many times what a test here takes


def on_ranks(world_size: int, act: Callable[[Meeting], Any]) -> list[Any]:
    """act(meeting) on every rank at once; what each returns or raises, in the order of the ranks."""
    server, port = meetings.serve("127.0.0.1", world_size)
    came_of_it: list[Any] = [None] * world_size

    def member(rank: int) -> None:
        store = server
        if rank > 0:
            store = dist.TCPStore("127.0.0.1", port, world_size, False, timedelta(seconds=JOIN_S))
        try:
            came_of_it[rank] = act(Meeting(rank, world_size, store))
        except UserError as error:
            came_of_it[rank] = error

    threads = [threading.Thread(target=member, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(JOIN_S)
    assert not any(thread.is_alive() for thread in threads)
    return came_of_it


# --- settle ---------------------------------------------------------------------------------------


def test_rank_0_decides_from_what_all_say_and_each_gets_its_own_reply():
    heard = []

    def decide(said: list[Any]) -> list[Any]:
        heard.append(said)
        return [{"your square": number * number} for number in said]

    replies = on_ranks(4, lambda meeting: meeting.settle(meeting.rank + 10, decide))
    assert replies == [{"your square": n * n} for n in (10, 11, 12, 13)]
    assert heard == [[10, 11, 12, 13]]  # once, on rank 0, in the order of the ranks


def test_rounds_do_not_mix():
    def act(meeting: Meeting) -> list[int]:
        return [
            meeting.settle([round_, meeting.rank], lambda said: [sum(map(sum, said))] * len(said))
            for round_ in range(20)
        ]

    assert on_ranks(3, act) == [[3 * round_ + 3 for round_ in range(20)]] * 3


def test_an_error_of_the_decision_is_everybodys_and_said_once():
    def decide(said: list[Any]) -> list[Any]:
        raise UserError("the ranks do not fit together")

    errors = on_ranks(3, lambda meeting: meeting.settle(None, decide))
    assert [str(error) for error in errors] == ["the ranks do not fit together"] * 3
    assert [error.said_by for error in errors] == [0, 0, 0]


def test_alone_nobody_is_asked():
    alone = Meeting(0, 1, None)
    assert alone.settle(5, lambda said: [2 * said[0]]) == 10
    assert alone.from_rank_0(lambda: "mine") == "mine"
    alone.agree(None)
    with pytest.raises(UserError, match="mine alone"):
        alone.agree(UserError("mine alone"))
    alone.leave()


# --- agree and from_rank_0 ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("problems", "said"),
    [
        ([None, None, None], [None, None, None]),
        (["no disk", "no disk", "no disk"], ["no disk"] * 3),
        ([None, None, "no disk"], ["rank 2: no disk"] * 3),
        (["no disk", None, "no disk"], ["ranks 0, 2: no disk"] * 3),
        ([None, "no disk", "no data"], ["rank 1: no disk\nrank 2: no data"] * 3),
    ],
)
def test_the_ranks_agree_on_an_error(problems, said):
    def act(meeting: Meeting) -> None:
        problem = problems[meeting.rank]
        meeting.agree(UserError(problem) if problem else None)

    told = on_ranks(3, act)
    assert [None if error is None else str(error) for error in told] == said


def test_of_many_ranks_eight_are_named():
    assert meetings.ranks_named([3]) == "rank 3"
    assert meetings.ranks_named(range(8)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7"
    assert meetings.ranks_named(range(12)) == "ranks 0, 1, 2, 3, 4, 5, 6, 7, ... (12 in all)"


def test_what_rank_0_makes_is_made_once_and_known_to_all():
    made = []

    def make() -> dict[str, int]:
        made.append(threading.get_ident())
        return {"answer": 42}

    assert on_ranks(3, lambda meeting: meeting.from_rank_0(make)) == [{"answer": 42}] * 3
    assert len(made) == 1


def test_what_rank_0_cannot_make_is_everybodys_error():
    def make() -> None:
        raise UserError("there is no room")

    errors = on_ranks(3, lambda meeting: meeting.from_rank_0(make))
    assert [str(error) for error in errors] == ["there is no room"] * 3


# --- waiting --------------------------------------------------------------------------------------


def test_a_wait_counts_as_progress_when_it_begins_and_names_whom_it_waits_for():
    server, port = meetings.serve("127.0.0.1", 2)
    progress = Progress(WatchdogConfig())
    before = progress.mark()
    zero = Meeting(0, 2, server, progress)
    replies: list[Any] = []
    waiting = threading.Thread(target=lambda: replies.append(zero.settle(0, lambda said: said)))
    waiting.start()
    deadline = time.monotonic() + JOIN_S
    while not progress.waits_for and time.monotonic() < deadline:
        time.sleep(0.01)
    assert progress.waits_for == "rank 1"
    assert progress.mark() != before
    assert progress.arrivals == 1

    one = Meeting(1, 2, dist.TCPStore("127.0.0.1", port, 2, False, timedelta(seconds=JOIN_S)))
    assert one.settle(1, lambda said: said) == 1
    waiting.join(JOIN_S)
    assert replies == [0]
    assert progress.waits_for == ""


SERVE = """
import os, sys
from allranks.runtime import meeting
store, port = meeting.serve("127.0.0.1", 2)
print(port, flush=True)
sys.stdin.read()
"""


def test_a_rank_whose_rank_0_has_died_says_so(tmp_path):
    with subprocess.Popen([PYTHON, "-c", SERVE], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        port = int(server.stdout.readline())
        store = dist.TCPStore("127.0.0.1", port, 2, False, timedelta(seconds=JOIN_S))
        one = Meeting(1, 2, store)
        threading.Timer(0.5, server.kill).start()
        with pytest.raises(UserError, match="rank 1 has lost its connection to rank 0") as error:
            one.settle(None, lambda said: said)
        one.leave()  # has no error of its own, which would take the place of that one
    assert error.value.said_by is None  # the other ranks may have lost it as well, or not


def test_under_srun_a_variable_that_is_empty_says_nothing(monkeypatch):
    """The ranks then meet where the job's step leads them."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "")
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    identity = RankIdentity("srun", rank=0, world_size=2, local_rank=0, local_world_size=2)
    store = meetings._join_env(identity, Progress(WatchdogConfig()))
    store.set("rank 0", "is here")
    other = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), 2, False)
    assert other.get("rank 0") == b"is here"
    assert os.environ["MASTER_ADDR"] == "127.0.0.1"


def test_rank_0_leaves_last():
    """Else a rank that still has something to read would be cut off."""
    seen = []

    def act(meeting: Meeting) -> None:
        time.sleep(0.3 * meeting.rank)
        if meeting.rank:
            seen.append(f"{meeting.rank} leaves")
            meeting.leave()
        else:
            meeting.leave()
            seen.append("0 has left")

    on_ranks(3, act)
    assert set(seen[:2]) == {"1 leaves", "2 leaves"}
    assert seen[2:] == ["0 has left"]


def test_rank_0_does_not_wait_for_ever_for_a_rank_that_has_died(monkeypatch):
    monkeypatch.setattr(meetings, "LEAVE_S", 0.2)
    server, _ = meetings.serve("127.0.0.1", 2)
    began = time.monotonic()
    zero = Meeting(0, 2, server)
    zero.leave()
    assert 0.2 <= time.monotonic() - began < JOIN_S
    zero.leave()  # twice does nothing
