"""The preflight: is every host of the job fit for the training? It takes seconds, and cannot hang.

The launcher starts this module once for each rank, as it will start the training. Each rank prints what it
finds, and the supervisor reads that as it reads all output. Then the ranks add up numbers, to see whether
they reach each other: each sends one message to rank 0, at the address where the training's ranks will
meet, and gets one back. The supervisor ends a rank that hangs, and knows it by what it has not printed.
"""

from __future__ import annotations

import sys

# `python -m` puts the present directory first. A file there, such as the user's random.py, is not Python's.
if __name__ == "__main__" and not (sys.flags.isolated or getattr(sys.flags, "safe_path", False)):
    del sys.path[0]

import contextlib
import hashlib
import json
import os
import platform
import secrets
import selectors
import signal
import socket
import time
from array import array
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from allranks.base import files, links
from allranks.base.agreement import majority
from allranks.base.errors import EXIT_TIMED_OUT, EXIT_USER_ERROR, UserError
from allranks.base.text import some
from allranks.job import variables
from allranks.job.identity import discover
from allranks.launch.console import Console
from allranks.launch.outcome import Rank, planned_hosts
from allranks.run import directory as rundir

if TYPE_CHECKING:
    from allranks.config import Config

LIMIT_S = 60.0  # how long the checks may take, once every rank has come
START_S = 40.0  # how long all ranks may take to say who they are, with 10 ms more for each host
CONNECT_S = 10.0  # how long a rank tries to reach rank 0, which may start a little later than the others
TICK_S = 0.5  # how often rank 0 looks whether somebody has connected and says nothing
LATE_S = 5.0  # how long a shared file system may take to show a new file

STUCK = (
    "its checks did not come to an end: look whether a file system or a device there hangs, and take the "
    "host out of the job if so."
)
NETWORK = (
    f"look whether the network between them works, set {variables.MASTER_ADDR} to an address of rank 0's "
    "host on it, or take the host out of the job."
)
FABRIC = (
    "the ranks reach each other by TCP, so look at the fabric's variables and at the MPI module, or take "
    "the host out of the job."
)
# For the way in which the ranks could not add up numbers, what the user can do.
REMEDY_OF = {"TCP": NETWORK, "MPI": FABRIC}


# --- before the launch: on the supervisor's side ------------------------------------------------


class HostsUnreached(UserError):
    """No rank came from the hosts `gone`; `said` is what the launcher has written."""

    def __init__(self, message: str, gone: Sequence[str], said: str) -> None:
        super().__init__(message)
        self.gone = gone
        self.said = said


class HostsUnfit(UserError):
    """Something is wrong on the hosts `hosts`, and nothing was found wrong on the others."""

    def __init__(self, message: str, hosts: Sequence[str]) -> None:
        super().__init__(message)
        self.hosts = hosts


class Stopped(UserError):
    """A signal has ended the preflight, before the training had begun."""

    def __init__(self, message: str, code: int) -> None:
        super().__init__(f"preflight: {message}")
        self.code = code


def check(
    argv_for: Callable[[Sequence[str]], Sequence[str]],
    env: Mapping[str, str],
    *,
    world_size: int,
    hosts: Sequence[str] = (),
    config: Config | None = None,
    run_dir: str | Path | None = None,
    start_s: float | None = None,
    limit_s: float = LIMIT_S,
) -> str:
    """Runs the checks on every rank; returns one line to show. Raises UserError with what is wrong.

    `argv_for` gives the launcher's command line for a program, as it will be for the training. `hosts` are
    the planned hosts of rank 0, 1, ..., by the names that HostsUnfit and HostsUnreached have. Without a
    `config` nothing is asked about data and device. `start_s` is how long the ranks may take to come, None
    for the default, and `limit_s` how long their checks may take then.
    """
    # Imported here: the ranks, which run this module too, do not need it.
    from allranks.launch import supervisor

    start = time.monotonic()
    token = Path(run_dir).absolute() / f".preflight-{secrets.token_hex(8)}" if run_dir else None
    task = json.dumps({**_data_and_device(config), "token": str(token) if token else None})
    heard = Heard()
    try:
        if token:
            with rundir.writing(str(run_dir)):
                token.touch()
        if start_s is None:
            start_s = min(limit_s, START_S + len(set(hosts)) / 100)
        supervision = supervisor.Supervision(
            world_size,
            hosts,
            supervisor.Limits(start_s=start_s, run_s=limit_s),
            heard.console,
            on_output=heard.hear,
            passes_on=False,
        )
        outcome = supervision.run(
            argv_for([sys.executable, "-m", "allranks.launch.preflight", task]), env, None
        )
    finally:
        if token:
            # The directory may have become read-only, and its file system may hang.
            with contextlib.suppress(OSError):
                files.within(LATE_S, token.unlink)
    if outcome.stopped:
        raise Stopped(outcome.failure or "stopped", outcome.code or 128 + signal.SIGTERM)
    found = complaints(heard.words(), outcome.hosts, outcome.code == EXIT_TIMED_OUT)
    if found:
        text = "\n".join(f"preflight: {problem}" for problem in lines(found))
        planned = planned_hosts(hosts, outcome.hosts)
        bad = {planned.get(complaint.rank) for complaint in found}
        # A host that the plan does not know cannot be replaced, and if all are bad, the fault is not a
        # host's.
        if None in bad or len(bad) == len(set(hosts)):
            raise UserError(text)
        raise HostsUnfit(text, [host for host in dict.fromkeys(hosts) if host in bad])
    if outcome.code:
        said = heard.said.decode(errors="replace").rstrip()
        text = f"preflight: {outcome.failure}\n{said}".rstrip()
        raise HostsUnreached(text, outcome.gone, said) if outcome.gone else UserError(text)
    count = len(set(outcome.hosts.values()))
    return f"preflight: {_are_fit(world_size, count)} ({time.monotonic() - start:.1f} s)"


