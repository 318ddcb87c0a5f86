"""A trained model over a data set: its figures, and what it says of each example, in the order of the data.

measure() and outputs_in_order() work for every task. All else here is for classification, whose model makes
logits of images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from allranks.base.errors import MISFITS, UserError
from allranks.base.text import one_line
from allranks.data import loader
from allranks.data.dealing import EVAL_BATCH, evaluation_batches
from allranks.data.nests import described
from allranks.data.parts import Mapped, Part
from allranks.inference.load import Trained
from allranks.tasks import Classification, at_least_fp32, metrics_of, outputs_of
from allranks.training.building import dtype_of
from allranks.training.engine import evaluate
from allranks.training.metrics import Figures, Sums, columns_of, objects_of

PARTS = ("test", "val", "train")


@dataclass(frozen=True)
class Outputs:
    """What the model says of every example of a part, in the order of the part; all on the CPU."""

    logits: torch.Tensor  # [n, classes]: the larger a class's logit, the likelier the class
    labels: torch.Tensor  # int64 [n]: the true classes
    figures: Figures  # loss and accuracy, added up as the run has added them up

    @property
    def probabilities(self) -> torch.Tensor:
        """[n, classes]: each row sums to 1."""
        return probabilities_of(self.logits)

    @property
    def predictions(self) -> torch.Tensor:
        """int64 [n]: the likeliest class of each example."""
        return self.logits.argmax(dim=1)

    def confusion(self) -> torch.Tensor:
        """int64 [classes, classes]: how many examples of the row's class were taken for the column's."""
        classes = self.logits.shape[1]
        cells = self.labels * classes + self.predictions
        return torch.bincount(cells, minlength=classes * classes).view(classes, classes)


def open_part(
    trained: Trained,
    name: str = "test",
    section: Mapping[str, Any] | None = None,
    is_other_data: bool = False,
) -> Part:
    """A part of the data: "test", "val" or "train".

    The data are those of the run, or those of another `section` data of a configuration. Of a run with
    trainer.limit_eval these are the test or validation examples that it looked at, unless the section
    `is_other_data`.

    Raises UserError if the data cannot be opened, or do not fit the model.
    """
    own = trained.config.data
    section = own if section is None else section
    wanted = list(own.get("input_shape") or ())
    given = list(section.get("input_shape") or ())
    if wanted and given and wanted != given:
        raise UserError(
            f"data.input_shape={given}: the model of {trained.directory} takes {wanted}. Give data with "
            "images of that shape."
        )
    if is_classification(trained) and section["classes"] > own["classes"]:
        raise UserError(
            f"data.classes={section['classes']}: the model of {trained.directory} knows "
            f"{own['classes']} classes. Give data with as many at most."
        )
    return loader.open_part(
        name, section, trained.runtime, trained.config.seed, dtype_of(trained.precision),
        is_labelled=is_classification(trained),
        limit_eval=None if is_other_data else trained.config.trainer.limit_eval,
    )  # fmt: skip


def is_classification(trained: Trained) -> bool:
    """Whether the model gives logits of classes for images, so that there are predictions to be shown."""
    return isinstance(trained.task, Classification)


@torch.no_grad()
def measure(trained: Trained, part: Part) -> Figures:
    """The figures of the trained model on all examples of the part, for every task.

    They are computed as the run computes them, and are the same to the last digit if this host is of the
    same kind as the run's. Raises UserError if the part is empty, or does not fit the model.
    """
    if not len(part):
        raise _empty(trained)
    if is_classification(trained):
        return forward(trained, part).figures
    task, runtime = trained.task, trained.runtime
    trained.model.eval()
    with part.explained():
        first = part.first(1, trained.config.seed)
        with _told(trained, f"the batch, {described(first)}", 1), runtime.autocast(trained.precision):
            outputs = outputs_of(task, trained.model, first)
    columns = columns_of(task, metrics_of(task, outputs, first))
    return evaluate(trained.model, task, columns, part, trained.precision, trained.config.seed, runtime)


def _empty(trained: Trained) -> UserError:
    return UserError(f"There is no example in this part of the data of {trained.directory}.")


def need_classes(trained: Trained) -> None:
    """Raises UserError if the run is not a classification."""
    if not is_classification(trained):
        raise UserError(
            f"{trained.directory} is a run of task._target_={trained.config.task['_target_']}: its model "
            "does not tell classes apart. `allranks evaluate` measures it, `allranks predict --data test "
            "--npy FILE` writes what it gives for each example, and allranks.inference.load gives it to a "
            "program of your own."
        )


@torch.no_grad()
def forward(trained: Trained, part: Part) -> Outputs:
    """Passes all examples of the part through the model, in batches, on the model's device.

    The figures are computed as the run computes them after its last epoch. They are the same to the last
    digit if this host is of the same kind as the run's. Raises UserError if labels or images do not fit
    the model.
    """
    need_classes(trained)
    runtime, task = trained.runtime, trained.task
    trained.model.eval()
    sums: Sums | None = None
    logits: list[torch.Tensor] = []
    labels: list[torch.Tensor] = []
    with part.explained():
        for row, (examples, length) in evaluation_batches(part, runtime, trained.config.seed):
            its_logits = logits_of(trained, examples.images)
            _check_labels(examples.labels, its_logits.shape[1])
            measured = metrics_of(task, its_logits, examples)
            if sums is None:
                sums = Sums(runtime, columns_of(task, measured), objects_of(task))
            sums.add(row, task.loss(its_logits, examples), length, measured)
            runtime.progress.evaluated_batch()
            logits.append(at_least_fp32(its_logits).cpu())
            labels.append(examples.labels.cpu())
    if sums is None:
        raise _empty(trained)

    return Outputs(
        _in_order(logits, len(part), trained), _in_order(labels, len(part), trained), sums.total(runtime)
    )


def _in_order(pieces: Sequence[torch.Tensor], length: int, trained: Trained) -> torch.Tensor:
    """The entries of evaluation_batches(), an entry for each example, in the order of the part.

    They come share by share. Share s has the examples s, s + share_count, s + 2 * share_count and so on.
    """
    runtime = trained.runtime
    order = torch.cat([torch.arange(share, length, runtime.share_count) for share in runtime.shares])
    came = torch.cat(list(pieces))
    in_order = torch.empty_like(came)
    in_order[order] = came
    return in_order


@torch.no_grad()
def outputs_in_order(trained: Trained, part: Part) -> torch.Tensor:
    """What the model gives for each example of the part, [n, ...] on the CPU, in the order of the part.

    It works for every task whose outputs are one tensor with an entry for each example. Raises UserError
    if they are not, or if the part is empty.
    """
    runtime = trained.runtime
    trained.model.eval()
    pieces: list[torch.Tensor] = []
    with part.explained():
        for _, (examples, length) in evaluation_batches(part, runtime, trained.config.seed):
            with (
                _told(trained, f"the batch, {described(examples)}", length),
                runtime.autocast(trained.precision),
            ):
                outputs = outputs_of(trained.task, trained.model, examples)
            if not isinstance(outputs, torch.Tensor) or outputs.shape[:1] != (length,):
                raise UserError(
                    f"The model of {trained.directory} gives {described(outputs)} for {length} examples, "
                    "but --npy holds one tensor with an entry for each example: use "
                    "allranks.inference.load in a program of your own."
                )
            runtime.progress.evaluated_batch()
            # numpy has no bfloat16
            pieces.append(at_least_fp32(outputs).cpu() if outputs.is_floating_point() else outputs.cpu())
    if not pieces:
        raise _empty(trained)
    return _in_order(pieces, len(part), trained)


@torch.no_grad()
def logits_of(trained: Trained, images: torch.Tensor) -> torch.Tensor:
    """The model's logits [n, classes], on its device.

    The images [n, ...] are prepared as in training. Raises UserError if the model does not take them.
    """
    need_classes(trained)
    images = images.to(trained.runtime.device)
    with (
        _told(trained, f"images of shape {list(images.shape[1:])}", len(images)),
        trained.runtime.autocast(trained.precision),
    ):
        logits: torch.Tensor = trained.model(images)
    if not isinstance(logits, torch.Tensor) or logits.dim() != 2:
        raise UserError(
            f"The model of {trained.directory} does not give a number for each class and image, so it "
            "cannot be used here."
        )
    return logits


@contextmanager
def _told(trained: Trained, given: str, count: int) -> Iterator[None]:
    """A block in which the model computes: its errors become a UserError that says what it was `given`.

    `count` is the number of examples. The model is the user's own, and may raise anything.
    """
    try:
        yield
    except MISFITS as error:
        if _is_out_of_memory(error):
            device = trained.runtime.device.type
            remedy = "end other programs on this host" if device == "cpu" else "give device=cpu"
            raise UserError(
                f"The memory of the {device} is too small for the model of {trained.directory} with "
                f"{count:,} example{'s' * (count != 1)} at once: {remedy}, or take a host with more memory."
            ) from error
        first_line = (str(error).strip().splitlines() or ["without a message"])[0]
        raise UserError(
            f"The model of {trained.directory} does not take {given} ({type(error).__name__}: "
            f"{one_line(first_line)})."
        ) from error


def _is_out_of_memory(error: Exception) -> bool:
    """Whether torch has found no memory: CUDA has a class for that error, and the CPU only its words."""
    return isinstance(error, torch.cuda.OutOfMemoryError) or "can't allocate memory" in str(error)


def probabilities_of(logits: torch.Tensor) -> torch.Tensor:
    """[n, classes]: the softmax of the logits, at least in fp32; each row sums to 1."""
    return at_least_fp32(logits).softmax(dim=1)


@torch.no_grad()
def images_at(trained: Trained, part: Part, positions: Iterable[int]) -> torch.Tensor:
    """The images at these positions of the part, [n, C, H, W] on the CPU, as the model gets them."""
    pieces = torch.tensor(list(positions), dtype=torch.int64).split(EVAL_BATCH["cpu"])
    batches = part.batches([piece for piece in pieces if len(piece)], trained.config.seed)
    images = [examples.images.cpu() for examples in batches]
    return torch.cat(images) if images else torch.empty(0, *trained.config.data["input_shape"])


def class_names(trained: Trained, part: Part | None = None, outputs: int = 0) -> list[str]:
    """A name for each class: `data.class_names`, or those of the Dataset, or else the numbers from 0.

    A Dataset of torchvision has its names in the attribute `classes`. A model may have more `outputs` than
    the data has classes: those beyond have their number as name.
    """
    names = _names_of_data(trained, part)
    return names + [str(number) for number in range(len(names), outputs)]


def _names_of_data(trained: Trained, part: Part | None) -> list[str]:
    """A name for each class of the data."""
    count = int(trained.config.data["classes"])
    names: Sequence[Any] = trained.config.data.get("class_names") or ()
    if not names and isinstance(part, Mapped):
        names = getattr(part.dataset, "classes", ())
    if isinstance(names, list | tuple) and len(names) == count:
        return [str(name) for name in names]
    return [str(number) for number in range(count)]


def _check_labels(labels: torch.Tensor, outputs: int) -> None:
    highest = int(labels.max()) if len(labels) else 0
    if highest >= outputs:
        raise UserError(
            f"The data have a label {highest}, but the model has {outputs} outputs, and labels count from "
            "0: give data with the classes that the model was trained on."
        )
