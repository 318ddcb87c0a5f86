"""`allranks launch --dry-run` from the outside, and the plans that it shows."""

import itertools
import json
import os
import resource
import shlex
import subprocess
import sys
import typing
from pathlib import Path

import pytest

from allranks import cli
from allranks.base.errors import UserError
from allranks.job import machine
from allranks.job.hosts import Allocation, Host, find_allocation
from allranks.job.variables import LAUNCH_ID, MASTER_ADDR, MASTER_PORT
from allranks.launch import launchers
from allranks.launch.plan import Request, check_program, make_plan
from helpers import PYTHON, SMALL, TIMEOUT_S, clean_environment, execute, only_long
from helpers import launcher as started_by

MAIN = """
import sys
from allranks import cli
try:
    cli.main(["launch", *sys.argv[1:]])
finally:
    print("LOADED", *sorted({name.partition(".")[0] for name in sys.modules}), file=sys.stderr)
"""


def launch(*arguments, cwd=None, **environ):
    """`allranks launch` as a process, outside any job unless `environ` makes one."""
    source = str(Path(launchers.__file__).parents[2])
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("SLURM", "PBS", "NERSC"))}
    return subprocess.run(
        [sys.executable, "-c", MAIN, *arguments],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=False, cwd=cwd,
        env={**clean, "PYTHONPATH": source, **environ},
    )  # fmt: skip


def message(done):
    """The one message of a user's error."""
    lines = [line for line in done.stderr.splitlines() if not line.startswith("LOADED")]
    assert done.returncode == 2, done.stderr
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("allranks: ")
    assert not done.stdout
    return lines[0]


def job(*slots, scheduler="pbs", given=True, **more):
    hosts = tuple(Host(f"n{i}", count) for i, count in enumerate(slots, 1))
    return Allocation(scheduler, "7", hosts, given, **more)


def plan(allocation, *overrides, name="generic_pbs", **request):
    request = Request(**{"program": ("python", "t.py"), "installed_here": False, **request})
    return make_plan(request, machine.load(name, overrides), allocation, {})


def counts(allocation, name="generic_pbs", **request):
    return [host.slots for host in plan(allocation, name=name, **request).hosts]


def argv_of(plan):
    """The launcher's own part of the command line, program and Python left out."""
    argv = list(plan.argv)
    return argv[: argv.index("-m") - 1]


# --- the dry run ---------------------------------------------------------------------------------


def test_the_dry_run_of_our_own_training_checks_it_and_loads_no_torch():
    done = launch("-n", "3", "--dry-run", "model=mlp", "trainer.epochs=2")
    assert done.returncode == 0, done.stderr
    assert "-m allranks.train model=mlp trainer.epochs=2" in done.stdout
    loaded = done.stderr.split()
    assert "allranks" in loaded
    assert not {"torch", "numpy", "mpi4py"} & set(loaded)


def test_a_dry_run_for_another_machine_shows_command_variables_and_places():
    done = launch("--machine", "polaris", "--nodes", "2", "--dry-run", "--", "python", "-u", "-c", "1")
    assert done.returncode == 0, done.stderr
    assert "8 ranks on 2 nodes of polaris, started by mpiexec (pals)" in done.stdout
    assert "hosts: placeholders" in done.stdout
    row = next(line for line in done.stdout.splitlines() if line.split()[:2] == ["5", "node2"])
    assert row.split() == ["5", "node2", "1", "8-15", "2,", "seen", "as", "0"]
    why = next(line for line in done.stdout.splitlines() if line.startswith("  NCCL_NET "))
    assert "machine file polaris, on several nodes" in why


