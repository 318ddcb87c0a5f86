"""Where the ranks sit, and which devices they take, as rank 0 decides it from what they tell.

What they tell is written down here, as it comes from hosts with H100s; what a real GPU says is checked by
benchmarks/gpu.sh.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace

import pytest

from allranks.base.errors import UserError
from allranks.runtime.bringup import Arrival, Equipment, agreement, places
from allranks.runtime.runtime import RankFacts
from helpers import SMALL, execute, execute_forked, forked_python, launcher


def found(rank: int, host: str, device: str, oversubscribe: bool = False) -> Equipment:
    facts = RankFacts(rank, host, pid=1, local_rank=rank, device=device)
    device_type = "cpu" if device == "cpu" else "cuda"
    return Equipment(facts, device_type, oversubscribe, watch=None, error=None)


def test_a_device_each_is_fine_on_every_host():
    ranks = [found(0, "a", "GPU-1"), found(1, "a", "GPU-2"), found(2, "b", "GPU-1")]
    for_rank_0, *for_others = agreement(ranks)
    assert not for_rank_0.shared_devices
    assert for_rank_0.ranks == [equipment.facts for equipment in ranks]
    assert [told.ranks for told in for_others] == [[], []]


def test_devices_of_two_hosts_with_one_name_are_not_shared():
    """As the nodes of a badly set up cluster: each has a first GPU, which is not the same one."""
    one, two = (found(r, "localhost", "localhost/0/0") for r in range(2))
    two = replace(two, facts=replace(two.facts, boot_id="of another kernel"))
    assert {told.shared_devices for told in agreement([one, two])} == {False}


def test_more_ranks_than_devices_are_refused_with_the_numbers():
    ranks = [found(r, "node7", f"GPU-{r % 2}") for r in range(3)]
    with pytest.raises(UserError) as refused:
        agreement(ranks)
    assert "3 ranks on node7 share 2 devices" in str(refused.value)
    assert "ranks 0 and 2" in str(refused.value)
    assert "oversubscribe=true" in str(refused.value)


def test_sharing_may_be_asked_for_and_is_told():
    ranks = [found(r, "a", "GPU-1", oversubscribe=True) for r in range(2)]
    assert {told.shared_devices for told in agreement(ranks)} == {True}


def test_cpus_are_shared_as_a_matter_of_course():
    assert {told.shared_devices for told in agreement([found(r, "a", "cpu") for r in range(4)])} == {False}


def test_with_device_auto_a_host_without_its_gpu_is_named():
    ranks = [found(r, "abc"[r // 2], f"GPU-{r}") for r in range(6)]
    ranks[2:4] = [found(2, "b", "cpu"), found(3, "b", "cpu")]
    with pytest.raises(UserError) as refused:
        agreement(ranks)
    assert str(refused.value).startswith(
        "ranks 2, 3 (on b) came with the device cpu, but the other ranks with cuda: look whether torch sees"
    )


def test_a_rank_without_its_device_is_named():
    broken = replace(found(1, "b", ""), error="device=cuda: torch sees no such device on b")
    with pytest.raises(UserError, match="rank 1: device=cuda"):
        agreement([found(0, "a", "GPU-1"), broken])


def came(host: str, local_rank: int | None = None, cpus: Sequence[int] = (0, 1, 2, 3)) -> Arrival:
    return Arrival(host, local_rank, list(cpus), digest="same", version="torch 2", error=None)


def test_places_are_counted_on_each_host_where_the_launcher_does_not_tell_them():
    found = places([came("a"), came("b"), came("a"), came("b"), came("a")])
    assert [place.local_rank for place in found] == [0, 0, 1, 1, 2]
    assert [place.local_world_size for place in found] == [3, 2, 3, 2, 3]
    assert {place.hosts for place in found} == {2}


def test_ranks_with_the_same_cpus_share_them_as_threads():
    bound = [came("a", cpus=[0, 1]), came("a", cpus=[2, 3])]
    assert [place.threads for place in places(bound)] == [2, 2]
    assert [place.threads for place in places([came("a")] * 3)] == [1, 1, 1]
    assert [place.threads for place in places([came("a"), came("b")])] == [4, 4]


def test_the_rank_with_another_version_is_named_with_its_host():
    odd = replace(came("b"), version="torch 1")
    with pytest.raises(UserError, match=r"rank 2 \(on b\) came with torch 1, but the other ranks torch 2"):
        places([came("a"), came("a"), odd])


def test_a_rank_has_as_many_threads_as_it_has_cpus(tmp_path):
    """mpiexec sets no OMP_NUM_THREADS, and each rank would take all CPUs of the node."""
    cpus = sorted(os.sched_getaffinity(0))
    words = ["-m", "allranks.train", *SMALL, "trainer.epochs=0", "threads=null"]

    def threads(name: str, *before: str) -> int:
        (tmp_path / name).mkdir()
        return execute([*before, *words], tmp_path / name).ok().run.environment["threads_per_rank"]

    done = execute_forked(words, 1, tmp_path).ok()
    assert done.run.environment["threads_per_rank"] == len(cpus)
    assert threads("bound", "taskset", "-c", str(cpus[0]), forked_python()) == 1
    assert threads("shared", *launcher("mpiexec", len(cpus), forked_python())) == 1


def test_two_hosts_of_one_name_are_two_hosts():
    one, two = (replace(came("localhost"), boot_id=boot_id) for boot_id in ("1", "2"))
    found = places([one, two, one, two])
    assert [place.local_rank for place in found] == [0, 0, 1, 1]
    assert {place.local_world_size for place in found} == {2}
    assert {place.hosts for place in found} == {2}
