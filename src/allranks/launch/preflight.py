"""Before the training, in the allocation: is every host fit for it? Seconds, and never a hang.

The launcher starts this module once per rank, as it will start the training. Every rank connects to
rank 0, where the training's ranks will meet too, and reports; rank 0 judges, and what is wrong
comes out with the hosts concerned and a remedy. Each rank exchanges a fixed number of small
messages with rank 0: traffic is linear in the ranks. Messages are JSON and need the run's secret.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import platform
import secrets
import selectors
import socket
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from allranks.errors import EXIT_USER_ERROR, UserError
from allranks.launch import rank as ranks
from allranks.launch import supervise, wire

LIMIT_S = 60.0
VERDICT_S = 2.0  # of the limit, for rank 0 to judge and be heard
LATE_S = 5.0  # for a shared file system to show a new file
PACKAGES = ("torch", "numpy", "hydra-core", "mpi4py", "ezpz")


# --- before the launch: on the supervisor's side ------------------------------------------------


def check(
    argv_for: Callable[[Sequence[str]], Sequence[str]],
    env: Mapping[str, str],
    *,
    world_size: int,
    hosts: Sequence[str] = (),
    config: Any = None,
    run_dir: str | Path | None = None,
    limit_s: float = LIMIT_S,
) -> str:
    """Runs the checks on every rank; returns one line to show. Raises UserError with what is wrong.

    `argv_for` gives the launcher's command line for a program, as it will be for the training.
    `config` is an allranks.config.Config: without one, nothing is asked about data and device.
    """
    start = time.monotonic()
    token = Path(run_dir).absolute() / f".preflight-{secrets.token_hex(8)}" if run_dir else None
    task = {
        **_needs(config),
        "token": str(token) if token else None,
        "limit_s": max(limit_s - 2 * VERDICT_S, limit_s / 2),
    }
    heard = _Heard()
    try:
        if token:
            token.touch()
        outcome = supervise.Supervision(heard, world_size, hosts, start_s=limit_s, limit_s=limit_s).run(
            argv_for([sys.executable, "-m", "allranks.launch.preflight", json.dumps(task)]),
            {**env, ranks.PREFLIGHT: secrets.token_hex(32)},
            None,
        )
    except OSError as error:
        raise UserError(
            f"run.dir={run_dir} cannot be written ({error.strerror}): give another run.dir."
        ) from error
    finally:
        if token:
            token.unlink(missing_ok=True)
    verdict = heard.verdict()
    if verdict is None:
        said = b"".join(heard.lines).decode(errors="replace")
        reason = outcome.failure or f"rank 0 gave no verdict (exit code {outcome.code})."
        raise UserError(f"preflight: {reason}\n{said}".rstrip())
    if verdict["problems"]:
        named = [_with_hosts(problem, outcome.hosts) for problem in verdict["problems"]]
        raise UserError("preflight: " + "\npreflight: ".join(named))
    count = len(set(outcome.hosts))
    return (
        f"preflight: {world_size} rank{'s' * (world_size > 1)} on {count} host{'s' * (count > 1)} "
        f"are fit ({time.monotonic() - start:.1f} s)"
    )


def _needs(config: Any) -> dict[str, Any]:
    """What the configuration needs on the hosts."""
    if config is None:
        return {"data": None, "device": None}
    part = config.data.get("train") or {}
    is_ours = part.get("_target_") == "allranks.data.mnist.load"
    data = {key: part.get(key) for key in ("name", "root", "fetch")} if is_ours else None
    return {"data": data, "device": config.device}


def _with_hosts(problem: Mapping[str, Any], hosts: Sequence[str]) -> str:
    """The problem as a line; ranks that never spoke are known to the supervisor by their hosts."""
    where = problem["hosts"] or [hosts[r] if r < len(hosts) else f"rank {r}" for r in problem["ranks"]]
    where = list(dict.fromkeys(where))
    shown = ", ".join(where[:8]) + (f", ... ({len(where)} hosts)" if len(where) > 8 else "")
    return f"{shown}: {problem['text']}"


class _Heard(supervise.Console):
    """Instead of the user's console: rank 0's verdict, and what else was said."""

    def __init__(self) -> None:
        super().__init__()
        self.out = b""
        self.lines: list[bytes] = []

    def raw(self, kind: bytes, data: bytes) -> None:
        if kind == wire.STDOUT:
            self.out += data
        else:
            self.lines.append(data)

    def line(self, line: bytes) -> None:
        self.lines.append(line)

    def flush(self, force: bool = False) -> float | None:
        return None

    def terminals(self) -> str:
        return ""

    def verdict(self) -> dict[str, Any] | None:
        for line in reversed(self.out.splitlines()):
            if line.startswith(b'{"problems"'):
                return wire.parse(line)
        return None


# --- in the allocation: on every rank -----------------------------------------------------------


def main() -> int:
    task = json.loads(sys.argv[1])
    deadline = time.monotonic() + task["limit_s"]
    environ = os.environ
    me, size = int(environ["RANK"]), int(environ["WORLD_SIZE"])
    place = (environ[ranks.MASTER_ADDR], int(environ[ranks.MASTER_PORT]))
    secret = environ[ranks.PREFLIGHT]
    if me == 0:
        try:
            problems = _rank_0(task, environ, Hub(place, size, secret), deadline)
        except UserError as error:
            problems = [_entry(str(error), [socket.gethostname()])]
        print(json.dumps({"problems": problems}), flush=True)
        code = EXIT_USER_ERROR if problems else 0
    else:
        code = report(
            place, me, size, secret=secret, deadline=deadline,
            look=lambda: examine(task, environ), add_by_mpi=lambda: mpi_problem(environ, deadline),
        )  # fmt: skip
    sys.stdout.flush()
    os._exit(code)  # a thread may still hang in MPI or in a file system


def _rank_0(
    task: Mapping[str, Any], environ: Mapping[str, str], hub: Hub, deadline: float
) -> list[dict[str, Any]]:
    mine = _in_time(lambda: examine(task, environ), deadline - VERDICT_S)
    mine = mine or {"host": socket.gethostname(), "problems": [_STUCK]}
    return judge_all(hub, mine, deadline, lambda: mpi_problem(environ, deadline))


_STUCK = (
    "its checks did not come to an end: look whether a file system or a device there hangs, and "
    "take the "
    "host out of the job if so."
)


def examine(task: Mapping[str, Any], environ: Mapping[str, str]) -> dict[str, Any]:
    """What this rank finds; what is the whole host's is looked at by its first rank only."""
    found: dict[str, Any] = {"host": socket.gethostname(), "problems": [], "facts": {}}
    tasks: list[Callable[[], str]] = [lambda: _device_problem(task["device"])]
    if environ["LOCAL_RANK"] == "0":
        found["facts"] = facts()
        tasks += [lambda: _run_dir_problem(task["token"]), lambda: _data_problem(task["data"])]
    found["problems"] = [problem for look in tasks if (problem := look())]
    return found


