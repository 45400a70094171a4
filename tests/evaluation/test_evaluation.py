"""Figures against loops, intervals against their definitions, the table and its remarks."""

import json
import math
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from nvf.data.queries import Noisy, QueryBatch
from nvf.evaluation.evaluate import against, calibration_error, evaluate
from nvf.evaluation.report import remarks, table
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import Reranker
from nvf.models.words import WordScores
from nvf.ops.products import QUERY_BLOCK
from nvf.ops.random_streams import stream
from nvf.ops.ranks import ndcg
from nvf.statistics import METRICS, gap_closed, in_percent, mcnemar, p_text, percent, reciprocal_rank, wilson


@pytest.fixture
def batch(pipeline: Pipeline) -> QueryBatch:
    return Noisy(pipeline.memory, sigma=0.3).sample(300, stream(0, "test"))


def share(right: list[bool]) -> float:
    return sum(right) / len(right)


def test_figures_equal_a_loop(pipeline: Pipeline, batch: QueryBatch) -> None:
    evaluation = evaluate(pipeline, batch, k=4, oracle=pipeline.memory.rows)
    figures, found_against = evaluation.figures, evaluation.against_exact
    with torch.no_grad():
        scores = {
            "exact": F.normalize(batch.queries, dim=-1) @ pipeline.memory.rows.T,
            "attention": pipeline.attention(batch.queries),
            "pipeline": pipeline(batch.queries).ranking,
        }
    found = {}
    for method, values in scores.items():
        orders = values.argsort(dim=-1, descending=True).tolist()
        ranks = [order.index(target) + 1 for order, (target,) in zip(orders, batch.targets.tolist(), strict=True)]
        found[method] = ranks
        assert figures[method]["top1"]["value"] == pytest.approx(share([r == 1 for r in ranks]))
        assert figures[method]["top5"]["value"] == pytest.approx(share([r <= 5 for r in ranks]))
        assert figures[method]["mrr10"]["value"] == pytest.approx(np.mean([1 / r if r <= 10 else 0 for r in ranks]))
    assert figures["oracle"] == figures["exact"]
    covered = [r <= 4 for r in found["attention"]]
    assert figures["coverage"]["value"] == pytest.approx(share(covered))
    top1 = figures["pipeline"]["top1"]["value"]
    assert figures["rerank_given_coverage"]["value"] == pytest.approx(top1 / share(covered))
    pairs = list(zip(found["pipeline"], found["exact"], strict=True))
    assert found_against["wins"] == sum(p == 1 != e for p, e in pairs)
    assert found_against["losses"] == sum(p != 1 == e for p, e in pairs)
    assert evaluation.answered.tolist() == [rank == 1 for rank in found["pipeline"]]


@torch.no_grad()
@pytest.mark.parametrize("oracle", [False, True])
def test_the_outcomes_equal_a_loop_over_queries(pipeline: Pipeline, oracle: bool) -> None:
    asked = Noisy(pipeline.memory, sigma=0.3).sample(QUERY_BLOCK + 50, stream(0, "test"))  # several blocks
    targets = torch.cat([asked.targets, (asked.targets + 7) % 30], dim=-1)
    targets[::3, 1] = -1
    warped = pipeline.memory.rows.flip(0)
    seen = evaluate(pipeline, QueryBatch(asked.queries, targets), k=4, oracle=warped if oracle else None).outcomes
    assert ("oracle" in seen.ranks) == oracle
    found = pipeline(asked.queries)
    scores = {
        "exact": asked.queries @ pipeline.memory.rows.T,
        "attention": found.logits.softmax(dim=-1),
        "pipeline": found.log_probs.exp(),
    }
    if oracle:
        scores["oracle"] = asked.queries @ warped.T
    for method, of_all in scores.items():
        for rank, row, right in zip(seen.ranks[method].tolist(), of_all.tolist(), targets.tolist(), strict=True):
            best = max(row[target] for target in right if target >= 0)
            assert rank == 1 + sum(value > best for value in row)
    for method, confidences in seen.confidences.items():
        torch.testing.assert_close(confidences, scores[method].amax(dim=-1))
        torch.testing.assert_close(seen.probabilities[method], scores[method].gather(-1, found.candidates))
    assert torch.equal(seen.candidates, found.candidates)
    for rows, marks, right in zip(seen.candidates.tolist(), seen.right.tolist(), targets.tolist(), strict=True):
        assert marks == [row in right for row in rows]


