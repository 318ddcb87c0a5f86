"""Several runs side by side: `allranks compare`, and the comparison that a sweep makes by itself."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from allranks.base.errors import UserError
from allranks.report import command as report_command
from allranks.report import compare_command, compare_page, compare_pictures, compare_sweep, compare_tables
from allranks.report.at_end import ChildEnd
from allranks.report.compare import compare, is_number, short_names
from allranks.report.gather import RunFacts
from browsing import SCREENS, assert_readable
from helpers import SMALL, Run, execute, execute_forked, forked_python

# One worker trains the sweep that most of these tests look at.
pytestmark = pytest.mark.xdist_group("comparing")

ALLRANKS = ["-m", "allranks"]
CONFIG = {
    "name": "mlp",
    "seed": 0,
    "threads": None,
    "trainer.batch_size": 32,
    "trainer.precision": "fp64",
    "optimizer.lr": 0.1,
    "data.test._target_": "allranks.data.mnist.load",
    "data.test.root": "/data",
    "data.split": [48000, 12000],
    "model._target_": "allranks.models.mlp",
    "model.widths": [50, 50],
}


def facts(directory: str, accuracy: float | None = 90.0, **changes: Any) -> RunFacts:
    """A run of CONFIG with changed values (`trainer__batch_size=64`); finished if it has an accuracy."""
    config = {**CONFIG, **{key.replace("__", "."): value for key, value in changes.items()}}
    epochs = [
        {"epoch": 1, "val/accuracy": 80.0, "val/loss": 0.5, "throughput/samples_per_s": 100.0,
         "time/train_s": 2.0, "time/eval_s": 1.0},
        {"epoch": 2, "val/accuracy": 79.0, "val/loss": None, "throughput/samples_per_s": 300.0,
         "time/train_s": 2.0, "time/eval_s": None},
    ]  # fmt: skip
    summary = {"state": "finished", "test/accuracy": accuracy, "test/loss": 0.25, "world_size": 1}
    return RunFacts(
        Path("/sweep") / directory,
        "lost" if accuracy is None else "finished",
        config=config,
        epochs=epochs,
        summary={} if accuracy is None else summary,
        environment={"world_size": 1},
    )


def table_of(text: str) -> list[list[str]]:
    """The cells of the table in a text for people, its header first."""
    lines = [line for line in text.splitlines() if line.startswith("  ")]
    return [re.split(r" {2,}", line.strip()) for line in lines]


# --- in what runs differ ------------------------------------------------------------------------------


def test_only_what_differs_is_a_column_and_what_decides_comes_first():
    runs = [facts("0", threads=1), facts("1", threads=2, trainer__batch_size=64)]
    comparison = compare(runs)
    assert comparison.keys == ["trainer.batch_size", "threads"]
    assert [row.settings for row in comparison.rows] == [
        {"trainer.batch_size": 32, "threads": 1},
        {"trainer.batch_size": 64, "threads": 2},
    ]


def test_the_choice_of_a_component_stands_for_all_values_that_come_with_it():
    linear = {"name": "linear", "model___target_": "allranks.models.linear", "model__widths": None}
    runs = [
        replace(facts("0"), overrides=["model=mlp", "optimizer.lr=0.1"]),
        replace(facts("1", optimizer__lr=0.2), overrides=["model=mlp", "optimizer.lr=0.2"]),
        replace(
            facts("2", trainer__precision="fp32", **linear), overrides=["model=linear", "optimizer.lr=0.1"]
        ),
        replace(
            facts("3", trainer__precision="fp32", optimizer__lr=0.2, **linear),
            overrides=["model=linear", "optimizer.lr=0.2"],
        ),
    ]
    assert set(compare(runs).keys) == {"model", "optimizer.lr"}

    # Two runs of different places may have been made by different command lines: only what belongs to the
    # model follows from it.
    elsewhere = [runs[0], replace(runs[2], directory=Path("/other/2"))]
    assert set(compare(elsewhere).keys) == {"model", "trainer.precision"}

    # Where one run says nothing of its model, the values tell the difference.
    silent = [replace(runs[0], overrides=[]), runs[2]]
    assert "model" not in compare(silent).keys
    assert {"name", "model._target_", "model.widths"} <= set(compare(silent).keys)


def test_a_number_of_ranks_is_compared_like_a_setting():
    runs = [facts("0"), facts("1")]
    runs[1] = replace(runs[1], summary={**runs[1].summary, "world_size": 4})
    comparison = compare(runs)
    assert comparison.keys == ["world_size"]
    assert "They differ in the number of ranks." in compare_tables.text(comparison, 200)


def test_keys_have_the_shortest_names_that_tell_them_apart():
    keys = ["optimizer.lr", "data.train.root", "data.test.root", "seed", "world_size"]
    assert list(short_names(keys).values()) == ["lr", "train.root", "test.root", "seed", "ranks"]
    # `epochs` is the column of those that were completed.
    assert list(short_names(["trainer.epochs", "model.n"]).values()) == ["trainer.epochs", "model.n"]


# --- figures, seeds, order ----------------------------------------------------------------------------


def test_figures_are_those_of_the_best_epoch_and_of_all_epochs_together():
    [row] = compare([facts("0", accuracy=91.0)]).rows
    means = {name: value.mean for name, value in row.values.items()}
    assert means == {
        "test/accuracy": 91.0,
        "test/loss": 0.25,
        "val/accuracy": 80.0,
        "val/loss": 0.5,
        "throughput/samples_per_s": 200.0,
        "time/epochs_s": 5.0,
        "time/total_s": None,
        "epochs": 2.0,
    }


def test_runs_that_differ_only_in_their_seed_are_one_row_with_mean_and_spread():
    accuracies = [90.5, 91.25, 93.0, 89.75]
    runs = [facts(str(seed), accuracy, seed=seed) for seed, accuracy in enumerate(accuracies)]
    other = facts("4", 88.0, seed=0, optimizer__lr=0.5)
    comparison = compare([*runs, other])
    assert comparison.keys == ["optimizer.lr"]
    many, one = (row.values["test/accuracy"] for row in comparison.rows)
    assert many.of_runs == 4
    assert many.mean == pytest.approx(np.mean(accuracies), rel=1e-12)
    assert many.std == pytest.approx(np.std(accuracies, ddof=1), rel=1e-12)
    assert (one.mean, one.std, one.of_runs) == (88.0, None, 1)
    assert "91.12 ± 1.39" in compare_tables.text(comparison, 200)

    each = compare([*runs, other], each=True)
    assert each.keys == ["seed", "optimizer.lr"]
    assert [row.values["test/accuracy"].mean for row in each.rows] == [93.0, 91.25, 90.5, 89.75, 88.0]


def test_half_a_training_is_no_sample_of_whole_ones():
    cut_off = replace(facts("1", None, seed=1), epochs=[{"epoch": 1, "val/accuracy": 10.0}])
    [row] = compare([facts("0"), cut_off]).rows
    assert row.values["val/accuracy"].mean == 80.0
    assert row.states == {"finished": 1, "lost": 1}
    assert "1 finished, 1 lost" in compare_tables.text(compare([facts("0"), cut_off]), 200)


@pytest.mark.parametrize(
    ("sort", "order"),
    [
        (None, "213"),  # the highest accuracy first, and what has none last
        ("test/accuracy", "213"),
        ("lr", "321"),
        ("optimizer.lr", "321"),
        ("test/loss", "123"),
        ("samples/s", "123"),
    ],
)
def test_rows_are_sorted(sort, order):
    runs = [
        facts("1", 90.0, optimizer__lr=0.5),
        facts("2", 95.0, optimizer__lr=0.05),
        facts("3", None, optimizer__lr=0.005),
    ]
    comparison = compare(runs, sort)
    assert "".join(run.directory.name for run in comparison.runs) == order
    best = [row.settings["optimizer.lr"] for row in comparison.rows if row.is_best]
    assert best == ([0.05] if sort in (None, "test/accuracy", "lr", "optimizer.lr") else best)


def test_a_sort_key_that_is_none_is_refused_with_the_nearest_one():
    runs = [facts("1"), facts("2", optimizer__lr=0.5)]
    with pytest.raises(UserError, match="Did you mean test/accuracy"):
        compare(runs, "test/acuracy")
    with pytest.raises(UserError, match=r"Give one of test/accuracy, .*optimizer\.lr"):
        compare(runs, "x")


def test_without_a_test_the_validation_decides():
    runs = [facts("0", None), facts("1", None, optimizer__lr=0.2)]
    better = [{**epoch, "val/accuracy": 85.0} for epoch in runs[1].epochs]
    comparison = compare([runs[0], replace(runs[1], epochs=better)])
    assert comparison.sorted_by == comparison.best_by == "val/accuracy"
    assert comparison.rows[0].settings == {"optimizer.lr": 0.2}


# --- what cannot be compared --------------------------------------------------------------------------


def test_of_runs_with_different_test_sets_none_is_the_best():
    other = facts("1", 99.0, data__test___target_="allranks.data.synthetic.generate")
    comparison = compare([facts("0"), other])
    assert not any(row.is_best for row in comparison.rows)
    assert "different data (data.test._target_)" in comparison.notes[0]
    # By their speed one is the best all the same, and no sentence says otherwise.
    quicker = compare([facts("0"), replace(other, epochs=other.epochs[1:])], "samples/s")
    assert [row.is_best for row in quicker.rows] == [True, False]
    assert quicker.notes[0].endswith("cannot be compared, and none is called the best by them.")

    # Where the same files lie in other places, the figures are of the same examples.
    moved = compare([facts("0", 90.0), facts("1", 99.0, data__test__root="/elsewhere")])
    assert [row.is_best for row in moved.rows] == [True, False]
    assert moved.notes == []


def test_other_validation_examples_are_told():
    comparison = compare([facts("0"), facts("1", data__split=[50000, 10000])])
    assert "different validation examples (data.split)" in comparison.notes[0]
    assert comparison.best_by == "test/accuracy"


def test_of_runs_with_different_validation_examples_none_is_the_best_by_a_figure_of_these():
    tested = [facts("0"), facts("1", data__split=[50000, 10000])]
    untested = [facts("0", None), facts("1", None, data__split=[50000, 10000])]
    for comparison in (compare(untested), compare(tested, "val/loss")):
        assert comparison.sorted_by.startswith("val/")
        assert comparison.best_by == ""
        assert not any(row.is_best for row in comparison.rows)


def test_copies_of_one_run_do_not_differ_in_their_seed():
    text = compare_tables.text(compare([facts("0"), facts("1")]), 200)
    assert "Their configurations are the same." in text
    assert "A row of n runs has the mean, with the sample standard deviation." in text
    seeds = compare_tables.text(compare([facts("0"), facts("1", seed=1)]), 200)
    assert "They differ only in their seed." in seeds
    assert "A row of n runs has the mean over their seeds" in seeds


def test_one_run_is_shown_and_called_one():
    text = compare_tables.text(compare([facts("0")]), 200)
    assert text.startswith("1 run: finished, 2 epochs.")
    assert "There is one run only" in text


def test_where_nothing_needs_explaining_there_is_no_empty_paragraph():
    run = replace(facts("0"), epochs=[{"epoch": 1, "energy": 1.0}], summary={"state": "finished"})
    assert "\n\nThere is one run only" in compare_tables.text(compare([run]), 200)
    assert "\n\n\n" not in compare_tables.text(compare([run]), 200)


# --- tables -------------------------------------------------------------------------------------------


def six_runs() -> list[RunFacts]:
    return [
        facts(str(number), 90.0 + number, seed=number % 2, trainer__batch_size=32 << number // 2)
        for number in range(6)
    ]


@pytest.mark.parametrize("width", [60, 80, 120, 200])
def test_a_table_fits_its_terminal(width):
    text = compare_tables.text(compare(six_runs()), width)
    assert max(map(len, text.splitlines())) <= width
    header, *rows = table_of(text)
    assert header[:2] == ["batch_size", "n"]
    assert "test/accuracy" in header
    assert ("time" in header) == (width >= 120)
    assert ("Left out" in text.replace("\n", " ")) == (width < 120)
    assert [row[:2] for row in rows] == [["*", "128"], ["64", "2"], ["32", "2"]]


def test_columns_that_say_the_same_in_each_row_are_in_the_headline():
    text = compare_tables.text(compare(six_runs()), 200)
    assert text.startswith("6 runs: all finished, 2 epochs each. They differ in trainer.batch_size.")
    assert not {"state", "epochs"} & set(table_of(text)[0])


def test_csv_has_every_figure_with_all_digits():
    runs = [facts("0", 100 / 3), facts("1", 200 / 3, model__widths=[8, 8])]
    rows = list(csv.DictReader(io.StringIO(compare_tables.as_csv(compare(runs)))))
    assert [row["model.widths"] for row in rows] == ["[8,8]", "[50,50]"]
    assert [float(row["test/accuracy"]) for row in rows] == [200 / 3, 100 / 3]
    assert [row["best"] for row in rows] == ["true", "false"]
    assert [row["epochs"] for row in rows] == ["2", "2"]
    assert [row["test/accuracy/std"] for row in rows] == ["", ""]
    assert [row["directories"] for row in rows] == ["/sweep/1", "/sweep/0"]


def test_markdown_is_a_table_with_the_best_row_in_bold():
    runs = [facts("0", 90.0), facts("1", 91.0, name="a|b", model__widths=None)]
    text = compare_tables.markdown(compare(runs))
    lines = [line for line in text.splitlines() if line.startswith("|")]
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in lines]
    assert len({len(row) for row in cells}) == 1
    assert all(re.fullmatch(r" -+:? ", cell) for cell in cells[1])
    assert any("a\\|b" in cell for cell in cells[2])
    assert all(cell.strip().startswith("**") for cell in cells[2])


def test_json_can_be_read_whatever_a_configuration_holds():
    runs = [facts("0", optimizer__lr=float("inf")), facts("1", optimizer__lr=0.1)]
    about = json.loads(compare_tables.as_json(compare(runs)))
    assert about["differ_in"] == ["optimizer.lr"]
    assert {str(row["settings"]["optimizer.lr"]) for row in about["rows"]} == {"inf", "0.1"}


def test_figures_may_have_the_names_of_columns_and_of_settings():
    """A program of the user's own gives its figures any names."""
    summary = {"n": 7, "best": 0.5, "directories": 2, "optimizer.lr": 3.0, "cost": 4.0, "cost/std": 5.0}
    runs = [facts("0"), facts("1", optimizer__lr=0.2)]
    runs = [replace(run, summary={**run.summary, **summary}) for run in runs]
    runs[0] = replace(runs[0], epochs=[{**line, "epochs": 9.0} for line in runs[0].epochs])

    about = json.loads(compare_tables.as_json(compare(runs)))
    assert [(row["n"], row["best"]) for row in about["rows"]] == [(1, True), (1, True)]  # equal accuracies
    assert [row["directories"] for row in about["rows"]] == [["/sweep/0"], ["/sweep/1"]]
    for name, value in summary.items():
        assert {row.get(f"figure/{name}", row.get(name)) for row in about["rows"]} == {value}, name
    assert about["rows"][0]["epochs"] == 2  # the number of epochs

    heads, *rows = csv.reader(io.StringIO(compare_tables.as_csv(compare(runs))))
    assert len(set(heads)) == len(heads)
    of_csv = [dict(zip(heads, row, strict=True)) for row in rows]
    assert [(row["n"], row["optimizer.lr"]) for row in of_csv] == [("1", "0.1"), ("1", "0.2")]
    assert {row["figure/n"] for row in of_csv} == {"7.0"}


