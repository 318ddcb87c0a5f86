"""The command `allranks`: calls the code of its subcommand.

It answers at once because it imports only what the subcommand needs. `allranks train` becomes a process of
its own, which imports torch.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import NamedTuple

import allranks
from allranks.base.arguments import with_our_errors
from allranks.base.errors import UserError, end_unread, show
from allranks.base.text import did_you_mean


class Command(NamedTuple):
    """A subcommand that reads its own words: `function(words)` of the module returns the exit code."""

    name: str
    module: str  # imported only for this subcommand
    function: str
    help: str


# In the order of `allranks --help`.
COMMANDS = (
    Command("train", "", "", "train in this process; Hydra overrides follow"),
    Command("launch", "allranks.launch.command", "launch", "start the ranks of a training or program here"),
    Command("doctor", "allranks.doctor", "main", "check this machine and installation, with remedies"),
    Command("submit", "allranks.submit.command", "submit", "queue a training or program with PBS or Slurm"),
    Command("runs", "allranks.submit.listing", "list_runs", "list runs and their jobs"),
    Command("watch", "allranks.follow.command", "watch", "follow runs live, from their files"),
    Command("logs", "allranks.follow.command", "logs", "show what the ranks of a run have said"),
    Command("cancel", "allranks.submit.listing", "cancel", "end the jobs of a run"),
    Command("report", "allranks.report.command", "main", "make a page with pictures of a run"),
    Command("compare", "allranks.report.compare_command", "main", "a table of several runs, with the best"),
    Command("checkpoint", "allranks.run.show", "main", "list, verify or show checkpoints"),
)

DESCRIPTION = "The same PyTorch training run on one core, one GPU or every rank of a supercomputer."


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `arguments` (by default this process's own) and exits with its exit code.

    A UserError becomes one message on stderr, and the exit code is that of the error.
    """
    try:
        code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:
        end_unread()
    except UserError as error:
        show(error)
        sys.exit(error.code)


def _run(given: list[str]) -> int:
    """Runs the subcommand that stands first, with the words that follow; returns the exit code."""
    name, rest = "".join(given[:1]), given[1:]
    if name == "train":  # Hydra's
        os.execv(sys.executable, [sys.executable, "-m", "allranks.train", *rest])
    for command in COMMANDS:
        if command.name == name and command.module:
            function = getattr(importlib.import_module(command.module), command.function)
            return int(function(rest))
    known = [*(command.name for command in COMMANDS), "data"]
    if name and not name.startswith("-") and name not in known:
        raise UserError(
            f"{name} is not a command.{did_you_mean(name, known)} `allranks --help` lists the commands."
        )
    options = _parser().parse_args(given)
    options.run(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="allranks", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"allranks {allranks.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for each in COMMANDS:
        commands.add_parser(each.name, help=f"{each.help} ({each.name} --help)")

    data = commands.add_parser("data", help="fetch and check data sets")
    sets = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, run, text in (
        ("fetch", _fetch, "fetch what is missing, on a node with internet, and check it"),
        ("verify", _verify, "check the files that are there"),
    ):
        command = sets.add_parser(name, help=text, description=text)
        command.add_argument("set", nargs="?", default="mnist", help="mnist (default) or fashion_mnist")
        command.add_argument(
            "--root",
            type=os.path.expanduser,
            default=os.environ.get("ALLRANKS_DATA") or "data",
            help="the folder for all data sets (default: $ALLRANKS_DATA, else ./data)",
        )
        with_our_errors(command).set_defaults(run=run)
    with_our_errors(data)
    return with_our_errors(parser)


def _fetch(options: argparse.Namespace) -> None:
    from allranks.data import mnist

    for path in mnist.fetch_files(options.set, options.root):
        print(f"fetched {path}")
    _verify(options)


def _verify(options: argparse.Namespace) -> None:
    from allranks.data import mnist

    print(f"{options.set} is complete and intact in {mnist.verify(options.set, options.root)}")


if __name__ == "__main__":
    main()
