"""Vectors, ids and targets in columns of .parquet files, read as whole arrays, and vectors in blocks.

In place of a file there may be a folder of parts, `corpus.parquet/part-0.parquet`, which are joined in name order.

Every fault raises an InputError that names the file, the row or the columns, and the remedy. Importing this module
without pyarrow does too.
"""

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor

from nvf.errors import InputError, one_line
from nvf.files.ids import checked_ids
from nvf.files.mapped_rows import state_of
from nvf.files.vectors import check_vectors, from_numpy

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError:
    raise InputError("reading .parquet files needs pyarrow: pip install -e '.[parquet]' in NVF's folder") from None

ROWS_A_BYTE = 1024  # more than equal vectors take, run-length encoded and compressed


def read_corpus(path: Path, columns: Mapping[str, str]) -> tuple[Tensor, np.ndarray]:
    """The vectors of the items, (N, D), and their ids, (N,), all different."""
    with _named(path):
        table = _read(path, columns, "vector", "id")
        ids = _ids(_column(table, path, columns["id"]), path, columns["id"])
        numbers = checked_ids(ids, len(ids), f"{path}: column {columns['id']!r}")
        vectors = from_numpy(_matrix(table, path, columns["vector"]))
    check_vectors(vectors, str(path), numbers)
    return vectors, numbers


def read_queries(path: Path, columns: Mapping[str, str]) -> tuple[Tensor, np.ndarray, np.ndarray]:
    """The vectors of the queries, (n, D), the ids of all their targets, (t,), and how many of these each has, (n,)."""
    with _named(path):
        table = _read(path, columns, "vector", "targets")
        vectors = from_numpy(_matrix(table, path, columns["vector"]))
        check_vectors(vectors, str(path))
        name = columns["targets"]
        targets = _column(table, path, name)
        if not _is_list(targets.type):
            return vectors, _ids(targets, path, name), np.ones(len(targets), dtype=np.int64)
        counts = pc.list_value_length(targets).to_numpy().astype(np.int64)
        return vectors, _ids(_flatten(targets, counts, path, name), path, name), counts


def read_times(path: Path, column: str) -> np.ndarray:
    """When each query was asked, (n,), of the column's own type."""
    with _named(path):
        return _column(_read(path, {"time": column}, "time"), path, column).to_numpy()


