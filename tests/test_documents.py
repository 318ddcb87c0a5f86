"""The documents say what is there."""

from __future__ import annotations

import re
import subprocess
import textwrap

from helpers import ROOT, SMALL, TRAIN, execute


def test_every_fault_has_its_row_and_every_test_it_names_is_there():
    text = (ROOT / "docs/reliability.md").read_text()
    rows = re.findall(r"^\| (\d+) \|.*\| ([^|]*) \|$", text, flags=re.M)
    assert [int(number) for number, _ in rows] == list(range(1, 42))
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    named = set(re.findall(r"`(test_\w+)`", text))
    assert {name for name in named if f"def {name}(" not in tests} == set()


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
