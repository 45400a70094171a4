"""Every figure next to its baseline, its interval and its ceiling; the gradient audit."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor, nn
from tqdm import tqdm

from nvf.attention import SoftAttention, attention_loss
from nvf.memory import SCORE_BLOCK
from nvf.metrics import DEEPEST, Agreement, MeanAndError, RankCounts, are_targets, ndcg, recall, target_ranks
from nvf.pipeline import Pipeline
from nvf.queries import QueryBatch, blocks

METHODS = ("exact", "oracle", "attention", "pipeline")
METRICS = {"top1": "Top-1", "top5": "Top-5", "mrr10": "MRR@10", "ndcg10": "nDCG@10", "recall": "Recall@k"}
RESAMPLES = 2000
AUDITED = 256  # queries

Interval = dict[str, float]


@torch.no_grad()
def evaluate(
    model: SoftAttention | Pipeline,
    batch: QueryBatch,
    *,
    k: int,
    oracle: Tensor | None,
    seen: Tensor | None = None,
    title: str = "evaluation",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of exact search, the oracle, stage 1 and, if the model is a pipeline, both stages together.

    Args:
        model: stage 1 alone, or the pipeline.
        batch: the queries and targets to report on.
        k: the number of candidates that coverage and recall count.
        oracle: rows (N, D) that an informed search would use; None where nobody knows them.
        seen: which rows answer a training query, (N,) bool; None where that is no question.
        title: of the progress bar.

    Returns:
        The blocks `test` and `against_exact` of results.json: shares in 0..1, None for what does not exist.
    """
    attention = model.attention if isinstance(model, Pipeline) else model
    rows = attention.memory.rows
    missing = {"oracle"} if oracle is None else set()
    missing |= set() if isinstance(model, Pipeline) else {"pipeline"}
    counted = {method: _Counts(k).to(rows.device) for method in METHODS if method not in missing}
    if oracle is rows:
        counted["oracle"] = counted["exact"]
    covered, against = RankCounts().to(rows.device), Agreement().to(rows.device)  # ranks of covered targets alone
    model.eval()
    size = max(1, min(1024, SCORE_BLOCK // len(rows)))
    for queries, targets in tqdm(blocks(batch, size), title, leave=False, delay=3):
        known = None if seen is None else ((targets >= 0) & seen[targets]).any(dim=-1)
        scores = {"exact": F.normalize(queries, dim=-1) @ rows.T}
        if oracle is not None and oracle is not rows:
            scores["oracle"] = queries @ oracle.T
        if isinstance(model, Pipeline):
            found = model(queries)
            scores["attention"], scores["pipeline"], candidates = found.logits, found.log_probs, found.candidates
        else:
            scores["attention"] = model(queries)
            candidates = scores["attention"].topk(k, dim=-1).indices
        ranks = {method: counted[method].update(scores[method], targets, known) for method in scores}
        best = ranks["pipeline" if "pipeline" in ranks else "attention"]
        covered.update(best[are_targets(candidates, targets).any(dim=-1)])
        against.update(best == 1, ranks["exact"] == 1)

    figures: dict[str, Any] = {method: counted[method].figures() if method in counted else None for method in METHODS}
    for name, of in (("seen_rows", True), ("unseen_rows", False)):
        figures[name] = None if seen is None else {method: counted[method].top1(of) for method in counted}
    right, found_at_all = int(covered.compute()[0]), int(covered.compute().sum())
    figures["coverage"] = wilson(found_at_all, len(batch.queries))
    reranked = figures["pipeline"] is not None
    figures["rerank_given_coverage"] = wilson(right, found_at_all) if reranked and found_at_all else None
    figures["gap_closed"] = gap_closed(figures) if reranked else None
    wins, losses = (int(count) for count in against.compute())
    return figures, {"wins": wins, "losses": losses, "p": mcnemar(wins, losses)}


class _Counts(nn.Module):
    """What is counted of one method, over batches."""

    def __init__(self, k: int) -> None:
        super().__init__()
        self.k = k
        self.ranks, self.ndcg, self.recall = RankCounts(), MeanAndError(), MeanAndError()
        self.known = nn.ModuleList([RankCounts(), RankCounts()])  # of rows not in the log, and of rows in it

    def update(self, scores: Tensor, targets: Tensor, known: Tensor | None) -> Tensor:
        """Count a batch's scores, (B, N), of which `known` says whose target answers a training query; its ranks."""
        ranks = target_ranks(scores, targets)
        self.ranks.update(ranks)
        gains = are_targets(scores.topk(min(max(self.k, DEEPEST), scores.shape[1])).indices, targets)
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
            "ndcg10": _around(*self.ndcg.compute()),
            "recall": _around(*self.recall.compute()),
        }

    def top1(self, known: bool) -> dict[str, Any] | None:
        """Top-1 of the queries whose target answers a training query, or of the others; None if there are none."""
        counts = self.known[int(known)].compute()  # type: ignore[operator]
        total = int(counts.sum())
        return {"queries": total, "top1": wilson(int(counts[0]), total)} if total else None


def wilson(successes: int, total: int) -> Interval:
    """A share with its Wilson 95% interval."""
    interval = binomtest(successes, total).proportion_ci(confidence_level=0.95, method="wilson")
    return {"value": successes / total, "low": float(interval.low), "high": float(interval.high)}


def mcnemar(wins: int, losses: int) -> float:
    """The exact McNemar test's two-sided p: wins and losses as fair coin flips; 1 where there are none."""
    return float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0


def reciprocal_rank(counts: np.ndarray, *, resamples: int = RESAMPLES) -> Interval:
    """MRR@10 with its percentile bootstrap 95% interval.

    Resampling queries is a multinomial draw of the rank counts, (11,), so no query is kept; the draw has a fixed seed.
    """
    weights = np.append(1 / np.arange(1, DEEPEST + 1), 0.0)
    total = counts.sum()
    draws = np.random.default_rng(0).multinomial(total, counts / total, size=resamples) @ weights / total
    low, high = np.quantile(draws, [0.025, 0.975])
    return {"value": float(counts @ weights / total), "low": float(low), "high": float(high)}


def ceiling(figures: Mapping[str, Any]) -> tuple[str, float]:
    """What bounds the pipeline's Top-1: coverage, or the oracle's Top-1 where that is lower."""
    coverage, oracle = figures["coverage"]["value"], figures["oracle"]
    if oracle is not None and oracle["top1"]["value"] < coverage:
        return "oracle", oracle["top1"]["value"]
    return "coverage", coverage


def gap_closed(figures: Mapping[str, Any]) -> float | None:
    """The share of the Top-1 gap between stage 1 and the ceiling that the pipeline closed; None without a gap."""
    start, end = figures["attention"]["top1"]["value"], figures["pipeline"]["top1"]["value"]
    gap = ceiling(figures)[1] - start
    return (end - start) / gap if gap > 0 else None


def audit_gradients(model: SoftAttention | Pipeline, batch: QueryBatch) -> dict[str, Any]:
    """Norms of the gradient of the model's loss on the first queries of a batch and on every parameter.

    Returns:
        `query` and one norm per parameter under `parameters`, None where it is not finite; `finite`, whether all are;
        `vanished`, the names whose norm is zero.
    """
    model.eval()
    queries = batch.queries[:AUDITED].clone().requires_grad_(True)
    named = dict(model.named_parameters())
    frozen = [parameter for parameter in named.values() if not parameter.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    found = model(queries)
    logits = found.log_probs if isinstance(model, Pipeline) else found
    gradients = torch.autograd.grad(attention_loss(logits, batch.targets[:AUDITED]), [queries, *named.values()])
    for parameter in frozen:
        parameter.requires_grad_(False)
    values = [float(gradient.norm()) for gradient in gradients]
    norms = {n: v if math.isfinite(v) else None for n, v in zip(["query", *named], values, strict=True)}
    return {
        "query": norms.pop("query"),
        "parameters": norms,
        "finite": all(math.isfinite(value) for value in values),
        "vanished": [name for name, norm in norms.items() if norm == 0],
    }


def _around(mean: Tensor, error: Tensor) -> Interval:
    """A mean in 0..1 with its normal 95% interval."""
    value, reach = float(mean), 1.96 * float(error)
    return {"value": value, "low": max(0.0, value - reach), "high": min(1.0, value + reach)}
