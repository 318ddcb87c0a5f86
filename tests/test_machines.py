"""Every shipped machine: checked, planned, and its ranks where the centre wants them."""

import itertools
import math
import os

import pytest

from allranks.base.errors import UserError
from allranks.job import machine
from allranks.job.hosts import Allocation, Host, placeholder_allocation
from allranks.job.variables import DEVICE_VARIABLE, DEVICES, MASTER_ADDR
from allranks.launch.plan import Request, make_plan

GENERIC = ("generic_pbs", "generic_slurm", "local")
CENTRES = (
    "aspire2a", "aurora", "clariden", "crux", "derecho", "frontier", "gadi",
    "lumi", "perlmutter", "polaris", "sophia", "vista",
)  # fmt: skip
SHIPPED = tuple(sorted((*GENERIC, *CENTRES)))


def planned(name, nodes, *overrides, **request):
    """A plan for a job that is still to come."""
    known = machine.load(name, overrides)
    scheduler = "slurm" if known.scheduler == "slurm" else "pbs"
    request = Request(("python", "train.py"), installed_here=False, **request)
    return make_plan(request, known, placeholder_allocation(nodes, scheduler), {})


def before_program(plan):
    """The launcher's own part of the command line."""
    argv = list(plan.argv)
    return argv[: argv.index("-m") - 1]


def test_the_shipped_machines():
    assert tuple(machine.available()) == SHIPPED


@pytest.mark.parametrize("nodes", [1, 2, 512])
@pytest.mark.parametrize("name", SHIPPED)
def test_every_machine_is_planned_for(name, nodes):
    plan = planned(name, nodes)
    known = machine.load(name)
    ranks = list(plan.ranks())
    assert len(plan.hosts) == nodes
    assert len(ranks) == plan.world_size == nodes * (known.node.ranks_per_node or 1)
    assert [place.rank for place in ranks] == list(range(plan.world_size))
    assert str(plan.world_size) in plan.argv
    assert plan.argv[-5:] == ("-m", "allranks.launch.guard", "--", "python", "train.py")
    if nodes > 1 and name in CENTRES:
        assert ranks[-1].host == f"node{nodes}"
        assert ranks[-1].local_rank == known.node.ranks_per_node - 1


@pytest.mark.parametrize("name", CENTRES)
def test_a_node_has_a_rank_for_each_device_and_no_cpu_twice(name):
    ranks, node = list(planned(name, 1).ranks()), machine.load(name).node
    assert len(ranks) == node.ranks_per_node
    assert len({place.device for place in ranks}) == (node.devices or 1)  # Crux has no devices
    cpus = [cpu for place in ranks for cpu in numbers(place.cpus or "")]
    assert len(cpus) == len(set(cpus))


def numbers(cpus):
    spans = [span.split("-") for span in cpus.split(",") if span]
    return [i for span in spans for i in range(int(span[0]), int(span[-1]) + 1)]


def test_aurora_has_twelve_tiles_with_eight_cores_each():
    plan = planned("aurora", 2)
    assert before_program(plan) == [
        "mpiexec", "-n", "24", "--ppn", "12", "--cpu-bind",
        "list:1-8:9-16:17-24:25-32:33-40:41-48:53-60:61-68:69-76:77-84:85-92:93-100",
    ]  # fmt: skip
    ranks = list(plan.ranks())
    assert [(p.cpus, p.device) for p in ranks[5:7]] == [("41-48", "5"), ("53-60", "6")]
    assert [p.cpus for p in ranks[12:]] == [p.cpus for p in ranks[:12]]
    assert value(plan, MASTER_ADDR) == "node1.hsn.cm.aurora.alcf.anl.gov"
    assert value(plan, "CCL_PROCESS_LAUNCHER") == "pmix"


def test_aurora_with_more_ranks_than_the_list_has_binds_by_depth():
    plan = planned("aurora", 1, "machine.node.ranks=26", ppn=26)
    assert before_program(plan)[5:] == ["--depth=4", "--cpu-bind", "depth"]
    assert [p.cpus for p in plan.ranks()][-1] == "100-103"


