"""The preflight finds the bad host and names it, in time, with little traffic."""

from __future__ import annotations

import os
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from allranks import config as configs
from allranks.base import links
from allranks.base.errors import UserError
from allranks.compose import from_command_line
from allranks.job import variables
from allranks.launch import preflight
from allranks.launch.outcome import Rank
from helpers import clean_environment, guarded, only_long, serial, took_at_most
from launching import by_hand, can_make_hosts

pytestmark = serial  # mounts, and limits of a few seconds
HOST = socket.gethostname()
HOSTS = ["alpha", "beta", "gamma"]
needs_hosts = pytest.mark.skipif(
    shutil.which("unshare") is None or not can_make_hosts(),
    reason="needs the right to make namespaces with host names of their own (root)",
)


def config(**data) -> configs.Config:
    (one,) = from_command_line(
        ["data=fashion_mnist", *(f"data.{key}={value}" for key, value in data.items())]
    )
    return one


@pytest.fixture(scope="module")
def data_root(tmp_path_factory) -> Path:
    """Fashion-MNIST of the right shape, all zeros (of unpacked MNIST the published sums are known)."""
    root = tmp_path_factory.mktemp("data")
    raw = root / "FashionMNIST" / "raw"
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
        clean_environment(**(env or {})),
        world_size=3,
        **more,
    )


@pytest.mark.parametrize("name", ["mpiexec", only_long("torchrun")])
def test_ranks_that_are_fit(name, tmp_path, data_root):
    began = time.monotonic()
    line = preflight.check(
        lambda program: guarded(name, 3, program), clean_environment(), world_size=3,
        config=config(root=data_root, fetch="false"), run_dir=tmp_path,
    )  # fmt: skip
    assert line.startswith("preflight: 3 ranks on 1 host are fit (")
    assert list(tmp_path.iterdir()) == []
    assert took_at_most(time.monotonic() - began, 20)


@needs_hosts
def test_hosts_that_are_fit(tmp_path, data_root):
    line = on_hosts(config=config(root=data_root, fetch="false"), run_dir=tmp_path)
    assert line.startswith("preflight: 3 ranks on 3 hosts are fit")


@needs_hosts
def test_the_host_without_the_data_is_named(data_root):
    hide = f'[ $1 != beta ] || mount -t tmpfs none "{data_root}"'
    with pytest.raises(UserError) as error:
        on_hosts([hide], config=config(root=data_root, fetch="false"))
    assert str(error.value).startswith(f"preflight: beta: {data_root}/FashionMNIST/raw/train-images")
    assert "is missing" in str(error.value)
    assert "allranks data fetch fashion_mnist" in str(error.value)


@needs_hosts
def test_an_unfit_host_is_named_as_the_list_of_hosts_has_it(data_root):
    hide = f'[ $1 != beta ] || mount -t tmpfs none "{data_root}"'
    listed = ["localhost", "127.0.0.1", "::1"]  # none of them is what a host calls itself
    with pytest.raises(preflight.HostsUnfit, match="preflight: beta: ") as error:
        on_hosts([hide], config=config(root=data_root, fetch="false"), hosts=listed)
    assert error.value.hosts == ["127.0.0.1"]


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
    fifo = tmp_path / "FashionMNIST" / "raw"  # reading a pipe that nobody writes never returns
    fifo.mkdir(parents=True)
    os.mkfifo(fifo / "train-images-idx3-ubyte")
    hang = f'[ $1 != beta ] || mount --bind "{tmp_path}" "{data_root}"'
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        on_hosts([hang], config=config(root=data_root, fetch="false"), limit_s=8)
    assert took_at_most(time.monotonic() - began, 11)
    assert str(error.value).startswith("preflight: beta: its checks did not come to an end")


@needs_hosts
def test_the_host_that_never_answers_is_named_in_time():
    began = time.monotonic()
    with pytest.raises(UserError) as error:
        preflight.check(
            lambda program: by_hand(HOSTS, program, ["[ $1 != gamma ] || exec sleep 60"]),
            clean_environment(), world_size=3, limit_s=3,
        )  # fmt: skip
    assert took_at_most(time.monotonic() - began, 8)
    assert "1 of 3 ranks (2) did not start within 3 s" in str(error.value)


