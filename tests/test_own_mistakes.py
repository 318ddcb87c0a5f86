"""Loops of the user's own: programs that hold a mistake are told so, and odd ones work as they read."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

from helpers import Done, execute_forked, only_long

# refused(f) prints what allranks says of f(), and that it was taken where it says nothing.
HEAD = """
import torch, allranks
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from allranks.base.errors import UserError

def refused(call):
    try:
        call()
    except UserError as error:
        print("said:", error)
    else:
        print("said: nothing, it was taken")

data = DataLoader(TensorDataset(torch.arange(8.0)[:, None]), 4)
run = allranks.open("work", device="cpu", threads=1, report=False, checkpoint={"every_steps": 4})
"""


def program(folder: Path, body: str, ranks: int = 1) -> Done:
    """What becomes of a program that goes on so after allranks.open()."""
    return execute_forked(["-c", HEAD + body], ranks, folder)


def said_by(done: Done) -> list[str]:
    """What allranks has said of each call that the program has given to refused()."""
    lines = done.ok().out.splitlines()
    return [line.removeprefix("said: ") for line in lines if line.startswith("said: ")]


def lines_of(folder: Path) -> list[dict[str, float]]:
    """The metrics of each epoch of the program's run."""
    return [json.loads(line) for line in (folder / "runs/work/metrics.jsonl").read_text().splitlines()]


# --- a loop that hangs ---


def test_a_loop_that_hangs_is_told_where_though_stderr_is_an_object_of_the_programs_own(tmp_path):
    """A tee has often no more than write() and flush()."""
    program = """
import sys, time, torch, allranks

class Tee:
    def write(self, text): ...
    def flush(self): ...

sys.stderr = Tee()
run = allranks.open("work", device="cpu", threads=1, report=False, watchdog={"step_s": 1})
for batch in run.steps([torch.ones(2)] * 4):
    run.log({"loss": 1.0})
    if run.step == 2:
        time.sleep(60)
"""
    done = execute_forked(["-c", program], 1, tmp_path)
    assert done.code == 1
    assert "has made no progress for 1." in done.err
    assert "in <module>" in done.err


# --- after the run ---


def test_a_signal_ends_what_a_program_does_after_its_run(tmp_path):
    body = """
import os, signal
for batch in run.steps(data):
    run.log({"loss": 1.0})
run.finish()
os.kill(os.getpid(), signal.SIGTERM)
print("it goes on")
"""
    done = program(tmp_path, body)
    assert done.code == -signal.SIGTERM
    assert "it goes on" not in done.out


# --- threads ---


def test_a_loop_in_another_thread_is_refused(tmp_path):
    """Python hands signals to the main thread alone."""
    body = """
import threading

def train():
    refused(lambda: next(iter(run.steps(data))))

thread = threading.Thread(target=train)
thread.start()
thread.join()
run.finish()
"""
    [said] = said_by(program(tmp_path, body))
    assert said.startswith("its loop is not in the program's main thread.")


# --- figures ---


def test_a_figure_takes_no_name_that_allranks_writes_itself(tmp_path):
    """A step in metrics.jsonl that is a mean of steps would be one from which no run can go on."""
    body = """
for epoch in run.epochs(1):
    for (x,) in run.steps(data):
        refused(lambda: run.log({"epoch": epoch, "loss": x.mean()}))
        run.log({"state": 1.0, "steps": 5})
    refused(lambda: run.log({"step": run.step}))
    refused(lambda: run.log({"time/train_s": 1.0}))
run.log({"epoch": 3})  # of summary.json, which has `epochs`
refused(lambda: run.log({"state": 3}))
refused(lambda: run.log({"time/total_s": 3}))
run.log({"time/train_s": 1.5})
run.finish()
"""
    by_itself = "run.log() got a figure with the name {}, which allranks writes to {} by itself: {}."
    assert said_by(program(tmp_path, body)) == [
        *[by_itself.format("epoch", "each record", "leave it out")] * 2,
        by_itself.format("step", "each record", "leave it out"),
        by_itself.format("time/train_s", "metrics.jsonl", "give it another name"),
        by_itself.format("state", "summary.json", "give it another name"),
        by_itself.format("time/total_s", "summary.json", "give it another name"),
    ]
    [line] = lines_of(tmp_path)
    assert (line["epoch"], line["step"], line["state"], line["steps"]) == (1, 2, 1.0, 5.0)
    summary = json.loads((tmp_path / "runs/work/summary.json").read_text())
    assert (summary["state"], summary["time/train_s"], summary["epoch"]) == ("finished", 1.5, 3)


