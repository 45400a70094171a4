"""Callbacks: norms of gradients, an end on a loss that is no number, and what an exact resume needs."""

import io
import math
import time
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.fabric.plugins.io.torch_io import TorchCheckpointIO
from lightning.pytorch.callbacks import Callback, Checkpoint, ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from torch import Tensor, distributed

from nvf.data.datamodule import VectorDataModule
from nvf.errors import InputError
from nvf.evaluation.gradients import PARTS, norms
from nvf.files.atomic import atomic_write
from nvf.runs.signals import Deferred, stop_when_asked
from nvf.training.devices import largest

LAST, BEST = "last.ckpt", "best.ckpt"
SECONDS = 20.0  # between two saves of last.ckpt, unless their number of steps is given


class LogGradients(Callback):
    """Logs the norms of the gradients on the query and on each part of the model, in the steps that are logged."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor | float]] = []  # the norms in each
        self._queries: Tensor | None = None  # of a step that is logged

    def on_train_batch_start(self, trainer: L.Trainer, module: L.LightningModule, batch: Any, batch_idx: int) -> None:
        logged = (trainer.global_step + 1) % trainer.log_every_n_steps == 0  # type: ignore[attr-defined]
        self._queries = batch.queries.requires_grad_() if logged else None

    def on_before_optimizer_step(
        self, trainer: L.Trainer, module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        if self._queries is None:
            return
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
        """The number of steps; for each part its first, last, smallest and largest finite norm, and two counts.

        `zero` and `not_finite` count the steps in which the norm was so.
        """
        told: dict[str, Any] = {"steps": len(self.steps)}
        for part in PARTS:
            values = [float(step[part]) for step in self.steps if part in step]
            finite = [value for value in values if math.isfinite(value)]
            if not values:
                continue
            first, last = (value if math.isfinite(value) else None for value in (values[0], values[-1]))
            told[part] = {"first": first, "last": last, "smallest": min(finite, default=None)}
            told[part] |= {"largest": max(finite, default=None), "zero": values.count(0.0)}
            told[part]["not_finite"] = len(values) - len(finite)
        return told


class StopOnNaN(Callback):
    """Raises an InputError instead of saving a checkpoint after a step whose loss was NaN or infinite.

    The first such step is noted on the device, which would otherwise wait for the host in every step.

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
        loss = outputs["loss"]
        first = loss.new_full((), -1, dtype=torch.int64) if self._first is None else self._first
        self._first = torch.where((first < 0) & ~loss.isfinite(), trainer.global_step - 1, first)

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        if self._first is None:
            return
        (step,) = largest(trainer.strategy.root_device, int(self._first))
        if step < 0:
            return
        raise InputError(
            f"{self.stage}: the loss is nan or infinite in step {step}; "
            f"{self._cause(trainer, module)}. Checkpoints from before it are in the run's folder"
        )

    def _cause(self, trainer: L.Trainer, module: L.LightningModule) -> str:
        lr, beta = float(module.lr), float(module.attention.beta.detach())  # type: ignore[arg-type,union-attr,operator]
        if "16" in str(trainer.precision):
            return f"half precision most likely overflowed: set trainer.precision=32-true, not {trainer.precision}"
        if math.isinf(beta) or (math.isfinite(beta) and beta > 1e6):
            return f"stage 1's temperature went to 1/{beta:g}: lower {self.stage}.lr, its peak is {lr:g}"
        return f"most likely {self.stage}.lr={lr:g} is too high: try {self.stage}.lr={lr / 10:g}"


