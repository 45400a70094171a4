"""Qdrant collections as the memory: the same as .npy files, point ids for rows; every fault is named."""

import json
import subprocess
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import command, to_collection, to_parquet
from nvf import InputError, Pipeline
from nvf.data.beside import texts_of_rows
from nvf.data.folder import read_memory as read_folder
from nvf.data.folder import read_recorded
from nvf.evaluation.report import table
from programs import PATIENCE

client = pytest.importorskip("qdrant_client")
models = pytest.importorskip("qdrant_client.models")
from nvf.data.qdrant import BATCH, KEY, read_memory, write_vectors  # noqa: E402  # needs qdrant-client

UUIDS = [str(uuid.UUID(int=7919 * row)) for row in range(50)]
RANDOM = np.random.default_rng(0)


@pytest.fixture
def storage(folder: Path, tmp_path: Path) -> Path:
    """A local storage with the folder's corpus as the collection `items`, row i as point i, written out of order."""
    to_collection(folder, tmp_path / "storage", order=RANDOM.permutation(50).tolist())
    return tmp_path / "storage"


def read(storage: Path, /, **settings: Any):
    given = {"path": str(storage), "url": None, "collection": "items", "distance": "cosine"}  # lengths differ
    return read_memory(**{**given, **settings})


def test_a_collection_is_what_the_same_npy_file_is(folder: Path, storage: Path, tmp_path: Path) -> None:
    corpus = np.load(folder / "corpus.npy")
    np.save(folder / "corpus.npy", corpus.astype(np.float32))  # what Qdrant stores
    expected, memory = read_folder(folder), read(storage)
    assert torch.equal(memory.rows, expected.rows)
    assert memory.fingerprint == expected.fingerprint
    assert memory.ids is not None
    assert memory.ids.tolist() == list(range(50))


def test_rows_are_sorted_by_id(folder: Path, tmp_path: Path) -> None:
    ids = RANDOM.permutation(5000)[:50].tolist()
    to_collection(folder, tmp_path / "storage", ids=ids)
    memory = read(tmp_path / "storage")
    assert memory.ids is not None
    assert memory.ids.tolist() == sorted(ids)
    assert torch.equal(memory.rows, read_folder(folder).rows[np.argsort(ids)])


@pytest.mark.parametrize(("kind", "ids"), [("strings", UUIDS), ("both", [*range(25), *UUIDS[25:]])])
def test_ids_may_be_uuids(folder: Path, tmp_path: Path, kind: str, ids: list[int | str]) -> None:
    to_collection(folder, tmp_path / "storage", ids=ids)
    memory = read(tmp_path / "storage")
    assert memory.ids is not None
    assert memory.ids.tolist() == sorted(map(str, ids))
    expected = read_folder(folder).rows
    for row, point in enumerate(memory.ids):
        assert torch.equal(memory.rows[row], expected[list(map(str, ids)).index(point)])


@pytest.mark.parametrize("ids", [[2**64 - 1 - row for row in range(50)], [1, 2**63, *range(2**53, 2**53 + 48)]])
def test_ids_are_all_of_uint64(folder: Path, tmp_path: Path, ids: list[int]) -> None:
    to_collection(folder, tmp_path / "storage", ids=ids)
    memory = read(tmp_path / "storage")
    assert memory.ids is not None
    assert memory.ids.tolist() == sorted(ids)
    order = sorted(range(50), key=lambda row: ids[row])
    assert torch.equal(memory.rows, read_folder(folder).rows[order])
    targets = np.load(folder / "targets.npy")
    np.save(folder / "targets.npy", np.array(ids, dtype=np.uint64)[targets])
    found = read_recorded(folder, memory, seed=0, by_id=True).splits["train"].targets
    np.save(folder / "targets.npy", np.argsort(order)[targets])
    assert torch.equal(found, read_recorded(folder, memory, seed=0).splits["train"].targets)


