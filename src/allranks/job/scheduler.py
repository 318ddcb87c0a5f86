"""Asks PBS and Slurm: submit, does this job exist, in what state, end it. Never without a time limit."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import time
from collections.abc import Mapping, Sequence
from datetime import datetime

from allranks.base.errors import UserError
from allranks.base.text import one_line

LIMIT_S = 60.0
FINISHED_PBS, UNKNOWN_PBS = 35, 153  # exit codes of qstat
STATES = {
    "Q": "queued", "R": "running", "H": "held", "W": "waiting", "E": "ending", "B": "running",
    "T": "queued", "S": "suspended", "M": "moved",
}  # fmt: skip
# What a scheduler's complaint has in it, and what helps.
_REMEDIES = (
    (r"connect|contact|timed out|socket|communication failure", "the scheduler is down: try again later"),
    (r"account|project|allocation", "give one that you belong to with --account"),
    (r"queue|partition|qos", "give another --queue"),
    (r"exceed|violat|limit|max|not available|node count", "ask for less with --nodes or --walltime"),
    (r"resource", "machine.submit.chunk=, .options= and machine.filesystems= change what is asked for"),
)  # fmt: skip


class NoAnswer(UserError):
    """Nobody knows whether the scheduler did what it was asked to."""


def submit(scheduler: str, script: str, after: str | None = None) -> str:
    """Queues the script, to start once `after` has ended; the job's id."""
    done = _call(submit_argv(scheduler, script, after), "look for the job before you submit again")
    job_id = done.stdout.strip().partition(";")[0]
    if done.returncode or not _is_id(scheduler, job_id):
        raise _refused(done)
    return job_id


def submit_argv(scheduler: str, script: str, after: str | None = None) -> list[str]:
    if scheduler == "pbs":
        return ["qsub", *(["-W", f"depend=afterany:{after}"] if after else []), script]
    wait = [f"--dependency=afterany:{after}", "--kill-on-invalid-dep=yes"] if after else []
    return ["sbatch", "--parsable", *wait, script]


def exists(scheduler: str, job_id: str) -> bool:
    """Whether the scheduler knows the job. It would take an unknown one in a dependency, and then lose
    the job that waits for it.
    """
    if not _is_id(scheduler, job_id):
        return False
    done = _call(_ask([job_id], scheduler, every_state=True))
    if scheduler == "pbs" and done.returncode in (0, FINISHED_PBS, UNKNOWN_PBS):
        return done.returncode != UNKNOWN_PBS
    if scheduler == "slurm" and (done.returncode == 0 or "Invalid job id" in done.stderr):
        return bool(done.stdout.strip())
    raise _refused(done)


def states(scheduler: str, job_ids: Sequence[str]) -> dict[str, str]:
    """The state of those that the scheduler still has, and why, where it says that one cannot start."""
    known = [job_id for job_id in job_ids if _is_id(scheduler, job_id)]
    if not known:
        return {}
    done = _call(_ask(known, scheduler))
    found: dict[str, str] = {}
    if scheduler == "slurm":
        if done.returncode and "Invalid job id" not in done.stderr:
            raise _refused(done)
        for line in done.stdout.splitlines():
            job_id, state, reason = line.split("|", 2)
            found[job_id] = {"PENDING": "queued"}.get(state, state.lower())
            if state == "PENDING" and not re.match(r"None|Priority|Resources|Dependency|BeginTime", reason):
                found[job_id] += f" ({reason})"
        return found
    if done.returncode not in (0, FINISHED_PBS, UNKNOWN_PBS):
        raise _refused(done)
    for block in re.split(r"^Job Id: ", done.stdout, flags=re.M)[1:]:
        job_id = block.split("\n", 1)[0].strip()
        letter = re.search(r"^\s+job_state = (\w)", block, flags=re.M)
        if letter and letter[1] in STATES:
            never = " (Can Never Run)" if "Can Never Run" in block else ""
            found[job_id] = STATES[letter[1]] + never
    return found


def cancel(scheduler: str, job_ids: Sequence[str]) -> None:
    """Ends the jobs."""
    done = _call(["qdel" if scheduler == "pbs" else "scancel", *job_ids])
    if done.returncode and not (scheduler == "pbs" and done.returncode in (FINISHED_PBS, UNKNOWN_PBS)):
        raise _refused(done)


