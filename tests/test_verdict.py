"""Who is to blame: from what the ranks tell to the ranks that are named. No process, no clock."""

from __future__ import annotations

import json

import pytest

from allranks.base.links import WireError
from allranks.base.processes import ProcessIdentity
from allranks.runtime.watch import verdict
from allranks.runtime.watch.verdict import Decision, Inquiry, Known, Peer, Report, State


def report(arrivals: int, overdue: bool = True, step: int = 7) -> Report:
    return Report(step, arrivals, overdue, where=f"is at {arrivals}")


def peer(host: str, container: str = "pid:[1]", pid: int = 100) -> Peer:
    """A rank's process; each host has a boot id of its own, which here is its name."""
    return Peer(host, ProcessIdentity(pid, 1, f"boot of {host}", container, "time:[1]"), dump_fd=5)


# --- the reports are complete ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reports", "blamed"),
    [
        # One rank has not come to the collective in which the others wait.
        ({0: report(5), 1: report(4), 2: report(5)}, [1]),
        # Two of them.
        ({0: report(5), 1: report(4), 2: report(4), 3: report(5)}, [1, 2]),
        # All are in the same collective, which does not end: each is named.
        ({0: report(5), 1: report(5)}, [0, 1]),
        # Rank 0 itself keeps the others waiting.
        ({0: report(3), 1: report(4), 2: report(4)}, [0]),
        # The last one is within its own limit, as one that saves: everybody waits.
        ({0: report(5), 1: report(4, overdue=False), 2: report(5)}, []),
        # One of the last two is.
        ({0: report(5), 1: report(4), 2: report(4, overdue=False)}, []),
        # That one of those who wait is not overdue yet does not save the last one.
        ({0: report(5, overdue=False), 1: report(4), 2: report(5)}, [1]),
        # The number of arrivals counts, not that of steps: rank 1 evaluates.
        ({0: report(5, step=3), 1: report(4, step=9)}, [1]),
    ],
)
def test_those_that_came_to_the_fewest_collectives_are_to_blame(reports, blamed):
    found = verdict.who_keeps_the_others_waiting(reports)
    assert list(found) == blamed
    assert found == {rank: reports[rank].where for rank in blamed}


# --- the order of an inquiry ----------------------------------------------------------------------

ANSWERED = Inquiry(reports={0: report(5), 1: report(5)})


@pytest.mark.parametrize(
    ("state", "inquiry", "missing", "time_is_up", "decision"),
    [
        (State.ASKED, ANSWERED, [2], False, Decision.WAIT),
        (State.ASKED, ANSWERED, [2], True, Decision.LOOK),
        (State.ASKED, ANSWERED, [], False, Decision.JUDGE),
        (State.ASKED, ANSWERED, [], True, Decision.JUDGE),
        (State.ASKED_AGAIN, ANSWERED, [2], False, Decision.WAIT),
        (State.ASKED_AGAIN, ANSWERED, [2], True, Decision.LOOK),
        (State.ASKED_AGAIN, ANSWERED, [], False, Decision.JUDGE),
        # Neighbours look: their word is waited for, but not for ever.
        (State.LOOKING, Inquiry(findings={2: ""}, looked_for={2}), [2], False, Decision.WAIT),
        (State.LOOKING, Inquiry(findings={2: ""}, looked_for={2}), [2], True, Decision.ASK_AGAIN),
        (State.LOOKING, Inquiry(findings={2: "is gone"}, looked_for={2}), [2], True, Decision.NAME),
        # They have told: one that is stopped is named, those that run are asked again.
        (State.LOOKING, Inquiry(findings={2: "is stopped", 3: ""}), [2, 3], False, Decision.NAME),
        (State.LOOKING, Inquiry(findings={2: "", 3: ""}), [2, 3], False, Decision.ASK_AGAIN),
        # A rank that died while all is well: nobody has reported, and nobody need.
        (State.LOOKING, Inquiry(findings={2: "was killed"}), [0, 1, 2], False, Decision.NAME),
    ],
)
def test_what_rank_0_does_next(state, inquiry, missing, time_is_up, decision):
    assert verdict.decide(state, inquiry, missing, time_is_up) is decision


def test_a_rank_is_mute_first_and_stuck_when_it_was_asked_again():
    assert verdict.known_when_time_is_up(State.ASKED) is Known.MUTE
    assert verdict.known_when_time_is_up(State.ASKED_AGAIN) is Known.STUCK
    assert verdict.FROM_AFAR[Known.MUTE] == ""  # it may be well
    assert verdict.FROM_AFAR[Known.STUCK]


