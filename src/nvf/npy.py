"""Vectors and targets in .npy files; every fault raises an InputError that names the file, the row and the remedy."""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nvf.errors import InputError
from nvf.memory import check_vectors, from_numpy


def read_vectors(path: Path, what: str) -> Tensor:
    """A matrix of vectors, (n, D) float16/32/64, none of them zero or not finite."""
    vectors = from_numpy(open_vectors(path, what))
    check_vectors(vectors, str(path))
    return vectors


def map_vectors(path: Path, what: str) -> Tensor:
    """The same, on disk until they are used, and not checked for zeros, NaN and infinity."""
    array = open_vectors(path, what)
    return torch.from_numpy(array) if array.dtype.isnative else from_numpy(array)


def open_vectors(path: Path, what: str) -> np.ndarray:
    """The same, its values unread and unchecked: they stay on disk until they are used."""
    array = _open_array(path, what)
    if array.ndim != 2 or array.size == 0:
        raise InputError(f"{path}: shape {array.shape}; give {what} as a non-empty (n, D) matrix")
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise InputError(f"{path}: type {array.dtype}; give {what} as float16, float32 or float64")
    return array


def read_targets(path: Path, what: str, queries: int) -> np.ndarray:
    """The targets of so many queries, (n, m) integers padded with -1; `what` says what the integers are."""
    targets = _open_array(path, f"for each query the {what} of its target")
    if targets.dtype.kind not in "iu":
        raise InputError(f"{path}: type {targets.dtype}; give integers, each the {what} of a target")
    if targets.ndim not in (1, 2) or targets.size == 0:
        raise InputError(f"{path}: shape {targets.shape}; give (n,) or (n, m), padded with -1")
    if len(targets) != queries:
        raise InputError(f"{path}: {len(targets)} targets for {queries} queries; give each query its targets")
    return np.array(targets).reshape(queries, -1)


def _open_array(path: Path, what: str) -> np.ndarray:
    if not path.is_file():
        raise InputError(f"{path} is missing; it holds {what}")
    try:
        array = np.load(path, mmap_mode="c", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as fault:
        raise InputError(f"{path} is truncated or not a plain .npy array ({fault}); write it with numpy.save") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} is an archive of arrays; write the one array with numpy.save")
    return array
