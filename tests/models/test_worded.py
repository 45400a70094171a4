"""Both stages with words, against dense sums over all rows; forward, loss and search of a pipeline agree."""

import copy
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvf.errors import InputError
from nvf.models import attention as module
from nvf.models.ann_index import build_index
from nvf.models.attention import AT_ONCE, SoftAttention
from nvf.models.evidence import FEATURES, OF_WORDS, Evidence
from nvf.models.memory import VectorMemory, unit
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import EvidenceReranker, Reranker
from nvf.models.words import Words, WordScores

LISTS, COUNT = 6, 7  # rows that words list, and queries


def queries(count: int = COUNT) -> Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(1)), dim=-1)


def some_words(rows: int, count: int = COUNT, listed: int = LISTS) -> WordScores:
    """Different rows for each query, the last of them padding; some with one score alone, a query with none at all."""
    generator = torch.Generator().manual_seed(2)
    places = torch.stack([torch.randperm(rows, generator=generator)[:listed] for _ in range(count)])
    scores = 3 * torch.rand(count, listed, 2, generator=generator)
    scores[:, 0, 0] = scores[:, 1, 1] = 0
    places[:, -1], scores[:, -1] = -1, 0
    places[2], scores[2] = -1, 0
    return WordScores(places, scores)


def dense(words: WordScores, rows: int) -> Tensor:
    """The scores of all rows, (B, N, 2)."""
    every = torch.zeros(len(words.rows), rows, 2, dtype=torch.float64)
    for query, (places, scores) in enumerate(zip(words.rows.tolist(), words.scores.double(), strict=True)):
        for place, score in zip(places, scores, strict=True):
            if place >= 0:
                every[query, place] = score
    return every


def made(rows: int, *, weights: tuple[float, float] = (0.05, 0.02), **settings: object) -> SoftAttention:
    """A stage 1 of which nothing is left at zero, in float64."""
    torch.manual_seed(0)
    memory = VectorMemory.synthetic(rows=rows, dim=8, seed=0)
    attention = SoftAttention(memory, transform="linear", worded=True, beta=6.0, **settings)
    with torch.no_grad():
        for tensor in (*attention.parameters(), *([] if attention.bias is None else [attention.bias])):
            tensor += 0.1 * torch.randn(tensor.shape)
        attention.word_weights.copy_(torch.tensor(weights))
    return attention.double()


def all_logits(attention: SoftAttention, asked: Tensor, words: WordScores) -> Tensor:
    """beta (z K^T + b + s w), (B, N), from all of it."""
    keys = attention.memory.rows
    if attention.delta is not None:
        keys = F.normalize(keys + attention.delta, dim=-1)
    scores = F.normalize(attention.transform(asked.double()), dim=-1) @ keys.T
    if attention.bias is not None:
        scores = scores + attention.bias
    return attention.log_beta.exp() * (scores + dense(words, len(keys)) @ attention.word_weights)


