"""Makes report.html, the page of one run: a single file that needs no network, script or other file."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple

import allranks
from allranks.base.text import some
from allranks.report import pictures
from allranks.report.examine import ClassFigures, Examined, Example
from allranks.report.gather import Event, RunFacts, as_number
from allranks.report.html import NOTHING, Html, Inside, joined, tag
from allranks.report.pictures import Picture
from allranks.report.png import as_pixels, data_uri

# If there are more ranks, the table has a row for each host instead of each rank: thousands of rows would
# be most of the page.
MOST_SINGLE_RANKS = 64


class Section(NamedTuple):
    """A part of the page with a heading."""

    anchor: str  # its id in the page, to which the links at the top lead
    title: str
    content: Html


def page(facts: RunFacts, seen: Examined | None, drawn: Sequence[Picture], notes: Sequence[str]) -> str:
    """The whole page of a run as HTML.

    `seen` has the results of the model on the test set; None if it was not applied to it. `drawn` has the
    pictures; a picture that is missing is left out. `notes` are sentences on what cannot be shown.
    """
    by_name = {picture.name: picture for picture in drawn}
    sections = [
        Section("curves", "Curves", _curves(facts, by_name)),
        Section("test", "Test set", _test(facts, seen, by_name)),
        Section("examples", "Examples", _examples(seen)),
        Section("weights", "Weights", _weights(seen)),
        Section("time", "Time", _time(facts, by_name)),
        Section("interruptions", "Interruptions", _interruptions(facts.events)),
        Section("ranks", "Ranks", _ranks(facts)),
        Section("configuration", "Configuration", _configuration(facts)),
        Section("environment", "Environment", _environment(facts)),
    ]
    return document(
        title=f"{facts.name}: {facts.state}",
        header=_header(facts, notes),
        sections=[section for section in sections if section.content != NOTHING],
    )


def document(title: str, header: Html, sections: Sequence[Section]) -> str:
    """A whole page: `title` for the browser's tab, the header, links to the sections, and the sections."""
    links = [tag("li", tag("a", section.title, href=f"#{section.anchor}")) for section in sections]
    whole = [
        tag(
            "section",
            tag("h2", section.title, id=f"{section.anchor}-heading"),
            section.content,
            id=section.anchor,
            aria_labelledby=f"{section.anchor}-heading",
        )
        for section in sections
    ]
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    values = {
        "light": _as_css(pictures.LIGHT),
        "dark": _as_css(pictures.DARK),
        "version": allranks.__version__,
        "title": joined([title]).text,
        "header": header.text,
        "nav": tag("nav", tag("ul", *links), aria_label="Sections").text if len(links) > 1 else "",
        "main": "\n".join(section.text for section in whole),
        "footer": joined([f"Made by allranks {allranks.__version__} on {now}."]).text,
    }
    template = Path(__file__).with_name("page.html.template").read_text(encoding="utf-8")
    # All words such as @title@ are replaced in one pass. With one pass for each word, an @nav@ in a run's
    # name would be replaced, too.
    return re.sub(r"@(\w+)@", lambda found: values.get(found[1], found[0]), template)


def _as_css(colours: Mapping[str, str]) -> str:
    """The colours as CSS variables: `--ink: #1c2430; --grid: ...;`."""
    return " ".join(f"--{name}: {colour};" for name, colour in colours.items())


# --- the head of the page --------------------------------------------------------------------------------


def _header(facts: RunFacts, notes: Sequence[str]) -> Html:
    kind = facts.state.split()[0] if facts.state else ""
    return joined(
        [
            tag("p", "Report of one run", class_="kind"),
            tag("h1", facts.name),
            tag("p", facts.state, class_=f"state {kind}"),
            tag("p", str(facts.directory), class_="where"),
            headline(_figures(facts)),
            note([*facts.problems, *notes]),
        ]
    )


