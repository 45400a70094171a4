"""A plan is a function of the sizes, every part of it can be set, and what is set is what is done."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import compose_config
from nvf.data.queries import QueryBatch, Recorded
from nvf.errors import InputError
from nvf.models.attention import SoftAttention
from nvf.models.evidence import NEIGHBOURS, SHARPNESS, Evidence, evenly, similar_to
from nvf.models.memory import VectorMemory
from nvf.training import build as module
from nvf.training.build import build, sized


def recorded(rows: int, dim: int, queries: int) -> Recorded:
    """A log of random queries; the sizes are what matters."""
    generator = torch.Generator().manual_seed(0)
    memory = VectorMemory(torch.randn(rows, dim, generator=generator))

    def split(count: int) -> QueryBatch:
        asked = F.normalize(torch.randn(count, dim, generator=generator), dim=-1)
        return QueryBatch(asked, torch.randint(rows, (count, 1), generator=generator))

    return Recorded(memory, {"train": split(queries), "val": split(queries // 4), "test": split(20)})


def config(*words: str) -> dict:
    return compose_config("data=embeddings", "data.dir=nowhere", *words)


def test_small_data_are_taken_whole() -> None:
    settings = sized(config(), recorded(300, 8, 400))
    planned = settings["data"]["plan"]
    assert set(planned) == {"sample", "chosen_by", "taught_by", "bank", "among"}
    assert set(planned.values()) == {None}
    assert settings["attention"]["sample"] is None


def test_the_larger_the_data_the_less_of_them_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "FEWEST", 3)
    for name, size in (("ONCE", 3e5), ("OFTEN", 1e5), ("EXACT", 1e6), ("SAMPLED", 50)):
        monkeypatch.setattr(module, name, size)
    small, large = (sized(config(), recorded(rows, 8, 400))["data"]["plan"] for rows in (100, 400))
    assert large["sample"] == 50
    assert small["sample"] is None  # 100 x 8 x 400 multiply-adds an epoch
    assert (small["among"], large["among"]) == (None, 93)
    assert (small["bank"], large["bank"]) == (125, 31)
    assert large["chosen_by"] == 31
    assert large["taught_by"] == 375


def test_every_part_can_be_set_and_is_done() -> None:
    words = ["data.plan.chosen_by=7", "data.plan.taught_by=90", "data.plan.bank=5", "data.plan.among=40", "k=5"]
    source = recorded(60, 8, 200)
    built = build(config(*words, "attention.sample=30"), source)
    assert len(built.queries("val").queries) == 7
    assert all(stage.module.sample == 30 for stage in built.variants)
    assert built.reranker is not None
    data = built.reranker.data
    assert data.taught_by == 90
    data.attention = built.exact
    taught = torch.cat([part.queries for part in [data.samples_of("train")]])
    places = evenly(200, 90)
    expected = source.splits["train"].queries[places]
    covered = data.with_candidates(QueryBatch(expected, source.splits["train"].targets[places])).valid
    assert torch.equal(taught, expected[covered])
    asked = data.evidence.queries[evenly(len(data.evidence.queries), 5)]
    scores = SHARPNESS * (source.memory.rows.double() @ asked.double().T)
    hubs = (scores.logsumexp(dim=-1) - np.log(5)) / SHARPNESS
    torch.testing.assert_close(data.evidence.hubness.double(), hubs, rtol=0, atol=1e-5)
    assert data.evidence.similar is None  # cosines among a sample of the rows cannot be updated


@pytest.mark.parametrize("name", ["chosen_by", "taught_by", "bank", "among"])
@pytest.mark.parametrize("value", ["0", "2.5", "many"])
def test_a_bad_size_is_named(name: str, value: str) -> None:
    with pytest.raises(InputError, match=rf"data\.plan\.{name}"):
        sized(config(f"data.plan.{name}={value}"), recorded(60, 8, 40))


@pytest.mark.parametrize("among", [4, 25, 60])
def test_density_is_measured_among_other_rows_alone(among: int) -> None:
    rows = F.normalize(torch.randn(60, 8, generator=torch.Generator().manual_seed(1)), dim=-1)
    chosen = evenly(60, among)
    found = similar_to(rows, chosen)
    assert found.shape == (60, min(NEIGHBOURS, len(chosen) - 1))
    for row in range(60):
        others = [float(rows[row].double() @ rows[other].double()) for other in chosen.tolist() if other != row]
        assert found[row].tolist() == pytest.approx(sorted(others, reverse=True)[: found.shape[1]], abs=1e-6)


def test_hubness_leaves_a_query_out_that_is_in_the_bank() -> None:
    source = recorded(30, 8, 40)
    queries, targets, *_ = source.splits["train"]
    evidence = Evidence.gather(source.memory, queries, targets, bank=10)
    attention = SoftAttention(source.memory, transform="identity")
    top = attention.candidates(queries, 4, logsumexp=True)
    found = evidence(attention, queries, top, logged_as=evidence.logged)[..., evidence.features.index("hubness")]
    bank = evenly(len(evidence.queries), 10)
    for query in range(40):
        others = [place for place in bank.tolist() if place != int(evidence.logged[query])]
        cosines = evidence.queries[others].double() @ source.memory.rows[top.rows[query]].double().T
        expected = ((SHARPNESS * cosines).logsumexp(dim=0) - np.log(len(others))) / SHARPNESS
        assert found[query].tolist() == pytest.approx(expected.tolist(), abs=1e-5)


def test_keys_that_may_move_take_room_alone() -> None:
    memory = VectorMemory(torch.randn(20, 4, generator=torch.Generator().manual_seed(0)))
    moving = torch.tensor([3, 7, 19])
    how = {"transform": "identity", "keys": "learned"}
    some, every = SoftAttention(memory, moving=moving, **how), SoftAttention(memory, **how)
    assert some.settings["moving"] == 3
    some.delta.data.copy_(torch.randn(3, 4, generator=torch.Generator().manual_seed(1)))
    every.delta.data[moving] = some.delta.data
    asked, targets = torch.randn(9, 4), torch.randint(20, (9, 1))
    assert torch.equal(some.keys(), every.keys())
    rows = torch.randint(20, (5, 3))
    assert torch.equal(some.keys_of(rows), every.keys_of(rows))
    for attention in (some, every):
        attention.loss(asked, targets).backward()
    assert torch.equal(some.delta.grad, every.delta.grad[moving])
    again = SoftAttention(memory, **some.settings)
    again.load_state_dict(some.state_dict())
    assert torch.equal(again.keys(), some.keys())
