"""The attempts of one launch: hosts are looked at, ranks started, and after a crash started again.

plan      which command starts which ranks where
preflight is every host fit for it? With --min-ranks, hosts that cannot be reached are left out
attempt   the ranks run, and the supervisor watches over them until all have ended
decide    done, or a restart, or no more restarts because none of the last ones gained a step
restart   spares take the place of hosts that are gone or have failed twice; without spares the run goes
          on without those hosts, if enough ranks are left; back to `attempt`
"""

from __future__ import annotations

import contextlib
import enum
import itertools
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import NamedTuple

from allranks.base import files, processes
from allranks.base.errors import EXIT_REQUEUE, EXIT_STUCK, EXIT_USER_ERROR, UserError
from allranks.base.text import some
from allranks.config import Config
from allranks.job import scheduler, variables
from allranks.job.hosts import Allocation, Host, is_this_host, short
from allranks.job.machine import Machine
from allranks.launch import launchers, output, preflight, supervisor
from allranks.launch.console import note, say
from allranks.launch.outcome import Outcome, planned_hosts
from allranks.launch.plan import Plan, Request, make_plan, place, room_on
from allranks.run import checkpoint, program_progress

MOST_WITHOUT_GAIN = 3  # crashes in a row at one step: the next start would crash there too
MOST_FAILURES_OF_A_HOST = 2  # one may be bad luck; a host with more is left out, if the run can do without
# Hosts are tried in so many groups at a time. 16 find one bad host of 4,096 in three rounds, and 16
# launchers at once put no load on the host that they start from.
GROUPS = 16
LOOK_S = 2.0  # how long the names of the checkpoints may take to read, once a signal has ended the launch
TRY_S = 15.0  # how long the launcher may take to start one process on each host of a group
END_S = 1.0  # from SIGTERM to SIGKILL: that launcher must end its processes on other hosts first


@dataclass(frozen=True)
class Launch:
    """What the user asks for, and the machine, hosts and configuration found for it."""

    request: Request
    machine: Machine
    allocation: Allocation
    environ: Mapping[str, str]
    directory: str | None = None  # the run directory of a training; None for another program
    config: Config | None = None  # of a training
    max_restarts: int = 0
    min_ranks: int | None = None  # None: every host is needed
    grace_s: float | None = None  # from a signal to SIGKILL; None: what the program is known to need
    start_s: float | None = None  # every rank must have started within this time; None: the defaults
    idle_s: float | None = None  # a program that does nothing for so long is ended; None: never
    is_quiet: bool = False  # whether only warnings, errors and the last line are shown
    # One for all attempts: a restarted training may take over the run directory of the one before at once.
    id: str = field(default_factory=partial(secrets.token_hex, 8))

    def plan(self, hosts: tuple[Host, ...] = (), **changes: str) -> Plan:
        """Makes the plan for all ranks, or only for those of `hosts`, and writes the files that it needs.

        `changes` are fields of the request that differ. Raises UserError if no such plan can be made.
        """
        request = replace(self.request, placed=hosts, passed=(*variables.PRIVATE, variables.LAUNCH_ID))
        request = replace(request, hosts_path=str(self.folder / "hosts"))
        request = replace(request, **changes)  # type: ignore[arg-type]
        environ = dict(self.environ)
        if hosts and hosts[0].name != place(self.request, self.machine, self.allocation)[0].name:
            # The user's address is that of rank 0's host, and rank 0 is on another host now.
            environ.pop(variables.MASTER_ADDR, None)
        plan = make_plan(request, self.machine, self.allocation, environ)
        for path, content in plan.files:
            try:
                Path(path).parent.mkdir(mode=0o700, exist_ok=True)
                Path(path).write_text(content)
            except OSError as error:
                raise UserError(
                    f"{path}, from which the launcher reads the hosts, cannot be written "
                    f"({error.strerror}): free some space there, or set TMPDIR to another folder."
                ) from error
        return plan

    @property
    def folder(self) -> Path:
        """The folder to which this launch writes the files that its launcher reads; it may not exist yet.

        No other launch may write there: a second job would put its own hosts into the file that the first
        job's launcher is about to read.
        """
        asked = Path(self.environ.get("TMPDIR") or "/tmp")
        there = asked if asked.is_dir() else Path("/tmp")  # a job may have the login host's TMPDIR
        return there / f"allranks-{self.id}"

    def environment(self, plan: Plan) -> dict[str, str]:
        """The whole environment of the command that starts the ranks."""
        # Open MPI is told to hand these on, and warns of those that are not set.
        unset = dict.fromkeys(variables.PRIVATE, "")
        for_step = scheduler.step_environment(self.allocation.scheduler)
        around = plan.environment(launchers.without_outer_step(self.environ))
        return {**unset, **for_step, **around, variables.LAUNCH_ID: self.id}

    def grace(self) -> float:
        """Seconds from a signal that ends the launch to SIGKILL.

        A training gets as long as its own watchdog allows for a step and a save. If a rank hangs, the
        watchdog ends it earlier.
        """
        if self.grace_s is not None:
            return self.grace_s
        if self.config is None:
            return supervisor.GRACE_S
        watchdog = self.config.watchdog
        return (watchdog.step_s or watchdog.first_step_s) + watchdog.save_s

    @property
    def may_replace(self) -> bool:
        """Whether an unused host may take the place of one that is gone.

        Only if an option of the user says that the run may go on in another way than it was started.
        """
        return bool(self.max_restarts or self.request.spares or self.min_ranks is not None)

    def room_on(self, name: str) -> int | None:
        """The most ranks that a host of the allocation takes; None if no limit is known."""
        [host] = [host for host in self.allocation.hosts if host.name == name]
        return room_on(host, self.machine, self.allocation)

    def has_enough(self, hosts: Sequence[Host]) -> bool:
        """Whether `hosts` have as many ranks as --min-ranks asks for; False if it was not given."""
        return self.min_ranks is not None and sum(host.slots for host in hosts) >= self.min_ranks


