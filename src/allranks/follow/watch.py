"""`allranks watch`: shows one run in detail, or many runs in a table, and draws it anew every two seconds.

Everything is read from the files of the runs. So it can be used on a login node, and does not disturb the
jobs.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from allranks.base import terminal
from allranks.base.terminal import BOLD, CYAN, DIM, GREEN, RED, YELLOW, painted
from allranks.base.text import as_text, printable
from allranks.follow import drawing
from allranks.follow.reading import Reader, View
from allranks.run import metric_names

# A network file system shows new content of a file only every few seconds: drawing more often would show
# nothing more.
EVERY_S = 2
LEAST_CHART_COLUMNS, MOST_CHART_COLUMNS = 20, 72
CHART_ROWS = 8
LEAST_SCALE_COLUMNS = 8  # room for the numbers beside a chart, such as 0.08123
LABEL_COLUMNS = 15  # room for the longest usual label, "train accuracy", and a blank
SPARK_COLUMNS = 12
MOST_METRICS = 12  # have a line each in the picture of one run; of further ones the names are given
MOST_CURVES = 3  # in one picture: those of the training, validation and test examples

# Terminals have a second screen. _ENTER shows it and hides the cursor; _LEAVE goes back to the first
# screen, which is unchanged, and shows the cursor.
_ENTER, _LEAVE = "\x1b[?1049h\x1b[?25l", "\x1b[?25h\x1b[?1049l"
_HOME, _END_LINE = "\x1b[H", "\x1b[K"


class Look(NamedTuple):
    """What the output can show: its width, colours, and characters beyond ASCII."""

    # Characters in a line; None if stdout is not a terminal, and lines may have any length.
    columns: int | None
    colours: bool = False
    is_unicode: bool = True

    @property
    def width(self) -> int:
        """How many characters of a line are used: a wide window is not filled."""
        return min(self.columns or terminal.MOST_COLUMNS, terminal.MOST_COLUMNS)

    def paint(self, text: str, *codes: str) -> str:
        """The text in these colours, if colours are wanted."""
        return painted(text, *codes) if self.colours else text


def look_of_stdout() -> Look:
    """What the stdout of this process can show now; the window's size may change."""
    encoding = (getattr(sys.stdout, "encoding", None) or "").lower().replace("-", "")
    return Look(terminal.columns_of(1), terminal.shows_colours(1), encoding == "utf8")


# --- pictures -----------------------------------------------------------------------------------------


def picture(views: Sequence[View], look: Look) -> list[str]:
    """The lines that show these runs: one run in detail, several in a table."""
    return _detail(views[0], look) if len(views) == 1 else _table(views, look)


def _detail(view: View, look: Look) -> list[str]:
    lines = [look.paint(_fitting(f"{view.name}: {view.state}", look), BOLD, _colour_of(view))]

    def add(label: str, value: str | None) -> None:
        if value:
            # A longer label, such as a metric's, has its blank, too.
            head = f"  {label:{LABEL_COLUMNS - 1}} "
            lines.append(look.paint(head, DIM) + _fitting(value, look, len(head)))

    if view.epochs and view.counts == "epoch":
        words = _fitting(_progress_words(view), look, LABEL_COLUMNS + 4)
        room = look.width - LABEL_COLUMNS - 4 - len(words)
        length = min(max(room, 0), 40)
        bar = drawing.bar(view.share or 0.0, length, look.is_unicode)
        lines.append(
            look.paint(f"  {'progress':{LABEL_COLUMNS}}", DIM) + look.paint(bar, CYAN) + f"  {words}"
        )
    elif view.step:
        epoch = f"epoch {view.epoch}, " if view.epoch else ""
        add("progress", f"{epoch}step {view.step:,}")
    if view.left_s is not None:
        add("time left", terminal.short_duration(view.left_s))
    if view.samples_per_s is not None:
        add("speed", f"{view.samples_per_s:,.0f} samples/s")
    if view.ranks:
        hosts = f" on {view.hosts} host{'s' if view.hosts != 1 else ''}" if view.hosts else ""
        add("ranks", f"{view.ranks:,}{hosts}")
    add("job", view.job_id)
    metrics = list(view.metrics)
    for name in metrics[:MOST_METRICS]:
        add(metric_names.words_of(name), _newest(name, view))
    if len(metrics) > MOST_METRICS:
        add("and", ", ".join(metrics[MOST_METRICS:]))
    if view.best_epoch:
        add("best epoch", f"{view.best_epoch} ({view.best_by})")
    add("test", metric_names.in_a_sentence(view.tests))
    add("result", metric_names.in_a_sentence(view.results))
    add("directory", as_text(view.directory))
    for problem in view.problems:
        add("problem", printable(problem))
    return [*lines, *_curves(view, look)]


