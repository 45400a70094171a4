"""The loss in blocks equals the loss of all logits; its estimate from a sample is right on average."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nvf.models.attention import SoftAttention, attention_loss
from nvf.models.memory import VectorMemory
from nvf.ops import cross_entropy as crossentropy
from nvf.ops.cross_entropy import cross_entropy, logsumexp, sampled_cross_entropy, stratified
from nvf.ops.random_streams import stream


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several blocks, the last of them short, however few the rows."""
    monkeypatch.setattr("nvf.models.attention.AT_ONCE", 0)
    monkeypatch.setattr(crossentropy, "score_block", lambda _: 70 * 50)


def problem(targets: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """70 queries, 301 keys, and targets, padded where there may be several."""
    generator = torch.Generator().manual_seed(targets)
    queries = 3 * torch.randn(70, 8, generator=generator, dtype=dtype)
    chosen = torch.stack([torch.randperm(301, generator=generator)[:targets] for _ in range(70)])
    if targets > 1:
        chosen[::2, 0] = -1
    return queries, torch.randn(301, 8, generator=generator, dtype=dtype), chosen


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize("targets", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_value_and_gradient_are_those_of_all_logits(
    dtype: torch.dtype, targets: int, learned: bool, threads: int
) -> None:
    queries, keys, chosen = problem(targets, dtype)
    inputs = [queries.requires_grad_(), *([keys.requires_grad_()] if learned else [])]
    torch.set_num_threads(threads)
    ours = cross_entropy(queries, keys, chosen)
    gradients = torch.autograd.grad(ours, inputs)
    torch.set_num_threads(1)
    plain = attention_loss(queries @ keys.T, chosen)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(gradients, torch.autograd.grad(plain, inputs))


def test_every_query_has_a_gradient_of_its_own() -> None:
    queries, keys, _ = problem(1)
    weights = torch.linspace(-1, 2, 70, dtype=torch.float64)
    queries.requires_grad_(), keys.requires_grad_()
    ours = torch.autograd.grad((weights * logsumexp(queries, keys)).sum(), [queries, keys])
    plain = torch.autograd.grad((weights * (queries @ keys.T).logsumexp(dim=-1)).sum(), [queries, keys])
    torch.testing.assert_close(ours, plain)
    (of_keys,) = torch.autograd.grad(logsumexp(queries.detach(), keys).sum(), [keys])
    torch.testing.assert_close(of_keys, torch.autograd.grad((queries @ keys.T).logsumexp(dim=-1).sum(), [keys])[0])


@pytest.mark.parametrize("scale", [1e-6, 1e4])
def test_scores_of_any_size_neither_over_nor_underflow(scale: float) -> None:
    queries, keys, chosen = problem(1, torch.float32)
    queries = (scale * queries).requires_grad_()
    ours, plain = cross_entropy(queries, keys, chosen), attention_loss(queries @ keys.T, chosen)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, queries), torch.autograd.grad(plain, queries))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_keys_in_half_precision_are_their_values(dtype: str) -> None:
    memory = VectorMemory.synthetic(rows=301, dim=8, seed=0, dtype=dtype)
    wide = VectorMemory.restore(memory.rows.float(), "")
    queries, targets = F.normalize(torch.randn(9, 8), dim=-1), torch.arange(9).unsqueeze(-1)
    found = []
    for held in (memory, wide):
        torch.manual_seed(0)
        attention = SoftAttention(held, transform="mlp")
        loss = attention.loss(queries, targets)
        found.append((loss, torch.autograd.grad(loss, [*attention.parameters()]), attention.answer(queries)))
    torch.testing.assert_close(found[0], found[1])


def test_autocast_keeps_sums_in_single_precision() -> None:
    memory = VectorMemory.synthetic(rows=301, dim=8, seed=0)
    attention = SoftAttention(memory, transform="mlp")
    queries, targets = F.normalize(torch.randn(9, 8), dim=-1), torch.arange(9).unsqueeze(-1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = attention.loss(queries, targets)
    loss.backward()
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, attention.loss(queries, targets), rtol=0.02, atol=0.02)


def test_a_sample_has_one_row_of_every_stratum() -> None:
    for count, size in ((10, 3), (301, 40), (7, 7), (5, 1)):
        drawn = torch.stack([stratified(count, size, stream(0, "sample", draw)) for draw in range(300)])
        starts = [count * part // size for part in range(size + 1)]
        for part in range(size):
            assert set(drawn[:, part].tolist()) <= set(range(starts[part], starts[part + 1]))
        assert drawn.unique().tolist() == list(range(count)) or count == 301
    assert torch.equal(stratified(9, 4, stream(0, "sample", 1)), stratified(9, 4, stream(0, "sample", 1)))


@pytest.mark.parametrize("hard", [None, [[1, 5, 0], [2, 6, 3]]])
def test_the_sampled_sum_is_right_on_average_over_all_samples(hard: list[list[int]] | None) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = torch.randn(7, 3, generator=generator, dtype=torch.float64)
    queries = torch.randn(2, 3, generator=generator, dtype=torch.float64)
    targets = torch.tensor([[1, -1], [4, 2]])  # the first of each is a hard negative too, or may be sampled
    negatives = None if hard is None else torch.tensor(hard)
    scores = (queries @ keys.T).exp()
    right = torch.stack([scores[0, 1], scores[1, [2, 4]].prod().sqrt()])
    strata = [range(7 * part // 3, 7 * (part + 1) // 3) for part in range(3)]
    estimates = []
    for sample in itertools.product(*strata):  # all are equally probable
        losses = [
            sampled_cross_entropy(
                queries[i : i + 1],
                lambda rows: keys[rows],
                targets[i : i + 1],
                count=7,
                sample=torch.tensor(sample),
                hard=None if negatives is None else negatives[i : i + 1],
            )
            for i in range(2)
        ]
        estimates.append(torch.stack(losses).exp() * right)
    torch.testing.assert_close(torch.stack(estimates).mean(dim=0), scores.sum(dim=-1))


def test_a_sample_of_all_rows_is_the_exact_loss() -> None:
    queries, keys, chosen = problem(3)
    inputs = [queries.requires_grad_(), keys.requires_grad_()]
    hard = torch.arange(5).expand(70, 5)
    ours = sampled_cross_entropy(
        queries, lambda rows: keys[rows], chosen, count=301, sample=torch.arange(301), hard=hard
    )
    plain = attention_loss(queries @ keys.T, chosen)
    torch.testing.assert_close(ours, plain)
    torch.testing.assert_close(torch.autograd.grad(ours, inputs), torch.autograd.grad(plain, inputs))


def test_few_rows_have_the_same_loss_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    attention = SoftAttention(VectorMemory.synthetic(rows=301, dim=8, seed=0), keys="learned")
    queries, targets = F.normalize(torch.randn(9, 8), dim=-1), torch.arange(9).unsqueeze(-1)
    blocks = attention.loss(queries, targets)
    monkeypatch.setattr("nvf.models.attention.AT_ONCE", 301)
    at_once = attention.loss(queries, targets)
    torch.testing.assert_close(blocks, at_once)
    parameters = [*attention.parameters()]
    torch.testing.assert_close(torch.autograd.grad(blocks, parameters), torch.autograd.grad(at_once, parameters))
