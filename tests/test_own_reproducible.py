"""Loops of one's own with virtual_ranks: what is refused, and what has the same bits on any ranks.

tests/test_one_path.py compares such a loop with the shipped training, and kills it.
"""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import own_programs
from helpers import execute_forked, only_long
from test_own_loop import SINE, script
from test_own_variations import CODES

# --- the page, and loops of many kinds ---

# The page's program with the loop that the page shows for such a run. Its model has dropout.
OF_THE_PAGE = (
    SINE.replace("seed=1, ", "seed=1, virtual_ranks=4, ")
    .partition("    for inputs, targets in run.steps")[0]
    .replace("epochs(3)", "epochs(1)")
    + "    "
    + script("reproducible.py").rstrip().replace("\n", "\n    ")
    + "\n    model.eval()"
    + SINE.partition("    model.eval()")[2]
)
# Loops of test_own_variations.py, each with an inner loop over the pieces of a step.
IN_PIECES = {
    "stream": (
        CODES["iterable"]
        .replace("for inputs, targets in run.steps(batches):", "for batch in run.steps(batches):")
        .replace(
            """        loss = F.mse_loss(model(inputs), targets)
        optimizer.zero_grad()
        run.backward(loss)
        optimizer.step()
        run.log({"train/loss": loss})""",
            """        for inputs, targets in run.pieces(batch):
            loss = F.mse_loss(model(inputs), targets)
            run.backward(loss)
            run.log({"train/loss": loss})
        optimizer.step()
        optimizer.zero_grad()""",
        )
    ),
    # Both halves go through the pieces, one after the other, and each draws noise of its own. While the
    # generator learns, the critic is frozen.
    "gan": CODES["gan"][: CODES["gan"].index("for epoch in")]
    + """
for epoch in run.epochs(2):
    for batch in run.steps(DataLoader(pairs, 20, shuffle=True)):
        for real, noise in run.pieces(batch):
            fake = generator(noise + torch.randn_like(noise)).detach()
            c_loss = judged(critic(real), 1.0) + judged(critic(fake), 0.0)
            run.backward(c_loss)
            run.log({"train/c_loss": c_loss})
        c_optimizer.step()
        c_optimizer.zero_grad()
        critic.requires_grad_(False)
        for real, noise in run.pieces(batch):
            g_loss = judged(critic(generator(noise + torch.randn_like(noise))), 1.0)
            run.backward(g_loss)
            run.log({"train/g_loss": g_loss})
        critic.requires_grad_(True)
        g_optimizer.step()
        g_optimizer.zero_grad()
run.finish()
""",
    "scaler, average and several steps": CODES["averaged"][: CODES["averaged"].index("for epoch in")]
    .replace("bare = net()", "bare = net().float()")
    .replace("run.keep(", 'scaler = torch.amp.GradScaler("cpu")\nrun.keep(scaler=scaler, ')
    + """
for epoch in run.epochs(2):
    for batch in run.steps(DataLoader(data, 20, shuffle=True), steps_per_save=2):
        for inputs, targets in run.pieces(batch, 2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = F.mse_loss(model(inputs.float()), targets.float())
            run.backward(scaler.scale(loss / 2))
        if run.epoch_step % 2 == 1:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            ema.update_parameters(bare)
            schedule.step()
        run.log({"train/lr": optimizer.param_groups[0]["lr"], "train/drawn": torch.rand(1)})
    optimizer.zero_grad()
run.finish()
""",
    "compiled": CODES["compiled"]
    .replace("for inputs, targets in run.steps", "for batch in run.steps")
    .replace(
        """        loss = F.mse_loss(model(inputs), targets)
        run.backward(loss)
""",
        """        losses = []
        for inputs, targets in run.pieces(batch):
            loss = F.mse_loss(model(inputs), targets)
            run.backward(loss)
            losses.append(loss.detach())
        loss = run.mean(losses)
""",
    ),
    # Its batch is an object that cannot be cut, and in the last step some ranks have no graph.
    "graph": CODES["graph"]
    .replace("return 101", "return 82")
    .replace(
        "    for graphs in run.steps(DataLoader(Clouds(), 10, shuffle=True, collate_fn=collate)):\n",
        "    for batch in run.steps(DataLoader(Clouds(), 10, shuffle=True, collate_fn=collate)):\n",
    )
    .replace(
        """        loss = F.mse_loss(model(graphs), graphs.targets)
        optimizer.zero_grad()
        run.backward(loss)
        optimizer.step()
""",
        """        for graphs in run.pieces(batch):
            loss = F.mse_loss(model(graphs), graphs.targets)
            run.backward(loss)
            run.log({"train/graphs": run.examples})
        optimizer.step()
        optimizer.zero_grad()
        loss = run.step
""",
    ),
}
# An evaluation whose last batch has fewer examples than there are shares, and a metric of torchmetrics.
IN_PIECES["metric"] = (
    IN_PIECES["stream"]
    .replace("run = allranks", "import torchmetrics\nrun = allranks")
    .replace(
        "    with torch.no_grad():\n",
        """    r2 = run.metric(torchmetrics.R2Score())
    with torch.no_grad():
        for inputs, targets in run.batches(data, batch_size=50, shuffle=False):
            r2.update(model(inputs)[:, 0].float(), targets[:, 0].float())
    run.log({"val/r2": r2.compute()})
    with torch.no_grad():
""",
    )
)
PROGRAMS = {
    "the page": (OF_THE_PAGE, "sine"),
    **{
        name: (code.replace('"own", seed=2', '"own", virtual_ranks=4, seed=2'), "own")
        for name, code in IN_PIECES.items()
    },
}


