"""Which stage 1 goes on: variants, limits, folds; a run on recorded queries from end to end."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import SMALL, compose_config, write_folder
from nvf import InputError, Pipeline
from nvf.data.queries import QueryBatch, Recorded
from nvf.models.memory import VectorMemory, unit
from nvf.training import select as selection
from nvf.training.build import Built, build
from nvf.training.plan import SHARE, plan
from nvf.training.select import cross_fit, fit_attention
from nvf.training.stages import attention_stage

Run = Callable[..., dict[str, Any]]
SHORT = ["attention.epochs=3", "reranker.epochs=3", "k=5", "trainer.enable_progress_bar=false"]


@pytest.fixture
def shifted(tmp_path: Path) -> Path:
    """60 items in 16 dimensions and 3,000 queries, each seen through a fixed map: there is something to learn."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "shifted"
    folder.mkdir()
    corpus = rng.standard_normal((60, 16))
    targets = rng.integers(50, size=3000)  # ten items are never asked for
    queries = corpus[targets] @ (np.eye(16) + 0.25 * rng.standard_normal((16, 16)))
    np.save(folder / "corpus.npy", corpus)
    np.save(folder / "queries.npy", queries + 0.9 * rng.standard_normal(queries.shape))
    np.save(folder / "targets.npy", targets)
    return folder


def test_a_run_on_recorded_queries_beats_exact_search_and_says_how(run: Run, shifted: Path, tmp_path: Path) -> None:
    results = run("data=embeddings", f"data.dir={shifted}", *SHORT)
    top1 = {m: results["test"][m]["top1"]["value"] for m in ("exact", "attention", "pipeline")}
    assert top1["exact"] < top1["attention"]
    assert top1["exact"] < top1["pipeline"]
    val = {m: results["val"][m]["top1"]["value"] for m in ("exact", "attention", "pipeline")}
    assert val["exact"] <= val["attention"] <= val["pipeline"]
    tried = results["selection"]
    assert [(variant["transform"], variant["keys"]) for variant in tried] == [
        ("identity", "frozen"),
        ("identity", "moved"),
        ("linear", "moved"),
        ("linear", "learned"),
    ]
    (chosen,) = [variant for variant in tried if variant["chosen"]]
    assert chosen["val_top1"] == max(variant["val_top1"] for variant in tried) == pytest.approx(val["attention"])
    assert (chosen["transform"], chosen["keys"]) != ("identity", "frozen")
    assert chosen["val_ndcg10"] is None
    assert results["test"]["seen_rows"]["exact"]["queries"] == 300
    assert results["test"]["unseen_rows"]["exact"] is None
    assert results["duplicates"] == {}
    assert (tmp_path / "run/checkpoints/attention/best.safetensors").is_file()
    again = Pipeline.load(tmp_path / "run/pipeline")
    assert again.search(np.load(shifted / "queries.npy")[:7], k=3).rows.shape == (7, 3)


def test_ndcg_chooses_where_queries_have_several_answers(run: Run, tmp_path: Path) -> None:
    """Exact search has a right row first for every query, and half of the right rows: Top-1 would never leave it."""
    rng = np.random.default_rng(0)
    folder = tmp_path / "several"
    folder.mkdir()
    centres = rng.standard_normal((10, 16))
    halves = np.stack([np.eye(16)[:10], centres], axis=1)  # of each class one half lies where its queries are
    corpus = halves.repeat(4, axis=1).reshape(-1, 16) + 0.05 * rng.standard_normal((80, 16))
    classes = rng.integers(10, size=600)
    np.save(folder / "corpus.npy", corpus)
    np.save(folder / "queries.npy", np.eye(16)[classes] + 0.05 * rng.standard_normal((600, 16)))
    np.save(folder / "targets.npy", 8 * classes[:, None] + np.arange(8))
    results = run("data=embeddings", f"data.dir={folder}", *SHORT, "k=10", "attention.lr=0.03")
    val, tried = results["val"], results["selection"]
    assert val["exact"]["top1"]["value"] == 1.0
    assert val["attention"]["ndcg10"]["value"] > val["exact"]["ndcg10"]["value"] + 0.1
    assert val["pipeline"]["ndcg10"]["value"] >= val["attention"]["ndcg10"]["value"]
    (chosen,) = [variant for variant in tried if variant["chosen"]]
    best = max(variant["val_ndcg10"] for variant in tried)
    assert chosen["val_ndcg10"] == best == pytest.approx(val["attention"]["ndcg10"]["value"])
    assert chosen["val_top1"] <= 1.0 == tried[0]["val_top1"]
    assert results["test"]["pipeline"]["recall"] == results["test"]["attention"]["recall"]


