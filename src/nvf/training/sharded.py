"""A memory whose rows are shared out over devices, and stage 1 over it; all ranks see the same queries.

The rows are a DTensor, Shard(0), and the logits of a batch in training one, Shard(1). Losses, gradients and figures are
what one device with all rows would compute, the same on every rank.
"""

import lightning as L
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.utils.data import DataLoader

from nvf.data.datamodule import VectorDataModule
from nvf.data.queries import ALL_SCORES, FEWEST_QUERIES
from nvf.errors import InputError
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.words import WordScores
from nvf.ops.cross_entropy import mean_of
from nvf.ops.products import inner_products
from nvf.ops.ranks import target_ranks
from nvf.ops.topk import TopK, first_topk
from nvf.training.modules import AttentionModule


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
        self.register_buffer("aligned", None, persistent=False)
        self.register_module("alignment", None)


class ShardedAttention(SoftAttention):
    """`SoftAttention` over a sharded memory, with frozen keys."""

    memory: ShardedMemory

    @classmethod
    def of(cls, attention: SoftAttention, mesh: DeviceMesh) -> "ShardedAttention":
        """A copy of a stage 1 with frozen keys and no bias; an InputError if a rank would have no rows."""
        sharded = cls(ShardedMemory(attention.memory, mesh), **attention.settings)
        sharded.load_state_dict(attention.state_dict())
        return sharded

    def own_logits(self, queries: Tensor) -> Tensor:
        """The logits of this rank's rows, (B, N / ranks)."""
        keys = self.memory.rows
        moved = DTensor.from_local(self.project(queries), keys.device_mesh, [Replicate()])
        # Each rank has its own rows' part of the queries' gradient; their sum flows on.
        return inner_products(moved.to_local(grad_placements=[Partial("sum")]), keys.to_local())

    def forward(self, queries: Tensor, words: WordScores | None = None) -> Tensor:
        """The logits of all rows, (B, N), without words, on every rank, for the small blocks of validation."""
        keys = self.memory.rows
        shape = torch.Size((len(queries), len(keys)))
        own, stride = self.own_logits(queries), (len(keys), 1)
        return DTensor.from_local(own, keys.device_mesh, [Shard(1)], shape=shape, stride=stride).full_tensor()

    @torch.no_grad()
    def ranked(
        self, queries: Tensor, targets: Tensor, k: int, words: WordScores | None = None, *, logsumexp: bool = True
    ) -> tuple[TopK, ...]:
        """What `SoftAttention.ranked` returns, from the logits of all rows for a few queries at a time."""
        found, size = [], max(FEWEST_QUERIES, ALL_SCORES // len(self.memory))
        for some, right in zip(queries.split(size), targets.split(size), strict=True):
            logits = self(some)
            rows = first_topk(logits, min(k, len(self.memory)))
            best = logits.gather(-1, rows), rows, logits.logsumexp(dim=-1)
            found.append((*best, target_ranks(logits, right), logits.gather(-1, right.clamp(min=0))))
        return (TopK(*map(torch.cat, zip(*found, strict=True))),)

    def loss(self, queries: Tensor, targets: Tensor, words: WordScores | None = None) -> Tensor:
        """`attention_loss`, for which no rank holds the logits of all rows."""
        mesh, own = self.memory.rows.device_mesh, self.own_logits(queries)
        place = own_rows(len(self.memory), mesh)
        elsewhere = (targets < place.start) | (targets >= place.stop)
        mine = own.gather(-1, (targets - place.start).clamp(0, own.shape[1] - 1)).masked_fill(elsewhere, 0.0)
        right = DTensor.from_local(mine, mesh, [Partial("sum")]).full_tensor()  # (B, m)
        totals = DTensor.from_local(own.logsumexp(dim=-1).unsqueeze(0), mesh, [Shard(0)]).full_tensor()  # (ranks, B)
        return (totals.logsumexp(dim=0) - mean_of(right, targets >= 0)).mean()


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


class SameBatches(L.LightningDataModule):
    """Gives every rank the same batches, those of a run on one device, made on the device of the memory."""

    def __init__(self, data: VectorDataModule) -> None:
        super().__init__()
        self.data = data  # has no trainer, so it knows of no ranks

    def train_dataloader(self) -> DataLoader:
        return self.data.train_dataloader()

    def val_dataloader(self) -> DataLoader:
        return self.data.val_dataloader()
