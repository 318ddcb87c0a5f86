"""Loops of the user's own, of many kinds: the same curve on any number of ranks, and bits after a kill."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import own_programs
from helpers import execute_forked, only_long
from own_programs import started

# What all programs begin with. Told so by the environment, a rank gets a signal before a step.
HEAD = """
import os, signal
from typing import NamedTuple
import torch
import allranks
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

def disturb(run):
    step, _, what = os.environ.get("DISTURB", ":").partition(":")
    if step == str(run.step) and run.rank == (0 if what == "SIGTERM" else run.world_size - 1):
        os.kill(os.getpid(), getattr(signal, what))

def net(inputs=1, outputs=1):
    return nn.Sequential(nn.Linear(inputs, 16), nn.Tanh(), nn.Linear(16, outputs)).double()

run = allranks.open(
    "own", seed=2, device="cpu", threads=1, report=False, checkpoint={"every_steps": 4, "keep": 100}
)
x = torch.linspace(-3, 3, 203).double()[:, None]
y = torch.sin(2 * x)
data = TensorDataset(x, y)
"""

# A loop for the programs that differ in where their batches come from.
LOOP = """
model = run.wrap(net())
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
run.keep(model=model, optimizer=optimizer)
for epoch in run.epochs(2):
    for inputs, targets in run.steps(batches):
        disturb(run)
        loss = F.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        run.backward(loss)
        optimizer.step()
        run.log({"train/loss": loss})
    with torch.no_grad():
        losses = (F.mse_loss(model(a), b) for a, b in run.batches(DataLoader(data, 50)))
        run.log({"val/loss": run.mean(losses)})
run.finish()
"""

SOURCES = {
    "loader": "batches = DataLoader(data, 20, shuffle=True)",
    "workers": "batches = DataLoader(data, 20, shuffle=True, num_workers=2)",
    "generator": "batches = DataLoader(data, 20, shuffle=True, generator=torch.Generator().manual_seed(5))",
    "weighted": """
order = torch.utils.data.WeightedRandomSampler(torch.rand(203), 203)
batches = DataLoader(data, batch_sampler=torch.utils.data.BatchSampler(order, 20, False))
""",
    # A sampler whose numbers are NumPy's, and that draws each batch when it is asked for; a Dataset that
    # draws at random.
    "drawing": """
import numpy as np
class Drawing:
    def __iter__(self):
        for _ in range(11):
            yield np.random.choice(203, 20, replace=False)
class Noisy(Dataset):
    def __len__(self):
        return 203
    def __getitem__(self, number):
        return x[number] + 0.1 * torch.randn(1), y[number]
batches = DataLoader(Noisy(), batch_sampler=Drawing())
""",
    "collate": """
def collate(examples):
    return tuple(torch.stack(parts) for parts in zip(*examples))
batches = run.batches(data, batch_size=20, collate=collate)
""",
    "list": "batches = [(x[i::11], y[i::11]) for i in range(11)]",
    "iterable": """
class Stream(IterableDataset):
    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        first, stride = (info.id, info.num_workers) if info else (0, 1)
        for number in range(first, 203, stride):
            yield x[number] + 0.1 * torch.randn(1), y[number]
batches = DataLoader(Stream(), 20)
""",
    "iterable in workers": """
class Stream(IterableDataset):
    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        for number in range(info.id, 203, info.num_workers):
            yield x[number] + 0.1 * torch.randn(1), y[number]
batches = DataLoader(Stream(), 20, num_workers=2)
""",
    "stateful": """
from torchdata.stateful_dataloader import StatefulDataLoader
batches = StatefulDataLoader(data, 20, shuffle=True)
""",
    "stateful stream": """
from torchdata.stateful_dataloader import StatefulDataLoader
class Stream(IterableDataset):
    at = 0
    def __iter__(self):
        while self.at < 203:
            self.at += 1
            yield x[self.at - 1] + 0.1 * torch.randn(1), y[self.at - 1]
        self.at = 0
    def state_dict(self):
        return {"at": self.at}
    def load_state_dict(self, state):
        self.at = state["at"]
batches = StatefulDataLoader(Stream(), 20)
""",
    "stateful stream in workers": """
