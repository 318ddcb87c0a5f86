"""From what `allranks submit` is asked for to a task that can be queued: everything that can be wrong is
found here, before anything is written or asked of a scheduler.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from allranks.base.errors import UserError
from allranks.base.files import file_system
from allranks.job import machine, scheduler
from allranks.job.hosts import Host, placeholder_allocation
from allranks.job.machine import LAUNCHERS, Machine
from allranks.job.scheduler import Scheduler
from allranks.launch import options
from allranks.launch.plan import Plan, Request, check_least_ranks, check_program, make_plan
from allranks.run import directory as rundir
from allranks.run.cells import CELLS, JOB, Cell, cells_of_command_line, frozen_cells, is_finished, read_job
from allranks.run.claim import refuse_where_at_work
from allranks.submit import script
from allranks.submit.order import Order, with_options

# Folders that each node usually has for itself, whatever their file system.
NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/local", "/localscratch")
# A training stops END_S and its own margin of 10 s before the end; in 10 s more it can start.
LEAST_WALLTIME_S = script.END_S + 20
# How to give what a machine demands, where that is not `--OPTION NAME`.
_HOW_TO_GIVE = {"walltime": "--walltime HH:MM:SS", "filesystems": "machine.filesystems=[home,...]"}


@dataclass(frozen=True)
class Task:
    """What is to be queued: one job in `directory`, or an array with a job for each of its cells."""

    order: Order
    machine: Machine
    plan: Plan
    directory: str
    program: tuple[str, ...] = ()
    cells: tuple[Cell, ...] = ()

    @property
    def scheduler(self) -> Scheduler:
        """The scheduler of the machine: PBS or Slurm."""
        return scheduler.named(self.machine.scheduler)

    @property
    def is_sweep(self) -> bool:
        """Whether it is a sweep: its cells have directories below the task's own."""
        return bool(self.cells) and self.cells[0].directory != self.directory

    @property
    def array_jobs(self) -> int:
        """The jobs of its array; 0 for a plain job. PBS takes no array of one job."""
        return len(self.cells) if len(self.cells) > 1 else 0

    @property
    def has_no_successor(self) -> bool:
        """Whether the queue takes no job that goes on with the run, as long as the present one is there.

        A job queues its successor before it ends itself, and so is the second job of its user then. Where
        the scheduler puts the same job back into the queue there is but one.
        """
        queue = self.machine.queues.get(self.order.queue or "")
        is_full = queue is not None and queue.jobs_per_user == 1
        return is_full and not self.program and not self.scheduler.owner_may_requeue

    @property
    def how_to_go_on(self) -> str:
        """What the user can do where there is no successor."""
        return (
            f"queue {self.order.queue} takes one job of a user at a time, so this one cannot queue the "
            "next: once it has ended with the run not finished, go on from the newest checkpoint with "
            f"`allranks submit --cell {shlex.quote(self.directory)}`"
        )

    @property
    def notes(self) -> list[str]:
        """What the user should know of this task, although it can be queued: a sentence each."""
        notes: list[str] = []
        local = local_place(self.directory)
        if local is not None:
            notes.append(
                f"{self.directory} is in {local}, which each node has for itself: if the job runs on "
                "another node than this one, nothing of it will be here"
            )
        if self.has_no_successor:
            notes.append(self.how_to_go_on)
        return notes

    @property
    def job_directory(self) -> str:
        """The directory in which the job, or its array, has its script."""
        return self.cells[0].directory if len(self.cells) == 1 else self.directory

    @property
    def script_path(self) -> Path:
        """Where the job script goes."""
        return Path(self.job_directory) / "job.sh"

    def script_text(self) -> str:
        """The text of the job script."""
        umask = os.umask(0)
        os.umask(umask)
        return script.render(
            self.order, self.machine, self.job_directory, self.program, self.array_jobs, umask, os.environ
        )


def new_task(given: Mapping[str, Any], rest: Sequence[str]) -> Task | None:
    """The task of a training or program that has no directory yet; None after --help and the like.

    `given` has the values of the options that were given, `rest` is what stands after them. Raises
    UserError for what cannot be had.
    """
    overrides, machine_overrides, program = options.split(rest)
    options.check_idle(given.get("idle"), program)
    config_dir = given.get("config_dir")
    cells: list[Cell] = []
    directory = ""
    if program is None:
        own = ["--config-dir", config_dir] if config_dir else []
        own += options.console_words(given.get("console"))
        directory, cells = cells_of_command_line([*own, *overrides])
        if not cells:
            return None
        given = {**given, "console": None}  # it is in the configuration now
    order = Order(
        machine="",
        name=_job_name(directory, cells, program),
        machine_overrides=tuple(machine_overrides),
        workdir=str(Path.cwd()),
    )
    order, known, plan = _checked(with_options(order, given), program or cells[0].program(), len(cells))
    if program is None:
        _check_walltime(order)
    else:
        directory = str(Path(rundir.choose(None, order.name)).absolute())
    task = Task(order, known, plan, directory, program or (), tuple(cells))
    if order.chain and task.array_jobs:
        raise UserError("--chain is for one run, -m for many: leave one of them out.")
    _check_shared(task)
    return task


