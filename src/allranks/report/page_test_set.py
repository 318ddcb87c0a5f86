"""The sections of a run's page that show what the model does on the test set.

They are of classifications only. Without a pass of the model over the test set they are empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from allranks.report import pictures
from allranks.report.document import cell, chart, table
from allranks.report.drawing import Picture
from allranks.report.examine import ClassFigures, Examined, Example
from allranks.report.gather import RunFacts
from allranks.report.html import NOTHING, Html, joined, tag
from allranks.report.png import as_pixels, data_uri

# --- the test set ----------------------------------------------------------------------------------------


def test_set(facts: RunFacts, seen: Examined | None, drawn: Mapping[str, Picture]) -> Html:
    """Accuracy and loss over the test set, the confusion matrix, and the figures of each class."""
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
            cell(one.precision, ".1f"),
            cell(one.recall, ".1f"),
            cell(one.f1, ".1f"),
            f"{one.count:,}",
            one.mistaken_for or "-",
        ]
        for one in classes
    ]
    return table(heads, rows, label="Precision, recall and F1 of each class", texts={0, 5})


# --- strips of images ------------------------------------------------------------------------------------


def examples(seen: Examined | None) -> Html:
    """Strips of images: training examples, predictions and mistakes."""
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


def weights(seen: Examined | None) -> Html:
    """The weights of a linear model, as an image for each class."""
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
