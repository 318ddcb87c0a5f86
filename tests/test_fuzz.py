"""What is read from files and from the environment, mutated at random, the same way every time.

Each mutant is accepted as what it is, or refused with the promised exception and one message: no other
exception, no hang, and no acceptance of what should have been refused. There are 10,000 mutants of most
kinds with --long, and the first 1,000 of them without.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch  # here, before a test limits the memory
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from allranks import cli
from allranks import config as configs
from allranks.base.errors import UserError
from allranks.compose import from_command_line
from allranks.config import Config
from allranks.data import mnist
from allranks.job.hosts import expand, find_allocation
from allranks.job.identity import discover, launcher_rank, repeated, started_by_mpi
from allranks.run import checkpoint, claim, shards
from allranks.run.checkpoint import Damaged
from test_environment import CRAY_PMI, JSRUN, MPICH, MVAPICH2, OPENMPI, PALS, SRUN, TORCHRUN

LIMIT_S = 300  # of a whole test, many times what it takes


@pytest.fixture(scope="session")
def mutants(long: bool) -> int:
    """How many of each kind."""
    return 10_000 if long else 1_000


@pytest.fixture(autouse=True)
def nothing_hangs_or_fills_the_memory() -> Iterator[None]:
    def late(*_: object) -> None:
        raise RuntimeError(f"a mutant took more than {LIMIT_S} s")

    before = signal.signal(signal.SIGALRM, late)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (1 << 30), hard))
    signal.alarm(LIMIT_S)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)
    resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


# --- mutations -------------------------------------------------------------------------------------------


def mutated(content: bytes, rng: random.Random) -> bytes:
    """Bits flipped, pieces cut out, doubled, moved, overwritten, or the end missing."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        at = rng.randrange(len(changed) + 1)
        length = rng.choice((1, 1, 2, 8, 100))
        match rng.randrange(6):
            case 0 if at < len(changed):
                changed[at] ^= 1 << rng.randrange(8)
            case 1:
                del changed[at:]
            case 2:
                del changed[at : at + length]
            case 3:
                changed[at:at] = changed[at : at + length] or b"\0"
            case 4:
                changed[at : at + length] = rng.randbytes(len(changed[at : at + length]))
            case _:
                other = rng.randrange(len(changed) + 1)
                changed[other:other] = changed[at : at + length]
    return bytes(changed)


HOSTILE = (
    None, True, -1, 0, 1, 1.0, 1e308, float("nan"), 2**63, 10**30, "", " ", "../../passwd", "/etc/passwd",
    "a/b", ".", "..", "manifest.json", "\0", "\n", "é\u202e", "\ud800", "0" * 64, "x" * 5000, [], {}, [[]],
    {"": None}, {"size": 0, "sha256": hashlib.sha256(b"").hexdigest()},
)  # fmt: skip


def edited(value: Any, rng: random.Random) -> Any:
    """A JSON value with a part of it replaced, removed or added, however deep it lies."""
    if isinstance(value, dict) and value and rng.random() < 0.8:
        changed = dict(value)
        key = rng.choice(list(changed))
        match rng.randrange(6):
            case 0:
                del changed[key]
            case 1:
                changed[str(rng.choice(HOSTILE))] = changed.pop(key)
            case 2:
                changed[str(rng.choice(HOSTILE))] = rng.choice(HOSTILE)
            case _:
                changed[key] = edited(changed[key], rng)
        return changed
    if isinstance(value, list) and value and rng.random() < 0.8:
        at = rng.randrange(len(value))
        return [*value[:at], *rng.choice(([], [edited(value[at], rng)], [value[at]] * 2)), *value[at + 1 :]]
    return rng.choice(HOSTILE)


def tally(mutants: int, accepts: Callable[[random.Random], bool], *errors: type[Exception]) -> Counter[str]:
    """How many of the mutants were accepted and refused; each has a seed of its own."""
    counted: Counter[str] = Counter()
    for seed in range(mutants):
        rng = random.Random(seed)
        try:
            counted["accepted" if accepts(rng) else "same"] += 1
        except errors as error:
            assert str(error), seed
            counted["refused"] += 1
        except Exception as error:
            raise AssertionError(f"mutant {seed}") from error
    assert counted.total() == mutants
    print(dict(counted))
    return counted


# --- checkpoints -----------------------------------------------------------------------------------------