# --- one attempt after another -------------------------------------------------------------------


@dataclass
class HostRecord:
    """What one launch has learned about the hosts, from one attempt to the next."""

    out: set[str] = field(default_factory=set)  # no rank is started on these any more
    # For each host, how often a rank there was the first to fail.
    failures: Counter[str] = field(default_factory=Counter)

    def note_failure(self, plan: Plan, outcome: Outcome) -> list[str]:
        """Counts the failure of a host. Returns that host if it has failed twice or more, else nothing.

        A rank reports its host's own name. It may be longer or shorter than the name in the allocation, or
        a different one. If no name fits, the numbers of the ranks on that host tell which host of the plan
        it is.
        """
        if not outcome.failed_host:
            return []
        failed = [host.name for host in plan.hosts if short(host.name) == short(outcome.failed_host)]
        if not failed:
            its_ranks = {rank: name for rank, name in outcome.hosts.items() if name == outcome.failed_host}
            planned = set(planned_hosts(plan.host_of_each_rank, its_ranks).values())
            # If several hosts have this name, nobody knows which of them is to blame.
            failed = list(planned) if len(planned) == 1 else []
        self.failures.update(failed)
        return [name for name in failed if self.failures[name] >= MOST_FAILURES_OF_A_HOST]


class Next(enum.Enum):
    """What follows an attempt."""

    END = enum.auto()  # the launch ends as the attempt has ended
    GIVE_UP = enum.auto()  # restarts are left, but the last ones have gained nothing
    RESTART = enum.auto()


@dataclass(frozen=True)
class TrainingProgress:
    """How far a training has come, and how often it has crashed there."""

    step: int  # the step of the newest checkpoint; 0 without one
    crashes_without_gain: int = 0  # how many crashes in a row have gained no step

    def after_crash(self, step: int) -> TrainingProgress:
        """The progress after a crash that left `step` as the newest checkpoint's."""
        return TrainingProgress(step, self.crashes_without_gain + 1 if step == self.step else 0)


def is_crash(outcome: Outcome) -> bool:
    """Whether another start may help.

    Another start does not help after success, after a mistake of the user, and after an orderly stop (exit
    code 85: the job is at its end). Nor is it wanted after a signal to this process, or if nobody reads the
    output any more.
    """
    return outcome.code not in (0, EXIT_USER_ERROR, EXIT_REQUEUE) and not outcome.stopped