class KeepBest(ModelCheckpoint):
    """Keeps the checkpoint that validates best as best.ckpt, and goes on to do so where a run's folder was moved.

    Args:
        folder: for the checkpoint.
        monitor: the logged metric that is highest where validation is best.
    """

    def __init__(self, folder: Path, monitor: str) -> None:
        super().__init__(
            folder,
            Path(BEST).stem,
            monitor,
            mode="max",
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        path = self.format_checkpoint_name({})
        kept = dict.fromkeys([path] if state_dict["best_k_models"] else [], state_dict["best_model_score"])
        paths = {"best_model_path": path, "kth_best_model_path": path} if kept else {}
        super().load_state_dict({**state_dict, "dirpath": self.dirpath, "best_k_models": kept, **paths})


class SaveLast(Checkpoint):
    """Saves in last.ckpt everything from which a fit resumes on the same bits, whatever stopped it.

    It saves between two steps, some 20 seconds after the last time, and at the end of an epoch, after its validation;
    so a fit that is killed loses 20 seconds and at worst a validation. Where a signal asks the run to stop, it saves
    after the step; in a validation, what was saved last stays.

    Args:
        folder: for the checkpoint.
        every: steps between two of them, in place of 20 seconds.
    """

    def __init__(self, folder: Path, *, every: int | None) -> None:
        self.path, self.every = folder / LAST, every
        self.signals = Deferred()
        self.start_score: float | None = None  # what the untrained start validates to, if it competes
        self._stopped = False  # early: no epoch follows
        self._generators: list[dict[str, Tensor]] = []  # states of torch's global generators by device, rank by rank
        self._saved, self._saved_step = time.monotonic(), 0

    def state_dict(self) -> dict[str, Any]:
        states = [_generator_states()]
        if distributed.is_initialized():
            states = [{} for _ in range(distributed.get_world_size())]
            distributed.all_gather_object(states, _generator_states())
        return {"start_score": self.start_score, "stopped": self._stopped, "generators": states}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.start_score, self._stopped = state_dict["start_score"], state_dict["stopped"]
        self._generators = state_dict["generators"]

    def on_train_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        self.signals.install()
        self._saved, self._saved_step = time.monotonic(), trainer.global_step
        trainer.should_stop = self._stopped
        if len(self._generators) == trainer.world_size:
            _set_generator_states(self._generators[trainer.global_rank])

    def on_validation_start(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        if trainer.state.fn == "fit":
            self.signals.install()
        else:
            stop_when_asked()

    def on_train_batch_end(
        self, trainer: L.Trainer, module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        # From a checkpoint before a validation, Lightning would skip that; gradients that are still being accumulated
        # are in none.
        if trainer.is_last_batch or (batch_idx + 1) % trainer.accumulate_grad_batches:
            return
        # Lightning hands a step's metrics to the loggers after this hook: a save in between would lose them.
        interval = trainer.log_every_n_steps  # type: ignore[attr-defined]
        if interval > 1 and trainer.global_step % interval == 0:
            return
        asked, due = largest(trainer.strategy.root_device, self.signals.asked, int(self._due(trainer)))
        if asked or due:
            self._save(trainer)
        if asked:
            self.signals.answer(asked)

    def on_validation_batch_end(self, *_: Any) -> None:
        if self.signals.asked:
            self.signals.answer(self.signals.asked)

    def on_train_epoch_end(self, trainer: L.Trainer, module: L.LightningModule) -> None:
        least = (trainer.min_epochs or 0, trainer.min_steps or 0)
        enough = trainer.current_epoch + 1 >= least[0] and trainer.global_step >= least[1]
        self._stopped = trainer.should_stop and enough
        self._save(trainer)
        (asked,) = largest(trainer.strategy.root_device, self.signals.asked)
        if asked:
            self.signals.answer(asked)

    def _due(self, trainer: L.Trainer) -> bool:
        if self.every is not None:
            return trainer.global_step - self._saved_step >= self.every
        return time.monotonic() - self._saved >= SECONDS

    def _save(self, trainer: L.Trainer) -> None:
        for logger in trainer.loggers:
            if isinstance(logger, TensorBoardLogger):  # what was logged before a checkpoint does not come again
                logger.experiment.flush()
        trainer.save_checkpoint(self.path)
        self._saved, self._saved_step = time.monotonic(), trainer.global_step


class AtomicFiles(TorchCheckpointIO):
    """Writes each checkpoint atomically, so that whatever stops the program, the old one or the new one is on disk."""

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None) -> None:
        buffer = io.BytesIO()
        torch.save(checkpoint, buffer)  # to a file, torch reports a full disk by aborting the program at times
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(path)) as partial:
            partial.write_bytes(buffer.getbuffer())


def _generator_states() -> dict[str, Tensor]:
    states = {"cpu": torch.get_rng_state()}
    if torch.cuda.is_initialized():
        states["cuda"] = torch.cuda.get_rng_state()
    return states


def _set_generator_states(states: dict[str, Tensor]) -> None:
    torch.set_rng_state(states["cpu"])
    if "cuda" in states and torch.cuda.is_initialized():
        torch.cuda.set_rng_state(states["cuda"])
