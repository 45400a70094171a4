"""Candidates of another engine, against a loop over queries, and against the pipeline's own search."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nvf.errors import InputError
from nvf.files.ids import checked_ids
from nvf.models import pipeline_search
from nvf.models.ann_index import build_index
from nvf.models.attention import SoftAttention
from nvf.models.evidence import FEATURES, Evidence
from nvf.models.memory import VectorMemory, unit
from nvf.models.pipeline import Pipeline
from nvf.models.pipeline_search import Hits
from nvf.models.reranker import EvidenceReranker
from nvf.models.words import Words
from nvf.ops.products import QUERY_BLOCK
from nvf.ops.topk import TopK

COUNT = 7


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_lists(count: int = COUNT, rows: int = 30) -> list[list[int]]:
    """Candidates of each query, one at least, fewer or more than the pipeline's four."""
    rng = np.random.default_rng(0)
    sizes = [1, 2, 4, rows, 3, *rng.integers(1, 13, size=count)][:count]
    return [rng.permutation(rows)[:size].tolist() for size in sizes]


@pytest.fixture(params=["pipeline", "weighing"])
def model(request: pytest.FixtureRequest) -> Pipeline:
    """A pipeline with k = 4 that weighs evidence, and one that does not."""
    return request.getfixturevalue(request.param).requires_grad_(False)


def by_loop(pipeline: Pipeline, asked: Tensor, each: list[list[int]]) -> tuple[list[list[int]], list[list[float]]]:
    """Rows and shares of each query's candidates, put in stage 1's order and scored on their own."""
    found: tuple[list[list[int]], list[list[float]]] = ([], [])
    for query, some in zip(unit(asked), each, strict=True):
        logits = pipeline(query.unsqueeze(0)).logits
        rows = torch.tensor([sorted(some, key=lambda row: (-float(logits[0, row]), row))])
        top = TopK(logits.gather(-1, rows), rows, logits.logsumexp(dim=-1))
        shares = pipeline.scores_of(query.unsqueeze(0), top)[0].softmax(dim=-1)
        best = shares.argsort(descending=True)
        found[0].append(rows[0, best].tolist())
        found[1].append(shares[best].tolist())
    return found


def same(hits: Hits, expected: tuple[list[list[int]], list[list[float]]]) -> None:
    width = max(map(len, expected[0]), default=0)
    assert tuple(hits.rows.shape) == tuple(hits.probabilities.shape) == (len(expected[0]), width)
    assert hits.rows.tolist() == [[*rows, *[-1] * (width - len(rows))] for rows in expected[0]]
    for found, shares in zip(hits.probabilities.tolist(), expected[1], strict=True):
        assert found == pytest.approx([*shares, *[0.0] * (width - len(shares))], rel=1e-4, abs=1e-6)


def padded(each: list[list[int]]) -> np.ndarray:
    return np.array([[*some, *[-1] * (max(map(len, each)) - len(some))] for some in each])


def test_candidates_are_scored_and_ordered_as_by_loop(model: Pipeline) -> None:
    asked, each = drawn(COUNT, 8), some_lists()
    expected = by_loop(model, asked, each)
    forms = (each, [np.array(some) for some in each], [[None, *some, -1] for some in each], padded(each))
    for form in (*forms, torch.from_numpy(padded(each)), [some[::-1] for some in each]):
        same(model.rerank(asked, form), expected)
    hits = model.rerank(3 * asked.double().numpy(), each)
    assert isinstance(hits.rows, np.ndarray)
    assert hits.ids is None
    same(hits, expected)


@pytest.mark.parametrize("k", [4, 9])
def test_the_candidates_of_a_search_keep_its_order_and_their_shares(model: Pipeline, k: int) -> None:
    asked = drawn(50, 8)
    model.k = k
    found = model.search(asked)
    hits = model.rerank(asked, found.rows)
    assert torch.equal(hits.rows, found.rows)
    torch.testing.assert_close(hits.probabilities, found.probabilities / found.probabilities.sum(-1, keepdim=True))