def _are_fit(ranks: int, hosts: int) -> str:
    """`1 rank on 1 host is fit`, `8 ranks on 2 hosts are fit`."""
    of_ranks = "1 rank" if ranks == 1 else f"{ranks} ranks"
    of_hosts = "1 host" if hosts == 1 else f"{hosts} hosts"
    return f"{of_ranks} on {of_hosts} {'is' if ranks == 1 else 'are'} fit"


def _data_and_device(config: Config | None) -> dict[str, Any]:
    """What the ranks look at by the configuration: the place of MNIST's files, and the kind of device.

    The data are None unless the training reads MNIST (or Fashion-MNIST): allranks does not
    know which files other data consist of.
    """
    if config is None:
        return {"data": None, "device": None}
    part = config.data.get("train") or {}
    is_ours = part.get("_target_") == "allranks.data.mnist.load"
    data = {key: part.get(key) for key in ("name", "root", "fetch")} if is_ours else None
    return {"data": data, "device": config.device}


class Heard:
    """What the ranks have found, and what else was said: kept instead of shown on the user's console."""

    def __init__(self) -> None:
        self.said = b""  # what the launcher has written, and the ranks to stderr
        self.console = Console(self._keep)
        self._out: dict[int, bytes] = {}  # what each rank has written to stdout

    def hear(self, r: Rank, kind: str, data: bytes) -> None:
        """Takes in what a rank has written to stdout (`kind` is "out") or stderr ("err")."""
        if kind == "out":
            self._out[r.rank] = self._out.get(r.rank, b"") + data
        else:
            self.console.show(r.rank, r.host, kind, data)

    def _keep(self, fd: int, data: bytes) -> None:
        self.said += data

    def words(self) -> dict[int, dict[str, Any]]:
        """What each rank has said about itself, by rank."""
        words: dict[int, dict[str, Any]] = {}
        for rank, out in self._out.items():
            for line in out.splitlines():
                if not line.startswith(b'{"'):
                    continue
                try:
                    values = links.parse(line)
                except links.WireError:  # a library has printed a line that only begins like one of ours
                    continue
                words.setdefault(rank, {}).update(values)
        return words


class Complaint(NamedTuple):
    """Something that a rank has found wrong on its host, or that is wrong with the rank itself."""

    rank: int
    host: str  # as it calls itself
    text: str


def complaints(
    words: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str], timed_out: bool
) -> list[Complaint]:
    """What is wrong, and on which hosts.

    `words` is what each rank has said, by rank, and `hosts` where each rank is. `timed_out` says that not
    all ranks have ended in time.
    """
    found = _problems_that_ranks_found(words, hosts)
    found += _facts_that_differ(words, hosts)
    if timed_out:
        found += _ranks_that_hang(words, hosts)
    if not found:  # whatever else is wrong may well be why the ranks do not come together
        found = _sums_that_failed(words, hosts, timed_out)
    return found


def _problems_that_ranks_found(
    words: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]
) -> list[Complaint]:
    """What the ranks themselves have found wrong on their hosts."""
    found = []
    for rank in sorted(words):
        for text in words[rank].get("problems", ()):
            found.append(Complaint(rank, hosts[rank], text))
    return found


