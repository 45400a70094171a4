"""Splits of the user's own: queries that stand in several of them are counted and named."""

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nvf.embeddings import read_memory, read_recorded
from nvf.memory import unit
from nvf.queries import QueryBatch
from nvf.splits import SPLITS, repeats


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
            "10 of 60 val queries are also in train, 10 of 60 test queries are also in val; they were seen before",
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
    assert len(warnings) == (warning is not None)
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
