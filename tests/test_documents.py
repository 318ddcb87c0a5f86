"""The documents say what is there."""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from omegaconf import OmegaConf

from allranks import config as configs
from allranks.base import errors
from allranks.base.errors import UserError
from allranks.base.schema import TEXT, Setting
from allranks.compose import as_override, from_command_line
from allranks.job import machine as machines
from allranks.launch.command import launch
from allranks.submit.command import submit
from documents import (
    ASSUMED,
    LANGUAGES,
    NAMES,
    Block,
    Command,
    all_commands,
    blocks,
    commands,
    prepared,
    write_file,
)
from helpers import ROOT, SMALL, execute, execute_forked, only_long


class Unrun(NamedTuple):
    """Commands that no test runs as typed: why not, and how far they are tried instead."""

    pattern: str  # a regular expression, searched for in the command
    reason: str
    instead: Callable[[str], None]


def composed(line: str) -> None:
    """The training is composed from the command line, and its configuration checked."""
    typed = shlex.split(line, comments=True)
    word = "train" if "train" in typed else "allranks.train"
    words = [each for each in typed[typed.index(word) + 1 :] if each != "--debug"]
    if "--cfg" in words:  # that only shows it
        words = words[: words.index("--cfg")]
    assert from_command_line(words)


def planned(line: str) -> None:
    """`allranks launch` plans it, and shows the plan."""
    typed = shlex.split(line, comments=True)
    assert launch(["--dry-run", *typed[typed.index("launch") + 1 :]]) == 0


def scripted(line: str) -> None:
    """`allranks submit` writes the job script, and shows it."""
    typed = shlex.split(line, comments=True)
    assert submit(["--dry-run", *typed[typed.index("submit") + 1 :]]) == 0


def parsed(line: str) -> None:
    """Bash understands it, which has been checked when the command was found."""


def of_this_checkout(line: str) -> None:
    """The script that it starts is there."""
    script = next(word for word in shlex.split(line, comments=True) if "/" in word)
    assert (ROOT / script).is_file(), script


def no_such_cell(line: str) -> None:
    """`allranks submit` understands its options, and says that the directory is not that of a cell."""
    typed = shlex.split(line, comments=True)
    with pytest.raises(UserError, match=re.escape(typed[-1])):
        submit(typed[typed.index("submit") + 1 :])


OTHER_MACHINE = "aurora|polaris|sophia|perlmutter|frontier"
UNRUN = (
    Unrun(r"^scripts/(quickstart|test|chaos)", "takes minutes, in the checkout", of_this_checkout),
    Unrun(r"^python benchmarks/", "measures for minutes, on a quiet machine", of_this_checkout),
    Unrun(r"pip install|^python3? -m venv|^\. ", "installs from the network", parsed),
    Unrun(r"^(module|conda) |CRAY_LD_LIBRARY_PATH", "has a supercomputer's own commands", parsed),
    Unrun(r"^allranks data fetch", "fetches from the network", parsed),
    Unrun(r"^jupyter ", "opens a browser", parsed),
    Unrun(r"^wandb sync|^MLFLOW_\w+=true mlflow ui", "needs that server, or stays open", parsed),
    Unrun(r"^allranks submit .*--cell", "needs a queued job of that directory", no_such_cell),
    Unrun(r"^allranks cancel", "needs a queued job of that directory", parsed),
    Unrun(
        r"^allranks submit ",
        "needs a scheduler, as test_submit.py has",
        scripted,
    ),
    Unrun(rf"^allranks launch .*--machine ({OTHER_MACHINE})", "needs that supercomputer", planned),
    Unrun(
        r"^allranks launch .*--launcher srun",
        "needs a job of Slurm",
        planned,
    ),
    Unrun(r"^allranks launch .*--hosts", "needs several hosts", planned),
    Unrun(r"^allranks launch .*machine.options.mpiexec", "needs the mpiexec of that machine", planned),
    Unrun(r"device=cuda", "needs a GPU", composed),
)

# Commands that are to fail, with their exit code: a page's examples of mistakes.
EXIT_CODES = {"mpiexec -n 2 python -m allranks.train optimiser=adam": 2}


def unrun(command: Command) -> Unrun | None:
    """The row of the table that the command belongs to; None where it is run."""
    lines = "\n".join(command.lines)
    return next((row for row in UNRUN if re.search(row.pattern, lines, flags=re.M)), None)


def shown(*words: str) -> list[str]:
    """The simple commands of all pages that hold these words one after another; none with a variable."""
    found = set()
    for line in (line for command in all_commands() for line in command.lines):
        typed = line.split()
        holds = any(tuple(typed[at : at + len(words)]) == words for at in range(len(typed)))
        if holds and "$" not in line:
            found.add(line)
    return sorted(found)


