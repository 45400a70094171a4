"""Every figure of a model next to its baseline, its interval and its ceiling."""

import time
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from nvf import statistics
from nvf.data.queries import QueryBatch, blocks
from nvf.evaluation.report import NAMES, ceiling
from nvf.models.ann_index import approximate_topk
from nvf.models.attention import SoftAttention
from nvf.models.memory import unit
from nvf.models.pipeline import Pipeline
from nvf.models.words import CHANNELS, WordScores
from nvf.ops.products import QUERY_BLOCK
from nvf.ops.ranks import DEEPEST, are_targets, best_target, ndcg10, recall
from nvf.ops.topk import TopK, blockwise_topk, first_topk, is_ahead
from nvf.statistics import Interval, mean_interval, wilson

METHODS = tuple(NAMES)
BINS = 15  # of confidence, equally wide
ROUNDING = 1e-5  # cosines that differ by less count as equal


class Outcomes(NamedTuple):
    """What each method answers to each of B queries; the dictionaries' keys are those of METHODS that there are."""

    targets: Tensor  # (B, m) rows, padded with -1
    candidates: Tensor  # (B, k) rows, in stage 1's order
    ranks: dict[str, Tensor]  # (B,), the rank of the best-ranked target, from 1
    ndcg: dict[str, Tensor]  # (B,), nDCG@10
    recall: dict[str, Tensor]  # (B,), the share of the targets that are among the first k rows
    confidences: dict[str, Tensor]  # (B,), the probability of the most probable row, by stage 1 and the pipeline
    probabilities: dict[str, Tensor]  # (B, k), of the candidates, by stage 1 and the pipeline

    @property
    def right(self) -> Tensor:
        """Which candidates are targets, (B, k) bool."""
        return are_targets(self.candidates, self.targets)

    @property
    def compared(self) -> tuple[str, str]:
        """The model's last stage, and the method before it."""
        return ("pipeline", "attention") if "pipeline" in self.ranks else ("attention", self.reference)

    @property
    def reference(self) -> str:
        """The search without training that a model is compared with."""
        return "exact" if "exact" in self.ranks else "aligned"

    def share_right(self, method: str) -> Tensor:
        """For each query, (B,), 1 / m if the first answer is one of its m targets, else 0."""
        return (self.ranks[method] == 1) / (self.targets >= 0).sum(dim=-1)


class Evaluation(NamedTuple):
    """What a model reaches on some queries: shares in 0..1, None for what does not exist."""

    figures: dict[str, Any]  # the block `test` of results.json
    against_exact: dict[str, Any]  # queries won and lost against exact search, or `Outcomes.reference`, and McNemar's p
    outcomes: Outcomes

    @property
    def answered(self) -> Tensor:
        """Whether the model ranks a target of each query first, (B,) bool."""
        return self.outcomes.ranks[self.outcomes.compared[0]] == 1


@torch.no_grad()
def evaluate(
    model: SoftAttention | Pipeline,
    batch: QueryBatch,
    *,
    k: int,
    oracle: Tensor | None,
    seen: Tensor | None = None,
    hybrid: SoftAttention | None = None,
    references: Mapping[str, tuple[Tensor, Tensor]] | None = None,
    title: str = "evaluation",
) -> Evaluation:
    """Compute the figures of exact search, the oracle, stage 1 and, if the model is a pipeline, both stages together.

    Coverage and recall count the first k candidates. The oracle is the rows, (N, D), that an informed search would use,
    None if they are unknown; `seen`, (N,) bool, says which rows answer a training query, None if that is unknown.
    `hybrid` is exact search with words, which is a baseline where there are texts, as words alone are. `references` are
    further searches: for each name in METHODS, queries, (B, D'), and rows, (N, D').
    """
    model.eval()
    start, parts = 0, []
    for block in tqdm(blocks(batch, QUERY_BLOCK), title, leave=False, delay=3, disable=None):
        end = start + len(block.queries)
        others = {name: (asked[start:end], rows) for name, (asked, rows) in (references or {}).items()}
        parts.append(_answer(model, block, k=k, oracle=oracle, hybrid=hybrid, references=others))
        start = end
    outcomes = Outcomes(*(_joined(of_blocks) for of_blocks in zip(*parts, strict=True)))
    answered = {method: ranks == 1 for method, ranks in outcomes.ranks.items()}
    last, covered = outcomes.compared[0], outcomes.right.any(dim=-1)
    count, right, reranked = int(covered.sum()), int((answered[last] & covered).sum()), last == "pipeline"
    figures: dict[str, Any] = {method: _figures(outcomes, method) for method in METHODS}
    figures["seen_rows"] = figures["unseen_rows"] = None
    if seen is not None:
        known = ((batch.targets >= 0) & seen[batch.targets]).any(dim=-1).cpu()
        figures["seen_rows"], figures["unseen_rows"] = _top1_of(known, answered), _top1_of(~known, answered)
    figures["coverage"] = wilson(count, len(covered))
    figures["rerank_given_coverage"] = wilson(right, count) if reranked and count else None
    bound = {**answered, "coverage": covered}[ceiling(figures)[0]]
    compared = (of.numpy() for of in (answered["attention"], answered[last], bound))
    closed = statistics.gap_closed(*compared) if reranked else None
    figures["gap_closed"], figures["gap_closed_interval"] = closed and closed["value"], closed
    figures["calibration_error"] = {
        method: calibration_error(confidences, outcomes.share_right(method))
        for method, confidences in outcomes.confidences.items()
    }
    if "anew" in outcomes.ranks:
        first_ten = [outcomes.ranks[method] <= 10 for method in (last, "anew")]
        figures["recovery"] = statistics.share_of(*(of.numpy() for of in first_ten))
    return Evaluation(figures, against(answered[last], answered[outcomes.reference]), outcomes)


