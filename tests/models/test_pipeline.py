"""One distribution, its gradients, its search, and its folder."""

import json
import math
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from nvf.errors import InputError
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import Reranker
from nvf.models.saved_pipeline import FILES
from nvf.ops.products import QUERY_BLOCK
from seals import reseal


def queries(count: int = 6, dim: int = 8, seed: int = 1) -> torch.Tensor:
    return F.normalize(torch.randn(count, dim, generator=torch.Generator().manual_seed(seed)), dim=-1)


def by_loop(pipeline: Pipeline, query: torch.Tensor) -> list[float]:
    """The distribution of one query, row by row."""
    beta = float(pipeline.attention.beta)
    moved = pipeline.attention.transform(query)
    logits = [beta * float(moved @ row / moved.norm()) for row in pipeline.memory.rows]
    total = math.fsum(math.exp(logit) for logit in logits)
    attention = [math.exp(logit) / total for logit in logits]
    candidates = sorted(range(len(logits)), key=lambda row: -logits[row])[: pipeline.k]
    scores = {
        row: float(
            pipeline.reranker(
                query[None], pipeline.memory.rows[None, [row]], torch.tensor([[logits[row]]]), pipeline.attention.beta
            )
        )
        for row in candidates
    }
    mass = math.fsum(attention[row] for row in candidates)
    share = math.fsum(math.exp(score) for score in scores.values())
    return [mass * math.exp(scores[row]) / share if row in scores else p for row, p in enumerate(attention)]


@torch.no_grad()
def test_the_distribution_equals_a_loop_and_sums_to_one(pipeline: Pipeline) -> None:
    found = pipeline(queries())
    torch.testing.assert_close(found.log_probs.exp(), torch.tensor([by_loop(pipeline, q) for q in queries()]))
    torch.testing.assert_close(found.log_probs.exp().sum(dim=-1), torch.ones(6))


@given(seed=st.integers(0, 10_000), k=st.integers(1, 30), beta=st.floats(0.1, 100))
@settings(max_examples=50, deadline=None)
@torch.no_grad()
def test_the_most_probable_row_is_the_rerankers_choice(seed: int, k: int, beta: float) -> None:
    torch.manual_seed(seed)
    memory = VectorMemory(torch.randn(30, 8))
    model = Pipeline(SoftAttention(memory, beta=beta), Reranker(8, hidden=(16, 8)), k=k).eval()
    found = model(queries(seed=seed))
    choice = found.candidates.gather(-1, found.scores.argmax(dim=-1, keepdim=True))
    best = found.log_probs.amax(dim=-1, keepdim=True)  # not the arg max: scores may be alike to the last bit
    torch.testing.assert_close(found.log_probs.gather(-1, choice), best, atol=1e-6, rtol=0)
    torch.testing.assert_close(found.log_probs.logsumexp(dim=-1), torch.zeros(6), atol=1e-4, rtol=0)


@pytest.mark.parametrize("certainty", [1, 300])  # a certain reranker leaves candidates less probable than rows outside
@pytest.mark.parametrize("k", [1, 4, 9, 30])
@pytest.mark.parametrize("model", ["pipeline", "weighing"])
@torch.no_grad()
def test_a_list_has_the_candidates_first_then_the_rest_as_stage_one_has_them(
    model: str, k: int, certainty: float, request: pytest.FixtureRequest
) -> None:
    pipeline: Pipeline = request.getfixturevalue(model)
    pipeline.reranker.sharpen(certainty)
    asked = queries(50)
    hits, found = pipeline.search(asked, k=k), pipeline(asked)
    less_probable = False
    for rows, probabilities, logits, log_probs in zip(*hits[:2], found.logits, found.log_probs, strict=True):
        best = logits.argsort(descending=True).tolist()
        candidates = sorted(best[:4], key=lambda row: -float(log_probs[row]))
        assert rows.tolist() == [*candidates, *best[4:]][:k]
        torch.testing.assert_close(probabilities, log_probs.exp()[rows])
        less_probable |= bool((probabilities.diff() > 0).any())
    assert less_probable or certainty == 1 or k <= 4
    assert torch.equal(found.ranking.argsort(dim=-1, descending=True)[:, :k], hits.rows)


