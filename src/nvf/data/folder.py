"""Readers of a folder of the user's own embeddings, which is either all .npy or all .parquet.

    corpus.npy, and ids.json if the rows have ids; or corpus.parquet, with columns for vectors and ids
    queries.npy, targets.npy and perhaps gains.npy and times.npy; or queries.parquet, with columns for all four
    or {train,val,test}_queries, _targets and _gains in place of queries, targets and gains
    texts.jsonl and {queries,train,val,test}_texts.jsonl if there are texts; or columns of the .parquet files

See docs/real-embeddings.md. Every fault is an InputError that names the file, the row and the remedy.
"""

import logging
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nvf.data import beside
from nvf.data.beside import COLUMNS, open_table, read_texts, texts_of_rows
from nvf.data.queries import QueryBatch, Recorded
from nvf.data.splits import SPLITS, deal, merge, repeats
from nvf.errors import InputError
from nvf.files.ids import IDS_FILE, checked_ids, padded, plain_uuid, read_ids, target_rows
from nvf.files.npy import ArrayFile, NpyFile, open_vectors
from nvf.files.vectors import check_vectors
from nvf.models.evidence import OF_THE_LOG, law_of
from nvf.models.memory import VectorMemory, check_dim, unit
from nvf.models.words import Words

TIMES = "times.npy"
log = logging.getLogger("nvf")


def read_memory(folder: str | Path, *, columns: Mapping[str, str] = COLUMNS, **stored: Any) -> VectorMemory:
    """Read the corpus of a folder as a memory of (N, D) distinct rows with its ids; `stored` are dtype and mapped."""
    vectors, ids = open_items(Path(folder), columns)
    return VectorMemory(vectors, ids=ids, distinct=True, **stored)


def open_items(folder: Path, columns: Mapping[str, str] = COLUMNS) -> tuple[ArrayFile, np.ndarray | None]:
    """Open the corpus of a folder, (N, D), and read its ids, if it has any."""
    if _format(folder, "corpus") == "parquet":
        table = open_table(folder / "corpus.parquet", columns, "vector", "id")
        return table, checked_ids(table.ids(columns["id"])[0], len(table), f"{table.path}: column {columns['id']!r}")
    vectors = open_vectors(folder / "corpus.npy", "the vectors of your items")
    return vectors, read_ids(folder / IDS_FILE, len(vectors)) if (folder / IDS_FILE).exists() else None


def read_log(folder: Path, *, by_id: bool) -> tuple[np.ndarray, list[Any]]:
    """Read the queries of a folder, (n, D), and of each the targets that it names: ids, or rows unless `by_id`."""
    kind = _format(folder, "queries") or "npy"
    path = folder / f"queries.{kind}"
    if kind == "parquet":
        table = open_table(path, COLUMNS, "vector", "targets")
        names, counts = table.ids(COLUMNS["targets"])
        return table.read(), np.split(np.array(names, object), counts.cumsum()[:-1])
    queries = open_vectors(path, "the vectors of your queries").read()
    return queries, _read_targets(folder / "targets.npy", "id" if by_id else "row", len(queries)).tolist()


