"""Every figure next to its baseline, its interval and its ceiling; the gradient audit; the table."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from scipy.stats import binomtest
from torch import Tensor
from tqdm import tqdm

from nvf.attention import SoftAttention, attention_loss
from nvf.memory import SCORE_BLOCK
from nvf.metrics import DEEPEST, Agreement, RankCounts, are_targets, target_ranks
from nvf.pipeline import Pipeline
from nvf.queries import QueryBatch, blocks

METHODS = ("exact", "oracle", "attention", "pipeline")
METRICS = {"top1": "Top-1", "top5": "Top-5", "mrr10": "MRR@10"}
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
    title: str = "evaluation",
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of exact search, the oracle, stage 1 and, if the model is a pipeline, both stages together.

    Args:
        model: stage 1 alone, or the pipeline.
        batch: the queries and targets to report on.
        k: the number of candidates that coverage counts.
        oracle: rows (N, D) that an informed search would use; None where nobody knows them.
        title: of the progress bar.

    Returns:
        The blocks `test` and `against_exact` of results.json: shares in 0..1, None for what does not exist.
    """
    attention = model.attention if isinstance(model, Pipeline) else model
    rows = attention.memory.rows
    missing = {"oracle"} if oracle is None else set()
    missing |= set() if isinstance(model, Pipeline) else {"pipeline"}
    ranks = {method: RankCounts().to(rows.device) for method in METHODS if method not in missing}
    covered, against = RankCounts().to(rows.device), Agreement().to(rows.device)  # ranks of covered targets alone
    model.eval()
    size = max(1, min(1024, SCORE_BLOCK // len(rows)))
    for queries, targets in tqdm(blocks(batch, size), title, leave=False, delay=3):
        exact = target_ranks(F.normalize(queries, dim=-1) @ rows.T, targets)
        ranks["exact"].update(exact)
        if oracle is not None:
            ranks["oracle"].update(exact if oracle is rows else target_ranks(queries @ oracle.T, targets))
        if isinstance(model, Pipeline):
            found = model(queries)
            logits, candidates = found.logits, found.candidates
            best = target_ranks(found.log_probs, targets)
            ranks["pipeline"].update(best)
        else:
            logits = model(queries)
            candidates = logits.topk(k, dim=-1).indices
            best = target_ranks(logits, targets)
        ranks["attention"].update(target_ranks(logits, targets))
        covered.update(best[are_targets(candidates, targets).any(dim=-1)])
        against.update(best == 1, exact == 1)

    counts = {method: metric.compute().cpu().numpy() for method, metric in ranks.items()}
    figures: dict[str, Any] = {method: _figures(counts[method]) if method in counts else None for method in METHODS}
    right, found_at_all = int(covered.compute()[0]), int(covered.compute().sum())
    figures["coverage"] = wilson(found_at_all, len(batch.queries))
    reranked = figures["pipeline"] is not None
    figures["rerank_given_coverage"] = wilson(right, found_at_all) if reranked and found_at_all else None
    figures["gap_closed"] = gap_closed(figures) if reranked else None
    wins, losses = (int(count) for count in against.compute())
    return figures, {"wins": wins, "losses": losses, "p": mcnemar(wins, losses)}


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


def table(results: Mapping[str, Any], queries: int) -> str:
    """What a run prints: a row a method, in percent with 95% intervals, and below it what bounds the pipeline."""
    figures, against = results["test"], results["against_exact"]
    names = {"exact": "exact search", "oracle": "oracle", "attention": "stage 1", "pipeline": "pipeline"}
    lines = [
        f"test queries: {queries:,}; percent (95% interval)",
        "".ljust(14) + "".join(title.ljust(20) for title in METRICS.values()).rstrip(),
    ]
    for method, name in names.items():
        if figures[method] is not None:
            lines.append(name.ljust(14) + "".join(_percent(figures[method][m]).ljust(20) for m in METRICS).rstrip())
    lines.append("coverage".ljust(26) + _percent(figures["coverage"]) + "  target among the candidates")
    if figures["rerank_given_coverage"] is not None:
        lines.append("reranker given coverage".ljust(26) + _percent(figures["rerank_given_coverage"]))
    if figures["gap_closed"] is not None:
        name, value = ceiling(figures)
        lines.append(
            "gap closed".ljust(26)
            + f"{100 * figures['gap_closed']:.1f}".ljust(6)
            + f"of stage 1 to {name} {100 * value:.1f}"
        )
    lines.append(
        "against exact search".ljust(26)
        + f"{against['wins']} queries won, {against['losses']} lost (McNemar p = {against['p']:.2g})"
    )
    return "\n".join(lines)


def remarks(results: Mapping[str, Any]) -> list[str]:
    """One plain line for each thing that is not as it should be, with what to try."""
    figures, lines = results["test"], []
    exact, attention, pipeline = (
        figures[m] and figures[m]["top1"]["value"] for m in ("exact", "attention", "pipeline")
    )
    if pipeline is not None and pipeline < attention:
        lines.append(
            f"The pipeline ({100 * pipeline:.1f}) is below stage 1 ({100 * attention:.1f}): "
            "try reranker=residual, more reranker.epochs or a lower reranker.lr."
        )
    if attention < exact:
        remedy = (
            "exact search is the oracle of these queries, so no method can beat it."
            if figures["oracle"] == figures["exact"]
            else "try attention=linear or attention=residual, which start at exact search, or a lower attention.lr."
        )
        lines.append(f"Stage 1 ({100 * attention:.1f}) is below exact search ({100 * exact:.1f}): {remedy}")
    gradients = results.get("gradients")
    if gradients and not gradients["finite"]:
        lines.append("A gradient is not finite: lower the learning rates.")
    if gradients and gradients["vanished"]:
        lines.append(
            f"No gradient reaches {', '.join(gradients['vanished'])}: the untrained start validated best, "
            "or the units died; a lower learning rate may help."
        )
    return lines


def _figures(counts: np.ndarray) -> dict[str, Interval]:
    total = int(counts.sum())
    return {
        "top1": wilson(int(counts[0]), total),
        "top5": wilson(int(counts[:5].sum()), total),
        "mrr10": reciprocal_rank(counts),
    }


def _percent(interval: Interval) -> str:
    return f"{100 * interval['value']:5.1f} ({100 * interval['low']:.1f}-{100 * interval['high']:.1f})"
