"""Slurm: its commands, its directives and its answers, as Slurm 22.05 was seen to give them."""

from __future__ import annotations

import os
import re
import shlex
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from subprocess import CompletedProcess
from typing import Literal, NamedTuple

from allranks.job.batch import (
    JOB_LOG,
    LOOK_FIRST,
    JobRequest,
    ThisJob,
    call,
    given,
    id_in,
    refusal,
    seconds,
    tail_of,
)

# Why a job is waiting, where that is not a cause for worry: it will start by itself.
_ORDINARY_REASONS = ("None", "Priority", "Resources", "Dependency", "BeginTime")

# Variables that say which server is asked, and who asks.
TO_THE_SERVER = ("SLURM_CONF", "SLURM_CLUSTERS", "SLURM_JWT", "SBATCH_CLUSTERS")
# How the names of variables begin that stand for options of Slurm's commands.
OF_COMMANDS = ("SLURM_", "SBATCH_", "SQUEUE_", "SCANCEL_")


class _Parts(NamedTuple):
    """An id of Slurm's, JOB or JOB;CLUSTER. sbatch names the cluster where it was told to choose one."""

    job: str
    cluster: str  # empty: the cluster that is asked where none is named

    @property
    def option(self) -> list[str]:
        """The words that ask this cluster."""
        return ["-M", self.cluster] if self.cluster else []