@pytest.mark.parametrize("spelled", [lambda u: u.hex, lambda u: str(u).upper(), lambda u: u.urn, str])
@pytest.mark.parametrize("stored", [lambda u: u.hex, lambda u: str(u).upper()])
def test_a_uuid_is_one_however_it_is_spelled(
    folder: Path, tmp_path: Path, spelled: Callable[[uuid.UUID], str], stored: Callable[[uuid.UUID], str]
) -> None:
    ids = [uuid.UUID(name) for name in UUIDS]
    to_collection(folder, tmp_path / "storage", ids=[stored(name) for name in ids])
    memory = read(tmp_path / "storage")
    assert memory.ids is not None
    assert memory.ids.tolist() == sorted(UUIDS)
    to_parquet(folder, tmp_path / "queries", ids=[spelled(name) for name in ids])
    recorded = read_recorded(tmp_path / "queries", memory, seed=0, by_id=True)
    expected = read_recorded(folder, read_folder(folder), seed=0)  # UUIDS are in ascending order
    assert torch.equal(recorded.splits["train"].targets, expected.splits["train"].targets)


def with_distance(path: Path, corpus: np.ndarray, distance: str) -> None:
    storage = client.QdrantClient(path=str(path))
    settings = models.VectorParams(size=corpus.shape[1], distance=distance)
    storage.create_collection("items", vectors_config=settings)
    points = [models.PointStruct(id=row, vector=vector.tolist()) for row, vector in enumerate(corpus)]
    storage.upsert("items", points)
    storage.close()


def first_hits(path: Path, queries: np.ndarray) -> list[int]:
    storage = client.QdrantClient(path=str(path))
    found = [storage.query_points("items", query=query.tolist(), limit=1).points[0].id for query in queries]
    storage.close()
    return found


@pytest.mark.parametrize("distance", ["Cosine", "Dot", "Euclid"])
@pytest.mark.parametrize("length", [1, 7])
def test_exact_search_is_the_collection_s(folder: Path, tmp_path: Path, distance: str, length: float) -> None:
    corpus, queries = (np.load(folder / f"{name}.npy").astype(np.float32) for name in ("corpus", "queries"))
    if distance != "Cosine":
        corpus *= length / np.linalg.norm(corpus, axis=1, keepdims=True)
    with_distance(tmp_path / "storage", corpus, distance)
    memory = read(tmp_path / "storage", distance=None)
    found = memory.search(torch.from_numpy(queries), k=1).rows[:, 0].tolist()
    assert found == first_hits(tmp_path / "storage", queries)
    assert memory.distance is None
    assert read(tmp_path / "storage").distance is None


SLOWER = [pytest.param(name, marks=pytest.mark.slow) for name in ("Euclid", "Manhattan")]


@pytest.mark.parametrize("distance", ["Dot", *SLOWER])
def test_a_collection_that_orders_otherwise_is_refused_unless_cosine_is_meant(
    run: Callable[..., dict[str, Any]], folder: Path, tmp_path: Path, distance: str
) -> None:
    corpus = np.load(folder / "corpus.npy").astype(np.float32)
    if distance == "Manhattan":
        corpus /= np.linalg.norm(corpus, axis=1, keepdims=True)
    with_distance(tmp_path / "storage", corpus, distance)
    settings = ["data=qdrant", f"data.path={tmp_path / 'storage'}", "data.collection=items", f"data.dir={folder}"]
    lengths = np.linalg.norm(corpus, axis=1)
    spread = rf"{distance} among lengths from {lengths.min():.4g} to {lengths.max():.4g}"
    with pytest.raises(InputError, match=rf"collection items searches by {spread}.*data.distance=cosine"):
        run(*settings, "trainer=debug")
    found = run(*settings, "trainer=debug", "data.distance=cosine")
    assert found["collection_distance"] == distance
    assert f"it searches by {distance}" in table(found, 40)
    expected = run("data=embeddings", f"data.dir={folder}", "trainer=debug", folder=tmp_path / "expected")
    assert expected["collection_distance"] is None
    assert "it searches by" not in table(expected, 40)
    assert found["test"]["exact"] == expected["test"]["exact"]


@pytest.mark.parametrize("page", [1, 7, 25, 50])
def test_a_collection_is_read_in_pages(storage: Path, monkeypatch: pytest.MonkeyPatch, page: int) -> None:
    expected = read(storage).rows
    monkeypatch.setattr("nvf.data.qdrant.PAGE", page)
    assert torch.equal(read(storage).rows, expected)


