"""Job scripts: every machine's are sound, and one does in a job's real environment what it says.

Here `allranks launch` is a small program that notes how it was started; test_submit.py runs the real one.
"""

import json
import os
import pwd
import re
import shlex
import shutil
import signal
import socket
import subprocess
import time

import pytest

from allranks.job import machine, scheduler
from allranks.submit import script
from allranks.submit.order import Order
from helpers import PYTHON, ROOT, TIMEOUT_S

MACHINES = [name for name in machine.available() if machine.load(name).scheduler != "local"]
READY = sorted([*ROOT.glob("scripts/pbs/*.sh"), *ROOT.glob("scripts/slurm/*.sh")])
NASTY = [
    "it's",
    "a b",
    '"q"',
    "x,y",
    "$HOME",
    "`id`",
    "back\\slash",
    "*",
    "",
    "line\nbreak",
    "é",
    "--",
    "#",
]


def order(name, nodes=1, **more):
    given = {"walltime": "00:30:00", "account": "proj", "queue": machine.load(name).queue, "name": "try-1"}
    return Order(name, nodes, **{**given, **more})


def rendered(name, nodes=1, program=(), cells=0, directory="/fs/runs/it's one", **more):
    return script.render(order(name, nodes, **more), machine.load(name), directory, program, cells)


def directives(text):
    return [line.split(" ", 1)[1] for line in text.splitlines() if line.startswith(("#PBS ", "#SBATCH "))]


def test_a_queue_has_directives_of_its_own():
    scattered = "-l place=scatter"
    assert scattered in directives(rendered("sophia", 2, queue="by-node"))
    assert scattered not in directives(rendered("sophia", 2, queue="by-gpu"))


def test_gadi_is_asked_for_resources_of_the_whole_job_and_for_storage():
    known = machine.load("gadi", ["machine.storage=[gdata/ab1,scratch/ab1]"])
    lines = directives(script.render(order("gadi", 2), known, "/fs/runs/one"))
    assert "-P proj" in lines
    assert "-l ncpus=96" in lines
    assert "-l ngpus=8" in lines
    assert "-l storage=gdata/ab1+scratch/ab1" in lines
    assert not [line for line in lines if "select=" in line or line.startswith("-A")]


def test_vista_is_asked_for_nodes_tasks_and_time_and_for_no_gpu():
    lines = directives(rendered("vista", 2))
    assert {"--nodes=2", "--ntasks-per-node=1", "--time=00:30:00", "-p gh"} <= set(lines)
    assert not [line for line in lines if "gpu" in line.lower() and line != "-p gh"]


def shellcheck(*paths):
    if shutil.which("shellcheck") is None:
        pytest.skip("no shellcheck: apt-get install shellcheck")
    subprocess.run(["shellcheck", "--shell=bash", *paths], check=True, timeout=120)


# --- what is in them -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MACHINES)
def test_every_machine_renders_sound_scripts(name, tmp_path):
    paths = []
    for nodes in (1, 2, 512):
        for kind, more in (
            ("run", {}),
            ("program", {"program": ["python", *NASTY]}),
            ("array", {"cells": 3}),
        ):
            path = tmp_path / f"{nodes}-{kind}.sh"
            path.write_text(rendered(name, nodes, **more))
            subprocess.run(["bash", "-n", path], check=True, timeout=20)
            paths.append(str(path))
    shellcheck(*paths)


