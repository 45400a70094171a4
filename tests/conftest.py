"""What the tests share: small memories, folders of embeddings, and runs as a user makes them."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for the processes that tests start

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from nvf.data.queries import QueryBatch
from nvf.models.attention import SoftAttention
from nvf.models.evidence import FEATURES, Evidence
from nvf.models.memory import VectorMemory, unit
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import EvidenceReranker, Reranker
from nvf.ops.ranks import DEEPEST, ndcg10
from nvf.ops.topk import first_topk
from nvf.train import CONF, train
from programs import command

__all__ = ["command"]  # which tests take from here, as all that they share
torch.set_num_threads(1)
SMALL = ["data.rows=40", "data.dim=8", "queries.val_samples=200", "queries.test_samples=300"]
SMALL_STEPS = ["attention.epochs=2", "attention.steps_per_epoch=3", "reranker.epochs=2", "reranker.steps_per_epoch=3"]


FOLDERS = {"attacks": "attack", "browser": "browser"}  # the mark of all tests in a folder
HERE = str(Path(__file__).parent)
STARTS = {"command", "Program", "Process", "subprocess", "start_processes"}  # the names of what starts a process


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark tests by the folder that they are in, and by whether they start processes."""
    known: dict[FunctionType, bool] = {}
    for item in items:
        for name in (*(FOLDERS.get(part) for part in item.path.parts), "benchmark" * ("benchmark" in item.path.stem)):
            if name:
                item.add_marker(name)
        fixtures = getattr(item, "_fixtureinfo", None)
        used = [each.func for several in fixtures.name2fixturedefs.values() for each in several] if fixtures else []
        if any(_starts(function, known) for function in (getattr(item, "function", None), *used)):
            item.add_marker("process")


def _starts(function: Any, known: dict[FunctionType, bool]) -> bool:
    """Whether a function of the tests, or one that it names, starts a process."""
    if not isinstance(function, FunctionType) or not function.__code__.co_filename.startswith(HERE):
        return False
    if function not in known:
        known[function] = False  # while it is looked into, it may come by itself again
        names = _names(function.__code__)
        others = (function.__globals__.get(name) for name in names)
        known[function] = bool(names & STARTS) or any(_starts(other, known) for other in others)
    return known[function]


def _names(code: CodeType) -> set[str]:
    inner = (constant for constant in code.co_consts if isinstance(constant, CodeType))
    return set(code.co_names).union(*map(_names, inner))


def compose_config(*overrides: str) -> dict[str, Any]:
    """The plain settings that the entry would hand to `train`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config: Any = OmegaConf.to_container(compose("config", list(overrides)), resolve=True)
    return config


@pytest.fixture
def batch(memory: VectorMemory) -> QueryBatch:
    """Queries near their first targets; one in three has a second one."""
    generator = torch.Generator().manual_seed(1)
    targets = torch.stack([torch.randperm(30, generator=generator)[:2] for _ in range(120)])
    queries = memory.rows[targets[:, 0]] + 0.35 * torch.randn(120, 8, generator=generator)
    targets[torch.arange(120) % 3 > 0, 1] = -1
    return QueryBatch(unit(queries), targets)


@pytest.fixture
def run(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Runs the program in this process, in a folder of its own; returns results.json."""

    def _run(*overrides: str, folder: Path = tmp_path / "run") -> dict[str, Any]:
        folder.mkdir(exist_ok=True)
        # One test's stage 1 is none of the next one's business, and most tests do not look at pictures.
        config = compose_config("cache=off", "dashboards=none", *overrides)
        config["trainer"]["enable_progress_bar"] = False
        objective = train(config, folder, started=0.0)
        results = json.loads((folder / "results.json").read_text())
        fitted = results["val"]["pipeline"] or results["val"]["attention"]
        assert objective == fitted["top1" if results["selection"][0]["val_ndcg10"] is None else "ndcg10"]["value"]
        return results

    return _run


def without_time(results: dict[str, Any]) -> dict[str, Any]:
    """All that a run found, without how long it took and where stage 1 came from."""
    left = {name: value for name, value in results.items() if name not in ("seconds", "attention_fitted_by", "config")}
    return json.loads(json.dumps(left))


@pytest.fixture
def memory() -> VectorMemory:
    """Thirty rows of eight dimensions."""
    return VectorMemory.synthetic(rows=30, dim=8, seed=0)


