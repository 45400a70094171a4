"""A file of vectors, read a block at a time: .npy or .parquet."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from nvf.embeddings import read_array
from nvf.errors import InputError
from nvf.memory import check_largest, from_numpy

if TYPE_CHECKING:
    import pyarrow as pa

CHECK_BLOCK = 8192


@dataclass(frozen=True)
class VectorFile:
    """Vectors that stay on disk."""

    count: int
    blocks: Callable[[int], Iterator[np.ndarray]]  # of so many rows each, (b, D); starts anew with every call


def open_vectors(path: Path, column: str, *, dim: int) -> VectorFile:
    """The vectors of a .npy file, or of a column of lists in a .parquet file, (n, dim); every one is checked.

    Raises:
        InputError: a missing or damaged file, another type, shape or dimension, a row that is zero or not finite.
    """
    openers = {".npy": lambda: _open_npy(path, dim), ".parquet": lambda: _open_parquet(path, column, dim)}
    if path.suffix not in openers:
        raise InputError(f"{path}: {path.suffix or 'no ending'} is not read; give {' or '.join(openers)}")
    vectors = openers[path.suffix]()
    largest = [from_numpy(block).abs().amax(dim=-1) for block in vectors.blocks(CHECK_BLOCK)]
    check_largest(torch.cat(largest), str(path))
    return vectors


def import_pyarrow() -> Any:
    """Pyarrow with its Parquet half, which few users need.

    Raises:
        InputError: it is not installed.
    """
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise InputError("Parquet files need pyarrow: pip install 'nvf[parquet]'") from None
    return pyarrow


def _open_npy(path: Path, dim: int) -> VectorFile:
    array = read_array(path, "the vectors of your queries")
    if array.ndim != 2 or array.size == 0:
        raise InputError(f"{path}: shape {array.shape}; give a non-empty matrix, (n, {dim})")
    if array.shape[1] != dim:
        raise InputError(f"{path}: {_other_dimension(array.shape[1], dim)}")
    if array.dtype.kind != "f" or array.dtype.itemsize > 8:
        raise InputError(f"{path}: type {array.dtype}; give float16, float32 or float64")

    def blocks(size: int) -> Iterator[np.ndarray]:
        return (array[start : start + size] for start in range(0, len(array), size))

    return VectorFile(len(array), blocks)


def _open_parquet(path: Path, column: str, dim: int) -> VectorFile:
    pyarrow = import_pyarrow()
    if not path.is_file():
        raise InputError(f"{path} is missing; it holds the vectors of your queries")
    with _parquet_faults(path):
        file = pyarrow.parquet.ParquetFile(path)
    names = file.schema_arrow.names
    if column not in names:
        raise InputError(f"{path} has no column {column!r}, but {', '.join(names)}; name one: column=...")
    kind = file.schema_arrow.field(column).type
    value = getattr(kind, "value_type", None)  # of lists of any kind
    if value is None or not pyarrow.types.is_floating(value):
        raise InputError(f"{path}: column {column!r} holds {kind}; give lists of floats")
    if file.metadata.num_rows == 0:
        raise InputError(f"{path} has no rows; give at least one query")

    def blocks(size: int) -> Iterator[np.ndarray]:
        start = 0
        batches = file.iter_batches(batch_size=size, columns=[column])
        while True:
            with _parquet_faults(path):
                batch = next(batches, None)
            if batch is None:
                return
            yield _matrix(batch.column(0), dim, f"{path}: column {column!r}", start)
            start += len(batch)

    return VectorFile(file.metadata.num_rows, blocks)


@contextmanager
def _parquet_faults(path: Path) -> Iterator[None]:
    pyarrow = import_pyarrow()
    try:
        yield
    except (pyarrow.ArrowException, OSError) as fault:
        raise InputError(f"{path} is damaged or not a Parquet file ({fault}); write it again") from None


def _matrix(lists: "pa.Array", dim: int, name: str, start: int) -> np.ndarray:
    """Lists of `dim` floats each as a matrix, (b, dim); the first of them is the file's row `start`."""
    values = lists.flatten()
    lengths = np.asarray(lists.value_lengths().fill_null(0))
    for row in np.flatnonzero(lengths != dim)[:1]:
        raise InputError(f"{name}, row {start + row}: {_other_dimension(lengths[row], dim)}")
    return values.to_numpy(zero_copy_only=False).reshape(len(lists), dim)  # null becomes NaN, which is refused


def _other_dimension(found: int, dim: int) -> str:
    return f"{found} dimensions, but the pipeline's memory has {dim}; embed both with the same model"
