"""What is fitted without gradient steps: the hub correction, against a loop over shares; the scores' temperature."""

import math
from collections.abc import Callable
from operator import itemgetter
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from conftest import SMALL, SMALL_STEPS
from nvf.data.queries import Noisy, QueryBatch, each
from nvf.evaluation.calibration import (
    SHARES,
    clearly_above,
    fit_hub_correction,
    fit_sharpness,
    fit_temperature,
    quality,
)
from nvf.evaluation.gradients import audit_gradients
from nvf.models.attention import SoftAttention, attention_loss
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline, Retrieval
from nvf.models.queries_and_keys import hubness
from nvf.models.reranker import Reranker, reranker_loss
from nvf.ops.random_streams import stream


def hubby() -> tuple[VectorMemory, torch.Tensor, QueryBatch]:
    """A memory whose row 0 lies in the middle of all queries, a bank of queries, and held-out ones with targets."""
    generator = stream(0, "test")
    middle = F.normalize(torch.randn(1, 16, generator=generator), dim=-1)
    rows = F.normalize(torch.cat([middle, middle + torch.randn(40, 16, generator=generator) / 4]), dim=-1)
    memory = VectorMemory(rows)
    bank, held_out = (Noisy(VectorMemory(rows[1:]), sigma=0.25).sample(n, stream(n, "test")) for n in (600, 500))
    return memory, bank.queries, QueryBatch(held_out.queries, held_out.targets + 1)


def test_hubness_equals_its_formula() -> None:
    memory, bank, _ = hubby()
    expected = (20 * memory.rows @ bank.T).exp().mean(dim=-1).log() / 20
    torch.testing.assert_close(hubness(bank, memory.rows, 20.0), expected)


def test_the_share_that_validates_best_is_taken_and_hubs_give_way() -> None:
    memory, bank, held_out = hubby()
    attention = SoftAttention(memory, transform="identity")
    before = float(quality(attention, held_out).double().mean())
    exact = (held_out.queries @ memory.rows.T).argmax(dim=-1) == held_out.targets[:, 0]
    assert before == int(exact.sum()) / 500
    scores = held_out.queries @ memory.rows.T
    hubs = hubness(bank, memory.rows, 20.0)
    right = [int(((scores - s * hubs).argmax(dim=-1) == held_out.targets[:, 0]).sum()) for s in SHARES]
    share = fit_hub_correction(attention, bank, held_out)
    assert share == SHARES[right.index(max(right))] > 0
    assert float(quality(attention, held_out).double().mean()) == max(right) / 500 > before
    torch.testing.assert_close(attention(held_out.queries), 20 * (scores - share * hubs), rtol=1e-4, atol=1e-4)
    assert fit_hub_correction(attention, bank, held_out) == share  # again, from the start
    fit_hub_correction(attention, bank, held_out, shares=(0.0,))
    assert attention.bias is None
    assert float(quality(attention, held_out).double().mean()) == before


def test_caution_wants_more_than_a_lucky_few() -> None:
    memory, bank, held_out = hubby()
    attention = SoftAttention(memory, transform="identity")
    share = fit_hub_correction(attention, bank, held_out)
    plain = quality(SoftAttention(memory, transform="identity"), held_out)
    places = (quality(attention, held_out) & ~plain).nonzero().squeeze(-1)[:3]  # three wins and no loss
    lucky = each(held_out, lambda part: torch.cat([part[places], part[plain][:50]]))
    assert fit_hub_correction(attention, bank, lucky) > 0
    assert fit_hub_correction(attention, bank, lucky, cautious=True) == 0
    assert attention.bias is None
    many = each(held_out, lambda part: part.repeat(50, 1))
    assert fit_hub_correction(attention, bank, many, cautious=True) == share


def test_clearly_above_counts_disagreements_alone() -> None:
    right, reference = torch.zeros(100, dtype=torch.bool), torch.zeros(100, dtype=torch.bool)
    right[:20] = reference[10:20] = reference[90:94] = True  # ten wins, four losses: 6 against 2 x 3.7
    assert not clearly_above(right, reference)
    reference[90:92] = False  # ten wins, two losses: 8 against 2 x 3.5
    assert clearly_above(right, reference)
    assert not clearly_above(reference, right)
    assert not clearly_above(right, right)


def test_clearly_above_pairs_graded_qualities() -> None:
    reference = torch.rand(400, generator=torch.Generator().manual_seed(0))
    differences = torch.tensor([0.3, -0.1]).repeat(200)  # their mean is 0.1, and its error 0.22 / sqrt(n)
    assert clearly_above(reference[:24] + differences[:24], reference[:24])  # 2.19 errors
    assert not clearly_above(reference[:16] + differences[:16], reference[:16])  # 1.79
    assert not clearly_above(reference, reference + differences)