@pytest.mark.parametrize("k", [4, 12])
def test_no_list_loses_what_stage_one_has_and_all_figures_are_of_what_a_search_answers(
    memory: VectorMemory, k: int
) -> None:
    torch.manual_seed(0)
    model = Pipeline(SoftAttention(memory, beta=5.0), Reranker(8), k=k).eval()
    model.reranker.sharpen(1000)  # certain of its choice, and wrong
    asked = F.normalize(torch.randn(200, 8), dim=-1)
    targets = (asked @ memory.rows.T).topk(8).indices
    targets[::2, 5:] = -1
    figures = evaluate(model, QueryBatch(asked, targets), k=k, oracle=None).figures
    assert figures["pipeline"]["recall"] == figures["attention"]["recall"]
    rows = model.search(asked, k=max(k, 10)).rows
    right = (rows.unsqueeze(-1) == targets.unsqueeze(1)).any(dim=-1)
    assert figures["pipeline"]["top1"]["value"] == pytest.approx(float(right[:, 0].double().mean()))
    assert figures["pipeline"]["top5"]["value"] == pytest.approx(float(right[:, :5].any(dim=-1).double().mean()))
    assert figures["pipeline"]["ndcg10"]["value"] == pytest.approx(float(ndcg(right[:, :10], targets).double().mean()))
    share = right[:, :k].sum(dim=-1) / (targets >= 0).sum(dim=-1)
    assert figures["pipeline"]["recall"]["value"] == pytest.approx(float(share.double().mean()))
    with torch.no_grad():
        best = model(asked).log_probs.max(dim=-1)
    expected = calibration_error(best.values.exp(), right[:, 0] / (targets >= 0).sum(dim=-1))
    assert figures["calibration_error"]["pipeline"] == pytest.approx(expected)


def test_stage_one_alone_and_no_oracle_leave_nulls(pipeline: Pipeline, batch: QueryBatch) -> None:
    figures = evaluate(pipeline.attention, batch, k=4, oracle=None).figures
    assert figures["pipeline"] is figures["oracle"] is figures["gap_closed"] is figures["rerank_given_coverage"] is None
    assert figures["coverage"]["value"] >= figures["attention"]["top1"]["value"]


def test_a_memory_of_duplicates_is_evaluated(batch: QueryBatch) -> None:
    memory = VectorMemory(torch.ones(30, 8))
    model = Pipeline(SoftAttention(memory), Reranker(8), k=4)
    figures = evaluate(model, batch, k=4, oracle=None).figures
    assert figures["exact"]["top1"]["value"] == share([target == 0 for (target,) in batch.targets.tolist()])
    assert figures["pipeline"]["top1"]["value"] < 0.2


@pytest.mark.parametrize(("successes", "total"), [(0, 10), (10, 10), (97, 100), (6800, 10000)])
def test_wilson_interval(successes: int, total: int) -> None:
    interval = wilson(successes, total)
    for bound in (interval["low"], interval["high"]):  # where the score test just rejects
        if 0 < bound < 1:
            z = (successes / total - bound) / math.sqrt(bound * (1 - bound) / total)
            assert abs(z) == pytest.approx(1.959964, rel=1e-5)
    assert 0 <= interval["low"] <= interval["value"] <= interval["high"] <= 1


@pytest.mark.parametrize("answers", [1, 2])
def test_shares_of_single_answers_have_wilson_intervals_and_means_normal_ones(
    pipeline: Pipeline, batch: QueryBatch, answers: int
) -> None:
    targets = torch.cat([batch.targets, (batch.targets + 1) % 30], dim=-1)[:, :answers]
    figures = evaluate(pipeline, QueryBatch(batch.queries, targets), k=4, oracle=None).figures["exact"]
    order = (batch.queries @ pipeline.memory.rows.T).argsort(dim=-1, descending=True).tolist()
    places = [[row.index(target) for target in of] for row, of in zip(order, targets.tolist(), strict=True)]
    recall = np.mean([[place < 4 for place in of] for of in places], axis=1)
    ideal = sum(1 / math.log2(2 + i) for i in range(answers))
    gains = np.array([sum(1 / math.log2(2 + p) for p in of if p < 10) / ideal for of in places])
    for name, values in (("recall", recall), ("ndcg10", gains)):
        mean, reach = values.mean(), 1.959964 * values.std() / math.sqrt(300)
        expected = {"value": mean, "low": mean - reach, "high": mean + reach}
        if name == "recall" and answers == 1:
            expected = wilson(int(values.sum()), 300)
        assert figures[name] == pytest.approx(expected, abs=1e-6)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(("queries", "width"), [(1, 0.7), (40, 0.08)])
