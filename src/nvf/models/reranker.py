"""Stage 2, foveal vision: a small network compares the query with each candidate, or weighs evidence about it."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from nvf.errors import InputError, check_number
from nvf.models.evidence import FEATURES
from nvf.ops.frozen_cache import FrozenCache

RERANKERS = ("mlp", "residual")
IGNORED = 1e30  # the scale of a feature that is ignored; infinity could not be saved


class Reranker(nn.Module):
    """One score per candidate, (B, k), from the features [q, c, q - c, q * c].

    `mlp` scores by Linear-ReLU-Dropout-Linear-ReLU-Linear alone. `residual` adds what stage 1 knows:
    w_a logit + w_c beta cos(q, c) + mlp. At the start w_a = 1 and w_c and the last layer are zero, which is stage 1's
    order. The last layer has no bias, since a constant for all candidates changes no softmax.
    """

    def __init__(self, dim: int, *, kind: str = "mlp", hidden: Sequence[int] = (128, 64), dropout: float = 0.1) -> None:
        super().__init__()
        if kind not in RERANKERS:
            raise InputError(f"reranker.kind={kind} is unknown; choose one of {', '.join(RERANKERS)}")
        self.kind = kind
        self.starts_at_stage_one = kind == "residual"  # whether it keeps the order of the logits until it is trained
        self.settings = _settings(kind, hidden, dropout)
        self.first = nn.Linear(4 * dim, hidden[0])
        self._factors = FrozenCache()
        self.rest = _network(hidden, dropout, zero=kind == "residual")
        if kind == "residual":
            self.evidence = nn.Parameter(torch.tensor([1.0, 0.0]))  # w_a, w_c

    def forward(self, queries: Tensor, candidates: Tensor, logits: Tensor, beta: Tensor) -> Tensor:
        """Return scores, (B, k), of unit candidates, (B, k, D), with stage 1's logits, (B, k), for queries, (B, D)."""
        queries, candidates = (vectors.to(self.first.weight.dtype) for vectors in (queries, candidates))
        scores = self.rest(self.first_layer(queries, candidates)).view(candidates.shape[:2])  # (B, k)
        if self.kind == "residual":
            cosine, (w_logit, w_cosine) = (queries.unsqueeze(1) * candidates).sum(dim=-1), self.evidence.unbind()
            scores = scores + w_logit * logits + w_cosine * beta * cosine
        return scores

    @torch.no_grad()
    def sharpen(self, factor: float) -> None:
        """Multiply all scores by the factor, which divides the temperature of their softmax by it."""
        for weight in (*self.rest[-1].parameters(), *([self.evidence] if self.kind == "residual" else [])):
            weight.mul_(factor)

    def first_layer(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """Return W [q, c, q - c, q * c] + b, (B k, hidden), as (W1 + W3) q + (W2 - W3) c + W4 (q * c) + b."""
        of_query, of_candidate, of_product = self._factors(self._factored, [self.first.weight])  # (D, hidden) each
        from_query = torch.addmm(self.first.bias, queries, of_query)  # (B, hidden)
        outputs = (candidates @ of_candidate).add(from_query.unsqueeze(1))  # (B, k, hidden)
        products = queries.unsqueeze(1) * candidates  # (B, k, D)
        return torch.addmm(outputs.flatten(0, 1), products.flatten(0, 1), of_product)

    def _factored(self) -> tuple[Tensor, Tensor, Tensor]:
        w_query, w_candidate, w_difference, w_product = self.first.weight.chunk(4, dim=-1)
        return (w_query + w_difference).T, (w_candidate - w_difference).T, w_product.T


class EvidenceReranker(nn.Module):
    """Scores logit + w x + mlp(x), (B, k), from candidates' standardised evidence x; at the start, stage 1's order."""

    starts_at_stage_one = True
    mean: Tensor
    scale: Tensor

    def __init__(self, features: int, *, hidden: Sequence[int] = (64, 64), dropout: float = 0.1) -> None:
        super().__init__()
        self.settings = _settings("evidence", hidden, dropout)
        self.network = _network(hidden, dropout, zero=True, inputs=features)
        self.weight = nn.Parameter(torch.zeros(features))
        self.register_buffer("mean", torch.zeros(features))
        self.register_buffer("scale", torch.ones(features))

    def standardise(self, evidence: Tensor, ignored: Sequence[str] = ()) -> None:
        """Take mean and deviation from training candidates' evidence, (n, k, F); ignored features become zero."""
        flat = evidence.flatten(0, 1)
        deviation = flat.std(dim=0, correction=0)
        self.mean.copy_(flat.mean(dim=0))
        self.scale.copy_(deviation.where(deviation > 1e-6, 1.0))  # a feature that never varies stays near zero
        self.scale[[FEATURES.index(name) for name in ignored]] = IGNORED

    @torch.no_grad()
    def sharpen(self, factor: float) -> None:
        """Multiply all scores by the factor, up to one constant a query, as `Reranker.sharpen` does."""
        for weight in (*self.network[-1].parameters(), self.weight):
            weight.mul_(factor)
        logit = FEATURES.index("logit")  # stage 1's logit has the fixed coefficient 1: the rest is added here
        self.weight[logit] += (factor - 1) * self.scale[logit]

    def forward(self, logits: Tensor, evidence: Tensor) -> Tensor:
        """Return scores, (B, k), from stage 1's logits, (B, k), and the evidence, (B, k, F)."""
        standard = ((evidence - self.mean) / self.scale).to(self.weight.dtype)
        return logits + standard @ self.weight + self.network(standard).squeeze(-1)


def _settings(kind: str, hidden: Sequence[int], dropout: float) -> dict[str, Any]:
    check_number("reranker.dropout", dropout, minimum=0, below=1, remedy="0.1 is the usual value")
    if not isinstance(hidden, list | tuple) or len(hidden) != 2:
        raise InputError(f"reranker.hidden={hidden} is not two widths; [128, 64] is the default")
    for width in hidden:
        check_number("reranker.hidden", width, minimum=1, whole=True, remedy="[128, 64] is the default")
    return {"kind": kind, "hidden": [int(width) for width in hidden], "dropout": float(dropout)}


def _network(hidden: Sequence[int], dropout: float, *, zero: bool, inputs: int | None = None) -> nn.Sequential:
    """Make (Linear-)ReLU-Dropout-Linear-ReLU-Linear, whose last layer starts at zero if `zero`."""
    last = nn.Linear(hidden[1], 1, bias=False)
    if zero:
        nn.init.zeros_(last.weight)
    first = [] if inputs is None else [nn.Linear(inputs, hidden[0])]
    return nn.Sequential(*first, nn.ReLU(), nn.Dropout(dropout), nn.Linear(hidden[0], hidden[1]), nn.ReLU(), last)


def reranker_loss(scores: Tensor, labels: Tensor) -> Tensor:
    """-log of the probability of a right candidate, mean over these and over the samples that have any; else zero.

    Scores are (B, k), and so are labels, bool, true where the candidate is right.
    """
    valid = labels.any(dim=-1)
    right = scores.masked_fill(~labels, 0).sum(dim=-1) / labels.sum(dim=-1).clamp(min=1)
    losses = (scores.logsumexp(dim=-1) - right).where(valid, 0)
    return losses.sum() / valid.sum().clamp(min=1)
