"""What validation queries decide after training: temperatures, weights of words, moved keys, a correction for hubs."""

import math
from collections.abc import Iterator, Sequence
from itertools import product
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize
from torch import Tensor

from nvf.data.queries import ALL_SCORES, FEWEST_QUERIES, Pairs, QueryBatch, blocks, each
from nvf.models.alignment import Alignment
from nvf.models.attention import SoftAttention
from nvf.models.evidence import evenly
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline
from nvf.models.words import CHANNELS
from nvf.ops.cross_entropy import mean_of
from nvf.ops.products import QUERY_BLOCK
from nvf.ops.ranks import DEEPEST, are_targets, criterion, ndcg10

BETA_RANGE = (0.1, 1000.0)  # inverse temperatures: the least is nearly uniform, the largest picks the best row
FACTOR_RANGE = (0.01, 100.0)  # by which the reranker's scores may be multiplied
STRENGTHS = (0.0, 0.5, 1.0, 2.0, 4.0)  # of the move of keys towards logged queries
PRIOR = 3.0  # nats that a deviation of evidence may be worth, by a standard deviation of the prior
ALONE = 64  # rows that stage 1 finds without words, among which their weights are fitted
SHRINKAGES = (0.3, 30.0)  # of the variances of queries of another model: they are whitened, or nearly left as they are
RIDGES = (0.03, 0.1, 0.3, 1.0, 3.0)  # strengths of the ridge from rows to queries of another model
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)  # of the rows' hubness that may be subtracted


