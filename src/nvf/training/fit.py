"""Fitting one module with Lightning, on one device or several, and keeping the weights that validate best."""

import logging
import zipfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping, ProgressBar, TQDMProgressBar
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed

from nvf.data.datamodule import VectorDataModule
from nvf.errors import InputError, check_number, fitting_in_memory, one_line
from nvf.training.callbacks import BEST, LAST, AtomicFiles, KeepBest, LogGradients, SaveLast, StopOnNaN
from nvf.training.checkpoints import WEIGHTS, save_weights
from nvf.training.devices import SHARDED, refusal
from nvf.training.modules import AttentionModule
from nvf.training.stage import StageModule

log = logging.getLogger("nvf")
REQUEUED = "hpc_ckpt_*.ckpt"  # what Lightning's Slurm plugin saves; last.ckpt holds the same
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16")
COUNTS = (
    *("max_epochs", "max_steps", "log_every_n_steps", "accumulate_grad_batches", "check_val_every_n_epoch"),
    *("limit_train_batches", "limit_val_batches"),  # a share of a small stage's may be none
)
USELESS = {  # arguments of the Trainer with which no fit ends well, and what to do instead
    "barebones": "leave it out: a run keeps its best weights and its curves",
    "max_time": "leave it out and lower the stages' epochs: one seed gives one result, whatever the clock",
    "overfit_batches": "trainer.limit_train_batches trains on as few",
    "inference_mode": "leave it out: metrics that the start's validation leaves behind are used in the fit",
    "use_distributed_sampler": "leave it out: batches are dealt to the devices already",
    "reload_dataloaders_every_n_epochs": "leave it out: every epoch has batches of its own already",
}


def tensorboard(folder: Path, name: str, step: int) -> Sequence[Logger]:
    """The logger of a fit that begins at a step: what an earlier process logged from there on is not shown."""
    return [TensorBoardLogger(folder, name=name, version="", default_hp_metric=False, purge_step=step)]


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
        loggers: makes the loggers from a run's folder, the fit's name in it, and the step at which it begins.
        remedies: what to do where memory runs out.
    """

    stage: str
    epochs: int
    patience: int | None = None
    save_every: int | None = None
    trainer: partial[L.Trainer] = field(default_factory=lambda: partial(L.Trainer))
    callbacks: Sequence[Callback] = ()
    loggers: Callable[[Path, str, int], Sequence[Logger]] = tensorboard
    remedies: Sequence[str] = ()


class Fitted(NamedTuple):
    """How a fit went."""

    epochs: int  # that the kept weights were fitted for
    gradients: dict[str, Any]  # what `LogGradients.summary` says


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
    the weights are then of 0 epochs. So they are if the stage's `epochs` are 0. A fit that left a last.ckpt in the
    folder resumes from it, to the same end.

    Args:
        folder: of the run.
        name: of the folders for checkpoints and curves in it.
    """
    checkpoints, monitor = folder / "checkpoints" / name, f"val/{data.criterion}"
    start = {part: tensor.clone() for part, tensor in module.state_dict().items()}
    resumed = saved_step(checkpoints / LAST)
    gradients, best = LogGradients(), KeepBest(checkpoints, monitor)
    last = SaveLast(checkpoints, every=settings.save_every)
    callbacks: list[Callback] = [StopOnNaN(settings.stage, data), gradients, best, last]
    if settings.patience is not None:
        callbacks.append(EarlyStopping(monitor, mode="max", patience=settings.patience, strict=False))
    trainer = _trainer(settings, checkpoints, callbacks, logger=settings.loggers(folder, name, resumed or 0))
    fitted, batches = _as_the_trainer_wants(trainer, module, data)
    if resumed is None:
        log.info("fitting %s", name)
        if start_competes or settings.epochs == 0:
            last.start_score = trainer.validate(fitted, batches, verbose=False)[0][monitor]
    if settings.epochs:
        _train(settings, trainer, fitted, batches, data, last, resumed)
    score: Any = best.best_model_score
    unseen = score is None
    if settings.epochs and unseen:  # training ended before its first validation, as trainer.max_steps may have it
        score = trainer.validate(fitted, batches, verbose=False)[0][monitor]
    start_wins = score is None or (last.start_score is not None and last.start_score > score)
    if start_wins:
        fitted.load_state_dict(start)
        if settings.epochs:
            told = (name, monitor, 100 * (last.start_score or 0))
            log.info("%s: no epoch validates better than the untrained start (%s %.1f)", *told)
    if start_wins or unseen:
        trainer.save_checkpoint(checkpoints / BEST)
    checkpoint = torch.load(checkpoints / BEST, map_location="cpu", weights_only=True)
    module.load_state_dict(checkpoint["state_dict"])
    module.requires_grad_(False)
    if trainer.is_global_zero:
        save_weights(module.model, checkpoints / WEIGHTS, stage=settings.stage)
    trainer.strategy.barrier()  # now every process can read them
    epochs = trainer.current_epoch if unseen else checkpoint["epoch"] + 1
    return Fitted(0 if start_wins else epochs, gradients.summary())


