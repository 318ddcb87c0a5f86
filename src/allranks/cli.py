"""The command `allranks`: calls the code of its subcommand.

It answers at once because it imports only what the subcommand needs. `allranks train` becomes a process of
its own, which imports torch.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import allranks
from allranks.base.errors import UserError, end_unread, show

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
    command, rest = "".join(given[:1]), given[1:]
    if command == "train":  # Hydra's
        os.execv(sys.executable, [sys.executable, "-m", "allranks.train", *rest])
    if command == "launch":
        from allranks.launch import command as launching

        return launching.launch(rest)
    if command == "doctor":
        from allranks import doctor

        return doctor.main(rest)
    if command == "compare":
        from allranks.report import compare_command

        return compare_command.main(rest)
    if command == "checkpoint":
        from allranks.run import show

        return show.main(rest)
    if command in ("submit", "runs", "cancel"):
        from allranks.submit import command as submitting
        from allranks.submit import listing

        answer = {"submit": submitting.submit, "runs": listing.list_runs, "cancel": listing.cancel}[command]
        return answer(rest)
    if command in ("watch", "logs"):
        from allranks.follow import command as following

        return {"watch": following.watch, "logs": following.logs}[command](rest)
    options = _parser().parse_args(given)
    options.run(options)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="allranks", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"allranks {allranks.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    commands.add_parser("train", help="train in this process (Hydra overrides follow; train --help)")

    commands.add_parser("launch", help="start the ranks of a training or program here (launch --help)")

    commands.add_parser("doctor", help="check this machine and installation, with remedies (doctor --help)")
    commands.add_parser("submit", help="queue a training or program with PBS or Slurm (submit --help)")
    commands.add_parser("runs", help="list runs and their jobs (runs --help)")
    commands.add_parser("compare", help="a table of several runs, sorted, with the best (compare --help)")
    commands.add_parser("watch", help="follow runs live, from their files (watch --help)")
    commands.add_parser("logs", help="show what the ranks of a run have said (logs --help)")
    commands.add_parser("cancel", help="end the jobs of a run (cancel --help)")
    commands.add_parser("checkpoint", help="list, verify or show checkpoints (checkpoint --help)")

    data = commands.add_parser("data", help="fetch and check data sets").add_subparsers(
        title="commands", metavar="COMMAND", required=True
    )
    for name, run, text in (
        ("fetch", _fetch, "fetch what is missing, on a node with internet, and check it"),
        ("verify", _verify, "check the files that are there"),
    ):
        command = data.add_parser(name, help=text, description=text)
        command.add_argument("set", nargs="?", default="mnist", help="mnist (default) or fashion_mnist")
        command.add_argument(
            "--root",
            type=os.path.expanduser,
            default=os.environ.get("ALLRANKS_DATA") or "data",
            help="the folder for all data sets (default: $ALLRANKS_DATA, else ./data)",
        )
        command.set_defaults(run=run)
    return parser


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