# --- page and pictures --------------------------------------------------------------------------------


def test_a_logarithmic_axis_is_for_powers():
    for powers in ([32, 64, 128, 256, 512], [0.01, 0.03, 0.1, 0.3, 1], [1, 10], [1e-4, 1e-3, 1e-2]):
        assert compare_pictures.is_even_in_logarithms(powers), powers
    for others in ([1, 2, 3, 4, 5], [0, 1, 10, 100], [-1, 1, 10], [0.1, 0.2], [50, 100, 150], [7]):
        assert not compare_pictures.is_even_in_logarithms(others), others


def names_of_pictures(runs: list[RunFacts]) -> list[str]:
    return [picture.name for picture in compare_pictures.of_comparison(compare(runs))]


def test_there_is_a_picture_for_all_that_can_be_shown():
    sizes = six_runs()
    assert names_of_pictures(sizes) == ["result", "speed", "val-loss", "val-accuracy"]
    activations = [facts("0", 90.0, model__activation="ReLU"), facts("1", 91.0, model__activation="Tanh")]
    assert names_of_pictures(activations) == ["result", "val-loss", "val-accuracy"]
    assert names_of_pictures(sizes[:1]) == ["val-loss", "val-accuracy"]
    assert names_of_pictures([replace(sizes[0], epochs=[], summary={})]) == []


