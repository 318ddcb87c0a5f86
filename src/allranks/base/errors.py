"""Errors that are shown to a person: one message, no traceback."""

from __future__ import annotations

import os
import signal
import sys
from contextlib import suppress
from typing import NoReturn

EXIT_USER_ERROR = 2
EXIT_REQUEUE = 85  # stopped in order, with a checkpoint: start the run again and it goes on
EXIT_STUCK = 86  # started again and again without gaining a step
EXIT_TIMED_OUT = 124  # not done within its limit, as of timeout(1)
EXIT_CANNOT_START = 127  # the program is not there, as of a shell

# What libraries raise where values, types or shapes do not go together. Any other error of a user's own
# code keeps its traceback.
MISFITS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)

ANYONE = -1  # in place of a rank that shows an error


class UserError(Exception):
    """An error that the user can put right: the message says what is wrong, which value, and what to do.

    Names in the message may come from anywhere: control characters are shown escaped.

    Where several ranks are known to raise the same error, `said_by` is the one rank that shows it to the
    user. None means that this rank may be the only one that has the error. ANYONE means that all ranks may
    raise it or only some, as where a user's program does something wrong: the first of them shows it.
    """

    code = EXIT_USER_ERROR

    def __init__(self, message: str, *, said_by: int | None = None) -> None:
        if not message.isprintable():
            from allranks.base.text import printable  # seldom: a guard's start does without that module

            message = printable(message)
        super().__init__(message)
        self.said_by = said_by


class RunError(UserError):
    """An error during a run, although the user had asked for it correctly: exit code 1."""

    code = 1


def as_line(message: object, fd: int = 2) -> str:
    """The one form in which every `allranks` command says what is wrong: `allranks: MESSAGE`, line feed.

    `fd` is the descriptor that the line will be written to. For a terminal its lines are wrapped and its
    first word is coloured.
    """
    text = f"allranks: {message}"
    if not os.isatty(fd):
        return f"{text}\n"
    from allranks.base import terminal  # not needed in a job, whose ranks write to files and pipes

    return terminal.message(text, fd)


def show(message: object) -> None:
    """Says on stderr what is wrong, in the form of as_line(). A full disk is no further error."""
    with suppress(OSError):
        sys.stderr.write(as_line(message))
        sys.stderr.flush()


def flush_console() -> None:
    """Hands on what stdout and stderr hold. What a closed console or a full disk does not take is lost.

    Python tries it once more at its end, and would say so and change the exit code to 120: so such a stream
    leads nowhere from now on. A program may have put an object of its own in the place of a stream, which
    has little more than write(): nothing of it keeps a process from its end.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BlockingIOError:  # it takes more later
            continue
        except OSError:
            with suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (ValueError, AttributeError):  # it is closed, there is none, or it has no flush()
            continue


def is_unread() -> bool:
    """Whether nobody reads stdout or stderr: the other end of its pipe is closed, as by `| head`."""
    import select  # seldom: a guard's start does without that module

    poll = select.poll()
    for fd in (1, 2):
        poll.register(fd, 0)  # no event is asked for: that nobody reads is told in any case
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def end_unread() -> NoReturn:
    """Ends a command whose stdout takes nothing more, without Python's own message about it.

    That is so where its reader has ended, as `| head` does, or where the disk is full.
    """
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    sys.exit(1)


def end_interrupted() -> NoReturn:
    """Ends a command after Ctrl-C: with one line, and by the signal, which tells a shell the reason."""
    show("interrupted by Ctrl-C")
    with suppress(OSError):  # what was printed before belongs to the user
        sys.stdout.flush()
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    os.kill(os.getpid(), signal.SIGINT)
    sys.exit(128 + signal.SIGINT)  # not reached, unless the signal is blocked