def what_next(outcome: Outcome, restarts_left: int, progress: TrainingProgress | None) -> Next:
    """What follows an attempt with this outcome. `progress` is None if the program is not our training."""
    if not is_crash(outcome) or restarts_left == 0:
        return Next.END
    if progress is not None and progress.crashes_without_gain >= MOST_WITHOUT_GAIN:
        return Next.GIVE_UP
    return Next.RESTART


class Ended(NamedTuple):
    """How a launch has ended, after its last attempt."""

    code: int  # the exit code
    was_stopped: bool  # whether a signal stopped it, or nobody reads its output any more


def run(launch: Launch, check: bool) -> Ended:
    """Starts the ranks and watches over them, after a preflight if `check`.

    After a crash the ranks are started again, if restarts are left. Raises UserError if they cannot be
    started at all.
    """
    try:
        return _run(launch, check)
    finally:
        shutil.rmtree(launch.folder, ignore_errors=True)


def _run(launch: Launch, check: bool) -> Ended:
    plan = launch.plan()
    record = HostRecord()
    if check:
        plan = _checked(launch, plan, record)
    progress = _progress_so_far(launch) if launch.config else None

    for attempt in itertools.count(1):
        outcome = _attempt(launch, plan)
        if launch.config is None and launch.directory is not None:
            _note_progress(launch.directory, outcome.progress)
        if progress is not None and is_crash(outcome):
            try:
                progress = progress.after_crash(newest_step(launch))
            except OSError as error:
                say(f"{outcome.failure} {_about_unreadable(launch, error)} Nothing is started again.")
                return Ended(outcome.code, outcome.stopped)

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
            return Ended(EXIT_STUCK, False)

        gone = _gone_for_good(launch, plan, outcome, record)
        failed_twice = [name for name in record.note_failure(plan, outcome) if name not in gone]
        change = _change(launch, plan, gone, failed_twice, record)
        if change.left_over and launch.min_ranks is not None:
            break  # hosts are gone, and the ranks of those that are left are too few
        if change.hosts != plan.hosts:
            try:
                plan = launch.plan(change.hosts)
            except UserError as error:  # not every launcher can start the ranks on these hosts
                without = " ".join([outcome.failure, *change.sentences()])
                say(f"{without} But there nothing can be started: {error}")
                return Ended(outcome.code, outcome.stopped)
        say(_about_restart(outcome, change, progress, attempt, launch.max_restarts))

    _say_last(launch, outcome)
    return Ended(outcome.code, outcome.stopped)


def _note_progress(directory: str, calls: int) -> None:
    """Writes to the run directory how often a program has called heartbeat() and should_stop().

    A job that stops in time is followed by another one only if this number has grown.
    """
    try:
        program_progress.add(directory, calls)
    except OSError as error:
        say(f"{directory} cannot be written ({error.strerror}): no other job will go on with this one.")


def _say_last(launch: Launch, outcome: Outcome) -> None:
    """Prints the last line: what has failed and, if a signal ended a training, which step is saved.

    After a signal this process must end, even if nobody reads the line, and even if the file system with
    the checkpoints does not answer. So both have a time limit then.
    """
    failure = outcome.failure
    if outcome.stopped and failure and launch.config:
        try:
            step = files.within(LOOK_S, partial(newest_step, launch))
        except OSError as error:
            failure += f" {_about_unreadable(launch, error)}"
        else:
            if step == 0:
                failure += " Nothing was saved: there is no checkpoint yet."
            elif step is not None:
                failure += f" Nothing was saved at the end: the newest checkpoint is of step {step}."
    if failure:
        say(failure, within_s=output.UNREAD_S if outcome.stopped else None)


def _attempt(launch: Launch, plan: Plan) -> Outcome:
    return supervisor.run(
        plan.argv,
        launch.environment(plan),
        launch.directory,
        world_size=plan.world_size,
        hosts=plan.host_of_each_rank,
        start_s=launch.start_s or supervisor.START_S,
        grace_s=launch.grace(),
        # A training stops on either signal in the same way. But while it still starts, Python would answer
        # a SIGINT with a traceback of every rank.
        interrupts=launch.config is None,
        idle_s=launch.idle_s,
        watches=launch.config is None,  # a training has a watchdog of its own, and agrees on its end itself
        ask_scheduler=partial(scheduler.is_suspended, launch.environ),
    )


