"""Ranks, recall and nDCG against sorting and loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import ndcg_of
from nvf.ops.ranks import MISS, are_targets, candidate_ranks, gains_of, ndcg, recall, target_ranks


@given(
    scores=st.lists(st.lists(st.integers(-3, 3), min_size=6, max_size=6), min_size=1, max_size=8),
    data=st.data(),
)
@settings(deadline=None)
def test_target_ranks_equal_a_stable_sort(scores: list[list[int]], data: st.DataObject) -> None:
    pairs = st.lists(st.integers(0, 5), min_size=2, max_size=2)
    targets = data.draw(st.lists(pairs, min_size=len(scores), max_size=len(scores)))
    expected = []
    for row, right in zip(scores, targets, strict=True):
        order = sorted(range(6), key=lambda i: -row[i])  # stable: equal scores by row
        expected.append(1 + min(order.index(t) for t in right))
    assert target_ranks(torch.tensor(scores).float(), torch.tensor(targets)).tolist() == expected


def test_padding_is_no_target() -> None:
    scores = torch.tensor([[9.0, 1.0, 5.0]])
    assert target_ranks(scores, torch.tensor([[2, -1]])).tolist() == [2]


def test_equal_or_nan_scores_flatter_nobody() -> None:
    targets = torch.tensor([[3], [3]])
    assert target_ranks(torch.stack([torch.zeros(5), torch.full((5,), torch.nan)]), targets).tolist() == [4, 6]


def test_candidate_ranks_know_misses() -> None:
    scores = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    labels = torch.tensor([[True, False, False], [False, False, False], [True, False, True]])
    assert candidate_ranks(scores, labels).tolist() == [3, MISS, 2]


def test_recall_and_ndcg_equal_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    for depth in (1, 4, 10):
        order = torch.stack([torch.randperm(12, generator=generator) for _ in range(50)])
        targets = torch.stack([torch.randperm(12, generator=generator)[:5] for _ in range(50)])
        targets[:, 1:] = targets[:, 1:].where(torch.rand(50, 4, generator=generator) < 0.5, -1)
        found = are_targets(order[:, :depth], targets)
        for i in range(50):
            right = {t for t in targets[i].tolist() if t >= 0}
            hits = [row in right for row in order[i, :depth].tolist()]
            assert float(recall(found, targets)[i]) == pytest.approx(sum(hits) / len(right))
            gain = sum(hit / math.log2(place + 2) for place, hit in enumerate(hits))
            ideal = sum(1 / math.log2(place + 2) for place in range(min(depth, len(right))))
            assert float(ndcg(found, targets)[i]) == pytest.approx(gain / ideal)


@pytest.mark.parametrize("depth", [1, 4, 10, 12])
def test_graded_ndcg_equals_a_loop(depth: int) -> None:
    generator = torch.Generator().manual_seed(depth)
    scores = torch.rand(50, 12, generator=generator)
    targets = torch.stack([torch.randperm(12, generator=generator)[:5] for _ in range(50)])
    targets[:, 1:] = targets[:, 1:].where(torch.rand(50, 4, generator=generator) < 0.7, -1)  # padding is anywhere
    gains = torch.randint(1, 5, targets.shape, generator=generator) * (targets >= 0) / 2
    order = scores.argsort(dim=-1, descending=True)[:, :depth]
    found = ndcg(gains_of(order, targets, gains), targets, gains).tolist()
    for query, ndcg_of_query in enumerate(found):
        worth = dict(zip(targets[query].tolist(), gains[query].tolist(), strict=True))
        gained = [worth.get(row, 0) for row in order[query].tolist()]
        best = sorted((gain for row, gain in worth.items() if row >= 0), reverse=True)[:depth]
        expected, ideal = (sum(gain / math.log2(place + 2) for place, gain in enumerate(of)) for of in (gained, best))
        assert ndcg_of_query == pytest.approx(expected / ideal)
    if depth == 10:
        assert found == ndcg_of(scores, targets, gains).tolist()


def test_equal_gains_are_no_gains() -> None:
    targets = torch.tensor([[3, 1, -1], [0, -1, -1]])
    scores = torch.rand(2, 20, generator=torch.Generator().manual_seed(0))
    for gain in (1.0, 3.0):
        torch.testing.assert_close(ndcg_of(scores, targets, gain * (targets >= 0)), ndcg_of(scores, targets))


@pytest.mark.parametrize("answers", range(1, 13))
def test_a_perfect_order_has_an_ndcg_of_one(answers: int) -> None:
    found = torch.arange(10).expand(7, 10) < answers
    assert ndcg(found, torch.arange(answers).expand(7, answers)).tolist() == [1.0] * 7
