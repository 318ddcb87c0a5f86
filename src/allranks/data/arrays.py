"""Arrays of any types from files: .npy, .npz and HDF5. Needs numpy, and h5py for HDF5; no torch.

    train: {_target_: allranks.data.arrays.load, path: [x.npy, y.npy]}
    train: {_target_: allranks.data.arrays.load, path: train.npz, names: [x, y]}
    train: {_target_: allranks.data.arrays.load, path: train.h5, names: {image: scans, target: masks}}

The first entry of each array belongs to the first example, and so on. As a rule rank 0 reads the arrays,
and they are held in memory on each rank's device. With `memory_map: true` nothing is read at the start:
each rank reads the examples that it needs from the file, when it needs them.
"""

from __future__ import annotations

import os
import stat
import tokenize
import zipfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from allranks.base.errors import UserError
from allranks.base.files import with_home
from allranks.base.text import did_you_mean, one_line

# Which arrays of a file are taken, and in which form they come: load() explains it.
Names = str | Sequence[str] | Mapping[str, str] | None

HDF5 = (".h5", ".hdf5", ".hdf", ".nc")


def load(
    path: str | Sequence[str] | Mapping[str, str],
    names: Names = None,
    memory_map: bool = False,
) -> Any:
    """The arrays in a file, or in several .npy files.

    `path` is one file, a list of .npy files, or a dict of them. The arrays come in the same form: one
    array, a tuple, or a dict. `names` says which arrays of an .npz or HDF5 file are taken: one name gives
    that array, a list of names gives a tuple in this order, a dict gives a dict with other keys. Without
    `names` all arrays come, as a dict by name, or the array alone where there is only one.

    With `memory_map` an object with a length and examples is returned, which reads each example from its
    file. An .npz file cannot be read that way. Raises UserError.
    """
    if not isinstance(path, str):
        if names is not None:
            raise UserError(
                "names goes with one .npz or HDF5 file: leave it out where path has several .npy."
            )
        pairs = path.items() if isinstance(path, Mapping) else enumerate(path)
        found: dict[Any, Any] = {key: _npy(_existing(each), memory_map) for key, each in pairs}
        arrays = found if isinstance(path, Mapping) else tuple(found.values())
        return Rows(arrays) if memory_map else arrays

    file = _existing(path)
    if file.suffix == ".npy":
        array = _npy(file, memory_map)
        return Rows(array) if memory_map else array
    if file.suffix == ".npz":
        if memory_map:
            raise UserError(
                f"{path} cannot be memory-mapped, because .npz is an archive: save each array as .npy, or "
                "leave memory_map out."
            )
        return _chosen(path, _npz(file), names)
    if file.suffix in HDF5:
        return RowsOfHDF5(str(file), names) if memory_map else _hdf5(str(file), names)
    raise UserError(f"{path} has none of the suffixes .npy, .npz, {', '.join(HDF5)}.")


def _existing(path: str) -> Path:
    """The file at this path. Raises UserError if there is none, or if it may not be looked for."""
    file = Path(with_home("path", path))
    try:
        is_file = stat.S_ISREG(file.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError):
        is_file = False
    except OSError as error:
        raise UserError(
            f"{file.absolute()} cannot be read ({error.strerror}): give the path of a file with arrays."
        ) from error
    if not is_file:
        raise UserError(f"{file.absolute()} is missing: give the path of a file with arrays.")
    return file


# The header of a .npy file is a Python expression, which NumPy parses. So a damaged header may raise any
# error that Python's parser raises.
_DAMAGED = (OSError, ValueError, EOFError, SyntaxError, tokenize.TokenError, MemoryError, RecursionError)


def _npy(file: Path, memory_map: bool) -> np.ndarray:
    if file.suffix != ".npy":
        raise UserError(f"{file} is no .npy file: several files are given as .npy, one array each.")
    try:
        if memory_map:
            return npy.open_memmap(file, mode="r")
        with file.open("rb") as stream:
            return npy.read_array(stream, allow_pickle=False)
    except _DAMAGED as error:
        raise _unreadable(file, error) from error


