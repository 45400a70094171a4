"""What holds for every input of the public functions: answers that make sense, or an InputError in words."""

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvf import InputError, Pipeline, Reranker, SoftAttention, VectorMemory
from nvf.data.queries import Nearest, Noisy, Warped
from nvf.errors import check_number
from nvf.evaluation.calibration import fit_temperature
from nvf.evaluation.evaluate import against
from nvf.files.ids import checked_ids
from nvf.models.distribution import exact, relaxed
from nvf.models.queries_and_keys import TRANSFORMS
from nvf.ops.cross_entropy import check_targets, cross_entropy, stratified
from nvf.ops.random_streams import stream_seed
from nvf.ops.ranks import target_ranks
from nvf.options import Option, parse
from nvf.options import whole as whole_number
from nvf.statistics import mcnemar, reciprocal_rank, wilson

FULL = os.environ.get("NVF_ATTACK") == "full"
settings.register_profile(
    "attack",
    derandomize=not FULL,
    deadline=None,
    max_examples=400 if FULL else 40,
    database=None,
    suppress_health_check=list(HealthCheck),
)
ATTACK = settings.get_profile("attack")
SIZES = st.integers(1, 40)


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@st.composite
def pipelines(draw: st.DrawFn) -> Pipeline:
    """Pipelines of every transform and reranker over memories of any size, equal rows among them."""
    rows, dim, seed = draw(SIZES), draw(st.integers(1, 9)), draw(st.integers(0, 999))
    which = torch.randint(draw(st.integers(1, rows)), (rows,), generator=torch.Generator().manual_seed(seed))
    memory = VectorMemory(normal(rows, dim, seed=seed)[which], dtype=draw(st.sampled_from(["float32", "bfloat16"])))
    torch.manual_seed(seed)
    attention = SoftAttention(
        memory,
        transform=draw(st.sampled_from(TRANSFORMS)),
        keys=draw(st.sampled_from(["frozen", "learned"])),
        biased=draw(st.booleans()),
        beta=draw(st.floats(1e-3, 1e3)),
    )
    reranker = Reranker(dim, kind=draw(st.sampled_from(["mlp", "residual"])), hidden=(4, 4))
    pipeline = Pipeline(attention, reranker, k=draw(st.integers(1, rows))).eval()
    with torch.no_grad():
        for parameter in pipeline.parameters():
            parameter += 0.2 * torch.randn(parameter.shape) * (parameter.ndim > 0)
    return pipeline


@ATTACK
@given(pipeline=pipelines(), batch=st.integers(0, 20), seed=st.integers(0, 999), data=st.data())
def test_a_pipeline_is_one_distribution_and_searches_it(
    pipeline: Pipeline, batch: int, seed: int, data: st.DataObject
) -> None:
    rows, dim = pipeline.memory.rows.shape
    queries = normal(batch, dim, seed=seed)
    with torch.no_grad():
        found = pipeline(queries)
    rounding = 1e-6 * (10 + float(pipeline.attention.beta))  # of a logit
    assert (found.log_probs.logsumexp(dim=-1).abs() <= 10 * rounding).all()
    if batch:
        chosen = found.candidates.gather(-1, found.scores.argmax(dim=-1, keepdim=True))
        top = found.log_probs.gather(-1, chosen)[:, 0]
        assert (found.log_probs.amax(dim=-1) - top <= 10 * rounding).all()
    k = data.draw(st.integers(1, rows))
    hits = pipeline.search(queries, k=k)
    assert hits.rows.dtype == torch.int64
    assert hits.probabilities.dtype == torch.float32
    assert hits.rows.shape == hits.probabilities.shape == (batch, k)
    assert all((part.diff(dim=-1) <= 0).all() for part in hits.probabilities.tensor_split([pipeline.k], dim=-1))
    assert (hits.probabilities.double().sum(dim=-1) <= 1 + 10 * rounding).all()
    assert all(len(set(some)) == k for some in hits.rows.tolist())
    error = (hits.probabilities.log() - found.log_probs.gather(-1, hits.rows)).abs()
    twins = (pipeline.memory.rows.unsqueeze(0) == pipeline.memory.rows.unsqueeze(1)).all(dim=-1).sum(dim=-1) > 1
    assert (error <= 20 * rounding)[~twins[hits.rows] & (hits.probabilities > 1e-30)].all()
    if k < rows:
        more = pipeline.search(queries, k=k + 1)
        assert torch.equal(more.rows[:, :k], hits.rows)
    arrays = pipeline.search(queries.numpy()[:, ::-1].copy()[:, ::-1], k=k)  # not contiguous
    assert isinstance(arrays.rows, np.ndarray)
    assert np.array_equal(arrays.rows, hits.rows.numpy())
    scaled = pipeline.search(queries * 2.0 ** data.draw(st.integers(-90, 90)), k=k)
    assert torch.equal(scaled.rows, hits.rows)


