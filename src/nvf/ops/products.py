"""Inner products of queries with many rows: all of them, or the k largest, in blocks that stay in the cache."""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import FunctionCtx

from nvf.ops.frozen_memo import is_transformed

QUERY_BLOCK = 512  # queries at a time
SCORE_BLOCK = 2**20  # scores at a time on a CPU: 4 MB in float32, about what the caches near a core hold
WIDE_SCORE_BLOCK = 2**26  # elsewhere, where what a block costs to start weighs more
IN_CACHE = 2**21  # numbers of keys, above which a product with one query uses a third of the memory's bandwidth:
FEWEST = 4  # queries are then taken at least, the same ones again
CONVOLVED = 64  # queries from which a convolution is at least as fast as a product, see `products`
FEW = 2048  # rows up to which `_Dense` is faster whatever the queries
MANY = 16  # queries from which `_Sparse` is faster than `_Dense`
LOG2_E = math.log2(math.e)  # torch.exp2 is four times as fast as torch.exp, which is MKL's
GROUP = 16  # rows of which the largest score is looked at first
LOOKED_AT = 2**22  # scores at a time where near ties are settled


# A freed block above a threshold glibc gives back to the system, and the next one costs page faults, up to ten times
# the time of its products; the threshold rises to the largest block that was ever freed.
torch.empty(31 * 2**20, dtype=torch.uint8)


class TopK(NamedTuple):
    """The k best rows of every query, best first."""

    scores: Tensor  # (B, k)
    rows: Tensor  # (B, k) int64
    logsumexp: Tensor | None = None  # (B,) over all N scores, where it was asked for


def score_block(device: torch.device) -> int:
    """How many scores are held at a time on a device."""
    return SCORE_BLOCK if device.type == "cpu" else WIDE_SCORE_BLOCK


def products(rows: Tensor, queries: Tensor, *, by_query: bool = False) -> Tensor:
    """rows @ queries.T, (w, B), of rows (w, D) of any float type; without gradients.

    They lie in memory a row after another, or `by_query`, where there are many, a query after another.

    On a CPU, products with many queries are computed as a convolution of width 1: that is oneDNN's, which uses the
    widest instructions of every CPU, and MKL's product does not (1.7 times as fast on an AMD EPYC).
    """
    rows = rows.to(queries.dtype)
    if _convolved(queries):
        first, second = (queries, rows) if by_query else (rows, queries)
        found = F.conv1d(second.T.unsqueeze(0), first.unsqueeze(-1)).squeeze(0)
        return found.T if by_query else found
    if by_query and len(queries) >= CONVOLVED:
        return (queries @ rows.T).T
    return rows @ queries.T


def _on_cpu(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu"


def may_look(tensor: Tensor) -> bool:
    """Whether its values may decide what is computed: no device must wait, no transform or trace sees them."""
    return _on_cpu(tensor) and not is_transformed()


def _convolved(queries: Tensor) -> bool:
    single = queries.dtype == torch.float32 and _on_cpu(queries)
    return single and len(queries) >= CONVOLVED and torch.get_num_threads() > 1  # with one thread it is not oneDNN's


def inner_products(queries: Tensor, rows: Tensor) -> Tensor:
    """queries @ rows.T, (B, N), differentiable; of frozen rows in half precision no whole copy is made."""
    if queries.dtype == rows.dtype or rows.requires_grad:
        return queries @ rows.to(queries.dtype).T
    scores: Tensor = _InnerProducts.apply(queries, rows)
    return scores


def weighted_sum(weights: Tensor, rows: Tensor) -> Tensor:
    """weights @ rows, (B, D), likewise."""
    if weights.dtype == rows.dtype or rows.requires_grad:
        return weights @ rows.to(weights.dtype)
    found: Tensor = _WeightedSum.apply(weights, rows)
    return found


class _InnerProducts(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(queries: Tensor, rows: Tensor) -> Tensor:
        return torch.cat([queries @ part.to(queries.dtype).T for part in _parts(rows)], dim=-1)

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], _: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor, None]:
        return weighted_sum(upstream, *ctx.saved_tensors), None  # type: ignore[attr-defined]


class _WeightedSum(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(weights: Tensor, rows: Tensor) -> Tensor:
        parts = _parts(rows)
        shares = weights.split([len(part) for part in parts], dim=-1)
        return sum(share @ part.to(share.dtype) for share, part in zip(shares, parts, strict=True))

    @staticmethod
    def setup_context(ctx: FunctionCtx, inputs: tuple[Tensor, Tensor], _: Tensor) -> None:
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx: FunctionCtx, upstream: Tensor) -> tuple[Tensor, None]:
        return inner_products(upstream, *ctx.saved_tensors), None  # type: ignore[attr-defined]


