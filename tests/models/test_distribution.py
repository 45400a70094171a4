"""The relaxed distribution against a sum over candidate sets; every gradient against differences."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import estimators
from nvf.models.attention import SoftAttention, attention_loss
from nvf.models.distribution import exact, relaxed
from nvf.models.evidence import FEATURES, Evidence
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline
from nvf.models.queries_and_keys import TRANSFORMS
from nvf.models.reranker import EvidenceReranker, Reranker


def random(rows: int, scored: int, seed: int = 0, sharpness: float = 3.0) -> tuple[Tensor, Tensor, Tensor]:
    """Log-attention over rows, the best of them, and their scores, for five queries."""
    generator = torch.Generator().manual_seed(seed)
    logits = sharpness * torch.randn(5, rows, generator=generator, dtype=torch.float64)
    scores = sharpness * torch.randn(5, scored, generator=generator, dtype=torch.float64)
    log_attention = logits.log_softmax(dim=-1)
    return log_attention, log_attention.topk(scored).indices, scores


@pytest.mark.parametrize("temperature", [0.05, 0.7, 4.0])
def test_relaxed_is_the_average_over_candidate_sets(temperature: float) -> None:
    log_attention, rows, scores = random(20, 8)
    expected = torch.zeros_like(log_attention)
    for query in range(5):
        best = log_attention[query, rows[query]].tolist()
        middle = (best[3] + best[4]) / 2
        within = [1.0, *(1 / (1 + math.exp(-(value - middle) / temperature)) for value in best), 0.0]
        for first in range(9):  # the first so many are the candidates; beyond the eighth row there is no more
            weight = within[first] - within[first + 1] if first < 8 else within[8]
            part = log_attention[query : query + 1]
            if first:
                part = exact(part, rows[query : query + 1, :first], scores[query : query + 1, :first])
            expected[query] += weight * part[0].exp()
    found = relaxed(log_attention, rows, scores, k=4, temperature=temperature)
    torch.testing.assert_close(found.exp(), expected)


@given(
    seed=st.integers(0, 10_000),
    scored=st.integers(2, 20),
    temperature=st.floats(1e-4, 100),
    sharpness=st.floats(0, 200),
)
@settings(max_examples=50, deadline=None)
def test_relaxed_sums_to_one(seed: int, scored: int, temperature: float, sharpness: float) -> None:
    given = random(20, scored, seed, sharpness)
    found = relaxed(*given, k=max(1, scored // 2), temperature=temperature)
    torch.testing.assert_close(found.logsumexp(dim=-1), torch.zeros(5, dtype=torch.float64), atol=1e-9, rtol=0)


def test_relaxed_tends_to_exact() -> None:
    log_attention, rows, scores = random(20, 8)
    found = relaxed(log_attention, rows, scores, k=4, temperature=1e-3)
    torch.testing.assert_close(found, exact(log_attention, rows[:, :4], scores[:, :4]))


def test_relaxed_does_not_jump_where_rows_change_places() -> None:
    scores = torch.tensor([[0.0, 3.0, -2.0, 1.0]], dtype=torch.float64)  # of rows 0 to 3
    found = []
    for above, below in ((1, 2), (2, 1)):  # the second and the third best, k = 2
        logits = torch.tensor([[2.0, 1.0, 1.0, 0.0, -1.0]], dtype=torch.float64)
        logits[0, above] += 1e-9
        rows = torch.tensor([[0, above, below, 3]])
        log_attention = logits.log_softmax(dim=-1)
        found.append(relaxed(log_attention, rows, scores.gather(-1, rows), k=2, temperature=0.5))
        sharp = exact(log_attention, rows[:, :2], scores.gather(-1, rows[:, :2]))
        found.append(sharp)
    torch.testing.assert_close(found[0], found[2], atol=1e-8, rtol=0)
    assert (found[1] - found[3]).abs().max() > 0.1


def test_ties_leave_every_gradient_finite() -> None:
    logits, scores = torch.zeros(2, 9, requires_grad=True), torch.zeros(2, 6, requires_grad=True)
    log_attention = logits.log_softmax(dim=-1)
    found = relaxed(log_attention, log_attention.topk(6).indices, scores, k=3, temperature=0.5)
    gradients = torch.autograd.grad(found[:, 0].sum(), (logits, scores))
    assert all(bool(gradient.isfinite().all()) for gradient in gradients)


def whole(transform: str, kind: str, keys: str) -> Pipeline:
    """A pipeline in float64 whose every weight matters."""
    torch.manual_seed(0)
    memory = VectorMemory(torch.randn(12, 4))
    attention = SoftAttention(memory, transform=transform, keys=keys, biased=keys == "learned", beta=3.0)
    if kind == "evidence":
        evidence = Evidence.gather(memory, torch.randn(40, 4), torch.randint(12, (40, 1)))
        reranker = EvidenceReranker(len(FEATURES), hidden=(6, 5))
        top = attention.candidates(evidence.queries, 3, logsumexp=True)
        reranker.standardise(evidence(attention, evidence.queries, top))
        pipeline = Pipeline(attention, reranker, k=3, evidence=evidence)
    else:
        pipeline = Pipeline(attention, Reranker(4, kind=kind, hidden=(6, 5)), k=3)
    with torch.no_grad():
        for tensor in [*pipeline.parameters(), *([] if attention.bias is None else [attention.bias])]:
            tensor += 0.2 * torch.randn_like(tensor)
    return pipeline.double().eval()


def asked(generator_seed: int = 1) -> Tensor:
    generator = torch.Generator().manual_seed(generator_seed)
    return torch.randn(3, 4, generator=generator, dtype=torch.float64).requires_grad_()


PATHS = [
    *((transform, kind, "frozen") for transform in TRANSFORMS for kind in ("mlp", "residual")),
    *((transform, "evidence", "learned") for transform in TRANSFORMS),
    ("linear", "residual", "learned"),
    ("linear", "evidence", "frozen"),
]


@pytest.mark.parametrize("relaxation", [None, 0.7])
@pytest.mark.parametrize(("transform", "kind", "keys"), PATHS, ids=["-".join(path) for path in PATHS])
def test_gradients_are_exact_on_the_query_and_on_every_parameter(
    transform: str, kind: str, keys: str, relaxation: float | None
) -> None:
    pipeline = whole(transform, kind, keys)
    names, parameters = zip(*pipeline.named_parameters(), strict=True)
    targets = pipeline(asked()).candidates[:, :2].clone()  # or the reranker would have nothing to learn
    targets[::2, 1] = -1

    def outputs(queries: Tensor, *values: Tensor) -> tuple[Tensor, Tensor]:
        weights = dict(zip(names, values, strict=True))
        found = torch.func.functional_call(pipeline, weights, (queries,), {"relaxation": relaxation})
        assert found.answer is not None
        return attention_loss(found.log_probs, targets), found.answer

    inputs = (asked(), *parameters)
    assert torch.autograd.gradcheck(outputs, inputs, fast_mode=True)  # in random directions
    gradients = torch.autograd.grad(outputs(*inputs)[0], inputs)
    # A bias before units that are on for all candidates adds one constant to their scores: no share depends on it.
    named = zip(("query", *names), gradients, strict=True)
    assert all(gradient.norm() > 1e-9 for name, gradient in named if not name.endswith("bias"))


@pytest.mark.parametrize("kind", ["mlp", "residual", "evidence"])
def test_the_exact_gradient_is_that_of_central_differences(kind: str) -> None:
    pipeline, step = whole("residual", kind, "learned"), 1e-5
    targets = torch.tensor([[0], [5], [11]])
    names, parameters = zip(*pipeline.named_parameters(), strict=True)
    inputs = [asked().detach().requires_grad_(), *parameters]

    def loss() -> Tensor:
        return attention_loss(pipeline(inputs[0]).log_probs, targets)

    found = torch.cat([gradient.flatten() for gradient in torch.autograd.grad(loss(), inputs)])
    differences = []
    with torch.no_grad():
        for tensor in inputs:
            for place in range(tensor.numel()):
                flat, ends = tensor.view(-1), []
                start = float(flat[place])
                for sign in (1, -1):
                    flat[place] = start + sign * step
                    ends.append(float(loss()))
                flat[place] = start
                differences.append((ends[0] - ends[1]) / (2 * step))
    expected = torch.tensor(differences, dtype=torch.float64)
    assert len(names) > 5
    assert float((found - expected).norm() / expected.norm()) <= 1e-5


@pytest.mark.slow
def test_relaxed_trades_the_bias_of_exact_for_variance() -> None:
    pipeline, count = estimators.case(), 40_000
    true = estimators.truth(pipeline, count)
    sharp, smooth, smoother = (estimators.estimate(pipeline, count, t) for t in (None, 0.1, 3.0))

    def biased(found: estimators.Estimate) -> bool:
        return abs(found.mean - true.mean) > 4 * math.hypot(found.error, true.error)

    assert biased(sharp)  # it does not see targets come to be candidates
    assert not biased(smooth)
    assert biased(smoother)  # it sees them, but through a fog
    assert smooth.deviation > 1.3 * sharp.deviation
