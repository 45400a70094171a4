"""Whether a setting does as well as the best: paired over seeds, or over test queries where seeds are few or agree."""

import dataclasses
import json
from collections.abc import Sequence

import numpy as np

from nvf.runs.comparison.runs import Row, Run
from nvf.statistics import mcnemar, paired_t, wins_and_losses

T_TEST, MCNEMAR = "paired t-test", "exact McNemar"
FEWEST_SEEDS = 3  # for a t-test


def tested(row: Row, best: Row, metric: str) -> Row:
    """With the p value that it and the best setting do equally well, where they have seeds in common."""
    pairs = _pairs(row, best)
    if len(pairs) >= FEWEST_SEEDS:
        tests = np.array([[run.figures["test"]["value"] for run in pair if run.figures["test"]] for pair in pairs])
        if (p := paired_t(*tests.T)) is not None:
            return dataclasses.replace(row, p=p, p_test=T_TEST)
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
        counts.setdefault(one.fingerprints, wins_and_losses(ours, theirs))
    return mcnemar(*(sum(count[i] for count in counts.values()) for i in range(2)))