def test_the_command_line_can_be_pasted(tmp_path):
    """A shell gives the program its arguments and variables as they were, whatever is in them."""
    words = ["a b", "it's", 'q"q', "$HOME", "x,y", "back\\slash", "*", ""]
    show = "import os, sys; print(sys.argv[1:]); print(os.environ['ODD'])"
    script = tmp_path / "show.py"
    script.write_text(show)
    odd = "v w 'x' \"y\" $z \\"
    done = launch(
        "--json", "--dry-run", "-n", "1", f"machine.variables.ODD.value={json.dumps(odd)}",
        "--", sys.executable, str(script), *words,
    )  # fmt: skip
    told = json.loads(done.stdout)
    pasted = told["command"].replace(shlex.join(told["argv"]), "") + shlex.join(
        told["argv"][told["argv"].index("--") + 1 :]
    )
    shown = subprocess.run(["bash", "-c", pasted], capture_output=True, text=True, check=True)
    assert shown.stdout == f"{words}\n{odd}\n"


def test_json_has_every_rank():
    done = launch("--machine", "frontier", "--nodes", "3", "--dry-run", "--json", "--", "x")
    told = json.loads(done.stdout)
    assert (told["world_size"], told["nodes"], len(told["ranks"])) == (24, 3, 24)
    assert told["ranks"][9] == {
        "rank": 9, "host": "node2", "local_rank": 1, "cpus": "9-15", "device": "5, seen as 0",
    }  # fmt: skip


def test_ten_thousand_nodes_are_planned_in_under_three_seconds_and_folded():
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = launch("--machine", "aurora", "--nodes", "10000", "--dry-run", "--", "x")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 3
    lines = done.stdout.splitlines()
    assert len(lines) < 60
    folded = "12 to 119999 node00002 to node10000: 9999 more hosts with 12 each, likewise"
    assert " ".join(lines[-1].split()) == folded


def test_inside_a_job_all_of_it_is_used(tmp_path):
    nodes = tmp_path / "nodes"
    nodes.write_text("x3001c0s1b0n0\nx3001c0s1b1n0\n")
    done = launch(
        "--dry-run", "--json", "--machine", "polaris", "--launcher", "mpiexec", "--", "ls",
        PBS_NODEFILE=str(nodes), PBS_JOBID="9.polaris", PBS_QUEUE="debug",
    )  # fmt: skip
    told = json.loads(done.stdout)
    assert told["world_size"] == 8
    assert told["hosts_from"] == f"PBS_NODEFILE={nodes}"
    assert "--hostfile" not in told["argv"]  # PALS knows the job's own hosts


def test_the_example_of_the_documentation(tmp_path):
    """docs/machines.md adds an invented machine and shows what the dry run prints for it."""
    page = (Path(__file__).parents[1] / "docs" / "machines.md").read_text()
    (tmp_path / "machine").mkdir()
    example = page.split("```yaml\n")[1].split("```")[0]
    (tmp_path / "machine" / "tern.yaml").write_text(example)
    arguments = "--machine tern --nodes 2 --dry-run -- python train.py".split()
    assert f"allranks launch --config-dir ~/clusters {' '.join(arguments)}" in page
    done = launch("--config-dir", str(tmp_path), *arguments)
    shown = page.split("\nprints, among other things,\n\n```text\n")[1].split("```")[0]
    for line in shown.splitlines():
        expected = line.strip().replace("/path/to/python", sys.executable)
        assert expected in done.stdout, expected


