"""Writes a trained model for other programs: safetensors, torch.export (.pt2) or ONNX.

What was exported is loaded again and run on the test set, next to the model itself. Only a file whose
logits agree gets its name; any other is removed. docs/use-the-model.md says what a program that reads such
a file has to do with its pixels, and the metadata inside the file say it too.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import secrets
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

import allranks
from allranks import config as configs
from allranks.base.errors import RunError, UserError
from allranks.base.text import first_line, one_line
from allranks.data.dealing import EVAL_BATCH
from allranks.data.parts import Part
from allranks.inference import forward
from allranks.inference.load import Trained
from allranks.training.building import build_model, dtype_of
from allranks.training.state import weights_sha256

Run = Callable[[torch.Tensor], torch.Tensor]  # images [n, ...] to logits [n, classes], on the CPU

INPUT, OUTPUT = "images", "logits"  # the names of an exported model's input and output
METADATA = "allranks.json"  # the name of the metadata in a .pt2 file

# By how much logits of the size 1 may differ: a hundred times the rounding of one operation.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-4}


class Agreement(NamedTuple):
    """How well the exported model agrees with the model itself, on the test set."""

    examples: int
    largest_difference: float  # of two logits
    allowed_difference: float
    accuracy: float  # the accuracy of the exported model, in percent
    own_accuracy: float  # the accuracy of the model itself on the same images, in percent

    @property
    def agrees(self) -> bool:
        # Written with <=, because every comparison with NaN is false: a NaN counts as a disagreement.
        return self.largest_difference <= self.allowed_difference


class _Format(NamedTuple):
    write: Callable[[nn.Module, torch.Tensor, dict[str, str], Path], None]
    load: Callable[[Path, Trained], Run]
    # The type of the exported numbers, for a model whose weights have the given type.
    dtype: Callable[[torch.dtype], torch.dtype]


def export(trained: Trained, part: Part, path: Path, force: bool) -> Agreement:
    """Writes the model to `path`, in the format of its suffix, and checks it on the examples of `part`.

    The file appears whole, and only once it is checked. Raises UserError for another suffix, for a file
    that is there unless `force`, and for a package that is missing; RunError where the exported model
    disagrees or the format cannot hold the model.
    """
    check_place(path, force)
    form = _format_of(path)

    # The copy computes on the CPU and without autocast, so that rounding is all that may differ.
    dtype = form.dtype(next(trained.model.parameters()).dtype)
    model = copy.deepcopy(trained.model).to("cpu", dtype).eval()
    example = next(iter(part.batches([range(min(2, len(part)))], trained.config.seed))).images.cpu()
    example = example.to(dtype) if example.is_floating_point() else example

    temporary = path.with_name(f".{path.stem}.{secrets.token_hex(4)}.tmp{path.suffix}")
    try:
        with _quiet():
            form.write(model, example, _metadata(trained, model, part), temporary)
            agreement = _compare(trained, model, form.load(temporary, trained), part, dtype)
        if not agreement.agrees:
            raise RunError(
                f"{path} was not written: on the test set its logits differ from the model's by up to "
                f"{agreement.largest_difference:.3g}, and rounding explains "
                f"{agreement.allowed_difference:.3g}. Give another format, or report it."
            )
        _put(temporary, path, force)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror or one_line(error)}).") from error
    finally:
        with contextlib.suppress(OSError):  # of a name that is too long
            temporary.unlink(missing_ok=True)
    return agreement


def _format_of(path: Path) -> _Format:
    formats = {
        ".safetensors": _Format(_write_safetensors, _load_safetensors, lambda dtype: dtype),
        ".pt2": _Format(_write_pt2, _load_pt2, lambda dtype: dtype),
        # Programs that read ONNX expect float32, and many of their kernels know nothing else.
        ".onnx": _Format(_write_onnx, _load_onnx, lambda dtype: torch.float32),
    }
    if path.suffix not in formats:
        known = ", ".join(formats)
        raise UserError(
            f"--to {path}: {path.suffix or 'a name without a suffix'} is no format to export to. The "
            f"suffix says which: {known}."
        )
    return formats[path.suffix]


def check_place(path: Path, force: bool) -> None:
    """Raises UserError if nothing can be exported to this path: another suffix, a file that is there."""
    _format_of(path)
    try:
        is_directory = path.is_dir()
        is_there = path.exists()
        has_directory = path.parent.is_dir()
    except OSError as error:
        raise UserError(f"--to {path} cannot be written ({error.strerror}): give another place.") from error
    if is_directory:
        raise UserError(f"--to {path} is a directory: give the name of a file.")
    if is_there and not force:
        raise UserError(f"--to {path} is there already: give another name, or --force to replace it.")
    if not has_directory:
        raise UserError(f"--to {path}: there is no directory {path.parent}. Make it first.")


def _put(temporary: Path, path: Path, force: bool) -> None:
    """Gives the finished file its name, and replaces another file only with `force`."""
    if not force and path.exists():
        raise UserError(f"--to {path} has appeared meanwhile: give another name, or --force to replace it.")
    with temporary.open("rb") as file:
        os.fsync(file.fileno())
    temporary.replace(path)


def _metadata(trained: Trained, model: nn.Module, part: Part) -> dict[str, str]:
    """What a program that reads the file has to know. All values are texts: the formats hold only texts.

    A Dataset may have names for its classes, so the part of the data is asked for them, too.
    """
    config = trained.config
    about = {
        "input": {
            "name": INPUT,
            "shape": ["batch", *config.data["input_shape"]],
            "dtype": str(next(model.parameters()).dtype).removeprefix("torch."),
            "preprocessing": _preprocessing(trained),
        },
        "output": {"name": OUTPUT, "meaning": "logits; softmax over the classes gives probabilities"},
        "classes": forward.class_names(trained, part),
        "trained": {
            "run": trained.directory.name,
            "epoch": trained.epoch,
            "step": trained.step,
            "weights_sha256": weights_sha256(trained.model),
        },
    }
    return {
        "format": "pt",  # by which other readers of safetensors know that the weights are PyTorch's
        "allranks_version": allranks.__version__,
        "allranks": json.dumps(about),
        "config": configs.freeze(config),
    }


def _preprocessing(trained: Trained) -> str:
    """What the model's input looks like, in words, by what data.test names in the configuration."""
    test = trained.config.data["test"]
    target = test.get("_target_")
    is_mnist = target == "allranks.data.mnist.load"
    is_fashion = is_mnist and test.get("name") == "fashion_mnist"
    grey = "grey values 0..255, light on a dark ground, divided by 255; no mean is subtracted. "
    if is_fashion:
        return (
            grey + "A piece of clothing fills the 28 x 28 pixels, in the middle, with its proportions kept"
        )
    if is_mnist or target == "allranks.data.synthetic.generate":
        return (
            grey
            + "A digit fits 20 x 20 pixels, and its centre of mass is at pixel 14 of 28, counted from 0"
        )
    return "as data.test in the configuration gives it; bytes 0..255 are divided by 255"