def test_a_ranking_puts_equal_candidates_by_row_and_what_is_not_a_number_nowhere(pipeline: Pipeline) -> None:
    logits, candidates = torch.tensor([[3e30, 1.0, 3e30, -2.0, 0.5]]), torch.tensor([[2, 0, 1]])
    log_probs = torch.tensor([[-1.0, -9.0, -1.0, -8.0, -2.0]])
    found = pipeline(queries())._replace(logits=logits, candidates=candidates, log_probs=log_probs)
    assert found.ranking.argsort(dim=-1, descending=True).tolist() == [[0, 2, 1, 4, 3]]
    assert found._replace(log_probs=log_probs * math.nan).ranking[0, candidates[0]].isnan().all()


def test_search_crosses_blocks_of_queries_and_of_rows(monkeypatch: pytest.MonkeyPatch, pipeline: Pipeline) -> None:
    asked = queries(QUERY_BLOCK + 5)
    whole = pipeline.search(asked)
    monkeypatch.setattr(
        "nvf.models.memory.blockwise_topk.__kwdefaults__", {"logsumexp": False, "scores_per_block": 7000}
    )
    parts = pipeline.search(asked)
    assert torch.equal(whole.rows, parts.rows)
    torch.testing.assert_close(whole.probabilities, parts.probabilities)


def test_search_takes_what_people_have(pipeline: Pipeline) -> None:
    expected = pipeline.search(queries())
    assert isinstance(expected.rows, torch.Tensor)
    for dtype in (np.float32, np.float64, ">f4"):
        hits = pipeline.search((3 * queries()).numpy().astype(dtype))
        assert isinstance(hits.rows, np.ndarray)
        assert hits.rows.tolist() == expected.rows.tolist()
        np.testing.assert_allclose(hits.probabilities, expected.probabilities.numpy(), rtol=1e-5)
    half = queries().half()
    assert pipeline.search(half).rows.tolist() == pipeline.search(half.numpy()).rows.tolist()
    assert pipeline.search(queries().bfloat16()).rows.shape == (6, 4)
    assert pipeline.search(queries()[:0]).rows.shape == (0, 4)


def test_search_leaves_the_mode_and_draws_nothing(pipeline: Pipeline) -> None:
    pipeline.train()
    pipeline.reranker.rest[1].p = 0.5
    assert torch.equal(pipeline.search(queries()).probabilities, pipeline.search(queries()).probabilities)
    assert pipeline.training


@pytest.mark.parametrize("model", ["pipeline", "weighing"])
def test_threads_search_one_pipeline_at_once(model: str, request: pytest.FixtureRequest) -> None:
    pipeline: Pipeline = request.getfixturevalue(model).train()
    network = pipeline.reranker.rest if model == "pipeline" else pipeline.reranker.network
    (dropout,) = (part for part in network if isinstance(part, torch.nn.Dropout))
    dropout.p, modes = 0.5, []
    pipeline.attention.transform.register_forward_hook(lambda *_: modes.append((pipeline.training, dropout.training)))
    asked = queries(60).split(1)
    expected = [pipeline.search(each, k=6) for each in asked]
    with ThreadPoolExecutor(4) as pool:
        answers = list(pool.map(lambda each: pipeline.search(each, k=6), asked * 3))
    for found, right in zip(answers, expected * 3, strict=True):
        assert torch.equal(found.rows, right.rows)
        assert torch.equal(found.probabilities, right.probabilities)
    assert set(modes) == {(True, True)}  # a search that changed them would do so under the eyes of another


@pytest.mark.parametrize("part", ["reranker", "attention.transform"])
def test_no_part_drops_out_in_a_search(pipeline: Pipeline, part: str) -> None:
    pipeline.attention.transform = torch.nn.Sequential(pipeline.attention.transform, torch.nn.Dropout(0.5))
    pipeline.reranker.rest[1].p = 0.5
    expected = pipeline.eval().search(queries())
    pipeline.get_submodule(part).train()
    found = pipeline.search(queries())
    assert torch.equal(found.rows, expected.rows)
    assert torch.equal(found.probabilities, expected.probabilities)


