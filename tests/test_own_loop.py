"""A loop of the user's own: the script of docs/your-own-loop.md, before and after, disturbed and not."""

from __future__ import annotations

import difflib
import json
import os
import random
import re
import secrets
import shutil
import subprocess
import textwrap
from pathlib import Path

import pytest

import own_programs
from allranks.run import checkpoint
from helpers import FSDP, PYTHON, Done, execute, execute_forked, forked_python, launcher, only_long
from own_programs import script

# The page's program in less time. Told so by the environment, the last rank kills itself before a step, or
# rank 0 gets a signal there.
SINE = (
    script("sine.py")
    .replace(
        'allranks.open("sine", seed=1)',
        'allranks.open("sine", seed=1, device="cpu", threads=1, report=False, '
        'checkpoint={"every_steps": 3, "keep": 100})',
    )
    .replace("run.epochs(10)", "run.epochs(3)")
    .replace(
        "        run.backward(loss)",
        '        disturbed(run)\n        run.log({"train/loss": loss})\n        run.backward(loss)',
    )
    .replace(
        "import allranks ",
        "import os, signal, sys\n"
        "def disturbed(run):\n"
        "    step, _, what = os.environ.get('DISTURB', ':').partition(':')\n"
        "    if step == str(run.step) and run.rank == (0 if what == 'SIGTERM' else run.world_size - 1):\n"
        "        if what == 'error': raise ValueError('a bug of my own')\n"
        "        os.kill(os.getpid(), getattr(signal, what))\n"
        "import allranks ",
    )
)


def started(kind: str, ranks: int, folder: Path, disturb: str = "", code: str = SINE, **more: str) -> Done:
    return own_programs.started(kind, ranks, folder, code, disturb, **more)


def figures(folder: Path) -> tuple[list[dict[str, float]], str]:
    return own_programs.figures(folder / "runs/sine")


# --- before and after ---


def test_the_plain_script_becomes_a_run_by_ten_lines():
    before, after = script("plain.py").splitlines(), script("sine.py").splitlines()
    changed = [line for line in difflib.ndiff(before, after) if line.startswith("+ ") and line.strip("+ ")]
    assert len(changed) <= 10, "\n".join(changed)
    assert len(before) >= 25


def test_a_lone_process_computes_what_the_plain_script_computes(tmp_path):
    """But for dropout and the order of the examples, which are left out: these allranks draws anew."""

    def simple(code: str) -> str:
        return code.replace("nn.Dropout(0.1), ", "").replace("shuffle=True", "shuffle=False")

    plain = execute_forked(["-c", simple(script("plain.py"))], 1, tmp_path).ok()
    losses = [float(line.split()[1]) for line in plain.out.splitlines()]
    # The seeds differ, and with them noise and first weights: the plain script's is taken here, too.
    seeded = simple(SINE).replace("x = torch.linspace", "torch.manual_seed(1)\nx = torch.linspace", 1)
    started("forked", 1, tmp_path, code=seeded).ok()
    ours = [line["val/loss"] for line in figures(tmp_path)[0]]
    assert ours == pytest.approx(losses[:3], rel=1e-6)


# The page's loop over the batches, without what its ranks draw at random.
STEADY = (
    SINE.replace("nn.Dropout(0.1), ", "")
    .replace("shuffle=True", "shuffle=False")
    .replace("epochs(3)", "epochs(1)")
)
# The same with torch's own words where the page has run.take_step().
CLIPPED = STEADY.replace(
    "optimizer.step()", "nn.utils.clip_grad_norm_(model.parameters(), 1.0); optimizer.step()"
)


def with_loop(name: str) -> str:
    """The page's program with another loop over the steps, which the page shows under this name."""
    before, after = "    model.train()\n", "    model.eval()\n"
    head, _, rest = STEADY.partition(before)
    return head + before + textwrap.indent(script(name), "    ") + after + rest.partition(after)[2]


@pytest.mark.parametrize(
    ("code", "same_as"),
    [
        (with_loop("pieces.py"), STEADY),
        only_long(with_loop("groups.py"), STEADY.replace("batch_size=250", "batch_size=1000")),
        only_long(with_loop("clipped.py"), CLIPPED),
    ],
    ids=["pieces", "groups", "clipped"],
)
def test_other_loops_over_the_steps_come_to_the_losses_of_the_usual_one(tmp_path, code, same_as):
    losses = []
    for number, each in enumerate((code, same_as)):
        (tmp_path / str(number)).mkdir()
        started("forked", 1, tmp_path / str(number), code=each).ok()
        losses += [line["val/loss"] for line in figures(tmp_path / str(number))[0]]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


