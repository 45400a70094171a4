"""Texts and gains beside vectors, in files of their own or in columns, are each vector's; every fault is named."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import to_parquet
from nvf.data.beside import COLUMNS, texts_of_rows
from nvf.data.folder import read_memory, read_recorded
from nvf.data.queries import fingerprint
from nvf.data.splits import SPLITS
from nvf.errors import InputError

TEXTS = [f"row {row}" for row in range(50)]
ASKED = [f"query {number}" for number in range(400)]


@pytest.fixture
def tables(folder: Path, tmp_path: Path) -> Path:
    """The folder of embeddings as parquet, with targets that are lists and with texts."""
    to_parquet(folder, tmp_path / "tables")
    add(tmp_path / "tables", "corpus", "text", TEXTS)
    add(tmp_path / "tables", "queries", "text", ASKED)
    return tmp_path / "tables"


def add(folder: Path, name: str, column: str, values: list[Any]) -> None:
    """Add a column to a table, or replace it."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    table = pq.read_table(folder / f"{name}.parquet")
    if column in table.column_names:
        table = table.drop_columns(column)
    pq.write_table(table.append_column(column, pa.array(values)), folder / f"{name}.parquet")


def read(folder: Path, *, words: Any = None, **columns: Any):
    names = {**COLUMNS, **columns}
    return read_recorded(folder, read_memory(folder, columns=names), seed=0, columns=names, words=words)


def graded(folder: Path) -> list[dict[int, float]]:
    """Give each query three targets, one of them padding or the first again, and gains; return what each is worth."""
    rng = np.random.default_rng(1)
    targets = np.stack([rng.permutation(50)[:3] for _ in range(400)])
    targets[::2, 1], targets[::3, 2] = -1, targets[::3, 0]
    gains = rng.integers(1, 5, size=targets.shape) / 2
    np.save(folder / "targets.npy", targets)
    np.save(folder / "gains.npy", gains)
    worth: list[dict[int, float]] = [{} for _ in targets]
    for query, target in zip(*np.nonzero(targets >= 0), strict=True):
        row = int(targets[query, target])
        worth[query][row] = max(gains[query, target], worth[query].get(row, 0))
    return worth


def by_query(recorded: Any) -> list[dict[int, float]]:
    """What each query's rows are worth, in an order that the queries' vectors decide."""
    found = []
    for split in recorded.splits.values():
        for query, rows, gains in zip(
            *(part.tolist() for part in (split.queries, split.targets, split.gains)), strict=True
        ):
            assert all((row >= 0) == (gain > 0) for row, gain in zip(rows, gains, strict=True))
            found.append((query, {row: gain for row, gain in zip(rows, gains, strict=True) if row >= 0}))
    return [worth for _, worth in sorted(found, key=lambda pair: pair[0])]


def in_order(queries: np.ndarray, worth: list[dict[int, float]]) -> list[dict[int, float]]:
    lengths = np.linalg.norm(queries.astype(np.float64), axis=1, keepdims=True)
    return [worth[place] for place in sorted(range(len(worth)), key=(queries / lengths).tolist().__getitem__)]


def test_a_target_keeps_the_largest_gain_that_is_given(folder: Path, tmp_path: Path) -> None:
    worth = graded(folder)
    recorded = read(folder)
    assert by_query(recorded) == in_order(np.load(folder / "queries.npy"), worth)
    first = [max(range(3), key=of.__getitem__) for of in recorded.splits["train"].gains.tolist()]
    assert set(first) == {0}  # the best target is named first
    queries, targets, gains = (np.load(folder / f"{name}.npy") for name in ("queries", "targets", "gains"))
    order = np.random.default_rng(0).permutation(800)
    np.save(folder / "queries.npy", np.concatenate([queries, queries])[order])
    np.save(folder / "targets.npy", np.concatenate([targets, targets])[order])
    np.save(folder / "gains.npy", np.concatenate([gains, gains / 2])[order])
    repeated = read(folder)
    assert repeated.merged == 400
    assert by_query(repeated) == in_order(queries, worth)


def test_gains_may_be_a_column_and_of_each_split(folder: Path, tables: Path) -> None:
    worth = graded(folder)
    lists = [list(of) for of in worth]
    add(tables, "queries", "targets", [[f"item {row}" for row in of] for of in lists])
    add(tables, "queries", "gains", [[*of.values()] for of in worth])
    assert by_query(read(tables)) == in_order(np.load(folder / "queries.npy"), worth)
    assert all(split.gains is None for split in read(tables, gains=None).splits.values())
    for split in SPLITS:
        for name in ("queries", "targets", "gains"):
            np.save(folder / f"{split}_{name}.npy", np.load(folder / f"{name}.npy")[:9])
    for name in ("queries", "targets", "gains"):
        (folder / f"{name}.npy").unlink()
    expected = in_order(np.load(folder / "test_queries.npy"), worth[:9])
    assert by_query(read(folder)) == [of for of in expected for _ in SPLITS]


