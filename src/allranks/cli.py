"""The `allranks` command. Imports nothing heavy: a training is started as a process of its own."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

import allranks
from allranks.errors import EXIT_USER_ERROR, UserError

DESCRIPTION = "The same PyTorch training run on one core, one GPU or every rank of a supercomputer."


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs one command and exits: 0, or 2 after a user's error."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    if given[:1] == ["train"]:  # Hydra's own command line follows, --help included
        os.execv(sys.executable, [sys.executable, "-m", "allranks.train", *given[1:]])
    if given[:1] == ["launch"]:  # overrides or `-- PROGRAM ARGS` follow its options
        from allranks.launch import cli as launching

        sys.exit(launching.launch(given[1:]))
    if given[:1] == ["doctor"]:
        from allranks import doctor

        sys.exit(doctor.main(given[1:]))
    if given[:1] == ["checkpoint"]:
        from allranks import checkpoint_cli

        sys.exit(checkpoint_cli.main(given[1:]))
    if given[:1] in (["submit"], ["runs"], ["cancel"]):
        from allranks.launch import submit

        answer = {"submit": submit.submit, "runs": submit.list_runs, "cancel": submit.cancel}[given[0]]
        sys.exit(answer(given[1:]))
    options = _parser().parse_args(given)
    try:
        options.run(options)
    except UserError as error:
        print(f"allranks: {error}", file=sys.stderr)
        sys.exit(EXIT_USER_ERROR)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="allranks", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"allranks {allranks.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)

    commands.add_parser("train", help="train in this process (Hydra overrides follow; train --help)")

    commands.add_parser("launch", help="start the ranks of a training or program here (launch --help)")

    commands.add_parser("doctor", help="check this machine and installation, with remedies (doctor --help)")
    commands.add_parser("submit", help="queue a training or program with PBS or Slurm (submit --help)")
    commands.add_parser("runs", help="list runs and their jobs (runs --help)")
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
            default=os.environ.get("ALLRANKS_DATA", "data"),
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