def test_a_dry_run_writes_nothing(tmp_path):
    before = set(tmp_path.iterdir())
    done = launch("--dry-run", "-n", "2", "model=linear", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert set(tmp_path.iterdir()) == before


# --- bad input: one message, exit code 2, no traceback -------------------------------------------

AS_TYPED = ("-n 0 is not valid", "Did you mean polaris?", "Did you mean mlp?")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-n", "0", "--", "ls"], "-n 0 is not valid"),
        (["--ppn", "-1", "--dry-run", "--", "ls"], "--ppn -1 is not valid"),
        (["--machine", "polarys", "--dry-run"], "Did you mean polaris?"),
        (["--launcher", "mpiexe", "--dry-run", "--", "ls"], "Did you mean mpiexec?"),
        (["--dry-run", "--", "no-such-program"], "The program no-such-program is not found"),
        (["--dry-run", "--", "python", "no_such.py"], "The program no_such.py is not found"),
        (["--dry-run", "--machine", "aurora", "--", "./no-such"], "./no-such is not found"),
        (["--dry-run", "--"], "No program stands after"),
        (["--dry-run", "lr=1", "--", "ls"], "lr=1 stands before `--`"),
        (["--dry-run", "model=mpl"], "Did you mean mlp?"),
        (["--dry-run", "trainer.epochs=-1"], "trainer.epochs=-1 is not valid"),
        (["--dry-run", "machine.queu=x"], "Did you mean queue?"),
        (["--nodes", "4", "--", "ls"], "--nodes 4 needs a job"),
        (["--machine", "aurora", "--", "ls"], "There is no job here"),
        (["--hosts", "/no/file", "--dry-run", "--", "ls"], "cannot be read (No such file"),
        (["--config-dir", "/no", "--dry-run", "--", "ls"], "--config-dir /no is no folder"),
        (["--dry-run", "machine=polaris", "--", "ls"], "write --machine polaris"),
        (["--json", "--", "ls"], "add --dry-run"),
        (["--dry-run", "-n", "2", "trainer.epoch=3"], "Did you mean trainer.epochs?"),
        (["--dry-run", "--node", "2", "--", "ls"], "Did you mean --nodes?"),
    ],
)
def test_bad_input(capsys, monkeypatch, arguments, said):
    """Three of these as real command lines, the others in this process."""
    if said in AS_TYPED:
        assert said in message(launch(*arguments))
        return
    for name in os.environ:
        if name.startswith(("SLURM", "PBS", "NERSC")):
            monkeypatch.delenv(name)
    with pytest.raises(SystemExit) as ended:
        cli.main(["launch", *arguments])
    told = capsys.readouterr()
    assert (ended.value.code, told.out, told.err.count("\n")) == (2, "", 1), told
    assert told.err.startswith("allranks: ")
    assert said in told.err


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        (
            {"PBS_JOBID": "7.pbs"},
            "This is a job of PBS, but PBS_NODEFILE, which tells its hosts, is not set",
        ),
        ({"SLURM_JOB_ID": "7"}, "This is a job of Slurm, but SLURM_JOB_NODELIST, which tells its hosts,"),
    ],
)
def test_a_job_that_does_not_tell_its_hosts_is_called_one(environ, said, monkeypatch, capsys):
    """As in a container that does not hand all variables on."""
    for name, value in environ.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit):
        cli.main(["launch", "--no-preflight", "--", "true"])
    assert said in capsys.readouterr().err


def test_a_launcher_that_is_not_installed(tmp_path):
    done = launch("--launcher", "srun", "--dry-run", "--", "/bin/ls", PATH=str(tmp_path))
    assert "--launcher srun is not installed here: srun comes with Slurm" in message(done)


def test_a_script_that_may_not_be_run(tmp_path):
    script = tmp_path / "mine"
    script.write_text("#!/bin/sh\n")
    assert f"chmod +x {script}" in message(launch("--dry-run", "--", str(script)))


def test_a_script_of_this_folder_is_written_with_its_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script = tmp_path / "train.sh"
    script.write_text("#!/bin/sh\n")
    with pytest.raises(UserError, match=r"with `chmod \+x train\.sh`, and write \./train\.sh\.$"):
        check_program(["train.sh"])
    script.chmod(0o755)
    with pytest.raises(UserError, match=r"is in this folder, .*: write \./train\.sh\.$"):
        check_program(["train.sh"])
    check_program(["./train.sh"])


@pytest.mark.parametrize("text", ["", "a\r\n", "a:1\na:2\n"])
def test_bad_hostfiles(tmp_path, text):
    hosts = tmp_path / "hosts"
    hosts.write_bytes(text.encode())
    assert f"--hosts {hosts}" in message(launch("--hosts", str(hosts), "--dry-run", "--", "ls"))