FOLDS_OF_THE_PAGE = """
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset
import allranks

def train(run, fold):
    x = torch.randn(120, 4)
    examples = TensorDataset(x, (x[:, 0] > 0).long())
    train_batches = DataLoader(torch.utils.data.Subset(examples, range(100)), batch_size=20)
    val_batches = DataLoader(torch.utils.data.Subset(examples, range(100, 120)), batch_size=7)
    model = run.wrap(nn.Linear(4, 2))
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    run.keep(model=model, optimizer=optimizer)
    for epoch in run.epochs(1):
        for inputs, labels in run.steps(train_batches):
            run.backward(F.cross_entropy(model(inputs), labels))
            optimizer.step()
            optimizer.zero_grad()
{figures}
def test(run, fold):
    return fold / 4

{folds}
if run.rank == 0:
    print(losses)
"""


@pytest.mark.long
def test_folds_and_several_figures_of_one_evaluation_as_the_page_shows_them(tmp_path):
    few = "several=True, device='cpu', threads=1, report=False, checkpoint={'every_epochs': None}"
    code = FOLDS_OF_THE_PAGE.format(
        figures=textwrap.indent(script("figures.py"), 8 * " "),
        folds=script("folds.py").replace("several=True", few),
    )
    for _ in range(2):  # the second time all of them are finished
        done = execute_forked(["-c", code], 2, tmp_path).ok()
        assert done.out.splitlines()[-1] == "[0.0, 0.25, 0.5, 0.75, 1.0]"
    [line] = own_programs.figures(tmp_path / "runs/fold-4")[0]
    assert line["val/accuracy"] >= 0.7
    assert 0 < line["val/loss"] < 0.7


def test_importing_allranks_imports_no_torch():
    code = "import sys, allranks; allranks.__version__; assert 'torch' not in sys.modules; allranks.nothing"
    done = subprocess.run([PYTHON, "-c", code], capture_output=True, text=True, check=False)
    assert "module 'allranks' has no attribute 'nothing'" in done.stderr


# --- disturbed ---

SEED = "ALLRANKS_TEST_SEED"


def disturbances(count: int, *place: object) -> list[str]:
    """STEP:SIGNAL for each of so many starts of a run, at random steps, each later than the one before.

    `place` tells the cases of a test apart. The seed is printed, and shown where the test fails; given in
    the environment it chooses the same steps again.
    """
    seed = os.environ.get(SEED) or str(secrets.randbelow(1_000_000))
    draw = random.Random(f"{seed} {place}")
    # A run that is told to stop ends at most three steps later, as it saves after every third step. So two
    # disturbances are at least four steps apart, and the last one comes before step 21 of 24.
    drawn = sorted(draw.sample(range(1, 24 - 3 * count), count))
    steps = [step + 3 * number for number, step in enumerate(drawn)]
    chosen = [f"{step}:{draw.choice(('SIGKILL', 'SIGKILL', 'SIGTERM'))}" for step in steps]
    print(f"disturbed at {', '.join(chosen)}; the same again by {SEED}={seed}")
    return chosen


# Each launcher with each number of ranks, and how many of its starts are disturbed: ranks that import torch
# take seconds.
LAUNCHED = [
    ("forked", 1, 3),
    only_long("forked", 2, 3),
    only_long("forked", 3, 3),
    ("mpiexec", 2, 1),
    *(only_long("mpiexec", ranks, 1) for ranks in (1, 3)),
    *(only_long("torchrun", ranks, 1) for ranks in (1, 2, 3)),
    *(only_long("launch", ranks, 1) for ranks in (1, 2, 3)),
]


@pytest.mark.parametrize(("kind", "ranks", "count"), LAUNCHED)
def test_a_run_that_is_disturbed_at_random_steps_has_the_bits_of_one_that_was_not(
    kind, ranks, count, tmp_path, long
):
    # gloo adds up the gradients of forked ranks. MPI adds up three numbers in another order, and two not.
    by_mpi = kind in ("mpiexec", "launch") and ranks > 2
    started("mpiexec" if by_mpi else "forked", ranks, tmp_path / "whole").ok()
    for disturbance in disturbances(count, kind, ranks):
        # With --long the processes that are disturbed are real ones; in the other starts they are forked.
        python = PYTHON if long else forked_python()
        done = started(kind, ranks, tmp_path / "cut", disturbance, python=python)
        step, _, signal_name = disturbance.partition(":")
        if signal_name == "SIGKILL":
            assert done.code not in (0, 85)
            continue
        # torchrun makes an exit code of its own of each failure.
        assert done.code == (1 if kind == "torchrun" else 85), done.err
        # It stops where the ranks meet next, which is here at the next save at the latest.
        stopped_after = re.search(r"stopped by SIGTERM after step (\d+), in epoch", done.out)
        assert stopped_after, done.out
        assert int(step) < int(stopped_after[1]) <= int(step) + 3
    started(kind, ranks, tmp_path / "cut").ok()
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


