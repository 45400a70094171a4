"""Every door of a folder of embeddings, its answer next to a dumber one; by itself, a harness that fuzzes one of them.

    pip install --target /tmp/atheris atheris==3.0.0
    PYTHONPATH=/tmp/atheris:tests:tests/attacks python tests/attacks/fuzz_folder.py corpus.npy -max_total_time=600

What it finds is left as crash-*, of a copy of the named file; keep it small, as a case of test_folder_files.py.
"""

import inspect
import json
import logging
import pickle
import resource
import sqlite3
import sys
import tempfile
import warnings
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

import numpy as np
import torch
from mutate import mutations

from nvf.data.beside import text_lines
from nvf.data.folder import COLUMNS, read_memory, read_recorded
from nvf.data.search_files import open_queries
from nvf.errors import InputError
from nvf.files import npy
from nvf.models.memory import VectorMemory

ROOM = 2**30  # bytes that a reader may take beyond what the process has
FOLLOWED = {
    "numpy.lib._format_impl",
    "json.decoder",
    "pyarrow.parquet.core",
    "qdrant_client.local.local_collection",
} | {f"nvf.files.{name}" for name in ("npy", "ids", "vectors")}
FOLLOWED |= {f"nvf.data.{name}" for name in ("folder", "parquet", "qdrant", "qdrant_points")} | {"nvf.models.memory"}


def unit(vectors: np.ndarray) -> np.ndarray:
    wide = vectors.astype(np.float64)
    wide /= np.abs(wide).max(axis=1, keepdims=True)
    return wide / np.linalg.norm(wide, axis=1, keepdims=True)


def read_corpus(path: Path) -> None:
    rows = read_memory(path.parent).rows.numpy()
    np.testing.assert_allclose(rows, unit(np.load(path, allow_pickle=False)), atol=1e-6)


def read_queries(path: Path) -> None:
    file = open_queries(path, "vector", dim=8)
    found = np.concatenate([*file.blocks(7)])
    read_recorded(path.parent, read_memory(path.parent), seed=0)
    expected = np.load(path, allow_pickle=False)
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_array_equal(file.read(), expected)


def read_targets(path: Path) -> None:
    found = npy.NpyFile(path, "targets").read()
    read_recorded(path.parent, read_memory(path.parent), seed=0)
    np.testing.assert_array_equal(found, np.load(path, allow_pickle=False))


def read_ids(path: Path) -> None:
    ids = read_memory(path.parent).ids
    assert ids is not None
    assert ids.tolist() == json.loads(path.read_text())


def read_texts(path: Path) -> None:
    texts = text_lines(path, 50)
    lines = path.read_text(encoding="utf-8-sig").split("\n")
    assert texts == [json.loads(line)["text"] for line in lines if line.strip()]


def read_corpus_table(path: Path) -> None:
    import pyarrow.parquet as pq

    memory = read_memory(path.parent)
    with pq.ParquetFile(path) as file:
        table = file.read(columns=["id", "vector"])
    assert memory.ids is not None
    assert memory.ids.tolist() == table.column("id").to_pylist()
    np.testing.assert_allclose(memory.rows.numpy(), unit(np.array(table.column("vector").to_pylist())), atol=1e-6)


def read_queries_table(path: Path) -> None:
    read_recorded(path.parent, read_memory(path.parent), seed=0, columns=COLUMNS)
    assert sum(map(len, open_queries(path, "vector", dim=8).blocks(7))) > 0


def read_storage(path: Path) -> None:
    from nvf.data import qdrant

    memory: VectorMemory = qdrant.read_memory(
        path=str(path.parents[2]), url=None, collection="items", distance="cosine"
    )
    with closing(sqlite3.connect(path)) as database:  # NVF has found that nothing in it runs
        points = [pickle.loads(point) for (point,) in database.execute("SELECT point FROM points ORDER BY rowid")]
    vectors = {point.id: point.vector for point in points}
    assert memory.ids is not None
    assert memory.ids.tolist() == sorted(vectors)
    expected = np.array([vectors[row] for row in sorted(vectors)], dtype=np.float32)
    np.testing.assert_allclose(memory.rows.numpy(), unit(expected), atol=1e-6)


def read_meta(path: Path) -> None:
    read_storage(path.parent / "collection/items/storage.sqlite")


DOORS: dict[str, Callable[[Path], None]] = {
    "folder/corpus.npy": read_corpus,
    "folder/queries.npy": read_queries,
    "folder/targets.npy": read_targets,
    "folder/ids.json": read_ids,
    "folder/texts.jsonl": read_texts,
    "tables/corpus.parquet": read_corpus_table,
    "tables/queries.parquet": read_queries_table,
    "storage/collection/items/storage.sqlite": read_storage,
    "storage/meta.json": read_meta,
}


def write_all(place: Path) -> None:
    """A good file for each door."""
    from conftest import to_collection, to_parquet, write_folder

    given = place / "folder"
    write_folder(given)
    to_parquet(given, place / "tables")
    to_collection(given, place / "storage")
    (given / "ids.json").write_text(json.dumps([f"item {row}" for row in range(50)]))
    (given / "texts.jsonl").write_text("".join(json.dumps({"text": f"text {row}"}) + "\n" for row in range(50)))


def limit_memory() -> None:
    """Have whatever takes much more memory than the process has now fail."""
    if Path("/proc/self/statm").exists():
        taken = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (taken + ROOM, taken + ROOM))


def read_copies(place: Path, name: str, count: int) -> int:
    """Read so many damaged copies of a file; says which on stdout, in case that it is the last; how many were right."""
    good = (place / name).read_bytes()
    right = 0
    for number, copy in enumerate(mutations(good, count, seed=0)):
        print(name, number, flush=True)
        (place / name).write_bytes(copy)
        try:
            DOORS[name](place / name)
            right += 1
        except InputError:
            pass
    (place / name).write_bytes(good)
    return right


def quiet() -> None:
    logging.disable()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)


def fuzz(name: str, arguments: list[str]) -> None:
    """Fuzz the door whose file has this name until something other than an InputError comes of it."""
    import atheris

    place = Path(tempfile.mkdtemp())
    write_all(place)
    (full,) = (door for door in DOORS if door.endswith(f"/{name}"))
    seeds = place / "seeds"
    seeds.mkdir()
    for number, copy in enumerate([(place / full).read_bytes(), *mutations((place / full).read_bytes(), 50, seed=1)]):
        (seeds / str(number)).write_bytes(copy)
    quiet()

    def one(data: bytes) -> None:
        (place / full).write_bytes(data)
        with suppress(InputError):
            DOORS[full](place / full)

    followed = [module for known, module in sys.modules.items() if known in FOLLOWED]
    kinds = [kind for module in followed for _, kind in inspect.getmembers(module, inspect.isclass)]
    followed += [kind for kind in kinds if kind.__module__ in FOLLOWED]
    for _, function in (pair for owner in followed for pair in inspect.getmembers(owner, inspect.isfunction)):
        atheris.instrument_func(function)
    atheris.Setup([sys.argv[0], *arguments, "-timeout=60", "-rss_limit_mb=4096", str(seeds)], one)
    atheris.Fuzz()


if __name__ == "__main__":
    if sys.argv[1] == "--copies":
        quiet()
        DOORS["folder/corpus.npy"](Path(sys.argv[2]) / "folder/corpus.npy")  # what is imported late is there
        limit_memory()
        print(json.dumps({name: read_copies(Path(sys.argv[2]), name, int(sys.argv[3])) for name in sys.argv[4:]}))
    else:
        fuzz(sys.argv[1], sys.argv[2:])
