"""`allranks doctor`: is this installation, on this host, fit to train? Each finding with a remedy.

Each check runs in a process of its own and within a time limit: an MPI library that aborts, a file
system that hangs or a torch that crashes becomes a finding, and the other checks still answer.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path

import allranks
from allranks.errors import UserError

LIMIT_S = 30.0  # for one check; torch's first import on a cold file system takes long
TOOL_S = 8.0  # for one command of a scheduler or MPI
WIDTH = 80
OK, WARN, ERROR = "ok", "warn", "error"


@dataclass(frozen=True)
class Finding:
    """What one check has seen. A remedy stands beside everything that is not ok."""

    state: str
    text: str
    remedy: str = ""


def main(argv: Sequence[str] | None = None) -> int:
    """Prints the findings; 1 where one of them is an error, else 0."""
    parser = argparse.ArgumentParser(
        prog="allranks doctor", description="Check this installation on this host."
    )
    parser.add_argument("--json", action="store_true", help="for programs")
    parser.add_argument("--check", choices=CHECKS, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.check:
        print(json.dumps([asdict(finding) for finding in _examine(CHECKS[arguments.check])]))
        sys.stdout.flush()
        os._exit(0)  # an MPI library may hang or abort at a regular exit; the answer has been given
    found = examine_all()
    print(as_json(found) if arguments.json else as_text(found))
    return int(any(f.state == ERROR for findings in found.values() for f in findings))


def examine_all(limit_s: float = LIMIT_S) -> dict[str, list[Finding]]:
    """The findings of every check, in order; all checks run at the same time."""
    deadline = time.monotonic() + limit_s
    running = {
        name: subprocess.Popen(
            [sys.executable, "-m", "allranks.doctor", "--check", name],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True,
        )
        for name in CHECKS
    }  # fmt: skip
    try:
        return {name: _result(child, deadline, limit_s) for name, child in running.items()}
    finally:
        for child in running.values():
            _end(child)


def _result(child: subprocess.Popen[str], deadline: float, limit_s: float) -> list[Finding]:
    try:
        out, err = child.communicate(timeout=max(0.1, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        return [
            Finding(
                ERROR, f"no answer within {limit_s:.0f} s: something that it looks at hangs.",
                "Look whether a file system or a network of this host is down.",
            )
        ]  # fmt: skip
    for line in reversed(out.splitlines()):
        if line.startswith("["):
            return [Finding(**values) for values in json.loads(line)]
    last = (err.strip().splitlines() or ["it said nothing"])[-1]
    code = child.returncode
    how = signal.Signals(-code).name if code < 0 else f"exit code {code}"
    return [
        Finding(
            ERROR, f"the check itself ended with {how}: {last}",
            "Reinstall what the message names; if it is allranks, report it.",
        )
    ]  # fmt: skip


def _end(child: subprocess.Popen[str]) -> None:
    """The check and what it has started; its group is its own."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()
    for pipe in (child.stdout, child.stderr):
        if pipe is not None:
            pipe.close()


def _examine(check: Callable[[], list[Finding]]) -> list[Finding]:
    try:
        return check()
    except UserError as error:
        return [Finding(ERROR, str(error), "As it says.")]
    except Exception as error:  # noqa: BLE001  whatever it is, it is a finding
        return [
            Finding(
                ERROR, f"the check failed: {type(error).__name__}: {error}",
                "Reinstall what the message names; if it is allranks, report it.",
            )
        ]  # fmt: skip


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
    counts = {s: sum(f.state == s for fs in found.values() for f in fs) for s in (ERROR, WARN)}
    errors, warnings = counts[ERROR], counts[WARN]
    end = f"{errors} error{'s' * (errors != 1)}, {warnings} warning{'s' * (warnings != 1)}."
    return "\n".join([*lines, "", end])


def as_json(found: Mapping[str, Sequence[Finding]]) -> str:
    rows = [{"check": name, **asdict(f)} for name, findings in found.items() for f in findings]
    about = {"allranks": allranks.__version__, "host": socket.gethostname(), "time": _now()}
    return json.dumps({**about, "findings": rows}, indent=2)


def _wrapped(label: str, text: str) -> list[str]:
    home = os.environ.get("HOME", "")
    text = text.replace(f"{home}/", "~/") if len(home) > 1 else text
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=label,
        subsequent_indent=" " * len(label),
        break_on_hyphens=False,
    )


def _now() -> str:
    return datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M:%S UTC")


# --- the checks ---------------------------------------------------------------------------------


