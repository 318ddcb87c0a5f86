"""What the checkpoints of a user's own loop hold: the objects that it keeps, and where it stands.

Any object with state_dict() and load_state_dict() can be kept: a model, an optimizer, a schedule, a
GradScaler, an average of weights, a class of the user's own. The tensors in its state go to a safetensors
file of its name, and all else to state.json.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from allranks import config as configs
from allranks.base.errors import ANYONE, MISFITS, UserError
from allranks.base.text import one_line, some
from allranks.run import checkpoint
from allranks.run.shards import INDEX, MODEL, OPTIMIZER, assembled
from allranks.runtime.meeting import ranks_named
from allranks.runtime.runtime import Runtime
from allranks.runtime.sharding import local
from allranks.training import shards
from allranks.training import state as states
from allranks.training.position import TrainingPosition
from allranks.training.state import STATE, Captured

_MOST_KEYS_SHOWN = 6  # of a state that does not fit


def add_mean(sums: torch.Tensor, value: torch.Tensor | float, count: int) -> None:
    """Adds a value that is the mean over `count` examples.

    sums [2]: the sum of value * examples, and the number of examples. value: a number, or a tensor of one.
    """
    if isinstance(value, torch.Tensor):
        value = value.detach().to(sums.dtype).reshape(())
    sums[0] += value * count
    sums[1] += count


def no_sums(runtime: Runtime) -> list[torch.Tensor]:
    """What add_mean() adds to at first, for each share that this rank takes of a batch."""
    return [torch.zeros(2, dtype=runtime.sum_dtype, device=runtime.device) for _ in runtime.shares]


def rows_of_shares(sums: Sequence[Sequence[torch.Tensor]]) -> torch.Tensor:
    """[shares of this rank, 2 * names]: what add_mean() has added up, of each name for each share."""
    return torch.stack([torch.stack(list(of_name)) for of_name in sums], dim=1).flatten(1)


def digest_of(names: Sequence[str]) -> float:
    """A number by which ranks find out whether they have the same names: 32 bits, which float64 holds."""
    return float(zlib.crc32("\n".join(names).encode()))


def are_alike(texts: Sequence[str], runtime: Runtime) -> bool:
    """Whether all ranks have the same texts, such as the names of figures; all ranks call."""
    mine = torch.tensor([[int(digest_of(texts))]], dtype=torch.int64, device=runtime.device)
    return len(set(runtime.gather(mine).flatten().tolist())) == 1


class Means:
    """Means over the examples of an epoch, added up on the device while its steps are taken.

    Each name has two numbers for each share that this rank takes of a batch: the sum of value * examples,
    and the number of examples, in float64. As a rule a rank has one share. The sums of several ones are
    kept apart, so that all of them can be added in the order of the shares, whichever rank had which share.
    """

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._dtype = runtime.sum_dtype
        self._sums: dict[str, list[torch.Tensor]] = {}  # for each name, the sums of each share
        self.digest = 0  # a hash of the epoch's batches up to now (data.batches.Dealt)
        # The sums before the step that is under way, of the names that it has changed. None if no step
        # is left out.
        self._before: dict[str, list[torch.Tensor]] | None = None
        self._is_left_out = False  # whether the figures of this step do not count
        # How many losses of this rank were not finite; on the device, so that nothing waits for it.
        self._not_finite = torch.zeros((), dtype=self._dtype, device=runtime.device)

    def note_weight(self, weight: float | torch.Tensor) -> None:
        """Remembers whether a loss is finite, by its weight, which is NaN where it is not (share_weight()).

        gather() tells where one was not.
        """
        is_nan = weight.isnan() if isinstance(weight, torch.Tensor) else math.isnan(weight)
        self._not_finite += is_nan

    def add(self, name: str, value: torch.Tensor | float, count: int, row: int = 0) -> None:
        """Adds a value that is the mean over `count` examples of share number `row` of this rank."""
        sums = self._sums.get(name)
        if sums is None:
            sums = self._sums[name] = no_sums(self._runtime)
        if self._before is not None and name not in self._before:
            self._before[name] = [of_share.clone() for of_share in sums]
        if count and not self._is_left_out:
            add_mean(sums[row], value, count)

    def begin_step(self, may_be_left_out: bool) -> None:
        """A step begins, whose figures leave_out_step() may take back if `may_be_left_out`."""
        self._before = {} if may_be_left_out else None
        self._is_left_out = False

    def leave_out_step(self) -> None:
        """Takes back the figures of this step; those that are still to come do not count either."""
        self._sums |= self._before or {}
        self._before = {}
        self._is_left_out = True

    def gather(self) -> dict[str, list[list[float]]]:
        """By name the two numbers of each share of all ranks, in the order of the shares; all ranks call.

        Raises UserError if the ranks have different names, or were given different batches, and if a
        loss was not finite: then the weights are spoilt, and must not be saved.
        """
        names = sorted(self._sums)
        mine = [[digest_of(names), float(len(names)), float(self.digest), float(self._not_finite)]]
        heads = mine
        if self._runtime.world_size > 1:
            everyones = torch.tensor(mine, dtype=self._dtype, device=self._runtime.device)
            heads = self._runtime.gather(everyones).tolist()
        spoilt = [rank for rank, head in enumerate(heads) if head[3]]
        if spoilt:
            raise UserError(
                f"The loss of {ranks_named(spoilt)} has not been finite since the last checkpoint, from "
                "which the run goes on when it is started again. Take a smaller learning rate, clip the "
                "gradient, or look at the data. allranks.open(stop_at_nonfinite=False) lets it go on.",
                said_by=0,
            )
        if any(head[2] != heads[0][2] for head in heads):
            raise UserError(
                "run.steps() has got other batches on other ranks. Its source must give the same batches "
                "on all ranks, of which each rank keeps its share: leave out what depends on the rank, and "
                "let random numbers come from the generators of torch, NumPy or random, which allranks "
                "seeds.",
                said_by=0,
            )
        if any(head[:2] != heads[0][:2] for head in heads):
            raise UserError(
                f"run.log() within run.steps() has got other names on other ranks (here {some(names)}): "
                "log the same names on all ranks.",
                said_by=0,
            )
        if not names:
            return {}
        rows = self._runtime.gather(rows_of_shares([self._sums[name] for name in names]))
        by_share = rows.view(-1, len(names), 2).tolist()
        return {name: [of_share[i] for of_share in by_share] for i, name in enumerate(names)}

    def take(self) -> dict[str, float]:
        """The mean of each name over all ranks, and begins anew; all ranks call."""
        totals = {}
        for name, rows in self.gather().items():
            total, count = (sum(column) for column in zip(*rows, strict=True))
            totals[name] = total / count if count else float("nan")
        self._sums = {}
        return totals

    def restore(self, saved: Mapping[str, list[list[float]]]) -> None:
        """Puts back what gather() returned when the checkpoint was made.

        If the number of shares is another one now, rank 0 goes on from the total.
        """
        runtime = self._runtime
        self._sums = {}
        for name, rows in saved.items():
            if len(rows) == runtime.share_count:
                mine = rows[runtime.shares.start : runtime.shares.stop]
            else:
                total = [sum(column) for column in zip(*rows, strict=True)]
                mine = [[0.0, 0.0] for _ in runtime.shares]
                if runtime.is_main:
                    mine[0] = total
            self._sums[name] = [torch.tensor(row, dtype=self._dtype, device=runtime.device) for row in mine]


class KeptObjects:
    """The objects that a loop keeps, as what the checkpoints of its run hold (saver.Kept).

    `decisive` holds the values that must be the same in a checkpoint and in this run
    (config.decisive_values). `is_sharded`: the loop's models are spread over the ranks, each of which saves
    its own slices.
    """

    def __init__(self, runtime: Runtime, decisive: Mapping[str, Any], is_sharded: bool = False) -> None:
        self.runtime = runtime
        self.is_sharded = is_sharded
        self.decisive = decisive
        self.objects: dict[str, Any] = {}
        self.means = Means(runtime)
        self.source: dict[str, Any] | None = None  # what the epoch's steps go through (Batches.described)
        self.examples = 0  # how many examples the epoch's steps have had up to now, over all ranks
        self.loader: Any = None  # the source of the epoch's batches, if it has a state_dict() of its own
        self.is_over = False  # whether the program has left its loop over the epochs for good
        self.position = TrainingPosition()
        self._first_buffers: dict[str, dict[str, torch.Tensor]] = {}  # by object, then by name
        # The checkpoint from which the run goes on, until its objects are all put back.
        self._path = ""
        self._saved: dict[str, Any] = {}
        self._files: dict[str, bytes] = {}
        self._saved_loader: Any = None
        self._shards: shards.Source | None = None  # where this rank reads only what it needs

    def signature(self) -> tuple[str, list[int]]:
        """A fingerprint of the state of all objects; two of one process may be compared.

        Of each tensor it has where its numbers are, how often torch has seen them change, and the sum of
        its bytes, taken as whole numbers: that costs far less than a copy.
        """
        stateful = dict(self.objects)
        # Not `if self.loader`: Python would ask for its length, which the loader of a stream does not have.
        if self.loader is not None:
            stateful["(loader)"] = self.loader
        tensors: dict[str, torch.Tensor] = {}
        rest = [
            states.taken_apart(each.state_dict(), name, tensors, torch.Tensor.detach)
            for name, each in stateful.items()
        ]
        numbers = [
            number
            for tensor in map(local, tensors.values())
            for number in (tensor.data_ptr(), tensor._version, _sum_of_bytes(tensor))
        ]
        return json.dumps(rest), numbers

    # --- to bytes ------------------------------------------------------------------------------------

    def gather(self) -> dict[str, list[list[float]]]:
        """The epoch's means of all ranks; all ranks call."""
        return self.means.gather()

    def capture(
        self,
        gathered: dict[str, list[list[float]]],
        copied: Callable[[torch.Tensor], torch.Tensor] | None = None,
    ) -> Captured:
        """A copy of the state of all objects; raises UserError where one cannot be saved.

        `copied` makes the copy of a tensor; None: a copy on the CPU.
        """
        files: dict[str, dict[str, torch.Tensor]] = {}
        kept = {}
        for name, each in self.objects.items():
            tensors: dict[str, torch.Tensor] = {}
            is_model = isinstance(each, nn.Module)
            # A model's tensors keep the names of its state_dict, by which other programs know them.
            state = states.taken_apart(each.state_dict(), "" if is_model else name, tensors, copied)
            buffers = states.changed_buffers(each, self._first_buffers[name]) if is_model else {}
            kept[name] = {
                "state": state,
                "buffers": states.taken_apart(buffers, "(buffer)", tensors, copied),
            }
            files[f"{name}.safetensors"] = tensors
        loader: dict[str, torch.Tensor] = {}
        state = {
            **states.of_any_training(self.position, self.decisive, self.runtime.world_size),
            "epoch_lr": 0.0,
            "sums": [],
            "means": gathered,
            "kept": kept,
            "source": self.source,
            "seen": self.means.digest,
            "seen_examples": self.examples,
        }
        if self.is_over:
            state["is_over"] = True
        # A user's own iterable may go on from epoch to epoch. A loader of a Dataset begins anew in each,
        # so its state is of use within an epoch only.
        goes_on = self.position.epoch_steps or not hasattr(self.loader, "dataset")
        if self.loader is not None and goes_on:
            state["loader"] = states.taken_apart(self.loader.state_dict(), "loader", loader, copied)
            files["loader.safetensors"] = loader
        return Captured(files, state)

    def to_shards(self, gathered: dict[str, list[list[float]]]) -> shards.ToShards:
        """What this rank holds of the state of all objects, not copied; raises UserError.

        The tensors of models go to one file of each rank, and all others to another. Each is named by its
        object, a slash, and its name there.
        """
        seen = self.capture(gathered, copied=torch.Tensor.detach)
        parts: dict[str, dict[str, torch.Tensor]] = {MODEL: {}, OPTIMIZER: {}}
        for file, tensors in seen.tensors.items():
            name = file.removesuffix(".safetensors")
            part = parts[_part_of(self.objects.get(name))]
            part.update({f"{name}/{key}": tensor for key, tensor in tensors.items()})
        return shards.ToShards(parts, seen.state)

    # --- and back ------------------------------------------------------------------------------------

    def restore(self, files: Mapping[str, bytes], path: str) -> None:
        """Takes over where the checkpoint stands. keep() puts its objects back, one by one.

        If models are spread over the ranks, keep() reads from its folder what this rank needs.
        """
        if self.is_sharded:
            self._shards = shards.source_of(path, files)
        with states.of_this_format(path):
            state = checkpoint.from_json(STATE, files[STATE])
            states.check_counters(state)
            if "kept" not in state:
                raise UserError(
                    f"{path} is a checkpoint of the training that comes with allranks, not of a loop of "
                    "one's own: give another name, or another directory."
                )
            differing = configs.differing(configs.with_new_keys(state["identity"]), self.decisive)
            if differing:
                raise UserError(f"{path} is a checkpoint of another run: {differing}.")
            self._saved = dict(state["kept"])
            self._files = {name: content for name, content in files.items() if name != STATE}
            self._path = path
            self.source = state["source"]
            if "loader" in state:
                tensors = self._tensors_of("loader", None)
                self._saved_loader = states.put_together(state["loader"], tensors)
            self.means.restore(state["means"])
            self.means.digest = state["seen"]
            # Older versions of allranks did not write it. Then the ranks get other examples of each batch
            # than they would have got, but each example is still dealt out once.
            self.examples = state.get("seen_examples", 0)
            self.is_over = state.get("is_over", False)
            states.restore_position(self.position, state)

    def _tensors_of(self, name: str, kept: Any) -> Mapping[str, torch.Tensor]:
        """The saved tensors of one object, by name. Raises KeyError if there are none."""
        if self._shards is not None:
            return _SavedShards(self._shards, name, kept)
        if INDEX not in self._files:
            return states.load(self._files.pop(f"{name}.safetensors"))
        whole = states.load(assembled(self._files)[f"{_part_of(kept)}.safetensors"])
        prefix = f"{name}/"
        return {key.removeprefix(prefix): each for key, each in whole.items() if key.startswith(prefix)}

    def keep(self, name: str, kept: Any) -> None:
        """Adds an object, and puts back its state where there is a checkpoint. Raises UserError."""
        if name in self.objects:
            raise UserError(
                f"run.keep({name}=...) was called before: give each object once.", said_by=ANYONE
            )
        if name == "loader" or f"{name}.safetensors" == STATE or name.startswith("_"):
            raise UserError(f"run.keep({name}=...): this name is taken, give another one.", said_by=ANYONE)
        self.objects[name] = kept
        if isinstance(kept, nn.Module):
            self._first_buffers[name] = states.first_buffers(kept)
        if not self._path:
            return
        if name not in self._saved:
            raise UserError(
                f"{self._path} holds {some(list(self._saved)) or 'nothing'}, and no {name}: the program "
                "keeps other objects than when it was made. Take the program of that time, or another name "
                "for the run.",
                said_by=ANYONE,
            )
        # Of a model that is spread, each rank reads its slices now.
        with shards.reading(self._path), states.of_this_format(self._path):
            tensors = self._tensors_of(name, kept)
            parts = self._saved.pop(name)
            saved = {part: states.put_together(parts[part], tensors) for part in ("state", "buffers")}
        self._put_back(name, kept, saved)

    def _put_back(self, name: str, kept: Any, saved: Mapping[str, Any]) -> None:
        try:
            if isinstance(kept, torch.optim.Optimizer):
                states.restore_optimizer(kept, saved["state"])
            elif isinstance(kept, nn.Module):
                _check_keys(kept.state_dict(), saved["state"])
                kept.load_state_dict(saved["state"])
                states.restore_buffers(kept, saved["buffers"])
            else:
                kept.load_state_dict(saved["state"])
        except MISFITS as error:
            said = error.args[0] if isinstance(error, KeyError) and error.args else error
            reason = one_line(said) or type(error).__name__
            raise UserError(
                f"The {name} in {self._path} does not fit this program's {name}: {reason}. Take "
                "the program that made it, or another name for the run.",
                said_by=ANYONE,
            ) from error

    def loader_state(self) -> Any:
        """The state of the epoch's loader in the checkpoint, once; None if there is none."""
        saved = self._saved_loader
        self._saved_loader = None
        return saved

    def check_all_kept(self) -> None:
        """Raises UserError if the checkpoint has an object that the program does not keep."""
        if self._saved:
            raise UserError(
                f"{self._path} holds {some(list(self._saved))}, which this program does not keep: give it "
                "to run.keep() before the loop begins, or take another name for the run.",
                said_by=ANYONE,
            )