@ATTACK
@given(rows=SIZES, dim=st.integers(2, 9), seed=st.integers(0, 999), data=st.data())
def test_rows_in_another_order_are_found_in_another_order(rows: int, dim: int, seed: int, data: st.DataObject) -> None:
    vectors, queries = normal(rows, dim, seed=seed), normal(7, dim, seed=seed + 1)
    order = torch.tensor(data.draw(st.permutations(range(rows))))
    k = data.draw(st.integers(1, rows))
    one, other = VectorMemory(vectors).search(queries, k), VectorMemory(vectors[order]).search(queries, k)
    assert torch.equal(order[other.rows], one.rows)  # no two of these rows are equal
    some = data.draw(st.permutations(range(7)))
    assert torch.equal(VectorMemory(vectors).search(queries[some], k).rows, one.rows[some])


WRONG: list[Any] = [
    torch.ones(3, 5), torch.ones(4), torch.ones(1, 2, 4), torch.ones(2, 4).long(), torch.ones(2, 4).bool(),
    torch.ones(2, 4, dtype=torch.complex64), torch.full((2, 4), torch.nan), torch.full((2, 4), torch.inf),
    torch.zeros(2, 4), torch.ones(2, 4).to(torch.float8_e4m3fn), torch.tensor(1.0), np.ones((2, 4), int),
    np.ones((2, 4), object), np.full((2, 4), "a"), np.ones((2, 4), np.longdouble), np.ones((2, 4), complex),
    [[1.0] * 4], "query", None, 3, np.float32(1), np.ones((2, 4), [("a", float)]), np.ones((2, 4), "M8[s]"),
]  # fmt: skip


def refusal(call: Callable[[], Any]) -> str | None:
    """The words with which something is refused; None where it is not."""
    try:
        call()
    except InputError as error:
        return str(error)
    return None


def small() -> Pipeline:
    torch.manual_seed(0)
    return Pipeline(SoftAttention(VectorMemory(normal(9, 4, seed=0))), Reranker(4, hidden=(4, 4)), k=3).eval()


@pytest.mark.parametrize("queries", WRONG, ids=range(len(WRONG)))
def test_queries_that_are_none_are_refused_in_words(queries: Any) -> None:
    pipeline = small()
    for ask in (pipeline.search, pipeline.transform):
        with pytest.raises(InputError, match=r"queries.*(give|remove)"):
            ask(queries)
    values = isinstance(queries, Tensor) and queries.is_floating_point() and queries.element_size() > 1
    if values and queries.shape == (2, 4):  # a layer does not look at values
        assert not bool(pipeline(queries).log_probs.isfinite().all()) or not queries.any()
    else:
        calls = [pipeline, pipeline.attention, lambda q: pipeline.attention.candidates(q, 2)]
        calls += [lambda q: pipeline.loss(q, torch.zeros(1, 1).long())] * (getattr(queries, "ndim", 0) != 1)
        for ask in calls if not (values and queries.shape[-1:] == (4,)) else ():
            with pytest.raises(InputError, match=r"queries.*give"):
                ask(queries)