def value(plan, name):
    return {v.name: v.value for v in plan.variables}.get(name)


def test_polaris_reverses_its_gpus():
    plan = planned("polaris", 1)
    assert before_program(plan) == [
        "mpiexec", "-n", "4", "--ppn", "4", "--depth=8", "--cpu-bind", "depth",
    ]  # fmt: skip
    assert [(p.cpus, p.device[0]) for p in plan.ranks()] == [
        ("0-7", "3"), ("8-15", "2"), ("16-23", "1"), ("24-31", "0"),
    ]  # fmt: skip
    assert value(plan, DEVICE_VARIABLE) == "CUDA_VISIBLE_DEVICES"
    assert value(plan, DEVICES) == "3,2,1,0"


def test_polaris_network_block_is_for_several_nodes_and_can_be_switched_off():
    assert value(planned("polaris", 1), "NCCL_NET") is None
    assert value(planned("polaris", 2), "NCCL_NET") == "AWS Libfabric"
    off = planned("polaris", 2, "machine.switches.nccl=false")
    assert not [v.name for v in off.variables if v.name.startswith(("NCCL", "FI_", "LD_"))]


def test_polaris_library_path_goes_before_the_users():
    known = machine.load("polaris")
    plan = make_plan(
        Request(("ls",), installed_here=False),
        known,
        placeholder_allocation(2, "pbs"),
        {"LD_LIBRARY_PATH": "/mine"},
    )
    path = value(plan, "LD_LIBRARY_PATH").split(":")
    assert path[0].startswith("/soft/libraries/hwloc")
    assert path[-1] == "/mine"


def test_polaris_with_loader_workers():
    plan = planned("polaris", 1, "machine.node.cpus_per_rank=16", "machine.node.cpus=64")
    assert "--depth=16" in plan.argv


def test_frontier_shows_each_rank_one_gcd():
    plan = planned("frontier", 2)
    assert before_program(plan) == [
        "srun", "-N", "2", "-n", "16", "--ntasks-per-node=8", "-c", "7", "--kill-on-bad-exit=1",
        "--gpus-per-task=1", "--gpu-bind=closest",
    ]  # fmt: skip
    ranks = list(plan.ranks())
    assert (ranks[0].cpus, ranks[0].device) == ("1-7", "4, seen as 0")
    assert (ranks[7].cpus, ranks[7].device) == ("57-63", "1, seen as 0")
    assert value(plan, DEVICES) is None  # srun has done it already
    assert value(plan, "NCCL_NET") == "OFI"
    assert value(planned("frontier", 1), "NCCL_NET") is None


def test_perlmutter_gives_a_rank_32_cpus_on_whatever_launcher():
    plan = planned("perlmutter", 4)
    assert before_program(plan) == [
        "srun", "-N", "4", "-n", "16", "--ntasks-per-node=4", "-c", "32", "--kill-on-bad-exit=1",
        "--gpus-per-node=4",
    ]  # fmt: skip
    assert [p.cpus for p in plan.ranks()][1] == "16-31,80-95"
    torchrun = planned("perlmutter", 4, launcher="torchrun")
    assert before_program(torchrun)[:8] == [
        "srun", "-N", "4", "-n", "4", "--ntasks-per-node=1", "-c", "128",
    ]  # fmt: skip
    assert [p.device for p in torchrun.ranks()][:5] == ["0", "1", "2", "3", "0"]


