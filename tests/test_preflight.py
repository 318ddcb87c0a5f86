"""The preflight finds the bad host and names it, in time, with little traffic."""

from __future__ import annotations

import os
import secrets
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from allranks import config as configs
from allranks.errors import UserError
from allranks.launch import preflight, rank, wire
from launching import CLEAN, by_hand, can_make_hosts, launcher

HOST = socket.gethostname()
HOSTS = ["alpha", "beta", "gamma"]
needs_hosts = pytest.mark.skipif(
    shutil.which("unshare") is None or not can_make_hosts(),
    reason="needs the right to make namespaces with host names of their own (root)",
)


def config(**data) -> configs.Config:
    (one,) = configs.from_command_line([f"data.{key}={value}" for key, value in data.items()])
    return one


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    """A data set of the right shape, all zeros."""
    root = tmp_path_factory.mktemp("data")
    raw = root / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for stem, count in (("train", 60_000), ("t10k", 10_000)):
        shape = (count, 28, 28)
        for kind, sizes in (("images-idx3", shape), ("labels-idx1", shape[:1])):
            head = struct.pack(f">{1 + len(sizes)}i", 0x800 + len(sizes), *sizes)
            (raw / f"{stem}-{kind}-ubyte").write_bytes(head + bytes(int(np.prod(sizes))))
    return root


def on_hosts(setup=(), env=None, **more) -> str:
    """The preflight on three hosts, one rank each; `setup` makes one of them bad."""
    return preflight.check(
        lambda program: by_hand(HOSTS, program, setup),
        {**CLEAN, **(env or {})},
        world_size=3,
        **more,
    )


@pytest.mark.parametrize("name", ["mpiexec", "torchrun"])
def test_ranks_that_are_fit(name, tmp_path, data_root):
    before = time.monotonic()
    line = preflight.check(
        lambda program: launcher(name, 3, program), CLEAN, world_size=3,
        config=config(root=data_root, fetch="false"), run_dir=tmp_path,
    )  # fmt: skip
    assert line.startswith("preflight: 3 ranks on 1 host are fit (")
    assert list(tmp_path.iterdir()) == []
    assert time.monotonic() - before < 20


@needs_hosts
def test_hosts_that_are_fit(tmp_path, data_root):
    line = on_hosts(config=config(root=data_root, fetch="false"), run_dir=tmp_path)
    assert line.startswith("preflight: 3 ranks on 3 hosts are fit")


@needs_hosts
def test_the_host_without_the_data_is_named(data_root):
    hide = f'[ $1 != beta ] || mount -t tmpfs none "{data_root}"'
    with pytest.raises(UserError) as error:
        on_hosts([hide], config=config(root=data_root, fetch="false"))
    assert str(error.value).startswith(f"preflight: beta: {data_root}/MNIST/raw/train-images")
    assert "is missing" in str(error.value)
    assert "allranks data fetch mnist" in str(error.value)


@needs_hosts
def test_the_host_that_does_not_share_the_run_directory_is_named(tmp_path):
    hide = f'[ $1 != gamma ] || mount -t tmpfs none "{tmp_path}"'
    with pytest.raises(UserError) as error:
        on_hosts([hide], run_dir=tmp_path)
    assert str(error.value) == (
        f"preflight: gamma: run directory {tmp_path} is not the one that `allranks launch` sees: "
        f"give a "
        "run.dir on a file system that all hosts share."
    )


@needs_hosts
def test_the_host_with_another_copy_of_the_code_is_named(tmp_path):
    source = Path(preflight.__file__).parents[1]
    shutil.copytree(source, tmp_path / "allranks")
    with (tmp_path / "allranks" / "engine.py").open("a") as file:
        file.write("# changed\n")
    other = f'[ $1 != alpha ] || export PYTHONPATH="{tmp_path}"'
    with pytest.raises(UserError) as error:
        on_hosts([other], env={"PYTHONPATH": str(source.parent)})
    # rank 0's own host is the odd one: the majority is right
    assert str(error.value).startswith("preflight: alpha: allranks' code is ")


@needs_hosts
def test_the_host_whose_file_system_hangs_is_named_in_time(tmp_path, data_root):
    fifo = tmp_path / "MNIST" / "raw"  # reading a pipe that nobody writes never returns
    fifo.mkdir(parents=True)
    os.mkfifo(fifo / "train-images-idx3-ubyte")
    hang = f'[ $1 != beta ] || mount --bind "{tmp_path}" "{data_root}"'
    before = time.monotonic()
    with pytest.raises(UserError) as error:
        on_hosts([hang], config=config(root=data_root, fetch="false"), limit_s=8)
    assert time.monotonic() - before < 11
    assert str(error.value).startswith("preflight: beta: its checks did not come to an end")


@needs_hosts
def test_the_host_that_never_answers_is_named_in_time():
    before = time.monotonic()
    with pytest.raises(UserError) as error:
        preflight.check(
            lambda program: by_hand(HOSTS, program, ["[ $1 != gamma ] || exec sleep 60"]),
            CLEAN, world_size=3, limit_s=3,
        )  # fmt: skip
    assert time.monotonic() - before < 8
    assert "1 of 3 ranks (2) did not start within 3 s" in str(error.value)


@pytest.mark.parametrize("name", ["mpiexec"])
def test_a_master_address_that_is_not_rank_0s_is_named(name):
    with pytest.raises(UserError) as error:
        preflight.check(
            lambda program: launcher(name, 2, program),
            {**CLEAN, rank.MASTER_ADDR: "192.0.2.1"}, world_size=2, limit_s=10,
        )  # fmt: skip
    assert f"rank 0 on {HOST} cannot listen at 192.0.2.1" in str(error.value)
    assert rank.MASTER_ADDR in str(error.value)