def _about_restart(
    outcome: Outcome, change: Change, progress: TrainingProgress | None, number: int, of: int
) -> str:
    """One line that says why the ranks are started again, on what, and from which step."""
    parts = [outcome.failure, *change.sentences()]
    if progress is not None:
        parts.append(f"From step {progress.step}:")
    parts.append(f"restart {number} of {of}.")
    return " ".join(parts)


def newest_step(launch: Launch) -> int:
    """The step of the training's newest checkpoint, by its name alone; 0 without one.

    Raises OSError if the checkpoints cannot be listed.
    """
    if launch.directory is None:
        return 0
    return max(checkpoint.steps(launch.directory), default=0)


def _progress_so_far(launch: Launch) -> TrainingProgress:
    """How far the training has come before the first attempt.

    Raises UserError if its checkpoints cannot be listed.
    """
    try:
        return TrainingProgress(newest_step(launch))
    except OSError as error:
        raise UserError(
            f"{_about_unreadable(launch, error)} Look at its file system and at its permissions, or give "
            "another run.dir."
        ) from error


def _about_unreadable(launch: Launch, error: OSError) -> str:
    """A sentence that says that the checkpoints cannot be listed, and why."""
    return f"The checkpoints in run.dir={launch.directory} cannot be read ({error.strerror})."


# --- hosts that are not there --------------------------------------------------------------------


def _checked(launch: Launch, plan: Plan, record: HostRecord) -> Plan:
    """The plan after the preflight.

    Spares take the place of hosts that are not there or not fit. Without spares the run goes on without
    hosts that are not there, if enough ranks are left. Raises UserError with what is wrong otherwise.
    """
    try:
        line = preflight.check(
            plan.argv_for,
            launch.environment(plan),
            world_size=plan.world_size,
            hosts=plan.host_of_each_rank,
            config=launch.config,
            run_dir=launch.directory,
            start_s=launch.start_s,
        )
    except preflight.HostsUnreached as error:
        gone = _to_blame(launch, plan, error.gone)
        if not gone:
            raise
        if len(gone) == len(plan.hosts) and error.said:
            raise UserError(_refusal(launch, plan, error.said)) from error
        change = _change(launch, plan, gone, (), record)
        if change.left_over:
            raise UserError(
                f"preflight: {some(gone)} cannot be reached: nothing can be started there. Take it out of "
                "the job, allow fewer ranks with --min-ranks, or keep more nodes aside with --spares."
                f"\n{error}{_hint(launch, plan)}"
            ) from error
        try:
            on_others = launch.plan(change.hosts)
        except UserError as why:  # not every launcher can start the ranks on the hosts that are left
            raise UserError(
                f"preflight: {some(gone)} cannot be reached, and without it nothing can be started: {why}"
                f"\n{error}{_hint(launch, plan)}"
            ) from error
        say(" ".join([f"{some(gone)} cannot be reached.", *change.sentences()]))
        return _checked(launch, on_others, record)
    except preflight.HostsUnfit as error:
        change = _change(launch, plan, (), error.hosts, record)
        if not error.hosts or set(error.hosts) - change.replaced.keys():
            raise
        try:
            on_others = launch.plan(change.hosts)
        except UserError as why:
            raise UserError(f"{error}\nWithout it nothing can be started: {why}") from error
        say(f"{error}\n{' '.join(change.sentences(why='is not fit'))}")
        return _checked(launch, on_others, record)
    if not launch.is_quiet:
        note(line)
    return plan


def _refusal(launch: Launch, plan: Plan, said: str) -> str:
    """The message if the launcher can start nothing on any host. It quotes what the launcher says."""
    hosts = [host.name for host in plan.hosts]
    return (
        f"preflight: {plan.launcher} starts nothing on {some(hosts)}. It says:\n{said}{_hint(launch, plan)}"
    )


def _hint(launch: Launch, plan: Plan) -> str:
    """Further advice for a message that hosts cannot be reached: a line of its own, or nothing."""
    reaches_others_by_ssh = plan.dialect == "hydra" and len(plan.hosts) > 1
    instead = scheduler.instead_of_ssh(launch.allocation.scheduler)
    if not reaches_others_by_ssh or (shutil.which("ssh") is not None and not instead):
        return ""
    return (
        "\nmpiexec of MPICH reaches other hosts by ssh: does `ssh HOST` work here without a password? In a "
        "job of PBS it can use pbsdsh instead; docs/launch.md shows how."
    )


