"""A user's own package: one YAML for each component, and no change here."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from allranks.base.errors import UserError
from allranks.components import build
from allranks.run import checkpoint
from helpers import TIMEOUT_S, Done, Run, clean_environment, only_long, tree, until

PACKAGE = '''
import os, signal, time, torch
from torch import nn

class Net(nn.Module):
    def __init__(self, input_shape, classes, hidden):
        super().__init__()
        layers = nn.Linear(64, hidden), nn.Tanh(), nn.Linear(hidden, classes)
        self.body = nn.Sequential(nn.Flatten(), *layers)

    def forward(self, images):
        return self.body(images)

class SignSGD(torch.optim.Optimizer):
    """Steps of one size, in the direction of the gradient's sign."""
    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p -= group["lr"] * p.grad.sign()

def halving(optimizer, every):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda epoch: 0.5 ** (epoch // every))

class Stripes(torch.utils.data.Dataset):
    """8 x 8 pixels: horizontal (0) or vertical (1) stripes, or neither (2)."""
    def __init__(self, count, seed):
        self.count, self.seed = count, seed

    def __len__(self):
        return self.count

    def __getitem__(self, n):
        noise = torch.rand(1, 8, 8, generator=torch.Generator().manual_seed(self.seed + n))
        lines = (torch.arange(8) % 2).float()
        label = n % 3
        noise += lines[:, None] if label == 0 else lines[None, :] if label == 1 else 0.5
        return noise / 2, label

class OneShort(Stripes):
    """As where the copy of the data on one host is not complete."""
    def __len__(self):
        return self.count - (rank() == 1)

def rank():
    return int(os.environ.get("RANK") or os.environ.get("PMI_RANK") or 0)

class Fragile(Net):
    """Fails in the third step, on the last of two ranks."""
    calls = 0
    def forward(self, images):
        Fragile.calls += 1
        if Fragile.calls == 3 and rank() == 1:
            raise RuntimeError("the third step is one too many")
        return super().forward(images)

def normed(input_shape, classes, hidden):
    layers = nn.Linear(64, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, classes)
    return nn.Sequential(nn.Flatten(), *layers)

class Stopping(Net):
    """Is stopped as it takes a checkpoint's weights, where it is told to."""
    def load_state_dict(self, *args, **values):
        done = super().load_state_dict(*args, **values)
        if os.environ.get("STOP_HERE"):
            os.kill(os.getpid(), signal.SIGSTOP)
        return done

class Stuck(Net):
    """Gets stuck in the first step, after the trial of one batch has gone well."""
    calls = 0
    def forward(self, images):
        Stuck.calls += 1
        if Stuck.calls > 1:
            open("stuck", "w").close()
            time.sleep(1000)
        return super().forward(images)

class Odd(Net):
    def get_extra_state(self):
        return {"hidden": 16}

class SlowStripes(Stripes):
    def __init__(self, count, seed):
        time.sleep(10)
        super().__init__(count, seed)

class Deadly(Stripes):
    """One worker process ends without a word; another does not come back."""
    def __getitem__(self, n):
        if torch.utils.data.get_worker_info().id == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1000)

class Warned(Stripes):
    """A signal comes to a worker process as early as can be."""
    def __len__(self):
        if not hasattr(self, "told"):
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # as torch sets it in a worker
            os.register_at_fork(after_in_child=lambda: os.kill(os.getpid(), signal.SIGTERM))
            self.told = True
        return self.count

class Unmade(Net):
    def __init__(self, **values):
        self.ratio = 1 / 0
