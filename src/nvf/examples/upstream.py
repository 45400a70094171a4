"""An encoder in front of a frozen memory, trained through it, from the loss behind it alone.

    python -m nvf.examples.upstream

Each of 500 rows of a memory has a payload of 8 numbers behind a frozen head. An encoder sees observations, each of them
a hidden map of one row plus noise, and is told neither the row nor the map: only how far the head's output is from that
row's payload. Through the pipeline's soft answer this loss reaches the encoder; through the row that is ranked first no
gradient does.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvf import Pipeline, Reranker, SoftAttention, VectorMemory

ROWS, DIM, OBSERVED, PAYLOAD = 500, 32, 48, 8
NOISE = 0.1
STEPS, BATCH, LR = 1500, 256, 3e-3


class World:
    """What the observations are of, and what they should lead to."""

    def __init__(self, memory: VectorMemory) -> None:
        self.generator = torch.Generator().manual_seed(0)
        self.memory = memory
        self.hidden = torch.randn(DIM, OBSERVED, generator=self.generator)
        self.head = torch.randn(DIM, PAYLOAD, generator=self.generator)

    def observe(self, count: int) -> tuple[Tensor, Tensor]:
        """Observations, (count, OBSERVED), and the rows that they are of, (count,)."""
        rows = torch.randint(len(self.memory), (count,), generator=self.generator)
        noise = torch.randn(count, OBSERVED, generator=self.generator)
        return torch.tanh(self.memory.rows[rows] @ self.hidden) + NOISE * noise, rows

    def loss(self, answers: Tensor, rows: Tensor) -> Tensor:
        """How far the payloads of retrieved vectors, (B, DIM), are from those of the right rows."""
        return F.mse_loss(answers @ self.head, self.memory.rows[rows] @ self.head)


def soft(pipeline: Pipeline, queries: Tensor) -> Tensor:
    """The soft-retrieved vectors."""
    answer = pipeline(queries).answer
    assert answer is not None
    return answer


def hard(pipeline: Pipeline, queries: Tensor) -> Tensor:
    """The rows that are ranked first."""
    return pipeline.memory.rows[pipeline(queries).log_probs.argmax(dim=-1)]


def fit(retrieve: Callable[[Pipeline, Tensor], Tensor], pipeline: Pipeline, world: World, steps: int) -> nn.Module:
    """An encoder of observations, trained through what is retrieved; untrained if no gradient comes through."""
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(OBSERVED, 128), nn.ReLU(), nn.Linear(128, DIM))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=LR)
    for _ in range(steps):
        observations, rows = world.observe(BATCH)
        loss = world.loss(retrieve(pipeline, encoder(observations)), rows)
        if not loss.requires_grad:
            print("no gradient comes back through the", retrieve.__name__, "answer")
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return encoder


@torch.no_grad()
def main(steps: int = STEPS) -> dict[str, float]:
    """Train both ways, print what each finds, and return it."""
    memory = VectorMemory.synthetic(rows=ROWS, dim=DIM, seed=0)
    attention = SoftAttention(memory, transform="identity", beta=10.0)
    pipeline = Pipeline(attention, Reranker(DIM, kind="residual")).requires_grad_(False).eval()
    shares = {}
    for retrieve in (hard, soft):
        world, started = World(memory), time.perf_counter()
        with torch.enable_grad():
            encoder = fit(retrieve, pipeline, world, steps)
        observations, rows = world.observe(4000)
        found = pipeline.search(encoder(observations), k=1).rows[:, 0] == rows
        shares[retrieve.__name__] = share = float(found.float().mean())
        seconds = time.perf_counter() - started
        print(f"trained through the {retrieve.__name__} answer: right row first {100 * share:5.1f} %, {seconds:.0f} s")
    print(f"by chance: {100 / ROWS:.1f} %")
    return shares


if __name__ == "__main__":
    main()