def targets_of(words: WordScores, rows: int) -> Tensor:
    """A listed row and another one for each query, now and then padding."""
    targets = torch.stack([words.rows[:, 2].clamp(min=0), torch.arange(COUNT) + rows // 2], dim=-1)
    targets[1::3, 0] = -1
    return targets


KINDS = [{}, {"biased": True}, {"keys": "learned"}, {"biased": True, "keys": "learned"}]


@pytest.mark.parametrize("rows", [30, AT_ONCE + 50])
@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("weights", [(0.05, 0.02), (0.0, 0.3), (0.0, 0.0), (1e-18, 0.0), (9.0, 0.0)])
def test_logits_loss_and_total_are_those_of_all_rows(rows: int, settings: dict, weights: tuple[float, float]) -> None:
    attention, words = made(rows, weights=weights, **settings), some_words(rows)
    asked, targets = queries().double(), targets_of(words, rows)
    expected = all_logits(attention, asked, words)
    log_probs = expected.log_softmax(dim=-1)
    right = [[row for row in some if row >= 0] for some in targets.tolist()]
    loss = -torch.stack([of[rows].mean() for of, rows in zip(log_probs, right, strict=True)]).mean()
    torch.testing.assert_close(attention(asked, words), expected)
    torch.testing.assert_close(attention.loss(asked, targets, words), loss)
    total = attention.total(attention.project(asked), words)
    torch.testing.assert_close(total, expected.logsumexp(dim=-1))
    torch.testing.assert_close(attention.answer(asked, words), expected.softmax(dim=-1) @ attention.memory.rows)
    listed = attention.logits_of(attention.project(asked), targets, words)
    padded = expected.gather(-1, targets.clamp(min=0)).masked_fill(targets < 0, -math.inf)
    torch.testing.assert_close(listed, padded)
    weights_of = [*attention.parameters()]
    for mine, theirs in ((attention.loss(asked, targets, words), loss), (total.sum(), expected.logsumexp(-1).sum())):
        found, right_ones = (torch.autograd.grad(value, weights_of, retain_graph=True) for value in (mine, theirs))
        for gradient, of_all in zip(found, right_ones, strict=True):
            torch.testing.assert_close(gradient, of_all)


@pytest.mark.parametrize("settings", KINDS, ids=str)
@pytest.mark.parametrize("k", [1, 4, 30])
@pytest.mark.parametrize("weights", [(0.01, 0.0), (0.3, 0.2), (0.0, 0.0)])
def test_candidates_are_the_best_of_all_rows(k: int, settings: dict, weights: tuple[float, float]) -> None:
    attention, words = made(30, weights=weights, **settings), some_words(30)
    top = attention.candidates(queries(), k, logsumexp=True, words=words)
    expected = all_logits(attention, queries(), words)
    best = expected.sort(dim=-1, descending=True, stable=True)
    assert torch.equal(top.rows, best.indices[:, :k])
    torch.testing.assert_close(top.scores, best.values[:, :k])
    torch.testing.assert_close(top.logsumexp, expected.logsumexp(dim=-1))
    alone = attention.candidates(queries(), k).rows
    assert torch.equal(top.rows, alone) == (weights == (0.0, 0.0) or torch.equal(best.indices[:, :k], alone))


def test_equal_sums_come_by_row_and_blocks_of_queries_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = VectorMemory(torch.eye(8))
    attention = SoftAttention(memory, transform="identity", worded=True, beta=1.0)
    attention.word_weights.fill_(1.0)
    words = WordScores(torch.tensor([[6, 3, 1]]), torch.tensor([[[2.0, 0], [2.0, 0], [0.5, 1.5]]]))
    assert attention.candidates(torch.eye(8)[:1], 5, words=words).rows.tolist() == [[1, 3, 6, 0, 2]]
    attention, words = made(30), some_words(30)
    expected = attention.candidates(queries(), 5, logsumexp=True, words=words)
    monkeypatch.setattr(module, "LISTED_AT_ONCE", 2 * LISTS * 8)
    for mine, theirs in zip(attention.candidates(queries(), 5, logsumexp=True, words=words), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


class Watched(SoftAttention):
    """A stage 1 that notes how many keys it has gathered at once."""

    held = 0

    def keys_of(self, rows: Tensor) -> Tensor:
        self.held = max(self.held, rows.numel())
        return super().keys_of(rows)


def test_the_keys_of_listed_rows_are_held_in_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = Watched(VectorMemory.synthetic(rows=300, dim=8, seed=0), transform="identity", worded=True)
    monkeypatch.setattr(module, "LISTED_AT_ONCE", 7 * 40 * 8)
    attention.candidates(queries(100), 5, logsumexp=True, words=some_words(300, count=100, listed=40))
    assert attention.held == 7 * 40


def test_without_words_or_weights_nothing_changes() -> None:
    attention, words = made(30), some_words(30)
    assert not torch.equal(attention(queries(), words), attention(queries()))
    none = WordScores(torch.full((COUNT, 3), -1), torch.zeros(COUNT, 3, 2))
    plain = copy.deepcopy(attention)
    plain.word_weights = None
    targets = targets_of(words, 30)
    for model, given in ((attention, None), (attention, none), (plain, words)):
        torch.testing.assert_close(model(queries(), given), plain(queries()))
        torch.testing.assert_close(model.loss(queries(), targets, given), plain.loss(queries(), targets))
        assert torch.equal(model.candidates(queries(), 5, words=given).rows, plain.candidates(queries(), 5).rows)


FIGS = ["apple fig", "banana", "cherry pie", "date", "elder flower", "fig", "grape", "hazel nut", "iris", "lemon fig"]


def worded(kind: str, rows: int = 30, *, dtype: torch.dtype = torch.float32) -> Pipeline:
    """A pipeline with texts of which nothing is left at zero."""
    pytest.importorskip("bm25s")
    attention = made(rows, biased=True, keys="learned").to(dtype)
    generator = torch.Generator().manual_seed(3)
    log, answers = queries(20), torch.randint(rows, (20, 1), generator=generator)
    evidence = Evidence.gather(attention.memory, log.to(dtype), answers, worded=True) if kind == "evidence" else None
    if evidence is None:
        reranker = Reranker(8, kind="residual", hidden=(8, 8))
    else:
        reranker = EvidenceReranker(len(evidence.features), hidden=(8, 8))
    pipeline = Pipeline(attention, reranker, k=4, evidence=evidence).to(dtype)
    with torch.no_grad():
        for parameter in pipeline.reranker.parameters():
            parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    texts = [f"{FIGS[row % 10]} number{row}" for row in range(rows)]
    pipeline.words = Words.gather(texts, [f"{FIGS[row % 10]} please" for row in range(20)], answers)
    return pipeline.eval()


ASKED = ["fig please", "number7", "", "xyzzy", "iris number12", "pie", "banana number1"]


@pytest.mark.parametrize("kind", ["residual", "evidence"])
@torch.no_grad()
def test_forward_loss_and_search_agree(kind: str) -> None:
    pipeline = worded(kind, dtype=torch.float64)
    words = pipeline.words.scores(ASKED)
    found = pipeline(queries(), words)
    torch.testing.assert_close(found.logits, all_logits(pipeline.attention, queries(), words))
    torch.testing.assert_close(found.log_probs.exp().sum(dim=-1), torch.ones(COUNT, dtype=torch.float64))
    hits = pipeline.search(queries(), 30, texts=ASKED)
    assert torch.equal(hits.rows, found.ranking.sort(dim=-1, descending=True, stable=True).indices)
    torch.testing.assert_close(hits.probabilities, found.log_probs.exp().gather(-1, hits.rows).float())
    for row in range(30):
        targets = torch.full((COUNT, 1), row)
        both, alone = pipeline.loss(queries(), targets, words)
        torch.testing.assert_close(both, -found.log_probs[:, row].mean())
        torch.testing.assert_close(alone, -found.logits.log_softmax(dim=-1)[:, row].mean())
    assert not torch.equal(hits.rows, pipeline.search(queries(), 30).rows)


@pytest.mark.parametrize("relaxation", [None, 0.7])
@pytest.mark.parametrize("kind", ["residual", "evidence"])
def test_the_loss_has_the_gradients_of_the_distribution(kind: str, relaxation: float | None) -> None:
    pipeline = worded(kind, dtype=torch.float64)
    words, asked = pipeline.words.scores(ASKED), queries().double().requires_grad_()
    targets = targets_of(some_words(30), 30)
    found = pipeline(asked, words, relaxation=relaxation).log_probs
    right = [[row for row in some if row >= 0] for some in targets.tolist()]
    expected = -torch.stack([of[rows].mean() for of, rows in zip(found, right, strict=True)]).mean()
    loss = pipeline.loss(asked, targets, words, relaxation=relaxation)[0]
    torch.testing.assert_close(loss, expected)
    given = [asked, *pipeline.parameters()]
    for mine, theirs in zip(torch.autograd.grad(loss, given), torch.autograd.grad(expected, given), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("kind", ["residual", "evidence"])
def test_a_query_without_texts_is_one_whose_words_match_nothing(kind: str) -> None:
    pipeline = worded(kind)
    without, with_none = pipeline.search(queries(), 9), pipeline.search(queries(), 9, texts=["", "xyzzy"] + [""] * 5)
    assert torch.equal(without.rows, with_none.rows)
    torch.testing.assert_close(without.probabilities, with_none.probabilities)
    mixed = pipeline.search(queries(), 9, texts=ASKED)
    assert torch.equal(mixed.rows[2:4], without.rows[2:4])
    assert not torch.equal(mixed.rows, without.rows)
    one_by_one = [pipeline.search(queries()[i : i + 1], 9, texts=ASKED[i : i + 1]).rows for i in range(COUNT)]
    assert torch.equal(torch.cat(one_by_one), mixed.rows)
    many = pipeline.search(queries().repeat(80, 1), 9, texts=ASKED * 80)  # more than are searched at once
    assert torch.equal(many.rows, mixed.rows.repeat(80, 1))
    assert pipeline.search(queries()[:0], 9, texts=[]).rows.shape == (0, 9)
    as_numpy = pipeline.search(queries().numpy(), 9, texts=ASKED)
    assert isinstance(as_numpy.rows, np.ndarray)
    assert as_numpy.rows.tolist() == mixed.rows.tolist()


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        (ASKED[:-1], "6 texts are not one string for each of 7 queries"),
        ([*ASKED[:-1], None], "7 texts are not one string for each"),
        ("1234567", "7 texts are not one string for each"),
    ],
)
def test_texts_that_do_not_fit_are_refused(texts: list[str], message: str) -> None:
    with pytest.raises(InputError, match=message):
        worded("residual").search(queries(), texts=texts)


def test_a_pipeline_without_texts_takes_none(pipeline: Pipeline) -> None:
    with pytest.raises(InputError, match="fitted without texts, or bm25s is missing; search without texts"):
        pipeline.search(queries(), texts=ASKED)


@pytest.mark.parametrize("kind", ["residual", "evidence"])
def test_a_saved_pipeline_searches_with_words(kind: str, tmp_path: Path) -> None:
    pipeline = worded(kind)
    pipeline.words.settings["stopwords"] = ["für"]  # a word that is no plain ASCII
    for _ in range(2):  # the second replaces the first
        pipeline.save(tmp_path / "pipeline")
    loaded = Pipeline.load(tmp_path / "pipeline")
    for texts in (ASKED, None):
        ours, theirs = (model.search(queries(), 9, texts=texts) for model in (pipeline, loaded))
        assert torch.equal(ours.rows, theirs.rows)
        assert torch.equal(ours.probabilities, theirs.probabilities)
    pipeline.words = None
    pipeline.save(tmp_path / "pipeline")
    assert Pipeline.load(tmp_path / "pipeline").words is None
    assert not (tmp_path / "pipeline" / "words").exists()


def test_without_bm25s_a_saved_pipeline_searches_by_vectors(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    pipeline = worded("evidence")
    pipeline.save(tmp_path / "pipeline")
    monkeypatch.setitem(sys.modules, "bm25s", None)
    loaded = Pipeline.load(tmp_path / "pipeline")
    (line,) = caplog.messages
    assert "pip install -e '.[lexical]'" in line
    assert torch.equal(loaded.search(queries(), 9).rows, pipeline.search(queries(), 9).rows)
    with pytest.raises(InputError, match="bm25s is missing"):
        loaded.search(queries(), texts=ASKED)


@pytest.mark.parametrize(("kind", "how"), [("hnsw", {"m": 8, "ef_search": 64}), ("ivf", {"nlist": 4, "nprobe": 1})])
@torch.no_grad()
def test_an_index_answers_with_its_best_rows_and_those_of_the_words(kind: str, how: dict[str, int]) -> None:
    pytest.importorskip("faiss")
    pipeline = worded("evidence", rows=2000)
    attention, texts = pipeline.attention, [*ASKED[:2], "number1999", "xyzzy", *ASKED[4:]]
    attention.word_weights.copy_(torch.tensor([0.3, 0.1]))
    pipeline.requires_grad_(False).index = build_index(pipeline.keys(), kind, **how)
    words = pipeline.words.scores(texts)
    _, found = pipeline.index.search(attention.project(queries()), 6)
    every = all_logits(copy.deepcopy(attention).double(), queries(), words)
    hits = pipeline.search(queries(), 6, texts=texts)
    for query in range(COUNT):
        known = sorted({*found[query].tolist(), *words.rows[query].tolist()} - {-1})
        best = [known[place] for place in every[query][known].sort(descending=True, stable=True).indices[:6]]
        assert {*hits.rows[query].tolist()} == {*best}
        assert hits.rows[query].tolist()[4:] == best[4:]
    assert 1999 in hits.rows[2].tolist()
    assert float(hits.probabilities.max()) <= 1


@torch.no_grad()
def test_evidence_of_words_equals_a_loop() -> None:
    pipeline = worded("evidence", dtype=torch.float64)
    words = pipeline.words.scores(ASKED)
    words = WordScores(words.rows, words.scores.double())
    top = pipeline.attention.candidates(queries(), 5, logsumexp=True, words=words)
    found = pipeline.evidence(pipeline.attention, unit(queries(), torch.float64), top, words)
    scores, without = dense(words, 30), pipeline.attention(queries())
    for query in range(COUNT):
        for place, row in enumerate(top.rows[query].tolist()):
            expected = [float(without[query, row])]
            for channel in range(2):
                of_all = scores[query, :, channel].tolist()
                better = sum(other > of_all[row] for other in of_all)
                share = of_all[row] / max(of_all) if max(of_all) else 0.0
                expected += [of_all[row], share, math.log1p(better)]
            assert found[query, place, len(FEATURES) :].tolist() == pytest.approx(expected)
    none = pipeline.evidence(pipeline.attention, unit(queries(), torch.float64), top)
    assert none.shape == found.shape
    assert not none[..., len(FEATURES) + 1 :].any()
    assert pipeline.evidence.features == (*FEATURES, *OF_WORDS)
