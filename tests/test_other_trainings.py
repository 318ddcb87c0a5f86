"""Trainings with metrics of their own: page, comparison, watch and terminal show what there is."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from allranks.follow.reading import Reader as Following
from allranks.follow.watch import Look, picture
from allranks.report import compare_page, compare_pictures, compare_tables
from allranks.report.command import report
from allranks.report.compare import compare
from allranks.report.gather import RunFacts, gather
from allranks.run import metric_names
from allranks.run.best import rule_of
from allranks.training import story
from other_trainings import KINDS, make, own_loop, regression
from test_report import Reader

# The pictures and tables of each kind's page: (quantities with a curve, heads of the first table).
PAGES = {
    "regression": (["Loss", "rmse", "spread", "Learning rate"], ["epoch", "training", "validation"]),
    "language model": (["Loss", "perplexity", "Learning rate"], ["epoch", "training", "validation"]),
    "own loop": (["Loss", "energy"], ["step", "training"]),
    "without metrics": ([], []),
}


def gathered(*runs: Path) -> list[RunFacts]:
    return [gather(run, "finished") for run in runs]


# --- names --------------------------------------------------------------------------------------------


def test_the_loss_comes_first_and_parts_of_the_data_stand_together():
    line = {
        "epoch": 1,
        "lr": 0.1,
        "val/iou": 0.5,
        "val/loss": 1,
        "train/loss": 2,
        "gan/loss": 3,
        "time/train_s": 4,
    }
    other = {"energy": float("nan"), "note": "text", "is": True, "huge": 10**400}
    assert metric_names.metrics_in([line, other]) == [
        "train/loss", "val/loss", "val/iou", "gan/loss", "energy",
    ]  # fmt: skip
    assert metric_names.by_quantity(["val/iou", "val/loss", "train/loss"]) == {
        "loss": ["train/loss", "val/loss"], "iou": ["val/iou"],
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "better"),
    [
        ("val/loss", False), ("test/rmse", False), ("val/perplexity", False), ("val/f1_macro", True),
        ("val/mean_iou", True), ("val/accuracy", True), ("energy", None), ("val/spread", None),
        ("val/brier_score", False), ("val/negative_log_likelihood", False), ("val/neg-likelihood", False),
        ("val/log_likelihood", True),
    ],
)  # fmt: skip
def test_what_is_better_by_its_name(name, better):
    assert metric_names.higher_is_better(name) is better


@pytest.mark.parametrize(
    ("name", "value", "shown"),
    [
        ("val/accuracy", 97.531, "97.53"), ("val/loss", 0.08123, "0.0812"),
        ("val/loss", 1.25e-5, "1.25e-05"), ("val/perplexity", 123456.0, "1.23e+05"),
        ("val/perplexity", 4321.123, "4321.123"), ("energy", -5, "-5"),
        ("val/perplexity", 9999.9996, "1.00e+04"), ("val/perplexity", 9999.9994, "9999.999"),
        ("val/perplexity", -999.99996, "-1000.000"), ("val/loss", 1.5e-100, "1.5e-100"),
        ("val/loss", 0.0, "0.0000"), ("val/loss", None, "-"), ("val/loss", float("nan"), "nan"),
    ],
)  # fmt: skip
def test_numbers_for_people(name, value, shown):
    assert metric_names.number(name, value) == shown


# --- the page of a run --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_page_has_a_picture_and_a_table_for_each_quantity(kind, tmp_path):
    tests = {"test/loss": 0.75, "test/rmse": 0.5, "test/count": 100} if kind == "regression" else None
    run = make(tmp_path / "run", kind, tests=tests)
    text = report(run, run).read_text()
    page = Reader(text)
    titles, heads = PAGES[kind]
    axis = "step" if kind == "own loop" else "epoch"
    curves = [label.removesuffix(f" by {axis}") for label in page.tables if label.endswith(f" by {axis}")]
    assert [label for label in curves if label != "Time and throughput"] == titles
    if titles:
        first = page.tables[f"{titles[0]} by {axis}"]
        assert first[0] == heads
    assert len({str(svg["aria-labelledby"]) for svg in page.named("svg")}) == len(page.named("svg"))
    assert "None" not in text and "nan" not in text.lower().replace("finance", "")
    assert '<div class="cards"></div>' not in text  # no frame without a picture
    if kind == "regression":
        assert "test loss" in text and "0.7500" in text and "rmse 0.5000" in text


def test_the_best_epoch_of_a_page_follows_the_rule(tmp_path):
    by_loss = make(tmp_path / "0", "regression")
    by_rmse = make(tmp_path / "1", "regression", best="val/rmse min")
    best = [facts.best["epoch"] for facts in gathered(by_loss, by_rmse) if facts.best]
    assert best == [6, 4]
    assert "best epoch: 4" in report(by_rmse, by_rmse).read_text()


def test_a_metric_of_every_second_epoch_is_one_curve(tmp_path):
    run = make(tmp_path / "run", "language model")
    page = Reader(report(run, run).read_text())
    rows = page.tables["perplexity by epoch"]
    assert [row[0] for row in rows[1:]] == ["2", "4", "6"]
    svg = (run / "report/metric-1-perplexity.svg").read_text()
    # Three points, joined by lines: one path with a move and two lines.
    assert re.search(r'd="M [\d. ]+\nL [\d. ]+\nL [\d. ]+\n"', svg)


def test_lines_without_any_number_are_counted(tmp_path):
    run = make(tmp_path / "run", "own loop", lines=[{"energy": 3.0}, {"energy": 2.0}])
    [facts] = gathered(run)
    assert (facts.axis, facts.places, facts.epochs_done) == ("line", [1, 2], None)
    assert Reader(report(run, run).read_text()).tables["energy by line"][1:] == [
        ["1", "3.0000"],
        ["2", "2.0000"],
    ]


def test_of_hundreds_of_metrics_some_have_a_picture(tmp_path):
    lines = [{"epoch": epoch, **{f"val/m{number}": 1.0 for number in range(40)}} for epoch in (1, 2)]
    run = make(tmp_path / "run", "own loop", lines=lines)
    text = report(run, run).read_text()
    assert text.count("<svg ") == 16
    assert "Only in metrics.jsonl: m16, m17" in text


# --- runs side by side --------------------------------------------------------------------------------


def test_a_comparison_has_the_metrics_of_its_runs(tmp_path):
    runs = [
        make(tmp_path / str(number), "regression", lr=lr, tests={"test/loss": loss, "test/rmse": 0.5})
        for number, (lr, loss) in enumerate([(0.1, 0.75), (0.2, 0.5)])
    ]
    comparison = compare(gathered(*runs))
    assert [figure.name for figure in comparison.figures][:6] == [
        "test/loss", "test/rmse", "test/spread", "val/loss", "val/rmse", "val/spread",
    ]  # fmt: skip
    assert comparison.sorted_by == comparison.best_by == "test/loss"
    assert [row.is_best for row in comparison.rows] == [True, False]
    assert comparison.rows[0].settings == {"optimizer.lr": 0.2}
    text = compare_tables.text(comparison, 200)
    assert "test/rmse" in text and "test/spread" not in text  # nobody has measured it
    assert "Figures of val/ are those of the best epoch (lowest val/loss)." in text
    names = [drawn.name for drawn in compare_pictures.of_comparison(comparison)]
    assert names == ["result", "speed", "val-loss", "val-rmse", "val-spread"]


def test_a_comparison_takes_the_epoch_that_the_rule_calls_the_best(tmp_path):
    [facts] = gathered(make(tmp_path / "0", "regression", best="val/rmse min"))
    values = compare([facts]).rows[0].values
    line = regression()[3]
    assert {name: values[name].mean for name in ("val/rmse", "val/loss", "val/spread")} == {
        name: line[name] for name in ("val/rmse", "val/loss", "val/spread")
    }
    assert compare([facts]).sorted_by == "val/rmse"


def test_what_the_runs_call_the_best_tells_more_than_a_name(tmp_path):
    """A spread may be good or bad: only the runs know. And a score that is to be low is no high score."""
    for best, is_higher_better in (("val/spread max", True), ("val/spread min", False)):
        [facts] = gathered(make(tmp_path / best.replace("/", "-"), "regression", best=best))
        figure = compare([facts]).figure_named("val/spread")
        assert figure is not None and figure.higher_is_better is is_higher_better
    lines = [{"epoch": 1, "step": 10, "val/score": 1.0}]
    [facts] = gathered(make(tmp_path / "score", "own loop", lines=lines, best="val/score min"))
    figure = compare([facts]).figure_named("val/score")
    assert figure is not None and figure.higher_is_better is False


@pytest.mark.parametrize("kind", KINDS)
def test_two_runs_of_each_kind_are_compared(kind, tmp_path):
    runs = gathered(make(tmp_path / "0", kind, lr=0.1), make(tmp_path / "1", kind, lr=0.2))
    comparison = compare(runs)
    for width in (60, 120):
        assert max(map(len, compare_tables.text(comparison, width).splitlines())) <= width
    about = json.loads(compare_tables.as_json(comparison))
    assert [row["settings"] for row in about["rows"]] == [{"optimizer.lr": 0.1}, {"optimizer.lr": 0.2}]
    html = compare_page.write(comparison, tmp_path, kind).read_text()
    assert '<div class="cards"></div>' not in html
    if kind == "own loop":
        assert "Training loss by step" in html
        assert "2 runs: all finished. They differ" in html


def test_runs_of_different_kinds_stand_side_by_side(tmp_path):
    runs = gathered(*(make(tmp_path / kind, kind) for kind in KINDS))
    comparison = compare(runs)
    html = compare_page.write(comparison, tmp_path, "all").read_text()
    assert comparison.best_by in ("", "val/loss")
    assert "perplexity" in html and "energy" in html


# --- watch --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [60, 100])
def test_a_run_of_each_kind_is_watched(kind, columns, tmp_path):
    run = make(tmp_path / "run", kind)
    [view] = Following([str(run)], print).views()
    lines = picture([view], Look(columns))
    assert max(map(len, lines)) <= columns
    labels = [line[2:17].strip() for line in lines]
    assert [label for label in labels if label.endswith("loss")] == [
        metric_names.words_of(name) for name in view.metrics if name.endswith("loss")
    ]
    json.dumps(view.to_json(), allow_nan=False)
    if kind == "own loop":
        assert "progress       step 1,200" in "\n".join(lines)
        assert any("up to step 1,200" in line for line in lines)
    if kind == "language model":
        assert "  val perplexity 4871.166, 1.16e+05 at first" in lines
        assert "  train loss     1.5000, 9.0000 after the first epoch" in lines
        assert any(line.strip() == "epoch 1 to 6" for line in lines)
    if kind == "regression":
        assert "best epoch     6 (lowest val/loss)" in "\n".join(lines)


def test_steps_without_a_loss_are_drawn_by_what_they_have(tmp_path):
    run = make(tmp_path / "run", "own loop", lines=[])
    steps = [{"step": step, "epoch": 1, "step/lr": 0.1, "step/energy": 1.0 / step} for step in (1, 2, 3)]
    (run / "metrics-steps.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))
    [view] = Following([str(run)], print).views()
    assert view.step_losses == [1.0, 0.5, 1 / 3]
    assert any("energy of a step" in line for line in picture([view], Look(80)))


def test_runs_of_all_kinds_are_watched_in_a_table(tmp_path):
    for kind in KINDS:
        make(tmp_path / kind, kind)
    views = Following([str(tmp_path)], print).views()
    lines = picture(views, Look(120))
    assert max(map(len, lines)) <= 120
    assert "val loss" in lines[2]
    assert any("step 1,200" in line for line in lines)


def test_what_a_program_has_found_of_its_whole_run_is_shown_everywhere(tmp_path):
    found = {"pi": 3.1415926, "epochs": 6, "val/count": 10, "time/total_s": 5.0, "model/sha256": "0af"}
    runs = [make(tmp_path / str(n), "without metrics", seed=n, tests=found) for n in (0, 1)]
    [facts, _] = gathered(*runs)
    assert (facts.tests, facts.results) == ({}, {"pi": 3.1415926})
    assert "<dt>pi</dt><dd>3.1416</dd>" in report(runs[0], runs[0]).read_text()
    assert "3.1416 ± 0.0000" in compare_tables.text(compare(gathered(*runs)), 120)
    [view] = Following([str(runs[0])], print).views()
    assert "  result         pi 3.1416" in picture([view], Look(80))
    assert story.results(facts.summary) == "pi 3.1416"


def test_a_run_that_is_named_twice_is_shown_once(tmp_path):
    run = make(tmp_path / "run", "regression")
    (tmp_path / "link").symlink_to(run)
    views = Following([str(run), str(tmp_path / "link"), f"{tmp_path}/./run"], print).views()
    assert [view.directory for view in views] == [str(run)]


# --- the table in the terminal ------------------------------------------------------------------------


def table_of(kind: str, columns: int | None, best: str = "val/loss min") -> list[str]:
    """The table of a training of this kind, its titles first; the titles stand again where they change."""
    table = story.Table(0 if kind == "own loop" else 6, rule_of(best).metric)
    lines: list[str] = []
    header = ""
    for line in KINDS[kind]()[:6]:
        table.add(line)
        if table.header(columns) != header:
            header = table.header(columns)
            lines.append(header)
        lines.append(table.row(line, False, columns))
    return lines


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [None, 60, 100])
def test_the_table_of_each_kind_fits_its_terminal(kind, columns):
    lines = table_of(kind, columns)
    assert columns is None or max(map(len, lines)) <= columns
    assert max(map(len, lines)) <= max(len(line) for line in lines if line.split()[0] in ("epoch", "step"))


def test_the_table_has_the_metrics_that_a_training_keeps():
    header, first, *_ = table_of("regression", None)
    assert re.split(r" {2,}", header.strip()) == [
        "epoch", "lr", "train loss", "train rmse", "val loss", "val rmse", "val spread", "samples/s",
        "time", "best",
    ]  # fmt: skip
    assert first.split() == [
        "1/6",
        "0.1",
        "4.0000",
        "2.0000",
        "5.0000",
        "3.5000",
        "0.1000",
        "2,000",
        "1.5",
        "s",
    ]
    header, first, *_ = table_of("own loop", None)
    assert (header.split(), first.split()) == (
        ["step", "train", "loss", "energy", "best"],
        ["1", "1.0000", "-5.0000"],
    )


def test_a_metric_that_comes_later_brings_a_new_header():
    lines = table_of("language model", None)
    headers = [number for number, line in enumerate(lines) if line.split()[0] == "epoch"]
    assert headers == [0, 2]
    assert lines[4].split()[3:5] == ["-", "-"]  # the third epoch is not evaluated


def test_the_metric_that_decides_keeps_its_column_in_a_narrow_window():
    assert "val spread" not in table_of("regression", 60)[0]
    assert "val spread" in table_of("regression", 66, best="val/spread min")[0]


def test_the_end_of_the_story_says_what_was_tested():
    assert story.test_figures({"test/loss": 0.75, "test/rmse": 0.5, "test/count": 1000}) == (
        "loss 0.7500, rmse 0.5000 of 1,000 examples"
    )
    assert story.test_figures({"state": "finished"}) == ""
    assert (
        story.best_figures(regression()[3])
        == "epoch 4: val loss 1.2500, val rmse 0.5000, val spread 0.4000"
    )
    assert story.best_figures(own_loop()[4]) == "step 5: train loss 0.2000, energy -5.0000"
