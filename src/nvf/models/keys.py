"""The keys of stage 1: from what they are made, and how near they are to queries."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from nvf.ops.frozen_cache import is_transformed
from nvf.ops.topk import blockwise_topk

AT_ONCE = 2**14  # rows whose keys are computed at once


def composed(rows: Tensor, delta: Tensor | None, bias: Tensor | None, moving: Tensor | None) -> Tensor:
    """Return keys, (N, D), normalize(rows + delta) or the rows, or (N, D + 1) with the bias, (N,), as the last column.

    Delta is that of the rows that are `moving`, (S,) ascending, or of all. Where no gradient is wanted, nothing but the
    keys is held of more than AT_ONCE rows.
    """
    dtype = rows.dtype if delta is None else torch.promote_types(rows.dtype, delta.dtype)
    if is_transformed() or (delta is not None and delta.requires_grad and torch.is_grad_enabled()):
        return _of_block(rows, delta, bias, moving, dtype)
    keys = rows.new_empty(len(rows), rows.shape[1] + (bias is not None), dtype=dtype)
    for start in range(0, len(rows), AT_ONCE):
        block = moved = slice(start, min(start + AT_ONCE, len(rows)))
        places = moving
        if moving is not None:
            moved = slice(*torch.searchsorted(moving, moving.new_tensor([block.start, block.stop])).tolist())
            places = moving[moved] - start
        of_block = None if delta is None else delta[moved]
        keys[block] = _of_block(rows[block], of_block, None if bias is None else bias[block], places, dtype)
    return keys


def _of_block(
    rows: Tensor, delta: Tensor | None, bias: Tensor | None, moving: Tensor | None, dtype: torch.dtype
) -> Tensor:
    keys = rows.to(dtype)
    if delta is not None:
        keys = F.normalize(keys + delta if moving is None else keys.index_add(0, moving, delta), dim=-1)
    return keys if bias is None else torch.cat([keys, bias.unsqueeze(-1).to(dtype)], dim=-1)


@torch.no_grad()
def hubness(queries: Tensor, keys: Tensor, beta: float | Tensor) -> Tensor:
    """Return how near each key is to a bank of queries, (N,): log mean exp(beta q k) / beta (arXiv 2112.12777)."""
    return (blockwise_topk(keys, beta * queries, 1, logsumexp=True).logsumexp - math.log(len(queries))) / beta
