"""An index as plain tensors: what it adds to the keys, and the FAISS object that is made of it again.

FAISS reads its own files in C++ and trusts them; a forged one could lead a search out of its memory. Here every number
that a search follows is checked, and the keys are the pipeline's own.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

BLOCK = 65_536  # keys at a time


def packed(faiss: Any, made: Any, kind: str) -> dict[str, Tensor]:
    """Return the tensors of which `unpacked` makes the same index.

    For `ivf` they are the centroids, (nlist, D'), and each key's cell, (N,). For `hnsw` they are each key's number of
    levels, (N,), the keys' neighbours in one list, level by level and padded with -1, and the key where searches begin.
    """
    if kind == "ivf":
        centroids = faiss.downcast_index(made.quantizer).reconstruct_n(0, made.nlist)
        cells = np.zeros(made.ntotal, np.int64)
        for cell in range(made.nlist):
            if size := made.invlists.list_size(cell):
                cells[faiss.rev_swig_ptr(made.invlists.get_ids(cell), size)] = cell
        return {"centroids": torch.from_numpy(centroids), "cells": torch.from_numpy(cells)}
    graph = made.hnsw
    arrays = {"levels": faiss.vector_to_array(graph.levels), "neighbors": faiss.vector_to_array(graph.neighbors)}
    entry = torch.tensor([graph.entry_point], dtype=torch.int32)
    return {**{name: torch.from_numpy(array) for name, array in arrays.items()}, "entry": entry}


def unpacked(faiss: Any, tensors: dict[str, Tensor], kind: str, settings: dict[str, Any], keys: np.ndarray) -> Any:
    """Make the FAISS object over the keys, (N, D') float32; a ValueError for tensors that are not from `packed`."""
    return (_ivf if kind == "ivf" else _hnsw)(faiss, tensors, settings, keys)


def _ivf(faiss: Any, tensors: dict[str, Tensor], settings: dict[str, Any], keys: np.ndarray) -> Any:
    (count, dim), nlist = keys.shape, settings["nlist"]
    if nlist is None or settings["nprobe"] > nlist:
        raise ValueError(f"{settings} are not those of an index")
    centroids = _taken(tensors, "centroids", (nlist, dim), torch.float32)
    cells = _taken(tensors, "cells", (count,), torch.int64, 0, nlist)
    if not np.isfinite(centroids).all():
        raise ValueError("centroids have NaN or infinite values")
    cells_of = faiss.IndexFlatIP(dim)
    cells_of.add(centroids)
    made = faiss.IndexIVFFlat(cells_of, dim, nlist, faiss.METRIC_INNER_PRODUCT)
    made.is_trained = True
    for start in range(0, count, BLOCK):
        some, of_some = keys[start : start + BLOCK], cells[start : start + BLOCK]
        made.add_core(len(some), faiss.swig_ptr(some), None, faiss.swig_ptr(of_some))
    return made


def _hnsw(faiss: Any, tensors: dict[str, Tensor], settings: dict[str, Any], keys: np.ndarray) -> Any:
    count, dim = keys.shape
    made = faiss.IndexHNSWFlat(dim, settings["m"], faiss.METRIC_INNER_PRODUCT)
    made.hnsw.efConstruction = settings["ef_construction"]
    starts = faiss.vector_to_array(made.hnsw.cum_nneighbor_per_level).astype(np.int64)  # of a key's levels
    levels = _taken(tensors, "levels", (count,), torch.int32, 1, made.hnsw.assign_probas.size() + 1)
    offsets = np.concatenate([[0], np.cumsum(starts[levels])])
    neighbors = _taken(tensors, "neighbors", (int(offsets[-1]),), torch.int32, -1, count)
    entry = _taken(tensors, "entry", (1,), torch.int32, 0, count)
    if levels[entry[0]] != levels.max():
        raise ValueError("entry is no key of the highest level")
    for level in range(levels.max()):
        present = np.flatnonzero(levels > level)
        slots = np.arange(starts[level], starts[level + 1])
        for start in range(0, len(present), BLOCK):
            theirs = neighbors[offsets[present[start : start + BLOCK], None] + slots]
            if (levels[theirs] <= level)[theirs >= 0].any():  # a search would read slots that they do not have
                raise ValueError(f"neighbors of level {level} are not all on that level")
    for start in range(0, count, BLOCK):
        faiss.downcast_index(made.storage).add(keys[start : start + BLOCK])
    for name, array in (("levels", levels), ("offsets", offsets.astype(np.uint64)), ("neighbors", neighbors)):
        faiss.copy_array_to_vector(array, getattr(made.hnsw, name))
    made.hnsw.entry_point, made.hnsw.max_level = int(entry[0]), int(levels.max()) - 1
    made.ntotal = count
    return made


def _taken(
    tensors: dict[str, Tensor], name: str, shape: tuple[int, ...], dtype: torch.dtype, least: int = 0, end: int = 0
) -> np.ndarray:
    """Return the tensor's array; a ValueError for another shape or type, or values outside least..end - 1."""
    tensor = tensors.get(name)
    if tensor is None or tensor.shape != shape or tensor.dtype != dtype:
        found = "missing" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"
        raise ValueError(f"{name} is {found}, but should be {shape} {dtype}")
    array: np.ndarray = tensor.contiguous().numpy()
    if end and len(array) and not least <= array.min() <= array.max() < end:
        raise ValueError(f"{name} has {array.min()} to {array.max()}, but should have {least} to {end - 1}")
    return array