@pytest.mark.parametrize(
    "name", [name if name in ("the page", "gan") else only_long(name) for name in PROGRAMS]
)
def test_a_loop_has_the_same_bits_on_any_number_of_ranks(name, tmp_path):
    code, run = PROGRAMS[name]
    assert "virtual_ranks=4" in code and "run.pieces(batch" in code
    found = []
    for ranks in (1, 2, 4):
        own_programs.started("forked", ranks, tmp_path / str(ranks), code).ok()
        found.append(own_programs.figures(tmp_path / str(ranks) / "runs" / run))
    assert found[1:] == [found[0]] * 2


def test_a_parameter_that_no_share_uses_is_left_alone(tmp_path):
    """Else the optimizer would go on moving it, by its momentum: two heads are trained in turn."""
    code = """
import torch, allranks
from torch import nn
run = allranks.open("own", virtual_ranks=2, seed=1, device="cpu", threads=1, report=False)
heads = run.wrap(nn.ModuleList([nn.Linear(1, 1, bias=False) for _ in range(2)]))
optimizer = torch.optim.SGD(heads.parameters(), lr=0.1, momentum=0.9)
x = torch.arange(1.0, 9.0)[:, None]
for batch in run.steps([x] * 3):
    before = [head.weight.item() for head in heads]
    for inputs in run.pieces(batch):
        run.backward(heads[run.step % 2](inputs).mean())
    assert heads[1 - run.step % 2].weight.grad is None
    assert heads[run.step % 2].weight.grad.item() == 4.5
    optimizer.step()
    optimizer.zero_grad()
    moved = [head.weight.item() != was for head, was in zip(heads, before)]
    assert moved == [run.step % 2 == 0, run.step % 2 == 1], moved
print("compared")
run.finish()
"""
    assert execute_forked(["-c", code], 2, tmp_path).ok().out.count("compared") == 2


def test_rank_0s_weights_are_those_of_all_ranks(tmp_path):
    """As DDP sees to it in any other run: a program may load weights on rank 0 only."""
    code = """
import torch, allranks
from torch import nn
run = allranks.open("own", virtual_ranks=2, device="cpu", threads=1, report=False)
bare = nn.Linear(1, 1)
bare.weight.data.fill_(run.rank + 1)
bare.register_buffer("scale", torch.tensor(run.rank + 5))
model = run.wrap(bare)
print("has", model.weight.item(), model.scale.item())
run.finish()
"""
    assert execute_forked(["-c", code], 2, tmp_path).ok().out.count("has 1.0 5") == 2


# --- what is wrong ---

HEAD = """
import torch, allranks
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
run = allranks.open("work", virtual_ranks=4, device="cpu", threads=1, report=False)
x = torch.arange(32.0)[:, None]
data = DataLoader(TensorDataset(x, x.sin()), 8)
"""

# What a program may write in a step, and what it is told.
WITHOUT = "A batch of run.steps() was used without run.pieces()."
OF_EACH_SHARE = (
    "run.mean() takes one value for each of this rank's 2 shares of the step in a run with virtual_ranks"
)
MISTAKES = {
    "inputs, targets = batch": WITHOUT,
    "batch[0]": WITHOUT,
    "batch.inputs": WITHOUT,
    "len(batch)": WITHOUT,
    "model(batch)": WITHOUT,
    "run.backward(model(x).mean())": "run.backward() is called in a step, but not in a loop over",
    "list(run.pieces((x, x)))": "run.pieces() got a tuple (float32 [32, 1], float32 [32, 1]). In a run",
    "run.mean([1.0])": f"{OF_EACH_SHARE}, but got 1:",
    "run.mean([1.0, 2.0, 3.0])": f"{OF_EACH_SHARE}, but got more:",
}
# The same in the loop over the pieces. It is then left, so each mistake has a step of its own.
MISTAKES_IN_PIECES = {
    "run.mean([1.0])": "run.mean() is called within a loop over run.pieces().",
    "run.means([{'a': 1.0}])": "run.means() is called within a loop over run.pieces().",
    "optimizer.step()": "The step of an optimizer is called within a loop over run.pieces().",
    "list(run.batches(data))": "run.batches() is called within a loop over run.pieces().",
    "list(run.pieces(batch))": "run.pieces() is called within a loop over run.pieces().",
}