def _figures(facts: RunFacts) -> list[tuple[str, str, str]]:
    """The large figures at the top of the page, each as (what, value, words beside it)."""
    found: list[tuple[str, str, str]] = []
    test = as_number(facts.summary.get("test/accuracy"))
    if test is not None:
        loss = as_number(facts.summary.get("test/loss"))
        found.append(("test accuracy", f"{test:.2f} %", "" if loss is None else f"loss {loss:.4f}"))
    known = [epoch for epoch in facts.epochs if epoch["val/accuracy"] is not None]
    if known:
        best = max(known, key=lambda epoch: epoch["val/accuracy"])
        beside = f"epoch {best['epoch']}"
        found.append(("best validation accuracy", f"{best['val/accuracy']:.2f} %", beside))
    done, planned = len(facts.epochs), facts.epochs_planned
    if planned is not None:
        found.append(("epochs", str(done), f"of {planned}" if planned != done else ""))
    parameters = as_number(facts.summary.get("model/parameters"))
    if parameters is not None:
        found.append(("parameters", f"{parameters:,.0f}", ""))
    if facts.world_size is not None:
        hosts = len({rank.host for rank in facts.ranks})
        beside = f"on {hosts} {'host' if hosts == 1 else 'hosts'}" if hosts else ""
        found.append(("ranks" if facts.world_size != 1 else "rank", f"{facts.world_size:,}", beside))
    seconds = as_number(facts.summary.get("time/total_s"))
    if seconds is not None and not facts.events:
        found.append(("in all", duration(seconds), ""))
    return found


def headline(figures: Sequence[tuple[str, str, str]]) -> Html:
    """The large figures below the title: (what, value, words beside the value)."""
    if not figures:
        return NOTHING
    cells = [
        tag("div", tag("dt", what), tag("dd", value, tag("small", beside) if beside else None))
        for what, value, beside in figures
    ]
    return tag("dl", *cells, class_="headline")


def note(sentences: Sequence[str]) -> Html:
    """A box with sentences on what cannot be shown; nothing where there is none."""
    if not sentences:
        return NOTHING
    return tag("div", *(tag("p", sentence) for sentence in sentences), class_="note")


# --- curves ----------------------------------------------------------------------------------------------


# For each picture the columns of the table that can be unfolded below it: (heading, figure, format).
_COLUMNS: Mapping[str, Sequence[tuple[str, str, str]]] = {
    "loss": (("training", "train/loss", ".4f"), ("validation", "val/loss", ".4f")),
    "accuracy": (("training, %", "train/accuracy", ".2f"), ("validation, %", "val/accuracy", ".2f")),
    "learning-rate": (("rate", "lr", ".4g"),),
}
# Without matplotlib there are no curves. Then one table shows all of these figures.
_ALL_COLUMNS = (
    ("training loss", "train/loss", ".4f"),
    ("validation loss", "val/loss", ".4f"),
    ("training accuracy, %", "train/accuracy", ".2f"),
    ("validation accuracy, %", "val/accuracy", ".2f"),
    ("rate", "lr", ".4g"),
)


def _curves(facts: RunFacts, drawn: Mapping[str, Picture]) -> Html:
    if not facts.epochs:
        return NOTHING
    cards = [
        chart(drawn[name], _by_epoch(facts, columns, f"{drawn[name].title} by epoch"))
        for name, columns in _COLUMNS.items()
        if name in drawn
    ]
    if not cards:
        cards = [tag("div", _by_epoch(facts, _ALL_COLUMNS, "Figures by epoch"), class_="card wide")]
    return tag("div", *cards, class_="cards")


def _by_epoch(facts: RunFacts, columns: Sequence[tuple[str, str, str]], label: str) -> Html:
    """A table with a row for each epoch; of very many epochs, only for those that the curves show."""
    rows = []
    for position in pictures.thinned(len(facts.epochs)):
        epoch = facts.epochs[position]
        rows.append([str(epoch["epoch"]), *(_as(epoch[key], spec) for _, key, spec in columns)])
    return table(["epoch", *(heading for heading, _, _ in columns)], rows, label)


def chart(picture: Picture, behind: Html, wide: bool = False) -> Html:
    """A picture with its heading. `behind` is the table of its numbers, which the reader can unfold."""
    return tag(
        "figure",
        tag("figcaption", tag("h3", picture.title)),
        Html(pictures.inline(picture)),
        tag("details", tag("summary", f"{picture.title} as a table"), behind),
        class_="card wide" if wide else "card",
    )


# --- the test set ----------------------------------------------------------------------------------------