def test_figures_are_numbers_with_texts_for_names(tmp_path):
    body = """
import numpy as np
for value in (np.ones(2), np.array("3"), np.array(1j)):
    refused(lambda: run.log({"a": value}))
refused(lambda: run.log({1: 2.0}))
refused(lambda: run.log([1.0]))
refused(lambda: run.means({2: x.mean()} for (x,) in run.batches(data)))
refused(lambda: run.log({"val\\nloss": 1.0}))
refused(lambda: run.means({"\\x1b[2J": x.mean()} for (x,) in run.batches(data)))
run.log({"one": np.array([1.5]), "two": np.float32(2)})
run.finish()
"""
    assert said_by(program(tmp_path, body)) == [
        "run.log() got float64 [2] as a: give a number or a scalar tensor.",
        "run.log() got <U1 [] as a: give a number or a scalar tensor.",
        "run.log() got complex128 [] as a: give a number or a scalar tensor.",
        "run.log() got 1 as the name of a figure: give texts as names, such as 'val/loss'.",
        "run.log() got a list (float): give a dict of figures by name.",
        "run.means() got 2 as the name of a figure: give texts as names, such as 'val/loss'.",
        r"run.log() got a figure with the name 'val\nloss', which holds a character that cannot be printed"
        ": leave that out.",
        r"run.means() got a figure with the name '\x1b[2J', which holds a character that cannot be printed"
        ": leave that out.",
    ]
    summary = json.loads((tmp_path / "runs/work/summary.json").read_text())
    assert (summary["one"], summary["two"]) == (1.5, 2.0)


# --- what is kept ---


def test_a_module_with_buffers_only_is_kept_and_put_back(tmp_path):
    body = """
class Norm(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("mean", torch.zeros(1), persistent=False)

norm = Norm()
run.keep(norm=norm)
print("mean", norm.mean.item())
for (x,) in run.steps(data):
    norm.mean += x.mean()
    if run.step == 1 and not norm.mean.item() == 7.0:
        raise SystemExit(f"the mean is {norm.mean.item()}")
    if run.step == 0:
        import os, signal
        os.kill(os.getpid(), signal.SIGTERM)
run.finish()
"""
    assert program(tmp_path, body).code == 85
    assert "mean 1.5" in program(tmp_path, body).ok().out


def test_dicts_with_tuples_as_keys_come_back_as_they_were(tmp_path):
    body = """
import numpy as np
class Table:
    def __init__(self): self.values = {}
    def state_dict(self): return {"values": self.values}
    def load_state_dict(self, state): self.values = state["values"]

table = Table()
run.keep(table=table)
print("table", table.values)
print(run.share([1, 2], lambda n: {(n, ("a", n)): n, np.int64(n): torch.ones(1)}))
for (x,) in run.steps(data):
    table.values[run.step, "left"] = x.mean().item()
refused(lambda: run.share([1], lambda n: {frozenset(): n}, name="sets"))
"""
    assert program(tmp_path, body + "raise SystemExit(3)").code != 0
    again = program(tmp_path, body + "run.finish()").ok().out
    assert "table {(0, 'left'): 1.5, (1, 'left'): 5.5}" in again
    assert "[{(1, ('a', 1)): 1, 1: tensor([1.])}, {(2, ('a', 2)): 2, 2: tensor([1.])}]" in again
    assert "gave what cannot be kept: result has a frozenset as a key of a dict: give numbers" in again


# --- epochs and steps ---


def test_steps_outside_of_epochs_are_gone_through_once(tmp_path):
    """Also where the run goes on after its only epoch, which then has no step left."""
    body = """
print("steps", len([x for (x,) in run.steps(data)]))
"""
    again = """
refused(lambda: list(run.steps(data)))
run.finish()
"""
    assert program(tmp_path, body + "raise SystemExit(3)").code != 0
    done = program(tmp_path, body + again)
    assert "steps 0" in done.ok().out
    [said] = said_by(done)
    assert said.startswith("run.steps() is called outside of run.epochs() after the end of an epoch.")