def fit_blindly(
    module: StageModule, data: VectorDataModule, settings: FitSettings, *, folder: Path, name: str, epochs: int
) -> None:
    """Fit a module for the first `epochs` epochs of the stage's schedule, and freeze it; nothing else happens.

    It resumes from a last.ckpt as `fit` does.
    """
    checkpoints = folder / "checkpoints" / name
    last = SaveLast(checkpoints, every=settings.save_every)
    callbacks = [StopOnNaN(settings.stage, data), _StopAfter(epochs), last]
    trainer = _trainer(settings, checkpoints, callbacks, logger=[], limit_val_batches=0)
    _train(settings, trainer, module, data, data, last, saved_step(checkpoints / LAST))
    module.requires_grad_(False)


def _train(
    settings: FitSettings,
    trainer: L.Trainer,
    module: StageModule,
    batches: L.LightningDataModule,
    data: VectorDataModule,
    last: SaveLast,
    resumed: int | None,
) -> None:
    """Train to the end, from the start or from the step at which last.ckpt was saved."""

    def steps_done() -> int:
        """Batches of this epoch that were trained on before the fit was stopped."""
        together = trainer.accumulate_grad_batches
        return trainer.global_step % -(-int(trainer.num_training_batches) // together) * together

    data.steps_done = steps_done
    if resumed is not None:
        log.info("going on from step %d of %s", resumed, last.path.parent.name)
    last.signals.await_lightning()
    with fitting_in_memory(settings.stage, settings.remedies):
        path = None if resumed is None else last.path
        trainer.fit(module.train(), batches, ckpt_path=path, weights_only=True)
    last.signals.answer_late()


class _StopAfter(Callback):
    def __init__(self, epochs: int) -> None:
        self.epochs = epochs

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def saved_step(path: Path) -> int | None:
    """The step at which a last.ckpt was saved; None if it does not exist.

    Raises:
        InputError: it is damaged.
    """
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not check the checksums in it
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"its {damaged} is not what was saved")
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except Exception as fault:  # whatever a damaged file makes torch raise
        raise InputError(
            f"{path} is damaged ({one_line(fault)}); delete it, and the run goes on from before it"
        ) from None


def _as_the_trainer_wants(
    trainer: L.Trainer, module: StageModule, data: VectorDataModule
) -> tuple[StageModule, L.LightningDataModule]:
    """The module and its batches, or their sharded counterparts."""
    if not isinstance(trainer.strategy, ModelParallelStrategy):
        return module, data
    from nvf.training.sharded import SameBatches, ShardedAttentionModule  # DTensor takes seconds to import

    assert isinstance(module, AttentionModule)
    return ShardedAttentionModule(module.model, optimizer=module.optimizer, **module.hparams), SameBatches(data)


