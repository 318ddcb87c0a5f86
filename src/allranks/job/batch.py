"""What PBS and Slurm have in common: what a job asks for, and how their commands are called.

A command of a scheduler never runs without a time limit, because a server that is busy can leave it
waiting for minutes. What it answers may be any bytes: some sites print notices in their own encoding.
"""

from __future__ import annotations

import re
import shlex
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from allranks.base.errors import UserError
from allranks.base.text import one_line

COMMAND_LIMIT_S = (
    60.0  # a healthy server answers within a second, a busy one was seen to take half a minute
)
LOOK_FIRST = "look for the job before you submit again"  # advice if it is not known whether a job is queued
LEAST_LIMIT_S = 1.0  # a command is worth calling even at the last moment: most answer within this time
_all_end_at: ContextVar[float | None] = ContextVar("_all_end_at", default=None)  # see ending_by()

JOB_LOG = "job.log"  # in the run directory: what a job says, as it says it
STARTED = ".started"  # in the run directory: an empty file, whose time is when the last job's script began

# The words of a client that has sent its question, and has got no answer to it: the server may have done
# what it was asked for. The first three lines are Slurm's, whose messages are in its slurm_errno.c, and the
# last two those of PBS. A site whose server is busy sees them every day.
_UNANSWERED = re.compile(
    r"socket timed out on send/recv|zero bytes were transmitted or received|received zero length message"
    r"|message receive failure|unable to contact slurm controller \((receive|shutdown) failure\)"
    r"|communication shutdown failure"
    r"|premature end of message|failed to recv data from background qsub|batch protocol error"
    r"|q(sub|stat|del): end of file|timed out wait?ing for a reply",
    re.IGNORECASE,
)
# The words of a client that has not reached its server, which so has done nothing. The last two are of
# `scontrol requeue`, and of squeue that was asked about a cluster by name.
_UNREACHED = re.compile(
    "cannot connect|unable to contact|connection refused|communication (connection )?failure"
    "|message send failure|unexpected message received|can't be reached now",
    re.IGNORECASE,
)
# The words of a server that takes no question at the moment, whatever it is. These are whole sentences,
# because a site's own refusal may end with "try again later", too.
_TOO_BUSY = re.compile(
    "slurm temporarily unable to accept job|slurm job queue full|job creation temporarily unavailable"
    "|backup controller in standby mode|rate limit exceeded, please retry|unable to create job record"
    "|job update not available right now"
    "|server is currently too busy|server shutting down|no free connections",
    re.IGNORECASE,
)

# A pattern in a scheduler's complaint, and what helps against it. The first that fits is shown. Words of a
# limit go before those of what it is for: `Job violates accounting/QOS policy (job submit limit, ...)`.
_REMEDIES = (
    (
        f"{_UNREACHED.pattern}|{_TOO_BUSY.pattern}|connect|contact|timed out|socket",
        "the scheduler is down or busy: try again later",
    ),
    (
        r"violat|limits?\b|maximum number",
        "ask for less with --nodes or --walltime, give another --queue, or wait until fewer jobs of yours "
        "are there",
    ),
    (r"account|project|allocation", "give one that you belong to with --account"),
    (r"queue|partition|qos", "give another --queue"),
    (r"exceed|violat|limit|max|not available|node count", "ask for less with --nodes or --walltime"),
    (r"resource", "machine.submit.chunk=, .options= and machine.filesystems= change what is asked for"),
)


class NoAnswer(UserError):
    """The scheduler did not answer in time, or its answer cannot be understood.

    So it is not known what it has done.
    """


class CommandMissing(UserError):
    """A command of the scheduler is not on this host, as on the compute nodes of some clusters."""


class ServerUnreached(UserError):
    """The server was not reached, or takes no requests at the moment.

    So nothing was done, and the same call may succeed later.
    """


class ThisJob(NamedTuple):
    """The job that a process runs in."""

    id: str  # the id by which the owner asks for the job: 12.pbs, 2[1].pbs, 77, 77_3
    unique_id: str  # an id that no other job has: in an array of Slurm each job has a number of its own
    restarts: int  # how often the scheduler has started it again


@dataclass(frozen=True)
class JobRequest:
    """What a job script tells its scheduler. Each scheduler writes it in directives of its own."""

    name: str
    nodes: int
    directory: str  # the run directory; for an array the one that holds the run directories 0, 1, ...
    walltime: str | None = None  # HH:MM:SS
    account: str | None = None
    account_option: str = "-A"  # the option by which the machine takes the account's name
    queue: str | None = None
    queue_option: str = "-q"  # the option by which the machine takes the queue's name
    ranks_per_node: int | None = None
    cpus_per_rank: int | None = None
    cpus_per_node: int | None = None
    chunk: str = ""  # PBS: what follows `select=K`, with {ranks} and {cpus}
    resources: tuple[str, ...] = ()  # PBS, in place of `select`: of all nodes, with {ranks} and {cpus}
    filesystems: tuple[str, ...] = ()
    storage: tuple[str, ...] = ()
    options: tuple[str, ...] = ()  # directives of the machine file, as they stand there
    array_jobs: int = 0  # 0: no array
    survives_nodes: bool = False  # the job goes on when a node of it fails
    on_own_hosts: bool = True  # each of `nodes` is a host of its own; False if a queue deals in chunks


