"""A file of query vectors, read a block at a time: .npy or .parquet."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from nvf.errors import InputError
from nvf.files import npy
from nvf.files.vectors import check_largest, from_numpy, largest
from nvf.models.memory import check_dim

CHECK_BLOCK = 8192


@dataclass(frozen=True)
class VectorFile:
    """Vectors that stay on disk."""

    count: int
    blocks: Callable[[int], Iterator[np.ndarray]]  # of at most so many rows, (b, D); starts anew with every call


def open_vectors(path: Path, column: str, *, dim: int) -> VectorFile:
    """The vectors of a .npy file, or of a column of lists in a .parquet file, (n, dim); every one is checked.

    Raises:
        InputError: a missing or damaged file, another type, shape or dimension, a row that is zero or not finite.
    """
    blocks = _reader(path, column)
    found = []
    for block in blocks(CHECK_BLOCK):
        check_dim(block.shape[1], dim, str(path))
        found.append(largest(from_numpy(block)))
    values = torch.cat(found)
    check_largest(values, str(path))
    return VectorFile(len(values), blocks)


def _reader(path: Path, column: str) -> Callable[[int], Iterator[np.ndarray]]:
    if path.suffix == ".npy":
        return npy.open_vectors(path, "the vectors of your queries").blocks
    if path.suffix == ".parquet":
        from nvf.data.parquet import vector_blocks  # needs pyarrow, which is an extra

        return partial(vector_blocks, path, column)
    raise InputError(f"{path}: {path.suffix or 'no ending'} is not read; give .npy or .parquet")