@pytest.mark.parametrize("k", [0, -1, 10, 10**30, True, 2.0, "3", float("nan"), (1,)])
def test_numbers_of_rows_that_do_not_exist_are_refused_in_words(k: Any) -> None:
    pipeline, queries = small(), torch.ones(2, 4)
    calls = (pipeline.search, pipeline.attention.candidates, pipeline.memory.search)
    for ask in calls:
        with pytest.raises(InputError, match=r"k=.*(default|lower k)"):
            ask(queries, k)
    with pytest.raises(InputError, match="k="):
        Pipeline(pipeline.attention, pipeline.reranker, k=k)


@pytest.mark.parametrize(
    "targets",
    [
        torch.tensor([[0], [9]]), torch.tensor([[0], [-2]]), torch.tensor([[0], [-1]]), torch.tensor([0, 1]),
        torch.tensor([[0.0], [1.0]]), torch.tensor([[0]]), torch.empty(2, 0).long(), [[0], [1]], None,
        torch.tensor([[0], [2**62]]), torch.tensor([[0], [1]], dtype=torch.int32),
    ],
)  # fmt: skip
def test_targets_that_are_no_rows_are_refused_in_words(targets: Any) -> None:
    pipeline, queries = small(), torch.ones(2, 4)
    for loss in (pipeline.loss, pipeline.attention.loss):
        with pytest.raises(InputError, match=r"targets.*give each of the 2 queries rows in 0\.\.8"):
            loss(queries, targets)
    check_targets(torch.tensor([[0, -1], [3, 8]]), 2, 9)


@ATTACK
@given(seed=st.integers(0, 9999), rows=st.integers(2, 30), k=st.integers(1, 29), sharpness=st.floats(0, 1000))
def test_the_two_distributions_sum_to_one(seed: int, rows: int, k: int, sharpness: float) -> None:
    assume(k < rows)
    log_attention = (sharpness * normal(4, rows, seed=seed).double()).log_softmax(dim=-1)
    best = log_attention.topk(min(2 * k, rows)).indices
    scores = sharpness * normal(4, best.shape[1], seed=seed + 1).double()
    for found in (
        exact(log_attention, best[:, :k], scores[:, :k]),
        relaxed(log_attention, best, scores, k=k, temperature=0.5),
    ):
        assert (found.logsumexp(dim=-1).abs() <= 1e-10 * (1 + sharpness)).all()


@ATTACK
@given(seed=st.integers(0, 9999), rows=SIZES, m=st.integers(1, 4))
def test_losses_are_not_negative_and_ranks_are_ranks(seed: int, rows: int, m: int) -> None:
    queries, keys = normal(6, 4, seed=seed), normal(rows, 4, seed=seed + 1)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.stack([torch.randperm(rows, generator=generator) for _ in range(6)])[:, :m]
    assert float(cross_entropy(queries, keys, targets)) >= -1e-5
    ranks = target_ranks(queries @ keys.T, targets)
    assert ((ranks >= 1) & (ranks <= rows - targets.shape[1] + 1)).all()
    sample = stratified(rows, min(rows, 5), generator)
    assert ((sample >= 0) & (sample < rows)).all()
    assert (sample.diff() > 0).all()


@ATTACK
@given(total=st.integers(1, 10**6), data=st.data())
def test_intervals_hold_their_values(total: int, data: st.DataObject) -> None:
    successes = data.draw(st.integers(0, total))
    found = wilson(successes, total)
    assert 0 <= found["low"] <= found["value"] + 1e-12
    assert found["value"] <= found["high"] + 1e-12 <= 1 + 2e-12
    wins, losses = data.draw(st.integers(0, 10**6)), data.draw(st.integers(0, 10**6))
    assert mcnemar(wins, losses) == pytest.approx(mcnemar(losses, wins))
    assert 0 < mcnemar(wins, losses) <= 1 + 1e-12
    counts = np.array(data.draw(st.lists(st.integers(0, 50), min_size=11, max_size=11)))
    assume(counts.sum())
    found = reciprocal_rank(counts)
    assert 0 <= found["low"] <= found["high"] <= 1
    one, other = (torch.tensor(data.draw(st.lists(st.booleans(), min_size=9, max_size=9))) for _ in range(2))
    there, back = against(one, other), against(other, one)
    assert (there["wins"], there["losses"]) == (back["losses"], back["wins"])


