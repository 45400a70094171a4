"""The two LightningModules: thin shells around the attention, and around the pipeline with its reranker."""

from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from nvf.attention import SoftAttention, attention_loss
from nvf.data import CandidateBatch
from nvf.errors import InputError, check_number
from nvf.metrics import RankCounts, candidate_ranks, target_ranks
from nvf.pipeline import Pipeline
from nvf.queries import QueryBatch
from nvf.reranker import reranker_loss
from nvf.streams import stream_seed

SCHEDULES = ("onecycle", "constant")
LossAndRanks = tuple[Tensor, Callable[[], Tensor]]


class StageModule(L.LightningModule):
    """What both stages share: Adam, the schedule, and the metrics `split/name`.

    Raises:
        InputError: a learning rate that is not positive and finite, or an unknown schedule.
    """

    def __init__(self, *, lr: float, schedule: str, k: int) -> None:
        super().__init__()
        check_number("lr", lr, above=0, remedy="1e-3 is a safe start")
        if schedule not in SCHEDULES:
            raise InputError(f"schedule={schedule} is unknown; choose one of {', '.join(SCHEDULES)}")
        self.lr, self.schedule, self.k = lr, schedule, k
        self.ranks = RankCounts()
        self.coverage = MeanMetric()

    def measure(self, batch: Any) -> LossAndRanks:
        """The loss, and how to get the rank of every query's target when somebody wants it."""
        raise NotImplementedError

    def learning_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """The parameters that are fitted, each with its (peak) learning rate."""
        raise NotImplementedError

    @property
    def attention(self) -> SoftAttention:
        """Stage 1, fitted or frozen."""
        raise NotImplementedError

    def training_step(self, batch: Any, _: int) -> Tensor:
        loss, ranks = self.measure(batch)
        # Only in the steps whose metrics Lightning hands to the logger: logging costs more than a small step.
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/loss", loss.detach(), prog_bar=True)
            self.log("train/top1", (ranks() == 1).float().mean())
            self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
            self.log("train/temperature", 1 / self.attention.beta.detach())
        return loss

    def validation_step(self, batch: Any, _: int) -> None:
        loss, ranks = self.measure(batch)
        found = ranks()
        self.ranks.update(found)
        self.coverage.update((found <= self.k).float())
        self.log("val/loss", loss, batch_size=len(found), sync_dist=True)

    def on_validation_epoch_end(self) -> None:
        self.log("val/top1", self.ranks.share(1), prog_bar=True)
        self.log("val/top5", self.ranks.share(5))
        self.log("val/coverage", self.coverage.compute())
        self.ranks.reset()
        self.coverage.reset()

    def configure_optimizers(self) -> Any:
        rates = self.learning_rates()
        optimizer = torch.optim.Adam([{"params": parameters, "lr": lr} for parameters, lr in rates], fused=True)
        if self.schedule == "constant":
            return optimizer
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [lr for _, lr in rates],
            total_steps=int(self.trainer.estimated_stepping_batches),
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class AttentionModule(StageModule):
    """Fits stage 1 on `QueryBatch`es by cross-entropy over all rows.

    Args:
        attention: stage 1.
        learnable: which learned keys may move, (N,) bool; all if None. A row that no training query points at would
            only ever be pushed away, and be lost to the queries that want it.
    """

    def __init__(
        self, attention: SoftAttention, *, lr: float, schedule: str, k: int = 5, learnable: Tensor | None = None
    ) -> None:
        super().__init__(lr=lr, schedule=schedule, k=k)
        self.learnable: Tensor | None
        self.model = attention
        self.register_buffer("learnable", learnable, persistent=False)
        if attention.delta is not None and learnable is not None:
            attention.delta.register_hook(lambda gradient: gradient * self.learnable.unsqueeze(-1))

    @property
    def attention(self) -> SoftAttention:
        return self.model

    def measure(self, batch: QueryBatch) -> LossAndRanks:
        logits = self.model(batch.queries)
        return attention_loss(logits, batch.targets), lambda: target_ranks(logits, batch.targets)

    def learning_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        return [(list(self.model.parameters()), self.lr)]


class RerankerModule(StageModule):
    """Fits a pipeline's reranker on `CandidateBatch`es by cross-entropy over the candidates; stage 1 stays frozen.

    Args:
        pipeline: stage 1 and the reranker.
        scalar_lr_ratio: learning rate of the residual reranker's two scalars over the network's.
        seed: of the dropout.
    """

    def __init__(self, pipeline: Pipeline, *, lr: float, schedule: str, scalar_lr_ratio: float, seed: int) -> None:
        super().__init__(lr=lr, schedule=schedule, k=pipeline.k)
        check_number("reranker.scalar_lr_ratio", scalar_lr_ratio, above=0, remedy="100 is the default")
        self.model = pipeline
        self.model.attention.requires_grad_(False)
        self.scalar_lr_ratio, self.seed = scalar_lr_ratio, seed

    @property
    def attention(self) -> SoftAttention:
        return self.model.attention

    def on_train_epoch_start(self) -> None:
        # Dropout draws from the global generator; a run resumed at this epoch must draw the same masks.
        torch.manual_seed(stream_seed(self.seed, "dropout", self.current_epoch, self.global_rank))

    def measure(self, batch: CandidateBatch) -> LossAndRanks:
        scores = self.model.score(batch.queries, batch.rows, batch.logits, batch.evidence)
        return reranker_loss(scores, batch.labels), lambda: candidate_ranks(scores, batch.labels)

    def learning_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        scalars = [p for name, p in self.model.reranker.named_parameters() if name == "evidence"]
        network = [p for name, p in self.model.reranker.named_parameters() if name != "evidence"]
        rates = [(network, self.lr), (scalars, self.lr * self.scalar_lr_ratio)]
        return [(parameters, lr) for parameters, lr in rates if parameters]
