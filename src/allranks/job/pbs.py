"""PBS: its commands, its directives and its answers, as OpenPBS 23.06 was seen to give them."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from subprocess import CompletedProcess
from typing import Literal

from allranks.base.errors import UserError
from allranks.base.text import one_line
from allranks.job.batch import (
    LOOK_FIRST,
    STARTED,
    JobRequest,
    NoAnswer,
    ThisJob,
    call,
    given,
    id_in,
    refusal,
    seconds,
    tail_of,
)

OWN_LOG = "pbs.log"  # in the run directory: what PBS itself says about the job
FINISHED, UNKNOWN = 35, 153  # exit codes of qstat and qdel: the job has ended; no job has this id

# qstat's letter for a job's state, in words. A finished job (F, X) has none: it is not in the queue.
STATES = {
    "Q": "queued",
    "R": "running",
    "H": "held",
    "W": "waiting",
    "E": "ending",
    "B": "running",  # an array of which at least one job has started
    "T": "queued",
    "S": "suspended",
    "U": "suspended",
    "M": "moved",
}


class Pbs:
    """PBS behind the interface `allranks.job.scheduler.Scheduler`, which explains each method."""

    name: Literal["pbs"] = "pbs"
    title = "PBS"
    launchers: tuple[str, ...] = ("mpiexec", "torchrun")
    step_environment: Mapping[str, str] = {}
    instead_of_ssh = "pbsdsh"
    # PBS starts a job from the owner's login profile, and hands on nothing else.
    shebang = "#!/bin/bash -l"
    directive_prefix = "#PBS"
    hands_environment_on = False
    # PBS writes the reason into the job's output (OWN_LOG) before it sends the signal. But PBS may put that
    # output into the run directory only when the job has ended. Until then the file is that of an earlier
    # job. Such a file is older than STARTED, which is written when this job starts, and is not read.
    say_why = f'[ "$run/{OWN_LOG}" -nt "$run/{STARTED}" ] && grep -hs "PBS: job killed" "$run/{OWN_LOG}"'
    owner_may_requeue = False  # `qrerun` is for PBS's managers
    hosts_variable = "PBS_NODEFILE"
    array_index = "PBS_ARRAY_INDEX"
    commands: tuple[str, ...] = ("qsub", "qstat", "qdel")
    server_check: tuple[str, ...] = ("qstat", "-B")

    # --- of the job that this process runs in ---

    def is_here(self, environ: Mapping[str, str]) -> bool:
        return bool(environ.get("PBS_JOBID") or environ.get("PBS_NODEFILE"))

    def this_job(self, environ: Mapping[str, str]) -> ThisJob | None:
        """PBS tells no process how often its job was started, so that number is always 0."""
        job_id = environ.get("PBS_JOBID")
        return ThisJob(job_id, job_id, 0) if job_id else None

    def ends_at(self, environ: Mapping[str, str]) -> int | None:
        job = self.this_job(environ)
        if job is None:
            return None
        done = self._call(["qstat", "-f", job.id])
        if done.returncode:
            raise refusal(done)
        limit = re.search(r"Resource_List.walltime = ([\d:]+)", done.stdout)
        start = re.search(r"stime = (.+)", done.stdout)
        if limit is None or start is None:
            return None
        try:
            began = datetime.strptime(start[1].strip(), "%a %b %d %H:%M:%S %Y")  # in local time
        except ValueError as error:
            raise UserError(
                f"qstat says that the job began at {start[1].strip()!r}, which is no date that is known "
                "here: give ALLRANKS_DEADLINE, the job's end in seconds since 1970."
            ) from error
        return int(began.timestamp()) + seconds(limit[1])

    # --- ids ---

    def is_id(self, text: str) -> bool:
        return bool(re.fullmatch(r"\d+(\[\d*\])?(\.[\w.-]+)?", text, flags=re.ASCII))

    def is_same_job(self, one: str, other: str) -> bool:
        """The server's name may stand short or long after the number."""
        return one.partition(".")[0] == other.partition(".")[0]

    def may_be(self, job_id: str, unique_id: str) -> bool:
        return self.is_same_job(job_id, unique_id)

    def job_of_array(self, array_id: str, index: int) -> str:
        """2[].pbs -> 2[1].pbs"""
        return array_id.replace("[]", f"[{index}]")

    def can_be_waited_for(self, job_id: str) -> bool:
        """PBS takes no dependency on one job of an array."""
        return "[" not in job_id

    # --- what the server is asked to do ---

    def submit_command(self, script: str, after: str | None = None) -> list[str]:
        wait = ["-W", f"depend=afterany:{after}"] if after else []
        return ["qsub", *wait, script]

    def submit(self, script: str, after: str | None = None) -> str:
        done = self._call(self.submit_command(script, after), LOOK_FIRST)
        if done.returncode:
            raise refusal(done, LOOK_FIRST)
        return id_in(done, self.is_id, "qstat -u $USER")

    def exists(self, job_id: str) -> bool:
        if not self.is_id(job_id):
            return False
        done = self._call(["qstat", "-f", job_id])
        if done.returncode not in (0, FINISHED, UNKNOWN):
            raise refusal(done)
        return done.returncode != UNKNOWN

    def states(self, job_ids: Sequence[str]) -> dict[str, str]:
        known = [job_id for job_id in job_ids if self.is_id(job_id)]
        if not known:
            return {}
        done = self._call(["qstat", "-f", *known])
        # Both codes come with the answer about the other jobs that were asked for.
        if done.returncode not in (0, FINISHED, UNKNOWN):
            raise refusal(done)
        if done.returncode == 0 and "Job Id: " not in done.stdout:
            raise NoAnswer(
                f"`qstat -f` ended well, but its answer is not understood: {one_line(done.stdout)[:99]!r}. "
                "Whether the job is in the queue is not known."
            )
        return states_in(done.stdout)

    def cancel(self, job_ids: Sequence[str]) -> None:
        done = self._call(["qdel", *job_ids])
        if done.returncode not in (0, FINISHED, UNKNOWN):  # that a job has ended meanwhile is not a failure
            raise refusal(done)

    def requeue(self, job_id: str) -> None:
        raise AssertionError("owner_may_requeue says that no job of PBS can be queued again")

    def why_ended(self, run: Path, job_ids: Sequence[str]) -> str:
        """PBS's words are `=>> PBS: job killed: walltime 42 exceeded limit 40`, in the job's own output.

        If the last job has ended without a trace, the output that is there is an earlier job's.
        """
        if _is_older(run / OWN_LOG, run / STARTED):
            return ""
        said = re.findall(r"PBS: job killed: (.+)", tail_of(run / OWN_LOG))
        return said[-1].strip() if said else ""

    def _call(self, argv: Sequence[str], if_late: str = "") -> CompletedProcess[str]:
        return call(argv, self.command_environment(os.environ), self.title, if_late)

    def command_environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        return dict(environ)

    # --- the job script ---

    def directives(self, request: JobRequest) -> list[str]:
        lines = [
            f"-N {shlex.quote(request.name)}",
            *given(request.account_option, request.account),
            *given(request.queue_option, request.queue),
            *_size(request),
        ]
        if request.walltime:
            lines.append(f"-l walltime={request.walltime}")
        if request.filesystems:
            lines += given("-l", f"filesystems={':'.join(request.filesystems)}")
        if request.storage:
            lines += given("-l", f"storage={'+'.join(request.storage)}")
        lines += request.options
        # By default (place=free) PBS puts several chunks on one host if they fit there. A job that asks for
        # resources of the whole job, and not for chunks, may not have the option `place`.
        is_placed = bool(request.resources) or any("place=" in option for option in request.options)
        if request.nodes > 1 and request.on_own_hosts and not is_placed:
            lines.append("-l place=scatter")
        # The file to which PBS writes its own messages about the job. PBS refuses a path that is not ASCII.
        below = "^array_index^/" if request.array_jobs else ""
        log = f"{request.directory}/{below}{OWN_LOG}"
        lines += ["-j oe", f"-o {shlex.quote(log) if log.isascii() else '/dev/null'}"]
        if request.array_jobs:
            lines += [f"-J 0-{request.array_jobs - 1}", "-r y"]  # PBS refuses an array that cannot be rerun
        return lines


