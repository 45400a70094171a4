"""Readers of a folder of the user's own texts; a fault is an InputError that names the line.

documents.jsonl or documents.csv    id, text
queries.jsonl or queries.csv        query, and id or (JSON Lines) ids: the documents that answer it;
                                    split, train or val or test, if the user has splits
"""

import csv
import json
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nvf.data.splits import SPLITS
from nvf.errors import InputError, one_line
from nvf.files.ids import checked_ids, padded, shown


class Queries(NamedTuple):
    """What was asked, and the documents that answer it."""

    texts: list[str]  # n
    targets: np.ndarray  # (n, m) int64 rows of the documents, padded with -1


def read_documents(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Read the ids, (N,) integers or strings, and the texts of a folder's documents; 7 and "7" are the same id."""
    place_of: dict[str, str] = {}
    ids: list[str | int] = []
    texts = []
    for place, fields in _lines(folder, "documents", "id, text"):
        name = _checked_id(place, _field(place, fields, "id"))
        if (other := place_of.setdefault(str(name), place)) != place:
            raise InputError(f"{place}: id {shown(name)} is also that of {other}; make each its own")
        ids.append(name)
        texts.append(_text(place, fields, "text"))
    if any(isinstance(name, str) for name in ids):
        ids = [str(name) for name in ids]
    return checked_ids(ids, len(texts), f"{folder}: documents"), texts


def read_queries(folder: Path, ids: np.ndarray) -> dict[str | None, Queries]:
    """Read the queries by split, or all under None where there are no splits; equal texts of a split are one query."""
    row_of = {str(name): row for row, name in enumerate(ids.tolist())}
    targets: dict[str | None, dict[str, dict[int, None]]] = {}  # by split and text, the rows in order
    for place, fields in _lines(folder, "queries", "query, id"):
        split = fields.get("split")
        if split not in (None, *SPLITS):
            raise InputError(f"{place}: split {shown(split)} is not {', '.join(SPLITS)}; correct it")
        rows = targets.setdefault(split, {}).setdefault(_text(place, fields, "query"), {})
        value = _field(place, fields, "ids" if "ids" in fields else "id")
        if value == []:
            raise InputError(f"{place}: ids is empty; name a document that answers the query, or remove it")
        for name in value if isinstance(value, list) else [value]:
            if (row := row_of.get(str(_checked_id(place, name)))) is None:
                raise InputError(f"{place}: no document has the id {shown(name)}; correct it, or add the document")
            rows[row] = None
    if targets.keys() not in ({None}, set(SPLITS)):
        given = f"queries have the splits {', '.join(split or 'none' for split in targets)}"
        raise InputError(f"{folder}: {given}; give {', '.join(SPLITS)}, or leave out the column")
    queries = {}
    for split in (None,) if None in targets else SPLITS:
        rows_of_texts = targets[split].values()
        table = padded(np.array([*chain.from_iterable(rows_of_texts)]), np.array([*map(len, rows_of_texts)]))
        queries[split] = Queries([*targets[split]], table)
    return queries


def _field(place: str, fields: dict[str, Any], name: str) -> Any:
    if name not in fields:
        raise InputError(f"{place} has no {name!r}, but {', '.join(fields) or 'nothing'}; add it, or rename a column")
    return fields[name]


def _text(place: str, fields: dict[str, Any], name: str) -> str:
    text = _field(place, fields, name)
    if not isinstance(text, str) or not text.strip():
        raise InputError(f"{place}: {name} is {shown(text)}; give a text that is not empty, or remove the line")
    return text


def _checked_id(place: str, name: Any) -> str | int:
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise InputError(f"{place}: the id {shown(name)} is neither a text nor a whole number; give one")
    return name


def _lines(folder: Path, stem: str, columns: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place, for an error, and the fields of each line in the one .jsonl or .csv file with this stem."""
    given = [path for ending in (".jsonl", ".csv") if (path := folder / f"{stem}{ending}").is_file()]
    if len(given) != 1:
        count = "both" if given else "neither"
        raise InputError(f"{folder} holds {count} of {stem}.jsonl and {stem}.csv; give one, which holds {columns}")
    (path,) = given
    number, read = 0, _json_lines if path.suffix == ".jsonl" else _csv_lines
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, fields in read(file):
                json.dumps(fields, ensure_ascii=False).encode()  # refuses half a character, as of an emoji cut in two
                yield f"{path}: line {number}", fields
    except (ValueError, RecursionError, OSError, csv.Error) as fault:
        form = "one JSON object a line" if path.suffix == ".jsonl" else "CSV, whose first line names the columns"
        raise InputError(f"{path}: after line {number}: {one_line(fault)}; write {form}, in UTF-8") from None
    if number == 0:
        raise InputError(f"{path} is empty; give at least one line")


def _json_lines(file: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in enumerate(file, 1):
        if text.strip():
            fields = json.loads(text)
            if not isinstance(fields, dict):
                raise ValueError("it is no JSON object")
            yield number, fields


def _csv_lines(file: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # by default 131,072 characters, less than a document may have
    reader = csv.DictReader(file, strict=True)
    for fields in reader:
        if None in fields:  # those beyond the header's
            raise ValueError("it has more fields than the header; quote texts with commas")
        yield reader.line_num, fields
