"""The pictures of a report, drawn by matplotlib: one function for each of them.

Each picture is drawn once, in the colours of LIGHT, and saved as PNG and as SVG. inline() turns the SVG
into an element of a page. There it replaces each colour by a CSS variable, so that the browser can show the
page in light or in dark colours. matplotlib is an extra (`pip install 'allranks[report]'`), and is imported
only when a picture is drawn.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from allranks.base import files
from allranks.report.examine import Examined, Example
from allranks.report.gather import RunFacts
from allranks.report.png import as_pixels

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INSTALL = "pip install 'allranks[report]'"
MISSING = f"The page has no pictures, because matplotlib is not installed: {INSTALL}"

# The colours of the pictures by name. The PNG and SVG files have the colours of LIGHT. In a page each name
# is a CSS variable, which has the value in DARK if the reader's browser prefers dark pages. All values of
# LIGHT must be different, because inline() replaces a colour by its name wherever it finds the value. Blue
# and orange can be told apart with every kind of colour blindness.
LIGHT = {
    "paper": "#fffefe",
    "ink": "#1c2430",
    "muted": "#566070",
    "grid": "#e5e3de",
    "blue": "#2463a6",
    "orange": "#b45309",
    "green": "#2e7a58",
    "grey": "#8a93a0",
    # Letters on a colour of middle strength, which need to be dark on light pages and on dark ones. It
    # differs from "ink" by 1 in the blue, only because all values must be different.
    "ink-on-half": "#1c2431",
}
DARK = {
    "paper": "#191f26",
    "ink": "#e7eaee",
    "muted": "#a4aebb",
    "grid": "#2f3843",
    "blue": "#7fb4ea",
    "orange": "#f0a35e",
    "green": "#7ecba5",
    "grey": "#8c96a3",
    "ink-on-half": "#191f26",
}

# A phone shrinks a picture to the width of its screen. In a picture of this width the letters stay
# readable.
WIDTH_IN = 4.6
HEIGHT_IN = 2.9
POINTS_PER_INCH = 72
UNIT_IN = 0.26  # height of the line above the axes that holds the unit
# Height of the line above the axes that holds the title. inline() cuts it off: in a page the heading has
# it.
TITLE_PT = 24
PNG_DPI = 200  # sharp on screens with twice the usual resolution

MOST_POINTS = 400  # of a curve with more epochs only so many are drawn, so that a page stays small
MARKED_POINTS = 30  # a curve of at most so many epochs has a dot at each of them
MOST_COUNTED_CLASSES = 20  # the confusion matrix of at most so many classes shows its numbers
LOG_RATIO = 50  # a learning rate that changes by a larger factor is shown on a logarithmic axis
LABEL_PT = 11  # least vertical distance between the names of two curves


@dataclass(frozen=True)
class Picture:
    """One picture of a report, as files and in words."""

    name: str  # of its files, without their endings
    title: str
    description: str  # what it shows, for somebody who cannot see it
    svg: str
    png: bytes


class Series(NamedTuple):
    """One curve."""

    name: str
    values: Sequence[float | None]  # None leaves a gap
    colour: str  # a name in LIGHT
    dashed: bool = False


def is_available() -> bool:
    """Whether matplotlib can be imported."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError:
        return False
    return True


def write(folder: Path, drawn: Sequence[Picture]) -> None:
    """Writes each picture as PNG and SVG into the folder, and removes other PNG and SVG files from it.

    The others belong to an earlier version of the page. Raises OSError if a file cannot be written.
    """
    contents: dict[str, bytes] = {}
    for picture in drawn:
        contents[f"{picture.name}.png"] = picture.png
        contents[f"{picture.name}.svg"] = picture.svg.encode()
    if contents:
        folder.mkdir(exist_ok=True)
    for name, content in contents.items():
        files.write_bytes(folder / name, content)
    for left in folder.glob("*.*"):
        if left.suffix in (".png", ".svg") and left.name not in contents:
            left.unlink(missing_ok=True)


# --- the pictures of one run -----------------------------------------------------------------------------