def fit_temperature(attention: SoftAttention, batch: QueryBatch) -> None:
    """Set beta to the minimum of the loss over held-out queries, of which the first suffice over a large memory.

    Training keeps the weights with the best Top-1, whose probabilities need not be right. The order of rows stays.
    """
    rows = len(attention.memory)
    count = max(FEWEST_QUERIES, min(256, 2**26 // rows), ALL_SCORES // rows)  # 2**26 scores are 256 MB of float32
    batch = each(batch, itemgetter(slice(count)))
    with torch.no_grad():
        logits, beta = attention(batch.queries, batch.words), float(attention.beta)  # (B, N)
        right = mean_of(logits.gather(-1, batch.targets.clamp(min=0)), batch.targets >= 0).unsqueeze(-1)
        factor = _best_factor(logits, right, (BETA_RANGE[0] / beta, BETA_RANGE[1] / beta))
        attention.log_beta.add_(math.log(factor))


@torch.no_grad()
def align(
    memory: VectorMemory,
    log: QueryBatch,
    pairs: Pairs | None,
    *,
    by: Sequence[str],
    shrinkage: float,
    strengths: Sequence[float] = RIDGES,
) -> Iterator[tuple[float, VectorMemory]]:
    """Yield each strength of the ridge, and a memory whose rows are aligned with queries of another model by it.

    Queries are whitened with this `shrinkage`. The ridge is fitted `by` what is named: `log`, each target with its
    query, and `pairs`, (P, D) and (P, Dq), texts that were embedded by both models.
    """
    query, place = (log.targets >= 0).nonzero(as_tuple=True)
    known: Any = {"log": (memory.take(log.targets[query, place]), log.queries[query]), "pairs": pairs}
    given = [known[name] for name in by]
    start = Alignment.whitening_of(log.queries, memory.rows, shrinkage)
    for strength, fitted in zip(strengths, start.fit(given, strengths), strict=True):
        yield strength, memory.aligned_with(start.with_map(fitted))


def fit_alignment(
    memory: VectorMemory, log: QueryBatch, held_out: QueryBatch, pairs: Pairs | None, *, bank: int | None = None
) -> tuple[VectorMemory, dict[str, Any]]:
    """Return the memory of those that `align` yields that validates best, and how it was aligned.

    Half of the keys' hubness is subtracted where they are compared. With pairs, the log may be left out.
    """
    best, kept, how = -1.0, memory, {}
    sources = [["log"]] if pairs is None else [["pairs"], ["pairs", "log"]]
    for by, shrinkage in product(sources, SHRINKAGES):
        for strength, aligned in align(memory, log, pairs, by=by, shrinkage=shrinkage):
            attention = SoftAttention(aligned, transform="identity")
            fit_hub_correction(attention, log.queries, held_out, shares=(0.5,), bank=bank)
            found = float(quality(attention, held_out).double().mean())
            if found > best:
                best, kept, how = found, aligned, {"by": by, "shrinkage": shrinkage, "strength": strength}
    return kept, how


@torch.no_grad()
def move_keys(
    attention: SoftAttention,
    log: QueryBatch,
    held_out: QueryBatch,
    *,
    strengths: Sequence[float] = STRENGTHS,
    bank: int | None = None,
) -> float:
    """Move each row's key towards the logged queries that it answers, as far as validates best; return how far.

    A row with n logged queries, z transformed, has delta = strength sum(z - mean of all z) / (n + 1): few queries move
    it less than many, and what all queries have in common moves none. Half of the keys' hubness is subtracted where
    strengths are compared, and a strength is not taken that is clearly worse than none on rows without logged queries.
    """
    assert attention.delta is not None
    moved, targets = attention.moved(log.queries), log.targets
    query, place = (targets >= 0).nonzero(as_tuple=True)
    rows = targets[query, place]
    of_rows = torch.bincount(rows, minlength=len(attention.memory))
    new = ~((held_out.targets >= 0) & (of_rows > 0)[held_out.targets]).any(dim=-1)  # (B,)
    counts = (of_rows if attention.moving is None else of_rows[attention.moving]).unsqueeze(-1)
    sums = torch.zeros_like(attention.delta)
    sums.index_add_(0, attention.places()[rows], (moved - moved.mean(dim=0))[query])
    qualities: dict[float, Tensor] = {}
    for strength in strengths:
        attention.delta.copy_(strength * sums / (counts + 1))
        fit_hub_correction(attention, log.queries, held_out, shares=(0.5,), bank=bank)
        found = quality(attention, held_out)
        if not qualities or not clearly_above(next(iter(qualities.values()))[new], found[new]):
            qualities[strength] = found
    attention.bias = None
    best = max(qualities, key=lambda strength: float(qualities[strength].double().sum()))
    attention.delta.copy_(best * sums / (counts + 1))
    if not best:
        attention.delta = attention.moving = None  # frozen keys, which take no room
    return best


def fit_words(attention: SoftAttention, held_out: QueryBatch, channels: Sequence[str] = CHANNELS) -> None:
    """Set the weights of words to those with the least loss on held-out queries, or to zero if they do not help.

    The loss is that of a softmax over the rows that the words list and the ALONE best of stage 1, on the queries whose
    target is one of them. It is convex in the weights and stage 1's temperature. A normal prior, PRIOR wide, on each
    weight times the deviation of its scores keeps the weights finite where every held-out query is answered right.
    """
    zero = torch.zeros(len(CHANNELS), device=attention.log_beta.device)
    attention.word_weights = zero
    without, parts = quality(attention, held_out), []
    for queries, targets, words, *_ in blocks(held_out, QUERY_BLOCK):
        assert words is not None
        with torch.no_grad():
            alone = attention.candidates(queries, min(ALONE, len(attention.memory))).rows
            again = (alone.unsqueeze(-1) == words.rows.unsqueeze(1)).any(dim=-1)
            rows = torch.cat([words.rows, alone.masked_fill(again, -1)], dim=-1)
            logits = attention.logits_of(attention.project(queries), rows)
            evidence = torch.cat([logits.unsqueeze(-1), words.of(rows)], dim=-1)  # (b, r, 3)
            right = are_targets(rows, targets) & (rows >= 0)  # both are padded with -1
            parts.append((evidence.double().cpu(), right.cpu()))
    evidence, right = (torch.cat(of_all) for of_all in zip(*parts, strict=True))
    evidence, right = evidence[right.any(dim=-1)], right[right.any(dim=-1)]
    padding = evidence[..., 0].isneginf()
    evidence = evidence.masked_fill(padding.unsqueeze(-1), 0)
    spread = evidence[~padding].std(dim=0, correction=0)  # (3,)

    def loss(weights: np.ndarray) -> tuple[float, np.ndarray]:
        given = torch.tensor(weights, requires_grad=True)
        scores = (evidence @ given).masked_fill(padding, -math.inf)
        value = (scores.logsumexp(dim=-1) - mean_of(scores, right)).mean()
        value = value + (given * spread / PRIOR).square().sum() / (2 * len(right))
        (slope,) = torch.autograd.grad(value, given)
        return float(value.detach()), slope.numpy()

    if len(right):
        bounds = [(1e-3, None), *((0, None if channel in channels else 0) for channel in CHANNELS)]
        found = minimize(loss, [1.0, *(0.1 * (channel in channels) for channel in CHANNELS)], jac=True, bounds=bounds).x
        attention.word_weights = zero + torch.tensor(found[1:] / found[0]).to(zero) / attention.beta.detach()
        if float(quality(attention, held_out).double().sum()) <= float(without.double().sum()):
            attention.word_weights = zero


@torch.no_grad()
def fit_sharpness(pipeline: Pipeline, batch: QueryBatch) -> float:
    """Scale the reranker's scores to the minimum of the pipeline's loss over held-out queries; return the factor.

    This is temperature scaling (arXiv 1706.04599), which reorders nothing. Only queries with a right candidate count.
    """
    pipeline.eval()
    scores, labels = [], []
    for queries, targets, words, *_ in blocks(batch, QUERY_BLOCK):
        top = pipeline.attention.candidates(queries, pipeline.k, logsumexp=True, words=words)
        scores.append(pipeline.scores_of(queries, top, words))
        labels.append(are_targets(top.rows, targets))
    of_all, right = torch.cat(scores), torch.cat(labels)
    covered = right.any(dim=-1)
    if not covered.any():
        return 1.0
    factor = _best_factor(of_all[covered], mean_of(of_all, right)[covered].unsqueeze(-1), FACTOR_RANGE)
    pipeline.reranker.sharpen(factor)
    return factor


def _best_factor(scores: Tensor, right: Tensor, within: tuple[float, float]) -> float:
    """Find the factor f with the least loss, by bisection on the sign of the loss's slope in log f.

    The loss is the sum over queries of logsumexp(f scores) - f right, plus (log f)^2 / 2, a normal prior on log f.
    Without a prior, f would be infinite where every query is answered right (doi 10.1214/08-AOAS191). The scores are
    (B, n), and change; `right`, (B, 1), is the mean score of each query's right rows.
    """
    largest = scores.amax(dim=-1, keepdim=True)  # subtracted, or rounding would swallow the slope
    right_sum = float((right - largest).sum(dtype=torch.float64))
    parts = scores.sub_(largest).split(max(1, ALL_SCORES // scores.shape[1]))
    low, high = (math.log(end) for end in within)
    for _ in range(20):
        middle = (low + high) / 2
        factor = math.exp(middle)
        weighted = ((factor * part).softmax(dim=-1).mul_(part).nan_to_num_(0.0) for part in parts)
        slope = factor * (sum(float(part.sum(dtype=torch.float64)) for part in weighted) - right_sum) + middle
        low, high = (middle, high) if slope < 0 else (low, middle)
    return math.exp((low + high) / 2)


@torch.no_grad()
def quality(model: SoftAttention | Pipeline, batch: QueryBatch, by: str | None = None) -> Tensor:
    """Return each query's Top-1 or nDCG@10, (B,); `by` is `top1`, `ndcg10`, or None for what `criterion` chooses."""
    model.eval()
    by, parts = by or criterion(batch.targets), list[Tensor]()
    how: dict[str, Any] = {} if isinstance(model, Pipeline) else {"logsumexp": False}  # a stage 1 does without
    for queries, targets, words, gains, _ in blocks(batch, QUERY_BLOCK):
        top = model.ranked(queries, targets, DEEPEST if by == "ndcg10" else 1, words, **how)[-1]
        parts.append(ndcg10(top.rows, targets, gains) if by == "ndcg10" else top.ranks == 1)
    return torch.cat(parts)


def clearly_above(quality: Tensor, reference: Tensor) -> bool:
    """Return whether a quality, (B,), exceeds a reference's by two standard errors of the paired difference.

    If the two are equally good, each query's difference d is as likely to have the other sign, so the sum over queries
    has the variance sum d^2. For Top-1, that is the number of wins and losses.
    """
    difference = quality.double() - reference.double()
    return float(difference.sum()) > 2 * math.sqrt(float(difference.square().sum()))


@torch.no_grad()
def fit_hub_correction(
    attention: SoftAttention,
    logged: Tensor,
    held_out: QueryBatch,
    *,
    shares: Sequence[float] = SHARES,
    cautious: bool = False,
    bank: int | None = None,
) -> float:
    """Subtract from stage 1's scores the share of the rows' hubness that validates best; return the share.

    Hubness is measured on so many of the logged queries, (n, D), a `bank`, or on all. With `cautious`, the first share
    is kept unless another is clearly above it.
    """
    attention.bias = None
    asked = logged[evenly(len(logged), bank).to(logged.device)]
    hubs = attention.memory.hubness(attention.transformed(asked), attention.keys(), attention.beta)
    best, qualities = 0, []
    for share in shares if len(shares) > 1 else ():
        attention.bias = -share * hubs if share else None
        qualities.append(quality(attention, held_out))
    if qualities:
        best = max(range(len(shares)), key=lambda place: float(qualities[place].double().sum()))
    if cautious and not clearly_above(qualities[best], qualities[0]):
        best = 0
    attention.bias = -shares[best] * hubs if shares[best] else None
    attention.hubs = [shares[best], float(attention.beta)] if shares[best] else None
    return shares[best]
