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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from allranks.base import files
from allranks.base.errors import UserError
from allranks.data.nests import as_tensor, mapped
from allranks.data.randomness import mixed, reseed
from allranks.job import pulse
from allranks.run import directory as rundir
from allranks.runtime.runtime import Runtime
from allranks.training import state as states
from allranks.training.control import Control

# Without watchdog.step_s an item may take any time: what it does is not known.
_ANY_TIME_S = 1e9


class Sharing:
    """Some work on items that is dealt out to the ranks, below the run directory; all ranks have one."""

    def __init__(self, runtime: Runtime, control: Control, directory: Path, step_s: float | None) -> None:
        """`directory` keeps the results. An item may take `step_s` seconds; None: any time."""
        self._runtime = runtime
        self._control = control
        self._directory = directory
        self._limit_s = _ANY_TIME_S if step_s is None else step_s

    def results(self, items: Sequence[Any], work: Callable[[Any], Any], seed: int) -> list[Any]:
        """work(item) for each item, in the order of the items, on every rank; all ranks call.

        Before each item the generators of random numbers are seeded from `seed` and the item's number.
        Raises UserError for a result that cannot be kept, and RunStopped where the ranks have agreed to
        stop.
        """
        done = set(self._runtime.meeting.from_rank_0(lambda: self._begin(len(items))))
        left = [number for number in range(len(items)) if number not in done]
        runtime = self._runtime
        mine = left[runtime.rank :: runtime.world_size]
        rounds = len(left[:: runtime.world_size])  # of the rank that has the most items
        self._control.begin_evaluation()
        with (self._directory / f"rank-{runtime.rank}.jsonl").open("a") as file:
            for turn in range(rounds):
                if turn < len(mine):
                    number = mine[turn]
                    reseed(mixed(seed, number), runtime.device)
                    with runtime.progress.phase("an item of run.share() (watchdog.step_s)", self._limit_s):
                        result = work(items[number])
                    files.append_line(file, {"item": number, **_to_json(result, number)})
                runtime.progress.worked()
                pulse.count_step()
                self._control.check_evaluation(turn + 1, gains=True)
        return self._everyones(len(items))

    def _begin(self, count: int) -> list[int]:
        """On rank 0: makes the directory; returns the numbers of the items that are done already."""
        about = self._directory / "about.json"
        with rundir.writing(str(self._directory)):
            self._directory.mkdir(parents=True, exist_ok=True)
            if not about.exists():
                files.write_json(about, {"items": count})
        there = json.loads(about.read_text())["items"]
        if there != count:
            raise UserError(
                f"{self._directory} has results of {there:,} items, not {count:,}: share the same items, "
                "or give the work another name: run.share(items, work, name=...)."
            )
        return sorted(number for number, _ in self._lines())

    def _lines(self) -> Iterator[tuple[int, str]]:
        """(number of the item, its line) of all results; half a line, of a rank that died, is left out."""
        for path in sorted(self._directory.glob("rank-*.jsonl")):
            for line in path.read_text().splitlines():
                try:
                    yield int(json.loads(line)["item"]), line
                except (ValueError, KeyError, TypeError):
                    continue

    def _everyones(self, count: int) -> list[Any]:
        """The results of all items, on every rank. Rank 0 reads them once all ranks have written."""
        with self._runtime.all_or_none():  # every rank has come here, so its results are on disk
            pass
        lines = dict(self._lines()) if self._runtime.is_main else {}
        text = "\n".join(lines[number] for number in sorted(lines))
        shared = self._runtime.share_files({"results": text.encode()} if self._runtime.is_main else {})
        results = [_from_json(json.loads(line)) for line in shared["results"].decode().splitlines()]
        assert len(results) == count, f"{len(results)} results of {count} items"
        return results


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
