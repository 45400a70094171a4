"""Which rows are equal in every bit."""

import hashlib

import numpy as np
from torch import Tensor

from nvf.files.mapped_rows import as_bytes


def row_hashes(rows: Tensor) -> np.ndarray:
    """Return 16 bytes for each row, (n,), which are equal for rows that are equal in every bit; -0 counts as 0."""
    data = as_bytes(rows + 0.0)
    size = len(data) // max(1, len(rows))
    hashes = (hashlib.blake2b(data[at : at + size], digest_size=16).digest() for at in range(0, len(data), size))
    return np.frombuffer(b"".join(hashes), "V16")


def factorize(values: np.ndarray) -> np.ndarray:
    """Number the different values in the order of their first appearance, (n,) int64, as `pandas.factorize` does."""
    _, first, group = np.unique(values, return_index=True, return_inverse=True)
    return first.argsort().argsort()[group]
