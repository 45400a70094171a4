"""A folder of the user's own embeddings, checked at the door; either all .npy or all .parquet.

    corpus.npy                                                  (N, D) float16/32/64
    ids.json                                                    if the rows have ids: a list of integers or strings
    queries.npy, targets.npy                                    (n, D), and (n,) or (n, m) int rows padded with -1
    times.npy                                                   optional, (n,) numbers: when each query was asked
    or {train,val,test}_queries.npy, {train,val,test}_targets.npy

    corpus.parquet                                              columns id, integer or string, and vector
    queries.parquet                                             columns vector and targets, an id or a list of ids,
                                                                and a time, if data.columns.time names it
    or {train,val,test}_queries.parquet

Every fault raises an InputError that names the file, the row where there is one, and the remedy.
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
    """The corpus of a folder as a memory, (N, D) distinct rows, with the ids that the folder gives its vectors.

    `stored` may say how the memory keeps its rows, `dtype` and `mapped`; of a corpus.npy no whole copy is made.
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
    """The queries of a folder, in which identical ones are one: the user's splits, or 80/10/10 by time or by seed.

    Args:
        by_id: the memory is not from this folder, so that targets.npy holds ids, as .parquet files always do, and
            the queries may be in either format.
    """
    folder = Path(folder)
    names = _given_queries(folder)
    corpus = None if by_id else _corpus_format(folder)
    kind = names[0].rpartition(".")[2] if names else corpus or "parquet"
    if corpus not in (None, kind):
        raise InputError(f"{folder} holds corpus.{corpus}, but {names[0]}; give both as .npy or both as .parquet")

    whole, column = not names or names[0] in PARTS[kind], columns.get("time")
    if not whole and (column is not None or (folder / TIMES).exists()):
        named = f"data.columns.time={column}" if column is not None else folder / TIMES
        raise InputError(f"{named} splits queries, but {folder} holds splits, {names[0]}; keep one of them")
    prefixes = [""] if whole else [f"{split}_" for split in SPLITS]
    given = [_read_pair(folder, prefix, kind, memory, columns, by_id) for prefix in prefixes]
    if whole:
        times = _read_times(folder, kind, column, len(given[0].queries))
        splits = deal(given[0], folder / PARTS[kind][0], seed, times)
    else:
        splits = {split: merge(batch)[0] for split, batch in zip(SPLITS, given, strict=True)}
    merged = sum(len(batch.queries) for batch in given) - sum(len(batch.queries) for batch in splits.values())
    if merged:
        log.info("%s: %d queries equal an earlier one; each is one query, with the targets of all", folder, merged)
    if whole:
        return Recorded(memory, splits, merged=merged)
    duplicates = repeats(splits)
    if duplicates:
        log.warning("%s: %s", folder, _warn_of(duplicates, splits))
    return Recorded(memory, splits, duplicates, merged)


def _corpus_format(folder: Path) -> str:
    given = [kind for kind in PARTS if (folder / f"corpus.{kind}").exists()]
    if len(given) > 1:
        raise InputError(f"{folder} holds both corpus.npy and corpus.parquet; keep the one that is meant")
    return given[0] if given else "npy"


def _given_queries(folder: Path) -> list[str]:
    """The names of the files that hold queries and targets; of one format, and either the user's splits or not."""
    whole = [name for parts in PARTS.values() for name in parts]
    splits = [f"{split}_{name}" for name in whole for split in SPLITS]
    whole, splits = ([name for name in names if (folder / name).exists()] for names in (whole, splits))
    if whole and splits:
        raise InputError(f"{folder} holds both {splits[0]} and {whole[0]}; keep either your splits or the whole")
    names = splits or whole
    if len({Path(name).suffix for name in names}) > 1:
        raise InputError(f"{folder} holds both {names[0]} and {names[-1]}; keep one format")
    return names


def _read_pair(
    folder: Path, prefix: str, kind: str, memory: VectorMemory, columns: Mapping[str, str], by_id: bool
) -> QueryBatch:
    path = folder / f"{prefix}queries.{kind}"
    if kind == "parquet":
        from nvf.data.parquet import read_queries  # needs pyarrow, which is an extra

        targets_path = path
        queries, ids, counts = read_queries(path, columns)
        ids = np.array([plain_uuid(name) for name in ids.tolist()], dtype=object) if by_id else ids
        rows = target_rows(memory.ids, ids, counts, str(path))
    else:
        targets_path = folder / f"{prefix}targets.npy"
        queries = npy.read_vectors(path, "the vectors of your queries")
        targets = npy.read_targets(targets_path, "id" if by_id else "row of corpus.npy", len(queries))
        if by_id:
            given = targets != -1
            rows = target_rows(memory.ids, targets[given], given.sum(axis=1), str(targets_path))
        else:
            rows = _checked_rows(targets, memory.given, targets_path)
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
    """When each query was asked, (n,), numbers or dates; None where the folder does not say."""
    if column is not None and kind == "npy":
        raise InputError(f"data.columns.time={column} names a column of .parquet files; write {folder / TIMES} instead")
    if column is not None:
        from nvf.data.parquet import read_times  # needs pyarrow, which is an extra

        name, times = f"{folder / PARTS[kind][0]}: column {column!r}", read_times(folder / PARTS[kind][0], column)
    elif (path := folder / TIMES).exists():
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
    """Targets, (n, m), where a row that a query names again gives way to padding."""
    order = np.argsort(rows, axis=1, kind="stable")
    ordered = np.take_along_axis(rows, order, axis=1)
    ordered[:, 1:][ordered[:, 1:] == ordered[:, :-1]] = -1
    once = np.empty_like(rows)
    np.put_along_axis(once, order, ordered, axis=1)
    return once


def _checked_rows(targets: np.ndarray, rows: int, path: Path) -> np.ndarray:
    """The targets as int64, all of them rows of the memory or padding."""
    wrong = (targets < -1) | (targets >= rows)
    if wrong.any():
        row, column = np.argwhere(wrong)[0]
        raise InputError(
            f"{path}: row {row}: target {targets[row, column]} is outside 0..{rows - 1} (-1 pads); "
            "correct or remove this query"
        )
    return targets.astype(np.int64)


def _warn_of(duplicates: Mapping[str, int], splits: Mapping[str, QueryBatch]) -> str:
    """What it means that splits share queries."""
    shared = []
    for pair, count in duplicates.items():
        first, second = pair.split("/")
        shared.append(f"{count} of {len(splits[second].queries)} {second} queries are also in {first}")
    return (
        f"{', '.join(shared)}; they were seen before, so the figures flatter what new queries will find; "
        "remove them from one split, or give the queries whole and let NVF split them"
    )