def _test(facts: RunFacts, seen: Examined | None, drawn: Mapping[str, Picture]) -> Html:
    if seen is None:
        return NOTHING
    words = f"Accuracy {seen.accuracy:.2f} %, loss {seen.loss:.4f}, over {seen.count:,} examples"
    if not facts.is_finished:
        words += f", with the weights after step {seen.step:,}: the run has not finished"
    cards: list[Html] = []
    if "confusion" in drawn:
        heads = ["true \\ predicted", *seen.classes]
        rows = [
            [seen.classes[true], *(f"{count:,}" for count in row)]
            for true, row in enumerate(seen.confusion.tolist())
        ]
        cards.append(chart(drawn["confusion"], table(heads, rows, label="Confusion matrix")))
    if seen.per_class:
        cards.append(tag("div", tag("h3", "Each class"), _table_of_classes(seen.per_class), class_="card"))
    return joined([tag("p", f"{words}."), tag("div", *cards, class_="cards") if cards else None])


def _table_of_classes(classes: Sequence[ClassFigures]) -> Html:
    heads = ["class", "precision, %", "recall, %", "F1, %", "examples", "mistaken for"]
    rows = [
        [
            one.name,
            _as(one.precision, ".1f"),
            _as(one.recall, ".1f"),
            _as(one.f1, ".1f"),
            f"{one.count:,}",
            one.mistaken_for or "-",
        ]
        for one in classes
    ]
    return table(heads, rows, label="Precision, recall and F1 of each class", texts={0, 5})


# --- strips of images ------------------------------------------------------------------------------------


def _examples(seen: Examined | None) -> Html:
    if seen is None or not seen.has_images:
        return NOTHING
    strips = [
        _strip("The first training examples", "Each with its label.", seen.training_digits),
        _strip("The first predictions", "The first test examples: predicted (true).", seen.predictions),
        _strip("The first mistakes", "In the order of the test set: predicted (true).", seen.misclassified),
        _strip(
            "The most certain mistakes",
            "Predicted (true), and how sure the model was of it.",
            seen.most_certain_mistakes,
        ),
    ]
    return tag("div", *strips, class_="cards")


def _strip(title: str, words: str, examples: Sequence[Example]) -> Html | None:
    """Images side by side under a heading; None if no example has an image."""
    items = [_image_of(example) for example in examples if example.image is not None]
    if not items:
        return None
    return tag(
        "div", tag("h3", title), tag("p", words), tag("ul", *items, class_="strip"), class_="card wide"
    )


def _image_of(example: Example) -> Html:
    """An item of a strip: the image, its title below, and the probability of a prediction."""
    assert example.image is not None
    pixels = as_pixels(example.image)
    if not example.predicted:
        words, below = f"example {example.position}, label {example.label}", None
    else:
        words = f"test example {example.position}, predicted {example.predicted}, true {example.label}"
        below = tag("small", f"{example.probability:.1f} %")
    is_wrong = bool(example.predicted) and example.predicted != example.label
    return tag(
        "li",
        tag("img", src=data_uri(pixels), alt=words, width=pixels.shape[1], height=pixels.shape[0]),
        tag("span", example.title, class_="wrong" if is_wrong else None),
        below,
    )


def _weights(seen: Examined | None) -> Html:
    if seen is None or not seen.weights:
        return NOTHING
    items = []
    for name, pixels in zip(seen.classes, pictures.weight_pixels(seen.weights), strict=False):
        image = tag("img", src=data_uri(pixels), alt=f"weights of class {name}", width=pixels.shape[1],
                    height=pixels.shape[0])  # fmt: skip
        items.append(tag("li", image, tag("span", name)))
    words = "For each class the weight of each pixel: blue speaks for the class, orange against it."
    return joined(
        [
            tag("p", words),
            tag("div", tag("div", tag("ul", *items, class_="strip"), class_="card wide"), class_="cards"),
        ]
    )


# --- time and place --------------------------------------------------------------------------------------


