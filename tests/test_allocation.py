"""The hosts of a job, from PBS, Slurm, a hostfile or this host."""

import ipaddress
import re
import socket
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from allranks.base import links
from allranks.base.errors import UserError
from allranks.job import hosts
from allranks.job.hosts import Host, compress, expand, find_allocation, from_hostfile, is_this_host
from allranks.job.identity import repeated


def file(tmp_path, text):
    path = tmp_path / "hosts"
    path.write_bytes(text.encode())
    return path


# --- Slurm's node lists --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node_list", "hosts"),
    [
        ("a", ["a"]),
        ("b2", ["b2"]),
        ("a[001-003,7],b2", ["a001", "a002", "a003", "a7", "b2"]),
        ("nid[008-011]", ["nid008", "nid009", "nid010", "nid011"]),
        ("c[1-2]-x[0-1]", ["c1-x0", "c1-x1", "c2-x0", "c2-x1"]),
        ("n[9-11]", ["n9", "n10", "n11"]),
        ("z[3,1]", ["z3", "z1"]),  # the order is the ranks' order
        ("r[1-2]n[01-02].site", ["r1n01.site", "r1n02.site", "r2n01.site", "r2n02.site"]),
    ],
)
def test_slurm_node_lists_are_expanded(node_list, hosts):
    assert expand(node_list) == hosts


@pytest.mark.parametrize("bad", ["", "a[1-3", "a1-3]", "a[3-1]", "a[]", "a[x]", "a,,b", "a[1-]", "a b"])
def test_what_is_no_node_list_is_refused(bad):
    with pytest.raises(UserError, match="node list"):
        expand(bad)


stems = st.sampled_from(["a", "nid", "x1c", "gpu-", "rack1-node", "n0x"])
names = st.builds(
    lambda stem, width, number, tail: f"{stem}{number:0{width}}{tail}",
    stems, st.integers(0, 6), st.integers(0, 12000), st.sampled_from(["", "", "b", "-ib"]),
)  # fmt: skip


@given(st.lists(names, min_size=1, max_size=40))
def test_compressing_a_list_and_expanding_it_gives_the_list_again(hosts):
    assert expand(compress(hosts)) == hosts


@given(st.integers(0, 99990), st.integers(1, 2000), st.integers(0, 7))
def test_a_run_of_hosts_is_short(start, count, width):
    hosts = [f"nid{i:0{width}}" for i in range(start, start + count)]
    assert expand(compress(hosts)) == hosts
    assert len(compress(hosts)) < 80


def test_counts_per_node():
    assert repeated("2(x3),1", "SLURM_TASKS_PER_NODE") == [2, 2, 2, 1]
    with pytest.raises(UserError, match="SLURM_TASKS_PER_NODE='2x3'"):
        repeated("2x3", "SLURM_TASKS_PER_NODE")


# --- jobs ----------------------------------------------------------------------------------------

SLURM = {"SLURM_JOB_ID": "41", "SLURM_JOB_NODELIST": "n[1-3]", "SLURM_TASKS_PER_NODE": "2(x2),1"}


def test_slurm_job_with_uneven_tasks():
    job = find_allocation({**SLURM, "SLURM_NTASKS": "5", "SLURM_JOB_CPUS_PER_NODE": "8(x2),4"})
    assert (job.scheduler, job.job_id) == ("slurm", "41")
    assert job.hosts == (Host("n1", 2), Host("n2", 2), Host("n3", 1))
    assert job.slots_given
    assert job.cpus_per_node == 4


def test_salloc_shell_in_which_nobody_asked_for_tasks():
    """`salloc -N 2`: TASKS_PER_NODE is what would fit, and the machine file knows better."""
    environ = {**SLURM, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "64(x2)"}
    assert not find_allocation(environ).slots_given
    assert find_allocation({**environ, "SLURM_NTASKS": "128"}).slots_given


@pytest.mark.parametrize(
    ("asked", "given", "slots"),
    [
        ({}, False, 1),  # salloc -N 2 --exclusive: 64 tasks a node are made up from the CPUs
        ({"SLURM_NTASKS": "2"}, False, 1),  # sbatch -N 2 --exclusive: one task a node is the default
        ({"SLURM_NTASKS": "128"}, True, 64),  # -n 128
        ({"SLURM_NTASKS_PER_NODE": "64"}, True, 64),
        ({"SLURM_GPUS_ON_NODE": "4"}, False, 4),
        ({"SLURM_NTASKS": "2", "SLURM_GPUS_ON_NODE": "a100:4"}, False, 4),
        ({"SLURM_GPUS_ON_NODE": "a100:2,v100:2"}, False, 4),
        ({"SLURM_NTASKS": "128", "SLURM_GPUS_ON_NODE": "4"}, True, 64),  # asked for, so it is so
    ],
)
def test_tasks_that_slurm_made_up_are_not_ranks_and_gpus_are(asked, given, slots):
    environ = {**SLURM, "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_TASKS_PER_NODE": "64(x2)", **asked}
    job = find_allocation({**environ, "SLURM_JOB_CPUS_PER_NODE": "64(x2)"})
    assert job.slots_given == given
    assert [host.slots for host in job.hosts] == [slots, slots]
    assert job.cpus_per_node == 64


