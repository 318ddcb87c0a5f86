"""From a command line to a checked configuration: Hydra's grammar, our answers, and freezing."""

from __future__ import annotations

import hashlib
import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from allranks import compose
from allranks import config as configs
from allranks.base.errors import UserError
from allranks.base.text import did_you_mean
from allranks.compose import from_command_line
from allranks.config import Config, decisive_values, typed
from allranks.run.directory import standing
from helpers import ROOT, SMALL, Run, tree

GROUPS = (ROOT / "conf" / group for group in compose.GROUPS)  # a machine is no part of a training
CHOICES = sorted(
    f"{folder.name}={path.stem}"
    for folder in GROUPS
    for path in folder.glob("*.yaml")
    if (folder.name, path.stem) != ("task", "own")  # what it stands for has to be named
)


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def one(*overrides: str) -> Config:
    [config] = from_command_line(overrides)
    return config


# --- composing -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "times"),
    [(["model=linear"], 1), (["-m", "seed=0,1,2"], 4)],  # a sweep once as a whole, and once for each cell
    ids=["one", "a sweep of three"],
)
def test_nothing_is_composed_twice(monkeypatch, words, times):
    """Composing is most of what a command of allranks takes: every rank of a job composes."""
    real, composed = ConfigLoaderImpl.load_configuration, []

    def noted(self, *words, **options):
        composed.append(words)
        return real(self, *words, **options)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", noted)
    from_command_line(words)
    assert len(composed) == times


def test_a_file_of_the_users_own_may_ask_for_a_sweep(tmp_path):
    """As Hydra allows: it sets `hydra.mode`, and says what is swept."""
    (tmp_path / "conf/experiment").mkdir(parents=True)
    (tmp_path / "conf/experiment/seeds.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      seed: 3,4\n"
    )
    found = from_command_line(["--config-dir", "conf", "experiment=seeds"])
    assert [config.seed for config in found] == [3, 4]
    assert [config.seed for config in from_command_line(["hydra.mode=MULTIRUN", "seed=5,6"])] == [5, 6]


def test_there_is_every_promised_choice():
    promised = {
        "data": "fashion_mnist mnist synthetic",
        "model": "cnn linear mlp resnet18 vit",
        "task": "autoencoder classification language_model regression segmentation",
        "optimizer": "adagrad adam adamw rmsprop sgd",
        "scheduler": "cosine exponential none onecycle plateau step warmup_cosine",
        "experiment": "cnn tutorial_linear tutorial_mlp tutorial_step",
    }
    for group, names in promised.items():
        assert {f"{group}={name}" for name in names.split()} <= set(CHOICES)


@pytest.mark.parametrize("choice", CHOICES)
def test_every_shipped_choice_composes_and_each_key_is_explained(choice, tmp_path):
    config = one(choice)
    assert config.trainer.epochs >= 1
    assert tree(tmp_path) == []  # composing writes nothing

    # `allranks train --help` and the reference are made from the explanations of the keys.
    values = configs.leaves(config)
    unexplained = {key for key in values if configs.setting_of(key, values) is None}
    # what the functions that make our own data sets take
    ours = ("name", "part", "count", "seed")
    assert unexplained <= {f"data.{part}.{key}" for part in ("train", "test") for key in ours}


def test_an_own_task_has_to_be_named():
    with pytest.raises(UserError, match=r"task\._target_ is missing: name the class or function"):
        one("task=own")
    assert one("task=own", "task._target_=mylab.Mine").task == {"_target_": "mylab.Mine"}


def test_a_configuration_from_before_there_were_tasks_is_a_classification(tmp_path):
    config = one()
    before = OmegaConf.create(configs.freeze(config))
    del before["task"]
    assert configs.typed(before).task == config.task == {"_target_": "allranks.tasks.Classification"}
    before = {k: v for k, v in decisive_values(config).items() if not k.startswith("task.")}
    assert configs.with_new_keys(before) == decisive_values(config)


def test_the_defaults():
    config = one()
    assert (config.name, config.seed, config.runtime, config.device) == ("mlp", 0, "auto", "auto")
    assert (config.trainer.epochs, config.trainer.batch_size) == (5, 128)
    assert config.data["split"] == [48_000, 12_000]
    assert config.data["root"] == "data"
    assert config.scheduler == {"_target_": None, "interval": "epoch"}


