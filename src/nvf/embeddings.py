"""A folder of the user's own embeddings, checked at the door.

    corpus.npy                                                  (N, D) float16/32/64
    queries.npy, targets.npy                                    (n, D), and (n,) or (n, m) int rows padded with -1
    or {train,val,test}_queries.npy, {train,val,test}_targets.npy

Every fault raises an InputError that names the file, the row where there is one, and the remedy.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nvf.errors import InputError
from nvf.memory import VectorMemory, check_vectors, from_numpy, unit
from nvf.queries import QueryBatch, Recorded
from nvf.streams import stream_seed

SPLITS = ("train", "val", "test")
SHARES = (0.8, 0.1, 0.1)


def read_memory(folder: str | Path) -> VectorMemory:
    """The corpus of a folder as a memory, (N, D)."""
    path = Path(folder) / "corpus.npy"
    return VectorMemory(_read_vectors(path, "the vectors of your items"))


def read_recorded(folder: str | Path, memory: VectorMemory, *, seed: int) -> Recorded:
    """The queries of a folder: the user's splits, or 80/10/10 by seed with identical queries kept together."""
    folder = Path(folder)
    named = [f"{split}_{part}.npy" for split in SPLITS for part in ("queries", "targets")]
    whole = ["queries.npy", "targets.npy"]
    given = [name for name in named + whole if (folder / name).exists()]
    if set(given) & set(named) and set(given) & set(whole):
        raise InputError(f"{folder} holds both {given[0]} and {given[-1]}; keep either your splits or the whole")
    if not set(given) & set(named):
        pair = _read_pair(folder / "queries.npy", folder / "targets.npy", memory)
        return Recorded(memory, _split(pair, folder, seed))
    return Recorded(
        memory,
        {
            split: _read_pair(folder / f"{split}_queries.npy", folder / f"{split}_targets.npy", memory)
            for split in SPLITS
        },
    )


def _read_pair(queries_path: Path, targets_path: Path, memory: VectorMemory) -> QueryBatch:
    queries = _read_vectors(queries_path, "the vectors of your queries")
    targets = read_array(targets_path, "for each query the row of corpus.npy that answers it")
    if queries.shape[1] != memory.dim:
        raise InputError(
            f"{queries_path}: {queries.shape[1]} dimensions, but corpus.npy has {memory.dim}; "
            "embed both with the same model"
        )
    if targets.dtype.kind not in "iu":
        raise InputError(f"{targets_path}: type {targets.dtype}; give integer rows of corpus.npy")
    if targets.ndim not in (1, 2) or targets.size == 0:
        raise InputError(f"{targets_path}: shape {targets.shape}; give (n,) or (n, m) rows, padded with -1")
    if len(targets) != len(queries):
        raise InputError(
            f"{targets_path}: {len(targets)} targets, but {queries_path.name} has {len(queries)} queries; "
            "give each query its targets"
        )
    rows = np.array(targets, dtype=np.int64).reshape(len(targets), -1)
    for fault, wrong in (
        (f"is outside 0..{len(memory) - 1} (-1 pads)", (rows < -1) | (rows >= len(memory))),
        ("has no target", np.broadcast_to((rows < 0).all(axis=1, keepdims=True), rows.shape)),
    ):
        if wrong.any():
            row, column = np.argwhere(wrong)[0]
            raise InputError(
                f"{targets_path}: row {row}: target {rows[row, column]} {fault}; correct or remove this query"
            )
    return QueryBatch(unit(queries), torch.from_numpy(rows))


def _read_vectors(path: Path, what: str) -> Tensor:
    array = read_array(path, what)
    if array.ndim != 2 or array.size == 0:
        raise InputError(f"{path}: shape {array.shape}; give {what} as a non-empty (n, D) matrix")
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise InputError(f"{path}: type {array.dtype}; give {what} as float16, float32 or float64")
    vectors = from_numpy(array)
    check_vectors(vectors, str(path))
    return vectors


def read_array(path: Path, what: str) -> np.ndarray:
    """The array of a .npy file, mapped and not read; `what` it holds is for the error where it is missing."""
    if not path.is_file():
        raise InputError(f"{path} is missing; it holds {what}")
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, OSError, EOFError, SyntaxError) as fault:
        raise InputError(f"{path} is truncated or not a plain .npy array ({fault}); write it with numpy.save") from None
    if not isinstance(array, np.ndarray):
        raise InputError(f"{path} is an archive of arrays; write the one array with numpy.save")
    return array


def _split(pair: QueryBatch, folder: Path, seed: int) -> dict[str, QueryBatch]:
    """Shuffle the distinct queries by seed, then deal whole groups of identical ones to the three splits."""
    distinct, group = np.unique(pair.queries.numpy(), axis=0, return_inverse=True)
    places = np.random.default_rng(stream_seed(seed, "split")).permutation(len(distinct))
    order = places[group.reshape(-1)]  # of each query, the place of its group in the shuffle
    by_place = np.argsort(order, kind="stable")
    share_before = np.searchsorted(np.sort(order), order) / len(order)  # of the queries, those in earlier groups
    bounds = np.cumsum(SHARES)
    which = np.searchsorted(bounds[:-1], share_before, side="right")
    splits = {
        name: QueryBatch(*(part[torch.from_numpy(by_place[which[by_place] == i])] for part in pair))
        for i, name in enumerate(SPLITS)
    }
    for name, split in splits.items():
        if len(split.queries) == 0:
            raise InputError(
                f"{folder / 'queries.npy'}: {len(distinct)} distinct queries leave the {name} split empty; "
                "record at least 10, or give the splits as train_queries.npy and so on"
            )
    return splits