def _time(facts: RunFacts, drawn: Mapping[str, Picture]) -> Html:
    spent = pictures.phases_s(facts)
    if not spent:
        return NOTHING
    phases = table(["phase", "s"], [[n, f"{s:,.1f}"] for n, s in spent.items()], label="Time by phase")
    ranks = facts.world_size or 1
    rows = []
    for position in pictures.thinned(len(facts.epochs)):
        epoch = facts.epochs[position]
        together = epoch["throughput/samples_per_s"]
        each = None if together is None else together / ranks
        times = (epoch["time/train_s"], epoch["time/eval_s"])
        rows.append(
            [str(epoch["epoch"]), *(_as(value, ",.2f") for value in times), _as(together, ",.0f"),
             _as(each, ",.0f")]
        )  # fmt: skip
    heads = ["epoch", "training, s", "evaluation, s", "examples/s", "of each rank"]
    by_epoch = table(heads, rows, label="Time and throughput by epoch")
    cards = [
        chart(drawn["phases"], phases) if "phases" in drawn else tag("div", phases, class_="card"),
        chart(drawn["throughput"], by_epoch)
        if "throughput" in drawn
        else tag("div", by_epoch, class_="card"),
    ]
    operations = _table_of_operations(facts.profile)
    if operations is not None:
        words = "Operations of the steps that were profiled, on rank 0."
        cards.append(
            tag("div", tag("h3", "Where the time goes"), tag("p", words), operations, class_="card wide")
        )
    return tag("div", *cards, class_="cards")


def _table_of_operations(profile: Mapping[str, Any]) -> Html | None:
    """The operations that took longest in a run with profile=true; None where there is no such table."""
    found = profile.get("rows")
    rows = [row for row in (found if isinstance(found, list) else []) if isinstance(row, dict)]
    if not rows:
        return None
    of_device = any(as_number(row.get("own_device_ms")) is not None for row in rows)
    key = "own_device_ms" if of_device else "own_cpu_ms"
    cells = []
    for row in rows:
        share = as_number(row.get("share"))
        cells.append(
            [
                str(row.get("name", "")),
                _as(as_number(row.get("calls")), ",.0f"),
                _as(as_number(row.get(key)), ",.2f"),
                "-" if share is None else f"{100 * share:.1f}",
            ]
        )
    heads = ["operation", "calls", "ms on the device" if of_device else "ms", "share, %"]
    return table(heads, cells, label="Operations by the time that they took", texts={0})


def _interruptions(events: Sequence[Event]) -> Html:
    if not events:
        return NOTHING
    words = {"stopped": "stopped and saved", "resumed": "went on"}
    rows = [
        [
            _moment(event.time),
            words.get(event.kind, event.kind),
            f"{event.step:,}",
            str(event.epoch),
            "-" if event.world_size is None else f"{event.world_size:,}",
            event.why,
        ]
        for event in events
    ]
    heads = ["time", "what", "step", "epochs done", "ranks", "by, or from"]
    content = table(heads, rows, label="Interruptions and resumes", texts={0, 1, 5})
    return tag("div", tag("div", content, class_="card wide"), class_="cards")


def _ranks(facts: RunFacts) -> Html:
    if not facts.ranks:
        return NOTHING
    if len(facts.ranks) <= MOST_SINGLE_RANKS:
        heads = ["rank", "host", "device", "CPUs"]
        rows = [[str(rank.number), rank.host, rank.device, rank.cpus or "-"] for rank in facts.ranks]
    else:
        heads = ["ranks", "host", "devices", "CPUs"]
        hosts = dict.fromkeys(rank.host for rank in facts.ranks)
        here = {host: [rank for rank in facts.ranks if rank.host == host] for host in hosts}
        rows = [
            [
                some([rank.number for rank in ranks]),
                host,
                some(list(dict.fromkeys(rank.device for rank in ranks))),
                some(list(dict.fromkeys(rank.cpus for rank in ranks))) or "-",
            ]
            for host, ranks in here.items()
        ]
    content = table(heads, rows, label="Ranks, hosts and devices", texts={0, 1, 2, 3})
    return tag("div", tag("div", content, class_="card wide"), class_="cards")


# --- configuration and environment -----------------------------------------------------------------------


def _configuration(facts: RunFacts) -> Html:
    given = [
        tag("li", tag("code", override)) for override in facts.overrides if not override.startswith("hydra")
    ]
    pieces: list[Inside] = []
    if given:
        pieces += [tag("p", "Given on the command line:"), tag("ul", *given, class_="given-words")]
    if facts.config:
        pieces.append(tag("div", *_tables_of_values(facts), class_="columns"))
    return joined(pieces) if given or facts.config else NOTHING


