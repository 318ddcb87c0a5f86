"""`allranks report`: the page of a run says what its records say, whatever state the run is in."""

from __future__ import annotations

import html
import itertools
import json
import os
import re
import shutil
import struct
import time
import zlib
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from allranks.base.errors import UserError
from allranks.base.processes import cpu_ranges
from allranks.job.identity import RankIdentity
from allranks.report import at_end, curves, examine, pictures
from allranks.report.command import report
from allranks.report.gather import gather
from allranks.report.html import Html, tag
from allranks.report.page import page as page_of
from allranks.report.png import png
from conftest import EVIL
from helpers import NO_REPORT, PYTHON, SMALL, Run, execute_forked, tree

# One worker trains the run that most of these tests look at, once for them and the tests in a browser.
pytestmark = pytest.mark.xdist_group("report")
WITH_REPORT = tuple(word for word in SMALL if word != NO_REPORT)
REPORT = ["-m", "allranks", "report"]
MOST_BYTES = 3_000_000
CURVES = {"loss", "accuracy", "learning-rate", "throughput", "phases"}
STRIPS = {"training-examples", "predictions", "misclassified", "certain-mistakes"}


class Reader(HTMLParser):
    """Reads a page: its elements, its headings, its addresses, and its tables by their names."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.tables: dict[str, list[list[str]]] = {}
        self.headings: list[tuple[int, str]] = []
        self._cells: list[list[str]] = []
        self._text: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        found = dict(attributes)
        self.elements.append((tag, found))
        if found.get("role") == "region":
            self._cells = self.tables.setdefault(str(found["aria-label"]), [])
        if tag == "tr":
            self._cells.append([])
        if tag in ("th", "td", "h1", "h2", "h3"):
            self._text = []

    def handle_endtag(self, tag: str) -> None:
        text = "".join(self._text)
        if tag in ("th", "td") and self._cells:
            self._cells[-1].append(text)
        if tag == "table":
            self._cells = []
        if re.fullmatch("h[1-6]", tag):
            self.headings.append((int(tag[1]), text))

    def handle_data(self, text: str) -> None:
        self._text.append(text)

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


@pytest.fixture(scope="module")
def run(reported) -> Run:
    return Run(reported.cwd / "run")


@pytest.fixture(scope="module")
def text(run) -> str:
    return (run.path / "report.html").read_text()


@pytest.fixture(scope="module")
def page(text) -> Reader:
    return Reader(text)


@pytest.fixture
def copy(run, tmp_path) -> Path:
    """A copy of the finished run, to be harmed, without its report."""
    shutil.copytree(run.path, tmp_path / "copy")
    (tmp_path / "copy/report.html").unlink()
    shutil.rmtree(tmp_path / "copy/report")
    return tmp_path / "copy"


def made(directory: Path, passes: bool = True) -> Reader:
    """The page that `allranks report` makes of the run in this process.

    Without `passes` it is made of the records alone, in a third of the time.
    """
    return Reader(report(directory, directory, passes=passes).read_text())


# --- at the end of a run -------------------------------------------------------------------------------


def test_a_run_ends_with_its_page_and_says_where_it_is(reported, run):
    assert f"report      {run.path / 'report.html'}" in re.sub(" {6,}", "      ", reported.out)
    assert reported.err == ""
    assert reported.left_running == []


def test_the_pictures_lie_beside_it_as_png_and_svg(run):
    names = CURVES | STRIPS | {"confusion", "weights"}
    assert {path.stem for path in (run.path / "report").glob("*.png")} == names
    assert {path.stem for path in (run.path / "report").glob("*.svg")} == names
    for path in (run.path / "report").glob("*.svg"):
        assert ElementTree.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg"
    for path in (run.path / "report").glob("*.png"):
        assert min(size_of(path.read_bytes())) > 100


def size_of(content: bytes) -> tuple[int, int]:
    """Width and height of a PNG file, after checking each of its parts."""
    assert content.startswith(b"\x89PNG\r\n\x1a\n")
    at, kinds, sizes = 8, [], (0, 0)
    while at < len(content):
        (length,) = struct.unpack(">I", content[at : at + 4])
        kind, body = content[at + 4 : at + 8], content[at + 8 : at + 8 + length]
        assert struct.unpack(">I", content[at + 8 + length : at + 12 + length])[0] == zlib.crc32(
            kind + body
        )
        kinds.append(kind)
        if kind == b"IHDR":
            sizes = struct.unpack(">II", body[:8])
        at += 12 + length
    assert kinds[0] == b"IHDR"
    assert kinds[-1] == b"IEND"
    return sizes


def test_a_run_without_a_report_leaves_none(train):
    done = train(*SMALL, "model=linear", "trainer.epochs=1", "run.dir=run").ok()
    assert not [name for name in tree(done.cwd) if "report" in name]
    assert "report.html" not in done.out


def test_whatever_the_report_does_the_run_has_finished(train, tmp_path):
    (tmp_path / "matplotlib.py").write_text("raise RuntimeError('broken in a way that nobody foresaw')\n")
    words = [*WITH_REPORT, "report=true", "model=linear", "trainer.epochs=1", "run.dir=run"]
    done = train(*words, env={"PYTHONPATH": str(tmp_path)}).ok()
    assert done.run.summary["state"] == "finished"
    assert done.messages == [
        "allranks: no report was made (RuntimeError: broken in a way that nobody foresaw): "
        f"allranks report {tmp_path / 'run'}"
    ]
    assert done.err.count("\n") == 1
    assert done.left_running == []


def test_no_report_is_begun_shortly_before_the_jobs_end(train, tmp_path):
    words = [*WITH_REPORT, "report=true", "model=linear", "trainer.epochs=1", "run.dir=run"]
    within_s = at_end.LIMIT_S / 2
    done = train(*words, env={"ALLRANKS_DEADLINE": str(int(time.time() + within_s))}).ok()
    later = f"allranks report {tmp_path}/run"
    assert done.message == f"allranks: the job ends too soon for a report; later: {later}"
    assert not (tmp_path / "run/report.html").exists()


def test_a_page_that_takes_too_long_is_given_up(copy):
    made = at_end.make_pages([str(copy)], 0.3, lambda: False, os.environ)
    assert made == at_end.Made([], "it was not done within 0.3 s")
    assert not (copy / "report.html").exists()


def test_a_signal_ends_the_making_of_a_page_at_once(copy):
    made = at_end.make_pages([str(copy)], 60, lambda: True, os.environ)
    assert made == at_end.Made([], "this process was told to end")


def test_without_a_folder_for_temporary_files_no_page_is_made_and_no_error_raised(tmp_path, monkeypatch):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "gone"))
    made = at_end.make_pages(["run"], 10, lambda: False, os.environ)
    assert made.pages == []
    assert made.problem.startswith(f"{tmp_path}/gone")
    assert made.problem.endswith("No such file or directory")


def test_under_srun_the_time_is_shorter():
    alone, one_of_two = RankIdentity("srun"), RankIdentity("srun", rank=0, world_size=2)
    assert at_end.limit_s(1, alone) == at_end.LIMIT_S
    assert at_end.limit_s(1, one_of_two) == at_end.SRUN_LIMIT_S
    assert at_end.limit_s(3, RankIdentity("none")) == at_end.LIMIT_S + 2 * at_end.FURTHER_S


@pytest.mark.long
def test_a_sweep_makes_the_page_of_each_of_its_runs(train, tmp_path):
    words = [*WITH_REPORT, "report=true", "trainer.epochs=1", "run.dir=sweep", "-m", "model=linear,mlp"]
    train(*words, under="mpiexec", ranks=2).ok()
    assert Reader((tmp_path / "sweep/0/report.html").read_text()).headings[0] == (1, "linear")
    assert Reader((tmp_path / "sweep/1/report.html").read_text()).headings[0] == (1, "mlp")


@pytest.mark.long
def test_a_launch_makes_the_page_and_knows_what_was_given(command, tmp_path):
    words = [*WITH_REPORT, "model=linear", "trainer.epochs=1", "run.dir=run"]
    done = command(PYTHON, "-m", "allranks", "launch", "-n", "2", "--no-preflight", *words).ok()
    assert done.left_running == []
    text = (tmp_path / "run/report.html").read_text()
    assert "<code>trainer.epochs=1</code>" in text


# --- what the page says --------------------------------------------------------------------------------


def test_the_page_shows_the_figures_of_the_records(run, page, text):
    rows = page.tables["Loss by epoch"]
    assert rows[0] == ["epoch", "training", "validation"]
    for row, line in zip(rows[1:], run.metrics, strict=True):
        assert row == [str(line["epoch"]), f"{line['train/loss']:.4f}", f"{line['val/loss']:.4f}"]
    for row, line in zip(page.tables["Accuracy by epoch"][1:], run.metrics, strict=True):
        assert row[1:] == [f"{line['train/accuracy']:.2f}", f"{line['val/accuracy']:.2f}"]
    for row, line in zip(page.tables["Time and throughput by epoch"][1:], run.metrics, strict=True):
        together = line["throughput/samples_per_s"]
        assert row[3:] == [f"{together:,.0f}", f"{together / 2:,.0f}"]
    assert f"{run.summary['test/accuracy']:.2f} %" in text
    assert f"{run.summary['model/parameters']:,}" in text


def test_the_phases_add_up_to_the_whole_run(run):
    spent = curves.phases_s(gather(run.path))
    assert list(spent) == ["Start", "Training", "Evaluation", "Saving, test and the rest"]
    assert sum(spent.values()) == pytest.approx(run.summary["time/total_s"])
    assert spent["Training"] == pytest.approx(sum(run.column("time/train_s")))


def test_the_confusion_matrix_counts_each_test_example_once(run, page):
    heads, *rows = page.tables["Confusion matrix"]
    assert heads[1:] == [str(number) for number in range(10)]
    counts = np.array([[int(cell.replace(",", "")) for cell in row[1:]] for row in rows])
    assert counts.sum() == run.summary["test/count"]
    assert 100 * np.trace(counts) / counts.sum() == pytest.approx(run.summary["test/accuracy"])

    for row, (number, figures) in zip(
        page.tables["Precision, recall and F1 of each class"][1:], enumerate(counts), strict=True
    ):
        right = counts[number, number]
        precision, recall = right / counts[:, number].sum(), right / figures.sum()
        f1 = 2 * precision * recall / (precision + recall)
        assert row[1:4] == [f"{100 * value:.1f}" for value in (precision, recall, f1)]


def test_long_names_of_classes_leave_room_for_the_confusion_matrix():
    """Data sets of torchvision have several names for a class, in one text."""
    names = ["tench", "('English springer', 'English springer spaniel', 'Spaniel')"]
    counts = np.array([[3, 1], [0, 4]])
    seen = examine.Examined(
        step=1, epoch=1, count=8, loss=0.5, accuracy=87.5, classes=names, confusion=counts,
        per_class=examine.per_class(counts, names), training_digits=[], predictions=[], misclassified=[],
        most_certain_mistakes=[], weights=[], remarks=[],
    )  # fmt: skip
    words = re.findall(r">([^<>]+)</text>", pictures.confusion(seen).svg)
    assert words.count("tench") == words.count(html.escape("('English springe...", quote=False)) == 2


def test_a_class_that_is_never_met_has_no_ratio():
    counts = np.array([[3, 1, 0], [0, 4, 0], [0, 0, 0]])
    first, second, third = examine.per_class(counts, ["a", "b", "c"])
    assert (first.precision, first.recall, first.mistaken_for) == (100.0, 75.0, "b")
    assert (second.precision, second.recall, second.mistaken_for) == (80.0, 100.0, "")
    assert (third.precision, third.recall, third.f1, third.count) == (None, None, None, 0)


def test_the_strips_show_what_the_notebook_shows(page):
    words = [str(image["alt"]) for image in page.named("img")]
    assert sum(word.startswith("example ") for word in words) == 10
    assert sum(word.startswith("weights of class ") for word in words) == 10
    told = [re.fullmatch(r"test example (\d+), predicted (\d), true (\d)", word) for word in words]
    predictions, mistakes = told[10:20], [found for found in told[20:] if found]
    assert [int(found[1]) for found in predictions if found] == list(range(10))
    assert mistakes
    assert all(found[2] != found[3] for found in mistakes)


def test_the_page_says_where_the_ranks_were_and_what_was_given(run, page, text):
    ranks = page.tables["Ranks, hosts and devices"]
    host = run.environment["ranks"][0]["host"]
    cpus = cpu_ranges(os.sched_getaffinity(0))
    assert ranks[1:] == [["0", host, "cpu", cpus], ["1", host, "cpu", cpus]]
    assert "<code>trainer.epochs=3</code>" in text
    assert '<tr class="given"><th scope="row">epochs</th><td>3</td></tr>' in text
    assert '<tr><th scope="row">batch_size</th><td>128</td></tr>' in text
    assert run.environment["versions"]["torch"] in text


def test_a_page_asks_for_nothing_and_is_small(page, text):
    assert len(text.encode()) < MOST_BYTES
    assert not re.search(
        r"https?://|//[a-z]+\.|@import|<link|<script|<iframe|javascript:", text.replace(EVIL, "")
    )
    addresses = [a[name] for _, a in page.elements for name in ("src", "href") if name in a]
    assert addresses
    assert all(str(address).startswith(("#", "data:image/png;base64,")) for address in addresses)


def test_names_from_outside_stay_text(text):
    assert EVIL not in text
    assert html.escape(EVIL) in text


def test_headings_are_in_order_and_ids_are_unique(page):
    levels = [level for level, _ in page.headings]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    ids = [str(attributes["id"]) for _, attributes in page.elements if "id" in attributes]
    assert len(ids) == len(set(ids))
    assert {str(link["href"])[1:] for link in page.named("a")} <= set(ids)
    for svg in page.named("svg"):
        assert svg["role"] == "img"
        assert set(str(svg["aria-labelledby"]).split()) <= set(ids)


# --- runs that are not whole ---------------------------------------------------------------------------


@pytest.mark.long
def test_a_run_that_went_on_shows_its_interruptions(train, tmp_path):
    words = [*SMALL, "model=linear", "run.dir=run", "trainer.epochs=4", "checkpoint.every_epochs=1"]
    late = {"ALLRANKS_DEADLINE": "1"}  # long ago: the run stops as soon as it has gained something
    assert train(*words, env=late).code == 85
    train(*words).ok()
    stopped, resumed = gather(tmp_path / "run").events
    assert (stopped.kind, stopped.why) == ("stopped", "the job's end")
    assert (resumed.kind, resumed.step) == ("resumed", stopped.step)
    rows = made(tmp_path / "run", passes=False).tables["Interruptions and resumes"]
    assert [row[1:5] for row in rows[1:]] == [
        ["stopped and saved", str(stopped.step), str(stopped.epoch), "1"],
        ["went on", str(stopped.step), str(stopped.epoch), "1"],
    ]


def test_a_run_that_went_on_with_more_ranks_has_the_mean_of_those_that_it_had(tmp_path):
    lines = [
        {"epoch": epoch, "step": 10 * epoch, "time/train_s": 1.0, "throughput/samples_per_s": speed}
        for epoch, speed in enumerate([200.0, 200.0, 400.0], start=1)
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "environment.json").write_text('{"world_size": 4}')
    stopped = {"event": "stopped", "step": 25, "epoch": 2, "world_size": 2}
    resumed = {**stopped, "event": "resumed", "world_size": 4}
    again = {"event": "resumed", "step": 15, "epoch": 1, "world_size": 1}
    for events, means in [
        ([stopped, resumed], ["100", "100", "100"]),
        ([resumed], ["-", "-", "100"]),  # the first start was killed: nothing tells its number of ranks
        ([resumed, again], ["-", "200", "400"]),
    ]:
        (tmp_path / "events.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events))
        facts = gather(tmp_path)
        table = Reader(page_of(facts, None, [], [])).tables["Time and throughput by epoch"]
        assert [row[-1] for row in table[1:]] == means
        described = curves.throughput(facts).description
        assert "all ranks: 200 examples/s after epoch 1, 400 examples/s after epoch 3" in described


def test_a_run_that_was_cut_off_is_shown_up_to_there(copy):
    (copy / "summary.json").unlink()
    page = made(copy)
    assert len(page.tables["Loss by epoch"]) == 4
    assert "Confusion matrix" in page.tables  # by its newest checkpoint
    assert gather(copy).state == "stopped"


def test_a_run_without_a_checkpoint_has_no_test_set(copy):
    (copy / "summary.json").unlink()
    shutil.rmtree(copy / "checkpoints")
    done = execute_forked([*REPORT, str(copy)], 1, copy.parent).ok()
    assert "has no checkpoint yet" in done.message
    page = Reader((copy / "report.html").read_text())
    assert "Confusion matrix" not in page.tables
    assert len(page.tables["Loss by epoch"]) == 4


def test_damaged_records_cost_only_what_they_hold(copy):
    lines = (copy / "metrics.jsonl").read_text().splitlines(keepends=True)
    (copy / "metrics.jsonl").write_text(lines[0] + "{half a li\n" + lines[2] + '{"epoch": 4, "st')
    (copy / "environment.json").write_text("[]")
    (copy / "config.yaml").write_text("trainer: [unclosed\n")
    facts = gather(copy)
    assert [epoch["epoch"] for epoch in facts.epochs] == [1, 3]
    assert [problem.split(" cannot be read")[0] for problem in facts.problems] == [
        "environment.json", "config.yaml", "metrics.jsonl",
    ]  # fmt: skip
    page = made(copy, passes=False)
    assert len(page.tables["Loss by epoch"]) == 3
    assert "Ranks, hosts and devices" not in page.tables


def test_numbers_that_are_none_leave_gaps(copy):
    first, *others = [json.loads(line) for line in (copy / "metrics.jsonl").read_text().splitlines()]
    first |= {"train/loss": None, "val/loss": "much", "lr": 10**400, "val/accuracy": True}
    (copy / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in (first, *others)))
    assert gather(copy).epochs[0]["val/loss"] is None
    page = made(copy, passes=False)
    assert page.tables["Loss by epoch"][1] == ["1", "-", "-"]
    assert page.tables["Learning rate by epoch"][1] == ["1", "-"]


def test_a_damaged_checkpoint_is_passed_over(copy):
    newest = max((copy / "checkpoints").iterdir())
    content = bytearray((newest / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (newest / "model.safetensors").write_bytes(content)
    report(copy, copy)
    assert f"The checkpoint {newest.name}: model.safetensors" in (copy / "report.html").read_text()


def test_a_checkpoint_of_a_later_version_leaves_the_records(copy):
    for manifest in (copy / "checkpoints").glob("*/manifest.json"):
        manifest.write_text(manifest.read_text().replace('"format": 1', '"format": 2'))
    done = execute_forked([*REPORT, str(copy)], 1, copy.parent).ok()
    assert "its format is not known to this version" in done.message
    assert "Loss by epoch" in Reader((copy / "report.html").read_text()).tables


def test_a_run_whose_configuration_is_gone_says_so(copy):
    (copy / "config.yaml").unlink()
    assert "config.yaml is missing: the settings of the run are not known." in gather(copy).problems


def test_a_later_versions_keys_are_shown_as_they_are(copy):
    with (copy / "config.yaml").open("a") as file:
        file.write("something_new: {deep: 7}\n")
    assert gather(copy).config["something_new.deep"] == 7
    assert "<td>7</td>" in report(copy, copy, passes=False).read_text()


def test_without_matplotlib_there_is_a_page_without_pictures(copy, tmp_path):
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib/matplotlib.py").write_text("raise ImportError('blocked')\n")
    done = execute_forked([*REPORT, str(copy)], 1, tmp_path, env={"PYTHONPATH": str(tmp_path / "lib")}).ok()
    assert done.message.endswith("matplotlib is not installed: pip install 'allranks[report]'")
    page = Reader((copy / "report.html").read_text())
    assert page.named("svg") == []
    assert not (copy / "report").exists()
    heads, *rows = page.tables["Figures by epoch"]
    assert heads[:3] == ["epoch", "training loss", "validation loss"]
    assert heads[3:] == ["training accuracy, %", "validation accuracy, %", "rate"]
    assert len(rows) == 3
    assert len(page.named("img")) > 30  # the strips need no matplotlib


@pytest.mark.parametrize("what", ["empty", "missing", "strange"])
def test_a_directory_that_holds_no_run_is_refused(what, tmp_path):
    if what != "missing":
        (tmp_path / "place").mkdir()
    if what == "strange":
        (tmp_path / "place/notes.txt").write_text("mine")
    before = tree(tmp_path)
    done = execute_forked([*REPORT, "place"], 1, tmp_path)
    assert done.code == 2
    assert "place" in done.message
    assert tree(tmp_path) == before


def test_a_page_can_be_put_elsewhere(copy, tmp_path):
    before = tree(copy)
    done = execute_forked([*REPORT, str(copy), "--to", "elsewhere", "--records-only"], 1, tmp_path).ok()
    assert done.out == "elsewhere/report.html\n"
    assert {path.name for path in (tmp_path / "elsewhere/report").glob("*.png")} == {
        f"{name}.png" for name in CURVES
    }
    assert tree(copy) == before


def test_pictures_of_an_earlier_page_go(copy):
    (copy / "report").mkdir()
    (copy / "report/confusion.png").write_bytes(b"of another time")
    report(copy, copy, passes=False)
    assert {path.stem for path in (copy / "report").iterdir()} == CURVES


def test_a_run_of_other_data_than_images_shows_no_strips(train, tmp_path):
    (tmp_path / "rows.py").write_text(ROWS)
    for group, content in (("data", DATA_OF_ROWS), ("model", "_target_: rows.model\n")):
        (tmp_path / "conf" / group).mkdir(parents=True)
        (tmp_path / "conf" / group / "rows.yaml").write_text(content)
    words = ["--config-dir", "conf", "data=rows", "model=rows", "trainer.batch_size=10", "device=cpu"]
    words.append("task._target_=rows.Weighed")  # a classification, too
    train(*words, "trainer.epochs=1", "run.dir=run", env={"PYTHONPATH": str(tmp_path)}).ok()
    done = execute_forked([*REPORT, "run"], 1, tmp_path, env={"PYTHONPATH": str(tmp_path)}).ok()
    assert done.err == ""
    page = Reader((tmp_path / "run/report.html").read_text())
    assert page.named("img") == []
    assert "Confusion matrix" in page.tables
    # From another folder the code of the model is not found: the records are shown all the same.
    (tmp_path / "elsewhere").mkdir()
    without_code = execute_forked([*REPORT, "../run"], 1, tmp_path / "elsewhere").ok()
    assert "rows" in without_code.message
    assert "Loss by epoch" in Reader((tmp_path / "run/report.html").read_text()).tables


ROWS = """
import torch

