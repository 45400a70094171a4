"""The search command: its answers are `Pipeline.search`'s, its file is whole or absent, its errors name the remedy."""

import json
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import command
from nvf.data.queries import QueryBatch
from nvf.data.search_files import ENDINGS
from nvf.errors import InputError
from nvf.evaluation.evaluate import evaluate
from nvf.files.ids import checked_ids
from nvf.models.memory import unit
from nvf.models.pipeline import Pipeline
from nvf.models.pipeline_search import Hits
from nvf.models.words import Words
from nvf.ops.products import QUERY_BLOCK
from nvf.options import Option, parse, path, usage, whole
from nvf.search import OPTIONS, search
from programs import fresh_start

COUNTS = (1, QUERY_BLOCK - 1, QUERY_BLOCK, 2 * QUERY_BLOCK + 3)


@pytest.fixture
def place(pipeline: Pipeline, tmp_path: Path) -> Path:
    """A folder with a saved pipeline and 7 queries of eight dimensions."""
    pipeline.save(tmp_path / "pipeline")
    np.save(tmp_path / "q.npy", vectors(7))
    return tmp_path


def vectors(count: int) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, 8)).astype(np.float32)


def ask(place: Path, **given: Any) -> str:
    """One search in this process, on the CPU, with the options that are given as text."""
    settings = {"pipeline": place / "pipeline", "queries": place / "q.npy", "output": place / "a.jsonl"}
    words = [f"{name}={value}" for name, value in {**settings, "device": "cpu", **given}.items()]
    return search(**parse(words, OPTIONS))


def write_parquet(path: Path, column: Any, name: str = "vector") -> None:
    pa = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet").write_table(pa.table({"other": range(len(column)), name: column}), path)


def read_answers(path: Path) -> tuple[list[Any], np.ndarray]:
    """Rows or ids, and probabilities, of an answer file; the numbers of the queries count from 0."""
    if path.suffix == ".npy":
        array = np.load(path, allow_pickle=False)
        return array["rows"].tolist(), array["probabilities"]
    if path.suffix == ".trec":
        return read_run(path)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    assert [line["query"] for line in lines] == list(range(len(lines)))
    return [line["ids"] for line in lines], np.array([line["probabilities"] for line in lines], np.float32)


def read_run(path: Path) -> tuple[list[Any], np.ndarray]:
    lines = [line.split(" ") for line in path.read_text().splitlines()]
    count, k = int(lines[-1][0]) + 1, len(lines) // (int(lines[-1][0]) + 1)
    expected = [(str(query), "Q0", str(rank), "nvf") for query in range(count) for rank in range(1, k + 1)]
    assert [(query, q0, rank, tag) for query, q0, _, rank, _, tag in lines] == expected
    names = [int(line[2]) if line[2].isdigit() else line[2] for line in lines]
    scores = np.array([line[4] for line in lines], np.float64).reshape(count, k)
    return [names[start : start + k] for start in range(0, len(names), k)], scores


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("count", COUNTS)
def test_answers_are_those_of_one_search(place: Path, pipeline: Pipeline, ending: str, count: int) -> None:
    np.save(place / "q.npy", vectors(count))
    line = ask(place, output=place / f"a{ending}", k=3)
    hits = pipeline.search(vectors(count), k=3)
    rows, probabilities = read_answers(place / f"a{ending}")
    assert rows == hits.rows.tolist()
    np.testing.assert_allclose(probabilities, hits.probabilities, rtol=1e-5)
    assert re.fullmatch(rf"{count:,} queries in [\d.]+ s \([\d,.]+ queries/s, k=3\); answers in .*a\{ending}", line)
    assert {file.name for file in place.iterdir()} == {"pipeline", "q.npy", f"a{ending}"}


@pytest.mark.parametrize("ending", ENDINGS)
def test_k_is_the_pipelines_own_unless_given(place: Path, ending: str) -> None:
    for k, width in (("null", 4), (1, 1), (30, 30)):
        assert f"k={width})" in ask(place, output=place / f"a{ending}", k=k)
        assert read_answers(place / f"a{ending}")[1].shape == (7, width)


