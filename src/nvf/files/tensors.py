"""Tensors in safetensors files that may be damaged or made by others; reading them never runs code."""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

# The errors that this module, torch and safetensors raise for a damaged file; RecursionError is a RuntimeError.
DAMAGE = (
    *(ValueError, TypeError, KeyError, AttributeError, RuntimeError, ArithmeticError, MemoryError, OSError),
    SafetensorError,
)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Read the tensors of a safetensors file as copies: the file does not align them, which would change rounding."""
    if not path.is_file():
        raise ValueError(f"{path.name} is no regular file")
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def fill(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Load finite weights of the model's names and shapes, or raise a ValueError; a meta model keeps copies of them."""
    mine = model.state_dict()
    if strange := sorted(map(str, mine.keys() ^ weights.keys())):
        raise ValueError(f"{strange[0]} is missing or unknown among the weights")
    for name, own in mine.items():
        given = weights[name]
        kinds = {(dtype.is_floating_point, dtype.is_complex) for dtype in (given.dtype, own.dtype)}
        if given.shape != own.shape or len(kinds) > 1:
            found, expected = (f"{tuple(tensor.shape)} {tensor.dtype}" for tensor in (given, own))
            raise ValueError(f"{name} is {found}, but should be {expected}")
        if not bool(given.isfinite().all()):
            raise ValueError(f"{name} has NaN or infinite values")
    meta = any(own.is_meta for own in mine.values())
    copies = {name: weights[name].detach().to(own.dtype, copy=meta) for name, own in mine.items()}
    model.load_state_dict(copies, assign=meta)