@pytest.mark.parametrize("right", [True, False])
def test_no_interval_is_certain_of_queries_that_are_alike(queries: int, width: float, right: bool) -> None:
    memory = VectorMemory(torch.eye(20))
    model = Pipeline(SoftAttention(memory, transform="identity", beta=1e4), Reranker(20), k=1)
    target = 3 if right else 15  # the last of equals, which rank by row
    batch = QueryBatch(torch.eye(20)[3].repeat(queries, 1), torch.full((queries, 1), target))
    found = evaluate(model, batch, k=1, oracle=None)
    figures = json.loads(json.dumps(found.figures, allow_nan=False))
    intervals = [figures["attention"][metric] for metric in METRICS]
    intervals += [figures["coverage"], figures["calibration_error"]["attention"]]
    for interval in intervals[:-1]:
        assert interval["value"] == pytest.approx(float(right))
    for interval in intervals:
        assert 0 <= interval["low"] <= interval["value"] <= interval["high"] <= 1
        assert interval["high"] - interval["low"] > width
    assert figures["gap_closed"] is figures["gap_closed_interval"] is None


@pytest.mark.parametrize(("wins", "losses"), [(0, 0), (5, 0), (3, 7), (40, 60), (0, 990), (3000, 10)])
def test_mcnemar_is_the_binomial_tail(wins: int, losses: int) -> None:
    n = wins + losses
    tail = sum(math.comb(n, i) for i in range(min(wins, losses) + 1)) / 2**n
    assert mcnemar(wins, losses) == pytest.approx(max(1e-300, min(1.0, 2 * tail)), rel=1e-9, abs=0)


def test_figures_that_round_to_a_certainty_do_not_claim_it() -> None:
    assert [percent(share) for share in (0.0, 0.0004, 0.5, 0.9996, 1.0)] == ["0.0", "<0.1", "50.0", ">99.9", "100.0"]
    for right, shown in (
        (0, "0.0 (0.0-0.1)"),
        (1, "<0.1 (0.0-0.1)"),
        (9999, ">99.9 (99.9-100.0)"),
        (10000, "100.0 (99.9-100.0)"),
    ):
        assert in_percent(wilson(right, 10000)).strip() == shown
    assert [p_text(mcnemar(wins, 0)) for wins in (0, 5, 5000)] == ["= 1", "= 0.062", "< 1e-300"]


def test_the_bootstrap_of_counts_is_the_bootstrap_of_queries() -> None:
    ranks = np.random.default_rng(1).integers(1, 15, size=400)
    counts = np.bincount(np.minimum(ranks, 11) - 1, minlength=11)
    interval = reciprocal_rank(counts)
    reciprocal = np.where(ranks <= 10, 1 / ranks, 0)
    resampled = np.random.default_rng(2).choice(reciprocal, size=(4000, 400)).mean(axis=1)
    assert interval["value"] == pytest.approx(reciprocal.mean())
    np.testing.assert_allclose([interval["low"], interval["high"]], np.quantile(resampled, [0.025, 0.975]), atol=0.004)


def test_the_calibration_error_equals_its_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    confidences = torch.rand(2000, generator=generator)
    answered = torch.rand(2000, generator=generator) < confidences.square()  # overconfident
    expected = 0.0
    for low in range(15):
        inside = (confidences > low / 15) & (confidences <= (low + 1) / 15)
        expected += abs(float(confidences[inside].mean() - answered[inside].float().mean())) * int(inside.sum()) / 2000
    found = calibration_error(confidences, answered)
    assert found["value"] == pytest.approx(expected, abs=1e-6)
    assert 0.12 < found["low"] < found["value"] < found["high"] < 0.2


