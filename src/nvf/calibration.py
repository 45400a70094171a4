"""What a fitted stage 1 still learns without a gradient step: its temperature, and a correction of its hubs."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from nvf.attention import SoftAttention, attention_loss
from nvf.memory import SCORE_BLOCK, hubness
from nvf.metrics import target_ranks
from nvf.queries import QueryBatch, blocks

BETA_RANGE = (0.1, 1000.0)  # from no preference among unit vectors to the certainty of the best
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def fit_temperature(attention: SoftAttention, queries: Tensor, targets: Tensor) -> None:
    """Set beta to the minimum of the loss over held-out queries, which orders no row anew.

    Training stops where Top-1 is best, not where the probabilities are right; what the pipeline says of the rows
    outside the candidates depends on both. The loss is convex in beta, so bisection on the sign of its slope finds the
    minimum within BETA_RANGE. As many queries are used as keep the scores in one block, at least 256.
    """
    count = max(256, SCORE_BLOCK // len(attention.memory))
    queries, targets = queries[:count], targets[:count]
    with torch.no_grad():
        scores = attention.transformed(queries) @ attention.keys().T  # (B, N)
        low, high = (math.log(beta) for beta in BETA_RANGE)
        for _ in range(20):
            middle = torch.full((), (low + high) / 2, device=scores.device, requires_grad=True)
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(attention_loss(middle.exp() * scores, targets), middle)
            low, high = (low, float(middle)) if slope > 0 else (float(middle), high)
        attention.log_beta.fill_((low + high) / 2)


@torch.no_grad()
def top1(attention: SoftAttention, batch: QueryBatch) -> float:
    """The share of queries whose target has the highest attention, in blocks."""
    keys = attention.keys()
    size = max(1, SCORE_BLOCK // len(keys))
    right = sum(
        int((target_ranks(attention.transformed(part.queries) @ keys.T, part.targets) == 1).sum())
        for part in blocks(batch, size)
    )
    return right / len(batch.queries)


@torch.no_grad()
def fit_hub_correction(
    attention: SoftAttention, bank: Tensor, queries: Tensor, targets: Tensor, *, shares: Sequence[float] = SHARES
) -> float:
    """Set the bias to the share of the rows' hubness whose subtraction validates best; returns the share.

    Args:
        attention: a fitted stage 1; without a bias at a share of 0.
        bank: the training queries, (n, D).
        queries: held out, (B, D), with their targets, (B, m).
        shares: to choose from, in the order that decides between equals.
    """
    attention.bias = None
    keys = attention.keys()
    hubs = hubness(attention.transformed(bank), keys, attention.beta)
    right = torch.zeros(len(shares), dtype=torch.long)
    size = max(1, SCORE_BLOCK // len(keys))
    for part in blocks(QueryBatch(queries, targets), size):
        scores = attention.transformed(part.queries) @ keys.T
        for place, share in enumerate(shares):
            right[place] += (target_ranks(scores - share * hubs, part.targets) == 1).sum().cpu()
    share = shares[int(right.argmax())]
    attention.bias = -share * hubs if share else None
    return share
