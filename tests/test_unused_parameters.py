"""Parameters that a step does not use: the curve is that of one rank, at any number of ranks.

Weight decay and momentum would move a parameter whose gradient is 0. One that has no gradient stays where
it is. So the curves below agree only if a parameter that no rank has used keeps no gradient at all.
"""

from __future__ import annotations

import re
from functools import cache

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from allranks.run import checkpoint
from helpers import NO_REPORT, Done, Run, execute, execute_forked, forked_python, launcher, only_long

# One worker trains once for all of these tests.
pytestmark = pytest.mark.xdist_group("unused_parameters")
PACKAGE = '''
from torch import nn

class Spare(nn.Module):
    """One layer takes part; another one is never used."""
    def __init__(self, input_shape, classes):
        super().__init__()
        self.head = nn.Linear(784, classes)
        self.spare = nn.Linear(3, 3)

    def forward(self, images):
        return self.head(images.flatten(1))

class Routed(Spare):
    """Some examples, those with much ink, go through a layer of their own besides."""
    LEAST = 0.19

    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes)
        self.thick = nn.Linear(784, classes)

    def forward(self, images):
        flat = images.flatten(1)
        is_thick = flat.mean(dim=1) > self.LEAST
        out = self.head(flat)
        if is_thick.any():
            out = out.index_add(0, is_thick.nonzero()[:, 0], self.thick(flat[is_thick]))
        return out

class RoutedAlone(Routed):
    """Each of its layers takes part in the first batch: its LEAST is lower."""
    LEAST = 0.14

    def __init__(self, input_shape, classes):
        super().__init__(input_shape, classes)
        del self.spare
'''
DATA = (
    "data=synthetic", "data.train.count=250", "data.split=[202,48]", "data.test.count=100", "device=cpu",
    "threads=1", NO_REPORT,
)  # fmt: skip
TRAINER = (
    "trainer.epochs=2", "trainer.batch_size=10", "trainer.precision=fp64", "optimizer.weight_decay=0.01",
    "optimizer.momentum=0.9", "optimizer.lr=0.02",
)  # fmt: skip

# The launch of one rank, and those that are compared with it.
LAUNCHES = [
    ("mpiexec", 3),
    *(only_long(*how) for how in (("mpiexec", 2), ("torchrun", 2), ("torchrun", 3))),
]


@pytest.fixture(scope="module")
def curves(tmp_path_factory: pytest.TempPathFactory):
    """curves("mpiexec", 3) has the finished runs, by the model's name, and a recipe that accumulates."""
    home = tmp_path_factory.mktemp("unused")
    (home / "sparing.py").write_text(PACKAGE)

    @cache
    def at(under: str | None, ranks: int) -> dict[str, Run]:
        cwd = tmp_path_factory.mktemp(f"{under}-{ranks}")
        words = [
            "-m", "model=linear", "model._target_=sparing.Spare,sparing.Routed",
            "trainer.accumulate=1,2", "run.dir=cells", *DATA, *TRAINER,
        ]  # fmt: skip
        command = [*launcher(under, ranks, forked_python()), "-m", "allranks.train", *words]
        execute(command, cwd, env={"PYTHONPATH": str(home)}).ok()
        cells = ("Spare", "Spare accumulated", "Routed", "Routed accumulated")
        return {name: Run(cwd / "cells" / str(number)) for number, name in enumerate(cells)}

    return at


@pytest.mark.parametrize(("under", "ranks"), LAUNCHES)
def test_the_curve_is_that_of_one_rank(curves, under, ranks):
    """A layer is never used: so the trial finds it, and DDP looks for unused parameters in each step."""
    alone = curves(None, 1)
    for name, together in curves(under, ranks).items():
        assert together.summary["world_size"] == ranks
        assert together.losses == pytest.approx(alone[name].losses, rel=1e-6), name


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(checkpoint.path_of(run.path, checkpoint.steps(run.path)[0]) / "model.safetensors")


def test_a_parameter_that_no_rank_uses_stays_as_it_was_made(curves):
    at_three = weights(curves("mpiexec", 3)["Spare"])
    torch.manual_seed(0)
    nn.Linear(784, 10)  # drawn before the layer that is not used
    made = nn.Linear(3, 3)
    assert torch.equal(at_three["spare.weight"], made.weight.detach().double())


