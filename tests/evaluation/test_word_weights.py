"""The weights of words: no grid finds much better ones; noise has none, and nothing that misleads."""

import itertools
import warnings

import pytest
import torch

from nvf.data.queries import Noisy, QueryBatch
from nvf.evaluation.calibration import fit_words, quality
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.words import WordScores
from nvf.ops.random_streams import stream

ROWS = 50  # fewer than are compared, so that the loss is that over all rows


@pytest.fixture(autouse=True)
def _no_warnings() -> None:
    warnings.simplefilter("error")


def batch(kind: str, *, seed: int = 0, count: int = 400) -> QueryBatch:
    """Queries near their rows, with words of which the text, or the log, tells the target; noise; or words that lie."""
    source = Noisy(VectorMemory.synthetic(rows=ROWS, dim=8, seed=0), sigma=0.5)
    queries, targets, *_ = source.sample(count, stream(seed, "val"))
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(count, ROWS, 2, generator=generator)
    right = torch.arange(ROWS) == targets
    if kind == "lies":
        scores[right] = 0
    elif kind != "noise":
        channel = ["text", "log"].index(kind)
        scores[..., channel] += 0.7 * right
    listed = scores.sum(dim=-1).topk(20, dim=-1).indices  # now and then without the target
    return QueryBatch(queries, targets, WordScores(listed, scores.gather(1, listed.unsqueeze(-1).expand(-1, -1, 2))))


def exact() -> SoftAttention:
    return SoftAttention(VectorMemory.synthetic(rows=ROWS, dim=8, seed=0), transform="identity", beta=7.0)


def loss(cosines: torch.Tensor, batch: QueryBatch, *weights: float) -> float:
    every = torch.zeros(*cosines.shape, 2).scatter_add(
        1, batch.words.rows.unsqueeze(-1).expand(-1, -1, 2), batch.words.scores
    )
    scores = weights[0] * cosines + every @ torch.tensor(weights[1:])
    return float(torch.nn.functional.cross_entropy(scores, batch.targets[:, 0]))


@pytest.mark.parametrize("kind", ["text", "log"])
def test_no_grid_finds_better_weights(kind: str) -> None:
    held_out, attention = batch(kind), exact()
    before = quality(attention, held_out).float().mean()
    fit_words(attention, held_out)
    cosines = held_out.queries @ attention.memory.rows.T
    strengths, weights = torch.linspace(1, 12, 12).tolist(), torch.linspace(0, 8, 17).tolist()
    best = min(loss(cosines, held_out, *some) for some in itertools.product(strengths, weights, weights))
    text, log = attention.word_weights.tolist()
    found = min(loss(cosines, held_out, a, a * text, a * log) for a in torch.linspace(1, 12, 111).tolist())
    assert found <= best + 0.002
    assert [text, log].index(max(text, log)) == ["text", "log"].index(kind)
    assert quality(attention, held_out).float().mean() > before + 0.05
    fresh = batch(kind, seed=1)
    assert quality(attention, fresh).float().mean() > quality(exact(), fresh).float().mean() + 0.05


def test_padding_is_no_target() -> None:
    """Rows that are not listed and targets that a query lacks are both -1."""
    held_out, attention, same = batch("text"), exact(), exact()
    rows = torch.nn.functional.pad(held_out.words.rows, (0, 3), value=-1)
    words = WordScores(rows, torch.nn.functional.pad(held_out.words.scores, (0, 0, 0, 3)))
    targets = torch.nn.functional.pad(held_out.targets, (0, 1), value=-1)
    fit_words(attention, held_out._replace(words=words, targets=targets))
    fit_words(same, held_out)
    assert attention.word_weights[0] > 0
    torch.testing.assert_close(attention.word_weights, same.word_weights)


def test_words_that_lie_have_no_weight() -> None:
    attention, held_out = exact(), batch("lies")
    fit_words(attention, held_out)
    assert attention.word_weights.tolist() == [0, 0]
    assert torch.equal(attention(held_out.queries, held_out.words), exact()(held_out.queries))


def test_noise_hurts_nothing() -> None:
    lost, kept = 0.0, 0
    for seed in range(10):
        attention, fresh = exact(), batch("noise", seed=100 + seed)
        fit_words(attention, batch("noise", seed=seed))
        kept += attention.word_weights.tolist() != [0, 0]
        lost += float(quality(exact(), fresh).float().mean() - quality(attention, fresh).float().mean()) / 10
    assert lost < 0.005
    assert kept <= 6  # chance alone makes a small weight look good now and then


def test_a_channel_that_is_not_asked_for_has_no_weight() -> None:
    attention = exact()
    fit_words(attention, batch("log"), ("text",))
    assert attention.word_weights[1] == 0
    fit_words(attention, batch("log"), ("log",))
    assert attention.word_weights[0] == 0 < attention.word_weights[1]


def test_where_no_target_is_found_words_have_no_weight() -> None:
    memory = VectorMemory.synthetic(rows=500, dim=8, seed=0)
    attention, held_out = SoftAttention(memory, transform="identity"), batch("text", count=40)
    worst = attention(held_out.queries).argmin(dim=-1, keepdim=True)
    fit_words(attention, held_out._replace(targets=worst, words=WordScores(held_out.words.rows, held_out.words.scores)))
    assert attention.word_weights.tolist() == [0, 0]