def facts() -> dict[str, str]:
    """What must be the same on every host."""
    from importlib import metadata

    found = {"python": platform.python_version(), "allranks' code": _code_digest()}
    for package in PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def _code_digest() -> str:
    root = Path(__file__).resolve().parents[1]
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _device_problem(device: str | None) -> str:
    """A GPU that is asked for by name must be there and must add; auto and cpu ask for nothing."""
    if device not in ("cuda", "xpu"):
        return ""
    import torch

    backend = getattr(torch, device, None)
    if backend is None or not backend.is_available() or backend.device_count() == 0:
        return (
            f"device={device}: torch {torch.__version__} sees none there. Load the machine's "
            f"driver and a "
            "torch built for it, ask the scheduler for GPUs, or take device=cpu."
        )
    index = int(os.environ["LOCAL_RANK"]) % backend.device_count()
    try:
        total = float(torch.ones(1024, device=f"{device}:{index}").sum())
    except RuntimeError as error:
        return f"{device}:{index} does not work ({error}): take the host out of the job."
    return "" if total == 1024 else f"{device}:{index} adds 1,024 ones to {total:g}: a bad GPU."


def _run_dir_problem(token: str | None) -> str:
    if token is None:
        return ""
    path, until = Path(token), time.monotonic() + LATE_S
    while not path.exists():
        if time.monotonic() > until:
            return (
                f"run directory {path.parent} is not the one that `allranks launch` sees: give a "
                f"run.dir on a "
                "file system that all hosts share."
            )
        time.sleep(0.1)
    if not os.access(path.parent, os.W_OK | os.X_OK):
        return f"run directory {path.parent} is not writable there: give another run.dir."
    return ""