def of_run(facts: RunFacts) -> list[Picture]:
    """The pictures of a run's records. A picture that would show nothing is left out."""
    drawn = (loss(facts), accuracy(facts), learning_rate(facts), throughput(facts), phases(facts))
    return [picture for picture in drawn if picture is not None]


def of_test(seen: Examined) -> list[Picture]:
    """The pictures of the model's test results. A picture that would show nothing is left out."""
    drawn = [confusion(seen)]
    strips = (
        ("training-examples", "The first training examples", seen.training_digits),
        ("predictions", "The first predictions", seen.predictions),
        ("misclassified", "The first mistakes: predicted (true)", seen.misclassified),
        ("certain-mistakes", "The most certain mistakes: predicted (true)", seen.most_certain_mistakes),
    )
    drawn += [strip(name, title, examples) for name, title, examples in strips]
    drawn.append(weights(seen))
    return [picture for picture in drawn if picture is not None]


def loss(facts: RunFacts) -> Picture | None:
    """Training and validation loss after each epoch."""
    return _curves(
        facts,
        "loss",
        "Loss",
        "nats",
        Series("training", facts.column("train/loss"), "blue", dashed=True),
        Series("validation", facts.column("val/loss"), "orange"),
    )


def accuracy(facts: RunFacts) -> Picture | None:
    """Training and validation accuracy after each epoch, in percent."""
    return _curves(
        facts,
        "accuracy",
        "Accuracy",
        "%",
        Series("training", facts.column("train/accuracy"), "blue", dashed=True),
        Series("validation", facts.column("val/accuracy"), "orange"),
    )


def learning_rate(facts: RunFacts) -> Picture | None:
    """The learning rate at the beginning of each epoch."""
    return _curves(facts, "learning-rate", "Learning rate", "", Series("rate", facts.column("lr"), "green"))


def throughput(facts: RunFacts) -> Picture | None:
    """Training examples per second and rank, for each epoch."""
    ranks = facts.world_size or 1
    each = [None if value is None else value / ranks for value in facts.column("throughput/samples_per_s")]
    return _curves(
        facts, "throughput", "Throughput of each rank", "examples/s", Series("a rank", each, "blue")
    )


def phases(facts: RunFacts) -> Picture | None:
    """How many seconds start, training, evaluation and the rest took; None if no epoch has a time."""
    spent = phases_s(facts)
    if not spent:
        return None
    colours = ("grey", "blue", "orange", "green")
    with style():
        figure, axes = new_figure("Time by phase", height_in=2.2)
        axes.set_axis_off()
        longest = max(spent.values())
        for row, (name, seconds) in enumerate(spent.items()):
            axes.barh(-row, seconds, height=0.42, color=LIGHT[colours[row]])
            axes.text(0, -row + 0.32, name, va="bottom", ha="left")
            axes.text(
                seconds + 0.015 * longest, -row, f"{seconds:,.1f} s", va="center", color=LIGHT["muted"]
            )
        axes.set_xlim(0, 1.22 * longest or 1)
        axes.set_ylim(-len(spent) + 0.6, 0.8)
        figure.subplots_adjust(left=0.02, right=0.98, bottom=0.02)
        words = ", ".join(f"{name.lower()} {seconds:,.1f} s" for name, seconds in spent.items())
        return as_picture(figure, "phases", "Time by phase", f"Bars: {words}.")


def phases_s(facts: RunFacts) -> dict[str, float]:
    """The seconds that each phase of a run took, by the phase's name; empty if no epoch has a time.

    Start and rest are included only if the run has finished without an interruption.
    """
    train = [value for value in facts.column("time/train_s") if value is not None]
    evaluation = [value for value in facts.column("time/eval_s") if value is not None]
    if not train:
        return {}
    spent = {"Training": sum(train), "Evaluation": sum(evaluation)}
    startup = _seconds(facts, "time/startup_s")
    total = _seconds(facts, "time/total_s")
    if startup is None or total is None or facts.events:
        return spent
    rest = total - startup - sum(spent.values())
    return {"Start": startup, **spent, "Saving, test and the rest": max(0.0, rest)}