def _facts_that_differ(words: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> list[Complaint]:
    """Hosts whose versions or code are not those of most hosts. One rank of each host tells its facts."""
    tellers = [rank for rank in sorted(words) if words[rank].get("facts")]
    if not tellers:
        return []
    found = []
    for name in words[tellers[0]]["facts"]:
        values = [words[rank]["facts"][name] for rank in tellers]
        usual, odd = majority(values)
        for position in odd:
            text = (
                f"{name} is {values[position]} there, but {usual} elsewhere: start every host from the "
                "same environment and the same copy of the code."
            )
            rank = tellers[position]
            found.append(Complaint(rank, hosts[rank], text))
    return found


def _ranks_that_hang(words: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str]) -> list[Complaint]:
    """Ranks that have not even said what they found: their own checks have not come to an end."""
    silent = [rank for rank in sorted(hosts) if "problems" not in words.get(rank, ())]
    return [Complaint(rank, hosts[rank], STUCK) for rank in silent]


def _sums_that_failed(
    words: Mapping[int, Mapping[str, Any]], hosts: Mapping[int, str], timed_out: bool
) -> list[Complaint]:
    """Ranks that could not add up numbers with the others, or were still at it when the time was over."""
    found = []
    for rank in sorted(hosts):
        said = words.get(rank, {})
        if said.get("added"):
            found.append(Complaint(rank, hosts[rank], said["added"]))
        elif "added" not in said and timed_out:
            how = "MPI" if said.get("reached") else "TCP"
            text = f"the sum of all ranks by {how} does not come to an end: {REMEDY_OF[how]}"
            found.append(Complaint(rank, hosts[rank], text))
    return found


def lines(found: Sequence[Complaint]) -> list[str]:
    """A line for each problem, which begins with all hosts that have it."""
    hosts_of: dict[str, list[str]] = {}
    for complaint in found:
        hosts_here = hosts_of.setdefault(complaint.text, [])
        if complaint.host not in hosts_here:
            hosts_here.append(complaint.host)
    return [f"{some(where)}: {text}" for text, where in hosts_of.items()]


# --- in the allocation: on every rank -----------------------------------------------------------


def main() -> int:
    """Runs the checks on one rank and prints what it finds, as JSON; returns its exit code."""
    task = json.loads(sys.argv[1])
    environ = os.environ
    rank = int(environ["RANK"])
    size = int(environ["WORLD_SIZE"])
    place = (environ[variables.MASTER_ADDR], int(environ[variables.MASTER_PORT]))
    try:
        listener = None
        if rank == 0 and size > 1:  # before its own checks: the other ranks may come earlier
            listener = links.listen(*place, connections=size)
        is_first_here = environ["LOCAL_RANK"] == "0"
        _tell(problems=problems(task, environ), facts=facts() if is_first_here else None)
        if size > 1:
            add_by_tcp(rank, size, place, listener, environ[variables.RANKS_SECRET])
            _tell(reached=True)  # if this rank hangs from here on, it hangs in MPI
            add_by_mpi(environ)
    except UserError as error:
        _tell(added=str(error))
        return EXIT_USER_ERROR
    _tell(added="")
    return 0


def _tell(**values: Any) -> None:
    """Tells the supervisor these values, as a line of JSON on stdout.

    It begins with a line feed: a library may have printed a line without one at its end.
    """
    print(f"\n{json.dumps(values)}", flush=True)


def problems(task: Mapping[str, Any], environ: Mapping[str, str]) -> list[str]:
    """What this rank finds wrong. Only the first rank of a host looks at what concerns the whole host."""
    found = [device_problem(task["device"], environ)]
    if environ["LOCAL_RANK"] == "0":
        found += [_run_dir_problem(task["token"]), _data_problem(task["data"])]
    return [problem for problem in found if problem]


def facts() -> dict[str, str]:
    """What must be the same on every host."""
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    versions = {name: version or "absent" for name, version in rundir.versions().items()}
    return {"python": platform.python_version(), "allranks' code": digest.hexdigest()[:12], **versions}


def device_problem(device: str | None, environ: Mapping[str, str]) -> str:
    """What is wrong with this rank's GPU, where one is asked for by name; empty if nothing is.

    The GPU must be there, and must add numbers correctly. device=auto and device=cpu ask for no GPU.
    """
    if device not in ("cuda", "xpu"):
        return ""
    import torch

    from allranks.runtime.bringup import is_available

    if not is_available(device):
        return (
            f"device={device}: torch {torch.__version__} sees none there. Load the machine's driver and a "
            "torch built for it, ask the scheduler for GPUs, or take device=cpu."
        )
    index = int(environ["LOCAL_RANK"]) % getattr(torch, device).device_count()
    try:
        total = float(torch.ones(1024, device=f"{device}:{index}").sum())
    except RuntimeError as error:
        return f"{device}:{index} does not work ({error}): take the host out of the job."
    return "" if total == 1024 else f"{device}:{index} adds 1,024 ones to {total:g}: a bad GPU."