@pytest.mark.parametrize("dtype", [np.float16, np.float64, ">f4"])
def test_queries_are_of_any_float_type_and_order(place: Path, pipeline: Pipeline, dtype: Any) -> None:
    array = np.asfortranarray(vectors(50).astype(dtype))
    np.save(place / "q.npy", array)
    ask(place)
    assert read_answers(place / "a.jsonl")[0] == pipeline.search(array).rows.tolist()


@pytest.mark.parametrize("kind", ["list", "fixed", "large", "half"])
def test_queries_come_from_parquet(place: Path, pipeline: Pipeline, kind: str) -> None:
    pa = pytest.importorskip("pyarrow")
    types = {
        "list": pa.list_(pa.float32()),
        "fixed": pa.list_(pa.float64(), 8),
        "large": pa.large_list(pa.float32()),
        "half": pa.list_(pa.float16()),
    }
    asked = vectors(QUERY_BLOCK + 5).astype(np.float16).astype(np.float32)
    write_parquet(place / "q.parquet", pa.array(asked.tolist()).cast(types[kind]), "e")
    ask(place, queries=place / "q.parquet", column="e")
    assert read_answers(place / "a.jsonl")[0] == pipeline.search(asked).rows.tolist()


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("ids", [np.array([f"döc-{i}" for i in range(30)]), np.arange(30) * 10**12], ids=["str", "int"])
def test_rows_are_called_by_their_ids(place: Path, pipeline: Pipeline, ending: str, ids: np.ndarray) -> None:
    pipeline.memory.ids = checked_ids(ids, 30, "memory")
    pipeline.save(place / "pipeline")
    np.save(place / "q.npy", vectors(QUERY_BLOCK + 5))
    ask(place, output=place / f"a{ending}")
    hits = pipeline.search(vectors(QUERY_BLOCK + 5))
    assert read_answers(place / f"a{ending}")[0] == (hits.rows if ending == ".npy" else ids[hits.rows]).tolist()


@pytest.mark.parametrize("graded", [False, True])
@pytest.mark.parametrize("beta", [5.0, 400.0])  # of which the second leaves probabilities of zero, which are all equal
def test_our_figures_are_those_of_ir_measures(place: Path, pipeline: Pipeline, graded: bool, beta: float) -> None:
    measures = pytest.importorskip("ir_measures")
    with torch.no_grad():
        pipeline.attention.log_beta.fill_(math.log(beta))
    pipeline.memory.ids = checked_ids([f"d{7919 * row % 30}" for row in range(30)], 30, "memory")
    pipeline.save(place / "pipeline")
    rng = np.random.default_rng(0)
    targets = np.stack([rng.permutation(30)[:12] for _ in range(300)])
    targets[np.arange(12) >= rng.integers(1, 13, size=(300, 1))] = -1
    gains = rng.integers(1, 4, size=targets.shape) * (targets >= 0)
    np.save(place / "q.npy", vectors(300))
    ask(place, output=place / "a.trec", k=30)
    qrels = [
        measures.Qrel(str(query), str(pipeline.memory.ids[row]), int(gain) if graded else 1)
        for query, *of_query in zip(range(300), targets, gains, strict=True)
        for row, gain in zip(*of_query, strict=True)
        if row >= 0
    ]
    named = {"ndcg10": "nDCG@10", "mrr10": "RR@10", "recall": "R@4", "top1": "Success@1", "top5": "Success@5"}
    parsed = {ours: measures.parse_measure(theirs) for ours, theirs in named.items()}
    run = list(measures.read_trec_run(str(place / "a.trec")))
    expected = measures.calc_aggregate(parsed.values(), qrels, run)
    given = torch.from_numpy(gains).float() if graded else None
    batch = QueryBatch(unit(torch.from_numpy(vectors(300))), torch.from_numpy(targets), gains=given)
    found = evaluate(pipeline, batch, k=4, oracle=None).figures["pipeline"]
    for ours, measure in parsed.items():
        assert found[ours]["value"] == pytest.approx(expected[measure], abs=1e-6), measure


@pytest.mark.parametrize("name", ["two words", "", "a\tb", "no\u00a0break"])
def test_ids_that_no_trec_run_can_hold_are_refused(place: Path, pipeline: Pipeline, name: str) -> None:
    pipeline.memory.ids = checked_ids([f"d{row}" for row in range(29)] + [name], 30, "memory")
    pipeline.save(place / "pipeline")
    with pytest.raises(InputError, match=re.escape(f"a.trec: a TREC run cannot hold the id {name!r}")):
        ask(place, output=place / "a.trec")
    assert not (place / "a.trec").exists()
    ask(place, output=place / "a.jsonl")