def test_each_confidence_is_that_of_the_first_answer(pipeline: Pipeline, batch: QueryBatch) -> None:
    figures = evaluate(pipeline, batch, k=4, oracle=None).figures
    with torch.no_grad():
        found = pipeline(batch.queries)
    for method, log_probs in (("attention", found.logits.log_softmax(dim=-1)), ("pipeline", found.log_probs)):
        best = log_probs.max(dim=-1)
        expected = calibration_error(best.values.exp(), best.indices == batch.targets[:, 0])
        assert figures["calibration_error"][method] == pytest.approx(expected)


def test_against_counts_wins_and_losses() -> None:
    answered = torch.tensor([True, True, True, False, False])
    reference = torch.tensor([True, False, False, True, False])
    assert against(answered, reference) == {"wins": 2, "losses": 1, "p": 1.0}


def results(exact: float, oracle: float | None, attention: float, pipeline: float, coverage: float) -> dict:
    def at(value: float | None) -> dict | None:
        return None if value is None else {m: wilson(round(1000 * value), 1000) for m in METRICS}

    figures = {"exact": at(exact), "oracle": at(oracle), "attention": at(attention), "pipeline": at(pipeline)}
    figures |= {"coverage": wilson(round(1000 * coverage), 1000), "rerank_given_coverage": wilson(9, 10)}
    first, end, top = (firsts(share) for share in (attention, pipeline, min(coverage, oracle or 1.0)))
    figures["gap_closed_interval"] = closed = gap_closed(first, end, top)
    figures["gap_closed"] = closed and closed["value"]
    figures["calibration_error"] = {"attention": wilson(2, 100), "pipeline": wilson(1, 100)}
    against = {"wins": 3, "losses": 1, "p": 0.625}
    return {"test": figures, "val": figures, "against_exact": against, "config": {"k": 7}}


def firsts(share: float) -> np.ndarray:
    """Which of 1,000 queries are answered, those at the front."""
    return np.arange(1000) < round(1000 * share)


def test_the_gap_ends_at_the_lower_ceiling(pipeline: Pipeline, batch: QueryBatch) -> None:
    for oracle in (None, pipeline.memory.rows, pipeline.memory.rows.roll(1, dims=0)):
        figures = evaluate(pipeline, batch, k=8, oracle=oracle).figures
        start, end = (figures[method]["top1"]["value"] for method in ("attention", "pipeline"))
        top = min(figures["coverage"]["value"], 1.0 if oracle is None else figures["oracle"]["top1"]["value"])
        expected = (end - start) / (top - start) if top > start else None
        assert figures["gap_closed"] == pytest.approx(expected)


def test_words_alone_and_with_exact_search_equal_a_loop(pipeline: Pipeline, batch: QueryBatch) -> None:
    generator = torch.Generator().manual_seed(0)
    rows = torch.rand(300, 30, generator=generator).argsort(dim=-1)[:, :7]
    scores = torch.rand(300, 7, 2, generator=generator)
    rows[0], scores[0] = -1, 0  # no word that any row has
    batch = batch._replace(words=WordScores(rows, scores))
    hybrid = SoftAttention(pipeline.memory, transform="identity", beta=2.0)
    hybrid.word_weights = torch.tensor([0.5, 0.0])
    figures = evaluate(pipeline, batch, k=4, oracle=None, hybrid=hybrid).figures
    text = torch.zeros(300, 31).scatter(1, rows % 31, scores[..., 0])[:, :30]
    expected = {"words": text, "hybrid": batch.queries @ pipeline.memory.rows.T + 0.5 * text}
    for method, values in expected.items():
        orders = values.argsort(dim=-1, descending=True, stable=True).tolist()
        ranks = [order.index(target) + 1 for order, (target,) in zip(orders, batch.targets.tolist(), strict=True)]
        assert figures[method]["top1"]["value"] == pytest.approx(share([r == 1 for r in ranks]))
        assert figures[method]["mrr10"]["value"] == pytest.approx(np.mean([1 / r if r <= 10 else 0 for r in ranks]))
    without = evaluate(pipeline, batch._replace(words=None), k=4, oracle=None, hybrid=hybrid).figures
    assert without["words"] is without["hybrid"] is None
    lines = table({**results(0.5, None, 0.6, 0.7, 0.9), "test": {**figures, "gap_closed_interval": None}}, 300)
    assert "words alone " in lines
    assert "words + exact " in lines


