"""The frozen memory of unit vectors, and exact search over it."""

import hashlib
import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvf.errors import InputError, check_number
from nvf.ids import checked_ids
from nvf.streams import stream

QUERY_BLOCK = 1024  # queries per matmul
SCORE_BLOCK = 2**22  # scores per matmul: 16 MB in float32, about what the caches near a core hold


class TopK(NamedTuple):
    """The k best rows of every query, best first."""

    scores: Tensor  # (B, k)
    rows: Tensor  # (B, k) int64
    logsumexp: Tensor | None = None  # (B,) over all N scores, where it was asked for


class VectorMemory(nn.Module):
    """N frozen unit rows, (N, D) float32, made from vectors of any length and any float type.

    The rows are a non-persistent buffer: they follow the module to a device but stay out of checkpoints, which
    name their memory by `fingerprint`, the SHA-256 of the vectors as given, instead.

    Args:
        vectors: (N, D).
        ids: what the user calls the rows, (N,) integers or strings; no part of the fingerprint.
        fingerprint: of the vectors, where it is known.

    Raises:
        InputError: not a matrix of floats, empty, a row that is zero or not finite, or ids that are not one a row, of
            one type and all different.
    """

    rows: Tensor

    def __init__(self, vectors: Tensor, *, ids: np.ndarray | None = None, fingerprint: str | None = None) -> None:
        super().__init__()
        if vectors.ndim != 2 or not vectors.is_floating_point() or vectors.numel() == 0:
            raise InputError(
                f"memory has shape {tuple(vectors.shape)} and type {vectors.dtype}; give non-empty floats, (N, D)"
            )
        self.ids = None if ids is None else checked_ids(ids, len(vectors), "memory")
        check_vectors(vectors, "memory", self.ids)
        self.register_buffer("rows", unit(vectors), persistent=False)
        self.fingerprint = fingerprint or _sha256(vectors)

    @classmethod
    def restore(cls, rows: Tensor, fingerprint: str, ids: np.ndarray | None = None) -> "VectorMemory":
        """A memory with the rows of another one, kept to the last bit, its fingerprint and its ids."""
        memory = cls(rows, fingerprint=fingerprint, ids=ids)
        memory.rows = rows
        return memory

    @classmethod
    def synthetic(cls, *, rows: int, dim: int, seed: int) -> "VectorMemory":
        """Directions drawn uniformly from the unit sphere."""
        _check_sizes(rows=rows, dim=dim)
        return cls(torch.randn(rows, dim, generator=stream(seed, "memory")))

    @classmethod
    def clustered(cls, *, clusters: int, rows_per_cluster: int, dim: int, sigma: float, seed: int) -> "VectorMemory":
        """Uniform unit centres, each with rows at normal offsets of deviation sigma a dimension."""
        _check_sizes(clusters=clusters, rows_per_cluster=rows_per_cluster, dim=dim)
        check_number("data.sigma", sigma, minimum=0, remedy="0.2 makes clusters that are hard to tell apart within")
        generator = stream(seed, "memory")
        centres = F.normalize(torch.randn(clusters, dim, generator=generator), dim=-1)
        centres = centres.repeat_interleave(rows_per_cluster, dim=0)
        return cls(centres + sigma * torch.randn(centres.shape, generator=generator))

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def dim(self) -> int:
        """D, the number of dimensions."""
        return self.rows.shape[1]

    def search(self, queries: Tensor, k: int) -> TopK:
        """Exact search: the k rows of highest cosine similarity, (B, k) each, in blocks.

        Raises:
            InputError: k is not in 1..N.
        """
        check_k(k, len(self))
        return blockwise_topk(F.normalize(queries, dim=-1), self.rows, k)


