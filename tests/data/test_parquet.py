"""Parquet folders: the same as .npy ones, with ids in place of rows; every fault is named."""

import decimal
import json
import pickle
import sys
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import compose_config, to_parquet
from nvf import InputError, Pipeline
from nvf.data.folder import COLUMNS, read_memory, read_recorded
from nvf.data.splits import SPLITS

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")
from nvf.data.parquet import ParquetFile  # noqa: E402  # needs pyarrow


@pytest.fixture
def tables(folder: Path, tmp_path: Path) -> Path:
    """The folder of embeddings as parquet, ids `item 0` to `item 49`."""
    to_parquet(folder, tmp_path / "tables")
    return tmp_path / "tables"


def read(folder: Path, **columns: str):
    names = {**COLUMNS, **columns}
    memory = read_memory(folder, columns=names)
    return memory, read_recorded(folder, memory, seed=0, columns=names)


def edit(folder: Path, name: str, column: str, values: Any, kind: Any = None) -> None:
    """Replace a column by values, a list, or by what a function makes of the list that is there."""
    table = pq.read_table(folder / name)
    values = values(table.column(column).to_pylist()) if callable(values) else values
    kind = kind or table.schema.field(column).type
    table = table.set_column(table.schema.get_field_index(column), column, pa.array(values, type=kind))
    pq.write_table(table, folder / name)


def put(row: int, value: Any) -> Callable[[list[Any]], list[Any]]:
    return lambda values: [value if index == row else old for index, old in enumerate(values)]


def test_a_parquet_folder_is_what_the_same_npy_folder_is(folder: Path, tables: Path) -> None:
    (memory, recorded), (same, expected) = read(tables), read(folder)
    assert memory.ids is not None
    assert memory.ids.tolist() == [f"item {row}" for row in range(50)]
    assert torch.equal(memory.rows, same.rows)
    assert memory.fingerprint == same.fingerprint
    for split in SPLITS:
        assert torch.equal(recorded.splits[split].queries, expected.splits[split].queries)
        assert torch.equal(recorded.splits[split].targets, expected.splits[split].targets)


@pytest.mark.parametrize(
    "kind",
    [
        *(pa.list_(getattr(pa, f"float{bits}")()) for bits in (16, 32, 64)),
        *(pa.list_(getattr(pa, f"float{bits}")(), 8) for bits in (16, 32, 64)),
        pa.large_list(pa.float32()),
    ],
    ids=str,
)
def test_vectors_come_in_many_types(tables: Path, kind: Any) -> None:
    expected = read(tables)[0].rows
    edit(tables, "corpus.parquet", "vector", lambda vectors: [np.array(v, dtype=np.float16) for v in vectors], kind)
    assert torch.equal(read(tables)[0].rows, expected)


def test_row_groups_are_joined(tables: Path) -> None:
    expected = read(tables)[1].splits["train"]
    table = pq.read_table(tables / "queries.parquet")
    pq.write_table(table, tables / "queries.parquet", row_group_size=7)
    for mine, theirs in zip(read(tables)[1].splits["train"][:2], expected[:2], strict=True):
        assert torch.equal(mine, theirs)


UUIDS = [uuid.UUID(int=7919 * row + 2**120) for row in range(50)]
KINDS = {  # the type of a column, what stands in it for row n, and the id that this is
    "int64": (pa.int64(), int, int),
    "uint8": (pa.uint8(), int, int),
    "uint64": (pa.uint64(), lambda n: 2**64 - 1 - n, lambda n: 2**64 - 1 - n),
    "string": (pa.string(), str, str),
    "large string": (pa.large_string(), str, str),
    "categories": (pa.dictionary(pa.int32(), pa.string()), str, str),
    "categories of integers": (pa.dictionary(pa.int8(), pa.int64()), int, int),
    "uuid": (pa.uuid(), lambda n: UUIDS[n].bytes, lambda n: str(UUIDS[n])),
    "decimal": (pa.decimal128(38, 2), lambda n: decimal.Decimal(2**64 - 1 - n), lambda n: 2**64 - 1 - n),
    "float": (pa.float64(), lambda n: 2.0**53 - 1 - n, lambda n: 2**53 - 1 - n),
    "half": (pa.float16(), np.float16, int),
}


