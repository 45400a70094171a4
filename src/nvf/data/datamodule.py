"""Batches of queries, or of candidates once the datamodule is given a stage 1."""

from collections.abc import Callable, Iterator, Sequence
from operator import itemgetter
from typing import Any, NamedTuple

import lightning as L
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler
from tqdm import tqdm

from nvf.data.queries import QueryBatch, Recorded, Source, blocks, each
from nvf.errors import InputError, check_number
from nvf.models.attention import SoftAttention
from nvf.models.evidence import Evidence, evenly
from nvf.models.words import WordScores
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


class LoggedBatch(NamedTuple):
    """Training queries with their places in the log of the evidence."""

    queries: Tensor  # (B, D)
    targets: Tensor  # (B, m) int64 rows of the memory, padded with -1
    words: WordScores | None  # what the queries' words match, if there are texts
    gains: Tensor | None  # (B, m), as in `QueryBatch`
    logged_as: Tensor  # (B,) int64


class Fold(NamedTuple):
    """A stage 1 that has not seen some of the training queries."""

    attention: SoftAttention
    unseen: Tensor  # (u,) places of those in the training split


class VectorDataModule(L.LightningDataModule):
    """Training, validation and test batches over one source of queries.

    Without `attention` the loaders yield `QueryBatch`, or for training `LoggedBatch` where there is `evidence`; with it
    `CandidateBatch`. The training batch of step s of epoch e on rank r is a function of (seed, stage, e, s, r) alone,
    so a resumed run sees what an uninterrupted one would have seen. Generated queries are fresh in every step, unless
    `train_samples` fixes a finite set; finite sets are shuffled anew in every pass. The candidates of fixed queries are
    computed once; a finite training set of candidates holds the valid samples alone.

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
        self._sets: dict[str, QueryBatch | LoggedBatch | CandidateBatch] = {}

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
        """The number of this process, and how many there are."""
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        """Return the batch, which is on the device already; Lightning's own search would cost a tenth of a step."""
        return batch

    @property
    def criterion(self) -> str:
        """The metric that chooses between models, see `ops.ranks.criterion`; a generated query has one target."""
        return criterion(self.source.splits["val"].targets) if isinstance(self.source, Recorded) else "top1"

    def train_dataloader(self) -> DataLoader:
        finite = isinstance(self.source, Recorded) or self.train_samples is not None
        batches = _FiniteBatches(self, self.samples_of("train")) if finite else _FreshBatches(self)
        sampler = _StepSampler(batches.steps, self.steps_done)
        return DataLoader(batches, batch_size=None, sampler=sampler, generator=torch.Generator())

    def val_dataloader(self, split: str = "val") -> DataLoader:
        samples, (rank, ranks) = self.samples_of(split), self.ranks
        mine = each(samples, itemgetter(slice(rank, None, ranks)))
        return DataLoader(blocks(mine, EVAL_BATCH), batch_size=None)  # type: ignore[arg-type]  # a list is a dataset

    def test_dataloader(self) -> DataLoader:
        return self.val_dataloader("test")

    @torch.no_grad()
    def with_candidates(
        self, batch: QueryBatch, attention: SoftAttention | None = None, logged_as: Tensor | None = None
    ) -> CandidateBatch:
        """Return the batch with the candidates of a stage 1, by default `self.attention`, and their labels."""
        attention = attention or self.attention
        assert attention is not None
        top = attention.candidates(batch.queries, self.k, logsumexp=self.evidence is not None, words=batch.words)
        if self.evidence is None:
            evidence = top.scores.new_empty(*top.rows.shape, 0)
        else:
            evidence = self.evidence(attention, batch.queries, top, batch.words, logged_as=logged_as)
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

    def samples_of(self, split: str) -> QueryBatch | LoggedBatch | CandidateBatch:
        """Return the samples of a fixed set, which are made once."""
        if split not in self._sets:
            queries, logged = self.queries(split), None
            if self.evidence is not None and split == "train":
                logged = self.evidence.logged.to(self.device)
            if self.attention is not None:
                self._sets[split] = self._all_candidates(queries, split, logged)
            else:
                self._sets[split] = queries if logged is None else LoggedBatch(*queries, logged)
        return self._sets[split]

    def _all_candidates(self, queries: QueryBatch, split: str, logged: Tensor | None) -> CandidateBatch:
        assert self.attention is not None
        folds = self.folds if split == "train" else ()
        folds = folds or [Fold(self.attention, torch.arange(len(queries.queries)))]
        taught = evenly(len(queries.queries), self.taught_by if split == "train" else None)
        unseen = [(fold.attention, fold.unseen[torch.isin(fold.unseen.cpu(), taught)]) for fold in folds]
        work = [(of, some.to(self.device)) for of, places in unseen for some in places.split(EVAL_BATCH)]
        found = []
        for attention, places in tqdm(work, f"candidates ({split})", leave=False, delay=3, disable=None):
            part = each(queries, itemgetter(places))
            found.append(self.with_candidates(part, attention, None if logged is None else logged[places]))
        joined: list[Any] = [None if parts[0] is None else torch.cat(parts) for parts in zip(*found, strict=True)]
        batch = CandidateBatch(*joined)
        if split != "train":
            return batch
        if not batch.valid.any():
            fault = f"none of the {len(batch.valid)} training queries has its target among the k={self.k} candidates"
            raise InputError(f"{fault}; raise k, or train stage 1 for longer")
        return each(batch, itemgetter(batch.valid))


