"""Training whose loss is no longer a number ends at once, with what there is to know about it."""

import math
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, distributed

from nvf.data.datamodule import VectorDataModule
from nvf.errors import InputError
from nvf.training.devices import largest
from nvf.training.modules import StageModule


class StopOnNaN(Callback):
    """Raises an InputError after the first step whose loss is NaN or infinite; what was saved before it stays.

    One process on a CPU looks at every step. Elsewhere the host would have to wait for the device, or the processes for
    each other: the first such step is remembered there, and asked for in the steps that are logged and before a
    checkpoint.

    Args:
        stage: whose settings the remedy names.
        data: where the batches come from.
    """

    def __init__(self, stage: str, data: VectorDataModule) -> None:
        self.stage, self.data = stage, data
        self._first: Tensor | None = None  # step with such a loss, -1 for none, on the device

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        loss, step = outputs["loss"], trainer.global_step - 1
        if loss.device.type == "cpu" and not distributed.is_initialized():
            if not math.isfinite(loss):
                self._report(trainer, module, float(loss), step)
            return
        first = loss.new_full((), -1, dtype=torch.int64) if self._first is None else self._first
        self._first = torch.where((first < 0) & ~loss.isfinite(), step, first)
        if trainer.global_step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            self._ask(trainer, module)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self._ask(trainer, module)

    def _ask(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if self._first is None:
            return
        (step,) = largest(trainer.strategy.root_device, int(self._first))
        if step >= 0:
            self._report(trainer, module, math.nan, step)

    def _report(self, trainer: L.Trainer, module: L.LightningModule, loss: float, step: int) -> None:
        assert isinstance(module, StageModule)
        epoch, batch = divmod(step, max(1, int(trainer.num_training_batches)))
        what, seed = self.data.seed_of(epoch, batch)
        raise InputError(
            f"{self.stage}: the loss is {loss} in step {step} (epoch {epoch}, batch {batch}; {what} has seed {seed}); "
            f"{self._cause(trainer, module)}. Checkpoints from before it are in the run's folder"
        )

    def _cause(self, trainer: L.Trainer, module: StageModule) -> str:
        rates = [float(group["lr"]) for group in trainer.optimizers[0].param_groups]
        beta = float(module.attention.beta.detach())
        if "16" in str(trainer.precision):
            return f"half precision most likely overflowed: set trainer.precision=32-true, not {trainer.precision}"
        if math.isinf(beta) or (math.isfinite(beta) and beta > 1e6):
            return f"stage 1's temperature went to 1/{beta:g}: lower {self.stage}.lr, its peak is {module.lr:g}"
        return (
            f"most likely {self.stage}.lr={module.lr:g} is too high (it was {max(rates):.2g} in this step): try "
            f"{self.stage}.lr={module.lr / 10:g}"
        )
