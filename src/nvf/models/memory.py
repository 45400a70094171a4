"""The frozen memory of unit vectors, and exact search over it."""

import hashlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvf.errors import InputError, check_number, one_line
from nvf.files.ids import checked_ids
from nvf.files.mapped_rows import RowsFile, as_bytes, mapped_rows
from nvf.files.vectors import BLOCK, check_largest, check_vectors, largest
from nvf.ops.products import TopK, blockwise_topk
from nvf.ops.random_streams import stream

if TYPE_CHECKING:
    from nvf.files.npy import ArrayFile

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class VectorMemory(nn.Module):
    """N frozen unit rows, (N, D), made from vectors of any length and any float type.

    The rows are a non-persistent buffer: they follow the module to a device but stay out of checkpoints, which
    name their memory by `fingerprint`, the SHA-256 of the vectors as given, instead.

    Args:
        vectors: (N, D), or a file of them, of which one block is held at a time.
        ids: what the user calls the vectors, an integer or a string each; no part of the fingerprint.
        dtype: of the rows: float32, or in half the room float16 or bfloat16; what is computed with them is float32.
        mapped: a folder for the rows, which are then read from the disk where they are needed; None holds them.
        distinct: whether vectors whose rows are equal in every bit are one row, so that N counts different rows alone.

    Raises:
        InputError: not a matrix of floats, empty, a row that is zero or not finite, an unknown dtype, a folder that
            cannot be written, a file that changes meanwhile, or ids that are not one a row, of one type and all
            different.
    """

    rows: Tensor
    place: Tensor | None  # the row of each vector that was given, int64; None where no two are one
    first: Tensor | None  # the vector that each row is, the first of equal ones, (N,) int64; None likewise
    file: RowsFile | None = None  # that the rows are read from
    distance: str | None = None  # of the collection that they are from, where that orders them otherwise than cosine

    def __init__(
        self,
        vectors: "Tensor | ArrayFile",
        *,
        ids: np.ndarray | None = None,
        dtype: str = "float32",
        mapped: str | Path | None = None,
        distinct: bool = False,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise InputError(f"data.dtype={dtype} is unknown; choose one of {', '.join(DTYPES)}")
        shape, kind = _shape_and_type(vectors)
        if len(shape) != 2 or not kind.is_floating_point or 0 in shape:
            raise InputError(f"memory has shape {shape} and type {kind}; give non-empty floats, (N, D)")
        self.ids = None if ids is None else checked_ids(ids, shape[0], "memory")
        digest = hashlib.sha256(f"{kind} {shape}".encode())
        device = vectors.device if isinstance(vectors, Tensor) else None
        rows = torch.empty(shape if mapped is None else 0, dtype=DTYPES[dtype], device=device)
        hashes, start = [], 0
        for block in _checked(vectors, digest, self.ids):  # even if mapped: the file of the rows is named by the hash
            scaled = unit(block).to(rows.dtype)
            if mapped is None:
                rows[start : start + len(block)] = scaled
            if distinct:
                hashes.append(row_hashes(scaled))
            start += len(block)
        self._set_place(alike(np.concatenate(hashes)) if distinct else np.arange(start), device)
        if mapped is not None:
            rows, self.file = _mapped(vectors, shape, digest.hexdigest(), rows.dtype, Path(mapped), self.first)
        elif self.first is not None:
            rows = rows[self.first]
        self.fingerprint = f"sha256:{digest.hexdigest()}"
        self.register_buffer("rows", rows, persistent=False)

    @classmethod
    def restore(
        cls, rows: Tensor, fingerprint: str, ids: np.ndarray | None = None, place: Tensor | None = None
    ) -> "VectorMemory":
        """A memory with the rows of another one, kept to the last bit, its fingerprint, its ids and its `place`."""
        memory = cls.__new__(cls)
        nn.Module.__init__(memory)
        every = torch.arange(len(rows))
        place = every if place is None else place.cpu()
        if place.ndim != 1 or place.dtype != torch.int64 or not torch.equal(place.unique(), every):
            raise InputError(f"memory: the rows of its vectors are not its {len(rows)} rows; save it again")
        memory._set_place(place.numpy(), rows.device)
        memory.ids = None if ids is None else checked_ids(ids, len(place), "memory")
        check_vectors(rows, "memory", memory.ids if len(place) == len(rows) else None)
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

    def _set_place(self, place: np.ndarray, device: torch.device | None) -> None:
        first = np.unique(place, return_index=True)[1]
        merged = len(first) < len(place)
        for name, array in (("place", place), ("first", first)):
            self.register_buffer(name, torch.from_numpy(array).to(device) if merged else None, persistent=False)

    def __len__(self) -> int:
        return self.rows.shape[0]

    @property
    def given(self) -> int:
        """How many vectors were given, equal ones too."""
        return len(self) if self.place is None else len(self.place)

    def rows_of(self, vectors: Tensor) -> Tensor:
        """The rows that vectors are, by their numbers as given; -1 stays."""
        return vectors if self.place is None else self.place[vectors].where(vectors >= 0, -1)

    def vectors_of(self, rows: Tensor) -> Tensor:
        """The reverse: the number, as given, of the first vector that a row is."""
        return rows if self.first is None else self.first[rows]

    @property
    def dim(self) -> int:
        """D, the number of dimensions."""
        return self.rows.shape[1]

    def check_unchanged(self) -> None:
        """Raise an InputError if the rows are read from a file that is no longer what it was."""
        if self.file is not None:
            self.file.check_unchanged()

    def take(self, rows: Tensor) -> Tensor:
        """The vectors of some rows, (...) -> (..., D), in float32 if they are kept in less."""
        return self.rows[rows].to(torch.promote_types(self.rows.dtype, torch.float32))

    def search(self, queries: Tensor, k: int) -> TopK:
        """Exact search: the k rows of highest cosine similarity, (B, k) each, in blocks.

        Raises:
            InputError: k is not in 1..N.
        """
        check_k(k, len(self))
        return blockwise_topk(unit(queries), self.rows, k)


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


def unit(vectors: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Vectors scaled to length 1, (..., D), differentiably; a zero vector stays zero.

    Memory, search, layer and baseline all normalise here, so that one query has one vector and ties break alike.
    Lengths near either end of the float range do not over- or underflow.
    """
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    largest = wide.detach().abs().amax(dim=-1, keepdim=True)
    return F.normalize((wide / largest.masked_fill(largest == 0, 1)).to(dtype), dim=-1)


def row_hashes(rows: Tensor) -> np.ndarray:
    """A value of 16 bytes for each row, (n,), equal for rows that are equal in every bit; -0 counts as 0."""
    data = as_bytes(rows + 0.0)
    size = len(data) // max(1, len(rows))
    hashes = (hashlib.blake2b(data[at : at + size], digest_size=16).digest() for at in range(0, len(data), size))
    return np.frombuffer(b"".join(hashes), "V16")


def alike(values: np.ndarray) -> np.ndarray:
    """Which of the different values each is, (n,) int64, numbered as they first appear."""
    _, first, group = np.unique(values, return_index=True, return_inverse=True)
    return first.argsort().argsort()[group]


def _shape_and_type(vectors: "Tensor | ArrayFile") -> tuple[tuple[int, ...], torch.dtype]:
    sample = vectors if isinstance(vectors, Tensor) else torch.from_numpy(np.empty(0, vectors.dtype))
    return tuple(vectors.shape), sample.dtype


def _checked(vectors: "Tensor | ArrayFile", digest: Any, ids: np.ndarray | None) -> Iterator[Tensor]:
    """The vectors, a block at a time, small enough for a cache; after the last all are hashed and checked."""
    size, found = max(1, BLOCK // vectors.shape[1]), []
    for block in vectors.split(size) if isinstance(vectors, Tensor) else map(torch.from_numpy, vectors.blocks(size)):
        digest.update(as_bytes(block))
        found.append(largest(block))
        yield block
    check_largest(torch.cat(found), "memory" if isinstance(vectors, Tensor) else str(vectors.path), ids)


def _mapped(
    vectors: "Tensor | ArrayFile",
    shape: tuple[int, ...],
    content: str,
    dtype: torch.dtype,
    folder: Path,
    first: Tensor | None,
) -> tuple[Tensor, RowsFile]:
    """Unit rows of vectors with this hash in a file of the folder, or of the `first` of equal ones alone."""
    kept = torch.full((shape[0],), first is None)
    if first is not None:
        kept[first.cpu()] = True

    def blocks() -> Iterator[Tensor]:
        again, start = hashlib.sha256(f"{_shape_and_type(vectors)[1]} {shape}".encode()), 0
        for block in _checked(vectors, again, None):
            yield unit(block).to(dtype)[kept[start : start + len(block)]]
            start += len(block)
        if again.hexdigest() != content:
            raise InputError("the vectors changed while they were read; start again when nothing writes to them")

    kind = next(name for name, known in DTYPES.items() if known == dtype) + ("" if first is None else "-distinct")
    try:
        return mapped_rows(folder / f"{content}-{kind}.rows", (int(kept.sum()), shape[1]), dtype, blocks)
    except (OSError, RuntimeError) as fault:
        raise InputError(
            f"data.mapped={folder} cannot hold the rows ({one_line(fault)}); name another folder, or null"
        ) from None


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