def test_every_block_of_code_names_its_language():
    """Where it fails: put ``` and one of the languages before the block, and ``` behind it."""
    for block in (block for page in NAMES for block in blocks(page)):
        where = f"{block.page}, line {block.line}"
        assert block.language in LANGUAGES, f"{where}: {block.language!r} is not one of {sorted(LANGUAGES)}"
        if block.language == "console":
            assert block.text.startswith("$ "), f"{where}: a console block begins with a command after $"
        if block.language == "python":
            compile(block.text, where, "exec")
        if block.language == "yaml":
            assert OmegaConf.create(block.text), where


def test_a_loop_a_here_document_and_a_continued_line_are_one_command_each():
    loop = "for n in 1 2; do\n  echo $n\ndone\n"
    here = "cat > file << 'END'\na: b\nEND\n"
    continued = "echo one \\\n  two  # three\n"
    text = loop + here + continued + "# four\n"
    found = commands(Block("page.md", 1, "bash", text))
    assert [command.text.split("\n")[0] for command in found] == [
        "for n in 1 2; do",
        "cat > file << 'END'",
        "echo one \\",
    ]
    assert found[2].lines == ["echo one    two"]
    console = Block("page.md", 1, "console", "$ echo one\none\n$ true\n")
    assert [(c.text, c.prints) for c in commands(console)] == [("echo one", ("one",)), ("true", ())]


def test_every_reason_not_to_run_a_command_holds_for_some_command():
    used = {row.pattern for command in all_commands() if (row := unrun(command))}
    assert {row.pattern for row in UNRUN} == used
    assert set(EXIT_CODES) <= {command.text for command in all_commands()}


@pytest.mark.parametrize("command", [c for c in all_commands() if unrun(c)], ids=lambda c: c.text[:60])
def test_what_cannot_be_run_here_is_tried_as_far_as_it_can(command, tmp_path, monkeypatch, capsys):
    row = unrun(command)
    assert row is not None
    assert len(command.lines) == 1 or row.instead is parsed, "one command of several lines: write several"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("allranks.submit.task.NODE_LOCAL", ())  # whichever folder the tests run in
    for name in ASSUMED:
        (tmp_path / name).touch()
    (tmp_path / "hosts.txt").write_text("node1:16\n")
    row.instead(command.lines[0])


PAGES_WITH_COMMANDS = [
    page
    for page in NAMES
    if any(b.language == "python" for b in blocks(page))
    or any(c.page == page and not unrun(c) for c in all_commands())
]
QUICK = ("docs/run-directory.md",)


@pytest.mark.parametrize(
    "page", [page if page in QUICK else only_long(page) for page in PAGES_WITH_COMMANDS]
)
def test_the_commands_and_the_python_of_a_page_run_as_typed(page, tmp_path):
    """In the order of the page, in one folder, as a reader would type them."""
    here = tmp_path / "here"
    with prepared(tmp_path, page) as environment:
        for block in blocks(page):
            if block.file is not None:
                write_file(block, tmp_path)
            elif block.language == "python":
                execute(["env", "python", "-c", block.text], here, environment).ok()
            elif block.language in ("bash", "console"):
                for command in commands(block):
                    if unrun(command) is None:
                        check(command, here, environment)


def test_every_python_file_that_a_page_shows_is_run():
    """By a command of the page, as a part of what one runs, or by a test that takes it from the page."""
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for page in PAGES_WITH_COMMANDS:
        run = [c.text for c in all_commands() if c.page == page and not unrun(c)]
        for block in blocks(page):
            if block.language != "python" or block.file is None:
                continue
            path = Path(block.file)
            others = [other.text for other in blocks(page) if other is not block]
            is_used = any(path.stem in text for text in [*run, *others])
            assert is_used or f'"{path.name}")' in tests, (page, block.file)


def check(command: Command, here: Path, environment: dict[str, str]) -> None:
    """Runs the command; compares its exit code, and allranks's messages with those that the page shows."""
    done = execute(["bash", "-c", command.text], here, environment)
    told = f"{command.page}: {command.text}\nexit code {done.code}\n{done.out}\n{done.err}"
    expected = EXIT_CODES.get(command.text, 0)
    if command.text.startswith("allranks runs") and "holds no run" in done.err:
        expected = 2  # what the page submits is not run here, so there is no run
    assert done.code == expected, told
    for line in command.prints:
        if line.startswith("allranks: "):
            assert line in done.messages, told


