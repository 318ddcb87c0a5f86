"""What a launch makes of its guards' messages, inside the test's own process and without ranks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

from allranks.launch.console import Console
from allranks.launch.outcome import Rank
from allranks.launch.supervisor import Guarded, Limits, Phase, Supervision


async def running(ranks: int, ask_scheduler: Callable[[], bool] | None = None) -> Supervision:
    """A launch whose ranks have all begun, and whose console shows nothing."""
    loop = asyncio.get_running_loop()
    found = Supervision(ranks, [], Limits(), Console(lambda fd, data: None), ask_scheduler=ask_scheduler)
    found._loop, found._changed, found._room = loop, asyncio.Event(), asyncio.Event()
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