def _seconds(facts: RunFacts, key: str) -> float | None:
    """A duration in summary.json; None if it is not there, or is no such number."""
    value = facts.summary.get(key)
    return value if isinstance(value, float | int) and value >= 0 else None


# --- curves ----------------------------------------------------------------------------------------------


def _curves(facts: RunFacts, name: str, title: str, unit: str, *series: Series) -> Picture | None:
    """Curves over the epochs; None where no curve has a value."""
    return curves(name, title, unit, [int(epoch["epoch"]) for epoch in facts.epochs], series)


def curves(
    name: str, title: str, unit: str, epochs: Sequence[int], series: Sequence[Series]
) -> Picture | None:
    """A picture of the series over the epochs, with each name at the end of its curve.

    Returns None if no series has a value.
    """
    series = [one for one in series if any(value is not None for value in one.values)]
    if not series:
        return None
    kept = thinned(len(epochs))
    x = [epochs[position] for position in kept]
    with style():
        from matplotlib.ticker import MaxNLocator

        figure, axes = new_figure(title)
        for one in series:
            y = [_or_nan(one.values[position]) for position in kept]
            axes.plot(
                x,
                y,
                color=LIGHT[one.colour],
                linestyle=(0, (4, 2)) if one.dashed else "solid",
                marker="o" if len(x) <= MARKED_POINTS else None,
            )
        known = [value for one in series for value in one.values if value is not None]
        if name == "learning-rate" and min(known) > 0 and max(known) > LOG_RATIO * min(known):
            axes.set_yscale("log")
        if name == "throughput" or min(known) == max(known):
            axes.set_ylim(0, 1.3 * max(known) or 1)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, min_n_ticks=1))
        axes.set_xlabel("epoch")
        axes.set_title(unit, loc="left", fontsize=9, color=LIGHT["muted"], x=-0.08)
        if len(series) > 1:
            _name_at_their_ends(axes, x[-1], series)
        else:
            figure.subplots_adjust(right=0.96)
        return as_picture(figure, name, title, _in_words(title, unit, epochs, series))


def thinned(count: int) -> list[int]:
    """The indices of the points of a curve that are drawn. `count` is how many points there are.

    They are all points, or MOST_POINTS of them at equal distances, which include the first and the last.
    """
    if count <= MOST_POINTS:
        return list(range(count))
    return sorted({round(k * (count - 1) / (MOST_POINTS - 1)) for k in range(MOST_POINTS)})


def _name_at_their_ends(axes: Axes, x: float, series: Sequence[Series]) -> None:
    """Writes the name of each curve behind its last point, and keeps the names apart."""
    # matplotlib computes the limits of the axes only when they are asked for. The heights below depend on
    # them.
    axes.get_ylim()
    last = []
    for one in series:
        known = [value for value in one.values if value is not None]
        _, height = axes.transData.transform((x, known[-1]))
        last.append((height, known[-1], one))
    last.sort(key=lambda each: each[0])

    # From the lowest curve to the highest: a name that is too near to the one below it moves up.
    points_per_pixel = POINTS_PER_INCH / axes.figure.dpi
    lowest = -math.inf
    for height, value, one in last:
        natural = height * points_per_pixel
        shown = max(natural, lowest + LABEL_PT)
        lowest = shown
        axes.annotate(
            one.name,
            (x, value),
            xytext=(7, shown - natural),
            textcoords="offset points",
            va="center",
            color=LIGHT[one.colour],
            annotation_clip=False,
        )


def _in_words(title: str, unit: str, epochs: Sequence[int], series: Sequence[Series]) -> str:
    """The first and the last value of each curve in words, for readers who cannot see the picture."""
    said = []
    for one in series:
        known = [(epoch, v) for epoch, v in zip(epochs, one.values, strict=True) if v is not None]
        first, begin = known[0]
        last, end = known[-1]
        said.append(
            f"{one.name}: {begin:.4g} {unit} after epoch {first}, {end:.4g} {unit} after epoch {last}"
        )
    return f"{title} over the epochs. {'; '.join(said)}.".replace("  ", " ")


