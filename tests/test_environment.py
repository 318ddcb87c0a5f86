"""Which rank a process is, by a recorded environment of each launcher, and what must not fool us.

The names are those that real ones set: torchrun, MPICH 5.0, Open MPI 4.1 and Slurm 22.05; those of
PALS, Cray PMI, Intel MPI, MVAPICH, Flux, PMIx and jsrun are as documented. All tell of the same rank:
5 of 8, the second one on the second of two hosts.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from allranks.base.errors import UserError
from allranks.job.hosts import first_host
from allranks.job.identity import RankIdentity, discover, launcher_rank
from helpers import SMALL, TIMEOUT_S, execute, execute_forked, forked_python

TORCHRUN = {
    "RANK": "5", "LOCAL_RANK": "1", "WORLD_SIZE": "8", "LOCAL_WORLD_SIZE": "4", "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2", "ROLE_WORLD_SIZE": "8", "TORCHELASTIC_USE_AGENT_STORE": "True",
    "ROLE_RANK": "5", "MASTER_ADDR": "n0", "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "7", "TORCHELASTIC_RESTART_COUNT": "0", "OMP_NUM_THREADS": "1",
}  # fmt: skip
MPICH = {
    "PMI_RANK": "5", "PMI_SIZE": "8", "PMI_FD": "9", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4",
    "HYDI_CONTROL_FD": "11", "PMI_HOSTNAME": "n1",
}  # fmt: skip
INTEL_MPI = {
    "PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "4",
    "I_MPI_HYDRA_HOST_FILE": "/tmp/hosts",
}  # fmt: skip
OPENMPI = {
    "OMPI_COMM_WORLD_RANK": "5", "OMPI_COMM_WORLD_SIZE": "8", "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "4", "OMPI_COMM_WORLD_NODE_RANK": "1", "OMPI_UNIVERSE_SIZE": "8",
    "PMIX_RANK": "5", "PMIX_NAMESPACE": "prterun-n0-1@1",
}  # fmt: skip
MVAPICH2 = {
    "MV2_COMM_WORLD_RANK": "5", "MV2_COMM_WORLD_SIZE": "8", "MV2_COMM_WORLD_LOCAL_RANK": "1",
    "MV2_COMM_WORLD_LOCAL_SIZE": "4", "PMI_RANK": "5", "PMI_SIZE": "8", "MPI_LOCALRANKID": "1",
    "MPI_LOCALNRANKS": "4",
}  # fmt: skip
SLURM_JOB = {
    "SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_NNODES": "2", "SLURM_NTASKS": "8",
    "SLURM_NPROCS": "8", "SLURM_TASKS_PER_NODE": "4(x2)",
}  # fmt: skip
SRUN = {
    **SLURM_JOB, "SLURM_PROCID": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
    "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "n[0-1]",
}  # fmt: skip
PALS = {
    "PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1", "PALS_LOCAL_SIZE": "4", "PALS_NODEID": "1",
    "PALS_DEPTH": "8", "PBS_NODEFILE": "/var/spool/pbs/aux/7.pbs", "PBS_JOBID": "7.pbs",
}  # fmt: skip
CRAY_PMI = {
    "PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4",
    "PMI_UNIVERSE_SIZE": "8",
}  # fmt: skip
JSRUN = {
    "JSM_NAMESPACE_RANK": "5", "JSM_NAMESPACE_SIZE": "8", "JSM_NAMESPACE_LOCAL_RANK": "1",
    "LSB_DJOB_RANKFILE": "/tmp/ranks", "LSB_JOBID": "3",
}  # fmt: skip
FLUX = {
    "FLUX_TASK_RANK": "5", "FLUX_JOB_SIZE": "8", "FLUX_TASK_LOCAL_ID": "1", "FLUX_JOB_NNODES": "2",
    "FLUX_JOB_ID": "f1", "PMI_RANK": "5", "PMI_SIZE": "8", "PMI_FD": "9",
}  # fmt: skip
MVAPICH = {name.replace("MV2_", "MVP_"): value for name, value in MVAPICH2.items()}
PMIX = {"PMIX_RANK": "5", "PMIX_NAMESPACE": "prterun-n0-1", "PMIX_SERVER_URI4": "n0"}
BATCH_SHELL = {**SLURM_JOB, "SLURM_PROCID": "0", "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}


def told(launcher: str, *places: int | None) -> RankIdentity:
    """The identity of this process, had `launcher` told it these places."""
    return RankIdentity(launcher, *places, parent_pid=os.getppid())


@pytest.mark.parametrize(
    ("environ", "expected"),
    [
        (TORCHRUN, told("torchrun", 5, 8, 1, 4)),
        (MPICH, told("mpich", 5, 8, 1, 4)),
        (INTEL_MPI, told("mpich", 5, 8, 1, 4)),
        (OPENMPI, told("openmpi", 5, 8, 1, 4)),
        (MVAPICH2, told("mvapich2", 5, 8, 1, 4)),
        (MVAPICH, told("mvapich", 5, 8, 1, 4)),
        (FLUX, told("flux", 5, 8, 1, None)),
        (PMIX, told("pmix", 5, None, None, None)),  # MPI knows the rest
        (SRUN, told("srun", 5, 8, 1, 4)),
        (PALS, told("pals", 5, None, 1, 4)),  # MPI knows the size, PALS does not tell it
        ({**PALS, "PMI_SIZE": "8"}, told("pals", 5, 8, 1, 4)),
        (CRAY_PMI, told("cray-pmi", 5, 8, 1, 4)),
        (JSRUN, told("jsrun", 5, 8, 1, None)),
        (
            {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"},
            told("environment", 5, 8, 1, 4),
        ),
        ({}, told("none", 0, 1, 0, 1)),
    ],
)
def test_each_launcher(environ, expected):
    assert discover(environ) == expected
    assert launcher_rank(environ) == expected.rank


# --- traps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("environ", [MPICH, OPENMPI, SRUN, PALS, CRAY_PMI, MVAPICH2, JSRUN, FLUX, PMIX])
def test_a_stale_rank_does_not_win_silently(environ):
    with pytest.raises(UserError, match=r"RANK=0 .*is left over in the environment"):
        discover({**environ, "RANK": "0", "WORLD_SIZE": "8"})


@pytest.mark.parametrize("environ", [MPICH, OPENMPI, SRUN, CRAY_PMI, MVAPICH2, JSRUN])
def test_a_stale_world_size_does_not_either(environ):
    with pytest.raises(UserError, match="unset RANK LOCAL_RANK WORLD_SIZE"):
        discover({**environ, "WORLD_SIZE": "4"})


def test_a_rank_that_fits_the_launcher_is_no_contradiction():
    assert discover({**SRUN, "RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}).launcher == "srun"


@pytest.mark.parametrize(
    "shell",
    [
        SLURM_JOB,  # salloc without a step
        BATCH_SHELL,  # sbatch: a task id, but no step
        {**BATCH_SHELL, "SLURM_STEP_ID": "4294967290"},  # salloc with use_interactive_step
        {**BATCH_SHELL, "SLURM_STEP_ID": "4294967291"},  # the batch step
    ],
)
def test_a_shell_of_salloc_or_sbatch_is_no_task(shell):
    assert discover(shell) == told("none")


def test_pmi_names_leak_into_a_slurm_step():
    """Bare PMI_* names of a site's plugin or an outer launcher say nothing under srun."""
    assert discover({**SRUN, "PMI_RANK": "0", "PMI_SIZE": "1"}).launcher == "srun"
    cray_plugin = {"PMI_RANK": "5", "PMI_SIZE": "8", "PMI_LOCAL_RANK": "1", "PMI_LOCAL_SIZE": "4"}
    pals_names = {"PALS_RANKID": "5", "PALS_LOCAL_RANKID": "1", "PALS_NODEID": "1"}
    assert discover({**SRUN, **cray_plugin, **pals_names}) == told("srun", 5, 8, 1, 4)