def python() -> list[Finding]:
    where = "in a virtual environment" if sys.prefix != sys.base_prefix else "no virtual environment"
    found = [
        Finding(OK, f"{platform.python_version()} at {sys.executable} ({where}), {platform.platform()}")
    ]
    found.append(Finding(OK, f"allranks {allranks.__version__} at {Path(allranks.__file__).parent}"))
    if os.environ.get("PYTHONPATH"):
        found.append(Finding(OK, f"PYTHONPATH={os.environ['PYTHONPATH']} goes before what is installed"))
    return found


def torch() -> list[Finding]:
    try:
        import torch
    except ImportError as error:
        return [
            Finding(ERROR, f"torch cannot be imported: {error}",
                    "Load the machine's module that brings torch, or `pip install torch`.")
        ]  # fmt: skip
    devices = [
        f"{backend.device_count()} {kind} ({backend.get_device_name(0)})"
        for kind in ("cuda", "xpu")
        if (backend := getattr(torch, kind, None)) is not None
        and backend.is_available()
        and backend.device_count()
    ]
    backends = [
        name for name, there in (
            ("gloo", torch.distributed.is_gloo_available()),
            ("nccl", torch.distributed.is_nccl_available()),
            ("mpi", torch.distributed.is_mpi_available()),
        ) if there
    ] if torch.distributed.is_available() else []  # fmt: skip
    text = f"{torch.__version__}, devices: {', '.join(devices) or 'cpu only'}"
    found = [Finding(OK, f"{text}, backends: {', '.join(backends) or 'none'}")]
    if not backends:
        found.append(
            Finding(ERROR, "this torch has no torch.distributed: one rank only.",
                    "Install a torch that was built with it.")
        )  # fmt: skip
    there = [name for name, path in _DEVICE_FILES if Path(path).exists()]
    if there and not devices:
        found.append(
            Finding(WARN, f"this host has a GPU ({', '.join(there)}) that torch does not see.",
                    "Load the driver's module, unset CUDA_VISIBLE_DEVICES or ZE_AFFINITY_MASK, and "
                    "take a torch that was built for this GPU.")
        )  # fmt: skip
    return found


_DEVICE_FILES = (("NVIDIA", "/dev/nvidia0"), ("AMD", "/dev/kfd"))


def mpi() -> list[Finding]:
    """Which MPI mpi4py has, and whether the mpiexec at hand starts ranks of it."""
    from allranks.runtime.mpi import flat

    try:
        from mpi4py import MPI
    except (ImportError, RuntimeError) as error:
        remedy = "Load the machine's MPI module, or `pip install mpi4py mpich`; torchrun needs none."
        return [Finding(WARN, f"mpi4py finds no MPI library: {flat(error)}", remedy)]
    library = flat(MPI.Get_library_version().strip().splitlines()[0].split(",")[0])
    on_path, beside = shutil.which("mpiexec"), Path(sys.executable).parent / "mpiexec"
    tried = {
        launcher: _starts_ranks_of(library, launcher)
        for launcher in dict.fromkeys([on_path, str(beside) if beside.exists() else None])
        if launcher is not None
    }
    good = [launcher for launcher, problem in tried.items() if not problem]
    if not tried:
        return [
            Finding(WARN, f"mpi4py has {library}, but there is no mpiexec on PATH.",
                    "Load that MPI's module, or start the ranks with torchrun or srun.")
        ]  # fmt: skip
    found = []
    if good:
        found.append(Finding(OK, f"{library}; {good[0]} starts its ranks (tried with two)"))
    for launcher, problem in tried.items():
        if _OTHER in problem:
            remedy = (
                f"Write {good[0]} where you would write mpiexec, or put its folder first on PATH."
                if good
                else "Put that library's mpiexec first on PATH, or reinstall mpi4py against the other MPI."
            )
            found.append(
                Finding(
                    WARN if good else ERROR,
                    f"mpi4py has {library}, but {launcher} {problem}",
                    remedy,
                )
            )
        elif problem and not good:
            found.append(
                Finding(WARN, f"mpi4py has {library}; {launcher} could not be tried: {problem}",
                        "On a login node that is usual: try `allranks doctor` inside a job.")
            )  # fmt: skip
    return found


_OTHER = "belongs to another MPI"


def _starts_ranks_of(library: str, launcher: str) -> str:
    """Empty where two ranks under `launcher` see each other; else what is wrong."""
    version, _ = _tool([launcher, "--version"], TOOL_S)
    open_mpi = any(word in version for word in ("Open MPI", "OpenRTE", "open-mpi", "prte"))
    if version and open_mpi != ("Open MPI" in library):
        return f"{_OTHER} ({version.strip().splitlines()[0][:40]}): each rank would be 0 of 1."
    # one write each: the launcher mixes the ranks' pieces
    code = "import os; from mpi4py import MPI; os.write(1, b'size %d\\n' % MPI.COMM_WORLD.size)"
    out, problem = _tool([launcher, "-n", "2", sys.executable, "-c", code], TOOL_S)
    if out.split() == ["size", "2"] * 2:
        return ""
    if "size 1" in out:
        return f"{_OTHER}: each of its ranks sees itself as 0 of 1."
    return problem or out[:200] or "it said nothing"