@pytest.mark.parametrize("ranks", [only_long(2), only_long(3)])
def test_every_third_step_may_be_the_last_of_a_start(ranks, tmp_path):
    started("forked", ranks, tmp_path / "whole").ok()
    for step in range(2, 24, 3):
        assert started("forked", ranks, tmp_path / "cut", f"{step}:SIGKILL").code not in (0, 85)
    started("forked", ranks, tmp_path / "cut").ok()
    assert figures(tmp_path / "cut") == figures(tmp_path / "whole")


def test_the_curve_is_the_same_on_any_number_of_ranks(tmp_path):
    without = SINE.replace("nn.Dropout(0.1), ", "")
    started("forked", 1, tmp_path / "one", code=without).ok()
    started("forked", 3, tmp_path / "three", code=without).ok()
    one, three = figures(tmp_path / "one")[0], figures(tmp_path / "three")[0]
    for mine, theirs in zip(one, three, strict=True):
        assert theirs == pytest.approx(mine, rel=1e-5)


def test_a_launch_starts_a_rank_that_died_again(tmp_path):
    (tmp_path / "sine.py").write_text(
        SINE.replace("    if step ==", "    if os.path.exists('died'): return\n    if step ==").replace(
            "        os.kill", "        open('died', 'w').close()\n        os.kill"
        )
    )
    python = forked_python()
    command = [python, "-m", "allranks", "launch", "-n", "2", "--no-preflight", "--max-restarts", "1", "--"]
    done = execute([*command, python, "sine.py"], tmp_path, {"DISTURB": "7:SIGKILL"})
    assert done.code == 0, done.err
    started("forked", 2, tmp_path / "whole").ok()
    assert figures(tmp_path) == figures(tmp_path / "whole")


# --- how it ends ---


def test_a_finished_run_is_finished_and_another_seed_is_another_run(tmp_path):
    started("forked", 1, tmp_path).ok()
    again = started("forked", 1, tmp_path).ok()
    assert "runs/sine holds this run, finished already: nothing to do" in again.out
    other = started("forked", 1, tmp_path, code=SINE.replace("seed=1", "seed=2"))
    assert other.code == 2
    assert "seed is 1 there, not 2" in other.err


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_error_of_the_program_ends_all_ranks_and_is_shown(ranks, tmp_path):
    done = started("forked", ranks, tmp_path, "4:error")
    assert done.code == 1
    assert done.err.count("ValueError: a bug of my own") == 1
    assert ranks == 1 or "[rank 1 on " in done.err
    started("forked", ranks, tmp_path).ok()  # nothing is lost


WRONG = {
    "no scalar": (
        "run.backward(loss)",
        'run.backward(F.mse_loss(model(inputs), targets, reduction="none"))',
        r"run.backward\(\) takes a scalar loss, not float32 \[\d+, 1\]",
    ),
    "no scalar on rank 1": (
        "run.backward(loss)",
        "run.backward(loss.expand(2) if run.rank == 1 else loss)",
        r"run.backward\(\) takes a scalar loss, not float32 \[2\]",
    ),
    "keep": ("run.keep(", "run.keep(number=3, ", r"run.keep\(number=...\) got an int, which has no state_"),
    "twice": (
        "    model.eval()",
        "    for batch in run.steps(train_batches): pass\n    model.eval()",
        r"run.steps\(\) is called twice in epoch 0",
    ),
    "batch size": ("batch_size=250", "batch_size=1", "batch_size=1 is smaller than the 2 ranks"),
    "sampler": (
        "shuffle=True",
        "sampler=torch.utils.data.DistributedSampler(train_set, 2, 0)",
        "The DataLoader has a DistributedSampler",
    ),
    "setting": ("threads=1", "treads=1", "treads is not a key of the configuration. Did you mean threads"),
    "loss elsewhere": ("    model.eval()", "    run.backward(loss)", "belongs into a loop over run.steps"),
    "no gradient": ("run.backward(loss)", "run.backward(loss.detach())", "got a loss without a gradient"),
}  # fmt: skip


@pytest.mark.parametrize(
    "what", [case if case in ("no scalar on rank 1", "batch size") else only_long(case) for case in WRONG]
)
def test_what_is_wrong_is_said_once_on_two_ranks(what, tmp_path):
    before, after, message = WRONG[what]
    assert before in SINE
    done = started("forked", 2, tmp_path, code=SINE.replace(before, after))
    assert done.code == 2, done.err
    assert len(re.findall(message, done.err)) == 1, done.err
    assert "Traceback" not in done.err