def test_the_row_groups_of_parquet_do_not_matter(place: Path, pipeline: Pipeline) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    asked = vectors(QUERY_BLOCK + 5)
    table = pa.table({"vector": asked.tolist()})
    with pq.ParquetWriter(place / "q.parquet", table.schema) as file:
        for start, end in ((0, 0), (0, 3), (3, 3), (3, len(asked)), (0, 0)):
            file.write_table(table[start:end])
    ask(place, queries=place / "q.parquet")
    assert read_answers(place / "a.jsonl")[0] == pipeline.search(asked).rows.tolist()


def spoil(row: int, value: float) -> np.ndarray:
    array = vectors(10_000)
    array[row] = value
    return array


MANY = [[1.0] * 8] * 9_000  # more than are looked at together
BAD_QUERIES = [
    ("q.npy", spoil(9_000, np.nan), "q.npy: row 9000 holds NaN or infinite values (1 such rows); remove"),
    ("q.npy", spoil(8_192, 0), "q.npy: row 8192 is zero (1 such rows); remove"),
    ("q.npy", np.ones((3, 7)), "q.npy: 7 dimensions, but the memory has 8; embed both with the same"),
    ("q.npy", np.ones(8), "q.npy: (8,) float64; give the vectors of your queries, (n, D)"),
    ("q.npy", np.ones((0, 8)), "q.npy: (0, 8) float64; give the vectors of your queries"),
    ("q.npy", np.ones((2, 8), int), "q.npy: (2, 8) int64; give the vectors of your queries"),
    ("q.parquet", spoil(9_000, np.nan).tolist(), "q.parquet: row 9000 holds NaN or infinite values (1 such rows)"),
    ("q.parquet", [[1.0] * 7], "q.parquet: 7 dimensions, but the memory has 8; embed both with the same"),
    ("q.parquet", [*MANY, [1.0] * 7], "q.parquet: column 'vector': row 9000 has 7 values, but row 0 has 8; embed"),
    ("q.parquet", [*MANY, None], "q.parquet: row 9000: column 'vector' holds a null; remove"),
    ("q.parquet", [*MANY, [1.0] * 7 + [None]], "q.parquet: row 9000: column 'vector' holds a null; remove"),
    ("q.parquet", [[1] * 8], "q.parquet: column 'vector' has type list<element: int64>; give lists of floats"),
    ("q.parquet", [0.5], "q.parquet: column 'vector' has type double; give lists of floats"),
]


@pytest.mark.parametrize(("name", "content", "message"), BAD_QUERIES, ids=[m for _, _, m in BAD_QUERIES])
def test_bad_queries_are_refused(place: Path, name: str, content: Any, message: str) -> None:
    if name == "q.npy":
        np.save(place / name, content)
    else:
        write_parquet(place / name, content)
    with pytest.raises(InputError, match=re.escape(message)):
        ask(place, queries=place / name)
    assert not (place / "a.jsonl").exists()


def test_damaged_files_are_refused(place: Path) -> None:
    write_parquet(place / "q.parquet", vectors(5_000).tolist())
    for name in ("q.npy", "q.parquet"):
        whole_file = (place / name).read_bytes()
        (place / name).write_bytes(whole_file[:-20])
        with pytest.raises(InputError, match=f"{name} is truncated or not"):
            ask(place, queries=place / name)
    (place / "q.parquet").write_bytes(whole_file[:4] + b"\xff" * (len(whole_file) - 4004) + whole_file[-4000:])
    with pytest.raises(InputError, match=r"q\.parquet is truncated or not a parquet file"):
        ask(place, queries=place / "q.parquet")