def test_an_epoch_without_a_batch_is_refused(tmp_path):
    """As where a generator is to give the batches of a second epoch."""
    body = """
source = ((x,) for x in torch.ones(3, 4, 1))
def train():
    for epoch in run.epochs(2):
        print("steps", len(list(run.steps(source))))
refused(train)
raise SystemExit(3)
"""
    out = program(tmp_path, body).out
    assert out.count("steps 3") == 1
    assert (
        "said: run.steps() got no batch of its generator in epoch 1. It can be gone through only once"
        in out
    )
    shutil.rmtree(tmp_path / "runs")
    few = body.replace("((x,) for x in torch.ones(3, 4, 1))", "DataLoader(range(3), 4, drop_last=True)")
    out = program(tmp_path, few).out
    assert "said: run.steps() got no batch of its DataLoader in epoch 0. An epoch has one step" in out


def test_fewer_batches_than_the_epoch_has_had_are_refused(tmp_path):
    body = """
import os, signal
class Stream:
    def __iter__(self):
        return iter(torch.ones(COUNT, 4, 1))
for x in run.steps(Stream()):
    if run.step == 3:
        os.kill(os.getpid(), signal.SIGTERM)
run.finish()
"""
    assert program(tmp_path, body.replace("COUNT", "6")).code == 85
    done = program(tmp_path, body.replace("COUNT", "3"))
    assert done.code == 2
    assert "The Stream gives 3 batches, but 4 steps of this epoch were taken before" in done.err
    program(tmp_path, body.replace("COUNT", "4")).ok()


def test_steps_that_are_held_by_the_program_end_with_their_epoch(tmp_path):
    """A program that calls next() takes as many steps as it calls it."""
    body = """
for epoch in run.epochs(2):
    held = iter(run.steps(data))
    (x,) = next(held)
    run.log({"mean": x.mean()})
run.finish()
"""
    program(tmp_path, body).ok()
    assert [(line["step"], line["mean"]) for line in lines_of(tmp_path)] == [(1, 1.5), (2, 1.5)]
    assert json.loads((tmp_path / "runs/work/summary.json").read_text())["steps"] == 2


def test_steps_without_epochs_that_are_held_end_with_the_run(tmp_path):
    body = """
held = iter(run.steps(data))
(x,) = next(held)
run.log({"mean": x.mean()})
run.finish()
"""
    program(tmp_path, body).ok()
    assert [(line["step"], line["mean"]) for line in lines_of(tmp_path)] == [(1, 1.5)]


def test_a_run_does_not_finish_in_the_middle_of_its_epochs(tmp_path):
    body = """
for epoch in run.epochs(2):
    for (x,) in run.steps(data):
        pass
    if epoch == 0:
        refused(run.finish)
run.finish()
"""
    [said] = said_by(program(tmp_path, body))
    assert said.startswith(
        "run.finish() is called within run.epochs(), before the epoch has come to its end"
    )
    assert json.loads((tmp_path / "runs/work/summary.json").read_text())["epochs"] == 2


# --- evaluations ---

STREAM = """
import time
class Stream:
    def __iter__(self):
        for number in range({count}):
            {pause}
            yield torch.full((4, 1), number + {first})
for epoch in run.epochs(1):
    for (x,) in run.steps(data):
        pass
    {mean}
run.finish()
"""
MEAN = "run.log({'mean': run.mean(x.double().mean() for x in run.batches(Stream()))})"
MEANS = "run.log(run.means({'mean': x.double().mean()} for x in run.batches(Stream())))"


@pytest.mark.parametrize(
    ("count", "pause", "first", "mean"),
    [
        ("6 - 2 * run.rank", "time.sleep(0.4)", "0", MEAN),
        only_long("4 + 2 * run.rank", "time.sleep(0.4)", "0", MEANS),
        ("6 - 2 * run.rank", "pass", "0", MEANS),
        only_long("6", "pass", "run.rank", MEAN),
    ],
    ids=["fewer and slow", "more and slow", "fewer", "others"],
)
def test_ranks_that_evaluate_on_different_batches_are_told(count, pause, first, mean, tmp_path):
    """Those that have none left wait for the others, where these may just agree on a stop."""
    code = STREAM.format(count=count, pause=pause, first=first, mean=mean)
    done = program(tmp_path, code, ranks=2)
    assert done.code == 2
    assert done.err.count("has gone through other batches of run.batches() on other ranks") == 1
    assert "Traceback" not in done.err