from torchdata.stateful_dataloader import StatefulDataLoader
class Stream(IterableDataset):
    at = 0
    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        while self.at < 100:
            self.at += 1
            place = (2 * self.at + info.id) % 203
            yield x[place], y[place]
        self.at = 0
    def state_dict(self):
        return {"at": self.at}
    def load_state_dict(self, state):
        self.at = state["at"]
batches = StatefulDataLoader(Stream(), 20, num_workers=2)
""",
    # It does not begin anew with an epoch, and its state says where it is.
    "endless": """
class Endless:
    at = 0
    def __iter__(self):
        while True:
            rows = torch.arange(self.at, self.at + 20) % 203
            self.at += 20
            yield x[rows], y[rows]
            if self.at % 180 == 0:
                return
    def state_dict(self):
        return {"at": self.at}
    def load_state_dict(self, state):
        self.at = state["at"]
batches = Endless()
""",
}

PROGRAMS = {
    "gan": """
generator, critic = run.wrap(net(4, 2)), run.wrap(net(2, 1))
g_optimizer = torch.optim.Adam(generator.parameters(), lr=2e-3)
c_optimizer = torch.optim.Adam(critic.parameters(), lr=2e-3)
run.keep(generator=generator, critic=critic, g_optimizer=g_optimizer, c_optimizer=c_optimizer)
pairs = TensorDataset(torch.randn(203, 2).double() + 2, torch.randn(203, 4).double())
def judged(logits, real):
    return F.binary_cross_entropy_with_logits(logits, torch.full_like(logits, real))
for epoch in run.epochs(2):
    for real, noise in run.steps(DataLoader(pairs, 20, shuffle=True)):
        disturb(run)
        fake = generator(noise)
        c_loss = judged(critic(real), 1.0) + judged(critic(fake.detach()), 0.0)
        c_optimizer.zero_grad()
        run.backward(c_loss)
        c_optimizer.step()
        g_loss = judged(critic(fake), 1.0)
        g_optimizer.zero_grad()
        run.backward(g_loss)
        g_optimizer.step()
        run.log({"train/c_loss": c_loss, "train/g_loss": g_loss})
run.finish()
""",
    "language model": """
text = "the quick brown fox jumps over the lazy dog. pack my box with five dozen liquor jugs. " * 12
letters = sorted(set(text))
class Windows(Dataset):
    def __len__(self):
        return (len(text) - 1) // 8
    def __getitem__(self, number):
        codes = torch.tensor([letters.index(letter) for letter in text[number * 8 : number * 8 + 9]])
        return {"input": codes[:-1], "target": codes[1:]}
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(len(letters), 16)
        self.recurrent = nn.GRU(16, 16, batch_first=True)
        self.head = nn.Linear(16, len(letters))
    def forward(self, codes):
        return self.head(self.recurrent(self.embedding(codes))[0])
model = run.wrap(Model())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
scaler = torch.amp.GradScaler("cpu")
run.keep(model=model, optimizer=optimizer, scaler=scaler)
for epoch in run.epochs(2):
    for batch in run.steps(DataLoader(Windows(), 12, shuffle=True)):
        disturb(run)
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(model(batch["input"]).flatten(0, 1), batch["target"].flatten())
        optimizer.zero_grad()
        run.backward(scaler.scale(loss))
        scaler.step(optimizer)
        scaler.update()
        run.log({"train/loss": loss})
run.finish()
""",
    "pieces": """
model = run.wrap(net())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run.keep(model=model, optimizer=optimizer)
for epoch in run.epochs(2):
    for batch in run.steps(DataLoader(data, 20, shuffle=True)):
        disturb(run)
        for inputs, targets in run.pieces(batch, 3):
            loss = F.mse_loss(model(inputs), targets)
            run.backward(loss)
            run.log({"train/loss": loss})
        optimizer.step()
        optimizer.zero_grad()
run.finish()
""",
    "several steps": """
model = run.wrap(net())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run.keep(model=model, optimizer=optimizer)
for epoch in run.epochs(2):
    for inputs, targets in run.steps(DataLoader(data, 20, shuffle=True), steps_per_save=3):
        disturb(run)
        loss = F.mse_loss(model(inputs), targets)
        run.backward(loss / 3)
        run.log({"train/loss": loss})
        if run.epoch_step % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    optimizer.zero_grad()  # of the two steps that are left
