"""The door: a good folder is read as numpy reads it, every fault is named with its file, row and remedy."""

import json
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import write_folder
from nvf.embeddings import read_memory, read_recorded
from nvf.errors import InputError
from nvf.npy import ArrayFile
from nvf.splits import SPLITS


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
def test_identical_queries_stay_in_one_split(tmp_path_factory, groups: list[int], seed: int) -> None:
    folder = tmp_path_factory.mktemp("repeated")
    write_folder(folder)
    distinct = np.random.default_rng(0).standard_normal((len(groups), 8))
    queries = np.repeat(distinct, groups, axis=0)
    np.save(folder / "queries.npy", queries)
    np.save(folder / "targets.npy", np.zeros(len(queries), dtype=int))
    splits = read(folder, seed)[1].splits
    seen = [{row.tobytes() for row in split.queries.numpy()} for split in splits.values()]
    assert sum(len(rows) for rows in seen) == len(set.union(*seen)) == len(groups)
    assert sum(len(split.queries) for split in splits.values()) == len(queries)


def test_given_splits_are_kept(folder: Path) -> None:
    queries, targets = np.load(folder / "queries.npy"), np.load(folder / "targets.npy")
    for split, part in zip(SPLITS, (slice(0, 300), slice(300, 350), slice(350, 400)), strict=True):
        np.save(folder / f"{split}_queries.npy", queries[part])
        np.save(folder / f"{split}_targets.npy", targets[part])
    with pytest.raises(InputError, match="keep either your splits or the whole"):
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
    file = ArrayFile(tmp_path / "a.npy", "values")
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
    "rank": (lambda f: edit(f, "corpus.npy", lambda a: a[0]), r"corpus.npy: shape \(8,\)"),
    "empty corpus": (lambda f: edit(f, "corpus.npy", lambda a: a[:0]), r"corpus.npy: shape \(0, 8\)"),
    "no queries": (lambda f: edit(f, "queries.npy", lambda a: a[:0]), r"queries.npy: shape \(0, 8\)"),
    "integers": (
        lambda f: edit(f, "corpus.npy", lambda a: a.astype(int)),
        r"type int64; give the vectors of your items as float16",
    ),
    "dimensions": (lambda f: edit(f, "queries.npy", lambda a: a[:, :5]), r"queries.npy: 5 dimensions.*has 8"),
    "lengths": (lambda f: edit(f, "targets.npy", lambda a: a[:9]), r"targets.npy: 9 targets for 400 queries"),
    "too high": (lambda f: edit(f, "targets.npy", put(7, 50)), r"targets.npy: row 7: target 50 is outside 0..49"),
    "too low": (lambda f: edit(f, "targets.npy", put(7, -2)), r"targets.npy: row 7: target -2 is outside 0..49"),
    "no target": (lambda f: edit(f, "targets.npy", put(7, -1)), r"targets.npy: row 7 has no target; give it one"),
    "float rows": (lambda f: edit(f, "targets.npy", lambda a: a / 1.0), r"targets.npy: type float64; give integer"),
    "target rank": (lambda f: edit(f, "targets.npy", lambda a: a[:, None, None]), r"targets.npy: shape \(400, 1, 1\)"),
    "NaN": (lambda f: edit(f, "corpus.npy", put((3, 2), np.nan)), r"corpus.npy: row 3 holds NaN or infinite"),
    "infinite": (lambda f: edit(f, "queries.npy", put((4, 0), -np.inf)), r"queries.npy: row 4 holds NaN or infinite"),
    "zero": (lambda f: edit(f, "corpus.npy", put(5, 0.0)), r"corpus.npy: row 5 is zero \(1 such rows\)"),
    "too few": (lambda f: [edit(f, n, lambda a: a[:4]) for n in ("queries.npy", "targets.npy")], r"split empty"),
    "pickle": (lambda f: np.save(f / "corpus.npy", np.array([{}], dtype=object)), r"corpus.npy is truncated or not"),
    "text": (lambda f: (f / "corpus.npy").write_text("id,vector\n"), r"corpus.npy is truncated or not a plain .npy"),
    "nothing": (lambda f: (f / "corpus.npy").write_bytes(b""), r"corpus.npy is truncated or not a plain .npy"),
    "archive": (lambda f: np.savez((f / "corpus.npy").open("wb"), a=np.ones(3)), r"archive of arrays"),
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
