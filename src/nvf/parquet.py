"""Vectors, ids and targets in columns of .parquet files, read as whole arrays, and vectors in blocks.

Every fault raises an InputError that names the file, the row or the columns, and the remedy. Importing this module
without pyarrow does too.
"""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from torch import Tensor

from nvf.errors import InputError, one_line
from nvf.ids import checked_ids
from nvf.mapped import state_of
from nvf.memory import check_vectors, from_numpy

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError:
    raise InputError("pyarrow, which reads .parquet files, is not installed; pip install 'nvf[parquet]'") from None

ROWS_A_BYTE = 1024  # more than equal vectors take, run-length encoded and compressed


def read_corpus(path: Path, columns: Mapping[str, str]) -> tuple[Tensor, np.ndarray]:
    """The vectors of the items, (N, D), and their ids, (N,), all different."""
    with _named(path):
        table = _read(path, columns, "vector", "id")
        ids = _column(table, path, columns["id"])
        _check_ids_type(ids.type, path, columns["id"], "integers or strings")
        numbers = checked_ids(ids.to_numpy(), len(ids), f"{path}: column {columns['id']!r}")
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
            _check_ids_type(targets.type, path, name, "ids, or lists of ids")
            return vectors, targets.to_numpy(), np.ones(len(targets), dtype=np.int64)
        _check_ids_type(targets.type.value_type, path, name, "ids, or lists of ids")
        counts = pc.list_value_length(targets).to_numpy().astype(np.int64)
        return vectors, _flatten(targets, counts, path, name).to_numpy(), counts


def read_times(path: Path, column: str) -> np.ndarray:
    """When each query was asked, (n,), of the column's own type."""
    with _named(path):
        return _column(_read(path, {"time": column}, "time"), path, column).to_numpy()


def vector_blocks(path: Path, column: str, size: int) -> Iterator[np.ndarray]:
    """The vectors of a column, (b, D), at most so many at a time; NaN, infinite values and zeros are not looked for."""
    start, dim = 0, None
    with _named(path), _open(path, {"column": column}) as file:
        for batch in file.iter_batches(batch_size=size, columns=[column]):
            table = pa.Table.from_batches([batch])
            table.validate(full=True)
            block = _matrix(table, path, column, start, dim)
            yield block
            start, dim = start + len(block), block.shape[1]
        if start != file.metadata.num_rows:
            raise InputError(f"{path} has {start} rows, but claims {file.metadata.num_rows}; write it anew")


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Faults of the file, of whatever type, as InputErrors that name it; one is that it changes meanwhile."""
    before = state_of(path.stat()) if path.is_file() else None
    try:
        yield
        changed = state_of(path.stat()) != before
    except InputError:
        raise
    except Exception as fault:  # pyarrow raises many types for a damaged file, Python's own among them
        raise InputError(f"{path} is truncated or not a parquet file ({one_line(fault)}); write it anew") from None
    if changed:
        raise InputError(f"{path} changed while it was read; start again when nothing writes to it")


@contextmanager
def _open(path: Path, names: Mapping[str, str]) -> Iterator["pq.ParquetFile"]:
    """The file, which has at least one row and every named column once.

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
    if rows == 0:
        raise InputError(f"{path} has no rows; give at least one")
    # Nothing is asked of columns: where what describes one is damaged, pyarrow 26.0 ends the process.
    groups = [metadata.row_group(group).num_rows for group in range(metadata.num_row_groups)]
    if not 0 < rows <= size * ROWS_A_BYTE or sum(groups) != rows or min(groups) < 0:
        raise InputError(f"{path} claims {rows:,} rows in {size:,} bytes, which do not hold them; write it anew")


def _read(path: Path, columns: Mapping[str, str], *roles: str) -> "pa.Table":
    """The columns that play these roles."""
    with _open(path, {f"data.columns.{role}": columns[role] for role in roles}) as file:
        table = file.read(columns=[columns[role] for role in roles])
    table.validate(full=True)
    if len(table) != file.metadata.num_rows:
        raise InputError(f"{path} has {len(table)} rows, but claims {file.metadata.num_rows}; write it anew")
    return table


def _column(table: "pa.Table", path: Path, name: str, start: int = 0) -> "pa.ChunkedArray":
    """A column without nulls; the table begins at the file's row `start`."""
    column = table.column(name)
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
    values = pc.list_flatten(column)
    if values.null_count:
        row = start + int(np.repeat(np.arange(len(lengths)), lengths)[values.is_null().to_numpy().argmax()])
        raise InputError(f"{path}: row {row}: column {name!r} holds a null; remove or repair it")
    return values


def _is_list(kind: "pa.DataType") -> bool:
    return pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)


def _check_ids_type(kind: "pa.DataType", path: Path, name: str, what: str) -> None:
    strings = pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    if not pa.types.is_integer(kind) and not strings:
        raise InputError(f"{path}: column {name!r} has type {kind}; give {what}, integers or strings")
