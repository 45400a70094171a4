"""The callbacks: what they log, count, keep and stop."""

import json
import math

import torch

from nvf.evaluation.gradients import PARTS
from nvf.training.callbacks import LogGradients


def test_the_log_counts_what_is_lost() -> None:
    log = LogGradients()
    for query, reranker in ((0.0, 1.0), (2.0, math.inf), (1.0, math.nan), (4.0, 0.0)):
        log.steps.append({"query": torch.tensor(query), "reranker": torch.tensor(reranker)})
    summary = log.summary()
    assert summary["steps"] == 4
    assert set(summary) & set(PARTS) == {"query", "reranker"}
    assert summary["query"] == {"first": 0.0, "last": 4.0, "smallest": 0.0, "largest": 4.0, "zero": 1, "not_finite": 0}
    assert summary["reranker"]["not_finite"] == 2
    json.dumps(summary, allow_nan=False)
