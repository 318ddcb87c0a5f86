"""A training's state to bytes and back, and its saves in the background. The folders: checkpoints.py.

Tensors go to safetensors files, all else to state.json: loading runs no code from a file.
"""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch

import allranks
from allranks import config as configs
from allranks.base.errors import UserError
from allranks.base.text import one_line
from allranks.config import Config
from allranks.run import checkpoint
from allranks.run.claim import Claim
from allranks.runtime.runtime import Runtime
from allranks.training.training import Training

log = logging.getLogger(__name__)

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


class Saver:
    """Saves a training: all ranks call, rank 0 writes, on a thread, from a copy."""

    def __init__(self, runtime: Runtime, run_dir: str, config: Config) -> None:
        self.runtime, self.run_dir, self.config = runtime, run_dir, config
        self.claim: Claim | None = None  # on the run directory; rank 0's, once resume() has taken it
        self.identity = configs.identity(config)  # once: it takes milliseconds
        self.longest_s = 0.0  # that a save has taken
        self.saved_step: int | None = None  # the newest
        self.failure: OSError | None = None  # of the newest save
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or issubclass(kind, UserError):
            self._writer.shutdown()
            if self.claim is not None:
                self.claim.release()

    def resume(self, training: Training) -> str | None:
        """Takes the run directory for this run, and brings `training` to its newest valid checkpoint.

        Returns that checkpoint's path. Rank 0 chooses and reads; the others get what it read.
        """
        files: dict[str, bytes] = {}

        def look() -> str | None:
            self.claim = Claim.take(self.run_dir)
            checkpoint.sweep_up(self.run_dir)
            path, found = self._newest(self.run_dir)
            if path is None and self.config.resume not in ("auto", "never"):
                path, found = self._given(self.config.resume)
            files.update(found)
            self.claim.check()  # reading takes time, in which another may have taken over
            return path

        path = self.runtime.meeting.from_rank_0(look)
        if path is not None:
            shared = self.runtime.share_files(files)
            with self.runtime.all_or_none():
                restore(training, shared, path, self.config, self.runtime)
            self.saved_step = training.step
        return path

    def check(self) -> None:
        """Raises UserError, on rank 0, where another run has taken the directory."""
        if self.claim is not None:
            self.claim.check()

    def _newest(self, run_dir: str) -> tuple[str | None, dict[str, bytes]]:
        path, files, passed_over = checkpoint.newest_valid(run_dir)
        for damaged in passed_over:
            log.warning("passing over the checkpoint %s", damaged)
        return str(path) if path else None, files

    def _given(self, given: str) -> tuple[str, dict[str, bytes]]:
        try:
            if (Path(given) / checkpoint.MANIFEST).exists():
                return given, checkpoint.read(given)
            path, files = self._newest(given)
        except checkpoint.Damaged as damaged:
            raise UserError(
                f"resume={given} is damaged: {damaged}. Give an earlier checkpoint."
            ) from damaged
        except OSError as error:
            raise UserError(
                f"resume={given} cannot be read ({error.strerror}): give another one."
            ) from error
        if path is None:
            raise UserError(
                f"resume={given} has no valid checkpoint: give the path of one, or of a run directory that "
                "has one."
            )
        return path, files

    def save(self, training: Training) -> None:
        """Copies the state and goes on; waits for the save before it, if that is still being written."""
        sums = self.runtime.gather(training.sums.rows)
        if self.claim is None or (self.saved_step == training.step and self.failure is None):
            return
        self.wait()
        self.saved_step = training.step
        tensors, state = capture(training, sums, self.identity, self.runtime)
        self._pending = self._writer.submit(self._write, training.step, tensors, state)

    def wait(self) -> None:
        """Until the save under way is done. Raises UserError where another run has taken the directory."""
        if self._pending is None:
            return
        pending, self._pending = self._pending, None
        try:
            with self._saving():
                pending.result()
            self.failure = None
        except OSError as error:
            self.failure = error
            log.warning(
                "the checkpoint of step %s could not be written (%s); the training goes on",
                self.saved_step, error.strerror,
            )  # fmt: skip

    def finish(self) -> None:
        """On every rank: waits for rank 0's last save. Raises UserError on all if it failed."""

        def last() -> None:
            self.wait()
            try:
                self.check()
            except OSError as error:
                self.failure = error
            if self.failure is not None:
                raise UserError(
                    f"The last checkpoint, of step {self.saved_step}, could not be written to "
                    f"{self.run_dir} ({self.failure.strerror}). Free some space or quota there, and start "
                    "the run again: it goes on from the newest checkpoint."
                )

        with self._saving():
            self.runtime.meeting.from_rank_0(last, timeout_s=self.config.watchdog.save_s)

    def _saving(self) -> AbstractContextManager[None]:
        return self.runtime.watchdog.phase("saving (watchdog.save_s)", self.config.watchdog.save_s)

    def _write(self, step: int, tensors: dict[str, dict[str, torch.Tensor]], state: dict[str, Any]) -> None:
        from safetensors.torch import save

        assert self.claim is not None
        started = time.perf_counter()
        self.claim.check()
        files = {name: save(content) for name, content in tensors.items()}
        files[STATE] = json.dumps(state, separators=(",", ":")).encode()
        checkpoint.write(self.run_dir, step, files, self.claim.token, self.claim.check)
        present = checkpoint.steps(self.run_dir)
        losses = {h["step"]: h["val/loss"] for h in state["history"] if math.isfinite(h["val/loss"])}
        best = min((s for s in present if s in losses), key=lambda s: losses[s], default=step)
        # one that is newer is damaged, or this run would have gone on from it: it does not count
        count = present.index(step) + self.config.checkpoint.keep
        try:
            checkpoint.remove(self.run_dir, {*present[:count], best}, self.claim.check)
        except OSError as error:
            log.warning("earlier checkpoints could not be removed (%s)", error.strerror)
        self.longest_s = max(self.longest_s, time.perf_counter() - started)