def test_queries_name_their_targets_by_point_id(folder: Path, tmp_path: Path) -> None:
    ids = RANDOM.permutation(5000)[:50]
    to_collection(folder, tmp_path / "storage", ids=ids.tolist())
    memory = read(tmp_path / "storage")
    assert memory.ids is not None
    targets = np.load(folder / "targets.npy")
    expected = read_recorded(folder, read_folder(folder), seed=0).splits["train"]
    np.save(folder / "targets.npy", np.stack([ids[targets], np.where(targets % 2, -1, ids[0])], axis=1))
    found = read_recorded(folder, memory, seed=0, by_id=True).splits["train"]
    assert torch.equal(found.queries, expected.queries)
    assert memory.ids[found.targets[:, 0]].tolist() == ids[expected.targets[:, 0]].tolist()
    assert set(memory.ids[found.targets[found.targets[:, 1] >= 0, 1]].tolist()) == {ids[0]}
    np.save(folder / "targets.npy", targets - 60)
    with pytest.raises(InputError, match=r"targets.npy: row \d+: target -\d+ is not an id of the memory, whose first"):
        read_recorded(folder, memory, seed=0, by_id=True)


def with_named_vectors(path: Path) -> None:
    """The collection `named`: vectors a and b, of which point 2 lacks b, `one`: a alone, `multi`: several a point."""
    storage = client.QdrantClient(path=str(path))
    dot = {"distance": models.Distance.DOT}
    a, b = models.VectorParams(size=2, **dot), models.VectorParams(size=3, **dot)
    storage.create_collection("named", vectors_config={"a": a, "b": b})
    both = {"a": [1.0, 2.0], "b": [1.0, 2.0, 2.0]}
    points = [models.PointStruct(id=1, vector=both), models.PointStruct(id=2, vector={"a": [0.0, 3.0]})]
    storage.upsert("named", points)
    storage.create_collection("one", vectors_config={"a": a})
    storage.upsert("one", [models.PointStruct(id=1, vector={"a": [0.0, 2.0]})])
    several = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    storage.create_collection("multi", vectors_config=models.VectorParams(size=2, multivector_config=several, **dot))
    storage.create_collection("empty", vectors_config=a)
    storage.create_collection("zero", vectors_config=a)
    storage.upsert("zero", [models.PointStruct(id=4, vector=[1.0, 0.0]), models.PointStruct(id=9, vector=[0.0, 0.0])])
    storage.close()


def test_a_named_vector_can_be_chosen(tmp_path: Path) -> None:
    with_named_vectors(tmp_path)
    memory = read(tmp_path, collection="named", vector="a")
    torch.testing.assert_close(memory.rows, torch.tensor([[1, 2], [0, 5**0.5]]) / 5**0.5)
    assert read(tmp_path, collection="one").rows.tolist() == [[0.0, 1.0]]


def test_texts_are_in_a_field_of_the_payload(tmp_path: Path) -> None:
    storage = client.QdrantClient(path=str(tmp_path))
    params = models.VectorParams(size=2, distance=models.Distance.COSINE)
    storage.create_collection("items", vectors_config=params)
    texts = {9: "nine", 4: "four", 7: ""}
    vectors = {9: [1.0, 0.0], 4: [0.0, 1.0], 7: [1.0, 1.0]}
    points = [
        models.PointStruct(id=point, vector=vectors[point], payload={"body": texts[point], "n": point})
        for point in texts
    ]
    storage.upsert("items", points)
    storage.close()
    memory = read(tmp_path, text="body")
    assert memory.texts == ["four", "", "nine"]
    assert texts_of_rows(tmp_path, memory) == ["four", "", "nine"]
    assert read(tmp_path).texts is None
    for field in ("n", "none"):
        with pytest.raises(InputError, match=rf"collection items: point 4 has no text in its field '{field}'; give"):
            read(tmp_path, text=field)


