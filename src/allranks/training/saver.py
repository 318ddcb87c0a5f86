"""Saves a training in the background, and brings a run back to its newest checkpoint.

All ranks call, and rank 0 reads and writes. It writes on a thread, from a copy of the state, while the
training goes on.
"""

from __future__ import annotations

import json
import logging
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent import futures
from concurrent.futures import Future
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol, cast

from allranks.base.errors import UserError
from allranks.base.threads import in_thread
from allranks.run import checkpoint
from allranks.run.best import BY_DEFAULT, Rule, best_of
from allranks.run.claim import Claim
from allranks.run.shards import INDEX
from allranks.runtime.runtime import Runtime
from allranks.training import shards
from allranks.training.position import TrainingPosition
from allranks.training.shards import CapturedShards, Memory, ToShards, reading
from allranks.training.state import STATE, Captured

log = logging.getLogger(__name__)

_TOLD_S = 0.02  # how often rank 0's thread looks whether another rank's files are on the disk


class Kept(Protocol):
    """What the checkpoints of a run hold. It says how to copy a state, and how to put it back."""

    @property
    def position(self) -> TrainingPosition:
        """Where the training stands."""

    @property
    def is_sharded(self) -> bool:
        """Whether each rank saves its own slices of a model, by capture_shards()."""

    def gather(self) -> Any:
        """Brings to rank 0 what the other ranks have to add to a checkpoint; all ranks call."""

    def capture(self, gathered: Any) -> Captured:
        """A copy of the state, on rank 0. `gathered` is what gather() returned there. Raises UserError."""

    def restore(self, files: Mapping[str, bytes], path: str) -> None:
        """Puts back the state of the checkpoint at `path`, on every rank.

        `files` are its files. If a model is spread over the ranks, these are only the small ones, and
        each rank reads what it needs of the others; that raises OSError where they cannot be read. Raises
        UserError if the checkpoint is of another training, or not one that allranks has made.
        """


class KeptShards(Kept, Protocol):
    """What the checkpoints of a run hold whose model is spread over the ranks."""

    def to_shards(self, gathered: Any) -> ToShards:
        """What this rank holds, not copied; `gathered` is what gather() returned here. Raises UserError."""


class Place(NamedTuple):
    """Where a training stands.

    The step alone is not enough. After the last step of an epoch a run may be saved twice at the same step:
    during the evaluation, when the epoch still counts as open, and again when the epoch is closed, with its
    figures.
    """

    step: int
    epoch: int
    epoch_steps: int


class _Checkpoint(NamedTuple):
    path: str
    files: Mapping[str, bytes]


