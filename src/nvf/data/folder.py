"""Readers of a folder of the user's own embeddings, which is either all .npy or all .parquet.

    corpus.npy                                                  (N, D) float16/32/64
    ids.json                                                    if the rows have ids: a list of integers or strings
    queries.npy, targets.npy                                    (n, D), and (n,) or (n, m) int rows padded with -1
    times.npy                                                   optional, (n,) numbers: when each query was asked
    or {train,val,test}_queries.npy, {train,val,test}_targets.npy

    corpus.parquet                                              columns id, integer or string, and vector
    queries.parquet                                             columns vector and targets, an id or a list of ids,
                                                                and a time, if data.columns.time names it
    or {train,val,test}_queries.parquet

Every fault is an InputError that names the file, the row where there is one, and the fix.
"""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nvf.data.queries import QueryBatch, Recorded
from nvf.data.splits import SPLITS, deal, merge, repeats
from nvf.errors import InputError
from nvf.files import npy
from nvf.files.ids import FILE, plain_uuid, read_ids, target_rows
from nvf.models.memory import VectorMemory, check_dim, unit

PARTS = {"npy": ("queries.npy", "targets.npy"), "parquet": ("queries.parquet",)}
TIMES = "times.npy"
COLUMNS: Mapping[str, Any] = {"id": "id", "vector": "vector", "targets": "targets", "time": None}
log = logging.getLogger("nvf")


def read_memory(folder: str | Path, *, columns: Mapping[str, str] = COLUMNS, **stored: Any) -> VectorMemory:
    """Read the corpus of a folder as a memory, (N, D) distinct rows, with the ids that the folder gives its vectors.

    `stored` may say how the memory keeps its rows, `dtype` and `mapped`; a corpus.npy is read in blocks.
    """
    folder = Path(folder)
    if _corpus_format(folder) == "parquet":
        from nvf.data.parquet import read_corpus  # needs pyarrow, which is an extra

        rows, ids = read_corpus(folder / "corpus.parquet", columns)
        return VectorMemory(rows, ids=ids, distinct=True, **stored)
    path, what = folder / "corpus.npy", "the vectors of your items"
    vectors = npy.open_vectors(path, what if path.exists() else f"{what}; corpus.parquet would do as well")
    given = read_ids(folder / FILE, len(vectors)) if (folder / FILE).exists() else None
    return VectorMemory(vectors, ids=given, distinct=True, **stored)


def read_recorded(
    folder: str | Path,
    memory: VectorMemory,
    *,
    seed: int,
    columns: Mapping[str, str] = COLUMNS,
    by_id: bool = False,
) -> Recorded:
    """Read the queries of a folder: the user's splits, or 80/10/10 by time or by seed; identical queries are one.

    Args:
        by_id: whether the memory is from elsewhere, so that targets.npy holds ids, as .parquet files always do, and
            the queries may be in either format.
    """
    folder = Path(folder)
    names = _given_queries(folder)
    corpus = None if by_id else _corpus_format(folder)
    kind = names[0].rpartition(".")[2] if names else corpus or "parquet"
    if corpus not in (None, kind):
        raise InputError(f"{folder} holds corpus.{corpus}, but {names[0]}; give both as .npy or both as .parquet")
    column = columns.get("time")
    if not names or names[0] in PARTS[kind]:
        given = [_read_pair(folder, "", kind, memory, columns, by_id)]
        times = _read_times(folder, kind, column, len(given[0].queries))
        splits = deal(given[0], folder / PARTS[kind][0], seed, times)
        duplicates = {}
    elif column is not None or (folder / TIMES).exists():
        named = f"data.columns.time={column}" if column is not None else folder / TIMES
        raise InputError(f"{named} splits queries, but {folder} holds splits, {names[0]}; keep one of them")
    else:
        given = [_read_pair(folder, f"{split}_", kind, memory, columns, by_id) for split in SPLITS]
        splits = {split: merge(batch)[0] for split, batch in zip(SPLITS, given, strict=True)}
        duplicates = repeats(splits)
    merged = sum(len(batch.queries) for batch in given) - sum(len(batch.queries) for batch in splits.values())
    if merged:
        log.info("%s: %d queries equal an earlier one; each is one query, with the targets of all", folder, merged)
    if duplicates:
        pairs = [(pair.split("/"), count) for pair, count in duplicates.items()]
        shared = [f"{count} of {len(splits[b].queries)} {b} queries are also in {a}" for (a, b), count in pairs]
        log.warning(
            "%s: %s; they were seen before, so the figures flatter what new queries will find; "
            "remove them from one split, or give all queries in one file and let NVF split them",
            folder,
            ", ".join(shared),
        )
    return Recorded(memory, splits, duplicates, merged)


