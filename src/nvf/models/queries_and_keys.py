"""What stage 1 compares: queries, which are checked and transformed, and keys, which are made of the memory's rows."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvf.errors import InputError, check_number
from nvf.ops.frozen_cache import is_transformed
from nvf.ops.topk import blockwise_topk

TRANSFORMS = ("mlp", "residual", "linear", "identity")
AT_ONCE = 2**14  # rows whose keys are computed at once
FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class QueryTransform(nn.Module):
    """T(q), (B, D): `mlp` Linear-ReLU-Linear, `residual` q + Linear-ReLU-Linear(q), `linear` q + W q, or `identity` q.

    The last layer of `residual` and of `linear` starts at zero, so that all but `mlp` start at q itself.
    """

    def __init__(self, kind: str, dim: int, hidden: int | None = None) -> None:
        super().__init__()
        if kind not in TRANSFORMS:
            raise InputError(f"attention.transform={kind} is unknown; choose one of {', '.join(TRANSFORMS)}")
        if hidden is not None:
            check_number("attention.hidden", hidden, minimum=1, whole=True, remedy="null is as wide as the vectors")
        self.kind = kind
        self.starts_at_exact_search = kind != "mlp"  # whether it leaves every query as it is until it is trained
        self.network: nn.Module | None = None
        if kind in ("mlp", "residual"):
            width = hidden or dim
            self.network = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, dim))
        elif kind == "linear":
            self.network = nn.Linear(dim, dim, bias=False)
        if self.network is not None and kind != "mlp":
            for parameter in [*self.network.modules()][-1].parameters():
                nn.init.zeros_(parameter)

    def forward(self, queries: Tensor) -> Tensor:
        if self.network is None:
            return queries
        moved = self.network(queries)
        return moved if self.kind == "mlp" else queries + moved


def checked_queries(queries: Tensor, dim: int, form: str = "...") -> Tensor:
    """Return the queries if they are a tensor of floats, (..., D); an InputError says what form they should have."""
    remedy = f"give floats, ({form}, {dim})"
    if not isinstance(queries, Tensor):
        raise InputError(f"queries are a {type(queries).__name__}, no tensor; {remedy}")
    if queries.shape[-1:] != (dim,) or queries.dtype not in FLOATS:
        raise InputError(f"queries have shape {tuple(queries.shape)} and type {queries.dtype}; {remedy}")
    return queries


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


@torch.no_grad()
def neighbours(keys: Tensor, count: int) -> Tensor:
    """Return the rows of the `count` < N keys most like each key, (N, count) int32, best first, without itself."""
    best = blockwise_topk(keys, keys, count + 1).rows
    itself = best == torch.arange(len(keys), device=keys.device).unsqueeze(-1)
    itself[:, -1] |= ~itself.any(dim=-1)  # one of many equal rows may miss itself
    return best[~itself].view(-1, count).int()