# --- how many ranks, and where -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("request_", "expected"),
    [
        ({}, [4, 4, 2]),
        ({"ranks": 5}, [4, 1]),
        ({"ranks": 10}, [4, 4, 2]),
        ({"nodes": 2}, [4, 4]),
        ({"nodes": 2, "ranks": 3}, [2, 1]),
        ({"ppn": 2}, [2, 2, 2]),
        ({"ppn": 2, "ranks": 3}, [2, 1]),
        ({"ppn": 1, "nodes": 2, "ranks": 2}, [1, 1]),
    ],
)
def test_ranks_fill_the_slots_that_were_asked_for(request_, expected):
    assert counts(job(4, 4, 2), **request_) == expected


@pytest.mark.parametrize(
    ("request_", "said"),
    [
        ({"ranks": 11}, "-n 11 is more than there is .*3 hosts with 10 slots.* give -n 10 or less"),
        ({"nodes": 4}, "--nodes 4 is more than there is .* give --nodes 3 or less"),
        ({"ppn": 4}, "--ppn 4 puts 4 ranks on n3, which takes 2"),
        ({"ppn": 2, "ranks": 7}, "-n 7 --ppn 2 is more than there is .* give -n 6 or less"),
        ({"ppn": 2, "nodes": 2, "ranks": 3}, "contradicts"),
        ({"nodes": 3, "ranks": 2}, "-n 2 is fewer than --nodes 3"),
    ],
)
def test_more_than_there_is_is_refused_with_what_there_is(request_, said):
    with pytest.raises(UserError, match=said):
        counts(job(4, 4, 2), **request_)


def test_where_nobody_asked_for_slots_the_machine_file_says_how_many():
    one_line_each = job(1, 1, given=False)
    assert counts(one_line_each, name="polaris") == [4, 4]
    assert counts(one_line_each, name="polaris", ranks=6) == [4, 2]
    assert counts(one_line_each, name="generic_pbs") == [1, 1]
    with pytest.raises(UserError, match="-n 9 is more"):
        counts(one_line_each, name="polaris", ranks=9)


def test_this_host_takes_as_many_as_one_likes():
    here = Allocation("local", None, (Host("here", 2),), False)
    assert counts(here, name="local") == [2]
    assert counts(here, name="local", ranks=256) == [256]


def test_bare_host_names_share_the_ranks():
    bare = job(1, 1, 1, scheduler="hostfile", given=False)
    assert counts(bare, name="local", ranks=8) == [3, 3, 2]
    assert counts(bare, name="local", ranks=2) == [1, 1]


# --- uneven hosts, on each launcher --------------------------------------------------------------


def test_hydra_gets_the_slots_of_each_host():
    assert argv_of(plan(job(2, 1))) == ["mpiexec", "-n", "3", "-hosts", "n1:2,n2:1"]


def test_hydra_binds_as_a_machine_file_says():
    bound = plan(job(2), "machine.node.bind=list", "machine.node.cpu_list=['0-1,8','2']")
    assert argv_of(bound)[-2:] == ["-bind-to", "user:0+1+8,2"]
    deep = plan(job(2), "machine.node.bind=depth", "machine.node.cpus_per_rank=4")
    assert argv_of(deep)[-4:] == ["-bind-to", "hwthread:4", "-map-by", "hwthread:4"]
    assert [place.cpus for place in deep.ranks()] == ["0-3", "4-7"]


def test_srun_gets_a_host_name_for_each_rank():
    uneven = plan(job(2, 1, scheduler="slurm", cpus_per_node=4), name="generic_slurm")
    assert argv_of(uneven) == [
        "srun", "-N", "2", "-n", "3", "--distribution=arbitrary", "-w", "n1,n1,n2", "-c", "2",
        "--kill-on-bad-exit=1",
    ]  # fmt: skip