def test_a_picture_says_its_numbers_in_words_and_names_each_curve():
    result, _, loss, _ = compare_pictures.of_comparison(compare(six_runs()))
    assert result.title == "test/accuracy against batch_size"
    assert "batch_size 128: 94.50; batch_size 64: 92.50; batch_size 32: 90.50." in result.description
    shown = re.findall(r">([^<>]+)</text>", loss.svg)
    assert {"batch_size", "32", "64", "128 (best)"} <= set(shown)
    assert loss.png.startswith(b"\x89PNG")


def test_runs_that_differ_in_much_are_named_by_their_directories():
    """A legend's line has no room for so many settings, and is cut off by the picture's edge."""
    model = "mylab.networks_of_many_layers.with_attention.UNetOfManyLayers"
    runs = [facts("small"), facts("large", model___target_=model, trainer__batch_size=512)]
    curve = compare_pictures.Curve("val-accuracy", "Accuracy", "val/accuracy", "%")
    picture = compare_pictures.curves(compare(runs), curve)
    words = re.findall(r">([^<>]+)</text>", picture.svg)
    assert {"small", "large"} <= {word.removesuffix(" (best)") for word in words}
    assert not any("UNetOfManyLayers" in word for word in words)


def test_each_point_of_a_long_curve_is_the_mean_of_all_runs_that_have_come_so_far():
    """A curve has 400 points at most. Its runs may have come to 1000 epochs, and to 700."""
    high, low = (
        replace(
            facts(str(seed), None, seed=seed),
            epochs=[{"epoch": epoch, "val/loss": level + 1 / epoch} for epoch in range(1, count + 1)],
        )
        for seed, (level, count) in enumerate([(1.0, 1000), (0.0, 700)])
    )
    [row] = compare([high, low]).rows
    drawn = compare_pictures.drawn_of(row, "val/loss", "epoch")
    assert (len(drawn), min(drawn), max(drawn)) == (400, 1, 1000)
    assert all(len(values) == (2 if epoch <= 700 else 1) for epoch, values in drawn.items())

    means = compare_pictures.means_of(row, "val/loss", "epoch")
    assert means == {
        epoch: pytest.approx((0.5 if epoch <= 700 else 1) + 1 / epoch) for epoch in range(1, 1001)
    }


