"""Batches are functions of (seed, stage, epoch, step, rank); candidates are what a loop finds."""

import pytest
import torch

from nvf.data.datamodule import CandidateBatch, VectorDataModule
from nvf.data.queries import Nearest, Noisy, QueryBatch, Recorded
from nvf.errors import InputError
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory


def epoch(data: VectorDataModule, number: int) -> list:
    """The training batches of an epoch, as the trainer asks for them."""
    loader = data.train_dataloader()
    loader.sampler.set_epoch(number)
    return list(loader)


def recorded(memory: VectorMemory, count: int = 23) -> Recorded:
    queries = torch.nn.functional.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(0)), dim=-1)
    batch = QueryBatch(queries, torch.arange(count).remainder(30).unsqueeze(-1))
    return Recorded(memory, {"train": batch, "val": batch, "test": batch})


def test_fresh_batches_never_repeat_but_can_be_had_again(memory: VectorMemory) -> None:
    data = VectorDataModule(Nearest(memory), seed=3, batch_size=16, steps_per_epoch=4)
    batches = epoch(data, 0) + epoch(data, 1)
    assert len({batch.queries.numpy().tobytes() for batch in batches}) == 8
    again = epoch(VectorDataModule(Nearest(memory), seed=3, batch_size=16, steps_per_epoch=4), 1)
    for mine, theirs in zip(batches[4:], again, strict=True):
        assert torch.equal(mine.queries, theirs.queries)
        assert torch.equal(mine.targets, theirs.targets)
    other = epoch(VectorDataModule(Nearest(memory), seed=4, batch_size=16, steps_per_epoch=4), 0)
    assert not torch.equal(batches[0].queries, other[0].queries)


def test_the_stages_see_different_queries(memory: VectorMemory) -> None:
    settings = {"seed": 0, "batch_size": 16, "steps_per_epoch": 1}
    first = VectorDataModule(Nearest(memory), **settings)
    second = VectorDataModule(Nearest(memory), attention=SoftAttention(memory), **settings)
    assert not torch.equal(epoch(first, 0)[0].queries, epoch(second, 0)[0].queries)


def test_validation_and_test_are_fixed_and_apart(memory: VectorMemory) -> None:
    def make(seed: int) -> VectorDataModule:
        return VectorDataModule(
            Noisy(memory, sigma=0.1), seed=seed, batch_size=4, steps_per_epoch=1, val_samples=1500, test_samples=70
        )

    def queries(loader) -> torch.Tensor:
        return torch.cat([batch.queries for batch in loader])

    val, test = queries(make(0).val_dataloader()), queries(make(0).test_dataloader())
    assert (len(val), len(test)) == (1500, 70)
    assert torch.equal(val, queries(make(1).val_dataloader()))  # whatever the stage's own seed
    assert not torch.equal(val[:70], test)
    assert torch.equal(test, make(0).queries("test").queries)


@pytest.mark.parametrize("steps", [None, 5])
def test_finite_sets_are_passed_over_evenly(memory: VectorMemory, steps: int | None) -> None:
    data = VectorDataModule(recorded(memory), seed=0, batch_size=5, steps_per_epoch=steps)
    batches = [batch for number in range(6) for batch in epoch(data, number)]
    assert [len(batch.queries) for batch in batches[:5]] == [5, 5, 5, 5, 3]
    passes = [torch.cat([b.queries for b in batches[i : i + 5]]) for i in range(0, 30, 5)]
    for one in passes:
        assert {row.numpy().tobytes() for row in one} == {
            row.numpy().tobytes() for row in data.source.splits["train"].queries
        }
    assert not torch.equal(passes[0], passes[1])


def test_an_epoch_may_be_shorter_than_a_pass(memory: VectorMemory) -> None:
    data = VectorDataModule(recorded(memory), seed=0, batch_size=5, steps_per_epoch=2)
    batches = epoch(data, 0) + epoch(data, 1) + epoch(data, 2)
    assert [len(batch.queries) for batch in batches] == [5, 5, 5, 5, 3, 5]


