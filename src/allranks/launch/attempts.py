"""The attempts of one launch: hosts are looked at, ranks started, and after a crash started again.

plan      which command starts which ranks where
preflight is every host fit for it? With --min-ranks, hosts that cannot be reached are left out
attempt   the ranks run, and the supervisor watches over them until all have ended
decide    done, or a restart, or no more restarts because none of the last ones gained a step
restart   without the hosts that are gone, if enough ranks are left; back to `attempt`
"""

from __future__ import annotations

import enum
import itertools
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from allranks.base import files, processes
from allranks.base.errors import EXIT_REQUEUE, EXIT_STUCK, EXIT_USER_ERROR, UserError
from allranks.base.text import some
from allranks.config import Config
from allranks.job import scheduler, variables
from allranks.job.hosts import Allocation, Host
from allranks.job.machine import Machine
from allranks.launch import launchers, preflight, supervisor
from allranks.launch.console import note, say
from allranks.launch.outcome import Outcome
from allranks.launch.plan import Plan, Request, make_plan
from allranks.run import checkpoint
from allranks.run import directory as rundir

MOST_WITHOUT_GAIN = 3  # crashes in a row at one step: the next start would crash there too
# Hosts are tried in so many groups at a time. 16 find one bad host of 4,096 in three rounds, and 16
# launchers at once are no load for the host that they start from.
GROUPS = 16
LOOK_S = 2.0  # for the checkpoints' names, once a signal has ended the launch
TRY_S = 15.0  # for the launcher to start one process on each host of a group


@dataclass(frozen=True)
class Launch:
    """What is asked for, and what `allranks launch` has found for it."""

    request: Request
    machine: Machine
    allocation: Allocation
    environ: Mapping[str, str]
    directory: str | None = None  # the run directory of a training; None for another program
    config: Config | None = None  # of a training
    max_restarts: int = 0
    min_ranks: int | None = None  # None: every host is needed
    grace_s: float | None = None  # from a signal to SIGKILL; None: what the program is known to need
    is_quiet: bool = False  # whether only warnings, errors and the last line are shown
    # One for all attempts: a restarted training may take over the run directory of the one before at once.
    id: str = field(default_factory=partial(secrets.token_hex, 8))

    def plan(self, hosts: tuple[Host, ...] = (), **changes: str) -> Plan:
        """The plan for all that is asked for, or for the ranks that `hosts` have; its files are written.

        `changes` are fields of the request that differ. Raises UserError where the plan cannot be had.
        """
        request = replace(self.request, placed=hosts, passed=(*variables.PRIVATE, variables.LAUNCH_ID))
        if self.directory is not None:
            request = replace(request, hosts_path=str(Path(self.directory) / "hosts"))
        request = replace(request, **changes)  # type: ignore[arg-type]
        plan = make_plan(request, self.machine, self.allocation, self.environ)
        for path, content in plan.files:
            with rundir.writing(str(Path(path).parent)):
                Path(path).write_text(content)
        return plan

    def environment(self, plan: Plan) -> dict[str, str]:
        """The whole environment of the command that starts the ranks."""
        # Open MPI is told to hand these on, and warns of those that are not set.
        unset = dict.fromkeys(variables.PRIVATE, "")
        for_step = scheduler.step_environment(self.allocation.scheduler)
        around = plan.environment(launchers.without_outer_step(self.environ))
        return {**unset, **for_step, **around, variables.LAUNCH_ID: self.id}

    def grace(self) -> float:
        """Seconds from a signal that ends the launch to SIGKILL.

        A training has as long as its own watchdog allows it for a step and for a save. A rank that hangs is
        ended by the watchdog before.
        """
        if self.grace_s is not None:
            return self.grace_s
        if self.config is None:
            return supervisor.GRACE_S
        watchdog = self.config.watchdog
        return (watchdog.step_s or watchdog.first_step_s) + watchdog.save_s

    def has_enough(self, hosts: Sequence[Host]) -> bool:
        """Whether `hosts` have as many ranks as --min-ranks asks for. Without it nothing is enough."""
        return self.min_ranks is not None and sum(host.slots for host in hosts) >= self.min_ranks


# --- one attempt after another -------------------------------------------------------------------


class Next(enum.Enum):
    """What follows an attempt."""

    END = enum.auto()  # the launch ends as the attempt has ended
    GIVE_UP = enum.auto()  # restarts are left, but the last ones have gained nothing
    RESTART = enum.auto()


@dataclass(frozen=True)
class TrainingProgress:
    """How far a training has come, and how often it has crashed there."""

    step: int  # of the newest checkpoint; 0 without one
    crashes_without_gain: int = 0  # in a row

    def after_crash(self, step: int) -> TrainingProgress:
        """The progress after a crash that left `step` as the newest checkpoint's."""
        return TrainingProgress(step, self.crashes_without_gain + 1 if step == self.step else 0)


