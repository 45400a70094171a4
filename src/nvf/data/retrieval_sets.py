"""Readers of retrieval sets as others publish them; a fault is an InputError that names the line or the entry.

A BEIR folder     corpus.jsonl with _id, title, text; queries.jsonl with _id, text; qrels/{train,dev,test}.tsv with
                  query-id, corpus-id, score, where a score above 0 is the gain of a right document
LlamaIndex's QA   a .json file with queries and corpus, texts by id, and relevant_docs, lists of ids by query
"""

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nvf.data.splits import SHARES
from nvf.data.texts import (
    Queries,
    Rows,
    answers_of,
    checked_id,
    documents_of,
    field,
    laid_out,
    read_documents,
    read_lines,
    read_queries,
    text_of,
)
from nvf.errors import InputError, one_line
from nvf.files.ids import shown

SPLIT_OF = {"train": "train", "dev": "val", "test": "test"}  # by the name of a file of qrels
HELD_OUT = SHARES[1] / (SHARES[0] + SHARES[1])  # of the queries that are trained on, where no file has validation's


def read_set(place: Path) -> tuple[np.ndarray, list[str], dict[str | None, Queries]]:
    """Read the documents' ids, (N,), and texts, and the queries by split, or all under None where NVF is to split them.

    The place is a folder of the user's own, as `read_documents` and `read_queries` know it, or one of those above.
    """
    if place.is_file():
        return _read_json(place)
    if (place / "corpus.jsonl").is_file():
        return _read_beir(place)
    ids, documents = read_documents(place)
    return ids, documents, read_queries(place, ids)


def _read_beir(folder: Path) -> tuple[np.ndarray, list[str], dict[str | None, Queries]]:
    ids, documents = documents_of(_beir_documents(folder / "corpus.jsonl"), str(folder / "corpus.jsonl"))
    texts: dict[str, str] = {}
    for place, fields in read_lines(folder / "queries.jsonl"):
        name = checked_id(place, field(place, fields, "_id"))
        if str(name) in texts:
            raise InputError(f"{place}: an earlier query has the id {shown(name)}; make each its own")
        texts[str(name)] = text_of(place, fields, "text")
    files = {split: path for name, split in SPLIT_OF.items() if (path := folder / f"qrels/{name}.tsv").is_file()}
    if not files:
        raise InputError(f"{folder} holds none of qrels/train.tsv, qrels/dev.tsv, qrels/test.tsv; give what answers")
    given = (line for split, path in files.items() for line in _judgements(path, split, texts))
    found = answers_of(given, ids)
    if lacking := [path for split, path in files.items() if split not in found]:
        raise InputError(f"{lacking[0]} has no score above 0; give a line for each right document, or remove the file")
    return ids, documents, _split(found, folder)


def _beir_documents(path: Path) -> Iterator[tuple[str, Any, str]]:
    for place, fields in read_lines(path):
        title = text_of(place, {"title": "", **fields}, "title", empty=True)
        text = text_of(place, fields, "text", empty=True)  # some published documents have none
        yield place, field(place, fields, "_id"), f"{title} {text}".strip()


def _judgements(path: Path, split: str, texts: dict[str, str]) -> Iterator[tuple[str, str, str, Any, float]]:
    for place, fields in read_lines(path):
        query, document, score = (field(place, fields, name) for name in ("query-id", "corpus-id", "score"))
        try:
            gain = float(score)
        except (TypeError, ValueError):
            gain = math.nan
        if not math.isfinite(gain):
            raise InputError(f"{place}: the score is {shown(score)}; give a number")
        if query not in texts:
            raise InputError(f"{place}: no query has the id {shown(query)}; correct it, or add the query")
        if gain > 0:
            yield place, split, texts[query], document, gain


def _split(found: dict[str | None, Rows], folder: Path) -> dict[str | None, Queries]:
    """Return one split under None, three as they are; of two, the first is divided for training and validation."""
    if len(found) == 1:
        return {None: laid_out(*found.values())}
    if len(found) == 2:
        first, test = found.values()
        order = np.random.default_rng(0).permutation(len(first)).tolist()
        held_out = set(order[: max(1, round(HELD_OUT * len(first)))])
        if len(first) == 1:
            raise InputError(f"{folder}: one query is not enough to train and to validate; give more, or qrels/dev.tsv")
        found = {"train": {}, "val": {}, "test": test}
        for place, (text, rows) in enumerate(first.items()):
            found["val" if place in held_out else "train"][text] = rows
    return {split: laid_out(rows) for split, rows in found.items()}


def _read_json(path: Path) -> tuple[np.ndarray, list[str], dict[str | None, Queries]]:
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
        json.dumps(content, ensure_ascii=False).encode()  # refuses half a character
        queries, corpus, relevant = (content[name] for name in ("queries", "corpus", "relevant_docs"))
        sizes = [len(part.items()) for part in (queries, corpus, relevant)]
        if 0 in sizes:
            raise ValueError(f"it has {sizes[0]} queries, {sizes[1]} documents and {sizes[2]} lists of answers")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        what = "a JSON object with queries, corpus and relevant_docs, or give a folder"
        raise InputError(f"{path} cannot be read ({one_line(fault)}); write {what}") from None
    given = ((f"{path}: corpus", name, text_of(f"{path}: corpus", corpus, name, empty=True)) for name in corpus)
    ids, documents = documents_of(given, f"{path}: corpus")
    found = answers_of(_relevant(path, queries, relevant), ids)
    if not found:
        raise InputError(f"{path}: every list in relevant_docs is empty; name the documents that answer")
    return ids, documents, _split(found, path)


def _relevant(path: Path, queries: Any, relevant: Any) -> Iterator[tuple[str, None, str, Any, float]]:
    for name, documents in relevant.items():
        place = f"{path}: relevant_docs {shown(name)}"
        if not isinstance(documents, list):
            raise InputError(f"{place}: {shown(documents)} is no list of ids; give one")
        if name not in queries:
            raise InputError(f"{place}: no query has this id; correct it, or add the query")
        for document in documents:
            yield place, None, text_of(f"{path}: queries", queries, name), document, 1.0