ANYTHING = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=5), st.lists(st.integers(), max_size=2)
)


@ATTACK
@given(value=ANYTHING, minimum=st.one_of(st.none(), st.integers(-5, 5)), whole=st.booleans())
def test_a_number_fits_or_is_named(value: Any, minimum: int | None, whole: bool) -> None:
    right = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
    right = right and value == value and abs(value) != float("inf") and (minimum is None or value >= minimum)
    found = refusal(lambda: check_number("size", value, minimum=minimum, whole=whole, remedy="give 3"))
    assert right == (found is None)
    assert right or (f"size={value}" in found and "give 3" in found)


@ATTACK
@given(value=ANYTHING)
def test_settings_of_the_models_fit_or_are_named(value: Any) -> None:
    memory = VectorMemory(torch.eye(4))
    builders = {
        "beta": lambda: SoftAttention(memory, beta=value),
        "transform": lambda: SoftAttention(memory, transform=value),
        "normalize": lambda: SoftAttention(memory, normalize=value),
        "keys": lambda: SoftAttention(memory, keys=value),
        "dropout": lambda: Reranker(4, dropout=value),
        "kind": lambda: Reranker(4, kind=value),
        "hidden": lambda: Reranker(4, hidden=value),
        "sigma": lambda: Noisy(memory, sigma=value),
        "warp": lambda: Warped(memory, sigma=0.1, warp=value, warp_seed=0),
        "seed": lambda: stream_seed(value, "test"),
    }
    for name, build in builders.items():
        if isinstance(value, list) and any(abs(width) > 100 for width in value):
            continue  # it would fit, but not the machine
        assert name in (refusal(build) or name)


@ATTACK
@given(
    ids=st.lists(
        st.one_of(st.integers(), st.integers(2**62, 2**64), st.text(max_size=3), st.booleans(), st.floats()),
        min_size=1,
        max_size=6,
    )
)
def test_ids_are_kept_or_refused(ids: list[Any]) -> None:
    alike = all(type(value) is int for value in ids) or all(type(value) is str for value in ids)
    right = alike and len(set(ids)) == len(ids)
    found = refusal(lambda: checked_ids(ids, len(ids), "memory"))
    small_enough = all(type(value) is not int or -(2**63) <= value < 2**64 for value in ids)
    assert (found is None) == (right and small_enough), found
    assert found or checked_ids(ids, len(ids), "memory").tolist() == ids


@ATTACK
@given(words=st.lists(st.text(alphabet="ab=k1 null-", max_size=8), max_size=4))
def test_words_are_options_or_refused(words: list[str]) -> None:
    options = [Option("a", "a path"), Option("k", "rows", default=5, read=whole_number), Option("b", "b", default=None)]
    try:
        values = parse(words, options)
    except InputError:
        return
    assert set(values) == {"a", "k", "b"}
    assert values["k"] is not None


@ATTACK
@given(rows=SIZES, dim=st.integers(1, 9), count=st.integers(1, 70), seed=st.integers(0, 999))
def test_generated_queries_are_unit_and_answered(rows: int, dim: int, count: int, seed: int) -> None:
    memory = VectorMemory(normal(rows, dim, seed=seed))
    sources = (Nearest(memory), Noisy(memory, sigma=0.3), Warped(memory, sigma=0.1, warp="mlp", warp_seed=seed))
    for source in sources:
        found = source.sample(count, torch.Generator().manual_seed(seed))
        torch.testing.assert_close(found.queries.norm(dim=-1), torch.ones(count))
        assert ((found.targets >= 0) & (found.targets < rows)).all()
        assert source.oracle.shape == (rows, dim)
    attention = SoftAttention(memory, transform="identity")
    fit_temperature(attention, found)
    assert 0.09 <= float(attention.beta.detach()) <= 1001