def test_sophia_takes_a_gpu_a_chunk_in_one_queue_and_a_node_in_the_other():
    known = machine.load("sophia")
    request = Request(("ls",), installed_here=False)

    def ranks(queue, slots, given):
        job = Allocation("pbs", "1.sophia", (Host("sophia-gpu-11", slots),), given, queue)
        return make_plan(request, known, job, {}).world_size

    assert ranks("by-gpu", 1, False) == 1
    assert ranks("by-gpu", 4, True) == 4
    assert ranks("by-node", 1, False) == 8
    with pytest.raises(UserError, match="sophia-gpu-11, which takes 1"):
        more = Request(("ls",), ppn=8, installed_here=False)
        job = Allocation("pbs", "1.sophia", (Host("sophia-gpu-11", 1),), False, "by-gpu")
        make_plan(more, known, job, {})


def test_crux_gives_each_rank_a_numa_domain_and_no_device():
    plan = planned("crux", 2)
    assert before_program(plan) == [
        "mpiexec", "-n", "16", "--ppn", "8", "--depth=16", "--cpu-bind", "depth",
    ]  # fmt: skip
    assert value(plan, "OMP_NUM_THREADS") == "16"
    assert value(plan, DEVICES) is None


def test_derecho_reverses_its_gpus_and_leaves_binding_alone():
    plan = planned("derecho", 2)
    assert before_program(plan) == ["mpiexec", "-n", "8", "--ppn", "4", "--cpu-bind", "none"]
    assert value(plan, DEVICES) == "3,2,1,0"


def test_clariden_shows_each_rank_one_gpu():
    plan = planned("clariden", 2)
    assert before_program(plan) == [
        "srun", "-N", "2", "-n", "8", "--ntasks-per-node=4", "-c", "72", "--kill-on-bad-exit=1",
        "--gpus-per-task=1",
    ]  # fmt: skip
    assert value(plan, "NCCL_PROTO") == "^LL128"
    assert value(planned("clariden", 1), "NCCL_NET") is None


def test_lumi_maps_each_rank_to_the_core_beside_its_gcd():
    plan = planned("lumi", 1)
    assert before_program(plan)[-2:] == ["--gpus-per-node=8", "--cpu-bind=map_cpu:49,57,17,25,1,9,33,41"]
    assert [(p.cpus, p.device) for p in plan.ranks()][:2] == [
        ("49", "0, seen as 0"),
        ("57", "1, seen as 0"),
    ]
    assert value(plan, DEVICE_VARIABLE) == "ROCR_VISIBLE_DEVICES"


def test_a_user_has_a_name_of_their_own_for_what_stands_on_a_shared_node():
    assert value(planned("lumi", 1), "MIOPEN_USER_DB_PATH") == f"/tmp/miopen-cache-{os.getuid()}"


def test_vista_is_told_neither_hosts_nor_gpus():
    plan = planned("vista", 2)
    words = before_program(plan)
    assert words[:5] == ["mpiexec", "-n", "2", "--map-by", "ppr:1:node"]
    refused = ("--host", "--hostfile", "--gres", "--gpus-per-task")
    assert not [word for word in words if word.startswith(refused)]
    assert plan.files == ()
    with pytest.raises(UserError, match="uses all nodes of a job: leave --nodes"):
        planned("vista", 3, ranks=2)


# --- which machine -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host", "environ", "name"),
    [
        ("aurora-uan-0009", {}, "aurora"),
        ("x4407c6s2b0n0.hsn.cm.aurora.alcf.anl.gov", {}, "aurora"),
        ("x3004c0s7b1n0", {}, "polaris"),
        ("polaris-login-04", {}, "polaris"),
        ("sophia-gpu-11", {}, "sophia"),
        ("crux-login-01", {}, "crux"),
        ("x1000c0s0b1n1", {}, "crux"),
        ("deg0067", {}, "derecho"),
        ("clariden-ln001", {}, "clariden"),
        ("frontier00144", {}, "frontier"),
        ("login07", {"LMOD_SYSTEM_NAME": "frontier"}, "frontier"),
        ("nid001234", {"NERSC_HOST": "perlmutter"}, "perlmutter"),
        ("nid001234", {}, "local"),  # other machines have such names too
        ("laptop", {"PBS_NODEFILE": "/x"}, "generic_pbs"),
        ("laptop", {"SLURM_JOB_ID": "1"}, "generic_slurm"),
        ("laptop", {}, "local"),
    ],
)
def test_a_machine_is_known_by_its_host(host, environ, name):
    assert machine.load(hostname=host, environ=environ).name == name