def _sum_of_bytes(tensor: torch.Tensor) -> int:
    """The sum of a tensor's numbers, whose bytes are taken for whole numbers; waits for a GPU."""
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    flat = tensor.detach().contiguous().reshape(-1)
    return int(flat.view(whole[flat.element_size()]).sum(dtype=torch.int64))


def _part_of(kept: Any) -> str:
    """In which of the files of a rank the tensors of an object are, where models are spread."""
    return MODEL if isinstance(kept, nn.Module) else OPTIMIZER


class _SavedShards(Mapping[str, torch.Tensor]):
    """The saved tensors of one object, by name, each read when it is asked for: of slices this rank's rows.

    A tensor of a model is spread as it is in the model `kept`, and a tensor of an optimizer's state that
    has the shape of its parameter as that parameter.
    """

    def __init__(self, source: shards.Source, name: str, kept: Any) -> None:
        self._source = source
        self._name = name
        self._part = _part_of(kept)
        self._model = dict(kept.state_dict()) if isinstance(kept, nn.Module) else {}
        self._parameters: list[torch.Tensor] = []
        if isinstance(kept, torch.optim.Optimizer):
            self._parameters = shards.parameters_of(kept)

    def _place(self, name: str) -> tuple[str, str]:
        """The part and the name of a tensor in the checkpoint, which may have been saved in one piece."""
        if self._source.is_in_one_piece:
            return self._name, name
        return self._part, f"{self._name}/{name}"

    def __getitem__(self, name: str) -> torch.Tensor:
        part, stored = self._place(name)
        spread_as = self._model.get(name)
        if self._parameters:
            spread_as = shards.parameter_of(name, self._name, self._parameters)
        return self._source.spread_as(spread_as, part, stored)

    def __iter__(self) -> Iterator[str]:
        part, prefix = self._place("")
        return (name.removeprefix(prefix) for name in self._source.names(part) if name.startswith(prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


def _shape(value: Any) -> str:
    return str(list(value.shape)) if isinstance(value, torch.Tensor) else f"a {type(value).__name__}"


def _dtype(value: Any) -> str:
    return str(value.dtype).removeprefix("torch.") if isinstance(value, torch.Tensor) else ""


def _difference(key: str, here: Mapping[str, Any], saved: Mapping[str, Any]) -> str:
    """How the tensor of this name differs from that of the checkpoint, in words; "" if it does not."""
    if key not in saved:
        return f"{key} is not in the checkpoint"
    if key not in here:
        return f"{key} is in the checkpoint only"
    saved_shape = _shape(saved[key])
    shape = _shape(here[key])
    if saved_shape != shape:
        return f"{key} is {saved_shape} in the checkpoint, {shape} here"
    saved_dtype = _dtype(saved[key])
    dtype = _dtype(here[key])
    if saved_dtype != dtype:  # load_state_dict() would cast it without a word
        return f"{key} is of {saved_dtype} in the checkpoint, of {dtype} here"
    return ""


def _check_keys(here: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises ValueError if a model's tensors differ from those of its checkpoint, key by key."""
    problems = []
    for key in sorted({*here, *saved}):
        problem = _difference(key, here, saved)
        if problem:
            problems.append(problem)
    if problems:
        more = len(problems) - _MOST_KEYS_SHOWN
        shown = "; ".join(problems[:_MOST_KEYS_SHOWN])
        raise ValueError(shown + (f"; and {more} more" if more > 0 else ""))
