"""The door: a good folder is read as numpy reads it, every fault is named with its file, row and remedy."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import write_folder
from nvf import Pipeline, Reranker, SoftAttention, VectorMemory
from nvf.data.folder import read_memory, read_recorded
from nvf.data.search_files import write_answers
from nvf.data.splits import SPLITS
from nvf.errors import InputError
from nvf.files.ids import target_rows
from nvf.files.npy import NpyFile
from nvf.models.memory import unit


def read(folder: Path, seed: int = 0):
    memory = read_memory(folder)
    return memory, read_recorded(folder, memory, seed=seed)


def edit(folder: Path, name: str, change: Callable[[np.ndarray], np.ndarray]) -> None:
    np.save(folder / name, change(np.load(folder / name)))


def put(index: tuple[int, ...] | int, value: float) -> Callable[[np.ndarray], np.ndarray]:
    def change(array: np.ndarray) -> np.ndarray:
        array[index] = value
        return array

    return change


def test_a_folder_without_splits_is_split_80_10_10(folder: Path) -> None:
    memory, recorded = read(folder)
    assert memory.rows.shape == (50, 8)
    sizes = [len(recorded.splits[split].queries) for split in SPLITS]
    assert sizes == [320, 40, 40]
    queries, targets = np.load(folder / "queries.npy"), np.load(folder / "targets.npy")
    unit_queries = queries / np.linalg.norm(queries, axis=1, keepdims=True)
    places = []
    for split in recorded.splits.values():
        place = (split.queries.numpy() @ unit_queries.T).argmax(axis=1)
        assert split.targets[:, 0].tolist() == targets[place].tolist()  # each query kept its target
        places += place.tolist()
    assert sorted(places) == list(range(400))


def test_the_split_depends_on_the_seed_alone(folder: Path) -> None:
    first, again, other = (read(folder, seed)[1].splits["test"].queries for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@given(groups=st.lists(st.integers(1, 4), min_size=60, max_size=90), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_identical_queries_are_one_query_with_the_targets_of_all(
    tmp_path_factory, groups: list[int], seed: int
) -> None:
    folder = tmp_path_factory.mktemp("repeated")
    write_folder(folder)
    distinct = np.random.default_rng(0).standard_normal((len(groups), 8))
    queries = np.repeat(distinct, groups, axis=0)
    np.save(folder / "queries.npy", queries)
    order = np.random.default_rng(seed).permutation(len(queries))
    targets = np.random.default_rng(seed).integers(50, size=(len(queries), 2))
    targets[::2, 1] = -1
    np.save(folder / "queries.npy", queries[order])
    np.save(folder / "targets.npy", targets)
    expected: dict[bytes, set[int]] = {}
    for query, rows in zip(unit(torch.from_numpy(queries[order])).numpy(), targets.tolist(), strict=True):
        expected.setdefault(query.tobytes(), set()).update(row for row in rows if row >= 0)
    recorded = read(folder, seed)[1]
    found = [
        (query.tobytes(), sorted(row for row in rows if row >= 0))
        for split in recorded.splits.values()
        for query, rows in zip(split.queries.numpy(), split.targets.tolist(), strict=True)
    ]
    assert sorted(found) == sorted((query, sorted(rows)) for query, rows in expected.items())
    assert recorded.merged == len(queries) - len(groups)


def test_one_answer_a_line_is_what_several_answers_a_query_are(
    run: Callable[..., dict[str, Any]], folder: Path, tmp_path: Path
) -> None:
    both = np.stack([np.load(folder / "targets.npy"), (np.load(folder / "targets.npy") + 1) % 50], axis=1)
    np.save(folder / "targets.npy", np.sort(both))
    expected = run("data=embeddings", f"data.dir={folder}", "trainer=debug", folder=tmp_path / "expected")
    assert expected["merged"] == {"rows": 0, "queries": 0}
    edit(folder, "queries.npy", lambda queries: np.concatenate([queries, queries]))
    np.save(folder / "targets.npy", both.T.reshape(-1))
    found = run("data=embeddings", f"data.dir={folder}", "trainer=debug")
    assert found["merged"] == {"rows": 0, "queries": 400}
    assert {name: found[name] for name in ("test", "val", "queries")} == {
        name: expected[name] for name in ("test", "val", "queries")
    }


def test_equal_rows_are_one_answer(run: Callable[..., dict[str, Any]], folder: Path, tmp_path: Path) -> None:
    settings = ["data=embeddings", f"data.dir={folder}", "trainer=debug", "index=ivf"]
    expected = run(*settings, folder=tmp_path / "expected")
    edit(folder, "corpus.npy", lambda rows: np.concatenate([rows, 2 * rows]))  # of another length, but the same row
    edit(folder, "targets.npy", lambda rows: rows + 50)
    (folder / "ids.json").write_text(json.dumps([f"item {row}" for row in range(100)]))
    found = run(*settings)
    assert found["merged"] == {"rows": 50, "queries": 0}
    assert {name: found[name] for name in ("test", "val")} == {name: expected[name] for name in ("test", "val")}
    assert found["index"]["top1"] == expected["index"]["top1"]
    asked = np.random.default_rng(1).standard_normal((9, 8))
    theirs, ours = (Pipeline.load(tmp_path / name / "pipeline") for name in ("expected", "run"))
    answers, hits = theirs.search(asked, k=50), ours.search(asked, k=50)
    np.testing.assert_array_equal(hits.rows, answers.rows)
    assert hits.ids.tolist() == [[f"item {row}" for row in rows] for rows in answers.rows.tolist()]
    assert torch.equal(ours.keys(), theirs.keys().repeat(2, 1))  # in the order of the corpus
    with pytest.raises(InputError, match="k=51 exceeds the memory's 50 rows"):
        ours.search(asked, k=51)


def test_the_first_of_equal_rows_is_the_one_that_is_found(folder: Path, tmp_path: Path) -> None:
    corpus, targets = np.load(folder / "corpus.npy"), np.load(folder / "targets.npy")
    which = np.random.default_rng(2).integers(50, size=200)
    np.save(folder / "corpus.npy", corpus[which])
    np.save(folder / "targets.npy", which := np.random.default_rng(3).integers(200, size=400))
    same = np.load(folder / "corpus.npy")
    first = [next(row for row in range(200) if (same[row] == same[target]).all()) for target in which]
    for dtype, mapped in (("float32", None), ("float32", tmp_path / "rows"), ("bfloat16", tmp_path / "rows")):
        memory = read_memory(folder, dtype=dtype, mapped=mapped)
        assert len(memory) == len({row.tobytes() for row in same})
        assert memory.vectors_of(memory.rows_of(torch.from_numpy(which))).tolist() == first
        assert memory.rows_of(torch.tensor([-1])).tolist() == [-1]
        kept = memory.rows[memory.rows_of(torch.arange(200))]
        assert torch.equal(kept, VectorMemory(torch.from_numpy(same), dtype=dtype).rows)
    assert len(targets) == 400


def test_a_relevance_matrix_is_refused_by_name(folder: Path) -> None:
    targets = np.load(folder / "targets.npy")
    np.save(folder / "targets.npy", np.eye(50, dtype=np.int8)[targets])
    with pytest.raises(InputError, match=r"targets.npy is a relevance matrix; give each query the rows"):
        read(folder)


IDS = {
    "uint64": [2**64 - 1 - row for row in range(50)],
    "int64": [2**63 - 1, -(2**63), *range(48)],
    "across": [1, 2**63, *range(2, 50)],
    "both": [-(2**63), 2**64 - 1, 2**53, 2**53 + 1, *range(46)],
}


@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_all_integers_of_64_bits_are_ids(folder: Path, tmp_path: Path, ids: list[int]) -> None:
    (folder / "ids.json").write_text(json.dumps(ids))
    memory, _ = read(folder)
    assert memory.ids is not None
    assert memory.ids.tolist() == ids
    pipeline = Pipeline(SoftAttention(memory), Reranker(8), k=3)
    pipeline.save(tmp_path / "pipeline")
    hits = Pipeline.load(tmp_path / "pipeline").search(np.ones((4, 8)), k=50)
    expected = [[ids[row] for row in rows] for rows in hits.rows.tolist()]
    assert hits.ids.tolist() == expected
    write_answers(tmp_path / "a.jsonl", [hits], count=4, k=50)
    assert [json.loads(line)["ids"] for line in (tmp_path / "a.jsonl").read_text().splitlines()] == expected
    np.testing.assert_array_equal(
        target_rows(memory.ids, np.array(ids, dtype=object), np.ones(50, dtype=int), "targets"),
        np.arange(50)[:, None],
    )


@pytest.mark.parametrize("ids", [[2**64, *range(49)], [-(2**63) - 1, *range(49)]])
def test_ids_beyond_64_bits_are_refused(folder: Path, ids: list[int]) -> None:
    (folder / "ids.json").write_text(json.dumps(ids))
    with pytest.raises(InputError, match=r"ids.json: the ids .* do not fit into 64 bits"):
        read(folder)


def test_given_splits_are_kept(folder: Path) -> None:
    queries, targets = np.load(folder / "queries.npy"), np.load(folder / "targets.npy")
    for split, part in zip(SPLITS, (slice(0, 300), slice(300, 350), slice(350, 400)), strict=True):
        np.save(folder / f"{split}_queries.npy", queries[part])
        np.save(folder / f"{split}_targets.npy", targets[part])
    with pytest.raises(InputError, match="keep either your splits or the one file"):
        read(folder)
    (folder / "queries.npy").unlink()
    (folder / "targets.npy").unlink()
    splits = read(folder)[1].splits
    assert splits["val"].targets[:, 0].tolist() == targets[300:350].tolist()
    (folder / "val_targets.npy").unlink()
    with pytest.raises(InputError, match=r"val_targets.npy is missing"):
        read(folder)


def test_rows_may_have_ids(folder: Path) -> None:
    assert read(folder)[0].ids is None
    (folder / "ids.json").write_text(json.dumps([f"item {row}" for row in range(50)]))
    memory, recorded = read(folder)
    assert memory.ids is not None
    assert memory.ids[7] == "item 7"
    assert sorted(recorded.splits["train"].targets.unique().tolist()) == list(range(50))  # still rows
    (folder / "ids.json").write_text("[1, 2]")
    with pytest.raises(InputError, match=r"ids.json: 2 ids for 50 rows; give each row"):
        read(folder)


def test_several_targets_are_padded(folder: Path) -> None:
    edit(folder, "targets.npy", lambda t: np.stack([t, np.where(t % 2, -1, (t + 1) % 50)], axis=1))
    _, recorded = read(folder)
    assert recorded.splits["train"].targets.shape == (320, 2)


@pytest.mark.parametrize("dtype", ["float16", "float32", "float64", ">f4"])
def test_float_types(folder: Path, dtype: str) -> None:
    expected = np.load(folder / "corpus.npy").astype(np.float64)
    edit(folder, "corpus.npy", lambda a: a.astype(dtype))
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    np.testing.assert_allclose(read(folder)[0].rows.numpy(), expected, atol=1e-6)


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["<f4", ">f2", "<i8"])
@pytest.mark.parametrize("shape", [(2000, 8), (2000, 1), (2000,)])
def test_a_file_is_read_in_blocks_whatever_its_order(
    tmp_path: Path, order: str, dtype: str, shape: tuple[int, ...]
) -> None:
    values = np.random.default_rng(0).integers(100, size=shape).astype(dtype, order=order)
    np.save(tmp_path / "a.npy", values)
    file = NpyFile(tmp_path / "a.npy", "values")
    tracemalloc.start()
    for start, block in zip(range(0, 2000, 30), file.blocks(30), strict=True):
        np.testing.assert_array_equal(block, values[start : start + 30])
        assert block.flags.c_contiguous
        assert block.dtype.isnative
    assert tracemalloc.get_traced_memory()[1] < values.nbytes / 2 + 2**15  # numpy's and the file's own
    tracemalloc.stop()


FAULTS = {
    "no corpus": (lambda f: (f / "corpus.npy").unlink(), r"corpus.npy is missing; it holds the vectors of your items"),
    "no targets": (lambda f: (f / "targets.npy").unlink(), r"targets.npy is missing"),
    "rank": (lambda f: edit(f, "corpus.npy", lambda a: a[0]), r"corpus.npy: \(8,\)"),
    "empty corpus": (lambda f: edit(f, "corpus.npy", lambda a: a[:0]), r"corpus.npy: \(0, 8\)"),
    "no queries": (lambda f: edit(f, "queries.npy", lambda a: a[:0]), r"queries.npy: \(0, 8\)"),
    "integers": (
        lambda f: edit(f, "corpus.npy", lambda a: a.astype(int)),
        r"corpus.npy: \(50, 8\) int64; give the vectors of your items",
    ),
    "lengths": (lambda f: edit(f, "targets.npy", lambda a: a[:9]), r"targets.npy: \(9,\) int64 for 400 queries"),
    "too high": (lambda f: edit(f, "targets.npy", put(7, 50)), r"targets.npy: row 7: target 50 is outside 0..49"),
    "too low": (lambda f: edit(f, "targets.npy", put(7, -2)), r"targets.npy: row 7: target -2 is outside 0..49"),
    "no target": (lambda f: edit(f, "targets.npy", put(7, -1)), r"targets.npy: row 7 has no target; give it one"),
    "float rows": (lambda f: edit(f, "targets.npy", lambda a: a / 1.0), r"targets.npy: \(400,\) float64 for"),
    "target rank": (lambda f: edit(f, "targets.npy", lambda a: a[:, None, None]), r"targets.npy: \(400, 1, 1\)"),
    "NaN": (lambda f: edit(f, "corpus.npy", put((3, 2), np.nan)), r"corpus.npy: row 3 holds NaN or infinite"),
    "infinite": (lambda f: edit(f, "queries.npy", put((4, 0), -np.inf)), r"queries.npy: row 4 holds NaN or infinite"),
    "zero": (lambda f: edit(f, "corpus.npy", put(5, 0.0)), r"corpus.npy: row 5 is zero \(1 such rows\)"),
    "too few": (lambda f: [edit(f, n, lambda a: a[:4]) for n in ("queries.npy", "targets.npy")], r"split empty"),
    "pickle": (lambda f: np.save(f / "corpus.npy", np.array([{}], dtype=object)), r"corpus.npy is truncated or not"),
    "text": (lambda f: (f / "corpus.npy").write_text("id,vector\n"), r"corpus.npy is truncated or not a plain .npy"),
    "nothing": (lambda f: (f / "corpus.npy").write_bytes(b""), r"corpus.npy is truncated or not a plain .npy"),
    "archive": (
        lambda f: np.savez((f / "corpus.npy").open("wb"), a=np.ones(3)),
        r"corpus.npy is truncated or not a plain .npy",
    ),
}


@pytest.mark.parametrize(("break_it", "message"), FAULTS.values(), ids=FAULTS)
def test_every_fault_is_named(folder: Path, break_it: Callable[[Path], None], message: str) -> None:
    break_it(folder)
    with pytest.raises(InputError, match=message):
        read(folder)


@given(cut=st.integers(0, 927), name=st.sampled_from(["corpus.npy", "targets.npy"]))
@settings(max_examples=60, deadline=None)
def test_a_file_cut_anywhere_is_refused(tmp_path_factory, cut: int, name: str) -> None:
    folder = tmp_path_factory.mktemp("cut")
    write_folder(folder)
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[:cut])
    with pytest.raises(InputError, match=f"{name} is truncated"):
        read(folder)


@given(
    row=st.integers(0, 49),
    column=st.integers(0, 7),
    value=st.sampled_from([np.nan, np.inf, -np.inf]),
    name=st.sampled_from(["corpus.npy", "queries.npy"]),
)
@settings(max_examples=30, deadline=None)
def test_a_bad_value_anywhere_is_named(tmp_path_factory, row: int, column: int, value: float, name: str) -> None:
    folder = tmp_path_factory.mktemp("bad")
    write_folder(folder)
    edit(folder, name, put((row, column), value))
    with pytest.raises(InputError, match=f"{name}: row {row} holds NaN or infinite values"):
        read(folder)