def test_ranks_evaluate_on_the_same_batches_each_of_which_counts_once(tmp_path):
    """Within a step as well, and in several passes."""
    code = STREAM.format(count="6", pause="", first="0", mean=MEAN).replace(
        "        pass\n",
        """        print("in a step", run.mean([torch.tensor(2.0)]), run.mean(
            y.double().mean() for _ in range(2) for y in run.batches(Stream())))
""",
    )
    done = program(tmp_path, code, ranks=2).ok()
    assert done.out.count("in a step 2.0 2.5") == 4
    assert lines_of(tmp_path)[0]["mean"] == 2.5


# --- what is given to allranks ---


def test_values_of_the_program_may_come_from_argparse_and_hold_paths(tmp_path):
    opening = 'allranks.open("work", '
    given = "config=argparse.Namespace(data=Path('/x'), sizes=(1, 2), lr=0.5), "
    code = "import argparse\nfrom pathlib import Path\n" + HEAD
    code = code.replace(opening, opening + given)
    execute_forked(["-c", code + "list(run.steps(data))\nrun.finish()"], 1, tmp_path).ok()
    [state] = (tmp_path / "runs/work/checkpoints").glob("*/state.json")
    identity = json.loads(state.read_text())["identity"]
    own = {key: value for key, value in identity.items() if key.startswith("own.")}
    assert own == {"own.data": "/x", "own.sizes": [1, 2], "own.lr": 0.5}

    wrong = code.replace("Path('/x')", "b'x'").replace('"work"', '"other"')
    done = execute_forked(["-c", wrong], 1, tmp_path)
    assert done.code == 2
    assert "config.data is a bytes, which the run's files cannot hold: give numbers, texts" in done.err


def test_what_run_batches_and_run_share_cannot_use_is_refused(tmp_path):
    body = """
for options in ({"batch_size": 0}, {"batch_size": 4.0}, {"batch_size": 4, "workers": -1}):
    refused(lambda: run.batches(data.dataset, **options))
refused(lambda: run.share({"a", "b"}, len))
print(run.share(data.dataset, lambda item: int(item[0]), name="a Dataset"))
print(run.share((number for number in (3, 4)), lambda number: number * number, name="squares"))
run.finish()
"""
    done = program(tmp_path, body)
    assert [said.partition(":")[0] for said in said_by(done)] == [
        "run.batches() got batch_size=0",
        "run.batches() got batch_size=4.0",
        "run.batches() got workers=-1",
        "run.share() got a set for its items",
    ]
    assert "[0, 1, 2, 3, 4, 5, 6, 7]" in done.out
    assert "[9, 16]" in done.out


def test_a_load_state_dict_that_asserts_is_told_as_one_that_raises(tmp_path):
    body = """
class Table:
    def state_dict(self): return {"size": 2}
    def load_state_dict(self, state): assert state["size"] == 3, "another size"

run.keep(table=Table())
list(run.steps(data))
raise SystemExit(3)
"""
    program(tmp_path, body)
    done = program(tmp_path, body)
    assert done.code == 2
    assert "does not fit this program's table: another size." in done.err


# --- batches ---


def test_a_batch_sampler_alone_knows_how_many_examples_it_gives(tmp_path):
    body = """
half = DataLoader(data.dataset, batch_sampler=[[0, 1], [2, 3]])
for epoch in run.epochs(2):
    for (x,) in run.steps(half if epoch else data):
        pass
run.finish()
"""
    program(tmp_path, body).ok()
    whole, half = lines_of(tmp_path)
    assert "throughput/samples_per_s" in whole
    assert "throughput/samples_per_s" not in half


def test_batches_that_are_a_user_dict_stay_one_and_are_told_apart(tmp_path):
    """As the batches of a tokenizer are."""
    body = """
from collections import UserDict
class Stream:
    def __iter__(self):
        return (UserDict(ids=torch.full((3, 1), n + OTHER), one=1) for n in range(2))
for batch in run.steps(Stream()):
    print(type(batch).__name__, batch["ids"].shape[0], batch["one"])
run.finish()
"""
    done = program(tmp_path, body.replace("OTHER", "0"), ranks=2).ok()
    lines = [line for line in done.out.splitlines() if line.startswith("UserDict")]
    assert sorted(lines) == ["UserDict 1 1", "UserDict 1 1", "UserDict 2 1", "UserDict 2 1"]
    shutil.rmtree(tmp_path / "runs")
    done = program(tmp_path, body.replace("OTHER", "run.rank"), ranks=2)
    assert "run.steps() has got other batches on other ranks" in done.err


