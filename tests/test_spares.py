"""Spares: hosts of the allocation that take the place of others, under real launchers on several "hosts".

A host is a name in a namespace of its own, with an address that the name leads to. mpiexec reaches it by a
script, as it reaches others by ssh. A host is down while there is a file `down-HOST`, and does not see the
folder `run` while there is one called `blind-HOST`.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from allranks.base.errors import UserError
from allranks.job import machine
from allranks.job.hosts import Allocation, Host
from allranks.launch import dryrun
from allranks.launch.attempts import HostRecord, placed_anew, replacements
from allranks.launch.outcome import Evidence, Loss, Outcome, Rank, host_to_blame
from allranks.launch.plan import Plan, Request, make_plan
from allranks.submit import script
from allranks.submit.order import Order
from helpers import PYTHON, ROOT, SMALL, Done, Run, execute, only_long, serial
from launching import can_make_hosts


def hosts(text: str) -> tuple[Host, ...]:
    """The hosts of a text such as `n1:4 n2:2`."""
    return tuple(Host(name, int(slots)) for name, slots in (word.split(":") for word in text.split()))


# --- which host takes whose place ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bad", "spares", "expected"),
    [
        (["n2"], "n4:4 n5:4", {"n2": "n4"}),  # the first one
        (["n1", "n3"], "n4:4 n5:4", {"n1": "n4", "n3": "n5"}),
        (["n1", "n3"], "n4:4", {"n1": "n4"}),  # there is but one
        (["n1"], "n4:2 n5:4", {"n1": "n5"}),  # the first has no room for four ranks
        (["n3"], "n4:2 n5:4", {"n3": "n4"}),  # for two it has
        (["n1"], "", {}),
    ],
)
def test_the_first_spare_that_has_room_takes_the_place(bad, spares, expected):
    assert replacements(hosts("n1:4 n2:4 n3:2"), bad, hosts(spares)) == expected


@pytest.mark.parametrize(
    ("replaced", "dropped", "expected"),
    [
        ({"n1": "n4"}, [], "n2:4 n3:4 n4:2"),  # the last host still has the fewest ranks
        ({}, ["n2"], "n1:4 n3:2"),
        ({"n3": "n4"}, ["n1"], "n2:4 n4:2"),
        ({}, [], "n1:4 n2:4 n3:2"),
    ],
)
def test_hosts_stand_in_the_allocations_order_and_the_last_one_has_the_fewest_ranks(
    replaced, dropped, expected
):
    order = ["n1", "n2", "n3", "n4"]
    placed = placed_anew(lambda _: 4, order, hosts("n1:4 n2:4 n3:2"), replaced, dropped)
    assert placed == hosts(expected)


def test_a_host_keeps_its_number_of_ranks_where_another_has_no_room_for_them():
    room = {"n1": 4, "n2": 2, "n3": 4}
    placed = placed_anew(room.get, ["n1", "n2", "n3"], hosts("n1:4 n2:2"), {"n1": "n3"}, [])
    assert placed == hosts("n2:2 n3:4")


def plan_of(count: int, machine_name: str = "generic_slurm", **request: object) -> Plan:
    """A plan for a program in a job of so many nodes with two ranks each."""
    names = tuple(Host(f"n{number}", 2) for number in range(1, count + 1))
    asked = Request(("true",), installed_here=False, **request)  # type: ignore[arg-type]
    return make_plan(asked, machine.load(machine_name), Allocation("slurm", "7", names), {})


def test_spares_are_the_last_nodes_and_all_that_the_ranks_do_not_need():
    assert [host.name for host in plan_of(4, spares=1).hosts] == ["n1", "n2", "n3"]
    assert [host.name for host in plan_of(4, spares=1).spares] == ["n4"]
    of_three = plan_of(4, nodes=3, spares=1)
    assert [host.name for host in of_three.hosts] == ["n1", "n2"]
    assert [host.name for host in of_three.spares] == ["n3", "n4"]
    spread = plan_of(4, nodes=4, spares=1, ranks=6)
    assert spread.hosts == hosts("n1:2 n2:2 n3:2")
    assert [host.name for host in plan_of(4, ranks=4).spares] == ["n3", "n4"]
    assert plan_of(4).spares == ()


@pytest.mark.parametrize(
    ("request_of", "said"),
    [
        ({"spares": 4}, "--spares 4 leaves no host for the ranks (this host: 4 hosts with 8 slots, n[1-4])"
         ": give at most --spares 3"),
        ({"spares": 1, "nodes": 1}, "give no --spares"),
        ({"spares": 1, "nodes": 3, "ppn": 2, "ranks": 6}, "-n 6 contradicts --nodes 3 --spares 1 --ppn 2"),
    ],
)  # fmt: skip
def test_spares_that_cannot_be_had(request_of, said):
    with pytest.raises(UserError) as refused:
        plan_of(4, **request_of)
    assert said in str(refused.value)


def test_a_dry_run_names_the_spares():
    plan = plan_of(4, spares=2)
    assert "spares: n[3-4]; one of them takes the place of a host that is gone" in dryrun.text(
        plan, "a job"
    )
    assert json.loads(dryrun.as_json(plan, "a job"))["spares"] == ["n3", "n4"]
    assert "spares" not in dryrun.text(plan_of(4), "a job")


def test_a_job_asks_for_all_nodes_and_its_launch_keeps_some_aside():
    order = Order("generic_slurm", nodes=3, ranks=4, max_restarts=1, spares=1, idle=600)
    text = script.render(order, machine.load("generic_slurm"), "/run", ("true",), environ={})
    assert "#SBATCH --nodes=3" in text and "#SBATCH --ntasks-per-node=2" in text
    assert "#SBATCH --no-kill" in text  # of the whole job, when a node is lost
    assert "--nodes 3 -n 4 --job-nodes 3 --max-restarts 1 --spares 1 --idle 600 --run" in text


# --- which host is to blame ------------------------------------------------------------------------------


def ended(*codes: int, **more: object) -> Evidence:
    """A launch whose ranks, one on each host, have ended one after another with these codes."""
    ranks = [
        Rank(number, f"n{number + 1}", code, ended_at=float(number)) for number, code in enumerate(codes)
    ]
    known = {
        "world_size": len(codes), "ranks": ranks, "launcher": "mpiexec", "launcher_code": 1,
        "launcher_was_killed": False, "had_started": True, "stopped_by": 0, "signal_is_for_us": False,
        "problem": None, "nobody_reads": False,
    }  # fmt: skip
    return Evidence(**{**known, **more})


def test_the_first_host_to_fail_is_to_blame_unless_all_have_failed_alike():
    assert host_to_blame(ended(0, 1, 143)) == "n2"
    assert host_to_blame(ended(1, 1, 1)) == ""  # the program's own error
    assert host_to_blame(ended(0, 0, 85)) == ""
    assert host_to_blame(ended(0, 1, 143, stopped_by=15)) == ""
    lost = ended(0, 137)
    lost.ranks[1].loss = Loss.CUT
    assert host_to_blame(lost) == "n2"


def test_a_host_is_left_out_after_its_second_failure():
    record, plan = HostRecord(), plan_of(3)
    seen = []
    for host in ("n2", "", "n3", "n2.site.org", "n2"):
        seen.append(record.note_failure(plan, Outcome(1, "", {}, failed_host=host)))
    assert seen == [[], [], [], ["n2"], ["n2"]]
    assert record.failures == Counter(n2=3, n3=1)


def test_a_host_that_calls_itself_otherwise_is_known_by_the_numbers_of_its_ranks():
    record, plan = HostRecord(), plan_of(2)  # ranks 0 and 1 on n1, 2 and 3 on n2
    names = {0: "login", 1: "login", 2: "gpu", 3: "gpu"}
    assert record.note_failure(plan, Outcome(1, "", names, failed_host="gpu")) == []
    assert record.note_failure(plan, Outcome(1, "", names, failed_host="gpu")) == ["n2"]
    # Both hosts have one name: nobody knows which of them it was.
    record.note_failure(plan, Outcome(1, "", dict.fromkeys(range(4), "box"), failed_host="box"))
    assert record.failures == Counter(n2=2)


# --- real launchers --------------------------------------------------------------------------------------

# A network that is this process's alone: the host on which `allranks launch` runs, and a network namespace
# with an address for each other host. $1 is a folder, the other words are the hosts.
CLUSTER = """
folder=$1; shift
mkdir -p /run/netns && mount -t tmpfs tmpfs /run/netns
ip link set lo up
ip link add name switch type bridge
ip addr add 10.9.0.100/24 dev switch
ip link set switch up
printf '127.0.0.1 localhost\\n10.9.0.100 login\\n' > "$folder/etc-hosts"
while [ "$1" != -- ]; do
  address=10.9.0.${1#n}
  echo "$address $1" >> "$folder/etc-hosts"
  ip netns add "$1"
  ip link add name "to-$1" master switch up type veth peer name eth0 netns "$1"
  ip -n "$1" addr add "$address/24" dev eth0
  ip -n "$1" link set eth0 up
  ip -n "$1" link set lo up
  shift
done
shift
mount --bind "$folder/etc-hosts" /etc/hosts
hostname login
exec "$@"
"""
# As ssh is called: [-x] HOST COMMAND...
REACH = """#!/bin/sh
[ "$1" = -x ] && shift
host=$1; shift
[ -e "{folder}/down-$host" ] && exit 255
[ -e "{folder}/blind-$host" ] && blind='mount -t tmpfs tmpfs {folder}/run;'
inside="$blind"'hostname "$1"; shift; exec sh -c "$*"'
exec nsenter --net=/run/netns/$host unshare --uts --mount sh -c "$inside" sh $host "$@"
"""
NAMES = ("n1", "n2", "n3", "n4")
LIMIT_S = 100  # for one launch, which takes a few seconds


@pytest.fixture
def on_hosts(tmp_path):
    """Runs `allranks launch` in a job of four hosts, with one rank on each that is used."""
    if os.geteuid() != 0 or not can_make_hosts():
        pytest.skip("needs root, for namespaces")
    if subprocess.run(["which", "ip"], capture_output=True, check=False).returncode:
        pytest.skip("needs ip, for addresses")
    (tmp_path / "reach").write_text(REACH.format(folder=tmp_path))
    (tmp_path / "reach").chmod(0o755)
    (tmp_path / "hosts").write_text("".join(f"{name} slots=1\n" for name in NAMES))

    def on_hosts(*words: str) -> Done:
        options = f"machine.options.mpiexec=[-launcher,ssh,-launcher-exec,{tmp_path}/reach]"
        around = ["unshare", "--uts", "--mount", "--net", "sh", "-c", CLUSTER, "sh", str(tmp_path), *NAMES]
        launch = [PYTHON, "-m", "allranks", "launch", "--hosts", "hosts", options]
        here = {"PYTHONPATH": f"{ROOT}/src"}
        return execute([*around, "--", *launch, *words], tmp_path, here, timeout_s=LIMIT_S)

    return on_hosts


# Writes down where it runs. At its first start on a host of `harm` it harms that host, and the other ranks
# wait until they are ended.
PROGRAM = """
import os, pathlib, signal, socket, time
host, rank = socket.gethostname(), os.environ["RANK"]
with open("starts", "a") as file:
    file.write(f"{rank} {host}\\n")
goes_on = pathlib.Path("goes-on")
if not goes_on.exists():
    HARM
    time.sleep(60)
"""
# The host goes down: nothing is started there any more, and what runs there has gone without a word.
DIES = """
    if host == "n2":
        while open("starts").read().count("\\n") < 2:  # the other rank has begun, too
            time.sleep(0.01)
        goes_on.touch()
        pathlib.Path("down-n2").touch()
        os.kill(os.getppid(), signal.SIGKILL)
"""
# A bad device, say: the program fails there, and nowhere else.
FAILS = """
    if host == "n2":
        raise SystemExit(7)
    if host == "n3":
        goes_on.touch()
    while not goes_on.exists():
        time.sleep(0.01)
    raise SystemExit(0)
"""


def program(folder: Path, harm: str) -> list[str]:
    (folder / "program.py").write_text(PROGRAM.replace("    HARM\n", harm))
    return ["--no-preflight", "--", PYTHON, "program.py"]


def starts(folder: Path) -> list[str]:
    return sorted((folder / "starts").read_text().splitlines())


@serial
@pytest.mark.parametrize("launcher", ["mpiexec", only_long("torchrun")])
def test_a_spare_takes_the_place_of_a_host_that_has_died(on_hosts, tmp_path, launcher):
    words = ("--launcher", launcher, "--nodes", "3", "--max-restarts", "2", "--spares", "1")
    done = on_hosts(*words, *program(tmp_path, DIES)).ok()
    # n4 is beyond the three nodes, and n3 is kept aside: both may come in, and the first one does.
    assert "n3 takes the place of n2. restart 1 of 2." in done.err
    assert starts(tmp_path) == ["0 n1", "0 n1", "1 n2", "1 n3"]
    assert not done.left_running


@serial
def test_a_spare_that_is_down_itself_is_passed_over(on_hosts, tmp_path):
    (tmp_path / "down-n3").touch()
    words = ("--launcher", "mpiexec", "-n", "2", "--max-restarts", "1")
    done = on_hosts(*words, *program(tmp_path, DIES)).ok()
    assert "n4 takes the place of n2. restart 1 of 1." in done.err
    assert starts(tmp_path) == ["0 n1", "0 n1", "1 n2", "1 n4"]


@serial
def test_without_a_spare_that_works_the_run_shrinks(on_hosts, tmp_path):
    for name in ("n3", "n4"):
        (tmp_path / f"down-{name}").touch()
    words = ("--launcher", "mpiexec", "-n", "2", "--max-restarts", "1", "--min-ranks", "1")
    done = on_hosts(*words, *program(tmp_path, DIES)).ok()
    assert "Going on without n2. restart 1 of 1." in done.err
    assert starts(tmp_path) == ["0 n1", "0 n1", "1 n2"]


@serial
def test_a_host_that_has_failed_twice_is_left_out(on_hosts, tmp_path):
    words = ("--launcher", "mpiexec", "-n", "2", "--max-restarts", "3")
    done = on_hosts(*words, *program(tmp_path, FAILS)).ok()
    messages = [line for line in done.messages if "restart" in line]
    assert len(messages) == 2, done.err
    assert "rank 1 on n2 ended with exit code 7" in messages[0]
    assert messages[0].endswith("the others have been ended. restart 1 of 3.")
    assert messages[1].endswith("n2 has failed twice. n3 takes the place of n2. restart 2 of 3.")


@serial
@pytest.mark.long
def test_the_preflight_takes_a_spare_for_a_host_that_is_down_from_the_start(on_hosts, tmp_path):
    (tmp_path / "down-n2").touch()
    (tmp_path / "goes-on").touch()
    words = ("--launcher", "mpiexec", "-n", "3", "--spares", "1")
    (tmp_path / "program.py").write_text(PROGRAM.replace("    HARM\n", ""))
    done = on_hosts(*words, "--", PYTHON, "program.py").ok()
    assert "n2 cannot be reached. n4 takes the place of n2." in done.err
    assert starts(tmp_path) == ["0 n1", "1 n3", "2 n4"]


@serial
@pytest.mark.long
def test_the_preflight_takes_a_spare_for_a_host_that_is_not_fit(on_hosts, tmp_path):
    for name in ("run", "blind-n2", "goes-on"):
        (tmp_path / name).mkdir()
    (tmp_path / "program.py").write_text(PROGRAM.replace("    HARM\n", ""))
    words = ("--launcher", "mpiexec", "-n", "2", "--run", "run")
    program = ("--", PYTHON, "program.py")
    refused = on_hosts(*words, *program)
    assert refused.code == 2
    assert f"preflight: n2: run directory {tmp_path}/run is not the one that" in refused.message
    done = on_hosts(*words, "--max-restarts", "1", *program).ok()
    assert f"preflight: n2: run directory {tmp_path}/run is not the one that" in done.err
    assert "n2 is not fit. n3 takes the place of n2." in done.err
    assert starts(tmp_path) == ["0 n1", "1 n3"]


@serial
@pytest.mark.long
def test_a_training_goes_on_with_a_spare_to_the_bits_of_an_undisturbed_one(on_hosts, tmp_path):
    """The host of rank 1 dies after its fifth step; the number of ranks stays, and with it every bit."""
    training = [*SMALL, "trainer.epochs=2", "checkpoint.every_steps=2", "model=mlp"]
    words = ("--launcher", "mpiexec", "-n", "2", "--no-preflight")
    on_hosts(*words, *training, "run.dir=whole").ok()
    (tmp_path / "dying.py").write_text(DYING)
    done = on_hosts(
        *words,
        "--max-restarts",
        "1",
        *training,
        "run.dir=run",
        "model._target_=dying.mlp",
    ).ok()
    assert "n3 takes the place of n2. From step" in done.err
    assert Run(tmp_path / "run").losses == Run(tmp_path / "whole").losses


DYING = """
import os, pathlib, signal, socket
from allranks import models
steps = 0
def die(*_):
    global steps
    steps += 1
    if socket.gethostname() == "n2" and steps == 6:
        pathlib.Path("down-n2").touch()
        os.kill(os.getppid(), signal.SIGKILL)
def mlp(**keys):
    model = models.mlp(**keys)
    model.register_forward_pre_hook(die)
    return model
"""
