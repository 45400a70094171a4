"""A folder of embeddings that somebody forged, damaged or changes meanwhile: no code is run, no wrong answer given."""

import itertools
import json
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
import threading
import tracemalloc
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from fuzz_folder import DOORS, write_all

from nvf import InputError
from nvf.data.folder import read_memory
from nvf.files import npy
from nvf.models.memory import VectorMemory
from programs import PATIENCE

pyarrow = pytest.importorskip("pyarrow")
pytest.importorskip("qdrant_client")
HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    place = tmp_path_factory.mktemp("written")
    write_all(place)
    return place


@pytest.fixture
def place(written: Path, tmp_path: Path) -> Path:
    """A good file for each door, to be damaged."""
    return Path(shutil.copytree(written, tmp_path, dirs_exist_ok=True))


class Malicious:
    """Unpickled, it makes a file."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Any, ...]:
        return open, (str(self.sentinel), "w")


def forge(way: str, path: Path, sentinel: Path) -> None:
    evil = np.array([Malicious(sentinel)] * 400, dtype=object)
    if way == "pickle":
        path.write_bytes(pickle.dumps(Malicious(sentinel)))
    elif way == "object array":
        with path.open("wb") as file:
            np.save(file, evil)
    elif way == "archive":
        with path.open("wb") as file:
            np.savez(file, evil)
    elif way == "torch archive":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("archive/data.pkl", pickle.dumps(Malicious(sentinel)))


@pytest.mark.parametrize("way", ["pickle", "object array", "archive", "torch archive"])
@pytest.mark.parametrize("door", DOORS)
def test_no_door_runs_what_it_reads(place: Path, tmp_path: Path, door: str, way: str) -> None:
    forge(way, place / door, tmp_path / "sentinel")
    with pytest.raises(InputError):
        DOORS[door](place / door)
    assert not (tmp_path / "sentinel").exists()
    assert pickle.loads(pickle.dumps(Malicious(tmp_path / "sentinel")))  # it would have worked
    assert (tmp_path / "sentinel").exists()


def point(state: Any) -> bytes:
    """A pickle with the state of a point that has this in its payload."""
    from qdrant_client.models import PointStruct

    return pickle.dumps(PointStruct.model_construct(id=0, vector=[1.0] * 8, payload={"state": state}))


POINTS: dict[str, Callable[[Path], bytes]] = {
    "call": lambda sentinel: pickle.dumps(Malicious(sentinel)),
    "call in a payload": lambda sentinel: point(Malicious(sentinel)),
    "old protocol": lambda sentinel: pickle.dumps(Malicious(sentinel), protocol=0),
    "another class": lambda _: pickle.dumps(Path("x")),
    "a name within a class": lambda _: (
        b"\x80\x04\x8c\x1fqdrant_client.http.models.models\x8c\x1aPointStruct.__init__.__doc__\x93."
    ),
    "a memo of 32 GB": lambda _: b"\x80\x04]r\xff\xff\xff\x7f.",
    "a text of 4 GB": lambda _: b"\x80\x04X\xff\xff\xff\xff.",
    "endless": lambda _: b"\x80\x04",
    "nothing": lambda _: b"",
}


@pytest.mark.parametrize("name", POINTS)
def test_a_point_that_is_none_is_not_loaded(place: Path, tmp_path: Path, name: str) -> None:
    path = place / "storage/collection/items/storage.sqlite"
    sentinel = tmp_path / "sentinel"
    with sqlite3.connect(path) as database:
        database.execute("UPDATE points SET point = ? WHERE rowid = 7", (POINTS[name](sentinel),))
    database.close()
    with pytest.raises(InputError, match=r"storage.sqlite: row 7 is no point \(.*\); write the collection anew"):
        DOORS["storage/collection/items/storage.sqlite"](path)
    assert not sentinel.exists()


def test_a_view_in_place_of_points_is_refused(place: Path) -> None:
    path = place / "storage/collection/items/storage.sqlite"
    with sqlite3.connect(path) as database:
        database.execute("ALTER TABLE points RENAME TO others")
        database.execute("CREATE VIEW points AS SELECT rowid, id, point FROM others WHERE random() < 0")
    database.close()
    with pytest.raises(InputError, match=r"storage.sqlite holds other tables than a collection's"):
        DOORS["storage/collection/items/storage.sqlite"](path)


def test_a_collection_of_the_form_before_sqlite_is_refused(place: Path) -> None:
    path = place / "storage/collection/items/storage.sqlite"
    path.rename(path.with_suffix(".dbm"))
    with pytest.raises(InputError, match=r"storage.sqlite is missing; write the collection anew"):
        DOORS["storage/collection/items/storage.sqlite"](path)


def header(text: str, version: bytes = b"\x01\x00", length: int | None = None) -> bytes:
    size = (len(text) if length is None else length).to_bytes(2 if version == b"\x01\x00" else 4, "little")
    return b"\x93NUMPY" + version + size + text.encode() + bytes(3200)


def claim(shape: str, kind: str = "'<f2'") -> str:
    return f"{{'descr': {kind}, 'fortran_order': False, 'shape': {shape}, }}\n"


HEADERS = {
    "rows": (
        header(claim("(1000000000000, 8)")),
        r"do not hold plain values, \(1000000000000, 8\) float16",
    ),
    "overflow": (header(claim("(4611686018427387904, 8)")), r"do not hold plain values, \(4611686018427387904, 8\)"),
    "to zero": (header(claim("(9223372036854775807, 9223372036854775807)")), r"do not hold plain values"),
    "beyond 64 bits": (header(claim(f"(0x{'f' * 8000}, 8)")), r"truncated or not a plain .npy array"),
    "negative": (header(claim("(-1, 8)")), r"do not hold plain values"),
    "records": (header(claim("(5, 8)", "[('a', '<f4')]")), r"do not hold plain values"),
    "objects": (header(claim("(5, 8)", "'|O'")), r"do not hold plain values"),
    "void": (header(claim("(5, 8)", "'|V8'")), r"do not hold plain values"),
    "subarrays": (header(claim("(5, 8)", "('<f4', (100000000,))")), r"do not hold plain values"),
    "wide": (header(claim("(5, 8)", "'|S2147483647'")), r"do not hold plain values"),
    "text": (header(claim("(5, 8)", "'<U2'")), r"<U2; give the vectors"),
    "long": (header(claim("(5, 8)"), b"\x02\x00", 2**32 - 1), r"EOF: reading array header, expected 4294967295 bytes"),
    "deep": (header("(" * 9000), r"truncated or not a plain .npy array"),
    "unclosed": (header("{'descr': '''"), r"truncated or not a plain .npy array"),
    "no utf-8": (header("\u20ac"), r"truncated or not a plain .npy array"),
    "version 3": (header(claim("(5, 8)"), b"\x03\x00"), r"truncated or not a plain .npy array"),
}


@pytest.mark.parametrize(("content", "message"), HEADERS.values(), ids=HEADERS)
def test_what_a_header_claims_is_checked_before_room_is_made(place: Path, content: bytes, message: str) -> None:
    (place / "folder/corpus.npy").write_bytes(content)
    tracemalloc.start()
    with pytest.raises(InputError, match=rf"corpus.npy.*{message}"):
        read_memory(place / "folder")
    assert tracemalloc.get_traced_memory()[1] < 2**22
    tracemalloc.stop()


@pytest.mark.parametrize("claimed", [51, 10**6, 10**12])
def test_a_parquet_file_cannot_claim_rows_that_it_lacks(place: Path, claimed: int) -> None:
    path = place / "tables/corpus.parquet"
    content, expected = path.read_bytes(), read_memory(path.parent)
    # Numbers of 64 bits in Thrift's compact form: wherever it says 50, as of rows, values and bytes, more is claimed.
    good, many = b"\x16" + varint(2 * 50), b"\x16" + varint(2 * claimed)
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")  # of the metadata
    parts = content[start:-8].split(good)
    joints = len(parts) - 1
    refused = 0
    for chosen in [*({joint} for joint in range(joints)), *map(set, itertools.combinations(range(joints), 2))]:
        ends = [(many if joint in chosen else good) if joint < joints else b"" for joint in range(joints + 1)]
        metadata = b"".join(part + end for part, end in zip(parts, ends, strict=True))
        path.write_bytes(content[:start] + metadata + len(metadata).to_bytes(4, "little") + content[-4:])
        try:
            assert torch.equal(read_memory(path.parent).rows, expected.rows)
        except InputError:
            refused += 1
    assert refused > joints  # whatever is claimed of the file's and the group's rows, both or one
    assert pyarrow.default_memory_pool().max_memory() < 2**27


def test_a_parquet_file_that_ends_pyarrow_is_refused(place: Path) -> None:
    # pyarrow 26.0: metadata.row_group(0).column(1) throws through C++ and aborts the process; found by fuzz_folder.py.
    path = place / "tables/corpus.parquet"
    content = path.read_bytes()
    start = len(content) - 8 - int.from_bytes(content[-8:-4], "little")  # of the metadata
    # In Thrift's compact form the first column that is no group: optional. Required, it has a level less than counted.
    at = content.index(b"\x35\x02\x18", start) + 1
    path.write_bytes(content[:at] + b"\x00" + content[at + 1 :])
    with pytest.raises(InputError, match=r"corpus.parquet is truncated or not a parquet file .*size mismatch"):
        read_memory(path.parent)


def varint(number: int) -> bytes:
    groups = []
    while number > 127:
        groups.append(number & 127 | 128)
        number >>= 7
    return bytes([*groups, number])


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ids.json", b"[" * 10**6),
        ("ids.json", b'{"a":' * 10**5),
        ("ids.json", b"[" + b"9" * 10**6 + b"]"),
        ("ids.json", b"[" + b",".join([b"9" * 4000] * 50) + b"]"),
        ("ids.json", json.dumps(["caf\xe9"] * 50, ensure_ascii=False).encode("latin-1")),
        ("ids.json", json.dumps([str(row) for row in range(50)]).encode("utf-16")),
        ("ids.json", json.dumps([*range(49), "\ud800"]).encode()),
        ("ids.json", json.dumps([*map(str, range(49)), "\ud800"]).encode()),
        ("texts.jsonl", b'{"text": ' + b"[" * 10**6),
        ("texts.jsonl", b'{"text": ' + b"9" * 10**6 + b"}\n"),
        ("texts.jsonl", b'{"text": "caf\xe9"}\n' * 50),
        ("texts.jsonl", b'{"text": "\\ud800"}\n' * 50),
        ("texts.jsonl", b'["text"]\n' * 50),
    ],
)
def test_text_that_is_no_such_text_is_refused(place: Path, name: str, content: bytes) -> None:
    (place / "folder" / name).write_bytes(content)
    with pytest.raises(InputError):
        DOORS[f"folder/{name}"](place / "folder" / name)


def test_damaged_copies_are_refused_or_read_right(place: Path, attempts: Callable[[int, int], int]) -> None:
    count = attempts(20, 1000)
    done = subprocess.run(
        [sys.executable, HERE / "fuzz_folder.py", "--copies", place, str(count), *DOORS],
        env={**os.environ, "PYTHONPATH": f"{HERE.parent}:{HERE}"},
        capture_output=True,
        text=True,
        timeout=attempts(PATIENCE, 1200),
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 0, f"{lines[-1:]}: {done.stderr[-3000:]}"
    assert all(0 < right < count for right in json.loads(lines[-1]).values()), lines[-1]


def change_while_it_is_read(monkeypatch: pytest.MonkeyPatch, reading: int, change: Callable[[], None]) -> None:
    """Make the change after three blocks of the first or second reading of a file."""
    monkeypatch.setattr("nvf.models.memory.BLOCK", 64)  # several blocks
    blocks, readings = npy.NpyFile.blocks, itertools.count(1)

    def changed(self: npy.NpyFile, rows: int) -> Iterator[np.ndarray]:
        now = next(readings)
        for number, block in enumerate(blocks(self, rows)):
            yield block
            if (now, number) == (reading, 2):
                change()

    monkeypatch.setattr(npy.NpyFile, "blocks", changed)


CHANGES: dict[str, Callable[[Path, bytes], object]] = {
    "cut": lambda path, content: os.truncate(path, len(content) // 2),
    "grown": lambda path, content: path.write_bytes(content + b"more"),
    "written": lambda path, content: [path.write_bytes(content[::-1]), os.utime(path, ns=(1, 1))],
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize(("mapped", "reading"), [(False, 1), (True, 1), (True, 2)])
@pytest.mark.parametrize("order", ["C", "F"])
def test_a_corpus_that_changes_while_it_is_read_is_refused(
    place: Path, monkeypatch: pytest.MonkeyPatch, change: str, mapped: bool, reading: int, order: str
) -> None:
    path, rows = place / "folder/corpus.npy", place / "rows"
    np.save(path, np.asarray(np.load(path), order=order))
    content = path.read_bytes()
    change_while_it_is_read(monkeypatch, reading, lambda: CHANGES[change](path, content))
    with pytest.raises(InputError, match=r"corpus.npy changed while it was read; start again when nothing writes to"):
        read_memory(path.parent, mapped=rows if mapped else None)
    assert not list(rows.glob("*.rows"))


def test_a_corpus_that_another_takes_the_place_of_is_read_whole(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place / "folder/corpus.npy"
    expected, other = read_memory(path.parent), place / "other.npy"
    np.save(other, np.ones((50, 8)))
    change_while_it_is_read(monkeypatch, 1, lambda: os.replace(other, path))
    assert torch.equal(read_memory(path.parent).rows, expected.rows)


def test_a_change_that_leaves_size_and_time_is_seen_by_its_hash(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = place / "folder/corpus.npy"
    content, time = path.read_bytes(), path.stat().st_mtime_ns

    def change() -> None:
        path.write_bytes(content[:128] + b"\x00\x3c" + content[130:])  # of row 0, which has been read by then
        os.utime(path, ns=(time, time))

    change_while_it_is_read(monkeypatch, 1, change)
    with pytest.raises(InputError, match="the vectors changed while they were read; start again"):
        read_memory(path.parent, mapped=place / "rows")
    assert not list((place / "rows").glob("*.rows"))


def test_many_jobs_write_the_same_rows_once(tmp_path: Path) -> None:
    vectors = torch.randn(2000, 16, generator=torch.Generator().manual_seed(0))
    memories: list[VectorMemory] = []
    threads = [
        threading.Thread(target=lambda: memories.append(VectorMemory(vectors, mapped=tmp_path))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(memories) == 8
    for memory in memories:
        memory.check_unchanged()
        assert torch.equal(memory.rows, memories[0].rows)