class Saver:
    """The checkpoints of one run. Every rank has a Saver; only rank 0's touches the run directory.

    `kept` is what a checkpoint holds. `keep` is how many of the newest checkpoints stay, and `best` says
    which one stays besides. If a save takes longer than `save_s` seconds, the watchdog ends the run.
    """

    def __init__(
        self,
        runtime: Runtime,
        run_dir: str,
        kept: Kept,
        *,
        keep: int,
        save_s: float,
        best: Rule = BY_DEFAULT,
    ) -> None:
        self.runtime = runtime
        self.run_dir = run_dir
        self.kept = kept
        self.keep = keep
        self.best = best
        self.save_s = save_s
        # The claim on the run directory: on rank 0, once resume() has taken it; None on other ranks.
        self.claim: Claim | None = None
        self._longest_s = 0.0  # the longest time that a save has taken
        self._begun_at: float | None = None  # by time.perf_counter(), of a save that is being written
        # Where the training stood at the newest save, which may be under way.
        self._saved: Place | None = None
        self.failure: OSError | None = None  # the error of the newest save, if it failed
        self._pending: Future[None] | None = None  # the save under way, on a thread of its own
        self._saves = 0  # of a model that is spread over the ranks
        # Only for a model that is spread over the ranks: the memory to which a save copies this rank's
        # rows. Each save uses the memory of the save before it again.
        self._memory: Memory | None = None
        # The thread that makes this memory ready before the first save; None once its result has been
        # taken.
        self._preparing: Future[Memory] | None = None

    def __enter__(self) -> Saver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After an error that is not a UserError the process ends at once. It does not wait for a save that
        # is being written, which may hang.
        if kind is None or issubclass(kind, UserError):
            # The limit of a save holds here. That of a step is shorter: the watchdog would end this process
            # before the save is done, and before the error is said.
            with self._saving():
                if self._pending is not None:
                    futures.wait([self._pending])
                if self.claim is not None:
                    self.claim.release()

    def check(self) -> None:
        """Raises UserError, on rank 0, where another run has taken the directory."""
        if self.claim is not None:
            self.claim.check()

    # --- going on ---

    def resume(self, given: str = "auto") -> str | None:
        """Takes the run directory for this run, and brings the training to its newest valid checkpoint.

        If the directory has none, a run begins from the checkpoint that is `given`, the value of the
        key `resume`, unless that is auto or never. Returns the checkpoint's path; None if the run begins
        at step 0. All ranks call: rank 0 chooses and reads, and sends the others what it read.
        """
        if self.kept.is_sharded:
            return self._resume_shards(given)
        files: dict[str, bytes] = {}  # on rank 0

        def choose() -> str | None:
            self.claim = Claim.take(self.run_dir, looking=self.runtime.progress.worked)
            chosen = self._own_newest()
            if chosen is None and given not in ("auto", "never"):
                chosen = self._given(given)
            self.claim.check()  # reading takes time, and meanwhile another run may have taken the directory
            if chosen is None:
                return None
            files.update(chosen.files)
            return chosen.path

        path = self.runtime.meeting.from_rank_0(choose)
        if path is not None:
            shared = self.runtime.share_files(files)
            with self.runtime.all_or_none():
                self.kept.restore(shared, path)
            self._note_resumed(path)
        return path

    def _chosen(self, found: checkpoint.Found) -> _Checkpoint | None:
        """The checkpoint that was found, or None; warns of each checkpoint that was passed over."""
        for passed_over in found.passed_over:
            log.warning("passing over the checkpoint %s", passed_over)
        return None if found.path is None else _Checkpoint(str(found.path), found.files)

    def _own_newest(self) -> _Checkpoint | None:
        """The newest checkpoint of the run directory itself; None if it has none at all.

        Raises UserError if it has checkpoints, but none can be used. They may only be out of reach for
        the moment, and to begin at step 0 would train all epochs again and overwrite metrics.jsonl.
        """
        there = checkpoint.folder(self.run_dir)
        try:
            checkpoint.sweep_up(self.run_dir)  # unfinished folders that earlier writers have left
            found = checkpoint.newest_valid(self.run_dir, self.runtime.progress.worked)
        except OSError as error:
            raise UserError(
                f"{there} cannot be read ({error.strerror}): start the run again once it can be."
            ) from error
        if found.path is None and found.passed_over:
            raise UserError(self._none_usable(found.passed_over, None))
        return self._chosen(found)

    def _given(self, given: str) -> _Checkpoint:
        """The checkpoint that `resume` names: by its own path, or by that of a run directory."""
        try:
            found = self._chosen(checkpoint.find_at(given, self.runtime.progress.worked))
        except checkpoint.Damaged as damaged:
            raise UserError(
                f"resume={given} is damaged: {damaged}. Give an earlier checkpoint."
            ) from damaged
        except OSError as error:
            raise UserError(
                f"resume={given} cannot be read ({error.strerror}): give another one."
            ) from error
        if found is None:
            raise UserError(
                f"resume={given} has no valid checkpoint: give the path of one, or of a run directory that "
                "has one."
            )
        return found

    def _resume_shards(self, given: str) -> str | None:
        """resume() for a model that is spread over the ranks, each of which reads what it needs.

        Rank 0 proposes a checkpoint. The ranks verify its files, each some of them, and where one is
        damaged, rank 0 proposes the next one.
        """
        runtime = self.runtime
        candidates: list[Path] = []  # on rank 0: those that have not been proposed yet
        passed_over: list[str] = []  # on rank 0
        is_own = True

        def take() -> None:
            nonlocal is_own
            self.claim = Claim.take(self.run_dir, looking=runtime.progress.worked)
            candidates.extend(self._own_newest_first())
            if not candidates and given not in ("auto", "never"):
                is_own = False
                candidates.extend(_given_newest_first(given))

        def propose() -> dict[str, Any] | None:
            while candidates:
                path = candidates.pop(0)
                try:
                    names = sorted(checkpoint.listed(path))
                    return {"path": str(path), "names": names}
                except checkpoint.Damaged as damaged:
                    passed_over.append(f"{path.name}: {damaged}")
                except OSError as error:
                    passed_over.append(f"{path.name}: {checkpoint.unreadable(error)}")
            if passed_over:
                raise UserError(self._none_usable(passed_over, None if is_own else given))
            return None

        def judge(problems: list[str | None]) -> list[str | None]:
            found = [problem for problem in problems if problem]
            if found:
                passed_over.append(f"{Path(path).name}: {found[0]}")
            return [found[0] if found else None] * len(problems)

        runtime.meeting.from_rank_0(take)
        while True:
            proposed = runtime.meeting.from_rank_0(propose)
            if proposed is None:
                return None
            path = proposed["path"]
            mine = proposed["names"][runtime.rank :: runtime.world_size]
            if runtime.meeting.settle(self._problem(path, mine), judge) is None:
                break
        for line in passed_over:
            log.warning("passing over the checkpoint %s", line)

        self._restore_shards(path)
        assert isinstance(path, str)
        self._note_resumed(path)
        return path

    def _restore_shards(self, path: str) -> None:
        """Puts back the state of the checkpoint at `path`; all ranks call. Raises UserError."""
        runtime = self.runtime
        small: dict[str, bytes] = {}  # on rank 0

        def read_small() -> None:
            assert self.claim is not None
            with reading(path):  # it could be read a moment ago
                small.update(checkpoint.read_some(path, [STATE, INDEX]))
            self.claim.check()  # reading takes time, and meanwhile another run may have taken the directory

        runtime.meeting.from_rank_0(read_small)
        shared = runtime.share_files(small)
        with runtime.all_or_none(), reading(path):
            self.kept.restore(shared, path)

    def _problem(self, path: str, names: Sequence[str]) -> str | None:
        """What is wrong with these files of the checkpoint; None for nothing."""
        try:
            checkpoint.check(path, names, self.runtime.progress.worked)
        except checkpoint.Damaged as damaged:
            return str(damaged)
        except OSError as error:
            return checkpoint.unreadable(error)
        return None

    def _own_newest_first(self) -> list[Path]:
        """The checkpoints of the run directory, whether valid or not; raises UserError."""
        there = checkpoint.folder(self.run_dir)
        try:
            checkpoint.sweep_up(self.run_dir)  # unfinished folders that earlier writers have left
            return [checkpoint.path_of(self.run_dir, step) for step in checkpoint.steps(self.run_dir)]
        except OSError as error:
            raise UserError(
                f"{there} cannot be read ({error.strerror}): start the run again once it can be."
            ) from error

    def _none_usable(self, passed_over: Sequence[str], given: str | None) -> str:
        """What is said where there are checkpoints, but none that can be used.

        `given` is the value of the key `resume` if the checkpoints are those that it names.
        """
        if given is not None:
            return f"resume={given} has no valid checkpoint ({'; '.join(passed_over)}): give another one."
        there = checkpoint.folder(self.run_dir)
        return (
            f"{there} has checkpoints, but none that can be used: {'; '.join(passed_over)}. "
            "Where a file system or a server was away, start the run again; to begin at step 0, move "
            f"{there} away."
        )

    # --- saving ---

    def save(self) -> None:
        """Copies the state and lets a thread write the copy; all ranks call.

        Waits only for the save before this one, if it is still being written.
        """
        if self.kept.is_sharded:
            self._save_shards()
            return
        gathered = self.kept.gather()
        step = self.kept.position.step
        if self.claim is None or self.is_saved():
            return
        self.wait()
        self._note_saved()
        captured = self.kept.capture(gathered)
        self._begin_writing(step, partial(self._write, step, captured))

    def prepare(self) -> None:
        """Makes memory ready for the first save of a model that is spread over the ranks; all ranks call.

        A thread does so while the training takes its first steps, so that the save need not wait for it.
        """
        if not self.kept.is_sharded:
            return
        kept = cast(KeptShards, self.kept)
        gathered = kept.gather()
        with self.runtime.all_or_none():
            tensors = kept.to_shards(gathered).tensors
        self._preparing = in_thread(lambda: shards.memory_for(tensors), "memory")

    def _place(self) -> Place:
        position = self.kept.position
        return Place(position.step, position.epoch, position.epoch_steps)

    def is_saved(self) -> bool:
        """Whether the newest save was of the training as it stands now, and has not failed."""
        return self._saved == self._place() and self.failure is None

    def _note_saved(self) -> None:
        """The training as it stands now is saved, or is about to be."""
        self._saved = self._place()

    def _note_resumed(self, path: str) -> None:
        """The training as it stands now is that of the checkpoint at `path`.

        A checkpoint of another directory is not a save of this run: its own directory has none yet.
        """
        if Path(path).parent == checkpoint.folder(self.run_dir):
            self._note_saved()

    @property
    def longest_s(self) -> float:
        """The most seconds that a save of this process has taken, one under way included; 0 before any."""
        begun_at = self._begun_at
        so_far_s = 0.0 if begun_at is None else time.perf_counter() - begun_at
        return max(self._longest_s, so_far_s)

    @property
    def saved_step(self) -> int | None:
        """The newest step that was saved, or is being saved; None if none was."""
        return None if self._saved is None else self._saved.step

    def _save_shards(self) -> None:
        """save() for a model that is spread over the ranks: each rank copies and writes what it holds.

        Rank 0 makes a hidden folder for the checkpoint. Each rank's thread writes its files into it, and
        tells rank 0's thread when they are on the disk. Then rank 0's thread writes the manifest, and gives
        the folder its name. The threads send their messages through the store of the ranks' meeting.
        """
        kept = cast(KeptShards, self.kept)
        gathered = kept.gather()
        step = self.kept.position.step
        if not self.runtime.is_main:
            # Each rank waits until its own part of the previous save is written. Rank 0 waits for that in
            # begin(). Its previous save ends only when every rank's thread has reported.
            self.wait()

        def begin() -> str | None:
            assert self.claim is not None
            if self.is_saved():
                return None
            self.wait()
            self._note_saved()
            try:
                self.claim.check()
                return str(checkpoint.begin(self.run_dir, step, self.claim.token))
            except OSError as error:
                self._note_failure(error)
                return None

        with self._saving():  # rank 0 makes a folder
            hidden = self.runtime.meeting.from_rank_0(begin)
        if hidden is None:
            return
        self._note_saved()
        self._saves += 1
        # The previous copy is written: rank 0 and the other ranks have waited for that above.
        if self._preparing is not None:
            self._memory = self._preparing.result()
            self._preparing = None
        rank, ranks = self.runtime.rank, self.runtime.world_size
        captured = shards.captured(kept.to_shards(gathered), rank, ranks, self._memory)
        self._memory = captured.rows
        write = partial(self._write_shards, step, Path(hidden), self._saves, captured)
        self._begin_writing(step, write)

    def _begin_writing(self, step: int, write: Callable[[], None]) -> None:
        """Calls `write`, which writes the checkpoint of this step, on a thread, and measures its time."""
        begun_at = time.perf_counter()
        self._begun_at = begun_at

        def measured() -> None:
            try:
                write()
                took_s = time.perf_counter() - begun_at
                self._longest_s = max(self._longest_s, took_s)
                if self.runtime.is_main:
                    log.debug("checkpoint of step %d saved in %.2f s", step, took_s)
            finally:
                self._begun_at = None

        self._pending = in_thread(measured, "checkpoint")

    def wait(self) -> None:
        """Waits until the save that is being written is done.

        If it has failed, a warning is logged, the error is kept in `failure`, and the training goes on.
        Raises UserError if another run has the directory.
        """
        if self._pending is None:
            return
        pending = self._pending
        self._pending = None
        try:
            with self._saving():
                pending.result()
            self.failure = None
        except OSError as error:
            self._note_failure(error)

    def _note_failure(self, error: OSError) -> None:
        self.failure = error
        log.warning(
            "the checkpoint of step %s could not be written (%s); the training goes on",
            self.saved_step, error.strerror,
        )  # fmt: skip

    def finish(self) -> None:
        """On every rank: waits for rank 0's last save. Raises UserError on all ranks if it failed."""

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

        if self.kept.is_sharded and not self.runtime.is_main:
            self.wait()  # rank 0 waits for word that this rank's files are on the disk
        with self._saving():
            self.runtime.meeting.from_rank_0(last)

    def _saving(self) -> AbstractContextManager[None]:
        return self.runtime.progress.phase("saving (watchdog.save_s)", self.save_s)

    def _write(self, step: int, captured: Captured) -> None:
        """On the writer's thread: writes the checkpoint, and removes those that are not to be kept."""
        assert self.claim is not None
        self.claim.check()
        checkpoint.write(
            self.run_dir,
            step,
            captured.to_files(),
            self.claim.token,
            self.claim.check,
            is_enough=partial(_is_as_far, captured.state),
        )
        self._remove_earlier(step, captured.state["history"])

    def _write_shards(self, step: int, hidden: Path, number: int, captured: CapturedShards) -> None:
        """On the writer's thread of each rank: writes this rank's files, and on rank 0 all that is left.

        `number` counts the saves, the same on all ranks.
        """
        runtime = self.runtime
        told: dict[str, Any]
        try:
            told = {"files": shards.write(str(hidden), runtime.rank, captured)}
        except OSError as error:
            told = {"error": f"rank {runtime.rank}: {error.strerror}", "errno": error.errno}
        if not runtime.is_main:
            runtime.meeting.tell(f"saved/{number}/{runtime.rank}", told)
            return

        assert self.claim is not None
        try:
            there: dict[str, checkpoint.About] = {}
            for rank in range(runtime.world_size):
                if rank:
                    told = self._heard(f"saved/{number}/{rank}")
                if "error" in told:
                    raise OSError(told["errno"], told["error"])
                there |= {name: checkpoint.About(*about) for name, about in told["files"].items()}
            files = {
                STATE: json.dumps(captured.state, separators=(",", ":")).encode(),
                INDEX: captured.index.to_bytes(),
            }
            self.claim.check()
            path = checkpoint.path_of(self.run_dir, step)
            checkpoint.publish(hidden, path, files, there, self.claim.check)
        finally:
            shutil.rmtree(hidden, ignore_errors=True)  # where it has failed
        self._remove_earlier(step, captured.state["history"])

    def _heard(self, key: str) -> dict[str, Any]:
        """What another rank's thread has told, once it has. The watchdog looks after ranks that died."""
        while (told := self.runtime.meeting.heard(key)) is None:
            time.sleep(_TOLD_S)
        assert isinstance(told, dict)
        return told

    def _remove_earlier(self, step: int, history: list[dict[str, Any]]) -> None:
        """Removes the checkpoints that are not to be kept, now that `step` is saved."""
        assert self.claim is not None
        try:
            present = checkpoint.steps(self.run_dir)
            keep = _kept_steps(step, present, history, self.keep, self.best)
            checkpoint.keep_only(self.run_dir, keep, self.claim.check)
        except OSError as error:
            log.warning("earlier checkpoints could not be removed (%s)", error.strerror)


