"""Where queries come from: three generated sources with their oracles, and the user's own."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from operator import itemgetter
from typing import Any, ClassVar, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from nvf.errors import InputError, check_number
from nvf.files.mapped_rows import as_bytes
from nvf.models.memory import VectorMemory
from nvf.models.words import Words, WordScores
from nvf.ops.random_streams import stream

WARPS = ("rotation", "mlp")
ALL_SCORES = 2**22  # scores over all rows that are held at once; 16 MB of float32
FEWEST_QUERIES = 64  # of a block, whatever N: with fewer, reading the rows takes longer than arithmetic
Batch = TypeVar("Batch", bound=tuple[Any, ...])
Pairs = tuple[Tensor, Tensor]  # queries or texts by one model, and rows or the same texts by another


class QueryBatch(NamedTuple):
    """Unit queries and the rows that answer them."""

    queries: Tensor  # (B, D)
    targets: Tensor  # (B, m) int64 rows of the memory, padded with -1
    words: WordScores | None = None  # what the queries' words match, if there are texts
    gains: Tensor | None = None  # (B, m) what each target is worth, 0 where there is none; None: all are worth 1
    logged_as: Tensor | None = None  # (B,) int64, the places of training queries in the log of the evidence


def each(batch: Batch, change: Callable[[Tensor], Tensor]) -> Batch:
    """Return a batch with every tensor in it changed; what is None stays None."""
    parts: list[Any] = [*batch]
    for place, part in enumerate(parts):
        if part is not None:
            parts[place] = each(part, change) if isinstance(part, tuple) else change(part)
    return type(batch)(*parts)


def blocks(batch: Batch, size: int) -> list[Batch]:
    """Cut a named tuple of tensors into pieces of at most `size` samples."""
    starts = range(0, max(1, len(batch[0])), size)
    return [each(batch, itemgetter(slice(start, start + size))) for start in starts]


def fingerprint(batch: QueryBatch) -> str:
    """Return the hash of queries, targets, words and gains: `sha256:` and 64 hexadecimal digits."""
    digest = hashlib.sha256()
    for part in (*batch[:2], *(batch.words or ()), *(() if batch.gains is None else (batch.gains,))):
        digest.update(str((part.dtype, tuple(part.shape))).encode())
        digest.update(as_bytes(part))
    return f"sha256:{digest.hexdigest()}"


class QuerySource:
    """A generated source of queries over a memory."""

    foreign = False  # whether queries are of another space than the rows

    def __init__(self, memory: VectorMemory) -> None:
        self.memory = memory

    @property
    def oracle(self) -> Tensor:
        """The rows, (N, D), that someone who knows how the queries were made would search."""
        return self.memory.rows

    def sample(self, count: int, generator: torch.Generator) -> QueryBatch:
        """Draw `count` queries from a generator on the memory's device."""
        raise NotImplementedError


class Nearest(QuerySource):
    """Queries uniform on the unit sphere; the target is the row that exact search finds."""

    def sample(self, count: int, generator: torch.Generator) -> QueryBatch:
        drawn = torch.randn(count, self.memory.dim, generator=generator, device=generator.device)
        queries = F.normalize(drawn, dim=-1)
        return QueryBatch(queries, self.memory.search(queries, k=1).rows)


class Noisy(QuerySource):
    """Queries normalize(V[i] + sigma randn), target i: exact search is Bayes-optimal for unit rows."""

    def __init__(self, memory: VectorMemory, *, sigma: float) -> None:
        super().__init__(memory)
        check_number("queries.sigma", sigma, minimum=0, remedy="0.1 is easy, 0.3 is hard")
        self.sigma = sigma

    def sample(self, count: int, generator: torch.Generator) -> QueryBatch:
        rows = self.oracle
        targets = torch.randint(len(rows), (count, 1), generator=generator, device=generator.device)
        noise = torch.randn(count, rows.shape[1], generator=generator, device=generator.device)
        return QueryBatch(F.normalize(self.memory.take(targets[:, 0], rows) + self.sigma * noise, dim=-1), targets)


class Warped(Noisy):
    """Queries normalize(f(V[i]) + sigma randn), target i, for a hidden fixed map f; the oracle searches f(V).

    `rotation` is a rotation drawn uniformly; `mlp` is normalize(tanh(x A) B) with normal A, (D, 4D), and B, (4D, D).
    Both depend on `warp_seed` and D alone. Queries have `dim` dimensions, Dq, in place of D if it is given: B is then
    (4D, Dq), and the rotation is cut off, or is one of wider rows padded with zeros.
    """

    def __init__(
        self, memory: VectorMemory, *, sigma: float, warp: str, warp_seed: int, dim: int | None = None
    ) -> None:
        super().__init__(memory, sigma=sigma)
        if warp not in WARPS:
            raise InputError(f"queries.warp={warp} is unknown; choose one of {', '.join(WARPS)}")
        if dim is not None:
            check_number("queries.dim", dim, minimum=1, whole=True, remedy="null is as wide as the rows")
        generator, rows_dim = stream(warp_seed, "warp"), memory.dim
        dim = dim or rows_dim
        self.foreign = dim != rows_dim
        if warp == "rotation":
            widest = max(rows_dim, dim)
            q, r = torch.linalg.qr(torch.randn(widest, widest, generator=generator))
            layers = [(q * r.diagonal().sign())[:rows_dim, :dim]]
        else:
            shapes = (rows_dim, 4 * rows_dim), (4 * rows_dim, dim)
            layers = [torch.randn(*shape, generator=generator) for shape in shapes]
        parts = []
        for rows in memory.rows.cpu().split(ALL_SCORES // dim):
            warped = rows.float() @ layers[0]
            warped = warped if warp == "rotation" else torch.tanh(warped) @ layers[1]
            parts.append(F.normalize(warped, dim=-1).to(rows.dtype))
        self._warped = torch.cat(parts)

    @property
    def oracle(self) -> Tensor:
        self._warped = self.memory.held(self._warped)
        return self._warped


@dataclass(eq=False)
class Recorded:
    """The user's own queries and targets; nobody knows their oracle."""

    memory: VectorMemory
    splits: dict[str, QueryBatch]
    duplicates: dict[str, int] = field(default_factory=dict)  # by pairs "a/b", queries of split b that are also in a
    merged: int = 0  # queries that became one with an identical query before them
    texts: list[str] | None = None  # of the rows, if they have any
    asked: dict[str, list[str]] | None = None  # the texts of each split's queries, if these and the rows have any
    words: Words | None = None  # an index of these, and of the training queries' texts
    foreign: bool = False  # whether queries are of another model than the rows
    pairs: Pairs | None = None  # texts embedded by both models then, (P, D) and (P, Dq)
    # Of each split, searches to compare with then, by name: queries and rows.
    references: dict[str, dict[str, Pairs]] = field(default_factory=dict)
    oracle: ClassVar[None] = None


Source = QuerySource | Recorded
