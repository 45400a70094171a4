"""Training, validation and test: how recorded queries are split, and which of them are repeated."""

from collections.abc import Mapping
from itertools import combinations
from operator import itemgetter
from pathlib import Path

import numpy as np
import torch

from nvf.data.queries import QueryBatch, each
from nvf.errors import InputError
from nvf.files.ids import padded
from nvf.files.vectors import factorize, row_hashes
from nvf.ops.random_streams import stream_seed

SPLITS = ("train", "val", "test")
SHARES = (0.8, 0.1, 0.1)


def deal(
    batch: QueryBatch, path: Path, seed: int, times: np.ndarray | None = None
) -> dict[str, tuple[QueryBatch, np.ndarray]]:
    """Merge identical queries, shuffle them by seed, and deal them to the three splits.

    Where `times`, (n,), say when each query was asked, training comes before validation and this before the test; a
    repeated query counts as of its first time, and the shuffle decides between equal times. Each split has its queries
    and the places of their first lines.
    """
    by_time = np.arange(len(batch.queries)) if times is None else np.argsort(times, kind="stable")
    if times is not None:
        batch, times = each(batch, itemgetter(by_time)), times[by_time]
    distinct, first = merge(batch)
    order = np.random.default_rng(stream_seed(seed, "split")).permutation(len(first))
    if times is not None:
        order = np.lexsort((order, times[first]))
    ends = np.ceil(np.cumsum(SHARES) * len(first) - 1e-9).astype(int)
    if not 0 < ends[0] < ends[1] < ends[2]:
        raise InputError(f"{path}: {len(first)} distinct queries leave a split empty; record at least 10")
    parts = np.split(order, ends[:2])
    return {name: (each(distinct, itemgetter(of)), by_time[first[of]]) for name, of in zip(SPLITS, parts, strict=True)}


def repeats(splits: Mapping[str, QueryBatch]) -> dict[str, int]:
    """Count, for each pair "a/b" of splits that share queries, those of b that equal one of a in every bit."""
    bits = {name: row_hashes(splits[name].queries) for name in SPLITS}
    counts = {f"{a}/{b}": int(np.isin(bits[b], bits[a]).sum()) for a, b in combinations(SPLITS, 2)}
    return {pair: count for pair, count in counts.items() if count}


def merge(batch: QueryBatch) -> tuple[QueryBatch, np.ndarray]:
    """Return each different query, to the last bit, with all its targets, and the place of its first line, (n,)."""
    query = factorize(row_hashes(batch.queries))
    first = np.unique(query, return_index=True)[1]
    if len(first) == len(query):
        return batch, first
    place, column = np.nonzero(batch.targets.numpy() >= 0)
    given = [query[place], batch.targets.numpy()[place, column]]
    pairs, of_pair = np.unique(given, axis=1, return_inverse=True)  # sorted by query
    counts, gains = np.bincount(pairs[0]), None
    if batch.gains is not None:
        most = np.zeros(pairs.shape[1], np.float32)  # what any of the lines says that the pair is worth
        np.maximum.at(most, of_pair.reshape(-1), batch.gains.numpy()[place, column])
        gains = torch.from_numpy(padded(most, counts)).clamp(min=0)
    return QueryBatch(batch.queries[first], torch.from_numpy(padded(pairs[1], counts)), gains=gains), first