BAD_SETTINGS = [
    ({"k": 31}, "k=31 exceeds the memory's 30 rows; lower k"),
    ({"k": "many"}, "k=many is not a whole number of at least 1"),
    ({"k": -1}, "k=-1 is not a whole number of at least 1"),
    ({"device": "abacus"}, "device=abacus cannot be used (RuntimeError: Expected one of cpu"),
    ({"output": "a.csv"}, "output=a.csv is a folder, a file of the queries, or none of"),
    ({"output": "answers"}, "output=answers is a folder, a file of the queries, or none of"),
    ({"output": "nowhere/a.npy"}, "nowhere/a.npy: there is no folder nowhere; create it"),
    ({"output": "folder.npy"}, "output=folder.npy is a folder"),
    ({"output": "./q.npy", "queries": "q.npy"}, "output=q.npy is a folder, a file of the queries"),
    ({"queries": "q.txt"}, "q.txt: .txt is not read; give .npy or .parquet"),
    ({"queries": "none.npy"}, "none.npy is missing; it holds the vectors of your queries"),
    ({"queries": "none.parquet"}, "none.parquet is missing, or no file; it holds column 'vector'"),
    ({"pipeline": "none"}, "none/config.json is missing, or no regular file in its folder; save the pipeline again"),
]


@pytest.mark.parametrize(("given", "message"), BAD_SETTINGS, ids=[m for _, m in BAD_SETTINGS])
def test_bad_settings_are_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, given: dict[str, Any], message: str
) -> None:
    if given.get("queries") == "none.parquet":
        pytest.importorskip("pyarrow")
    monkeypatch.chdir(place)
    (place / "folder.npy").mkdir()
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        ask(place, **given)


def test_a_missing_column_names_those_there_are(place: Path) -> None:
    write_parquet(place / "q.parquet", [[1.0] * 8], "embedding")
    with pytest.raises(
        InputError, match="0 columns 'vector', but 'other', 'embedding'; add it, or name one of them with column="
    ):
        ask(place, queries=place / "q.parquet")


def test_parquet_without_pyarrow_names_the_extra(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nvf.data.parquet", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=re.escape("pip install -e '.[parquet]'")):
        ask(place, queries=place / "q.parquet")


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("fault", [OSError("no space left"), KeyboardInterrupt()])
def test_what_stops_half_way_leaves_what_was_there(
    place: Path, monkeypatch: pytest.MonkeyPatch, ending: str, fault: BaseException
) -> None:
    (place / f"a{ending}").write_text("earlier answers")
    np.save(place / "q.npy", vectors(3 * QUERY_BLOCK))
    answers = [Pipeline.load(place / "pipeline").search(vectors(QUERY_BLOCK))]

    def stop(*_: Any, **__: Any) -> Hits:
        if not answers:
            raise fault
        return answers.pop()

    monkeypatch.setattr(Pipeline, "search", stop)
    with pytest.raises(type(fault)):
        ask(place, output=place / f"a{ending}")
    assert (place / f"a{ending}").read_text() == "earlier answers"
    assert {file.name for file in place.iterdir()} == {"pipeline", "q.npy", f"a{ending}"}


def test_a_user_types_one_line(place: Path, pipeline: Pipeline) -> None:
    words = ["pipeline=pipeline", "queries=q.npy", "k=2", "output=a.jsonl"]
    done = command(*words, module="nvf.search", cwd=place)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"7 queries in [\d.]+ s \([\d,]+ queries/s, k=2\); answers in a\.jsonl\n", done.stdout)
    assert done.stderr == ""
    assert read_answers(place / "a.jsonl")[0] == pipeline.search(vectors(7), k=2).rows.tolist()


def test_the_folder_of_a_run_is_taken_and_the_answer_is_said_in_ascii(place: Path, pipeline: Pipeline) -> None:
    words = ["pipeline=.", "queries=q.npy", "output=réponses.jsonl"]
    done = command(*words, module="nvf.search", cwd=place, PYTHONIOENCODING="ascii")
    assert done.returncode == 0, done.stderr
    assert done.stdout.endswith("answers in r\\xe9ponses.jsonl\n")
    assert read_answers(place / "réponses.jsonl")[0] == pipeline.search(vectors(7)).rows.tolist()


def test_bad_input_ends_in_one_line(place: Path) -> None:
    done = command("pipeline=pipeline", "queries=q.npy", "k=31", "output=a.npy", module="nvf.search", cwd=place)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr == "error: k=31 exceeds the memory's 30 rows; lower k\n"