def _data_problem(data: Mapping[str, Any] | None) -> str:
    if data is None:
        return ""
    from allranks.data import mnist

    root = Path(data["root"])
    if data["fetch"] and not list(root.glob("*/raw/*ubyte*")):
        return ""  # rank 0 will fetch it
    try:
        mnist.verify(data["name"], data["root"])
    except UserError as error:
        return str(error)
    return ""


def mpi_problem(environ: Mapping[str, str], deadline: float) -> str:
    """A real sum over MPI, where an MPI launcher started the ranks; empty where it is right."""
    from allranks.runtime import environment

    launch = environment.discover(environ)
    if not launch.is_mpi or launch.alone:
        return ""

    def add() -> str:
        from array import array

        from allranks.runtime import mpi

        try:
            comm = mpi.world(launch)
        except UserError as error:
            return str(error)
        values = array("d", [comm.rank, 1.0])
        total = array("d", [0.0, 0.0])
        comm.Allreduce(values, total)
        expected = [comm.size * (comm.size - 1) / 2, float(comm.size)]
        return "" if list(total) == expected else f"MPI adds up {list(total)}, not {expected}: {_FABRIC}"

    answer = _in_time(add, deadline - VERDICT_S)
    return f"an all-reduce over MPI does not come to an end: {_FABRIC}" if answer is None else answer


_FABRIC = (
    "the ranks reach each other by TCP, so look at the fabric's variables and at the MPI module, "
    "or take "
    "the host out of the job."
)


def _in_time(work: Callable[[], Any], deadline: float) -> Any:
    """What `work` returns or raises; None where it has not come to an end by then."""
    done: list[Any] = []

    def run() -> None:
        try:
            done.append((work(), None))
        except Exception as error:  # noqa: BLE001  handed to the caller
            done.append((None, error))

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(max(0.0, deadline - time.monotonic()))
    if not done:
        return None
    value, error = done[0]
    if error is not None:
        raise error
    return value


# --- the ranks talk -----------------------------------------------------------------------------


def vector(rank: int) -> list[float]:
    """A rank's part of the sum that every rank checks."""
    return [1.0, float(rank), float(rank * rank)]


def expected_sum(size: int) -> list[float]:
    return [float(size), size * (size - 1) / 2, (size - 1) * size * (2 * size - 1) / 6]


@dataclass
class _Member:
    frames: wire.Frames = field(default_factory=wire.Frames)
    rank: int | None = None
    host: str = ""


class Hub:
    """Rank 0's side: listens at the master address, hears each rank, answers each."""

    def __init__(self, place: tuple[str, int], size: int, secret: str) -> None:
        """Raises UserError where the master address is not this host's."""
        supervise.raise_file_limit()
        self.size, self.secret = size, secret
        self.traffic: Counter[str] = Counter()  # messages and bytes, in and out
        self._members: dict[socket.socket, _Member] = {}
        self._heard: dict[str, dict[int, dict[str, Any]]] = {}
        try:
            self._listener = socket.create_server(place, backlog=4096)
        except OSError as error:
            raise UserError(
                f"rank 0 on {socket.gethostname()} cannot listen at {place[0]}:{place[1]} "
                f"({error.strerror}): "
                f"set {ranks.MASTER_ADDR} to an address of that host."
            ) from error
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)

    def gather(self, step: str, deadline: float) -> dict[int, dict[str, Any]]:
        """What the ranks 1.. say in this step; ranks that say nothing in time are missing."""
        heard = self._heard.setdefault(step, {})
        while len(heard) < self.size - 1 and (left := deadline - time.monotonic()) > 0:
            for key, _ in self._selector.select(min(left, 1.0)):
                link = key.fileobj
                assert isinstance(link, socket.socket)
                if link is self._listener:
                    member, _ = link.accept()
                    member.settimeout(10)
                    self._members[member] = _Member()
                    self._selector.register(member, selectors.EVENT_READ)
                else:
                    self._hear(link)
        return heard

    def answer(self, **values: Any) -> None:
        word = wire.message(**values)
        for link, member in self._members.items():
            if member.rank is not None:
                try:
                    link.sendall(word)
                    self.traffic.update(messages_out=1, bytes_out=len(word))
                except OSError:
                    continue  # it is missing in the next step, and named there

    def close(self) -> None:
        for link in (self._listener, *self._members):
            link.close()
        self._selector.close()

    def _hear(self, link: socket.socket) -> None:
        member = self._members[link]
        try:
            data = link.recv(65536)
            if not data:
                raise EOFError
            self.traffic["bytes_in"] += len(data)
            for _, payload in member.frames.feed(data):
                word = wire.parse(payload)
                self.traffic["messages_in"] += 1
                if member.rank is None:
                    if not hmac.compare_digest(str(word.get("secret")), self.secret):
                        raise wire.WireError("a wrong secret")
                    member.rank, member.host = int(word["rank"]), str(word["host"])
                self._heard.setdefault(word["step"], {})[member.rank] = word
        except (OSError, EOFError, wire.WireError):
            self._selector.unregister(link)
            link.close()
            del self._members[link]


