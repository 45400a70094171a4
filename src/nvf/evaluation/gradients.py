"""The norms of the gradients on the query and on each part of the model, which show whether every part is trained."""

import math
from collections.abc import Iterable
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor

from nvf.data.queries import QueryBatch, each
from nvf.models.attention import SoftAttention
from nvf.models.pipeline import Pipeline

PARTS = ("query", "transform", "temperature", "keys", "reranker")
AUDITED = 256  # queries
MOST_KEYS = 2**27  # numbers in the keys of a memory up to which the gradient on learned keys is measured; it takes 4 GB


def norms(gradients: Iterable[tuple[str, Tensor | None]]) -> dict[str, Tensor]:
    """Return the norm of the gradient on each part that has one, on the device, from named tensors' gradients."""
    parts = {"log_beta": "temperature", "delta": "keys", "query": "query"}  # by a parameter's last name
    squares: dict[str, Tensor] = {}
    for name, gradient in gradients:
        if gradient is not None:
            *modules, last = name.split(".")
            part = "reranker" if "reranker" in modules else parts.get(last, "transform")
            square = gradient.detach().float().square().sum()
            squares[part] = squares[part] + square if part in squares else square
    return {part: squares[part].sqrt() for part in PARTS if part in squares}


def audit_gradients(
    model: SoftAttention | Pipeline, batch: QueryBatch, *, most_keys: int = MOST_KEYS
) -> dict[str, Any]:
    """Return norms of the gradient of the model's loss on the first AUDITED queries, frozen parameters included.

    Each of PARTS has a norm, None if the model lacks the part or the norm is not finite, and under `parameters` each
    parameter; `finite` says whether all are, and `vanished` names the parameters whose norm is zero. Learned keys of a
    memory of more than `most_keys` numbers are left out: only training logs the norm of their gradient.
    """
    model.eval()
    queries = batch.queries[:AUDITED].clone().requires_grad_(True)
    named = {"query": queries, **dict(model.named_parameters())}
    if model.memory.keys.numel() > most_keys:
        named = {name: tensor for name, tensor in named.items() if name.rpartition(".")[2] != "delta"}
    frozen = [tensor for tensor in named.values() if not tensor.requires_grad]
    for parameter in frozen:
        parameter.requires_grad_(True)
    batch = each(batch, itemgetter(slice(AUDITED)))
    losses = model.loss(queries, batch.targets, batch.words)
    loss = losses[0] if isinstance(losses, tuple) else losses  # a pipeline's also has stage 1's
    gradients = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    for parameter in frozen:
        parameter.requires_grad_(False)
    parts = {part: float(norm) for part, norm in norms(gradients.items()).items()}
    single = {name: float(gradient.norm()) for name, gradient in gradients.items() if name != "query"}
    return {
        **dict.fromkeys(PARTS),
        **{part: norm if math.isfinite(norm) else None for part, norm in parts.items()},
        "parameters": {name: norm if math.isfinite(norm) else None for name, norm in single.items()},
        "finite": all(math.isfinite(value) for value in (parts["query"], *single.values())),
        "vanished": [name for name, value in single.items() if value == 0],
    }
