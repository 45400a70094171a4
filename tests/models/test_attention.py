"""Stage 1 against loops, and where its transforms start."""

import math

import pytest
import torch
import torch.nn.functional as F

from nvf.data.queries import Noisy
from nvf.errors import InputError
from nvf.evaluation.calibration import fit_temperature
from nvf.models.attention import SoftAttention, attention_loss
from nvf.models.memory import VectorMemory
from nvf.models.queries_and_keys import TRANSFORMS
from nvf.ops.random_streams import stream


def queries(count: int = 6) -> torch.Tensor:
    return F.normalize(torch.randn(count, 8, generator=torch.Generator().manual_seed(1)), dim=-1)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_attention_equals_a_loop(memory: VectorMemory, transform: str, normalize: bool) -> None:
    torch.manual_seed(0)
    attention = SoftAttention(memory, transform=transform, normalize=normalize, beta=7.0)
    logits = attention(queries())
    for query, row in zip(queries(), logits, strict=True):
        moved = attention.transform(query)
        length = moved.norm() if normalize else 1.0
        expected = torch.stack([7.0 * torch.dot(moved, key) / length for key in memory.rows])
        torch.testing.assert_close(row, expected)
    probabilities = logits.softmax(dim=-1)
    answer = sum(p.unsqueeze(-1) * v for p, v in zip(probabilities.T, memory.rows, strict=True))
    torch.testing.assert_close(attention.answer(queries()), answer)


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_the_transform_is_what_its_name_says(memory: VectorMemory, transform: str) -> None:
    torch.manual_seed(0)
    model = SoftAttention(memory, transform=transform, hidden=None if transform in ("linear", "identity") else 5)
    start = model.transform(queries())
    assert torch.equal(start, queries()) == model.transform.starts_at_exact_search == (transform != "mlp")
    with torch.no_grad():
        for parameter in model.transform.parameters():
            parameter += torch.randn(parameter.shape)
    weights = [*model.transform.parameters()]
    if transform == "identity":
        expected = queries()
    elif transform == "linear":
        expected = queries() + queries() @ weights[0].T
    else:
        expected = F.relu(queries() @ weights[0].T + weights[1]) @ weights[2].T + weights[3]
        expected = expected + queries() if transform == "residual" else expected
    torch.testing.assert_close(model.transform(queries()), expected)


def test_candidates_are_the_highest_logits(memory: VectorMemory) -> None:
    attention = SoftAttention(memory)
    top = attention.candidates(queries(), 4, logsumexp=True)
    logits = attention(queries())
    torch.testing.assert_close(top.scores, logits.topk(4).values)
    assert torch.equal(top.rows, logits.topk(4).indices)
    torch.testing.assert_close(top.logsumexp, logits.logsumexp(dim=-1))


def test_the_temperature_stays_positive_under_any_step(memory: VectorMemory) -> None:
    attention = SoftAttention(memory)
    with torch.no_grad():
        attention.log_beta -= 50
    assert attention.beta > 0
    assert attention(queries()).isfinite().all()