def task_again(run: str, given: Mapping[str, Any], must_be_idle: bool) -> Task:
    """The task of a run that was submitted before, with what was asked for then unless it is given anew.

    Raises UserError for a run that was not submitted, or is finished, and, if it `must_be_idle`, for one
    that still has a job. Then it asks the scheduler.
    """
    directory = str(Path(run).absolute())
    job = read_job(Path(directory) / JOB)
    if not job or (Path(directory) / CELLS).exists():
        raise UserError(f"--cell {run} was never submitted: give the directory of one cell.")
    alive = scheduler.named(job["scheduler"]).states(job["job_ids"]) if must_be_idle else {}
    if alive:
        there = ", ".join(f"{job_id} {state}" for job_id, state in alive.items())
        raise UserError(f"--cell {run} still has a job ({there}): `allranks cancel` it first.")
    if is_finished(directory):
        raise UserError(f"--cell {run} is finished: there is nothing left to do.")
    order, program = _asked_before(job, Path(directory) / JOB)
    if not program and given.get("console"):
        [flag] = options.console_words(given["console"])
        raise UserError(f"{flag} cannot be given with --cell: its configuration is frozen.")
    cells = [] if program else frozen_cells(directory)[1]
    order, known, plan = _checked(with_options(order, given), program or cells[0].program())
    if not program:
        _check_walltime(order)
    task = Task(order, known, plan, directory, program, tuple(cells))
    _check_shared(task)
    return task


