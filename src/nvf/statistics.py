"""The intervals and tests of runs and comparisons; without torch, so that a comparison starts fast."""

import math
from collections.abc import Iterable
from typing import Any, TypedDict

import numpy as np
from scipy import stats

METRICS = {"top1": "Top-1", "top5": "Top-5", "mrr10": "MRR@10", "ndcg10": "nDCG@10", "recall": "Recall@k"}
Z = float(stats.norm.ppf(0.975))  # standard errors on either side of a normal 95% interval
SIGNIFICANT = 0.05  # the p value below which a difference is significant
SMALLEST_P = 1e-300  # stands for all smaller p values, which underflow
ROUNDING = 1e-12  # differences below it are rounding errors


class Interval(TypedDict):
    """A figure with its 95% interval; the ends of a share lie in 0..1."""

    value: float
    low: float
    high: float


def wilson(successes: float, total: float) -> Interval:
    """Return a share with its Wilson interval, which is too wide for sums of values other than 0 and 1."""
    value, spread = successes / total, Z**2 / total
    middle = (value + spread / 2) / (1 + spread)
    reach = math.sqrt(spread * (value * (1 - value) + spread / 4)) / (1 + spread)
    return {"value": value, "low": max(0.0, min(value, middle - reach)), "high": min(1.0, max(value, middle + reach))}


def mean_interval(mean: float, error: float, *, count: int) -> Interval:
    """Return the mean of `count` values in 0..1 with its normal interval; Wilson's if all are equal, or all 0 or 1."""
    variance = count * error**2
    if variance < ROUNDING or abs(variance - mean * (1 - mean)) < ROUNDING:
        return wilson(mean * count, count)
    return {"value": mean, "low": max(0.0, mean - Z * error), "high": min(1.0, mean + Z * error)}


def reciprocal_rank(counts: np.ndarray) -> Interval:
    """Return the mean reciprocal rank from the numbers of queries with rank 1, 2, ..., and last of misses."""
    weights, total = np.append(1 / np.arange(1, len(counts)), 0.0), int(counts.sum())
    return _percentiles(float(counts @ weights / total), _resampled(counts) @ weights / total, total)


def gap_closed(start: np.ndarray, end: np.ndarray, ceiling: np.ndarray) -> Interval | None:
    """Return the share of the gap from a start to a ceiling that a method closed, with a paired bootstrap interval.

    Each argument says which queries are answered, (B,) bool: at the start, by the method in the end, at the ceiling.
    Returns None unless the ceiling is significantly above the start, by McNemar's test.
    """
    wins, losses = wins_and_losses(ceiling, start)
    if wins <= losses or mcnemar(wins, losses) >= SIGNIFICANT:
        return None
    before, after, best = (answered.astype(int) for answered in (start, end, ceiling))
    counts = np.bincount(3 * (best - before) + (after - before) + 4, minlength=9)  # the nine kinds of queries
    gaps, gains = np.array(np.divmod(np.arange(9), 3)) - 1  # that one query of each kind adds
    draws = _resampled(counts)
    draws = draws[draws @ gaps > 0]  # nearly all, as the gap is significant
    gap = wins - losses
    return _percentiles(float(counts @ gains) / gap, (draws @ gains) / (draws @ gaps), gap)


def share_of(ours: np.ndarray, theirs: np.ndarray) -> Interval:
    """Return how many queries are answered, as a share of those that a reference answers, with a bootstrap interval.

    Both are (B,) bool, of the same queries. The share may exceed 1; it is 0 where the reference answers none.
    """
    counts = np.bincount(2 * ours.astype(int) + theirs, minlength=4)
    draws = _resampled(counts)
    shares = [(of[..., 2] + of[..., 3]) / np.maximum(of[..., 1] + of[..., 3], 1) for of in (counts, draws)]
    low, high = map(float, np.quantile(shares[1], [0.025, 0.975]))
    return {"value": float(shares[0]), "low": low, "high": high}


def _resampled(counts: np.ndarray) -> np.ndarray:
    """Draw 2,000 bootstrap samples of queries, as counts of each kind, (2000, kinds); always the same ones."""
    return np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), size=2000)


def _percentiles(value: float, draws: np.ndarray, total: int) -> Interval:
    """Return the percentile interval, or Wilson's if all draws are equal."""
    low, high = map(float, np.quantile(draws, [0.025, 0.975]))
    return {"value": value, "low": low, "high": high} if low < high else wilson(value * total, total)


def over_seeds(found: Iterable[Interval | None]) -> Interval | None:
    """Return the mean over runs with Student's t interval, within 0..1; the first run's own if there is no spread."""
    known = [interval for interval in found if interval is not None]
    values = np.array([interval["value"] for interval in known])
    if len(known) < 2 or np.ptp(values) < ROUNDING:
        return known[0] if known else None
    mean, reach = float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return {"value": mean, "low": max(0.0, mean - reach), "high": min(1.0, mean + reach)}


def wins_and_losses(answered: Any, reference: Any) -> tuple[int, int]:
    """Count queries that only the method answers, and those that only the reference does; arrays or tensors of bool."""
    return int((answered & ~reference).sum()), int((~answered & reference).sum())


def mcnemar(wins: int, losses: int) -> float:
    """Return the two-sided p of the exact McNemar test, at least SMALLEST_P; 1 without wins and losses."""
    return max(SMALLEST_P, float(stats.binomtest(wins, wins + losses).pvalue)) if wins + losses else 1.0


def paired_t(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    """Return the paired t-test's two-sided p, at least SMALLEST_P; None if all differences are equal."""
    if np.ptp(ours - theirs) < ROUNDING:
        return None
    return max(SMALLEST_P, float(stats.ttest_rel(ours, theirs).pvalue))


def p_text(p: float) -> str:
    """Return a p value as text, `= 0.012` or `< 1e-300`."""
    return f"= {p:.2g}" if p > SMALLEST_P else f"< {SMALLEST_P:g}"


def percent(share: float) -> str:
    """Return a share in percent; only all is 100.0 and only nothing 0.0: others round to >99.9 and <0.1."""
    text = f"{100 * share:.1f}"
    if text == "100.0" and share < 1:
        return ">99.9"
    return "<0.1" if text == "0.0" and share > 0 else text


def in_percent(interval: Interval) -> str:
    """Return a figure with its interval in percent, ` 75.0 (72.2-77.6)`; no end is rounded to a certainty."""
    low, high = interval["low"], interval["high"]
    low, high = low if low >= 1 else min(low, 0.999), high if high <= 0 else max(high, 0.001)
    return f"{percent(interval['value']):>5} ({100 * low:.1f}-{100 * high:.1f})"


def two_digits(value: float) -> str:
    """Return a number with two significant digits: 8,300, 1.2 or 0.043."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"