def test_a_loss_that_is_not_finite_ends_the_run_before_its_weights_are_saved(tmp_path):
    spoilt = SINE.replace("        run.backward(loss)", "        run.backward(loss * nan(run))").replace(
        "import allranks ",
        "def nan(run): return float('nan') if run.step == 7 and run.rank == 1 else 1\nimport allranks ",
    )
    done = started("forked", 2, tmp_path, code=spoilt)
    assert done.code == 2
    assert done.err.count("The loss of rank 1 has not been finite since the last checkpoint") == 1
    assert checkpoint.steps(tmp_path / "runs/sine") == [6, 3]
    started("forked", 2, tmp_path).ok()
    started("forked", 2, tmp_path / "whole").ok()
    assert figures(tmp_path) == figures(tmp_path / "whole")


def test_a_program_that_forgets_to_finish_is_told(tmp_path):
    done = started("forked", 1, tmp_path, code=SINE.replace("run.finish()", ""))
    assert done.code == 2
    assert "The program has ended without run.finish()" in done.err
    started("forked", 1, tmp_path).ok()


@pytest.mark.parametrize("ranks", [1, only_long(2)])
def test_an_epoch_that_is_left_by_break_counts_and_the_run_is_over(ranks, tmp_path):
    """As by a program that stops where the loss no longer falls: that epoch's figures count as well."""
    code = SINE.replace("\nrun.finish()", "\n    if epoch == 1: break\nrun.finish()")
    started("forked", ranks, tmp_path, code=code).ok()
    path = tmp_path / "runs/sine/summary.json"
    summary = json.loads(path.read_text())
    assert (summary["state"], summary["epochs"], summary["steps"]) == ("finished", 2, 16)
    metrics, weights = figures(tmp_path)
    assert [sorted(line) for line in metrics] == [["epoch", "step", "train/loss", "val/loss"]] * 2

    # The last checkpoint has been saved, and the process was killed before it could write the summary.
    path.unlink()
    started("forked", ranks, tmp_path, code=code).ok()
    assert figures(tmp_path) == (metrics, weights)


def test_an_epoch_that_is_left_before_its_first_step_does_not_count(tmp_path):
    code = SINE.replace("    model.train()", "    if epoch == 1: break\n    model.train()")
    started("forked", 1, tmp_path, code=code).ok()
    summary = json.loads((tmp_path / "runs/sine/summary.json").read_text())
    assert (summary["epochs"], summary["steps"]) == (1, 8)
    assert len(figures(tmp_path)[0]) == 1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ("        if run.step == 5 and run.rank == 1: break", "to leave the loop by `break`"),
        only_long("        if run.step == 5 and run.rank == 0: continue", "a step without run.backward()"),
    ],
)
def test_a_rank_that_leaves_a_loop_or_a_step_alone_is_named(change, said, tmp_path):
    code = SINE.replace("        disturbed(run)", change, 1)
    done = started("forked", 2, tmp_path, code=code)
    assert done.code == 1
    alone = int(change.partition("run.rank == ")[2][0])
    assert re.search(
        rf"allranks: rank {alone} on \S+, in step 6: has made no progress for .*{said}", done.err
    )
    assert done.err.count("no progress") == 1
    started("forked", 2, tmp_path).ok()  # nothing is lost


# --- several runs ---

FOLDS = """
import os, signal, torch, allranks
from torch import nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

x = torch.linspace(-3, 3, 120)[:, None]
losses = []
for fold in range(3):
    run = allranks.open(f"fold-{fold}", seed=1, several=True, device="cpu", threads=1, report=False,
                        checkpoint={"every_steps": 2})
    if not run.is_finished:
        is_test = torch.arange(120) % 3 == fold
        model = run.wrap(nn.Linear(1, 1))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        run.keep(model=model, optimizer=optimizer)
        batches = run.batches(TensorDataset(x[~is_test]), batch_size=16)
        for epoch in run.epochs(2):
            for (x_train,) in run.steps(batches):
                if os.environ.get("DISTURB") == f"{fold}:{run.step}":
                    os.kill(os.getpid(), signal.SIGKILL)
                run.backward(F.mse_loss(model(x_train), x_train.sin()))
                optimizer.step()
                optimizer.zero_grad()
        tests = run.batches(TensorDataset(x[is_test]), batch_size=16)
        with torch.no_grad():
            run.log({"test/loss": run.mean(F.mse_loss(model(part), part.sin()) for (part,) in tests)})
        run.finish()
    assert (run.epoch, run.step) == (2, 10)
    losses.append(run.summary["test/loss"])
if run.is_main:
    print("mean of the folds", sum(losses) / 3)
"""


@pytest.mark.parametrize(("kind", "ranks"), [("forked", 2), only_long("mpiexec", 2)])
def test_a_program_may_have_several_runs_one_after_another(kind, ranks, tmp_path):
    whole = started("forked", 2, tmp_path / "whole", code=FOLDS).ok()
    assert started(kind, ranks, tmp_path / "cut", "1:5", FOLDS).code not in (0, 85)
    done = started(kind, ranks, tmp_path / "cut", code=FOLDS).ok()
    assert "runs/fold-0 holds this run, finished already" in done.out
    mean = re.search(r"mean of the folds \S+", whole.out)
    assert mean and mean[0] in done.out