def test_train_samples_fixes_a_set(memory: VectorMemory) -> None:
    data = VectorDataModule(Nearest(memory), seed=0, batch_size=8, train_samples=20)
    passes = [torch.cat([batch.queries for batch in epoch(data, number)]) for number in (0, 1)]
    rows = [{row.numpy().tobytes() for row in one} for one in passes]
    assert rows[0] == rows[1]
    assert len(rows[0]) == 20


def test_candidates_equal_a_loop(memory: VectorMemory) -> None:
    torch.manual_seed(0)
    attention = SoftAttention(memory)
    data = VectorDataModule(recorded(memory), seed=0, batch_size=5, attention=attention, k=3)
    targets = torch.randint(30, (40, 2), generator=torch.Generator().manual_seed(1))
    targets[::3, 1] = -1
    queries = torch.nn.functional.normalize(torch.randn(40, 8, generator=torch.Generator().manual_seed(2)), dim=-1)
    found = data.with_candidates(QueryBatch(queries, targets))
    logits = attention(queries)
    for i in range(40):
        rows = sorted(range(30), key=logits[i].tolist().__getitem__, reverse=True)[:3]
        assert found.rows[i].tolist() == rows
        assert found.labels[i].tolist() == [row in targets[i].tolist() for row in rows]
    torch.testing.assert_close(found.logits, logits.gather(-1, found.rows))
    assert torch.equal(found.valid, found.labels.any(dim=-1))
    assert 0 < found.valid.sum() < 40
    assert not found.logits.requires_grad


def test_recorded_candidates_are_computed_once_and_train_on_valid_samples(memory: VectorMemory) -> None:
    calls = []

    class Counting(SoftAttention):
        def candidates(self, queries: torch.Tensor, k: int, **options: bool):
            calls.append(len(queries))
            return super().candidates(queries, k, **options)

    data = VectorDataModule(recorded(memory), seed=0, batch_size=5, attention=Counting(memory, beta=9.0), k=4)
    for number in range(3):
        train = epoch(data, number)
        assert all(isinstance(batch, CandidateBatch) and batch.valid.all() for batch in train)
        val = list(data.val_dataloader())
        assert sum(len(batch.valid) for batch in val) == 23
    assert calls == [23, 23]  # training and validation, once each
    assert sum(len(batch.queries) for batch in train) == sum(int(batch.valid.sum()) for batch in val) < 23


def test_no_valid_sample_at_all_is_an_error(memory: VectorMemory) -> None:
    source = recorded(memory)
    far = source.memory.search(source.splits["train"].queries, 30).rows[:, -1:]  # the worst row of each query
    source.splits["train"] = source.splits["train"]._replace(targets=far)
    data = VectorDataModule(source, seed=0, batch_size=5, attention=SoftAttention(memory, transform="identity"), k=2)
    with pytest.raises(InputError, match="none of the 23 training queries has its target among the k=2 candidates"):
        data.train_dataloader()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 is not a whole number of at least 1"),
        ({"steps_per_epoch": 0}, "steps_per_epoch=0"),
        ({"steps_per_epoch": None}, "generated queries never end; set steps_per_epoch"),
        ({"train_samples": -1}, "train_samples=-1"),
        ({"val_samples": 0}, "val_samples=0"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": "lucky"}, "seed=lucky"),
    ],
)
def test_bad_settings_are_refused(memory: VectorMemory, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        VectorDataModule(Nearest(memory), **{"seed": 0, "batch_size": 4, "steps_per_epoch": 2, **settings})


def test_recorded_queries_take_no_train_samples(memory: VectorMemory) -> None:
    with pytest.raises(InputError, match="train_samples=10 fixes generated queries; recorded ones are all used"):
        VectorDataModule(recorded(memory), seed=0, batch_size=4, train_samples=10)