def _trainer(
    settings: FitSettings, checkpoints: Path, callbacks: list[Callback], *, logger: Sequence[Logger], **ours: Any
) -> L.Trainer:
    """The user's Trainer with what a run needs added to it."""
    given = settings.trainer.keywords
    callbacks = [*callbacks, *settings.callbacks, *_listed(given.get("callbacks"))]
    if given.get("enable_progress_bar", True) and not any(isinstance(one, ProgressBar) for one in callbacks):
        callbacks.append(TQDMProgressBar(refresh_rate=50))
    theirs = given.get("logger")
    loggers = [] if theirs is False or not logger else [*logger, *(_listed(theirs) if theirs is not True else [])]
    root = checkpoints if given.get("default_root_dir") is None else Path(given["default_root_dir"], checkpoints.name)
    for copy in root.glob(REQUEUED):
        copy.unlink()
    strategy = given.get("strategy", "auto")
    ours |= {
        "max_epochs": given.get("max_epochs") or settings.epochs,
        "callbacks": callbacks,
        "plugins": [AtomicFiles(), *_listed(given.get("plugins"))],
        "logger": loggers,
        "default_root_dir": root,  # where Lightning's Slurm plugin saves, and finds what it saved
        "strategy": _strategy(strategy) if strategy in ("auto", "ddp", SHARDED) else strategy,
        "use_distributed_sampler": False,  # the datamodule deals the batches to the ranks
        "num_sanity_val_steps": given.get("num_sanity_val_steps", 0),
        "inference_mode": False,
    }
    try:
        return settings.trainer(**ours)
    except (MisconfigurationException, TypeError, ValueError) as fault:
        raise refusal(fault) from None


def _listed(given: Any) -> list[Any]:
    return [] if given is None else list(given) if isinstance(given, list | tuple) else [given]


def _strategy(name: str) -> Any:
    if not distributed.is_initialized():  # there is one process
        return "auto"
    if name == SHARDED:
        return ModelParallelStrategy(save_distributed_checkpoint=False)
    return DDPStrategy(broadcast_buffers=False)  # the memory is one, and would be sent to all ranks before every step


def check_trainer(settings: Mapping[str, Any]) -> None:
    """Refuse those of the Trainer's arguments with which a fit cannot end well, before any begins.

    Raises:
        InputError: one of them, by name.
    """

    def refuse(name: str, remedy: str) -> NoReturn:
        raise InputError(f"trainer.{name}={settings[name]} is of no use here; {remedy}")

    precision = str(settings.get("precision", "32-true"))
    if precision not in PRECISIONS:
        refuse("precision", f"choose one of {', '.join(PRECISIONS[:3])}: memory and queries are float32 in every fit")
    given = {name: value for name, value in settings.items() if value is not None}
    for name, remedy in USELESS.items():
        if given.get(name):
            refuse(name, remedy)
    if given.get("enable_checkpointing") is False:
        refuse("enable_checkpointing", "leave it out: a run keeps its best weights and resumes from its last ones")
    for name in COUNTS:
        if name in given and (name, given[name]) != ("max_steps", -1):
            whole = given[name] != 1  # 1.0 is all batches
            check_number(f"trainer.{name}", given[name], minimum=1, whole=whole, remedy="raise it, or leave it out")
    if given.get("gradient_clip_val") and "32" not in precision:
        refuse(
            "gradient_clip_val", f"choose trainer.precision=32-true, not {precision}, where fused Adam does not clip"
        )
    if (interval := given.get("val_check_interval")) is not None:
        check_number("trainer.val_check_interval", interval, above=0, remedy="a share of an epoch, as 0.5, is one")
        if interval > 1 and settings.get("check_val_every_n_epoch", 1) is not None:
            refuse("val_check_interval", "give a share of an epoch, as 0.5: stages have their own numbers of batches")
