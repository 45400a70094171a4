"""The frozen memory of unit vectors, and exact search over it."""

import copy
import hashlib
import math
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nvf.errors import InputError, check_number, one_line
from nvf.files.ids import checked_ids
from nvf.files.mapped_rows import State, as_bytes, mapped_rows, state_of
from nvf.files.npy import ROWS, ArrayFile
from nvf.files.vectors import BLOCK, check_largest, check_vectors, factorize, largest, row_hashes
from nvf.models.alignment import Alignment
from nvf.models.queries_and_keys import hubness
from nvf.ops.cross_entropy import logsumexp
from nvf.ops.products import inner_products
from nvf.ops.random_streams import stream
from nvf.ops.ranks import ranked_topk
from nvf.ops.topk import TopK, blockwise_topk

SHORTEST = 1e-12  # what the length of a vector counts at least where it is divided by it
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


class VectorMemory(nn.Module):
    """N frozen unit rows, (N, D), made from vectors of any length and any float type; bad ones are an InputError.

    The rows are a non-persistent buffer: they follow the module to a device but stay out of checkpoints, which name
    their memory by its `fingerprint`, the SHA-256 of the vectors as given.

    Args:
        vectors: (N, D), or a file of them, of which one block is held at a time.
        ids: what the user calls the vectors, different integers or strings; no part of the fingerprint.
        dtype: of the rows, float32, float16 or bfloat16; what is computed with them is float32.
        mapped: a folder for a file of the rows, from which they are read when needed; None keeps them in memory.
        distinct: whether vectors whose rows are equal in every bit become one row, so that N counts different rows.
    """

    rows: Tensor
    row_of_vector: Tensor | None  # the row of each given vector, int64; None where each has a row of its own
    vector_of_row: Tensor | None  # the first of the vectors that became each row, (N,) int64, or None
    file: tuple[Path, State] | None = None  # the file from which the rows are mapped, and its state then
    texts: list[str] | None = None  # of the vectors as they were given, if these come with texts
    alignment: Any  # an Alignment where queries are of another model than the rows, else None
    aligned: Tensor | None  # the rows as they are compared with queries then, (N, Dq)
    distance: str | None = None  # the distance of the collection they come from, if it orders them unlike cosine

    # Arithmetic of queries and the keys of all rows; a memory that several devices share has its own.
    shared = False
    topk: Callable[..., TopK] = staticmethod(blockwise_topk)
    ranked: Callable[..., TopK] = staticmethod(ranked_topk)
    logsumexp: Callable[..., Tensor] = staticmethod(logsumexp)
    inner_products: Callable[..., Tensor] = staticmethod(inner_products)
    hubness: Callable[..., Tensor] = staticmethod(hubness)

    def __init__(
        self,
        vectors: Tensor | ArrayFile,
        *,
        ids: np.ndarray | None = None,
        dtype: str = "float32",
        mapped: str | Path | None = None,
        distinct: bool = False,
    ) -> None:
        super().__init__()
        if dtype not in DTYPES:
            raise InputError(f"data.dtype={dtype} is unknown; choose one of {', '.join(DTYPES)}")
        shape, kind = tuple(vectors.shape), _torch_type(vectors)
        if len(shape) != 2 or not kind.is_floating_point or 0 in shape:
            raise InputError(f"memory has shape {shape} and type {kind}; give non-empty floats, (N, D)")
        self.ids = None if ids is None else checked_ids(ids, shape[0], "memory")
        device = vectors.device if isinstance(vectors, Tensor) else None
        rows = torch.empty(shape if mapped is None else 0, dtype=DTYPES[dtype], device=device)
        digest, hashes, start = _digest(vectors), [], 0
        for scaled in _unit_blocks(vectors, rows.dtype, digest, self.ids):  # even if mapped: the hash names the file
            if mapped is None:
                rows[start : start + len(scaled)] = scaled
            if distinct:
                hashes.append(row_hashes(scaled))
            start += len(scaled)
        self._number_rows(factorize(np.concatenate(hashes)) if distinct else np.arange(start), device)
        if mapped is not None:
            rows, self.file = _mapped(vectors, digest.hexdigest(), dtype, Path(mapped), self.vector_of_row)
        elif self.vector_of_row is not None:
            rows = rows[self.vector_of_row]
        self.fingerprint = f"sha256:{digest.hexdigest()}"
        self.register_buffer("rows", rows, persistent=False)

    @classmethod
    def restore(
        cls, rows: Tensor, fingerprint: str, ids: np.ndarray | None = None, row_of_vector: Tensor | None = None
    ) -> "VectorMemory":
        """Make a memory again from what another one had; the rows stay the same in every bit."""
        memory = cls.__new__(cls)
        nn.Module.__init__(memory)
        every = torch.arange(len(rows))
        numbers = every if row_of_vector is None else row_of_vector.cpu()
        if numbers.ndim != 1 or numbers.dtype != torch.int64 or not torch.equal(numbers.unique(), every):
            raise InputError(f"memory: the rows of its vectors are not its {len(rows)} rows; save it again")
        memory._number_rows(numbers.numpy(), rows.device)
        memory.ids = None if ids is None else checked_ids(ids, len(numbers), "memory")
        check_vectors(rows, "memory", memory.ids if len(numbers) == len(rows) else None)
        memory.fingerprint = fingerprint
        memory.register_buffer("rows", rows, persistent=False)
        return memory

    @classmethod
    def synthetic(cls, *, rows: int, dim: int, seed: int, **stored: Any) -> "VectorMemory":
        """Draw directions uniformly from the unit sphere; `stored` may say `dtype` and `mapped`."""
        _check_sizes(rows=rows, dim=dim)
        return cls(torch.randn(rows, dim, generator=stream(seed, "memory")), **stored)

    @classmethod
    def clustered(
        cls, *, clusters: int, rows_per_cluster: int, dim: int, sigma: float, seed: int, **stored: Any
    ) -> "VectorMemory":
        """Draw uniform unit centres, and rows at normal offsets from each, of deviation sigma in every dimension."""
        _check_sizes(clusters=clusters, rows_per_cluster=rows_per_cluster, dim=dim)
        check_number("data.sigma", sigma, minimum=0, remedy="0.2 makes clusters that are hard to tell apart within")
        generator = stream(seed, "memory")
        centres = F.normalize(torch.randn(clusters, dim, generator=generator), dim=-1)
        centres = centres.repeat_interleave(rows_per_cluster, dim=0)
        return cls(centres + sigma * torch.randn(centres.shape, generator=generator), **stored)

    def _number_rows(self, row_of_vector: np.ndarray, device: torch.device | None) -> None:
        vector_of_row = np.unique(row_of_vector, return_index=True)[1]
        merged = len(vector_of_row) < len(row_of_vector)
        for name, numbers in (("row_of_vector", row_of_vector), ("vector_of_row", vector_of_row)):
            self.register_buffer(name, torch.from_numpy(numbers).to(device) if merged else None, persistent=False)
        self.register_buffer("aligned", None, persistent=False)
        self.register_module("alignment", None)

    def __len__(self) -> int:
        return self.rows.shape[0]

    @cached_property
    def number_of_id(self) -> dict[Any, int]:
        """The number of the vector that each id is of, as the vectors were given; empty where there are no ids."""
        return {} if self.ids is None else {name: number for number, name in enumerate(self.ids.tolist())}

    @property
    def given(self) -> int:
        """The number of vectors as given, equal ones included."""
        return len(self) if self.row_of_vector is None else len(self.row_of_vector)

    @property
    def dim(self) -> int:
        """D, the number of dimensions."""
        return self.rows.shape[1]

    @property
    def query_dim(self) -> int:
        """The number of dimensions of queries: D, unless they are of another model."""
        return self.dim if self.alignment is None else len(self.alignment.centre)

    @property
    def keys(self) -> Tensor:
        """What queries, once `aligned_queries`, are compared with, (N, Dq): the rows, unless they are aligned."""
        return self.rows if self.aligned is None else self.aligned

    def aligned_queries(self, queries: Tensor) -> Tensor:
        """Return unit queries as they are compared with the keys, (..., Dq): as they are, unless they are aligned."""
        return queries if self.alignment is None else self.alignment.queries(queries)

    @torch.no_grad()
    def aligned_with(self, alignment: Alignment) -> "VectorMemory":
        """Return a memory of the same rows for queries of another model."""
        memory = copy.copy(self)
        memory._buffers, memory._modules = {**self._buffers}, {**self._modules}
        memory.alignment = alignment.to(self.rows.device)
        parts = [alignment.rows(block.float()).to(block.dtype) for block in self.rows.split(ROWS)]
        memory.aligned = torch.cat(parts)
        return memory

    def rows_of(self, vectors: Tensor) -> Tensor:
        """Return the rows of vectors that are named by their numbers as given; -1 stays."""
        return vectors if self.row_of_vector is None else self.row_of_vector[vectors].where(vectors >= 0, -1)

    def vectors_of(self, rows: Tensor) -> Tensor:
        """Return the number, as given, of the first vector that became each row."""
        return rows if self.vector_of_row is None else self.vector_of_row[rows]

    def texts_of_rows(self) -> list[str] | None:
        """Return the text of each row, those of equal vectors joined; None without texts."""
        if self.texts is None or self.row_of_vector is None:
            return self.texts
        of_row: list[list[str]] = [[] for _ in range(len(self))]
        for row, text in zip(self.row_of_vector.tolist(), self.texts, strict=True):
            of_row[row].append(text)
        return ["\n".join(dict.fromkeys(some)) for some in of_row]

    def check_unchanged(self) -> None:
        """Raise an InputError if the rows are mapped from a file that has changed since."""
        path, state = self.file or (None, None)
        if path and not (path.exists() and state_of(path.stat()) == state):
            what = f"{path} was changed or removed while its rows were used"
            raise InputError(f"{what}; start again, and let nothing write to data.mapped")

    def take(self, rows: Tensor, of: Tensor | None = None) -> Tensor:
        """Return the vectors of some rows, (...) -> (..., D), or those `of` others, in float32 if kept in less."""
        vectors = self.rows if of is None else of
        return vectors[rows].to(torch.promote_types(vectors.dtype, torch.float32))

    def held(self, vectors: Tensor) -> Tensor:
        """Return other vectors of the rows, (N, D'), where the rows are."""
        return vectors.to(self.rows.device)

    def take_keys(self, rows: Tensor) -> Tensor:
        """Return the keys of some rows, (...) -> (..., Dq), as `take` returns their vectors."""
        return self.take(rows, self.keys)

    def search(self, queries: Tensor, k: int) -> TopK:
        """Return the k rows of highest cosine similarity, exactly; an InputError if k is not in 1..N."""
        check_k(k, len(self))
        return self.topk(unit(queries), self.rows, k)


