"""Evidence about a candidate beyond stage 1's logit, from the frozen vectors and a log of answered queries."""

import math
from itertools import repeat
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvf.errors import InputError
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.queries_and_keys import hubness
from nvf.models.words import CHANNELS, WordScores
from nvf.ops.frozen_cache import FrozenCache
from nvf.ops.products import SCORE_BLOCK
from nvf.ops.topk import TopK, blockwise_topk

FEATURES = (
    "logit",  # stage 1's
    "log_probability",  # stage 1's, over all rows
    "cosine",  # of query and row, both as they are
    "log_count",  # log(1 + the number of logged queries that the row answers)
    "nearest",  # the highest similarity of the query to one of those, after stage 1's transform
    "support",  # log(1 + sum of exp(SHARPNESS similarity)) over those
    "hubness",  # of the row, among the logged queries
    "density",  # mean cosine of the row to its nearest other rows
    "local_cosine",  # of query and row, both seen from the mean of the candidates
    "crowding",  # mean cosine of the row to the candidates
)
OF_WORDS = (  # features of candidates where the memory's rows have texts
    "vectors",  # stage 1's logit without what words add to it
    "text",  # how well the query's words match the row's text, see `Words`
    "text_share",  # the same over the best of all rows
    "text_rank",  # log(1 + the number of rows whose texts match better)
    "asked",  # how well they match the best of the logged queries that the row answers
    "asked_share",
    "asked_rank",
)
COUNTS = ("log_count", "support")  # features that grow with the number of a row's logged queries
OF_THE_LOG = (*COUNTS, "nearest")  # features that tell whether a row has any logged query
CLEAR = 2.0  # standard errors by which a figure must be below 1
SHARPNESS = 20.0  # inverse temperature of similarities; stage 1 starts at the same
LOGGED = 16  # logged queries of a row that are compared, evenly spaced where it has more
NEIGHBOURS = 10  # rows next to a row, from which its density is taken


