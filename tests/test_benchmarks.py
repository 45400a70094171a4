"""What is run on request: every row is there, and what is compared is what it says it is."""

import json
import sys
import xml.etree.ElementTree as ET
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import adapters
import baselines
import factored
import fitting
import hnsw
import large
import latency
import lexical
import loops
import performance
import picture
import recipes
import roofline
import scale
import search_speed
import timing
import tuned_search
import update
import upgrade
from nvf.data.queries import Recorded
from nvf.errors import InputError
from nvf.models.attention import SoftAttention
from nvf.models.memory import VectorMemory
from nvf.models.pipeline import Pipeline
from nvf.models.reranker import Reranker, reranker_loss
from nvf.ops.random_streams import stream
from nvf.statistics import wilson
from nvf.training.build import build_source
from nvf.training.fit import fit
from nvf.training.stages import fit_settings

FEW_EPOCHS = ["attention.epochs=1", "reranker.epochs=1", "reranker.folds=2", "k=5"]
WORDED = ["words alone", "words + exact search", "the best of these + words"]
NUDGED = ["NUDGE-M", "NUDGE-N", "NUDGE-N and linear"]
NAMES = [
    "exact search",
    "words alone",
    "words + exact search",
    "query-bank normalisation",
    "documents moved to their queries",
    "NUDGE-M",
    "NUDGE-N",
    "linear adapter, multiple negatives ranking",
    "linear adapter, softmax over all rows",
    "NUDGE-N and linear",
    "linear adapter + learned keys",
    "the same + query-bank normalisation",
    "the best of these + words",
    "residual reranker on the best of these",
]


@pytest.fixture
def texts(folder: Path) -> list[str]:
    """The texts of the folder's queries, each with its number, its target's noun in half of them, and a stop word."""
    rng, targets = np.random.default_rng(1), np.load(folder / "targets.npy")
    nouns = [f"noun{row} and noun{row % 7} things" for row in range(50)]
    asked = [f"the q{n} {f'noun{row}' if rng.random() < 0.5 else 'thing'}" for n, row in enumerate(targets)]
    for name, some in (("texts", nouns), ("queries_texts", asked)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in some))
    return asked


@pytest.fixture
def source(folder: Path) -> Recorded:
    return adapters.read(folder, seed=0)


@pytest.fixture
def problem(folder: Path, source: Recorded) -> tuned_search.Problem:
    train, val, _ = adapters.batches(folder, source)
    return tuned_search.Problem(source.memory.rows, train, val, seed=0)


@pytest.fixture
def worded(folder: Path, texts: list[str]) -> tuned_search.Problem:
    pytest.importorskip("bm25s")
    source = adapters.read(folder, 0, {})
    train, val, _ = adapters.batches(folder, source)
    return tuned_search.Problem(source.memory.rows, train, val, seed=0)


def loop_ranks(keys: np.ndarray, batch: tuned_search.Asked) -> list[int]:
    ranks = []
    for query, (target,) in zip(batch.queries.numpy(), batch.targets.tolist(), strict=True):
        order = np.argsort([-float(query @ key) for key in keys], kind="stable").tolist()
        ranks.append(1 + order.index(target))
    return ranks


def installed(names: list[str]) -> list[str]:
    return [name for name in names if name not in NUDGED or find_spec("nudge")]