def read_recorded(
    folder: str | Path,
    memory: VectorMemory,
    *,
    seed: int,
    columns: Mapping[str, str] = COLUMNS,
    by_id: bool = False,
    words: Mapping[str, Any] | None = None,
    foreign: bool | None = None,
) -> Recorded:
    """Read the queries of a folder: the user's splits, or 80/10/10 by time or by seed; identical queries are one.

    With `by_id` the memory is from elsewhere: targets.npy holds ids, as .parquet files always do, and the queries may
    have either format. Where the rows and the queries have texts, and `words` says how they are taken apart, see
    `Words`, the queries know what their words match. Queries are of another model than the rows if they are `foreign`;
    None takes them for it if their widths differ, or if there are pairs of texts embedded by both models.
    """
    folder = Path(folder)
    stems = [name for name in ("queries", *(f"{split}_queries" for split in SPLITS)) if _format(folder, name)]
    if "queries" in stems and len(stems) > 1:
        raise InputError(f"{folder} holds both queries and {stems[1]}; keep either your splits or the one file")
    formats = {_format(folder, name) for name in (*stems, *(() if by_id else ("corpus",)))} - {None}
    if len(formats) > 1:
        raise InputError(f"{folder} holds both .npy and .parquet files; give corpus and queries in one format")
    kind = str(formats.pop()) if formats else "parquet"
    timed, one = columns.get("time") is not None or (folder / TIMES).exists(), stems in ([], ["queries"])
    if timed and not one:
        raise InputError(f"{folder} holds times.npy, or data.columns.time is set, but also splits; keep one of them")
    prefixes = {"queries": ""} if one else {split: f"{split}_" for split in SPLITS}
    given = {stem: _read_pair(folder, before, kind, memory, columns, by_id) for stem, before in prefixes.items()}
    if one:
        times = _read_times(folder, kind, columns, len(given["queries"].queries)) if timed else None
        dealt = deal(given["queries"], folder / f"queries.{kind}", seed, times)
    else:
        dealt = {split: merge(batch) for split, batch in given.items()}
    splits = {split: batch for split, (batch, _) in dealt.items()}
    duplicates = {} if one else repeats(splits)
    if merged := sum(len(batch.queries) for batch in given.values()) - sum(len(of.queries) for of in splits.values()):
        log.info("%s: %d queries equal an earlier one; each is one query, with the targets of all", folder, merged)
    for pair, count in duplicates.items():
        a, b = pair.split("/")
        log.warning(
            "%s: %d of %d %s queries are also in %s; a model that has seen them scores higher on them than on new "
            "queries; remove them from one split, or give all queries in one file and let NVF split them",
            *(folder, count, len(splits[b].queries), b, a),
        )
    stem_of = {split: "queries" if one else split for split in SPLITS}
    places = {split: (stem, dealt[split][1], len(given[stem].queries)) for split, stem in stem_of.items()}
    other = _other_model(folder, memory, splits, places, foreign)
    texts, index, asked = texts_of_rows(folder, memory, columns), None, None
    if texts is not None:
        lines: Any = {stem: read_texts(folder, stem, len(of.queries), columns) for stem, of in given.items()}
        if None not in lines.values():
            asked = {split: [lines[stem][place] for place in of_stem] for split, (stem, of_stem, _) in places.items()}
    if texts is not None and asked is not None and words is not None:
        index = _index(splits["train"], texts, asked["train"], words)
        if index is not None:
            for split, batch in splits.items():
                splits[split] = batch._replace(words=index.scores(asked[split], logged=split == "train"))
    return Recorded(memory, splits, duplicates, merged, texts=texts, asked=asked, words=index, **other)


def _other_model(
    folder: Path, memory: VectorMemory, splits: Mapping[str, QueryBatch], places: beside.Places, foreign: bool | None
) -> dict[str, Any]:
    """Return what a source is told of queries that are of another model than the rows; nothing where they are not."""
    train = splits["train"].queries.shape[1]
    for split, batch in splits.items():
        if (width := batch.queries.shape[1]) != train:
            raise InputError(f"{folder}: {split} queries are {width} wide, train queries {train}; embed all alike")
    if foreign not in (None, False, True):
        raise InputError(f"data.foreign={foreign} is unknown; choose one of null, true, false")
    pairs = beside.read_pairs(folder, memory, train)
    if foreign is False or (foreign is None and pairs is None and train == memory.dim):
        check_dim(train, memory.dim, f"{folder}: data.foreign=false, but queries")
        return {}
    log.info("queries, %d wide, are of another model than the rows, %d wide: they are aligned", train, memory.dim)
    queries = {split: batch.queries for split, batch in splits.items()}
    return {"foreign": True, "pairs": pairs, "references": beside.read_references(folder, memory, places, queries)}


def _index(train: QueryBatch, texts: list[str], logged: list[str], words: Mapping[str, Any]) -> Words | None:
    """Return the index of the rows' words, and of the logged queries' where these say what will be asked."""
    if find_spec("bm25s") is None:
        log.info("there are texts beside the vectors: pip install -e '.[lexical]' has their words searched too")
        return None
    counts = torch.bincount(train.targets[train.targets >= 0], minlength=len(texts))
    misled = set(OF_THE_LOG) <= set(law_of(counts)["ignored"])
    return Words.gather(texts, [] if misled else logged, train.targets, **words)