class Slurm:
    """Slurm behind the interface `allranks.job.scheduler.Scheduler`, which explains each method."""

    name: Literal["slurm"] = "slurm"
    title = "Slurm"
    launchers: tuple[str, ...] = ("srun", "mpiexec", "torchrun")
    # A step may share the CPUs of one before it that Slurm still takes for running. srun reads this, and
    # so does the srun that mpiexec calls.
    step_environment: Mapping[str, str] = {"SLURM_OVERLAP": "1"}
    instead_of_ssh = ""  # MPICH's mpiexec takes srun by itself
    # Slurm hands on the environment of the user who submits, so no login profile is read again.
    shebang = "#!/bin/bash"
    directive_prefix = "#SBATCH"
    hands_environment_on = True
    say_why = ""  # Slurm says it in the job's log itself
    owner_may_requeue = True
    hosts_variable = "SLURM_JOB_NODELIST"
    array_index = "SLURM_ARRAY_TASK_ID"
    commands: tuple[str, ...] = ("sbatch", "squeue", "srun")
    server_check: tuple[str, ...] = ("scontrol", "ping")

    # --- of the job that this process runs in ---

    def is_here(self, environ: Mapping[str, str]) -> bool:
        return bool(environ.get("SLURM_JOB_ID"))

    def this_job(self, environ: Mapping[str, str]) -> ThisJob | None:
        unique_id = environ.get("SLURM_JOB_ID")
        if not unique_id:
            return None
        array, index = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
        job_id = f"{array}_{index}" if array and index else unique_id
        restarts = environ.get("SLURM_RESTART_COUNT", "")
        return ThisJob(job_id, unique_id, int(restarts) if re.fullmatch("[0-9]{1,9}", restarts) else 0)

    def ends_at(self, environ: Mapping[str, str]) -> int | None:
        job = self.this_job(environ)
        if job is None:
            return None
        own = self.command_environment(environ)
        own.pop("SLURM_CLUSTERS", None)  # this job is in the cluster that is asked without it
        done = call(["squeue", "-h", "-j", job.id, "-o", "%L"], own, self.title)
        if done.returncode:
            raise refusal(done)
        left = done.stdout.strip()
        if not re.fullmatch(r"[\d:-]+", left):  # UNLIMITED
            return None
        return int(time.time()) + seconds(left)

    # --- ids ---

    def is_id(self, text: str) -> bool:
        return bool(re.fullmatch(r"\d+(_\d+)?(;[\w.-]+)?", text, flags=re.ASCII))

    def is_same_job(self, one: str, other: str) -> bool:
        """A job does not tell its processes the cluster in the words in which sbatch told it."""
        here, there = _parts(one), _parts(other)
        return here.job == there.job and (
            here.cluster == there.cluster or "" in (here.cluster, there.cluster)
        )

    def may_be(self, job_id: str, unique_id: str) -> bool:
        """A job of an array has a number of its own, not below the array's: 72_0 may be 73."""
        number, _, index = _parts(job_id).job.partition("_")
        if not index or not (number.isdecimal() and unique_id.isdecimal()):
            return number == unique_id
        return int(unique_id) >= int(number)

    def job_of_array(self, array_id: str, index: int) -> str:
        """7 -> 7_1, and 7;CLUSTER -> 7_1;CLUSTER"""
        array = _parts(array_id)
        return _joined(f"{array.job}_{index}", array.cluster)

    def can_be_waited_for(self, job_id: str) -> bool:
        return True

    # --- what the server is asked to do ---

    def submit_command(self, script: str, after: str | None = None) -> list[str]:
        wait: list[str] = []
        if after:
            before = _parts(after)
            wait = [*before.option, f"--dependency=afterany:{before.job}", "--kill-on-invalid-dep=yes"]
        return ["sbatch", "--parsable", *wait, script]

    def submit(self, script: str, after: str | None = None) -> str:
        done = self._call(self.submit_command(script, after), LOOK_FIRST)
        if done.returncode:
            raise refusal(done, LOOK_FIRST)
        return id_in(done, self.is_id, "squeue -u $USER")

    def exists(self, job_id: str) -> bool:
        if not self.is_id(job_id):
            return False
        done = self._call([*_squeue([_parts(job_id)]), "-t", "all"])
        if done.returncode and not _is_unknown(done.stderr):
            raise refusal(done)
        return bool(states_in(done.stdout))

    def states(self, job_ids: Sequence[str]) -> dict[str, str]:
        found: dict[str, str] = {}
        for jobs in _by_cluster([job_id for job_id in job_ids if self.is_id(job_id)]):
            done = self._call(_squeue(jobs))
            if done.returncode and not _is_unknown(done.stderr):
                raise refusal(done)
            cluster = jobs[0].cluster
            found |= {_joined(job, cluster): state for job, state in states_in(done.stdout).items()}
        return found

    def cancel(self, job_ids: Sequence[str]) -> None:
        for jobs in _by_cluster(job_ids):
            done = self._call(["scancel", *jobs[0].option, *(job.job for job in jobs)])
            if done.returncode:
                raise refusal(done)

    def requeue(self, job_id: str) -> None:
        job = _parts(job_id)
        done = self._call(["scontrol", *job.option, "requeue", job.job])
        if done.returncode:
            raise refusal(done)

    def why_ended(self, run: Path, job_ids: Sequence[str]) -> str:
        """Slurm's words are `*** JOB 7 ON n1 CANCELLED AT 2026-11-25T20:00:00 DUE TO TIME LIMIT ***`.

        Slurm writes such a line, with the word REQUEUE, also when it queues a job again. That is not the
        end of the job, and the answer is empty. Lines about earlier jobs of the run, which the log has as
        well, are left out.
        """
        said = re.findall(r"\*\*\* JOB (\d+) ON \S+ (CANCELLED .+?) \*\*\*", tail_of(run / JOB_LOG))
        of_last = [words for number, words in said if not job_ids or self.may_be(job_ids[-1], number)]
        if not of_last or "REQUEUE" in of_last[-1]:
            return ""
        return of_last[-1]

    def _call(self, argv: Sequence[str], if_late: str = "") -> CompletedProcess[str]:
        return call(argv, self.command_environment(os.environ), self.title, if_late)

    def command_environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The environment without the variables that would change what Slurm's commands do, and with those
        that lead to the server.

        SBATCH_*, and the variables that Slurm sets inside a job, would override the options in the job
        script. SQUEUE_* could hide jobs from the answer (SQUEUE_STATES=R hides jobs that wait), and
        SCANCEL_* could make scancel leave out some of the jobs that it is to end.
        """
        return {
            name: value
            for name, value in environ.items()
            if name in TO_THE_SERVER or not name.startswith(OF_COMMANDS)
        }

    # --- the job script ---

    def directives(self, request: JobRequest) -> list[str]:
        below = "/%a" if request.array_jobs else ""
        log = request.directory.replace("%", "%%") + f"{below}/{JOB_LOG}"
        lines = [
            f"--job-name={shlex.quote(request.name)}",
            *given(request.account_option, request.account),
            *given(request.queue_option, request.queue),
            f"--nodes={request.nodes}",
        ]
        if request.ranks_per_node:
            lines.append(f"--ntasks-per-node={request.ranks_per_node}")
        if request.cpus_per_rank:
            lines.append(f"--cpus-per-task={request.cpus_per_rank}")
        if request.walltime:
            lines.append(f"--time={request.walltime}")
        lines += request.options
        # A path with a backslash would end the job.
        lines.append(f"--output={'/dev/null' if chr(92) in log else shlex.quote(log)}")
        lines.append("--open-mode=append")  # a job that is queued again, and the run's next job, add to it
        lines.append("--requeue")
        if request.survives_nodes:
            lines.append("--no-kill")
        if request.array_jobs:
            lines.append(f"--array=0-{request.array_jobs - 1}")
        return lines


def step_id(environ: Mapping[str, str]) -> str:
    """The step that this process is a part of, `JOB.STEP`: the same words on each of its ranks."""
    return f"{environ.get('SLURM_JOB_ID')}.{environ.get('SLURM_STEP_ID')}"


def states_in(answer: str) -> dict[str, str]:
    """The state of each job in an answer of `squeue -o "%i|%T|%r"`, and why a job cannot start.

    A line of another form is none about a job: squeue names the cluster that it was asked about.
    """
    found: dict[str, str] = {}
    for line in answer.splitlines():
        if line.count("|") < 2:
            continue
        job_id, state, reason = line.split("|", 2)
        found[job_id] = "queued" if state == "PENDING" else state.lower()
        if state == "PENDING" and reason not in _ORDINARY_REASONS:
            found[job_id] += f" ({reason})"
    return found


def _squeue(jobs: Sequence[_Parts]) -> list[str]:
    """The question whose answer states_in reads. -r gives each job of an array a line of its own."""
    ids = ",".join(job.job for job in jobs)
    return ["squeue", "-h", "-r", *jobs[0].option, "-j", ids, "-o", "%i|%T|%r"]


def _parts(job_id: str) -> _Parts:
    job, _, cluster = job_id.partition(";")
    return _Parts(job, cluster)


def _joined(job: str, cluster: str) -> str:
    return f"{job};{cluster}" if cluster else job


def _by_cluster(job_ids: Sequence[str]) -> list[list[_Parts]]:
    """The jobs of each cluster, in order: a command asks one cluster at a time."""
    groups: dict[str, list[_Parts]] = {}
    for job_id in job_ids:
        groups.setdefault(_parts(job_id).cluster, []).append(_parts(job_id))
    return list(groups.values())


def _is_unknown(said: str) -> bool:
    """squeue fails in this way where it is asked for one job alone, and that one has long ended."""
    return "Invalid job id" in said
