"""What watches a fit: progress, curves, norms of gradients, a stop at a loss of NaN, checkpoints to resume from."""

import io
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint, ProgressBar
from lightning.pytorch.loggers import TensorBoardLogger
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor, distributed
from tqdm import tqdm

from nvf.errors import InputError
from nvf.evaluation.gradients import PARTS, norms
from nvf.files.atomic import atomic_write
from nvf.runs.curves import CHART, FOLDER, LINES
from nvf.runs.signals import Deferred, stop_when_asked
from nvf.training.devices import largest

LAST, BEST = "last.ckpt", "best.ckpt"
SECONDS = 20.0  # between two saves of last.ckpt, unless their number of steps is given


class StageBar(ProgressBar):
    """Shows in one line how far a fit has come, which is gone when the fit ends; in a file or a pipe it is silent."""

    def __init__(self) -> None:
        super().__init__()
        self._silent: bool | None = None  # None: where stderr is no terminal
        self._bar = tqdm(disable=True)

    def disable(self) -> None:
        self._silent = True

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        steps, name = trainer.estimated_stepping_batches, trainer.default_root_dir.rpartition("checkpoints/")[2]
        line = "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} steps, {remaining} left{postfix}"
        how: Any = {"total": None if math.isinf(steps) else int(steps), "initial": trainer.global_step}
        self._bar = tqdm(desc=name, bar_format=line, leave=False, disable=self._silent, **how)

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        self._bar.update(trainer.global_step - self._bar.n)

    def on_validation_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self._bar.set_postfix_str(f"val Top-1 {100 * float(trainer.callback_metrics['val/top1']):.1f}")

    def on_train_end(self, *_: Any) -> None:
        self._bar.close()

    def on_exception(self, *_: Any) -> None:
        self._bar.close()


class Curves(TensorBoardLogger):
    """A `TensorBoardLogger` of a fit before which a run took `first` steps, with the validation's Top-1 as CHART.

    It is given the run's folder and the fit's name. The number of the epoch, which Lightning adds to every metric, is
    left out, and so is what an interrupted process logged from `purge_step` of this fit on; all of it for 0.
    """

    def __init__(self, save_dir: str, name: str, *, first: int = 0, purge_step: int = 0, **settings: Any) -> None:
        stage, _, variant = name.partition("/")
        root = str(Path(save_dir, FOLDER, LINES[stage]))
        super().__init__(root, name=variant, purge_step=first + purge_step if purge_step else None, **settings)
        self.first = first
        if not purge_step and getattr(rank_zero_only, "rank", 0) == 0:
            for left in Path(self.log_dir).glob("events.out.tfevents.*"):
                left.unlink()  # not purged: TensorBoard may read the files of one second in any order

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        shown = {CHART if tag == "val/top1" else tag: value for tag, value in metrics.items() if tag != "epoch"}
        super().log_metrics(shown, self.first + (step or 0))


class LogGradients(Callback):
    """Logs the norms of the gradients on the query and on each part of the model, in the steps that are logged."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor | float]] = []  # the norms in each
        self._queries: Tensor | None = None  # of a step that is logged

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, *_: Any) -> None:
        logged = (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        self._queries = batch.queries.requires_grad_() if logged else None

    def on_before_optimizer_step(self, trainer: L.Trainer, module: L.LightningModule, *_: Any) -> None:
        if self._queries is not None:
            parameters = [(name, parameter.grad) for name, parameter in module.named_parameters()]
            measured = norms([("query", self._queries.grad), *parameters])
            self.steps.append({**measured})
            module.log_dict({f"gradients/{part}": norm for part, norm in measured.items()})

    def state_dict(self) -> dict[str, Any]:
        self.steps = [{part: float(norm) for part, norm in step.items()} for step in self.steps]
        return {"steps": self.steps}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.steps = state_dict["steps"]

    def summary(self) -> dict[str, Any]:
        """The number of steps, and for each part its first, last, smallest and largest finite norm.

        `zero` and `not_finite` count the steps in which the norm of the part was so.
        """
        found: dict[str, Any] = {"steps": len(self.steps)}
        for part in PARTS:
            values = [float(step[part]) for step in self.steps if part in step]
            finite = [value for value in values if math.isfinite(value)]
            if values:
                first, last = (value if math.isfinite(value) else None for value in (values[0], values[-1]))
                found[part] = {"first": first, "last": last}
                found[part] |= {"smallest": min(finite, default=None), "largest": max(finite, default=None)}
                found[part] |= {"zero": values.count(0.0), "not_finite": len(values) - len(finite)}
        return found


class StopOnNaN(Callback):
    """Raises an InputError instead of saving a checkpoint after a step whose loss was NaN or infinite.

    The first such step is noted on the device, so that no step waits for the host.
    """

    def __init__(self, stage: str) -> None:
        self.stage = stage  # whose settings the remedy names
        self._first: Tensor | None = None  # step with such a loss, -1 for none, on the device

    def on_train_batch_end(self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, *_: Any) -> None:
        loss = outputs["loss"]
        first = loss.new_full((), -1, dtype=torch.int64) if self._first is None else self._first
        self._first = torch.where((first < 0) & ~loss.isfinite(), trainer.global_step - 1, first)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        (step,) = largest(trainer.strategy.root_device, -1 if self._first is None else int(self._first))
        if step >= 0:
            remedy = f"lower {self.stage}.lr={module.lr}, or set trainer.precision=32-true"
            raise InputError(f"{self.stage}: the loss is nan or infinite in step {step}; {remedy}")


class KeepBest(ModelCheckpoint):
    """A `ModelCheckpoint` that keeps its best checkpoint when a fit resumes after the run's folder was moved."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        path = self.format_checkpoint_name({})
        kept = dict.fromkeys([path] if state_dict["best_k_models"] else [], state_dict["best_model_score"])
        paths = {"best_model_path": path, "kth_best_model_path": path} if kept else {}
        super().load_state_dict({**state_dict, "dirpath": self.dirpath, "best_k_models": kept, **paths})