def _parts(rows: Tensor) -> tuple[Tensor, ...]:
    return rows.split(max(1, score_block(rows.device) // rows.shape[1]))


@torch.no_grad()
def blockwise_topk(
    queries: Tensor, keys: Tensor, k: int, *, logsumexp: bool = False, scores_per_block: int | None = None
) -> TopK:
    """The k largest of queries @ keys.T a query, holding one block of scores at a time; 1 <= k <= N.

    On a CPU, rows whose scores are nearer than rounding can tell apart are put in the order of `settle`: equal rows
    come smallest first, whatever the blocks, the batch and the threads. Elsewhere their order is torch.topk's.
    """
    budget = scores_per_block or score_block(queries.device)
    with torch.autocast(queries.device.type, enabled=False):  # half the bits would find other rows
        found = [_topk(block, keys, k, logsumexp, budget) for block in queries.split(QUERY_BLOCK)]  # at least one
    if len(found) == 1:
        return found[0]
    scores, rows, totals = zip(*found, strict=True)
    return TopK(torch.cat(scores), torch.cat(rows), torch.cat(totals) if logsumexp else None)


def _topk(queries: Tensor, keys: Tensor, k: int, logsumexp: bool, budget: int) -> TopK:
    count = len(queries)
    if count == 0:
        nothing = queries.new_empty(0, k, dtype=torch.promote_types(queries.dtype, torch.float32))
        return TopK(nothing, nothing.long(), nothing[:, 0] if logsumexp else None)
    queries = queries.to(torch.promote_types(queries.dtype, torch.float32))
    few = count < FEWEST and keys.numel() > IN_CACHE
    asked = queries[torch.arange(FEWEST, device=queries.device) % count] if few else queries
    sparse = _on_cpu(queries) and count >= MANY and len(keys) > FEW
    more = min(k + 1, len(keys))  # the first row that is left out shows whether it is a near tie
    best = _Sparse(count, more) if sparse else _Dense(more)
    total = RunningLogSumExp(count, dtype=queries.dtype, device=queries.device) if logsumexp else None
    width = max(more, budget // len(asked))
    for start in range(0, len(keys), width):
        scores = products(keys[start : start + width], asked, by_query=not sparse)  # (w, B)
        if few:
            scores = scores.T[:count].contiguous().T
        largest = best.add(scores, start)
        if total is not None:
            total.add_(scores, largest)
        del scores  # the next block takes its place in the cache
    found, rows = settle(queries, keys, *best.result(), k)
    return TopK(found, rows, None if total is None else total.result())


@torch.no_grad()
def settle(queries: Tensor, keys: Tensor, scores: Tensor, rows: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k first of the best rows, those with near ties in the order of their products in float64, then of the rows.

    A product's last bits depend on where in a block its row lies, so that equal rows differ by them. Where two scores
    are nearer than that, sqrt(D) epsilons of the query's length (rounding errors add up as a random walk does; keys are
    about as long as 1), they are computed anew, each alone: then equal rows are equal, and near duplicates in their
    true order. If the k-th is nearly as good as the next, all N rows are looked at again for that query. Where all
    scores are clearly apart, nothing is computed.

    Args:
        queries: (B, D), float32 or float64.
        keys: (N, D) of any float type.
        scores: (B, k + 1), or all N where k = N, best first.
        rows: theirs.
        k: how many are wanted.
    """
    if not _on_cpu(scores):  # nothing waits for the device
        return scores[:, :k], rows[:, :k]
    share = torch.finfo(scores.dtype).eps * math.sqrt(queries.shape[1])
    noise = share * torch.linalg.vector_norm(queries, dim=-1, keepdim=True)  # (B, 1)
    near = scores[:, 1:] >= scores[:, :-1] - noise
    if not near.any():
        return scores[:, :k], rows[:, :k]
    scores, rows = scores[:, :k].clone(), rows[:, :k].clone()
    floor = scores[:, -1:] - 2 * noise
    query = near.any(dim=-1).nonzero().squeeze(-1)
    scores[query], rows[query] = _reordered(queries, keys, scores, rows, near, query)
    if near.shape[1] == k:  # else all rows are there
        for some in near[:, -1].nonzero().squeeze(-1).split(max(1, LOOKED_AT // len(keys))):
            scores[some], rows[some] = _found_anew(queries, keys, floor, rows, some)
    return scores, rows


def _reordered(
    queries: Tensor, keys: Tensor, scores: Tensor, rows: Tensor, near: Tensor, query: Tensor
) -> tuple[Tensor, Tensor]:
    """The same rows of some queries, (b, k), in order; `near` says whose score is near that of the next."""
    k, near = rows.shape[1], near[query]
    either = (F.pad(near, (0, 1)) | F.pad(near, (1, 0)))[:, :k]
    exact, rows = scores[query].double(), rows[query]
    place, at = either.nonzero(as_tuple=True)
    exact[place, at] = _alone(queries, keys, query[place], rows[place, at])
    rows, order = rows.sort(dim=-1)
    exact, again = exact.gather(-1, order).sort(dim=-1, descending=True, stable=True)
    return exact.to(scores.dtype), rows.gather(-1, again)


def _found_anew(queries: Tensor, keys: Tensor, floor: Tensor, rows: Tensor, query: Tensor) -> tuple[Tensor, Tensor]:
    """The k best rows of some queries, (b, k), of all whose score reaches the floor, and those found before."""
    with torch.autocast("cpu", enabled=False):
        reached = inner_products(queries[query], keys) >= floor[query]  # (b, N)
    reached.scatter_(-1, rows[query], True)
    place, row = reached.nonzero(as_tuple=True)  # in ascending order
    exact, order = _alone(queries, keys, query[place], row).sort(descending=True, stable=True)
    place, again = place[order].sort(stable=True)
    first = torch.searchsorted(place, torch.arange(len(query)))
    kept = again[first.unsqueeze(-1) + torch.arange(rows.shape[1])]
    return exact[kept].to(floor.dtype), row[order[kept]]


def _alone(queries: Tensor, keys: Tensor, query: Tensor, row: Tensor) -> Tensor:
    """The products of pairs of a query and a key, (P,), in float64; none depends on what stands beside it."""
    size = max(1, LOOKED_AT // queries.shape[1])
    pairs = zip(query.split(size), row.split(size), strict=True)
    return torch.cat([(queries[q].double() * keys[r].double()).sum(dim=-1) for q, r in pairs])


def best_rows(scores: Tensor, queries: Tensor, keys: Tensor, k: int) -> Tensor:
    """The rows of `blockwise_topk`, (B, k), where all scores, (B, N), are at hand.

    Off the CPU and inside a transform of torch.func or a trace torch.topk's.
    """
    if not may_look(scores):
        return scores.topk(k, dim=-1).indices
    found = scores.detach().topk(min(k + 1, scores.shape[-1]), dim=-1)
    return settle(queries.detach().to(scores.dtype), keys.detach(), *found, k)[1]


def first_topk(scores: Tensor, k: int) -> Tensor:
    """The places of the k largest scores, (B, k), best first; of equal ones the first, where torch.topk takes any.

    Off the CPU and inside a transform of torch.func or a trace it is torch.topk.
    """
    if not may_look(scores):
        return scores.topk(k, dim=-1).indices
    values, places = scores.topk(min(k + 1, scores.shape[-1]), dim=-1)
    if (values[:, 1:] == values[:, :-1]).any():
        places = scores.sort(dim=-1, descending=True, stable=True).indices
    return places[:, :k]


class RunningLogSumExp:
    """The log-sum-exp a query, over blocks of scores: the online softmax of FlashAttention (arXiv 2205.14135)."""

    def __init__(self, queries: int, *, dtype: torch.dtype, device: torch.device) -> None:
        self.largest = torch.full((queries,), -math.inf, dtype=dtype, device=device)
        self.total = torch.zeros_like(self.largest)  # of exp(score - largest)

    def add_(self, scores: Tensor, largest: Tensor) -> Tensor:
        """Count scores, (w, B), of which the largest a query, (B,), are known, and turn them into exp(score - largest).

        Returns the factor, (B,), that what was weighed so before has shrunk by, as the largest has grown.
        """
        before, self.largest = self.largest, torch.maximum(self.largest, largest)
        shrunk = (before - self.largest).exp()
        self.total = self.total * shrunk + scores.sub_(self.largest).mul_(LOG2_E).exp2_().sum(dim=0)
        return shrunk

    def result(self) -> Tensor:
        return self.largest + self.total.log()


class _Dense:
    """The k largest scores a query, by a top-k of every block. Off the CPU nothing waits for the device."""

    def __init__(self, k: int) -> None:
        self.k = k
        self.best: tuple[Tensor, Tensor] | None = None

    def add(self, scores: Tensor, start: int) -> Tensor:
        """Look at scores, (w, B), of the rows from `start`; returns the largest a query, (B,)."""
        values, rows = scores.T.topk(min(self.k, len(scores)), dim=-1)  # of equals any: see `settle`
        largest, rows = values[:, 0], rows + start
        if self.best is not None:
            values, rows = torch.cat([self.best[0], values], dim=-1), torch.cat([self.best[1], rows], dim=-1)
            values, order = values.sort(dim=-1, descending=True, stable=True)
            values, rows = values[:, : self.k], rows.gather(-1, order[:, : self.k])
        self.best = values, rows
        return largest

    def result(self) -> tuple[Tensor, Tensor]:
        assert self.best is not None
        return self.best


class _Sparse:
    """The k largest scores a query, by looking only where a group's largest reaches a query's k-th best so far.

    A top-k of every block costs as much as its products; the largest of each group of rows costs next to nothing, and
    after the first blocks few groups matter. Of equal scores the smallest rows are kept, and come first.
    """

    def __init__(self, queries: int, k: int) -> None:
        self.k = k
        self.least = torch.full((queries,), -math.inf)  # a lower bound of each query's k-th best
        self.values, self.rows = torch.empty(queries, 0), torch.empty(queries, 0, dtype=torch.int64)
        self.waiting: list[tuple[Tensor, Tensor, Tensor]] = []  # queries, scores, rows
        self.seen, self.due = 0, 0  # rows; when to merge what waits

    def add(self, scores: Tensor, start: int) -> Tensor:
        """Look at scores, (w, B), of the rows from `start`; returns the largest a query, (B,)."""
        width, count = scores.shape
        whole = width - width % GROUP
        largest = [scores[:whole].unflatten(0, (-1, GROUP)).amax(dim=1)] if whole else []
        if whole < width:
            largest.append(scores[whole:].amax(dim=0, keepdim=True))
        tops = torch.cat(largest)  # (groups, B)
        if start == 0:
            if len(tops) > self.k:  # k groups have a row of at least this
                self.least = tops.T.contiguous().topk(self.k, dim=-1).values[:, -1]
            matter = ~(tops < self.least)  # NaN matters
        else:
            matter = tops > self.least  # what only equals the k-th best comes after it
        query, group = matter.T.nonzero(as_tuple=True)
        if len(query):
            offset = (GROUP * group).unsqueeze(-1) + torch.arange(GROUP)
            if whole < width:
                offset.clamp_(max=width - 1)  # the last row stands for those that are not there, and counts once
            values = scores.view(-1).take(offset * count + query.unsqueeze(-1))  # (pairs, GROUP)
            keep = ~(values < self.least[query].unsqueeze(-1))  # NaN is kept
            if whole < width:
                keep[:, 1:] &= offset.diff(dim=-1) > 0
            of, where = keep.nonzero(as_tuple=True)
            self.waiting.append((query[of], values[of, where], offset[of, where] + start))
        self.seen = start + width
        if self.seen >= self.due:
            self._merge()
            self.due = 2 * self.seen
        return tops.amax(dim=0)

    def _merge(self) -> None:
        if not self.waiting:
            return
        count = len(self.values)
        kept = torch.arange(count).repeat_interleave(self.values.shape[1])
        waiting = [(kept, self.values.flatten(), self.rows.flatten()), *self.waiting]
        query, values, rows = (torch.cat(parts) for parts in zip(*waiting, strict=True))
        if len(waiting) > 1 + (not self.values.numel()):
            query, order = query.sort(stable=True)  # and of equal scores still the smallest rows first
            values, rows = values[order], rows[order]
        counts = torch.bincount(query, minlength=count)
        place = torch.arange(len(query)) - (counts.cumsum(0) - counts)[query]
        shape = (count, max(self.k, int(counts.max())))
        padded, at = values.new_full(shape, -math.inf), rows.new_full(shape, -1)
        padded[query, place], at[query, place] = values, rows
        best, order = padded.sort(dim=-1, descending=True, stable=True)
        self.values, self.rows = best[:, : self.k], at.gather(-1, order[:, : self.k])
        self.least = self.values[:, -1].contiguous()
        self.waiting = []

    def result(self) -> tuple[Tensor, Tensor]:
        self._merge()
        return self.values, self.rows