def test_gains_change_the_hash_of_queries_and_no_targets(folder: Path) -> None:
    graded(folder)
    with_gains = read(folder).splits["test"]
    (folder / "gains.npy").unlink()
    without = read(folder).splits["test"]
    assert without.gains is None
    assert fingerprint(with_gains) != fingerprint(without)
    assert [set(of) for of in with_gains.targets.tolist()] == [set(of) for of in without.targets.tolist()]


@pytest.mark.parametrize("stage", ["reranker", "joint"])
def test_gains_move_ndcg_alone(run: Callable[..., dict[str, Any]], folder: Path, tmp_path: Path, stage: str) -> None:
    graded(folder)
    settings = ("data=embeddings", f"data.dir={folder}", "trainer=debug", f"stage={stage}")
    found = run(*settings)["test"]["exact"]
    (folder / "gains.npy").unlink()
    same = run(*settings, folder=tmp_path / "same")["test"]["exact"]
    assert {name: found[name] == same[name] for name in found} == {name: name != "ndcg10" for name in found}


BAD_GAINS: list[tuple[Callable[[np.ndarray], np.ndarray], str]] = [
    (lambda gains: gains[:-1], r"gains.npy: \(399, 3\) float64 for \(400, 3\) targets; give"),
    (lambda gains: gains[:, 0], r"gains.npy: \(400,\) float64 for \(400, 3\) targets; give"),
    (lambda gains: gains > 1, r"gains.npy: \(400, 3\) bool for \(400, 3\) targets"),
    (lambda gains: np.where(np.arange(400)[:, None] == 7, 0, gains), r"gains.npy: row 7: the gain .*0.0.* is not a"),
    (lambda gains: np.where(np.arange(400)[:, None] == 9, np.nan, gains), r"gains.npy: row 9: the gain .*nan.* is not"),
    (lambda gains: gains * np.where(np.arange(400)[:, None] == 3, 1e300, 1), r"gains.npy: row 3: the gain .*e\+300"),
]


@pytest.mark.parametrize(("change", "message"), BAD_GAINS, ids=[message for _, message in BAD_GAINS])
def test_gains_that_fit_no_targets_are_refused(
    folder: Path, change: Callable[[np.ndarray], np.ndarray], message: str
) -> None:
    graded(folder)
    np.save(folder / "gains.npy", change(np.load(folder / "gains.npy")))
    with pytest.raises(InputError, match=message):
        read(folder)


def test_a_column_of_gains_must_fit_its_targets(tables: Path) -> None:
    for values, message in (
        ([1.0] * 399 + [0.0], r"column 'gains': row 399: the gain 0 is not a number above 0"),
        ([[1.0]] * 5 + [[1.0, 2.0]] + [[1.0]] * 394, r"column 'gains': row 5 has 2 for 1 targets; give each one"),
        (["good"] * 400, r"column 'gains' holds no numbers"),
        ([1.0] * 399 + [None], r"row 399: column 'gains' holds a null"),
    ):
        add(tables, "queries", "gains", values)
        with pytest.raises(InputError, match=rf"queries.parquet: {message}"):
            read(tables)
    with pytest.raises(InputError, match=r"0 columns 'worth', but .*; add it, or name one of them with data.columns.g"):
        read(tables, gains="worth")


def test_texts_in_columns_are_those_in_files(folder: Path, tables: Path) -> None:
    pytest.importorskip("bm25s", reason="needs the extra nvf[lexical]")
    for name, texts in (("texts", TEXTS), ("queries_texts", ASKED)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    expected, found = (read(place, words={}) for place in (folder, tables))
    assert found.texts == expected.texts == TEXTS
    for split in SPLITS:
        assert torch.equal(found.splits[split].words.scores, expected.splits[split].words.scores)
        assert found.splits[split].words.scores.any()
    assert read(tables, text=None, words={}).texts is None


def test_a_file_of_texts_goes_before_a_column(tables: Path) -> None:
    (tables / "texts.jsonl").write_text('{"text": "other"}\n' * 50)
    assert texts_of_rows(tables, read_memory(tables)) == ["other"] * 50


def test_a_column_of_texts_must_hold_one_a_row(tables: Path) -> None:
    for values, message in (
        (list(range(50)), r"corpus.parquet: column 'text' is not one text for each of 50 vectors; correct it"),
        ([["a", "b"]] * 25 + [[]] * 25, r"corpus.parquet: column 'text' is not one text for each of 50"),
        ([None, *TEXTS[1:]], r"corpus.parquet: row 0: column 'text' holds a null"),
    ):
        add(tables, "corpus", "text", values)
        with pytest.raises(InputError, match=message):
            read(tables)
    with pytest.raises(InputError, match=r"0 columns 'body', but .*; add it, or name one of them with data.columns.te"):
        read(tables, text="body")