def test_the_loss_equals_a_loop_and_ignores_padding() -> None:
    logits = torch.randn(5, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = torch.tensor([[3, -1], [0, 8], [2, 2], [-1, 7], [4, -1]])
    probabilities = logits.softmax(dim=-1)
    expected = [
        sum(-math.log(row[t]) for t in chosen) / len(chosen)
        for row, chosen in zip(probabilities, ([3], [0, 8], [2, 2], [7], [4]), strict=True)
    ]
    torch.testing.assert_close(attention_loss(logits, targets), torch.tensor(expected, dtype=torch.float64).mean())
    single = targets.amax(dim=-1, keepdim=True)
    padded = torch.cat([single, torch.full_like(single, -1)], dim=-1)
    torch.testing.assert_close(attention_loss(logits, single), attention_loss(logits, padded))


def test_the_loss_survives_logits_of_any_size() -> None:
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    loss = attention_loss(logits, torch.tensor([[1]]))
    (gradient,) = torch.autograd.grad(loss, logits)
    assert loss == 2e4
    assert gradient.tolist() == [[1.0, -1.0, 0.0]]


@pytest.mark.parametrize("start", [0.5, 20.0, 900.0])
def test_the_fitted_temperature_is_the_best_of_a_grid(memory: VectorMemory, start: float) -> None:
    held_out = Noisy(memory, sigma=0.3).sample(400, stream(0, "val"))
    asked, targets, *_ = held_out
    attention = SoftAttention(memory, transform="identity", beta=start)
    fit_temperature(attention, held_out)
    cosines = attention(asked) / attention.beta
    grid = torch.logspace(-1, 3, 401)
    prior = (grid / start).log().square() / 2 / 400  # of deviation 1 on log beta, a query
    losses = torch.stack([attention_loss(beta * cosines, targets) for beta in grid]) + prior
    assert attention.beta.item() == pytest.approx(float(grid[losses.argmin()]), rel=0.02)
    found = attention_loss(attention(asked), targets) + (attention.beta / start).log().square() / 2 / 400
    assert found <= losses.min() + 1e-6


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"transform": "cubic"}, "attention.transform=cubic is unknown; choose one of mlp, residual"),
        ({"beta": 0.0}, "attention.beta=0.0 is not a number above 0"),
        ({"beta": math.inf}, "attention.beta=inf"),
        ({"hidden": 0}, "attention.hidden=0"),
        ({"normalize": "no"}, "attention.normalize=no is neither true nor false"),
    ],
)
def test_bad_settings_are_refused(memory: VectorMemory, settings: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        SoftAttention(memory, **settings)


def test_learned_keys_start_at_the_rows_and_move_alone(memory: VectorMemory) -> None:
    attention = SoftAttention(memory, transform="identity", keys="learned", beta=3.0)
    torch.testing.assert_close(attention.keys(), memory.rows)
    rows = memory.rows.clone()
    with torch.no_grad():
        attention.delta[4] += 0.7
        moved = attention.keys()
    expected = F.normalize(rows[4] + 0.7, dim=-1)
    torch.testing.assert_close(moved[4], expected)
    torch.testing.assert_close(moved[5:], rows[5:])
    torch.testing.assert_close(attention(queries()), 3 * queries() @ moved.T)
    weights = attention(queries()).softmax(dim=-1)
    torch.testing.assert_close(attention.answer(queries()), weights @ rows)  # values stay frozen
    assert attention.keys().requires_grad


def test_frozen_keys_are_computed_once(memory: VectorMemory) -> None:
    attention = SoftAttention(memory, transform="identity", keys="learned").requires_grad_(False)
    first = attention.keys()
    assert attention.keys() is first
    attention.delta[4] += 0.7
    assert not torch.equal(attention.keys(), first)


@pytest.mark.parametrize("fused", [False, True])
def test_keys_follow_every_step_of_an_optimiser(memory: VectorMemory, fused: bool) -> None:
    attention = SoftAttention(memory, transform="identity", keys="learned")
    optimizer = torch.optim.Adam(attention.parameters(), lr=0.1, fused=fused)
    for _ in range(3):
        with torch.no_grad():
            attention.keys()
        optimizer.zero_grad()
        attention_loss(attention(queries()), torch.arange(len(queries())).unsqueeze(-1)).backward()
        optimizer.step()
        with torch.no_grad():
            torch.testing.assert_close(attention.keys(), F.normalize(memory.rows + attention.delta, dim=-1))


def test_a_bias_is_one_more_dimension(memory: VectorMemory) -> None:
    attention = SoftAttention(memory, transform="linear", keys="learned", biased=True, beta=3.0)
    plain = attention(queries())
    attention.bias.copy_(torch.linspace(-1, 1, 30))
    torch.testing.assert_close(attention(queries()), plain + 3 * attention.bias)
    top = attention.candidates(queries(), 4)
    torch.testing.assert_close(top.scores, attention(queries()).topk(4).values)
    assert attention.keys().shape == (30, 9)
    assert SoftAttention(memory, **attention.settings).settings == attention.settings
