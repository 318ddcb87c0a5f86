"""What the ranks compare at an epoch's end, on real ranks and on written-down times.

Whole trainings whose weights differ, or with a straggler, are in test_detection.py.
"""

from __future__ import annotations

import pytest

from allranks.runtime.compare import SLOW_S, SLOW_STEPS, slow_ranks
from helpers import execute_forked


@pytest.mark.parametrize(
    ("busy_s", "slow"),
    [
        ([10.0, 10.0, 16.0, 10.0], [2]),
        ([10.0, 10.0, 14.0, 10.0], []),  # less than 1.5 times the median
        ([0.2, 0.2, 0.6, 0.2], []),  # three times as long, but what is lost is less than SLOW_S
        ([1.0, 20.0, 30.0, 1.0], [1, 2]),
        ([10.0, 16.0], [1]),  # of two the faster one counts as usual
    ],
)
def test_a_rank_is_slow_by_comparison_with_the_median(busy_s, slow):
    assert SLOW_S == 0.5
    assert slow_ranks(busy_s, [100] * len(busy_s)) == slow


def test_few_steps_say_nothing():
    assert slow_ranks([1.0, 9.0], [SLOW_STEPS, SLOW_STEPS]) == [1]
    assert slow_ranks([1.0, 9.0], [SLOW_STEPS, SLOW_STEPS - 1]) == []


# Three ranks with the same model, of which ranks may change a weight by as little as the last bit.
RANKS = """
import os, sys
import torch
from allranks.base.errors import RunError
from allranks.compose import from_command_line
from allranks.config import runtime_settings
from allranks.job.identity import discover
from allranks.runtime.bringup import open_runtime
from allranks.runtime.compare import compare_ranks

[config] = from_command_line(["device=cpu", "threads=1"])
runtime = open_runtime(discover(os.environ), runtime_settings(config))
torch.manual_seed(0)
model = torch.nn.Linear(3, 2)
if str(runtime.rank) in sys.argv[1:]:
    with torch.no_grad():
        model.weight[0, 0] = torch.nextafter(model.weight[0, 0], torch.tensor(9.0))
try:
    compare_ranks(runtime, model)
    said = "the same"
except RunError as error:
    said = f"code {error.code}, said by {error.said_by}: {error}" if runtime.rank == 0 else "RunError"
os.write(1, f"rank {runtime.rank}: {said}\\n".encode())
runtime.close()
"""


def compared(folder, *odd: str, ranks: int = 3) -> list[str]:
    done = execute_forked(["-c", RANKS, *odd], ranks, folder).ok()
    return sorted(done.out.splitlines())


def test_ranks_with_the_same_weights_go_on(tmp_path):
    assert compared(tmp_path) == ["rank 0: the same", "rank 1: the same", "rank 2: the same"]


def test_one_bit_is_seen_by_all_ranks_and_the_odd_one_is_named(tmp_path):
    first, *others = compared(tmp_path, "1")
    assert "code 1, said by 0: After step 0 the ranks' weights differ (rank 1 on " in first
    assert others == ["rank 1: RunError", "rank 2: RunError"]


def test_numbers_of_any_type_go_through_mpi(tmp_path):
    """NumPy, which hands them to MPI, knows no bfloat16 and no float8."""
    program = (
        "import torch\n"
        "from mpi4py import MPI\n"
        "from allranks.runtime import mpi\n"
        "for dtype in (torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.bool):\n"
        "    given = torch.tensor([[0.0, 1.0]]).to(dtype)\n"
        "    everyones = torch.empty(1, 1, 2, dtype=dtype)\n"
        "    mpi.gather(MPI.COMM_SELF, given, everyones)\n"
        "    mpi.broadcast(MPI.COMM_SELF, everyones)\n"
        "    print(everyones.flatten().to(torch.complex64).real.tolist())\n"
    )
    done = execute_forked(["-c", program], 1, tmp_path).ok()
    assert done.out.splitlines() == ["[0.0, 1.0]"] * 4


def test_of_two_ranks_nobody_can_say_which_is_wrong(tmp_path):
    first, other = compared(tmp_path, "1", ranks=2)
    assert "the ranks' weights differ, though all apply the same gradients" in first
    assert other == "rank 1: RunError"
