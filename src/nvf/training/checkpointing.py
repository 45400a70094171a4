"""Saves a fit as it goes, so that it can go on from any moment as if nothing had happened."""

import io
import os
import time
from pathlib import Path
from typing import Any, NamedTuple

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Checkpoint
from torch import Tensor, distributed

from nvf.errors import InputError, one_line
from nvf.files.atomic import written_whole
from nvf.files.tensors import read_archive
from nvf.runs.signals import Deferred, stop_when_asked
from nvf.training.devices import largest

LAST, BEST = "last.ckpt", "best.ckpt"
SECONDS = 20.0  # between two checkpoints, unless their number of steps is given
EVENTS = "events.out.tfevents.*"
REQUEUED = "hpc_ckpt_*.ckpt"  # what Lightning's Slurm plugin saves; the last checkpoint holds the same


class Progress(NamedTuple):
    """What a checkpoint says of its fit beside what Lightning keeps there."""

    best: float | None  # of validation so far, by what chooses
    start: float | None  # that of the untrained start, if it competes
    stopped: bool  # early: no epoch follows
    curves: dict[str, int]  # bytes of the event files
    generators: list[dict[str, Tensor]]  # states of torch's global generators by device, rank by rank


class SaveAsItGoes(Checkpoint):
    """Keeps the weights that validate best in best.ckpt, and in last.ckpt the whole state of the fit.

    That is saved between two steps, some 20 seconds after the last time, and at the end of an epoch, after its
    validation; so a fit that is killed loses 20 seconds and at worst a validation. Where a signal asks the run to stop,
    it is saved after the step, or in a validation stays as it was saved last.

    Args:
        folder: for the checkpoints.
        every: steps between two of them, in place of 20 seconds.
        monitor: the logged metric that is highest where validation is best.
    """

    def __init__(self, folder: Path, *, every: int | None, monitor: str = "val/top1") -> None:
        self.folder, self.every, self.monitor = folder, every, monitor
        self.signals = Deferred()
        self.progress = Progress(None, None, False, {}, [])
        self._saved = time.monotonic()

    def on_load_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.progress = Progress(**checkpoint["progress"])

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        curves = {}
        if trainer.is_global_zero and trainer.logger is not None:
            trainer.logger.experiment.flush()  # type: ignore[attr-defined]
            curves = {path.name: path.stat().st_size for path in Path(trainer.logger.log_dir or "").glob(EVENTS)}
        states = [_generator_states(module.device)]
        if distributed.is_initialized():
            states = [{} for _ in range(trainer.world_size)]
            distributed.all_gather_object(states, _generator_states(module.device))
        self.progress = self.progress._replace(curves=curves, generators=states)
        checkpoint["progress"] = self.progress._asdict()

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.signals.install()
        self._saved = time.monotonic()
        if len(self.progress.generators) == trainer.world_size:
            _set_generator_states(self.progress.generators[trainer.global_rank], module.device)

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.signals.install()
        else:
            stop_when_asked()

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        progress = trainer.fit_loop.epoch_loop.batch_progress
        # From a checkpoint before a validation, Lightning would not go on with that; gradients that are still being
        # accumulated are in none.
        if progress.is_last_batch or progress.current.ready % trainer.accumulate_grad_batches:
            return
        asked, due = largest(trainer.strategy.root_device, self.signals.asked, int(self._due(trainer)))
        if asked or due:
            self._save(trainer, LAST)
        if asked:
            self.signals.answer(asked)

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.signals.asked:
            self.signals.answer(self.signals.asked)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn != "fit":
            return
        score = float(trainer.callback_metrics[self.monitor])
        if self.progress.best is None or score > self.progress.best:
            self.progress = self.progress._replace(best=score)
            self._save(trainer, BEST)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        enough = trainer.current_epoch + 1 >= (trainer.min_epochs or 0) and trainer.global_step >= (
            trainer.min_steps or 0
        )
        self.progress = self.progress._replace(stopped=trainer.should_stop and enough)
        self._save(trainer, LAST)
        (asked,) = largest(trainer.strategy.root_device, self.signals.asked)
        if asked:
            self.signals.answer(asked)

    def _due(self, trainer: L.Trainer) -> bool:
        if self.every is not None:
            return trainer.global_step % self.every == 0
        return time.monotonic() - self._saved >= SECONDS

    def _save(self, trainer: L.Trainer, name: str) -> None:
        save_whole(trainer, self.folder / name)
        if name == LAST:
            self._saved = time.monotonic()


class PlainFiles(TorchCheckpointIO):
    """Writes a checkpoint where it is told to: Lightning's own way is a temporary file elsewhere, and a copy of it."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)  # to a file, torch reports a full disk by aborting the program at times
        Path(path).write_bytes(buffer.getbuffer())


def save_whole(trainer: L.Trainer, path: Path) -> None:
    """Save the trainer's state, whole or not at all; every process of the run calls it."""
    if not trainer.is_global_zero:
        trainer.save_checkpoint(path)  # only the first one writes
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_whole(path) as partial:
        trainer.save_checkpoint(partial)


def saved_progress(folder: Path) -> tuple[dict[str, Any], Progress] | None:
    """The last checkpoint of a fit, and what it says of it; None if there is none.

    Raises:
        InputError: it is damaged.
    """
    path = folder / LAST
    for copy in folder.glob(REQUEUED):
        copy.unlink()
    if not path.is_file():
        return None
    try:
        checkpoint = read_archive(path)
        return checkpoint, Progress(**checkpoint["progress"])
    except Exception as fault:  # whatever a damaged file makes torch raise
        raise InputError(
            f"{path} is damaged ({one_line(fault)}); delete it, and the run goes on from before it"
        ) from None


def rewind(folder: Path, curves: dict[str, int]) -> None:
    """Take a stage's event files back to the sizes that they had in a checkpoint, for the steps after it come again."""
    for path in folder.glob(EVENTS):
        size = curves.get(path.name)
        if size is None:
            path.unlink()
        elif size < path.stat().st_size:
            os.truncate(path, size)


def _generator_states(device: torch.device) -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if device.type != "cpu":
        states[device.type] = torch.get_device_module(device).get_rng_state(device)
    return states


def _set_generator_states(states: dict[str, Tensor], device: torch.device) -> None:
    torch.set_rng_state(states["cpu"])
    if device.type in states and device.type != "cpu":
        torch.get_device_module(device).set_rng_state(states[device.type], device)