@pytest.mark.parametrize("name", ["mpiexec"])
def test_a_master_address_that_is_not_rank_0s_is_named(name):
    with pytest.raises(UserError) as error:
        preflight.check(
            lambda program: guarded(name, 2, program),
            clean_environment(**{variables.MASTER_ADDR: "192.0.2.1"}), world_size=2, limit_s=10,
        )  # fmt: skip
    assert f"rank 0 on {HOST} cannot listen at MASTER_ADDR=192.0.2.1" in str(error.value)
    assert variables.MASTER_ADDR in str(error.value)


def test_a_gpu_that_is_asked_for_and_is_not_there():
    code = (
        "import os; os.environ['CUDA_VISIBLE_DEVICES'] = ''\n"
        "from allranks.launch.preflight import device_problem\n"
        "print(device_problem('cuda', {'LOCAL_RANK': '0'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean_environment(), check=True
    )
    assert "device=cuda: torch" in done.stdout
    assert "device=cpu" in done.stdout


def test_mpi_that_sees_other_ranks_than_the_launcher_started():
    """Without the launcher's own variables MPI is alone: the sum would be of one rank."""
    code = (
        "from allranks.base.errors import UserError\n"
        "from allranks.launch import preflight\n"
        "try: preflight.add_by_mpi({'OMPI_COMM_WORLD_RANK': '1', 'OMPI_COMM_WORLD_SIZE': '4'})\n"
        "except UserError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=clean_environment(), check=True
    )
    assert "The launcher and mpi4py use different MPIs" in done.stdout


# --- the ranks add up, over real sockets --------------------------------------------------------