def test_the_tutorials_recipes():
    linear, mlp, step = (one(f"experiment=tutorial_{name}") for name in ("linear", "mlp", "step"))
    for config, rate, epochs in ((linear, 0.05, 5), (mlp, 0.05, 5), (step, 0.1, 6)):
        assert config.optimizer["_target_"] == "torch.optim.SGD"
        assert (config.optimizer["lr"], config.optimizer["momentum"]) == (rate, 0.0)
        assert (config.trainer.epochs, config.trainer.batch_size) == (epochs, 128)
    assert (mlp.model["widths"], mlp.model["dropout"]) == ([50, 50, 50], 0.2)
    assert (step.scheduler["step_size"], step.scheduler["gamma"]) == (2, 0.1)


def test_what_is_typed_wins_over_an_experiment():
    config = one("experiment=tutorial_step", "optimizer.lr=0.2", "trainer.epochs=1", "model.widths=[9]")
    assert (config.optimizer["lr"], config.trainer.epochs, config.model["widths"]) == (0.2, 1, [9])
    assert one("experiment=tutorial_mlp", "model=cnn").model["_target_"] == "allranks.models.cnn"


def test_values_follow_each_other():
    assert one("scheduler=onecycle", "optimizer.lr=0.3").scheduler["max_lr"] == 0.3
    assert one("model=cnn", "data.input_shape=[3,32,32]").model["input_shape"] == [3, 32, 32]
    assert one("data.root=/scratch/data").data["train"]["root"] == "/scratch/data"
    assert one("model=vit").name == "vit"
    assert one("model=vit", "name=mine").name == "mine"


def test_the_data_folder_by_environment(monkeypatch):
    monkeypatch.setenv("ALLRANKS_DATA", "/scratch/all")
    assert one().data["root"] == "/scratch/all"
    monkeypatch.setenv("ALLRANKS_DATA", "")  # as a script leaves it that has nothing to put there
    assert one().data["root"] == "data"
    assert os.environ["ALLRANKS_DATA"] == ""


def test_a_sweep_is_one_configuration_for_each_cell(tmp_path):
    cells = from_command_line(["-m", "model=linear,mlp", "seed=0,1,2"])
    assert [(cell.name, cell.seed) for cell in cells] == [
        ("linear", 0), ("linear", 1), ("linear", 2), ("mlp", 0), ("mlp", 1), ("mlp", 2),
    ]  # fmt: skip
    placed = from_command_line(["-m", "seed=range(3)", "run.dir=all"])
    assert [cell.run.dir for cell in placed] == [f"{tmp_path}/all/{i}" for i in range(3)]


def test_a_sweep_has_one_directory():
    """Its trainings are 0, 1, ... in it, so a second run.dir would be lost."""
    for words in (["run.dir=a,b"], ["run.dir=null,b"], ["run.dir=${name}", "name=a,b"]):
        with pytest.raises(UserError, match=r"run\.dir=\w+,b is not the same for all trainings"):
            from_command_line(["-m", *words])
    assert len(from_command_line(["-m", "run.dir=a,a"])) == 2


@pytest.mark.parametrize("word", ["run.dir=[a]", "run.dir={a: 1}", "run=null"])
def test_what_is_no_run_directory_is_refused_in_a_sweep_too(word):
    with pytest.raises(UserError, match=r"run(\.dir)?=\S.* is not valid"):
        from_command_line(["-m", word, "seed=1,2"])


def test_a_directory_may_be_called_by_a_number(tmp_path):
    cells = from_command_line(["-m", "run.dir=7", "seed=1,2"])
    assert [cell.run.dir for cell in cells] == [f"{tmp_path}/7/0", f"{tmp_path}/7/1"]


def test_a_sweep_of_no_training_is_refused():
    with pytest.raises(UserError, match="-m asks for no training at all"):
        from_command_line(["-m", "seed=range(1,1)"])


@pytest.mark.parametrize("words", [["seed=1", "--config-dir"], ["-cd", "-m", "seed=1"], ["--cfg"]])
def test_a_flag_without_its_value_is_named(words):
    """Hydra would take a word that only allranks has put after it."""
    flag = next(word for word in words if word.startswith("-"))
    with pytest.raises(UserError, match=f"^{flag} has no value: give it after {flag}"):
        from_command_line(words)


