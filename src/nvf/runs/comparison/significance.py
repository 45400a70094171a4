"""Whether a setting does as well as the best: paired over seeds, or over test queries where seeds are few or agree."""

import dataclasses
from collections.abc import Sequence

import numpy as np

from nvf.runs.comparison.runs import Row, Run
from nvf.runs.settings import key
from nvf.statistics import mcnemar, paired_t, wins_and_losses

T_TEST, MCNEMAR = "paired t-test", "exact McNemar"
FEWEST_SEEDS = 3  # for a t-test


def tested(row: Row, best: Row, metric: str) -> Row:
    """The row with the p value that it and the best setting do equally well, where they have seeds in common."""
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
    names = set.intersection(*({*run.seeds} for run in (*row.runs, *best.runs)))
    mine, others = ({key({name: run.seeds[name] for name in names}): run for run in of.runs} for of in (row, best))
    if len(mine) < len(row.runs) or len(others) < len(best.runs):
        return []
    return [(mine[seeds], others[seeds]) for seeds in mine if seeds in others]


def _mcnemar(pairs: Sequence[tuple[Run, Run]]) -> float | None:
    """McNemar's p over the queries of all pairs; None where a pair has not the same ones.

    Seeds that share their queries count once: one query's answers under two seeds are not independent.
    """
    counts: dict[tuple[str, str], tuple[int, int]] = {}
    for one, other in pairs:
        ours, theirs = one.answered(), other.answered()
        if ours is None or theirs is None or len(ours) != len(theirs):
            return None
        if one.fingerprints is None or one.fingerprints != other.fingerprints:
            return None
        counts.setdefault(one.fingerprints, wins_and_losses(ours, theirs))
    return mcnemar(*map(sum, zip(*counts.values(), strict=True)))
