"""Ids of a memory's rows, integers or strings: checking, reading and writing them, and the rows that have them."""

import json
import reprlib
import uuid
from collections.abc import Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

import numpy as np

from nvf.errors import InputError, refused

IDS_FILE = "ids.json"
REMEDY = "give each row an integer or a string of its own"
_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxlong = 200, 60  # characters; a UUID is shown in full


def shown(value: Any) -> str:
    """Describe an id or a text in an error's message, at bounded length however long it is."""
    return _REPR.repr(value)


def checked_ids(ids: np.ndarray | Sequence[Any], rows: int, name: str, *, remedy: str = REMEDY) -> np.ndarray:
    """Return the ids, (N,), as int64 or objects: integers or strings, all different."""
    values = np.atleast_1d(ids).tolist() if isinstance(ids, np.ndarray) else list(ids)
    if len(values) != rows:
        raise InputError(f"{name}: {len(values)} ids for {rows} rows; {remedy}")
    kind: Any = str if values and isinstance(values[0], str) else Integral
    first: dict[Any, int] = {}
    for row, value in enumerate(values):
        fault = None
        if not isinstance(value, kind) or isinstance(value, bool):
            fault = ", which is not an integer or a string, or not of the type of the first"
        elif kind is str and value.encode(errors="ignore").decode() != value:
            fault = ", which holds half a character"
        elif first.setdefault(value, row) != row:
            fault = f" of row {first[value]}"
        if fault:
            raise InputError(f"{name}: row {row} has the id {shown(value)}{fault}; {remedy}")
    if kind is str or not values:
        return np.array(values, dtype=object)
    least, most = int(min(values)), int(max(values))
    if least < -(2**63) or most >= 2**64:
        raise InputError(f"{name}: the ids {shown(least)} to {shown(most)} do not fit into 64 bits; {remedy}")
    return np.array([int(value) for value in values], dtype=np.int64 if most < 2**63 else object)


def plain_uuid(name: Any) -> Any:
    """Spell a UUID in lower case with hyphens; return anything else as it is."""
    try:
        return str(uuid.UUID(name)) if isinstance(name, str) else name
    except ValueError:
        return name


def read_ids(path: Path, rows: int | None, *, remedy: str = REMEDY) -> np.ndarray:
    """Read a JSON list of ids, one a row, or any number if that is None; a faulty file is an InputError."""
    with refused(f"{path} is missing, truncated or no JSON list", remedy, ValueError, RecursionError, OSError):
        ids = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
        if not isinstance(ids, list):
            raise ValueError("no list")
    return checked_ids(ids, len(ids) if rows is None else rows, str(path), remedy=remedy)


def write_ids(ids: np.ndarray, path: Path) -> None:
    """Write the file that `read_ids` reads."""
    path.write_text(json.dumps(ids.tolist()) + "\n", encoding="utf-8")


def target_rows(ids: np.ndarray | range | None, targets: np.ndarray, counts: np.ndarray, name: str) -> np.ndarray:
    """Return the rows, (n, m) int64 padded with -1, of targets, (t,), `counts` a query, (n,), which are ids of rows.

    `ids`, (N,), are those of all rows, or range(N) for row numbers. A target that is no row's id is an InputError.
    """
    if ids is None:
        raise InputError(f"{name} names its targets by id, but the memory has no ids; give it ids")
    if isinstance(ids, range):
        known = f"outside 0..{len(ids) - 1}, and only -1 pads"
        rows = np.where((targets >= 0) & (targets < len(ids)), targets, -1).astype(np.int64)
    else:
        known = f"not an id of the memory, whose first is {shown(ids.tolist()[0])}"
        row_of = {value: row for row, value in enumerate(ids.tolist())}
        rows = np.array([row_of.get(value, -1) for value in targets.tolist()], dtype=np.int64)
    if (unknown := rows < 0).any():
        first = int(unknown.argmax())
        place = f"{name}: row {np.repeat(np.arange(len(counts)), counts)[first]}: target"
        raise InputError(f"{place} {shown(targets.tolist()[first])} is {known} ({unknown.sum()} such); correct them")
    return padded(rows, counts)


def padded(values: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Lay out values that come query by query, (t,), `counts` a query, (n,), as (n, m), padded with -1."""
    rows = np.full((len(counts), int(counts.max())), -1, values.dtype)
    rows[np.arange(rows.shape[1]) < counts[:, None]] = values
    return rows