FAULTS = {
    "neither": ({"path": None}, r"data.path=None and data.url=None; set one"),
    "both": ({"url": "http://localhost"}, r"data.path=.* and data.url=http://localhost; set one"),
    "no storage": ({"path": "nowhere"}, r"data.path=nowhere cannot be used .*; name the folder"),
    "no collection": (
        {"collection": None},
        r"data.collection=None does not exist; .*: empty, multi, named, one, zero$",
    ),
    "another collection": ({"collection": "moon"}, r"data.collection=moon does not exist; choose one of"),
    "which vector": ({"collection": "named"}, r"data.vector=None is no vector of collection named .*: a, b"),
    "another vector": ({"collection": "named", "vector": "c"}, r"data.vector=c is no vector .*: a, b"),
    "no names": ({"collection": "zero", "vector": "a"}, r"data.vector=a is no vector .*: none with a name"),
    "lacking": ({"collection": "named", "vector": "b"}, r"collection named: point 2 has no vector b; give it one"),
    "another distance": ({"distance": "dot"}, r"data.distance=dot is neither null, .* nor cosine"),
    "several": ({"collection": "multi"}, r"data.vector=None is no vector of collection multi"),
    "empty": ({"collection": "empty"}, r"collection empty is empty; fill it"),
    "zero": ({"collection": "zero"}, r"collection zero: row 1 \(id 9\) is zero"),
    "no server": (
        {"path": None, "url": "http://localhost:1"},
        r"data.url=http://localhost:1 cannot be used .*; check",
    ),
    "no URL": ({"path": None, "url": "http://localhost:port"}, r"data.url=http://localhost:port cannot be used"),
}