def test_a_users_own_machine_and_one_in_place_of_a_shipped_one(tmp_path):
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "tern.yaml").write_text(
        "scheduler: slurm\nlauncher: srun\ndetect: {hosts: [tern*]}\n"
        "node: {devices: 2, cpus: 16, cpus_per_rank: 8}\nvariables: {NCCL_SOCKET_IFNAME: ib0}\n"
    )
    (tmp_path / "machine" / "polaris.yaml").write_text("scheduler: pbs\nnode: {devices: 3}\n")
    own = machine.load(config_dir=tmp_path, hostname="tern17", environ={})
    assert (own.name, own.node.devices) == ("tern", 2)
    assert own.variables["NCCL_SOCKET_IFNAME"].value == "ib0"
    assert machine.load("polaris", config_dir=tmp_path).node.devices == 3
    assert "aurora" in machine.available(tmp_path)
    only_models = tmp_path / "machine"  # a folder with other groups than machine
    assert machine.load("polaris", config_dir=only_models).node.devices == 4
    with pytest.raises(UserError, match="is no folder"):
        machine.load("tern", config_dir=tmp_path / "tern")


@pytest.mark.parametrize(
    ("override", "check"),
    [
        ("machine.queue=prod", lambda m: m.queue == "prod"),
        ("machine.node.cpus_per_rank=16", lambda m: m.node.cpus_per_rank == 16),
        ("machine.device.order=[0,1,2,3]", lambda m: m.device.order == (0, 1, 2, 3)),
        ("machine.device.variable=null", lambda m: m.device.variable is None),
        ("machine.options.mpiexec=[--no-vni]", lambda m: m.options.mpiexec == ("--no-vni",)),
        ("machine.variables.NCCL_NET=Socket", lambda m: m.variables["NCCL_NET"].value == "Socket"),
        ("machine.variables.A=a b $c", lambda m: m.variables["A"].value == "a b $c"),
        ("machine.variables.NCCL_NET.when=always", lambda m: "NCCL_NET" in m.active_variables(1)),
        ("machine.queues.mine.limits=[]", lambda m: m.queues["mine"].limits == ()),
    ],
)
def test_a_value_is_overridden(override, check):
    assert check(machine.load("polaris", [override]))


def test_a_value_that_the_user_gave_is_said_to_be_his():
    plan = planned("polaris", 2, "machine.variables.NCCL_NET=Socket")
    why = {v.name: v.why for v in plan.variables}
    assert why["NCCL_NET"] == "user: machine.variables.NCCL_NET"
    assert why["NCCL_CROSS_NIC"].startswith("machine file polaris")
    plan = planned("polaris", 2, "machine.variables.NCCL_NET_GDR_LEVEL=SYS")
    why = {v.name: v.why for v in plan.variables}
    assert why["NCCL_NET_GDR_LEVEL"] == "user: machine.variables.NCCL_NET_GDR_LEVEL"
    assert why["NCCL_NET"].startswith("machine file polaris")  # whose name is the other's beginning
    plan = planned("polaris", 2, "machine.variables.NCCL_NET.value=Socket")
    assert {v.name: v.why for v in plan.variables}["NCCL_NET"].startswith("user: ")


@pytest.mark.parametrize("text", ["022", "12.10", "12:30", "0x10", "1_000", "1e3", "on", "true", ""])
def test_a_text_is_what_was_typed(text, tmp_path):
    """YAML reads 18, 12.1, 750, 16, 1000, 1000.0 and true."""
    overrides = [f"machine.variables.UMASK={text}", f"machine.submit.options=[-x,{text or 'y'}]"]
    known = machine.load("generic_pbs", overrides)
    assert known.variables["UMASK"].value == text
    assert known.submit.options == ("-x", text or "y")