def test_paths_are_whole_once_the_configuration_is_composed(monkeypatch, tmp_path):
    """Later the ranks of other hosts, or a job's script, may have another present directory."""
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("ALLRANKS_DATA", "~/all")
    assert one("run.dir=~/runs/x").run.dir == "/home/me/runs/x"
    assert one("run.dir='~/runs/a b'").run.dir == "/home/me/runs/a b"
    assert one("run.dir=runs/x").run.dir == f"{tmp_path}/runs/x"
    assert one("resume=~/runs/x").resume == "/home/me/runs/x"
    assert one("resume=never").resume == "never"
    config = one("data=mnist")
    assert (config.data["root"], config.data["train"]["root"]) == ("/home/me/all", "/home/me/all")
    assert one("data.root=~").data["test"]["root"] == "/home/me"
    with pytest.raises(UserError, match=r"run\.dir=a\\x1b\[31mb has control characters"):
        one('run.dir="a\x1b[31mb"')
    with pytest.raises(UserError, match=rf"run\.dir={tmp_path}/a\?b has bytes that are no UTF-8"):
        one('run.dir="a\udcffb"')
    with pytest.raises(UserError, match=r"run\.dir=~nobody-here/x: no home directory is known for ~nobody"):
        one("run.dir=~nobody-here/x")


def test_the_home_directory_where_no_shell_puts_it(monkeypatch, tmp_path):
    """`--config-dir=~/mine`, and the same in quotes."""
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine/model").mkdir(parents=True)
    (tmp_path / "mine/model/wide.yaml").write_text("_target_: mylab.Net\n")
    for words in (["--config-dir=~/mine"], ["--config-dir", "~/mine"]):
        assert one(*words, "model=wide").model == {"_target_": "mylab.Net"}


def test_the_environment_and_the_arguments_are_left_as_they_were(monkeypatch):
    import os
    import sys

    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")
    arguments, environ = list(sys.argv), dict(os.environ)
    one("seed=3")
    with pytest.raises(UserError):
        one("seed=-3")
    assert (sys.argv, dict(os.environ)) == (arguments, environ)


# --- refusing ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("typed_key", "meant"),
    [
        ("trainer.epoch", "trainer.epochs"),
        ("trainer.batchsize", "trainer.batch_size"),
        ("trainer.bathc_size", "trainer.batch_size"),
        ("optimizer.momentun", "optimizer.momentum"),
        ("model.activations", "model.activation"),
        ("data.splits", "data.split"),
        ("sed", "seed"),
        ("momentum", "optimizer.momentum"),
        ("epochs", "trainer.epochs"),
    ],
)
def test_a_misspelt_key_gets_the_nearest_right_one(typed_key, meant):
    with pytest.raises(UserError) as refused:
        one(f"{typed_key}=1")
    assert str(refused.value) == f"{typed_key} is not a key of the configuration. Did you mean {meant}?"


@pytest.mark.parametrize("section", ["checkpoint", "watchdog", "run"])
@pytest.mark.parametrize("value", ["5", "null", "often"])
def test_a_value_where_a_section_belongs_is_refused_by_its_name(section, value):
    shown = "None" if value == "null" else value
    with pytest.raises(
        UserError, match=rf"^{section}={shown} is not valid: {section} is a section, whose "
    ):
        one(f"{section}={value}")


@pytest.mark.parametrize(
    "section", ["trainer", "sharding", "tracker", "task", "data", "model", "optimizer"]
)
def test_a_value_for_a_chosen_section_is_refused_by_its_name(section):
    with pytest.raises(UserError, match=rf"^{section}=5 is not valid: {section} is a section, whose keys "):
        typed(composed(**{section: 5}))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("words", "choices"),
    [
        (["sharding.min_parameters=5"], "sharding=fsdp or sharding=hybrid"),
        (["sharding.blocks=[A]"], "sharding=fsdp or sharding=hybrid"),
        (["sharding.kind=fsdp", "sharding.blocks=[A]"], "sharding=fsdp or sharding=hybrid"),
        (["sharding=fsdp", "sharding.devices=4"], "sharding=hybrid"),
    ],
)
def test_a_key_of_another_sharding_is_answered_with_the_choice_that_has_it(words, choices):
    key = words[-1].partition("=")[0]
    with pytest.raises(UserError) as refused:
        one(*words)
    assert str(refused.value) == f"{key} has no meaning here: take {choices} with it."


