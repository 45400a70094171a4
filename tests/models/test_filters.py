"""Filtered search, against pipelines over nothing but the rows that are allowed."""

import copy
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nvf.errors import InputError
from nvf.files.ids import checked_ids
from nvf.models import filters
from nvf.models.ann_index import Index, approximate_topk, build_index
from nvf.models.attention import SoftAttention
from nvf.models.evidence import FEATURES, OF_WORDS, Evidence
from nvf.models.memory import VectorMemory, unit
from nvf.models.pipeline import Pipeline
from nvf.models.pipeline_search import Hits
from nvf.models.reranker import EvidenceReranker, Reranker
from nvf.models.words import LISTED, Words, WordScores, terms
from nvf.ops.products import QUERY_BLOCK
from nvf.ops.topk import SPARSE_ROWS, blockwise_topk

ROWS, COUNT = 30, 7  # of the memory; queries


def drawn(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(memory: VectorMemory, kind: str = "evidence", *, worded: bool = False) -> Pipeline:
    """A pipeline with k = 4 of which nothing is left at zero: learned keys, a bias, evidence of a log."""
    torch.manual_seed(0)
    rows, keys = len(memory), {"keys": "learned", "biased": True, "worded": worded}
    attention = SoftAttention(memory, transform="linear", beta=5.0, **keys)
    names, evidence = (*FEATURES, *OF_WORDS) if worded else FEATURES, None
    reranker: Any = Reranker(memory.dim, kind=kind, hidden=(8, 8)) if kind != "evidence" else None
    if reranker is None:
        log = torch.randint(rows, (90, 1))
        evidence = Evidence.gather(memory, unit(torch.randn(90, memory.dim)), log, worded=worded)
        reranker = EvidenceReranker(len(names), hidden=(8, 8))
    pipeline = Pipeline(attention, reranker, k=4, evidence=evidence)
    with torch.no_grad():
        for tensor in (*pipeline.parameters(), attention.bias):
            tensor += 0.1 * torch.randn(tensor.shape)
        if worded:
            attention.word_weights.copy_(torch.tensor([0.05, 0.03]))
    return pipeline.requires_grad_(False).eval()


def only(pipeline: Pipeline, rows: list[int]) -> Pipeline:
    """A pipeline over these rows alone."""
    old, memory = pipeline.attention, VectorMemory.restore(pipeline.memory.rows[rows], "some")
    state = old.state_dict()
    attention = SoftAttention(memory, **old.settings)
    attention.load_state_dict({name: part[rows] if name in ("delta", "bias") else part for name, part in state.items()})
    evidence, count = pipeline.evidence, 0 if pipeline.evidence is None else len(pipeline.evidence.queries)
    if evidence is not None:
        pairs = [(rows.index(pair // count), pair % count) for pair in evidence.pairs.tolist() if pair // count in rows]
        kept = {
            "queries": evidence.queries,
            "pairs": torch.tensor(sorted(row * count + query for row, query in pairs) or [0]),
            "hubness": evidence.hubness[rows],
            "density": evidence.density[rows],
        }
        slots = evidence.slots
        evidence = Evidence(memory, **kept, worded=len(evidence.features) > len(FEATURES))
        evidence.slots = slots  # with fewer, the `nearest` of a row that has as many could be negative
    reranker = copy.deepcopy(pipeline.reranker)
    return Pipeline(attention, reranker, k=min(pipeline.k, len(rows)), evidence=evidence).requires_grad_(False).eval()


def brute(pipeline: Pipeline, asked: Tensor, each: list[list[int]], k: int) -> tuple[list[list[int]], Tensor]:
    """Rows and probabilities, padded, of each query from a pipeline over its rows alone."""
    rows, probabilities = [], torch.zeros(len(asked), k)
    for query, some in enumerate(each):
        some = sorted(some)
        hits = only(pipeline, some).search(asked[query : query + 1], min(k, len(some)))
        rows.append([some[row] for row in hits.rows[0].tolist()] + [-1] * (k - len(some)))
        probabilities[query, : hits.rows.shape[1]] = hits.probabilities[0]
    return rows, probabilities


def same(hits: Hits, expected: tuple[list[list[int]], Any]) -> None:
    assert hits.rows.tolist() == expected[0]
    np.testing.assert_allclose(np.asarray(hits.probabilities), np.asarray(expected[1]), rtol=2e-4, atol=1e-6)


def masks(each: list[list[int]], count: int = ROWS) -> np.ndarray:
    array = np.zeros((len(each), count), bool)
    for query, some in enumerate(each):
        array[query, some] = True
    return array


def padded(each: list[list[int]]) -> np.ndarray:
    width = max(map(len, each))
    return np.array([[*some, *[-1] * (width - len(some))] for some in each])


def some_lists(count: int = COUNT, rows: int = ROWS) -> list[list[int]]:
    """Rows for each query: one, two, all, and between."""
    rng = np.random.default_rng(0)
    sizes = [1, 2, rows, 3, *rng.integers(1, rows, size=count)][:count]
    return [rng.permutation(rows)[:size].tolist() for size in sizes]


FOR_ALL: dict[str, Callable[[list[int]], Any]] = {
    "list": list,
    "set": set,
    "array": np.array,
    "small integers": lambda some: np.array(some, np.uint8),
    "tensor": torch.tensor,
    "padded": lambda some: [*some, -1, None],
    "mask": lambda some: masks([some])[0],
    "tensor mask": lambda some: torch.from_numpy(masks([some])[0]),
    "list mask": lambda some: masks([some])[0].tolist(),
}
FOR_EACH: dict[str, Callable[[list[list[int]]], Any]] = {
    "lists": list,
    "arrays": lambda each: [np.array(some) for some in each],
    "padded": padded,
    "tensor": lambda each: torch.from_numpy(padded(each)),
    "padded lists": lambda each: [[None, *some, -1] for some in each],
    "mask": masks,
    "tensor mask": lambda each: torch.from_numpy(masks(each)),
}


@pytest.mark.parametrize("form", FOR_ALL)
@pytest.mark.parametrize("allowed", [[7], [3, 19], [29, 4, 0, 11, 23, 2, 8]], ids=len)
def test_one_filter_leaves_a_memory_of_its_rows(memory: VectorMemory, allowed: list[int], form: str) -> None:
    pipeline, asked = made(memory), drawn(COUNT, 8)
    hits = pipeline.search(asked, 5, allowed=FOR_ALL[form](allowed))
    same(hits, brute(pipeline, asked, [allowed] * COUNT, 5))
    assert hits.ids is None


@pytest.mark.parametrize("form", FOR_EACH)
def test_each_query_may_have_a_filter(memory: VectorMemory, form: str) -> None:
    pipeline, asked, each = made(memory), drawn(COUNT, 8), some_lists()
    same(pipeline.search(asked, 6, allowed=FOR_EACH[form](each)), brute(pipeline, asked, each, 6))


@pytest.mark.parametrize("kind", ["mlp", "residual", "evidence"])
@pytest.mark.parametrize("k", [1, 4, ROWS])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_pipeline_can_be_filtered(kind: str, k: int, dtype: str) -> None:
    pipeline = made(VectorMemory.synthetic(rows=ROWS, dim=8, seed=0, dtype=dtype), kind)
    asked, each = drawn(COUNT, 8), some_lists()
    hits = pipeline.search(asked.numpy(), k, allowed=each)
    assert isinstance(hits.rows, np.ndarray)
    same(hits, brute(pipeline, asked, each, k))
    same(pipeline.search(asked, k, allowed=each[4]), brute(pipeline, asked, [each[4]] * COUNT, k))
    total = pipeline.search(asked, ROWS, allowed=each).probabilities.sum(dim=-1)
    torch.testing.assert_close(total, torch.ones(COUNT))  # given that the answer is allowed


def test_to_allow_everything_changes_no_bit(memory: VectorMemory) -> None:
    pipeline, asked = made(memory), drawn(COUNT, 8)
    expected = pipeline.search(asked, 9)
    for everything in (range(ROWS), torch.ones(ROWS, dtype=torch.bool), np.ones((COUNT, ROWS), bool)):
        for mine, theirs in zip(pipeline.search(asked, 9, allowed=everything)[:2], expected[:2], strict=True):
            assert torch.equal(mine, theirs)


def test_blocks_of_queries_and_rows_change_nothing(memory: VectorMemory, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, count = made(memory), QUERY_BLOCK + 5
    asked, each = drawn(count, 8), some_lists(count)
    whole = [pipeline.search(asked, 6, allowed=given) for given in (each, each[5])]
    last = whole[0]._replace(rows=whole[0].rows[-9:], probabilities=whole[0].probabilities[-9:])
    same(last, brute(pipeline, asked[-9:], each[-9:], 6))
    monkeypatch.setattr(filters, "MASKED_AT_ONCE", 100 * ROWS)
    monkeypatch.setattr(
        "nvf.models.memory.blockwise_topk.__kwdefaults__",
        {"logsumexp": False, "scores_per_block": 700, "allowed": None},
    )
    for hits, given in zip(whole, (each, each[5]), strict=True):
        same(pipeline.search(asked, 6, allowed=given), (hits.rows.tolist(), hits.probabilities))


@pytest.mark.parametrize("share", [0.0003, 0.3, 0.99])
@pytest.mark.parametrize("alike", [True, False])
def test_the_best_of_many_allowed_rows_are_those_of_one_matmul(alike: bool, share: float) -> None:
    rows = unit(drawn(SPARSE_ROWS // 2 + 999, 6)).repeat(2, 1)  # so that every row is there twice
    asked, rng = 5 * unit(drawn(20, 6, seed=2)), np.random.default_rng(0)
    mask = torch.from_numpy(rng.random((1 if alike else 20, len(rows))) < share)
    found = blockwise_topk(asked, rows, 25, logsumexp=True, allowed=mask)
    exact = (asked.double() @ rows.double().T).masked_fill(~mask, -math.inf)
    best = exact.round(decimals=12).sort(dim=-1, descending=True, stable=True)
    lacking = best.values[:, :25] == -math.inf
    assert torch.equal(found.rows, best.indices[:, :25].masked_fill(lacking, -1))
    torch.testing.assert_close(found.scores, best.values[:, :25].float())
    torch.testing.assert_close(found.logsumexp, exact.logsumexp(dim=-1).float())
    assert bool(lacking.any()) == (share < 0.01)


def test_more_queries_than_are_searched_at_once_keep_their_own_masks() -> None:
    rows, asked = drawn(40, 6), drawn(2 * QUERY_BLOCK + 3, 6, seed=2)
    mask = torch.from_numpy(masks(some_lists(len(asked), 40), 40))
    expected = (asked @ rows.T).masked_fill(~mask, -math.inf).topk(1).indices
    assert torch.equal(blockwise_topk(asked, rows, 1, allowed=mask).rows, expected)


def test_equal_rows_that_are_not_merged_come_in_their_order() -> None:
    pipeline = made(VectorMemory(drawn(6, 8).repeat(5, 1)), "residual")
    with torch.no_grad():
        pipeline.attention.delta.zero_()
        pipeline.attention.bias.zero_()
    asked, each = drawn(COUNT, 8), some_lists()
    each[3] = [12, 0, 6]  # equal ones, fewer than are wanted
    same(pipeline.search(asked, 9, allowed=each), brute(pipeline, asked, each, 9))


@pytest.mark.parametrize("name", [None, "v{}"])
def test_of_equal_vectors_the_first_that_is_allowed_answers(name: str | None) -> None:
    vectors = drawn(10, 8)[[0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 1, 9, 9]]
    ids = None if name is None else checked_ids([name.format(one) for one in range(14)], 14, "memory")
    pipeline = made(VectorMemory(vectors, ids=ids, distinct=True))
    call = (lambda some: some) if name is None else (lambda some: [name.format(one) for one in some])
    asked, every = vectors[[0, 1, 9, 12, 5]] + 0.01, pipeline.memory.row_of_vector.tolist()
    each = [[7, 3, 5], [11, 2], [13, 7, 8, 9, 3, 1], [12, 13], list(range(14))]
    first = [{every[one]: one for one in sorted(some, reverse=True)} for some in each]  # the smallest is written last
    rows, probabilities = brute(pipeline, asked, [list(some) for some in first], 4)
    rows = [[some.get(row, -1) for row in of] for some, of in zip(first, rows, strict=True)]
    for given in (list(map(call, each)), masks(each, 14)):
        hits = pipeline.search(asked, 4, allowed=given)
        same(hits, (rows, probabilities))
        assert [row[0] for row in hits.rows.tolist()] == [3, 11, 9, 12, 5]
        if name is not None:
            assert hits.ids.tolist() == [[None if one < 0 else name.format(one) for one in of] for of in rows]
    hits = pipeline.search(asked, 4, allowed=call(each[0]))
    assert {one for of in hits.rows.tolist() for one in of} == {3, 5, -1}


@pytest.mark.parametrize("ids", [[f"item {row}" for row in range(ROWS)], list(range(-1, ROWS - 1))], ids=["str", "int"])
def test_no_id_is_mistaken_for_padding(memory: VectorMemory, ids: list[Any]) -> None:
    memory = VectorMemory.restore(memory.rows, "named", checked_ids(ids, ROWS, "memory"))
    pipeline, asked, each = made(memory), drawn(COUNT, 8), some_lists()
    each[3] = [0, 4, 2]  # of which the first may have the id -1
    rows, probabilities = brute(pipeline, asked, each, 5)
    named = [[ids[row] for row in some] for some in each]
    for given in (named, [[*some, None] for some in named], masks(each), np.array(named, object)):
        hits = pipeline.search(asked, 5, allowed=given)
        same(hits, (rows, probabilities))
        assert hits.ids.tolist() == [[None if row < 0 else ids[row] for row in of] for of in rows]
    assert pipeline.search(asked, 2, allowed=ids).ids.dtype == memory.ids.dtype
    hits = pipeline.search(asked, 5, allowed=[ids[0]])
    assert hits.rows.tolist() == [[0, -1, -1, -1, -1]] * COUNT
    assert hits.ids.tolist() == [[ids[0], None, None, None, None]] * COUNT


def test_without_queries_there_are_no_answers(memory: VectorMemory) -> None:
    pipeline = made(memory)
    for given in ([3], np.ones(ROWS, bool), np.ones((0, ROWS), bool)):
        assert pipeline.search(drawn(0, 8), 3, allowed=given).rows.shape == (0, 3)


BAD = {
    "nothing": ([], "nothing"),
    "no row": (np.zeros(ROWS, bool), "query 0"),
    "nothing for one": ([[1]] * 3 + [[]] + [[2]] * 3, "query 3"),
    "padding for one": (np.array([[1]] * 5 + [[-1]] + [[2]]), "query 5"),
    "no row for one": (np.arange(COUNT)[:, None] != 2 * np.ones((1, ROWS)), "query 2"),
    "unknown": ([1, ROWS], "30"),
    "unknown for one": ([[1]] * 6 + [[2, -2]], "query 6 has -2"),
    "string": (["a"], "'a'"),
    "one string": ("a", "'a'"),
    "bool among rows": ([1, True], "True"),
    "float": (np.ones(ROWS), "1.0"),
    "short mask": (np.ones(ROWS - 1, bool), "29"),
    "masks of a length": (np.ones((COUNT, ROWS + 1), bool), "31"),
    "masks for fewer": (np.ones((COUNT - 1, ROWS), bool), "6"),
    "lists for more": ([[1]] * (COUNT + 1), "8"),
    "list among rows": ([1, [2]], "2"),
    "row among lists": ([[1], *range(COUNT - 1)], r"query 0 has \[1\]"),
    "cube": (np.ones((COUNT, 2, 3), int), "query 0"),
    "masks in a cube": (np.ones((COUNT, 1, ROWS), bool), "mask"),
    "number": (3, "3"),
    "numpy's number": (np.array(3), "3"),
}


@pytest.mark.parametrize(("allowed", "named"), BAD.values(), ids=BAD)
def test_bad_filters_are_refused(memory: VectorMemory, allowed: Any, named: str) -> None:
    with pytest.raises(InputError, match=f"^allowed.*{named}"):
        made(memory).search(drawn(COUNT, 8), 3, allowed=allowed)


@pytest.mark.parametrize(
    ("ids", "wrong"), [(range(10, 40), 3), (range(10, 40), "10"), ([f"{i}" for i in range(30)], 3)]
)
def test_ids_are_no_rows_and_have_one_type(memory: VectorMemory, ids: Any, wrong: Any) -> None:
    memory = VectorMemory.restore(memory.rows, "named", checked_ids([*ids], ROWS, "memory"))
    with pytest.raises(InputError, match=f"^allowed: query 0 has {wrong!r}"):
        made(memory).search(drawn(COUNT, 8), 3, allowed=[wrong])


def worded(kind: str, rows: int = ROWS) -> tuple[Pipeline, list[str]]:
    """A pipeline with words, and texts of queries."""
    pytest.importorskip("bm25s")
    pipeline = made(VectorMemory.synthetic(rows=rows, dim=8, seed=0), kind, worded=True)
    fruit = ["apple fig", "banana", "cherry pie", "date", "elder flower", "fig"]
    answers = torch.randint(rows, (20, 2), generator=torch.Generator().manual_seed(3))
    answers[::3, 1] = -1
    logged = [f"{fruit[row % 6]} please" for row in range(20)]
    pipeline.words = Words.gather([f"{fruit[row % 6]} number{row}" for row in range(rows)], logged, answers)
    return pipeline, ["fig please", "number7", "", "xyzzy", "pie number12", "date", "banana number1"]


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize("kind", ["residual", "evidence"])
def test_words_are_those_of_allowed_rows(kind: str, alike: bool) -> None:
    pipeline, texts = worded(kind)
    asked, every = drawn(COUNT, 8), pipeline.words.scores(texts)
    each = [some_lists()[4]] * COUNT if alike else some_lists()
    hits = pipeline.search(asked, 6, texts=texts, allowed=each[0] if alike else each)
    for query, some in enumerate(each):
        some = sorted(some)
        known = [place for place, row in enumerate(every.rows[query].tolist()) if row in some]
        rows = torch.tensor([[some.index(int(every.rows[query, place])) for place in known]], dtype=torch.int64)
        words = WordScores(rows, every.scores[query : query + 1, known]) if known else None
        found = only(pipeline, some)(asked[query : query + 1], words)
        best = found.ranking.sort(dim=-1, descending=True, stable=True).indices[0, :6]
        assert hits.rows[query, : len(best)].tolist() == [some[row] for row in best.tolist()]
        torch.testing.assert_close(hits.probabilities[query, : len(best)], found.log_probs.exp()[0, best])
        assert hits.rows[query, len(best) :].tolist() == [-1] * (6 - len(best))


@pytest.mark.parametrize("alike", [True, False])
def test_words_list_the_best_of_allowed_rows_however_many_others_match_better(alike: bool) -> None:
    pipeline, texts = worded("residual", rows=600)
    mask = torch.zeros(1 if alike else len(texts), 600, dtype=torch.bool)
    mask[:, 400:500:3] = True
    found = pipeline.words.scores(texts, allowed=mask)
    dense = np.stack([pipeline.words.indexes["text"].get_scores(some or ["~"]) for some in terms(texts)])
    assert (dense[0, :400] > 0).sum() > LISTED
    for query in range(len(texts)):
        expected = {row: dense[query, row] for row in range(400, 500, 3) if dense[query, row] > 0}
        pairs = zip(found.rows[query].tolist(), found.scores[query, :, 0].tolist(), strict=True)
        assert {row: score for row, score in pairs if score > 0} == pytest.approx(expected)
    assert {*found.rows.flatten().tolist()} <= {-1, *range(400, 500, 3)}


@pytest.fixture
def indexed() -> Pipeline:
    """A pipeline over rows in clusters, more than the index's sample."""
    memory = VectorMemory.clustered(clusters=500, rows_per_cluster=10, dim=8, sigma=0.2, seed=0)
    return made(memory, "residual")


ALL = {"ivf": {"nlist": 5, "nprobe": 5}, "hnsw": {"ef_search": 5000}}  # where every row is looked at


@pytest.mark.parametrize("kind", ALL)
def test_an_index_keeps_to_the_filter(indexed: Pipeline, kind: str) -> None:
    pytest.importorskip("faiss")
    asked, rng = drawn(20, 8), np.random.default_rng(0)
    filters_of = [rng.random(5000) < share for share in (0.002, 0.08, 0.5, 0.9)]
    filters_of += [np.ones(5000, bool), rng.random((20, 5000)) < 0.4]
    exact = [indexed.search(asked, 9, allowed=mask) for mask in filters_of]
    indexed.index = build_index(indexed.keys(), kind, **ALL[kind])
    for mask, expected in zip(filters_of, exact, strict=True):
        hits = indexed.search(asked, 9, allowed=mask)
        assert torch.equal(hits.rows, expected.rows)
        torch.testing.assert_close(hits.probabilities, expected.probabilities, atol=2e-3, rtol=0.05)
    indexed.index = build_index(
        indexed.keys(), kind, **({"nlist": 60, "nprobe": 1} if kind == "ivf" else {"ef_search": 1})
    )
    rows = indexed.search(asked, 9, allowed=filters_of[2]).rows
    assert filters_of[2][rows].all()
    assert not torch.equal(rows, exact[2].rows)  # FAISS was asked
    assert torch.equal(indexed.search(asked, 9, allowed=filters_of[1]).rows, exact[1].rows)  # it was not
    unfiltered, everything = indexed.search(asked, 9), indexed.search(asked, 9, allowed=range(5000))
    assert torch.equal(unfiltered.rows, everything.rows)
    assert torch.equal(unfiltered.probabilities, everything.probabilities)


def test_the_sum_over_allowed_rows_is_estimated_from_allowed_rows(indexed: Pipeline) -> None:
    pytest.importorskip("faiss")
    projected = 3 * indexed.attention.project(unit(drawn(20, 8)))
    keys = indexed.keys()
    mask = (projected[:1] @ keys.T) < 0  # where the first query has its least likely rows
    index = build_index(keys, "ivf", nlist=5, nprobe=5)
    assert index is not None
    found = approximate_topk(index, projected[:1], keys, 12, mask)
    exact = blockwise_topk(projected[:1], keys, 12, logsumexp=True, allowed=mask)
    torch.testing.assert_close(found.logsumexp, exact.logsumexp, atol=0.2, rtol=0)


def test_queries_of_which_an_index_finds_too_few_are_answered_exactly(indexed: Pipeline) -> None:
    pytest.importorskip("faiss")
    asked = unit(indexed.memory.rows[::200])
    keys, mask = indexed.keys(), torch.zeros(1, 5000, dtype=torch.bool)
    mask[0, 2000:] = True
    index = build_index(keys, "ivf", nlist=500, nprobe=1)
    projected = indexed.attention.project(asked)
    assert isinstance(index, Index)
    short = (index.search(projected, 12, mask[0])[1] < 0).any(dim=-1)
    found = approximate_topk(index, projected, keys, 12, mask)
    exact = blockwise_topk(projected, keys, 12, allowed=mask)
    assert short.any()
    assert torch.equal(found.rows[short], exact.rows[short])
    assert mask[0, found.rows].all()