def blockwise_topk(
    queries: Tensor, keys: Tensor, k: int, *, logsumexp: bool = False, scores_per_block: int = SCORE_BLOCK
) -> TopK:
    """The k largest of queries @ keys.T a query, holding one block of scores at a time; 1 <= k <= N."""
    found = []
    for block in queries.split(QUERY_BLOCK):  # one empty block for no queries
        width = max(k, scores_per_block // max(1, len(block)))
        best: TopK | None = None
        for start in range(0, len(keys), width):
            scores = block @ keys[start : start + width].T  # (b, width)
            top = scores.topk(min(k, scores.shape[1]), dim=-1)
            total = scores.logsumexp(dim=-1) if logsumexp else None
            here = TopK(top.values, top.indices + start, total)
            best = here if best is None else _merge(best, here, k)
        assert best is not None
        found.append(best)
    scores, rows, totals = zip(*found, strict=True)
    return TopK(torch.cat(scores), torch.cat(rows), torch.cat(totals) if logsumexp else None)


def _merge(left: TopK, right: TopK, k: int) -> TopK:
    scores = torch.cat([left.scores, right.scores], dim=-1)
    rows = torch.cat([left.rows, right.rows], dim=-1)
    top = scores.topk(k, dim=-1)
    total = None
    if left.logsumexp is not None and right.logsumexp is not None:
        total = torch.logaddexp(left.logsumexp, right.logsumexp)
    return TopK(top.values, rows.gather(-1, top.indices), total)


@torch.no_grad()
def hubness(queries: Tensor, keys: Tensor, beta: float | Tensor) -> Tensor:
    """How near each key is to a bank of queries, (N,): log mean exp(beta q k) / beta, in blocks.

    A key that is near many queries is a hub: it is found too often. Query-bank normalisation (arXiv 2112.12777)
    subtracts a share of this from the key's scores.
    """
    total = blockwise_topk(beta * keys, queries, 1, logsumexp=True).logsumexp
    assert total is not None
    return (total - math.log(len(queries))) / beta


def unit(vectors: Tensor) -> Tensor:
    """Rows scaled to length 1, float32; lengths near either end of the float range do not over- or underflow."""
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return F.normalize((wide / wide.abs().amax(dim=-1, keepdim=True)).float(), dim=-1)


def from_numpy(array: np.ndarray) -> Tensor:
    """A tensor of its own with the array's values, whatever their byte order."""
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


def check_vectors(vectors: Tensor, name: str, ids: np.ndarray | None = None) -> None:
    """Raise an InputError that names the first row, if any, that is zero or not finite."""
    check_largest(largest(vectors), name, ids)


def largest(vectors: Tensor) -> Tensor:
    """Each row's largest absolute value, (n,); NaN where any of the row's is."""
    return vectors.abs().amax(dim=-1)


def check_largest(values: Tensor, name: str, ids: np.ndarray | None = None) -> None:
    """The check of `check_vectors` by what `largest` says of the rows, for vectors that are never held at once."""
    for fault, wrong in (("holds NaN or infinite values", ~values.isfinite()), ("is zero", values == 0)):
        if wrong.any():
            row = int(wrong.nonzero()[0])
            known = "" if ids is None else f" (id {ids[row]})"
            raise InputError(f"{name}: row {row}{known} {fault} ({int(wrong.sum())} such rows); remove or repair them")


def check_dim(found: int, dim: int, name: str) -> None:
    """Raise an InputError unless queries have as many dimensions as the memory."""
    if found != dim:
        raise InputError(f"{name}: {found} dimensions, but the memory has {dim}; embed both with the same model")


def check_k(k: int, rows: int) -> None:
    """Raise an InputError unless 1 <= k <= rows."""
    check_number("k", k, minimum=1, whole=True, remedy="5 is the default")
    if k > rows:
        raise InputError(f"k={k} exceeds the memory's {rows} rows; lower k")


def _check_sizes(**sizes: int) -> None:
    for name, size in sizes.items():
        check_number(f"data.{name}", size, minimum=1, whole=True, remedy="give the memory at least one")


def _sha256(vectors: Tensor) -> str:
    digest = hashlib.sha256(f"{vectors.dtype} {tuple(vectors.shape)}".encode())
    for block in vectors.detach().cpu().split(4096):
        digest.update(block.contiguous().view(torch.uint8).numpy().tobytes())
    return f"sha256:{digest.hexdigest()}"
