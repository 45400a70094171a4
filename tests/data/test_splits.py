"""Splits of the user's own: queries that stand in several of them are counted and named."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvf.data.folder import COLUMNS, read_memory, read_recorded
from nvf.data.queries import QueryBatch
from nvf.data.splits import SPLITS, repeats
from nvf.errors import InputError
from nvf.models.memory import unit


def batch(vectors: torch.Tensor) -> QueryBatch:
    return QueryBatch(vectors, torch.zeros(len(vectors), 1, dtype=torch.int64))


@given(drawn=st.lists(st.lists(st.integers(0, 12), min_size=1, max_size=9), min_size=3, max_size=3))
@settings(deadline=None)
def test_shared_queries_are_counted_as_a_loop_counts_them(drawn: list[list[int]]) -> None:
    vectors = unit(torch.randn(13, 4, generator=torch.Generator().manual_seed(0)))
    splits = {name: batch(vectors[rows]) for name, rows in zip(SPLITS, drawn, strict=True)}
    train, val, test = drawn
    expected = {
        "train/val": sum(row in train for row in val),
        "train/test": sum(row in train for row in test),
        "val/test": sum(row in val for row in test),
    }
    assert repeats(splits) == {pair: count for pair, count in expected.items() if count}


def test_a_negative_zero_is_a_zero_and_the_last_bit_counts() -> None:
    splits = {
        "train": batch(torch.tensor([[0.0, 1.0]])),
        "val": batch(torch.tensor([[-0.0, 1.0]])),
        "test": batch(torch.tensor([[0.0, float(np.nextafter(np.float32(1), np.float32(0)))]])),
    }
    assert repeats(splits) == {"train/val": 1}


def write_splits(folder: Path, parts: tuple[slice, slice, slice]) -> None:
    for name in ("queries", "targets"):
        array = np.load(folder / f"{name}.npy")
        (folder / f"{name}.npy").unlink()
        for split, part in zip(SPLITS, parts, strict=True):
            np.save(folder / f"{split}_{name}.npy", array[part])


@pytest.mark.parametrize(
    ("parts", "duplicates", "warning"),
    [
        ((slice(300), slice(300, 350), slice(350, 400)), {}, None),
        (
            (slice(300), slice(290, 350), slice(340, 400)),
            {"train/val": 10, "val/test": 10},
            "10 of 60 val queries are also in train; a model that has seen them",
        ),
    ],
)
def test_the_user_is_told_of_shared_queries_once(
    folder: Path,
    caplog: pytest.LogCaptureFixture,
    parts: tuple[slice, slice, slice],
    duplicates: dict[str, int],
    warning: str | None,
) -> None:
    write_splits(folder, parts)
    assert read_recorded(folder, read_memory(folder), seed=0).duplicates == duplicates
    warnings = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert len(warnings) == len(duplicates)
    if warning is not None:
        assert warning in caplog.text
        assert "let NVF split them" in caplog.text


def test_a_length_does_not_make_a_query_another(folder: Path) -> None:
    write_splits(folder, (slice(300), slice(300, 350), slice(350, 400)))
    test = np.load(folder / "test_queries.npy")
    test[:3] = 2 * np.load(folder / "train_queries.npy")[:3]
    np.save(folder / "test_queries.npy", test)
    assert read_recorded(folder, read_memory(folder), seed=0).duplicates == {"train/test": 3}


def test_a_folder_without_splits_shares_nothing(folder: Path) -> None:
    assert read_recorded(folder, read_memory(folder), seed=0).duplicates == {}


def write_times(folder: Path, times: np.ndarray) -> None:
    np.save(folder / "times.npy", times)


def asked_at(folder: Path, seed: int = 0) -> dict[str, list[int]]:
    """The places, in the folder, of each split's queries."""
    splits = read_recorded(folder, read_memory(folder), seed=seed).splits
    given = unit(torch.from_numpy(np.load(folder / "queries.npy")))
    return {name: (split.queries @ given.T).argmax(dim=-1).tolist() for name, split in splits.items()}


@pytest.mark.parametrize("kind", [np.int64, np.float64, "datetime64[s]"])
def test_times_put_the_oldest_into_train_and_the_newest_into_test(folder: Path, kind: type | str) -> None:
    order = np.random.default_rng(1).permutation(400)
    write_times(folder, (order + 2**60 if kind is np.int64 else order).astype(kind))  # float64 has not all of these
    found = asked_at(folder)
    for name, (start, end) in {"train": (0, 320), "val": (320, 360), "test": (360, 400)}.items():
        assert sorted(order[found[name]]) == list(range(start, end))


def test_identical_queries_go_where_the_first_of_them_was_asked(folder: Path) -> None:
    queries = np.load(folder / "queries.npy")
    queries[390] = queries[5]
    np.save(folder / "queries.npy", queries)
    write_times(folder, np.arange(400))
    found = read_recorded(folder, read_memory(folder), seed=0)
    assert found.duplicates == {}
    same = unit(torch.from_numpy(queries[5:6]))[0]
    assert {name: int((split.queries == same).all(dim=-1).sum()) for name, split in found.splits.items()} == {
        "train": 1,
        "val": 0,
        "test": 0,
    }


def test_equal_times_are_dealt_by_seed(folder: Path) -> None:
    write_times(folder, np.zeros(400))
    assert asked_at(folder) == asked_at(folder)
    assert sorted(asked_at(folder)["test"]) != sorted(asked_at(folder, seed=1)["test"])


@pytest.mark.parametrize(
    ("times", "message"),
    [
        (np.arange(399), r"times\.npy: times \(399,\)"),
        (np.arange(800).reshape(400, 2), r"times\.npy: times \(400, 2\)"),
        (np.array(["2026-01-01"] * 400), r"times\.npy: times \(400,\) <U10"),
        (np.where(np.arange(400) == 7, np.nan, 1.0), r"times\.npy: row 7: the time is nan"),
        (np.where(np.arange(400) == 7, np.inf, 1.0), r"times\.npy: row 7: the time is inf"),
        (
            np.where(np.arange(400) == 7, np.datetime64("NaT"), np.datetime64(0, "s")),
            r"times\.npy: row 7: the time is NaT",
        ),
    ],
)
def test_times_that_say_nothing_are_refused(folder: Path, times: np.ndarray, message: str) -> None:
    write_times(folder, times)
    with pytest.raises(InputError, match=message):
        read_recorded(folder, read_memory(folder), seed=0)


def test_times_beside_splits_of_ones_own_are_refused(folder: Path) -> None:
    write_splits(folder, (slice(300), slice(300, 350), slice(350, 400)))
    write_times(folder, np.arange(400))
    with pytest.raises(InputError, match=r"holds times\.npy, or .* but also splits"):
        read_recorded(folder, read_memory(folder), seed=0)


def test_a_column_of_times_in_a_folder_without_columns_is_refused(folder: Path) -> None:
    with pytest.raises(InputError, match=r"data\.columns\.time=asked names a column of \.parquet"):
        read_recorded(folder, read_memory(folder), seed=0, columns={**COLUMNS, "time": "asked"})