def _gone_for_good(launch: Launch, plan: Plan, outcome: Outcome, record: HostRecord) -> Sequence[str]:
    """The hosts that cannot be reached, so that the next attempt must do without them.

    Empty if the launch has neither a spare host nor --min-ranks: the ranks are then started again on the
    same hosts.
    """
    if not outcome.gone or (launch.min_ranks is None and not _spares(launch, plan, record)):
        return ()
    return _to_blame(launch, plan, outcome.gone)


@dataclass(frozen=True)
class Change:
    """The hosts of the next attempt, and how they differ from those of the attempt before."""

    hosts: tuple[Host, ...]
    replaced: Mapping[str, str]  # for each host that is no longer used, the spare that takes its place
    dropped: Sequence[str]  # hosts that are no longer used and not replaced: their ranks no longer exist
    left_over: Sequence[str]  # hosts that cannot be reached, but cannot be replaced or dropped either
    failed_twice: Sequence[str] = ()  # hosts replaced or dropped because a rank there has failed twice

    def sentences(self, why: str = "has failed twice") -> list[str]:
        """What has changed, in sentences; `why` says what was wrong with the hosts that are not gone."""
        found = [f"{name} {why}." for name in self.failed_twice]
        for name, spare in self.replaced.items():
            found.append(f"{spare} takes the place of {name}.")
        if self.dropped:
            found.append(f"Going on without {some(self.dropped)}.")
        return found


def _change(
    launch: Launch, plan: Plan, gone: Sequence[str], failed_twice: Sequence[str], record: HostRecord
) -> Change:
    """The hosts for the next attempt, where some are `gone` and others have failed too often.

    First each of them is replaced by a spare, if there is one on which something can be started. If
    there are too few spares, the run shrinks if --min-ranks allows it. A host that has failed twice, and
    that the run cannot do without, is used again: it may be well, and the program at fault.
    """
    record.out.update(gone)
    spares = _spares(launch, plan, record)
    replaced = replacements(plan.hosts, [*gone, *failed_twice], spares)
    while replaced:
        # A spare has been idle since the job began, and may itself be down.
        dead = unreachable(list(replaced.values()), partial(_try_groups, launch, plan))
        if not dead:
            break
        record.out.update(dead)
        spares = [host for host in spares if host.name not in dead]
        replaced = replacements(plan.hosts, [*gone, *failed_twice], spares)

    not_replaced = [name for name in (*gone, *failed_twice) if name not in replaced]
    dropped = _dropped(launch, plan, not_replaced, gone)
    left_over = [name for name in gone if name not in replaced and name not in dropped]
    record.out.update(replaced, dropped)
    order = [host.name for host in launch.allocation.hosts]
    return Change(
        hosts=placed_anew(launch.room_on, order, plan.hosts, replaced, dropped),
        replaced=replaced,
        dropped=dropped,
        left_over=left_over,
        failed_twice=[name for name in failed_twice if name in replaced or name in dropped],
    )


def _dropped(launch: Launch, plan: Plan, not_replaced: Sequence[str], gone: Sequence[str]) -> Sequence[str]:
    """The hosts without which the run goes on: all that were not replaced, or only those that are gone.

    Empty if too few ranks would be left: the run cannot go on without any of these hosts.
    """
    must = [name for name in not_replaced if name in gone]
    for dropped in (not_replaced, must):
        if launch.has_enough([host for host in plan.hosts if host.name not in dropped]):
            return dropped
    return ()


def _spares(launch: Launch, plan: Plan, record: HostRecord) -> list[Host]:
    """The hosts that may take the place of others, each with the most ranks that it takes as its slots."""
    if not launch.may_replace:
        return []
    most = max(host.slots for host in plan.hosts)
    found = []
    for host in plan.spares:
        if host.name not in record.out:
            room = launch.room_on(host.name)
            found.append(Host(host.name, most if room is None else room))
    return found


def replacements(hosts: Sequence[Host], bad: Sequence[str], spares: Sequence[Host]) -> dict[str, str]:
    """For each of the `bad` hosts the first spare left that has room for its ranks, if there is one."""
    left = list(spares)
    found: dict[str, str] = {}
    for host in hosts:
        fitting = [spare for spare in left if spare.slots >= host.slots]
        if host.name in bad and fitting:
            found[host.name] = fitting[0].name
            left.remove(fitting[0])
    return found