def test_what_would_depend_on_the_number_of_ranks_is_refused(tmp_path):
    code = f"""{HEAD}
model = run.wrap(nn.Linear(1, 1))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
run.keep(model=model, optimizer=optimizer)

def told(statement):
    try:
        exec(statement, globals())
    except allranks.base.errors.UserError as error:
        print(run.rank, statement, "->", error)

for batch in run.steps(data):
    for statement in {list(MISTAKES)!r}:
        told(statement)
    for inputs, targets in run.pieces(batch):
        for statement in {list(MISTAKES_IN_PIECES)!r}:
            told(statement)
    assert model.weight.grad is None  # no piece had a backward pass
    assert run.mean([1.0, 3.0]) == 2.0
run.finish()
"""
    done = execute_forked(["-c", code], 2, tmp_path).ok()
    for statement, said in {**MISTAKES, **MISTAKES_IN_PIECES}.items():
        for rank in range(2):
            assert f"{rank} {statement} -> {said}" in done.out, statement


WRONG = {
    "left pieces": (
        "model = run.wrap(nn.Linear(1, 1))",
        "        break\n",
        r"A loop over run.pieces\(\) was left by `break`.",
    ),
    "left both loops": (
        "model = run.wrap(nn.Linear(1, 1))",
        "        break\n    break\n",
        r"A loop over run.pieces\(\) was left by `break`.",
    ),
    "batch norm": (
        "model = run.wrap(nn.Sequential(nn.Linear(1, 4), nn.BatchNorm1d(4)))",
        "",
        "virtual_ranks=4 does not go with BatchNorm, whose figures depend on how a batch is cut",
    ),
    "a buffer that changes in a second loop": (
        "model = run.wrap(nn.Linear(1, 4))\nsecond = run.wrap(nn.utils.spectral_norm(nn.Linear(1, 4)))",
        "    for inputs, targets in run.pieces(batch):\n        run.backward(second(inputs).mean())\n",
        "virtual_ranks=4 does not go with Linear, which changes its buffer weight_u, weight_v in training",
    ),
    "a buffer that changes": (
        "model = run.wrap(nn.utils.spectral_norm(nn.Linear(1, 4)))",
        "",
        "virtual_ranks=4 does not go with Linear, which changes its buffer weight_u, weight_v in training: "
        r".*or leave virtual_ranks out\.",
    ),
}


@pytest.mark.parametrize(
    "what",
    [case if case in ("left both loops", "a buffer that changes") else only_long(case) for case in WRONG],
)
def test_what_spoils_equal_bits_is_said_once_on_two_ranks(what, tmp_path):
    model, in_the_loop, message = WRONG[what]
    code = f"""{HEAD}
{model}
for batch in run.steps(data):
    for inputs, targets in run.pieces(batch):
        run.backward(model(inputs).mean())
{in_the_loop}
run.finish()
"""
    done = execute_forked(["-c", code], 2, tmp_path)
    assert done.code == 2, done.err
    assert len(re.findall(message, done.err)) == 1, done.err
    assert "Traceback" not in done.err


OPENED = 'import allranks\nrun = allranks.open("work", device="cpu", report=False, {})\nrun.finish()\n'


@pytest.mark.parametrize(
    ("arguments", "ranks", "said"),
    [
        ("virtual_ranks=3", 1, "trainer.virtual_ranks=3"),
        ("virtual_ranks=1", 2, "virtual_ranks=1: start a number of ranks that divides it, not 2."),
        ("virtual_ranks=4, sharding={'kind': 'fsdp'}", 1, "virtual_ranks=4 does not go with sharding=fsdp"),
    ],
)
def test_a_number_of_virtual_ranks_that_cannot_be_is_refused(arguments, ranks, said, tmp_path):
    done = execute_forked(["-c", OPENED.format(arguments)], ranks, tmp_path)
    assert done.code == 2
    assert done.err.count(said) == 1, done.err


def test_another_number_of_virtual_ranks_is_another_run(tmp_path: Path):
    execute_forked(["-c", OPENED.format("virtual_ranks=2")], 1, tmp_path).ok()
    for other in ("virtual_ranks=4", ""):
        done = execute_forked(["-c", OPENED.format(other)], 1, tmp_path)
        assert done.code == 2
        assert "trainer.virtual_ranks" in done.err or "trainer.reproducible" in done.err
