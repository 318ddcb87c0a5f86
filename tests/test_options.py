"""The one table of options: every command line, job script and Hydra launcher follows from it."""

from dataclasses import fields

import pytest

from allranks import cli
from allranks.base.errors import UserError
from allranks.launch import options
from allranks.submit.order import Order, with_options
from hydra_plugins.allranks_launcher import KEYS, AllranksLauncher


def parsed(command, *words):
    return options.parse(options.parser(command, "%(prog)s"), words)


def test_what_is_not_given_is_none_and_the_rest_is_left_alone():
    args, rest = parsed("submit", "--nodes", "2", "model=cnn", "-m", "--", "python", "--nodes", "3")
    assert (args.nodes, args.ranks, args.preflight) == (2, None, None)
    assert rest == ["model=cnn", "-m", "--", "python", "--nodes", "3"]
    assert parsed("launch", "--no-preflight")[0].preflight is False


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--nodes", "0"], "--nodes 0 is not valid: give a whole number >= 1"),
        (["--max-restarts", "-1"], "--max-restarts -1 is not valid: give a whole number >= 0"),
        (["--walltme", "1"], "Did you mean --walltime"),
        (["--hosts", "x"], "--hosts is not an option of `allranks submit`"),
        (["-n", "2x"], "-n 2x is not valid: give a whole number. `allranks submit --help` explains"),
        (["-n"], "-n expected one argument"),
        (["--after", ""], "--after '' is not valid: it is empty, so give ID"),
        (["--cell="], "--cell '' is not valid: it is empty, so give DIR"),
        (["--queue", " "], "--queue ' ' is not valid: it is empty, so give Q"),
        (["--cell=~nobody-at-all/x"], "--cell=~nobody-at-all/x: no home directory is known"),
    ],
)
def test_what_is_not_valid(words, said):
    with pytest.raises(UserError, match=said):
        parsed("submit", *words)


def test_the_home_directory_where_no_shell_puts_it(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    args, _ = parsed("submit", "--config-dir=~/conf", "--cell=~/runs/x", "--name=~")
    assert (args.config_dir, args.cell, args.name) == ("/home/me/conf", "/home/me/runs/x", "~")
    assert parsed("launch", "--run=~", "--hosts=/h")[0].run == "/home/me"


def test_words_give_the_values_back():
    values = {
        "nodes": 2,
        "ranks": 3,
        "launcher": "srun",
        "preflight": False,
        "dry_run": True,
        "name": "a b",
    }
    words = options.words(options.OPTIONS, values)
    args, rest = parsed("submit", *words)
    assert rest == []
    assert {name: value for name, value in vars(args).items() if value is not None} == values
    assert options.words(options.OPTIONS, {"preflight": True}) == []


def test_an_order_hands_all_that_a_job_needs_to_its_launch():
    given = {"machine": "polaris", "nodes": 2, "ranks": 6, "max_restarts": 3, "min_ranks": 2,
             "spares": 1, "idle": 600, "start_within": 300, "launcher": "mpiexec",
             "preflight": False, "walltime": "01:00:00", "cell": "x"}  # fmt: skip
    order = with_options(Order("", config_dir="/own"), given)
    args, _ = parsed("launch", *order.launch_words())
    kept = {name: value for name, value in vars(args).items() if value is not None}
    assert kept == {name: given[name] for name in given if name not in ("walltime", "cell")} | {
        "config_dir": "/own"
    }
    assert Order("polaris").launch_words(1) == ["--machine", "polaris"]
    assert Order("polaris", 2).launch_words(2) == ["--machine", "polaris", "--job-nodes", "2"]


def test_every_option_for_jobs_is_kept_in_an_order_and_is_one_of_hydras_launcher():
    kept = {field.name for field in fields(Order)}
    for option in options.OPTIONS:
        if option.in_job:
            assert option.launch and option.submit, option
            assert option.name in kept, option
            assert option.in_sweep, option
    in_sweep = {option.name for option in options.OPTIONS if option.in_sweep}
    assert set(KEYS) == in_sweep | {"_target_", "overrides"}


def test_hydras_launcher_hands_its_keys_on():
    keys = {key: value for key, value in KEYS.items() if key != "_target_"}
    local = AllranksLauncher(**keys | {"ranks": 4, "max_restarts": 2, "overrides": ["machine.x=1"]})
    assert local._command() == ["launch", "-n", "4", "--max-restarts", "2", "machine.x=1"]
    queued = AllranksLauncher(**keys | {"walltime": "00:05:00", "min_ranks": 2, "preflight": False})
    assert queued._command() == [
        "submit", "--walltime", "00:05:00", "--min-ranks", "2", "--no-preflight",
    ]  # fmt: skip
    with pytest.raises(Exception, match=r"hydra.launcher.account is for jobs that are queued"):
        AllranksLauncher(**keys | {"account": "x"})._command()


@pytest.mark.parametrize(
    "words",
    [
        [],
        *([each.name] for each in cli.COMMANDS if each.name != "train"),  # Hydra's: test_config.py
        ["checkpoint", "show"],
        ["data"],
        ["data", "fetch"],
    ],
    ids=lambda words: " ".join(words) or "allranks",
)
def test_each_help_says_what_the_command_does_and_fits_80_columns(words, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    with pytest.raises(SystemExit) as ended:
        cli.main([*words, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert said.startswith(" ".join(["usage: allranks", *words]))
    assert max(map(len, said.splitlines())) <= 80
    # A description stands between the usage and the first list.
    paragraphs = said.split("\n\n")
    assert not paragraphs[1].startswith(("options:", "positional arguments:"))
