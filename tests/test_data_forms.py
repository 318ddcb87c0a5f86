"""Data of any form: arrays from files, batches that are nests, and streams; each example exactly once."""

from __future__ import annotations

import json
import pickle
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ChainDataset, IterableDataset, get_worker_info

from allranks.base.errors import UserError
from allranks.data import arrays, batches, loader, nests
from allranks.data.dealing import evaluation_batches, steps_per_epoch, training_batches
from allranks.data.loader import Opening, _Arrays
from allranks.data.parts import Form, Mapped, Streamed, Table
from helpers import rank_of

CPU = torch.device("cpu")


def form(**more: Any) -> Form:
    return Form(CPU, torch.float64, "data.train", is_labelled=False, **more)


# --- arrays from files ---------------------------------------------------------------------------------

X = np.arange(12, dtype=np.float32).reshape(4, 3)
Y = np.array([5, 6, 7, 8], np.int16)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The arrays above as .npy, .npz and HDF5."""
    h5py = pytest.importorskip("h5py")
    monkeypatch.chdir(tmp_path)
    np.save("x.npy", X)
    np.save("y.npy", Y)
    np.savez("xy.npz", x=X, y=Y)
    np.savez_compressed("small.npz", x=X, y=Y)
    with h5py.File("xy.h5", "w") as file:
        file["inner/x"] = X
        file["y"] = Y
    return tmp_path


H5 = {"path": "xy.h5", "names": ["inner/x", "y"]}


@pytest.mark.parametrize(
    "values",
    [
        {"path": ["x.npy", "y.npy"]},
        {"path": ["x.npy", "y.npy"], "memory_map": True},
        {"path": "xy.npz", "names": ["x", "y"]},
        {"path": "small.npz", "names": ["x", "y"]},
        H5,
        {**H5, "memory_map": True},
    ],
)
def test_pairs_come_from_files_of_each_kind(values, files):
    made = arrays.load(**values)
    is_mapped = values.get("memory_map", False)
    pairs = [made[i] for i in range(len(made))] if is_mapped else list(zip(*made, strict=True))
    assert [x.tolist() for x, _ in pairs] == X.tolist()
    assert [(int(y), y.dtype) for _, y in pairs] == [(int(y), np.int16) for y in Y]


@pytest.mark.parametrize(
    ("values", "keys"),
    [
        ({"path": {"a": "x.npy", "b": "y.npy"}}, ["a", "b"]),
        ({"path": {"a": "x.npy", "b": "y.npy"}, "memory_map": True}, ["a", "b"]),
        ({"path": "xy.npz"}, ["x", "y"]),
        ({"path": "xy.npz", "names": {"a": "x", "b": "y"}}, ["a", "b"]),
        ({"path": "xy.h5", "names": {"a": "inner/x", "b": "y"}, "memory_map": True}, ["a", "b"]),
        ({"path": "xy.h5"}, ["inner/x", "y"]),
    ],
)
def test_dicts_come_from_files_of_each_kind(values, keys, files):
    made = arrays.load(**values)
    if values.get("memory_map"):
        made = {key: np.stack([made[i][key] for i in range(4)]) for key in made[0]}
    assert list(made) == keys
    assert [made[key].tolist() for key in keys] == [X.tolist(), Y.tolist()]


def test_one_name_needs_no_list(files):
    np.savez("named.npz", images=X, labels=Y)
    assert arrays.load("named.npz", names="images").tolist() == X.tolist()
    assert arrays.load("xy.h5", names="inner/x").tolist() == X.tolist()
    rows = arrays.load("xy.h5", names="inner/x", memory_map=True)
    assert [rows[i].tolist() for i in range(4)] == X.tolist()


@pytest.mark.parametrize(
    "values",
    [
        {**H5, "memory_map": True},
        {"path": ["x.npy", "y.npy"], "memory_map": True},
        {"path": {"a": "x.npy", "b": "y.npy"}, "memory_map": True},
    ],
)
def test_rows_that_were_read_here_go_to_a_process_that_is_not_forked(values, files):
    """Such a process gets the Dataset in bytes, and not what is in its files."""
    rows = arrays.load(**values)
    first = rows[0]
    there = pickle.loads(pickle.dumps(rows))
    assert len(there) == 4
    read = there[0]
    for key in first if isinstance(first, dict) else range(2):
        assert read[key].tolist() == first[key].tolist()

    np.lib.format.open_memmap("large.npy", mode="w+", dtype=np.uint8, shape=(1000, 1000)).flush()
    assert len(pickle.dumps(arrays.load("large.npy", memory_map=True))) < 1000


def test_damaged_bytes_in_an_archive_are_told(files):
    """Every eighth byte of the archive is damaged in turn; what can still be read is an array."""
    whole = Path("small.npz").read_bytes()
    refused = 0
    places = range(0, len(whole), 8)
    for place in places:
        Path("harmed.npz").write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
        try:
            arrays.load("harmed.npz")
        except UserError as error:
            assert "harmed.npz" in str(error)
            refused += 1
    assert refused > len(places) / 2


def test_a_head_that_is_no_python_is_told(files):
    whole = Path("x.npy").read_bytes()
    Path("harmed.npy").write_bytes(whole[:12] + b"(" + whole[13:])
    with pytest.raises(UserError, match=r"harmed\.npy cannot be read"):
        arrays.load("harmed.npy")


def test_numbers_in_another_order_of_bytes_are_turned_round(files):
    """As programs in Fortran and Java write them. torch takes only the machine's own."""
    np.save("big.npy", X.astype(">f4"))
    example = arrays.load("big.npy", memory_map=True)[1]
    assert torch.from_numpy(example).tolist() == X[1].tolist()


