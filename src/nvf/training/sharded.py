"""A memory whose rows are shared out over devices, and stage 1 over it; all ranks see the same queries.

The rows are a DTensor, Shard(0), so the logits of a batch are one too, Shard(1): no device ever holds N of anything.
Losses, gradients and ranks are what one device with all rows would compute, the same on every rank.
"""

import math

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard
from torch.utils.data import DataLoader

from nvf.data.datamodule import VectorDataModule
from nvf.data.queries import QueryBatch
from nvf.errors import InputError
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.words import WordScores
from nvf.ops.cross_entropy import mean_of
from nvf.ops.products import inner_products
from nvf.ops.ranks import DEEPEST, gains_of, ndcg
from nvf.ops.topk import blockwise_topk
from nvf.training.modules import AttentionModule
from nvf.training.stage import Judged


def own_rows(total: int, mesh: DeviceMesh) -> slice:
    """The memory's rows that this rank holds: ceil(N / ranks) each, in order; an InputError if a rank has none."""
    ranks = mesh.size()
    share = -(-total // ranks)
    if share * (ranks - 1) >= total:
        raise InputError(f"{ranks} devices would share {total} rows, {share} each, and one has none; lower devices")
    start = share * mesh.get_local_rank()
    return slice(start, min(start + share, total))


class ShardedMemory(VectorMemory):
    """A memory of which each rank of a mesh holds the rows of `own_rows`: `rows` is a DTensor, (N, D), Shard(0)."""

    rows: DTensor

    def __init__(self, memory: VectorMemory, mesh: DeviceMesh) -> None:
        nn.Module.__init__(self)
        own = memory.rows[own_rows(len(memory), mesh)]
        rows = DTensor.from_local(own, mesh, [Shard(0)], shape=memory.rows.shape, stride=(memory.dim, 1))
        self.register_buffer("rows", rows, persistent=False)


class ShardedAttention(SoftAttention):
    """`SoftAttention` over a sharded memory, with frozen keys; its logits are a DTensor, (B, N), Shard(1)."""

    memory: ShardedMemory

    @classmethod
    def of(cls, attention: SoftAttention, mesh: DeviceMesh) -> "ShardedAttention":
        """A copy of a stage 1 with frozen keys and no bias; an InputError if a rank would have no rows."""
        sharded = cls(ShardedMemory(attention.memory, mesh), **attention.settings)
        sharded.load_state_dict(attention.state_dict())
        return sharded

    def forward(self, queries: Tensor, words: WordScores | None = None) -> Tensor:
        keys = self.memory.rows
        mesh, shape = keys.device_mesh, torch.Size((len(queries), len(keys)))
        moved = DTensor.from_local(self.project(queries), mesh, [Replicate()])
        # Each rank has its own rows' part of the queries' gradient; their sum flows on.
        own = inner_products(moved.to_local(grad_placements=[Partial("sum")]), keys.to_local())
        return DTensor.from_local(own, mesh, [Shard(1)], shape=shape, stride=(len(keys), 1))

    def loss(self, queries: Tensor, targets: Tensor, words: WordScores | None = None) -> Tensor:
        return sharded_loss(self(queries), targets)

    @torch.no_grad()
    def best_rows(self, queries: Tensor, k: int) -> Tensor:
        """The k rows of highest attention, (B, k): each rank finds its own k best, and all merge theirs."""
        keys = self.memory.rows
        mesh, own = keys.device_mesh, keys.to_local()
        found = blockwise_topk(self.project(queries), own, min(k, len(own)))
        missing = k - found.scores.shape[1]  # of a rank with fewer rows than k
        scores = _gathered(F.pad(found.scores, (0, missing), value=-math.inf), mesh, Shard(1))  # (B, ranks k)
        rows = _gathered(F.pad(found.rows + own_rows(len(keys), mesh).start, (0, missing)), mesh, Shard(1))
        order = scores.argsort(dim=-1, descending=True, stable=True)  # of equal scores the smallest rows first
        return rows.gather(-1, order[:, :k])


def sharded_loss(logits: DTensor, targets: Tensor) -> Tensor:
    """`attention_loss` of logits (B, N), Shard(1)."""
    mesh = logits.device_mesh
    right = _gathered(_own_scores(logits, targets, elsewhere=0.0), mesh, Partial("sum"))  # (B, m)
    totals = _gathered(logits.to_local().logsumexp(dim=-1).unsqueeze(0), mesh, Shard(0))  # (ranks, B)
    return (totals.logsumexp(dim=0) - mean_of(right, targets >= 0)).mean()


@torch.no_grad()
def sharded_ranks(logits: DTensor, targets: Tensor) -> Tensor:
    """`target_ranks` of logits (B, N), Shard(1)."""
    mesh, own, padding = logits.device_mesh, logits.to_local(), targets < 0
    right = _gathered(_own_scores(logits, targets, elsewhere=-math.inf), mesh, Partial("max"))  # (B, m)
    best = right.amax(dim=-1, keepdim=True)
    first = targets.masked_fill(padding | (right < best), logits.shape[1]).amin(dim=-1, keepdim=True)
    place = own_rows(logits.shape[1], mesh)
    order = torch.arange(place.start, place.stop, device=own.device)
    above = ~(own <= best) | ((own == best) & (order < first))
    return 1 + _gathered(above.sum(dim=-1), mesh, Partial("sum"))


def _own_scores(logits: DTensor, targets: Tensor, *, elsewhere: float) -> Tensor:
    """The targets' logits where this rank holds them, (B, m)."""
    own, place = logits.to_local(), own_rows(logits.shape[1], logits.device_mesh)
    mine = (targets >= place.start) & (targets < place.stop)
    return own.gather(-1, (targets - place.start).clamp(0, own.shape[1] - 1)).masked_fill(~mine, elsewhere)


def _gathered(part: Tensor, mesh: DeviceMesh, placement: Placement) -> Tensor:
    """The tensor of which each rank holds a part, on every rank; gradients flow through it."""
    return DTensor.from_local(part, mesh, [placement]).full_tensor()


class ShardedAttentionModule(AttentionModule):
    """An `AttentionModule` under Lightning's `ModelParallelStrategy`, whose ranks share the memory.

    It fits a copy of the stage 1 that it is given; the copy is in `model` and in the checkpoints.
    """

    def configure_model(self) -> None:
        """Lightning calls it once the processes know of each other, before anything moves to a device."""
        if not isinstance(self.model, ShardedAttention):
            assert self.device_mesh is not None
            mesh = init_device_mesh(self.device_mesh.device_type, (self.trainer.world_size,))  # over all nodes
            self.model = ShardedAttention.of(self.model, mesh)

    def judge(self, batch: QueryBatch) -> Judged:
        logits = self.model(batch.queries)
        ranks = sharded_ranks(logits, batch.targets)
        first = self.model.best_rows(batch.queries, min(DEEPEST, len(self.model.memory)))
        gains = ndcg(gains_of(first, batch.targets, batch.gains), batch.targets, batch.gains)
        return Judged(sharded_loss(logits, batch.targets), ranks, ranks <= self.k, gains)


class SameBatches(L.LightningDataModule):
    """Gives every rank the same batches, those of a run on one device, made on the device of the memory."""

    def __init__(self, data: VectorDataModule) -> None:
        super().__init__()
        self.data = data  # has no trainer, so it knows of no ranks

    def train_dataloader(self) -> DataLoader:
        return self.data.train_dataloader()

    def val_dataloader(self) -> DataLoader:
        return self.data.val_dataloader()