@pytest.mark.parametrize(
    ("sent", "status"), [(signal.SIGTERM, 143), pytest.param(signal.SIGINT, 130, marks=pytest.mark.slow)]
)
def test_a_killed_search_leaves_nothing(place: Path, sent: signal.Signals, status: int) -> None:
    np.save(place / "q.npy", vectors(3_000_000))
    words = ["pipeline=pipeline", "queries=q.npy", "output=a.jsonl"]
    process = subprocess.Popen(
        [sys.executable, "-m", "nvf.search", *words],
        cwd=place,
        stderr=subprocess.PIPE,
        preexec_fn=lambda: signal.signal(sent, signal.SIG_DFL),  # a job in the background ignores SIGINT
    )
    try:
        deadline = time.monotonic() + 60
        while not (place / ".a.jsonl.partial").exists() and time.monotonic() < deadline:
            time.sleep(0.02)
        process.send_signal(sent)
        assert process.wait(timeout=60) == status
    finally:
        process.kill()
        process.communicate()
    assert {file.name for file in place.iterdir()} == {"pipeline", "q.npy"}


def test_it_starts_without_lightning_and_explains_itself_without_torch(place: Path) -> None:
    slow = {"torch", "lightning", "hydra", "omegaconf", "torchmetrics", "pyarrow", "faiss"}
    for words, imported in (("pipeline=pipeline queries=q.npy output=a.npy", "['torch']"), ("--help", "[]")):
        assert fresh_start("nvf.search", words, slow, place)[-1] == imported


@pytest.fixture
def worded(place: Path, pipeline: Pipeline) -> Pipeline:
    """The saved pipeline with texts in place of the other, and a file of texts for 7 queries."""
    pytest.importorskip("bm25s")
    pipeline.attention.word_weights = torch.tensor([0.3, 0.1])
    logged = [f"please number{row}" for row in range(9)]
    pipeline.words = Words.gather([f"number{row} \u00fc" for row in range(30)], logged, torch.arange(9).unsqueeze(-1))
    pipeline.save(place / "pipeline")
    write_texts(place / "q.jsonl", 7)
    return pipeline


