"""Fitting one module with Lightning, on one device or several, and keeping the weights that validate best."""

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import lightning as L
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed

from nvf.data.datamodule import VectorDataModule
from nvf.errors import InputError, check_number, fitting_in_memory
from nvf.files.tensors import read_archive
from nvf.training.checkpointing import (
    BEST,
    LAST,
    PlainFiles,
    Progress,
    SaveAsItGoes,
    rewind,
    save_whole,
    saved_progress,
)
from nvf.training.checkpoints import Describe
from nvf.training.devices import SHARDED, refusal
from nvf.training.divergence import StopOnNaN
from nvf.training.modules import AttentionModule, StageModule

log = logging.getLogger("nvf")
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16")
# What a run sets itself.
OURS = (
    *("barebones", "callbacks", "default_root_dir", "enable_checkpointing", "inference_mode", "logger"),
    *("num_sanity_val_steps", "plugins", "use_distributed_sampler"),
)
COUNTS = (
    *("max_epochs", "max_steps", "log_every_n_steps", "accumulate_grad_batches", "check_val_every_n_epoch"),
    *("limit_train_batches", "limit_val_batches"),  # a share of a small stage's may be none
)


@dataclass(frozen=True)
class FitSettings:
    """How a stage is fitted.

    Args:
        stage: whose settings an error names.
        epochs: of training; 0 keeps the untrained start.
        patience: validations without a better one after which training stops; None never stops it early.
        save_every: steps between two saves of last.ckpt; None saves every 20 seconds.
        trainer: makes the Trainer: a `functools.partial` with the arguments that the user gives.
        callbacks: of the user.
        loggers: makes the loggers from a run's folder and a fit's name; None makes a TensorBoardLogger.
        remedies: what to do where memory runs out.
    """

    stage: str
    epochs: int
    patience: int | None = None
    save_every: int | None = None
    trainer: partial[L.Trainer] = field(default_factory=lambda: partial(L.Trainer))
    callbacks: Sequence[Callback] = ()
    loggers: Callable[[Path, str], Sequence[Logger]] | None = None
    remedies: Sequence[str] = ()


class Fitted(NamedTuple):
    """How a fit went."""

    epochs: int  # that the kept weights were fitted for
    gradients: dict[str, Any]  # what `GradientLog.summary` says


def fit(
    module: StageModule,
    data: VectorDataModule,
    settings: FitSettings,
    *,
    folder: Path,
    name: str,
    start_competes: bool,
) -> Fitted:
    """Fit a module and leave the weights that validate best in it, by the Top-1 or nDCG@10 of `criterion`, frozen.

    Where the untrained start is a search that works, it is validated too and wins unless training beats or equals it:
    the weights are then of 0 epochs. So they are if the stage's `epochs` are 0.

    A fit that left a last.ckpt in the folder goes on from there, to the same end.

    Args:
        folder: of the run.
        name: of the folders for checkpoints and curves in it.
    """
    checkpoints = folder / "checkpoints" / name
    saved = saved_progress(checkpoints)
    rewind(folder / name, {} if saved is None else saved[1].curves)
    monitor = f"val/{data.criterion}"
    saving = SaveAsItGoes(checkpoints, every=settings.save_every, monitor=monitor)
    callbacks: list[Callback] = [StopOnNaN(settings.stage, data), Describe(settings.stage), saving, *settings.callbacks]
    if settings.patience is not None:
        callbacks.append(EarlyStopping(monitor, mode="max", patience=settings.patience, strict=False))
    loggers = (settings.loggers or _tensorboard)(folder, name)
    trainer = _trainer(settings, checkpoints, callbacks, logger=loggers)
    fitted, batches = _as_the_trainer_wants(trainer, module, data)
    start, best = checkpoints / "start.ckpt", checkpoints / BEST
    if saved is None:
        log.info("fitting %s", name)
        if start_competes or settings.epochs == 0:
            score = trainer.validate(fitted, batches, verbose=False)[0][monitor]
            saving.progress = saving.progress._replace(start=score)
            save_whole(trainer, start)
        if settings.epochs == 0:
            if trainer.is_global_zero:
                os.replace(start, best)
            module.requires_grad_(False)
            return Fitted(0, module.gradients.summary())
    _train(settings, trainer, fitted, batches, data, saving, saved)
    reached, start_score = saving.progress.best, saving.progress.start
    if unseen := reached is None:  # training ended before its first validation, as trainer.max_steps may have it
        reached = trainer.validate(fitted, batches, verbose=False)[0][monitor]
    if start_wins := start_score is not None and start_score > reached:
        log.info("%s: no epoch validates better than the untrained start (%s %.1f)", name, monitor, 100 * start_score)
    elif unseen:
        save_whole(trainer, best)
    if trainer.is_global_zero:
        if start_wins and start.exists():  # or a run that was stopped has done so already
            os.replace(start, best)
        start.unlink(missing_ok=True)
    trainer.strategy.barrier()  # now the best checkpoint is what all processes load
    checkpoint = read_archive(best)
    module.load_state_dict(checkpoint["state_dict"])
    module.requires_grad_(False)
    epochs = trainer.current_epoch if unseen else checkpoint["epoch"] + 1
    return Fitted(0 if start_wins else epochs, fitted.gradients.summary())


