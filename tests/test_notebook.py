"""notebooks/tutorial.ipynb: its cells run, and the outputs that it keeps tell of digits only."""

from __future__ import annotations

import base64
import os
import re
import socket
import struct

import nbformat
import pytest

from helpers import PYTHON, ROOT, execute

NOTEBOOK = ROOT / "notebooks" / "tutorial.ipynb"
SMALL_DATA = "data=synthetic data.train.count=1600 data.split=[1200,400] data.test.count=400"
MOST_BYTES = 1_500_000  # GitHub shows a file of this size at once


def printed(notebook: nbformat.NotebookNode) -> str:
    """All text that the cells printed."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return "".join(output.get("text", "") for output in outputs)


def pictures(notebook: nbformat.NotebookNode) -> list[bytes]:
    """The PNG files that the cells drew."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    drawn = [output["data"]["image/png"] for output in outputs if "image/png" in output.get("data", {})]
    return [base64.b64decode(png) for png in drawn]


@pytest.mark.long
def test_the_notebook_runs_on_few_examples_and_its_last_cells_find_the_same_losses_on_two_ranks(tmp_path):
    """A cell that fails ends the script; the cell that compares both curves asserts that they agree."""
    to = tmp_path / "executed.ipynb"
    execute(
        [PYTHON, str(ROOT / "notebooks/execute.py"), "--to", str(to)], tmp_path, {"DATA": SMALL_DATA}, 560
    ).ok()
    executed = nbformat.read(to, as_version=4)
    kept = nbformat.read(NOTEBOOK, as_version=4)
    assert len(pictures(executed)) == len(pictures(kept)) > 8
    table = printed(executed).partition("validation loss, 2 ranks\n")[2].splitlines()[:5]
    for epoch, line in enumerate(table, start=1):
        number, one, two = line.split()
        assert int(number) == epoch
        assert float(one) == pytest.approx(float(two), rel=1e-12)


def test_the_kept_outputs_are_whole_and_small():
    assert NOTEBOOK.stat().st_size < MOST_BYTES
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert all(output.output_type != "error" for cell in code for output in cell.outputs)
    for png in pictures(notebook):
        width, height = struct.unpack(">II", png[16:24])  # of PNG's first chunk
        assert width <= 2000
        assert height <= 1000


def test_the_kept_outputs_tell_nothing_of_the_machine_that_made_them():
    text = printed(nbformat.read(NOTEBOOK, as_version=4))
    assert not re.findall(r"/(?:home|root|tmp|work|Users)/", text)
    for name in (socket.gethostname(), os.environ.get("USER", "")):
        assert not name or not re.search(rf"\b{re.escape(name)}\b", text)


def test_the_kept_outputs_are_those_of_real_digits():
    """The accuracies of the tutorial (docs/curves.md), and the equal curves on one and two ranks."""
    text = printed(nbformat.read(NOTEBOOK, as_version=4))
    assert "60,000 pictures for training and validation, 10,000 for the test" in text
    linear = float(re.findall(r"linear +test accuracy ([\d.]+) %", text)[0])
    mlp = float(re.findall(r"mlp +test accuracy ([\d.]+) %", text)[0])
    assert linear == pytest.approx(90.9, abs=0.5)
    assert mlp == pytest.approx(93.7, abs=0.8)
