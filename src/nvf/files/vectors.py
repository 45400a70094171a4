"""Vectors from files or callers: the checks before anything uses them, and which are equal in every bit."""

import hashlib
import math

import numpy as np
import torch
from torch import Tensor

from nvf.errors import InputError
from nvf.files.mapped_rows import as_bytes

BLOCK = 2**22  # numbers held at a time; 16 MB of float32


def from_numpy(array: np.ndarray) -> Tensor:
    """Copy an array of any byte order into a tensor."""
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


def check_vectors(vectors: Tensor, name: str, ids: np.ndarray | None = None) -> None:
    """Raise an InputError that names the first row that is zero or not finite, if there is one."""
    check_largest(largest(vectors), name, ids)


def largest(vectors: Tensor) -> Tensor:
    """Return each row's largest absolute value, (n,), which is NaN where any value of the row is NaN."""
    size = max(1, BLOCK // max(1, vectors.shape[1]))
    if len(vectors) <= size:
        return torch.linalg.vector_norm(vectors, math.inf, dim=-1)
    return torch.cat([largest(part) for part in vectors.split(size)])


def check_largest(values: Tensor, name: str, ids: np.ndarray | None = None) -> None:
    """Do what `check_vectors` does, given what `largest` returns for vectors that are never held all at once."""
    if not len(values) or all(0 < float(extreme) < math.inf for extreme in torch.aminmax(values)):  # NaN if any is
        return
    for fault, wrong in (("holds NaN or infinite values", ~values.isfinite()), ("is zero", values == 0)):
        if wrong.any():
            row = int(wrong.nonzero()[0])
            known = "" if ids is None else f" (id {ids[row]})"
            raise InputError(f"{name}: row {row}{known} {fault} ({int(wrong.sum())} such rows); remove or repair them")


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
