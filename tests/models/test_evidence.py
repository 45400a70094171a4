"""Evidence against a loop over candidates and logged queries."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nvf.errors import InputError
from nvf.models import evidence as module
from nvf.models.attention import SoftAttention
from nvf.models.evidence import FEATURES, LOGGED, Evidence
from nvf.models.memory import TopK, VectorMemory


@pytest.fixture
def attention(memory: VectorMemory) -> SoftAttention:
    """A linear transform that moves queries."""
    torch.manual_seed(0)
    attention = SoftAttention(memory, transform="linear", keys="learned", beta=5.0)
    with torch.no_grad():
        for parameter in (*attention.transform.parameters(), attention.delta):
            parameter += 0.3 * torch.randn(parameter.shape)
    return attention


def unit_queries(count: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(seed)), dim=-1)


def logged(rows: int = 12) -> tuple[torch.Tensor, torch.Tensor]:
    """60 queries with one or two targets among the first rows; the last two queries are identical."""
    generator = torch.Generator().manual_seed(2)
    queries, targets = unit_queries(60, 3), torch.randint(rows, (60, 2), generator=generator)
    targets[:, 1] = targets[:, 1].where(
        (torch.rand(60, generator=generator) < 0.3) & (targets[:, 1] != targets[:, 0]), -1
    )
    queries[59] = queries[58]
    return queries, targets


def by_loop(
    attention: SoftAttention, log: tuple[torch.Tensor, torch.Tensor], query: torch.Tensor, top: TopK, leave_out: bool
) -> torch.Tensor:
    """One query's features, (k, F)."""
    rows, candidates = attention.memory.rows, attention.memory.rows[top.rows]
    distinct: dict[tuple[float, ...], set[int]] = {}
    for vector, targets in zip(*log, strict=True):
        distinct.setdefault(tuple(vector.tolist()), set()).update(t for t in targets.tolist() if t >= 0)
    if leave_out:
        distinct.pop(tuple(query.tolist()))
    centre = candidates.mean(dim=0)
    moved = attention.moved(query.unsqueeze(0))[0]
    features = []
    for place, row in enumerate(top.rows.tolist()):
        near = [
            float(attention.moved(torch.tensor([vector]))[0] @ moved)
            for vector, targets in distinct.items()
            if row in targets
        ]
        bank = torch.tensor(list(distinct)) @ rows[row]
        others = sorted((float(rows[row] @ other) for i, other in enumerate(rows) if i != row), reverse=True)
        features.append(
            [
                float(top.scores[place]),
                float(top.scores[place] - top.logsumexp),
                float(query @ rows[row]),
                math.log1p(len(near)),
                max([0.0, *near]),
                math.log1p(sum(math.exp(20 * value) for value in near)),
                float((20 * bank).exp().mean().log() / 20),
                sum(others[:10]) / 10,
                float(F.normalize(query - centre, dim=0) @ F.normalize(rows[row] - centre, dim=0)),
                float((candidates @ rows[row]).mean()),
            ]
        )
    return torch.tensor(features)


@pytest.mark.parametrize("leave_out", [False, True])
def test_features_equal_a_loop(
    attention: SoftAttention, memory: VectorMemory, leave_out: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "SCORE_BLOCK", 8 * 5 * 20)  # a few queries a block
    log = logged()
    evidence = Evidence.gather(memory, *log)
    queries, places = (log[0], evidence.logged) if leave_out else (unit_queries(9, 5), None)
    with torch.no_grad():
        top = attention.candidates(queries, 5, logsumexp=True)
        found = evidence(attention, queries, top, logged_as=places)
    assert found.shape == (len(queries), 5, len(FEATURES))
    for i, query in enumerate(queries):
        one = TopK(top.scores[i], top.rows[i], top.logsumexp[i])
        torch.testing.assert_close(found[i], by_loop(attention, log, query, one, leave_out), rtol=1e-3, atol=1e-4)