def test_keys_of_the_chosen_component_are_suggested():
    with pytest.raises(UserError, match=r"Did you mean scheduler\.step_size"):
        one("scheduler=step", "scheduler.stepsize=3")
    with pytest.raises(UserError, match=r"Did you mean optimizer\.betas"):
        one("optimizer=adam", "optimizer.beta=[0.9,0.99]")


@pytest.mark.parametrize(("word", "near"), [("Relu", "ReLU"), ("tanh", "Tanh"), ("Zzz", None)])
def test_did_you_mean(word, near):
    assert did_you_mean(word, ["ReLU", "Tanh", "GELU"]) == (f" Did you mean {near}?" if near else "")


def composed(**changes: object) -> object:
    whole = OmegaConf.to_container(OmegaConf.structured(one()))
    config = OmegaConf.create(whole)
    for key, value in changes.items():
        OmegaConf.update(config, key.replace("__", "."), value, force_add=True)
    return config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sede": 1}, "sede is not a key"),
        (
            {"trainer__epoch": 1},
            "trainer.epoch is not a key of the configuration. Did you mean trainer",
        ),
        ({"trainer__epochs": "ten"}, "trainer.epochs=ten is not valid: give a whole number >= 0"),
        ({"trainer__compile": "perhaps"}, "trainer.compile=perhaps is not valid"),
        ({"optimizer__lr": float("nan")}, "optimizer.lr=nan is not valid: give a finite number > 0"),
        ({"optimizer__betas": [0.9, 1.0]}, "optimizer.betas=[0.9, 1.0] is not valid"),
        ({"trainer__label_smoothing": True}, "trainer.label_smoothing"),
        ({"model___target_": None}, "model._target_ is missing"),
        ({"seed": 2**63}, f"seed={2**63} is not valid"),
        ({"optimizer__lr": 10**400}, "is not valid: give a finite number > 0"),
        ({"checkpoint__every_s": 10**400}, "checkpoint.every_s: a number has more than 308 digits"),
    ],
)
def test_typed_refuses_at_the_door(changes, message):
    with pytest.raises(UserError) as refused:
        typed(composed(**changes))  # type: ignore[arg-type]
    assert message in str(refused.value)


def test_rules_for_our_components_are_not_imposed_on_a_users():
    """A user's own optimizer may call something else lr."""
    mine = composed(optimizer___target_="mylab.Opt", optimizer__lr=-1, model___target_="mylab.Net")
    assert typed(mine).optimizer["lr"] == -1  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "override",
    ["hydra.run.dir=x", "+hydra.job.env_set.X=1", "hydra/job_logging=none", "hydra.job.chdir=true",
     "hydra.sweep.subdir=a", "hydra/launcher=basic", "hydra.verbose=true", "~hydra.output_subdir"],
)  # fmt: skip
def test_what_hydra_would_do_elsewhere_is_answered(override):
    with pytest.raises(UserError, match=f"^{re.escape(override)} has no effect: "):
        one(override)


def test_hydras_search_path_is_obeyed(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_text("_target_: mylab.Net\n")
    assert one(f"hydra.searchpath=[file://{tmp_path}]", "model=mine").model == {"_target_": "mylab.Net"}


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("_target_: [mylab\n", "line 2: expected ',' or ']'"),
        ("_target_: mylab.Net\nlayers:\n\t- 1\n", "line 3: found character"),
        ("width: 1\nwidth: 2\n", "line 2: found duplicate key width"),
        ("5\n", "it holds a single value"),
        ("width: ${\n", "no viable alternative"),
        ("a: \ud8ff", "can't decode byte"),
    ],
    ids=["bracket", "tab", "twice", "one value", "variable", "no UTF-8"],
)
def test_a_mistake_in_a_file_of_ones_own_names_file_and_line(tmp_path, content, what):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.yaml").write_bytes(content.encode(errors="surrogatepass"))
    with pytest.raises(UserError) as refused:
        one(f"--config-dir={tmp_path}", "model=mine")
    said = str(refused.value)
    assert said.startswith(f"{tmp_path}/model/mine.yaml cannot be read (")
    assert what in said
    assert said.endswith("): put the file right.")