def test_the_command_prints_every_method(
    folder: Path, texts: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("bm25s")
    monkeypatch.setattr(fitting, "EPOCHS", 1)
    output = tmp_path / "table.md"
    adapters.main([f"data.dir={folder}", "seed=0", f"output={output}", *FEW_EPOCHS])
    printed = capsys.readouterr().out
    assert output.read_text() in printed
    heading, _, titles, rule, *lines = output.read_text().strip().splitlines()
    rows, verdict = lines[: lines.index("")], lines[lines.index("") + 1 :]
    assert "50 rows; 320 train, 40 val, 40 test queries; seed 0" in heading
    assert [line.split("|")[1].strip() for line in rows] == [*installed(NAMES), "NVF, stage 1", "NVF, pipeline"]
    assert {len(line) for line in (titles, rule, *rows)} == {len(titles)}
    source = adapters.read(folder, seed=0)
    test = tuned_search.Asked(*source.splits["test"])
    right = sum(rank == 1 for rank in loop_ranks(source.memory.rows.numpy(), test))
    interval = "{value:.1f} ({low:.1f}-{high:.1f})".format(**{n: 100 * v for n, v in wilson(right, 40).items()})
    assert rows[0].split("|")[2].strip() == interval
    assert [line.split(":")[0] for line in verdict[:4]] == ["- Top-1", "- nDCG@10", "- MRR@10", "- Recall@20"]
    assert verdict[4] == "- Top-1: not significantly below exact search"


def test_exact_search_and_moved_documents_equal_loops(problem: tuned_search.Problem) -> None:
    exact = baselines.exact_search(problem)
    rows, train = problem.rows.numpy(), problem.train
    ranks = loop_ranks(rows, problem.val)
    found = {"": (np.mean([r == 1 for r in ranks]), np.mean([1 / r if r <= 10 else 0 for r in ranks]))}
    assert exact.val == pytest.approx(found[""])
    for weight in baselines.WEIGHTS:
        keys = []
        for row, vector in enumerate(rows):
            own = [q for q, (t,) in zip(train.queries.numpy(), train.targets.tolist(), strict=True) if t == row]
            key = (1 - weight) * vector + weight * np.mean(own, axis=0) if own else vector
            keys.append(key / np.linalg.norm(key))
        ranks = loop_ranks(np.array(keys), problem.val)
        measures = np.mean([r == 1 for r in ranks]), np.mean([1 / r if r <= 10 else 0 for r in ranks])
        found[f"weight {weight:g}"] = measures
    moved = baselines.moved_documents(problem, exact)
    assert moved.val == pytest.approx(max(found.values()))
    assert moved.chosen == max(found, key=lambda name: found[name])


def test_query_bank_normalisation_equals_its_formula(problem: tuned_search.Problem) -> None:
    method = baselines.bank_normalised(problem, baselines.exact_search(problem))
    _, _, beta, _, share = method.chosen.replace(",", "").split()
    bank = (float(beta) * problem.rows @ problem.train.queries.T).exp().mean(dim=-1).log() / float(beta)
    expected = problem.val.queries @ problem.rows.T - float(share) * bank
    torch.testing.assert_close(method.score(problem.val), expected)


def test_every_figure_equals_a_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(30, 40, generator=generator)
    targets = torch.stack([torch.randperm(40, generator=generator)[:3] for _ in range(30)])
    targets[::2, 1:] = -1
    batch = tuned_search.Asked(torch.arange(30.0).unsqueeze(-1), targets)
    found = tuned_search.measured(lambda part: scores[part.queries[:, 0].long()], batch)
    for query, answers in enumerate(targets.tolist()):
        order, right = scores[query].argsort(descending=True).tolist(), [row for row in answers if row >= 0]
        ranks = sorted(1 + order.index(row) for row in right)
        gain = sum(1 / np.log2(1 + rank) for rank in ranks if rank <= 10)
        best = sum(1 / np.log2(1 + rank) for rank in range(1, len(right) + 1))
        first = ranks[0]
        expected = [
            float(first == 1),
            gain / best,
            1 / first if first <= 10 else 0,
            np.mean([rank <= 20 for rank in ranks]),
        ]
        assert [float(of[query]) for of in found.values()] == pytest.approx(expected)
    several = tuned_search.figures(lambda part: scores[part.queries[:, 0].long()], batch)
    assert several == pytest.approx((float(found["nDCG@10"].mean()), float(found["MRR@10"].mean())))


@pytest.mark.parametrize("with_texts", [True, False])
def test_no_baseline_validates_worse_than_exact_search(
    with_texts: bool, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    problem = request.getfixturevalue("worded" if with_texts else "problem")
    monkeypatch.setattr(fitting, "EPOCHS", 1)
    (_, exact), *others = found = list(baselines.baselines(problem))
    assert [name for name, _ in found] == installed([name for name in NAMES if with_texts or name not in WORDED])
    for name, method in others:
        assert method.val >= exact.val or name == "words alone", name
        assert method.val == pytest.approx(tuned_search.figures(method.score, problem.val)), name


@pytest.mark.parametrize("lexicon", lexical.LEXICONS)
def test_words_are_scored_as_bm25_says(lexicon: str) -> None:
    pytest.importorskip("bm25s")
    texts = ["The cats sat on mats", "a dog sits", "dogs and dogs and a cat", "birds"]
    asked = ["cat sitting with dogs", "nothing else"]
    apart, k1, b = lexical.LEXICONS[lexicon]
    documents, average = apart(texts), np.mean([len(tokens) for tokens in apart(texts)])
    (found,) = lexical.scores(texts, [asked], lexicon)
    for scores, words in zip(lexical.dense(found, len(texts)), apart(asked), strict=True):
        for score, tokens in zip(scores, documents, strict=True):
            expected = 0.0
            for word in words:
                holders, often = sum(word in others for others in documents), tokens.count(word)
                idf = np.log(1 + (len(texts) - holders + 0.5) / (holders + 0.5))
                expected += idf * often / (often + k1 * (1 - b + b * len(tokens) / average))
            assert float(score) == pytest.approx(expected, rel=1e-5)
    assert lexical.dense(found, len(texts))[0, 2] > 0


def test_each_query_has_its_own_text(folder: Path, texts: list[str], source: Recorded) -> None:
    pytest.importorskip("bm25s")
    vectors = F.normalize(torch.from_numpy(np.load(folder / "queries.npy")), dim=-1)
    asked = lexical.asked(folder, adapters.read(folder, seed=0))
    assert asked is not None
    for split, batch in source.splits.items():
        assert asked[split] == [texts[int((vectors @ query).argmax())] for query in batch.queries]
    (folder / "queries_texts.jsonl").unlink()
    assert lexical.asked(folder, source) is None


def test_words_beside_exact_search_equal_a_loop(worded: tuned_search.Problem) -> None:
    exact = baselines.exact_search(worded)
    method = baselines.with_words(worded, exact)
    found = {}
    for place, lexicon in enumerate(lexical.LEXICONS):
        assert worded.val.lexicons is not None
        words = lexical.dense(worded.val.lexicons[place], 50)
        for weight in baselines.OF_WORDS:
            scores = worded.val.queries @ worded.rows.T + weight * words
            found[f"{lexicon}, weight {weight:.2g}"] = float(
                (scores.argmax(-1) == worded.val.targets[:, 0]).double().mean()
            )
    assert method.val.first == pytest.approx(max(found.values()))
    assert method.val.first > exact.val.first
    assert found[method.chosen] == max(found.values())


def test_nudge_is_asked_as_its_authors_say(problem: tuned_search.Problem) -> None:
    package = pytest.importorskip("nudge")
    shift = 49 - int((problem.rows @ problem.train.queries.sum(dim=0)).argmax())  # the last row is near the mean query
    train = problem.train._replace(targets=(problem.train.targets + shift) % 50)
    problem = problem._replace(rows=problem.rows.roll(shift, 0), train=train, val=train)  # so that moving rows helps
    padded = F.pad(problem.train.targets, (0, 1), value=-1)
    step = baselines.nudged(package, "NUDGEN")
    exact = tuned_search.Search(torch.nn.Identity(), problem.rows)
    found = step(problem._replace(train=problem.train._replace(targets=padded)), exact)
    log, held_out = ({"q_embs": batch.queries.numpy(), "q_ans_indx": batch.targets.tolist()} for batch in problem[1:3])
    keys = package.NUDGEN(device=torch.device("cpu")).finetune_embeddings(problem.rows.numpy(), log, held_out)
    torch.testing.assert_close(found.keys, torch.from_numpy(keys))
    assert float((found.keys - problem.rows).abs().amax()) > 0.01


def test_without_nudge_a_line_says_how_to_have_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "nudge", None)  # so that its import fails
    assert baselines.nudge() is None
    assert "pip install nudge-ft" in capsys.readouterr().err


def test_keys_that_nobody_asked_for_stay(problem: tuned_search.Problem, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "EPOCHS", 2)
    unseen = problem.train.targets[:, 0] >= 40
    seen = tuned_search.some(problem.train, (~unseen).nonzero().squeeze(-1))
    few = problem._replace(train=seen, val=seen)  # so that what is learned is kept
    method = baselines.linear(few, baselines.exact_search(few), learned_keys=True)
    moved = (method.score.keys - problem.rows).abs().amax(dim=-1) > 1e-6
    assert not moved[40:].any()
    assert moved[:40].any()


def test_adapters_undo_a_turn(problem: tuned_search.Problem) -> None:
    slant = 0.15 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    turn = torch.matrix_exp(slant - slant.T)
    train, val = (batch._replace(queries=batch.queries @ turn) for batch in (problem.train, problem.val))
    turned = problem._replace(train=train, val=val)
    exact = baselines.exact_search(turned)
    for fitted in (baselines.negatives_ranking, baselines.linear):
        assert fitted(turned, exact).val.mrr10 > exact.val.mrr10 + 0.05


def test_a_reranker_learns_from_searches_that_have_not_seen_its_queries(
    problem: tuned_search.Problem, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fitting, "EPOCHS", 1)
    seen = []

    def again(other: tuned_search.Problem) -> tuned_search.Search:
        seen.append({tuple(query) for query in other.train.queries.tolist()})
        return tuned_search.Search(torch.nn.Identity(), other.rows)

    baselines.reranked(problem, baselines.exact_search(problem)._replace(again=again))
    everything = {tuple(query) for query in problem.train.queries.tolist()}
    unseen = [everything - some for some in seen]
    assert set.union(*unseen) == everything
    assert sum(map(len, unseen)) == len(everything)
    assert max(map(len, unseen)) - min(map(len, unseen)) <= 1


def test_the_verdict_is_against_the_strongest() -> None:
    def row(name: str, right: int, gain: float) -> adapters.Row:
        top1 = (torch.arange(100) < right).double()
        return adapters.Row(name, {"Top-1": top1, "nDCG@10": torch.full((100,), gain).double()}, 0, 0, "")

    others = [row("exact search", 60, 0.9), row("NUDGE-N", 70, 0.5), row("words + exact search", 76, 0.7)]
    nvf = [row("NVF, stage 1", 90, 1), row("NVF, pipeline", 75, 0.8)]
    reach = 100 * 1.959964 * np.sqrt(0.01 * 0.99 / 100)
    first, second, *safe = adapters.verdict([*others, *nvf]).splitlines()
    assert first == f"- Top-1: -1.0 ({-1 - reach:+.1f} to {-1 + reach:+.1f}), BELOW words + exact search"
    assert second.startswith("- nDCG@10: -10.0 (")
    assert second.endswith("BELOW exact search")
    assert safe == [
        "- Top-1: not significantly below exact search",
        "- nDCG@10: SIGNIFICANTLY BELOW exact search",
        "- Top-1: not significantly below words + exact search",
        "- nDCG@10: not significantly below words + exact search",
    ]
    above, *_ = adapters.verdict([others[1], *nvf]).splitlines()
    assert above.startswith("- Top-1: +5.0 (")
    assert above.endswith("above NUDGE-N")


def test_a_part_of_a_folder(folder: Path, texts: list[str], tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    source, to = adapters.read(folder, seed=0), tmp_path / "part"
    asked = lexical.asked(folder, source)
    assert asked is not None
    to.mkdir()
    adapters.subsample(source, to, 0, asked=asked, subsample_rows=30, subsample_train=100)
    part = adapters.read(to, seed=0)
    asked_of_part = lexical.asked(to, part)
    assert asked_of_part is not None
    assert (len(part.memory), len(part.splits["train"].queries)) == (30, 100)
    for name, split in part.splits.items():
        whole = source.splits[name]
        for query, (target,), text in zip(split.queries, split.targets, asked_of_part[name], strict=True):
            place = int((whole.queries - query).abs().sum(dim=-1).argmin())
            before = int(whole.targets[place, 0])
            torch.testing.assert_close(part.memory.rows[target], F.normalize(source.memory.rows[before], dim=-1))
            assert text == asked[name][place]
            assert part.texts[target] == source.texts[before]
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
    torch.testing.assert_close(plain, attention.loss(*batch[:3]))

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


def test_the_latency_of_one_query_is_compared() -> None:
    pytest.importorskip("faiss")
    found = latency.latency([60], [8], latency.RERANKERS, queries=6, at_once=[1, 2])
    assert [case["reranker"] for case in found] == [*latency.RERANKERS]
    assert all(case["same_answers"] and case["p50"].keys() == case["p99"].keys() for case in found)
    assert len(latency.report(found).splitlines()) == 4
    (large,) = latency.latency([60], [8], ["residual"], queries=7, at_once=[2], batch=3, ways=["hnsw", "indexed"])
    assert large["same_answers"]
    assert [*large["p50"]] == [latency.HNSW, latency.INDEXED]
    assert "2 x flat" not in latency.report([large])


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


@pytest.mark.slow
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


UPGRADED = ["ridge to the rows", "orthogonal Procrustes", "low-rank affine", "residual MLP"]
UPGRADED += ["NVF, alignment alone", "NVF, stage 1", "NVF, pipeline"]


@pytest.fixture
def upgraded(folder: Path) -> Path:
    """The folder in splits, with queries of another width, those of the rows' model beside them."""
    turn = np.random.default_rng(7).standard_normal((8, 12))
    old, targets = np.load(folder / "queries.npy"), np.load(folder / "targets.npy")
    for name, of in {"train": slice(0, 280), "val": slice(280, 340), "test": slice(340, 400)}.items():
        np.save(folder / f"{name}_queries.npy", np.tanh(old[of] @ turn / 4) + 0.3)
        np.save(folder / f"{name}_targets.npy", targets[of])
        np.save(folder / f"reference_old_{name}_queries.npy", old[of])
    for name in ("queries", "targets"):
        (folder / f"{name}.npy").unlink()
    np.save(folder / "reference_new_corpus.npy", np.tanh(np.load(folder / "corpus.npy") @ turn / 4) + 0.3)
    return folder


def test_an_upgrade_has_every_row(upgraded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitting, "EPOCHS", 1)
    output = tmp_path / "table.md"
    upgrade.main([f"dir={upgraded}", f"output={output}", *FEW_EPOCHS])
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in output.read_text().splitlines()[2:]]
    assert [name for name, *_ in cells] == ["old queries, old rows", "everything embedded anew", *2 * UPGRADED]
    assert [on for _, on, *_ in cells] == ["-"] * 2 + ["log"] * 7 + ["pairs"] * 7
    old, corpus, targets = (
        np.load(upgraded / f"{name}.npy").astype(np.float64)
        for name in ("reference_old_test_queries", "corpus", "test_targets")
    )
    right = (old @ (corpus / np.linalg.norm(corpus, axis=1, keepdims=True)).T).argmax(axis=1) == targets
    assert cells[0][2].startswith(f"{100 * right.mean():.1f} (")
    (upgraded / "train_queries.npy").rename(tmp_path / "train_queries.npy")
    with pytest.raises(InputError, match="train_queries"):
        upgrade.main([f"dir={upgraded}"])


def test_maps_between_models_are_what_they_say() -> None:
    generator = stream(0, "test")
    drawn, noise = torch.randn(200, 12, generator=generator), torch.randn(200, 8, generator=generator)
    new = torch.linalg.qr(drawn - drawn.mean(dim=0)).Q  # no direction weighs more, so Procrustes finds the turn itself
    turn = torch.linalg.qr(torch.randn(12, 8, generator=generator)).Q
    queries = torch.randn(5, 12, generator=generator)
    for offset, place in ((0, 0), (3, 1)):
        moved = list(upgrade.procrustes((new, new @ turn + offset)))[place]
        torch.testing.assert_close(moved(queries), F.normalize(queries @ turn + offset, dim=-1), rtol=1e-4, atol=1e-4)
    both = drawn, torch.tanh(drawn @ turn) + 0.1 * noise + 1
    x, y = (part.double() - part.double().mean(dim=0) for part in both)
    scale = float((x.T @ x).diagonal().mean())
    expected = torch.linalg.solve(x.T @ x + 0.1 * scale * torch.eye(12), x.T @ y)
    fitted, offset = upgrade.affine(both, 0.1)
    torch.testing.assert_close(fitted, expected.float())
    torch.testing.assert_close(both[0].mean(dim=0) @ fitted + offset, both[1].mean(dim=0), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(upgrade.affine(both, 0.1, 8)[0], fitted)
    for rank in (1, 3):
        low, _ = upgrade.affine(both, 0.0, rank)
        assert int(torch.linalg.matrix_rank(low, rtol=1e-4)) == rank
        left, values, right = torch.linalg.svd(upgrade.affine(both, 0.0)[0].double(), full_matrices=False)
        cut = left[:, :rank] * values[:rank] @ right[:rank]
        errors = [float((x @ matrix.double() - y).square().sum()) for matrix in (low, cut)]
        assert errors[0] <= errors[1]
    model = upgrade.ResidualMLP(fitted, offset)
    torch.testing.assert_close(model(queries), upgrade.mapped(fitted, offset)(queries))


def test_items_held_out_leave_the_folder_with_their_queries(folder: Path, tmp_path: Path) -> None:
    queries, targets = np.load(folder / "queries.npy"), np.load(folder / "targets.npy")
    for name, part in zip(update.SPLITS, (slice(0, 300), slice(300, 350), slice(350, 400)), strict=True):
        np.save(folder / f"{name}_queries.npy", queries[part])
        np.save(folder / f"{name}_targets.npy", targets[part])
    held = update.held_out_items(50, seed=0)
    theirs = update.split(folder, tmp_path / "rest", held)
    corpus, rest = np.load(folder / "corpus.npy"), np.load(tmp_path / "rest" / "corpus.npy")
    assert held.sum() == 10
    assert np.array_equal(rest, corpus[~held])
    assert np.array_equal(theirs["test"], held[targets[350:]])
    kept = np.load(tmp_path / "rest" / "test_targets.npy")[:, 0]
    assert np.array_equal(rest[kept], corpus[targets[350:][~theirs["test"]]])


def test_an_update_is_timed(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    monkeypatch.setattr(sys, "argv", ["update.py", "rows=300", "add=20", "dim=8"])
    update.main()
    assert capsys.readouterr().out.startswith("20 rows added in ")


def test_large_sets_have_what_real_logs_have(tmp_path: Path) -> None:
    rotation = large.generate(tmp_path, rows=500, dim=64, queries=2000, seed=0)
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(64), rtol=0, atol=1e-4)
    rows, asked, targets = (np.load(tmp_path / f"{name}.npy") for name in ("corpus", "queries", "targets"))
    assert (rows.shape, asked.shape, targets.shape) == ((500, 64), (2000, 64), (2000,))
    counts = np.bincount(targets, minlength=500)
    assert (counts == 0).sum() >= 100  # a fifth is never asked for
    assert counts.max() > 5 * counts[counts > 0].mean()
    exact = (asked.astype(float) @ rows.T.astype(float)).argmax(axis=1) == targets
    assert large.oracle(tmp_path, rotation, seed=0) > 1.2 * exact.mean()


def test_texts_are_made_of_the_manual(tmp_path: Path) -> None:
    examples = "Illustrative Examples:\r\n\r\nRice farms (i.e., \r\nwet ones)\r\nPaddies\r\n\r\n"
    industry = f"It grows rice.\r\n\r\n{examples}Cross-References."
    manual = {"11": "Farms.", "111160": industry, "111150": "It grows corn.\r\n\r\nCross-References."}
    records = {code: {"Title": f"Title {code} ", "Description": text} for code, text in manual.items()}
    (tmp_path / "manual.json").write_text(json.dumps(records))
    picture.main([f"manual={tmp_path / 'manual.json'}", f"texts={tmp_path / 'new/texts'}"])
    made = {name: (tmp_path / f"new/texts/{name}.jsonl").read_text().splitlines() for name in ("documents", "queries")}
    assert list(map(json.loads, made["documents"])) == [{"id": "111160", "text": "Title 111160: It grows rice."}]
    asked = ["Rice farms (i.e., wet ones)", "Paddies"]
    assert list(map(json.loads, made["queries"])) == [{"query": query, "id": "111160"} for query in asked]
    with pytest.raises(InputError, match="texts"):
        picture.main([])


def test_the_first_queries_that_were_won_are_drawn(folder: Path, texts: list[str], tmp_path: Path) -> None:
    pytest.importorskip("bm25s")
    slant = 0.3 * torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    turn = torch.matrix_exp(slant - slant.T)
    np.save(folder / "queries.npy", np.load(folder / "queries.npy") @ turn.numpy())
    source = adapters.read(folder, seed=0)
    attention = SoftAttention(source.memory, transform="linear")
    attention.transform.network.weight.data.copy_(turn)  # which turns them back
    pipeline, test = Pipeline(attention, Reranker(8, kind="residual"), k=5).eval(), source.splits["test"]
    pipeline.save(tmp_path / "run/pipeline")
    after, right = pipeline.search(test.queries, 1).rows[:, 0], test.targets[:, 0]
    ranks = np.array(loop_ranks(source.memory.rows.numpy(), tuned_search.Asked(*test)))
    hit = (after == right).numpy()
    won, lost = np.flatnonzero((ranks > 1) & hit), int(((ranks == 1) & ~hit).sum())
    assert len(won) > picture.QUERIES
    share = {"top1": {"value": 0.5, "low": 0.4, "high": 0.6}}
    results = {
        "config": {"data": {"dir": str(folder), "words": None}, "seed": 0},
        "against_exact": {"wins": len(won), "losses": lost},
        "test": {"exact": share, "pipeline": share},
    }
    (tmp_path / "run/results.json").write_text(json.dumps(results))
    np.save(tmp_path / "run/answered.npy", hit)
    picture.main([f"run={tmp_path / 'run'}", f"picture={tmp_path / 'search.svg'}"])
    said = [
        str(text.text) for text in ET.parse(tmp_path / "search.svg").getroot().iter("{http://www.w3.org/2000/svg}text")
    ]
    asked = lexical.asked(folder, source)
    assert asked is not None
    shown = [*won[: picture.QUERIES]]
    assert [text[1:-1] for text in said if text.startswith("\u201c")] == [asked["test"][query] for query in shown]
    assert said.count("\u2713") == len(shown)
    places = [f"the right one at place {ranks[query]}" for query in shown if ranks[query] > picture.HITS]
    assert [text for text in said if text.startswith("the right one")] == places
    assert said[-1].endswith(f"exact search 50.0% (40.0-60.0), NVF 50.0% (40.0-60.0); {len(won)} won, {lost} lost")
    (tmp_path / "run/results.json").write_text(json.dumps({**results, "against_exact": {"wins": 99, "losses": lost}}))
    with pytest.raises(InputError, match="99"):
        picture.main([f"run={tmp_path / 'run'}", f"picture={tmp_path / 'search.svg'}"])
