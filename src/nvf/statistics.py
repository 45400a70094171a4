"""Every interval and test of a run and of a comparison, once; without torch, so that a comparison starts fast."""

import math
from collections.abc import Iterable
from typing import Any, TypedDict

import numpy as np
from scipy import stats

METRICS = {"top1": "Top-1", "top5": "Top-5", "mrr10": "MRR@10", "ndcg10": "nDCG@10", "recall": "Recall@k"}
RESAMPLES = 2000  # of a bootstrap
Z = float(stats.norm.ppf(0.975))  # standard errors on either side of a normal 95% interval
SIGNIFICANT = 0.05  # a p value below it is one
SMALLEST_P = 1e-300  # stands for every smaller one: p of some thousand queries underflows
ROUNDING = 1e-12


class Interval(TypedDict):
    """A figure with its 95% interval; the ends of a share lie in 0..1."""

    value: float
    low: float
    high: float


def wilson(successes: float, total: float) -> Interval:
    """A share with its Wilson interval: what a score test does not reject.

    Successes need not be whole. Values in 0..1 vary most where they are 0 or 1, so of others it is an upper bound.
    """
    value, spread = successes / total, Z**2 / total
    middle = (value + spread / 2) / (1 + spread)
    reach = math.sqrt(spread * (value * (1 - value) + spread / 4)) / (1 + spread)
    return {"value": value, "low": max(0.0, min(value, middle - reach)), "high": min(1.0, max(value, middle + reach))}


def mean_interval(mean: float, error: float, *, count: int) -> Interval:
    """The mean of `count` values in 0..1 with its normal interval, from its standard error.

    Where all values are 0 or 1, or none differs, the interval is Wilson's.
    """
    variance = count * error**2
    if variance < ROUNDING or abs(variance - mean * (1 - mean)) < ROUNDING:
        return wilson(mean * count, count)
    return {"value": mean, "low": max(0.0, mean - Z * error), "high": min(1.0, mean + Z * error)}


def reciprocal_rank(counts: np.ndarray, *, resamples: int = RESAMPLES) -> Interval:
    """The mean reciprocal rank with its bootstrap interval.

    The counts say how many queries have rank 1, 2, ..., and last how many count as misses, (ranks + 1,).
    """
    weights, total = np.append(1 / np.arange(1, len(counts)), 0.0), int(counts.sum())
    return _percentiles(float(counts @ weights / total), _resampled(counts, resamples) @ weights / total, total)


def gap_closed(start: np.ndarray, end: np.ndarray, ceiling: np.ndarray) -> Interval | None:
    """How much of the gap between a start and a ceiling a method closed, with its paired bootstrap interval.

    Each argument says which queries are answered, (B,) bool: at the start, by the method in the end, at the ceiling.
    None where the ceiling is not significantly above the start, by McNemar's test: a share of noise says nothing.
    """
    wins, losses = wins_and_losses(ceiling, start)
    if wins <= losses or mcnemar(wins, losses) >= SIGNIFICANT:
        return None
    before, after, best = (answered.astype(int) for answered in (start, end, ceiling))
    counts = np.bincount(3 * (best - before) + (after - before) + 4, minlength=9)  # the nine kinds of queries
    gaps, gains = np.array(np.divmod(np.arange(9), 3)) - 1  # that one query of each kind adds
    draws = _resampled(counts, RESAMPLES)
    draws = draws[draws @ gaps > 0]  # few have none, as the gap is significant
    gap = wins - losses
    return _percentiles(float(counts @ gains) / gap, (draws @ gains) / (draws @ gaps), gap)


def _resampled(counts: np.ndarray, resamples: int) -> np.ndarray:
    """The counts of each kind of query in bootstrap samples, (resamples, kinds), drawn alike each time."""
    return np.random.default_rng(0).multinomial(counts.sum(), counts / counts.sum(), size=resamples)


def _percentiles(value: float, draws: np.ndarray, total: int) -> Interval:
    """The percentile interval; Wilson's where no draw differs, as of queries that are all alike."""
    low, high = map(float, np.quantile(draws, [0.025, 0.975]))
    return {"value": value, "low": low, "high": high} if low < high else wilson(value * total, total)


def over_seeds(found: Iterable[Interval | None]) -> Interval | None:
    """The mean with Student's t interval over runs, within 0..1; a run's own where there is but one, or all agree."""
    known = [interval for interval in found if interval is not None]
    values = np.array([interval["value"] for interval in known])
    if len(known) < 2 or np.ptp(values) < ROUNDING:
        return known[0] if known else None
    mean, reach = float(values.mean()), float(stats.t.ppf(0.975, len(values) - 1) * stats.sem(values))
    return {"value": mean, "low": max(0.0, mean - reach), "high": min(1.0, mean + reach)}


def wins_and_losses(answered: Any, reference: Any) -> tuple[int, int]:
    """How many queries a method answers and a reference does not, and the reverse; arrays or tensors, (B,) bool."""
    return int((answered & ~reference).sum()), int((~answered & reference).sum())


def mcnemar(wins: int, losses: int) -> float:
    """The exact McNemar test's two-sided p, at least SMALLEST_P: wins and losses as fair coin flips; 1 without any."""
    return max(SMALLEST_P, float(stats.binomtest(wins, wins + losses).pvalue)) if wins + losses else 1.0


def paired_t(ours: np.ndarray, theirs: np.ndarray) -> float | None:
    """The paired t-test's two-sided p, at least SMALLEST_P; None where all differences are equal.

    Without a spread there is nothing to hold the mean difference against: runs that ignore their seed differ alike.
    """
    if np.ptp(ours - theirs) < ROUNDING:
        return None
    return max(SMALLEST_P, float(stats.ttest_rel(ours, theirs).pvalue))


def p_text(p: float) -> str:
    """A p value for people: `= 0.012`, or `< 1e-300`."""
    return f"= {p:.2g}" if p > SMALLEST_P else f"< {SMALLEST_P:g}"


def percent(share: float) -> str:
    """A share in percent; 100.0 and 0.0 are nothing but all and none, what rounds to them is >99.9 and <0.1."""
    text = f"{100 * share:.1f}"
    if text == "100.0" and share < 1:
        return ">99.9"
    return "<0.1" if text == "0.0" and share > 0 else text


def in_percent(interval: Interval) -> str:
    """A figure with its interval in percent, ` 75.0 (72.2-77.6)`; no end is rounded to a certainty."""
    low, high = interval["low"], interval["high"]
    low, high = low if low >= 1 else min(low, 0.999), high if high <= 0 else max(high, 0.001)
    return f"{percent(interval['value']):>5} ({100 * low:.1f}-{100 * high:.1f})"


def two_digits(value: float) -> str:
    """Two significant digits: 8,300, 1.2 or 0.043."""
    rounded = float(f"{value:.2g}")
    return f"{rounded:,.0f}" if rounded >= 10 else f"{rounded:g}"