def _tables_of_values(facts: RunFacts) -> list[Html]:
    """A table for each section of the configuration; what was given on the command line is marked."""
    sections: dict[str, list[tuple[str, Any]]] = {}
    for key, value in facts.config.items():
        # config.yaml has no value for run.dir, so that the run can be repeated in another directory.
        if key == "run.dir":
            continue
        section, dot, rest = key.partition(".")
        sections.setdefault(section if dot else "run", []).append((rest if dot else key, value))
    given = {override.partition("=")[0].lstrip("+~") for override in facts.overrides}
    cards = []
    for section, values in sections.items():
        rows = []
        for name, value in values:
            key = name if section == "run" else f"{section}.{name}"
            cells = (tag("th", name, scope="row"), tag("td", _value(value)))
            rows.append(tag("tr", *cells, class_="given" if key in given else None))
        title = "General" if section == "run" else section
        content = tag("table", tag("caption", title), tag("tbody", *rows), class_="values")
        cards.append(tag("div", content, class_="card"))
    return cards


def _value(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if value is None:
        return "null"
    if isinstance(value, list):
        return f"[{', '.join(_value(each) for each in value)}]"
    return str(value)


def _environment(facts: RunFacts) -> Html:
    about = facts.environment
    if not about:
        return NOTHING
    command = about.get("command")
    words = {
        "command": " ".join(map(str, command)) if isinstance(command, list) else None,
        "git commit": about.get("git_commit"),
        "launcher": about.get("launcher"),
        "ranks connected by": about.get("runtime"),
        "sums over ranks by": about.get("collectives"),
        "threads of each rank": about.get("threads_per_rank"),
    }
    versions = about.get("versions")
    packages = {"python": about.get("python"), **(versions if isinstance(versions, dict) else {})}
    tables = [("Start", words), ("Versions", packages)]
    cards = []
    for title, values in tables:
        rows = [
            tag("tr", tag("th", name, scope="row"), tag("td", str(value)))
            for name, value in values.items()
            if value is not None
        ]
        content = tag("table", tag("caption", title), tag("tbody", *rows), class_="values")
        if rows:
            cards.append(tag("div", content, class_="card"))
    return tag("div", *cards, class_="cards") if cards else NOTHING


# --- tools -----------------------------------------------------------------------------------------------


def table(
    heads: Sequence[str],
    rows: Sequence[Sequence[str]],
    label: str,
    texts: set[int] | frozenset[int] = frozenset(),
) -> Html:
    """A table that scrolls within the page, also with the keyboard.

    The first cell of each row is the row's heading. `texts` has the indices of the columns that hold text;
    the other columns hold numbers, which are aligned to the right. Without `texts` only the first column
    holds text.
    """

    def css(column: int) -> str | None:
        return None if column in texts or (column == 0 and not texts) else "number"

    head = tag(
        "tr",
        *(
            tag("th", text, scope="col", class_=css(i)) if text else tag("td")
            for i, text in enumerate(heads)
        ),
    )
    body = [
        tag(
            "tr",
            tag("th", row[0], scope="row", class_=css(0)),
            *(tag("td", cell, class_=css(column)) for column, cell in enumerate(row[1:], start=1)),
        )
        for row in rows
    ]
    whole = tag("table", tag("thead", head), tag("tbody", *body))
    return tag("div", whole, class_="scroll", role="region", aria_label=label, tabindex=0)


def _as(value: float | None, spec: str) -> str:
    """The value in this format, such as `.2f`; `-` for None."""
    return "-" if value is None else format(value, spec)


def duration(seconds: float) -> str:
    """A duration in seconds, minutes or hours, so that the number stays below 100 up to four days."""
    if seconds < 100:
        return f"{seconds:.1f} s"
    minutes = seconds / 60
    return f"{minutes:.1f} min" if minutes < 100 else f"{minutes / 60:.1f} h"


def _moment(text: str) -> str:
    """A time in ISO 8601 format, shortened to the second. Any other text stays as it is."""
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return text
