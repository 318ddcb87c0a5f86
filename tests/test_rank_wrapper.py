"""What a rank's program gets, and what its start costs."""

from __future__ import annotations

import json
import signal
import socket
import subprocess
import sys

import pytest

from allranks.base.errors import UserError
from allranks.job import variables as given
from allranks.job.identity import discover
from allranks.launch import guard
from helpers import GUARD, TIMEOUT_S, clean_environment, guarded
from launching import python

SHOW = python(
    "import json, os; os.write(1, json.dumps({n: os.environ.get(n) for n in "
    "'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT "
    "CUDA_VISIBLE_DEVICES'.split()}).encode() + b'\\n')"
)


def start(program, **environ) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*GUARD, *program], env=clean_environment(**environ), capture_output=True, text=True, check=False
    )


def test_without_a_launcher_it_is_rank_0_of_1():
    shown = json.loads(start(SHOW).stdout)
    assert (shown["RANK"], shown["WORLD_SIZE"]) == ("0", "1")
    assert (shown["LOCAL_RANK"], shown["LOCAL_WORLD_SIZE"]) == ("0", "1")
    assert shown["MASTER_ADDR"] == "127.0.0.1"
    assert int(shown["MASTER_PORT"]) in given.PORTS
    assert shown["CUDA_VISIBLE_DEVICES"] is None


