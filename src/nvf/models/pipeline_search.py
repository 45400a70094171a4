"""How a pipeline answers queries: its candidates in the reranker's order, then the other rows in stage 1's."""

import copy
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from nvf.errors import InputError
from nvf.files.vectors import check_largest, from_numpy, largest
from nvf.models.ann_index import approximate_topk
from nvf.models.distribution import most_probable_first, shared_out
from nvf.models.filters import Filter
from nvf.models.memory import check_k, unit
from nvf.models.queries_and_keys import checked_queries
from nvf.models.reranker import EvidenceReranker
from nvf.models.words import WordScores
from nvf.ops.products import QUERY_BLOCK, can_branch_on, joined, split
from nvf.ops.topk import TopK, blockwise_topk

RERANKED_AT_ONCE = 2**24  # numbers in the vectors of candidates that are held at once; 64 MB of float32


class Hits(NamedTuple):
    """A list of k rows for each query, best first: numpy arrays for numpy queries, tensors for tensors.

    Where a query lacks rows, it has row -1 with probability 0 and, since -1 may be an id, the id None.
    """

    rows: Any  # (B, k) int64, numbered as the vectors were given; of equal vectors the first
    probabilities: Any  # (B, k) float32
    ids: np.ndarray | None = None  # (B, k), of the rows, numpy always; None where the memory has none


