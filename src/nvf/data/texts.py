"""A folder of the user's own texts, checked at the door.

    documents.jsonl or documents.csv    id, text
    queries.jsonl or queries.csv        query, and id or (JSON Lines) ids: the documents that answer it;
                                        split, train or val or test, if the user has splits

Every fault raises an InputError that names the file, the line and the remedy.
"""

import csv
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy as np

from nvf.errors import InputError
from nvf.files.ids import checked_ids, shown

SPLITS = ("train", "val", "test")  # not imported from nvf.data.splits, so that a fault is named without importing torch
Id = str | int


class Documents(NamedTuple):
    """What is searched; the place in the lists is the row of the memory."""

    ids: np.ndarray  # (N,) integers or strings
    texts: list[str]


class Queries(NamedTuple):
    """What was asked, and the documents that answer it."""

    texts: list[str]  # n
    targets: np.ndarray  # (n,) or (n, m) int64 rows of the documents, padded with -1
    lines: int  # at least n: equal texts are one query


class Record(NamedTuple):
    """One object of a JSON Lines file, or one row of a CSV file."""

    path: Path
    line: int  # from 1; of a CSV row over several lines, the last
    fields: dict[str, Any]

    @property
    def place(self) -> str:
        """Where it stands, for an error."""
        return f"{self.path}: line {self.line}"


def read_documents(folder: Path, *, id_column: str, text_column: str) -> Documents:
    """The documents of a folder; 7 and "7" are the same id."""
    lines: dict[str, int] = {}
    ids: list[Id] = []
    texts = []
    path = _find(folder, "documents", "id, text")
    for record in _records(path):
        name = _id(_field(record, id_column, "id_column"), record)
        if str(name) in lines:
            raise InputError(
                f"{record.place}: id {shown(name)} is also that of line {lines[str(name)]}; make each its own"
            )
        lines[str(name)] = record.line
        ids.append(name)
        texts.append(_text(record, text_column, "text_column"))
    if any(isinstance(name, str) for name in ids):
        ids = [str(name) for name in ids]
    return Documents(checked_ids(ids, len(texts), str(path)), texts)


def read_queries(
    folder: Path, documents: Documents, *, query_column: str, target_column: str | None
) -> dict[str | None, Queries]:
    """The queries of a folder, by split, or all under None where there are no splits.

    Equal texts of a split are one query, which the documents of all its lines answer.
    """
    rows = {str(name): row for row, name in enumerate(documents.ids.tolist())}
    found: dict[str | None, dict[str, dict[int, None]]] = {}  # the rows of each text, in order
    lines: Counter[str | None] = Counter()
    for record in _records(_find(folder, "queries", "query, id")):
        split = record.fields.get("split")
        if split is not None and split not in SPLITS:
            raise InputError(f"{record.place}: split {shown(split)} is not {', '.join(SPLITS)}; correct it")
        if found and (split is None) != (None in found):
            raise InputError(f"{record.place}: some queries have a split and some have none; give every one, or none")
        lines[split] += 1
        targets = found.setdefault(split, {}).setdefault(_text(record, query_column, "query_column"), {})
        targets.update(dict.fromkeys(_targets(record, target_column, rows)))
    for split in SPLITS if None not in found else ():
        if split not in found:
            raise InputError(f"{folder}: no query has the split {split}; give some, or leave the column out")
    order = (None,) if None in found else SPLITS
    return {
        split: Queries([*found[split]], _padded([*map(list, found[split].values())]), lines[split]) for split in order
    }


def _targets(record: Record, column: str | None, rows: dict[str, int]) -> list[int]:
    """The rows of the documents that answer a query."""
    if column is None:
        column = "ids" if "ids" in record.fields else "id"
    value = _field(record, column, "target_column")
    names = [_id(name, record) for name in (value if isinstance(value, list) else [value])]
    if not names:
        raise InputError(f"{record.place}: {column} is empty; name a document that answers the query, or remove it")
    for name in names:
        if str(name) not in rows:
            raise InputError(f"{record.place}: no document has the id {shown(name)}; correct it, or add the document")
    return [rows[str(name)] for name in names]


def _padded(targets: list[list[int]]) -> np.ndarray:
    most = max(map(len, targets))
    rows = np.array([row + [-1] * (most - len(row)) for row in targets], dtype=np.int64)  # (n, m)
    return rows[:, 0] if most == 1 else rows


def _find(folder: Path, stem: str, columns: str) -> Path:
    paths = [folder / f"{stem}{ending}" for ending in (".jsonl", ".csv")]
    given = [path for path in paths if path.is_file()]
    if not given:
        raise InputError(f"{paths[0]} is missing, and so is {paths[1].name}; it holds {columns}")
    if len(given) > 1:
        raise InputError(f"{folder} holds both {paths[0].name} and {paths[1].name}; keep one")
    return given[0]


def _records(path: Path) -> Iterator[Record]:
    empty = True
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for record in (_json_lines if path.suffix == ".jsonl" else _csv_rows)(path, file):
                empty = False
                yield record
    except UnicodeDecodeError as fault:
        raise InputError(f"{path} is not UTF-8 ({fault}); save it as UTF-8") from None
    except OSError as fault:
        raise InputError(f"{path} cannot be read ({fault}); check who may, and the disk") from None
    if empty:
        raise InputError(f"{path} is empty; give at least one line")


def _json_lines(path: Path, file: TextIO) -> Iterator[Record]:
    for line, text in enumerate(file, 1):
        if not text.strip():
            continue
        try:
            fields = json.loads(text)
            if "\\ud" in text.lower():  # half a pair, as of an emoji cut in two, is no character
                json.dumps(fields, ensure_ascii=False).encode()
        except (ValueError, RecursionError) as fault:
            raise InputError(f"{path}: line {line} is not JSON in UTF-8 ({fault}); write one object a line") from None
        if not isinstance(fields, dict):
            raise InputError(f"{path}: line {line} is no JSON object; write one object a line")
        yield Record(path, line, fields)


def _csv_rows(path: Path, file: TextIO) -> Iterator[Record]:
    csv.field_size_limit(2**31 - 1)  # the limit of 131,072 characters is less than a document may have
    reader = csv.DictReader(file, strict=True)
    line = 0  # the last of those that were read well
    try:
        names = reader.fieldnames or []  # reads the header
        line = reader.line_num
        if twice := [name for place, name in enumerate(names) if name and name in names[:place]]:
            raise InputError(f"{path}: line {line} names the column {shown(twice[0])} twice; name each once")
        for fields in reader:
            line = reader.line_num
            if None in fields:
                raise InputError(f"{path}: line {line} has more fields than the header; quote texts with commas")
            yield Record(path, line, {name: text for name, text in fields.items() if text is not None})
    except csv.Error as fault:
        raise InputError(f"{path}: line {line + 1} is not CSV ({fault}); correct it") from None


def _field(record: Record, column: str, option: str) -> Any:
    if column not in record.fields:
        there = ", ".join(record.fields) or "nothing"
        raise InputError(f"{record.place} has no {column!r}, but {there}; add it, or name its column: {option}=...")
    return record.fields[column]


def _text(record: Record, column: str, option: str) -> str:
    text = _field(record, column, option)
    if not isinstance(text, str):
        raise InputError(f"{record.place}: {column} is {shown(text)}; give a text")
    if not text.strip():
        raise InputError(f"{record.place}: {column} is empty; write a text, or remove the line")
    return text


def _id(name: Any, record: Record) -> Id:
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise InputError(f"{record.place}: the id {shown(name)} is neither a text nor a whole number; give one")
    return name
