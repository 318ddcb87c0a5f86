"""Digits that look handwritten, drawn when a training starts: they need no file and no network.

Each image starts from one of the pen paths in `STYLES`. The path is bent (pen wobble, smooth
warp of the plane, slant, rotation, aspect), fitted to MNIST's 20 x 20 box and centred by its
centre of mass, then inked. Nothing is read from disk and nothing is cached there.

Inking is the fast part. A path is cut into `SEGMENTS` short pieces; each piece is a round blob of
ink, exp(-dist^2 / 2 BLUR^2), which factors into a row profile times a column profile. The sum
over pieces is therefore one small matrix product per image, and its logarithm gives back a smooth
distance to the pen's path, which a pen radius turns into a sharp-edged stroke.
"""

from collections.abc import Sequence
from functools import cache, partial

import numpy as np

from allranks.base.processes import usable_cpus
from allranks.base.threads import in_thread, process_ends

SIDE = 28  # pixels
BOX = 20.0  # pixels: MNIST fits the longer side of a digit to this
CENTRE = 14.0  # pixel index of the centre of mass in MNIST
SEGMENTS = 64  # pieces per pen path: 0.7 pixels each on average
BLUR = 0.95  # pixels; well below the longest pieces (1.2), strokes would turn into beads
CHUNK = 256  # images drawn together: large enough for numpy, small enough for the cache
# Pens are wider or narrower by digit, since fitting scales what was written large or small.
PEN = np.array([1.12, 1.15, 1.05, 1, 1, 1.02, 0.98, 1.05, 0.94, 0.92], np.float32)
PARTS = ("train", "test")