def test_bare_pmi_is_followed_where_it_tells_of_several():
    """As mpiexec.gforker and others set it: MPI is asked, and must see as many."""
    assert discover({"PMI_RANK": "5", "PMI_SIZE": "8"}) == told("pmi", 5, 8, None, None)
    assert discover({"PMI_RANK": "5", "PMI_SIZE": "8"}).is_mpi
    assert discover({"PMI_RANK": "0", "PMI_SIZE": "1"}) == told("none")
    by_hand = {"RANK": "5", "WORLD_SIZE": "8"}
    assert discover({"PMI_RANK": "0", "PMI_SIZE": "1", **by_hand}).launcher == "environment"


def test_flux_knows_the_ranks_of_a_node_where_there_is_one():
    assert discover({**FLUX, "FLUX_JOB_NNODES": "1"}).local_world_size == 8


def test_a_shell_of_slurm_with_its_pmix_plugin_is_no_rank():
    shell = {**BATCH_SHELL, "SLURM_STEP_ID": "4294967290", "PMIX_RANK": "0", "PMIX_NAMESPACE": "slurm.7"}
    assert discover(shell) == told("none")
    assert discover({**SRUN, "PMIX_RANK": "5", "PMIX_NAMESPACE": "slurm.7.0"}).launcher == "srun"


