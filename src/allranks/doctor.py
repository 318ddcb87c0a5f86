"""`allranks doctor`: can this installation train on this host? What is wrong is said with a remedy.

Each check runs in a process of its own and within a time limit. So an MPI library that aborts, a file
system that hangs or a torch that crashes becomes a finding, and the other checks still answer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import NamedTuple

import allranks
from allranks.base.arguments import with_our_errors
from allranks.base.errors import UserError
from allranks.base.files import file_system
from allranks.base.processes import descendants
from allranks.base.text import one_line
from allranks.job.hosts import find_allocation

LIMIT_S = 30.0  # how long all checks may take, side by side; torch's first import takes long on a slow disk
TOOL_S = 8.0  # how long one command of a scheduler or MPI may take; as a rule it answers within a second
KILLED_S = 1.0  # how long a killed process may take to be gone; as a rule this takes milliseconds
WIDTH = 80  # columns of text
REINSTALL = "Reinstall what the message names; if it is allranks, report it."
MEMORY = "Look whether this host has run out of memory, or whether somebody has ended the process."
# What the drivers of GPUs put into /dev, whether or not torch can use them.
DEVICE_FILES = {"NVIDIA": "/dev/nvidia0", "AMD": "/dev/kfd"}
# Types of file systems that other nodes do not see.
NODE_LOCAL = ("tmpfs", "ramfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "zfs")
OTHER_MPI = "belongs to another MPI"


@dataclass(frozen=True)
class Finding:
    """What one check has seen. `state` is ok, warn or error; what is not ok has a remedy."""

    state: str
    text: str
    remedy: str = ""


def ok(text: str) -> Finding:
    """A finding that is as it should be."""
    return Finding("ok", text)


def warn(text: str, remedy: str) -> Finding:
    """A finding that may be in the way of a training."""
    return Finding("warn", text, remedy)


def error(text: str, remedy: str) -> Finding:
    """A finding that prevents a training."""
    return Finding("error", text, remedy)


Findings = Iterator[Finding]


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `allranks doctor`: prints the findings; returns exit code 1 if one is an error, else 0."""
    parser = argparse.ArgumentParser(
        prog="allranks doctor",
        description="Checks what a training needs on this host, and says what to do about what is wrong.",
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)
    arguments = with_our_errors(parser).parse_args(argv)
    if arguments.check:
        print(json.dumps([asdict(finding) for finding in _examine(CHECKS[arguments.check])]), flush=True)
        os._exit(0)  # an MPI library may hang or abort at a regular exit; the answer has been given
    found = examine_all()
    print(as_json(found) if arguments.json else as_text(found))
    return int(any(f.state == "error" for findings in found.values() for f in findings))


def examine_all(limit_s: float = LIMIT_S) -> dict[str, list[Finding]]:
    """The findings of every check, in order; all checks run at the same time."""
    deadline = time.monotonic() + limit_s
    command = [sys.executable, "-m", "allranks.doctor", "--check"]
    running = {name: _start([*command, name]) for name in CHECKS}
    try:
        return {
            name: _answer(child, limit_s, max(0.1, deadline - time.monotonic()))
            for name, child in running.items()
        }
    finally:
        for child in running.values():
            if child.poll() is None:  # as after Ctrl-C
                _end(child)


def _answer(child: subprocess.Popen[str], limit_s: float, left_s: float) -> list[Finding]:
    """The findings of a check that runs in this process, of whose `limit_s` seconds `left_s` are left."""
    result = _result(child, left_s)
    answer = next((line for line in reversed(result.out.splitlines()) if line.startswith("[")), None)
    if answer is not None:
        return [Finding(**values) for values in json.loads(answer)]
    if result.is_over_limit:
        text = f"no answer within {limit_s:.0f} s: something that it looks at hangs."
        return [error(text, "Look whether a file system or a network of this host is down.")]
    remedy = MEMORY if child.returncode == -signal.SIGKILL else REINSTALL
    return [error(f"the check itself failed: {result.problem}", remedy)]


def _examine(check: Callable[[], Findings]) -> list[Finding]:
    """What the check finds; whatever it raises is a finding as well."""
    try:
        return list(check())
    except UserError as problem:
        return [error(str(problem), "As it says.")]
    except Exception as problem:  # noqa: BLE001  whatever it is, it is a finding
        return [error(f"the check failed: {type(problem).__name__}: {problem}", REINSTALL)]


# --- shown --------------------------------------------------------------------------------------