def test_ranks_that_have_left_need_not_report():
    inquiry = Inquiry(reports={0: report(5), 3: report(5)})
    assert verdict.unanswered(inquiry, 5, left={2}) == [1, 4]
    assert verdict.unanswered(inquiry, 5, left={1, 2, 4}) == []


def test_what_a_neighbour_found_replaces_what_was_known_from_afar():
    inquiry = Inquiry(looked_for={1})
    inquiry.begin_looking([1, 2], Known.GONE)
    assert inquiry.findings == dict.fromkeys([1, 2], verdict.FROM_AFAR[Known.GONE])
    inquiry.found(1, "was killed by SIGKILL")
    assert inquiry.findings[1] == "was killed by SIGKILL"
    assert inquiry.looked_for == set()


# --- who can look ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("peers", "ranks", "reachable", "chosen"),
    [
        # Rank 0 looks where it can, else the first rank of the same host.
        ([peer("a"), peer("a"), peer("b"), peer("b")], [1], {0, 2, 3}, {1: 0}),
        ([peer("a"), peer("a"), peer("b"), peer("b")], [2], {0, 1, 3}, {2: 3}),
        # All of a host are in trouble, or its one rank is.
        ([peer("a"), peer("a"), peer("b"), peer("b")], [2, 3], {0, 1}, {2: None, 3: None}),
        ([peer("a"), peer("b")], [1], {0}, {1: None}),
        # A rank in trouble is no witness of another one.
        ([peer("a"), peer("b"), peer("b"), peer("b")], [1, 2], {0, 1, 2, 3}, {1: 3, 2: 3}),
        # One that cannot be asked is none either.
        ([peer("a"), peer("b"), peer("b")], [1], {0}, {1: None}),
        # Another container on the same host counts its processes by itself.
        ([peer("a"), peer("a", "pid:[2]"), peer("a", "pid:[2]")], [1], {0, 2}, {1: 2}),
        ([peer("a"), peer("a", "pid:[2]")], [1], {0}, {1: None}),
    ],
)
def test_only_a_rank_that_sees_the_process_looks_at_it(peers, ranks, reachable, chosen):
    assert verdict.witnesses(ranks, peers, reachable) == chosen


def test_two_hosts_of_the_same_name_are_two_hosts():
    one = Peer("node", ProcessIdentity(100, 1, "boot 1", "pid:[1]", "time:[1]"), None)
    two = Peer("node", ProcessIdentity(100, 1, "boot 2", "pid:[1]", "time:[1]"), None)
    assert verdict.witnesses([1], [one, two, one], {0, 2}) == {1: None}
    assert verdict.deputy([one, two, one]) == 2


@pytest.mark.parametrize(
    ("peers", "deputy"),
    [
        ([peer("a"), peer("a"), peer("b")], 1),
        ([peer("a"), peer("b"), peer("a")], 2),
        ([peer("a"), peer("a", "pid:[2]"), peer("a")], 2),
        ([peer("a"), peer("b"), peer("c")], 1),
    ],
)
def test_the_deputy_is_the_first_rank_that_sees_rank_0(peers, deputy):
    assert verdict.deputy(peers) == deputy


# --- in words -------------------------------------------------------------------------------------


def test_the_ranks_to_blame_are_named_a_line_each():
    said = verdict.accusation({2: "is stopped", 1: ""}, ["a", "a", "b"], step=41)
    assert said == "rank 2 on b, in step 42: is stopped\nallranks: all 3 ranks end."


def test_of_many_ranks_four_are_named():
    said = verdict.accusation(dict.fromkeys(range(1, 8), "is gone"), ["a"] * 9, step=0)
    lines = said.split("\nallranks: ")
    assert lines == [
        *[f"rank {rank} on a, in step 1: is gone" for rank in (1, 2, 3, 4)],
        "and 3 more ranks",
        "all 9 ranks end.",
    ]


# --- as JSON --------------------------------------------------------------------------------------


def test_what_travels_arrives_as_it_was():
    sent = Peer("a", ProcessIdentity.of_this_process(), 7, ("127.0.0.1", 4711, "secret"))
    assert Peer.from_json(json.loads(json.dumps(sent.to_json()))) == sent
    assert Peer.from_json(json.loads(json.dumps(peer("b").to_json()))) == peer("b")
    assert Report.from_json(json.loads(json.dumps(report(3).to_json()))) == report(3)


@pytest.mark.parametrize(
    "values",
    [{}, {"step": 1}, {**report(1).to_json(), "arrivals": "5"}, {**report(1).to_json(), "where": None}],
)
def test_a_report_that_is_none_is_refused(values):
    with pytest.raises(WireError):
        Report.from_json(values)
