"""Every figure next to its baseline, its interval and its ceiling."""

import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from tqdm import tqdm

from nvf.data.queries import QueryBatch, score_blocks
from nvf.evaluation.metrics import MeanAndError, RankCounts
from nvf.models.ann_index import approximate_topk
from nvf.models.attention import SoftAttention
from nvf.models.memory import unit
from nvf.models.pipeline import Pipeline
from nvf.ops.products import QUERY_BLOCK, inner_products
from nvf.ops.ranks import DEEPEST, are_targets, ndcg, recall, target_ranks
from nvf.ops.topk import blockwise_topk, first_topk
from nvf.statistics import Interval, gap_closed, mcnemar, mean_interval, reciprocal_rank, wilson, wins_and_losses

METHODS = ("exact", "oracle", "attention", "pipeline")
PROBABLE = ("attention", "pipeline")  # the methods that give rows probabilities
BINS = 15  # of confidence, equally wide
CALIBRATION_RESAMPLES = 200
ALONE = {"sync_on_compute": False}  # the other processes of a run do not evaluate
ROUNDING = 1e-5  # cosines nearer than this are one


class Evaluation(NamedTuple):
    """What a model reaches on some queries: shares in 0..1, None for what does not exist."""

    figures: dict[str, Any]  # the block `test` of results.json
    against_exact: dict[str, Any]  # queries won and lost, and McNemar's p
    answered: Tensor  # (B,) bool, whose target is ranked first


@torch.no_grad()
def evaluate(
    model: SoftAttention | Pipeline,
    batch: QueryBatch,
    *,
    k: int,
    oracle: Tensor | None,
    seen: Tensor | None = None,
    title: str = "evaluation",
) -> Evaluation:
    """Figures of exact search, the oracle, stage 1 and, if the model is a pipeline, both stages together.

    Args:
        model: stage 1 alone, or the pipeline.
        batch: the queries and targets to report on.
        k: the number of candidates that coverage and recall count.
        oracle: rows (N, D) that an informed search would use; None where nobody knows them.
        seen: which rows answer a training query, (N,) bool; None where that is no question.
        title: of the progress bar.
    """
    attention = model.attention if isinstance(model, Pipeline) else model
    rows = attention.memory.rows
    missing = {"oracle"} if oracle is None else set()
    missing |= set() if isinstance(model, Pipeline) else {"pipeline"}
    counted = {method: _Counts(k).to(rows.device) for method in METHODS if method not in missing}
    if oracle is rows:
        counted["oracle"] = counted["exact"]
    first: dict[str, list[Tensor]] = {method: [] for method in (*METHODS, "coverage")}  # whether the target is
    confidences: dict[str, list[Tensor]] = {method: [] for method in PROBABLE if method in counted}
    last = "pipeline" if isinstance(model, Pipeline) else "attention"
    model.eval()
    for queries, targets in tqdm(score_blocks(batch, len(rows)), title, leave=False, delay=3):
        probable: dict[str, Tensor] = {}  # the logarithms of probabilities, but for a constant
        known = None if seen is None else ((targets >= 0) & seen[targets]).any(dim=-1)
        scores = {"exact": inner_products(unit(queries), rows)}
        if oracle is not None and oracle is not rows:
            scores["oracle"] = inner_products(queries, oracle)
        if isinstance(model, Pipeline):
            found = model(queries, answer=False)
            probable, candidates = {"attention": found.logits, "pipeline": found.log_probs}, found.candidates
            scores |= {"attention": found.logits, "pipeline": found.ranking}
        else:
            scores["attention"] = probable["attention"] = model(queries)
            candidates = first_topk(scores["attention"], k)
        ranks = {method: counted[method].update(scores[method], targets, known) for method in scores}
        first["coverage"].append(are_targets(candidates, targets).any(dim=-1))
        for method in ranks:
            first[method].append(ranks[method] == 1)
        for method in confidences:
            confidences[method].append((probable[method].amax(dim=-1) - probable[method].logsumexp(dim=-1)).exp())

    figures: dict[str, Any] = {method: counted[method].figures() if method in counted else None for method in METHODS}
    for name, of in (("seen_rows", True), ("unseen_rows", False)):
        figures[name] = None if seen is None else {method: counted[method].top1(of) for method in counted}
    counts = (batch.targets >= 0).sum(dim=-1)
    answered = {method: torch.cat(parts) for method, parts in first.items() if parts}
    answered.setdefault("oracle", answered["exact"])
    right, covered = int((answered[last] & answered["coverage"]).sum()), int(answered["coverage"].sum())
    figures["coverage"] = wilson(covered, len(batch.queries))
    reranked = figures["pipeline"] is not None
    figures["rerank_given_coverage"] = wilson(right, covered) if reranked and covered else None
    ends = (answered[name].cpu().numpy() for name in ("attention", last, ceiling(figures)[0]))
    closed = gap_closed(*ends) if reranked else None
    figures["gap_closed"], figures["gap_closed_interval"] = closed and closed["value"], closed
    figures["calibration_error"] = {
        method: calibration_error(torch.cat(parts), answered[method] / counts) for method, parts in confidences.items()
    }
    return Evaluation(figures, against(answered[last], answered["exact"]), answered[last])


def against(answered: Tensor, reference: Tensor) -> dict[str, Any]:
    """Queries that a method answers and a reference does not, the reverse, and McNemar's p; both (B,) bool."""
    wins, losses = wins_and_losses(answered, reference)
    return {"wins": wins, "losses": losses, "p": mcnemar(wins, losses)}


