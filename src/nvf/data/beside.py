"""What may be given beside vectors: texts of rows and queries, and gains, what each target is worth to its query."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nvf.data.splits import SPLITS
from nvf.data.texts import read_lines, text_of
from nvf.errors import InputError, refused
from nvf.files.ids import shown
from nvf.files.npy import NpyFile, open_vectors
from nvf.files.vectors import check_vectors
from nvf.models.memory import VectorMemory, unit

COLUMNS: Mapping[str, Any] = {name: name for name in ("id", "vector", "targets", "text", "gains")} | {"time": None}
Places = Mapping[str, tuple[str, np.ndarray, int]]  # of each split: its file's stem, its queries' lines, and all lines


def open_table(path: Path, columns: Mapping[str, Any], *roles: str) -> Any:
    """Open the `ParquetFile` of a path that has the columns for these roles, the vectors' among them."""
    from nvf.data.parquet import ParquetFile  # needs pyarrow, which is an extra

    return ParquetFile(path, {f"data.columns.{role}": columns[role] for role in roles})


def optional_column(table: Any, columns: Mapping[str, Any], role: str) -> tuple[list[Any], np.ndarray] | None:
    """Return the values of a column and how many each row has, (n,); None without one, unless the user named it."""
    name = columns.get(role)
    if name is None or (name == COLUMNS[role] and name not in table.names):
        return None
    return open_table(table.path, columns, "vector", role).ids(name)


def texts_of_rows(folder: str | Path, memory: VectorMemory, columns: Mapping[str, Any] = COLUMNS) -> list[str] | None:
    """Return the text of each row, those of equal vectors joined; None where neither memory nor folder has texts."""
    memory.texts = memory.texts or read_texts(Path(folder), "corpus", memory.given, columns)
    return memory.texts_of_rows()


def read_texts(folder: Path, stem: str, count: int, columns: Mapping[str, Any] = COLUMNS) -> list[str] | None:
    """Read the texts of the `count` vectors of corpus, queries, train, val or test; None if there are none.

    They are in a file of lines {"text": ...}, or else in a column of the vectors' .parquet file.
    """
    path = folder / ("texts.jsonl" if stem == "corpus" else f"{stem}_texts.jsonl")
    if path.exists():
        return text_lines(path, count)
    path = folder / f"{f'{stem}_queries' if stem in SPLITS else stem}.parquet"
    if not path.exists() or (found := optional_column(open_table(path, columns, "vector"), columns, "text")) is None:
        return None
    texts, counts = found
    if len(texts) != count or (counts != 1).any() or not all(isinstance(text, str) for text in texts):
        what = f"{path}: column {columns['text']!r}"
        raise InputError(f"{what} is not one text for each of {count} vectors; correct it, or data.columns.text=null")
    return texts


def text_lines(path: Path, count: int) -> list[str]:
    """Read a file of `count` lines {"text": ...}; empty lines are left out."""
    texts = [text_of(place, fields, "text", empty=True) for place, fields in read_lines(path)]
    if len(texts) != count:
        raise InputError(f"{path} has {len(texts)} texts for {count} vectors; give each its line")
    return texts


def read_pairs(folder: Path, memory: VectorMemory, query_dim: int) -> tuple[Tensor, Tensor] | None:
    """Read texts embedded by the model of the rows, (P, D), and by that of the queries, (P, Dq); None without any."""
    old, new = folder / "pairs_old.npy", folder / "pairs_new.npy"
    if not (old.exists() or new.exists()):
        return None
    first = read_unit(old, memory.dim)
    return first, read_unit(new, query_dim, len(first))


def read_references(
    folder: Path, memory: VectorMemory, places: Places, queries: Mapping[str, Tensor]
) -> dict[str, dict[str, tuple[Tensor, Tensor]]]:
    """Read what queries of another model are compared with, for the table alone: queries and rows of each search.

    `old` is a search of the rows by queries of their own model, where reference_old_{queries,train_queries,...}.npy
    hold these, and `anew` one of reference_new_corpus.npy, all rows embedded by the new model. `places` are those of
    each split's queries in the file of a stem.
    """
    found: dict[str, dict[str, tuple[Tensor, Tensor]]] = {}
    anew = folder / "reference_new_corpus.npy"
    rows = read_unit(anew, next(iter(queries.values())).shape[1], memory.given) if anew.exists() else None
    if rows is not None and memory.vector_of_row is not None:
        rows = rows[memory.vector_of_row.cpu()]
    for split, (stem, of_split, lines) in places.items():
        path = folder / f"reference_old_{stem if stem == 'queries' else f'{stem}_queries'}.npy"
        old = {"old": (read_unit(path, memory.dim, lines)[of_split], memory.rows)} if path.exists() else {}
        found[split] = old if rows is None else {**old, "anew": (queries[split], rows)}
    return found


def read_unit(path: Path, dim: int, count: int | None = None) -> Tensor:
    """Read vectors of so many dimensions, (n, dim), scaled to length 1; `count` is how many there must be."""
    vectors = torch.from_numpy(open_vectors(path, "vectors, one a line").read())
    check_vectors(vectors, str(path))
    if vectors.shape[1] != dim or count not in (None, len(vectors)):
        shape, wanted = tuple(vectors.shape), (count or len(vectors), dim)
        raise InputError(f"{path} has shape {shape}, but the other files ask for {wanted}; write it again")
    return unit(vectors)


def read_gains(path: Path, given: np.ndarray) -> np.ndarray | None:
    """Read gains, (n, m) numbers, and return those of the t targets, (t,), which `given`, (n, m), says; or None."""
    if not path.exists():
        return None
    gains = NpyFile(path, "what each target is worth")
    values = gains.read()
    if gains.dtype.kind not in "iuf" or values.size != given.size or gains.shape[:1] != given.shape[:1]:
        raise InputError(f"{path}: {gains.shape} {gains.dtype} for {given.shape} targets; give each a number")
    return checked_gains(values.reshape(given.shape)[given], given.sum(axis=1), str(path))


def checked_gains(values: np.ndarray | Sequence[Any], counts: np.ndarray, name: str) -> np.ndarray:
    """Return gains as float32, (t,), `counts` a query, (n,); one that is no finite number above 0 is an InputError."""
    with refused(f"{name} holds no numbers", "give each target one", TypeError, ValueError), np.errstate(over="ignore"):
        gains = np.array(values).astype(np.float32)
    if (wrong := ~((gains > 0) & np.isfinite(gains))).any():
        first = int(wrong.argmax())
        place = f"{name}: row {np.repeat(np.arange(len(counts)), counts)[first]}"
        raise InputError(f"{place}: the gain {shown(values[first])} is not a number above 0; correct it")
    return gains
