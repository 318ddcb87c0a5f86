"""Two ranks on one GPU: a mistake unless it is asked for. The ranks' reports are written down here, as they
come from two H100-like hosts; what a real GPU says is checked by benchmarks/gpu.sh."""

from __future__ import annotations

import pytest

from allranks.errors import UserError
from allranks.runtime.runtime import _check_devices


def report(host: str, device: str, local_rank: int, oversubscribe: bool = False) -> dict:
    return {
        "host": host, "device": device, "local_rank": local_rank, "error": None,
        "oversubscribe": oversubscribe,
    }  # fmt: skip


def test_a_device_each_is_fine_on_every_host():
    ranks = [report("a", "GPU-1", 0), report("a", "GPU-2", 1), report("b", "GPU-1", 0)]
    seen: list = []
    assert _check_devices(seen, ranks) == [{"shared": False}] * 3
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
    assert _check_devices([], ranks) == [{"shared": True}] * 2


def test_cpus_are_shared_as_a_matter_of_course():
    assert _check_devices([], [report("a", "cpu", r) for r in range(4)]) == [{"shared": False}] * 4


def test_a_rank_without_its_device_is_named():
    broken = report("b", "", 1) | {"error": "device=cuda: torch sees no such device on b"}
    with pytest.raises(UserError, match="rank 1: device=cuda"):
        _check_devices([], [report("a", "GPU-1", 0), broken])