def test_a_model_in_a_folder_of_ones_own_names_the_run_by_its_last_part(tmp_path):
    (tmp_path / "model/mine").mkdir(parents=True)
    (tmp_path / "model/mine/wide.yaml").write_text("_target_: allranks.models.mlp\nwidths: [64]\n")
    own = f"--config-dir={tmp_path}"
    assert one(own, "model=mine/wide").name == "wide"
    assert one(own, "model=mine/wide", "name=other").name == "other"
    with pytest.raises(UserError, match="name=a/b is not valid"):
        one(own, "model=mine/wide", "name=a/b")


@pytest.mark.parametrize("value", ["3", "null", "[ReLU,3]", "{a:1}"])
def test_an_activation_is_a_name_or_names(value):
    with pytest.raises(UserError, match="give the name of an activation"):
        one(f"model.activation={value}")


@pytest.mark.parametrize("key", ["optimizer.lr", "data.classes", "scheduler.interval"])
def test_keys_where_a_value_belongs_are_refused(key):
    with pytest.raises(UserError, match=rf"^{key} has keys of its own \({key}\.a\): give "):
        one(f"{key}={{a:1}}")


@pytest.mark.parametrize(
    ("content", "what"),
    [
        ("", "mine/config.yaml cannot be read (it is empty): bring it back from a copy"),
        ("\n", "mine/config.yaml cannot be read (it is empty): bring it back from a copy"),
        ("seed: 1\n", "model._target_ is missing"),
        ("sead: 1\n", "sead is not a key of the configuration. Did you mean seed?"),
    ],
)
def test_a_run_whose_configuration_is_none_is_named(tmp_path, content, what):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine/config.yaml").write_text(content)
    with pytest.raises(UserError) as refused:
        standing("mine", decisive_values(one()), "auto")
    said = str(refused.value)
    assert said.startswith(f"run.dir=mine has a configuration that cannot be used: {what}")


def test_the_configuration_is_that_of_the_bytes_whose_sum_was_compared(tmp_path, monkeypatch):
    """What another process writes there right after the comparison is not trained with."""
    path = tmp_path / "config.yaml"
    path.write_text(configs.freeze(one("seed=1")))
    other = configs.freeze(one("seed=2"))
    take_sum = hashlib.sha256
    sha256 = take_sum(path.read_bytes()).hexdigest()

    def take_sum_and_change(content: bytes) -> Any:
        found = take_sum(content)
        path.write_text(other)
        return found

    monkeypatch.setattr(hashlib, "sha256", take_sum_and_change)
    assert configs.thaw(str(tmp_path), sha256).seed == 1


# --- freezing ------------------------------------------------------------------------------------------


def test_a_frozen_configuration_is_the_same_configuration():
    config = one("model=cnn", "optimizer=adam", "scheduler=warmup_cosine", "run.dir=somewhere")
    again = typed(OmegaConf.create(configs.freeze(config)))  # type: ignore[arg-type]
    config.run.dir = None
    assert again == config
    assert configs.digest(again) == configs.digest(config)


def test_the_digest_tells_any_two_configurations_apart():
    lines = ([], ["seed=1"], ["run.dir=x"], ["model=cnn"], ["optimizer.lr=0.051"], ["threads=1"])
    assert len({configs.digest(one(*line)) for line in lines}) == len(lines)


def test_a_frozen_run_trains_again_with_the_same_figures(train, train_here, tmp_path):
    first = train_here(*SMALL, "model=mlp", "scheduler=step", "trainer.epochs=2", "run.dir=first")
    again = train("--config-path", str(first.path), "run.dir=again").ok()
    repeated = Run(tmp_path / "again")
    assert repeated.losses == first.losses
    assert repeated.summary["model/sha256"] == first.summary["model/sha256"]
    assert (repeated.path / "config.yaml").read_text() == (first.path / "config.yaml").read_text()
    assert again.err == ""


