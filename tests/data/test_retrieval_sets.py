"""Published retrieval sets are read as they are; every fault names its file, and the line or the entry."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nvf.data.texts import read_set
from nvf.errors import InputError

HEADER = "query-id\tcorpus-id\tscore"


def write_beir(folder: Path, **qrels: list[tuple[str, str, Any]]) -> Path:
    """Five documents, 40 queries, and the qrels that are given."""
    (folder / "qrels").mkdir(parents=True)
    documents = [{"_id": f"d{i}", "title": f"title {i}", "text": f"body {i}", "metadata": {}} for i in range(5)]
    queries = [{"_id": f"q{i}", "text": f"what is {i}"} for i in range(40)]
    for name, records in (("corpus", documents), ("queries", queries)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    for name, lines in qrels.items():
        table = [HEADER, *("\t".join(map(str, line)) for line in lines)]
        (folder / f"qrels/{name}.tsv").write_text("\n".join(table) + "\n")
    return folder


def write_json(path: Path, **parts: Any) -> Path:
    content = {
        "queries": {"a": "one?", "b": "two?", "c": "three?"},
        "corpus": {"n1": "first node", "n2": "second node"},
        "relevant_docs": {"b": ["n2", "n1"], "a": ["n1"], "c": []},
        "mode": "text",
    }
    path.write_text(json.dumps(content | parts))
    return path


def lines(first: int, last: int) -> list[tuple[str, str, Any]]:
    """A right document for each of some queries."""
    return [(f"q{i}", f"d{i % 5}", 1) for i in range(first, last)]


def asked(place: Path) -> dict[str | None, set[str]]:
    """The texts of each split."""
    return {split: set(queries.texts) for split, queries in read_set(place)[2].items()}


def named(first: int, last: int) -> set[str]:
    return {f"what is {i}" for i in range(first, last)}


def test_a_beir_folder_keeps_its_splits(tmp_path: Path) -> None:
    place = write_beir(tmp_path, train=lines(0, 20), dev=lines(20, 25), test=lines(25, 30))
    ids, documents, queries = read_set(place)
    assert ids.tolist() == [f"d{i}" for i in range(5)]
    assert documents == [f"title {i} body {i}" for i in range(5)]
    assert list(queries) == ["train", "val", "test"]
    assert queries["val"].texts == [f"what is {i}" for i in range(20, 25)]
    assert queries["val"].targets.tolist() == [[0], [1], [2], [3], [4]]
    assert all(split.gains is None for split in queries.values())


def test_gains_are_kept_and_what_scores_nothing_is_not_right(tmp_path: Path) -> None:
    graded = [("q1", "d3", 1), ("q0", "d1", 2), ("q0", "d2", 0), ("q0", "d9", -1), ("q0", "d4", "0.5"), ("q7", "d0", 0)]
    queries = read_set(write_beir(tmp_path, test=[*graded, ("q0", "d4", 3), ("q0", "d4", 1)]))[2][None]
    assert queries.texts == ["what is 1", "what is 0"]  # q7 has no right document
    assert queries.targets.tolist() == [[3, -1], [1, 4]]
    assert queries.gains.tolist() == [[1, 0], [2, 3]]


def test_a_set_with_one_file_is_left_to_be_split(tmp_path: Path) -> None:
    assert asked(write_beir(tmp_path, test=lines(0, 30))) == {None: named(0, 30)}


@pytest.mark.parametrize(("first", "second"), [("train", "test"), ("train", "dev"), ("dev", "test")])
def test_of_two_files_the_first_is_for_training_and_validation(tmp_path: Path, first: str, second: str) -> None:
    place = write_beir(tmp_path, **{second: lines(27, 40), first: lines(0, 27)})
    found = asked(place)
    assert found["test"] == named(27, 40)
    assert (len(found["train"]), len(found["val"])) == (24, 3)
    assert found["train"] | found["val"] == named(0, 27)
    assert found == asked(place)
    queries = read_set(place)[2]
    for split in ("train", "val"):
        for text, rows in zip(queries[split].texts, queries[split].targets.tolist(), strict=True):
            assert rows == [int(text.split()[-1]) % 5]


def test_documents_may_lack_a_title_or_a_text_and_equal_queries_are_one(tmp_path: Path) -> None:
    place = write_beir(tmp_path, test=[("7", "1", 1), ("8", "2", 1)])
    (place / "corpus.jsonl").write_text('{"_id": "1", "text": "a"}\n{"_id": "2", "title": "", "text": ""}\n')
    (place / "queries.jsonl").write_text('{"_id": "7", "text": "x"}\n{"_id": "8", "text": "x"}\n')
    _, documents, queries = read_set(place)
    assert documents == ["a", ""]
    assert (queries[None].texts, queries[None].targets.tolist()) == (["x"], [[0, 1]])


def test_llama_index_s_json_is_read(tmp_path: Path) -> None:
    ids, documents, queries = read_set(write_json(tmp_path / "qa.json"))
    assert (ids.tolist(), documents) == (["n1", "n2"], ["first node", "second node"])
    assert list(queries) == [None]
    assert queries[None].texts == ["two?", "one?"]  # nobody knows what answers the third
    assert queries[None].targets.tolist() == [[1, 0], [0, -1]]


def put(name: str, text: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(text)


def remove(name: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).unlink()


QRELS = "qrels/test.tsv"
BEIR_FAULTS = [
    (put("corpus.jsonl", '{"_id": "a", "text": "t"}\n{"_id": "a", "text": "u"}\n'), "line 2: id 'a' is also that of"),
    (put("corpus.jsonl", '{"_id": "a", "text": "t"}\n{"text": "u"}\n'), "corpus.jsonl: line 2 has no '_id', but text"),
    (put("corpus.jsonl", '{"_id": "a", "text": 3}\n'), "corpus.jsonl: line 1: text is 3; give a text"),
    (put("corpus.jsonl", '{"_id": "a", "text": "t", "title": 3}\n'), "corpus.jsonl: line 1: title is 3; give a text"),
    (put("corpus.jsonl", '{"_id": "a"}\n'), "corpus.jsonl: line 1 has no 'text', but _id"),
    (remove("queries.jsonl"), "queries.jsonl is missing"),
    (put("queries.jsonl", '{"_id": 1, "text": "t"}\n{"_id": "1", "text": "u"}'), "line 2: an earlier query has the id"),
    (put("queries.jsonl", '{"_id": "q0", "text": " "}\n'), "queries.jsonl: line 1: text is ' '; give a text"),
    (remove(QRELS), "holds none of qrels/train.tsv, qrels/dev.tsv, qrels/test.tsv; give what answers"),
    (put(QRELS, HEADER + "\n"), "test.tsv is empty; give at least one line"),
    (put(QRELS, f"{HEADER}\nq0\td1\t0\n"), "test.tsv has no score above 0; give a line for each right document"),
    (put(QRELS, "q0\td1\t1\nq1\td1\t1\n"), "test.tsv: line 2 has no 'query-id', but q0, d1, 1; add it"),
    (put(QRELS, f"{HEADER}\nq0\td1\t1\nq1\td1\n"), "test.tsv: line 3: the score is None"),
    (put(QRELS, f"{HEADER}\nq0\td1\tgood\n"), "test.tsv: line 2: the score is 'good'"),
    (put(QRELS, f"{HEADER}\nq0\td1\tinf\n"), "test.tsv: line 2: the score is 'inf'"),
    (put(QRELS, f"{HEADER}\nq99\td1\t1\n"), "test.tsv: line 2: no query has the id 'q99'; correct it, or add the"),
    (put(QRELS, f"{HEADER}\nq1\td1\t1\nq1\td99\t1\n"), "test.tsv: line 3: no document has the id 'd99'; correct it"),
    (put(QRELS, f"{HEADER}\nq0\td1\t1\t2\n"), "test.tsv: after line 0: ValueError: it has other fields than"),
    (put("qrels/train.tsv", f"{HEADER}\nq0\td1\t1\n"), "one query is not enough to train and to validate; give more"),
]


@pytest.mark.parametrize(("break_it", "message"), BEIR_FAULTS, ids=[message for _, message in BEIR_FAULTS])
def test_a_fault_in_a_beir_folder_is_named(tmp_path: Path, break_it: Callable[[Path], None], message: str) -> None:
    place = write_beir(tmp_path, test=lines(0, 10))
    break_it(place)
    with pytest.raises(InputError, match=re.escape(message)):
        read_set(place)


JSON_FAULTS: list[tuple[dict[str, Any], str]] = [
    ({"queries": ["one?"]}, "qa.json cannot be read (AttributeError: 'list' object has no attribute 'items'); write a"),
    (
        {"corpus": {}},
        "qa.json cannot be read (ValueError: it has 3 queries, 0 documents and 3 lists of answers); write",
    ),
    ({"queries": {"a": "a smile \ud83d"}}, "qa.json cannot be read (UnicodeEncodeError"),
    ({"corpus": {"n1": None}}, "qa.json: corpus: n1 is None; give a text"),
    ({"queries": {"a": "", "b": "x", "c": "y"}}, "qa.json: queries: a is ''; give a text"),
    ({"relevant_docs": {"a": "n1"}}, "qa.json: relevant_docs 'a': 'n1' is no list of ids; give one"),
    ({"relevant_docs": {"z": ["n1"]}}, "qa.json: relevant_docs 'z': no query has this id; correct it, or add"),
    ({"relevant_docs": {"a": ["n1", "n9"]}}, "qa.json: relevant_docs 'a': no document has the id 'n9'; correct it"),
    ({"relevant_docs": {"a": []}}, "qa.json: every list in relevant_docs is empty; name the documents that answer"),
]


@pytest.mark.parametrize(("parts", "message"), JSON_FAULTS, ids=[message for _, message in JSON_FAULTS])
def test_a_fault_in_a_json_file_is_named(tmp_path: Path, parts: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        read_set(write_json(tmp_path / "qa.json", **parts))


@pytest.mark.parametrize("text", ["", "[]", '{"queries": {}}', "[" * 100_000, '{"a": 1}\n{"b": 2}\n'])
def test_another_file_is_refused_by_name(tmp_path: Path, text: str) -> None:
    (tmp_path / "documents.jsonl").write_text(text)
    with pytest.raises(
        InputError, match=r"documents.jsonl cannot be read .*; write a JSON object with queries, corpus"
    ):
        read_set(tmp_path / "documents.jsonl")
