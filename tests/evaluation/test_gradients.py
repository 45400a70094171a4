"""The gradient audit: it sees what is there, in training and after it, and says what is not."""

import json

import pytest
import torch

from nvf.data.queries import Noisy, QueryBatch
from nvf.evaluation.gradients import audit_gradients, norms
from nvf.evaluation.report import remarks
from nvf.models.attention import SoftAttention, attention_loss
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import Reranker
from nvf.ops.random_streams import stream

NO_FIGURES = {method: {"top1": {"value": 1.0, "high": 1.0}} for method in ("exact", "oracle", "attention", "pipeline")}


@pytest.fixture
def batch(pipeline: Pipeline) -> QueryBatch:
    return Noisy(pipeline.memory, sigma=0.3).sample(300, stream(0, "test"))


@pytest.mark.parametrize(("most", "left_out"), [(240, False), (239, True)])
def test_the_audit_leaves_out_the_learned_keys_of_a_large_memory(most: int, left_out: bool) -> None:
    attention = SoftAttention(VectorMemory.synthetic(rows=30, dim=8, seed=0), keys="learned")
    audit = audit_gradients(attention, Noisy(attention.memory, sigma=0.3).sample(20, stream(0, "test")), most_keys=most)
    assert ("delta" not in audit["parameters"]) == (audit["keys"] is None) == left_out
    assert audit["finite"]
    assert audit["query"] > 0


def test_the_audit_sees_every_gradient_and_leaves_no_trace(pipeline: Pipeline, batch: QueryBatch) -> None:
    pipeline.attention.requires_grad_(False)
    audit = audit_gradients(pipeline, batch)
    assert set(audit["parameters"]) == {name for name, _ in pipeline.named_parameters()}
    assert audit["finite"]
    assert audit["vanished"] == []
    assert audit["query"] > 0
    assert all(p.grad is None for p in pipeline.parameters())
    assert not any(p.requires_grad for p in pipeline.attention.parameters())
    with torch.no_grad():
        pipeline.reranker.rest[-1].weight.zero_()
    assert "reranker.first.weight" in audit_gradients(pipeline, batch)["vanished"]
    with torch.no_grad():
        pipeline.attention.log_beta.fill_(torch.nan)
    audit = audit_gradients(pipeline, batch)
    assert not audit["finite"]
    assert audit["query"] is audit["temperature"] is None
    json.dumps(audit, allow_nan=False)


def test_a_vanished_gradient_is_reported(pipeline: Pipeline) -> None:
    held_out = QueryBatch(pipeline.memory.rows, torch.arange(30).unsqueeze(-1))
    model = Pipeline(SoftAttention(pipeline.memory, transform="identity"), Reranker(8, kind="residual"), k=4)
    training = {"joint": {"steps": 4, "query": {"not_finite": 0}, "reranker": {"not_finite": 2}}}
    results = {"val": NO_FIGURES, "gradients": {**audit_gradients(model, held_out), "training": training}}
    training_line, line = remarks(results)
    assert training_line == "joint: the gradient on the reranker was not finite in 2 of 4 steps."
    assert line.startswith("No gradient reaches reranker.first.weight")


def test_each_part_has_the_norm_of_all_its_parameters(weighing: Pipeline, batch: QueryBatch) -> None:
    audit = audit_gradients(weighing, batch)
    loss = attention_loss(weighing(batch.queries[:256]).log_probs, batch.targets[:256])
    names, parameters = zip(*weighing.named_parameters(), strict=True)
    gradients = dict(zip(names, torch.autograd.grad(loss, parameters), strict=True))
    for part, prefix in {
        "transform": "attention.transform",
        "temperature": "attention.log_beta",
        "keys": "attention.delta",
        "reranker": "reranker",
    }.items():
        mine = torch.cat([gradient.flatten() for name, gradient in gradients.items() if name.startswith(prefix)])
        assert audit[part] == pytest.approx(float(mine.norm()), rel=1e-4)
    alone = audit_gradients(weighing.attention, batch)
    assert alone["reranker"] is None
    assert alone["keys"] > 0


def test_a_part_without_gradient_is_left_out() -> None:
    found = norms(
        [("query", torch.full((4,), 3.0)), ("model.log_beta", None), ("model.transform.network.weight", None)]
    )
    assert found == {"query": 6.0}
