"""A memory whose rows are shared out over devices, and stage 1 over it; all ranks see the same queries.

The rows are a DTensor, Shard(0), as are learned keys. Losses, gradients, candidates and figures are what one device
with all rows would compute, the same on every rank; between ranks go a few numbers a query, and the vectors of
candidates. Every rank runs the same program, and the memory and stage 1 have the methods of those on one device.
"""

import copy
import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor

from nvf.errors import InputError
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline
from nvf.models.queries_and_keys import hubness
from nvf.models.words import WordScores
from nvf.ops.cross_entropy import check_targets, logsumexp, mean_of
from nvf.ops.products import inner_products
from nvf.ops.ranks import best_target
from nvf.ops.topk import Added, Bar, TopK, blockwise_topk, exact_scores


def own_rows(total: int, mesh: DeviceMesh) -> slice:
    """The memory's rows that this rank holds: ceil(N / ranks) each, in order; an InputError if a rank has none."""
    ranks = mesh.size()
    share = -(-total // ranks)
    if share * (ranks - 1) >= total:
        raise InputError(f"{ranks} devices would share {total} rows, {share} each, and one has none; lower devices")
    start = share * mesh.get_local_rank()
    return slice(start, min(start + share, total))


class ShardedMemory(VectorMemory):
    """A memory of which each rank of a mesh holds the rows of `own_rows`: `rows` is a DTensor, (N, D), Shard(0).

    Keys, here, are a DTensor of that kind or the part of this rank. The memory that it is made from, which may be
    mapped from a file, stays the `whole` one.
    """

    shared = True
    rows: DTensor
    whole: VectorMemory
    mesh: DeviceMesh
    place: slice  # of this rank's rows

    def __init__(self, memory: VectorMemory, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        self.__dict__.update(memory.__dict__)  # its ids, its texts, its hash
        self._buffers = {**memory._buffers}
        self.__dict__.update(whole=memory, mesh=mesh, place=own_rows(len(memory), mesh))  # the whole one never moves
        self.rows = self.held(memory.rows)

    def held(self, vectors: Tensor) -> DTensor:
        if isinstance(vectors, DTensor):
            return vectors
        return self._of_own(vectors[self.place].to(self.mesh.device_type))

    def _of_own(self, part: Tensor) -> DTensor:
        """A tensor of all rows, of which this is the part of this rank's, (n, ...)."""
        shape = torch.Size([len(self), *part.shape[1:]])
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(part.contiguous(), self.mesh, [Shard(0)], shape=shape, stride=stride)

    def local(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Which of some rows this rank holds, bool, and their places among its own; 0 for others."""
        mine = (rows >= self.place.start) & (rows < self.place.stop)
        return mine, (rows - self.place.start).where(mine, 0)

    def summed(self, part: Tensor) -> Tensor:
        """The sum of what the ranks have, on every rank."""
        return DTensor.from_local(part, self.mesh, [Partial("sum")]).full_tensor()

    def stacked(self, part: Tensor) -> Tensor:
        """What the ranks have, (ranks, ...), on every rank."""
        return DTensor.from_local(part.unsqueeze(0), self.mesh, [Shard(0)]).full_tensor()

    def take(self, rows: Tensor, of: Tensor | None = None) -> Tensor:
        mine, places = self.local(rows)
        taken = self.summed(own_part(self.rows if of is None else of)[places].masked_fill(~mine.unsqueeze(-1), 0))
        return taken.to(torch.promote_types(taken.dtype, torch.float32))

    def inner_products(self, queries: Tensor, keys: Tensor) -> Tensor:
        return self._of_own(inner_products(self._shared(queries), own_part(keys)).T).full_tensor().T

    def logsumexp(self, queries: Tensor, keys: Tensor) -> Tensor:
        return self.stacked(logsumexp(self._shared(queries), own_part(keys))).logsumexp(dim=0)

    def hubness(self, queries: Tensor, keys: Tensor, beta: float | Tensor) -> Tensor:
        return self._of_own(hubness(queries, own_part(keys), beta)).full_tensor()

    @torch.no_grad()
    def topk(
        self, queries: Tensor, keys: Tensor, k: int, *, logsumexp: bool = False, added: Added = None, bar: Bar = None
    ) -> TopK:
        """The best of each rank's k best, by exact scores: of equal ones the smallest rows, whoever holds them."""
        own, added, width = own_part(keys), self._own_added(added), min(k, self.place.stop - self.place.start)
        bar = bar and (bar[0], bar[1] - self.place.start)
        top = blockwise_topk(queries, own, width, logsumexp=logsumexp, added=added, bar=bar)
        query = torch.arange(len(queries), device=queries.device).repeat_interleave(width)
        exact = exact_scores(queries, own, query, top.rows.flatten(), added).view(top.rows.shape)
        parts = (F.pad(exact, (0, k - width), value=-math.inf), F.pad(top.rows + self.place.start, (0, k - width)))
        scores, rows = (self.stacked(part).transpose(0, 1).flatten(1) for part in parts)  # (B, ranks k), rows ascend
        scores, order = (part[:, :k] for part in scores.sort(dim=-1, descending=True, stable=True))
        total = None if top.logsumexp is None else self.stacked(top.logsumexp).logsumexp(dim=0)
        ranks = None if bar is None else 1 + self.summed(top.ranks - 1)
        return TopK(scores.to(top.scores.dtype), rows.gather(-1, order), total, ranks)

    @torch.no_grad()
    def ranked(
        self, queries: Tensor, keys: Tensor, targets: Tensor, k: int, *, logsumexp: bool = False, added: Added = None
    ) -> TopK:
        mine, places = self.local(targets)
        query = torch.arange(len(targets), device=targets.device).repeat_interleave(targets.shape[1])
        own = exact_scores(queries, own_part(keys), query, places.flatten(), self._own_added(added)).view(mine.shape)
        scores = self.summed(own.masked_fill(~mine, 0))
        top = self.topk(queries, keys, k, logsumexp=logsumexp, added=added, bar=best_target(scores, targets))
        return top._replace(of_targets=scores.to(top.scores.dtype))

    def _own_added(self, added: Added) -> Added:
        if added is None:
            return None
        mine, places = self.local(added[0])
        return places.where(mine, -1), added[1].masked_fill(~mine, 0)

    def _shared(self, queries: Tensor) -> Tensor:
        """The queries, of whose gradient each rank has its own rows' part: the sum of these flows on."""
        return DTensor.from_local(queries, self.mesh, [Replicate()]).to_local(grad_placements=[Partial("sum")])


def own_part(keys: Tensor) -> Tensor:
    """The keys of this rank's rows."""
    return keys.to_local() if isinstance(keys, DTensor) else keys


class ShardedAttention(SoftAttention):
    """`SoftAttention` over a sharded memory.

    The delta of learned keys is a DTensor, (ranks s, D), Shard(0): each rank holds the rows of its own that may move,
    padded to the most, s, that any rank has. All else, the bias too, is the same on every rank.
    """

    memory: ShardedMemory
    moves: Tensor  # places, among this rank's rows, of those that may move
    kept: Tensor  # which rows of the delta stand for a row, (ranks s,) bool

    @classmethod
    def of(cls, attention: SoftAttention, memory: ShardedMemory) -> "ShardedAttention":
        """A copy of a stage 1 over `memory.whole`."""
        shared: Any = copy.deepcopy(attention, {id(attention.memory): memory})
        shared.__class__ = cls
        if attention.delta is not None:
            device, ranks = memory.mesh.device_type, memory.mesh.size()
            moving = torch.arange(len(memory)) if attention.moving is None else attention.moving
            mine, places = memory.local(moving)
            counts = (moving // -(-len(memory) // ranks)).bincount(minlength=ranks)
            most = int(counts.max())
            shared.kept = (torch.arange(most) < counts.unsqueeze(-1)).flatten()
            shared.moves = places[mine].to(device)
            own = F.pad(attention.delta.detach()[mine], (0, 0, 0, most - len(shared.moves))).to(device)
            delta = DTensor.from_local(own, memory.mesh, [Shard(0)])
            shared.delta = nn.Parameter(delta, requires_grad=attention.delta.requires_grad)
        return shared.to(memory.mesh.device_type)

    def _load_from_state_dict(self, weights: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Take this rank's part of the delta that a checkpoint holds."""
        name = f"{prefix}delta"
        if name in weights and not isinstance(weights[name], DTensor):
            weights[name] = distribute_tensor(weights[name], self.memory.mesh, [Shard(0)])
        super()._load_from_state_dict(weights, prefix, *rest)

    def _held(self) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
        """What this rank's part of the keys, which `keys` returns, is made of."""
        rows, bias = self.memory.rows.to_local(), None if self.bias is None else self.bias[self.memory.place]
        if self.delta is None:
            return rows, None, bias, None
        return rows, own_part(self.delta)[: len(self.moves)], bias, self.moves

    def keys_of(self, rows: Tensor, *, sparse: bool = False) -> Tensor:
        return self.memory.take(rows, self.keys())

    def loss(self, queries: Tensor, targets: Tensor, words: WordScores | None = None) -> Tensor:
        check_targets(targets, len(queries), len(self.memory))
        projected = self.project(queries)
        right = mean_of(self.logits_of(projected, targets, words), targets >= 0)
        return (self.total(projected, words) - right).mean()


def share_out(built: Any) -> Any:
    """Share the memory of a run, a `Built`, out over the processes of the group, each with a device of its own."""
    device = "cuda" if distributed.get_backend() == "nccl" else "cpu"
    mesh = init_device_mesh(device, (distributed.get_world_size(),))
    memory = ShardedMemory(built.source.memory, mesh)
    for stage in built.variants:
        stage.module.model = ShardedAttention.of(stage.module.model, memory)
    exact, seen = ShardedAttention.of(built.exact, memory), built.seen
    if built.reranker is not None:
        pipeline: Pipeline = built.reranker.module.model
        pipeline.attention = exact
        if pipeline.evidence is not None:
            pipeline.evidence.memory = memory
    built.source.memory = memory
    return replace(built, exact=exact, seen=None if seen is None else seen.to(device))


def whole(model: SoftAttention | Pipeline) -> Any:
    """A copy of a model over the whole memory, on the CPU; every rank has to ask for it."""
    (shared,) = (part for part in model.modules() if isinstance(part, ShardedAttention))
    same = {id(part): part for part in (shared.memory.whole, getattr(model, "words", None))}
    copied = copy.deepcopy(model, {**same, id(shared.memory): shared.memory.whole})
    attention: Any = getattr(copied, "attention", copied)
    attention.__class__ = SoftAttention
    if isinstance(shared.delta, DTensor):
        rows = shared.delta.full_tensor().detach()[shared.kept]
        attention.delta = nn.Parameter(rows, requires_grad=shared.delta.requires_grad)
    return copied.cpu()
