"""Examples of what a run answers, and how right its probabilities are: examples.json, from which figures are drawn."""

from typing import Any

import numpy as np
from scipy.stats import binned_statistic
from torch import Tensor

from nvf.data.queries import Recorded, Source
from nvf.evaluation.evaluate import BINS, Evaluation, Outcomes

CANDIDATES = 8  # of a query, at most
LONGEST = 1000  # characters of a text


def examples_of(found: Evaluation, source: Source, *, count: int, split: str = "val") -> dict[str, Any]:
    """Return the content of examples.json: at most `count` queries of a split, which was evaluated, and reliability.

    Values are JSON's. Of each query there are the rank of its best-ranked target by every method, and the candidates
    that are right or most probable, at most CANDIDATES, the last stage's choice first. Texts, of at most LONGEST
    characters, ids, and the words of a query that its candidates' texts have are given where they are known.
    """
    outcomes, asked = found.outcomes, source.asked if isinstance(source, Recorded) else None
    chosen = exemplary(outcomes, count).tolist()
    return {
        "compared": [*outcomes.compared],
        "queries": [_query(outcomes, source, query, asked[split][query] if asked else None) for query in chosen],
        "reliability": {
            method: _reliability(confidences, outcomes.share_right(method))
            | {"error": found.figures["calibration_error"][method]["value"]}
            for method, confidences in outcomes.confidences.items()
        },
    }


def exemplary(outcomes: Outcomes, count: int) -> np.ndarray:
    """Choose at most `count` queries: up to a third that the last stage won, as many that it lost, then others.

    Of the others, those that neither stage answers come first.
    """
    now, was = ((outcomes.ranks[method] == 1).numpy() for method in outcomes.compared)
    third, same = -(-count // 3), now == was
    chosen = [*(now & ~was).nonzero()[0][:third], *(was & ~now).nonzero()[0][:third]]
    others = [*(same & ~now).nonzero()[0], *same.nonzero()[0], *range(len(now))]
    return np.array([*dict.fromkeys([*chosen, *others])][:count])


def _query(outcomes: Outcomes, source: Source, query: int, text: str | None) -> dict[str, Any]:
    right, rows = outcomes.right[query].numpy(), outcomes.candidates[query]
    probabilities = {method: of[query].numpy() for method, of in outcomes.probabilities.items()}
    last = probabilities[next(method for method in outcomes.compared if method in probabilities)]
    shown = np.lexsort((-np.max([*probabilities.values()], axis=0), ~right))[:CANDIDATES]
    shown = shown[np.argsort(-last[shown], kind="stable")]
    after, before = (int(outcomes.ranks[method][query]) for method in outcomes.compared)
    words, texts, ids = getattr(source, "words", None), getattr(source, "texts", None), source.memory.ids
    matched = [[]] * len(shown) if words is None or text is None else words.matched(text, rows[shown].tolist())
    vectors = source.memory.vectors_of(rows[shown].to(source.memory.rows.device)).cpu().numpy()
    names = [None] * len(shown) if ids is None else ids[vectors].tolist()
    return {
        "query": query,
        "text": None if text is None else _cut(text),
        "ranks": {method: int(ranks[query]) for method, ranks in outcomes.ranks.items()},
        "verdict": "won" if after == 1 < before else "lost" if before == 1 < after else "same",
        "candidates": [
            {
                "row": (row := int(rows[place])),
                "id": name,
                "text": None if texts is None else _cut(texts[row]),
                "right": bool(right[place]),
                "probabilities": {method: float(of[place]) for method, of in probabilities.items()},
                "words": of_row,
            }
            for place, name, of_row in zip(shown.tolist(), names, matched, strict=True)
        ],
    }


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[: LONGEST - 1]}\u2026"


def _reliability(confidences: Tensor, right: Tensor) -> dict[str, Any]:
    """Return for each bin of confidence the mean confidence, the share that is right, None if empty, and the number."""
    values = [confidences.nan_to_num(0).numpy(), right.numpy()]
    means = binned_statistic(values[0], values, bins=BINS, range=(0, 1)).statistic  # (2, BINS)
    confidence, share = ([None if np.isnan(mean) else float(mean) for mean in of] for of in means)
    return {
        "confidence": confidence,
        "share_right": share,
        "queries": np.histogram(values[0], BINS, (0, 1))[0].tolist(),
    }
