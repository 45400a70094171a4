"""A fit with the Trainer and the optimizer that a user gives."""

from functools import partial
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.loggers import Logger, TensorBoardLogger

from nvf.data.datamodule import VectorDataModule
from nvf.data.queries import Noisy
from nvf.errors import InputError
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.training.fit import FitSettings, check_trainer, fit
from nvf.training.modules import AttentionModule

QUIET = {"enable_progress_bar": False, "enable_model_summary": False, "log_every_n_steps": 1, "accelerator": "cpu"}


def tensorboard(folder: Path, name: str, before: int, done: int) -> list[Logger]:
    assert before == 0
    return [TensorBoardLogger(folder, name=name, version="", purge_step=done)]


def fitted(folder: Path, trainer: dict[str, Any], **module: Any) -> tuple[tuple[int, dict[str, Any]], AttentionModule]:
    """Two epochs of four steps."""
    memory = VectorMemory.synthetic(rows=30, dim=8, seed=0)
    torch.manual_seed(0)
    fit_it = AttentionModule(SoftAttention(memory, transform="linear"), lr=0.01, schedule="onecycle", **module)
    data = VectorDataModule(Noisy(memory, sigma=0.2), seed=0, batch_size=16, steps_per_epoch=4, val_samples=100)
    settings = FitSettings("attention", 2, trainer=partial(L.Trainer, **{**QUIET, **trainer}), loggers=tensorboard)
    return fit(fit_it, data, settings, folder=folder, name="attention", start_competes=True), fit_it


def test_a_sanity_check_changes_no_bits(tmp_path: Path) -> None:
    how, module = fitted(tmp_path / "run", {"num_sanity_val_steps": 2})
    plain, other = fitted(tmp_path / "plain", {})
    assert how[1]["steps"] == 8
    assert list((tmp_path / "run/attention").glob("events.out.tfevents.*"))
    assert (tmp_path / "run/checkpoints/attention/best.safetensors").is_file()
    assert how == plain
    assert all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in module.state_dict().items())


def test_an_optimizer_of_the_users_own_fits_something_else(tmp_path: Path) -> None:
    modules = [
        fitted(tmp_path / str(number), {}, **given)[1]
        for number, given in enumerate(({}, {"optimizer": torch.optim.SGD}))
    ]
    weights = [module.attention.transform.network.weight for module in modules]
    assert not torch.equal(*weights)


@pytest.mark.parametrize(
    "refused",
    [
        {"precision": "64-true"},
        {"enable_checkpointing": False},
        {"use_distributed_sampler": True},
        {"inference_mode": True},
        {"callbacks": []},
    ],
)
def test_what_cannot_work_is_refused_by_name(refused: dict[str, Any]) -> None:
    with pytest.raises(InputError, match=f"trainer.{next(iter(refused))}="):
        check_trainer(refused)
