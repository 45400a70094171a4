"""An encoder in front of a frozen memory is trained through it, by a loss behind it.

    python -m nvf.examples.upstream

Each of 500 rows of a memory has a payload of 8 numbers behind a frozen head. An encoder sees observations, each of them
a hidden map of one row plus noise, and is told neither the row nor the map: only how far the head's output is from that
row's payload. Through the pipeline's soft answer this loss reaches the encoder; through the row that is ranked first no
gradient does.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvf import Pipeline, Reranker, SoftAttention, VectorMemory

ROWS, DIM, OBSERVED, PAYLOAD = 500, 32, 48, 8
NOISE = 0.1
STEPS, BATCH, LR = 1500, 256, 3e-3


class World:
    """What is observed of each row, and the payload that it should lead to."""

    def __init__(self, memory: VectorMemory) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.memory = memory
        self.hidden = torch.randn(DIM, OBSERVED, generator=self.generator)
        self.head = torch.randn(DIM, PAYLOAD, generator=self.generator)

    def observe(self, count: int) -> tuple[Tensor, Tensor]:
        """Draw observations, (count, OBSERVED), and the rows that they are of, (count,)."""
        rows = torch.randint(len(self.memory), (count,), generator=self.generator)
        noise = torch.randn(count, OBSERVED, generator=self.generator)
        return torch.tanh(self.memory.rows[rows] @ self.hidden) + NOISE * noise, rows


def soft(pipeline: Pipeline, queries: Tensor) -> Tensor:
    """The soft-retrieved vectors, (B, DIM)."""
    return pipeline(queries).answer


def hard(pipeline: Pipeline, queries: Tensor) -> Tensor:
    """The rows that are ranked first, (B, DIM)."""
    return pipeline.memory.rows[pipeline(queries).log_probs.argmax(dim=-1)]


def fit(retrieve: Callable[[Pipeline, Tensor], Tensor], pipeline: Pipeline, world: World, steps: int) -> nn.Module:
    """Train an encoder of observations through what is retrieved; it stays untrained if no gradient comes through."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(OBSERVED, 128), nn.ReLU(), nn.Linear(128, DIM))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=LR)
    for _ in range(steps):
        observations, rows = world.observe(BATCH)
        answers = retrieve(pipeline, encoder(observations))
        loss = F.mse_loss(answers @ world.head, world.memory.rows[rows] @ world.head)
        if not loss.requires_grad:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder


def main(steps: int = STEPS) -> dict[str, float]:
    """Train both ways, print the share of right rows that each finds, and return it."""
    memory = VectorMemory.synthetic(rows=ROWS, dim=DIM, seed=0)
    attention = SoftAttention(memory, transform="identity", beta=10.0)
    pipeline = Pipeline(attention, Reranker(DIM, kind="residual")).requires_grad_(False).eval()
    shares = {}
    for retrieve in (hard, soft):
        world = World(memory)
        encoder = fit(retrieve, pipeline, world, steps)
        observations, rows = world.observe(4000)
        right = pipeline.search(encoder(observations).detach(), k=1).rows[:, 0] == rows
        shares[retrieve.__name__] = float(right.float().mean())
        print(f"trained through the {retrieve.__name__} answer: right row first {shares[retrieve.__name__]:6.1%}")
    print(f"by chance: {1 / ROWS:.1%}")
    return shares


if __name__ == "__main__":
    main()
