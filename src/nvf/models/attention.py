"""Stage 1, peripheral vision: softmax attention of a transformed query over the whole memory."""

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvf.errors import InputError, check_number
from nvf.models.memory import VectorMemory, check_k, unit
from nvf.models.queries_and_keys import QueryTransform, checked_queries, composed
from nvf.models.words import CHANNELS, WordScores
from nvf.ops.cross_entropy import check_targets, cross_entropy, mean_of, sampled_cross_entropy, scores_of
from nvf.ops.frozen_cache import FrozenCache
from nvf.ops.products import weighted_sum
from nvf.ops.topk import TopK

KEYS = ("frozen", "moved", "learned")
LISTED_AT_ONCE = 2**24  # numbers in the keys of rows that words list, held at once; 64 MB of float32
AT_ONCE = 2048  # rows up to which the loss is faster from all logits at once, see docs/performance.md


class SoftAttention(nn.Module):
    """Attention over memory: logits = beta (z K^T + b), (B, N), with z = normalize(T(q)); their softmax sums to one.

    beta = exp(log_beta) is learned, so that the temperature 1/beta stays positive whatever the optimiser does. Without
    `normalize`, z = T(q), whose length says how sure the transform is of a query, as in the original system. Keys are
    the memory's rows, or with `keys="learned"` K = normalize(V + delta), where delta starts at zero; with "moved" delta
    is set from a log instead. It is kept for the rows that are `moving`, (S,) ascending, or so many, to be filled; None
    is all. The values V stay frozen. The bias b, one number a row, corrects hubs; it exists if `biased`, and is zero
    until it is set; `hubs` then are the share of the hubness that it subtracts, and the beta at which that was
    measured, from which new rows get theirs.

    If `worded`, a query's `WordScores` s, (B, N, 2) but for the rows with scores of zero, are evidence too: the logits
    are then beta (z K^T + b + s w). The weights w, (2,), are at least zero, and zero until they are set; s is constant.

    `transform` names T, or makes it from D: a module from (B, D) to (B, D). If that says `starts_at_exact_search`, the
    untrained stage 1 competes with the trained one.

    Queries of any float type are converted to that of the weights; every method raises an InputError for others than
    (..., D). So does an unknown transform or kind of keys, or a beta that is not positive and finite.
    """

    bias: Tensor | None
    moving: Tensor | None
    word_weights: Tensor | None
    transform: Any  # a module

    def __init__(
        self,
        memory: VectorMemory,
        *,
        transform: str | Callable[[int], nn.Module] = "mlp",
        hidden: int | None = None,
        normalize: bool = True,
        keys: str = "frozen",
        moving: Tensor | int | None = None,
        biased: bool = False,
        worded: bool = False,
        hubs: Sequence[float] | None = None,
        beta: float = 20.0,
    ) -> None:
        super().__init__()
        check_number("attention.beta", beta, above=0, remedy="20 is a good start for unit vectors")
        for name, flag in (("normalize", normalize), ("biased", biased), ("worded", worded)):
            if not isinstance(flag, bool):
                raise InputError(f"attention.{name}={flag} is neither true nor false; leave it out for the default")
        for number in hubs or ():
            check_number("attention.hubs", number, above=0, remedy="null is right until hubs are corrected")
        if keys not in KEYS:
            raise InputError(f"attention.keys={keys} is unknown; choose one of {', '.join(KEYS)}")
        self.memory = memory
        self.normalize = normalize
        self.hubs = hubs
        if callable(transform):
            self.transform = transform(memory.query_dim)
            name = f"{type(self.transform).__module__}.{type(self.transform).__qualname__}"
        else:
            self.transform, name = QueryTransform(transform, memory.query_dim, hidden), transform
        self.log_beta = nn.Parameter(torch.tensor(math.log(beta)))
        nothing = memory.rows.new_zeros(len(memory), dtype=torch.float32)
        self.delta: nn.Parameter | None = None
        moving = nothing.new_zeros(moving, dtype=torch.int64) if isinstance(moving, int) else moving
        if keys != "frozen":
            start = torch.zeros_like(memory.keys, dtype=torch.float32)
            start = start if moving is None else start[:1].new_zeros(len(moving), memory.query_dim)
            self.delta = nn.Parameter(start, requires_grad=keys == "learned")
        self.register_buffer("moving", None if keys == "frozen" else moving)
        self.register_buffer("bias", nothing if biased else None)
        self.register_buffer("word_weights", nothing.new_zeros(len(CHANNELS)) if worded else None)
        hidden = None if hidden is None else int(hidden)
        self._settings = {"transform": name, "hidden": hidden, "normalize": normalize, "keys": keys}
        self._keys, self._places = FrozenCache(), FrozenCache()

    @property
    def settings(self) -> dict[str, Any]:
        """The keyword arguments that make a stage 1 of this shape."""
        keys = "frozen" if self.delta is None else self._settings["keys"]
        return {
            **self._settings,
            "keys": keys,
            "moving": None if self.delta is None or self.moving is None else len(self.moving),
            "biased": self.bias is not None,
            "worded": self.word_weights is not None,
            "hubs": None if self.bias is None else self.hubs,
        }

    @property
    def query_dim(self) -> int:
        """The number of dimensions of queries, Dq."""
        return self.memory.query_dim

    @property
    def beta(self) -> Tensor:
        """The inverse temperature, a positive scalar."""
        return self.log_beta.exp()

    def keys(self) -> Tensor:
        """Return what transformed queries are compared with, (N, D) unit rows; with a bias (N, D + 1), b the last."""
        rows, delta, bias, _ = held = self._held()
        if delta is None and bias is None:
            return rows
        return self._keys(lambda: composed(*held), [tensor for tensor in held if tensor is not None])

    def _held(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """Return what keys are made of: rows, delta, bias, and the places of the rows that move, or None."""
        return self.memory.keys, self.delta, self.bias, self.moving

    def release(self) -> None:
        """Forget the keys that `keys` has computed; they are computed again when they are asked for."""
        self._keys = FrozenCache()

    def places(self) -> Tensor:
        """Return the place of each row's delta, (N,); -1 for a row that does not move."""
        every = torch.arange(len(self.memory), device=self.log_beta.device)
        if (moving := self.moving) is None:
            return every
        numbers = every[: len(moving)]
        return self._places(lambda: torch.full_like(every, -1).scatter(0, moving, numbers), [moving])

    def keys_of(self, rows: Tensor, *, sparse: bool = False) -> Tensor:
        """Return the keys of some rows, (...) -> (..., D), or D + 1 with a bias; delta may get a `sparse` gradient."""
        keys = self.memory.take_keys(rows)
        if self.delta is not None:
            places = rows if self.moving is None else self.places()[rows]
            moves = None if self.moving is None else places.unsqueeze(-1) >= 0
            places = places if moves is None else places.clamp(min=0)
            delta = F.embedding(places, self.delta, sparse=True) if sparse else self.delta[places]
            keys = F.normalize(keys + (delta if moves is None else delta.where(moves, 0)), dim=-1)
        return keys if self.bias is None else torch.cat([keys, self.bias[rows].unsqueeze(-1)], dim=-1)

    def moved(self, queries: Tensor) -> Tensor:
        """Return z, (B, D)."""
        queries = checked_queries(queries, self.query_dim).to(self.log_beta.dtype)
        moved = self.transform(self.memory.aligned_queries(queries))
        return unit(moved, moved.dtype) if self.normalize else moved

    def transformed(self, queries: Tensor) -> Tensor:
        """Return what is compared with the keys: z, (B, D), or with a bias [z, 1], (B, D + 1)."""
        moved = self.moved(queries)
        return moved if self.bias is None else F.pad(moved, (0, 1), value=1.0)

    def project(self, queries: Tensor) -> Tensor:
        """Return beta z, or with a bias beta [z, 1]: its inner products with the keys are the logits."""
        return self.beta * self.transformed(queries)

    def word_bonus(self, scores: Tensor) -> Tensor:
        """Return what word scores, (..., 2), add to logits, (...)."""
        assert self.word_weights is not None
        return self.beta * (scores.to(self.beta.dtype) @ self.word_weights)

    def plus_words(self, logits: Tensor, words: WordScores | None) -> Tensor:
        """Return logits, (B, N), with what words add to them."""
        if words is None or self.word_weights is None:
            return logits
        return logits.scatter_add(-1, words.rows.clamp(min=0), self.word_bonus(words.scores).to(logits.dtype))

    def logits_of(self, projected: Tensor, rows: Tensor, words: WordScores | None = None) -> Tensor:
        """Return the logits of some rows, (B, w), of queries that `project` has projected; -inf where a row is -1."""
        logits = scores_of(projected, self.keys_of(rows.clamp(min=0)), rows)
        if words is None or self.word_weights is None:
            return logits
        return logits + self.word_bonus(words.of(rows)).to(logits.dtype)

    def total(self, projected: Tensor, words: WordScores | None = None) -> Tensor:
        """Return the log-sum-exp of all logits, (B,), differentiable once, without ever holding (B, N)."""
        total = self.memory.logsumexp(projected, self.keys())
        if words is None or self.word_weights is None:
            return total
        return _plus_words_total(total, self._listed(projected, words), self.word_bonus(words.scores))

    def _listed(self, projected: Tensor, words: WordScores) -> Tensor:
        """Return the logits without words of the rows that the words list, (B, L); blocks bound the keys held."""
        size = max(1, LISTED_AT_ONCE // (words.rows.shape[1] * projected.shape[1]))
        blocks = zip(projected.split(size), words.rows.split(size), strict=True)
        return torch.cat([self.logits_of(*block) for block in blocks])

    def forward(self, queries: Tensor, words: WordScores | None = None) -> Tensor:
        return self.plus_words(self.memory.inner_products(self.project(queries), self.keys()), words)  # (B, N)

    def answer(self, queries: Tensor, words: WordScores | None = None) -> Tensor:
        """Return the soft answer softmax(logits) V, (B, D)."""
        return weighted_sum(self(queries, words).softmax(dim=-1), self.memory.rows)

    def loss(self, queries: Tensor, targets: Tensor, words: WordScores | None = None) -> Tensor:
        """Return `attention_loss` of the logits, differentiable once; above AT_ONCE rows no (B, N) is ever held."""
        check_targets(targets, len(queries), len(self.memory))
        if len(self.memory) <= AT_ONCE:
            return attention_loss(self(queries, words), targets)
        projected = self.project(queries)
        if words is None:
            return cross_entropy(projected, self.keys(), targets)
        right = mean_of(self.logits_of(projected, targets, words), targets >= 0)
        return (self.total(projected, words) - right).mean()

    def sampled_loss(
        self, queries: Tensor, targets: Tensor, *, sample: Tensor, hard: Tensor | None = None, sparse: bool = False
    ) -> Tensor:
        """Estimate the loss from the targets, a sample and hard negatives alone, see `sampled_cross_entropy`.

        If `sparse`, the gradient of learned keys is a sparse tensor, of the rows that are looked at.
        """
        projected, count, keys = self.project(queries), len(self.memory), partial(self.keys_of, sparse=sparse)
        return sampled_cross_entropy(projected, keys, targets, count=count, sample=sample, hard=hard)

    def candidates(self, queries: Tensor, k: int, *, logsumexp: bool = False, words: WordScores | None = None) -> TopK:
        """Return the k rows of highest attention, see `blockwise_topk`; an InputError if k is not in 1..N."""
        check_k(k, len(self.memory))
        projected = self.project(queries)
        return self.best(self.memory.topk(projected, self.keys(), k, logsumexp=logsumexp), projected, words)

    def ranked(
        self, queries: Tensor, targets: Tensor, k: int, words: WordScores | None = None, *, logsumexp: bool = True
    ) -> tuple[TopK, ...]:
        """Return the k `candidates`, or all rows, with the targets' scores and ranks, see `ranked_topk`."""
        projected, added, k = self.project(queries), None, min(k, len(self.memory))
        if words is not None and self.word_weights is not None:
            added = words.rows, self.word_bonus(words.scores)
        return (self.memory.ranked(projected, self.keys(), targets, k, logsumexp=logsumexp, added=added),)

    @torch.no_grad()
    def best(self, top: TopK, projected: Tensor, words: WordScores | None) -> TopK:
        """Return the k best rows with words, from the k best without and those that the words list.

        That is exact: a row without words that is among the k best with them is among the k best without.
        """
        if words is None or self.word_weights is None:
            return top
        listed, bonus = self._listed(projected, words), self.word_bonus(words.scores)
        again = (top.rows.unsqueeze(-1) == words.rows.unsqueeze(1)).any(dim=-1)  # (B, k)
        rows = torch.cat([top.rows, words.rows.clamp(min=0)], dim=-1)
        scores = torch.cat([top.scores.masked_fill(again, -math.inf), (listed + bonus).to(top.scores.dtype)], dim=-1)
        rows, order = rows.sort(dim=-1)  # so that of equal scores the smallest rows come first
        scores, order = scores.gather(-1, order).sort(dim=-1, descending=True, stable=True)
        k = top.rows.shape[1]
        total = None if top.logsumexp is None else _plus_words_total(top.logsumexp, listed, bonus)
        return TopK(scores[:, :k], rows.gather(-1, order)[:, :k], total)


def _plus_words_total(total: Tensor, logits: Tensor, bonus: Tensor) -> Tensor:
    """Add to a log-sum-exp, (B,), what a bonus on some of its logits, (B, L), adds: exp(logit) (exp(bonus) - 1)."""
    bonus = bonus.to(total.dtype)
    some = bonus > 0
    bonus = bonus.where(some, 1.0)
    added = logits + bonus + (-(-bonus).expm1()).log()  # log(exp(bonus) - 1), for small and large ones
    return total.logaddexp(added.masked_fill(~some, -math.inf).logsumexp(dim=-1))


def attention_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """-log of the probability of a right row, mean over each query's right rows and over the batch.

    That is the cross-entropy to the uniform distribution over the right rows, least where all have equal shares. Logits
    are (B, N), or a pipeline's log-probabilities; targets are (B, m) rows of the memory, padded with -1.
    """
    if targets.shape[1] == 1:
        return F.cross_entropy(logits, targets[:, 0])
    right = mean_of(logits.gather(-1, targets.clamp(min=0)), targets >= 0)
    return (logits.logsumexp(dim=-1) - right).mean()