@pytest.mark.parametrize("path", READY, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_the_ready_scripts_are_sound(path):
    subprocess.run(["bash", "-n", path], check=True, timeout=20)
    assert os.access(path, os.X_OK)
    assert path.name in ("debug.sh", "two-nodes.sh", "sweep.sh", "chain.sh")
    shellcheck(str(path))


@pytest.mark.parametrize("kind", ["pbs", "slurm"])
def test_a_chain_goes_on_from_the_highest_step(kind, tmp_path):
    """From a million steps on, the names of checkpoints have one more digit."""
    for step in (999_999, 1_000_000, 20):
        (tmp_path / f"run/checkpoints/step-{step:06}").mkdir(parents=True)
    text = (ROOT / f"scripts/{kind}/chain.sh").read_text()
    [line] = re.findall("^newest=.+", text, flags=re.MULTILINE)
    words = ["bash", "-c", f"run=run; {line}; echo $newest"]
    found = subprocess.run(words, cwd=tmp_path, check=True, timeout=20, capture_output=True, text=True)
    assert found.stdout == "run/checkpoints/step-1000000\n"


@pytest.mark.parametrize(
    ("words", "root", "code", "trains_on"),
    [
        (["model=cnn"], "data", 0, "data=synthetic model=cnn"),  # nothing is there, and nothing is fetched
        (
            ["data.root=/my data", "model=cnn"],
            "/my data",
            2,
            None,
        ),  # nor where the user has said that it is
        (["data=fashion_mnist"], None, 0, "data=fashion_mnist"),
    ],
    ids=["fetched in vain", "a root of one's own", "other data"],
)
def test_the_quick_start_fetches_the_data_to_where_they_are_looked_for(
    words, root, code, trains_on, tmp_path
):
    """With programs in place of those that it would install; the one that fetches has no network."""
    folder, bin_ = tmp_path / "scripts", tmp_path / "bin"
    folder.mkdir()
    bin_.mkdir()
    shutil.copy(ROOT / "scripts/quickstart", folder)
    (folder / "venv.sh").write_text(f"venv() {{ PATH={bin_}:$PATH; }}\n")
    for name, lines in {
        "python": "echo real",
        "allranks": f'echo "$5" > {tmp_path}/root; echo "no network" >&2; exit 2',
        "mpiexec": f'shift 5; echo "$*" > {tmp_path}/trained',
    }.items():
        (bin_ / name).write_text(f"#!/bin/sh\n{lines}\n")
        (bin_ / name).chmod(0o755)
    environ = {name: value for name, value in os.environ.items() if name != "ALLRANKS_DATA"}
    done = subprocess.run(
        [folder / "quickstart", *words],
        env=environ,
        check=False,
        timeout=20,
        capture_output=True,
        text=True,
    )
    assert done.returncode == code, done.stderr
    fetched, trained = tmp_path / "root", tmp_path / "trained"
    assert (fetched.read_text().strip() if fetched.exists() else None) == root
    assert (trained.read_text().strip() if trained.exists() else None) == trains_on


def test_polaris_asks_for_what_its_pages_do():
    assert directives(rendered("polaris", 2)) == [
        "-N try-1", "-A proj", "-q debug", "-l select=2:system=polaris", "-l walltime=00:30:00",
        "-l filesystems=home:eagle", "-l place=scatter", "-k doe", "-j oe",
        "-o '/fs/runs/it'\"'\"'s one/pbs.log'",
    ]  # fmt: skip


def test_perlmutter_asks_for_what_its_pages_do():
    assert directives(rendered("perlmutter", 2)) == [
        "--job-name=try-1", "-A proj", "-q debug", "--nodes=2", "--ntasks-per-node=4", "--cpus-per-task=32",
        "--time=00:30:00", "-C gpu", "--gpus-per-node=4", "--output='/fs/runs/it'\"'\"'s one/job.log'",
        "--open-mode=append", "--requeue",
    ]  # fmt: skip


def test_frontiers_queues_are_a_partition_and_a_qos():
    assert "-p batch" in directives(rendered("frontier"))
    assert "-q debug" in directives(rendered("frontier", queue="debug"))


def test_a_pbs_cluster_that_nobody_described_gets_cpus_and_a_line_a_rank():
    assert "-l select=2:ncpus=3:mpiprocs=3" in directives(rendered("generic_pbs", 2, ppn=3))
    assert "-l select=2:ncpus=2:mpiprocs=2" in directives(rendered("generic_pbs", 2, ranks=3))


def test_arrays():
    pbs, slurm = (directives(rendered(name, cells=3)) for name in ("polaris", "perlmutter"))
    assert pbs[-2:] == ["-J 0-2", "-r y"]  # without -r y PBS takes no array at ALCF
    assert slurm[-1] == "--array=0-2"
    assert any(line.endswith("/^array_index^/pbs.log'") for line in pbs)
    assert any(line.endswith("/%a/job.log'") for line in slurm)


def test_nothing_of_the_submitters_environment_is_handed_on_by_qsub():
    for name in MACHINES:
        assert not re.search(r"^#PBS -[vV]", rendered(name), flags=re.M)


def test_paths_that_a_scheduler_refuses_are_not_given_to_it():
    assert "-o /dev/null" in directives(rendered("polaris", directory="/fs/é"))
    assert "--output=/dev/null" in directives(rendered("perlmutter", directory="/fs/a\\b"))
    assert "--output=/fs/100%%/job.log" in directives(rendered("perlmutter", directory="/fs/100%"))


# --- what they do --------------------------------------------------------------------------------

RECORDER = """#!{python}
import json, os, signal, sys, time
if sys.argv[3:4] == ["submit"]:  # what comes after the job
    open({note!r} + ".next", "w").write(" ".join(sys.argv[4:]))
    sys.exit({code})
note = dict(argv=sys.argv[1:], env=dict(os.environ), cwd=os.getcwd(), time=time.time())
got = []
for number in (signal.SIGTERM, signal.SIGUSR1) if os.environ.get("WAIT") != "without handlers" else ():
    signal.signal(number, lambda n, frame: got.append(n))
with open({note!r} + ".new", "w") as file:
    json.dump(note, file)
os.rename({note!r} + ".new", {note!r})
print("out of the program", flush=True)
if os.environ.get("WAIT"):
    while not got:
        time.sleep(0.02)
    time.sleep(0.3)
    print("signals", *got, flush=True)
sys.exit({code})
"""


@pytest.fixture
def job(tmp_path, monkeypatch):
    """job("polaris", code=3, ...) makes run directory and script, whose Python is the recorder; see Job."""

    def make(name, *, code=0, directory=None, machine_setup=(), **more):
        recorder = tmp_path / "recorder"
        recorder.write_text(RECORDER.format(python=PYTHON, note=str(tmp_path / "note.json"), code=code))
        recorder.chmod(0o755)
        monkeypatch.setattr(script.sys, "executable", str(recorder))
        run = tmp_path / (directory or "run")
        known = machine.load(name, [f"machine.setup={json.dumps(list(machine_setup))}"])
        cells = more.pop("cells", 0)
        for path in [run / str(i) for i in range(cells)] or [run]:
            path.mkdir(parents=True, exist_ok=True)
        (tmp_path / "work").mkdir(exist_ok=True)
        asked = order(name, workdir=str(tmp_path / "work"))
        text = script.render(asked, known, str(run), more.pop("program", ()), cells, **more)
        return Job(tmp_path, run, text)

    return make


class Job:
    """A job script, run under bash as a MoM does it: see shared facts of a real OpenPBS job."""

    def __init__(self, folder, run, text):
        self.folder, self.run, self.path = folder, run, folder / "spool" / "1.pbs.SC"
        self.home = folder / "home"  # without a profile that may do as it likes
        for made in (self.path.parent, self.home):
            made.mkdir(exist_ok=True)
        self.path.write_text(text)
        self.path.chmod(0o700)

    def environment(self, index=None):
        user = pwd.getpwuid(os.getuid())
        job_id = "1.pbs" if index is None else f"1[{index}].pbs"
        nodefile = self.folder / "nodes"
        nodefile.write_text(f"{socket.gethostname()}\n")
        found = {
            "ENVIRONMENT": "BATCH", "HOME": str(self.home), "LOGNAME": user.pw_name, "USER": user.pw_name,
            "SHELL": "/bin/bash", "SHLVL": "2", "NCPUS": "1", "OMP_NUM_THREADS": "1",
            "TMPDIR": f"/var/tmp/pbs.{job_id}", "PATH": "/usr/local/bin:/usr/bin:/bin",
            "PBS_ENVIRONMENT": "PBS_BATCH", "PBS_JOBCOOKIE": "1234", "PBS_JOBDIR": str(self.home),
            "PBS_JOBID": job_id, "PBS_JOBNAME": "try-1", "PBS_MOMPORT": "15003",
            "PBS_NODEFILE": str(nodefile), "PBS_NODENUM": "0", "PBS_TASKNUM": "1", "PBS_QUEUE": "debug",
            "PBS_O_HOME": str(self.home), "PBS_O_HOST": "login", "PBS_O_LOGNAME": user.pw_name,
            "PBS_O_PATH": "/usr/bin:/bin", "PBS_O_QUEUE": "debug", "PBS_O_SHELL": "/bin/bash",
            "PBS_O_SYSTEM": "Linux", "PBS_O_WORKDIR": str(self.folder / "work"),
        }  # fmt: skip
        return found | ({} if index is None else {"PBS_ARRAY_INDEX": str(index), "PBS_ARRAY_ID": "1[].pbs"})

    def start(self, index=None, **more):
        process = subprocess.Popen(
            [str(self.path)], cwd=self.home, env={**self.environment(index), **more},
            umask=0o077, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            start_new_session=True,
        )  # fmt: skip
        process.stdin.close()
        return process

    def do(self, index=None, **more):
        process = self.start(index, **more)
        try:
            return process.wait(timeout=TIMEOUT_S)
        finally:
            process.kill()

    @property
    def note(self):
        return json.loads((self.folder / "note.json").read_text())

    @property
    def next(self):
        path = self.folder / "note.json.next"
        return path.read_text() if path.exists() else ""

    def wait_for_note(self):
        deadline = time.monotonic() + TIMEOUT_S
        while not (self.folder / "note.json").exists():
            assert time.monotonic() < deadline
            time.sleep(0.02)


def test_a_pbs_job_gets_its_directory_deadline_umask_and_log(job):
    made = job("polaris", umask=0o027)
    before = time.time()
    assert made.do() == 0
    note = made.note
    assert note["argv"] == ["-m", "allranks", "launch", "--machine", "polaris", "--run", str(made.run)]
    assert note["cwd"] == str(made.folder / "work")
    assert before + 1739 <= int(note["env"]["ALLRANKS_DEADLINE"]) <= time.time() + 1741
    assert int(note["env"]["ALLRANKS_JOB_END"]) - int(note["env"]["ALLRANKS_DEADLINE"]) == 60
    assert (made.run / "job.log").read_text() == "out of the program\n"
    assert (made.run / "job.log").stat().st_mode & 0o777 == 0o640
    assert (made.run / "exit_code").read_text() == "0\n"
    assert note["env"]["PBS_NODEFILE"] == str(made.folder / "nodes")


@pytest.mark.parametrize("name", ["polaris", "perlmutter"])
def test_values_arrive_unchanged(job, name):
    made = job(name, program=["prog", *NASTY], directory='it\'s a $x, "q" \\b é %j')
    assert made.do() == 0, (made.run / "job.log").read_text()
    argv = made.note["argv"]
    assert argv[argv.index("--run") + 1] == str(made.run)
    assert argv[argv.index("--") + 1 :] == ["prog", *NASTY]
    assert (made.run / "job.log").read_text() == "out of the program\n"


def test_options_of_the_launch_arrive_unchanged():
    asked = Order(
        "polaris", 2, ranks=6, launcher="mpiexec", preflight=False, machine_overrides=("machine.x='a b'",)
    )
    words = shlex.split(
        script.render(asked, machine.load("polaris"), "/fs/r").partition(" launch ")[2].split(" &\n")[0]
    )
    assert words == [
        "--machine", "polaris", "--nodes", "2", "-n", "6", "--launcher", "mpiexec", "--job-nodes", "2",
        "--no-preflight",
        "machine.x='a b'", "--run", "$run",
    ]  # fmt: skip


def test_the_submitters_python_paths_come_first(job):
    made = job(
        "polaris", machine_setup=["export PYTHONPATH=/site"], environ={"PYTHONPATH": "/my own:/other"}
    )
    assert made.do() == 0
    assert made.note["env"]["PYTHONPATH"] == "/my own:/other:/site"


def test_relative_folders_of_the_submitter_are_whole_in_the_script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin/qsub").touch(0o755)
    lines = script._environment({"PATH": "bin", "PYTHONPATH": "src:/other:"}, scheduler.named("pbs"))
    assert f'export PATH="$PATH":{tmp_path}/bin  # the scheduler\'s commands' in lines
    assert f'export PYTHONPATH={tmp_path}/src:/other"${{PYTHONPATH:+:$PYTHONPATH}}"' in lines


def test_the_setup_may_use_unset_variables_and_the_log_shows_what_it_says(job):
    made = job("polaris", machine_setup=['export FROM_SETUP="x$NOT_SET"', "echo loaded"])
    assert made.do() == 0
    assert made.note["env"]["FROM_SETUP"] == "x"
    assert (made.run / "job.log").read_text() == "loaded\nout of the program\n"


@pytest.mark.parametrize("name", ["polaris", "perlmutter"])
def test_the_exit_code_is_the_launchs(job, name):
    made = job(name, code=85)
    assert made.do() == 85
    assert (made.run / "exit_code").read_text() == "85\n"
    assert made.next == f"--next {made.run}"


@pytest.mark.parametrize(("code", "asked"), [(0, True), (1, False), (137, False)])
def test_what_comes_next_is_asked_after_an_end_in_order_only(job, code, asked):
    made = job("polaris", code=code)
    assert made.do() == code
    assert bool(made.next) == asked


def test_ranks_left_over_in_a_shell_do_not_reach_a_slurm_job(job):
    made = job("perlmutter")
    assert made.do(RANK="3", WORLD_SIZE="8", MASTER_ADDR="old") == 0
    assert not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} & set(made.note["env"])


