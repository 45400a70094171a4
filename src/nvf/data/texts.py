"""Readers of documents and queries in words; a fault is an InputError that names the line or the entry.

A folder of one's own   documents.jsonl or documents.csv with id, text; queries.jsonl or queries.csv with query, and id
                        or (JSON Lines) ids: the documents that answer it; split, train or val or test, if there are any
A BEIR folder           corpus.jsonl with _id, title, text; queries.jsonl with _id, text; qrels/{train,dev,test}.tsv
                        with query-id, corpus-id, score, where a score above 0 is the gain of a right document
LlamaIndex's QA         a .json file with queries and corpus, texts by id, and relevant_docs, lists of ids by query
"""

import csv
import json
import math
from collections.abc import Iterable, Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from nvf.data.splits import SHARES, SPLITS
from nvf.errors import InputError, one_line, refused
from nvf.files.ids import checked_ids, padded, shown

SPLIT_OF = {"train": "train", "dev": "val", "test": "test"}  # by the name of a file of qrels
HELD_OUT = SHARES[1] / (SHARES[0] + SHARES[1])  # of the queries that are trained on, where no file has validation's
Documents = Iterator[tuple[str, Any, str]]  # of each its place, for an error, its id and its text
Answers = Iterator[tuple[str, str | None, str, Any, float]]  # place, split, query's text, document's id, gain
Rows = dict[str, dict[int, float]]  # by a query's text, the gain of each document's row that answers it, in order


class Queries(NamedTuple):
    """What was asked, and the documents that answer it."""

    texts: list[str]  # n
    targets: np.ndarray  # (n, m) int64 rows of the documents, padded with -1
    gains: np.ndarray | None = None  # (n, m) float32, what each target is worth, padded with 0; None: all are worth 1


def read_set(place: Path) -> tuple[np.ndarray, list[str], dict[str | None, Queries]]:
    """Read the documents' ids, (N,), and texts, and the queries by split, or all under None where NVF is to split them.

    Ids are integers or strings; 7 and "7" are the same id. Equal texts of a split are one query.
    """
    if own := not (place.is_file() or (place / "corpus.jsonl").is_file()):
        documents, answers = _own_documents(place), _own_answers(place)
    elif place.is_file():
        documents, answers = _of_json(place)
    else:
        documents, answers = _beir_documents(place / "corpus.jsonl"), _beir_answers(place)
    ids, texts = _gathered(documents, f"{place}: documents")
    row_of = {str(name): row for row, name in enumerate(ids.tolist())}
    found: dict[str | None, Rows] = {}
    for where, split, text, name, gain in answers:
        if (row := row_of.get(str(_checked_id(where, name)))) is None:
            raise InputError(f"{where}: no document has the id {shown(name)}; correct it, or add the document")
        rows = found.setdefault(split, {}).setdefault(text, {})
        rows[row] = max(gain, rows.get(row, 0))
    if own and found.keys() not in ({None}, set(SPLITS)):
        given = f"queries have the splits {', '.join(split or 'none' for split in found)}"
        raise InputError(f"{place}: {given}; give {', '.join(SPLITS)}, or leave out the column")
    if not found:
        raise InputError(f"{place}: every list in relevant_docs is empty; name the documents that answer")
    return ids, texts, {split: _laid_out(found[split]) for split in _split(found, place)}


def _gathered(documents: Documents, name: str) -> tuple[np.ndarray, list[str]]:
    """Return the ids and the texts of documents."""
    place_of: dict[str, str] = {}
    ids: list[str | int] = []
    texts = []
    for place, found, text in documents:
        if (other := place_of.setdefault(str(_checked_id(place, found)), place)) != place:
            raise InputError(f"{place}: id {shown(found)} is also that of {other}; make each its own")
        ids.append(found)
        texts.append(text)
    if any(isinstance(found, str) for found in ids):
        ids = [str(found) for found in ids]
    return checked_ids(ids, len(texts), name), texts


def _split(found: dict[str | None, Rows], place: Path) -> Iterable[str | None]:
    """Name the splits, one alone None; of two, the first is divided for training and validation."""
    if len(found) == 1:
        found[None] = next(iter(found.values()))
        return [None]
    if len(found) == 2:
        first, found["test"] = found.values()
        order = np.random.default_rng(0).permutation(len(first)).tolist()
        held_out = set(order[: max(1, round(HELD_OUT * len(first)))])
        if len(first) == 1:
            raise InputError(f"{place}: one query is not enough to train and to validate; give more, or qrels/dev.tsv")
        found["train"], found["val"] = {}, {}
        for number, (text, rows) in enumerate(first.items()):
            found["val" if number in held_out else "train"][text] = rows
    return SPLITS


def _laid_out(rows: Rows) -> Queries:
    """Return the queries with their targets and gains as tables."""
    counts, answers = np.array([*map(len, rows.values())]), rows.values()
    gains = np.array([*chain.from_iterable(of_query.values() for of_query in answers)], np.float32)
    table = padded(np.array([*chain.from_iterable(answers)]), counts)
    return Queries([*rows], table, None if (gains == 1).all() else padded(gains, counts).clip(0))


def _own_documents(folder: Path) -> Documents:
    for place, fields in _lines(folder, "documents", "id, text"):
        yield place, _field(place, fields, "id"), text_of(place, fields, "text")