def test_a_frozen_run_can_be_varied_too(train_here):
    first = train_here(*SMALL, "model=linear", "trainer.epochs=1")
    varied = one("--config-path", str(first.path), "optimizer.lr=0.2")
    assert (varied.optimizer["lr"], varied.name) == (0.2, "linear")


# --- Hydra's own flags, typed --------------------------------------------------------------------------


def test_cfg_job_shows_the_whole_configuration(train, tmp_path):
    shown = yaml.safe_load(train("--cfg", "job", "model=linear", "optimizer.lr=0.5").ok().out)
    assert shown["model"]["_target_"] == "allranks.models.linear"
    assert shown["optimizer"]["lr"] == 0.5
    assert "hydra" not in shown
    assert tree(tmp_path) == []


def test_cfg_job_is_shown_once_under_mpiexec(train):
    alone = train("--cfg", "job").ok().out
    assert train("--cfg", "job", under="mpiexec", ranks=2).ok().out == alone


def test_help_lists_the_choices_and_the_ways_in(train, tmp_path):
    text = train("--help").ok().out
    for line in (
        "mpiexec -n 4 python -m allranks.train",
        "torchrun --nproc-per-node 4 -m allranks.train",
        "model: cnn, linear, mlp, resnet18, vit",
        "scheduler: cosine, exponential, none, onecycle, plateau, step, warmup_cosine",
        "experiment: cnn, tutorial_linear, tutorial_mlp, tutorial_step",
        "trainer.batch_size=128\n    examples of one optimizer step",
        "(one of auto, cuda, xpu, mps, cpu)",
        "--config-dir",
    ):
        assert line in text or line in " ".join(text.split())  # explanations are wrapped
    assert "machine" not in text  # an option of other commands
    assert max(map(len, text.splitlines())) <= 80
    assert tree(tmp_path) == []


def test_a_folder_of_ones_own_choices(train, tmp_path_factory, tmp_path):
    mine = tmp_path_factory.mktemp("mine")
    (mine / "model").mkdir()
    (mine / "model/wide.yaml").write_text(
        "_target_: allranks.models.mlp\ninput_shape: [1, 28, 28]\nclasses: 10\nwidths: [200]\n"
    )
    run = train(*SMALL, "--config-dir", str(mine), "model=wide", "trainer.epochs=1").ok().run
    assert run.path.parent == tmp_path / "runs/wide"
    assert run.summary["model/parameters"] == 784 * 200 + 200 + 200 * 10 + 10


def test_a_sweep_trains_every_cell_in_a_directory_of_its_own(train, tmp_path):
    sweep = ("-m", *SMALL, "trainer.epochs=1", "model=linear,mlp", "seed=1,2")
    done = train(*sweep, ranks=2).ok()
    [listed] = tmp_path.glob("runs/sweep/*/cells.jsonl")
    cells = [json.loads(line) for line in listed.read_text().splitlines()]
    assert [cell["directory"] for cell in cells] == [f"{listed.parent}/{number}" for number in range(4)]
    assert [cell["overrides"][-2:] for cell in cells] == [
        [f"model={model}", f"seed={seed}"] for model in ("linear", "mlp") for seed in (1, 2)
    ]
    runs = [Run(Path(cell["directory"])) for cell in cells]
    assert [line[:8] for line in done.out.splitlines() if line.startswith("cell ")] == [
        f"cell {number}/4" for number in (1, 2, 3, 4)
    ]
    assert (
        "4 runs: all finished, 1 epoch each. They differ in model." in done.out
    )  # tests/test_comparing.py
    assert len({run.summary["model/sha256"] for run in runs}) == 4
    assert {run.summary["world_size"] for run in runs} == {2}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]  # no multirun/, no outputs/
    assert len(re.findall(r"^ +1/1 ", done.out, flags=re.M)) == 4


def test_a_run_that_a_launcher_froze_must_be_the_same_file(train, tmp_path):
    frozen = tmp_path / "run"
    frozen.mkdir()
    (frozen / "config.yaml").write_text(configs.freeze(one(*SMALL)))
    done = train("--frozen", str(frozen), "0" * 64)
    assert "config.yaml is not the configuration that was launched" in done.message
    assert done.code == 2
    assert tree(frozen) == ["config.yaml"]


# --- flags and overrides, in any order -----------------------------------------------------------------

