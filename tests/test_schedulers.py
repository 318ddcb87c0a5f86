"""PBS and Slurm behind their one interface: ids, the environment, directives, and recorded answers.

tests/recorded/pbs has what a real OpenPBS answered. A command here that prints such an answer and ends
with its exit code stands for PBS's own. test_submit.py queues jobs.
"""

import os
import re
import stat
import time
from dataclasses import replace
from pathlib import Path

import pytest

from allranks.base.errors import UserError
from allranks.job import pbs, scheduler, slurm
from allranks.job.batch import JobRequest, NoAnswer, ServerUnreached, seconds
from helpers import ROOT

PBS, SLURM = scheduler.named("pbs"), scheduler.named("slurm")
RECORDED = ROOT / "tests/recorded/pbs"


def answer(name):
    """(what the command said, its exit code) of a recorded answer."""
    text = (RECORDED / f"{name}.txt").read_text()
    said, code = re.fullmatch(r"\$ [^\n]*\n(.*)exit (\d+)\n", text, flags=re.DOTALL).groups()
    return said, int(code)


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """commands(qstat=(text, code)) puts commands on PATH that say this and end with that code; each appends
    its arguments to the file `asked`, which is returned.
    """
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    def make(**answers):
        for name, (said, code) in answers.items():
            words = said if isinstance(said, bytes) else said.encode()
            (folder / f"{name}.said").write_bytes(words)
            stream = "1" if code == 0 or words.startswith(b"Job Id") else "2"
            path = folder / name
            path.write_text(
                f'#!/bin/sh\necho "{name} $*" >> {tmp_path}/asked\n'
                f"cat {folder}/{name}.said >&{stream}\nexit {code}\n"
            )
            path.chmod(path.stat().st_mode | stat.S_IXUSR)
        return tmp_path / "asked"

    return make


