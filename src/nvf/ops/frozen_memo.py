"""A value that depends on frozen tensors, kept until one of them changes."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

Value = TypeVar("Value")


class Memo:
    """Keeps the last value of a computation from tensors that need no gradient; from others it computes anew.

    Those an optimiser may change without a trace: torch's fused ones leave a tensor's version as it was.
    """

    def __init__(self) -> None:
        self._sources: list[tuple[Tensor, int, torch.device]] = []
        self._value: Any = None

    def __call__(self, compute: Callable[[], Value], sources: Sequence[Tensor]) -> Value:
        """The value of `compute()`, which depends on nothing that ever changes but `sources`."""
        if _fleeting(sources):
            return compute()
        if self._value is None or not self._unchanged(sources):
            self._value = compute()
            # The tensors themselves are held: an id may return once its tensor is gone.
            self._sources = [(source, source._version, source.device) for source in sources]
        value: Value = self._value
        return value

    def _unchanged(self, sources: Sequence[Tensor]) -> bool:
        return len(sources) == len(self._sources) and all(
            new is old and new._version == version and new.device == device
            for new, (old, version, device) in zip(sources, self._sources, strict=True)
        )

    def __deepcopy__(self, _: Any) -> "Memo":
        return Memo()  # the copy has tensors of its own


def is_transformed() -> bool:
    """Whether this is inside a transform of torch.func or a trace: tensors are not there what they are outside."""
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()


def _fleeting(sources: Sequence[Tensor]) -> bool:
    """Whether a value computed here may not be used later, or a kept one not here."""
    return is_transformed() or torch.is_inference_mode_enabled() or any(source.requires_grad for source in sources)
