"""Queries of another model than the rows: what the folder says of them, and every fault, which names its file."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import to_parquet
from nvf.data.folder import read_memory, read_recorded
from nvf.data.queries import Recorded
from nvf.data.splits import SPLITS
from nvf.errors import InputError
from nvf.models.memory import unit

DIM, OLD = 12, 8  # of the queries and of the rows
TURN = np.random.default_rng(7).standard_normal((OLD, DIM))


@pytest.fixture
def wide(folder: Path) -> Path:
    """The folder with queries of another width; those of the rows' model are beside it, as are pairs."""
    old = np.load(folder / "queries.npy")
    np.save(folder / "reference_old_queries.npy", 3 * old)
    np.save(folder / "queries.npy", old @ TURN)
    np.save(folder / "reference_new_corpus.npy", np.load(folder / "corpus.npy").astype(np.float32) @ TURN)
    return folder


@pytest.fixture
def split(wide: Path) -> Path:
    """The same with splits of the user's own, the references among them."""
    parts = dict(zip(SPLITS, (slice(0, 300), slice(300, 350), slice(350, 400)), strict=True))
    for name, prefix in (("queries", ""), ("targets", ""), ("reference_old_queries", "reference_old_")):
        whole = np.load(wide / f"{name}.npy")
        for part, places in parts.items():
            np.save(wide / f"{prefix}{part}_{name.removeprefix(prefix)}.npy", whole[places])
        (wide / f"{name}.npy").unlink()
    return wide


def pairs(folder: Path, *, old: Any = (30, OLD), new: Any = (30, DIM)) -> None:
    rng = np.random.default_rng(3)
    for name, shape in (("old", old), ("new", new)):
        if shape is not None:
            np.save(folder / f"pairs_{name}.npy", rng.standard_normal(shape))


def read(folder: Path, **given: Any) -> Recorded:
    return read_recorded(folder, read_memory(folder), seed=0, **given)


def test_queries_as_wide_as_the_rows_are_of_their_model_unless_something_says_otherwise(folder: Path) -> None:
    plain = read(folder)
    assert (plain.foreign, plain.pairs, plain.references) == (False, None, {})
    assert read(folder, foreign=True).foreign
    assert read(folder, foreign=True).references == {split: {} for split in SPLITS}
    pairs(folder, new=(30, OLD))
    both = read(folder)
    assert both.foreign
    assert both.pairs is not None
    for name, part in zip(("old", "new"), both.pairs, strict=True):
        given = np.load(folder / f"pairs_{name}.npy")
        np.testing.assert_allclose(part.numpy(), given / np.linalg.norm(given, axis=1, keepdims=True), rtol=1e-5)
    refused = read(folder, foreign=False)
    assert (refused.foreign, refused.pairs) == (False, None)


@pytest.mark.parametrize("foreign", ["perhaps", 2])
def test_anything_else_is_refused(wide: Path, foreign: Any) -> None:
    with pytest.raises(InputError, match=rf"data\.foreign={foreign}"):
        read(wide, foreign=foreign)


def test_references_follow_the_deal(wide: Path) -> None:
    queries = np.load(wide / "queries.npy")
    queries[7] = queries[3]  # one query, of its first line
    np.save(wide / "queries.npy", queries)
    np.save(wide / "corpus.npy", np.load(wide / "corpus.npy")[[*range(50), 4]])  # two equal rows
    np.save(wide / "reference_new_corpus.npy", np.load(wide / "reference_new_corpus.npy")[[*range(50), 9]])
    found = read(wide)
    assert found.foreign
    assert sum(len(batch.queries) for batch in found.splits.values()) == 399
    given, old = (
        unit(torch.from_numpy(np.load(wide / f"{name}.npy"))) for name in ("queries", "reference_old_queries")
    )
    for name, batch in found.splits.items():
        lines = (batch.queries @ given.T).argmax(dim=-1)
        asked, rows = found.references[name]["old"]
        torch.testing.assert_close(asked, old[lines])
        assert rows is found.memory.rows
        asked, rows = found.references[name]["anew"]
        assert asked is batch.queries
        corpus = unit(torch.from_numpy(np.load(wide / "reference_new_corpus.npy")))
        torch.testing.assert_close(rows, corpus[:50])  # of equal rows the first