def test_a_link_in_a_file_leads_to_its_array(files):
    h5py = pytest.importorskip("h5py")
    with h5py.File("linked.h5", "w") as file:
        file["there"] = Y
        file["soft"] = h5py.SoftLink("/there")
        file["external"] = h5py.ExternalLink("xy.h5", "inner/x")
    for memory_map in (False, True):
        read = arrays.load("linked.h5", names=["external", "soft"], memory_map=memory_map)
        x, y = read[1] if memory_map else (read[0][1], read[1][1])
        assert (x.tolist(), y.tolist()) == (X[1].tolist(), Y[1])
    assert arrays.load("linked.h5").tolist() == Y.tolist()  # what is linked is not there twice


def test_a_file_in_a_folder_that_may_not_be_looked_into_is_said(closed):
    with pytest.raises(UserError, match=r"closed/x\.npy cannot be read \(Permission denied\)"):
        arrays.load(str(closed / "x.npy"))


def test_a_file_with_one_array_gives_that_array(files):
    assert arrays.load("y.npy").tolist() == Y.tolist()
    assert arrays.load("xy.npz", names=["y"]).tolist() == Y.tolist()


def test_a_memory_mapped_file_is_not_read_whole(files):
    """A file of 64 GiB that has no block on the disk: to read it would take minutes, or all memory."""
    np.lib.format.open_memmap("large.npy", mode="w+", dtype=np.uint8, shape=(1 << 20, 1 << 16)).flush()
    rows = arrays.load("large.npy", memory_map=True)
    assert len(rows) == 1 << 20
    assert rows[(1 << 20) - 1].nbytes == 1 << 16


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"path": "z.npy"}, r"z\.npy is missing: give the path of a file with arrays"),
        ({"path": "xy.txt"}, r"has none of the suffixes \.npy, \.npz, \.h5"),
        (
            {"path": "xy.npz", "names": ["X"]},
            r"xy\.npz has no array X: names may be x, y\. Did you mean x\?",
        ),
        ({"path": "xy.npz", "memory_map": True}, r"cannot be memory-mapped, because \.npz is an archive"),
        ({"path": ["xy.npz"]}, r"xy\.npz is no \.npy file"),
        ({"path": ["x.npy"], "names": ["x"]}, "names goes with one .npz or HDF5 file"),
        ({"path": "objects.npy"}, r"objects\.npy cannot be read \(Object arrays cannot be loaded"),
        ({"path": "broken.npz"}, r"broken\.npz cannot be read \(File is not a zip file"),
        ({"path": "broken.h5"}, r"broken\.h5 cannot be read"),
        ({"path": "cut.npy", "memory_map": True}, r"cut\.npy cannot be read"),
        ({"path": ["x.npy", "five.npy"], "memory_map": True}, "The arrays have 4, 5 entries"),
    ],
)
def test_a_file_that_cannot_be_used_is_said(values, said, files):
    np.save("objects.npy", np.array([{"a": 1}], dtype=object), allow_pickle=True)
    np.save("five.npy", np.zeros(5))
    for name in ("broken.npz", "broken.h5", "xy.txt"):
        Path(name).write_text("no arrays")
    Path("cut.npy").write_bytes(Path("x.npy").read_bytes()[:-5])
    with pytest.raises(UserError, match=said):
        arrays.load(**values)