def _answer(
    model: SoftAttention | Pipeline,
    batch: QueryBatch,
    *,
    k: int,
    oracle: Tensor | None,
    hybrid: SoftAttention | None,
    references: Mapping[str, tuple[Tensor, Tensor]],
) -> Outcomes:
    queries, targets, words, worth, _ = batch
    rows, memory, depth = model.memory.rows, model.memory, max(k, DEEPEST)
    first = "exact" if memory.alignment is None else "aligned"
    searches = {first: (memory.aligned_queries(unit(queries)), memory.keys), **references}
    if oracle is not None and oracle is not rows:
        searches["oracle"] = (queries, oracle)
    tops = {}
    for name, both in searches.items():
        asked, keys = (part.to(rows.device) for part in both)
        tops[name] = memory.ranked(asked, keys, targets, min(depth, len(rows)))
    if hybrid is not None and words is not None:
        tops["words"] = _by_words(words, targets, min(depth, len(rows)))
        (tops["hybrid"],) = hybrid.ranked(queries, targets, depth, words)
    said: Any = model.ranked(queries, targets, depth, words)
    tops |= zip(("attention", "pipeline"), said, strict=False)
    width = model.k if isinstance(model, Pipeline) else k
    ranks: dict[str, Any] = {method: top.ranks for method, top in tops.items()}
    gains = {method: ndcg10(top.rows, targets, worth) for method, top in tops.items()}
    recalls = {method: recall(are_targets(top.rows[:, :k], targets), targets) for method, top in tops.items()}
    if oracle is rows:
        for measure in (ranks, gains, recalls):
            measure["oracle"] = measure["exact"]
    candidates, confidences, probabilities = tops["attention"].rows[:, :width], {}, {}
    for method, top in zip(("attention", "pipeline"), said, strict=False):
        places = (candidates.unsqueeze(-1) == top.rows.unsqueeze(1)).int().argmax(dim=-1)
        probable = (top.scores - top.logsumexp.unsqueeze(-1)).exp().clamp(max=1)
        confidences[method], probabilities[method] = probable.amax(dim=-1), probable.gather(-1, places)
    return Outcomes(targets, candidates, ranks, gains, recalls, confidences, probabilities)


def _by_words(words: WordScores, targets: Tensor, k: int) -> TopK:
    """Return the k best rows by the words of their texts alone, where rows that are not listed have scores of 0."""
    channel, listed = CHANNELS.index("text"), words.rows >= 0
    best, first = best_target(words.of(targets)[..., channel], targets)
    scores = words.scores[..., channel].masked_fill(~listed, -torch.inf)
    ahead = is_ahead(scores, words.rows, best.unsqueeze(-1), first.unsqueeze(-1)) & listed
    others = first - (listed & (words.rows < first.unsqueeze(-1))).sum(dim=-1)  # which tie with a score of 0
    few = torch.arange(k, device=targets.device).expand(len(targets), -1)
    again = (few.unsqueeze(-1) == words.rows.unsqueeze(1)).any(dim=-1)
    rows, order = torch.cat([words.rows, few], dim=-1).sort(dim=-1)
    scores = torch.cat([scores, torch.zeros_like(few, dtype=scores.dtype).masked_fill(again, -torch.inf)], dim=-1)
    scores = scores.gather(-1, order)
    places = first_topk(scores, k)
    ranks = 1 + ahead.sum(dim=-1) + others.where(best == 0, 0)
    return TopK(scores.gather(-1, places), rows.gather(-1, places), ranks=ranks)