def test_a_finished_training_is_not_started_again(job):
    made = job("polaris")
    (made.run / "summary.json").write_text('{\n  "state": "finished",\n  "epochs": 1\n}\n')
    assert made.do() == 0
    assert not (made.folder / "note.json").exists()
    assert "is finished" in (made.run / "job.log").read_text()


def test_a_program_is_started_again_until_it_ends_well(job):
    made = job("polaris", program=["x"], code=1)
    assert [made.do(), made.do()] == [1, 1]
    assert (made.run / "job.log").read_text() == "out of the program\n" * 2
    made = job("polaris", program=["x"])
    (made.folder / "note.json").unlink()
    assert made.do() == 0
    assert made.note
    (made.folder / "note.json").unlink()
    assert made.do() == 0
    assert not (made.folder / "note.json").exists()


@pytest.mark.parametrize(("name", "variable"), [("polaris", None), ("perlmutter", "SLURM_ARRAY_TASK_ID")])
def test_a_job_of_an_array_runs_its_own_cell(job, name, variable):
    made = job(name, cells=3)
    code = made.do(index=2) if variable is None else made.do(**{variable: "2"})
    assert code == 0
    assert made.note["argv"][-1] == f"{made.run}/2"
    assert (made.run / "2" / "exit_code").read_text() == "0\n"
    assert not (made.run / "1" / "exit_code").exists()