class _StepSampler(Sampler[tuple[int, int]]):
    """Yields (epoch, step) for each remaining step of an epoch, which Lightning sets."""

    def __init__(self, steps: int, done: Callable[[], int]) -> None:
        self.steps, self.done, self.epoch = steps, done, 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps

    def __iter__(self) -> Iterator[tuple[int, int]]:
        for step in range(self.done(), self.steps):  # `done` is known once the first step is asked for
            yield self.epoch, step


class _FreshBatches(Dataset):
    """Generated queries that no other step sees."""

    def __init__(self, data: VectorDataModule) -> None:
        self.data, self.steps = data, data.steps_per_epoch or 0

    def __getitem__(self, position: tuple[int, int]) -> Any:
        data = self.data
        generator = stream(data.seed, f"train/{data.stage}", *position, data.ranks[0], device=data.device)
        batch = data.source.sample(data.batch_size, generator)  # type: ignore[union-attr]
        return batch if data.attention is None else data.with_candidates(batch)


class _FiniteBatches(Dataset):
    """Slices of a stream of passes over a finite set, each pass in an order of its own; the last slice may be short.

    All ranks have slices of one length. Together these are the batch of one process with `ranks` times the batch size,
    but for at most ranks - 1 samples a pass that are seen twice.
    """

    def __init__(self, data: VectorDataModule, samples: Any) -> None:
        self.samples, self.count = samples, len(samples.queries)
        self.size, self.seed = data.batch_size, data.seed
        self.rank, self.ranks = data.ranks
        self.slices = -(-self.count // (self.size * self.ranks))  # of a pass
        self.steps = data.steps_per_epoch or self.slices
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))  # a pass, and the order of its samples

    def __getitem__(self, position: tuple[int, int]) -> Any:
        epoch, step = position
        number, index = divmod(epoch * self.steps + step, self.slices)
        if self._order[0] != number:
            order = torch.randperm(self.count, generator=stream(self.seed, "order", number))
            self._order = (number, order.to(self.samples.queries.device))
        start = index * self.size * self.ranks
        share = min(self.size, -(-(self.count - start) // self.ranks))  # alike for all: their gradients are averaged
        places = (start + self.rank * share + torch.arange(share)) % self.count
        chosen = self._order[1][places.to(self._order[1].device)]
        return each(self.samples, itemgetter(chosen))