def test_srun_reads_a_long_list_of_a_host_for_each_rank_from_a_file():
    """Linux takes 128 KiB for one argument, and srun a word with a slash for a file."""
    for path, word in (("run/hosts", "run/hosts"), ("hosts", "./hosts")):
        many = plan(job(*[4] * 9000, 1, scheduler="slurm"), name="generic_slurm", hosts_path=path)
        assert argv_of(many)[5:8] == ["--distribution=arbitrary", "-w", word]
        assert many.files[0].path == word
        names = many.files[0].content.splitlines()
        assert (names[:5], names[-2:], len(names)) == (
            ["n1", "n1", "n1", "n1", "n2"], ["n9000", "n9001"], 36001,
        )  # fmt: skip


def test_in_a_salloc_shell_there_is_room_for_a_task_on_each_cpu():
    shell = job(1, 1, scheduler="slurm", given=False, cpus_per_node=4)
    assert counts(shell, name="generic_slurm") == [1, 1]
    assert counts(shell, name="generic_slurm", ranks=6) == [4, 2]
    assert counts(shell, name="generic_slurm", ppn=3) == [3, 3]
    with pytest.raises(UserError, match="-n 9 is more than there is"):
        counts(shell, name="generic_slurm", ranks=9)


def test_srun_is_told_which_nodes_only_where_it_takes_a_part():
    slurm = job(2, 2, 2, scheduler="slurm")
    assert "-w" not in plan(slurm, name="generic_slurm").argv
    part = argv_of(plan(slurm, name="generic_slurm", nodes=2))
    assert part[part.index("-w") + 1] == "n[1-2]"


def test_openmpi_is_given_slots_variables_and_no_binding():
    openmpi = argv_of(plan(job(2, 1), "machine.mpiexec=openmpi"))
    assert openmpi[:7] == ["mpiexec", "-n", "3", "--map-by", "slot", "--bind-to", "none"]
    assert openmpi[7:9] == ["--host", "n1:2,n2:1"]
    assert openmpi[9:11] == ["-x", MASTER_ADDR]
    request = Request(("ls",), passed=("MINE",), installed_here=False)
    known = machine.load("generic_pbs", ["machine.mpiexec=openmpi"])
    told = make_plan(request, known, job(2), {"PYTHONPATH": "/p", "HOME": "/h"}).argv
    handed_on = {name for option, name in itertools.pairwise(told) if option == "-x"}
    assert {"MINE", "PYTHONPATH", MASTER_ADDR} < handed_on
    assert "HOME" not in handed_on
    crowded = argv_of(plan(job(1, given=False), "machine.mpiexec=openmpi", "machine.node.ranks=4"))
    assert crowded[4] == "ppr:4:node:OVERSUBSCRIBE"


def test_openmpi_is_given_cpus_in_a_row_and_no_list():
    deep = plan(
        job(2), "machine.mpiexec=openmpi", "machine.node.bind=depth", "machine.node.cpus_per_rank=4"
    )
    assert argv_of(deep)[4:7] == ["ppr:2:node:PE=4", "--bind-to", "core"]
    listed = ("machine.node.bind=list", "machine.node.cpu_list=['0-7','8-15']")
    with pytest.raises(UserError, match=r"bind=list: mpiexec of Open MPI takes no list"):
        plan(job(2), "machine.mpiexec=openmpi", *listed)


def test_pals_takes_a_shorter_last_node_but_no_other_shape():
    assert argv_of(plan(job(4, 4, 2), "machine.mpiexec=pals")) == [
        "mpiexec", "-n", "10", "--ppn", "4",
    ]  # fmt: skip
    with pytest.raises(UserError, match="same number of ranks on every node but the last"):
        plan(job(2, 4), "machine.mpiexec=pals")