def test_a_query_that_makes_up_all_of_a_rows_hubness_is_left_out_exactly() -> None:
    memory = VectorMemory(torch.eye(8))
    queries = torch.cat([torch.eye(8), F.normalize(torch.eye(8) - 0.9, dim=-1)])  # what is left is e-12 of the sum
    targets = torch.arange(8).repeat(2).unsqueeze(-1)
    evidence, attention = Evidence.gather(memory, queries, targets), SoftAttention(memory, transform="identity")
    top = attention.candidates(queries, 8, logsumexp=True)
    found = evidence(attention, queries, top, logged_as=evidence.logged)[..., FEATURES.index("hubness")]
    for i in range(16):
        rest = Evidence.gather(memory, *(torch.cat([part[:i], part[i + 1 :]]) for part in (queries, targets)))
        exact = (20 * rest.queries.double() @ memory.rows.double().T).exp().mean(dim=0).log() / 20
        torch.testing.assert_close(found[i].double(), exact[top.rows[i]], rtol=0, atol=1e-5)


def test_a_long_log_of_a_row_is_sampled_evenly_and_counted_whole(memory: VectorMemory) -> None:
    queries, attention = unit_queries(1000, 1), SoftAttention(memory, transform="identity")
    targets = torch.zeros(1000, 1, dtype=torch.int64)
    targets[:3] = 1
    evidence = Evidence.gather(memory, queries, targets)
    asked = unit_queries(1, 2)
    top = TopK(torch.zeros(1, 2), torch.tensor([[0, 1]]), torch.zeros(1))
    found = dict(zip(FEATURES, evidence(attention, asked, top)[0].T, strict=True))
    torch.testing.assert_close(found["log_count"].expm1(), torch.tensor([997.0, 3.0]), rtol=1e-4, atol=0)
    for place, mine in ((0, evidence.pairs[:997]), (1, evidence.pairs[997:])):
        kept = range(3) if place else [slot * 997 // LOGGED for slot in range(LOGGED)]
        similar = evidence.queries[mine[list(kept)] % 1000] @ asked[0]
        mass = float((20 * similar).exp().mean()) * len(mine)
        assert float(found["nearest"][place]) == pytest.approx(max(0.0, float(similar.max())), abs=1e-6)
        assert float(found["support"][place]) == pytest.approx(math.log1p(mass), rel=1e-5)


def test_gradients_reach_query_and_transform(attention: SoftAttention, memory: VectorMemory) -> None:
    evidence = Evidence.gather(memory, *logged())
    queries = unit_queries(4, 6).requires_grad_(True)
    logits = attention(queries)
    best = logits.topk(5, dim=-1)
    found = evidence(attention, queries, TopK(best.values, best.indices, logits.logsumexp(dim=-1)))
    gradients = torch.autograd.grad(found.square().sum(), [queries, *attention.parameters()])
    assert all(bool(gradient.isfinite().all()) and float(gradient.norm()) > 0 for gradient in gradients)


def test_the_moved_log_follows_the_transform(attention: SoftAttention, memory: VectorMemory) -> None:
    evidence, queries = Evidence.gather(memory, *logged()), unit_queries(4, 6)
    attention.requires_grad_(False)  # so that the moved log is kept
    with torch.no_grad():
        top = attention.candidates(queries, 5, logsumexp=True)
        before = evidence(attention, queries, top)
        for parameter in attention.transform.parameters():
            parameter.neg_()
        after = evidence(attention, queries, top)
        fresh = Evidence.gather(memory, *logged())(attention, queries, top)
    assert torch.equal(after, fresh)
    assert not torch.equal(before, after)


def test_a_query_that_was_never_logged_leaves_nothing_out(attention: SoftAttention, memory: VectorMemory) -> None:
    evidence, queries = Evidence.gather(memory, *logged()), unit_queries(4, 6)
    top = attention.candidates(queries, 5, logsumexp=True)
    mixed = evidence(attention, queries, top, logged_as=torch.tensor([-1, 3, -1, 0]))
    torch.testing.assert_close(mixed[[0, 2]], evidence(attention, queries, top)[[0, 2]])


def test_rows_beyond_the_candidates_change_nothing_for_them(attention: SoftAttention, memory: VectorMemory) -> None:
    evidence, queries = Evidence.gather(memory, *logged()), unit_queries(4, 6)
    few, more = (attention.candidates(queries, k, logsumexp=True) for k in (5, 9))
    torch.testing.assert_close(evidence(attention, queries, more, k=5)[:, :5], evidence(attention, queries, few))


def test_one_row_and_one_query(memory: VectorMemory) -> None:
    single = VectorMemory(memory.rows[:1])
    attention = SoftAttention(single)
    queries = unit_queries(3, 1)
    evidence = Evidence.gather(single, queries[:1], torch.zeros(1, 1, dtype=torch.int64))
    found = evidence(attention, queries, attention.candidates(queries, 1, logsumexp=True))
    assert found.isfinite().all()


@pytest.mark.parametrize(
    "change",
    [
        {"pairs": torch.tensor([3, 1])},
        {"pairs": torch.tensor([0, 30 * 60])},
        {"pairs": torch.tensor([-1])},
        {"pairs": torch.tensor([0.0])},
        {"hubness": torch.zeros(29)},
        {"queries": torch.zeros(60, 7)},
    ],
)
def test_a_log_that_does_not_fit_is_refused(memory: VectorMemory, change: dict) -> None:
    parts = {
        "queries": unit_queries(60, 1),
        "pairs": torch.arange(9),
        "hubness": torch.zeros(30),
        "density": torch.zeros(30),
    }
    with pytest.raises(InputError, match="does not fit the memory"):
        Evidence(memory, **{**parts, **change})


def counts_of(law: str, rng: np.random.Generator, rows: int = 600) -> np.ndarray:
    """How often each of the rows is in a log of some kind."""
    if law == "equal rates":
        return rng.poisson(2.5, rows)
    if law == "hardly ever":
        return rng.poisson(0.05, rows)
    if law == "rates of their own":
        return rng.poisson(rng.gamma(1.0, 3.0, rows))
    if law == "some are never asked":
        return rng.poisson(2.5, rows) * (np.arange(rows) < 200)
    if law == "five each, dealt":
        return rng.binomial(5, 0.8, rows)
    if law == "three each of some, dealt":
        return rng.binomial(3, 0.8, rows) * (np.arange(rows) < 200)
    return rng.binomial(1, 0.8, rows) + (rng.random(rows) < 0.05)  # answered once, hardly ever again


@pytest.mark.parametrize(
    ("law", "ignored"),
    [
        ("equal rates", []),
        ("hardly ever", []),
        ("rates of their own", []),
        ("some are never asked", []),
        ("five each, dealt", ["log_count", "support"]),
        ("three each of some, dealt", ["log_count", "support"]),
        ("answered once", ["log_count", "support", "nearest"]),
    ],
)
def test_the_law_of_the_counts_says_what_they_can_tell(law: str, ignored: list[str]) -> None:
    rng = np.random.default_rng(0)
    memory = VectorMemory.synthetic(rows=600, dim=4, seed=0)
    kept = 0
    for _ in range(20):
        counts = counts_of(law, rng)
        targets = torch.from_numpy(np.repeat(np.arange(600), counts)).unsqueeze(-1)
        queries = F.normalize(torch.from_numpy(rng.standard_normal((len(targets), 4))).float(), dim=-1)
        found = Evidence.gather(memory, queries, targets).law()
        others = np.repeat(counts, counts) - 1  # of each query's item
        assert found["dispersion"] == pytest.approx(others.var() / others.mean() if others.any() else 1.0)
        again = others[others > 0].size / (counts > 0).sum() * (counts == 0).sum() / (counts == 1).sum()
        assert law != "equal rates" or found["asked_again"] == pytest.approx(again, rel=0.03)
        kept += found["ignored"] == ignored
    assert kept >= 17  # one in twenty strays by two standard errors


def test_what_the_log_has_none_of_is_no_figure(memory: VectorMemory) -> None:
    every = torch.arange(30).unsqueeze(-1)
    one = Evidence.gather(memory, unit_queries(1, 0), torch.zeros(1, 1, dtype=torch.int64))
    assert one.law()["ignored"] == []
    assert Evidence.gather(memory, unit_queries(30, 0), every).law() == {
        "dispersion": 1.0,
        "asked_again": pytest.approx(0.5 / 30.5 * 0.5 / 30.5),
        "ignored": ["log_count", "support", "nearest"],
    }
