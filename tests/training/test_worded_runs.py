"""Runs with texts: words help where they decide and hurt nothing where they are noise; runs are resumed and kept."""

import json
import random
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from conftest import compose_config, without_time
from nvf import Pipeline
from nvf.training import cache
from nvf.training.build import build
from programs import Program

Run = Callable[..., dict[str, Any]]
SHORT = ["attention.epochs=2", "reranker.epochs=2", "reranker.folds=2", "trainer.enable_progress_bar=false"]
pytest.importorskip("bm25s")


def write(folder: Path, *, words: str | None = "decide", seed: int = 0) -> Path:
    """60 items, 600 queries that vectors alone often mistake; words `decide`, are `noise`, or there are none."""
    rng, drawn = np.random.default_rng(seed), random.Random(seed)
    folder.mkdir()
    corpus, targets = rng.standard_normal((60, 16)), rng.integers(60, size=600)
    np.save(folder / "corpus.npy", corpus)
    np.save(folder / "queries.npy", corpus[targets] + 1.2 * rng.standard_normal((600, 16)))
    np.save(folder / "targets.npy", targets)
    names = [f"name{row}" for row in range(60)]
    lines = {"texts": [f"a thing called {name}" for name in names]}
    lines["queries_texts"] = [
        f"where is {names[row] if words == 'decide' and drawn.random() < 0.7 else drawn.choice(names)}"
        for row in targets
    ]
    for name, texts in lines.items() if words else ():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return folder


def top1(results: dict[str, Any]) -> dict[str, float]:
    found = {name: results["test"][name] for name in ("exact", "attention", "pipeline")}
    return {name: of["top1"]["value"] for name, of in found.items() if of is not None}


def test_words_help_where_they_decide(run: Run, tmp_path: Path) -> None:
    folder = write(tmp_path / "folder")
    results = run("data=embeddings", f"data.dir={folder}", *SHORT)
    found, figures = top1(results), results["test"]
    without = top1(run("data=embeddings", f"data.dir={folder}", "data.words=null", *SHORT, folder=tmp_path / "without"))
    assert found["exact"] == without["exact"]
    assert found["attention"] > without["attention"] + 0.1
    assert found["pipeline"] > without["pipeline"] + 0.1
    assert figures["hybrid"]["top1"]["value"] > max(found["exact"], figures["words"]["top1"]["value"])
    assert all(variant["word_weights"][0] > 0 for variant in results["selection"])
    pipeline = Pipeline.load(tmp_path / "run/pipeline")
    texts = [json.loads(line)["text"] for line in (folder / "queries_texts.jsonl").read_text().splitlines()]
    queries, targets = np.load(folder / "queries.npy"), np.load(folder / "targets.npy")
    hits = [pipeline.search(queries, 1, texts=given).rows[:, 0] for given in (texts, None)]
    right = [float((rows == targets).mean()) for rows in hits]
    assert right[0] > right[1] + 0.1


def test_words_that_are_noise_hurt_nothing(run: Run, tmp_path: Path) -> None:
    with_noise, without = (
        run("data=embeddings", f"data.dir={write(tmp_path / str(words), words=words)}", *SHORT, folder=tmp_path / name)
        for words, name in (("noise", "with"), (None, "without"))
    )
    assert with_noise["test"]["exact"] == without["test"]["exact"]
    assert top1(with_noise)["attention"] >= top1(without)["attention"] - 0.04  # two of sixty queries, by luck
    assert top1(with_noise)["pipeline"] >= top1(without)["pipeline"] - 0.04