run.finish()
""",
    "averaged": """
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
bare = net()
model = run.wrap(bare)
ema = AveragedModel(bare, multi_avg_fn=get_ema_multi_avg_fn(0.9))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=22)
run.keep(model=model, ema=ema, optimizer=optimizer, schedule=schedule)
for epoch in run.epochs(2):
    for inputs, targets in run.steps(DataLoader(data, 20, shuffle=True)):
        disturb(run)
        if run.step % 5 == 2:
            continue
        loss = F.mse_loss(model(inputs), targets)
        run.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        ema.update_parameters(bare)
        schedule.step()
        run.log({"train/loss": loss})
    noise = 0.1 * torch.randn(1).double()  # the same on all ranks
    with torch.no_grad():
        val = run.batches(DataLoader(data, 50))
        run.log({"val/loss": run.mean(F.mse_loss(model(a + noise), b) for a, b in val)})
        run.log({"val/ema_loss": run.mean(F.mse_loss(ema(a), b) for a, b in val)})
run.finish()
""",
    "steps only": """
class Batch(NamedTuple):
    inputs: torch.Tensor
    targets: torch.Tensor
def endless():
    while True:
        inputs = torch.randn(21, 1).double()
        yield Batch(inputs, inputs ** 2)
model = run.wrap(net())
optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
run.keep(model=model, optimizer=optimizer)
for batch in run.steps(endless()):
    disturb(run)
    loss = F.mse_loss(model(batch.inputs), batch.targets)
    optimizer.zero_grad()
    run.backward(loss)
    optimizer.step()
    run.log({"train/loss": loss})
    if run.step == 21:
        break
run.finish()
""",
    "graph": """
class Graphs:
    def __init__(self, nodes, owner, targets):
        self.nodes, self.owner, self.targets = nodes, owner, targets
    def to(self, device):
        return Graphs(self.nodes.to(device), self.owner.to(device), self.targets.to(device))
class Clouds(Dataset):
    def __len__(self):
        return 101
    def __getitem__(self, number):
        nodes = torch.randn(3 + number % 5, 4).double()
        return nodes, nodes.pow(2).sum()
def collate(clouds):
    owner = torch.cat([torch.full((len(nodes),), i) for i, (nodes, _) in enumerate(clouds)])
    return Graphs(torch.cat([nodes for nodes, _ in clouds]), owner, torch.stack([t for _, t in clouds]))
class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.of_node = net(4, 1)
    def forward(self, graphs):
        sums = torch.zeros(len(graphs.targets), 1, dtype=torch.float64)
        return sums.index_add(0, graphs.owner, self.of_node(graphs.nodes))[:, 0]
model = run.wrap(Model())
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
run.keep(model=model, optimizer=optimizer)
for epoch in run.epochs(2):
    for graphs in run.steps(DataLoader(Clouds(), 10, shuffle=True, collate_fn=collate)):
        disturb(run)
        loss = F.mse_loss(model(graphs), graphs.targets)
        optimizer.zero_grad()
        run.backward(loss)
        optimizer.step()
        run.log({"train/loss": loss})
run.finish()
""",
    "compiled": """
bare = net()
model = run.wrap(torch.compile(bare, backend="aot_eager"))
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
run.keep(model=model, optimizer=optimizer)
for epoch in run.epochs(2):
    for inputs, targets in run.steps(DataLoader(data, 20, shuffle=True)):
        disturb(run)
        loss = F.mse_loss(model(inputs), targets)
        run.backward(loss)
        optimizer.step()
        optimizer.zero_grad()
        run.log({"train/loss": loss})
