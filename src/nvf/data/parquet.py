"""Readers of vectors, ids, targets and times in columns of .parquet files, a block of rows at a time.

In place of a file there may be a folder of parts, `corpus.parquet/part-0.parquet`, which are joined in name order.

Every fault is an InputError that names the file, the row or the column, and the fix. Without pyarrow, importing this
module raises one too.
"""

import uuid
from collections.abc import Callable, Iterator, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from nvf.errors import InputError, one_line
from nvf.files.ids import checked_ids
from nvf.files.mapped_rows import state_of
from nvf.files.vectors import check_vectors

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError:
    raise InputError("reading .parquet files needs pyarrow: pip install -e '.[parquet]' in NVF's folder") from None

BLOCK = 8192  # rows
ROWS_A_BYTE = 1024  # more than equal vectors take, run-length encoded and compressed
T = TypeVar("T")


def read_corpus(path: Path, columns: Mapping[str, str]) -> tuple[Tensor, np.ndarray]:
    """Read the vectors of the items, (N, D), and their ids, (N,), which all differ."""
    file = _Columns(path, {f"data.columns.{role}": columns[role] for role in ("vector", "id")})
    found = [*file.blocks(lambda rows: (file.matrix(rows, columns["vector"]), file.ids(rows, columns["id"])[0]))]
    vectors, ids = zip(*found, strict=True)
    names = [*chain.from_iterable(ids)]
    given = checked_ids(names, len(names), f"{path}: column {columns['id']!r}")
    return _checked(vectors, path, given), given


def read_queries(path: Path, columns: Mapping[str, str]) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """Read the queries, (n, D), the ids of all their targets, (t,), and how many of these each query has, (n,)."""
    file = _Columns(path, {f"data.columns.{role}": columns[role] for role in ("vector", "targets")})
    found = [*file.blocks(lambda rows: (file.matrix(rows, columns["vector"]), *file.ids(rows, columns["targets"])))]
    vectors, ids, counts = zip(*found, strict=True)
    return _checked(vectors, path), np.array([*chain.from_iterable(ids)], dtype=object), np.concatenate(counts)


def read_times(path: Path, column: str) -> np.ndarray:
    """Read when each query was asked, (n,), in the column's own type."""
    file = _Columns(path, {"data.columns.time": column})
    return np.concatenate([*file.blocks(lambda rows: file.column(rows, column).to_numpy(zero_copy_only=False))])


def vector_blocks(path: Path, column: str, size: int) -> Iterator[np.ndarray]:
    """Yield the vectors of a column, (b, D), at most `size` at a time; zeros, NaN and infinite values pass."""
    file = _Columns(path, {"column": column})
    return file.blocks(lambda rows: file.matrix(rows, column), size)


def _checked(vectors: tuple[np.ndarray, ...], path: Path, ids: np.ndarray | None = None) -> Tensor:
    joined = torch.from_numpy(np.concatenate(vectors))
    check_vectors(joined, str(path), ids)
    return joined


