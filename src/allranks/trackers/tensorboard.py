"""`tracker=tensorboard`: event files in the run directory's `tracker/tensorboard/`.

    tensorboard --logdir runs

shows all runs below `runs/`. Each start of a run writes a file of its own. The file begins with a mark that
names a step. TensorBoard then ignores what earlier files hold from that step on.

Events are written by tensorboard's own EventFileWriter, which needs neither TensorFlow nor torch.
"""

from __future__ import annotations

import struct
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from allranks.trackers.packages import require, without_epoch
from allranks.trackers.protocol import Position, TrackedRun

# A figure that is not finite is None in our records; TensorBoard draws nothing for NaN.
_NOT_FINITE = float("nan")


class TensorBoard:
    """Scalars for each step and epoch, the configuration as text, the pictures as images."""

    def __init__(self) -> None:
        require("tensorboard", "tensorboard")
        self._writer: Any = None
        self._last_step = 0

    def open(self, run: TrackedRun) -> Position | None:
        """Begins an event file, which goes on after run.delivered."""
        from tensorboard.compat.proto.event_pb2 import Event, SessionLog
        from tensorboard.summary.writer.event_file_writer import EventFileWriter

        if self._writer is not None:  # the tracker was open before, and has failed
            before = self._writer
            self._writer = None
            # This may fail for the same reason again, such as a full disk. The new file does not depend on
            # it.
            with suppress(OSError):
                before.close()
        folder = run.folder / "tensorboard"
        self._writer = EventFileWriter(str(folder))
        self._last_step = run.delivered.step
        start = SessionLog(status=SessionLog.START)
        self._writer.add_event(Event(wall_time=time.time(), step=run.delivered.step + 1, session_log=start))
        if run.delivered == Position():
            self._text("configuration", run.config)
            self._text("environment", run.environment)
        self._writer.flush()
        return None

    def steps(self, records: Sequence[Mapping[str, Any]]) -> None:
        """A point in each curve of single steps."""
        for record in records:
            self._scalars(without_epoch(record))
        self._writer.flush()

    def epoch(self, metrics: Mapping[str, Any]) -> None:
        """A point in each curve of epochs, at the epoch's last step."""
        self._scalars(metrics)
        self._writer.flush()

    def summary(self, values: Mapping[str, Any]) -> None:
        """The summary as text, and its figures of the test as points."""
        self._text("summary", values)
        self._scalars(
            {"step": self._last_step, **{k: v for k, v in values.items() if k.startswith("test/")}}
        )
        self._writer.flush()

    def pictures(self, paths: Sequence[Path]) -> None:
        """Each picture as an image that has the file's name."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        for path in paths:
            content = path.read_bytes()
            width, height = struct.unpack(">II", content[16:24])  # where each PNG file has them
            image = Summary.Image(width=width, height=height, colorspace=3, encoded_image_string=content)
            self._add([Summary.Value(tag=path.stem, image=image)], self._last_step)
        self._writer.flush()

    def close(self, finished: bool) -> None:
        """Closes the event file."""
        self._writer.close()

    # --- tools ----------------------------------------------------------------------------------------

    def _scalars(self, values: Mapping[str, Any]) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        made = [
            Summary.Value(tag=key, simple_value=_NOT_FINITE if value is None else value)
            for key, value in values.items()
            if key != "step" and (value is None or isinstance(value, int | float))
        ]
        self._add(made, values["step"])

    def _text(self, tag: str, values: Mapping[str, Any]) -> None:
        """A table of two columns on TensorBoard's page of texts."""
        from tensorboard.compat.proto.summary_pb2 import Summary
        from tensorboard.compat.proto.tensor_pb2 import TensorProto
        from tensorboard.plugins.text.metadata import create_summary_metadata

        rows = [f"| {key} | {value} |".replace("\n", " ") for key, value in values.items()]
        table = "\n".join(["| key | value |", "|---|---|", *rows])
        tensor = TensorProto(dtype="DT_STRING", string_val=[table.encode()])
        metadata = create_summary_metadata(display_name=tag, description="")
        self._add([Summary.Value(tag=tag, metadata=metadata, tensor=tensor)], 0)

    def _add(self, values: Sequence[Any], step: int) -> None:
        from tensorboard.compat.proto.event_pb2 import Event
        from tensorboard.compat.proto.summary_pb2 import Summary

        self._writer.add_event(Event(wall_time=time.time(), step=step, summary=Summary(value=values)))
        self._last_step = max(self._last_step, step)