@torch.no_grad()
def evaluate_index(pipeline: Pipeline, queries: Tensor, targets: Tensor) -> dict[str, Any]:
    """What a pipeline's index costs and saves, next to exact search: the block `index` of results.json.

    `recall` is the share of the exact candidates, or of rows as near as these, that are candidates with the index.

    Args:
        pipeline: one that has an index; it keeps it.
        queries: (B, D) unit rows.
        targets: (B, m) rows, padded with -1.
    """
    index, keys, k = pipeline.index, pipeline.attention.keys(), pipeline.k
    assert index is not None
    shares = []
    for block in queries.split(QUERY_BLOCK):
        projected = pipeline.attention.project(block)
        found = approximate_topk(index, projected, keys, k).scores
        worst = blockwise_topk(projected, keys, k).scores[:, -1:]
        alike = ROUNDING * projected.norm(dim=-1, keepdim=True)
        shares.append((found >= worst - alike).float().mean(dim=-1))
    share = torch.cat(shares).double()
    error = float(share.std(correction=0)) / len(share) ** 0.5
    rows, rate = _timed_search(pipeline, queries)
    right = int((pipeline.memory.rows_of(rows) == targets).any(dim=-1).sum())
    pipeline.index = None
    try:
        exact_rate = _timed_search(pipeline, queries)[1]
    finally:
        pipeline.index = index
    return {
        "kind": index.kind,
        "settings": index.settings,
        "recall": mean_interval(float(share.mean()), error, count=len(share)),
        "top1": wilson(right, len(queries)),
        "queries_per_second": {"index": rate, "exact": exact_rate},
    }


def _timed_search(pipeline: Pipeline, queries: Tensor) -> tuple[Tensor, float]:
    """The most probable row of each query, (B, 1), and how many a second were answered."""
    pipeline.search(queries[:1])  # what is computed once is none of a query's time
    start = time.perf_counter()
    rows = pipeline.search(queries).rows
    return rows[:, :1], len(queries) / (time.perf_counter() - start)


def calibration_error(confidences: Tensor, right: Tensor) -> Interval:
    """The expected calibration error of the first answers (arXiv 1706.04599), its error by the bootstrap over queries.

    Args:
        confidences: (B,), the probability of each query's most probable row.
        right: (B,), what that should be: 1 / m if it is one of the query's m right rows, which share the mass, else 0.
    """
    confidences = confidences.nan_to_num(0).cpu()
    excess = confidences.double() - right.cpu().double()
    bins = (confidences * BINS).ceil().long().sub(1).clamp(0, BINS - 1)  # that hold their upper ends

    def error(drawn: Tensor) -> Tensor:
        return excess.new_zeros(BINS).index_add(0, bins[drawn], excess[drawn]).abs().sum() / len(drawn)

    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(len(right), (len(right),), generator=generator) for _ in range(CALIBRATION_RESAMPLES)]
    spread = float(torch.stack([error(drawn) for drawn in draws]).std())
    return mean_interval(float(error(torch.arange(len(right)))), spread, count=len(right))


class _Counts(nn.Module):
    """What is counted of one method, over batches."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.ranks, self.ndcg, self.recall = RankCounts(**ALONE), MeanAndError(**ALONE), MeanAndError(**ALONE)
        # Of rows not in the log, and of rows in it.
        self.known = nn.ModuleList([RankCounts(**ALONE), RankCounts(**ALONE)])

    def update(self, scores: Tensor, targets: Tensor, known: Tensor | None) -> Tensor:
        """Count a batch's scores, (B, N), of which `known` says whose target answers a training query; its ranks."""
        ranks = target_ranks(scores, targets)
        self.ranks.update(ranks)
        gains = are_targets(first_topk(scores, min(max(self.k, DEEPEST), scores.shape[1])), targets)
        self.ndcg.update(ndcg(gains[:, :DEEPEST], targets))
        self.recall.update(recall(gains[:, : self.k], targets))
        if known is not None:
            for of, counts in enumerate(self.known):
                counts.update(ranks[known == bool(of)])  # type: ignore[operator]  # mypy: any Module
        return ranks

    def figures(self) -> dict[str, Interval]:
        """Every metric with its interval."""
        counts = self.ranks.compute().cpu().numpy()
        total = int(counts.sum())
        return {
            "top1": wilson(int(counts[0]), total),
            "top5": wilson(int(counts[:5].sum()), total),
            "mrr10": reciprocal_rank(counts),
            "ndcg10": mean_interval(*map(float, self.ndcg.compute()), count=total),
            "recall": mean_interval(*map(float, self.recall.compute()), count=total),
        }

    def top1(self, known: bool) -> dict[str, Any] | None:
        """Top-1 of the queries whose target answers a training query, or of the others; None if there are none."""
        counts = self.known[int(known)].compute()  # type: ignore[operator]
        total = int(counts.sum())
        return {"queries": total, "top1": wilson(int(counts[0]), total)} if total else None


def ceiling(figures: Mapping[str, Any]) -> tuple[str, float]:
    """What bounds the pipeline's Top-1: coverage, or the oracle's Top-1 where that is lower."""
    coverage, oracle = figures["coverage"]["value"], figures["oracle"]
    if oracle is not None and oracle["top1"]["value"] < coverage:
        return "oracle", oracle["top1"]["value"]
    return "coverage", coverage
