"""Stage 1, peripheral vision: softmax attention of a transformed query over the whole memory."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvf.errors import InputError, check_number
from nvf.memory import SCORE_BLOCK, TopK, VectorMemory, blockwise_topk, check_k

TRANSFORMS = ("mlp", "residual", "linear", "identity")
BETA_RANGE = (0.1, 1000.0)  # from no preference among unit vectors to the certainty of the best


class QueryTransform(nn.Module):
    """T(q), (B, D) -> (B, D).

    `mlp` is Linear-ReLU-Linear, `residual` q + Linear-ReLU-Linear(q), `linear` q + W q, `identity` q. All but `mlp`
    return q itself until they are trained: the last layer of the first two starts at zero.
    """

    def __init__(self, kind: str, dim: int, hidden: int | None = None) -> None:
        super().__init__()
        if kind not in TRANSFORMS:
            raise InputError(f"attention.transform={kind} is unknown; choose one of {', '.join(TRANSFORMS)}")
        if hidden is not None:
            check_number("attention.hidden", hidden, minimum=1, whole=True, remedy="null is as wide as the vectors")
        self.kind = kind
        self.network: nn.Module | None = None
        if kind in ("mlp", "residual"):
            width = hidden or dim
            self.network = nn.Sequential(nn.Linear(dim, width), nn.ReLU(), nn.Linear(width, dim))
        elif kind == "linear":
            self.network = nn.Linear(dim, dim, bias=False)
        if kind in ("residual", "linear"):
            last = self.network[-1] if isinstance(self.network, nn.Sequential) else self.network
            for parameter in last.parameters():  # type: ignore[union-attr]
                nn.init.zeros_(parameter)

    @property
    def starts_at_exact_search(self) -> bool:
        """Whether the untrained transform leaves every query as it is."""
        return self.kind != "mlp"

    def forward(self, queries: Tensor) -> Tensor:
        if self.network is None:
            return queries
        moved = self.network(queries)
        return moved if self.kind == "mlp" else queries + moved


class SoftAttention(nn.Module):
    """Attention over memory: logits = beta z V^T, (B, N), with z = normalize(T(q)); their softmax sums to one.

    beta = exp(log_beta) is learned: the temperature 1/beta stays positive whatever the optimiser does. Without
    `normalize`, z = T(q): its length is a confidence that each query has for itself, as in the original system.

    Raises:
        InputError: an unknown transform, or a beta that is not positive and finite.
    """

    def __init__(
        self,
        memory: VectorMemory,
        *,
        transform: str = "mlp",
        hidden: int | None = None,
        normalize: bool = True,
        beta: float = 20.0,
    ) -> None:
        super().__init__()
        check_number("attention.beta", beta, above=0, remedy="20 is a good start for unit vectors")
        if not isinstance(normalize, bool):
            raise InputError(f"attention.normalize={normalize} is neither true nor false; true is the default")
        self.memory = memory
        self.normalize = normalize
        self.transform = QueryTransform(transform, memory.dim, hidden)
        self.log_beta = nn.Parameter(torch.tensor(math.log(beta)))
        self.settings = {"transform": transform, "hidden": hidden, "normalize": normalize}

    @property
    def beta(self) -> Tensor:
        """The inverse temperature, a positive scalar."""
        return self.log_beta.exp()

    def keys(self) -> Tensor:
        """What queries are compared with, (N, D) unit rows."""
        return self.memory.rows

    def transformed(self, queries: Tensor) -> Tensor:
        """z, (B, D)."""
        moved = self.transform(queries)
        return F.normalize(moved, dim=-1) if self.normalize else moved

    def project(self, queries: Tensor) -> Tensor:
        """beta z, (B, D): its inner products with the keys are the logits."""
        return self.beta * self.transformed(queries)

    def forward(self, queries: Tensor) -> Tensor:
        return self.project(queries) @ self.keys().T  # (B, N)

    def answer(self, queries: Tensor) -> Tensor:
        """The soft answer softmax(logits) V, (B, D)."""
        return self(queries).softmax(dim=-1) @ self.memory.rows

    def candidates(self, queries: Tensor, k: int, *, logsumexp: bool = False) -> TopK:
        """The k rows of highest attention and their logits, and if asked the log-sum-exp over all rows; in blocks.

        Raises:
            InputError: k is not in 1..N.
        """
        check_k(k, len(self.memory))
        return blockwise_topk(self.project(queries), self.keys(), k, logsumexp=logsumexp)


def attention_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """-log of the probability of the right rows, mean over the batch.

    Args:
        logits: (B, N); any additive constant per query cancels, so a pipeline's log-probabilities serve too.
        targets: (B, m) rows of the memory, padded with -1; with m = 1 this is cross-entropy.
    """
    if targets.shape[1] == 1:
        return F.cross_entropy(logits, targets[:, 0])
    right = logits.gather(-1, targets.clamp(min=0)).masked_fill(targets < 0, -math.inf)
    return (logits.logsumexp(dim=-1) - right.logsumexp(dim=-1)).mean()


def fit_temperature(attention: SoftAttention, queries: Tensor, targets: Tensor) -> None:
    """Set beta to the minimum of the loss over held-out queries, which orders no row anew.

    Training stops where Top-1 is best, not where the probabilities are right; what the pipeline says of the rows
    outside the candidates depends on both. The loss is convex in beta, so bisection on the sign of its slope finds the
    minimum within BETA_RANGE. As many queries are used as keep the scores in one block, at least 256.
    """
    count = max(256, SCORE_BLOCK // len(attention.memory))
    queries, targets = queries[:count], targets[:count]
    with torch.no_grad():
        scores = attention.transformed(queries) @ attention.keys().T  # (B, N)
        low, high = (math.log(beta) for beta in BETA_RANGE)
        for _ in range(20):
            middle = torch.full((), (low + high) / 2, device=scores.device, requires_grad=True)
            with torch.enable_grad():
                (slope,) = torch.autograd.grad(attention_loss(middle.exp() * scores, targets), middle)
            low, high = (low, float(middle)) if slope > 0 else (float(middle), high)
        attention.log_beta.fill_((low + high) / 2)
