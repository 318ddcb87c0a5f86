"""`allranks logs`: what the ranks of a run have said, merged in the order of time, and what they say next.

Each rank writes logs/rank-N.log, whose lines begin with the time. job.log, what a queued job has said on
its console, has no times: there rank 0's lines stand between those of the launcher, and from them the
others get their place.
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from allranks.base import links
from allranks.base.errors import UserError
from allranks.job.batch import JOB_LOG
from allranks.run.directory import is_finished

LOOK_EVERY_S = 1.0  # a network file system shows new lines every few seconds, whoever looks more often
PIECE_BYTES = 1 << 20
# A job's log may say the same as rank 0's log, of which so many lines are remembered.
REMEMBERED_LINES = 100_000

_RANK_LOG = re.compile(r"rank-(\d+)\.log")
# As logging writes it: 2026-11-26 00:41:40,571 INFO allranks: what was said.
_TIMED = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (\w+) [\w.]+: (.*)", flags=re.S)


class Line(NamedTuple):
    """A line that somebody has logged."""

    time: str  # as in the log; empty where nothing is known of it
    source: str  # "rank 3" or "job"
    text: str
    level: str = ""  # INFO, WARNING, ...; empty where the line has none


class Tail:
    """A file that grows: its whole lines, also after it was truncated or replaced by another one."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem = ""  # why it cannot be read; empty where it can, or is not there yet
        self._file: BinaryIO | None = None
        self._begun = b""  # the beginning of a line that is not whole yet

    def new_lines(self) -> list[str]:
        """The lines that have become whole since the last call; none where there is no file."""
        found = self._read()
        if self._was_replaced():
            found += self._end_line()  # what the earlier file ended with
            self.close()
            found += self._read()
        return found

    def rest(self) -> list[str]:
        """The last line, where it has no line feed."""
        return self._end_line()

    def close(self) -> None:
        """Closes the file; the next call opens it again from its beginning."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _read(self) -> list[str]:
        try:
            if self._file is None:
                self._file = self.path.open("rb")
            if os.fstat(self._file.fileno()).st_size < self._file.tell():  # truncated: it begins anew
                self._file.seek(0)
                self._begun = b""
            data = b"".join(iter(lambda: self._file.read(PIECE_BYTES), b""))  # type: ignore[union-attr]
        except FileNotFoundError:  # not there yet
            return []
        except OSError as error:  # it may be only for now: the next call tries again
            self.problem = f"{self.path} cannot be read ({error.strerror})."
            self.close()
            return []
        self.problem = ""
        *whole, self._begun = (self._begun + data).split(b"\n")
        return [line.decode(errors="replace") for line in whole]

    def _was_replaced(self) -> bool:
        """Whether the name leads to another file than the one that is open."""
        if self._file is None:
            return False
        try:
            there = self.path.stat()
        except OSError:
            return False
        here = os.fstat(self._file.fileno())
        return (there.st_ino, there.st_dev) != (here.st_ino, here.st_dev)

    def _end_line(self) -> list[str]:
        line = self._begun.decode(errors="replace")
        self._begun = b""
        return [line] if line else []


@dataclass
class Source:
    """One file of a run, and where its lines come to stand among all others."""

    name: str
    tail: Tail
    time: str = ""  # of its newest line that has one

    def new_lines(self, is_over: bool) -> list[Line]:
        """The lines that have become whole. `is_over`: nothing more will come, so the last one is whole."""
        texts = self.tail.new_lines()
        if is_over:
            texts += self.tail.rest()
        found = []
        for text in texts:
            match = _TIMED.fullmatch(text)
            if match:
                self.time = match[1]
            # A line without a time, as of a traceback, belongs to the one before.
            found.append(Line(self.time, self.name, text, match[2] if match else ""))
        return found


@dataclass
class Logs:
    """The logs of one run: of all its ranks and of its job, or of one rank."""

    directory: Path
    warn: Callable[[str], None]  # called once with a sentence for each file that cannot be read
    rank: int | None = None  # None: all ranks, and the job
    _sources: dict[str, Source] = field(default_factory=dict)
    _said: dict[str, str] = field(default_factory=dict)  # by rank 0: what, and when
    _warned: set[str] = field(default_factory=set)

    def check(self) -> None:
        """Raises UserError where there is nothing to show, and nothing that could come."""
        path = self.directory
        if not path.is_dir():
            raise UserError(f"{path} is missing: give the directory of a run.")
        known = sorted(self._ranks())
        if self.rank is not None and known and self.rank not in known:
            raise UserError(
                f"--rank {self.rank}: this run has logs of {_some_ranks(known)}. Give one of these."
            )
        if not known and not (path / JOB_LOG).exists() and not (path / "logs").is_dir():
            raise UserError(f"{path} has no logs: give the directory of a run.")
        links.allow_connections(len(known))  # an open file for each of them

    def new_lines(self, is_over: bool) -> list[Line]:
        """All lines that are new since the last call, in the order of time.

        `is_over`: nothing more will come, so a file's last line is whole even without a line feed.
        """
        lines: list[Line] = []
        for source in self._all_sources():
            new = source.new_lines(is_over)
            problem = source.tail.problem
            if problem and problem not in self._warned:
                self._warned.add(problem)
                self.warn(problem)
            if source.name == "rank 0":
                self._remember(new)
            lines += self._placed(source, new) if source.name == "job" else new
        # Python's sort keeps the order of lines with equal times: of one source they stay together.
        return sorted(lines, key=lambda line: line.time)

    def _ranks(self) -> list[int]:
        try:
            names = os.listdir(self.directory / "logs")  # noqa: PTH208
        except OSError:
            return []
        return [int(match[1]) for match in map(_RANK_LOG.fullmatch, names) if match]

    def _all_sources(self) -> Iterator[Source]:
        """Rank 0's log first, then those of the other ranks as they appear, then the job's."""
        for rank in sorted(self._ranks()):
            if self.rank in (None, rank):
                yield self._source(f"rank {rank}", f"logs/rank-{rank}.log")
        if self.rank is None:
            yield self._source("job", JOB_LOG)

    def _source(self, name: str, path: str) -> Source:
        return self._sources.setdefault(name, Source(name, Tail(self.directory / path)))

    def _remember(self, lines: Sequence[Line]) -> None:
        for line in lines:
            match = _TIMED.fullmatch(line.text)
            if match:
                self._said[match[3]] = match[1]
        while len(self._said) > REMEMBERED_LINES:
            del self._said[next(iter(self._said))]

    def _placed(self, job: Source, lines: Sequence[Line]) -> list[Line]:
        """The lines of the job's log that are not rank 0's, each with the time of rank 0's line before it.

        What the console shows of rank 0 is in rank 0's log, with a time.
        """
        own: list[Line] = []
        for line in lines:
            when = self._said.get(line.text)
            if when is not None:
                job.time = max(when, job.time)
            elif line.text:
                own.append(Line(job.time, job.name, line.text))
        return own


def _some_ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def followed(logs: Logs) -> Iterator[list[Line]]:
    """What is said, piece by piece, until the run has finished."""
    while True:
        is_over = is_finished(logs.directory)  # asked first: what it said last is there then
        yield logs.new_lines(is_over)
        if is_over:
            return
        time.sleep(LOOK_EVERY_S)
