"""What the launch tests share: real launchers, processes found by a mark, and their certain end."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

# What `allranks launch` does with an outcome.
TOLD = "if outcome.failure: supervisor.say(outcome.failure)\nsys.exit(outcome.code)"
BIN = Path(sys.executable).parent
RANK = [sys.executable, "-m", "allranks.launch.guard", "--"]

# Rank variables of whatever started the tests must not reach the ranks that they start.
CLEAN = {
    name: value
    for name, value in os.environ.items()
    if not re.match(r"(PMI|MPI|OMPI|SLURM|PBS|PALS|TORCHELASTIC|ALLRANKS|MASTER)_?", name)
    and name not in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")
} | {"OMP_NUM_THREADS": "1"}


def launcher(name: str, ranks: int, program: Sequence[str]) -> list[str]:
    """The command line of a real launcher that starts the program through the rank wrapper."""
    program = [*RANK, *program]
    if name == "mpiexec":
        return [str(BIN / "mpiexec"), "-n", str(ranks), *program]
    return [
        sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks),
        "--master-port", "0", "--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0",
        "--no-python", *program,
    ]  # fmt: skip


def python(code: str) -> list[str]:
    return [sys.executable, "-c", code]


def supervised(
    name: str, ranks: int, program: Sequence[str], run_dir: Path | None = None, **more: object
) -> list[str]:
    """A command that supervises them, as `allranks launch` does."""
    return python(
        "import os, sys\nfrom allranks.launch import supervisor\n"
        f"outcome = supervisor.run({launcher(name, ranks, program)!r}, dict(os.environ), "
        f"{str(run_dir) if run_dir else None!r}, world_size={ranks}, **{more!r})\n" + TOLD
    )


class Started:
    """A process with all that came of it; `end()` leaves none of them."""

    def __init__(
        self,
        command: Sequence[str],
        mark: str,
        stdout: int = subprocess.PIPE,
        cwd: Path | None = None,
        **environ: str,
    ) -> None:
        self.mark = f"TEST_MARK={mark}-{os.getpid()}-{time.monotonic_ns()}"
        name, _, value = self.mark.partition("=")
        self.process = subprocess.Popen(
            command, cwd=cwd, env={**CLEAN, name: value, **environ}, stdin=subprocess.DEVNULL,
            stdout=stdout, stderr=subprocess.PIPE, start_new_session=True,
        )  # fmt: skip

    def pids(self) -> set[int]:
        """Every living process that inherited our mark, wherever it hangs now."""
        found = set()
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                state = (folder / "stat").read_text().rpartition(")")[2].split()[0]
                if state != "Z" and self.mark.encode() in (folder / "environ").read_bytes():
                    found.add(int(folder.name))
            except OSError:
                continue
        return found

    def lines(self) -> Iterator[str]:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            yield line.decode().rstrip("\n")

    def finish(self, within_s: float = 30) -> tuple[int, str, str]:
        """Exit code, stdout, stderr."""
        out, err = self.process.communicate(timeout=within_s)
        return self.process.returncode, (out or b"").decode(), err.decode()

    def gone(self, within_s: float) -> float:
        """Seconds until none of its processes was left; fails if that takes longer than allowed."""
        start = time.monotonic()
        while left := self.pids():
            assert time.monotonic() - start < within_s, f"still there: {left}"
            time.sleep(0.02)
        return time.monotonic() - start

    def __enter__(self) -> Started:
        return self

    def __exit__(self, *_: object) -> None:
        self.end()

    def end(self) -> None:
        for pid in self.pids():
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self.process.wait()
        for pipe in (self.process.stdout, self.process.stderr):
            if pipe is not None:
                pipe.close()


def by_hand(hosts: Sequence[str], program: Sequence[str], setup: Sequence[str] = ()) -> list[str]:
    """A stand-in for a launcher on several hosts: a rank each, in namespaces with its name.

    `setup` are shell commands that a host, $1, runs first, in a mount namespace of its own.
    """
    start = "; ".join(["hostname $1", *setup, 'shift; exec "$@"'])
    code = (
        "import os, subprocess\n"
        f"ranks = [subprocess.Popen(['unshare', '--uts', '--mount', 'sh', '-c', {start!r}, 'sh', "
        f"host, "
        f"*{[*RANK, *program]!r}], "
        f"env={{**os.environ, 'RANK': str(r), 'WORLD_SIZE': '{len(hosts)}'}})\n"
        f"    for r, host in enumerate({list(hosts)!r})]\n"
        "raise SystemExit(max([abs(rank.wait()) for rank in ranks]))"
    )
    return python(code)


def can_make_hosts() -> bool:
    done = subprocess.run(
        ["unshare", "--uts", "--mount", "hostname", "other"], capture_output=True, check=False
    )
    return done.returncode == 0
