"""Readers of a folder of the user's own texts; a fault is an InputError that names the line.

documents.jsonl or documents.csv    id, text
queries.jsonl or queries.csv        query, and id or (JSON Lines) ids: the documents that answer it;
                                    split, train or val or test, if the user has splits
"""

import csv
import json
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nvf.data.splits import SPLITS
from nvf.errors import InputError, one_line
from nvf.files.ids import checked_ids, padded, shown

FORMS = {
    ".jsonl": "one JSON object a line",
    ".csv": "CSV, whose first line names the columns",
    ".tsv": "fields between tabs, whose first line names the columns",
}
Rows = dict[str, dict[int, float]]  # by a query's text, the gain of each document's row that answers it, in order


class Queries(NamedTuple):
    """What was asked, and the documents that answer it."""

    texts: list[str]  # n
    targets: np.ndarray  # (n, m) int64 rows of the documents, padded with -1
    gains: np.ndarray | None = None  # (n, m) float32, what each target is worth, padded with 0; None: all are worth 1


def read_documents(folder: Path) -> tuple[np.ndarray, list[str]]:
    """Read the ids, (N,) integers or strings, and the texts of a folder's documents; 7 and "7" are the same id."""
    lines = _lines(folder, "documents", "id, text")
    given = ((place, field(place, fields, "id"), text_of(place, fields, "text")) for place, fields in lines)
    return documents_of(given, f"{folder}: documents")


def documents_of(given: Iterable[tuple[str, Any, str]], name: str) -> tuple[np.ndarray, list[str]]:
    """Return the ids and the texts of documents, of which each is given with its place, for an error."""
    place_of: dict[str, str] = {}
    ids: list[str | int] = []
    texts = []
    for place, found, text in given:
        if (other := place_of.setdefault(str(checked_id(place, found)), place)) != place:
            raise InputError(f"{place}: id {shown(found)} is also that of {other}; make each its own")
        ids.append(found)
        texts.append(text)
    if any(isinstance(found, str) for found in ids):
        ids = [str(found) for found in ids]
    return checked_ids(ids, len(texts), name), texts


def read_queries(folder: Path, ids: np.ndarray) -> dict[str | None, Queries]:
    """Read the queries by split, or all under None where there are no splits; equal texts of a split are one query."""
    targets = answers_of(_answers(folder), ids)
    if targets.keys() not in ({None}, set(SPLITS)):
        given = f"queries have the splits {', '.join(split or 'none' for split in targets)}"
        raise InputError(f"{folder}: {given}; give {', '.join(SPLITS)}, or leave out the column")
    return {split: laid_out(targets[split]) for split in ((None,) if None in targets else SPLITS)}


def _answers(folder: Path) -> Iterator[tuple[str, str | None, str, Any, float]]:
    for place, fields in _lines(folder, "queries", "query, id"):
        split = fields.get("split")
        if split not in (None, *SPLITS):
            raise InputError(f"{place}: split {shown(split)} is not {', '.join(SPLITS)}; correct it")
        text, value = text_of(place, fields, "query"), field(place, fields, "ids" if "ids" in fields else "id")
        if value == []:
            raise InputError(f"{place}: ids is empty; name a document that answers the query, or remove it")
        for name in value if isinstance(value, list) else [value]:
            yield place, split, text, name, 1.0


def answers_of(given: Iterable[tuple[str, str | None, str, Any, float]], ids: np.ndarray) -> dict[str | None, Rows]:
    """Gather what answers each query, by split and text, from places, splits, texts, documents' ids and gains."""
    row_of = {str(name): row for row, name in enumerate(ids.tolist())}
    targets: dict[str | None, Rows] = {}
    for place, split, text, name, gain in given:
        if (row := row_of.get(str(checked_id(place, name)))) is None:
            raise InputError(f"{place}: no document has the id {shown(name)}; correct it, or add the document")
        rows = targets.setdefault(split, {}).setdefault(text, {})
        rows[row] = max(gain, rows.get(row, 0))
    return targets


def laid_out(rows: Rows) -> Queries:
    """Return the queries with their targets and gains as tables."""
    counts, answers = np.array([*map(len, rows.values())]), rows.values()
    gains = np.array([*chain.from_iterable(of_query.values() for of_query in answers)], np.float32)
    table = padded(np.array([*chain.from_iterable(answers)]), counts)
    return Queries([*rows], table, None if (gains == 1).all() else padded(gains, counts).clip(0))


def field(place: str, fields: dict[str, Any], name: str) -> Any:
    """Return a field of a line, or raise an InputError that names the place."""
    if name not in fields:
        raise InputError(f"{place} has no {name!r}, but {', '.join(fields) or 'nothing'}; add it, or rename a column")
    return fields[name]


def text_of(place: str, fields: dict[str, Any], name: str, *, empty: bool = False) -> str:
    """Return a field that is a text, and not `empty` unless that is allowed."""
    text = field(place, fields, name)
    if not isinstance(text, str) or not (empty or text.strip()):
        raise InputError(f"{place}: {name} is {shown(text)}; give a text that is not empty, or remove the line")
    return text


def checked_id(place: str, name: Any) -> str | int:
    """Return a document's id, if it is a text or an integer."""
    if not isinstance(name, str | int) or isinstance(name, bool) or name == "":
        raise InputError(f"{place}: the id {shown(name)} is neither a text nor a whole number; give one")
    return name


def _lines(folder: Path, stem: str, columns: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield what `read_lines` does of the one .jsonl or .csv file with this stem."""
    given = [path for ending in (".jsonl", ".csv") if (path := folder / f"{stem}{ending}").is_file()]
    if len(given) != 1:
        count = "both" if given else "neither"
        raise InputError(f"{folder} holds {count} of {stem}.jsonl and {stem}.csv; give one, which holds {columns}")
    yield from read_lines(*given)


def read_lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the place, for an error, and the fields of each line in a .jsonl, .csv or .tsv file."""
    number, kind = 0, path.suffix
    tabs = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if kind == ".tsv" else {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            for number, fields in _json_lines(file) if kind == ".jsonl" else _csv_lines(file, **tabs):
                json.dumps(fields, ensure_ascii=False).encode()  # refuses half a character, as of an emoji cut in two
                yield f"{path}: line {number}", fields
    except (ValueError, RecursionError, OSError, csv.Error) as fault:
        raise InputError(f"{path}: after line {number}: {one_line(fault)}; write {FORMS[kind]}, in UTF-8") from None
    if number == 0:
        raise InputError(f"{path} is empty; give at least one line")


def _json_lines(file: Iterator[str]) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, text in enumerate(file, 1):
        if text.strip():
            fields = json.loads(text)
            if not isinstance(fields, dict):
                raise ValueError("it is no JSON object")
            yield number, fields


def _csv_lines(file: Iterator[str], **form: Any) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(2**31 - 1)  # by default 131,072 characters, less than a document may have
    reader = csv.DictReader(file, strict=True, **form)
    for fields in reader:
        if None in fields:  # those beyond the header's
            raise ValueError("it has more fields than the header; quote texts with commas")
        yield reader.line_num, fields
