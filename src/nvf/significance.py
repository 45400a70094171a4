"""Whether a setting does as well as the best: paired over seeds, or over the test queries of few of them."""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np
from scipy import stats

from nvf.comparison_runs import Row, Run

T_TEST, MCNEMAR = "paired t-test", "exact McNemar"
FEWEST_SEEDS = 3  # for a t-test


def tested(row: Row, best: Row, metric: str) -> Row:
    """With the p value that it and the best setting do equally well, where they have seeds in common."""
    pairs = _pairs(row, best)
    if len(pairs) >= FEWEST_SEEDS:
        return dataclasses.replace(row, p=_t_test(pairs), p_test=T_TEST)
    if pairs and metric == "top1" and (p := _mcnemar(pairs)) is not None:
        return dataclasses.replace(row, p=p, p_test=MCNEMAR)
    return row


def _pairs(row: Row, best: Row) -> list[tuple[Run, Run]]:
    """Runs of the two with the same seeds; none where those that both have do not tell the runs apart."""
    names = sorted(set.intersection(*({*run.seeds} for run in (*row.runs, *best.runs))))
    mine, others = ({json.dumps([run.seeds[n] for n in names]): run for run in of.runs} for of in (row, best))
    if len(mine) < len(row.runs) or len(others) < len(best.runs):
        return []
    return [(mine[seeds], others[seeds]) for seeds in mine if seeds in others]


def _t_test(pairs: Sequence[tuple[Run, Run]]) -> float:
    """Two-sided; equal differences have no spread, so they tell nothing if they are zero, and all if they are not."""
    tests = np.array([[run.figures["test"].value for run in pair if run.figures["test"]] for pair in pairs])
    differences = tests[:, 0] - tests[:, 1]
    error = differences.std(ddof=1) / np.sqrt(len(pairs))
    if error < 1e-12:  # rounding
        return float(abs(differences.mean()) < 1e-12)
    return float(2 * stats.t.sf(abs(differences.mean()) / error, len(pairs) - 1))


def _mcnemar(pairs: Sequence[tuple[Run, Run]]) -> float | None:
    """Over the queries of all pairs; None where a pair has not the same ones.

    Seeds that share their queries count once: one query's answers under two seeds are not independent.
    """
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for one, other in pairs:
        ours, theirs = one.answered(), other.answered()
        if one.fingerprints is None or one.fingerprints != other.fingerprints or ours is None or theirs is None:
            return None
        if len(ours) != len(theirs):
            return None
        counts.setdefault(one.fingerprints, (int((ours & ~theirs).sum()), int((~ours & theirs).sum())))
    wins, losses = (sum(count[i] for count in counts.values()) for i in range(2))
    return float(stats.binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