def test_term_for_every_process_lets_the_program_end_in_its_own_way(job):
    """As both schedulers do it: the shell stays until the program has ended, and tells its exit code."""
    made = job("polaris", code=85)
    process = made.start(WAIT="1")
    made.wait_for_note()
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=TIMEOUT_S) == 85
    assert (made.run / "job.log").read_text().endswith("signals 15\n")
    assert not made.next  # whoever ends the job wants no other
    assert (made.run / "exit_code").read_text() == "85\n"


def test_a_program_that_the_signal_ends_at_once_leaves_the_signals_code(job):
    """The same signal interrupts the `wait` of bash, which then does not know that code any more."""
    made = job("polaris")
    process = made.start(WAIT="without handlers")
    made.wait_for_note()
    os.killpg(process.pid, signal.SIGTERM)
    assert process.wait(timeout=TIMEOUT_S) == 143
    assert (made.run / "exit_code").read_text() == "143\n"


def test_a_job_that_is_killed_after_a_signal_leaves_that_signal(job):
    """Its program had no time to end; without the signal nothing would be left."""
    made = job("polaris", code=85)
    process = made.start(WAIT="1")
    made.wait_for_note()
    assert not (made.run / "exit_code").exists()
    process.send_signal(signal.SIGTERM)
    deadline = time.monotonic() + TIMEOUT_S
    while not (made.run / "exit_code").exists() or (made.run / "exit_code").read_text() != "143\n":
        assert time.monotonic() < deadline
        time.sleep(0.02)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(timeout=TIMEOUT_S)
    assert (made.run / "exit_code").read_text() == "143\n"