def test_without_h5py_its_name_is_told(files, monkeypatch):
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(
        UserError, match=r"xy\.h5 needs the package h5py, which is not installed: pip install h5py"
    ):
        arrays.load("xy.h5")


def opened(made: Any, **section: Any) -> Any:
    """The part "test" of data that one rank holds, made by a function of this module."""
    given = {"test": {"_target_": f"{__name__}.made"}, **section}
    made_here["test"] = made
    progress = SimpleNamespace(limits=SimpleNamespace(start_s=600), phase=lambda *_: nullcontext())
    runtime = SimpleNamespace(
        progress=progress,
        all_or_none=nullcontext,
        meeting=SimpleNamespace(from_rank_0=lambda work: json.loads(json.dumps(work()))),
        is_main=True,
        device=CPU,
        broadcast=lambda tensor: tensor,
    )
    return loader.open_part("test", given, runtime, 0, torch.float64, is_labelled="classes" in section)


made_here: dict[str, Any] = {}


def made() -> Any:
    return made_here["test"]


def test_arrays_of_all_types_become_batches_in_their_form():
    values = {
        "half": np.ones((3, 2), np.float16),
        "swapped": np.arange(3, dtype=">i4"),
        "flag": np.array([True, False, True]),
        "pair": (np.arange(3, dtype=np.uint8), np.ones(3, np.complex64)),
    }
    part = opened(values)
    assert isinstance(part, Table)
    [batch] = part.batches([[2, 0]], seed=0)
    assert (batch["half"].dtype, batch["half"].shape) == (torch.float64, (2, 2))  # as the weights
    assert (batch["swapped"].dtype, batch["swapped"].tolist()) == (torch.int32, [2, 0])
    assert (batch["flag"].dtype, batch["flag"].tolist()) == (torch.bool, [True, True])
    assert [each.dtype for each in batch["pair"]] == [torch.uint8, torch.complex64]
    assert batch["pair"][0].tolist() == [2, 0]


def test_a_dict_of_arrays_keeps_its_keys_and_a_named_tuple_its_names():
    array = np.arange(3)
    part = opened({0: array, np.int64(7): Pair(array, (array,)), True: [array], "8": {2.5: array}})
    [batch] = part.batches([[2]], seed=0)
    assert list(batch) == [0, 7, True, "8"]
    assert [type(key) for key in batch] == [int, int, bool, str]
    assert (batch[7].x.tolist(), batch[7].y[0].tolist(), batch[7]._fields) == ([2], [2], ("x", "y"))
    assert (batch[True][0].tolist(), batch["8"][2.5].tolist()) == ([2], [2])


def test_a_classification_takes_arrays_of_other_types_than_bytes():
    images = np.full((3, 4, 4), 0.5, np.float32)
    section = {"classes": 2, "input_shape": [1, 4, 4]}
    first = opened((images, np.array([0, 1, 1])), **section).first(2, seed=0)
    assert (first.images.dtype, first.images.shape) == (torch.float64, (2, 1, 4, 4))
    assert (first.labels.dtype, first.labels.tolist()) == (torch.int64, [0, 1])
    of_bytes = opened(((images * 510).astype(np.uint8), np.array([0, 1, 1])), **section)
    assert of_bytes.first(1, seed=0).images.unique().tolist() == [1.0]
    with pytest.raises(UserError, match=r"data\.test has a label 2, but data\.classes=2"):
        opened((images, np.array([0, 1, 2])), **section)
    with pytest.raises(UserError, match=r"data\.test has a label -1, but labels count from 0"):
        opened((images, np.array([0, 1, -1])), **section)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ((np.zeros(3), np.zeros(4)), r"gives a tuple \(float64 \[3\], float64 \[4\]\): each array"),
        ({"x": np.array(3.0)}, "each array must have one entry"),
        ({"x": np.array(["a", "b"])}, "an array of type <U1, which torch does not take"),
        (7, "data.test made an int: it must be arrays of numpy, a map-style Dataset"),
    ],
)  # fmt: skip
def test_arrays_that_make_no_examples_are_refused(values, said):
    with pytest.raises(UserError, match=said):
        opened(values)


# --- batches that are nests ------------------------------------------------------------------------------


class Pair(NamedTuple):
    x: Any
    y: Any


@dataclass
class Record:
    x: Any
    name: str


