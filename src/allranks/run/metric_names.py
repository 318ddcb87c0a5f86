"""The metrics of a run, by their names in metrics.jsonl: their order, their units, and how they are shown.

A training may keep any metrics, and its own loop may give them any names. A name such as `val/rmse` has two
parts: on which examples (train, val or test), and what was measured there, its quantity. A name of another
form, such as `energy` or `gan/loss`, is a quantity as a whole. No torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

PARTS = ("train", "val", "test")  # of the data, in the order in which people are shown them
NAMES_OF_PARTS = {"train": "training", "val": "validation", "test": "test"}

# What a line of metrics.jsonl holds besides metrics: where the training stands, and how it computes.
_POSITION = ("epoch", "step", "lr")
_OF_COMPUTING = ("time/", "throughput/", "memory/")
# What a summary.json holds besides metrics, and besides what begins with one of the words above.
_OF_SUMMARY = ("state", "epochs", "steps", "world_size", "global_batch_size", "val/count", "train/count")

# Words in the names of quantities of which it is known whether a low or a high value is the better one.
_LOWER_IS_BETTER = {
    "loss", "error", "mse", "rmse", "mae", "mape", "nll", "perplexity", "ppl", "wer", "cer", "fid",
    "brier",
}  # fmt: skip
_HIGHER_IS_BETTER = {
    "accuracy", "acc", "auroc", "auc", "auprc", "f1", "iou", "jaccard", "dice", "precision", "recall", "r2",
    "map", "psnr", "ssim", "bleu", "rouge", "score", "likelihood",
}  # fmt: skip


def is_metric(name: str) -> bool:
    """Whether this key of a line is a metric of the training."""
    return name not in _POSITION and not name.startswith(_OF_COMPUTING)


def metrics_in(lines: Iterable[Mapping[str, Any]]) -> list[str]:
    """The metrics that these lines of metrics.jsonl hold as numbers, in the order for people.

    The loss comes first, and then the other quantities as they first appear. Of a quantity, the parts have
    the order of PARTS.
    """
    found: dict[str, None] = {}
    for line in lines:
        for name, value in line.items():
            # NaN and infinity are values of a metric; a whole number of more than 300 digits is none.
            is_number = isinstance(value, float) or as_number(value) is not None
            if is_number and is_metric(name):
                found[name] = None
    return [name for names in by_quantity(found).values() for name in names]


def by_quantity(names: Iterable[str]) -> dict[str, list[str]]:
    """The names of each quantity, by the quantity: `loss` has `train/loss` and `val/loss`."""
    found: dict[str, list[str]] = {}
    for name in names:
        found.setdefault(quantity_of(name), []).append(name)
    order = sorted(found, key=lambda quantity: quantity != "loss")  # stable: the others keep their order
    return {quantity: sorted(found[quantity], key=_place_of_part) for quantity in order}


def _place_of_part(name: str) -> int:
    part = part_of(name)
    return PARTS.index(part) if part in PARTS else len(PARTS)


def part_of(name: str) -> str:
    """`val` for `val/loss`; empty for a name that names no part of the data."""
    part, slash, quantity = name.partition("/")
    return part if slash and quantity and part in PARTS else ""


def quantity_of(name: str) -> str:
    """`loss` for `val/loss`; the whole name where it names no part of the data."""
    return name.partition("/")[2] if part_of(name) else name


def main_quantity(names: Iterable[str]) -> str:
    """The quantity that says how good a run is: the accuracy, else the first one; empty for none."""
    quantities = list(by_quantity(names))
    if "accuracy" in quantities:
        return "accuracy"
    return quantities[0] if quantities else ""


def higher_is_better(name: str) -> bool | None:
    """Whether a high value of this metric is the better one; None if its name does not tell."""
    words = set(re.split(r"[^a-z0-9]+", quantity_of(name).lower()))
    if "likelihood" in words and words & {"neg", "negative"}:
        return False
    if words & _LOWER_IS_BETTER:
        return False
    return True if words & _HIGHER_IS_BETTER else None


def unit_of(name: str, names: Iterable[str]) -> str:
    """The unit of a metric in a training that has the metrics `names`; empty if none is known.

    An accuracy is in percent. The loss is in nats where there is an accuracy: then it is a cross entropy.
    """
    quantity = quantity_of(name)
    if quantity == "accuracy":
        return "%"
    is_classification = any(quantity_of(each) == "accuracy" for each in names)
    return "nats" if quantity == "loss" and is_classification else ""


def words_of(name: str) -> str:
    """The metric in words, such as `val loss`, `test rmse` or `energy`."""
    part = part_of(name)
    return f"{part} {quantity_of(name)}" if part else name


def spoken(name: str) -> str:
    """The metric in a sentence, such as `validation loss` or `energy`."""
    part = part_of(name)
    return f"{NAMES_OF_PARTS[part]} {quantity_of(name)}" if part else name


def title_of(quantity: str) -> str:
    """A quantity as a heading: `Loss` and `Accuracy`, and any other as the training calls it."""
    return quantity.capitalize() if quantity in ("loss", "accuracy") else quantity


def number(name: str, value: float | None) -> str:
    """The value of a metric for people, without its unit; `-` where it is not known.

    An accuracy has two decimals. Any other metric has four, or is written as 1.23e-05 where it is very
    small or very large. Below 10,000,000 it has at most eight characters, and a sign.
    """
    if value is None:
        return "-"
    if quantity_of(name) == "accuracy":
        return f"{value:.2f}"
    size = abs(value)
    if isinstance(value, int) and size < 10_000_000:
        return str(value)
    if 0 < size < 1e-99:  # an exponent of three digits takes the place of one decimal
        return f"{value:.1e}"
    # Compared as rounded: 9,999.9996 with three decimals would be 10000.000, of nine characters.
    if round(size, 3) >= 10_000 or 0 < size < 0.001:
        return f"{value:.2e}"
    return f"{value:.3f}" if round(size, 4) >= 1_000 else f"{value:.4f}"


def with_unit(name: str, value: float | None) -> str:
    """The value of a metric in a sentence: `97.53 %`, `0.0812`."""
    text = number(name, value)
    is_percent = quantity_of(name) == "accuracy" and value is not None
    return f"{text} %" if is_percent else text


def tests_in(summary: Mapping[str, Any]) -> dict[str, float]:
    """The finite figures over the test set in a summary.json, by name, in the order for people."""
    figures = {
        name: value
        for name, value in summary.items()
        if part_of(name) == "test" and name != "test/count" and as_number(value) is not None
    }
    return {name: figures[name] for names in by_quantity(figures).values() for name in names}


def results_in(summary: Mapping[str, Any]) -> dict[str, float]:
    """What a program has logged of its whole run besides a test: other finite numbers in a summary.json."""
    return {
        name: value
        for name, value in summary.items()
        if is_metric(name)
        and part_of(name) != "test"
        and name not in _OF_SUMMARY
        and not name.startswith("model/")
        and as_number(value) is not None
    }


def in_a_sentence(figures: Mapping[str, float], words: str = "") -> str:
    """Figures side by side, such as `loss 0.2011, accuracy 94.02 %`; `words` come before each of them."""
    return ", ".join(
        f"{words}{quantity_of(name)} {with_unit(name, value)}" for name, value in figures.items()
    )


def of_parts(names: Sequence[str], *parts: str) -> list[str]:
    """Those of the names that are of one of these parts of the data; an empty part stands for no part."""
    return [name for name in names if part_of(name) in parts]


def validated(names: Sequence[str]) -> list[str]:
    """Those of the names that were measured on the validation examples, or all where none was."""
    return of_parts(names, "val") or list(names)


def as_number(value: object) -> float | None:
    """The value if it is a finite number, else None: a damaged file may hold anything instead."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:  # a whole number of more than 300 digits
        return None
    return value if math.isfinite(number) else None