def _or_nan(value: float | None) -> float:
    return math.nan if value is None else value


# --- the test set ----------------------------------------------------------------------------------------


def confusion(seen: Examined) -> Picture | None:
    """The confusion matrix: how many examples of each class (row) were predicted as each class (column).

    Returns None for fewer than two classes.
    """
    counts = seen.confusion
    classes = len(counts)
    if classes < 2:
        return None
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    most = (shares - np.diag(np.diag(shares))).max() or 1.0  # the most frequent mistake
    side_in = min(9.0, max(WIDTH_IN, 0.42 * classes))
    with style():
        from matplotlib.patches import Rectangle

        figure, axes = new_figure("Confusion matrix", side_in, side_in)
        for true in range(classes):
            for predicted in range(classes):
                is_right = true == predicted
                share = shares[true, predicted]
                # Right predictions are blue, mistakes orange. The square root makes rare mistakes visible.
                strength = 0.9 * float(share if is_right else math.sqrt(share / most))
                colour = "blue" if is_right else "orange"
                cell = Rectangle((predicted - 0.47, true - 0.47), 0.94, 0.94, color=LIGHT[colour])
                cell.set(alpha=strength, linewidth=0)
                axes.add_patch(cell)
                if classes <= MOST_COUNTED_CLASSES and counts[true, predicted]:
                    letters = LIGHT[_letters_on(colour, strength)]
                    count = str(counts[true, predicted])
                    axes.text(predicted, true, count, ha="center", va="center", fontsize=8, color=letters)
        axes.set_xlim(-0.5, classes - 0.5)
        axes.set_ylim(classes - 0.5, -0.5)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        every = -(-classes // MOST_COUNTED_CLASSES)
        ticks = range(0, classes, every)
        names = [seen.classes[number] for number in ticks]
        is_long = max(map(len, names)) > 3
        axes.set_xticks(ticks, names, rotation=90 if is_long else 0)
        axes.set_yticks(ticks, names)
        axes.set_xlabel("predicted")
        axes.set_ylabel("true")
        longest_in = 0.085 * max(map(len, names)) if is_long else 0.1
        figure.subplots_adjust(
            left=(0.5 + longest_in) / side_in, right=0.99, bottom=(0.5 + longest_in) / side_in
        )
        right = int(np.trace(counts))
        words = (
            f"A table of {classes} by {classes} classes: {right:,} of {int(counts.sum()):,} test examples "
            "are on the diagonal, where the prediction is right."
        )
        return as_picture(figure, "confusion", "Confusion matrix", words)


def _letters_on(colour: str, strength: float) -> str:
    """The name of a colour for letters on a cell of a confusion matrix, which must be readable.

    The cell has the given colour with an opacity of `strength`, from 0 to 1, on the background "paper". The
    letters must be readable on light pages and on dark ones.
    """
    is_dark_on_light = _is_nearer_to_ink(LIGHT, colour, strength)
    is_light_on_dark = _is_nearer_to_ink(DARK, colour, strength)
    if is_dark_on_light and is_light_on_dark:
        return "ink"
    return "ink-on-half" if is_dark_on_light else "paper"


def _is_nearer_to_ink(scheme: Mapping[str, str], colour: str, strength: float) -> bool:
    """Whether letters in the colour "ink" have more contrast here than letters in the colour "paper".

    Contrast is measured as in the Web Content Accessibility Guidelines (WCAG).
    """
    paper, full = (np.array(_rgb(scheme[name])) for name in ("paper", colour))
    ground = _luminance(paper + (full - paper) * strength)
    ink = _luminance(np.array(_rgb(scheme["ink"])))
    return _contrast(ink, ground) >= _contrast(_luminance(paper), ground)


def _contrast(one: float, other: float) -> float:
    """The contrast ratio of WCAG between two relative luminances: from 1 for equal ones to 21."""
    return (max(one, other) + 0.05) / (min(one, other) + 0.05)


def _luminance(rgb: np.ndarray) -> float:
    """The relative luminance of WCAG for red, green and blue from 0 to 255: 0 is black, 1 is white."""
    share = rgb / 255
    linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
    return float(linear @ np.array([0.2126, 0.7152, 0.0722]))


def strip(name: str, title: str, examples: Sequence[Example]) -> Picture | None:
    """Images side by side, each below its title; None if no example has an image."""
    shown = [example for example in examples if example.image is not None]
    if not shown:
        return None
    images = [as_pixels(example.image) for example in shown if example.image is not None]
    titles = [example.title for example in shown]
    return _row_of_images(name, title, images, titles, ", ".join(titles))


def weights(seen: Examined) -> Picture | None:
    """The weights of a linear model as an image for each class; None for other models.

    A pixel is blue where a bright input speaks for the class, and orange where it speaks against it.
    """
    if not seen.weights:
        return None
    images = weight_pixels(seen.weights)
    names = list(seen.classes[: len(images)])
    words = "for each class its weights as an image: blue speaks for the class, orange against it"
    return _row_of_images("weights", "Weights of each class", images, names, words)


def weight_pixels(weights: Sequence[np.ndarray]) -> list[np.ndarray]:
    """The weights of each class as uint8 pixels [height, width, 3].

    0 is white, positive weights are blue, negative ones are orange. All classes have the same scale, so
    that their images can be compared.
    """
    most = max(float(np.abs(weight).max()) for weight in weights) or 1.0
    white, blue, orange = (np.array(_rgb(colour)) for colour in ("#ffffff", LIGHT["blue"], LIGHT["orange"]))
    drawn = []
    for weight in weights:
        strength = np.sqrt(np.abs(weight) / most)[..., None]  # the root lets small weights be seen
        colour = np.where(weight[..., None] > 0, blue, orange)
        drawn.append(np.round(white + (colour - white) * strength).astype(np.uint8))
    return drawn


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)