def test_a_log_that_is_no_guide_does_not_pull_logged_items_down(run: Run, tmp_path: Path) -> None:
    """Each of 800 items is asked once, some twice: of dealt queries, few ask for what is in the log."""
    rng, folder = np.random.default_rng(0), tmp_path / "once"
    folder.mkdir()
    corpus = unit(torch.from_numpy(rng.standard_normal((800, 16)))).numpy()
    targets = np.concatenate([np.arange(800), np.flatnonzero(rng.random(800) < 0.15)])
    np.save(folder / "corpus.npy", corpus)
    np.save(folder / "queries.npy", corpus[targets] + 0.275 * rng.standard_normal((len(targets), 16)))
    np.save(folder / "targets.npy", targets)
    results = run("data=embeddings", f"data.dir={folder}", *SHORT, "attention=identity")
    assert results["log"]["ignored"] == ["log_count", "support", "nearest"]
    asked_before = results["test"]["seen_rows"]
    assert asked_before["pipeline"]["top1"]["value"] >= asked_before["attention"]["top1"]["value"]


def test_the_checkpoint_of_the_chosen_variant_stands_in_for_fitting(run: Run, shifted: Path, tmp_path: Path) -> None:
    first = run("data=embeddings", f"data.dir={shifted}", *SHORT, "stage=attention")
    checkpoint = tmp_path / "run/checkpoints/attention/best.safetensors"
    again = run(
        *("data=embeddings", f"data.dir={shifted}", *SHORT, "stage=attention", f"attention_checkpoint={checkpoint}"),
        folder=tmp_path / "again",
    )
    assert again["test"] == first["test"]


def test_exact_search_is_kept_where_nothing_beats_it(run: Run, folder: Path) -> None:
    ruin = ["attention.lr=30", "attention.schedule=constant", "attention.hub_correction=false", "stage=attention"]
    results = run("data=embeddings", f"data.dir={folder}", *SHORT, *ruin)
    assert results["selection"][0]["chosen"]
    assert results["test"]["attention"]["top1"] == results["test"]["exact"]["top1"]


def planned_of(built: Built) -> Any:
    return plan(built.variants, built.config["reranker"]["folds"], built.config["data"])


def test_a_limit_costs_epochs_then_variants_and_folds(folder: Path) -> None:
    def planned(allowed: float | None) -> tuple[list[tuple[str, int]], int | None, bool]:
        work = "null" if allowed is None else allowed
        config = compose_config("data=embeddings", f"data.dir={folder}", f"data.work={work}")
        left, folds, cut = planned_of(build(config))
        assert cut is None or cut["by"] == f"data.work={allowed:g}"
        return [(variant.name, variant.fit.epochs) for variant in left], folds, cut is not None

    whole = 50 * 320 * 8 / SHARE  # of the limit, an epoch
    # Two variants, and three folds of which each lacks a third of the queries: four fits.
    untrained = [("identity-frozen", 0), ("identity-moved", 0)]
    every = [*untrained, ("linear-moved", 14), ("linear-learned", 14)]
    assert planned(None) == planned(14.1 * 4 * whole) == (every, 3, False)
    assert planned(5.1 * 4 * whole) == ([(name, min(epochs, 5)) for name, epochs in every], 3, True)
    assert planned(4.1 * 2 * whole) == ([*untrained, ("linear-learned", 4)], 2, True)
    assert planned(5.1 * whole) == ([*untrained, ("linear-moved", 5)], None, True)
    assert planned(0.1 * whole) == ([*untrained, ("linear-moved", 1)], None, True)


@pytest.mark.parametrize(
    ("rows", "queries", "kept"),
    [
        (2_067, 2_716, None),
        (6_168, 15_080, None),
        (200_000, 40_000, {"variants": 3, "epochs": 1, "folds": None}),
    ],
)
def test_the_default_plan_is_a_matter_of_sizes(rows: int, queries: int, kept: dict[str, Any] | None) -> None:
    config = compose_config("data=embeddings", "reranker=residual", "reranker.folds=3")  # no evidence is gathered
    config["data"]["work"] *= 8 / 384  # vectors as narrow as here, for those of these sizes that take some minutes
    memory = VectorMemory.synthetic(rows=rows, dim=8, seed=0)
    batch = QueryBatch(memory.rows[torch.arange(queries) % rows], (torch.arange(queries) % rows)[:, None])
    built = build(config, Recorded(memory, dict.fromkeys(("train", "val", "test"), batch)))
    variants, _, cut = planned_of(built)
    assert (cut and cut["kept"]) == kept
    assert [variant.fit.epochs for variant in variants] == ([0, 0, 14, 14] if kept is None else [0, 0, 1])


