"""Queries: which are accepted, and the transform of stage 1, what they become before they are compared with keys."""

import torch
from torch import Tensor, nn

from nvf.errors import InputError, check_number

TRANSFORMS = ("mlp", "residual", "linear", "identity")
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
