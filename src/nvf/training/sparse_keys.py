"""Adam for learned keys of which a step sees few rows: it changes these alone, and costs what they cost."""

from typing import Any

import torch
from torch.optim import Adam, Optimizer, SparseAdam


class AdamOfRows(Optimizer):
    """Adam whose last groups are of parameters with sparse gradients, (S, D), of which it steps the rows of the batch.

    A row's moments stay as they are in the steps that do not see it, as in torch.optim.SparseAdam, which does this
    part; `dense` is the Adam of the others.
    """

    def __init__(self, dense: Adam, sparse: SparseAdam) -> None:
        self.parts: tuple[Optimizer, ...] = (dense, sparse)
        super().__init__([*dense.param_groups, *sparse.param_groups], dense.defaults)
        self._share()

    def step(self, closure: Any = None) -> Any:
        """Evaluate the closure, if any, and make one step of all groups."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for part in self.parts:
            part.step()
        return loss

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict(state_dict)
        self._share()

    def _share(self) -> None:
        """Let the parts see the groups and the state that are saved, loaded and scheduled."""
        dense, sparse = self.parts
        count = len(dense.param_groups)
        dense.param_groups, sparse.param_groups = self.param_groups[:count], self.param_groups[count:]
        dense.state = sparse.state = self.state


def is_plain_adam(optimizer: Any) -> bool:
    """Tell whether an optimizer is torch's Adam with no more settings than SparseAdam has, which can then stand in."""
    return getattr(optimizer, "func", None) is Adam and optimizer.keywords.keys() <= {"fused", "betas", "eps"}
