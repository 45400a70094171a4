"""Arrays in files that are read a block at a time, never memory-mapped: cutting a mapped file kills the process."""

import io
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from numpy.lib import format as npy_format

from nvf.errors import InputError, refused
from nvf.files.mapped_rows import state_of

HEADER = 2**16 + 16  # bytes; numpy would read a longer header before it refuses it
ROWS = 8192  # in a block, where it does not matter how many


class ArrayFile:
    """An array in a file, (n, ...), whose values stay on disk until they are read."""

    path: Path
    shape: tuple[int, ...]
    dtype: np.dtype

    def __len__(self) -> int:
        return self.shape[0]

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        """Yield at most `rows` rows at a time, each block a new array; a damaged or changed file is an InputError."""
        raise NotImplementedError

    def read(self) -> np.ndarray:
        """Return all values."""
        return np.concatenate([np.empty((0, *self.shape[1:]), self.dtype), *self.blocks(ROWS)])


class NpyFile(ArrayFile):
    """A .npy file of `what`, as large as its header claims, so no memory is taken for what is not there; no pickle."""

    def __init__(self, path: Path, what: str) -> None:
        if not path.is_file():
            raise InputError(f"{path} is missing; it holds {what}")
        self.path = path
        # All exceptions: numpy, its tokenizer and Python's parser raise many types for a damaged header.
        with refused(f"{path} is truncated or not a plain .npy array", "write it with numpy.save"):
            with path.open("rb") as file:
                self._state = state_of(os.fstat(file.fileno()))
                start = io.BytesIO(file.read(HEADER))
            read = {1: npy_format.read_array_header_1_0, 2: npy_format.read_array_header_2_0}
            self.shape, self._columns_first, self._stored = read[npy_format.read_magic(start)[0]](start)
            self._offset, size = start.tell(), self._state[-1]
            plain = self._stored.kind != "V" and not self._stored.hasobject and min(self.shape) >= 0
            if not plain or math.prod(self.shape) * self._stored.itemsize > size - self._offset:
                raise ValueError(f"{size:,} bytes do not hold plain values, {self.shape} {self._stored}, as it claims")
        self.dtype = self._stored.newbyteorder("=")

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        columns = math.prod(self.shape[1:])
        with self.path.open("rb") as file:
            for start in range(0, len(self), rows):
                size = min(rows, len(self) - start)
                if self._columns_first:
                    firsts = range(start, start + columns * len(self), len(self))
                    values = np.stack([self._values(file, first, size) for first in firsts], axis=-1)
                else:
                    values = self._values(file, start * columns, size * columns)
                yield np.ascontiguousarray(values.reshape(size, *self.shape[1:]), self.dtype)
            self._values(file, 0, 0)  # the file may have changed since the last block was yielded

    def _values(self, file: IO[bytes], first: int, count: int) -> np.ndarray:
        file.seek(self._offset + first * self._stored.itemsize)
        values = np.fromfile(file, self._stored, count)
        if len(values) < count or state_of(os.fstat(file.fileno())) != self._state:
            raise InputError(f"{self.path} changed while it was read; start again when nothing writes to it")
        return values


def open_vectors(path: Path, what: str) -> NpyFile:
    """Open a matrix of vectors, (n, D) float16, float32 or float64, whose values are neither read nor checked yet."""
    array = NpyFile(path, what)
    if len(array.shape) != 2 or 0 in array.shape or array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise InputError(f"{path}: {array.shape} {array.dtype}; give {what}, (n, D) float16, float32 or float64")
    return array
