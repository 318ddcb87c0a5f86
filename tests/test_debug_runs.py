"""Short runs, single steps, memory and profiles: what one looks at before a long run."""

from __future__ import annotations

import gzip
import json
import math
import os
import re
import signal
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DistributedSampler
from torch.utils.flop_counter import FlopCounterMode

from allranks import models
from allranks.base.errors import UserError
from allranks.compose import from_command_line
from allranks.config import TrainerConfig
from allranks.data.loader import used_for_training
from allranks.data.synthetic import generate
from allranks.run import checkpoint
from allranks.runtime.runtime import Runtime
from allranks.training import debug, profiling
from allranks.training.anomaly import detecting
from allranks.training.flops import PEAKS, Flops, peak_flops_per_s
from allranks.training.length import run_length
from allranks.training.records import StepsFile
from helpers import SMALL, Run, Started, execute_forked, forked_python, only_long, tree, until
from test_resume import EVERY_STEP, figures, stopped_after

LINEAR = (*SMALL, "model=linear", "trainer.batch_size=100", "trainer.epochs=2")  # 12 steps in each epoch
EXACT = 1e-9  # fp64: only the order of additions may differ


def steps_of(run: Run) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run.path / "metrics-steps.jsonl").read_text().splitlines()]


def plain_losses(steps: int, is_one_batch: bool = False) -> list[float]:
    """What a reader of a textbook would write for LINEAR: the loss of each step."""
    images, labels = generate(1600, "train")
    order = torch.randperm(1600, generator=torch.Generator().manual_seed(0))[:1200]
    examples = torch.from_numpy(images).double()[order] / 255
    classes = torch.from_numpy(labels).long()[order]
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(784, 10)).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    sampler: DistributedSampler[int] = DistributedSampler(examples, 1, 0, seed=0)  # type: ignore[arg-type]
    losses = []
    while True:
        rows = torch.arange(100).repeat(12) if is_one_batch else torch.tensor(list(sampler))
        sampler.set_epoch(sampler.epoch + 1)
        for batch in rows.split(100):
            loss = nn.functional.cross_entropy(model(examples[batch]), classes[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            if len(losses) == steps:
                return losses


# --- trainer.max_steps ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("epochs", "max_steps", "length"),
    [(2, None, (2, 24)), (2, 24, (2, 24)), (2, 100, (2, 24)), (2, 17, (2, 17)), (2, 12, (1, 12)),
     (2, 1, (1, 1)), (0, 5, (0, 0)), (1000, 13, (2, 13))],
)  # fmt: skip
def test_the_length_of_a_run(epochs, max_steps, length):
    trainer = TrainerConfig(epochs=epochs, max_steps=max_steps)
    found = run_length(trainer, steps_per_epoch=12)
    assert (found.epochs, found.steps) == length
    assert sum(found.steps_in(epoch) for epoch in range(found.epochs)) == found.steps


def test_a_run_of_some_steps_ends_like_a_finished_one(train_here):
    """Its first steps are those of the whole run, to the bit."""
    whole = train_here(*EVERY_STEP, "model=mlp")
    short = train_here(*EVERY_STEP, "model=mlp", "trainer.max_steps=17")
    assert short.column("step") == [12, 17]
    assert short.summary["epochs"] == 2
    assert (short.summary["state"], short.summary["test/count"]) == ("finished", 400)
    assert figures(short)[0][0] == figures(whole)[0][0]
    mine, theirs = (
        load_file(checkpoint.path_of(run.path, 17) / "model.safetensors") for run in (short, whole)
    )
    assert all(torch.equal(mine[name], theirs[name]) for name in theirs)
    assert checkpoint.steps(short.path)[0] == 17
    assert short.metrics[1]["throughput/samples_per_s"] * short.metrics[1]["time/train_s"] == pytest.approx(
        500
    )


def test_more_steps_than_a_run_has_change_nothing(train_here):
    assert figures(train_here(*LINEAR, "trainer.max_steps=25")) == figures(train_here(*LINEAR))


def test_a_run_of_some_steps_goes_on_as_if_nothing_had_been(train_here, tmp_path):
    overrides = (*EVERY_STEP, "model=mlp", "scheduler=warmup_cosine", "trainer.max_steps=17")
    whole = train_here(*overrides)
    for step in (5, 12, 13, 17):
        went_on = train_here(*overrides, stopped_after(whole, step, tmp_path / str(step)))
        assert figures(went_on) == figures(whole), step


def test_a_schedule_has_the_length_that_the_run_really_has(train_here):
    run = train_here(
        *LINEAR, "scheduler=warmup_cosine", "scheduler.warmup=0.2", "optimizer.lr=1",
        "trainer.max_steps=20", "trainer.log_every_steps=1",
    )  # fmt: skip
    rates = [record["step/lr"] for record in steps_of(run)]
    assert rates[:4] == pytest.approx([0.25, 0.5, 0.75, 1.0])
    assert rates[4:] == pytest.approx([0.5 * (1 + math.cos(math.pi * n / 16)) for n in range(16)])


# --- trainer.limit_train, trainer.overfit_batch ---------------------------------------------------------


def test_some_examples_are_the_first_of_the_splits_order(train_here):
    limited = train_here(*LINEAR, "trainer.limit_train=300")
    split = train_here(*LINEAR, "data.split=[300,1300]")
    assert limited.column("step") == [3, 6]
    assert limited.column("train/loss") == split.column("train/loss")
    assert limited.summary["test/loss"] == split.summary["test/loss"]
    assert limited.column("val/loss") != split.column("val/loss")  # the validation examples stay


def test_evaluations_of_some_examples_change_no_step(train_here):
    """They look at the first examples. More than there are is no mistake: it is a limit."""
    whole, limited, beyond = (
        train_here(*LINEAR, *more)
        for more in ([], ["trainer.limit_eval=100"], ["trainer.limit_eval=10000"])
    )
    assert (limited.summary["val/count"], limited.summary["test/count"]) == (100, 100)
    assert limited.summary["model/sha256"] == whole.summary["model/sha256"]
    assert limited.column("val/loss") != whole.column("val/loss")
    assert limited.summary["test/loss"] != whole.summary["test/loss"]
    assert figures(beyond) == figures(whole)


def test_one_batch_again_and_again_is_learnt_by_heart(train_here):
    run = train_here(*LINEAR, "trainer.overfit_batch=true", "trainer.log_every_steps=1")
    losses = [record["step/loss"] for record in steps_of(run)]
    assert losses == pytest.approx(plain_losses(24, is_one_batch=True), rel=EXACT)
    deep = train_here(
        *SMALL, "model=mlp", "model.dropout=0", "optimizer=adam", "trainer.epochs=15",
        "trainer.overfit_batch=true", "trainer.batch_size=100",
    )  # fmt: skip
    assert deep.column("train/loss")[-1] < 0.01
    assert deep.column("train/accuracy")[-1] == 100
    assert deep.summary["test/loss"] > 0.1


def test_which_examples_are_used():
    order = torch.tensor([7, 3, 5, 1, 9, 0, 2])
    assert used_for_training(order).tolist() == order.tolist()
    assert used_for_training(order, limit=3).tolist() == [7, 3, 5]
    assert used_for_training(order, repeated_batch=3).tolist() == [7, 3, 5, 7, 3, 5]  # whole batches only
    assert used_for_training(order, limit=2, repeated_batch=3).tolist() == [7, 3]


SHORT = (
    "trainer.limit_train=301",
    "trainer.max_steps=6",
    "trainer.log_every_steps=1",
    "trainer.batch_size=100",
)


@pytest.mark.parametrize("more", [[], ["trainer.overfit_batch=true"]], ids=["limit", "overfit"])
@pytest.mark.parametrize("ranks", [2, only_long(3)])
def test_short_runs_are_the_same_on_any_number_of_ranks(train, tmp_path, more, ranks):
    overrides = (*EVERY_STEP, "model=mlp", "model.dropout=0", *SHORT, *more)
    alone = train(*overrides, cwd=tmp_path / "alone").ok().run
    several = train(*overrides, ranks=ranks, cwd=tmp_path / "several").ok().run
    assert several.losses == pytest.approx(alone.losses, rel=1e-6)
    mine, theirs = steps_of(several), steps_of(alone)
    assert [record["step"] for record in mine] == [1, 2, 3, 4, 5, 6]
    for key in ("step/loss", "step/accuracy", "step/lr", "epoch"):
        assert [r[key] for r in mine] == pytest.approx([r[key] for r in theirs], rel=1e-9), key
    # What a checkpoint has is the position in the global order: another number of ranks goes on from it.
    there = stopped_after(several, 5, tmp_path / "stopped")
    went_on = train(*overrides, there, cwd=tmp_path).ok().run
    assert went_on.losses == pytest.approx(alone.losses, rel=1e-6)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("trainer.max_steps=0", "trainer.max_steps=0 is not valid: give a whole number >= 1."),
        ("trainer.limit_train=-3", "trainer.limit_train=-3 is not valid: give a whole number >= 1."),
        ("trainer.limit_train=1.5", "trainer.limit_train=1.5 is not valid: give a whole number >= 1."),
        ("trainer.overfit_batch=maybe", "trainer.overfit_batch=maybe is not valid: give true or false."),
        ("trainer.log_every_steps=0", "trainer.log_every_steps=0 is not valid: give a whole number >= 1."),
        ("profile=often", "profile=often is not valid: give true or false."),
    ],
)
def test_values_that_cannot_be(override, message):
    with pytest.raises(UserError) as told:
        from_command_line([*SMALL, override])
    assert str(told.value) == message