@pytest.mark.parametrize(("kind", "stored", "named"), KINDS.values(), ids=KINDS)
@pytest.mark.parametrize("listed", [True, False])
def test_ids_and_targets_come_in_many_types(
    tables: Path, kind: Any, stored: Callable[[int], Any], named: Callable[[int], Any], listed: bool
) -> None:
    expected = read(tables)[1].splits["train"].targets
    edit(tables, "corpus.parquet", "id", [stored(row) for row in range(50)], kind)
    names = pq.read_table(tables / "queries.parquet").column("targets").to_pylist()
    targets: Any = pa.array([stored(int(name.removeprefix("item "))) for name in names], type=kind)
    if listed:
        targets = pa.ListArray.from_arrays(pa.array(range(len(names) + 1), type=pa.int32()), targets)
    table = pq.read_table(tables / "queries.parquet")
    pq.write_table(table.set_column(1, "targets", targets), tables / "queries.parquet")
    memory, recorded = read(tables)
    assert memory.ids is not None
    assert memory.ids.tolist() == [named(row) for row in range(50)]
    assert torch.equal(recorded.splits["train"].targets, expected)


@pytest.mark.parametrize("size", [7, 20])
def test_a_folder_of_parts_is_the_file_that_they_make(tables: Path, size: int) -> None:
    memory, recorded = read(tables)
    for name in ("corpus.parquet", "queries.parquet"):
        table = pq.read_table(tables / name)
        (tables / name).unlink()
        (tables / name).mkdir()
        (tables / name / "_SUCCESS").touch()
        for part, start in enumerate(range(0, len(table) + size, size)):  # the last has no rows
            pq.write_table(table[start : start + size], tables / name / f"part-{part:03}.parquet")
    again, same = read(tables)
    assert again.ids.tolist() == memory.ids.tolist()
    assert again.fingerprint == memory.fingerprint
    for mine, theirs in zip(same.splits["train"][:2], recorded.splits["train"][:2], strict=True):
        assert torch.equal(mine, theirs)
    blocks = list(ParquetFile(tables / "corpus.parquet", {"column": "vector"}).blocks(9))
    np.testing.assert_array_equal(
        np.concatenate(blocks), pq.read_table(tables / "corpus.parquet")["vector"].to_pylist()
    )
    edit(tables, "corpus.parquet/part-001.parquet", "id", put(2, None))
    with pytest.raises(InputError, match=rf"corpus.parquet: row {size + 2}: column 'id' holds a null"):
        read(tables)
    for path in (tables / "corpus.parquet").iterdir():
        path.unlink()
    with pytest.raises(InputError, match=r"corpus.parquet is missing, or no file; it holds"):
        read(tables)


def test_a_query_may_have_several_targets(tables: Path) -> None:
    lists = [["item 3", "item 9"], ["item 4"], ["item 7", "item 1", "item 0"]] * 100 + [["item 2"]] * 100
    edit(tables, "queries.parquet", "targets", lists, pa.list_(pa.string()))
    table = pq.read_table(tables / "queries.parquet")
    (tables / "queries.parquet").unlink()
    for split in SPLITS:
        pq.write_table(table, tables / f"{split}_queries.parquet")
    targets = read(tables)[1].splits["test"].targets
    assert targets[:3].tolist() == [[3, 9, -1], [4, -1, -1], [7, 1, 0]]
    assert targets[399].tolist() == [2, -1, -1]