class Graph:
    """An object of a user's own, as a library for graphs has it."""

    def __init__(self, edges: torch.Tensor) -> None:
        self.edges = edges
        self.device = "nowhere"

    def to(self, device: torch.device) -> Graph:
        moved = Graph(self.edges)
        moved.device = str(device)
        return moved


def joined(graphs: list[Graph], more: int = 0) -> Graph:
    """Several graphs as one: what a `collate` of a library for graphs does."""
    return Graph(torch.cat([graph.edges for graph in graphs]) + more)


class Joining:
    def __init__(self, more: int) -> None:
        self.more = more

    def __call__(self, graphs: list[Graph]) -> Graph:
        return joined(graphs, self.more)


ONE = torch.ones(2, dtype=torch.float32)


def batch_of(item: Any, **more: Any) -> Any:
    [batch] = Mapped([item, item], [0, 1], 0, form(**more)).batches([[0, 1]], seed=0)
    return batch


def test_a_batch_keeps_the_form_of_its_examples():
    nest = {"list": [ONE, (ONE, 3)], "pair": Pair(ONE, "text"), "number": 2.5}
    batch = batch_of(nest)
    assert (batch["list"][0].dtype, batch["list"][0].shape) == (torch.float64, (2, 2))
    assert batch["list"][1][1].tolist() == [3, 3]
    assert isinstance(batch["pair"], Pair) and batch["pair"].x.dtype == torch.float64
    assert list(batch["pair"].y) == ["text", "text"]
    assert (batch["number"].dtype, batch["number"].tolist()) == (torch.float64, [2.5, 2.5])


def test_a_dataclass_and_an_object_go_to_the_device_by_a_collate_of_ones_own():
    record = batch_of(
        Record(ONE, "a"), collate=lambda items: Record(torch.stack([i.x for i in items]), "b")
    )
    assert (record.x.dtype, record.x.shape, record.name) == (torch.float64, (2, 2), "b")
    graph = batch_of(Graph(torch.zeros(3)), collate=joined)
    assert (graph.device, graph.edges.shape) == ("cpu", (6,))


def test_collate_is_named_in_the_section():
    graphs = [Graph(torch.zeros(1)), Graph(torch.ones(1))]
    for target in ("joined", "Joining"):
        part = opened(graphs, collate={"_target_": f"{__name__}.{target}", "more": 5})
        assert part.first(2, seed=0).edges.tolist() == [5, 6]
    with pytest.raises(UserError, match=r"data\.collate\._target_=.*join cannot be loaded"):
        opened(graphs, collate={"_target_": f"{__name__}.join"})


def test_a_batch_of_any_form_is_cut_into_shares():
    nest = {"record": Record(X, "a"), "pair": Pair([Y, 2.5], ["p", "q", "r", "s"])}
    assert batches.length_of(nest) == 4
    share = batches.taken(nest, slice(1, 3), 4)
    assert share["record"].x.tolist() == X[1:3].tolist() and share["record"].name == "a"
    assert isinstance(share["pair"], Pair)
    assert share["pair"].x[0].tolist() == [6, 7] and share["pair"].x[1] == 2.5
    assert share["pair"].y == ["q", "r"]
    with pytest.raises(UserError, match=r"A part of the batch, float32 \[2\], does not"):
        batches.taken({"x": X, "other": (ONE, "c")}, slice(1, 3), 4)


def test_what_a_batch_is_can_be_told():
    told = nests.described
    assert told(torch.zeros(2, 3)) == "float32 [2, 3]"
    assert told((torch.zeros(2), [3, "a"])) == "a tuple (float32 [2], (int, str))"
    assert told({"x": np.zeros(2)}) == "a dict (x: float64 [2])"
    assert told(Record(torch.zeros(1), "a")) == "a Record (x: float32 [1], name: str)"
    assert told(Graph(ONE)) == "a Graph"
    assert (
        told(dict.fromkeys(range(9), 0)) == "a dict (0: int, 1: int, 2: int, 3: int, 4: int, 5: int, ...)"
    )


# --- streams ---------------------------------------------------------------------------------------------


class Counting(IterableDataset):
    """The numbers from 0, each with a number that is drawn at random beside it."""

    def __init__(self, count: int, shares_out: bool = False) -> None:
        self.count = count
        self.shares_out = shares_out
        self.epoch = -1

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __iter__(self):
        worker = get_worker_info()
        step = worker.num_workers if worker and self.shares_out else 1
        for number in range(0, self.count, step):
            yield number + 1000 * self.epoch, torch.rand(1).item()