def test_a_process_that_cannot_send_a_batch_of_a_stream_ends_the_run(tmp_path):
    """torch alone prints the error on a thread of the process, and waits for the batch for ever."""
    body = """
import tempfile
class Stream(torch.utils.data.IterableDataset):
    def __iter__(self):
        tempfile.tempdir = "/nowhere"  # where the socket would be through which batches are sent
        yield torch.ones(100, 100)

def begin(worker):
    print("begun", worker, flush=True)

loader = DataLoader(Stream(), 1, num_workers=1, worker_init_fn=begin)
for x in run.steps(loader):
    assert loader.worker_init_fn is begin
run.finish()
"""
    done = program(tmp_path, body)
    assert done.code == 1
    assert "A process that reads the data has ended (num_workers=1): " in done.err
    assert "FileNotFoundError: [Errno 2] No such file" in done.err
    assert "begun 0" in done.out


def test_the_loss_and_the_training_loss_of_a_step_are_two_figures(tmp_path):
    body = """
for (x,) in run.steps(data):
    run.log({"loss": 1.0, "train/loss": 2.0, "train/size": 3.0})
run.finish()
"""
    code = HEAD.replace('open("work"', 'open("work", log_every_steps=1')
    execute_forked(["-c", code + body], 1, tmp_path).ok()
    lines = (tmp_path / "runs/work/metrics-steps.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": step, "epoch": 1, "step/loss": 1.0, "step/train/loss": 2.0, "step/size": 3.0}
        for step in (1, 2)
    ]


# --- gradients and what is kept ---


@pytest.mark.parametrize(
    "passes",
    [
        "loss.backward()",
        only_long("loss.backward() if run.rank == 1 else run.backward(loss)"),
        "model(x).sum().backward(); run.backward(loss)",
    ],
)
def test_a_backward_of_the_programs_own_is_told_on_several_ranks(passes, tmp_path):
    """The gradients of the ranks' shares would count alike, and their sum would be taken for a mean."""
    body = f"""
model = run.wrap(nn.Linear(1, 1))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
run.keep(model=model, optimizer=optimizer)
for (x,) in run.steps(data):
    loss = model(x).square().mean()
    {passes}
    optimizer.step()
"""
    done = program(tmp_path, body, ranks=2)
    assert done.code == 2
    assert "write run.backward(loss) in its place" in done.message


def test_a_model_that_a_step_uses_without_training_it_is_none_of_that(tmp_path):
    """As the generator of a GAN, in the steps of the discriminator alone."""
    body = """
one, two = run.wrap(nn.Linear(1, 1)), run.wrap(nn.Linear(1, 1))
run.keep(one=one, two=two)
for (x,) in run.steps(data):
    run.backward(two(one(x).detach()).square().mean())
run.finish()
"""
    program(tmp_path, body, ranks=2).ok()


def test_a_backward_of_the_programs_own_is_told_in_a_reproducible_run(tmp_path):
    body = """
model = run.wrap(nn.Linear(1, 1))
run.keep(model=model)
for batch in run.steps(data):
    for (x,) in run.pieces(batch):
        model(x).square().mean().backward()
"""
    head = HEAD.replace("report=False", "report=False, virtual_ranks=2")
    done = execute_forked(["-c", head + body], 1, tmp_path)
    assert done.code == 2
    assert "write run.backward(loss) in its place" in done.message


FORGETS = """
model = run.wrap(nn.Linear(1, 1))
optimizer = torch.optim.SGD(model.parameters(), 0.1)
KEEP
for epoch in run.epochs(2):
    for (x,) in run.steps(data):
        run.backward(model(x).square().mean())
        optimizer.step()
    if epoch == 1 and STOPS:
        raise SystemExit("is stopped")
run.finish()
"""