def requeue(job_id: str) -> None:
    """Ends this job of Slurm, and queues it again."""
    done = _call(["scontrol", "requeue", job_id])
    if done.returncode:
        raise _refused(done)


def this_job(environ: Mapping[str, str]) -> str | None:
    """The id of the job that this process is in, in an array that of its own job there."""
    array, index = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    if array and index:
        return f"{array}_{index}"
    return environ.get("PBS_JOBID") or environ.get("SLURM_JOB_ID")


def ends_at(environ: Mapping[str, str]) -> int | None:
    """When this job ends, in seconds since 1970; None outside a job, or where the job has no limit."""
    job_id = this_job(environ)
    if job_id is None:
        return None
    if environ.get("PBS_JOBID"):
        said = _call(["qstat", "-f", job_id]).stdout
        limit = re.search(r"Resource_List.walltime = ([\d:]+)", said)
        start = re.search(r"stime = (.+)", said)
        if limit is None or start is None:
            return None
        try:
            began = datetime.strptime(start[1].strip(), "%a %b %d %H:%M:%S %Y")  # local time
        except ValueError:
            return None
        return int(began.timestamp()) + _seconds(limit[1])
    left = _call(["squeue", "-h", "-j", job_id, "-o", "%L"]).stdout.strip()  # UNLIMITED, or 1-02:03:04
    return int(time.time()) + _seconds(left) if re.fullmatch(r"[\d:-]+", left) else None


def _seconds(text: str) -> int:
    days, _, clock = text.rpartition("-")
    parts = [int(part) for part in clock.split(":")]
    return int(days or 0) * 86400 + sum(part * 60**i for i, part in enumerate(reversed(parts)))


def of_array(scheduler: str, array_id: str, index: int) -> str:
    """The id of one job of an array: 2[].pbs -> 2[1].pbs, 7 -> 7_1."""
    return array_id.replace("[]", f"[{index}]") if scheduler == "pbs" else f"{array_id}_{index}"


def _ask(job_ids: Sequence[str], scheduler: str, every_state: bool = False) -> list[str]:
    if scheduler == "pbs":
        return ["qstat", "-f", *job_ids]
    wanted = ["-t", "all"] if every_state else []
    return ["squeue", "-h", "-r", *wanted, "-j", ",".join(job_ids), "-o", "%i|%T|%r"]


def _is_id(scheduler: str, job_id: str) -> bool:
    return bool(re.fullmatch(r"\d+(\[\d*\])?(\.[\w.-]+)?" if scheduler == "pbs" else r"\d+(_\d+)?", job_id))


def _call(argv: Sequence[str], if_late: str = "") -> subprocess.CompletedProcess[str]:
    # Inside a job of Slurm its variables, and SBATCH_* anywhere, would go before the script's own lines.
    overriding = ("SLURM_", "SBATCH_")
    env = {k: v for k, v in os.environ.items() if k == "SLURM_CONF" or not k.startswith(overriding)}
    try:
        return subprocess.run(
            argv, capture_output=True, text=True, timeout=LIMIT_S, check=False, env=env,
            stdin=subprocess.DEVNULL,
        )  # fmt: skip
    except FileNotFoundError:
        name = "PBS" if argv[0].startswith("q") else "Slurm"
        raise UserError(
            f"{argv[0]} is not found: work on a login node of a cluster with {name}, or give another "
            "--machine; `allranks launch` needs no scheduler."
        ) from None
    except subprocess.TimeoutExpired:
        raise NoAnswer(
            f"{argv[0]} does not answer within {LIMIT_S:.0f} s: the scheduler is down or busy. "
            f"Try again later{if_late and '; ' + if_late}."
        ) from None


def _refused(done: subprocess.CompletedProcess[str]) -> UserError:
    said = one_line(done.stderr + " " + done.stdout) or "no word of explanation"
    fits = (remedy for pattern, remedy in _REMEDIES if re.search(pattern, said, flags=re.I))
    remedy = next(fits, "put right what it names")
    failed = f"`{shlex.join(done.args)}` failed with exit code {done.returncode}"
    return UserError(f"{failed}: {said.rstrip('.')}. What may help: {remedy}.")