@pytest.fixture
def pipeline(memory: VectorMemory) -> Pipeline:
    """An untrained pipeline whose every weight matters: nothing is left at zero."""
    torch.manual_seed(0)
    pipeline = Pipeline(SoftAttention(memory, beta=5.0), Reranker(8, kind="residual", hidden=(16, 8)), k=4)
    with torch.no_grad():
        for parameter in pipeline.reranker.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    return pipeline.eval()


@pytest.fixture
def decisive(pipeline: Pipeline) -> Pipeline:
    """The pipeline with a reranker that often differs with stage 1, and so wins and loses queries."""
    with torch.no_grad():
        pipeline.reranker.evidence.zero_()  # of what stage 1 thinks
    pipeline.reranker.sharpen(20.0)
    return pipeline


@pytest.fixture
def weighing(memory: VectorMemory) -> Pipeline:
    """A pipeline that weighs evidence, with learned keys and a bias, none of it left at zero."""
    torch.manual_seed(0)
    log, targets = torch.randn(90, 8), torch.randint(30, (90, 1))
    attention = SoftAttention(memory, transform="linear", keys="learned", biased=True, beta=5.0)
    evidence = Evidence.gather(memory, unit(log), targets)
    pipeline = Pipeline(attention, EvidenceReranker(len(FEATURES), hidden=(8, 8)), k=4, evidence=evidence)
    with torch.no_grad():
        for tensor in (*pipeline.parameters(), attention.bias):
            tensor += 0.1 * torch.randn(tensor.shape)
    return pipeline.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of embeddings: 50 items, 400 queries near their items."""
    write_folder(tmp_path / "embeddings")
    return tmp_path / "embeddings"


def write_folder(folder: Path, *, rows: int = 50, queries: int = 400, dim: int = 8, seed: int = 0) -> None:
    """corpus.npy, queries.npy and targets.npy."""
    rng = np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    corpus = rng.standard_normal((rows, dim)).astype(np.float16)
    targets = rng.integers(rows, size=queries)
    np.save(folder / "corpus.npy", corpus)
    np.save(folder / "queries.npy", (corpus[targets] + 0.5 * rng.standard_normal((queries, dim))).astype(np.float32))
    np.save(folder / "targets.npy", targets)


def to_parquet(folder: Path, to: Path, *, ids: list[Any] | None = None) -> None:
    """The same as corpus.parquet and queries.parquet, with ids of its own, or `item 0`, `item 1` and so on."""
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    corpus, queries, targets = (np.load(folder / f"{name}.npy") for name in ("corpus", "queries", "targets"))
    to.mkdir()
    ids = [f"item {row}" for row in range(len(corpus))] if ids is None else ids
    pq.write_table(pa.table({"id": ids, "vector": list(corpus)}), to / "corpus.parquet")
    answers = [ids[row] for row in targets]
    pq.write_table(pa.table({"vector": list(queries), "targets": answers}), to / "queries.parquet")


def to_collection(
    folder: Path, path: Path, *, ids: list[int | str] | None = None, order: list[int] | None = None
) -> None:
    """The corpus as the collection `items` of a local storage; row i is point ids[i], written in any order."""
    client, models = pytest.importorskip("qdrant_client"), pytest.importorskip("qdrant_client.models")
    corpus = np.load(folder / "corpus.npy").astype(np.float32)
    ids = list(range(len(corpus))) if ids is None else ids
    vectors = models.VectorParams(size=corpus.shape[1], distance=models.Distance.DOT)
    storage = client.QdrantClient(path=str(path))
    storage.create_collection("items", vectors_config=vectors)
    rows = range(len(corpus)) if order is None else order
    points = [models.PointStruct(id=ids[row], vector=corpus[row].tolist()) for row in rows]
    storage.upsert("items", points)
    storage.close()


@pytest.fixture
def attempts() -> Callable[[int, int], int]:
    """How many attempts an attack makes: attempts(few, all); `make attack` makes all of them, `make test` a few."""
    return lambda few, all_of_them: all_of_them if os.environ.get("NVF_ATTACK") == "full" else few


def ndcg_of(scores: torch.Tensor, targets: torch.Tensor, gains: torch.Tensor | None = None) -> torch.Tensor:
    """nDCG@10, (B,), of the rows in the order of their scores, (B, N); equal scores rank by row."""
    return ndcg10(first_topk(scores, min(DEEPEST, scores.shape[1])), targets, gains)