@pytest.mark.parametrize(
    ("keep", "told"),
    [
        ("", ["the model Linear", "the optimizer SGD"]),
        only_long("run.keep(model=model)", ["the optimizer SGD"]),
        only_long("run.keep(optimizer=optimizer)", ["the model Linear"]),
        ("run.keep(both=nn.ModuleList([model]), optimizer=optimizer)", []),
    ],
)
def test_what_is_trained_but_not_kept_is_told_once(keep, told, tmp_path):
    done = program(tmp_path, FORGETS.replace("KEEP", keep).replace("STOPS", "False")).ok()
    assert [what for what in ("the model Linear", "the optimizer SGD") if what in done.out] == told
    assert done.out.count("run.keep() did not get") == len(told)


def test_optimizers_that_are_made_for_a_moment_are_told_once_and_let_go(tmp_path):
    """As where each step searches for an input by an optimizer of its own."""
    body = """
import gc, weakref
made = weakref.WeakSet()
for (x,) in run.steps(data):
    for _ in range(3):
        z = torch.zeros(1, requires_grad=True)
        inner = torch.optim.Adam([z])
        made.add(inner)
        z.grad = torch.ones(1)
        inner.step()
del inner
gc.collect()
print("left", len(made))
run.finish()
"""
    done = program(tmp_path, body).ok()
    assert done.out.count("run.keep() did not get the optimizer Adam") == 1
    assert "left 0" in done.out.splitlines()


def test_a_figure_that_differs_between_the_ranks_is_told_once(tmp_path):
    """As a sum over the batches of each rank: it would be another number on another number of ranks."""
    body = """
run.keep(model=run.wrap(nn.Linear(1, 1)))
for epoch in run.epochs(2):
    for (x,) in run.steps(data):
        run.log({"train/x": x.mean()})
    of_all = run.mean(x.mean() for (x,) in run.batches(data))
    run.log({"mine": float(run.rank), "same": float("nan"), "val/x": of_all})
run.log({"at the end": run.rank + 1})
run.finish()
"""
    done = program(tmp_path, body, ranks=2).ok()
    told = [line for line in done.out.splitlines() if "got other values" in line]
    assert len(told) == 2, done.out
    assert "run.log() got other values of mine on other ranks" in told[0]
    assert "run.log() got other values of at the end on other ranks" in told[1]
    assert [line["mine"] for line in lines_of(tmp_path)] == [0, 0]


def test_what_cannot_be_kept_is_said_at_once(tmp_path):
    """And not after the first epoch, when it is saved."""
    body = """
refused(lambda: run.keep(**{"../../evil": nn.Linear(1, 1)}))
refused(lambda: run.keep(model=nn.Linear))
refused(lambda: run.keep(number=3))
"""
    done = program(tmp_path, body)
    told = [line.removeprefix("said: ") for line in done.out.splitlines() if line.startswith("said: ")]
    assert told[0].startswith(
        "run.keep() got the name '../../evil', which is to be a part of a file's name"
    )
    assert told[1] == "run.keep(model=...) got the class Linear: give an object of it."
    assert told[2].startswith("run.keep(number=...) got an int, which has no state_dict()")


def test_a_second_loop_over_epochs_goes_on_from_the_first(tmp_path):
    """As for fine-tuning: run.epochs(2) after run.epochs(2) would have none."""
    body = """
for count in (1, 2):
    for epoch in run.epochs(count):
        for (x,) in run.steps(data):
            pass
        run.log({"count": count})
refused(lambda: next(run.epochs(2)))
run.finish()
"""
    told = said_by(program(tmp_path, body))[0]
    assert told.startswith("run.epochs(2) comes after run.epochs(2), and has no epoch left")
    assert [line["count"] for line in lines_of(tmp_path)] == [1, 2]


def test_a_loop_over_epochs_may_be_left_and_begun_again(tmp_path):
    """As where the learning rate is lowered once the loss no longer falls; an iterator may be held, too."""
    body = """
for turn in range(2):
    for epoch in run.epochs(4):
        steps = run.steps(data)
        for (x,) in steps:
            run.log({"turn": turn})
        if turn == 0 and epoch == 1:
            break
run.finish()
"""
    program(tmp_path, body).ok()
    assert [(line["epoch"], line["turn"]) for line in lines_of(tmp_path)] == [
        (1, 0),
        (2, 0),
        (3, 1),
        (4, 1),
    ]