class Evidence(nn.Module):
    """Features of candidates, (B, k, F), from the memory and a log of queries with the rows that answered them.

    The log is two buffers: `queries`, (n, Dq) unit rows, and `pairs`, (P,), row * n + query in ascending order for each
    target of each query. `hubness` and `density`, (N,), depend on rows alone and are computed once. Buffers that do
    not fit together raise an InputError. If `worded`, the features include those of words.
    """

    queries: Tensor
    pairs: Tensor
    hubness: Tensor
    density: Tensor
    starts: Tensor
    bank: Tensor
    similar: Tensor | None

    def __init__(
        self,
        memory: VectorMemory,
        *,
        queries: Tensor,
        pairs: Tensor,
        hubness: Tensor,
        density: Tensor,
        worded: bool = False,
    ) -> None:
        super().__init__()
        rows, count = len(memory), len(queries)
        if (
            queries.shape != (count, memory.query_dim)
            or pairs.shape != (len(pairs),)
            or min(count, len(pairs)) == 0
            or pairs.dtype != torch.int64
            or not bool((pairs.diff() > 0).all())
            or not 0 <= int(pairs[0]) <= int(pairs[-1]) < rows * count
            or hubness.shape != (rows,)
            or density.shape != (rows,)
        ):
            raise InputError("the log of queries does not fit the memory; gather it again")
        self.memory = memory
        self.features = (*FEATURES, *OF_WORDS) if worded else FEATURES
        for name, tensor in (("queries", queries), ("pairs", pairs), ("hubness", hubness), ("density", density)):
            self.register_buffer(name, tensor)
        starts = torch.searchsorted(pairs, count * torch.arange(rows + 1, device=pairs.device))
        self.register_buffer("starts", starts, persistent=False)  # the place of each row's first pair, (N + 1,)
        self.logged = torch.empty(0, dtype=torch.int64)  # set by `gather`
        # The places of the logged queries that hubness was measured on.
        self.register_buffer("bank", torch.arange(count, device=pairs.device), persistent=False)
        self.register_buffer("similar", None, persistent=False)  # cosines of a row's nearest others, (N, m), if known
        self.slots = min(LOGGED, int(starts.diff().max()))
        self._moved_log, self._leave_one_out = FrozenCache(), FrozenCache()

    @classmethod
    def gather(
        cls,
        memory: VectorMemory,
        queries: Tensor,
        targets: Tensor,
        *,
        worded: bool = False,
        bank: int | None = None,
        among: int | None = None,
    ) -> "Evidence":
        """Gather a log from unit queries, (n, D), and their targets, (n, m) rows padded with -1.

        Identical queries become one query of the log, with all their targets; `logged` is the place of each, (n,).
        Hubness is measured on so many logged queries, `bank`, and density `among` so many rows; None is all.
        """
        distinct, logged = queries.unique(dim=0, return_inverse=True)
        query, place = (targets >= 0).nonzero(as_tuple=True)
        pairs = targets[query, place] * len(distinct) + logged[query]
        asked, similar = evenly(len(distinct), bank), similar_to(memory.rows, evenly(len(memory), among))
        density = similar.mean(dim=-1) if similar.shape[1] else similar.new_zeros(len(memory))
        hubs = hubness(memory.aligned_queries(distinct[asked]), memory.keys, SHARPNESS)
        evidence = cls(memory, queries=distinct, pairs=pairs.unique(), hubness=hubs, density=density, worded=worded)
        evidence.logged, evidence.similar = logged, similar if among is None or among >= len(memory) else None
        evidence.bank = asked.to(queries.device)
        return evidence

    def law(self) -> dict[str, Any]:
        """Return what `law_of` says of the log."""
        return law_of(self.starts.diff())

    def forward(
        self,
        attention: SoftAttention,
        queries: Tensor,
        top: TopK,
        words: WordScores | None = None,
        *,
        k: int | None = None,
        logged_as: Tensor | None = None,
    ) -> Tensor:
        """Return the `features` of rows that stage 1 chose for unit queries, (B, w, F).

        Args:
            attention: stage 1.
            queries: (B, D).
            top: the rows, (B, w), with the log-sum-exp over all rows.
            words: what the queries' words match; where there are texts, None is no word that any row has.
            k: how many of them, the first, are the candidates; all if None.
            logged_as: the place of each query in the log, (B,), or -1; features are as if it had not been logged.
        """
        memory = attention.memory  # of which the alignment may be another's than that of `self.memory`
        rows = memory.take_keys(top.rows)  # (B, w, D)
        rows = rows.to(torch.promote_types(rows.dtype, queries.dtype))
        count, nearest, support = self._from_log(attention, queries, top.rows, logged_as)
        queries, centre = memory.aligned_queries(queries).to(rows.dtype), rows[:, :k].mean(dim=1, keepdim=True)
        local = F.normalize(queries.unsqueeze(1) - centre, dim=-1) * F.normalize(rows - centre, dim=-1)
        cosine = (rows @ queries.unsqueeze(-1)).squeeze(-1)
        features = {
            "logit": top.scores,
            "log_probability": top.scores - top.logsumexp.unsqueeze(-1),
            "cosine": cosine,
            "log_count": count.log1p(),
            "nearest": nearest,
            "support": support,
            "hubness": self._hubness(top.rows, cosine.detach(), logged_as),
            "density": self.density[top.rows],
            "local_cosine": local.sum(dim=-1),
            "crowding": (rows @ centre.transpose(1, 2)).squeeze(-1),
        }
        if len(self.features) > len(FEATURES):
            features |= self._of_words(attention, top, words)
        return torch.stack([features[name] for name in self.features], dim=-1)

    def _of_words(self, attention: SoftAttention, top: TopK, words: WordScores | None) -> dict[str, Tensor]:
        """Return the features of words, (B, w) each."""
        if words is None:
            words = WordScores(top.rows[:, :1], top.scores.new_zeros(len(top.rows), 1, len(CHANNELS)))
        scores, best = words.of(top.rows), words.scores.amax(dim=1, keepdim=True)  # (B, w, 2) and (B, 1, 2)
        better = words.scores.unsqueeze(1) > scores.unsqueeze(2)  # (B, w, L, 2)
        found = torch.cat([scores, scores / best.clamp(min=1e-6), better.sum(dim=2).log1p()], dim=-1).unbind(dim=-1)
        vectors = top.scores if attention.word_weights is None else top.scores - attention.word_bonus(scores)
        text, asked, text_share, asked_share, text_rank, asked_rank = found
        return dict(zip(OF_WORDS, (vectors, text, text_share, text_rank, asked, asked_share, asked_rank), strict=True))

    def _from_log(
        self, attention: SoftAttention, queries: Tensor, rows: Tensor, logged_as: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return count, nearest and support, (B, w) each; blocks of queries bound the log vectors held at once."""
        moved = attention.moved(queries)
        rests_on = [self.queries, attention.memory.keys, *attention.transform.parameters()]
        log = self._moved_log(lambda: attention.moved(self.queries), rests_on)
        size = max(1, SCORE_BLOCK // (rows.shape[1] * self.slots * log.shape[1]))
        places = repeat(None) if logged_as is None else logged_as.split(size)
        blocks = zip(moved.split(size), rows.split(size), places, strict=False)
        found = zip(*(self._block(log, *block) for block in blocks), strict=True)
        return tuple(torch.cat(parts) for parts in found)

    def _block(self, log: Tensor, moved: Tensor, rows: Tensor, logged_as: Tensor | None) -> tuple[Tensor, ...]:
        start = self.starts[rows]
        count = self.starts[rows + 1] - start  # (b, w)
        slot = torch.arange(self.slots, device=rows.device)
        spread = slot * count.unsqueeze(-1).clamp(min=self.slots) // self.slots  # (b, w, slots): evenly, or 0, 1, ...
        query = self.pairs[(start.unsqueeze(-1) + spread).clamp(max=len(self.pairs) - 1)] % len(self.queries)
        known = slot < count.unsqueeze(-1)
        if logged_as is not None:
            itself = logged_as.unsqueeze(-1)
            known &= query != itself.unsqueeze(-1)
            pair = (rows * len(self.queries) + itself).where(itself >= 0, -1)
            place = torch.searchsorted(self.pairs, pair).clamp(max=len(self.pairs) - 1)
            count = count - (self.pairs[place] == pair).long()
        compared = known.sum(dim=-1)
        similarity = (log[query.flatten(1)] @ moved.unsqueeze(-1)).view(query.shape)  # (b, w, slots)
        wide = torch.promote_types(similarity.dtype, torch.float32)  # exp(SHARPNESS) exceeds float16
        similarity = similarity.to(wide).masked_fill(~known, 0.0)
        mass = (SHARPNESS * similarity).exp().where(known, 0.0).sum(dim=-1)
        return count, similarity.amax(dim=-1), (mass * count / compared.clamp(min=1)).log1p()

    def _hubness(self, rows: Tensor, cosine: Tensor, logged_as: Tensor | None) -> Tensor:
        """Return the hubness of rows, (B, w), among the logged queries but the one that asks.

        That query's share, exp(SHARPNESS cosine), is subtracted from the sum over the log. Only the query nearest to a
        row can have a share above a half, which would cancel digits: for it the sum over the others is kept.
        """
        hubs, count = self.hubness[rows], len(self.bank)
        if logged_as is None or count == 1:  # without its one query, a log would be empty
            return hubs
        asks = logged_as.where(torch.isin(logged_as, self.bank), -1).unsqueeze(-1)
        nearest, rest = self._leave_one_out(self._without_nearest, [self.queries, self.memory.keys])
        share = (SHARPNESS * (cosine - hubs) - math.log(count)).exp().clamp(max=0.5)
        others = hubs + ((-share).log1p() + math.log(count / (count - 1))) / SHARPNESS
        return rest[rows].where(nearest[rows] == asks, others).where(asks >= 0, hubs)

    @torch.no_grad()
    def _without_nearest(self) -> tuple[Tensor, Tensor]:
        """Return the place of the logged query nearest to each row, and the row's hubness among the others, (N,)."""
        asked, places, rest, count = self.memory.aligned_queries(self.queries[self.bank]), [], [], len(self.bank)
        for rows in torch.arange(len(self.hubness), device=self.hubness.device).split(max(1, SCORE_BLOCK // count)):
            scores = SHARPNESS * (self.memory.take_keys(rows) @ asked.T)
            places.append(scores.argmax(dim=-1))
            others = scores.scatter(-1, places[-1].unsqueeze(-1), -math.inf)
            rest.append((others.logsumexp(dim=-1) - math.log(count - 1)) / SHARPNESS)
        return self.bank[torch.cat(places)], torch.cat(rest)


def evenly(count: int, wanted: int | None) -> Tensor:
    """Return the places of so many of `count` things, evenly spaced; of all if None, or if there are fewer."""
    chosen = count if wanted is None else min(count, wanted)
    return torch.arange(chosen) * count // chosen


@torch.no_grad()
def similar_to(rows: Tensor, among: Tensor) -> Tensor:
    """Return how similar each row is to its NEIGHBOURS nearest others, best first, (N, m), among rows of these places.

    If there are fewer others, so is m.
    """
    near = min(NEIGHBOURS, len(among) - 1)
    every = len(among) == len(rows)
    found = blockwise_topk(rows, rows if every else rows[among.to(rows.device)], near + 1).scores
    itself = torch.isin(torch.arange(len(rows)), among).to(rows.device).unsqueeze(-1)
    return found[:, 1:].where(itself, found[:, :-1]).contiguous()  # the first of a row's best rows is the row itself


def law_of(counts: Tensor) -> dict[str, Any]:
    """Return how logged queries are spread over rows, from a count a row, (N,), and which features this makes useless.

    Where every item is asked at a rate of its own, two figures are at least 1, and 1 for equal rates: the
    `dispersion`, variance over mean, of the number of other queries that a query's item has; and `asked_again`, how
    often an item with logged queries is asked once more, over how often one without is asked. Where each item has a
    fixed number of queries, dealt to log and test, more in the one are fewer in the other, and what is learned of
    counts would mislead. So features that grow with counts are ignored if the dispersion is below 1 by more than
    CLEAR standard errors, and all that tell logged rows from others if `asked_again` is.
    """
    n = counts.double()
    total, never, once, several = (float(x.sum()) for x in (n, n == 0, n == 1, n > 1))
    others = float((n * (n - 1)).sum()) / total  # of a query's item, on average
    dispersion = 1 - others + float((n * (n - 1) * (n - 2)).sum()) / (total * others) if others else 1.0
    # A half is added to each number, so that there is a logarithm where one is zero.
    again = math.log((total - once + 0.5) / (once + several + 0.5) * (never + 0.5) / (once + 0.5))
    ignored: tuple[str, ...] = COUNTS if 1 - dispersion > CLEAR * math.sqrt((6 + 2 * others) / total) else ()
    if -again > CLEAR * math.sqrt(sum(1 / (rows + 0.5) for rows in (never, once, several))):
        ignored = OF_THE_LOG
    return {"dispersion": dispersion, "asked_again": math.exp(again), "ignored": [*ignored]}