def test_under_a_bare_mpiexec_it_needs_only_the_port():
    """No supervisor: the ranks cannot agree on a port by themselves, and say so."""
    command = guarded("mpiexec", 2, SHOW)
    done = subprocess.run(command, env=clean_environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "ALLRANKS_MASTER_PORT" in done.stderr and "allranks launch" in done.stderr

    told = {
        given.MASTER_PORT: "23456",
        given.DEVICE_VARIABLE: "CUDA_VISIBLE_DEVICES",
        given.DEVICES: "3,2,1,0",
    }
    environ = clean_environment(**told)
    done = subprocess.run(command, env=environ, capture_output=True, text=True, check=True)
    shown = sorted((json.loads(line) for line in done.stdout.splitlines()), key=lambda s: s["RANK"])
    assert shown == [
        {"RANK": str(r), "LOCAL_RANK": str(r), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
         "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "23456", "CUDA_VISIBLE_DEVICES": str(3 - r)}
        for r in range(2)
    ]  # fmt: skip


def test_it_becomes_the_program():
    """The same process: a signal sent to it is the program's, and so is the exit code."""
    process = subprocess.Popen(
        [*GUARD, *python("import os, time; print(os.getpid(), flush=True); time.sleep(60)")],
        env=clean_environment(), stdout=subprocess.PIPE,
    )  # fmt: skip
    try:
        assert int(process.stdout.readline()) == process.pid
        process.send_signal(signal.SIGUSR2)
        assert process.wait(timeout=TIMEOUT_S) == -signal.SIGUSR2
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
    assert start(python("raise SystemExit(7)")).returncode == 7
    # Python ignores SIGPIPE; the program must not inherit that
    assert start(["sh", "-c", "kill -PIPE $$; echo still here"]).returncode == -signal.SIGPIPE


def test_arguments_arrive_unchanged():
    strange = ["", " a  b ", "it's", '"', "$HOME", "\\n", "a,b;c", "é", "*", "-n", "--"]
    done = start([*python("import json, sys; print(json.dumps(sys.argv[1:]))"), *strange])
    assert json.loads(done.stdout) == strange


@pytest.mark.parametrize(
    ("program", "environ", "message"),
    [
        (["no-such-program"], {}, "no-such-program cannot be started (No such file"),
        ([__file__], {}, "test_rank_wrapper.py cannot be started (Permission denied)"),
        (["true"], {"RANK": "3"}, "RANK=3 is set but WORLD_SIZE is not"),
        (["true"], {"PALS_RANKID": "3", "PMI_SIZE": ""}, "does not tell rank 3 its WORLD_SIZE"),
        (["true"], {"RANK": "1", "WORLD_SIZE": "2", "PMI_RANK": "0", "PMI_SIZE": "2",
                    "MPI_LOCALRANKID": "0", "MPI_LOCALNRANKS": "2"}, "RANK=1 is left over"),
        (["true"], {given.WORLD_SIZE: "zwei", "PALS_RANKID": "0"}, "'zwei' is not a whole number"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_in_one_line_with_the_host(program, environ, message):
    done = start(program, **environ)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"allranks: [{socket.gethostname()}] ")
    assert message in line


def test_a_program_that_the_system_cannot_run_is_told_why(tmp_path):
    script = tmp_path / "run.sh"
    script.write_text("echo hello\n")
    script.chmod(0o755)
    with pytest.raises(UserError, match=r"run.sh cannot be started \(Exec format error\).* #!/bin/sh"):
        guard.execute([str(script)], {})
    with pytest.raises(UserError, match=r"Argument list too long\).*put them into a file"):
        guard.execute(["true", "x" * (1 << 17)], {"PATH": "/usr/bin:/bin"})


def test_no_program_is_a_mistake_too():
    for arguments in ([], ["--"], ["true"]):
        with pytest.raises(UserError, match="needs `-- PROGRAM"):
            guard.program_of(arguments)


# --- recorded environments ----------------------------------------------------------------------

PALS = {"PALS_RANKID": "14", "PALS_LOCAL_RANKID": "2", "PALS_LOCAL_SIZE": "12", "PMI_SIZE": ""}
SRUN = {
    "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0",
    "SLURM_JOB_ID": "77", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "nid[001-002]",
}  # fmt: skip
TORCHRUN = {
    "TORCHELASTIC_RUN_ID": "x", "RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2",
    "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1234",
}  # fmt: skip
TOLD = {"world_size": 24, "local_rank": 3, "local_world_size": 9, "master_addr": "10.0.0.1",
        "master_port": 25000}  # fmt: skip


def variables(environ, told=None):
    return given.of_rank(discover(environ, is_planned=True), environ, told)


def test_the_supervisor_completes_what_the_launcher_does_not_tell():
    assert variables(PALS, TOLD) == {
        "RANK": "14", "WORLD_SIZE": "24", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "12",
        "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "25000",
    }  # fmt: skip
    jsrun = {"JSM_NAMESPACE_RANK": "14", "JSM_NAMESPACE_SIZE": "24"}
    assert variables(jsrun, TOLD)["LOCAL_RANK"] == "3"
    assert variables(jsrun, TOLD)["LOCAL_WORLD_SIZE"] == "9"


def test_the_plan_completes_it_where_there_is_no_supervisor():
    plan = {given.WORLD_SIZE: "24", given.MASTER_ADDR: "h", given.MASTER_PORT: "2"}
    assert variables({**PALS, **plan}) == {
        "RANK": "14", "WORLD_SIZE": "24", "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "12",
        "MASTER_ADDR": "h", "MASTER_PORT": "2",
    }  # fmt: skip
    jsrun = {"JSM_NAMESPACE_RANK": "14", **plan, given.LOCAL_WORLD_SIZE: "6"}
    assert variables(jsrun)["LOCAL_RANK"] == "2"


def test_srun_tells_all_but_the_master():
    assert variables(SRUN, TOLD) == {
        "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "25000",
    }  # fmt: skip


def test_torchruns_own_store_is_kept_and_a_stale_port_is_not():
    assert "MASTER_PORT" not in variables(TORCHRUN, TOLD)
    stale = {**SRUN, "MASTER_ADDR": "old", "MASTER_PORT": "1"}
    assert variables(stale, TOLD)["MASTER_PORT"] == "25000"


def test_what_it_exports_agrees_with_the_launchers_own():
    for environ in (PALS, SRUN, TORCHRUN):
        with_ours = {**environ, **variables(environ, TOLD)}
        assert discover(with_ours).rank == discover(environ).rank
        assert discover(with_ours).launcher == discover(environ).launcher


@pytest.mark.parametrize(
    ("shown", "devices", "got"),
    [
        (None, "3,2,1,0", "2"),  # Polaris: reversed
        ("0,1,2,3", "3,2,1,0", "2"),
        ("4,5,6,7", "3,2,1,0", "6"),  # the scheduler gave half of a node
        ("GPU-a,GPU-b", "0,1", "GPU-b"),
        ("7", "3,2,1,0", None),  # --gpus-per-task: this rank has its own
        (None, "0.0,0.1", "0.1"),  # tiles
        ("", "3,2,1,0", None),  # set, and empty: no GPU is to be seen
    ],
)
def test_the_device_of_local_rank_1(shown, devices, got):
    environ = {**SRUN, given.DEVICE_VARIABLE: "CUDA_VISIBLE_DEVICES", given.DEVICES: devices}
    if shown is not None:
        environ["CUDA_VISIBLE_DEVICES"] = shown
    assert variables(environ, TOLD).get("CUDA_VISIBLE_DEVICES") == got


@pytest.mark.parametrize(
    ("shown", "devices", "message"),
    [
        (None, "0", "local rank 1 has no device: ALLRANKS_DEVICES=0 names 1. Start at most 1"),
        ("0,1", "3,2", "shows 2 devices on this host, and local rank 1 is to have number 2"),
    ],
)
def test_a_device_that_is_not_there(shown, devices, message):
    environ = {**SRUN, given.DEVICE_VARIABLE: "CUDA_VISIBLE_DEVICES", given.DEVICES: devices}
    if shown:
        environ["CUDA_VISIBLE_DEVICES"] = shown
    with pytest.raises(UserError, match=message):
        variables(environ, TOLD)


def test_a_free_port_is_free_and_random():
    ports = {given.free_port() for _ in range(20)}
    assert len(ports) > 15
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", ports.pop()))
        taken.listen()
        assert taken.getsockname()[1] not in {given.free_port() for _ in range(50)}


def test_a_start_is_cheap():
    """At thousands of ranks each file opened is thousands of requests to one file system."""
    code = (
        "import os, sys\n"
        "before, opened = set(sys.modules), []\n"
        "sys.addaudithook(lambda e, a: opened.append(a[0]) if e in ('open', 'os.listdir', "
        "'os.scandir') "
        "else None)\n"
        "sys.argv = ['rank', '--', 'true']\n"
        "os.execvpe = lambda *a: None\n"  # the start without its end
        "from allranks.launch import guard\n"
        "guard.main()\n"
        "new = set(sys.modules) - before\n"
        "print(len(new), len(opened), *sorted(m for m in new if m.split('.')[0] in "
        "('torch', 'numpy', 'mpi4py', 'omegaconf', 'hydra', 'yaml', 'subprocess', 'logging')))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=clean_environment(), capture_output=True, text=True, check=True
    )
    modules, opened, *heavy = done.stdout.split()
    assert heavy == []
    # Most are of typing, socket and json. dataclasses would add 14 more, inspect and ast among them.
    assert int(modules) <= 57, modules
    assert int(opened) < 50, opened