def _is_as_far(state: Mapping[str, Any], there: Mapping[str, bytes]) -> bool:
    """Whether a checkpoint with these files has completed as many epochs as this state of the same step."""
    try:
        return bool(checkpoint.from_json(STATE, there[STATE])["epoch"] >= state["epoch"])
    except (checkpoint.Damaged, KeyError, TypeError):  # it is not one that allranks has made
        return False


def _given_newest_first(given: str) -> list[Path]:
    """The checkpoints that `resume` names: one by its own path, or all of a run; raises UserError."""
    try:
        if (Path(given) / checkpoint.MANIFEST).exists():
            return [Path(given).resolve()]
        found = [checkpoint.path_of(given, step) for step in checkpoint.steps(given)]
    except OSError as error:
        raise UserError(f"resume={given} cannot be read ({error.strerror}): give another one.") from error
    if not found:
        raise UserError(
            f"resume={given} has no valid checkpoint: give the path of one, or of a run directory that has "
            "one."
        )
    return found


def _kept_steps(
    step: int, present: list[int], history: list[dict[str, Any]], keep: int, rule: Rule
) -> set[int]:
    """The steps whose checkpoints stay, now that `step` is saved.

    These are the `keep` newest, and the best one by the rule, if the epochs have its metric. `present` are
    the steps that have a checkpoint, newest first. `history` has the metrics of all epochs.
    """
    best = best_of([epoch for epoch in history if epoch["step"] in present], rule)
    # If there is a checkpoint of a later step, this run could not read it: otherwise it would have gone on
    # from it. It stays, and is not counted among the `keep`.
    later = [each for each in present if each > step]
    count = len(later) + keep
    return {*present[:count], best["step"] if best else step}
