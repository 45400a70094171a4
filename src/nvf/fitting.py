"""Fitting one module with Lightning, on one device or several, and keeping the weights that validate best."""

import logging
import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed

from nvf.checkpoints import Describe
from nvf.data import VectorDataModule
from nvf.modules import AttentionModule, StageModule
from nvf.processes import SHARDED, refusal
from nvf.stages import Settings

log = logging.getLogger("nvf")


class Fitted(NamedTuple):
    """How a fit went."""

    epochs: int  # that the kept weights were fitted for
    gradients: dict[str, Any]  # what `GradientLog.summary` says


def fit(
    config: Settings,
    stage: str,
    module: StageModule,
    data: VectorDataModule,
    folder: Path,
    *,
    start_competes: bool,
    name: str | None = None,
) -> Fitted:
    """Fit a module and leave the weights of its best validation Top-1 in it, frozen.

    Where the untrained start is a search that works, it is validated too and wins unless training beats or equals it:
    the weights are then of 0 epochs. So they are if the stage's `epochs` are 0.

    Args:
        stage: whose settings are used.
        name: of the folder for checkpoints and curves, where it is not the stage's.
    """
    settings, name = config[stage], name or stage
    checkpoints = folder / "checkpoints" / name
    best = ModelCheckpoint(
        checkpoints,
        filename="best",
        monitor="val/top1",
        mode="max",
        save_last=True,
        enable_version_counter=False,
    )
    callbacks: list[Callback] = [best, Describe(stage)]
    if settings["patience"] is not None:
        callbacks.append(EarlyStopping("val/top1", mode="max", patience=settings["patience"]))
    logger = TensorBoardLogger(folder, name=name, version="", default_hp_metric=False)
    trainer = _trainer(config, stage, folder, callbacks, logger=logger)
    fitted, batches = _as_the_trainer_wants(trainer, module, data)
    log.info("fitting %s", name)
    start_score = float("-inf")
    if start_competes or settings["epochs"] == 0:
        start_score = trainer.validate(fitted, batches, verbose=False)[0]["val/top1"]
        trainer.save_checkpoint(checkpoints / "start.ckpt")
    if settings["epochs"] == 0:
        if trainer.is_global_zero:
            os.replace(checkpoints / "start.ckpt", checkpoints / "best.ckpt")
        module.requires_grad_(False)
        return Fitted(0, module.gradients.summary())
    trainer.fit(fitted.train(), batches)
    assert best.best_model_score is not None
    score = float(best.best_model_score)
    if start_score > score:
        log.info("%s: no epoch validates better than the untrained start (Top-1 %.1f)", name, 100 * start_score)
    if trainer.is_global_zero:
        if start_score > score:
            os.replace(checkpoints / "start.ckpt", best.best_model_path)
        (checkpoints / "start.ckpt").unlink(missing_ok=True)
    trainer.strategy.barrier()  # now the best checkpoint is what all processes load
    checkpoint = torch.load(best.best_model_path, map_location="cpu", weights_only=True)
    module.load_state_dict(checkpoint["state_dict"])
    module.requires_grad_(False)
    return Fitted(0 if start_score > score else checkpoint["epoch"] + 1, fitted.gradients.summary())


def fit_blindly(
    config: Settings, stage: str, module: StageModule, data: VectorDataModule, folder: Path, epochs: int
) -> None:
    """Fit a module for the first `epochs` epochs of the stage's schedule, and freeze it; nothing else happens."""
    trainer = _trainer(
        config, stage, folder, [_StopAfter(epochs)], logger=False, enable_checkpointing=False, limit_val_batches=0
    )
    trainer.fit(module.train(), data)
    module.requires_grad_(False)


class _StopAfter(Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


class _StopAtOnce(Callback):
    """Keeps the program's own answer to SIGTERM.

    With several processes Lightning's sends the others a message first, which they do not expect, and waits for ever.
    """

    def __init__(self) -> None:
        self.answer = signal.getsignal(signal.SIGTERM)

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self.answer)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        signal.signal(signal.SIGTERM, self.answer)


def _as_the_trainer_wants(
    trainer: L.Trainer, module: StageModule, data: VectorDataModule
) -> tuple[StageModule, L.LightningDataModule]:
    """The module and its batches, or their sharded counterparts."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return module, data
    from nvf.sharding import SameBatches, ShardedAttentionModule  # DTensor takes seconds to import

    assert isinstance(module, AttentionModule)
    settings = {name: getattr(module, name) for name in ("lr", "schedule", "k", "warmup")}
    sharded = ShardedAttentionModule(module.attention, **settings)
    return sharded, SameBatches(data)


def _trainer(config: Settings, stage: str, folder: Path, callbacks: list[Callback], **arguments: Any) -> L.Trainer:
    if config["trainer"].get("enable_progress_bar", True):
        callbacks = [*callbacks, TQDMProgressBar(refresh_rate=50)]
    if distributed.is_initialized():
        callbacks = [*callbacks, _StopAtOnce()]
    strategy = config["trainer"].get("strategy", "auto")
    if strategy in ("auto", "ddp", SHARDED):
        strategy = _strategy(strategy)
    try:
        return L.Trainer(
            **{"max_epochs": config[stage]["epochs"], **config["trainer"], **arguments, "strategy": strategy},
            default_root_dir=folder,
            callbacks=callbacks,
            use_distributed_sampler=False,  # the datamodule deals the batches to the ranks
            num_sanity_val_steps=0,
            inference_mode=False,  # the metrics that validating the start leaves behind are used in the fit
        )
    except (MisconfigurationException, TypeError, ValueError) as fault:
        raise refusal(fault) from None


def _strategy(name: str) -> Any:
    if not distributed.is_initialized():  # there is one process
        return "auto"
    if name == SHARDED:
        return ModelParallelStrategy(save_distributed_checkpoint=False)
    return DDPStrategy(broadcast_buffers=False)  # the memory is one, and would be sent to all ranks before every step