def _progress_words(view: View) -> str:
    """How much of the run is done, in percent, epochs and steps."""
    share = f"{100 * (view.share or 0.0):3.0f} %"
    steps = f", step {view.step:,}" if view.step else ""
    of = f" of {view.steps:,}" if view.step and view.steps else ""
    return f"{share}  epoch {view.epoch} of {view.epochs}{steps}{of}"


def _newest(name: str, view: View) -> str | None:
    """The newest value of a metric, and the first one; `nan` for one that is not finite."""
    values = view.metrics[name]
    if not values:
        return None
    shown = [
        "nan" if value is None else metric_names.with_unit(name, value) for value in (values[-1], values[0])
    ]
    if len(values) == 1:
        return shown[0]
    # A metric that is measured now and then only was perhaps not measured after the first epoch.
    is_sparse = view.counts == "epoch" and len(values) < view.epoch
    return f"{shown[0]}, {shown[1]} {'at first' if is_sparse else f'after the first {view.counts}'}"


def _curves(view: View, look: Look) -> list[str]:
    """The curves of the quantity that comes first, the loss. Before two epochs, the losses of the steps.

    Empty if there are fewer than two values, or if the window is too narrow.
    """
    of_quantities = list(metric_names.by_quantity(view.metrics).values())
    names = of_quantities[0][:MOST_CURVES] if of_quantities else []
    if names and len(view.metrics[names[0]]) > 1:
        curves = [view.metrics[name] for name in names]
        names = [metric_names.words_of(name) for name in names]
        last = view.epoch or max(map(len, curves))
        axis = f"up to step {view.step:,}" if view.counts == "step" else f"{view.counts} 1 to {last}"
    elif len(view.step_losses) > 1:
        curves = [view.step_losses]
        names = [f"{view.of_steps} of a step"]
        axis = f"up to step {view.step:,}"
    else:
        return []
    known = [loss for curve in curves for loss in curve if loss is not None]
    if not known:
        return []
    top, bottom = f"{max(known):.4g}", f"{min(known):.4g}"
    scale_columns = max(len(top), len(bottom), LEAST_SCALE_COLUMNS)
    columns = min(look.width - scale_columns - 4, MOST_CHART_COLUMNS)
    if columns < LEAST_CHART_COLUMNS:
        return []
    # Of several curves the first one is dotted.
    colours = [YELLOW, CYAN, GREEN][: len(curves)] if len(curves) > 1 else [CYAN]
    signs = ["dots", "line", "line"][: len(curves)] if len(curves) > 1 else ["line"]
    legend = _legend(names, signs, colours, look, used=scale_columns + 4)
    if not look.is_unicode:
        lines = [
            f"  {name[:13]:14}{drawing.sparkline(curve, columns - 4, is_unicode=False)}"
            for name, curve in zip(names, curves, strict=True)
        ]
        return ["", *lines]
    rows = drawing.chart(curves, columns, CHART_ROWS)
    lines = ["", f"  {'':{scale_columns}}  {legend}"]
    for number, cells in enumerate(rows):
        scale = {0: top, CHART_ROWS - 1: bottom}.get(number, "")
        drawn = "".join(sign if who is None else look.paint(sign, colours[who]) for sign, who in cells)
        lines.append(look.paint(f"  {scale:>{scale_columns}}  ", DIM) + drawn.rstrip())
    return [*lines, look.paint(_fitting(f"  {'':{scale_columns}}  {axis}", look), DIM)]