@pytest.mark.parametrize(
    "variable",
    [
        "PMI_SIZE=2",  # PMI_RANK is missing
        "PMI_RANK=1",  # PMI_SIZE is missing
        "FLUX_JOB_SIZE=2",
        "OMPI_COMM_WORLD_SIZE=2",
        "JSM_NAMESPACE_SIZE=2",
        "SLURM_PROCID=1",  # of a task, whose step is missing
        "HOROVOD_SIZE=2",
        "HOROVOD_RANK=1",
        "MPIRUN_NPROCS=2",
        "ALPS_APP_PE=1",
        "SOMEBODYS_COMM_WORLD_SIZE=2",
        "SOMEBODYS_COMM_WORLD_RANK=1",
    ],
)
def test_several_processes_of_a_launcher_that_is_not_followed_are_refused(variable):
    name, _, value = variable.partition("=")
    with pytest.raises(UserError, match=f"^{variable} says that a launcher started several processes"):
        discover({name: value})
    assert discover({name: "1" if name.endswith(("SIZE", "NPROCS")) else "0"}) == told("none")


@pytest.mark.parametrize(
    "left_over",
    [
        {"MVP_COMM_WORLD_RANK": "1"},
        {"OMPI_COMM_WORLD_RANK": "1"},
        {"FLUX_TASK_RANK": "1"},
        {"PALS_RANKID": "1"},
        {"PMIX_RANK": "1"},
        {"PMI_RANK": "1", "MPI_LOCALRANKID": "1"},
        {"SLURM_PROCID": "0", "SLURM_STEP_ID": "0"},
        {"TORCHELASTIC_RUN_ID": "7", "RANK": "0"},
    ],
)
def test_a_rank_of_nobody_knows_how_many_is_refused(left_over):
    names = " ".join(left_over)
    with pytest.raises(UserError, match=rf"says how many ranks there are: type `unset {names}`") as caught:
        discover(left_over)
    assert caught.value.said_by is None  # there may be no rank 0 to say it


def test_a_lone_rank_that_is_left_over_is_told_so(train):
    done = train("model=linear", env={"MVP_COMM_WORLD_RANK": "1"})
    assert done.code == 2
    assert "MVP_COMM_WORLD_RANK=1 is set, but no variable of mvapich says how many" in done.err


