"""Each check against the real thing that it looks for, right and wrong."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from allranks import doctor
from allranks.base.files import file_system
from allranks.job import machine
from helpers import clean_environment, command_line, execute, forked_python, took_at_most, until
from launching import BIN


def check(name: str, cwd: Path | None = None, **environ: str) -> list[doctor.Finding]:
    """One check as the doctor runs it, in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "allranks.doctor", "--check", name],
        env=clean_environment(**environ), cwd=cwd, capture_output=True, text=True, check=True,
    )  # fmt: skip
    return [doctor.Finding(**values) for values in json.loads(done.stdout)]


def executable(path: Path, script: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The doctor as a user runs it, for people; and for programs, in a process that is forked."""
    folder = tmp_path_factory.mktemp("here")
    path = f"{BIN}:{os.environ['PATH']}"
    environ = clean_environment(PATH=path, ALLRANKS_DATA=str(folder / "none"))

    def says(*command: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, check=False)

    return [
        says(sys.executable, "-m", "allranks.doctor"),
        says(forked_python(), "-m", "allranks.doctor", "--json"),
    ]


def test_a_report_is_80_columns_wide_and_has_every_check(whole):
    text, _ = whole
    assert text.returncode == 0, text.stdout
    assert text.stderr == ""
    lines = text.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    for name in doctor.CHECKS:
        assert any(line[6:].startswith(name) for line in lines), name
    assert lines[-1].startswith("0 errors, ")


def test_programs_get_json_and_a_remedy_for_whatever_is_not_ok(whole):
    report = json.loads(whole[1].stdout)
    assert {f["check"] for f in report["findings"]} == set(doctor.CHECKS)
    for finding in report["findings"]:
        assert finding["state"] in ("ok", "warn", "error")
        assert bool(finding["remedy"]) == (finding["state"] != "ok"), finding


def test_an_error_gives_exit_code_1(tmp_path):
    done = execute([forked_python(), "-m", "allranks.doctor"], tmp_path, {"RANK": "3"})
    assert done.code == 1
    assert "error ranks      RANK=3 is set but WORLD_SIZE is not" in done.out
    assert "-> unset RANK\n" in done.out


@pytest.mark.parametrize(
    "left_over",
    [
        {"PMI_RANK": "3"},
        {"OMPI_COMM_WORLD_RANK": "1"},
        {"PALS_RANKID": "2"},
        {"RANK": "3"},
        {"WORLD_SIZE": "2"},
        {"HOROVOD_SIZE": "2"},
    ],
)
def test_the_remedy_for_variables_that_are_left_over_is_one(monkeypatch, left_over):
    environ = clean_environment(**left_over)
    monkeypatch.setattr(os, "environ", environ)
    (finding,) = doctor.ranks()
    assert finding.state == "error"
    command, *names = finding.remedy.split()
    assert (command, names) == ("unset", list(left_over))
    for name in names:
        del environ[name]
    (finding,) = doctor.ranks()
    assert finding.state == "ok"


def test_where_a_machine_is_known_from_is_told():
    (finding,) = doctor.machine()
    name, known_by = machine.detect()
    assert finding.text == f"{name} ({known_by}; --machine takes another)"
    for host, environ, expected in (
        ("nid001", {"NERSC_HOST": "perlmutter"}, ("perlmutter", "chosen by NERSC_HOST=perlmutter")),
        ("frontier123", {}, ("frontier", "chosen by host name")),
        (
            "n1",
            {"SLURM_JOB_ID": "7"},
            ("generic_slurm", "no machine file is of this host, in a job of Slurm"),
        ),
    ):
        assert machine.detect(host, environ) == expected


def test_only_the_home_directory_itself_is_shown_as_a_tilde(monkeypatch):
    monkeypatch.setenv("HOME", "/home/alice")
    for text, shown in {
        "/home/alice/runs is writable": "~/runs is writable",
        "--root /home/alice/data, or": "--root ~/data, or",
        "(/home/alice/x)": "(~/x)",
        "ALLRANKS_DATA=/home/alice/x": "ALLRANKS_DATA=~/x",
        "/lus/gecko/home/alice/runs": "/lus/gecko/home/alice/runs",
        "/home/alice2/runs": "/home/alice2/runs",
    }.items():
        assert doctor._wrapped("", text) == [shown]


def test_a_process_that_is_killed_is_not_told_as_one_that_hangs(monkeypatch):
    """By somebody else, such as the kernel where there is no memory."""
    killed = doctor._result(doctor._start(["sh", "-c", "kill -9 $$"]), 30)
    assert killed == ("", "SIGKILL", False)
    late = doctor._result(doctor._start(["sleep", "30"]), 0.1)
    assert late == ("", "no answer within 0 s", True)

    start = doctor._start
    monkeypatch.setattr(doctor, "CHECKS", {"torch": doctor.torch})
    monkeypatch.setattr(doctor, "_start", lambda _: start(["sh", "-c", "kill -9 $$"]))
    found = doctor.examine_all()["torch"]
    assert found == [doctor.error("the check itself failed: SIGKILL", doctor.MEMORY)]


def test_a_check_that_is_ended_leaves_none_of_its_tools(tmp_path):
    """A tool is started in a session of its own, which the signal to the check's group does not reach."""
    tool = "import subprocess, time\nchild = subprocess.Popen(['sleep', '60'], start_new_session=True)\n"
    tool += "print(child.pid, flush=True)\ntime.sleep(60)\n"
    check = doctor._start([sys.executable, "-c", tool])
    pid = int(check.stdout.readline())
    doctor._end(check)
    until(lambda: not command_line(pid), within_s=10)


def test_a_process_that_does_not_end_is_not_waited_for():
    """One that SIGKILL does not reach yet, as where it waits for a disk: here one of another group."""
    with subprocess.Popen(
        ["sleep", "60"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        try:
            assert doctor._result(child, 0.1).is_over_limit
            assert child.poll() is None
        finally:
            child.kill()


def test_a_check_that_hangs_or_crashes_is_a_finding_and_the_others_answer(monkeypatch, tmp_path):
    # a torch whose import never ends, and an mpi4py that kills its process
    (tmp_path / "torch.py").write_text("import time; time.sleep(60)")
    (tmp_path / "mpi4py").mkdir()
    (tmp_path / "mpi4py" / "__init__.py").write_text("import os; os.kill(os.getpid(), 11)")
    source = str(Path(doctor.__file__).parents[1])
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{source}")
    began = time.monotonic()
    found = doctor.examine_all(limit_s=8)
    assert took_at_most(time.monotonic() - began, 10)
    assert found["torch"][0].state == "error"
    assert "no answer within 8 s" in found["torch"][0].text
    assert "SIGSEGV" in found["mpi"][0].text
    assert found["python"][0].state == found["ranks"][0].state == "ok"
    assert all(f.remedy for f in (*found["torch"], *found["mpi"]))


def test_the_mpich_wheels_mpiexec_fits():
    (finding,) = check("mpi", PATH=f"{BIN}:/usr/bin:/bin")
    assert finding.state == "ok"
    assert "MPICH" in finding.text and "tried with two" in finding.text


def test_an_mpiexec_of_another_mpi_is_named():
    other = shutil.which("mpiexec", path="/usr/bin:/usr/local/bin:/bin")
    if (
        other is None
        or "Open"
        not in subprocess.run([other, "--version"], capture_output=True, text=True, check=False).stdout
    ):
        pytest.skip("needs a system-wide Open MPI beside the mpich wheel")
    found = check("mpi", PATH=f"{Path(other).parent}:/bin")
    assert [f.state for f in found] == ["ok", "warn"]  # the wheel's own is found beside Python
    assert f"{other} belongs to another MPI" in found[1].text
    assert f"Write {BIN / 'mpiexec'}" in found[1].remedy


def test_ranks_that_do_not_see_each_other_belong_to_another_mpi(tmp_path):
    # starts ranks without telling them of each other: what a foreign mpiexec comes to
    executable(tmp_path / "mpiexec", 'shift 2; "$@"; "$@"')
    found = check("mpi", PATH=f"{tmp_path}:/usr/bin:/bin")
    assert "belongs to another MPI: each of its ranks sees itself as 0 of 1" in found[-1].text


def test_ezpz_real_too_old_and_impostor(tmp_path):
    source = str(Path(doctor.__file__).parents[1])
    for kind, file in (
        ("real", "distributed.py"),
        ("too old", "dist.py"),
        ("image pan-zoom tool", "zoom.py"),
    ):
        package = tmp_path / kind / "ezpz"
        package.mkdir(parents=True)
        (package / "__init__.py").touch()
        (package / file).touch()
        (finding,) = check("ezpz", PYTHONPATH=f"{tmp_path / kind}:{source}")
        assert finding.state == ("ok" if kind == "real" else "warn")
        assert kind in finding.text
        assert ("pip install" in finding.remedy) == (kind != "real")
    assert finding.remedy.startswith("pip uninstall -y ezpz && pip install")


def test_asking_about_ezpz_imports_no_torch():
    code = "import sys; from allranks import doctor; list(doctor.ezpz()); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


def test_a_scheduler_that_does_not_answer_is_an_error(tmp_path):
    """Stand-ins: only exit codes matter here (qstat's 255 is OpenPBS's own)."""
    for command in ("qsub", "qdel"):
        executable(tmp_path / command, "exit 0")
    executable(tmp_path / "qstat", "echo 'cannot connect to server pbs (errno=111)' >&2; exit 255")
    environ = {"PATH": str(tmp_path), "PBS_JOBID": "12.pbs"}  # no other scheduler's commands
    (finding,) = check("scheduler", **environ)
    assert finding.state == "error"
    assert "exit code 255: cannot connect to server pbs" in finding.text
    (finding,) = check("scheduler", PATH=str(tmp_path))
    assert finding.state == "warn"  # outside a job, training on this host still works

    executable(tmp_path / "qstat", "exit 0")
    (finding,) = check("scheduler", **environ)
    assert (finding.state, finding.text) == ("ok", "PBS answers, inside job 12.pbs")

    (tmp_path / "qsub").unlink()
    (finding,) = check("scheduler", **environ)
    assert finding.state == "warn" and "not on PATH: qsub" in finding.text


def test_data_missing_and_corrupted(tmp_path):
    (finding,) = check("data", ALLRANKS_DATA=str(tmp_path))
    assert finding.state == "warn" and "allranks data fetch mnist" in finding.remedy
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte.gz").write_bytes(b"<html>")
    (finding,) = check("data", ALLRANKS_DATA=str(tmp_path))
    assert finding.state == "error" and "corrupted or truncated (6 bytes" in finding.text


def test_a_run_directory_that_cannot_be_made(tmp_path):
    (finding,) = check("run dir", cwd=tmp_path)
    assert finding.state == "ok" and "GiB free" in finding.text
    assert list(tmp_path.iterdir()) == []
    (finding,) = check("run dir", cwd=Path("/proc"))  # not even root makes a directory there
    assert finding.state == "error" and "/proc" in finding.text


def test_a_node_local_file_system_is_no_place_for_a_job_of_several_nodes():
    if file_system(Path("/dev/shm")) != "tmpfs":
        pytest.skip("/dev/shm is no tmpfs here")
    (finding,) = check("run dir", cwd=Path("/dev/shm"), SLURM_JOB_ID="7", SLURM_JOB_NODELIST="n[1-2]")
    assert finding.state == "error" and "this job has 2 nodes" in finding.text


def test_more_threads_than_cpus():
    (finding,) = check("threads", OMP_NUM_THREADS="4096")
    assert finding.state == "warn" and "OMP_NUM_THREADS=4096" in finding.text
    if (os.cpu_count() or 1) > 1:
        code = (
            "import os; os.sched_setaffinity(0, [min(os.sched_getaffinity(0))])\n"
            "from allranks import doctor; print(next(doctor.threads()).state)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert done.stdout == "warn\n"
