"""Torchmetrics that count ranks and average values; their states are sums, which add up over batches and devices."""

import torch
from torch import Tensor
from torchmetrics import Metric

from nvf.ops.ranks import DEEPEST


class RankCounts(Metric):
    """How many queries have their target at rank 1, 2, ... 10, or deeper: `counts`, (11,)."""

    full_state_update = False
    counts: Tensor

    def __init__(self, *, sync_on_compute: bool = True) -> None:
        super().__init__(sync_on_compute=sync_on_compute)
        self.add_state("counts", torch.zeros(DEEPEST + 1, dtype=torch.long), dist_reduce_fx="sum")

    def update(self, ranks: Tensor) -> None:
        """Count ranks, (B,), from 1."""
        self.counts += torch.bincount(ranks.clamp(max=DEEPEST + 1) - 1, minlength=DEEPEST + 1)

    def compute(self) -> Tensor:
        """The counts, (11,)."""
        return self.counts

    def share(self, rank: int) -> Tensor:
        """The share of queries whose target is among the first `rank` rows, rank <= 10."""
        counts = self.compute()
        return counts[:rank].sum() / counts.sum()