def _compare(trained: Trained, model: nn.Module, run: Run, part: Part, dtype: torch.dtype) -> Agreement:
    """Runs the model and the exported model (`run`) on all examples of the part, on the CPU."""
    largest = torch.zeros((), dtype=torch.float64)
    size = torch.ones((), dtype=torch.float64)  # the size of the largest logit
    correct = 0
    own_correct = 0
    pieces = torch.arange(len(part)).split(EVAL_BATCH["cpu"])
    with torch.no_grad():
        for images, labels in part.batches(pieces, trained.config.seed):
            given = images.cpu().to(dtype) if images.is_floating_point() else images.cpu()
            own = model(given).double()
            exported = run(given).double()
            if own.shape != exported.shape:
                return Agreement(len(part), float("nan"), TOLERANCE[dtype], 0.0, 0.0)
            # If one of its arguments is NaN, torch.maximum returns NaN. So a NaN is not lost here.
            largest = torch.maximum(largest, (own - exported).abs().max())
            size = torch.maximum(size, own.abs().max())
            own_correct += int((own.argmax(dim=1) == labels.cpu()).sum())
            correct += int((exported.argmax(dim=1) == labels.cpu()).sum())
    return Agreement(
        examples=len(part),
        largest_difference=float(largest),
        allowed_difference=TOLERANCE[dtype] * float(size),
        accuracy=100 * correct / len(part),
        own_accuracy=100 * own_correct / len(part),
    )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps what the exporters print about their own progress from the console."""
    loggers = [logging.getLogger(name) for name in ("torch", "torch.onnx", "torch.export", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


# --- safetensors: the weights, for a program that has the model's code ----------------------------------


def _write_safetensors(
    model: nn.Module, example: torch.Tensor, metadata: dict[str, str], path: Path
) -> None:
    from safetensors.torch import save

    weights = {name: tensor.detach().clone().contiguous() for name, tensor in model.state_dict().items()}
    path.write_bytes(save(weights, metadata))


def _load_safetensors(path: Path, trained: Trained) -> Run:
    """The weights of the file in a model that is built anew from the configuration in the file."""
    from omegaconf import OmegaConf
    from safetensors import safe_open

    with safe_open(str(path), framework="pt") as file:
        metadata = file.metadata()
        weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)
    config = configs.typed(OmegaConf.create(metadata["config"]))
    dtype = dtype_of(config.trainer.precision)
    model = build_model(config.model, config.seed, dtype, torch.device("cpu"))
    model.to(next(trained.model.parameters()).dtype)
    model.load_state_dict(weights)
    return model.eval()


# --- torch.export: a program for torch, without the model's code ----------------------------------------


def _write_pt2(model: nn.Module, example: torch.Tensor, metadata: dict[str, str], path: Path) -> None:
    batch = torch.export.Dim("batch", min=1)
    try:
        program = torch.export.export(model, (example,), dynamic_shapes=({0: batch},))
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise _not_expressible(path, error) from error
    torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)})


def _load_pt2(path: Path, trained: Trained) -> Run:
    program: Run = torch.export.load(path).module()
    return program


# --- ONNX: for programs that know nothing of torch -------------------------------------------------------


def _write_onnx(model: nn.Module, example: torch.Tensor, metadata: dict[str, str], path: Path) -> None:
    if tuple(int(number) for number in torch.__version__.split(".")[:2]) < (2, 5):
        raise UserError(f"Exporting to ONNX needs torch 2.5 or later, and this is {torch.__version__}.")
    onnx = _needed("onnx")
    _needed("onnxscript")
    _needed("onnxruntime")
    batch = torch.export.Dim("batch", min=1)
    try:
        program = torch.onnx.export(
            model,
            (example,),
            input_names=[INPUT],
            output_names=[OUTPUT],
            dynamic_shapes=({0: batch},),
            dynamo=True,
            verbose=False,
        )
    except (RuntimeError, ValueError, TypeError, AssertionError) as error:
        raise _not_expressible(path, error) from error
    assert program is not None  # dynamo=True returns one
    proto = program.model_proto
    for key, value in metadata.items():
        entry = proto.metadata_props.add()
        entry.key = key
        entry.value = value
    onnx.save(proto, str(path))


def _load_onnx(path: Path, trained: Trained) -> Run:
    onnxruntime = _needed("onnxruntime")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def run(images: torch.Tensor) -> torch.Tensor:
        [logits] = session.run([OUTPUT], {INPUT: images.contiguous().numpy()})
        return torch.from_numpy(logits)

    return run


def _needed(package: str) -> Any:
    """The package of this name; raises UserError where it is not installed."""
    import importlib

    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"Exporting to ONNX needs {package}, which is not installed here ({one_line(error)}): type "
            "`pip install allranks[export]`, or export to .pt2 or .safetensors."
        ) from error


def _not_expressible(path: Path, error: Exception) -> RunError:
    reason = one_line(first_line(error))[:200]
    return RunError(
        f"torch cannot turn this model's code into a {path.suffix} program ({reason}). "
        "--to FILE.safetensors exports its weights."
    )
