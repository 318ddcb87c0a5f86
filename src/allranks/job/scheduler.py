"""Schedulers: what the rest of the house asks of PBS and of Slurm, without asking which of them it is.

PBS is the class in allranks.job.pbs, Slurm the class in allranks.job.slurm; each has the methods of
`Scheduler` below. They alone read the ids of jobs from the environment.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Literal, Protocol, TypeVar

from allranks.base.errors import UserError
from allranks.job.batch import CommandMissing, JobRequest, NoAnswer, ServerUnreached, ThisJob
from allranks.job.pbs import Pbs
from allranks.job.slurm import Slurm

__all__ = ["SCHEDULERS", "JobRequest", "NoAnswer", "Scheduler", "ServerUnreached", "ThisJob"]

ASK_AGAIN_S = 60.0  # so that many jobs put no load on a server that has just come back

Answer = TypeVar("Answer")


class Scheduler(Protocol):
    """One scheduler. Each method that asks the server raises UserError where the server refuses, NoAnswer
    where it takes too long.
    """

    @property
    def name(self) -> Literal["pbs", "slurm"]:
        """Its name in machine files and in job.json."""

    @property
    def title(self) -> str:
        """Its name in messages."""

    @property
    def launchers(self) -> tuple[str, ...]:
        """The launchers that can start ranks in its jobs, the one that fits best first."""

    @property
    def step_environment(self) -> Mapping[str, str]:
        """Variables that a launcher needs in its jobs."""

    @property
    def instead_of_ssh(self) -> str:
        """The command with which MPICH's mpiexec can start processes on other hosts without ssh, or ""."""

    @property
    def shebang(self) -> str:
        """The first line of a job script."""

    @property
    def directive_prefix(self) -> str:
        """How each line of a job script begins that is meant for the scheduler: #PBS or #SBATCH."""

    @property
    def hands_environment_on(self) -> bool:
        """Whether a job starts with the environment of the shell that submitted it."""

    @property
    def say_why(self) -> str:
        """Shell words that print, in a job that gets SIGTERM, why the scheduler ends it."""

    @property
    def owner_may_requeue(self) -> bool:
        """Whether the owner of a job may have that same job queued again.

        If not, the run goes on in another job.
        """

    @property
    def hosts_variable(self) -> str:
        """The variable by which it tells a job its hosts."""

    @property
    def array_index(self) -> str:
        """The variable that tells a job of an array its number."""

    @property
    def commands(self) -> tuple[str, ...]:
        """The commands that allranks needs, the one that queues a job first."""

    @property
    def server_check(self) -> tuple[str, ...]:
        """A command that fails where the server does not answer."""

    def is_here(self, environ: Mapping[str, str]) -> bool:
        """Whether this process runs in one of its jobs."""

    def this_job(self, environ: Mapping[str, str]) -> ThisJob | None:
        """The job of it that this process runs in."""

    def ends_at(self, environ: Mapping[str, str]) -> int | None:
        """When this process's job ends, in seconds since 1970; None if the job has no limit.

        Asks the server.
        """

    def is_id(self, text: str) -> bool:
        """Whether a text is written like an id of a job."""

    def is_same_job(self, one: str, other: str) -> bool:
        """Whether two ids are of one job: the same id may be written in several ways."""

    def may_be(self, job_id: str, unique_id: str) -> bool:
        """Whether the job with this id may be the one whose processes know it by this unique id.

        In an array of Slurm each job has a number of its own, which does not follow from the array's
        number. So the answer may be True for other jobs, too: any number from the array's on is possible.
        """

    def job_of_array(self, array_id: str, index: int) -> str:
        """The id of one job of an array."""

    def can_be_waited_for(self, job_id: str) -> bool:
        """Whether another job can be queued to start after this one."""

    def submit_command(self, script: str, after: str | None = None) -> list[str]:
        """The command that queues a script, to start once the job `after` has ended."""

    def submit(self, script: str, after: str | None = None) -> str:
        """Queues a script, to start once the job `after` has ended. Returns the id of the new job."""

    def exists(self, job_id: str) -> bool:
        """Whether the server knows the job.

        To be asked before another job is told to wait for this one: the server may accept an unknown job as
        a dependency, and then the job that waits for it is lost.
        """

    def states(self, job_ids: Sequence[str]) -> dict[str, str]:
        """The state of each job that the server still has; for one that cannot start, with the reason."""

    def cancel(self, job_ids: Sequence[str]) -> None:
        """Ends the jobs; one that has ended by itself is not a failure."""

    def requeue(self, job_id: str) -> None:
        """Ends a job and queues it again under the same id, where `owner_may_requeue`."""

    def why_ended(self, run: Path, job_ids: Sequence[str]) -> str:
        """Why the scheduler has ended the last job of a run directory, in the scheduler's own words.

        Empty if the scheduler has not ended it, or has not said so. `job_ids` are all jobs of the run, the
        last one last.
        """

    def command_environment(self, environ: Mapping[str, str]) -> dict[str, str]:
        """The environment in which its commands are called."""

    def directives(self, request: JobRequest) -> list[str]:
        """The lines of a job script that are for the scheduler, without `directive_prefix`."""