def capture(
    training: Training, sums: torch.Tensor, identity: Mapping[str, Any], runtime: Runtime
) -> tuple[dict[str, dict[str, torch.Tensor]], dict[str, Any]]:
    """(tensors by file, state.json), copied to the CPU. `sums` [share_count, 3]."""
    optimizer: dict[str, torch.Tensor] = {}
    schedule = training.schedule.scheduler
    state = {
        "epoch": training.epoch,
        "step": training.step,
        "steps_in_epoch_done": training.epoch_steps,
        "epoch_s": training.epoch_s,
        "epoch_lr": training.epoch_lr,
        "history": list(training.history),
        "sums": sums.tolist(),
        "world_size": runtime.world_size,
        "identity": identity,
        "versions": {"allranks": allranks.__version__, "torch": torch.__version__},
        "optimizer": _taken_apart(training.optimizer.state_dict(), "optimizer", optimizer),
        "scheduler": _taken_apart(schedule.state_dict() if schedule else {}, "scheduler", optimizer),
        "scaler": _taken_apart(training.scaler.state_dict(), "scaler", optimizer),
    }
    model = {name: _copied(tensor) for name, tensor in training.model.state_dict().items()}
    return {MODEL: model, OPTIMIZER: optimizer}, state


def restore(
    training: Training, files: Mapping[str, bytes], path: str, config: Config, runtime: Runtime
) -> None:
    """Puts the training where the checkpoint's was. Raises UserError where it is another training's."""
    try:
        _restore(training, files, path, config, runtime)
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise UserError(
            f"{path} does not hold what this version saves ({type(error).__name__}: {error}): give a "
            "checkpoint that allranks has made."
        ) from error


def _restore(
    training: Training, files: Mapping[str, bytes], path: str, config: Config, runtime: Runtime
) -> None:
    state = json.loads(files[STATE])
    there, epochs = state["identity"], config.trainer.epochs
    if "length" not in config.scheduler.values():  # else the run's length decides every learning rate
        there = {**there, "trainer.epochs": epochs}
    if differing := configs.differing(there, configs.identity(config)):
        raise UserError(f"{path} is a checkpoint of another training: {differing}.")
    if epochs < state["epoch"]:
        raise UserError(
            f"{path} has {state['epoch']} epochs behind it already: give more than trainer.epochs={epochs}."
        )
    per_rank = config.trainer.per_rank_batch_size
    if per_rank and state["world_size"] != runtime.world_size:
        raise UserError(
            f"{path} was made by {state['world_size']} ranks with trainer.per_rank_batch_size={per_rank}: "
            f"start as many ranks, not {runtime.world_size}, or the batches would be others."
        )
    tensors = _load(files[OPTIMIZER])
    try:
        training.model.load_state_dict(_load(files[MODEL]))
        training.optimizer.load_state_dict(_put_together(state["optimizer"], tensors))
    except (RuntimeError, ValueError, KeyError) as error:
        what = f"{path} does not fit the model and optimizer of this run"
        raise UserError(f"{what}: {one_line(error)}") from error
    if training.schedule.scheduler is not None:
        training.schedule.scheduler.load_state_dict(_put_together(state["scheduler"], tensors))
    training.scaler.load_state_dict(_put_together(state["scaler"], tensors))
    training.epoch, training.step = state["epoch"], state["step"]
    training.epoch_steps, training.epoch_s = state["steps_in_epoch_done"], state["epoch_s"]
    training.epoch_lr, training.history = state["epoch_lr"], state["history"]
    sums = torch.tensor(state["sums"], dtype=training.sums.rows.dtype)
    if len(sums) == runtime.share_count:
        mine = sums[runtime.shares.start : runtime.shares.stop]
    else:  # of another number of ranks: rank 0 goes on from the total
        mine = torch.zeros_like(training.sums.rows, device="cpu")
        mine[0] = sums.sum(dim=0) * (runtime.rank == 0)
    training.sums.rows.copy_(mine)


def _load(content: bytes) -> dict[str, torch.Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load

    try:
        return load(content)
    except SafetensorError as error:
        raise KeyError(error) from error


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", copy=True).contiguous()


def _taken_apart(node: Any, name: str, tensors: dict[str, torch.Tensor]) -> Any:
    """JSON for what a state_dict holds; tensors go to `tensors`, under names to which the JSON refers."""
    if node is None or isinstance(node, bool | int | float | str):
        return node
    if isinstance(node, torch.Tensor):
        tensors[name] = _copied(node)
        return {"tensor": name}
    if isinstance(node, list | tuple):
        items = [_taken_apart(item, f"{name}.{i}", tensors) for i, item in enumerate(node)]
        return {"tuple": items} if isinstance(node, tuple) else items
    if isinstance(node, Mapping):
        return {"items": [[k, _taken_apart(v, f"{name}.{k}", tensors)] for k, v in node.items()]}
    raise UserError(
        f"{name} is a {type(node).__name__}, but a checkpoint holds only numbers, texts and tensors."
    )


def _put_together(node: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(node, list):
        return [_put_together(item, tensors) for item in node]
    if not isinstance(node, dict):
        return node
    if "tensor" in node:
        return tensors[node["tensor"]]
    if "tuple" in node:
        return tuple(_put_together(item, tensors) for item in node["tuple"])
    return {key: _put_together(value, tensors) for key, value in node["items"]}
