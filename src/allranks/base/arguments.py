"""Command lines of `allranks`: a mistake in one is said as every other mistake is, in one message."""

from __future__ import annotations

import argparse
from typing import NoReturn

from allranks.base.errors import UserError


def with_our_errors(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """The parser, whose errors from now on are raised as UserError.

    By itself argparse would print how the command is used, then the error in a form of its own, and exit.
    """

    def refuse(message: str) -> NoReturn:
        raise UserError(f"{message}. `{parser.prog} --help` tells what can be given.")

    parser.error = refuse  # type: ignore[method-assign]
    return parser