from allranks.tasks import Classification


class Weighed(Classification):
    def loss(self, outputs, batch):
        return 2 * super().loss(outputs, batch)


class Rows(torch.utils.data.Dataset):
    def __len__(self):
        return 80

    def __getitem__(self, position):
        row = torch.randn(3, generator=torch.Generator().manual_seed(position))
        return row, int(row.sum() > 0)


def model():
    return torch.nn.Linear(3, 2)
"""

DATA_OF_ROWS = """
input_shape: [3]
classes: 2
split: [60, 20]
train: {_target_: rows.Rows}
test: {_target_: rows.Rows}
"""


def test_of_a_loop_of_ones_own_only_what_it_reads_is_shown(tmp_path):
    """Its configuration has defaults for parts that it makes itself, such as five epochs."""
    frozen = "name: pi\nown: {}\ntrainer: {epochs: 5, log_every_steps: 10}\ntask: {_target_: a.B}\n"
    (tmp_path / "config.yaml").write_text(frozen)
    (tmp_path / "summary.json").write_text('{"state": "finished", "epochs": 0}')
    (tmp_path / "environment.json").write_text('{"epochs": 1}')
    facts = gather(tmp_path)
    assert facts.config == {"name": "pi", "own": {}, "trainer.log_every_steps": 10}
    # It has shared work out, and has no epochs.
    assert "of 1" not in page_of(facts, None, [], [])
    # Whether it is reproducible is shown where it is.
    for is_reproducible in (True, False):
        shares = f"trainer: {{reproducible: {str(is_reproducible).lower()}, virtual_ranks: 4}}\n"
        (tmp_path / "config.yaml").write_text(f"name: pi\nown: {{}}\n{shares}")
        assert gather(tmp_path).config.get("trainer.virtual_ranks") == (4 if is_reproducible else None)


# --- its pieces ----------------------------------------------------------------------------------------


def test_text_in_an_element_is_escaped():
    made = tag("p", "a < b & 'c'", tag("br"), Html("<b>d</b>"), class_='"x"', hidden=True, title=None)
    assert made.text == ('<p class="&quot;x&quot;" hidden>a &lt; b &amp; &#x27;c&#x27;<br><b>d</b></p>')
    assert tag("p", "bell \a and half \ud800").text == "<p>bell \ufffd and half \ufffd</p>"


@pytest.mark.parametrize("shape", [(3, 5), (4, 2, 3)])
def test_a_small_png_holds_its_pixels(shape):
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    content = png(pixels)
    assert size_of(content) == (shape[1], shape[0])
    start = content.index(b"IDAT") + 4
    rows = zlib.decompress(content[start : content.index(b"IEND") - 8])
    width = 1 + int(np.prod(shape[1:]))
    assert b"".join(rows[i * width + 1 : (i + 1) * width] for i in range(shape[0])) == pixels.tobytes()


@pytest.mark.parametrize(
    ("cpus", "shown"), [([], ""), ([4], "4"), ([0, 1, 2, 3, 8], "0-3,8"), ([9, 5, 6], "5-6,9")]
)
def test_cpus_in_short(cpus, shown):
    assert cpu_ranges(cpus) == shown


@pytest.mark.parametrize("outputs", [3, 5])
def test_weights_are_shown_of_a_model_with_an_output_for_each_class(outputs):
    """A model may have more outputs than it has classes, and leave some of them out afterwards."""
    torch = pytest.importorskip("torch")
    layers = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(4, outputs))
    images = examine.weight_images(layers, [1, 2, 2], 3)
    assert len(images) == (3 if outputs == 3 else 0)


def test_a_long_curve_is_thinned_out_and_keeps_its_ends():
    kept = curves.thinned(10_000)
    assert len(kept) == curves.MOST_POINTS
    assert (kept[0], kept[-1]) == (0, 9_999)
    assert curves.thinned(3) == [0, 1, 2]


def test_nothing_is_made_of_nothing(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        gather(tmp_path)