def fit_blindly(
    module: StageModule, data: VectorDataModule, settings: FitSettings, *, folder: Path, name: str, epochs: int
) -> None:
    """Fit a module for the first `epochs` epochs of the stage's schedule, and freeze it; nothing else happens.

    It goes on from a last.ckpt as `fit` does.
    """
    checkpoints = folder / "checkpoints" / name
    saved, saving = saved_progress(checkpoints), SaveAsItGoes(checkpoints, every=settings.save_every)
    callbacks = [StopOnNaN(settings.stage, data), _StopAfter(epochs), saving]
    trainer = _trainer(settings, checkpoints, callbacks, logger=False, limit_val_batches=0)
    _train(settings, trainer, module, data, data, saving, saved)
    module.requires_grad_(False)


def _train(
    settings: FitSettings,
    trainer: L.Trainer,
    module: StageModule,
    batches: L.LightningDataModule,
    data: VectorDataModule,
    saving: SaveAsItGoes,
    saved: tuple[dict[str, Any], Progress] | None,
) -> None:
    """Train from the start, or from where it was saved, to the end."""
    data.steps_done = lambda: trainer.fit_loop.epoch_loop.batch_progress.current.ready
    if saved is not None and saved[1].stopped:  # Lightning would train on
        checkpoint, saving.progress = saved
        module.on_load_checkpoint(checkpoint)
        module.load_state_dict(checkpoint["state_dict"])
        return
    if saved is not None:
        log.info("going on from step %d of %s", saved[0]["global_step"], saving.folder.name)
    path = None if saved is None else saving.folder / LAST
    saving.signals.await_lightning()
    with fitting_in_memory(settings.stage, settings.remedies):
        trainer.fit(module.train(), batches, ckpt_path=path, weights_only=True)
    saving.signals.answer_late()


class _StopAfter(Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def _as_the_trainer_wants(
    trainer: L.Trainer, module: StageModule, data: VectorDataModule
) -> tuple[StageModule, L.LightningDataModule]:
    """The module and its batches, or their sharded counterparts."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return module, data
    from nvf.training.sharded import SameBatches, ShardedAttentionModule  # DTensor takes seconds to import

    assert isinstance(module, AttentionModule)
    settings = {name: getattr(module, name) for name in ("lr", "schedule", "k", "warmup", "optimizer")}
    sharded = ShardedAttentionModule(module.attention, **settings)
    return sharded, SameBatches(data)


def _tensorboard(folder: Path, name: str) -> Sequence[Logger]:
    return [TensorBoardLogger(folder, name=name, version="", default_hp_metric=False)]


def _trainer(settings: FitSettings, checkpoints: Path, callbacks: list[Callback], **arguments: Any) -> L.Trainer:
    given = settings.trainer.keywords
    strategy = given.get("strategy", "auto")
    if strategy in ("auto", "ddp", SHARDED):
        strategy = _strategy(strategy)
    epochs = given.get("max_epochs") or settings.epochs
    try:
        return settings.trainer(
            plugins=[PlainFiles()],
            **{"max_epochs": epochs, **arguments, "strategy": strategy},
            default_root_dir=checkpoints,  # where Lightning's Slurm plugin saves, and finds what it saved
            callbacks=callbacks,
            use_distributed_sampler=False,  # the datamodule deals the batches to the ranks
            num_sanity_val_steps=0,
            inference_mode=False,  # the metrics that validating the start leaves behind are used in the fit
        )
    except (MisconfigurationException, TypeError, ValueError) as fault:
        raise refusal(fault) from None


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Refuse those of the trainer's settings with which a fit cannot end well, before any begins.

    Raises:
        InputError: one of them, by name.
    """

    def refuse(name: str, remedy: str) -> NoReturn:
        raise InputError(f"trainer.{name}={settings[name]} is of no use here; {remedy}")

    precision = str(settings.get("precision", "32-true"))
    if precision not in PRECISIONS:
        refuse("precision", f"choose one of {', '.join(PRECISIONS[:3])}: memory and queries are float32 in every fit")
    for name in OURS:
        if name in settings:
            refuse(name, "leave it out: a run sets it itself")
    given = {name: value for name, value in settings.items() if value is not None}
    for name in COUNTS:
        if name in given and (name, given[name]) != ("max_steps", -1):
            whole = given[name] != 1  # 1.0 is all batches
            check_number(f"trainer.{name}", given[name], minimum=1, whole=whole, remedy="raise it, or leave it out")
    if "max_time" in given:
        refuse("max_time", "leave it out and lower the stages' epochs: one seed gives one result, whatever the clock")
    if given.get("overfit_batches"):
        refuse("overfit_batches", "trainer.limit_train_batches trains on as few")
    if given.get("gradient_clip_val") and "32" not in precision:
        refuse(
            "gradient_clip_val", f"choose trainer.precision=32-true, not {precision}, where fused Adam does not clip"
        )
    if (interval := given.get("val_check_interval")) is not None:
        check_number("trainer.val_check_interval", interval, above=0, remedy="a share of an epoch, as 0.5, is one")
        if interval > 1 and settings.get("check_val_every_n_epoch", 1) is not None:
            refuse("val_check_interval", "give a share of an epoch, as 0.5: stages have their own numbers of batches")


def _strategy(name: str) -> Any:
    if not distributed.is_initialized():  # there is one process
        return "auto"
    if name == SHARDED:
        return ModelParallelStrategy(save_distributed_checkpoint=False)
    return DDPStrategy(broadcast_buffers=False)  # the memory is one, and would be sent to all ranks before every step
