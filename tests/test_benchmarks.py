"""What is run on request: every row is there, and what is compared is what it says it is."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import adapters
import baselines
import factored
import hnsw
import loops
import performance
import recipes
import roofline
import scale
import search_speed
import timing
from nvf.data.queries import QueryBatch, Recorded
from nvf.errors import InputError
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.reranker import Reranker, reranker_loss
from nvf.ops.random_streams import stream
from nvf.statistics import wilson
from nvf.training.build import build_source
from nvf.training.fit import fit
from nvf.training.stages import fit_settings

FEW_EPOCHS = ["attention.epochs=1", "reranker.epochs=1", "reranker.folds=2", "k=5"]
NAMES = [
    "exact search",
    "query-bank normalisation",
    "linear adapter, triplet loss",
    "linear adapter, full softmax",
    "documents moved to their queries",
    "linear adapter + learned keys",
    "the same + query-bank normalisation",
    "linear adapter + residual reranker",
    "NVF, stage 1",
    "NVF, pipeline",
]


@pytest.fixture
def source(folder: Path) -> Recorded:
    return adapters.read(folder, seed=0)


@pytest.fixture
def problem(source: Recorded) -> baselines.Problem:
    return baselines.Problem(source.memory.rows, source.splits["train"], source.splits["val"], seed=0)


def loop_ranks(keys: np.ndarray, batch: QueryBatch) -> list[int]:
    ranks = []
    for query, (target,) in zip(batch.queries.numpy(), batch.targets.tolist(), strict=True):
        order = np.argsort([-float(query @ key) for key in keys], kind="stable").tolist()
        ranks.append(1 + order.index(target))
    return ranks


def test_the_command_prints_every_method(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], source: Recorded
) -> None:
    monkeypatch.setattr(baselines, "EPOCHS", 2)
    output = tmp_path / "table.md"
    adapters.main([f"data.dir={folder}", "seed=0", f"output={output}", *FEW_EPOCHS])
    printed = capsys.readouterr().out
    assert output.read_text() in printed
    heading, _, titles, rule, *lines, _, verdict = output.read_text().splitlines()
    assert "50 rows; 320 train, 40 val, 40 test queries; seed 0" in heading
    assert [line.split("|")[1].strip() for line in lines] == NAMES
    assert {len(line) for line in (titles, rule, *lines)} == {len(titles)}
    right = sum(rank == 1 for rank in loop_ranks(source.memory.rows.numpy(), source.splits["test"]))
    interval = "{value:.1f} ({low:.1f}-{high:.1f})".format(**{n: 100 * v for n, v in wilson(right, 40).items()})
    assert lines[0].split("|")[2].strip() == interval
    assert verdict.startswith("NVF is not significantly below exact search")
    assert "the linear adapter, full softmax by" in verdict


def test_exact_search_and_moved_documents_equal_loops(problem: baselines.Problem) -> None:
    exact = baselines.exact_search(problem)
    rows, train = problem.rows.numpy(), problem.train
    assert baselines.ranks(exact.score, problem.val).tolist() == loop_ranks(rows, problem.val)

    found = {}
    for weight in baselines.WEIGHTS:
        keys = []
        for row, vector in enumerate(rows):
            own = [q for q, (t,) in zip(train.queries.numpy(), train.targets.tolist(), strict=True) if t == row]
            key = (1 - weight) * vector + weight * np.mean(own, axis=0) if own else vector
            keys.append(key / np.linalg.norm(key))
        ranks = loop_ranks(np.array(keys), problem.val)
        found[weight] = (np.mean([r == 1 for r in ranks]), np.mean([1 / r if r <= 10 else 0 for r in ranks]))
    moved = baselines.moved_documents(problem)
    assert moved.val == pytest.approx(max(found.values()))
    assert moved.chosen == f"weight {max(found, key=lambda weight: found[weight]):g}"


def test_query_bank_normalisation_equals_its_formula(problem: baselines.Problem) -> None:
    method = baselines.bank_normalised(problem, baselines.exact_search(problem))
    _, beta, _, share = method.chosen.replace(",", "").split()
    bank = (float(beta) * problem.rows @ problem.train.queries.T).exp().mean(dim=-1).log() / float(beta)
    expected = problem.val.queries @ problem.rows.T - float(share) * bank
    torch.testing.assert_close(method.score(problem.val.queries), expected)


def test_no_baseline_validates_worse_than_exact_search(
    problem: baselines.Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(baselines, "EPOCHS", 1)
    (_, exact), *others = baselines.baselines(problem)
    for name, method in others:
        assert method.val >= exact.val, name
        assert method.val == pytest.approx(baselines.figures(method.score, problem.val)), name


def test_a_part_of_a_folder(source: Recorded, tmp_path: Path) -> None:
    adapters.subsample(source, tmp_path, 0, subsample_rows=30, subsample_train=100)
    part = adapters.read(tmp_path, seed=0)
    assert (len(part.memory), len(part.splits["train"].queries)) == (30, 100)
    for name, split in part.splits.items():
        whole = source.splits[name]
        for query, (target,) in zip(split.queries, split.targets, strict=True):
            before = int(whole.targets[(whole.queries - query).abs().sum(dim=-1).argmin(), 0])
            torch.testing.assert_close(part.memory.rows[target], F.normalize(source.memory.rows[before], dim=-1))
    kept = (source.memory.rows @ part.memory.rows.T).amax(dim=-1) > 1 - 1e-5
    assert int(kept.sum()) == 30
    assert len(part.splits["test"].queries) == int(kept[source.splits["test"].targets].sum())


def test_more_than_there_is(source: Recorded, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"subsample_rows=51 is not in 1\.\.50"):
        adapters.subsample(source, tmp_path, 0, subsample_rows=51)
    with pytest.raises(InputError, match=r"data\.dir is not set"):
        adapters.main(["seed=0"])


TINY = ["data.rows=40", "data.dim=8", "trainer.enable_progress_bar=false", "dashboards=none"]
FEW_QUERIES = ["queries.val_samples=100", "queries.test_samples=100"]
FEW_STEPS = [f"{stage}.{word}" for stage in ("attention", "reranker") for word in ("epochs=1", "steps_per_epoch=4")]


def test_repeats_are_in_turn_after_a_warm_up() -> None:
    seen: list[str] = []
    took = timing.interleaved({name: lambda name=name: seen.append(name) for name in "ab"}, repeats=2, least=0.0)
    assert seen[-4:] == ["a", "b", "a", "b"]
    assert set(seen[:-4]) == {"a", "b"}
    assert all(each >= 0 for each in took.values())
    counts = iter(range(6))
    assert timing.in_turn({name: lambda: float(next(counts)) for name in "ab"}, 2) == {"a": [2, 4], "b": [3, 5]}


def test_peak_bytes_of_known_allocations(capfd: pytest.CaptureFixture[str]) -> None:
    old = [torch.zeros(500_000)]

    def work() -> torch.Tensor:
        old.pop()  # was there before, so it is none of the function's
        first = torch.empty(1_000_000)
        del first
        return torch.empty(300_000).add_(torch.empty(400_000)[:300_000])

    assert timing.peak_bytes(work) == 4_000_000
    assert timing.peak_bytes(lambda: (torch.empty(1_000_000), torch.empty(300_000))) == 5_200_000
    assert capfd.readouterr().err == ""


def test_peak_rss_of_a_known_allocation() -> None:
    def work() -> None:
        for _ in range(3):  # one at a time
            np.ones(40_000_000, dtype=np.uint8)

    assert 39e6 < timing.peak_rss(work) < 60e6  # the kernel counts roughly


def test_a_table_is_aligned() -> None:
    lines = timing.table(["a", "long title"], [["first", "1"], ["x", "10"]]).splitlines()
    assert lines == [
        "| a     | long title |",
        "| ----- | ---------: |",
        "| first |          1 |",
        "| x     |         10 |",
    ]


def test_the_original_recipe_has_the_models_of_its_configuration() -> None:
    source = build_source(timing.settings("experiment=original", *TINY))
    batch = source.sample(50, stream(0, "test"))
    torch.manual_seed(0)
    stage_one = recipes.Peripheral(source.memory.rows, beta=20.0)
    attention = SoftAttention(source.memory, transform="mlp", normalize=False, beta=20.0)
    attention.transform.network.load_state_dict(stage_one.transform.state_dict())
    plain = F.cross_entropy(stage_one(batch.queries), batch.targets[:, 0])
    torch.testing.assert_close(plain, attention.loss(*batch))

    stage_two = recipes.Foveal(8, (16, 4), 0.1).eval()
    reranker = Reranker(8, kind="mlp", hidden=(16, 4)).eval()
    reranker.first.load_state_dict(stage_two.network[0].state_dict())
    reranker.rest[2].load_state_dict(stage_two.network[3].state_dict())
    reranker.rest[4].load_state_dict({"weight": stage_two.network[5].weight})
    found = recipes.candidates(stage_one, batch, k=5)
    top = attention.candidates(batch.queries, 5)
    assert torch.equal(found.rows, top.rows)
    vectors, valid = source.memory.rows[found.rows], found.labels >= 0
    assert 0 < valid.sum() < len(valid)
    labels = found.rows == batch.targets
    assert torch.equal(valid, labels.any(dim=-1))
    plain = F.cross_entropy(stage_two(batch.queries, vectors)[valid], found.labels[valid])
    ours = reranker_loss(reranker(batch.queries, vectors, top.scores, attention.beta), labels)
    torch.testing.assert_close(plain, ours)

    best = stage_two(batch.queries, vectors).argmax(dim=-1)
    right = [bool(valid[i]) and int(found.rows[i, best[i]]) == int(target) for i, (target,) in enumerate(batch.targets)]
    assert recipes.top1(stage_two, found, source.memory.rows) == np.mean(right)


def test_both_recipes_run_to_their_end_or_to_the_goal(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recipes, "EVERY", 2)
    words = [*TINY, *FEW_QUERIES, *FEW_STEPS]
    config = timing.settings(*words, "cache=off")
    for look, goal in ((True, 0.01), (False, 2.0)):
        found = recipes.nvf(config, goal)
        assert found["reached"] is look
        assert 0 < found["stage_1_seconds"] < found["seconds"]
    original = timing.settings(
        "experiment=original", *words[:-4], "attention.epochs=2", "attention.train_samples=300",
        "reranker.epochs=40", "reranker.train_samples=600", "reranker.batch_size=32",
    )  # fmt: skip
    found = recipes.original(original, 2.0)
    assert not found["reached"]
    assert 0 < found["best_top1"] <= 1
    assert recipes.original(original, found["best_top1"])["reached"]


def test_a_clock_that_stands_still(monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter([0.0, 1.0, 11.0, 12.0])
    monkeypatch.setattr(recipes.time, "perf_counter", lambda: next(ticks))
    goal = recipes.Goal(0.9)
    goal.look(lambda: 0.5)
    assert (goal.seconds, goal.best) == (2.0, 0.5)


@pytest.mark.parametrize("stage", ["attention", "reranker"])
def test_the_plain_loop_trains_as_lightning_does(stage: str, tmp_path: Path) -> None:
    config = timing.settings(*TINY, *FEW_QUERIES, *FEW_STEPS, "attention.batch_size=32", "reranker.batch_size=32")
    source = build_source(config)
    stage_one = SoftAttention(source.memory, transform="linear")
    module, data = loops.built(config, stage, source, stage_one)
    how = fit_settings(config, stage)
    fit(module, data, how, folder=tmp_path, name=stage, start_competes=False)
    other, _ = loops.built(config, stage, source, stage_one)
    generators = (stream(0, f"train/{stage}", 0, step, 0) for step in range(4))
    losses = list(loops.plain(other, config, stage, source, generators))
    assert len(losses) == 4
    for name, weight in module.state_dict().items():
        torch.testing.assert_close(weight, other.state_dict()[name], msg=name)


def test_loops_are_compared() -> None:
    first, second = loops.compare(steps=3, repeats=1, batch=16, words=TINY)
    assert (first["stage"], second["stage"]) == ("stage 1", "stage 2")
    assert set(second["plain_step_parts"]) == {"sampling", "candidates", "model"}
    rate = first["steps_per_second"]
    assert first["ratio"] == pytest.approx(rate["lightning"] / rate["plain"])


def test_the_concatenated_reranker_is_the_same_function() -> None:
    for kind in ("mlp", "residual"):
        ours, plain = factored.pair(kind, 8)
        batch = factored.batch_of(16, 3, 8)
        for reranker in (ours, plain):
            factored.training_pass(reranker, batch)()
        torch.testing.assert_close(
            [weight.grad for weight in ours.parameters()], [weight.grad for weight in plain.parameters()]
        )


def test_the_factored_reranker_takes_less_memory() -> None:
    batch = factored.batch_of(128, 20, 384)
    ours, plain = (timing.peak_bytes(factored.training_pass(each, batch)) for each in factored.pair("residual", 384))
    features = 4 * 128 * 20 * 4 * 384  # bytes
    assert ours < features < plain


def test_searches_are_compared() -> None:
    pytest.importorskip("faiss")
    found = search_speed.exact([60, 300], [8], [1, 20], repeats=1)
    assert [(case["rows"], case["batch"]) for case in found] == [(60, 1), (60, 20), (300, 1), (300, 20)]
    assert all(case["same_rows"] for case in found)
    memory = VectorMemory(torch.eye(8)[[0, 0, 1, 2, 3]])
    queries = torch.eye(8)[:1].numpy()
    assert search_speed.same_rows(memory, queries, [[0, 1]], np.array([[1, 0]]))  # a tie
    assert not search_speed.same_rows(memory, queries, [[0, 1]], np.array([[0, 2]]))


def test_an_approximate_search_is_compared(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("faiss")
    monkeypatch.setattr(hnsw, "EF_SEARCH", (5, 200))
    narrow, wide, *_ = found = hnsw.hnsw(200, 8, [4], repeats=1)
    assert [case["data"] for case in found] == [kind for kind in ("factors", "synthetic") for _ in "12"]
    assert narrow["recall"] <= wide["recall"] == 1


def test_the_exponent_of_a_power_law() -> None:
    sizes = [10_000, 100_000, 1_000_000]
    assert scale.power_law(sizes, [3 * size**0.7 for size in sizes]) == pytest.approx((0.7, 3.0))
    cases = [
        {"rows": n, "dim": 128, "method": m, "seconds": 2e-6 * n, "process_bytes": 1e6}
        for n in sizes
        for m in scale.METHODS
    ]
    found = scale.growth(cases)["exact"]
    assert (found["exponent"], found["exponent_large"]) == pytest.approx((1.0, 1.0))
    assert found["seconds_on_paper"] == pytest.approx(20.0)
    assert found["bytes_on_paper"] == pytest.approx(1e6 + 4 * 128 * 10**7)
    assert scale.growth(cases[:3])["exact"]["exponent"] is None


def test_steps_over_a_large_memory_have_the_same_loss() -> None:
    memory = VectorMemory.synthetic(rows=300, dim=8, seed=0)
    steps = {method: scale.step_of(memory, method, batch=16, sample=300) for method in scale.METHODS}
    for _ in range(3):  # of training
        exact, *others = (step() for step in steps.values())
        for loss in others:
            torch.testing.assert_close(loss, exact)


def test_figures_become_tables_and_a_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("faiss")
    options = {"threads": 1, "folder": tmp_path}
    performance.main([f"folder={tmp_path}", f"figure={tmp_path / 'none.png'}"])
    assert not (tmp_path / "none.png").exists()
    assert capsys.readouterr().out.strip() == ""
    timing.write_json("factored", factored.compare(16, [3], [8], 1), options)
    exact = search_speed.exact([60, 300], [8], [1, 20], repeats=1)
    timing.write_json("search_speed", exact, options)
    monkeypatch.setattr(scale, "METHODS", ("exact",))  # a process each
    (case,) = scale.compare([200], dim=8, batch=16, sample=50, repeats=1, threads=1)
    assert min(case["process_bytes"], case["tensor_bytes"], case["seconds"]) > 0
    monkeypatch.undo()
    cases = [{**case, "rows": rows, "method": method} for rows in (200, 10**5, 10**6) for method in scale.METHODS]
    timing.write_json("scale", {"cases": cases, "growth": scale.growth(cases)}, options)
    record = json.loads((tmp_path / "scale.json").read_text())
    assert record["machine"]["threads"] == 1
    assert {"torch", "faiss", "lightning", "numpy", "python"} == set(record["versions"])
    capsys.readouterr()
    performance.main([f"folder={tmp_path}", f"figure={tmp_path / 'performance.png'}"])
    printed = capsys.readouterr().out
    assert [line[3:] for line in printed.splitlines() if line.startswith("## ")] == [
        performance.BENCHMARKS[name][0] for name in ("search_speed", "factored", "scale")
    ]
    assert (tmp_path / "performance.png").stat().st_size > 10_000


def test_a_case_is_held_against_the_roof(tmp_path: Path) -> None:
    table = roofline.roofline(
        device="cpu", rows=[300], dim=8, batch=16, sample=50, repeats=1, threads=1, folder=tmp_path
    )
    assert table.count("%") == 12
    found = json.loads((tmp_path / "roofline.json").read_text())["figures"]
    assert all(case["bound"] > 0 for case in found["cases"])
