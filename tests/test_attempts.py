"""The attempts of a launch: what follows one, which hosts it does without, its variables and its limits."""

from __future__ import annotations

import os
import random
import signal
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from allranks.base.errors import EXIT_REQUEUE, EXIT_TIMED_OUT, EXIT_USER_ERROR, UserError
from allranks.compose import from_command_line
from allranks.job import machine, variables
from allranks.job.hosts import Allocation, Host
from allranks.launch import attempts, command, launchers, preflight, supervisor
from allranks.launch.attempts import (
    GROUPS,
    Ended,
    Launch,
    Next,
    TrainingProgress,
    run,
    unreachable,
    what_next,
)
from allranks.launch.outcome import Outcome
from allranks.launch.plan import Request
from helpers import PYTHON, ROOT, SMALL, Started, clean_environment, execute, until


def outcome(code: int, stopped: bool = False) -> Outcome:
    return Outcome(code, "", {}, stopped=stopped)


@pytest.mark.parametrize(
    ("ended", "restarts_left", "expected"),
    [
        (outcome(0), 3, Next.END),
        (outcome(1), 3, Next.RESTART),
        (outcome(137), 1, Next.RESTART),
        (outcome(EXIT_TIMED_OUT), 1, Next.RESTART),
        (outcome(1), 0, Next.END),  # no restart is left
        (outcome(EXIT_USER_ERROR), 3, Next.END),  # the same mistake would be made again
        (outcome(EXIT_REQUEUE), 3, Next.END),  # the job is at its end
        (outcome(143, stopped=True), 3, Next.END),  # the user has ended it
        (outcome(1, stopped=True), 3, Next.END),
    ],
)
def test_only_a_crash_is_followed_by_a_restart(ended, restarts_left, expected):
    assert what_next(ended, restarts_left, None) is expected
    assert what_next(ended, restarts_left, TrainingProgress(10)) is expected


def test_the_third_crash_without_a_step_gained_is_the_last():
    progress = TrainingProgress(0)
    seen = []
    for step in (0, 0, 50, 50, 50, 50):
        progress = progress.after_crash(step)
        seen.append(what_next(outcome(1), 9, progress))
    # twice at step 0; then a step was gained, and counting began anew
    assert seen == [Next.RESTART] * 5 + [Next.GIVE_UP]
    assert progress == TrainingProgress(50, 3)


def test_a_program_whose_steps_nobody_counts_is_started_again_as_often_as_asked_for():
    assert [what_next(outcome(1), left, None) for left in (2, 1, 0)] == [
        Next.RESTART, Next.RESTART, Next.END,
    ]  # fmt: skip


# --- which hosts are not there ---------------------------------------------------------------------------


def search(hosts: Sequence[str], bad: set[str]) -> tuple[list[str], list[int]]:
    """(the hosts that are found, how many groups each round has tried)."""
    rounds = []

    def fails(groups: Sequence[Sequence[str]]) -> list[bool]:
        rounds.append(len(groups))
        return [not bad.isdisjoint(group) for group in groups]

    return unreachable(hosts, fails), rounds


def names(count: int) -> list[str]:
    return [f"n{number}" for number in range(count)]


def test_one_bad_host_of_4096_is_found_in_three_rounds():
    found, rounds = search(names(4096), {"n2024"})
    assert found == ["n2024"]
    assert rounds == [16, 16, 16]


def test_where_nothing_is_wrong_one_round_is_enough():
    assert search(names(1000), set()) == ([], [16])


def test_where_all_are_bad_all_are_found():
    assert search(names(40), set(names(40)))[0] == names(40)


@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 31, 32, 33, 100, 257])
def test_exactly_the_bad_hosts_are_found_and_never_too_many_are_tried_at_once(count):
    draw = random.Random(count)
    for _ in range(20):
        bad = {name for name in names(count) if draw.random() < 0.2}
        found, rounds = search(names(count), bad)
        assert found == [name for name in names(count) if name in bad]
        assert max(rounds) <= GROUPS


# --- a launcher that starts nothing ----------------------------------------------------------------


def test_a_launcher_that_refuses_its_options_is_quoted_and_no_host_is_blamed(tmp_path):
    words = ["launch", "-n", "2", "machine.options.mpiexec=[--no-such-option]", "--", "true"]
    done = execute([PYTHON, "-m", "allranks", *words], tmp_path)
    assert done.code == 2
    assert done.message.startswith("allranks: preflight: mpiexec starts nothing on ")
    assert "unrecognized argument no-such-option" in done.err
    assert "cannot be reached" not in done.err
    assert "Traceback" not in done.err