def test_columns_may_have_other_names(tables: Path) -> None:
    expected = read(tables)[1].splits["val"].queries
    for name in ("corpus.parquet", "queries.parquet"):
        table = pq.read_table(tables / name)
        pq.write_table(table.rename_columns([f"my {column}" for column in table.column_names]), tables / name)
    with pytest.raises(InputError, match=r"corpus.parquet has 0 columns 'vector', but 'my id', 'my vector'; add"):
        read(tables)
    recorded = read(tables, id="my id", vector="my vector", targets="my targets")[1]
    assert torch.equal(recorded.splits["val"].queries, expected)


FLOATS, TEXTS = pa.list_(pa.float32()), pa.list_(pa.string())
FAULTS = {
    "no corpus": (lambda f: (f / "corpus.parquet").unlink(), r"corpus.npy is missing; it holds"),
    "no queries": (lambda f: (f / "queries.parquet").unlink(), r"queries.parquet is missing, or no file; it holds col"),
    "two corpora": (lambda f: np.save(f / "corpus.npy", np.eye(8)), r"both corpus.npy and corpus.parquet; keep"),
    "two queries": (lambda f: np.save(f / "queries.npy", np.eye(8)), r"both queries.npy and queries.parquet; keep"),
    "two formats": (
        lambda f: [(f / "queries.parquet").unlink(), np.save(f / "queries.npy", np.eye(8))],
        r"holds both .npy and .parquet files; give",
    ),
    "text": (lambda f: (f / "corpus.parquet").write_text("id,vector\n"), r"corpus.parquet is truncated or not a par"),
    "cut": (
        lambda f: (f / "corpus.parquet").write_bytes((f / "corpus.parquet").read_bytes()[:-9]),
        r"corpus.parquet is truncated or not a parquet file",
    ),
    "no id column": (
        lambda f: pq.write_table(pq.read_table(f / "corpus.parquet").drop_columns("id"), f / "corpus.parquet"),
        r"corpus.parquet has 0 columns 'id', but 'vector'; add it, or name one of them with data.columns.id=",
    ),
    "no rows": (
        lambda f: pq.write_table(pq.read_table(f / "corpus.parquet")[:0], f / "corpus.parquet"),
        r"corpus.parquet has no rows",
    ),
    "same id": (
        lambda f: edit(f, "corpus.parquet", "id", put(9, "item 3")),
        r"corpus.parquet: column 'id': row 9 has the id 'item 3' of row 3; give each row",
    ),
    "null id": (lambda f: edit(f, "corpus.parquet", "id", put(9, None)), r"row 9: column 'id' holds a null; remove or"),
    "float id": (
        lambda f: edit(f, "corpus.parquet", "id", [0.5 + row for row in range(50)], pa.float32()),
        r"corpus.parquet: column 'id': row 0 has the id 0.5, which is not an integer",
    ),
    "NaN id": (
        lambda f: edit(f, "corpus.parquet", "id", [*range(49), np.nan], pa.float64()),
        r"corpus.parquet: column 'id': row 49 has the id nan, which is not an integer",
    ),
    "rounded id": (
        lambda f: edit(f, "corpus.parquet", "id", [2.0**53 + 2 * row for row in range(50)], pa.float64()),
        r"corpus.parquet: column 'id': row 0 has the id 9007199254740992.0, which is not an integer",
    ),
    "dates for ids": (
        lambda f: edit(f, "corpus.parquet", "id", list(range(50)), pa.timestamp("s")),
        r"column 'id': row 0 has the id datetime.*, which is not an integer",
    ),
    "null vector": (
        lambda f: edit(f, "corpus.parquet", "vector", put(4, None), FLOATS),
        r"corpus.parquet: row 4: column 'vector' holds a null",
    ),
    "null value": (
        lambda f: edit(f, "corpus.parquet", "vector", put(4, [1.0, None] * 4), FLOATS),
        r"corpus.parquet: row 4: column 'vector' holds a null; remove or repair it",
    ),
    "ragged": (
        lambda f: edit(f, "corpus.parquet", "vector", put(4, [1.0] * 5), FLOATS),
        r"corpus.parquet: column 'vector': row 4 has 5 values, but row 0 has 8; embed",
    ),
    "empty vector": (
        lambda f: edit(f, "corpus.parquet", "vector", [[]] * 50, FLOATS),
        r"corpus.parquet: row 0: column 'vector' is an empty list",
    ),
    "numbers": (
        lambda f: edit(f, "corpus.parquet", "vector", list(range(50)), pa.int64()),
        r"column 'vector' has type int64; give lists of floats",
    ),
    "integers": (
        lambda f: edit(f, "corpus.parquet", "vector", [[row] * 8 for row in range(50)], pa.list_(pa.int64())),
        r"column 'vector' has type list<element: int64>; give lists of float",
    ),
    "zero": (
        lambda f: edit(f, "corpus.parquet", "vector", put(4, [0.0] * 8), FLOATS),
        r"corpus.parquet: row 4 \(id item 4\) is zero",
    ),
    "NaN": (
        lambda f: edit(f, "queries.parquet", "vector", put(4, [np.nan] * 8), FLOATS),
        r"queries.parquet: row 4 holds NaN or infinite values",
    ),
    "unknown target": (
        lambda f: edit(f, "queries.parquet", "targets", put(7, "item 50")),
        r"queries.parquet: row 7: target 'item 50' is not an id of the memory, whose first is 'item 0' \(1 such",
    ),
    "unknown target in a list": (
        lambda f: edit(f, "queries.parquet", "targets", [["item 1", "item 2"]] * 399 + [["item 1", "x"]], TEXTS),
        r"queries.parquet: row 399: target 'x' is not an id",
    ),
    "rows for ids": (
        lambda f: edit(f, "queries.parquet", "targets", [3] * 400, pa.int64()),
        r"queries.parquet: row 0: target 3 is not an id of the memory, whose first is 'item 0' \(400 such",
    ),
    "null targets": (
        lambda f: edit(f, "queries.parquet", "targets", put(7, None)),
        r"row 7: column 'targets' holds a null",
    ),
    "null target": (
        lambda f: edit(f, "queries.parquet", "targets", [["item 1", "item 2"]] * 9 + [["item 1", None]] * 391, TEXTS),
        r"queries.parquet: row 9: column 'targets' holds a null",
    ),
    "no target": (
        lambda f: edit(f, "queries.parquet", "targets", [["item 1"]] * 9 + [[]] * 391, TEXTS),
        r"queries.parquet: row 9 has no target; give it one",
    ),
    "no targets": (
        lambda f: edit(f, "queries.parquet", "targets", [[]] * 400, TEXTS),
        r"queries.parquet: row 0 has no target; give it one",
    ),
    "float targets": (
        lambda f: edit(f, "queries.parquet", "targets", [[0.5]] * 400, FLOATS),
        r"queries.parquet: row 0: target 0.5 is not an id of the memory",
    ),
    "relevance": (
        lambda f: [
            edit(f, "corpus.parquet", "id", list(range(50)), pa.int64()),
            edit(
                f,
                "queries.parquet",
                "targets",
                np.eye(50, dtype=int)[np.arange(400) % 50].tolist(),
                pa.list_(pa.int8()),
            ),
        ],
        r"queries.parquet is a relevance matrix",
    ),
}


