"""Products in blocks equal one matmul, ties and half precision included."""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch import Tensor

from nvf.ops.products import QUERY_BLOCK, inner_products, products, weighted_sum
from nvf.ops.topk import GROUP, SPARSE_FROM, blockwise_topk


def numbers(*shape: int, seed: int = 0) -> Tensor:
    """Small whole numbers: products of them are exact in any order of summation, and many are equal."""
    return torch.randint(-2, 3, shape, generator=torch.Generator().manual_seed(seed)).float()


@given(
    rows=st.integers(1, 200),
    queries=st.sampled_from([0, 1, 3, 5, SPARSE_FROM, 70]),
    k=st.integers(1, 200),
    block=st.integers(1, 5000),
    threads=st.sampled_from([1, 2]),
)
@example(rows=10 * GROUP, queries=70, k=3, block=70 * (2 * GROUP + 1), threads=2)
@settings(deadline=None, max_examples=200)
def test_the_blockwise_top_k_equals_a_stable_sort(rows: int, queries: int, k: int, block: int, threads: int) -> None:
    k = min(k, rows)
    keys, asked = numbers(rows, 4, seed=rows), numbers(queries, 4, seed=queries)
    torch.set_num_threads(threads)
    try:
        found = blockwise_topk(asked, keys, k, logsumexp=True, scores_per_block=block)
    finally:
        torch.set_num_threads(1)
    scores = asked @ keys.T
    values, order = scores.sort(dim=-1, descending=True, stable=True)  # of equal scores the smallest row first
    assert torch.equal(found.scores, values[:, :k])
    assert torch.equal(found.rows, order[:, :k])
    torch.testing.assert_close(found.logsumexp, scores.logsumexp(dim=-1))


def test_blocks_of_queries_and_of_rows_make_no_difference() -> None:
    keys = torch.randn(3000, 16, generator=torch.Generator().manual_seed(0))
    asked = torch.randn(QUERY_BLOCK + 100, 16, generator=torch.Generator().manual_seed(1))
    found = blockwise_topk(asked, keys, 7, scores_per_block=2**16)
    expected = (asked.double() @ keys.double().T).topk(7)
    assert torch.equal(found.rows, expected.indices)
    torch.testing.assert_close(found.scores, expected.values.float())


def test_double_precision_is_not_cut_short() -> None:
    keys = torch.rand(5000, 8, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    asked = torch.rand(70, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    expected = (asked @ keys.T).topk(5)
    found = blockwise_topk(asked, keys, 5)
    assert torch.equal(found.rows, expected.indices)
    torch.testing.assert_close(found.scores, expected.values)


@pytest.mark.parametrize("ascending", [True, False])
def test_rows_in_any_order_of_merit(ascending: bool) -> None:
    merit = torch.arange(5000.0) if ascending else -torch.arange(5000.0)
    found = blockwise_topk(torch.ones(SPARSE_FROM, 1), merit.unsqueeze(-1), 3, scores_per_block=SPARSE_FROM * 100)
    assert (found.rows == (torch.tensor([4999, 4998, 4997]) if ascending else torch.tensor([0, 1, 2]))).all()


@pytest.mark.parametrize("queries", [2, SPARSE_FROM])
def test_what_is_not_a_number_is_found_first(queries: int) -> None:
    asked = torch.ones(queries, 2)
    asked[1] = torch.nan
    found = blockwise_topk(asked, torch.rand(100, 2), 3)
    assert found.scores[1].isnan().all()
    assert found.scores[0].isfinite().all()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("queries", [1, 63, 64, 130])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_products_are_those_of_a_matmul(dtype: torch.dtype, queries: int, threads: int) -> None:
    rows, asked = numbers(50, 6).to(dtype), numbers(queries, 6, seed=1)
    torch.set_num_threads(threads)
    found = products(rows, asked)
    torch.set_num_threads(1)
    assert torch.equal(found, rows.float() @ asked.T)
    assert torch.equal(products(rows, asked.double()), rows.double() @ asked.double().T)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_in_half_precision_have_the_gradients_of_float_rows(dtype: torch.dtype) -> None:
    rows = torch.randn(300, 6, generator=torch.Generator().manual_seed(0)).to(dtype)
    asked = torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    weights = torch.rand(5, 300, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    wide = rows.double()
    torch.testing.assert_close(inner_products(asked, rows), asked @ wide.T)
    torch.testing.assert_close(weighted_sum(weights, rows), weights @ wide)
    few = rows[:7]
    assert torch.autograd.gradcheck(lambda q: inner_products(q, few), asked.requires_grad_())
    assert torch.autograd.gradgradcheck(lambda q: inner_products(q, few).pow(3), asked)
    assert torch.autograd.gradcheck(lambda w: weighted_sum(w, few), weights[:, :7].clone().requires_grad_())
    mapped = torch.func.vmap(lambda query: inner_products(query.unsqueeze(0), rows)[0])(asked.detach())
    torch.testing.assert_close(mapped, asked.detach() @ wide.T)


def test_autocast_finds_no_other_rows() -> None:
    keys, asked = torch.randn(3000, 16), torch.randn(70, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = blockwise_topk(asked, keys, 5)
    assert torch.equal(found.rows, blockwise_topk(asked, keys, 5).rows)