# Pen paths on a 100 x 100 sheet, y downwards: "x,y" points joined by a smooth curve, a point given
# twice is a corner, "|" lifts the pen. The number before a path is its share within the digit.
STYLES: dict[int, Sequence[tuple[float, str]]] = {
    0: (
        (3, "52,0 30,10 16,32 14,60 28,90 50,100 72,92 86,66 86,36 74,12 52,0"),
        (2, "66,6 40,2 20,24 14,60 30,94 58,98 82,70 84,34 68,8 48,4"),
        (2, "40,22 34,4 56,2 80,16 88,50 74,86 46,100 20,84 14,50 26,20 48,6"),
        (1, "56,16 64,2 40,4 18,36 18,78 42,100 74,84 86,44 74,10 48,2"),
        (1, "50,0 36,14 30,50 36,86 50,100 64,86 70,50 64,14 50,0"),
        (1, "62,0 38,20 20,56 24,90 42,100 66,84 82,50 80,16 60,2"),
        (1, "50,20 20,32 2,60 26,82 58,78 92,56 96,32 74,18 46,20"),
    ),
    1: (
        (8, "50,0 50,50 50,100"),
        (2, "52,0 47,50 50,100"),
        (1, "36,18 54,0 54,0 52,50 52,100"),
        (1, "32,20 52,0 52,0 52,50 52,100 | 22,100 82,99"),
    ),
    2: (
        (3, "14,24 32,4 62,2 80,24 66,54 38,80 14,98 14,98 48,95 92,97"),
        (3, "14,20 40,0 70,8 74,32 54,66 28,94 8,90 18,74 44,82 72,97 96,88"),
        (2, "22,14 48,0 76,14 80,44 62,76 32,98 8,94 8,74 30,66 56,82 94,90"),
        (1, "10,10 50,2 82,8 72,36 40,70 12,96 12,96 50,96 90,98"),
        (1, "20,26 40,2 68,12 66,48 46,82 24,100 12,88 30,80 56,96 86,96"),
        (1, "24,30 34,8 54,6 60,26 48,60 24,96 24,96 60,88 100,76"),
        (1, "8,24 36,2 66,6 66,32 42,64 18,84 6,76 26,66 54,82 98,100"),
    ),
    3: (
        (3, "16,14 42,0 74,10 72,34 38,47 38,47 78,58 80,86 50,100 12,90"),
        (2, "14,10 48,0 74,14 62,36 36,48 64,52 82,72 66,96 36,100 8,88"),
        (1, "14,4 46,2 80,4 80,4 60,24 40,42 40,42 78,56 76,88 44,100 12,92"),
        (1, "20,12 52,0 70,18 50,44 32,46 46,40 74,54 78,84 44,100 14,84"),
        (1, "12,16 46,0 76,14 66,40 34,56 34,56 62,54 74,72 60,94 30,100 8,92"),
        (1, "28,8 54,0 68,14 50,34 50,34 80,46 84,78 54,100 14,96 4,80"),
    ),
    4: (
        (4, "22,4 16,26 12,52 12,52 44,54 84,48 | 76,0 70,50 64,100"),
        (1, "26,2 14,34 22,54 50,54 78,42 | 80,4 72,50 66,100"),
        (2, "62,0 36,32 10,62 10,62 50,62 92,60 | 62,0 61,50 60,100"),
        (1, "70,2 40,20 14,52 14,52 50,58 70,52 | 74,2 68,50 64,100"),
        (1, "34,4 26,20 24,36 24,36 46,38 70,32 | 72,0 60,50 48,100"),
        (1, "36,0 20,30 4,62 4,62 50,60 100,56 | 62,26 56,60 52,100"),
    ),
    5: (
        (3, "88,2 56,3 28,6 28,6 24,24 20,44 20,44 48,36 76,54 74,84 44,100 10,92"),
        (2, "30,6 26,26 22,46 22,46 54,38 78,60 66,92 36,100 10,86 | 30,6 58,6 92,0"),
        (1, "84,2 54,2 34,14 30,34 54,48 72,64 66,90 40,100 12,92"),
        (2, "100,0 70,8 44,12 44,12 36,28 30,42 30,42 56,46 62,70 42,92 4,100"),
        (1, "78,0 50,4 24,8 24,8 26,26 30,44 30,44 66,50 78,74 56,98 24,98 12,78"),
        (1, "34,14 32,32 32,46 32,46 62,46 72,70 50,98 16,96 14,82 | 36,14 66,8 96,4"),
    ),
    6: (
        (3, "62,0 36,24 18,58 24,90 50,100 76,84 74,62 50,56 28,72 22,88"),
        (2, "44,0 24,36 16,74 34,98 62,98 80,78 64,60 40,64 22,86"),
        (1, "78,2 48,14 24,46 18,80 40,100 70,90 76,64 54,50 28,66"),
        (1, "54,0 38,34 28,72 36,98 56,98 66,80 56,68 40,76 34,92"),
        (1, "24,0 14,36 14,74 34,98 66,96 86,70 76,44 56,50 44,74 48,98"),
        (1, "34,4 18,40 14,76 38,100 78,94 92,74 74,60 46,72 32,94"),
    ),
    7: (
        (3, "12,8 44,6 84,2 84,2 66,34 52,66 46,100"),
        (2, "12,26 16,6 16,6 50,6 86,2 86,2 72,40 62,70 58,100"),
        (2, "12,12 40,2 76,2 80,20 66,56 56,100"),
        (2, "14,24 30,4 62,2 74,14 72,50 70,100"),
        (2, "12,8 44,6 84,2 84,2 68,34 56,66 50,100 | 30,50 54,48 84,46"),
        (1, "10,6 44,6 80,4 80,4 54,50 34,100 | 22,58 50,54 90,50"),
        (1, "14,12 40,2 72,4 72,26 60,60 54,100 | 24,56 54,50 96,48"),
    ),
    8: (
        (3, "74,16 52,0 26,12 34,36 60,56 76,78 58,100 32,94 28,70 50,50 72,32 76,14"),
        (2, "50,46 28,24 46,0 72,18 54,46 26,72 42,100 72,86 68,60 50,46"),
        (1, "50,48 26,36 28,8 52,0 74,12 72,38 50,48 22,62 22,90 50,100 78,90 78,62 50,48"),
        (1, "86,10 60,2 36,16 44,40 62,64 62,92 38,100 30,80 46,56 70,34 82,12"),
        (2, "84,8 52,0 26,12 34,32 60,50 74,76 56,100 30,92 34,66 58,44 78,26 96,12"),
        (1, "70,14 48,0 24,18 36,42 58,60 58,88 42,100 30,84 42,58 62,38 72,12"),
        (1, "88,24 60,8 22,8 18,32 52,50 70,76 54,100 34,90 40,62 64,42 92,22"),
    ),
    9: (
        (4, "74,12 48,2 24,22 26,46 50,48 72,26 76,8 76,8 72,50 66,100"),
        (2, "76,14 50,0 26,20 30,46 56,46 76,16 78,50 66,88 42,100 22,92"),
        (2, "70,18 50,2 28,18 24,42 44,48 66,30 74,10 64,50 46,100"),
        (1, "78,22 54,0 24,10 22,38 50,50 76,30 80,50 70,100"),
        (1, "70,4 36,12 14,34 24,50 52,42 78,10 78,10 62,50 44,100"),
        (2, "64,3 38,8 22,28 30,44 54,42 76,20 76,20 70,56 60,100"),
        (1, "58,2 30,14 24,36 44,46 64,36 72,18 70,40 66,70 66,100"),
        (1, "64,8 44,4 34,24 40,38 58,30 66,8 66,8 64,50 58,100"),
        (1, "80,6 46,2 12,18 14,38 40,42 70,28 84,8 84,8 66,50 44,100"),
        (1, "72,8 46,0 26,16 40,36 62,34 74,10 74,46 62,86 34,100 8,90"),
    ),
}