@pytest.mark.parametrize("kind", ["residual", "evidence"])
def test_words_are_weighed_too(weighing: Pipeline, pipeline: Pipeline, kind: str) -> None:
    pytest.importorskip("bm25s")
    model = pipeline if kind == "residual" else weighing
    if kind == "evidence":
        log = unit(drawn(90, 8)), torch.randint(30, (90, 1), generator=torch.Generator().manual_seed(0))
        model.evidence = Evidence.gather(model.memory, *log, worded=True)
        model.reranker = EvidenceReranker(len(model.evidence.features), hidden=(8, 8)).eval()
        with torch.no_grad():
            model.reranker.weight += 0.1
    model.attention.word_weights = torch.tensor([0.3, 0.1])
    model.words = Words.gather([f"word{row % 7} number{row}" for row in range(30)], [], torch.empty(0, 1).long())
    asked, texts = drawn(COUNT, 8), [f"number{3 * query} word{query}" for query in range(COUNT)]
    found = model.search(asked, texts=texts)
    hits = model.rerank(asked, found.rows.flip(-1), texts=texts)
    assert torch.equal(hits.rows, found.rows)
    torch.testing.assert_close(hits.probabilities, found.probabilities / found.probabilities.sum(-1, keepdim=True))
    assert not torch.allclose(hits.probabilities, model.rerank(asked, found.rows).probabilities)
    only = model.rerank(asked, some_lists(), texts=texts).rows.tolist()  # words match better ones
    assert [sorted(row for row in of if row >= 0) for of in only] == [sorted(some) for some in some_lists()]


def test_an_index_only_estimates_the_sum_over_all_rows() -> None:
    pytest.importorskip("faiss")
    torch.manual_seed(0)
    memory = VectorMemory.synthetic(rows=5000, dim=8, seed=0)
    evidence = Evidence.gather(memory, unit(drawn(90, 8)), torch.randint(5000, (90, 1)))
    reranker = EvidenceReranker(len(FEATURES), hidden=(8, 8))
    model = Pipeline(
        SoftAttention(memory, transform="identity", beta=5.0), reranker, k=4, evidence=evidence
    ).requires_grad_(False)
    model.reranker.weight += 0.2 * torch.randn(len(FEATURES))
    asked, each = drawn(COUNT, 8), some_lists(rows=5000)[:3] * 2 + [[3, 4]]
    exact = model.rerank(asked, each)
    model.index = build_index(model.keys(), "ivf", nlist=4, nprobe=1)
    found = model.rerank(asked, each)
    assert torch.equal(found.rows, exact.rows)
    torch.testing.assert_close(found.probabilities, exact.probabilities, atol=0.01, rtol=0)


