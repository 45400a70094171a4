"""Rows aligned with queries of another model: the choice is that of a loop, and the table's figures are loops' too."""

from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nvf.data.queries import QueryBatch, Warped
from nvf.evaluation.calibration import RIDGES, SHRINKAGES, align, fit_alignment
from nvf.evaluation.evaluate import evaluate
from nvf.models.alignment import Alignment
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.ops.products import QUERY_BLOCK
from nvf.ops.random_streams import stream
from nvf.statistics import share_of


@pytest.fixture
def source() -> Warped:
    """60 rows of 8 dimensions, queries of 12."""
    return Warped(VectorMemory.synthetic(rows=60, dim=8, seed=0), sigma=0.25, warp="mlp", warp_seed=0, dim=12)


def drawn(source: Warped, count: int, name: str) -> QueryBatch:
    return source.sample(count, stream(0, name))


def pairs_of(source: Warped, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Texts that are near rows, as both models see them."""
    places = torch.randint(60, (count,), generator=stream(1, "pairs"))
    noise = [0.1 * torch.randn(count, dim, generator=stream(dim, "pairs")) for dim in (8, 12)]
    both = source.memory.rows[places], source.oracle[places]
    old, new = (F.normalize(part + more, dim=-1) for part, more in zip(both, noise, strict=True))
    return old, new


def top1_by_loop(keys: torch.Tensor, asked: torch.Tensor, bank: torch.Tensor, targets: torch.Tensor) -> float:
    """Top-1 with half of the keys' hubness subtracted."""
    hubs = (20 * (keys @ bank.T).double()).exp().mean(dim=-1).log() / 20
    return float(((asked @ keys.T - hubs / 2).argmax(dim=-1) == targets[:, 0]).double().mean())


@pytest.mark.parametrize("with_pairs", [False, True])
def test_what_validates_best_is_chosen(source: Warped, with_pairs: bool) -> None:
    log, held_out = drawn(source, 80, "train"), drawn(source, 150, "val")
    pairs = pairs_of(source, 40) if with_pairs else None
    logged = source.memory.rows[log.targets[:, 0]], log.queries
    groups = {("log",): [logged]} if pairs is None else {("pairs",): [pairs], ("pairs", "log"): [pairs, logged]}
    found = {}
    for by, shrinkage in product(groups, SHRINKAGES):
        start = Alignment.whitening_of(log.queries, source.memory.rows, shrinkage)
        asked, bank = start.queries(held_out.queries), start.queries(log.queries)
        for strength, fitted in zip(RIDGES, start.fit(groups[by], RIDGES), strict=True):
            keys = F.normalize((source.memory.rows - source.memory.rows.mean(dim=0)) @ fitted, dim=-1)
            found[by, shrinkage, strength] = top1_by_loop(keys, asked, bank, held_out.targets), keys
    best = max(found, key=lambda choice: found[choice][0])
    assert len({top1 for top1, _ in found.values()}) > 3  # there is something to choose
    aligned, how = fit_alignment(source.memory, log, held_out, pairs)
    assert (tuple(how["by"]), how["shrinkage"], how["strength"]) == best
    torch.testing.assert_close(aligned.keys, found[best][1], rtol=1e-4, atol=1e-5)
    ((strength, again),) = align(source.memory, log, pairs, by=best[0], shrinkage=best[1], strengths=[best[2]])
    assert strength == best[2]
    assert torch.equal(again.keys, aligned.keys)


@pytest.mark.parametrize("dim", [12, 24])
@pytest.mark.parametrize("several", [False, True])
def test_a_hidden_linear_map_is_found(dim: int, several: bool) -> None:
    memory = VectorMemory.synthetic(rows=300, dim=16, seed=0)
    source = Warped(memory, sigma=0.1, warp="rotation", warp_seed=0, dim=dim)
    log, val, test = (drawn(source, count, name) for count, name in ((2000, "train"), (300, "val"), (1000, "test")))
    if several:  # some have two targets, the others are padded
        twice = torch.cat([log.targets, log.targets.roll(1, 0)], dim=1)
        twice[::2, 1] = -1
        log = QueryBatch(F.normalize(log.queries + source.oracle[twice[:, 1]] * (twice[:, 1:] >= 0), dim=-1), twice)
    aligned, _ = fit_alignment(memory, log, val, None)
    scores = {"ours": aligned.aligned_queries(test.queries) @ aligned.keys.T, "oracle": test.queries @ source.oracle.T}
    top1 = {name: float((of.argmax(dim=-1) == test.targets[:, 0]).double().mean()) for name, of in scores.items()}
    assert top1["ours"] > top1["oracle"] - 0.05 > 0.7


def test_pairs_are_taken_where_the_log_is_noise(source: Warped) -> None:
    log, val, pairs = drawn(source, 300, "train"), drawn(source, 200, "val"), pairs_of(source, 300)
    log = log._replace(targets=log.targets[torch.randperm(300, generator=stream(0, "order"))])
    (aligned, how), (misled, _) = (fit_alignment(source.memory, log, val, given) for given in (pairs, None))
    assert how["by"] == ["pairs"]
    right, wrong = (
        (memory.aligned_queries(val.queries) @ memory.keys.T).argmax(dim=-1) == val.targets[:, 0]
        for memory in (aligned, misled)
    )
    assert int(right.sum()) > 60 + int(wrong.sum())


@pytest.mark.parametrize("with_references", [False, True])
def test_every_row_of_the_table_is_a_search_by_hand(source: Warped, with_references: bool) -> None:
    count = QUERY_BLOCK + 100  # of several blocks
    log, batch = drawn(source, 300, "train"), drawn(source, count, "test")
    aligned, _ = fit_alignment(source.memory, log, drawn(source, 100, "val"), None)
    old = F.normalize(source.memory.rows[batch.targets[:, 0]] + 0.2 * torch.randn(count, 8), dim=-1)
    references = {"old": (old, source.memory.rows), "anew": (batch.queries, source.oracle)}
    attention = SoftAttention(aligned, transform="identity")
    found = evaluate(attention, batch, k=5, oracle=None, references=references if with_references else None)
    scores = {"aligned": aligned.alignment.queries(batch.queries) @ aligned.keys.T}
    scores |= {name: asked @ rows.T for name, (asked, rows) in references.items()} if with_references else {}
    for name, of in scores.items():
        for metric, depth in (("top1", 1), ("top5", 5)):
            hits = (of.topk(depth, dim=-1).indices == batch.targets).any(dim=-1)
            assert found.figures[name][metric]["value"] == pytest.approx(float(hits.double().mean()), abs=2 / count)
    assert found.figures["exact"] is None
    assert found.outcomes.reference == "aligned"
    if not with_references:
        assert found.figures["old"] is found.figures["anew"] is None
        assert "recovery" not in found.figures
        return
    tens = {name: (of.topk(10, dim=-1).indices == batch.targets).any(dim=-1).sum() for name, of in scores.items()}
    assert found.figures["recovery"]["value"] == pytest.approx(float(tens["aligned"] / tens["anew"]), abs=0.003)
    assert found.against_exact["wins"] == found.against_exact["losses"] == 0  # stage 1 is the alignment alone


def test_the_share_of_what_a_reference_answers_has_its_interval() -> None:
    rng = np.random.default_rng(0)
    ours, theirs = rng.random(2000) < 0.6, rng.random(2000) < 0.8
    found = share_of(ours, theirs)
    assert found["value"] == pytest.approx(ours.sum() / theirs.sum())
    places = [rng.integers(2000, size=2000) for _ in range(1000)]
    drawn = [ours[place].sum() / theirs[place].sum() for place in places]
    assert [found["low"], found["high"]] == pytest.approx(np.quantile(drawn, [0.025, 0.975]).tolist(), abs=0.005)
    nothing = np.zeros(5, bool)
    assert share_of(nothing, nothing) == {"value": 0.0, "low": 0.0, "high": 0.0}
    assert share_of(~nothing, ~nothing)["low"] == 1.0
