"""`allranks launch`: from its command line to a dry run, or to ranks that run. No torch."""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from allranks.base.errors import EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from allranks.job import machine, scheduler
from allranks.job.hosts import Allocation, compress, find_allocation, placeholder_allocation
from allranks.job.identity import discover
from allranks.job.machine import Machine
from allranks.launch import dryrun, options
from allranks.launch.plan import Request, check_least_ranks, make_plan
from allranks.report import compare_sweep
from allranks.run.cells import Cell, cells_of_command_line, frozen_cells, is_finished, make_cells
from allranks.run.results import place_in_sweep

if TYPE_CHECKING:
    from allranks.launch.attempts import Launch

STOPPED = "stopped"  # how a training has ended that goes on from its checkpoint

USAGE = """%(prog)s [options] [machine.key=value ...]
                       [overrides of the training | -- PROGRAM ARGS...]"""

DESCRIPTION = """\
Starts a training, or the program after `--`, on every rank of this job's hosts,
or of this host alone, and watches over the ranks until all have ended."""

EXAMPLES = """\
examples:
  allranks launch model=cnn                        a rank for each device
  allranks launch -n 4 trainer.epochs=3            four ranks
  allranks launch -n 4 -- python my_own_train.py   any program
  allranks launch --dry-run --machine polaris --nodes 2 model=cnn

The exit code is that of the first rank that has failed. 0: finished; 85:
stopped with a checkpoint; 2: a mistake, which the message explains; 86: started
again and again without gaining a step. docs/launch.md has more."""


def launch(arguments: Sequence[str]) -> int:
    """`allranks launch ARGUMENTS`; the exit code. Raises UserError."""
    args, rest = options.parse(options.parser("launch", USAGE, DESCRIPTION, EXAMPLES), arguments)
    return _launch(args, rest, os.environ)


class Wanted(NamedTuple):
    """What is to be started: a program of the user's, or trainings, one after another."""

    program: tuple[str, ...]  # what each rank runs; of several trainings that of the first
    cells: Sequence[Cell] = ()  # the trainings; empty for a program
    directory: str = ""  # of the run, or of the sweep


def _launch(args: argparse.Namespace, rest: Sequence[str], environ: Mapping[str, str]) -> int:
    """Does what the options ask for, and returns the exit code. Raises UserError."""
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
    options.check_idle(args.idle, program)
    wanted = Wanted(program) if program else _trainings(args, overrides)
    if wanted is None:
        return 0

    known = machine.load(args.machine, machine_overrides, args.config_dir, environ=environ)
    given = find_allocation(environ, args.hosts)
    if args.job_nodes is not None:
        _check_nodes(given, args.job_nodes)
    allocation = _fitting(given, known, args, environ)
    request = Request(
        wanted.program,
        args.ranks,
        args.nodes,
        args.ppn,
        args.spares or 0,
        args.launcher or "auto",
        installed_here=allocation.exists,
    )
    plan = make_plan(request, known, allocation, environ)
    check_least_ranks(args.min_ranks, plan)
    if args.dry_run:
        show = dryrun.as_json if args.json else dryrun.text
        print(show(plan, allocation.source))
        return 0

    from allranks.launch.attempts import Launch, run
    from allranks.launch.supervisor import until_ranks_run

    until_ranks_run()
    console = wanted.cells[0].config.console if wanted.cells else args.console or "normal"
    if console == "verbose":
        print(dryrun.text(plan, allocation.source), flush=True)
    launch = Launch(
        request,
        known,
        allocation,
        environ,
        directory=str(Path(args.run).absolute()) if args.run else None,
        max_restarts=args.max_restarts or 0,
        min_ranks=args.min_ranks,
        grace_s=args.grace,
        start_s=args.start_within,
        idle_s=args.idle,
        is_quiet=console == "quiet",
    )
    checks_first = args.preflight is not False
    if not wanted.cells:
        return run(launch, checks_first).code
    if not args.run:
        make_cells(wanted.directory, wanted.cells)
    return _run_cells(launch, wanted.cells, checks_first)


