"""Train an encoder in front of a frozen pipeline, by a loss behind it.

    python -m nvf.examples.upstream

Each of 500 rows has a payload of 8 numbers, which a frozen head computes. The encoder sees rows by a noisy map, and its
loss is how far the head's output for the retrieved vector is from the payload. Only the soft answer passes a gradient.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvf import Pipeline, Reranker, SoftAttention, VectorMemory

ROWS, DIM, OBSERVED, PAYLOAD = 500, 32, 48, 8


def fit(pipeline: Pipeline, answer: str, steps: int) -> float:
    """Train an encoder through the `soft` or the `hard` answer; return the share of right rows that it then finds."""
    generator = torch.Generator().manual_seed(0)
    vectors = pipeline.memory.rows
    hidden = torch.randn(DIM, OBSERVED, generator=generator)
    head = torch.randn(DIM, PAYLOAD, generator=generator)
    torch.manual_seed(0)
    encoder = nn.Sequential(nn.Linear(OBSERVED, 128), nn.ReLU(), nn.Linear(128, DIM))
    optimizer = torch.optim.Adam(encoder.parameters(), lr=3e-3)

    def observe(count: int) -> tuple[Tensor, Tensor]:  # (count, OBSERVED), and the rows, (count,)
        rows = torch.randint(ROWS, (count,), generator=generator)
        noise = torch.randn(count, OBSERVED, generator=generator)
        return torch.tanh(vectors[rows] @ hidden) + 0.1 * noise, rows

    for _ in range(steps):
        observations, rows = observe(256)
        found = pipeline(encoder(observations))
        retrieved = found.answer if answer == "soft" else vectors[found.log_probs.argmax(dim=-1)]  # (B, DIM)
        loss = F.mse_loss(retrieved @ head, vectors[rows] @ head)
        if not loss.requires_grad:
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    observations, rows = observe(4000)
    right = pipeline.search(encoder(observations).detach(), k=1).rows[:, 0] == rows
    return float(right.float().mean())


def main(steps: int = 1500) -> dict[str, float]:
    """Train through either answer, print the share of right rows that each leads to, and return both."""
    attention = SoftAttention(VectorMemory.synthetic(rows=ROWS, dim=DIM, seed=0), transform="identity", beta=10.0)
    pipeline = Pipeline(attention, Reranker(DIM, kind="residual")).requires_grad_(False).eval()
    shares = {answer: fit(pipeline, answer, steps) for answer in ("hard", "soft")}
    for answer, share in shares.items():
        print(f"trained through the {answer} answer: right row first {share:6.1%}")
    print(f"by chance: {1 / ROWS:.1%}")
    return shares


if __name__ == "__main__":
    main()