def _joined(parts: Sequence[Any]) -> Any:
    if isinstance(parts[0], Tensor):
        return torch.cat(list(parts)).cpu()
    return {method: _joined([part[method] for part in parts]) for method in parts[0]}


def _figures(outcomes: Outcomes, method: str) -> dict[str, Interval] | None:
    if method not in outcomes.ranks:
        return None
    ranks = outcomes.ranks[method]
    counts = np.bincount(ranks.clamp(max=DEEPEST + 1).numpy() - 1, minlength=DEEPEST + 1)
    return {
        "top1": wilson(int(counts[0]), len(ranks)),
        "top5": wilson(int(counts[:5].sum()), len(ranks)),
        "mrr10": statistics.reciprocal_rank(counts),
        "ndcg10": _mean(outcomes.ndcg[method]),
        "recall": _mean(outcomes.recall[method]),
    }


def _mean(values: Tensor) -> Interval:
    count, values = len(values), values.double()
    mean = values.sum() / count
    variance = (values.square().sum() / count - mean.square()).clamp(min=0)
    return mean_interval(float(mean), float((variance / count).sqrt()), count=count)


def _top1_of(group: Tensor, answered: Mapping[str, Tensor]) -> dict[str, Any]:
    count = int(group.sum())
    return {
        method: {"queries": count, "top1": wilson(int(right[group].sum()), count)} if count else None
        for method, right in answered.items()
    }


def against(answered: Tensor, reference: Tensor) -> dict[str, Any]:
    """Count the queries that only the method answers, and those that only the reference does; both (B,) bool."""
    wins, losses = statistics.wins_and_losses(answered, reference)
    return {"wins": wins, "losses": losses, "p": statistics.mcnemar(wins, losses)}


@torch.no_grad()
def evaluate_index(pipeline: Pipeline, queries: Tensor, targets: Tensor) -> dict[str, Any]:
    """Compare a pipeline's index with exact search: the block `index` of results.json.

    Recall is the share of the index's candidates that are as near as the k-th exact one. Queries, (B, D), are unit
    vectors; targets, (B, m), are padded with -1.
    """
    index, keys, k, shares = pipeline.index, pipeline.attention.keys(), pipeline.k, []
    assert index is not None
    for block in queries.split(QUERY_BLOCK):
        projected = pipeline.attention.project(block)
        found = approximate_topk(index, projected, keys, k).scores
        worst = blockwise_topk(projected, keys, k).scores[:, -1:]
        shares.append((found >= worst - ROUNDING * projected.norm(dim=-1, keepdim=True)).float().mean(dim=-1))
    rows, rate = _timed_search(pipeline, queries)
    right = int((pipeline.memory.rows_of(rows) == targets).any(dim=-1).sum())
    pipeline.index = None
    exact_rate = _timed_search(pipeline, queries)[1]
    pipeline.index = index
    return {
        "kind": index.kind,
        "settings": index.settings,
        "recall": _mean(torch.cat(shares)),
        "top1": wilson(right, len(queries)),
        "queries_per_second": {"index": rate, "exact": exact_rate},
    }


def _timed_search(pipeline: Pipeline, queries: Tensor) -> tuple[Tensor, float]:
    """Return the most probable row of each query, (B, 1), and the number of queries answered per second."""
    pipeline.search(queries[:1])  # warms up, so that what is computed only once is not timed
    start = time.perf_counter()
    rows = pipeline.search(queries).rows
    return rows[:, :1], len(queries) / (time.perf_counter() - start)


def calibration_error(confidences: Tensor, right: Tensor) -> Interval:
    """Return the expected calibration error (arXiv 1706.04599), with its interval from a bootstrap over queries.

    Confidences, (B,), are the probabilities of each query's most probable row; `right`, (B,), is 1 / m if that row is
    one of the query's m right rows, which share the probability, else 0.
    """
    confidences = confidences.nan_to_num(0).cpu()
    excess = confidences.double() - right.cpu().double()
    bins = (confidences * BINS).ceil().long().sub(1).clamp(0, BINS - 1)  # a bin includes its upper end

    def error(drawn: Tensor) -> Tensor:
        return excess.new_zeros(BINS).index_add(0, bins[drawn], excess[drawn]).abs().sum() / len(drawn)

    generator = torch.Generator().manual_seed(0)
    draws = [torch.randint(len(right), (len(right),), generator=generator) for _ in range(200)]
    spread = float(torch.stack([error(drawn) for drawn in draws]).std())
    return mean_interval(float(error(torch.arange(len(right)))), spread, count=len(right))
