"""Fitting one module with Lightning, on one device or several, and keeping the weights that validate best."""

import logging
import zipfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import takewhile
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Callback, EarlyStopping
from lightning.pytorch.loggers import Logger
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from torch import distributed

from nvf.data.datamodule import VectorDataModule
from nvf.errors import InputError, one_line
from nvf.runs.curves import LINES
from nvf.training.callbacks import BEST, LAST, AtomicFiles, KeepBest, LogGradients, SaveLast, StopOnNaN
from nvf.training.checkpoints import WEIGHTS, save_weights
from nvf.training.devices import SHARDED, refusal
from nvf.training.stage import StageModule

log = logging.getLogger("nvf")
REQUEUED = "hpc_ckpt_*.ckpt"  # what Lightning's Slurm plugin saves; last.ckpt holds the same
PRECISIONS = ("32-true", "bf16-mixed", "16-mixed", "32", "bf16", "16")
KEPT: dict[str, Any] = {"mode": "max", "save_on_train_epoch_end": False, "enable_version_counter": False}
OURS = {"enable_checkpointing": True, "use_distributed_sampler": False, "inference_mode": False}  # of the Trainer
RESERVED = (*OURS, "callbacks", "logger", "plugins", "default_root_dir")  # arguments of the Trainer that we give


@dataclass(frozen=True)
class FitSettings:
    """How a stage is fitted."""

    stage: str  # whose settings an error names
    epochs: int  # of training; 0 keeps the untrained start
    patience: int | None = None  # validations without a better one after which training stops; None: never early
    save_every: int | None = None  # steps between two saves of last.ckpt; None: 20 seconds
    trainer: partial[L.Trainer] = field(default_factory=lambda: partial(L.Trainer))  # with the user's arguments
    callbacks: Sequence[Callback] = ()  # of the user
    # Makes the loggers from a run's folder, the fit's name in it, the steps before it, and those that it resumes after.
    loggers: Callable[[Path, str, int, int], Sequence[Logger]] | None = None


def fit(
    module: StageModule, data: VectorDataModule, settings: FitSettings, *, folder: Path, name: str, start_competes: bool
) -> tuple[int, dict[str, Any]]:
    """Fit a module and leave the weights that validate best in it, by the Top-1 or nDCG@10 of `criterion`, frozen.

    Where the untrained start is a search that works (`start_competes`), it is validated too and kept unless training
    equals or beats it; the weights are then of 0 epochs. A fit that left a last.ckpt in the folder resumes from it, and
    ends on the same weights. Checkpoints and curves go into folders of that `name` in the run's `folder`. Returned are
    the epochs that the kept weights were fitted for, and `LogGradients.summary`.
    """
    checkpoints, monitor = folder / "checkpoints" / name, f"val/{data.criterion}"
    start = {part: tensor.clone() for part, tensor in module.state_dict().items()}
    resumed = saved_step(checkpoints / LAST)
    gradients, best = LogGradients(), KeepBest(checkpoints, Path(BEST).stem, monitor, **KEPT)
    last = SaveLast(checkpoints, every=settings.save_every)
    callbacks: list[Callback] = [StopOnNaN(settings.stage), gradients, best]
    if settings.patience is not None:
        callbacks.append(EarlyStopping(monitor, mode="max", patience=settings.patience, strict=False))
    before = steps_of(folder, [*takewhile(lambda stage: stage != settings.stage, LINES)])
    loggers = settings.loggers(folder, name, before, resumed or 0) if settings.loggers else []
    trainer = _trainer(settings, data, last, callbacks, logger=loggers)
    if resumed is None:
        log.info("fitting %s", name)
        if start_competes or settings.epochs == 0:
            last.start_score = trainer.validate(module, data, verbose=False)[0][monitor]
    if settings.epochs:
        _train(settings, trainer, module, data, last, resumed)
    score: Any = best.best_model_score
    unseen = score is None
    if settings.epochs and unseen:  # training ended before its first validation, as trainer.max_steps may have it
        score = trainer.validate(module, data, verbose=False)[0][monitor]
    start_wins = score is None or (last.start_score is not None and last.start_score > score)
    if start_wins:
        module.load_state_dict(start)
        if settings.epochs:
            log.info("%s: no epoch validates better than the untrained start", name)
    if start_wins or unseen:
        trainer.save_checkpoint(checkpoints / BEST)
    checkpoint = torch.load(checkpoints / BEST, map_location="cpu", weights_only=True)
    module.load_state_dict(checkpoint["state_dict"])
    module.requires_grad_(False)
    model = module.model
    if model.memory.shared:
        from nvf.training.sharded import whole  # DTensor takes seconds to import

        model = whole(model)
    if trainer.is_global_zero:
        save_weights(model, checkpoints / WEIGHTS, stage=settings.stage)
    trainer.strategy.barrier()  # so that every process can read the weights
    epochs = trainer.current_epoch if unseen else checkpoint["epoch"] + 1
    return 0 if start_wins else epochs, gradients.summary()


