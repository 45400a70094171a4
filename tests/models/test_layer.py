"""A pipeline as a layer: any leading shape, torch.func, torch.compile, autocast, frozen or trainable."""

import copy
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvf.errors import InputError
from nvf.models.attention import SoftAttention, attention_loss
from nvf.models.evidence import FEATURES, Evidence
from nvf.models.memory import VectorMemory, unit
from nvf.models.pipeline import Pipeline, Retrieval
from nvf.models.reranker import EvidenceReranker, Reranker


@pytest.fixture(params=["residual", "evidence"])
def layer(request: pytest.FixtureRequest) -> Pipeline:
    """Thirty rows of eight dimensions, k = 4."""
    return request.getfixturevalue({"residual": "pipeline", "evidence": "weighing"}[request.param])


def asked(*shape: int) -> Tensor:
    return torch.randn(*shape, 8, generator=torch.Generator().manual_seed(2))


def close(found: Retrieval, expected: Retrieval) -> None:
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-4, atol=1e-5)


def test_the_answer_weighs_the_rows_by_their_probabilities(layer: Pipeline) -> None:
    found = layer(asked(5))
    expected = sum(p.unsqueeze(-1) * row for p, row in zip(found.log_probs.exp().T, layer.memory.rows, strict=True))
    torch.testing.assert_close(found.answer, expected)
    assert layer(asked(5), answer=False).answer is None


def test_any_leading_shape_and_any_length(layer: Pipeline) -> None:
    expected = layer(asked(6))
    for shape in ((6,), (2, 3), (3, 1, 2)):
        found = layer(3 * asked(6).view(*shape, 8))
        assert found.answer is not None
        assert found.answer.shape == (*shape, 8)
        assert found.candidates.shape == found.scores.shape == (*shape, 4)
        assert found.log_probs.shape == found.logits.shape == (*shape, 30)
        close(Retrieval(*(part.flatten(0, -2) for part in found)), expected)
    close(layer(asked(6)[2]), Retrieval(*(part[2] for part in expected)))
    assert layer(asked(0)).log_probs.shape == (0, 30)


@pytest.mark.parametrize(
    ("queries", "relaxation", "message"),
    [
        (torch.ones(2, 7), None, r"queries have shape \(2, 7\) .*; give floats, \(\.\.\., 8\)"),
        (torch.tensor(1.0), None, r"queries have shape \(\)"),
        (torch.ones(2, 8), 0.0, "relaxation=0.0 is not a number above 0; None is exact"),
    ],
)
def test_what_does_not_fit_is_refused(
    pipeline: Pipeline, queries: Tensor, relaxation: float | None, message: str
) -> None:
    with pytest.raises(InputError, match=message):
        pipeline(queries, relaxation=relaxation)


def test_search_finds_what_the_layer_ranks_first(layer: Pipeline) -> None:
    with torch.no_grad():
        found = layer(3 * asked(6))
    hits = layer.search(3 * asked(6))
    assert torch.equal(hits.rows, found.ranking.topk(4).indices)
    torch.testing.assert_close(hits.probabilities, found.log_probs.gather(-1, hits.rows).exp())


@given(seed=st.integers(0, 10_000), k=st.integers(2, 6), length=st.floats(1e-2, 1e2))
@settings(max_examples=50, deadline=None)
@torch.no_grad()
def test_search_and_layer_take_the_same_candidates_among_exact_ties(seed: int, k: int, length: float) -> None:
    rows = torch.tensor([row for row in product((-1.0, 0.0, 1.0), repeat=4) if any(row)])
    asked = torch.randint(-9, 10, (200, 4), generator=torch.Generator().manual_seed(seed)).float()
    asked = length * asked[asked.any(dim=-1)]
    cosines = (unit(asked.double(), torch.float64) @ unit(rows.double(), torch.float64).T).sort(dim=-1).values
    asked = asked[cosines[:, -1] - cosines[:, -1 - k] > 1e-6]  # else a row outside is as probable as all candidates
    assume(len(asked))
    pipeline = Pipeline(SoftAttention(VectorMemory(rows), transform="identity"), Reranker(4, kind="residual"), k=k)
    pipeline.reranker.evidence.zero_()  # all candidates score alike: they are the k most probable rows
    hits = pipeline.search(asked)
    assert torch.equal(hits.rows.sort(dim=-1).values, pipeline.eval()(asked).candidates.sort(dim=-1).values)


