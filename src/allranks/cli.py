"""The command `allranks`: calls the code of its subcommand.

It answers at once because it imports only what the subcommand needs. `allranks train` becomes a process of
its own, which imports torch.
"""

from __future__ import annotations

import argparse
import errno
import importlib
import io
import os
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import allranks
from allranks.base.arguments import with_our_errors
from allranks.base.errors import UserError, end_interrupted, end_unread, is_unread, show
from allranks.base.files import in_present_directory, with_home
from allranks.base.text import did_you_mean


class Command(NamedTuple):
    """A subcommand that reads its own words: `function(words)` of the module returns the exit code."""

    name: str
    module: str  # imported only for this subcommand
    function: str
    help: str


# In the order of `allranks --help`.
COMMANDS = (
    Command("train", "", "", "train in this process"),
    Command("launch", "allranks.launch.command", "launch", "start the ranks of a training or program here"),
    Command("doctor", "allranks.doctor", "main", "check this machine and installation, with remedies"),
    Command("submit", "allranks.submit.command", "submit", "queue a training or program with PBS or Slurm"),
    Command("runs", "allranks.submit.listing", "list_runs", "list runs and their jobs"),
    Command("watch", "allranks.follow.command", "watch", "follow runs live, from their files"),
    Command("logs", "allranks.follow.command", "logs", "show what the ranks of a run have said"),
    Command("cancel", "allranks.submit.listing", "cancel", "end the jobs of a run"),
    Command("report", "allranks.report.command", "main", "make a page with pictures of a run"),
    Command(
        "compare", "allranks.report.compare_command", "main", "show several runs in a table, with the best"
    ),
    Command("predict", "allranks.inference.command", "predict", "say what a trained model sees in images"),
    Command(
        "evaluate",
        "allranks.inference.command",
        "evaluate",
        "measure a trained model on its test set or on other data",
    ),
    Command("export", "allranks.inference.command", "export", "write a trained model for other programs"),
    Command("checkpoint", "allranks.run.show", "main", "list, verify or show checkpoints"),
    Command("completion", "", "", "let the TAB key complete commands, in bash, zsh and fish"),
)

DISK_IS_FULL = (errno.ENOSPC, errno.EDQUOT)
DESCRIPTION = "The same PyTorch training run on one core, one GPU or every rank of a supercomputer."
MORE = "`allranks COMMAND --help` explains a command. A first look: `allranks doctor`."
DATA = "Fetches the data sets that allranks knows, MNIST and Fashion-MNIST, and checks their files."


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line `arguments` (by default this process's own) and exits with its exit code.

    A UserError becomes one message on stderr, and the exit code is that of the error. After Ctrl-C there is
    one line, too, and the process ends by SIGINT.
    """
    try:
        _let_stdout_take_any_text()
        with in_present_directory():
            code = _run(list(sys.argv[1:] if arguments is None else arguments))
        sys.stdout.flush()
        sys.exit(code)
    except BrokenPipeError:
        if not is_unread():  # another pipe than this command's output: an error like any other
            raise
        end_unread()
    except KeyboardInterrupt:
        end_interrupted()
    except UserError as error:
        show(error)
        sys.exit(error.code)
    except OSError as error:
        if error.errno not in DISK_IS_FULL:
            raise
        what = error.filename or "the output of this command"
        show(f"{what} cannot be written ({error.strerror}): free some space or quota.")
        end_unread()


def _let_stdout_take_any_text() -> None:
    """What stdout's encoding lacks is shown escaped, as an accent in a run's name is in ASCII."""
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout.errors == "strict":
        sys.stdout.reconfigure(errors="backslashreplace")


def _run(given: list[str]) -> int:
    """Runs the subcommand that stands first, with the words that follow; returns the exit code."""
    name, rest = "".join(given[:1]), given[1:]
    if name == "train":  # Hydra's
        os.execv(sys.executable, [sys.executable, "-m", "allranks.train", *rest])
    if name == "completion":
        from allranks.completion import command as completing

        return completing.main(
            rest, {**{each.name: _to_load(each) for each in COMMANDS}, "data": _load_data}
        )
    for command in COMMANDS:
        if command.name == name and command.module:
            return int(_load(command)(rest))
    known = [*(command.name for command in COMMANDS), "data"]
    if name and not name.startswith("-") and name not in known:
        raise UserError(
            f"{name} is not a command.{did_you_mean(name, known)} `allranks --help` lists the commands."
        )
    options = _parser().parse_args(given)
    options.run(options)
    return 0


def _load(command: Command) -> Callable[[list[str]], Any]:
    """The function that reads the command's words; its module is imported now."""
    function: Callable[[list[str]], Any] = getattr(
        importlib.import_module(command.module), command.function
    )
    return function


def _to_load(command: Command) -> Callable[[], Callable[[list[str]], Any]] | None:
    """A function that loads the command, for the completion of its words; None for Hydra's own."""
    return partial(_load, command) if command.module else None


def _load_data() -> Callable[[list[str]], Any]:
    """`allranks data` is read by the parser here."""
    return lambda _: _data_parser(
        argparse.ArgumentParser(prog="allranks data", description=DATA)
    ).parse_args([])


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="allranks", description=DESCRIPTION, epilog=MORE)
    parser.add_argument("--version", action="version", version=f"allranks {allranks.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for each in COMMANDS:
        commands.add_parser(each.name, help=each.help)

    _data_parser(commands.add_parser("data", help="fetch and check data sets", description=DATA))
    return with_our_errors(parser)


def _data_parser(data: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Adds the commands below `allranks data` to their parser, and returns it."""
    sets = data.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, run, text in (
        ("fetch", _fetch, "fetch what is missing, on a node with internet, and check it"),
        ("verify", _verify, "check the files that are there"),
    ):
        command = sets.add_parser(name, help=text, description=text)
        command.add_argument("set", nargs="?", default="mnist", help="mnist (default) or fashion_mnist")
        command.add_argument(
            "--root",
            type=_root,
            default=os.environ.get("ALLRANKS_DATA") or "data",
            help="the folder for all data sets (default: $ALLRANKS_DATA, else ./data)",
        )
        with_our_errors(command).set_defaults(run=run)
    return with_our_errors(data)


def _root(word: str) -> str:
    """The folder that --root gives. Raises UserError for `~nobody`, and for nothing at all."""
    if not word.strip():
        raise UserError("--root is empty: give the folder for all data sets.")
    return with_home("--root", word)


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
