"""The one table of options: every command line, job script and Hydra launcher follows from it."""

import json
import os
import signal
from dataclasses import fields

import pytest

from allranks import cli
from allranks.base.errors import UserError
from allranks.launch import options
from allranks.submit import task
from allranks.submit.order import Order, with_options
from helpers import PYTHON, execute
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


def test_a_folder_given_anew_is_taken_with_its_whole_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    order = with_options(Order("mine", config_dir="/own"), {"config_dir": "other", "nodes": None})
    assert order.config_dir == f"{tmp_path}/other"


@pytest.mark.parametrize(("flag", "console"), [("-q", "quiet"), ("-v", "verbose")])
def test_how_much_a_program_shows_is_kept_for_its_job(flag, console):
    order = with_options(Order("polaris"), vars(parsed("submit", flag)[0]))
    assert order.launch_words(1) == ["--machine", "polaris", flag]
    assert order.as_kept()["console"] == console
    assert "console" not in Order("polaris").as_kept()  # which an earlier version could not read


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


# --- the door ---------------------------------------------------------------------------------------------


def typed_with_stubs(folder, words, **stubs):
    """`allranks WORDS` as a process in the folder, with these shell scripts as commands on its PATH."""
    (folder / "bin").mkdir()
    for name, script in stubs.items():
        (folder / "bin" / name).write_text(f"#!/bin/sh\n{script}\n")
        (folder / "bin" / name).chmod(0o755)
    path = f"{folder}/bin:{os.environ['PATH']}"
    return execute([PYTHON, "-m", "allranks", *words], folder, {"PATH": path})


def make_job(run):
    """A run directory of a job of PBS."""
    run.mkdir(parents=True)
    job = {
        "scheduler": "pbs",
        "job_ids": ["7.pbs"],
        "program": ["true"],
        "order": {"machine": "generic_pbs"},
    }
    job["order"]["machine_overrides"] = []
    (run / "job.json").write_text(json.dumps(job))
    return run


def test_ctrl_c_ends_a_command_with_one_line(tmp_path):
    """While it waits for qstat, which here sends the signal itself."""
    make_job(tmp_path / "run")
    done = typed_with_stubs(tmp_path, ["cancel", "run"], qstat="kill -INT $PPID; exec sleep 1")
    assert done.err == "allranks: interrupted by Ctrl-C\n"
    assert done.code == -signal.SIGINT


def test_a_full_disk_and_an_encoding_without_accents_end_no_command_with_a_traceback(tmp_path):
    make_job(tmp_path / "runs/caf\u00e9")
    runs = f"'{PYTHON}' -m allranks runs"
    shell = f"export PYTHONIOENCODING=ascii; {runs}; {runs} > /dev/full"
    (tmp_path / "qstat").write_text("#!/bin/sh\nexit 153\n")
    (tmp_path / "qstat").chmod(0o755)
    done = execute(["sh", "-c", shell], tmp_path, {"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    assert "caf\\xe9" in done.out
    assert done.err == (
        "allranks: the output of this command cannot be written (No space left on device): free some space "
        "or quota.\n"
    )
    assert done.code == 1


@pytest.mark.parametrize(
    "words",
    [
        ["launch", "--dry-run", "model=linear"],
        ["submit", "--machine", "generic_pbs", "--walltime", "00:10:00", "--dry-run", "--", "true"],
        ["data", "verify"],
    ],
    ids=lambda words: words[0],
)
def test_a_present_directory_that_has_been_removed_is_said(words, tmp_path, monkeypatch, capsys):
    (tmp_path / "gone").mkdir()
    monkeypatch.chdir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 2
    assert "The present directory has been removed: `cd` into" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("root", "said"),
    [("~nobody-at-all/x", "--root=~nobody-at-all/x: no home directory is known"), ("", "--root is empty")],
)
def test_a_root_for_data_that_is_none(root, said, capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main(["data", "verify", "--root", root])
    assert ended.value.code == 2
    assert said in capsys.readouterr().err


def test_a_job_that_is_queued_again_takes_another_folder_of_machines(tmp_path, monkeypatch, capsys):
    """And how much a program shows, which a training has in its frozen configuration."""
    run = make_job(tmp_path / "run")
    (tmp_path / "mine/machine").mkdir(parents=True)
    (tmp_path / "mine/machine/mypbs.yaml").write_text("scheduler: pbs\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(task, "NODE_LOCAL", (str(tmp_path),))
    words = ["submit", "--cell", str(run), "--config-dir", "mine", "--machine", "mypbs", "-q", "--dry-run"]
    with pytest.raises(SystemExit) as ended:
        cli.main(words)
    assert ended.value.code == 0
    out = capsys.readouterr().out
    assert f"--machine mypbs --config-dir {tmp_path}/mine -q" in out
    assert f"Note: {run} is in {tmp_path}, which each node has for itself" in out


def test_how_much_a_training_shows_is_frozen(tmp_path, capsys):
    run = make_job(tmp_path / "run")
    job = json.loads((run / "job.json").read_text())
    (run / "job.json").write_text(json.dumps(job | {"program": []}))
    with pytest.raises(SystemExit):
        cli.main(["submit", "--cell", str(run), "-v", "--dry-run"])
    assert "-v cannot be given with --cell: its configuration is frozen" in capsys.readouterr().err