def unit(vectors: Tensor, dtype: torch.dtype = torch.float32, largest: Tensor | None = None) -> Tensor:
    """Scale vectors, whose `largest` are not zero if given, to length 1, (..., D), differentiably; zero stays zero."""
    wide = vectors.to(torch.promote_types(vectors.dtype, torch.float32))
    if largest is None:
        largest = torch.linalg.vector_norm(wide.detach(), math.inf, dim=-1, keepdim=True)
        largest = largest.masked_fill(largest == 0, 1)
    scaled = (wide / largest).to(dtype)
    return scaled / torch.linalg.vector_norm(scaled, dim=-1, keepdim=True).clamp(min=SHORTEST)


def _torch_type(vectors: Tensor | ArrayFile) -> torch.dtype:
    return vectors.dtype if isinstance(vectors, Tensor) else torch.from_numpy(np.empty(0, vectors.dtype)).dtype


def _digest(vectors: Tensor | ArrayFile) -> Any:
    return hashlib.sha256(f"{_torch_type(vectors)} {tuple(vectors.shape)}".encode())


def _unit_blocks(
    vectors: Tensor | ArrayFile, dtype: torch.dtype, digest: Any, ids: np.ndarray | None = None
) -> Iterator[Tensor]:
    """Yield unit vectors in blocks, and add the vectors as given to the digest; after the last, all are checked."""
    size, maxima = max(1, BLOCK // vectors.shape[1]), []
    for block in vectors.split(size) if isinstance(vectors, Tensor) else map(torch.from_numpy, vectors.blocks(size)):
        digest.update(as_bytes(block))
        maxima.append(largest(block))
        yield unit(block).to(dtype)
    check_largest(torch.cat(maxima), "memory" if isinstance(vectors, Tensor) else str(vectors.path), ids)


def _mapped(
    vectors: Tensor | ArrayFile, content: str, dtype: str, folder: Path, vector_of_row: Tensor | None
) -> tuple[Tensor, tuple[Path, State]]:
    kept = torch.full((len(vectors),), vector_of_row is None)
    if vector_of_row is not None:
        kept[vector_of_row.cpu()] = True

    def blocks() -> Iterator[Tensor]:
        digest, start = _digest(vectors), 0
        for scaled in _unit_blocks(vectors, DTYPES[dtype], digest):
            yield scaled[kept[start : start + len(scaled)]]
            start += len(scaled)
        if digest.hexdigest() != content:
            raise InputError("the vectors changed while they were read; start again when nothing writes to them")

    path = folder / f"{content}-{dtype}{'' if vector_of_row is None else '-distinct'}.rows"
    try:
        rows, state = mapped_rows(path, (int(kept.sum()), vectors.shape[1]), DTYPES[dtype], blocks)
        return rows, (path, state)
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