def search(
    pipeline: Any,
    queries: np.ndarray | Tensor,
    k: int | None,
    *,
    texts: Sequence[str] | None,
    allowed: Any = None,
    candidates: Any = None,
) -> Hits:
    """Answer queries in blocks, see `Pipeline.search`, or order their candidates, see `Pipeline.rerank`."""
    given, memory, only, size = checked(pipeline, queries), pipeline.memory, None, QUERY_BLOCK
    if candidates is not None:
        only = Filter(memory, candidates, len(given), "candidates").candidates()
        k, size = only.width, max(1, RERANKED_AT_ONCE // (memory.dim * max(1, only.width)))
    else:
        check_k(k := pipeline.k if k is None else k, len(memory))
        only = None if allowed is None else Filter(memory, allowed, len(given))
    _check_texts(pipeline, texts, len(given))
    words = _word_scores(pipeline, texts) if allowed is None else None
    pipeline, blocks, size = _evaluated(pipeline), [], size if only is None else min(size, only.size)
    for number, part in enumerate(split(given, size)):
        block = slice(number * size, (number + 1) * size)
        rows, first = (None, None) if only is None or not len(given) else only.of(block)
        some = _some(words, block) if allowed is None or texts is None else _word_scores(pipeline, texts[block], rows)
        found, probabilities = _search_block(pipeline, part, int(k), some, rows, candidates is not None)
        if first is not None:
            found = first.expand(len(found), -1).gather(1, found.clamp(min=0)).long().where(found >= 0, -1)
        blocks.append((memory.vectors_of(found) if first is None else found, probabilities))
    rows, probabilities = (joined(parts) for parts in zip(*blocks, strict=True))
    ids, numbers = memory.ids, rows.cpu().numpy()
    if ids is not None:
        ids = ids[numbers] if (numbers >= 0).all() else np.where(numbers >= 0, ids.astype(object)[numbers], None)
    if isinstance(queries, np.ndarray):
        return Hits(numbers, probabilities.cpu().numpy(), ids)
    with torch.inference_mode(False):  # so that the caller may do with them what he likes
        return Hits(rows.clone().to(queries.device), probabilities.clone().to(queries.device), ids)


def checked(pipeline: Any, queries: np.ndarray | Tensor) -> Tensor:
    """Return queries scaled to length 1, (B, D), as the weights are; an InputError unless they are finite floats."""
    weights = pipeline.attention.log_beta
    floats = isinstance(queries, np.ndarray) and queries.dtype.kind == "f" and queries.dtype.itemsize <= 8
    given: Any = from_numpy(np.asarray(queries)) if floats else queries
    if checked_queries(given, pipeline.attention.query_dim, "B").ndim != 2:
        raise InputError(f"queries have shape {tuple(given.shape)}; give floats, (B, {pipeline.attention.query_dim})")
    check_largest(longest := largest(given), "queries")
    return unit(given.to(weights.device), weights.dtype, longest.to(weights.device).unsqueeze(-1))


def _evaluated(module: Any) -> Any:
    """Return the module if nothing in it trains, else a copy of the same tensors without dropout.

    Its own flags stay as they are: another thread may be using it.
    """
    if not _trains(module):
        return module
    copied = copy.copy(module)
    copied._modules = {name: None if part is None else _evaluated(part) for name, part in module._modules.items()}
    copied.training = False
    return copied


def _trains(module: Any) -> bool:
    return module is not None and (module.training or any(map(_trains, module._modules.values())))


def _check_texts(pipeline: Any, texts: Sequence[str] | None, count: int) -> None:
    if texts is None:
        return
    if pipeline.words is None:
        raise InputError("the pipeline was fitted without texts, or bm25s is missing; search without texts")
    if isinstance(texts, str) or len(texts) != count or not all(isinstance(text, str) for text in texts):
        raise InputError(f"{len(texts)} texts are not one string for each of {count} queries; give as many")


def _word_scores(pipeline: Any, texts: Sequence[str] | None, allowed: Tensor | None = None) -> WordScores | None:
    if texts is None:
        return None
    device = pipeline.memory.rows.device
    found = pipeline.words.scores(texts, allowed=None if allowed is None else allowed.cpu())
    return WordScores(*(part.to(device) for part in found))


def _some(words: WordScores | None, queries: slice | Tensor) -> WordScores | None:
    return None if words is None else WordScores(words.rows[queries], words.scores[queries])


def _search_block(
    pipeline: Any, queries: Tensor, k: int, words: WordScores | None, allowed: Tensor | None, reranked: bool
) -> tuple[Tensor, Tensor]:
    """Return k rows and their probabilities; if `reranked`, all that are allowed are candidates."""
    projected = pipeline.attention.project(queries)
    top = _best(pipeline, projected, max(k, pipeline.k), words, allowed)
    if allowed is None:
        return _listed(pipeline, queries, top, words, k)
    if reranked and pipeline.evidence is not None:
        top = top._replace(logsumexp=_best(pipeline, projected, 1, words).logsumexp)
    counts = (top.scores != -math.inf).sum(dim=-1)
    rows, probabilities = torch.full_like(top.rows, -1), torch.zeros_like(top.scores, dtype=torch.float32)
    for count in counts.unique().tolist():  # queries with as many rows are answered together, without padding
        some = counts == count
        of_some = TopK(top.scores[some, :count], top.rows[some, :count], top.logsumexp[some])
        found = _listed(pipeline, queries[some], of_some, _some(words, some), count, reranked)
        rows[some, :count], probabilities[some, :count] = found
    return rows[:, :k], probabilities[:, :k]


def _best(pipeline: Any, projected: Tensor, k: int, words: WordScores | None, allowed: Tensor | None = None) -> TopK:
    """Return stage 1's best rows, exactly or from the index."""
    keys = pipeline.attention.keys()
    if pipeline.index is None:
        top = blockwise_topk(projected, keys, k, logsumexp=True, allowed=allowed)
    else:
        pipeline.index.check_fits(keys)
        top = approximate_topk(pipeline.index, projected, keys, k, allowed)
    if words is not None and allowed is not None:
        right = allowed.expand(len(projected), -1).gather(1, words.rows.clamp(min=0))
        words = words._replace(rows=words.rows.where(right, -1))
    return top if words is None else pipeline.attention.best(top, projected, words)


def _listed(
    pipeline: Any, queries: Tensor, top: TopK, words: WordScores | None, k: int, reranked: bool = False
) -> tuple[Tensor, Tensor]:
    """Return k rows and their probabilities, (B, k), from stage 1's best; if `reranked`, all of them are candidates."""
    width = top.rows.shape[1] if reranked else pipeline.k
    candidates = top if width == top.rows.shape[1] else TopK(top.scores[:, :width], top.rows[:, :width], top.logsumexp)
    scores = _equal_scores_of_equal_rows(pipeline, pipeline.scores_of(queries, candidates, words), candidates)
    # Scores of near ties may round above those that were summed; the maximum keeps every probability below one.
    listed = top.scores.logsumexp(dim=-1)
    log_attention = top.scores - (listed if reranked else torch.maximum(top.logsumexp, listed)).unsqueeze(-1)
    rows, log_probs = most_probable_first(candidates.rows, shared_out(log_attention[:, :width], scores))
    if width < top.rows.shape[1]:
        rows = torch.cat([rows, top.rows[:, width:]], dim=-1)
        log_probs = torch.cat([log_probs, log_attention[:, width:]], dim=-1)
    return rows[:, :k], log_probs[:, :k].exp().clamp(max=1).float()


def _equal_scores_of_equal_rows(pipeline: Any, scores: Tensor, top: TopK) -> Tensor:
    """Give equal candidates the score of the first; otherwise the last bits of their scores would differ."""
    if isinstance(pipeline.reranker, EvidenceReranker) or not can_branch_on(scores):
        return scores
    if (top.scores.diff(dim=-1) < 0).all():
        return scores
    vectors = pipeline.memory.take(top.rows)
    equal = (vectors[:, 1:] == vectors[:, :-1]).all(dim=-1) & (top.scores[:, 1:] == top.scores[:, :-1])
    places = torch.arange(scores.shape[1])
    first = places.where(~F.pad(equal, (1, 0)), 0).cummax(dim=-1).values
    return scores.gather(-1, first)