@pytest.mark.parametrize("length", [1e-30, 1e30])
def test_memory_and_attention_take_queries_of_extreme_length(layer: Pipeline, length: float) -> None:
    expected = layer.memory.search(asked(6), 4)
    torch.testing.assert_close(layer.memory.search(length * asked(6), 4), expected)
    attention = SoftAttention(layer.memory, transform="identity")
    torch.testing.assert_close(attention(length * asked(6)), attention(asked(6)))


@pytest.mark.parametrize("cast", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", ["mlp", "residual", "evidence"])
def test_every_float_type_of_weights_searches_and_learns(
    kind: str, default: torch.dtype, cast: torch.dtype, tmp_path
) -> None:
    torch.manual_seed(0)
    vectors, log, queries = torch.randn(30, 8), unit(torch.randn(40, 8)), torch.randn(20, 8)
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        memory, evidence, reranker = VectorMemory(vectors), None, None
        if kind == "evidence":
            evidence, reranker = (
                Evidence.gather(memory, log, torch.arange(40)[:, None] % 30),
                EvidenceReranker(len(FEATURES)),
            )
        attention = SoftAttention(memory, transform="linear")
        pipeline = Pipeline(attention, reranker or Reranker(8, kind=kind), k=30, evidence=evidence).eval()
        expected = pipeline.search(queries)  # all rows are candidates: rounding chooses none
        assert expected.probabilities.dtype == torch.float32
        pipeline.to(cast)
        found = pipeline(queries)
        sum(pipeline.loss(queries, found.candidates[:, :1])).backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in pipeline.attention.parameters())
        hits = pipeline.search(queries)
        near = 0.1 if cast.itemsize == 2 else 1e-5
        by_row = torch.zeros(20, 30).scatter(-1, hits.rows, hits.probabilities.to(default))
        torch.testing.assert_close(
            by_row.gather(-1, expected.rows), expected.probabilities.to(default), atol=near, rtol=0
        )
        pipeline.save(tmp_path / "pipeline")
        assert Pipeline.load(tmp_path / "pipeline").search(queries).rows.shape == (20, 30)
    finally:
        torch.set_default_dtype(before)


@pytest.mark.parametrize("grad", [True, False])
def test_vmap_over_queries(layer: Pipeline, grad: bool) -> None:
    with torch.set_grad_enabled(grad):
        close(torch.func.vmap(layer)(asked(6)), layer(asked(6)))
        close(layer(asked(6)), copy.deepcopy(layer)(asked(6)))  # the transform leaves nothing behind


