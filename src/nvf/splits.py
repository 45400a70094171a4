"""Training, validation and test: how recorded queries are split, and which of them stand there several times."""

from collections.abc import Mapping
from itertools import combinations
from pathlib import Path

import numpy as np
import torch

from nvf.errors import InputError
from nvf.ids import padded
from nvf.memory import alike, row_hashes
from nvf.queries import QueryBatch
from nvf.streams import stream_seed

SPLITS = ("train", "val", "test")
SHARES = (0.8, 0.1, 0.1)


def deal(pair: QueryBatch, path: Path, seed: int) -> dict[str, QueryBatch]:
    """Shuffle the distinct queries by seed, then deal whole groups of identical ones to the three splits.

    Raises:
        InputError: too few distinct queries for three splits; names `path`, the file that holds them.
    """
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
                f"{path}: {len(distinct)} distinct queries leave the {name} split empty; "
                f"record at least 10, or give the splits as train_{path.name} and so on"
            )
    return splits


def repeats(splits: Mapping[str, QueryBatch]) -> dict[str, int]:
    """For each pair "a/b" of splits that share queries, how many of b's are equal to one of a's in every bit.

    Pairs come in the order train/val, train/test, val/test; those that share nothing are left out.
    """
    bits = {name: row_hashes(splits[name].queries) for name in SPLITS}
    counts = {f"{a}/{b}": int(np.isin(bits[b], bits[a]).sum()) for a, b in combinations(SPLITS, 2)}
    return {pair: count for pair, count in counts.items() if count}


def merge(batch: QueryBatch) -> QueryBatch:
    """Each different query once, where it first stands, with the targets of all queries that equal it in every bit."""
    query = alike(row_hashes(batch.queries))
    first = np.unique(query, return_index=True)[1]
    if len(first) == len(query):
        return batch
    place, column = np.nonzero(batch.targets.numpy() >= 0)
    pairs = np.unique([query[place], batch.targets.numpy()[place, column]], axis=1)  # sorted by query
    return QueryBatch(batch.queries[first], torch.from_numpy(padded(pairs[1], np.bincount(pairs[0]))))