@pytest.mark.parametrize(
    ("asked", "k", "message"),
    [
        (torch.ones(8), 1, r"shape \(8,\)"),
        (torch.ones(2, 7), 1, r"shape \(2, 7\).*\(B, 8\)"),
        (torch.ones(2, 8, dtype=torch.int32), 1, "int32"),
        (torch.zeros(2, 8), 1, "queries: row 0 is zero"),
        (torch.full((2, 8), torch.nan), 1, "queries: row 0 holds NaN"),
        (torch.ones(2, 8), 31, "k=31 exceeds the memory's 30 rows"),
        (torch.ones(2, 8), 0, "k=0"),
    ],
)
def test_bad_searches_are_refused(pipeline: Pipeline, asked: torch.Tensor, k: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        pipeline.search(asked, k)


@pytest.mark.parametrize("whole", [np.int64, np.int32, np.uint8])
def test_numbers_of_numpy_are_numbers(whole: type, tmp_path: Path) -> None:
    memory = VectorMemory.synthetic(rows=whole(30), dim=whole(8), seed=whole(0))
    attention = SoftAttention(memory, hidden=whole(8), beta=np.float32(5))
    pipeline = Pipeline(attention, Reranker(8, hidden=(whole(16), whole(8)), dropout=np.float32(0.1)), k=whole(4))
    assert pipeline.search(queries(), k=whole(3)).rows.tolist() == pipeline.search(queries(), k=3).rows.tolist()
    assert memory.search(queries(), whole(3)).rows.tolist() == memory.search(queries(), 3).rows.tolist()
    pipeline.save(tmp_path / "pipeline")
    assert Pipeline.load(tmp_path / "pipeline").k == 4
    for wrong in (np.bool_(True), np.float32(3), whole(0), whole(31)):
        with pytest.raises(InputError, match=f"k={wrong}"):
            pipeline.search(queries(), k=wrong)
    with pytest.raises(InputError, match=r"attention\.beta=inf"):
        SoftAttention(memory, beta=np.float32("inf"))


@pytest.mark.parametrize("device", ["cuda:99", "nowhere"])
def test_a_device_that_is_not_there_is_named(pipeline: Pipeline, tmp_path: Path, device: str) -> None:
    pipeline.save(tmp_path / "pipeline")
    with pytest.raises(InputError, match=f"device={device}"):
        Pipeline.load(tmp_path / "pipeline", device)


def test_k_is_checked(memory: VectorMemory) -> None:
    with pytest.raises(InputError, match="k=31 exceeds the memory's 30 rows; lower k"):
        Pipeline(SoftAttention(memory), Reranker(8), k=31)


def test_a_saved_pipeline_answers_alike(pipeline: Pipeline, tmp_path: Path) -> None:
    pipeline.save(tmp_path / "pipeline")
    pipeline.save(tmp_path / "pipeline")  # again, over itself
    assert {path.name for path in tmp_path.iterdir()} == {"pipeline"}
    assert {path.name for path in (tmp_path / "pipeline").iterdir()} == set(FILES)
    loaded = Pipeline.load(tmp_path / "pipeline")
    assert loaded.memory.fingerprint == pipeline.memory.fingerprint
    mine, theirs = pipeline.search(queries()), loaded.search(queries())
    assert torch.equal(mine.rows, theirs.rows)
    assert torch.equal(mine.probabilities, theirs.probabilities)
    assert mine.ids is theirs.ids is None


@pytest.mark.parametrize("ids", [np.arange(30) ** 2 - 5, np.array([f"item {row}" for row in range(30)])])
def test_hits_carry_the_ids_of_their_rows(pipeline: Pipeline, tmp_path: Path, ids: np.ndarray) -> None:
    memory = VectorMemory.restore(pipeline.memory.rows, pipeline.memory.fingerprint, ids)
    pipeline.attention.memory = memory
    pipeline.save(tmp_path / "pipeline")
    for model in (pipeline, Pipeline.load(tmp_path / "pipeline")):
        for asked in (queries(), queries().numpy(), queries()[:0]):
            hits = model.search(asked, k=3)
            assert hits.ids is not None
            assert hits.ids.shape == (len(asked), 3)
            assert hits.ids.tolist() == [[ids[row] for row in rows] for rows in hits.rows.tolist()]


BROKEN_IDS = {
    "none": (lambda path: path.unlink(), "ids.json is missing"),
    "cut": (lambda path: path.write_text(path.read_text()[:-5]), "ids.json is missing, truncated or no JSON list"),
    "few": (lambda path: path.write_text("[1, 2]"), "ids.json: 2 ids for 30 rows"),
    "object": (lambda path: path.write_text("{}"), "ids.json is missing, truncated or no JSON list"),
    "types": (lambda path: path.write_text(json.dumps([*range(29), "x"])), "row 29 has the id 'x', which is not"),
    "floats": (lambda path: path.write_text(json.dumps([0.5] * 30)), "row 0 has the id 0.5, which is not"),
    "twice": (lambda path: path.write_text(json.dumps([*range(29), 3])), "row 29 has the id 3 of row 3"),
}


@pytest.mark.parametrize(("break_it", "message"), BROKEN_IDS.values(), ids=BROKEN_IDS)
def test_broken_ids_are_refused(memory: VectorMemory, tmp_path: Path, break_it, message: str) -> None:
    memory = VectorMemory.restore(memory.rows, memory.fingerprint, np.arange(30))
    Pipeline(SoftAttention(memory), Reranker(8)).save(tmp_path / "pipeline")
    break_it(tmp_path / "pipeline/ids.json")
    if (tmp_path / "pipeline/ids.json").exists():
        with pytest.raises(InputError, match=r"ids.json is damaged, or of another pipeline; save the pipeline again"):
            Pipeline.load(tmp_path / "pipeline")
    reseal(tmp_path / "pipeline")
    with pytest.raises(InputError, match=f"{message}.*; save the pipeline again"):
        Pipeline.load(tmp_path / "pipeline")


def test_save_does_not_overwrite_what_is_not_its_own(pipeline: Pipeline, tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").write_text("ten years of work")
    with pytest.raises(InputError, match="exists and is not a pipeline folder"):
        pipeline.save(tmp_path)
    assert (tmp_path / "thesis.tex").exists()


def _edit_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    reseal(folder)


def _cut(folder: Path, name: str) -> None:
    (folder / name).write_bytes((folder / name).read_bytes()[:-20])


BROKEN = {
    **{f"no {name}": (lambda f, n=name: (f / n).unlink(), f"{name} is missing") for name in FILES},
    "cut weights": (lambda f: _cut(f, "weights.safetensors"), "is damaged"),
    "cut memory": (lambda f: _cut(f, "memory.safetensors"), "is damaged"),
    "cut config": (lambda f: _cut(f, "config.json"), "is damaged"),
    "list": (lambda f: (f / "config.json").write_text("[]"), "is damaged"),
    "format": (lambda f: _edit_config(f, format="x"), "format 'x' is not"),
    "unknown setting": (lambda f: _edit_config(f, attention={"os": "system"}), "is damaged"),
    "other shape": (lambda f: _edit_config(f, reranker={"hidden": [4, 4]}), "is damaged"),
    "k": (lambda f: _edit_config(f, k=10**9), "k=1000000000 exceeds"),
    "k type": (lambda f: _edit_config(f, k="5"), "k=5 is not a whole number"),
    "wide": (lambda f: _edit_config(f, attention={"hidden": 10**9}), "should be .1000000000, 8. torch.float32"),
    "very wide": (lambda f: _edit_config(f, reranker={"kind": "mlp", "hidden": [10**30, 1]}), "is damaged"),
    "beyond floats": (lambda f: _edit_config(f, reranker={"kind": "mlp", "dropout": 10**400}), "more than 64 bits"),
    "number": (lambda f: _edit_config(f, memory=3), "a value of another type"),
    "deep": (lambda f: (f / "config.json").write_text('{"k":' + "[" * 10**5), "is too deep or too large"),
    "large": (lambda f: (f / "config.json").write_text(" " * 2**25), "bytes, more than 16777216"),
    "NaN": (lambda f: _weights(f, lambda w: w.fill_(math.nan)), "has NaN or infinite values"),
    "whole numbers": (lambda f: _weights(f, lambda w: w.long()), "torch.int64, but should be .* torch.float32"),
    "rows": (lambda f: _rows(f, torch.ones(30, 8, dtype=torch.float64)), "rows of torch.float64 are none of float32"),
    "other memory": (lambda f: _rows(f, torch.ones(5, 3)), "but should be"),
    "weights lack one": (lambda f: _weights(f, lambda w: None), "is missing or unknown among the weights"),
    "bit in the weights": (lambda f: _flip(f / "weights.safetensors"), "weights.safetensors is damaged"),
    "bit in the memory": (lambda f: _flip(f / "memory.safetensors"), "memory.safetensors is damaged"),
    "another k": (lambda f: _replace(f, '"k": 4', '"k": 5'), "config.json is damaged"),
}


def _weights(folder: Path, change: Callable[[torch.Tensor], torch.Tensor | None]) -> None:
    """Change the first of the weights, and make the hashes right again."""
    weights = load_file(folder / "weights.safetensors")
    first = sorted(weights)[0]
    changed = {**weights, first: change(weights[first])}
    save_file({name: tensor for name, tensor in changed.items() if tensor is not None}, folder / "weights.safetensors")
    reseal(folder)


def _rows(folder: Path, rows: torch.Tensor) -> None:
    save_file({"rows": rows}, folder / "memory.safetensors")
    reseal(folder)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 4
    path.write_bytes(data)


def _replace(folder: Path, old: str, new: str) -> None:
    (folder / "config.json").write_text((folder / "config.json").read_text().replace(old, new))


@pytest.mark.parametrize(("break_it", "message"), BROKEN.values(), ids=BROKEN)
def test_a_broken_folder_is_refused(pipeline: Pipeline, tmp_path: Path, break_it, message: str) -> None:
    pipeline.save(tmp_path / "pipeline")
    break_it(tmp_path / "pipeline")
    with pytest.raises(InputError, match=message):
        Pipeline.load(tmp_path / "pipeline")


def test_a_missing_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"nowhere.config.json is missing"):
        Pipeline.load(tmp_path / "nowhere")


def test_the_models_need_neither_lightning_nor_hydra() -> None:
    use = (
        "import sys, torch; from nvf import Pipeline, Reranker, SoftAttention, VectorMemory;"
        "memory = VectorMemory(torch.randn(9, 4));"
        "Pipeline(SoftAttention(memory), Reranker(4), k=3).search(torch.randn(2, 4));"
        "print(sorted({'lightning', 'hydra', 'omegaconf', 'torchmetrics', 'tensorboard', 'faiss'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", use], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_weighing_evidence_searches_saves_and_loads(weighing: Pipeline, tmp_path: Path) -> None:
    asked = queries()
    with torch.no_grad():
        log_probs = weighing(asked).log_probs
    torch.testing.assert_close(log_probs.exp().sum(dim=-1), torch.ones(len(asked)))
    assert not torch.equal(log_probs, weighing.attention(asked).log_softmax(dim=-1))
    hits = weighing.search(asked, k=6)
    torch.testing.assert_close(hits.probabilities, log_probs.gather(-1, hits.rows).exp())
    weighing.save(tmp_path / "pipeline")
    again = Pipeline.load(tmp_path / "pipeline").search(asked, k=6)
    assert torch.equal(again.rows, hits.rows)
    assert torch.equal(again.probabilities, hits.probabilities)


def test_keys_answer_as_stage_one_does(weighing: Pipeline) -> None:
    asked = 3 * queries().numpy()
    scores = weighing.transform(asked) @ weighing.keys().numpy().T
    expected = weighing.attention(queries()) / weighing.attention.beta
    np.testing.assert_allclose(scores, expected.detach().numpy(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rows_of_half_precision_are_searched_and_saved(tmp_path: Path, dtype: str) -> None:
    halved = VectorMemory(queries(40), dtype=dtype)
    whole = VectorMemory.restore(halved.rows.float(), halved.fingerprint)
    torch.manual_seed(0)
    attention, reranker = SoftAttention(halved, transform="residual"), Reranker(8, hidden=(16, 8))
    half, full = (Pipeline(attention, reranker, k=4).eval() for _ in range(2))
    full.attention = SoftAttention(whole, transform="residual")
    full.attention.load_state_dict(attention.state_dict())
    half.save(tmp_path / "pipeline")
    loaded = Pipeline.load(tmp_path / "pipeline")
    assert loaded.memory.rows.dtype == halved.rows.dtype
    expected, distribution = full.search(queries(9)), full(queries(9))
    for model in (half, loaded):
        hits, found = model.search(queries(9)), model(queries(9))
        assert torch.equal(hits.rows, expected.rows)
        torch.testing.assert_close(hits.probabilities, expected.probabilities)
        torch.testing.assert_close(found.log_probs, distribution.log_probs)
        torch.testing.assert_close(found.answer, distribution.answer)
        assert model.transform(queries(9)).dtype == torch.float32
    assert torch.equal(loaded.keys().float(), whole.rows)


def test_evidence_and_its_reranker_go_together(weighing: Pipeline) -> None:
    for reranker, evidence in ((weighing.reranker, None), (Reranker(8), weighing.evidence)):
        with pytest.raises(InputError, match="an EvidenceReranker needs evidence="):
            Pipeline(weighing.attention, reranker, evidence=evidence)