def test_pals_reads_a_part_of_the_hosts_from_a_file():
    part = plan(job(1, 1, 1, given=False), name="aurora", nodes=2, hosts_path="run/hosts")
    assert part.files == (("run/hosts", "n1\nn2\n"),)
    assert argv_of(part)[-2:] == ["--hostfile", "run/hosts"]


def test_a_list_of_hosts_too_long_for_an_argument_goes_into_a_file():
    many = plan(job(*[4] * 9000), hosts_path="run/hosts")
    assert argv_of(many) == ["mpiexec", "-n", "36000", "-f", "run/hosts"]
    assert many.files[0][1].startswith("n1:4\nn2:4\n")
    open_mpi = plan(job(*[4] * 9000), "machine.mpiexec=openmpi", hosts_path="run/hosts")
    assert open_mpi.files[0][1].startswith("n1 slots=4\n")


def test_torchrun_starts_once_a_node_and_not_unevenly():
    two = plan(job(4, 4), launcher="torchrun")
    assert argv_of(two)[:5] == ["mpiexec", "-n", "2", "-hosts", "n1:1,n2:1"]
    port = next(v.value for v in two.variables if v.name == MASTER_PORT)
    tail = two.argv[two.argv.index("torch.distributed.run") :]
    assert tail == (
        "torch.distributed.run", "--nproc-per-node", "4", "--nnodes", "2", "--rdzv-backend", "c10d",
        "--rdzv-endpoint", f"n1:{port}", "--rdzv-id", "7", "-m", "--", "allranks.launch.guard", "--",
        "python", "t.py",
    )  # fmt: skip
    with pytest.raises(UserError, match="torchrun starts the same number"):
        plan(job(4, 2), launcher="torchrun")


@pytest.mark.parametrize("launcher", ["mpiexec", "srun", "torchrun"])
def test_the_same_command_line_for_another_program(launcher):
    told = plan(job(2, 2), launcher=launcher)
    other = plan(job(2, 2), launcher=launcher, program=("check", "--", "-x"))
    assert told.argv_for(["check", "--", "-x"]) == other.argv


def test_the_users_own_address_of_rank_0_is_kept():
    def address(environ):
        request = Request(("true",), installed_here=False)
        variables = make_plan(request, machine.load("generic_pbs"), job(2, 2), environ).variables
        return next((v.value, v.why) for v in variables if v.name == MASTER_ADDR)

    assert address({MASTER_ADDR: "10.0.0.9"}) == ("10.0.0.9", f"user: {MASTER_ADDR}")
    assert address({}) == ("n1", "launcher: rank 0's host")
    # A rank of another launch has that launch's address.
    assert address({MASTER_ADDR: "10.0.0.9", LAUNCH_ID: "ab"}) == ("n1", "launcher: rank 0's host")


def test_two_jobs_meet_on_different_ports():
    def port(job_id):
        one = Allocation("pbs", job_id, (Host("n1", 2),))
        return next(v.value for v in plan(one).variables if v.name == MASTER_PORT)

    assert port("7.pbs") == port("7.pbs")
    assert port("7.pbs") != port("8.pbs")


# --- the real launchers --------------------------------------------------------------------------

SHOW = """
import os
rank = os.environ.get("PMI_RANK") or os.environ.get("OMPI_COMM_WORLD_RANK") or os.environ["RANK"]
os.write(1, f"{rank} {os.environ['ODD']}\\n".encode())  # at once: launchers mix what comes in parts
"""