def test_what_is_compared_depends_on_who_used_what(curves, train_here, tmp_path, monkeypatch):
    """If a missing gradient counted as 0, as in a reproducible run, the curve would be another one."""
    (tmp_path / "sparing.py").write_text(PACKAGE)
    monkeypatch.syspath_prepend(str(tmp_path))
    zeros = train_here(
        *DATA, *TRAINER, "model=linear", "model._target_=sparing.Routed", "trainer.reproducible=true"
    )
    assert zeros.losses != pytest.approx(curves(None, 1)["Routed"].losses, rel=1e-6)


# With this seed the two examples of the trial use all parameters.
ALONE = ("model=linear", "model._target_=sparing.RoutedAlone", *DATA, *TRAINER, "seed=1")


@pytest.mark.parametrize(("under", "ranks"), [("mpiexec", 2), only_long("torchrun", 3)])
def test_a_step_that_leaves_some_out_ends_the_run_and_it_goes_on_with_the_key(tmp_path, under, ranks):
    """The first batch uses all parameters, and a later one does not."""
    (tmp_path / "sparing.py").write_text(PACKAGE)
    env = {"PYTHONPATH": str(tmp_path)}

    def trained(*more: str) -> Done:
        words = [
            *launcher(under, ranks, forked_python()),
            "-m",
            "allranks.train",
            *ALONE,
            "run.dir=run",
            *more,
        ]
        return execute(words, tmp_path, env=env)

    ended = trained()
    assert ended.code != 0
    said = re.findall(
        r"(\S+), thick.bias took no part in a step on rank \d, .*trainer.unused_parameters=always",
        ended.out + ended.err,
    )
    assert said == ["thick.weight"], ended.err
    if under == "mpiexec":  # torchrun shows a traceback of its own
        assert "Traceback" not in ended.out + ended.err

    went_on = trained("trainer.unused_parameters=always").ok().run
    execute_forked(["-m", "allranks.train", *ALONE, "run.dir=alone"], 1, tmp_path, env).ok()
    assert went_on.losses == pytest.approx(Run(tmp_path / "alone").losses, rel=1e-6)


# A loop of the user's own, of which one layer takes part in a step only IS_USED.
OWN = """
import torch, allranks
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.head, self.spare = nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x):
        is_used = IS_USED
        return self.head(x) + self.spare(x) if is_used else self.head(x)

run = allranks.open("own", seed=1, device="cpu", threads=1, report=False)
model = run.wrap(Net(), REMEDY)
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.keep(model=model, optimizer=optimizer)
for batch in run.steps([torch.randn(6, 4) for _ in range(4)]):
    run.backward(model(batch).square().mean())
    optimizer.step()
    optimizer.zero_grad()
run.finish()
"""


NEVER = "False"
NOT_IN_THE_LAST_RANKS_THIRD_STEP = "run.step != 2 or run.rank != run.world_size - 1"
# The other ranks end before rank 0 does, and with its exit code.
NOT_ON_RANK_0 = "run.rank != 0"


@pytest.mark.parametrize(
    ("is_used", "ranks"),
    [
        (NEVER, 2),
        only_long(NEVER, 3),
        only_long(NOT_IN_THE_LAST_RANKS_THIRD_STEP, 2),
        (NOT_ON_RANK_0, 2),
    ],
)
def test_a_loop_of_ones_own_is_told_once_which_parameters_and_what_to_write(is_used, ranks, tmp_path):
    code = OWN.replace("IS_USED", is_used)
    ended = execute_forked(["-c", code.replace("REMEDY", "")], ranks, tmp_path)
    assert ended.code == 2
    said = re.findall(
        r"spare\.weight, spare\.bias took no part in a step on rank \d, .*"
        r"start the run again with run\.wrap\(model, unused_parameters=True\); it goes on",
        ended.out + ended.err,
    )
    assert len(said) == 1, ended.err
    assert "Traceback" not in ended.out + ended.err
    execute_forked(["-c", code.replace("REMEDY", "unused_parameters=True")], ranks, tmp_path).ok()
