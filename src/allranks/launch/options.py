"""`allranks launch`: the arguments, and from them to a dry run or a running job. No torch."""

from __future__ import annotations

import argparse
import math
import os
import re
import socket
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from allranks.base.errors import EXIT_REQUEUE, EXIT_USER_ERROR, UserError
from allranks.base.text import did_you_mean
from allranks.compose import HYDRAS
from allranks.job import machine
from allranks.job.hosts import Allocation, find_allocation, placeholder_allocation
from allranks.job.identity import discover
from allranks.job.machine import LAUNCHERS, Machine
from allranks.launch import dryrun
from allranks.launch.plan import Request, make_plan
from allranks.run.cells import Cell, composed_cells, frozen_cells, is_finished, make_cells

USAGE = """%(prog)s [options] [machine.key=value ...]
                       [overrides of the training | -- PROGRAM ARGS...]"""


def launch(arguments: Sequence[str]) -> int:
    """`allranks launch ARGUMENTS`; the exit code. Raises UserError."""
    parser = argparse.ArgumentParser(prog="allranks launch", usage=USAGE, allow_abbrev=False)
    add = parser.add_argument
    add("-n", dest="ranks", type=int, metavar="RANKS", help="ranks in all; default: all there are")
    add("--nodes", type=int, metavar="K", help="use the first K nodes")
    add("--ppn", type=int, metavar="P", help="ranks per node")
    add("--launcher", default="auto", metavar="|".join(LAUNCHERS), help="who starts the ranks")
    add("--machine", metavar="M", help="machine file to use; default: the one this host belongs to")
    add("--run", metavar="DIR", help="the run directory of `allranks submit`: starts what is frozen there")
    add("--hosts", metavar="FILE", help="hosts to use: `host`, `host:4` or `host slots=4` a line")
    add("--config-dir", metavar="DIR", help="a folder with machine/NAME.yaml (and groups) of your own")
    add("--max-restarts", type=int, default=0, metavar="N", help="start again after a crash; default: 0")
    add("--min-ranks", type=int, metavar="M", help="go on without a host that is gone, on M ranks or more")
    add("--no-preflight", action="store_true", help="start at once, without checking the hosts first")
    add("--dry-run", action="store_true", help="show the command and every rank's place, do nothing")
    add("--json", action="store_true", help="the dry run for programs")
    args, rest = parsed(parser, arguments)
    return _launch(args, rest, os.environ)


def parsed(
    parser: argparse.ArgumentParser, arguments: Sequence[str]
) -> tuple[argparse.Namespace, list[str]]:
    """(the parser's own options, the rest: overrides, Hydra's flags, `-- PROGRAM ARGS`)."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    args, rest = parser.parse_known_args(arguments[:end])
    for flag in (word.partition("=")[0] for word in rest):
        if flag.startswith("--") and flag not in HYDRAS:
            known = re.findall(r"--[a-z-]+", parser.format_help())
            raise UserError(f"{flag} is not an option of `{parser.prog}`.{did_you_mean(flag, known)}")
    return args, [*rest, *arguments[end:]]


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
    for option, value, low in (
        ("--max-restarts", args.max_restarts, 0),
        ("--min-ranks", args.min_ranks, 1),
    ):
        if value is not None and value < low:
            raise UserError(f"{option} {value} is not valid: give a whole number >= {low}.")
    overrides, machine_overrides, program = split(rest)
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
    allocation = fitting(given, known, args)
    request = Request(
        program, args.ranks, args.nodes, args.ppn, args.launcher, installed_here=allocation.exists
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
    launch = Launch(request, known, allocation, environ, own, None, args.max_restarts, args.min_ranks)
    check = not args.no_preflight
    if not trainings:
        return run(launch, check)
    if not args.run:
        make_cells(directory, trainings)
    codes: list[int] = []
    for cell in trainings:  # of a sweep, whether or not one fails
        if is_finished(cell.directory):
            tell(f"{cell.directory} is finished: nothing is left to do")
            continue
        if len(trainings) > 1:
            tell(f"{cell.directory}: {' '.join(cell.overrides)}")
        mine = replace(request, program=cell.program())
        training = replace(launch, request=mine, directory=cell.directory, config=cell.config)
        codes.append(run(training, check and not codes))
        if codes[-1] == EXIT_REQUEUE or codes[-1] > 128:  # a signal or the job's end, for all of it
            break
    return next((code for code in codes if code), 0)


def split(rest: Sequence[str]) -> tuple[list[str], list[str], tuple[str, ...] | None]:
    """(overrides, machine.key=value overrides, program or None) from what stands after the options."""
    before = list(rest[: rest.index("--")]) if "--" in rest else list(rest)
    machine_overrides = [word for word in before if word.startswith("machine.")]
    overrides = [word for word in before if not word.startswith("machine.")]
    for word in overrides:
        if word.startswith("machine="):
            raise UserError(f"{word} is no override: write --machine {word.removeprefix('machine=')}.")
    if "--" not in rest:
        return overrides, machine_overrides, None
    program = tuple(rest[len(before) + 1 :])
    if overrides:
        raise UserError(
            f"{overrides[0]} stands before `--`, where only options and machine.key=value may: "
            "put the program and its arguments after `--`."
        )
    if not program:
        raise UserError("No program stands after `--`: write `-- python my_train.py`.")
    return [], machine_overrides, program


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
    return placeholder_allocation(max(nodes, 1), "slurm" if known.scheduler == "slurm" else "pbs")
