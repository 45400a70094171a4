"""Whether gradients arrive: their norms on the query and on each part of the model, in training and at its end."""

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from nvf.data.queries import QueryBatch
from nvf.models.attention import SoftAttention, attention_loss
from nvf.models.pipeline import Pipeline

PARTS = ("query", "transform", "temperature", "keys", "reranker")
AUDITED = 256  # queries


def part_of(name: str) -> str:
    """The part that a tensor belongs to, by its name: a parameter's, or `query`."""
    *modules, last = name.split(".")
    if "reranker" in modules:
        return "reranker"
    return {"log_beta": "temperature", "delta": "keys", "query": "query"}.get(last, "transform")


def norms(gradients: Iterable[tuple[str, Tensor | None]]) -> dict[str, Tensor]:
    """The norm of the gradient on each part that has one, from the gradients of named tensors; no host waits."""
    squares: dict[str, Tensor] = {}
    for name, gradient in gradients:
        if gradient is not None:
            part, square = part_of(name), gradient.detach().float().square().sum()
            squares[part] = squares[part] + square if part in squares else square
    return {part: squares[part].sqrt() for part in PARTS if part in squares}


def audit_gradients(model: SoftAttention | Pipeline, batch: QueryBatch) -> dict[str, Any]:
    """Norms of the gradient of the model's loss on the first queries of a batch, frozen parameters included.

    Returns:
        One norm for each of PARTS, None where the model has no such part or the norm is not finite; under `parameters`
        one for each parameter; `finite`, whether all are; `vanished`, the names of parameters whose norm is zero.
    """
    model.eval()
    queries = batch.queries[:AUDITED].clone().requires_grad_(True)
    named = {"query": queries, **dict(model.named_parameters())}
    frozen = [tensor for tensor in named.values() if not tensor.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    logits = model(queries, answer=False).log_probs if isinstance(model, Pipeline) else model(queries)
    gradients = torch.autograd.grad(attention_loss(logits, batch.targets[:AUDITED]), list(named.values()))
    for parameter in frozen:
        parameter.requires_grad_(False)
    found = dict(zip(named, gradients, strict=True))
    parts = {part: float(norm) for part, norm in norms(found.items()).items()}
    single = {name: float(gradient.norm()) for name, gradient in found.items() if name != "query"}
    return {
        **{part: _number(parts[part]) if part in parts else None for part in PARTS},
        "parameters": {name: _number(value) for name, value in single.items()},
        "finite": all(math.isfinite(value) for value in (parts["query"], *single.values())),
        "vanished": [name for name, value in single.items() if value == 0],
    }


def failures(training: Mapping[str, Mapping[str, Any]]) -> list[str]:
    """A line for each part whose gradient in training was not finite, or zero in the end; `summary` of each stage."""
    lines = []
    for stage, found in training.items():
        for part in (part for part in PARTS if part in found):
            told = f"{stage}: the gradient on the {part} was {{}} of {found['steps']} steps"
            if lost := found[part]["not_finite"]:
                lines.append(told.format(f"not finite in {lost}"))
            if found[part]["last"] == 0:  # in the first step it may well be: some last layers start at zero
                lines.append(told.format(f"zero in {found[part]['zero']}") + ", the last among them")
    return lines


def _number(value: float) -> float | None:
    return value if math.isfinite(value) else None
