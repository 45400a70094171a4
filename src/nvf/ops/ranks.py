"""Where the right rows of each query rank, and what such a list is worth."""

import torch
from torch import Tensor

from nvf.ops.products import first_topk

MISS = 2**31 - 1  # the rank of a target that was not retrieved
DEEPEST = 10  # ranks below this one count alike


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """The rank, from 1, of each query's best-ranked target, (B,).

    Equal scores rank by row, smallest first, as a search answers, so a model that scores all rows alike is not
    flattered; a query whose scores are NaN ranks last. Equal rows have equal scores where a batch has 16 queries or
    more, and 40 rows; in smaller ones the last bits of the last rows may differ, and with them their ranks.

    Args:
        scores: (B, N).
        targets: (B, m) rows, padded with -1.
    """
    padding = targets < 0
    right = scores.gather(-1, targets.clamp(min=0)).masked_fill(padding, -torch.inf)
    best = right.amax(dim=-1, keepdim=True)
    first = targets.masked_fill(padding | (right < best), scores.shape[-1]).amin(dim=-1, keepdim=True)
    order = torch.arange(scores.shape[-1], device=scores.device)
    above = ~(scores <= best) | ((scores == best) & (order < first))
    return 1 + above.sum(dim=-1)


def are_targets(rows: Tensor, targets: Tensor) -> Tensor:
    """Which of the rows, (B, k), are among their query's targets, (B, m) padded with -1: (B, k) bool."""
    return (rows.unsqueeze(-1) == targets.unsqueeze(1)).any(dim=-1)


def recall(found: Tensor, targets: Tensor) -> Tensor:
    """The share of each query's targets that are among the rows it found, (B,).

    Args:
        found: (B, k) bool, which of the rows are targets.
        targets: (B, m) different rows, padded with -1.
    """
    return found.sum(dim=-1) / (targets >= 0).sum(dim=-1)


def ndcg(found: Tensor, targets: Tensor) -> Tensor:
    """Normalised discounted cumulative gain of binary relevance, (B,): each found target counts 1 / log2(1 + rank).

    Args:
        found: (B, k) bool, which of the k best rows are targets, best first.
        targets: (B, m) different rows, padded with -1.
    """
    places = torch.arange(2, found.shape[-1] + 2, device=found.device, dtype=torch.float64)
    discounts = 1 / places.log2()  # (k,); in float32, a perfect order may come to less than 1
    ideal = discounts.cumsum(dim=0)  # of 1, 2, ... targets at the top
    count = (targets >= 0).sum(dim=-1).clamp(max=len(discounts))
    return ((found * discounts).sum(dim=-1) / ideal[count - 1]).float()


def ndcg_of(scores: Tensor, targets: Tensor) -> Tensor:
    """nDCG@10, (B,), of the rows in the order of their scores, (B, N), of equal ones the first."""
    return ndcg(are_targets(first_topk(scores, min(DEEPEST, scores.shape[1])), targets), targets)


def criterion(targets: Tensor) -> str:
    """What chooses between models on validation queries with these targets, (B, m): `top1`, or `ndcg10`.

    The second where any query has several right rows: Top-1 is content with one of them.
    """
    return "ndcg10" if bool(((targets >= 0).sum(dim=-1) > 1).any()) else "top1"


def candidate_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """The rank, from 1, of each query's best-ranked right candidate, (B,); MISS where none is right.

    Args:
        scores: (B, k), candidates in stage 1's order, which decides between equal scores.
        labels: (B, k) bool.
    """
    positions = torch.arange(scores.shape[-1], device=scores.device).where(labels, -1)  # (B, k), padded like targets
    return target_ranks(scores, positions).where(labels.any(dim=-1), MISS)
