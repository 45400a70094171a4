"""Batches of queries, or of candidates once the datamodule is given a stage 1."""

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from nvf.data.queries import QueryBatch, Recorded, Source, blocks, each
from nvf.errors import InputError, check_number
from nvf.models.attention import SoftAttention
from nvf.models.evidence import Evidence, evenly
from nvf.ops.random_streams import stream, stream_seed
from nvf.ops.ranks import are_targets, criterion

EVAL_BATCH = 1024


class CandidateBatch(NamedTuple):
    """Queries with the k candidates of a frozen stage 1."""

    queries: Tensor  # (B, D)
    rows: Tensor  # (B, k) int64, best first
    logits: Tensor  # (B, k)
    labels: Tensor  # (B, k) bool, true where the candidate is a target
    valid: Tensor  # (B,) bool, true where any candidate is
    evidence: Tensor  # (B, k, F); F = 0 for a reranker that weighs none
    targets: Tensor  # (B, m) int64 rows of the memory, padded with -1
    gains: Tensor | None  # (B, m), as in `QueryBatch`


class Fold(NamedTuple):
    """A stage 1 that has not seen some of the training queries."""

    attention: SoftAttention
    unseen: Tensor  # (u,) places of those in the training split


class VectorDataModule(L.LightningDataModule):
    """Training, validation and test batches over one source of queries.

    Without `attention` the loaders yield `QueryBatch`, with it `CandidateBatch`. The training batch of step s of epoch
    e on rank r is a function of (seed, stage, e, s, r) alone, so a resumed run sees what an uninterrupted one would
    have seen. Generated queries are fresh in every step, unless `train_samples` fixes a finite set; finite sets are
    shuffled anew in every pass. The candidates of fixed queries are computed once; a finite training set of candidates
    holds the valid samples alone.

    Args:
        stage: what the batches train, which names their stream; if None, `attention`, or `reranker` where it is given.
        seed, eval_seed: of the training stream, and of the fixed splits.
        batch_size: training queries a step and rank.
        steps_per_epoch: steps between two validations; None is one pass over a finite training set.
        attention: a trained stage 1, used without gradients, which chooses k candidates a query.
        evidence: what the reranker weighs; gathered from the training split.
        taught_by: how many recorded training queries, evenly spaced, have candidates; None is all.
        folds: stages 1 that choose the candidates of the training queries that they have not seen, all of them
            together. A stage 1 ranks the targets of its own training queries too well to teach a reranker.
        train_samples, val_samples, test_samples: sizes of a generated source's fixed sets.
    """

    def __init__(
        self,
        source: Source,
        *,
        stage: str | None = None,
        seed: int,
        batch_size: int,
        steps_per_epoch: int | None = None,
        attention: SoftAttention | None = None,
        evidence: Evidence | None = None,
        taught_by: int | None = None,
        folds: Sequence[Fold] = (),
        k: int = 5,
        train_samples: int | None = None,
        val_samples: int = 10_000,
        test_samples: int = 10_000,
        eval_seed: int = 0,
    ) -> None:
        super().__init__()
        sizes = {"batch_size": batch_size, "val_samples": val_samples, "test_samples": test_samples}
        optional = {"steps_per_epoch": steps_per_epoch, "train_samples": train_samples}
        for name, size in (sizes | optional).items():
            if size is not None or name in sizes:
                check_number(name, size, minimum=1, whole=True, remedy="raise it")
        for number in (seed, eval_seed):
            stream_seed(number, "batch")  # checked now, not in the first step
        if isinstance(source, Recorded) and train_samples is not None:
            raise InputError(f"train_samples={train_samples} fixes generated queries; recorded ones are all used")
        if not isinstance(source, Recorded) and train_samples is None and steps_per_epoch is None:
            raise InputError("generated queries never end; set steps_per_epoch, or train_samples")
        self.source, self.attention, self.evidence, self.folds, self.k = source, attention, evidence, folds, k
        self.seed, self.eval_seed, self.taught_by = seed, eval_seed, taught_by
        self.stage = stage or ("attention" if attention is None else "reranker")
        self.batch_size, self.steps_per_epoch, self.train_samples = batch_size, steps_per_epoch, train_samples
        self.samples = {"val": val_samples, "test": test_samples}
        self.steps_done: Callable[[], int] = lambda: 0  # of the epoch, if a fit resumes in the middle of one
        self._sets: dict[str, QueryBatch | CandidateBatch] = {}

    def setup(self, stage: str | None = None) -> None:
        """Move the frozen parts to the trainer's device."""
        for module in (self.source.memory, self.attention, self.evidence, *(fold.attention for fold in self.folds)):
            if module is not None:
                module.to(self.device)

    @property
    def device(self) -> torch.device:
        """Where batches are made: the trainer's device, else the memory's."""
        return self.trainer.strategy.root_device if self.trainer else self.source.memory.rows.device

    @property
    def ranks(self) -> tuple[int, int]:
        """The number of this process, and how many there are, of those with batches of their own."""
        if self.trainer is None or self.source.memory.shared:
            return 0, 1
        return self.trainer.global_rank, self.trainer.world_size

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch, which is on the device already; Lightning's own search would cost a tenth of a step."""
        return batch

    @property
    def criterion(self) -> str:
        """The metric that chooses between models, see `ops.ranks.criterion`; a generated query has one target."""
        return criterion(self.source.splits["val"].targets) if isinstance(self.source, Recorded) else "top1"

    def train_dataloader(self) -> Any:
        finite = isinstance(self.source, Recorded) or self.train_samples is not None
        return TrainingBatches(self, self.samples_of("train") if finite else None)

    def val_dataloader(self, split: str = "val") -> DataLoader:
        samples, (rank, ranks) = self.samples_of(split), self.ranks
        mine = each(samples, itemgetter(slice(rank, None, ranks)))
        return DataLoader(blocks(mine, EVAL_BATCH), batch_size=None)  # type: ignore[arg-type]  # a list is a dataset

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader("test")

    @torch.no_grad()
    def with_candidates(self, batch: QueryBatch, attention: SoftAttention | None = None) -> CandidateBatch:
        """Return the batch with the candidates of a stage 1, by default `self.attention`, and their labels."""
        attention = attention or self.attention
        assert attention is not None
        top = attention.candidates(batch.queries, self.k, logsumexp=self.evidence is not None, words=batch.words)
        if self.evidence is None:
            evidence = top.scores.new_empty(*top.rows.shape, 0)
        else:
            evidence = self.evidence(attention, batch.queries, top, batch.words, logged_as=batch.logged_as)
        labels = are_targets(top.rows, batch.targets)
        valid = labels.any(dim=-1)
        return CandidateBatch(batch.queries, top.rows, top.scores, labels, valid, evidence, batch.targets, batch.gains)

    def queries(self, split: str) -> QueryBatch:
        """Return a fixed set of queries: `val`, `test`, or a finite `train`."""
        if isinstance(self.source, Recorded):
            return each(self.source.splits[split], lambda part: part.to(self.device))
        if split == "train":
            generator = stream(self.seed, f"train/{self.stage}", device=self.device)
            return self.source.sample(self.train_samples or 0, generator)
        return self.source.sample(self.samples[split], stream(self.eval_seed, split, device=self.device))

    def samples_of(self, split: str) -> QueryBatch | CandidateBatch:
        """Return the samples of a fixed set, which are made once."""
        if split not in self._sets:
            queries = self.queries(split)
            if self.evidence is not None and split == "train":
                queries = queries._replace(logged_as=self.evidence.logged.to(self.device))
            self._sets[split] = queries if self.attention is None else self._all_candidates(queries, split)
        return self._sets[split]

    def _all_candidates(self, queries: QueryBatch, split: str) -> CandidateBatch:
        assert self.attention is not None
        folds = self.folds if split == "train" else ()
        folds = folds or [Fold(self.attention, torch.arange(len(queries.queries)))]
        taught = evenly(len(queries.queries), self.taught_by if split == "train" else None)
        unseen = [(fold.attention, fold.unseen[torch.isin(fold.unseen.cpu(), taught)]) for fold in folds]
        work = [(of, some.to(self.device)) for of, places in unseen for some in places.split(EVAL_BATCH)]
        found, before = [], self.attention
        for attention, places in tqdm(work, f"candidates ({split})", leave=False, delay=3, disable=None):
            if attention is not before:
                before.release()  # the keys of one fold at a time
                before = attention
            found.append(self.with_candidates(each(queries, itemgetter(places)), attention))
        joined: list[Any] = [None if parts[0] is None else torch.cat(parts) for parts in zip(*found, strict=True)]
        batch = CandidateBatch(*joined)
        if split != "train":
            return batch
        if not batch.valid.any():
            fault = f"none of the {len(batch.valid)} training queries has its target among the k={self.k} candidates"
            raise InputError(f"{fault}; raise k, or train stage 1 for longer")
        return each(batch, itemgetter(batch.valid))