def is_crash(outcome: Outcome) -> bool:
    """Whether another start may help.

    It does not after success, after the user's mistake, after a stop in order (exit code 85: the job is at
    its end), and after a signal to this process.
    """
    return outcome.code not in (0, EXIT_USER_ERROR, EXIT_REQUEUE) and not outcome.stopped


def what_next(outcome: Outcome, restarts_left: int, progress: TrainingProgress | None) -> Next:
    """What follows an attempt that has ended like this. `progress` is None where nobody counts steps."""
    if not is_crash(outcome) or restarts_left == 0:
        return Next.END
    if progress is not None and progress.crashes_without_gain >= MOST_WITHOUT_GAIN:
        return Next.GIVE_UP
    return Next.RESTART


def run(launch: Launch, check: bool) -> int:
    """Starts the ranks and watches over them, after a preflight if `check`; the exit code.

    After a crash the ranks are started again, if restarts are left. Raises UserError where they cannot be
    started at all.
    """
    plan = launch.plan()
    if check:
        plan = _checked(launch, plan)
    progress = TrainingProgress(newest_step(launch)) if launch.config else None

    for attempt in itertools.count(1):
        outcome = _attempt(launch, plan)
        if progress is not None and is_crash(outcome):
            progress = progress.after_crash(newest_step(launch))

        restarts_left = launch.max_restarts - (attempt - 1)
        decision = what_next(outcome, restarts_left, progress)
        if decision is Next.END:
            break
        if decision is Next.GIVE_UP:
            assert progress is not None
            say(
                f"{outcome.failure} This was the third crash without a step gained (step "
                f"{progress.step}): look at what fails there. Nothing is started again."
            )
            return EXIT_STUCK

        gone = _gone_for_good(launch, plan, outcome)
        if gone:
            left = _without(plan.hosts, gone)
            if not launch.has_enough(left):
                break
            plan = launch.plan(left)
        say(_about_restart(outcome, gone, progress, attempt, launch.max_restarts))

    _say_last(launch, outcome)
    return outcome.code


def _say_last(launch: Launch, outcome: Outcome) -> None:
    """The last line: what has failed, and for a training that was killed what is left of it.

    After a signal the process is to end, whether or not somebody reads that line, and whether or not the
    file system with the checkpoints answers.
    """
    failure = outcome.failure
    if outcome.stopped and failure and launch.config:
        step = files.within(LOOK_S, partial(newest_step, launch))
        if step == 0:
            failure += " Nothing was saved: there is no checkpoint yet."
        elif step is not None:
            failure += f" Nothing was saved at the end: the newest checkpoint is of step {step}."
    if failure:
        say(failure, within_s=supervisor.UNREAD_S if outcome.stopped else None)


def _attempt(launch: Launch, plan: Plan) -> Outcome:
    return supervisor.run(
        plan.argv,
        launch.environment(plan),
        launch.directory,
        world_size=plan.world_size,
        hosts=[host.name for host in plan.hosts],
        grace_s=launch.grace(),
        # A training stops on either signal in the same way. But while it still starts, Python would answer
        # a SIGINT with a traceback of every rank.
        interrupts=launch.config is None,
        ask_scheduler=partial(scheduler.is_suspended, launch.environ),
    )


def _about_restart(
    outcome: Outcome, gone: Sequence[str], progress: TrainingProgress | None, number: int, of: int
) -> str:
    """One line that says why the ranks are started again, on what, and from which step."""
    parts = [outcome.failure]
    if gone:
        parts.append(f"Going on without {some(gone)}.")
    if progress is not None:
        parts.append(f"From step {progress.step}:")
    parts.append(f"restart {number} of {of}.")
    return " ".join(parts)


def newest_step(launch: Launch) -> int:
    """The step of the training's newest checkpoint, by its name alone; 0 without one."""
    if launch.directory is None:
        return 0
    return max(checkpoint.steps(launch.directory), default=0)


# --- hosts that are not there --------------------------------------------------------------------


def _checked(launch: Launch, plan: Plan) -> Plan:
    """The plan after the preflight, without the hosts that are not there if enough ranks are left.

    Raises UserError with what is wrong where the preflight finds something else, or where too few are left.
    """
    try:
        line = preflight.check(
            plan.argv_for,
            launch.environment(plan),
            world_size=plan.world_size,
            hosts=[host.name for host in plan.hosts],
            config=launch.config,
            run_dir=launch.directory,
        )
    except preflight.HostsUnreached as error:
        gone = _to_blame(launch, plan, error.gone)
        if not gone:
            raise
        left = _without(plan.hosts, gone)
        if not left and error.said:
            raise UserError(_refusal(launch, plan, error.said)) from error
        if not launch.has_enough(left):
            raise UserError(
                f"preflight: {some(gone)} cannot be reached: nothing can be started there. Take "
                f"it out of the job, or allow fewer ranks with --min-ranks.\n{error}{_hint(launch, plan)}"
            ) from error
        say(f"{some(gone)} cannot be reached: going on without.")
        return _checked(launch, launch.plan(left))
    if not launch.is_quiet:
        note(line)
    return plan