def as_text(found: Mapping[str, Sequence[Finding]]) -> str:
    """The findings, at most 80 columns wide, worst things marked."""
    lines = [f"allranks {allranks.__version__} on {socket.gethostname()}, {_now()}", ""]
    for name, findings in found.items():
        for number, finding in enumerate(findings):
            label = f"{finding.state:<6}{name if number == 0 else '':<10} "
            lines += _wrapped(label, finding.text)
            if finding.remedy:
                lines += _wrapped(" " * len(label) + "-> ", finding.remedy)
    states = [finding.state for findings in found.values() for finding in findings]
    errors, warnings = states.count("error"), states.count("warn")
    end = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}."
    return "\n".join([*lines, "", end])


def as_json(found: Mapping[str, Sequence[Finding]]) -> str:
    """The findings as one JSON object: which allranks, which host, when, and a list of findings."""
    rows = [{"check": name, **asdict(f)} for name, findings in found.items() for f in findings]
    about = {"allranks": allranks.__version__, "host": socket.gethostname(), "time": _now()}
    return json.dumps({**about, "findings": rows}, indent=2)


def _wrapped(label: str, text: str) -> list[str]:
    """Lines of at most WIDTH columns that begin with the label; the home directory is shown as ~."""
    home = os.environ.get("HOME", "")
    if len(home) > 1:
        # Only where a path begins: /mnt/home/alice/x is not below /home/alice.
        text = re.sub(rf"(?<![\w/.~-]){re.escape(home)}/", "~/", text)
    return textwrap.wrap(label + text, WIDTH, subsequent_indent=" " * len(label), break_on_hyphens=False)


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


# --- the checks ---------------------------------------------------------------------------------


def python() -> Findings:
    """Which Python runs which allranks."""
    where = "in a virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    yield ok(f"{platform.python_version()} at {sys.executable} ({where}), {platform.platform()}")
    yield ok(f"allranks {allranks.__version__} at {Path(allranks.__file__).parent}")
    if os.environ.get("PYTHONPATH"):
        yield ok(f"PYTHONPATH={os.environ['PYTHONPATH']} goes before what is installed")


def torch() -> Findings:
    """Which torch is there, and whether it sees the GPUs of this host."""
    try:
        import torch
    except ImportError as problem:
        remedy = "Load the machine's module that brings torch, or `pip install torch`."
        yield error(f"torch cannot be imported: {problem}", remedy)
        return
    from allranks.runtime import native

    devices = [
        f"{backend.device_count()} {kind} ({backend.get_device_name(0)})"
        for kind in ("cuda", "xpu")
        if (backend := getattr(torch, kind, None)) and backend.is_available() and backend.device_count()
    ]
    backends = native.backends()
    text = f"{torch.__version__}, devices: {', '.join(devices) or 'cpu only'}"
    yield ok(f"{text}, backends: {', '.join(backends) or 'none'}")
    if not backends:
        yield error(
            "this torch has no torch.distributed: one rank only.", "Install a torch that was built with it."
        )
    there = [name for name, path in DEVICE_FILES.items() if Path(path).exists()]
    if there and not devices:
        yield warn(
            f"this host has a GPU ({', '.join(there)}) that torch does not see.",
            "Load the driver's module, unset CUDA_VISIBLE_DEVICES or ZE_AFFINITY_MASK, and take a torch "
            "that was built for this GPU.",
        )


def mpi() -> Findings:
    """Which MPI mpi4py has, and whether the mpiexec at hand starts ranks of it."""
    from allranks.runtime import mpi

    try:
        library = mpi.library()
    except (ImportError, RuntimeError) as reason:
        remedy = "Load the machine's MPI module, or `pip install mpi4py mpich`; torchrun needs none."
        yield warn(f"mpi4py finds no MPI library: {one_line(reason)}", remedy)
        return
    beside = shutil.which("mpiexec", path=Path(sys.executable).parent)
    launchers = [path for path in dict.fromkeys([shutil.which("mpiexec"), beside]) if path]
    if not launchers:
        remedy = "Load that MPI's module, or start the ranks with torchrun or srun."
        yield warn(f"mpi4py has {library}, but there is no mpiexec on PATH.", remedy)
    tried = {launcher: _starts_ranks_of(library, launcher) for launcher in launchers}
    good = next((launcher for launcher, problem in tried.items() if not problem), None)
    if good:
        yield ok(f"{library}; {good} starts its ranks (tried with two)")
    for launcher, problem in tried.items():
        text = f"mpi4py has {library}, but {launcher} {problem}"
        if OTHER_MPI in problem and good:
            remedy = f"Write {good} where you would write mpiexec, or put its folder first on PATH."
            yield warn(text, remedy)
        elif OTHER_MPI in problem:
            remedy = "Put that library's mpiexec first on PATH, or reinstall mpi4py against the other MPI."
            yield error(text, remedy)
        elif problem and not good:
            remedy = "On a login node that is usual: try `allranks doctor` inside a job."
            yield warn(f"mpi4py has {library}; {launcher} could not be tried: {problem}", remedy)