run.finish()
""",
}
CODES = {
    **{name: HEAD + source + LOOP for name, source in SOURCES.items()},
    **{name: HEAD + program for name, program in PROGRAMS.items()},
}
# Half-precision numbers are rounded otherwise where a batch is cut into other shares.
TOLERANCES = {"language model": 1e-3}


def figures(folder: Path) -> tuple[list[dict[str, float]], str]:
    return own_programs.figures(folder / "runs/own")


@pytest.mark.parametrize("name", [name if name == "drawing" else only_long(name) for name in CODES])
def test_any_loop_has_the_same_curve_on_any_number_of_ranks_and_the_same_bits_after_a_kill(name, tmp_path):
    """The bits are those of an undisturbed run of as many ranks."""
    code = CODES[name]
    started("forked", 1, tmp_path / "1", code).ok()
    alone, _ = figures(tmp_path / "1")
    assert len(alone) >= 1
    started("forked", 3, tmp_path / "3", code).ok()
    together, _ = figures(tmp_path / "3")
    for mine, theirs in zip(alone, together, strict=True):
        assert theirs == pytest.approx(mine, rel=TOLERANCES.get(name, 1e-9))
    # The shares of three ranks are uneven: what holds for them holds for one and for two.
    cut = tmp_path / "cut"
    assert started("forked", 3, cut, code, "6:SIGKILL").code not in (0, 85)
    stopped = started("forked", 3, cut, code, "13:SIGTERM")
    assert stopped.code == 85, stopped.err
    started("forked", 3, cut, code).ok()
    assert figures(cut) == figures(tmp_path / "3")


def test_a_gan_computes_what_the_plain_script_computes(tmp_path):
    """The plain script is the other one without allranks. Both go through the data in order."""
    gan = (
        CODES["gan"]
        .replace(", shuffle=True", "")
        .replace("\ngenerator,", "\ntorch.manual_seed(1)\ngenerator,")
    )
    plain = gan
    for pattern, instead in {
        r"run = allranks.open\(.*?\n\)": "",
        r"import allranks\n": "",
        r"run\.wrap\((net\(.*?\))\)": r"\1",
        r"run\.keep\(.*?\)\n": "",
        r"run\.epochs": "range",
        r"run\.steps\((.*)\):": r"\1:",
        r" +disturb\(run\)\n": "",
        r"run\.backward\((\w+)\)": r"\1.backward()",
        r"run\.log\(.*?\)": "print(epoch, len(real), float(c_loss), float(g_loss))",
        r"run\.finish\(\)": "",
    }.items():
        plain = re.sub(pattern, instead, plain, flags=re.S if "open" in pattern else 0)
    assert "run." not in plain.replace("def disturb(run)", "").split("x = torch")[1]
    done = execute_forked(["-c", plain], 1, tmp_path).ok()
    rows = [[float(word) for word in line.split()] for line in done.out.splitlines()]
    started("forked", 3, tmp_path, gan).ok()
    for epoch, line in enumerate(figures(tmp_path)[0]):
        steps = [row[1:] for row in rows if row[0] == epoch]
        assert len(steps) == 11
        for column, name in ((1, "train/c_loss"), (2, "train/g_loss")):
            mean = sum(step[0] * step[column] for step in steps) / 203
            assert line[name] == pytest.approx(mean, rel=1e-9)


# --- what is wrong ---

PLAIN = CODES["loader"]
WRONG = {
    "other names": (
        '{"train/loss": loss}',
        '{f"train/loss{run.rank}": loss}',
        r"run.log\(\) within run.steps\(\) has got other names on other ranks \(here train/loss0\)",
    ),
    "other batches": (
        "data, 20, shuffle=True",
        "data, 20, sampler=torch.randperm(203, generator=torch.Generator().manual_seed(run.rank)).tolist()",
        r"run.steps\(\) has got other batches on other ranks",
    ),
    "other batches of a stream": (
        "batches = DataLoader(data, 20, shuffle=True)",
        "batches = [(x[i + run.rank :: 11], y[i + run.rank :: 11]) for i in range(8)]",
        r"run.steps\(\) has got other batches on other ranks",
    ),
    "not to be cut": (
        "batches = DataLoader(data, 20, shuffle=True)",
        "batches = [(x[:20], y[:21])] * 3",
        r"A part of the batch, float64 \[21, 1\], does not have one row for each of the 20 examples",
    ),
    "no examples": (
        "batches = DataLoader(data, 20, shuffle=True)",
        "batches = [object()] * 3",
        "How many examples a batch has cannot be told from an object",
    ),
    "open twice": ("x = torch", 'allranks.open("second")\nx = torch', "the run runs/own is still open"),
    "next": (
        "        disturb(run)",
        "        others = iter(run.batches(data, batch_size=20)); next(others)",
        r"has taken a batch of run.batches\(\) by next\(\)",
    ),
    "names of means": (
        "run.mean(losses)",
        'run.means({f"a{run.rank}": each} for each in losses)["a0"]',
        r"run.means\(\) has got other names, or no values, on other ranks \(here a0\)",
    ),
    "list": ("run.mean(losses)", "run.mean(list(losses))", r"run.mean\(\) takes its values one by one"),
}  # fmt: skip


@pytest.mark.parametrize(
    "what", [case if case in ("other names", "next") else only_long(case) for case in WRONG]
)
def test_what_is_wrong_is_said_once_on_two_ranks_and_nothing_is_lost(what, tmp_path):
    before, after, message = WRONG[what]
    assert before in PLAIN
    done = started("forked", 2, tmp_path, PLAIN.replace(before, after, 1))
    assert done.code == 2, done.err
    assert len([line for line in done.messages if re.search(message, line)]) == 1, done.err
    assert "Traceback" not in done.err
    started("forked", 2, tmp_path, PLAIN).ok()


def test_a_sampler_that_draws_another_order_in_each_process_is_noticed_where_a_run_goes_on(tmp_path):
    """All ranks agree on the order, which is not that of the first start."""
    code = PLAIN.replace(
        "data, 20, shuffle=True",
        "data, 20, sampler=torch.randperm(203, generator=torch.Generator().manual_seed(SEED)).tolist()",
    )
    stopped = started("forked", 1, tmp_path, code.replace("SEED", "1"), "6:SIGTERM")
    assert stopped.code == 85, stopped.err
    other = started("forked", 1, tmp_path, code.replace("SEED", "2"))
    assert other.code == 2
    assert "come in another order than before the run was interrupted" in other.message
    started("forked", 1, tmp_path, code.replace("SEED", "1")).ok()


def test_an_epoch_that_was_shuffled_in_another_way_is_not_gone_on_with(tmp_path):
    """An older version gave a Dataset to torch's own sampler, whose order is another one."""
    older = PLAIN.replace("run.steps(batches)", "run.steps(DataLoader(data, 20, shuffle=True))")
    newer = PLAIN.replace("run.steps(batches)", "run.steps(run.batches(data, batch_size=20))")
    stopped = started("forked", 1, tmp_path, older, "6:SIGTERM")
    assert stopped.code == 85, stopped.err
    refused = started("forked", 1, tmp_path, newer)
    assert refused.code == 2
    assert "The examples of the TensorDataset come in another order than before" in refused.message
    assert "older version of allranks" in refused.message
    started("forked", 1, tmp_path, older).ok()


