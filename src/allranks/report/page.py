"""Makes report.html, the page of one run: a single file that needs no network, script or other file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

from allranks.base.terminal import duration
from allranks.base.text import some
from allranks.report import curves
from allranks.report.curves import Column, Curves
from allranks.report.document import Section, cell, chart, document, headline, note, table
from allranks.report.drawing import Picture
from allranks.report.examine import Examined
from allranks.report.gather import Event, RunFacts
from allranks.report.html import NOTHING, Html, Inside, joined, tag
from allranks.report.page_test_set import examples, test_set, weights
from allranks.run import metric_names
from allranks.run.metric_names import as_number

# If there are more ranks, the table has a row for each host instead of each rank: thousands of rows would
# be most of the page.
MOST_SINGLE_RANKS = 64
# So many figures of the whole run are shown, if a program of the user's own has logged them.
_MOST_RESULTS = 6
_MOST_BESIDE = 3  # figures over the test set beside the large one; more would not fit on a phone


def page(facts: RunFacts, seen: Examined | None, drawn: Sequence[Picture], notes: Sequence[str]) -> str:
    """The whole page of a run as HTML.

    `seen` has the results of the model on the test set; None if it was not applied to it. `drawn` has the
    pictures; a picture that is missing is left out. `notes` are sentences on what cannot be shown.
    """
    by_name = {picture.name: picture for picture in drawn}
    sections = [
        Section("curves", "Curves", _curves(facts, by_name)),
        Section("test", "Test set", test_set(facts, seen, by_name)),
        Section("examples", "Examples", examples(seen)),
        Section("weights", "Weights", weights(seen)),
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
    found = [*_test_figure(facts.tests), *_figure_of_the_best_epoch(facts)]
    for name, value in list(facts.results.items())[:_MOST_RESULTS]:
        found.append((name, metric_names.with_unit(name, value), ""))
    done, planned = facts.epochs_done, facts.epochs_planned
    if done is None:
        found.append((f"{facts.axis}s", f"{facts.places[-1]:,}", ""))
    elif done or (planned and not facts.is_finished):  # shared work has no epochs
        found.append(("epochs", str(done), f"of {planned}" if planned not in (None, done) else ""))
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


def _test_figure(tests: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """The figure over the test set that says most, with the others beside it; nothing without a test."""
    if not tests:
        return []
    name = f"test/{metric_names.main_quantity(tests)}"
    others = {other: value for other, value in tests.items() if other != name}
    beside = metric_names.in_a_sentence(dict(list(others.items())[:_MOST_BESIDE]))
    return [(metric_names.words_of(name), metric_names.with_unit(name, tests[name]), beside)]


def _figure_of_the_best_epoch(facts: RunFacts) -> list[tuple[str, str, str]]:
    """What the best epoch has come to, or the newest one, where none can be called the best."""
    best = facts.best
    line = best or (facts.epochs[-1] if facts.epochs else {})
    there = [name for name in facts.metrics if line.get(name) is not None]
    shown = metric_names.validated(there)
    if not shown:
        return []
    quantity = metric_names.main_quantity(shown)
    name = next(each for each in shown if metric_names.quantity_of(each) == quantity)
    where = f"{'best' if best else 'newest'} {facts.axis}"
    number = line.get(facts.axis)
    beside = where if number is None else f"{where}: {number:,}"
    return [(metric_names.spoken(name), metric_names.with_unit(name, line[name]), beside)]


# --- curves ----------------------------------------------------------------------------------------------


def _curves(facts: RunFacts, drawn: Mapping[str, Picture]) -> Html:
    """The curves, each with its table; one table of all figures where no picture could be drawn."""
    every = curves.curves_of(facts)
    cards = [
        chart(drawn[each.name], _by_epoch(facts, each.columns, f"{each.title} by {facts.axis}"))
        for each in every
        if each.name in drawn
    ]
    if not cards:
        columns = [
            column._replace(heading=_heading(each, column)) for each in every for column in each.columns
        ]
        if not columns:
            return NOTHING
        content = _by_epoch(facts, columns, f"Figures by {facts.axis}")
        cards = [tag("div", content, class_="card wide")]
    return joined([tag("div", *cards, class_="cards"), _not_drawn(facts)])


def _heading(each: Curves, column: Column) -> str:
    """The heading of a column in the table of all figures: `training loss`, `rate`, `energy`."""
    if each.name == curves.LEARNING_RATE:
        return column.heading
    percent = ", %" if each.unit == "%" else ""
    return f"{metric_names.spoken(column.key)}{percent}"


def _not_drawn(facts: RunFacts) -> Html | None:
    """A sentence that names the quantities for which the page has no room; None if there are none."""
    others = list(metric_names.by_quantity(facts.metrics))[curves.MOST_QUANTITIES :]
    return tag("p", f"Only in metrics.jsonl: {some(others)}.") if others else None


def _by_epoch(facts: RunFacts, columns: Sequence[Column], label: str) -> Html:
    """A table with a row for each line that has one of the figures.

    Of very many lines it has as many as a curve has points.
    """
    measured = [
        (place, line)
        for place, line in zip(facts.places, facts.epochs, strict=True)
        if any(column.key in line for column in columns)
    ]
    rows = []
    for position in curves.thinned(len(measured)):
        place, line = measured[position]
        rows.append([str(place), *(_figure(column.key, line.get(column.key)) for column in columns)])
    return table([facts.axis, *(column.heading for column in columns)], rows, label)


def _figure(key: str, value: float | None) -> str:
    """A figure in a table; `-` where it is not known."""
    return cell(value, ".4g") if key == "lr" else metric_names.number(key, value)


# --- time and place --------------------------------------------------------------------------------------


def _time(facts: RunFacts, drawn: Mapping[str, Picture]) -> Html:
    spent = curves.phases_s(facts)
    if not spent:
        return NOTHING
    phases = table(["phase", "s"], [[n, f"{s:,.1f}"] for n, s in spent.items()], label="Time by phase")
    rows = []
    for position in curves.thinned(len(facts.epochs)):
        line = facts.epochs[position]
        together = line.get("throughput/samples_per_s")
        ranks = facts.ranks_of_lines[position]
        mean = None if together is None or not ranks else together / ranks
        rows.append(
            [
                str(facts.places[position]),
                cell(line.get("time/train_s"), ",.2f"),
                cell(line.get("time/eval_s"), ",.2f"),
                cell(together, ",.0f"),
                cell(mean, ",.0f"),
            ]
        )
    heads = [facts.axis, "training, s", "evaluation, s", "examples/s", "mean of the ranks"]
    by_epoch = table(heads, rows, label=f"Time and throughput by {facts.axis}")
    cards = [_chart_or_table(drawn.get("phases"), phases)]
    cards.append(_chart_or_table(drawn.get(curves.THROUGHPUT), by_epoch))
    operations = _table_of_operations(facts.profile)
    if operations is not None:
        words = "Operations of the steps that were profiled, on rank 0."
        cards.append(
            tag("div", tag("h3", "Where the time goes"), tag("p", words), operations, class_="card wide")
        )
    return tag("div", *cards, class_="cards")


def _chart_or_table(picture: Picture | None, numbers: Html) -> Html:
    """The picture with the table of its numbers; the table alone where the picture was not drawn."""
    return tag("div", numbers, class_="card") if picture is None else chart(picture, numbers)


def _table_of_operations(profile: Mapping[str, Any]) -> Html | None:
    """The operations that took longest in a run with profile=true; None if there is no such table."""
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
                cell(as_number(row.get("calls")), ",.0f"),
                cell(as_number(row.get(key)), ",.2f"),
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


def _moment(text: str) -> str:
    """A time in ISO 8601 format, shortened to the second. Any other text stays as it is."""
    try:
        return datetime.fromisoformat(text).strftime("%Y-%m-%d %H:%M:%S")
    except ValueError:
        return text