def _own_answers(folder: Path) -> Answers:
    for place, fields in _lines(folder, "queries", "query, id"):
        split = fields.get("split")
        if split not in (None, *SPLITS):
            raise InputError(f"{place}: split {shown(split)} is not {', '.join(SPLITS)}; correct it")
        text, value = text_of(place, fields, "query"), _field(place, fields, "ids" if "ids" in fields else "id")
        if value == []:
            raise InputError(f"{place}: ids is empty; name a document that answers the query, or remove it")
        for name in value if isinstance(value, list) else [value]:
            yield place, split, text, name, 1.0


def _beir_documents(path: Path) -> Documents:
    for place, fields in read_lines(path):
        title = text_of(place, {"title": "", **fields}, "title", empty=True)
        text = text_of(place, fields, "text", empty=True)  # some published documents have none
        yield place, _field(place, fields, "_id"), f"{title} {text}".strip()


def _beir_answers(folder: Path) -> Answers:
    texts: dict[str, str] = {}
    for place, fields in read_lines(folder / "queries.jsonl"):
        name = str(_checked_id(place, _field(place, fields, "_id")))
        if name in texts:
            raise InputError(f"{place}: an earlier query has the id {shown(name)}; make each its own")
        texts[name] = text_of(place, fields, "text")
    files = {split: path for name, split in SPLIT_OF.items() if (path := folder / f"qrels/{name}.tsv").is_file()}
    if not files:
        raise InputError(f"{folder} holds none of qrels/train.tsv, qrels/dev.tsv, qrels/test.tsv; give what answers")
    for split, path in files.items():
        right = 0
        for place, fields in read_lines(path):
            query, score = _field(place, fields, "query-id"), _field(place, fields, "score")
            with refused(f"{place}: the score is {shown(score)}", "give a number", TypeError, ValueError):
                if not math.isfinite(gain := float(score)):
                    raise ValueError("it is not finite")
            if query not in texts:
                raise InputError(f"{place}: no query has the id {shown(query)}; correct it, or add the query")
            if gain > 0:
                right += 1
                yield place, split, texts[query], _field(place, fields, "corpus-id"), gain
        if not right:
            raise InputError(f"{path} has no score above 0; give a line for each right document, or remove the file")


def _of_json(path: Path) -> tuple[Documents, Answers]:
    damage = (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError)
    remedy = "write a JSON object with queries, corpus and relevant_docs, or give a folder"
    with refused(f"{path} cannot be read", remedy, *damage):
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        json.dumps(content, ensure_ascii=False).encode()  # refuses half a character
        queries, corpus, relevant = (content[name] for name in ("queries", "corpus", "relevant_docs"))
        sizes = [len(part.items()) for part in (queries, corpus, relevant)]
        if 0 in sizes:
            raise ValueError(f"it has {sizes[0]} queries, {sizes[1]} documents and {sizes[2]} lists of answers")
    documents = ((f"{path}: corpus", name, text_of(f"{path}: corpus", corpus, name, empty=True)) for name in corpus)
    return documents, _relevant(path, queries, relevant)


def _relevant(path: Path, queries: Any, relevant: Any) -> Answers:
    for name, documents in relevant.items():
        place = f"{path}: relevant_docs {shown(name)}"
        if not isinstance(documents, list):
            raise InputError(f"{place}: {shown(documents)} is no list of ids; give one")
        if name not in queries:
            raise InputError(f"{place}: no query has this id; correct it, or add the query")
        for document in documents:
            yield place, None, text_of(f"{path}: queries", queries, name), document, 1.0


def _field(place: str, fields: dict[str, Any], name: str) -> Any:
    """Return a field of a line, or raise an InputError that names the place."""
    if name not in fields:
        raise InputError(f"{place} has no {name!r}, but {', '.join(fields) or 'nothing'}; add it, or rename a column")
    return fields[name]


def text_of(place: str, fields: dict[str, Any], name: str, *, empty: bool = False) -> str:
    """Return a field that is a text, and not `empty` unless that is allowed."""
    text = _field(place, fields, name)
    if not isinstance(text, str) or not (empty or text.strip()):
        raise InputError(f"{place}: {name} is {shown(text)}; give a text" + " that is not empty" * (not empty))
    return text


def _checked_id(place: str, name: Any) -> str | int:
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
    number, form = 0, "fields below a line with their names, texts with commas in quotes"
    if not path.is_file():
        raise InputError(f"{path} is missing, or no regular file; give one")
    csv.field_size_limit(2**31 - 1)  # by default 131,072 characters, less than a document may have
    tabs: Any = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if path.suffix == ".tsv" else {}
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            table = csv.DictReader(file, strict=True, **tabs)
            lines: Iterator[tuple[int, Any]] = ((table.line_num, fields) for fields in table)
            if path.suffix == ".jsonl":
                form = "a JSON object a line"
                lines = ((at, json.loads(text)) for at, text in enumerate(file, 1) if text.strip())
            for at, fields in lines:
                if not isinstance(fields, dict) or None in fields:  # those of a table beyond the header's
                    raise ValueError("it has other fields than it should")
                json.dumps(fields, ensure_ascii=False).encode()  # refuses half a character, as of an emoji cut in two
                number = at
                yield f"{path}: line {at}", fields
    except (ValueError, RecursionError, OSError, csv.Error) as fault:
        raise InputError(f"{path}: after line {number}: {one_line(fault)}; write {form}, in UTF-8") from None
    if number == 0:
        raise InputError(f"{path} is empty; give at least one line")
