"""Checkpoints of stage 1: what they say of themselves, and how they are loaded."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import Callback

from nvf.attention import SoftAttention
from nvf.errors import InputError
from nvf.modules import StageModule

BEST = "name a run's checkpoints/attention/best.ckpt"


def load_attention(attention: SoftAttention, path: str | Path) -> None:
    """Load weights that a run saved for the same memory; nothing in the file can run code.

    Raises:
        InputError: no such file, a damaged one, another memory, or another shape.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"attention_checkpoint={path} does not exist; {BEST}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        about = checkpoint["nvf"]
        weights = {name.removeprefix("model."): value for name, value in checkpoint["state_dict"].items()}
    except Exception as fault:  # whatever a damaged file makes torch raise
        raise InputError(
            f"attention_checkpoint={path} is truncated or not a checkpoint of NVF ({type(fault).__name__}); {BEST}"
        ) from None
    mine = describe(attention)
    for what, remedy in (
        ("stage", BEST),
        ("memory", "fit stage 1 anew, or run on the data and seed that it was made for"),
        ("settings", "give attention= and its settings the values that it was made with"),
    ):
        if about.get(what) != mine[what]:
            raise InputError(
                f"attention_checkpoint={path} has {what} {about.get(what)}, but this run {mine[what]}; {remedy}"
            )
    attention.load_state_dict(weights)


def describe(attention: SoftAttention) -> dict[str, Any]:
    """What a checkpoint of stage 1 says of itself."""
    return {"stage": "attention", "memory": attention.memory.fingerprint, "settings": attention.settings}


class Describe(Callback):
    """Writes into each checkpoint what it was made for."""

    def __init__(self, stage: str) -> None:
        self.stage = stage

    def on_save_checkpoint(self, trainer: L.Trainer, module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        assert isinstance(module, StageModule)
        checkpoint["nvf"] = {**describe(module.attention), "stage": self.stage}
