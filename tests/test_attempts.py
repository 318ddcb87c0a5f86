"""What follows an attempt, and which hosts the next one does without: decided without starting anything."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest

from allranks.base.errors import EXIT_REQUEUE, EXIT_TIMED_OUT, EXIT_USER_ERROR
from allranks.launch.attempts import GROUPS, Next, Progress, unreachable, what_next
from allranks.launch.supervisor import Outcome


def outcome(code: int, stopped: bool = False) -> Outcome:
    return Outcome(code, "", {}, stopped=stopped)


@pytest.mark.parametrize(
    ("ended", "restarts_left", "expected"),
    [
        (outcome(0), 3, Next.END),
        (outcome(1), 3, Next.RESTART),
        (outcome(137), 1, Next.RESTART),
        (outcome(EXIT_TIMED_OUT), 1, Next.RESTART),
        (outcome(1), 0, Next.END),  # no restart is left
        (outcome(EXIT_USER_ERROR), 3, Next.END),  # the same mistake would be made again
        (outcome(EXIT_REQUEUE), 3, Next.END),  # the job is at its end
        (outcome(143, stopped=True), 3, Next.END),  # the user has ended it
        (outcome(1, stopped=True), 3, Next.END),
    ],
)
def test_only_a_crash_is_followed_by_a_restart(ended, restarts_left, expected):
    assert what_next(ended, restarts_left, None) is expected
    assert what_next(ended, restarts_left, Progress(10)) is expected


def test_the_third_crash_without_a_step_gained_is_the_last():
    progress = Progress(0)
    seen = []
    for step in (0, 0, 50, 50, 50, 50):
        progress = progress.after_crash(step)
        seen.append(what_next(outcome(1), 9, progress))
    # twice at step 0; then a step was gained, and counting began anew
    assert seen == [Next.RESTART] * 5 + [Next.GIVE_UP]
    assert progress == Progress(50, 3)


def test_a_program_whose_steps_nobody_counts_is_started_again_as_often_as_asked_for():
    assert [what_next(outcome(1), left, None) for left in (2, 1, 0)] == [
        Next.RESTART, Next.RESTART, Next.END,
    ]  # fmt: skip


# --- which hosts are not there ---------------------------------------------------------------------------


def search(hosts: Sequence[str], bad: set[str]) -> tuple[list[str], list[int]]:
    """(the hosts that are found, how many groups each round has tried)."""
    rounds = []

    def fails(groups: Sequence[Sequence[str]]) -> list[bool]:
        rounds.append(len(groups))
        return [not bad.isdisjoint(group) for group in groups]

    return unreachable(hosts, fails), rounds


def names(count: int) -> list[str]:
    return [f"n{number}" for number in range(count)]


def test_one_bad_host_of_4096_is_found_in_three_rounds():
    found, rounds = search(names(4096), {"n2024"})
    assert found == ["n2024"]
    assert rounds == [16, 16, 16]


def test_where_nothing_is_wrong_one_round_is_enough():
    assert search(names(1000), set()) == ([], [16])


def test_where_all_are_bad_all_are_found():
    assert search(names(40), set(names(40)))[0] == names(40)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 31, 32, 33, 100, 257])
def test_exactly_the_bad_hosts_are_found_and_never_too_many_are_tried_at_once(count):
    draw = random.Random(count)
    for _ in range(20):
        bad = {name for name in names(count) if draw.random() < 0.2}
        found, rounds = search(names(count), bad)
        assert found == [name for name in names(count) if name in bad]
        assert max(rounds) <= GROUPS
