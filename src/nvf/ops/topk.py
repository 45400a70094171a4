"""The k rows of the largest inner products with each query, found in blocks, with equal rows in their order."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from nvf.ops.products import QUERY_BLOCK, RunningLogSumExp, can_branch_on, inner_products, products, score_block, split

SPARSE_FROM = 16  # queries from which `_Sparse` is faster than `_Dense`,
SPARSE_ROWS = 2**15  # over more rows than these with a log-sum-exp,
SPARSE_ROWS_ALONE = 2**13  # and without, where
SPARSE_BLOCK = 4  # times as many scores are held at once: only their groups are looked at, out of the nearest cache
GROUP = 16  # neighbouring rows of which `_Sparse` first compares the largest score
NEAR_TIES = 2**22  # numbers held at once while near ties are resolved; 16 MB of float32
Bar = Sequence[Tensor] | None  # a score, float64, and a row of each query, (B,) both
Added = Sequence[Tensor] | None  # rows padded with -1, and what is added to their scores, 0 for padding, (B, L) both


class TopK(NamedTuple):
    """The k best rows of every query, best first."""

    scores: Tensor  # (B, k)
    rows: Tensor  # (B, k) int64
    logsumexp: Any = None  # (B,) over the scores of all N rows, or those allowed, where it was asked for
    ranks: Any = None  # (B,) int64, from 1, of the bar or of the best target, where there is one
    of_targets: Any = None  # (B, m) scores of the targets, where there are some


@torch.no_grad()
def blockwise_topk(
    queries: Tensor,
    keys: Tensor,
    k: int,
    *,
    logsumexp: bool = False,
    scores_per_block: int | None = None,
    allowed: Tensor | None = None,
    added: Added = None,
    bar: Bar = None,
) -> TopK:
    """Return the k largest of each query's products with the keys, holding one block of scores at a time.

    Queries are (B, D), keys (N, D) of any float type. On a CPU, equal rows come smallest first, whatever the blocks,
    the batch and the threads, see `resolve_near_ties`; elsewhere in the order of torch.topk. Where rows are `allowed`,
    (1, N) or (B, N) bool, at least one a query, no other counts; for rows that a query lacks, -1 has a score of -inf.
    Where no row is excluded, something may be `added` to some scores, and a `bar` ranked: 1 + the number of rows that
    are ahead of it, see `is_ahead`.
    """
    budget = scores_per_block or score_block(queries.device)
    with torch.autocast(queries.device.type, enabled=False):  # half the bits would find other rows
        if len(queries) <= QUERY_BLOCK:
            return _topk(queries, keys, k, logsumexp, budget, allowed, added, bar)
        found = []
        for part in (slice(start, start + QUERY_BLOCK) for start in range(0, len(queries), QUERY_BLOCK)):
            mask = allowed if allowed is None or len(allowed) == 1 else allowed[part]
            others = (of and [each[part] for each in of] for of in (added, bar))
            found.append(_topk(queries[part], keys, k, logsumexp, budget, mask, *others))
    every: list[Any] = [None if some[0] is None else torch.cat(some) for some in zip(*found, strict=True)]
    return TopK(*every)


def _topk(
    queries: Tensor,
    keys: Tensor,
    k: int,
    logsumexp: bool,
    budget: int,
    allowed: Tensor | None,
    added: Added,
    bar: Bar,
) -> TopK:
    count = len(queries)
    queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
    lowest = torch.finfo(queries.dtype).min  # for what a query must not find; -inf would make its sums NaN
    # The only rows that are looked at; amax of bytes takes a tenth of the time of any.
    some = None if allowed is None else allowed.view(torch.uint8).amax(dim=0).nonzero().squeeze(-1)
    size = len(keys) if some is None else len(some)
    alike = allowed is None or len(allowed) == 1
    enough = count >= SPARSE_FROM and size > (SPARSE_ROWS if logsumexp else SPARSE_ROWS_ALONE)
    sparse = can_branch_on(queries) and enough and alike
    budget *= SPARSE_BLOCK if sparse and not logsumexp else 1
    more = min(k + 1, size)  # one more than wanted shows whether the k-th is a near tie
    best = (_Sparse if sparse else _Dense)(queries, more, size)
    total = RunningLogSumExp() if logsumexp else None
    start, ranks = 0, torch.ones(count, dtype=torch.int64, device=queries.device)
    noise = 2 * _noise(queries, added).squeeze(-1) if bar else None  # of a score next to the bar
    for part in split(keys if some is None else some, max(more, budget // max(1, count))):
        scores = products(part if some is None else keys[part], queries, by_query=not sparse)  # (w, B)
        if allowed is not None and not alike:
            scores.masked_fill_(~allowed.gather(1, part.expand(count, -1)).T, lowest)
        if added:
            query, place = ((added[0] >= start) & (added[0] < start + len(part))).nonzero(as_tuple=True)
            scores[added[0][query, place] - start, query] += added[1][query, place]
        largest = best.add(scores, start)
        if bar:
            ranks += _count_ahead(scores, start, queries, keys, added, noise, *bar)
        if total is not None:
            total.add_(scores, largest)
        start += len(part)
        del scores  # so that the next block takes its place in the cache
    rows = best.rows if some is None else some[best.rows]
    scores, rows = resolve_near_ties(queries, keys, best.scores, rows, min(k, size), allowed, added)
    if allowed is not None:
        lacking, pad = scores == lowest, (0, k - scores.shape[1])
        scores = F.pad(scores.masked_fill(lacking, -math.inf), pad, value=-math.inf)
        rows = F.pad(rows.masked_fill(lacking, -1), pad, value=-1)
    return TopK(scores, rows, None if total is None else total.result(), ranks if bar else None)


def is_ahead(scores: Tensor, rows: Tensor, best: Tensor, first: Tensor) -> Tensor:
    """Return which rows are ahead of the row `first` with the score `best`: of equal ones the smaller; NaN is last."""
    return ~(scores <= best) | ((scores == best) & (rows < first))


def _count_ahead(
    scores: Tensor, start: int, queries: Tensor, keys: Tensor, added: Added, noise: Any, best: Tensor, first: Tensor
) -> Tensor:
    """Return how many rows of a block of scores, (w, B), are ahead, (B,); near ties by their exact scores."""
    below = scores <= (best + noise).to(scores.dtype)
    row, query = (below & (scores >= (best - noise).to(scores.dtype))).nonzero(as_tuple=True)
    row = row + start
    ahead = is_ahead(exact_scores(queries, keys, query, row, added), row, best[query], first[query])
    return len(scores) - below.sum(dim=0, dtype=torch.int32) + query[ahead].bincount(minlength=len(queries))


def exact_scores(queries: Tensor, keys: Tensor, query: Tensor, row: Tensor, added: Added = None) -> Tensor:
    """Return the products of pairs, (P,), in float64, and what is added; those of equal keys are equal."""
    size = max(1, NEAR_TIES // queries.shape[1])
    rows, more = added or (queries[:, :0], queries[:, :0])
    parts = []
    for q, r in zip(query.split(size), row.split(size), strict=True):
        of_pairs = ((rows[q] == r.unsqueeze(-1)) * more[q]).sum(dim=-1)
        parts.append((queries[q].double() * keys[r].double()).sum(dim=-1) + of_pairs)
    exact = torch.cat(parts)
    return exact if can_branch_on(exact) else exact.to(queries.dtype).double()  # a GPU's sums depend on P


def _noise(queries: Tensor, added: Added) -> Tensor:
    """Return the size, (B, 1), of what rounding does to a query's products with keys about as long as 1."""
    size = math.sqrt(queries.shape[1]) * torch.linalg.vector_norm(queries, dim=-1, keepdim=True)
    return torch.finfo(queries.dtype).eps * (size + added[1].abs().amax(dim=-1, keepdim=True) if added else size)


