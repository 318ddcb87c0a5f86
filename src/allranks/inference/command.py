"""`allranks predict`, `evaluate` and `export`: a trained model used from the command line."""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import sys
import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from allranks.base.arguments import with_our_errors
from allranks.base.errors import UserError, show
from allranks.base.files import finite, write_bytes, write_text
from allranks.base.text import table

if TYPE_CHECKING:
    import numpy as np
    import torch

    from allranks.data.parts import Part
    from allranks.inference.forward import Outputs
    from allranks.inference.images import Plan, Prepared
    from allranks.inference.load import Trained
    from allranks.inference.overrides import Given
    from allranks.training.metrics import Figures

MOST_COLUMNS = 20  # up to so many classes the whole confusion table is shown: it fits 120 characters a line
CONFUSED = 10  # if there are more classes, only this number of the most frequent mistakes is shown
SOME_FAILED = 1  # exit code where some images were predicted, and others could not be read

CHECKPOINT_HELP = (
    "which checkpoint: newest (the default: summary.json was measured with it), best (by "
    "the run's checkpoint.best, of those that are still there), a step such as 750, or the path of one"
)
OVERRIDES_HELP = (
    "what is not to be as in the run: data=NAME, data.KEY=VALUE (data.root=/shared/data), device=cpu, "
    "threads=4"
)


# --- the command lines ----------------------------------------------------------------------------------


