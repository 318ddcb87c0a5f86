"""`allranks submit`, `runs` and `cancel`: from a login node to a queued job, and what became of it."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import shutil
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from allranks.base import files
from allranks.base.errors import UserError
from allranks.base.files import file_system
from allranks.base.text import table
from allranks.job import machine, scheduler
from allranks.job.hosts import Host, placeholder_allocation
from allranks.job.machine import Machine
from allranks.launch import dryrun, options
from allranks.launch.plan import Plan, Request, check_program, make_plan
from allranks.run import directory as rundir
from allranks.run.cells import (
    CELLS,
    JOB,
    Cell,
    composed_cells,
    frozen_cells,
    is_finished,
    make_cells,
    read_job,
    write_cells,
)
from allranks.submit import script
from allranks.submit.script import Order

NODE_LOCAL = ("/tmp", "/var/tmp", "/dev/shm", "/run", "/local", "/localscratch")


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
    def is_sweep(self) -> bool:
        return bool(self.cells) and self.cells[0].directory != self.directory

    def job_directory(self) -> str:
        """Where the job itself runs: a sweep of one cell is a plain job, as PBS takes no such array."""
        return self.cells[0].directory if len(self.cells) == 1 else self.directory

    def text(self) -> str:
        number = len(self.cells) if len(self.cells) > 1 else 0
        umask = os.umask(0)
        os.umask(umask)
        directory = self.job_directory()
        return script.render(self.order, self.machine, directory, self.program, number, umask, os.environ)


def enqueue(args: argparse.Namespace, rest: Sequence[str]) -> int:
    if args.chain is not None and args.chain < 1:
        raise UserError(f"--chain {args.chain} is not valid: give a whole number >= 1.")
    task = _again(args, rest) if args.cell else _new(args, rest)
    if task is None:
        return 0
    if args.chain and len(task.cells) > 1:
        raise UserError("--chain is for one run, -m for many: leave one of them out.")
    _check_shared(task)
    if args.dry_run:
        print(_shown(task, args))
        return 0
    if args.after and not scheduler.exists(task.machine.scheduler, args.after):
        raise UserError(
            f"--after {args.after}: {task.machine.scheduler.upper()} knows no such job; one that waits for "
            "it would never run. Look with `allranks runs`, and leave --after out where it has ended."
        )
    fresh = not Path(task.directory).exists()
    if not args.cell and task.cells:
        make_cells(task.directory, task.cells)
    elif not args.cell:
        rundir.create(task.directory, None)
    ids = _queue(task, args, fresh)
    log = task.directory + ("/*" if task.is_sweep else "") + f"/{script.LOG}"
    if args.json:
        print(json.dumps({"job_ids": ids, "directory": task.directory, "log": log}))
        return 0
    print(f"job{'s' * (len(ids) > 1)}        {', '.join(ids)}")
    print(f"directory  {task.directory}" + (f" ({len(task.cells)} cells)" if task.is_sweep else ""))
    print(f"follow     tail -F {log if task.is_sweep else shlex.quote(log)}")
    return 0


# --- what is asked for ---------------------------------------------------------------------------


def _new(args: argparse.Namespace, rest: Sequence[str]) -> Task | None:
    overrides, machine_overrides, program = options.split(rest)
    cells: list[Cell] = []
    directory = ""
    if program is None:
        own = ["--config-dir", args.config_dir] if args.config_dir else []
        directory, cells = composed_cells([*own, *overrides])
        if not cells:
            return None
    name = Path(directory).parent.name if cells else Path(_script_of(program or ())).stem
    order = Order(
        machine=args.machine or "",
        name=re.sub(r"[^\w.+-]", "-", name, flags=re.A).lstrip("-.+")[:200] or "allranks",
        config_dir=str(Path(args.config_dir).absolute()) if args.config_dir else None,
        machine_overrides=tuple(machine_overrides),
        workdir=str(Path.cwd()),
    )
    order, known, plan = _checked(_with_options(order, args), program or cells[0].program())
    if program is not None:
        directory = str(Path(rundir.choose(None, order.name)).absolute())
    return Task(order, known, plan, directory, program or (), tuple(cells))


def _again(args: argparse.Namespace, rest: Sequence[str]) -> Task:
    """A run that was submitted before, with what was asked for then unless it is given anew."""
    if rest:
        raise UserError(f"{rest[0]} cannot be given with --cell: its configuration is frozen.")
    directory = str(Path(args.cell).absolute())
    job = read_job(Path(directory) / JOB)
    if not job or (Path(directory) / CELLS).exists():
        raise UserError(f"--cell {args.cell} was never submitted: give the directory of one cell.")
    asks = not (args.after or args.next or args.dry_run)
    if asks and (alive := scheduler.states(job["scheduler"], job["job_ids"])):
        there = ", ".join(f"{job_id} {state}" for job_id, state in alive.items())
        raise UserError(f"--cell {args.cell} still has a job ({there}): `allranks cancel` it first.")
    if is_finished(directory):
        raise UserError(f"--cell {args.cell} is finished: there is nothing left to do.")
    given = job["order"] | {"machine_overrides": tuple(job["order"]["machine_overrides"])}
    program = tuple(job["program"])
    cells = [] if program else frozen_cells(directory)[1]
    order, known, plan = _checked(_with_options(Order(**given), args), program or cells[0].program())
    return Task(order, known, plan, directory, program, tuple(cells))


def _with_options(order: Order, args: argparse.Namespace) -> Order:
    names = ("machine", "nodes", "walltime", "account", "queue", "name", "ranks", "ppn", "launcher",
             "max_restarts", "min_ranks", "chain")  # fmt: skip
    given = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    return replace(order, **given, preflight=order.preflight and not args.no_preflight)


def _checked(order: Order, program: Sequence[str]) -> tuple[Order, Machine, Plan]:
    """The order with the machine's defaults, the machine, and a plan. Raises UserError."""
    known = machine.load(order.machine or None, order.machine_overrides, order.config_dir)
    if known.scheduler == "local" and not order.machine:
        generic = next((name for tool, name in (("qsub", "generic_pbs"), ("sbatch", "generic_slurm"))
                        if shutil.which(tool)), "local")  # fmt: skip
        known = machine.load(generic, order.machine_overrides, order.config_dir)
    if known.scheduler == "local":
        raise UserError(
            "machine=local has no scheduler: give the cluster with --machine, or use `allranks launch`."
        )
    order = replace(order, machine=known.name, queue=order.queue or known.queue)
    if order.nodes < 1:
        raise UserError(f"--nodes {order.nodes} is not valid: give a whole number >= 1.")
    if order.walltime is not None:
        fits = re.fullmatch(r"\d{1,4}:[0-5]\d:[0-5]\d", order.walltime, flags=re.A)
        if not fits or not order.walltime_s:
            raise UserError(f"--walltime {order.walltime} is not valid: give HH:MM:SS, such as 01:00:00.")
    if not re.fullmatch(r"[A-Za-z0-9_][\w.+-]{0,229}", order.name, flags=re.A):
        raise UserError(
            f"--name {order.name!r} is not valid: give at most 230 letters, digits and _ . + -, no blanks."
        )
    given = {"account": order.account, "walltime": order.walltime, "queue": order.queue,
             "filesystems": known.filesystems}  # fmt: skip
    for option in known.submit.required:
        if not given.get(option, True):
            remedy = {"walltime": "--walltime HH:MM:SS", "filesystems": "machine.filesystems=[home,...]"}
            raise UserError(
                f"--{option} is mandatory on {known.name}: add {remedy.get(option, f'--{option} NAME')}."
            )
    script.check_words(order)
    if order.queue:
        machine.check_queue(known, order.queue, order.nodes, (order.walltime_s or 0) / 3600 or None)
    return order, known, _plan(order, known, program)