# --- the job that a process is in ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("environ", "job"),
    [
        ({}, None),
        ({"PBS_JOBID": "12.pbs"}, ("12.pbs", "12.pbs", 0)),
        ({"PBS_JOBID": "2[1].pbs", "PBS_ARRAY_INDEX": "1"}, ("2[1].pbs", "2[1].pbs", 0)),
        ({"SLURM_JOB_ID": "77"}, ("77", "77", 0)),
        ({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "2"}, ("77", "77", 2)),
        ({"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "x"}, ("77", "77", 0)),
        (
            {"SLURM_JOB_ID": "78", "SLURM_ARRAY_JOB_ID": "77", "SLURM_ARRAY_TASK_ID": "3"},
            ("77_3", "78", 0),
        ),
    ],
)
def test_the_job_of_a_process_is_in_its_environment(environ, job):
    assert scheduler.this_job(environ) == job


def test_a_node_file_alone_says_that_this_is_pbs():
    assert scheduler.here({"PBS_NODEFILE": "/x"}) is PBS
    assert scheduler.this_job({"PBS_NODEFILE": "/x"}) is None
    assert scheduler.here({}) is None


def test_a_name_that_is_no_scheduler_is_refused():
    with pytest.raises(UserError, match="scheduler=lsf is not known: it can be pbs or slurm"):
        scheduler.named("lsf")


# --- ids -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["12.pbs", "2[].pbs", "2[1].pbs", "7", "7[]", "12.polaris-pbs-01.hsn"])
def test_ids_of_pbs(text):
    assert PBS.is_id(text)


@pytest.mark.parametrize("text", ["", "pbs", "12 13", "12.pbs;", "-x", "so; rm", "12.pbs\n"])
def test_what_is_no_id_of_pbs(text):
    assert not PBS.is_id(text)


def test_ids_of_an_array_and_of_its_jobs():
    assert PBS.job_of_array("2[].pbs", 1) == "2[1].pbs"
    assert SLURM.job_of_array("7", 1) == "7_1"
    assert not PBS.can_be_waited_for("2[1].pbs")
    assert PBS.can_be_waited_for("2.pbs")
    assert SLURM.can_be_waited_for("7_1")
    assert PBS.is_same_job("12.pbs", "12.pbs.centre.org")
    assert not PBS.is_same_job("12.pbs", "2.pbs")


# --- answers of a real OpenPBS -------------------------------------------------------------------


def test_the_states_of_all_jobs_by_a_real_pbs():
    said, code = answer("qstat-f-all")
    assert code == 0
    assert pbs.states_in(said) == {
        "0.pbs": "running",
        "1.pbs": "queued (Can Never Run)",
        "2.pbs": "held",
        "3[].pbs": "running",
        "4.pbs": "held",
        "5.pbs": "queued",
    }


def test_the_states_of_an_arrays_jobs_by_a_real_pbs():
    said, _ = answer("qstat-f-array-t")
    assert pbs.states_in(said) == {
        "3[].pbs": "running",
        "3[0].pbs": "running",
        "3[1].pbs": "queued",
        "3[2].pbs": "queued",
        "3[3].pbs": "queued",
    }


def test_a_finished_job_has_no_state():
    assert pbs.states_in(answer("qstat-x-finished")[0]) == {}


@pytest.mark.parametrize(("name", "known"), [("qstat-unknown", False), ("qstat-finished", True)])
def test_a_job_that_has_ended_and_one_that_never_was(commands, name, known):
    commands(qstat=answer(name))
    assert PBS.states(["0.pbs"]) == {}
    assert PBS.exists("0.pbs") == known


def test_states_are_asked_for_once_and_only_of_ids(commands):
    asked = commands(qstat=answer("qstat-f-all"))
    assert len(PBS.states(["0.pbs", "-x", "1.pbs"])) == 6
    assert PBS.states([]) == {}
    assert asked.read_text() == "qstat -f 0.pbs 1.pbs\n"


@pytest.mark.parametrize("name", ["qdel-finished", "qdel-unknown"])
def test_cancelling_what_has_ended_is_no_failure(commands, name):
    asked = commands(qdel=answer(name))
    PBS.cancel(["0.pbs"])
    assert asked.read_text() == "qdel 0.pbs\n"


@pytest.mark.parametrize(
    ("name", "code", "said", "remedy"),
    [
        ("qsub-bad-queue", 170, "Unknown queue", "give another --queue"),
        ("qsub-bad-walltime", 166, "Illegal attribute or resource value", "machine.submit.chunk="),
    ],
)
def test_refusals_of_a_real_pbs_come_with_a_remedy(commands, name, code, said, remedy):
    commands(qsub=answer(name))
    with pytest.raises(UserError) as raised:
        PBS.submit("job.sh")
    for part in (f"failed with exit code {code}", said, remedy):
        assert part in str(raised.value)


@pytest.mark.parametrize(
    ("said", "remedy"),
    [
        (
            "Job violates accounting/QOS policy (job submit limit, user's size and/or time limits)",
            "ask for",
        ),
        ("QOSMaxSubmitJobPerUserLimit", "wait until fewer jobs of yours are there"),
        ("qsub: would exceed queue generic's per-user limit of jobs in 'Q' state", "wait until fewer"),
        ("Requested time limit is invalid (missing or exceeds some limit)", "ask for less"),
        ("Requested node configuration is not available", "ask for less"),
        ("Invalid account or account/partition combination specified", "with --account"),
        ("Invalid partition name specified", "give another --queue"),
        ("Slurm temporarily unable to accept job, sleeping and retrying.", "the scheduler is down or busy"),
    ],
)
def test_what_a_refusal_names_first_is_not_always_what_helps(commands, said, remedy):
    commands(sbatch=(f"sbatch: error: {said}", 1))
    with pytest.raises(UserError, match=f"What may help: .*{remedy}"):
        SLURM.submit("job.sh")


def test_a_real_pbs_takes_a_dependency_on_a_job_that_it_does_not_know(commands):
    """So whoever submits asks whether the job exists, before."""
    asked = commands(qsub=answer("qsub-after-unknown"))
    assert PBS.submit("job.sh", after="99999") == "7.pbs"
    assert asked.read_text() == "qsub -W depend=afterany:99999 job.sh\n"


def test_when_a_job_of_pbs_ends(commands, monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    said, _ = answer("qstat-f-all")
    commands(qstat=(said.partition("\n\n")[0], 0))
    ends_at = scheduler.ends_at({"PBS_JOBID": "0.pbs"})  # stime is Wed Nov 25 19:53:04 2026, walltime 5 min
    assert ends_at == 1795636384 + 300
    assert scheduler.ends_at({}) is None


@pytest.mark.parametrize(
    ("environ", "squeue", "qstat"),
    [
        ({"SLURM_JOB_ID": "7"}, ("Unable to contact slurm controller (connect failure)", 1), ("", 0)),
        ({"PBS_JOBID": "7.pbs"}, ("", 0), ("Connection refused\nqstat: cannot connect to server pbs", 111)),
    ],
    ids=["slurm", "pbs"],
)
def test_a_server_that_is_not_reached_has_not_said_that_a_job_has_no_end(commands, environ, squeue, qstat):
    """Such a job would else be taken for one without a limit, and never stop before its walltime."""
    commands(squeue=squeue, qstat=qstat)
    with pytest.raises(ServerUnreached, match="the scheduler is down"):
        scheduler.ends_at({"PATH": os.environ["PATH"], **environ})


@pytest.mark.parametrize("environ", [{"SLURM_JOB_ID": "7"}, {"PBS_JOBID": "7.pbs"}], ids=["slurm", "pbs"])
def test_a_node_without_the_schedulers_commands_says_what_to_give(environ, tmp_path, monkeypatch):
    """That it is no login node is no news inside a job."""
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"no command of (PBS|Slurm) to ask: give ALLRANKS_DEADLINE"):
        scheduler.ends_at({"PATH": str(tmp_path), **environ})


def test_a_date_that_is_not_understood_is_no_job_without_an_end(commands):
    said = "Job Id: 7.pbs\n    Resource_List.walltime = 00:05:00\n    stime = 25.11.2026 19:53\n"
    commands(qstat=(said, 0))
    with pytest.raises(
        UserError, match=r"began at '25\.11\.2026 19:53', which is no date .* ALLRANKS_DEADLINE"
    ):
        scheduler.ends_at({"PBS_JOBID": "7.pbs"})


def test_a_server_is_asked_for_the_end_of_the_job_until_it_answers(commands, monkeypatch):
    monkeypatch.setattr(scheduler, "ASK_AGAIN_S", 0.01)
    answers = iter([("Unable to contact slurm controller", 1)] * 2 + [("UNLIMITED\n", 0)])
    told = []

    def ask():
        commands(squeue=next(answers))
        return scheduler.ends_at({"PATH": os.environ["PATH"], "SLURM_JOB_ID": "7"})

    assert scheduler.asked_until_answered(ask, told.append) is None
    assert list(answers) == []
    assert len(told) == 1


# --- answers with more in them than an id ---------------------------------------------------------

BANNER = "** You have used 35 of 100 hours **\n\n"


@pytest.mark.parametrize("said", ["7.pbs\n", f"{BANNER}7.pbs\n", "7.pbs\nThe queue is full today.\n"])
def test_an_id_is_found_among_a_sites_notices(commands, said):
    commands(qsub=(said, 0), sbatch=(said.replace("7.pbs", "7;big"), 0))
    assert PBS.submit("job.sh") == "7.pbs"
    assert SLURM.submit("job.sh") == "7;big"


@pytest.mark.parametrize("said", ["", BANNER, b"\xff\xfe caf\xe9\n", "queued as job seven\n"])
def test_a_job_that_was_queued_under_an_unknown_id_is_not_refused(commands, said):
    """Exit code 0: the scheduler has taken the job."""
    commands(qsub=(said, 0), sbatch=(said, 0))
    for kind, look in ((PBS, "qstat -u"), (SLURM, "squeue -u")):
        with pytest.raises(NoAnswer, match=f"perhaps queued: look with `{look}"):
            kind.submit("job.sh")


def test_an_answer_without_any_job_is_not_understood(commands):
    """Exit code 0 says that the server has the job: it is not taken for one that has ended."""
    commands(qstat=("The queue is full today.\n", 0))
    with pytest.raises(NoAnswer, match=r"not understood: 'The queue is full today\.'"):
        PBS.states(["7.pbs"])


def test_an_answer_may_be_any_bytes(commands):
    said, _ = answer("qstat-f-all")
    commands(qstat=(said.replace("one", "caf\xe9").encode("latin-1"), 0))
    assert PBS.states(["0.pbs"])["0.pbs"] == "running"
    commands(qdel=(b"\xff\n", 1))
    with pytest.raises(UserError, match="failed with exit code 1"):
        PBS.cancel(["0.pbs"])


@pytest.mark.parametrize(
    ("command", "said", "code"),
    [
        ("qsub", "qsub: cannot connect to server pbs (errno=15010)", 162),
        (
            "sbatch",
            "sbatch: error: Batch job submission failed: Unable to contact slurm controller",
            1,
        ),
    ],
)
def test_a_server_that_is_not_reached_is_told_from_one_that_refuses(commands, command, said, code):
    commands(**{command: (said, code)})
    with pytest.raises(ServerUnreached, match="the scheduler is down"):
        (PBS if command == "qsub" else SLURM).submit("job.sh")


# As Slurm's slurm_errno.c has them, and as PBS's clients were seen to say it.
BUSY_SLURM = [
    "Batch job submission failed: Socket timed out on send/recv operation",
    "Batch job submission failed: Zero Bytes were transmitted or received",
    "Unable to contact slurm controller (receive failure)",
    # The one that stands in for the controller was not reached; the controller itself has not answered.
    "Socket timed out on send/recv operation. Unable to contact slurm controller (connect failure)",
]


@pytest.mark.parametrize("said", BUSY_SLURM)
def test_slurm_that_is_only_busy_has_perhaps_queued_the_job(commands, said):
    said = (f"error: {said}\n", 1)
    commands(sbatch=said, squeue=said, scontrol=said)
    with pytest.raises(NoAnswer, match=r"down or busy.* look for the job before you submit again"):
        SLURM.submit("job.sh")
    with pytest.raises(NoAnswer, match="down or busy"):
        SLURM.states(["7"])
    with pytest.raises(NoAnswer, match="down or busy"):
        SLURM.requeue("7")
    with pytest.raises(NoAnswer, match="down or busy"):
        SLURM.ends_at(dict(os.environ) | {"SLURM_JOB_ID": "7"})


@pytest.mark.parametrize("said", ["Premature end of message", "Failed to recv data from background qsub"])
def test_pbs_that_is_only_busy_has_perhaps_queued_the_job(commands, said):
    commands(qsub=(f"qsub: {said}\n", 183))
    with pytest.raises(NoAnswer, match="look for the job before you submit again"):
        PBS.submit("job.sh")


@pytest.mark.parametrize(
    ("said", "code"),
    [
        ("Rate limit exceeded, please retry momentarily", 1),
        ("slurm_load_jobs error: Slurm backup controller in standby mode", 1),
        ("Slurm job queue full, sleeping and retrying.", 1),
    ],
)
def test_slurm_that_takes_nothing_at_the_moment_may_be_asked_again(commands, said, code):
    commands(sbatch=(said, code), squeue=(said, code))
    with pytest.raises(ServerUnreached, match="down or busy: try again later"):
        SLURM.submit("job.sh")
    with pytest.raises(ServerUnreached):
        SLURM.states(["7"])


def test_a_refusal_that_advises_to_try_again_is_a_refusal(commands):
    """A site's own words: asking again for ten minutes would change nothing."""
    commands(sbatch=("sbatch: error: your project has no hours left: try again later, or retry in May", 1))
    with pytest.raises(UserError) as raised:
        SLURM.submit("job.sh")
    assert type(raised.value) is UserError


def test_options_of_slurms_commands_in_the_shell_hide_no_job(commands, monkeypatch):
    asked = commands(squeue=("8|PENDING|Priority\n", 0), scancel=("", 0))
    for name in ("squeue", "scancel"):
        script = asked.parent / "bin" / name
        script.write_text(script.read_text().replace("$*", "$(env | grep -c '^SQUEUE_\\|^SCANCEL_')"))
    monkeypatch.setenv("SQUEUE_STATES", "R")
    monkeypatch.setenv("SCANCEL_INTERACTIVE", "1")
    assert SLURM.states(["8"]) == {"8": "queued"}
    SLURM.cancel(["8"])
    assert asked.read_text() == "squeue 0\nscancel 0\n"


def test_two_commands_of_slurm_say_in_other_words_that_the_server_is_not_reached(commands):
    """As Slurm 22.05 has said it while its controller was down."""
    commands(
        scontrol=("Unexpected message received for job 6", 1),
        squeue=(
            "squeue: error: 'one' can't be reached now, or it is an invalid entry for --cluster.  Use "
            "'sacctmgr list clusters' to see available clusters.", 1,
        ),
    )  # fmt: skip
    with pytest.raises(ServerUnreached, match="the scheduler is down"):
        SLURM.requeue("6")
    with pytest.raises(ServerUnreached, match="the scheduler is down"):
        SLURM.states(["6;one"])


# --- answers of Slurm ----------------------------------------------------------------------------

# As Slurm 22.05 writes them; test_submit.py asks a real one where there is one.
SQUEUE = (
    "7_0|RUNNING|None\n7_1|PENDING|Resources\n8|PENDING|PartitionConfig\n9|COMPLETING|None\n"
    "10|PENDING|Dependency\n11|PENDING|DependencyNeverSatisfied\n"
)


def test_the_states_of_jobs_by_slurm():
    assert slurm.states_in(SQUEUE) == {
        "7_0": "running",
        "7_1": "queued",
        "8": "queued (PartitionConfig)",
        "9": "completing",
        "10": "queued",
        "11": "queued (DependencyNeverSatisfied)",
    }


def test_a_suspended_job_is_known_by_the_scheduler(commands):
    """As after `scontrol suspend`, or PBS's preemption by suspension."""
    in_slurm, in_pbs = {"SLURM_JOB_ID": "7"}, {"PBS_JOBID": "7.pbs"}
    commands(squeue=("7|SUSPENDED|None\n", 0), qstat=("Job Id: 7.pbs\n    job_state = S\n", 0))
    assert scheduler.is_suspended(in_slurm)
    assert scheduler.is_suspended(in_pbs)
    commands(squeue=("7|RUNNING|None\n", 0), qstat=("Job Id: 7.pbs\n    job_state = R\n", 0))
    assert not scheduler.is_suspended(in_slurm)
    assert not scheduler.is_suspended(in_pbs)
    commands(squeue=("Unable to contact slurm controller", 1))
    assert not scheduler.is_suspended(in_slurm)
    assert not scheduler.is_suspended({})


def test_slurm_does_not_know_the_only_job_that_was_asked_for(commands):
    commands(squeue=("slurm_load_jobs error: Invalid job id specified", 1))
    assert SLURM.states(["7"]) == {}
    assert SLURM.exists("7") is False


def test_a_job_of_another_cluster_keeps_its_cluster(commands):
    """As `sbatch --parsable` names it where SLURM_CLUSTERS is set."""
    asked = commands(sbatch=("102;big\n", 0), squeue=("CLUSTER: big\n101|RUNNING|None\n", 0),
                     scancel=("", 0), scontrol=("", 0))  # fmt: skip
    assert SLURM.is_id("101;big")
    assert SLURM.submit("job.sh", after="101;big") == "102;big"
    assert SLURM.exists("101;big")
    assert SLURM.states(["101;big"]) == {"101;big": "running"}
    SLURM.cancel(["101;big", "102;big", "7"])
    SLURM.requeue("101_3;big")
    assert asked.read_text().splitlines() == [
        "sbatch --parsable -M big --dependency=afterany:101 --kill-on-invalid-dep=yes job.sh",
        "squeue -h -r -M big -j 101 -o %i|%T|%r -t all",
        "squeue -h -r -M big -j 101 -o %i|%T|%r",
        "scancel -M big 101 102",
        "scancel 7",
        "scontrol -M big requeue 101_3",
    ]
    assert SLURM.job_of_array("101;big", 3) == "101_3;big"
    assert SLURM.is_same_job("101;big", "101")
    assert not SLURM.is_same_job("101;big", "101;small")
    assert not SLURM.is_same_job("101;big", "102")


def test_variables_that_lead_to_the_server_stay():
    to_the_server = {"SLURM_CLUSTERS": "big", "SLURM_JWT": "token", "SLURM_CONF": "/etc/s.conf"}
    environ = {**to_the_server, "SLURM_JOB_ID": "7", "SLURM_NTASKS": "4"}
    assert SLURM.command_environment(environ) == to_the_server


def test_variables_that_would_go_before_a_scripts_own_lines_are_left_out():
    environ = {"PATH": "/bin", "SLURM_JOB_ID": "7", "SBATCH_PARTITION": "x", "SLURM_CONF": "/etc/s.conf"}
    assert SLURM.command_environment(environ) == {"PATH": "/bin", "SLURM_CONF": "/etc/s.conf"}
    assert PBS.command_environment(environ) == environ


@pytest.mark.parametrize(
    ("text", "value"), [("30", 30), ("02:30", 150), ("01:02:30", 3750), ("1-00:00:10", 86410)]
)
def test_durations(text, value):
    assert seconds(text) == value


# --- directives ----------------------------------------------------------------------------------


def test_one_request_in_the_words_of_both():
    request = JobRequest("try", 2, "/fs/run", "00:30:00", ranks_per_node=4, cpus_per_rank=2, array_jobs=3,
                         chunk="ncpus={cpus}:mpiprocs={ranks}", survives_nodes=True)  # fmt: skip
    assert PBS.directives(request) == [
        "-N try", "-l select=2:ncpus=8:mpiprocs=4", "-l walltime=00:30:00", "-l place=scatter", "-j oe",
        "-o '/fs/run/^array_index^/pbs.log'", "-J 0-2", "-r y",
    ]  # fmt: skip
    assert SLURM.directives(request) == [
        "--job-name=try", "--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=2", "--time=00:30:00",
        "--output=/fs/run/%a/job.log", "--open-mode=append", "--requeue", "--no-kill", "--array=0-2",
    ]  # fmt: skip


def test_nodes_are_hosts_of_their_own_on_pbs():
    """PBS's default, place=free, was seen to put two chunks on one host."""
    two = JobRequest("try", 2, "/fs/run")
    assert "-l place=scatter" in PBS.directives(two)
    assert "-l place=scatter" not in PBS.directives(replace(two, nodes=1))
    assert "-l place=scatter" not in PBS.directives(replace(two, on_own_hosts=False))
    placed = PBS.directives(replace(two, options=("-l place=excl",)))
    assert [line for line in placed if "place" in line] == ["-l place=excl"]


def test_no_other_module_asks_which_scheduler_it_is_or_reads_a_jobs_id():
    """allranks.job.hosts may name them: it reads the lists of hosts, which are PBS's and Slurm's own."""
    own = {"pbs.py", "slurm.py"}
    for path in sorted((ROOT / "src").rglob("*.py")):
        if path.name in own and path.parent.name == "job":
            continue
        text = Path(path).read_text()
        assert not re.search(r"""== ["'](pbs|slurm)["']""", text), path
        reads = re.findall(
            r"""(?:\[|get\()["'](PBS_JOBID|PBS_ARRAY\w*|SLURM_JOB_ID|SLURM_ARRAY\w*)""", text
        )
        assert reads == [], path