def test_every_fault_has_its_row_and_every_test_it_names_is_there():
    text = (ROOT / "docs/reliability.md").read_text()
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", text, flags=re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 43))
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
    for path in [*ROOT.glob("*.md"), *ROOT.glob("docs/**/*.md")]:
        for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", path.read_text()):
            assert (path.parent / link).exists(), (path, link)


def test_the_readmes_own_model_trains(tmp_path):
    """The lines that make mine/model/wide.yaml are run by a shell; on fewer examples than with --long."""
    [block] = [block for block in blocks("README.md") if "mine/model" in block.text]
    *making, training = commands(block)
    assert training.text.endswith("python -m allranks.train --config-dir mine model=wide")
    for command in making:
        subprocess.run(["bash", "-e", "-c", command.text], cwd=tmp_path, check=True)
    small = [word for word in SMALL if not word.startswith("model=")]
    words = ["--config-dir", "mine", "model=wide", *small, "trainer.epochs=1"]
    done = execute_forked(["-m", "allranks.train", *words], 1, tmp_path).ok()
    parameters = 784 * 512 + 512 + 512 * 512 + 512 + 512 * 10 + 10
    assert done.run.summary["model/parameters"] == parameters


def queue_rows(machine: machines.Machine) -> list[str]:
    """The rows of the table of queues on the machine's page, from its machine file."""
    return [
        f"| `{name}` | {span(limit)} | {hours(limit)} | {notes(machine, name)} |"
        for name, queue in machine.queues.items()
        for limit in queue.limits or (None,)
    ]


def span(limit: machines.Limit | None) -> str:
    """How many nodes the limit is for, as the page says it; None where no limit is known."""
    if limit is None:
        return "not known"
    if limit.max_nodes is None:
        return f"{limit.min_nodes} and more"
    if limit.max_nodes == limit.min_nodes:
        return str(limit.min_nodes)
    return f"{limit.min_nodes} to {limit.max_nodes}"


def hours(limit: machines.Limit | None) -> str:
    return "not known" if limit is None or limit.max_hours is None else f"{limit.max_hours:g}"


def notes(machine: machines.Machine, name: str) -> str:
    """What else the page says of the queue."""
    queue = machine.queues[name]
    found = []
    if name == machine.queue:
        found.append("taken without `--queue`")
    if queue.jobs_per_user:
        jobs = "job" if queue.jobs_per_user == 1 else "jobs"
        found.append(f"{queue.jobs_per_user} {jobs} of a user at a time")
    if queue.ranks_per_chunk:
        found.append(f"{queue.ranks_per_chunk} rank in each chunk")
    return "; ".join(found)


@pytest.mark.parametrize("name", OTHER_MACHINE.split("|"))
def test_a_clusters_page_has_the_module_lines_and_the_queues_of_the_machine_file(name):
    machine = machines.load(name)
    page = f"docs/clusters/{name}.md"
    text = (ROOT / page).read_text()
    assert [row for row in text.split("\n") if re.match(r"\| `[\w-]+` \| (\d|not)", row)] == queue_rows(
        machine
    )
    first = next(block for block in blocks(page) if block.language == "bash")
    assert first.text.startswith("\n".join(machine.setup) + "\npython -m venv --system-site-packages env\n")
    submitted = [command for command in all_commands() if command.page == page and "submit" in command.text]
    assert submitted
    assert all(f"--machine {name} " in command.text for command in submitted)


@pytest.mark.parametrize(
    "line",
    [
        only_long(line) if " seed=0,1,2 " in line else line  # of such a sweep it composes many cells
        for line in shown("allranks", "train") + shown("-m", "allranks.train")
    ],
)
def test_a_training_that_the_documents_show_can_be_composed(line, tmp_path, monkeypatch):
    """The quick part of what --long runs."""
    if "--help" in line or re.search(r"--config-(dir|path)", line):
        pytest.skip("needs files that the page lets its reader make: run with --long")
    monkeypatch.chdir(tmp_path)
    if "optimiser=adam" in line:  # the README's own example of a mistake
        with pytest.raises(UserError, match="Did you mean optimizer"):
            composed(line)
    else:
        composed(line)


@pytest.mark.parametrize("line", shown("allranks", "launch"))
def test_a_launch_that_the_documents_show_can_be_planned(line, tmp_path, monkeypatch, capsys):
    if "--config-dir" in line:
        pytest.skip("needs files that the page lets its reader make: run with --long")
    monkeypatch.chdir(tmp_path)
    shown_files = [block.file for page in NAMES for block in blocks(page) if block.language == "python"]
    for name in [*ASSUMED, *filter(None, shown_files)]:
        if "/" not in name:
            (tmp_path / name).touch()
    (tmp_path / "hosts.txt").write_text("node1:16\n")
    planned(line)
    assert "-m allranks.launch.guard" in capsys.readouterr().out
