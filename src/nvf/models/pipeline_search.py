"""How a pipeline answers queries: its candidates in the reranker's order, then the other rows in stage 1's."""

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nvf.errors import InputError
from nvf.files.vectors import check_vectors, from_numpy
from nvf.models.ann_index import approximate_topk
from nvf.models.attention import checked_queries
from nvf.models.distribution import most_probable_first, shared_out
from nvf.models.memory import check_k, unit
from nvf.models.reranker import EvidenceReranker
from nvf.models.words import WordScores
from nvf.ops.products import QUERY_BLOCK, can_branch_on
from nvf.ops.topk import TopK


class Hits(NamedTuple):
    """A list of k rows for each query, best first: numpy arrays for numpy queries, tensors for tensors."""

    rows: Any  # (B, k) int64, numbered as the vectors were given; of equal vectors the first
    probabilities: Any  # (B, k) float32
    ids: np.ndarray | None = None  # (B, k), of the rows, numpy always; None where the memory has none


def search(pipeline: Any, queries: np.ndarray | Tensor, k: int | None, *, texts: Sequence[str] | None) -> Hits:
    """Answer queries in blocks, see `Pipeline.search`."""
    k = pipeline.k if k is None else k
    check_k(k, len(pipeline.memory))
    given, training, words = checked(pipeline, queries), pipeline.training, _word_scores(pipeline, queries, texts)
    pipeline.eval()  # no dropout in a search
    try:
        blocks = []
        for start in range(0, max(1, len(given)), QUERY_BLOCK):
            block = slice(start, start + QUERY_BLOCK)
            some = None if words is None else WordScores(words.rows[block], words.scores[block])
            blocks.append(_search_block(pipeline, given[block], int(k), some))
    finally:
        pipeline.train(training)
    rows, probabilities = (torch.cat(parts) for parts in zip(*blocks, strict=True))
    rows = pipeline.memory.vectors_of(rows)
    ids = None if pipeline.memory.ids is None else pipeline.memory.ids[rows.cpu().numpy()]
    if isinstance(queries, np.ndarray):
        return Hits(rows.cpu().numpy(), probabilities.cpu().numpy(), ids)
    return Hits(rows.to(given.device), probabilities.to(given.device), ids)


def checked(pipeline: Any, queries: np.ndarray | Tensor) -> Tensor:
    """Return queries as a tensor, (B, D) floats none of which is zero; an InputError for others."""
    floats = isinstance(queries, np.ndarray) and queries.dtype.kind == "f" and queries.dtype.itemsize <= 8
    given: Any = from_numpy(np.asarray(queries)) if floats else queries
    if checked_queries(given, pipeline.attention.query_dim, "B").ndim != 2:
        raise InputError(f"queries have shape {tuple(given.shape)}; give floats, (B, {pipeline.attention.query_dim})")
    check_vectors(given, "queries")
    return given


def _word_scores(pipeline: Any, queries: np.ndarray | Tensor, texts: Sequence[str] | None) -> WordScores | None:
    if texts is None:
        return None
    if pipeline.words is None:
        raise InputError("the pipeline was fitted without texts, or bm25s is missing; search without texts")
    if isinstance(texts, str) or len(texts) != len(queries) or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{len(texts)} texts are not one string for each of {len(queries)} queries; give as many")
    device = pipeline.memory.rows.device
    return WordScores(*(part.to(device) for part in pipeline.words.scores(texts)))


def _search_block(pipeline: Any, queries: Tensor, k: int, words: WordScores | None) -> tuple[Tensor, Tensor]:
    queries = unit(queries.to(pipeline.memory.rows.device), pipeline.attention.log_beta.dtype)
    width = max(k, pipeline.k)
    if pipeline.index is None:
        top = pipeline.attention.candidates(queries, width, logsumexp=True, words=words)
    else:
        pipeline.index.check_fits(pipeline.attention.keys())
        projected = pipeline.attention.project(queries)
        top = approximate_topk(pipeline.index, projected, pipeline.attention.keys(), width)
        top = pipeline.attention.best(top, projected, words)
    assert top.logsumexp is not None
    candidates = TopK(top.scores[:, : pipeline.k], top.rows[:, : pipeline.k], top.logsumexp)
    scores = _equal_scores_of_equal_rows(pipeline, pipeline.scores_of(queries, candidates, words), candidates)
    # Scores of near ties may round above those that were summed; the maximum keeps every probability below one.
    total = torch.maximum(top.logsumexp, top.scores.logsumexp(dim=-1))
    log_attention = top.scores - total.unsqueeze(-1)
    inside = shared_out(log_attention[:, : pipeline.k], scores)
    rows, inside = most_probable_first(candidates.rows, inside)
    rows = torch.cat([rows, top.rows[:, pipeline.k :]], dim=-1)[:, :k]
    log_probs = torch.cat([inside, log_attention[:, pipeline.k :]], dim=-1)[:, :k]
    return rows, log_probs.exp().clamp(max=1).float()


def _equal_scores_of_equal_rows(pipeline: Any, scores: Tensor, top: TopK) -> Tensor:
    """Give equal candidates the score of the first; otherwise the last bits of their scores would differ."""
    equal = top.scores[:, 1:] == top.scores[:, :-1]
    if isinstance(pipeline.reranker, EvidenceReranker) or not can_branch_on(scores) or not equal.any():
        return scores
    vectors = pipeline.memory.take(top.rows)
    equal &= (vectors[:, 1:] == vectors[:, :-1]).all(dim=-1)
    places = torch.arange(scores.shape[1])
    first = places.where(~F.pad(equal, (1, 0)), 0).cummax(dim=-1).values
    return scores.gather(-1, first)
