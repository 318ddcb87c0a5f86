"""The command lines of `allranks watch` and `allranks logs`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from allranks.base import terminal
from allranks.base.arguments import with_our_errors
from allranks.base.errors import show
from allranks.base.text import printable
from allranks.follow import watch as watching
from allranks.follow.logs import Line, Logs, followed
from allranks.follow.reading import Reader

COLOUR_OF = {"WARNING": terminal.YELLOW, "ERROR": terminal.RED, "CRITICAL": terminal.RED}


def watch(arguments: Sequence[str]) -> int:
    """Runs `allranks watch` with these arguments and returns its exit code.

    Raises UserError if there is no run to show.
    """
    parser = argparse.ArgumentParser(
        prog="allranks watch",
        description="Shows how far runs have come, from their files alone, and draws it anew every "
        "two seconds until all have finished or Ctrl-C is typed.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "runs", nargs="*", default=["runs"], metavar="RUN",
        help="a run, a sweep, or a folder with runs in it; default: ./runs",
    )  # fmt: skip
    parser.add_argument(
        "--once", action="store_true", help="show it once, and end; so it does where there is no terminal"
    )
    parser.add_argument(
        "--json", action="store_true", help="show it once, for programs: one JSON line a run"
    )
    args = with_our_errors(parser).parse_args(arguments)
    reader = Reader(args.runs, show)
    if args.json:
        print("".join(json.dumps(view.to_json()) + "\n" for view in reader.views()), end="")
    elif args.once or not terminal.obeys(1):
        print("\n".join(watching.picture(reader.views(), watching.look_of_stdout())))
    else:
        # follow() itself ends at Ctrl-C. The first reading of the files may be interrupted before that.
        with suppress(KeyboardInterrupt):
            watching.follow(reader)
    return 0


def logs(arguments: Sequence[str]) -> int:
    """Runs `allranks logs` with these arguments and returns its exit code.

    Raises UserError if the run has no logs, or none of the rank that --rank names.
    """
    parser = argparse.ArgumentParser(
        prog="allranks logs",
        description="Shows what the ranks of a run have said, and its job, in the order of time.",
        allow_abbrev=False,
    )
    parser.add_argument("run", metavar="RUN", help="the directory of a run")
    parser.add_argument("--rank", type=int, metavar="N", help="show this rank alone")
    parser.add_argument("-f", action="store_true", dest="follows", help="go on until the run has finished")
    args = with_our_errors(parser).parse_args(arguments)
    found = Logs(Path(args.run), show, args.rank)
    found.check()
    has_colours = terminal.shows_colours(1)
    pieces = followed(found) if args.follows else [found.new_lines(is_over=True)]
    with suppress(KeyboardInterrupt):  # Ctrl-C is the usual way to end -f
        for lines in pieces:
            _print(lines, args.rank is None, has_colours)
    return 0


def _print(lines: Sequence[Line], names_source: bool, has_colours: bool) -> None:
    """Prints the lines. With `names_source` each one begins with its source, such as `[rank 3]`."""
    for line in lines:
        text = printable(line.text)
        if has_colours and line.level in COLOUR_OF:
            text = terminal.painted(text, COLOUR_OF[line.level])
        print(f"[{line.source}] {text}" if names_source else text)
    sys.stdout.flush()
