"""Stage 1's loss over a large memory: exact without ever holding (B, N) scores, or estimated from a sample of rows.

Both are -log of the probability of a right row, mean over each query's right rows and over the batch, where a row's
probability is softmax(queries @ keys.T): the cross-entropy to the uniform distribution over the right rows. The targets
are (B, m) rows padded with -1, the queries scaled by the inverse temperature.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import FunctionCtx, once_differentiable

from nvf.errors import InputError
from nvf.ops.products import LOG2_E, RunningLogSumExp, may_look, products, score_block


def cross_entropy(queries: Tensor, keys: Tensor, targets: Tensor) -> Tensor:
    """The exact loss, from queries (B, D), keys (N, D) of any float type, and targets (B, m)."""
    right = scores_of(queries, keys[targets.clamp(min=0)], targets)
    return (logsumexp(queries, keys) - mean_of(right, targets >= 0)).mean()


def mean_of(scores: Tensor, right: Tensor) -> Tensor:
    """The mean of each query's right scores, (B,); both (B, m), at least one a query is right."""
    return scores.masked_fill(~right, 0).sum(dim=-1) / right.sum(dim=-1)


def check_targets(targets: Tensor, queries: int, rows: int) -> None:
    """Raise an InputError unless targets are (B, m) int64 rows of the memory, padded with -1, one a query at least.

    Their values are looked at on the CPU alone, outside of transforms and traces.
    """
    remedy = f"give each of the {queries} queries rows in 0..{rows - 1}, padded with -1"
    if not isinstance(targets, Tensor) or targets.dtype != torch.int64 or targets.ndim != 2:
        about = f"shape {tuple(targets.shape)} and type {targets.dtype}" if isinstance(targets, Tensor) else "no shape"
        raise InputError(f"targets have {about}, not (B, m) and int64; {remedy}")
    if len(targets) != queries or targets.shape[1] == 0:
        raise InputError(f"targets have shape {tuple(targets.shape)}; {remedy}")
    if not may_look(targets) or len(targets) == 0:
        return
    lowest, highest = (int(value) for value in targets.aminmax())
    if lowest < -1 or highest >= rows:
        raise InputError(f"targets hold the row {highest if highest >= rows else lowest}; {remedy}")
    if lowest < 0 and (missing := (targets < 0).all(dim=-1)).any():
        raise InputError(f"targets: query {int(missing.nonzero()[0])} has none; {remedy}")


def scores_of(queries: Tensor, keys: Tensor, rows: Tensor) -> Tensor:
    """The scores of given rows, (B, m), from their keys, (B, m, D); -inf where a row is -1."""
    scores = (keys.to(queries.dtype) @ queries.unsqueeze(-1)).squeeze(-1)
    return scores.to(_wide(scores)).masked_fill(rows < 0, -math.inf)


def logsumexp(queries: Tensor, keys: Tensor) -> Tensor:
    """log sum exp of queries @ keys.T over all rows, (B,), differentiable once, holding one block of scores at a time.

    Where the keys are frozen one pass over them is enough: the gradient on the queries is gathered beside the sum.
    Learned keys cost a second pass, in which the scores are computed again.
    """
    found: Tensor = _LogSumExp.apply(queries, keys)
    return found


class _LogSumExp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: FunctionCtx, queries: Tensor, keys: Tensor) -> Tensor:
        moving, learned = ctx.needs_input_grad  # type: ignore[attr-defined]
        with torch.autocast(queries.device.type, enabled=False):  # products are of the queries' type, sums of float32
            running = RunningLogSumExp(len(queries), dtype=_wide(queries), device=queries.device)
            mean = torch.zeros_like(queries.T, dtype=_wide(queries))  # of the keys, weighed by exp(score), (D, B)
            for part in _blocks(keys, queries):
                weights = products(part, queries).to(mean.dtype)  # (w, B), the scores yet
                shrunk = running.add_(weights, weights.amax(dim=0))
                if moving:
                    mean = mean * shrunk + products(part.T, weights.T.to(queries.dtype))
                del weights  # the next block takes their place in the cache
        found = running.result()
        saved = [(mean / running.total).T.to(queries.dtype)] if moving else []
        ctx.save_for_backward(*saved, *((queries, keys, found) if learned else ()))
        return found

    @staticmethod
    @once_differentiable
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor | None, Tensor | None]:
        saved = list(ctx.saved_tensors)  # type: ignore[attr-defined]
        moving, learned = ctx.needs_input_grad  # type: ignore[attr-defined]
        on_queries = upstream.unsqueeze(-1).to(saved[0].dtype) * saved.pop(0) if moving else None
        return on_queries, _on_keys(upstream, *saved) if learned else None