def test_more_examples_than_there_are_are_refused_before_anything_is_written(train):
    done = train(*LINEAR, "trainer.limit_train=1201")
    assert done.code == 2
    assert "trainer.limit_train=1201 is more than the 1,200 training examples" in done.message
    assert tree(done.cwd) == []


@pytest.fixture(scope="module")
def whole_linear(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """A run of the linear model with a checkpoint of each of its steps."""
    words = ["-m", "allranks.train", *EVERY_STEP, "model=linear", "run.dir=whole"]
    folder = tmp_path_factory.mktemp("whole")
    execute_forked(words, 1, folder).ok()
    return Run(folder / "whole")


@pytest.mark.parametrize(
    "override", ["trainer.max_steps=30", "trainer.limit_train=900", "trainer.overfit_batch=true"]
)
def test_a_resume_must_have_the_same_values(train_here, tmp_path, whole_linear, override):
    there = stopped_after(whole_linear, 5, tmp_path / "stopped")
    with pytest.raises(UserError, match=f"{override.partition('=')[0]} is"):
        train_here(*EVERY_STEP, "model=linear", there, override)


def test_a_checkpoint_of_before_these_keys_is_gone_on_from(train_here, tmp_path, whole_linear):
    there = stopped_after(whole_linear, 5, tmp_path / "stopped")
    folder = checkpoint.path_of(tmp_path / "stopped", 5)
    state = json.loads((folder / "state.json").read_text())
    for key in ("max_steps", "limit_train", "limit_eval", "overfit_batch"):
        del state["identity"][f"trainer.{key}"]
    files = {path.name: path.read_bytes() for path in folder.iterdir() if path.name != checkpoint.MANIFEST}
    files["state.json"] = json.dumps(state).encode()
    for path in folder.iterdir():
        path.unlink()
    folder.rmdir()
    checkpoint.write(str(tmp_path / "stopped"), 5, files, "", lambda: None)
    assert figures(train_here(*EVERY_STEP, "model=linear", there)) == figures(whole_linear)


# --- single steps ---------------------------------------------------------------------------------------


def test_steps_have_the_losses_of_plain_pytorch(train_here):
    every = steps_of(train_here(*LINEAR, "trainer.log_every_steps=1"))
    assert [record["step/loss"] for record in every] == pytest.approx(plain_losses(24), rel=EXACT)
    assert [record["epoch"] for record in every] == [1] * 12 + [2] * 12
    some = steps_of(train_here(*LINEAR, "trainer.log_every_steps=5"))
    assert some == every[4::5]


def test_recording_changes_no_bit_and_leaves_no_file_where_it_is_off(train_here):
    overrides = (*LINEAR, "trainer.train_metrics=running")
    off, on = train_here(*overrides), train_here(*overrides, "trainer.log_every_steps=3", "profile=true")
    assert figures(off) == figures(on)
    assert not {"metrics-steps.jsonl", "profile", "tracker"} & {path.name for path in off.path.iterdir()}


def test_steps_that_are_not_recorded_cost_no_message(train_here, monkeypatch):
    """Ranks bring figures together when they meet anyway, once for all steps since the last time."""
    gathered = []
    whole = Runtime.gather
    monkeypatch.setattr(
        Runtime, "gather", lambda self, rows: gathered.append(tuple(rows.shape)) or whole(self, rows)
    )
    train_here(*LINEAR, "trainer.batch_size=1")
    off = len(gathered)
    gathered.clear()
    train_here(*LINEAR, "trainer.batch_size=1", "trainer.log_every_steps=1")
    of_steps = [columns for _, columns in gathered if columns > 3]
    assert off < 20  # for epochs, checkpoints and evaluations
    assert sum(of_steps) > 0.9 * 3 * 2400
    assert len(of_steps) < 500  # not one for each of 2,400 steps


def test_killed_and_gone_on_no_step_is_there_twice_and_none_is_missing(tmp_path, train):
    overrides = (*SMALL, "model=mlp", "trainer.epochs=8", "trainer.batch_size=16",
                 "checkpoint.every_steps=50", "trainer.log_every_steps=1")  # fmt: skip
    whole = train(*overrides, "run.dir=whole").ok().run
    command = [forked_python(), "-m", "allranks.train", *overrides, "run.dir=run"]
    with Started(command, cwd=tmp_path) as started:
        until(lambda: checkpoint.steps(tmp_path / "run") or started.process.poll() is not None)
        os.kill(Run(tmp_path / "run").pid(0), signal.SIGKILL)
        started.process.wait()
    before = steps_of(Run(tmp_path / "run"))
    assert len(before) >= checkpoint.steps(tmp_path / "run")[0]
    assert not (tmp_path / "run/summary.json").exists()
    with (tmp_path / "run/metrics-steps.jsonl").open("a") as file:
        file.write('{"step": 17, "ep')  # the half of a line
    went_on = train(*overrides, "run.dir=run").ok().run
    assert steps_of(went_on) == steps_of(whole)
    assert [record["step"] for record in steps_of(went_on)] == list(range(1, 75 * 8 + 1))


def test_the_steps_before_a_loss_that_is_not_finite_are_recorded(train):
    done = train(*LINEAR, "optimizer.lr=1e308", "trainer.log_every_steps=1", ranks=2)
    assert done.code == 2
    [last] = re.findall(r"not finite in step (\d+)", done.err)
    [folder] = [path.parent for path in done.cwd.rglob("metrics-steps.jsonl")]
    records = steps_of(Run(folder))
    assert [record["step"] for record in records] == list(range(1, int(last) + 1))
    assert records[0]["step/loss"] == pytest.approx(plain_losses(1)[0], rel=EXACT)
    assert records[-1]["step/loss"] is None  # JSON has no NaN


def test_a_full_disk_delays_the_lines_of_steps_and_loses_none(mounted, caplog):
    folder = mounted("size=64k")
    file = StepsFile(folder / "steps", 0, wanted=True)
    file.append([{"step": 1}])
    ballast = folder / "ballast"
    with pytest.raises(OSError), ballast.open("wb", buffering=0) as filler:
        while True:
            filler.write(b"0" * 4096)
    for step in range(2, 1002):
        file.append([{"step": step, "text": "x" * 20}])
    assert caplog.text.count("could not be written") == 1
    ballast.unlink()
    file.append([{"step": 1002}])
    # Once more, and now the disk has room again only when the run ends.
    with pytest.raises(OSError), ballast.open("wb", buffering=0) as filler:
        while True:
            filler.write(b"0" * 4096)
    for step in range(1003, 1203):
        file.append([{"step": step, "text": "x" * 20}])
    ballast.unlink()
    file.close()
    steps = [json.loads(line)["step"] for line in (folder / "steps").read_text().splitlines()]
    assert steps == list(range(1, 1203))
    assert file.written == (folder / "steps").stat().st_size


def test_a_file_of_steps_that_was_removed_begins_anew_without_zero_bytes(tmp_path):
    path = tmp_path / "steps"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    file = StepsFile(path, 2, wanted=True)
    path.unlink()
    file.append([{"step": 3}])
    file.close()
    assert path.read_text() == '{"step": 3}\n'
    assert file.written == path.stat().st_size


# --- memory, operations, profile ------------------------------------------------------------------------


def test_memory_and_operations_are_recorded(train_here):
    run = train_here(*LINEAR)
    per_example = 2 * 2 * 784 * 10  # forward, and the weights' gradient: images need none
    for line in (*run.metrics, run.summary):
        assert line["memory/process_peak_bytes"] > 50 * 2**20
        assert line["memory/process_peak_bytes"] < 100 * 2**30
        assert "memory/device_peak_bytes" not in line  # of a CPU
        assert "throughput/share_of_peak" not in line
    for line in run.metrics:
        expected = per_example * line["throughput/samples_per_s"]
        assert line["throughput/model_flops_per_s"] == pytest.approx(expected)


# Made where they are used: torchvision, which resnet18 needs, takes each worker seconds to import.
COUNTED: dict[str, Callable[[], nn.Module]] = {
    "linear": lambda: models.linear([1, 28, 28], 10),
    "mlp": lambda: models.mlp([1, 28, 28], 10, widths=[50, 20]),
    "cnn": lambda: models.cnn([1, 28, 28], 10),
    "vit": lambda: models.vit([1, 28, 28], 10, depth=2, dropout=0.1),
    "resnet18": lambda: models.resnet18([1, 28, 28], 10),
    "transposed": lambda: nn.Sequential(
        nn.ConvTranspose2d(1, 3, 3, stride=2), nn.Flatten(), nn.LazyLinear(10)
    ),
}


@pytest.mark.parametrize("name", COUNTED)
def test_operations_are_counted_as_torch_counts_them(name):
    model = COUNTED[name]()
    images = torch.rand(3, 1, 28, 28)
    model(images)  # lazy layers
    ours, torchs = Flops(), FlopCounterMode(display=False)
    for counter in (ours, torchs):
        with counter:
            model(images).sum().backward()
    assert ours.count == torchs.get_total_flops() > 0


def test_a_grouped_convolution_costs_as_much_less_as_it_has_groups():
    """torch's counter does not divide the work of the weights' gradient."""
    images = torch.rand(2, 8, 10, 10, requires_grad=True)
    counts = []
    for groups in (1, 2, 4):
        with Flops() as counter:
            nn.Conv2d(8, 16, 3, groups=groups)(images).sum().backward()
        counts.append(counter.count)
    once = 2 * 2 * 8 * 8 * (16 * 8 * 9)
    assert counts == [3 * once, 3 * once // 2, 3 * once // 4]


def test_attention_is_counted_on_a_cpu_as_well():
    """torch's counter passes over the kernel that a CPU has for it."""
    queries = torch.rand(2, 4, 16, 8, requires_grad=True)
    with Flops() as counter:
        nn.functional.scaled_dot_product_attention(queries, queries, queries).sum().backward()
    product = 2 * 2 * 4 * 16 * 16 * 8
    assert counter.count == 7 * product  # two forward, five backward


@pytest.mark.parametrize("layer", [nn.LSTM(4, 8), nn.Bilinear(4, 4, 8)], ids=["LSTM", "Bilinear"])
def test_work_that_is_not_counted_is_not_taken_for_none(layer):
    counter = Flops()
    features = torch.rand(3, 4)
    counter.during(lambda: layer(features, features) if isinstance(layer, nn.Bilinear) else layer(features))
    assert counter.count is None


@pytest.mark.long
def test_a_higher_order_operator_runs_and_its_work_is_not_known():
    """torch lets none of them run while operations are counted."""
    layer = nn.Linear(4, 4)
    counter = Flops()
    images = torch.rand(2, 4)
    output = counter.during(lambda: torch.cond(images.sum() > 0, layer, lambda x: 2 * layer(x), (images,)))
    assert torch.equal(output, layer(images))
    assert counter.count is None
    assert counter.during(lambda: layer(images)).shape == (2, 4)
    assert counter.count is None  # what was passed over stays unknown


@pytest.mark.parametrize(
    ("name", "precision", "tf32", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", "bf16", False, 989.4),
        ("NVIDIA H100 PCIe", "bf16", False, 756),
        ("NVIDIA H200", "fp32", False, 67),
        ("NVIDIA A100-SXM4-40GB", "fp32", True, 156),
        ("NVIDIA A100-SXM4-40GB", "fp64", True, 19.5),
        ("AMD Instinct MI250X", "fp16", False, 191.5),
        ("Intel(R) Data Center GPU Max 1550", "bf16", False, 419.5),
        ("NVIDIA GeForce RTX 4090", "fp32", False, None),
    ],
)
def test_what_devices_can_do(name, precision, tf32, tera):
    peak = peak_flops_per_s(name, precision, tf32)
    assert peak == (None if tera is None else pytest.approx(tera * 1e12))
    assert all(peak.fp64 <= peak.fp32 <= peak.tf32 <= peak.bf16 for peak in PEAKS.values())


@pytest.mark.parametrize(
    ("left", "first", "last"), [(100, 10, 20), (20, 10, 20), (19, 2, 19), (2, 2, 2), (1, 1, 1)]
)
def test_which_steps_are_profiled(left, first, last):
    steps = profiling.recorded_steps(left)
    assert (steps[0], steps[-1]) == (first, last)


@pytest.mark.parametrize(
    ("device", "shares"), [("cpu", [0.75, 0.25]), ("mps", [0.75, 0.25]), ("cuda", [0, 1])]
)
def test_shares_are_of_the_times_that_are_recorded(device, shares):
    """Of an Apple GPU torch.profiler records no time, and so the shares are those of the CPU's time."""
    measured = [("aten::mm", 3000.0, 0.0), ("aten::add", 1000.0, 500.0)]
    averages = [
        SimpleNamespace(key=key, count=1, self_cpu_time_total=cpu_us, self_device_time_total=device_us)
        for key, cpu_us, device_us in measured
    ]
    table = profiling.table_of(averages, range(1, 3), device)
    assert {row["name"]: row["share"] for row in table["rows"]} == {
        "aten::mm": shares[0], "aten::add": shares[1],
    }  # fmt: skip
    assert all((row["own_device_ms"] is None) == (device != "cuda") for row in table["rows"])


def test_a_profile_has_a_trace_of_each_rank_and_a_table(train):
    run = train(*LINEAR, "profile=true", ranks=2).ok().run
    assert {path.name for path in (run.path / "profile").iterdir()} == {
        "rank-0.json.gz", "rank-1.json.gz", "table.json", "table.md",
    }  # fmt: skip
    for rank in (0, 1):
        with gzip.open(run.path / f"profile/rank-{rank}.json.gz") as file:
            names = [event.get("name") for event in json.load(file)["traceEvents"]]
        assert names.count("forward") == names.count("backward") == 11
    table = json.loads((run.path / "profile/table.json").read_text())
    assert table["steps"] == [10, 20]
    assert {name: part["calls"] for name, part in table["parts"].items()} == dict.fromkeys(
        profiling.PARTS, 11
    )
    assert "aten::addmm" in {row["name"] for row in table["rows"]}
    shares = [row["share"] for row in table["rows"]]
    assert shares == sorted(shares, reverse=True)
    assert 0.5 < sum(shares) <= 1.01
    assert "| aten::addmm |" in (run.path / "profile/table.md").read_text()


# --- allranks train --debug -----------------------------------------------------------------------------


def test_debug_shows_the_first_steps_and_says_where(command):
    done = command("allranks", "train", "--debug", *SMALL, "model=mlp", "trainer.batch_size=100").ok()
    [folder] = [path.parent for path in done.cwd.rglob("summary.json")]
    assert folder.parent == done.cwd / "runs/debug-mlp"
    run = Run(folder)
    assert [record["step"] for record in steps_of(run)] == list(range(1, 21))
    told = done.out.partition("seen in this debug run:\n")[2]
    assert re.search(r"loss +2\.\d+ in step 1, \d\.\d+ in step 20", told)
    assert re.search(r"memory +\d\.\d\d GiB of the process at most", told)
    assert re.search(r"time +forward \d+ %, backward \d+ %, optimizer \d+ %; most of it in ", told)
    for path in re.findall(r"runs/\S+?(?=,|$)", told, flags=re.M):
        assert (done.cwd / path).is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["-m", "seed=1,2"], "--debug is for one training"),
        (["trainer.max_steps=x"], "trainer.max_steps=x is not valid"),
    ],
)
def test_what_debug_does_not_do(train, words, message):
    done = train("--debug", *SMALL, *words)
    assert done.code == 2
    assert message in done.message


