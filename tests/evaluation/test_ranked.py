"""One pass in blocks against all scores at once: rows, ranks, figures and probabilities, with ties, words and gains."""

from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ndcg_of
from nvf.data.queries import QueryBatch
from nvf.evaluation.calibration import quality
from nvf.evaluation.evaluate import evaluate
from nvf.models.alignment import Alignment
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import Reranker
from nvf.models.words import WordScores
from nvf.ops.ranks import DEEPEST, are_targets, ranked_topk, recall, target_ranks
from nvf.ops.topk import first_topk

ROWS, QUERIES = 60, 90


def whole(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers, whose products are exact in every order and often equal."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


def batch_of(queries: Tensor, rows: int, *, several: bool = False, worded: bool = False) -> QueryBatch:
    """Queries with one to four targets, padded anywhere, their gains, and the words that some rows have."""
    generator = torch.Generator().manual_seed(1)
    count = len(queries)
    orders = torch.rand(2, count, rows, generator=generator).argsort(dim=-1)
    targets, words, gains = orders[0, :, : 4 if several else 1], None, None
    if several:
        targets[:, 1:] = targets[:, 1:].where(torch.rand(count, 3, generator=generator) < 0.6, -1)
        targets = targets.roll(1, dims=-1)
        gains = torch.randint(1, 4, targets.shape, generator=generator) * (targets >= 0) / 2
    if worded:
        listed = orders[1, :, :7].where(torch.rand(count, 7, generator=generator) < 0.7, -1)
        scores = torch.randint(0, 3, (count, 7, 2), generator=generator) * (listed >= 0).unsqueeze(-1)
        words = WordScores(listed, scores.float())
    return QueryBatch(queries, targets, words, gains)


def dense(model: SoftAttention | Pipeline, batch: QueryBatch, oracle: Tensor, hybrid: SoftAttention) -> dict:
    """The scores of all rows by each method, (B, N)."""
    queries, _, words, *_ = batch
    memory = model.memory
    first = "exact" if memory.alignment is None else "aligned"
    scores = {first: memory.aligned_queries(F.normalize(queries, dim=-1)) @ memory.keys.float().T}
    scores["oracle"] = queries @ oracle.T
    if words is not None:
        scores["words"] = torch.zeros(len(queries), len(memory) + 1).scatter_add(
            1, words.rows.where(words.rows >= 0, len(memory)), words.scores[..., 0]
        )[:, :-1]
        scores["hybrid"] = hybrid(queries, words)
    scores["attention"] = model(queries, words) if isinstance(model, SoftAttention) else model(queries, words).logits
    if isinstance(model, Pipeline):
        scores["pipeline"] = model(queries, words).ranking
    return scores


def models(memory: VectorMemory, k: int, *, worded: bool) -> list[SoftAttention | Pipeline]:
    torch.manual_seed(0)
    attention = SoftAttention(memory, transform="linear", beta=7.0, worded=worded, biased=True)
    attention.bias = -torch.randint(4, (len(memory),)) / 64  # which half precision holds
    torch.nn.init.normal_(attention.transform.network.weight, std=0.1)
    if worded:
        attention.word_weights = torch.tensor([0.3, 0.1])
    return [attention.eval(), Pipeline(attention, Reranker(memory.query_dim), k=k).eval()]


@torch.no_grad()
@pytest.mark.parametrize("several", [False, True])
@pytest.mark.parametrize("worded", [False, True])
@pytest.mark.parametrize("kind", ["float32", "float16", "aligned"])
@pytest.mark.parametrize("k", [1, 4, 15, ROWS])
def test_the_evaluation_is_that_of_all_scores_at_once(k: int, kind: str, worded: bool, several: bool) -> None:
    generator = torch.Generator().manual_seed(2)
    rows = torch.randn(ROWS, 8, generator=generator)
    memory = VectorMemory(rows, dtype=kind if kind != "aligned" else "float32")
    queries = F.normalize(torch.randn(QUERIES, 12 if kind == "aligned" else 8, generator=generator), dim=-1)
    oracle = torch.randn(ROWS, queries.shape[1], generator=generator)
    if kind == "aligned":
        start = Alignment.whitening_of(queries, memory.rows, 0.3)
        memory = memory.aligned_with(start.with_map(torch.randn(8, 12, generator=generator)))
    hybrid = SoftAttention(memory, transform="identity", beta=3.0, worded=True)
    hybrid.word_weights = torch.tensor([0.2, 0.0])
    batch = batch_of(queries, ROWS, several=several, worded=worded)
    for model in models(memory, k, worded=worded):
        seen = evaluate(model, batch, k=k, oracle=oracle, hybrid=hybrid).outcomes
        scores = dense(model, batch, oracle, hybrid)
        assert set(seen.ranks) == set(scores)
        for method, of_rows in scores.items():
            best = first_topk(of_rows, min(ROWS, max(k, DEEPEST)))
            assert torch.equal(seen.ranks[method], target_ranks(of_rows, batch.targets)), method
            assert torch.equal(seen.ndcg[method], ndcg_of(of_rows, batch.targets, batch.gains))
            assert torch.equal(seen.recall[method], recall(are_targets(best[:, :k], batch.targets), batch.targets))
        candidates = first_topk(scores["attention"], k)
        assert torch.equal(seen.candidates, candidates)
        log_probs = {"attention": scores["attention"].log_softmax(dim=-1)}
        if isinstance(model, Pipeline):
            log_probs["pipeline"] = model(queries, batch.words).log_probs
        for method, of_rows in log_probs.items():
            torch.testing.assert_close(seen.confidences[method], of_rows.amax(dim=-1).exp())
            torch.testing.assert_close(seen.probabilities[method], of_rows.gather(-1, candidates).exp())
        last = scores["pipeline" if isinstance(model, Pipeline) else "attention"]
        assert torch.equal(quality(model, batch, by="top1"), target_ranks(last, batch.targets) == 1)
        assert torch.equal(quality(model, batch, by="ndcg10"), ndcg_of(last, batch.targets, batch.gains))


@pytest.mark.parametrize(("queries", "rows"), [(1, 5), (20, 40_000), (600, 3000), (3, 40_000)])
@pytest.mark.parametrize("worded", [False, True])
def test_ties_rank_by_row_in_blocks_as_in_all_scores(queries: int, rows: int, worded: bool) -> None:
    asked, keys = whole(queries, 4), whole(rows, 4, seed=1)
    batch = batch_of(asked, rows if rows < 10 else 3000, several=rows > 10, worded=worded and rows > 10)
    scores, added = asked @ keys.T, None
    for k, logsumexp in product((1, 5), (False, True)):
        if batch.words is not None:
            added = batch.words.rows, batch.words.scores[..., 0]
            padded = F.pad(asked @ keys.T, (0, 1))
            scores = padded.scatter_add(1, added[0].where(added[0] >= 0, rows), added[1])[:, :-1]
        top = ranked_topk(asked, keys, batch.targets, k, logsumexp=logsumexp, added=added)
        assert torch.equal(top.ranks, target_ranks(scores, batch.targets))
        assert torch.equal(top.rows, scores.sort(dim=-1, descending=True, stable=True).indices[:, :k])
        if logsumexp:
            torch.testing.assert_close(top.logsumexp, scores.logsumexp(dim=-1))


@pytest.mark.parametrize("elsewhere", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("dim", [3, 37])
def test_equal_keys_rank_by_row_wherever_they_lie(
    dim: int, dtype: torch.dtype, elsewhere: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if elsewhere:
        monkeypatch.setattr("nvf.ops.products._on_cpu", lambda _: False)  # what runs on other devices
    generator = torch.Generator().manual_seed(dim)
    some = F.normalize(torch.randn(9, dim, generator=generator), dim=-1).to(dtype)
    name = torch.randint(9, (5000,), generator=generator)
    asked = 20 * F.normalize(torch.randn(40, dim, generator=generator), dim=-1)
    targets = torch.randint(5000, (40, 2), generator=generator)
    order = (asked.double() @ some.double().T)[:, name].sort(dim=-1, descending=True, stable=True).indices
    expected = 1 + (order.unsqueeze(-1) == targets.unsqueeze(1)).any(dim=-1).int().argmax(dim=-1)
    assert torch.equal(ranked_topk(asked, some[name], targets, 5).ranks, expected)


def test_what_is_not_a_number_is_last() -> None:
    asked = torch.randn(4, 8, generator=torch.Generator().manual_seed(0))
    keys = whole(300, 8)
    asked[1] = torch.nan
    keys[7] = torch.nan
    targets = torch.tensor([[3], [3], [7], [250]])
    assert ranked_topk(asked, keys, targets, 5).ranks.tolist() == target_ranks(asked @ keys.T, targets).tolist()
    memory = VectorMemory(torch.randn(40, 8, generator=torch.Generator().manual_seed(1)))
    model = Pipeline(SoftAttention(memory), Reranker(8), k=4).eval()
    batch = QueryBatch(F.normalize(whole(50, 8) + 0.1, dim=-1), torch.arange(50).unsqueeze(-1) % 40)
    with torch.no_grad():
        model.reranker.first.bias.fill_(torch.nan)
        expected = target_ranks(model(batch.queries).ranking, batch.targets)
    assert (expected == 41).any()
    assert torch.equal(evaluate(model, batch, k=4, oracle=None).outcomes.ranks["pipeline"], expected)
    assert not quality(model, batch).any()


@torch.no_grad()
def test_no_scores_of_all_rows_are_held() -> None:
    memory = VectorMemory.synthetic(rows=8000, dim=4, seed=0)
    batch = batch_of(F.normalize(whole(600, 4) + 0.1, dim=-1), 3000, several=True, worded=True)
    attention = SoftAttention(memory, transform="identity", worded=True)
    model = Pipeline(attention, Reranker(4, hidden=(4, 4)), k=5).eval()
    largest = 0

    class Largest(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            nonlocal largest
            found = func(*args, **(kwargs or {}))
            for part in found if isinstance(found, tuple | list) else [found]:
                if isinstance(part, Tensor):
                    largest = max(largest, part.numel())
            return found

    with Largest():
        evaluate(model, batch, k=5, oracle=None, hybrid=attention)
        quality(model, batch)
    assert largest <= 2**21 < 600 * 8000