@pytest.mark.parametrize("rank", [0, 1])
def test_two_ranks_without_an_mpi_that_knows_them_do_not_train_alone(train, rank):
    """As Flux starts them, but with an mpi4py whose MPI does not speak with Flux."""
    done = train("model=linear", env={"FLUX_TASK_RANK": str(rank), "FLUX_JOB_SIZE": "2"})
    assert done.code == 2
    assert ("flux's launcher started 2 ranks, but mpi4py is bound to" in done.err) == (rank == 0)
    done = train("model=linear", env={"PMIX_RANK": str(rank)})
    assert done.code == 2


def test_ranks_of_an_mpiexec_that_sets_bare_pmi_only(tmp_path):
    gforker = Path(sys.executable).with_name("mpiexec.gforker")
    if not gforker.exists():
        pytest.skip("no mpiexec.gforker: pip install mpich")
    train = [forked_python(), "-m", "allranks.train"]
    done = execute([str(gforker), "-n", "2", *train, *SMALL, "model=linear", "trainer.epochs=1"], tmp_path)
    assert done.ok().run.summary["world_size"] == 2


@pytest.mark.parametrize("rank", [0, 1])
def test_a_master_that_leads_each_host_to_itself_is_refused_at_once(tmp_path, rank):
    """Rank 1 on another host would wait for itself."""
    shared = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_PORT": "23456"}
    mine = {"RANK": str(rank), "MASTER_ADDR": "localhost", **shared}
    ours = execute_forked(["-m", "allranks.train", *SMALL], 1, tmp_path, mine)
    assert ours.code == 2
    assert "MASTER_ADDR=localhost" in ours.err
    assert ("is the loopback of rank 0's host" if rank == 0 else "leads back to the host that") in ours.err


def test_ranks_meet_at_an_ipv6_address(tmp_path):
    """MASTER_ADDR=::1, ranks started by hand: no rank waits for a store that is served elsewhere."""
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
        port = probe.getsockname()[1]
    words = ["-m", "allranks.train", *SMALL, "model=linear", "trainer.epochs=1"]
    there = {"MASTER_ADDR": "::1", "MASTER_PORT": str(port)}
    assert execute_forked(words, 2, tmp_path, there).ok().run.summary["world_size"] == 2


def test_a_step_in_a_heterogeneous_job_is_refused_by_name():
    with pytest.raises(UserError, match="SLURM_HET_SIZE=2: this is a heterogeneous job of 2 groups"):
        discover({**SRUN, "SLURM_HET_SIZE": "2"})
    assert discover({**SRUN, "SLURM_HET_SIZE": "1"}).launcher == "srun"
    assert discover({**MPICH, "SLURM_HET_SIZE": "2"}).launcher == "mpich"


def test_the_node_rank_of_openmpi_is_no_local_rank():
    """OMPI_COMM_WORLD_NODE_RANK counts processes of all jobs on the node."""
    assert discover({**OPENMPI, "OMPI_COMM_WORLD_NODE_RANK": "3"}).local_rank == 1


@pytest.mark.parametrize("empty", ["", " "])
def test_an_empty_pmi_size_is_no_size(empty):
    assert discover({**PALS, "PMI_SIZE": empty}) == told("pals", 5, None, 1, 4)


def test_mpiexec_inside_slurm_is_not_srun():
    """MPICH and Open MPI start their daemons with srun, so ranks inherit the daemon's step."""
    daemon = {**SRUN, "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_NTASKS": "2"}
    assert discover({**daemon, **MPICH}) == told("mpich", 5, 8, 1, 4)
    assert discover({**daemon, **OPENMPI}) == told("openmpi", 5, 8, 1, 4)


@pytest.mark.parametrize("outer", [SRUN, MPICH, PALS, OPENMPI])
def test_torchrun_inside_another_launcher(outer):
    assert discover({**outer, **TORCHRUN}) == told("torchrun", 5, 8, 1, 4)