def write_texts(path: Path, count: int) -> list[str]:
    texts = [f"number{11 * query % 31}" for query in range(count)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return texts


@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("count", COUNTS)
def test_words_are_searched_too(place: Path, worded: Pipeline, ending: str, count: int) -> None:
    asked, texts = vectors(count), write_texts(place / "q.jsonl", count)
    np.save(place / "q.npy", asked)
    ask(place, texts=place / "q.jsonl", output=place / f"a{ending}")
    rows, probabilities = read_answers(place / f"a{ending}")
    hits = worded.search(asked, texts=texts)
    assert rows == hits.rows.tolist()
    np.testing.assert_allclose(probabilities, hits.probabilities, rtol=1e-5)
    ask(place, output=place / f"a{ending}")
    assert read_answers(place / f"a{ending}")[0] == worded.search(asked).rows.tolist() != rows


BAD_TEXTS = [
    ("", r"q\.jsonl is empty"),
    ('{"text": "a"}\n' * 8, r"q\.jsonl has 8 texts for 7 vectors"),
    ('{"text": "a"}\n{"text": 7}\n', r"q\.jsonl: line 2: text is 7; give a text"),
    (None, r"q\.jsonl is missing, or no regular file"),
]


@pytest.mark.parametrize(("content", "message"), BAD_TEXTS, ids=[message for _, message in BAD_TEXTS])
def test_bad_texts_are_refused(place: Path, worded: Pipeline, content: str | None, message: str) -> None:
    (place / "q.jsonl").unlink() if content is None else (place / "q.jsonl").write_text(content)
    with pytest.raises(InputError, match=message):
        ask(place, texts=place / "q.jsonl")
    assert not (place / "a.jsonl").exists()


def test_texts_are_not_overwritten_nor_taken_without_need(place: Path, worded: Pipeline) -> None:
    with pytest.raises(InputError, match="is a folder, a file of the queries"):
        ask(place, texts=place / "q.jsonl", output=place / "q.jsonl")
    worded.words = None
    worded.save(place / "pipeline")
    with pytest.raises(InputError, match="fitted without texts, or bm25s is missing; search without texts"):
        ask(place, texts=place / "q.jsonl")


def test_a_search_with_texts_says_one_line(place: Path, worded: Pipeline) -> None:
    words = ["pipeline=pipeline", "queries=q.npy", "texts=q.jsonl", "output=a.jsonl"]
    done = command(*words, module="nvf.search", cwd=place, fresh=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert re.fullmatch(r"7 queries in .*; answers in a\.jsonl\n", done.stdout)


SMALL = (
    Option("file", "what to read", read=path),
    Option("k", "how many; null: all", None, whole),
    Option("mode", "how", "fast"),
)


def test_options_are_read_and_have_defaults() -> None:
    assert parse(["file=~/a=b", "k=5"], SMALL) == {"file": Path.home() / "a=b", "k": 5, "mode": "fast"}
    assert parse(["k=null", "mode=slow", "file=a"], SMALL) == {"file": Path("a"), "k": None, "mode": "slow"}
    assert parse(["mode=1_1", "file=1e3"], SMALL) == {"file": Path("1e3"), "k": None, "mode": "1_1"}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "file= is not set; give file=..., what to read"),
        (["file="], "file= is not set"),
        (["file=null"], "file= is not set"),
        (["file=a", "mode=null"], "mode= is not set"),
        (["file"], "'file' is not name=value; the names are file, k, mode"),
        (["file=a", "colour=red"], "'colour=red' is not name=value; the names are file, k, mode"),
    ],
)
def test_bad_options_are_refused(words: list[str], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        parse(words, SMALL)


def test_a_command_without_options_says_so() -> None:
    with pytest.raises(InputError, match="the names are none"):
        parse(["k=5"], ())


def test_usage_shows_every_option_with_its_default() -> None:
    assert usage("nvf.x", "do it", SMALL).splitlines() == [
        "python -m nvf.x file=...",
        "",
        "do it",
        "",
        "  file=...   what to read",
        "  k=null     how many; null: all",
        "  mode=fast  how",
    ]


def padded(lists: list[list[Any]], k: int) -> list[list[Any]]:
    return [[*some, *[-1] * (k - len(some))] for some in lists]


def write_lists(path: Path, lists: list[Any]) -> None:
    path.write_text("".join(json.dumps(some) + "\n" for some in lists))


def lists_of(count: int, rows: int = 30) -> list[list[int]]:
    """Different rows for each query, fewer than the k of 4 for some."""
    rng = np.random.default_rng(0)
    return [rng.permutation(rows)[:size].tolist() for size in rng.integers(1, 9, size=count)]


def named(hits: Hits) -> list[list[Any]]:
    """The answers of each query without the padding."""
    names = hits.rows if hits.ids is None else hits.ids
    return [[name for name, row in zip(*of, strict=True) if row >= 0] for of in zip(names, hits.rows, strict=True)]


@pytest.mark.parametrize("ids", [None, [f"d{row}" for row in range(30)]], ids=["rows", "ids"])
@pytest.mark.parametrize("option", ["one for all", "allowed", "candidates"])
@pytest.mark.parametrize("ending", ENDINGS)
def test_filters_and_candidates_come_from_files(
    place: Path, pipeline: Pipeline, ending: str, option: str, ids: list[str] | None
) -> None:
    count = QUERY_BLOCK + 9
    asked, lists = vectors(count), lists_of(count)
    pipeline.memory.ids = None if ids is None else checked_ids(ids, 30, "memory")
    pipeline.save(place / "pipeline")
    np.save(place / "q.npy", asked)
    lists[-1] = lists[-1][:3]
    lists = lists if ids is None else [[ids[row] for row in some] for some in lists]
    given = lists[-1] if option == "one for all" else lists
    if option == "one for all":
        (place / "given.json").write_text(json.dumps(given))
    else:
        write_lists(place / "given.jsonl", given)
    name, file = option if option == "candidates" else "allowed", next(place.glob("given*"))
    ask(place, output=place / f"a{ending}", k=5, **{name: file})
    hits = pipeline.rerank(asked, given) if option == "candidates" else pipeline.search(asked, 5, allowed=given)
    hits = Hits(*(None if part is None else part[:, :5] for part in hits))
    if ending == ".npy":
        rows, probabilities = read_answers(place / "a.npy")
        assert rows == hits.rows.tolist()
        np.testing.assert_allclose(probabilities, hits.probabilities, rtol=1e-5)
    elif ending == ".jsonl":
        lines = [json.loads(line) for line in (place / "a.jsonl").read_text().splitlines()]
        assert [line["ids"] for line in lines] == named(hits)
        assert [line["query"] for line in lines] == list(range(count))
        assert [len(line["probabilities"]) for line in lines] == list(map(len, named(hits)))
    else:
        lines = [line.split(" ") for line in (place / "a.trec").read_text().splitlines()]
        answers = enumerate(named(hits))
        expected = [(query, str(one), rank) for query, of in answers for rank, one in enumerate(of, 1)]
        assert [(int(line[0]), line[2], int(line[3])) for line in lines] == expected


def test_answers_of_a_search_and_arrays_are_candidates(place: Path, pipeline: Pipeline) -> None:
    ask(place, k=9)
    found = pipeline.search(vectors(7), 9).rows
    expected = pipeline.rerank(vectors(7), found)
    np.save(place / "found.npy", found[:, ::-1])
    for file in ("a.jsonl", "found.npy"):
        ask(place, candidates=place / file, output=place / "b.npy", k=3)
        rows, probabilities = read_answers(place / "b.npy")
        assert rows == expected.rows[:, :3].tolist()
        np.testing.assert_allclose(probabilities, expected.probabilities[:, :3], rtol=1e-5)
    ask(place, candidates=place / "found.npy", output=place / "b.npy", k=12)
    assert read_answers(place / "b.npy")[0] == padded(expected.rows.tolist(), 12)


def test_words_and_filters_go_together(place: Path, worded: Pipeline) -> None:
    asked, texts, lists = vectors(7), write_texts(place / "q.jsonl", 7), lists_of(7)
    write_lists(place / "given.jsonl", lists)
    ask(place, texts=place / "q.jsonl", allowed=place / "given.jsonl", output=place / "a.npy")
    assert read_answers(place / "a.npy")[0] == worded.search(asked, texts=texts, allowed=lists).rows.tolist()
    ask(place, texts=place / "q.jsonl", candidates=place / "given.jsonl", output=place / "a.npy")
    expected = worded.rerank(asked, lists, texts=texts).rows[:, :4].tolist()
    assert read_answers(place / "a.npy")[0] == padded(expected, 4)


BAD_LISTS = [
    ("allowed", "g.json", "[]", "allowed: "),
    ("allowed", "g.json", "[1, 30]", "allowed: query 0 has 30"),
    ("allowed", "g.json", "7", "allowed is 7"),
    ("allowed", "g.json", "[1, 2", "g.json is missing or damaged"),
    ("allowed", "g.json", None, "g.json is missing or damaged"),
    ("allowed", "g.txt", "[1]", "g.txt is missing or damaged"),
    ("allowed", "g.jsonl", "[1]\n" * 6, "allowed: 6"),
    ("allowed", "g.jsonl", "[1]\n" * 6 + "[]\n", "allowed: nothing is given for query 6"),
    ("candidates", "g.jsonl", "[1]\n" * 6 + "[2, 2]\n", "candidates: query 6"),
    ("candidates", "g.jsonl", "[1]\n" * 6 + "[2, 99]\n", "candidates: query 6 has 99"),
    ("candidates", "g.jsonl", '{"rows": [1]}\n', "g.jsonl is missing or damaged"),
    ("candidates", "g.jsonl", "[1]\n" * 8, "candidates: 8"),
    ("candidates", "g.json", "[1, 2]", "candidates: query 0"),
    ("candidates", "g.npy", "nonsense", "g.npy is truncated"),
]


@pytest.mark.parametrize(("option", "name", "content", "message"), BAD_LISTS)
def test_bad_lists_are_refused(place: Path, option: str, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (place / name).write_text(content)
    with pytest.raises(InputError, match=message):
        ask(place, **{option: place / name})
    assert not (place / "a.jsonl").exists()


def test_filters_and_candidates_exclude_each_other_and_are_not_overwritten(place: Path) -> None:
    write_lists(place / "g.jsonl", lists_of(7))
    with pytest.raises(InputError, match="allowed= and candidates="):
        ask(place, allowed=place / "g.jsonl", candidates=place / "g.jsonl")
    for option in ("allowed", "candidates"):
        with pytest.raises(InputError, match="a file of the queries"):
            ask(place, output=place / "g.jsonl", **{option: place / "g.jsonl"})
