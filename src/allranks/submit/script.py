"""A job script: what the scheduler must know, the machine's setup, then `allranks launch`. Pure text.

How schedulers read and run it was observed on OpenPBS 23.06 and Slurm 22.05. All that the job needs is
in the script, as `qsub -v` and `-V` change values on their way. Both read a directive's words with
quotes like a shell's.
"""

from __future__ import annotations

import math
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from allranks.base.errors import UserError
from allranks.job.machine import Machine

LOG = "job.log"  # in the run directory: what the job says, as it says it
INDEX = {"pbs": "PBS_ARRAY_INDEX", "slurm": "SLURM_ARRAY_TASK_ID"}

_PAYLOAD = """\
# In the background, because a signal reaches a shell that waits, but not one with a program before it.
# On TERM both schedulers signal every process of the job, so there is nothing to pass on but USR1, USR2.
rm -f "$run/exit_code"
ended=
{command} &
payload=$!
trap 'ended=1' TERM
trap 'kill -USR1 "$payload"' USR1
trap 'kill -USR2 "$payload"' USR2
while wait "$payload"; kill -0 "$payload" 2> /dev/null; do :; done  # a signal ends `wait` early
wait "$payload"
code=$?
echo "$code" > "$run/exit_code"
# 85: stopped in order before the walltime, to go on in another job; whoever sends TERM wants no other.
if [ "$code" = 0 ] || {{ [ "$code" = 85 ] && [ -z "$ended" ]; }}; then
  {next} "$run"
  code=$?
  echo "$code" > "$run/exit_code"
fi
exit "$code"
"""


END_S = 20  # of the walltime, for the script's own end


@dataclass(frozen=True)
class Order:
    """What the user asks for. Kept in job.json, so that it can be asked for again."""

    machine: str
    nodes: int = 1
    walltime: str | None = None
    account: str | None = None
    queue: str | None = None
    name: str = "allranks"
    ranks: int | None = None
    ppn: int | None = None
    launcher: str = "auto"
    max_restarts: int = 0
    min_ranks: int | None = None
    chain: int | None = None  # jobs at most; None for a training: as many as it takes
    preflight: bool = True
    config_dir: str | None = None
    machine_overrides: tuple[str, ...] = ()
    workdir: str = "."

    @property
    def walltime_s(self) -> int | None:
        if self.walltime is None:
            return None
        hours, minutes, seconds = map(int, self.walltime.split(":"))
        return hours * 3600 + minutes * 60 + seconds

    def launch_options(self) -> tuple[str, ...]:
        """The options of `allranks launch` that the job will be started with."""
        given = {
            "--machine": self.machine,
            "--nodes": self.nodes if self.ranks and not self.ppn else None,
            "-n": self.ranks,
            "--ppn": self.ppn,
            "--launcher": None if self.launcher == "auto" else self.launcher,
            "--max-restarts": self.max_restarts or None,
            "--min-ranks": self.min_ranks,
            "--config-dir": self.config_dir,
        }
        words = [w for option, value in given.items() if value is not None for w in (option, str(value))]
        return (*words, *([] if self.preflight else ["--no-preflight"]), *self.machine_overrides)


def render(
    order: Order,
    machine: Machine,
    directory: str,
    program: Sequence[str] = (),
    cells: int = 0,
    umask: int = 0o022,
    environ: Mapping[str, str] | None = None,
) -> str:
    """The job script for `program`, or for the training frozen in `directory`.

    With `cells`, an array: job i is the run in `directory`/i. `environ` is the submitter's.
    """
    pbs = machine.scheduler == "pbs"
    directives = (_pbs if pbs else _slurm)(order, machine, directory, cells)
    prefix = "#PBS " if pbs else "#SBATCH "
    run = shlex.quote(directory) + (f'/"${INDEX[machine.scheduler]}"' if cells else "")
    shell = "#!/bin/bash -l" if pbs else "#!/bin/bash"  # Slurm hands on the submitter's environment
    quoted = (directory, order.workdir, *program, *order.machine_overrides)
    lines = [shell, *(prefix + line for line in directives), ""]
    if any(sign in word for word in quoted for sign in "$`"):
        lines.append("# shellcheck disable=SC2016 # a $ in single quotes is meant as it stands")
    lines.append(f"umask {umask:04o}")
    if order.walltime_s is None:
        lines.append("unset ALLRANKS_DEADLINE")
    else:
        lines += ["start=$(date +%s)", f"export ALLRANKS_DEADLINE=$((start + {order.walltime_s - END_S}))"]
    lines += [f"run={run}", f"cd {shlex.quote(order.workdir)} || exit 1"]
    # Here rather than by the scheduler: PBS may show it only at the end, and both refuse some paths.
    lines.append(f'exec >> "$run/{LOG}" 2>&1')
    finished = (
        '[ "$(cat "$run/exit_code" 2> /dev/null)" = 0 ]' if program
        else """grep -qs '"state": "finished"' "$run/summary.json\""""
    )  # fmt: skip
    lines += [f"if {finished}; then", '  echo "$run is finished: nothing is left to do"', "  exit 0", "fi"]
    if machine.setup:
        lines += ["", f"# {machine.name}", *machine.setup]
    lines += ["", "set -u", *_environment(environ or {}, pbs)]
    words = (sys.executable, "-m", "allranks", "launch", *order.launch_options(), "--run")
    command = shlex.join(words) + ' "$run"' + (f" \\\n  -- {shlex.join(program)}" if program else "")
    after = shlex.join((sys.executable, "-m", "allranks", "submit", "--next"))
    return "\n".join(lines) + "\n\n" + _PAYLOAD.format(command=command, next=after)