def judge_all(
    hub: Hub, mine: Mapping[str, Any], deadline: float, add_by_mpi: Callable[[], str]
) -> list[dict[str, Any]]:
    """Rank 0: hears all, lets them add up; returns what is wrong, by hosts or ranks."""
    everybody = set(range(1, hub.size))
    came = hub.gather("hello", deadline - VERDICT_S)
    reports = hub.gather("report", deadline - VERDICT_S) if came else {}
    said = {0: dict(mine), **reports}
    problems = judge(said)
    silent = sorted(everybody - set(came))
    if silent:
        problems.append(
            {
                "hosts": [],
                "ranks": silent,
                "text": f"no connection to rank 0 on {mine['host']}: look whether the network "
                f"between them works, "
                f"set {ranks.MASTER_ADDR} to an address on it, or take the host out of the job.",
            }
        )
    stuck = sorted(set(came) - set(reports))
    if stuck:
        problems.append(_entry(_STUCK, [came[r]["host"] for r in stuck]))
    vectors = [vector(0), *(word["vector"] for word in reports.values())]
    total = [sum(column) for column in zip(*vectors, strict=True)]
    # who is not well would hang the others in MPI
    hub.answer(sum=total if not problems else None)
    if not problems:
        own = add_by_mpi()
        added = hub.gather("added", deadline)
        found = {r: word["problem"] for r, word in added.items()} | {0: own}
        said_by: dict[str, list[str]] = {}
        for r in sorted(everybody | {0}):
            problem = found.get(r, _STUCK)
            if problem:
                said_by.setdefault(problem, []).append(said[r]["host"])
        problems = [_entry(text, hosts) for text, hosts in said_by.items()]
    hub.answer(bye=True)
    hub.close()
    return problems


def judge(reports: Mapping[int, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """The ranks' own problems, and hosts whose software is not that of most hosts."""
    by_text: dict[str, list[str]] = {}
    for r in sorted(reports):
        for text in reports[r]["problems"]:
            by_text.setdefault(text, []).append(reports[r]["host"])
    known = [word for r, word in sorted(reports.items()) if word.get("facts")]
    for name in known[0]["facts"] if known else ():
        values = [word["facts"].get(name) for word in known]
        usual = max(dict.fromkeys(values), key=values.count)
        for word, value in zip(known, values, strict=True):
            if value != usual:
                text = (
                    f"{name} is {value} there, but {usual} elsewhere: start every host from the "
                    f"same "
                    "environment and the same copy of the code."
                )
                by_text.setdefault(text, []).append(word["host"])
    return [_entry(text, hosts) for text, hosts in by_text.items()]


def report(
    place: tuple[str, int], rank: int, size: int, *, secret: str, deadline: float,
    look: Callable[[], Mapping[str, Any]], add_by_mpi: Callable[[], str],
) -> int:  # fmt: skip
    """Ranks 1..: say hello, look around, add up. Returns 0, or 2 where rank 0 is not reached."""
    frames = wire.Frames()
    try:
        with wire.connect(*place, deadline) as link:
            link.sendall(wire.message(step="hello", secret=secret, rank=rank, host=socket.gethostname()))
            link.sendall(wire.message(step="report", vector=vector(rank), **look()))
            total = wire.receive(link, frames, deadline)["sum"]
            if total is None:
                return 0  # rank 0 tells what is wrong, and must not be ended before it has
            problem = add_by_mpi()
            if total != expected_sum(size):
                problem = f"the ranks add up to {total}, not {expected_sum(size)}: {_FABRIC}"
            link.sendall(wire.message(step="added", problem=problem))
            wire.receive(link, frames, deadline)
            return 0
    except (OSError, EOFError):
        return EXIT_USER_ERROR  # rank 0 names whom it does not hear


def _entry(text: str, hosts: Sequence[str]) -> dict[str, Any]:
    return {"hosts": list(dict.fromkeys(hosts)), "ranks": [], "text": text}


if __name__ == "__main__":
    sys.exit(main())
