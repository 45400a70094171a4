"""A cache of one value that is computed from frozen tensors; it is computed again once one of them changes."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


class FrozenCache:
    """Keeps the last value computed from tensors without gradients; torch may change others without a new version."""

    def __init__(self) -> None:
        self._kept: tuple[list[tuple[Tensor, int, torch.device]], Any] = [], None  # one, as threads may share it

    def __call__(self, compute: Callable[[], Any], sources: Sequence[Tensor]) -> Any:
        """Return the value of `compute()`, which must depend on nothing that ever changes but `sources`."""
        if is_transformed() or any(source.requires_grad or source.is_inference() for source in sources):
            return compute()
        before, value = self._kept
        unchanged = len(sources) == len(before) and all(
            new is old and new._version == version and new.device == device
            for new, (old, version, device) in zip(sources, before, strict=True)
        )
        if value is None or not unchanged:
            value, self._kept = None, ([], None)  # large values are not held beside those that replace them
            with torch.inference_mode(False):  # what a search computes serves a training too
                value = compute()
            # The tensors themselves are held, since Python may give the id of a freed one to another.
            self._kept = [(source, source._version, source.device) for source in sources], value
        return value

    def __deepcopy__(self, _: Any) -> "FrozenCache":
        return FrozenCache()  # the copy has tensors of its own


def is_transformed() -> bool:
    """Whether torch.func or a trace is at work, so that a tensor's values cannot be read."""
    return torch._C._are_functorch_transforms_active() or torch.compiler.is_compiling()
