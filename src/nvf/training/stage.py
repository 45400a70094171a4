"""What the LightningModules of all stages share: steps, metrics, optimizer and schedule."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor, nn
from torchmetrics import MeanMetric

from nvf.data.queries import each
from nvf.errors import InputError, check_number
from nvf.models.attention import SoftAttention
from nvf.models.pipeline import Pipeline
from nvf.ops.random_streams import stream_seed

Groups = list[dict[str, Any]]  # of parameters, each with its learning rate, as torch's optimizers take them
ADAM = partial(torch.optim.Adam, fused=True)
SCHEDULES = ("onecycle", "constant")
FIGURES = ("top1", "top5", "coverage", "ndcg10")
LOGGED = 128  # queries of a training batch whose ranks are logged: ranking all of them costs more than a step


class Judged(NamedTuple):
    """How well a batch of queries is answered."""

    loss: Tensor
    ranks: Tensor  # (B,) of the targets, from 1
    covered: Tensor  # (B,) bool, true where a target is among the candidates
    ndcg: Tensor  # (B,) nDCG@10


class StageModule(L.LightningModule):
    """The steps, metrics, optimizer and schedule that all stages share; a stage adds `loss` and `judge`.

    Args:
        lr: the learning rate, or the peak of a onecycle schedule.
        schedule: onecycle or constant.
        seed: of dropout and of samples of the rows.
        warmup: the share of the steps in which a onecycle rate rises.
        optimizer: makes torch's optimizer from groups of parameters, each with its learning rate.
    """

    def __init__(
        self,
        model: SoftAttention | Pipeline,
        *,
        lr: float,
        schedule: str,
        seed: int = 0,
        warmup: float = 0.3,
        optimizer: Callable[[Groups], torch.optim.Optimizer] = ADAM,
    ) -> None:
        super().__init__()
        check_number("lr", lr, above=0, remedy="1e-3 is a safe start")
        if schedule not in SCHEDULES:
            raise InputError(f"schedule={schedule} is unknown; choose one of {', '.join(SCHEDULES)}")
        check_number("warmup", warmup, above=0, below=1, remedy="0.3 is the default")
        self.save_hyperparameters(ignore=["model", "attention", "pipeline", "optimizer"], logger=False)
        self.model: Any = model
        self.lr, self.schedule, self.seed, self.warmup, self.optimizer = lr, schedule, seed, warmup, optimizer
        self.figures = nn.ModuleDict({f"{split}/{name}": MeanMetric() for split in ("val", "test") for name in FIGURES})

    def loss(self, batch: Any) -> Tensor:
        """The loss that training descends."""
        raise NotImplementedError

    def judge(self, batch: Any) -> Judged:
        """How well a batch is answered; all its scores are held at once."""
        raise NotImplementedError

    def parameter_groups(self) -> Groups:
        """The parameters that are fitted, each group with its (peak) learning rate."""
        return [{"params": list(self.attention.parameters()), "lr": self.lr}]

    def make_optimizer(self, groups: Groups) -> torch.optim.Optimizer:
        """The optimizer of the groups."""
        return self.optimizer(groups)

    @property
    def attention(self) -> SoftAttention:
        """Stage 1, fitted or frozen."""
        return self.model.attention if isinstance(self.model, Pipeline) else self.model

    def forward(self, queries: Tensor) -> Any:
        return self.model(queries)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = self.loss(batch)
        # Logging costs more than a small step, so it happens only where Lightning hands the metrics to the loggers.
        if (self.global_step + 1) % self.trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self.log("train/loss", loss.detach(), prog_bar=True)
            self.log("train/top1", self._share_answered(batch))
            self.log("train/lr", self.trainer.optimizers[0].param_groups[0]["lr"])
            self.log("train/temperature", 1 / self.attention.beta.detach())
        return loss

    def validation_step(self, batch: Any, batch_idx: int, split: str = "val") -> None:
        """Log the loss and the figures of a split; Lightning averages them over its batches and devices."""
        found = self.judge(batch)
        self.log(f"{split}/loss", found.loss, batch_size=len(found.ranks), sync_dist=True)
        for name, value in zip(FIGURES, (found.ranks <= 1, found.ranks <= 5, found.covered, found.ndcg), strict=True):
            metric: Any = self.figures[f"{split}/{name}"]
            metric.update(value.float())
            self.log(f"{split}/{name}", metric, prog_bar=name == "top1", batch_size=len(value))

    def test_step(self, batch: Any, batch_idx: int) -> None:
        self.validation_step(batch, batch_idx, split="test")

    @torch.no_grad()
    def _share_answered(self, batch: Any) -> Tensor:
        """The share of a training batch's first queries whose target is ranked first, as validation ranks it."""
        self.eval()
        ranks = self.judge(each(batch, lambda part: part[:LOGGED].detach())).ranks
        self.train()
        return (ranks == 1).float().mean()

    def on_train_epoch_start(self) -> None:
        # Dropout draws from the global generator; a run resumed at this epoch must draw the same masks.
        torch.manual_seed(stream_seed(self.seed, "dropout", self.current_epoch, self.global_rank))

    def configure_optimizers(self) -> Any:
        optimizer = self.make_optimizer(self.parameter_groups())
        peaks = [group["lr"] for group in optimizer.param_groups]
        if self.schedule == "constant":
            return optimizer
        steps = int(self.trainer.estimated_stepping_batches)
        rise = self.warmup + 1e-9 * (self.warmup * steps == 1)  # OneCycleLR divides by a rise of one step
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, peaks, total_steps=steps, pct_start=rise)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}