def test_a_name_that_is_no_utf_8_is_drawn_with_question_marks():
    name = os.fsdecode(b"caf\xff")
    [_, loss, _] = compare_pictures.of_comparison(compare([facts("0"), facts(name, optimizer__lr=name)]))
    assert "caf?" in " ".join(re.findall(r">([^<>]+)</text>", loss.svg))
    # Runs that differ in nothing but their seed are named by their directories.
    seeds = [facts(f"{name}{seed}", seed=seed) for seed in range(2)]
    [loss, _] = compare_pictures.of_comparison(compare(seeds))
    assert "caf?0, caf?1" in re.findall(r">([^<>]+)</text>", loss.svg)


def test_a_value_that_begins_with_an_underscore_has_its_line_in_the_legends():
    """matplotlib leaves such labels out by itself."""
    runs = [
        facts(f"{name}{rate}", model__activation=name, optimizer__lr=rate)
        for name in ("_Own", "ReLU")
        for rate in (0.1, 0.2)
    ]
    for picture in compare_pictures.of_comparison(compare(runs)):
        words = " ".join(re.findall(r">([^<>]+)</text>", picture.svg))
        assert "_Own" in words, picture.name


def test_of_many_rows_the_best_have_names():
    runs = [facts(str(number), 50.0 + number, optimizer__lr=1 + number) for number in range(40)]
    _, _, loss, _ = compare_pictures.of_comparison(compare(runs))
    named = {
        text for text in re.findall(r">([^<>]+)</text>", loss.svg) if re.fullmatch(r"\d+( .best.)?", text)
    }
    assert {"40 (best)", *(str(number) for number in range(31, 40))} <= named
    assert "30" not in named