def placed_anew(
    room_on: Callable[[str], int | None],
    order: Sequence[str],
    hosts: Sequence[Host],
    replaced: Mapping[str, str],
    dropped: Sequence[str],
) -> tuple[Host, ...]:
    """The hosts with the `replaced` ones exchanged and the `dropped` ones left out.

    They stand in the allocation's order, `order`: srun numbers the ranks in that order whatever it is told,
    and rank 0 has to be on the first of them. The numbers of ranks stay in their own order where each host
    has room for its new number, because some launchers take fewer ranks on the last host only. `room_on`
    gives the most ranks that a host takes, or None if that is not known.
    """
    kept = [host for host in hosts if host.name not in dropped]
    moved = [Host(replaced.get(host.name, host.name), host.slots) for host in kept]
    in_order = sorted(moved, key=lambda host: order.index(host.name))
    again = tuple(Host(new.name, old.slots) for new, old in zip(in_order, kept, strict=True))
    rooms = [room_on(host.name) for host in again]
    if all(room is None or host.slots <= room for host, room in zip(again, rooms, strict=True)):
        return again
    return tuple(in_order)


def _to_blame(launch: Launch, plan: Plan, silent: Sequence[str]) -> Sequence[str]:
    """Those of the `silent` hosts that cannot be reached. From a silent host no rank has reported.

    If ranks of other hosts have reported, all silent hosts are taken to be gone. If no rank has reported at
    all, the launcher may have given up because of a single host. Then something is started on the hosts, to
    find out which of them it is.
    """
    if len(silent) < len(plan.hosts):
        return silent
    if plan.launcher == "torchrun" and len(silent) == 1 and is_this_host(silent[0]):
        # torchrun was started by no other launcher, so its ranks are on this host, which is obviously up.
        return ()
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
    """For each group of hosts whether the launcher fails to start one process on each of them.

    If nothing can be tried, the answer is False for every group. Then no host is named, and the caller
    reports the failure that it has seen before.
    """
    launcher = _trial_launcher(launch, plan)
    if launcher is None:
        return [False] * len(groups)
    before = processes.descendants(os.getpid())
    with tempfile.TemporaryDirectory(prefix="allranks-") as folder:
        trials: list[Plan] = []
        try:
            for number, group in enumerate(groups):
                one_each = tuple(Host(name, 1) for name in group)
                # Each has a file of its own for its hosts, where they are too many for an argument.
                trials.append(launch.plan(one_each, launcher=launcher, hosts_path=f"{folder}/{number}"))
        except UserError:  # this launcher cannot start a part of the ranks here
            return [False] * len(groups)

        started: list[subprocess.Popen[bytes]] = []
        for trial in trials:
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
        _wait_for_all(started, END_S)
        processes.kill_descendants(spare=before)
    return failed


def _trial_launcher(launch: Launch, plan: Plan) -> str | None:
    """The launcher with which some of the hosts can be tried; None if no launcher here can do that.

    The plan's own launcher is used if it can start a process on some of the hosts alone. Torchrun is not
    used: it takes seconds to start, and needs another launcher to reach other hosts. Nor is an mpiexec that
    must not be told the hosts, because it always uses all of them.
    """
    unfit = {"torchrun"}
    if not launch.machine.options.name_hosts:
        unfit.add("mpiexec")
    if plan.launcher not in unfit:
        return plan.launcher
    for name in scheduler.launchers(launch.allocation.scheduler):
        if name not in unfit and launchers.is_installed(name):
            return name
    return None


def _has_failed(started: subprocess.Popen[bytes], deadline: float) -> bool:
    """Whether a launcher has ended with an error, or not at all until `deadline`."""
    try:
        return started.wait(max(0.0, deadline - time.monotonic())) != 0
    except subprocess.TimeoutExpired:
        started.terminate()  # srun and mpiexec then end what they have started
        return True


def _wait_for_all(started: Sequence[subprocess.Popen[bytes]], within_s: float) -> None:
    """Waits until all these processes have ended, but at most `within_s` seconds."""
    deadline = time.monotonic() + within_s
    for one in started:
        with contextlib.suppress(subprocess.TimeoutExpired):
            one.wait(max(0.0, deadline - time.monotonic()))