def _on_keys(upstream: Tensor, queries: Tensor, keys: Tensor, found: Tensor) -> Tensor:
    """The gradient on the keys, (N, D), from scores that are computed again."""
    with torch.autocast(queries.device.type, enabled=False):
        scaled = (upstream.unsqueeze(-1) * queries).to(queries.dtype).T  # (D, B)
        blocks = []
        for part in _blocks(keys, queries):
            probabilities = products(part, queries).to(found.dtype).sub_(found).mul_(LOG2_E).exp2_()  # (w, B)
            blocks.append(products(probabilities.to(queries.dtype), scaled).to(keys.dtype))
        return torch.cat(blocks)


def sampled_cross_entropy(
    queries: Tensor,
    keys: Callable[[Tensor], Tensor],
    targets: Tensor,
    *,
    count: int,
    sample: Tensor,
    hard: Tensor | None = None,
) -> Tensor:
    """An estimate of the loss from the targets, hard negatives of each query, and a sample that all queries share.

    The sum over all rows of exp(score) is estimated without bias: targets and hard negatives count as they are, a row
    of the sample for all rows of its stratum, which is the logQ correction of sampled softmax (arXiv 1412.2007), here
    with each row's exact probability. Its logarithm is low on average, by less the larger the sample.

    Args:
        queries: (B, D), scaled by the inverse temperature.
        keys: gives the keys, (..., D), of any rows, (...).
        targets: (B, m).
        count: N.
        sample: (M,), from `stratified`.
        hard: (B, h), different rows; those that are targets do not count twice.
    """
    known = targets
    if hard is not None:
        met = (hard.unsqueeze(-1) == targets.unsqueeze(1)).any(dim=-1)
        known = torch.cat([targets, hard.masked_fill(met, -1)], dim=-1)  # (B, m + h)
    scores = scores_of(queries, keys(known.clamp(min=0)), known)
    strata = _strata(count, len(sample), sample.device)
    others = (queries @ keys(sample).to(queries.dtype).T).to(scores.dtype) + strata.diff().log()  # (B, M)
    stratum = ((known.clamp(min=0) + 1) * len(sample) - 1) // count  # that each known row is in
    again = torch.zeros_like(scores).masked_fill(sample[stratum] == known, -math.inf)
    others = others.scatter_add(-1, stratum, again)
    right = mean_of(scores[:, : targets.shape[1]], targets >= 0)
    return (torch.cat([scores, others], dim=-1).logsumexp(dim=-1) - right).mean()


def stratified(count: int, size: int, generator: torch.Generator) -> Tensor:
    """One row of each of `size` strata of `count` rows, which are equally large but for one, (size,) ascending."""
    strata = _strata(count, size, generator.device)
    share = torch.rand(size, generator=generator, device=generator.device, dtype=torch.float64)
    return strata[:-1] + (share * strata.diff()).long()


def _strata(count: int, size: int, device: torch.device) -> Tensor:
    """Where each stratum starts, and the end, (size + 1,)."""
    return torch.arange(size + 1, device=device) * count // size


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)


def _blocks(keys: Tensor, queries: Tensor) -> tuple[Tensor, ...]:
    return keys.split(max(1, score_block(queries.device) // max(1, len(queries))))