def _npz(file: Path) -> dict[str, np.ndarray]:
    """All arrays of the archive, by name."""
    found = {}
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.namelist():
                with archive.open(member) as stream:
                    found[member.removesuffix(".npy")] = npy.read_array(stream, allow_pickle=False)
    except (*_DAMAGED, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        # RuntimeError: damaged bytes may say that the archive is encrypted, or packed in an unknown way
        raise _unreadable(file, error) from error
    return found


def _unreadable(file: Path | str, error: Exception) -> UserError:
    return UserError(
        f"{file} cannot be read ({one_line(error)}): give a file that numpy or h5py has written, with "
        "arrays of numbers."
    )


def _chosen(path: str, arrays: Mapping[str, Any], names: Names) -> Any:
    """Those of the file's arrays that `names` asks for, in the form that it asks for."""
    if names is None:
        return next(iter(arrays.values())) if len(arrays) == 1 else dict(arrays)
    if isinstance(names, str):
        names = [names]
    asked = list(names.values() if isinstance(names, Mapping) else names)
    for name in asked:
        if name not in arrays:
            there = ", ".join(sorted(arrays)) or "none"
            raise UserError(
                f"{path} has no array {name}: names may be {there}.{did_you_mean(name, list(arrays))}"
            )
    if isinstance(names, Mapping):
        return {key: arrays[name] for key, name in names.items()}
    return arrays[asked[0]] if len(asked) == 1 else tuple(arrays[name] for name in asked)


# --- HDF5 ----------------------------------------------------------------------------------------------


def _open_hdf5(path: str) -> Any:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise UserError(
            f"{path} needs the package h5py, which is not installed: pip install h5py."
        ) from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise _unreadable(path, error) from error


def _datasets(file: Any, names: Names) -> dict[str, Any]:
    """All data sets of an HDF5 file, by their path in it, such as `group/x`.

    A data set to which only a link leads is left out, unless `names` has the path of the link: it has
    another path in this file, or stands in another file.
    """
    import h5py

    found: dict[str, Any] = {}

    def note(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = item

    file.visititems(note)
    asked = [names] if isinstance(names, str) else names or []
    for name in asked.values() if isinstance(asked, Mapping) else asked:
        note(name, file.get(name))
    return found


def _hdf5(path: str, names: Names) -> Any:
    with _open_hdf5(path) as file:
        chosen = _chosen(path, _datasets(file, names), names)
        try:
            return _each(chosen, lambda dataset: np.asarray(dataset[()]))
        except OSError as error:
            raise _unreadable(path, error) from error


# --- examples read one by one ----------------------------------------------------------------------------


class Rows:
    """The examples of memory-mapped arrays: a map-style Dataset."""

    def __init__(self, arrays: Any) -> None:
        self.arrays = arrays
        self._length = _common_length(arrays)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        return _each(self.arrays, lambda array: _example(array, index))

    def __getstate__(self) -> Any:
        """What a worker process that is not forked gets: names of files, and not all that is in them."""
        return _each(self.arrays, lambda array: str(array.filename))

    def __setstate__(self, paths: Any) -> None:
        """Maps the files again, in the worker process."""
        self.arrays = _each(paths, lambda path: _npy(Path(path), memory_map=True))
        self._length = _common_length(self.arrays)


class RowsOfHDF5:
    """The examples of arrays in an HDF5 file: a map-style Dataset.

    Each process opens the file for itself when it reads its first example. HDF5 does not allow that two
    processes share an open file.
    """

    def __init__(self, path: str, names: Names) -> None:
        self.path = path
        self.names = names
        self._process_id = 0  # the process that has opened the file
        self._arrays: Any = None
        with _open_hdf5(path) as file:
            self._length = _common_length(_chosen(path, _datasets(file, names), names))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Any:
        if self._process_id != os.getpid():
            arrays = _datasets(_open_hdf5(self.path), self.names)
            self._arrays = _chosen(self.path, arrays, self.names)
            self._process_id = os.getpid()
        return _each(self._arrays, lambda array: _example(array, index))

    def __getstate__(self) -> dict[str, Any]:
        """What a worker process that is not forked gets: all but the open file, which stays here."""
        return {**self.__dict__, "_process_id": 0, "_arrays": None}


def _example(array: Any, index: int) -> np.ndarray:
    """A copy of one example, with its numbers in this machine's order of bytes: torch takes no other."""
    example = np.array(array[index])
    return example.astype(example.dtype.newbyteorder("="), copy=False)


def _each(arrays: Any, read: Any) -> Any:
    """One array, a tuple or a dict of arrays, with `read` applied to each."""
    if isinstance(arrays, dict):
        return {key: read(array) for key, array in arrays.items()}
    if isinstance(arrays, tuple):
        return tuple(read(array) for array in arrays)
    return read(arrays)


def _common_length(arrays: Any) -> int:
    """The number of examples: the length of each array; raises UserError where they differ."""
    lengths: list[int] = []
    _each(arrays, lambda array: lengths.append(len(array) if array.shape else -1))
    if len(set(lengths)) != 1 or lengths[0] < 0:
        raise UserError(
            f"The arrays have {', '.join(map(str, lengths))} entries: each must have one entry for each "
            "example, and so all the same length."
        )
    return lengths[0]