def _legend(
    names: Sequence[str], signs: Sequence[str], colours: Sequence[str], look: Look, used: int
) -> str:
    """Which curve is drawn how, in its colour, cut so that it fits beside `used` other characters."""
    shown: list[str] = []
    for name, sign, colour in zip(names, signs, colours, strict=True):
        text = _fitting(f"{name} ({sign})", look, used)
        used += len(text) + 2
        shown.append(look.paint(text, colour) if text else "")
    return "  ".join(shown).rstrip()


class _Column(NamedTuple):
    title: str
    cells: list[str]
    # If there is not enough room, the column with the highest number is left out first; 0: never.
    goes: int = 0
    is_number: bool = True


def _table(views: Sequence[View], look: Look) -> list[str]:
    """A line for each run, under a line of titles, and one that counts the runs."""
    paths = [Path(view.directory).absolute() for view in views]
    above = os.path.commonpath([path.parent for path in paths])
    # Not Path.relative_to(): for it /tmp is not above //tmp/run, where the user has typed two slashes.
    names = [as_text(os.path.relpath(path, above)) for path in paths]
    columns = [
        _Column("run", names, is_number=False),
        _Column("state", [printable(view.state) for view in views], is_number=False),
        _Column("epoch", [_epoch(view) for view in views]),
        _Column("left", [_or_dash(view.left_s, terminal.short_duration) for view in views], goes=1),
        _Column("samples/s", [_or_dash(view.samples_per_s, "{:,.0f}".format) for view in views], goes=5),
        *_columns_of_metrics(views, look),
    ]
    # A column is left out if none of its cells is known, or if there is no room for it.
    columns = [column for column in columns if any(cell not in ("-", "") for cell in column.cells)]
    while look.columns is not None and _width(columns) > look.columns:
        leaves = max(columns, key=lambda column: column.goes)
        if not leaves.goes:
            break
        columns.remove(leaves)

    lines = [look.paint(_row([column.title for column in columns], columns).rstrip(), DIM)]
    for number, view in enumerate(views):
        line = _row([column.cells[number] for column in columns], columns).rstrip()
        line = line if look.columns is None else line[: look.columns]
        lines.append(look.paint(line, _colour_of(view)) if not view.is_running else line)
    problems = [problem for view in views for problem in view.problems]
    lines += [look.paint(_fitting(f"  {printable(problem)}", look), YELLOW) for problem in problems[:5]]
    return [_count(views), "", *lines]


def _columns_of_metrics(views: Sequence[View], look: Look) -> list[_Column]:
    """The columns of what most of the runs are about: loss and main metric, test figure, the loss so far.

    Metrics of validation examples are taken, where there are such.
    """
    every = dict.fromkeys(name for view in views for name in view.metrics)
    quantities = metric_names.by_quantity(every)
    if not quantities:
        return []
    main = metric_names.main_quantity(every)
    first = next(iter(quantities))
    names = [metric_names.validated(quantities[each])[0] for each in (first, main)]
    columns = []
    # In a narrow window the loss goes before the main metric.
    for name, goes in dict(zip(names, (4, 2), strict=True)).items():
        cells = [metric_names.number(name, view.newest(name)) for view in views]
        columns.append(_Column(_title(name), cells, goes=goes))
    test = f"test/{main}"
    columns.append(
        _Column(_title(test), [metric_names.number(test, view.tests.get(test)) for view in views], goes=3)
    )
    curve = names[0]
    sparks = [
        drawing.sparkline(view.metrics.get(curve, ()), SPARK_COLUMNS, look.is_unicode) for view in views
    ]
    columns.append(_Column(f"{_title(curve)} so far", sparks, goes=6, is_number=False))
    return columns


def _title(name: str) -> str:
    """The title of a metric's column: `val loss`, or `val %` for an accuracy."""
    if metric_names.quantity_of(name) == "accuracy":
        return f"{metric_names.part_of(name)} %".lstrip()
    return metric_names.words_of(name)


def _count(views: Sequence[View]) -> str:
    """How many runs are in each state."""
    states = [view.state.split(" (")[0] for view in views]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    return f"{len(views)} runs: {counts}"


