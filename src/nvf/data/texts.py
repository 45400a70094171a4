"""Readers of a folder of the user's own texts.

    documents.jsonl or documents.csv    id, text
    queries.jsonl or queries.csv        query, and id or (JSON Lines) ids: the documents that answer it;
                                        split, train or val or test, if the user has splits

Every fault is an InputError that names the file, the line and the fix.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nvf.data.splits import SPLITS
from nvf.errors import InputError, one_line
from nvf.files.ids import checked_ids, padded, shown


class Documents(NamedTuple):
    """What is searched; a document's place in the lists is its row in the memory."""

    ids: np.ndarray  # (N,) integers or strings
    texts: list[str]


class Queries(NamedTuple):
    """What was asked, and the documents that answer it."""

    texts: list[str]  # n
    targets: np.ndarray  # (n, m) int64 rows of the documents, padded with -1
    lines: int  # at least n, because equal texts are one query


class Line(NamedTuple):
    """One object of a JSON Lines file, or one row of a CSV file."""

    place: str  # file and line, for an error; a CSV row over several lines has the number of the last
    fields: dict[str, Any]

    def field(self, column: str, option: str) -> Any:
        """Return the value of a column, whose name is an option of the command."""
        if column not in self.fields:
            known = ", ".join(self.fields) or "nothing"
            raise InputError(f"{self.place} has no {column!r}, but {known}; add it, or name its column: {option}=...")
        return self.fields[column]

    def text(self, column: str, option: str) -> str:
        """Return a text that is not empty."""
        text = self.field(column, option)
        if not isinstance(text, str):
            raise InputError(f"{self.place}: {column} is {shown(text)}; give a text")
        if not text.strip():
            raise InputError(f"{self.place}: {column} is empty; write a text, or remove the line")
        return text

    def checked_id(self, name: Any) -> str | int:
        """Return the id if it is a string or an integer."""
        if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
            raise InputError(f"{self.place}: the id {shown(name)} is neither a text nor a whole number; give one")
        return name


def read_documents(folder: Path, *, id_column: str, text_column: str) -> Documents:
    """Read the documents of a folder; 7 and "7" are the same id."""
    places: dict[str, str] = {}
    ids: list[str | int] = []
    texts = []
    for line in _lines(folder, "documents", "id, text"):
        name = line.checked_id(line.field(id_column, "id_column"))
        if (other := places.setdefault(str(name), line.place)) != line.place:
            raise InputError(f"{line.place}: id {shown(name)} is also that of {other}; make each its own")
        ids.append(name)
        texts.append(line.text(text_column, "text_column"))
    if any(isinstance(name, str) for name in ids):
        ids = [str(name) for name in ids]
    return Documents(checked_ids(ids, len(texts), f"{folder}: documents"), texts)


def read_queries(
    folder: Path, documents: Documents, *, query_column: str, target_column: str | None
) -> dict[str | None, Queries]:
    """Read the queries of a folder, by split, or all under None where there are no splits.

    Equal texts of a split are one query, which the documents of all its lines answer.
    """
    rows = {str(name): row for row, name in enumerate(documents.ids.tolist())}
    targets: dict[str | None, dict[str, dict[int, None]]] = {}  # by split and text, the rows in order
    lines: Counter[str | None] = Counter()
    for line in _lines(folder, "queries", "query, id"):
        split = line.fields.get("split")
        if split is not None and split not in SPLITS:
            raise InputError(f"{line.place}: split {shown(split)} is not {', '.join(SPLITS)}; correct it")
        if targets and (split is None) != (None in targets):
            raise InputError(f"{line.place}: some queries have a split and some have none; give every one, or none")
        lines[split] += 1
        of_text = targets.setdefault(split, {}).setdefault(line.text(query_column, "query_column"), {})
        of_text.update(dict.fromkeys(_targets(line, target_column, rows)))
    order = (None,) if None in targets else SPLITS
    if missing := [split for split in order if split not in targets]:
        raise InputError(f"{folder}: no query has the split {missing[0]}; give some, or leave the column out")
    return {split: Queries([*targets[split]], _table(targets[split]), lines[split]) for split in order}


def _table(targets: dict[str, dict[int, None]]) -> np.ndarray:
    counts = np.array([len(rows) for rows in targets.values()])
    return padded(np.array([*chain.from_iterable(targets.values())]), counts)


def _targets(line: Line, column: str | None, rows: dict[str, int]) -> list[int]:
    """Return the rows of the documents that answer a query."""
    if column is None:
        column = "ids" if "ids" in line.fields else "id"
    value = line.field(column, "target_column")
    names = [line.checked_id(name) for name in (value if isinstance(value, list) else [value])]
    if not names:
        raise InputError(f"{line.place}: {column} is empty; name a document that answers the query, or remove it")
    for name in names:
        if str(name) not in rows:
            raise InputError(f"{line.place}: no document has the id {shown(name)}; correct it, or add the document")
    return [rows[str(name)] for name in names]


def _lines(folder: Path, stem: str, columns: str) -> Iterator[Line]:
    """Read the file with this stem, .jsonl or .csv, of which there must be one."""
    paths = [folder / f"{stem}{ending}" for ending in (".jsonl", ".csv")]
    given = [path for path in paths if path.is_file()]
    if not given:
        raise InputError(f"{paths[0]} is missing, and so is {paths[1].name}; it holds {columns}")
    if len(given) > 1:
        raise InputError(f"{folder} holds both {paths[0].name} and {paths[1].name}; keep one")
    path, number, empty = given[0], 1, True
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            if path.suffix == ".jsonl":
                for number, text in enumerate(file, 1):
                    if text.strip():
                        empty = False
                        yield Line(f"{path}: line {number}", _json_fields(text))
            else:
                csv.field_size_limit(2**31 - 1)  # the limit of 131,072 characters is less than a document may have
                reader = csv.DictReader(file, strict=True)
                _check_header(reader.fieldnames or [])
                number = reader.line_num + 1
                for fields in reader:
                    empty, number = False, reader.line_num
                    yield Line(f"{path}: line {number}", _csv_fields(fields))
                    number += 1
    except (ValueError, RecursionError, OSError, csv.Error) as fault:
        form = "one JSON object a line" if path.suffix == ".jsonl" else "CSV, whose first line names the columns"
        raise InputError(f"{path}: line {number} cannot be read ({one_line(fault)}); write {form}, in UTF-8") from None
    if empty:
        raise InputError(f"{path} is empty; give at least one line")


def _json_fields(text: str) -> dict[str, Any]:
    fields = json.loads(text)
    if "\\ud" in text.lower():  # half a pair, as of an emoji cut in two, is no character
        json.dumps(fields, ensure_ascii=False).encode()
    if not isinstance(fields, dict):
        raise ValueError("it is no JSON object")
    return fields


def _check_header(names: Sequence[str]) -> None:
    if twice := [name for name, count in Counter(names).items() if name and count > 1]:
        raise ValueError(f"it names the column {shown(twice[0])} twice")


def _csv_fields(fields: dict[Any, Any]) -> dict[str, Any]:
    if None in fields:
        raise ValueError("it has more fields than the header; quote texts with commas")
    return {name: text for name, text in fields.items() if text is not None}