def _run_dir_problem(token: str | None) -> str:
    """What is wrong with the run directory, in which `allranks launch` has made the file `token`."""
    if token is None:
        return ""
    path = Path(token)
    until = time.monotonic() + LATE_S
    while not path.exists():
        if time.monotonic() > until:
            return (
                f"run directory {path.parent} is not the one that `allranks launch` sees: give a run.dir "
                "on a file system that all hosts share."
            )
        time.sleep(0.1)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"run directory {path.parent} is not writable there: give another run.dir."
    return ""


def _data_problem(data: Mapping[str, Any] | None) -> str:
    """What is wrong with this host's copy of MNIST, if the training reads one."""
    if data is None:
        return ""
    is_there = any(Path(data["root"]).glob("*/raw/*ubyte*"))
    if data["fetch"] and not is_there:
        return ""  # rank 0 will fetch it
    from allranks.data import mnist

    try:
        mnist.verify(data["name"], data["root"])
    except UserError as error:
        return str(error)
    return ""


# --- the ranks add up: each rank's part, and a sum that every rank checks -----------------------


def part(rank: int) -> list[float]:
    """The three numbers that a rank brings to the sum: with fewer, mistakes could cancel each other.

    The ones add up to the number of ranks: one that is missing changes it. The ranks themselves add up to
    another number where one is counted twice in place of another. If two are counted wrongly, as 2 and 2
    in place of 1 and 3, only the squares add up to another number.
    """
    return [1.0, float(rank), float(rank * rank)]


def check_sum(total: Sequence[float], size: int, how: str) -> None:
    """Raises UserError unless `total` is the sum of the parts of `size` ranks.

    `how` says by what the ranks have added: `TCP` or `MPI`.
    """
    expected = [float(size), size * (size - 1) / 2, (size - 1) * size * (2 * size - 1) / 6]
    if list(total) != expected:
        raise UserError(f"the ranks add up to {list(total)} by {how}, not {expected}: {REMEDY_OF[how]}")


def add_by_tcp(
    rank: int, size: int, place: tuple[str, int], listener: socket.socket | None, secret: str
) -> None:
    """Adds up the ranks' parts through rank 0, which has the `listener`, and checks the sum on each rank.

    Raises UserError if the sum is not right, or if rank 0 cannot be reached.
    """
    if listener is not None:
        total = _add_up_on_rank_0(size, listener, secret)
    else:
        try:
            rank_0 = links.connect(*place, CONNECT_S)
            with contextlib.closing(rank_0):
                rank_0.send(secret=secret, rank=rank, part=part(rank))
                answer = rank_0.next_message().get("sum")
                if not isinstance(answer, list):
                    raise links.WireError("a message without a sum")
                total = answer
        except links.WireError as error:
            raise UserError(
                f"not rank 0 but another program answers at {place[0]}:{place[1]} ({error}): {NETWORK}"
            ) from error
        except (OSError, EOFError) as error:
            reason = getattr(error, "strerror", None) or error or "the connection was closed"
            raise UserError(
                f"no connection to rank 0 at {place[0]}:{place[1]} ({reason}): {NETWORK}"
            ) from error
    check_sum(total, size, "TCP")


def _add_up_on_rank_0(size: int, listener: socket.socket, secret: str) -> list[float]:
    """The sum of all ranks' parts: collects them, and sends the sum to every rank."""
    parts: dict[int, list[float]] = {0: part(0)}
    others: list[links.Connection] = []

    def welcome(other: links.Connection, hello: dict[str, Any]) -> None:
        match hello:
            case {"rank": int(rank), "part": list(numbers)}:
                parts[rank] = numbers
                others.append(other)
            case _:  # not what a rank sends, though it came with the secret of this start
                other.close()

    with selectors.DefaultSelector() as selector:
        door = links.Door(listener, secret, selector, welcome, expected=size)
        while len(parts) < size:
            for key, _ in selector.select(TICK_S):
                key.data()
            door.tidy_up()
        door.close()

    total = [sum(column) for column in zip(*parts.values(), strict=True)]
    for other in others:
        other.try_to_send(sum=total)  # where a rank has ended meanwhile, the supervisor names it
        other.close()
    return total


def add_by_mpi(environ: Mapping[str, str]) -> None:
    """Adds up the ranks' parts by MPI, where an MPI launcher started the ranks, and checks the sum."""
    identity = discover(environ)
    if not identity.is_mpi:
        return
    from allranks.runtime import mpi

    comm = mpi.world(identity)
    total = array("d", part(comm.rank))
    comm.Allreduce(array("d", part(comm.rank)), total)
    check_sum(total, comm.size, "MPI")


if __name__ == "__main__":
    sys.exit(main())