# A stand-in for PBS's pbsdsh, of which it takes what the script of the documents uses.
PBSDSH = """#!/bin/sh
[ "$1" = -n ] && [ "$3" = -- ] || exit 9
echo "host $2" >> "$PBSDSH_LOG"
shift 3
exec "$@"
"""


def test_mpiexec_reaches_other_hosts_by_the_documents_script_over_pbsdsh(tmp_path):
    page = (ROOT / "docs/launch.md").read_text()
    for name, text in (
        ("pbs-start", page.split("```sh\n")[1].split("```")[0]),
        ("pbsdsh", PBSDSH),
    ):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "nodes").write_text("n1\nn1\nn2\nn2\n")
    mpiexec = [str(Path(PYTHON).parent / "mpiexec"), "-launcher", "ssh"]
    mpiexec += ["-launcher-exec", str(tmp_path / "pbs-start"), "-hosts", "n1:2,n2:2", "-n", "4"]
    environ = {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "PBS_NODEFILE": str(tmp_path / "nodes"),
        "PBSDSH_LOG": str(tmp_path / "log"),
    }
    done = execute([*mpiexec, "sh", "-c", "echo rank $PMI_RANK of $PMI_SIZE"], tmp_path, environ).ok()
    assert sorted(done.out.splitlines()) == [f"rank {rank} of 4" for rank in range(4)]
    assert sorted((tmp_path / "log").read_text().splitlines()) == ["host 0", "host 1"]


def test_a_user_may_give_the_ranks_more_time_to_come_or_less(tmp_path):
    late = "import sys, time\nif 'allranks.launch.guard' in sys.orig_argv: time.sleep(60)\n"
    (tmp_path / "sitecustomize.py").write_text(late)
    words = ["--no-preflight", "-n", "2", "--launcher", "mpiexec", "--start-within", "1", "--", "true"]
    environ = {"PYTHONPATH": str(tmp_path)}
    done = execute([PYTHON, "-m", "allranks", "launch", *words], tmp_path, environ)
    assert done.code == 1
    assert "2 of 2 ranks (0, 1) did not start within 1 s" in done.err
    assert "allow more time with --start-within" in done.err


def test_an_unfit_host_that_nothing_can_replace_ends_the_launch(monkeypatch):
    """However the host is called: the preflight is not made again with the same hosts, and again."""
    asked = []
    unfit: list[str] = []  # no host of the plan is known to be the one

    def check(*_: object, hosts: Sequence[str], **more: object) -> str:
        asked.append(hosts)
        raise preflight.HostsUnfit("preflight: n2: no data", unfit)

    monkeypatch.setattr(preflight, "check", check)
    with pytest.raises(preflight.HostsUnfit, match="n2: no data"):
        run(launched(environ={}, max_restarts=1), check=True)
    unfit.append("n2")
    with pytest.raises(preflight.HostsUnfit, match="n2: no data"):
        run(launched(environ={}, max_restarts=1), check=True)
    assert asked == [("n1", "n1", "n2", "n2")] * 2


# --- what else may fail between two attempts -------------------------------------------------------


def unreached(*_: object, **more: object) -> str:
    raise preflight.HostsUnreached("preflight: 4 of 4 ranks did not start", ("n1", "n2"), "")


def crashed(*_: object, **more: object) -> Outcome:
    return Outcome(137, "rank 2 on n2 vanished.", {0: "n1", 1: "n1", 2: "n2"}, gone=("n2",))


def test_where_hosts_cannot_be_tried_the_first_error_stays(monkeypatch):
    """Torchrun without an MPI, and a machine whose mpiexec always takes all hosts: no part can be tried."""
    monkeypatch.setattr(preflight, "check", unreached)
    monkeypatch.setattr(launchers, "path_of", lambda name: None)
    only_torchrun = Request(("/bin/true",), launcher="torchrun", installed_here=False)
    takes_all = Request(("/bin/true",), launcher="mpiexec", installed_here=False)
    for request, name in ((only_torchrun, "generic_pbs"), (takes_all, "vista")):
        launch = replace(launched(environ={}), request=request, machine=machine.load(name))
        with pytest.raises(preflight.HostsUnreached, match="4 of 4 ranks did not start"):
            run(launch, check=True)


def test_a_launcher_that_cannot_do_without_a_host_leaves_the_failure_named(monkeypatch, capfd):
    monkeypatch.setattr(supervisor, "run", crashed)
    request = Request(("true",), launcher="mpiexec", installed_here=False)
    launch = launched(environ={}, max_restarts=1, min_ranks=1)
    ended = run(replace(launch, request=request, machine=machine.load("vista")), check=False)
    assert ended == Ended(137, was_stopped=False)
    said = capfd.readouterr().err
    assert said.startswith("allranks: rank 2 on n2 vanished. Going on without n2.")
    assert "mpiexec of vista uses all nodes of a job" in said