def test_the_page_is_one_file_that_shows_names_as_they_are(tmp_path):
    evil = "<script>alert(1)</script>"
    runs = [*six_runs()[:2], facts("2", 99.0, seed=0, model__activation=evil)]
    path = compare_page.write(compare(runs), tmp_path, evil)
    html = path.read_text()
    assert path == tmp_path / "compare.html"
    assert path.stat().st_size < 3_000_000
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(1)&lt;/script&gt;") >= 2
    assert not re.search(r"(src|href)=\"(https?:)?//", html)
    assert html.count("<svg ") == 3
    assert html.count('class="given"') == 1
    names = {f"{name}.{ending}" for name in names_of_pictures(runs) for ending in ("png", "svg")}
    assert {file.name for file in (tmp_path / "compare").iterdir()} == names


def test_the_page_leads_to_the_pages_of_its_runs(tmp_path):
    runs = [replace(run, directory=tmp_path / "sweep" / run.directory.name) for run in six_runs()]
    # In an address # and ? would end the path, and % would begin a quoted character.
    odd = tmp_path / "sweep" / os.fsdecode(b"50%#1?\xff")
    runs[1] = replace(runs[1], directory=odd)
    for run in runs[:2]:
        run.directory.mkdir(parents=True)
        (run.directory / "report.html").touch()
    html = compare_page.write(compare(runs), tmp_path / "sweep", "sweep").read_text()
    addresses = re.findall(r'href="([^"#]+)"', html)
    assert sorted(addresses) == ["0/report.html", "50%25%231%3F%FF/report.html"]


@pytest.mark.parametrize(("width", "scheme"), SCREENS)
def test_the_page_is_for_every_reader(browser, tmp_path, width, scheme):
    runs = [*six_runs(), facts("6", None, trainer__batch_size=256)]
    path = compare_page.write(compare(runs), tmp_path, "sizes")
    context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
    page = context.new_page()
    page.goto(path.as_uri())
    assert_readable(page)
    assert page.locator("figure svg").count() == 4
    assert page.locator("tr.given").inner_text().split()[0] == "128"
    context.close()


def test_without_matplotlib_the_page_has_its_tables(tmp_path, monkeypatch):
    monkeypatch.setattr("allranks.report.drawing.is_available", lambda: False)
    html = compare_page.write(compare(six_runs()), tmp_path, "sizes").read_text()
    assert "matplotlib is not installed" in html
    assert "94.50 ± 0.71" in html
    assert "<svg" not in html