def test_a_second_run_of_a_program_needs_a_word(tmp_path):
    done = started("forked", 2, tmp_path, code=FOLDS.replace("several=True, ", ""))
    assert done.code == 2
    assert done.err.count("allranks.open('fold-1'): the program has had the run runs/fold-0 already.") == 1
    assert "Traceback" not in done.err


def test_a_program_that_was_edited_is_told_what_does_not_fit_key_by_key(tmp_path):
    assert started("forked", 1, tmp_path, "13:SIGTERM").code == 85
    other = started("forked", 1, tmp_path, code=SINE.replace("64", "32"))
    assert other.code == 2
    assert "0.weight is [64, 1] in the checkpoint, [32, 1] here" in other.err
    fewer = started("forked", 1, tmp_path, code=SINE.replace(", optimizer=optimizer)", ")"))
    assert "holds optimizer, which this program does not keep" in fewer.err
    batches = started("forked", 1, tmp_path, code=SINE.replace("batch_size=250", "batch_size=100"))
    assert "batch_size is 250 there, not 100" in batches.err
    started("forked", 1, tmp_path).ok()


# --- work without steps ---

PI = script("pi.py").replace("100_000] * 20", "2_000] * 20").replace("2_000_000", "40_000")
PI = PI.replace("seed=3, ", "seed=3, report=False, ")
DYING = PI.replace(
    "def hits(throws: int) -> int:",
    "import os\ncount = 0\n\ndef hits(throws):\n    global count\n    count += 1\n"
    "    if run.rank == 0 and not os.path.exists('died') and count == 4:\n"
    "        open('died', 'w').close()\n        os.kill(os.getpid(), 9)",
)


def test_work_is_dealt_out_and_goes_on_with_what_is_left(tmp_path):
    pies = []
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        assert execute_forked(["-c", DYING], ranks, folder).code not in (0, 85)
        lines = [
            p.read_text().splitlines() for p in sorted((folder / "runs/pi/share/items").glob("rank-*"))
        ]
        assert len(lines[0]) == 3  # of rank 0, which died at its fourth
        done = execute_forked(["-c", DYING], ranks, folder).ok()
        pies.append([line for line in done.out.splitlines() if line.startswith("3.")])
        items = [
            json.loads(line)["item"]
            for path in (folder / "runs/pi/share/items").glob("rank-*")
            for line in path.read_text().splitlines()
        ]
        assert sorted(items) == list(range(20))  # none was worked on twice
    assert pies[0] == pies[1]
    assert len(pies[0]) == 1


def test_no_number_is_cast_without_a_word(tmp_path):
    """Neither the weights of a checkpoint into another type, nor a complex figure into a real one."""
    code = """
import os, signal, sys, numpy, torch, allranks
run = allranks.open("cast", device="cpu", threads=1, report=False)
model = run.wrap(torch.nn.Linear(2, 1).to(getattr(torch, sys.argv[1])))
run.keep(model=model)
for epoch in run.epochs(2):
    run.log({"figure": getattr(numpy, sys.argv[2])(1)})
    os.kill(os.getpid(), signal.SIGTERM)
"""
    assert execute_forked(["-c", code, "float32", "float32"], 1, tmp_path).code == 85
    other = execute_forked(["-c", code, "float64", "float32"], 1, tmp_path)
    assert other.code == 2
    assert "bias is of float32 in the checkpoint, of float64 here; weight is of float32" in other.err
    figure = execute_forked(["-c", code, "float32", "complex64"], 1, tmp_path)
    assert figure.code == 2
    assert "run.log() got a complex64 as figure: give a number" in figure.err


SQUARES = """
import os, sys, allranks
run = allranks.open("work", device="cpu", threads=1, report=False)
def work(item):
    if item == int(sys.argv[1]):
        os._exit(9)
    return item * item
print("squares:", run.share(list(range(6)), work))
run.finish()
"""


def test_half_a_line_of_a_rank_that_died_costs_one_item_and_no_more(tmp_path):
    """It may hold any bytes, and the next line begins below it."""
    assert execute_forked(["-c", SQUARES, "3"], 1, tmp_path).code == 9
    results = tmp_path / "runs/work/share/items/rank-0.jsonl"
    whole = results.read_bytes()
    results.write_bytes(whole + b'{"item": 3, "result": "\xff')
    assert execute_forked(["-c", SQUARES, "5"], 1, tmp_path).code == 9
    done = execute_forked(["-c", SQUARES, "-1"], 1, tmp_path).ok()
    assert "squares: [0, 1, 4, 9, 16, 25]" in done.out
    assert results.read_bytes().startswith(whole) and results.read_bytes().count(b"\n") == 7