SCHEDULERS: tuple[Scheduler, ...] = (Pbs(), Slurm())


def named(name: str) -> Scheduler:
    """The scheduler of this name. Raises UserError if there is no such scheduler."""
    for scheduler in SCHEDULERS:
        if scheduler.name == name:
            return scheduler
    known = " or ".join(scheduler.name for scheduler in SCHEDULERS)
    raise UserError(f"scheduler={name} is not known: it can be {known}.")


def here(environ: Mapping[str, str]) -> Scheduler | None:
    """The scheduler in whose job this process runs; None outside a job."""
    return next((scheduler for scheduler in SCHEDULERS if scheduler.is_here(environ)), None)


def this_job(environ: Mapping[str, str]) -> ThisJob | None:
    """The job that this process runs in; None outside a job."""
    scheduler = here(environ)
    return scheduler.this_job(environ) if scheduler else None


def ends_at(environ: Mapping[str, str]) -> int | None:
    """When this process's job ends, in seconds since 1970; None outside a job, or without a limit.

    Asks the scheduler, and raises UserError as it does.
    """
    scheduler = here(environ)
    if scheduler is None:
        return None
    try:
        return scheduler.ends_at(environ)
    except CommandMissing as error:
        raise UserError(
            f"this job's node has no command of {scheduler.title} to ask: give ALLRANKS_DEADLINE, the "
            "job's end in seconds since 1970."
        ) from error


def asked_until_answered(ask: Callable[[], Answer], warn: Callable[[UserError], None]) -> Answer:
    """Calls `ask`, which asks a scheduler, again and again until the server answers. Returns the answer.

    `warn` is called with the first error. This may take for ever, so it is to be called on a thread of its
    own. Raises UserError if the scheduler refuses, or if its command is missing.
    """
    is_told = False
    while True:
        try:
            return ask()
        except (ServerUnreached, NoAnswer) as error:
            if not is_told:
                warn(error)
            is_told = True
        time.sleep(ASK_AGAIN_S)


def is_suspended(environ: Mapping[str, str]) -> bool:
    """Asks the scheduler whether it has suspended this process's job.

    False outside a job, and if the scheduler does not answer.
    """
    scheduler = here(environ)
    job = scheduler.this_job(environ) if scheduler else None
    if scheduler is None or job is None:
        return False
    try:
        states = scheduler.states([job.id])
    except UserError:  # the server is down or refuses: then the ranks' own silence decides
        return False
    return any(state.startswith("suspended") for state in states.values())


def launchers(kind: str) -> tuple[str, ...]:
    """The launchers that start ranks in an allocation of this kind, the one that fits best first."""
    if kind == "flux":  # allranks queues no jobs with Flux, so it is not one of SCHEDULERS
        return ("flux", "torchrun")
    return next((s.launchers for s in SCHEDULERS if s.name == kind), ("mpiexec", "torchrun"))


def step_environment(kind: str) -> dict[str, str]:
    """Variables that a launcher needs in an allocation of this kind."""
    return next((dict(s.step_environment) for s in SCHEDULERS if s.name == kind), {})


def instead_of_ssh(kind: str) -> str:
    """The command that can take the place of ssh in an allocation of this kind; empty if none can."""
    return next((s.instead_of_ssh for s in SCHEDULERS if s.name == kind), "")