def test_slurms_number_of_gpus_is_a_number():
    with pytest.raises(UserError, match="SLURM_GPUS_ON_NODE='many' cannot be read"):
        find_allocation({**SLURM, "SLURM_GPUS_ON_NODE": "many"})


def test_a_heterogeneous_job_is_refused_with_its_groups():
    environ = {"SLURM_HET_SIZE": "2", "SLURM_JOB_NODELIST_HET_GROUP_0": "n[1-3]",
               "SLURM_JOB_NODELIST_HET_GROUP_1": "gpu1"}  # fmt: skip
    # As salloc sets it: the job as a whole has no list of its nodes.
    job = {name: value for name, value in SLURM.items() if name != "SLURM_JOB_NODELIST"}
    with pytest.raises(UserError) as refused:
        find_allocation({**job, **environ})
    for word in ("SLURM_HET_SIZE=2", "HET_GROUP_0=n[1-3]", "HET_GROUP_1=gpu1", "--hosts FILE"):
        assert word in str(refused.value)


def test_slurm_variables_of_two_jobs_are_refused():
    with pytest.raises(UserError, match="for 3 nodes, but SLURM_JOB_NODELIST=n1 names 1"):
        find_allocation({**SLURM, "SLURM_JOB_NODELIST": "n1"})


def test_pbs_node_file_repeats_a_host_for_each_mpiproc(tmp_path):
    nodes = file(tmp_path, "x1.hsn\nx1.hsn\nx2.hsn\n")
    job = find_allocation({"PBS_NODEFILE": str(nodes), "PBS_JOBID": "7.pbs", "PBS_QUEUE": "debug"})
    assert (job.scheduler, job.job_id, job.queue) == ("pbs", "7.pbs", "debug")
    assert job.hosts == (Host("x1.hsn", 2), Host("x2.hsn", 1))
    assert job.slots_given


def test_pbs_one_line_per_chunk_says_nothing_of_ranks(tmp_path):
    job = find_allocation({"PBS_NODEFILE": str(file(tmp_path, "x1\nx2\n")), "PBS_JOBID": "7.pbs"})
    assert [host.name for host in job.hosts] == ["x1", "x2"]
    assert not job.slots_given


def test_pbs_goes_before_slurm_and_a_hostfile_before_both(tmp_path):
    nodes = file(tmp_path, "p1\n")
    environ = {**SLURM, "PBS_NODEFILE": str(nodes)}
    assert find_allocation(environ).scheduler == "pbs"
    hosts = tmp_path / "mine"
    hosts.write_text("m1 slots=2\n")
    assert find_allocation(environ, hosts).hosts == (Host("m1", 2),)


def test_pbs_node_file_that_is_gone():
    with pytest.raises(UserError, match=r"PBS_NODEFILE=/gone cannot be read \(No such file"):
        find_allocation({"PBS_NODEFILE": "/gone"})


def test_this_host_where_there_is_no_job():
    job = find_allocation({"CUDA_VISIBLE_DEVICES": "0,2,3"})
    assert (job.scheduler, job.job_id) == ("local", None)
    assert job.hosts == (Host(socket.gethostname(), 3),)
    assert find_allocation({"CUDA_VISIBLE_DEVICES": ""}).hosts[0].slots >= 1