def ezpz() -> list[Finding]:
    from allranks.runtime import ezpz

    state = ezpz.installed()
    if state == "real":
        return [Finding(OK, f"the real one; runtime=auto uses it{_version_of('ezpz')}")]
    if state == "impostor":
        return [
            Finding(WARN, "the installed ezpz is PyPI's image pan-zoom tool, not the one for "
            "training; "
                    "runtime=auto goes on without it.", f"pip uninstall -y ezpz && {ezpz.INSTALL}")
        ]  # fmt: skip
    return [Finding(OK, f"absent; runtime=auto uses plain torch (it is optional: {ezpz.INSTALL})")]


def scheduler() -> list[Finding]:
    found = []
    for name, commands, ask, variable in (
        ("PBS", ("qsub", "qstat", "qdel"), ["qstat", "-B"], "PBS_JOBID"),
        ("Slurm", ("sbatch", "squeue", "srun"), ["scontrol", "ping"], "SLURM_JOB_ID"),
    ):
        job = os.environ.get(variable)
        there = [command for command in commands if shutil.which(command)]
        if not there and not job:
            continue
        inside = f"inside job {job}" if job else "not inside a job"
        if len(there) < len(commands):
            missing = ", ".join(c for c in commands if c not in there)
            found.append(
                Finding(WARN, f"{name}, {inside}; not on PATH: {missing}",
                        f"Load {name}'s module; some centres have these on login nodes only.")
            )  # fmt: skip
            continue
        _, problem = _tool(ask, TOOL_S)
        if problem:
            found.append(
                # without a job, training on this host still works
                Finding(ERROR if job else WARN, f"{name}, {inside}; it does not answer: {problem}",
                        f"Try `{' '.join(ask)}` again later, or ask the centre.")
            )  # fmt: skip
        else:
            found.append(Finding(OK, f"{name} answers, {inside}"))
    return found or [Finding(OK, "none: ranks start on this host (allranks launch)")]


def machine() -> list[Finding]:
    from importlib import util

    if util.find_spec("allranks.launch.machine") is None:
        return [Finding(OK, "none are known to this version")]
    from importlib import import_module

    known = import_module("allranks.launch.machine").load()
    return [Finding(OK, f"{known.name} (chosen by host name; --machine takes another)")]


def ranks() -> list[Finding]:
    """Whether rank variables are left over in this shell."""
    from allranks.runtime.environment import discover

    try:
        launch = discover(os.environ)
    except UserError as error:
        return [Finding(ERROR, str(error), "unset RANK LOCAL_RANK WORLD_SIZE MASTER_ADDR MASTER_PORT")]
    stale = [n for n in ("MASTER_ADDR", "MASTER_PORT") if os.environ.get(n)]
    if launch.launcher == "none" and stale:
        return [
            Finding(WARN, f"{' and '.join(stale)} set in this shell, and no launcher at work.",
                    f"unset {' '.join(stale)}")
        ]  # fmt: skip
    if launch.launcher == "environment":
        return [
            Finding(WARN, f"RANK={launch.rank} and WORLD_SIZE={launch.world_size} are set in this "
            f"shell.",
                    "unset RANK LOCAL_RANK WORLD_SIZE unless you start each rank by hand.")
        ]  # fmt: skip
    who = "no launcher at work" if launch.launcher == "none" else f"started by {launch.launcher}"
    return [Finding(OK, f"{who}, no rank variables left over")]


def network() -> list[Finding]:
    host = socket.gethostname()
    try:
        addresses = sorted({str(info[4][0]) for info in socket.getaddrinfo(host, None)})
    except OSError as error:
        return [
            Finding(WARN, f"this host's name {host} has no address ({error.strerror or error}).",
                    f"Ranks on one host do not mind; for several, add {host} to DNS or /etc/hosts.")
        ]  # fmt: skip
    with socket.create_server(("127.0.0.1", 0)) as listener:
        socket.create_connection(listener.getsockname()[:2], timeout=5).close()
    return [Finding(OK, f"{host} is {', '.join(addresses[:3])}; loopback works")]


def data() -> list[Finding]:
    from allranks.data import mnist

    root = os.environ.get("ALLRANKS_DATA") or "data"
    if not any((Path(root) / mnist.SOURCES["mnist"].folder / "raw").glob("*ubyte*")):
        return [
            Finding(WARN, f"no MNIST in {Path(root).absolute()}.",
                    f"allranks data fetch mnist --root {root}, or set ALLRANKS_DATA to where it "
                    f"is; "
                    "data=synthetic needs no files.")
        ]  # fmt: skip
    return [Finding(OK, f"MNIST verified in {mnist.verify('mnist', root)}")]


