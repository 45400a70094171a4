"""What is fitted to validation queries after training: both temperatures, and a correction of stage 1's hubs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nvf.data.queries import ALL_SCORES, FEWEST_QUERIES, QueryBatch, score_blocks
from nvf.models.attention import SoftAttention
from nvf.models.memory import hubness
from nvf.models.pipeline import Pipeline
from nvf.ops.cross_entropy import mean_of
from nvf.ops.ranks import are_targets, criterion, ndcg_of, target_ranks

BETA_RANGE = (0.1, 1000.0)  # from no preference among unit vectors to the certainty of the best
FACTOR_RANGE = (0.01, 100.0)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
SCORES = 2**26  # that a temperature is fitted to, 256 MB: 256 queries' up to 262,144 rows
CLEAR = 2.0  # standard errors


def fit_temperature(attention: SoftAttention, queries: Tensor, targets: Tensor) -> None:
    """Set beta, within BETA_RANGE, to the minimum of the loss over held-out queries; the order of rows stays.

    Training stops where Top-1 is best, not where the probabilities are right. Of many queries over many rows, some are
    used.
    """
    rows = len(attention.memory)
    count = max(FEWEST_QUERIES, min(256, SCORES // rows), ALL_SCORES // rows)
    queries, targets = queries[:count], targets[:count]
    with torch.no_grad():
        logits, beta = attention(queries), float(attention.beta)  # (B, N)
        right = mean_of(logits.gather(-1, targets.clamp(min=0)), targets >= 0).unsqueeze(-1)
        factor = _best_factor(logits, right, (BETA_RANGE[0] / beta, BETA_RANGE[1] / beta))
        attention.log_beta.add_(math.log(factor))


@torch.no_grad()
def fit_sharpness(pipeline: Pipeline, batch: QueryBatch) -> float:
    """Scale the reranker's scores to the minimum of the pipeline's loss over held-out queries; returns the factor.

    This is temperature scaling (arXiv 1706.04599): no Top-1 changes. Only queries with a right candidate count.
    """
    pipeline.eval()
    scores, labels = [], []
    for queries, targets in score_blocks(batch, len(pipeline.memory)):
        top = pipeline.attention.candidates(queries, pipeline.k, logsumexp=True)
        scores.append(pipeline.rerank(queries, top))
        labels.append(are_targets(top.rows, targets))
    of_all, right = torch.cat(scores), torch.cat(labels)
    if not right.any():
        return 1.0
    valid = right.any(dim=-1)
    factor = _best_factor(of_all[valid], mean_of(of_all, right)[valid].unsqueeze(-1), FACTOR_RANGE)
    pipeline.reranker.sharpen(factor)
    return factor


def _best_factor(scores: Tensor, right: Tensor, within: tuple[float, float]) -> float:
    """Find the factor f with the least loss, by bisection on the sign of the loss's slope in log f.

    The loss is the sum over queries of logsumexp(f scores) - logsumexp(f right), plus (log f)^2 / 2, a normal prior on
    log f. Without a prior, f would be infinite where all held-out queries are answered right (doi 10.1214/08-AOAS191).

    Args:
        scores: (B, n).
        right: (B, m), those of the right ones, padded with -inf.
        within: the least and the largest f.
    """
    largest = scores.amax(dim=-1, keepdim=True)  # taken off, or rounding would swallow the slope
    scores, right = scores - largest, right - largest
    low, high = (math.log(end) for end in within)
    for _ in range(20):
        middle = (low + high) / 2
        factor = math.exp(middle)
        slope = factor * (_expected(scores, factor) - _expected(right, factor)) + middle
        low, high = (middle, high) if slope < 0 else (low, middle)
    return math.exp((low + high) / 2)


def _expected(scores: Tensor, factor: float) -> float:
    """The sum over queries of the scores' expectation under softmax(factor scores), in float64."""
    weighed = (factor * scores).softmax(dim=-1).mul_(scores)
    return float(weighed.nan_to_num_(0.0).sum(dtype=torch.float64))  # 0 * -inf is what padding has


@torch.no_grad()
def quality(model: SoftAttention | Pipeline, batch: QueryBatch, by: str | None = None) -> Tensor:
    """How well each query is answered, (B,): whether its list begins with a target, `top1`, or its nDCG@10, `ndcg10`.

    Unless `by` names one of the two, `criterion` chooses.
    """
    model.eval()
    by, parts = by or criterion(batch.targets), []
    for queries, targets in score_blocks(batch, len(model.memory)):
        scores = model(queries, answer=False).ranking if isinstance(model, Pipeline) else model(queries)
        parts.append(ndcg_of(scores, targets) if by == "ndcg10" else target_ranks(scores, targets) == 1)
    return torch.cat(parts)


def clearly_above(quality: Tensor, reference: Tensor) -> bool:
    """Whether a quality, (B,), exceeds that of a reference by CLEAR standard errors of the paired difference.

    If the two are equally good, each query's difference d is as likely to have the other sign, so the sum of all has
    the variance sum d^2. For Top-1, that is the number of wins and losses.
    """
    difference = quality.double() - reference.double()
    return float(difference.sum()) > CLEAR * math.sqrt(float(difference.square().sum()))


@torch.no_grad()
def fit_hub_correction(
    attention: SoftAttention,
    bank: Tensor,
    held_out: QueryBatch,
    *,
    shares: Sequence[float] = SHARES,
    cautious: bool = False,
) -> float:
    """Set the bias to the share of the rows' hubness whose subtraction validates best; returns the share.

    Args:
        attention: a fitted stage 1; without a bias at a share of 0.
        bank: the training queries, (n, D).
        held_out: validation queries with their targets.
        shares: to choose from; of equally good ones, the first is taken.
        cautious: take the first unless another is clearly above it.
    """
    attention.bias = None
    hubs = hubness(attention.transformed(bank), attention.keys(), attention.beta)
    qualities = []
    for share in shares:
        attention.bias = -share * hubs if share else None
        qualities.append(quality(attention, held_out))
    best = max(range(len(shares)), key=lambda place: float(qualities[place].double().sum()))  # the first of equals
    if cautious and not clearly_above(qualities[best], qualities[0]):
        best = 0
    attention.bias = -shares[best] * hubs if shares[best] else None
    return shares[best]