def _row_of_images(
    name: str, title: str, images: Sequence[np.ndarray], titles: Sequence[str], words: str
) -> Picture:
    columns = min(10, len(images))
    rows = -(-len(images) // columns)
    with style():
        from matplotlib.figure import Figure

        height_in = 1.15 * rows + TITLE_PT / POINTS_PER_INCH
        figure = Figure(figsize=(0.95 * columns, height_in))
        figure.text(0.01, 1 - 6 / POINTS_PER_INCH / height_in, title, va="top", weight="bold", gid="title")
        for number, (image, above) in enumerate(zip(images, titles, strict=True)):
            axes = figure.add_subplot(rows, columns, number + 1)
            axes.imshow(image, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
            axes.set_title(above, fontsize=9)
            axes.set_axis_off()
        figure.subplots_adjust(left=0.01, right=0.99, bottom=0.02, top=1 - 0.6 / height_in, wspace=0.08)
        return as_picture(figure, name, title, f"{title}: {words}.")


# --- matplotlib ------------------------------------------------------------------------------------------


@contextmanager
def style() -> Iterator[None]:
    """Within this context figures are drawn and saved in the report's style.

    A user's own style, such as a matplotlibrc file, has no effect there.
    """
    import matplotlib

    style: dict[Any, Any] = {
        **{
            key: value for key, value in matplotlib.rcParamsDefault.items() if not key.startswith("backend")
        },
        "figure.facecolor": LIGHT["paper"],
        "axes.facecolor": LIGHT["paper"],
        "axes.edgecolor": LIGHT["grid"],
        "axes.labelcolor": LIGHT["muted"],
        "axes.grid": True,
        "axes.grid.axis": "y",
        "axes.axisbelow": True,
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.spines.left": False,
        "grid.color": LIGHT["grid"],
        "grid.linewidth": 0.8,
        "xtick.color": LIGHT["grid"],
        "ytick.color": LIGHT["grid"],
        "xtick.labelcolor": LIGHT["muted"],
        "ytick.labelcolor": LIGHT["muted"],
        "ytick.major.size": 0,
        "text.color": LIGHT["ink"],
        "text.parse_math": False,  # a class's name may hold dollar signs
        "font.size": 10,
        "lines.linewidth": 1.8,
        "lines.markersize": 3.6,
        "svg.fonttype": "none",  # text stays text, to be read aloud and searched for
        "svg.hashsalt": "allranks",  # fixed ids in the SVG, so that the same run gives the same file
    }
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(style)
        yield


def new_figure(title: str, width_in: float = WIDTH_IN, height_in: float = HEIGHT_IN) -> tuple[Figure, Axes]:
    """A figure with a title and one empty pair of axes. The height of the title is added to `height_in`."""
    from matplotlib.figure import Figure

    title_in = TITLE_PT / POINTS_PER_INCH
    whole_in = height_in + title_in
    figure = Figure(figsize=(width_in, whole_in))
    figure.text(0.02, 1 - 0.08 / whole_in, title, va="top", ha="left", weight="bold", gid="title")
    axes = figure.add_subplot()
    axes.set_title("")
    figure.subplots_adjust(
        left=0.62 / width_in,
        right=1 - 0.85 / width_in,
        bottom=0.45 / whole_in,
        top=1 - (title_in + UNIT_IN) / whole_in,
    )
    return figure, axes


def as_picture(figure: Figure, name: str, title: str, description: str) -> Picture:
    """The figure as PNG and SVG. Both have no date in them, so that the same run gives equal files."""
    as_svg = io.StringIO()
    as_png = io.BytesIO()
    no_date = {"Date": None, "Creator": None, "Format": None, "Type": None}
    figure.savefig(as_svg, format="svg", metadata=no_date)
    figure.savefig(as_png, format="png", dpi=PNG_DPI, metadata={"Software": None})
    return Picture(name, title, description, as_svg.getvalue(), as_png.getvalue())


# --- from a file to a page -------------------------------------------------------------------------------

# What inline() changes in the SVG of matplotlib: (regular expression, replacement).
_REPLACED: Sequence[tuple[str, str | Callable[[re.Match[str]], str]]] = (
    (r"<\?xml.*?\?>|<!DOCTYPE.*?>|<!--.*?-->", ""),
    (r"<metadata>.*?</metadata>", ""),
    (r"<style.*?</style>", ""),  # it would change the style of the whole page
    (r'<g id="title">.*?</g>', ""),  # the page has the title as a heading
    (r'<g id="patch_1">.*?</g>', ""),  # the background of the figure: the page has its own
    (r' xmlns(:\w+)?="[^"]*"', ""),
    (r"xlink:href", "href"),
    (r"font-family: [^;\"]*", "font-family: var(--font)"),
    (r"(font: [^;\"]*?px) [^;\"]*", r"\1 var(--font)"),  # as earlier versions of matplotlib write it
    (r"\n\s*", " "),
)


def inline(picture: Picture) -> str:
    """The picture as an `svg` element for a page, with CSS variables as colours.

    It has a title and a description, which screen readers read aloud. All its ids begin with the picture's
    name, so that several pictures can be in one page.
    """
    svg = picture.svg
    for pattern, replacement in _REPLACED:
        svg = re.sub(pattern, replacement, svg, flags=re.S)
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    svg = re.sub(r'( id="|href="#|url\(#)', rf"\1{picture.name}-", svg)

    width, height = (float(number) for number in re.findall(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', svg)[0])
    named = (
        f'<svg role="img" aria-labelledby="{picture.name}-title {picture.name}-words" '
        f'viewBox="0 {TITLE_PT} {width:g} {height - TITLE_PT:g}" preserveAspectRatio="xMidYMid meet">'
        f'<title id="{picture.name}-title">{html.escape(picture.title)}</title>'
        f'<desc id="{picture.name}-words">{html.escape(picture.description)}</desc>'
    )
    return re.sub(r"<svg [^>]*>", lambda _: named, svg, count=1).strip()
