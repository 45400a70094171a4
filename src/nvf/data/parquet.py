"""Reader of columns of .parquet files, a block of rows at a time; a fault, or no pyarrow, is an InputError."""

import math
import uuid
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from nvf.errors import InputError, refused
from nvf.files.mapped_rows import state_of
from nvf.files.npy import ROWS, ArrayFile

try:
    import pyarrow as pa
    import pyarrow.compute as pc
    import pyarrow.parquet as pq
except ImportError:
    raise InputError(".parquet files need pyarrow: pip install -e '.[parquet]' in NVF's folder") from None

ROWS_A_BYTE = 1024  # more than even equal vectors reach, run-length encoded and compressed


class ParquetFile(ArrayFile):
    """The vectors in a column of a .parquet file, (n, D), or of a folder of such parts, which are joined by name.

    `columns` has the names of the columns that are read, by the option that gives each; the first holds the vectors.
    """

    def __init__(self, path: Path, columns: Mapping[str, str]) -> None:
        self.path, (self.column, *_) = path, columns.values()
        self.parts = (sorted(path.glob("*.parquet")) if path.is_dir() else []) or [path]
        for part in self.parts:
            if not part.is_file():
                holds = " and ".join(f"column {name!r}" for name in columns.values())
                raise InputError(f"{part} is missing, or no file; it holds {holds}")
        # All exceptions: pyarrow raises many types for a damaged file, Python's own among them.
        self._damage_named = partial(refused, f"{path} is truncated or not a parquet file", "write it anew")
        with self._damage_named():
            self._states = [state_of(part.stat()) for part in self.parts]
            self.shape = (sum(_claimed_rows(part, columns) for part in self.parts), 0)
            schema = pq.read_schema(self.parts[0])
            self.names, kind = schema.names, schema.field(self.column).type
            if not pa.types.is_floating(getattr(kind, "value_type", pa.null())):
                raise InputError(f"{path}: column {self.column!r} has type {kind}; give lists of floats")
            if not len(self):
                raise InputError(f"{path} has no rows; write it anew")
            _, first, _ = next(self._values(self.column, 1))
        self.shape, self.dtype = (len(self), len(first)), np.dtype(kind.value_type.to_pandas_dtype())
        if not len(first):
            raise InputError(f"{path}: row 0: column {self.column!r} is an empty list; give each row a vector")

    def blocks(self, rows: int) -> Iterator[np.ndarray]:
        with self._damage_named():
            for start, values, counts in self._values(self.column, rows):
                if (ragged := counts != self.shape[1]).any():
                    row = int(ragged.argmax())
                    fault = f"row {start + row} has {counts[row]} values, but row 0 has {self.shape[1]}"
                    raise InputError(f"{self.path}: column {self.column!r}: {fault}; embed all with one model")
                yield np.array(values.to_numpy(zero_copy_only=False), self.dtype).reshape(-1, self.shape[1])

    def ids(self, column: str) -> tuple[list[Any], np.ndarray]:
        """Return the ids in row order, and how many each row has, (n,); whole floats and decimals become integers."""
        ids: list[Any] = []
        counts = []
        with self._damage_named():
            for _, values, count in self._values(column, ROWS):
                kind, exact = values.type, math.inf
                if pa.types.is_floating(kind):
                    exact = 2.0 ** (np.finfo(kind.to_pandas_dtype()).nmant + 1)
                if pa.types.is_floating(kind) or pa.types.is_decimal(kind):
                    ids += [int(v) if abs(v) < exact and v == int(v) else v for v in values.to_pylist()]
                else:
                    ids += [str(v) if isinstance(v, uuid.UUID) else v for v in values.to_pylist()]
                counts.append(count)
        return ids, np.concatenate(counts)

    def times(self, column: str) -> np.ndarray:
        """Return the values of a column, (n,), in its own type."""
        with self._damage_named():
            return np.concatenate([v.to_numpy(zero_copy_only=False) for _, v, _ in self._values(column, ROWS)])

    def _values(self, column: str, size: int) -> Iterator[tuple[int, "pa.Array", np.ndarray]]:
        """Yield the first row of each block, the block's values with lists joined, and how many values each row has."""
        start, expected = 0, len(self)
        for part in self.parts:
            with pq.ParquetFile(part, page_checksum_verification=True) as file:
                for batch in file.iter_batches(size, columns=[column]):
                    batch.validate(full=True)
                    if 0 < len(batch) <= expected - start:
                        values, rows = self._flat(batch.column(0), column, np.arange(start, start + len(batch)))
                        yield start, values, np.bincount(rows - start, minlength=len(batch))
                    start += len(batch)
        if [state_of(part.stat()) for part in self.parts] != self._states:
            raise InputError(f"{self.path} changed while it was read; start again when nothing writes to it")
        if start != expected:
            raise InputError(f"{self.path} does not have the {expected} rows that it claims; write it anew")

    def _flat(self, values: "pa.Array", column: str, rows: np.ndarray) -> tuple["pa.Array", np.ndarray]:
        """Return values with categories spelled out and lists joined, and the row that each is from; refuse nulls."""
        if pa.types.is_dictionary(values.type):
            values = values.dictionary_decode()
        if values.null_count:
            row = rows[values.is_null().to_numpy(zero_copy_only=False).argmax()]
            raise InputError(f"{self.path}: row {row}: column {column!r} holds a null; remove or repair it")
        kind = values.type
        if not (pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)):
            return values, rows
        lengths = pc.list_value_length(values).to_numpy(zero_copy_only=False)
        return self._flat(values.flatten(), column, np.repeat(rows, lengths))


def _claimed_rows(path: Path, columns: Mapping[str, str]) -> int:
    """Return how many rows a file claims, unless it lacks a column or is too small for so many rows."""
    with pq.ParquetFile(path) as file:
        known = file.schema_arrow.names
        for option, name in columns.items():
            if known.count(name) != 1:
                found = f"{known.count(name)} columns {name!r}, but {', '.join(map(repr, known))}"
                raise InputError(f"{path} has {found}; add it, or name one of them with {option}=")
        rows, size = file.metadata.num_rows, path.stat().st_size
        # Nothing is asked of columns: if their descriptions are damaged, pyarrow 26.0 ends the process.
        groups = [file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups)]
    if not 0 <= rows <= size * ROWS_A_BYTE or sum(groups) != rows or min(groups, default=0) < 0:
        raise InputError(f"{path} claims {rows:,} rows in {size:,} bytes, which do not hold them; write it anew")
    return rows