BAD_LAYER = """
import torch

class Bad(torch.nn.Module):
    def __init__(self, where):
        super().__init__()
        self.first = torch.nn.Linear(784, 10)
        self.odd = Odd(where)
        self.last = torch.nn.Linear(10, 10)
    def forward(self, images):
        return self.last(self.odd(self.first(images.flatten(1))))

class Odd(torch.nn.Module):
    def __init__(self, where):
        super().__init__()
        self.where, self.calls = where, 0
    def forward(self, x):
        self.calls += self.training
        if self.calls < 5:
            return x
        return x / 0 if self.where == "forward" else torch.where(x < 99, x, x / 0 * 0)
"""


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("forward", "The output of the model's layer odd (Odd) is not finite"),
        (
            "backward",
            "The gradient becomes NaN in the backward pass: Function 'DivBackward0' returned nan",
        ),
    ],
)
def test_debug_names_the_layer_or_operation_that_is_not_finite(train, tmp_path, where, message):
    (tmp_path / "bad.py").write_text(BAD_LAYER)
    own = [word for word in SMALL if not word.startswith("model=")]
    done = train(
        "--debug", *own, "model=linear", "model._target_=bad.Bad", "~model.input_shape", "~model.classes",
        f"+model.where={where}", env={"PYTHONPATH": str(tmp_path)},
    )  # fmt: skip
    assert done.code == 2, done.err
    [said] = done.messages
    assert message in said
    assert "Traceback (most recent call last)" not in done.err  # torch's warning shows the forward pass
    assert len(steps_of(Run(next(done.cwd.rglob("metrics.jsonl")).parent))) >= 1


