"""Adam with early stopping, and the linear adapter that most baselines fit with it."""

import copy
import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvf.ops.random_streams import stream
from tuned_search import Figures, Problem, Search, figures

EPOCHS, PATIENCE = 20, 5


class Adapter(nn.Module):
    """z = normalize(q + W q + c) against K = V, or K = normalize(V + delta) if keys are learned; exact search at first.

    Rows that answer no training query stay where they are.
    """

    def __init__(self, rows: Tensor, *, seen: Tensor | None = None) -> None:
        super().__init__()
        self.rows, self.seen = rows, seen
        self.linear = nn.Linear(rows.shape[1], rows.shape[1])
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)
        self.log_beta = nn.Parameter(torch.tensor(math.log(20.0)))
        self.delta = None if seen is None else nn.Parameter(torch.zeros_like(rows))

    def move(self, queries: Tensor) -> Tensor:
        """z, (B, D)."""
        return F.normalize(queries + self.linear(queries), dim=-1)

    def keys(self) -> Tensor:
        """K, (N, D) unit rows."""
        if self.delta is None or self.seen is None:
            return self.rows
        return F.normalize(self.rows + self.delta * self.seen.unsqueeze(-1), dim=-1)

    def forward(self, queries: Tensor) -> Tensor:
        return self.log_beta.exp() * self.move(queries) @ self.keys().T  # (B, N)


def fit_adapter(
    problem: Problem,
    adapter: Adapter,
    loss: Callable[[Tensor], Tensor],
    lr: float,
    *,
    count: int,
    batch_size: int | None = None,
) -> Search:
    """The search of an adapter that is fitted by a loss over `count` training samples, and stopped on validation."""

    def search() -> Search:
        return Search(adapter.move, adapter.keys().detach(), beta=float(adapter.log_beta.detach().exp()))

    groups = [{"params": list(adapter.parameters()), "lr": lr}]
    samples, seed = torch.arange(count), problem.seed
    fit(adapter, groups, loss, samples, lambda: figures(search(), problem.val), seed=seed, batch_size=batch_size)
    return search()


def fit(
    model: nn.Module,
    groups: list[dict],
    loss: Callable[[Tensor], Tensor],
    places: Tensor,
    validate: Callable[[], Figures],
    *,
    seed: int,
    batch_size: int | None = None,
) -> int:
    """Adam with early stopping; leaves the weights that validate best, and returns after which epoch.

    Args:
        groups: the parameters with their learning rates.
        loss: of the training samples at some places.
        places: of all of them, (n,).
        batch_size: if None at most 256, and at least 8 batches an epoch unless they fall below 64, as in nvf.
    """
    optimizer, generator = torch.optim.Adam(groups), stream(seed, "adapters/order")
    size = batch_size or min(256, max(64, len(places) // 8))
    found, epochs, state = Figures(-1.0, -1.0), 0, model.state_dict()
    for epoch in range(EPOCHS + 1):
        model.train()
        for part in places[torch.randperm(len(places), generator=generator)].split(size) if epoch else ():
            optimizer.zero_grad()
            loss(part).backward()
            optimizer.step()
        model.eval()
        if (score := validate()) > found:
            found, epochs, state = score, epoch, copy.deepcopy(model.state_dict())
        if epoch - epochs >= PATIENCE:
            break
    model.load_state_dict(state)
    return epochs