def _asked_before(job: Mapping[str, Any], path: Path) -> tuple[Order, tuple[str, ...]]:
    """The order and the program (empty for a training) that the job.json at `path` keeps.

    Raises UserError if it is not as this version of allranks writes it.
    """
    try:
        asked = job["order"]
        order = Order(**asked | {"machine_overrides": tuple(asked["machine_overrides"])})
        return order, tuple(job["program"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{path} is damaged or another version's ({type(error).__name__}: {error}): submit the run "
            f"anew, with run.dir={path.parent} and the same overrides."
        ) from error


def check_idle(task: Task) -> None:
    """Raises UserError if the task's directory, or a cell of it, still has a job or a run by hand."""
    ids: list[str] = []
    directories = (task.directory, *(cell.directory for cell in task.cells))
    for directory in directories:
        ids += read_job(Path(directory) / JOB).get("job_ids", [])
    there = task.scheduler.states(list(dict.fromkeys(ids)))
    if there:
        jobs = ", ".join(f"{job_id} {state}" for job_id, state in there.items())
        raise UserError(
            f"run.dir={task.directory} still has a job ({jobs}): `allranks cancel` it first, wait for it "
            "with --after, or give another run.dir."
        )
    refuse_where_at_work(dict.fromkeys(directories))


def _job_name(directory: str, cells: Sequence[Cell], program: Sequence[str] | None) -> str:
    """The job's name where none is given, in letters that PBS takes.

    It is the program's, or the last part of the run.dir that was given; else the run's own name, which
    stands above the time in the directory that was chosen for it.
    """
    if program is not None:
        name = Path(_script_of(program)).stem
    elif cells[0].config.run.dir is not None:
        name = Path(directory).name
    else:
        name = Path(directory).parent.name
    return re.sub(r"[^\w.+-]", "-", name, flags=re.ASCII).lstrip("-.+")[:200] or "allranks"


def _script_of(program: Sequence[str]) -> str:
    """The file that a program is: x.py of `python x.py`."""
    if Path(program[0]).name.startswith("python"):
        return next((word for word in program[1:] if not word.startswith("-")), program[0])
    return program[0]


# --- what a machine takes ------------------------------------------------------------------------


def _checked(order: Order, program: Sequence[str], cells: int = 1) -> tuple[Order, Machine, Plan]:
    """The order with the machine's defaults, the machine, and a plan for a job, or for an array with a job
    for each of so many cells. Raises UserError.
    """
    known = _machine(order)
    order = replace(order, machine=known.name, queue=order.queue or known.queue)
    if order.walltime is not None:
        is_clock = re.fullmatch(r"\d{1,4}:[0-5]\d:[0-5]\d", order.walltime, flags=re.ASCII)
        if not is_clock or not order.walltime_s:
            raise UserError(f"--walltime {order.walltime} is not valid: give HH:MM:SS, such as 01:00:00.")
    if not re.fullmatch(r"[A-Za-z0-9_][\w.+-]{0,229}", order.name, flags=re.ASCII):
        raise UserError(
            f"--name {order.name!r} is not valid: give at most 230 letters, digits and _ . + -, no blanks."
        )
    there = {
        "account": order.account,
        "walltime": order.walltime,
        "queue": order.queue,
        "filesystems": known.filesystems,
    }
    for option in known.submit.required:
        if not there.get(option, True):
            how = _HOW_TO_GIVE.get(option, f"--{option} NAME")
            raise UserError(f"--{option} is mandatory on {known.name}: add {how}.")
    script.check_words(order, program)
    kind = scheduler.named(known.scheduler)
    if order.launcher in LAUNCHERS[1:] and order.launcher not in kind.launchers:
        raise UserError(
            f"--launcher {order.launcher} starts no ranks in a job of {kind.title}: give "
            f"{' or '.join(kind.launchers)}, or leave it out."
        )
    if order.queue:
        hours = (order.walltime_s or 0) / 3600 or None
        is_sweep = cells > 1
        jobs = cells if is_sweep else order.chain or 1
        machine.check_queue(known, order.queue, order.nodes, hours, jobs, is_sweep)
    plan = _plan(order, known, program)
    check_least_ranks(order.min_ranks, plan)
    return order, known, plan


def _check_walltime(order: Order) -> None:
    """Raises UserError for a walltime in which a training cannot start before it has to stop."""
    if order.walltime_s is not None and order.walltime_s < LEAST_WALLTIME_S:
        raise UserError(
            f"--walltime {order.walltime} cannot hold a start: the job's script keeps {script.END_S} s for "
            f"its end, and a training 10 s for its last save. Give 00:00:{LEAST_WALLTIME_S} or more."
        )


def _machine(order: Order) -> Machine:
    """The machine that is named, or this host's; where no file knows the host, that of the scheduler whose
    commands are installed.
    """
    known = machine.load(order.machine or None, order.machine_overrides, order.config_dir)
    if known.scheduler == "local" and not order.machine:
        installed = [kind for kind in scheduler.SCHEDULERS if shutil.which(kind.commands[0])]
        if installed:
            generic = f"generic_{installed[0].name}"
            known = machine.load(generic, order.machine_overrides, order.config_dir)
    if known.scheduler == "local":
        raise UserError(
            "machine=local has no scheduler: give the cluster with --machine, or use `allranks launch`."
        )
    return known


def _plan(order: Order, known: Machine, program: Sequence[str]) -> Plan:
    """How it will be launched, on placeholders for the hosts that the job will get."""
    queue = known.queues.get(order.queue or "")
    hosts = placeholder_allocation(order.nodes, known.scheduler)
    if queue and queue.ranks_per_chunk:  # all chunks of such a job are on one node
        slots = order.nodes * queue.ranks_per_chunk
        hosts = replace(hosts, hosts=(Host("node1", slots),), slots_given=True, queue=order.queue)
    _check_program(program, known)
    spread = order.nodes if order.ranks and not order.ppn else None
    spares = order.spares or 0
    request = Request(
        tuple(program), order.ranks, spread, order.ppn, spares, order.launcher, installed_here=False
    )
    plan = make_plan(request, known, hosts)
    if order.ranks and len(plan.hosts) < len(hosts.hosts) - spares:
        aside = f" --spares {spares}" if spares else ""
        raise UserError(
            f"-n {order.ranks} fills {len(plan.hosts)} of --nodes {order.nodes}{aside}: give fewer nodes."
        )
    return plan


def _check_program(program: Sequence[str], known: Machine) -> None:
    """Raises UserError if the program is not there, as far as that can be told here: modules that the
    machine's setup loads in the job may bring it.
    """
    if known.setup and "/" not in program[0] and shutil.which(program[0]) is None:
        return
    check_program(program)


def _check_shared(task: Task) -> None:
    """Raises UserError if only this node would see the run directory."""
    nodes = len(task.plan.hosts) + len(task.plan.spares)
    if nodes == 1:
        return
    local = local_place(task.directory)
    if local is not None:
        raise UserError(
            f"run.dir={task.directory} is in {local}, which each node has for itself: submit from a "
            f"directory that all {nodes} nodes see, or give run.dir=PATH in one."
        )


def local_place(directory: str) -> str | None:
    """The folder or file system of a directory that each node has for itself; None if none is known."""
    path = Path(directory).resolve()
    place = next((place for place in NODE_LOCAL if path.is_relative_to(place)), None)
    if place is not None:
        return place
    kind = file_system(path)
    return f"a {kind}" if kind in ("tmpfs", "ramfs", "devtmpfs") else None