def _plan(order: Order, known: Machine, program: Sequence[str]) -> Plan:
    """How it will be launched, on placeholders for the hosts that the job will get."""
    queue = known.queues.get(order.queue or "")
    hosts = placeholder_allocation(order.nodes, "slurm" if known.scheduler == "slurm" else "pbs")
    if queue and queue.ranks_per_chunk:  # all chunks of such a job are on one node
        slots = order.nodes * queue.ranks_per_chunk
        hosts = replace(hosts, hosts=(Host("node1", slots),), slots_given=True, queue=order.queue)
    _check_program(program, known)
    spread = order.nodes if order.ranks and not order.ppn else None
    request = Request(tuple(program), order.ranks, spread, order.ppn, order.launcher, installed_here=False)
    plan = make_plan(request, known, hosts)
    if order.ranks and len(plan.hosts) < len(hosts.hosts):
        raise UserError(
            f"-n {order.ranks} fills {len(plan.hosts)} of --nodes {order.nodes}: give fewer nodes."
        )
    return plan


def _script_of(program: Sequence[str]) -> str:
    """The file that a program is: of `python x.py` x.py."""
    if Path(program[0]).name.startswith("python"):
        return next((word for word in program[1:] if not word.startswith("-")), program[0])
    return program[0]


def _check_program(program: Sequence[str], known: Machine) -> None:
    """That it is there, as far as can be told here: modules of the job may bring it."""
    if known.setup and "/" not in program[0] and shutil.which(program[0]) is None:
        return
    check_program(program)


