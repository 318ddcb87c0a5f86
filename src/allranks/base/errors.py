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

# What libraries raise if values, types or shapes do not fit together. Any other error in a user's own code
# keeps its traceback.
MISFITS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)

ANYONE = -1  # in place of a rank that shows an error


class UserError(Exception):
    """An error that the user can put right: the message says what is wrong, which value, and what to do.

    Names in the message may come from anywhere: control characters are shown escaped.

    If several ranks are known to raise the same error, `said_by` is the one rank that shows it to the
    user. None means that this rank may be the only one that has the error. ANYONE means that all ranks may
    raise it or only some, for example if a user's program makes a mistake: the first of them shows it.
    """

    code = EXIT_USER_ERROR

    def __init__(self, message: str, *, said_by: int | None = None) -> None:
        if not message.isprintable():
            from allranks.base.text import printable  # seldom: a guard's start does without that module

            message = printable(message)
        super().__init__(message)
        self.said_by = said_by


class RunError(UserError):
    """An error during a run that the user has started correctly: exit code 1."""

    code = 1


def as_line(message: object, fd: int = 2) -> str:
    """The form of the messages of every `allranks` command: `allranks: MESSAGE` and a line feed.

    `fd` is the descriptor that the message will be written to. For a terminal its lines are wrapped, and
    its first word is coloured.
    """
    text = f"allranks: {message}"
    if not os.isatty(fd):
        return f"{text}\n"
    from allranks.base import terminal  # not needed in a job, whose ranks write to files and pipes

    return terminal.message(text, fd)


def show(message: object) -> None:
    """Says on stderr what is wrong, in the form of as_line().

    Raises no further error if the disk is full, or if stderr was closed before Python started (sys.stderr
    is None then).
    """
    with suppress(OSError, AttributeError):
        sys.stderr.write(as_line(message))
        sys.stderr.flush()


def flush_console() -> None:
    """Writes out what Python still holds back for stdout and stderr. Called just before a process ends.

    If the console is closed or the disk is full, this output is lost. Python would try to write it once
    more at its own end, print a complaint, and change the exit code to 120. To prevent that, the stream's
    file descriptor is redirected to /dev/null. A program may have replaced sys.stdout or sys.stderr by an
    object that is closed or has no flush(): such a stream is skipped.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BlockingIOError:  # the console is full now, but may take the rest later
            continue
        except OSError:
            with suppress(OSError, ValueError, AttributeError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        except (ValueError, AttributeError):  # the stream is closed, is None, or has no flush()
            continue


def is_unread() -> bool:
    """Whether nobody reads stdout or stderr any more: it is a closed pipe, as after `| head`."""
    import select  # seldom: a guard's start does without that module

    poll = select.poll()
    for fd in (1, 2):
        poll.register(fd, 0)  # no event is asked for: poll() reports a closed pipe in any case
    return any(events & (select.POLLERR | select.POLLHUP) for _, events in poll.poll(0))


def end_unread() -> NoReturn:
    """Ends a command that can no longer write to stdout, without Python's own message about it.

    The reader may have ended, as `| head` does, or the disk may be full.
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