@pytest.mark.parametrize("oracle", [False, True])
def test_the_interval_of_the_gap_is_the_bootstrap_of_queries(oracle: bool) -> None:
    rng = np.random.default_rng(3)
    start = rng.random(500) < 0.5
    top = rng.random(500) < 0.8 if oracle else start | (rng.random(500) < 0.5)
    end = np.where(rng.random(500) < 0.6, top, start)
    drawn = np.random.default_rng(4).integers(500, size=(4000, 500))
    first, last, best = (answered[drawn].mean(axis=1) for answered in (start, end, top))
    found = gap_closed(start, end, top)
    assert found is not None
    assert found["value"] == pytest.approx((end.mean() - start.mean()) / (top.mean() - start.mean()))
    expected = np.quantile((last - first) / (best - first), [0.025, 0.975])
    np.testing.assert_allclose([found["low"], found["high"]], expected, atol=0.02)


def test_a_gap_within_the_noise_has_no_share() -> None:
    start, top = firsts(0.3), firsts(0.6) & ~firsts(0.296)  # 300 won, 296 lost: a gap of four queries
    assert gap_closed(start, np.roll(start, 8), top) is None
    assert gap_closed(start, firsts(0.304), firsts(0.304)) is None  # four of a thousand
    assert gap_closed(top, start, start) is None  # the wrong way
    found = gap_closed(start, firsts(0.31), firsts(0.31))
    assert found == pytest.approx(wilson(10, 10))  # of ten queries, all
    printed = table(results(0.5, 0.604, 0.6, 0.608, 0.9), 1000)
    assert "gap closed                    -  no clear gap from stage 1 to oracle 60.4" in printed


def test_the_table_names_every_figure() -> None:
    printed = table(results(0.5, 0.8, 0.6, 0.75, 0.9), 1000)
    for text in ("exact search", "oracle", "stage 1", "pipeline", "Top-1", "MRR@10", "75.0 (72.2-77.6)", "coverage"):
        assert text in printed
    assert "gap closed                 75.0 (69.0-81.0)  of stage 1 to oracle 80.0" in printed
    assert "3 queries won, 1 lost (McNemar p = 0.62)" in printed
    assert "Recall@7" in printed
    assert "words alone" not in printed
    assert "oracle" not in table(results(0.5, None, 0.6, 0.75, 0.9), 1000)
    assert "log" not in printed
    assert "by validation" not in printed


def test_the_table_fits_its_width_and_keeps_its_columns() -> None:
    found = results(1.0, 1.0, 0.5, 0.9999, 1.0)
    found["test"]["pipeline"] = dict.fromkeys(METRICS, wilson(9999, 10000))
    tried = {"transform": "linear", "keys": "learned", "hub_share": 0.25, "epochs": 4, "val_top1": 0.4, "chosen": True}
    found["selection"] = [tried | {"keys": "moved", "key_strength": 0.0}, tried]
    for width, columns in ((100, 5), (98, 5), (97, 4), (80, 3), (20, 1)):
        lines = table(found, 1000, width=width).splitlines()
        assert max(map(len, lines)) <= max(width, 50)
        heading, *rows = lines[1:6]
        assert len(heading.split()) == columns
        starts = [14 + 17 * column for column in range(columns)]
        assert [heading.index(title) for title in heading.split()] == starts
        for row in rows[:2]:
            assert [row[start : start + 16] for start in starts] == [
                " 100 (99.6-100) "[: len(row) - start] for start in starts
            ]
        assert [rows[3][start : start + 16] for start in starts] == [">99.9 (99.9-100)"] * columns


@pytest.mark.parametrize(
    ("oracle", "best", "dim"),
    [(0.8, "pipeline", "oracle"), (0.5, "pipeline", "exact search"), (None, "pipeline", "coverage")],
)
def test_a_terminal_shows_the_best_and_the_ceilings(oracle: float | None, best: str, dim: str) -> None:
    found = results(0.5, oracle, 0.6, 0.75, 0.9)
    plain, coloured = table(found, 1000), table(found, 1000, colour=True)
    assert "\033" not in plain
    assert re.sub(r"\033\[[\d;]*m", "", coloured) == plain
    styled = {
        line.split("m", 1)[1][:14].strip(): line.split("m")[0] for line in coloured.splitlines() if line[0] == "\033"
    }
    assert styled[best] == "\033[1;32"
    assert styled[dim] == styled["coverage"] == "\033[2"
    assert list(styled.values()).count("\033[1;32") == 1