def run_dir() -> list[Finding]:
    """Whether a run directory can be made below here, and what the file system is good for."""
    above = next(p for p in [Path("runs").absolute(), *Path("runs").absolute().parents] if p.is_dir())
    try:
        with tempfile.TemporaryDirectory(prefix=".allranks-doctor-", dir=above) as folder:
            (Path(folder) / "file").write_bytes(b"x" * 4096)
    except OSError as error:
        return [
            Finding(ERROR, f"no run directory can be made in {above}: {error.strerror}.",
                    "Go to a directory that you may write, or give run.dir.")
        ]  # fmt: skip
    free = shutil.disk_usage(above).free / 2**30
    kind = _file_system(above)
    text = f"{above} is writable ({kind}, {free:,.0f} GiB free)"
    if free < 1:
        return [Finding(WARN, text, "Make room, or give a run.dir elsewhere.")]
    if kind in _NODE_LOCAL and _nodes() > 1:
        return [
            Finding(ERROR, f"{text}, but this job has {_nodes()} nodes, and that file system is "
            f"this one's.",
                    "Start from, or give a run.dir on, a file system that all nodes share.")
        ]  # fmt: skip
    return [Finding(OK, text)]


_NODE_LOCAL = ("tmpfs", "ramfs", "ext2", "ext3", "ext4", "xfs", "btrfs", "overlay", "zfs")


def threads() -> list[Finding]:
    from allranks.runtime.environment import cpu_affinity

    mine, all_of_them = len(cpu_affinity()), os.cpu_count() or 1
    text = f"{mine} of {all_of_them} CPUs for this process"
    omp = os.environ.get("OMP_NUM_THREADS", "")
    if omp:
        text += f", OMP_NUM_THREADS={omp}"
    if omp.isdigit() and int(omp) > mine:
        return [Finding(WARN, text, "unset OMP_NUM_THREADS: each rank takes its share of the CPUs.")]
    if mine == 1 and all_of_them > 1:
        return [
            Finding(WARN, text, "Ask for more CPUs a rank (srun -c, mpiexec --depth), or unset a "
            "binding "
                    "that was left over (SLURM_CPU_BIND).")
        ]  # fmt: skip
    return [Finding(OK, text)]


def configuration() -> list[Finding]:
    from allranks import config

    (default,) = config.from_command_line([])
    return [Finding(OK, f"the default one composes (model {default.name}), from {config.conf_dir()}")]


CHECKS: dict[str, Callable[[], list[Finding]]] = {
    "python": python,
    "torch": torch,
    "mpi": mpi,
    "ezpz": ezpz,
    "scheduler": scheduler,
    "machine": machine,
    "ranks": ranks,
    "network": network,
    "config": configuration,
    "data": data,
    "run dir": run_dir,
    "threads": threads,
}


# --- tools --------------------------------------------------------------------------------------


def _tool(command: Sequence[str], limit_s: float) -> tuple[str, str]:
    """(stdout, problem) of a command; its whole group is ended at the limit."""
    try:
        child = subprocess.Popen(
            list(command), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            text=True, errors="replace", start_new_session=True,
        )  # fmt: skip
    except OSError as error:
        return "", f"{command[0]}: {error.strerror}"
    try:
        out, err = child.communicate(timeout=limit_s)
    except subprocess.TimeoutExpired:
        return "", f"no answer within {limit_s:.0f} s"
    finally:
        _end(child)
    if child.returncode:
        last = " ".join((err or out).split())[:200]
        return out, f"exit code {child.returncode}: {last}"
    return out, ""


def _version_of(package: str) -> str:
    from importlib import metadata

    try:
        return f" ({metadata.version(package)})"
    except metadata.PackageNotFoundError:
        return ""


def _file_system(path: Path) -> str:
    """The file system's type by /proc/mounts; `unknown` where that is not to be had."""
    best, kind = "", "unknown"
    try:
        mounts = Path("/proc/mounts").read_text().splitlines()
    except OSError:
        return kind
    for line in mounts:
        _, point, this, *_ = line.split()
        if len(point) >= len(best) and path.is_relative_to(point):
            best, kind = point, this
    return kind


def _nodes() -> int:
    nodes = os.environ.get("SLURM_JOB_NUM_NODES", "")
    if nodes.isdigit():
        return int(nodes)
    try:
        return len(set(Path(os.environ["PBS_NODEFILE"]).read_text().split()))
    except (KeyError, OSError):
        return 1


if __name__ == "__main__":
    sys.exit(main())