def read(
    part: Streamed, ranks: int, batch_size: int, epoch: int = 0, first_step: int = 0
) -> list[list[Any]]:
    """For each step the examples that count, of all ranks, in the order of the stream."""
    steps: list[list[Any]] = []
    for rank in range(ranks):
        batches = training_batches(part, rank_of(rank, ranks), batch_size, epoch, 3, first_step=first_step)
        for number, (batch,) in enumerate(batches):
            numbers, drawn = (torch.cat([piece.examples[i] for piece in batch.pieces]) for i in (0, 1))
            if rank == 0:
                steps.append([])
            steps[number] += list(zip(numbers.tolist(), drawn.tolist(), strict=True))[: batch.count]
    return [sorted(step) for step in steps]


@given(count=st.integers(1, 60), ranks=st.integers(1, 7), batch_size=st.integers(7, 70))
@settings(max_examples=60)
def test_each_example_of_a_stream_is_used_once_in_its_own_order(count, ranks, batch_size):
    part = Streamed(Counting(count), range(count), 0, form())
    steps = read(part, ranks, batch_size)
    assert len(steps) == steps_per_epoch(count, batch_size)
    assert [number for step in steps for number, _ in step] == list(range(count))
    # Also what the stream draws at random does not depend on the ranks, nor on where an epoch is entered.
    assert steps == read(part, 1, batch_size)
    assert read(part, ranks, batch_size, first_step=len(steps) // 2) == steps[len(steps) // 2 :]
    later = read(part, ranks, batch_size, epoch=2)
    assert [number for step in later for number, _ in step] == [2000 + n for n in range(count)]
    assert later[0][0][1] != steps[0][0][1]


def test_an_evaluation_takes_each_example_of_a_stream_once():
    part = Streamed(Counting(20), range(5, 20), 0, form())
    seen = []
    for rank in range(4):
        for _, piece in evaluation_batches(part, rank_of(rank, 4), seed=0):
            seen += piece.examples[0].tolist()
    assert sorted(seen) == list(range(5, 20))


@pytest.mark.parametrize("workers", [1, 2])
def test_worker_processes_read_a_stream_in_the_same_order(workers):
    here = Streamed(Counting(23), range(23), 0, form())
    there = Streamed(Counting(23), range(23), workers, form())
    assert read(there, 1, 5) == read(here, 1, 5)


def test_a_stream_that_ends_too_early_is_said():
    with pytest.raises(
        UserError, match=r"data\.train ended after 9 examples, but example number 10 is needed"
    ):
        read(Streamed(Counting(9), range(12), 0, form()), 1, 4)
    with pytest.raises(UserError, match="must not share them out to ranks or worker processes by itself"):
        read(Streamed(Counting(12, shares_out=True), range(12), 2, form()), 1, 4)


@pytest.mark.parametrize("error", [TypeError, NotImplementedError, AssertionError])
def test_a_stream_that_does_not_know_its_length_is_counted(error):
    class Unsure(Counting):
        def __len__(self) -> int:
            raise error

    assert len(opened(Unsure(17))) == 17
    assert len(opened(ChainDataset([Counting(17), Counting(3)]))) == 20


def test_a_limit_beyond_the_examples_names_what_says_how_many_they_are():
    opening = Opening({"split": [3, 2]}, SimpleNamespace(device=CPU), 0, torch.float32, is_labelled=False)
    whole, whole_val = _Arrays(torch.arange(5), 5), _Arrays(torch.arange(2), 2)
    with pytest.raises(
        UserError, match=r"limit_train=9 is more than the 3 training examples of data\.split"
    ):
        loader._split(whole, None, opening, limit_train=9)
    with pytest.raises(
        UserError, match=r"limit_train=9 is more than the 5 training examples of data\.train"
    ):
        loader._split(whole, whole_val, opening, limit_train=9)


def test_a_stream_has_as_many_examples_as_are_counted_or_as_the_split_says():
    assert len(opened(Counting(17))) == 17
    section = {"split": [10, 5], "train": {}}
    assert loader._stream_count(Counting(100), "train", section) == 15
    assert loader._stream_count(Counting(100), "train", {**section, "val": {}}) == 15
    assert loader._stream_count(Counting(100), "train", {"val": {"_target_": "x"}}) == 100
    with pytest.raises(UserError, match=r"data\.train is an IterableDataset: give data\.split"):
        loader._stream_count(Counting(100), "train", {})