def _refusal(launch: Launch, plan: Plan, said: str) -> str:
    """What to tell the user where the launcher starts nothing anywhere: its own words explain that best."""
    hosts = [host.name for host in plan.hosts]
    return (
        f"preflight: {plan.launcher} starts nothing on {some(hosts)}. It says:\n{said}{_hint(launch, plan)}"
    )


def _hint(launch: Launch, plan: Plan) -> str:
    """What else may help where hosts cannot be reached; empty, or a line of its own."""
    reaches_others_by_ssh = plan.dialect == "hydra" and len(plan.hosts) > 1
    instead = scheduler.instead_of_ssh(launch.allocation.scheduler)
    if not reaches_others_by_ssh or (shutil.which("ssh") is not None and not instead):
        return ""
    return (
        "\nmpiexec of MPICH reaches other hosts by ssh: does `ssh HOST` work here without a password? In a "
        "job of PBS it can use pbsdsh instead; docs/launch.md shows how."
    )


def _gone_for_good(launch: Launch, plan: Plan, outcome: Outcome) -> Sequence[str]:
    """The hosts that the next attempt is to do without: none without --min-ranks."""
    if launch.min_ranks is None or not outcome.gone:
        return ()
    return _to_blame(launch, plan, outcome.gone)


def _without(hosts: Sequence[Host], gone: Sequence[str]) -> tuple[Host, ...]:
    return tuple(host for host in hosts if host.name not in gone)


def _to_blame(launch: Launch, plan: Plan, silent: Sequence[str]) -> Sequence[str]:
    """The hosts that are not there, among the `silent` ones, of which nothing was heard.

    If other hosts were heard of, all silent ones are taken to be gone. If no host was heard of, the
    launcher may have given up because of a single one: then each is tried.
    """
    if len(silent) < len(plan.hosts):
        return silent
    return unreachable(silent, partial(_try_groups, launch, plan))


def unreachable(
    hosts: Sequence[str], fails: Callable[[Sequence[Sequence[str]]], Sequence[bool]]
) -> list[str]:
    """The hosts among `hosts` where nothing can be started, in order.

    `fails` tries several groups of hosts at the same time, and says of each whether the launcher failed to
    start something on all of its hosts. A group that fails is tried again in smaller ones, until a single
    host is left.
    """
    size = -(-len(hosts) // GROUPS)  # rounded up
    groups = [hosts[first : first + size] for first in range(0, len(hosts), size)]
    found: list[str] = []
    for group, failed in zip(groups, fails(groups), strict=True):
        if failed and len(group) == 1:
            found += group
        elif failed:
            found += unreachable(group, fails)
    return found


def _try_groups(launch: Launch, plan: Plan, groups: Sequence[Sequence[str]]) -> list[bool]:
    """For each group of hosts whether the launcher fails to start one process on each of them."""
    launcher = plan.launcher
    if launcher == "torchrun":  # takes seconds to start, and is itself started by one of these
        launcher = scheduler.launchers(launch.allocation.scheduler)[0]
    before = processes.descendants(os.getpid())
    with tempfile.TemporaryDirectory(prefix="allranks-") as folder:
        started: list[subprocess.Popen[bytes]] = []
        for number, group in enumerate(groups):
            one_each = tuple(Host(name, 1) for name in group)
            # Each has a file of its own for its hosts, where they are too many for an argument.
            trial = launch.plan(one_each, launcher=launcher, hosts_path=f"{folder}/{number}")
            started.append(
                subprocess.Popen(
                    trial.argv_for([sys.executable, "-c", ""]),
                    env=launch.environment(trial),
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.DEVNULL,
                )
            )
        deadline = time.monotonic() + TRY_S
        failed = [_has_failed(one, deadline) for one in started]
        processes.kill_descendants(spare=before)
    return failed


def _has_failed(started: subprocess.Popen[bytes], deadline: float) -> bool:
    """Whether a launcher has ended with an error, or not at all until `deadline`."""
    try:
        return started.wait(max(0.0, deadline - time.monotonic())) != 0
    except subprocess.TimeoutExpired:
        started.terminate()  # srun and mpiexec then end what they have started
        return True
