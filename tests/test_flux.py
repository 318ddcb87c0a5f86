"""Flux: the hosts of an instance, the command line of `flux run`, and launches in a real instance."""

from __future__ import annotations

import json
import shutil

import pytest

from allranks.base.errors import UserError
from allranks.job import machine
from allranks.job.hosts import Allocation, Host, find_allocation, from_flux
from allranks.launch.launchers import choose
from allranks.launch.plan import Request, make_plan
from helpers import PYTHON, execute

# As `flux resource R` of Flux 0.88 has answered on one host, and the same for two hosts with GPUs (RFC 20).
ONE = (
    '{"version": 1, "execution": {"R_lite": [{"rank": "0", "children": {"core": "0-1"}}], '
    '"starttime": 0.0, "expiration": 0.0, "nodelist": ["vm"]}}\n'
)
TWO = json.dumps(
    {
        "version": 1,
        "execution": {
            "R_lite": [
                {"rank": "0,2", "children": {"core": "0-95", "gpu": "0-3"}},
                {"rank": "1", "children": {"core": "0-7,16-23"}},
            ],
            "nodelist": ["tuolumne[1001-1002]", "big"],
        },
    }
)


def test_the_hosts_of_an_instance():
    assert from_flux(ONE).hosts == (Host("vm", 2),)
    found = from_flux(TWO)
    assert found.hosts == (Host("tuolumne1001", 4), Host("tuolumne1002", 16), Host("big", 4))
    assert found.cpus_per_node == 16
    # An instance for tests has several brokers on one host.
    assert from_flux(ONE.replace('"0"', '"0-1"').replace('["vm"]', '["vm,vm"]')).hosts == (Host("vm", 4),)


@pytest.mark.parametrize("answer", ["", "[]", '{"execution": {}}', ONE.replace('"vm"', ""), "\ufffd"])
def test_an_answer_that_is_not_understood_is_told(answer):
    with pytest.raises(UserError, match=r"not understood|Flux names 0 hosts"):
        from_flux(answer)


def test_an_instance_whose_command_is_not_there(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match="flux is not found"):
        find_allocation({"FLUX_URI": "local:///run/flux/local"})


@pytest.mark.parametrize(
    ("ranks", "hosts", "words"),
    [
        (6, None, "flux run -N 3 -n 6 -c 1 -o exit-timeout=none"),
        (4, 2, "flux run -N 2 -n 4 -c 1 --requires=hosts:n[1-2] -o exit-timeout=none"),
    ],
)
def test_the_command_line(ranks, hosts, words):
    allocation = Allocation("flux", None, tuple(Host(f"n{number}", 2) for number in (1, 2, 3)), False)
    request = Request(("true",), ranks, hosts, launcher="flux", installed_here=False)
    plan = make_plan(request, machine.load("local"), allocation, {})
    assert " ".join(plan.argv).startswith(words + " ")
    assert choose("auto", machine.load("local"), allocation, False) in ("flux", "torchrun")
    with pytest.raises(UserError, match="flux run starts the same number of ranks on every node"):
        uneven = Request(("true",), 5, 3, launcher="flux", installed_here=False)
        make_plan(uneven, machine.load("local"), allocation, {})


def test_flux_run_needs_an_instance():
    with pytest.raises(UserError, match="--launcher flux needs an instance of Flux"):
        choose("flux", machine.load("local"), Allocation("local", None, (Host("a", 1),)), False)


@pytest.mark.skipif(shutil.which("flux") is None, reason="Flux is not installed")
@pytest.mark.parametrize(
    ("program", "code", "said"),
    [
        ("echo rank $RANK of $WORLD_SIZE", 0, "rank 1 of 2"),
        ("sleep 1; [ $RANK = 0 ] || exit 7; sleep 60", 7, "ended with exit code 7, the first of 2 ranks"),
        ("[ $RANK = 0 ] || kill -9 $$; sleep 60", 137, "was killed by SIGKILL"),
    ],
)
def test_a_real_instance(tmp_path, program, code, said):
    launch = [PYTHON, "-m", "allranks", "launch", "-n", "2", "--", "sh", "-c", program]
    done = execute(["flux", "start", "--test-size=1", *launch], tmp_path)
    assert said in done.out + done.err
    assert done.code == code
