"""The files of `nvf.search`: query vectors, .npy or .parquet, their texts, and answers, written block by block.

    .npy      one structured array, (n,): rows (k,) int64 of the memory, probabilities (k,) float32
    .jsonl    a line a query: {"query": 0, "ids": [...], "probabilities": [...]}
    .trec     a line an answer, as trec_eval and ir-measures read it: query Q0 id rank score nvf

Answers are best first; `query` counts from 0, and `rank` from 1; `ids` are row numbers if the memory has none. Of fewer
than k answers, lists and lines are fewer; in .npy rows are then padded with -1 and probabilities with 0.
"""

import itertools
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nvf.errors import InputError, refused
from nvf.files.atomic import atomic_write
from nvf.files.ids import shown
from nvf.files.npy import ROWS, ArrayFile, NpyFile, open_vectors
from nvf.files.vectors import check_largest, largest
from nvf.models.memory import check_dim
from nvf.models.pipeline_search import Hits

ENDINGS = (".npy", ".jsonl", ".trec")


def open_queries(path: Path, column: str, *, dim: int) -> ArrayFile:
    """Open and check the vectors in a .npy file, or in a column of lists in a .parquet file, (n, dim)."""
    if path.suffix not in (".npy", ".parquet"):
        raise InputError(f"{path}: {path.suffix or 'no ending'} is not read; give .npy or .parquet")
    if path.suffix == ".parquet":
        from nvf.data.parquet import ParquetFile  # needs pyarrow, which is an extra

        file: ArrayFile = ParquetFile(path, {"column": column})
    else:
        file = open_vectors(path, "the vectors of your queries")
    check_dim(file.shape[1], dim, str(path))
    check_largest(torch.cat([largest(torch.from_numpy(block)) for block in file.blocks(ROWS)]), str(path))
    return file


def read_ids_of(path: Path) -> Any:
    """Read ids or rows: .json, a list for all queries; for each query .jsonl, a list or an answer a line, or .npy."""
    if path.suffix == ".npy":
        return NpyFile(path, "ids or rows").read()
    remedy = "give a JSON list in .json, a line with a list for each query in .jsonl, or .npy"
    with refused(f"{path} is missing or damaged", remedy, OSError, ValueError, LookupError, RecursionError):
        if path.suffix not in (".json", ".jsonl"):
            raise ValueError(f"{path.suffix or 'no ending'} is not read")
        text = path.read_text(encoding="utf-8-sig")
        values = [json.loads(line) for line in ([text] if path.suffix == ".json" else text.split("\n")) if line.strip()]
        lists = [value["ids"] if isinstance(value, dict) else value for value in values]
        return lists[0] if path.suffix == ".json" else lists


def check_output(output: Path, *asked: Path | None) -> None:
    """Raise an InputError unless answers can be written there; a file may be replaced, but not one that is asked."""
    theirs = {path.resolve() for path in asked if path is not None}
    if output.suffix not in ENDINGS or output.is_dir() or output.resolve() in theirs:
        raise InputError(f"output={output} is a folder, a file of the queries, or none of {ENDINGS}; rename it")


def check_ids(output: Path, ids: np.ndarray | None) -> None:
    """Raise an InputError if an id cannot stand in a TREC run, which spaces part into fields."""
    named = [] if ids is None or output.suffix != ".trec" else ids.tolist()
    if wrong := [name for name in named if len(str(name).split()) != 1]:
        raise InputError(f"output={output}: a TREC run cannot hold the id {shown(wrong[0])}; give .jsonl")


def write_answers(output: Path, hits: Iterable[Hits], *, count: int, k: int) -> None:
    """Write the k best answers to `count` queries, given in blocks, atomically."""
    numbers = itertools.count()
    dtype = np.dtype([("rows", np.int64, (k,)), ("probabilities", np.float32, (k,))])
    header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False, "shape": (count,)}
    with atomic_write(output) as partial, partial.open("wb") as file:
        if output.suffix == ".npy":
            np.lib.format.write_array_header_1_0(file, header)
        for found in hits:
            rows, probabilities = found.rows[:, :k], found.probabilities[:, :k]
            if output.suffix == ".npy":
                answers = np.full(len(rows), np.array((-1, 0), dtype))
                answers["rows"][:, : rows.shape[1]], answers["probabilities"][:, : rows.shape[1]] = rows, probabilities
                file.write(answers.tobytes())
                continue
            trec = output.suffix == ".trec"
            shares = _descending(probabilities) if trec else probabilities
            counts, names = (rows >= 0).sum(axis=1).tolist(), (rows if found.ids is None else found.ids[:, :k]).tolist()
            for some, of_query, scores, query in zip(counts, names, shares.tolist(), numbers, strict=False):
                answer = {"query": query, "ids": of_query[:some], "probabilities": scores[:some]}
                lines = [json.dumps(answer, ensure_ascii=False)]
                if trec:
                    ranked = enumerate(zip(of_query[:some], scores, strict=False), 1)
                    lines = [f"{query} Q0 {name} {rank} {score} nvf" for rank, (name, score) in ranked]
                file.writelines(f"{line}\n".encode() for line in lines)


def _descending(probabilities: np.ndarray) -> np.ndarray:
    """Lower each score, (b, k), below the one before it: readers of a TREC run sort by scores, and ties by ids."""
    scores = np.array(probabilities)
    for place in range(1, scores.shape[1]):
        scores[:, place] = np.minimum(scores[:, place], np.nextafter(scores[:, place - 1], np.float32(-np.inf)))
    return scores