def test_a_text_in_a_file_is_what_was_written_and_a_number_is_a_number(tmp_path):
    (tmp_path / "machine").mkdir()
    lines = (
        "scheduler: pbs\nqueue: 0123\nvariables: {UMASK: 022, LONG: {value: 12:30}}\nnode: {ranks: 0x10}\n"
    )
    (tmp_path / "machine/mine.yaml").write_text(lines)
    known = machine.load("mine", config_dir=tmp_path)
    assert known.queue == "0123"
    assert [variable.value for variable in known.variables.values()] == ["022", "12:30"]
    assert known.node.ranks == 16
    assert machine.load("mine", ["machine.queue="], config_dir=tmp_path).queue is None
    assert machine.load("mine", ["machine.node.ranks=1_6"], config_dir=tmp_path).node.ranks == 16


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("machine.quue=x", r"machine\.quue is not a key .*Did you mean queue\?"),
        ("machine.node.device=4", r"machine\.node\.device is not a key .*Did you mean devices\?"),
        ("machine.node.devices=four", r"machine\.node\.devices=four \(polaris\) .*whole number"),
        ("machine.node.devices=-1", "give a whole number >= 0, or null"),
        ("machine.node.devices=true", "a whole number"),
        ("machine.switches.nccl=maybe", "true or false"),
        ("machine.switches.ncl=false", "Did you mean nccl"),
        (
            "machine.submit.chunk='ncpus={cpu}'",
            r"submit\.chunk=ncpus=\{cpu\} .* with \{ranks\} and \{cpus\}",
        ),
        ("machine.submit.chunk='{0}'", r"submit\.chunk=\{0\} \(polaris\) is not valid"),
        ("machine.submit.chunk='{'", r"submit\.chunk=\{ \(polaris\) is not valid"),
        ("machine.submit.chunk='{ranks.x}'", r"submit\.chunk=\{ranks\.x\} \(polaris\) is not valid"),
        ("machine.submit.resources=['ncpus={cpu}']", r"submit\.resources=ncpus=\{cpu\} \(polaris\)"),
        ("machine.device.order=3", "a list"),
        ("machine.device.order=[0,2]", "each of 0 to 1 once"),
        ("machine.options.mpirun=[-x]", r"machine\.options\.mpirun is not a key"),
        ("machine.launcher=sruun", r"Did you mean srun\?"),
        ("machine.node.bind=list", "needs node.cpu_list"),
        ("machine.variables.X.when=always", r"machine\.variables\.X\.value is missing"),
        ("machine.variables.NCCL_NET.switch=y", "has no switch"),
        ("machine.variables.NCCL_NET.when=never", "give one of always, one_node"),
        ("machine.node=4", "keys and values"),
        ("queue=prod", "write machine.key=value"),
        ("machine.queue", "write machine.key=value"),
        ("machine.queue=[", "cannot be read as YAML"),
        ("machine.name=foo", r"machine\.name=foo \(polaris\) .*--machine NAME"),
        ("machine.overridden=[queue]", r"machine\.overridden .*leave it out"),
        ("machine.node.cpu_list=['0..3','4..7']", r"node\.cpu_list=.* give CPUs like '0-7'"),
        ("machine.node.cpu_list=['7-0']", "give CPUs like '0-7'"),
        ("machine.node.cpu_list=['0-3,']", "give CPUs like '0-7'"),
        ("machine.node.cpu_list=['0-99999999999']", "give CPUs like '0-7'"),
    ],
)
def test_a_bad_override_is_refused_with_key_and_remedy(override, message):
    with pytest.raises(UserError, match=message):
        machine.load("polaris", [override])


def test_an_unknown_machine_is_refused_with_the_nearest_name():
    with pytest.raises(UserError, match=r"machine=polarys is not known: .*Did you mean polaris\?"):
        machine.load("polarys")


