"""What the launch tests share: programs under supervised launchers, and hosts made of namespaces."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from helpers import GUARD, PYTHON, guarded

# What `allranks launch` does with an outcome.
TOLD = (
    "from allranks.launch.console import say\n"
    "if outcome.failure: say(outcome.failure, 2 if outcome.stopped else None)\nsys.exit(outcome.code)"
)
BIN = Path(PYTHON).parent


def python(code: str) -> list[str]:
    return [PYTHON, "-c", code]


def supervised(
    name: str,
    ranks: int,
    program: Sequence[str],
    run_dir: Path | None = None,
    constants: Mapping[str, float] | None = None,
    elsewhere: str = "",
    **more: object,
) -> list[str]:
    """A command that supervises them, as `allranks launch` does.

    `constants` of supervisor.py, or of suspension.py where a name begins with `suspension.`, are set to
    other values: a test need not wait for a minute. `elsewhere` has it run as on another host than the
    ranks, in a job whose scheduler says whether it is suspended: "True" or "False".
    """
    settings = "".join(
        f"{name if '.' in name else f'supervisor.{name}'} = {value!r}\n"
        for name, value in (constants or {}).items()
    )
    asks = f", ask_scheduler=lambda: {elsewhere}" if elsewhere else ""
    other_host = "supervisor.processes.boot_id = lambda: 'another'\n" if elsewhere else ""
    return python(
        f"import os, sys\nfrom allranks.launch import supervisor, suspension\n{other_host}{settings}"
        f"outcome = supervisor.run({guarded(name, ranks, program)!r}, dict(os.environ), "
        f"{str(run_dir) if run_dir else None!r}, world_size={ranks}{asks}, **{more!r})\n" + TOLD
    )


def by_hand(hosts: Sequence[str], program: Sequence[str], setup: Sequence[str] = ()) -> list[str]:
    """A stand-in for a launcher on several hosts: a rank each, in namespaces with its name.

    `setup` are shell commands that a host, $1, runs first, in a mount namespace of its own.
    """
    start = "; ".join(["hostname $1", *setup, 'shift; exec "$@"'])
    code = (
        "import os, subprocess\n"
        f"ranks = [subprocess.Popen(['unshare', '--uts', '--mount', 'sh', '-c', {start!r}, 'sh', "
        f"host, "
        f"*{[*GUARD, *program]!r}], "
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