def test_uneven_tasks_of_a_step():
    """A step of 3 tasks, given the hosts n1,n1,n2, in a job of one task a node."""
    recorded = {
        "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_NNODES": "2", "SLURM_NTASKS": "3",
        "SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0",
        "SLURM_STEP_NUM_TASKS": "3",
        "SLURM_STEP_TASKS_PER_NODE": "2,1", "SLURM_TASKS_PER_NODE": "2,1",
        "SLURM_DISTRIBUTION": "arbitrary", "SLURM_JOB_ID": "2",
    }  # fmt: skip
    assert discover(recorded) == told("srun", 2, 3, 0, 1)
    uneven = {**SRUN, "SLURM_STEP_TASKS_PER_NODE": "5,3", "SLURM_TASKS_PER_NODE": "4(x2)"}
    assert discover(uneven).local_world_size == 3
    assert discover({**uneven, "SLURM_NODEID": "0", "SLURM_PROCID": "1"}).local_world_size == 5


def test_a_request_for_tasks_per_node_is_not_what_runs():
    """SLURM_NTASKS_PER_NODE is what sbatch was asked for; a step may have fewer."""
    assert discover({**SRUN, "SLURM_NTASKS_PER_NODE": "32"}).local_world_size == 4


def test_a_step_smaller_than_its_job():
    first = {"SLURM_PROCID": "0", "SLURM_NODEID": "0", "SLURM_LOCALID": "0"}
    one = {**SRUN, **first, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}
    assert discover(one) == told("srun", 0, 1, 0, 1)


@pytest.mark.parametrize(
    ("environ", "said"),
    [
        ({**MPICH, "PMI_RANK": "8"}, "PMI_RANK=8 is not below PMI_SIZE=8"),
        (
            {**OPENMPI, "OMPI_COMM_WORLD_LOCAL_RANK": "4"},
            "is not below OMPI_COMM_WORLD_LOCAL_SIZE=4",
        ),
        ({**TORCHRUN, "WORLD_SIZE": "many"}, "WORLD_SIZE='many' is not a whole number"),
        ({"RANK": "1"}, "RANK=1 is set but WORLD_SIZE is not"),
        ({"WORLD_SIZE": "4"}, "WORLD_SIZE=4 is set but RANK is not"),
    ],
)
def test_variables_that_contradict_each_other(environ, said):
    with pytest.raises(UserError, match=said):
        discover(environ)


def test_a_lone_world_size_of_one_is_nobodys():
    assert discover({"WORLD_SIZE": "1"}) == told("none")


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("nid001234", "nid001234"), ("nid[001-003,7],login1", "nid001"), ("a1,b2", "a1"),
        ("c[7]-ib,d", "c7-ib"),
    ],
)  # fmt: skip
def test_the_first_host_of_a_node_list(nodes, host):
    assert first_host(nodes) == host


def test_no_host_in_a_node_list():
    with pytest.raises(UserError, match="is not a Slurm node list"):
        first_host("")


@pytest.mark.parametrize("launcher", ["mpiexec", "torchrun"])
def test_the_real_launchers_here(launcher):
    """What this machine's own launchers say is understood, every rank once."""
    from allranks.launch import launchers

    show = (
        "import os; from allranks.job.identity import discover; d = discover(os.environ); "
        "os.write(1, f'{d.rank} {d.world_size} {d.local_rank} {d.local_world_size}\\n'.encode())"
    )
    program = [sys.executable, "-c", show]
    if launcher == "mpiexec":
        path = launchers.path_of("mpiexec")
        if path is None:
            pytest.skip("no mpiexec: pip install mpich")
        argv = [path, "-n", "3", *program]
    else:
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        argv = [*torchrun, "--nproc-per-node", "3", "--no-python", *program]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    assert done.returncode == 0, done.stderr
    assert sorted(done.stdout.splitlines()) == [f"{rank} 3 {rank} 3" for rank in range(3)]