def test_splits_of_the_users_own_have_their_references(split: Path) -> None:
    (split / "reference_old_val_queries.npy").unlink()
    (split / "reference_new_corpus.npy").unlink()
    found = read(split)
    assert {name: set(of) for name, of in found.references.items()} == {"train": {"old"}, "val": set(), "test": {"old"}}
    torch.testing.assert_close(
        found.references["test"]["old"][0], unit(torch.from_numpy(np.load(split / "reference_old_test_queries.npy")))
    )


def test_queries_in_parquet_may_be_of_another_model(wide: Path, tmp_path: Path) -> None:
    to_parquet(wide, tmp_path / "tables")
    pairs(tmp_path / "tables")
    found = read(tmp_path / "tables")
    assert found.foreign
    assert found.splits["train"].queries.shape[1] == DIM
    with pytest.raises(InputError, match=r"data\.foreign=false.*12.*8"):
        read(tmp_path / "tables", foreign=False)


def put_nan(path: Path) -> None:
    array = np.load(path)
    array[5, 0] = np.nan
    np.save(path, array)


def cut(path: Path, lines: int | None = None, width: int | None = None) -> None:
    array = np.load(path)
    np.save(path, np.concatenate([array, array])[: lines or len(array), :width])


FAULTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pairs of unequal length": (
        lambda folder: pairs(folder, old=(29, OLD)),
        "pairs_new.npy",
    ),
    "only the old": (lambda folder: pairs(folder, new=None), "pairs_new.npy"),
    "only the new": (lambda folder: pairs(folder, old=None), "pairs_old.npy"),
    "old as wide as the queries": (lambda folder: pairs(folder, old=(30, DIM)), "pairs_old.npy"),
    "new as wide as the rows": (lambda folder: pairs(folder, new=(30, OLD)), "pairs_new.npy"),
    "pairs swapped": (lambda folder: pairs(folder, old=(30, DIM), new=(30, OLD)), "pairs_old.npy"),
    "empty pairs": (lambda folder: pairs(folder, old=(0, OLD), new=(0, DIM)), "pairs_old.npy"),
    "flat pairs": (lambda folder: pairs(folder, old=(30,)), "pairs_old.npy"),
    "NaN": (lambda folder: (pairs(folder), put_nan(folder / "pairs_new.npy")), "pairs_new.npy"),
    "text": (lambda folder: (pairs(folder), (folder / "pairs_old.npy").write_text("no")), "pairs_old.npy"),
    "few old queries": (lambda folder: cut(folder / "reference_old_queries.npy", 399), "reference_old_queries.npy"),
    "many old queries": (lambda folder: cut(folder / "reference_old_queries.npy", 401), "reference_old_queries.npy"),
    "narrow": (lambda folder: cut(folder / "reference_old_queries.npy", width=7), "reference_old_queries.npy"),
    "few rows anew": (lambda folder: cut(folder / "reference_new_corpus.npy", 49), "reference_new_corpus.npy"),
    "many rows anew": (lambda folder: cut(folder / "reference_new_corpus.npy", 51), "reference_new_corpus.npy"),
    "rows anew of the old width": (
        lambda folder: cut(folder / "reference_new_corpus.npy", width=OLD),
        "reference_new_corpus.npy",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_every_fault_names_its_file(wide: Path, fault: str) -> None:
    spoil, named = FAULTS[fault]
    spoil(wide)
    with pytest.raises(InputError, match=named):
        read(wide)


def test_other_widths_are_refused_where_they_are_none_of_another_model(wide: Path) -> None:
    with pytest.raises(InputError, match=r"data\.foreign=false.*12.*8"):
        read(wide, foreign=False)


@pytest.mark.parametrize("part", ["val", "test", "train"])
def test_splits_of_different_widths_are_refused(split: Path, part: str) -> None:
    cut(split / f"{part}_queries.npy", width=OLD)
    with pytest.raises(InputError, match=f"{'val' if part == 'train' else part} queries"):
        read(split)
