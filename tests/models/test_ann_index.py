"""The approximate first stage: what an index finds, what it makes of the distribution, its folder, its command."""

import copy
import json
import logging
import math
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from conftest import SMALL, SMALL_STEPS, command, write_folder
from nvf.errors import InputError
from nvf.evaluation.evaluate import evaluate_index
from nvf.models.ann_index import FILE, KINDS, SAMPLE, Index, approximate_topk, build_index, check_index
from nvf.models.attention import SoftAttention
from nvf.models.evidence import FEATURES, Evidence
from nvf.models.memory import VectorMemory, blockwise_topk, unit
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import EvidenceReranker, Reranker
from nvf.models.saved_pipeline import FILES
from nvf.options import parse
from nvf.search import OPTIONS, search
from nvf.statistics import wilson
from nvf.train import CONF
from programs import PATIENCE
from seals import reseal

faiss = pytest.importorskip("faiss")
ROWS, DIM = 600, 12
ALL = {"ivf": {"nlist": 5, "nprobe": 5}, "hnsw": {"ef_search": ROWS}}  # where every row is looked at


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def clustered() -> Pipeline:
    """A pipeline with a bias over rows in clusters: all weights matter, and its keys are one wider than its rows."""
    torch.manual_seed(0)
    memory = VectorMemory.clustered(clusters=ROWS // 10, rows_per_cluster=10, dim=DIM, sigma=0.1, seed=0)
    attention = SoftAttention(memory, transform="linear", keys="learned", biased=True, beta=10.0)
    pipeline = Pipeline(attention, Reranker(DIM, kind="residual", hidden=(16, 8)), k=4)
    assert attention.bias is not None
    with torch.no_grad():
        for tensor in (*attention.transform.parameters(), *pipeline.reranker.parameters(), attention.bias):
            tensor += 0.05 * torch.randn(tensor.shape)
    return pipeline.requires_grad_(False).eval()


class Blind:
    """Stands in for what FAISS made: it finds the best rows but for those it is blind to, and -1 in their place."""

    def __init__(self, keys: torch.Tensor, blind: Callable[[torch.Tensor], torch.Tensor]) -> None:
        self.keys, self.blind, self.ntotal, self.d = keys, blind, *keys.shape
        self.nprobe = 0

    def search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        found = blockwise_topk(torch.from_numpy(queries), self.keys, k)
        return found.scores.numpy(), found.rows.masked_fill(self.blind(found.rows), -1).numpy()


def blind_index(keys: torch.Tensor, blind: Callable[[torch.Tensor], torch.Tensor]) -> Index:
    return Index(Blind(keys, blind), "ivf", {"nlist": 1, "nprobe": 1})


@pytest.mark.parametrize("kind", ALL)
def test_an_index_that_looks_everywhere_searches_exactly(clustered: Pipeline, kind: str) -> None:
    asked = drawn(50, DIM)
    exact = {k: clustered.search(asked, k) for k in (1, 4, 9, ROWS)}
    clustered.index = build_index(clustered.keys(), kind, **ALL[kind])
    for k, expected in exact.items():
        hits = clustered.search(asked, k)
        assert torch.equal(hits.rows, expected.rows)
        torch.testing.assert_close(hits.probabilities, expected.probabilities)


@pytest.mark.parametrize("kind", ALL)
def test_scores_and_rows_are_those_of_one_matmul(clustered: Pipeline, kind: str) -> None:
    keys, asked = clustered.keys(), drawn(20, DIM + 1)
    index = build_index(keys, kind, **ALL[kind])
    assert index is not None
    scores, rows = index.search(asked, 7)
    best = (asked @ keys.T).topk(7)
    assert torch.equal(rows, best.indices)
    torch.testing.assert_close(scores, best.values)
    assert index.search(asked[:0], 7)[1].shape == (0, 7)


def test_flat_is_no_index(clustered: Pipeline) -> None:
    assert build_index(clustered.keys(), "flat") is None


def test_default_settings_find_nearly_all(clustered: Pipeline) -> None:
    asked = clustered.memory.rows + 0.05 * drawn(ROWS, DIM)
    best = clustered.attention.candidates(unit(asked), 4).rows
    for kind in ALL:
        index = build_index(clustered.keys(), kind)
        found = approximate_topk(index, clustered.attention.project(unit(asked)), clustered.keys(), 4).rows
        assert (found.unsqueeze(-1) == best.unsqueeze(1)).any(dim=-1).float().mean() > 0.98


def test_few_cells_find_less_and_say_so(clustered: Pipeline) -> None:
    asked, targets = unit(drawn(300, DIM)), torch.zeros(300, 1, dtype=torch.int64)
    found = {}
    for nprobe in (1, 4, 15):
        clustered.index = build_index(clustered.keys(), "ivf", nlist=15, nprobe=nprobe)
        found[nprobe] = evaluate_index(clustered, asked, targets)["recall"]
        assert 0 <= found[nprobe]["low"] <= found[nprobe]["value"] <= found[nprobe]["high"] <= 1
    assert found[1]["value"] < 0.8 < found[4]["value"] < found[15]["value"] == 1


def test_recall_is_counted_as_by_loop(clustered: Pipeline) -> None:
    asked, k = unit(drawn(40, DIM)), clustered.k
    clustered.index = build_index(clustered.keys(), "ivf", nlist=15, nprobe=1)
    exact = clustered.attention.candidates(asked, k).rows.tolist()
    rows = clustered.index.search(clustered.transform(asked), ROWS)[1]
    assert bool((rows[:, -1] == -1).all())
    shares = [len({*best} & {*found[:k]}) / k for best, found in zip(exact, rows.tolist(), strict=True)]
    assert all(row[2 * k - 1] >= 0 for row in rows.tolist())  # none is completed by exact search
    found = evaluate_index(clustered, asked, clustered.search(asked).rows[:, :2])
    assert found["recall"]["value"] == pytest.approx(np.mean(shares))
    assert found["top1"]["value"] == 1
    assert found["settings"] == {"nlist": 15, "nprobe": 1}
    assert clustered.index is not None


def test_rows_that_are_alike_are_as_good_as_found() -> None:
    memory = VectorMemory(drawn(100, DIM).repeat(10, 1))
    pipeline = Pipeline(SoftAttention(memory), Reranker(DIM), k=4).requires_grad_(False)
    pipeline.index = build_index(pipeline.keys(), "hnsw", ef_search=1000)
    asked = memory.rows[:100]
    found = approximate_topk(pipeline.index, asked, memory.rows, 4)
    equal = found.scores.diff(dim=-1) == 0
    assert bool(equal.any())
    assert bool((found.rows.diff(dim=-1)[equal] > 0).all())
    assert evaluate_index(pipeline, asked, torch.arange(100).unsqueeze(-1))["recall"]["value"] == 1


def test_queries_of_which_too_little_is_found_are_answered_exactly(clustered: Pipeline) -> None:
    asked = drawn(50, DIM)
    exact = clustered.search(asked, 6)
    assert 0 < int((exact.rows % 7 == 0).any(dim=-1).sum()) < 50
    for blind in (lambda rows: rows % 7 == 0, lambda rows: rows >= 0):
        clustered.index = blind_index(clustered.keys(), blind)
        hits = clustered.search(asked, 6)
        assert torch.equal(hits.rows, exact.rows)
        torch.testing.assert_close(hits.probabilities, exact.probabilities)


@pytest.mark.parametrize("size", [1, 7, 64])
def test_the_estimate_of_the_whole_is_unbiased(size: int) -> None:
    """Over many samples, the sum of exp(score) is the exact one, whichever rows were found."""
    keys, asked, k = drawn(80, 6), drawn(3, 6, seed=1), 5
    exact = blockwise_topk(asked, keys, k, logsumexp=True)
    index = blind_index(keys, lambda rows: rows < 0)
    sums = []
    for seed in range(3000):
        drawn_rows = torch.randperm(80, generator=torch.Generator().manual_seed(seed))[: size + k]
        fresh = copy.copy(index)  # with a sample of its own
        fresh.sample = drawn_rows.sort().values
        sums.append(approximate_topk(fresh, asked, keys, k).logsumexp.double().exp())
    estimates = torch.stack(sums)  # (seeds, B)
    error = estimates.std(dim=0) / math.sqrt(len(estimates))
    assert bool(((estimates.mean(dim=0) - exact.logsumexp.double().exp()).abs() < 4 * error).all())
    assert bool((error > 0).all())


def test_a_sample_of_everything_is_exact_and_a_large_memory_is_sampled() -> None:
    for rows in (SAMPLE, 3 * SAMPLE):
        keys, asked = drawn(rows, 4), drawn(5, 4, seed=1)
        exact = blockwise_topk(asked, keys, 3, logsumexp=True)
        found = approximate_topk(blind_index(keys, lambda rows: rows < 0), asked, keys, 3)
        assert torch.equal(found.rows, exact.rows)
        torch.testing.assert_close(found.scores, exact.scores)
        close = 1e-5 if rows == SAMPLE else 0.1
        torch.testing.assert_close(found.logsumexp, exact.logsumexp, atol=close, rtol=0)
        assert (rows == SAMPLE) == torch.allclose(found.logsumexp, exact.logsumexp, atol=1e-5)


def test_one_query_gets_one_answer(clustered: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("nvf.models.ann_index.SAMPLE", 100)
    clustered.index = build_index(clustered.keys(), "ivf", nlist=15, nprobe=4)
    asked = drawn(30, DIM)
    whole, again = clustered.search(asked), clustered.search(asked)
    assert torch.equal(whole.probabilities, again.probabilities)
    monkeypatch.setattr("nvf.models.ann_index.GATHERED", 100)  # a query at a time
    parts = clustered.search(asked)
    assert torch.equal(whole.rows, parts.rows)
    torch.testing.assert_close(whole.probabilities, parts.probabilities)
    assert not torch.allclose(whole.probabilities, _exactly(clustered, asked))


def _exactly(pipeline: Pipeline, asked: torch.Tensor) -> torch.Tensor:
    index, pipeline.index = pipeline.index, None
    try:
        return pipeline.search(asked).probabilities
    finally:
        pipeline.index = index


def test_logits_are_the_keys_own_whatever_the_index_holds(clustered: Pipeline) -> None:
    """An index of keys that have moved since finds other rows, and scores those it finds as they are."""
    stale = clustered.keys() + 0.1 * drawn(ROWS, DIM + 1)
    clustered.index = build_index(stale, "ivf", nlist=5, nprobe=5)
    asked = unit(drawn(20, DIM))
    found = approximate_topk(clustered.index, clustered.attention.project(asked), clustered.keys(), 5)
    torch.testing.assert_close(found.scores, clustered.attention(asked).gather(-1, found.rows))
    assert bool((found.scores.diff(dim=-1) <= 0).all())


def test_keys_of_half_precision_are_indexed(clustered: Pipeline) -> None:
    half = clustered.keys().bfloat16()
    index = build_index(half, "hnsw", ef_search=ROWS)
    asked = drawn(20, DIM + 1)
    found = approximate_topk(index, asked, half, 5)
    best = (asked @ half.float().T).topk(5)
    torch.testing.assert_close(found.scores, best.values)
    assert found.scores.dtype == torch.float32


def test_training_and_the_distribution_stay_exact(clustered: Pipeline) -> None:
    before = clustered(drawn(5, DIM)).log_probs
    clustered.index = blind_index(clustered.keys(), lambda rows: rows >= 0)
    assert torch.equal(clustered(drawn(5, DIM)).log_probs, before)
    assert set(clustered.state_dict()) == {name for name in clustered.state_dict() if "index" not in name}


def test_an_index_of_something_else_is_refused(clustered: Pipeline) -> None:
    for keys in (clustered.keys()[:-1], clustered.memory.rows):
        clustered.index = build_index(keys, "ivf")
        with pytest.raises(InputError, match=r"the index has \d+ keys of width \d+, but the pipeline 600 of width 13"):
            clustered.search(drawn(2, DIM))


def test_building_again_gives_the_same(clustered: Pipeline, tmp_path: Path) -> None:
    assert torch.get_num_threads() == 1  # conftest's; with more, the graph of hnsw varies
    for kind in ALL:
        hashes = {build_index(clustered.keys(), kind).write(tmp_path / "index")["sha256"] for _ in range(2)}
        assert len(hashes) == 1


@pytest.mark.parametrize("order", ["torch, faiss", "faiss, torch"])
def test_faiss_and_torch_share_a_process_in_either_order(order: str) -> None:
    """Back and forth, with as many threads as torch has in both."""
    use = (
        f"import {order}; import torch; from nvf.models.ann_index import build_index; torch.set_num_threads(1);"
        "keys = torch.randn(3000, 32); index = build_index(keys, 'hnsw', ef_search=500); q = torch.randn(200, 32);"
        "torch.set_num_threads(3);"
        "same = [torch.equal(index.search(q, 1)[1], (q @ keys.T).topk(1).indices) for _ in range(20)];"
        "print(all(same), faiss.omp_get_max_threads(), torch.get_num_threads())"
    )
    done = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True, timeout=PATIENCE)
    assert (done.returncode, done.stdout, done.stderr) == (0, "True 3 3\n", "")


def test_evidence_is_weighed_with_the_estimate(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    memory = VectorMemory.synthetic(rows=300, dim=8, seed=0)
    evidence = Evidence.gather(memory, unit(torch.randn(90, 8)), torch.randint(300, (90, 1)))
    pipeline = Pipeline(SoftAttention(memory), EvidenceReranker(len(FEATURES), hidden=(8, 8)), k=4, evidence=evidence)
    pipeline.requires_grad_(False).eval()
    asked = drawn(20, 8)
    exact = pipeline.search(asked)
    pipeline.index = build_index(pipeline.keys(), "ivf", nlist=4, nprobe=4)
    torch.testing.assert_close(pipeline.search(asked).probabilities, exact.probabilities)
    monkeypatch.setattr("nvf.models.ann_index.SAMPLE", 150)
    pipeline.index = build_index(pipeline.keys(), "ivf", nlist=4, nprobe=4)
    estimated = pipeline.search(asked)
    assert not torch.allclose(estimated.probabilities, exact.probabilities)
    torch.testing.assert_close(estimated.probabilities, exact.probabilities, atol=0.1, rtol=0)


def test_a_copy_has_its_index(clustered: Pipeline) -> None:
    clustered.index = build_index(clustered.keys(), "hnsw")
    twin = copy.deepcopy(clustered)
    assert twin.index is not clustered.index
    assert torch.equal(twin.search(drawn(9, DIM)).rows, clustered.search(drawn(9, DIM)).rows)


BAD_SETTINGS = [
    ({"kind": "tree"}, "index.kind=tree is unknown; choose one of flat, ivf, hnsw"),
    ({"kind": "flat", "m": 3}, "index.m is no setting of index=flat; its settings: none"),
    ({"kind": "ivf", "ef_search": 3}, "index.ef_search is no setting of index=ivf; its settings: nlist, nprobe"),
    ({"kind": "ivf", "nprobe": 0}, "index.nprobe=0 is not a whole number of at least 1; 64 is the default"),
    ({"kind": "ivf", "nprobe": None}, "index.nprobe=None is not a whole number"),
    ({"kind": "ivf", "nlist": 2.5}, "index.nlist=2.5 is not a whole number of at least 1; null is the default"),
    ({"kind": "ivf", "nlist": 601}, "index.nlist=601 exceeds the memory's 600 rows; lower it, or give null"),
    ({"kind": "hnsw", "m": 1}, "index.m=1 is not a whole number of at least 2 and below 513; 32 is the default"),
    ({"kind": "hnsw", "m": 513}, "index.m=513 is not a whole number of at least 2 and below 513"),
    ({"kind": "hnsw", "ef_construction": "many"}, "index.ef_construction=many is not a whole number"),
    ({"kind": "hnsw", "ef_search": True}, "index.ef_search=True is not a whole number"),
]


@pytest.mark.parametrize(("given", "message"), BAD_SETTINGS, ids=[m for _, m in BAD_SETTINGS])
def test_bad_settings_are_refused(clustered: Pipeline, given: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        build_index(clustered.keys(), **given)


def test_the_shipped_settings_are_those_of_the_library() -> None:
    shipped = {path.stem: yaml.safe_load(path.read_text()) for path in (CONF / "index").glob("*.yaml")}
    assert shipped == {kind: {"kind": kind, **settings} for kind, settings in KINDS.items()}


@pytest.mark.parametrize("rows", [1, 2, 40, 5000])
def test_any_number_of_rows_can_be_indexed(rows: int, capfd: pytest.CaptureFixture[str]) -> None:
    keys = unit(drawn(rows, 4))
    for kind in ALL:
        index = build_index(keys, kind)
        assert len(index) == rows
        found = approximate_topk(index, keys[:3], keys, 1)
        assert found.rows[:, 0].tolist() == list(range(min(3, rows)))
    build_index(keys, "ivf", nlist=rows)
    assert capfd.readouterr() == ("", "")  # FAISS has nothing to warn of


@pytest.fixture
def place(clustered: Pipeline, tmp_path: Path) -> Path:
    """A folder with a pipeline that has an index, and the rows it is asked for."""
    clustered.index = build_index(clustered.keys(), "hnsw", ef_search=50)
    clustered.save(tmp_path / "pipeline")
    np.save(tmp_path / "q.npy", drawn(30, DIM).numpy())
    return tmp_path


@pytest.mark.parametrize("kind", ALL)
def test_a_saved_pipeline_searches_with_its_index(clustered: Pipeline, tmp_path: Path, kind: str) -> None:
    clustered.index = build_index(clustered.keys(), kind)
    clustered.save(tmp_path / "pipeline")
    assert {path.name for path in (tmp_path / "pipeline").iterdir()} == {*FILES, FILE}
    loaded = Pipeline.load(tmp_path / "pipeline")
    assert loaded.index is not None
    assert (loaded.index.kind, loaded.index.settings) == (kind, clustered.index.settings)
    mine, theirs = clustered.search(drawn(30, DIM)), loaded.search(drawn(30, DIM))
    assert torch.equal(mine.rows, theirs.rows)
    assert torch.equal(mine.probabilities, theirs.probabilities)
    for ours, again in zip(
        clustered.index.search(drawn(30, 13), 9), loaded.index.search(drawn(30, 13), 9), strict=True
    ):
        assert torch.equal(ours, again)
    assert Pipeline.load(tmp_path / "pipeline", index=False).index is None
    loaded.index = None
    loaded.save(tmp_path / "pipeline")
    assert {path.name for path in (tmp_path / "pipeline").iterdir()} == {*FILES}
    assert Pipeline.load(tmp_path / "pipeline").index is None


def test_settings_of_the_search_are_those_in_the_folder(place: Path) -> None:
    edit(place, settings={"m": 32, "ef_construction": 200, "ef_search": 77})
    index = Pipeline.load(place / "pipeline").index
    assert index is not None
    assert index._made.hnsw.efSearch == index.settings["ef_search"] == 77


def test_without_faiss_a_folder_is_searched_exactly(
    place: Path, clustered: Pipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with caplog.at_level(logging.WARNING):
        loaded = Pipeline.load(place / "pipeline")
    assert loaded.index is None
    (record,) = caplog.records
    said = r"index\.safetensors: searched exactly instead: .*pip install -e '\.\[faiss\]'"
    assert re.search(said, record.getMessage())
    clustered.index = None
    assert torch.equal(loaded.search(drawn(9, DIM)).rows, clustered.search(drawn(9, DIM)).rows)
    with pytest.raises(
        InputError, match=r"needs FAISS.*; pip install -e '\.\[faiss\]'.* or search exactly with index=flat"
    ):
        build_index(clustered.keys(), "hnsw")
    assert build_index(clustered.keys(), "flat") is None


def edit(place: Path, **changes: Any) -> None:
    """Change what config.json says of the index, and make the hashes right again."""
    config = json.loads((place / "pipeline/config.json").read_text())
    config["index"].update(changes)
    (place / "pipeline/config.json").write_text(json.dumps(config))
    reseal(place / "pipeline")


def change(place: Path, name: str, at: int, value: int) -> None:
    """Change one number of a tensor, and make the hash right again."""
    tensors = load_file(place / "pipeline" / FILE)
    tensors[name][at] = value
    put(place, tensors)


def put(place: Path, tensors: dict[str, torch.Tensor]) -> None:
    save_file(tensors, place / "pipeline" / FILE)
    reseal(place / "pipeline")


def flip(place: Path) -> None:
    data = bytearray((place / "pipeline" / FILE).read_bytes())
    data[len(data) // 2] ^= 1
    (place / "pipeline" / FILE).write_bytes(data)


def write(place: Path, data: bytes) -> None:
    (place / "pipeline" / FILE).write_bytes(data)
    reseal(place / "pipeline")


def high_and_low(place: Path) -> tuple[int, int, int]:
    """The place of a neighbour on the second level, a key on it, and one that is not."""
    levels = load_file(place / "pipeline" / FILE)["levels"]
    high, low = int((levels > 1).nonzero()[0]), int((levels == 1).nonzero()[0])
    return 64 * (high + 1) + 32 * int((levels[:high] - 1).sum()), high, low


BROKEN = {
    "no file": (lambda p: (p / "pipeline" / FILE).unlink(), f"{FILE} is missing"),
    "a bit": (flip, f"{FILE} is damaged, or of another pipeline"),
    "nonsense": (lambda p: write(p, b"nonsense"), f"{FILE} does not fit the pipeline (SafetensorError: "),
    "ivf": (lambda p: put(p, {"cells": torch.zeros(ROWS)}), "levels is missing, but should be (600,) torch.int32"),
    "few": (
        lambda p: build_index(drawn(9, DIM + 1), "hnsw").write(p / "pipeline" / FILE) and reseal(p / "pipeline"),
        "levels is (9,) torch.int32, but should be (600,) torch.int32",
    ),
    "level": (lambda p: change(p, "levels", 3, 99), "levels has 1 to 99, but should have 1 to "),
    "more levels": (lambda p: change(p, "levels", 3, 4), "neighbors is ("),
    "far": (lambda p: change(p, "neighbors", 7, ROWS), "neighbors has -1 to 600, but should have -1 to 599"),
    "negative": (lambda p: change(p, "neighbors", 7, -2), "neighbors has -2 to 599"),
    "below": (lambda p: change(p, "neighbors", high_and_low(p)[0], high_and_low(p)[2]), "neighbors of level 1 are not"),
    "entry": (lambda p: change(p, "entry", 0, high_and_low(p)[2]), "entry is no key of the highest level"),
    "kind": (lambda p: edit(p, kind="tree"), "kind 'tree' with settings"),
    "settings": (lambda p: edit(p, settings={"m": 3}), "kind 'hnsw' with settings {'m': 3} is unknown"),
    "list": (lambda p: edit(p, settings=[1]), "kind 'hnsw' with settings [1] is unknown"),
    "number": (
        lambda p: edit(p, settings={"m": 32, "ef_construction": 200, "ef_search": -1}),
        "index.ef_search=-1 is not a whole number",
    ),
}


@pytest.mark.parametrize(("break_it", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_index_is_refused_and_can_be_left_out(
    place: Path, break_it: Callable[[Path], None], message: str
) -> None:
    break_it(place)
    with pytest.raises(InputError, match=re.escape(message)) as refused:
        Pipeline.load(place / "pipeline")
    assert "save the pipeline again" in str(refused.value) or "is the default" in str(refused.value)
    assert Pipeline.load(place / "pipeline", index=False).index is None


def ask(place: Path, **given: Any) -> str:
    settings = {"pipeline": place / "pipeline", "queries": place / "q.npy", "output": place / "a.npy"}
    return search(
        **parse([f"{name}={value}" for name, value in {**settings, "device": "cpu", **given}.items()], OPTIONS)
    )


def test_the_search_command_uses_the_index_unless_told(place: Path, clustered: Pipeline) -> None:
    for given, kind in (({}, "hnsw"), ({"index": "null"}, "hnsw"), ({"index": "flat"}, None)):
        line = ask(place, **given)
        assert ("index=hnsw)" in line) == (kind is not None)
        if kind is None:
            clustered.index = None
        hits = clustered.search(drawn(30, DIM))
        assert np.load(place / "a.npy")["rows"].tolist() == hits.rows.tolist()


def test_the_search_command_builds_none(place: Path) -> None:
    with pytest.raises(InputError, match="index=ivf is neither null nor flat; others are built in training"):
        ask(place, index="ivf")


def test_a_user_without_faiss_types_one_line(place: Path) -> None:
    (place / "faiss.py").write_text("raise ImportError('no such thing')")
    words = ["pipeline=pipeline", "queries=q.npy", "output=a.jsonl"]
    done = command(*words, module="nvf.search", cwd=place, PYTHONPATH=str(place))
    assert done.returncode == 0
    assert "index=hnsw" not in done.stdout
    assert done.stderr.count("\n") == 1
    assert "pip install -e '.[faiss]'" in done.stderr
    done = command(*words, "index=flat", module="nvf.search", cwd=place, PYTHONPATH=str(place))
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("kind", ALL)
def test_a_run_builds_measures_and_saves(
    run: Callable[..., dict[str, Any]], kind: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.INFO, logger="nvf"):
        results = run(f"index={kind}", *SMALL, *SMALL_STEPS)
    found = results["index"]
    assert set(found) == {"kind", "settings", "recall", "top1", "queries_per_second", "build_seconds"}
    assert found["kind"] == kind
    assert found["settings"] == ({"nlist": 1, "nprobe": 1} if kind == "ivf" else KINDS["hnsw"])
    assert found["recall"] == wilson(300, 300)  # all 300 test queries
    assert found["top1"]["value"] == results["test"]["pipeline"]["top1"]["value"]
    assert min(found["build_seconds"], *found["queries_per_second"].values()) > 0
    line = rf"index {kind}\s+recall of the exact 5 candidates\s+100\.0 \(98\.7-100\.0\), pipeline\s+Top-1\s+[\d.]+\s+\("
    assert re.search(line, caplog.text)
    assert re.search(r"\n {26}[\d,.]+ queries/s, searched exactly [\d,.]+\n", caplog.text)
    loaded = Pipeline.load(tmp_path / "run/pipeline")
    assert loaded.index is not None
    assert loaded.index.kind == kind


def test_a_run_on_a_log_of_queries_has_an_index(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    write_folder(tmp_path / "folder", rows=200)
    steps = ["attention.epochs=1", "reranker.epochs=1", "k=3", "index.nlist=4", "index.nprobe=4"]
    results = run("data=embeddings", f"data.dir={tmp_path / 'folder'}", "index=ivf", *steps)
    assert results["index"]["recall"]["value"] == 1
    assert results["index"]["top1"]["value"] == results["test"]["pipeline"]["top1"]["value"]


def test_a_run_is_exact_unless_told(run: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    assert run(*SMALL, *SMALL_STEPS)["index"] is None
    assert not (tmp_path / "run/pipeline" / FILE).exists()


REFUSED = [
    (["index=ivf", "index.nlist=41"], "index.nlist=41 exceeds the memory's 40 rows"),
    (["index=hnsw", "index.m=1"], "index.m=1 is not a whole number of at least 2"),
    (["index=hnsw", "+index.nprobe=3"], "index.nprobe is no setting of index=hnsw"),
    (["index=hnsw", "stage=attention"], "index=hnsw is for the search of a pipeline, which stage=attention does not"),
]


@pytest.mark.parametrize(("overrides", "message"), REFUSED, ids=[" ".join(o) for o, _ in REFUSED])
def test_a_run_refuses_before_any_work(
    run: Callable[..., dict[str, Any]], tmp_path: Path, overrides: list[str], message: str
) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(message)}"):
        run(*SMALL, *overrides)
    assert list((tmp_path / "run").iterdir()) == []


def test_a_run_without_faiss_refuses_before_any_work(
    run: Callable[..., dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[faiss\]'"):
        run(*SMALL, "index=hnsw")
    assert list((tmp_path / "run").iterdir()) == []
    check_index({"kind": "flat"}, rows=1, fits=["attention"])
