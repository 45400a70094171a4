"""ONNX graphs answer as torch does, for any number of queries and candidates, and hold no row of the memory."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nvf import InputError, Pipeline
from nvf.models.alignment import Alignment
from nvf.models.attention import SoftAttention
from nvf.models.evidence import FEATURES, Evidence
from nvf.models.memory import VectorMemory, unit
from nvf.models.onnx_files import write_onnx
from nvf.models.reranker import EvidenceReranker, Reranker
from nvf.ops.topk import TopK

SIZES = [(1, 1), (1, 4), (2, 3), (7, 2)]  # queries and candidates


def output(path: Path, **given: torch.Tensor) -> np.ndarray:
    session = pytest.importorskip("onnxruntime").InferenceSession(path)
    (found,) = session.run(None, {name: tensor.numpy() for name, tensor in given.items()})
    assert {one.name for one in session.get_inputs()} == given.keys()
    return found


def check(folder: Path, pipeline: Pipeline) -> None:
    """Write both graphs, and compare what they give with the pipeline."""
    pytest.importorskip("onnxscript", reason="needs the extra nvf[onnx]")
    write_onnx(folder, pipeline)
    memory = pipeline.memory
    assert {path.name for path in folder.iterdir()} == {"transform.onnx", "reranker.onnx"}
    for path in folder.iterdir():
        assert memory.rows[0].numpy().tobytes() not in path.read_bytes()
    for count, k in SIZES:
        raw, rows, logits = torch.randn(count, memory.query_dim), torch.randint(30, (count, k)), torch.randn(count, k)
        for length in (1e-20, 1.0, 1e20):
            found = output(folder / "transform.onnx", queries=length * raw)
            np.testing.assert_allclose(found, pipeline.transform(length * raw).numpy(), rtol=1e-5, atol=1e-5)
        queries, evidence = unit(raw), None
        given = {"queries": memory.aligned_queries(queries), "candidates": memory.take_keys(rows), "logits": logits}
        if pipeline.evidence is not None:
            evidence = pipeline.evidence(pipeline.attention, queries, TopK(logits, rows, logits.logsumexp(dim=-1)))
            given = {"logits": logits, "evidence": evidence}
        expected = pipeline.score(queries, rows, logits, evidence)
        np.testing.assert_allclose(output(folder / "reranker.onnx", **given), expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "how"), [pytest.param("mlp", {"normalize": False}, marks=pytest.mark.slow), ("residual", {"biased": True})]
)
def test_candidates_are_compared(tmp_path: Path, memory: VectorMemory, kind: str, how: dict[str, Any]) -> None:
    torch.manual_seed(1)
    attention = SoftAttention(memory, transform=kind, beta=5.0, **how)
    pipeline = Pipeline(attention, Reranker(8, kind=kind, hidden=(8, 8)), k=3).requires_grad_(False).eval()
    for tensor in (attention.bias, *pipeline.parameters()):
        if tensor is not None:
            tensor += 0.3 * torch.randn(tensor.shape)  # nothing is left at zero
    check(tmp_path / "onnx", pipeline)


def test_evidence_is_weighed(tmp_path: Path, weighing: Pipeline) -> None:
    check(tmp_path / "onnx", weighing.requires_grad_(False))


@pytest.mark.parametrize(("weighs", "width"), [pytest.param(False, 12, marks=pytest.mark.slow), (True, 5)])
def test_queries_of_another_model_have_the_same_hits(
    tmp_path: Path, memory: VectorMemory, width: int, weighs: bool
) -> None:
    torch.manual_seed(0)
    maps = {"centre": 0.1 * torch.randn(width), "whitening": torch.eye(width) + 0.1 * torch.randn(width, width)}
    memory = memory.aligned_with(Alignment(**maps, mean=0.1 * torch.randn(8), map=torch.randn(8, width)))
    attention = SoftAttention(memory, transform="linear", keys="learned", biased=True, beta=5.0)
    evidence = Evidence.gather(memory, unit(torch.randn(90, width)), torch.randint(30, (90, 1))) if weighs else None
    reranker: Any = EvidenceReranker(len(FEATURES), hidden=(8, 8)) if weighs else Reranker(width, hidden=(16, 8))
    pipeline = Pipeline(attention, reranker, k=4, evidence=evidence).requires_grad_(False).eval()
    for tensor in (*pipeline.parameters(), attention.bias):
        tensor += 0.1 * torch.randn(tensor.shape)
    check(tmp_path / "out", pipeline)

    raw = torch.randn(20, width)
    moved = output(tmp_path / "out/transform.onnx", queries=raw)
    products = torch.from_numpy(moved) @ pipeline.keys().T
    assert torch.equal(products.topk(9).indices, pipeline.attention(unit(raw)).topk(9).indices)
    if not weighs:
        best, rows = (attention.beta * products).topk(4)
        given = {"queries": memory.aligned_queries(unit(raw)), "candidates": memory.take_keys(rows), "logits": best}
        scores = torch.from_numpy(output(tmp_path / "out/reranker.onnx", **given))
        assert torch.equal(rows.gather(1, scores.argsort(descending=True)), pipeline.search(raw).rows)


def test_without_onnxscript_the_extra_is_named(
    tmp_path: Path, weighing: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[onnx\]'"):
        write_onnx(tmp_path / "onnx", weighing)
    assert not any(tmp_path.iterdir())
