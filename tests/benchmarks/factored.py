"""The reranker's factored first layer next to the plain concatenation, in time and in memory, with the same weights.

    python tests/benchmarks/factored.py [batch=512] [repeats=25] [threads=2] [folder=outputs/benchmarks]

One forward and backward pass of the whole reranker, as training makes it: the gradient goes to its weights.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from nvf.models.reranker import RERANKERS, Reranker, reranker_loss
from nvf.ops.random_streams import stream
from nvf.options import Option, parse, whole
from timing import COMMON, interleaved, peak_bytes, table, whole_numbers, write_json

FASTER, SMALLER = 1.5, 0.5  # the targets
HIDDEN = (128, 64)
OPTIONS = (
    Option("batch", "queries", 512, whole),
    Option("dims", "D", [128, 384], whole_numbers),
    Option("candidates", "k", [5, 20], whole_numbers),
    Option("repeats", "of either, in turn", 25, whole),
    *COMMON,
)


class Concatenated(Reranker):
    """The same function, from the (B, k, 4D) features."""

    def first_layer(self, queries: Tensor, candidates: Tensor) -> Tensor:
        """W [q, c, q - c, q * c] + b, (B k, hidden)."""
        q = queries.unsqueeze(1).expand_as(candidates)
        return self.first(torch.cat([q, candidates, q - candidates, q * candidates], dim=-1).flatten(0, 1))


def pair(kind: str, dim: int) -> tuple[Reranker, Concatenated]:
    """Two rerankers of the same weights, without dropout: drawing the masks takes either as long."""
    generator = stream(0, "weights")
    factored, concatenated = (made(dim, kind=kind, hidden=HIDDEN, dropout=0.0) for made in (Reranker, Concatenated))
    with torch.no_grad():
        for parameter in factored.parameters():
            parameter += 0.05 * torch.randn(parameter.shape, generator=generator)
    concatenated.load_state_dict(factored.state_dict())
    return factored, concatenated


def batch_of(count: int, k: int, dim: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Queries, candidates, logits and labels."""
    generator = stream(0, "batch")
    queries, candidates = (
        F.normalize(torch.randn(shape, generator=generator), dim=-1) for shape in ((count, dim), (count, k, dim))
    )
    logits = torch.randn(count, k, generator=generator)
    return queries, candidates, logits, logits == logits.amax(dim=-1, keepdim=True)


def training_pass(reranker: Reranker, batch: tuple[Tensor, Tensor, Tensor, Tensor]) -> Callable[[], None]:
    """Forward and backward; gradients add up, as nothing else would be the same in every call."""
    queries, candidates, logits, labels = batch
    beta = torch.tensor(20.0)

    def run() -> None:
        reranker_loss(reranker(queries, candidates, logits, beta), labels).backward()

    return run


def compare(batch: int, candidates: Sequence[int], dims: Sequence[int], repeats: int) -> list[dict[str, Any]]:
    """Every case: seconds and bytes of both, and their ratios."""
    figures = []
    for kind in RERANKERS:
        for dim in dims:
            for k in candidates:
                given = batch_of(batch, k, dim)
                factored, concatenated = (training_pass(reranker, given) for reranker in pair(kind, dim))
                took = interleaved({"factored": factored, "concatenated": concatenated}, repeats=repeats)
                peaks = {"factored": peak_bytes(factored), "concatenated": peak_bytes(concatenated)}
                figures.append(
                    {
                        **{"kind": kind, "batch": batch, "k": k, "dim": dim},
                        "seconds": took,
                        "peak_bytes": peaks,
                        "faster": took["concatenated"] / took["factored"],
                        "memory": peaks["factored"] / peaks["concatenated"],
                    }
                )
    return figures


def report(figures: list[dict[str, Any]]) -> str:
    """A row a case."""
    titles = ("reranker", "k", "D", "factored, ms", "concatenated, ms", "times as fast")
    titles = (*titles, "factored, MB", "concatenated, MB", "share of memory", "targets")
    rows = []
    for case in figures:
        fast, small = case["faster"] >= FASTER, case["memory"] <= SMALLER
        rows.append(
            [
                *(case["kind"], str(case["k"]), str(case["dim"])),
                *(f"{1000 * took:.2f}" for took in case["seconds"].values()),
                f"{case['faster']:.2f}",
                *(f"{size / 1e6:.1f}" for size in case["peak_bytes"].values()),
                f"{case['memory']:.2f}",
                "met" if fast and small else "time missed" if small else "memory missed" if fast else "missed",
            ]
        )
    return f"{table(titles, rows)}\n\ntargets: at least {FASTER} times as fast, at most {SMALLER} of the memory"


def main(arguments: Sequence[str]) -> None:
    """Print the table, write factored.json."""
    options = parse(arguments, OPTIONS)
    torch.set_num_threads(options["threads"])
    figures = compare(options["batch"], options["candidates"], options["dims"], options["repeats"])
    print(report(figures))
    print(write_json("factored", figures, options))


if __name__ == "__main__":
    main(sys.argv[1:])