def test_shared_work_whose_results_do_not_fit_on_the_disk_is_a_sentence(tmp_path):
    """A limit of the system stands for a full disk."""
    limit = "import resource\nresource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))\n"
    large = limit + SQUARES.replace("item * item", "'x' * 60_000")
    done = execute_forked(["-c", large, "-1"], 1, tmp_path)
    assert done.code == 2
    assert "share/items cannot be written (File too large)" in done.err
    assert "Traceback" not in done.err


def test_the_commands_that_need_a_model_say_who_has_it(tmp_path):
    started("forked", 1, tmp_path).ok()
    done = execute_forked(["-m", "allranks", "evaluate", "runs/sine"], 1, tmp_path)
    assert done.code == 2
    assert "is the run of a program of one's own" in done.err
    listed = execute_forked(["-m", "allranks", "checkpoint", "list", "runs/sine"], 1, tmp_path).ok()
    assert listed.out.count("valid") == 10  # every third of 24 steps, and the ends of two epochs


def test_the_figures_of_single_steps_are_means_over_the_ranks(tmp_path):
    """With a profile of some of these steps."""
    code = SINE.replace("seed=1, ", "seed=1, log_every_steps=4, profile=True, ")
    code = code.replace("nn.Dropout(0.1), ", "")
    lines = []
    for ranks in (1, 2):
        started("forked", ranks, tmp_path / str(ranks), code=code).ok()
        text = (tmp_path / str(ranks) / "runs/sine/metrics-steps.jsonl").read_text()
        lines.append([json.loads(line) for line in text.splitlines()])
        profile = tmp_path / str(ranks) / "runs/sine/profile"
        assert len(list(profile.glob("rank-*.json.gz"))) == ranks
        assert json.loads((profile / "table.json").read_text())["steps"] == [10, 20]
    assert [line["step"] for line in lines[0]] == [4, 8, 12, 16, 20, 24]
    for one, two in zip(*lines, strict=True):
        assert two == pytest.approx(one, rel=1e-5)
        assert set(one) == {"step", "epoch", "step/loss"}


# --- a model that is spread over the ranks ---

SPREAD = """
import os, signal, sys, torch, allranks
from torch import nn
from torch.nn import functional as F

kind = os.environ["KIND"]
sharding = {} if kind == "none" else {"kind": kind, "min_parameters": 1000}
run = allranks.open("text", seed=1, device="cpu", threads=1, report=False,
                    checkpoint={"every_steps": 2, "keep": 50}, sharding=sharding)

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        layers = (nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True) for _ in range(2))
        self.layers = nn.ModuleList(layers)
        self.head = nn.Linear(32, 50)
    def forward(self, x):
        x = self.embed(x)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)

batches = run.batches(torch.utils.data.TensorDataset(torch.randint(0, 50, (60, 9))), batch_size=10)
model = run.wrap(Net)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
run.keep(model=model, optimizer=optimizer)
for epoch in run.epochs(2):
    for batch in run.steps(batches):
        if os.environ.get("DISTURB") == f"{run.step}:{run.rank}":
            os.kill(os.getpid(), signal.SIGKILL)
        for (x,) in run.pieces(batch, 2):
            loss = F.cross_entropy(model(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten())
            run.backward(loss)
            run.log({"train/loss": loss})
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
run.finish()
"""


def spread(
    kind: str, ranks: int, folder: Path, disturb: str = "", under: str = "forked"
) -> tuple[list[float], str]:
    """(losses, sha256 of the weights) of that program; an empty list where it was killed."""
    folder.mkdir(exist_ok=True)
    environment = {"KIND": kind, "DISTURB": disturb}
    if under == "forked":
        done = execute_forked(["-c", SPREAD], ranks, folder, environment, imports=FSDP)
    else:
        (folder / "own.py").write_text(SPREAD)
        done = execute([*launcher(under, ranks, forked_python()), "own.py"], folder, environment)
    if disturb:
        assert done.code not in (0, 85), done.out
        return [], ""
    done.ok()
    metrics = (folder / "runs/text/metrics.jsonl").read_text().splitlines()
    summary = json.loads((folder / "runs/text/summary.json").read_text())
    return [json.loads(line)["train/loss"] for line in metrics], summary["model/sha256"]


@pytest.mark.xdist_group("sharding")  # in one worker, for which FSDP is imported once
def test_a_weight_in_two_blocks_of_a_model_is_told_once(tmp_path):
    tied = "self.layers = nn.ModuleList(layers)\n"
    code = SPREAD.replace(
        tied, f"{tied}        self.layers[1].linear1.weight = self.layers[0].linear1.weight\n"
    )
    assert code != SPREAD
    done = execute_forked(["-c", code], 2, tmp_path, {"KIND": "fsdp"}, imports=FSDP)
    assert done.code == 2
    assert (done.out + done.err).count("are one weight, but stand in two blocks") == 1