def test_the_ranks_agree_on_the_layer_that_is_not_finite(train, tmp_path):
    (tmp_path / "bad.py").write_text(BAD_LAYER)
    own = [word for word in SMALL if not word.startswith("model=")]
    done = train(
        *own, "model=linear", "model._target_=bad.Bad", "~model.input_shape", "~model.classes",
        "+model.where=forward", "trainer.detect_anomaly=true",
        env={"PYTHONPATH": str(tmp_path)}, ranks=2,
    )  # fmt: skip
    assert done.code == 2, done.err
    [said] = done.messages
    assert "The output of the model's layer odd (Odd) is not finite" in said


def test_a_step_is_looked_at_again_only_where_it_is_not_finite(train_here, monkeypatch):
    """So a run with this setting takes no longer."""
    looked = []
    monkeypatch.setattr("allranks.training.anomaly.detecting", looked.append)
    run = train_here(*LINEAR, "trainer.max_steps=3", "trainer.detect_anomaly=true")
    assert run.summary["state"] == "finished"
    assert looked == []


def test_what_the_command_line_has_left_out_is_not_shown(train):
    """Neither a file nor a figure that this run does not have."""
    done = train("--debug", *SMALL, "model=linear", "trainer.log_every_steps=null", "profile=false").ok()
    told = done.out.partition("seen in this debug run:\n")[2].splitlines()
    assert [line.split()[0] for line in told] == ["speed", "memory"]


def test_the_layer_is_found_whose_output_is_a_tuple():
    model = nn.Sequential(nn.Linear(4, 4), nn.LSTM(4, 4))
    with torch.no_grad():
        model[1].bias_hh_l0.fill_(math.nan)
    with detecting({"": model}, UserError), pytest.raises(UserError, match=r"1 \(LSTM\) is not finite"):
        model(torch.rand(3, 4))


@pytest.mark.parametrize(
    ("words", "steps", "evaluated"),
    [
        (["model=vit"], 20, 100),
        (["model=resnet18"], 2, 20),  # each of its steps takes seconds
        (["model=resnet18", "trainer.max_steps=5"], 5, 20),
        (["model=resnet18", "trainer.limit_eval=100"], 2, 100),
        (["model=resnet18", "++trainer.max_steps=5"], 5, 20),
        (["model=resnet18", "~trainer.max_steps"], None, 20),  # all steps, as typed
    ],
)
def test_how_much_debug_does(words, steps, evaluated):
    [config] = debug.configurations(["--debug", *words, "data=synthetic"], is_alone=True)
    assert (config.trainer.max_steps, config.trainer.limit_eval) == (steps, evaluated)
    assert config.name == f"debug-{words[0].removeprefix('model=')}"