def _starts_ranks_of(library: str, launcher: str) -> str:
    """Empty if two ranks under `launcher` see each other; else what is wrong."""
    version, _ = _tool([launcher, "--version"])
    open_mpi = any(word in version for word in ("Open MPI", "OpenRTE", "open-mpi", "prte"))
    if version and open_mpi != ("Open MPI" in library):
        return f"{OTHER_MPI} ({version.strip().splitlines()[0][:40]}): each rank would be 0 of 1."
    # one write each: the launcher mixes the ranks' pieces
    code = "import os; from mpi4py import MPI; os.write(1, b'size %d\\n' % MPI.COMM_WORLD.size)"
    out, problem = _tool([launcher, "-n", "2", sys.executable, "-c", code])
    if out.split() == ["size", "2"] * 2:
        return ""
    if "size 1" in out:
        return f"{OTHER_MPI}: each of its ranks sees itself as 0 of 1."
    return problem or out[:200] or "it said nothing"


def ezpz() -> Findings:
    """Whether the ezpz for training is installed, which is optional."""
    from allranks.runtime import ezpz

    found = ezpz.installed()
    if found.kind == "real":
        version = f" ({found.version})" if found.version else ""
        yield ok(f"the real one{version}; runtime=auto uses it")
    elif found.kind == "absent":
        yield ok(f"absent; runtime=auto uses plain torch (it is optional: {found.remedy})")
    else:
        yield warn(f"{found.problem}; runtime=auto goes on without it.", found.remedy)


def scheduler() -> Findings:
    """Whether PBS or Slurm is there, and answers."""
    from allranks.job.scheduler import SCHEDULERS

    seen = False
    for kind in SCHEDULERS:
        name, job = kind.title, kind.this_job(os.environ)
        missing = [command for command in kind.commands if not shutil.which(command)]
        if len(missing) == len(kind.commands) and not job:
            continue
        seen = True
        where = f"{name}, inside job {job.id}" if job else f"{name}, not inside a job"
        if missing:
            remedy = f"Load {name}'s module; some centres have these on login nodes only."
            yield warn(f"{where}; not on PATH: {', '.join(missing)}", remedy)
            continue
        _, problem = _tool(kind.server_check)
        if problem:
            bad = error if job else warn  # without a job, training on this host still works
            remedy = f"Try `{' '.join(kind.server_check)}` again later, or ask the centre."
            yield bad(f"{where}; it does not answer: {problem}", remedy)
        else:
            yield ok(f"{name} answers, {where.partition(', ')[2]}")
    if not seen:
        yield ok("none: ranks start on this host (allranks launch)")


def machine() -> Findings:
    """Which machine file is taken for this host."""
    from allranks.job import machine

    found = machine.detect()
    machine.load(found.name)  # raises UserError where its file is wrong
    yield ok(f"{found.name} ({found.known_by}; --machine takes another)")


def ranks() -> Findings:
    """Whether rank variables are left over in this shell."""
    from allranks.job.identity import discover

    try:
        identity = discover(os.environ)
    except UserError as problem:
        names = _to_unset(str(problem))
        yield error(str(problem), f"unset {' '.join(names)}" if names else "As it says.")
        return
    stale = [name for name in ("MASTER_ADDR", "MASTER_PORT") if os.environ.get(name)]
    if identity.launcher == "none" and stale:
        text = f"{' and '.join(stale)} set in this shell, and no launcher at work."
        yield warn(text, f"unset {' '.join(stale)}")
    elif identity.launcher == "environment":
        text = f"RANK={identity.rank} and WORLD_SIZE={identity.world_size} are set in this shell."
        yield warn(text, "unset RANK LOCAL_RANK WORLD_SIZE unless you start each rank by hand.")
    else:
        who = "no launcher at work" if identity.launcher == "none" else f"started by {identity.launcher}"
        yield ok(f"{who}, no rank variables left over")


def _to_unset(said: str) -> list[str]:
    """The variables that a message about ranks wants unset, of those that are set here."""
    wanted = re.search(r"unset ([A-Z][A-Z0-9_]*(?: [A-Z][A-Z0-9_]*)*)", said)
    return [name for name in wanted[1].split() if name in os.environ] if wanted else []


