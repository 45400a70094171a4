"""What a fitted model does with queries one by one: the arrays behind TensorBoard's figures."""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from nvf.data.queries import QueryBatch, score_blocks
from nvf.models.attention import SoftAttention
from nvf.models.memory import unit
from nvf.models.pipeline import Pipeline
from nvf.ops.products import inner_products
from nvf.ops.ranks import target_ranks
from nvf.ops.topk import first_topk


class Looked(NamedTuple):
    """What the figures show of B queries; methods are `exact search`, `oracle`, `stage 1` and `pipeline`."""

    targets: np.ndarray  # (B, m), padded with -1
    ranks: dict[str, np.ndarray]  # (B,) of the target, by method
    confidences: dict[str, np.ndarray]  # (B,) of the answer, for stage 1 and the pipeline
    rows: np.ndarray  # (B, k) candidates, in stage 1's order
    probabilities: dict[str, np.ndarray]  # (B, k), theirs

    @property
    def right(self) -> np.ndarray:
        """Which candidates are targets, (B, k) bool."""
        return (self.rows[:, :, None] == self.targets[:, None, :]).any(axis=-1)

    def share(self, method: str, rank: int) -> float:
        """The share of queries whose target is among a method's first rows, or among the candidates (`coverage`)."""
        found = self.right.any(axis=-1) if method == "coverage" else self.ranks[method] <= rank
        return float(found.mean())


@torch.no_grad()
def look(model: SoftAttention | Pipeline, batch: QueryBatch, *, k: int, oracle: Tensor | None) -> Looked:
    """Ranks, confidences and candidates of every query, in blocks that hold no more than one of (B, N) scores."""
    memory = model.memory.rows
    parts: list[dict[str, dict[str, Tensor]]] = []
    for queries, targets in score_blocks(batch, len(memory)):
        exact = target_ranks(inner_products(unit(queries), memory), targets)
        part: dict[str, dict[str, Tensor]] = {
            "ranks": {"exact search": exact},
            "confidences": {},
            "probabilities": {},
        }
        if oracle is not None:
            same = oracle is memory
            part["ranks"]["oracle"] = exact if same else target_ranks(inner_products(queries, oracle), targets)
        for method, (scores, total, ranking) in scored(model, queries).items():
            if method == "stage 1":
                rows = first_topk(scores, k)
            part["ranks"][method] = target_ranks(ranking, targets)
            part["confidences"][method] = (scores.amax(dim=-1) - total).exp()
            part["probabilities"][method] = (scores.gather(-1, rows) - total.unsqueeze(-1)).exp()
        parts.append({**part, "rows": {"": rows}})
    joined = {
        kind: {name: torch.cat([part[kind][name] for part in parts]).cpu().numpy() for name in parts[0][kind]}
        for kind in parts[0]
    }
    return Looked(
        batch.targets.cpu().numpy(), joined["ranks"], joined["confidences"], joined["rows"][""], joined["probabilities"]
    )


def scored(model: SoftAttention | Pipeline, queries: Tensor) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """Of stage 1, and of the pipeline if there is one: the rows' scores, (B, N), their log-sum-exp, (B,), and ranking.

    A row's probability is exp(score - log-sum-exp); the ranking, (B, N), is highest for the first of the list.
    """
    if isinstance(model, Pipeline):
        found = model(queries, answer=False)
        return {
            "stage 1": (found.logits, found.logits.logsumexp(dim=-1), found.logits),
            "pipeline": (found.log_probs, found.log_probs.new_zeros(len(queries)), found.ranking),
        }
    logits = model(queries)
    return {"stage 1": (logits, logits.logsumexp(dim=-1), logits)}


def exemplary(looked: Looked, count: int) -> list[int]:
    """Queries to look at, at most `count`: those won by the last method over the one before, those lost, the rest.

    Each has a third of the places, and what another does not fill.
    """
    before, after = ("stage 1", "pipeline") if "pipeline" in looked.ranks else ("exact search", "stage 1")
    was, now = looked.ranks[before] == 1, looked.ranks[after] == 1
    groups = [np.flatnonzero(group).tolist() for group in (now & ~was, was & ~now, was == now)]
    taken = [0, 0, 0]
    places = min(count, len(was))
    while sum(taken) < places:  # dealt in turn, as long as a group has any
        for number, group in enumerate(groups):
            if taken[number] < len(group) and sum(taken) < places:
                taken[number] += 1
    return [query for group, some in zip(groups, taken, strict=True) for query in group[:some]]