@pytest.mark.parametrize("launcher", ["mpiexec", only_long("torchrun")])
def test_the_planned_command_runs_here(launcher, tmp_path):
    """The argv of the plan starts every rank, arguments and variables as they were given."""
    if not launchers.path_of("mpiexec") and launcher == "mpiexec":
        pytest.skip("no mpiexec: pip install mpich")
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    here = find_allocation({"CUDA_VISIBLE_DEVICES": ""})
    known = machine.load("local", ["machine.variables.ODD=a 'b' $c"])
    request = Request((sys.executable, str(script)), ranks=3, launcher=launcher)
    told = make_plan(request, known, here, {})
    argv = list(told.argv)
    # A module that starts what stands after its `--` stands for the rank's wrapper.
    (tmp_path / "wrapper.py").write_text(
        "import os, sys; assert sys.argv[1] == '--'; os.execvp(sys.argv[2], sys.argv[2:])"
    )
    argv[argv.index("allranks.launch.guard")] = "wrapper"
    environ = {k: v for k, v in os.environ.items() if not k.startswith(("PMI", "OMPI", "RANK"))}
    environ["PYTHONPATH"] = str(tmp_path)
    done = subprocess.run(
        argv,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
        env=told.environment(environ),
    )
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{rank} a 'b' $c" for rank in range(3)]


@pytest.mark.parametrize(
    ("said", "dialect"),
    [
        ("HYDRA build details:\n    Version: 5.0", "hydra"),
        ("mpiexec (OpenRTE) 4.1.5", "openmpi"),
        ("mpirun (Open MPI) 5.0.3", "openmpi"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.11", "hydra"),
        ("mpiexec version 1.4.0 (PALS)", "pals"),
    ],
)
def test_the_mpi_of_mpiexec_is_known_by_its_version(said, dialect, tmp_path, monkeypatch):
    fake = tmp_path / "mpiexec"
    fake.write_text(f"#!/bin/sh\nprintf '%s\\n' {shlex.quote(said)}\n")
    fake.chmod(0o755)
    monkeypatch.setattr(launchers, "path_of", lambda name: str(fake))
    assert launchers.mpiexec_kind(machine.load("local"), True) == dialect


def test_every_launcher_that_can_be_asked_for_is_in_the_table():
    """A machine file names launchers on a floor below the table, so their names stand there once more."""
    kinds = launchers.LAUNCHERS
    assert ("auto", *dict.fromkeys(known.name for known in kinds.values())) == machine.LAUNCHERS
    mpis = [kind for kind, known in kinds.items() if known.name == "mpiexec"]
    assert {"auto", *mpis} == set(typing.get_args(typing.get_type_hints(machine.Machine)["mpiexec"]))


def test_an_mpiexec_that_nobody_knows_is_refused(tmp_path, monkeypatch):
    fake = tmp_path / "mpiexec"
    fake.write_text("#!/bin/sh\necho something\n")
    fake.chmod(0o755)
    monkeypatch.setattr(launchers, "path_of", lambda name: str(fake))
    with pytest.raises(UserError, match=r"machine\.mpiexec=hydra"):
        launchers.mpiexec_kind(machine.load("local"), True)


def test_help_tells_every_option():
    told = launch("--help").stdout
    for option in ("-n", "--nodes", "--ppn", "--launcher", "--machine", "--hosts", "--dry-run"):
        assert option in told


def test_a_misspelt_option_is_named_with_the_right_one():
    said = message(launch("--max-restart", "3", "model=cnn"))
    assert said == (
        "allranks: --max-restart is not an option of `allranks launch`. Did you mean --max-restarts?"
    )


def test_launch_within_another_launcher_is_refused_once(tmp_path):
    words = [*started_by("mpiexec", 2), "-m", "allranks", "launch", "-n", "2", *SMALL]
    done = execute(words, tmp_path)
    assert done.code == 2
    assert "`allranks launch` starts the ranks itself, but mpich has started it 2 times" in done.message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("words", [["launch", "--dry-run", *SMALL], ["doctor", "--json"]])
def test_a_reader_that_has_seen_enough_is_no_error(tmp_path, words):
    process = subprocess.Popen(
        [PYTHON, "-m", "allranks", *words], cwd=tmp_path, env=clean_environment(), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    process.stdout = None
    _, err = process.communicate(timeout=TIMEOUT_S)
    assert (process.returncode, err) == (1, "")
