"""The frozen memory of unit vectors, and exact search over it."""

import hashlib
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvf.errors import InputError, check_number, one_line
from nvf.ids import checked_ids
from nvf.products import TopK, blockwise_topk
from nvf.streams import stream
from nvf.whole import written_whole

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
BLOCK = 2**22  # numbers that are scaled at a time


class VectorMemory(nn.Module):
    """N frozen unit rows, (N, D), made from vectors of any length and any float type.

    The rows are a non-persistent buffer: they follow the module to a device but stay out of checkpoints, which
    name their memory by `fingerprint`, the SHA-256 of the vectors as given, instead.

    Args:
        vectors: (N, D).
        ids: what the user calls the rows, (N,) integers or strings; no part of the fingerprint.
        fingerprint: of the vectors, where it is known.
        dtype: of the rows: float32, or in half the room float16 or bfloat16; what is computed with them is float32.
        mapped: a folder for the rows, which are then read from the disk where they are needed; None holds them.

    Raises:
        InputError: not a matrix of floats, empty, a row that is zero or not finite, an unknown dtype, a folder that
            cannot be written, or ids that are not one a row, of one type and all different.
    """

    rows: Tensor

    def __init__(
        self,
        vectors: Tensor,
        *,
        ids: np.ndarray | None = None,
        fingerprint: str | None = None,
        dtype: str = "float32",
        mapped: str | Path | None = None,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise InputError(f"data.dtype={dtype} is unknown; choose one of {', '.join(DTYPES)}")
        self._keep(vectors, ids)
        self.fingerprint = fingerprint or _sha256(vectors)
        if mapped is None:
            rows = torch.empty(vectors.shape, dtype=DTYPES[dtype], device=vectors.device)
            _fill(rows, vectors)
        else:
            rows = _mapped(vectors, DTYPES[dtype], Path(mapped) / f"{self.fingerprint.partition(':')[2]}-{dtype}.rows")
        self.register_buffer("rows", rows, persistent=False)

    def _keep(self, vectors: Tensor, ids: np.ndarray | None) -> None:
        """Check everything, and keep the ids."""
        if vectors.ndim != 2 or not vectors.is_floating_point() or vectors.numel() == 0:
            raise InputError(
                f"memory has shape {tuple(vectors.shape)} and type {vectors.dtype}; give non-empty floats, (N, D)"
            )
        self.ids = None if ids is None else checked_ids(ids, len(vectors), "memory")
        check_vectors(vectors, "memory", self.ids)

    @classmethod
    def restore(cls, rows: Tensor, fingerprint: str, ids: np.ndarray | None = None) -> "VectorMemory":
        """A memory with the rows of another one, kept to the last bit, its fingerprint and its ids."""
        memory = cls.__new__(cls)
        nn.Module.__init__(memory)
        memory._keep(rows, ids)
        memory.fingerprint = fingerprint
        memory.register_buffer("rows", rows, persistent=False)
        return memory

    @classmethod
    def synthetic(cls, *, rows: int, dim: int, seed: int, **stored: Any) -> "VectorMemory":
        """Directions drawn uniformly from the unit sphere; `stored` may say `dtype` and `mapped`."""
        _check_sizes(rows=rows, dim=dim)
        return cls(torch.randn(rows, dim, generator=stream(seed, "memory")), **stored)

    @classmethod
    def clustered(
        cls, *, clusters: int, rows_per_cluster: int, dim: int, sigma: float, seed: int, **stored: Any
    ) -> "VectorMemory":
        """Uniform unit centres, each with rows at normal offsets of deviation sigma a dimension."""
        _check_sizes(clusters=clusters, rows_per_cluster=rows_per_cluster, dim=dim)
        check_number("data.sigma", sigma, minimum=0, remedy="0.2 makes clusters that are hard to tell apart within")
        generator = stream(seed, "memory")
        centres = F.normalize(torch.randn(clusters, dim, generator=generator), dim=-1)
        centres = centres.repeat_interleave(rows_per_cluster, dim=0)
        return cls(centres + sigma * torch.randn(centres.shape, generator=generator), **stored)

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def dim(self) -> int:
        """D, the number of dimensions."""
        return self.rows.shape[1]

    def take(self, rows: Tensor) -> Tensor:
        """The vectors of some rows, (...) -> (..., D), in float32 if they are kept in less."""
        return self.rows[rows].to(torch.promote_types(self.rows.dtype, torch.float32))

    def search(self, queries: Tensor, k: int) -> TopK:
        """Exact search: the k rows of highest cosine similarity, (B, k) each, in blocks.

        Raises:
            InputError: k is not in 1..N.
        """
        check_k(k, len(self))
        return blockwise_topk(F.normalize(queries, dim=-1), self.rows, k)


@torch.no_grad()
def hubness(queries: Tensor, keys: Tensor, beta: float | Tensor) -> Tensor:
    """How near each key is to a bank of queries, (N,): log mean exp(beta q k) / beta, in blocks.

    A key that is near many queries is a hub: it is found too often. Query-bank normalisation (arXiv 2112.12777)
    subtracts a share of this from the key's scores.
    """
    total = blockwise_topk(keys, beta * queries, 1, logsumexp=True).logsumexp
    assert total is not None
    return (total - math.log(len(queries))) / beta


@torch.no_grad()
def neighbours(keys: Tensor, count: int) -> Tensor:
    """The rows of the keys most like each key, (N, count) int32, best first and never the row itself."""
    found = []
    for start in range(0, len(keys), BLOCK):
        block = keys[start : start + BLOCK]
        rows = blockwise_topk(block, keys, count + 1).rows
        itself = rows == torch.arange(start, start + len(block), device=rows.device).unsqueeze(-1)
        itself[:, -1] |= ~itself.any(dim=-1)  # one of many equal rows may miss itself
        found.append(rows[~itself].view(len(block), count).int())
    return torch.cat(found)


def unit(vectors: Tensor) -> Tensor:
    """Rows scaled to length 1, float32; lengths near either end of the float range do not over- or underflow."""
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    return F.normalize((wide / wide.abs().amax(dim=-1, keepdim=True)).float(), dim=-1)


def _fill(rows: Tensor, vectors: Tensor) -> None:
    """Write the vectors' unit rows, a block at a time: what is between fits a cache."""
    size = max(1, BLOCK // rows.shape[1])
    for ours, given in zip(rows.split(size), vectors.split(size), strict=True):
        ours.copy_(unit(given))


def _mapped(vectors: Tensor, dtype: torch.dtype, path: Path) -> Tensor:
    """Unit rows in a file, written if it is not there already, and mapped: what is not used takes no memory."""
    count = vectors.numel()
    try:
        if not path.is_file() or path.stat().st_size != count * dtype.itemsize:
            path.parent.mkdir(parents=True, exist_ok=True)
            with written_whole(path) as partial:
                rows = torch.from_file(str(partial), shared=True, size=count, dtype=dtype)
                _fill(rows.view(vectors.shape), vectors)
        return torch.from_file(str(path), size=count, dtype=dtype).view(vectors.shape)
    except (OSError, RuntimeError) as fault:
        raise InputError(
            f"data.mapped={path.parent} cannot hold the rows ({one_line(fault)}); name another folder, or null"
        ) from None


def from_numpy(array: np.ndarray) -> Tensor:
    """A tensor of its own with the array's values, whatever their byte order."""
    return torch.from_numpy(np.array(array, dtype=array.dtype.newbyteorder("=")))


def check_vectors(vectors: Tensor, name: str, ids: np.ndarray | None = None) -> None:
    """Raise an InputError that names the first row, if any, that is zero or not finite."""
    check_largest(largest(vectors), name, ids)


def largest(vectors: Tensor) -> Tensor:
    """Each row's largest absolute value, (n,); NaN where any of the row's is."""
    return torch.cat([part.abs().amax(dim=-1) for part in vectors.split(max(1, BLOCK // max(1, vectors.shape[1])))])


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