def test_a_gpu_that_is_asked_for_and_is_not_there():
    code = (
        "import os; os.environ.update(LOCAL_RANK='0', CUDA_VISIBLE_DEVICES='')\n"
        "from allranks.launch import preflight; print(preflight._device_problem('cuda'))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=CLEAN, check=True
    )
    assert "device=cuda: torch" in done.stdout
    assert "device=cpu" in done.stdout


def test_mpi_that_sees_other_ranks_than_the_launcher_started():
    """Without the launcher's own variables MPI is alone: the sum would be of one rank."""
    code = (
        "import os, time\n"
        "from allranks.launch import preflight\n"
        "print(preflight.mpi_problem({'OMPI_COMM_WORLD_RANK': '1', 'OMPI_COMM_WORLD_SIZE': '4'}, "
        "time.monotonic() + 20))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=CLEAN, check=True
    )
    assert "The launcher and mpi4py use different MPIs" in done.stdout


# --- the protocol, with real sockets ------------------------------------------------------------


def exchange(size: int, mute: frozenset[int] = frozenset(), limit_s: float = 30):
    """All ranks of a preflight on loopback, a thread each: problems, traffic, exit codes."""
    secret, codes = secrets.token_hex(32), {}
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place = probe.getsockname()[:2]
    deadline = time.monotonic() + limit_s

    def found(r):
        return {"host": f"n{r // 12}", "problems": [], "facts": {}}

    def member(r):
        codes[r] = preflight.report(
            place, r, size, secret=secret, deadline=deadline,
            look=lambda: found(r), add_by_mpi=lambda: "",
        )  # fmt: skip

    hub = preflight.Hub(place, size, secret)
    threads = [threading.Thread(target=member, args=(r,)) for r in range(1, size) if r not in mute]
    for thread in threads:
        thread.start()
    problems = preflight.judge_all(hub, found(0), deadline, lambda: "")
    for thread in threads:
        thread.join()
    return problems, dict(hub.traffic), codes


def test_traffic_is_linear_at_256_ranks():
    traffic = {}
    for size in (64, 256):
        problems, traffic[size], codes = exchange(size)
        assert problems == []
        assert codes == dict.fromkeys(range(1, size), 0)
        assert traffic[size]["messages_in"] == 3 * (size - 1)
        assert traffic[size]["messages_out"] == 2 * (size - 1)
        assert traffic[size]["bytes_in"] / (size - 1) < 400
        assert traffic[size]["bytes_out"] / (size - 1) < 100
    # but for the digits of larger numbers, four times the ranks are four times the bytes
    for way in ("bytes_in", "bytes_out"):
        assert traffic[256][way] / 255 < 1.1 * traffic[64][way] / 63


def test_ranks_that_do_not_come_are_named_by_their_numbers():
    problems, _, _ = exchange(6, mute=frozenset({2, 5}), limit_s=3)
    (problem,) = problems
    assert problem["ranks"] == [2, 5]
    assert "no connection to rank 0 on n0" in problem["text"]


def test_the_sum_is_checked_by_every_rank():
    assert preflight.expected_sum(7) == [
        sum(column) for column in zip(*map(preflight.vector, range(7)), strict=True)
    ]
    # a rank 0 that sends a wrong sum
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def wrong():
            link, _ = listener.accept()
            frames = wire.Frames()
            assert wire.receive(link, frames)["secret"] == "s"
            assert wire.receive(link, frames)["vector"] == preflight.vector(1)
            link.sendall(wire.message(sum=[2.0, 1.0, 2.0]))
            said.append(wire.receive(link, frames)["problem"])
            link.sendall(wire.message(bye=True))
            link.close()

        said: list[str] = []
        thread = threading.Thread(target=wrong)
        thread.start()
        preflight.report(
            listener.getsockname()[:2], 1, 2, secret="s", deadline=time.monotonic() + 10,
            look=lambda: {"host": "n0", "problems": []}, add_by_mpi=lambda: "",
        )  # fmt: skip
        thread.join()
    assert said[0].startswith("the ranks add up to [2.0, 1.0, 2.0], not [2.0, 1.0, 1.0]")


def test_nobody_without_the_secret_is_counted():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place = probe.getsockname()[:2]
    hub = preflight.Hub(place, 2, "right")
    try:
        for data in (
            wire.message(step="hello", secret="wrong", rank=1, host="x"),
            b"GET / HTTP/1.1\r\n\r\n",
            wire.frame(wire.MESSAGE, b"[1, 2]"),
            wire.frame(wire.MESSAGE, b"\x80\x04."),  # a pickle
        ):
            link = socket.create_connection(place)
            link.sendall(data)
            assert hub.gather("hello", time.monotonic() + 0.3) == {}
            assert link.recv(10) == b""
            link.close()
    finally:
        hub.close()


def test_software_that_differs_is_the_minoritys():
    def word(host, torch):
        return {"host": host, "problems": [], "facts": {"torch": torch, "python": "3.11.7"}}

    reports = {0: word("a", "2.4"), 1: word("b", "2.5"), 2: word("c", "2.5"), 3: word("d", "2.5")}
    (problem,) = preflight.judge(reports)
    assert problem["hosts"] == ["a"]
    assert problem["text"].startswith("torch is 2.4 there, but 2.5 elsewhere")
    assert preflight.judge({r: word("x", "2.5") for r in range(3)}) == []
