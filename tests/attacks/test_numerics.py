"""Search, attention, distribution and figures against float64 numpy, at the ends of every range and among equals.

A product of unit vectors of D numbers, computed in float32, is off by at most D u, u = 2^-24, in whatever order it is
summed; both vectors were rounded to unit length with an error of a few u. `BOUND` is four times their sum.
"""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvf.data.queries import QueryBatch
from nvf.evaluation.evaluate import calibration_error, evaluate
from nvf.models.ann_index import approximate_topk, build_index
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory, unit
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import Reranker
from nvf.ops.cross_entropy import cross_entropy, logsumexp
from nvf.ops.products import QUERY_BLOCK
from nvf.ops.ranks import ndcg, recall, target_ranks
from nvf.ops.topk import NEAR_TIES, best_rows, blockwise_topk, first_topk

UNIT_ROUNDOFF = 2.0**-24
DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def bound(dim: int) -> float:
    return 4 * (dim + 8) * UNIT_ROUNDOFF


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def unit_rows(vectors: Tensor) -> np.ndarray:
    """Rows of length one, of vectors of any length, in float64."""
    wide = vectors.double().numpy()
    wide = wide / np.abs(wide).max(axis=-1, keepdims=True)
    return wide / np.sqrt((wide * wide).sum(axis=-1, keepdims=True))