class SaveLast(Checkpoint):
    """Saves in last.ckpt everything from which a fit resumes on the same bits, whatever stopped it.

    It saves between two steps, some 20 seconds or `every` steps after the last time, and at the end of an epoch, after
    its validation. When a signal asks the run to stop, it saves after the step and stops; in a validation it stops at
    once, without saving. If `epochs` is given, the fit ends early, after so many.
    """

    def __init__(self, folder: Path, *, every: int | None, epochs: int | None = None) -> None:
        self.path, self.every, self.epochs = folder / LAST, every, epochs
        self.signals = Deferred()
        self.start_score: float | None = None  # what the untrained start validates to, if it competes
        self._stopped = False  # early: no epoch follows
        self._generators: list[dict[str, Tensor]] = []  # states of torch's global generators by device, rank by rank

    def state_dict(self) -> dict[str, Any]:
        mine = {"cpu": torch.get_rng_state()}
        if torch.cuda.is_initialized():
            mine["cuda"] = torch.cuda.get_rng_state()
        states: list[Any] = [mine]
        if distributed.is_initialized():
            states = [None] * distributed.get_world_size()
            distributed.all_gather_object(states, mine)
        return {"start_score": self.start_score, "stopped": self._stopped, "generators": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start_score, self._stopped = state_dict["start_score"], state_dict["stopped"]
        self._generators = state_dict["generators"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.signals.install()
        self._saved, self._saved_step = time.monotonic(), trainer.global_step
        trainer.should_stop = self._stopped
        if len(self._generators) == trainer.world_size:
            states = self._generators[trainer.global_rank]
            torch.set_rng_state(states["cpu"])
            if "cuda" in states and torch.cuda.is_initialized():
                torch.cuda.set_rng_state(states["cuda"])

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.signals.install()
        else:
            stop_when_asked()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # Lightning skips the validation when it resumes from a checkpoint taken between an epoch's last step and that.
        # Gradients that are still being accumulated are in no checkpoint.
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        # Lightning hands a step's metrics to the loggers after this hook: a save in between would lose them.
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval > 1 and trainer.global_step % interval == 0:
            return
        if self.every is None:
            due = time.monotonic() - self._saved >= SECONDS
        else:
            due = trainer.global_step - self._saved_step >= self.every
        asked, due_anywhere = largest(trainer.strategy.root_device, self.signals.asked, int(due))
        if asked or due_anywhere:
            self._save(trainer, asked)

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.signals.asked:
            self.signals.answer(self.signals.asked)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        done = trainer.current_epoch + 1
        trainer.should_stop |= done == self.epochs
        enough = done >= (trainer.min_epochs or 0) and trainer.global_step >= (trainer.min_steps or 0)
        self._stopped = trainer.should_stop and enough
        (asked,) = largest(trainer.strategy.root_device, self.signals.asked)
        self._save(trainer, asked)

    def _save(self, trainer: L.Trainer, asked: int) -> None:
        """Save last.ckpt, then answer the signal `asked`, if there is one."""
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):  # what was logged before a checkpoint is not logged again
                logger.experiment.flush()
        trainer.save_checkpoint(self.path)
        self._saved, self._saved_step = time.monotonic(), trainer.global_step
        if asked:
            self.signals.answer(asked)


class AtomicFiles(TorchCheckpointIO):
    """Writes each checkpoint atomically, so that whatever stops the program, the old one or the new one is on disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)  # on a full disk, torch can abort the program when it writes to a file itself
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(path)) as partial:
            partial.write_bytes(buffer.getbuffer())