def test_without_matplotlib_the_command_says_so(sweep, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("allranks.report.drawing.is_available", lambda: False)
    assert compare_command.main([str(sweep[0]), "--page", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert said.err.count("matplotlib is not installed: pip install 'allranks[report]'") == 1
    assert f"As a page: {tmp_path}/compare.html" in said.out


# --- the command --------------------------------------------------------------------------------------


def written(directory: Path, **changes: Any) -> Path:
    """The directory of a run that has a configuration and a line of metrics."""
    directory.mkdir(parents=True)
    config = {"name": "mlp", "seed": 0, "optimizer": {"lr": 0.1}, **changes}
    (directory / "config.yaml").write_text(json.dumps(config))
    (directory / "metrics.jsonl").write_text('{"epoch": 1, "step": 1, "val/loss": 0.5}\n')
    return directory


def test_a_directory_that_cannot_be_looked_at_is_named_and_the_others_are_compared(tmp_path, capsys):
    """Here its name is too long. A folder that this user may not search fails in the same way."""
    name = "x" * 300
    with pytest.raises(UserError, match=f"{name} cannot be read .File name too long.: give"):
        compare_command.main([str(tmp_path / name)])
    assert compare_command.main([str(written(tmp_path / "0")), name]) == 0
    assert f"{name} cannot be read (File name too long)" in " ".join(capsys.readouterr().out.split())


def test_a_page_that_is_asked_for_is_made_beside_each_format(tmp_path, capsys):
    runs = [str(written(tmp_path / str(number), seed=number)) for number in range(2)]
    for words in (["--csv"], ["--json"], ["--markdown"], ["--csv", "--to", str(tmp_path / "table")]):
        page = tmp_path / f"page{len(words)}{words[0]}"
        assert compare_command.main([*runs, *words, "--page", str(page)]) == 0
        assert (page / "compare.html").is_file()
        said = capsys.readouterr()
        assert f"As a page with curves: {page}/compare.html" in said.err
        assert "As a page" not in said.out
    with pytest.raises(UserError, match="--no-page: not allowed with argument --page"):
        compare_command.main([*runs, "--page", str(tmp_path), "--no-page"])


def test_each_of_several_reports_has_a_folder_of_its_own(tmp_path):
    paths = [written(tmp_path / path) for path in ("a/0", "b/0")]
    runs = [str(path) for path in paths]
    out = tmp_path / "out"
    assert report_command.main([*runs, "--to", str(out), "--records-only"]) == 0
    for name in ("a/0", "b/0"):
        assert str(tmp_path / name) in (out / name / "report.html").read_text()
    assert not (out / "0").exists()
    # The name of `1/..` is that of the folder above 1.
    folders = report_command._folders([f"{paths[0]}/1/..", str(tmp_path / "c")], str(out))
    assert [folder for _, folder in folders] == [out / "0", out / "c"]


@pytest.fixture(scope="module")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """(directory, what was printed) of a sweep with report=false: three batch sizes, two seeds each."""
    folder = tmp_path_factory.mktemp("sweep")
    words = ["-m", *SMALL, "trainer.epochs=1", "trainer.batch_size=32,64,128", "seed=0,1", "run.dir=sizes"]
    done = execute_forked([*ALLRANKS, "train", *words], 1, folder).ok()
    assert not (folder / "sizes/compare.html").exists()
    return folder / "sizes", done.out


def compared(*words: object, cwd: Path) -> str:
    done = execute_forked([*ALLRANKS, "compare", *map(str, words)], 1, cwd).ok()
    assert done.err == ""
    return done.out


def test_a_sweep_ends_with_its_comparison(sweep):
    directory, said = sweep
    text = said[said.index("6 runs: ") :]
    assert text.startswith("6 runs: all finished, 1 epoch each. They differ in trainer.batch_size.")
    header, *rows = table_of(text)
    assert header[:3] == ["batch_size", "n", "test/accuracy"]
    by_size = {row[0] if row[0] != "*" else row[1]: row for row in rows}
    assert sorted(by_size, key=int) == ["32", "64", "128"]
    for first, size in enumerate((32, 64, 128)):
        runs = [Run(directory / str(2 * first + seed)) for seed in (0, 1)]
        accuracies = [run.summary["test/accuracy"] for run in runs]
        expected = f"{np.mean(accuracies):.2f} ± {np.std(accuracies, ddof=1):.2f}"
        assert re.sub(" +", " ", next(cell for cell in by_size[str(size)] if "±" in cell)) == expected


def test_the_figures_of_a_comparison_are_those_of_the_records(sweep):
    directory, _ = sweep
    rows = list(csv.DictReader(io.StringIO(compared(directory, "--each", "--csv", cwd=directory))))
    assert len(rows) == 6
    for row in rows:
        run = Run(Path(row["directories"]))
        for name in ("test/accuracy", "test/loss", "time/total_s"):
            assert float(row[name]) == run.summary[name]
        assert float(row["val/loss"]) == min(run.column("val/loss"))
        assert float(row["throughput/samples_per_s"]) == run.column("throughput/samples_per_s")[0]
        times = sum(run.column("time/train_s") + run.column("time/eval_s"))
        assert float(row["time/epochs_s"]) == pytest.approx(times, rel=1e-12)
        assert f"trainer.batch_size={row['trainer.batch_size']}" in (directory / "cells.jsonl").read_text()

    accuracies = [float(row["test/accuracy"]) for row in rows]
    assert accuracies == sorted(accuracies, reverse=True)
    assert [row["best"] for row in rows].count("true") == accuracies.count(max(accuracies))


@pytest.mark.long
def test_a_sweep_leaves_a_page_that_leads_to_the_pages_of_its_runs(tmp_path):
    words = ["-m", *SMALL, "report=true", "trainer.epochs=1", "model=linear", "seed=0,1", "run.dir=two"]
    done = execute_forked([*ALLRANKS, "train", *words], 1, tmp_path, timeout_s=400).ok()
    assert "2 runs: all finished, 1 epoch each. They differ only in their seed." in done.out
    assert f"As a page with curves: {tmp_path}/two/compare.html" in done.out
    html = (tmp_path / "two/compare.html").read_text()
    made = [f"{cell}/report.html" for cell in (0, 1) if (tmp_path / f"two/{cell}/report.html").exists()]
    assert re.findall(r'href="([^"#]+)"', html) == made
    assert (tmp_path / "two/compare/val-loss.png").stat().st_size > 1000


def test_a_page_for_single_runs_is_made_on_demand(sweep, tmp_path):
    cells = [sweep[0] / "0", sweep[0] / "2"]
    assert "page" not in compared(*cells, cwd=tmp_path)
    assert compared(*cells, "--page", "mine", cwd=tmp_path).endswith("mine/compare.html\n")
    assert (tmp_path / "mine/compare.html").exists()
    (tmp_path / "file").touch()
    done = execute_forked([*ALLRANKS, "compare", *map(str, cells), "--page", "file"], 1, tmp_path)
    assert done.code == 2
    assert "file/compare.html cannot be written" in done.err


def test_the_table_can_be_written_to_a_file(sweep, tmp_path):
    directory, _ = sweep
    assert compared(directory, "--json", "--to", "table.json", cwd=tmp_path) == ""
    about = json.loads((tmp_path / "table.json").read_text())
    assert [row["n"] for row in about["rows"]] == [2, 2, 2]
    assert compared(directory, "--json", cwd=tmp_path) == (tmp_path / "table.json").read_text()


def test_runs_are_compared_wherever_they_lie(sweep, tmp_path):
    """The same by naming the runs, by a folder above them, and after the sweep was moved."""
    directory, _ = sweep
    cells = [directory / str(number) for number in range(6)]
    by_name = compared(*cells, "--csv", cwd=tmp_path)
    assert by_name == compared(directory, "--csv", cwd=tmp_path)
    moved = tmp_path / "moved"
    shutil.copytree(directory, moved / "sizes")
    assert compared(moved, "--csv", cwd=tmp_path) == by_name.replace(str(directory), str(moved / "sizes"))
    assert compared(moved / "sizes", "--csv", cwd=tmp_path).count(f"{moved}/sizes/") == 6


def damaged_sweep(directory: Path, to: Path) -> Path:
    """A copy of the sweep of which cell 0 is damaged, 1 was cut off, 2 is of a later version, and 5 has not
    started; cell 3 is as it was, and 4 has strange records."""
    shutil.copytree(directory, to)
    (to / "0/config.yaml").write_bytes(b"\x00{")
    (to / "1/summary.json").unlink()
    config = (to / "2/config.yaml").read_text()
    (to / "2/config.yaml").write_text(config + "quantum: {qubits: 7}\n")
    with (to / "4/metrics.jsonl").open("a") as file:
        file.write("half a li\n")
    shutil.rmtree(to / "5")
    return to


def test_what_can_be_shown_is_shown_beside_what_is_damaged(sweep, tmp_path):
    directory, _ = sweep
    bad = damaged_sweep(directory, tmp_path / "bad")
    about = json.loads(compared(bad, "--json", "--each", cwd=tmp_path))
    states = {Path(row["directories"][0]).name: row["states"][0] for row in about["rows"]}
    assert states == {
        "0": "damaged",
        "1": "stopped",  # it has a checkpoint to go on from
        "2": "finished",
        "3": "finished",
        "4": "finished",
        "5": "not started",
    }
    assert set(about["differ_in"]) == {"trainer.batch_size", "seed", "quantum.qubits"}
    assert [note for note in about["notes"] if "0: config.yaml cannot be read" in note]
    assert [note for note in about["notes"] if "4: metrics.jsonl" in note]
    text = compared(bad, "--each", cwd=tmp_path)
    assert re.search(r"damaged .* 0$", text, re.MULTILINE)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["empty"], "empty holds no run"),
        (["missing"], "missing is no folder"),
        (["empty", "missing"], "missing is no folder"),
        (["other"], "other holds no run"),
        (["good", "--csv", "--json"], "not allowed with argument"),
        (["good", "--to", "x"], "--to x needs a format"),
        (["good", "--csv", "--to", "none/x"], "none/x cannot be written (No such file or directory)"),
        (["good", "--sort", "test/acuracy"], "Did you mean test/accuracy?"),
    ],
)
def test_nothing_to_show_is_one_message(sweep, tmp_path, words, said):
    (tmp_path / "empty").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other/notes.txt").write_text("mine")
    (tmp_path / "good").symlink_to(sweep[0])
    done = execute_forked([*ALLRANKS, "compare", *words], 1, tmp_path)
    assert done.code == 2
    assert said in done.err
    assert "Traceback" not in done.err
    assert done.out == ""