def pairwise(queries: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Inner products, (B, N), each summed alone, so that equal rows have equal ones."""
    return np.stack([(rows * query).sum(axis=-1) for query in queries]) if len(queries) else np.empty((0, len(rows)))


def ranked(scores: np.ndarray) -> np.ndarray:
    """All rows, best first, of equal ones the smallest first."""
    return np.argsort(-scores, axis=-1, kind="stable")


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - log_sum_exp(logits)[:, None]


def log_sum_exp(logits: np.ndarray) -> np.ndarray:
    largest = logits.max(axis=-1)
    return largest + np.log(np.exp(logits - largest[:, None]).sum(axis=-1))


def built(memory: VectorMemory, *, k: int, beta: float = 20.0, kind: str = "residual") -> Pipeline:
    """A pipeline that asks for every query as it is, with a reranker that reorders."""
    torch.manual_seed(0)
    reranker = Reranker(memory.dim, kind=kind, hidden=(8, 8))
    with torch.no_grad():
        for parameter in reranker.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    return Pipeline(SoftAttention(memory, transform="identity", beta=beta), reranker, k=k).eval()


def reference(pipeline: Pipeline, queries: Tensor) -> np.ndarray:
    """The pipeline's log-probabilities, (B, N), in float64, the reranker over plainly concatenated features."""
    rows, asked = pipeline.memory.rows.double().numpy(), unit_rows(queries)
    beta = float(pipeline.attention.beta.detach().double())
    logits = beta * pairwise(asked, rows)
    found = log_softmax(logits)
    weights = {name: tensor.detach().double().numpy() for name, tensor in pipeline.reranker.named_parameters()}
    for query, best in enumerate(ranked(logits)[:, : pipeline.k]):
        q = np.broadcast_to(asked[query], (len(best), rows.shape[1]))
        c = rows[best]
        hidden = np.concatenate([q, c, q - c, q * c], axis=-1) @ weights["first.weight"].T + weights["first.bias"]
        hidden = np.maximum(hidden, 0) @ weights["rest.2.weight"].T + weights["rest.2.bias"]
        scores = (np.maximum(hidden, 0) @ weights["rest.4.weight"].T)[:, 0]
        if "evidence" in weights:
            scores = scores + weights["evidence"][0] * logits[query, best]
            scores = scores + weights["evidence"][1] * beta * (q * c).sum(axis=-1)
        found[query, best] = log_sum_exp(found[query, best][None])[0] + log_softmax(scores[None])[0]
    return found


def equals(rows: int, distinct: int, dim: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """So many rows, of so few different ones, mixed."""
    which = torch.randint(distinct, (rows,), generator=torch.Generator().manual_seed(rows))
    return normal(distinct, dim, seed=1).to(dtype)[which]


@pytest.mark.parametrize("asked", DTYPES)
@pytest.mark.parametrize("kept", DTYPES)
@pytest.mark.parametrize(("rows", "dim", "k"), [(1, 1, 1), (1, 9, 1), (40, 1, 7), (37, 7, 37), (100, 16, 5)])
def test_every_float_type_answers_as_float64_does(
    kept: torch.dtype, asked: torch.dtype, rows: int, dim: int, k: int
) -> None:
    vectors = normal(rows, dim).to(kept)
    memory = VectorMemory(vectors, dtype="float32" if kept is torch.float64 else str(kept).removeprefix("torch."))
    pipeline = built(memory, k=k)
    stored = memory.rows.double().numpy()
    for batch in (0, 1, 5, 70):
        queries = normal(batch, dim, seed=2).to(asked)
        scores = pairwise(unit_rows(queries), stored)
        found = memory.search(queries.to(torch.promote_types(asked, torch.float32)), k)
        assert found.rows.shape == (batch, k)
        held = np.take_along_axis(scores, found.rows.numpy(), -1)
        assert np.abs(held - found.scores.double().numpy()).max(initial=0) <= bound(dim)
        assert np.abs(held - np.sort(scores, axis=-1)[:, ::-1][:, :k]).max(initial=0) <= bound(dim)
        hits = pipeline.search(queries)
        assert hits.probabilities.dtype == torch.float32
        expected = np.exp(reference(pipeline, queries))
        # An error of a logit, beta times that of a product, is one of the probability's logarithm, and there are two.
        error = 100 * 20 * bound(dim)
        taken = np.take_along_axis(expected, hits.rows.numpy(), -1)
        assert np.abs(hits.probabilities.double().numpy() - taken).max(initial=0) <= error
        assert np.abs(taken - np.sort(expected, axis=-1)[:, ::-1][:, :k]).max(initial=0) <= error
        whole = pipeline(queries)
        assert np.abs(whole.log_probs.double().exp().detach().numpy() - expected).max(initial=0) <= error
        answer = np.exp(whole.log_probs.double().detach().numpy()) @ stored
        assert np.abs(whole.answer.double().detach().numpy() - answer).max(initial=0) <= error


@pytest.mark.parametrize(
    ("threads", "kept"),
    [
        (1, torch.float32),
        (2, torch.float16),
        pytest.param(1, torch.float16, marks=pytest.mark.slow),
        pytest.param(2, torch.float32, marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("dim", [1, pytest.param(7, marks=pytest.mark.slow), 64])
@pytest.mark.parametrize(
    ("rows", "distinct"), [(37, 1), (103, 9), pytest.param(3001, 1, marks=pytest.mark.slow), (3001, 100)]
)
def test_of_equal_rows_the_smallest_comes_first(
    rows: int, distinct: int, dim: int, kept: torch.dtype, threads: int, attempts: Callable[[int, int], int]
) -> None:
    keys = torch.from_numpy(unit_rows(equals(rows, distinct, dim))).to(kept)
    torch.set_num_threads(threads)
    try:
        for batch in (70, 3, 1, 5, 17)[: attempts(2, 5) if distinct > 1 else 2]:
            queries = F.normalize(normal(batch, dim, seed=3).float(), dim=-1)
            expected = torch.from_numpy(ranked(pairwise(queries.double().numpy(), keys.double().numpy())))
            for k in (2, 10, 1, rows - 1)[: attempts(2, 4 if rows < 200 else 3)]:
                for block in (None, 1001 * batch, 17 * batch)[: 3 if rows < 200 else 2]:
                    found = blockwise_topk(queries, keys, k, scores_per_block=block)
                    assert torch.equal(found.rows, expected[:, :k])
                assert torch.equal(best_rows(queries @ keys.float().T, queries, keys, k), expected[:, :k])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("kind", ["mlp", "residual"])
@pytest.mark.parametrize("dim", [1, 7, 32])
@pytest.mark.parametrize(("rows", "distinct"), [(37, 1), (103, 9), (3001, 100)])
def test_every_way_to_ask_agrees_about_equal_rows(rows: int, distinct: int, dim: int, kind: str) -> None:
    memory = VectorMemory(equals(rows, distinct, dim))
    pipeline = built(memory, k=6, kind=kind)
    _, name = np.unique(memory.rows.numpy(), axis=0, return_inverse=True)
    name = torch.from_numpy(name.reshape(-1))
    for batch in (1, 5, 64):
        queries = unit(normal(batch, dim, seed=4))
        expected = torch.from_numpy(ranked(pairwise(queries.double().numpy(), memory.rows.double().numpy())))[:, :6]
        assert torch.equal(memory.search(queries, 6).rows, expected)
        assert torch.equal(pipeline.attention.candidates(queries, 6).rows, expected)
        assert torch.equal(pipeline(queries).candidates, expected)
        hits = pipeline.search(queries, k=6)
        assert bool((hits.probabilities.diff(dim=-1) <= 0).all())
        same = hits.probabilities.diff(dim=-1) == 0
        assert bool((hits.rows.diff(dim=-1) > 0)[same].all())
        for one, other in ((i, j) for i in range(6) for j in range(i + 1, 6)):  # equal rows are equally probable
            alike = name[hits.rows[:, one]] == name[hits.rows[:, other]]
            both = (expected.unsqueeze(1) == hits.rows[:, [one, other]].unsqueeze(2)).any(dim=-1).all(dim=-1)
            assert bool((hits.rows[:, one] < hits.rows[:, other])[alike & both].all())
            assert torch.equal(hits.probabilities[alike & both, one], hits.probabilities[alike & both, other])


def test_a_target_that_ties_with_a_smaller_row_is_not_first() -> None:
    memory = VectorMemory(equals(200, 10, 8))
    first = memory.search(memory.rows, k=1).rows[:, 0]  # of those equal to each row
    targets = torch.arange(200).unsqueeze(-1)
    batch = QueryBatch(memory.rows.clone(), targets)
    attention = SoftAttention(memory, transform="identity")
    pipeline = Pipeline(attention, Reranker(8, kind="residual", hidden=(8, 8)), k=5).eval()
    expected = first == targets[:, 0]
    assert int(expected.sum()) == 10
    found = evaluate(pipeline, batch, k=5, oracle=None)
    assert torch.equal(found.answered, expected)
    assert found.figures["exact"]["top1"]["value"] == found.figures["attention"]["top1"]["value"] == 0.05
    assert torch.equal(pipeline.search(batch.queries).rows[:, 0] == targets[:, 0], expected)
    for method in ("exact", "attention", "pipeline"):
        assert torch.equal(found.outcomes.ranks[method] == 1, expected)
    assert torch.equal(found.outcomes.candidates, memory.search(batch.queries, 5).rows)


def test_an_index_answers_equal_rows_as_exact_search_does() -> None:
    pytest.importorskip("faiss")
    keys = VectorMemory(equals(6000, 3000, 8)).rows
    index = build_index(keys, "ivf", nlist=4, nprobe=4)
    queries = unit(normal(20, 8, seed=3))
    found, exact = approximate_topk(index, queries, keys, 10).rows, blockwise_topk(queries, keys, 10).rows
    assert (found == exact).float().mean() > 0.9  # FAISS takes any of equals at the end


@pytest.mark.parametrize("beta", [1e-30, 1e-6, 1.0, 1e6, 1e30])
def test_temperatures_at_both_ends(beta: float) -> None:
    memory = VectorMemory(normal(300, 8))
    pipeline, queries = built(memory, k=5, beta=beta, kind="mlp"), normal(70, 8, seed=1).float()
    attention = pipeline.attention
    stored, asked = memory.rows.double().numpy(), unit_rows(queries)
    logits = float(attention.log_beta.double().exp()) * pairwise(asked, stored)
    # exp(log_beta) is off by |log_beta| u, besides what the products are.
    error = beta * (bound(8) + 8 * abs(math.log(beta)) * UNIT_ROUNDOFF) + 50 * UNIT_ROUNDOFF
    projected = attention.project(unit(queries))
    found = attention.candidates(unit(queries), 5, logsumexp=True)
    assert np.abs(found.logsumexp.detach().double().numpy() - log_sum_exp(logits)).max() <= error
    assert np.abs(logsumexp(projected, memory.rows).detach().double().numpy() - log_sum_exp(logits)).max() <= error
    targets = torch.arange(70).unsqueeze(-1)
    loss = (log_sum_exp(logits) - logits[np.arange(70), np.arange(70)]).mean()
    for value in (cross_entropy(projected, memory.rows, targets), attention.loss(unit(queries), targets)):
        assert abs(float(value) - loss) <= 2 * error
    scores = pairwise(asked, stored)
    held = np.take_along_axis(scores, found.rows.numpy(), -1)
    assert np.abs(held - np.sort(scores, axis=-1)[:, ::-1][:, :5]).max() <= bound(8)
    assert torch.equal(pipeline(queries).candidates, found.rows)
    hits = pipeline.search(queries)
    assert bool(hits.probabilities.isfinite().all())
    assert bool((hits.probabilities.sum(dim=-1) <= 1 + 1e-5).all())
    whole = pipeline(queries).log_probs.double()
    assert bool(whole.isfinite().all())
    if beta <= 1e6:
        assert float(whole.logsumexp(dim=-1).abs().max()) <= 4 * error
    pipeline.loss(queries, targets)[0].backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in pipeline.parameters())


@pytest.mark.parametrize("length", [1e-44, 1e-38, 1e-20, 1e-4, 1.0, 1e4, 1e20, 3e37])
def test_the_length_of_a_query_does_not_matter(length: float) -> None:
    pipeline, queries = built(VectorMemory(normal(300, 8)), k=5), torch.tensor([[1.0, -1.0] * 4, [1.0, 1.0] * 4])
    scaled = queries * length  # of equal numbers, so that denormals keep the direction
    for usual, extreme in (
        (pipeline.search(queries), pipeline.search(scaled)),
        (pipeline.search(queries.double().numpy()), pipeline.search(scaled.double().numpy())),
    ):
        assert np.array_equal(np.asarray(usual.rows), np.asarray(extreme.rows))
        np.testing.assert_allclose(np.asarray(usual.probabilities), np.asarray(extreme.probabilities), rtol=1e-4)
    usual, extreme = pipeline(queries), pipeline(scaled)
    torch.testing.assert_close(usual.log_probs, extreme.log_probs, rtol=1e-4, atol=1e-4)
    targets = torch.tensor([[0], [1]])
    torch.testing.assert_close(pipeline.loss(queries, targets), pipeline.loss(scaled, targets), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(pipeline.transform(scaled), pipeline.transform(queries), atol=1e-6)


def test_minus_infinity_is_a_probability_of_zero() -> None:
    attention = SoftAttention(VectorMemory(normal(50, 8)), transform="identity", biased=True)
    attention.bias[::2] = -math.inf
    queries = unit(normal(5, 8, seed=1))
    probabilities = attention(queries).softmax(dim=-1)
    assert bool((probabilities[:, ::2] == 0).all())
    found = attention.candidates(queries, 10, logsumexp=True)
    assert bool((found.rows % 2 == 1).all())
    torch.testing.assert_close(found.logsumexp, attention(queries).logsumexp(dim=-1))


@pytest.mark.parametrize("distance", [0.0, 1e-8, 1e-7, 3e-7])
def test_near_duplicates_come_in_their_true_order(distance: float, attempts: Callable[[int, int], int]) -> None:
    count = attempts(20_000, 1_000_000)
    for dim in (8,) if count < 1_000_000 else (8, 16):
        centre = F.normalize(normal(1, dim), dim=-1)
        memory = VectorMemory((centre + distance * normal(count, dim, seed=1)).float())
        queries = unit(normal(3, dim, seed=2))
        expected = ranked(pairwise(queries.double().numpy(), memory.rows.double().numpy()))[:, :7]
        for asked in (queries, queries[:1]):
            found = memory.search(asked, 7)
            assert np.array_equal(found.rows.numpy(), expected[: len(asked)])
            assert np.array_equal(memory.search(asked, 2).rows.numpy(), expected[: len(asked), :2])


@pytest.mark.slow
def test_the_blocks_of_near_ties_are_cut_right() -> None:
    keys = VectorMemory(torch.ones(NEAR_TIES // 256, 2)).rows
    queries = unit(normal(QUERY_BLOCK + 3, 2))
    assert torch.equal(blockwise_topk(queries, keys, 3).rows, torch.arange(3).expand(len(queries), 3))


def test_figures_equal_loops() -> None:
    rng = np.random.default_rng(0)
    for _ in range(50):
        rows, queries, m = int(rng.integers(1, 30)), int(rng.integers(1, 6)), int(rng.integers(1, 4))
        scores = rng.integers(0, 4, (queries, rows)).astype(np.float32)
        targets = np.full((queries, m), -1)
        for query in range(queries):
            some = rng.permutation(rows)[: rng.integers(1, min(m, rows) + 1)]
            targets[query, : len(some)] = some
        order, k = ranked(scores), int(rng.integers(1, rows + 1))
        held = torch.from_numpy(scores)
        assert np.array_equal(first_topk(held, k).numpy(), order[:, :k])
        relevant = np.array([np.isin(order[q, :k], targets[q]) for q in range(queries)])
        ranks = [1 + min(list(order[q]).index(t) for t in targets[q] if t >= 0) for q in range(queries)]
        assert target_ranks(held, torch.from_numpy(targets)).tolist() == ranks
        counts = (targets >= 0).sum(axis=-1)
        found = torch.from_numpy(relevant)
        expected = relevant.sum(axis=-1) / counts
        np.testing.assert_allclose(recall(found, torch.from_numpy(targets)).numpy(), expected, rtol=1e-6)
        gains = [
            sum(relevant[q, i] / math.log2(2 + i) for i in range(k))
            / sum(1 / math.log2(2 + i) for i in range(min(k, counts[q])))
            for q in range(queries)
        ]
        np.testing.assert_allclose(ndcg(found, torch.from_numpy(targets)).numpy(), gains, rtol=1e-5)


def test_the_calibration_error_is_that_of_its_definition() -> None:
    rng = np.random.default_rng(0)
    confidences, right = rng.random(500).astype(np.float32), rng.random(500) < 0.6
    place = np.minimum((confidences * 15).astype(int), 14)
    gaps = [abs(confidences[place == b].mean() - right[place == b].mean()) * (place == b).mean() for b in range(15)]
    found = calibration_error(torch.from_numpy(confidences), torch.from_numpy(right))
    assert found["value"] == pytest.approx(sum(gaps), abs=1e-5)