def _check_shared(task: Task) -> None:
    """Raises UserError where only this node would see the run directory."""
    if len(task.plan.hosts) == 1:
        return
    path = Path(task.directory).resolve()
    local = next((place for place in NODE_LOCAL if path.is_relative_to(place)), None)
    if local is None and (kind := file_system(path)) in ("tmpfs", "ramfs", "devtmpfs"):
        local = f"a {kind}"
    if local is not None:
        raise UserError(
            f"run.dir={task.directory} is in {local}, which each node has for itself: start on one that "
            f"all {len(task.plan.hosts)} nodes see, or give run.dir=PATH there."
        )


# --- queueing ------------------------------------------------------------------------------------


def _queue(task: Task, args: argparse.Namespace, fresh: bool) -> list[str]:
    """Writes the script, queues it, and records the job's id; a refusal leaves no fresh directory."""
    path = Path(task.job_directory()) / "job.sh"
    kind = task.machine.scheduler
    ids: list[str] = []
    after = args.after
    try:
        with rundir.writing(task.directory):
            path.write_text(task.text())
            _record(task, ids)  # a job may start, and read it, before its id is known here
        for link in range(args.chain or 1):
            if link and not scheduler.states(kind, [ids[-1]]):
                after = None  # it has ended already, and nothing may wait for a job that is gone
            ids.append(scheduler.submit(kind, str(path), after))
            after = ids[-1]
        with rundir.writing(task.directory):
            _record(task, ids)
    except UserError as error:
        if ids:
            with suppress(OSError):
                _record(task, ids)
            raise UserError(f"{error} Queued until then, in {task.directory}: {', '.join(ids)}.") from error
        if fresh and not isinstance(error, scheduler.NoAnswer):
            shutil.rmtree(task.directory)
        raise
    return ids


def _record(task: Task, ids: Sequence[str]) -> None:
    """job.json of the run, or of the sweep and every cell of it."""
    kind = task.machine.scheduler
    about = {
        "scheduler": kind, "order": asdict(task.order), "program": task.program,
        "submitted_at": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }  # fmt: skip
    is_array = len(task.cells) > 1
    of_cells: list[str | None] = []
    for index, cell in enumerate(task.cells):
        own = [scheduler.of_array(kind, ids[0], index)] if is_array and ids else list(ids)
        of_cells.append(own[0] if own else None)
        path = Path(cell.directory) / JOB
        before = read_job(path).get("job_ids", []) if not is_array else []
        own = list(dict.fromkeys([*before, *own]))
        mine = {"job_ids": own, "overrides": cell.overrides, "config_sha256": cell.sha256}
        files.write_json(path, about | mine)
    if not task.cells or task.is_sweep:
        path = Path(task.directory) / JOB
        files.write_json(path, about | {"job_ids": list(ids), "overrides": []})
    if task.is_sweep:
        write_cells(task.directory, task.cells, of_cells)


def _shown(task: Task, args: argparse.Namespace) -> str:
    """The dry run. Nothing was written, and nobody was asked."""
    path = f"{task.job_directory()}/job.sh"
    kind = task.machine.scheduler
    links = [args.after, *(f"ID_OF_JOB_{link}" for link in range(1, args.chain or 1))]
    commands = [scheduler.submit_argv(kind, path, after) for after in links]
    if args.json:
        plan = json.loads(dryrun.as_json(task.plan, "placeholders"))
        cells = [{"directory": cell.directory, "overrides": cell.overrides} for cell in task.cells]
        return json.dumps(
            {"submit": commands, "directory": task.directory, "script_path": path, "script": task.text(),
             "cells": cells, "launch": plan}
        )  # fmt: skip
    parts = [
        f"Submit:\n{os.linesep.join(map(shlex.join, commands))}",
        f"Job script {path}:\n{task.text().rstrip()}",
    ]
    if task.is_sweep:
        rows = [(Path(cell.directory).name, *cell.overrides) for cell in task.cells]
        parts.append("Cells:\n" + table(rows))
    parts.append("In the job:\n" + dryrun.text(task.plan, "placeholders, as there is no job yet"))
    return "\n\n".join(parts)
