"""`allranks launch`: the arguments, and from them to a dry run or a running job. No torch."""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from allranks.base.errors import EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from allranks.base.text import table
from allranks.job import machine
from allranks.job.hosts import Allocation, compress, find_allocation, placeholder_allocation
from allranks.job.identity import discover
from allranks.job.machine import Machine
from allranks.launch import dryrun, options
from allranks.launch.plan import Request, make_plan
from allranks.run.cells import Cell, composed_cells, frozen_cells, is_finished, make_cells
from allranks.run.results import FIGURES, figures, place_in_sweep

USAGE = """%(prog)s [options] [machine.key=value ...]
                       [overrides of the training | -- PROGRAM ARGS...]"""


def launch(arguments: Sequence[str]) -> int:
    """`allranks launch ARGUMENTS`; the exit code. Raises UserError."""
    args, rest = options.parse(options.parser("launch", USAGE), arguments)
    return _launch(args, rest, os.environ)


def _launch(args: argparse.Namespace, rest: Sequence[str], environ: Mapping[str, str]) -> int:
    around = discover(environ)
    if around.world_size not in (None, 1):
        if around.rank == 0:
            raise UserError(
                f"`allranks launch` starts the ranks itself, but {around.launcher} has started it "
                f"{around.world_size} times: leave that launcher out, or have it start `python -m "
                "allranks.train`."
            )
        return EXIT_USER_ERROR
    if args.json and not args.dry_run:
        raise UserError("--json is for a dry run: add --dry-run.")
    overrides, machine_overrides, program = options.split(rest)
    directory, trainings = "", list[Cell]()
    if program is None:
        own = ["--config-dir", args.config_dir] if args.config_dir else []
        if args.run and overrides:
            raise UserError(f"{overrides[0]} cannot be given with --run: the configuration is frozen.")
        directory, trainings = frozen_cells(args.run) if args.run else composed_cells([*own, *overrides])
        if not trainings:
            return 0
        typed = (sys.executable, "-m", "allranks.train", *own, *overrides)
        program = trainings[0].program() if args.run else typed
    known = machine.load(args.machine, machine_overrides, args.config_dir, environ=environ)
    given = find_allocation(environ, args.hosts)
    if args.job_nodes is not None:
        _check_nodes(given, args.job_nodes)
    allocation = fitting(given, known, args)
    request = Request(
        program, args.ranks, args.nodes, args.ppn, args.launcher or "auto", installed_here=allocation.exists
    )
    plan = make_plan(request, known, allocation, environ)
    if args.dry_run:
        show = dryrun.as_json if args.json else dryrun.text
        print(show(plan, allocation.source))
        return 0
    return _start(request, known, allocation, environ, args, directory, trainings)


def _start(
    request: Request,
    known: Machine,
    allocation: Allocation,
    environ: Mapping[str, str],
    args: argparse.Namespace,
    directory: str,
    trainings: Sequence[Cell],
) -> int:
    """Starts the program, or one training after another; the exit code."""
    from allranks.launch.attempts import Launch, run
    from allranks.launch.console import tell
    from allranks.launch.supervisor import until_ranks_run

    until_ranks_run()
    own = str(Path(args.run).absolute()) if args.run else None
    launch = Launch(
        request,
        known,
        allocation,
        environ,
        directory=own,
        max_restarts=args.max_restarts or 0,
        min_ranks=args.min_ranks,
        grace_s=args.grace,
    )
    check = args.preflight is not False
    if not trainings:
        return run(launch, check)
    if not args.run:
        make_cells(directory, trainings)
    codes: list[int] = []
    ends: list[str] = []  # of each cell that was started, in a word
    for cell in trainings:  # of a sweep, whether or not one fails
        place = place_in_sweep(cell.directory)
        if place:
            tell(f"{place}: {' '.join(cell.overrides)} in {cell.directory}")
        if is_finished(cell.directory):
            tell(f"{cell.directory} is finished: nothing is left to do")
            ends.append("finished")
            continue
        mine = replace(request, program=cell.program())
        training = replace(launch, request=mine, directory=cell.directory, config=cell.config)
        codes.append(run(training, check and not codes))
        ends.append(_end_of(codes[-1]))
        if codes[-1] == EXIT_REQUEUE or codes[-1] > 128:  # a signal or the job's end, for all of it
            break
    if len(trainings) > 1:
        tell(_sweep_table(trainings, ends))
    return next((code for code in codes if code), 0)


def _end_of(code: int) -> str:
    """How a training has ended, in words."""
    if code == 0:
        return "finished"
    return "stopped" if code == EXIT_REQUEUE else f"failed ({code})"


def _sweep_table(cells: Sequence[Cell], ends: Sequence[str]) -> str:
    """How each cell has ended, what it has come to, and what it is."""
    rows = [("cell", "state", *FIGURES, "overrides")]
    for number, cell in enumerate(cells):
        end = ends[number] if number < len(ends) else "not started"
        name = Path(cell.directory).name
        rows.append((name, end, *figures(cell.directory).columns(), " ".join(cell.overrides)))
    return table(rows)


def _check_nodes(given: Allocation, asked: int) -> None:
    """Raises UserError where a job has got fewer hosts than nodes were asked for.

    PBS may put several chunks of a job on one host. A training would then run with ranks that share its
    CPUs and GPUs, or with fewer ranks, and nobody would be told.
    """
    if len(given.hosts) >= asked:
        return
    names = compress(host.name for host in given.hosts)
    raise UserError(
        f"{asked} nodes were asked for, but this job has {len(given.hosts)} ({given.source}: {names}). PBS "
        "puts several chunks on one host unless it is told to scatter them: give "
        "'machine.submit.options=[-l place=scatter]', or ask for fewer --nodes."
    )


def fitting(given: Allocation, known: Machine, args: argparse.Namespace) -> Allocation:
    """The allocation found, or, for a dry run outside a job, hosts that stand for a job's."""
    if given.scheduler != "local" or (known.scheduler == "local" and (args.nodes or 1) == 1):
        return given
    if not args.dry_run:
        raise UserError(
            f"There is no job here: {socket.gethostname()} is one host, outside PBS and Slurm. "
            + (f"--nodes {args.nodes} needs a job: " if args.nodes else "Get a job first: ")
            + "use `qsub -I`, `salloc` or `allranks submit`; --hosts FILE names hosts of your own, "
            "and --machine local uses this host."
        )
    per_node = args.ppn or known.node.ranks_per_node or args.ranks or 1
    nodes = args.nodes or math.ceil((args.ranks or 1) / max(per_node, 1))
    # The hosts of a machine without a scheduler look as PBS names them.
    kind = "pbs" if known.scheduler == "local" else known.scheduler
    return placeholder_allocation(max(nodes, 1), kind)
