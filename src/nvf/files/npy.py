"""Vectors and targets in .npy files; every fault raises an InputError that names the file, the row and the remedy.

Files are read, never mapped: of a mapped one that is cut short meanwhile, the process would die. No pickle is loaded,
and nothing is allocated that the file is not long enough to fill.
"""

import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
import torch
from numpy.lib import format as npy_format
from torch import Tensor

from nvf.errors import InputError, one_line
from nvf.files.mapped_rows import state_of
from nvf.files.vectors import check_vectors

HEADER = 2**16 + 16  # bytes: numpy refuses longer headers too, but only once it has read them
REMEDY = "write it with numpy.save"


class ArrayFile:
    """A .npy file whose header is checked, and whose values stay on disk until they are asked for.

    Args:
        path: of the file.
        what: it holds, for an error.

    Raises:
        InputError: no file, another format, Python objects or records, or fewer values than the header claims.
    """

    def __init__(self, path: Path, what: str) -> None:
        if not path.is_file():
            raise InputError(f"{path} is missing; it holds {what}")
        try:
            with path.open("rb") as file:
                self._state = state_of(os.fstat(file.fileno()))
                start = file.read(HEADER)
            if start.startswith(b"PK"):
                raise InputError(f"{path} is an archive of arrays; write the one array with numpy.save")
            self.shape, self._columns_first, self._stored, self._offset = _header(start, self._state[-1])
        except InputError:
            raise
        except Exception as fault:  # numpy, its tokenizer and Python's parser raise many types for a damaged header
            raise InputError(f"{path} is truncated or not a plain .npy array ({one_line(fault)}); {REMEDY}") from None
        self.path = path
        self.dtype = self._stored.newbyteorder("=")

    def __len__(self) -> int:
        return self.shape[0]

    def read(self) -> np.ndarray:
        """All values, at least one, in an array of their own."""
        (array,) = self.blocks(len(self))
        return array

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """At most so many rows at a time, each block an array of its own; starts anew with every call.

        Raises:
            InputError: the file has changed since it was opened, or changes until the last block is read.
        """
        count = self.shape[0]
        with self.path.open("rb") as file:
            self._check_same(file)
            for start in range(0, count, rows):
                yield self._take(file, start, min(rows, count - start))
            self._check_same(file)

    def _take(self, file: IO[bytes], start: int, size: int) -> np.ndarray:
        """So many rows, where columns come first a piece of each column after the other, and no more of the file."""
        columns = math.prod(self.shape[1:])
        if self._columns_first:
            pieces = np.empty((columns, size), self._stored)
            for column, piece in enumerate(pieces):
                self._fill(file, column * self.shape[0] + start, piece)
            array = pieces.T.reshape(size, *self.shape[1:])
        else:
            array = np.empty((size, *self.shape[1:]), self._stored)
            self._fill(file, start * columns, array.reshape(-1))
        return np.ascontiguousarray(array, self.dtype)

    def _fill(self, file: IO[bytes], first: int, values: np.ndarray) -> None:
        """Fill a row of values with those from the first one on."""
        file.seek(self._offset + first * self._stored.itemsize)
        if file.readinto(values.view(np.uint8)) < values.nbytes:  # type: ignore[attr-defined]
            self._refuse()

    def _check_same(self, file: IO[bytes]) -> None:
        if state_of(os.fstat(file.fileno())) != self._state:
            self._refuse()

    def _refuse(self) -> None:
        raise InputError(f"{self.path} changed while it was read; start again when nothing writes to it")


def read_vectors(path: Path, what: str) -> Tensor:
    """A matrix of vectors, (n, D) float16/32/64, none of them zero or not finite."""
    vectors = torch.from_numpy(open_vectors(path, what).read())
    check_vectors(vectors, str(path))
    return vectors


def open_vectors(path: Path, what: str) -> ArrayFile:
    """The same, its values unread and unchecked: they stay on disk until they are used."""
    array = ArrayFile(path, what)
    if len(array.shape) != 2 or 0 in array.shape:
        raise InputError(f"{path}: shape {array.shape}; give {what} as a non-empty (n, D) matrix")
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise InputError(f"{path}: type {array.dtype}; give {what} as float16, float32 or float64")
    return array


def read_targets(path: Path, what: str, queries: int) -> np.ndarray:
    """The targets of so many queries, (n, m) integers padded with -1; `what` says what the integers are."""
    targets = ArrayFile(path, f"for each query the {what} of its target")
    if targets.dtype.kind not in "iu":
        raise InputError(f"{path}: type {targets.dtype}; give integers, each the {what} of a target")
    if len(targets.shape) not in (1, 2) or 0 in targets.shape:
        raise InputError(f"{path}: shape {targets.shape}; give (n,) or (n, m), padded with -1")
    if len(targets) != queries:
        raise InputError(f"{path}: {len(targets)} targets for {queries} queries; give each query its targets")
    return targets.read().reshape(queries, -1)


def _header(start: bytes, size: int) -> tuple[tuple[int, ...], bool, np.dtype, int]:
    """Shape, whether columns come first, type and the values' offset, by the start of a file of so many bytes."""
    file = io.BytesIO(start)
    version = npy_format.read_magic(file)
    if version not in ((1, 0), (2, 0)):
        raise ValueError(f"version {version} is for records")
    read = npy_format.read_array_header_1_0 if version == (1, 0) else npy_format.read_array_header_2_0
    shape, columns_first, dtype = read(file)
    if dtype.hasobject or dtype.kind == "V":
        raise ValueError(f"it holds {'Python objects' if dtype.hasobject else 'records'}, which are not read")
    if not all(0 <= length < 2**63 for length in shape):
        raise ValueError("a length is negative, or beyond 64 bits")
    claimed, there = math.prod(shape) * dtype.itemsize, size - file.tell()
    if claimed > there:
        raise ValueError(
            f"its header claims shape {shape} and type {dtype}, {claimed:,} bytes; the file has {size:,}, "
            f"{there:,} of them values"
        )
    return shape, columns_first, dtype, file.tell()
