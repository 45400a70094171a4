"""The LightningModules: thin shells around stage 1, around stage 2 behind it, and around both together."""

from collections.abc import Callable, Sequence
from typing import Any

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchmetrics import MeanMetric

from nvf.data.datamodule import LoggedBatch
from nvf.data.queries import QueryBatch, score_blocks
from nvf.errors import InputError, check_number
from nvf.evaluation.gradients import GradientLog, norms
from nvf.evaluation.metrics import RankCounts
from nvf.models.attention import SoftAttention, attention_loss
from nvf.models.memory import neighbours
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import reranker_loss
from nvf.ops.cross_entropy import stratified
from nvf.ops.random_streams import stream, stream_seed
from nvf.ops.ranks import DEEPEST, are_targets, candidate_ranks, ndcg, ndcg_of, target_ranks
from nvf.ops.topk import first_topk

SCHEDULES = ("onecycle", "constant")
RELAXATIONS = "[1, 0.1] anneals, null is exact"
Measured = tuple[Tensor, Callable[[int | None], tuple[Tensor, ...]]]
LOGGED = 128  # queries of a training batch whose ranks are logged: to rank all of them costs more than a step


class StageModule(L.LightningModule):
    """What the stages share: Adam, the schedule, the metrics `split/name`, and the norms of gradients.

    Args:
        lr: the learning rate, or the peak of a onecycle schedule.
        schedule: onecycle or constant.
        k: the number of candidates.
        warmup: the share of the steps in which a onecycle rate rises.

    Raises:
        InputError: a learning rate that is not positive and finite, a share outside 0..1, or an unknown schedule.
    """

    def __init__(self, *, lr: float, schedule: str, k: int, warmup: float = 0.3) -> None:
        super().__init__()
        check_number("lr", lr, above=0, remedy="1e-3 is a safe start")
        if schedule not in SCHEDULES:
            raise InputError(f"schedule={schedule} is unknown; choose one of {', '.join(SCHEDULES)}")
        check_number("warmup", warmup, above=0, below=1, remedy="0.3 is the default")
        self.lr, self.schedule, self.k, self.warmup = lr, schedule, k, warmup
        self.ranks = RankCounts()
        self.coverage, self.ndcg = MeanMetric(), MeanMetric()
        self.gradients = GradientLog()
        self._queries: Tensor | None = None  # of a step whose gradients are looked at

    def measure(self, batch: Any) -> Measured:
        """The loss, and how to get of the first queries their targets' ranks, whether these are candidates, nDCG@10."""
        raise NotImplementedError

    def learning_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        """The parameters that are fitted, each with its (peak) learning rate."""
        raise NotImplementedError

    @property
    def attention(self) -> SoftAttention:
        """Stage 1, fitted or frozen."""
        raise NotImplementedError

    def training_step(self, batch: Any, _: int) -> Tensor:
        # Only in the steps whose metrics Lightning hands to the logger: logging costs more than a small step.
        if (self.global_step + 1) % self.trainer.log_every_n_steps:  # type: ignore[attr-defined]
            return self.measure(batch)[0]
        self._queries = batch.queries.detach().requires_grad_()
        loss, ranks = self.measure(batch._replace(queries=self._queries))
        self.log("train/loss", loss.detach(), prog_bar=True)
        self.log("train/top1", (ranks(LOGGED)[0] == 1).float().mean())
        self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
        self.log("train/temperature", 1 / self.attention.beta.detach())
        return loss

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._queries is None:
            return
        gradients = [(name, parameter.grad) for name, parameter in self.named_parameters()]
        found = norms([("query", self._queries.grad), *gradients])
        self._queries = None
        self.gradients.add(found)
        self.log_dict({f"gradients/{part}": norm for part, norm in found.items()})

    def validation_step(self, batch: Any, _: int) -> None:
        loss, measured = self.measure(batch)
        ranks, covered, ndcg = measured(None)
        self.ranks.update(ranks)
        self.coverage.update(covered.float())
        self.ndcg.update(ndcg)
        self.log("val/loss", loss, batch_size=len(ranks), sync_dist=True)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        checkpoint["gradients"] = self.gradients.state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        self.gradients.restore(checkpoint["gradients"])

    def on_validation_epoch_end(self) -> None:
        self.log("val/top1", self.ranks.share(1), prog_bar=True)
        self.log("val/top5", self.ranks.share(5))
        self.log("val/coverage", self.coverage.compute())
        self.log("val/ndcg10", self.ndcg.compute())
        for metric in (self.ranks, self.coverage, self.ndcg):
            metric.reset()

    def configure_optimizers(self) -> Any:
        rates = self.learning_rates()
        optimizer = torch.optim.Adam([{"params": parameters, "lr": lr} for parameters, lr in rates], fused=True)
        if self.schedule == "constant":
            return optimizer
        scheduler = torch.optim.lr_scheduler.OneCycleLR(
            optimizer,
            [lr for _, lr in rates],
            total_steps=int(self.trainer.estimated_stepping_batches),
            pct_start=self.warmup,
        )
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class AttentionModule(StageModule):
    """Fits stage 1 on `QueryBatch`es by cross-entropy over all rows, or over an estimate of it from some.

    Args:
        attention: stage 1.
        lr, schedule, k, warmup: as `StageModule` has them.
        learnable: which learned keys may move, (N,) bool; all if None. A row that no training query points at would
            only ever be pushed away, and be lost to the queries that want it.
        sample: how many rows a step estimate the loss; all of them give it exactly if None.
        hard: how many rows, the nearest to a query's target, are added to them.
        seed: of the samples.
    """

    def __init__(
        self,
        attention: SoftAttention,
        *,
        lr: float,
        schedule: str,
        k: int = 5,
        warmup: float = 0.3,
        learnable: Tensor | None = None,
        sample: int | None = None,
        hard: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(lr=lr, schedule=schedule, k=k, warmup=warmup)
        rows = len(attention.memory)
        if sample is not None:
            check_number("attention.sample", sample, minimum=1, whole=True, remedy="8192 is a good start")
            if sample > rows:
                raise InputError(f"attention.sample={sample} exceeds the memory's {rows} rows; null takes them all")
        check_number("attention.hard", hard, minimum=0, below=rows, whole=True, remedy="16 is a good start")
        if hard and sample is None:
            raise InputError(f"attention.hard={hard} adds to a sample of the rows; set attention.sample")
        self.model = attention
        self.sample, self.hard, self.seed = sample, hard, seed
        self.neighbours: Tensor | None = None  # of each row, (N, h)
        _hold_keys(attention, learnable)

    @property
    def attention(self) -> SoftAttention:
        return self.model

    def on_train_start(self) -> None:
        if self.hard and self.neighbours is None:
            self.neighbours = neighbours(self.model.keys().detach(), self.hard)

    def on_train_epoch_start(self) -> None:
        if self.hard and self.current_epoch and self.model.delta is not None:  # learned keys move
            self.neighbours = neighbours(self.model.keys().detach(), self.hard)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_save_checkpoint(checkpoint)
        if self.model.delta is not None:  # else they are found again
            checkpoint["neighbours"] = self.neighbours  # as they were when the epoch began

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        super().on_load_checkpoint(checkpoint)
        if (found := checkpoint.get("neighbours")) is not None:
            self.neighbours = found.to(self.model.memory.rows.device)

    def measure(self, batch: QueryBatch) -> Measured:
        if not self.training:  # validation batches are as small as all their scores ask for
            logits = self.model(batch.queries)
            return attention_loss(logits, batch.targets), lambda _: self._found(logits, batch.targets)

        @torch.no_grad()
        def found(count: int | None) -> tuple[Tensor, ...]:
            first = QueryBatch(batch.queries[:count], batch.targets[:count])
            blocks = score_blocks(first, len(self.model.memory))
            parts = [self._found(self.model(queries), targets) for queries, targets in blocks]
            return tuple(torch.cat(part) for part in zip(*parts, strict=True))

        if self.sample is None:
            return self.model.loss(batch.queries, batch.targets), found
        generator = stream(self.seed, "sample", self.global_step, self.global_rank, device=self.device)
        sample = stratified(len(self.model.memory), self.sample, generator)
        hard = None
        if self.neighbours is not None:
            first = (batch.targets >= 0).int().argmax(dim=-1, keepdim=True)
            hard = self.neighbours[batch.targets.gather(-1, first).squeeze(-1)].long()
        return self.model.sampled_loss(batch.queries, batch.targets, sample=sample, hard=hard), found

    def _found(self, logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        ranks = target_ranks(logits, targets)
        return ranks, ranks <= self.k, ndcg_of(logits, targets)

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

    def measure(self, batch: Any) -> Measured:  # a CandidateBatch
        scores = self.model.score(batch.queries, batch.rows, batch.logits, batch.evidence)

        def found(count: int | None) -> tuple[Tensor, ...]:
            labels, targets = batch.labels[:count], batch.targets[:count]
            gains = labels.gather(-1, first_topk(scores[:count], self.k))[:, :DEEPEST]
            gains = F.pad(gains, (0, DEEPEST - gains.shape[1]))  # of fewer candidates: no reranker moves the rest
            return candidate_ranks(scores[:count], labels), batch.valid[:count], ndcg(gains, targets)

        return reranker_loss(scores, batch.labels), found

    def learning_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        scalars = [p for name, p in self.model.reranker.named_parameters() if name == "evidence"]
        network = [p for name, p in self.model.reranker.named_parameters() if name != "evidence"]
        rates = [(network, self.lr), (scalars, self.lr * self.scalar_lr_ratio)]
        return [(parameters, lr) for parameters, lr in rates if parameters]


class JointModule(RerankerModule):
    """Fits both stages of a pipeline on batches of queries, by -log of its distribution at the targets.

    Args:
        pipeline: stage 1 and the reranker.
        lr: of the reranker's network and of stage 1.
        relaxation: the temperature of relaxed candidates in the first step and in the last, geometric in between;
            None for the exact distribution. See `distribution.relaxed`.
        attention_weight: of stage 1's own loss, which is added.
        learnable: which learned keys may move, as for `AttentionModule`.

    Raises:
        InputError: a relaxation that is not two numbers above 0, or a negative weight.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        lr: float,
        schedule: str,
        scalar_lr_ratio: float,
        seed: int,
        relaxation: Sequence[float] | None = None,
        attention_weight: float = 0.0,
        learnable: Tensor | None = None,
    ) -> None:
        super().__init__(pipeline, lr=lr, schedule=schedule, scalar_lr_ratio=scalar_lr_ratio, seed=seed)
        if relaxation is not None:
            if not isinstance(relaxation, list | tuple) or len(relaxation) != 2:
                raise InputError(f"joint.relaxation={relaxation} is not two temperatures; {RELAXATIONS}")
            for temperature in relaxation:
                check_number("joint.relaxation", temperature, above=0, remedy=RELAXATIONS)
        check_number("joint.attention_weight", attention_weight, minimum=0, remedy="0 leaves stage 1's loss out")
        self.relaxation, self.attention_weight = relaxation, attention_weight
        self.steps = 1  # of the whole training, known when it starts
        self.model.requires_grad_(True)
        _hold_keys(self.model.attention, learnable)

    @property
    def temperature(self) -> float | None:
        """At which candidates are relaxed in this step."""
        if self.relaxation is None or not self.training:
            return None
        first, last = self.relaxation
        return first * (last / first) ** (self.global_step / max(1, self.steps - 1))

    def on_train_start(self) -> None:
        self.steps = int(self.trainer.estimated_stepping_batches)

    def measure(self, batch: Any) -> Measured:  # a QueryBatch or a LoggedBatch
        relaxation, logged_as = self.temperature, batch.logged_as if isinstance(batch, LoggedBatch) else None
        ours, attention = self.model.loss(batch.queries, batch.targets, logged_as=logged_as, relaxation=relaxation)

        @torch.no_grad()
        def found(count: int | None) -> tuple[Tensor, ...]:
            parts = []
            first = type(batch)(*(part[:count].detach() for part in batch))
            for block in score_blocks(first, len(self.model.memory)):
                places = block.logged_as if isinstance(block, LoggedBatch) else None
                said = self.model(block.queries, logged_as=places, relaxation=relaxation, answer=False)
                ranking, covered = said.ranking, are_targets(said.candidates, block.targets).any(dim=-1)
                parts.append((target_ranks(ranking, block.targets), covered, ndcg_of(ranking, block.targets)))
            return tuple(torch.cat(part) for part in zip(*parts, strict=True))

        return ours + self.attention_weight * attention, found

    def learning_rates(self) -> list[tuple[list[nn.Parameter], float]]:
        return [(list(self.model.attention.parameters()), self.lr), *super().learning_rates()]


def _hold_keys(attention: SoftAttention, learnable: Tensor | None) -> None:
    """Let no gradient reach the learned keys of rows that are not learnable."""
    if attention.delta is not None and learnable is not None:
        attention.delta.register_hook(lambda gradient: gradient * learnable.to(gradient.device).unsqueeze(-1))