def vector_blocks(path: Path, column: str, size: int) -> Iterator[np.ndarray]:
    """The vectors of a column, (b, D), at most so many at a time; NaN, infinite values and zeros are not looked for."""
    start, claimed, dim = 0, 0, None
    with _named(path):
        for part in _parts(path):
            with _open(part, {"column": column}) as file:
                for batch in file.iter_batches(batch_size=size, columns=[column]):
                    table = pa.Table.from_batches([batch])
                    table.validate(full=True)
                    block = _matrix(table, path, column, start, dim)
                    yield block
                    start, dim = start + len(block), block.shape[1]
                claimed += file.metadata.num_rows
        _check_count(start, claimed, path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Faults of the file, of whatever type, as InputErrors that name it; one is that it changes meanwhile."""
    before = [state_of(part.stat()) for part in _parts(path) if part.is_file()]
    try:
        yield
        changed = [state_of(part.stat()) for part in _parts(path)] != before
    except InputError:
        raise
    except Exception as fault:  # pyarrow raises many types for a damaged file, Python's own among them
        raise InputError(f"{path} is truncated or not a parquet file ({one_line(fault)}); write it anew") from None
    if changed:
        raise InputError(f"{path} changed while it was read; start again when nothing writes to it")


def _parts(path: Path) -> list[Path]:
    """The file itself, or those in a folder, in name order."""
    return (sorted(path.glob("*.parquet")) if path.is_dir() else []) or [path]


@contextmanager
def _open(path: Path, names: Mapping[str, str]) -> Iterator["pq.ParquetFile"]:
    """The file, which has every named column once.

    Args:
        names: of the columns, by the option that gives the name.
    """
    if not path.is_file():
        holds = " and ".join(f"column {name!r}" for name in names.values())
        raise InputError(f"{path} is missing, or no file; it holds {holds}")
    with pq.ParquetFile(path, page_checksum_verification=True) as file:
        there = file.schema_arrow.names
        for option, name in names.items():
            if there.count(name) != 1:
                raise InputError(
                    f"{path} has {there.count(name)} columns {name!r}, but {', '.join(map(repr, there))}; "
                    f"add it, or name one of them with {option}="
                )
        _check_rows(file.metadata, path)
        yield file


def _check_rows(metadata: "pq.FileMetaData", path: Path) -> None:
    """Refuse a file that claims rows which it does not have, before there is room made for them."""
    rows, size = metadata.num_rows, path.stat().st_size
    # Nothing is asked of columns: where what describes one is damaged, pyarrow 26.0 ends the process.
    groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if not 0 <= rows <= size * ROWS_A_BYTE or sum(groups) != rows or min(groups, default=0) < 0:
        raise InputError(f"{path} claims {rows:,} rows in {size:,} bytes, which do not hold them; write it anew")


def _read(path: Path, columns: Mapping[str, str], *roles: str) -> "pa.Table":
    """The columns that play these roles."""
    tables, claimed = [], 0
    for part in _parts(path):
        with _open(part, {f"data.columns.{role}": columns[role] for role in roles}) as file:
            tables.append(file.read(columns=[columns[role] for role in roles]))
            claimed += file.metadata.num_rows
    table = pa.concat_tables(tables, promote_options="permissive")
    table.validate(full=True)
    _check_count(len(table), claimed, path)
    return table


def _check_count(rows: int, claimed: int, path: Path) -> None:
    if rows != claimed:
        raise InputError(f"{path} has {rows} rows, but claims {claimed}; write it anew")
    if rows == 0:
        raise InputError(f"{path} has no rows; give at least one")


def _column(table: "pa.Table", path: Path, name: str, start: int = 0) -> "pa.ChunkedArray":
    """A column without nulls; the table begins at the file's row `start`."""
    column = _decoded(table.column(name))
    if column.null_count:
        row = start + int(column.is_null().to_numpy().argmax())
        raise InputError(f"{path}: row {row}: column {name!r} is null; remove or repair it")
    return column


def _matrix(table: "pa.Table", path: Path, name: str, start: int = 0, dim: int | None = None) -> np.ndarray:
    """A column of lists of floats, all of one length, as a matrix, (n, D); `dim` is row 0's, where it is known."""
    column = _column(table, path, name, start)
    if not _is_list(column.type) or not pa.types.is_floating(column.type.value_type):
        raise InputError(
            f"{path}: column {name!r} has type {column.type}; give lists of float16, float32 or float64, one a row"
        )
    lengths = pc.list_value_length(column).to_numpy().astype(np.int64)
    dim = int(lengths[0]) if dim is None else dim
    if dim == 0:
        raise InputError(f"{path}: row 0: column {name!r} is an empty list; give each row a vector")
    if (ragged := lengths != dim).any():
        row = int(ragged.argmax())
        raise InputError(
            f"{path}: row {start + row}: column {name!r} has {lengths[row]} values, but {dim} in row 0; "
            "embed all with the same model"
        )
    return _flatten(column, lengths, path, name, start).to_numpy().reshape(-1, dim)


def _flatten(
    column: "pa.ChunkedArray", lengths: np.ndarray, path: Path, name: str, start: int = 0
) -> "pa.ChunkedArray":
    """The values of all lists, one list after the other."""
    values = _decoded(pc.list_flatten(column))
    if values.null_count:
        row = start + int(np.repeat(np.arange(len(lengths)), lengths)[values.is_null().to_numpy().argmax()])
        raise InputError(f"{path}: row {row}: column {name!r} holds a null; remove or repair it")
    return values


def _is_list(kind: "pa.DataType") -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _decoded(column: "pa.ChunkedArray") -> "pa.ChunkedArray":
    """Values in place of a dictionary of them, which is what categories are."""
    return column.cast(column.type.value_type) if pa.types.is_dictionary(column.type) else column


def _ids(column: "pa.ChunkedArray", path: Path, name: str) -> np.ndarray:
    """Ids as integers or strings: UUIDs spelled out, whole floats and decimals as integers; other numbers stay."""
    kind = column.type
    strings = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if strings or pa.types.is_integer(kind):
        return column.to_numpy()
    if isinstance(kind, pa.BaseExtensionType) and kind.extension_name == "arrow.uuid":
        return np.array([str(value) for value in column.to_pylist()], dtype=object)
    if not pa.types.is_floating(kind) and not pa.types.is_decimal(kind):
        raise InputError(f"{path}: column {name!r} has type {kind}; give ids as integers or strings")
    values = column.to_pylist()
    exact = 2 ** (np.finfo(kind.to_pandas_dtype()).nmant + 1) if pa.types.is_floating(kind) else np.inf
    if rounded := [value for value in values if exact <= abs(value) < np.inf]:
        raise InputError(
            f"{path}: column {name!r} has the id {rounded[0]}, but type {kind} rounds integers from {exact} on; "
            "give ids as integers or strings"
        )
    return np.array(
        [int(value) if math.isfinite(value) and value == int(value) else value for value in values], dtype=object
    )