def add(
    size: int, strangers: tuple[bytes, ...] = (), connected: Sequence[socket.socket] = ()
) -> dict[int, str]:
    """All ranks of a preflight on loopback, a thread each; what each has to complain of."""
    said = {}

    def member(r):
        try:
            preflight.add_by_tcp(r, size, place, listener if r == 0 else None, "secret")
            said[r] = ""
        except UserError as error:
            said[r] = str(error)

    listener = links.listen("127.0.0.1")
    place = listener.getsockname()[:2]
    for one in connected:
        one.connect(place)
    for data in strangers:
        with socket.create_connection(place) as link:
            link.sendall(data)
    threads = [threading.Thread(target=member, args=(r,)) for r in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    return said


def test_traffic_is_linear_at_256_ranks(monkeypatch):
    sent: list[int] = []
    sendall = socket.socket.sendall
    monkeypatch.setattr(
        socket.socket, "sendall", lambda link, data: sent.append(len(data)) or sendall(link, data)
    )
    traffic = {}
    for size in (64, 256):
        sent.clear()
        assert add(size) == dict.fromkeys(range(size), "")
        assert len(sent) == 2 * (size - 1)  # one to rank 0, and one back
        traffic[size] = sum(sent) / (size - 1)
        assert traffic[size] < 200
    # but for the digits of larger numbers, four times the ranks are four times the bytes
    assert traffic[256] < 1.15 * traffic[64]


def test_strangers_are_not_counted():
    wrong = (
        b"GET / HTTP/1.1\r\n\r\n", b"[1, 2]\n", b"\x80\x04.\n", b"", b"[" * 99_999 + b"\n",
        b'{"secret": "\\ud800\xc3\xa9"}\n', links.message(secret="guess", rank=1, part=[9, 9, 9]),
        links.message(secret="secret", part=[1]), links.message(rank=1, part=[9, 9, 9]),
    )  # fmt: skip
    assert add(3, wrong) == {0: "", 1: "", 2: ""}


def test_a_stranger_that_says_nothing_keeps_nobody_waiting(monkeypatch):
    """Nor one that sends a byte now and then."""
    monkeypatch.setattr(links, "HELLO_S", 60.0)
    began = time.monotonic()
    with socket.socket() as silent:
        assert add(3, connected=[silent]) == {0: "", 1: "", 2: ""}
    assert time.monotonic() - began < links.HELLO_S


def test_rank_0_that_is_not_reached_is_named():
    with socket.create_server(("127.0.0.1", 0)) as probe:
        place = probe.getsockname()[:2]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(UserError) as error:
        patch.setattr(preflight, "CONNECT_S", 0.3)
        preflight.add_by_tcp(1, 2, place, None, "secret")
    assert f"no connection to rank 0 at 127.0.0.1:{place[1]} (Connection refused)" in str(error.value)


@pytest.mark.parametrize("answer", [b"HTTP/1.1 400 Bad Request\r\n\r\n", b"{}\n", b'{"sum": 3}\n'])
def test_another_program_at_the_address_of_rank_0_is_named(answer):
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def reply():
            with listener.accept()[0] as link:
                link.recv(1000)
                link.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        with pytest.raises(UserError, match=r"not rank 0 but another program answers at 127\.0\.0\.1:"):
            preflight.add_by_tcp(1, 2, listener.getsockname()[:2], None, "secret")
        thread.join()


def test_the_sum_is_checked_by_every_rank():
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def wrong():
            link = links.Connection(listener.accept()[0])
            assert link.next_message() == {"secret": "secret", "rank": 1, "part": preflight.part(1)}
            link.send(sum=[2.0, 1.0, 2.0])
            link.close()

        thread = threading.Thread(target=wrong)
        thread.start()
        with pytest.raises(UserError, match=r"add up to \[2.0, 1.0, 2.0\] by TCP, not \[2.0, 1.0, 1.0\]"):
            preflight.add_by_tcp(1, 2, listener.getsockname()[:2], None, "secret")
        thread.join()


@pytest.mark.parametrize(("how", "remedy"), [("TCP", preflight.NETWORK), ("MPI", preflight.FABRIC)])
def test_a_wrong_sum_has_the_remedy_of_what_has_added(how, remedy):
    with pytest.raises(UserError) as error:
        preflight.check_sum([2.0, 2.0, 2.0], 2, how)
    assert str(error.value).endswith(remedy)


# --- what the ranks have said -------------------------------------------------------------------


def test_what_a_library_prints_is_passed_over():
    """A line that only begins like one of ours, and the half of a line before one of ours."""
    heard = preflight.Heard()
    rank = Rank(0, "alpha")
    said = [b'{"warn: torn\n', b'{"a": \n', b"loading ...", b'\n{"problems": [], "facts": null}\n', b"ok\n"]
    for piece in said:
        heard.hear(rank, "out", piece)
    assert heard.words() == {0: {"problems": [], "facts": None}}


def test_a_rank_begins_a_line_of_its_own(capsys):
    print("loading ...", end="")
    preflight._tell(added="")
    assert capsys.readouterr().out == 'loading ...\n{"added": ""}\n'


def test_one_rank_is_fit_and_several_are():
    assert preflight._are_fit(1, 1) == "1 rank on 1 host is fit"
    assert preflight._are_fit(8, 2) == "8 ranks on 2 hosts are fit"


# --- the verdict --------------------------------------------------------------------------------


def judge(words, hosts, timed_out: bool) -> list[str]:
    """What is wrong, as the user is shown it."""
    return preflight.lines(preflight.complaints(words, hosts, timed_out))


def fine(torch="2.5", **more):
    return {"problems": [], "facts": {"torch": torch, "python": "3.11.7"}, "added": "", **more}


def test_software_that_differs_is_the_minoritys():
    hosts = dict(enumerate("abcd"))
    (problem,) = judge({0: fine("2.4"), 1: fine(), 2: fine(), 3: fine()}, hosts, False)
    assert problem.startswith("a: torch is 2.4 there, but 2.5 elsewhere")
    assert judge(dict.fromkeys(range(4), fine()), hosts, False) == []


def test_hosts_with_the_same_problem_share_a_line():
    hosts = {r: f"n{r // 2}" for r in range(6)}
    words = {r: fine(problems=["no data"] if r > 1 else []) for r in range(6)}
    assert judge(words, hosts, False) == ["n1, n2: no data"]


def test_who_hangs_is_known_by_what_it_has_not_said():
    hosts = dict(enumerate("abc"))
    without_sum = {"problems": [], "facts": fine()["facts"]}
    # b hangs in its checks: it is not the others' fault that there is no sum
    (problem,) = judge({0: without_sum, 2: without_sum}, hosts, True)
    assert problem == f"b: {preflight.STUCK}"
    (problem,) = judge({0: fine(), 1: without_sum, 2: fine()}, hosts, True)
    # nothing is known of the fabric before the ranks have reached each other
    assert problem == f"b: the sum of all ranks by TCP does not come to an end: {preflight.NETWORK}"
    (problem,) = judge({0: fine(), 1: {**without_sum, "reached": True}, 2: fine()}, hosts, True)
    assert problem == f"b: the sum of all ranks by MPI does not come to an end: {preflight.FABRIC}"