def resolve_near_ties(
    queries: Tensor,
    keys: Tensor,
    scores: Tensor,
    rows: Tensor,
    k: int,
    allowed: Tensor | None = None,
    added: Added = None,
) -> tuple[Tensor, Tensor]:
    """Return the k best of the rows; on a CPU, near ties are ordered by their exact products, and equal ones by row.

    Scores and rows are (B, k + 1), or all N where k = N, best first; queries are float32 or float64. The last bits of a
    product depend on where in a block its row lies. So two scores are a near tie if they differ by less than sqrt(D)
    epsilons of the query's length, as rounding errors add up like a random walk and keys are about as long as 1. Near
    ties, and where the k-th is one all rows that may be among the k best, are computed again in float64, one by one.
    """
    if not can_branch_on(scores):
        return scores[:, :k], rows[:, :k]
    noise = _noise(queries, added)
    near = scores[:, 1:] >= scores[:, :-1] - noise
    if allowed is not None:
        near &= scores[:, 1:] > torch.finfo(scores.dtype).min
        allowed = allowed.expand(len(queries), -1)
    if not near.any():
        return scores[:, :k], rows[:, :k]
    scores, rows = scores[:, :k].clone(), rows[:, :k].clone()
    floor = scores[:, -1:] - 2 * noise
    last = near[:, -1] if near.shape[1] == k else near.new_zeros(len(near))  # whether the k-th ties with the next
    some = (near.any(dim=-1) & ~last).nonzero().squeeze(-1)
    query = torch.arange(len(some)).repeat_interleave(k)
    row = rows[some].sort(dim=-1).values.flatten()
    right = None if allowed is None else allowed[some[query], row]
    exact, rows[some] = _best_exactly(queries[some], keys, query, row, k, added and [of[some] for of in added], right)
    tied = (F.pad(near, (0, 1)) | F.pad(near, (1, 0)))[some, :k]  # with the next or with the one before
    scores[some] = exact.where(tied, scores[some])
    for some in last.nonzero().squeeze(-1).split(max(1, NEAR_TIES // len(keys))):
        with torch.autocast("cpu", enabled=False):
            every = inner_products(queries[some], keys)  # (b, N)
        more = added and [of[some] for of in added]
        possible = (every.scatter_add(-1, more[0].clamp(min=0), more[1]) if more else every) >= floor[some]
        if allowed is not None:
            possible &= allowed[some]
        possible.scatter_(-1, rows[some], True)
        query, row = possible.nonzero(as_tuple=True)
        scores[some], rows[some] = _best_exactly(queries[some], keys, query, row, k, more)
    return scores, rows


def _best_exactly(
    queries: Tensor, keys: Tensor, query: Tensor, row: Tensor, k: int, added: Added, right: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return scores and rows of the k best of each query's pairs, (P,), whose rows ascend, by products in float64.

    Pairs that are not `right`, (P,), come last.
    """
    exact = exact_scores(queries, keys, query, row, added)
    if right is not None:
        exact.masked_fill_(~right, -math.inf)
    kept = _best_of_each(query, exact, len(queries), k)
    return exact[kept].to(queries.dtype), row[kept]


def _best_of_each(query: Tensor, scores: Tensor, count: int, k: int) -> Tensor:
    """Return the places, (count, k), of each query's k largest among the scores, (P,); of equal ones the first."""
    order = scores.argsort(descending=True, stable=True)
    order = order[query[order].argsort(stable=True)]
    first = torch.searchsorted(query[order], torch.arange(count))
    return order[first.unsqueeze(-1) + torch.arange(k)]


def best_rows(scores: Tensor, queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """Return the rows of `blockwise_topk`, (B, k), from all scores, (B, N); in a transform or trace, torch.topk's."""
    if not can_branch_on(scores):
        return scores.topk(k, dim=-1).indices
    found = scores.detach().topk(min(k + 1, scores.shape[-1]), dim=-1)
    return resolve_near_ties(queries.detach().to(scores.dtype), keys.detach(), *found, k)[1]


def first_topk(scores: Tensor, k: int) -> Tensor:
    """Return the places of the k largest scores, (B, k), best first; on a CPU, of equal ones the first."""
    if not can_branch_on(scores):
        return scores.topk(k, dim=-1).indices
    values, places = scores.topk(min(k + 1, scores.shape[-1]), dim=-1)
    if (values[:, 1:] == values[:, :-1]).any():
        places = scores.sort(dim=-1, descending=True, stable=True).indices
    return places[:, :k]


class _Dense:
    """The k largest scores of each query, by a top-k of every block. Off the CPU nothing waits for the device."""

    def __init__(self, queries: Tensor, k: int, rows: int) -> None:
        self.k = k

    def add(self, scores: Tensor, start: int) -> Tensor:
        """Take in a block of scores, (w, B), of the rows from `start`; return the largest of each query, (B,)."""
        values, rows = scores.T.topk(min(self.k, len(scores)), dim=-1)  # any of equals, see `resolve_near_ties`
        if start == 0:
            self.scores, self.rows = values, rows
            return values[:, 0]
        both = torch.cat([self.scores, values], dim=-1)
        self.scores, order = (part[:, : self.k] for part in both.sort(dim=-1, descending=True, stable=True))
        self.rows = torch.cat([self.rows, rows + start], dim=-1).gather(-1, order)
        return values[:, 0]


class _Sparse:
    """The k largest scores of each query, from those groups of rows alone whose largest score is good enough.

    A top-k of every block costs as much as its products. The largest score of each group costs next to nothing, and
    after the first blocks few groups reach a query's k-th best so far. Of equal scores the smallest rows are kept.
    """

    def __init__(self, queries: Tensor, k: int, rows: int) -> None:
        self.k, self.end = k, rows
        self.least = queries.new_full((len(queries),), -math.inf)  # a lower bound of each query's k-th best
        self.scores, self.rows = queries.new_empty(len(queries), 0), queries.new_empty(len(queries), 0).long()
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # queries, scores and rows that may be among the best
        self.due = 0  # rows seen when those that wait are merged next

    def add(self, scores: Tensor, start: int) -> Tensor:
        """Take in a block of scores, (w, B), of the rows from `start`; return the largest of each query, (B,)."""
        width, count = scores.shape
        full = width // GROUP
        tops = scores[: full * GROUP].view(full, GROUP, count).amax(dim=1)  # (groups, B)
        if full * GROUP < width:
            tops = torch.cat([tops, scores[full * GROUP :].amax(dim=0, keepdim=True)])
        if start > 0:
            matter = tops > self.least  # what only equals the k-th best comes after it
        else:
            if (wide := full // GROUP) > self.k:  # k groups of groups have a row of at least this
                coarse = tops[: wide * GROUP].view(wide, GROUP, count).amax(dim=1)
                self.least, self.due = coarse.topk(self.k, dim=0).values[-1], 2 * width
            matter = ~(tops < self.least)  # NaN matters
        group, query = matter.nonzero(as_tuple=True)  # each query's groups ascend
        offset = (GROUP * group).unsqueeze(-1) + torch.arange(GROUP)  # (pairs, GROUP)
        values = scores.view(-1).take(offset.clamp(max=width - 1) * count + query.unsqueeze(-1))
        keep = ~(values < self.least[query].unsqueeze(-1)) & (offset < width)  # NaN is kept
        pair, place = keep.nonzero(as_tuple=True)
        self.waiting.append((query[pair], values[pair, place], offset[pair, place] + start))
        if start + width >= min(self.due, self.end):
            self._merge()
            self.due = 2 * (start + width)
        return tops.amax(dim=0)

    def _merge(self) -> None:
        kept = torch.arange(len(self.least)).repeat_interleave(self.scores.shape[1])
        waiting = [(kept, self.scores.flatten(), self.rows.flatten()), *self.waiting]
        query, scores, rows = (torch.cat(parts) for parts in zip(*waiting, strict=True))
        best = _best_of_each(query, scores, len(self.least), self.k)
        self.scores, self.rows, self.waiting = scores[best], rows[best], []
        self.least = self.scores[:, -1].contiguous()