class _Columns:
    """Some columns of a file, or of a folder of parts.

    Args:
        path: the file or folder.
        names: the columns, by the option that gives each name.
    """

    def __init__(self, path: Path, names: Mapping[str, str]) -> None:
        self.path, self.names = path, names
        self.start = 0  # the row that the current block begins with
        self.dim: int | None = None  # of row 0

    def blocks(self, convert: Callable[["pa.RecordBatch"], T], size: int = BLOCK) -> Iterator[T]:
        """Yield what `convert` makes of each block of at most `size` rows."""
        parts = (sorted(self.path.glob("*.parquet")) if self.path.is_dir() else []) or [self.path]
        claimed = 0
        try:
            before = [state_of(part.stat()) for part in parts if part.is_file()]
            for part in parts:
                if not part.is_file():
                    holds = " and ".join(f"column {name!r}" for name in self.names.values())
                    raise InputError(f"{part} is missing, or no file; it holds {holds}")
                with pq.ParquetFile(part, page_checksum_verification=True) as file:
                    self._check(file, part)
                    claimed += file.metadata.num_rows
                    for rows in file.iter_batches(size, columns=[*self.names.values()]):
                        rows.validate(full=True)
                        if len(rows):
                            yield convert(rows)
                        self.start += len(rows)
            changed = [state_of(part.stat()) for part in parts] != before
        except InputError:
            raise
        except Exception as fault:  # pyarrow raises many types for a damaged file, Python's own among them
            raise InputError(
                f"{self.path} is truncated or not a parquet file ({one_line(fault)}); write it anew"
            ) from None
        if changed:
            raise InputError(f"{self.path} changed while it was read; start again when nothing writes to it")
        if self.start != claimed or not claimed:
            raise InputError(f"{self.path} has no rows, or fewer than the {claimed} that it claims; write it anew")

    def _check(self, file: "pq.ParquetFile", path: Path) -> None:
        """Refuse a file that lacks a column, or claims rows that it lacks, before room is made for them."""
        known = file.schema_arrow.names
        for option, name in self.names.items():
            if known.count(name) != 1:
                raise InputError(
                    f"{path} has {known.count(name)} columns {name!r}, but {', '.join(map(repr, known))}; "
                    f"add it, or name one of them with {option}="
                )
        rows, size = file.metadata.num_rows, path.stat().st_size
        # Nothing is asked of columns: where what describes one is damaged, pyarrow 26.0 ends the process.
        groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
        if not 0 <= rows <= size * ROWS_A_BYTE or sum(groups) != rows or min(groups, default=0) < 0:
            raise InputError(f"{path} claims {rows:,} rows in {size:,} bytes, which do not hold them; write it anew")

    def column(self, rows: "pa.RecordBatch", name: str) -> "pa.Array":
        """Return a column, none of whose values is null."""
        return self._without_nulls(rows.column(name), name)

    def _without_nulls(self, values: "pa.Array", name: str, lists: "pa.Array | None" = None) -> "pa.Array":
        """Return the values, categories spelled out; refuse nulls."""
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if values.null_count:
            row = int(values.is_null().to_numpy(zero_copy_only=False).argmax())
            row, fault = (row, "is") if lists is None else (pc.list_parent_indices(lists)[row].as_py(), "holds a")
            raise InputError(f"{self.path}: row {self.start + row}: column {name!r} {fault} null; remove or repair it")
        return values

    def _flat(self, lists: "pa.Array", name: str) -> tuple["pa.Array", np.ndarray]:
        """Return the values of all lists, one list after the other, and the lengths of the lists."""
        lengths = pc.list_value_length(lists).to_numpy(zero_copy_only=False).astype(np.int64)
        return self._without_nulls(lists.flatten(), name, lists), lengths

    def matrix(self, rows: "pa.RecordBatch", name: str) -> np.ndarray:
        """Return a column of lists of floats, all of one length, as a matrix, (b, D)."""
        lists = self.column(rows, name)
        if not _is_list(lists.type) or not pa.types.is_floating(lists.type.value_type):
            raise InputError(
                f"{self.path}: column {name!r} has type {lists.type}; give lists of float16, float32 or float64"
            )
        values, lengths = self._flat(lists, name)
        self.dim = int(lengths[0]) if self.dim is None else self.dim
        if self.dim == 0:
            raise InputError(f"{self.path}: row 0: column {name!r} is an empty list; give each row a vector")
        if (ragged := lengths != self.dim).any():
            row = int(ragged.argmax())
            raise InputError(
                f"{self.path}: row {self.start + row}: column {name!r} has {lengths[row]} values, but {self.dim} in "
                "row 0; embed all with the same model"
            )
        return values.to_numpy(zero_copy_only=False).reshape(-1, self.dim)

    def ids(self, rows: "pa.RecordBatch", name: str) -> tuple[list[Any], np.ndarray]:
        """Return the ids in a column of ids or of lists of ids, and how many each row has.

        UUIDs are spelled out; floats and decimals are integers where they are exact, and stay what they are elsewhere.
        """
        values = self.column(rows, name)
        values, counts = self._flat(values, name) if _is_list(values.type) else (values, np.ones(len(values), np.int64))
        kind, ids = values.type, values.to_pylist()
        if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
            exact = 2 ** (np.finfo(kind.to_pandas_dtype()).nmant + 1) if pa.types.is_floating(kind) else np.inf
            return [int(value) if abs(value) < exact and value == int(value) else value for value in ids], counts
        if ids and not isinstance(ids[0], int | str | uuid.UUID):
            raise InputError(f"{self.path}: column {name!r} has type {kind}; give ids as integers or strings")
        return [str(value) if isinstance(value, uuid.UUID) else value for value in ids], counts


def _is_list(kind: "pa.DataType") -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