def _format(folder: Path, stem: str) -> str | None:
    """Return the ending of the file with this name, npy or parquet; None if there is no such file."""
    given = [kind for kind in ("npy", "parquet") if (folder / f"{stem}.{kind}").exists()]
    if len(given) > 1:
        raise InputError(f"{folder} holds both {stem}.npy and {stem}.parquet; keep the one that is meant")
    return given[0] if given else None


def _read_pair(
    folder: Path, prefix: str, kind: str, memory: VectorMemory, columns: Mapping[str, str], by_id: bool
) -> QueryBatch:
    path = named = folder / f"{prefix}queries.{kind}"
    ids: np.ndarray | range | None = memory.ids
    gains = None
    if kind == "parquet":
        table = open_table(path, columns, "vector", "targets")
        names, counts = table.ids(columns["targets"])
        targets = np.array([plain_uuid(name) for name in names] if by_id else names, dtype=object)
        queries = torch.from_numpy(table.read())
        if found := beside.optional_column(table, columns, "gains"):
            name = f"{path}: column {columns['gains']!r}"
            if (differ := found[1] != counts).any():
                row = int(differ.argmax())
                raise InputError(f"{name}: row {row} has {found[1][row]} for {counts[row]} targets; give each one")
            gains = beside.checked_gains(found[0], counts, name)
    else:
        named = folder / f"{prefix}targets.npy"
        queries = torch.from_numpy(open_vectors(path, "the vectors of your queries").read())
        array = _read_targets(named, "id" if by_id else "row of corpus.npy", len(queries))
        targets, counts = array[array != -1], (array != -1).sum(axis=1)
        gains = beside.read_gains(folder / f"{prefix}gains.npy", array != -1)
        ids = ids if by_id else range(memory.given)
    check_vectors(queries, str(path))
    rows = target_rows(ids, targets, counts, str(named))
    if rows.shape[1] == memory.given > 2 and (rows >= 0).all() and len(np.unique(rows)) <= 2:
        raise InputError(f"{named} is a relevance matrix; give each query the rows of its ones alone, padded with -1")
    if (counts == 0).any():
        raise InputError(f"{named}: row {(counts == 0).argmax()} has no target; give it one or remove this query")
    if gains is not None:  # the best first, so that of two gains of a row the larger counts
        gains = padded(gains, counts)
        order = np.argsort(-gains, axis=1, kind="stable")
        rows, gains = (np.take_along_axis(of, order, axis=1) for of in (rows, gains))
    rows = memory.rows_of(torch.from_numpy(rows)).numpy()
    for place in range(1, rows.shape[1]):  # a row that a query names twice counts once
        rows[(rows[:, :place] == rows[:, place, None]).any(axis=1), place] = -1
    worth = None if gains is None else torch.from_numpy(np.where(rows >= 0, gains, 0))
    return QueryBatch(unit(queries), torch.from_numpy(rows), gains=worth)


def _read_targets(path: Path, what: str, queries: int) -> np.ndarray:
    """Read the targets of `queries` queries, (n, m) integers padded with -1; `what` says what the integers are."""
    targets = NpyFile(path, f"for each query the {what} of its target")
    if targets.dtype.kind not in "iu" or len(targets.shape) > 2 or 0 in targets.shape or len(targets) != queries:
        found = f"{path}: {targets.shape} {targets.dtype} for {queries} queries"
        raise InputError(f"{found}; give each the {what} of its target: integers (n,), or (n, m) padded with -1")
    return targets.read().reshape(queries, -1)


def _read_times(folder: Path, kind: str, columns: Mapping[str, str], count: int) -> np.ndarray:
    """Read when each query was asked, (n,), numbers or dates."""
    path, column = folder / TIMES, columns["time"]
    if column is None:
        times = NpyFile(path, "when each query was asked").read()
    elif kind == "npy":
        raise InputError(f"data.columns.time={column} names a column of .parquet files; write {path} instead")
    else:
        path = folder / "queries.parquet"
        times = open_table(path, columns, "vector", "time").times(column)
    if times.dtype.kind not in "iufM" or times.shape != (count,):
        raise InputError(f"{path}: times {times.shape} {times.dtype} for {count} queries; give one number a query")
    if (wrong := ~np.isfinite(times)).any():
        row = int(wrong.argmax())
        raise InputError(f"{path}: row {row}: the time is {times[row]}; correct or remove this query")
    return times