def test_a_run_with_texts_is_reused_and_resumed(run: Run, tmp_path: Path) -> None:
    folder, kept = write(tmp_path / "folder"), f"cache={tmp_path / 'cache'}"
    words = ["data=embeddings", f"data.dir={folder}", *SHORT]
    first, second = (run(*words, kept, folder=tmp_path / name) for name in ("first", "second"))
    assert second["attention_fitted_by"] is not None
    assert without_time(first) == without_time(second)
    weights = [Pipeline.load(tmp_path / name / "pipeline").state_dict() for name in ("first", "second")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_the_checkpoint_of_a_worded_stage_1_stands_in_for_fitting(run: Run, tmp_path: Path) -> None:
    words = ["data=embeddings", f"data.dir={write(tmp_path / 'folder')}", *SHORT, "stage=attention"]
    for name in ("first", "kept"):  # the second's checkpoint is the cache's
        first = run(*words, f"cache={tmp_path / 'cache'}", folder=tmp_path / name)
        checkpoint = tmp_path / name / "checkpoints/attention/best.safetensors"
        again = run(*words, f"attention_checkpoint={checkpoint}", folder=tmp_path / f"again {name}")
        assert top1(again) == top1(first)
        weights = [
            one["word_weights"][0] for results in (again, first) for one in results["selection"] if one["chosen"]
        ]
        assert min(weights) > 0
        assert weights[0] == pytest.approx(weights[1], rel=0.05)
    assert first["attention_fitted_by"] is not None


def test_joint_training_knows_the_words(run: Run, tmp_path: Path) -> None:
    words = ["data=embeddings", f"data.dir={write(tmp_path / 'folder')}", *SHORT, "stage=joint", "joint.epochs=2"]
    results = run(*words)
    assert top1(results)["pipeline"] > top1(results)["exact"] + 0.1
    assert results["gradients"]["vanished"] == []


def test_the_key_of_a_fitted_stage_1_is_of_the_words_too(tmp_path: Path) -> None:
    keys = []
    for name, words, setting in (
        ("one", "decide", []),
        ("copy", "decide", []),
        ("noise", "noise", []),
        ("none", None, []),
        ("stopped", "decide", ["data.words.stopwords=[where]"]),
    ):
        folder = write(tmp_path / name, words=words)
        built = build(compose_config("data=embeddings", f"data.dir={folder}", *setting))
        keys.append(cache.stage_key(built.config, built.source, [one.config["attention"] for one in built.variants]))
    assert keys[0] == keys[1]
    assert len({*keys}) == 4


def test_a_run_that_is_killed_goes_on_with_its_words(tmp_path: Path) -> None:
    words = ["data=embeddings", f"data.dir={write(tmp_path / 'folder')}", *SHORT, "cache=off", "dashboards=none"]
    for name, at in (("alone", None), ("killed", (signal.SIGKILL, "last.ckpt", 3))):
        with Program(*words, "save_every=1", f"hydra.run.dir={name}", cwd=tmp_path, at=at) as program:
            assert (program.wait() == 0) == (at is None), program.stderr
    with Program("resume=killed", cwd=tmp_path) as program:
        assert program.wait() == 0, program.stderr
    figures = [json.loads((tmp_path / name / "results.json").read_text()) for name in ("alone", "killed")]
    assert figures[0]["test"] == figures[1]["test"]
    weights = [Pipeline.load(tmp_path / name / "pipeline").state_dict() for name in ("alone", "killed")]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_changed_texts_are_changed_data(tmp_path: Path) -> None:
    folder = write(tmp_path / "folder")
    words = ["data=embeddings", f"data.dir={folder}", *SHORT, "cache=off", "dashboards=none", "stage=attention"]
    at = (signal.SIGKILL, "last.ckpt", 1)
    with Program(*words, "save_every=1", "hydra.run.dir=run", cwd=tmp_path, at=at) as program:
        assert program.wait() != 0
    texts = (folder / "texts.jsonl").read_text()
    (folder / "texts.jsonl").write_text(texts.replace("name7", "name8"))
    with Program("resume=run", cwd=tmp_path) as program:
        assert program.wait() != 0
        assert "changed" in program.stderr
        assert program.stderr.count("\n") == 1
