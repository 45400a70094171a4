"""Rows aligned with queries of another model: the maps are numpy's, and all else is as if the rows had been mapped."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from scipy.linalg import fractional_matrix_power

from nvf.errors import InputError
from nvf.models.alignment import BUFFERS, Alignment
from nvf.models.attention import SoftAttention
from nvf.models.evidence import FEATURES, Evidence
from nvf.models.memory import VectorMemory, unit
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import EvidenceReranker, Reranker
from nvf.ops.random_streams import stream
from seals import reseal

WIDTHS = (5, 8, 12)  # of queries over rows of 8 dimensions: fewer, as many, more


def drawn(count: int, dim: int, name: str) -> torch.Tensor:
    """Unit vectors that have a middle and directions of different lengths, as those of a model do."""
    scales = torch.linspace(0.3, 1.5, dim)
    return F.normalize(0.4 + scales * torch.randn(count, dim, generator=stream(count, name)), dim=-1)


def alignment(memory: VectorMemory, width: int) -> Alignment:
    start = Alignment.whitening_of(drawn(200, width, "queries"), memory.rows, 0.3)
    (fitted,) = start.fit([(drawn(60, memory.dim, "old"), drawn(60, width, "new"))], [0.1])
    return start.with_map(fitted)


def pipeline_over(memory: VectorMemory, log: torch.Tensor, kind: str) -> Pipeline:
    """A pipeline whose every weight matters; those of two memories with keys of one shape are the same."""
    torch.manual_seed(0)
    targets = torch.randint(len(memory), (len(log), 1))
    attention = SoftAttention(memory, transform="linear", keys="learned", biased=True, beta=5.0)
    evidence = Evidence.gather(memory, log, targets) if kind == "evidence" else None
    if evidence is None:
        reranker = Reranker(memory.query_dim, kind="residual", hidden=(8, 8))
    else:
        reranker = EvidenceReranker(len(FEATURES), hidden=(8, 8))
    pipeline = Pipeline(attention, reranker, k=6, evidence=evidence)
    with torch.no_grad():
        for tensor in (*pipeline.parameters(), attention.bias):
            tensor += 0.1 * torch.randn(tensor.shape)
    return pipeline.eval()


@pytest.fixture(params=WIDTHS)
def width(request: pytest.FixtureRequest) -> int:
    return request.param


@pytest.mark.parametrize("shrinkage", [0.05, 0.3, 30.0])
def test_queries_are_whitened_as_numpy_does(memory: VectorMemory, width: int, shrinkage: float) -> None:
    queries, fresh = drawn(200, width, "queries"), drawn(7, width, "fresh")
    wide = queries.double().numpy()
    covariance = np.cov(wide.T, bias=True)
    root = fractional_matrix_power(covariance + shrinkage * np.trace(covariance) / width * np.eye(width), -0.5)
    expected = (fresh.double().numpy() - wide.mean(axis=0)) @ root
    expected /= np.linalg.norm(expected, axis=1, keepdims=True)
    found = Alignment.whitening_of(queries, memory.rows, shrinkage)
    np.testing.assert_allclose(found.queries(fresh).numpy(), expected, atol=1e-5)
    assert not found.map.any()
    torch.testing.assert_close(found.mean, memory.rows.mean(dim=0))


def test_rows_are_mapped_by_the_ridge_of_numpy_over_groups_that_are_centred_alone(
    memory: VectorMemory, width: int
) -> None:
    start = Alignment.whitening_of(drawn(200, width, "queries"), memory.rows, 0.3)
    pairs = [(drawn(n, 8, "old"), drawn(n, width, "new")) for n in (40, 25)]
    shifted = [(rows + 3 * place, queries) for place, (rows, queries) in enumerate(pairs)]  # a shift is no matter
    groups = [(rows.double().numpy(), start.queries(queries).double().numpy()) for rows, queries in pairs]
    x, y = (np.concatenate([part - part.mean(axis=0) for part in parts]) for parts in zip(*groups, strict=True))
    strengths = [0.01, 0.3, 3.0]
    for given in (pairs, shifted):
        for strength, fitted in zip(strengths, start.fit(given, strengths), strict=True):
            penalty = strength * np.trace(x.T @ x) / 8 * np.eye(8)
            expected = np.linalg.solve(x.T @ x + penalty, x.T @ y)
            np.testing.assert_allclose(fitted.numpy(), expected, atol=1e-4)
            rows = (memory.rows - start.mean).double().numpy() @ expected
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            keys = memory.aligned_with(start.with_map(fitted)).keys
            np.testing.assert_allclose(keys.numpy(), rows, atol=2e-4)


def test_only_the_aligned_memory_is_for_other_queries(memory: VectorMemory, width: int) -> None:
    maps = alignment(memory, width)
    aligned = memory.aligned_with(maps)
    assert (aligned.dim, aligned.query_dim, memory.query_dim) == (8, width, 8)
    assert memory.alignment is None
    assert memory.keys is memory.rows is aligned.rows
    assert aligned.fingerprint == memory.fingerprint
    assert aligned.state_dict() == {}
    queries = drawn(4, 8, "as they are")
    assert memory.aligned_queries(queries) is queries
    again = aligned.aligned_with(maps)  # from the rows, not from the keys
    assert torch.equal(again.keys, aligned.keys)
    some = torch.tensor([[3, 0], [29, 3]])
    torch.testing.assert_close(aligned.take_keys(some), aligned.keys[some])
    torch.testing.assert_close(aligned.take(some), memory.rows[some])


@pytest.mark.parametrize("kind", ["evidence", "residual"])
def test_all_is_as_if_rows_and_queries_had_been_mapped_by_hand(memory: VectorMemory, width: int, kind: str) -> None:
    maps = alignment(memory, width)
    aligned, log, queries = memory.aligned_with(maps), drawn(90, width, "log"), drawn(9, width, "asked")
    mapped_log, mapped = maps.queries(log), maps.queries(queries)
    by_hand = VectorMemory(maps.rows(memory.rows))
    ours, plain = pipeline_over(aligned, log, kind), pipeline_over(by_hand, mapped_log, kind)
    targets = torch.randint(30, (9, 1), generator=stream(0, "test"))
    if ours.evidence is not None and plain.evidence is not None:  # density alone is of the rows as they are
        cosines = (memory.rows @ memory.rows.T).fill_diagonal_(-2).topk(10).values.mean(dim=-1)
        torch.testing.assert_close(ours.evidence.density, cosines)
        plain.evidence.density.copy_(ours.evidence.density)
        places = [pipeline.evidence.logged[:9] for pipeline in (ours, plain)]
        for logged in (False, True):
            features = [
                pipeline.evidence(
                    pipeline.attention,
                    asked,
                    pipeline.attention.candidates(asked, 6, logsumexp=True),
                    logged_as=place if logged else None,
                )
                for pipeline, place, asked in zip(
                    (ours, plain), places, (log[:9], mapped_log[:9]) if logged else (queries, mapped), strict=True
                )
            ]
            torch.testing.assert_close(*features, rtol=1e-4, atol=1e-4)
    with torch.no_grad():
        found, expected = ours(queries), plain(mapped)
        torch.testing.assert_close(found.log_probs, expected.log_probs, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.loss(queries, targets), plain.loss(mapped, targets), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(ours.attention.loss(queries, targets), plain.attention.loss(mapped, targets))
    hits, others = ours.search(3 * queries.numpy(), 10), plain.search(mapped.numpy(), 10)
    assert hits.rows.tolist() == others.rows.tolist()
    scores = ours.transform(queries) @ ours.keys().T
    torch.testing.assert_close(scores, plain.transform(mapped) @ plain.keys().T, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(5 * scores, ours.attention(queries) * 5 / ours.attention.beta, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_saved_pipeline_is_the_same_in_every_bit(width: int, dtype: str, tmp_path: Path) -> None:
    vectors = drawn(31, 8, "rows")
    vectors[[7, 20]] = vectors[2].clone()  # equal rows are one
    memory = VectorMemory(vectors, dtype=dtype, distinct=True, ids=np.arange(100, 131))
    aligned = memory.aligned_with(alignment(memory, width))
    assert aligned.keys.dtype == memory.rows.dtype
    assert aligned.keys.shape == (29, width)
    pipeline, queries = pipeline_over(aligned, drawn(90, width, "log"), "evidence"), drawn(9, width, "asked")
    pipeline.save(tmp_path / "pipeline")
    loaded = Pipeline.load(tmp_path / "pipeline")
    for name in BUFFERS:
        assert torch.equal(getattr(loaded.memory.alignment, name), getattr(aligned.alignment, name))
    assert torch.equal(loaded.memory.keys, aligned.keys)
    assert torch.equal(loaded(queries).log_probs, pipeline(queries).log_probs)
    hits, again = (one.search(queries.numpy(), 5) for one in (pipeline, loaded))
    assert np.array_equal(hits.probabilities, again.probabilities)
    assert np.array_equal(hits.ids, again.ids)
    assert not {107, 120} & set(hits.ids.ravel().tolist())
    centred = memory.rows.double() - aligned.alignment.mean.double()
    exact = F.normalize(centred @ aligned.alignment.map.double(), dim=-1)
    torch.testing.assert_close(aligned.keys.double(), exact, rtol=0, atol=2e-3 if dtype == "float16" else 1e-5)


def test_queries_of_the_wrong_width_are_refused(memory: VectorMemory) -> None:
    pipeline = pipeline_over(memory.aligned_with(alignment(memory, 12)), drawn(90, 12, "log"), "evidence")
    for wrong in (8, 11):
        with pytest.raises(InputError, match="12"):
            pipeline.search(drawn(3, wrong, "wrong").numpy())


def test_gradients_reach_the_query(memory: VectorMemory, width: int) -> None:
    maps = alignment(memory, width)
    queries = drawn(3, width, "asked").double().requires_grad_()
    assert torch.autograd.gradcheck(maps.queries, queries)
    pipeline = pipeline_over(memory.aligned_with(maps), drawn(90, width, "log"), "evidence")
    asked = drawn(3, width, "asked").requires_grad_()
    pipeline(asked).log_probs[:, 0].sum().backward()
    assert asked.grad is not None
    assert bool(asked.grad.isfinite().all() & (asked.grad.norm(dim=-1) > 0).all())


@pytest.mark.parametrize("fault", ["centre", "map", "wide", "half", "narrow rows", "nan"])
def test_a_damaged_alignment_is_refused(memory: VectorMemory, fault: str, tmp_path: Path) -> None:
    pipeline = pipeline_over(memory.aligned_with(alignment(memory, 5)), drawn(90, 5, "log"), "evidence")
    pipeline.save(tmp_path / "pipeline")
    path = tmp_path / "pipeline/memory.safetensors"
    tensors = load_file(path)
    if fault in tensors:
        tensors.pop(fault)
    elif fault == "wide":
        tensors["map"] = torch.cat([tensors["map"], tensors["map"]], dim=1)
    elif fault == "half":
        tensors["whitening"] = tensors["whitening"].half()
    elif fault == "narrow rows":
        tensors["mean"], tensors["map"] = tensors["mean"][:-1], tensors["map"][:-1].contiguous()
    else:
        tensors["map"][0, 0] = torch.nan
    save_file(tensors, path)
    reseal(tmp_path / "pipeline")
    with pytest.raises(InputError, match="pipeline"):
        Pipeline.load(tmp_path / "pipeline")


def test_few_or_equal_queries_give_finite_keys(memory: VectorMemory, width: int) -> None:
    one = unit(torch.ones(1, width))
    for queries in (one, one.repeat(5, 1)):  # no variance at all
        start = Alignment.whitening_of(queries, memory.rows, 0.3)
        (fitted,) = start.fit([(memory.rows[: len(queries)], queries)], [1.0])
        aligned = memory.aligned_with(start.with_map(fitted))
        assert bool(aligned.keys.isfinite().all() & aligned.aligned_queries(queries).isfinite().all())