def predict_parser() -> argparse.ArgumentParser:
    """The command line of `allranks predict`."""
    parser = _parser(
        "predict",
        "Says what a trained model sees in images, or in each example of the data.",
        """
        examples:
          allranks predict runs/mlp/1 two.png three.jpg
          allranks predict runs/mlp/1 two.png --top 10
          allranks predict runs/mlp/1 --data test
          allranks predict runs/mlp/1 --data test --csv test.csv
          allranks predict runs/mlp/1 --data test --npy outputs.npy

        An image may have any size, be grey or coloured, light on dark or dark on light.
        The column `prepared` tells what was done to it. The exit code is 0. It is 1
        where some of the images could not be read, and 2 where nothing could be
        predicted.
        """,
    )
    parser.add_argument("words", metavar="IMAGE|OVERRIDE", nargs="*", help="image files; " + OVERRIDES_HELP)
    parser.add_argument("--data", choices=("test", "val", "train"), help="predict this part of the data")
    parser.add_argument(
        "--top",
        type=_positive,
        metavar="N",
        default=3,
        help="how many classes are shown of each image; default: 3",
    )
    parser.add_argument(
        "--fit",
        choices=("auto", "digit", "whole", "crop"),
        default="auto",
        help="how an image gets the size of the model's input: as an MNIST digit, whole, or its middle; "
        "auto: digit for 28 x 28 grey pixels (whole for Fashion-MNIST), crop for others",
    )
    parser.add_argument(
        "--polarity",
        choices=("auto", "keep", "invert"),
        default="auto",
        help="auto: an image with a light border is inverted for a model of 28 x 28 grey pixels",
    )
    parser.add_argument(
        "--json", action="store_true", help="for programs: one JSON line for each image or example"
    )
    parser.add_argument(
        "--csv",
        metavar="FILE",
        type=Path,
        help="with --data: write a table with a line for each example into FILE",
    )
    parser.add_argument(
        "--npy",
        metavar="FILE",
        type=Path,
        help="with --data: write what the model itself gives into FILE, as an array with an entry for each "
        "example",
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    return parser


def evaluate_parser() -> argparse.ArgumentParser:
    """The command line of `allranks evaluate`."""
    parser = _parser(
        "evaluate",
        "Measures a trained model on its test set, or on other data.",
        """
        examples:
          allranks evaluate runs/mlp/1
          allranks evaluate runs/mlp/1 --checkpoint best
          allranks evaluate runs/mlp/1 data=fashion_mnist
          allranks evaluate runs/mlp/1 data.root=/shared/data device=cpu

        For the run's own test set the figures are compared with those in
        summary.json. They are the same to the last digit on the same kind of machine.
        The exit code is 0 even where they are not.
        """,
    )
    parser.add_argument("words", metavar="OVERRIDE", nargs="*", help=OVERRIDES_HELP)
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")
    return parser


def export_parser() -> argparse.ArgumentParser:
    """The command line of `allranks export`."""
    parser = _parser(
        "export",
        "Writes a trained model for other programs, and tries the file on the test set.",
        """
        examples:
          allranks export runs/mlp/1 --to digits.safetensors  the weights
          allranks export runs/mlp/1 --to digits.pt2          for PyTorch alone
          allranks export runs/mlp/1 --to digits.onnx         for readers of ONNX

        docs/use-the-model.md says what a program has to do with its pixels. The
        metadata in the file hold the class names, the shape of the input, and the
        configuration of the run.
        """,
    )
    parser.add_argument("words", metavar="OVERRIDE", nargs="*", help=OVERRIDES_HELP)
    parser.add_argument(
        "--to",
        metavar="FILE",
        type=Path,
        required=True,
        help="the file; its suffix says the format: .safetensors, .pt2 or .onnx",
    )
    parser.add_argument("--force", action="store_true", help="replace FILE if it is there")
    parser.add_argument("--json", action="store_true", help="for programs: one JSON object")
    return parser


def _parser(name: str, description: str, epilog: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"allranks {name}",
        description=description,
        epilog=textwrap.dedent(epilog),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the directory of a run")
    parser.add_argument("--checkpoint", default="newest", metavar="WHICH", help=CHECKPOINT_HELP)
    parser.add_argument("--config-dir", metavar="DIR", help="a folder with your own choices for data=")
    return with_our_errors(parser)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is no number of classes: give 1 or more")
    return int(text)


# --- what all three begin with --------------------------------------------------------------------------


class _Opened(NamedTuple):
    """A trained model, and the values that the command line has changed."""

    trained: Trained
    given: Given
    others: list[str]  # words of the command line that are not overrides


def _open(options: argparse.Namespace) -> _Opened:
    from allranks.inference import load, overrides

    # A user's own model is found in the present directory, where `allranks train` finds it.
    if not {"", str(Path.cwd())} & set(sys.path):
        sys.path.insert(0, str(Path.cwd()))
    others, words = overrides.split(options.words)
    config = load.read_config(options.run)
    given = overrides.apply(config, words, options.config_dir)
    trained = load.load(options.run, options.checkpoint, given.device, given.threads)
    for remark in trained.remarks:
        show(remark)
    return _Opened(trained, given, others)


def _title(trained: Trained) -> str:
    epochs = "1 epoch" if trained.epoch == 1 else f"{trained.epoch} epochs"
    return (
        f"{trained.directory}: {trained.checkpoint.name}, after {epochs}, on {trained.runtime.device.type}"
    )


# --- allranks predict -----------------------------------------------------------------------------------


def predict(arguments: Sequence[str]) -> int:
    """Runs `allranks predict` with these arguments and returns its exit code.

    0, or 1 where some of several images could not be read. Raises UserError if nothing can be predicted.
    """
    from allranks.inference.overrides import split

    parser = predict_parser()
    options = parser.parse_intermixed_args(arguments)
    images = split(options.words)[0]
    if options.data is not None and images:
        raise UserError(f"--data {options.data} and images ({images[0]}): give one or the other.")
    if options.data is None and not images:
        raise UserError("There is nothing to predict: give image files, or --data test.")
    for option, file in (("--csv", options.csv), ("--npy", options.npy)):
        if options.data is None and file is not None:
            raise UserError(f"{option} needs --data: for images there is --json.")
    if options.data is None:
        return _predict_images(options)
    return _predict_part(options)


class _Said(NamedTuple):
    """What the model says of one image."""

    path: Path
    prepared: Prepared
    probabilities: list[float]


def _predict_images(options: argparse.Namespace) -> int:
    from allranks.inference import forward, images

    opened = _open(options)
    trained = opened.trained
    forward.need_classes(trained)
    section = trained.config.data if opened.given.data is None else opened.given.data
    part = _dataset_with_transform(opened, section)
    plan = images.plan(
        trained.config.data["input_shape"],
        options.fit,
        options.polarity,
        is_fashion=section["test"].get("name") == "fashion_mnist",
        transform=None if part is None else getattr(part.dataset, "transform", None),  # type: ignore[union-attr]
    )
    said: list[_Said] = []
    problems: list[UserError] = []
    for path in map(Path, opened.others):
        try:
            said.append(_predict_image(trained, path, plan))
        except UserError as error:
            problems.append(error)
    if len(problems) == len(opened.others) == 1:
        raise problems[0]
    if not said:
        raise UserError(f"None of the {len(problems)} images can be used. {' '.join(map(str, problems))}")
    names = forward.class_names(trained, part, len(said[0].probabilities))
    if options.json:
        for each in said:
            print(json.dumps(_image_as_json(each, names, options.top)))
    else:
        print(_title(trained))
        print(_images_as_table(said, names, options.top))
    for problem in problems:
        show(problem)
    return SOME_FAILED if problems else 0


def _dataset_with_transform(opened: _Opened, section: Mapping[str, Any]) -> Part | None:
    """The test set, where it is a user's own Dataset; None if it is not.

    Only the Dataset itself knows how its images are prepared.
    """
    from allranks.data.parts import Mapped
    from allranks.inference import forward

    if str(section["test"].get("_target_")).startswith("allranks.data."):
        return None
    part = forward.open_part(opened.trained, "test", section)
    if not isinstance(part, Mapped):
        return None  # plain arrays: their bytes are divided by 255, as in the data that allranks ships
    if getattr(part.dataset, "transform", None) is None:
        show(
            "The Dataset of data.test has no attribute `transform`, so it is not known how it prepares an "
            "image: pixels are scaled to 0..1."
        )
    return part


def _predict_image(trained: Trained, path: Path, plan: Plan) -> _Said:
    from allranks.inference import forward, images
    from allranks.training.building import dtype_of

    prepared = images.prepare(images.read(path), plan, path)
    pixels = prepared.pixels.to(dtype_of(trained.precision))
    logits = forward.logits_of(trained, pixels.unsqueeze(0))
    return _Said(path, prepared, forward.probabilities_of(logits)[0].tolist())


def _images_as_table(said: Sequence[_Said], names: Sequence[str], top: int) -> str:
    rows: list[tuple[str, ...]] = [("image", "class", "probability", "then", "prepared")]
    for each in said:
        best, *others = _best(each.probabilities, top)
        then = ", ".join(f"{names[i]} {_percent(each.probabilities[i])}" for i in others)
        prepared = ("inverted, " if each.prepared.inverted else "") + each.prepared.how
        rows.append(
            (str(each.path), names[best], _percent(each.probabilities[best]), then or "-", prepared)
        )
    return table(rows)


def _image_as_json(said: _Said, names: Sequence[str], top: int) -> dict[str, Any]:
    best = _best(said.probabilities, top)
    return {
        "image": str(said.path),
        "class": best[0],
        "name": names[best[0]],
        "probability": _finite(said.probabilities[best[0]]),
        "top": [
            {"class": i, "name": names[i], "probability": _finite(said.probabilities[i])} for i in best
        ],
        "probabilities": [_finite(each) for each in said.probabilities],
        "inverted": said.prepared.inverted,
        "prepared": said.prepared.how,
    }


def _best(probabilities: Sequence[float], top: int) -> list[int]:
    """The likeliest classes, the likeliest first."""
    order = sorted(range(len(probabilities)), key=lambda i: probabilities[i], reverse=True)
    return order[:top]


def _percent(probability: float) -> str:
    return f"{100 * probability:.2f} %"


def _finite(value: float) -> float | None:
    """The value, with None for NaN, which JSON does not have."""
    return value if math.isfinite(value) else None


def _predict_part(options: argparse.Namespace) -> int:
    from allranks.inference import forward

    for option, file in (("--csv", options.csv), ("--npy", options.npy)):
        if file is not None and not options.force:
            _check_not_there(option, file)  # told before the data are read
    opened = _open(options)
    trained = opened.trained
    if options.npy is None or options.csv is not None:
        forward.need_classes(trained)
    part = forward.open_part(trained, options.data, opened.given.data, opened.given.is_other_data)
    if options.npy is not None:
        array = forward.outputs_in_order(trained, part).numpy()
        _write_npy(options.npy, array, options.force)
        if not forward.is_classification(trained):
            if options.json:
                _print_outputs(array)
                return 0
            print(_title(trained))
            print(f"an array of {array.dtype} {list(array.shape)} is in {options.npy}")
            return 0
    outputs = forward.forward(trained, part)
    names = forward.class_names(trained, part, outputs.logits.shape[1])
    if options.csv is not None:
        _write_csv(options.csv, outputs, options.force)
    if options.json:
        _print_examples(outputs, names)
        return 0
    print(_title(trained))
    print(_figures_as_table(options.data, outputs.figures))
    print(confusion_table(outputs.confusion(), names))
    if options.csv is not None:
        print(f"{len(outputs.labels):,} lines are in {options.csv}")
    if options.npy is not None:
        print(f"an array of {array.dtype} {list(array.shape)} is in {options.npy}")
    return 0


def _print_outputs(array: np.ndarray) -> None:
    """One JSON line for each example of a run without classes: what the model gives for it.

    `array` has an entry for each example. NaN and infinity become null, because JSON has neither.
    """
    import numpy as np

    values = array.astype(object)
    values[~np.isfinite(array)] = None
    for index, output in enumerate(values.tolist()):
        print(json.dumps({"index": index, "output": output}))


def _print_examples(outputs: Outputs, names: Sequence[str]) -> None:
    """One JSON line for each example, in the order of the data."""
    rows = zip(outputs.labels.tolist(), outputs.probabilities.tolist(), strict=True)
    for index, (label, probabilities) in enumerate(rows):
        predicted = _best(probabilities, 1)[0]
        values = {
            "index": index,
            "label": label,
            "class": predicted,
            "name": names[predicted],
            "probability": _finite(probabilities[predicted]),
            "probabilities": [_finite(each) for each in probabilities],
        }
        print(json.dumps(values))


def _write_csv(path: Path, outputs: Outputs, force: bool) -> None:
    """One line for each example, in the order of the data; raises UserError where the file is there."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    classes = outputs.logits.shape[1]
    writer.writerow(["index", "label", "class", *(f"probability_{i}" for i in range(classes))])
    rows = zip(outputs.labels.tolist(), outputs.probabilities.tolist(), strict=True)
    for index, (label, probabilities) in enumerate(rows):
        writer.writerow([index, label, _best(probabilities, 1)[0], *probabilities])
    try:
        write_text(path, text.getvalue(), new=not force).close()
    except FileExistsError:
        raise _already_there_error("--csv", path) from None
    except OSError as error:
        raise UserError(f"--csv {path} cannot be written ({error.strerror}).") from error


def _write_npy(path: Path, array: Any, force: bool) -> None:
    """Writes the array as numpy does; raises UserError where the file is there."""
    from numpy.lib import format as npy

    content = io.BytesIO()
    npy.write_array(content, array, allow_pickle=False)
    if not force:
        _check_not_there("--npy", path)
    try:
        write_bytes(path, content.getvalue())
    except OSError as error:
        raise UserError(f"--npy {path} cannot be written ({error.strerror}).") from error


def _check_not_there(option: str, path: Path) -> None:
    """Raises UserError if the FILE of an option is there, or in a folder that may not be looked into."""
    try:
        is_there = path.exists()
    except OSError as error:
        raise UserError(f"{option} {path} cannot be written ({error.strerror}).") from error
    if is_there:
        raise _already_there_error(option, path)


def _already_there_error(option: str, path: Path) -> UserError:
    """What is raised where the FILE of an option is there, and --force was not given."""
    return UserError(f"{option} {path} is there already: give another name, or --force.")


def confusion_table(counts: torch.Tensor, names: Sequence[str]) -> str:
    """How often each true class was taken for each class; for many classes only the commonest mistakes."""
    cells = counts.tolist()
    if len(cells) > MOST_COLUMNS:
        mistakes = [
            (count, true, predicted)
            for true, row in enumerate(cells)
            for predicted, count in enumerate(row)
            if count and predicted != true
        ]
        rows = [("true", "predicted", "count")]
        for count, true, predicted in sorted(mistakes, reverse=True)[:CONFUSED]:
            rows.append((names[true], names[predicted], f"{count:,}"))
        return f"the commonest mistakes\n{table(rows)}"
    width = max(5, *(len(f"{count:,}") for row in cells for count in row))
    numbers = [f"{number:>{width}}" for number in range(len(cells))]
    rows_of_all: list[tuple[str, ...]] = [("", *numbers)]
    for number, (name, row) in enumerate(zip(names, cells, strict=True)):
        label = name if name == str(number) else f"{number} {name}"
        rows_of_all.append((label, *(f"{count:>{width},}" for count in row)))
    return f"confusion: a row for each true class, a column for each predicted one\n{table(rows_of_all)}"


# --- allranks evaluate ----------------------------------------------------------------------------------


def evaluate(arguments: Sequence[str]) -> int:
    """Runs `allranks evaluate` with these arguments and returns 0; raises UserError where it cannot."""
    options = evaluate_parser().parse_intermixed_args(arguments)
    # Imported only now, with torch: --help is answered at once.
    from allranks.inference import forward, overrides

    overrides.refuse_others(overrides.split(options.words)[0])
    opened = _open(options)
    trained = opened.trained
    part = forward.open_part(trained, "test", opened.given.data, opened.given.is_other_data)
    figures = forward.measure(trained, part)
    measured = {**figures.named("test"), "test/count": figures.examples}
    verdict, differences = _compared_with_summary(opened, measured)
    if options.json:
        about = {
            "run": str(trained.directory),
            "checkpoint": trained.checkpoint.name,
            "step": trained.step,
            "epoch": trained.epoch,
            "device": trained.runtime.device.type,
            **finite(measured),
            "equals_summary": None if differences is None else not any(differences.values()),
            "differences": None if differences is None else finite(differences),
            "comparison": verdict,
        }
        print(json.dumps(about))
        return 0
    print(_title(trained))
    print(_figures_as_table("test", figures))
    print(verdict)
    return 0


def _figures_as_table(part: str, figures: Figures) -> str:
    """The figures on a part of the data: a line for each."""
    rows = []
    for name, value in figures.named(part).items():
        is_percent = name.endswith("/accuracy")
        rows.append((name, f"{value:.2f} %" if is_percent else repr(value)))
    return table([*rows, (f"{part}/count", f"{figures.examples:,}")])


def _compared_with_summary(
    opened: _Opened, measured: Mapping[str, float]
) -> tuple[str, dict[str, float] | None]:
    """How the measured figures compare with those in summary.json: a sentence, and the differences by key.

    The differences are None where the figures cannot be compared.
    """
    from allranks.inference import load
    from allranks.training.state import weights_sha256

    trained = opened.trained
    summary = load.read_json(trained.directory / "summary.json")
    if opened.given.is_other_data:
        return "summary.json is not compared: it is about the run's own test set.", None
    if not all(_is_figure(summary.get(key, "missing")) for key in measured):
        if (trained.directory / "summary.json").exists():
            return "summary.json is not compared: it is damaged, or does not hold these figures.", None
        return "There is no summary.json to compare with: the run has not finished.", None
    if summary.get("model/sha256") != weights_sha256(trained.model):
        return "summary.json is not compared: it was measured with other weights than these.", None
    differences = {key: _difference(measured[key], summary[key]) for key in measured}
    if not any(differences.values()):
        return "These are the figures in summary.json, to the last digit.", differences
    told = ", ".join(_as_words(key, difference) for key, difference in differences.items() if difference)
    return (
        f"summary.json has other figures: {told}. Another device, number of threads or version of torch "
        "adds up in another order.",
        differences,
    )


def _is_figure(value: object) -> bool:
    """Whether a value of summary.json is a figure: a number, or null for one that is not finite."""
    return value is None or isinstance(value, int | float)


def _difference(measured: float, recorded: float | None) -> float:
    """A measured figure minus that in summary.json, which is None there where it is not finite.

    Two figures that are not finite do not differ. Of one that is and one that is not the difference is NaN.
    """
    if recorded is None:
        return math.nan if math.isfinite(measured) else 0.0
    return measured - recorded if math.isfinite(measured) else math.nan


def _as_words(key: str, difference: float) -> str:
    """`test/loss by +0.25`; where the difference is NaN, that one of the figures is not finite."""
    if math.isnan(difference):
        return f"{key}, which is finite in only one of them"
    return f"{key} by {difference:+.3g}"


# --- allranks export ------------------------------------------------------------------------------------


def export(arguments: Sequence[str]) -> int:
    """Runs `allranks export` with these arguments and returns 0.

    Raises UserError if nothing can be exported, and RunError where what was exported does not agree.
    """
    options = export_parser().parse_intermixed_args(arguments)
    # Imported only now, with torch: --help is answered at once.
    from allranks.inference import export as exporting
    from allranks.inference import forward, overrides

    overrides.refuse_others(overrides.split(options.words)[0])
    exporting.check_place(options.to, options.force)  # before the data are read
    opened = _open(options)
    forward.need_classes(opened.trained)
    part = forward.open_part(opened.trained, "test", opened.given.data, opened.given.is_other_data)
    agreement = exporting.export(opened.trained, part, options.to, options.force)
    size = options.to.stat().st_size
    if options.json:
        print(json.dumps({"file": str(options.to), "bytes": size, **agreement._asdict()}))
        return 0
    print(_title(opened.trained))
    print(
        f"{options.to}: {size:,} bytes. Run on the {agreement.examples:,} test examples, its logits differ "
        f"by {agreement.largest_difference:.2g} at most.\n"
        f"accuracy {agreement.accuracy:.2f} %, and {agreement.own_accuracy:.2f} % by the model itself"
    )
    return 0
