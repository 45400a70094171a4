"""Tensors in files that may have been damaged or made by others: no file runs code, or takes more room than it has."""

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# What a damaged file makes of us, of torch and of safetensors.
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
    """A safetensors file's tensors, copied: there they are not aligned, and products of such ones round otherwise.

    Raises:
        ValueError: it is no regular file.
        SafetensorError: it is damaged.
    """
    if not path.is_file():
        raise ValueError(f"{path.name} is no regular file")
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Give a model these weights; one on the meta device, which took no room, takes copies of them for its own.

    Raises:
        ValueError: other names, shapes or kinds of numbers than the model's, or numbers that are not finite.
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
