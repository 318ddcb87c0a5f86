"""Work without steps, dealt out to the ranks: run.share() of a user's own program.

    results = run.share(files, simulate)

Each item is worked on by one rank. Its result goes to a file of the run directory at once. So a run that is
stopped, or that crashes, goes on with the items that are left.

The files: share/NAME/about.json says how many items there are, and share/NAME/rank-N.jsonl has the results
of one rank, a line for each. Tensors and arrays in a result are in its line as the bytes of a safetensors
file, in base64.
"""

from __future__ import annotations

import base64
import json
import os
import time
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Set
from contextlib import AbstractContextManager, contextmanager
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import torch

from allranks.base import files
from allranks.base.errors import ANYONE, UserError
from allranks.base.text import some
from allranks.data.nests import as_tensor, described, mapped
from allranks.data.randomness import mixed, reseed
from allranks.job import pulse
from allranks.runtime.runtime import Runtime
from allranks.training import state as states
from allranks.training.control import Control

# Without watchdog.step_s an item may take any time, because allranks does not know what the work is.
_ANY_TIME_S = 1e9
LATE_S = 60.0  # so long NFS may hide from rank 0 what other hosts have written
LOOK_S = 0.5  # from one look at these files to the next


class Sharing:
    """Work on items that are dealt out to the ranks, with its files in the run directory.

    Every rank has such an object.
    """

    def __init__(self, runtime: Runtime, control: Control, directory: Path, step_s: float | None) -> None:
        """`directory` keeps the results. An item may take `step_s` seconds; None: any time."""
        self._runtime = runtime
        self._control = control
        self._directory = directory
        self._limit_s = _ANY_TIME_S if step_s is None else step_s

    def results(self, given: Iterable[Any], work: Callable[[Any], Any], seed: int) -> list[Any]:
        """work(item) for each item given, in their order, on every rank; all ranks call.

        Before each item the generators of random numbers are seeded from `seed`, the work's name and the
        item's number, and after the last one from `seed` and the name.
        Raises UserError for items without an order, for a result that cannot be kept, and RunStopped where
        the ranks have agreed to stop.
        """
        items = _in_order(given)
        of_name = zlib.crc32(self._directory.name.encode())
        done = set(self._runtime.meeting.from_rank_0(lambda: self._begin(len(items))))
        left = [number for number in range(len(items)) if number not in done]
        runtime = self._runtime
        mine = left[runtime.rank :: runtime.world_size]
        rounds = len(left[:: runtime.world_size])  # the number of items of the rank that has the most
        self._control.begin_evaluation()
        with self._opened() as file:
            for turn in range(rounds):
                if turn < len(mine):
                    number = mine[turn]
                    reseed(mixed(seed, of_name, number), runtime.device)
                    with runtime.progress.phase("an item of run.share() (watchdog.step_s)", self._limit_s):
                        result = work(items[number])
                    # As Python's json writes it, with NaN and Infinity, which a result may hold.
                    line = json.dumps({"item": number, **_to_json(result, number)}) + "\n"
                    with self._writing():
                        files.write_all(file, line.encode())
                runtime.progress.worked()
                pulse.count_step()
                self._control.check_evaluation(turn + 1, gains=True)
        reseed(mixed(seed, of_name), runtime.device)
        return self._everyones(len(items))

    def _begin(self, count: int) -> list[int]:
        """On rank 0: makes the directory; returns the numbers of the items that are done already."""
        about = self._directory / "about.json"
        with self._writing():
            self._directory.mkdir(parents=True, exist_ok=True)
            if not about.exists():
                files.write_json(about, {"items": count})
        try:
            with self._reading():
                there = int(json.loads(about.read_text())["items"])
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{about} is damaged: how many items the results beside it are of is not known. Remove "
                "that directory, or give the work another name: run.share(items, work, name=...)."
            ) from error
        if there != count:
            raise UserError(
                f"{self._directory} has results of {there:,} items, not {count:,}: share the same items, "
                "or give the work another name: run.share(items, work, name=...)."
            )
        return sorted(self._lines(count))

    def _opened(self) -> FileIO:
        """The file for this rank's results, to append to."""
        with self._writing():
            # Rank 0 has made it, but a shared file system may not show it to other hosts yet.
            self._directory.mkdir(parents=True, exist_ok=True)
            file = (self._directory / f"rank-{self._runtime.rank}.jsonl").open("ab+", buffering=0)
            if file.tell():
                file.seek(-1, os.SEEK_END)
                if file.read(1) != b"\n":  # half a line, of a rank that died: the next line begins below it
                    files.write_all(file, b"\n")
            return file

    def _lines(self, count: int) -> dict[int, str]:
        """By item the line with its result. Half a line, of a rank that died, is left out."""
        found: dict[int, str] = {}
        with self._reading():
            for path in sorted(self._directory.glob("rank-*.jsonl")):
                for line in path.read_text(errors="replace").splitlines():
                    number = _item_of(line)
                    if number is not None and 0 <= number < count:
                        found[number] = line
        return found

    def _everyones(self, count: int) -> list[Any]:
        """The results of all items: rank 0 reads them, and sends them to every rank."""
        runtime = self._runtime
        with runtime.all_or_none():  # every rank has come here, so its results are on disk
            pass
        results: dict[str, bytes] = {}  # on rank 0
        with runtime.all_or_none():
            if runtime.is_main:
                lines = self._lines_of_all(count)
                results["results"] = "\n".join(lines[number] for number in range(count)).encode()
        shared = runtime.share_files(results)
        return [_from_json(json.loads(line)) for line in shared["results"].decode().splitlines()]

    def _lines_of_all(self, count: int) -> dict[int, str]:
        """The lines of all items, once a shared file system shows them here; raises UserError."""
        give_up_at = time.monotonic() + LATE_S
        while True:
            lines = self._lines(count)
            if len(lines) == count:
                return lines
            if time.monotonic() > give_up_at:
                missing = [number for number in range(count) if number not in lines]
                raise UserError(
                    f"{self._directory} lacks the results of items {some(missing)}, although each was "
                    "worked on: start the program again, which works on them once more."
                )
            self._runtime.progress.worked()
            time.sleep(LOOK_S)

    def _writing(self) -> AbstractContextManager[None]:
        """Turns an OSError of the block, which writes to the directory, into a UserError."""
        return self._told(
            "written",
            "free some space or quota there, and start the program again. It goes on with the items that "
            "are left.",
        )

    def _reading(self) -> AbstractContextManager[None]:
        """Turns an OSError of the block, which reads from the directory, into a UserError."""
        return self._told("read", "start the program again once it can be. The results in it are kept.")

    @contextmanager
    def _told(self, done: str, remedy: str) -> Iterator[None]:
        try:
            with self._runtime.progress.writing():  # a file system that stands still holds up reading, too
                yield
        except OSError as error:
            raise UserError(f"{self._directory} cannot be {done} ({error.strerror}): {remedy}") from error


