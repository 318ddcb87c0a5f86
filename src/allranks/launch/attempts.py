"""The ranks of one run: looked at beforehand, started, and after a crash started again."""

from __future__ import annotations

import itertools
import os
import secrets
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from allranks.base import processes
from allranks.base.errors import EXIT_REQUEUE, EXIT_STUCK, EXIT_USER_ERROR, UserError
from allranks.config import Config
from allranks.job import variables
from allranks.job.hosts import Allocation, Host
from allranks.job.machine import Machine
from allranks.launch import preflight, supervisor
from allranks.launch.plan import Plan, Request, make_plan
from allranks.run import checkpoint
from allranks.run import directory as rundir

MOST_STUCK = 3
ALONE_S = 15.0  # for a host that is tried alone
GROUPS = 16  # of hosts that are tried at the same time


@dataclass(frozen=True)
class Launch:
    """What is asked for, and what `allranks launch` has found for it; `directory` is a training's."""

    request: Request
    machine: Machine
    allocation: Allocation
    environ: Mapping[str, str]
    directory: str | None = None
    config: Config | None = None
    max_restarts: int = 0
    min_ranks: int | None = None
    # that of all its attempts: a restart may take its run over at once
    id: str = field(default_factory=partial(secrets.token_hex, 8))

    def plan(self, hosts: tuple[Host, ...] = (), **changes: str) -> Plan:
        """Of all that is asked for, or of the ranks that `hosts` have."""
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
        unset = dict.fromkeys(variables.PRIVATE, "")  # Open MPI warns of those that it cannot hand on
        # A step may share the CPUs of one before it that Slurm still takes for running. Read by srun, which
        # mpiexec calls, too.
        overlap = {"SLURM_OVERLAP": "1"} if self.allocation.scheduler == "slurm" else {}
        return {**unset, **overlap, **plan.environment(self.environ), variables.LAUNCH_ID: self.id}


def run(launch: Launch, check: bool) -> int:
    """Starts the ranks and watches over them; the exit code.

    After a crash they are started again, if restarts are left: after any end but exit code 0, 2 or 85 and
    a signal to this process.
    """
    plan = _fit(launch, launch.plan()) if check else launch.plan()
    step, stuck = newest_step(launch), 0
    for attempt in itertools.count(1):
        outcome = supervisor.run(
            plan.argv, launch.environment(plan), launch.directory, world_size=plan.world_size,
            hosts=[host.name for host in plan.hosts],
        )  # fmt: skip
        crashed = outcome.code not in (0, EXIT_USER_ERROR, EXIT_REQUEUE) and not outcome.stopped
        if not crashed or attempt > launch.max_restarts:
            break
        before, step = step, newest_step(launch)
        stuck = stuck + 1 if step == before and launch.config else 0
        if stuck == MOST_STUCK:
            supervisor.say(
                f"{outcome.failure} This was the third crash without a step gained (step {step}): look at "
                "what fails there. Nothing is started again."
            )
            return EXIT_STUCK
        why = [outcome.failure]
        if launch.min_ranks and outcome.gone:
            gone = _to_blame(launch, plan, outcome.gone)
            left = tuple(host for host in plan.hosts if host.name not in gone)
            if not _enough(launch, left):
                break
            if gone:
                plan = launch.plan(left)
                why.append(f"Going on without {supervisor.some(gone)}.")
        if launch.config:
            why.append(f"From step {step}:")
        supervisor.say(" ".join([*why, f"restart {attempt} of {launch.max_restarts}."]))
    if outcome.failure:
        supervisor.say(outcome.failure)
    return outcome.code


def newest_step(launch: Launch) -> int:
    """Of the training's checkpoints, by name alone; 0 without one."""
    return max(checkpoint.steps(launch.directory), default=0) if launch.directory else 0


def _enough(launch: Launch, hosts: Sequence[Host]) -> bool:
    return launch.min_ranks is not None and sum(host.slots for host in hosts) >= launch.min_ranks


def _fit(launch: Launch, plan: Plan) -> Plan:
    """The plan after the preflight, without the hosts that are not there if enough ranks are left."""
    try:
        fit = preflight.check(
            plan.argv_for, launch.environment(plan), world_size=plan.world_size,
            hosts=[host.name for host in plan.hosts], config=launch.config, run_dir=launch.directory,
        )  # fmt: skip
    except preflight.Unreached as error:
        gone = _to_blame(launch, plan, error.gone)
        left = tuple(host for host in plan.hosts if host.name not in gone)
        if gone and _enough(launch, left):
            supervisor.say(f"{supervisor.some(gone)} cannot be reached: going on without.")
            return _fit(launch, launch.plan(left))
        if not gone:
            raise
        raise UserError(
            f"preflight: {supervisor.some(gone)} cannot be reached: nothing can be started there. Take "
            f"it out of the job, or allow fewer ranks with --min-ranks.\n{error}"
        ) from error
    print(fit, file=sys.stderr, flush=True)
    return plan


def _to_blame(launch: Launch, plan: Plan, gone: Sequence[str]) -> Sequence[str]:
    """Of the hosts of which nothing was heard those that are not there.

    That is all of them where others were heard of. Else the launcher may have given up because of one.
    """
    return gone if len(gone) < len(plan.hosts) else unreachable(launch, plan, gone)


def unreachable(launch: Launch, plan: Plan, gone: Sequence[str]) -> Sequence[str]:
    """Those of `gone` where the launcher can start nothing: tried in groups, then each alone."""
    launcher = plan.launcher
    if launcher == "torchrun":  # takes seconds to start, and is itself started by one of these
        launcher = "srun" if launch.allocation.scheduler == "slurm" else "mpiexec"
    size = -(-len(gone) // GROUPS)
    groups = [gone[i : i + size] for i in range(0, len(gone), size)]
    before = processes.descendants(os.getpid())
    found: list[str] = []
    with tempfile.TemporaryDirectory(prefix="allranks-") as folder:
        started = []
        for number, group in enumerate(groups):
            one_each = tuple(Host(name, 1) for name in group)
            alone = launch.plan(one_each, launcher=launcher, hosts_path=f"{folder}/{number}")
            argv = alone.argv_for([sys.executable, "-c", ""])
            started.append(
                subprocess.Popen(argv, env=launch.environment(alone), stdin=subprocess.DEVNULL,
                                 stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            )  # fmt: skip
        deadline = time.monotonic() + ALONE_S
        for group, child in zip(groups, started, strict=True):
            try:
                failed = child.wait(max(0.0, deadline - time.monotonic()))
            except subprocess.TimeoutExpired:
                child.terminate()  # srun and mpiexec then end what they have started
                failed = True
            if failed:
                found += group if len(group) == 1 else unreachable(launch, plan, group)
        processes.kill_descendants(spare=before)
    return found