def test_checkpoints_that_cannot_be_read_leave_the_failure_named(monkeypatch, capfd, tmp_path):
    def breaks(*_: object, **more: object) -> Outcome:
        (tmp_path / "checkpoints").write_text("no folder any more")
        return crashed()

    monkeypatch.setattr(supervisor, "run", breaks)
    [config] = from_command_line([])
    launch = launched(environ={}, config=config, directory=str(tmp_path), max_restarts=3)
    assert run(launch, check=False) == Ended(137, was_stopped=False)
    assert capfd.readouterr().err == (
        f"allranks: rank 2 on n2 vanished. The checkpoints in run.dir={tmp_path} cannot be read (Not a "
        "directory). Nothing is started again.\n"
    )
    with pytest.raises(UserError, match=r"cannot be read \(Not a directory\)\. Look at its file system"):
        run(launch, check=False)


def test_a_launcher_that_is_asked_to_end_has_the_time_to_do_so(monkeypatch, tmp_path):
    """It has processes on other hosts, which only the launcher itself can end."""
    fake = tmp_path / "mpiexec"
    fake.write_text(f"#!/bin/sh\ntrap 'sleep 0.2; touch {tmp_path}/tidied; exit 1' TERM\nsleep 60 & wait\n")
    fake.chmod(0o755)
    monkeypatch.setattr(preflight, "check", unreached)
    monkeypatch.setattr(attempts, "TRY_S", 2.0)  # for the shell to set its trap
    request = Request(("true",), launcher="mpiexec", installed_here=False)
    launch = launched(environ={"PATH": f"{tmp_path}:{os.environ['PATH']}"})
    launch = replace(
        launch, request=request, machine=machine.load("generic_pbs", ["machine.mpiexec=hydra"])
    )
    with pytest.raises(UserError, match="n1, n2 cannot be reached"):
        run(launch, check=True)
    assert (tmp_path / "tidied").exists()


def test_ranks_whose_output_nobody_reads_any_more_are_not_started_again(tmp_path):
    words = ["-n", "1", "--launcher", "mpiexec", "--no-preflight", "--max-restarts", "2"]
    code = "import itertools\nfor number in itertools.count(): print(number, flush=True)"
    program = ["--", PYTHON, "-c", code]
    with subprocess.Popen(
        [PYTHON, "-m", "allranks", "launch", *words, *program], cwd=tmp_path, text=True,
        env=clean_environment(), stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    ) as process:  # fmt: skip
        assert process.stdout is not None and process.stderr is not None
        assert process.stdout.readline() == "0\n"
        process.stdout.close()
        said = process.stderr.read()
    assert (process.returncode, said) == (141, "")


# --- the list of hosts -----------------------------------------------------------------------------


