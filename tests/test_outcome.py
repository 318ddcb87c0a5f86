"""How a launch has ended: the exit code and the sentence, from what is known of the ranks."""

from __future__ import annotations

import signal
from collections.abc import Sequence
from dataclasses import replace

import pytest

from allranks.base.errors import EXIT_REQUEUE, EXIT_TIMED_OUT
from allranks.launch.outcome import (
    LOST_CODE,
    Conclusion,
    Evidence,
    Loss,
    Rank,
    conclusion,
    hosts_gone,
    planned_hosts,
)  # fmt: skip


def ended(number: int, code: int, at: float = 0.0, signum: int = 0) -> Rank:
    return Rank(number, f"n{number}", code, signum, at, has_ended=True)


def lost(number: int, at: float, loss: Loss = Loss.CUT) -> Rank:
    return Rank(number, f"n{number}", LOST_CODE, 0, at, has_ended=True, loss=loss)


def of(*ranks: Rank, world_size: int | None = None, **more: object) -> Conclusion:
    """The conclusion on a launch whose ranks had all started, and whose launcher ended well."""
    known = Evidence(
        world_size=world_size or len(ranks),
        ranks=ranks,
        launcher="mpiexec",
        launcher_code=0,
        launcher_was_killed=False,
        had_started=True,
        stopped_by=0,
        signal_is_for_us=False,
        problem=None,
        nobody_reads=False,
    )
    return conclusion(replace(known, **more))  # type: ignore[arg-type]


def test_all_well():
    assert of(ended(0, 0), ended(1, 0)) == Conclusion(0, "")


def test_the_first_to_fail_gives_the_code_and_is_named():
    told = of(ended(0, 143, at=3, signum=15), ended(1, 41, at=2), ended(2, 0, at=1))
    assert told.code == 41
    assert told.sentence == (
        "rank 1 on n1 ended with exit code 41, the first of 3 ranks to fail; the others have been ended"
    )


def test_ranks_that_all_fail_alike_are_said_to():
    told = of(ended(0, 1, at=2), ended(1, 1, at=1))
    assert told == Conclusion(1, "rank 1 on n1 ended with exit code 1, and so did all 2 ranks")


def test_one_rank_alone_is_the_first_of_nobody():
    assert of(ended(0, 7)) == Conclusion(7, "rank 0 on n0 ended with exit code 7")


def test_a_killed_rank_explains_guards_that_vanish_just_before_its_end_is_known():
    told = of(lost(0, at=5.0), ended(1, 137, at=5.1, signum=9), lost(2, at=5.05))
    assert told.code == 137
    assert told.sentence.startswith("rank 1 on n1 was killed by SIGKILL")


def test_a_silent_host_explains_guards_that_vanish_before_it_is_known_to_be_silent():
    """A node dies; the launcher ends the other guards at once, and half a minute later TCP gives up."""
    told = of(lost(0, at=5.0), lost(1, at=35.0, loss=Loss.SILENT))
    assert told.sentence.startswith("rank 1 on n1 does not answer any more")
    assert told.sentence.endswith("the first of 2 ranks to fail; the others have been ended")


def test_of_ranks_that_are_lost_nobody_says_that_all_did_the_same():
    told = of(lost(0, at=5.0), lost(1, at=5.0))
    assert told.code == 137
    assert told.sentence.startswith("rank 0 on n0 vanished without a word")
    assert "all 2 ranks" not in told.sentence


def test_stopped_in_order_is_no_failure():
    assert of(ended(0, EXIT_REQUEUE), ended(1, 0)) == Conclusion(EXIT_REQUEUE, "")
    assert of(ended(0, EXIT_REQUEUE), stopped_by=signal.SIGTERM) == Conclusion(EXIT_REQUEUE, "")


