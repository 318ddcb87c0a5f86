"""What a launch makes of its guards' messages, inside the test's own process and without ranks."""

from __future__ import annotations

import asyncio
import os
import re
import signal
import socket
from collections.abc import Callable

import pytest

from allranks.base.errors import UserError
from allranks.job.variables import WISH_JOB_END
from allranks.launch import supervisor
from allranks.launch.arrivals import Guarded, problem_with
from allranks.launch.common_stop import CommonStop
from allranks.launch.console import Console
from allranks.launch.launcher_process import LauncherProcess
from allranks.launch.outcome import Loss, Rank
from allranks.launch.supervisor import Limits, Phase, Supervision


async def running(ranks: int, ask_scheduler: Callable[[], bool] | None = None) -> Supervision:
    """A launch whose ranks have all begun, and whose console shows nothing."""
    loop = asyncio.get_running_loop()
    found = Supervision(ranks, [], Limits(), Console(lambda fd, data: None), ask_scheduler=ask_scheduler)
    found._loop, found._changed = loop, asyncio.Event()
    found._has_begun = True
    found.phase = Phase.RUNNING
    for number in range(ranks):
        found.guarded[number] = Guarded(Rank(number, f"n{number}"), None, heard_at=loop.time())
    return found


def test_the_end_of_a_program_is_when_it_ended_and_not_when_its_output_was_passed_on():
    """The first rank to fail is named by that time, and a slow file system must not change it."""

    async def heard() -> Rank:
        supervision = await running(2)
        known = supervision.guarded[1]
        supervision._hear(known, {"code": 3, "signal": 0, "time": 100.3, "last": False})
        assert not known.rank.has_ended
        supervision._hear(known, {"code": 3, "signal": 0, "time": 101.3, "last": True})
        return known.rank

    rank = asyncio.run(heard())
    assert (rank.code, rank.ended_at, rank.has_ended) == (3, 100.3, True)


@pytest.mark.parametrize(
    ("argv", "remedy"),
    [
        (["no-such-launcher"], "No such file or directory.*load the module that brings it"),
        (["true", "x" * (1 << 17)], "Argument list too long.*longer than the system takes"),
    ],
)
def test_a_launcher_that_cannot_be_started_is_named_with_a_remedy_that_helps(argv, remedy):
    with pytest.raises(UserError, match=f"launcher {argv[0]} cannot be started .{remedy}"):
        LauncherProcess(argv, dict(os.environ))


@pytest.mark.parametrize("answers", [True, False])
def test_a_guard_that_answers_while_the_scheduler_is_asked_is_not_given_up(answers, monkeypatch):
    """Asking the scheduler takes up to a minute and a half. A guard that stays silent is given up after."""
    monkeypatch.setattr(supervisor, "SILENT_S", 0.0)
    monkeypatch.setattr(supervisor, "LEAST_ASK_S", 0.01)
    monkeypatch.setattr(supervisor, "ASK_S", 0.01)

    async def asked() -> Rank:
        loop = asyncio.get_running_loop()
        has_answer = asyncio.Event()

        def ask_scheduler() -> bool:
            if answers:
                loop.call_soon_threadsafe(supervision._hear, known, {"here": True})
            loop.call_soon_threadsafe(has_answer.set)
            return False

        supervision = await running(1, ask_scheduler)
        known = supervision.guarded[0]
        ours, theirs = socket.socketpair()
        _, guard = await asyncio.open_connection(sock=ours)
        known.guard = guard
        asking = asyncio.create_task(supervision._ask_guards())
        await has_answer.wait()
        while not supervision._changed.is_set():  # what follows the scheduler's answer
            await asyncio.sleep(0)
        asking.cancel()
        guard.close()
        theirs.close()
        return known.rank

    assert asyncio.run(asked()).loss is (None if answers else Loss.SILENT)


@pytest.mark.parametrize(
    ("hello", "problem"),
    [
        ({"rank": 1, "world_size": 2}, ""),
        ({"rank": 1, "world_size": None}, ""),  # not every launcher tells how many ranks there are
        ({"rank": 0, "world_size": 2}, "a second rank 0 came from n1, of 2 ranks .* those of `srun`"),
        ({"rank": 2, "world_size": 2}, "a rank 2 came from n1, of 2 ranks that were asked for"),
        ({"rank": 1, "world_size": 4}, "rank 1 on n1 was started as one of 4, but 2 were asked for"),
    ],
)
def test_a_rank_that_cannot_be_of_this_launch_is_told_why(hello, problem):
    """Rank 0 of two has come already."""
    told = problem_with({"host": "n1", "launcher": "srun", **hello}, world_size=2, came={0})
    assert re.match(problem or "$", told), told


def test_all_ranks_stop_at_the_call_after_the_largest_that_any_of_them_has_had_answered():
    stop = CommonStop()
    assert not stop.answered(2, 9)  # nobody has asked for a stop
    assert stop.begin(signal.SIGUSR1, running=[0, 1, 2])
    assert not stop.begin(signal.SIGTERM, running=[0, 1, 2])  # the second rank to ask changes nothing
    assert not stop.answered(0, 4)
    assert not stop.answered(1, 6)
    assert stop.answered(2, 9)
    assert (stop.reason, stop.at) == ("SIGUSR1", 10)
    assert not stop.ended(0)  # the call is chosen once


def test_a_rank_that_ends_is_not_waited_for_before_the_call_is_chosen():
    stop = CommonStop()
    stop.begin(WISH_JOB_END, running=[0, 1])
    assert not stop.answered(0, 3)
    assert stop.ended(1)
    assert (stop.reason, stop.at) == ("the job's end", 4)