def test_of_several_directories_one_may_hold_no_run(sweep, tmp_path):
    text = compared(sweep[0] / "0", sweep[0] / "2", "missing", cwd=tmp_path)
    assert text.startswith("2 runs: all finished")
    assert "missing is no folder" in text


def test_a_report_of_several_runs_compares_them(sweep, tmp_path):
    cells = [str(sweep[0] / name) for name in ("0", "2")]
    done = execute_forked(
        [*ALLRANKS, "report", "--records-only", "--to", "pages", *cells], 1, tmp_path
    ).ok()
    assert done.out.splitlines() == ["pages/0/report.html", "pages/2/report.html", "pages/compare.html"]
    assert "They differ in trainer.batch_size." in (tmp_path / "pages/compare.html").read_text()


# --- by itself ----------------------------------------------------------------------------------------


A_TABLE = ChildEnd("a table", "", has_failed=False)


def test_one_of_the_cells_that_end_at_the_same_moment_compares_them(sweep, tmp_path, monkeypatch):
    """As the jobs of an array do: exactly one makes the comparison, and knows how all have ended."""
    array = tmp_path / "array"
    shutil.copytree(sweep[0], array)
    for summary in array.glob("*/summary.json"):
        summary.unlink()  # a finished cell counts as ended, whether or not it has said so
    made: list[Sequence[str]] = []
    monkeypatch.setattr(compare_sweep, "_child", lambda _, ends, *__: made.append(ends) or A_TABLE)

    for attempt in range(1, 21):
        assert compare_sweep.after_cell(array / "5", "finished") == ""
        together = threading.Barrier(5)
        said: list[str] = []

        def end(cell: int, together: threading.Barrier = together, said: list[str] = said) -> None:
            together.wait()
            said.append(compare_sweep.after_cell(array / str(cell), f"failed ({cell})"))

        threads = [threading.Thread(target=end, args=(cell,)) for cell in range(5)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert sorted(said) == ["", "", "", "", f"All 6 cells of {array} have ended.\na table"]
        assert len(made) == attempt
        assert made[-1] == [*(f"failed ({cell})" for cell in range(5)), "finished"]
        for note in array.glob(".ended-*"):
            note.unlink()
    assert len(list(array.glob(".compared-*"))) == 1


def test_a_cell_that_has_finished_and_not_said_so_yet_makes_no_second_comparison(
    sweep, tmp_path, monkeypatch
):
    copy = tmp_path / "sizes"
    shutil.copytree(sweep[0], copy)
    monkeypatch.setattr(compare_sweep, "_child", lambda *_: A_TABLE)
    assert compare_sweep.after_cell(copy / "0", "finished").endswith("a table")  # 1 has its summary
    assert compare_sweep.after_cell(copy / "1", "finished") == ""


def test_a_cell_that_is_started_again_brings_a_new_comparison(sweep, tmp_path, monkeypatch):
    """The other cells were trained by one command, which has left no notes of their ends."""
    copy = tmp_path / "sizes"
    shutil.copytree(sweep[0], copy)
    monkeypatch.setattr(compare_sweep, "_child", lambda *_: A_TABLE)
    summary = (copy / "1/summary.json").read_text()
    (copy / "1/summary.json").unlink()
    for end in ("failed (1)", "failed (1)"):
        assert compare_sweep.after_cell(copy / "1", end).endswith("a table")
    (copy / "1/summary.json").write_text(summary)
    assert compare_sweep.after_cell(copy / "1", "finished").endswith("a table")
    assert compare_sweep.after_cell(tmp_path, "finished") == ""  # a run of no sweep


def test_a_comparison_that_fails_is_a_line_of_text(sweep, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    text = compare_sweep.made(gone)
    assert text.startswith("The comparison is not complete (")
    assert f"{gone} is no folder" in text
    assert text.endswith(f"`allranks compare {gone}` tries again.")
    monkeypatch.setattr(compare_sweep, "LIMIT_S", 0.001)
    assert "(it was not done within 0.001 s)" in compare_sweep.made(sweep[0])
    told = compare_sweep.made(sweep[0], ended=compare_sweep.Ended(is_told_to_end=lambda: True))
    assert "(this process was told to end)" in told


def test_a_comparison_that_was_cut_off_is_made_by_a_job_that_is_started_again(tmp_path):
    for number in range(2):
        written(tmp_path / str(number), seed=number)
        (tmp_path / str(number) / "summary.json").write_text('{"state": "finished"}')
    lines = [{"index": i, "overrides": [], "directory": str(tmp_path / str(i))} for i in range(2)]
    (tmp_path / "cells.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    told_to_end = compare_sweep.Ended(is_told_to_end=lambda: True)
    assert "(this process was told to end)" in compare_sweep.after_cell(
        tmp_path / "1", "finished", ended=told_to_end
    )
    assert "2 runs: all finished" in compare_sweep.after_cell(tmp_path / "1", "finished", page=False)
    assert compare_sweep.after_cell(tmp_path / "0", "finished", page=False) == ""


def test_a_job_with_little_time_left_has_the_table_only(sweep, tmp_path, monkeypatch):
    copy = tmp_path / "sizes"
    shutil.copytree(sweep[0], copy, ignore=shutil.ignore_patterns("compare*"))
    monkeypatch.setenv("ALLRANKS_DEADLINE", str(int(time.time()) + 30))
    assert compare_sweep.made(copy).startswith("6 runs: all finished")
    monkeypatch.delenv("ALLRANKS_DEADLINE")
    for ended in (compare_sweep.Ended(left_s=30), compare_sweep.Ended(was_stopped=True)):
        assert compare_sweep.made(copy, ended=ended).startswith("6 runs: all finished")
    assert not (copy / "compare.html").exists()
    text = compare_sweep.made(copy)  # with all the time that it needs
    assert text.endswith(f"As a page with curves: {copy}/compare.html")
    assert (copy / "compare/val-loss.png").stat().st_size > 1000


@pytest.mark.long
def test_a_launched_sweep_ends_with_its_comparison_whatever_its_cells_do(tmp_path):
    """With the larger rate two cells fail: their loss is not finite."""
    words = ["-n", "1", "--no-preflight", "-m", *SMALL, "trainer.epochs=1", "run.dir=sizes"]
    wide = {**os.environ, "COLUMNS": "120"}  # room for all columns of the table
    done = execute(
        [forked_python(), *ALLRANKS, "launch", *words, "optimizer.lr=0.1,1e30", "seed=0,1"], tmp_path, wide
    )
    assert done.code == 2
    text = done.out[done.out.index("4 runs. They differ in optimizer.lr.") :]
    header, finished, failed = table_of(text)
    assert header[:5] == ["lr", "n", "state", "epochs", "test/accuracy"]
    accuracies = [Run(tmp_path / f"sizes/{cell}").summary["test/accuracy"] for cell in (0, 1)]
    assert finished[:4] == ["0.1", "2", "finished", "1"]
    assert finished[4].split()[0] == f"{np.mean(accuracies):.2f}"
    assert failed == ["1e+30", "2", "failed (2)", "0", "-", "-", "-", "-", "-", "-", "2 3"]


def test_only_finite_numbers_are_figures():
    assert is_number(0)
    assert is_number(1e300)
    for value in (10**400, float("inf"), float("nan"), True, "1", None):
        assert not is_number(value)