def test_blocks_of_queries_change_nothing(model: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    asked, each = drawn(QUERY_BLOCK + 5, 8), some_lists(QUERY_BLOCK + 5)
    expected = model.rerank(asked, each)
    same(model.rerank(asked[-5:], each[-5:]), by_loop(model, asked[-5:], each[-5:]))
    assert (
        expected.rows[-5:, :12].tolist() == padded([*by_loop(model, asked[-5:], each[-5:])[0], [0] * 12])[:5].tolist()
    )
    monkeypatch.setattr(pipeline_search, "RERANKED_AT_ONCE", 3 * 30 * 8)
    again = model.rerank(asked, each)
    assert torch.equal(again.rows, expected.rows)
    torch.testing.assert_close(again.probabilities, expected.probabilities)


def test_the_mode_stays(model: Pipeline) -> None:
    model.train()
    for network in model.reranker.modules():
        if isinstance(network, torch.nn.Dropout):
            network.p = 0.5
    one, two = (model.rerank(drawn(COUNT, 8), some_lists()) for _ in range(2))
    assert torch.equal(one.probabilities, two.probabilities)
    assert model.training
    with pytest.raises(InputError):
        model.rerank(drawn(COUNT, 8), [[30]] * COUNT)
    assert model.training


@pytest.mark.parametrize("ids", [[f"item {row}" for row in range(30)], list(range(-1, 29))], ids=["str", "int"])
def test_candidates_are_called_by_their_ids(model: Pipeline, ids: list[Any]) -> None:
    asked, each = drawn(COUNT, 8), some_lists()
    each[1] = [0, 5]  # of which the first may have the id -1
    expected = by_loop(model, asked, each)
    model.memory.ids = checked_ids(ids, 30, "memory")
    hits = model.rerank(asked, [[ids[row] for row in some] for some in each])
    same(hits, expected)
    assert hits.ids.tolist() == [[None if row < 0 else ids[row] for row in of] for of in hits.rows.tolist()]


def test_equal_vectors_are_one_candidate_called_as_the_first_of_them() -> None:
    memory = VectorMemory(drawn(5, 8)[[0, 1, 0, 2, 3, 1, 4]], distinct=True)
    model = Pipeline(
        SoftAttention(memory, transform="identity", beta=5.0),
        EvidenceReranker(len(FEATURES), hidden=(8, 8)),
        k=3,
        evidence=Evidence.gather(memory, unit(drawn(9, 8)), torch.arange(9).unsqueeze(-1) % 5),
    )
    model.requires_grad_(False)
    asked = drawn(3, 8)
    hits = model.rerank(asked, [[2, 0, 5], [2, 5, 6], [5]])
    expected = by_loop(model, asked, [[0, 1], [0, 1, 4], [1]])
    called = [{0: 0, 1: 5}, {0: 2, 1: 5, 4: 6}, {1: 5}]
    rows = [[names[row] for row in of] for names, of in zip(called, expected[0], strict=True)]
    same(hits, (rows, expected[1]))


def test_no_queries_have_no_candidates(model: Pipeline) -> None:
    assert model.rerank(drawn(0, 8), np.zeros((0, 3), int)).rows.shape == (0, 0)
    assert model.rerank(drawn(0, 8), []).rows.shape == (0, 0)


BAD = {
    "unknown": ([[1]] * 6 + [[2, 30]], "query 6 has 30"),
    "negative": ([[1]] * 6 + [[2, -2]], "query 6 has -2"),
    "string": ([["a"]] * COUNT, "query 0 has 'a'"),
    "twice": ([[1]] * 4 + [[2, 3, 2], [1], [1]], "query 4"),
    "none": ([[1]] * 3 + [[]] + [[1]] * 3, "query 3"),
    "padding": (np.array([[1]] * 3 + [[-1]] + [[1]] * 3), "query 3"),
    "fewer": ([[1]] * 6, "6"),
    "more": (np.ones((8, 2), int), "8"),
    "one list": ([1, 2, 3], "query 0"),
    "a mask": (np.ones((COUNT, 30), bool), "query 0"),
    "one mask": (np.ones(30, bool), "query 0"),
    "floats": (np.ones((COUNT, 2)), "1.0"),
    "a number": (5, "5"),
}


@pytest.mark.parametrize(("candidates", "named"), BAD.values(), ids=BAD)
def test_bad_candidates_are_refused(model: Pipeline, candidates: Any, named: str) -> None:
    with pytest.raises(InputError, match=f"^candidates.*{named}"):
        model.rerank(drawn(COUNT, 8), candidates)


@pytest.mark.parametrize(
    ("asked", "texts"), [(torch.ones(2, 7), None), (torch.zeros(2, 8), None), (torch.ones(2, 8), ["a"] * 2)]
)
def test_bad_queries_and_texts_are_refused(model: Pipeline, asked: Tensor, texts: Any) -> None:
    with pytest.raises(InputError, match=r"queries|texts"):
        model.rerank(asked, [[1], [2]], texts=texts)