FLAGS = st.sampled_from([["-m"], ["--cfg", "job"], ["--config-dir", "x=y"], ["-cn", "other"], ["--help"]])
OVERRIDES = st.sampled_from(["seed=1", "model=cnn", "+a.b=[1,2]", "~x", "job"])


@given(st.lists(st.one_of(FLAGS, OVERRIDES.map(lambda word: [word])), max_size=6))
def test_flags_and_overrides_may_be_mixed(words):
    flags, overrides = compose.split_flags([part for word in words for part in word])
    assert flags == [part for word in words if word[0].startswith("-") for part in word]
    assert overrides == [word[0] for word in words if not word[0].startswith("-")]


def test_where_the_data_are_is_no_part_of_what_is_computed():
    def of(*overrides: str) -> dict[str, Any]:
        [config] = from_command_line(["data=mnist", *overrides])
        return decisive_values(config)

    assert of("data.root=a", "data.fetch=false") == of("data.root=b")
    assert of("data=fashion_mnist") != of()


def test_where_validation_data_of_their_own_are_is_no_part_of_what_is_computed():
    """As for the training and test data."""
    config = one("+data.val={_target_: mylab.load, root: /here, fetch: true, seed: 3}")
    assert [key for key in decisive_values(config) if key.startswith("data.val.")] == [
        "data.val._target_", "data.val.seed",
    ]  # fmt: skip


def test_a_value_that_is_no_number_agrees_with_itself():
    """A user's own component may take NaN, as for missing values; each reading makes a new one."""
    there = decisive_values(one("+data.fill=nan", "+data.fills=[1,nan]"))
    here = decisive_values(one("+data.fill=nan", "+data.fills=[1,nan]"))
    assert configs.differing(there, here) == ""
    other = decisive_values(one("+data.fill=0", "+data.fills=[nan,1]"))
    assert configs.differing(there, other) == (
        "data.fill is nan there, not 0; data.fills is [1, nan] there, not [nan, 1]"
    )


def test_a_users_own_component_is_not_explained_with_our_words():
    mine = {"model._target_": "mylab.Net", "model.widths": 3}
    assert configs.setting_of("model.widths", mine) is None
    assert configs.setting_of("model.widths", {"model._target_": "allranks.models.mlp"}) is not None


@pytest.mark.parametrize(
    "words",
    [
        ["model=cnn", "scheduler=step", "tracker=[csv,jsonl]"],
        ["sharding=fsdp", "+model.nested={of: {}, lists: [1, [2.5, {a: b}], null]}", "+data.note=[]"],
    ],
    ids=["shipped", "a user's own keys"],
)
def test_the_values_under_their_keys_are_those_that_omegaconf_gives(words):
    config = one(*words)
    expected = configs.below(OmegaConf.to_container(OmegaConf.structured(config)))
    # As text, in which 1 and 1.0 differ, and a list and a tuple; in the same order.
    assert repr(configs.leaves(config)) == repr(expected)


def test_what_a_resume_must_agree_on_is_marked_at_the_keys():
    """All that decides what is computed, a user's own keys included; nothing of where and how it runs."""
    config = one("model=cnn", "optimizer=adam", "scheduler=step", "+data.workers=2", "+data.extra=1")
    free = set(configs.leaves(config)) - set(decisive_values(config))
    assert free == {
        "name", "runtime", "device", "oversubscribe", "threads", "resume", "run.dir", "trainer.nonfinite",
        "data.root", "data.train.root", "data.test.root", "data.workers",
        "data.fetch", "data.train.fetch", "data.test.fetch",
        "checkpoint.every_steps", "checkpoint.every_epochs", "checkpoint.every_s", "checkpoint.keep",
        "checkpoint.best",
        "watchdog.start_s", "watchdog.first_step_s", "watchdog.step_s", "watchdog.save_s",
        "console", "report", "profile", "trainer.log_every_steps", "trainer.detect_anomaly",
        "trainer.unused_parameters", "tracker.every_steps",
        "sharding.kind", "sharding.blocks", "sharding.min_parameters", "sharding.param_dtype",
        "sharding.reduce_dtype", "sharding.activation_checkpointing", "sharding.devices",
    }  # fmt: skip
    assert decisive_values(config)["data.extra"] == 1