@pytest.mark.parametrize(("settings", "message"), FAULTS.values(), ids=FAULTS)
def test_every_fault_is_named(tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    with_named_vectors(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):
        read(tmp_path, **settings)
    assert sorted(tmp_path.rglob("*")) == before
    assert len(read(tmp_path, collection="one")) == 1  # nothing was left open


def test_an_open_storage_is_named(storage: Path) -> None:
    program = (
        f"import qdrant_client; c = qdrant_client.QdrantClient(path={str(storage)!r}); print(1, flush=True); input()"
    )
    other = subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdout is not None
    try:
        other.stdout.readline()
        with pytest.raises(
            InputError, match=r"data.path=.*storage cannot be used \(.*already accessed.*close it elsewhere"
        ):
            read(storage)
    finally:
        other.communicate("\n", timeout=PATIENCE)
    assert len(read(storage)) == 50


@pytest.mark.parametrize("name", ["meta.json", "collection/items/storage.sqlite"])
def test_a_damaged_storage_is_named(storage: Path, name: str) -> None:
    (storage / name).write_bytes(b"nothing of the kind" * 100)
    with pytest.raises(InputError, match=r"data.path=.*storage cannot be used \(.*\); name the folder"):
        read(storage)


def test_without_qdrant_client_the_remedy_is_named(
    run: Callable[..., dict[str, Any]], folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "nvf.data.qdrant")
    monkeypatch.delattr("nvf.data.qdrant")
    monkeypatch.setitem(sys.modules, "qdrant_client", None)
    with pytest.raises(InputError, match=r"needs qdrant-client: pip install -e '\.\[qdrant\]'"):
        run("data=qdrant", f"data.dir={folder}")


def test_a_folder_of_queries_is_asked_for(run: Callable[..., dict[str, Any]], storage: Path) -> None:
    overrides = ["data=qdrant", f"data.path={storage}", "data.collection=items", "trainer=debug"]
    overrides.append("data.distance=cosine")
    with pytest.raises(InputError, match=r"data\.dir is not set"):
        run(*overrides)
    run(*overrides, "queries=noisy", "queries.val_samples=50", "queries.test_samples=50")


@pytest.mark.parametrize("kind", ["npy", "parquet"])
def test_a_run_on_a_collection_equals_the_run_on_npy(
    run: Callable[..., dict[str, Any]], tmp_path: Path, folder: Path, kind: str
) -> None:
    np.save(folder / "corpus.npy", np.load(folder / "corpus.npy").astype(np.float32))
    expected = run("data=embeddings", f"data.dir={folder}", "trainer=debug", folder=tmp_path / "expected")
    ids = [3 * row + 10 for row in range(50)]
    to_collection(folder, tmp_path / "storage", ids=ids)
    queries = folder
    if kind == "parquet":
        queries = tmp_path / "tables"
        to_parquet(folder, queries, ids=ids)
    else:
        np.save(folder / "targets.npy", np.array(ids)[np.load(folder / "targets.npy")])
    (queries / f"corpus.{kind}").unlink()
    storage = [f"data.path={tmp_path / 'storage'}", "data.collection=items", "data.distance=cosine"]
    found = run("data=qdrant", *storage, f"data.dir={queries}", "trainer=debug")
    for key in ("test", "val", "memory"):
        assert found[key] == expected[key]
    hits = Pipeline.load(tmp_path / "run/pipeline").search(np.ones((2, 8), dtype=np.float32), k=3)
    assert hits.ids is not None
    assert hits.ids.tolist() == [[ids[row] for row in rows] for rows in hits.rows.tolist()]


class _Server(BaseHTTPRequestHandler):
    """Answers as a Qdrant server with the collection `items` would, to those who have the key `secret`."""

    info: dict[str, Any]
    points: list[dict[str, Any]]

    def do_GET(self) -> None:
        self._answer({"exists": True} if self.path.endswith("/exists") else self.info)

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path.endswith("/count"):
            return self._answer({"count": len(self.points)})
        if "ids" in asked:
            return self._answer([point for point in self.points if point["id"] in asked["ids"]])
        start = asked.get("offset", 0)
        end = start + asked["limit"]
        page = {"points": self.points[start:end], "next_page_offset": end if end < len(self.points) else None}
        return self._answer(page)

    def _answer(self, result: dict[str, Any]) -> None:
        allowed = self.headers["api-key"] == "secret"
        body = json.dumps({"result": result, "status": "ok", "time": 0} if allowed else "forbidden").encode()
        self.send_response(200 if allowed else 401)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        """Keep the screen."""


@pytest.fixture
def server(folder: Path, storage: Path) -> Iterator[str]:
    """The URL of a server with the folder's corpus."""
    local = client.QdrantClient(path=str(storage))
    _Server.info = local.get_collection("items").model_dump(mode="json")
    local.close()
    corpus = np.load(folder / "corpus.npy").astype(np.float32)
    _Server.points = [{"id": row, "vector": vector.tolist()} for row, vector in enumerate(corpus)]
    http = ThreadingHTTPServer(("127.0.0.1", 0), _Server)
    thread = threading.Thread(target=http.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{http.server_port}"
    http.shutdown()
    thread.join()
    http.server_close()


def test_the_key_of_a_server_is_in_no_file(tmp_path: Path, folder: Path, storage: Path, server: str) -> None:
    overrides = ["data=qdrant", f"data.url={server}", "data.collection=items", f"data.dir={folder}", "trainer=debug"]
    overrides.append("data.distance=cosine")
    done = command(*overrides, cwd=tmp_path, **{KEY: "wrong"})
    assert done.returncode == 1
    assert f"error: data.url={server} cannot be used (UnexpectedResponse: Unexpected Response: 401" in done.stderr
    assert not list(tmp_path.glob("outputs/*"))
    done = command(*overrides, cwd=tmp_path, **{KEY: "secret"})
    assert done.returncode == 0, done.stderr
    (results,) = tmp_path.glob("outputs/*/*/results.json")
    assert json.loads(results.read_text())["memory"] == read(storage).fingerprint
    files = [path for path in results.parent.rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not [path for path in files if b"secret" in path.read_bytes()]


def keys(count: int, size: int = 3) -> np.ndarray:
    return np.random.default_rng(1).standard_normal((count, size)).astype(np.float32)


def write(storage: Path, points: Any, vectors: np.ndarray, /, **settings: Any) -> None:
    given = {"path": str(storage), "url": None, "collection": "named", "vector": "nvf"}
    write_vectors(points, vectors, **{**given, **settings})


def everything(path: Path) -> dict[str, Any]:
    """All collections of a storage: their vectors' settings and their points."""
    storage = client.QdrantClient(path=str(path))
    names = [one.name for one in storage.get_collections().collections]
    found = {
        name: (storage.get_collection(name).config.params, storage.scroll(name, limit=1000, with_vectors=True))
        for name in names
    }
    storage.close()
    return found


def test_points_get_a_vector_and_keep_what_they_have(tmp_path: Path) -> None:
    with_named_vectors(tmp_path)
    write(tmp_path, [2, "1"], keys(2))  # integers among UUIDs are spelled out
    found = {point.id: point.vector for point in everything(tmp_path)["named"][1][0]}
    assert found[1] == {"a": [1.0, 2.0], "b": [1.0, 2.0, 2.0], "nvf": keys(2)[1].tolist()}
    assert found[2] == {"a": [0.0, 3.0], "nvf": keys(2)[0].tolist()}
    write(tmp_path, [1], keys(3)[2:])
    found = {point.id: point.vector for point in everything(tmp_path)["named"][1][0]}
    assert (found[1]["nvf"], found[2]["nvf"]) == (keys(3)[2].tolist(), keys(2)[0].tolist())


def test_a_collection_is_made_in_batches(tmp_path: Path) -> None:
    with_named_vectors(tmp_path)
    write(tmp_path, range(BATCH + 2), keys(BATCH + 2), collection="new")
    params, (points, _) = everything(tmp_path)["new"]
    assert params.vectors == {"nvf": models.VectorParams(size=3, distance=models.Distance.DOT)}
    assert [point.vector["nvf"] for point in points] == keys(BATCH + 2).tolist()


UNFIT = {
    "a point that is not there": ([1, 7], {}, "collection named has no point 7; add it, or name a collection"),
    "a size": ([1], {"vector": "a"}, "vector a of collection named is size=2 .*; name a collection"),
    "a distance": (
        [9],
        {"collection": "cosine", "vector": "a"},
        "vector a of collection cosine is size=3 distance=.*Co",
    ),
    "a name": (["item 3"], {}, "id 'item 3' is no whole number from 0, and no UUID"),
    "a negative number": ([-3], {"collection": "new"}, "id -3 is no whole number from 0, and no UUID"),
    "no storage": ([1], {"path": "nowhere"}, "path=nowhere cannot be used .*; name the folder"),
    "no place": ([1], {"path": None}, "path=None and url=None; set one"),
    # What fails half way.
    "too few vectors": ([1, 2], {}, "path=.* cannot be used"),
    "too few vectors of a new collection": ([*range(BATCH + 1)], {"collection": "new"}, "path=.* cannot be used"),
}


@pytest.mark.parametrize(("points", "settings", "message"), UNFIT.values(), ids=UNFIT)
def test_a_collection_stays_as_it_was_where_the_keys_do_not_fit(
    tmp_path: Path, points: list[Any], settings: dict[str, Any], message: str
) -> None:
    with_named_vectors(tmp_path)
    storage = client.QdrantClient(path=str(tmp_path))
    cosine = {"a": models.VectorParams(size=3, distance=models.Distance.COSINE)}
    storage.create_collection("cosine", vectors_config=cosine)
    storage.upsert("cosine", [models.PointStruct(id=9, vector={"a": [1.0, 2.0, 2.0]})])
    storage.close()
    before = everything(tmp_path)
    with pytest.raises(InputError, match=message):
        write(tmp_path, points, keys(len(points) - ("cannot be used" in message and len(points) > 1)), **settings)
    assert everything(tmp_path) == before


def test_a_collection_without_names_can_be_read_beside_the_keys(folder: Path, storage: Path) -> None:
    expected = read(storage)
    write(storage, range(50), keys(50), collection="items")
    found = read(storage)
    assert torch.equal(found.rows, expected.rows)
    assert found.fingerprint == expected.fingerprint
    torch.testing.assert_close(
        read(storage, vector="nvf").rows, torch.nn.functional.normalize(torch.from_numpy(keys(50)))
    )


def test_a_server_that_cannot_add_a_vector_is_named(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(KEY, "secret")
    remedy = "upgrade server and qdrant-client to 1.18, or name a collection that does not exist yet"
    with pytest.raises(InputError, match=rf"collection items has no vector nvf, and none .*501.*; {remedy}"):
        write_vectors([1, 2], keys(2), path=None, url=server, collection="items", vector="nvf")
    monkeypatch.setenv(KEY, "wrong")
    with pytest.raises(InputError, match=rf"url={server} cannot be used .*401.*, and {KEY} if it asks for a key"):
        write_vectors([1, 2], keys(2), path=None, url=server, collection="items", vector="nvf")
