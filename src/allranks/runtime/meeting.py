"""Where the ranks settle things before and beside the training: a small protocol on torch's TCPStore.

A store is a table of keys and texts that rank 0 serves and all ranks read and write. Each round of the
protocol is the same: every rank writes down what it has to say, rank 0 reads all of it, decides, and writes
down a reply for each rank. All texts are JSON, and the traffic is linear in the number of ranks. Nothing
else need work yet: so the ranks can agree even on why one of them cannot begin.

No wait here has a limit of its own. A rank that does not come is the watchdog's business, which knows what
each rank is doing and how long that may take.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NamedTuple

from allranks.base.agreement import majority
from allranks.base.errors import UserError
from allranks.base.links import listen
from allranks.base.text import one_line
from allranks.config import WatchdogConfig
from allranks.job import variables
from allranks.job.identity import RankIdentity
from allranks.runtime import mpi
from allranks.runtime.watch.progress import Progress

if TYPE_CHECKING:
    from torch.distributed import Store

WAIT_S = 86_400.0  # torch wants a limit; this one never ends before the watchdog's
LEAVE_S = 10.0  # rank 0 waits at most so long for the others at the end: some may have died
LEAVE_TICK_S = 0.01
Decide = Callable[[list[Any]], Sequence[Any]]


class Meeting:
    """The ranks of one run. At world size 1 nothing is opened and nobody is asked."""

    def __init__(
        self, rank: int, world_size: int, store: Store | None, progress: Progress | None = None
    ) -> None:
        self.rank = rank
        self.world_size = world_size
        self.store = store
        self.also_served: Store | None = None  # a second store of rank 0 that lives as long as the meeting
        self._progress = progress or Progress(WatchdogConfig())
        self._rounds = 0  # all ranks take part in the same ones, so the numbers agree
        self._turns = 0  # of all_alike()

    def settle(self, mine: Any, decide: Decide) -> Any:
        """Hands every rank's `mine` to `decide` on rank 0, and returns to each rank its own reply.

        `decide` gets a list with an entry for each rank, and returns a list with a reply for each rank. If
        it raises UserError, every rank raises that error, and rank 0 shows it. All values must be JSON.
        Every rank must call this.
        """
        if self.store is None:
            return decide([mine])[0]

        self._rounds += 1
        self._progress.arrive(in_step=False)
        return self._settled(self.store, f"settle/{self._rounds}", mine, decide)

    def all_alike(self, mine: str, activity: str, limit_s: float) -> None:
        """Waits until all ranks have come here; raises UserError, on all of them, where their texts differ.

        `activity` says in words what the ranks must do alike. A rank that has come here counts as late
        after `limit_s` seconds: if the others are at a collective then, it is this rank that keeps them
        waiting, and the watchdog names it. A rank that only computes for long is waited for.
        """
        if self.store is None:
            return

        def decide(said: list[str]) -> list[None]:
            usual, odd = majority(said)
            if odd:
                raise UserError(
                    f"{ranks_named(odd)}: {said[odd[0]]}, but the other ranks: {usual}. All ranks must do "
                    "this alike: decide by what is the same on all of them, such as run.step or run.mean()."
                )
            return [None] * len(said)

        # The keys have a series of their own: if another rank does not come here, its next settle() must
        # not take this rank's text for an answer.
        self._turns += 1
        with self._progress.phase(activity, limit_s):
            self._settled(self.store, f"alike/{self._turns}", mine, decide)

    def _settled(self, store: Store, tag: str, mine: Any, decide: Decide) -> Any:
        """One round, whose keys begin with `tag`: this rank's reply. Raises UserError as settle() does."""
        if self.rank == 0:
            reply = self._settle_as_rank_0(store, tag, mine, decide)
        else:
            store.set(f"{tag}/{self.rank}", json.dumps(mine))
            reply = self._wait_for(store, f"{tag}/reply/{self.rank}", from_rank=0)

        if "error" in reply:
            raise UserError(reply["error"], said_by=0)
        return reply["reply"]

    def _settle_as_rank_0(self, store: Store, tag: str, mine: Any, decide: Decide) -> Any:
        """Collects what the ranks say, decides, and replies to each; returns rank 0's own reply."""
        said = [mine]
        for rank in range(1, self.world_size):
            said.append(self._wait_for(store, f"{tag}/{rank}", from_rank=rank))

        replies: list[Any]
        try:
            replies = [{"reply": reply} for reply in decide(said)]
        except UserError as error:
            replies = [{"error": str(error)}] * self.world_size

        for rank in range(1, self.world_size):
            store.set(f"{tag}/reply/{rank}", json.dumps(replies[rank]))
        return replies[0]

    def agree(self, error: UserError | None) -> None:
        """Raises the same error on every rank if any rank has one. The error names these ranks."""

        def decide(errors: list[Any]) -> list[None]:
            if any(errors):
                raise UserError(merged(errors))
            return [None] * len(errors)

        self.settle(str(error) if error else None, decide)

    def from_rank_0(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, as JSON, on every rank; if it raises UserError, all ranks do."""

        def decide(said: list[Any]) -> list[Any]:
            return [make()] * len(said)

        return self.settle(None, decide)

    def is_first(self, what: str) -> bool:
        """Whether no rank has asked for `what` before. Only a rank that has found `what` calls this."""
        return self.store is None or self.store.add(f"first/{what}", 1) == 1

    def tell(self, key: str, value: Any) -> None:
        """Writes down a value, JSON, for another rank, which reads it by heard(). Any thread may call."""
        assert self.store is not None
        self.store.set(f"told/{key}", json.dumps(value))

    def heard(self, key: str) -> Any:
        """What a rank has told under this key; None if it has not yet. Reading removes it."""
        assert self.store is not None
        if not self.store.check([f"told/{key}"]):
            return None
        value = json.loads(self.store.get(f"told/{key}"))
        self.store.delete_key(f"told/{key}")
        return value

    def leave(self) -> None:
        """Ends the meeting. Rank 0 serves the store and goes last, so that nobody is cut off.

        If rank 0 has gone already, there is nothing left to take leave of.
        """
        if self.store is None:
            return
        store, self.store = self.store, None
        # torch's DistNetworkError, a RuntimeError, where rank 0 has died. It would take the place of the
        # error that has led here, which says what has happened.
        with suppress(RuntimeError):
            present = store.add("left", 1)
            deadline = time.monotonic() + LEAVE_S
            while self.rank == 0 and present < self.world_size and time.monotonic() < deadline:
                time.sleep(LEAVE_TICK_S)
                present = store.add("left", 0)

    def _wait_for(self, store: Store, key: str, from_rank: int) -> Any:
        """What a rank has written down, once it has. Raises UserError if rank 0's store has gone."""
        from torch.distributed import DistError

        try:
            with self._progress.waiting_for(f"rank {from_rank}"):
                store.wait([key], timedelta(seconds=WAIT_S))
            return json.loads(store.get(key))
        except (DistError, RuntimeError) as error:
            raise UserError(
                f"rank {self.rank} has lost its connection to rank 0 ({one_line(error)}): look for "
                "rank 0's own message above or in its log; its node may be down."
            ) from error


def merged(errors: Sequence[str | None]) -> str:
    """One message for all: the error alone where every rank has it, else with the ranks named."""
    if len(set(errors)) == 1:
        return str(errors[0])
    by_text: dict[str, list[int]] = {}
    for rank, text in enumerate(errors):
        if text:
            by_text.setdefault(text, []).append(rank)
    return "\n".join(f"{ranks_named(ranks)}: {text}" for text, ranks in by_text.items())


def ranks_named(ranks: Sequence[int]) -> str:
    """`rank 3` or `ranks 1, 4, 7, ... (12 in all)`."""
    shown = ", ".join(map(str, ranks[:8]))
    if len(ranks) == 1:
        return f"rank {shown}"
    return f"ranks {shown}" + (f", ... ({len(ranks)} in all)" if len(ranks) > 8 else "")


def open_meeting(identity: RankIdentity, comm: Any, run: int, progress: Progress) -> Meeting:
    """Opens the meeting of a run; `run` counts the runs of this process, so that sweeps do not mix.

    `comm` is MPI's communicator where MPI started the ranks, else None. Sets MASTER_ADDR and MASTER_PORT to
    where the store is served. Raises UserError if the ranks cannot find each other.
    """
    from torch.distributed import PrefixStore

    if identity.alone:
        return Meeting(0, 1, None)
    store = _join_env(identity, progress) if comm is None else _serve_through_mpi(comm, progress)
    world_size = identity.world_size
    assert world_size is not None  # MPI filled in what the launcher did not tell
    # torchrun serves all its attempts, which may differ in size, from one store
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT") if identity.launcher == "torchrun" else None
    secret = os.environ.get(variables.RANKS_SECRET, "")  # under `allranks launch`
    prefix = f"allranks/{secret}/{restarts or 0}/{world_size}/{run}"
    return Meeting(identity.rank, world_size, PrefixStore(prefix, store), progress)


def serve(address: str, world_size: int, port: int = 0, far: bool = False) -> tuple[Store, int]:
    """A store on rank 0's host at this address, and its port; raises UserError as listen() does."""
    from torch.distributed import TCPStore

    listener = listen(address, port, far, connections=world_size)
    port = listener.getsockname()[1]
    store = TCPStore(
        address, port, world_size, True, timedelta(seconds=WAIT_S), wait_for_workers=False,
        master_listen_fd=listener.detach(),
        use_libuv=False,  # with libuv it could not take over a socket before torch 2.5
    )  # fmt: skip
    return store, port


class _StorePlace(NamedTuple):
    """What rank 0 tells the other ranks about the store that it serves."""

    address: str = ""
    port: int = 0
    problem: str = ""  # why there is no store, for the user; "" if there is one
    secret: str = ""  # with which every key begins


def _serve_through_mpi(comm: Any, progress: Progress) -> Store:
    """Rank 0 serves on a free port, which MPI tells the others: no port is ever guessed.

    MPI also tells them a secret, with which every key begins: torch's store has no password.
    """
    from torch.distributed import PrefixStore

    with progress.waiting_for("the other ranks, at the first message over MPI"):
        hosts = mpi.hosts(comm)
    store: Store | None = None
    place = _StorePlace()
    if comm.rank == 0:
        store, place = _serve_for(hosts, comm.size)
    with progress.waiting_for("rank 0, at the first message over MPI"):
        said = mpi.broadcast_text(comm, json.dumps(place))
    place = _StorePlace(*json.loads(said))
    if place.problem:
        raise UserError(place.problem, said_by=0)
    os.environ.update(MASTER_ADDR=place.address, MASTER_PORT=str(place.port))
    if store is None:
        store = _connect(place.address, place.port, comm.rank, comm.size, progress)
    return PrefixStore(place.secret, store)


def _serve_for(hosts: Sequence[mpi.Host], world_size: int) -> tuple[Store | None, _StorePlace]:
    """Serves a store on rank 0 for the ranks on these hosts, one entry for each rank.

    Returns the store and where it is. If it cannot be served, there is no store, and the place has the
    problem: rank 0 must tell the other ranks before it ends.
    """
    is_far = len(set(hosts)) > 1
    try:
        address = _address([host.name for host in hosts]) if is_far else "127.0.0.1"
        store, port = serve(address, world_size, far=is_far)
    except UserError as error:
        return None, _StorePlace(problem=str(error))
    return store, _StorePlace(address, port, secret=secrets.token_hex(16))


def _address(hosts: Sequence[str]) -> str:
    """Where ranks on other hosts reach this one, which is rank 0's.

    `hosts` are the names of all ranks' hosts. Raises UserError if they lead nowhere.
    """
    from allranks.job.hosts import address_for

    if os.environ.get("MASTER_ADDR"):
        return os.environ["MASTER_ADDR"]
    address = address_for(hosts)
    if address == "127.0.0.1":
        raise UserError(
            f"the ranks are on several hosts that all call themselves {socket.gethostname()}, so none of "
            "them finds another: give each host a name of its own, or set MASTER_ADDR to rank 0's address "
            "on their network."
        )
    return address


# What this process serves at MASTER_ADDR and MASTER_PORT. A program may have several runs, one after
# another, which all meet there. Each has keys of its own.
_served: dict[tuple[str, int], Store] = {}


def _join_env(identity: RankIdentity, progress: Progress) -> Store:
    """The store that MASTER_ADDR and MASTER_PORT name; under bare srun both follow from the job."""
    if identity.launcher == "srun":
        from allranks.job.hosts import first_host  # other launchers' ranks need nothing of that module
        from allranks.job.slurm import step_id

        nodes = os.environ.get("SLURM_STEP_NODELIST") or os.environ.get("SLURM_JOB_NODELIST", "")
        single = identity.local_world_size == identity.world_size
        # A variable that is set, but empty, says nothing.
        if not os.environ.get("MASTER_ADDR"):
            os.environ["MASTER_ADDR"] = "127.0.0.1" if single else first_host(nodes)
        if not os.environ.get("MASTER_PORT"):
            os.environ["MASTER_PORT"] = str(variables.port_for(step_id(os.environ)))
    missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
    if missing:
        raise UserError(
            f"RANK={identity.rank} and WORLD_SIZE={identity.world_size} are set but {' and '.join(missing)}"
            " not: start the ranks with mpiexec or torchrun, or set them on every rank.",
            said_by=0,
        )
    address, text = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    port = int(text) if re.fullmatch("[0-9]{1,5}", text) else 0
    if not 0 < port < 1 << 16:
        raise UserError(f"MASTER_PORT={text} is not valid: give a port's number, the same on every rank.")
    assert identity.world_size is not None  # `environment` and torchrun always tell it
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":  # served before torchrun starts a rank
        try:
            socket.create_connection((address, port), progress.limits.start_s).close()
        except ConnectionRefusedError:
            raise UserError(f"torchrun has ended: nobody answers at {address}:{port}.") from None
        except (OSError, UnicodeError) as error:
            raise UserError(f"torchrun cannot be reached at {address}:{port} ({error}).") from None
    else:
        several_hosts = identity.local_world_size not in (None, identity.world_size)
        if identity.rank == 0:
            if (address, port) not in _served:
                _served[address, port] = serve(address, identity.world_size, port, far=several_hosts)[0]
            return _served[address, port]
        if several_hosts:
            from allranks.job.hosts import refuse_loopback

            refuse_loopback(address, "MASTER_ADDR")  # else this rank would wait for itself
    return _connect(address, port, identity.rank, identity.world_size, progress)


def _connect(address: str, port: int, rank: int, world_size: int, progress: Progress) -> Store:
    """The store that rank 0 serves. Raises UserError if nobody does within watchdog.start_s."""
    from torch.distributed import TCPStore

    start_s = progress.limits.start_s
    try:
        with progress.waiting_for(f"rank 0 at MASTER_ADDR={address} and MASTER_PORT={port}"):
            return TCPStore(address, port, world_size, False, timedelta(seconds=start_s))
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {rank} has not found rank 0 at MASTER_ADDR={address} and MASTER_PORT={port} for "
            f"{start_s:g} s (watchdog.start_s): look whether rank 0 has started, and whether both are "
            "those of its host."
        ) from error
