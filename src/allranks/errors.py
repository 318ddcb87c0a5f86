"""Errors that are shown to a person: one message, no traceback."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_STUCK = 86  # started again and again without gaining a step


class UserError(Exception):
    """Something the user can put right: the message says what, which value, and what to do.

    `said_by` is the rank that says it where several ranks are known to raise the same error; None where
    this rank may be the only one.
    """

    code = EXIT_USER_ERROR

    def __init__(self, message: str, *, said_by: int | None = None) -> None:
        super().__init__(message)
        self.said_by = said_by


class RunError(UserError):
    """What went wrong in a run that was asked for rightly."""

    code = 1


def one_line(said: object) -> str:
    """What another library's error says, fit for a message of ours."""
    return " ".join(str(said).replace("\0", " ").split())


def end_unread() -> NoReturn:
    """Ends a command whose console was closed, as by `| head`, without Python's own word about it."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """` Did you mean X?` for the known name nearest to `word`, or an empty string."""
    import difflib  # only for a mistake: every rank's start comes by here

    known = list(known)
    near = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    if not near:  # a case or a leaf name only: Relu for ReLU, lr for optimizer.lr
        near = [name for name in known if name.lower().split(".")[-1] == word.lower().split(".")[-1]]
    return f" Did you mean {near[0]}?" if near else ""
