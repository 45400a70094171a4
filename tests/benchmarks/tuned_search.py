"""Searches over frozen vectors and texts, their figures, and how one is chosen on validation queries.

A baseline is a step from one search to another, such as from exact search to that with a linear adapter. The search
that it starts from competes with what it makes of it, so none validates worse than exact search.
"""

import sys
from collections.abc import Callable, Iterable, Iterator
from operator import itemgetter
from typing import NamedTuple

import torch
from torch import Tensor

from lexical import dense
from nvf.data.queries import blocks, each
from nvf.models.words import WordScores
from nvf.ops.ranks import DEEPEST, are_targets, criterion, gains_of, ndcg, ndcg10, recall, target_ranks
from nvf.ops.topk import first_topk

DEPTH = 20  # of recall
AT_ONCE = 1024  # queries whose scores over all rows are held


class Lexicons(NamedTuple):
    """What the words of queries match by each of LEXICONS, in that order."""

    parts: WordScores
    stems: WordScores


class Asked(NamedTuple):
    """Queries, what answers them, and what their words match."""

    queries: Tensor  # (B, D) unit
    targets: Tensor  # (B, m) rows, padded with -1
    words: WordScores | None = None  # as NVF searches them
    lexicons: Lexicons | None = None  # in full
    gains: Tensor | None = None  # (B, m) what each target is worth; None: all alike


class Problem(NamedTuple):
    """What a baseline may see: no test query."""

    rows: Tensor  # (N, D) unit
    train: Asked
    val: Asked
    seed: int


class Search(NamedTuple):
    """Scores move(q) K^T + b + w s, (B, N), with s the BM25 scores of a lexicon."""

    move: Callable[[Tensor], Tensor]  # (B, D) -> (B, D)
    keys: Tensor  # (N, D)
    bias: Tensor | float = 0.0  # (N,)
    beta: float = 20.0  # the inverse temperature that it was fitted with, which orders no row anew
    lexicon: int = 0
    weight: float = 0.0

    def __call__(self, batch: Asked) -> Tensor:
        scores = self.move(batch.queries) @ self.keys.T + self.bias
        if self.weight and batch.lexicons is not None:
            scores = scores + self.weight * dense(batch.lexicons[self.lexicon], len(self.keys))
        return scores


Step = Callable[["Problem", Search], Search]


class Figures(NamedTuple):
    """What is compared on validation, in this order."""

    first: float  # Top-1, or nDCG@10 where queries have several targets
    mrr10: float


class Method(NamedTuple):
    """A tuned method, and what its choice rested on."""

    score: Callable[[Asked], Tensor]  # (B, N)
    val: Figures
    chosen: str  # on validation
    again: Callable[[Problem], Search]  # the same search with what was chosen, fitted to other training queries
    seconds: float = 0.0  # of tuning and fitting, the search that it builds on included


@torch.no_grad()
def measured(score: Callable[[Asked], Tensor], batch: Asked) -> dict[str, Tensor]:
    """Top-1, nDCG@10, MRR@10 and Recall@20 of each query, (B,) each, by their names in the table."""
    parts = []
    for part in blocks(batch, AT_ONCE):
        scores, targets = score(part), part.targets
        ranks = target_ranks(scores, targets).double()
        best_rows = first_topk(scores, min(DEPTH, scores.shape[1]))
        hits, worth = are_targets(best_rows, targets), gains_of(best_rows[:, :DEEPEST], targets, part.gains)
        near = (1 / ranks).where(ranks <= DEEPEST, 0.0)
        parts.append((ranks == 1, ndcg(worth, targets, part.gains), near, recall(hits, targets)))
    of_all = (torch.cat(of_parts).double() for of_parts in zip(*parts, strict=True))
    return dict(zip(("Top-1", "nDCG@10", "MRR@10", f"Recall@{DEPTH}"), of_all, strict=True))


@torch.no_grad()
def figures(score: Callable[[Asked], Tensor], batch: Asked) -> Figures:
    """What chooses."""
    by_gain = criterion(batch.targets) == "ndcg10"
    firsts, nears = [], []
    for part in blocks(batch, AT_ONCE):
        scores = score(part)
        ranks = target_ranks(scores, part.targets).double()
        best = first_topk(scores, min(DEEPEST, scores.shape[1]))
        firsts.append(ndcg10(best, part.targets, part.gains) if by_gain else ranks == 1)
        nears.append((1 / ranks).where(ranks <= DEEPEST, 0.0))
    return Figures(*(float(torch.cat(of_parts).double().mean()) for of_parts in (firsts, nears)))


def improved(problem: Problem, base: Method, steps: Iterable[tuple[str, Step]]) -> Method:
    """The base, or what one of the steps makes of it: what validates best, and of equals the first."""
    return best([base, *stepped(problem, base, steps)])


def stepped(problem: Problem, base: Method, steps: Iterable[tuple[str, Step]]) -> Iterator[Method]:
    """What each step makes of a search."""
    for name, step in steps:
        search = step(problem, search_of(base))

        def again(other: Problem, step: Step = step) -> Search:
            return step(other, base.again(other))

        chosen = "; ".join(part for part in (base.chosen, name) if part)
        yield told(Method(search, figures(search, problem.val), chosen, again))


def search_of(method: Method) -> Search:
    assert isinstance(method.score, Search)
    return method.score


def some(batch: Asked, places: Tensor) -> Asked:
    """The queries at some places."""
    return each(batch, itemgetter(places))


def best(methods: Iterable[Method]) -> Method:
    """The one that validates best; of equals, the first."""
    return max(methods, key=lambda method: method.val)


def told(method: Method) -> Method:
    """The method, after a line of progress."""
    print(f"  {100 * method.val.first:5.1f} on validation: {method.chosen}", file=sys.stderr, flush=True)
    return method