TENSORS = {
    "__metadata__": {"format": "pt"},
    "0.weight": {"dtype": "F32", "shape": [3, 5], "data_offsets": [0, 60]},
    "0.bias": {"dtype": "BF16", "shape": [4], "data_offsets": [60, 68]},
    "step": {"dtype": "I64", "shape": [], "data_offsets": [68, 76]},
}
STATE = {"step": 7, "epoch": 1, "history": [{"epoch": 1, "val/loss": 0.5}], "identity": {"model": "mlp"}}


def safetensors_file(header: Any, data: bytes = bytes(range(76))) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


FILES = {
    "model.safetensors": safetensors_file(TENSORS), "state.json": json.dumps(STATE).encode(), "empty": b"",
}  # fmt: skip


def damage(path: Path, elsewhere: Path, rng: random.Random) -> None:
    """Does something to a checkpoint's folder, where it is not too damaged already."""
    if not all(file.is_file() for file in path.iterdir()):
        return
    names = [*FILES, "manifest.json"]
    file, other = path / rng.choice(names), path / rng.choice(names)
    manifest = path / "manifest.json"
    match rng.randrange(12):
        case 0 | 1 | 2:
            file.write_bytes(mutated(file.read_bytes(), rng))
        case 3 | 4:
            changed = edited(json.loads(manifest.read_bytes()), rng)
            manifest.write_text(json.dumps(changed, indent=1, sort_keys=True) + "\n")
        case 5:
            manifest.write_bytes(
                rng.choice((b"", b"[" * 9999, b"{}", b"null\n", b"1" * 9999, b'"\\ud800"\n'))
            )
        case 6:
            first, second = file.read_bytes(), other.read_bytes()
            file.write_bytes(second)
            other.write_bytes(first)
        case 7:
            file.unlink()
        case 8:
            name = rng.choice(
                ("extra", ".hidden", "a\nb", b"\xff".decode(errors="surrogateescape"), "x" * 255)
            )
            (path / name).write_bytes(b"")
        case 9:
            file.rename(path / rng.choice((other.name, "other")))
        case 10:
            file.unlink()
            rng.choice(
                (lambda: file.symlink_to(elsewhere / file.name), file.mkdir, lambda: os.mkfifo(file))
            )()
        case _:
            os.truncate(file, rng.choice((0, 1, 1 << 20)))


def test_mutated_checkpoints(memory, mutants):
    """One of them is accepted only where all of its bytes are as they were."""
    path = checkpoint.write(memory, 7, FILES, "me", lambda: None)
    whole = {file.name: file.read_bytes() for file in path.iterdir()}
    shutil.copytree(path, memory / "elsewhere")

    def accepts(rng: random.Random) -> bool:
        shutil.rmtree(path)
        path.mkdir()
        for name, content in whole.items():
            (path / name).write_bytes(content)
        for _ in range(rng.choice((1, 1, 1, 2))):
            try:
                damage(path, memory / "elsewhere", rng)
            except (
                OSError,
                ValueError,
                RecursionError,
            ):  # the one before left nothing to be damaged that way
                break
        try:
            read = checkpoint.read(path)
        except Damaged as damaged:
            assert str(damaged).isprintable()
            assert len(str(damaged)) < 500
            raise
        assert read == FILES
        found = {file.name: file.read_bytes() for file in path.iterdir()}
        assert found == whole
        return False

    counted = tally(mutants, accepts, Damaged)
    assert counted["accepted"] == 0
    # a file swapped with itself, or cut at its end, is the same
    assert 0.9 * mutants < counted["refused"] < mutants


def test_mutated_safetensors_headers(mutants):
    """What is accepted is what a run that goes on would read; what is refused is told in one short line."""

    def accepts(rng: random.Random) -> bool:
        match rng.randrange(3):
            case 0:
                content = mutated(FILES["model.safetensors"], rng)
            case 1:
                content = rng.choice((2**63, 2**40, 10**8 + 1, 0, 1)).to_bytes(8, "little") + bytes(100)
            case _:
                content = safetensors_file(edited(TENSORS, rng))
        try:
            found = checkpoint.tensors("model.safetensors", content)
        except Damaged as damaged:
            assert str(damaged).isprintable()
            assert len(str(damaged)) < 250
            raise
        loaded = safetensors.torch.load(content)
        assert {name: (tensor.shape, tensor.bytes) for name, tensor in found.items()} == {
            name: (list(tensor.shape), tensor.nbytes) for name, tensor in loaded.items()
        }
        return content != FILES["model.safetensors"]

    counted = tally(mutants, accepts, Damaged)
    assert counted["accepted"] > 0.05 * mutants
    assert counted["refused"] > 0.5 * mutants


