"""Bias and variance of the gradient estimators, against finite differences of the expected loss.

    python tests/benchmarks/estimators.py [queries=2000000]

The case is small enough for the truth: 12 rows in 4 dimensions, k = 3, noisy queries, an imperfect stage 1 and a
reranker that knows better. The derivative of the expected loss along a direction in stage 1's weights is, by central
differences over the same queries, known up to a standard error, with every jump in it that the choice of the
candidates makes. Each estimator gives one derivative a query: their mean less the truth is its bias.
"""

import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from nvf.data.queries import Noisy, QueryBatch
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import Reranker
from nvf.ops.random_streams import stream

TEMPERATURES = (3.0, 1.0, 0.3, 0.1, 0.03, 0.01)
STEP = 1e-2  # of the central difference, where the direction has length 1
BLOCK = 100_000


class Estimate(NamedTuple):
    """The mean of one derivative a query, its standard error, and the deviation from query to query."""

    mean: float
    error: float
    deviation: float


def case() -> Pipeline:
    """Both stages, in float64, with nothing left at zero."""
    generator = stream(0, "weights")
    memory = VectorMemory.synthetic(rows=12, dim=4, seed=0)
    pipeline = Pipeline(SoftAttention(memory, transform="linear", beta=6.0), Reranker(4, kind="residual"), k=3)
    with torch.no_grad():
        pipeline.attention.transform.network.weight.copy_(0.6 * torch.randn(4, 4, generator=generator))
        pipeline.reranker.evidence.copy_(torch.tensor([0.0, 2.0]))  # the cosine alone
    return pipeline.double().eval()


def direction(pipeline: Pipeline) -> Tensor:
    """Of length 1, towards a stage 1 that moves no query, (4, 4): along it targets come to be candidates."""
    weight = pipeline.attention.transform.network.weight.detach()
    return -weight / weight.norm()


def draw(pipeline: Pipeline, count: int) -> Iterator[QueryBatch]:
    """Queries in blocks, the same for every estimator."""
    source = Noisy(VectorMemory(pipeline.memory.rows.float()), sigma=0.3)
    generator = stream(0, "test")
    for start in range(0, count, BLOCK):
        batch = source.sample(min(BLOCK, count - start), generator)
        yield QueryBatch(batch.queries.double(), batch.targets)


def losses(pipeline: Pipeline, weight: Tensor, batch: QueryBatch, relaxation: float | None = None) -> Tensor:
    """-log of the target's probability at other weights of stage 1, (B,)."""
    name = "attention.transform.network.weight"
    asked = {"relaxation": relaxation, "answer": False}
    found = torch.func.functional_call(pipeline, {name: weight}, (batch.queries,), asked)
    return -found.log_probs.gather(-1, batch.targets).squeeze(-1)


def truth(pipeline: Pipeline, count: int) -> Estimate:
    """The derivative of the expected loss, by central differences."""
    weight, along = pipeline.attention.transform.network.weight.detach(), direction(pipeline)
    parts = []
    for batch in draw(pipeline, count):
        ahead, behind = (losses(pipeline, weight + sign * STEP * along, batch) for sign in (1, -1))
        parts.append(((ahead - behind) / (2 * STEP)).detach())
    return _estimate(torch.cat(parts))


def estimate(pipeline: Pipeline, count: int, relaxation: float | None = None) -> Estimate:
    """The derivative as an estimator gives it: `exact` where the relaxation is None."""
    weight, along = pipeline.attention.transform.network.weight.detach(), direction(pipeline)
    parts = []
    for batch in draw(pipeline, count):

        def at(weight: Tensor, batch: QueryBatch = batch) -> Tensor:
            return losses(pipeline, weight, batch, relaxation)

        parts.append(torch.func.jvp(at, (weight,), (along,))[1].detach())
    return _estimate(torch.cat(parts))


def _estimate(values: Tensor) -> Estimate:
    deviation = float(values.std())
    return Estimate(float(values.mean()), deviation / len(values) ** 0.5, deviation)


def main(count: int) -> None:
    """Print a row an estimator."""
    pipeline = case()
    true = truth(pipeline, count)
    print(f"derivative of the expected loss, from {count:,} queries: {true.mean:.4f} +- {true.error:.4f}")
    print("estimator               derivative  bias              deviation a query")
    for relaxation in (None, *TEMPERATURES):
        found = estimate(pipeline, count, relaxation)
        name = "exact" if relaxation is None else f"relaxed, {relaxation:g}"
        error = (found.error**2 + true.error**2) ** 0.5
        print(f"{name:22}  {found.mean:10.4f}  {found.mean - true.mean:+.4f} +- {error:.4f}  {found.deviation:10.2f}")


if __name__ == "__main__":
    main(int(dict(argument.split("=") for argument in sys.argv[1:]).get("queries", 2_000_000)))
