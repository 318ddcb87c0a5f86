"""`allranks logs`: merges the log files of a run's ranks in the order of time, and follows new lines.

Each rank writes logs/rank-N.log, whose lines begin with the time. job.log has what a queued job has written
to its console: lines of rank 0 and of the launcher, all without a time. A line of rank 0 there is also in
rank 0's log, which has its time. A line of the launcher gets the time of the line of rank 0 before it.
"""

from __future__ import annotations

import os
import re
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO, NamedTuple

from allranks.base import links
from allranks.base.errors import UserError
from allranks.job.batch import JOB_LOG
from allranks.run import directory as rundir
from allranks.run.cells import is_finished

LOOK_EVERY_S = 1.0  # a network file system shows new lines only every few seconds: more often is useless
PIECE_BYTES = 1 << 20  # bytes read at once
# So many of rank 0's newest lines are kept in memory, to find them again in the job's log.
REMEMBERED_LINES = 100_000

_RANK_LOG = re.compile(r"rank-(\d+)\.log")
# As logging writes it: 2026-11-26 00:41:40,571 INFO allranks: what was said.
_TIMED = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}) (\w+) [\w.]+: (.*)", flags=re.S)


class Line(NamedTuple):
    """A line of a log file."""

    time: str  # as in the log; empty if it is not known
    source: str  # "rank 3" or "job"
    text: str
    level: str = ""  # INFO, WARNING, ...; empty if the line has none


