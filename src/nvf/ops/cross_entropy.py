"""Stage 1's loss over a large memory: exact without ever holding (B, N) scores, or estimated from a sample of rows.

Both losses are -log softmax(queries @ keys.T), mean over each query's right rows and over the batch. Targets are (B, m)
rows padded with -1; queries, (B, D), come already multiplied by the inverse temperature.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from nvf.errors import InputError
from nvf.ops.products import LOG2_E, RunningLogSumExp, can_branch_on, products, score_block


def cross_entropy(queries: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
    """Return the exact loss, from keys (N, D) of any float type."""
    right = scores_of(queries, keys[targets.clamp(min=0)], targets)
    return (logsumexp(queries, keys) - mean_of(right, targets >= 0)).mean()


def mean_of(scores: Tensor, right: Tensor) -> Tensor:
    """Return the mean of each query's right scores, (B,); both are (B, m), and each query has at least one."""
    return scores.masked_fill(~right, 0).sum(dim=-1) / right.sum(dim=-1)


def check_targets(targets: Tensor, queries: int, rows: int) -> None:
    """Raise an InputError unless targets are (B, m) int64 rows of the memory, padded with -1, at least one a query."""
    remedy = f"give each of the {queries} queries rows in 0..{rows - 1}, padded with -1"
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.ndim != 2 or len(targets) != queries:
        raise InputError(f"targets are no ({queries}, m) tensor of int64; {remedy}")
    if can_branch_on(targets):
        outside = ((targets < -1) | (targets >= rows)).any()
        if bool(outside | (targets < 0).all(dim=-1).any()):
            raise InputError(f"targets hold rows outside the memory, or none for a query; {remedy}")


def scores_of(queries: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
    """Return the scores of given rows, (B, m), from their keys, (B, m, D); they are -inf where a row is -1."""
    scores = (keys.to(queries.dtype) @ queries.unsqueeze(-1)).squeeze(-1)
    return scores.to(_wide(scores)).masked_fill(rows < 0, -math.inf)


def logsumexp(queries: Tensor, keys: Tensor) -> Tensor:
    """Return log sum exp of queries @ keys.T over all rows, (B,), differentiable once, in blocks of scores."""
    return _LogSumExp.apply(queries, keys)


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, queries: Tensor, keys: Tensor) -> Tensor:
        on_queries, on_keys = ctx.needs_input_grad  # type: ignore[attr-defined]
        with torch.autocast(queries.device.type, enabled=False):  # products are of the queries' type, sums of float32
            running = RunningLogSumExp()
            mean = torch.zeros_like(queries.T, dtype=_wide(queries))  # of the keys, weighed by exp(score), (D, B)
            for part in _blocks(keys, queries):
                weights = products(part, queries).to(mean.dtype)  # (w, B), scores at first
                shrunk = running.add_(weights, weights.amax(dim=0))
                if on_queries:
                    mean = mean * shrunk + products(part.T, weights.T.to(queries.dtype))
                del weights  # so that the next block takes their place in the cache
        total = running.result()
        saved = [(mean / running.total).T.to(queries.dtype)] if on_queries else []
        ctx.save_for_backward(*saved, *((queries, keys, total) if on_keys else ()))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        saved = list(ctx.saved_tensors)  # type: ignore[attr-defined]
        on_queries, on_keys = ctx.needs_input_grad  # type: ignore[attr-defined]
        gradient = upstream.unsqueeze(-1).to(saved[0].dtype) * saved.pop(0) if on_queries else None
        if not on_keys:
            return gradient, None
        queries, keys, total = saved
        with torch.autocast(queries.device.type, enabled=False):
            scaled = (upstream.unsqueeze(-1) * queries).to(queries.dtype).T  # (D, B)
            blocks = []
            for part in _blocks(keys, queries):
                probabilities = products(part, queries).to(total.dtype).sub_(total).mul_(LOG2_E).exp2_()  # (w, B)
                blocks.append(products(probabilities.to(queries.dtype), scaled).to(keys.dtype))
        return gradient, torch.cat(blocks)


def sampled_cross_entropy(
    queries: Tensor,
    keys: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    count: int,
    sample: Tensor,
    hard: Tensor | None = None,
) -> Tensor:
    """Estimate the loss from targets, (B, m), hard negatives, (B, h), and a `stratified` sample, (M,), for all queries.

    The estimated sum of exp(score) over all `count` rows is unbiased: a target or hard negative counts once, a row of
    the sample for all rows of its stratum. That is the logQ correction of sampled softmax (arXiv 1412.2007) with exact
    probabilities. The logarithm of the sum is too low on average, by less the larger the sample is. `keys` gives the
    keys, (..., D), of rows, (...).
    """
    known = targets
    if hard is not None:
        met = (hard.unsqueeze(-1) == targets.unsqueeze(1)).any(dim=-1)
        known = torch.cat([targets, hard.masked_fill(met, -1)], dim=-1)  # (B, m + h)
    scores = scores_of(queries, keys(known.clamp(min=0)), known)
    strata = _strata(count, len(sample), sample.device)
    others = (queries @ keys(sample).to(queries.dtype).T).to(scores.dtype) + strata.diff().log()  # (B, M)
    stratum = ((known.clamp(min=0) + 1) * len(sample) - 1) // count  # of each known row
    twice = torch.zeros_like(scores).masked_fill(sample[stratum] == known, -math.inf)
    others = others.scatter_add(-1, stratum, twice)
    right = mean_of(scores[:, : targets.shape[1]], targets >= 0)
    return (torch.cat([scores, others], dim=-1).logsumexp(dim=-1) - right).mean()


def stratified(count: int, size: int, generator: torch.Generator) -> Tensor:
    """Draw one row from each of `size` strata of `count` rows, (size,) ascending; their sizes differ by one at most."""
    strata = _strata(count, size, generator.device)
    share = torch.rand(size, generator=generator, device=generator.device, dtype=torch.float64)
    return strata[:-1] + (share * strata.diff()).long()


def _strata(count: int, size: int, device: torch.device) -> Tensor:
    return torch.arange(size + 1, device=device) * count // size  # the start of each stratum, and the end of the last


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _blocks(keys: Tensor, queries: Tensor) -> tuple[Tensor, ...]:
    return keys.split(max(1, score_block(queries.device) // max(1, len(queries))))
