"""Training, validation and test: how recorded queries are split, and which of them stand in several splits."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from nvf.errors import InputError
from nvf.queries import QueryBatch
from nvf.streams import stream_seed

SPLITS = ("train", "val", "test")
SHARES = (0.8, 0.1, 0.1)


def deal(pair: QueryBatch, path: Path, seed: int, times: np.ndarray | None = None) -> dict[str, QueryBatch]:
    """Shuffle the distinct queries by seed, then deal whole groups of identical ones to the three splits.

    Where `times`, (n,), say when each query was asked, the groups go by the first time of each instead, so that
    training comes before validation and this before the test; the shuffle decides between equal times.

    Raises:
        InputError: too few distinct queries for three splits; names `path`, the file that holds them.
    """
    distinct, group = np.unique(pair.queries.numpy(), axis=0, return_inverse=True)
    places = np.random.default_rng(stream_seed(seed, "split")).permutation(len(distinct))
    if times is not None:
        by_time = np.lexsort((places[group.reshape(-1)], times))
        _, first = np.unique(group.reshape(-1)[by_time], return_index=True)
        places = first.argsort().argsort()
    order = places[group.reshape(-1)]  # of each query, the place of its group
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
                f"{path}: {len(distinct)} distinct queries leave the {name} split empty; "
                f"record at least 10, or give the splits as train_{path.name} and so on"
            )
    return splits


def repeats(splits: Mapping[str, QueryBatch]) -> dict[str, int]:
    """For each pair "a/b" of splits that share queries, how many of b's are equal to one of a's in every bit.

    Pairs come in the order train/val, train/test, val/test; those that share nothing are left out.
    """
    bits = {name: _bits(splits[name].queries) for name in SPLITS}
    counts = {f"{a}/{b}": int(np.isin(bits[b], bits[a]).sum()) for a, b in combinations(SPLITS, 2)}
    return {pair: count for pair, count in counts.items() if count}


def _bits(queries: Tensor) -> np.ndarray:
    """Each query as one opaque value, (B,)."""
    rows = np.ascontiguousarray(queries.numpy() + np.float32(0))  # the sum has no -0, which equals 0 in other bits
    return rows.view(f"V{rows.itemsize * rows.shape[1]}").reshape(-1)