class TrainingBatches:
    """The training batches of an epoch, whose number Lightning sets as it does a sampler's.

    Without samples, each is of generated queries that no other step sees. Of a finite set of samples they are slices of
    a stream of passes over it, each pass in an order of its own; the last slice may be short. All ranks have slices of
    one length. Together these are the batch of one process with `ranks` times the batch size, but for at most ranks - 1
    samples a pass that are seen twice.
    """

    def __init__(self, data: VectorDataModule, samples: Any = None) -> None:
        self.data, self.samples, self.sampler, self.epoch = data, samples, self, 0
        self.count = 0 if samples is None else len(samples.queries)
        self.slices = -(-self.count // (data.batch_size * data.ranks[1]))  # of a pass
        self.steps = data.steps_per_epoch or self.slices
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # a pass, and the order of its samples

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[Any]:
        for step in range(self.data.steps_done(), self.steps):  # known once the first step is asked for
            yield self._fresh(step) if self.samples is None else self._slice(step)

    def _fresh(self, step: int) -> Any:
        data = self.data
        generator = stream(data.seed, f"train/{data.stage}", self.epoch, step, data.ranks[0], device=data.device)
        batch = data.source.sample(data.batch_size, generator)  # type: ignore[union-attr]
        return batch if data.attention is None else data.with_candidates(batch)

    def _slice(self, step: int) -> Any:
        size, (rank, ranks) = self.data.batch_size, self.data.ranks
        number, index = divmod(self.epoch * self.steps + step, self.slices)
        if self._order[0] != number:
            order = torch.randperm(self.count, generator=stream(self.data.seed, "order", number))
            self._order = (number, order.to(self.samples.queries.device))
        start = index * size * ranks
        share = min(size, -(-(self.count - start) // ranks))  # alike for all: their gradients are averaged
        places = (start + rank * share + torch.arange(share)) % self.count
        chosen = self._order[1][places.to(self._order[1].device)]
        return each(self.samples, itemgetter(chosen))