def fit_blindly(
    module: StageModule, data: VectorDataModule, settings: FitSettings, *, folder: Path, name: str, epochs: int
) -> None:
    """Fit a module for the first `epochs` epochs of its schedule without validation; resume from a last.ckpt."""
    last = SaveLast(folder / "checkpoints" / name, every=settings.save_every, epochs=epochs)
    trainer = _trainer(settings, data, last, [StopOnNaN(settings.stage)], logger=[], limit_val_batches=0)
    _train(settings, trainer, module, data, last, saved_step(last.path))
    module.requires_grad_(False)


def _train(
    settings: FitSettings, trainer: L.Trainer, module: StageModule, batches: Any, last: SaveLast, resumed: int | None
) -> None:
    """Train to the end, from the start or from the step at which last.ckpt was saved."""
    if resumed is not None:
        log.info("going on from step %d of %s", resumed, last.path.parent.name)
    last.signals.await_lightning()
    path = None if resumed is None else last.path
    trainer.fit(module.train(), batches, ckpt_path=path, weights_only=True)
    last.signals.answer_late()


def steps_of(folder: Path, stages: Iterable[str] = LINES) -> int:
    """The steps that a run has taken in some stages, which are fitted: in each those of its longest fit."""
    fits = [(folder / "checkpoints" / stage).rglob(LAST) for stage in stages]
    return sum(max(map(_step, paths), default=0) for paths in fits)


def _step(path: Path) -> int:
    return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])


def saved_step(path: Path) -> int | None:
    """The step at which a last.ckpt was saved; None if it does not exist, an InputError if it is damaged."""
    if not path.is_file():
        return None
    try:
        with zipfile.ZipFile(path) as archive:  # torch does not check the checksums in it
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"its {damaged} is not what was saved")
        return _step(path)
    except Exception as fault:  # torch raises many kinds for a damaged file
        raise InputError(f"{path} is damaged ({one_line(fault)}); delete it to fit this stage again") from None


def _trainer(
    settings: FitSettings, data: VectorDataModule, last: SaveLast, callbacks: Sequence[Callback], **ours: Any
) -> L.Trainer:
    """The user's Trainer with what a run needs added to it; the data learn from it where a resumed epoch begins."""
    given, root = settings.trainer.keywords, last.path.parent
    for copy in root.glob(REQUEUED):
        copy.unlink()
    strategy: Any = given.get("strategy", "auto")
    if strategy in ("auto", "ddp", SHARDED) and not distributed.is_initialized():  # there is one process
        strategy = "auto"
    elif strategy == SHARDED:
        strategy = ModelParallelStrategy(save_distributed_checkpoint=False)
    elif strategy in ("auto", "ddp"):
        strategy = DDPStrategy(broadcast_buffers=False)  # else every step would send the memory to all ranks
    ours |= OURS | {
        "max_epochs": settings.epochs,
        "callbacks": [*callbacks, last, *settings.callbacks],
        "plugins": [AtomicFiles()],
        "default_root_dir": root,  # where Lightning's Slurm plugin saves and looks for its checkpoint
        "strategy": strategy,
        "num_sanity_val_steps": given.get("num_sanity_val_steps", 0),
    }
    try:
        trainer = settings.trainer(**ours)
    except (MisconfigurationException, TypeError, ValueError) as fault:
        raise refusal(fault) from None

    def steps_done() -> int:
        """Batches of this epoch that were trained on before the fit was stopped."""
        together = trainer.accumulate_grad_batches
        return trainer.global_step % -(-int(trainer.num_training_batches) // together) * together

    data.steps_done = steps_done
    return trainer


def check_trainer(trainer: Mapping[str, Any]) -> None:
    """Raise an InputError for a precision that is not supported, and for an argument that a run gives itself."""
    if str(trainer.get("precision", "32-true")) not in PRECISIONS:
        why = f"trainer.precision={trainer['precision']} is not supported"
        raise InputError(f"{why}; choose one of {', '.join(PRECISIONS[:3])}")
    for name in RESERVED:
        if name in trainer:
            raise InputError(
                f"trainer.{name}={trainer[name]} is not supported; leave it out, or see callbacks=, logger="
            )