@pytest.mark.xdist_group("sharding")
@pytest.mark.parametrize("ranks", [2, only_long(3)])
def test_a_model_may_be_spread_over_the_ranks(ranks, tmp_path, long):
    pytest.importorskip("torch.distributed.fsdp", reason="this torch has no FSDP2")
    alone, _ = spread("none", 1, tmp_path / "alone")
    losses, weights = spread("fsdp", ranks, tmp_path / "whole")
    assert losses == pytest.approx(alone, rel=1e-5)

    # Killed, and gone on with as many ranks: the same bits.
    spread("fsdp", ranks, tmp_path / "cut", f"7:{ranks - 1}")
    shutil.copytree(tmp_path / "cut", tmp_path / "other")
    assert spread("fsdp", ranks, tmp_path / "cut") == (losses, weights)

    if not long:
        return
    # Gone on by one rank, which reads all slices, and from there by several again.
    spread("none", 1, tmp_path / "other", "9:0")
    assert spread("fsdp", ranks, tmp_path / "other")[0] == pytest.approx(alone, rel=1e-5)


@pytest.mark.long
def test_a_spread_model_whose_rank_is_killed_under_torchrun_goes_on_with_the_same_bits(tmp_path):
    pytest.importorskip("torch.distributed.fsdp", reason="this torch has no FSDP2")
    undisturbed = spread("fsdp", 2, tmp_path / "whole", under="torchrun")
    spread("fsdp", 2, tmp_path / "cut", "7:1", under="torchrun")
    assert spread("fsdp", 2, tmp_path / "cut", under="torchrun") == undisturbed


def test_a_result_of_shared_work_comes_back_as_it_was(tmp_path):
    """Arrays as arrays and tensors as tensors, whatever the keys beside them are called."""
    code = """
import numpy as np, torch, allranks
run = allranks.open("work", device="cpu", threads=1, report=False)
def work(n):
    parts = (np.arange(n, dtype=">i4"), {"array": np.ones(n)}, {"array": 5})
    return {"array": torch.full((2,), n), "of": parts}
for n, result in enumerate(run.share([0, 1, 2], work)):
    big, one, five = result["of"]
    assert torch.equal(result["array"], torch.full((2,), n)) and list(big) == list(range(n))
    assert isinstance(big, np.ndarray) and isinstance(one["array"], np.ndarray) and five == {"array": 5}
run.finish()
"""
    execute_forked(["-c", code], 2, tmp_path).ok()
    bad = code.replace('{"array": 5}', 'np.array(["a"])')
    done = execute_forked(["-c", bad.replace('"work"', '"bad"')], 1, tmp_path)
    assert done.code == 2
    assert "the result of item 0 has an array of type <U1" in done.err


def test_results_that_are_no_numbers_come_back_and_each_work_has_a_name_of_its_own(tmp_path):
    code = """
import math, torch, allranks
run = allranks.open("work", device="cpu", threads=1, report=False)
one, two = run.share([1, 2], lambda n: [math.nan, math.inf][:n], name="first")
assert math.isnan(one[0]) and two[1] == math.inf
drawn = [run.share([0, 1], lambda n: torch.rand(1).item(), name=name) for name in ("a", "b")]
assert len({*drawn[0], *drawn[1]}) == 4
run.share([1, 2], abs, name="a")
"""
    done = execute_forked(["-c", code], 2, tmp_path)
    assert done.code == 2
    assert done.err.count("run.share() has done a work with the name a in this run") == 1
    assert "AssertionError" not in done.err


def test_a_model_may_have_several_backward_passes_in_each_piece(tmp_path):
    """Their gradient is that of one pass through the sum of the losses."""
    code = """
import torch, allranks
from torch import nn
from torch.nn import functional as F
run = allranks.open("work", device="cpu", threads=1, report=False)
x = torch.linspace(-1, 1, 7).double()[:, None]
first, second = (run.wrap(nn.Linear(1, 1).double()) for _ in range(2))
parameters = [*first.parameters(), *second.parameters()]

def taken():
    gradients = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    return gradients

for batch in run.steps([(x, x ** 2)] * 3):
    for inputs, targets in run.pieces(batch, 2):
        run.backward(F.mse_loss(first(inputs), targets))
        run.backward(F.mse_loss(second(inputs), targets))
        run.backward(F.l1_loss(first(inputs), targets))
        run.backward(F.mse_loss(second(first(inputs)), targets))
    several = taken()
    alone = [nn.Linear(1, 1).double() for _ in range(2)]
    for mine, theirs in zip(alone, (first, second)):
        mine.load_state_dict(getattr(theirs, "module", theirs).state_dict())
    one, other = alone
    loss = F.mse_loss(one(x), x ** 2) + F.mse_loss(other(x), x ** 2) + F.l1_loss(one(x), x ** 2)
    loss += F.mse_loss(other(one(x)), x ** 2)
    expected = torch.autograd.grad(loss, [*one.parameters(), *other.parameters()])
    torch.testing.assert_close(several, list(expected), rtol=1e-12, atol=1e-12)
print("compared")
run.finish()
"""
    assert execute_forked(["-c", code], 2, tmp_path).ok().out.count("compared") == 2


