"""Answers to queries as a file, written as they come: .npy, .parquet or .jsonl.

    .npy      one structured array, (n,): rows (k,) int64 of the memory, probabilities (k,) float32
    .parquet  a row a query: query int64, ids list, probabilities list of float
    .jsonl    a line a query: {"query": 0, "ids": [...], "probabilities": [...]}

Best first in all three; `query` counts from 0 in the order of the queries; `ids` are row numbers where the memory
has none.
"""

import json
from collections.abc import Iterable, Iterator
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from nvf.errors import InputError
from nvf.files.atomic import written_whole
from nvf.models.pipeline import Hits

if TYPE_CHECKING:
    import pyarrow as pa

ENDINGS = (".npy", ".parquet", ".jsonl")


def check_output(output: Path, queries: Path) -> None:
    """Raise an InputError unless answers to these queries can be written there; an earlier file may be replaced."""
    if output.suffix not in ENDINGS:
        raise InputError(f"output={output}: {output.suffix or 'no ending'} is not written; give {', '.join(ENDINGS)}")
    if output.is_dir():
        raise InputError(f"output={output} is a folder; name a file in it")
    if output.resolve() == queries.resolve():
        raise InputError(f"output={output} is the file of the queries; give another path")
    if output.suffix == ".parquet":
        import_module("nvf.data.parquet")  # now, since without pyarrow it raises


def write_answers(output: Path, hits: Iterable[Hits], *, count: int, k: int) -> None:
    """Write the answers to `count` queries, given in blocks of (b, k); whole or not at all."""
    with written_whole(output) as partial:
        if output.suffix == ".npy":
            _write_npy(partial, hits, count, k)
        elif output.suffix == ".parquet":
            _write_parquet(partial, hits)
        else:
            _write_jsonl(partial, hits)


def _write_npy(path: Path, hits: Iterable[Hits], count: int, k: int) -> None:
    dtype = np.dtype([("rows", np.int64, (k,)), ("probabilities", np.float32, (k,))])
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    with path.open("wb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for block in hits:
            answers = np.empty(len(block.rows), dtype)
            answers["rows"], answers["probabilities"] = block.rows, block.probabilities
            file.write(answers.tobytes())


def _write_jsonl(path: Path, hits: Iterable[Hits]) -> None:
    with path.open("w", encoding="utf-8") as file:
        for start, block in _numbered(hits):
            pairs = zip(_names(block).tolist(), block.probabilities.tolist(), strict=True)
            for query, (names, probabilities) in enumerate(pairs, start):
                answer = {"query": query, "ids": names, "probabilities": probabilities}
                file.write(json.dumps(answer, ensure_ascii=False) + "\n")


def _write_parquet(path: Path, hits: Iterable[Hits]) -> None:
    from nvf.data.parquet import pq  # needs pyarrow, which is an extra

    tables = (_table(start, block) for start, block in _numbered(hits))
    first = next(tables)
    with pq.ParquetWriter(path, first.schema) as file:
        for table in chain([first], tables):
            file.write_table(table)


def _table(start: int, block: Hits) -> "pa.Table":
    from nvf.data.parquet import pa

    b, k = block.rows.shape
    ends = pa.array(np.arange(0, b * k + 1, k, dtype=np.int32))
    names = _names(block).ravel()
    # Integers that neither int64 nor uint64 has all of come as objects, like strings.
    kind = pa.decimal128(20) if names.dtype == object and not isinstance(names[0], str) else None
    ids, probabilities = (
        pa.ListArray.from_arrays(ends, values)
        for values in (pa.array(names, type=kind), pa.array(block.probabilities.ravel()))
    )
    return pa.table({"query": np.arange(start, start + b), "ids": ids, "probabilities": probabilities})


def _names(block: Hits) -> np.ndarray:
    """What the user calls the rows, (b, k): their ids, or the row numbers where there are none."""
    return block.rows if block.ids is None else block.ids


def _numbered(hits: Iterable[Hits]) -> Iterator[tuple[int, Hits]]:
    """Each block with the number of its first query."""
    start = 0
    for block in hits:
        yield start, block
        start += len(block.rows)
