"""Two ranks on one GPU: a mistake unless it is asked for. The ranks' reports are written down here, as they
come from two H100-like hosts; what a real GPU says is checked by benchmarks/gpu.sh."""

from __future__ import annotations

import os

import pytest

from allranks.base.errors import UserError
from allranks.runtime.bringup import _check_devices
from helpers import SMALL, execute, launcher


def report(host: str, device: str, local_rank: int, oversubscribe: bool = False) -> dict:
    return {
        "host": host, "pid": 1, "device": device, "local_rank": local_rank, "error": None,
        "oversubscribe": oversubscribe, "watch": None,
    }  # fmt: skip


def test_a_device_each_is_fine_on_every_host():
    ranks = [report("a", "GPU-1", 0), report("a", "GPU-2", 1), report("b", "GPU-1", 0)]
    seen: list = []
    assert [told["shared"] for told in _check_devices(seen, ranks)] == [False] * 3
    assert [(r["rank"], r["host"], r["device"]) for r in seen] == [
        (0, "a", "GPU-1"), (1, "a", "GPU-2"), (2, "b", "GPU-1"),
    ]  # fmt: skip


def test_more_ranks_than_devices_are_refused_with_the_numbers():
    ranks = [report("node7", f"GPU-{r % 2}", r) for r in range(3)]
    with pytest.raises(UserError) as refused:
        _check_devices([], ranks)
    assert "3 ranks on node7 share 2 devices" in str(refused.value)
    assert "ranks 0 and 2" in str(refused.value)
    assert "oversubscribe=true" in str(refused.value)


def test_sharing_may_be_asked_for_and_is_told():
    ranks = [report("a", "GPU-1", r, oversubscribe=True) for r in range(2)]
    assert {told["shared"] for told in _check_devices([], ranks)} == {True}


def test_cpus_are_shared_as_a_matter_of_course():
    assert {told["shared"] for told in _check_devices([], [report("a", "cpu", r) for r in range(4)])} == {
        False
    }


def test_a_rank_without_its_device_is_named():
    broken = report("b", "", 1) | {"error": "device=cuda: torch sees no such device on b"}
    with pytest.raises(UserError, match="rank 1: device=cuda"):
        _check_devices([], [report("a", "GPU-1", 0), broken])


def test_a_rank_has_as_many_threads_as_it_has_cpus(tmp_path):
    """mpiexec sets no OMP_NUM_THREADS, and each rank would take all CPUs of the node."""
    cpus = sorted(os.sched_getaffinity(0))
    words = ["-m", "allranks.train", *SMALL, "trainer.epochs=0", "threads=null"]

    def threads(name: str, *before: str) -> int:
        (tmp_path / name).mkdir()
        return execute([*before, *words], tmp_path / name).ok().run.environment["threads_per_rank"]

    assert threads("all", *launcher(None, 1)) == len(cpus)
    assert threads("bound", "taskset", "-c", str(cpus[0]), *launcher(None, 1)) == 1
    assert threads("shared", *launcher("mpiexec", len(cpus))) == 1