'''
YAMLS = {
    "model/mine": """
_target_: mylab.Net
input_shape: ${data.input_shape}
classes: ${data.classes}
hidden: 16
""",
    "optimizer/mine": """
_target_: mylab.SignSGD
lr: 0.01
""",
    "scheduler/mine": """
_target_: mylab.halving
interval: epoch
every: 1
""",
    "data/mine": """
input_shape: [1, 8, 8]
classes: 3
split: [203, 60]
train: {_target_: mylab.Stripes, count: 263, seed: 0}
test: {_target_: mylab.Stripes, count: 61, seed: 5000}
""",
}
MINE = ["model=mine", "optimizer=mine", "scheduler=mine", "data=mine", "device=cpu", "threads=1",
        "trainer.precision=fp64", "trainer.batch_size=50", "trainer.epochs=3"]  # fmt: skip


@pytest.fixture
def lab(train, tmp_path_factory: pytest.TempPathFactory):
    """lab("model=mine", ...) trains with the user's package importable and the user's YAMLs at hand."""
    home: Path = tmp_path_factory.mktemp("lab")
    (home / "mylab.py").write_text(PACKAGE)
    for name, text in YAMLS.items():
        path = home / "conf" / f"{name}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)

    def run(*overrides: str, **options) -> Done:
        return train("--config-dir", run.conf, *overrides, env={"PYTHONPATH": str(home)}, **options)

    run.home, run.conf = home, str(home / "conf")
    run.started = list[subprocess.Popen[str]]()
    yield run
    for process in run.started:  # all of them have ended, unless the test has failed
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_own_model_optimizer_scheduler_and_data_train(lab, tmp_path):
    alone = lab(*MINE, cwd=tmp_path / "alone").ok().run
    together = lab(*MINE, under="mpiexec", ranks=2, cwd=tmp_path / "together").ok().run
    assert together.losses == pytest.approx(alone.losses, rel=1e-9)
    for run in (alone, together):
        assert run.path.parent.name == "mine"  # runs/<name>: the model's choice
        assert run.column("lr") == [0.01, 0.005, 0.0025]
        assert run.column("step") == [5, 10, 15]
        assert run.summary["model/parameters"] == 64 * 16 + 16 + 16 * 3 + 3
        assert (run.summary["val/count"], run.summary["test/count"]) == (60, 61)
    assert alone.summary["test/accuracy"] > 90


def test_a_rank_with_other_data_is_named_before_anything_is_made(lab):
    """The ranks would take different numbers of steps, and wait for each other."""
    done = lab(*MINE, "data.train._target_=mylab.OneShort", ranks=2)
    assert done.code == 2
    assert "rank 1: data.train has 262 examples here, but 263 on rank 0" in done.message
    assert not (done.cwd / "runs").exists()


def test_one_own_component_among_ours(lab):
    run = lab("data=mine", "model=linear", "trainer.epochs=1", "device=cpu").ok().run
    assert run.summary["model/parameters"] == 64 * 3 + 3


def test_own_data_by_worker_processes(lab):
    overrides = [*MINE, "trainer.epochs=1"]
    here = lab(*overrides, "run.dir=here").ok()
    there = lab(*overrides, "+data.workers=2", "run.dir=there").ok()
    one, other = ((done.cwd / name / "metrics.jsonl") for done, name in ((here, "here"), (there, "there")))
    figures = [[part for part in path.read_text().split(", ") if "loss" in part] for path in (one, other)]
    assert figures[0] == figures[1]
    assert len(figures[0]) == 2


@pytest.mark.parametrize(
    ("signum", "wait_s"),
    [
        only_long(signal.SIGTERM, 0),
        only_long(signal.SIGTERM, 0.3),
        only_long(signal.SIGINT, 0),
        (signal.SIGINT, 0.3),
    ],
)
def test_a_signal_to_every_process_stops_a_run_with_workers(lab, tmp_path, signum, wait_s):
    """Schedulers and terminals send it to all, the workers included: the run saves all the same."""
    process = with_limits(lab, tmp_path, {}, *MINE, "trainer.epochs=100000", "+data.workers=2")
    until(lambda: checkpoint.steps(tmp_path / "run"))
    time.sleep(wait_s)
    os.killpg(process.pid, signum)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (85, "")
    assert f"stopped by {signum.name}" in out


def test_a_second_ctrl_c_does_not_wait_for_the_step(lab, tmp_path):
    process = with_limits(
        lab, tmp_path, {"allranks.base.signals.TWICE_S": 2}, *MINE, "model._target_=mylab.Stuck"
    )
    assert process.stdout is not None
    until((tmp_path / "stuck").exists)
    os.killpg(process.pid, signal.SIGINT)
    assert any(line.startswith("SIGINT: stopping") for line in iter(process.stdout.readline, ""))
    os.killpg(process.pid, signal.SIGINT)  # the launcher passes on what the terminal has sent already
    time.sleep(3)
    assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    out, err = process.communicate(timeout=TIMEOUT_S)
    assert process.returncode == 130, err
    assert f"nothing had been saved: run.dir={tmp_path}/run begins again" in out
    assert err == "allranks: interrupted\n"


def test_a_signal_to_a_worker_process_just_started_is_nothing(lab):
    lab(*MINE, "trainer.epochs=1", "+data.workers=2", "data.train._target_=mylab.Warned").ok()


def test_a_worker_process_that_is_stuck_does_not_keep_a_run_that_failed(lab):
    done = lab(*MINE, "+data.workers=2", "data.train._target_=mylab.Deadly", timeout_s=60)
    assert done.code == 1
    assert "A process that reads the data has ended (data.workers=2): was killed by SIGKILL" in done.message


def with_limits(lab, cwd: Path, limits: dict[str, float], *overrides: str, **env: str):
    """A training in `cwd`/run, a process group of its own, with other limits of allranks' modules."""
    code = "import importlib, sys\n" + "".join(
        f"setattr(importlib.import_module({module!r}), {name!r}, {value})\n"
        for (module, name), value in ((key.rsplit(".", 1), value) for key, value in limits.items())
    )
    (cwd / "started.py").write_text(code + "from allranks import train\ntrain.main()\n")
    process = subprocess.Popen(
        [sys.executable, "started.py", "--config-dir", lab.conf, *overrides, "run.dir=run"], cwd=cwd,
        env=clean_environment(PYTHONPATH=str(lab.home), **env), text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    lab.started.append(process)
    return process


@pytest.mark.long
def test_a_dataset_that_takes_long_to_make_is_waited_for(lab, tmp_path):
    """Longer than the start may otherwise take: there are 600 s, here 8."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    place = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    slow = [*MINE, "trainer.epochs=1", "data.train._target_=mylab.SlowStripes", "watchdog.start_s=8"]
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "allranks.train", "--config-dir", lab.conf, *slow, "run.dir=run"],
            cwd=tmp_path, env=clean_environment(PYTHONPATH=str(lab.home), RANK=str(rank), **place),
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )
        for rank in range(2)
    ]  # fmt: skip
    told = [rank.communicate(timeout=TIMEOUT_S) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], told
    assert (tmp_path / "run/summary.json").exists()


def test_what_is_evaluated_with_batch_norm_is_what_is_saved(lab):
    """Its figures are each rank's own: rank 0's are taken."""
    words = [*MINE, "model._target_=mylab.normed", "trainer.batch_size=16"]
    done = lab(*words, ranks=2).ok()
    sys.path.insert(0, str(lab.home))
    try:
        import mylab
    finally:
        sys.path.remove(str(lab.home))
    [newest, *_] = checkpoint.steps(done.run.path)
    model = mylab.normed([1, 8, 8], 3, 16).double()
    model.load_state_dict(load_file(checkpoint.path_of(done.run.path, newest) / "model.safetensors"))
    test = mylab.Stripes(61, 5000)
    images = torch.stack([test[n][0] for n in range(61)]).double()
    labels = torch.tensor([test[n][1] for n in range(61)])
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(model.eval()(images), labels)
    assert done.run.summary["test/loss"] == pytest.approx(loss.item(), rel=1e-9)


@pytest.mark.long
def test_a_run_that_wakes_up_leaves_its_successors_records_alone(lab, tmp_path):
    """It was stopped as it took a checkpoint's weights; another run took over, and finished."""
    words = [*MINE, "model._target_=mylab.Stopping", "trainer.epochs=6", "checkpoint.keep=9"]
    quick = {"allranks.run.claim.BEAT_S": 0.2, "allranks.run.claim.SILENT_S": 1.5}
    lab(*words, "run.dir=run").ok()
    run = tmp_path / "run"
    (run / "summary.json").unlink()
    checkpoint.keep_only(run, checkpoint.steps(run)[-2:])
    first = with_limits(lab, tmp_path, quick, *words, STOP_HERE="1")
    os.waitid(os.P_PID, first.pid, os.WSTOPPED)
    second = with_limits(lab, tmp_path, quick, *words)
    _, err = second.communicate(timeout=TIMEOUT_S)
    assert second.returncode == 0, err
    before = tree(run), (run / "metrics.jsonl").read_bytes(), (run / "environment.json").read_bytes()
    first.send_signal(signal.SIGCONT)
    _, err = first.communicate(timeout=TIMEOUT_S)
    assert first.returncode == 2
    assert "does not belong to this run any more" in err
    after = tree(run), (run / "metrics.jsonl").read_bytes(), (run / "environment.json").read_bytes()
    assert after == before
    assert len(Run(run).metrics) == 6


def test_help_lists_the_users_choices(lab):
    assert "cnn, linear, mine, mlp" in lab("--help").ok().out


@pytest.mark.parametrize(
    ("override", "what"),
    [
        ("model._target_=mylab.Nett", "model._target_=mylab.Nett cannot be loaded"),
        ("model._target_=yourlab.Net", "model._target_=yourlab.Net cannot be loaded"),
        ("optimizer._target_=mylab.SGD", "optimizer._target_=mylab.SGD cannot be loaded"),
        ("optimizer._target_=torch.optim.Sgd", "(torch.optim has no Sgd)"),
        ("optimizer._target_=torch.optim.Sgd", "Python can import. Did you mean SGD?"),
        ("optimizer._target_=torch.optim", "(it is a module, and cannot be called)"),
        ("scheduler._target_=torch.optim.lr_scheduler.StepLRR", "Did you mean StepLR?"),
        ("model._target_=..x", "(it is not written like package.module.Name)"),
        ("model._target_=broken.Net", "(broken needs the module nowhere_to_be_found, which is missing)"),
        ("+model.inner._target_=mylab.Nett", "model: a _target_ inside this section cannot be loaded"),
        ("data.train._target_=mylab.Dots", "data.train._target_=mylab.Dots cannot be loaded"),
        ("+model.depth=3", "model: mylab.Net refuses its arguments"),
        ("data.split=[200,60]", "263"),
        ("model._target_=mylab.Odd", "_extra_state of its state_dict is a dict"),
    ],
)
def test_what_does_not_fit_gets_one_message(lab, train_here, monkeypatch, override, what):
    """Three of these on a command line, the others in this process."""
    if override in ("model._target_=mylab.Nett", "data.split=[200,60]", "+model.depth=3"):
        done = lab(*MINE, override)
        assert what in done.message
        assert done.code == 2
        return
    monkeypatch.syspath_prepend(lab.home)
    (Path(lab.home) / "broken.py").write_text("import nowhere_to_be_found\n")
    with pytest.raises(UserError, match=re.escape(what)):
        train_here("--config-dir", lab.conf, *MINE, override)


PARTS = """
def convert(text="ten"):
    return int(text)

class Outer:
    def __init__(self, inner=None):
        self.inner = inner

class Picky:
    def __init__(self, width):
        if width < 0:
            raise ValueError("a width below 0")
        self.width = width
"""


@pytest.fixture
def parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The module `mymodels` can be imported."""
    (tmp_path / "mymodels.py").write_text(PARTS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "mymodels", raising=False)


@pytest.mark.parametrize(
    ("section", "what"),
    [
        ({"_target_": "mymodels.Outer", "depth": 3}, "mymodels.Outer refuses its arguments: "),
        ({"_target_": "mymodels.Picky"}, "mymodels.Picky refuses its arguments: "),
        (
            {"_target_": "mymodels.Outer", "inner": {"_target_": "mymodels.Picky"}},
            "mymodels.Picky refuses its arguments: ",
        ),
        (
            {"_target_": "mymodels.Outer", "inner": {"_target_": "torch.nn.Linear", "in_features": -1}},
            "torch.nn.modules.linear.Linear refuses its arguments: ",
        ),
        (
            {"_target_": "mymodels.Outer", "inner": [{"_target_": "mymodels.Outer", "x": 1}]},
            "mymodels.Outer refuses its arguments: ",
        ),
        ({"_target_": "torch.optim.Adam"}, "torch.optim.Adam refuses its arguments: "),
    ],
)
def test_arguments_that_do_not_fit_are_said_of_what_was_called(parts, section, what):
    with pytest.raises(UserError, match=f"^model: {re.escape(what)}"):
        build("model", section)


@pytest.mark.parametrize(
    ("section", "what", "line"),
    [
        ({"_target_": "mymodels.convert"}, "invalid literal for int", "return int(text)"),
        ({"_target_": "mymodels.Picky", "width": -1}, "a width below 0", "raise ValueError"),
        ({"_target_": "mymodels.Picky", "width": "a"}, "not supported between", "if width < 0"),
        (
            {"_target_": "mymodels.Outer", "inner": {"_target_": "mymodels.Picky", "width": -1}},
            "a width below 0",
            "raise ValueError",
        ),
    ],
)
def test_an_error_within_the_users_code_is_raised_as_it_is(parts, section, what, line):
    """Its traceback leads to the line."""
    with pytest.raises((TypeError, ValueError), match=what) as raised:
        build("model", section)
    last = raised.traceback[-1]
    assert Path(str(last.path)).name == "mymodels.py"
    assert str(last.statement).strip().startswith(line)


def test_a_wrong_target_on_two_ranks_gets_one_message(lab):
    done = lab(*MINE, "data.train._target_=mylab.Dots", ranks=2)
    assert "data.train._target_=mylab.Dots cannot be loaded" in done.message
    assert (done.code, done.left_running) == (2, [])


def test_an_error_in_the_users_code_shows_where(lab):
    done = lab(*MINE, "model._target_=mylab.Unmade")
    assert done.code == 1
    assert "ZeroDivisionError: division by zero" in done.err
    assert 'mylab.py", line' in done.err


@pytest.mark.parametrize("under", ["mpiexec", only_long("torchrun")])
def test_an_error_on_one_rank_brings_all_down(lab, under):
    """Rank 0 waits for rank 1's gradients, which never come."""
    done = lab(*MINE, "model._target_=mylab.Fragile", under=under, ranks=2, timeout_s=60)
    assert done.code not in (0, None)
    assert done.left_running == []
    assert "RuntimeError: the third step is one too many" in done.err
    assert 'mylab.py", line' in done.err
    assert "[rank 1 on " in done.err