@pytest.mark.parametrize("is_of_this_job", [False, True])
def test_why_pbs_has_ended_an_earlier_job_is_not_said_of_this_one(job, is_of_this_job):
    """Until the end of a job there may be an earlier one's output from PBS."""
    made = job("polaris")
    words = "=>> PBS: job killed: walltime 42 exceeded limit 40"
    log = made.run / "pbs.log"
    log.write_text(f"{words}\n")
    long_ago = time.time() - 60
    os.utime(log, (long_ago, long_ago))
    process = made.start(WAIT="1")
    made.wait_for_note()
    if is_of_this_job:
        log.write_text(f"{words}\n")
    process.send_signal(signal.SIGTERM)
    os.killpg(process.pid, signal.SIGTERM)  # PBS signals all processes of the job
    process.wait(timeout=TIMEOUT_S)
    assert (words in (made.run / "job.log").read_text()) == is_of_this_job


def test_usr1_for_the_shell_alone_reaches_the_program(job):
    """`#SBATCH --signal=B:USR1@60` signals the batch shell only."""
    made = job("perlmutter", code=0)
    process = made.start(WAIT="1")
    made.wait_for_note()
    process.send_signal(signal.SIGUSR1)
    assert process.wait(timeout=TIMEOUT_S) == 0
    assert (made.run / "job.log").read_text().endswith(f"signals {int(signal.SIGUSR1)}\n")


def test_a_directory_that_is_gone_ends_the_job(job):
    made = job("polaris")
    (made.folder / "work").rmdir()
    assert made.do() == 1
    assert not (made.folder / "note.json").exists()