def data() -> Findings:
    """Whether MNIST is there, and intact."""
    from allranks.data import mnist

    root = str(Path(os.environ.get("ALLRANKS_DATA") or "data").expanduser())
    raw = Path(root) / mnist.SOURCES["mnist"].folder / "raw"
    try:
        names = [entry.name for entry in raw.iterdir()]
    except (FileNotFoundError, NotADirectoryError):
        names = []
    except OSError as problem:
        yield error(f"{raw} cannot be read: {problem.strerror}.", "Set ALLRANKS_DATA to another folder.")
        return
    if any("ubyte" in name for name in names):
        yield ok(f"MNIST verified in {mnist.verify('mnist', root)}")
    else:
        yield warn(
            f"no MNIST in {Path(root).absolute()}.",
            f"allranks data fetch mnist --root {root}, or set ALLRANKS_DATA to where it is; "
            "data=synthetic needs no files.",
        )


def run_dir() -> Findings:
    """Whether a run directory can be made below here, and what the file system is good for."""
    above = next(p for p in [Path("runs").absolute(), *Path("runs").absolute().parents] if p.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".allranks-doctor-", dir=above) as folder:
            (Path(folder) / "file").write_bytes(b"x" * 4096)
    except OSError as problem:
        text = f"no run directory can be made in {above}: {problem.strerror}."
        yield error(text, "Go to a directory that you may write, or give run.dir.")
        return
    free, kind = shutil.disk_usage(above).free / 2**30, file_system(above)
    text = f"{above} is writable ({kind}, {free:,.0f} GiB free)"
    nodes = len(find_allocation(os.environ).hosts)
    if kind in NODE_LOCAL and nodes > 1:
        yield error(
            f"{text}, but this job has {nodes} nodes, and that file system is this one's.",
            "Start from, or give a run.dir on, a file system that all nodes share.",
        )
    elif free < 1:
        yield warn(text, "Make room, or give a run.dir elsewhere.")
    else:
        yield ok(text)


def threads() -> Findings:
    """How many CPUs this process may use, and whether OMP_NUM_THREADS goes with that."""
    from allranks.base.processes import usable_cpus

    mine, there = usable_cpus(), os.cpu_count() or 1
    omp = os.environ.get("OMP_NUM_THREADS", "")
    text = f"{mine} of {there} CPUs for this process" + (f", OMP_NUM_THREADS={omp}" if omp else "")
    if omp.isdigit() and int(omp) > mine:
        yield warn(text, "unset OMP_NUM_THREADS: each rank takes its share of the CPUs.")
    elif mine == 1 and there > 1:
        remedy = (
            "Ask for more CPUs a rank (srun -c, mpiexec --depth), or unset a binding that was left over "
            "(SLURM_CPU_BIND)."
        )
        yield warn(text, remedy)
    else:
        yield ok(text)


CHECKS: dict[str, Callable[[], Findings]] = {
    "python": python,
    "torch": torch,
    "mpi": mpi,
    "ezpz": ezpz,
    "scheduler": scheduler,
    "machine": machine,
    "ranks": ranks,
    "data": data,
    "run dir": run_dir,
    "threads": threads,
}


# --- tools --------------------------------------------------------------------------------------


def _start(command: Sequence[str]) -> subprocess.Popen[str]:
    """Starts a command in a session of its own, so that all that it starts can be ended with it."""
    return subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True, errors="replace", start_new_session=True,
    )  # fmt: skip


class _Result(NamedTuple):
    """How a process has ended."""

    out: str  # its stdout
    problem: str  # empty where all is well
    is_over_limit: bool = False


def _result(child: subprocess.Popen[str], limit_s: float) -> _Result:
    """How the process has ended, which is ended at the limit with all that it has started."""
    try:
        out, err = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return _Result("", f"no answer within {limit_s:.0f} s", is_over_limit=True)
    finally:
        _end(child)
    code = child.returncode
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    said = one_line(err or out)[-200:]
    return _Result(out, f"{how}: {said}".rstrip(": ") if code else "")


def _end(child: subprocess.Popen[str]) -> None:
    """Kills the process with all that it has started, and waits for its end, but not for ever.

    A process that waits for a file system which does not answer ends only when that answers.
    """
    # A check starts tools in sessions of their own, which are not in the check's process group.
    started = descendants(child.pid)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    for pid in started:
        with contextlib.suppress(ProcessLookupError, PermissionError):  # a tool may be another user's
            os.kill(pid, signal.SIGKILL)
    for pipe in (child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()
    with contextlib.suppress(subprocess.TimeoutExpired):
        child.wait(KILLED_S)


def _tool(command: Sequence[str]) -> tuple[str, str]:
    """(stdout, problem) of a command of a scheduler or MPI; `problem` is empty where all is well."""
    try:
        result = _result(_start(command), TOOL_S)
        return result.out, result.problem
    except OSError as problem:
        return "", f"{command[0]}: {problem.strerror}"


if __name__ == "__main__":
    sys.exit(main())