def _is_older(path: Path, other: Path) -> bool:
    """Whether a file was last written before another one was; False if one of them is not there."""
    try:
        return path.stat().st_mtime_ns < other.stat().st_mtime_ns
    except OSError:
        return False


def _size(request: JobRequest) -> list[str]:
    """The directives that say how large the job is: so many chunks alike, or resources of the whole job."""
    ranks = request.ranks_per_node or 1
    if request.resources:
        # A node is filled in proportion to its ranks, so that a job on a part of a node pays for that part.
        cpus = ranks * (request.cpus_per_rank or 1)
        totals = {"ranks": ranks * request.nodes, "cpus": cpus * request.nodes}
        return [line for resource in request.resources for line in given("-l", resource.format(**totals))]
    cpus = request.cpus_per_node or ranks * (request.cpus_per_rank or 1)
    select = f"select={request.nodes}"
    if request.chunk:
        select += ":" + request.chunk.format(ranks=ranks, cpus=cpus)
    return [f"-l {shlex.quote(select)}"]


def states_in(answer: str) -> dict[str, str]:
    """The state of each job in an answer of `qstat -f`, and whether PBS says that it can never run."""
    found: dict[str, str] = {}
    for block in re.split(r"^Job Id: ", answer, flags=re.MULTILINE)[1:]:
        job_id = block.split("\n", 1)[0].strip()
        letter = re.search(r"^\s+job_state = (\w)", block, flags=re.MULTILINE)
        if letter is None or letter[1] not in STATES:
            continue
        never = " (Can Never Run)" if "Can Never Run" in block else ""
        found[job_id] = STATES[letter[1]] + never
    return found
