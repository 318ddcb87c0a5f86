"""The supervisor and the preflight on a real Slurm of several nodes, each with its own network.

Needs a Slurm that is up, and root on the host of its controller: the nodes' names are host names in
namespaces, so the commands run under the controller's name.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
from itertools import islice
from pathlib import Path

import pytest

from helpers import GUARD, Started, serial
from launching import TOLD, python

pytestmark = [pytest.mark.long, serial]
CONF = Path("/etc/slurm/slurm.conf")


def nodes() -> list[str]:
    """The idle nodes of a Slurm that answers."""
    if os.geteuid() != 0 or shutil.which("sinfo") is None or shutil.which("unshare") is None:
        return []
    try:
        done = subprocess.run(
            ["sinfo", "-h", "-N", "-t", "idle", "-o", "%N"], capture_output=True, text=True,
            timeout=5, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return []
    return sorted(set(done.stdout.split())) if done.returncode == 0 else []


NODES: list[str] = []


@pytest.fixture(scope="module", autouse=True)
def two_idle_nodes(real_slurm: None) -> None:
    NODES[:] = nodes()
    assert len(NODES) >= 2


def on_login(code: str) -> Started:
    """A process on the controller's host name, where srun can be reached by the nodes."""
    (login,) = re.findall(r"^SlurmctldHost=([^(\s]+)", CONF.read_text(), re.MULTILINE)
    script = 'hostname "$1"; shift; exec "$@"'
    return Started(["unshare", "--uts", "sh", "-c", script, "sh", login, *python(code)])


def supervised(program: list[str], more: str = "") -> Started:
    """A launch on two nodes; `more` are further arguments of the supervisor."""
    argv = ["srun", "-N2", "--ntasks-per-node=2", "-w", ",".join(NODES[:2]), *GUARD, *program]
    return on_login(
        "import os, sys\nfrom allranks.launch import supervisor\n"
        f"outcome = supervisor.run({argv!r}, dict(os.environ), None, world_size=4, "
        f"hosts={NODES[:2]!r}, start_s=20{more})\n" + TOLD
    )


def test_every_rank_gets_its_place_on_two_nodes():
    code = (
        "import os, socket; e = os.environ; print(e['RANK'], e['LOCAL_RANK'], e['WORLD_SIZE'], "
        "e['LOCAL_WORLD_SIZE'], socket.gethostname(), e['MASTER_ADDR'], e['MASTER_PORT'])"
    )
    with supervised(python(code)) as started:
        got, out, err = started.finish()
    assert got == 0, err
    # srun says when it has to wait for a node that the job before has just left.
    lines = [line for line in (out + err).splitlines() if not line.startswith("srun: job ")]
    ranks = sorted(line.rpartition("] ")[2].split() for line in lines)
    assert [r[:5] for r in ranks] == [[str(r), str(r % 2), "4", "2", NODES[r // 2]] for r in range(4)]
    assert len({(r[5], r[6]) for r in ranks}) == 1
    assert not ranks[0][5].startswith("127.")


def test_the_first_rank_that_fails_is_named_with_its_node():
    code = "import os, sys, time\nif os.environ['RANK'] == '3': sys.exit(23)\ntime.sleep(60)"
    with supervised(python(code)) as started:
        got, _, err = started.finish()
        started.gone(within_s=5)
    assert got == 23
    assert err.splitlines()[-1].startswith(f"allranks: rank 3 on {NODES[1]} ended with exit code 23")
    assert "srun: error" not in err


def test_a_rank_that_does_nothing_is_named_with_its_node_and_its_place():
    code = (
        "import os, time\n"
        "def elsewhere(): time.sleep(60)\n"
        "if os.environ['RANK'] == '2': elsewhere()\n"
        "time.sleep(60)"
    )
    with supervised(python(code), ", watches=True, idle_s=3") as started:
        got, _, err = started.finish()
        started.gone(within_s=5)
    assert got == 1
    assert f"allranks: rank 2 on {NODES[1]}: process" in err
    assert f"see above where rank 2 on {NODES[1]} is" in err
    assert "elsewhere (" in err  # py-spy's line of the stack


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_no_rank_outlives_the_supervisor(signum):
    with supervised(python("import time; print('here', flush=True); time.sleep(60)")) as started:
        ranks = (line for line in started.process.stdout if line.endswith(b"here\n"))
        assert len(list(islice(ranks, 4))) == 4
        assert len(started.pids()) > 8  # supervisor, srun, and a guard and a program for each rank
        started.process.send_signal(signum)
        started.gone(within_s=5)


def test_the_preflight_over_the_nodes_network():
    argv = ["srun", "-N2", "--ntasks-per-node=2", "-w", ",".join(NODES[:2]), *GUARD]
    code = (
        "import os\nfrom allranks.launch import preflight\n"
        f"print(preflight.check(lambda program: [*{argv!r}, *program], dict(os.environ), "
        f"world_size=4, hosts={NODES[:2]!r}, limit_s=30))"
    )
    with on_login(code) as started:
        got, out, err = started.finish()
    assert got == 0, err
    assert out.startswith("preflight: 4 ranks on 2 hosts are fit")
