"""The LightningModules: thin shells around stage 1, around stage 2 behind it, and around both together."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Adam, Optimizer, SparseAdam

from nvf.data.datamodule import CandidateBatch
from nvf.data.queries import QueryBatch
from nvf.errors import InputError, check_number
from nvf.models.attention import SoftAttention
from nvf.models.pipeline import Pipeline
from nvf.models.queries_and_keys import neighbours
from nvf.models.reranker import reranker_loss
from nvf.ops.cross_entropy import mean_of, stratified
from nvf.ops.random_streams import stream
from nvf.ops.ranks import DEEPEST, are_targets, candidate_ranks, gains_of, ndcg, ndcg10
from nvf.ops.topk import TopK, first_topk
from nvf.training.stage import Groups, Judged, StageModule


class AttentionModule(StageModule):
    """Fits stage 1 on `QueryBatch`es by cross-entropy over all rows, or an estimate of it from a sample of them.

    Args:
        k: the number of candidates; validation says whether a target is among them.
        sample: the number of rows from which a step estimates the loss; with None all rows give it exactly.
        hard: how many rows, the nearest to a query's target, are added to the sample.
    """

    def __init__(
        self,
        attention: SoftAttention,
        *,
        k: int = 5,
        sample: int | None = None,
        hard: int = 0,
        **settings: Any,
    ) -> None:
        super().__init__(attention, **settings)
        rows = len(attention.memory)
        if sample is not None:
            check_number("attention.sample", sample, minimum=1, below=rows + 1, whole=True, remedy="null takes all")
        check_number("attention.hard", hard, minimum=0, below=rows, whole=True, remedy="16 is a good start")
        if hard and sample is None:
            raise InputError(f"attention.hard={hard} adds to a sample of the rows; set attention.sample")
        self.k, self.sample, self.hard = k, sample, hard
        self.neighbours: Tensor | None = None  # of each row, (N, h)
        self.sparse = False  # whether the gradient of learned keys is, in training

    def on_train_start(self) -> None:
        if self.hard and self.neighbours is None:
            self.neighbours = neighbours(self.model.keys().detach(), self.hard)

    def on_train_epoch_start(self) -> None:
        super().on_train_epoch_start()
        if self.hard and self.current_epoch and self.model.delta is not None:  # learned keys move
            self.neighbours = neighbours(self.model.keys().detach(), self.hard)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if self.model.delta is not None:  # of frozen keys they are computed again
            checkpoint["neighbours"] = self.neighbours  # as they were when the epoch began

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        if (saved := checkpoint.get("neighbours")) is not None:
            self.neighbours = saved.to(self.model.memory.rows.device)

    def loss(self, batch: QueryBatch) -> Tensor:
        if self.sample is None:
            return self.model.loss(batch.queries, batch.targets, batch.words)
        generator = stream(self.seed, "sample", self.global_step, self.own_rank, device=self.device)
        sample = stratified(len(self.model.memory), self.sample, generator)
        hard = None
        if self.neighbours is not None:
            first = (batch.targets >= 0).int().argmax(dim=-1, keepdim=True)
            hard = self.neighbours[batch.targets.gather(-1, first).squeeze(-1)].long()
        return self.model.sampled_loss(batch.queries, batch.targets, sample=sample, hard=hard, sparse=self.sparse)

    def make_optimizer(self, groups: Groups) -> Optimizer:
        """The optimizer; where that can be, a sampled step changes those learned keys alone that it sees."""
        trainer: Any = self.trainer
        # Torch adds up and clips dense gradients alone, and a GPU would wait for the number of different rows.
        able = trainer.world_size == 1 and not trainer.gradient_clip_val and self.device.type == "cpu"
        self.sparse = (
            able and self.sample is not None and self.model.delta is not None and is_plain_adam(self.optimizer)
        )
        if not self.sparse:
            return super().make_optimizer(groups)
        apart = [parameter for group in groups for parameter in group["params"] if parameter is not self.model.delta]
        dense: Any = self.optimizer([{"params": apart, "lr": self.lr}])
        given = {name: dense.defaults[name] for name in ("betas", "eps")}
        return AdamOfRows(dense, SparseAdam([self.model.delta], lr=self.lr, **given))

    def judge(self, batch: QueryBatch) -> Judged:
        (top,) = self.model.ranked(batch.queries, batch.targets, max(self.k, DEEPEST), batch.words)
        gained = ndcg10(top.rows, batch.targets, batch.gains)
        return Judged(loss_of(top, batch.targets), top.ranks, top.ranks <= self.k, gained)


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


class RerankerModule(StageModule):
    """Fits a pipeline's reranker on `CandidateBatch`es by cross-entropy over the candidates; stage 1 stays frozen.

    `scalar_lr_ratio` is the learning rate of the residual reranker's two scalars over the network's.
    """

    def __init__(self, pipeline: Pipeline, *, scalar_lr_ratio: float, **settings: Any) -> None:
        super().__init__(pipeline, **settings)
        check_number("scalar_lr_ratio", scalar_lr_ratio, above=0, remedy="100 is the default")
        self.model.attention.requires_grad_(False)
        self.scalar_lr_ratio = scalar_lr_ratio

    def loss(self, batch: CandidateBatch) -> Tensor:
        return reranker_loss(self._scores(batch), batch.labels)

    def judge(self, batch: CandidateBatch) -> Judged:
        scores = self._scores(batch)
        gains = gains_of(batch.rows, batch.targets, batch.gains)
        gains = gains.gather(-1, first_topk(scores, self.model.k))[:, :DEEPEST]
        gains = F.pad(gains, (0, DEEPEST - gains.shape[1]))  # below the candidates no reranker moves anything
        ranks = candidate_ranks(scores, batch.labels)
        gained = ndcg(gains, batch.targets, batch.gains)
        return Judged(reranker_loss(scores, batch.labels), ranks, batch.valid, gained)

    def _scores(self, batch: CandidateBatch) -> Tensor:
        return self.model.score(batch.queries, batch.rows, batch.logits, batch.evidence)

    def parameter_groups(self) -> Groups:
        """The reranker's network, and the residual reranker's two scalars with a learning rate of their own."""
        named = list(self.model.reranker.named_parameters())
        scalars = [parameter for name, parameter in named if name == "evidence"]
        network = [parameter for name, parameter in named if name != "evidence"]
        groups: Groups = [{"params": network, "lr": self.lr}, {"params": scalars, "lr": self.lr * self.scalar_lr_ratio}]
        return [group for group in groups if group["params"]]


class JointModule(RerankerModule):
    """Fits both stages of a pipeline on batches of queries, by -log of its distribution at the targets.

    Args:
        relaxation: the temperature of relaxed candidates in the first step and in the last, geometric in between;
            None for the exact distribution. See `distribution.relaxed`.
        attention_weight: of stage 1's own loss, which is added.
    """

    def __init__(
        self,
        pipeline: Pipeline,
        *,
        relaxation: Sequence[float] | None = None,
        attention_weight: float = 0.0,
        **settings: Any,
    ) -> None:
        super().__init__(pipeline, **settings)
        if relaxation is not None and (not isinstance(relaxation, list | tuple) or len(relaxation) != 2):
            raise InputError(f"joint.relaxation={relaxation} is not two temperatures; [1, 0.1] anneals")
        for temperature in relaxation or ():
            check_number("joint.relaxation", temperature, above=0, remedy="[1, 0.1] anneals, null is exact")
        check_number("joint.attention_weight", attention_weight, minimum=0, remedy="0 leaves stage 1's loss out")
        self.relaxation, self.attention_weight = relaxation, attention_weight
        self.steps = 1  # of the whole training, known when it starts
        self.model.requires_grad_(True)

    @property
    def temperature(self) -> float | None:
        """The temperature at which candidates are relaxed in this step; None outside training."""
        if self.relaxation is None or not self.training:
            return None
        first, last = self.relaxation
        return first * (last / first) ** (self.global_step / max(1, self.steps - 1))

    def on_train_start(self) -> None:
        self.steps = int(self.trainer.estimated_stepping_batches)

    def loss(self, batch: QueryBatch) -> Tensor:  # type: ignore[override]
        how = {"logged_as": batch.logged_as, "relaxation": self.temperature}
        ours, attention = self.model.loss(batch.queries, batch.targets, batch.words, **how)
        return ours + self.attention_weight * attention

    def judge(self, batch: QueryBatch) -> Judged:  # type: ignore[override]
        first, top = self.model.ranked(*batch[:2], DEEPEST, batch.words, logged_as=batch.logged_as)
        ours, attention = (loss_of(of, batch.targets) for of in (top, first))
        covered = are_targets(first.rows[:, : self.model.k], batch.targets).any(dim=-1)
        gained = ndcg10(top.rows, batch.targets, batch.gains)
        return Judged(ours + self.attention_weight * attention, top.ranks, covered, gained)

    def parameter_groups(self) -> Groups:
        return [{"params": list(self.attention.parameters()), "lr": self.lr}, *super().parameter_groups()]


def loss_of(top: TopK, targets: Tensor) -> Tensor:
    """The loss that `attention_loss` is of all scores, from their log-sum-exp and the targets' scores."""
    return (top.logsumexp - mean_of(top.of_targets, targets >= 0)).mean()