def _trainings(args: argparse.Namespace, overrides: Sequence[str]) -> Wanted | None:
    """The training frozen in a run directory, or those that the overrides ask for; None after --help."""
    if args.run:
        if overrides:
            raise UserError(f"{overrides[0]} cannot be given with --run: the configuration is frozen.")
        if args.console:
            [flag] = options.console_words(args.console)
            raise UserError(f"{flag} cannot be given with --run: the configuration is frozen.")
        directory, cells = frozen_cells(args.run)
        return Wanted(cells[0].program(), cells, directory)
    own = ["--config-dir", args.config_dir] if args.config_dir else []
    own += options.console_words(args.console)
    directory, cells = cells_of_command_line([*own, *overrides])
    if not cells:
        return None
    # For the plan, and what a dry run shows. Each cell's own program takes its place.
    typed = (sys.executable, "-m", "allranks.train", *own, *overrides)
    return Wanted(typed, cells, directory)


def _run_cells(launch: Launch, cells: Sequence[Cell], checks_first: bool) -> int:
    """Starts one training after another, even if one fails. Returns the first exit code that is not 0.

    A signal, or the end of the job, ends all of them.
    """
    from allranks.launch.attempts import run
    from allranks.launch.console import tell

    codes: list[int] = []
    ends: list[str] = []  # for each cell that was started, how it ended, in one word
    is_stopped = False
    for cell in cells:
        place = place_in_sweep(cell.directory)
        if place and not launch.is_quiet:
            tell(f"{place}: {' '.join(cell.overrides)} in {cell.directory}")
        if is_finished(cell.directory):
            tell(f"{cell.directory} is finished: nothing is left to do")
            ends.append("finished")
            continue
        own_request = replace(launch.request, program=cell.program())
        training = replace(launch, request=own_request, directory=cell.directory, config=cell.config)
        ended = run(training, checks_first and not codes)  # the hosts are looked at once
        codes.append(ended.code)
        ends.append(_end_of(ended.code))
        # A training may fail by a signal, too: that is its own end, and not the sweep's.
        is_stopped = ended.code == EXIT_REQUEUE or (ended.was_stopped and ended.code != 0)
        if is_stopped:
            break
    about_sweep = _about_sweep(cells, ends, is_stopped) if codes or len(cells) > 1 else ""
    if about_sweep:
        tell(about_sweep)
    return next((code for code in codes if code), 0)


def _about_sweep(cells: Sequence[Cell], ends: Sequence[str], is_stopped: bool) -> str:
    """The comparison of a sweep, to be shown at the end of this launch; "" if it cannot be made yet.

    A launch that has started all cells of the sweep compares them now. If each cell is a launch of its own,
    in a job of an array, the launch whose cell ends last compares them.
    """
    last = cells[-1]
    page = last.config.report
    ended = compare_sweep.Ended(was_stopped=is_stopped)
    if len(cells) > 1:
        text = compare_sweep.made(Path(last.directory).parent, ends, page, ended)
    elif ends == [STOPPED]:
        return ""  # another job goes on with this cell
    else:
        text = compare_sweep.after_cell(last.directory, ends[0], page, ended)
    return text[text.rfind("\n") + 1 :] if last.config.console == "quiet" else text


def _end_of(code: int) -> str:
    """How a training has ended, in words."""
    if code == 0:
        return "finished"
    return STOPPED if code == EXIT_REQUEUE else f"failed ({code})"


def _check_nodes(given: Allocation, asked: int) -> None:
    """Raises UserError if a job has got fewer hosts than nodes were asked for.

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


def _fitting(
    given: Allocation, known: Machine, args: argparse.Namespace, environ: Mapping[str, str]
) -> Allocation:
    """The allocation found, or, for a dry run outside a job, hosts that stand for a job's."""
    if given.scheduler != "local" or (known.scheduler == "local" and (args.nodes or 1) == 1):
        return given
    if not args.dry_run:
        here = scheduler.here(environ)
        if here is not None:
            raise UserError(
                f"This is a job of {here.title}, but {here.hosts_variable}, which tells its hosts, is not "
                "set: hand it on, as to a container, or give --hosts FILE."
            )
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
