"""Vectors from elsewhere: as tensors, and checked for what no vector may be."""

import numpy as np
import torch
from torch import Tensor

from nvf.errors import InputError

BLOCK = 2**22  # numbers that are held at a time


def from_numpy(array: np.ndarray) -> Tensor:
    """A tensor of its own with the array's values, whatever their byte order."""
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


def check_vectors(vectors: Tensor, name: str, ids: np.ndarray | None = None) -> None:
    """Raise an InputError that names the first row, if any, that is zero or not finite."""
    check_largest(largest(vectors), name, ids)


def largest(vectors: Tensor) -> Tensor:
    """Each row's largest absolute value, (n,); NaN where any of the row's is."""
    return torch.cat([part.abs().amax(dim=-1) for part in vectors.split(max(1, BLOCK // max(1, vectors.shape[1])))])


def check_largest(values: Tensor, name: str, ids: np.ndarray | None = None) -> None:
    """The check of `check_vectors` by what `largest` says of the rows, for vectors that are never held at once."""
    for fault, wrong in (("holds NaN or infinite values", ~values.isfinite()), ("is zero", values == 0)):
        if wrong.any():
            row = int(wrong.nonzero()[0])
            known = "" if ids is None else f" (id {ids[row]})"
            raise InputError(f"{name}: row {row}{known} {fault} ({int(wrong.sum())} such rows); remove or repair them")
