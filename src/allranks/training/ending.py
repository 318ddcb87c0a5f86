"""How a run ends: what is said, by which rank, with which exit code, and what becomes of the other ranks.

ending_of() decides that, for every case, from what was raised:

    what was raised                  what is said                     exit code         the other ranks
    nothing, trained to its end      the test's figures               0                 end in the same way
    nothing, stopped and saved       why, and where it goes on        85                end in the same way
    a UserError that all have        the error, by one rank           its own, 2 or 1   raise the same error
    a UserError of this rank alone   the error, by this rank          its own, 2 or 1   are ended
    Ctrl-C, alone or before a rank
      has met the others             "interrupted"                    130
    Ctrl-C, after that               nothing                          1                 are ended
    a console that was closed,
      alone or before that           nothing                          1
    anything else                    the traceback, by this rank      1                 are ended

Other ranks that "are ended" may wait for this rank in a collective, and without it would wait for ever.
They end with this rank's exit code, as the launcher's own is that of whichever rank it sees end first.

A rank that is killed, stopped or stuck raises nothing. The watchdog of the other ranks notices it and ends
the run (runtime/watch). No torch is imported here: `--help` and a mistake in the configuration end here as
well.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, NoReturn

from allranks.base.errors import ANYONE, UserError, flush_console, is_unread, show
from allranks.job.identity import LeftOver, RankIdentity, discover, launcher_rank, started_by_mpi
from allranks.runtime import mpi

if TYPE_CHECKING:
    from allranks.runtime.runtime import Runtime
    from allranks.training.report import Reporter


class Others(Enum):
    """How this process stands to the other ranks of its run."""

    NONE = "this process is the whole run"
    STARTED = "the launcher has started more ranks, which this one has not met yet"
    MET = "this rank works together with other ranks"


@dataclass(frozen=True)
class Ending:
    """What one process does at its end."""

    exit_code: int
    message: str = ""  # what this process says; where it is empty another rank speaks, or nobody
    is_traceback: bool = False  # the message is Python's own account of an error that we did not foresee
    ends_others: bool = False
    # The error is the program's, and may be any rank's: the first one to have it speaks.
    is_anyones: bool = False


def ending_of(raised: BaseException, rank: int, others: Others, console_is_closed: bool = False) -> Ending:
    """What the process of this rank does after `raised` has ended its run.

    `console_is_closed`: nobody reads what this process writes to stdout or stderr, as after `| head`.
    """
    if isinstance(raised, UserError):
        all_have_it = raised.said_by not in (None, ANYONE)
        speaks = raised.said_by == rank or not all_have_it
        return Ending(
            raised.code,
            message=str(raised) if speaks else "",
            ends_others=others is not Others.NONE and not all_have_it,
            is_anyones=others is Others.MET and raised.said_by == ANYONE,
        )
    if isinstance(raised, KeyboardInterrupt):
        if others is Others.MET:
            return Ending(1, ends_others=True)
        return Ending(128 + signal.SIGINT, message="interrupted")
    # Only if it is the console that is closed. If a server that the program talks to has gone, that is an
    # error like any other.
    if isinstance(raised, BrokenPipeError) and console_is_closed and others is not Others.MET:
        return Ending(1)
    return Ending(
        1,
        message="".join(traceback.format_exception(raised)),
        is_traceback=True,
        ends_others=others is not Others.NONE,
    )


@contextmanager
def of_process(environ: Mapping[str, str]) -> Iterator[RankIdentity]:
    """Gives the rank that the launcher made of this process; ends the process if the block raises.

    An error that all ranks have comes here from of_run(), which has closed the run already; one rank shows
    it to the user here. If the launcher's variables contradict each other, the block is not run at all.
    """
    rank = launcher_rank(environ)
    try:
        identity = discover(environ)
    except UserError as error:
        ending = ending_of(error, rank, Others.STARTED)
        _say(ending)
        if started_by_mpi(environ) and not isinstance(error, LeftOver):
            # The variables may contradict each other on this rank and fit on another, which waits for us in
            # MPI_Init. Only a rank that has joined MPI can end it.
            mpi.end_job(ending.exit_code)
        sys.exit(ending.exit_code)

    try:
        yield identity
    except (Exception, KeyboardInterrupt) as raised:
        others = Others.NONE if identity.alone else Others.STARTED
        ending = ending_of(raised, rank, others, is_unread())
        flush_console()  # so that a closed console does not change the exit code
        if ending.is_traceback and not mpi.at_work():
            raise  # Python prints the traceback, and exits with 1
        _say(ending)
        if ending.ends_others:
            mpi.abort(ending.exit_code)  # under torchrun and srun our exit code does it
        sys.exit(ending.exit_code)


@contextmanager
def of_run(runtime: Runtime, report: Reporter) -> Iterator[Reporter]:
    """Opens the report of a run; closes it and the connections to the other ranks however the block ends.

    An error that only this rank has is written to the log, and ends all ranks at once. Any other error goes
    on to of_process().
    """
    others = Others.NONE if runtime.world_size == 1 else Others.MET
    report.open()
    try:
        yield report
    except BaseException as raised:
        ending = ending_of(raised, runtime.rank, others)
        if ending.is_anyones:
            _wait_where_another_rank_speaks(runtime)
            _say(ending)
            report.close()
            _end_all_ranks(runtime, ending.exit_code)
        if ending.ends_others:
            if isinstance(raised, RuntimeError):
                # Perhaps a collective has failed because another rank has died. Word of that death explains
                # more than this error does: it gets a moment to come.
                runtime.watchdog.hold()
            report.failed(ending.message)
            report.close()
            _end_all_ranks(runtime, ending.exit_code)
        if isinstance(raised, KeyboardInterrupt):
            report.interrupted()
        raise
    finally:
        report.close()
        runtime.close()


def _say(ending: Ending) -> None:
    if ending.is_traceback:
        with suppress(OSError):  # nobody may be reading any more
            print(ending.message.rstrip("\n"), file=sys.stderr, flush=True)
    elif ending.message:
        show(ending.message)


def _wait_where_another_rank_speaks(runtime: Runtime) -> None:
    """Where another rank was the first one with an error of the program: waits to be ended by it."""
    from allranks.runtime.runtime import ENDED_BY_ANOTHER_S

    if not runtime.meeting.is_first("error of the program"):
        time.sleep(ENDED_BY_ANOTHER_S)


def _end_all_ranks(runtime: Runtime, exit_code: int) -> NoReturn:
    """Ends this rank at once, and all others with it and with the same exit code."""
    flush_console()
    runtime.watchdog.fail(exit_code)
    mpi.abort(exit_code)
    os._exit(exit_code)  # a regular exit would wait for threads, and for other ranks