# --- hostfiles -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "hosts"),
    [
        ("a:2\nb:1\n", [("a", 2), ("b", 1)]),
        ("a slots=2\nb slots = 1 max_slots=4\n", [("a", 2), ("b", 1)]),
        ("a\na\nb\n", [("a", 2), ("b", 1)]),
        ("# nodes\n\n  a   # first\nb\n", [("a", 1), ("b", 1)]),
        ("10.0.0.1:4", [("10.0.0.1", 4)]),
    ],
)
def test_hostfiles(tmp_path, text, hosts):
    assert find_allocation({}, file(tmp_path, text)).hosts == tuple(Host(*host) for host in hosts)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names no host"),
        ("# nothing\n\n", "names no host"),
        ("a\r\nb\r\n", r"Windows line ends \(CRLF\)"),
        ("a:2\na:3\n", "has a twice, on lines 1 and 2"),
        ("a\nb\na slots=2\n", "has a twice, on lines 1 and 3"),
        ("a:0\n", "gives no slot"),
        ("a two\n", "line 1: 'a two' is no host"),
        ("-x\n", "line 1: '-x' is no host"),
    ],
)
def test_bad_hostfiles_are_refused_with_one_message(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        find_allocation({}, file(tmp_path, text))


def test_this_host_by_its_short_name(monkeypatch):
    assert is_this_host(socket.gethostname().partition(".")[0] + ".some.domain")
    assert is_this_host("127.0.0.1")
    assert not is_this_host("10.9.8.7")
    monkeypatch.setattr(socket, "gethostname", lambda: "Node1.some.domain")
    assert is_this_host("node1") and is_this_host("NODE1.other.domain")


def test_a_shell_on_a_part_of_the_jobs_nodes_is_called_that():
    """By `srun -N1 --pty bash` in a job of three: Slurm tells it the step's tasks and the job's nodes."""
    step = {**SLURM, "SLURM_TASKS_PER_NODE": "1", "SLURM_STEP_NODELIST": "n1"}
    with pytest.raises(UserError, match=r"a step of the job on n1, a part of its nodes \(n\[1-3\]\)"):
        find_allocation(step)


# --- names and addresses -------------------------------------------------------------------------


@pytest.fixture
def names(monkeypatch):
    """names(n1="127.0.1.1"): what /etc/hosts says of these names."""

    def say(**addresses: str) -> None:
        def look_up(name, port, *args, **kwargs):
            if name not in addresses and not str(name).replace(".", "").isdigit() and ":" not in str(name):
                raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")
            return real(addresses.get(name, name), port, *args, **kwargs)

        real = socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", look_up)

    return say


def test_a_name_that_leads_back_is_known(names):
    names(n1="127.0.1.1", n2="10.9.8.7", n3="::1", n4="2001:db8::4")
    assert [hosts.leads_back(name) for name in ("n1", "n2", "n3", "n4")] == [True, False, True, False]
    assert hosts.leads_back("127.0.0.1")
    assert not hosts.leads_back("unknown")
    with pytest.raises(UserError, match="MASTER_ADDR=n1 leads back to the host that uses it"):
        hosts.refuse_loopback("n1", "MASTER_ADDR")
    hosts.refuse_loopback("n2", "MASTER_ADDR")


def test_a_host_of_the_job_that_leads_back_is_refused_before_anything_waits(names):
    """`127.0.1.1 n1` in /etc/hosts: the supervisor would wait at its loopback for ranks that never come."""
    here = socket.gethostname()
    names(n1="127.0.1.1", n2="::1")
    for other in ("n1", "n2"):
        with pytest.raises(UserError, match=f"host {other} of the allocation leads back to {here}"):
            hosts.address_for([here, other])
    with pytest.raises(UserError, match="host n3 of the allocation cannot be found"):
        hosts.address_for(["n3"])
    assert hosts.address_for([here, "localhost", "::1"]) == "127.0.0.1"


@pytest.mark.parametrize("name", ["a..b", "n" * 64])
def test_a_name_that_no_host_can_have_is_named(name):
    """Python's own look-up raises UnicodeError for these."""
    assert not hosts.leads_back(name)
    with pytest.raises(UserError, match=f"host {name} .* cannot be found .*no host can have this name"):
        hosts.address_for([name])
    with pytest.raises(UserError, match=f"cannot listen at MASTER_ADDR={name}"):
        links.listen(name)
    with pytest.raises(OSError, match=f"no host can have the name {name}"):
        links.connect(name, 9, 1.0)


def test_hosts_that_have_ipv6_only_are_found(names):
    """The route to an address of this host's own IPv6, if it has one, starts at that address."""
    own = [line.split() for line in Path("/proc/net/if_inet6").read_text().splitlines()]
    far = [":".join(re.findall("....", word[0])) for word in own if word[3] == "00" and word[5] != "lo"]
    if not far:
        pytest.skip("no IPv6 network here")
    names(n6=far[0])
    assert ipaddress.ip_address(hosts.address_for(["n6"])) == ipaddress.ip_address(far[0])


def test_a_hostfile_in_the_home_directory(monkeypatch, tmp_path):
    """`--hosts=~/hosts`: no shell puts the home directory there."""
    monkeypatch.setenv("HOME", str(tmp_path))
    file(tmp_path, "n1:2\n")
    assert find_allocation({}, "~/hosts").hosts == (Host("n1", 2),)


def test_an_ipv6_address_in_a_hostfile_is_named(tmp_path):
    with pytest.raises(UserError, match=r"line 2: 'fe80::1' is an IPv6 address.*Write the host's name"):
        from_hostfile(file(tmp_path, "n1\nfe80::1\n"))