SHARDED = {
    "format": 1,
    "ranks": 2,
    "tensors": {
        "model": {"w": {"dtype": "F32", "shape": [3, 2], "rows": 2}},
        "optimizer": {"step": {"dtype": "I64", "shape": [], "rows": None}},
    },
}
SHARDS = {
    "model-00000-of-00002.safetensors": shards.header([("w", "F32", (2, 2))]) + bytes(range(16)),
    "model-00001-of-00002.safetensors": shards.header([("w", "F32", (1, 2))]) + bytes(range(16, 24)),
    "optimizer-00000-of-00002.safetensors": shards.header([("step", "I64", ())]) + bytes(8),
    "optimizer-00001-of-00002.safetensors": shards.header([]),
    "state.json": b"{}",
}


def test_mutated_indexes_of_checkpoints_in_shards(mutants):
    """None takes long, however many ranks it speaks of."""
    whole = shards.assembled({**SHARDS, shards.INDEX: json.dumps(SHARDED).encode()})
    assert safetensors.torch.load(whole["model.safetensors"])["w"].shape == (3, 2)

    def accepts(rng: random.Random) -> bool:
        index = json.dumps(edited(SHARDED, rng)).encode()
        index = index if rng.random() < 0.7 else mutated(json.dumps(SHARDED).encode(), rng)
        made = shards.assembled({**SHARDS, shards.INDEX: index})
        tensors = {name: safetensors.torch.load(made[f"{name}.safetensors"]) for name in shards.PARTS}
        return list(tensors["model"]) == ["w"]

    counted = tally(mutants, accepts, Damaged)
    assert counted["refused"] > 0.5 * mutants
    impossible = [{**SHARDED, "ranks": 10**12}, {**SHARDED, "tensors": {"model": {}}}]
    for rows in (-1, 0, 1):
        spread = {"w": {"dtype": "F32", "shape": [3, 2], "rows": rows}}
        impossible.append({**SHARDED, "tensors": {"model": spread, "optimizer": {}}})
    for values in impossible:
        with pytest.raises(Damaged, match=r"shards\.json: it is not as it was written"):
            shards.Index.from_bytes(json.dumps(values).encode())


def test_checkpoints_that_say_anything_are_shown(memory, capsys, long):
    """Valid by their manifest, with mutated contents: `allranks checkpoint` shows or refuses them."""

    def accepts(rng: random.Random) -> bool:
        state = rng.choice((mutated(FILES["state.json"], rng), json.dumps(edited(STATE, rng)).encode()))
        model = safetensors_file(edited(TENSORS, rng)) if rng.random() < 0.5 else FILES["model.safetensors"]
        path = checkpoint.path_of(memory, 7)
        shutil.rmtree(path, ignore_errors=True)
        files = {"model.safetensors": model, "state.json": state}
        checkpoint.write(memory, 7, files, "me", lambda: None)
        words = rng.choice((["list"], ["verify"], ["show"])) + rng.choice(([], ["--json"]))
        with pytest.raises(SystemExit) as ended:
            cli.main(["checkpoint", *words, str(memory)])
        code = ended.value.code
        shown = capsys.readouterr()
        assert shown.out.isascii()
        assert all(line.isprintable() for line in (shown.out + shown.err).splitlines())
        if "--json" in words and code == 0:
            assert [json.loads(line) for line in shown.out.splitlines()]
        return code == 0

    mutants = 1_000 if long else 200  # each is written to a disk
    counted = tally(mutants, accepts)
    assert counted["accepted"] > 0.75 * mutants
    assert counted["same"] > 0.02 * mutants  # damaged, as its tensors do not fit


def test_owner_files_that_say_anything(memory, mutants):
    me = claim._this_process()

    def accepts(rng: random.Random) -> bool:
        path = memory / "owner-1.json"
        path.write_bytes(
            rng.choice((mutated(json.dumps(me).encode(), rng), json.dumps(edited(me, rng)).encode()))
        )
        owner = claim._read(path)
        assert owner is not None
        assert str(owner).startswith("process ")
        assert owner.identity == owner.identity
        return claim._known_end(owner.about, me) is None

    assert tally(mutants, accepts)["accepted"] > 0.5 * mutants


# --- IDX files -------------------------------------------------------------------------------------------


def idx(array: np.ndarray) -> bytes:
    sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
    return bytes((0, 0, 8, array.ndim)) + sizes + array.tobytes()