def test_several_answers_are_judged_by_ndcg_and_one_by_top1(pipeline: Pipeline) -> None:
    held_out = Noisy(pipeline.memory, sigma=0.3).sample(100, stream(0, "val"))
    with torch.no_grad():
        first = pipeline(held_out.queries).ranking.argmax(dim=-1)
    right = first == held_out.targets[:, 0]
    padded = QueryBatch(held_out.queries, F.pad(held_out.targets, (0, 2), value=-1))
    assert torch.equal(quality(pipeline, held_out), right)
    assert torch.equal(quality(pipeline, padded), right)
    assert torch.equal(quality(pipeline, padded, by="top1"), right)
    several = QueryBatch(held_out.queries, torch.cat([held_out.targets, (held_out.targets + 1) % 30], dim=-1))
    for model in (pipeline, pipeline.attention):
        found = quality(model, several)
        with torch.no_grad():
            scores = model(several.queries)
        lists = (scores.ranking if isinstance(scores, Retrieval) else scores).argsort(dim=-1, descending=True)
        for value, row, right in zip(found.tolist(), lists.tolist(), several.targets.tolist(), strict=True):
            gain = sum(1 / math.log2(2 + place) for place, item in enumerate(row[:10]) if item in right)
            assert value == pytest.approx(gain / (1 + 1 / math.log2(3)))


@torch.no_grad()
def test_temperatures_of_several_answers_are_the_best_of_a_grid(pipeline: Pipeline) -> None:
    asked = Noisy(pipeline.memory, sigma=0.4).sample(300, stream(0, "val"))
    batch = QueryBatch(asked.queries, torch.cat([asked.targets, (asked.targets + 1) % 30], dim=-1))
    batch.targets[::3, 1] = -1
    start = float(pipeline.attention.beta)
    fit_temperature(pipeline.attention, batch)
    cosines = pipeline.attention(batch.queries) / pipeline.attention.beta

    def loss(beta: float) -> float:
        return float(attention_loss(beta * cosines, batch.targets)) + math.log(beta / start) ** 2 / 2 / 300  # the prior

    assert loss(float(pipeline.attention.beta)) <= min(map(loss, torch.logspace(-1, 3, 401).tolist())) + 1e-6
    scores, rows = pipeline(batch.queries)[3], pipeline(batch.queries).candidates
    labels = (rows.unsqueeze(-1) == batch.targets.unsqueeze(1)).any(dim=-1)
    covered = int(labels.any(dim=-1).sum())

    def reranked(factor: float) -> float:
        return float(reranker_loss(factor * scores, labels)) + math.log(factor) ** 2 / 2 / covered

    assert reranked(fit_sharpness(pipeline, batch)) <= min(map(reranked, torch.logspace(-2, 2, 401).tolist())) + 1e-6


@pytest.mark.parametrize("model", ["pipeline", "weighing"])
@torch.no_grad()
def test_the_scores_are_as_sharp_as_the_best_of_a_grid(model: str, request: pytest.FixtureRequest) -> None:
    pipeline: Pipeline = request.getfixturevalue(model)
    held_out = Noisy(pipeline.memory, sigma=0.4).sample(500, stream(0, "val"))

    def loss() -> float:
        return float(attention_loss(pipeline(held_out.queries).log_probs, held_out.targets))

    before, ranked = pipeline(held_out.queries), quality(pipeline, held_out)
    log_attention = before.logits.log_softmax(dim=-1)
    mass = log_attention.gather(-1, before.candidates).logsumexp(dim=-1, keepdim=True)
    losses = []
    for factor in torch.logspace(-2, 2, 81):
        inside = mass + (factor * before.scores).log_softmax(dim=-1)
        loss_at = attention_loss(log_attention.scatter(-1, before.candidates, inside), held_out.targets)
        losses.append(float(loss_at) + float(factor.log()) ** 2 / 2 / 500)  # the prior, a query
    found = fit_sharpness(pipeline, held_out)
    mine = loss() + math.log(found) ** 2 / 2 / 500
    assert mine <= min(losses) + 1e-6
    assert mine == pytest.approx(min(losses), abs=1e-3)
    after = pipeline(held_out.queries).scores.log_softmax(dim=-1)
    torch.testing.assert_close(after, (found * before.scores).log_softmax(dim=-1), atol=1e-4, rtol=1e-4)
    assert torch.equal(quality(pipeline, held_out), ranked)  # it orders no candidate anew
    assert abs(math.log(fit_sharpness(pipeline, held_out))) < abs(math.log(found)) / 2  # little is left to say


