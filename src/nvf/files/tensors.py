"""Tensors in safetensors files that may be damaged or made by others: none runs code or takes more room than it has."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# What a damaged file makes us, torch or safetensors raise.
DAMAGE = (
    ValueError,
    TypeError,
    KeyError,
    AttributeError,
    RuntimeError,  # RecursionError is one
    ArithmeticError,
    MemoryError,
    OSError,
    SafetensorError,
)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file as copies, since in the file they are not aligned, which changes rounding.

    Raises:
        ValueError: the file is no regular file.
        SafetensorError: the file is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is no regular file")
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load weights into a model; a model on the meta device, which has no memory yet, keeps copies of them.

    Raises:
        ValueError: the names, shapes or kinds of numbers are not the model's, or a number is not finite.
    """
    mine = model.state_dict()
    if strange := sorted(map(str, mine.keys() ^ weights.keys())):
        raise ValueError(f"{strange[0]} is missing or unknown among the weights")
    for name, own in mine.items():
        given = weights[name]
        if type(given) not in (Tensor, nn.Parameter) or given.layout != torch.strided or given.is_quantized:
            raise ValueError(f"{name} is no plain tensor")
        if given.shape != own.shape or given.dtype.is_floating_point != own.dtype.is_floating_point:
            raise ValueError(f"{name} is {_shown(given)}, but should be {_shown(own)}")
        if given.is_complex() or given.device.type == "meta" or not given.is_contiguous():
            raise ValueError(f"{name} is no plain tensor of numbers")
        if not bool(given.isfinite().all()):
            raise ValueError(f"{name} has NaN or infinite values")
    if any(own.is_meta for own in mine.values()):
        copies = {name: weights[name].detach().to(own.dtype, copy=True) for name, own in mine.items()}
        model.load_state_dict(copies, assign=True)
    else:
        model.load_state_dict(weights)


def _shown(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"
