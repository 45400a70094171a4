"""Inner products of queries with many rows, computed in blocks that stay in the processor's cache."""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from nvf.ops.frozen_cache import is_transformed

QUERY_BLOCK = 512  # queries searched at once
SCORE_BLOCK = 2**20  # scores held at once on a CPU; 4 MB of float32, about what the caches near a core hold
WIDE_SCORE_BLOCK = 2**26  # scores held at once on other devices, where starting a block costs more
LOG2_E = math.log2(math.e)  # torch.exp2 is four times as fast as torch.exp, which is MKL's

# glibc returns a freed block above a threshold to the system, and the next one costs page faults, up to ten times the
# time of its products. The threshold rises to the size of the largest block that was ever freed, which is this one.
torch.empty(31 * 2**20, dtype=torch.uint8)


def score_block(device: torch.device) -> int:
    """Return how many scores are held at once on a device."""
    return SCORE_BLOCK if device.type == "cpu" else WIDE_SCORE_BLOCK


def can_branch_on(tensor: Tensor) -> bool:
    """Whether Python may look at values: on the CPU, where it need not wait, and outside transforms and traces."""
    return _on_cpu(tensor) and not is_transformed()


def split(rows: Tensor, size: int) -> Sequence[Tensor]:
    """Return `rows.split(size)`; one query at a time, a view of all rows and a copy of one part take a while."""
    return (rows,) if rows.shape[0] <= size else rows.split(size)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """Return the parts that `split` made as one tensor again."""
    return parts[0] if len(parts) == 1 else torch.cat([*parts])


def products(rows: Tensor, queries: Tensor, *, by_query: bool = False) -> Tensor:
    """Return rows @ queries.T, (w, B), for rows of any float type; `by_query` lays a query's products side by side."""
    rows = rows.to(queries.dtype)
    return (queries @ rows.T).T if by_query else rows @ queries.T


def inner_products(queries: Tensor, rows: Tensor) -> Tensor:
    """Return queries @ rows.T, (B, N), differentiable; without a gradient, rows of another type are copied by parts."""
    if queries.dtype == rows.dtype:
        return queries @ rows.T
    return torch.cat([queries @ part.to(queries.dtype).T for part in _parts(rows)], dim=-1)


def weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """Return weights @ rows, (B, D), differentiable; without a gradient, rows of another type are copied by parts."""
    if weights.dtype == rows.dtype:
        return weights @ rows
    parts = _parts(rows)
    shares = weights.split([len(part) for part in parts], dim=-1)
    total: Tensor = sum(share @ part.to(share.dtype) for share, part in zip(shares, parts, strict=True))
    return total


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, score_block(rows.device) // rows.shape[1]))


class RunningLogSumExp:
    """The log-sum-exp of each query's scores, block after block: the online softmax of FlashAttention (2205.14135)."""

    largest: Any = None  # (B,)
    total: Any = 0.0  # of exp(score - largest), (B,)

    def add_(self, scores: Tensor, largest: Tensor) -> Any:
        """Turn scores, (w, B), into exp(score - largest) in place; return the factor by which earlier sums shrink."""
        before, self.largest = self.largest, largest if self.largest is None else torch.maximum(self.largest, largest)
        shrunk = 0.0 if before is None else (before - self.largest).exp()
        total = scores.sub_(self.largest).mul_(LOG2_E).exp2_().sum(dim=0)
        self.total = total if before is None else self.total * shrunk + total
        return shrunk

    def result(self) -> Any:
        return self.largest + self.total.log()


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"
