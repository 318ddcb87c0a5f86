"""The same curve, whatever the number of ranks and whoever started them.

Each launcher trains all the recipes below one after another (`-m`), so that torch starts once. 1,202
training examples in batches of 100 leave a last batch of 2: at 3 and more ranks somebody has none. Nor do
100, 398 and 401 divide by 3, 4 or 7.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from allranks.runtime import ezpz
from helpers import NO_REPORT, Run, execute, execute_forked, forked_python, launcher, only_long

DATA = (
    "data=synthetic",
    "data.train.count=1600",
    "data.split=[1202,398]",
    "data.test.count=401",
    "device=cpu",
    "threads=1",
    NO_REPORT,
)
RECIPES = {
    "linear": "defaults: [override /model: linear]\ntrainer: {epochs: 3, batch_size: 100}",
    "mlp": "defaults: [override /model: mlp]\nmodel: {dropout: 0.0}\noptimizer: {lr: 0.2}\n"
    "trainer: {epochs: 3, batch_size: 100}",
    "accumulated": "defaults: [override /model: linear]\n"
    "trainer: {epochs: 3, batch_size: 100, accumulate: 3}",
    "per_rank": "defaults: [override /model: linear]\ntrainer: {epochs: 2, per_rank_batch_size: 24}",
    "momentum": "defaults: [override /model: linear, override /optimizer: adamw]\n"
    "trainer: {epochs: 2, batch_size: 128, clip_norm: 0.5, label_smoothing: 0.1}",
    "small_cnn": "defaults: [override /model: cnn]\nmodel: {dropout: 0.0, channels: [8, 16], hidden: 32}\n"
    "trainer: {epochs: 1, batch_size: 100}",
}
# One worker trains the recipes under each launcher once, for all of these tests.
pytestmark = pytest.mark.xdist_group("curve")
SAME = 1e-4  # what is promised; rounding leaves 1e-12
LAUNCHES = [("mpiexec", 3), ("torchrun", 2)]
LONG_LAUNCHES = [("mpiexec", 1), ("mpiexec", 2), ("mpiexec", 4), ("torchrun", 3)]
# What the quick run looks at under torchrun; under mpiexec it looks at all recipes.
QUICK_UNDER_TORCHRUN = ("linear", "per_rank")
COMPARED = ("linear", "mlp", "accumulated", "momentum")
EVERY_CURVE = [
    (*launch, recipe)
    if launch == ("mpiexec", 3) or (launch == ("torchrun", 2) and recipe in QUICK_UNDER_TORCHRUN)
    else only_long(*launch, recipe)
    for launch in (*LAUNCHES, *LONG_LAUNCHES)
    for recipe in COMPARED
]


@pytest.fixture(scope="session")
def curves(tmp_path_factory: pytest.TempPathFactory, long: bool):
    """curves("mpiexec", 3)["linear"] is the finished run of that recipe on 3 ranks."""
    home = tmp_path_factory.mktemp("curves")
    (home / "conf/experiment").mkdir(parents=True)
    for name, recipe in RECIPES.items():
        (home / f"conf/experiment/{name}.yaml").write_text(f"# @package _global_\n{recipe}\n")

    @cache
    def at(under: str | None, ranks: int, *more: str) -> dict[str, Run]:
        cwd = Path(tmp_path_factory.mktemp(f"{under}-{ranks}"))
        recipes = QUICK_UNDER_TORCHRUN if under == "torchrun" and not long else tuple(RECIPES)
        sweep = ["--config-dir", str(home / "conf"), "-m", f"experiment={','.join(recipes)}"]
        words = ["-m", "allranks.train", *sweep, *DATA, "run.dir=cells", *more]
        if under is None:
            execute_forked(words, ranks, cwd).ok()
        else:
            execute([*launcher(under, ranks, forked_python()), *words], cwd).ok()
        return {name: Run(cwd / "cells" / str(number)) for number, name in enumerate(recipes)}

    return at


@pytest.mark.parametrize(("under", "ranks", "recipe"), EVERY_CURVE)
def test_every_loss_of_every_epoch_is_the_same(curves, under, ranks, recipe):
    alone, together = curves(None, 1)[recipe], curves(under, ranks)[recipe]
    assert together.summary["world_size"] == ranks
    assert together.losses == pytest.approx(alone.losses, rel=SAME)
    assert together.column("train/accuracy") == pytest.approx(alone.column("train/accuracy"), abs=1e-9)
    assert together.column("val/accuracy") == pytest.approx(alone.column("val/accuracy"), abs=1e-9)
    assert together.column("step") == alone.column("step")
    assert together.column("lr") == alone.column("lr")


def test_the_curve_is_worth_comparing(curves):
    """Losses fall from epoch to epoch, and differ from recipe to recipe."""
    runs = curves(None, 1)
    assert runs["linear"].column("step") == [13, 26, 39]
    for recipe in ("linear", "mlp"):
        first, second, third = runs[recipe].column("val/loss")
        assert first - 0.01 > second > third + 0.01
    assert runs["linear"].losses != pytest.approx(runs["mlp"].losses, rel=0.01)


def test_accumulated_gradients_are_those_of_the_whole_batch(curves):
    runs = curves(None, 1)
    assert runs["accumulated"].losses == pytest.approx(runs["linear"].losses, rel=1e-9)


@pytest.mark.parametrize(("under", "ranks"), LAUNCHES)
def test_a_batch_per_rank_is_a_global_batch_that_grows(curves, train_here, under, ranks):
    together = curves(under, ranks)["per_rank"]
    alone = train_here("model=linear", *DATA, "trainer.epochs=2", f"trainer.batch_size={24 * ranks}")
    assert together.summary["global_batch_size"] == alone.summary["global_batch_size"] == 24 * ranks
    assert together.losses == pytest.approx(alone.losses, rel=SAME)


@pytest.mark.parametrize(("under", "ranks"), [(None, 1), ("mpiexec", 3), only_long("mpiexec", 7)])
def test_every_example_is_evaluated_exactly_once(curves, under, ranks):
    for run in curves(under, ranks).values():
        assert run.summary["world_size"] == ranks
        assert run.summary["val/count"] == 398
        assert run.summary["test/count"] == 401
        # a whole number of right answers: the mean is over 398 examples, not over padded shares
        right = run.metrics[-1]["val/accuracy"] * 398 / 100
        assert right == pytest.approx(round(right), abs=1e-6)


@pytest.mark.long
def test_seven_ranks_train_the_same_linear_model_too(curves):
    assert curves("mpiexec", 7)["linear"].losses == pytest.approx(
        curves(None, 1)["linear"].losses, rel=SAME
    )


def test_a_cnn_in_single_precision_stays_close_over_its_first_epoch(curves):
    alone, together = curves(None, 1)["small_cnn"], curves("mpiexec", 3)["small_cnn"]
    assert together.losses == pytest.approx(alone.losses, rel=1e-3)


def test_gradients_go_through_mpi_under_mpiexec_and_through_gloo_under_torchrun(curves):
    used = {launch: curves(*launch)["linear"].environment["collectives"] for launch in LAUNCHES}
    assert used == {("mpiexec", 3): "mpi", ("torchrun", 2): "gloo"}


@pytest.mark.parametrize(("under", "ranks"), [(None, 1), ("mpiexec", 2), ("torchrun", 2)])
def test_ezpz_gives_the_same_numbers_as_native(curves, under, ranks):
    if ezpz.installed().kind != "real":
        pytest.skip(f"ezpz is {ezpz.installed().kind} here; the real one: {ezpz.INSTALL}")
    by_ezpz, native = curves(under, ranks, "runtime=ezpz"), curves(under, ranks, "runtime=native")
    for recipe in native:
        assert by_ezpz[recipe].environment["runtime"] == "ezpz"
        assert by_ezpz[recipe].losses == pytest.approx(native[recipe].losses, rel=SAME)