def _row(cells: Sequence[str], columns: Sequence[_Column]) -> str:
    shown = []
    for cell, column in zip(cells, columns, strict=True):
        width = _column_width(column)
        shown.append(f"{cell:>{width}}" if column.is_number else f"{cell:{width}}")
    return "  " + "  ".join(shown)


def _column_width(column: _Column) -> int:
    return max(len(column.title), *(len(cell) for cell in column.cells))


def _width(columns: Sequence[_Column]) -> int:
    return sum(_column_width(column) + 2 for column in columns)


def _epoch(view: View) -> str:
    """How many epochs are done, of how many; the newest step of a loop that counts none."""
    if view.counts != "epoch":
        return f"step {view.step:,}" if view.step else "-"
    if view.epochs:
        return f"{view.epoch}/{view.epochs}"
    return str(view.epoch) if view.epoch else "-"


def _or_dash(value: float | None, text: Callable[[float], str]) -> str:
    return "-" if value is None else text(value)


def _colour_of(view: View) -> str:
    if view.state == "finished":
        return GREEN
    if view.state.startswith(("failed", "killed", "lost")):
        return RED
    return CYAN if view.is_running else YELLOW


def _fitting(text: str, look: Look, used: int = 0) -> str:
    """The text, cut so that it fits into a line of the terminal beside `used` other characters.

    A longer text would continue on the next line, and the lines below would be shifted.
    """
    return text if look.columns is None else text[: max(look.columns - used - 1, 0)]


# --- the live picture ---------------------------------------------------------------------------------


def follow(reader: Reader) -> None:
    """Draws the runs anew every EVERY_S seconds, until all have finished or Ctrl-C is typed.

    The last picture stays on the terminal.
    """
    views = reader.views()
    with _other_screen(), _window_changes() as wait:
        while not all(view.state == "finished" for view in views):
            try:
                _draw(picture(views, look_of_stdout()))
                wait(EVERY_S)
                views = reader.views()
            except KeyboardInterrupt:
                break
    sys.stdout.write("\n".join(picture(views, look_of_stdout())) + "\n")


def _draw(lines: Sequence[str]) -> None:
    """Draws the lines over the previous picture, as many as fit into the window."""
    try:
        rows = os.get_terminal_size(1).lines or len(lines)
    except OSError:
        rows = len(lines)
    footer = f"every {EVERY_S} s; Ctrl-C ends it, and not the runs"
    shown = [*lines[: rows - 2], "", footer] if rows > 4 else list(lines[:rows])
    text = f"{_END_LINE}\n".join(shown)
    sys.stdout.write(f"{_HOME}{text}{_END_LINE}{terminal.ERASE_BELOW}")
    sys.stdout.flush()


@contextmanager
def _other_screen() -> Iterator[None]:
    """Within this context the terminal shows its second screen, without a cursor.

    Afterwards it shows the first screen and the cursor again, also if this process is told to end by
    SIGTERM. While it is stopped by Ctrl-Z the shell has them as well.
    """

    def show(screen: str) -> None:
        sys.stdout.write(screen)
        sys.stdout.flush()

    def stop(number: int, _: object) -> None:
        show(_LEAVE)
        signal.signal(number, signal.SIG_DFL)
        os.kill(os.getpid(), number)  # stops this process here, until `fg` lets it go on
        signal.signal(number, stop)
        show(_ENTER)

    before = signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    before_stop = signal.signal(signal.SIGTSTP, stop)
    show(_ENTER)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
        signal.signal(signal.SIGTSTP, before_stop)
        show(_LEAVE)


@contextmanager
def _window_changes() -> Iterator[Callable[[float], object]]:
    """Provides a function that waits for some seconds, or until the size of the window changes.

    SIGWINCH, which the terminal sends for a changed size, is blocked meanwhile, so that the wait receives
    it.
    """
    window = {signal.SIGWINCH}
    signal.pthread_sigmask(signal.SIG_BLOCK, window)
    try:
        yield lambda seconds: signal.sigtimedwait(window, seconds)
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, window)