@pytest.fixture
def exact(memory: VectorMemory) -> Pipeline:
    """An untrained pipeline whose candidates' scores are 5 times their cosines."""
    attention = SoftAttention(memory, transform="identity", beta=5.0)
    return Pipeline(attention, Reranker(8, kind="residual", hidden=(16, 8)), k=4).eval()


def losses_of(scores: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """-log of the right candidate's share, of queries that have one, in float64."""
    covered = right.any(dim=-1)
    return -scores.double().log_softmax(dim=-1)[covered].masked_fill(~right[covered], -math.inf).logsumexp(dim=-1)


def scored(pipeline: Pipeline, batch: QueryBatch) -> tuple[torch.Tensor, torch.Tensor]:
    """The candidates' scores and which of them are right."""
    found = pipeline(batch.queries)
    return found.scores, found.candidates == batch.targets


@pytest.mark.parametrize("times", [1.0, 40.0, 800.0])  # scores of some 4,000 at the most
@torch.no_grad()
def test_the_size_of_the_scores_does_not_blur_the_fit(exact: Pipeline, times: float) -> None:
    pipeline, held_out = exact, Noisy(exact.memory, sigma=0.05).sample(500, stream(0, "val"))
    pipeline.reranker.sharpen(times)
    scores, right = scored(pipeline, held_out)
    grid = torch.logspace(-2, 2, 801, dtype=torch.float64)
    losses = [float(losses_of(factor * scores.double(), right).sum() + factor.log() ** 2 / 2) for factor in grid]
    best = float(grid[losses.index(min(losses))])
    assert 0.01 < best < 100
    assert fit_sharpness(pipeline, held_out) == pytest.approx(best, rel=0.02)


@pytest.mark.parametrize("sigma", [0.01, 0.2, 0.5])  # at the first, no held-out query is answered wrong
@pytest.mark.parametrize("count", [30, 300, 3000])
@torch.no_grad()
def test_scaled_is_not_worse_than_unscaled_on_fresh_queries(exact: Pipeline, sigma: float, count: int) -> None:
    pipeline, source = exact, Noisy(exact.memory, sigma=sigma)
    fresh = source.sample(5000, stream(0, "test"))
    before = losses_of(*scored(pipeline, fresh))
    fit_sharpness(pipeline, source.sample(count, stream(0, "val")))
    worse = losses_of(*scored(pipeline, fresh)) - before
    # One number fitted to n queries costs a chi-square / 2n on fresh ones: 2 / n is its 95% point.
    assert float(worse.mean()) <= 2 * float(worse.std()) / math.sqrt(len(worse)) + 2 / count


@pytest.mark.parametrize("model", ["pipeline", "weighing"])
def test_certain_held_out_queries_leave_every_gradient_alive(model: str, request: pytest.FixtureRequest) -> None:
    pipeline: Pipeline = request.getfixturevalue(model)
    source = Noisy(pipeline.memory, sigma=0.01)
    drawn = source.sample(3000, stream(0, "val"))
    held_out = each(drawn, itemgetter(quality(pipeline, drawn)))  # separable: the best factor is infinite
    fit_temperature(pipeline.attention, held_out)
    fit_sharpness(pipeline, held_out)
    assert min(audit_gradients(pipeline, held_out)["parameters"].values()) > 1e-12


def test_a_saved_joint_pipeline_has_a_gradient_on_every_weight(run: Callable[..., Any], tmp_path: Path) -> None:
    easy = ["queries=noisy", "queries.sigma=0.02", "attention=linear"]  # validation is separable
    results = run(*SMALL, *SMALL_STEPS, *easy, "stage=joint", "joint.epochs=2", "joint.steps_per_epoch=3")
    loaded = Pipeline.load(tmp_path / "run" / "pipeline")
    held_out = Noisy(loaded.memory, sigma=0.02).sample(256, stream(0, "fresh"))
    assert min(audit_gradients(loaded, held_out)["parameters"].values()) > 1e-12
    assert results["gradients"]["vanished"] == []


@torch.no_grad()
def test_no_covered_query_leaves_the_scores_alone(pipeline: Pipeline) -> None:
    held_out = Noisy(pipeline.memory, sigma=0.1).sample(50, stream(0, "val"))
    worst = pipeline.attention(held_out.queries).argmin(dim=-1, keepdim=True)
    before = pipeline(held_out.queries).scores
    assert fit_sharpness(pipeline, QueryBatch(held_out.queries, worst)) == 1.0
    assert torch.equal(pipeline(held_out.queries).scores, before)


def test_a_pipeline_answers_with_its_most_probable_row(pipeline: Pipeline) -> None:
    held_out = Noisy(pipeline.memory, sigma=0.3).sample(200, stream(0, "val"))
    expected = pipeline.search(held_out.queries, k=1).rows[:, 0] == held_out.targets[:, 0]
    assert torch.equal(quality(pipeline, held_out), expected)