@pytest.mark.parametrize("known", [True, False], ids=["known sha256", "unknown"])
def test_mutated_idx_files(memory, monkeypatch, known, mutants):
    """A small set as the published ones are: packed with md5, unpacked with sha256 or without."""
    draw = np.random.default_rng(0)
    stems = {kind: mnist._STEMS["train", kind] for kind in ("images", "labels")}
    arrays = {
        "images": draw.integers(0, 256, (3, 28, 28), np.uint8), "labels": np.array([0, 9, 5], np.uint8),
    }  # fmt: skip
    plain = {stem: idx(arrays[kind]) for kind, stem in stems.items()}
    packed = {f"{stem}.gz": gzip.compress(content, mtime=0) for stem, content in plain.items()}
    md5 = {stem: hashlib.md5(packed[f"{stem}.gz"]).hexdigest() for stem in plain}
    sha256 = {stem: hashlib.sha256(content).hexdigest() for stem, content in plain.items()} if known else {}
    monkeypatch.setitem(mnist.SOURCES, "tiny", mnist.Source("Tiny", (), md5, sha256))
    monkeypatch.setitem(mnist.COUNTS, "train", 3)
    folder = memory / "Tiny/raw"
    folder.mkdir(parents=True)

    def accepts(rng: random.Random) -> bool:
        files = rng.choice((plain, packed))
        victim = rng.choice(list(files))
        change = mutated(files[victim], rng)
        shutil.rmtree(folder)
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(change if name == victim else content)
        images, labels = mnist.load("tiny", "train", str(memory))
        assert (images.shape, images.dtype, labels.shape, labels.dtype) == ((3, 28, 28), "u1", (3,), "u1")
        assert labels.max() < 10
        different = not (
            np.array_equal(images, arrays["images"]) and np.array_equal(labels, arrays["labels"])
        )
        assert not different or (not known and files is plain)
        return different

    counted = tally(mutants // 2, accepts, UserError)
    assert counted["refused"] > 0.3 * mutants
    assert (counted["accepted"] == 0) == known  # a pixel of an unpacked file, where no sum is published


# --- node lists ------------------------------------------------------------------------------------------

NODE_LISTS = (
    "n1", "a[001-003,7],b2,c[1-2]-x[0-3]", "nid[000001-000128]", "x1000c0s0b0n0.hsn.cm", "a[1-2],a[3]",
    "login-1", "a[1-2]b[3-4]",
)  # fmt: skip
HOSTFILES = (
    "a:2\nb:1\n",
    "a slots=2\nb slots = 1 max_slots=4\n",
    "x1.hsn\nx1.hsn\n# end\n",
    "10.0.0.1:4 binding=1\n",
)
HOST = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
PIECES = [
    "[", "]", ",", "-", "(x", ")", " ", "\t", "\n", "0", "9" * 12, "9" * 5000, "²", "٣", "é", "\0", "$(id)",
    "'", "[1-99999999]", "[0-9999]", "slots=", ":", "#", "-o", "/",
]  # fmt: skip


def mutated_text(text: str, rng: random.Random) -> str:
    changed = text
    for _ in range(rng.choice((1, 1, 2, 4))):
        at, until = sorted(rng.randrange(len(changed) + 1) for _ in range(2))
        if rng.random() < 0.5:
            changed = changed[:at] + rng.choice(PIECES) + changed[at:]
        else:
            changed = (
                changed[:at] + rng.choice(("", changed[at:until] * 2, rng.choice(PIECES))) + changed[until:]
            )
    return changed


def test_mutated_node_lists(memory, mutants):
    hosts_file = memory / "hosts"

    def accepts(rng: random.Random) -> bool:
        slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": rng.choice(NODE_LISTS)}
        if rng.random() < 0.5:
            slurm["SLURM_JOB_NODELIST"] = mutated_text(slurm["SLURM_JOB_NODELIST"], rng)
            job = find_allocation(slurm)
        elif rng.random() < 0.5:
            slurm["SLURM_JOB_NODELIST"] = "n[1-4]"
            slurm["SLURM_TASKS_PER_NODE"] = mutated_text("2(x3),1", rng)
            slurm["SLURM_JOB_CPUS_PER_NODE"] = mutated_text("64(x4)", rng)
            job = find_allocation(slurm)
        else:
            hosts_file.write_bytes(mutated(rng.choice(HOSTFILES).encode(), rng))
            if rng.random() < 0.7:
                hosts_file.write_text(mutated_text(rng.choice(HOSTFILES), rng))
            job = find_allocation({"PBS_NODEFILE": str(hosts_file)}, rng.choice((hosts_file, None)))
        assert all(HOST.fullmatch(host.name) for host in job.hosts), job
        assert all(1 <= host.slots <= 1_000_000 for host in job.hosts), job
        assert 1 <= len(job.hosts) <= 1_000_000
        return True

    counted = tally(mutants, accepts, UserError)
    assert counted["accepted"] > 0.1 * mutants
    assert counted["refused"] > 0.3 * mutants


@given(st.text(alphabet="a1-0[],9 x(\n", max_size=30))
@example("a[1-9]" * 30)
@example("a[1-9999999999999]")
@example("[" * 5000)
@settings(max_examples=1_000)
def test_any_text_as_a_node_list(text):
    for read in (expand, lambda t: repeated(t, "X")):
        try:
            assert read(text)
        except UserError as error:
            assert str(error)


# --- rank environments -----------------------------------------------------------------------------------

LAUNCHERS = (
    TORCHRUN,
    MPICH,
    OPENMPI,
    MVAPICH2,
    SRUN,
    PALS,
    CRAY_PMI,
    JSRUN,
    {"RANK": "1", "WORLD_SIZE": "2"},
)
VALUES = (
    "", " ", "0", "1", "5", "8", "-1", "+1", "1.0", "1e3", "0x1", "²", "٣", "1_0", " 5 ", "9" * 10,
    "9" * 5000, "NaN", "True", "4(x2)", "4(x99999999999)", "4(x2", "\n", "\udcff", "4294967295",
)  # fmt: skip


def test_mutated_rank_environments(mutants):
    """Whatever is accepted makes sense as a rank, and the other questions have an answer, too."""

    def accepts(rng: random.Random) -> bool:
        given = dict(rng.choice(LAUNCHERS))
        names = sorted({name for environ in LAUNCHERS for name in environ})
        for _ in range(rng.choice((1, 1, 2, 3, 8))):
            name = rng.choice((rng.choice(list(given) or names), rng.choice(names)))
            match rng.randrange(4):
                case 0:
                    given.pop(name, None)
                case 1:
                    given[name] = rng.choice(rng.choice(LAUNCHERS).get(name, "1") or "1")
                case _:
                    given[name] = rng.choice(VALUES)
        assert launcher_rank(given) >= 0
        assert started_by_mpi(given) in (True, False)
        launch = discover(given)
        assert launch.world_size is None or 0 <= launch.rank < launch.world_size
        assert launch.local_rank is None or launch.local_rank >= 0
        if launch.local_rank is not None and launch.local_world_size is not None:
            assert launch.local_rank < launch.local_world_size
        if launch.launcher == "none":
            assert "RANK" not in given or not given["RANK"]
        else:
            assert launch.rank == launcher_rank(given)
        return True

    counted = tally(mutants, accepts, UserError)
    assert counted["accepted"] > 0.2 * mutants
    assert counted["refused"] > 0.2 * mutants


# --- configurations --------------------------------------------------------------------------------------


def test_mutated_config_files(memory, mutants):
    """A launched configuration that has changed since is refused."""
    [config] = from_command_line(["model=mlp", "scheduler=warmup_cosine", "optimizer=adamw"])
    frozen = configs.freeze(config).encode()
    sha256 = hashlib.sha256(frozen).hexdigest()
    file = memory / "config.yaml"

    def accepts(rng: random.Random) -> bool:
        content = mutated(frozen, rng)
        if content == frozen:
            return False
        file.write_bytes(content)
        configs.thaw(str(memory), sha256)
        return True

    counted = tally(mutants, accepts, UserError)
    assert counted["accepted"] == 0
    assert counted["refused"] > 0.9 * mutants


def test_mutated_config_files_frozen_anew(memory, long):
    """What holds a valid configuration is accepted, the same after another round; all else is refused."""
    [config] = from_command_line(["model=mlp", "scheduler=warmup_cosine", "optimizer=adamw"])
    frozen = configs.freeze(config).encode()
    file = memory / "config.yaml"

    def accepts(rng: random.Random) -> bool:
        content = mutated(frozen, rng)
        if rng.random() < 0.6:
            content = yaml.safe_dump(edited(yaml.safe_load(frozen), rng)).encode()
        file.write_bytes(content)
        thawed = configs.thaw(str(memory), hashlib.sha256(content).hexdigest())
        assert isinstance(thawed, Config)
        again = configs.freeze(thawed)
        file.write_text(again)
        same = configs.thaw(str(memory), hashlib.sha256(again.encode()).hexdigest())
        assert configs.freeze(same) == again
        return True

    mutants = 600 if long else 60  # each is composed twice
    counted = tally(mutants, accepts, UserError)
    assert counted["accepted"] > mutants / 8
    assert counted["refused"] > mutants / 3
