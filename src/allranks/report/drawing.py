"""How the pictures of reports look, and how they come into files and pages.

Each picture is drawn once by matplotlib, in the colours of LIGHT, and saved as PNG and as SVG. inline()
turns the SVG into an element of a page. There it replaces each colour by a CSS variable, so that the
browser can show the page in light or in dark colours. matplotlib is an extra
(`pip install 'allranks[report]'`), and is imported only when a picture is drawn.
"""

from __future__ import annotations

import html
import io
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from allranks.base import files

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


@dataclass(frozen=True)
class Picture:
    """One picture of a report, as files and in words."""

    name: str  # of its files, without their endings
    title: str
    description: str  # what it shows, for somebody who cannot see it
    svg: str
    png: bytes


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