def test_break_ends_the_steps_of_an_epoch_and_what_is_logged_then_is_the_epochs(tmp_path):
    code = PLAIN.replace(
        '        run.log({"train/loss": loss})\n',
        '        run.log({"train/loss": loss})\n        if run.epoch_step == 4: break\n',
    ).replace('run.log({"val/loss": ', 'run.log({"val/inputs": len(x), "val/loss": ')
    started("forked", 2, tmp_path, code).ok()
    lines, _ = figures(tmp_path)
    assert [line["step"] for line in lines] == [5, 10]
    assert [line["val/inputs"] for line in lines] == [203, 203]


@pytest.mark.parametrize("ranks", [1, only_long(3)])
def test_several_means_in_one_pass_are_those_of_several_passes(ranks, tmp_path):
    single = """
        def of(figure):
            return run.mean(figure(model(a), b) for a, b in run.batches(DataLoader(data, 50)))
        run.log({"val/loss": of(F.mse_loss), "val/mae": of(F.l1_loss)})
"""
    together = """
        def figures(a, b):
            outputs = model(a)
            return {"val/loss": F.mse_loss(outputs, b), "val/mae": F.l1_loss(outputs, b)}
        run.log(run.means(figures(a, b) for a, b in run.batches(DataLoader(data, 50))))
"""
    start = PLAIN.index("        losses = (")
    end = PLAIN.index("run.finish()")
    found = []
    for name, evaluation in (("single", single), ("together", together)):
        code = PLAIN[:start] + evaluation.lstrip("\n") + PLAIN[end:]
        started("forked", ranks, tmp_path / name, code).ok()
        found.append(figures(tmp_path / name))
    assert found[0] == found[1]
    assert "val/mae" in found[0][0][0]