@pytest.mark.parametrize(("break_it", "message"), FAULTS.values(), ids=FAULTS)
def test_every_fault_is_named(tables: Path, break_it: Callable[[Path], None], message: str) -> None:
    break_it(tables)
    with pytest.raises(InputError, match=message):
        read(tables)


def test_a_changed_bit_is_found_where_pages_have_checksums(tables: Path) -> None:
    path = tables / "corpus.parquet"
    pq.write_table(pq.read_table(path), path, write_page_checksum=True, compression="none", use_dictionary=False)
    content = bytearray(path.read_bytes())
    vector = np.array(pq.read_table(path).column("vector")[25].as_py(), dtype=np.float16)
    content[content.index(vector.tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"corpus.parquet is truncated or not a parquet file .*checksum"):
        read(tables)


def test_a_file_that_changes_while_it_is_read_is_refused(tables: Path) -> None:
    path = tables / "queries.parquet"
    blocks = ParquetFile(path, {"column": "vector"}).blocks(7)
    next(blocks)
    with path.open("ab") as file:
        file.write(b"more")
    with pytest.raises(InputError, match=r"queries.parquet changed while it was read; start again"):
        list(blocks)


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.sentinel), "w")


def test_the_pickle_of_a_type_is_not_loaded(tables: Path, tmp_path: Path) -> None:
    # Before pyarrow 14.0.1 reading such a type loaded it: CVE-2023-47248.
    path, sentinel = tables / "corpus.parquet", tmp_path / "sentinel"
    table, expected = pq.read_table(path), read(tables)[0]
    kind = {
        b"ARROW:extension:name": b"arrow.py_extension_type",
        b"ARROW:extension:metadata": pickle.dumps(Malicious(sentinel)),
    }
    pq.write_table(table.cast(pa.schema([field.with_metadata(kind) for field in table.schema])), path)
    assert torch.equal(read(tables)[0].rows, expected.rows)
    assert not sentinel.exists()
    pickle.loads(pickle.dumps(Malicious(sentinel)))
    assert sentinel.exists()  # it would have worked