def _in_order(items: Iterable[Any]) -> Sequence[Any]:
    """The items as a sequence. Raises UserError if the ranks could not number them alike."""
    has_no_order = isinstance(items, Mapping | Set)
    if not has_no_order and hasattr(items, "__len__") and hasattr(items, "__getitem__"):
        return items  # type: ignore[return-value]  # such as a Dataset
    if has_no_order or not isinstance(items, Iterable):
        raise UserError(
            f"run.share() got {described(items)} for its items: give a list, in the same order on all "
            "ranks, such as sorted(items).",
            said_by=ANYONE,
        )
    return list(items)


def _item_of(line: str) -> int | None:
    """The number of the item whose result this line is; None for what is not a whole line."""
    try:
        values = json.loads(line)
    except ValueError:
        return None
    is_whole = isinstance(values, dict) and values.keys() >= {"item", "result", "tensors", "arrays"}
    return values["item"] if is_whole and type(values["item"]) is int else None


def _to_json(result: Any, number: int) -> dict[str, Any]:
    """A result as JSON, with its tensors and arrays as text; raises UserError for what cannot be kept."""
    from safetensors.torch import save

    whose = f"run.share(): the result of item {number}"

    of_arrays: list[torch.Tensor] = []

    def plain(value: Any) -> Any:
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, np.ndarray):
            of_arrays.append(as_tensor(whose, value))
            return of_arrays[-1]
        return value

    tensors: dict[str, torch.Tensor] = {}
    try:
        tree = states.taken_apart(mapped(result, plain), "result", tensors, copied=lambda tensor: tensor)
    except UserError as error:
        raise UserError(
            f"run.share(): the work on item {number} gave what cannot be kept: {error}"
        ) from error
    arrays = [name for name, tensor in tensors.items() if any(tensor is each for each in of_arrays)]
    copies = {name: states.copy_on_cpu(tensor) for name, tensor in tensors.items()}
    content = base64.b64encode(save(copies)).decode() if copies else ""
    return {"result": tree, "tensors": content, "arrays": arrays}


def _from_json(line: dict[str, Any]) -> Any:
    tensors: dict[str, Any] = states.load(base64.b64decode(line["tensors"])) if line["tensors"] else {}
    for name in line["arrays"]:
        tensors[name] = tensors[name].numpy()
    return states.put_together(line["result"], tensors)
