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
CLEAR = 2.0  # standard errors


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
def answered(attention: SoftAttention, batch: QueryBatch) -> Tensor:
    """Which queries have a target at the highest attention, (B,) bool, in blocks."""
    keys = attention.keys()
    found = [
        target_ranks(attention.transformed(part.queries) @ keys.T, part.targets) == 1
        for part in blocks(batch, max(1, SCORE_BLOCK // len(keys)))
    ]
    return torch.cat(found)


def clearly_above(answered: Tensor, reference: Tensor) -> bool:
    """Whether wins over a reference exceed losses by CLEAR standard errors of their difference; both (B,) bool.

    Of several searches that are as good as the reference, one always looks better on a few queries.
    """
    wins, losses = int((answered & ~reference).sum()), int((~answered & reference).sum())
    return wins - losses > CLEAR * math.sqrt(wins + losses)


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
        shares: to choose from, in the order that decides between equals.
        cautious: take none but the first that is not clearly above it.
    """
    attention.bias = None
    hubs = hubness(attention.transformed(bank), attention.keys(), attention.beta)
    right = []
    for share in shares:
        attention.bias = -share * hubs if share else None
        right.append(answered(attention, held_out))
    best = max(range(len(shares)), key=lambda place: int(right[place].sum()))  # the first of equals
    if cautious and not clearly_above(right[best], right[0]):
        best = 0
    attention.bias = -shares[best] * hubs if shares[best] else None
    return shares[best]