def test_without_pyarrow_the_remedy_is_named(tables: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "nvf.data.parquet", raising=False)
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(InputError, match=r"need pyarrow: pip install -e '\.\[parquet\]'"):
        read(tables)


def test_the_configured_columns_are_the_library_s() -> None:
    assert compose_config("data=embeddings")["data"]["columns"] == COLUMNS


def test_a_run_on_parquet_equals_the_run_on_npy(
    run: Callable[..., dict[str, Any]], tmp_path: Path, folder: Path, tables: Path
) -> None:
    found = run("data=embeddings", f"data.dir={tables}", "trainer=debug")
    expected = run("data=embeddings", f"data.dir={folder}", "trainer=debug", folder=tmp_path / "npy")
    for key in ("test", "val", "memory"):
        assert found[key] == expected[key]
    hits = Pipeline.load(tmp_path / "run/pipeline").search(np.ones((2, 8), dtype=np.float32), k=3)
    assert hits.ids is not None
    assert hits.ids.tolist() == [[f"item {row}" for row in rows] for rows in hits.rows.tolist()]
    assert len(json.loads((tmp_path / "run/pipeline/ids.json").read_text())) == 50


@pytest.mark.parametrize("kind", [pa.int64(), pa.float32(), pa.timestamp("us", tz="UTC"), pa.date32()])
def test_a_column_of_times_splits_as_times_npy_does(folder: Path, tables: Path, kind: Any) -> None:
    order = np.random.default_rng(1).permutation(400)
    np.save(folder / "times.npy", order)
    table = pq.read_table(tables / "queries.parquet")
    times = pa.array(order.astype(np.int32 if kind == pa.date32() else np.int64)).cast(kind)
    pq.write_table(table.append_column("asked", times), tables / "queries.parquet")
    expected, found = read(folder)[1], read(tables, time="asked")[1]
    for split in SPLITS:
        assert torch.equal(found.splits[split].queries, expected.splits[split].queries)
    assert not torch.equal(
        read(tables)[1].splits["test"].queries, expected.splits["test"].queries
    )  # unless it is named


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (["monday"] * 400, "times \\(400,\\) object"),
        ([0.0, float("nan")] * 200, "row 1: the time is nan"),
        ([0, None] * 200, "row 1: column 'asked' holds a null"),
    ],
)
def test_a_column_that_says_no_times_is_refused(tables: Path, values: list[Any], message: str) -> None:
    table = pq.read_table(tables / "queries.parquet")
    pq.write_table(table.append_column("asked", pa.array(values)), tables / "queries.parquet")
    with pytest.raises(InputError, match=message):
        read(tables, time="asked")
    with pytest.raises(InputError, match=r"name one of them with data\.columns\.time="):
        read(tables, time="absent")