@pytest.mark.parametrize("text", [b"scheduler: [pbs\n", b"- a\n", b"", b"scheduler: pbs\nabout: caf\xe9\n"])
def test_a_file_that_is_no_machine_is_refused(tmp_path, text):
    (tmp_path / "machine").mkdir()
    (tmp_path / "machine" / "x.yaml").write_bytes(text)
    with pytest.raises(UserError):
        machine.load("x", config_dir=tmp_path)


# --- queues --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "queue", "nodes", "hours"),
    [
        ("polaris", "debug", 2, 1), ("polaris", "prod", 24, 3), ("polaris", "prod", 100, 24),
        ("aurora", "prod", 10624, 24), ("frontier", "batch", 184, 12), ("sophia", "by-gpu", 4, 24),
        ("perlmutter", "regular", 1536, 48), ("polaris", "R1234", 400, 300),
    ],
)  # fmt: skip
def test_jobs_that_fit_their_queue(name, queue, nodes, hours):
    machine.check_queue(machine.load(name), queue, nodes, hours)


@pytest.mark.parametrize(
    ("name", "queue", "nodes", "hours", "message"),
    [
        ("polaris", "debug", 3, 1, "takes 1 to 2: .*These take 3: debug-scaling"),
        ("polaris", "prod", 24, 3.5, "3.5 h is too long for 24 nodes"),
        ("aurora", "prod", 255, 1, "takes 256 to 1024"),
        ("frontier", "batch", 91, 6, "may run 2 h"),
        ("sophia", "by-gpu", 3, 1, "nodes=3 does not fit"),
    ],
)
def test_jobs_that_do_not_fit(name, queue, nodes, hours, message):
    with pytest.raises(UserError, match=message):
        machine.check_queue(machine.load(name), queue, nodes, hours)


def test_where_two_limits_fit_the_more_generous_one_holds():
    both = "machine.queues.mine.limits=[{max_nodes: 4, max_hours: 1}, {max_nodes: 8MORE}]"
    unlimited = machine.load("polaris", [both.replace("MORE", "")])
    machine.check_queue(unlimited, "mine", 2, 30)
    limited = machine.load("polaris", [both.replace("MORE", ", max_hours: 3")])
    machine.check_queue(limited, "mine", 2, 3)
    with pytest.raises(UserError, match=r"30 h is too long for 2 nodes .* may run 3 h"):
        machine.check_queue(limited, "mine", 2, 30)


def test_a_walltime_that_is_too_short_is_refused():
    with pytest.raises(UserError, match=r"walltime=4 min is too short for polaris, .* at least 5 min"):
        machine.check_queue(machine.load("polaris"), "debug", 1, 4 / 60)
    machine.check_queue(machine.load("polaris"), "debug", 1, 5 / 60)


def test_a_chain_that_the_queue_refuses_is_refused_with_the_queue_that_takes_it():
    polaris = machine.load("polaris")
    machine.check_queue(polaris, "debug-scaling", 2, 1, jobs=1)
    with pytest.raises(
        UserError, match=r"--chain 3 does not fit queue debug-scaling .* 1 job of a user"
    ) as told:
        machine.check_queue(polaris, "debug-scaling", 2, 1, jobs=3)
    assert "These take 3 jobs: debug, preemptable, demand." in str(told.value)
    with pytest.raises(UserError, match=r"A sweep of 12 cells does not fit queue debug-scaling"):
        machine.check_queue(polaris, "debug-scaling", 2, 1, jobs=12, is_sweep=True)


@pytest.mark.parametrize("name", CENTRES)
def test_the_limits_of_a_queue_leave_no_number_of_nodes_to_two_rules(name):
    for queue in machine.load(name).queues.values():
        ends = [(limit.min_nodes, limit.max_nodes or math.inf) for limit in queue.limits]
        assert all(low <= high for low, high in ends)
        assert all(before[1] < after[0] for before, after in itertools.pairwise(ends))
