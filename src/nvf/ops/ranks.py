"""The ranks of each query's right rows, and the metrics made from them.

`targets` are (B, m) different rows, padded with -1; `found`, (B, k) bool, says which of the k best rows are targets.
`gains`, (B, m), say what each target is worth to its query, and are 0 for padding; None stands for gains of 1.
"""

import torch
from torch import Tensor

from nvf.ops.topk import Added, TopK, blockwise_topk, exact_scores, is_ahead

MISS = 2**31 - 1  # the rank of a target that was not retrieved
DEEPEST = 10  # ranks below this one count alike


def target_ranks(scores: Tensor, targets: Tensor) -> Tensor:
    """Return the rank, from 1, of each query's best-ranked target, (B,), given the scores of all rows, (B, N).

    Equal scores rank by row, smallest first, as in a search, and NaN last: a model that scores all alike gains nothing.
    """
    best, first = (part.unsqueeze(-1) for part in best_target(scores.gather(-1, targets.clamp(min=0)), targets))
    return 1 + is_ahead(scores, torch.arange(scores.shape[-1], device=scores.device), best, first).sum(dim=-1)


def best_target(scores: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Return the best of the targets' scores, (B, m), and the smallest target that has it, (B,) both."""
    right = scores.masked_fill(targets < 0, -torch.inf)
    best = right.amax(dim=-1, keepdim=True)
    return best.squeeze(-1), targets.masked_fill((targets < 0) | (right < best), MISS).amin(dim=-1)


@torch.no_grad()
def ranked_topk(
    queries: Tensor, keys: Tensor, targets: Tensor, k: int, *, logsumexp: bool = False, added: Added = None
) -> TopK:
    """Return `blockwise_topk`, the exact scores of the targets, and from one pass what `target_ranks` is of these."""
    query = torch.arange(len(targets), device=targets.device).repeat_interleave(targets.shape[1])
    scores = exact_scores(queries, keys, query, targets.clamp(min=0).flatten(), added).view(targets.shape)
    top = blockwise_topk(queries, keys, k, logsumexp=logsumexp, added=added, bar=best_target(scores, targets))
    return top._replace(of_targets=scores.to(top.scores.dtype))


def are_targets(rows: Tensor, targets: Tensor) -> Tensor:
    """Return which of the rows, (B, k), are among their query's targets: (B, k) bool."""
    return (rows.unsqueeze(-1) == targets.unsqueeze(1)).any(dim=-1)


def recall(found: Tensor, targets: Tensor) -> Tensor:
    """Return the share of each query's targets that were found, (B,)."""
    return found.sum(dim=-1) / (targets >= 0).sum(dim=-1)


def gains_of(rows: Tensor, targets: Tensor, gains: Tensor | None = None) -> Tensor:
    """Return what each of the rows, (B, k), is worth to its query, (B, k): the gain of a target, else 0."""
    same = rows.unsqueeze(-1) == targets.unsqueeze(1)
    return same.any(dim=-1) if gains is None else (same * gains.unsqueeze(1)).sum(dim=-1)


def ndcg(found: Tensor, targets: Tensor, gains: Tensor | None = None) -> Tensor:
    """Return the normalised discounted cumulative gain, (B,): each target that was found counts gain / log2(1 + rank).

    `found`, (B, k), are the `gains_of` the k best rows.
    """
    places = torch.arange(2, found.shape[-1] + 2, device=found.device, dtype=torch.float64)
    discounts = 1 / places.log2()  # (k,); in float32, a perfect order may come to less than 1
    if gains is None:
        count = (targets >= 0).sum(dim=-1).clamp(max=len(discounts))
        ideal = discounts.cumsum(dim=0)[count - 1]  # of 1, 2, ... targets at the top
    else:
        best = gains.sort(dim=-1, descending=True).values[:, : len(discounts)]
        ideal = (best * discounts[: best.shape[1]]).sum(dim=-1)
    return ((found * discounts).sum(dim=-1) / ideal).float()


def ndcg10(rows: Tensor, targets: Tensor, gains: Tensor | None = None) -> Tensor:
    """Return nDCG@10, (B,), of lists of rows, (B, k), best first; k is at least 10, or all rows."""
    return ndcg(gains_of(rows[:, :DEEPEST], targets, gains), targets, gains)


def criterion(targets: Tensor) -> str:
    """Return the metric that chooses between models: `ndcg10` where any query has several targets, else `top1`."""
    return "ndcg10" if bool(((targets >= 0).sum(dim=-1) > 1).any()) else "top1"


def candidate_ranks(scores: Tensor, labels: Tensor) -> Tensor:
    """Return the rank of each query's best right candidate, (B,), or MISS; both are (B, k), in stage 1's order."""
    positions = torch.arange(scores.shape[-1], device=scores.device).where(labels, -1)  # (B, k), padded like targets
    return target_ranks(scores, positions).where(labels.any(dim=-1), MISS)
