"""ONNX graphs answer as torch does, for any number of queries and candidates, and hold no row of the memory."""

import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nvf import InputError, Pipeline
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory, unit
from nvf.models.onnx_files import write_onnx
from nvf.models.reranker import Reranker
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
    assert {path.name for path in folder.iterdir()} == {"transform.onnx", "reranker.onnx"}
    for path in folder.iterdir():
        assert pipeline.memory.rows[0].numpy().tobytes() not in path.read_bytes()
    for count, k in SIZES:
        raw, rows, logits = torch.randn(count, 8), torch.randint(30, (count, k)), torch.randn(count, k)
        for length in (1e-20, 1.0, 1e20):
            found = output(folder / "transform.onnx", queries=length * raw)
            np.testing.assert_allclose(found, pipeline.transform(length * raw).numpy(), rtol=1e-5, atol=1e-5)
        queries, evidence = unit(raw), None
        given = {"queries": queries, "candidates": pipeline.memory.take(rows), "logits": logits}
        if pipeline.evidence is not None:
            evidence = pipeline.evidence(pipeline.attention, queries, TopK(logits, rows, logits.logsumexp(dim=-1)))
            given = {"logits": logits, "evidence": evidence}
        expected = pipeline.score(queries, rows, logits, evidence)
        np.testing.assert_allclose(output(folder / "reranker.onnx", **given), expected.numpy(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("kind", "how"), [("mlp", {"normalize": False}), ("residual", {"biased": True})])
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


def test_without_onnxscript_the_extra_is_named(
    tmp_path: Path, weighing: Pipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxscript", None)
    with pytest.raises(InputError, match=r"pip install -e '\.\[onnx\]'"):
        write_onnx(tmp_path / "onnx", weighing)
    assert not any(tmp_path.iterdir())