def test_the_jacobian_forward_and_backward(layer: Pipeline) -> None:
    def answer(query: Tensor) -> Tensor:
        return layer(query).answer

    backward = torch.func.vmap(torch.func.jacrev(answer))(asked(3))
    forward = torch.func.vmap(torch.func.jacfwd(answer))(asked(3))
    rows = [[torch.autograd.grad(answer(q)[i], q)[0] for i in range(8)] for q in asked(3).requires_grad_().unbind()]
    expected = torch.stack([torch.stack(row) for row in rows])
    torch.testing.assert_close(backward, expected, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(forward, expected, rtol=1e-4, atol=1e-5)


def test_gradients_by_sample_and_an_ensemble_of_weights(layer: Pipeline) -> None:
    weights = dict(layer.named_parameters())

    def loss(weights: dict[str, Tensor], query: Tensor) -> Tensor:
        return -torch.func.functional_call(layer, weights, (query,)).log_probs[3]

    by_sample = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(weights, asked(4))
    (-layer(asked(4)).log_probs[:, 3]).sum().backward()
    for name, parameter in layer.named_parameters():
        torch.testing.assert_close(by_sample[name].sum(dim=0), parameter.grad, rtol=1e-3, atol=1e-5)

    other = copy.deepcopy(layer)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter *= 1.1
    stacked, _ = torch.func.stack_module_state([layer, other])
    queries = asked(4)

    def log_probs(weights: dict[str, Tensor]) -> Tensor:
        return torch.func.functional_call(layer, weights, (queries,), {"answer": False}).log_probs

    for grad in (True, False):
        with torch.set_grad_enabled(grad):
            both = torch.func.vmap(log_probs)(stacked)
            for found, model in zip(both, (layer, other), strict=True):
                torch.testing.assert_close(found, model(asked(4)).log_probs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("relaxation", [None, pytest.param(0.5, marks=pytest.mark.slow)])
def test_it_compiles_as_one_graph(layer: Pipeline, relaxation: float | None) -> None:
    torch.compiler.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    grown, found = (asked(5).requires_grad_() for _ in range(2))
    mine, expected = (model(q, relaxation=relaxation) for model, q in ((compiled, found), (layer, grown)))
    close(mine, expected)
    for output, queries in ((mine, found), (expected, grown)):
        output.log_probs[:, 3].sum().backward()
        assert queries.grad is not None
    torch.testing.assert_close(found.grad, grown.grad, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        close(compiled(asked(5), relaxation=relaxation), expected)


def test_autocast_stays_near_and_sums_to_one(layer: Pipeline) -> None:
    queries = asked(5).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(queries)
    assert found.log_probs.dtype == torch.float32
    torch.testing.assert_close(found.log_probs.exp().sum(dim=-1), torch.ones(5))
    assert (found.log_probs - layer(asked(5)).log_probs).abs().max() < 0.2
    attention_loss(found.log_probs, torch.arange(5).unsqueeze(-1)).backward()
    assert queries.grad is not None
    assert queries.grad.isfinite().all()
    assert queries.grad.norm() > 0


def test_frozen_it_passes_gradients_on_and_takes_none(layer: Pipeline) -> None:
    expected = asked(5).requires_grad_()
    layer(expected).answer.square().sum().backward()
    layer.requires_grad_(False)
    layer.zero_grad()
    for inference_before in (True, False):  # what was computed there is of no use here
        if inference_before:
            with torch.inference_mode():
                layer(asked(5))
        queries = asked(5).requires_grad_()
        layer(queries).answer.square().sum().backward()
        torch.testing.assert_close(queries.grad, expected.grad)
    assert all(parameter.grad is None for parameter in layer.parameters())


def test_a_loaded_pipeline_is_frozen_until_it_is_asked_to_learn(layer: Pipeline, tmp_path) -> None:
    layer.save(tmp_path / "pipeline")
    loaded = Pipeline.load(tmp_path / "pipeline")
    assert not any(parameter.requires_grad for parameter in loaded.parameters())
    loaded.requires_grad_()
    loaded(asked(5)).log_probs[:, 0].sum().backward()
    layer(asked(5)).log_probs[:, 0].sum().backward()
    for mine, theirs in zip(loaded.parameters(), layer.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad)


def test_a_layer_in_the_middle_of_a_network_learns(pipeline: Pipeline) -> None:
    torch.manual_seed(0)
    pipeline.requires_grad_(False)
    network = torch.nn.Sequential(torch.nn.Linear(5, 8), torch.nn.Tanh())
    inputs, wanted = torch.randn(200, 5), pipeline.memory.rows[torch.arange(200) % 4]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    losses = []
    for _ in range(30):
        loss = F.mse_loss(pipeline(network(inputs)).answer, wanted)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