def _corpus_format(folder: Path) -> str:
    given = [kind for kind in PARTS if (folder / f"corpus.{kind}").exists()]
    if len(given) > 1:
        raise InputError(f"{folder} holds both corpus.npy and corpus.parquet; keep the one that is meant")
    return given[0] if given else "npy"


def _given_queries(folder: Path) -> list[str]:
    """Return the names of the files that hold queries and targets, all of one format, and split or not."""
    names = [name for parts in PARTS.values() for name in parts]
    undivided = [name for name in names if (folder / name).exists()]
    divided = [f"{split}_{name}" for name in names for split in SPLITS if (folder / f"{split}_{name}").exists()]
    if undivided and divided:
        raise InputError(
            f"{folder} holds both {divided[0]} and {undivided[0]}; keep either your splits or the one file"
        )
    given = divided or undivided
    if len({Path(name).suffix for name in given}) > 1:
        raise InputError(f"{folder} holds both {given[0]} and {given[-1]}; keep one format")
    return given


def _read_pair(
    folder: Path, prefix: str, kind: str, memory: VectorMemory, columns: Mapping[str, str], by_id: bool
) -> QueryBatch:
    path = targets_path = folder / f"{prefix}queries.{kind}"
    ids: np.ndarray | range | None = memory.ids
    if kind == "parquet":
        from nvf.data.parquet import read_queries  # needs pyarrow, which is an extra

        queries, targets, counts = read_queries(path, columns)
        if by_id:
            targets = np.array([plain_uuid(name) for name in targets.tolist()], dtype=object)
    else:
        targets_path = folder / f"{prefix}targets.npy"
        queries = npy.read_vectors(path, "the vectors of your queries")
        table = npy.read_targets(targets_path, "id" if by_id else "row of corpus.npy", len(queries))
        targets, counts = table[table != -1], (table != -1).sum(axis=1)
        ids = ids if by_id else range(memory.given)
    rows = target_rows(ids, targets, counts, str(targets_path))
    if rows.shape[1] == memory.given > 2 and (rows >= 0).all() and len(np.unique(rows)) <= 2:
        raise InputError(
            f"{targets_path}: targets of shape {rows.shape}, of two kinds, are a relevance matrix; give each query the "
            "rows or ids of its ones alone, padded with -1"
        )
    rows = memory.rows_of(torch.from_numpy(rows)).numpy()
    check_dim(queries.shape[1], memory.dim, str(path))
    if (lonely := (rows < 0).all(axis=1)).any():
        raise InputError(f"{targets_path}: row {lonely.argmax()} has no target; give it one or remove this query")
    return QueryBatch(unit(queries), torch.from_numpy(_once(rows)))


def _read_times(folder: Path, kind: str, column: str | None, count: int) -> np.ndarray | None:
    """Read when each query was asked, (n,), numbers or dates; None where the folder does not say."""
    path = folder / TIMES
    if column is not None and kind == "npy":
        raise InputError(f"data.columns.time={column} names a column of .parquet files; write {path} instead")
    if column is not None:
        from nvf.data.parquet import read_times  # needs pyarrow, which is an extra

        path = folder / PARTS[kind][0]
        name, times = f"{path}: column {column!r}", read_times(path, column)
    elif path.exists():
        name, times = str(path), npy.ArrayFile(path, "when each query was asked").read()
    else:
        return None
    if times.dtype.kind not in "iufM" or times.shape != (count,):
        raise InputError(
            f"{name}: shape {times.shape} and type {times.dtype} for {count} queries; give one number a query, (n,)"
        )
    if (wrong := ~np.isfinite(times)).any():
        raise InputError(f"{name}: row {wrong.argmax()} is {times[wrong.argmax()]}; correct or remove this query")
    return times


def _once(rows: np.ndarray) -> np.ndarray:
    """Replace a row that a query's targets, (n, m), name again by padding."""
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -1
    once = np.empty_like(rows)
    np.put_along_axis(once, order, ordered, axis=1)
    return once