def test_what_a_limit_cuts_is_recorded_and_shown(run: Run, folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "nvf")
    price = 50 * 320 * 8 / SHARE
    limited = run(
        "data=embeddings", f"data.dir={folder}", *SHORT, f"data.work={2.1 * 2 * price}", "+trainer.max_epochs=2"
    )
    kept, asked = {"epochs": 2, "variants": 3, "folds": 2}, {"epochs": 2, "variants": 4, "folds": 3}
    assert limited["cut"] == {"attention": {"by": f"data.work={2.1 * 2 * price:g}", "kept": kept, "asked": asked}}
    assert len(limited["selection"]) == 3
    assert limited["selection"][2]["epochs"] <= 2
    assert "stage 1 was cut           to 2 of 2 epochs, 3 of 4 variants, 2 of 3 folds, by data.work=" in caplog.text


def test_what_is_not_clearly_above_exact_search_gives_way(
    run: Run, shifted: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(selection, "clearly_above", lambda *_: False)
    results = run("data=embeddings", f"data.dir={shifted}", *SHORT, "stage=attention", "attention.hub_correction=false")
    exact, *others = results["selection"]
    assert max(variant["val_top1"] for variant in others) > exact["val_top1"]
    assert exact["chosen"]
    assert results["test"]["attention"]["top1"] == results["test"]["exact"]["top1"]


def test_folds_have_not_seen_their_queries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path / "f", queries=200)
    queries, targets = np.load(tmp_path / "f/queries.npy"), np.load(tmp_path / "f/targets.npy")
    np.save(tmp_path / "f/queries.npy", np.concatenate([queries, queries]))
    np.save(tmp_path / "f/targets.npy", np.concatenate([targets, targets]))
    config = compose_config("data=embeddings", f"data.dir={tmp_path / 'f'}", "attention=linear", *SHORT)
    built = build(config)
    chosen = fit_attention(built, tmp_path)
    given: list[torch.Tensor] = []

    def watched(config: Any, partial: Any) -> Any:
        given.append(partial.splits["train"].queries)
        return attention_stage(config, partial)

    monkeypatch.setattr(selection, "attention_stage", watched)
    folds = cross_fit(built, chosen._replace(about={**chosen.about, "epochs": 2}, folds=3), tmp_path)
    train = built.source.splits["train"]
    assert sorted(torch.cat([fold.unseen for fold in folds]).tolist()) == list(range(len(train.queries)))
    for fold, fitted_on in zip(folds, given, strict=True):
        assert len(fitted_on) + len(fold.unseen) == len(train.queries)
        mine = {tuple(query.tolist()) for query in train.queries[fold.unseen]}
        assert not mine & {tuple(query.tolist()) for query in fitted_on}
    weights = [fold.attention.transform.network.weight for fold in folds]
    assert not torch.equal(weights[0], weights[1])


def test_variants_that_share_transform_and_keys_have_folders_of_their_own() -> None:
    given = "[{keys: frozen, hidden: 4}, {keys: frozen, hidden: 8}, {keys: learned}]"
    built = build(compose_config(*SMALL, "attention=residual", f"attention.variants={given}"))
    assert [variant.name for variant in built.variants] == [
        "residual-frozen-1",
        "residual-frozen-2",
        "residual-learned",
    ]
    assert [variant.module.attention.settings["hidden"] for variant in built.variants] == [4, 8, None]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data.work=0"], "data.work=0 is not a number above 0"),
        (["data.work=much"], "data.work=much is not a number above 0"),
        (["attention.variants=[{epochs: -1}]"], "attention.variants.epochs=-1 is not a whole number of at least 0"),
        (["reranker.folds=1"], "reranker.folds=1 is not a whole number of at least 2"),
        (["attention.variants=[]"], "attention.variants=.* is no list of stage"),
        (["attention.variants=[{rate: 1}]"], "attention.variants=.* is no list of"),
        (["attention.keys=loose"], "attention.keys=loose is unknown; choose one of frozen, moved, learned"),
    ],
)
def test_bad_settings_are_refused(run: Run, folder: Path, overrides: list[str], message: str) -> None:
    single = ["attention=linear"] if "keys" in overrides[0] else []
    with pytest.raises(InputError, match=message):
        run("data=embeddings", f"data.dir={folder}", *single, *overrides)


def test_evidence_needs_a_log(run: Run) -> None:
    with pytest.raises(InputError, match=r"reranker\.kind=evidence, reranker\.folds=3 need a log"):
        run("reranker=evidence")
