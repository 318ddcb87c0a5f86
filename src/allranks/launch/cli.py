"""`allranks launch`: the arguments, and from them to a dry run or a running job. No torch."""

from __future__ import annotations

import argparse
import math
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from allranks.errors import EXIT_USER_ERROR, UserError
from allranks.launch import allocation as allocations
from allranks.launch import command, dryrun, machine
from allranks.launch.allocation import Allocation
from allranks.launch.command import Plan, Request
from allranks.launch.machine import LAUNCHERS, Machine


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The options of `allranks launch`. What they leave over is overrides, or `-- PROGRAM ARGS`."""
    add = parser.add_argument
    add("-n", dest="ranks", type=int, metavar="RANKS", help="ranks in all; default: all there are")
    add("--nodes", type=int, metavar="K", help="use the first K nodes")
    add("--ppn", type=int, metavar="P", help="ranks per node")
    add("--launcher", default="auto", metavar="|".join(LAUNCHERS), help="who starts the ranks")
    add("--machine", metavar="M", help="machine file to use; default: the one this host belongs to")
    add("--hosts", metavar="FILE", help="hosts to use: `host`, `host:4` or `host slots=4` a line")
    add(
        "--config-dir",
        metavar="DIR",
        help="a folder with machine/NAME.yaml (and groups) of your own",
    )
    add(
        "--dry-run", action="store_true", help="show the command and every rank's place, do nothing"
    )
    add("--json", action="store_true", help="the dry run for programs")


def main(namespace: argparse.Namespace, rest: Sequence[str]) -> int:
    """Runs `allranks launch`; returns the exit code: 2 and one message after a user's error."""
    try:
        return _launch(namespace, rest, os.environ)
    except UserError as error:
        print(f"allranks: {error}", file=sys.stderr, flush=True)
        return EXIT_USER_ERROR


def _launch(args: argparse.Namespace, rest: Sequence[str], environ: Mapping[str, str]) -> int:
    if args.json and not args.dry_run:
        raise UserError("--json is for a dry run: add --dry-run.")
    program, machine_overrides = split(rest, args.config_dir)
    known = machine.load(args.machine, machine_overrides, args.config_dir, environ=environ)
    given = allocations.find(environ, args.hosts)
    allocation = fitting(given, known, args)
    here = args.hosts is not None or allocation is given
    request = Request(
        program=program,
        ranks=args.ranks,
        nodes=args.nodes,
        ppn=args.ppn,
        launcher=args.launcher,
        installed_here=here,
    )
    plan = command.plan(request, known, allocation, environ)
    if args.dry_run:
        show = dryrun.as_json if args.json else dryrun.text
        print(show(plan, allocation.source))
        return 0
    return _run(plan, environ)


def _run(plan: Plan, environ: Mapping[str, str]) -> int:
    from allranks.launch import supervise

    for path, content in plan.files:
        Path(path).write_text(content)
    return int(
        supervise.run(
            plan.argv,
            plan.environment(environ),
            None,
            world_size=plan.world_size,
            hosts=[host.name for host in plan.hosts],
        )
    )


def split(rest: Sequence[str], config_dir: str | None = None) -> tuple[tuple[str, ...], list[str]]:
    """(program, machine.key=value overrides) from what stands after the options.

    Without `--` the rest is overrides of our own training, which are composed and checked here.
    """
    before = list(rest[: rest.index("--")]) if "--" in rest else list(rest)
    program = tuple(rest[len(before) + 1 :])
    machine_overrides = [word for word in before if word.startswith("machine.")]
    others = [word for word in before if not word.startswith("machine.")]
    if "--" in rest:
        if others:
            raise UserError(
                f"{others[0]} stands before `--`, where only options and machine.key=value may: "
                "put the program and its arguments after `--`."
            )
        if not program:
            raise UserError("No program stands after `--`: write `-- python my_train.py`.")
        return program, machine_overrides
    return training(others, config_dir), machine_overrides


def training(overrides: Sequence[str], config_dir: str | None) -> tuple[str, ...]:
    """Our own training with these overrides, after they have been found to be valid."""
    from allranks import config

    own = ["--config-dir", config_dir] if config_dir else []
    composed = config.from_command_line([*own, *overrides])
    if len(composed) > 1:
        raise UserError("`launch` starts one training: leave -m to `allranks submit`.")
    return (sys.executable, "-m", "allranks.train", *own, *overrides)


def fitting(given: Allocation, known: Machine, args: argparse.Namespace) -> Allocation:
    """The allocation found, or, for a dry run outside a job, hosts that stand for a job's."""
    if given.scheduler != "local" or (known.scheduler == "local" and (args.nodes or 1) == 1):
        return given
    per_node = args.ppn or known.node.ranks_per_node or args.ranks or 1
    nodes = args.nodes or max(1, math.ceil((args.ranks or 1) / per_node))
    if not args.dry_run:
        raise UserError(
            f"There is no job here: {socket.gethostname()} is one host, outside PBS and Slurm. "
            + (f"--nodes {args.nodes} needs a job: " if args.nodes else "Get a job first: ")
            + "use `qsub -I`, `salloc` or `allranks submit`; --hosts FILE names hosts of your own, "
            "and --machine local uses this host."
        )
    scheduler: allocations.Scheduler = "slurm" if known.scheduler == "slurm" else "pbs"
    return allocations.placeholder(max(nodes, 1), scheduler)
