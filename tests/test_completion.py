"""What the TAB key offers: from the commands' own parsers, in real shells."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from allranks import cli
from allranks.completion import command as completion
from helpers import PYTHON, ROOT, execute

COMMANDS = {each.name: cli._to_load(each) for each in cli.COMMANDS}
COMMANDS["data"] = cli._load_data


def offered(line: str) -> list[str]:
    return completion.candidates(line, COMMANDS)


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with three runs in it; the present folder."""
    for name in ("runs/mlp/one", "runs/mlp/two", "runs/sweep/0"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.yaml").touch()
    (tmp_path / "runs/mlp/logs").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_every_command_is_offered_and_every_one_has_its_options():
    names = [name for name in offered("allranks ") if not name.startswith("-")]
    assert names == sorted([*(each.name for each in cli.COMMANDS), "data"])
    for name in set(names) - {"train", "completion"}:
        assert "--help" in offered(f"allranks {name} --"), name


@pytest.mark.parametrize(
    ("line", "some"),
    [
        ("allranks pre", ["predict"]),
        ("allranks predict x --po", ["--polarity"]),
        ("allranks predict x --polarity ", ["auto", "keep", "invert"]),
        ("allranks predict x --data t", ["test", "train"]),
        ("allranks predict x data=", ["data=fashion_mnist", "data=mnist", "data=synthetic"]),
        ("allranks evaluate x data.ro", ["data.root="]),
        ("allranks data ", ["fetch", "verify"]),
        ("allranks data fetch --r", ["--root"]),
        ("allranks checkpoint ver", ["verify"]),
        ("allranks submit --machine pol", ["polaris"]),
        ("allranks completion z", ["zsh"]),
        ("allranks train model=r", ["model=resnet18"]),
        ("allranks train trainer.prec", ["trainer.precision="]),
        (
            "allranks train trainer.precision=f",
            [f"trainer.precision={n}" for n in ("fp64", "fp32", "fp16")],
        ),
        ("allranks train trainer.compile=", ["trainer.compile=true", "trainer.compile=false"]),
        ("allranks train optimizer.mo", ["optimizer.momentum="]),
        ("allranks train --mult", ["--multirun"]),
        ("allranks launch --dry-run model=c", ["model=cnn"]),
    ],
)
def test_a_word_is_completed(line, some):
    assert offered(line) == some


@pytest.mark.parametrize(
    "line",
    ["allranks launch -- pyth", "allranks export x --to ", "allranks predict x ", "allranks nothing x"],
)
def test_where_nothing_is_known_files_are_offered(line):
    assert offered(line) == []


def test_keys_are_offered_as_far_as_the_next_dot():
    assert {"model=", "model.", "trainer=", "trainer.", "seed="} <= set(offered("allranks train "))
    assert "data.train." in offered("allranks train data.")
    assert "data.train._target_=" in offered("allranks train data.train.")


def test_runs_are_offered_wherever_a_run_is_asked_for(runs):
    expected = {"runs/mlp/one", "runs/mlp/two", "runs/sweep/0"}
    for command in (
        "predict",
        "evaluate",
        "export",
        "report",
        "watch",
        "logs",
        "compare",
        "checkpoint show",
    ):
        assert set(offered(f"allranks {command} ")) == expected, command
    assert set(offered("allranks predict runs/m")) == {"runs/mlp/one", "runs/mlp/two"}
    assert offered(f"allranks predict {runs}/runs/s") == [f"{runs}/runs/sweep/0"]


@pytest.mark.parametrize("typed", [r"runs/a\ ", '"runs/a ', "'runs/a r"])
def test_a_run_with_a_blank_in_its_path_is_offered(typed, runs):
    (runs / "runs/a run").mkdir()
    (runs / "runs/a run/config.yaml").touch()
    assert offered(f"allranks report {typed}") == ["runs/a run"]


def test_what_is_offered_begins_as_it_is_typed(runs, monkeypatch):
    monkeypatch.setenv("HOME", str(runs))
    for typed in ("./runs/", "runs//", "~/runs/", "runs/./", "../*/runs/".replace("*", runs.name)):
        expected = {f"{typed}mlp/one", f"{typed}mlp/two", f"{typed}sweep/0"}
        assert set(offered(f"allranks report {typed}")) == expected, typed
    assert offered("allranks report ./runs/s") == ["./runs/sweep/0"]
    assert offered("allranks report runs/mlp/one/") == []
    assert offered("allranks report ~nobody-of-this-name/") == []


# --- in real shells --------------------------------------------------------------------------------------

# Readline is asked by the function that it would call itself.
BASH = """
eval "$(allranks completion bash)"
try() {
    COMP_LINE=$1 COMP_POINT=${#1} COMPREPLY=() COMP_WORDS=("${@:2}") COMP_CWORD=0
    _allranks allranks 2>/dev/null
    echo "${COMPREPLY[@]}"
}
try 'allranks predi'
try 'allranks train model=l'
try 'allranks predict runs/sw'
try 'allranks train trainer.precision=b'
try 'allranks predict runs/a'
try 'allranks predict runs/a\\ \\('
try 'allranks predict "runs/a (' '"runs/a ('
"""


def environment() -> dict[str, str]:
    path = f"{Path(PYTHON).parent}:/usr/local/bin:/usr/bin:/bin"
    return {"PATH": path, "PYTHONPATH": str(ROOT / "src")}


def test_bash_offers_what_follows_its_own_cut_at_the_equals_sign(runs):
    (runs / "runs/a (run)").mkdir()
    (runs / "runs/a (run)/config.yaml").touch()
    done = execute(["bash", "--norc", "-c", BASH], runs, environment()).ok()
    assert done.out.splitlines() == [
        "predict", "linear", "runs/sweep/0", "bf16", r"runs/a\ \(run\)", r"runs/a\ \(run\)", "runs/a (run)",
    ]  # fmt: skip


def shell(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"no {name}: apt-get install {name}")
    return found


def test_fish_offers_the_same(runs):
    lines = "allranks completion fish | source\n"
    for typed in ("allranks predi", "allranks train model=l", "allranks predict runs/sw"):
        lines += f"complete -C '{typed}'\n"
    env = {**environment(), "HOME": str(runs)}
    done = execute([shell("fish"), "--no-config", "-c", lines], runs, env).ok()
    assert done.out.splitlines() == ["predict", "model=linear", "runs/sweep/0"]


# A zsh at a pseudo-terminal, which is typed into: zsh completes nowhere else.
ZSH = """
zmodload zsh/zpty
zpty z "PS1=READY zsh -f -i"
wait_for() { local line all; repeat 200 { if zpty -r -t z line; then all+=$line; fi
    [[ $all == *$1* ]] && { print -r -- "$all"; return 0 }; sleep 0.1 }; print -r -- "GOT $all"; return 1 }
zpty -w z 'autoload -Uz compinit; compinit -u -D; eval "$(allranks completion zsh)"; echo SET""UP'
wait_for SETUP >/dev/null || exit 3
zpty -w -n z $'allranks predi\\t'
wait_for 'predict ' || exit 4
zpty -w -n z $'\\x15cd . && allranks comple\\t'
wait_for 'completion ' || exit 6
zpty -w -n z $'\\x15allranks train model=l\\t'
wait_for 'model=linear' || exit 5
zpty -d z
"""


def test_zsh_offers_the_same(runs):
    env = {**environment(), "HOME": str(runs), "TERM": "dumb"}
    done = execute([shell("zsh"), "-f", "-c", ZSH], runs, env)
    assert done.code == 0, (done.out, done.err)


@pytest.mark.parametrize("name", completion.SHELLS)
def test_each_script_is_one_that_its_shell_can_read(name, tmp_path, command):
    script = command(PYTHON, "-m", "allranks", "completion", name).ok().out
    (tmp_path / "script").write_text(script)
    execute([shell(name), "-n", "script"], tmp_path, environment()).ok()