@pytest.mark.parametrize(
    ("signum", "code"),
    [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGUSR1, EXIT_REQUEUE)],
)
def test_a_signal_explains_ranks_that_fail_and_ranks_that_never_came(signum, code):
    failed = of(ended(0, 143, signum=15), stopped_by=signum)
    not_come = of(world_size=2, had_started=False, stopped_by=signum)
    assert failed == not_come == Conclusion(code, f"stopped by {signum.name}")


def test_a_signal_that_the_ranks_finished_before_changes_nothing():
    assert of(ended(0, 0), stopped_by=signal.SIGTERM) == Conclusion(0, "")
    in_preflight = of(ended(0, 0), stopped_by=signal.SIGTERM, signal_is_for_us=True)
    assert in_preflight == Conclusion(143, "stopped by SIGTERM")


def test_a_rank_that_did_not_end_on_a_signal_is_named():
    told = of(ended(0, EXIT_REQUEUE), lost(1, 9, Loss.SILENT), stopped_by=signal.SIGTERM)
    assert told.code == 143
    assert told.sentence.startswith("stopped by SIGTERM; rank 1 on n1 does not answer any more")


def test_what_no_rank_explains_goes_before_what_was_done_to_the_ranks_because_of_it():
    problem = Conclusion(EXIT_TIMED_OUT, "not done within 9 s")
    assert of(ended(0, 143, signum=15), problem=problem) == problem


def test_without_a_reader_it_ends_as_a_program_that_is_not_watched_over():
    assert of(ended(0, 143, signum=15), nobody_reads=True) == Conclusion(141, "")


def test_the_launchers_own_end_counts_where_no_rank_has_failed():
    told = of(ended(0, 0), world_size=2, launcher_code=9)
    assert told == Conclusion(9, "mpiexec ended with exit code 9; 1 of 2 ranks had started")
    assert of(world_size=2, launcher_code=-11).code == 139
    lingering = of(ended(0, 0), launcher_code=-9, launcher_was_killed=True)
    assert lingering == Conclusion(0, "", "mpiexec had not ended after its last rank, and was killed")


@pytest.mark.parametrize(
    ("ranks", "expected"),
    [
        ([], ("n0", "n1.domain")),
        ([ended(0, 0)], ("n1.domain",)),
        ([ended(0, 0), lost(1, 1.0)], ("n1.domain",)),
        ([lost(0, 1.0), ended(1, 9)], ("n0",)),
    ],
)
def test_hosts_of_which_nothing_is_heard(ranks: Sequence[Rank], expected):
    """A guard says the host's short name, a hostfile may have the long one."""
    assert hosts_gone(["n0", "n1.domain"], ranks) == expected


@pytest.mark.parametrize(
    ("hosts", "own_names", "expected"),
    [
        (["n1", "n2"], {0: "n1", 1: "n2"}, {0: "n1", 1: "n2"}),
        (["n1", "n2"], {0: "n2", 1: "n1"}, {0: "n2", 1: "n1"}),  # placed in another order than planned
        (["10.0.0.1", "10.0.0.1", "10.0.0.2"], {1: "n1", 2: "n2"}, {1: "10.0.0.1", 2: "10.0.0.2"}),
        (["localhost", "n2"], {0: "n1", 1: "n2"}, {0: "localhost", 1: "n2"}),
        (["n1-ib", "n2-ib"], {1: "n2.site"}, {1: "n2-ib"}),
        (["n1.a", "n1.b"], {0: "n1", 1: "n1"}, {0: "n1.a", 1: "n1.b"}),  # the name alone fits both
        (["n1-ib"], {1: "n2"}, {}),
    ],
)
def test_a_rank_is_on_the_planned_host_of_its_name_or_else_of_its_number(hosts, own_names, expected):
    assert planned_hosts(hosts, own_names) == expected


def test_hosts_that_are_listed_by_address_are_heard_of():
    assert hosts_gone(["10.0.0.1", "localhost"], [ended(0, 0), lost(1, 1.0)]) == ("localhost",)
    assert hosts_gone(["10.0.0.1", "localhost"], [ended(0, 0), ended(1, 0)]) == ()