def test_the_table_sets_joint_training_beside_what_was_before() -> None:
    before, against = results(0.5, 0.8, 0.5, 0.7, 0.8)["test"], {"wins": 60, "losses": 10, "p": 1e-9}
    found = {**results(0.5, 0.8, 0.6, 0.75, 0.9), "joint": {"kept": True, "before": before, "against": against}}
    printed = table(found, 1000)
    expected = "before joint training     Top-1 of stage 1 50.0, pipeline 70.0; coverage 80.0, calibration error 1.0"
    assert expected in printed
    assert "joint training            60 queries won, 10 lost (McNemar p = 1e-09)" in printed
    assert "calibration error         stage 1 2.0 (0.6-7.0), pipeline 1.0 (0.2-5.4)" in printed
    found["joint"]["kept"] = False
    assert "joint training            not clearly better on validation, so not kept" in table(found, 1000)


def test_the_table_says_what_was_chosen_and_for_whom_it_works() -> None:
    found = results(0.5, None, 0.6, 0.75, 0.9)
    found["test"]["seen_rows"] = {
        m: {"queries": 1200, "top1": wilson(n, 12)} for m, n in (("exact", 3), ("pipeline", 6))
    }
    found["test"]["unseen_rows"] = {"exact": None}
    tried = {"transform": "linear", "keys": "learned", "hub_share": 0.0, "epochs": 1, "val_top1": 0.412, "chosen": True}
    exact = {**tried, "epochs": 0, "hub_share": 0.25, "val_top1": 0.25, "chosen": False}
    printed = table({**found, "selection": [exact, tried]}, 1000)
    assert "items in the log          Top-1 of exact search 25.0, pipeline 50.0 (1,200 queries)" in printed
    assert "items not in the log" not in printed
    first, second = printed.splitlines()[-2:]
    assert first.split(maxsplit=4)[-1] == "41.2  linear transform, learned keys, 1 epoch"
    assert second.strip() == "25.0  exact search, 0.25 of the hubness subtracted"


def test_items_in_and_not_in_the_log_are_told_apart(pipeline: Pipeline, batch: QueryBatch) -> None:
    seen = torch.arange(30) % 3 == 0
    figures = evaluate(pipeline, batch, k=4, oracle=None, seen=seen).figures
    right = (batch.queries @ pipeline.memory.rows.T).argmax(dim=-1) == batch.targets[:, 0]
    for name, group in (("seen_rows", seen[batch.targets[:, 0]]), ("unseen_rows", ~seen[batch.targets[:, 0]])):
        assert figures[name]["exact"]["queries"] == int(group.sum())
        assert figures[name]["exact"]["top1"]["value"] == pytest.approx(share(right[group].tolist()))


def test_remarks_say_what_went_wrong() -> None:
    good = results(0.5, None, 0.6, 0.7, 0.9)
    assert remarks(good) == []
    bad = results(0.5, None, 0.6, 0.55, 0.9)
    (line,) = remarks(bad)
    assert line.startswith("On validation queries, pipeline (55.0) is below stage 1 (60.0): try reranker=residual")
    (line,) = remarks(results(0.7, None, 0.6, 0.65, 0.9))
    assert line.startswith("On validation queries, stage 1 (60.0) is below exact search (70.0): try attention=linear")
    assert remarks(results(0.7, 0.7, 0.6, 0.65, 0.9)) == []  # where exact search is the oracle, nothing is better
    assert remarks({**bad, "val": good["val"]}) == []  # test figures advise nothing
    assert remarks(results(0.61, 0.61, 0.6, 0.598, 0.9)) == []  # nor does noise
    law = {"dispersion": 0.2, "asked_again": 1.5, "ignored": ["log_count", "support"]}
    (line,) = remarks({**results(0.5, None, 0.6, 0.7, 0.9), "log": law})
    assert line.startswith("The reranker ignores log_count, support: ")
    assert remarks({**results(0.5, None, 0.6, 0.7, 0.9), "log": {**law, "ignored": []}}) == []
