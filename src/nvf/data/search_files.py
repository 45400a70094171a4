"""The files of `nvf.search`: query vectors, .npy or .parquet, and answers, which are written block by block.

    .npy      one structured array, (n,): rows (k,) int64 of the memory, probabilities (k,) float32
    .parquet  a row a query: query int64, ids list, probabilities list of float
    .jsonl    a line a query: {"query": 0, "ids": [...], "probabilities": [...]}

Answers are best first; `query` counts from 0 in the order of the queries; `ids` are row numbers if the memory has none.
"""

import itertools
import json
from collections.abc import Iterable
from importlib import import_module
from pathlib import Path
from typing import IO

import numpy as np
import torch

from nvf.errors import InputError
from nvf.files.atomic import atomic_write
from nvf.files.npy import ROWS, ArrayFile, open_vectors
from nvf.files.vectors import check_largest, largest
from nvf.models.memory import check_dim
from nvf.models.pipeline import Hits

ENDINGS = (".npy", ".parquet", ".jsonl")
Blocks = Iterable[tuple[np.ndarray, Hits]]  # the hits, and the ids or numbers of their rows, (b, k)


def open_queries(path: Path, column: str, *, dim: int) -> ArrayFile:
    """Open and check the vectors in a .npy file, or in a column of lists in a .parquet file, (n, dim).

    Raises:
        InputError: a missing or damaged file, another type, shape or dimension, a row that is zero or not finite.
    """
    file: ArrayFile
    if path.suffix == ".npy":
        file = open_vectors(path, "the vectors of your queries")
    elif path.suffix == ".parquet":
        from nvf.data.parquet import ParquetFile  # needs pyarrow, which is an extra

        file = ParquetFile(path, {"column": column})
    else:
        raise InputError(f"{path}: {path.suffix or 'no ending'} is not read; give .npy or .parquet")
    check_dim(file.shape[1], dim, str(path))
    check_largest(torch.cat([largest(torch.from_numpy(block)) for block in file.blocks(ROWS)]), str(path))
    return file


def check_output(output: Path, queries: Path) -> None:
    """Raise an InputError unless answers to these queries can be written there; an earlier file may be replaced."""
    if output.suffix not in ENDINGS:
        raise InputError(f"output={output}: {output.suffix or 'no ending'} is not written; give {', '.join(ENDINGS)}")
    if output.is_dir():
        raise InputError(f"output={output} is a folder; name a file in it")
    if output.resolve() == queries.resolve():
        raise InputError(f"output={output} is the file of the queries; give another path")
    if output.suffix == ".parquet":
        import_module("nvf.data.parquet")  # raises now if pyarrow is missing


def write_answers(output: Path, hits: Iterable[Hits], *, count: int, k: int) -> None:
    """Write the answers to `count` queries, given in blocks of (b, k), atomically."""
    blocks = ((block.rows if block.ids is None else block.ids, block) for block in hits)
    with atomic_write(output) as partial, partial.open("wb") as file:
        if output.suffix == ".npy":
            _write_npy(file, blocks, count, k)
        elif output.suffix == ".parquet":
            _write_parquet(file, blocks, k)
        else:
            _write_jsonl(file, blocks)


def _write_npy(file: IO[bytes], blocks: Blocks, count: int, k: int) -> None:
    dtype = np.dtype([("rows", np.int64, (k,)), ("probabilities", np.float32, (k,))])
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    np.lib.format.write_array_header_1_0(file, header)
    for _, block in blocks:
        answers = np.empty(len(block.rows), dtype)
        answers["rows"], answers["probabilities"] = block.rows, block.probabilities
        file.write(answers.tobytes())


def _write_jsonl(file: IO[bytes], blocks: Blocks) -> None:
    numbers = itertools.count()
    for names, block in blocks:
        for ids, probabilities, query in zip(names.tolist(), block.probabilities.tolist(), numbers, strict=False):
            answer = {"query": query, "ids": ids, "probabilities": probabilities}
            file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")


def _write_parquet(file: IO[bytes], blocks: Blocks, k: int) -> None:
    from nvf.data.parquet import pa, pq  # needs pyarrow, which is an extra

    writer, start = None, 0
    for names, block in blocks:
        # Integers that fit neither int64 nor uint64 come as objects, like strings.
        kind = pa.decimal128(20) if names.dtype == object and not isinstance(names[0, 0], str) else None
        ends = pa.array(np.arange(0, names.size + 1, k, dtype=np.int32))
        values = {"ids": pa.array(names.ravel(), type=kind), "probabilities": pa.array(block.probabilities.ravel())}
        lists = {name: pa.ListArray.from_arrays(ends, flat) for name, flat in values.items()}
        table = pa.table({"query": np.arange(start, start + len(names)), **lists})
        writer = writer or pq.ParquetWriter(file, table.schema)
        writer.write_table(table)
        start += len(names)
    if writer is not None:
        writer.close()
