"""A file of query vectors, .npy or .parquet, which is checked once and then read a block at a time."""

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

CHECK_BLOCK = 8192  # vectors


@dataclass(frozen=True)
class VectorFile:
    """Vectors that stay on disk; `blocks` yields at most so many at a time, (b, D), and starts anew with every call."""

    count: int
    blocks: Callable[[int], Iterator[np.ndarray]]


def open_vectors(path: Path, column: str, *, dim: int) -> VectorFile:
    """Open and check the vectors of a .npy file, or of a column of lists in a .parquet file, (n, dim).

    Raises:
        InputError: a missing or damaged file, another type, shape or dimension, a row that is zero or not finite.
    """
    blocks: Callable[[int], Iterator[np.ndarray]]
    if path.suffix == ".npy":
        blocks = npy.open_vectors(path, "the vectors of your queries").blocks
    elif path.suffix == ".parquet":
        from nvf.data.parquet import vector_blocks  # needs pyarrow, which is an extra

        blocks = partial(vector_blocks, path, column)
    else:
        raise InputError(f"{path}: {path.suffix or 'no ending'} is not read; give .npy or .parquet")
    peaks = []
    for block in blocks(CHECK_BLOCK):
        check_dim(block.shape[1], dim, str(path))
        peaks.append(largest(from_numpy(block)))
    values = torch.cat(peaks)
    check_largest(values, str(path))
    return VectorFile(len(values), blocks)