def test_each_launch_has_a_list_of_hosts_of_its_own_and_removes_it(monkeypatch, tmp_path):
    """Two jobs in one folder, on whose mpiexec a part of the hosts is given in a file."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    launches = []
    for names in ("abc", "xyz"):
        pbs = Allocation("pbs", "7", tuple(Host(name, 1) for name in names), slots_given=False)
        request = Request(("true",), nodes=2, installed_here=False)
        environ = {"TMPDIR": str(tmp_path / "tmp")}
        launches.append(Launch(request, machine.load("aurora"), pbs, environ, directory=str(tmp_path)))
    plans = [launch.plan() for launch in launches]
    read = [Path(plan.argv[plan.argv.index("--hostfile") + 1]).read_text() for plan in plans]
    assert read == ["a\nb\n", "x\ny\n"]

    def stops(*_: object, **more: object) -> str:
        raise UserError("enough")

    monkeypatch.setattr(preflight, "check", stops)
    for launch in launches:
        with pytest.raises(UserError, match="enough"):
            run(launch, check=True)
    assert [path.name for path in tmp_path.rglob("*")] == ["tmp"]

    (tmp_path / "tmp" / f"allranks-{launches[0].id}").write_text("in the way")
    with pytest.raises(UserError, match="from which the launcher reads the hosts, cannot be written"):
        launches[0].plan()


def test_the_users_address_of_rank_0_goes_with_rank_0s_host():
    launch = launched(environ={variables.MASTER_ADDR: "10.0.0.9"})
    first, second = launch.allocation.hosts

    def address(*hosts: Host) -> str:
        return launch.environment(launch.plan(hosts))[variables.MASTER_ADDR]

    assert [address(), address(first), address(second)] == ["10.0.0.9", "10.0.0.9", "n2"]


# --- one training after another --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ended", "started"),
    [
        (Ended(137, was_stopped=False), 2),  # a rank was killed, by the kernel for want of memory, say
        (Ended(143, was_stopped=True), 1),  # the user has ended the launch
        (Ended(EXIT_REQUEUE, was_stopped=False), 1),  # the job is at its end
    ],
)
def test_only_a_signal_to_the_launch_or_the_jobs_end_ends_a_sweep(monkeypatch, tmp_path, ended, started):
    monkeypatch.chdir(tmp_path)
    seen = []

    def run(launch: Launch, check: bool) -> Ended:
        seen.append(launch.directory)
        return ended

    monkeypatch.setattr(attempts, "run", run)
    words = ["-n", "1", "-m", "seed=1,2", "run.dir=s", "report=false"]
    assert command.launch(words) == ended.code
    assert len(seen) == started


# --- the launcher's environment --------------------------------------------------------------------


def launched(**more: object) -> Launch:
    hosts = (Host("n1", 2), Host("n2", 2))
    request = Request(("true",), installed_here=False)
    slurm = Allocation("slurm", "7", hosts)
    return Launch(request, machine.load("generic_slurm"), slurm, **more)  # type: ignore[arg-type]


OF_THE_SHELLS_STEP = {
    "SLURM_CPU_BIND": "quiet,mask_cpu:0x1",
    "SLURM_CPU_BIND_TYPE": "mask_cpu:",
    "SLURM_CPU_BIND_LIST": "0x1",
    "SLURM_CPU_BIND_VERBOSE": "quiet",
    "SLURM_DISTRIBUTION": "cyclic",
    "SLURM_EXACT": "1",
    "SLURM_TRES_PER_TASK": "cpu:1",
    "SLURM_MEM_PER_CPU": "100",
}
OF_THE_JOB = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_CONF": "/etc/slurm.conf"}


@pytest.mark.parametrize("step", ["0", "4294967290"])  # of srun --pty, and salloc's interactive one
def test_the_options_of_a_shells_step_are_not_those_of_the_ranks(step):
    launch = launched(environ={**OF_THE_SHELLS_STEP, **OF_THE_JOB, "SLURM_STEP_ID": step})
    environ = launch.environment(launch.plan())
    assert OF_THE_SHELLS_STEP.keys() & environ.keys() == set()
    assert OF_THE_JOB.items() <= environ.items()


def test_in_a_job_script_srun_follows_the_jobs_own_options():
    """Where no step is around, they are what the user has asked sbatch for."""
    launch = launched(environ={**OF_THE_SHELLS_STEP, **OF_THE_JOB})
    environ = launch.environment(launch.plan())
    assert OF_THE_SHELLS_STEP.items() <= environ.items()


# --- how long ranks may take to end ----------------------------------------------------------------

# A model whose weights take 13 s to be read out, as those of a large model do.
SLOW = """
import time, torch
class Slow(torch.nn.Linear):
    def __init__(self, input_shape, classes, **_):
        super().__init__(784, classes)
    def forward(self, x):
        return super().forward(x.flatten(1))
    def state_dict(self, *args, **kwargs):
        time.sleep(13)
        return super().state_dict(*args, **kwargs)
"""


@pytest.mark.long
def test_a_training_whose_save_takes_13_s_is_given_the_time(tmp_path):
    (tmp_path / "slow_model.py").write_text(SLOW)
    words = ["launch", "-n", "1", "--no-preflight", "run.dir=run", "trainer.epochs=1000", *SMALL]
    words += ["model._target_=slow_model.Slow", "checkpoint.every_epochs=null"]
    environ = {"PYTHONPATH": str(tmp_path)}
    with Started([PYTHON, "-m", "allranks", *words], cwd=tmp_path, **environ) as started:
        until((tmp_path / "run/metrics.jsonl").exists, 60)
        started.process.send_signal(signal.SIGTERM)
        code, out, err = started.finish(within_s=100)
    assert code == 85, out + err
    assert len(list((tmp_path / "run/checkpoints").glob("step-*"))) == 1


def test_a_program_has_ten_seconds_and_a_training_what_its_watchdog_allows():
    assert launched(environ={}).grace() == 10
    [config] = from_command_line(["watchdog.step_s=50", "watchdog.save_s=400"])
    assert launched(environ={}, config=config).grace() == 450
    assert launched(environ={}, config=config, grace_s=3).grace() == 3