# A long evaluation, in which the last rank gets a signal. The schedule steps after it, or before it.
EVALUATED = """
import time
model = run.wrap(net())
optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
run.keep(model=model, optimizer=optimizer, schedule=schedule)
def losses():
    for number, (a, b) in enumerate(run.batches(DataLoader(data, 3))):
        if os.environ.get("DISTURB") == f"{run.epoch}:SIGTERM":
            time.sleep(0.02)
            if number == 3 and run.rank == run.world_size - 1:
                os.kill(os.getpid(), signal.SIGTERM)
        yield F.mse_loss(model(a), b)
    print("evaluated")
for epoch in run.epochs(2):
    for inputs, targets in run.steps(DataLoader(data, 20, shuffle=True)):
        run.backward(F.mse_loss(model(inputs), targets))
        optimizer.step()
        optimizer.zero_grad()
    # before
    with torch.no_grad():
        run.log({"val/loss": run.mean(losses())})
    schedule.step()
run.finish()
"""


@pytest.mark.parametrize("ranks", [1, only_long(3)])
@pytest.mark.parametrize("is_first", [False, True])
def test_a_stop_does_not_wait_for_the_end_of_an_evaluation_unless_that_would_change_the_run(
    ranks, is_first, tmp_path
):
    code = HEAD + EVALUATED
    if is_first:
        code = code.replace("    schedule.step()\n", "").replace("    # before", "    schedule.step()")
    started("forked", ranks, tmp_path / "whole", code).ok()
    stopped = started("forked", ranks, tmp_path / "cut", code, "0:SIGTERM")
    assert stopped.code == 85, stopped.err
    assert ("evaluated" in stopped.out) == is_first
    started("forked", ranks, tmp_path / "cut", code).ok()
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


def test_a_state_that_cannot_be_saved_is_told_by_name_and_the_checkpoints_before_are_kept(tmp_path):
    odd = """
class Odd:
    def state_dict(self):
        return {"seen": {1, 2} if run.step > 6 else 0}
    def load_state_dict(self, state):
        pass
"""
    code = PLAIN.replace("model = run.wrap", odd + "model = run.wrap").replace("keep(", "keep(odd=Odd(), ")
    done = started("forked", 2, tmp_path, code)
    assert done.code not in (0, 85)
    said = "odd.seen is a set, but a checkpoint holds only numbers, texts and tensors"
    assert (done.out + done.err).count(said) == 1
    saved = sorted(path.name for path in (tmp_path / "runs/own/checkpoints").glob("step-*"))
    assert saved == ["step-000004"]


@pytest.mark.parametrize("name", [only_long("workers"), only_long("iterable in workers")])
def test_a_signal_that_reaches_the_processes_that_read_does_not_end_them(name, tmp_path):
    """As a scheduler sends its signals to all processes of a job."""
    to_all = """
        if run.step == 6 and "DISTURB" in os.environ:
            import multiprocessing
            for process in [*multiprocessing.active_children(), multiprocessing.current_process()]:
                os.kill(process.pid, signal.SIGTERM)
"""
    code = CODES[name].replace("        disturb(run)\n", to_all)
    started("forked", 1, tmp_path / "whole", code).ok()
    stopped = started("forked", 1, tmp_path / "cut", code, "6:all")
    assert stopped.code == 85, stopped.err
    started("forked", 1, tmp_path / "cut", code).ok()
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


# test_own_loop.py has all launchers with all numbers of ranks.
LAUNCHED = [
    only_long("gan", "launch", 2),
    only_long("stateful stream in workers", "mpiexec", 2),
]


@pytest.mark.parametrize(("name", "kind", "ranks"), LAUNCHED)
def test_they_do_under_any_launcher(name, kind, ranks, tmp_path):
    code = CODES[name]
    started(kind, ranks, tmp_path / "whole", code).ok()
    assert started(kind, ranks, tmp_path / "cut", code, "5:SIGKILL").code not in (0, 85)
    assert started(kind, ranks, tmp_path / "cut", code, "12:SIGTERM").code != 0
    started(kind, ranks, tmp_path / "cut", code).ok()
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")
