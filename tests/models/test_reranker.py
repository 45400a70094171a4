"""The factored first layer is the plain one; the residual start is stage 1's order."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F

from nvf.errors import InputError
from nvf.models.evidence import FEATURES
from nvf.models.reranker import RERANKERS, EvidenceReranker, Reranker, reranker_loss


def inputs(batch: int = 6, k: int = 4, dim: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    queries = F.normalize(torch.randn(batch, dim, generator=generator, dtype=torch.float64), dim=-1)
    candidates = F.normalize(torch.randn(batch, k, dim, generator=generator, dtype=torch.float64), dim=-1)
    logits = torch.randn(batch, k, generator=generator, dtype=torch.float64)
    return queries, candidates, logits, torch.tensor(20.0, dtype=torch.float64)


def concatenated(model: Reranker, queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
    """The first layer as it is written down."""
    spread = queries.unsqueeze(1).expand_as(candidates)
    return model.first(torch.cat([spread, candidates, spread - candidates, spread * candidates], dim=-1))


def test_the_factored_layer_equals_the_concatenation_in_value_and_gradient() -> None:
    torch.manual_seed(0)
    model = Reranker(8, hidden=(16, 8)).double()
    queries, candidates, *_ = (value.clone().requires_grad_() for value in inputs())
    wanted = [queries, candidates, *model.first.parameters()]
    upstream = torch.randn(6, 4, 16, dtype=torch.float64)
    factored, plain = (
        model.first_layer(queries, candidates).unflatten(0, (6, 4)),
        concatenated(model, queries, candidates),
    )
    torch.testing.assert_close(factored, plain)
    torch.testing.assert_close(
        torch.autograd.grad((factored * upstream).sum(), wanted), torch.autograd.grad((plain * upstream).sum(), wanted)
    )


@pytest.mark.parametrize("kind", RERANKERS)
def test_scores_equal_a_loop_over_candidates(kind: str) -> None:
    torch.manual_seed(0)
    model = Reranker(8, kind=kind, hidden=(16, 8)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.3 * torch.randn(parameter.shape, dtype=torch.float64)
    queries, candidates, logits, beta = inputs()
    scores = model(queries, candidates, logits, beta)
    assert scores.shape == (6, 4)
    for b in range(6):
        for j in range(4):
            q, c = queries[b], candidates[b, j]
            hidden = F.relu(model.first.weight @ torch.cat([q, c, q - c, q * c]) + model.first.bias)
            expected = model.rest[4].weight @ F.relu(model.rest[2].weight @ hidden + model.rest[2].bias)
            if kind == "residual":
                expected = expected + model.evidence[0] * logits[b, j] + model.evidence[1] * beta * torch.dot(q, c)
            torch.testing.assert_close(scores[b, j], expected.squeeze())


def test_the_residual_reranker_starts_at_the_logits() -> None:
    queries, candidates, logits, beta = inputs()
    model = Reranker(8, kind="residual").double()
    assert model.starts_at_stage_one
    assert torch.equal(model(queries, candidates, logits, beta), logits)


def test_dropout_is_for_training_alone() -> None:
    model = Reranker(8, dropout=0.5).double()
    assert not torch.equal(model(*inputs()), model(*inputs()))
    model.eval()
    assert torch.equal(model(*inputs()), model(*inputs()))


def test_the_loss_counts_valid_samples_alone() -> None:
    scores = torch.randn(4, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    labels = torch.tensor([[0, 1, 0], [0, 0, 0], [1, 0, 1], [0, 0, 0]]).bool()
    loss = reranker_loss(scores, labels)
    shares = scores.softmax(dim=-1)
    expected = -(shares[0, 1].log() + (shares[2, 0].log() + shares[2, 2].log()) / 2) / 2
    torch.testing.assert_close(loss, expected)
    (gradient,) = torch.autograd.grad(loss, scores)
    assert gradient[[1, 3]].abs().max() == 0
    assert gradient[[0, 2]].abs().min() > 0


def test_the_loss_of_several_right_candidates_wants_all_of_them() -> None:
    scores, labels = torch.zeros(1, 5, requires_grad=True), torch.tensor([[True, False, True, False, True]])
    for _ in range(300):
        (gradient,) = torch.autograd.grad(reranker_loss(scores, labels), scores)
        scores = (scores - 10 * gradient).detach().requires_grad_()
    torch.testing.assert_close(scores.softmax(dim=-1), labels / 3, atol=0.01, rtol=0)
    content = torch.tensor([[10.0, 0.0, 0.0, 0.0, 0.0]])  # with one of them
    assert reranker_loss(content, labels) > 6 > 1.2 > reranker_loss(scores, labels)


def test_one_right_candidate_has_the_bits_of_cross_entropy() -> None:
    scores = torch.randn(50, 7, generator=torch.Generator().manual_seed(0)).requires_grad_()
    place = torch.arange(50) % 7
    labels = F.one_hot(place, 7).bool()
    plain = (scores.logsumexp(dim=-1) - scores.masked_fill(~labels, -math.inf).logsumexp(dim=-1)).sum() / 50
    ours = reranker_loss(scores, labels)
    assert torch.equal(ours, plain)
    assert torch.equal(*(torch.autograd.grad(loss, scores)[0] for loss in (ours, plain)))


def test_a_batch_without_valid_samples_changes_nothing() -> None:
    scores = torch.randn(2, 3, requires_grad=True)
    loss = reranker_loss(scores, torch.zeros(2, 3, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, scores)
    assert loss == 0
    assert gradient.abs().max() == 0


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "tree"}, "reranker.kind=tree is unknown; choose one of mlp, residual"),
        ({"dropout": 1.0}, "reranker.dropout=1.0"),
        ({"hidden": [128]}, r"reranker.hidden=\[128\] is not two widths"),
        ({"hidden": [128, 0]}, "reranker.hidden=0"),
    ],
)
def test_bad_settings_are_refused(settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Reranker(8, **settings)


def test_weighing_evidence_starts_at_stage_one_and_ignores_scale() -> None:
    torch.manual_seed(0)
    evidence, logits = 5 + 3 * torch.randn(40, 6, 4), torch.randn(40, 6)
    evidence[..., 2] = 7.0  # never varies
    reranker = EvidenceReranker(4, hidden=(8, 8)).eval()
    reranker.standardise(evidence)
    assert torch.equal(reranker(logits, evidence), logits)
    with torch.no_grad():
        for parameter in reranker.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    other = copy.deepcopy(reranker)
    other.standardise(100 * evidence)
    torch.testing.assert_close(reranker(logits, evidence), other(logits, 100 * evidence), rtol=1e-4, atol=1e-4)
    x = (evidence[3, 2] - evidence.mean(dim=(0, 1))) / evidence.std(dim=(0, 1), correction=0).clamp(min=1e-6)
    x[2] = 0
    expected = logits[3, 2] + x @ reranker.weight + reranker.network(x)
    torch.testing.assert_close(reranker(logits, evidence)[3, 2], expected.squeeze(), rtol=1e-4, atol=1e-4)


def test_ignored_evidence_changes_no_score_and_no_weight() -> None:
    torch.manual_seed(0)
    evidence, logits = torch.randn(40, 6, len(FEATURES)), torch.randn(40, 6)
    reranker = EvidenceReranker(len(FEATURES), hidden=(8, 8)).eval()
    reranker.standardise(evidence, ["log_count", "nearest"])
    with torch.no_grad():
        for parameter in reranker.parameters():
            parameter += 0.3 * torch.randn(parameter.shape)
    places = [FEATURES.index("log_count"), FEATURES.index("nearest")]
    other = evidence.clone()
    other[..., places] = 100 * torch.randn(40, 6, 2)
    scores = reranker(logits, other)
    assert torch.equal(scores, reranker(logits, evidence))
    scores.square().sum().backward()
    assert (reranker.weight.grad[places].abs() < 1e-20).all()  # which Adam's epsilon swallows
    assert (reranker.network[0].weight.grad[:, places].abs() < 1e-20).all()
    assert all(tensor.isfinite().all() for tensor in reranker.state_dict().values())  # or it could not be saved
