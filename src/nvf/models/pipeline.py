"""Both stages as one module: one differentiable distribution over the memory, and a search by it."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from nvf.errors import InputError, check_number
from nvf.models import pipeline_search, saved_pipeline, updated_pipeline
from nvf.models.ann_index import Index
from nvf.models.attention import SoftAttention
from nvf.models.distribution import Retrieval, joint, most_probable_first, shared_out
from nvf.models.evidence import Evidence
from nvf.models.memory import VectorMemory, check_k, unit
from nvf.models.pipeline_search import Hits
from nvf.models.queries_and_keys import checked_queries
from nvf.models.reranker import EvidenceReranker, Reranker
from nvf.models.words import Words, WordScores
from nvf.ops.cross_entropy import check_targets, mean_of
from nvf.ops.products import inner_products, weighted_sum
from nvf.ops.ranks import are_targets, candidate_ranks
from nvf.ops.topk import TopK, best_rows, first_topk

WINDOW = 2  # times k rows are scored where the choice of candidates is relaxed


class Pipeline(nn.Module):
    """Stage 1, its k best rows, and stage 2, as one distribution over all N rows.

    Outside the candidates a row keeps stage 1's probability. Inside, softmax(scores) shares out stage 1's total
    candidate mass. The distribution sums to one, and its arg max is the reranker's choice: the largest of k shares is
    at least mass / k, which no row outside exceeds. The choice of the candidates is piecewise constant; gradients flow
    through masses and scores to the query and to every weight of both stages.

    With `index` set to one over its keys (`nvf.models.ann_index.build_index`), `search` takes stage 1's best rows from
    it; the distribution, and with it training, stays exact. After the keys are trained, build the index again.

    A number of candidates k outside 1..N, or an `EvidenceReranker` without `evidence` to weigh, or evidence without
    one, raise an InputError.
    """

    def __init__(
        self,
        attention: SoftAttention,
        reranker: Reranker | EvidenceReranker,
        *,
        k: int = 5,
        evidence: Evidence | None = None,
    ) -> None:
        super().__init__()
        check_k(k, len(attention.memory))
        if (evidence is None) == isinstance(reranker, EvidenceReranker):
            raise InputError("an EvidenceReranker needs evidence=, and no other reranker takes it")
        self.attention = attention
        self.reranker = reranker
        self.k = int(k)  # JSON, in which it is saved, takes no number of numpy's
        self.evidence = evidence
        self.words: Words | None = None  # what `search` matches the texts of queries with
        self.index: Index | None = None  # where `search` finds stage 1's best rows; with None it looks at all of them

    @property
    def memory(self) -> VectorMemory:
        """The rows that are searched."""
        return self.attention.memory

    @torch.no_grad()
    def keys(self) -> Tensor:
        """Return stage 1's keys, to load into any index of inner products, which is asked for `transform(queries)`.

        They are (N, D) unit rows in the order of the vectors as given, equal ones included; (N, D + 1) where stage 1
        corrects hubs, with the correction as the last column.
        """
        keys = self.attention.keys()
        return keys.clone() if self.memory.row_of_vector is None else keys[self.memory.row_of_vector]

    @torch.no_grad()
    def transform(self, queries: np.ndarray | Tensor) -> Any:
        """Return what to ask an index of `keys()` for, from queries as for `search`, as numpy or torch as they are."""
        moved = self.attention.transformed(pipeline_search.checked(self, queries))
        return moved.cpu().numpy() if isinstance(queries, np.ndarray) else moved.to(queries.device)

    def forward(
        self,
        queries: Tensor,
        words: WordScores | None = None,
        *,
        logged_as: Tensor | None = None,
        relaxation: float | None = None,
        answer: bool = True,
    ) -> Retrieval:
        """Return the distribution and the soft-retrieved vector, differentiable in the queries and in every weight.

        Args:
            queries: (B, D), of any length but zero; any leading dimensions, or none, may take the place of B.
            words: what the queries' words match, if they have any.
            logged_as: each query's place in the log of the evidence, (B,), -1 for none, see `Evidence`.
            relaxation: the temperature of `distribution.relaxed`, above 0, for training; None is exact.
            answer: whether the soft-retrieved vector is wanted; it costs what stage 1's logits cost.

        Raises:
            InputError: queries that are not floats of the memory's width, or a relaxation that is not above 0.
        """
        relaxation, width = self._reranked(relaxation)
        queries = checked_queries(queries, self.attention.query_dim)
        lead = queries.shape[:-1]
        queries = unit(queries.reshape(-1, self.attention.query_dim), self.attention.log_beta.dtype)
        projected, keys = self.attention.project(queries), self.attention.keys()
        logits = inner_products(projected, keys)  # (B, N)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # autocast has halved them
        logits = self.attention.plus_words(logits, words)
        total = logits.logsumexp(dim=-1)
        rows = best_rows(logits, projected, keys, width) if words is None else first_topk(logits.detach(), width)
        scores = self.scores_of(queries, TopK(logits.gather(-1, rows), rows, total), words, logged_as).to(logits.dtype)
        log_probs = joint(logits - total.unsqueeze(-1), rows, scores, k=self.k, temperature=relaxation)  # (B, N)
        soft = weighted_sum(log_probs.exp(), self.memory.rows) if answer else None  # (B, D)
        return Retrieval(
            log_probs=log_probs.reshape(*lead, len(self.memory)),
            logits=logits.reshape(*lead, len(self.memory)),
            candidates=rows[:, : self.k].reshape(*lead, self.k),
            scores=scores[:, : self.k].reshape(*lead, self.k),
            answer=None if soft is None else soft.reshape(*lead, self.memory.dim),
        )

    def loss(
        self,
        queries: Tensor,
        targets: Tensor,
        words: WordScores | None = None,
        *,
        logged_as: Tensor | None = None,
        relaxation: float | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Return `attention_loss` of the distribution and of stage 1 alone, differentiable once, without any (B, N).

        Targets are (B, m) rows, padded with -1; the other arguments and errors are those of `forward`. Only the
        probabilities of reranked rows and targets are computed.
        """
        relaxation, width = self._reranked(relaxation)
        check_targets(targets, len(checked_queries(queries, self.attention.query_dim)), len(self.memory))
        queries = unit(queries, self.attention.log_beta.dtype)
        projected = self.attention.project(queries)
        rows = self.attention.best(self.memory.topk(projected, self.attention.keys(), width), projected, words).rows
        total = self.attention.total(projected, words)
        of_rows, of_targets = (self.attention.logits_of(projected, some, words) for some in (rows, targets))
        scores = self.scores_of(queries, TopK(of_rows, rows, total), words, logged_as).to(total.dtype)
        log_attention = torch.cat([of_rows, of_targets], dim=-1) - total.unsqueeze(-1)  # (B, w + m)
        places = torch.arange(width, device=rows.device).expand_as(rows)
        log_probs = joint(log_attention, places, scores, k=self.k, temperature=relaxation)
        same = targets.unsqueeze(-1) == rows.unsqueeze(1)  # (B, m, w)
        outside = width + torch.arange(targets.shape[1], device=rows.device)
        right = log_probs.gather(-1, same.int().argmax(dim=-1).where(same.any(dim=-1), outside))
        return -mean_of(right, targets >= 0).mean(), (total - mean_of(of_targets, targets >= 0)).mean()

    def _reranked(self, relaxation: float | None) -> tuple[float | None, int]:
        """Return the relaxation, or None where no row is outside the candidates, and how many rows are scored."""
        if relaxation is not None:
            check_number("relaxation", relaxation, above=0, remedy="None is exact")
        if relaxation is None or self.k == len(self.memory):
            return None, self.k
        return relaxation, min(WINDOW * self.k, len(self.memory))

    def scores_of(
        self, queries: Tensor, top: TopK, words: WordScores | None = None, logged_as: Tensor | None = None
    ) -> Tensor:
        """Return the reranker's scores of stage 1's best rows, of which the first k are the candidates."""
        evidence = None
        if self.evidence is not None:
            evidence = self.evidence(self.attention, queries, top, words, k=self.k, logged_as=logged_as)
        return self.score(queries, top.rows, top.scores, evidence)

    def score(self, queries: Tensor, rows: Tensor, logits: Tensor, evidence: Tensor | None) -> Tensor:
        """Return the reranker's scores, (B, k), from evidence, (B, k, F), that is known already, if it weighs any."""
        if isinstance(self.reranker, EvidenceReranker):
            return self.reranker(logits, evidence)
        queries, keys = self.memory.aligned_queries(queries), self.memory.take_keys(rows)
        return self.reranker(queries, keys, logits, self.attention.beta)

    @torch.no_grad()
    def ranked(
        self,
        queries: Tensor,
        targets: Tensor,
        k: int,
        words: WordScores | None = None,
        *,
        logged_as: Tensor | None = None,
    ) -> tuple[TopK, ...]:
        """Return what stage 1 ranks, at least the candidates, and its rows in the order of `search`.

        The scores of the latter are log-probabilities. Both have those of the targets, (B, m). A target among the
        candidates has its rank there, any other that of stage 1.
        """
        queries = unit(queries, self.attention.log_beta.dtype)
        (top,) = self.attention.ranked(queries, targets, max(k, self.k), words)
        candidates = TopK(top.scores[:, : self.k], top.rows[:, : self.k], top.logsumexp)
        scores = self.scores_of(queries, candidates, words, logged_as).to(top.scores.dtype)
        log_probs = top.scores - top.logsumexp.unsqueeze(-1)
        rows, best = most_probable_first(candidates.rows, shared_out(log_probs[:, : self.k], scores))
        right = are_targets(rows, targets)
        ranks = candidate_ranks(best, right)
        ranks = ranks.where(ranks <= self.k, len(self.memory) + 1)  # NaN is last
        ranks = ranks.where(right.any(dim=-1), top.ranks.clamp(min=self.k + 1))
        same = targets.unsqueeze(-1) == rows.unsqueeze(1)  # (B, m, k)
        outside = top.of_targets - top.logsumexp.unsqueeze(-1)
        of_targets = best.gather(-1, same.int().argmax(dim=-1)).where(same.any(dim=-1), outside)
        rows, best = (torch.cat([one, of[:, self.k :]], dim=-1) for one, of in ((rows, top.rows), (best, log_probs)))
        return top, TopK(best, rows, torch.zeros_like(top.logsumexp), ranks, of_targets)

    @torch.inference_mode()
    def search(
        self,
        queries: np.ndarray | Tensor,
        k: int | None = None,
        *,
        texts: Sequence[str] | None = None,
        allowed: Any = None,
    ) -> Hits:
        """List k rows for each query, with their probabilities and ids, in blocks that never hold (B, N).

        The candidates come first, the most probable ahead; then all other rows in stage 1's order. So the first row is
        the reranker's choice. Probabilities are those of `forward` and descend in each of the two parts. Of equal ones
        the smallest rows come first; on a CPU equal rows among the candidates are equally probable, unless evidence
        tells them apart. With an index the rows are the best of those it finds, and their probabilities rest on an
        estimate, see `approximate_topk`.

        Queries are (B, D) of any float type and length, numpy or torch; k is the number of candidates if None. Their
        `texts` have their words searched as well, in a pipeline that was fitted with texts.

        What is `allowed` may be ids, row numbers where the memory has no ids, or a bool mask over the vectors as given:
        for all queries, or one list or mask for each. Lists may be padded with None, or with -1 where that is no id.
        The answer is that of a memory with nothing else, and its probabilities those given that the answer is allowed;
        k allowed rows are found exactly, but by an index where one filter for all queries allows over a tenth of the
        rows. Of equal vectors the first that is allowed is returned. A query that allows fewer than k gets them all.

        Queries of another shape or type, zero or not finite, k not in 1..N, texts that are not one for each query, a
        filter of another length, with unknown ids, or that allows a query nothing raise an InputError.
        """
        return pipeline_search.search(self, queries, k, texts=texts, allowed=allowed)

    @torch.inference_mode()
    def rerank(self, queries: np.ndarray | Tensor, candidates: Any, *, texts: Sequence[str] | None = None) -> Hits:
        """Order candidates that any engine found by the reranker's scores, with their probabilities among each other.

        Candidates are ids, or row numbers where the memory has no ids, (B, m) or B lists, padded with None, or with -1
        where that is no id. They are scored as if stage 1 had chosen them, whatever their order is. So those that
        `search` chooses keep its order, and their shares of its probability. Queries and texts are as there. Ids that
        are unknown or come twice, a query without candidates, or another number of lists raise an InputError.
        """
        return pipeline_search.search(self, queries, None, texts=texts, candidates=candidates)

    def updated(
        self,
        *,
        add: np.ndarray | Tensor | None = None,
        ids: Sequence[Any] | np.ndarray | None = None,
        texts: Sequence[str] | None = None,
        remove: Sequence[Any] | np.ndarray = (),
        log: tuple[np.ndarray | Tensor, Any] | None = None,
        log_texts: Sequence[str] | None = None,
    ) -> "Pipeline":
        """Return a pipeline with items added, replaced and removed, and queries logged; nothing is fitted.

        Rows that stay keep their learned keys and their hub correction in every bit; a new row starts with its vector.

        Vectors to `add`, (m, D), have `ids` where the memory has ids; one whose id it has takes the place of that id's,
        others come last. `remove` lists ids, or where there are none the numbers of vectors as given. The `log` is of
        queries, (n, D), and of each the target or a list of them: ids, or numbers in the new memory; -1 is none. Both
        have texts where the pipeline has words. What does not fit the pipeline, or fewer than k rows that stay, raise
        an InputError.
        """
        return updated_pipeline.updated(self, add, ids, texts, remove, log, log_texts)

    def save(self, folder: str | Path) -> None:
        """Write the folder that `load` reads, atomically; an InputError if the path holds something else."""
        saved_pipeline.save(Path(folder), self)

    @classmethod
    def load(cls, folder: str | Path, device: torch.device | str = "cpu", *, index: bool = True) -> "Pipeline":
        """Read a folder that `save` wrote, or that of its run; nothing in it can run code.

        The pipeline is frozen: `requires_grad_()` makes it trainable. With `index=False`, or without FAISS, it searches
        exactly. A file that is missing, was changed since, or does not fit the others, or a device that cannot be used,
        raises an InputError.
        """
        return saved_pipeline.load(cls, Path(folder), device, index=index)