MISTAKES = {
    "pieces 0": ("list(run.pieces((x,), 0))", "run.pieces() got count=0: give 1 or more."),
    "left pieces": (
        "for piece in run.pieces((x,), 2): break",
        "A loop over run.pieces() was left by `break`.",
    ),
    "a reduction": (
        "run.backward(x.sum(), reduction='none')",
        "run.backward() got reduction='none': give mean",
    ),
    "a list": (
        "run.mean([b.mean() for (b,) in run.batches(data)])",
        "run.mean() takes its values one by one",
    ),
}


@pytest.mark.parametrize(("statement", "said"), MISTAKES.values(), ids=MISTAKES)
def test_a_step_that_would_be_weighed_wrongly_is_refused(statement, said, tmp_path):
    code = f"""
import torch, allranks
from torch.utils.data import DataLoader, TensorDataset
run = allranks.open("work", device="cpu", threads=1, report=False)
data = DataLoader(TensorDataset(torch.arange(8.0)[:, None]), 4)
for (x,) in run.steps(data):
    {statement}
run.finish()
"""
    done = execute_forked(["-c", code], 2, tmp_path)
    assert done.code == 2
    assert done.err.count(said) == 1


def test_a_large_file_is_sent_in_pieces(tmp_path):
    """MPI counts the bytes of a message in 32 bits, and a checkpoint may have more."""
    code = """
import allranks
from allranks.runtime import runtime
run = allranks.open("work", device="cpu", threads=1, report=False)
runtime.MOST_BYTES_AT_ONCE = 7
sizes, send = [], runtime.Runtime.broadcast
def broadcast(self, tensor):
    sizes.append(tensor.numel())
    return send(self, tensor)
runtime.Runtime.broadcast = broadcast
files = {"large": bytes(range(20)), "empty": b""}
assert run.lifecycle.runtime.share_files(files if run.is_main else {}) == files
print("sent", sizes)
run.finish()
"""
    assert execute_forked(["-c", code], 2, tmp_path).ok().out.count("sent [7, 7, 6]") == 2


def test_a_training_without_steps_is_refused(tmp_path):
    """Its epochs would all stand at step 0, and nothing in the middle of one could be saved."""
    code = """
import torch, allranks
from torch.utils.data import TensorDataset
run = allranks.open("work", device="cpu", threads=1, report=False)
model = run.wrap(torch.nn.Linear(1, 1))
run.keep(model=model)
for epoch in run.epochs(5):
    for (x,) in run.batches(TensorDataset(torch.ones(8, 1)), batch_size=4):
        run.backward(model(x).mean())
run.finish()
"""
    done = execute_forked(["-c", code], 2, tmp_path)
    assert done.code == 2
    assert done.err.count("train in a loop over run.steps(batches)") == 1


@pytest.mark.parametrize("kind", ["none", only_long("fsdp")])
def test_epochs_without_steps_are_saved_each(kind, tmp_path):
    """They all stand at step 0: another start goes on after those that are closed."""
    code = f"""
import os, torch, allranks
run = allranks.open("work", device="cpu", threads=1, report=False, sharding={{"kind": "{kind}"}})
model = run.wrap(lambda: torch.nn.Linear(4, 4))
run.keep(model=model)
for epoch in run.epochs(4):
    if run.is_main:
        print("epoch", epoch, flush=True)
    if epoch == 3 and os.environ.get("DISTURB"):
        run.lifecycle.saver.finish()
        os._exit(9)
run.finish()
"""
    command = ["-c", code]
    killed = execute_forked(command, 2, tmp_path, {"DISTURB": "1"})
    assert (killed.code, killed.out.count("epoch 3")) == (9, 1), killed.err
    gone_on = execute_forked(command, 2, tmp_path).ok()
    assert "epoch 2" not in gone_on.out
    assert gone_on.out.count("epoch 3") == 1


def test_after_a_break_all_ranks_draw_the_same(tmp_path):
    code = """
import torch, allranks
run = allranks.open("work", device="cpu", threads=1, report=False)
for (x,) in run.steps([(torch.arange(4.0),)] * 3):
    if run.step == 1:
        break
print("drawn:", torch.rand(1).item())
run.finish()
"""
    out = execute_forked(["-c", code], 2, tmp_path).ok().out
    assert len(set(re.findall("drawn: (.*)", out))) == 1 and out.count("drawn:") == 2
