"""The files of `nvf.search`: query vectors, .npy or .parquet, their texts, and answers, written block by block.

    .npy      one structured array, (n,): rows (k,) int64 of the memory, probabilities (k,) float32
    .jsonl    a line a query: {"query": 0, "ids": [...], "probabilities": [...]}

Answers are best first; `query` counts from 0 in the order of the queries; `ids` are row numbers if the memory has none.
"""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import torch

from nvf.data.folder import read_texts
from nvf.errors import InputError
from nvf.files.atomic import atomic_write
from nvf.files.npy import ROWS, ArrayFile, open_vectors
from nvf.files.vectors import check_largest, largest
from nvf.models.memory import check_dim
from nvf.models.pipeline import Hits

ENDINGS = (".npy", ".jsonl")


def open_queries(path: Path, column: str, *, dim: int) -> ArrayFile:
    """Open and check the vectors in a .npy file, or in a column of lists in a .parquet file, (n, dim)."""
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


def open_texts(path: Path, count: int, *, known: bool) -> list[str]:
    """Read the texts of so many queries, a line {"text": ...} each, for a pipeline that has `known` texts."""
    if not known:
        fault = "the pipeline was fitted without texts, or bm25s is missing"
        raise InputError(f"texts={path}: {fault}; leave texts= out")
    if (texts := read_texts(path, count)) is None:
        raise InputError(f'texts={path} is missing; give each query a line {{"text": "..."}}')
    return texts


def check_output(output: Path, *asked: Path | None) -> None:
    """Raise an InputError unless answers can be written there; a file may be replaced, but not one that is asked."""
    theirs = {path.resolve() for path in asked if path is not None}
    if output.suffix not in ENDINGS or output.is_dir() or output.resolve() in theirs:
        raise InputError(
            f"output={output} is a folder, a file of the queries, or not {' or '.join(ENDINGS)}; rename it"
        )


def write_answers(output: Path, hits: Iterable[Hits], *, count: int, k: int) -> None:
    """Write the answers to `count` queries, given in blocks of (b, k), atomically."""
    numbers = itertools.count()
    dtype = np.dtype([("rows", np.int64, (k,)), ("probabilities", np.float32, (k,))])
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    with atomic_write(output) as partial, partial.open("wb") as file:
        if output.suffix == ".npy":
            np.lib.format.write_array_header_1_0(file, header)
        for rows, probabilities, ids in hits:
            if output.suffix == ".npy":
                answers = np.empty(len(rows), dtype)
                answers["rows"], answers["probabilities"] = rows, probabilities
                file.write(answers.tobytes())
                continue
            names = (rows if ids is None else ids).tolist()
            for of_query, shares, query in zip(names, probabilities.tolist(), numbers, strict=False):
                answer = {"query": query, "ids": of_query, "probabilities": shares}
                file.write(json.dumps(answer, ensure_ascii=False).encode() + b"\n")