def given(option: str, value: object) -> list[str]:
    """The directive that gives `value`, quoted as both schedulers read it; none without a value."""
    return [f"{option} {shlex.quote(str(value))}"] if value else []


@contextmanager
def ending_by(end_at: float) -> Iterator[None]:
    """In the block, a command of a scheduler is given up at `end_at` (by time.monotonic()) at the latest.

    Each has LEAST_LIMIT_S all the same, and never more than COMMAND_LIMIT_S.
    """
    token = _all_end_at.set(end_at)
    try:
        yield
    finally:
        _all_end_at.reset(token)


def _limit_s() -> float:
    """How long the next command may take, in seconds."""
    end_at = _all_end_at.get()
    if end_at is None:
        return COMMAND_LIMIT_S
    return min(COMMAND_LIMIT_S, max(LEAST_LIMIT_S, end_at - time.monotonic()))


def call(
    argv: Sequence[str], environ: Mapping[str, str], scheduler: str, if_late: str = ""
) -> subprocess.CompletedProcess[str]:
    """Runs a command of `scheduler` in the environment `environ`; what it said and its exit code.

    Raises CommandMissing where there is no such command, UserError where it cannot be started, and
    NoAnswer, with the advice `if_late`, where it has not ended after COMMAND_LIMIT_S, or by the time that
    ending_by() has set.
    """
    limit_s = _limit_s()
    try:
        return subprocess.run(
            argv,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=limit_s,
            check=False,
            env=dict(environ),
            stdin=subprocess.DEVNULL,
        )
    except FileNotFoundError:
        raise CommandMissing(
            f"{argv[0]} is not found: work on a login node of a cluster with {scheduler}, or give another "
            "--machine; `allranks launch` needs no scheduler."
        ) from None
    except OSError as error:  # it may not be executed, or the command line is too long
        raise UserError(f"{argv[0]} cannot be started: {error.strerror}.") from error
    except subprocess.TimeoutExpired:
        advice = f"; {if_late}" if if_late else ""
        raise NoAnswer(
            f"{argv[0]} does not answer within {limit_s:.0f} s: the scheduler is down or busy. "
            f"Try again later{advice}."
        ) from None


def refusal(done: subprocess.CompletedProcess[str], if_late: str = "") -> UserError:
    """The error for a command that has failed: its own words, and what may help.

    It is NoAnswer, with the advice `if_late`, where the command says that its server has not answered, and
    ServerUnreached where it was not reached or is too busy.
    """
    said = one_line(done.stderr + " " + done.stdout) or "no word of explanation"
    failed = f"`{shlex.join(done.args)}` failed with exit code {done.returncode}: {said.rstrip('.')}"
    # Looked for first: a client may say, too, that another server, which stands in for the first, was not
    # reached.
    if _UNANSWERED.search(said):
        advice = f"; {if_late}" if if_late else ""
        return NoAnswer(f"{failed}. The scheduler is down or busy. Try again later{advice}.")
    fitting = [remedy for pattern, remedy in _REMEDIES if re.search(pattern, said, flags=re.IGNORECASE)]
    remedy = fitting[0] if fitting else "put right what it names"
    is_passing = _UNREACHED.search(said) or _TOO_BUSY.search(said)
    kind = ServerUnreached if is_passing else UserError
    return kind(f"{failed}. What may help: {remedy}.")


def id_in(done: subprocess.CompletedProcess[str], is_id: Callable[[str], bool], how_to_look: str) -> str:
    """The id that a command has answered which has queued a job.

    Sites print notices around the id, so it is the last line that is nothing but an id. Raises NoAnswer
    if there is none: the exit code says that the job was queued. `how_to_look` is a command that lists
    the user's jobs.
    """
    lines = [line.strip() for line in done.stdout.splitlines()]
    ids = [line for line in lines if is_id(line)]
    if ids:
        return ids[-1]
    said = one_line(done.stdout + " " + done.stderr) or "nothing"
    raise NoAnswer(
        f"`{shlex.join(done.args)}` ended well, but among what it said is no job's id: {said.rstrip('.')}. "
        f"The job is perhaps queued: look with `{how_to_look}` before you submit again."
    )


def tail_of(path: Path, size: int = 8192) -> str:
    """The last `size` bytes of a file as text; empty if it cannot be read."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - size))
            return file.read().decode(errors="replace")
    except OSError:
        return ""


def seconds(text: str) -> int:
    """The seconds in a duration as schedulers write it: 30, 02:30, 01:02:30 or 1-00:00:00."""
    days, _, clock = text.rpartition("-")
    total = 0
    for part in clock.split(":"):
        total = total * 60 + int(part)
    return int(days or 0) * 86400 + total