def chunk(order: Order, machine: Machine) -> tuple[int | None, int | None]:
    """Ranks on a node and CPUs for each, where they are given or known."""
    by_count = math.ceil(order.ranks / order.nodes) if order.ranks else None
    return order.ppn or by_count or machine.node.ranks_per_node, machine.node.cpus_per_rank


def _pbs(order: Order, machine: Machine, directory: str, cells: int) -> list[str]:
    ranks, each = chunk(order, machine)
    cpus = machine.node.cpus or (ranks or 1) * (each or 1)
    select = f"select={order.nodes}"
    if machine.submit.chunk:
        select += ":" + machine.submit.chunk.format(ranks=ranks or 1, cpus=cpus)
    # Its own words about the job; a path with other characters is refused.
    log = f"{directory}/{'^array_index^/' * bool(cells)}pbs.log"
    return [
        f"-N {shlex.quote(order.name)}",
        *_given("-A", order.account),
        *_given(_queue_option(order, machine), order.queue),
        f"-l {shlex.quote(select)}",
        *_given("-l", order.walltime and f"walltime={order.walltime}"),
        *_given("-l", machine.filesystems and f"filesystems={':'.join(machine.filesystems)}"),
        *machine.submit.options,
        "-j oe",
        f"-o {shlex.quote(log) if log.isascii() else '/dev/null'}",
        *([f"-J 0-{cells - 1}", "-r y"] if cells else []),
    ]


def _slurm(order: Order, machine: Machine, directory: str, cells: int) -> list[str]:
    ranks, each = chunk(order, machine)
    log = directory.replace("%", "%%") + "/%a" * bool(cells) + f"/{LOG}"
    return [
        f"--job-name={shlex.quote(order.name)}",
        *_given("-A", order.account),
        *_given(_queue_option(order, machine), order.queue),
        f"--nodes={order.nodes}",
        *([f"--ntasks-per-node={ranks}"] if ranks else []),
        *([f"--cpus-per-task={each}"] if each else []),
        *([f"--time={order.walltime}"] if order.walltime else []),
        *machine.submit.options,
        # No path with a backslash: it ends the job.
        f"--output={'/dev/null' if chr(92) in log else shlex.quote(log)}",
        "--open-mode=append",  # the job may be requeued, or another one go on here
        "--requeue",
        *(["--no-kill"] if order.min_ranks else []),  # a node that fails does not end the job
        *([f"--array=0-{cells - 1}"] if cells else []),
    ]


def _given(option: str, value: object) -> list[str]:
    return [f"{option} {shlex.quote(str(value))}"] if value else []


def _queue_option(order: Order, machine: Machine) -> str:
    queue = machine.queues.get(order.queue or "")
    return (queue.option if queue else None) or machine.submit.queue_option


def _environment(environ: Mapping[str, str], pbs: bool) -> list[str]:
    """The submitter's Python, and nobody's rank."""
    lines = []
    if not pbs:
        lines.append("# Slurm hands on what was left over in the shell of whoever submits.")
        lines.append("unset RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT")
    if sys.prefix != sys.base_prefix:  # a virtual environment: what `python` means in it
        lines.append(f'export PATH={shlex.quote(str(Path(sys.executable).parent))}:"$PATH"')
    tool = shutil.which("qsub" if pbs else "sbatch", path=environ.get("PATH", ""))
    if tool and (folder := str(Path(tool).parent)) not in ("/usr/local/bin", "/usr/bin", "/bin"):
        lines.append(f'export PATH="$PATH":{shlex.quote(folder)}  # the scheduler\'s commands')
    if environ.get("PYTHONPATH"):
        paths = shlex.quote(environ["PYTHONPATH"])
        lines.append(f'export PYTHONPATH={paths}"${{PYTHONPATH:+:$PYTHONPATH}}"')
    return lines


def check_words(order: Order) -> None:
    """Raises UserError for what a directive cannot hold."""
    for option, value in (("--account", order.account), ("--queue", order.queue)):
        if value is not None and not (value.isprintable() and value.strip()):
            raise UserError(f"{option} {value!r} is not valid: give its name.")
