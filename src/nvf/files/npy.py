"""Readers of vectors and targets in .npy files; every fault is an InputError that names the file, the row and the fix.

The memory takes its vectors from an `ArrayFile`, a block at a time. Files are read, never mapped, because the process
dies where a mapped file is cut short. No pickle is loaded, and no room is made that the file's size cannot fill.
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

HEADER = 2**16 + 16  # bytes; a longer header is refused before it is read, by numpy only afterwards


class ArrayFile:
    """A .npy file whose header is checked, and whose values stay on disk until they are read.

    Args:
        path: where the file is.
        what: what it holds, for an error's message.

    Raises:
        InputError: no file, another format, Python objects or records, or fewer values than the header claims.
    """

    def __init__(self, path: Path, what: str) -> None:
        if not path.is_file():
            raise InputError(f"{path} is missing; it holds {what}")
        self.path = path
        try:
            with path.open("rb") as file:
                self._state = state_of(os.fstat(file.fileno()))
                start = io.BytesIO(file.read(HEADER))
            read = {(1, 0): npy_format.read_array_header_1_0, (2, 0): npy_format.read_array_header_2_0}
            self.shape, self._columns_first, self._stored = read[npy_format.read_magic(start)](start)
            self._offset = start.tell()
            negative, plain = min(self.shape, default=0) < 0, self._stored.kind != "V" and not self._stored.hasobject
            size = self._state[-1]
            if negative or not plain or math.prod(self.shape) * self._stored.itemsize > size - self._offset:
                claims = f"its header claims shape {self.shape} and type {self._stored}"
                raise ValueError(f"{claims}, which {size:,} bytes do not hold, or which are no plain values")
        except Exception as fault:  # numpy, its tokenizer and Python's parser raise many types for a damaged header
            raise InputError(
                f"{path} is truncated or not a plain .npy array ({one_line(fault)}); write it with numpy.save"
            ) from None
        self.dtype = self._stored.newbyteorder("=")

    def __len__(self) -> int:
        return self.shape[0]

    def read(self) -> np.ndarray:
        """Return all values, of which there must be at least one."""
        (array,) = self.blocks(len(self))
        return array

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Yield at most `rows` rows at a time, each block a new array; every call starts at the first row.

        Raises:
            InputError: the file has changed since it was opened, or changes until the last block is read.
        """
        with self.path.open("rb") as file:
            self._check_unchanged(file)
            for start in range(0, len(self), rows):
                yield self._rows(file, start, min(rows, len(self) - start))
            self._check_unchanged(file)

    def _rows(self, file: IO[bytes], start: int, size: int) -> np.ndarray:
        columns = math.prod(self.shape[1:])
        if self._columns_first:
            values = np.stack([self._values(file, n * len(self) + start, size) for n in range(columns)], axis=-1)
        else:
            values = self._values(file, start * columns, size * columns)
        return np.ascontiguousarray(values.reshape(size, *self.shape[1:]), self.dtype)

    def _values(self, file: IO[bytes], first: int, count: int) -> np.ndarray:
        file.seek(self._offset + first * self._stored.itemsize)
        values = np.fromfile(file, self._stored, count)
        self._check_unchanged(file, missing=count - len(values))
        return values

    def _check_unchanged(self, file: IO[bytes], missing: int = 0) -> None:
        if missing or state_of(os.fstat(file.fileno())) != self._state:
            raise InputError(f"{self.path} changed while it was read; start again when nothing writes to it")


def read_vectors(path: Path, what: str) -> Tensor:
    """Read a matrix of vectors, (n, D) float16/32/64, none of them zero or not finite."""
    vectors = torch.from_numpy(open_vectors(path, what).read())
    check_vectors(vectors, str(path))
    return vectors


def open_vectors(path: Path, what: str) -> ArrayFile:
    """Open a matrix of vectors whose values are neither read nor checked yet."""
    array = ArrayFile(path, what)
    if len(array.shape) != 2 or 0 in array.shape:
        raise InputError(f"{path}: shape {array.shape}; give {what} as a non-empty (n, D) matrix")
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise InputError(f"{path}: type {array.dtype}; give {what} as float16, float32 or float64")
    return array


def read_targets(path: Path, what: str, queries: int) -> np.ndarray:
    """Read the targets of `queries` queries, (n, m) integers padded with -1; `what` says what the integers are."""
    targets = ArrayFile(path, f"for each query the {what} of its target")
    if targets.dtype.kind not in "iu":
        raise InputError(f"{path}: type {targets.dtype}; give integers, each the {what} of a target")
    if len(targets.shape) not in (1, 2) or 0 in targets.shape:
        raise InputError(f"{path}: shape {targets.shape}; give (n,) or (n, m), padded with -1")
    if len(targets) != queries:
        raise InputError(f"{path}: {len(targets)} targets for {queries} queries; give each query its targets")
    return targets.read().reshape(queries, -1)
