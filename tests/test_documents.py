"""The documents say what is there."""

from __future__ import annotations

import re
import shlex
import subprocess
import textwrap
from typing import Any

import pytest

from allranks import config as configs
from allranks.base import errors
from allranks.base.errors import UserError
from allranks.base.schema import TEXT, Setting
from allranks.compose import as_override, from_command_line
from allranks.launch.command import launch
from allranks.submit.command import submit
from helpers import ROOT, SMALL, TRAIN, execute

PLACEHOLDERS = {"PATH", "RUN", "DIR", "..."}
NEED_MORE = {"--config-dir", "--config-path", "--hosts", "--cell"}


def commands(*words: str) -> list[str]:
    """The lines of code in README and docs that hold these words one after another.

    Lines with a placeholder are left out, and lines that need a file which the page lets its reader write.
    """
    found: list[str] = []
    for path in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        for line in re.findall(r"^ {4,}(\S.*)$", path.read_text(), flags=re.M):
            typed = line.split("#")[0].split()
            holds = any(tuple(typed[at : at + len(words)]) == words for at in range(len(typed)))
            left_out = {*PLACEHOLDERS, *NEED_MORE, "--help", "allranks:"} & set(typed)
            if holds and not left_out and "$n" not in line:
                found.append(line)
    return sorted(set(found))


def arguments_of(line: str, word: str) -> list[str]:
    typed = shlex.split(line, comments=True)
    return typed[typed.index(word) + 1 :]


def test_every_fault_has_its_row_and_every_test_it_names_is_there():
    text = (ROOT / "docs/reliability.md").read_text()
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", text, flags=re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 42))
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert {name for name in named if f"def {name}(" not in tests} == set()


def test_every_exit_code_has_its_row():
    codes = {number for name, number in vars(errors).items() if name.startswith("EXIT_")}
    table = (ROOT / "docs/reliability.md").read_text().partition("## Exit codes")[2].partition("\n## ")[0]
    assert codes <= {int(number) for number in re.findall(r"^\| (\d+) \|", table, flags=re.M)}


def reference_row(key: str, mark: Setting, defaults: dict[str, Any]) -> str:
    """A row of the tables in docs/configuration.md, from the marks at the key."""
    may_be = "any text" if mark.rule in (None, TEXT) else mark.rule.remedy
    if mark.optional:
        may_be += ", or null"
    default = f"`{as_override(defaults[key])}`" if key in defaults else ""
    going_on = "same" if configs.must_agree(key) else "free"
    return f"| `{key}` | {default} | {may_be} | {mark.doc} | {going_on} |"


def test_the_reference_has_a_row_for_every_key():
    """Where it fails, its message has the rows that are missing in docs/configuration.md."""
    [composed] = from_command_line(["model=cnn"])  # it changes no default outside its own section
    defaults = configs.leaves(composed)
    defaults["name"] = "the model's"
    of_components = ("model", "optimizer", "scheduler")
    marks = {**configs.settings(), **configs.COMPONENT_KEYS}
    sections = {key for key in marks if any(other.startswith(f"{key}.") for other in marks)}
    expected = {
        reference_row(key, mark, {} if key.startswith(of_components) else defaults)
        for key, mark in marks.items()
        if key not in sections
    }
    text = (ROOT / "docs/configuration.md").read_text()
    there = set(re.findall(r"^\| `.*\|$", text, flags=re.M))
    assert there == expected, "\n" + "\n".join(sorted(expected - there))


def test_links_between_documents_lead_somewhere():
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / link).exists(), (path, link)


def test_the_readmes_own_model_trains_as_typed(tmp_path):
    """The lines that make mine/model/wide.yaml are run by a shell, and the file is trained with."""
    text = (ROOT / "README.md").read_text()
    [lines] = re.findall(r"^    mkdir -p mine/model\n.*?^    END\n", text, flags=re.M | re.S)
    assert "python -m allranks.train --config-dir mine model=wide\n" in text
    subprocess.run(["bash", "-e"], input=textwrap.dedent(lines), text=True, cwd=tmp_path, check=True)
    small = [word for word in SMALL if not word.startswith("model=")]
    words = ["--config-dir", "mine", "model=wide", *small, "trainer.epochs=1"]
    done = execute([*TRAIN, *words], tmp_path).ok()
    parameters = 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10
    assert done.run.summary["model/parameters"] == parameters


@pytest.mark.parametrize("line", commands("allranks", "train") + commands("-m", "allranks.train"))
def test_a_training_that_the_documents_show_can_be_composed(line, capsys):
    arguments = arguments_of(line, "train" if "allranks train" in line else "allranks.train")
    if "optimiser=adam" in arguments:  # the README's own example of a mistake
        with pytest.raises(UserError, match="Did you mean optimizer"):
            from_command_line(arguments)
    else:
        assert from_command_line(arguments)


@pytest.mark.parametrize("line", commands("allranks", "launch"))
def test_a_launch_that_the_documents_show_can_be_planned(line, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for program in ("my_own_train.py", "train.py"):
        (tmp_path / program).touch()
    assert launch(["--dry-run", *arguments_of(line, "launch")]) == 0
    assert "-m allranks.launch.guard" in capsys.readouterr().out


@pytest.mark.parametrize("line", commands("allranks", "submit"))
def test_a_job_that_the_documents_show_can_be_scripted(line, monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr("allranks.submit.task.NODE_LOCAL", ())  # whichever folder the tests run in
    assert submit(["--dry-run", *arguments_of(line, "submit")]) == 0
    assert "allranks launch" in capsys.readouterr().out