class Tail:
    """Reads the new lines of a growing file, also after the file was truncated or replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.problem = ""  # why the file cannot be read; empty if it can, or does not exist yet
        self._file: BinaryIO | None = None
        self._inode: tuple[int, int] | None = None  # which file was read last, as _inode_of() says
        self._at = 0  # so many bytes of it have been read
        self._begun = b""  # the beginning of the last line, which has no line feed yet

    def new_lines(self) -> list[str]:
        """The lines that were completed since the last call; an empty list if there is no file."""
        found = self._read()
        if self._was_replaced():
            found += self._end_line()  # what the earlier file ended with
            self.close()
            self._inode = None
            found += self._read()
        return found

    def rest(self) -> list[str]:
        """The last line if it has no line feed, as a list of one line; else an empty list."""
        return self._end_line()

    def close(self) -> None:
        """Closes the file; the next call of new_lines() opens it again, and goes on where this one was."""
        if self._file is not None:
            self._file.close()
        self._file = None

    def _read(self) -> list[str]:
        """Reads the file to its end, opening it if needed. Returns the lines that were completed."""
        try:
            file = self._file or self._opened()
            if os.fstat(file.fileno()).st_size < self._at:  # truncated: it begins anew
                file.seek(0)
                self._at = 0
                self._begun = b""
            data = b"".join(iter(lambda: file.read(PIECE_BYTES), b""))
        except FileNotFoundError:  # not there yet
            return []
        except OSError as error:
            # A network file system may fail for a moment (EIO, ESTALE). The next call opens the file again,
            # and goes on after the lines that were read.
            self.problem = f"{self.path} cannot be read ({error.strerror})."
            self.close()
            return []
        self.problem = ""
        self._at += len(data)
        *whole, self._begun = (self._begun + data).split(b"\n")
        return [line.decode(errors="replace") for line in whole]

    def _opened(self) -> BinaryIO:
        """Opens the file: at its beginning, or where it was read up to, if it is still the same file."""
        self._file = self.path.open("rb")
        about = os.fstat(self._file.fileno())
        if _inode_of(about) == self._inode and about.st_size >= self._at:
            self._file.seek(self._at)
        else:
            self._inode = _inode_of(about)
            self._at = 0
            self._begun = b""
        return self._file

    def _was_replaced(self) -> bool:
        """Whether there is another file at the path now than the one that is open."""
        if self._file is None:
            return False
        try:
            there = self.path.stat()
        except OSError:
            return False
        return _inode_of(there) != _inode_of(os.fstat(self._file.fileno()))

    def _end_line(self) -> list[str]:
        """The line that has no line feed, as if it were complete; an empty list if there is none."""
        line = self._begun.decode(errors="replace")
        self._begun = b""
        return [line] if line else []


def _inode_of(about: os.stat_result) -> tuple[int, int]:
    """What tells a file from every other file of this host."""
    return about.st_ino, about.st_dev


@dataclass
class Source:
    """One log file of a run, with the time by which its next lines are sorted."""

    name: str  # "rank 3" or "job"
    tail: Tail
    time: str = ""  # of the newest line that has a time

    def new_lines(self, is_over: bool) -> list[Line]:
        """The lines that were completed since the last call.

        With `is_over` nothing more will be written, so the last line counts even without a line feed.
        """
        texts = self.tail.new_lines()
        if is_over:
            texts += self.tail.rest()
        found = []
        for text in texts:
            match = _TIMED.fullmatch(text)
            if match:
                self.time = match[1]
            # A line without a time, as in a traceback, gets the time of the line before it.
            found.append(Line(self.time, self.name, text, match[2] if match else ""))
        return found


@dataclass
class Logs:
    """The log files of one run: of all its ranks and its job, or of a single rank."""

    directory: Path
    warn: Callable[[str], None]  # called once with a sentence for each file that cannot be read
    rank: int | None = None  # None: all ranks, and the job
    _sources: dict[str, Source] = field(default_factory=dict)  # by name
    # The texts that rank 0 has logged and that were not found in the job's log yet. A text that was logged
    # several times, as at each start of a run, has all its times, the earliest first.
    _said: dict[str, deque[str]] = field(default_factory=dict)
    _remembered: int = 0  # how many times are in _said
    _warned: set[str] = field(default_factory=set)  # the sentences that `warn` was called with

    def check(self) -> None:
        """Raises UserError if the directory has no logs and will get none, or none of the chosen rank.

        Raises UserError, too, for a directory that this user may not read.
        """
        path = self.directory
        try:
            is_folder = path.is_dir()
            has_job_log = (path / JOB_LOG).exists()
            has_folder_of_logs = (path / "logs").is_dir()
            if has_folder_of_logs:
                os.listdir(path / "logs")  # noqa: PTH208
        except OSError as error:
            raise UserError(
                f"{error.filename} cannot be read ({error.strerror}): give the directory of a run."
            ) from error
        if not is_folder:
            raise UserError(f"{path} is missing: give the directory of a run.")
        known = sorted(self._ranks())
        if self.rank is not None and known and self.rank not in known:
            raise UserError(
                f"--rank {self.rank}: this run has logs of {_some_ranks(known)}. Give one of these."
            )
        is_program = has_job_log and not has_folder_of_logs and not (path / rundir.CONFIG).exists()
        if self.rank is not None and is_program:
            raise UserError(
                f"--rank {self.rank}: a program of your own has no logs of single ranks. Leave --rank out."
            )
        if not known and not has_job_log and not has_folder_of_logs:
            raise UserError(f"{path} has no logs: give the directory of a run.")
        # Each log stays open. A run of many ranks needs more open files than a process may have by default.
        links.allow_connections(len(known))

    def new_lines(self, is_over: bool) -> list[Line]:
        """All lines that are new since the last call, in the order of time.

        With `is_over` nothing more will be written, so a file's last line counts even without a line feed.
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
        # Python's sort is stable: lines with equal times keep their order, so those of a file stay
        # together.
        return sorted(lines, key=lambda line: line.time)

    def _ranks(self) -> list[int]:
        """The numbers of the ranks that have a log file."""
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
        """Keeps what rank 0 has logged, and when; forgets the oldest lines beyond REMEMBERED_LINES.

        The further lines of a message, as of a traceback, are kept with the message's time.
        """
        for line in lines:
            match = _TIMED.fullmatch(line.text)
            text = match[3] if match else line.text
            if text:
                self._said.setdefault(text, deque()).append(line.time)
                self._remembered += 1
        while self._remembered > REMEMBERED_LINES:
            self._take_time_of(next(iter(self._said)))

    def _take_time_of(self, text: str) -> str | None:
        """The earliest time of this text that is remembered, which is forgotten now; None without any."""
        times = self._said.get(text)
        if times is None:
            return None
        time_of_text = times.popleft()
        self._remembered -= 1
        if not times:
            del self._said[text]
        return time_of_text

    def _placed(self, job: Source, lines: Sequence[Line]) -> list[Line]:
        """The lines of the job's log that rank 0's log does not have, each with a time.

        It is the time of the last line before it that rank 0's log has, too.
        """
        # A run may have been started by hand before it was queued: what rank 0 has logged then is not in
        # the job's log. So if rank 0 has logged a text more often than the job's log has it here, the
        # newest times are those of the job's lines.
        for text, count in Counter(line.text for line in lines).items():
            while len(self._said.get(text, ())) > count:
                self._take_time_of(text)
        own: list[Line] = []
        for line in lines:
            when = self._take_time_of(line.text)
            if when is not None:
                job.time = max(when, job.time)
            elif line.text:
                own.append(Line(job.time, job.name, line.text))
        return own


def _some_ranks(ranks: Sequence[int]) -> str:
    return f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}"


def followed(logs: Logs) -> Iterator[list[Line]]:
    """Yields the new lines every LOOK_EVERY_S seconds, until the run has finished."""
    while True:
        # This is asked before the logs are read: a run that has finished has written its last lines by
        # then.
        try:
            is_over = is_finished(logs.directory)
        except OSError:  # a file cannot be read at this moment
            is_over = False
        yield logs.new_lines(is_over)
        if is_over:
            return
        time.sleep(LOOK_EVERY_S)