def generate(count: int, part: str, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` digits: images uint8 [count, 28, 28], white on black, and labels uint8 [count].

    `part` is "train" or "test", two independent streams. The result depends on the arguments
    alone: every chunk of images has its own random stream, so threads cannot change it. (Another
    processor or numpy may round a few grey values otherwise; labels and shapes stay.)
    """
    if count < 0:
        raise ValueError(f"count must be 0 or more, got {count}")
    if part not in PARTS:
        raise ValueError(f"part must be one of {', '.join(PARTS)}, got {part!r}")
    images = np.empty((count, SIDE, SIDE), np.uint8)
    labels = np.empty(count, np.uint8)
    _pen_paths()  # built once here, not by every thread at the same time

    def draw(start: int) -> None:
        rng = np.random.default_rng([seed % 2**64, PARTS.index(part), start])
        chunk = slice(start, min(start + CHUNK, count))
        images[chunk], labels[chunk] = _draw_chunk(chunk.stop - start, rng)

    def draw_each(starts: range) -> None:
        for start in starts:
            if process_ends():
                return
            draw(start)

    workers = min(8, usable_cpus())
    shares = [range(first * CHUNK, count, workers * CHUNK) for first in range(workers)]
    for drawing in [in_thread(partial(draw_each, share), "draw") for share in shares]:
        drawing.result()
    return images, labels


def _draw_chunk(count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Images uint8 [count, 28, 28] and labels uint8 [count]."""
    paths, pen_down, bounds = _pen_paths()
    labels = rng.integers(0, 10, count, dtype=np.uint8)
    style = (rng.random((count, 1)) >= bounds[labels]).sum(1)
    knots = _bend(paths[labels, style], rng)
    radius = np.clip(rng.normal(1.25, 0.42, (count, 1)), 0.6, 2.8).astype(np.float32)
    radius *= PEN[labels, None]
    pieces, lengths = _place(knots, pen_down[labels, style], radius)
    return _ink(pieces, lengths, radius, rng), labels


def _bend(knots: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Deform pen paths [n, knots, 2], in sheets; the result's size and place do not matter."""
    count = len(knots)

    def uniform(limit: float, *shape: int) -> np.ndarray:
        return (2 * rng.random((count, *shape), dtype=np.float32) - 1) * limit

    # Pen wobble: slow waves along the path. They move joints apart, as hasty writing does.
    waves = np.arange(1, 6, dtype=np.float32)
    along = np.linspace(0, np.pi, SEGMENTS + 1, dtype=np.float32)
    knots = knots + np.cos(along[:, None] * waves) @ (uniform(0.085, 5, 2) / waves[:, None])
    # Warp of the plane: a few smooth waves. They change the shape of loops and keep joints.
    phase = knots @ uniform(4.0, 2, 4) + rng.random((count, 1, 4), dtype=np.float32) * 6.28
    knots += np.sin(phase) @ uniform(0.085, 4, 2)
    # Writing hand: rotation, slant to the right more often than to the left, width to height.
    turn, slant, aspect = uniform(0.22), uniform(0.48) + 0.12, np.exp(uniform(0.35))
    linear = np.empty((count, 2, 2), np.float32)
    linear[:, 0, 0], linear[:, 0, 1] = np.cos(turn) * aspect, np.sin(turn) * aspect
    linear[:, 1, 0], linear[:, 1, 1] = -np.sin(turn) - slant * np.cos(turn), np.cos(turn)
    return knots @ linear


def _place(knots: np.ndarray, pen_down: np.ndarray, radius: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Fit paths [n, knots, 2] to the box: pieces' centres [n, SEGMENTS, 2] and lengths, pixels."""
    low, high = knots.min(1), knots.max(1)
    scale = (BOX - 2 * radius) / (high - low).max(1, keepdims=True)
    knots = knots * scale[:, None]
    steps = np.diff(knots, axis=1)
    lengths = np.sqrt(np.square(steps).sum(2)) * pen_down
    pieces = knots[:, 1:] - steps / 2
    mass_centre = (pieces * lengths[:, :, None]).sum(1) / lengths.sum(1, keepdims=True)
    return pieces + (CENTRE - mass_centre)[:, None], lengths


def _ink(
    pieces: np.ndarray, lengths: np.ndarray, radius: np.ndarray, rng: np.random.Generator
) -> np.ndarray:
    """Ink pieces of path, in pixels, with a pen of `radius` [n, 1]: images uint8 [n, 28, 28]."""
    pixels = np.arange(SIDE, dtype=np.float32)
    profiles = pieces.transpose(2, 0, 1)[..., None] - pixels
    np.square(profiles, out=profiles)
    profiles *= -0.5 / BLUR**2
    np.exp(profiles, out=profiles)
    columns, rows = profiles
    rows *= lengths[:, :, None] / (BLUR * (2 * np.pi) ** 0.5)
    coverage = rows.transpose(0, 2, 1) @ columns  # 1 on the path of a long straight stroke
    distance = np.log(np.maximum(coverage, 1e-6, out=coverage), out=coverage)
    distance *= -2 * BLUR**2
    distance = np.sqrt(np.maximum(distance, 0, out=distance), out=distance)  # pixels
    # A stroke's edge is about a pixel wide and rough; its inside is almost evenly white.
    distance += rng.random(distance.shape, dtype=np.float32) * 0.3 - 0.15
    ink = (radius[:, :, None] - distance) * 0.75 + 0.5
    return (np.clip(ink, 0, 1, out=ink) * 254).astype(np.uint8)


@cache
def _pen_paths() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Per digit and style, padded to the most styles of a digit.

    Knots [10, styles, SEGMENTS + 1, 2] in sheets, pen down or lifted [10, styles, SEGMENTS] as
    1 or 0, and the styles' shares added up [10, styles], from the first one's to 1.
    """
    most = max(len(styles) for styles in STYLES.values())
    knots = np.zeros((10, most, SEGMENTS + 1, 2), np.float32)
    pen_down = np.zeros((10, most, SEGMENTS), np.float32)
    shares = np.zeros((10, most))
    for digit, styles in STYLES.items():
        for index, (share, path) in enumerate(styles):
            knots[digit, index], pen_down[digit, index] = _cut(path)
            shares[digit, index] = share
    return knots, pen_down, shares.cumsum(1) / shares.sum(1, keepdims=True)


def _cut(path: str) -> tuple[np.ndarray, np.ndarray]:
    """Cut a path of `STYLES` into even pieces: knots [SEGMENTS + 1, 2], pen down [SEGMENTS]."""
    strokes = [_curve(stroke) for stroke in path.split("|")]
    lengths = [np.hypot(*np.diff(stroke, axis=0).T).sum() for stroke in strokes]
    # Lifting the pen takes one piece, from the last knot of a stroke to the first of the next.
    spare = SEGMENTS - len(strokes) + 1
    ends = np.round(np.cumsum(lengths) / sum(lengths) * spare).astype(int)
    counts = np.diff(ends, prepend=0)
    knots, down = [], []
    for stroke, count in zip(strokes, counts, strict=True):
        travelled = np.hypot(*np.diff(stroke, axis=0).T).cumsum()
        marks = np.linspace(0, travelled[-1], count + 1)
        travelled = np.concatenate([[0.0], travelled])
        knots.append(np.stack([np.interp(marks, travelled, axis) for axis in stroke.T], 1))
        down += [1.0] * count + [0.0]
    return np.concatenate(knots), np.array(down[:-1])


def _curve(stroke: str) -> np.ndarray:
    """A smooth (Catmull-Rom) curve through a stroke's points: [dense points, 2] in sheets."""
    points = np.array([point.split(",") for point in stroke.split()], float) / 100
    padded = np.concatenate([points[:1], points, points[-1:]])
    weights = np.array([[0, 2, 0, 0], [-1, 0, 1, 0], [2, -5, 4, -1], [-1, 3, -3, 1]]) / 2
    weights = np.linspace(0, 1, 17)[:, None] ** np.arange(4) @ weights
    spans = [padded[i : i + 4] for i in range(len(points) - 1)]
    # No curve between the two points of a corner: it would be a little loop.
    curve = [weights @ span for span in spans if (span[1] != span[2]).any()]
    return np.concatenate(curve)
