"""A job script: what the scheduler must know, the machine's setup, then `allranks launch`. Pure text.

The text is job.sh.template, with a value for each @word@ of it. All that the job needs is in the script,
because `qsub -v` and `-V` change values on their way.
"""

from __future__ import annotations

import math
import re
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from allranks.base.errors import UserError
from allranks.base.text import as_text, is_text
from allranks.job import scheduler
from allranks.job.batch import JOB_LOG, STARTED, JobRequest
from allranks.job.machine import Machine
from allranks.job.scheduler import Scheduler
from allranks.submit.order import Order

# Of the walltime, for what the script does after the training: queue a successor, say so. A busy server was
# seen to take half a minute for that. A short job cannot spare so much, and its user sits before it.
END_S = 20
END_OF_LONG_JOB_S = 60
LONG_JOB_S = 600
USUAL_FOLDERS = ("/usr/local/bin", "/usr/bin", "/bin")  # which are on every job's PATH
UNSET_RANKS = """\
# Slurm hands on what was left over in the shell of whoever submits.
unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT"""


def render(
    order: Order,
    machine: Machine,
    directory: str,
    program: Sequence[str] = (),
    cells: int = 0,
    umask: int = 0o022,
    environ: Mapping[str, str] | None = None,
) -> str:
    """The job script for `program`, or, without one, for the training that is frozen in `directory`.

    With `cells`, the script of an array of so many jobs: job i is the run in `directory`/i. The job runs
    with `umask`. `environ` is the submitter's environment.
    """
    kind = scheduler.named(machine.scheduler)
    directives = kind.directives(request(order, machine, directory, cells))
    own_words = (directory, order.workdir, *program, *order.machine_overrides)
    has_dollar = any(sign in word for word in own_words for sign in "$`")
    job_nodes = order.nodes if has_own_hosts(order, machine) else None
    options = order.launch_words(job_nodes)
    launch = shlex.join([sys.executable, "-m", "allranks", "launch", *options, "--run"])
    return _filled(
        shebang=kind.shebang,
        directives="\n".join(f"{kind.directive_prefix} {line}" for line in directives),
        shellcheck=(
            "# shellcheck disable=SC2016 # a $ in single quotes is meant as it stands" if has_dollar else ""
        ),
        umask=f"{umask:04o}",
        deadline=_deadline(order),
        run=shlex.quote(directory) + (f'/"${kind.array_index}"' if cells else ""),
        workdir=shlex.quote(order.workdir),
        log=JOB_LOG,
        started=STARTED,
        finished=(
            '[ "$(cat "$run/exit_code" 2> /dev/null)" = 0 ]'
            if program
            else """grep -qs '"state": "finished"' "$run/summary.json\""""
        ),
        say_why=kind.say_why,
        setup="\n".join(["", f"# {machine.name}", *machine.setup]) if machine.setup else "",
        environment="\n".join(_environment(environ or {}, kind)),
        launch=f'{launch} "$run"' + (f" \\\n  -- {shlex.join(program)}" if program else ""),
        next=shlex.join([sys.executable, "-m", "allranks", "submit", "--next"]),
    )


def request(order: Order, machine: Machine, directory: str, cells: int = 0) -> JobRequest:
    """What the scheduler is asked for."""
    queue = machine.queues.get(order.queue or "")
    used = order.nodes - (order.spares or 0)
    evenly = math.ceil(order.ranks / used) if order.ranks else None
    return JobRequest(
        name=order.name,
        nodes=order.nodes,
        directory=directory,
        walltime=order.walltime,
        account=order.account,
        account_option=machine.submit.account_option,
        queue=order.queue,
        queue_option=(queue.option if queue else None) or machine.submit.queue_option,
        ranks_per_node=order.ppn or evenly or machine.node.ranks_per_node,
        cpus_per_rank=machine.node.cpus_per_rank,
        cpus_per_node=machine.node.cpus,
        chunk=machine.submit.chunk,
        resources=machine.submit.resources,
        filesystems=machine.filesystems,
        storage=machine.storage,
        options=(*machine.submit.options, *(queue.options if queue else ())),
        array_jobs=cells,
        survives_nodes=order.min_ranks is not None or bool(order.spares),
        on_own_hosts=has_own_hosts(order, machine),
    )


def has_own_hosts(order: Order, machine: Machine) -> bool:
    """Whether each node that is asked for is a host; False if the queue deals in parts of a host."""
    queue = machine.queues.get(order.queue or "")
    return not (queue and queue.ranks_per_chunk)


def _filled(**values: str) -> str:
    """The template with its values. A line that has nothing but an empty value goes."""
    template = Path(__file__).with_name("job.sh.template").read_text()
    lines = [
        line
        for line in template.splitlines()
        if not (re.fullmatch(r" *@(\w+)@", line) and not values[line.strip(" @")])
    ]
    # In one pass, so that an @word@ within a value stays what it is.
    return re.sub(r"@(\w+)@", lambda found: values[found[1]], "\n".join(lines)) + "\n"


def _deadline(order: Order) -> str:
    """The lines that tell the job when it ends, as no scheduler does.

    The ranks' programs shall stop by ALLRANKS_DEADLINE; the scheduler ends the script at ALLRANKS_JOB_END.
    """
    if order.walltime_s is None:
        return "unset ALLRANKS_DEADLINE ALLRANKS_JOB_END"
    end_s = END_OF_LONG_JOB_S if order.walltime_s >= LONG_JOB_S else END_S
    return (
        "start=$(date +%s)\n"
        f"export ALLRANKS_DEADLINE=$((start + {order.walltime_s - end_s}))\n"
        f"export ALLRANKS_JOB_END=$((start + {order.walltime_s}))"
    )


def _environment(environ: Mapping[str, str], kind: Scheduler) -> list[str]:
    """The submitter's Python and the scheduler's commands; no rank variables of the submitter's shell."""
    lines = [UNSET_RANKS] if kind.hands_environment_on else []
    # What `python` means to the submitter. A virtual environment or one of conda is not active in a job, or
    # the login profile has put another Python first.
    python_folder = str(Path(sys.executable).parent)
    if python_folder not in USUAL_FOLDERS:
        lines.append(f'export PATH={shlex.quote(python_folder)}:"$PATH"')
    command = shutil.which(kind.commands[0], path=environ.get("PATH", ""))
    folder = str(Path(command).parent.absolute()) if command else None
    if folder and folder not in USUAL_FOLDERS:
        lines.append(f'export PATH="$PATH":{shlex.quote(folder)}  # the scheduler\'s commands')
    if environ.get("PYTHONPATH"):
        # The job may have another present directory, as with --cell.
        given = [str(Path(path).absolute()) for path in environ["PYTHONPATH"].split(":") if path]
        paths = shlex.quote(":".join(given))
        lines.append(f'export PYTHONPATH={paths}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    return lines


def check_words(order: Order, program: Sequence[str] = ()) -> None:
    """Raises UserError for what a directive cannot hold, or no job script."""
    for word in (order.workdir, order.config_dir or "", *order.machine_overrides, *program):
        if not is_text(word):
            raise UserError(
                f"{as_text(word)!r} has bytes that are no UTF-8, which a job script cannot hold: give the "
                "file or folder another name."
            )
    for option, value in (("--account", order.account), ("--queue", order.queue)):
        if value is not None and not (value.isprintable() and value.strip()):
            raise UserError(f"{option} {value!r} is not valid: give its name.")
